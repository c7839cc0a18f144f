"""Whole ONNX graphs as Networks: axes are ordered, operators become nodes, and unsupported parts are listed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from cellstack.formats.build import Builder, ProblemsError, TooMuchError
from cellstack.formats.draft import Draft
from cellstack.formats.onnx.axes import INTEGERS, Axes
from cellstack.formats.onnx.cells import is_recurrent
from cellstack.formats.onnx.file import DOMAINS, Model, Scope, declared, label, live_nodes, short, uses
from cellstack.formats.onnx.fold import Broadcast, check_inputs, fold
from cellstack.formats.onnx.frames import EXAMPLE, Frame, input_of, lifted
from cellstack.formats.onnx.frames import HANDLERS as FRAME_HANDLERS
from cellstack.formats.onnx.inputs import roles, weight_inputs
from cellstack.formats.onnx.messages import line_of
from cellstack.formats.onnx.values import (
    Filled,
    Final,
    Flowing,
    Formula,
    Initial,
    Lengths,
    Moment,
    Remembered,
    Run,
    Squares,
    States,
    Symbols,
    Unknown,
    Vector,
)
from cellstack.graph import STATE, origin, state_of
from cellstack.layout import Array
from cellstack.network import Network
from cellstack.network.layouts import Layout, noted
from cellstack.nodes import Activation, GlobalPool, Merge, Node, Permute, Reduce, Reshape, Select
from cellstack.nodes.base import Shape
from cellstack.spec import DTYPES, FormatError

Handler = Callable[["Reader", Any, dict[str, Any], list[Any]], list[Any]]
SHAPES = {
    "Add", "Cast", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal", "Floor", "Gather", "Identity", "Mul", "Reshape",
    "Shape", "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


class Refused(ValueError):  # noqa: N818
    """An operator that a Network can't run; the message says why."""


def floats(value: Any, what: str) -> Array:
    """Return a constant array of float32 or float64; `Refused` where it isn't one."""
    if isinstance(value, Broadcast) and value.uniform:
        value = value.array.reshape(())
    if not isinstance(value, np.ndarray):
        raise Refused(f"expected {what} to be constant")
    if value.dtype.name == "float16":
        value = value.astype(np.float32)
    if value.dtype.name not in DTYPES:
        raise Refused(f"expected {what} as floats, found {value.dtype}")
    return value


def steps_apart(reader: Reader) -> None:
    """Raise `Refused` if rows have lengths: ONNX's reductions over time include steps past the end of a row."""
    if reader.lengths:
        raise Refused("it also combines steps past the ends of rows, given by sequence_lens, which isn't supported")


class Reader:
    """Reads one graph, whose inputs' axes are known.

    Args:
        scope: the outermost graph.
        handlers: the function that reads each operator.
        axes: the roles of the values' axes.
        live: ids of the nodes that lead to an output.
        starts: inputs that hold initial states.
        lengths: inputs that hold the rows' lengths.
        frames: where a call is one step: how the data inputs relate to frames, or why they can't.
    """

    def __init__(
        self,
        scope: Scope,
        handlers: dict[str, Handler],
        axes: Axes,
        live: set[int],
        starts: set[str],
        lengths: set[str],
        frames: dict[str, Frame | str] | None = None,
    ) -> None:
        self.frames = frames
        self.rows: int | None = None  # the number of rows per call, where a call is one step
        self.scope, self.model, self.handlers, self.axes = scope, scope.model, handlers, axes
        self.builder = Builder(self.model.budget.most, self.model.budget.most)
        self.values: dict[str, Any] = {name: Lengths(name) for name in lengths}
        self.lengths, self.live, self.uses = lengths, live, uses(scope, live)
        self.runs: list[Run] = []
        self.starts: dict[Initial, Final] = {}  # which state each input state initialises
        self.start_axes: dict[str, tuple[str, ...]] = {}
        self.inputs: dict[str, str] = {}  # the axes of each data input
        self.layouts: list[Layout] = []  # the same with lengths
        shapes = {value.name: declared(value) or [] for value in scope.graph.input}
        kinds = {value.name: value.type.tensor_type.elem_type for value in scope.graph.input}
        self.ids: set[str] = set()  # wires that carry the integers of an input
        for name in sorted(starts):
            self.values[name] = self._start(name, axes.states[name], shapes[name])
        for name, frame in (frames or {}).items():
            if isinstance(frame, str):
                self.values[name] = self._unreadable(name, frame)
            else:
                self.rows = shapes[name][0] if frame.labels[0] == "B" else 1
                self.values[name] = input_of(self, name, frame, self.rows)
                self.inputs[name] = frame.labels
        if frames is not None:
            return
        for name, labels in axes.inputs.items():
            self.values[name] = self._data(name, labels, shapes[name])
            if name in self.inputs and kinds[name] in INTEGERS:
                self.ids.add(self.values[name].wire)
        batched = next((name for name in self.inputs if self.values[name].batch != 1), None)
        for name, labels in self.inputs.items():
            if batched is not None and "B" not in labels:
                found = f"like {short(batched)}, found {' '.join(labels)}"
                self.builder.refuse(f"input {short(name)}: expected a batch axis, {found}")

    def _unreadable(self, name: str, why: str) -> Unknown:
        """Return the value of an input that can't be read, and report it."""
        self.builder.refuse(f"input {short(name)}: {why}")
        return Unknown("", True)

    def _data(self, name: str, labels: str | None, shape: list[int | None]) -> Flowing | Unknown:
        """Return the value of a data input.

        Args:
            name: the input.
            labels: its axes.
            shape: its lengths; [] if its rank isn't declared.
        """
        if labels is None:
            return self._unreadable(name, self.axes.why_not(name))
        known = dict(zip(labels, shape or [None] * len(labels), strict=True))
        sizes = [n for label in "CF" if (n := known.get(label)) is not None]
        if "C" in labels:
            if len(sizes) < 2:
                return self._unreadable(name, "the lengths of its feature axes must be declared")
            known["F"] = prod(sizes)
        wire = self.builder.input(name, tuple(known[label] for label in "TF" if label in known))
        x = Flowing(wire, tuple(labels), self.shape(wire), known.get("B", 1))
        self.inputs[name] = labels
        if "C" not in labels:
            self.layouts.append(x.layout)
            return x
        self.layouts.append(replace(x, parts=tuple(zip("CF", sizes, strict=True))).layout)
        # Operators that don't know parts refuse a value without F.
        axes = tuple("G" if label == "F" else label for label in labels)
        return replace(x, axes=axes, parts=tuple(zip("CG", sizes, strict=True)))

    def _start(self, name: str, labels: str | None, shape: list[int | None]) -> States | Unknown:
        """Return the states that an input holds, indexed by its state axes."""
        if labels is None:
            return self._unreadable(name, f"expected states [.., B, H]: {self.axes.why_not(name)}")
        counts = [n for n, role in zip(shape, labels, strict=True) if role == "S"]
        ways = sum(1 + (self.model.attributes(n).get("direction") == "bidirectional") for n in self.scope.graph.node)
        sizes = [ways if n is None else n for n in counts]
        self.builder.make(prod(sizes))
        refs = np.empty(sizes, object)
        for place, at in enumerate(np.ndindex(*sizes)):
            refs[at] = Initial(name, place)
        self.start_axes[name] = tuple(labels)
        return States(tuple(labels), refs, None not in counts)

    # ── helpers of the handlers ───────────────────────────────────────────────────────────────────────────────────────

    def put(self, node: Any, made: Node, x: Flowing, *others: Flowing, axes: Sequence[str] | None = None) -> Flowing:
        """Add a node, and return its output.

        Args:
            node: the operator it comes from, or a name.
            made: the node.
            x: its first input.
            others: its other inputs.
            axes: those of its output; None = the axes of `x`.
        """
        self.builder.make(made.parameters)  # each node has its own copy, even of shared weights
        name = node if isinstance(node, str) else label(node)
        wire = self.builder.add(name, made, x.wire, *(other.wire for other in others))
        same = axes is None
        return Flowing(wire, x.axes if same else tuple(axes), self.shape(wire), x.batch, x.parts if same else ())

    def shape(self, wire: str) -> Shape:
        """Return the shape of a wire."""
        found = self.builder.shapes[wire]
        assert found is not None  # every input has one
        return found

    def value(self, name: str) -> Any:
        """Return the value of a name; None for an empty name."""
        if not name:
            return None
        if name not in self.values:
            constant = self.scope.constant(name)
            self.values[name] = Unknown(f"{short(name)} is unknown", True) if constant is None else constant
        return self.values[name]

    def flowing(self, value: Any, what: str = "its input") -> Flowing:
        """Return a value as a wire; `Refused` where it isn't data."""
        if isinstance(value, States):
            value = self.settled(value)
        if isinstance(value, Moment) and value.what == "mean":
            value = self.put(f"{value.of.wire}.mean", Reduce("mean", -1, keepdims=True), value.of)
        if isinstance(value, Squares):
            value = self.summed(value)
        if isinstance(value, Unknown):
            raise Refused(value.why)
        if isinstance(value, Filled):
            raise Refused(
                "after padding that depends on the number of steps, only a convolution over time is supported"
            )
        if not isinstance(value, Flowing):
            found = (
                "none" if value is None else "a constant" if isinstance(value, (np.ndarray, Broadcast)) else "another"
            )
            raise Refused(f"{what} must be data, found {found}")
        return value

    def summed(self, squares: Squares) -> Flowing:
        """Return a sum of squares as a wire."""
        made = [self.put(squares.name, Merge("mul"), part, part) for part in squares.parts]
        total = made[0] if len(made) == 1 else self.put(squares.name, Merge("add"), *made)
        if squares.epsilon:
            total = self.put(squares.name, Activation(f"affine(1.0, {squares.epsilon!r})"), total)
        return total

    def settled(self, ends: States) -> Flowing:
        """Return states as one wire: a single state, or the two directions of an operator concatenated."""
        refs = list(ends.refs.reshape(-1))
        if ends.initial:
            raise Refused(f"uses the input {short(refs[0].name)}, which holds initial states")
        if not refs:
            raise Refused("states are missing")
        if len(refs) > 2 or ends.computed:
            return self._in_turn(ends)
        run = self.runs[refs[0].operator]
        sizes = iter(ends.refs.shape)
        axes = tuple(axis if axis != "S" else "D" if next(sizes) == 2 else "1" for axis in ends.axes)
        if len(refs) == 1:
            return replace(self._end(refs[0]), axes=axes)
        if any(ref.part != "h" for ref in refs):
            return self.put(f"{run.in_order}.states", Merge("concat"), *map(self.state, refs), axes=axes)
        if not run.sequences and refs == [Final(refs[0].operator, way, "h") for way in range(len(run.cells))]:
            return Flowing(run.in_order, axes, self.shape(run.in_order))
        first, second = (self._end(ref) for ref in refs)
        if first.width != second.width:
            raise Refused("both states must have the same width")
        return self.put(f"{run.in_order}.states", Merge("concat"), first, second, axes=axes)

    def _in_turn(self, ends: States) -> Flowing:
        """Return states, and vectors among them, as one wire with the states as its steps."""
        if self.frames is not None or ends.axes.count("S") != 1 or "B" not in ends.axes:
            raise Refused("states combined with computed values aren't supported here")
        steps = []
        for ref in ends.refs.reshape(-1):
            flow = self.state(ref)
            steps.append(self.put(f"{flow.wire}.step", Reshape((1, -1)), flow, axes="BTF"))
        if len({step.width for step in steps}) != 1:
            raise Refused(f"expected values of the same width, found {[step.width for step in steps]}")
        axes = ["T" if axis == "S" else axis for axis in ends.axes]
        return self.put(f"{steps[0].wire}.joined", Merge("concat", axis=1), *steps, axes=axes)

    def state(self, ref: Final | Vector) -> Flowing:
        """Return a final state as an output of its node; a vector is returned unchanged."""
        if isinstance(ref, Vector):
            return Flowing(ref.wire, ("B", "F"), self.shape(ref.wire))
        run = self.runs[ref.operator]
        wire = state_of(run.node, ref.part if len(run.cells) == 1 else f"{ref.way}/{ref.part}")
        return Flowing(wire, ("B", "F"), self.shape(wire))

    def _end(self, ref: Final) -> Flowing:
        """Return a final state; an h is taken from the output sequence where possible."""
        run = self.runs[ref.operator]
        if ref.part != "h" or len(self.builder.sources[run.node]) > 1:  # such a node can't be streamed in any case
            return self.state(ref)
        width = run.cells[ref.way].spec.output_size
        if self.frames is not None:  # a call is one step: its h is the output
            return Flowing(run.node, ("B", "F"), self.shape(run.node), self.rows)
        h = Flowing(run.node, ("B", "T", "F") if run.sequences else ("B", "F"), self.shape(run.node))
        if len(run.cells) == 2:
            h = self.put(f"{run.node}.h", Select(ref.way * width, (ref.way + 1) * width, axis=-1), h)
        if run.sequences and ref.way == 1:
            h = self.put(f"{run.node}.first", Select(0, 1), h)
        return self.put(f"{run.node}.last", GlobalPool("last"), h, axes=("B", "F")) if run.sequences else h

    # ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self) -> None:
        """Read every node that leads to an output; unsupported ones are added to `problems`."""
        for node in self.scope.graph.node:
            open_ = any(name and self.scope.constant(name) is None for name in node.output)
            if id(node) in self.live and (open_ or self._has_shape(node)):
                made = self._read(node)
                for name, value in zip(node.output, made, strict=False):
                    if name:
                        self.values[name] = value

    def _has_shape(self, node: Any) -> bool:
        """Return whether a node is a ConstantOfShape whose shape the reader has computed."""
        constant = node.op_type == "ConstantOfShape" and isinstance(self.scope.constant(node.output[0]), Broadcast)
        return constant and isinstance(self.value(node.input[0]), np.ndarray)

    def _read(self, node: Any) -> list[Any]:
        values = [self.value(name) for name in node.input]
        reported = [value.reported for value in values if isinstance(value, Unknown)]
        ours = node.domain in DOMAINS or is_recurrent(node)
        handler = self.handlers.get(node.op_type) if ours else None
        if self.frames is not None and ours:
            handler = FRAME_HANDLERS.get(node.op_type, handler)
        try:
            check_inputs(node.op_type, [bool(name) for name in node.input])
            if not any(reported) and all(
                isinstance(v, (np.ndarray, Broadcast, Symbols, Unknown, type(None))) for v in values
            ):
                return self._symbols(node, self.model.attributes(node), values)
            if handler is None:
                domain = f" of {node.domain}" if node.domain not in DOMAINS else ""
                raise Refused(f"the operator{domain} isn't supported")
            if any(reported):
                return [Unknown("", True)] * len(node.output)
            made = handler(self, node, self.model.attributes(node), values)
            return [*made, *[Unknown("the output isn't supported", False)] * (len(node.output) - len(made))]
        except TooMuchError as error:
            raise FormatError(f"{self.model.path}: {node.op_type} {short(label(node))}: {error}") from None
        except FormatError as error:
            self._refuse(node, str(error).removeprefix(f"{self.model.path}: "))
        except ValueError as error:
            self._refuse(node, f"{short(label(node))}: {self.axes.problems.get(id(node), str(error)[:300])}")
        except (TypeError, LookupError, ArithmeticError) as error:
            self._refuse(node, f"{short(label(node))}: {type(error).__name__}: {str(error)[:200]}")
        return [Unknown("", True)] * len(node.output)

    def _symbols(self, node: Any, attributes: dict[str, Any], values: list[Any]) -> list[Any]:
        """Return a node's outputs for constants and lengths that aren't known yet."""
        unknown = [Unknown(f"the output of {node.op_type} {short(label(node))} is unknown", False)]
        if node.op_type not in SHAPES or any(isinstance(value, (Broadcast, Unknown)) for value in values):
            return unknown * len(node.output)
        if node.op_type == "Cast":
            kind = float if attributes.get("to") in (1, 10, 11) else int
            return [_cast(values[0], kind)]
        arrays = [value.array if isinstance(value, Symbols) else value for value in values]
        negative = [array.dtype.kind == "i" and bool((array < 0).all()) for array in arrays if array is not None]
        if node.op_type == "Equal" and not any(negative):
            return unknown  # lengths that aren't known are only sure to differ from negative numbers
        try:
            made = fold(node.op_type, attributes, arrays, [bool(n) for n in node.input], len(node.output), self.model)
        except TypeError:  # arithmetic on unknown lengths
            made = None
        return unknown * len(node.output) if made is None else [_settled(np.asarray(array, object)) for array in made]

    def _refuse(self, node: Any, text: str) -> None:
        where = line_of(node)
        self.builder.refuse(f"{node.op_type} {text}" + (f" ({where})" if where else ""))

    def network(self) -> Network:
        """Return the network; its metadata describes all inputs and outputs of the graph."""
        axes: dict[str, str] = {}
        layouts: list[Layout] = []
        values = {value.name: self.value(value.name) for value in self.scope.graph.output}
        after = {
            name: value
            for name, value in values.items()
            if isinstance(value, States) and not value.initial and not value.computed
        }
        data = self._data_outputs(values, after)
        for name, value in values.items():
            if name not in data or (isinstance(value, Unknown) and value.reported):
                continue
            try:
                flow = self._as_output(value)
            except Refused as error:
                self.builder.refuse(f"output {short(name)}: {error}")
                continue
            axes[name] = "".join(flow.axes)
            layouts.append(flow.layout)
            if self.frames is None:  # else one output per frame
                if self.model.said and axes[name] in ("BFT", "FT"):  # the network that we wrote ends in a Permute
                    flow = self.put(f"{name}.transposed", Permute((2, 1)), flow)
                elif axes[name] in ("B1F", "BF1"):
                    flow = self.put(f"{name}.shaped", Reshape((1, -1) if axes[name] == "B1F" else (-1, 1)), flow)
            self.builder.output(flow.wire, name)
        states = {name: list(value.refs.reshape(-1)) for name, value in after.items() if name not in data}
        held = {name: "".join(labels) for name, labels in self.start_axes.items()}
        frames: dict[str, Any] = {}
        if self.frames is not None:
            contexts = {name: frame.context for name, frame in self.frames.items() if isinstance(frame, Frame)}
            by_rows = any("B" not in value.axes for value in after.values())
            frames = {"context": contexts, "steps": "rows" if by_rows else "calls"}
        ends = {
            "inputs": self.inputs,
            "outputs": axes,
            "lengths": sorted(self.lengths),
            "unused": list(self.model.unused),
            "state_axes": held | {name: "".join(after[name].axes) for name in states},
            "frames": frames,
            "unrolled": dict(self.model.unrolled),
            "branches": list(self.model.branches),
            "given": dict(self.model.given),
        }
        ends = {key: entries for key, entries in ends.items() if entries or key in ("inputs", "outputs")}
        own = {**self.model.said.get("metadata", {}), "source": self.model.source}
        self.builder.check()
        builder = self.builder if self.frames is None else lifted(self.builder)

        def metadata(draft: Draft) -> dict[str, Any]:
            moved = {}
            if not self.model.said and self.frames is None:  # our own files have the network's axes
                given = dict(zip(builder.inputs, self.layouts, strict=True))
                moved = noted("file", given, dict(zip(draft.outputs, layouts, strict=True)))
            return {**own, **moved, "onnx": ends | self._states(draft, states) | _memories(draft, values)}

        return builder.network(metadata)

    def _data_outputs(self, values: dict[str, Any], after: dict[str, States]) -> set[str]:
        """Return the names of the graph's outputs that become outputs of the network.

        Args:
            values: all outputs.
            after: those that are final states.
        """
        data = {name for name in values.keys() - after.keys() if not isinstance(values[name], Remembered)}
        taken = {source for sources in self.builder.sources.values() for source in sources}
        flows = [value.of if isinstance(value, Moment) else value for value in values.values()]
        taken |= {flow.wire for flow in flows if isinstance(flow, Flowing)}
        exported = {origin(wire) for wire in taken if STATE in wire}
        taken |= {run.in_order for run in self.runs if run.node in exported}
        for number, run in enumerate(self.runs):
            if run.in_order not in taken:  # only its final h or c is used: that is data, not just a state
                parts = run.cells[0].spec.state_sizes
                wanted = [name for part in parts for name, value in after.items() if _is_all(value, part, number)]
                data.update(wanted[:1])
        if self.model.said:
            data |= values.keys() - {end for _, end in self.model.said["states"]}
        return data

    def _as_output(self, value: Any) -> Flowing:
        """Return a value with feature axes F, or C and F; `Refused` where it can't be an output of a network."""
        from cellstack.formats.onnx.grids import in_order  # imported here because it imports this module

        flow = self.flowing(value)
        if flow.parts:
            flow = in_order(self, flow)
            if len(flow.parts) > 2:
                raise Refused(f"expected at most two feature axes, found {len(flow.parts)}")
            names = dict(zip((part for part, _ in flow.parts), "CF", strict=True))
            parts = tuple((names[part], size) for part, size in flow.parts)
            flow = replace(flow, axes=tuple(names.get(axis, axis) for axis in flow.axes), parts=parts)
        if "M" in flow.axes:
            raise Refused("an output with time and batch in one axis isn't supported")
        return flow

    def _states(self, draft: Draft, ends: dict[str, list[Final]]) -> dict[str, Any]:
        """Return which states each output and input holds.

        A state is identified by the index of its node among those with cells, the index of its cell, and its name.
        """
        celled = [name for name, node in draft.nodes.items() if node.cells]
        numbers = {name: number for number, name in enumerate(celled)}

        def named(ref: Final | None) -> list[Any] | None:
            name = "" if ref is None else self.runs[ref.operator].node
            name, first = draft.cells.get(name, (name, 0))
            return None if ref is None or name not in numbers else [numbers[name], first + ref.way, ref.part]

        starts = {}
        for name in self.start_axes:
            found = {initial.place: named(ref) for initial, ref in self.starts.items() if initial.name == name}
            starts[name] = [found.get(place) for place in range(max(found, default=-1) + 1)]
        states = {name: [named(ref) for ref in refs] for name, refs in ends.items()}
        for name, refs in states.items():
            if None in refs:
                raise Refused(f"output {short(name)}: a state of a cell that no other output depends on")
        return {"states": states} | ({"starts": starts} if starts else {})


def _memories(draft: Draft, values: dict[str, Any]) -> dict[str, Any]:
    """Return which outputs hold states of memories: for each, the index of its node among those, and the part."""
    numbers = {name: number for number, name in enumerate(name for name, node in draft.nodes.items() if node.memory)}
    ends = {
        name: [numbers[value.node], value.part]
        for name, value in values.items()
        if isinstance(value, Remembered) and value.node in numbers
    }
    return {"memories": ends} if ends else {}


def _is_all(ends: States, part: str, operator: int) -> bool:
    """Whether all states are the given part, such as h, and some belong to the given operator."""
    refs = ends.refs.reshape(-1)
    return all(ref.part == part for ref in refs) and any(ref.operator == operator for ref in refs)


def _cast(value: Any, kind: type) -> Any:
    """Return lengths that are formulas in another type; return other values unchanged."""
    if not isinstance(value, Symbols):
        return value
    entries = [entry.cast(kind) if isinstance(entry, Formula) else entry for entry in value.array.reshape(-1)]
    made = np.empty(len(entries), object)
    made[:] = entries
    return Symbols(made.reshape(value.array.shape))


def _settled(array: Any) -> Any:
    """Return lengths as integers where all of them are known."""
    for place, entry in np.ndenumerate(array):
        if isinstance(entry, Formula) and isinstance(entry.run(1), int):
            known = entry.constant()
            array[place] = entry if known is None else known
    if all(isinstance(entry, (int, np.integer)) for entry in array.reshape(-1)):
        return array.astype(np.int64)
    return Symbols(array)


# ── the graph as a whole ──────────────────────────────────────────────────────────────────────────────────────────────


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
    axes = Axes(scope, live, starts, lengths, frames is not None)
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
        return reader.network()
    except ProblemsError as error:
        raise FormatError(f"{model.path}: the graph can't be read as a Network, found: {error}") from None
    except TooMuchError as error:
        raise FormatError(f"{model.path}: {error}") from None
    except (ValueError, TypeError) as error:
        raise FormatError(f"{model.path}: {str(error)[:300]}") from None
