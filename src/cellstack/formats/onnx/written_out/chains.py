"""Chains of cell steps, as exporters write them when they unroll a loop, and the cell that they belong to.

A step follows another if it multiplies the other's h by the same matrix that the other uses for its h_prev.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np

from cellstack.formats.onnx.file import Scope, label
from cellstack.formats.onnx.written_out.equations import ORDER, Step, gate_of, is_zero, steps_of
from cellstack.formats.onnx.written_out.linear import FOLLOWED, Linear, Term, array_of
from cellstack.layout import Array
from cellstack.nodes.recurrent import Cell
from cellstack.spec import CellSpec


@dataclass(eq=False)
class Chain:
    """Steps of one cell, each with the previous step's h as its h_prev.

    Args:
        steps: the steps, in the order of computation.
        starts: the names of the initial h and c.
        inputs: the product of x in each step.
        recurrent: the matrix of h.
        name: the common prefix of the weights' names, else the operator that computes the first h.
        folded: a constant that replaces the first step's product of zeros plus bias; "" without one.
    """

    steps: list[Step]
    starts: tuple[str, ...]
    inputs: list[Term]
    recurrent: str
    name: str
    folded: str = ""

    def is_h(self, term: Term) -> bool:
        """Return whether a product multiplies h."""
        return term.weights == self.recurrent


def stripped(scope: Scope, name: str) -> str:
    """Return the origin of a value, ignoring axes of length 1."""
    for _ in range(4):
        node = scope.producers.get(name)
        if node is None or node.op_type not in FOLLOWED or not node.input:
            break
        name = node.input[0]
    return name


def _of_h(scope: Scope, step: Step, before: Step) -> str | None:
    """Return the matrix by which a step multiplies another step's h; None where it doesn't."""
    h = before.node.output[0]
    theirs = {term.weights for gate in before.gates.values() for term in gate.products}
    for gate in step.gates.values():
        for term in gate.products:
            if not term.moves and term.weights in theirs and stripped(scope, term.value) == h:
                return term.weights
    return None


def find_chains(scope: Scope) -> list[Chain]:
    """Return a graph's chains of two or more steps, ordered by their first step."""
    steps = {step.node.output[0]: step for step in steps_of(scope)}
    after: dict[str, Step] = {}
    matrices: dict[str, str] = {}
    later: set[str] = set()
    for name, step in steps.items():
        values = {
            stripped(scope, term.value) for gate in step.gates.values() for term in gate.products if not term.moves
        }
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
    """Return a chain with its first step prepended, where an exporter folded that step's product of zeros."""
    after, node = chain.steps[0], scope.producers.get(stripped(scope, chain.starts[0]))
    found = gate_of(scope, node.output[0]) if node is not None else None
    if node is None or found is None or (found.text, found.clip) != (after.activations["g"], after.flags.get("clip")):
        return chain
    products, biases, peepholes = found.total
    if peepholes or [term.rows for term in products] != [chain.inputs[0].rows]:
        return chain
    units = products[0].stop - products[0].start
    ours, theirs = (_total(scope, part, units) for part in (found.total, after.gates["g"]))
    constants = ((term.weights, scope.constant(term.weights)) for term in biases)
    rows = [name for name, array in constants if isinstance(array, np.ndarray) and array.ndim > 1]
    if not np.allclose(ours, theirs, rtol=1e-6, atol=1e-6) or len(rows) > 1:
        return chain
    first = replace(after, node=node, gates={"g": found.total})
    inputs = [products[0], *chain.inputs]
    return replace(chain, steps=[first, *chain.steps], starts=("",), inputs=inputs, folded="".join(rows))


def _chain(scope: Scope, step: Step, after: dict[str, Step], weights: str) -> Chain | None:
    steps = [step]
    while steps[-1].node.output[0] in after:
        steps.append(after[steps[-1].node.output[0]])
    inputs, starts = [], set()
    for n, each in enumerate(steps):
        ours = [term for gate in each.gates.values() for term in gate.products if term.weights != weights]
        hidden = [term for gate in each.gates.values() for term in gate.products if term.weights == weights]
        theirs = {term.value for term in hidden}
        if any(term.moves for term in hidden):  # a cell never slices a product of h
            return None
        if len({(term.value, tuple(map(id, term.moves))) for term in ours}) != 1 or len(theirs) != 1:
            return None
        inputs.append(ours[0])
        starts |= theirs if n == 0 else set()
        if n and stripped(scope, next(iter(theirs))) != steps[n - 1].node.output[0]:
            return None
        if n and each.kind == "lstm" and stripped(scope, each.c[1]) != steps[n - 1].c[0]:
            return None
    first = next(iter(starts))
    sides = [step.gates[part].products[0].weights == weights for part in "gh" if part in step.gates]
    if step.kind == "gru" and sides != [False, True]:
        return None  # r multiplies x's part of the candidate, or both parts
    if any(gate.peepholes for gate in step.gates.values()) or step.cell_norm is not None:
        return None
    if step.kind == "gru" and not _mixes(scope, steps, first):
        return None
    name = common(inputs[0].weights, weights) or label(step.node)
    return Chain(steps, (first, *([step.c[1]] if step.kind == "lstm" else [])), inputs, weights, name)


def common(one: str, other: str) -> str:
    """Return the common prefix of two names, up to a whole word."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    text = "".join(letter for letter, _ in alike)
    return text[: max(text.rfind("/"), text.rfind("."), 0)]


def _mixes(scope: Scope, steps: list[Step], first: str) -> bool:
    """Whether each step of a GRU mixes its candidate with the same h that its products use."""
    expected, zero = stripped(scope, first), partial(is_zero, scope)
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
        if expected not in names and not (step is steps[0] and is_zero(scope, first) and any(map(zero, names))):
            return False
        expected = step.node.output[0]
    return True


def cell_of(scope: Scope, step: Step, is_h: Callable[[Term], bool], flags: dict[str, Any], **arrays: Array) -> Cell:
    """Return the cell of a decomposed step.

    Args:
        scope: the graph.
        step: the step.
        is_h: whether a product multiplies h; otherwise it multiplies x.
        flags: settings of the cell that don't follow from the step's equations.
        **arrays: arrays that aren't in the equations.

    Raises:
        ValueError: weights that don't form one cell.
    """
    kind, named = step.kind, step.activations
    order = [gate for gate in ORDER[kind] if gate in step.gates]
    x, h = ([_product(step, gate, is_h, side) for gate in order] for side in (False, True))
    rows, hidden = ([array_of(scope, term) for term in terms] for terms in (x, h))
    weight, recurrent, units = np.concatenate(rows), np.concatenate(hidden), len(rows[0])
    if len({len(part) for part in (*rows, *hidden)}) != 1 or recurrent.shape[1] != flags.get("proj_size", units):
        raise ValueError(f"the weights don't form one cell: {weight.shape} and {recurrent.shape}")
    arrays |= {"kernel": weight.T, "recurrent_kernel": recurrent.T}
    if any(gate.biases for gate in step.gates.values()):
        arrays["bias"] = _biases(scope, step, order, is_h, units)
    flags = flags | step.flags | {"use_bias": "bias" in arrays}
    if kind != "rnn":
        flags["recurrent_activation"] = named[order[0]]
        flags["gate_activations"] = {name: named[name] for name in (*order, "cell") if name in named and name != "g"}
    if kind == "lstm":
        arrays |= _peepholes(scope, step, order, units)
        flags["peepholes"] = "peepholes" in arrays
    norms, epsilon = _norms(scope, step, x, h, units)
    if norms:
        flags |= {"layer_norm": True, "norm_epsilon": epsilon}
    arrays |= norms
    spec = CellSpec(weight.shape[1], units, named["g"], kind=kind, **flags)
    dtype = np.dtype(np.float64 if weight.dtype == np.float64 else np.float32)
    return Cell(spec, **{name: np.ascontiguousarray(array, dtype) for name, array in arrays.items()})


def _product(step: Step, gate: str, is_h: Callable[[Term], bool], side: bool) -> Term:
    """Return a gate's only product of x, or of h."""
    parts = [step.gates[gate], *([step.gates["h"]] if gate == "g" and "h" in step.gates else [])]
    found = [term for part in parts for term in part.products if is_h(term) == side]
    if len(found) != 1 or sum(len(part.products) for part in parts) != 2:
        raise ValueError("each gate needs one product of x and one of h")
    return found[0]


def _biases(scope: Scope, step: Step, order: list[str], is_h: Callable[[Term], bool], units: int) -> Array:
    """Return the bias, with separate rows for x and h where a GRU applies its reset gate after the product of h."""
    if not step.flags.get("reset_after"):
        return np.concatenate([_total(scope, step.gates[gate], units) for gate in order])
    rows = []
    for gate in order:
        total = step.gates[gate]
        if gate == "g":
            pair = [_total(scope, total, units), _total(scope, step.gates["h"], units)]
        elif step.paired and len(total.biases) == 2:
            pair = [_total(scope, Linear((), (bias,)), units) for bias in total.biases]
            pair = pair[::-1] if is_h(total.products[0]) else pair
        else:
            pair = [_total(scope, total, units), np.zeros(units)]
        rows.append(np.stack(pair))
    return np.concatenate(rows, axis=1)


def _peepholes(scope: Scope, step: Step, order: list[str], units: int) -> dict[str, Array]:
    """Return an LSTM's peephole vectors, if any: i and f use the previous c, o the new one."""
    if not any(gate.peepholes for gate in step.gates.values()):
        return {}
    rows = []
    for gate in order:
        terms, seen = step.gates[gate].peepholes, step.c[0 if gate == "o" else 1]
        if gate == "g" and not terms:
            continue
        if len(terms) != 1 or terms[0].value != seen or gate == "g":
            raise ValueError("with peepholes, every gate except g must have one")
        array = scope.constant(terms[0].weights)
        rows.append(np.asarray(array).reshape(-1)[terms[0].start : terms[0].stop])
    if any(row.shape != (units,) for row in rows):
        raise ValueError("peepholes must be as wide as the gates")
    return {"peepholes": np.stack(rows)}


def _norms(scope: Scope, step: Step, x: list[Term], h: list[Term], units: int) -> tuple[dict[str, Array], float]:
    """Return the arrays of a cell's layer normalisation, and its epsilon; empty without normalisation."""
    if not any(term.normed for term in (*x, *h)) and step.cell_norm is None:
        return {}, 0.0
    ends = (0, 2 * units, 3 * units) if step.kind == "gru" else (0, len(x) * units)
    if any(term.normed != ends for term in (*x, *h)) or (step.kind == "lstm") != (step.cell_norm is not None):
        raise ValueError("layer normalisation must apply to both products, and to an LSTM's c")
    epsilons = {term.epsilon for term in (*x, *h)} | ({step.cell_norm[2]} if step.cell_norm else set())
    arrays = {
        name: np.concatenate([np.asarray(scope.constant(t.gain)).reshape(-1)[t.start : t.stop] for t in terms])
        for name, terms in (("kernel_gain", x), ("recurrent_gain", h))
    }
    if step.cell_norm is not None:
        gain, bias = (np.asarray(scope.constant(name)) for name in step.cell_norm[:2])
        arrays |= {"cell_gain": gain, "cell_bias": bias}
    if len(epsilons) != 1:
        raise ValueError(f"the epsilons must be equal, found {sorted(epsilons)}")
    return arrays, epsilons.pop()


def _total(scope: Scope, part: Linear, units: int) -> Array:
    """Return the sum of the constants in a sum."""
    total = np.zeros(units, np.float64)
    for term in part.biases:
        total = total + array_of(scope, term)
    return total
