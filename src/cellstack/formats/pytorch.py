"""From torch modules to a Network. Torch is never imported here: who holds a module has imported it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from cellstack.formats.layout import Array, from_rows
from cellstack.network import Network
from cellstack.nodes import Activation, Dense, Node
from cellstack.recurrent import Bidirectional, Cell, Recurrent
from cellstack.spec import DTYPES, CellSpec

KINDS = {"LSTM": ("lstm", "ifgo"), "GRU": ("gru", "rzg"), "RNN": ("rnn", "g")}  # torch's layers, and their gate orders
ACTIVATIONS = {
    "ReLU": "relu",
    "Sigmoid": "sigmoid",
    "Softsign": "softsign",
    "Tanh": "tanh",
    "Hardsigmoid": "hard_sigmoid",
}


def from_torch(module: Any) -> Network:
    """Return a torch module as a Network, with copies of its weights.

    Taken are our layers (`LSTM`, `GRU`, `SimpleRNN`, `RNN` over any of our cells, `Bidirectional`, `TimeDistributed`),
    `torch.nn.LSTM`, `GRU` and `RNN` of any depth and direction, `Linear`, activations, `Sequential` of them, and any
    object with `to_nodes() -> list of nodes`. The Network takes `[B, T, I]` whatever `batch_first` says, and is the
    module in evaluation: dropout is left out, and zoneout's rates act as constants.

    Args:
        module: the module; its weights may lie on any device, in float32 or float64.

    Returns:
        The network; `run` gives what torch's layers return beside their output, one state a layer and direction.

    Raises:
        TypeError: a module or a setting that a Network can't hold; the message names it by its path.
        ShapeError: modules that don't meet in width or rank.
    """
    nodes = list(_nodes(module, ""))
    if not nodes:
        raise TypeError(f"from_torch: expected a module that computes something, got {type(module).__name__}")
    return Network(nodes)


def _refuse(path: str, module: Any, why: str) -> TypeError:
    return TypeError(f"from_torch: {path or 'the module'} ({type(module).__name__}): {why}")


def _is(module: Any, *names: str, package: str = "torch.nn") -> bool:
    """Whether `module` is of one of these classes, with the class's own forward pass."""
    classes = [getattr(sys.modules.get(package), name, None) for name in names]
    return any(
        isinstance(module, kind) and type(module).forward is kind.forward for kind in classes if kind is not None
    )


def _array(path: str, module: Any, tensor: Any) -> Array:
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise _refuse(path, module, f"expected weights in {' or '.join(DTYPES)}, got {tensor.dtype}")
    return np.array(tensor.detach().cpu().numpy())


def _nodes(module: Any, path: str) -> Iterator[Node]:
    """Give the nodes of `module`, in order; `path` is its own within the module that was asked for."""
    if callable(getattr(module, "to_nodes", None)):
        yield from module.to_nodes()
        return
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(module, torch.nn.Module):
        raise _refuse(path, module, "expected a torch module")
    if module._forward_hooks or module._forward_pre_hooks:
        raise _refuse(path, module, "expected a module without forward hooks, which a Network can't hold")
    if _is(module, "Sequential"):
        for name, child in module.named_children():
            yield from _nodes(child, f"{path}.{name}" if path else name)
    elif _is(module, *KINDS):
        yield from _torch_layers(module, path)
    elif _is(module, "Linear"):
        bias = None if module.bias is None else _array(path, module, module.bias)
        yield Dense(_array(path, module, module.weight).T, bias)
    elif not _is(module, "Identity", "Dropout"):
        layer = _layer(module, path)
        if layer is None:
            layer = Activation(_activation(module, path))
        yield layer


def _activation(module: Any, path: str) -> str:
    for kind, name in ACTIVATIONS.items():
        if _is(module, kind):
            return name
    if _is(module, "Softmax"):
        if module.dim != -1:
            raise _refuse(path, module, f"expected dim=-1, the feature axis, got {module.dim}")
        return "softmax"
    if _is(module, "ELU") and module.alpha >= 0.0:
        return f"elu({module.alpha})"
    if _is(module, "LeakyReLU") and module.negative_slope >= 0.0:
        return f"leaky_relu({module.negative_slope})"
    if _is(module, "Softplus") and module.beta == 1.0:
        return "softplus"
    raise _refuse(path, module, "expected a recurrent layer, a Linear, an activation of ours or a Sequential of these")


def _torch_layers(module: Any, path: str) -> Iterator[Node]:
    """Give torch's LSTM, GRU or RNN as one stack, or as one pair of cells a layer where it is bidirectional."""
    kind, order = next(KINDS[name] for name in KINDS if _is(module, name))
    activation = module.nonlinearity if kind == "rnn" else "tanh"

    def cell(suffix: str) -> Cell:
        names = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ()))
        weight, recurrent, *biases = (_array(path, module, getattr(module, f"{name}_{suffix}")) for name in names)
        spec = CellSpec(weight.shape[1], module.hidden_size, activation, use_bias=bool(module.bias), kind=kind)
        arrays = from_rows(kind, weight, recurrent, tuple(biases), order)._asdict()
        if module.proj_size:
            spec = replace(spec, proj_size=module.proj_size)
            arrays["projection"] = _array(path, module, getattr(module, f"weight_hr_{suffix}")).T
        return Cell(spec, **arrays)

    layers = range(module.num_layers)
    if not module.bidirectional:
        yield Recurrent(tuple(cell(f"l{n}") for n in layers))
        return
    for n in layers:
        backward = Recurrent((cell(f"l{n}_reverse"),), go_backwards=True)
        yield Bidirectional(Recurrent((cell(f"l{n}"),)), backward)


# ── our own layers, which this package never imports ────────────────────────────────────────────────────────────────


def _layer(module: Any, path: str) -> Node | None:
    """Return the node of one of our layers; None where it isn't one."""
    ours = "cellstack.layers"
    if _is(module, "Bidirectional", package=ours):
        if module.merge_mode is None:
            raise _refuse(path, module, "expected a merge_mode: a Network has one output")
        halves = []
        for name in ("forward_layer", "backward_layer"):
            node = _layer(getattr(module, name), f"{path}.{name}" if path else name)
            if not isinstance(node, Recurrent):
                raise _refuse(path, module, f"expected {name} to be an RNN or one of its kinds")
            halves.append(node)
        try:
            return Bidirectional(halves[0], halves[1], module.merge_mode)
        except ValueError as error:  # such as one whose forward layer runs backwards
            raise _refuse(path, module, str(error)) from None
    if _is(module, "TimeDistributed", package=ours):
        inner = list(_nodes(module.layer, f"{path}.layer" if path else "layer"))
        if len(inner) == 1 and isinstance(inner[0], (Dense, Activation)):
            return inner[0]
        raise _refuse(path, module, "expected a TimeDistributed over one Linear or one activation")
    if not _is(module, "LSTM", "GRU", "SimpleRNN", "RNN", package=ours):
        return None
    for cell in module.cells:
        if not _is(cell, "LSTMCell", "GRUCell", "SimpleRNNCell", package=ours):
            raise _refuse(path, module, f"expected cells of ours, got a {type(cell).__name__}")
    names = ("return_sequences", "go_backwards", "zero_output_for_mask", "residual")
    flags = {name: bool(getattr(module, name)) for name in names}
    return Recurrent(tuple(_layer_cell(cell, path, module) for cell in module.cells), **flags)


def _layer_cell(cell: Any, path: str, module: Any) -> Cell:
    try:
        spec = cell.spec
    except ValueError as error:  # not built yet, or an activation that only torch can run
        raise _refuse(path, module, str(error)) from None
    return Cell(spec, *(_array(path, module, getattr(cell, name)) for name in spec.shapes))
