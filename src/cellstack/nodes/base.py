"""The base class of nodes, and the values that flow between them.

A node is data: a frozen dataclass whose arrays are private, read-only copies. Running a node changes neither the node
nor its inputs, so threads can share nodes, and several nodes can take the same value. A value is a sequence
`x [B, T, W]` with its mask `[B, T]`, or a vector per row, `x [B, W]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.bfloat16 import BFloat16Array
from cellstack.cells.errors import ShapeError
from cellstack.cells.mlstm import MemorySpec
from cellstack.nodes.masks import ArrayMasks
from cellstack.nodes.values import Array, Celled, CellState, Flow, Shape, StateGradients, Types

if TYPE_CHECKING:
    from cellstack.nodes.masks import Mask, Masks
    from cellstack.nodes.stored import Entry

Value = TypeVar("Value")

FILE_TYPES: Types = {  # by the annotation of an argument
    "bool": bool,
    "float": float,
    "float | None": (float, type(None)),
    "int": int,
    "int | None": (int, type(None)),
    "Recurrent": dict,
    "str": str,
    "str | tuple[int, int]": (str, list),
}
MOST_AXES = 16  # in addition to the batch; NumPy's limit is not much higher


class NodeRun(NamedTuple):
    """What a node took and computed in a run, for its derivative.

    Attributes:
        inputs: its inputs, without resets.
        y: its output.
        records: those of its cells, or that of its memory.
    """

    inputs: Sequence[Flow]
    y: Array
    records: Sequence[Any] = ()


class GradientError(ValueError):
    """A node has no gradient; the message says why."""


def shown(shape: Shape, ids: bool = False) -> str:
    """Return a shape as text: `[B, T, 3]` for `(None, 3)`."""
    axes = list(shape)
    words = ["T" if (n == 0 and (len(axes) > 1 or ids)) else "W" for n in range(len(axes))]
    return (
        f"[{', '.join(['B', *(word if axis is None else str(axis) for word, axis in zip(words, axes, strict=True))])}]"
    )


def padded(x: Array, before: int, after: int, value: float, axis: int = 1) -> Array:
    """Return `x` padded with `before` and `after` entries of `value` along an axis, by default time."""
    if not before and not after:
        return x
    shape = list(x.shape)
    shape[axis] += before + after
    y = np.full(shape, value, x.dtype) if value else np.zeros(shape, x.dtype)  # np.zeros has less overhead
    y[(slice(None),) * axis + (slice(before, before + x.shape[axis]),)] = x
    return y


class KernelLayers(NamedTuple):
    """What the kernel runs of a node, or of several consecutive nodes in one call.

    Attributes:
        groups: the layers by call of the kernel, bottom first; True if the input of the call is added to its output.
        timed: how many layers run at every step; the layers above them run at the last step only.
        reverse: whether they run from the last step to the first.
        last_step: whether only the output of the last step is returned.
        zeros_at_masked: whether the output is set to zeros at masked steps.
        finish: what NumPy applies to the output, or None.
    """

    groups: tuple[tuple[tuple[Any, ...], bool], ...]
    timed: int
    reverse: bool = False
    last_step: bool = False
    zeros_at_masked: bool = False
    finish: Callable[[Array], Array] | None = None

    @property
    def layers(self) -> tuple[Any, ...]:
        """All cells and dense layers, bottom first."""
        return tuple(layer for layers, _ in self.groups for layer in layers)

    @property
    def has_cells(self) -> bool:
        """Whether any layer is a cell."""
        return any(not isinstance(layer, Node) for layer in self.layers)

    @property
    def has_memories(self) -> bool:
        """Whether any layer is an `MLSTM`."""
        return any(isinstance(layer, Node) and layer.memory is not None for layer in self.layers)

    @property
    def has_states(self) -> bool:
        """Whether any layer has a state."""
        return self.has_cells or self.has_memories

    @property
    def only_cells(self) -> bool:
        """Whether all layers are cells."""
        return not any(isinstance(layer, Node) for layer in self.layers)

    def then(self, above: KernelLayers) -> KernelLayers:
        """Return these layers with those of the next node on top, as one call."""
        timed = self.timed + (0 if self.last_step else above.timed)
        last_step = self.last_step or above.last_step
        layers = (*self.layers, *above.layers)
        return KernelLayers(((layers, False),), timed, self.reverse, last_step, above.zeros_at_masked, above.finish)


class StepRule(NamedTuple):
    """How a node runs step by step in a stream, apart from the states of its cells.

    Attributes:
        why_not: why it can't be streamed, in a few words; None if it can.
        step: for a node without memory: the function of one step `[B, W]` or a chunk `[B, T, W]` of each input, which
            returns an output with the same axes.
        memory: for a node with a memory of past steps: the shape of the memory without the batch axis.
        start: the initial value of every number in the memory.
        advance: the function of the memory `[B, *memory]` and a chunk `[B, T, W]`, which returns the output
            `[B, T, W]` and the new memory.
    """

    why_not: str | None = None
    step: Callable[..., Array] | None = None
    memory: tuple[int, ...] | None = None
    start: float = 0.0
    advance: Callable[[Array, Array], tuple[Array, Array]] | None = None


class Node:
    """Base class of nodes. The rest of the library relies on these properties instead of testing for node types.

    A node with one input defines `apply`, and `check` if it changes the shape; one whose output at a step depends only
    on that step is a `Stepwise`.

    Attributes:
        cells: the node's cells; each has a state.
        memory: the description of the cell of an `MLSTM`, which has a state too.
        input_size: length of the last axis of its input; None: any.
        dtype: dtype of its arrays; None: it has no arrays.
        axes: the number of axes, without the batch, of its input and of its output; None: any; both None: the output
            has as many as the input.
        inputs: the number of inputs, without initial states; None: two or more.
        shapes_only: it moves numbers without computing with them, so that ids pass through unchanged.
        takes_ids: its input are ids for a table: integers, which keep their dtype.
        keeps_width: the last axes of its output and of its input have the same length.
        mixes_steps: its output at a step depends on several steps, so that it doesn't support resets.
        checks_late: its check needs lengths that are known only in a call.
        makes_mask: it masks steps itself: see `kept`.
        heeds_mask: its output depends on the masks of its inputs.
        file_type: its type in files.
        arrays: its array arguments, each with the file keys for the lengths of its axes; an optional array also has
            the key `use_…`.
        added: its flags that files have only where they are True, because older versions don't know them.
        multiplied: the names of the arrays that are multiplied with the input.
        why_whole: why a stream can't run it, as a format string over the node.
        about: its `summary`, as a format string over the node, such as `"{0.times} times"`.
    """

    cells: tuple[Any, ...] = ()
    memory: MemorySpec | None = None
    input_size: int | None = None
    dtype: np.dtype[Any] | None = None
    axes: tuple[int | None, int | None] = (None, None)
    inputs: int | None = 1
    shapes_only: bool = False
    takes_ids: bool = False
    keeps_width: bool = False
    mixes_steps: bool = False
    checks_late: bool = False
    makes_mask: bool = False
    heeds_mask: bool = False
    file_type: ClassVar[str] = ""
    arrays: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    added: ClassVar[tuple[str, ...]] = ()
    multiplied: ClassVar[tuple[str, ...]] = ()
    why_whole: ClassVar[str] = ""
    about: ClassVar[str] = ""

    @property
    def kernel_layers(self) -> KernelLayers | None:
        """What the kernel can run in one call with the nodes below and above; None if it can't run the node."""
        return None

    def cells_in(self, dtype: np.dtype[Any]) -> tuple[Celled, ...]:
        """Return its cells, or that of its memory, in a network of this dtype."""
        return self.cells

    # ── states ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def state_sizes(self) -> dict[str, int]:
        """Widths of its cells' states by name: `h`, `c`; with several cells, `0/h`, `0/c`, `1/h` and so on.

        The state after the last step is a value of the network, `[B, H]`, with the name `node/state`. A node may also
        take initial states as inputs: all of them, in this order, after its other inputs.
        """
        several = len(self.cells) > 1
        return {
            f"{number}/{part}" if several else part: size
            for number, cell in enumerate(self.cells)
            for part, size in cell.spec.state_sizes.items()
        }

    def apart(self, values: Sequence[Value]) -> tuple[Sequence[Value], Sequence[Value]]:
        """Split the node's inputs into its actual inputs and the initial states (none, or all of them)."""
        count = len(values) if self.inputs is None else self.inputs
        return values[:count], values[count:]

    # ── shapes ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def check(self, owner: str, *shapes: Shape) -> Shape:
        """Return the shape of the output, given the shapes of the inputs.

        Args:
            owner: the node's name, for error messages.
            shapes: one per input.

        Raises:
            ShapeError: the node can't take such inputs.
        """
        (shape,) = shapes
        check_axes(owner, self, shape)
        if self.input_size is None:
            return shape
        if shape[-1] not in (None, self.input_size):
            raise ShapeError(
                f"{owner}: expected an input of {self.input_size} features, got {shape[-1]} from before it"
            )
        return (*shape[:-1], self.input_size)

    # ── running ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def apply(self, x: Array) -> Array:
        """Return the output for `x [B, …]`; nodes with several inputs override `run` instead."""
        raise NotImplementedError

    def run(self, flows: Sequence[Flow], states: tuple[CellState | None, ...], threads: int) -> Flow:
        """Run the node and return its output, with its states after the call.

        Args:
            flows: the inputs.
            states: one per cell, or that of its memory, contiguous arrays of the network's dtype; None: the initial
                state.
            threads: the number of threads that the kernel may use.
        """
        (flow,) = flows
        reset = flow.reset if self.keeps_steps(flow.x.ndim - 1) else None
        return Flow(self.apply(flow.x), self.mask_of(flows), reset)

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        """Return the gradients of the inputs, and of the cells' initial states where they were given.

        Args:
            run: what the node took and computed.
            dy: the gradient of its output.
            dstates: those of its cells' states after the last step.

        Raises:
            GradientError: the node has no gradient.
        """
        raise GradientError("its gradient isn't defined")

    # ── masks ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def keeps_steps(self, axes: int) -> bool:
        """Return whether step t of the output belongs to step t of the input, so that mask and resets still apply.

        Args:
            axes: the number of axes of the input without the batch.
        """
        return True

    def mask_after(self, masks: Sequence[Mask | None], axes: int, on: Masks[Mask]) -> Mask | None:
        """Return the mask of the output; None: all steps are used.

        The rule applies to every representation of masks: arrays in a run, values of an exported graph, or names.

        Args:
            masks: the masks of the inputs; None for an input without one.
            axes: the number of axes of the input without the batch.
            on: the operations on this representation of masks.
        """
        mask = masks[0] if self.keeps_steps(axes) else None
        if not self.makes_mask:
            return mask
        return on.of_node() if mask is None else on.both(mask, on.of_node())

    def kept(self, x: Array, *others: Array) -> NDArray[np.bool_]:
        """Return which steps of `x` a node that `makes_mask` uses: `[B, T]`, or `[B]` for one step.

        Args:
            x: its first input.
            others: its other inputs.
        """
        raise NotImplementedError

    def mask_of(self, flows: Sequence[Flow]) -> NDArray[np.bool_] | None:
        """Return the mask after a run over `flows`."""
        masks = [flow.mask for flow in flows]
        if not self.makes_mask and all(mask is None for mask in masks):
            return None
        return self.mask_after(masks, flows[0].x.ndim - 1, ArrayMasks(self.kept, flows))

    # ── streaming ───────────────────────────────────────────────────────────────────────────────────────────────────

    def step_rule(self, *shapes: Shape) -> StepRule:
        """Return how the node runs step by step, or why it can't.

        Args:
            shapes: the shapes of the inputs, as for `check`.
        """
        return StepRule(self.why_whole.format(self))

    # ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def with_weights(self, weights: str) -> Node:
        """Return the node with its matrices stored as `weights`: see `Network.with_weights`."""
        return self

    # ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def settings(cls) -> Types:
        """Return its arguments other than arrays, and the types of their values in a file: lists for tuples."""
        return {
            field.name: FILE_TYPES.get(str(field.type), list)
            for field in fields(cls)  # pyright: ignore[reportArgumentType]
            if field.name not in cls.arrays and field.name not in cls.added
        }

    @classmethod
    def keys(cls) -> Types:
        """Return the file keys of such a node, except its type, and the types of their values."""
        optional = {field.name for field in fields(cls) if field.default is None}  # pyright: ignore[reportArgumentType]
        sure = {key for name, axes in cls.arrays.items() if name not in optional for key in axes}
        sizes: Types = {key: int if key in sure else (int, type(None)) for axes in cls.arrays.values() for key in axes}
        return {**sizes, **{f"use_{name}": bool for name in cls.arrays if name in optional}, **cls.settings()}

    @classmethod
    def array_shapes(cls, values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the arrays that a file has for such a node.

        Args:
            values: the values of `keys`.

        Raises:
            ValueError: the values contradict each other.
        """
        there = {name: axes for name, axes in cls.arrays.items() if values.get(f"use_{name}", True)}
        for key in dict.fromkeys(key for axes in cls.arrays.values() for key in axes):
            if (values[key] is None) == any(key in axes for axes in there.values()):
                holders = " or ".join(name for name, axes in cls.arrays.items() if key in axes)
                raise ValueError(f"expected {key} with {holders}, and null without, found otherwise")
        return {name: tuple(values[key] for key in axes) for name, axes in there.items()}

    def values(self) -> dict[str, Any]:
        """Return the values of `keys` for this node."""
        by_key, settings = {}, self.settings()
        for key in self.keys():
            if key in settings:
                by_key[key] = getattr(self, key)
            elif key.startswith("use_"):
                by_key[key] = getattr(self, key.removeprefix("use_")) is not None
            else:
                lengths = [
                    array.shape[axes.index(key)]
                    for name, axes in self.arrays.items()
                    if key in axes and (array := getattr(self, name)) is not None
                ]
                by_key[key] = lengths[0] if lengths else None
        return by_key

    def stored(self) -> tuple[dict[str, Any], Mapping[str, Array | BFloat16Array]]:
        """Return the node's entry in a file: its JSON values, and its arrays by their names within the node."""
        values = self.values()
        added = {name: True for name in self.added if getattr(self, name)}
        return {"type": self.file_type, **values, **added}, {
            name: getattr(self, name) for name in self.array_shapes(values)
        }

    @classmethod
    def restored(cls, entry: Entry) -> Node:
        """Return the node of an entry of a file: the inverse of `stored`.

        Raises:
            FormatError, ValueError, TypeError: the entry isn't valid for such a node.
        """
        values = entry.take(cls.keys(), dict.fromkeys(cls.added, bool))
        arrays = {name: entry.array(name, shape) for name, shape in cls.array_shapes(values).items()}
        return cls(**arrays, **{key: values[key] for key in (*cls.settings(), *cls.added) if key in values})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies contain only the arguments, which are checked and made read-only again."""
        arguments: Any = self
        return type(self), tuple(getattr(self, argument.name) for argument in fields(arguments))

    # ── description ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def summary(self) -> str:
        """What the node does, in a few words."""
        return self.about.format(self)

    def engine(self, dtype: np.dtype[Any]) -> str:
        """Return which implementation runs the node in a network of this dtype, and why."""
        return f"NumPy ({dtype}): not recurrent"

    def _numbers(self, names: Iterable[str]) -> int:
        return sum(array.size for name in names if (array := getattr(self, name)) is not None)

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return self._numbers(self.arrays) + sum(cell.spec.parameters for cell in self.cells)

    @property
    def multiplications(self) -> int:
        """The number of multiplications by parameters of the node per step of its output."""
        return self._numbers(self.multiplied) + sum(cell.multiplications for cell in self.cells)

    @property
    def numbers_read(self) -> int:
        """The number of parameters read per step of the node's output."""
        return self._numbers(self.arrays) + sum(cell.numbers_read for cell in self.cells)

    @property
    def bytes_read(self) -> int:
        """The size of these parameters in bytes."""
        each = 4 if self.dtype is None else self.dtype.itemsize
        return self.numbers_read * each - sum(cell.bytes_spared for cell in self.cells)


class Stepwise(Node):
    """A node whose output at a step depends only on that step: `apply` takes and returns `[..., W]`."""

    def step_rule(self, *shapes: Shape) -> StepRule:
        return StepRule(step=self.apply)


def check_axes(owner: str, node: Node, shape: Shape) -> None:
    """Raise `ShapeError` unless a value has the number of axes that the node requires: `axes`, else one or two."""
    count = node.axes[0]
    if len(shape) != count if count else len(shape) > 2:
        expected = "a sequence [B, T, W]" if count == 2 else "[B, T, W] or [B, W]"
        raise ShapeError(f"{owner}: {type(node).__name__} expected {expected}, got {shown(shape)}")


def gradient_of_moves(node: Node, run: NodeRun, dy: Array) -> list[Array]:
    """Return the gradient of the input of a node that only moves numbers.

    Running it on indices shows where each number goes.
    """
    (flow,) = run.inputs
    size = flow.x.size
    places = np.arange(1.0, size + 1).reshape(flow.x.shape)
    one, other = (node.run([flow._replace(x=numbers)], (), 1).x for numbers in (places, places + size))
    from_input = other - one == size  # padding doesn't change
    dx = np.zeros(size, dy.dtype)
    np.add.at(dx, (one[from_input] - 1).astype(np.int64), dy[from_input])
    return [dx.reshape(flow.x.shape)]
