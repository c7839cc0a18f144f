"""Whole ONNX graphs as Networks: their outputs, and what the metadata says about inputs, outputs and states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cellstack.cells.errors import FormatError
from cellstack.formats.build import ProblemsError, TooMuchError
from cellstack.formats.draft import Draft
from cellstack.formats.onnx.axes import Axes
from cellstack.formats.onnx.axis_rules import RULES
from cellstack.formats.onnx.file import Model, declared, live_nodes, short
from cellstack.formats.onnx.frames import EXAMPLE, Frame, lifted
from cellstack.formats.onnx.graph import Handler, Reader, Refused
from cellstack.formats.onnx.grids import in_order
from cellstack.formats.onnx.inputs import roles, weight_inputs
from cellstack.formats.onnx.values import Final, FinalMemory, Flowing, Moment, States, Unknown
from cellstack.network import Network
from cellstack.network.graph import STATE, origin
from cellstack.network.layouts import Layout, noted
from cellstack.nodes import Permute, Reshape


def load_graph(model: Model, handlers: dict[str, Handler], frames: dict[str, Frame | str] | None = None) -> Network:
    """Return a whole file as a Network.

    Args:
        model: the file.
        handlers: the function that reads each operator.
        frames: where a call is one step: how the inputs relate to frames; None = the file has a time axis.

    Raises:
        FormatError: unsupported parts; all of them are named.
    """
    scope = model.scope()
    starts, lengths = roles(scope)
    live = live_nodes(scope)
    axes = Axes(scope, RULES, live, starts, lengths, frames is not None)
    reader = Reader(scope, handlers, axes, live, starts, lengths, frames)
    for name in weight_inputs(scope) - starts - lengths:
        given = f"cs.load(path, weights={{{name!r}: ...}})"
        reader.builder.refuse(f"input {short(name)}: pass its weights when loading: {given}", -2)
    for value in scope.graph.input:
        if value.name not in scope.initializers and declared(value) == [] and value.name not in lengths:
            given = f"cs.load(path, constants={{{value.name!r}: ...}})"
            reader.builder.refuse(f"input {short(value.name)}: pass its number when loading: {given}", -2)
            reader.values[value.name] = Unknown("", True)
    reader.read()
    if not reader.inputs:
        reader.builder.refuse("no input")
    open_frames = [n for n, frame in (frames or {}).items() if isinstance(frame, Frame) and frame.size is None]
    if reader.builder.problems and open_frames:
        name = open_frames[0]
        example = EXAMPLE.format(name=name)
        reader.builder.refuse(f"input {short(name)}: the size of a frame is unknown; pass it: {example}", -1)
    try:
        return _network(reader)
    except ProblemsError as error:
        raise FormatError(f"{model.path}: the graph can't be read as a Network, found: {error}") from None
    except TooMuchError as error:
        raise FormatError(f"{model.path}: {error}") from None
    except (ValueError, TypeError) as error:
        raise FormatError(f"{model.path}: {str(error)[:300]}") from None


def _network(reader: Reader) -> Network:
    """Return the network; its metadata describes all inputs and outputs of the graph."""
    axes: dict[str, str] = {}
    layouts: list[Layout] = []
    values = {value.name: reader.value(value.name) for value in reader.scope.graph.output}
    after = {
        name: value
        for name, value in values.items()
        if isinstance(value, States) and not value.initial and not value.computed
    }
    data = _data_outputs(reader, values, after)
    for name, value in values.items():
        if name not in data or (isinstance(value, Unknown) and value.reported):
            continue
        try:
            flow = _as_output(reader, value)
        except Refused as error:
            reader.builder.refuse(f"output {short(name)}: {error}")
            continue
        axes[name] = "".join(flow.axes)
        layouts.append(flow.layout)
        if reader.frames is None:  # else one output per frame
            if reader.model.said and axes[name] in ("BFT", "FT"):  # the network that we wrote ends in a Permute
                flow = reader.put(f"{name}.transposed", Permute((2, 1)), flow)
            elif axes[name] in ("B1F", "BF1"):
                flow = reader.put(f"{name}.shaped", Reshape((1, -1) if axes[name] == "B1F" else (-1, 1)), flow)
        reader.builder.output(flow.wire, name)
    states = {name: list(value.refs.reshape(-1)) for name, value in after.items() if name not in data}
    held = {name: "".join(labels) for name, labels in reader.start_axes.items()}
    frames: dict[str, Any] = {}
    if reader.frames is not None:
        contexts = {name: frame.context for name, frame in reader.frames.items() if isinstance(frame, Frame)}
        by_rows = any("B" not in value.axes for value in after.values())
        frames = {"context": contexts, "steps": "rows" if by_rows else "calls"}
    ends = {
        "inputs": reader.inputs,
        "outputs": axes,
        "lengths": sorted(reader.lengths),
        "unused": list(reader.model.unused),
        "state_axes": held | {name: "".join(after[name].axes) for name in states},
        "frames": frames,
        "unrolled": dict(reader.model.unrolled),
        "branches": list(reader.model.branches),
        "given": dict(reader.model.given),
    }
    ends = {key: entries for key, entries in ends.items() if entries or key in ("inputs", "outputs")}
    own = {**reader.model.said.get("metadata", {}), "source": reader.model.source}
    reader.builder.check()
    builder = reader.builder if reader.frames is None else lifted(reader.builder)

    def metadata(draft: Draft) -> dict[str, Any]:
        moved = {}
        if not reader.model.said and reader.frames is None:  # our own files have the network's axes
            given = dict(zip(builder.inputs, reader.layouts, strict=True))
            moved = noted("file", given, dict(zip(draft.outputs, layouts, strict=True)))
        return {**own, **moved, "onnx": ends | _states(reader, draft, states) | _memories(draft, values)}

    return builder.network(metadata)


def _data_outputs(reader: Reader, values: dict[str, Any], after: dict[str, States]) -> set[str]:
    """Return the names of the graph's outputs that become outputs of the network: all but final states."""
    data = {name for name in values.keys() - after.keys() if not isinstance(values[name], FinalMemory)}
    taken = {source for sources in reader.builder.sources.values() for source in sources}
    flows = [value.of if isinstance(value, Moment) else value for value in values.values()]
    taken |= {flow.wire for flow in flows if isinstance(flow, Flowing)}
    exported = {origin(wire) for wire in taken if STATE in wire}
    taken |= {run.in_order for run in reader.runs if run.node in exported}
    for number, run in enumerate(reader.runs):
        if run.in_order not in taken:  # only its final h or c is used: that is data, not just a state
            parts = run.cells[0].spec.state_sizes
            wanted = [name for part in parts for name, value in after.items() if _is_all(value, part, number)]
            data.update(wanted[:1])
    if reader.model.said:
        data |= values.keys() - {end for _, end in reader.model.said["states"]}
    return data


def _as_output(reader: Reader, value: Any) -> Flowing:
    """Return a value with feature axes F, or C and F; `Refused` where it can't be an output of a network."""
    flow = reader.flowing(value)
    if flow.parts:
        flow = in_order(reader, flow)
        if len(flow.parts) > 2:
            raise Refused(f"expected at most two feature axes, found {len(flow.parts)}")
        names = dict(zip((part for part, _ in flow.parts), "CF", strict=True))
        parts = tuple((names[part], size) for part, size in flow.parts)
        flow = replace(flow, axes=tuple(names.get(axis, axis) for axis in flow.axes), parts=parts)
    if "M" in flow.axes:
        raise Refused("an output with time and batch in one axis isn't supported")
    return flow


def _states(reader: Reader, draft: Draft, ends: dict[str, list[Final]]) -> dict[str, Any]:
    """Return which states each output and input holds.

    A state is identified by the index of its node among those with cells, the index of its cell, and its name.
    """
    celled = [name for name, node in draft.nodes.items() if node.cells]
    numbers = {name: number for number, name in enumerate(celled)}

    def named(ref: Final | None) -> list[Any] | None:
        name = "" if ref is None else reader.runs[ref.operator].node
        name, first = draft.cells.get(name, (name, 0))
        return None if ref is None or name not in numbers else [numbers[name], first + ref.way, ref.part]

    starts = {}
    for name in reader.start_axes:
        found = {initial.place: named(ref) for initial, ref in reader.starts.items() if initial.name == name}
        starts[name] = [found.get(place) for place in range(max(found, default=-1) + 1)]
    states = {name: [named(ref) for ref in refs] for name, refs in ends.items()}
    for name, refs in states.items():
        if None in refs:
            raise Refused(f"output {short(name)}: a state of a cell that no other output depends on")
    return {"states": states} | ({"starts": starts} if starts else {})


def _memories(draft: Draft, values: dict[str, Any]) -> dict[str, Any]:
    """Return, for each output that is a part of a memory's state, the number of its `MLSTM` node, and the part."""
    numbers = {name: number for number, name in enumerate(name for name, node in draft.nodes.items() if node.memory)}
    ends = {
        name: [numbers[value.node], value.part]
        for name, value in values.items()
        if isinstance(value, FinalMemory) and value.node in numbers
    }
    return {"memories": ends} if ends else {}


def _is_all(ends: States, part: str, operator: int) -> bool:
    """Whether all states are the given part, such as h, and some belong to the given operator."""
    refs = ends.refs.reshape(-1)
    return all(ref.part == part for ref in refs) and any(ref.operator == operator for ref in refs)
