"""Exports a PyTorch module to ONNX without printing to the console, and says how to fix modules that can't be read."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import Dim
from torch.jit import ScriptModule

from cellstack.capture.nested import fresh
from cellstack.capture.recording import example_values, recorded
from cellstack.capture.writing import first_reason, write
from cellstack.cells.errors import FormatError

LISTED = 2  # problems that a message lists if it also gives a remedy; the rest are counted

# Patterns in the reason why a module can't be read, and how to fix each; the first that matches is used.
REMEDIES = (
    (r"size of a frame is unknown|found axes F 1 1|found T B 1|found axis F of B F(?! [A-Z1])", "it takes samples "
     "without an axis of features: let forward take [B, T, 1], without x[:, :, None], and pass such an example"),
    (r"Scatter|aten\W+index_put|aten\W+copy_", "it writes into an existing tensor, as in out[:, t] = y: collect "
     "the parts in a list and join them by torch.stack(parts, 1)"),
    (r"Dropout '", "its dropout is active in evaluation mode too: pass training=self.training to it"),
    (r"unhashable type: \S* ?SymInt", "it uses a size of its input as a key, as in n in {1, 2} or a cache: compare "
     "sizes by ==, and compute what depends on them at each call"),
    (r"Random|Multinomial|Bernoulli|aten\W+normal|aten\W+rand", "it draws random numbers, which a Network can't: "
     "return the distribution's parameters, and draw outside the module"),
    (r"division of ids", "it divides ids, which rounds: compute these ids outside the module"),
    (r"ArgMax|ArgMin|TopK|aten\W+sort", "its output depends on comparing values: return the values, and choose outside "
     "the module"),
    (r"a branch depends on the values", "its scripted code branches on values, as in if x.sum() > 0: compute both "
     "branches and select by torch.where, or decide outside the module"),
    (r"Greater|Less|Equal|Where '|NonZero", "its output depends on comparing values: return the values, and choose "
     "outside the module"),
    (r"MatMul '[^']*': expected the weights to be constant|scaled_dot_product|aten\W+baddbmm", "it multiplies computed "
     "values by each other, as attention does, but a Network only multiplies by weights: compile the part before it"),
    (r"Einsum", "write the einsum as x @ weight, or as nn.Linear"),
    (r"aten\W+(_?fft|stft)|STFT|DFT", "it computes a spectrum: compute it outside, and compile the module without it"),
    (r"dynamo-optimized", "it is compiled by torch.compile: pass the original module, module._orig_mod"),
    (r"Python operator|PythonOp|lift_fresh|numpy\(\) is not supported", "a part of it, such as an autograd.Function or "
     "NumPy code, doesn't use PyTorch's operators: write its forward with these"),
    (r"no input;|found: no input", "its output doesn't depend on the example: detach(), numpy() and .data break the "
     "graph, and so do values kept from another call"),
    (r"aten\W+\w+' to ONNX|Unsupported|No ONNX function found", "ONNX has no such operator: compute that part outside "
     "the module"),
)  # fmt: skip


def export(
    module: Any,
    inputs: tuple[Any, ...],
    free: list[list[int]],
    path: str,
    names: list[str],
    outs: list[str] | None = None,
    one_step: bool = False,
) -> list[str]:
    """Write a module in evaluation mode as an ONNX file: what `torch.export` records of it.

    A scripted module, which `torch.export` doesn't record, is written by PyTorch's older exporter.

    Args:
        module: the module, which takes tensors as arguments, as `flattened` returns it.
        inputs: the example.
        free: the axes of each input that may change.
        path: the file.
        names, outs: the names of the inputs and the outputs.
        one_step: whether the module calls its cells once, as a step: these then become recurrent operators, of which
            the states are known.

    Returns:
        The places, such as `file.py:12`, where the module reads tensors' values: the file doesn't record how its output
        depends on them.

    Raises:
        FormatError: PyTorch can't export the module; the message gives the reason in one line.
        ModuleNotFoundError: the export needs a package that isn't installed.
    """
    looks = list[str]()
    try:
        with warnings.catch_warnings(record=True), without_console():
            warnings.simplefilter("ignore")  # they are about exports
            if isinstance(module, ScriptModule):
                _write_scripted(module, inputs, free, path, names, outs)
            else:
                shapes = tuple(dict.fromkeys(own, Dim.AUTO) for own in free)
                with example_values(looks):
                    program = recorded(module, inputs, None, (shapes,), serve=None, steps=one_step)
                    write(program, path, names, outs, free)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # exporters fail in as many ways as there are modules
        why = first_reason(error).removeprefix("export_onnx: ")
        raise FormatError(f"PyTorch can't export it: {why}") from error
    return looks


def _write_scripted(module: Any, inputs: Any, free: list[list[int]], path: str, names: Any, outs: Any) -> None:
    axes = {name: {axis: f"{name}_{axis}" for axis in own} for name, own in zip(names, free, strict=True)}
    options: dict[str, Any] = {"input_names": names, "output_names": outs, "dynamic_axes": axes}
    logs = torch._C._jit_is_onnx_log_enabled()  # some versions turn it on during an export, and leave it on
    try:
        torch.onnx.export(module, fresh(inputs), path, **options, dynamo=False, verbose=True)
    finally:
        torch._C._jit_set_onnx_log_enabled(logs)


@contextmanager
def without_console() -> Iterator[None]:
    """Redirect console output that bypasses Python to a temporary file."""
    with tempfile.TemporaryFile() as elsewhere:
        kept = {}
        try:
            for number in (1, 2):
                try:
                    kept[number] = os.dup(number)
                except OSError:  # a process without a console
                    continue
                os.dup2(elsewhere.fileno(), number)
            yield
        finally:
            for number, own in kept.items():
                os.dup2(own, number)
                os.close(own)


def remedy(why: str) -> str:
    """Return how to fix a module that can't be read for the reason `why`; "" if that is unknown."""
    return next((text for pattern, text in REMEDIES if re.search(pattern, why)), "")


def shortened(why: str) -> str:
    """Return a reason with the first few of its problems and the number of the others."""
    head, found, problems = why.partition(", found: ")
    parts = problems.split("; ")
    if not found or len(parts) <= LISTED:
        return why
    last = re.fullmatch(r"and (\d+) more", parts[-1])
    count = len(parts) - LISTED + (int(last[1]) - 1 if last else 0)
    return f"{head}{found}{'; '.join(parts[:LISTED])}; and {count} more"
