"""Run models of other frameworks on the fused kernel: the same functions for PyTorch modules and Keras models.

Nothing here imports a framework: a program that has a model has already imported the model's framework.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from cellstack.cells.plan import Plan


def accelerate(model: Any, *, cells: bool = False, example: Any = None) -> Any:
    """Make the fused kernel run the recurrent layers of a PyTorch module or a Keras model; change the model in place.

    For what changes see `cellstack.layers.accelerate` for PyTorch, and `cellstack.keras` for Keras.

    With `cells=True`, the kernel also runs PyTorch modules that are written by hand: cells, and layers that loop over
    steps. Each is traced, and its equations are compared with those of cellstack's cells. If they are the same, the
    module and the kernel are run on random inputs, their outputs, states and gradients are compared, and the module's
    class is replaced. This takes about a second per module, and needs the package `onnx`. `plan` lists these modules,
    and says why others weren't replaced.

    Args:
        model: a PyTorch module, or a Keras model or layer.
        cells: whether to look for hand-written cells and layers.
        example: an input of the model, or a tuple of its inputs, from which the calls of its parts are recorded; only
            with `cells`. Without it, arguments are guessed from a module's parameters and its signature.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is neither, or `cells` is given for a Keras model.
        ValueError: the model has no recurrent layer, or a PyTorch module has none that the kernel can run.

    >>> import torch
    >>> isinstance(accelerate(torch.nn.LSTM(3, 4)), torch.nn.LSTM)
    True
    """
    integration = _integration("accelerate", model)
    if not cells:
        if example is not None:
            raise TypeError("accelerate: example is only used with cells=True")
        try:
            return integration.accelerate(model)
        except ValueError as error:
            if integration.__name__ != "cellstack.layers.accelerate":
                raise
            raise ValueError(f"{error}; cells=True also looks for hand-written ones") from None
    if integration.__name__ != "cellstack.layers.accelerate":
        raise TypeError("accelerate: cells=True isn't supported for Keras models, only for PyTorch modules")
    return import_module("cellstack.capture.recognition").accelerate(model, example)


def restore(model: Any) -> Any:
    """Undo `accelerate` in place.

    Args:
        model: a PyTorch module, or a Keras model or layer.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is neither.

    >>> import torch
    >>> type(restore(accelerate(torch.nn.LSTM(3, 4)))) is torch.nn.LSTM
    True
    """
    return _integration("restore", model).restore(model)


def packed_weights(model: Any) -> Any:
    """Return a context manager for calls of an accelerated PyTorch module whose weights don't change in between.

    The weights are packed once instead of at every call, which is most of the cost of a single step: see
    `cellstack.layers.accelerate.packed_weights`.

    Args:
        model: an accelerated PyTorch module, or a module that contains some.

    Returns:
        The context manager; its `with` statement returns the model.

    Raises:
        TypeError: `model` isn't a PyTorch module.
        ValueError: `model` contains no accelerated module.

    >>> import torch
    >>> cell = accelerate(torch.nn.LSTMCell(3, 4))
    >>> with torch.no_grad(), packed_weights(cell):
    ...     state = cell(torch.zeros(1, 3))
    ...     state = cell(torch.zeros(1, 3), state)
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(model, torch.nn.Module):
        raise TypeError(f"packed_weights: expected a module of PyTorch, got {type(model).__name__}")
    return import_module("cellstack.layers.accelerate").packed_weights(model)


def plan(model: Any) -> Plan:
    """Return which implementation runs each recurrent layer of a model, and why: one line per layer.

    Args:
        model: a PyTorch module, accelerated or not, or a Keras model or layer.

    Returns:
        The lines.

    Raises:
        TypeError: `model` is neither.

    >>> import torch
    >>> plan(torch.nn.LSTM(3, 4))
    LSTM 3 -> 4: PyTorch: not accelerated; accelerate() makes the fused kernel run it
    """
    return _integration("plan", model).plan(model)


def _integration(owner: str, model: Any) -> Any:
    """Return our module for the framework of `model`."""
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(model, keras.layers.Layer):  # with the torch backend, also a torch module
        return import_module("cellstack.keras")
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        return import_module("cellstack.layers.accelerate")
    raise TypeError(f"{owner}: expected a module of PyTorch or a model of Keras, got {type(model).__name__}")
