"""The recurrent nodes: stacks of cells in one direction or both; consecutive cells run in one call of the kernel."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cellstack import native
from cellstack.bfloat16 import BFloat16Array
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
from cellstack.nodes.cell import Cell, summary_of
from cellstack.nodes.checks import check_choice, check_flag, one_dtype
from cellstack.nodes.recording import Record, Recording
from cellstack.spec import STATES, ShapeError

if TYPE_CHECKING:
    from cellstack.nodes.masks import Mask, Masks
    from cellstack.nodes.patches import CellPatches
    from cellstack.nodes.stored import Entry

Call = tuple[native.Sequences, list[native.Layer]]
Calls = Generator[Call, None, tuple[Array, list[CellState]]]

MERGE_MODES = ("concat", "sum", "mul", "ave")
BACKWARDS = "it runs backwards from the end of the sequence, which a stream doesn't have"


@dataclass(frozen=True, eq=False)
class Recurrent(Node):
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
    settings: ClassVar = {
        "cells": list,
        "return_sequences": bool,
        "go_backwards": bool,
        "zero_output_for_mask": bool,
        "residual": bool,
    }
    heeds_mask = True

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

    def check(self, owner: str, *shapes: Shape) -> Shape:
        steps, _ = super().check(owner, shapes[0])
        _check_initial_states(owner, self, shapes[1:])
        return (steps, self.units) if self.return_sequences else (self.units,)

    def forward(
        self,
        flow: Flow,
        states: tuple[CellState | None, ...],
        threads: int,
        record: Recording | None = None,
        patches: Sequence[CellPatches | None] = (),
        weights: str | None = None,
    ) -> tuple[Array, list[CellState]]:
        """Run the stack over `flow.x [B, T, I]` of any strides.

        Args:
            flow: the input, with its mask and resets `[B, T]` or None.
            states: one per cell, contiguous arrays of the cell's dtype; None: the cell's initial state.
            threads: the number of threads that the kernel may use.
            record: a recording to extend, or None.
            patches: the patches of each cell; empty: none.
            weights: the number format of the matrices, one of `WEIGHTS`; None: their own.

        Returns:
            `(y, states)`, where `y` is `[B, T, W]` in the order of `x` in either direction, or `[B, W]`.
        """
        (result,) = _run_each([self.kernel_calls(flow, states, record, patches, weights)], threads)
        return result

    def kernel_calls(
        self,
        flow: Flow,
        states: tuple[CellState | None, ...],
        record: Recording | None,
        patches: Sequence[CellPatches | None],
        weights: str | None,
    ) -> Calls:
        """Yield the kernel calls of `forward`; the caller runs each before it requests the next one.

        Args:
            flow, states, record, patches, weights: see `forward`.

        Returns:
            the results of `forward`.
        """
        steps, at_end = flow.x.shape[1], 0 if self.go_backwards else -1
        reset = _from_the_end(flow.reset) if self.go_backwards else flow.reset
        y, mask, after = flow.x, flow.mask, []
        for cells, added in self.parts:
            done = len(after) + len(cells)
            wanted = self.return_sequences or added or done < len(self.cells)
            x, place = y, slice(len(after), done)
            changes = patches[place]
            made, ends = yield from self._call(cells, x, mask, reset, states[place], wanted, record, changes, weights)
            after += ends
            if made is not None:
                y = self._add(made, x, mask, reset, record is None) if added else made
        if not self.return_sequences:  # with T = 0, the initial h
            y = y[:, at_end].copy() if self.parts[-1][1] and steps else after[-1].h.copy()
            mask = mask[:, at_end] if mask is not None and steps else None
        if self.zero_output_for_mask and mask is not None:
            y = y if record is None or not self.return_sequences else y.copy()  # don't change the recording
            y[~mask] = 0.0
        return y, after

    def _call(
        self,
        cells: tuple[Cell, ...],
        x: Array,
        mask: NDArray[np.bool_] | None,
        reset: NDArray[np.bool_] | None,
        states: tuple[CellState | None, ...],
        wanted: bool,
        record: Recording | None,
        patches: Sequence[CellPatches | None],
        weights: str | None,
    ) -> Generator[Call, None, tuple[Array | None, list[CellState]]]:
        """Run some of the cells in one call of the kernel; y, the h of the top one, may be None unless `wanted`."""
        batch, steps, _ = x.shape
        after: list[CellState] = []
        layers, made, below = [], [], x
        for number, (cell, before) in enumerate(zip(cells, states, strict=True)):
            spec = cell.spec
            after.append(STATES[spec.kind](*(np.empty((batch, size), x.dtype) for size in spec.state_sizes.values())))
            changes = patches[number] if patches else None
            kept: dict[str, Any] = {} if record is None else record.arrays(number, spec, batch, steps, x.dtype)
            if "gates" in kept:
                assert below is not None, "the input of a recorded cell is recorded too"
                seen = STATES[spec.kind](kept["y"], *kept["states"])
                made.append(Record(kept["gates"], seen, below, before, mask, reset, self.go_backwards, changes))
            else:
                made.append(None)
            if wanted and number == len(cells) - 1 and "y" not in kept:
                kept["y"] = np.empty((batch, steps, spec.output_size), x.dtype)
            below = kept.get("y")
            if changes is not None:
                kept |= changes.of_run(batch, steps, mask, self.go_backwards, x.dtype)
            layers.append(native.Layer(cell.packed_in(weights), before, after[-1], **kept))
        yield native.sequences(x, mask, reset, self.go_backwards), layers
        if record is not None:
            record.extend(made)
        return below, after

    def _add(
        self, h: Array, x: Array, mask: NDArray[np.bool_] | None, reset: NDArray[np.bool_] | None, own: bool
    ) -> Array:
        """Return h + x; at a masked step, that of the last used step since the last reset, or h if there is none.

        `own`: h may be overwritten.
        """
        if mask is None:
            return np.add(h, x, out=h if own else None)
        order = slice(None, None, -1 if self.go_backwards else 1)
        last = self.last_used(mask, reset)[:, :, None]
        y = np.take_along_axis((h + x)[:, order], np.maximum(last, 0), axis=1)
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

    def run(
        self,
        flows: Sequence[Flow],
        states: tuple[CellState | None, ...],
        threads: int,
        record: Recording | None = None,
        patches: Sequence[CellPatches | None] = (),
        weights: str | None = None,
    ) -> Flow:
        """See `Node.run`; for `record`, `patches` and `weights` see `forward`."""
        flow = flows[0]
        if len(flows) > 1:
            states = _given_states(self, flows[1:])
        y, ends = self.forward(flow, states, threads, record, patches, weights)
        after = tuple(ends)
        if not self.return_sequences:
            return Flow(y, None, None, after)
        if not self.go_backwards:
            return flow._replace(x=y, states=after)
        reset = _from_the_end(flow.reset)
        return Flow(y[:, ::-1], self.mask_of(flows), None if reset is None else reset[:, ::-1], after)

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
                dy, before = _cell_gradients(self.cells[number], records[number], dy, (dh, *others))
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
        flags = {name: getattr(self, name) for name in self.settings if name != "cells"}
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

    def engine(self, dtype: np.dtype[Any]) -> str:
        return f"fused kernel ({native.isa()}, {dtype}{_narrow(self)}): {self.calls}"

    @property
    def calls(self) -> str:
        """The number of kernel calls in a run of the stack, in a few words."""
        calls, cells = len(self.parts), len(self.cells)
        count = "one call" if calls == 1 else f"{calls} calls, NumPy's sums between them,"
        return count if cells == 1 else f"{count} for the stack of {cells} cells"


def _narrow(node: Node) -> str:
    """Return which matrices of a node's cells are bfloat16, in a few words; "" if none are."""
    few = sum(cell.weights == "bfloat16" for cell in node.cells)
    whose = "" if few == len(node.cells) else f" of {few} cell{'s' * (few > 1)}"
    return f", matrices{whose} in bfloat16" if few else ""


def _check_initial_states(owner: str, node: Node, shapes: Sequence[Shape]) -> None:
    """Raise `ShapeError` unless there is no initial state, or one vector per row for each state of the node."""
    sizes = node.state_sizes
    if shapes and len(shapes) != len(sizes):
        raise ShapeError(f"{owner}: expected {len(sizes)} initial states, {', '.join(sizes)}, got {len(shapes)}")
    for (part, size), shape in zip(sizes.items(), shapes, strict=False):
        if len(shape) != 1 or shape[0] not in (None, size):
            raise ShapeError(f"{owner}: expected the initial state {part} [B, {size}], got {shown(shape)}")


def _run_each(stacks: Sequence[Calls], threads: int) -> list[tuple[Array, list[CellState]]]:
    """Run independent stacks, the n-th call of each at the same time, and return their results."""
    results: list[Any] = [None] * len(stacks)

    def storing(n: int, stack: Calls) -> Iterator[Call]:
        results[n] = yield from stack

    for calls in zip_longest(*(storing(n, stack) for n, stack in enumerate(stacks))):
        native.forward_each([call for call in calls if call is not None], threads)
    return results


def _given_states(node: Node, starts: Sequence[Flow]) -> tuple[CellState, ...]:
    """Return the initial states that a node takes as inputs, one per cell."""
    arrays = iter([native.plain(start.x) for start in starts])
    specs = [cell.spec for cell in node.cells]
    return tuple(STATES[spec.kind](*(next(arrays) for _ in spec.state_sizes)) for spec in specs)


def _from_the_end(reset: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    """Return the resets for a backward run: True at the last step of each piece except the last piece."""
    if reset is None:
        return None
    back = np.zeros_like(reset)
    back[:, :-1] = reset[:, 1:]
    return back


def ends_both_ways(backwards: Iterable[Node]) -> bool:
    """Return whether a row of nodes gives the sequence of a bidirectional layer, perhaps changed step by step.

    Its last step isn't the layer's final states: the backward direction ends at the first step.

    Args:
        backwards: the nodes, the last one first.
    """
    for node in backwards:
        if node.cells or node.mixes_steps:
            return isinstance(node, Bidirectional) and node.forward.return_sequences
    return False


def final(node: Node) -> Recurrent | Bidirectional | None:
    """Return a recurrent node that returns only the final output, of both directions; None for other nodes."""
    if isinstance(node, Bidirectional):
        forward, backward = (replace(part, return_sequences=False) for part in (node.forward, node.backward))
        return replace(node, forward=forward, backward=backward)
    return replace(node, return_sequences=False) if isinstance(node, Recurrent) else None


@dataclass(frozen=True, eq=False)
class Bidirectional(Node):
    """A forward and a backward stack over the same sequence, whose outputs are merged step by step.

    As in Keras, both return zeros at masked steps if they return sequences: their `zero_output_for_mask` is set to
    their `return_sequences`.

    Args:
        forward: the forward stack.
        backward: the backward stack (`go_backwards=True`).
        merge_mode: `"concat"` (forward first), `"sum"`, `"mul"` or `"ave"` (the mean).

    Raises:
        ShapeError: the input sizes differ, or the output widths differ and `merge_mode` isn't `"concat"`.
        TypeError: the dtypes differ, or one isn't a `Recurrent`.
        ValueError: a wrong direction, different `return_sequences`, or an unknown merge mode.
    """

    forward: Recurrent
    backward: Recurrent
    merge_mode: str = "concat"
    file_type = "bidirectional"
    settings: ClassVar = {"forward": dict, "backward": dict, "merge_mode": str}
    heeds_mask = True

    def __post_init__(self) -> None:
        owner = "Bidirectional"
        for name in ("forward", "backward"):
            node = getattr(self, name)
            if not isinstance(node, Recurrent):
                raise TypeError(f"{owner}: expected {name} to be a Recurrent, got {type(node).__name__}")
            if node.go_backwards != (name == "backward"):
                raise ValueError(f"{owner}: expected {name} with go_backwards={name == 'backward'}, got the opposite")
            object.__setattr__(self, name, replace(node, zero_output_for_mask=node.return_sequences))
        check_choice(owner, "merge_mode", self.merge_mode, MERGE_MODES)
        forward, backward = self.forward, self.backward
        if forward.return_sequences != backward.return_sequences:
            raise ValueError(f"{owner}: expected return_sequences to be the same forwards and backwards")
        if forward.input_size != backward.input_size:
            raise ShapeError(f"{owner}: expected backward I={forward.input_size}, got I={backward.input_size}")
        if self.merge_mode != "concat" and forward.units != backward.units:
            raise ShapeError(
                f"{owner}: expected backward H={forward.units} to {self.merge_mode}, got H={backward.units}"
            )
        both = {"forward": forward, "backward": backward}
        numbers: dict[str, Array | None] = {name: np.empty(0, node.dtype) for name, node in both.items()}
        object.__setattr__(self, "dtype", one_dtype(owner, numbers))
        object.__setattr__(self, "input_size", forward.input_size)
        object.__setattr__(self, "axes", forward.axes)
        object.__setattr__(self, "cells", forward.cells + backward.cells)

    @property
    def summary(self) -> str:
        return f"{self.forward.summary} and back, {self.merge_mode}"

    def check(self, owner: str, *shapes: Shape) -> Shape:
        steps, _ = super().check(owner, shapes[0])
        _check_initial_states(owner, self, shapes[1:])
        units = self.forward.units + (self.backward.units if self.merge_mode == "concat" else 0)
        return (steps, units) if self.forward.return_sequences else (units,)

    def run(
        self,
        flows: Sequence[Flow],
        states: tuple[CellState | None, ...],
        threads: int,
        record: Recording | None = None,
        patches: Sequence[CellPatches | None] = (),
        weights: str | None = None,
    ) -> Flow:
        """See `Recurrent.run`; the forward stack is recorded first."""
        flow = flows[0]
        if len(flows) > 1:
            states = _given_states(self, flows[1:])
        half = len(self.forward.cells)
        stacks = [
            self.forward.kernel_calls(flow, states[:half], record, patches[:half], weights),
            self.backward.kernel_calls(flow, states[half:], record, patches[half:], weights),
        ]
        if record is None:
            (ahead, after), (back, after_back) = _run_each(stacks, threads)
        else:  # one after the other, as a recording has the cells in order
            (ahead, after), (back, after_back) = (_run_each([stack], threads)[0] for stack in stacks)
        if self.merge_mode == "concat":
            y = np.concatenate([ahead, back], axis=-1)
        elif self.merge_mode == "mul":
            y = ahead * back
        else:
            y = ahead + back if self.merge_mode == "sum" else (ahead + back) * ahead.dtype.type(0.5)
        states = (*after, *after_back)
        return flow._replace(x=y, states=states) if self.forward.return_sequences else Flow(y, None, None, states)

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        flow, count = run.inputs[0], len(self.forward.cells)
        if self.merge_mode == "concat":
            ahead, back = dy[..., : self.forward.units], dy[..., self.forward.units :]
        elif self.merge_mode == "mul":
            befores = tuple(record.before for record in run.records)
            ahead, _ = self.forward.forward(flow, befores[:count], 1)
            back, _ = self.backward.forward(flow, befores[count:], 1)
            ahead, back = dy * back, dy * ahead
        else:
            ahead = back = dy if self.merge_mode == "sum" else dy * dy.dtype.type(0.5)
        dx, begun = self.forward.stack_gradients(run.records[:count], flow, ahead, dstates[:count])
        other, begun_back = self.backward.stack_gradients(run.records[count:], flow, back, dstates[count:])
        return [dx + other, *begun, *begun_back]

    def mask_after(self, masks: Sequence[Mask | None], axes: int, on: Masks[Mask]) -> Mask | None:
        return masks[0] if self.forward.return_sequences else None

    def step_rule(self, *shapes: Shape) -> StepRule:
        return StepRule(BACKWARDS)

    def with_weights(self, weights: str) -> Bidirectional:
        forward, backward = (half.with_weights(weights) for half in (self.forward, self.backward))
        return Bidirectional(forward, backward, self.merge_mode)

    def stored(self) -> tuple[dict[str, Any], Mapping[str, Array | BFloat16Array]]:
        described: dict[str, Any] = {"type": self.file_type}
        arrays = {}
        for half in ("forward", "backward"):
            described[half], own = getattr(self, half).stored()
            arrays |= {f"{half}/{name}": array for name, array in own.items()}
        return {**described, "merge_mode": self.merge_mode}, arrays

    @classmethod
    def restored(cls, entry: Entry) -> Bidirectional:
        values = entry.take(cls.keys())
        forward, backward = (
            Recurrent.restored(entry.inner(half, values[half], Recurrent.file_type)) for half in ("forward", "backward")
        )
        return cls(forward, backward, values["merge_mode"])

    def engine(self, dtype: np.dtype[Any]) -> str:
        calls = f"{self.forward.calls}, {self.backward.calls} back, merged in NumPy"
        return f"fused kernel ({native.isa()}, {dtype}{_narrow(self)}): {calls}"


def _cell_gradients(
    cell: Cell, record: Record, dy: Array | None, ends: Sequence[Array | None]
) -> tuple[Array, list[Array]]:
    """Return the gradients of a cell's input, and of its initial state, where one was given."""
    own = {name: native.plain(array) for name, array in cell.arrays.items()}
    weights = native.weights(cell.spec, own, copy=False)
    x = native.plain(record.x)
    batch, steps, _ = x.shape
    before = [native.plain(array) for array in record.before or ()]
    made = native.results(cell.spec, batch, steps, lambda shape: np.empty(shape, x.dtype))
    layer = native.Layer(weights, before, **made)
    sequences = native.sequences(x, record.mask, record.reset, record.reverse)
    native.forward(sequences, [layer], 1)
    dx = np.zeros_like(x)
    dbefore = [np.zeros_like(array) for array in before]
    dy, *dafter = (None if array is None else native.plain(array) for array in (dy, *ends))
    native.backward(sequences, [layer], [native.Gradients(dy, dafter, dx=dx, dbefore=dbefore)], 1)
    return dx, dbefore
