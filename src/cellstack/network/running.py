"""Runs a network over sequences: checks its inputs, and passes values and states from node to node."""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from cellstack.cells.base import MatrixState
from cellstack.cells.errors import ShapeError, check_sequence
from cellstack.network import layouts
from cellstack.network.arguments import as_flags, as_mask, as_own, as_states
from cellstack.nodes.base import Array, CellState, Flow
from cellstack.nodes.cell_arrays import WEIGHTS
from cellstack.nodes.checks import check_choice, check_integer
from cellstack.nodes.dense import Products
from cellstack.nodes.mlstm import MLSTM
from cellstack.nodes.recording import MemoryRecord, Recording
from cellstack.nodes.recurrent import Bidirectional, Recurrent

if TYPE_CHECKING:
    from cellstack.network.network import Network


def processors() -> int:
    """Return the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_network(
    network: Network,
    x: Any,
    state: Any,
    mask: Any,
    lengths: Any,
    reset: Any,
    threads: int | None,
    weights: str | None,
    record: Recording | None,
) -> tuple[Any, tuple[CellState, ...]]:
    """Run a network over a batch of sequences: see `Network.run`."""
    if weights is not None:
        check_choice("Network", "weights", weights, WEIGHTS)
    values = _flows(network, x, mask, lengths, reset)
    given = [flow.x for flow in values.values()]
    if record is not None:  # the caller may change the inputs later
        values = {name: Flow(flow.x.copy(), flow.mask, flow.reset) for name, flow in values.items()}
        record.flows.update(values)
    batch, count = len(given[0]), len(network.cells)
    states = as_states("Network", state, network.stateful, batch, network.initial_state_sources)
    threads = processors() if threads is None else check_integer("Network", "threads", threads)
    memories = iter(states[count:])
    after: tuple[CellState, ...] = ()
    of_memories: tuple[CellState, ...] = ()
    with np.errstate(all="ignore"):  # NaN and inf pass through, as they do in the kernel
        for numbers, node, sources, _ in network.calls.sequences:
            name = network.names[numbers[-1]]
            flows = [values[source] for source in sources]
            if network.graph.late[numbers[0]]:
                node.check(name, *(flow.x.shape[1:] for flow in flows))
            if reset is not None and node.mixes_steps and any(flow.reset is not None for flow in flows):
                raise ValueError(
                    f"Network: reset isn't supported: {name} ({type(node).__name__}) combines steps "
                    "that may belong to different pieces"
                )
            if reset is not None and flows[0].reset is not None and node.apart(flows)[1]:
                raise ValueError(
                    f"Network: reset of {sources[0]} isn't supported: {name} starts from "
                    f"{', '.join(sources[1:])}, which a new piece doesn't have"
                )
            own, patches = states[len(after) : len(after) + len(node.cells)], network.patches_of(numbers)
            if isinstance(node, (Recurrent, Bidirectional)):
                x, used, begun, ends = node.run(flows, own, threads, record, patches, weights)
            elif isinstance(node, MLSTM):
                before, change = cast("MatrixState | None", next(memories)), next(iter(patches), None)
                x, used, begun, of_memory = node.run(flows, (before,), threads, change)
                of_memories, ends = of_memories + of_memory, ()
                if record is not None:
                    record.memories[name] = MemoryRecord(
                        flows[0].x, before, flows[0].mask, flows[0].reset, patches=change
                    )
            elif isinstance(node, Products):
                x, used, begun, ends = node.run(flows, own, threads, weights)
            else:
                x, used, begun, ends = node.run(flows, own, threads)
            values[name] = Flow(x, used, begun)
            if record is not None:
                record.flows[name] = values[name]
            after += ends
            if network.has_state_values:
                values |= _state_values(network, numbers, ends, record)
            for number in numbers:
                for value in network.graph.done[number]:
                    values.pop(value, None)  # absent between the nodes of one call
    after += of_memories
    if network.has_state_values:  # an output that is a state mustn't share memory with the returned states
        given += [array for one in after for array in one]
    return as_own([values[name].x for name in network.outputs], given), after


def _state_values(
    network: Network, numbers: tuple[int, ...], ends: tuple[CellState, ...], record: Recording | None
) -> dict[str, Flow]:
    """Return the states of these nodes that are values of the network, by name; `ends` are all their states."""
    found, first = {}, 0
    for number in numbers:
        for value, cell, part in network.graph.states[number]:
            array = getattr(ends[first + cell], part)
            found[value] = Flow(array if record is None else array.copy())  # the caller may change the state later
        first += len(network.nodes[number].cells)
    if record is not None:
        record.flows.update(found)
    return found


def _flows(network: Network, x: Any, mask: Any, lengths: Any, reset: Any) -> dict[str, Flow]:
    """Return the checked inputs with their masks and resets, by name."""
    try:
        arrays = network.as_inputs("Network", x)
        for name in arrays:
            _check_input(network, name, arrays)
    except (ShapeError, TypeError) as error:
        raise type(error)(f"{error}{_hint(network, x)}") from error
    if network.needs_lengths and mask is None and lengths is None:
        raise ValueError(
            "Network: expected lengths, or a mask: the module that was compiled computed the rows' lengths from its "
            "input, the network can't. Pass lengths=[...], the number of steps of each row without padding; or call "
            "net.unpadded(x) if no row has padding"
        )
    if mask is None and lengths is None and reset is None:
        return {name: Flow(array) for name, array in arrays.items()}
    timed = [name for name in arrays if network.graph.timed(name)]
    flags = {"mask": mask, "lengths": lengths, "reset": reset}
    for what, value in flags.items():
        for name in value if isinstance(value, Mapping) else ():
            if name not in timed:
                known = f"the inputs with a time axis are {', '.join(timed)}" if timed else "no input has one"
                raise ValueError(f"Network: {what} for {name!r}, which has no time axis: {known}")
        if value is not None and not timed:
            raise ValueError(f"Network: {what} isn't supported: no input has a time axis")
    flows = {}
    for name, array in arrays.items():
        if name not in timed:
            flows[name] = Flow(array)
            continue
        own = {what: value.get(name) if isinstance(value, Mapping) else value for what, value in flags.items()}
        batch, steps = array.shape[:2]
        used = as_mask("Network", own["mask"], own["lengths"], batch, steps)
        flows[name] = Flow(array, used, as_flags("Network", "reset", own["reset"], batch, steps, "a piece begins"))
    return flows


def _hint(network: Network, x: Any) -> str:
    """Return a hint for an input that `run` refuses and `predict` takes."""
    several = isinstance(x, (list, tuple)) and len({len(row) for row in x if hasattr(row, "__len__")}) > 1
    kinds = {
        "the names of files": isinstance(x, (str, PathLike)),
        "data frames": network.task is not None and hasattr(x, "columns") and hasattr(x, "dtypes"),
        "lists of sequences of any lengths": several and len(network.inputs) == 1,
    }
    return next((f": net.predict takes {what}" for what, given in kinds.items() if given), "")


def _check_input(network: Network, name: str, arrays: dict[str, Array]) -> None:
    """Raise `ShapeError` unless an input has its shape, and the batch size of the first input."""
    array, shape = arrays[name], network.shapes[name]
    if len(shape) == 2 and shape[0] is None and name not in network.graph.ids:
        try:
            check_sequence("Network", array.shape, shape[1], name)
        except ShapeError as error:
            raise ShapeError(f"{error}{layouts.hint(network, name)}") from None
    else:
        fits = array.ndim == len(shape) + 1 and all(
            want in (None, got) for want, got in zip(shape, array.shape[1:], strict=True)
        )
        if not fits:
            hint = ": add a batch axis: x[None]" if array.ndim == len(shape) else ""
            hint += layouts.hint(network, name)
            raise ShapeError(f"Network: expected {name} {network.graph.shown(name)}, got {array.shape}{hint}")
    first = next(iter(arrays.values()))
    if len(array) != len(first):
        raise ShapeError(f"Network: expected {name} with B={len(first)}, as {network.inputs[0]} has, got {array.shape}")
