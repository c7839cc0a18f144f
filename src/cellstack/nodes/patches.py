"""Patches: changes of a cell's gates or states during a run, for some units, rows and steps; as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import ShapeError
from cellstack.cells.mlstm import MemorySpec
from cellstack.cells.spec import TRACES, CellSpec
from cellstack.nodes.checks import check_choice, check_integer
from cellstack.nodes.values import Array

HOWS = ("set", "add", "scale", "freeze")
IDENTITY = ((1.0,), (0.0,), (-0.0,))  # v·1 + before·0 + (-0), which is v bit for bit, also for -0

_TRACES = (*TRACES.values(), MemorySpec(1, 1, 1, 0.0, output_gate=True).of_kind.trace)
FIELDS = tuple(sorted({name for trace in _TRACES for name in trace._fields}))

Index = slice | tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class Patch:
    """A change of one gate or state of a cell during a run, for some units, rows and steps; by default for all.

    A gate is changed right after its activation, so that a patch of i affects a coupled f = 1 - i, and one of r the
    product with it. c is changed after the cell clip and zoneout, before o's peephole and h use it. h is changed last,
    after projection and zoneout, so that the change affects both the output (before a residual is added) and the next
    step. Of an mLSTM, m is changed before i and f are computed from it, n before it divides, and h only in the output.
    Masked steps don't change.

    Args:
        node: the name of the node in the network.
        gate: `"i" "f" "g" "o"`, `"c"` or `"h"` of an LSTM, `"z" "r" "g" "h"` of a GRU, `"g" "h"` of a SimpleRNN,
            `"q" "k" "v" "i" "f" "m" "n" "h"` of an mLSTM, and `"o"` if it has an output gate: the fields of its trace.
        units: indices or a slice; for a projected h, of its components. Of an mLSTM, those of head 0 come first: of i,
            f and m one per head, of q, k and n `key_size`, of the others `value_size`.
        rows: rows of the batch, indices or a slice. In a pool each session is row 0.
        steps: steps of the run, indices or a slice, in the order of time also for a cell that runs backwards. A stream
            counts from its start, or from where its state was last set.
        value: the number to set, to add or to multiply by, or an array that broadcasts to `[rows, steps, units]` of
            the selected entries. None for "freeze".
        how: `"set"`; `"add"`; `"scale"`, where a factor of 0 gives 0 also for NaN and infinity; or `"freeze"`, keep
            the value of the step before: at the first step, a state keeps its initial value, and a gate isn't changed.
        cell: the index of the cell in the node, bottom first, forward before backward; None if there is only one.

    Raises:
        ValueError, TypeError, ShapeError: an invalid argument.

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
            raise TypeError(f"Patch: expected node to be a node's name, got {self.node!r:.80}")
        check_choice("Patch", "gate", self.gate, FIELDS)
        check_choice("Patch", "how", self.how, HOWS)
        for name in ("units", "rows", "steps"):
            object.__setattr__(self, name, _as_index(name, getattr(self, name)))
        if self.cell is not None:
            object.__setattr__(self, "cell", check_integer("Patch", "cell", self.cell, 0))
        if self.how == "freeze":
            if self.value is not None:
                raise ValueError("Patch: how='freeze' takes no value")
            return
        if self.value is None:
            raise ShapeError("Patch: expected value as a number, or [rows, steps, units], got none")
        try:
            array = np.asarray(self.value)
        except ValueError:  # rows of unequal length
            array = np.empty(0, object)
        if array.dtype.kind not in "biuf" or isinstance(self.value, np.ma.MaskedArray):
            raise TypeError(f"Patch: expected value to be a number or numbers, got {self.value!r:.80}")
        value = array.astype(np.float64)
        if value.ndim > 3:
            raise ShapeError(f"Patch: expected value as a number, or [rows, steps, units], got shape {value.shape}")
        whole = _with_three_axes(value)
        for axis, name in enumerate(("rows", "steps", "units")):
            count, known = whole.shape[axis], _count(getattr(self, name))
            if count not in (1, known) and (known is not None or name == "steps"):
                if known is None:
                    raise ShapeError("Patch: a value for each step requires steps with an end")
                raise ShapeError(f"Patch: expected a value of 1 or {known} along {name}, got shape {value.shape}")
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

    def check(self, spec: CellSpec | MemorySpec) -> None:
        """Check the patch against the cell that it changes.

        Args:
            spec: the cell.

        Raises:
            ValueError: a gate that the cell doesn't have.
            IndexError: units out of range.
            ShapeError: a value for a different number of units.
        """
        fields = spec.of_kind.trace._fields
        if self.gate not in fields:
            raise ValueError(
                f"Patch: expected gate of {self.node!r} to be one of {', '.join(fields)}, got {self.gate!r}"
            )
        width = self.width(spec)
        chosen = _chosen(self.units, width)
        if not chosen.size or chosen.max() >= width:
            raise IndexError(f"Patch: expected units of {self.node!r} from 0 to {width - 1}, got {_shown(self.units)}")
        count = self.value.shape[-1] if self.value is not None and self.value.ndim else 1
        if count not in (1, len(chosen)):
            raise ShapeError(f"Patch: expected a value of 1 or {len(chosen)} along units, got {count}")

    def width(self, spec: CellSpec | MemorySpec) -> int:
        """Return the width of the gate or state.

        Args:
            spec: the cell.
        """
        return math.prod(spec.trace_shapes[self.gate])

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
        """Return the patch of a `stored` description; `ValueError` or `TypeError` if it is invalid."""
        indexes = {}
        for name in ("units", "rows", "steps"):
            index = said.get(name)
            if isinstance(index, dict):
                index = slice(index.get("start"), index.get("stop"), index.get("step"))
            indexes[name] = index
        return cls(said["node"], said["gate"], **indexes, value=value, how=said["how"], cell=said.get("cell"))


class RunError(ShapeError, IndexError):
    """A patch selects rows or steps that the run doesn't have."""


class CellPatches:
    """The patches of one cell, in the order in which they are applied, and their conversion for the kernel."""

    def __init__(self, spec: CellSpec | MemorySpec, patches: Sequence[Patch]) -> None:
        self.spec, self.patches = spec, tuple(patches)
        fields = spec.trace_shapes
        self.gates = tuple(name for name in fields if name not in spec.state_shapes)
        self.targets = (*self.gates, *(name for name in spec.state_shapes if name in fields))  # as in `patch_lines`
        self.width = max(map(math.prod, fields.values()))
        self.freezes_gates = any(patch.how == "freeze" and patch.gate in self.gates for patch in patches)
        self.timeless = all(
            patch.steps is None and (patch.value is None or _with_three_axes(patch.value).shape[1] == 1)
            for patch in patches
        )
        self._last: tuple[Any, dict[str, Any]] | None = None  # the key of the last call and its result

    def last_gates(self, rows: int, dtype: np.dtype[Any]) -> Array | None:
        """Return an array for the last gates of each row, `[rows, planes, H]`; None if no gate is frozen."""
        if not self.freezes_gates:
            return None
        spec = self.spec
        planes = (spec.planes, spec.units) if isinstance(spec, CellSpec) else (len(self.gates), self.width)
        return np.zeros((rows, *planes), dtype)

    def of_run(
        self, batch: int, steps: int, mask: NDArray[np.bool_] | None, reverse: bool, dtype: np.dtype[Any]
    ) -> dict[str, Any]:
        """Return the arguments of `native.Layer` for a whole run; empty if no patch applies.

        Raises:
            IndexError: rows or steps that the run doesn't have.
            ShapeError: a value for a different number of rows.
        """
        key, frozen, last = (batch, steps, reverse, dtype), self.last_gates(batch, dtype), self._last
        if mask is None and last is not None and last[0] == key:
            return last[1] | {"patch_held": frozen} if last[1] else {}
        if batch and steps:
            self.check("rows", batch)
            self.check("steps", steps)
        numbers = np.broadcast_to(np.arange(steps), (batch, steps))
        order = slice(None, None, -1 if reverse else 1)
        first = np.full(batch, (steps - 1) if reverse else 0) if mask is None else _first(mask[:, order], order, steps)
        arguments = self._arguments(np.arange(batch), numbers, first, frozen, dtype)
        if mask is None:
            self._last = key, arguments
        return arguments

    def check(self, name: str, count: int) -> None:
        """Raise `IndexError` or `ShapeError` unless the rows, or the steps, that the patches select exist.

        Args:
            name: `"rows"` or `"steps"`.
            count: how many there are.
        """
        for patch in self.patches:
            chosen = _chosen(getattr(patch, name), count)
            if not chosen.size or chosen.max() >= count:
                raise RunError(f"Patch: expected {name} from 0 to {count - 1}, got {patch}")
            along = 1 if patch.value is None or name == "steps" else _with_three_axes(patch.value).shape[0]
            if along not in (1, len(chosen)):
                raise ShapeError(f"Patch: expected a value of 1 or {len(chosen)} along {name}, got {patch}")

    def of_steps(
        self,
        rows: NDArray[np.int64],
        numbers: NDArray[np.int64],
        first: NDArray[np.int64],
        frozen: Array | None,
        dtype: np.dtype[Any],
    ) -> dict[str, Any]:
        """Return the arguments of `native.Layer` for some steps; empty if no patch applies.

        Args:
            rows: `[B]`, the indices of the rows.
            numbers: `[B, T]`, the indices of the steps.
            first: `[B]`, the position along T of each row's first step since its state was set; -1: not among these.
            frozen: the last gates of these rows, see `last_gates`; the kernel updates them.
            dtype: the dtype of the values.
        """
        if not self.freezes_gates and numbers.size and not self._applies(int(numbers.min()), int(numbers.max())):
            return {}
        if not self.timeless or (self.freezes_gates and (first >= 0).any()):
            return self._arguments(rows, numbers, first, frozen, dtype)
        key, last = (rows.tobytes(), numbers.shape, dtype), self._last
        if last is None or last[0] != key:
            last = self._last = key, self._arguments(rows, numbers, first, frozen, dtype)
        return last[1] | {"patch_held": frozen} if last[1] else {}

    def _applies(self, first: int, last: int) -> bool:
        """Whether a patch may apply to a step from `first` to `last`."""
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
        """Apply the patches to a state at every step, independently of the other steps.

        Args:
            name: the state, such as `"h"`.
            batch, steps: the sizes of the run.
            value: the state before the patches, `[B·T, H]`.
            before: the state of the previous step, `[B·T, H]`.
        """
        numbers = np.broadcast_to(np.arange(steps), (batch, steps))
        arguments = self._arguments(np.arange(batch), numbers, np.full(batch, -1), None, np.dtype(np.float64))
        if not arguments:
            return value
        lines = arguments["patch_lines"][:, :, self.targets.index(name)].reshape(-1)
        return _changed(lines, arguments["patch_table"], value, before)

    def changing(self, arguments: dict[str, Any], mask: NDArray[np.bool_] | None) -> Callable[..., Array] | None:
        """Return a function that applies patches step by step, for `cellstack.reference.memory`; None: none apply.

        Args:
            arguments: the result of `of_run` or `of_steps`; the last gates are updated.
            mask: `[B, T]`, the used steps.
        """
        if not arguments:
            return None
        lines, table, held = (arguments[f"patch_{name}"] for name in ("lines", "table", "held"))

        def changed(name: str, t: int, value: Array, before: Array | None) -> Array:
            place, flat = self.targets.index(name), value.reshape(len(value), -1)
            last = None if held is None or name not in self.gates else held[:, place, : flat.shape[1]]
            given = last if before is None else before.reshape(flat.shape)
            new = _changed(lines[:, t, place], table, flat, flat if given is None else given)
            if last is not None:
                used = slice(None) if mask is None else mask[:, t]
                last[used] = new[used]
            return new.reshape(value.shape)

        return changed

    def _arguments(
        self,
        rows: NDArray[np.int64],
        numbers: NDArray[np.int64],
        first: NDArray[np.int64],
        frozen: Array | None,
        dtype: np.dtype[Any],
    ) -> dict[str, Any]:
        lines = np.full((*numbers.shape, len(self.targets)), -1, np.int32)
        table = _Table(self.width)
        for patch in self.patches:
            self._add(patch, rows, numbers, first, lines, table)
        if not table.count and frozen is None:
            return {}
        whole = table.lines[1 : 1 + max(table.count, 1)].astype(dtype)
        return {"patch_lines": lines, "patch_table": whole, "patch_width": self.width, "patch_held": frozen}

    def _add(
        self,
        patch: Patch,
        rows: NDArray[np.int64],
        numbers: NDArray[np.int64],
        first: NDArray[np.int64],
        lines: NDArray[np.int32],
        table: _Table,
    ) -> None:
        """Apply a patch on top of the previous ones."""
        target = self.targets.index(patch.gate)
        units = _chosen(patch.units, patch.width(self.spec))
        row_places = _places(patch.rows, rows)
        here = np.flatnonzero(row_places >= 0)
        step_places = np.array(_places(patch.steps, numbers[here]))
        if patch.how == "freeze" and patch.gate in self.gates:  # no change at the first step
            begins = np.flatnonzero(first[here] >= 0)
            step_places[begins, first[here][begins]] = -1
        at, steps = np.nonzero(step_places >= 0)
        if not at.size:
            return
        values = _with_three_axes(np.zeros(()) if patch.value is None else patch.value)
        row_values = row_places[here][at] if values.shape[0] > 1 else np.zeros_like(at)
        step_values = step_places[at, steps] if values.shape[1] > 1 else np.zeros_like(at)
        old = lines[here[at], steps, target].astype(np.int64)
        keys = ((old + 1) * values.shape[0] + row_values) * values.shape[1] + step_values
        _, firsts, inverse = np.unique(keys, return_index=True, return_inverse=True)
        copies = table.copies(old[firsts])
        value = values[row_values[firsts], step_values[firsts]]
        if patch.how == "set":
            copies[:, :2, units], copies[:, 2, units] = 0.0, value
        elif patch.how == "freeze":
            copies[:, :, units] = [[0.0], [1.0], [-0.0]]
        elif patch.how == "add":
            copies[:, 2, units] += value
        else:
            copies[:, :, units] *= value[:, None]
        lines[here[at], steps, target] = table.add(copies) + inverse


def _changed(lines: NDArray[np.int32], table: Array, value: Array, before: Array) -> Array:
    """Return `value [rows, width]` with the patches of each row's line of the kernel's table; -1 is no patch."""
    once, again, added = np.moveaxis(table[lines][:, :, : value.shape[1]], 1, 0)
    # A factor of 0 gives 0 also for NaN and infinity.
    new = np.where(once == 0, 0, once * value) + np.where(again == 0, 0, again * before) + added
    return np.where(lines[:, None] < 0, value, new)


class _Table:
    """Lines of the kernel's `patch_table`, `[3, width]`: factors of the new and the previous value, and addends."""

    def __init__(self, width: int) -> None:
        self.lines = np.repeat(np.repeat(IDENTITY, width, axis=1)[None], 2, axis=0)  # the first one changes nothing
        self.count = 0

    def copies(self, numbers: NDArray[np.int64]) -> Array:
        """Return copies of lines; -1 is the line that changes nothing."""
        return self.lines[numbers + 1]

    def add(self, new: Array) -> int:
        """Append lines and return the index of the first one."""
        begun, self.count = self.count, self.count + len(new)
        if self.count >= len(self.lines):
            grown = np.empty((2 * self.count + 1, *self.lines.shape[1:]))
            grown[: begun + 1] = self.lines[: begun + 1]
            self.lines = grown
        self.lines[begun + 1 : self.count + 1] = new
        return begun


def _as_index(name: str, index: Any) -> Index:
    """Return a checked selection of units, rows or steps: a slice, a tuple of indices, or None for all."""
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
        raise ValueError(f"Patch: expected {name} as a slice, an index or indices, 0 or above, got {index!r:.80}")
    if len(np.unique(numbers)) != len(numbers):
        raise ValueError(f"Patch: expected {name} without repetitions, got {index!r:.80}")
    return tuple(int(number) for number in numbers)


def _count(index: Index) -> int | None:
    """Return how many entries an index selects; None if that depends on the length of the axis."""
    if isinstance(index, slice):
        return None if index.stop is None else len(range(index.start or 0, index.stop, index.step or 1))
    return None if index is None else len(index)


def _chosen(index: Index, length: int) -> NDArray[np.int64]:
    """Return the entries that an index selects from an axis of some length; slices are cut to it."""
    if isinstance(index, slice):
        return np.arange(length)[index]
    return np.arange(length) if index is None else np.array(index)


def _places(index: Index, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the position of each number in the selection of an index; -1 if it isn't selected."""
    if index is None:
        return numbers
    if isinstance(index, slice):
        start, step = index.start or 0, index.step or 1
        inside = (numbers >= start) & ((numbers - start) % step == 0)
        inside &= numbers < index.stop if index.stop is not None else True
        return np.where(inside, (numbers - start) // step, -1)
    order = np.argsort(index)
    ranked = np.array(index)[order]
    ranks = np.minimum(np.searchsorted(ranked, numbers), len(ranked) - 1)
    return np.where(ranked[ranks] == numbers, order[ranks], -1)


def _first(mask: NDArray[np.bool_], order: slice, steps: int) -> NDArray[np.int64]:
    """Return the first used step of each row of a mask in the order of processing; -1 if there is none."""
    first = mask.argmax(axis=1) if steps else np.zeros(len(mask), np.int64)
    return np.where(mask.any(axis=1), np.arange(steps)[order][first] if steps else first, -1)


def _with_three_axes(value: Array) -> Array:
    """Return a value with leading axes added to make it `[rows, steps, units]`."""
    return value.reshape((1,) * (3 - value.ndim) + value.shape)


def _shown(index: Index) -> str:
    if not isinstance(index, slice):
        return str(list(index or ()))
    bounds = [index.start, index.stop] + ([] if index.step is None else [index.step])
    return f"slice({', '.join(map(str, bounds))})"
