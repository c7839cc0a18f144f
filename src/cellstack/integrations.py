"""Models of other frameworks on the fused kernel: one call each, for PyTorch modules and Keras models alike.

Nothing here imports a framework: a model that is passed in has already imported its own.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from typing import Any

from cellstack.spec import Plan


def accelerate(model: Any) -> Any:
    """Let the fused kernel run the recurrent layers of a PyTorch module or a Keras model, in place.

    What changes, and what stays: `cellstack.layers.accelerate` for PyTorch, `cellstack.keras` for Keras.

    Args:
        model: a module of PyTorch, or a model or layer of Keras.

    Returns:
        The same model.

    Raises:
        TypeError: it is neither.
        ValueError: it has no recurrent layer; of PyTorch's, none that the kernel could run.

    >>> import torch
    >>> isinstance(accelerate(torch.nn.LSTM(3, 4)), torch.nn.LSTM)
    True
    """
    return _integration("accelerate", model).accelerate(model)


def restore(model: Any) -> Any:
    """Take back what `accelerate` changed in a model, in place.

    Args:
        model: a module of PyTorch, or a model or layer of Keras.

    Returns:
        The same model.

    Raises:
        TypeError: it is neither.

    >>> import torch
    >>> type(restore(accelerate(torch.nn.LSTM(3, 4)))) is torch.nn.LSTM
    True
    """
    return _integration("restore", model).restore(model)


def packed_weights(model: Any) -> Any:
    """Return a context in which the weights of an accelerated PyTorch module stay as they are.

    They are then packed once, which is most of what a single step costs: see
    `cellstack.layers.accelerate.packed_weights`.

    Args:
        model: a module of PyTorch that `accelerate` was given, or one with such modules inside.

    Returns:
        The context, which gives the model.

    Raises:
        TypeError: it is no module of PyTorch.
        ValueError: there is no accelerated module in it.

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


def frozen(model: Any) -> Any:
    """Call `packed_weights`: the name until 0.2, which says `requires_grad=False` elsewhere."""
    warnings.warn("cellstack.frozen is now cellstack.packed_weights", DeprecationWarning, stacklevel=2)
    return packed_weights(model)


def plan(model: Any) -> Plan:
    """Say for each recurrent layer of a model what runs it, and why: one line each.

    Args:
        model: a module of PyTorch, accelerated or not, or a model or layer of Keras.

    Returns:
        The lines.

    Raises:
        TypeError: it is neither.

    >>> import torch
    >>> plan(torch.nn.LSTM(3, 4))
    LSTM 3 -> 4: PyTorch's own: accelerate() would let the fused kernel run it
    """
    return _integration("plan", model).plan(model)


def _integration(owner: str, model: Any) -> Any:
    """Return the module that knows models like this one."""
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(model, keras.layers.Layer):  # with torch as its backend a torch module too
        return import_module("cellstack.keras")
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        return import_module("cellstack.layers.accelerate")
    raise TypeError(f"{owner}: expected a module of PyTorch or a model of Keras, got {type(model).__name__}")
