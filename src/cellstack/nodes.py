"""The nodes of a network: what each holds, what it checks, how it runs. Here those that NumPy runs; see `recurrent`.

A node is data: a frozen dataclass whose arrays are private, read-only copies. Running one writes nothing to it, so
threads share nodes freely. Between nodes flows `x [B, T, W]` with its mask `[B, T]`, or, once a node has returned a
single vector a row, `x [B, W]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack import reference, spec
from cellstack.spec import DTYPES, HiddenState, ShapeError, State

Array = NDArray[Any]
CellState = State | HiddenState

POOL_MODES = ("mean", "max", "last")


class Flow(NamedTuple):
    """What passes from node to node: `x [B, T, W]`, its mask and its resets, or `x [B, W]`; and the states so far."""

    x: Array
    mask: NDArray[np.bool_] | None
    reset: NDArray[np.bool_] | None
    states: tuple[CellState, ...]


def softmax(z: Array) -> Array:
    """Softmax over the last axis, shifted by the largest value so that nothing overflows."""
    e = z - np.maximum.reduce(z, axis=-1, keepdims=True)  # the ufuncs' own reduce: np.max costs a stream more
    np.exp(e, out=e)
    e /= np.add.reduce(e, axis=-1, keepdims=True)
    return e


@lru_cache(maxsize=256)
def activation_function(text: str) -> Callable[[Array], Array]:
    """Return what `text` names, as `spec.activation` reads it, or softmax, as a function of an array."""
    if text == "softmax":
        return softmax
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
    fits = len(shape) == array.ndim and all(
        got >= 1 if isinstance(want, str) else got == want for want, got in zip(shape, array.shape, strict=True)
    )
    if not fits:
        raise ShapeError(f"{owner}: expected {name} [{', '.join(map(str, shape))}], got {array.shape}")
    array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    array.setflags(write=False)
    return array


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


def check_activation(owner: str, text: Any) -> str:
    """Return the activation that `text` names in its shortest form; `ValueError` where there is none such."""
    if text == "softmax":
        return text
    try:
        return str(spec.activation(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{owner}: activation: {error} (softmax will do too)") from None


class Node:
    """What all nodes answer. `input_size` and `dtype` are None where a node takes any."""

    cells: tuple[Any, ...] = ()
    input_size: int | None = None
    dtype: np.dtype[Any] | None = None

    def check(self, owner: str, width: int | None, sequence: bool) -> tuple[int | None, bool]:
        """Return the width and kind of the output, given those of the input.

        Args:
            owner: the node's name, for the message.
            width: features of the input; None where nothing before has fixed it.
            sequence: True for `[B, T, W]`, False for `[B, W]`.

        Returns:
            `(width, sequence)` of the output.

        Raises:
            ShapeError: the node can't take such an input.
        """
        if width is not None and self.input_size is not None and width != self.input_size:
            raise ShapeError(f"{owner}: expected an input of {self.input_size} features, got {width} from before it")
        return (width if self.input_size is None else self.input_size), sequence

    def run(self, flow: Flow, states: tuple[CellState | None, ...], threads: int) -> Flow:
        """Return what the node makes of `flow`; its own states after the call are added to `flow.states`."""
        raise NotImplementedError

    @property
    def summary(self) -> str:
        """What the node does, in a few words."""
        raise NotImplementedError

    @property
    def parameters(self) -> int:
        """How many numbers the node's arrays hold."""
        return sum(cell.spec.parameters for cell in self.cells)


def needs_sequence(owner: str, kind: str, sequence: bool) -> None:
    """Raise `ShapeError` unless a node's input is a sequence."""
    if not sequence:
        raise ShapeError(f"{owner}: {kind} expected a sequence [B, T, W], got [B, W]: a node before it drops time")


@dataclass(frozen=True, eq=False)
class Standardise(Node):
    """`(x - mean) / scale`, feature by feature, so that a model takes raw data.

    Args:
        mean: `[I]`.
        scale: `[I]`, without zeros.

    Raises:
        ShapeError: not `[I]` both.
        TypeError: not float32 or float64 both.
        ValueError: a scale of zero.
    """

    mean: Array
    scale: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", hold("Standardise", "mean", self.mean, ("I",)))
        object.__setattr__(self, "scale", hold("Standardise", "scale", self.scale, self.mean.shape))
        object.__setattr__(self, "dtype", one_dtype("Standardise", {"mean": self.mean, "scale": self.scale}))
        object.__setattr__(self, "input_size", len(self.mean))
        if (self.scale == 0).any():
            at = int(np.argmax(self.scale == 0))
            raise ValueError(f"Standardise: expected a scale other than zero for every feature, got 0 for feature {at}")

    def apply(self, x: Array) -> Array:
        """Return `(x - mean) / scale`, shaped as `x [..., I]`."""
        return (x - self.mean) / self.scale

    @property
    def summary(self) -> str:
        """What the node does, in a few words."""
        return "(x - mean) / scale"

    def run(self, flow: Flow, states: tuple[CellState | None, ...], threads: int) -> Flow:
        """See `Node.run`."""
        return flow._replace(x=self.apply(flow.x))

    @property
    def parameters(self) -> int:
        """How many numbers the node's arrays hold."""
        return 2 * len(self.mean)


@dataclass(frozen=True, eq=False)
class Activation(Node):
    """One of the house's activations, or softmax over the last axis.

    Args:
        activation: as `cellstack.spec.activation` reads it, such as `"relu"` or `"hard_sigmoid(0.2, 0.5)"`; or
            `"softmax"`.

    Raises:
        ValueError: another name, or parameters that it can't have.
    """

    activation: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "activation", check_activation("Activation", self.activation))

    def apply(self, x: Array) -> Array:
        """Return the activation of `x [..., W]`."""
        return activation_function(self.activation)(x)

    @property
    def summary(self) -> str:
        """What the node does, in a few words."""
        return self.activation

    def run(self, flow: Flow, states: tuple[CellState | None, ...], threads: int) -> Flow:
        """See `Node.run`."""
        return flow._replace(x=self.apply(flow.x))


@dataclass(frozen=True, eq=False)
class Dense(Node):
    """`activation(x·kernel + bias)` on the last axis.

    Args:
        kernel: `[I, O]`, float32 or float64.
        bias: `[O]` of the same dtype, or None.
        activation: see `Activation`.

    Raises:
        ShapeError: a shape other than these.
        TypeError: a dtype other than these.
        ValueError: another activation.
    """

    kernel: Array
    bias: Array | None = None
    activation: str = "linear"

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", hold("Dense", "kernel", self.kernel, ("I", "O")))
        if self.bias is not None:
            object.__setattr__(self, "bias", hold("Dense", "bias", self.bias, self.kernel.shape[1:]))
        object.__setattr__(self, "dtype", one_dtype("Dense", {"kernel": self.kernel, "bias": self.bias}))
        object.__setattr__(self, "input_size", self.kernel.shape[0])
        object.__setattr__(self, "activation", check_activation("Dense", self.activation))

    def check(self, owner: str, width: int | None, sequence: bool) -> tuple[int | None, bool]:
        """See `Node.check`."""
        super().check(owner, width, sequence)
        return self.kernel.shape[1], sequence

    def apply(self, x: Array) -> Array:
        """Return `[..., O]` for `x [..., I]`.

        Each row is a product of its own, so that a row's bits don't depend on how many rows come with it: a matrix
        product may sum in another order for another number of rows, and a stream must equal a pass bit for bit.
        """
        z = np.matmul(np.ascontiguousarray(x)[..., None, :], self.kernel)[..., 0, :]
        if self.bias is not None:
            z += self.bias
        return z if self.activation == "linear" else activation_function(self.activation)(z)

    @property
    def summary(self) -> str:
        """What the node does, in a few words."""
        return self.activation

    def run(self, flow: Flow, states: tuple[CellState | None, ...], threads: int) -> Flow:
        """See `Node.run`."""
        return flow._replace(x=self.apply(flow.x))

    @property
    def parameters(self) -> int:
        """How many numbers the node's arrays hold."""
        return self.kernel.size + (0 if self.bias is None else self.bias.size)


@dataclass(frozen=True, eq=False)
class Pool(Node):
    """`[B, T, W]` to `[B, W]`: the mean, the greatest value or the last of the steps that the mask keeps.

    A row without a kept step gives zeros.

    Args:
        mode: `"mean"`, `"max"` or `"last"`.

    Raises:
        ValueError: another mode.
    """

    mode: str = "mean"

    def __post_init__(self) -> None:
        check_choice("Pool", "mode", self.mode, POOL_MODES)

    def check(self, owner: str, width: int | None, sequence: bool) -> tuple[int | None, bool]:
        """See `Node.check`."""
        needs_sequence(owner, "Pool", sequence)
        return width, False

    @property
    def summary(self) -> str:
        """What the node does, in a few words."""
        return f"{self.mode} over time"

    def run(self, flow: Flow, states: tuple[CellState | None, ...], threads: int) -> Flow:
        """See `Node.run`."""
        x = flow.x
        used = np.ones(x.shape[:2], bool) if flow.mask is None else flow.mask
        counts = used.sum(axis=1)[:, None]  # [B, 1]
        if x.shape[1] == 0:
            return Flow(np.zeros((x.shape[0], x.shape[2]), x.dtype), None, None, flow.states)
        if self.mode == "mean":
            y = np.where(used[:, :, None], x, 0.0).sum(axis=1, dtype=np.float64) / np.maximum(counts, 1)
        elif self.mode == "max":
            y = np.where(used[:, :, None], x, -np.inf).max(axis=1)
        else:
            last = x.shape[1] - 1 - np.argmax(used[:, ::-1], axis=1)  # [B]
            y = x[np.arange(len(x)), last]
        return Flow(np.where(counts > 0, y, 0.0).astype(x.dtype), None, None, flow.states)
