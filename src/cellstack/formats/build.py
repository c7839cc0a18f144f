"""Assembling networks: every reader adds nodes to a `Builder`, which names, wires and checks them, within size limits.

Layers that can't be translated are collected, so that one error names all of them. At the end the graph is simplified
and becomes a `Network`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cellstack.cells.errors import FormatError, ShapeError
from cellstack.formats.draft import Draft
from cellstack.formats.simplify import simplify
from cellstack.network import Network
from cellstack.network.graph import origin, state_of
from cellstack.nodes import Activation, Flatten, Node, Permute, Recurrent, Reshape
from cellstack.nodes.base import Shape
from cellstack.nodes.recurrent import final

HINT = "cellstack.extract(path) (or `cellstack info FILE`) gives its recurrent parts"
MOST_NODES = 10_000  # nested models that are used several times each can multiply without end
MOST_NUMBERS = 1 << 24  # created on reading: a few bytes of a file can ask for arrays of any width
MOST_PROBLEMS = 6  # listed one by one in a message


class TooMuchError(FormatError):
    """A file asks for more nodes or numbers than the limits allow; reading stops at once."""


class ProblemsError(FormatError):
    """Parts of a file can't be translated to a Network; the message lists them all."""


class Names:
    """Makes names unique: one that is already taken gets a number appended, after `mark`."""

    def __init__(self, taken: Iterable[str] = (), mark: str = ".") -> None:
        self.taken, self.mark = set(taken), mark
        self.numbers: dict[str, int] = {}  # the last number appended to each name

    def fresh(self, name: str) -> str:
        """Return an unused name and reserve it."""
        found, number = name, self.numbers.get(name, 1)
        while found in self.taken:
            number += 1
            found = f"{name}{self.mark}{number}"
        self.numbers[name] = number
        self.taken.add(found)
        return found


def clean(name: str) -> str:
    """Return a name in the form that a Network accepts: printable, without `/`."""
    text = "".join(letter if letter.isprintable() else "_" for letter in name.strip("/").replace("/", "."))
    return text or "node"


def listed(entries: Iterable[str], most: int = MOST_PROBLEMS, between: str = "; ") -> str:
    """Return entries as one text: the first `most` of them, and how many more there are."""
    entries = list(entries)
    rest = len(entries) - most
    return between.join([*entries[:most], *([f"and {rest} more"] if rest > 0 else [])])


class Builder:
    """Assembles one network.

    A wire identifies a value: it is the name of an input, of the node that returns the value, or of a node's state.

    Args:
        most_nodes: the greatest number of nodes.
        most_numbers: the greatest number of values that are created rather than read from the file.

    Attributes:
        shapes: for every wire, the axes after the batch; None where they are unknown.
        states: for every wire that `add` returned, the wires of its cells' states, in their order.
        problems: what can't be translated, and its rank; messages list the lowest rank first.
        pinned: whether the network depends on the axis lengths in the file, including the number of steps.

    >>> import numpy as np
    >>> from cellstack.nodes import Activation, Dense
    >>> builder = Builder()
    >>> wire = builder.add("dense", Dense(np.ones((3, 2))), builder.input("x", (None, 3)))
    >>> builder.shapes[wire]
    (None, 2)
    >>> builder.output(builder.add("relu", Activation("relu"), wire))
    >>> builder.network()
    Network of float64: [B, T, 3] -> [B, T, 2], 6 numbers
      dense  Dense  relu  [B, T, 2]  6
    """

    def __init__(self, most_nodes: int = MOST_NODES, most_numbers: int = MOST_NUMBERS) -> None:
        self.most_nodes, self.most_numbers, self.numbers = most_nodes, most_numbers, 0
        self.names = Names()
        self.inputs: dict[str, Shape | None] = {}
        self.nodes: dict[str, Node] = {}
        self.sources: dict[str, tuple[str, ...]] = {}
        self.outputs: list[str] = []
        self.shapes: dict[str, Shape | None] = {}
        self.states: dict[str, tuple[str, ...]] = {}
        self.problems: dict[str, int] = {}
        self.pinned = False

    def input(self, name: str, shape: Shape | None = None) -> str:
        """Add an input, and return its wire.

        Args:
            name: the input's name; made unique where it is taken.
            shape: the axes after the batch, None for an axis of any length; None = inferred from the nodes that use it.
        """
        wire = self.names.fresh(clean(name))
        self.inputs[wire] = self.shapes[wire] = shape
        return wire

    def add(self, name: str, node: Node, *wires: str) -> str:
        """Add a node, and return the wire of its output.

        A stack of cells becomes one node per cell, as files store one layer per cell. A residual stack stays whole,
        because a Merge treats masked steps differently.

        Args:
            name: the node's name; made unique where it is taken.
            node: the node.
            wires: its inputs, then the initial states of its cells, if they are given.

        Raises:
            ShapeError: the node doesn't accept inputs of these shapes.
            TooMuchError: there are too many nodes.
        """
        if isinstance(node, Recurrent) and len(node.cells) > 1 and not node.residual:
            (wire, *starts), states = wires, []
            for number, layer in enumerate(_layers(node)):
                count = len(layer.state_sizes)
                wire = self.add(f"{name}.{number}", layer, wire, *starts[:count])
                starts = starts[count:]
                states += self.states[wire]
            self.states[wire] = tuple(states)
            return wire
        if len(self.nodes) >= self.most_nodes:
            raise TooMuchError(f"more than {self.most_nodes} nodes aren't supported")
        wire = self.names.fresh(clean(name))
        takes, gives = node.axes  # where the input's shape is unknown, the node may fix its number of axes
        unsaid = None if takes is None else (None,) * takes
        shapes = [self.shapes[source] or unsaid for source in wires]
        known = [shape for shape in shapes if shape is not None]
        after = None if gives is None else (None,) * gives
        self.shapes[wire] = node.check(wire, *known) if len(known) == len(shapes) else after
        self.nodes[wire], self.sources[wire] = node, wires
        sizes = {state_of(wire, state): (size,) for state, size in node.state_sizes.items()}
        self.shapes |= sizes
        self.states[wire] = tuple(sizes)
        return wire

    def final(self, wire: str) -> None:
        """Make the recurrent node whose output is a wire return its final output only.

        Args:
            wire: the output, which no other node uses yet.

        Raises:
            ShapeError: the wire isn't the output of a recurrent node.
        """
        node = final(self.nodes[wire]) if wire in self.nodes else None
        if node is None:
            raise ShapeError('GlobalPool("final") must directly follow a recurrent layer')
        shape = self.shapes[wire]
        self.nodes[wire], self.shapes[wire] = node, (None,) if shape is None else shape[-1:]

    def output(self, wire: str, name: str = "output") -> None:
        """Make a wire an output; an input, or a wire that is one already, is copied by an extra node of this name."""
        if wire in self.inputs or wire in self.outputs:
            wire = self.add(name, Activation("linear"), wire)
        self.outputs.append(wire)

    def length(self, wire: str, place: int) -> int | None:
        """Return the length of an axis, None if it is unknown; from then on the network depends on that length.

        Args:
            wire: the value's wire.
            place: the axis, 1 being the first after the batch.
        """
        shape = self.shapes[wire]
        found = None if shape is None else shape[place - 1]
        self.pinned |= found is not None
        return found

    def make(self, numbers: int) -> int:
        """Count values that are created rather than read from the file, and return their number.

        Raises:
            TooMuchError: their total exceeds `most_numbers`.
        """
        self.numbers += numbers
        if self.numbers > self.most_numbers:
            raise TooMuchError(f"more than {self.most_numbers} numbers that aren't stored in the file aren't supported")
        return numbers

    def refuse(self, problem: str, rank: int = 0) -> None:
        """Record once that something can't be translated; the message lists problems of the lowest rank first."""
        self.problems.setdefault(problem, rank)

    def check(self) -> None:
        """Raise `ProblemsError` if something can't be translated."""
        if self.problems:
            raise ProblemsError(listed(sorted(self.problems, key=lambda problem: self.problems[problem])))

    def network(
        self,
        metadata: Mapping[str, Any] | Callable[[Draft], Mapping[str, Any]] | None = None,
        numbered: bool = False,
    ) -> Network:
        """Return the simplified network: see `cellstack.formats.simplify`. Nodes that reach no output are dropped.

        Args:
            metadata: see `Network`; or a function that returns it for the simplified graph.
            numbered: rename the nodes to layer_0, layer_1 and so on.

        Raises:
            ProblemsError: something can't be translated.
            ShapeError, TypeError, ValueError: see `Network`.
        """
        self.check()
        draft = Draft(self.inputs, self.nodes, self.sources, self.outputs, self.shapes)
        simplify(draft)
        names = {name: f"layer_{number}" if numbered else name for number, name in enumerate(draft.nodes)}

        def named(value: str) -> str:
            node = origin(value)
            return names.get(node, node) + value.removeprefix(node)

        return Network(
            list(draft.nodes.values()),
            list(names.values()),
            metadata(draft) if callable(metadata) else metadata,
            inputs=self.inputs if self.pinned else _any_length(draft),
            wires=[[named(source) for source in draft.sources[name]] for name in draft.nodes],
            outputs=[named(name) for name in draft.outputs],
            _warn=False,
        )


def chain(nodes: Iterable[Node], metadata: Mapping[str, Any], name: str = "", numbered: bool = False) -> Network:
    """Return the network of nodes, one after the other; `name`: of all of them, "" for layer_0, layer_1 and so on."""
    builder = Builder()
    wire = builder.input("x")
    for number, node in enumerate(nodes):
        wire = builder.add(name or f"layer_{number}", node, wire)
    builder.output(wire)
    return builder.network(metadata, numbered)


@contextmanager
def errors_of(where: str) -> Iterator[None]:
    """Raise errors about values and types, such as shapes that don't match, as a `FormatError` that begins so."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise FormatError(f"{where}: {str(error)[:300]}") from None


def _layers(node: Recurrent) -> list[Recurrent]:
    """Return a stack as one node per cell. If it runs backwards, only its first node reverses the sequence."""
    first, *others = node.cells
    below = [Recurrent((first,), True, node.go_backwards), *(Recurrent((cell,)) for cell in others[:-1])]
    return [*below, Recurrent((others[-1],), node.return_sequences, False, node.zero_output_for_mask)]


def _any_length(draft: Draft) -> dict[str, Shape | None]:
    """Return the inputs' shapes with the number of steps left open, unless a node moves steps to another axis."""
    loose: dict[str, Shape | None] = {}
    for name, shape in draft.inputs.items():
        takers = [draft.nodes[taker] for taker in draft.takers[name]]
        ids = bool(takers) and all(node.takes_ids for node in takers)
        timed = shape is not None and (len(shape) == 2 or (len(shape) == 1 and ids))
        loose[name] = (None, *shape[1:]) if shape is not None and timed else shape
    shapes = dict(loose)
    shapes |= {
        state_of(name, state): (n,) for name, node in draft.nodes.items() for state, n in node.state_sizes.items()
    }
    for name, node in draft.nodes.items():
        given = [shapes[source] for source in draft.sources[name]]
        moved = isinstance(node, (Flatten, Reshape)) or (isinstance(node, Permute) and draft.takers[name])
        if moved and given != [draft.shapes[source] for source in draft.sources[name]]:
            return dict(draft.inputs)
        known = [shape for shape in given if shape is not None]
        try:
            shapes[name] = node.check(name, *known) if len(known) == len(given) else None
        except ShapeError:
            return dict(draft.inputs)
    return loose
