"""The block stack and the language model of the package xlstm, from their weights.

A block is `x + layer(norm(x))`, where the layer is an sLSTM or an mLSTM with a causal convolution of its input; in some
blocks `x + ffn(norm(x))` follows. Widths, heads and the length of the convolution are those of the weights.

In an sLSTM's layer, the weight `fgate` feeds the input gate, and `igate` the forget gate. The recurrent matrix is
stored as `[heads, 4·D, D]` by xlstm's loop in PyTorch, and as `[heads, D, 4·D]` by its CUDA kernel; the biases of the
two have different orders as well.

Ref: Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", figures 9 and 10; https://github.com/NX-AI/xlstm
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cellstack import nodes
from cellstack.cells.errors import FormatError
from cellstack.cells.layout import Array
from cellstack.cells.spec import CellSpec
from cellstack.formats.xlstm.weights import Graph, Weights, cut, joined, linear

NORM_EPSILON = 1e-5
MEMORY_EPSILON = 1e-6
ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "relu^2": "relu", "sigmoid": "sigmoid", "swish": "silu", "selu": "selu"}
CELLS = ("slstm", "lstm")


class BlockSettings(NamedTuple):
    """What the weights of the model don't tell.

    Attributes:
        function: the kind of the sLSTM layers' cells, `"slstm"` or `"lstm"`.
        act_fn: the activation of the feed-forward layers' gates, a key of `ACTIVATIONS`.
    """

    function: str = "slstm"
    act_fn: str = "gelu"


def _gain(weights: Weights, width: int) -> Array | None:
    """Return the gain of a norm, of which the model stores the difference from one."""
    stored = weights.maybe("weight", width)
    return None if stored is None else stored + stored.dtype.type(1)


def _layer_norm(weights: Weights, width: int) -> nodes.LayerNorm:
    return nodes.LayerNorm(_gain(weights, width), weights.maybe("bias", width), NORM_EPSILON)


def _head_norm(weights: Weights, width: int, heads: int) -> nodes.GroupNorm:
    return nodes.GroupNorm(heads, _gain(weights, width), weights.maybe("bias", width), NORM_EPSILON, over_time=False)


def _headwise(weights: Weights, width: int) -> nodes.GroupedDense:
    kernel = weights.take("weight", "heads", "O/heads", "I/heads")
    if kernel.shape[0] * kernel.shape[2] != width:
        found = f"found {list(kernel.shape)}"
        raise FormatError(f"{weights.where}: {weights.prefix}weight: expected heads·inputs = {width}, {found}")
    return nodes.GroupedDense(kernel.swapaxes(1, 2), weights.maybe("bias", kernel.shape[0] * kernel.shape[1]))


def _convolution(weights: Weights, width: int) -> nodes.Conv1D:
    kernel = weights.take("weight", width, 1, "K")
    bias = weights.maybe("bias", width)
    return nodes.Conv1D(kernel.transpose(2, 1, 0), bias, padding="causal", groups=width, activation="silu")


# ── mLSTM ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def mlstm_layer(graph: Graph, weights: Weights, x: str) -> str:
    """Add an `mLSTMLayer`, and return the wire of its output."""
    up = linear(weights.under("proj_up"))
    inner = up.kernel.shape[1] // 2
    inside = graph.add("proj_up", cut(up, 0, inner), x)
    gate = graph.add("output_gate", cut(up, inner, 2 * inner, "silu"), x)
    convolved = graph.add("conv1d", _convolution(weights.under("conv1d.conv"), inner), inside)
    parts = [
        graph.add(name, _headwise(weights.under(name), inner), wire)
        for name, wire in (("q_proj", convolved), ("k_proj", convolved), ("v_proj", inside))
    ]
    qkv = graph.concat("qkv", *parts)
    cell = weights.under("mlstm_cell")
    both = joined([linear(cell.under(name), 3 * inner) for name in ("igate", "fgate")])
    heads = both.kernel.shape[1] // 2
    gates = graph.add("gates", both, qkv)
    memory = nodes.MLSTM(heads, inner // heads, inner // heads, MEMORY_EPSILON)
    h = graph.add("mlstm", memory, graph.concat("mlstm.input", qkv, gates))
    h = graph.add("outnorm", _head_norm(cell.under("outnorm"), inner, heads), h)
    factor = weights.take("learnable_skip", inner)
    skip = graph.add("learnable_skip", nodes.Scale(factor, np.zeros_like(factor)), convolved)
    h = graph.gated("gated", graph.add("skip", nodes.Merge("add"), h, skip), gate)
    return graph.add("proj_down", linear(weights.under("proj_down"), inner), h)


# ── sLSTM ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def slstm_layer(graph: Graph, weights: Weights, x: str, settings: BlockSettings) -> str:
    """Add an `sLSTMLayer`, and return the wire of its output."""
    function = settings.function
    if function not in CELLS:
        raise FormatError(f"{weights.where}: expected function to be {' or '.join(CELLS)}, found {function!r}")
    heads, size, _ = weights.take("fgate.weight", "heads", "D", "D").shape
    width = heads * size
    convolved = x
    if weights.has("conv1d"):
        convolved = graph.add("conv1d", _convolution(weights.under("conv1d.conv"), width), x)
    sums = [
        graph.add(f"{gate}_sums", _headwise(weights.under(name), width), wire)
        for gate, name, wire in (
            ("i", "fgate", convolved),
            ("f", "igate", convolved),
            ("g", "zgate", x),
            ("o", "ogate", x),
        )
    ]
    spec = CellSpec(4 * width, width, kind=function, heads=heads, use_kernel=False)
    cell = nodes.Cell(spec, *_cell_arrays(weights.under("slstm_cell"), heads, size))
    y = graph.add("slstm", nodes.Recurrent((cell,)), graph.concat("sums", *sums))
    return graph.add("group_norm", _head_norm(weights.under("group_norm"), width, heads), y)


def _cell_arrays(weights: Weights, heads: int, size: int) -> tuple[Array, Array]:
    """Return the recurrent matrix, `[heads, D, 4·D]` or of one head `[D, 4·D]`, and the bias `[4·heads·D]`."""
    recurrent = weights.take("_recurrent_kernel_", heads, "D", "D'")
    bias = weights.take("_bias_", 4 * heads * size)
    if recurrent.shape == (heads, 4 * size, size):  # the plain loop
        recurrent = recurrent.swapaxes(1, 2)
    elif recurrent.shape != (heads, size, 4 * size):
        wanted = f"[{heads}, {4 * size}, {size}] or [{heads}, {size}, {4 * size}]"
        found = f"found {list(recurrent.shape)}"
        raise FormatError(f"{weights.where}: {weights.prefix}_recurrent_kernel_: expected {wanted}, {found}")
    else:
        bias = bias.reshape(heads, 4, size).swapaxes(0, 1).reshape(-1)
    return recurrent[0] if heads == 1 else recurrent, bias


# ── blocks ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def feed_forward(graph: Graph, weights: Weights, x: str, settings: BlockSettings) -> str:
    """Add a `GatedFeedForward`, and return the wire of its output."""
    name = settings.act_fn
    if name not in ACTIVATIONS:
        raise FormatError(f"{weights.where}: expected act_fn to be one of {', '.join(ACTIVATIONS)}, found {name!r}")
    up = linear(weights.under("proj_up"))
    inner = up.kernel.shape[1] // 2
    gate = graph.add("gate", cut(up, 0, inner, ACTIVATIONS[name]), x)
    if name == "relu^2":
        gate = graph.add("square", nodes.Power(2.0), gate)
    y = graph.gated("gated", gate, graph.add("proj_up", cut(up, inner, 2 * inner), x))
    return graph.add("proj_down", linear(weights.under("proj_down"), inner), y)


def block(graph: Graph, weights: Weights, x: str, settings: BlockSettings) -> str:
    """Add an `mLSTMBlock` or an `sLSTMBlock`, and return the wire of its output."""

    def layer(wire: str) -> str:
        width = weights.take("xlstm_norm.weight", "D").shape[0]
        wire = graph.add("xlstm_norm", _layer_norm(weights.under("xlstm_norm"), width), wire)
        inner, own = graph.under("xlstm"), weights.under("xlstm")
        return mlstm_layer(inner, own, wire) if own.has("mlstm_cell") else slstm_layer(inner, own, wire, settings)

    def ffn(wire: str) -> str:
        width = weights.take("ffn_norm.weight", "D").shape[0]
        wire = graph.add("ffn_norm", _layer_norm(weights.under("ffn_norm"), width), wire)
        return feed_forward(graph.under("ffn"), weights.under("ffn"), wire, settings)

    y = graph.residual("xlstm_residual", x, layer)
    return graph.residual("ffn_residual", y, ffn) if weights.has("ffn") else y


def block_stack(graph: Graph, weights: Weights, x: str, settings: BlockSettings) -> str:
    """Add an `xLSTMBlockStack`, and return the wire of its output."""
    count = weights.count("blocks")
    if not count:
        raise FormatError(f"{weights.where}: expected weights of blocks, {weights.prefix}blocks.0…, found none")
    for number in range(count):
        name = f"blocks.{number}"
        x = block(graph.under(name), weights.under(name), x, settings)
    if not weights.has("post_blocks_norm"):
        return x
    width = weights.take("post_blocks_norm.weight", "D").shape[0]
    return graph.add("post_blocks_norm", _layer_norm(weights.under("post_blocks_norm"), width), x)


def language_model(graph: Graph, weights: Weights, ids: str, settings: BlockSettings) -> str:
    """Add an `xLSTMLMModel`, which takes ids, and return the wire of the logits."""
    table = weights.take("token_embedding.weight", "V", "D")
    x = graph.add("token_embedding", nodes.Embedding(table), ids)
    y = block_stack(graph, weights.under("xlstm_block_stack"), x, settings)
    return graph.add("lm_head", nodes.Dense(weights.take("lm_head.weight", *table.shape).T), y)
