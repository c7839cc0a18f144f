"""PyTorch modules as networks for inference and as ONNX files, compared with the module."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cellstack.cells.errors import FormatError, check_installed
from cellstack.network import Network

if TYPE_CHECKING:
    from cellstack.capture.export import export_onnx

__all__ = ["compile", "compile_network", "export_onnx"]

TOLERANCE = 1e-4  # of the relative difference: float32 on both sides, with sums in different orders


def __getattr__(name: str) -> Any:
    """Import what needs torch at its first use."""
    if name != "export_onnx":
        raise AttributeError(f"module 'cellstack.capture' has no attribute {name!r}")
    return import_module("cellstack.capture.export").export_onnx


def compile(module: Any, example: Any = None, tolerance: float = TOLERANCE) -> Network:
    """Convert a PyTorch module to a Network, which runs without PyTorch, streams, and can be saved in any format.

    The module is read as `load` does or, if that isn't possible, exported to ONNX. The outputs of the network are then
    compared with those of the module: for the example, for other values of the same shape, and for other sizes that
    both accept: one row, more rows, one step, one step fewer, and up to 250 more steps. The comparison uses a copy of
    the module in evaluation mode, converted to float32 if it has weights in float16 or bfloat16.

    Of a module with operators that a Network doesn't have, the recurrent layers run on the kernel and all else runs in
    ONNX Runtime, with a warning: see Returns. `compile_network` refuses such a module.

    Args:
        module: the module; it may be accelerated.
        example: an input of the module, such as `[B, T, I]`; several as one tuple, which may hold tuples, as in
            `(x, (h, c))`, dicts, and values that aren't tensors, which are passed at every call. The initial state of
            a recurrent layer becomes the argument `state` of the network's `run`. The lengths by which a module packs
            sequences or selects their last steps, and those of a packed sequence, become its argument `lengths` or
            `mask`.
        tolerance: the greatest relative difference of an output that is accepted.

    Returns:
        The network, with inputs and outputs in the module's order. Final states that the module returns are among those
        that `Network.run` returns; a state is an output `[B, H]` if the module uses nothing else of its layer. A module
        that computes one step of a cell, as in `model(x, h, c)` with `x [B, I]`, becomes a network over sequences.
        For a module that ONNX Runtime runs in part, a `cellstack.formats.onnx.runtime.RuntimeModel`, which takes
        and returns the tensors that the module does, with the same axes, and can't stream. A complex tensor has a last
        axis of 2 there, for the real and the imaginary part.

    Outputs of the module that aren't tensors are left out. If the module's code reads values of tensors, as in
    `if x.sum() > 0`, compares sizes of its input, as in `if x.shape[1] > 4`, or turns them into plain numbers, as in
    `int(x.shape[1])`, and the outputs agree nonetheless, a warning lists the lines; where sizes matter, `verify` with
    random inputs doesn't pass. Uses of step numbers, as in `if t == 300`, are only found if the outputs differ for one
    of the sizes above. A warning also names axes along which the network only takes the example's size, but the module
    takes others.

    Raises:
        TypeError: `module` isn't a module, the example holds no tensor, or the tolerance isn't a number.
        ValueError: the example is empty, the module itself rejects it, or returns NaN or no tensor for it.
        FormatError: no way leads to a network with the module's outputs; the message gives the reason for each. Or the
            module can't be copied.
        ModuleNotFoundError: the export needs onnxscript, of the extra `[compile]`, which isn't installed.

    >>> import numpy as np
    >>> import torch
    >>> module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh())
    >>> compile(module, torch.zeros(2, 5, 3)).run(np.ones((1, 6, 3), np.float32))[0].shape
    (1, 6, 4)
    """
    return _compiled(module, example, tolerance, insist=False)


def compile_network(module: Any, example: Any = None, tolerance: float = TOLERANCE) -> Network:
    """Return what `compile` returns, but refuse modules of which ONNX Runtime would run a part.

    Args:
        module, example, tolerance: as for `compile`.

    Raises:
        FormatError and others: as `compile` does.
    """
    return _compiled(module, example, tolerance, insist=True)


def _compiled(module: Any, example: Any, tolerance: float, insist: bool) -> Any:
    """Return a Network or, unless `insist`, possibly a RuntimeModel."""
    check_installed("cellstack.capture", "torch", "torch")
    from cellstack.capture.attempts import attempt
    from cellstack.capture.prepared import checked, copied_for, named, same_random_numbers
    from cellstack.capture.runtime import runtime_model

    inputs = checked(module, example, tolerance)
    name = named(module)
    with same_random_numbers():
        ready = copied_for(module, inputs)
        try:
            network, notes = attempt(ready, tolerance)
        except FormatError as error:
            why = str(error)
            try:
                if insist:
                    raise
                network, notes = runtime_model(ready, tolerance, why)
            except FormatError as also:
                why += "" if also is error else f"; with ONNX Runtime: {also}"
                raise FormatError(f"compile: {name} can't be a Network: {why}") from error
    for note in notes:
        warnings.warn(f"compile: {name} {note}", stacklevel=3)
    return network
