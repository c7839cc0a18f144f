"""A cell's step as data: its operations in order. C is generated from them, and the page interprets them as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from cellstack.cells.spec import Spec

# Widths: units, features, x.
H, I, X = "H", "I", "X"  # noqa: E741


@dataclass(frozen=True, eq=False)
class Value:
    """A vector, and the operation that computes it.

    Args:
        operation: a method of `cellstack.cells.base.Ops`, or `"x"` or `"state"`; a gate is its `"activation"`.
            A scalar is a vector of H equal numbers.
        of: the vectors that it is computed from.
        width: in columns: a number of blocks, and the letter of their width.
        name: the array, activation or state.
        part: the gates of a product's matrix, or which of several matrices; the row of a weight; the block of a split.
        numbers: the bound of a clip, or the blocks of a norm.
    """

    operation: str
    of: tuple[Value, ...] = ()
    width: tuple[int, str] = (1, H)
    name: str = ""
    part: tuple[int, int] | int | None = None
    numbers: tuple[float, ...] = ()


@dataclass
class Recorded:
    """The operations of a cell's step, see `Ops`; every method appends a value to `values`, after those it is of.

    `gates` and `states` are what the step returns: the gates, and the states after it, before zoneout. `kept` is the
    share of each state before the step that zoneout keeps in inference. Of an mLSTM, all heads together are one vector.
    """

    spec: Any  # a Spec
    values: list[Value] = field(default_factory=list)

    def __post_init__(self) -> None:
        spec, kind = self.spec, self.spec.of_kind
        self.shapes = spec.axes
        self.before = [self._new("state", width=axis, name=name) for name, axis in spec.state_axes.items()]
        a = kind.prepared(self, spec, self._new("x", width=(1, I if kind.arrays and not spec.scalar else X)))
        self.gates, found = kind.step(self, spec, a, *self.before)
        self.states = found[-len(self.before) :]
        self.kept = tuple(spec.zoneout_rates.values())

    def _new(
        self,
        operation: str,
        *of: Value,
        width: tuple[int, str] | None = None,
        name: str = "",
        part: tuple[int, int] | int | None = None,
        numbers: Sequence[float] = (),
    ) -> Value:
        self.values.append(Value(operation, of, width or of[0].width, name, part, tuple(numbers)))
        return self.values[-1]

    def add(self, a: Value, b: Value) -> Value:
        """Record `a + b`."""
        return self._new("add", a, b)

    def sub(self, a: Value, b: Value) -> Value:
        """Record `a - b`."""
        return self._new("sub", a, b)

    def mul(self, a: Value, b: Value) -> Value:
        """Record `a⊙b`."""
        return self._new("mul", a, b)

    def exp(self, v: Value) -> Value:
        """Record `e^v`."""
        return self._new("exp", v)

    def log_sigmoid(self, v: Value) -> Value:
        """Record `log σ(v)`."""
        return self._new("log_sigmoid", v)

    def maximum(self, a: Value, b: Value) -> Value:
        """Record a maximum."""
        return self._new("maximum", a, b)

    def record(self, name: str, v: Value) -> Value:
        """Record a named value."""
        return self._new("record", v, name=name)

    def product(self, v: Value, name: str, part: slice | int | None = None) -> Value:
        """Record a matrix product."""
        if isinstance(part, int):
            return self._new("product", v, width=self.shapes[name][-1], name=name, part=part)
        count, letter = self._columns(name)
        taken = range(count)[part or slice(None)]
        return self._new("product", v, width=(len(taken), letter), name=name, part=part and (taken.start, taken.stop))

    def _columns(self, name: str) -> tuple[int, str]:
        """Return the number of an array's columns; those of a matrix for each head together."""
        *rows, columns = self.shapes[name]
        return (len(self.spec.gates), H) if len(rows) == 2 else columns

    def weight(self, name: str, row: int | None = None) -> Value:
        """Record a vector of weights."""
        return self._new("weight", width=self._columns(name), name=name, part=row)

    def split(self, v: Value, count: int) -> list[Value]:
        """Record the blocks of a vector; `v` itself where it is one block."""
        return [self._new("split", v, width=(1, H), part=n) for n in range(count)] if count > 1 else [v]

    def div(self, a: Value, b: Value) -> Value:
        """Record `a / b`."""
        return self._new("div", a, b)

    def one_minus(self, v: Value) -> Value:
        """Record `1 - v`."""
        return self._new("one_minus", v)

    def select(self, test: Value, a: Value, b: Value | None = None) -> Value:
        """Record a selection."""
        return self._new("select", test, a, *(() if b is None else (b,)))

    def clip(self, v: Value, bound: float | None) -> Value:
        """Record a clip; `v` itself without a bound."""
        return v if bound is None else self._new("clip", v, numbers=[bound])

    def norm(self, v: Value, blocks: Sequence[int] = (1,)) -> Value:
        """Record a normalisation."""
        return self._new("norm", v, numbers=blocks)

    def gate(self, name: str, z: Value) -> Value:
        """Record a gate."""
        return self.record(name, self.activation(name, self.clip(z, self.spec.clip)))

    def activation(self, slot: str, v: Value) -> Value:
        """Record an activation."""
        return self._new("activation", v, name=slot)

    def dropped(self, v: Value) -> Value:
        """Return `v`: generated code has no dropout."""
        return v

    def features(self, x: Value) -> Value:
        """Record the columns of x that the kernel multiplies."""
        return self._new("features", x, width=(1, I))

    def scalar(self, x: Value) -> Value:
        """Record the last column of x."""
        return self._new("scalar", x, width=(1, H), name=self.spec.of_kind.scalar)

    def absolute(self, v: Value) -> Value:
        """Record `max(v, -v)`."""
        return self.maximum(v, self.affine(v, -1.0))

    def affine(self, v: Value, factor: float = 1.0, offset: float = 0.0) -> Value:
        """Record `factor·v + offset`."""
        return self._new("affine", v, numbers=(factor, offset))

    def parts(self, x: Value, shapes: Mapping[str, tuple[int, ...]]) -> Sequence[Value]:
        """Record parts of x, each with its first column."""
        widths = [math.prod(shape) for shape in shapes.values()]
        firsts = accumulate(widths, initial=0)
        named = zip(shapes, widths, firsts, strict=False)
        return [self._new("part", x, width=(width, ""), name=name, part=first) for name, width, first in named]

    def joined(self, v: Value) -> Value:
        """Return `v`, which is one vector."""
        return v

    def scaled(self, v: Value, s: Value, axes: int = 1) -> Value:
        """Record vectors or matrices times numbers."""
        return self._new("scaled", s, v, width=v.width)

    def divided(self, v: Value, s: Value) -> Value:
        """Record vectors divided by numbers."""
        return self._new("div", v, self._new("scaled", s, width=v.width))

    def dot(self, a: Value, b: Value) -> Value:
        """Record inner products."""
        return self._new("contract", a, b, width=(self.spec.heads, ""))

    def outer(self, a: Value, b: Value) -> Value:
        """Record `a·bᵀ`."""
        return self._new("outer", a, b, width=(a.width[0] * b.width[0] // self.spec.heads, ""))

    def retrieved(self, M: Value, q: Value) -> Value:
        """Record `Mᵀq`."""
        return self._new("contract", M, q, width=(self.spec.units, ""))


def form_of(spec: Spec) -> dict[str, Any]:
    """Return a form of cell, which is a cell regardless of its widths, as JSON-compatible values.

    Returns:
        `settings`, as `CellSpec.form`; `title` of the kind; `heads` of states that have an axis of heads, or 0;
        `gates`, their roles by name; `blocks`, the gates that have columns in the arrays; `trace`, the names of the
        gates and states that a run records; `meanings` of these and of the states; `scalar`, the flag with which the
        last column of x is a number of the step, or ""; `states`, each with its width and the share that zoneout keeps;
        `activations` by slot; `shapes` of the arrays. And the step: `values`, in which `of` are positions; `before` and
        `after`, the positions of the states.

    The values of an mLSTM are computed by more operations: `"part"`, some columns of x, the first of which is `part`;
    `"affine"`, `v·numbers[0] + numbers[1]`; `"scaled"`, a vector times a number per head, or only that number;
    `"outer"`, the products of two vectors of each head; and `"contract"`, a matrix of each head, transposed, times a
    vector.
    """
    kind, recorded = spec.of_kind, Recorded(spec)
    place = {id(value): n for n, value in enumerate(recorded.values)}
    return {
        "settings": spec.form,
        "title": kind.title,
        "heads": spec.heads if any(len(shape) > 1 for shape in spec.state_shapes.values()) else 0,
        "gates": dict(kind.gates),
        "blocks": list(spec.gates),
        "trace": list(kind.trace._fields),
        "meanings": {name: kind.meaning(name) for name in (*kind.trace._fields, *spec.state_shapes)},
        "scalar": kind.scalar if spec.scalar else "",
        "states": {
            value.name: {"width": list(value.width), "kept": rate}
            for value, rate in zip(recorded.before, recorded.kept, strict=True)
        },
        "activations": {slot: str(found) for slot, found in zip(spec.slots, spec.activations, strict=True)},
        "shapes": {name: [list(axis) for axis in axes] for name, axes in spec.axes.items()},
        "values": [
            {
                "operation": value.operation,
                "of": [place[id(source)] for source in value.of],
                "width": list(value.width),
                "name": value.name,
                "part": value.part,
                "numbers": list(value.numbers),
            }
            for value in recorded.values
        ],
        "before": [place[id(value)] for value in recorded.before],
        "after": [place[id(value)] for value in recorded.states],
    }
