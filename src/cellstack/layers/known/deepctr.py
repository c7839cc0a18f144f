"""DeepCTR-Torch's GRUs with attention.

Ref: DeepCTR-Torch, deepctr_torch/layers/sequence.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from cellstack.cells.spec import CellSpec
from cellstack.layers import forward, op
from cellstack.layers.forward import CellRun
from cellstack.layers.handwritten import HandWritten
from cellstack.layers.known.adapter import Adapter
from cellstack.layers.sequences import pack

_OPEN = 200.0  # a bias with which a gate is 1


class AttentionGRU(HandWritten):
    """A `DynamicGRU`: a GRU over packed rows; attention scales its update gate (AUGRU) or replaces it (AGRU)."""

    def forward(self, inputs: Any, att_scores: Any = None, hx: Any = None) -> Any:
        """Run like the module's own forward."""
        cell: Any = self.rnn
        ready = isinstance(inputs, PackedSequence) and isinstance(att_scores, PackedSequence)
        if not ready or not isinstance(cell.weight_ih, Tensor):
            return super().forward(inputs, att_scores, hx)
        arrays, spec = _arrays(cell), _spec(cell)
        tensors = [inputs.data, att_scores.data, *([] if hx is None else [hx])]
        fits = inputs.data.ndim == 2 and att_scores.data.numel() == inputs.data.shape[0]
        if not fits or not self.runs(tensors, cell.input_size, arrays):
            return super().forward(inputs, att_scores, hx)
        both = torch.cat([inputs.data, att_scores.data.reshape(-1, 1)], 1)
        sizes = inputs.batch_sizes
        x = pad_packed_sequence(PackedSequence(both, sizes))[0].transpose(0, 1)
        used = None if sizes[-1] == sizes[0] else torch.arange(len(x))[:, None] < sizes
        state = [] if hx is None else [hx[: len(x)]]
        y = forward.run_layers([CellRun(op.CellCall(spec), arrays, state)], x, used, None).y
        return PackedSequence(pack(y, PackedSequence(inputs.data, inputs.batch_sizes)).data, *inputs[1:])


def _spec(cell: Any) -> CellSpec:
    return CellSpec(cell.input_size + 1, cell.hidden_size, kind="gru", use_bias=bool(cell.bias), attention=True)


def _arrays(cell: Any) -> list[Tensor]:
    """Return our arrays. The module's gate z weighs the candidate, ours h_prev, so the signs of its weights differ."""
    kernel, recurrent = (_gates(cell, weight) for weight in (cell.weight_ih, cell.weight_hh))
    if not cell.bias:
        return [kernel.t(), recurrent.t()]
    biases = [_gates(cell, bias) for bias in (cell.bias_ih, cell.bias_hh)]
    return [kernel.t(), recurrent.t(), torch.stack(biases)]


def _gates(cell: Any, weight: Tensor) -> Tensor:
    """Return the rows of an array in our order of gates, z r g; the module's is r z g."""
    r, z, g = weight.chunk(3)
    if type(cell).__name__ == "AGRUCell":
        z = torch.zeros_like(z) if z.ndim > 1 else torch.full_like(z, _OPEN)
    return torch.cat([-z, r, g])


def _text(module: Any) -> str:
    kind = type(module.rnn).__name__.removesuffix("Cell")
    if kind not in ("AGRU", "AUGRU"):
        raise ValueError(f"its cell {type(module.rnn).__name__} isn't supported")
    if kind == "AGRU" and not module.rnn.bias:
        raise ValueError("an AGRU without biases isn't supported")
    return f"{kind} {module.input_size} -> {module.hidden_size}"


def _examples(module: Any) -> list[tuple[Any, ...]]:
    def packed(width: int, lengths: list[int], of: Callable[..., Tensor]) -> PackedSequence:
        x = of(len(lengths), max(lengths), width)
        return nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)

    return [
        (packed(module.input_size, lengths, torch.randn), packed(1, lengths, torch.rand))
        for lengths in ([3, 5, 1], [4, 4], [1])
    ]


ADAPTERS = {
    "deepctr_torch.layers.sequence.DynamicGRU": Adapter(AttentionGRU, _text, _examples),
}
