"""The two routes from a module to a network: reading it directly, and through ONNX."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any

from torch.nn import RNNCellBase

from cellstack.capture.axes import free_axes
from cellstack.capture.exported import export
from cellstack.capture.probes import calls
from cellstack.cells.errors import FormatError
from cellstack.formats import onnx
from cellstack.formats.build import HINT
from cellstack.formats.pytorch import network_of_module
from cellstack.formats.pytorch.torch_modules import KNOWN
from cellstack.network import Network
from cellstack.network.layouts import KEY


def directly(module: Any, inputs: int) -> Network | Exception:
    """Return the network that `cellstack.load` returns for a module of this number of inputs, or why there is none."""
    try:
        network = network_of_module(module)
    except TypeError as error:  # most modules are custom classes, which may still be exported to ONNX
        return TypeError(str(error).replace(KNOWN, "a custom class without to_nodes()"))
    except ValueError as error:
        return error
    if inputs != len(network.inputs):
        return TypeError("it takes states or other inputs in addition to x")
    takers = [node for node, wires in zip(network.nodes, network.wires, strict=True) if network.inputs[0] in wires]
    if any(getattr(node, "dims", None) == (2, 1) for node in takers):
        return TypeError("it takes [B, C, T], of which the graph gives a network of [B, T, C]")
    return network


def by_onnx(module: Any, inputs: tuple[Any, ...], answers: int, looks: list[str]) -> Network:
    """Return the network of a module's ONNX graph, for any batch size and number of steps if the graph allows it.

    The graph's inputs and outputs are named `input_n` and `output_n`, by their index among the tensors. The places
    where the module's code reads values are added to `looks`.

    Raises:
        FormatError: the module can't be exported, or its graph can't be read.
        ModuleNotFoundError: the export needs a package that isn't installed.
    """
    cells = [part for part in module.modules() if isinstance(part, RNNCellBase)]
    one_step = inputs[0].ndim == 2 and calls(module, cells, inputs) == 1
    reasons = list[FormatError]()
    names = [f"input_{n}" for n in range(len(inputs))] if len(inputs) > 1 else ["input"]
    outs = [f"output_{n}" for n in range(answers)]
    shapes = {name: list(value.shape) for name, value in zip(names, inputs, strict=True)}
    for way in _ways(free_axes(module, inputs)):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "module.onnx")
            found = export(module, inputs, way, path, names, outs, one_step)
            looks += (line for line in found if line not in looks)
            try:
                network = onnx.read_whole(path, whole_loops=True, example=shapes)
                break
            except FormatError as error:
                said = str(error).replace(path, "its graph").removesuffix(f"; {HINT}")
                reasons.append(FormatError(re.sub(r"; pass it: cs\.load\(.*?\}\)", "", said)))  # for owners of files
    else:
        raise reasons[0]
    if KEY in network.metadata:
        network.metadata[KEY]["of"] = "module"
    return network


def _ways(free: list[list[int]]) -> Iterator[list[list[int]]]:
    """Yield choices of the open axes of each input: the batch and one other axis, each in turn."""
    yield [axes[:2] for axes in free]
    for n, axes in enumerate(free):
        for axis in axes[2:]:
            yield [[axes[0], axis] if m == n else other[:2] for m, other in enumerate(free)]
