"""SpeechBrain's light GRU.

Ref: SpeechBrain, speechbrain/nnet/RNN.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cellstack.cells.spec import CellSpec
from cellstack.layers import forward, op
from cellstack.layers.cell_base import NO_MASKS, Masks
from cellstack.layers.forward import CellRun
from cellstack.layers.handwritten import HandWritten
from cellstack.layers.known.adapter import Adapter

_ACTIVATIONS = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.LeakyReLU: "leaky_relu(0.01)"}


def _spec(module: Any) -> CellSpec:
    """Return the cell of a `LiGRU_Layer`, whose input is the module's batch-normalised product with x `[B, T, 2H]`."""
    text = _ACTIVATIONS.get(type(module.act))
    if text is None or getattr(module.act, "negative_slope", 0.01) != 0.01:
        raise ValueError(f"its activation {getattr(module.act, '__name__', module.act)} isn't supported")
    units = module.hidden_size
    return CellSpec(2 * units, units, text, kind="ligru", use_bias=False)


class LightGRU(HandWritten):
    """A `LiGRU_Layer`. Its product with x, whose normalisation depends on the batch, stays in PyTorch."""

    def _ligru_cell(self, w: Any, ht: Any) -> Any:
        module: Any = self
        spec, units = _spec(module), module.hidden_size
        # The module's arrays begin with the rows of the candidate, ours with those of the gate.
        order = torch.arange(2 * units).roll(units)
        arrays = [torch.eye(2 * units, dtype=w.dtype)[:, order], module.u.weight[order].t()]
        start = ht if ht.shape[0] == w.shape[0] else ht.expand(w.shape[0], units)
        if w.ndim != 3 or not self.runs([w, start], spec.input_size, arrays):
            return super()._ligru_cell(w, ht)  # type: ignore[misc]
        masks, drop = NO_MASKS, module._sample_drop_mask(w)
        # An exporter doesn't know the value, which is 1 in evaluation mode unless somebody has changed the buffer.
        if not torch.compiler.is_exporting() and (drop.shape != (1,) or drop.item() != 1.0):
            masks = Masks(recurrent=drop.to(w.dtype).expand(w.shape[0], units))
        y = forward.run_layers([CellRun(op.CellCall(spec), arrays, [start], masks)], w, None, None).y
        return y.clone() if y.requires_grad else y


def _examples(module: Any) -> list[tuple[Any, ...]]:
    width, units = module.input_size, module.hidden_size
    rows = 2 if module.bidirectional else 1
    return [
        (torch.randn(3, 4, width),),
        (torch.randn(2, 7, width), torch.randn(2 * rows, units)),
        (torch.randn(1, 2, width),),
    ]


ADAPTERS = {
    "speechbrain.nnet.RNN.LiGRU_Layer": Adapter(
        LightGRU, lambda module: f"LiGRU {module.input_size} -> {_spec(module).units}", _examples
    ),
}
