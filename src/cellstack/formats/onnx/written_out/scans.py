"""Reads a Scan as a cell: its body computes one step of the cell, regardless of which exporter wrote it.

The body maps the states and x to the states and y, which is h. Before the output, h may be projected, and both states
may keep a share of their previous value (zoneout). Where a description in the body describes the same cell, it takes
precedence: its numbers aren't rounded to float32.

Ref: ONNX, Operators.md, Scan.
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import numpy as np

from cellstack.formats.onnx.cells import Operator
from cellstack.formats.onnx.file import DOMAINS, Scope, label, short
from cellstack.formats.onnx.fold import numbers
from cellstack.formats.onnx.written_out.chains import cell_of
from cellstack.formats.onnx.written_out.equations import Matcher, Step, bare
from cellstack.formats.onnx.written_out.linear import Term, inputs_of, pairs, scalar
from cellstack.layout import Array
from cellstack.nodes.recurrent import Cell
from cellstack.spec import CellSpec, FormatError

FIRST_OPSET = 9  # earlier, a Scan had other inputs
KNOWN = {
    "body", "num_scan_inputs", "scan_input_axes", "scan_input_directions", "scan_output_axes", "scan_output_directions"
}  # fmt: skip


def is_scan(node: Any) -> bool:
    """Whether a node is a Scan."""
    return node.domain in DOMAINS and node.op_type == "Scan"


def read_scan(scope: Scope, node: Any) -> Operator:
    """Return as an operator a Scan whose body is a step of a cell.

    Args:
        scope: the graph that the Scan is in.
        node: the Scan.

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
    counts = (len(body.input), len(body.output), len(node.input), len(node.output))
    if len(set(counts)) != 1 or counts[0] not in (2, 3):
        raise FormatError(f"{where}: expected a step of a cell: one or two states, x and y, found {counts}")
    starts: dict[str, Array] = {}
    for part, name in zip("hc", node.input[:-1], strict=False):
        array = numbers(scope.constant(name))
        if isinstance(array, np.ndarray):
            rows = array.reshape(-1, array.shape[-1]) if array.size else array
            if not array.size or (rows != rows[:1]).any():
                raise FormatError(f"{where}: the rows of the initial {part} must be equal")
            starts[part] = rows[0]
    started = {f"initial_{part}": name for part, name in zip("hc", node.input[:-1], strict=False) if part not in starts}
    starts = starts if any(one.any() for one in starts.values()) else {}
    try:
        cell = _cell(Scope(scope.model, body, scope, label(node)), starts)
    except ValueError as error:
        text = str(error).removeprefix(f"{scope.model.path}: ")[:300]
        raise FormatError(f"{where}: the body isn't a step of a cell without a mask: {text}") from None
    direction = "reverse" if way[0] == [1] else "forward"
    return Operator((_as_described(cell, body.doc_string),), direction, False, "", started)


def _cell(scope: Scope, starts: dict[str, Array]) -> Cell:
    """Return the cell whose step a graph computes; `ValueError` where it isn't a cell."""
    *states, x = (value.name for value in scope.graph.input)
    *ends, y = (bare(scope, value.name) for value in scope.graph.output)
    if y != ends[0]:
        raise ValueError("y isn't the new h")
    flags: dict[str, Any] = {"learn_initial_state": bool(starts)}
    for name, n in zip(("zoneout", "zoneout_cell"), range(len(states)), strict=False):
        ends[n], kept = _kept(scope, ends[n], states[n])
        if kept:
            flags[name] = kept
    arrays = {f"initial_{name}": start for name, start in starts.items()}
    step, projection = _step(scope, ends, states)
    if projection is not None:
        arrays["projection"], flags["proj_size"] = projection, projection.shape[1]

    def is_h(term: Term) -> bool:
        value = bare(scope, term.value)
        if value not in (x, states[0], bare(scope, step.reset)) or term.moves:
            raise ValueError("a product of a value other than x and h")
        return value != x

    if step.kind == "gru" and bare(scope, step.h) != states[0]:
        raise ValueError("a GRU that mixes its candidate with a value other than h")
    if step.reset and states[0] not in [bare(scope, other) for _, other in pairs(scope, step.reset, "Mul")]:
        raise ValueError("a reset gate on a value other than h")
    if step.kind == "lstm" and (bare(scope, step.c[0]), bare(scope, step.c[1])) != (ends[1], states[1]):
        raise ValueError("an LSTM whose c isn't the state")
    return cell_of(scope, step, is_h, flags, **arrays)


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


def _step(scope: Scope, ends: list[str], states: list[str]) -> tuple[Step, Array | None]:
    """Return the step that computes h, and the projection of h."""
    match, name, projection = Matcher(scope, within_loop=True), ends[0], None
    if len(states) == 2:
        product = inputs_of(scope, name, "MatMul")
        if product:
            found = scope.constant(product[1])
            name, projection = bare(scope, product[0]), found if isinstance(found, np.ndarray) else None
    node = scope.producers.get(name)
    step = None if node is None else match.lstm(node) if len(states) == 2 else match.gru(node) or match.rnn(node)
    if step is None:
        raise ValueError(f"{short(name)} isn't computed from gates as in a cell")
    return step, projection


def _as_described(cell: Cell, text: str) -> Cell:
    """Return a cell with the spec of a description, where both describe the same cell."""
    try:
        described = CellSpec(**json.loads(text), learn_initial_state=cell.spec.learn_initial_state)
    except (ValueError, TypeError, RecursionError):
        return cell
    return replace(cell, spec=described) if _settings(described) == _settings(cell.spec) else cell


def _settings(spec: CellSpec) -> dict[str, Any]:
    """Return the settings of a spec, numbers rounded to float32, activations by gate."""
    words = {entry.name: getattr(spec, entry.name) for entry in fields(spec) if "activation" not in entry.name}
    words |= dict(zip(spec.slots, spec.activations, strict=True))
    if spec.coupled:
        del words["f"]
    rounded = {name: np.float32(value) for name, value in words.items() if isinstance(value, float)}
    texts = {slot: (words[slot].name, *map(np.float32, words[slot][1:])) for slot in spec.slots if slot in words}
    return words | rounded | texts
