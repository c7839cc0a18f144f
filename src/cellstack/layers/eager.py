"""The equations as a torch loop, which is differentiable any number of times; it runs what the kernel doesn't support.

Also the activations by Keras's names, and the LSTMs of cuDNN and torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cellstack.cells import activations
from cellstack.cells.spec import CellSpec, Spec
from cellstack.views.torch import TorchOps, clipped

Function = Callable[[Tensor], Tensor]


# ── Activations ───────────────────────────────────────────────────────────────────────────────────────────────────────


def linear(z: Tensor) -> Tensor:
    """Return `z`."""
    return z


def hard_sigmoid(z: Tensor, alpha: float, beta: float) -> Tensor:
    """Return `alpha·z + beta`, clipped to 0 and 1."""
    return clipped(alpha * z + beta, 0.0, 1.0)


def affine(z: Tensor, alpha: float, beta: float) -> Tensor:
    """Return `alpha·z + beta`."""
    return alpha * z + beta


def thresholded_relu(z: Tensor, alpha: float) -> Tensor:
    """Return `z` where it is above alpha, else 0."""
    return torch.where(z <= alpha, 0.0, z)  # a NaN stays one


def positive(z: Tensor) -> Tensor:
    """Return `z + 1/2` where `z` isn't negative, else its sigmoid."""
    return torch.where(z >= 0.0, z + 0.5, torch.sigmoid(z))


def scaled_tanh(z: Tensor, alpha: float, beta: float) -> Tensor:
    """Return `alpha·tanh(beta·z)`."""
    return alpha * torch.tanh(beta * z)


def softmax(z: Tensor) -> Tensor:
    """Return the softmax over the last axis."""
    return functional.softmax(z, dim=-1)


def log_softmax(z: Tensor) -> Tensor:
    """Return the logarithm of the softmax over the last axis."""
    return functional.log_softmax(z, dim=-1)


@lru_cache(maxsize=256)
def function_of(activation: activations.Activation) -> Function:
    """Return one of the kernel's activations as a torch function: the same callable each time.

    >>> function_of(activations.activation("leaky_relu(0.5)"))(torch.tensor([-2.0, 3.0]))
    tensor([-1.,  3.])
    """
    name, alpha, beta = activation
    return {
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "linear": linear,
        "relu": torch.relu,
        "hard_sigmoid": partial(hard_sigmoid, alpha=alpha, beta=beta),
        "softsign": functional.softsign,
        "softplus": functional.softplus,
        "elu": partial(functional.elu, alpha=alpha),
        "affine": partial(affine, alpha=alpha, beta=beta),
        "leaky_relu": partial(functional.leaky_relu, negative_slope=alpha),
        "thresholded_relu": partial(thresholded_relu, alpha=alpha),
        "positive": positive,
        "scaled_tanh": partial(scaled_tanh, alpha=alpha, beta=beta),
        "silu": functional.silu,
        "gelu": functional.gelu,
    }[name]


ACTIVATIONS: dict[str, Function] = {
    **{name: function_of(activations.activation(name, activations.OF_BACKBONES)) for name in activations.OF_BACKBONES},
    "celu": functional.celu,
    "exponential": torch.exp,
    "hard_silu": functional.hardswish,
    "hard_swish": functional.hardswish,
    "hard_tanh": functional.hardtanh,
    "log_sigmoid": functional.logsigmoid,
    "log_softmax": log_softmax,
    "mish": functional.mish,
    "relu6": functional.relu6,
    "selu": functional.selu,
    "softmax": softmax,
    "swish": functional.silu,
    "tanh_shrink": functional.tanhshrink,
}
"""Activations by Keras's names; the kernel implements those of `cellstack.cells.activations.ACTIVATIONS`."""

_NAMES: dict[object, str] = {function: name for name, function in reversed(ACTIVATIONS.items())}
_NAMES |= {functional.tanh: "tanh", functional.sigmoid: "sigmoid", functional.relu: "relu", functional.elu: "elu"}


def known(name: str | None, argument: str = "") -> bool:
    """Whether the kernel implements an activation, as returned by `activation_name`, of that argument."""
    return name is not None and name.partition("(")[0] in activations.names_for(argument)


def activation_name(chosen: str | Function | None) -> str | None:
    """Return the name of an activation, with its parameters; None for a callable that has none.

    Raises:
        ValueError: a name that is not in `ACTIVATIONS`, or invalid parameters.
        TypeError: neither a name nor a callable.

    >>> activation_name("leaky_relu( 0.20 )"), activation_name(torch.tanh), activation_name(None)
    ('leaky_relu', 'tanh', 'linear')
    """
    if chosen is None:
        return "linear"
    if isinstance(chosen, str):
        if known(chosen.strip()):
            return str(activations.activation(chosen))
        if chosen not in ACTIVATIONS:
            raise ValueError(f"expected one of {', '.join(ACTIVATIONS)} or a callable, got {chosen!r}")
        return chosen
    if not callable(chosen):
        raise TypeError(f"expected an activation's name or a callable, got {type(chosen).__name__}")
    return _NAMES.get(chosen)


def as_function(chosen: str | Function | None) -> Function:
    """Return the function of an activation in any form that `activation_name` takes."""
    name = activation_name(chosen)
    if name is None:
        return chosen  # type: ignore[return-value]
    return function_of(activations.activation(name)) if known(name) else ACTIVATIONS[name]


# ── The loop ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_eagerly(
    x: Tensor,
    starts: Sequence[Tensor],
    weights: Sequence[Tensor],
    dropped: Sequence[Tensor],
    mask: Tensor | None,
    reset: Tensor | None,
    specs: Sequence[Spec],
    functions: Sequence[Sequence[Function]],
    reverse: bool,
    sequences: bool,
    save: bool,
    steps: list[list[Tensor]] | None = None,
) -> list[Tensor]:
    """Run a stack of cells as a torch loop; arguments and results are those of `cellstack::recurrent` (see `op`).

    The differences: `specs` has descriptions instead of their texts; `functions` has each layer's activations, one per
    entry of `spec.slots`, which replace those of the description; and the intermediate values are empty tensors. If
    `steps` is given, each step appends the state that the equations give before zoneout and mask, with its graph.
    """
    finals, ys, gates, cells = [], [], [], []
    left, begin, drawn = iter(weights), iter(starts), iter(dropped)
    for n, spec in enumerate(specs):
        arrays = dict(zip(spec.shapes, islice(left, len(spec.shapes)), strict=True))
        states = list(islice(begin, len(spec.state_shapes))) if starts else _initial(spec, arrays, x)
        masks = {name: mask for name, mask in zip(spec.of_kind.masks, drawn, strict=False) if mask.numel()}
        rest = mask, reset, spec, functions[n], reverse, save, steps
        ends, x, planes, inner = _layer(x, states, arrays, masks, *rest)
        finals += ends
        ys.append(x)
        gates.append(planes)
        cells += inner
    if save:
        return [*finals, *ys, *gates, *cells, *(x.new_zeros(0) for _ in specs)]
    return [*finals, *(ys[-1:] if sequences else ())]


def _initial(spec: Spec, arrays: Mapping[str, Tensor], x: Tensor) -> list[Tensor]:
    """Return the initial state for calls without one."""
    return [
        arrays[f"initial_{name}"].expand(x.shape[0], *shape)
        if spec.learn_initial_state
        else x.new_zeros(x.shape[0], *shape)
        for name, shape in spec.state_shapes.items()
    ]


def _wide(flags: Tensor, like: Tensor) -> Tensor:
    """Return flags `[B]` with the axes of a tensor `[B, …]`."""
    return flags.view(-1, *(1,) * (like.ndim - 1))


def _layer(
    x: Tensor,
    states: list[Tensor],
    arrays: Mapping[str, Tensor],
    dropped: Mapping[str, Tensor],
    mask: Tensor | None,
    reset: Tensor | None,
    spec: Any,
    functions: Sequence[Function],
    reverse: bool,
    save: bool,
    every: list[list[Tensor]] | None,
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
    """Return the final states, y `[B, T, P]`, and with `save` gates `[B, T, planes, H]` and the states other than h."""
    steps = x.shape[1]
    kind = spec.of_kind
    fresh = None if reset is None else _initial(spec, arrays, x)
    ops = TorchOps(spec, arrays, functions, dropped.get("recurrent_dropout"))
    rates = enumerate(spec.zoneout_rates.items())
    zoneouts = [(k, rate, dropped.get(kind.zoneout.get(name, ""))) for k, (name, rate) in rates]
    # Masked steps must not take part in the backward pass, not even with a gradient of zero: 0·NaN is NaN.
    a = kind.prepared(ops, spec, x if mask is None else torch.where(mask[:, :, None], x, 0.0))  # [B, T, G·H] …
    gates = [x.new_zeros(0)] * steps
    shapes = [(spec.output_size,), *[*spec.state_shapes.values()][kind.carries_h :]] if save else [(spec.output_size,)]
    seen: list[list[Tensor]] = [[x.new_zeros(0)] * steps for _ in shapes]  # h, and each other state, at every step
    states = [state.clone() for state in states]  # with no step the results must not be the arguments themselves
    for t in reversed(range(steps)) if reverse else range(steps):
        if reset is not None and fresh is not None:
            states = [
                torch.where(_wide(reset[:, t], new), new, state) for new, state in zip(fresh, states, strict=True)
            ]
        used = None if mask is None else mask[:, t]
        old = states if used is None else [torch.where(_wide(used, state), state, 0.0) for state in states]
        now = tuple(part[:, t] for part in a) if isinstance(a, tuple) else a[:, t]
        gate, values = kind.step(ops, spec, now, *old)
        apart, new = values[: len(values) - len(states)], list(values[-len(states) :])  # h, where it isn't a state
        if every is not None:
            every.append(list(new))
        for k, rate, keeps in zoneouts:
            if keeps is not None or rate:
                keep = rate if keeps is None else keeps[:, t]
                new[k] = keep * old[k] + (1.0 - keep) * new[k]
        if used is not None:
            apart = [torch.where(_wide(used, value), value, 0.0) for value in apart]
            new = [torch.where(_wide(used, now), now, old) for now, old in zip(new, states, strict=True)]
        states = new
        for every_step, value in zip(seen, [*apart, *states], strict=False):
            every_step[t] = value
        if save:
            # The planes after the gates are used only by the kernel's backward pass, and need no gradient.
            stacked = torch.stack([*gate[: len(kind.gates)], *(v.detach() for v in gate[len(kind.gates) :])], dim=1)
            gates[t] = stacked if used is None else torch.where(_wide(used, stacked), stacked, 0.0)
    y, *inner = (_joined(parts, x, *shape) for parts, shape in zip(seen, shapes, strict=True))
    states = [state.view_as(state) for state in states]  # so that h and the last y get separate gradients
    planes = _joined(gates, x, spec.planes, spec.units) if save else x.new_zeros(0)
    return states, y, planes, inner


def _joined(parts: list[Tensor], x: Tensor, *sizes: int) -> Tensor:
    """Stack the tensors of the steps to `[B, T, *sizes]`."""
    return torch.stack(parts, dim=1) if parts else x.new_zeros(x.shape[0], 0, *sizes)


# ── cuDNN ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def cudnn_lstm(
    x: Tensor, starts: Sequence[Tensor], weights: Sequence[Tensor], reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one plain LSTM layer (`CellSpec.plain`, no mask) with cuDNN, through torch.

    Returns:
        `h [B, H]`, `c [B, H]`, `y [B, T, H]`; `y[:, t]` belongs to `x[:, t]` in both directions.
    """
    kernel, recurrent_kernel, *biases = weights
    batch, units = x.shape[0], recurrent_kernel.shape[0]
    bias = biases[0] if biases else kernel.new_zeros(4 * units)
    # cuDNN requires the matrices, then the biases, in one block of memory: views of a block avoid another copy.
    parts = [kernel.t(), recurrent_kernel.t(), bias, torch.zeros_like(bias)]
    block = torch.cat([part.reshape(-1) for part in parts])
    flat = [v.view(p.shape) for v, p in zip(block.split([p.numel() for p in parts]), parts, strict=True)]
    begin = [start.unsqueeze(0).contiguous() for start in starts] or [x.new_zeros(1, batch, units)] * 2
    x = x.flip(1) if reverse else x.contiguous()
    y, h, c = torch._VF.lstm(x, begin, flat, True, 1, 0.0, torch.is_grad_enabled(), False, True)  # type: ignore[attr-defined]
    return h.squeeze(0), c.squeeze(0), y.flip(1) if reverse else y


def by_torch(
    spec: CellSpec, x: Tensor, starts: Sequence[Tensor], weights: Sequence[Tensor], reverse: bool
) -> tuple[Tensor, ...]:
    """Run one layer that torch supports (`torch_kind`, no mask) with torch's operator, which every exporter supports.

    Returns:
        The final states, h `[B, H]` and an LSTM's c `[B, H]`, then `y [B, T, H]`, as in `cudnn_lstm`.
    """
    kernel, recurrent_kernel, *biases = weights
    units, kind = spec.units, torch_kind(spec)
    biases = list(biases[0].unbind(0)) if biases and biases[0].ndim == 2 else [*biases, *map(torch.zeros_like, biases)]
    flat = [kernel.t(), recurrent_kernel.t(), *biases]
    order = spec.of_kind.names["torch"].order
    if tuple(order) != spec.gates:
        places = [spec.gates.index(gate) for gate in order]
        flat = [torch.cat([part.chunk(len(places))[place] for place in places]) for part in flat]
    begin = [start.unsqueeze(0) for start in starts] or [x.new_zeros(1, x.shape[0], units) for _ in spec.state_sizes]
    x = x.flip(1) if reverse else x
    options = bool(biases), 1, 0.0, False, False, True
    run = getattr(torch._VF, kind)  # type: ignore[attr-defined]
    y, *ends = run(x, begin if len(begin) > 1 else begin[0], flat, *options)
    return *(end.squeeze(0) for end in ends), y.flip(1) if reverse else y


def torch_kind(spec: CellSpec) -> str:
    """Return the name of torch's operator for a cell; "" if torch has none."""
    plain = CellSpec(spec.input_size, spec.units, use_bias=spec.use_bias, kind=spec.kind)
    name = getattr(spec.of_kind.names.get("torch"), "name", "").lower()
    if len(spec.gates) > 1 or not name:
        return name if spec == plain else ""
    same = spec == replace(plain, activation=spec.activation)
    return f"{name}_{spec.activation}" if same and spec.activation in ("tanh", "relu") else ""
