"""Assembling networks: every reader adds nodes to a `Builder`, which names, wires, checks and bounds them.

A reader translates; the builder puts together. What can't be translated is collected, so that one error names all of
it, and in the end the graph is simplified and becomes a `Network`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cellstack.formats.simplify import Draft, simplify
from cellstack.graph import origin, state_of
from cellstack.network import Network
from cellstack.nodes import Activation, Flatten, Node, Permute, Recurrent, Reshape
from cellstack.nodes.base import Shape
from cellstack.spec import FormatError, ShapeError

HINT = "cellstack.extract(path) gives its recurrent parts"
MOST_NODES = 10_000  # a model may be used twice by one that is used twice, and so on
MOST_NUMBERS = 1 << 24  # that a file doesn't hold: it only says how wide they are
MOST_PROBLEMS = 6  # named one by one in a message


class TooMuchError(FormatError):
    """A file that asks for so much that nothing else about it matters."""


class ProblemsError(FormatError):
    """What stands in the way of a Network, the message names it all."""


class Names:
    """Names that are all different: one that is taken gets a number after it.

    Args:
        taken: names that something has.
        mark: stands between a name and its number.
    """

    def __init__(self, taken: Iterable[str] = (), mark: str = ".") -> None:
        self.taken, self.mark = set(taken), mark
        self.numbers: dict[str, int] = {}  # the last that a name was given

    def fresh(self, name: str) -> str:
        """Return a name that nothing has, and keep it."""
        found, number = name, self.numbers.get(name, 1)
        while found in self.taken:
            number += 1
            found = f"{name}{self.mark}{number}"
        self.numbers[name] = number
        self.taken.add(found)
        return found


def clean(name: str) -> str:
    """Return a name as a Network takes it: printable, without `/`."""
    text = "".join(letter if letter.isprintable() else "_" for letter in name.strip("/").replace("/", "."))
    return text or "node"


def listed(entries: Iterable[str], most: int = MOST_PROBLEMS, between: str = "; ") -> str:
    """Return some entries as one text: the first of them, and how many more there are."""
    entries = list(entries)
    rest = len(entries) - most
    return between.join([*entries[:most], *([f"and {rest} more"] if rest > 0 else [])])


class Builder:
    """Assembles one network.

    A value goes by its wire: the name of the input or of the node that it comes from, or of a state of a node's.

    Args:
        most_nodes: how many nodes there may be.
        most_numbers: how many numbers may be made that the file doesn't hold.

    Attributes:
        shapes: of every wire, the axes after the batch; None where it isn't known.
        states: of what `add` put in, by the wire that it returned, the wires of its cells' states, in their order.
        problems: what can't be translated, with its rank: the least comes first.
        pinned: whether the network depends on the lengths that the inputs have in the file, time among them.

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
        """Put an input in, and return its wire.

        Args:
            name: what it shall be called.
            shape: the axes after the batch, None where any length will do; None = as the nodes that take it say.
        """
        wire = self.names.fresh(clean(name))
        self.inputs[wire] = self.shapes[wire] = shape
        return wire

    def add(self, name: str, node: Node, *wires: str) -> str:
        """Put a node in, and return the wire that carries what it returns.

        A stack of cells becomes a node a cell, as files have a layer each; one with residuals stays whole, as a Merge
        treats masked steps otherwise.

        Args:
            name: what it shall be called; a number goes after it where that is taken.
            node: the node.
            wires: what it takes, then what its cells start from, if that is said.

        Raises:
            ShapeError: the node can't take such values.
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
            raise TooMuchError(f"expected at most {self.most_nodes} nodes, found more")
        wire = self.names.fresh(clean(name))
        takes, gives = node.axes  # where nothing else says what comes in, the node may
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

    def output(self, wire: str, name: str = "output") -> None:
        """Declare what a wire carries an output; an input, or one that is an output already, is copied.

        Args:
            wire: the wire.
            name: of the node that copies, where there has to be one.
        """
        if wire in self.inputs or wire in self.outputs:
            wire = self.add(name, Activation("linear"), wire)
        self.outputs.append(wire)

    def length(self, wire: str, place: int) -> int | None:
        """Return the length of an axis, counted from 1, which the network then depends on; None where it isn't known.

        Args:
            wire: of what value.
            place: the axis, 1 being the first after the batch.
        """
        shape = self.shapes[wire]
        found = None if shape is None else shape[place - 1]
        self.pinned |= found is not None
        return found

    def make(self, numbers: int) -> int:
        """Return `numbers`, which are made and don't come out of the file.

        Raises:
            TooMuchError: there are too many of them in all.
        """
        self.numbers += numbers
        if self.numbers > self.most_numbers:
            raise TooMuchError(f"expected at most {self.most_numbers} numbers that the file doesn't hold, found more")
        return numbers

    def refuse(self, problem: str, rank: int = 0) -> None:
        """Note what can't be translated, once.

        Args:
            problem: what it is, by name.
            rank: what matters most has the least, and comes first.
        """
        self.problems.setdefault(problem, rank)

    def check(self) -> None:
        """Raise `ProblemsError` where something can't be translated."""
        if self.problems:
            raise ProblemsError(listed(sorted(self.problems, key=lambda problem: self.problems[problem])))

    def network(
        self,
        metadata: Mapping[str, Any] | Callable[[Draft], Mapping[str, Any]] | None = None,
        numbered: bool = False,
    ) -> Network:
        """Return the network, simplified: see `cellstack.formats.simplify`. Nodes that lead to no output are left out.

        Args:
            metadata: see `Network`; or what makes it of the simplified graph.
            numbered: call the nodes layer_0, layer_1 and so on, whatever they are called here.

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
        )


def _layers(node: Recurrent) -> list[Recurrent]:
    """Return a stack as a node a cell. One that runs backwards turns the sequence round once, below."""
    first, *others = node.cells
    below = [Recurrent((first,), True, node.go_backwards), *(Recurrent((cell,)) for cell in others[:-1])]
    return [*below, Recurrent((others[-1],), node.return_sequences, False, node.zero_output_for_mask)]


def _any_length(draft: Draft) -> dict[str, Shape | None]:
    """Return the inputs' shapes for sequences of any length, where no node moves steps to another axis."""
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
