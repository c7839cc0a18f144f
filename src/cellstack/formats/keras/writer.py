"""Writes networks as files of Keras 3: `.keras`, and the HDF5 of `model.save("model.h5")`.

A network becomes a functional model with a layer for each node, of the same name. Nodes that Keras has no layer for are
refused, all of them by name. The network's metadata is written where Keras ignores it, see `files.NOTE`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

from cellstack.formats.build import Names
from cellstack.formats.files import replacing
from cellstack.formats.keras.containers import Entry, hdf5_model, zipped
from cellstack.formats.keras.node_layers import MERGE_LAYERS, OPERATIONS, RefusedError, entry_of, layers_of, with_states
from cellstack.network.graph import state_of
from cellstack.nodes import GlobalPool, Masking, Recurrent, Reduce
from cellstack.nodes.base import Node
from cellstack.nodes.masks import NamedMasks

if TYPE_CHECKING:
    from cellstack.network import Network

Tensor = tuple[str, int]  # the layer that returns it, and the index among its outputs


class Feeds(NamedTuple):
    """A layer's inputs and its initial states, which are nested lists for a stack of cells."""

    inputs: list[Tensor]
    starts: list[Any]

    @property
    def layers(self) -> list[str]:
        """The layers that return its inputs and states."""
        return [name for name, _ in (*self.inputs, *_flat(self.starts))]


def write(network: Network, path: str) -> None:
    """Write a network as a model of Keras 3: a zip if the suffix is `.keras`, else HDF5.

    Raises:
        ValueError: nodes or settings that Keras doesn't have, all of which are named.
        OSError: the file can't be written.
        ModuleNotFoundError: h5py is missing.
    """
    as_zip = PurePath(path).suffix.lower() == ".keras"
    entries, wires, outputs = _entries(network, as_zip)
    inputs = [entry[1] for entry in entries if entry[0] == "InputLayer"]
    order = _order([entry[1] for entry in entries], [feeds.layers for feeds in wires], [name for name, _ in outputs])
    entries, wires = [entries[number] for number in order], [wires[number] for number in order]
    config = _config(network, entries, wires, inputs, outputs)
    content = (zipped if as_zip else hdf5_model)(config, entries, network.metadata)
    with replacing(path) as file:
        file.write(content)


def _flat(starts: list[Any]) -> Iterator[Tensor]:
    for one in starts:
        if isinstance(one, list):
            yield from _flat(one)
        else:
            yield one


def _entries(network: Network, operations: bool) -> tuple[list[Entry], list[Feeds], list[Tensor]]:
    """Return the layers, the inputs of each, and the output tensors; with `operations`, layers may be functions."""
    dtype, problems = str(network.dtype), []
    entries: list[Entry] = []
    wires: list[Feeds] = []
    free = Names(mark="_")  # Keras's torch backend accepts no names with a dot
    last = {name: (free.fresh(name.replace(".", "_")), 0) for name in (*network.inputs, *network.names)}
    for name in network.inputs:
        shape = [None, *network.shapes[name]]
        kind = "int32" if name in network.graph.ids else dtype
        if shape[-1] is None and name not in network.graph.ids:
            problems.append(f"input {name}: its width isn't fixed")
        entries.append(
            ("InputLayer", last[name][0], {"batch_shape": shape, "dtype": kind, "sparse": False, "ragged": False}, [])
        )
        wires.append(Feeds([], []))
    masks: dict[str, frozenset[str] | None] = dict.fromkeys(network.inputs)
    graph, ends = network.graph, _ends(network)
    for name, node, wired, exposed in zip(network.names, network.nodes, network.wires, graph.states, strict=True):
        sources, starts = node.apart(wired)
        before, axes = [masks.get(source) for source in sources], len(network.shapes[sources[0]])
        masks[name] = node.mask_after(before, axes, NamedMasks())  # names of the layers at which Keras drops them
        problems += _mask_problems(name, node, before, axes)
        if starts and before[0] is not None:
            problems.append(f"{name}: Keras ignores the mask of a sequence with initial states")
        if name in ends:  # the h of the layer before
            sizes = network.nodes[network.names.index(ends[name])].state_sizes
            last[name] = last[ends[name]][0], 1 + [*sizes].index([state for state in sizes if state.endswith("h")][-1])
            continue
        try:
            layers = layers_of(node)
            if exposed or name in ends.values():
                layers = [with_states(*layer) for layer in layers]
        except RefusedError as error:
            problems.append(f"{name}: {error}")
            continue
        for kind, _, _ in layers:
            if kind in OPERATIONS and not operations:
                problems.append(f"{name}: the function {kind}, which only .keras files can store, not HDF5")
            if kind in ("Cropping1D", "ZeroPadding1D") and axes != 2:
                shape = network.graph.shown(sources[0])
                problems.append(f"{name}: {kind} of {shape}, which only takes sequences [B, T, W]")
            if (kind in OPERATIONS or kind == "Cropping1D") and masks[name] is not None:
                masks[name] = (masks[name] or frozenset()) | {name}
        feeds = Feeds([last[source] for source in sources], _nested(node, [last[start] for start in starts]))
        for number, (kind, settings, arrays) in enumerate(layers):
            own = free.fresh(f"{last[name][0]}_activation") if number else last[name][0]
            entries.append((kind, own, {"dtype": dtype, **settings}, arrays))
            wires.append(feeds)
            last[name] = own, 0
            feeds = Feeds([last[name]], [])
        places = {state_of(name, state): 1 + place for place, state in enumerate(node.state_sizes)}
        last |= {state.value: (last[name][0], places[state.value]) for state in exposed}
    if problems:
        raise ValueError(f"save: Keras can't represent this network: {'; '.join(problems)}")
    return entries, wires, [last[name] for name in network.outputs]


def _ends(network: Network) -> dict[str, str]:
    """Return the names of nodes that take a sequence's last step, if it is a state of the node that returns it."""
    nodes = dict(zip(network.names, network.nodes, strict=True))
    found = {}
    for name, node, (source, *_) in zip(network.names, network.nodes, network.wires, strict=True):
        before = nodes.get(source)
        if not isinstance(node, GlobalPool) or node.mode != "last" or not isinstance(before, Recurrent):
            continue
        if not before.go_backwards and not before.zero_output_for_mask and not before.parts[-1][1]:
            found[name] = source
    return found


def _nested(node: Node, starts: list[Tensor]) -> list[Any]:
    """Return initial states in Keras's form: for a stack, a list for each cell."""
    if not starts or not isinstance(node, Recurrent) or len(node.cells) == 1:
        return starts
    left = iter(starts)
    return [[next(left) for _ in cell.spec.state_sizes] for cell in node.cells]


def _order(names: list[str], wires: list[list[str]], outputs: list[str]) -> list[int]:
    """Return the order in which Keras lists the layers, by which it assigns the weights.

    Layers with the longest path to an output come first; among equals, those that a depth-first search from the outputs
    visits first.

    Ref: `map_graph` in Keras's `ops/function.py`.
    """
    sources = dict(zip(names, wires, strict=True))
    far = dict.fromkeys(names, 0)
    for name in reversed(names):
        for source in sources[name]:
            far[source] = max(far[source], far[name] + 1)
    met: dict[str, int] = {}
    waiting = [*reversed(outputs)]
    while waiting:
        name = waiting.pop()
        if name not in met:
            met[name] = len(met)
            waiting += reversed(sources[name])
    return sorted(range(len(names)), key=lambda number: (-far[names[number]], met[names[number]]))


def _mask_problems(name: str, node: Node, masks: Sequence[frozenset[str] | None], axes: int) -> Iterator[str]:
    """Yield the differences between a node's treatment of masks and Keras's."""
    on = [mask for mask in masks if mask is not None]
    if node.heeds_mask:
        for layer in sorted(frozenset().union(*on)):
            yield f"{layer}: Keras drops the mask, which {name} needs"
    if not on:
        return
    if isinstance(node, GlobalPool) and node.mode == "max":
        yield f"{name}: Keras's max over time ignores the mask"
    if isinstance(node, Reduce) and node.place(axes) == 1:
        yield f"{name}: Keras's {node.mode} over time ignores the mask"
    if isinstance(node, Masking):
        yield f"{name}: a second mask replaces the first in Keras"


def _config(
    network: Network, entries: list[Entry], wires: list[Feeds], inputs: list[str], outputs: list[Tensor]
) -> dict[str, Any]:
    """Return the description of the model in Keras 3's form."""
    dtype, layers = str(network.dtype), []

    def tensor(one: Any) -> Any:
        if isinstance(one, list):
            return [tensor(inner) for inner in one]
        history = [one[0], 0, one[1]]
        return {"class_name": "__keras_tensor__", "config": {"shape": [], "dtype": dtype, "keras_history": history}}

    for (kind, name, settings, _), (sources, starts) in zip(entries, wires, strict=True):
        args = [tensor(sources)] if kind in MERGE_LAYERS.values() else tensor(sources)
        kwargs = {"initial_state": tensor(starts)} if starts else {}
        calls = [{"args": args, "kwargs": kwargs}] if sources else []
        layers.append({**entry_of(kind, name, settings), "name": name, "inbound_nodes": calls})
    ends = {
        "input_layers": [[name, 0, 0] for name in inputs],
        "output_layers": [[name, 0, place] for name, place in outputs],
    }
    for key, refs in ends.items():
        ends[key] = refs[0] if len(refs) == 1 else refs
    return {
        "module": "keras.src.models.functional",
        "class_name": "Functional",
        "config": {"name": "cellstack", "trainable": True, "layers": layers, **ends},
        "registered_name": "Functional",
    }
