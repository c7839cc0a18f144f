"""What the kernel is told of a cell or a dense layer: its description, and its arrays by address."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack import _kernel
from cellstack.spec import ACTIVATIONS, ARRAYS, GATES, Activation, CellSpec


@lru_cache(maxsize=1024)
def description(spec: CellSpec) -> Any:
    """Return `spec` as the kernel takes it."""
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
    )


def dense(kernel: NDArray[Any], bias: NDArray[Any] | None, activation: Activation) -> Any:
    """Return `activation(x·kernel + bias)` as the kernel takes it, packed.

    Args:
        kernel: `[I, O]`, contiguous, float32 or float64.
        bias: `[O]` of the same dtype, or None.
        activation: one of `ACTIVATIONS` with its parameters.
    """
    width, units = kernel.shape
    code = (ACTIVATIONS.index(activation.name), activation.alpha, activation.beta)
    flags = (bias is not None, False, False, False, False, 0.0, math.inf, math.inf, 0.0, 0.0)
    addresses = [0] * len(ARRAYS)
    for name, array in (("kernel", kernel), ("bias", bias)):
        addresses[ARRAYS.index(name)] = 0 if array is None else array.ctypes.data
    what = _kernel.Description(len(GATES), width, units, units, [code], *flags)
    return _kernel.Packed(kernel.dtype == np.float64, what, tuple(addresses))
