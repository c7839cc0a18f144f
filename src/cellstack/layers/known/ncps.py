"""ncps's CfC.

Ref: ncps, ncps/torch/cfc.py and wired_cfc_cell.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cellstack.cells.cfc import MIXED, backbone_layers, ncps_settings
from cellstack.cells.spec import CellSpec
from cellstack.layers import forward, op
from cellstack.layers.forward import CellRun
from cellstack.layers.handwritten import HandWritten
from cellstack.layers.known.adapter import Adapter


def _cells(module: Any) -> list[tuple[Any, CellSpec]]:
    """Return the cells of a `CfC`, bottom first, with our descriptions of them: several if it has a wiring."""
    if module.use_mixed:
        raise ValueError(MIXED)
    cells = getattr(module.rnn_cell, "_layers", [module.rnn_cell])
    return [(cell, CellSpec(**ncps_settings(cell))) for cell in cells]


def _arrays(cell: Any) -> list[Tensor]:
    """Return our arrays; a wiring multiplies the weights of two of the four products by a mask."""
    pure = cell.mode == "pure"
    products = (cell.ff1,) if pure else (cell.ff1, cell.ff2, cell.time_a, cell.time_b)
    pairs = zip(products, (cell.sparsity_mask, cell.sparsity_mask, None, None), strict=False)
    weights = torch.cat([one.weight if mask is None else one.weight * mask for one, mask in pairs])
    bias, after = torch.cat([one.bias for one in products]), list[Tensor]()
    if cell.backbone_layers:
        first, *more = (cell.backbone[n] for n in backbone_layers(cell))
        after = [weights.t(), bias]
        if more:
            after += [torch.stack([one.weight.t() for one in more]), torch.stack([one.bias for one in more])]
        weights, bias = first.weight, first.bias
    kernel, recurrent = weights.t().split([cell.input_size, cell.hidden_size])
    return [kernel, recurrent, bias, *after, *((cell.w_tau[0], cell.A[0]) if pure else ())]


def _drops(cell: Any) -> bool:
    """Whether there is dropout between the layers of a cell's backbone, now."""
    return any(isinstance(one, torch.nn.Dropout) and one.p > 0.0 and one.training for one in cell.backbone or ())


class ClosedForm(HandWritten):
    """A `CfC`: one cell, or those of a wiring."""

    def forward(self, input: Any, hx: Any = None, timespans: Any = None) -> Any:
        """Run like the module's own forward."""
        module: Any = self
        cells = _cells(module)
        arrays = [_arrays(cell) for cell, _ in cells]
        given = [one for one in (input, hx, timespans) if one is not None]
        ready = self.runs(given, module.input_size, [array for each in arrays for array in each])
        if (
            not ready
            or any(_drops(cell) for cell, _ in cells)
            or input.ndim != 3
            or (hx is not None and hx.shape != (self._rows(input), module.state_size))
        ):
            return super().forward(input, hx, timespans)
        x = input if module.batch_first else input.transpose(0, 1)
        # The module multiplies the times of several rows by units, not by rows, or refuses them.
        shapes = (input.shape[:2], (*input.shape[:2], 1))
        if timespans is not None and (len(x) > 1 or timespans.shape not in shapes):
            return super().forward(input, hx, timespans)
        sizes = [spec.units for _, spec in cells]
        starts = [[]] * len(cells) if hx is None else [[part] for part in hx.split(sizes, dim=1)]
        runs = [
            CellRun(op.CellCall(spec), own, start) for (_, spec), own, start in zip(cells, arrays, starts, strict=True)
        ]
        if timespans is None:
            y, _, states, _ = forward.run_layers(runs, x, None, None)
        else:
            y, states, times = x, [], timespans.reshape(1, -1, 1)
            for (_, spec), each in zip(cells, runs, strict=True):
                timed = op.CellCall(replace(spec, input_size=spec.input_size + 1, timespans=True))
                found = forward.run_layers([each._replace(call=timed)], torch.cat([y, times], -1), None, None)
                y, states = found.y, [*states, *found.states]
        read = module.fc(y if module.return_sequences else y[:, -1])
        if module.return_sequences and not module.batch_first:
            read = read.transpose(0, 1)
        read = read.clone() if read is y and y.requires_grad else read
        return read, torch.cat([state[0] for state in states], dim=1)

    def _rows(self, x: Tensor) -> int:
        module: Any = self
        return x.shape[0 if module.batch_first else 1]


def _text(module: Any) -> str:
    return f"CfC {module.input_size} -> {', '.join(str(spec.units) for _, spec in _cells(module))}"


def _examples(module: Any) -> list[tuple[Any, ...]]:
    def shaped(x: Tensor) -> Tensor:
        return x if module.batch_first else x.transpose(0, 1)

    x, one = torch.randn(3, 5, module.input_size), torch.randn(1, 4, module.input_size)
    state = torch.tanh(torch.randn(1, module.state_size))
    return [(shaped(x),), (shaped(one), state), (shaped(one), state, shaped(3.0 * torch.rand(1, 4)))]


ADAPTERS = {
    "ncps.torch.cfc.CfC": Adapter(ClosedForm, _text, _examples),
}
