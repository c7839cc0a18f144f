"""Exports PyTorch modules to ONNX with their recurrent layers as single operators, for any batch size and length.

PyTorch's exporter fixes the number of steps of an nn.LSTM, nn.GRU or nn.RNN. Here the layers run on `layers.op`, which
`torch.export` records with symbolic sizes, and each cell of that op becomes one of ONNX's recurrent operators.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from torch import nn
from torch._ops import OpOverload

from cellstack.capture.nested import has_packed
from cellstack.capture.recognition import accelerate
from cellstack.capture.recording import recorded, served
from cellstack.capture.writing import write
from cellstack.layers.eligibility import original_of
from cellstack.layers.handwritten import HandWritten


def export_onnx(
    module: nn.Module,
    args: tuple[Any, ...],
    path: str | PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    strict: bool = False,
    cells: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> None:
    """Write a module in evaluation mode as an ONNX file whose recurrent layers take any batch size and length.

    Each layer of an nn.LSTM, nn.GRU or nn.RNN, or of cellstack's layers, becomes an operator LSTM, GRU or RNN per
    direction or, where ONNX has no operator for the cell, a Scan. The module isn't changed.

    Args:
        module: the module, accelerated or not.
        args: an example of its inputs, with 2 or more entries along axes that may have other lengths.
        path: the file to write; weights above 2 GiB go into a second file in its folder.
        kwargs: an example of its inputs by name.
        dynamic_shapes: which axes may have other lengths, as for `torch.export.export`:
            `({0: Dim("batch"), 1: Dim("time")},)`. None: none.
        strict: as for `torch.export.export`.
        cells: whether hand-written recurrent modules become single operators too, as for `accelerate`.
        input_names: the names of the file's inputs.
        output_names: the names of its outputs.

    Raises:
        TypeError: `module` isn't a module, or `args` isn't a tuple.
        ValueError: a recurrent module that stays with PyTorch, a cell or a call that ONNX's operators can't express, or
            names that aren't unique.
        ModuleNotFoundError: onnxscript, of the extra `[compile]`, isn't installed.
        Exception: whatever `torch.export.export` and `torch.onnx.export` raise.

    >>> import torch
    >>> time = torch.export.Dim("time")
    >>> export_onnx(nn.LSTM(3, 4), (torch.zeros(5, 1, 3),), "lstm.onnx", dynamic_shapes=({0: time},))  # doctest: +SKIP
    """
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    if not isinstance(module, nn.Module) or not isinstance(args, tuple):
        got = f"{type(module).__name__} and {type(args).__name__}"
        raise TypeError(f"export_onnx: expected a module of PyTorch and a tuple of its inputs, such as (x,), got {got}")
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        module = module.module
    if has_packed((args, kwargs)):
        raise ValueError(
            "export_onnx: a packed sequence can't be an input: let forward take the padded one and its lengths, and "
            "pack them"
        )
    program = recorded(module, args, kwargs, dynamic_shapes, strict, serve=with_cells if cells else served)
    changed = _changed_buffers(program)
    if changed:
        warnings.warn(
            f"export_onnx: forward changes the buffers {', '.join(changed)}, and the file doesn't: each of its calls "
            "starts from their present values. Return what the next call needs, and take it as an argument",
            stacklevel=2,
        )
    write(program, fspath(path), input_names, output_names)


def _changed_buffers(program: Any) -> list[str]:
    """Return the names of the buffers that a recorded module writes to."""
    buffers = program.graph_signature.inputs_to_buffers
    calls = [node for node in program.graph.nodes if isinstance(node.target, OpOverload) and node.args]
    written = [getattr(node.args[0], "name", "") for node in calls if node.target._schema.is_mutable]
    return list(dict.fromkeys(buffers[name] for name in written if name in buffers))


def with_cells(module: nn.Module, example: Any) -> nn.Module:
    """Accelerate a module and the hand-written ones in it."""
    accelerate(module, example)
    return _Named(module).eval() if isinstance(module, HandWritten) else module


class _Named(nn.Module):
    """Runs a hand-written module on the kernel, whose forward takes any arguments, with those of its own class."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

        def forward(*args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs)

        own: Any = original_of(type(inner)).forward
        forward.__signature__ = inspect.signature(own.__get__(inner))  # type: ignore[attr-defined]
        self.forward = forward
