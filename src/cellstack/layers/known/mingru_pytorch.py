"""minGRU-pytorch's minGRU, which computes all steps of a sequence at once by a scan over logarithms.

Ref: minGRU-pytorch, minGRU_pytorch/minGRU.py; Feng et al. 2024, "Were RNNs All We Needed?", appendix B.3.
"""

from __future__ import annotations

from typing import Any

import torch

from cellstack.cells.spec import CellSpec
from cellstack.layers import forward, op
from cellstack.layers.forward import CellRun
from cellstack.layers.handwritten import HandWritten
from cellstack.layers.known.adapter import Adapter


def _spec(module: Any) -> CellSpec:
    rows, width = module.to_hidden_and_gate.weight.shape
    return CellSpec(width, rows // 2, kind="mingru", use_bias=False)


class LogSpaceGRU(HandWritten):
    """A `minGRU`."""

    def forward(self, x: Any, prev_hidden: Any = None, return_next_prev_hidden: bool = False) -> Any:
        """Run like the module's own forward."""
        module: Any = self
        spec, weight = _spec(module), module.to_hidden_and_gate.weight
        kernel = weight.roll(spec.units, 0).t()  # the module's rows begin with the candidate, ours with the gate
        starts = [] if prev_hidden is None else [prev_hidden.flatten(0, 1)]
        fits = prev_hidden is None or prev_hidden.shape == (len(x), 1, spec.units)
        if x.ndim != 3 or not fits or not self.runs([x, *starts], spec.input_size, [weight]):
            return super().forward(x, prev_hidden, return_next_prev_hidden)
        run = forward.run_layers([CellRun(op.CellCall(spec), [kernel], starts)], x, None, None)
        y = module.to_out(run.y)
        y = y.clone() if y is run.y and y.requires_grad else y
        return (y, run.y[:, -1:]) if return_next_prev_hidden else y


def _examples(module: Any) -> list[tuple[Any, ...]]:
    spec = _spec(module)
    x, state = torch.randn(3, 5, spec.input_size), torch.rand(3, 1, spec.units)
    return [(x,), (x, state), (x, state, True), (x[:, :1], state)]


ADAPTERS = {
    "minGRU_pytorch.minGRU.minGRU": Adapter(
        LogSpaceGRU, lambda module: f"MinGRU {_spec(module).input_size} -> {_spec(module).units}", _examples
    ),
}
