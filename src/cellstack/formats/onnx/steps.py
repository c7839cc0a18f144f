"""Cells that a graph writes out step by step, as exporters do where they unroll a loop, and the chains of their steps.

What a step is, is told from its equations, from h backwards; z stands for a sum of products:

    RNN   h = act(z)
    GRU   h = Add(Mul(Sub(h_prev, n), act(z)), n), or Add(Mul(Sub(1, act(z)), n), Mul(act(z), h_prev));
          n = act(Add(z, Mul(act(z), z)))
    LSTM  h = Mul(act(z), act(c));  c = Add(Mul(act(z), c_prev), Mul(act(z), act(z)))

A step follows another where it multiplies that one's h by the matrix that the other multiplies its h_prev by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np

from cellstack.formats.onnx.cells import NAMES, activation_text
from cellstack.formats.onnx.file import DOMAINS, Scope, label
from cellstack.formats.onnx.fold import numbers
from cellstack.formats.onnx.linear import FOLLOWED, Linear, Term, array_of, linear
from cellstack.layout import Array, from_rows
from cellstack.nodes.recurrent import Cell
from cellstack.spec import CellSpec

ORDER = {"lstm": "ifgo", "gru": "zrg", "rnn": "g"}


@dataclass(eq=False)
class Step:
    """One step of a cell.

    Args:
        kind: "lstm", "gru" or "rnn".
        node: what makes h.
        gates: the sum behind each gate, in `ORDER`; a GRU's r·(product of h) apart, as the last.
        activations: of each gate in this order, and of an LSTM's cell.
        c: the name of an LSTM's c, and of c_prev.
    """

    kind: str
    node: Any
    gates: tuple[Linear, ...]
    activations: tuple[str, ...]
    c: tuple[str, str] = ("", "")

    @property
    def key(self) -> tuple[Any, ...]:
        """What every step of a cell has in common."""
        return self.kind, self.activations, tuple(gate.key for gate in self.gates)


@dataclass(eq=False)
class Chain:
    """Steps of one cell, each from the h of the one before.

    Args:
        steps: in the order in which they are computed.
        starts: the names of h and c that the first begins from.
        inputs: the product of x in each step.
        recurrent: the matrix of h.
        name: what the names of its weights have in common, else the operator that makes the first h.
        folded: a constant that stands where the first step adds the product of zeros and its bias; "" where none does.
    """

    steps: list[Step]
    starts: tuple[str, ...]
    inputs: list[Term]
    recurrent: str
    name: str
    folded: str = ""


def _activated(scope: Scope, name: str) -> tuple[str, str] | None:
    """Return the activation that a value comes out of, and the name of what goes in."""
    node = scope.producers.get(name)
    text = None if node is None or not node.input else activation_text(node, scope.model.attributes(node))
    return None if node is None or text is None else (text, node.input[0])


def _gate(scope: Scope, name: str) -> tuple[str, Linear] | None:
    """Return the activation that a value comes out of, and the sum that goes in."""
    found = _activated(scope, name)
    total = None if found is None else linear(scope, found[1])
    return None if found is None or total is None or not 1 <= len(total.products) <= 2 else (found[0], total)


def _pairs(scope: Scope, name: str, operator: str) -> Iterator[tuple[str, str]]:
    """Give the two inputs of the operator behind a name, both ways round; nothing where it is another."""
    node = scope.producers.get(name)
    if node is not None and node.op_type == operator and len(node.input) == 2:
        yield node.input[0], node.input[1]
        yield node.input[1], node.input[0]


def _lstm(scope: Scope, node: Any) -> Step | None:
    for out, wide in _pairs(scope, node.output[0], "Mul"):
        cell, o = _activated(scope, wide), _gate(scope, out)
        if cell is None or o is None:
            continue
        for kept, new in _pairs(scope, cell[1], "Add"):
            for left, c_prev in _pairs(scope, kept, "Mul"):
                f = _gate(scope, left)
                for first, second in _pairs(scope, new, "Mul"):
                    i, g = _gate(scope, first), _gate(scope, second)
                    if f is None or i is None or g is None or (i[0] == "tanh" != g[0]):
                        continue
                    if _gate(scope, c_prev) is not None:
                        continue
                    texts = (i[0], f[0], g[0], o[0], cell[0])
                    return Step("lstm", node, (i[1], f[1], g[1], o[1]), texts, (cell[1], c_prev))
    return None


def _gru(scope: Scope, node: Any) -> Step | None:
    for mixed, rest in _pairs(scope, node.output[0], "Add"):
        for left, right in _pairs(scope, mixed, "Mul"):
            difference = scope.producers.get(left)
            if difference is None or difference.op_type != "Sub" or len(difference.input) != 2:
                continue
            first, second = difference.input
            one = scope.constant(first)
            if second == rest:  # (h_prev - n)·z + n
                gate, new = right, rest
            elif _is_one(one) and any(second == factor for factor, _ in _pairs(scope, rest, "Mul")):
                gate, new = second, right  # (1 - z)·n + z·h_prev
            else:
                continue
            z, found = _gate(scope, gate), _candidate(scope, new)
            if z is not None and found is not None:
                text, x, r, h = found
                return Step("gru", node, (z[1], r[1], x, h), (z[0], r[0], text))
    return None


def _is_zero(scope: Scope, name: str) -> bool:
    value = scope.constant(name)
    array = numbers(value)
    return isinstance(array, np.ndarray) and not array.any()


def _is_one(value: Any) -> bool:
    array = numbers(value)
    return isinstance(array, np.ndarray) and array.size > 0 and bool((array == 1).all())


def _candidate(scope: Scope, name: str) -> tuple[str, Linear, tuple[str, Linear], Linear] | None:
    """Return activation, sum of x, gate r and sum of h of a GRU's candidate, act(x + r·h)."""
    found = _activated(scope, name)
    for plain, reset in _pairs(scope, found[1], "Add") if found else ():
        x = linear(scope, plain)
        for first, second in _pairs(scope, reset, "Mul"):
            r, h = _gate(scope, first), linear(scope, second)
            if found and x and h and r and len(x.products) == len(h.products) == 1:
                return found[0], x, r, h
    return None


def _rnn(scope: Scope, node: Any) -> Step | None:
    found = _gate(scope, node.output[0])
    return None if found is None or len(found[1].products) != 2 else Step("rnn", node, (found[1],), found[:1])


MATCHERS = {"Mul": (_lstm,), "Add": (_gru,), **dict.fromkeys(NAMES, (_rnn,))}


def stripped(scope: Scope, name: str) -> str:
    """Return what a value is, past axes of length 1."""
    for _ in range(4):
        node = scope.producers.get(name)
        if node is None or node.op_type not in FOLLOWED or not node.input:
            break
        name = node.input[0]
    return name


def _of_h(scope: Scope, step: Step, before: Step) -> str | None:
    """Return the matrix by which a step multiplies the h of another; None where it doesn't."""
    h = before.node.output[0]
    theirs = {term.weights for gate in before.gates for term in gate.products}
    for gate in step.gates:
        for term in gate.products:
            if not term.moves and term.weights in theirs and stripped(scope, term.value) == h:
                return term.weights
    return None


def find_chains(scope: Scope) -> list[Chain]:
    """Return the chains of two steps and more that a graph writes out, by the place of their first step."""
    steps: dict[str, Step] = {}
    for node in scope.graph.node:
        for matcher in MATCHERS.get(node.op_type, ()) if node.domain in DOMAINS and node.output else ():
            step = matcher(scope, node)
            if step is not None:
                steps[node.output[0]] = step
    after: dict[str, Step] = {}
    matrices: dict[str, str] = {}
    later: set[str] = set()
    for name, step in steps.items():
        values = {stripped(scope, term.value) for gate in step.gates for term in gate.products if not term.moves}
        for value in values & steps.keys():
            before = steps[value]
            weights = _of_h(scope, step, before) if before.key == step.key else None
            if weights is not None and value not in after:
                after[value], matrices[value] = step, weights
                later.add(name)
    chains = []
    for name, step in steps.items():
        if name in after and name not in later:
            chain = _chain(scope, step, after, matrices[name])
            if chain is not None:
                chains.append(_with_folded(scope, chain) if step.kind == "rnn" else chain)
    return chains


def _with_folded(scope: Scope, chain: Chain) -> Chain:
    """Return a chain with the step before its first, where an exporter computed that one's product of zeros."""
    after, node = chain.steps[0], scope.producers.get(stripped(scope, chain.starts[0]))
    found = _gate(scope, node.output[0]) if node is not None else None
    if node is None or found is None or found[0] != after.activations[0]:
        return chain
    products, biases = found[1]
    if [term.rows for term in products] != [chain.inputs[0].rows]:
        return chain
    units = products[0].stop - products[0].start
    ours, theirs = (_total(scope, part, units) for part in (found[1], after.gates[0]))
    constants = ((term.weights, scope.constant(term.weights)) for term in biases)
    rows = [name for name, array in constants if isinstance(array, np.ndarray) and array.ndim > 1]
    if not np.allclose(ours, theirs, rtol=1e-6, atol=1e-6) or len(rows) > 1:
        return chain
    first = Step("rnn", node, (found[1],), found[:1])
    inputs = [products[0], *chain.inputs]
    return replace(chain, steps=[first, *chain.steps], starts=("",), inputs=inputs, folded="".join(rows))


def _chain(scope: Scope, step: Step, after: dict[str, Step], weights: str) -> Chain | None:
    steps = [step]
    while steps[-1].node.output[0] in after:
        steps.append(after[steps[-1].node.output[0]])
    inputs, starts = [], set()
    for n, each in enumerate(steps):
        ours = [term for gate in each.gates for term in gate.products if term.weights != weights]
        theirs = {term.value for gate in each.gates for term in gate.products if term.weights == weights}
        if len({(term.value, tuple(map(id, term.moves))) for term in ours}) != 1 or len(theirs) != 1:
            return None
        inputs.append(ours[0])
        starts |= theirs if n == 0 else set()
        if n and stripped(scope, next(iter(theirs))) != steps[n - 1].node.output[0]:
            return None
        if n and each.kind == "lstm" and stripped(scope, each.c[1]) != steps[n - 1].c[0]:
            return None
    first = next(iter(starts))
    if step.kind == "gru" and [part.products[0].weights == weights for part in step.gates[2:]] != [False, True]:
        return None  # r is on x's side of the candidate, or on both
    if step.kind == "gru" and not _mixes(scope, steps, first):
        return None
    name = common(inputs[0].weights, weights) or label(step.node)
    return Chain(steps, (first, *([step.c[1]] if step.kind == "lstm" else [])), inputs, weights, name)


def common(one: str, other: str) -> str:
    """Return what two names begin with alike, up to a whole word."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    text = "".join(letter for letter, _ in alike)
    return text[: max(text.rfind("/"), text.rfind("."), 0)]


def _mixes(scope: Scope, steps: list[Step], first: str) -> bool:
    """Whether each step of a GRU mixes its candidate with the h that its products take."""
    expected, zero = stripped(scope, first), partial(_is_zero, scope)
    for step in steps:
        (one, other) = step.node.input
        names = set()
        for value in (one, other):
            product = scope.producers.get(value)
            for factor in product.input if product is not None and product.op_type == "Mul" else ():
                names.add(stripped(scope, factor))
                difference = scope.producers.get(factor)
                if difference is not None and difference.op_type == "Sub":
                    names.add(stripped(scope, difference.input[0]))
        if expected not in names and not (step is steps[0] and _is_zero(scope, first) and any(map(zero, names))):
            return False
        expected = step.node.output[0]
    return True


def cell_of(scope: Scope, chain: Chain) -> Cell:
    """Return the cell that a chain's steps are.

    Raises:
        ValueError: weights that aren't those of one cell.
    """
    step = chain.steps[-1]
    kind, order = step.kind, ORDER[step.kind]
    gates: list[tuple[Linear, ...]] = [(gate,) for gate in step.gates[: len(order)]]
    if kind == "gru":
        gates[2] = (step.gates[2], step.gates[3])
    rows, recurrent, offsets, apart = [], [], [], []
    for parts in gates:
        terms = [term for part in parts for term in part.products]
        x = [array_of(scope, term) for term in terms if term.weights != chain.recurrent]
        h = [array_of(scope, term) for term in terms if term.weights == chain.recurrent]
        if len(x) != 1 or len(h) != 1:
            raise ValueError("expected a product of x and one of h in each gate")
        rows.append(x[0])
        recurrent.append(h[0])
        sums = [_total(scope, part, len(x[0])) for part in parts]
        offsets.append(sums[0])
        apart.append(sums[1] if len(sums) > 1 else np.zeros_like(sums[0]))
    weight, hidden = np.concatenate(rows), np.concatenate(recurrent)
    if len({len(part) for part in (*rows, *recurrent)}) != 1 or hidden.shape[1] != len(rows[0]):
        raise ValueError(f"expected weights of one cell, found {weight.shape} and {hidden.shape}")
    dtype = np.dtype(np.float64 if weight.dtype == np.float64 else np.float32)
    biases = (np.concatenate(offsets), *([np.concatenate(apart)] if kind == "gru" else []))
    named = dict(zip(order, step.activations, strict=False))
    flags: dict[str, Any] = {} if kind == "rnn" else {"recurrent_activation": named[order[0]]}
    if kind == "lstm":
        flags["gate_activations"] = {"f": named["f"], "o": named["o"], "cell": step.activations[4]}
    if kind == "gru":
        flags |= {"reset_after": True, "gate_activations": {"r": named["r"]}}
    used = any(gate.biases for gate in step.gates)
    spec = CellSpec(weight.shape[1], len(rows[0]), named["g"], kind=kind, use_bias=used, **flags)
    given = tuple(bias.astype(dtype) for bias in biases) if used else ()
    arrays = from_rows(kind, weight.astype(dtype), hidden.astype(dtype), given, order)
    return Cell(spec, **{name: array for name, array in arrays._asdict().items() if array is not None})


def _total(scope: Scope, part: Linear, units: int) -> Array:
    """Return the constants of a sum, added up."""
    total = np.zeros(units, np.float64)
    for term in part.biases:
        total = total + array_of(scope, term)
    return total
