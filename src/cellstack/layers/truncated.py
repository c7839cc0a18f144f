"""`truncated_backward`: truncated backpropagation through time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cellstack.cells.errors import ShapeError, as_integer
from cellstack.layers.base import Layer, apply_constraints
from cellstack.layers.rnn import RNN
from cellstack.layers.sequences import as_steps, as_used

OWNER = "truncated_backward"


def truncated_backward(
    model: RNN | Callable[..., tuple[Any, ...]],
    sequences: Any,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    *,
    initial_state: Any = None,
    mask: Any = None,
    lengths: Any = None,
    reset: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    max_norm: float | None = None,
) -> tuple[Tensor, Any]:
    """Run long sequences in chunks of `steps` and run the backward pass of each chunk separately.

    The state is passed from chunk to chunk, detached from its graph, so the memory is that of one chunk for sequences
    of any length. Use it instead of `loss.backward()`: it adds to the `.grad` of all parameters the gradient of the
    mean loss over all steps, without the paths between chunks. With an `optimizer`, each chunk is an optimiser step on
    the gradient of that chunk's mean loss instead.

    Args:
        model: an RNN of ours with `return_sequences`, or a callable `(chunk, state) -> (prediction, *states)` whose
            prediction is `[B, t, …]`. The callable also gets the chunk's `mask=` and `reset=` if the call has them. Its
            state can be any structure of tensors, which are detached; the first one is `initial_state`. One state is
            passed as it is, several as a tuple, so the callable can call a layer of ours with `return_state`.
        sequences: `[B, T, …]`, a tensor or an array.
        targets: `[B, T, …]`, on the device of the predictions.
        loss: a callable of the predictions `[N, …]` and targets `[N, …]` of a chunk's N steps that count, ordered by
            row, then step; it returns their mean, like torch's losses. It may include a head.
        steps: steps of a chunk, at least 1; the last one may have fewer.
        initial_state: initial state of the first chunk; None: the model's default.
        mask, lengths, reset: see `RNN.forward`. A chunk without steps that count only updates the state.
        optimizer: makes a step after each chunk, with gradients zeroed before. If the model is a module, its
            constraints are applied after the step.
        max_norm: maximum norm of all the optimiser's gradients, to which they are clipped before a step.

    Returns:
        The mean loss over all steps that count, a scalar without a graph; and the state after the last step, in the
        form of `initial_state`.

    Raises:
        ShapeError: targets, mask or reset of another batch or number of steps.
        TypeError: a model that can't be called or returns no state, a mask or reset that isn't bool.
        ValueError: a layer that goes backwards or doesn't return sequences, no step that counts, `steps` below 1,
            `max_norm` without an optimizer, or a mask with lengths.

    >>> from cellstack import layers
    >>> lstm, head = layers.LSTM(4, return_sequences=True, input_size=3), nn.Linear(4, 2)
    >>> x, targets = torch.randn(2, 100, 3), torch.randn(2, 100, 2)
    >>> loss, state = truncated_backward(lstm, x, targets, lambda y, t: (head(y) - t).square().mean(), steps=20)
    >>> tuple(lstm.cell.kernel.grad.shape), state.shape
    ((3, 16), (2, 2, 4))

    Ref: Williams and Peng 1990, "An Efficient Gradient-Based Algorithm for On-Line Training of Recurrent Network
    Trajectories": BPTT(h; h') with h = h' = `steps`.
    """
    run = _runner(model)
    if as_integer(OWNER, "steps", steps) < 1:
        raise ValueError(f"{OWNER}: expected steps >= 1, got {steps}")
    if max_norm is not None and optimizer is None:
        raise ValueError(f"{OWNER}: max_norm needs an optimizer: without one, clip the gradients after this call")
    batch, length = _shape(sequences, targets)
    used = as_used(OWNER, targets, mask, lengths)
    starts = None if reset is None else as_steps(OWNER, "reset", reset, targets)
    counts = [batch] * length if used is None else used.sum(0).tolist()
    total = sum(counts)
    if not total:
        raise ValueError(f"{OWNER}: expected at least one step that counts, got none of [B={batch}, T={length}]")
    mean, state = torch.zeros((), device=targets.device), initial_state
    for first in range(0, length, steps):
        part = slice(first, first + steps)
        share = sum(counts[part]) / total
        masks = {name: m[:, part] for name, m in (("mask", used), ("reset", starts)) if m is not None}
        with nullcontext() if share else torch.no_grad():
            y, state = run(sequences[:, part], state, **masks)
        state = pytree.tree_map_only(Tensor, Tensor.detach, state)
        if not share:
            continue
        pair = y, targets[:, part]
        value = loss(*(value.flatten(0, 1) if used is None else value[masks["mask"]] for value in pair))
        mean = mean + share * value.detach()
        if optimizer is None:
            (share * value).backward()
        else:
            _step(optimizer, value, max_norm)
            if isinstance(model, nn.Module):
                apply_constraints(model)
    return mean, state


def _runner(model: Any) -> Callable[..., tuple[Tensor, Any]]:
    """Return a function that runs a chunk from a state."""
    if isinstance(model, RNN):
        owner = f"{OWNER}: {type(model).__name__}"
        if model.go_backwards or not model.return_sequences:
            raise ValueError(f"{owner}: expected return_sequences=True and go_backwards=False")

        def run(chunk: Any, state: Any, mask: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Any]:
            ran = model.run(model.given(chunk, mask, reset, None), state, None, False, False)
            return ran.y, tuple(ran.states) if model.stacked else ran.states[0]

        return run
    if isinstance(model, Layer) or not callable(model):
        raise TypeError(
            f"{OWNER}: expected a cellstack RNN or a callable (chunk, state) -> (prediction, *states), "
            f"got {type(model).__name__}"
        )

    def call(chunk: Any, state: Any, **masks: Tensor) -> tuple[Tensor, Any]:
        returned = model(chunk, state, **masks)
        if not isinstance(returned, tuple) or len(returned) < 2:
            came = f"{len(returned)} value" if isinstance(returned, tuple) else type(returned).__name__
            raise TypeError(
                f"{OWNER}: expected the model to return (prediction, *states), got {came}: a cellstack layer needs "
                "return_state=True"
            )
        y, *states = returned
        return y, states[0] if len(states) == 1 else tuple(states)

    return call


def _shape(sequences: Any, targets: Any) -> tuple[int, int]:
    """Check the shapes, and return B and T."""
    if not hasattr(sequences, "shape") or not isinstance(targets, Tensor):
        came = f"{type(sequences).__name__}, {type(targets).__name__}"
        raise TypeError(f"{OWNER}: expected sequences as a tensor or array, targets as a tensor, got {came}")
    shapes = tuple(sequences.shape), tuple(targets.shape)
    if len(shapes[0]) < 2 or shapes[0][:2] != shapes[1][:2]:
        raise ShapeError(f"{OWNER}: expected sequences [B, T, …] and targets [B, T, …], got {shapes[0]}, {shapes[1]}")
    return shapes[0][:2]


def _step(optimizer: torch.optim.Optimizer, value: Tensor, max_norm: float | None) -> None:
    optimizer.zero_grad()
    value.backward()
    if max_norm is not None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)
    optimizer.step()
