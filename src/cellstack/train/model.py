"""The model that is trained: standardisation, stacked cells, pooling, a head. `to_nodes` turns it into a Network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from cellstack import nodes
from cellstack.capture import compile_network
from cellstack.formats.pytorch.modules import of_module
from cellstack.layers.accelerate import accelerate
from cellstack.network import Network
from cellstack.nodes import Activation, Dense, GlobalPool, Node, Scale
from cellstack.nodes.recurrent import final
from cellstack.train.checks import UsageError
from cellstack.train.data.targets import TASKS
from cellstack.train.examples import ChangeWeights, Inputs, digest
from cellstack.train.options import TAPS, Architecture
from cellstack.train.recurrent import as_array, nodes_of_layers, recurrent_layers

STEPS = 5  # of the zeros on which a user's module is tried


class Standardise(nn.Module):
    """`(x - mean) / scale`, for each channel; both are buffers `[I]`, so they are saved with the weights."""

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
        """Undo `forward`."""
        return x * self.scale + self.mean


class Changes(nn.Module):
    """Append the changes of the raw channels since the step before to the standardised channels.

    At the first step, a change is the difference from the training mean, which can be many times a usual change: tanh
    limits it.
    """

    kernel: Tensor
    bias: Tensor

    def __init__(self, weights: ChangeWeights):
        super().__init__()
        for name, values in weights._asdict().items():
            self.register_buffer(name, torch.tensor(values))

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, T, W + F]` for `x [B, T, W]`, whose first I channels are the raw ones."""
        raw = x[..., : self.kernel.shape[1]]
        before = nn.functional.pad(raw[:, :-1], (0, 0, 1, 0))
        return torch.cat([x, (before @ self.kernel[0] + raw @ self.kernel[1] + self.bias).tanh()], -1)

    def to_nodes(self, width: int) -> list[Node]:
        """Return it as a convolution over two steps of `[B, T, width]`, and its concatenation with its input."""
        kernel, bias = as_array(self.kernel), as_array(self.bias)
        kernel = np.pad(kernel, ((0, 0), (0, width - kernel.shape[1]), (0, 0)))
        return [nodes.Conv1D(kernel, bias, padding="causal", activation="tanh", keeps_mask=True), nodes.Merge()]


class Filters(nn.Module):
    """A convolution over windows of `TAPS` steps, which end with every nth step; layer normalisation; relu.

    Args:
        width: channels of the input.
        filters: features of the output.
        stride: n.

    Ref: convolutions before or beside an LSTM: Karim et al. 2018, "LSTM Fully Convolutional Networks for Time Series
    Classification".
    """

    def __init__(self, width: int, filters: int, stride: int):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(width, filters, TAPS, stride), nn.LayerNorm(filters)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return `[B, T', filters]` for `x [B, T, W]`, and its mask: that of the last step of each window."""
        y = self.conv(nn.functional.pad(x.transpose(1, 2), (TAPS - 1, 0))).transpose(1, 2)
        return self.norm(y).relu(), None if mask is None else mask[:, :: self.conv.stride[0]]

    def to_nodes(self) -> list[Node]:
        """Return it as nodes."""
        conv, norm = self.conv, self.norm
        kernel, bias = as_array(conv.weight.permute(2, 1, 0)), as_array(cast(Tensor, conv.bias))
        windows = nodes.Conv1D(kernel, bias, conv.stride[0], "causal", keeps_mask=True)
        return [windows, nodes.LayerNorm(as_array(norm.weight), as_array(norm.bias), norm.eps), Activation("relu")]


class Random(nn.Module):
    """A module that draws random numbers in training: for the whole batch, so that the processes can share them.

    Each process uses its own rows, so that the result doesn't depend on the number of processes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: tuple[Tensor, int] | None = None  # this process's rows of the batch, and the batch's size
        self.progress = 0.0  # of the training, from 0 to 1

    def drawn(self, draw: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> Tensor:
        """Return this process's rows of `draw` of ones in the shape of the whole batch, with `steps` steps."""
        rows, total = (None, len(x)) if self.rows is None else self.rows
        whole = draw(torch.ones(total, steps, *x.shape[2:]))
        return (whole if rows is None or len(rows) == total else whole[rows]).to(x)


class Dropout(Random):
    """torch.nn.Dropout."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return `x [B, T, H]` with values set to zero with probability p, the rest scaled by 1/(1-p)."""
        if not self.training or not self.p:
            return x
        return x * self.drawn(partial(nn.functional.dropout, p=self.p), x, x.shape[1])


class Noise(Random):
    """Gaussian noise on standardised inputs, in training.

    Args:
        noise, offset: first standard deviations of noise at each step, and of noise that is constant over a sequence.
        noisy: which channels have it, `[W]` bool; indicators of missing values don't.
        falls: whether it decreases to 0 along half a cosine, as the learning rate does.
    """

    noisy: Tensor

    def __init__(self, noise: float, offset: float, noisy: np.ndarray, falls: bool = True):
        super().__init__()
        self.noise, self.offset, self.falls = noise, offset, falls
        self.register_buffer("noisy", torch.as_tensor(noisy, dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x [B, T, W]` with noise."""
        if not self.training:
            return x
        left = (1.0 + math.cos(math.pi * self.progress)) / 2.0 if self.falls else 1.0
        for deviation, steps in ((self.noise, x.shape[1]), (self.offset, 1)):
            if deviation:
                x = x + self.drawn(torch.randn_like, x, steps) * (left * deviation * self.noisy)
        return x


class Model(nn.Module):
    """Stacked recurrent layers with an output of classes or numbers.

    Args:
        inputs: what is measured of the inputs.
        outputs: number of classes, or of predicted numbers.
        architecture: how it is built. `pooling` takes the steps that the mask selects; with `bidirectional`, `"last"`
            takes the final state of each direction of the last layer: the forward one after the last step, the backward
            one after the first. With `every_step`, the head is applied to every step and the outputs (class
            probabilities) are pooled, not the hidden states. The head takes `[B, W]`, W the width of the last layer's
            output, or `[B, T, W]` if it is applied to every step; any module that `load` supports. With `model`, this
            module takes the standardised `[B, T, I]`, and there is nothing else. A loss takes
            logits or standardised predictions, `[B, O]`, and class indices `[B]` or standardised targets `[B, O]`, like
            torch's losses with `reduction="none"`; B counts all steps if there is an output at every step.
        task: `"classify"` or `"regress"`.
        targets: mean and scale of each predicted number, `[O]` both; the loss uses standardised targets.

    Raises:
        UsageError: an option out of range, or a head or model that can't be part of a Network.
    """

    def __init__(
        self,
        inputs: Inputs,
        outputs: int,
        architecture: Architecture = Architecture(),
        task: str = "classify",
        targets: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        super().__init__()
        if task not in TASKS:
            raise UsageError(f"Model: expected task to be one of {', '.join(TASKS)}, got {task!r}")
        architecture = architecture.of(task)
        every_step, pooling = architecture.every_step, str(architecture.pooling)
        if every_step and pooling == "none":
            raise UsageError("Model: every_step needs pooling mean, max or last, got none")
        if every_step and pooling == "last" and architecture.bidirectional:
            raise UsageError(
                "Model: every_step with pooling last isn't supported for bidirectional layers: at the last step the "
                "backward direction has read one step only; choose pooling mean or max"
            )
        self.task, self.pooling, self.every_step = task, pooling, every_step
        self.architecture, self.bidirectional = architecture, architecture.bidirectional
        self.own_loss, self.whole = architecture.loss, architecture.model is not None
        head = copy.deepcopy(architecture.model if self.whole else architecture.head)
        self.standardise = Standardise(*inputs.standardise)
        raw, indicators = len(inputs.mean), len(inputs.observed)
        self.changes = None if inputs.changes is None else Changes(inputs.changes)
        noisy = np.arange(inputs.width)
        noisy = (noisy < raw) | (noisy >= raw + indicators)
        # Answers at every step, of few steps each, measured better with noise to the end.
        self.noise = Noise(architecture.noise or 0.0, architecture.offset or 0.0, noisy, falls=not every_step)
        filters, stride = (0 if self.whole else architecture.filters or 0), architecture.stride or 1
        if stride > 1 and (every_step or pooling == "none"):
            raise UsageError("Model: an output at every step needs stride 1")
        if stride > 1 and not filters:
            raise UsageError("Model: stride has no effect without a convolution before the layers: give filters too")
        self.filters = Filters(inputs.width, filters, stride) if filters else None
        self.recurrent = nn.ModuleList() if self.whole else recurrent_layers(architecture, filters or inputs.width)
        width = inputs.width if self.whole else architecture.units[-1] * (1 + self.bidirectional)
        self.dropout = Dropout(architecture.dropout)
        self.head = nn.Linear(width, outputs) if head is None else head
        if self.whole:
            with suppress(ValueError):  # it has no recurrent layer of PyTorch
                accelerate(self.head)
        if head is not None:
            self.check_head("model" if self.whole else "head", width, outputs)
        self.targets = Standardise(*(targets or (np.zeros(outputs), np.ones(outputs))))

    def check_head(self, name: str, width: int, outputs: int) -> None:
        """Raise `UsageError` if a user's module, of this option, has other widths or can't be part of a Network."""
        per_step = (STEPS,) if self.every_step or self.pooling == "none" else ()
        steps = (STEPS,) if self.whole else per_step
        training = self.head.training
        try:
            with torch.no_grad():
                answer = self.head.eval()(torch.zeros(2, *steps, width))
        except RuntimeError as error:
            raise UsageError(f"{name}: expected a module with {width} inputs: {str(error).splitlines()[0]}") from None
        self.head.train(training)
        found, expected = getattr(answer, "shape", type(answer).__name__), (2, *per_step, outputs)
        if found != expected:
            found = tuple(found) if isinstance(answer, Tensor) else found
            raise UsageError(f"{name}: expected {outputs} outputs, so {expected} for {(2, *steps, width)}, got {found}")
        try:
            last = self.head_as_network(width).nodes[-1]
        except (TypeError, ValueError) as error:
            why = str(error).removeprefix("load: ")
            raise UsageError(f"{name}: the module can't be converted to a Network: {why}") from None
        if self.task == "classify" and isinstance(last, (Activation, Dense)) and last.activation == "softmax":
            raise UsageError(
                f"{name}: expected logits, got a softmax at its end: the loss and the network apply softmax"
            )

    def head_as_network(self, width: int) -> Network:
        """Return a user's module, which takes values of this width, as a Network."""
        if not self.whole:
            return of_module(self.head)
        return compile_network(copy.deepcopy(self.head).cpu(), torch.zeros(2, STEPS, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits or standardised predictions: `[B, O]`, or `[B, T, O]` with an output at every step.

        Args:
            x: `[B, T, I]` float32.
            mask: `[B, T]` bool, True = use; None = all.
        """
        x = self.standardise(x)
        x = self.noise(x if self.changes is None else self.changes(x))
        if self.filters is not None:
            x, mask = self.filters(x, mask)
        for layer in self.recurrent:
            x = self.dropout(layer(x, mask=mask))
        if self.whole and mask is not None and not mask.all():
            raise UsageError("model: the data has steps without any value, which a module of your own can't skip")
        return self.head(x if self.whole or self.every_step or self.pooling == "none" else self.pool(x, mask))

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return `[B, W]` for `x [B, T, W]`; zeros for a row whose steps are all masked."""
        if self.ends_both_ways:
            return self.final(x, mask)
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

    @property
    def ends_both_ways(self) -> bool:
        """Whether pooling takes the final states of both directions."""
        return self.bidirectional and self.pooling == "last"

    def final(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the final states of both directions, `[B, 2H]`: forward at the last used step, backward at the first.

        Args:
            x: the output of a bidirectional layer, `[B, T, 2H]`.
            mask: `[B, T]`; a row without a used step gives zeros.
        """
        ahead, back = x.chunk(2, -1)
        if mask is None:
            return torch.cat([ahead[:, -1], back[:, 0]], -1)
        rows, order = torch.arange(len(x), device=x.device), torch.arange(1, mask.shape[1] + 1, device=x.device)
        y = torch.cat([ahead[rows, (mask * order).argmax(1)], back[rows, mask.to(torch.uint8).argmax(1)]], -1)
        return torch.where(mask.any(1, keepdim=True), y, 0.0)

    def answer(self, out: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return class probabilities, or predictions in the targets' units, `[B, O]`, for `forward`'s output."""
        out = out.softmax(-1) if self.task == "classify" else self.targets.inverse(out)
        return self.pool(out, mask) if self.every_step else out

    def losses(self, out: Tensor, mask: Tensor | None, y: Tensor) -> Tensor:
        """Return each target's loss, in the shape of `y`: cross-entropy in nats, or squared standardised error."""
        if self.task == "classify" and self.every_step:
            each = self.each(out, y[:, None].expand(-1, out.shape[1]))
            used = torch.ones_like(each) if mask is None else mask.to(each)
            return (each * used).sum(1) / used.sum(1).clamp(min=1)
        if self.task == "classify":
            return self.each(out, y)
        return self.each(self.pool(out, mask) if self.every_step else out, self.targets(y))

    def each(self, out: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each of `out [..., O]`, in the shape of `y`: `[...]` classes, or `[..., O]` numbers."""
        flat = out.flatten(0, -2), y.flatten() if self.task == "classify" else y.flatten(0, -2)
        if self.own_loss is None:
            function = nn.functional.cross_entropy if self.task == "classify" else nn.functional.mse_loss
            return function(*flat, reduction="none").view(y.shape)
        own = self.own_loss(*flat)
        if own.shape == flat[0].shape[:1] and flat[1].ndim == 2:  # one loss per example, for all its targets
            own = own[:, None].expand(flat[1].shape)
        return own.view(y.shape) if own.shape == flat[1].shape else own

    def measure(self, out: Tensor, mask: Tensor | None, y: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Return sums over a batch; added up over batches they are the argument of `measured`."""
        answer = self.answer(out, mask)
        each = (answer.argmax(-1) == y).float() if self.task == "classify" else (answer - y).double().square()
        return {"score": (each * weight).sum(dtype=torch.float64), "weight": weight.sum(dtype=torch.float64)}

    def measured(self, sums: dict[str, float]) -> dict[str, float]:
        """Return `accuracy`, or `rmse` in the targets' units, from sums of `measure`."""
        mean = sums["score"] / max(sums["weight"], 1e-12)
        return {"accuracy": mean} if self.task == "classify" else {"rmse": mean**0.5}

    def describe(self) -> dict[str, Any]:
        """Return what must match a checkpoint's model, in addition to the shapes of the weights."""
        targets = digest(value.cpu().numpy() for value in (self.targets.mean, self.targets.scale))
        return {"task": self.task, "targets": targets, **self.architecture.described()}

    def to_nodes(self) -> list[Node]:
        """Return the model as nodes, from raw inputs to class probabilities, or predictions in the targets' units.

        Each takes the result of the one before; a Merge takes those of the two before.
        """
        stack = nodes_of_layers(self.recurrent)
        if self.ends_both_ways:
            stack = [*stack[:-1], final(stack[-1])]
        changes = [] if self.changes is None else self.changes.to_nodes(len(self.standardise.mean))
        filters = [] if self.filters is None else self.filters.to_nodes()
        before: list[Node] = [self.first, *changes, *filters, *stack]
        head = nodes_of(self.head)
        head = [*head[:-1], *_folded(head[-1], self.last)]
        pool = [] if self.pooling == "none" or self.ends_both_ways else [GlobalPool(self.pooling)]
        return [*before, *head, *pool] if self.every_step else [*before, *pool, *head]

    @property
    def first(self) -> nodes.Standardise:
        """The network's first node."""
        return nodes.Standardise(as_array(self.standardise.mean), as_array(self.standardise.scale))

    @property
    def last(self) -> Node:
        """The network's last node: it returns class probabilities, or predictions in the targets' units."""
        if self.task == "classify":
            return Activation("softmax")
        return Scale(as_array(self.targets.scale), as_array(self.targets.mean))  # y·scale + mean

    def to_network(self, metadata: dict[str, Any]) -> Network:
        """Return a model with a module of the user's own as a Network."""
        own = self.head_as_network(len(self.first.mean))
        first, last = (name + "_" * (name in own.names) for name in ("standardise", "output"))
        wires = [[first if source == own.inputs[0] else source for source in sources] for sources in own.wires]
        return Network(
            (self.first, *own.nodes, self.last),
            (first, *own.names, last),
            own.metadata | metadata,
            wires=[["x"], *wires, own.outputs],
            _warn=False,
        )


def nodes_of(head: nn.Module) -> list[Node]:
    """Return a head as nodes.

    Raises:
        TypeError: the head contains a module that a Network doesn't support; the message names it.
    """
    if isinstance(head, nn.Linear):
        bias = head.bias if head.bias is not None else torch.zeros(head.out_features)
        return [Dense(as_array(head.weight.T), as_array(bias))]
    return list(of_module(head).nodes)


def _folded(last: Node, end: Node) -> list[Node]:
    """Merge the last node of a head with the activation or scaling after it, if that node is dense."""
    if not isinstance(last, Dense) or last.activation != "linear":
        return [last, end]
    if isinstance(end, Activation):
        return [replace(last, activation="softmax")]
    assert isinstance(end, Scale)
    bias = np.zeros(len(end.scale), np.float32) if last.bias is None else last.bias
    return [Dense(last.kernel * end.scale, bias * end.scale + end.shift)]
