"""Chains of cell steps, as exporters write them when they unroll a loop.

A step follows another if it takes the other's states, and both have the same weights and settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from cellstack.formats.onnx.decomposed.linear import Term
from cellstack.formats.onnx.decomposed.match import Matcher, Step, steps_of, total
from cellstack.formats.onnx.decomposed.sums import stripped
from cellstack.formats.onnx.file import Scope, label
from cellstack.formats.onnx.fold import numbers


@dataclass(eq=False)
class Chain:
    """Steps of one cell, each with the states of the one before.

    Args:
        steps: the steps, in the order of computation.
        name: the common prefix of the weights' names, else the operator that computes the first h.
        folded: a constant that replaces the first step's product of zeros plus bias; "" without one.
    """

    steps: list[Step]
    name: str
    folded: str = ""

    @property
    def starts(self) -> list[str]:
        """The names of the initial states."""
        return list(self.steps[0].before.values())


def find_chains(scope: Scope) -> list[Chain]:
    """Return a graph's chains of two or more steps, ordered by their first step."""
    steps = {readings[0].node.output[0]: readings for readings in steps_of(scope)}
    after: dict[str, Step] = {}
    later: set[str] = set()
    for name, readings in steps.items():
        for step in readings:
            h = stripped(scope, step.before["h"])
            if h not in after and any(_follows(scope, step, before) for before in steps.get(h, ())):
                after[h] = step
                later.add(name)
    chains = []
    for name, readings in steps.items():
        if name in after and name not in later:
            chain = [next(step for step in readings if step.key == after[name].key)]
            while (following := after.get(chain[-1].node.output[0])) is not None and following.key == chain[0].key:
                chain.append(following)
            chains.append(_with_folded(scope, Chain(chain, name_of(chain[0]))))
    return chains


def _follows(scope: Scope, step: Step, before: Step) -> bool:
    """Whether a step takes the states of another step of the same cell."""
    given = {state: stripped(scope, name) for state, name in step.before.items()}
    return given == before.after and step.key == before.key


def name_of(step: Step) -> str:
    """Return the common prefix of the names of a step's matrices, up to a whole word, else the name of its node."""
    names = [
        terms[0].weights for (*_, block), terms in step.terms.items() if not block and terms and not terms[0].vector
    ]
    alike = takewhile(lambda letters: len({*letters}) == 1, zip(*names, strict=False))
    text = "".join(letters[0] for letters in alike) if len(names) > 1 else ""
    return text[: max(text.rfind("/"), text.rfind("."), 0)] or label(step.node)


def _with_folded(scope: Scope, chain: Chain) -> Chain:
    """Return a chain with its first step prepended, where an exporter folded that step's product of zeros."""
    after, node = chain.steps[0], scope.producers.get(stripped(scope, chain.steps[0].before["h"]))
    matcher = Matcher(scope, zeros=after.form.before["h"])
    readings = [] if node is None else matcher.steps(after.form, node, {"h": node.output[0]}, {})
    for step in readings:
        biases = {term.weights for terms in step.terms.values() for term in terms if term.vector}
        deep = [name for name in biases if np.ndim(numbers(scope.constant(name))) > 1]
        alike = all(_alike(scope, terms, after.terms[key]) for key, terms in step.terms.items())
        if not step.before["h"] and len(deep) < 2 and step.settings == after.settings and alike:
            first = Step(step.form, step.node, {**after.bound, **step.bound, **after.terms, after.form.before["h"]: ""})
            return replace(chain, steps=[first, *chain.steps], folded="".join(deep))
    return chain


def _alike(scope: Scope, terms: Sequence[Term], others: Sequence[Term]) -> bool:
    """Whether the terms of a block are the same matrix, or constants of the same sum."""
    if any(not term.vector for term in terms):
        return [term.rows for term in terms] == [term.rows for term in others]
    return np.allclose(total(scope, terms, 1), total(scope, others, 1), rtol=1e-6, atol=1e-6)
