"""ONNX values while a graph is read: a wire with axes in ONNX's order, a state, or a shape.

ONNX reorders axes, a Network never does: its nodes exchange `[B, T, W]` or `[B, W]`. So each axis has a label, and a
Transpose only changes the order of the labels:

    B  batch        T  time        F  features        N  batch and time merged, as some exporters write a Dense
    M  time and batch merged, in this order
    D  the two directions of a bidirectional operator, concatenated in the wire's features        1  of length 1
    C G H P Q R  feature axes of a value that has several, such as channels and frequencies: see `Flowing.parts`

A value without B is one row, as in a file without a batch axis: where an operator needs a batch, an axis of length 1
serves as it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, floor
from typing import Any, NamedTuple

import numpy as np

from cellstack.cells.layout import Array
from cellstack.formats.onnx.attributes import place, whole
from cellstack.network.layouts import Layout
from cellstack.nodes.base import Shape
from cellstack.nodes.cell_arrays import Cell


class Counted:
    """Base class of numbers that a graph computes with and that depend on the call, such as a number of steps."""

    def formula(self) -> Formula | None:
        """The number as a formula; None if it doesn't depend on the number of steps of one wire alone."""
        raise NotImplementedError

    def _with(self, other: Any, function: Callable[[Any, Any], Any]) -> Any:
        one, two = (v.formula() if isinstance(v, Counted) else v for v in (self, other))
        if not isinstance(one, Formula) or two is None or (isinstance(two, Formula) and two.of != one.of):
            return NotImplemented
        return Formula(one.of, lambda t: function(one.run(t), two.run(t) if isinstance(two, Formula) else two))

    def __add__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a + b)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a - b)

    def __rsub__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: b - a)

    def __floordiv__(self, other: Any) -> Any:  # ONNX's Div: of integers without a remainder
        return self._with(other, lambda a, b: a / b if isinstance(a, float) else a // b)


@dataclass(frozen=True)
class Formula(Counted):
    """A number that a graph computes from a number of steps.

    Args:
        of: the wire that has these steps, or `length_of` of a `Filled` value.
        run: returns the number for a number of steps; a float where the graph computes with floats.
    """

    of: str
    run: Callable[[int], Any]

    def formula(self) -> Formula:
        """The number itself."""
        return self

    def __mul__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a * b)

    __rmul__ = __mul__

    def __ceil__(self) -> Formula:
        return Formula(self.of, lambda t: float(ceil(self.run(t))))

    def __floor__(self) -> Formula:
        return Formula(self.of, lambda t: float(floor(self.run(t))))

    def cast(self, kind: type) -> Formula:
        """Return the number as an int or a float."""
        return Formula(self.of, lambda t: kind(self.run(t)))

    def constant(self, less: int = 0) -> int | None:
        """Return the number minus `less` times the number of steps, if this is a constant; otherwise None."""
        first = self.run(1) - less
        return int(first) if all(self.run(t) - less * t == first for t in TRIED) else None


@dataclass(frozen=True)
class Dim(Counted):
    """A length that depends on the call: `times` the product of the lengths of some labels.

    `of`: the wire whose length it is; "" if unknown.
    """

    labels: tuple[str, ...]
    times: int = 1
    of: str = field(default="", compare=False)

    def formula(self) -> Formula | None:
        """The length as a formula; None if it isn't the number of steps of one wire."""
        return Formula(self.of, lambda t: self.times * t) if self.of and self.labels == ("T",) else None

    def __mul__(self, other: Any) -> Dim:
        if isinstance(other, Dim):
            return Dim(tuple(sorted((*self.labels, *other.labels))), self.times * other.times)
        return Dim(self.labels, self.times * int(other), self.of)

    __rmul__ = __mul__


Length = int | Dim
Parts = tuple[tuple[str, int], ...]
TRIED = range(1, 513)  # numbers of steps for which formulas are evaluated and compared
GRID = "CGHPQR"  # labels of feature axes where there are several


class Symbols(NamedTuple):
    """Lengths that a graph computes with: an array of objects, integers and `Dim`."""

    array: Array

    @property
    def known(self) -> Array | None:
        """The lengths as integers; None where one of them depends on the call."""
        return None if any(isinstance(n, Counted) for n in self.array.reshape(-1)) else self.array.astype(np.int64)


def entries_of(lengths: Any) -> list[Any] | None:
    """Return a list of lengths, integers and `Counted`; None for a value that isn't one."""
    if isinstance(lengths, Symbols):
        return list(lengths.array.reshape(-1))
    return whole(lengths) if isinstance(lengths, np.ndarray) else None


def shown(lengths: Sequence[Any]) -> str:
    """Return lengths, integers and `Dim`, as messages show them."""
    return "[" + ", ".join(str(n) if isinstance(n, int) else "·".join(n.labels) for n in lengths) + "]"


class Unknown(NamedTuple):
    """An unknown value, with the reason in `why`. `reported`: whether the reader has already reported it."""

    why: str
    reported: bool


class Lengths(NamedTuple):
    """An input that holds the rows' lengths."""

    name: str


@dataclass(frozen=True)
class Final:
    """One final state of an operator."""

    operator: int
    way: int
    part: str  # the name of the state: "h" …


@dataclass(frozen=True)
class FinalMemory:
    """A part of the final state of the memory of an mLSTM: the wire of its node, and the part's name."""

    node: str
    part: str  # "C", "n" or "m"


@dataclass(frozen=True)
class Vector:
    """A computed vector per row that is used as an initial state."""

    wire: str


@dataclass(frozen=True)
class Initial:
    """One initial state `[B, H]` in an input of the file: the one at index `place`."""

    name: str
    place: int


@dataclass(frozen=True)
class States:
    """States stacked along axes S: `refs` is an array over these axes, of `Final` and `Vector`, or of `Initial`.

    `counted`: whether the number along S is known; else `refs` holds as many as the graph could use.
    """

    axes: tuple[str, ...]  # of B, F and S
    refs: Array
    counted: bool = True

    @property
    def initial(self) -> bool:
        """Whether they are initial states, from an input."""
        return isinstance(next(iter(self.refs.reshape(-1)), None), Initial)

    @property
    def computed(self) -> bool:
        """Whether some of them aren't final states of operators."""
        return any(isinstance(ref, Vector) for ref in self.refs.reshape(-1))


class Run(NamedTuple):
    """An operator that has been added: the node with its cells, and whether it returns every step.

    `in_order` is the wire with the steps in the input's order; `node` returns them in the order of processing.
    """

    cells: tuple[Cell, ...]
    node: str
    in_order: str
    sequences: bool


@dataclass(frozen=True)
class Flowing:
    """A value on a wire, with its axes in ONNX's order.

    Args:
        wire: name of an input or a node of the Network.
        axes: a label for each axis in ONNX.
        shape: the wire's axes after the batch, in the Network's order.
        batch: the batch size that the file declares; None if open.
        parts: where the value has several feature axes: the label and length of each, in the order in which the wire's
            features hold them. There is no axis F then, so that operators that don't know parts refuse the value.
        source: the first wire that has the same number of steps; "" = this one.
    """

    wire: str
    axes: tuple[str, ...]
    shape: Shape
    batch: int | None = None
    parts: Parts = ()
    source: str = ""

    @property
    def timed_by(self) -> str:
        """The wire whose number of steps formulas use."""
        return self.source or self.wire

    @property
    def layout(self) -> Layout:
        """The axes with their lengths, as the metadata record them."""
        lengths = [length if isinstance(length, int) else None for length in self.lengths]
        return Layout("".join(self.axes), tuple(lengths))

    @property
    def width(self) -> int | None:
        """Features of the wire; None where unknown or absent."""
        return self.shape[-1] if "F" in self.axes else None

    @property
    def steps(self) -> int | None:
        """The number of steps, if known."""
        return self.shape[0] if not {"T", "N", "M"}.isdisjoint(self.axes) else None

    def length(self, label: str) -> Length:
        """Return the length of an axis, a number if known."""
        directions = 2 if "D" in self.axes else 1
        known = {
            "B": self.batch,
            "T": self.steps,
            "F": None if self.width is None else self.width // directions,
            "D": 2,
            "1": 1,
            **dict.fromkeys("NM", None if self.batch is None or self.steps is None else self.batch * self.steps),
            **dict(self.parts),
        }[label]
        return Dim(("B", "T") if label in "NM" else (label,), of=self.timed_by) if known is None else known

    @property
    def lengths(self) -> list[Length]:
        """The length of each axis."""
        return [self.length(label) for label in self.axes]

    def has(self, axes: str) -> bool:
        """Return whether the axes are these; without a B, an axis of length 1 counts as the batch."""
        letters = "".join(self.axes)
        return letters == axes or ("B" not in letters and letters == axes.replace("B", "1"))

    def at(self, axis: int) -> int:
        """Return an axis counted from the front; `ValueError` where it doesn't exist."""
        return place(axis, len(self.axes))


@dataclass(frozen=True)
class Filled:
    """A sequence padded at its end so that a convolution with strides uses all of its steps.

    Args:
        of: the sequence.
        before: the number of steps added before it.
        after: the number of steps added after it, computed from its number of steps.
        mode: the mode of the operator Pad.
        value: the value of the added steps.
        name: the name of the operator.
    """

    of: Flowing
    before: int
    after: Formula
    mode: str
    value: float
    name: str

    @property
    def length_of(self) -> str:
        """The name under which formulas use its number of steps."""
        return f"{self.name}, filled"

    def fits(self, span: int, stride: int) -> bool:
        """Return whether windows of `span` steps, every `stride` steps, end exactly with the last step."""
        for t in TRIED:
            after = self.after.run(t)
            length = t + self.before + after
            if not 0 <= after < stride or (length >= span and (length - span) % stride):
                return False
        return True


@dataclass(frozen=True)
class Moment:
    """An intermediate result of a layer normalisation, which uses the mean and the variance of the features.

    Args:
        of: the value.
        what: `"mean"`, `"centred"`: the value minus its mean, `"squares"` of that, `"variance"`, `"deviation"`: the
            square root of the variance, `"inverse"`: its reciprocal.
        epsilon: the number added to the variance.
    """

    of: Flowing
    what: str
    epsilon: float = 0.0


@dataclass(frozen=True)
class Grouped:
    """A value `[B, C, …]` as `[B, G, …]`, an intermediate result of a group normalisation."""

    of: Flowing
    groups: int


@dataclass(frozen=True)
class Squares:
    """A sum of squares, an intermediate result of a magnitude.

    Args:
        parts: the values that are squared; one or two.
        name: the name of the operator that computes it.
        epsilon: the number added to the sum.
    """

    parts: tuple[Flowing, ...]
    name: str
    epsilon: float = 0.0
