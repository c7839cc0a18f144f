"""Single modules of torch as nodes."""

from __future__ import annotations

from typing import Any

from cellstack.cells.spec import DTYPES
from cellstack.formats.pytorch.access import is_a, kernel_of, refuse, refusing, weight_of, weights_of, whole
from cellstack.formats.pytorch.names import MODULES, NAME, networks_of
from cellstack.formats.pytorch.saved import Saved
from cellstack.nodes import Activation, Clip, Conv1D, Dense, Embedding, LayerNorm, Node, Pad, Pool1D

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
KNOWN = (
    "expected a recurrent layer, a Linear, Embedding, Conv1d, BatchNorm1d, LayerNorm, pooling, Flatten, a supported "
    "activation or a Sequential of these; a custom module has to return its nodes from a method to_nodes(): [] if it "
    "only takes the output from (output, state), as recurrent layers return only their output here"
)


def simple(module: Any, path: str) -> Node | None:
    """Return the node of a Linear, Embedding or LayerNorm; None for other modules."""
    if is_a(module, "Linear"):
        return Dense(kernel_of(path, module).T, weight_of(path, module, "bias"))
    if is_a(module, "Embedding"):
        if module.max_norm is not None:
            raise refuse(path, module, f"expected max_norm=None, got {module.max_norm}: it changes rows when called")
        return Embedding(kernel_of(path, module))
    if is_a(module, "LayerNorm"):
        if len(module.normalized_shape) != 1:
            raise refuse(path, module, f"expected one axis, the features, got {tuple(module.normalized_shape)}")
        return LayerNorm(weight_of(path, module, "weight"), weight_of(path, module, "bias"), module.eps)
    return None


def convolution(module: Any, path: str) -> Conv1D:
    """Return the node of a Conv1d, whose axes are turned by the caller."""
    if module.padding_mode != "zeros":
        raise refuse(path, module, f"expected padding_mode='zeros', got {module.padding_mode!r}")
    padding: str | tuple[int, int] = module.padding
    if not isinstance(padding, str):
        padding = (whole(path, module, "padding"), whole(path, module, "padding"))
    bias = weight_of(path, module, "bias")
    strides, dilation = whole(path, module, "stride"), whole(path, module, "dilation")
    kernel = kernel_of(path, module).transpose(2, 1, 0)
    return Conv1D(kernel, bias, strides, padding, dilation, module.groups)


def pooling(module: Any, path: str) -> list[Node]:
    """Return the nodes of a MaxPool1d or AvgPool1d."""
    usual = {"dilation": 1, "ceil_mode": False, "return_indices": False}
    for name, value in usual.items():
        if hasattr(module, name) and getattr(module, name) not in (value, (value,)):
            raise refuse(path, module, f"expected {name}={value}, got {getattr(module, name)}")
    mode = "max" if is_a(module, "MaxPool1d") else "mean"
    size, strides, around = (whole(path, module, name) for name in ("kernel_size", "stride", "padding"))
    if around and mode == "mean" and module.count_include_pad:
        return [Pad(around, around), Pool1D(mode, size, strides)]
    return [Pool1D(mode, size, strides, (around, around))]


def activation_of(module: Any, path: str) -> Node:
    """Return the node of an activation; raise an error for any other module, the last of the kinds to be tried."""
    for kind, name in ACTIVATIONS.items():
        if is_a(module, kind):
            return Activation(name)
    if is_a(module, "ELU") and module.alpha >= 0.0:
        return Activation(f"elu({module.alpha})")
    if is_a(module, "LeakyReLU") and module.negative_slope >= 0.0:
        return Activation(f"leaky_relu({module.negative_slope})")
    if is_a(module, "Softplus") and module.beta == 1.0 and module.threshold == 20.0:
        return Activation("softplus")
    if is_a(module, "GELU"):
        return Activation("gelu" if module.approximate == "none" else "gelu_tanh")
    if is_a(module, "Hardtanh", "ReLU6"):
        with refusing(path, module):
            return Clip(float(module.min_val), float(module.max_val))
    raise refuse(path, module, KNOWN)


def torch_layers(module: Any, path: str) -> list[Node]:
    """Return torch's LSTM, GRU or RNN as one stack, or if bidirectional as one pair of cells per layer."""
    kind = next(kind for name, kind in (MODULES | CELLS).items() if is_a(module, name))
    activation = None if kind.gated else {"": module.nonlinearity}
    weights = {name: weight for name, weight in weights_of(path, module).items() if NAME.fullmatch(name)}
    for weight in weights.values():
        if not isinstance(module, Saved) and str(weight.dtype).removeprefix("torch.") not in DTYPES:
            raise refuse(path, module, f"expected weights in {' or '.join(DTYPES)}, got {weight.dtype}")
    with refusing(path, module):
        found = networks_of(weights, path or "the module", activation)
    nodes = [node for network in found.values() for node in network.nodes]
    if len(found) != 1 or any(cell.spec.of_kind is not kind for node in nodes for cell in node.cells):
        raise refuse(path, module, f"expected the weights of one {kind.names['torch'].name}, got others")
    return nodes
