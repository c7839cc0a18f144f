"""Run a network and return its trace: what the run records, in the order of each node's steps."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstack.cells.errors import ShapeError
from cellstack.inspect.memories import MemoryTrace
from cellstack.inspect.trace import CellTrace, NetworkTrace, NodeTrace, TraceContents
from cellstack.inspect.values import Index, alone
from cellstack.network.arguments import OwnState, as_states
from cellstack.nodes.along import Select
from cellstack.nodes.base import Array, Flow
from cellstack.nodes.mlstm import MLSTM
from cellstack.nodes.recording import Record, Recording
from cellstack.nodes.recurrent import Recurrent

if TYPE_CHECKING:
    from cellstack.network import Network

PROBES = (97, 101)  # sequence lengths: a node that keeps both maps steps one to one


def trace(
    network: Network,
    x: Any,
    state: Any,
    run: Mapping[str, Any],
    nodes: str | Iterable[str] | None,
    units: Index,
    steps: Index,
    pre: bool,
    in_memory: int,
) -> NetworkTrace:
    """Run a network and return its trace: see `Network.trace`; `run`: the other arguments of the run."""
    names, cells = network.names, None
    if nodes is not None:
        try:
            names = (nodes,) if isinstance(nodes, str) else tuple(nodes)
        except TypeError:
            raise TypeError(f"Network: expected nodes as names, got {nodes!r:.80}") from None
        for name in names:
            if name not in network.names:
                raise ValueError(f"Network: expected nodes out of {', '.join(network.names)}, got {name!r:.80}")
        numbers = _numbers(network)
        cells = {number for name in names for number in numbers[name]}
    if not isinstance(in_memory, (int, float)) or not in_memory >= 0:
        raise ValueError(f"Network: expected in_memory as a number of bytes, 0 or more, got {in_memory!r:.80}")
    if state is not None:  # the caller may overwrite it later
        given = network.as_inputs("Network", x)
        states = as_states(
            "Network", state, network.stateful, len(next(iter(given.values()))), network.initial_state_sources
        )
        state = OwnState(None if one is None else type(one)(*map(np.array, one)) for one in states)  # checked above
    recording = Recording(cells, _Arrays(in_memory).empty)
    y, after = network.run(x, state, **run, record=recording)
    found = NetworkTrace(network, y, after, lambda: _parts(network, names, recording, pre))
    return found if units is None and steps is None else found.select(None, steps, units)._copied()


def _numbers(network: Network) -> dict[str, range]:
    """Return each node's cells, in the order of the state."""
    numbers, first = {}, 0
    for name, node in zip(network.names, network.nodes, strict=True):
        numbers[name] = range(first, first + len(node.cells))
        first += len(node.cells)
    return numbers


def _parts(network: Network, names: Sequence[str], recording: Recording, pre: bool) -> TraceContents:
    """Return the parts of a trace from a run's records."""
    numbers = _numbers(network)
    records, flows = _in_own_order(network, recording, numbers)
    traced: dict[str, NodeTrace] = {}
    for name, node, sources in zip(network.names, network.nodes, network.wires, strict=True):
        if name not in names:
            continue
        y, cells = flows[name].x, []
        for number, cell in zip(numbers[name], node.cells, strict=True):
            record = records[number]
            assert record is not None, "cells of the requested nodes are kept"
            kind = cell.spec.of_kind
            planes = [record.gates[:, :, plane] for plane in range(len(kind.gates))]
            states = record.states._asdict()
            fields = kind.trace(**dict(zip(kind.gates, planes, strict=True)), **states)
            cells.append(CellTrace(cell, fields, np.arange(cell.spec.units), record.mask, None, record))
        if isinstance(node, MLSTM):
            cells.append(MemoryTrace.of(node.memory_in(network.dtype), recording.memories[name], y))
        _ = [cell.pre for cell in cells if pre]  # a selection keeps only those that were computed
        values = tuple(flows[source].x for source in sources)
        traced[name] = NodeTrace(node, alone(values), y, tuple(cells))
    lengths = {name: flows[name].x.shape[1] for name in network.inputs if network.graph.timed(name)}
    masks = {name: flow.mask for name, flow in flows.items() if flow.mask is not None}
    return TraceContents(np.arange(next(iter(lengths.values()), 1)), _aligned(network, lengths), traced, masks)


def _aligned(network: Network, lengths: dict[str, int]) -> frozenset[str]:
    """Return the values whose steps match those of the first input with time, in the same order."""
    graph, first = network.graph, next(iter(lengths.values()), None)
    aligned = {name for name, steps in lengths.items() if steps == first}
    for name, node, sources in zip(network.names, network.nodes, network.wires, strict=True):
        turned = (isinstance(node, Recurrent) and node.go_backwards) or (isinstance(node, Select) and node.step < 0)
        comes, starts = node.apart(sources)
        if turned or not aligned.issuperset(comes) or not graph.timed(name):
            continue
        begins = [graph.shapes[start] for start in starts]
        try:
            after = [
                node.check(name, *((steps, *graph.shapes[one][1:]) for one in comes), *begins)[0] for steps in PROBES
            ]
        except ShapeError:  # a node that requires a fixed number of steps
            continue
        if after == list(PROBES):
            aligned.add(name)
    return frozenset(aligned)


_BLOCK, _PAGE = 8 << 20, 2 << 20  # bytes; NumPy asks for large pages from 4 MB on
_PARTS = range(128 << 10, 4 << 20)  # bytes of arrays that are parts of a block


class _Arrays:
    """Allocates arrays in memory, and beyond a limit in memory-mapped anonymous files.

    Arrays of some hundred kilobytes are parts of larger blocks: on pages of 4 KB of their own, filling them would take
    several times as long as the kernel takes to compute them.
    """

    def __init__(self, in_memory: float) -> None:
        self.left = in_memory
        self.block = np.empty(0, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        size = math.prod(shape) * dtype.itemsize
        self.left -= size
        if self.left >= 0 or not size:
            return self._part(size).view(dtype).reshape(shape) if size in _PARTS else np.empty(shape, dtype)
        with tempfile.TemporaryFile() as file:
            try:
                if hasattr(os, "posix_fallocate"):  # otherwise a full disk would kill the process
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                where = tempfile.gettempdir()
                raise OSError(error.errno, f"{error.strerror}: a trace needs {size:,} more bytes in {where}") from None
            return np.asarray(np.memmap(file, dtype, "r+", shape=shape))

    def _part(self, size: int) -> Array:
        if self.block.size < size:
            whole = np.empty(_BLOCK + _PAGE, np.uint8)
            self.block = whole[-whole.ctypes.data % _PAGE :]
        part, self.block = self.block[:size], self.block[(size + 63) // 64 * 64 :]
        return part


def _in_own_order(
    network: Network, recording: Recording, numbers: Mapping[str, range]
) -> tuple[list[Record | None], dict[str, Flow]]:
    """Return the records of cells and all values, also between nodes of one call, each in its own order of steps."""
    records, flows = list(recording), dict(recording.flows)
    for stage in network.calls.sequences:
        backwards = getattr(stage.node, "go_backwards", False)
        for place, number in enumerate(stage.nodes[:-1]):
            above = recording[numbers[network.names[stage.nodes[place + 1]]][0]]
            own = recording[numbers[network.names[number]][-1]]
            top = own.states.h if own is not None else above.x if above is not None else None
            if top is not None:
                flows[network.names[number]] = Flow(top[:, ::-1] if backwards else top)
        for number in stage.nodes[1:] if backwards else ():  # their input is in the previous node's order: reversed
            for cell in numbers[network.names[number]]:
                record = recording[cell]
                records[cell] = None if record is None else _turned(record)
    return records, flows


def _turned(record: Record) -> Record:
    """Return the record of a backward cell as that of a forward cell over the reversed sequence."""
    turned = {name: array[:, ::-1] for name, array in record._asdict().items() if isinstance(array, np.ndarray)}
    return record._replace(**turned, reverse=False)
