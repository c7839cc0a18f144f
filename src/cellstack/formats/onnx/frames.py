"""Files of which a call is one step: a frame goes in, and the states that the step before gave.

Such a graph has no time: where a recurrent operator needs an axis of it, the graph makes one of length 1, or takes the
rows for it. It is read as what it does with the rows of a batch, each a frame; then time is put ahead of what flows:
recurrent operators go from frame to frame, and what looks along an axis within a frame becomes a PerFrame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cellstack.formats.build import Builder
from cellstack.formats.onnx.cells import INPUTS, KINDS, is_recurrent, read_operator
from cellstack.formats.onnx.file import Model, declared, short
from cellstack.formats.onnx.fold import Broadcast
from cellstack.formats.onnx.values import Final, Flowing, Run, States
from cellstack.formats.simplify import Draft, simplify
from cellstack.nodes import Context, Flatten, GlobalPool, Merge, Node, PerFrame, Recurrent, Select
from cellstack.nodes.base import Shape, Stepwise
from cellstack.nodes.shape import Along
from cellstack.spec import FormatError

if TYPE_CHECKING:
    from cellstack.formats.onnx.graph import Reader

EXAMPLE = "cs.load(path, frames={{{name!r}: 512}})"


class Frame(NamedTuple):
    """How an input of a file goes with frames.

    Attributes:
        labels: of the input's axes: B rows, F the frame, 1 of length 1.
        size: how many numbers a frame of the network's has; None where that isn't known.
        context: how many of the frame before stand ahead of it.
    """

    labels: str
    size: int | None
    context: int


def frames_of(
    model: Model, data: list[str], sizes: Mapping[str, Any], contexts: Mapping[str, Any]
) -> dict[str, Frame | str]:
    """Return how each input that carries data goes with frames; why it doesn't, where it can't.

    Args:
        model: the file.
        data: the inputs' names.
        sizes: how many numbers a frame has, by input, where that is given.
        contexts: how many numbers of the frame before stand ahead of each, by input, where there are such.

    Raises:
        FormatError: sizes that don't fit the file, or of what is no input.
    """
    graph, found = model.proto.graph, dict[str, Frame | str]()
    for what, given in (("frames", sizes), ("context", contexts)):
        for name, number in given.items():
            if name not in data:
                names = ", ".join(map(short, data or [value.name for value in graph.input]))
                raise FormatError(f"{model.path}: expected {what} of the inputs {names}, got one of {name!r:.80}")
            least = 1 if what == "frames" else 0
            if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or not least <= number < 1 << 31:
                raise FormatError(f"{model.path}: expected {what} of {name!r} to be a number, got {number!r:.80}")
    shapes = {value.name: declared(value) for value in graph.input}
    for name in data:
        shape = shapes[name]
        if shape is None:
            found[name] = "expected its axes to be declared, of a frame a row, found none"
            continue
        wide = [n for n, axis in enumerate(shape) if n and axis != 1] or [len(shape) - 1]
        if len(wide) > 1 or not shape:
            found[name] = f"expected a frame of one axis, [B, n], found {shape}"
            continue
        labels = "".join("F" if n == wide[0] else "1" if n or len(shape) == 1 else "B" for n in range(len(shape)))
        whole, context = shape[wide[0]], int(contexts.get(name, 0))
        size = int(sizes[name]) if name in sizes else None if whole is None else whole - context
        if size is not None and (size < max(1, context) or (whole is not None and size + context != whole)):
            raise FormatError(
                f"{model.path}: input {short(name)}: expected frames and context of {whole} numbers together, a frame "
                f"as long as its context at least, got {size} and {context}"
            )
        found[name] = Frame(labels, size, context)
    return found


@dataclass(frozen=True, eq=False)
class Step(Node):
    """A node that goes from frame to frame, among nodes that take frames as rows; it stands for `node` until then."""

    node: Node

    def __post_init__(self) -> None:
        object.__setattr__(self, "cells", self.node.cells)
        object.__setattr__(self, "dtype", self.node.dtype)

    def check(self, owner: str, *shapes: Shape) -> Shape:
        """See `Node`."""
        (shape,) = shapes
        return self.node.check(owner, (None, *shape))[1:]


# ── recurrent operators ─────────────────────────────────────────────────────────────────────────────────────────────


def recurrent(reader: Reader, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
    """Read a recurrent operator that takes frames as its steps: those of the rows, or one of each."""
    operator = read_operator(reader.scope, node)
    if len(operator.cells) != 1 or operator.direction != "forward" or operator.lengths:
        raise ValueError("expected one direction, forwards, and no lengths, where a call is one step")
    x = reader.flowing(values[0], "X")
    if x.axes[-1:] != ("F",) or len(x.axes) != 3:
        raise ValueError(f"expected X [T, B, F] of frames, found axes {' '.join(x.axes)}")
    for n, axis in enumerate(x.axes):
        if axis == "T":
            if x.steps != 1:
                raise ValueError(
                    f"expected one step a frame, found {x.steps if x.steps else 'steps of unknown number'}"
                )
            pooled = reader.put(f"{x.wire}.step", GlobalPool("last"), x)
            x = replace(pooled, axes=tuple("1" if m == n else other for m, other in enumerate(x.axes)))
    number, cell = len(reader.runs), operator.cells[0]
    starts: dict[str, Any] = dict(zip(INPUTS[5:7], values[5:7], strict=False))
    for key in operator.started:
        _start(reader, starts[key], key, Final(number, 0, key[-1]))
    y = reader.put(node, Step(Recurrent((cell,))), x)
    reader.runs.append(Run(operator.cells, y.wire, y.wire, True))
    one, other = x.axes[:2]
    axes = (one, other, "1", "F") if operator.batch_first else (one, "1", other, "F")
    given: list[Any] = [replace(y, axes=axes)]
    by_rows = (other if operator.batch_first else one) == "B"  # the rows are the steps: states are of one row
    for part in cell.spec.state_sizes:
        refs = np.empty((1, 1) if by_rows or "B" not in x.axes else (1,), object)
        refs.reshape(-1)[0] = Final(number, 0, part)
        stacked = ("S", "S", "F") if refs.ndim == 2 else ("B", "S", "F") if operator.batch_first else ("S", "B", "F")
        given.append(States(stacked, refs))
    return given


def _start(reader: Reader, value: Any, what: str, final: Final) -> None:
    """Note which state of the inputs an operator starts from; zeros need no note."""
    if isinstance(value, Broadcast) and not value.array.any():
        return
    if not isinstance(value, States) or not value.initial or value.refs.size != 1:
        raise ValueError(f"expected {what} to be an input, zeros or a constant, found what the graph computes")
    (initial,) = value.refs.reshape(-1)
    if reader.starts.setdefault(initial, final) != final:
        raise ValueError(f"expected {what} to be a state of its own, found one that another starts from, too")


HANDLERS = dict.fromkeys(KINDS, recurrent)


def makes_steps(model: Model) -> bool:
    """Whether recurrent operators of the outermost graph take a time axis that the graph makes within."""
    nodes = model.proto.graph.node
    producers = {name: node for node in nodes for name in node.output}
    for node in nodes:
        if is_recurrent(node):
            before = producers.get(node.input[0])
            while before is not None and before.op_type in ("Identity", "Cast", "Transpose"):
                before = producers.get(before.input[0])
            if before is not None and before.op_type == "Unsqueeze":
                return True
    return False


# ── time ahead of all ───────────────────────────────────────────────────────────────────────────────────────────────


class _Lifter:
    """Makes a graph over rows one over frames: see the head of this file.

    Args:
        builder: what has been read.
    """

    def __init__(self, builder: Builder) -> None:
        self.draft = Draft(builder.inputs, builder.nodes, builder.sources, builder.outputs, builder.shapes)
        simplify(self.draft)
        self.builder = Builder(builder.most_nodes, builder.most_numbers)
        self.builder.problems = dict(builder.problems)
        self.wires: dict[str, str] = {}

    def lift(self) -> Builder:
        """Return the graph over frames."""
        draft = self.draft
        for name, shape in draft.inputs.items():
            self.wires[name] = self.builder.input(name, None if shape is None else (None, *shape))
        for name, node in draft.nodes.items():
            if self._alike(name):
                wires = [self.wire(source) for source in draft.sources[name]]
                made = node.node if isinstance(node, Step) else node
                self.wires[name] = self.builder.add(name, made, *wires)
        for name in draft.outputs:
            self.builder.output(self.wire(name), name)
        return self.builder

    def _alike(self, name: str) -> bool:
        """Whether a node does with frames `[B, T, F]` what it does with rows `[B, F]`."""
        node, values = self.draft.nodes[name], (name, *self.draft.sources[name])
        if isinstance(node, Step):
            return True
        shapes = [self.draft.shapes[value] for value in values]
        vectors = all(shape is not None and len(shape) == 1 for shape in shapes)
        return vectors and (isinstance(node, Stepwise) or (isinstance(node, Along) and node.axis == -1))

    def wire(self, name: str) -> str:
        """Return the wire of a value, which is one number after the other in each frame."""
        if name not in self.wires:
            self.wires[name] = self._within(name)
        return self.wires[name]

    def _within(self, name: str) -> str:
        """Put in a PerFrame that makes a value out of those that flow from frame to frame, and return its wire."""
        draft = self.draft
        inner, outer, waiting = set[str](), dict[str, None](), [name]
        while waiting:
            value = waiting.pop()
            if value in draft.inputs or self._alike(value):
                outer[value] = None
            elif value not in inner:
                inner.add(value)
                waiting += draft.sources[value]
        shape = draft.shapes[name]
        if shape is None or len(shape) != 1:
            found = "of several axes" if shape is None else list(shape)
            raise ValueError(f"{name}: expected one axis where frames go on, found {found}")
        widths = []
        for value in outer:
            width = (draft.shapes[value] or (None,))[-1]
            if width is None:
                raise ValueError(f"{value}: expected frames of a length that is known")
            widths.append(width)
        wires = [self.wire(value) for value in outer]
        wire = wires[0] if len(wires) == 1 else self.builder.add(f"{name}.takes", Merge("concat"), *wires)
        nodes: list[Node] = []
        sources: list[tuple[int, ...]] = []
        places: dict[str, int] = {}
        at = 0
        for value, width in zip(outer, widths, strict=True):
            places[value] = 0
            if len(wires) > 1:
                nodes.append(Select(at, at + width, axis=-1))
                sources.append((0,))
                places[value] = len(nodes)
            at += width
        for value, node in draft.nodes.items():
            if value in inner:
                before = draft.shapes[draft.sources[value][0]]
                if isinstance(node, GlobalPool) and before is not None and before[0] == 1:
                    node = Flatten()
                nodes.append(node)
                sources.append(tuple(places[source] for source in draft.sources[value]))
                places[value] = len(nodes)
        return self.builder.add(name, PerFrame((sum(widths),), tuple(nodes), tuple(sources)), wire)


def lifted(builder: Builder) -> Builder:
    """Return a graph that was read over rows as one over frames.

    Args:
        builder: the graph; `Step` stands for what goes from frame to frame.

    Raises:
        ValueError: what can't be at every frame.
    """
    return _Lifter(builder).lift()


def input_of(reader: Reader, name: str, frame: Frame, rows: int | None) -> Flowing:
    """Put in an input of frames, and return what the file takes of it: the frame, after its context.

    Args:
        reader: of the graph.
        name: of the input.
        frame: how it goes with frames.
        rows: how many rows the file takes; None where any will do.
    """
    wire = reader.builder.input(name, (frame.size,))
    flow = Flowing(wire, tuple(frame.labels), reader.shape(wire), rows)
    if frame.context:
        flow = reader.put(f"{name}.context", Step(Context(frame.context)), flow)
    return flow
