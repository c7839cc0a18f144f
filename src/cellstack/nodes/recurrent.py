"""The nodes that run over time: stacks of cells, one way or both, each run of cells one call of the kernel."""

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
from cellstack.bfloat16 import Halves, rounded
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
    hold_halves,
    one_dtype,
    shown,
)
from cellstack.spec import ARRAYS, MATRICES, STATES, CellSpec, ShapeError

if TYPE_CHECKING:
    from cellstack.nodes.masks import Mask, Masks
    from cellstack.nodes.patches import CellPatches
    from cellstack.nodes.stored import Entry

WEIGHTS = ("float32", "bfloat16", "int8")
"""What a run or a stream can hold the matrices of cells in; float64 cells keep theirs."""

HELD = ("float32", "bfloat16")
"""What the matrices of a cell's own can be held in, as data."""

MOST_DEPTH = (2**31 - 1) // 127**2
"""Products of two numbers of 8 bits that a sum of 32 can hold, whatever they are."""

MERGE_MODES = ("concat", "sum", "mul", "ave")
BACKWARDS = "it runs backwards from the end of the sequence, which a stream doesn't have"
TYPES = {"int": int, "str": str, "bool": bool, "float": float, "float | None": float, "Any": dict}
CELL_WIDTHS: Types = {"input_size": int, "units": int}
CELL_FLAGS: Types = {
    flag.name: TYPES[str(flag.type)] for flag in fields(CellSpec) if flag.name not in CELL_WIDTHS
}  # what a file may leave out where it is as usual
KIND_NAMES = {"lstm": "LSTM", "gru": "GRU", "rnn": "SimpleRNN"}


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Cell:
    """One cell: its description and its arrays. An array that such a cell doesn't need is None.

    Args:
        spec: the kind of cell, its widths and its flags.
        arrays: those of `spec.shapes`, in that order, float32 or float64. The matrices (`kernel`, `recurrent_kernel`,
            `projection`) may all be `Halves`, of bfloat16, beside float32: they are kept so, and an attribute gives
            them as float32. See `with_weights`.
        named: the others of them, by name; None stands for one that such a cell doesn't need.

    Raises:
        ShapeError: an array too few or too many, or one that isn't shaped as `spec` says.
        TypeError: a dtype other than float32 and float64, or not one for all; an array given twice; some matrices of
            bfloat16, and others not.

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
    _halves: dict[str, Halves] = field(init=False, repr=False, compare=False)

    def __init__(self, spec: CellSpec, *arrays: Any, **named: Any) -> None:
        if not isinstance(spec, CellSpec):
            raise TypeError(f"Cell: expected spec to be a CellSpec, got {type(spec).__name__}")
        shapes = spec.shapes
        if len(arrays) > len(shapes):
            raise ShapeError(f"Cell: expected {len(shapes)} arrays, {', '.join(shapes)}, got {len(arrays)}")
        given = dict(zip(shapes, arrays, strict=False))
        for name in named:
            if name not in ARRAYS or name in given:
                raise TypeError(f"Cell: expected each of {', '.join(shapes)} once, got another {name}")
        given |= named
        object.__setattr__(self, "spec", spec)
        halves: dict[str, Halves] = {}
        for name in ARRAYS:
            value = given.get(name)
            if (value is None) == (name in shapes):
                expected, got = (list(shapes[name]), "none") if value is None else ("none", "one")
                raise ShapeError(f"Cell: expected {name} {expected} as the description says, got {got}")
            if isinstance(value, Halves):  # there is no attribute then: `__getattr__` makes one
                halves[name] = hold_halves("Cell", name, value, shapes[name])
            else:
                object.__setattr__(self, name, None if value is None else hold("Cell", name, value, shapes[name]))
        object.__setattr__(self, "_halves", halves)
        matrices = [name for name in MATRICES if name in shapes]
        if halves and list(halves) != matrices:
            raise TypeError(f"Cell: expected all of {', '.join(matrices)} in bfloat16 or none, got {', '.join(halves)}")
        whole: dict[str, Array | None] = {}
        if halves:
            whole["matrices"] = np.empty(0, np.float32)
        whole |= {name: array for name, array in self.held.items() if not isinstance(array, Halves)}
        one_dtype("Cell", whole)

    def __getattr__(self, name: str) -> Array:
        """Return a matrix that is held in bfloat16, as float32."""
        halves = self.__dict__.get("_halves", {})
        if name not in halves:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        array = np.asarray(halves[name])
        array.setflags(write=False)
        return array

    @property
    def arrays(self) -> dict[str, Array]:
        """The cell's arrays by name, in the order of `CellSpec.shapes`; those of bfloat16 as float32."""
        return {name: getattr(self, name) for name in self.spec.shapes}

    @property
    def held(self) -> dict[str, Array | Halves]:
        """The cell's arrays as it holds them."""
        return {name: self._halves[name] if name in self._halves else getattr(self, name) for name in self.spec.shapes}

    @property
    def weights(self) -> str:
        """What the matrices are held in: `"float32"`, `"float64"` or `"bfloat16"`."""
        return "bfloat16" if self._halves else self.dtype.name

    @property
    def initial(self) -> dict[str, Array]:
        """The state that it starts from, `h [P]` and `c [H]` by name: learned, or zeros."""
        learned = {name: getattr(self, f"initial_{name}") for name in self.spec.state_sizes}
        sizes = self.spec.state_sizes
        return {name: np.zeros(sizes[name], self.dtype) if of is None else of for name, of in learned.items()}

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of what the cell computes: that of its arrays, float32 beside matrices of bfloat16."""
        return np.dtype(np.float32) if self._halves else self.kernel.dtype

    @property
    def summary(self) -> str:
        """The kind, widths and flags of the cell, in a few words."""
        return _summary((self,))

    def with_weights(self, weights: str) -> Cell:
        """Return the cell with its matrices held in one of `HELD`; all else stays as it is.

        Args:
            weights: `"bfloat16"`: each number rounded to the nearest one of 8 bits of precision, two bytes each;
                `"float32"`: the same numbers in four.

        Raises:
            ValueError: another word.
            TypeError: fewer bits of a float64 cell.

        >>> cell = Cell(CellSpec(1, 2, use_bias=False), np.full((1, 8), 0.1, "f4"), np.ones((2, 8), "f4"))
        >>> small = cell.with_weights("bfloat16")
        >>> small
        Cell of float32: LSTM 1 -> 2 (no bias, matrices in bfloat16)
        >>> float(small.kernel[0, 0])
        0.10009765625
        """
        check_choice("Cell", "weights", weights, HELD)
        if weights == self.weights or (weights == "float32" and not self._halves):
            return self
        if weights == "float32":
            return Cell(self.spec, *self.arrays.values())
        self._check_narrow(weights)
        arrays = self.arrays.items()
        return Cell(self.spec, *(Halves(rounded(array)) if name in MATRICES else array for name, array in arrays))

    @cached_property
    def packed(self) -> Any:
        """The weights in the kernel's own layout, as they are, packed at the first use."""
        return native.weights(self.spec, self.arrays, self.weights)

    @cached_property
    def _packed(self) -> dict[str, Any]:
        return {}

    def packed_in(self, weights: str | None) -> Any:
        """Return the weights in the kernel's own layout, packed at the first use; runs and streams share them.

        Args:
            weights: as for `pack`; None: as they are.
        """
        if weights is None or weights == self.weights or (weights == "float32" and self.dtype == np.float64):
            return self.packed
        if weights not in self._packed:
            self._packed[weights] = self.pack(weights)
        return self._packed[weights]

    def pack(self, weights: str) -> Any:
        """Pack the weights with their matrices in one of `WEIGHTS`.

        Args:
            weights: `"float32"`, as they are; `"bfloat16"`, rounded; `"int8"`, in 127 steps to either side, a scale a
                column. Biases, gains and peepholes stay as they are.

        Returns:
            What the kernel's calls take; it holds a copy of the arrays.

        Raises:
            TypeError: fewer bits of a float64 cell.
            ValueError: more features or units than sums of whole numbers can hold.
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
        """How often a step multiplies by one of the cell's own numbers."""
        added = ("bias", "cell_bias", "initial_h", "initial_c")
        return sum(math.prod(shape) for name, shape in self.spec.shapes.items() if name not in added)

    @property
    def numbers_read(self) -> int:
        """How many of the cell's own numbers a step reads."""
        return sum(math.prod(shape) for name, shape in self.spec.shapes.items() if not name.startswith("initial"))

    @property
    def bytes_spared(self) -> int:
        """How many bytes less it takes than if all its numbers were of its dtype."""
        return sum(array.nbytes for array in self._halves.values())

    @classmethod
    def restored(cls, entry: Entry) -> Cell:
        """Return the cell that an entry of a file holds: `CellSpec.settings` and its arrays; see `Node.restored`."""
        settings = entry.take(CELL_WIDTHS, CELL_FLAGS)
        for gate, name in settings.get("gate_activations", {}).items():
            if type(name) is not str:
                raise entry.refuse(f"expected the activation of {gate!r:.80} to be str, found {name!r:.80}")
        spec = CellSpec(**settings)
        return cls(spec, **{name: entry.array(name, shape, name in MATRICES) for name, shape in spec.shapes.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles and copies hold the arrays alone: they are checked, frozen and packed again."""
        return Cell, (self.spec, *self.held.values())

    def __repr__(self) -> str:
        return f"Cell of {self.dtype}: {self.summary}"


def _flags(cell: Cell) -> str:
    """Return what tells the cell from a usual one of its kind and widths, in a few words."""
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
    """Return the kinds, widths and flags of a stack; cells alike in all but width share their words."""
    parts = []
    for (kind, flags), alike in groupby(cells, lambda cell: (cell.spec.kind, _flags(cell))):
        widths = "".join(f" -> {cell.spec.output_size}" for cell in alike)
        start = "" if parts else f" {cells[0].spec.input_size}"
        parts.append(f"{KIND_NAMES[kind]}{start}{widths}{f' ({flags})' if flags else ''}")
    return ", ".join(parts)


class Record(NamedTuple):
    """What a cell took and did at every step of a call, in the order of time whichever way it ran."""

    gates: Array
    """`[B, T, planes, H]`, after their activations, in the order of `spec.GATES`: see `CellSpec.planes`."""
    c: Array | None
    """`[B, T, H]`; None without a cell."""
    h: Array
    """`[B, T, P]`, before a residual sum, and before steps that the mask leaves out become zeros."""
    x: Array
    """`[B, T, I]`."""
    before: CellState | None
    """The state before the first step that was run; None = the cell's own initial state."""
    mask: NDArray[np.bool_] | None
    """`[B, T]`, or None."""
    reset: NDArray[np.bool_] | None
    """`[B, T]`: before which steps, in the order in which they were run, the state became the initial one; or None."""
    reverse: bool
    """Whether it ran from the last step to the first."""
    patches: CellPatches | None = None
    """What was changed in the cell as it ran."""


class Recording(list[Record | None]):
    """What a run keeps beside its answers: the `Record` of each cell, in the order of `Network.cells`.

    Args:
        cells: the numbers of the cells that are kept, the others are None here; None = all.
        empty: makes the arrays, of a shape and a dtype.

    Attributes:
        flows: what flowed between the nodes, by the names of the inputs and of the nodes.
    """

    def __init__(
        self,
        cells: Collection[int] | None = None,
        empty: Callable[[tuple[int, ...], np.dtype[Any]], Array] = np.empty,
    ) -> None:
        super().__init__()
        self._cells, self._empty = cells, empty
        self.flows: dict[str, Flow] = {}

    def arrays(self, number: int, spec: CellSpec, batch: int, steps: int, dtype: np.dtype[Any]) -> dict[str, Array]:
        """Return arrays for what a cell does at every step, by the names that `native.Layer` has for them.

        Args:
            number: how many cells after the last one recorded.
            spec, batch, steps, dtype: of the cell and of the call.
        """
        place, cells = len(self) + number, self._cells
        kept = ("gates", "cells", "y")
        if cells is not None and place not in cells:
            if place + 1 not in cells:
                return {}
            kept = ("y",)
        shapes = native.results(spec, batch, steps)
        return {name: self._empty(shapes[name], dtype) for name in kept if name in shapes}


@dataclass(frozen=True, eq=False)
class Recurrent(Node):
    """A stack of cells of any kinds over time, bottom cell first; the semantics are those of Keras's `RNN`.

    A step that the mask leaves out carries every state and repeats the output before it (the initial h at the start).
    A step at which a piece begins starts from the cells' initial state. Downstream, mask and resets go on with the
    sequence.

    Args:
        cells: bottom first; each cell's output is as wide as the next one's input.
        return_sequences: `[B, T, W]`, else the output after the last step, `[B, W]`.
        go_backwards: run from the last step to the first, each piece from its last step; with `return_sequences` the
            steps come in the order in which they were run, and so do the mask and the resets that go on.
        zero_output_for_mask: give zeros, not the output before, at steps that the mask leaves out.
        residual: the output of each cell but the first is h plus the cell's input, where they are of one width; its
            state stays h.

    Raises:
        ShapeError: no cell, or widths that don't meet.
        TypeError: a cell that isn't a `Cell`, dtypes that differ, a flag that isn't a bool.

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
        """Width of the output: that of the top cell's h."""
        return self.cells[-1].spec.output_size

    @cached_property
    def parts(self) -> tuple[tuple[tuple[Cell, ...], bool], ...]:
        """Runs of cells that the kernel takes at once, and whether a run's input is added to its output.

        It is where the run is one cell with a residual.
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
            flow: with it a mask and resets `[B, T]`, or None.
            states: one a cell, contiguous arrays of the cell's dtype; None = the cells' own initial state.
            threads: how many the kernel may use.
            record: what is kept of every step, if anything is.
            patches: what is changed in each cell as it runs; empty = in none.
            weights: what the cells' matrices are held in, one of `WEIGHTS`; None = as they are.

        Returns:
            `(y, states)`, where `y` is `[B, T, W]` in the order of `x` whatever `go_backwards` says, or `[B, W]`.
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
        if not self.return_sequences:  # without a step to answer after, h
            y = y[:, at_end].copy() if self.parts[-1][1] and steps else after[-1].h.copy()
            mask = mask[:, at_end] if mask is not None and steps else None
        if self.zero_output_for_mask and mask is not None:
            y = y if record is None or not self.return_sequences else y.copy()  # what is recorded stays
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
        """Run some of the cells in one call of the kernel; y, the top one's h, may be None unless `wanted`."""
        batch, steps, _ = x.shape
        after: list[CellState] = []
        layers, made, below = [], [], x
        for number, (cell, before) in enumerate(zip(cells, states, strict=True)):
            spec = cell.spec
            after.append(STATES[spec.kind](*(np.empty((batch, size), x.dtype) for size in spec.state_sizes.values())))
            changes = patches[number] if patches else None
            kept: dict[str, Any] = {} if record is None else record.arrays(number, spec, batch, steps, x.dtype)
            if "gates" in kept:
                assert below is not None, "what goes into a cell that is kept is kept"
                own = kept["gates"], kept.get("cells"), kept["y"]
                made.append(Record(*own, below, before, mask, reset, self.go_backwards, changes))
            else:
                made.append(None)
            if wanted and number == len(cells) - 1 and "y" not in kept:
                kept["y"] = np.empty((batch, steps, spec.output_size), x.dtype)
            below = kept.get("y")
            if changes is not None:
                kept |= changes.of_run(batch, steps, mask, self.go_backwards, x.dtype)
            layers.append(native.Layer(cell.packed_in(weights), *_pair(before), *_pair(after[-1]), **kept))
        native.forward(native.sequences(x, mask, reset, self.go_backwards), layers, threads)
        if record is not None:
            record.extend(made)
        return below, after

    def _add(
        self, h: Array, x: Array, mask: NDArray[np.bool_] | None, reset: NDArray[np.bool_] | None, own: bool
    ) -> Array:
        """Return h + x; where the mask leaves a step out, that of the last step used since the state was set, or h.

        `own`: h may be written to.
        """
        if mask is None:
            return np.add(h, x, out=h if own else None)
        order = slice(None, None, -1 if self.go_backwards else 1)
        last = self.last_used(mask, reset)[:, :, None]
        y = np.take_along_axis((h + x)[:, order], np.maximum(last, 0), axis=1)
        return np.where(last < 0, h[:, order], y)[:, order]

    def last_used(self, mask: NDArray[np.bool_], reset: NDArray[np.bool_] | None) -> NDArray[np.int64]:
        """Return the last step used up to each step since the state was set, `[B, T]`; -1 where there is none.

        Steps are counted, and stand, in the order in which they are run.

        Args:
            mask: `[B, T]`, which are used, in the order of time.
            reset: `[B, T]`, before which the state is set, or None.
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
        """See `Node.run`, and for `record`, `patches` and `weights` `forward`."""
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

    def stored(self) -> tuple[dict[str, Any], Mapping[str, Array | Halves]]:
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
        """How often a pass over the stack calls the kernel, in a few words."""
        calls, cells = len(self.parts), len(self.cells)
        count = "one call" if calls == 1 else f"{calls} calls, NumPy's sums between them,"
        return count if cells == 1 else f"{count} for the stack of {cells} cells"


def _narrow(node: Node) -> str:
    """Return which matrices of a node's cells are held in bfloat16, in a few words; nothing where none are."""
    few = sum(cell.weights == "bfloat16" for cell in node.cells)
    whose = "" if few == len(node.cells) else f" of {few} cell{'s' * (few > 1)}"
    return f", matrices{whose} in bfloat16" if few else ""


def _check_starts(owner: str, node: Node, shapes: Sequence[Shape]) -> None:
    """Raise `ShapeError` unless what a node's states start from is a vector a row for each of them, or nothing."""
    sizes = node.state_sizes
    if shapes and len(shapes) != len(sizes):
        raise ShapeError(f"{owner}: expected {len(sizes)} states to start from, {', '.join(sizes)}, got {len(shapes)}")
    for (part, size), shape in zip(sizes.items(), shapes, strict=False):
        if len(shape) != 1 or shape[0] not in (None, size):
            raise ShapeError(f"{owner}: expected {part} [B, {size}] to start from, got {shown(shape)} from before it")


def _started(node: Node, starts: Sequence[Flow]) -> tuple[CellState, ...]:
    """Return the states that flow into a node, one a cell."""
    arrays = iter([native.plain(start.x) for start in starts])
    specs = [cell.spec for cell in node.cells]
    return tuple(STATES[spec.kind](*(next(arrays) for _ in spec.state_sizes)) for spec in specs)


def _pair(state: CellState | None) -> tuple[Array | None, Array | None]:
    """Return h and c; None where there is none."""
    h, c, *_ = (*(state or ()), None, None)
    return h, c


def _from_the_end(reset: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    """Return the last step of each piece but the last one: what a pass from the end comes to first in it."""
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
        ShapeError: the two differ in input size, or in width where they aren't concatenated.
        TypeError: the two differ in dtype, or aren't `Recurrent`.
        ValueError: the directions or `return_sequences` don't fit, or another merge mode.
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
        halves = {"forward": forward, "backward": backward}
        numbers: dict[str, Array | None] = {name: np.empty(0, half.dtype) for name, half in halves.items()}
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
        """See `Recurrent.run`; the forward half is recorded first."""
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

    def stored(self) -> tuple[dict[str, Any], Mapping[str, Array | Halves]]:
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
