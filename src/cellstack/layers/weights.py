"""Initialisers, regularisers and constraints: Keras's names over torch.nn.init and plain torch.

Each of them can be a name (`"glorot_uniform"`), a description in Keras's form (`{"class_name": "L2", "config": {"l2":
0.01}}`), a Keras object, or a callable of one tensor. An initialiser fills its tensor in place, like those of
torch.nn.init, or returns the values to copy; a regulariser returns a scalar; a constraint returns the new weights.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Given = str | Mapping[str, Any] | Callable[[Tensor], Any] | None


# ── Initialisers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def variance_scaling(
    w: Tensor,
    scale: float = 1.0,
    mode: str = "fan_in",
    distribution: str = "truncated_normal",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill `w` with variance `scale / fan`; `w` is `[inputs, outputs]`, so fan_in is its first axis."""
    fan_in, fan_out = w.shape[0], w.shape[-1]
    fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
    std = math.sqrt(scale / max(1.0, fan))
    if distribution == "uniform":
        return nn.init.uniform_(w, -std * math.sqrt(3.0), std * math.sqrt(3.0), generator=generator)
    if distribution == "untruncated_normal":
        return nn.init.normal_(w, 0.0, std, generator=generator)
    if distribution != "truncated_normal":
        raise ValueError(f"expected distribution uniform, truncated_normal or untruncated_normal, got {distribution!r}")
    std /= 0.87962566103423978  # the standard deviation of a unit normal truncated at ±2
    return nn.init.trunc_normal_(w, 0.0, std, -2.0 * std, 2.0 * std, generator=generator)


def random_normal(
    w: Tensor, mean: float = 0.0, stddev: float = 0.05, generator: torch.Generator | None = None
) -> Tensor:
    """Fill `w` with values of a normal distribution."""
    return nn.init.normal_(w, mean, stddev, generator=generator)


def random_uniform(
    w: Tensor, minval: float = -0.05, maxval: float = 0.05, generator: torch.Generator | None = None
) -> Tensor:
    """Fill `w` with values of a uniform distribution."""
    return nn.init.uniform_(w, minval, maxval, generator=generator)


def truncated_normal(
    w: Tensor, mean: float = 0.0, stddev: float = 0.05, generator: torch.Generator | None = None
) -> Tensor:
    """Fill `w` with values of a normal distribution truncated at two standard deviations."""
    return nn.init.trunc_normal_(w, mean, stddev, mean - 2 * stddev, mean + 2 * stddev, generator=generator)


def constant(w: Tensor, value: float = 0.0) -> Tensor:
    """Fill `w` with `value`."""
    return nn.init.constant_(w, value)


def identity(w: Tensor, gain: float = 1.0) -> Tensor:
    """Fill a matrix with `gain` on its diagonal."""
    return nn.init.eye_(w).mul_(gain)


def power_law(w: Tensor, first: float = 5.0, last: float = -7.0, exponent: float = 0.3) -> Tensor:
    """Fill the last axis by a power law, `first + (last - first)·(k/(n - 1))^exponent` for k from 0 to n - 1.

    As `forget_bias` of an sLSTM, the defaults are the initialisation `powerlaw_blockdependent` of the package xlstm for
    a single block. In a stack its exponent rises evenly from 0.3 in the first block to 1.6 in the last one.

    Ref: Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory"; the package xlstm, `sLSTMCell`.
    """
    share = torch.linspace(0.0, 1.0, w.shape[-1], dtype=torch.float64, device=w.device)
    with torch.no_grad():
        return w.copy_(first + (last - first) * share**exponent)


INITIALIZERS: dict[str, Callable[..., Any]] = {
    "constant": constant,
    "glorot_normal": partial(variance_scaling, mode="fan_avg"),
    "glorot_uniform": partial(variance_scaling, mode="fan_avg", distribution="uniform"),
    "he_normal": partial(variance_scaling, scale=2.0),
    "he_uniform": partial(variance_scaling, scale=2.0, distribution="uniform"),
    "identity": identity,
    "lecun_normal": variance_scaling,
    "lecun_uniform": partial(variance_scaling, distribution="uniform"),
    "ones": nn.init.ones_,
    "orthogonal": nn.init.orthogonal_,
    "power_law": power_law,
    "random_normal": random_normal,
    "random_uniform": random_uniform,
    "truncated_normal": truncated_normal,
    "variance_scaling": variance_scaling,
    "zeros": nn.init.zeros_,
}


# ── Regularisers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def l1_l2(w: Tensor, l1: float = 0.0, l2: float = 0.0) -> Tensor:
    """Return `l1·Σ|w| + l2·Σw²`."""
    return l1 * w.abs().sum() + l2 * w.square().sum()


def _l1(w: Tensor, l1: float = 0.01) -> Tensor:
    return l1_l2(w, l1=l1)


def _l2(w: Tensor, l2: float = 0.01) -> Tensor:
    return l1_l2(w, l2=l2)


REGULARIZERS: dict[str, Callable[..., Any]] = {"l1": _l1, "l2": _l2, "l1_l2": l1_l2}


# ── Constraints ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _norms(w: Tensor, axis: int) -> Tensor:
    return w.square().sum(dim=axis, keepdim=True).sqrt()


def max_norm(w: Tensor, max_value: float = 2.0, axis: int = 0) -> Tensor:
    """Scale vectors along `axis` down to a norm of at most `max_value`."""
    norms = _norms(w, axis)
    return w * (norms.clamp(0.0, max_value) / (norms + 1e-7))


def non_neg(w: Tensor) -> Tensor:
    """Set negative values to zero."""
    return w.clamp(min=0.0)


def unit_norm(w: Tensor, axis: int = 0) -> Tensor:
    """Scale vectors along `axis` to norm 1."""
    return w / (_norms(w, axis) + 1e-7)


def min_max_norm(w: Tensor, min_value: float = 0.0, max_value: float = 1.0, rate: float = 1.0, axis: int = 0) -> Tensor:
    """Move norms along `axis` towards `[min_value, max_value]`, by the fraction `rate` of the difference."""
    norms = _norms(w, axis)
    wanted = rate * norms.clamp(min_value, max_value) + (1.0 - rate) * norms
    return w * (wanted / (norms + 1e-7))


CONSTRAINTS: dict[str, Callable[..., Any]] = {
    "max_norm": max_norm,
    "min_max_norm": min_max_norm,
    "non_neg": non_neg,
    "unit_norm": unit_norm,
}


# ── Looking up and applying them ──────────────────────────────────────────────────────────────────────────────────────


def _snake(name: str) -> str:
    return name if name == name.lower() else re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


_BASES = {"Initializer": "initializers", "Regularizer": "regularizers", "Constraint": "constraints"}


def _of_keras(value: Any) -> str:
    """Return the name of the Keras base class of an object, "" if there is none, without importing Keras."""
    for kind in type(value).__mro__:
        if kind.__name__ in _BASES and kind.__module__.split(".")[0] in ("keras", "tf_keras"):
            return kind.__name__
    return ""


def described(value: Any) -> Any:
    """Return the description of a Keras initialiser, regulariser or constraint that we implement too.

    Other values are returned unchanged, including objects of classes that users derived from Keras's.
    """
    if not _of_keras(value) or type(value).__module__.split(".")[0] not in ("keras", "tf_keras"):
        return value
    name, config = type(value).__name__, value.get_config()
    if not set(inspect.signature(type(value)).parameters) <= set(config):
        return value  # the configuration of Keras's Identity lacks its gain
    config = {key: setting for key, setting in config.items() if setting is not None}
    tables = INITIALIZERS, REGULARIZERS, CONSTRAINTS
    function = next((table[_snake(name)] for table in tables if _snake(name) in table), None)
    if function is None or not isinstance(config.get("seed", 0), int):
        return value
    taken = {"seed", *inspect.signature(function).parameters}
    return {"class_name": name, "config": config} if taken.issuperset(config) else value


def _initial(initializer: Any, w: Tensor) -> Tensor:
    """Return the values of a Keras initialiser, which takes a shape, for `w`."""
    values = initializer(tuple(w.shape), dtype=str(w.dtype).removeprefix("torch."))
    values = values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    return values.to(w)


def find(
    owner: str, argument: str, given: Given, table: Mapping[str, Callable[..., Any]]
) -> Callable[[Tensor], Any] | None:
    """Return the function of `table` that `given` names or describes; a callable unchanged; None for None.

    Args:
        owner: the layer, for error messages.
        argument: its argument, likewise.
        given: the value of the argument.
        table: the functions by name.

    Raises:
        ValueError: a name that isn't in the table.
        TypeError: not a name, a description or a callable; or a setting that the function doesn't take.
    """
    settings: dict[str, Any] = {}
    given = described(given)
    if _of_keras(given) == "Initializer":
        return partial(_initial, given)
    name = given
    if isinstance(given, Mapping):
        name = given.get("class_name")
        settings = {key: value for key, value in (given.get("config") or {}).items() if value is not None}
        if "class_name" not in given:
            raise ValueError(f"{owner}: expected {argument} to have a 'class_name', got {dict(given)!r}")
    if name is None or (callable(name) and not isinstance(name, str)):
        return name
    if not isinstance(name, str):
        came = type(name).__name__
        raise TypeError(f"{owner}: expected {argument} to be a name, a description or a callable, got {came}")
    function = table.get(_snake(name))
    if function is None:
        raise ValueError(f"{owner}: expected {argument} to be one of {', '.join(table)} or a callable, got {name!r}")
    seed = settings.pop("seed", None)
    known = [*inspect.signature(function).parameters][1:]
    for setting in settings:
        if setting not in known:
            takes = ", ".join(known) or "no settings"
            raise TypeError(f"{owner}: {argument}: {name} takes {takes}, got {setting!r}")
    if isinstance(seed, int):
        return partial(_seeded, function, seed, settings)
    return partial(function, **settings) if settings else function


def _seeded(function: Callable[..., Any], seed: int, settings: dict[str, Any], w: Tensor) -> Any:
    return function(w, **settings, generator=torch.Generator(w.device).manual_seed(seed))


@torch.no_grad()
def fill(w: Tensor, initializer: Callable[[Tensor], Any]) -> None:
    """Initialise `w`, with an `initializer` that works in place or returns the values."""
    drawn = w if w.dtype in (torch.float32, torch.float64) else w.float()  # torch can't factorise float16 and bfloat16
    values = initializer(drawn)
    values = values if isinstance(values, Tensor) else drawn
    if values is not w:
        w.copy_(values)
