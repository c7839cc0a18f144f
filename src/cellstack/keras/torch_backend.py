"""Keras's recurrent loops on the torch backend, as calls of our op on Keras's variables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import keras
import torch
from torch import Tensor

from cellstack.cells.spec import CellSpec
from cellstack.keras import keras_cells as own
from cellstack.layers import eager, forward, op
from cellstack.layers.cell_base import NO_MASKS, Masks, needs_grad
from cellstack.layers.forward import CellRun

isa = op.isa
_cell_call = lru_cache(maxsize=1024)(op.CellCall)
_PLAIN = (Tensor, torch.nn.Parameter)


def why_not(x: Any, mask: Any) -> str:
    """Return why the kernel doesn't support these sequences in the current context; "" if it does."""
    if not concrete(x):
        return "traced, exported or transformed, or on another device"
    if x.ndim != 3 or 0 in x.shape:
        return "not sequences [B, T, I] with at least one step"
    if torch.is_autocast_enabled("cpu"):
        return "torch.autocast is on"
    if mask is not None and not (type(mask) is Tensor and mask.is_cpu and mask.shape == x.shape[:2]):
        return "a mask that isn't a tensor [B, T]"
    return ""


def concrete(x: Any) -> bool:
    """Whether `x` is a CPU tensor with values, and no compiler, tracer, mode or transform is active."""
    return (
        type(x) in _PLAIN
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and not op.transformed()
    )


def symbolic(x: Any) -> bool:
    """Whether a call only infers shapes, as when a model is built: Keras passes tensors without values."""
    return isinstance(x, keras.KerasTensor) or (isinstance(x, Tensor) and x.is_meta)


def draw(cells: Sequence[Any], step: Tensor) -> None:
    """Make the cells draw and store the dropout masks of a call, in Keras's order, for `step [B, I]`."""
    for cell in cells:
        cell.get_dropout_mask(step)
        step = step.new_empty(step.shape[0], cell.units)  # masks depend only on shape and dtype
        cell.get_recurrent_dropout_mask(step)


def run_keras_layers(
    layer: Any, x: Tensor, initial_state: Sequence[Any], mask: Tensor | None, training: Any
) -> tuple[tuple[Any, ...] | None, str]:
    """Run a supported layer over `x [B, T, I]` from `initial_state`, or from zeros if that is empty.

    Returns:
        The results of Keras's loop, and "": the last output `[B, H]`, the outputs `[B, T, H]` in the order processed
        (with `return_sequences`, else `[B, 1, H]`), and the states in the structure of `initial_state`, a flat list if
        that is empty. Or None, and the reason why Keras has to run the call.
    """
    cells = own.of(layer)
    weights = [[variable.value for variable in own.arrays(cell)] for cell in cells]
    dtype = weights[0][0].dtype
    starts = keras.tree.flatten(initial_state)
    flat = [x, *starts, *(array for group in weights for array in group)]
    if not all(type(tensor) in _PLAIN and tensor.is_cpu for tensor in flat[1:]):
        return None, "weights or states that aren't tensors in memory"
    if x.dtype is not dtype:
        if x.is_floating_point() or x.is_complex():
            return None, f"{x.dtype} sequences for weights of {dtype}".replace("torch.", "")
        x = x.to(dtype)
    if x.shape[1] < _least_steps(layer, cells, weights, mask, needs_grad(x, *flat[1:])):
        return None, "too few steps for a gain"
    counts = [len(own.KINDS[type(cell)].state._fields) for cell in cells]
    sizes = [cell.units for cell, count in zip(cells, counts, strict=True) for _ in range(count)]
    if starts and [(state.dtype, *state.shape) for state in starts] != [(dtype, x.shape[0], size) for size in sizes]:
        return None, "an initial state that isn't [B, H]"
    if layer.stateful:  # Keras overwrites the variables, whose old values the backward pass needs
        starts = [state.clone() for state in starts]
    reverse, sequences = bool(layer.go_backwards), bool(layer.return_sequences)
    used = None if mask is None else mask.to(torch.bool)
    queue, width, runs = iter(starts), x.shape[2], []
    for cell, group, count in zip(cells, weights, counts, strict=True):
        state = list(islice(queue, count))
        runs.append(CellRun(_cell_call(own.spec_of(cell, width)), group, state, _masks(cell, training)))
        width = cell.units
    results = forward.run_layers(runs, x, used, None, directions=(reverse,), sequences=sequences)
    y, last, ends = results.y if sequences else None, results.last, keras.tree.flatten(results.states)
    if used is not None:
        start = runs[-1].state[0] if starts else None
        y, last = _masked(y, last, start, used, reverse, bool(layer.zero_output_for_mask))
    if y is None:
        y = last.unsqueeze(1)
    elif reverse:
        y = y.flip(1)
    return (last, y, keras.tree.pack_sequence_as(initial_state, ends) if starts else ends), ""


# Numbers of steps from which our op is faster than Keras, depending on the size of the weights, which each call packs.
# Measured on one thread with AVX-512 for widths from 4 to 1024, batches from 1 to 256, 1 to 40 steps. Where Keras
# passes sequences to its backend, that computes one product of all steps with the kernel and a short loop; otherwise a
# step of Keras's loop costs many times more, most of all with gates.
_BY_BACKEND, _STEP_BY_STEP, _GATES_STEP_BY_STEP = (1.5, 2e5, 1.75, 4e5), (0.0, 6e5, 0.0, 2e5), (0.0, 4e6, 0.0, 1e6)


def _least_steps(
    layer: Any, cells: Sequence[Any], weights: Sequence[Sequence[Tensor]], mask: Tensor | None, trains: bool
) -> float:
    by_backend = (
        mask is None
        and isinstance(layer, (keras.layers.LSTM, keras.layers.GRU))
        and layer.use_cudnn in ("auto", True)
        and not layer.recurrent_dropout
        and getattr(cells[0], "reset_after", True)
    )
    count = sum(array.numel() for group in weights for array in group[:2])
    gated = all(own.KINDS[type(cell)].gated for cell in cells)
    measured = _BY_BACKEND if by_backend else _GATES_STEP_BY_STEP if gated else _STEP_BY_STEP
    base, each, base_trained, each_trained = measured
    return base_trained + min(count / each_trained, 8.0) if trains else base + count / each


def _masks(cell: Any, training: Any) -> Masks:
    """Return the dropout masks that Keras drew for this call of a cell."""
    if not training:
        return NO_MASKS
    return Masks(
        cell._dropout_mask if cell.dropout else None, cell._recurrent_dropout_mask if cell.recurrent_dropout else None
    )


def _masked(
    y: Tensor | None, last: Tensor, start: Tensor | None, used: Tensor, reverse: bool, zero: bool
) -> tuple[Tensor | None, Tensor]:
    """Change the outputs at masked steps to those of Keras.

    Before the first step that counts, Keras returns zeros, our op the initial h; with `zero`, all are zeros.
    """
    at_end = used[:, 0 if reverse else -1]
    if zero:
        shown, last_shown = used, at_end
    else:
        at_start = used[:, -1 if reverse else 0]
        if start is None or bool(at_start.all()) or not (start.requires_grad or bool(start.any())):
            return y, last
        begun = used.flip(1).cummax(1).values.flip(1) if reverse else used.cummax(1).values
        shown, last_shown = begun, used.any(1)
    last = torch.where(last_shown.unsqueeze(1), last, 0.0)
    return None if y is None else torch.where(shown.unsqueeze(2), y, 0.0), last


def run_layer(
    spec: CellSpec,
    x: Tensor,
    states: Sequence[Tensor] | None,
    arrays: Sequence[Tensor],
    masks: Sequence[Any],
    mask: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    traced: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Run one of our cells over `x [B, T, I]`: with the op, or with the torch loop if the kernel doesn't support it.

    Returns:
        y `[B, T, P]` in the order processed, the last output, the states, and the trace's arrays if `traced`.
    """
    x = x.to(arrays[0].dtype)
    states = [] if states is None else states
    drawn = Masks(*masks) if masks else NO_MASKS
    fused = x.device.type in ("cpu", "meta") and x.dtype in op.ELEMENTS and not op.transformed()
    functions = [eager.function_of(activation) for activation in spec.activations]
    cell = CellRun(_cell_call(spec), arrays, states, drawn, "fused" if fused else "loop", False, functions)
    used, begins = (None if flags is None else flags.to(torch.bool) for flags in (mask, reset))
    y, last, ends, traces = forward.run_layers([cell], x, used, begins, directions=(reverse,), traced=traced)
    every = list(traces[0]) if traced else []
    if reverse:
        y, every = y.flip(1), [part.flip(1) for part in every]
    return y, last, list(ends[0]), every
