"""What an ONNX value is to a Network while a graph is read: a wire with axes in ONNX's order, a state, a shape.

ONNX moves axes about, a Network never does: between its nodes flows `[B, T, W]` or `[B, W]`. So an axis has a label,
and a Transpose changes the order of labels alone:

    B  batch        T  time        F  features        N  batch and time in one, as some exporters write a Dense
    D  the two directions of a bidirectional operator, whose features are the wire's halves        1  of length 1

A value without B is one row, as of a file without a batch axis: where an operator needs a batch, an axis of length 1
stands for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from cellstack.layout import Array
from cellstack.nodes.base import Shape
from cellstack.nodes.recurrent import Cell


@dataclass(frozen=True)
class Dim:
    """A length that a call brings: so many times the product of some labels' lengths."""

    labels: tuple[str, ...]
    times: int = 1

    def __mul__(self, other: Any) -> Dim:
        if isinstance(other, Dim):
            return Dim(tuple(sorted((*self.labels, *other.labels))), self.times * other.times)
        return Dim(self.labels, self.times * int(other))

    __rmul__ = __mul__


Length = int | Dim


class Symbols(NamedTuple):
    """Lengths as numbers that a graph computes with: an array of objects, integers and `Dim`."""

    array: Array


class Unknown(NamedTuple):
    """A value of which nothing is known here; `why` says why. `told`: whether the reader has refused it already."""

    why: str
    told: bool


class Lengths(NamedTuple):
    """An input that holds how long each row is."""

    name: str


@dataclass(frozen=True)
class Final:
    """One state after an operator's last step."""

    operator: int
    way: int
    part: str  # "h" or "c"


@dataclass(frozen=True)
class Vector:
    """A vector a row that the graph computes, where it stands among states to start from."""

    wire: str


@dataclass(frozen=True)
class Initial:
    """One state to start from, `[B, H]`, as an input of the file holds it: the one at `place` of those in it."""

    name: str
    place: int


@dataclass(frozen=True)
class States:
    """States put together along axes S: `refs` is an array over these, of `Final` and `Vector`, or of `Initial`.

    `counted`: whether it is known how many there are along S; else `refs` holds as many as the graph could take.
    """

    axes: tuple[str, ...]  # of B, F and S
    refs: Array
    counted: bool = True

    @property
    def initial(self) -> bool:
        """Whether they come from an input."""
        return isinstance(next(iter(self.refs.reshape(-1)), None), Initial)

    @property
    def computed(self) -> bool:
        """Whether they aren't all states that operators end with."""
        return any(isinstance(ref, Vector) for ref in self.refs.reshape(-1))


class Run(NamedTuple):
    """An operator that has been put in: the node with its cells, and whether it gives every step.

    `in_order` is the wire with the steps in the order of the input's; `node` gives them in the order in which it runs.
    """

    cells: tuple[Cell, ...]
    node: str
    in_order: str
    sequences: bool


@dataclass(frozen=True)
class Flowing:
    """What a wire carries, with its axes as ONNX has them.

    Args:
        wire: name of an input or a node of the Network.
        axes: a label for each axis of ONNX's.
        shape: the wire's axes after the batch, as the Network has them.
        batch: how many rows the file says that there are; None where any will do.
    """

    wire: str
    axes: tuple[str, ...]
    shape: Shape
    batch: int | None = None

    @property
    def width(self) -> int | None:
        """Features of the wire; None where not known, or where there are none."""
        return self.shape[-1] if "F" in self.axes else None

    @property
    def steps(self) -> int | None:
        """How many steps, where known."""
        return self.shape[0] if "T" in self.axes or "N" in self.axes else None

    def length(self, label: str) -> Length:
        """Return the length of an axis, a number where it is known."""
        halves = 2 if "D" in self.axes else 1
        known = {
            "B": self.batch,
            "T": self.steps,
            "F": None if self.width is None else self.width // halves,
            "D": 2,
            "1": 1,
            "N": None if self.batch is None or self.steps is None else self.batch * self.steps,
        }[label]
        return Dim(("B", "T") if label == "N" else (label,)) if known is None else known

    @property
    def lengths(self) -> list[Length]:
        """The length of each axis."""
        return [self.length(label) for label in self.axes]

    def has(self, axes: str) -> bool:
        """Return whether the axes are these; an axis of length 1 stands for the batch where there is no B."""
        found = "".join(self.axes)
        return found == axes or ("B" not in found and found == axes.replace("B", "1"))

    def at(self, axis: int) -> int:
        """Return an axis counted from the front; `ValueError` where there are fewer."""
        if not -len(self.axes) <= axis < len(self.axes):
            raise ValueError(f"expected an axis of {len(self.axes)}, found {axis}")
        return axis % len(self.axes)


@dataclass(frozen=True)
class Moment:
    """What is on the way from a value to its normalised self, each step by the mean and the variance of its features.

    Args:
        of: the value.
        what: `"mean"`, `"centred"`: less its mean, `"squares"` of that, `"variance"`, `"deviation"`: the root of the
            variance, `"inverse"`: one over it.
        epsilon: what was added to the variance.
    """

    of: Flowing
    what: str
    epsilon: float = 0.0


@dataclass(frozen=True)
class Squares:
    """A sum of squares, on the way to a magnitude.

    Args:
        parts: what is squared; one or two.
        name: of the operator that made it.
        epsilon: what was added.
    """

    parts: tuple[Flowing, ...]
    name: str
    epsilon: float = 0.0


def reshaped(flow: Flowing, target: Sequence[Any], keep_zero: bool) -> tuple[str, ...] | None:
    """Return the axes of a value in another shape; None where the shape isn't one that a wire can have.

    Axes of length 1 come and go. D and F become one, B and T become N, N becomes B and T again, and all axes after B
    become one, `*`, which is what Flatten does.
    """
    lengths = flow.lengths
    wanted = [
        lengths[n] if entry == 0 and not keep_zero and n < len(lengths) else entry for n, entry in enumerate(target)
    ]
    wanted = [int(entry) if not isinstance(entry, Dim) else entry for entry in wanted]
    labels = [label for label in flow.axes if label != "1"]
    for strict in (True, False):
        for candidate in _candidates(labels):
            axes = _aligned(candidate, [_length(flow, label, candidate, labels) for label in candidate], wanted, strict)
            if axes is not None:
                return axes
    return None


def _candidates(labels: list[str]) -> Iterator[list[str]]:
    """Give the ways in which axes can become others, the plainest first."""
    merged = _replaced(labels, ["D", "F"], ["F"])
    for now in (labels, merged):
        yield now
        yield _replaced(now, ["B", "T"], ["N"])
        yield _replaced(now, ["N"], ["B", "T"])
    if labels[:1] == ["B"] and len(labels) > 2:
        yield ["B", "*"]


def _replaced(labels: list[str], old: list[str], new: list[str]) -> list[str]:
    for n in range(len(labels)):
        if labels[n : n + len(old)] == old:
            return [*labels[:n], *new, *labels[n + len(old) :]]
    return labels


def _length(flow: Flowing, label: str, candidate: list[str], labels: list[str]) -> Length:
    if label == "F" and "D" not in candidate:
        return Dim(("F",)) if flow.width is None else flow.width
    if label == "*":
        rest = [flow.length(other) for other in labels[1:]]
        numbers = [length for length in rest if isinstance(length, int)]
        return prod(numbers) if len(numbers) == len(rest) else Dim(("*",))
    return flow.length(label)


def _aligned(labels: list[str], lengths: list[Length], wanted: list[Length], strict: bool) -> tuple[str, ...] | None:
    """Return `labels` with axes of length 1 between them so that they have the lengths wanted; None where they can't.

    Not `strict`: a number may stand for a length of B or T that isn't known, as in files written for one size.
    """
    if not wanted:
        return () if not labels else None
    first, rest = wanted[0], wanted[1:]
    if labels:
        own = lengths[0]
        loose = not strict and isinstance(own, Dim) and labels[0] in "BTN*" and first != 1
        if first == -1 or first == own or loose:
            found = _aligned(labels[1:], lengths[1:], rest, strict)
            if found is not None:
                return (labels[0], *found)
    if first == 1:
        found = _aligned(labels, lengths, rest, strict)
        if found is not None:
            return ("1", *found)
    return None
