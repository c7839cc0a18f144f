"""`Recurrent`, a stack of cells in one direction; consecutive cells run in one call of the kernel."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack import native
from cellstack.cells.bfloat16 import BFloat16Array
from cellstack.cells.errors import ShapeError
from cellstack.cells.spec import STATES
from cellstack.nodes.base import (
    Array,
    CellState,
    Flow,
    KernelLayers,
    Node,
    NodeRun,
    Shape,
    StateGradients,
    StepRule,
    shown,
)
from cellstack.nodes.cell_arrays import Cell, summary_of
from cellstack.nodes.checks import check_flag, one_dtype
from cellstack.nodes.recording import Record, Recording, cell_gradients

if TYPE_CHECKING:
    from cellstack.nodes.masks import Mask, Masks
    from cellstack.nodes.patches import CellPatches
    from cellstack.nodes.stored import Entry

Call = tuple[native.Sequences, list[native.Layer]]
Calls = Generator[Call, None, tuple[Array, list[CellState]]]

BACKWARDS = "it runs backwards from the end of the sequence, which a stream doesn't have"


class CellsRun(NamedTuple):
    """A run of cells over `flow.x [B, T, I]` of any strides.

    `states` has one per cell, contiguous arrays of the cell's dtype; None: the cell's initial state. `record` is a
    recording to extend, or None; `patches` are those of each cell, empty: none; `weights` is the number format of the
    matrices, one of `WEIGHTS`; None: their own.
    """

    flow: Flow
    states: tuple[CellState | None, ...]
    record: Recording | None = None
    patches: Sequence[CellPatches | None] = ()
    weights: str | None = None

    def part(self, cells: slice) -> CellsRun:
        """Return the run of some of the cells."""
        return self._replace(states=self.states[cells], patches=self.patches[cells])


class RecurrentNode(Node):
    """What nodes that run cells over a sequence share."""

    heeds_mask = True
    return_sequences: bool

    def check(self, owner: str, *shapes: Shape) -> Shape:
        steps, _ = super().check(owner, shapes[0])
        starts, sizes = shapes[1:], self.state_sizes
        if starts and len(starts) != len(sizes):
            raise ShapeError(f"{owner}: expected {len(sizes)} initial states, {', '.join(sizes)}, got {len(starts)}")
        for (part, size), shape in zip(sizes.items(), starts, strict=False):
            if len(shape) != 1 or shape[0] not in (None, size):
                raise ShapeError(f"{owner}: expected the initial state {part} [B, {size}], got {shown(shape)}")
        return (steps, self.units) if self.return_sequences else (self.units,)

    @property
    def units(self) -> int:
        """Width of the output."""
        raise NotImplementedError

    def run(
        self,
        flows: Sequence[Flow],
        states: tuple[CellState | None, ...],
        threads: int,
        record: Recording | None = None,
        patches: Sequence[CellPatches | None] = (),
        weights: str | None = None,
    ) -> Flow:
        """See `Node.run` and `CellsRun`; `flows` are the sequence, and perhaps initial states."""
        flow = flows[0]
        if len(flows) > 1:
            arrays = iter([native.plain(start.x) for start in flows[1:]])
            specs = [cell.spec for cell in self.cells]
            states = tuple(STATES[spec.kind](*(next(arrays) for _ in spec.state_sizes)) for spec in specs)
        stacks = self.calls_of(CellsRun(flow, states, record, patches, weights))
        together = [stacks] if record is None else [[stack] for stack in stacks]  # a recording has the cells in order
        results = [result for some in together for result in run_each(some, threads)]
        after = tuple(end for _, ends in results for end in ends)
        y = self.merged([y for y, _ in results])
        return self.in_order(flows, y, after) if self.return_sequences else Flow(y, None, None, after)

    def calls_of(self, run: CellsRun) -> list[Calls]:
        """Return the kernel calls of each stack."""
        raise NotImplementedError

    def merged(self, outputs: list[Array]) -> Array:
        """Return the node's output for the outputs of its stacks."""
        raise NotImplementedError

    def in_order(self, flows: Sequence[Flow], y: Array, after: tuple[CellState, ...]) -> Flow:
        """Return an output sequence, which is in the order of time, with its mask and resets."""
        return flows[0]._replace(x=y, states=after)

    @property
    def calls(self) -> str:
        """The number of kernel calls in a run, in a few words."""
        raise NotImplementedError

    def engine(self, dtype: np.dtype[Any]) -> str:
        few = sum(cell.weights == "bfloat16" for cell in self.cells)
        whose = "" if few == len(self.cells) else f" of {few} cell{'s' * (few > 1)}"
        narrow = f", matrices{whose} in bfloat16" if few else ""
        return f"fused kernel ({native.isa()}, {dtype}{narrow}): {self.calls}"


@dataclass(frozen=True, eq=False)
class Recurrent(RecurrentNode):
    """A stack of cells of any kinds, run over a sequence; the semantics are those of Keras's `RNN`.

    At a masked step every state keeps its value and the output repeats that of the step before (initially h). At a
    reset the states are set to the cells' initial states. With `return_sequences` the mask and the resets stay with the
    sequence.

    Args:
        cells: bottom first; the output of each cell has the width of the next cell's input.
        return_sequences: return `[B, T, W]`; False: return only the output of the last step, `[B, W]`.
        go_backwards: run from the last step to the first, and each piece between resets from its last step. With
            `return_sequences` the output, its mask and its resets are in the order of processing.
        zero_output_for_mask: return zeros at masked steps instead of repeating the output.
        residual: the output of every cell except the first is h plus the cell's input if both have the same width. The
            state remains h.

    Raises:
        ShapeError: no cells, or widths that don't match.
        TypeError: a cell that isn't a `Cell`, different dtypes, a flag that isn't a bool.

    Ref: residual: He et al. 2016, "Deep Residual Learning for Image Recognition", eq. 1; over recurrent layers: Wu et
    al. 2016, "Google's Neural Machine Translation System", eq. 6.
    """

    cells: tuple[Cell, ...]
    return_sequences: bool = True
    go_backwards: bool = False
    zero_output_for_mask: bool = False
    residual: bool = False
    file_type = "recurrent"

    def __post_init__(self) -> None:
        object.__setattr__(self, "cells", tuple(self.cells))
        for name in ("return_sequences", "go_backwards", "zero_output_for_mask", "residual"):
            check_flag("Recurrent", name, getattr(self, name))
        if not self.cells:
            raise ShapeError("Recurrent: expected at least one cell, got none")
        for number, cell in enumerate(self.cells):
            if not isinstance(cell, Cell):
                raise TypeError(f"Recurrent: expected cell {number} to be a Cell, got {type(cell).__name__}")
            below = self.cells[number - 1].spec
            if number and cell.spec.input_size != below.output_size:
                raise ShapeError(
                    f"Recurrent: expected cell {number} with I={below.output_size}, "
                    f"the width of the output of the cell below it, got I={cell.spec.input_size}"
                )
        numbers: dict[str, Array | None] = {f"cell {n}": np.empty(0, cell.dtype) for n, cell in enumerate(self.cells)}
        object.__setattr__(self, "dtype", one_dtype("Recurrent", numbers))
        object.__setattr__(self, "input_size", self.cells[0].spec.input_size)
        object.__setattr__(self, "axes", (2, 2 if self.return_sequences else 1))

    @property
    def units(self) -> int:
        """Width of the output, which is that of the top cell's h."""
        return self.cells[-1].spec.output_size

    @cached_property
    def parts(self) -> tuple[tuple[tuple[Cell, ...], bool], ...]:
        """Groups of consecutive cells that run in one call of the kernel; True if the group's input is then added.

        A cell with a residual is a group by itself.
        """
        parts: list[tuple[tuple[Cell, ...], bool]] = []
        for number, cell in enumerate(self.cells):
            added = self.residual and number > 0 and cell.spec.input_size == cell.spec.output_size
            if added or not parts or parts[-1][1]:
                parts.append(((cell,), added))
            else:
                parts[-1] = ((*parts[-1][0], cell), False)
        return tuple(parts)

    @property
    def kernel_layers(self) -> KernelLayers:
        last_step, zeros = not self.return_sequences, self.zero_output_for_mask
        return KernelLayers(self.parts, len(self.cells), self.go_backwards, last_step, zeros)

    @classmethod
    def of_layers(cls, layers: KernelLayers) -> Recurrent:
        """Return the node that runs the cells of several nodes in one call."""
        return cls(layers.layers, not layers.last_step, layers.reverse, layers.zeros_at_masked)

    @property
    def summary(self) -> str:
        ways = (", residual" if self.residual else "") + (", backwards" if self.go_backwards else "")
        return summary_of(self.cells) + ways

    def calls_of(self, run: CellsRun) -> list[Calls]:
        return [self._calls_of(run)]

    def merged(self, outputs: list[Array]) -> Array:
        return outputs[0]

    def in_order(self, flows: Sequence[Flow], y: Array, after: tuple[CellState, ...]) -> Flow:
        flow = super().in_order(flows, y, after)
        if not self.go_backwards:
            return flow
        reset = _from_the_end(flow.reset)
        return Flow(y[:, ::-1], self.mask_of(flows), None if reset is None else reset[:, ::-1], after)

    def _calls_of(self, run: CellsRun) -> Calls:
        """Yield the kernel calls of a run; the caller runs each before it requests the next one.

        Returns:
            `(y, states)`, where `y` is `[B, T, W]` in the order of `x` in either direction, or `[B, W]`.
        """
        flow = run.flow._replace(reset=_from_the_end(run.flow.reset)) if self.go_backwards else run.flow
        steps, at_end = flow.x.shape[1], 0 if self.go_backwards else -1
        mask, after, in_place = flow.mask, [], run.record is None
        for cells, added in self.parts:
            place = slice(len(after), len(after) + len(cells))
            needs_y = self.return_sequences or added or place.stop < len(self.cells)
            h, ends = yield from self._call(cells, run._replace(flow=flow).part(place), needs_y)
            after += ends
            if h is not None:
                flow = flow._replace(x=self._add(h, flow, in_place) if added else h)
        y = flow.x
        if not self.return_sequences:  # with T = 0, the initial h
            y = y[:, at_end].copy() if self.parts[-1][1] and steps else after[-1].h.copy()
            mask = mask[:, at_end] if mask is not None and steps else None
        if self.zero_output_for_mask and mask is not None:
            y = y if in_place or not self.return_sequences else y.copy()  # don't change the recording
            y[~mask] = 0.0
        return y, after

    def _call(
        self, cells: tuple[Cell, ...], run: CellsRun, needs_y: bool
    ) -> Generator[Call, None, tuple[Array | None, list[CellState]]]:
        """Run some of the cells in one call of the kernel; y, the h of the top one, may be None unless `needs_y`."""
        x, mask, reset, record = run.flow.x, run.flow.mask, run.flow.reset, run.record
        batch, steps, _ = x.shape
        after: list[CellState] = []
        layers, records, below = [], [], x
        for number, (cell, before) in enumerate(zip(cells, run.states, strict=True)):
            spec = cell.spec
            after.append(STATES[spec.kind](*(np.empty((batch, size), x.dtype) for size in spec.state_sizes.values())))
            changes = run.patches[number] if run.patches else None
            arrays: dict[str, Any] = {} if record is None else record.arrays(number, spec, batch, steps, x.dtype)
            if "gates" in arrays:
                assert below is not None, "the input of a recorded cell is recorded too"
                seen = STATES[spec.kind](arrays["y"], *arrays["states"])
                records.append(Record(arrays["gates"], seen, below, before, mask, reset, self.go_backwards, changes))
            else:
                records.append(None)
            if needs_y and number == len(cells) - 1 and "y" not in arrays:
                arrays["y"] = np.empty((batch, steps, spec.output_size), x.dtype)
            below = arrays.get("y")
            if changes is not None:
                arrays |= changes.of_run(batch, steps, mask, self.go_backwards, x.dtype)
            layers.append(native.Layer(cell.packed_in(run.weights), before, after[-1], **arrays))
        yield native.sequences(x, mask, reset, self.go_backwards), layers
        if record is not None:
            record.extend(records)
        return below, after

    def _add(self, h: Array, flow: Flow, in_place: bool) -> Array:
        """Return h + x; at a masked step, that of the last used step since the last reset, or h if there is none.

        `in_place`: h may be overwritten.
        """
        if flow.mask is None:
            return np.add(h, flow.x, out=h if in_place else None)
        order = slice(None, None, -1 if self.go_backwards else 1)
        last = self.last_used(flow.mask, flow.reset)[:, :, None]
        y = np.take_along_axis((h + flow.x)[:, order], np.maximum(last, 0), axis=1)
        return np.where(last < 0, h[:, order], y)[:, order]

    def last_used(self, mask: NDArray[np.bool_], reset: NDArray[np.bool_] | None) -> NDArray[np.int64]:
        """Return, for each step, the last used step up to it since the last reset, `[B, T]`; -1 if there is none.

        The result is in the order of processing, and so are the step numbers.

        Args:
            mask: `[B, T]`, the used steps, in the order of time.
            reset: `[B, T]`, True where the state is reset before the step, or None.
        """
        order = slice(None, None, -1 if self.go_backwards else 1)
        steps = np.arange(mask.shape[1])
        last = np.maximum.accumulate(np.where(mask[:, order], steps, -1), axis=1)
        if reset is not None:
            last[last < np.maximum.accumulate(np.where(reset[:, order], steps, -1), axis=1)] = -1
        return last

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        turned = self.go_backwards and self.return_sequences
        dx, begun = self.stack_gradients(run.records, run.inputs[0], dy[:, ::-1] if turned else dy, dstates)
        return [dx, *begun]

    def stack_gradients(
        self, records: Sequence[Record], flow: Flow, dy: Array, dstates: StateGradients
    ) -> tuple[Array, list[Array]]:
        """Return the gradients of the input, and of the cells' initial states where they were given.

        Args:
            records: those of the cells, in a run over `flow`.
            flow: the input, with its mask.
            dy: the gradient of the output, in the order of time.
            dstates: those of the cells' states after the last step.
        """
        steps, at_end = flow.x.shape[1], 0 if self.go_backwards else -1
        residual = any(added for _, added in self.parts)
        dh = None
        if not self.return_sequences:
            if self.zero_output_for_mask and flow.mask is not None and steps:
                dy = np.where(flow.mask[:, at_end, None], dy, 0)
            dh, dy = dy, np.zeros((len(dy), steps, dy.shape[1]), dy.dtype)
            if residual and steps:  # the output is a sum; take its last step
                dy[:, at_end], dh = dh, None
        elif self.zero_output_for_mask and flow.mask is not None:
            dy = np.where(flow.mask[:, :, None], dy, 0)
        last, begun = len(records), []
        for cells, added in reversed(self.parts):
            passed: Any = 0
            if added:
                passed, dy = self._sum_gradients(records[last - 1], dy)
            for number in reversed(range(last - len(cells), last)):
                after, *others = dstates[number]
                dh = dh if after is None else after if dh is None else dh + after
                dy, before = cell_gradients(self.cells[number], records[number], dy, (dh, *others))
                dh, begun = None, [*before, *begun]
            last -= len(cells)
            dy = dy + passed
        return dy, begun

    def _sum_gradients(self, record: Record, dy: Array) -> tuple[Array, Array]:
        """Return the gradients of x and of h in h + x; a masked step repeats the sum of the last used one."""
        if record.mask is None:
            return dy, dy
        order, last = slice(None, None, -1 if self.go_backwards else 1), self.last_used(record.mask, record.reset)
        dy, dx = dy[:, order], np.zeros_like(dy)
        rows, steps = np.nonzero(last >= 0)
        np.add.at(dx, (rows, last[rows, steps]), dy[rows, steps])
        return dx[:, order], (dx + np.where(last[:, :, None] < 0, dy, 0))[:, order]

    def mask_after(self, masks: Sequence[Mask | None], axes: int, on: Masks[Mask]) -> Mask | None:
        mask = masks[0]
        if mask is None or not self.return_sequences:
            return None
        return on.cut(mask, slice(None, None, -1)) if self.go_backwards else mask

    def step_rule(self, *shapes: Shape) -> StepRule:
        return StepRule(BACKWARDS if self.go_backwards else None)

    def with_weights(self, weights: str) -> Recurrent:
        return replace(self, cells=tuple(cell.with_weights(weights) for cell in self.cells))

    def stored(self) -> tuple[dict[str, Any], Mapping[str, Array | BFloat16Array]]:
        flags = {name: getattr(self, name) for name in self.settings() if name != "cells"}
        arrays = {
            f"{number}/{name}": array
            for number, cell in enumerate(self.cells)
            for name, array in cell.stored_arrays.items()
        }
        return {"type": self.file_type, "cells": [cell.spec.settings for cell in self.cells], **flags}, arrays

    @classmethod
    def restored(cls, entry: Entry) -> Recurrent:
        values = entry.take(cls.keys())
        cells = (Cell.restored(entry.inner(str(n), cell)) for n, cell in enumerate(values.pop("cells")))
        return cls(tuple(cells), **values)

    @property
    def calls(self) -> str:
        calls, cells = len(self.parts), len(self.cells)
        count = "one call" if calls == 1 else f"{calls} calls, NumPy's sums between them,"
        return count if cells == 1 else f"{count} for the stack of {cells} cells"


def run_each(stacks: Sequence[Calls], threads: int) -> list[tuple[Array, list[CellState]]]:
    """Run independent stacks, the n-th call of each at the same time, and return their results."""
    results: list[Any] = [None] * len(stacks)

    def storing(n: int, stack: Calls) -> Iterator[Call]:
        results[n] = yield from stack

    for calls in zip_longest(*(storing(n, stack) for n, stack in enumerate(stacks))):
        native.forward_each([call for call in calls if call is not None], threads)
    return results


def _from_the_end(reset: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    """Return the resets for a backward run: True at the last step of each piece except the last piece."""
    if reset is None:
        return None
    back = np.zeros_like(reset)
    back[:, :-1] = reset[:, 1:]
    return back
