"""Networks as ONNX files: every node as its operators, every cell's state as an input and an output."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from cellstack.formats.files import replacing
from cellstack.formats.onnx.cell_writer import CellWriter, cell_names
from cellstack.formats.onnx.file import KEY
from cellstack.formats.onnx.masks import GraphMasks, of_lengths
from cellstack.formats.onnx.node_writers import WRITERS, Feed
from cellstack.formats.onnx.pieces import LAST
from cellstack.formats.onnx.scan import OPSET
from cellstack.network import Network
from cellstack.nodes import MLSTM, Node

IR_VERSION = 8


class Writer(CellWriter):
    """Writes a network's nodes into a graph; see `CellWriter`."""

    def lengths(self) -> Any:
        """Add the rows' lengths as masks of the inputs with time, and return the graph's input.

        If it is omitted, all steps are used.
        """
        timed = [name for name in self.network.inputs if self.network.graph.timed(name)]
        if not timed:
            raise ValueError("save: lengths need an input with a time axis")
        given = self.tensor("lengths", np.array([LAST]))
        for name in timed:
            self.masks[name] = of_lengths(self, name, given)
        return self.onnx.helper.make_tensor_value_info(given, self.onnx.TensorProto.INT64, [f"{given}.rows"])

    def node(self, name: str, node: Node, sources: list[str]) -> None:
        """Add a node; its output has its name.

        Raises:
            ValueError: a node that ONNX can't express.
        """
        write = WRITERS.get(type(node))
        if write is None:
            raise ValueError(f"save: {name}: {type(node).__name__} isn't supported in ONNX files")
        masks = [self.masks.get(source, "") for source in sources]
        shape = self.network.shapes[sources[0]]
        made = write(self, name, node, Feed(sources, masks, shape))
        known, on = [mask or None for mask in masks], GraphMasks(self, made if node.makes_mask else "", sources)
        self.masks[name] = node.mask_after(known, len(shape), on) or ""


def state_names(network: Network) -> dict[str, str]:
    """Return the outputs that hold the final states, by their number and part, such as `cell 0 h`."""
    entries = list(zip(network.names, network.nodes, strict=True))
    names = [own for name, node in entries for own in cell_names(name, node)]
    names += [name for name, node in entries if isinstance(node, MLSTM)]
    return {
        f"cell {number} {part}": f"{name}.{part}.after"
        for number, (name, one) in enumerate(zip(names, network.stateful, strict=True))
        for part in one.state_shapes
    }


def model_of(network: Network, lengths: bool = False, states: bool = False) -> Any:
    """Return a network as a ModelProto.

    Args:
        network: what to write.
        lengths: whether it has an input with the rows' lengths.
        states: whether it has an input for each initial state.

    Raises:
        ValueError: something that ONNX can't express; the message names it.
    """
    writer = Writer(network, states)
    helper = writer.onnx.helper
    kinds = dict.fromkeys(network.graph.ids, writer.onnx.TensorProto.INT64)
    inputs, outputs = (
        [helper.make_tensor_value_info(name, kinds.get(name, writer.type), _axes(network, name)) for name in names]
        for names in (network.inputs, network.outputs)
    )
    if lengths:
        inputs.append(writer.lengths())
    for name, node, sources, own in zip(network.names, network.nodes, network.wires, network.graph.states, strict=True):
        writer.node(name, node, list(sources))
        cells = cell_names(name, node)
        for value, cell, part in own:
            writer.put("Identity", [f"{cells[cell]}.{part}.after"], value)
    graph = helper.make_graph(
        writer.nodes, "network", [*inputs, *writer.inputs], [*outputs, *writer.outputs], writer.tensors
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="cellstack"
    )
    said = {"metadata": network.metadata, "states": writer.states, "zero_output_for_mask": writer.zeros}
    helper.set_model_props(model, {KEY: json.dumps(said)})
    return model


def _axes(network: Network, name: str) -> list[str | int]:
    """Return the axes of an input or output: sizes, or names, which are the same only for axes of the same size."""
    shape = network.shapes[name]
    alone = [other for other in network.inputs if network.graph.timed(other)] == [name]
    names = [f"{name}.{n + 1}" for n in range(len(shape))]
    if name in network.graph.ids or len(shape) > 1:
        names[0] = "time" if alone else f"{name}.time"
    return ["batch", *(axis if axis is not None else own for axis, own in zip(shape, names, strict=True))]


def write(network: Network, path: str, lengths: bool = False, states: bool = False) -> None:
    """Write a network to a file, whole or not at all; the options are those of `model_of`.

    Raises:
        ValueError: something that ONNX can't express, or more data than protobuf allows, 2 GiB.
        OSError: the file can't be written.
    """
    data = model_of(network, lengths, states).SerializeToString()
    with replacing(path) as file:
        file.write(data)
