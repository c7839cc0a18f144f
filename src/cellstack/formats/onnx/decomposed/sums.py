"""Reads a graph in the form in which cells are compared, one value at a time.

A value is an activation, a clipped value, a sum of products with constants (`linear`), or a sum of other products, in
which differences are multiplied out: 1 - z times g is g - z·g.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from cellstack.formats.onnx.decomposed.activations import activated
from cellstack.formats.onnx.decomposed.linear import FOLLOWED, Linear, inputs_of, linear, scalar
from cellstack.formats.onnx.file import Scope
from cellstack.formats.onnx.fold import numbers

CUTS = ("Slice", "Split")  # operators that divide gates
MOST_TERMS = 32  # maximum number of operators and of terms in one sum


def bare(scope: Scope, name: str) -> str:
    """Return a value's origin, skipping operators without effect."""
    return origin(scope, name, ("Identity",), 100)


def stripped(scope: Scope, name: str) -> str:
    """Return the origin of a value, ignoring axes of length 1."""
    return origin(scope, name, FOLLOWED, 4)


def origin(scope: Scope, name: str, skipped: Collection[str], most: int) -> str:
    """Return a value from which another one derives, skipping at most so many operators of some types."""
    for _ in range(most):
        node = scope.producers.get(name)
        if node is None or node.op_type not in skipped or not node.input:
            break
        name = node.input[0]
    return name


def is_zero(scope: Scope, name: str) -> bool:
    """Whether a value is all zeros."""
    array = numbers(scope.constant(name))
    return isinstance(array, np.ndarray) and not array.any()


class Product(NamedTuple):
    """A term of a sum: its sign, the names of its factors, and its own name, "" where no operator computes it alone."""

    sign: int
    factors: tuple[str, ...]
    name: str = ""


class Values:
    """A graph, value by value; what was read is kept.

    Args:
        scope: the graph.
        rows: whether values are known to be rows of features, without time.
    """

    def __init__(self, scope: Scope, rows: bool = False) -> None:
        self.scope, self.rows = scope, rows
        self.kept: dict[tuple[str, str], Any] = {}

    def activated(self, name: str) -> tuple[str, str] | None:
        """Return a value's activation and the name of its input; None where it has none."""
        return self._kept("activated", name, lambda: activated(self.scope, name) or self._cut(name))

    def _cut(self, name: str) -> tuple[str, str] | None:
        """Return the same for a cut of a sum's activation, that of a cut of the sum, which the scope is given."""
        node = self.scope.producers.get(name)
        if node is None or node.op_type not in CUTS or not node.input:
            return None
        active = activated(self.scope, node.input[0])
        if active is None:
            return None
        made = copy.deepcopy(node)
        made.input[0], made.output[:] = active[1], [f"{one} before {active[0]}" for one in node.output]
        self.scope.producers |= dict.fromkeys(made.output, made)
        before = made.output[[*node.output].index(name)]
        return None if self.linear(before) is None else (active[0], before)

    def linear(self, name: str) -> Linear | None:
        """Return a value as a sum of products with constants; None where it isn't one."""
        return self._kept("linear", name, lambda: linear(self.scope, name, rows=self.rows))

    def sum(self, name: str) -> list[Product]:
        """Return a value as a sum of other products; empty where it has too many terms."""
        return self._kept("sum", name, lambda: self._sum(name))

    def outline(self, name: str) -> Any:
        """Return what a value has in common with all values that can match it: operator, or signs and factors."""
        if self.activated(name) is not None:
            return "activation"
        terms = self.sum(name)
        if len(terms) == 1 and terms[0].factors == (name,):
            return self.scope.producers[name].op_type
        return tuple(sorted((term.sign, len(term.factors)) for term in terms))

    def size(self, name: str) -> int:
        """Return how many operators lead to a value, counted once per use."""
        node = self.scope.producers.get(name)
        return 1 if node is None else self._kept("size", name, lambda: 1 + sum(map(self.size, node.input)))

    def parted(self, name: str) -> tuple[list[Product], Linear | None]:
        """Return a sum, the most specific terms and factors first, and its products with constants separately."""
        return self._kept("parted", name, lambda: self._parted(name))

    def _parted(self, name: str) -> tuple[list[Product], Linear | None]:
        terms, rest = [], list[Linear]()
        for term in self.sum(name):
            total = self.linear(term.name) if term.name and term.sign > 0 else None
            if total is None:
                terms.append(term._replace(factors=tuple(sorted(term.factors, key=self.size, reverse=True))))
            else:
                rest.append(total)
        return sorted(terms, key=lambda term: -sum(map(self.size, term.factors))), together(rest)

    def _kept(self, what: str, name: str, read: Any) -> Any:
        if (what, name) not in self.kept:
            self.kept[what, name] = read()
        return self.kept[what, name]

    def clipped(self, name: str) -> tuple[str, float | None]:
        """Return a value without its symmetric clipping, and the bound; None where it isn't clipped."""
        found = inputs_of(self.scope, name, "Clip")
        bounds = [scalar(self.scope, one) for one in found[1:]]
        if len(bounds) != 2 or bounds[0] is None or bounds[1] is None or bounds[0] != -bounds[1]:
            return name, None
        return found[0], bounds[1]

    def _sum(self, name: str) -> list[Product]:
        with suppress(OverflowError):
            return self._expand(name, [MOST_TERMS], whole=True)
        return []

    def _expand(self, name: str, left: list[int], factor: bool = False, whole: bool = False) -> list[Product]:
        """Return a value as a sum of products.

        Args:
            name: the name of the value.
            left: how many more values may be visited; `OverflowError` beyond.
            factor: whether it is a factor of a product, or part of one: sums other than differences then stay whole.
            whole: whether it is the sum that is read, even if it is also an activation.
        """
        left[0] -= 1
        if left[0] < 0:
            raise OverflowError
        name = bare(self.scope, name)
        node = self.scope.producers.get(name)
        of = inputs_of(self.scope, name, operator := "" if node is None else node.op_type)
        fits = len(of) == {"Mul": 2, "Sub": 2, "Neg": 1, "Add": 0 if factor else 2}.get(operator, 0) > 0
        constant = None if whole and not fits else numbers(self.scope.constant(name))
        if isinstance(constant, np.ndarray) and constant.size and (constant == 1).all():
            return [Product(1, ())]
        if not fits or constant is not None or (not whole and self.activated(name) is not None):
            return [Product(1, (name,), name)]
        parts = [self._expand(one, left, factor or operator == "Mul") for one in of]
        if operator == "Mul":
            found = [Product(a.sign * b.sign, a.factors + b.factors) for a in parts[0] for b in parts[1]]
            if len(found) > MOST_TERMS:
                raise OverflowError
            return [found[0]._replace(name=name)] if len(found) == 1 else found
        if operator != "Add":
            parts[-1] = [Product(-one.sign, one.factors) for one in parts[-1]]
        return [one for part in parts for one in part]


def together(totals: Sequence[Linear | None]) -> Linear | None:
    """Return the sum of sums; None where there is none, or one of them is unknown."""
    found = [total for total in totals if total is not None]
    if not found or len(found) < len(totals):
        return None
    return Linear(*(sum(terms, ()) for terms in zip(*found, strict=True)))
