"""`Cell`: the description and the arrays of one cell, and their number formats."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstack import native
from cellstack.cells import KINDS
from cellstack.cells.bfloat16 import BFloat16Array, rounded
from cellstack.cells.errors import ShapeError
from cellstack.cells.layout import block_diagonal
from cellstack.cells.spec import ARRAYS, MATRICES, CellSpec
from cellstack.nodes.checks import check_choice, frozen_bfloat16, frozen_copy, one_dtype
from cellstack.nodes.values import Array, Celled, Types

if TYPE_CHECKING:
    from cellstack.nodes.stored import Entry

WEIGHTS = ("float32", "bfloat16", "int8")
"""Number formats of matrices, of cells and dense layers, in a run or a stream; float64 ones keep float64."""

STORED_WEIGHTS = ("float32", "bfloat16")
"""Number formats in which a float32 cell or dense layer can store its matrices."""

MOST_DEPTH = (2**31 - 1) // 127**2
"""The largest number of products of 8-bit integers whose sum always fits into 32 bits."""

TYPES: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "str": str,
    "bool": bool,
    "bool | str": (bool, str),
    "float": float,
    "float | None": float,
    "Any": dict,
}
CELL_WIDTHS: Types = {"input_size": int, "units": int}
# Optional in a file: the default applies.
CELL_FLAGS: Types = {flag.name: TYPES[str(flag.type)] for flag in fields(CellSpec) if flag.name not in CELL_WIDTHS}


def check_narrow(owner: str, weights: str, dtype: np.dtype[Any], depth: int = 1) -> None:
    """Raise an error unless matrices of this dtype can have this number format.

    Args:
        owner: the class, for error messages.
        weights: one of `WEIGHTS`.
        dtype: float32 or float64.
        depth: the largest number of products in a sum.

    Raises:
        TypeError: bfloat16 or int8 for float64.
        ValueError: int8 with so large a depth that integer sums could overflow.
    """
    if weights in ("bfloat16", "int8") and dtype != np.float32:
        raise TypeError(f"{owner}: expected float32 arrays for weights={weights!r}, got {dtype}")
    if weights == "int8" and depth > MOST_DEPTH:
        raise ValueError(f"{owner}: expected at most {MOST_DEPTH} features and units for weights='int8', got {depth}")


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Cell(Celled):
    """One cell: its description and its arrays. Arrays that the cell doesn't have are None.

    Args:
        spec: the kind of cell, its widths and its flags.
        arrays: the arrays of `spec.shapes` in order, float32 or float64. The matrices of a float32 cell (`kernel`,
            `recurrent_kernel`, `gate_kernel`, `backbone_kernel`, `projection`) may all be `BFloat16Array`; they
            are stored so, and the attributes return them as float32. See `with_weights`.
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
                bfloat16[name] = frozen_bfloat16("Cell", name, value, shapes[name])
            else:
                object.__setattr__(
                    self, name, None if value is None else frozen_copy("Cell", name, value, shapes[name])
                )
        object.__setattr__(self, "_bfloat16", bfloat16)
        matrices = [name for name in MATRICES if name in shapes]
        if bfloat16 and list(bfloat16) != matrices:
            expected, got = ", ".join(matrices), ", ".join(bfloat16)
            raise TypeError(f"Cell: expected all of {expected} in bfloat16 or none, got {got}")
        whole: dict[str, Array | None] = {}
        if bfloat16:
            whole["matrices"] = np.empty(0, np.float32)
        whole |= {name: array for name, array in self.stored_arrays.items() if not isinstance(array, BFloat16Array)}
        one_dtype("Cell", whole)

    def __getattr__(self, name: str) -> Array:
        """Return one of its arrays: here, a matrix that is stored as bfloat16, converted to float32."""
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
    def stored_arrays(self) -> dict[str, Array | BFloat16Array]:
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
        learned = {name: getattr(self, f"initial_{name}", None) for name in self.spec.state_sizes}
        sizes = self.spec.state_sizes
        return {name: np.zeros(sizes[name], self.dtype) if of is None else of for name, of in learned.items()}

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype in which the cell computes: that of its arrays, or float32 if its matrices are bfloat16."""
        return np.dtype(np.float32) if self._bfloat16 else next(iter(self.arrays.values())).dtype

    @property
    def summary(self) -> str:
        """The kind, widths and flags of the cell, in a few words."""
        return summary_of((self,))

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
        check_choice("Cell", "weights", weights, STORED_WEIGHTS)
        if weights == self.weights or (weights == "float32" and not self._bfloat16):
            return self
        if weights == "float32":
            return Cell(self.spec, *self.arrays.values())
        check_narrow("Cell", weights, self.dtype)
        arrays = self.arrays.items()
        return Cell(
            self.spec, *(BFloat16Array(rounded(array)) if name in MATRICES else array for name, array in arrays)
        )

    @property
    def one_head(self) -> Cell:
        """The same cell with one head, whose recurrent kernel is block-diagonal: for formats without heads."""
        if self.spec.heads == 1:
            return self
        whole = block_diagonal(self.recurrent_kernel, len(self.spec.gates))
        cell = Cell(replace(self.spec, heads=1), **{**self.arrays, "recurrent_kernel": whole})
        return cell.with_weights("bfloat16") if self._bfloat16 else cell

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
        check_narrow("Cell", weights, self.dtype, max(self.spec.input_size, self.spec.units, self.spec.backbone_units))
        return native.weights(self.spec, self.arrays, None if weights == "float32" else weights)

    @property
    def multiplications(self) -> int:
        """The number of multiplications by parameters per step."""
        shapes = self.spec.shapes.items()
        return sum(math.prod(shape) for name, shape in shapes if not name.startswith("initial") and name[-4:] != "bias")

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
        return Cell, (self.spec, *self.stored_arrays.values())

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


def summary_of(cells: tuple[Cell, ...]) -> str:
    """Return the kinds, widths and flags of a stack; consecutive cells that differ only in width are joined."""
    parts = []
    for (kind, flags), alike in groupby(cells, lambda cell: (cell.spec.kind, _flags(cell))):
        widths = "".join(f" -> {cell.spec.output_size}" for cell in alike)
        start = "" if parts else f" {cells[0].spec.input_size}"
        parts.append(f"{KINDS[kind].title}{start}{widths}{f' ({flags})' if flags else ''}")
    return ", ".join(parts)
