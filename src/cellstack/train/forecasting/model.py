"""The forecasting network: stacked cells over a window and its horizon, with an output at each step of the horizon."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cellstack import nodes
from cellstack.network import Network
from cellstack.nodes import Node
from cellstack.train.model import Dropout, Standardise
from cellstack.train.options import Architecture
from cellstack.train.recurrent import as_array, nodes_of_layers, recurrent_layers


class Calibration(NamedTuple):
    """Corrections of the networks' mean output, determined on held-out data.

    Args:
        followed: factor of each target's outputs, from 0 (only the rule) to 1, `[targets]`.
        moved: shift of each quantile, added afterwards, `[targets, quantiles]`, in the windows' units.
    """

    followed: np.ndarray
    moved: np.ndarray


class Forecaster(nn.Module):
    """Stacked cells over a window and its horizon, and a dense head on the states and inputs of the horizon's steps.

    The head's weights start at zero, so that training starts from the rule to which the outputs are added. It also
    gets the inputs, because the cells, whose outputs are bounded, can't represent an unbounded linear relation.

    Args:
        inputs: mean and scale of each channel, `[C]` both.
        targets: scale of each target's outputs, `[targets]`.
        horizon: steps to forecast.
        quantiles: see `Recipe`.
        architecture: how it is built.

    Ref: a linear path parallel to the recurrent one: Lai et al. 2018, "Modeling long- and short-term temporal patterns
    with deep neural networks", section 3.6; quantile loss: Wen et al. 2017, "A multi-horizon quantile recurrent
    forecaster".
    """

    def __init__(
        self,
        inputs: tuple[np.ndarray, np.ndarray],
        targets: np.ndarray,
        horizon: int,
        quantiles: tuple[float, ...],
        architecture: Architecture,
    ):
        super().__init__()
        units = architecture.units
        self.horizon, self.architecture = horizon, architecture
        self.standardise = Standardise(*inputs)
        channels = len(inputs[0])
        self.recurrent = recurrent_layers(architecture, channels)
        self.dropout = Dropout(architecture.dropout)
        self.head = nn.Linear(units[-1] + channels, len(targets) * len(quantiles))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.scale: Tensor
        self.quantiles: Tensor
        self.register_buffer("scale", torch.as_tensor(targets, dtype=torch.float32).clone())
        self.register_buffer("quantiles", torch.tensor(quantiles, dtype=torch.float32))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return `[B, horizon, targets, quantiles]` in units of `targets`.

        Args:
            x: `[B, window + horizon, C]` float32.
            mask: `[B, window + horizon]` bool, True = use; None = all.
        """
        x = self.standardise(x)
        *lower, last = self.recurrent
        h = x
        for layer in lower:
            h = self.dropout(layer(h, mask=mask))
        h = self.dropout(last(h, mask=mask)[:, -self.horizon :])  # only these are used, and random numbers are slow
        out = self.head(torch.cat([h, x[:, -self.horizon :]], dim=-1))
        return out.unflatten(-1, (len(self.scale), len(self.quantiles)))

    def losses(self, out: Tensor, mask: Tensor | None, y: Tensor) -> Tensor:
        """Return the quantile loss of each target, `[B, horizon · targets]` like `y`, in units of `targets`.

        Twice the mean over the quantiles: with the median only, that is the mean absolute error.
        """
        error = y.unflatten(1, (self.horizon, -1))[..., None] / self.scale[:, None] - out
        return 2 * torch.maximum(self.quantiles * error, (self.quantiles - 1) * error).mean(-1).flatten(1)

    def answer(self, out: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the medians `[B, horizon · targets]`, in the units of `y`."""
        middle = int((self.quantiles == 0.5).nonzero())
        return (out[..., middle] * self.scale).flatten(1)

    def measure(self, out: Tensor, mask: Tensor | None, y: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Return sums over a batch: the medians' errors relative to the typical ones, and their number."""
        errors = (self.answer(out) - y).abs() * weight
        return {"errors": errors.sum(dtype=torch.float64), "count": (weight > 0).sum(dtype=torch.float64)}

    def measured(self, sums: dict[str, float]) -> dict[str, float]:
        """Return the mean absolute scaled error."""
        return {"mase": sums["errors"] / max(sums["count"], 1.0)}

    def describe(self) -> dict[str, Any]:
        """Return what must match a checkpoint's model, in addition to the shapes of the weights."""
        return {"task": "forecast", "horizon": self.horizon, **self.architecture.described()}


def as_network(
    members: Sequence[Forecaster], metadata: dict[str, Any], calibration: Calibration | None = None
) -> Network:
    """Return models as one network, from `[B, window + horizon, C]` to `[B, horizon, targets · quantiles]`.

    Its output is the mean of the models' outputs, in the units of the windows.

    Args:
        members: models of one recipe, with the same inputs.
        metadata: of the network.
        calibration: corrections of the outputs, which become part of the weights.
    """
    first = members[0]
    horizon, quantiles = first.horizon, len(first.quantiles)
    standardise = nodes.Standardise(as_array(first.standardise.mean), as_array(first.standardise.scale))
    made: dict[str, tuple[Node, tuple[str, ...]]] = {
        "standardise": (standardise, ("x",)),
        "inputs_ahead": (nodes.Select(-horizon, None), ("standardise",)),
    }
    heads = []
    for n, member in enumerate(members):
        scale, shift = np.repeat(as_array(member.scale), quantiles), np.float32(0.0)
        if calibration is not None:
            scale = scale * np.repeat(calibration.followed, quantiles).astype(np.float32)
            shift = calibration.moved.reshape(-1).astype(np.float32)
        head = nodes.Dense(as_array(member.head.weight.T) * scale, as_array(member.head.bias) * scale + shift)
        end = f"_{n + 1}" if len(members) > 1 else ""
        wire, stack = "standardise", nodes_of_layers(member.recurrent)
        for depth, node in enumerate(stack):
            name = f"recurrent{end}" if len(stack) == 1 else f"layer_{depth}{end}"
            made[name] = (node, (wire,))
            wire = name
        made[f"states_ahead{end}"] = (nodes.Select(-horizon, None), (wire,))
        made[f"ahead{end}"] = (nodes.Merge("concat", -1), (f"states_ahead{end}", "inputs_ahead"))
        made[f"head{end}"] = (head, (f"ahead{end}",))
        heads.append(f"head{end}")
    if len(members) > 1:
        made["mean"] = (nodes.Merge("ave"), tuple(heads))
    parts, wires = zip(*made.values(), strict=True)
    inputs = {"x": (None, len(standardise.mean))}
    return Network(parts, tuple(made), metadata, inputs=inputs, wires=wires, outputs=(tuple(made)[-1],))
