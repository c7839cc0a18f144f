"""Files where a call is one step: the inputs are a frame and the states that the previous call returned.

Such a graph has no time axis: where a recurrent operator needs one, the graph adds one of length 1, or uses the rows as
time. The graph is read as if each row of a batch were a frame; then a time axis is added to all data: recurrent
operators run over the frames, and operators along an axis within a frame become a PerFrame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cellstack.cells.errors import FormatError
from cellstack.formats.build import Builder
from cellstack.formats.draft import Draft
from cellstack.formats.onnx.cells import is_recurrent
from cellstack.formats.onnx.file import Model, declared, short
from cellstack.formats.simplify import simplify
from cellstack.nodes import Flatten, GlobalPool, Merge, Node, PerFrame, Select
from cellstack.nodes.along import Along
from cellstack.nodes.base import Shape, Stepwise

EXAMPLE = "cs.load(path, frames={{{name!r}: 512}})"


class Frame(NamedTuple):
    """How an input of a file relates to frames.

    Attributes:
        labels: of the input's axes: B rows, F the frame, 1 of length 1.
        size: the size of a frame of the network; None if unknown.
        context: how many values of the previous frame come before it.
    """

    labels: str
    size: int | None
    context: int


def frames_of(
    model: Model, data: list[str], sizes: Mapping[str, Any], contexts: Mapping[str, Any]
) -> dict[str, Frame | str]:
    """Return how each data input relates to frames; a string with the reason where it can't.

    Args:
        model: the file.
        data: the inputs' names.
        sizes: the sizes of frames, by input, where given.
        contexts: how many values of the previous frame come before each frame, by input, where given.

    Raises:
        FormatError: sizes that don't fit the file, or a name that isn't an input.
    """
    graph, found = model.graph, dict[str, Frame | str]()
    for what, given in (("frames", sizes), ("context", contexts)):
        for name, number in given.items():
            if name not in data:
                names = ", ".join(map(short, data or [value.name for value in graph.input]))
                raise FormatError(f"{model.path}: {what}: no input {name!r:.80}; the inputs are {names}")
            least = 1 if what == "frames" else 0
            if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or not least <= number < 1 << 31:
                kind = f"a whole number from {least} up"
                raise FormatError(f"{model.path}: expected {what} of {name!r} to be {kind}, got {number!r:.80}")
    shapes = {value.name: declared(value) for value in graph.input}
    for name in data:
        shape = shapes[name]
        if shape is None:
            found[name] = "its axes must be declared, with one frame per row"
            continue
        wide = [n for n, axis in enumerate(shape) if n and axis != 1] or [len(shape) - 1]
        if len(wide) > 1 or not shape:
            found[name] = f"expected one frame per row, [B, n], found {shape}"
            continue
        labels = "".join("F" if n == wide[0] else "1" if n or len(shape) == 1 else "B" for n in range(len(shape)))
        whole, context = shape[wide[0]], int(contexts.get(name, 0))
        size = int(sizes[name]) if name in sizes else None if whole is None else whole - context
        if size is not None and (size < max(1, context) or (whole is not None and size + context != whole)):
            raise FormatError(
                f"{model.path}: input {short(name)}: frame and context must add up to {whole}, with the frame at least "
                f"as long as the context, got {size} and {context}"
            )
        found[name] = Frame(labels, size, context)
    return found


@dataclass(frozen=True, eq=False)
class Step(Node):
    """A placeholder for `node`, which runs over the frames, in a graph whose other nodes take frames as rows."""

    node: Node

    def __post_init__(self) -> None:
        object.__setattr__(self, "cells", self.node.cells)
        object.__setattr__(self, "dtype", self.node.dtype)

    def check(self, owner: str, *shapes: Shape) -> Shape:
        """See `Node`."""
        (shape,) = shapes
        return self.node.check(owner, (None, *shape))[1:]


def makes_steps(model: Model) -> bool:
    """Whether the outermost graph adds the time axis of its recurrent operators itself."""
    nodes = model.graph.node
    producers = {name: node for node in nodes for name in node.output}
    for node in nodes:
        if is_recurrent(node):
            before = producers.get(node.input[0])
            while before is not None and before.op_type in ("Identity", "Cast", "Transpose"):
                before = producers.get(before.input[0])
            if before is not None and before.op_type == "Unsqueeze":
                return True
    return False


# ── adding the time axis ──────────────────────────────────────────────────────────────────────────────────────────────


class _Lifter:
    """Turns a graph over rows into one over frames; see the module's docstring."""

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
        """Whether a node computes the same on frames `[B, T, F]` as on rows `[B, F]`."""
        node, values = self.draft.nodes[name], (name, *self.draft.sources[name])
        if isinstance(node, Step):
            return True
        shapes = [self.draft.shapes[value] for value in values]
        vectors = all(shape is not None and len(shape) == 1 for shape in shapes)
        return vectors and (isinstance(node, Stepwise) or (isinstance(node, Along) and node.axis == -1))

    def wire(self, name: str) -> str:
        """Return the wire of a value that is a vector per frame."""
        if name not in self.wires:
            self.wires[name] = self._within(name)
        return self.wires[name]

    def _within(self, name: str) -> str:
        """Add a PerFrame that computes a value from values per frame, and return its wire."""
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
            raise ValueError(f"{name}: expected a vector per frame, found axes {found}")
        widths = []
        for value in outer:
            width = (draft.shapes[value] or (None,))[-1]
            if width is None:
                raise ValueError(f"{value}: the length of the frames must be known")
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
    """Return a graph over rows as a graph over frames; a `Step` wraps each node that runs over the frames.

    Raises:
        ValueError: a value that can't be computed per frame.
    """
    return _Lifter(builder).lift()
