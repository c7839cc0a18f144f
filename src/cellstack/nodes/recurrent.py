"""The recurrent nodes: stacks of cells in one direction or both; consecutive cells run in one call of the kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack import native
from cellstack.bfloat16 import BFloat16Array, rounded
from cellstack.cells import KINDS
from cellstack.nodes.base import (
    Array,
    CellState,
    Flow,
    FrameRule,
    Node,
    Shape,
    Types,
    check_choice,
    check_flag,
    hold,
    hold_bfloat16,
    one_dtype,
    shown,
)
from cellstack.spec import ARRAYS, MATRICES, STATES, CellSpec, ShapeError

if TYPE_CHECKING:
    from cellstack.nodes.masks import Mask, Masks
    from cellstack.nodes.patches import CellPatches
    from cellstack.nodes.stored import Entry

WEIGHTS = ("float32", "bfloat16", "int8")
"""Number formats of the matrices of cells in a run or a stream; float64 cells keep float64."""

HELD = ("float32", "bfloat16")
"""Number formats in which a float32 cell can store its matrices."""

MOST_DEPTH = (2**31 - 1) // 127**2
"""The largest number of products of 8-bit integers whose sum always fits into 32 bits."""

MERGE_MODES = ("concat", "sum", "mul", "ave")
BACKWARDS = "it runs backwards from the end of the sequence, which a stream doesn't have"
TYPES = {"int": int, "str": str, "bool": bool, "float": float, "float | None": float, "Any": dict}
CELL_WIDTHS: Types = {"input_size": int, "units": int}
CELL_FLAGS: Types = {
    flag.name: TYPES[str(flag.type)] for flag in fields(CellSpec) if flag.name not in CELL_WIDTHS
}  # optional in a file: the default applies
KIND_NAMES = {name: kind.title for name, kind in KINDS.items()}


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Cell:
    """One cell: its description and its arrays. Arrays that the cell doesn't have are None.

    Args:
        spec: the kind of cell, its widths and its flags.
        arrays: the arrays of `spec.shapes` in order, float32 or float64. The matrices of a float32 cell (`kernel`,
            `recurrent_kernel`, `projection`) may all be `BFloat16Array`; they are stored so, and the attributes return
            them as float32. See `with_weights`.
        named: the remaining arrays by name; None for one that the cell doesn't have.

    Raises:
        ShapeError: a missing or superfluous array, or a shape that differs from `spec.shapes`.
        TypeError: a dtype other than float32 and float64, or several dtypes; an array given twice; only some of the
            matrices in bfloat16.

    >>> spec = CellSpec(3, 4, kind="gru", reset_after=False)
    >>> cell = Cell(spec, np.ones((3, 12)), recurrent_kernel=np.ones((4, 12)), bias=np.zeros(12))
    >>> cell
    Cell of float64: GRU 3 -> 4 (no reset after)
    >>> [name for name in cell.arrays]
    ['kernel', 'recurrent_kernel', 'bias']
    """

    spec: CellSpec
    kernel: Array
    recurrent_kernel: Array
    bias: Array | None
    peepholes: Array | None
    projection: Array | None
    kernel_gain: Array | None
    recurrent_gain: Array | None
    cell_gain: Array | None
    cell_bias: Array | None
    initial_h: Array | None
    initial_c: Array | None
    _bfloat16: dict[str, BFloat16Array] = field(init=False, repr=False, compare=False)

    def __init__(self, spec: CellSpec, *arrays: Any, **named: Any) -> None:
        if not isinstance(spec, CellSpec):
            raise TypeError(f"Cell: expected spec to be a CellSpec, got {type(spec).__name__}")
        shapes = spec.shapes
        if len(arrays) > len(shapes):
            raise ShapeError(f"Cell: expected {len(shapes)} arrays, {', '.join(shapes)}, got {len(arrays)}")
        given = dict(zip(shapes, arrays, strict=False))
        for name in named:
            if name not in ARRAYS or name in given:
                got = f"{name} twice" if name in given else name
                raise TypeError(f"Cell: expected each of {', '.join(shapes)} once, got {got}")
        given |= named
        object.__setattr__(self, "spec", spec)
        bfloat16: dict[str, BFloat16Array] = {}
        for name in ARRAYS:
            value = given.get(name)
            if (value is None) == (name in shapes):
                expected = f"{name} {list(shapes[name])}, got none" if value is None else f"no {name}, got one"
                raise ShapeError(f"Cell: expected {expected}")
            if isinstance(value, BFloat16Array):  # without an attribute: `__getattr__` returns it as float32
                bfloat16[name] = hold_bfloat16("Cell", name, value, shapes[name])
            else:
                object.__setattr__(self, name, None if value is None else hold("Cell", name, value, shapes[name]))
        object.__setattr__(self, "_bfloat16", bfloat16)
        matrices = [name for name in MATRICES if name in shapes]
        if bfloat16 and list(bfloat16) != matrices:
            expected, got = ", ".join(matrices), ", ".join(bfloat16)
            raise TypeError(f"Cell: expected all of {expected} in bfloat16 or none, got {got}")
        whole: dict[str, Array | None] = {}
        if bfloat16:
            whole["matrices"] = np.empty(0, np.float32)
        whole |= {name: array for name, array in self.held.items() if not isinstance(array, BFloat16Array)}
        one_dtype("Cell", whole)

    def __getattr__(self, name: str) -> Array:
        """Return a matrix that is stored as bfloat16, converted to float32."""
        bfloat16 = self.__dict__.get("_bfloat16", {})
        if name not in bfloat16:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        array = np.asarray(bfloat16[name])
        array.setflags(write=False)
        return array

    @property
    def arrays(self) -> dict[str, Array]:
        """The cell's arrays by name, in the order of `CellSpec.shapes`; bfloat16 ones as float32."""
        return {name: getattr(self, name) for name in self.spec.shapes}

    @property
    def held(self) -> dict[str, Array | BFloat16Array]:
        """The cell's arrays as they are stored, bfloat16 ones as `BFloat16Array`."""
        return {
            name: self._bfloat16[name] if name in self._bfloat16 else getattr(self, name) for name in self.spec.shapes
        }

    @property
    def weights(self) -> str:
        """The number format of the matrices: `"float32"`, `"float64"` or `"bfloat16"`."""
        return "bfloat16" if self._bfloat16 else self.dtype.name

    @property
    def initial(self) -> dict[str, Array]:
        """The initial state, `h [P]` and `c [H]` by name: learned, or zeros."""
        learned = {name: getattr(self, f"initial_{name}") for name in self.spec.state_sizes}
        sizes = self.spec.state_sizes
        return {name: np.zeros(sizes[name], self.dtype) if of is None else of for name, of in learned.items()}

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype in which the cell computes: that of its arrays, or float32 if its matrices are bfloat16."""
        return np.dtype(np.float32) if self._bfloat16 else self.kernel.dtype

    @property
    def summary(self) -> str:
        """The kind, widths and flags of the cell, in a few words."""
        return _summary((self,))

    def with_weights(self, weights: str) -> Cell:
        """Return the cell with its matrices stored in another number format; its other arrays don't change.

        Args:
            weights: `"bfloat16"`: round each number to the nearest bfloat16 (8 bits of precision, two bytes);
                `"float32"`: convert bfloat16 to float32, without a change of the values.

        Raises:
            ValueError: an unknown format.
            TypeError: bfloat16 for a float64 cell.

        >>> cell = Cell(CellSpec(1, 2, use_bias=False), np.full((1, 8), 0.1, "f4"), np.ones((2, 8), "f4"))
        >>> small = cell.with_weights("bfloat16")
        >>> small
        Cell of float32: LSTM 1 -> 2 (no bias, matrices in bfloat16)
        >>> float(small.kernel[0, 0])
        0.10009765625
        """
        check_choice("Cell", "weights", weights, HELD)
        if weights == self.weights or (weights == "float32" and not self._bfloat16):
            return self
        if weights == "float32":
            return Cell(self.spec, *self.arrays.values())
        self._check_narrow(weights)
        arrays = self.arrays.items()
        return Cell(
            self.spec, *(BFloat16Array(rounded(array)) if name in MATRICES else array for name, array in arrays)
        )

    @cached_property
    def packed(self) -> Any:
        """The weights in the kernel's layout and in their own number format, packed at the first use."""
        return native.weights(self.spec, self.arrays, self.weights)

    @cached_property
    def _packed(self) -> dict[str, Any]:
        return {}

    def packed_in(self, weights: str | None) -> Any:
        """Return the weights in the kernel's layout, packed at the first use and shared by runs and streams.

        Args:
            weights: as for `pack`; None: their own number format.
        """
        if weights is None or weights == self.weights or (weights == "float32" and self.dtype == np.float64):
            return self.packed
        if weights not in self._packed:
            self._packed[weights] = self.pack(weights)
        return self._packed[weights]

    def pack(self, weights: str) -> Any:
        """Pack the weights with their matrices in one of `WEIGHTS`.

        Args:
            weights: `"float32"`: unchanged; `"bfloat16"`: rounded; `"int8"`: quantised to integers from -127 to 127,
                with one scale per column. Biases, gains and peepholes don't change.

        Returns:
            The kernel's weights object, with copies of the arrays.

        Raises:
            TypeError: bfloat16 or int8 for a float64 cell.
            ValueError: int8 with so many features or units that integer sums could overflow.
        """
        self._check_narrow(weights)
        depth = max(self.spec.input_size, self.spec.units)
        if weights == "int8" and depth > MOST_DEPTH:
            raise ValueError(f"Cell: expected at most {MOST_DEPTH} features and units for weights='int8', got {depth}")
        return native.weights(self.spec, self.arrays, None if weights == "float32" else weights)

    def _check_narrow(self, weights: str) -> None:
        if weights != "float32" and self.dtype != np.float32:
            raise TypeError(f"Cell: expected float32 arrays for weights={weights!r}, got {self.dtype}")

    @property
    def multiplications(self) -> int:
        """The number of multiplications by parameters per step."""
        added = ("bias", "cell_bias", "initial_h", "initial_c")
        return sum(math.prod(shape) for name, shape in self.spec.shapes.items() if name not in added)

    @property
    def numbers_read(self) -> int:
        """The number of parameters read per step."""
        return sum(math.prod(shape) for name, shape in self.spec.shapes.items() if not name.startswith("initial"))

    @property
    def bytes_spared(self) -> int:
        """How many bytes bfloat16 matrices save compared with float32."""
        return sum(array.nbytes for array in self._bfloat16.values())

    @classmethod
    def restored(cls, entry: Entry) -> Cell:
        """Return the cell of an entry of a file, `CellSpec.settings` and its arrays; see `Node.restored`."""
        settings = entry.take(CELL_WIDTHS, CELL_FLAGS)
        for gate, name in settings.get("gate_activations", {}).items():
            if type(name) is not str:
                raise entry.refuse(f"expected the activation of {gate!r:.80} to be str, found {name!r:.80}")
        spec = CellSpec(**settings)
        return cls(spec, **{name: entry.array(name, shape, name in MATRICES) for name, shape in spec.shapes.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies contain only the arrays, which are checked, made read-only and packed again."""
        return Cell, (self.spec, *self.held.values())

    def __repr__(self) -> str:
        return f"Cell of {self.dtype}: {self.summary}"


def _flags(cell: Cell) -> str:
    """Return the settings that differ from the defaults of this kind, in a few words."""
    words, spec = [], cell.spec
    for name, value in spec.settings.items():
        text = name.removeprefix("use_").replace("_", " ")
        if name == "gate_activations":
            words += [f"{gate} {activation}" for gate, activation in value.items()]
        elif name == "proj_size":
            words.append(f"projected from {spec.units}")
        elif name not in ("kind", "input_size", "units"):
            words.append(text if value is True else f"no {text}" if value is False else f"{text} {value}")
    if cell.weights == "bfloat16":
        words.append("matrices in bfloat16")
    return ", ".join(words)


def _summary(cells: tuple[Cell, ...]) -> str:
    """Return the kinds, widths and flags of a stack; consecutive cells that differ only in width are joined."""
    parts = []
    for (kind, flags), alike in groupby(cells, lambda cell: (cell.spec.kind, _flags(cell))):
        widths = "".join(f" -> {cell.spec.output_size}" for cell in alike)
        start = "" if parts else f" {cells[0].spec.input_size}"
        parts.append(f"{KIND_NAMES[kind]}{start}{widths}{f' ({flags})' if flags else ''}")
    return ", ".join(parts)


class Record(NamedTuple):
    """The input, gates and states of a cell at every step of a call, in the order of time for either direction."""

    gates: Array
    """`[B, T, planes, H]`, after their activations, in the order of `spec.GATES`: see `CellSpec.planes`."""
    c: Array | None
    """`[B, T, H]`; None for a kind without c."""
    h: Array
    """`[B, T, P]`, before a residual is added and before masked steps are set to zero."""
    x: Array
    """`[B, T, I]`."""
    before: CellState | None
    """The state before the first processed step; None: the cell's initial state."""
    mask: NDArray[np.bool_] | None
    """`[B, T]`, or None."""
    reset: NDArray[np.bool_] | None
    """`[B, T]`: True where the state was set to the initial state before this step was processed; or None."""
    reverse: bool
    """Whether it ran from the last step to the first."""
    patches: CellPatches | None = None
    """The patches that were applied to the cell."""


class Recording(list[Record | None]):
    """A recording of a run: the `Record` of each cell, in the order of `Network.cells`.

    Args:
        cells: the indices of the cells to record; the entries of the others are None. None: all cells.
        empty: the function that allocates an array, given a shape and a dtype.

    Attributes:
        flows: the values between the nodes, by the names of the inputs and nodes.
    """

    def __init__(
        self,
        cells: Collection[int] | None = None,
        empty: Callable[[tuple[int, ...], np.dtype[Any]], Array] = np.empty,
    ) -> None:
        super().__init__()
        self._cells, self._empty = cells, empty
        self.flows: dict[str, Flow] = {}

    def arrays(self, number: int, spec: CellSpec, batch: int, steps: int, dtype: np.dtype[Any]) -> dict[str, Any]:
        """Allocate the arrays for a cell's results at every step, by their names in `native.Layer`.

        Args:
            number: the index of the cell, counted from the first one without an entry here.
            spec, batch, steps, dtype: the cell, and the sizes of the call.
        """
        place, cells = len(self) + number, self._cells
        kept = ("gates", "states", "y")
        if cells is not None and place not in cells:
            if place + 1 not in cells:
                return {}
            kept = ("y",)
        return native.results(spec, batch, steps, lambda shape: self._empty(shape, dtype), kept)


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
    def summary(self) -> str:
        ways = (", residual" if self.residual else "") + (", backwards" if self.go_backwards else "")
        return _summary(self.cells) + ways

    def check(self, owner: str, *shapes: Shape) -> Shape:
        steps, _ = super().check(owner, shapes[0])
        _check_starts(owner, self, shapes[1:])
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
            weights: the number format of the cells' matrices, one of `WEIGHTS`; None: their own.

        Returns:
            `(y, states)`, where `y` is `[B, T, W]` in the order of `x` in either direction, or `[B, W]`.
        """
        steps, at_end = flow.x.shape[1], 0 if self.go_backwards else -1
        reset = _from_the_end(flow.reset) if self.go_backwards else flow.reset
        y, mask, after = flow.x, flow.mask, []
        for cells, added in self.parts:
            done = len(after) + len(cells)
            wanted = self.return_sequences or added or done < len(self.cells)
            x, place = y, slice(len(after), done)
            changes = patches[place]
            made, ends = self._call(cells, x, mask, reset, states[place], wanted, threads, record, changes, weights)
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
        threads: int,
        record: Recording | None,
        patches: Sequence[CellPatches | None],
        weights: str | None,
    ) -> tuple[Array | None, list[CellState]]:
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
                own = kept["gates"], next(iter(kept["states"]), None), kept["y"]
                made.append(Record(*own, below, before, mask, reset, self.go_backwards, changes))
            else:
                made.append(None)
            if wanted and number == len(cells) - 1 and "y" not in kept:
                kept["y"] = np.empty((batch, steps, spec.output_size), x.dtype)
            below = kept.get("y")
            if changes is not None:
                kept |= changes.of_run(batch, steps, mask, self.go_backwards, x.dtype)
            layers.append(native.Layer(cell.packed_in(weights), before, after[-1], **kept))
        native.forward(native.sequences(x, mask, reset, self.go_backwards), layers, threads)
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
            states = _started(self, flows[1:])
        y, ends = self.forward(flow, states, threads, record, patches, weights)
        after = tuple(ends)
        if not self.return_sequences:
            return Flow(y, None, None, after)
        if not self.go_backwards:
            return flow._replace(x=y, states=after)
        reset = _from_the_end(flow.reset)
        return Flow(y[:, ::-1], self.mask_of(flows), None if reset is None else reset[:, ::-1], after)

    def mask_after(self, masks: Sequence[Mask | None], axes: int, on: Masks[Mask]) -> Mask | None:
        mask = masks[0]
        if mask is None or not self.return_sequences:
            return None
        return on.cut(mask, slice(None, None, -1)) if self.go_backwards else mask

    def frames(self, *shapes: Shape) -> FrameRule:
        return FrameRule(BACKWARDS if self.go_backwards else None)

    def with_weights(self, weights: str) -> Recurrent:
        return replace(self, cells=tuple(cell.with_weights(weights) for cell in self.cells))

    def stored(self) -> tuple[dict[str, Any], Mapping[str, Array | BFloat16Array]]:
        flags = {name: getattr(self, name) for name in self.settings if name != "cells"}
        arrays = {
            f"{number}/{name}": array for number, cell in enumerate(self.cells) for name, array in cell.held.items()
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


def _check_starts(owner: str, node: Node, shapes: Sequence[Shape]) -> None:
    """Raise `ShapeError` unless there is no initial state, or one vector per row for each state of the node."""
    sizes = node.state_sizes
    if shapes and len(shapes) != len(sizes):
        raise ShapeError(f"{owner}: expected {len(sizes)} initial states, {', '.join(sizes)}, got {len(shapes)}")
    for (part, size), shape in zip(sizes.items(), shapes, strict=False):
        if len(shape) != 1 or shape[0] not in (None, size):
            raise ShapeError(f"{owner}: expected the initial state {part} [B, {size}], got {shown(shape)}")


def _started(node: Node, starts: Sequence[Flow]) -> tuple[CellState, ...]:
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
        _check_starts(owner, self, shapes[1:])
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
            states = _started(self, flows[1:])
        half = len(self.forward.cells)
        ahead, after = self.forward.forward(flow, states[:half], threads, record, patches[:half], weights)
        back, after_back = self.backward.forward(flow, states[half:], threads, record, patches[half:], weights)
        if self.merge_mode == "concat":
            y = np.concatenate([ahead, back], axis=-1)
        elif self.merge_mode == "mul":
            y = ahead * back
        else:
            y = ahead + back if self.merge_mode == "sum" else (ahead + back) * ahead.dtype.type(0.5)
        states = (*after, *after_back)
        return flow._replace(x=y, states=states) if self.forward.return_sequences else Flow(y, None, None, states)

    def mask_after(self, masks: Sequence[Mask | None], axes: int, on: Masks[Mask]) -> Mask | None:
        return masks[0] if self.forward.return_sequences else None

    def frames(self, *shapes: Shape) -> FrameRule:
        return FrameRule(BACKWARDS)

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
