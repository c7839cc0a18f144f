"""Converts a PyTorch module to a network for inference, directly or by exporting it to ONNX, and compares the two."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from cellstack.formats.compiled.equality import MUCH_LONGER, difference
from cellstack.formats.compiled.exported import remedy, shortened
from cellstack.formats.compiled.nested import like, tensors_in
from cellstack.formats.compiled.probes import (
    calls_cells_repeatedly,
    compared_sizes,
    first_call,
    plain,
    reads_values,
    time_first,
)
from cellstack.formats.compiled.routes import by_onnx, directly
from cellstack.network import Network
from cellstack.spec import FormatError

TOLERANCE = 1e-4  # of the relative difference: float32 on both sides, with sums in different orders
SCALES = (1.0, 0.01, 10.0)  # of the random inputs for the comparison
MORE_SCALES = (*SCALES, -1e-3, 0.1, 0.3, -1.0, 3.0, 30.0, -100.0, 1e3)  # if a module's code depends on values
BATCH_FIRST = (
    "it has layers with batch_first=False, but a Network takes batch before time: set batch_first=True, with the same "
    "weights, and pass an example [B, T, I]"
)
TIME_FIRST = (
    "it takes time before batch, but a Network takes batch before time: compile a wrapper whose forward calls it with "
    "x.transpose(0, 1) and transposes the sequences that it returns, and pass an example [B, T, I]"
)


def compile(module: Any, example: Any, tolerance: float = TOLERANCE) -> Network:
    """Convert a PyTorch module to a Network, which runs without PyTorch, streams, and can be saved in any format.

    The module is read by `from_torch` or, if that isn't possible, exported to ONNX. The outputs of the network are then
    compared with those of the module: for the example, for other values of the same shape, and for other sizes that
    both accept: one row, more rows, one step, one step fewer, and up to 250 more steps. The comparison uses a copy of
    the module in evaluation mode, converted to float32 if it has weights in float16 or bfloat16.

    Args:
        module: the module; it may be accelerated.
        example: an input of the module, such as `[B, T, I]`; several as one tuple, which may hold tuples, as in
            `(x, (h, c))`. The initial state of a recurrent layer becomes the argument `state` of the network's `run`.
        tolerance: the greatest relative difference of an output that is accepted.

    Returns:
        The network, with inputs and outputs in the module's order. Final states that the module returns are among those
        that `Network.run` returns; a state is an output `[B, H]` if the module uses nothing else of its layer. A module
        that computes one step of a cell, as in `model(x, h, c)` with `x [B, I]`, becomes a network over sequences.

    If the module's code reads values of tensors, as in `if x.sum() > 0`, or compares sizes of its input, as in
    `if x.shape[1] > 4`, and the outputs agree nonetheless, a warning lists the lines. Uses of `len` and of step
    numbers, as in `if t == 300`, are only found if the outputs differ for one of the sizes above.

    Raises:
        TypeError: `module` isn't a module, the example isn't a tensor, or the tolerance isn't a number.
        ValueError: the example is empty, the module itself rejects it, or returns NaN for it.
        FormatError: neither way leads to a network with the module's outputs; the message gives the reason for each.
        ModuleNotFoundError: the export needs onnx or onnxscript, which aren't installed.

    >>> import numpy as np
    >>> import torch
    >>> module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh())
    >>> compile(module, torch.zeros(2, 5, 3)).run(np.ones((1, 6, 3), np.float32))[0].shape
    (1, 6, 4)
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"compile: expected a module of PyTorch, got {type(module).__name__}")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(
            f"compile: expected tolerance to be a number, got {type(tolerance).__name__}: "
            "several inputs go into example as one tuple"
        )
    inputs = example if isinstance(example, tuple) else (example,)
    if _holds_a_dict(inputs):
        raise TypeError(
            "compile: expected example to be a tensor, or a tuple of tensors, got a dict: pass a module whose forward "
            "takes the tensors as arguments and builds the dict"
        )
    flat = tensors_in(inputs)
    if not flat or not all(isinstance(value, torch.Tensor) for value in flat):
        got = f"a tuple of {', '.join(type(v).__name__ for v in flat)}" if isinstance(example, tuple) else None
        raise TypeError(
            "compile: expected example to be a tensor, or a tuple of tensors, as the module takes them, "
            f"got {got or type(example).__name__}"
        )
    if not all(value.numel() for value in flat):
        shapes = " and ".join(str(list(value.shape)) for value in flat)
        raise ValueError(f"compile: expected an example with at least one row and one step, got {shapes}")
    try:
        still = copy.deepcopy(module).eval()
    except Exception as error:  # a module may hold anything
        raise FormatError(f"compile: {type(module).__name__} can't be copied: {error}") from error
    if any(weight.dtype in (torch.float16, torch.bfloat16) for weight in still.parameters()):
        still = still.float()
        inputs = like(inputs, (value.float() if value.is_floating_point() else value for value in flat))
    if any(part.is_meta for part in (*flat, *still.parameters(), *still.buffers())):
        raise FormatError(
            f"compile: {type(module).__name__} is on the device 'meta', which stores no values: load its weights, by "
            "module.to_empty(device='cpu') and module.load_state_dict(...), and pass an example on the CPU"
        )
    packs, answers, again = first_call(still, inputs)
    if any(isinstance(a, torch.Tensor) and a.is_floating_point() and bool(a.isnan().any()) for a in answers):
        raise ValueError(
            f"compile: {type(module).__name__} itself returns NaN for the example, so there is nothing to compare "
            "with: check its weights, and give an example for which it returns numbers"
        )
    reasons = []
    if not again:
        reasons.append(
            "a second call with the same input gives another output: it draws random numbers, or keeps a state between "
            "calls; let forward take and return the state, and draw no numbers"
        )
    if packs:
        reasons.append(
            "it packs sequences, which can't be exported: pass a module that takes padded sequences, without lengths; "
            "net(x, mask=...) then ignores the padding, as packing does"
        )
    elif time_first(still, inputs):
        reasons.append(BATCH_FIRST if plain(still) else TIME_FIRST)
    tried: list[str] = []
    looks: list[str] = []
    places: list[str] = []
    for how, read in (("read directly", directly), ("exported to ONNX", by_onnx)):
        if read is by_onnx and packs:
            continue
        try:
            network = read(still, inputs, answers, looks)
            why = difference(network, still, inputs, tolerance, MORE_SCALES if looks else SCALES)
            if why is None and again:
                if looks and reads_values(still, inputs):
                    warnings.warn(
                        f"compile: {type(module).__name__} reads values of tensors ({_some(looks)}), and the "
                        "network does what it did for the example: the outputs for other values that were tried agree, "
                        "but not all values can be tried",
                        stacklevel=2,
                    )
                places = compared_sizes(network, still, inputs).compared if read is by_onnx else []
                if places:
                    warnings.warn(
                        f"compile: {type(module).__name__} compares sizes of its input ({_some(places)}), and "
                        "the network does what it did for the example's sizes: it agrees for the other sizes that "
                        "were tried, but may differ for sizes that weren't",
                        stacklevel=2,
                    )
                return network
            why = why or "its output equals that of the module's first call"
            loops = network.metadata.get("onnx", {}).get("unrolled", {})
            if loops and why.startswith("with more steps"):
                name, (count, what) = next(iter(loops.items()))
                reasons.append(
                    f"its loop over {name} {what}, which a Network only supports for a fixed number of steps, "
                    f"{count} here: fix the number in forward, or compile a module of one step and stream it"
                )
            other = "has the shape" in why or why.startswith(("with more steps", MUCH_LONGER))
            if other and not reasons and calls_cells_repeatedly(still, inputs):
                reasons.append(
                    "its loop skips steps, treats some of them differently, or doesn't join them by "
                    "torch.stack(ys, 1): a Network does the same at every step, and returns all steps"
                )
            measured: list[str] = []
            if read is by_onnx and why.startswith("with "):
                places, measured = compared_sizes(network, still, inputs)
                if places:
                    reasons.append(
                        f"it compares sizes of its input ({_some(places)}), but a graph only contains what it "
                        "did for the example's sizes: do the same for all sizes, or compile a module for each case",
                    )
            if measured and not reasons:
                reasons.append(
                    f"its outputs differ for other sizes, perhaps because of len(x) ({_some(measured)}): a graph only "
                    "contains what it did for the example's sizes"
                )
            turned = [axes for axes in network.metadata.get("onnx", {}).get("inputs", {}).values() if axes[:2] == "TB"]
            if turned and not reasons:
                reasons.append(TIME_FIRST)
        except (TypeError, ValueError, FormatError) as error:
            why = str(error)
        if read is by_onnx:
            if looks and not packs and (not places or reads_values(still, inputs)):
                reasons.append(
                    f"it reads values of tensors ({_some(looks)}), but a graph only contains what it did for the "
                    "example: write it without if, while, float() and numpy(), for instance by torch.where"
                )
            known = remedy(why)
            if known and not reasons:
                reasons.append(known)
            why = shortened(why) if reasons else why
        tried.insert(0, f"{how}: {why}")
    raise FormatError(f"compile: {type(module).__name__} can't be a Network: " + "; ".join(reasons + tried))


def _some(places: list[str]) -> str:
    return ", ".join(places[:3])


def _holds_a_dict(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, (tuple, list)) and any(map(_holds_a_dict, value)))
