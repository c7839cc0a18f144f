"""Nodes for networks whose steps are signal frames: context from the frame before, and a small graph per frame.

Audio models often take frames of some hundred samples, and process each frame with a small network, such as a
convolution over its samples, before a recurrent layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import ShapeError
from cellstack.nodes.base import (
    MOST_AXES,
    Array,
    CellState,
    Flow,
    GradientError,
    Node,
    NodeRun,
    Shape,
    StateGradients,
    StepRule,
    check_axes,
    shown,
)
from cellstack.nodes.checks import check_integer
from cellstack.nodes.stored import Entry

# The number of frames that a PerFrame processes at a time, so that intermediate values stay in the cache.
BLOCK = 64


@dataclass(frozen=True, eq=False)
class Context(Node):
    """Prepend the last numbers of the previous frame to each frame: `[B, T, W]` to `[B, T, size + W]`.

    At the start of a sequence and after a reset these numbers are zeros. Masked frames are skipped: the next frame gets
    the numbers of the last used frame.

    Args:
        size: how many numbers of the previous frame, from 1 to W.

    Raises:
        ValueError: an invalid size.

    >>> Context(1).apply(np.array([[[1.0, 2.0], [3.0, 4.0]]]))
    array([[[0., 1., 2.],
            [2., 3., 4.]]])
    """

    size: int
    file_type = "context"
    about = "{0.size} numbers of the frame before"
    axes = (2, 2)
    heeds_mask = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", check_integer("Context", "size", self.size))

    def check(self, owner: str, *shapes: Shape) -> Shape:
        (shape,) = shapes
        check_axes(owner, self, shape)
        steps, width = shape
        if width is not None and width < self.size:
            raise ShapeError(f"{owner}: Context expected frames of at least {self.size} numbers, got {shown(shape)}")
        return (steps, None if width is None else self.size + width)

    def apply(self, x: Array, mask: NDArray[np.bool_] | None = None, reset: NDArray[np.bool_] | None = None) -> Array:
        """Return `[B, T, size + W]` for `x [B, T, W]`, with its mask and resets `[B, T]`."""
        batch, steps, width = x.shape
        y = np.zeros((batch, steps, self.size + width), x.dtype)
        y[:, :, self.size :] = x
        if mask is None:
            y[:, 1:, : self.size] = x[:, :-1, width - self.size :]
        elif steps:
            # The last used step up to each step.
            last = np.maximum.accumulate(np.where(mask, np.arange(steps), -1), axis=1)
            before = np.concatenate([np.full((batch, 1), -1), last[:, :-1]], axis=1)
            ends = np.take_along_axis(x[:, :, width - self.size :], np.maximum(before, 0)[:, :, None], axis=1)
            y[:, :, : self.size] = np.where(before[:, :, None] >= 0, ends, x.dtype.type(0))
        if reset is not None:
            begun = reset if mask is None else _begun(reset, mask)
            y[:, :, : self.size][begun] = 0
        return y

    def run(self, flows: Sequence[Flow], states: tuple[CellState | None, ...], threads: int) -> Flow:
        (flow,) = flows
        return Flow(self.apply(flow.x, flow.mask, flow.reset), flow.mask, flow.reset)

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        raise GradientError("it depends on the resets of its input, which a trace doesn't store")

    def step_rule(self, *shapes: Shape) -> StepRule:
        def advance(memory: Array, x: Array) -> tuple[Array, Array]:
            if not x.shape[1]:
                return np.zeros((*x.shape[:2], self.size + x.shape[2]), x.dtype), memory
            ends = x[:, :, x.shape[2] - self.size :]
            before = memory if x.shape[1] == 1 else np.concatenate([memory, ends[:, :-1]], axis=1)
            return np.concatenate([before, x], axis=2), ends[:, -1:].copy()

        return StepRule(memory=(1, self.size), advance=advance)


def _begun(reset: NDArray[np.bool_], mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the resets of the used steps: a reset at a masked step moves to the next used one."""
    begun, found = np.zeros_like(reset), np.zeros(len(reset), bool)
    for step in range(reset.shape[1]):
        found |= reset[:, step]
        begun[:, step] = found & mask[:, step]
        found &= ~mask[:, step]
    return begun


@dataclass(frozen=True, eq=False)
class PerFrame(Node):
    """A small graph of nodes that is applied to each frame separately, `[B, T, *frame]` to `[B, T, …]`.

    The inner nodes see each frame as a row of a batch: their time axis is an axis of the frame, such as its samples.

    Args:
        frame: the shape of a frame, None for an axis of any length.
        nodes: the inner nodes in the order of execution. Nodes with cells, with ids, or that make masks aren't allowed.
        takes: the inputs of each node: 0 is the frame, n the output of the n-th node. The output of the last node is
            the output of the graph.

    Raises:
        ValueError: no nodes, or a node that isn't allowed; a wrong input; a node whose output isn't used.
        ShapeError: a node whose input has a wrong shape.
        TypeError: nodes of different dtypes.

    >>> from cellstack.nodes import Conv1D, GlobalPool, Reshape
    >>> loud = PerFrame((6,), (Reshape((-1, 1)), Conv1D(np.ones((3, 1, 1))), GlobalPool("max")), ((0,), (1,), (2,)))
    >>> loud.apply(np.array([[[0.0, 1.0, 1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0, 0.0, 0.0]]]))
    array([[[3.],
            [2.]]])
    """

    frame: tuple[int | None, ...]
    nodes: tuple[Node, ...]
    takes: tuple[tuple[int, ...], ...]
    file_type = "per_frame"

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if not isinstance(self.frame, Sequence) or not 1 <= len(self.frame) < MOST_AXES:
            raise ValueError(f"{owner}: expected frame to be the shape of a frame, got {self.frame!r:.80}")
        lengths = (None if axis is None else check_integer(owner, "every axis", axis) for axis in self.frame)
        object.__setattr__(self, "frame", tuple(lengths))
        object.__setattr__(self, "nodes", tuple(self.nodes))
        object.__setattr__(self, "takes", tuple(tuple(sources) for sources in self.takes))
        if not self.nodes or len(self.nodes) != len(self.takes):
            raise ValueError(
                f"{owner}: expected nodes and takes of the same length, got {len(self.nodes)} and {len(self.takes)}"
            )
        shapes: list[Shape] = [self.frame]
        for number, (node, sources) in enumerate(zip(self.nodes, self.takes, strict=True), 1):
            if not isinstance(node, Node) or node.cells or node.memory or node.makes_mask or node.takes_ids:
                kind = type(node).__name__
                raise ValueError(f"{owner}: nodes with cells, with ids, or that make masks aren't allowed, got {kind}")
            known = all(type(source) is int and 0 <= source < number for source in sources)
            if not known or not sources or (node.inputs is not None and len(sources) != node.inputs):
                raise ValueError(f"{owner}: expected node {number} to take earlier values, got {sources!r:.80}")
            shapes.append(node.check(f"{owner}: node {number}", *(shapes[source] for source in sources)))
        unused = set(range(1, len(self.nodes))) - {source for sources in self.takes for source in sources}
        if unused:
            raise ValueError(f"{owner}: the output of node {min(unused)} isn't used")
        dtypes = {node.dtype for node in self.nodes if node.dtype is not None}
        if len(dtypes) > 1:
            raise TypeError(f"{owner}: expected nodes of one dtype, got {', '.join(sorted(map(str, dtypes)))}")
        object.__setattr__(self, "dtype", next(iter(dtypes), None))
        object.__setattr__(self, "input_size", self.frame[-1])
        object.__setattr__(self, "axes", (1 + len(self.frame), 1 + len(shapes[-1])))
        object.__setattr__(self, "_shapes", tuple(shapes))

    def check(self, owner: str, *shapes: Shape) -> Shape:
        (shape,) = shapes
        fits = len(shape) == 1 + len(self.frame) and all(
            None in (got, want) or got == want for got, want in zip(shape[1:], self.frame, strict=True)
        )
        if not fits:
            expected = f"expected frames {shown((None, *self.frame))}"
            raise ShapeError(f"{owner}: {type(self).__name__} {expected}, got {shown(shape)}")
        return (shape[0], *self._shapes[-1])  # pyright: ignore[reportAttributeAccessIssue]

    @cached_property
    def _calls(self) -> list[tuple[Callable[..., Array], tuple[int, ...]]]:
        """The function of each node and the indices of its inputs, prepared once to keep steps of a stream fast."""
        return [(_call(node), sources) for node, sources in zip(self.nodes, self.takes, strict=True)]

    def _rows(self, x: Array) -> Array:
        """Return the output for frames `[N, *frame]`."""
        values = [x]
        for call, sources in self._calls:
            values.append(
                call(values[sources[0]]) if len(sources) == 1 else call(*(values[source] for source in sources))
            )
        return values[-1]

    def apply(self, x: Array) -> Array:
        """Return `[B, T, …]` for `x [B, T, *frame]`."""
        batch, steps = x.shape[:2]
        rows = np.ascontiguousarray(x).reshape(batch * steps, *x.shape[2:])
        blocks = [self._rows(rows[at : at + BLOCK]) for at in range(0, max(1, len(rows)), BLOCK)]
        y = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return y.reshape(batch, steps, *y.shape[1:])

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        x = run.inputs[0].x
        values = [Flow(np.ascontiguousarray(x).reshape(-1, *x.shape[2:]))]
        for node, sources in zip(self.nodes, self.takes, strict=True):
            values.append(node.run([values[source] for source in sources], (), 1))
        found = [np.zeros_like(value.x) for value in values]
        found[-1] = dy.reshape(found[-1].shape)
        for number in range(len(self.nodes), 0, -1):
            sources = self.takes[number - 1]
            own = NodeRun([values[source] for source in sources], values[number].x)
            for source, gradient in zip(sources, self.nodes[number - 1].gradients(own, found[number]), strict=True):
                found[source] = found[source] + gradient
        return [found[0].reshape(x.shape)]

    def step_rule(self, *shapes: Shape) -> StepRule:
        axes = 1 + len(self.frame)
        return StepRule(step=lambda x: self._rows(x) if x.ndim == axes else self.apply(x))

    # ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def stored(self) -> tuple[dict[str, Any], dict[str, Array]]:
        entries, arrays = [], {}
        for number, node in enumerate(self.nodes):
            entry, own = node.stored()
            entries.append(entry)
            arrays |= {f"{number}/{name}": array for name, array in own.items()}
        takes = [list(sources) for sources in self.takes]
        return {"type": self.file_type, "frame": list(self.frame), "nodes": entries, "takes": takes}, arrays

    @classmethod
    def restored(cls, entry: Entry) -> PerFrame:
        values = entry.take(cls.keys())
        nodes = tuple(entry.node(str(number), inner) for number, inner in enumerate(values["nodes"]))
        if not all(isinstance(sources, list) for sources in values["takes"]):
            raise entry.refuse("expected takes to be lists of numbers")
        return cls(tuple(values["frame"]), nodes, tuple(map(tuple, values["takes"])))

    # ── description ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def summary(self) -> str:
        kinds = [type(node).__name__ for node in self.nodes]
        return f"{' '.join('any' if axis is None else str(axis) for axis in self.frame)}: {', '.join(kinds)}"

    def engine(self, dtype: np.dtype[Any]) -> str:
        ours = [node for node in self.nodes if node.engine(dtype).startswith("fused kernel")]
        return f"{len(ours)} of {len(self.nodes)} nodes in the fused kernel, the others in NumPy ({dtype})"

    @property
    def parameters(self) -> int:
        return sum(node.parameters for node in self.nodes)

    @property
    def multiplications(self) -> int:
        """The number of multiplications by parameters of the nodes per frame."""
        shapes: list[Shape] = self._shapes[1:]  # pyright: ignore[reportAttributeAccessIssue]
        steps = (prod(axis or 1 for axis in shape[:-1]) for shape in shapes)
        return sum(node.multiplications * count for node, count in zip(self.nodes, steps, strict=True))

    @property
    def numbers_read(self) -> int:
        return sum(node.numbers_read for node in self.nodes)


@dataclass(frozen=True, eq=False)
class Skipped(PerFrame):
    """A graph of nodes that a network stores and doesn't run: the input passes unchanged.

    Some models have parts that only some inputs need. TiRex-2 mixes series that are forecast together: in a run of its
    network each row is a series by itself, which isn't mixed, and `TiRexForecaster` runs the mixing.

    Args:
        frame: the shape of what the graph takes, None for an axis of any length. It may differ from that of the input.
        nodes: see `PerFrame`.
        takes: see `PerFrame`.

    Raises:
        ValueError, ShapeError, TypeError: see `PerFrame`.

    >>> from cellstack.nodes import Dense
    >>> Skipped((4,), (Dense(np.ones((4, 2))),), ((0,),)).apply(np.array([[[1.0, 2.0]]]))
    array([[[1., 2.]]])
    """

    file_type = "skipped"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "input_size", None)
        object.__setattr__(self, "axes", (None, None))

    def check(self, owner: str, *shapes: Shape) -> Shape:
        (shape,) = shapes
        return shape

    def apply(self, x: Array) -> Array:
        """Return `x`."""
        return x

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        return [dy]

    def step_rule(self, *shapes: Shape) -> StepRule:
        return StepRule(step=self.apply)

    def with_weights(self, weights: str) -> Skipped:
        return replace(self, nodes=tuple(node.with_weights(weights) for node in self.nodes))

    def engine(self, dtype: np.dtype[Any]) -> str:
        return "none: it isn't run"

    @property
    def multiplications(self) -> int:
        return 0

    @property
    def numbers_read(self) -> int:
        return 0


def _call(node: Node) -> Callable[..., Array]:
    """Return the function that runs a node on a batch of frames."""
    if node.inputs == 1 and type(node).apply is not Node.apply:
        return node.apply
    return lambda *values: node.run([Flow(value) for value in values], (), 1).x
