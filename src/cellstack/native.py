"""What the kernel is told of a cell: its description, and its arrays by address."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from cellstack import _kernel
from cellstack.spec import ACTIVATIONS, GATES, CellSpec


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
