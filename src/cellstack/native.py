"""Calls of the kernel: `forward(sequences, layers, threads)`, `backward(sequences, layers, gradients, threads)`.

`forward_each([(sequences, layers), …], threads)` runs independent stacks, at the same time where that is estimated to
be faster, and returns whether they did.

All arguments are named. `Sequences` is the input: `x [B, T, I]` with its strides, `mask` and `reset` `[B, T]`, and the
indices `[B]` of the rows' states. A `Layer` is one layer of the stack: its weights, the states `before` and `after` (an
array for each of `spec.state_sizes`), the values saved at every step (see `results`), and the dropout and zoneout masks
of training. `Gradients` are those of one layer. `kernel/cell.h` documents each field, and what its absence means.

An array argument is a NumPy array, which the object keeps alive, or an address (0: absent), or None. `Layer`,
`Gradients` and `Sequences` refuse an array that isn't contiguous and aligned; `plain` makes it so. The other functions
here take any strides and any alignment.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cellstack._kernel as _kernel
from cellstack._kernel import (
    NODE_ACTIVATIONS,
    SHORT_CHUNK,
    THREAD_WORK,
    CallLock,
    Convolution,
    Gradients,
    Layer,
    Memory,
    Norm,
    Sequences,
    SessionTable,
    backward,
    forward,
    forward_each,
    isa,
    memory_backward,
    memory_forward,
    memory_steps,
    prefer_large_pages,
    products,
    score_row,
    session_steps,
    stack,
    stream,
)
from cellstack._kernel import weights as weights_at
from cellstack.cells.activations import ACTIVATIONS
from cellstack.cells.spec import ARRAYS, CellSpec

__all__ = [
    "NODE_ACTIVATIONS",
    "SHORT_CHUNK",
    "THREAD_WORK",
    "CallLock",
    "Convolution",
    "Gradients",
    "Layer",
    "Memory",
    "Norm",
    "Sequences",
    "SessionTable",
    "backward",
    "forward",
    "forward_each",
    "isa",
    "memory_backward",
    "memory_forward",
    "memory_steps",
    "prefer_large_pages",
    "products",
    "score_row",
    "session_steps",
    "stack",
    "stream",
    "weights_at",
]

LIBRARY: str = _kernel.__file__
"""The path of the kernel, which is also a library of operators for ONNX Runtime."""

ELEMENTS = ("float32", "float64", "bfloat16", "int8")
"""Number formats: a call computes in one of the first two; a float32 call may have its matrices in the last two."""


def activation_code(name: str, alpha: float = 0.0, beta: float = 0.0) -> tuple[int, float, float]:
    """Return the kernel's code of an activation of a cell, or of one in `NODE_ACTIVATIONS`, and its parameters."""
    return (*ACTIVATIONS, *NODE_ACTIVATIONS).index(name), alpha, beta


@lru_cache(maxsize=1024)
def description(spec: CellSpec, rows: bool = False) -> Any:
    """Convert `spec` to the kernel's description.

    With `rows` the cell's arrays and their gradients are in PyTorch's layout: matrices are transposed, and the gates
    have PyTorch's order. A forward pass then requires packed weights.
    """
    return _kernel.Description(
        spec.kind,
        spec.features,
        spec.units,
        spec.output_size,
        [activation_code(*one) for one in spec.activations],
        spec.numbers,
        rows,
    )


def plain(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array contiguous and aligned, as the kernel reads it: itself, or a copy.

    NumPy's `ascontiguousarray` returns unaligned arrays, such as those over a file's bytes, as they are.
    """
    array = np.ascontiguousarray(array)
    return array if array.flags.aligned else array.copy()


def on_rows(run: Callable[..., NDArray[Any] | None], x: NDArray[Any], *given: Any) -> NDArray[Any]:
    """Return `run(x, *given)`, of x made contiguous if necessary.

    Args:
        run: the method `run` of an object for a node without a state.
        x: the input.
        given: further arguments.

    Raises:
        TypeError: x has another dtype than the node, or too many axes.
    """
    y = run(x, *given)
    if y is None:
        y = run(plain(x), *given)
        if y is None:
            raise TypeError(f"expected x of the node's dtype and width and of at most 8 axes, got {x.dtype} {x.shape}")
    return y


def in_order(arrays: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a cell's arrays, or their gradients, in the kernel's order, that of `ARRAYS`; None for absent ones."""
    return tuple(map(arrays.get, ARRAYS))


def weights(
    spec: CellSpec, arrays: Mapping[str, NDArray[Any]], element: str | None = None, copy: bool = True
) -> _kernel.Weights:
    """Convert the weights of a cell to the kernel's object.

    Args:
        spec: the cell.
        arrays: those of `spec.shapes`, all float32 or all float64.
        element: the number format of the matrices, one of `ELEMENTS`; None: the dtype of the arrays.
        copy: pack the weights; False: the kernel reads the arrays in place, and they must outlive the result.

    Raises:
        ValueError: `copy=False` with bfloat16 or int8, or with an array that isn't contiguous and aligned.
    """
    for name, array in arrays.items():
        if not (copy or (array.flags.c_contiguous and array.flags.aligned)):
            raise ValueError(f"weights: expected {name} to be contiguous and aligned with copy=False")
    arrays = {name: plain(array) for name, array in arrays.items()}
    return weights_at(description(spec), element or next(iter(arrays.values())).dtype.name, in_order(arrays), copy)


LINEAR = activation_code("linear")


def dense(
    kernel: NDArray[Any],
    bias: NDArray[Any] | None,
    activation: tuple[int, float, float] = LINEAR,
    element: str | None = None,
) -> _kernel.Weights:
    """Pack the weights of `activation(x·kernel + bias)` for the kernel.

    Args:
        kernel: `[I, O]`, float32 or float64.
        bias: `[O]` of the same dtype, or None.
        activation: see `activation_code`.
        element: the number format of the kernel, one of `ELEMENTS`; None: its dtype.
    """
    width, units = kernel.shape
    what = _kernel.Description("dense", width, units, units, [activation], {"use_bias": float(bias is not None)})
    arrays = {"kernel": plain(kernel), "bias": None if bias is None else plain(bias)}
    return weights_at(what, element or kernel.dtype.name, in_order(arrays))


def recurrent(
    cells: Sequence[tuple[CellSpec, Mapping[str, NDArray[Any]]]],
    reverse: bool,
    batch_first: bool,
    directions: bool,
    lengths: bool,
    started: list[bool],
    threads: int,
) -> Any:
    """Pack a recurrent operator for ONNX Runtime's sessions: see `kernel/onnxruntime.h`.

    Args:
        cells: each direction's cell and arrays, all float32 or all float64.
        reverse: whether the only direction is backward.
        batch_first: whether arrays are `[B, T, …]`, not `[T, B, …]`.
        directions: whether y and the states have an axis of directions.
        lengths: whether the rows' lengths are an input.
        started: which initial states are inputs.
        threads: the greatest number of threads.

    Returns:
        An object with its `handle`. Sessions that are created while it exists can use the operator until they end.
    """
    packed = [(description(spec), in_order({n: plain(array) for n, array in own.items()})) for spec, own in cells]
    twice = next(iter(cells[0][1].values())).dtype == np.float64
    return _kernel.Recurrent(packed, twice, reverse, batch_first, directions, lengths, started, threads)


def sequences(
    x: NDArray[Any],
    mask: NDArray[np.bool_] | None = None,
    reset: NDArray[np.bool_] | None = None,
    reverse: bool = False,
    places: NDArray[np.int64] | None = None,
    time_major: bool = False,
) -> Sequences:
    """Return the kernel's object for `x [B, T, I]` of any strides and flags `[B, T]`.

    `reverse`: run from the end; `places`: the row of the states of each row of x; `time_major`: y is `[T, B, ·]`.
    """
    item = x.itemsize
    stride_batch, stride_time, stride = x.strides
    if stride != item or stride_batch % item or stride_time % item or not x.flags.aligned:
        x = plain(x)
        stride_batch, stride_time, _ = x.strides
    mask, reset = (None if flags is None else plain(flags) for flags in (mask, reset))
    return Sequences(
        len(x), x.shape[1], x, stride_batch // item, stride_time // item, mask, reset, reverse, places, time_major
    )


def results(
    spec: CellSpec,
    batch: int,
    steps: int,
    new: Callable[[tuple[int, ...]], Any] = tuple,
    names: Collection[str] = ("after", "y", "gates", "states", "intermediate"),
) -> dict[str, Any]:
    """Return `new(shape)` for each result that a layer of this kind can write, by their names in `Layer`.

    `after`: a tuple of the states after the last step. At every step: `y`, which is h; `gates`, after their
    activations; `states`, a tuple of the states other than h; `intermediate`, what the backward pass of layer
    normalisation or of a backbone needs, absent without both.
    """
    sizes = tuple(spec.state_sizes.values())
    shapes: dict[str, tuple[Any, ...]] = {
        "after": tuple((batch, size) for size in sizes),
        "y": (batch, steps, spec.output_size),
        "gates": (batch, steps, spec.planes, spec.units),
        "states": tuple((batch, steps, size) for size in sizes[1:]),
    }
    if spec.intermediate_size:
        shapes["intermediate"] = (batch, steps, spec.intermediate_size)
    return {
        name: tuple(map(new, shape)) if name in ("after", "states") else new(shape)
        for name, shape in shapes.items()
        if name in names
    }
