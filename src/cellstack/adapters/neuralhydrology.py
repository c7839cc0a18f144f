"""NeuralHydrology's `CustomLSTM`, which returns gates and states of every step, as one call of our kernel.

Ref: NeuralHydrology, "CustomLSTM", https://neuralhydrology.readthedocs.io/en/latest/usage/models.html
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from cellstack.layers.accelerate import accelerate as accelerate_modules

__all__ = ["accelerate", "restore"]

_WEIGHTS = {"weight_ih_l0": "w_ih", "weight_hh_l0": "w_hh", "bias_ih_l0": "b_ih", "bias_hh_l0": "b_hh"}


def accelerate(model: Any) -> Any:
    """Make our kernel run a `CustomLSTM`, in training too; change the model in place, but not its interface.

    Its results are those of every step: `h_n`, `c_n`, and `i`, `f`, `g` and `o`, which are the gates before their
    activation; each `[B, T, H]` and differentiable. NeuralHydrology's other models have an `nn.LSTM`: use
    `cellstack.accelerate` for them.

    Args:
        model: a `CustomLSTM`, trained or not; it keeps its weights.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` isn't a `CustomLSTM` of NeuralHydrology.
    """
    cell = _cell_of("accelerate", model)
    lstm = nn.LSTM(cell.input_size, cell.hidden_size, device="meta")
    vars(model)["_cellstack_lstm"] = accelerate_modules(lstm)  # not a submodule, which would change the state dict
    model.forward = MethodType(_forward, model)
    return model


def restore(model: Any) -> Any:
    """Undo `accelerate` in place, and return `model`.

    Args:
        model: the accelerated model.

    Raises:
        TypeError: `model` isn't a `CustomLSTM` of NeuralHydrology.
    """
    _cell_of("restore", model)
    for name in ("forward", "_cellstack_lstm"):
        vars(model).pop(name, None)
    return model


def _cell_of(owner: str, model: Any) -> Any:
    kind = type(model)
    cell = getattr(model, "cell", None)
    if kind.__name__ != "CustomLSTM" or not all(isinstance(getattr(cell, w, None), Tensor) for w in _WEIGHTS.values()):
        raise TypeError(f"{owner}: expected a CustomLSTM of NeuralHydrology, got {kind.__name__}")
    return cell


def _forward(self: Any, data: Any, h_0: Tensor | None = None, c_0: Tensor | None = None) -> dict[str, Tensor]:
    """Compute the results of `CustomLSTM.forward`."""
    x = self.embedding_net(data, concatenate_output=True)  # [T, B, I]
    lstm = vars(self)["_cellstack_lstm"]
    for name, own in _WEIGHTS.items():
        if getattr(lstm, name) is not getattr(self.cell, own):
            setattr(lstm, name, getattr(self.cell, own))
    zeros = x.new_zeros(x.shape[1], lstm.hidden_size)
    h, c = (zeros if start is None else start for start in (h_0, c_0))
    y, _, (trace,) = lstm(x, (h[None], c[None]), return_gates=True)
    # The trace has the gates after their activation. A saturated sigmoid can't be inverted, so recompute the products.
    z = linear(x, lstm.weight_ih_l0, lstm.bias_ih_l0 + lstm.bias_hh_l0)  # [T, B, 4H]
    z[0].addmm_(h, lstm.weight_hh_l0.t())
    z[1:].flatten(0, 1).addmm_(y[:-1].flatten(0, 1), lstm.weight_hh_l0.t())
    named = {"h_n": y, "c_n": trace.c, **dict(zip("ifgo", z.chunk(4, -1), strict=True))}
    found = {name: part.transpose(0, 1) for name, part in named.items()}  # [B, T, H]
    found["h_n"] = found["h_n"].contiguous()  # dropout draws in memory order
    return {**found, **self.head(self.dropout(found["h_n"]))}
