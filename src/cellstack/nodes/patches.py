"""Patches: what is changed in a cell as it runs, a gate or a state, of some units, rows and steps; as data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.nodes.base import Array, check_choice, check_integer
from cellstack.spec import GATES, TRACES, CellSpec, ShapeError

HOWS = ("set", "add", "scale", "freeze")
STATE_TARGETS = {"c": 4, "h": 5}
"""Where the kernel's lines have the states; a gate stands at its plane."""

TARGETS = 6
IDENTITY = ((1.0,), (0.0,), (-0.0,))  # v·1 + before·0 + (-0), which is v to the bit, -0 too

FIELDS = tuple(sorted({name for fields in TRACES.values() for name in fields._fields}))

Index = slice | tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class Patch:
    """A change of one gate or state of a cell as it runs: of some units, rows and steps; all where none are named.

    A gate is changed right after its activation, so that i changes what a coupled f = 1 - i becomes and r what it
    multiplies; c after the cell clip and zoneout, before o's peephole and h see it; h last of all, after projection and
    zoneout, so that it is both what goes out, before any residual sum, and what the next step takes. Steps that a mask
    leaves out stay as they are.

    Args:
        node: the name of the node in the network.
        gate: `"i" "f" "g" "o"`, `"c"` or `"h"` of an LSTM, `"z" "r" "g" "h"` of a GRU, `"g" "h"` of a SimpleRNN.
        units: which, numbers or a slice; of h where it is projected, which numbers of it.
        rows: which rows of the batch, numbers or a slice. In a pool a session is row 0.
        steps: which steps of the run, numbers or a slice, counted in the order of time, whichever way the cell runs. A
            stream counts from its beginning, or from where its state was last set.
        value: what to set it to, to add, or to multiply it by: a number, or an array that broadcasts to
            `[rows, steps, units]`, those named. None for "freeze".
        how: `"set"`; `"add"`; `"scale"`, where 0 leaves nothing, not even of what is no number; or `"freeze"`, what it
            was after the step before: for a state at the first step what the run began with, for a gate there its own
            value.
        cell: which of the node's cells, bottom first, forwards before backwards; None where there is one.

    Raises:
        ValueError, TypeError, ShapeError: what isn't as said.

    Ref: interventions on activations: Vig et al. 2020, "Investigating Gender Bias in Language Models Using Causal
    Mediation Analysis", section 3; on units of an LSTM: Lakretz et al. 2019, "The emergence of number and syntax units
    in LSTM language models", section 4.

    >>> Patch("layer_0", gate="f", units=[7], steps=slice(20, 40), value=1.0)
    Patch('layer_0', gate='f', units=[7], steps=slice(20, 40), value=1.0)
    """

    node: str
    gate: str
    units: Any = None
    rows: Any = None
    steps: Any = None
    value: Any = None
    how: str = "set"
    cell: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.node, str):
            raise TypeError(f"Patch: expected node to be the name of a node, got {self.node!r:.80}")
        check_choice("Patch", "gate", self.gate, FIELDS)
        check_choice("Patch", "how", self.how, HOWS)
        for name in ("units", "rows", "steps"):
            object.__setattr__(self, name, _as_index(name, getattr(self, name)))
        if self.cell is not None:
            object.__setattr__(self, "cell", check_integer("Patch", "cell", self.cell, 0))
        if self.how == "freeze":
            if self.value is not None:
                raise ValueError("Patch: expected no value to freeze, got one")
            return
        if self.value is None:
            raise ShapeError("Patch: expected value as a number, or [rows, steps, units], got none")
        try:
            given = np.asarray(self.value)
        except ValueError:  # rows of unequal length
            given = np.empty(0, object)
        if given.dtype.kind not in "biuf" or isinstance(self.value, np.ma.MaskedArray):
            raise TypeError(f"Patch: expected value to be a number or numbers, got {self.value!r:.80}")
        value = given.astype(np.float64)
        if value.ndim > 3:
            raise ShapeError(f"Patch: expected value as a number, or [rows, steps, units], got shape {value.shape}")
        whole = _whole(value)
        for axis, name in enumerate(("rows", "steps", "units")):
            count, known = whole.shape[axis], _count(getattr(self, name))
            if count not in (1, known) and (known is not None or name == "steps"):
                what = "steps with an end, as it has one for each" if known is None else f"1 or {known} along {name}"
                raise ShapeError(f"Patch: expected a value of {what}, got shape {value.shape}")
        value.setflags(write=False)
        object.__setattr__(self, "value", value)

    def __repr__(self) -> str:
        said = [repr(self.node), f"gate={self.gate!r}"]
        for name in ("units", "rows", "steps"):
            index = getattr(self, name)
            if index is not None:
                said.append(f"{name}={_shown(index)}")
        if self.value is not None:
            said.append(f"value={self.value.item() if not self.value.ndim else f'array {list(self.value.shape)}'}")
        if self.how != "set":
            said.append(f"how={self.how!r}")
        if self.cell is not None:
            said.append(f"cell={self.cell}")
        return f"Patch({', '.join(said)})"

    def check(self, spec: CellSpec) -> None:
        """Check what the patch names against the cell that it acts on.

        Args:
            spec: the cell.

        Raises:
            ValueError: a gate that such a cell doesn't have.
            IndexError: units that it doesn't have.
            ShapeError: a value for another number of units.
        """
        fields = TRACES[spec.kind]._fields
        if self.gate not in fields:
            raise ValueError(f"Patch: expected a gate of {self.node!r} out of {', '.join(fields)}, got {self.gate!r}")
        width = self.width(spec)
        chosen = _chosen(self.units, width)
        if not chosen.size or chosen.max() >= width:
            raise IndexError(f"Patch: expected units of {self.node!r} from 0 to {width - 1}, got {_shown(self.units)}")
        count = self.value.shape[-1] if self.value is not None and self.value.ndim else 1
        if count not in (1, len(chosen)):
            raise ShapeError(f"Patch: expected a value of 1 or {len(chosen)} along units, got {count}")

    def width(self, spec: CellSpec) -> int:
        """Return how many units the gate or the state has.

        Args:
            spec: the cell.
        """
        return spec.output_size if self.gate == "h" else spec.units

    def stored(self) -> dict[str, Any]:
        """Return the patch as JSON, without its value."""
        said: dict[str, Any] = {"node": self.node, "gate": self.gate, "how": self.how}
        for name in ("units", "rows", "steps"):
            index = getattr(self, name)
            if isinstance(index, slice):
                said[name] = {"start": index.start, "stop": index.stop, "step": index.step}
            elif index is not None:
                said[name] = list(index)
        return said | ({} if self.cell is None else {"cell": self.cell})

    @classmethod
    def restored(cls, said: dict[str, Any], value: Array | None) -> Patch:
        """Return the patch that `stored` described; `ValueError`, `TypeError` where it is none."""
        indexes = {}
        for name in ("units", "rows", "steps"):
            index = said.get(name)
            if isinstance(index, dict):
                index = slice(index.get("start"), index.get("stop"), index.get("step"))
            indexes[name] = index
        return cls(said["node"], said["gate"], **indexes, value=value, how=said["how"], cell=said.get("cell"))


class RunError(ShapeError, IndexError):
    """A run without the rows or the steps that a patch names."""


class CellPatches:
    """The patches of one cell, in the order in which they act, as the kernel takes them.

    Args:
        spec: the cell.
        patches: all of this cell.
    """

    def __init__(self, spec: CellSpec, patches: Sequence[Patch]) -> None:
        self.spec, self.patches = spec, tuple(patches)
        self.holds = any(patch.how == "freeze" and patch.gate not in STATE_TARGETS for patch in patches)
        self.timeless = all(
            patch.steps is None and (patch.value is None or _whole(patch.value).shape[1] == 1) for patch in patches
        )
        self._last: tuple[Any, dict[str, Any]] | None = None  # what came of the last steps, and which these were

    def held(self, rows: int, dtype: np.dtype[Any]) -> Array | None:
        """Return room for the gates of rows after their last step, `[rows, planes, H]`; None where none is frozen."""
        return np.zeros((rows, self.spec.planes, self.spec.units), dtype) if self.holds else None

    def of_run(
        self, batch: int, steps: int, mask: NDArray[np.bool_] | None, reverse: bool, dtype: np.dtype[Any]
    ) -> dict[str, Any]:
        """Return what `native.Layer` takes of the patches for a whole run; nothing where none acts.

        Raises:
            IndexError: rows or steps that the run doesn't have.
            ShapeError: a value for another number of rows.
        """
        key, held, last = (batch, steps, reverse, dtype), self.held(batch, dtype), self._last
        if mask is None and last is not None and last[0] == key:
            return last[1] | {"patch_held": held} if last[1] else {}
        if batch and steps:
            self.check("rows", batch)
            self.check("steps", steps)
        numbers = np.broadcast_to(np.arange(steps), (batch, steps))
        order = slice(None, None, -1 if reverse else 1)
        first = np.full(batch, (steps - 1) if reverse else 0) if mask is None else _first(mask[:, order], order, steps)
        made = self._act(np.arange(batch), numbers, first, held, dtype)
        if mask is None:
            self._last = key, made
        return made

    def check(self, name: str, count: int) -> None:
        """Raise `IndexError` or `ShapeError` unless there are the rows, or the steps, that patches name.

        Args:
            name: `"rows"` or `"steps"`.
            count: how many there are.
        """
        for patch in self.patches:
            chosen = _chosen(getattr(patch, name), count)
            if not chosen.size or chosen.max() >= count:
                raise RunError(f"Patch: expected {name} from 0 to {count - 1}, as there are, got {patch}")
            along = 1 if patch.value is None or name == "steps" else _whole(patch.value).shape[0]
            if along not in (1, len(chosen)):
                raise ShapeError(f"Patch: expected a value of 1 or {len(chosen)} along {name}, got {patch}")

    def act(
        self,
        rows: NDArray[np.int64],
        numbers: NDArray[np.int64],
        first: NDArray[np.int64],
        held: Array | None,
        dtype: np.dtype[Any],
    ) -> dict[str, Any]:
        """Return what `native.Layer` takes of the patches for some steps; nothing where none acts.

        Args:
            rows: `[B]`, the numbers of the rows.
            numbers: `[B, T]`, those of the steps.
            first: `[B]`, at which of these a row takes its first step of all; -1 = at none.
            held: the gates of these rows after their last step: see `held`; written to by the kernel.
            dtype: of the numbers.
        """
        if not self.holds and numbers.size and not self._acts(int(numbers.min()), int(numbers.max())):
            return {}
        if not self.timeless or (self.holds and (first >= 0).any()):
            return self._act(rows, numbers, first, held, dtype)
        key, last = (rows.tobytes(), numbers.shape, dtype), self._last
        if last is None or last[0] != key:
            last = self._last = key, self._act(rows, numbers, first, held, dtype)
        return last[1] | {"patch_held": held} if last[1] else {}

    def _acts(self, first: int, last: int) -> bool:
        """Whether a patch may act on a step from the first to the last."""
        for patch in self.patches:
            index = patch.steps
            if isinstance(index, slice):
                begin, end = index.start or 0, math.inf if index.stop is None else index.stop - 1
            else:
                begin, end = (0, math.inf) if index is None else (min(index), max(index))
            if begin <= last and end >= first:
                return True
        return False

    def changed(self, name: str, batch: int, steps: int, value: Array, before: Array) -> Array:
        """Return what the patches make of a state, of each step on its own.

        Args:
            name: `"c"` or `"h"`.
            batch, steps: of the run.
            value: what it is before the patches, `[B·T, H]`.
            before: what it was after the step before, `[B·T, H]`.
        """
        numbers = np.broadcast_to(np.arange(steps), (batch, steps))
        made = self._act(np.arange(batch), numbers, np.full(batch, -1), None, np.dtype(np.float64))
        if not made:
            return value
        lines = made["patch_lines"][:, :, STATE_TARGETS[name]].reshape(-1)
        once, again, added = np.moveaxis(made["patch_table"][lines][:, :, : value.shape[1]], 1, 0)
        # What is multiplied by nothing isn't there, be it infinite.
        new = np.where(once == 0, 0, once * value) + np.where(again == 0, 0, again * before) + added
        return np.where(lines[:, None] < 0, value, new)

    def _act(
        self,
        rows: NDArray[np.int64],
        numbers: NDArray[np.int64],
        first: NDArray[np.int64],
        held: Array | None,
        dtype: np.dtype[Any],
    ) -> dict[str, Any]:
        width = max(self.spec.units, self.spec.output_size)
        lines = np.full((*numbers.shape, TARGETS), -1, np.int32)
        table = _Table(width)
        for patch in self.patches:
            self._add(patch, rows, numbers, first, lines, table)
        if not table.count and held is None:
            return {}
        whole = table.lines[1 : 1 + max(table.count, 1)].astype(dtype)
        return {"patch_lines": lines, "patch_table": whole, "patch_width": width, "patch_held": held}

    def _add(
        self,
        patch: Patch,
        rows: NDArray[np.int64],
        numbers: NDArray[np.int64],
        first: NDArray[np.int64],
        lines: NDArray[np.int32],
        table: _Table,
    ) -> None:
        """Let a patch act on what those before it left."""
        gates = GATES[self.spec.kind]
        target = STATE_TARGETS[patch.gate] if patch.gate in STATE_TARGETS else gates.index(patch.gate)
        units = _chosen(patch.units, patch.width(self.spec))
        row_places = _places(patch.rows, rows)
        here = np.flatnonzero(row_places >= 0)
        step_places = np.array(_places(patch.steps, numbers[here]))
        if patch.how == "freeze" and patch.gate not in STATE_TARGETS:  # at the first step of all it stays what it is
            begins = np.flatnonzero(first[here] >= 0)
            step_places[begins, first[here][begins]] = -1
        at, steps = np.nonzero(step_places >= 0)
        if not at.size:
            return
        values = _whole(np.zeros(()) if patch.value is None else patch.value)
        row_values = row_places[here][at] if values.shape[0] > 1 else np.zeros_like(at)
        step_values = step_places[at, steps] if values.shape[1] > 1 else np.zeros_like(at)
        old = lines[here[at], steps, target].astype(np.int64)
        keys = ((old + 1) * values.shape[0] + row_values) * values.shape[1] + step_values
        _, found, inverse = np.unique(keys, return_index=True, return_inverse=True)
        made = table.copies(old[found])
        value = values[row_values[found], step_values[found]]
        if patch.how == "set":
            made[:, :2, units], made[:, 2, units] = 0.0, value
        elif patch.how == "freeze":
            made[:, :, units] = [[0.0], [1.0], [-0.0]]
        elif patch.how == "add":
            made[:, 2, units] += value
        else:
            made[:, :, units] *= value[:, None]
        lines[here[at], steps, target] = table.add(made) + inverse


class _Table:
    """Lines of the kernel's table, `[3, width]` each: what the scale, the hold and the shift of every unit are."""

    def __init__(self, width: int) -> None:
        self.lines = np.repeat(np.repeat(IDENTITY, width, axis=1)[None], 2, axis=0)  # the first one is no patch at all
        self.count = 0

    def copies(self, numbers: NDArray[np.int64]) -> Array:
        """Return copies of lines; of -1, that of no patch."""
        return self.lines[numbers + 1]

    def add(self, made: Array) -> int:
        """Add lines; return the number of the first."""
        begun, self.count = self.count, self.count + len(made)
        if self.count >= len(self.lines):
            grown = np.empty((2 * self.count + 1, *self.lines.shape[1:]))
            grown[: begun + 1] = self.lines[: begun + 1]
            self.lines = grown
        self.lines[begun + 1 : self.count + 1] = made
        return begun


def _as_index(name: str, index: Any) -> Index:
    """Return which units, rows or steps as a patch holds them: a slice, numbers, or None for all."""
    if index is None:
        return None
    if isinstance(index, slice):
        bounds = (("start", index.start, 0), ("stop", index.stop, 0), ("step", index.step, 1))
        return slice(
            *(
                None if bound is None else check_integer("Patch", f"the {what} of {name}", bound, least)
                for what, bound, least in bounds
            )
        )
    try:
        numbers = np.atleast_1d(np.asarray(index))
    except ValueError:
        numbers = np.empty((0, 0))
    if numbers.ndim != 1 or not numbers.size or numbers.dtype.kind not in "iu" or numbers.min() < 0:
        raise ValueError(
            f"Patch: expected {name} as a slice, a number or numbers, counted from the first, got {index!r:.80}"
        )
    if len(np.unique(numbers)) != len(numbers):
        raise ValueError(f"Patch: expected {name} each once, got {index!r:.80}")
    return tuple(int(number) for number in numbers)


def _count(index: Index) -> int | None:
    """Return how many an index names; None where that takes the length of the axis."""
    if isinstance(index, slice):
        return None if index.stop is None else len(range(index.start or 0, index.stop, index.step or 1))
    return None if index is None else len(index)


def _chosen(index: Index, length: int) -> NDArray[np.int64]:
    """Return the numbers that an index names, of an axis of a length; slices are cut to it."""
    if isinstance(index, slice):
        return np.arange(length)[index]
    return np.arange(length) if index is None else np.array(index)


def _places(index: Index, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each number which place it has among those that an index names; -1 where it isn't one."""
    if index is None:
        return numbers
    if isinstance(index, slice):
        start, step = index.start or 0, index.step or 1
        inside = (numbers >= start) & ((numbers - start) % step == 0)
        inside &= numbers < index.stop if index.stop is not None else True
        return np.where(inside, (numbers - start) // step, -1)
    order = np.argsort(index)
    ranked = np.array(index)[order]
    found = np.minimum(np.searchsorted(ranked, numbers), len(ranked) - 1)
    return np.where(ranked[found] == numbers, order[found], -1)


def _first(mask: NDArray[np.bool_], order: slice, steps: int) -> NDArray[np.int64]:
    """Return the first step that is used, of each row of a mask in the order of the run; -1 where there is none."""
    first = mask.argmax(axis=1) if steps else np.zeros(len(mask), np.int64)
    return np.where(mask.any(axis=1), np.arange(steps)[order][first] if steps else first, -1)


def _whole(value: Array) -> Array:
    """Return a value with the axes of rows, steps and units."""
    return value.reshape((1,) * (3 - value.ndim) + value.shape)


def _shown(index: Index) -> str:
    if not isinstance(index, slice):
        return str(list(index or ()))
    bounds = [index.start, index.stop] + ([] if index.step is None else [index.step])
    return f"slice({', '.join(map(str, bounds))})"
