"""Finds cells that a graph decomposes: chains of steps, and single LSTM steps, as in files where a call is one step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cellstack.formats.onnx.cells import Operator
from cellstack.formats.onnx.file import Scope, declared, label, live_nodes, short
from cellstack.formats.onnx.graph import MOVES
from cellstack.formats.onnx.written_out.chains import cell_of, common, find_chains
from cellstack.formats.onnx.written_out.equations import Step, steps_of
from cellstack.formats.onnx.written_out.linear import Term, array_of
from cellstack.nodes.recurrent import Cell
from cellstack.spec import FormatError


def find_written_out(scope: Scope) -> Iterator[tuple[str, Operator]]:
    """Yield the decomposed cells of a graph, by name; each once, regardless of its number of steps.

    Raises:
        FormatError: a cell whose product of h can't be identified.
    """
    seen = set[frozenset[str]]()
    for chain in find_chains(scope):
        weights = frozenset((chain.inputs[0].weights, chain.recurrent))
        if weights in seen:
            continue
        seen.add(weights)
        try:
            cell = cell_of(scope, chain.steps[-1], chain.is_h, {})
        except ValueError:  # sums that look like a cell's, but whose matrices don't form a cell
            continue
        started = {f"initial_{part}": name for part, name in zip("hc", chain.starts, strict=False)}
        yield chain.name, Operator((cell,), "forward", False, "", started)
    for found in find_steps(scope, seen):
        yield found.name, Operator((found.cell,), "forward", False, "", {"initial_h": found.h.value})


class Found(NamedTuple):
    """A decomposed LSTM of a single step.

    `x` and `h` are its products, `h.value` and `step.c[1]` the names of its initial state.
    """

    name: str
    cell: Cell
    step: Step
    x: Term
    h: Term


def find_steps(scope: Scope, seen: set[frozenset[str]]) -> Iterator[Found]:
    """Yield the decomposed LSTMs of a single step, each once.

    Args:
        scope: the graph.
        seen: the pairs of weights already found; new ones are added.

    Raises:
        FormatError: see `find_written_out`.
    """
    for step in steps_of(scope, rows=True):
        terms = [term for gate in step.gates.values() for term in gate.products]
        weights = frozenset(term.weights for term in terms)
        if step.kind != "lstm" or weights in seen or len(weights) != 2:  # another step of the same LSTM
            continue
        seen.add(weights)
        h = _of_h(scope, step, terms)
        try:
            cell = None if h is None else cell_of(scope, step, lambda term, h=h: term.weights == h.weights, {})
        except ValueError:
            continue
        if cell is None or h is None:
            continue
        x = next(term for term in terms if term.weights != h.weights)
        yield Found(common(x.weights, h.weights) or label(step.node), cell, step, x, h)


def takes_states(scope: Scope) -> bool:
    """Whether a graph decomposes a single LSTM step that starts from inputs: a call is then one step."""
    given = {name for name in scope.inputs if name not in scope.initializers}
    if len(given) < 2:
        return False
    live = live_nodes(scope)  # the replaced nodes of loops are still there, but dead
    try:
        steps = [found for found in find_steps(scope, set()) if id(found.step.node) in live]
    except FormatError:  # an ambiguous product of h: reading the graph reports it
        return False
    return any({_root(scope, found.h.value), _root(scope, found.step.c[1])} <= given for found in steps)


def _root(scope: Scope, name: str) -> str:
    """Return the origin of a value, skipping operators that only move numbers."""
    seen = 0
    while seen < 1000:
        seen += 1
        node = scope.producers.get(name)
        if node is None or node.op_type not in MOVES or not node.input:
            break
        name = node.input[0]
    return name


def _of_h(scope: Scope, step: Step, terms: list[Term]) -> Term | None:
    """Return a product of h: its weights are square, and its origin is that of c_prev; None where there is none."""
    found = {}
    for term in terms:
        deep = array_of(scope, term).shape[1]
        if deep == term.stop - term.start:
            found[term.weights] = term
    if len(found) == 2:
        start, given = _root(scope, step.c[1]), {value.name: declared(value) for value in scope.graph.input}
        roots = {name: _root(scope, term.value) for name, term in found.items()}
        tests = (
            lambda root: root == start,
            lambda root: root in given,  # where x is computed, and h is an input
            lambda root: root in given and given[root] == given.get(start),  # like c
        )
        alike = ([name for name, root in roots.items() if test(root)] for test in tests)
        one = next((names for names in alike if len(names) == 1), [])
        found = {name: term for name, term in found.items() if name in one}
        if len(found) != 1:
            text = "can't distinguish the product of h from that of x: both have square weights"
            raise FormatError(f"{scope.model.path}: node {short(label(step.node))}: {text}")
    return next(iter(found.values()), None)
