"""Activations that only nodes have, in addition to those of cells, and the derivatives of both."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack import native, reference
from cellstack.cells import activations
from cellstack.nodes.elementwise import X, gradient

Array = NDArray[Any]


def softmax(z: Array) -> Array:
    """Softmax over the last axis, shifted by the largest value so that nothing overflows."""
    z = np.ascontiguousarray(z)  # else the order of summation, and with it the rounding, depends on the layout
    e = z - np.maximum.reduce(z, axis=-1, keepdims=True)  # np.max has more overhead, which a stream notices
    np.exp(e, out=e)
    e /= np.add.reduce(e, axis=-1, keepdims=True)
    return e


def _log_softmax(z: Array) -> Array:
    z = np.ascontiguousarray(z)
    z = z - np.maximum.reduce(z, axis=-1, keepdims=True)
    return z - np.log(np.add.reduce(np.exp(z), axis=-1, keepdims=True))


_sigmoid = reference.ACTIVATIONS["sigmoid"][0]


# erf(x) = x·P(x²)/Q(x²) for |x| <= 4, computed in float32 with an error below 4e-7; beyond, erf is 1 in float32. The
# coefficients, of the highest power first, are a least-squares fit with weights that level the largest errors.
_ERF_P = (2.1338163e-6, 2.8317387e-4, 3.5431882e-3, 5.2062345e-2, 0.18476328, 1.1283792)
_ERF_Q = (3.8877312e-5, 1.115021477e-3, 1.4517086e-2, 0.11183173, 0.49707541, 1.0)


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    y = x * np.float32(coefficients[0])
    for coefficient in coefficients[1:-1]:
        y += np.float32(coefficient)
        y *= x
    return y + np.float32(coefficients[-1])


def _erf(x: Array) -> Array:
    x = _between(x, 4.0)
    square = x * x
    return _between(x * _polynomial(_ERF_P, square) / _polynomial(_ERF_Q, square), 1.0)


def _between(x: Array, bound: float) -> Array:
    return np.minimum(np.maximum(x, np.float32(-bound)), np.float32(bound))  # np.clip has more overhead


def _gelu(z: Array) -> Array:
    if z.dtype != np.float32:
        return reference.ACTIVATIONS["gelu"][0](z)
    return z * (0.5 + 0.5 * _erf(z * np.float32(math.sqrt(0.5))))


def _gelu_tanh(z: Array) -> Array:
    return 0.5 * z * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z * z * z)))


def _selu(z: Array) -> Array:
    return 1.0507009873554805 * (np.maximum(z, 0.0) + 1.6732632423543772 * np.expm1(np.minimum(z, 0.0)))


FORMULAS: dict[str, Callable[[Any], Any]] = {
    "silu": lambda z: z * _sigmoid(z),
    "gelu_tanh": _gelu_tanh,
    "selu": _selu,
    "exponential": np.exp,
    "relu6": lambda z: np.minimum(np.maximum(z, 0.0), 6.0),
}
"""Those of the following that are formulas: see `elementwise`."""

MORE_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "softmax": softmax,
    "log_softmax": _log_softmax,
    "gelu": _gelu,
    **FORMULAS,
}
"""Activations of nodes in addition to those of cells, `cells.activations.ACTIVATIONS`, in NumPy; see `in_kernel`.

    softmax      e^z over its sum along the last axis      log_softmax  its logarithm
    silu         z·sigmoid(z)                              selu         1.0507·(z, or 1.6733·(e^z - 1) where negative)
    gelu         z·(1 + erf(z/sqrt 2))/2                   gelu_tanh    gelu with a tanh approximation of erf
    exponential  e^z                                       relu6        min(max(z, 0), 6)

Ref: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units"; Klambauer et al. 2017, "Self-Normalizing Neural
Networks", eq. 2.
"""


@lru_cache(maxsize=256)
def in_kernel(text: str) -> tuple[int, float, float] | None:
    """Return the kernel's code of an activation and its parameters; None if layers without a state lack it there.

    Args:
        text: what `check_activation` returns.
    """
    if text in native.NODE_ACTIVATIONS:
        return native.activation_code(text)
    return None if text in MORE_ACTIVATIONS else native.activation_code(*activations.activation(text))


@lru_cache(maxsize=256)
def activation_function(text: str) -> Callable[[Array], Array]:
    """Return the function of an activation in `MORE_ACTIVATIONS`, or of one that `activations.activation` parses."""
    if text in MORE_ACTIVATIONS:
        return MORE_ACTIVATIONS[text]
    name, alpha, beta = activations.activation(text)
    function = reference.ACTIVATIONS[name][0]
    return lambda z: function(z, alpha, beta)


def activation_gradient(text: str, z: Array, dy: Array) -> Array:
    """Return the gradient of an activation's input, z."""
    if text in ("softmax", "log_softmax"):
        y = softmax(z)
        total = (dy * y).sum(axis=-1, keepdims=True) if text == "softmax" else dy.sum(axis=-1, keepdims=True)
        return y * (dy - total) if text == "softmax" else dy - y * total
    if text in FORMULAS:
        return gradient(FORMULAS[text](X), z, dy)
    name, alpha, beta = activations.activation(text, activations.OF_BACKBONES)  # of those, gelu isn't a formula
    function, slope = reference.ACTIVATIONS[name]
    return dy * slope(z, function(z, alpha, beta), alpha, beta)


def check_activation(owner: str, text: Any) -> str:
    """Return the activation `text` in its shortest form; `ValueError` if it is unknown."""
    if isinstance(text, str) and text in MORE_ACTIVATIONS:
        return text
    try:
        return str(activations.activation(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{owner}: activation: {error} (or {', '.join(MORE_ACTIVATIONS)})") from None
