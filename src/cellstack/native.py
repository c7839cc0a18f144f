"""A call of the kernel: `forward(sequences, layers, threads)`, `backward(sequences, layers, gradients, threads)`.

Everything in a call has a name. `Sequences` is what goes through: `x [B, T, I]` with its strides, `mask` and `reset`
`[B, T]`, and the places `[B]` of the rows' states. A `Layer` is one of a stack: its weights, the state before and after
(`h0`, `hn` `[B, P]`, `c0`, `cn` `[B, H]`), what is kept of every step (`results` has the shapes) and the masks of a
training. `Gradients` are those of one layer. `kernel/cell.h` says what each means, and what its absence does.

An argument is a NumPy array, which the call's description keeps alive; or an address, 0 for none; or None. `Layer`,
`Gradients` and `Sequences` refuse an array that isn't contiguous and aligned: `plain` makes it so. The other functions
here take any strides and any alignment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack import _kernel
from cellstack._kernel import (
    THREAD_WORK,
    Gradients,
    Layer,
    Sequences,
    Turns,
    backward,
    forward,
    isa,
    prefer_large_pages,
    stack,
    stream,
)
from cellstack._kernel import weights as weights_at
from cellstack.spec import ACTIVATIONS, ARRAYS, GATES, Activation, CellSpec

__all__ = [
    "THREAD_WORK",
    "Gradients",
    "Layer",
    "Sequences",
    "Turns",
    "backward",
    "forward",
    "isa",
    "prefer_large_pages",
    "stack",
    "stream",
    "weights_at",
]

ELEMENTS = ("float32", "float64", "bfloat16", "int8")
"""What numbers are held in: those of a call in the first two, matrices of a float32 call in the last two as well."""


@lru_cache(maxsize=1024)
def description(spec: CellSpec, rows: bool = False) -> _kernel.Description:
    """Return `spec` as the kernel takes it.

    With `rows` the cell's arrays, and their gradients, lie as PyTorch's modules have them: matrices are transposed, and
    a GRU's gates stand in the order r z g. A forward pass then takes weights that are packed.
    """
    return _kernel.Description(
        tuple(GATES).index(spec.kind),
        spec.input_size,
        spec.units,
        spec.output_size,
        [(ACTIVATIONS.index(name), alpha, beta) for name, alpha, beta in spec.activations],
        spec.use_bias,
        spec.peepholes,
        spec.coupled,
        spec.layer_norm,
        spec.reset_after,
        spec.norm_epsilon,
        math.inf if spec.clip is None else spec.clip,
        math.inf if spec.cell_clip is None else spec.cell_clip,
        spec.zoneout,
        spec.zoneout_cell,
        rows,
    )


def plain(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array contiguous and aligned, as the kernel reads it: itself, or a copy.

    NumPy's `ascontiguousarray` returns unaligned arrays, such as those over a file's bytes, as they are.
    """
    array = np.ascontiguousarray(array)
    return array if array.flags.aligned else array.copy()


def in_order(arrays: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a cell's arrays, or their gradients, as the kernel takes them: in the order of `ARRAYS`, None for none."""
    return tuple(map(arrays.get, ARRAYS))


def weights(
    spec: CellSpec, arrays: Mapping[str, NDArray[Any]], element: str | None = None, copy: bool = True
) -> _kernel.Weights:
    """Return the weights of a cell as the kernel takes them.

    Args:
        spec: the cell.
        arrays: those of `spec.shapes`, all float32 or all float64.
        element: what matrices are held in, one of `ELEMENTS`; None = the arrays' own dtype.
        copy: pack them; else the arrays are read where they lie, and must outlive what is returned.

    Raises:
        ValueError: `copy=False` with a narrow element, or with an array that isn't contiguous and aligned.
    """
    for name, array in arrays.items():
        if not (copy or (array.flags.c_contiguous and array.flags.aligned)):
            raise ValueError(f"weights: expected {name} to be contiguous and aligned with copy=False")
    arrays = {name: plain(array) for name, array in arrays.items()}
    return weights_at(description(spec), element or arrays["kernel"].dtype.name, in_order(arrays), copy)


def dense(kernel: NDArray[Any], bias: NDArray[Any] | None, activation: Activation) -> _kernel.Weights:
    """Return the weights of `activation(x·kernel + bias)` as the kernel takes them, packed.

    Args:
        kernel: `[I, O]`, float32 or float64.
        bias: `[O]` of the same dtype, or None.
        activation: one of `ACTIVATIONS` with its parameters.
    """
    width, units = kernel.shape
    code = (ACTIVATIONS.index(activation.name), activation.alpha, activation.beta)
    flags = (bias is not None, False, False, False, False, 0.0, math.inf, math.inf, 0.0, 0.0)
    what = _kernel.Description(len(GATES), width, units, units, [code], *flags)
    arrays = {"kernel": plain(kernel), "bias": None if bias is None else plain(bias)}
    return weights_at(what, kernel.dtype.name, in_order(arrays))


def sequences(
    x: NDArray[Any],
    mask: NDArray[np.bool_] | None = None,
    reset: NDArray[np.bool_] | None = None,
    reverse: bool = False,
) -> Sequences:
    """Return `x [B, T, I]`, with flags `[B, T]`, as the kernel takes it; `reverse`: from the end."""
    item = x.itemsize
    stride_batch, stride_time, stride = x.strides
    if stride != item or stride_batch % item or stride_time % item or not x.flags.aligned:
        x = plain(x)
        stride_batch, stride_time, _ = x.strides
    mask, reset = (None if flags is None else plain(flags) for flags in (mask, reset))
    return Sequences(len(x), x.shape[1], x, stride_batch // item, stride_time // item, mask, reset, reverse)


def results(spec: CellSpec, batch: int, steps: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what a layer can write, by `Layer`'s names for them, without what it doesn't have.

    `hn`, `cn`: the state after the last step. Of every step: `y`, which is h; `gates`, after their activations, a plane
    each; `cells`, which is c; `norms`, what the way back through layer normalisation needs.
    """
    every = {"hn": (batch, spec.output_size), "y": (batch, steps, spec.output_size)}
    every["gates"] = (batch, steps, spec.planes, spec.units)
    if "c" in spec.state_sizes:
        every |= {"cn": (batch, spec.units), "cells": (batch, steps, spec.units)}
    if spec.norm_size:
        every["norms"] = (batch, steps, spec.norm_size)
    return every
