"""Which implementation runs each recurrent layer of a Keras model, and why."""

from __future__ import annotations

from typing import Any

from cellstack.cells.plan import Plan
from cellstack.keras import torch_backend
from cellstack.keras.keras_cells import of, why_not, why_not_training
from cellstack.keras.patching import active, recurrent


def plan(model: Any) -> Plan:
    """Return which implementation runs each recurrent layer of a Keras model, and why: one line per layer.

    Args:
        model: a Keras layer or model.

    Returns:
        A `Plan`: the lines.

    Raises:
        TypeError: `model` is neither.

    >>> import keras
    >>> from cellstack.keras import patch
    >>> with patch():
    ...     print(str(plan(keras.layers.LSTM(4, recurrent_dropout=0.2, name="a"))).split(": ")[0])
    a LSTM
    """
    return Plan(f"{layer.name} {type(layer).__name__}: {_line(layer)}" for layer in recurrent("plan", model))


def _line(layer: Any) -> str:
    if not active(layer):
        return "Keras: not accelerated; cellstack.keras.patch() or accelerate(model) makes the fused kernel run it"
    why = why_not(layer)
    elsewhere = {} if why else {str(weight.value.device) for weight in layer.weights} - {"cpu"}
    if elsewhere:
        why = f"weights on {', '.join(sorted(elsewhere))}"
    if why:
        return f"Keras: {why}"
    line = f"fused cpu kernel ({torch_backend.isa()})"
    training = why_not_training(of(layer))
    if training:
        line += f"; Keras in training: {training}"
    return line
