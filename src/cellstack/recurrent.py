"""The nodes that run over time: stacks of LSTM cells, one way or both, each stack one call of the kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack import _kernel
from cellstack.nodes import Array, Flow, Node, check_choice, check_flag, hold, needs_sequence, one_dtype
from cellstack.spec import ACTIVATIONS, CellSpec, ShapeError, State

MERGE_MODES = ("concat", "sum", "mul", "ave")


@dataclass(frozen=True, eq=False)
class Cell:
    """One LSTM cell: its description and its arrays, gates in the order i, f, g, o.

    Args:
        spec: widths and activations.
        kernel: `[I, 4H]`, float32 or float64.
        recurrent_kernel: `[H, 4H]`, of the same dtype.
        bias: `[4H]`, or None where `spec.use_bias` is False.

    Raises:
        ShapeError: an array isn't shaped as `spec` says.
        TypeError: a dtype other than float32 and float64, or not one for all.
    """

    spec: CellSpec
    kernel: Array
    recurrent_kernel: Array
    bias: Array | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.spec, CellSpec):
            raise TypeError(f"Cell: expected spec to be a CellSpec, got {type(self.spec).__name__}")
        if (self.bias is None) == self.spec.use_bias:
            expected = "[4H]" if self.spec.use_bias else "None"
            raise ShapeError(f"Cell: expected bias {expected}, as use_bias is {self.spec.use_bias}, got the opposite")
        for name, shape in self.spec.shapes.items():
            object.__setattr__(self, name, hold("Cell", name, getattr(self, name), shape))
        one_dtype("Cell", {name: getattr(self, name) for name in self.spec.shapes})

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of every array of the cell."""
        return self.kernel.dtype

    @cached_property
    def packed(self) -> Any:
        """The weights in the kernel's own layout, packed at the first use."""
        spec = self.spec
        return _kernel.Packed(
            self.dtype == np.float64,
            spec.input_size,
            spec.units,
            self.kernel.ctypes.data,
            self.recurrent_kernel.ctypes.data,
            0 if self.bias is None else self.bias.ctypes.data,
            ACTIVATIONS.index(spec.activation),
            ACTIVATIONS.index(spec.recurrent_activation),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies hold the arrays alone: they are checked, frozen and packed again."""
        return Cell, (self.spec, self.kernel, self.recurrent_kernel, self.bias)


@dataclass(frozen=True, eq=False)
class Recurrent(Node):
    """A stack of LSTM cells over time, bottom cell first; the semantics are those of Keras's `RNN`.

    A step that the mask leaves out carries every state and repeats the output before it (the initial h at the start).
    Downstream, the mask goes on with the sequence.

    Args:
        cells: bottom first; each cell's units are the next one's input size.
        return_sequences: `[B, T, H]`, else the output after the last step, `[B, H]`.
        go_backwards: run from the last step to the first; with `return_sequences` the steps come in the order in
            which they were run, and so does the mask that goes on.
        zero_output_for_mask: give zeros, not the output before, at steps that the mask leaves out.

    Raises:
        ShapeError: no cell, or widths that don't meet.
        TypeError: a cell that isn't a `Cell`, dtypes that differ, a flag that isn't a bool.
    """

    cells: tuple[Cell, ...]
    return_sequences: bool = True
    go_backwards: bool = False
    zero_output_for_mask: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "cells", tuple(self.cells))
        for name in ("return_sequences", "go_backwards", "zero_output_for_mask"):
            check_flag("Recurrent", name, getattr(self, name))
        if not self.cells:
            raise ShapeError("Recurrent: expected at least one cell, got none")
        for number, cell in enumerate(self.cells):
            if not isinstance(cell, Cell):
                raise TypeError(f"Recurrent: expected cell {number} to be a Cell, got {type(cell).__name__}")
            below = self.cells[number - 1]
            if number and cell.spec.input_size != below.spec.units:
                raise ShapeError(
                    f"Recurrent: expected cell {number} with I={below.spec.units}, "
                    f"the units of the cell below it, got I={cell.spec.input_size}"
                )
        kernels: dict[str, Array | None] = {f"cell {n}": cell.kernel for n, cell in enumerate(self.cells)}
        object.__setattr__(self, "dtype", one_dtype("Recurrent", kernels))
        object.__setattr__(self, "input_size", self.cells[0].spec.input_size)

    @property
    def units(self) -> int:
        """Width H of the top cell."""
        return self.cells[-1].spec.units

    @property
    def summary(self) -> str:
        """What the node does, in a few words."""
        widths = " -> ".join(str(width) for width in (self.input_size, *(cell.spec.units for cell in self.cells)))
        return f"LSTM {widths}{', backwards' if self.go_backwards else ''}"

    def check(self, owner: str, width: int | None, sequence: bool) -> tuple[int | None, bool]:
        """See `Node.check`."""
        needs_sequence(owner, "Recurrent", sequence)
        super().check(owner, width, sequence)
        return self.units, self.return_sequences

    def forward(
        self, x: Array, mask: NDArray[np.bool_] | None, states: tuple[State | None, ...], threads: int
    ) -> tuple[Array, tuple[State, ...]]:
        """Run the stack in one call of the kernel.

        Args:
            x: `[B, T, I]`, any strides.
            mask: `[B, T]`, True = use, or None.
            states: one a cell, contiguous arrays of the cell's dtype; None = zeros.
            threads: how many the kernel may use.

        Returns:
            `(y, states)`, where `y` is `[B, T, H]` in the order of `x` whatever `go_backwards` says, or `[B, H]`.
        """
        batch, steps, _ = x.shape
        item = x.itemsize
        if x.strides[2] != item or any(s % item for s in x.strides) or not x.flags.aligned:
            x = np.ascontiguousarray(x)
        if mask is not None:
            mask = np.ascontiguousarray(mask)
        y = np.empty((batch, steps, self.units), x.dtype) if self.return_sequences else None
        after = tuple(State(*(np.empty((batch, cell.spec.units), x.dtype) for _ in range(2))) for cell in self.cells)
        layers = []
        for number, (cell, before, end) in enumerate(zip(self.cells, states, after, strict=True), start=1):
            h0, c0 = (0, 0) if before is None else (before.h.ctypes.data, before.c.ctypes.data)
            top = y.ctypes.data if y is not None and number == len(self.cells) else 0
            layers.append((cell.packed, h0, c0, end.h.ctypes.data, end.c.ctypes.data, top, 0, 0, 0))
        strides = (x.strides[0] // item, x.strides[1] // item)
        mask_at = 0 if mask is None else mask.ctypes.data
        _kernel.lstm_forward(batch, steps, layers, x.ctypes.data, *strides, mask_at, self.go_backwards, threads)
        if y is None:
            y = after[-1].h.copy()
            if self.zero_output_for_mask and mask is not None and steps:
                y[~mask[:, 0 if self.go_backwards else -1]] = 0.0
        elif self.zero_output_for_mask and mask is not None:
            y[~mask] = 0.0
        return y, after

    def run(self, flow: Flow, states: tuple[State | None, ...], threads: int) -> Flow:
        """See `Node.run`."""
        y, after = self.forward(flow.x, flow.mask, states, threads)
        mask = flow.mask if self.return_sequences else None
        if self.go_backwards and self.return_sequences:
            y, mask = y[:, ::-1], (None if mask is None else mask[:, ::-1])
        return Flow(y, mask, flow.states + after)


@dataclass(frozen=True, eq=False)
class Bidirectional(Node):
    """Two stacks over the same sequence, one from each end, merged step by step in the order of time.

    As in Keras, both give zeros at steps that the mask leaves out where they return sequences: the
    `zero_output_for_mask` of the two is set to their `return_sequences`.

    Args:
        forward: the stack that goes forwards.
        backward: the stack that goes backwards (`go_backwards=True`).
        merge_mode: `"concat"` (forward half first), `"sum"`, `"mul"` or `"ave"`.

    Raises:
        ShapeError: the two differ in input size, or in units where they aren't concatenated.
        TypeError: the two differ in dtype, or aren't `Recurrent`.
        ValueError: the directions or `return_sequences` don't fit, or another merge mode.
    """

    forward: Recurrent
    backward: Recurrent
    merge_mode: str = "concat"

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
        kernels: dict[str, Array | None] = {"forward": forward.cells[0].kernel, "backward": backward.cells[0].kernel}
        object.__setattr__(self, "dtype", one_dtype(owner, kernels))
        object.__setattr__(self, "input_size", forward.input_size)
        object.__setattr__(self, "cells", forward.cells + backward.cells)

    @property
    def summary(self) -> str:
        """What the node does, in a few words."""
        return f"{self.forward.summary} and back, {self.merge_mode}"

    def check(self, owner: str, width: int | None, sequence: bool) -> tuple[int | None, bool]:
        """See `Node.check`."""
        needs_sequence(owner, "Bidirectional", sequence)
        super().check(owner, width, sequence)
        units = self.forward.units + (self.backward.units if self.merge_mode == "concat" else 0)
        return units, self.forward.return_sequences

    def run(self, flow: Flow, states: tuple[State | None, ...], threads: int) -> Flow:
        """See `Node.run`."""
        half = len(self.forward.cells)
        ahead, after = self.forward.forward(flow.x, flow.mask, states[:half], threads)
        back, after_back = self.backward.forward(flow.x, flow.mask, states[half:], threads)
        if self.merge_mode == "concat":
            y = np.concatenate([ahead, back], axis=-1)
        elif self.merge_mode == "mul":
            y = ahead * back
        else:
            y = ahead + back if self.merge_mode == "sum" else (ahead + back) * ahead.dtype.type(0.5)
        mask = flow.mask if self.forward.return_sequences else None
        return Flow(y, mask, flow.states + after + after_back)
