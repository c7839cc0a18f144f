"""Compares a module with the kernel on random inputs: outputs, states and gradients. Finds side effects of a call."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from cellstack.capture.probes import value_reads
from cellstack.capture.recognition.calls import ModuleCall, call_of, outputs_of
from cellstack.capture.recognition.values import TOLERANCE, NotReplaced, difference, flat, mapped, same
from cellstack.layers.handwritten import Known, Protocol, result_of

SCALES = (0.1, 1.0, 4.0)  # of inputs, in the comparison
SIZES = ((1, 1), (2, 3), (5, 7))  # rows and steps, at each scale
LARGEST, GROWTH = (17, 33), 1000.0  # rows and steps at scale 1 only; factor of the tolerance, as rounding errors grow


def verify(module: nn.Module, known: Known, calls: Mapping[Any, ModuleCall]) -> None:
    """Compare a module with the kernel on random inputs of several scales and sizes.

    Raises:
        NotReplaced: they differ.
    """
    random = torch.Generator().manual_seed(4)
    for form, protocol in known.protocols.items():

        def run(*args: Any, protocol: Protocol = protocol) -> Any:
            ran = outputs_of(known, protocol, module, flat(args))
            assert ran is not None
            return result_of(protocol, *ran, False)

        for scale, sizes in (*product(SCALES, SIZES), (1.0, LARGEST)):
            args = _resized(calls[form], protocol, *sizes, scale, random)
            if call_of(module, args) is not None:  # the module accepts these sizes
                compare(module, module, run, args, known.text(), GROWTH if sizes == LARGEST else 1.0)


def compare(module: nn.Module, theirs: Any, ours: Any, args: tuple[Any, ...], text: str, growth: float = 1.0) -> None:
    """Compare two functions: their results, and the gradients of the arguments and of a module's parameters.

    Args:
        module: the module with the parameters.
        theirs: the module, or a function like it.
        ours: a function that runs its cells on the kernel.
        args: the arguments.
        text: the cells, for the message.
        growth: a factor of the tolerance.

    Raises:
        NotReplaced: they differ.
    """
    try:
        wanted = _with_gradients(module, theirs, _leaves(args))
    except Exception as error:
        raise NotReplaced(f"its forward fails for random inputs: {error}") from error
    found = _with_gradients(module, ours, _leaves(args))
    for what, place in (("outputs", 0), ("gradients", 1)):
        pairs = [*zip(found[place], wanted[place], strict=True)]
        worst = max(difference(a, b) if a.shape == b.shape else float("inf") for a, b in pairs)
        if worst > growth * TOLERANCE:
            raise NotReplaced(f"it looks like {text}, but its {what} differ by {worst:.1e}", differs=True)


def _with_gradients(module: nn.Module, function: Any, args: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the results of a function, and the gradients of its arguments and of a module's parameters."""
    state = torch.get_rng_state()
    result = flat(function(*args))
    torch.set_rng_state(state)
    wanted = [value for value in (*flat(args), *module.parameters()) if value.requires_grad]
    sums = [(value * torch.sin(torch.arange(value.numel()).view(value.shape))).sum() for value in result]
    found = torch.autograd.grad(torch.stack(sums).sum(), wanted, allow_unused=True)
    return result, [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]


def _resized(
    call: ModuleCall, protocol: Protocol, rows: int, steps: int, scale: float, random: torch.Generator
) -> tuple[Any, ...]:
    """Return the arguments of a call with other numbers of rows and steps, and random values."""
    first = True

    def random_like(tensor: Tensor) -> Tensor:
        nonlocal first
        shape = list(tensor.shape)
        if first and protocol.time >= 0:
            shape[protocol.time], shape[1 - protocol.time] = steps, rows
        else:
            shape[-2] = rows
        first = False
        return scale * torch.randn(shape, generator=random)

    return mapped(random_like, call.args)


def _leaves(value: Any) -> Any:
    if isinstance(value, PackedSequence):
        return value._replace(data=_leaves(value.data))
    return mapped(lambda tensor: tensor.clone().requires_grad_(), value)


def is_steady(module: nn.Module, calls: Mapping[Any, ModuleCall], protocols: Mapping[Any, Protocol]) -> bool:
    """Whether a module computes the same in training as in evaluation, without side effects."""
    call = next(calls[form] for form in protocols)
    with torch.no_grad():
        steady = flat(module(*call.args))
        try:
            results = [flat(module.train()(*call.args)) for _ in range(2)]
            effect = effect_of(module, call.args)
        finally:
            module.eval()
    return not effect and all(same(a, b) for result in results for a, b in zip(result, steady, strict=True))


_COMPARED = (bool, int, float, str, type(None), torch.device, torch.dtype)


def effect_of(module: nn.Module, args: tuple[Any, ...]) -> str:
    """Return what a call does that the kernel wouldn't do, in words; "" if nothing.

    This is writing to an argument, a buffer or an attribute, drawing random numbers, or branching on values.
    """
    given = _leaves(args)
    before, random = _kept(module), torch.get_rng_state()
    with torch.no_grad(), value_reads() as reads:
        module(*given)
    after = _kept(module)
    drawn = not torch.equal(random, torch.get_rng_state())
    torch.set_rng_state(random)
    if any(tensor._version for tensor in flat(given)):
        return "it writes to its arguments"
    for name in {**before, **after}:
        if name not in before or name not in after or not _unchanged(before[name], after[name]):
            return f"it changes {name} in each call"
    if drawn:
        return "it draws random numbers"
    return "it branches on values" if reads.found else ""


def _kept(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return the attributes and buffers of a module and those within it, by name, to find out whether they change.

    Each is a pair of the value and a number that changes if it is written in place: a tensor's version, or a length.
    """
    found = {}
    for path, part in module.named_modules():
        for name, value in (*vars(part).items(), *part._buffers.items()):
            if name not in ("_parameters", "_buffers", "_modules"):
                version = value._version if isinstance(value, Tensor) else None
                sized = isinstance(value, (list, dict, set))
                found[f"{path}.{name}" if path else name] = value, len(value) if sized else version
    return found


def _unchanged(before: tuple[Any, Any], after: tuple[Any, Any]) -> bool:
    one, other = before[0], after[0]
    return before[1] == after[1] and (one is other or (isinstance(one, _COMPARED) and one == other))
