"""Any module of PyTorch as a network, for inference: read as it is or by way of ONNX, and held against the module."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from cellstack.formats import load
from cellstack.formats.pytorch import from_torch
from cellstack.network import Network
from cellstack.spec import FormatError

NESTED = (  # a state among the inputs: the commonest example that can't be taken
    ": leave a state (h, c) out where the module can do without, for a Network keeps its own; "
    "a module that steps a cell says what it is made of with to_nodes()"
)
TOLERANCE = 1e-4  # greatest relative difference that passes: float32 on both sides, sums in other orders


def compile(module: Any, example: Any, tolerance: float = TOLERANCE) -> Network:
    """Return a module of PyTorch as a Network, which runs without PyTorch, streams, and is saved in any format.

    The module is read as `from_torch` reads it; where that can't be, it is exported to ONNX, and the graph is read.
    Either way the network has to answer as the module does: for the example, for other numbers of its shape, and with
    a row more and with more steps, where both take them. The module is taken as in evaluation, and in float32
    where it has half precision; it is left as it was.

    Args:
        module: the module; one that was accelerated, too.
        example: an input as the module takes it, such as `[B, T, I]`; one tuple of several. States that the module can
            do without are left out: a Network starts from zeros, and takes others in `run`.
        tolerance: the greatest relative difference of an output that passes.

    Returns:
        The network, with inputs and outputs in the order of the module's. Last states that the module returns beside
        them are those that `Network.run` returns.

    Raises:
        TypeError: it is no module, the example is no tensor, or the tolerance no number.
        ValueError: the example is empty, by which nothing could be compared.
        FormatError: neither way leads to a network that answers as the module does; says why, for each.
        ModuleNotFoundError: the export needs onnx or onnxscript, which aren't installed.

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
    if not inputs or not all(isinstance(value, torch.Tensor) for value in inputs):
        got = f"a tuple of {', '.join(type(v).__name__ for v in example)}" if isinstance(example, tuple) else None
        raise TypeError(
            "compile: expected example to be a tensor, or a tuple of tensors, as the module takes them, "
            f"got {got or type(example).__name__}"
            + (NESTED if any(isinstance(v, (tuple, list)) for v in inputs) else "")
        )
    if not all(value.numel() for value in inputs):
        shapes = " and ".join(str(list(value.shape)) for value in inputs)
        raise ValueError(f"compile: expected an example with a row and a step at least, got {shapes}")
    try:
        still = copy.deepcopy(module).eval()
    except Exception as error:  # a module may hold anything
        raise FormatError(f"compile: {type(module).__name__} can't be copied: {error}") from error
    if any(weight.dtype in (torch.float16, torch.bfloat16) for weight in still.parameters()):
        still = still.float()
        inputs = tuple(value.float() if value.is_floating_point() else value for value in inputs)
    packed = _runs_packed(still, inputs)  # what the module itself refuses, it refuses in its own words
    reasons = []
    for how, read in (("read as it is", from_torch), ("by way of ONNX", lambda m: _by_onnx(m, inputs))):
        try:
            network = read(still)
        except (TypeError, ValueError, FormatError) as error:
            reasons.append(f"{how}: {error}")
            continue
        why = _difference(network, still, inputs, tolerance)
        if why is None:
            return network
        reasons.append(f"{how}: {why}")
    if any(getattr(part, "batch_first", True) is False for part in still.modules()):
        reasons.append(
            "it has layers with batch_first=False, and a Network takes batch before time: set batch_first=True, "
            "which changes no weight, and give an example that is so"
        )
    if packed:
        reasons.append(
            "it packs its rows: give a module that runs over them as they are padded, without lengths; "
            "net(x, mask=...) then leaves the padding out, as packing does"
        )
    raise FormatError(f"compile: {type(module).__name__} can't be a Network: " + "; ".join(reasons))


def _runs_packed(module: Any, inputs: tuple[Any, ...]) -> bool:
    """Run a module, and return whether one of its recurrent layers is given packed rows."""
    import torch

    packed = []

    def look(_: Any, given: tuple[Any, ...]) -> None:
        packed.extend(value for value in given if isinstance(value, torch.nn.utils.rnn.PackedSequence))

    parts = [part for part in module.modules() if isinstance(part, torch.nn.RNNBase)]
    hooks = [part.register_forward_pre_hook(look) for part in parts]
    try:
        with torch.no_grad():
            module(*_fresh(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return bool(packed)


def _fresh(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return inputs that a module may write to."""
    return tuple(value.detach().clone() for value in inputs)


def _by_onnx(module: Any, inputs: tuple[Any, ...]) -> Network:
    """Return the network that a module's ONNX graph holds, of any batch size and number of steps where it allows it."""
    import torch

    names = [f"input_{n}" for n in range(len(inputs))] if len(inputs) > 1 else ["input"]
    axes = {name: {0: f"{name}_0", 1: f"{name}_1"} for name, value in zip(names, inputs, strict=True) if value.ndim > 2}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, on its own ways
        path = os.path.join(folder, "module.onnx")
        try:
            torch.onnx.export(module, _fresh(inputs), path, input_names=names, dynamic_axes=axes, dynamo=False)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # the exporter fails in as many ways as there are modules
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FormatError(f"PyTorch can't export it: {first}") from error
        try:
            return load(path)
        except FormatError as error:
            raise FormatError(str(error).replace(path, "its graph")) from error


def _difference(network: Network, module: Any, inputs: tuple[Any, ...], tolerance: float) -> str | None:
    """Return in what the network's outputs differ from the module's; None where they don't."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def drawn(given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            torch.randn(t.shape, generator=generator, dtype=t.dtype) if t.is_floating_point() else t for t in given
        )

    for what, given in (("", inputs), ("", drawn(inputs)), *((s, drawn(more)) for s, more in _longer(inputs))):
        try:
            with torch.no_grad():
                expected = _tensors(module(*_fresh(given)))
        except Exception:
            if given is inputs:
                raise
            continue  # the module is one for such numbers, or for this shape, alone
        arrays = [_array(value) for value in given]
        try:
            ours, states = network.run(tuple(arrays) if len(arrays) > 1 else arrays[0])
        except (TypeError, ValueError) as error:
            if not what:
                return f"the network refuses the example: {error}"
            continue  # it says so to whoever asks for that shape
        why = _unlike(ours if isinstance(ours, tuple) else (ours,), states, expected, tolerance)
        if why is not None:
            return f"{what}{why}"
    return None


def _longer(inputs: tuple[Any, ...]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield the inputs with a row more, and with more steps, with how a reason begins that comes of these."""
    for axis, more, what in ((0, 1, "with a row more "), (1, 4, "with more steps ")):
        if all(value.ndim > axis for value in inputs):
            sizes = [range(value.shape[axis] + more) for value in inputs]
            yield (
                what,
                tuple(
                    v[(slice(None),) * axis + ([n % v.shape[axis] for n in size],)]
                    for v, size in zip(inputs, sizes, strict=True)
                ),
            )


def _unlike(ours: tuple[Any, ...], states: tuple[Any, ...], expected: list[Any], tolerance: float) -> str | None:
    """Return what of a module's outputs isn't what the network gives; None: it gives all, and no more.

    Those that aren't its outputs, in order, have to be among its last states, `[B, H]` or one upon the other.
    """
    import torch

    parts = [part for state in states for part in state]
    left = list(ours)
    for n, wanted in enumerate(expected):
        if wanted is None:
            continue
        if not isinstance(wanted, torch.Tensor):
            return f"output {n} of the module is a {type(wanted).__name__}, and no tensor"
        theirs = _array(wanted)
        if left and _same(left[0], theirs, tolerance):
            left.pop(0)
            continue
        rows = list(theirs) if theirs.ndim == 3 else [theirs]
        if not all(any(_same(part, row, tolerance) for part in parts) for row in rows):
            if not left:
                return f"output {n} of the module, {list(theirs.shape)}, is none of the network's"
            if left[0].shape != theirs.shape:
                return f"output {n} has the shape {left[0].shape}, the module's {theirs.shape}"
            return f"output {n} lies {_off(left[0], theirs):.1e} off the module's, more than {tolerance:.0e}"
    return f"the network has {len(left)} outputs more than the module" if left else None


def _array(value: Any) -> Any:
    """Return a tensor as NumPy has it, which knows no bfloat16."""
    import torch

    value = value.detach().cpu()
    return np.asarray(value.float() if value.dtype is torch.bfloat16 else value)


def _same(ours: Any, theirs: Any, tolerance: float) -> bool:
    return ours.shape == theirs.shape and _off(ours, theirs) <= tolerance


def _off(ours: Any, theirs: Any) -> float:
    """Return the greatest difference of two arrays of one shape over the greatest number of `theirs`."""
    return float(np.abs(ours - theirs).max(initial=0.0) / max(np.abs(theirs).max(initial=0.0), 1e-30))


def _tensors(value: Any) -> list[Any]:
    """Return the tensors in what a module returns, one after the other."""
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in _tensors(part)] if isinstance(value, (tuple, list)) else [value]
