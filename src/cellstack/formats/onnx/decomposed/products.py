"""Recognises activations that a graph decomposes into several operators, and replaces each by one operator.

gelu       ½·x·(1 + erf(x·√½)), its factors in any order
gelu_tanh  ½·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))
softplus   x > 20 ? x : softplus(x): from `LINEAR` on, float32 rounds softplus(x) to x
"""

from __future__ import annotations

import math
from typing import Any

from cellstack.formats.onnx.decomposed.linear import inputs_of, pairs, scalar
from cellstack.formats.onnx.file import Model, Scope, onnx_package

MOST_FACTORS = 4
LINEAR = 16.0  # softplus(x) - x = log(1 + exp(-x)), which is less than half of float32's spacing at x


def name_activations(model: Model) -> Model:
    """Return a model in which a Gelu or Softplus replaces the operators in the outermost graph that form one."""
    scope, make, made = model.scope(), onnx_package().helper.make_node, dict[int, Any]()
    for node in scope.graph.node:
        if node.op_type == "Where" and (x := _linear_above(scope, node)):
            made[id(node)] = make("Softplus", [x], [*node.output], name=node.name)
            continue
        if node.op_type not in ("Mul", "Div") or not node.output:
            continue
        (name,) = node.output
        factors, times = _factors(scope, name)
        if len(factors) != 2 or not math.isclose(times, 0.5, rel_tol=1e-6):
            continue
        for x, other in (factors, factors[::-1]):
            kind = _bell(scope, other, x)
            if kind is not None:
                made[id(node)] = make("Gelu", [x], [name], name=node.name, approximate=kind)
                scope.producers[name] = made[id(node)]  # its factors aren't those of a product of it
                break
    return model.changed(made.get(id(node), node) for node in scope.graph.node) if made else model


def _linear_above(scope: Scope, node: Any) -> str | None:
    """Return the x of a Where that computes `x > limit ? x : softplus(x)`; None for another one."""
    condition, x, curve = inputs_of(scope, node.output[0], "Where") or ("", "", "")
    compared = inputs_of(scope, condition, "Greater")
    limit = scalar(scope, compared[1]) if compared[:1] == [x] else None
    return x if limit is not None and limit >= LINEAR and inputs_of(scope, curve, "Softplus") == [x] else None


def _factors(scope: Scope, name: str) -> tuple[list[str], float]:
    """Return the factors of a value, and its numeric factor."""
    factors: list[str] = []
    times, waiting, left = 1.0, [name], 2 * MOST_FACTORS
    while waiting and left:
        left -= 1
        one = waiting.pop()
        number = scalar(scope, one)
        product, quotient, power = (inputs_of(scope, one, operator) for operator in ("Mul", "Div", "Pow"))
        divisor = scalar(scope, quotient[1]) if len(quotient) == 2 else None
        if number is not None:
            times *= number
        elif len(product) == 2:
            waiting += product
        elif divisor:
            times /= divisor
            waiting.append(quotient[0])
        elif power and scalar(scope, power[1]) == 3.0:
            factors += [power[0]] * 3
        else:
            factors.append(one)
    return ([], 1.0) if waiting else (factors, times)


def _bell(scope: Scope, name: str, x: str) -> str | None:
    """Return the Gelu's `approximate` attribute, given its factor other than x; None where it isn't a Gelu."""
    for curve, one in pairs(scope, name, "Add"):
        if scalar(scope, one) != 1.0:
            continue
        erf, tanh = inputs_of(scope, curve, "Erf"), inputs_of(scope, curve, "Tanh")
        if erf and _is(_factors(scope, erf[0]), [x], math.sqrt(0.5)):
            return "none"
        if tanh and _is_bend(scope, tanh[0], x):
            return "tanh"
    return None


def _is_bend(scope: Scope, name: str, x: str) -> bool:
    """Whether a value is √(2/π)·(x + 0.044715·x³)."""
    factors, times = _factors(scope, name)
    if len(factors) != 1 or not math.isclose(times, math.sqrt(2.0 / math.pi), rel_tol=1e-6):
        return False
    return any(
        one == x and _is(_factors(scope, cube), [x] * 3, 0.044715) for one, cube in pairs(scope, factors[0], "Add")
    )


def _is(found: tuple[list[str], float], factors: list[str], times: float) -> bool:
    return found[0] == factors and math.isclose(found[1], times, rel_tol=1e-6)
