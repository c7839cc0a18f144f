"""Cells that a graph writes out: chains of steps, and LSTMs of one step alone, as where they run frame by frame."""

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
    """Give the cells that a graph writes out, by name; each once, however many steps of it there are.

    Raises:
        FormatError: one of which it can't be told which product is that of h.
    """
    seen = set[frozenset[str]]()
    for chain in find_chains(scope):
        weights = frozenset((chain.inputs[0].weights, chain.recurrent))
        if weights in seen:
            continue
        seen.add(weights)
        try:
            cell = cell_of(scope, chain.steps[-1], chain.is_h, {})
        except ValueError:  # sums that look like a cell's, of matrices that no cell has
            continue
        started = {f"initial_{part}": name for part, name in zip("hc", chain.starts, strict=False)}
        yield chain.name, Operator((cell,), "forward", False, "", started)
    for found in find_steps(scope, seen):
        yield found.name, Operator((found.cell,), "forward", False, "", {"initial_h": found.h.value})


class Found(NamedTuple):
    """An LSTM that a graph writes out for one step.

    `x` and `h` are its products, `h.value` and `step.c[1]` the names of what it starts from.
    """

    name: str
    cell: Cell
    step: Step
    x: Term
    h: Term


def find_steps(scope: Scope, seen: set[frozenset[str]]) -> Iterator[Found]:
    """Give the LSTMs that a graph writes out for one step alone, each once.

    Args:
        scope: the graph.
        seen: the pairs of weights that are known already, to which theirs are added.

    Raises:
        FormatError: see `find_written_out`.
    """
    for step in steps_of(scope, rows=True):
        terms = [term for gate in step.gates.values() for term in gate.products]
        weights = frozenset(term.weights for term in terms)
        if step.kind != "lstm" or weights in seen or len(weights) != 2:  # one more step of the same LSTM
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
    """Whether a graph writes an LSTM out for one step that starts from inputs: a call is one step then."""
    given = {name for name in scope.inputs if name not in scope.initializers}
    if len(given) < 2:
        return False
    live = live_nodes(scope)  # what a loop that was rolled up consisted of is still there, and leads nowhere
    try:
        steps = [found for found in find_steps(scope, set()) if id(found.step.node) in live]
    except FormatError:  # which product is that of h can't be told, which is said where it is read
        return False
    return any({_root(scope, found.h.value), _root(scope, found.step.c[1])} <= given for found in steps)


def _root(scope: Scope, name: str) -> str:
    """Return what a value is a part of, past whatever only moves numbers."""
    seen = 0
    while seen < 1000:
        seen += 1
        node = scope.producers.get(name)
        if node is None or node.op_type not in MOVES or not node.input:
            break
        name = node.input[0]
    return name


def _of_h(scope: Scope, step: Step, terms: list[Term]) -> Term | None:
    """Return a product of h: its weights are square, and it comes from where c_prev comes from; None where none is."""
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
            lambda root: root in given,  # where x is computed, and h is given
            lambda root: root in given and given[root] == given.get(start),  # as c is
        )
        alike = ([name for name, root in roots.items() if test(root)] for test in tests)
        one = next((names for names in alike if len(names) == 1), [])
        found = {name: term for name, term in found.items() if name in one}
        if len(found) != 1:
            text = "expected to tell the product of h from that of x, found two that could be either"
            raise FormatError(f"{scope.model.path}: node {short(label(step.node))}: {text}")
    return next(iter(found.values()), None)
