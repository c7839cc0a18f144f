"""Converts torch modules in memory to a Network. Torch isn't imported here: a caller with a module has imported it.

Torch's convolutions, pooling and batch normalisation have time last, `[B, C, T]`; its other modules, and all nodes of a
Network, have it in the middle, `[B, T, W]`. So each of the former is put between two `Permute`s. Adjacent `Permute`s,
also with activations between them, cancel out. The Network's inputs and outputs have the module's axes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from cellstack.formats import xlstm
from cellstack.formats.build import Builder
from cellstack.formats.pytorch import ncps
from cellstack.formats.pytorch.derived import joined
from cellstack.formats.pytorch.names import MODULES, NAME, array, networks_of
from cellstack.formats.pytorch.saved import Saved
from cellstack.formats.pytorch.tree import COMPUTING, NOTHING, OUR_CELLS, OUR_RNNS, WRAPPERS
from cellstack.formats.tirex import of_module
from cellstack.layout import Array
from cellstack.network import Network
from cellstack.network.layouts import time_first
from cellstack.nodes import (
    MLSTM,
    Activation,
    Clip,
    Conv1D,
    Dense,
    Embedding,
    Flatten,
    GlobalPool,
    LayerNorm,
    Merge,
    Node,
    Pad,
    Permute,
    Pool1D,
    Reshape,
    Scale,
)
from cellstack.nodes.cell import Cell
from cellstack.nodes.recurrent import Bidirectional, Recurrent, ends_both_ways
from cellstack.nodes.time import FINAL
from cellstack.spec import DTYPES

CELLS = {f"{name}Cell": kind for name, kind in MODULES.items()}
ACTIVATIONS = {
    "ReLU": "relu",
    "Sigmoid": "sigmoid",
    "Softsign": "softsign",
    "Tanh": "tanh",
    "Hardsigmoid": "hard_sigmoid",
    "SELU": "selu",
    "SiLU": "silu",
}
GATED = {"Hardswish": ("hard_sigmoid",), "Mish": ("softplus", "tanh")}  # x times these activations of x
TURN = (2, 1)
KNOWN = (
    "expected a recurrent layer, a Linear, Embedding, Conv1d, BatchNorm1d, LayerNorm, pooling, Flatten, a supported "
    "activation or a Sequential of these; a custom module has to return its nodes from a method to_nodes(): [] if it "
    "only takes the output from (output, state), as recurrent layers return only their output here"
)


def from_torch(module: Any) -> Network:
    """Return a torch module as a Network, with copies of its weights.

    Supported are cellstack's layers (`LSTM`, `GRU`, `SimpleRNN`, `RNN` over any of its cells, `Bidirectional`,
    `TimeDistributed`), `torch.nn.LSTM`, `GRU` and `RNN` of any depth and direction, `Linear`, `Embedding`, `Conv1d`,
    `BatchNorm1d`, `LayerNorm`, `MaxPool1d`, `AvgPool1d`, adaptive pooling to one step, `Flatten`, activations,
    `Sequential` and `DataParallel` of these, a single torch cell, which is then applied over time, the CfC of ncps with
    a time of 1 between steps, models of xlstm, TiRex and TiRex-2, and any object with `to_nodes() -> list of nodes`.
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
    tirex = of_module(module)
    if tirex is not None:
        return tirex
    reader = Reader()
    network = network_of_module(module, reader=reader)
    for doubt in reader.doubts:
        warnings.warn(f"from_torch: {doubt}", stacklevel=2)
    return network


def network_of_module(module: Any, metadata: dict[str, Any] | None = None, reader: Reader | None = None) -> Network:
    """Return a module in memory or in a file as a Network, without warnings: see `from_torch`."""
    reader = Reader() if reader is None else reader
    reader.read(module, "")
    if not reader.builder.nodes:
        raise TypeError(f"from_torch: expected a module that computes something, got {_called(module)}")
    if reader.time_first and reader.batch_first:
        path, kind = reader.time_first
        raise TypeError(
            f"from_torch: {path or 'the module'} ({kind}): expected batch_first=True, because {reader.batch_first} "
            "takes the batch first"
        )
    reader.builder.output(reader.wire)
    network = reader.builder.network(metadata, numbered=not reader.named)
    if reader.time_first:
        network.metadata.update(time_first(network))
    return network


def _called(module: Any) -> str:
    return module.path if isinstance(module, Saved) else type(module).__name__


def _refuse(path: str, module: Any, why: str) -> TypeError:
    return TypeError(f"from_torch: {path or 'the module'} ({_called(module)}): {why}")


LAST_OF_BOTH = (
    'GlobalPool("last") after a bidirectional layer is the last step, not both final states: at that step the backward '
    'direction has read one step only. For h[-2] and h[-1] use GlobalPool("final")'
)
TIME_FIRST = (
    "has batch_first=False and takes [T, B, I], but the network takes [B, T, I]; set batch_first = True, which doesn't "
    "change the weights, or transpose the network's input and output"
)


@contextmanager
def _refusing(path: str, module: Any) -> Iterator[None]:
    """Add the module's name to errors of its node or its weights."""
    try:
        yield
    except ValueError as error:
        raise _refuse(path, module, str(error)) from None


def _is(module: Any, *names: str, package: str = "torch.nn") -> bool:
    """Return whether `module` is of one of these classes, with the class's own forward pass."""
    if isinstance(module, Saved):
        return package.startswith(module.package) and module.kind in names
    classes = [getattr(sys.modules.get(package), name, None) for name in names]
    if "forward" in getattr(module, "__dict__", {}):
        return False
    own = getattr(type(module), "_class_before", type(module))  # the original class of an accelerated module
    return any(isinstance(module, kind) and own.forward is kind.forward for kind in classes if kind is not None)


def _array(path: str, module: Any, tensor: Any) -> Array:
    if isinstance(module, Saved):
        return array(tensor)
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise _refuse(path, module, f"expected weights in {' or '.join(DTYPES)}, got {tensor.dtype}")
    return np.array(np.asarray(tensor))


def _weights(path: str, module: Any) -> dict[str, Any]:
    """Return the weights of a module by name; those in pieces are computed anew, not taken from a hook's last call."""
    if isinstance(module, Saved):
        return module.tensors
    own = {name: value.detach().cpu() for name, value in (*module.named_parameters(), *module.named_buffers())}
    known, custom = dict(own), getattr(module, "parametrizations", {})
    axes = {hook.name: hook.dim for hook in module._forward_pre_hooks.values() if type(hook).__name__ == "SpectralNorm"}
    for name, steps in custom.items():
        if len(steps) != 1 or type(steps[0]).__name__ not in ("_WeightNorm", "_SpectralNorm"):
            known = {key: value for key, value in known.items() if not key.startswith(f"parametrizations.{name}.")}
            known[name] = getattr(module, name).detach().cpu()
        elif type(steps[0]).__name__ == "_SpectralNorm":
            axes[name] = steps[0].dim
    with _refusing(path, module):
        return joined(known, path, axes=axes)


def _weight(path: str, module: Any, name: str) -> Array | None:
    """Return a weight of a module; None if it has none of that name."""
    found = _weights(path, module).get(name)
    if found is None and getattr(module, name) is not None:
        raise _refuse(path, module, f"expected {name} to be a parameter or a buffer")
    return None if found is None else _array(path, module, found)


def _whole(path: str, module: Any, name: str) -> int:
    """Return a setting for one axis, which torch stores as a number or as a tuple of one."""
    value = getattr(module, name)
    value = value[0] if isinstance(value, tuple) and len(value) == 1 else value
    if not isinstance(value, int):
        raise _refuse(path, module, f"expected {name} to be a number, got {value!r}")
    return value


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
        self.batch_first = self.batch_first or f"{path or 'the module'} ({_called(module)})"

    def over_time(self, path: str, module: Any, *nodes: Node) -> None:
        """Add nodes, which have time in the middle, for a module that has time last."""
        self.has_batch_first(path, module)
        if self.rank == 2:
            raise _refuse(path, module, "expected [B, C, T] as its input, got [B, C]")
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
            raise _refuse(path, module, "expected a torch module")
        if isinstance(module, Saved) and module.changed:
            raise _refuse(path, module, module.changed)
        if _hooked(module):
            raise _refuse(path, module, "forward hooks aren't supported")
        if _is(module, "Sequential", *WRAPPERS[:1]) or _is(module, *WRAPPERS, package="torch.nn.parallel"):
            for name, child in module._modules.items():  # a module that occurs twice runs twice
                self.read(child, f"{path}.{name}" if path else name)
        elif _is(module, *MODULES):
            self.add(*_torch_layers(module, path))
            if module.batch_first:
                self.has_batch_first(path, module)
            else:
                self.time_first = self.time_first or (path, _called(module))
        elif not path and _is(module, *CELLS):  # only by itself: a Sequential doesn't loop over steps
            self.add(*_torch_layers(module, path))
        elif any(_is(module, *kinds, package=package) for package, kinds in xlstm.PACKAGES.items()):
            self.xlstm(module, path)
        elif _is(module, "CfC", package="ncps.torch"):
            self.ncps(module, path)
        elif _is(module, "Flatten"):
            self.flatten(module, path)
        elif _is(module, "BatchNorm1d"):
            self.normalise(module, path)
        elif _is(module, "Conv1d"):
            self.over_time(path, module, _convolution(module, path))
        elif _is(module, "MaxPool1d", "AvgPool1d"):
            self.over_time(path, module, *_pooling(module, path))
        elif _is(module, "AdaptiveAvgPool1d", "AdaptiveMaxPool1d"):
            if _whole(path, module, "output_size") != 1:
                raise _refuse(path, module, f"expected output_size=1, got {module.output_size}")
            mode = "mean" if _is(module, "AdaptiveAvgPool1d") else "max"
            self.over_time(path, module, GlobalPool(mode), Reshape((1, -1)))
        elif _is(module, "Softmax", "LogSoftmax"):
            self.softmax(module, path)
        elif _is(module, *GATED):
            x = self.wire
            self.add(*map(Activation, next(texts for kind, texts in GATED.items() if _is(module, kind))))
            self.add(Merge("mul"), others=(x,))
        elif _is(module, "MLSTM", package="cellstack.layers"):
            self.has_batch_first(path, module)
            self.add(*_mlstm(module, path))
        elif not _is(module, *NOTHING):
            node = _simple(module, path) or _layer(module, path)
            if isinstance(node, (Recurrent, Bidirectional)):  # one of ours
                self.has_batch_first(path, module)
            self.add(node if node is not None else _activation(module, path))

    def xlstm(self, module: Any, path: str) -> None:
        """Add a model, or a part of one, of the package xlstm."""
        if isinstance(module, Saved):
            raise _refuse(path, module, "expected its state dict, or the module in memory")
        for name, part in module.named_modules():
            if _hooked(part):
                raise _refuse(f"{path}.{name}".strip("."), part, "forward hooks aren't supported")
        state = {name: _array(path, module, value.detach().cpu()) for name, value in module.state_dict().items()}
        self.has_batch_first(path, module)
        self.named = self.named or not path
        with _refusing(path, module):
            kind = xlstm.kind_of(type(module))
            self.wire = xlstm.add_model(self.builder, self.wire, kind, module.config, state, path or kind)

    def ncps(self, module: Any, path: str) -> None:
        """Add a CfC of the package ncps."""
        if isinstance(module, Saved):
            raise _refuse(path, module, "expected the module in memory")
        weights = {name: _array(path, module, value) for name, value in _weights(path, module).items()}
        with _refusing(path, module):
            self.add(*ncps.nodes_of(module, weights))
        if module.batch_first:
            self.has_batch_first(path, module)
        else:
            self.time_first = self.time_first or (path, _called(module))

    def flatten(self, module: Any, path: str) -> None:
        """Add a Flatten."""
        if module.start_dim != 1 or module.end_dim not in (-1, self.rank and self.rank - 1):
            found = f"{module.start_dim} to {module.end_dim}"
            raise _refuse(path, module, f"expected start_dim=1 and end_dim=-1, got {found}")
        self.has_batch_first(path, module)
        self.add(Flatten())

    def normalise(self, module: Any, path: str) -> None:
        """Add a batch normalisation with its running statistics, as one scale and shift."""
        if module.running_mean is None:
            raise _refuse(path, module, "expected running statistics: without them the output depends on the batch")
        mean, variance = (_weight(path, module, name) for name in ("running_mean", "running_var"))
        if mean is None or variance is None:
            raise _refuse(path, module, "expected running statistics, found one of the two")
        gain, bias = (_weight(path, module, name) for name in ("weight", "bias"))
        with _refusing(path, module):
            node = Scale.of_statistics(mean, variance, module.eps, gain, bias)
        if self.rank is None:
            raise _refuse(path, module, "its input may be [B, C] or [B, C, T]: put a module before it that fixes which")
        if self.rank == 2:
            self.add(node)
        else:
            self.over_time(path, module, node)

    def softmax(self, module: Any, path: str) -> None:
        """Add a softmax, or its logarithm, over the features, or over the channels of [B, C, T]."""
        node = Activation("softmax" if _is(module, "Softmax") else "log_softmax")
        if module.dim == -1 or module.dim == (self.rank and self.rank - 1):
            self.add(node)
        elif module.dim in (1, -2) and self.rank == 3:
            self.over_time(path, module, node)
        else:
            raise _refuse(path, module, f"expected dim=-1, the feature axis, got {module.dim}")


def _simple(module: Any, path: str) -> Node | None:
    """Return the node of a Linear, Embedding or LayerNorm; None for other modules."""
    if _is(module, "Linear"):
        return Dense(_kernel(path, module).T, _weight(path, module, "bias"))
    if _is(module, "Embedding"):
        if module.max_norm is not None:
            raise _refuse(path, module, f"expected max_norm=None, got {module.max_norm}: it changes rows when called")
        return Embedding(_kernel(path, module))
    if _is(module, "LayerNorm"):
        if len(module.normalized_shape) != 1:
            raise _refuse(path, module, f"expected one axis, the features, got {tuple(module.normalized_shape)}")
        return LayerNorm(_weight(path, module, "weight"), _weight(path, module, "bias"), module.eps)
    return None


def _kernel(path: str, module: Any) -> Array:
    """Return the weight of a module; raise an error if it has none."""
    found = _weight(path, module, "weight")
    if found is None:
        raise _refuse(path, module, "expected a weight, got none")
    return found


def _hooked(module: Any) -> bool:
    """Return whether a module has hooks other than those that compute a weight."""
    if isinstance(module, Saved):
        return module.hooked
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(COMPUTING.fullmatch(f"{type(hook).__module__}.{type(hook).__name__}") for hook in hooks)


def _convolution(module: Any, path: str) -> Conv1D:
    if module.padding_mode != "zeros":
        raise _refuse(path, module, f"expected padding_mode='zeros', got {module.padding_mode!r}")
    padding: str | tuple[int, int] = module.padding
    if not isinstance(padding, str):
        padding = (_whole(path, module, "padding"), _whole(path, module, "padding"))
    bias = _weight(path, module, "bias")
    strides, dilation = _whole(path, module, "stride"), _whole(path, module, "dilation")
    kernel = _kernel(path, module).transpose(2, 1, 0)
    return Conv1D(kernel, bias, strides, padding, dilation, module.groups)


def _pooling(module: Any, path: str) -> list[Node]:
    usual = {"dilation": 1, "ceil_mode": False, "return_indices": False}
    for name, value in usual.items():
        if hasattr(module, name) and getattr(module, name) not in (value, (value,)):
            raise _refuse(path, module, f"expected {name}={value}, got {getattr(module, name)}")
    mode = "max" if _is(module, "MaxPool1d") else "mean"
    size, strides, around = (_whole(path, module, name) for name in ("kernel_size", "stride", "padding"))
    if around and mode == "mean" and module.count_include_pad:
        return [Pad(around, around), Pool1D(mode, size, strides)]
    return [Pool1D(mode, size, strides, (around, around))]


def _activation(module: Any, path: str) -> Node:
    for kind, name in ACTIVATIONS.items():
        if _is(module, kind):
            return Activation(name)
    if _is(module, "ELU") and module.alpha >= 0.0:
        return Activation(f"elu({module.alpha})")
    if _is(module, "LeakyReLU") and module.negative_slope >= 0.0:
        return Activation(f"leaky_relu({module.negative_slope})")
    if _is(module, "Softplus") and module.beta == 1.0 and module.threshold == 20.0:
        return Activation("softplus")
    if _is(module, "GELU"):
        return Activation("gelu" if module.approximate == "none" else "gelu_tanh")
    if _is(module, "Hardtanh", "ReLU6"):
        with _refusing(path, module):
            return Clip(float(module.min_val), float(module.max_val))
    raise _refuse(path, module, KNOWN)


def _torch_layers(module: Any, path: str) -> list[Node]:
    """Return torch's LSTM, GRU or RNN as one stack, or if bidirectional as one pair of cells per layer."""
    kind = next(kind for name, kind in (MODULES | CELLS).items() if _is(module, name))
    activation = None if kind.gated else {"": module.nonlinearity}
    weights = {name: weight for name, weight in _weights(path, module).items() if NAME.fullmatch(name)}
    for weight in weights.values():
        if not isinstance(module, Saved) and str(weight.dtype).removeprefix("torch.") not in DTYPES:
            raise _refuse(path, module, f"expected weights in {' or '.join(DTYPES)}, got {weight.dtype}")
    with _refusing(path, module):
        found = networks_of(weights, path or "the module", activation)
    nodes = [node for network in found.values() for node in network.nodes]
    if len(found) != 1 or any(cell.spec.of_kind is not kind for node in nodes for cell in node.cells):
        raise _refuse(path, module, f"expected the weights of one {kind.names['torch'].name}, got others")
    return nodes


# ── cellstack's layers, which this package never imports ────────────────────────────────────────────────────────────


def _mlstm(module: Any, path: str) -> list[Node]:
    """Return the nodes of an `MLSTM` layer: its projection, its memory with the output gate, the last step."""
    kernel = _weight(path, module, "kernel")
    if kernel is None:
        raise _refuse(path, module, "expected weights: give input_size, or call it first")
    nodes: list[Node] = [Dense(kernel, _weight(path, module, "bias")), MLSTM(*module.sizes, output_gate=True)]
    return nodes if module.return_sequences else [*nodes, GlobalPool("last")]


def _layer(module: Any, path: str) -> Node | None:
    """Return the node of one of cellstack's layers; None for other modules."""
    ours = "cellstack.layers"
    if _is(module, "Bidirectional", package=ours):
        if module.merge_mode is None:
            raise _refuse(path, module, "expected a merge_mode: a Network has one output")
        parts = []
        for name in ("forward_layer", "backward_layer"):
            node = _layer(_child(path, module, name), f"{path}.{name}" if path else name)
            if not isinstance(node, Recurrent):
                raise _refuse(path, module, f"expected {name} to be an RNN or a subclass of it")
            parts.append(node)
        with _refusing(path, module):  # such as one whose forward layer runs backwards
            return Bidirectional(parts[0], parts[1], module.merge_mode)
    if _is(module, "TimeDistributed", package=ours):
        inner = Reader()
        inner.read(_child(path, module, "layer"), f"{path}.layer" if path else "layer")
        nodes = [*inner.builder.nodes.values()]
        if len(nodes) == 1 and isinstance(nodes[0], (Activation, Clip, Dense)):
            return nodes[0]
        raise _refuse(path, module, "expected a TimeDistributed over one Linear or one activation")
    if _is(module, *OUR_CELLS, package=ours) and not path:  # a cell by itself is applied over time
        return Recurrent((_layer_cell(module, path, module),))
    if not _is(module, *OUR_RNNS, package=ours):
        return None
    cell = _child(path, module, "cell")
    stack = _is(cell, "StackedRNNCells", package=ours)
    cells = list(_child(path, cell, "cells")._modules.values()) if stack else [cell]
    for one in cells:
        if not _is(one, *OUR_CELLS, package=ours):
            raise _refuse(path, module, f"expected cells of cellstack.layers, got a {_called(one)}")
    names = ("return_sequences", "go_backwards", "zero_output_for_mask")
    flags = {name: bool(getattr(module, name)) for name in names} | {"residual": stack and bool(cell.residual)}
    return Recurrent(tuple(_layer_cell(one, path, module) for one in cells), **flags)


def _child(path: str, module: Any, name: str) -> Any:
    """Return the child of a module with that name."""
    found = module._modules.get(name)
    if found is None:
        raise _refuse(path, module, f"expected a child module {name}, found none")
    return found


def _layer_cell(cell: Any, path: str, module: Any) -> Cell:
    with _refusing(path, module):  # it may not be built yet, or have an activation that only torch can run
        spec = cell.spec
    arrays = {name: _weight(path, cell, name) for name in spec.shapes}
    for name, weight in arrays.items():
        if weight is None:
            raise _refuse(path, module, f"expected the weight {name}, found none")
    with _refusing(path, module):  # a file may hold weights of any shape
        return Cell(spec, *arrays.values())
