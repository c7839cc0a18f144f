"""The Keras door: Keras's own recurrent layers on our op, and layers for what Keras lacks.

Keras's layers keep their classes, weights and habits: `fit`, `save`, functional models and `summary()` are Keras's own.
What changes is the call that they make below them, step after step in Python on the torch backend: it goes to the fused
kernel where that computes the same, faster. `plan(model)` says what runs each layer, and why.

>>> import cellstack.keras
>>> import keras
>>> import numpy
>>> with cellstack.keras.patch():  # or patch() … unpatch()
...     y = keras.layers.LSTM(4)(numpy.zeros((2, 3, 6), "float32"))
>>> cellstack.keras.calls().served > 0
True
"""

from importlib.util import find_spec

if find_spec("keras") is None:
    raise ModuleNotFoundError("cellstack.keras needs Keras 3: pip install 'cellstack[torch]' keras", name="keras")

from cellstack.keras.calls import Calls, calls
from cellstack.keras.layers import GRU, LSTM, SimpleRNN
from cellstack.keras.patching import accelerate, patch, restore, unpatch
from cellstack.keras.plan import plan

__all__ = [
    "GRU",
    "LSTM",
    "Calls",
    "SimpleRNN",
    "accelerate",
    "calls",
    "patch",
    "plan",
    "restore",
    "unpatch",
]
