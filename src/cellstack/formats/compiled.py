"""Any module of PyTorch as a network, for inference: read as it is or by way of ONNX, and held against the module."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from typing import Any

import numpy as np

from cellstack.formats import load
from cellstack.formats.pytorch import from_torch
from cellstack.network import Network
from cellstack.spec import FormatError

TOLERANCE = 1e-4  # greatest relative difference that passes: float32 on both sides, sums in other orders


def compile(module: Any, example: Any, tolerance: float = TOLERANCE) -> Network:
    """Return a module of PyTorch as a Network, which runs without PyTorch, streams, and is saved in any format.

    The module is read as `from_torch` reads it; where that can't be, it is exported to ONNX, and the graph is read.
    Either way the network has to answer as the module does, for the example and for other numbers of its shape. The
    module is taken as in evaluation, and is left as it was.

    Args:
        module: the module; one that was accelerated, too.
        example: an input as the module takes it, such as `[B, T, I]`; a tuple of several.
        tolerance: the greatest relative difference of an output that passes.

    Returns:
        The network, with inputs and outputs in the order of the module's.

    Raises:
        TypeError: it is no module, or the example is no tensor.
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
    inputs = example if isinstance(example, tuple) else (example,)
    if not inputs or not all(isinstance(value, torch.Tensor) for value in inputs):
        raise TypeError("compile: expected example to be a tensor, or a tuple of tensors, as the module takes them")
    still = copy.deepcopy(module).eval()
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
    raise FormatError(f"compile: {type(module).__name__} can't be a Network: " + "; ".join(reasons))


def _by_onnx(module: Any, inputs: tuple[Any, ...]) -> Network:
    """Return the network that a module's ONNX graph holds, of any batch size and number of steps where it allows it."""
    import torch

    names = [f"input_{n}" for n in range(len(inputs))] if len(inputs) > 1 else ["input"]
    axes = {name: {0: f"{name}_0", 1: f"{name}_1"} for name, value in zip(names, inputs, strict=True) if value.ndim > 2}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, on its own ways
        path = os.path.join(folder, "module.onnx")
        try:
            torch.onnx.export(module, inputs, path, input_names=names, dynamic_axes=axes, dynamo=False)
        except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
            first = str(error).strip().splitlines()[0]
            raise FormatError(f"PyTorch can't export it: {first}") from error
        return load(path)


def _difference(network: Network, module: Any, inputs: tuple[Any, ...], tolerance: float) -> str | None:
    """Return in what the network's outputs differ from the module's; None where they don't."""
    import torch

    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(t.shape, generator=generator, dtype=t.dtype) if t.is_floating_point() else t for t in inputs]
    for given in (inputs, drawn):
        with torch.no_grad():
            expected = _tensors(module(*given))
        arrays = [np.asarray(value.detach().cpu()) for value in given]
        try:
            ours = network(*arrays)
        except (TypeError, ValueError) as error:
            return f"the network refuses the example: {error}"
        outputs = list(ours.values()) if isinstance(ours, dict) else [ours]
        for n, (output, wanted) in enumerate(zip(outputs, expected, strict=False)):
            theirs = np.asarray(wanted.detach().cpu())
            if output.shape != theirs.shape:
                return f"output {n} has the shape {output.shape}, the module's {theirs.shape}"
            off = float(np.abs(output - theirs).max(initial=0.0) / max(np.abs(theirs).max(initial=0.0), 1e-30))
            if not off <= tolerance:
                return f"output {n} lies {off:.1e} off the module's, more than {tolerance:.0e}"
    return None


def _tensors(value: Any) -> list[Any]:
    """Return the tensors in what a module returns, one after the other."""
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in _tensors(part)] if isinstance(value, (tuple, list)) else [value]
