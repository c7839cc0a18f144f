"""Reads a Scan as a cell: its body computes one step of the cell, regardless of which exporter wrote it.

The body maps the states and x to the states and y, which is h; h and c may keep a share of their previous value
(zoneout). Where a description in the body describes the same cell, it takes
precedence: its numbers aren't rounded to float32.

Ref: ONNX, Operators.md, Scan.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import numpy as np

from cellstack.cells import KINDS
from cellstack.cells.errors import FormatError
from cellstack.cells.layout import Array
from cellstack.cells.spec import CellSpec
from cellstack.formats.onnx.cells import Operator
from cellstack.formats.onnx.decomposed.linear import Term, pairs, scalar
from cellstack.formats.onnx.decomposed.match import Matcher, cell_of, forms
from cellstack.formats.onnx.decomposed.sums import bare
from cellstack.formats.onnx.file import DOMAINS, Scope, label, onnx_package, short
from cellstack.formats.onnx.fold import numbers
from cellstack.nodes.cell_arrays import Cell

FIRST_OPSET = 9  # earlier, a Scan had other inputs
KNOWN = {
    "body", "num_scan_inputs", "scan_input_axes", "scan_input_directions", "scan_output_axes", "scan_output_directions"
}  # fmt: skip


def is_scan(node: Any) -> bool:
    """Whether a node is a Scan."""
    return node.domain in DOMAINS and node.op_type == "Scan"


def read_scan(scope: Scope, node: Any) -> Operator:
    """Return as an operator a Scan whose body is a step of a cell.

    Raises:
        FormatError: its body isn't a step of a cell.
    """
    where = f"{scope.model.path}: node {short(label(node))}"
    attributes = scope.model.attributes(node)
    way = [attributes.get(f"scan_{end}_directions", [0]) for end in ("input", "output")]
    flat = all(attributes.get(f"scan_{end}_axes", [0]) == [0] for end in ("input", "output"))
    if scope.model.opset < FIRST_OPSET or attributes.keys() - KNOWN or attributes.get("num_scan_inputs") != 1:
        raise FormatError(f"{where}: expected a Scan over one sequence, in opset {FIRST_OPSET} or later")
    if not flat or way[0] != way[1] or way[0] not in ([0], [1]):
        raise FormatError(f"{where}: inputs and outputs must run in the same direction, along the first axis")
    body: Any = attributes["body"]
    if not isinstance(body, onnx_package().GraphProto):
        raise FormatError(f"{where}: expected a graph as its body")
    counts = (len(body.input), len(body.output), len(node.input), len(node.output))
    if len(set(counts)) != 1 or counts[0] < 2:
        raise FormatError(f"{where}: expected a step of a cell: states, x and y, found {counts}")
    starts: list[Array | None] = []
    for name in node.input[:-1]:
        array = numbers(scope.constant(name))
        rows = array.reshape(-1, array.shape[-1]) if isinstance(array, np.ndarray) and array.size else array
        if isinstance(rows, np.ndarray) and (not rows.size or (rows != rows[:1]).any()):
            raise FormatError(f"{where}: the rows of the initial states must be equal")
        starts.append(rows[0] if isinstance(rows, np.ndarray) else None)
    try:
        cell = _cell(Scope(scope.model, body, scope, label(node)), starts)
    except ValueError as error:
        text = str(error).removeprefix(f"{scope.model.path}: ")[:300]
        raise FormatError(f"{where}: the body isn't a step of a cell without a mask: {text}") from None
    given = zip(cell.spec.state_sizes, node.input, starts, strict=False)
    started = {f"initial_{state}": name for state, name, start in given if start is None}
    direction = "reverse" if way[0] == [1] else "forward"
    return Operator((_as_described(cell, body.doc_string),), direction, False, "", started)


def _cell(scope: Scope, starts: list[Array | None]) -> Cell:
    """Return the cell whose step a graph computes; `ValueError` where it isn't a cell."""
    *before, x = (value.name for value in scope.graph.input)
    *ends, y = (bare(scope, value.name) for value in scope.graph.output)
    if y != ends[0]:
        raise ValueError("y isn't the new h")
    flags: dict[str, Any] = {"learn_initial_state": any(start is not None and start.any() for start in starts)}
    whole = [(end, 0.0) for end in ends]
    without = [_kept(scope, end, state) for end, state in zip(ends, before, strict=True)]
    matcher = Matcher(scope, within_loop=True)
    for form in (form for kind in KINDS.values() if len(kind.state._fields) == len(before) for form in forms(kind)):
        names, rates = form.kind.state._fields, form.kind.zoneout
        found = [without[n] if name in rates else whole[n] for n, name in enumerate(names)]
        after = {name: end for name, (end, _) in zip(names, found, strict=True)}
        kept = {rates[name]: share for name, (_, share) in zip(names, found, strict=True) if share}
        bound = {form.x: Term(x, "", False, 0, 0)} | dict(zip(form.before.values(), before, strict=True))
        for step in matcher.steps(form, scope.producers.get(after["h"]), after, bound):
            given = zip(names, starts, strict=True)
            arrays = {f"initial_{name}": start for name, start in given if start is not None}
            return cell_of(scope, step, flags | kept, **(arrays if flags["learn_initial_state"] else {}))
    raise ValueError(f"{short(ends[0])} isn't computed from gates as in a cell")


def _kept(scope: Scope, name: str, before: str) -> tuple[str, float]:
    """Return a state without its zoneout, and the zoneout rate."""
    for old, new in pairs(scope, name, "Add"):
        for state, share in pairs(scope, old, "Mul"):
            for value, rest in pairs(scope, new, "Mul"):
                kept, left = scalar(scope, share), scalar(scope, rest)
                whole = kept is not None and left is not None and np.isclose(kept + left, 1.0, rtol=0, atol=1e-6)
                if bare(scope, state) == before and whole and kept is not None:
                    return bare(scope, value), kept
    return name, 0.0


def _as_described(cell: Cell, text: str) -> Cell:
    """Return a cell with the spec of a description, where both describe the same cell."""
    try:
        described = CellSpec(**json.loads(text), learn_initial_state=cell.spec.learn_initial_state)
    except (ValueError, TypeError, RecursionError):
        return cell
    return Cell(described, **cell.stored_arrays) if _settings(described) == _settings(cell.spec) else cell


def _settings(spec: CellSpec) -> dict[str, Any]:
    """Return the settings of a spec, numbers rounded to float32, activations by gate."""
    words = {entry.name: getattr(spec, entry.name) for entry in fields(spec) if "activation" not in entry.name}
    words |= dict(zip(spec.slots, spec.activations, strict=True))
    words = {name: word for name, word in words.items() if name in spec.gates or name not in spec.of_kind.gates}
    rounded = {name: np.float32(value) for name, value in words.items() if isinstance(value, float)}
    texts = {slot: (words[slot].name, *map(np.float32, words[slot][1:])) for slot in spec.slots if slot in words}
    return words | rounded | texts
