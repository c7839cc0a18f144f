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

from cellstack.cells.errors import check_installed

if find_spec("keras") is None:
    raise ModuleNotFoundError("cellstack.keras needs Keras 3: pip install 'cellstack[torch]' keras", name="keras")
check_installed("cellstack.keras", "torch", "torch")

_NEEDS = "cellstack.keras needs Keras's torch backend: set KERAS_BACKEND=torch before Keras is imported"
try:
    import keras as _keras
except ModuleNotFoundError as error:  # without a setting, Keras imports TensorFlow
    _package = (error.name or "").partition(".")[0]
    if _package not in ("tensorflow", "jax"):
        raise
    raise ModuleNotFoundError(f"{_NEEDS}; it is set to {_package}, which isn't installed", name=_package) from None
if _keras.backend.backend() != "torch":
    raise ImportError(f"{_NEEDS}; it is set to {_keras.backend.backend()}", name="keras")

from cellstack.keras import layers
from cellstack.keras.calls import Calls, calls
from cellstack.keras.layers import *  # noqa: F403
from cellstack.keras.patching import accelerate, patch, restore, unpatch
from cellstack.keras.plan import plan

__all__ = ["Calls", "accelerate", "calls", "patch", "plan", "restore", "unpatch"]
__all__ += layers.__all__


def __dir__() -> list[str]:
    return __all__
