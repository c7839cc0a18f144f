"""Reads an ONNX graph: axes are ordered, operators become nodes, and unsupported parts are listed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from cellstack.cells.errors import FormatError
from cellstack.cells.layout import Array
from cellstack.cells.spec import DTYPES
from cellstack.formats.build import Builder, TooMuchError
from cellstack.formats.onnx.axes import INTEGERS, Axes
from cellstack.formats.onnx.cells import is_recurrent
from cellstack.formats.onnx.file import DOMAINS, Scope, declared, label, short, uses
from cellstack.formats.onnx.fold import Broadcast, check_inputs, fold
from cellstack.formats.onnx.frames import Frame, Step
from cellstack.formats.onnx.messages import line_of
from cellstack.formats.onnx.values import (
    Filled,
    Final,
    Flowing,
    Formula,
    Initial,
    Lengths,
    Moment,
    Run,
    Squares,
    States,
    Symbols,
    Unknown,
    Vector,
)
from cellstack.network.graph import state_of
from cellstack.network.layouts import Layout
from cellstack.nodes import Activation, Context, GlobalPool, Merge, Node, Reduce, Reshape, Select
from cellstack.nodes.base import Shape

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
                self.values[name] = self._frame(name, frame)
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

    def _frame(self, name: str, frame: Frame) -> Flowing:
        """Add an input of frames, and return the file's input: the context, then the frame."""
        wire = self.builder.input(name, (frame.size,))
        flow = Flowing(wire, tuple(frame.labels), self.shape(wire), self.rows)
        if frame.context:
            flow = self.put(f"{name}.context", Step(Context(frame.context)), flow)
        return flow

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

    def put(self, node: Any, new: Node, x: Flowing, *others: Flowing, axes: Sequence[str] | None = None) -> Flowing:
        """Add a node, and return its output.

        Args:
            node: the operator it comes from, or a name.
            new: the node.
            x: its first input.
            others: its other inputs.
            axes: those of its output; None = the axes of `x`.
        """
        self.builder.make(new.parameters)  # each node has its own copy, even of shared weights
        name = node if isinstance(node, str) else label(node)
        wire = self.builder.add(name, new, x.wire, *(other.wire for other in others))
        source = x.timed_by if "T" in x.axes and new.keeps_steps(len(x.shape)) else ""
        if axes is None:
            return Flowing(wire, x.axes, self.shape(wire), x.batch, x.parts, source)
        return Flowing(wire, tuple(axes), self.shape(wire), x.batch, source=source)

    def shape(self, wire: str) -> Shape:
        """Return the shape of a wire."""
        shape = self.builder.shapes[wire]
        assert shape is not None  # every input has one
        return shape

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
            known = {
                type(None): "none",
                np.ndarray: "a constant",
                Broadcast: "a constant",
                Symbols: "a number of steps or rows",
            }
            raise Refused(f"{what} must be data, found {known.get(type(value), 'another')}")
        return value

    def summed(self, squares: Squares) -> Flowing:
        """Return a sum of squares as a wire."""
        squared = [self.put(squares.name, Merge("mul"), part, part) for part in squares.parts]
        total = squared[0] if len(squared) == 1 else self.put(squares.name, Merge("add"), *squared)
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
        if self.frames is not None and self.rows != 1 and "B" not in ends.axes:
            raise Refused("the state after the last row isn't supported where each row is a step")
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
                outputs = self._read(node)
                for name, value in zip(node.output, outputs, strict=False):
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
            outputs = handler(self, node, self.model.attributes(node), values)
            return [*outputs, *[Unknown("the output isn't supported", False)] * (len(node.output) - len(outputs))]
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
            known = fold(node.op_type, attributes, arrays, [bool(n) for n in node.input], len(node.output), self.model)
        except TypeError:  # arithmetic on unknown lengths
            known = None
        return unknown * len(node.output) if known is None else [_settled(np.asarray(array, object)) for array in known]

    def _refuse(self, node: Any, text: str) -> None:
        where = line_of(node)
        self.builder.refuse(f"{node.op_type} {text}" + (f" ({where})" if where else ""))


def _cast(value: Any, kind: type) -> Any:
    """Return lengths that are formulas in another type; return other values unchanged."""
    if not isinstance(value, Symbols):
        return value
    entries = [entry.cast(kind) if isinstance(entry, Formula) else entry for entry in value.array.reshape(-1)]
    array = np.empty(len(entries), object)
    array[:] = entries
    return Symbols(array.reshape(value.array.shape))


def _settled(array: Any) -> Any:
    """Return lengths as integers where all of them are known."""
    for place, entry in np.ndenumerate(array):
        if isinstance(entry, Formula) and isinstance(entry.run(1), int):
            known = entry.constant()
            array[place] = entry if known is None else known
    if all(isinstance(entry, (int, np.integer)) for entry in array.reshape(-1)):
        return array.astype(np.int64)
    return Symbols(array)
