"""Finds cells that a graph decomposes: chains of steps, and single steps, as in files where a call is one step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations, product
from typing import Any

from cellstack.cells import KINDS
from cellstack.cells.errors import FormatError
from cellstack.formats.build import errors_of
from cellstack.formats.onnx import file
from cellstack.formats.onnx.cells import Operator
from cellstack.formats.onnx.decomposed.chains import find_chains, name_of
from cellstack.formats.onnx.decomposed.lengths import fix_lengths
from cellstack.formats.onnx.decomposed.linear import Term, array_of
from cellstack.formats.onnx.decomposed.match import Matcher, Step, cell_of, forms, steps_of
from cellstack.formats.onnx.decomposed.norms import expand_norms
from cellstack.formats.onnx.decomposed.sums import origin, stripped
from cellstack.formats.onnx.file import Scope, declared, label, live_nodes, short
from cellstack.formats.onnx.inputs import MOVES
from cellstack.formats.onnx.specialize import specialize
from cellstack.nodes.cell_arrays import Cell


def find_decomposed(scope: Scope) -> Iterator[tuple[str, Operator]]:
    """Yield the decomposed cells of a graph, by name; each once, regardless of its number of steps.

    Raises:
        FormatError: a cell whose product of h can't be identified.
    """
    seen = set[frozenset[Any]]()
    for chain in find_chains(scope):
        weights = chain.steps[0].matrices
        if weights in seen:
            continue
        seen.add(weights)
        try:
            cell = cell_of(scope, chain.steps[-1], {})
        except ValueError:  # sums that look like a cell's, but whose matrices don't form a cell
            continue
        yield chain.name, Operator((cell,), "forward", False, "", _started(chain.steps[0]))
    for name, cell, step in find_steps(scope, seen):
        yield name, Operator((cell,), "forward", False, "", _started(step))


def _started(step: Step) -> dict[str, str]:
    return {f"initial_{state}": name for state, name in step.before.items()}


def find_steps(scope: Scope, seen: set[frozenset[Any]]) -> Iterator[tuple[str, Cell, Step]]:
    """Yield the decomposed cells of a single step, each once, as `seen` grows: its name, the cell and the step.

    Only kinds with further states than h are found: a layer of two products is a step of the others.

    Raises:
        FormatError: see `find_decomposed`.
    """
    for readings in steps_of(scope, rows=True, states=2):
        matrices = readings[0].matrices
        if matrices in seen:  # another step of the same cell
            continue
        seen.add(matrices)
        step = _with_h(scope, readings)
        try:
            cell = None if step is None else cell_of(scope, step, {})
        except ValueError:
            continue
        if cell is not None and step is not None:
            yield name_of(step), cell, step


def takes_states(scope: Scope) -> bool:
    """Whether a graph decomposes a single step that starts from inputs: a call is then one step."""
    given = set(scope.given)
    if len(given) < 2:
        return False
    live = live_nodes(scope)  # the replaced nodes of loops are still there, but dead
    try:
        steps = [step for _, _, step in find_steps(scope, set()) if id(step.node) in live]
    except FormatError:  # an ambiguous product of h: reading the graph reports it
        return False
    return any({_root(scope, name) for name in step.before.values()} <= given for step in steps)


def _root(scope: Scope, name: str) -> str:
    """Return the origin of a value, skipping operators that only move numbers."""
    return origin(scope, name, MOVES, 1000)


def _with_h(scope: Scope, readings: list[Step]) -> Step | None:
    """Return the reading in which h is multiplied by a square matrix, and has the origin of the other states, or one
    like it; None where there is none."""
    found = []
    for step in readings:
        matrix = array_of(scope, step.terms["recurrent_kernel", None, 0][0])
        found += [step] if matrix.shape[0] == matrix.shape[1] else []
    if len(found) == 2:
        first, given = found[0], {value.name: declared(value) for value in scope.graph.input}
        start = _root(scope, next(name for state, name in first.before.items() if state != "h"))
        roots = [_root(scope, step.before["h"]) for step in found]
        tests = (
            lambda root: root == start,
            lambda root: root in given,  # where x is computed, and h is an input
            lambda root: root in given and given[root] == given.get(start),  # like c
        )
        alike = ([step for step, root in zip(found, roots, strict=True) if test(root)] for test in tests)
        found = next((steps for steps in alike if len(steps) == 1), [])
        if not found:
            text = "can't distinguish the product of h from that of x: both have square weights"
            raise FormatError(f"{scope.model.path}: node {short(label(first.node))}: {text}")
    return found[0] if found else None


def cells_of_module(path: str, states: int) -> list[Cell]:
    """Return the cells in the graph of a hand-written module over one or a few steps, the bottom one first.

    Args:
        path: the ONNX file. Its inputs are x and the states.
        states: how many of its inputs are states.

    Raises:
        FormatError: it contains no cell; the message says which operator differs from those of a cell.
    """
    model = file.read(path)
    model = expand_norms(fix_lengths(specialize(model, {})))
    scope = model.scope()
    given = scope.given
    chains = find_chains(scope)
    if chains:
        with errors_of(path):  # gates whose weights have other shapes than a cell's
            return [cell_of(scope, chain.steps[-1], {}) for chain in chains]
    cell, differs = _single(scope, given[0], given[1:]) if len(given) == 1 + states else (None, "")
    if cell is None:
        raise FormatError(differs or "its graph has no step of a known cell")
    return [cell]


def _single(scope: Scope, x: str, before: list[str]) -> tuple[Cell | None, str]:
    """Return the cell whose step a graph is, and ""; or None, and a message with the operator that differs."""
    ends = list(dict.fromkeys(stripped(scope, value.name) for value in scope.graph.output))
    matcher, furthest = Matcher(scope, within_loop=True), (0, "")
    for form in (form for kind in KINDS.values() if len(kind.state._fields) == len(before) for form in forms(kind)):
        names = form.kind.state._fields
        for starts, after in product(permutations(before), permutations(ends, len(names))):
            node = scope.producers.get(after[0])
            bound: Any = {form.x: Term(x, "", False, 0, 0)} | dict(zip(form.before.values(), starts, strict=True))
            for step in matcher.steps(form, node, dict(zip(names, after, strict=True)), bound):
                return cell_of(scope, step, {}), ""
            depth, name = matcher.furthest
            if depth > furthest[0]:
                found = scope.producers.get(name)
                where = "an input" if found is None else f"the operator {found.op_type} {short(label(found))}"
                furthest = depth, f"{where} isn't that of a cell; the closest kind is {form.kind.title}"
    return None, furthest[1]
