"""The Keras integration: Keras's recurrent layers on the fused kernel, and layers with additional flags.

Keras's layers keep their classes and weights; `fit`, `save`, functional models and `summary()` work as before. On the
torch backend Keras runs a Python loop over the steps, which the fused kernel replaces if it computes the same result
faster. `plan(model)` says what runs each layer, and why.

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
