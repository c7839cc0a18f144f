"""A Network: nodes in a row, run in NumPy over the kernel. It is data, and everything else is a view of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellstack import _kernel
from cellstack.nodes import Array, CellState, Flow, Node
from cellstack.recurrent import Bidirectional, Cell, Recurrent
from cellstack.spec import STATES, HiddenState, Plan, ShapeError, State, check_mask, check_sequence, check_state

if TYPE_CHECKING:
    from cellstack.stream import Stream


MOST = 2**31 - 1  # of what is counted, such as threads: no machine holds more, and the kernel's sums stay exact


def as_floats(owner: str, name: str, value: Any, dtype: np.dtype[Any]) -> Array:
    """Return `value` as an array of `dtype`: bools, integers and floats of any width are cast, all else is refused.

    Args:
        owner: whose argument it is, for the message.
        name: what it is called, for the message.
        value: array-like.
        dtype: float32 or float64.

    Returns:
        `value` itself where it is such an array already.

    Raises:
        TypeError: complex numbers, objects, text, or masked arrays (a mask is an argument of its own).
        ShapeError: rows of unequal length.
    """
    if type(value) is np.ndarray and value.dtype == dtype and value.dtype.isnative:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{owner}: expected {name} without a mask of its own, got a NumPy masked array: give mask=")
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ShapeError(f"{owner}: expected {name} to be a full array, got rows of unequal length") from error
    except (RuntimeError, TypeError) as error:
        raise TypeError(f"{owner}: expected {name} array-like, got {type(value).__name__}: {error}") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{owner}: expected {name} to hold real numbers, got {array.dtype}")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, as it would be anywhere
        return array.astype(dtype, copy=False)


def as_mask(owner: str, mask: Any, lengths: Any, batch: int, steps: int) -> NDArray[np.bool_] | None:
    """Return the mask `[B, T]` that `mask` or `lengths` stands for; None where both are None."""
    if lengths is not None:
        if mask is not None:
            raise TypeError(f"{owner}: expected mask or lengths, got both")
        array = np.asarray(lengths)
        if array.shape != (batch,):
            raise ShapeError(f"{owner}: expected lengths [B={batch}], got {array.shape}")
        if array.size and array.dtype.kind not in "iu":
            raise TypeError(f"{owner}: expected lengths to be integers, got {array.dtype}")
        if ((array < 0) | (array > steps)).any():
            raise ShapeError(f"{owner}: expected lengths from 0 to T={steps}, got {array.min()} to {array.max()}")
        return np.arange(steps) < array[:, None]
    return as_flags(owner, "mask", mask, batch, steps, "use the step")


def as_flags(owner: str, name: str, flags: Any, batch: int, steps: int, true: str) -> NDArray[np.bool_] | None:
    """Return flags of steps as an array `[B, T]`; None where they are None. `true` says what True stands for."""
    if flags is None:
        return None
    try:
        array = np.asarray(flags)
    except ValueError as error:
        raise ShapeError(f"{owner}: expected {name} [B={batch}, T={steps}], got rows of unequal length") from error
    check_mask(owner, array.shape, batch, steps, name)
    if array.size and array.dtype != bool:
        raise TypeError(f"{owner}: expected {name} of bool, True = {true}, got {array.dtype}: give {name} != 0")
    return array.astype(bool)


def as_states(owner: str, state: Any, cells: Sequence[Cell], batch: int) -> tuple[CellState | None, ...]:
    """Return one state a cell, contiguous and of the cell's dtype, or one None a cell where `state` is None.

    What a cell without c starts from may be given as `HiddenState(h)`, as a sequence of h alone, or as h itself; and
    what a network of one cell starts from may be given alone.
    """
    if state is None:
        return (None,) * len(cells)
    given = (state,) if len(cells) == 1 and (isinstance(state, (State, HiddenState)) or _is_array(state)) else state
    if not isinstance(given, Sequence) or len(given) != len(cells):
        got = f"{len(given)}" if isinstance(given, Sequence) else type(given).__name__
        raise ShapeError(f"{owner}: expected state to be a tuple of {len(cells)} states, one a cell, got {got}")
    states = []
    for layer, (cell, parts) in enumerate(zip(cells, given, strict=True)):
        sizes, where = cell.spec.state_sizes, f"state of layer {layer}"
        if not isinstance(parts, Sequence) and not _is_array(parts):
            raise ShapeError(f"{owner}: expected {where} to be arrays {', '.join(sizes)}, got {type(parts).__name__}")
        parts = (parts,) if _is_array(parts) else parts
        arrays = [as_floats(owner, where, array, cell.dtype) for array in parts]
        check_state(owner, [array.shape for array in arrays], batch, sizes, layer)
        states.append(STATES[cell.spec.kind](*(np.ascontiguousarray(array) for array in arrays)))
    return tuple(states)


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__")


def processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Network:
    """A network as data: nodes that run one after the other, their names, and whatever else should travel with them.

    A Network is never written to while it runs: threads may share one.

    Args:
        nodes: `Standardise`, `Recurrent`, `Bidirectional`, `Dense`, `Activation` and `Pool`, first to last.
        names: one a node, all different, without `/`; None gives layer_0, layer_1 and so on.
        metadata: anything that JSON can hold: class labels, where the data came from, what a training measured.

    Raises:
        ShapeError: no node, or nodes that don't meet in width or rank.
        TypeError: not a node, dtypes that differ, metadata that JSON can't hold.
        ValueError: names that don't fit.

    >>> from cellstack import CellSpec, Dense
    >>> rng = np.random.default_rng(0)
    >>> cell = Cell(CellSpec(3, 4), *(rng.normal(size=shape) for shape in CellSpec(3, 4).shapes.values()))
    >>> net = Network([Recurrent((cell,), return_sequences=False), Dense(rng.normal(size=(4, 2)))])
    >>> net(np.zeros((5, 7, 3))).shape
    (5, 2)
    >>> net
    Network of float64: [B, T, 3] -> [B, 2], 136 numbers
      layer_0  Recurrent  LSTM 3 -> 4  [B, 4]  128
      layer_1  Dense      linear       [B, 2]    8
    """

    nodes: tuple[Node, ...]
    names: tuple[str, ...]
    metadata: dict[str, Any]
    input_size: int | None
    dtype: np.dtype[Any]
    _shapes: tuple[str, ...]

    def __init__(
        self,
        nodes: Sequence[Node],
        names: Sequence[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        nodes = tuple(nodes)
        names = _checked_names(nodes, names)
        dtypes = {name: node.dtype for name, node in zip(names, nodes, strict=True) if node.dtype is not None}
        dtype = next(iter(dtypes.values()), np.dtype(np.float32))
        for name, found in dtypes.items():
            if found != dtype:
                raise TypeError(f"Network: expected {name} in {dtype}, as the node before it, got {found}")
        width, sequence, shapes = None, True, []
        for name, node in zip(names, nodes, strict=True):
            width, sequence = node.check(name, width, sequence)
            shapes.append(f"[B, {'T, ' if sequence else ''}{'W' if width is None else width}]")
        sizes = (node.input_size for node in nodes if node.input_size is not None)
        values = {
            "nodes": nodes,
            "names": names,
            "metadata": _checked_metadata(metadata),
            "input_size": next(sizes, None),  # nodes that take any width before the first that doesn't keep the width
            "dtype": dtype,
            "_shapes": tuple(shapes),
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell, in the order of the state: node by node, bottom first, forward before backward."""
        return tuple(cell for node in self.nodes for cell in node.cells)

    def __call__(self, x: Any, mask: Any = None) -> Array:
        """Return what the network makes of `x`: `run` from the cells' own initial state, without the state after.

        Args:
            x: `[B, T, I]`, as for `run`.
            mask: `[B, T]`, as for `run`.

        Returns:
            `[B, T, W]`, or `[B, W]` where a node drops time.
        """
        return self.run(x, mask=mask)[0]

    def run(
        self,
        x: Any,
        state: Any = None,
        mask: Any = None,
        lengths: Any = None,
        reset: Any = None,
        threads: int | None = None,
    ) -> tuple[Array, tuple[CellState, ...]]:
        """Run the network over a batch of sequences.

        Args:
            x: `[B, T, I]`, array-like of real numbers; anything but the network's own dtype is cast to it, float64 to
                a float32 network included. Any strides; B and T may be 0.
            state: one state a cell in the order of `cells`, `State(h, c)` for an LSTM and `HiddenState(h)` for the
                others, each array `[B, H]`; alone where there is one cell; None = the cells' own initial state, which
                is zeros where it isn't learned.
            mask: `[B, T]` of bool, True = use the step; None = all of them.
            lengths: `[B]` integers from 0 to T, instead of `mask`: the first steps of each row are used.
            reset: `[B, T]` of bool, True = a new piece begins with this step: before it, every state becomes the
                cells' own initial state, even where `state` is given. Where a node goes backwards, each piece is run
                from its own end, and the last one from `state`. None = one piece.
            threads: how many the kernel may use; None = as many as this process has processors and work for.

        Returns:
            `(y, state)`: `y` is `[B, T, W]`, or `[B, W]` where a node drops time; `state` is one state a cell,
            after the last step (with T = 0, that at the start). Both belong to the caller.

        Raises:
            ShapeError: a wrong rank, width, batch or number of states.
            TypeError: values that aren't real numbers; mask and lengths at once.
            ValueError: fewer than one thread, or more than 2^31 - 1.
        """
        given = as_floats("Network", "x", x, self.dtype)
        check_sequence("Network", given.shape, self.input_size)
        batch, steps, _ = given.shape
        cells = self.cells
        states = as_states("Network", state, cells, batch)
        used = as_mask("Network", mask, lengths, batch, steps)
        flow = Flow(given, used, as_flags("Network", "reset", reset, batch, steps, "a piece begins"), ())
        if threads is None:
            threads = max(1, min(processors(), max(batch, len(cells))))
        elif not isinstance(threads, (int, np.integer)) or not 1 <= threads <= MOST:
            raise ValueError(f"Network: expected threads to be an integer from 1 to {MOST}, got {threads!r}")
        with np.errstate(all="ignore"):  # NaN and inf pass through, as they do in the kernel
            for node in self.nodes:
                done = len(flow.states)
                flow = node.run(flow, states[done : done + len(node.cells)], threads)
        y = np.ascontiguousarray(flow.x)
        return (y.copy() if np.may_share_memory(y, given) else y), flow.states

    def stream(self, batch: int = 1) -> Stream:
        """Return a `Stream` that runs this network frame by frame.

        Args:
            batch: how many sequences are stepped side by side.

        Returns:
            A stream of its own state, the cells' own initial state at first; any number of them share the network.

        Raises:
            ValueError: a node needs the whole sequence, which the message names.

        >>> from cellstack import CellSpec
        >>> cell = Cell(CellSpec(3, 4, use_bias=False), np.ones((3, 16)), np.ones((4, 16)))
        >>> Network([Recurrent((cell,))]).stream().step([[1, 2, 3]]).shape
        (1, 4)
        """
        from cellstack.stream import Stream  # a stream is built on the network, not under it

        return Stream(self, batch)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the network to a file, whole or not at all; the suffix picks the format.

        Args:
            path: where to; `.safetensors` is the native format. A file that is there is replaced in one step.

        Raises:
            ValueError: no format has this suffix.
            OSError: the file can't be written.
        """
        from cellstack import formats  # formats are built on the network, not under it

        formats.save(self, path)

    def plan(self) -> Plan:
        """Return what runs each node, and why, one line a node."""
        rows = []
        for name, node in zip(self.names, self.nodes, strict=True):
            if isinstance(node, Bidirectional):
                calls = f"{_calls(node.forward)}, {_calls(node.backward)} back, merged in NumPy"
                why = f"fused kernel ({_kernel.isa()}, {node.dtype}): {calls}"
            elif isinstance(node, Recurrent):
                why = f"fused kernel ({_kernel.isa()}, {node.dtype}): {_calls(node)}"
            else:
                why = f"NumPy ({self.dtype}): not recurrent"
            rows.append((name, node.summary, why))
        return Plan(_table(rows))

    def __repr__(self) -> str:
        numbers = [f"{node.parameters:,}" for node in self.nodes]
        rows = [
            (name, type(node).__name__, node.summary, shape, number.rjust(max(map(len, numbers))))
            for name, node, shape, number in zip(self.names, self.nodes, self._shapes, numbers, strict=True)
        ]
        total = sum(node.parameters for node in self.nodes)
        width = "W" if self.input_size is None else self.input_size
        head = f"Network of {self.dtype}: [B, T, {width}] -> {self._shapes[-1]}, {total:,} numbers"
        return "\n".join([head, *("  " + line for line in _table(rows))])


def _calls(stack: Recurrent) -> str:
    """Return how often a pass over the stack calls the kernel."""
    calls, cells = len(stack.parts), len(stack.cells)
    count = "one call" if calls == 1 else f"{calls} calls, NumPy's sums between them,"
    return count if cells == 1 else f"{count} for the stack of {cells} cells"


def _checked_names(nodes: tuple[Node, ...], names: Sequence[str] | None) -> tuple[str, ...]:
    if not nodes:
        raise ShapeError("Network: expected at least one node, got none")
    for number, node in enumerate(nodes):
        if not isinstance(node, Node):
            raise TypeError(f"Network: expected node {number} to be a node, got {type(node).__name__}")
    if names is None:
        return tuple(f"layer_{number}" for number in range(len(nodes)))
    names = tuple(names)
    if len(names) != len(nodes) or len(set(names)) != len(names):
        raise ValueError(f"Network: expected {len(nodes)} different names, one a node, got {list(names)}")
    for name in names:
        if not isinstance(name, str) or not name or "/" in name or not name.isprintable():
            raise ValueError(f"Network: expected every name to be printable text without '/', got {name!r}")
    return names


def _checked_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a private copy of `metadata`, in the form in which a file would give it back."""
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping) or not all(isinstance(key, str) for key in metadata):
        raise TypeError("Network: expected metadata to be a dict with text as keys")
    try:
        return json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"Network: expected metadata that JSON can hold, without NaN: {error}") from error


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
