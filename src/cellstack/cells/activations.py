"""The activations of gates and states: their names, parameters and codes in the kernel."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import NamedTuple

ACTIVATIONS = (
    "sigmoid",
    "tanh",
    "linear",
    "relu",
    "hard_sigmoid",
    "softsign",
    "softplus",
    "elu",
    "affine",
    "leaky_relu",
    "thresholded_relu",
    "scaled_tanh",
    "positive",
)
"""Activations that the kernel implements; the position in this tuple is the kernel's code for the activation."""

OF_BACKBONES = (*ACTIVATIONS, "silu", "gelu")
"""Those of backbones: also activations whose derivative isn't a function of their value."""


def names_for(argument: str) -> tuple[str, ...]:
    """Return the activations that an argument may name."""
    return OF_BACKBONES if argument == "backbone_activation" else ACTIVATIONS


PARAMETERS = {
    "hard_sigmoid": (1.0 / 6.0, 0.5),
    "elu": (1.0,),
    "affine": (1.0, 0.0),
    "leaky_relu": (0.2,),
    "thresholded_relu": (1.0,),
    "scaled_tanh": (1.0, 1.0),
}
"""Activations that take parameters, alpha or alpha and beta, with their default values.

    hard_sigmoid  min(max(alpha·z + beta, 0), 1)          elu               z, or alpha·(e^z - 1) where negative
    affine        alpha·z + beta                          leaky_relu        z, or alpha·z where negative
    scaled_tanh   alpha·tanh(beta·z)                      thresholded_relu  z where above alpha, else 0

Without parameters, `positive` is z + 1/2 where z >= 0, else sigmoid(z) (Feng et al. 2024, appendix B.3, their g).
"""


class Activation(NamedTuple):
    """An activation with its parameters, as `activation` parses them; parameters that it doesn't take are zero."""

    name: str
    alpha: float = 0.0
    beta: float = 0.0

    def __str__(self) -> str:
        usual = PARAMETERS.get(self.name, ())
        given = (self.alpha, self.beta)[: len(usual)]
        return self.name if given == usual else f"{self.name}({', '.join(map(repr, given))})"


_ACTIVATION = re.compile(r"(\w+)\s*(?:\(([^()]*)\))?")


@lru_cache(maxsize=256)
def activation(text: str, names: tuple[str, ...] = ACTIVATIONS) -> Activation:
    """Parse an activation: one of `names`, followed by its parameters in parentheses if it has any.

    Raises:
        ValueError: an unknown name, or invalid parameters.

    >>> activation("hard_sigmoid(0.2, 0.5)")  # that of Keras 1 and 2; the default parameters are Keras 3's
    Activation(name='hard_sigmoid', alpha=0.2, beta=0.5)
    """
    match = _ACTIVATION.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or match[1] not in names:
        raise ValueError(f"expected one of the activations {', '.join(names)}, got {text!r}")
    name, usual = match[1], PARAMETERS.get(match[1], ())
    try:
        given = () if match[2] is None else tuple(float(number) for number in match[2].split(","))
    except ValueError:
        raise ValueError(f"expected numbers as the parameters of {name}, got {text!r}") from None
    if (match[2] is not None and len(given) != len(usual)) or not all(map(math.isfinite, given)):
        raise ValueError(f"expected {name} with {len(usual)} finite parameters or without any, got {text!r}")
    found = Activation(name, *(given or usual))
    if (name in ("elu", "leaky_relu") and found.alpha < 0.0) or (name == "scaled_tanh" and found.alpha == 0.0):
        bound = "alpha other than 0" if name == "scaled_tanh" else "alpha >= 0"
        raise ValueError(f"expected {name} with {bound}, so that its value determines its slope, got {text!r}")
    return found
