"""Formulas: elementwise functions in NumPy, from which their derivative, and their form in ONNX and C, follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from cellstack.nodes.base import Array, NodeRun, StateGradients, Stepwise

# The functions that a formula may consist of, by their names in NumPy. Of each: the derivatives of y by the arguments
# (by the first is enough where the others are constants); the operator in ONNX; the expression in C, with $f for f.
FUNCTIONS: dict[str, tuple[Callable[..., tuple[Any, ...]], str, str]] = {
    "absolute": (lambda y, a: (np.sign(a),), "Abs", "fabs$f({})"),
    "add": (lambda y, a, b: (1, 1), "Add", "{} + {}"),
    "cos": (lambda y, a: (-np.sin(a),), "Cos", "cos$f({})"),
    "divide": (lambda y, a, b: (1 / b, -y / b), "Div", "{} / {}"),
    "exp": (lambda y, a: (y,), "Exp", "exp$f({})"),
    "expm1": (lambda y, a: (y + 1,), "", "expm1$f({})"),
    "log": (lambda y, a: (1 / a,), "Log", "log$f({})"),
    "maximum": (lambda y, a, b: (a > b, b > a), "Max", "{0} < {1} ? {1} : {0}"),
    "minimum": (lambda y, a, b: (a < b, b < a), "Min", "{0} > {1} ? {1} : {0}"),
    "multiply": (lambda y, a, b: (b, a), "Mul", "{} * {}"),
    "power": (lambda y, a, b: (b * a ** (b - 1),), "Pow", "pow$f({}, {})"),
    "reciprocal": (lambda y, a: (-y * y,), "Reciprocal", "1.0$f / {}"),
    "sin": (lambda y, a: (np.cos(a),), "Sin", "sin$f({})"),
    "sqrt": (lambda y, a: (0.5 / y,), "Sqrt", "sqrt$f({})"),
    "subtract": (lambda y, a, b: (1, -1), "Sub", "{} - {}"),
    "tanh": (lambda y, a: (1 - y * y,), "Tanh", "tanh$f({})"),
}


class Formula(NDArrayOperatorsMixin):
    """What a function of x computes: x, or a function in `FUNCTIONS` of formulas and constants, arrays and numbers.

    A function in NumPy returns its formula for `X` instead of an array.
    """

    def __init__(self, function: str = "", of: tuple[Any, ...] = ()) -> None:
        self.function, self.of = function, of

    def __array_ufunc__(self, function: np.ufunc, method: str, *of: Any) -> Formula:
        return Formula(function.__name__, of)

    def written(self, x: Any, call: Callable[..., Any], constant: Callable[[Any], Any]) -> Any:
        """Return the value in another representation, given x, and how to write a function's call and a constant."""
        if not self.function:
            return x
        return call(
            self.function,
            *(one.written(x, call, constant) if isinstance(one, Formula) else constant(one) for one in self.of),
        )


X: Any = Formula()


def gradient(formula: Formula, x: Array, dy: Array) -> Array:
    """Return the gradient of x, given that of the value."""

    def call(function: str, *of: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
        values = [value for value, _ in of]
        y = getattr(np, function)(*values)
        slopes = FUNCTIONS[function][0](y, *values)
        parts: list[Array] = [slope * d for slope, (_, d) in zip(slopes, of, strict=False) if d is not None]
        return y, sum(parts[1:], parts[0]) if parts else None

    with np.errstate(all="ignore"):  # each value with its derivative times dy; None for a constant
        return formula.written((x, dy), call, lambda constant: (constant, None))[1]


class Elementwise(Stepwise):
    """A node whose `apply` is a formula: of each number of its input, and of the numbers of its arrays there."""

    @property
    def formula(self) -> Formula:
        """What `apply` computes."""
        made: Any = self.apply(X)
        return made

    def name_of(self, array: Array) -> str:
        """Return the name of one of the node's arrays."""
        return next(name for name in self.arrays if getattr(self, name) is array)

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        return [gradient(self.formula, run.inputs[0].x, dy)]
