"""Converts torch modules in memory to a Network. Torch isn't imported here: a caller with a module has imported it.

Torch's convolutions, pooling and batch normalisation have time last, `[B, C, T]`; its other modules, and all nodes of a
Network, have it in the middle, `[B, T, W]`. So each of the former is put between two `Permute`s. Adjacent `Permute`s,
also with activations between them, cancel out. The Network's inputs and outputs have the module's axes.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

from cellstack.formats import tirex, xlstm
from cellstack.formats.build import Builder
from cellstack.formats.pytorch import ncps, sru
from cellstack.formats.pytorch.access import (
    as_array,
    called,
    child_of,
    hooked,
    is_a,
    refuse,
    refusing,
    weight_of,
    weights_of,
    whole,
)
from cellstack.formats.pytorch.names import MODULES
from cellstack.formats.pytorch.saved import Saved
from cellstack.formats.pytorch.torch_modules import CELLS, activation_of, convolution, pooling, simple, torch_layers
from cellstack.formats.pytorch.tree import NOTHING, OUR_CELLS, OUR_RNNS, WRAPPERS
from cellstack.network import Network
from cellstack.network.layouts import time_first
from cellstack.nodes import MLSTM, Activation, Clip, Dense, Flatten, GlobalPool, Merge, Node, Permute, Reshape, Scale
from cellstack.nodes.cell_arrays import Cell
from cellstack.nodes.recurrent import Bidirectional, Recurrent, ends_both_ways
from cellstack.nodes.time import FINAL

GATED = {"Hardswish": ("hard_sigmoid",), "Mish": ("softplus", "tanh")}  # x times these activations of x
TURN = (2, 1)


def of_module(module: Any) -> Network:
    """Return a torch module as a Network, with copies of its weights.

    Supported are cellstack's layers (`LSTM`, `GRU`, `SimpleRNN`, `RNN` over any of its cells, `Bidirectional`,
    `TimeDistributed`), `torch.nn.LSTM`, `GRU` and `RNN` of any depth and direction, `Linear`, `Embedding`, `Conv1d`,
    `BatchNorm1d`, `LayerNorm`, `MaxPool1d`, `AvgPool1d`, adaptive pooling to one step, `Flatten`, activations,
    `Sequential` and `DataParallel` of these, a single torch cell, which is then applied over time, the CfC of ncps with
    a time of 1 between steps, the SRU of sru, models of xlstm, TiRex and TiRex-2, and any object with
    `to_nodes() -> list of nodes`.
    The Network takes `[B, T, I]`, and computes the module in evaluation mode: dropout is off, batch normalisation uses
    its running statistics, and zoneout's rates act as constants. A recurrent layer passes on its output only: a module
    after it that takes the output from `(output, state)` has nothing to do, and its `to_nodes()` returns `[]`. One that
    takes the final states, `torch.cat((h[-2], h[-1]), 1)` after a bidirectional layer, returns `[GlobalPool("final")]`;
    one that takes the last step, `y[:, -1]`, returns `[GlobalPool("last")]`.

    Warns if a module has `batch_first=False`, as the network takes the batch first, and if `to_nodes()` takes the last
    step of a bidirectional layer, which isn't its final states.

    Args:
        module: the module; its weights may be on any device, in float32 or float64.

    Returns:
        The network; `run` also returns the final states, one for each layer and direction.

    Raises:
        TypeError: an unsupported module or setting; the message names it by its path.
        ShapeError: modules whose widths or ranks don't match.
    """
    forecaster = tirex.of_module(module)
    if forecaster is not None:
        return forecaster
    reader = Reader()
    network = network_of_module(module, reader=reader)
    for doubt in reader.doubts:
        warnings.warn(f"load: {doubt}", stacklevel=5)  # the call of cellstack.load
    return network


def network_of_module(module: Any, metadata: dict[str, Any] | None = None, reader: Reader | None = None) -> Network:
    """Return a module in memory or in a file as a Network, without warnings: see `load`."""
    reader = Reader() if reader is None else reader
    reader.read(module, "")
    if not reader.builder.nodes:
        raise TypeError(f"load: expected a module that computes something, got {called(module)}")
    if reader.time_first and reader.batch_first:
        path, kind = reader.time_first
        raise TypeError(
            f"load: {path or 'the module'} ({kind}): expected batch_first=True, because {reader.batch_first} "
            "takes the batch first"
        )
    reader.builder.output(reader.wire)
    network = reader.builder.network(metadata, numbered=not reader.named)
    if reader.time_first:
        network.metadata.update(time_first(network))
    return network


LAST_OF_BOTH = (
    'GlobalPool("last") after a bidirectional layer is the last step, not both final states: at that step the backward '
    'direction has read one step only. For h[-2] and h[-1] use GlobalPool("final")'
)
TIME_FIRST = (
    "has batch_first=False and takes [T, B, I], but the network takes [B, T, I]; set batch_first = True, which doesn't "
    "change the weights, or transpose the network's input and output"
)


class Reader:
    """Reads modules one after the other.

    Attributes:
        builder: the network's builder.
        wire: the output of the last module read.
        time_first: path and class of the first recurrent layer without `batch_first`.
        batch_first: the first module that takes the batch first, or depends on the positions of axes.
        named: whether the nodes have names from the model.
        last_of_both: whether a module's `to_nodes` takes the last step of a bidirectional layer.
    """

    def __init__(self) -> None:
        self.builder = Builder()
        self.wire = self.builder.input("x")
        self.time_first: tuple[str, str] | None = None
        self.batch_first: str | None = None
        self.named = False
        self.last_of_both = False

    @property
    def doubts(self) -> list[str]:
        """Texts of warnings about what the caller may not have intended."""
        doubts = [LAST_OF_BOTH] if self.last_of_both else []
        if self.time_first:
            path, kind = self.time_first
            doubts.append(f"{path or 'the module'} ({kind.rpartition('.')[2]}) {TIME_FIRST}")
        return doubts

    @property
    def rank(self) -> int | None:
        """The number of axes of the value, including the batch; None if unknown."""
        shape = self.builder.shapes[self.wire]
        return None if shape is None else len(shape) + 1

    def add(self, *nodes: Node, others: tuple[str, ...] = ()) -> None:
        """Add consecutive nodes; each takes the wires `others` before the previous output."""
        for node in nodes:
            if isinstance(node, GlobalPool) and node.mode == FINAL:
                self.builder.final(self.wire)
                continue
            self.wire = self.builder.add(f"layer_{len(self.builder.nodes)}", node, *others, self.wire)

    def has_batch_first(self, path: str, module: Any) -> None:
        """Record that a module takes the batch first."""
        self.batch_first = self.batch_first or f"{path or 'the module'} ({called(module)})"

    def over_time(self, path: str, module: Any, *nodes: Node) -> None:
        """Add nodes, which have time in the middle, for a module that has time last."""
        self.has_batch_first(path, module)
        if self.rank == 2:
            raise refuse(path, module, "expected [B, C, T] as its input, got [B, C]")
        self.add(Permute(TURN), *nodes, Permute(TURN))

    def read(self, module: Any, path: str) -> None:
        """Add the nodes of `module`, in order; `path` is its path within the outermost module."""
        if callable(getattr(module, "to_nodes", None)):
            for node in module.to_nodes():
                self.last_of_both = self.last_of_both or (
                    isinstance(node, GlobalPool)
                    and node.mode == "last"
                    and ends_both_ways(reversed(self.builder.nodes.values()))
                )
                self.add(node)
            return
        torch = sys.modules.get("torch")
        if not isinstance(module, Saved) and (torch is None or not isinstance(module, torch.nn.Module)):
            raise refuse(path, module, "expected a torch module; cs.load reads files")
        if hooked(module):
            raise refuse(path, module, "forward hooks aren't supported")
        if is_a(module, "Sequential", *WRAPPERS[:1]) or is_a(module, *WRAPPERS, package="torch.nn.parallel"):
            for name, child in module._modules.items():  # a module that occurs twice runs twice
                self.read(child, f"{path}.{name}" if path else name)
        elif is_a(module, *MODULES):
            self.add(*torch_layers(module, path))
            if module.batch_first:
                self.has_batch_first(path, module)
            else:
                self.time_first = self.time_first or (path, called(module))
        elif not path and is_a(module, *CELLS):  # only by itself: a Sequential doesn't loop over steps
            self.add(*torch_layers(module, path))
        elif any(is_a(module, *kinds, package=package) for package, kinds in xlstm.PACKAGES.items()):
            self.xlstm(module, path)
        elif is_a(module, "CfC", package="ncps.torch"):
            self.of_package(module, path, ncps)
        elif is_a(module, "SRU", package="sru"):
            self.of_package(module, path, sru)
        elif is_a(module, "Flatten"):
            self.flatten(module, path)
        elif is_a(module, "BatchNorm1d"):
            self.normalise(module, path)
        elif is_a(module, "Conv1d"):
            self.over_time(path, module, convolution(module, path))
        elif is_a(module, "MaxPool1d", "AvgPool1d"):
            self.over_time(path, module, *pooling(module, path))
        elif is_a(module, "AdaptiveAvgPool1d", "AdaptiveMaxPool1d"):
            if whole(path, module, "output_size") != 1:
                raise refuse(path, module, f"expected output_size=1, got {module.output_size}")
            mode = "mean" if is_a(module, "AdaptiveAvgPool1d") else "max"
            self.over_time(path, module, GlobalPool(mode), Reshape((1, -1)))
        elif is_a(module, "Softmax", "LogSoftmax"):
            self.softmax(module, path)
        elif is_a(module, *GATED):
            x = self.wire
            self.add(*map(Activation, next(texts for kind, texts in GATED.items() if is_a(module, kind))))
            self.add(Merge("mul"), others=(x,))
        elif is_a(module, "MLSTM", package="cellstack.layers"):
            self.has_batch_first(path, module)
            self.add(*_mlstm(module, path))
        elif not is_a(module, *NOTHING):
            node = simple(module, path) or _layer(module, path)
            if isinstance(node, (Recurrent, Bidirectional)):  # one of ours
                self.has_batch_first(path, module)
            self.add(node if node is not None else activation_of(module, path))

    def xlstm(self, module: Any, path: str) -> None:
        """Add a model, or a part of one, of the package xlstm."""
        if isinstance(module, Saved):
            raise refuse(path, module, "expected its state dict, or the module in memory")
        for name, part in module.named_modules():
            if hooked(part):
                raise refuse(f"{path}.{name}".strip("."), part, "forward hooks aren't supported")
        state = {name: as_array(path, module, value.detach().cpu()) for name, value in module.state_dict().items()}
        self.has_batch_first(path, module)
        self.named = self.named or not path
        with refusing(path, module):
            kind = xlstm.kind_of(type(module))
            self.wire = xlstm.add_model(self.builder, self.wire, kind, module.config, state, path or kind)

    def of_package(self, module: Any, path: str, package: Any) -> None:
        """Add a layer of the package that one of our modules reads: its `nodes_of` takes the layer and its weights."""
        if isinstance(module, Saved):
            raise refuse(path, module, "expected the module in memory")
        weights = {name: as_array(path, module, value) for name, value in weights_of(path, module).items()}
        with refusing(path, module):
            self.add(*package.nodes_of(module, weights))
        if getattr(module, "batch_first", getattr(package, "BATCH_FIRST", True)):
            self.has_batch_first(path, module)
        else:
            self.time_first = self.time_first or (path, called(module))

    def flatten(self, module: Any, path: str) -> None:
        """Add a Flatten."""
        if module.start_dim != 1 or module.end_dim not in (-1, self.rank and self.rank - 1):
            axes = f"{module.start_dim} to {module.end_dim}"
            raise refuse(path, module, f"expected start_dim=1 and end_dim=-1, got {axes}")
        self.has_batch_first(path, module)
        self.add(Flatten())

    def normalise(self, module: Any, path: str) -> None:
        """Add a batch normalisation with its running statistics, as one scale and shift."""
        if module.running_mean is None:
            raise refuse(path, module, "expected running statistics: without them the output depends on the batch")
        mean, variance = (weight_of(path, module, name) for name in ("running_mean", "running_var"))
        if mean is None or variance is None:
            raise refuse(path, module, "expected running statistics, found one of the two")
        gain, bias = (weight_of(path, module, name) for name in ("weight", "bias"))
        with refusing(path, module):
            node = Scale.of_statistics(mean, variance, module.eps, gain, bias)
        if self.rank is None:
            raise refuse(path, module, "its input may be [B, C] or [B, C, T]: put a module before it that fixes which")
        if self.rank == 2:
            self.add(node)
        else:
            self.over_time(path, module, node)

    def softmax(self, module: Any, path: str) -> None:
        """Add a softmax, or its logarithm, over the features, or over the channels of [B, C, T]."""
        node = Activation("softmax" if is_a(module, "Softmax") else "log_softmax")
        if module.dim == -1 or module.dim == (self.rank and self.rank - 1):
            self.add(node)
        elif module.dim in (1, -2) and self.rank == 3:
            self.over_time(path, module, node)
        else:
            raise refuse(path, module, f"expected dim=-1, the feature axis, got {module.dim}")


# ── cellstack's layers, which this package never imports ────────────────────────────────────────────────────────────


def _mlstm(module: Any, path: str) -> list[Node]:
    """Return the nodes of an `MLSTM` layer: its projection, its memory with the output gate, the last step."""
    kernel = weight_of(path, module, "kernel")
    if kernel is None:
        raise refuse(path, module, "expected weights: give input_size, or call it first")
    nodes: list[Node] = [Dense(kernel, weight_of(path, module, "bias")), MLSTM(*module.spec)]
    return nodes if module.return_sequences else [*nodes, GlobalPool("last")]


def _layer(module: Any, path: str) -> Node | None:
    """Return the node of one of cellstack's layers; None for other modules."""
    ours = "cellstack.layers"
    if is_a(module, "Bidirectional", package=ours):
        if module.merge_mode is None:
            raise refuse(path, module, "expected a merge_mode: a Network has one output")
        parts = []
        for name in ("forward_layer", "backward_layer"):
            node = _layer(child_of(path, module, name), f"{path}.{name}" if path else name)
            if not isinstance(node, Recurrent):
                raise refuse(path, module, f"expected {name} to be an RNN or a subclass of it")
            parts.append(node)
        with refusing(path, module):  # such as one whose forward layer runs backwards
            return Bidirectional(parts[0], parts[1], module.merge_mode)
    if is_a(module, "TimeDistributed", package=ours):
        inner = Reader()
        inner.read(child_of(path, module, "layer"), f"{path}.layer" if path else "layer")
        nodes = [*inner.builder.nodes.values()]
        if len(nodes) == 1 and isinstance(nodes[0], (Activation, Clip, Dense)):
            return nodes[0]
        raise refuse(path, module, "expected a TimeDistributed over one Linear or one activation")
    if is_a(module, *OUR_CELLS, package=ours) and not path:  # a cell by itself is applied over time
        return Recurrent((_layer_cell(module, path, module),))
    if not is_a(module, *OUR_RNNS, package=ours):
        return None
    cell = child_of(path, module, "cell")
    stack = is_a(cell, "StackedRNNCells", package=ours)
    cells = list(child_of(path, cell, "cells")._modules.values()) if stack else [cell]
    for one in cells:
        if not is_a(one, *OUR_CELLS, package=ours):
            raise refuse(path, module, f"expected cells of cellstack.layers, got {called(one)}")
    names = ("return_sequences", "go_backwards", "zero_output_for_mask")
    flags = {name: bool(getattr(module, name)) for name in names} | {"residual": stack and bool(cell.residual)}
    return Recurrent(tuple(_layer_cell(one, path, module) for one in cells), **flags)


def _layer_cell(cell: Any, path: str, module: Any) -> Cell:
    with refusing(path, module):  # it may not be built yet, or have an activation that only torch can run
        spec = cell.spec
    arrays = {name: weight_of(path, cell, name) for name in spec.shapes}
    for name, weight in arrays.items():
        if weight is None:
            raise refuse(path, module, f"expected the weight {name}, found none")
    with refusing(path, module):  # a file may hold weights of any shape
        return Cell(spec, *arrays.values())
