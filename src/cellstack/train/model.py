"""The model that is trained: standardise, stacked cells, pool, a dense head. It becomes a Network by `to_nodes`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cellstack import layers, nodes
from cellstack.nodes import Dense, GlobalPool, Node
from cellstack.nodes.recurrent import Bidirectional, Cell, Recurrent
from cellstack.train.checks import UsageError

TASKS = ("classify", "regress")
LAYERS = {"lstm": layers.LSTM, "gru": layers.GRU, "rnn": layers.SimpleRNN}


class Standardise(nn.Module):
    """`(x - mean) / scale`, channel by channel; both are buffers `[I]`, so they travel with the weights."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: np.ndarray, scale: np.ndarray):
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).clone())
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float32).clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return x standardised, in its own shape."""
        return (x - self.mean) / self.scale

    def inverse(self, x: Tensor) -> Tensor:
        """Return what `forward` was given."""
        return x * self.scale + self.mean


class Dropout(nn.Module):
    """torch.nn.Dropout, its mask drawn for the whole batch that the processes share.

    Each process takes its own rows of the mask, so that a batch split over processes is dropped out as in one.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.rows: tuple[Tensor, int] | None = None  # this process's rows of the batch, and the batch's size

    def forward(self, x: Tensor) -> Tensor:
        """Return `x [B, T, H]` with values set to zero with probability p, the rest scaled by 1/(1-p)."""
        if self.rows is None or not self.training:
            return nn.functional.dropout(x, self.p, self.training)
        rows, total = self.rows
        return x * nn.functional.dropout(torch.ones(total, *x.shape[1:]), self.p)[rows].to(x)


class Model(nn.Module):
    """Stacked recurrent layers over a sequence, read out as classes or numbers.

    Args:
        inputs: mean and scale of each input channel, `[I]` both.
        outputs: how many classes, or how many numbers.
        units: width of each layer, bottom first.
        task: `"classify"` or `"regress"`.
        bidirectional: run each layer from both ends, outputs side by side.
        dropout: share of values dropped out after each layer in training.
        pooling: `"mean"`, `"max"` or `"last"` over the steps that the mask keeps.
        every_step: read out every step and pool the answers (class probabilities), not the hidden states. Such a model
            has an answer after each step of a stream, and each step counts in its loss.
        targets: mean and scale of each number, `[O]` both; training sees standardised targets, users don't.
        cell: what each layer is made of, `"lstm"`, `"gru"` or `"rnn"`.

    Raises:
        UsageError: an option out of its range.
    """

    def __init__(
        self,
        inputs: tuple[np.ndarray, np.ndarray],
        outputs: int,
        units: tuple[int, ...] = (48, 48),
        task: str = "classify",
        bidirectional: bool = False,
        dropout: float = 0.0,
        pooling: str = "mean",
        every_step: bool = False,
        targets: tuple[np.ndarray, np.ndarray] | None = None,
        cell: str = "lstm",
    ):
        super().__init__()
        if not units or min(units) < 1:
            raise UsageError(f"Model: expected units of at least 1 for at least one layer, got {units}")
        if not 0.0 <= dropout < 1.0:
            raise UsageError(f"Model: expected dropout in [0, 1), got {dropout}")
        given = (("task", task, TASKS), ("pooling", pooling, ("mean", "max", "last")), ("cell", cell, tuple(LAYERS)))
        for name, value, choices in given:
            if value not in choices:
                raise UsageError(f"Model: expected {name} to be one of {', '.join(choices)}, got {value!r}")
        self.task, self.pooling, self.every_step, self.bidirectional = task, pooling, every_step, bidirectional
        self.cell = cell
        self.standardise = Standardise(*inputs)
        self.recurrent = nn.ModuleList()
        width = len(inputs[0])
        for size in units:
            layer = LAYERS[cell](size, return_sequences=True, input_size=width)
            self.recurrent.append(layers.Bidirectional(layer) if bidirectional else layer)
            width = size * (2 if bidirectional else 1)
        self.dropout = Dropout(dropout)
        self.head = nn.Linear(width, outputs)
        self.targets = Standardise(*(targets or (np.zeros(outputs), np.ones(outputs))))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits or standardised numbers: `[B, O]`, or `[B, T, O]` where every step is read out.

        Args:
            x: `[B, T, I]` float32.
            mask: `[B, T]` bool, True = use; all steps where None.
        """
        x = self.standardise(x)
        for layer in self.recurrent:
            x = self.dropout(layer(x, mask=mask))
        return self.head(x) if self.every_step else self.head(self.pool(x, mask))

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return `[B, W]` for `x [B, T, W]`; zeros for a row whose mask keeps no step."""
        if mask is None:
            return x.mean(1) if self.pooling == "mean" else x.amax(1) if self.pooling == "max" else x[:, -1]
        used = mask[..., None]  # [B, T, 1]
        if self.pooling == "mean":
            return (x * used).sum(1) / used.sum(1).clamp(min=1)
        if self.pooling == "max":
            y = x.masked_fill(~used, -torch.inf).amax(1)
        else:
            last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
            y = x[torch.arange(len(x), device=x.device), last]
        return torch.where(mask.any(1, keepdim=True), y, 0.0)

    def answer(self, out: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return `[B, O]` class probabilities, or numbers in the targets' units, for what `forward` returned."""
        out = out.softmax(-1) if self.task == "classify" else self.targets.inverse(out)
        return self.pool(out, mask) if self.every_step else out

    def losses(self, out: Tensor, mask: Tensor | None, y: Tensor) -> Tensor:
        """Return each target's loss, in the shape of `y`: cross-entropy in nats, or squared standardised errors."""
        if self.task == "classify":
            if not self.every_step:
                return nn.functional.cross_entropy(out, y, reduction="none")
            each = nn.functional.cross_entropy(
                out.transpose(1, 2), y[:, None].expand(-1, out.shape[1]), reduction="none"
            )
            used = torch.ones_like(each) if mask is None else mask.to(each)
            return (each * used).sum(1) / used.sum(1).clamp(min=1)
        out = self.pool(out, mask) if self.every_step else out
        return nn.functional.mse_loss(out, self.targets(y), reduction="none")

    def to_nodes(self) -> list[Node]:
        """Return the model as nodes: raw inputs in; class probabilities, or numbers in the targets' units, out."""
        standardise = nodes.Standardise(_array(self.standardise.mean), _array(self.standardise.scale))
        if self.bidirectional:
            stack = [
                Bidirectional(_recurrent([layer.forward_layer]), _recurrent([layer.backward_layer], True))
                for layer in self.recurrent
            ]
        else:
            stack = [_recurrent(list(self.recurrent))]
        before: list[Node] = [standardise, *stack]
        kernel, bias = _array(self.head.weight.T), _array(self.head.bias)
        if self.task == "classify":
            head = Dense(kernel, bias, "softmax")
        else:  # y·scale + mean, folded into the head
            scale, mean = _array(self.targets.scale), _array(self.targets.mean)
            head = Dense(kernel * scale, bias * scale + mean)
        pool = GlobalPool(self.pooling)
        return [*before, head, pool] if self.every_step else [*before, pool, head]


def _recurrent(stack: list[Any], go_backwards: bool = False) -> Recurrent:
    cells = [layer.cell for layer in stack]
    held = (Cell(cell.spec, *(_array(getattr(cell, name)) for name in cell.spec.shapes)) for cell in cells)
    return Recurrent(tuple(held), return_sequences=True, go_backwards=go_backwards)


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().numpy())
