"""A cell's step as data: its operations in order, from which code in other languages is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cellstack.spec import CellSpec

H, P, I = "H", "P", "I"  # noqa: E741  # widths of vectors: units, projected units, inputs


@dataclass(frozen=True, eq=False)
class Value:
    """A vector, and the operation that computes it.

    Args:
        operation: a method of `cellstack.cells.base.Ops`, or `"x"` or `"state"`; a gate is its `"activation"`.
        of: the vectors that it is computed from.
        width: in columns: a number of blocks, and the letter of their width.
        name: the array, activation or state.
        part: the gates of a product's matrix, the row of a weight, or the block of a split.
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
    """The operations of a cell's step, see `Ops`; every method appends a value to `values`.

    `gates` and `states` are what the step returns: the gates, and the states after it, before zoneout.
    """

    spec: CellSpec
    values: list[Value] = field(default_factory=list)

    def __post_init__(self) -> None:
        spec, kind = self.spec, self.spec.of_kind
        self.before = [self._new("state", width=(1, self._letter(name)), name=name) for name in spec.state_sizes]
        a = kind.inputs(self, spec, self._new("x", width=(1, I)))
        self.gates, self.states = kind.step(self, spec, a, *self.before)

    def _letter(self, state: str) -> str:
        return P if state == "h" and self.spec.proj_size else H

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

    def product(self, v: Value, name: str, gates: slice = slice(None)) -> Value:
        """Record a matrix product."""
        if name == "projection":
            return self._new("product", v, width=(1, P), name=name)
        taken = range(len(self.spec.gates))[gates]
        part = None if gates == slice(None) else (taken.start, taken.stop)
        return self._new("product", v, width=(len(taken), H), name=name, part=part)

    def weight(self, name: str, row: int | None = None) -> Value:
        """Record a vector of weights."""
        columns = self.spec.shapes[name][-1]
        return self._new("weight", width=(columns // self.spec.units, H), name=name, part=row)

    def split(self, v: Value, count: int) -> list[Value]:
        """Record the blocks of a vector; `v` itself where it is one block."""
        return [self._new("split", v, width=(1, H), part=n) for n in range(count)] if count > 1 else [v]

    def add(self, a: Value, b: Value) -> Value:
        """Record `a + b`."""
        return self._new("add", a, b)

    def mul(self, a: Value, b: Value) -> Value:
        """Record `a⊙b`."""
        return self._new("mul", a, b)

    def div(self, a: Value, b: Value) -> Value:
        """Record `a / b`."""
        return self._new("div", a, b)

    def one_minus(self, v: Value) -> Value:
        """Record `1 - v`."""
        return self._new("one_minus", v)

    def clip(self, v: Value, bound: float | None) -> Value:
        """Record a clip; `v` itself without a bound."""
        return v if bound is None else self._new("clip", v, numbers=[bound])

    def norm(self, v: Value, blocks: Sequence[int] = (1,)) -> Value:
        """Record a normalisation."""
        return self._new("norm", v, numbers=blocks)

    def gate(self, name: str, z: Value) -> Value:
        """Record a gate."""
        return self.record(name, self.activation(name, self.clip(z, self.spec.clip)))

    def record(self, name: str, v: Value) -> Value:
        """Record a named value."""
        return self._new("record", v, name=name)

    def activation(self, slot: str, v: Value) -> Value:
        """Record an activation."""
        return self._new("activation", v, name=slot)

    def dropped(self, h: Value) -> Value:
        """Return h: generated code has no dropout."""
        return h
