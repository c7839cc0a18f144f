"""What a node of a network is: what it answers, what flows through it, and the checks that all of them share.

A node is data: a frozen dataclass whose arrays are private, read-only copies. Running one writes nothing to it, nor to
what flows into it, so threads share nodes freely and one value may go to several nodes. Between nodes flows
`x [B, T, W]` with its mask `[B, T]`, or, once a node has returned a single vector a row, `x [B, W]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from cellstack import reference, spec
from cellstack.bfloat16 import Halves
from cellstack.nodes.masks import ArrayMasks
from cellstack.spec import DTYPES, HiddenState, ShapeError, State

if TYPE_CHECKING:
    from cellstack.nodes.masks import Mask, Masks
    from cellstack.nodes.stored import Entry

Array = NDArray[Any]
CellState = State | HiddenState
Value = TypeVar("Value")
Shape = tuple[int | None, ...]
"""Lengths of the axes after the batch: `(T, W)` of a sequence, `(W,)` of a vector. None = not known beforehand."""

Types = dict[str, type | tuple[type, ...]]
"""Keys of a file, and of what type their values are: of one, or of one of several."""

MOST = 2**31 - 1  # of what is counted, such as steps: no machine holds more, and sums of lengths stay exact
MOST_AXES = 16  # beside the batch; NumPy stops not far above


class Flow(NamedTuple):
    """What a node takes and returns: `x [B, T, W]` or `[B, W]`, its mask and resets, and the node's states after."""

    x: Array
    mask: NDArray[np.bool_] | None = None
    reset: NDArray[np.bool_] | None = None
    states: tuple[CellState, ...] = ()


def shown(shape: Shape, ids: bool = False) -> str:
    """Return a shape as it is written down: `[B, T, 3]` for `(None, 3)`."""
    axes = list(shape)
    words = ["T" if (n == 0 and (len(axes) > 1 or ids)) else "W" for n in range(len(axes))]
    return (
        f"[{', '.join(['B', *(word if axis is None else str(axis) for word, axis in zip(words, axes, strict=True))])}]"
    )


def softmax(z: Array) -> Array:
    """Softmax over the last axis, shifted by the largest value so that nothing overflows."""
    z = np.ascontiguousarray(z)  # the order of a sum's terms, and so its bits, would follow the layout
    e = z - np.maximum.reduce(z, axis=-1, keepdims=True)  # the ufuncs' own reduce: np.max costs a stream more
    np.exp(e, out=e)
    e /= np.add.reduce(e, axis=-1, keepdims=True)
    return e


def _log_softmax(z: Array) -> Array:
    z = np.ascontiguousarray(z)
    z = z - np.maximum.reduce(z, axis=-1, keepdims=True)
    return z - np.log(np.add.reduce(np.exp(z), axis=-1, keepdims=True))


def _silu(z: Array) -> Array:
    return z * reference.ACTIVATIONS["sigmoid"][0](z)


_erf = np.frompyfunc(math.erf, 1, 1)  # NumPy has none; number by number, some 0.1 us each


def _gelu(z: Array) -> Array:
    return z * (0.5 + 0.5 * np.asarray(_erf(z * math.sqrt(0.5)), z.dtype))


def _gelu_tanh(z: Array) -> Array:
    return 0.5 * z * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z * z * z)))


def _selu(z: Array) -> Array:
    return SELU_SCALE * np.where(z > 0.0, z, SELU_ALPHA * np.expm1(np.minimum(z, 0.0)))


SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805

MORE_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "softmax": softmax,
    "log_softmax": _log_softmax,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "selu": _selu,
    "exponential": np.exp,
    "relu6": lambda z: np.minimum(np.maximum(z, 0.0), 6.0),
}
"""Activations that nodes have beyond those of cells, `spec.ACTIVATIONS`: NumPy runs them, and no kernel.

    softmax      e^z over its sum, of the last axis        log_softmax  its logarithm
    silu         z·sigmoid(z)                              selu         1.0507·(z, or 1.6733·(e^z - 1) where negative)
    gelu         z·(1 + erf(z/sqrt 2))/2                   gelu_tanh    the same with a tanh for erf
    exponential  e^z                                       relu6        min(max(z, 0), 6)

Ref: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units"; Klambauer et al. 2017, "Self-Normalizing Neural
Networks", eq. 2.
"""


@lru_cache(maxsize=256)
def activation_function(text: str) -> Callable[[Array], Array]:
    """Return what `text` names, in `MORE_ACTIVATIONS` or as `spec.activation` reads it, as a function of an array."""
    if text in MORE_ACTIVATIONS:
        return MORE_ACTIVATIONS[text]
    name, alpha, beta = spec.activation(text)
    function = reference.ACTIVATIONS[name][0]
    return lambda z: function(z, alpha, beta)


def hold(owner: str, name: str, value: Any, shape: Sequence[int | str]) -> Array:
    """Return a private, contiguous, read-only copy of `value`, float32 or float64.

    Args:
        owner: whose array it is, for the message.
        name: what it is called, for the message.
        value: array-like of floats.
        shape: one entry an axis: the length that it must have, or a letter where any length from 1 will do.

    Returns:
        The copy; its dtype is that of `value`.

    Raises:
        TypeError: the dtype isn't float32 or float64.
        ShapeError: the shape isn't `shape`.
    """
    array = np.asarray(value)
    if array.dtype.name not in DTYPES:
        raise TypeError(f"{owner}: expected {name} in {' or '.join(DTYPES)}, got {array.dtype}")
    return _own(owner, name, array, shape)


def hold_halves(owner: str, name: str, value: Halves, shape: Sequence[int | str]) -> Halves:
    """Return a private, read-only copy of an array of bfloat16; see `hold`."""
    if value.bits.dtype != np.uint16:
        raise TypeError(f"{owner}: expected {name} as bits of uint16, got {value.bits.dtype}")
    return Halves(_own(owner, name, value.bits, shape))


def _own(owner: str, name: str, array: NDArray[Any], shape: Sequence[int | str]) -> NDArray[Any]:
    fits = len(shape) == array.ndim and all(
        got >= 1 if isinstance(want, str) else got == want for want, got in zip(shape, array.shape, strict=True)
    )
    if not fits:
        raise ShapeError(f"{owner}: expected {name} [{', '.join(map(str, shape))}], got {array.shape}")
    array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    array.setflags(write=False)
    return array


def padded(x: Array, before: int, after: int, value: float, axis: int = 1) -> Array:
    """Return `x` with so many entries of `value` before and after an axis, as a rule steps."""
    if not before and not after:
        return x
    shape = list(x.shape)
    shape[axis] += before + after
    y = np.full(shape, value, x.dtype) if value else np.zeros(shape, x.dtype)  # zeros cost a step of a stream less
    y[(slice(None),) * axis + (slice(before, before + x.shape[axis]),)] = x
    return y


def one_dtype(owner: str, arrays: dict[str, Array | None]) -> np.dtype[Any]:
    """Return the dtype that all the arrays share; `TypeError` names the first that differs."""
    (first, head), *rest = ((name, array) for name, array in arrays.items() if array is not None)
    for name, array in rest:
        if array.dtype != head.dtype:
            raise TypeError(f"{owner}: expected {name} in {head.dtype}, as {first} is, got {array.dtype}")
    return head.dtype


def check_flag(owner: str, name: str, value: Any) -> None:
    """Raise `TypeError` unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: expected {name} to be True or False, got {value!r}")


def check_choice(owner: str, name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{owner}: expected {name} to be one of {', '.join(choices)}, got {value!r}")


def check_integer(owner: str, name: str, value: Any, least: int = 1) -> int:
    """Return `value` as an int; `ValueError` unless it is a whole number from `least` to 2^31 - 1."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not least <= value <= MOST:
        raise ValueError(f"{owner}: expected {name} to be an integer from {least} to {MOST}, got {value!r:.80}")
    return int(value)


def check_number(owner: str, name: str, value: Any, above: float | None = None) -> float:
    """Return `value` as a float; `ValueError` unless it is a finite real number, above a bound where there is one."""
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not real or not np.isfinite(value) or (above is not None and value <= above):
        bound = "" if above is None else f" above {above:g}"
        raise ValueError(f"{owner}: expected {name} to be a finite number{bound}, got {value!r:.80}")
    return float(value)


def check_activation(owner: str, text: Any) -> str:
    """Return the activation that `text` names in its shortest form; `ValueError` where there is none such."""
    if isinstance(text, str) and text in MORE_ACTIVATIONS:
        return text
    try:
        return str(spec.activation(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{owner}: activation: {error} (or {', '.join(MORE_ACTIVATIONS)})") from None


class FrameRule(NamedTuple):
    """How a node answers frame by frame; what its cells keep, they keep by themselves.

    Attributes:
        why_not: why it can't, in a few words; None where it can.
        step: for a node that keeps nothing: from what comes in, a frame `[B, W]` or a chunk `[B, T, W]`, to the
            answer, with the same axes.
        memory: for a node that keeps numbers from frame to frame: their lengths after the batch.
        start: what each of these numbers is before the first frame.
        advance: from the memory `[B, *memory]` and a chunk `[B, T, W]` to the answers `[B, T, W]` and the memory after.
    """

    why_not: str | None = None
    step: Callable[..., Array] | None = None
    memory: tuple[int, ...] | None = None
    start: float = 0.0
    advance: Callable[[Array, Array], tuple[Array, Array]] | None = None


class Node:
    """What every node says of itself; the rest of the library asks, and knows no kind of node by name.

    A node that takes one value needs `apply`, and a `check` where its shape changes; one that works step by step is a
    `Stepwise`.

    Attributes:
        cells: the node's cells; each has a state.
        input_size: width of the last axis that it takes; None = any.
        dtype: of its arrays; None = it has none.
        axes: how many axes beside the batch it takes and how many it returns; None = any, and twice None = it returns
            as many as it takes.
        inputs: how many values it takes beside states to start from; None = two or more.
        shapes_only: it moves numbers without computing any, so that ids pass through it as they are.
        takes_ids: it looks its input up in a table: whole numbers, which keep their dtype.
        keeps_width: the last axis of what it returns is as long as that of what it takes.
        mixes_steps: what it returns at a step comes from several steps, so that it can't keep pieces apart.
        checks_late: its check needs lengths that only a call brings.
        makes_mask: it leaves out steps of its own accord: see `kept`.
        heeds_mask: what it computes depends on the masks of what it takes.
        file_type: what files call it.
        arrays: its arguments that are arrays, and by which of the file's keys each of their axes is as long; one that
            may be None has a key `use_…` besides.
        settings: its other arguments, and what types their values have in a file.
        multiplied: those of its arrays that are multiplied with what comes in.
    """

    cells: tuple[Any, ...] = ()
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
    settings: ClassVar[Types] = {}
    multiplied: ClassVar[tuple[str, ...]] = ()

    # ── states ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def state_sizes(self) -> dict[str, int]:
        """Widths of its cells' states by what a network calls them: `h`, `c`; where it has several cells, `0/h` and on.

        Each may be a value of the network, `[B, H]`: what it is after the last step goes by the node's name, a slash
        and this one. And a node may take values that they start from: all of them, in this order, after what it takes
        else.
        """
        several = len(self.cells) > 1
        return {
            f"{number}/{part}" if several else part: size
            for number, cell in enumerate(self.cells)
            for part, size in cell.spec.state_sizes.items()
        }

    def apart(self, values: Sequence[Value]) -> tuple[Sequence[Value], Sequence[Value]]:
        """Return what the node works on, of all that it takes, and what its states start from: nothing, or all."""
        count = len(values) if self.inputs is None else self.inputs
        return values[:count], values[count:]

    # ── shapes ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def check(self, owner: str, *shapes: Shape) -> Shape:
        """Return the shape of the output, given those of what comes in.

        Args:
            owner: the node's name, for the message.
            shapes: one a value that comes in.

        Raises:
            ShapeError: the node can't take such values.
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
        """Return what the node makes of `x [B, …]`; one that takes more than one value has a `run` of its own."""
        raise NotImplementedError

    def run(self, flows: Sequence[Flow], states: tuple[CellState | None, ...], threads: int) -> Flow:
        """Return what the node makes of `flows`, with its own states after the call.

        Args:
            flows: one a value that comes in.
            states: one a cell, contiguous arrays of the cell's dtype; None = the cell's own initial state.
            threads: how many the kernel may use.
        """
        (flow,) = flows
        reset = flow.reset if self.keeps_steps(flow.x.ndim - 1) else None
        return Flow(self.apply(flow.x), self.mask_of(flows), reset)

    # ── masks ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def keeps_steps(self, axes: int) -> bool:
        """Return whether each step that comes out is the one that came in, so that mask and resets go on with it.

        Args:
            axes: how many axes beside the batch what comes in has.
        """
        return True

    def mask_after(self, masks: Sequence[Mask | None], axes: int, on: Masks[Mask]) -> Mask | None:
        """Return the mask that goes on with what the node returns; None = all steps are used.

        The rule is the same whatever masks are: arrays in a run, values of a graph that is written, names.

        Args:
            masks: those of what comes in, one a value; None where it has none.
            axes: how many axes beside the batch what comes in has.
            on: what can be done with such masks.
        """
        mask = masks[0] if self.keeps_steps(axes) else None
        if not self.makes_mask:
            return mask
        return on.made() if mask is None else on.both(mask, on.made())

    def kept(self, x: Array, *others: Array) -> NDArray[np.bool_]:
        """Return which steps of `x` a node that `makes_mask` uses, `[B, T]`, or `[B]` of a frame.

        Args:
            x: what it takes.
            others: what it takes besides.
        """
        raise NotImplementedError

    def mask_of(self, flows: Sequence[Flow]) -> NDArray[np.bool_] | None:
        """Return the mask after a run over `flows`."""
        masks = [flow.mask for flow in flows]
        if not self.makes_mask and all(mask is None for mask in masks):
            return None
        return self.mask_after(masks, flows[0].x.ndim - 1, ArrayMasks(self, flows))

    # ── frames ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def frames(self, *shapes: Shape) -> FrameRule:
        """Return how the node answers frame by frame, or why it can't.

        Args:
            shapes: of what comes in, as for `check`.
        """
        raise NotImplementedError

    # ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def with_weights(self, weights: str) -> Node:
        """Return the node with the matrices of its cells held in `weights`: see `Network.with_weights`."""
        return self

    # ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def keys(cls) -> Types:
        """Return the keys that a file has for such a node beside its type, and the types of their values."""
        optional = {field.name for field in fields(cls) if field.default is None}  # pyright: ignore[reportArgumentType]
        sure = {key for name, axes in cls.arrays.items() if name not in optional for key in axes}
        sizes: Types = {key: int if key in sure else (int, type(None)) for axes in cls.arrays.values() for key in axes}
        return {**sizes, **{f"use_{name}": bool for name in cls.arrays if name in optional}, **cls.settings}

    @classmethod
    def array_shapes(cls, values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the arrays that a file holds for such a node.

        Args:
            values: of `keys`.

        Raises:
            ValueError: values that no such node has.
        """
        there = {name: axes for name, axes in cls.arrays.items() if values.get(f"use_{name}", True)}
        for key in dict.fromkeys(key for axes in cls.arrays.values() for key in axes):
            if (values[key] is None) == any(key in axes for axes in there.values()):
                holders = " or ".join(name for name, axes in cls.arrays.items() if key in axes)
                raise ValueError(f"expected {key} with {holders}, and null without, found otherwise")
        return {name: tuple(values[key] for key in axes) for name, axes in there.items()}

    def values(self) -> dict[str, Any]:
        """Return what a file holds for the node under `keys`."""
        found = {}
        for key in self.keys():
            if key in self.settings:
                found[key] = getattr(self, key)
            elif key.startswith("use_"):
                found[key] = getattr(self, key.removeprefix("use_")) is not None
            else:
                lengths = [
                    array.shape[axes.index(key)]
                    for name, axes in self.arrays.items()
                    if key in axes and (array := getattr(self, name)) is not None
                ]
                found[key] = lengths[0] if lengths else None
        return found

    def stored(self) -> tuple[dict[str, Any], Mapping[str, Array | Halves]]:
        """Return the node as a file holds it: what JSON says of it, and its arrays by their names within the node."""
        values = self.values()
        return {"type": self.file_type, **values}, {name: getattr(self, name) for name in self.array_shapes(values)}

    @classmethod
    def restored(cls, entry: Entry) -> Node:
        """Return the node that an entry of a file holds: the opposite of `stored`.

        Raises:
            FormatError, ValueError, TypeError: an entry that doesn't fit such a node.
        """
        values = entry.take(cls.keys())
        arrays = {name: entry.array(name, shape) for name, shape in cls.array_shapes(values).items()}
        return cls(**arrays, **{key: values[key] for key in cls.settings})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies hold the arguments alone: they are checked and frozen again."""
        arguments: Any = self
        return type(self), tuple(getattr(self, argument.name) for argument in fields(arguments))

    # ── what it says of itself ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def summary(self) -> str:
        """What the node does, in a few words."""
        raise NotImplementedError

    def engine(self, dtype: np.dtype[Any]) -> str:
        """Return what runs the node in a network of this dtype, and why."""
        return f"NumPy ({dtype}): not recurrent"

    def _numbers(self, names: Iterable[str]) -> int:
        return sum(array.size for name in names if (array := getattr(self, name)) is not None)

    @property
    def parameters(self) -> int:
        """How many numbers the node's arrays hold."""
        return self._numbers(self.arrays) + sum(cell.spec.parameters for cell in self.cells)

    @property
    def multiplications(self) -> int:
        """How often a step of the node's answer multiplies by one of its own numbers."""
        return self._numbers(self.multiplied) + sum(cell.multiplications for cell in self.cells)

    @property
    def numbers_read(self) -> int:
        """How many of the node's own numbers a step of its answer reads."""
        return self._numbers(self.arrays) + sum(cell.numbers_read for cell in self.cells)

    @property
    def bytes_read(self) -> int:
        """How many bytes these numbers take."""
        each = 4 if self.dtype is None else self.dtype.itemsize
        return self.numbers_read * each - sum(cell.bytes_spared for cell in self.cells)


class Stepwise(Node):
    """A node whose answer at a step depends on that step alone: `apply` takes and returns `[..., W]`."""

    def frames(self, *shapes: Shape) -> FrameRule:
        return FrameRule(step=self.apply)


def check_axes(owner: str, node: Node, shape: Shape) -> None:
    """Raise `ShapeError` unless a value has as many axes as the node takes: those of its `axes`, else one or two."""
    wanted = node.axes[0]
    if len(shape) != wanted if wanted else len(shape) > 2:
        expected = "a sequence [B, T, W]" if wanted == 2 else "[B, T, W] or [B, W]"
        raise ShapeError(f"{owner}: {type(node).__name__} expected {expected}, got {shown(shape)}")
