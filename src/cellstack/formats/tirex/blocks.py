"""The networks of TiRex and TiRex-2 from their designs and the weights of their state dicts.

A block is `x + layer(norm(x))`, where the layer is an sLSTM or an mLSTM with a norm of each head, then
`x + ffn(norm(x))`. The mLSTM and the feed-forward layer are those of xlstm's `xLSTMLarge`. In a TiRex-2, what series
that are forecast together need is `Skipped`: after the cell, the layer that joins both directions of a covariate whose
future is known; after the block, what mixes the series.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from cellstack.cells.errors import FormatError
from cellstack.cells.spec import CellSpec
from cellstack.formats.build import Builder
from cellstack.formats.tirex.design import SLSTM, Design
from cellstack.formats.xlstm import large
from cellstack.formats.xlstm.weights import Graph, Weights, linear
from cellstack.network import Network
from cellstack.nodes import Attention, Cell, GroupedDense, GroupNorm, Merge, Node, Recurrent, Reshape, RMSNorm, Skipped

EPSILON = 1e-6  # of the norms; of TiRex's norm of each head 1e-5

QUERY_EPSILON = float(np.finfo(np.float32).eps)  # of the norms of queries and keys

# Names in a state dict of TiRex-2 that stand for the weight of another name: both directions share a cell.
SHARED = (
    (re.compile(r"\.rev_cell\."), ".fwd_cell."),
    (re.compile(r"\.fwd_cell\.(recurrent_kernel|bias)$"), r".fwd_cell._\1_"),
)


def network(where: str, design: Design, tensors: Mapping[str, Any]) -> Network:
    """Return the network of a model.

    Raises:
        FormatError: a tensor is missing, has another shape, or isn't part of the model.
    """
    weights = Weights(_named(where, design, tensors), where)
    builder = Builder()
    graph, width = Graph(builder), design.width
    x = builder.input("x", (None, 2 * design.patch))
    x = _hidden_layer(graph, weights, "input_patch_embedding", x, (2 * design.patch, design.hidden[0], width), design)
    for number in range(len(design.blocks)):
        x = _block(graph, weights, x, design, number)
        if design.version == 2:
            name = f"stack.{number}.variate_mixer"
            x = graph.add(name, _mixer(weights.under(name), design, design.mixer_heads[number]), x)
    if design.out_epsilon is not None:
        name = "out_norm" if design.version == 1 else "stack_out_norm"
        x = graph.add(name, RMSNorm(weights.take(f"{name}.weight", width), epsilon=design.out_epsilon), x)
    widths = (width, design.hidden[1], design.outputs)
    builder.output(_hidden_layer(graph, weights, "output_patch_embedding", x, widths, design))
    weights.finish()
    return builder.network({"source": {"format": "tirex"}, "tirex": design.forecaster})


def _named(where: str, design: Design, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights by the names that are used here, each once."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        own = name.replace("block_stack.", "") if design.version == 1 else name
        for pattern, other in SHARED if design.version == 2 else ():
            own = pattern.sub(other, own)
        first = found.setdefault(own, tensor)
        if first is not tensor and not np.array_equal(np.asarray(first), np.asarray(tensor)):
            raise FormatError(f"{where}: expected {name} to equal {own}, which is the same weight")
    return found


def _hidden_layer(
    graph: Graph, weights: Weights, name: str, x: str, widths: tuple[int, int, int], design: Design
) -> str:
    """Add a hidden layer and a linear layer past it; `widths` are those of the input, of the hidden layer, of both."""
    inputs, inner, outputs = widths
    own = weights.under(name)
    inside = graph.add(f"{name}.hidden", linear(own.under("hidden_layer"), inputs, inner, design.activation), x)
    over = graph.add(f"{name}.output", linear(own.under("output_layer"), inner, outputs), inside)
    past = graph.add(f"{name}.residual", linear(own.under("residual_layer"), inputs, outputs), x)
    return graph.add(name, Merge("add"), over, past)


def _block(graph: Graph, weights: Weights, x: str, design: Design, number: int) -> str:
    """Add a block."""
    first, width = design.version == 1, design.width
    name = f"blocks.{number}" if first else f"stack.{number}.time_mixer"
    part, own = graph.under(name), weights.under(name)

    def layer(wire: str) -> str:
        norm = "norm_slstm" if first else "norm_lstm"
        wire = part.add(norm, RMSNorm(own.take(f"{norm}.weight", width), epsilon=EPSILON), wire)
        inner = "slstm_layer" if first else "fwd_cell"
        made = _slstm if design.blocks[number] == SLSTM else _mlstm
        wire = made(part.under(inner), own.under(inner), wire, design, design.heads[number])
        if first:
            return wire
        both = linear(own.under("combination"), 2 * width, width)
        return part.add("combination", Skipped((2 * width,), (both,), ((0,),)), wire)

    def ffn(wire: str) -> str:
        wire = part.add("norm_ffn", RMSNorm(own.take("norm_ffn.weight", width), epsilon=EPSILON), wire)
        own.take("ffn.proj_up.weight", design.forward, width)  # only to check its shape
        return large.feed_forward(part.under("ffn"), own.under("ffn"), wire)

    return part.residual("ffn_added", part.residual("added", x, layer), ffn)


def _mixer(weights: Weights, design: Design, heads: int) -> Skipped:
    """Return what mixes variates `[V, W]` at a step: attention, then a hidden layer, each added to its input."""
    width, attention, ffn = design.width, weights.under("attn"), weights.under("ffn")
    nodes: list[Node] = []
    takes: list[tuple[int, ...]] = []

    def add(node: Node, *sources: int) -> int:
        nodes.append(node)
        takes.append(sources)
        return len(nodes)

    def projected(letter: str, normed: bool, x: int) -> int:
        x = add(linear(attention.under(f"W{letter}"), width, width), x)
        if not normed:
            return x
        apart = add(Reshape((-1, width // heads)), x)
        return add(Reshape((-1, width)), add(RMSNorm(epsilon=QUERY_EPSILON), apart))

    x = add(RMSNorm(weights.take("norm_attn.weight", width), epsilon=EPSILON), 0)
    parts = [projected(letter, design.query_norm and letter != "V", x) for letter in "QKV"]
    output = linear(attention.under("WO"), width, width)
    added = add(Merge("add"), 0, add(output, add(Attention(heads), *parts)))
    inside = add(RMSNorm(weights.take("norm_ffn.weight", width), epsilon=EPSILON), added)
    inside = add(linear(ffn.under("wi"), width, 4 * width, design.activation), inside)
    add(Merge("add"), added, add(linear(ffn.under("wo"), 4 * width, width), inside))
    return Skipped((None, width), tuple(nodes), tuple(takes))


def _mlstm(graph: Graph, weights: Weights, x: str, design: Design, heads: int) -> str:
    weights.take("igate_preact.weight", heads, design.width)  # only to check the number of heads
    return large.mlstm_layer(graph, weights, x, large.LargeSettings())


def _slstm(graph: Graph, weights: Weights, x: str, design: Design, heads: int) -> str:
    """Add an sLSTM in which each head sees its own features only, and the norm of each head.

    The weights named `fgate` belong to the input gate and those named `igate` to the forget gate: the models join the
    four in the order f i z o, and compute with them in the order i f z o.
    """
    width, size, first = design.width, design.width // heads, design.version == 1
    sums = []
    for gate in ("fgate", "igate", "zgate", "ogate"):
        kernel = weights.take(f"{gate}.weight", heads, size, size)  # [heads, outputs, inputs]
        sums.append(graph.add(gate, GroupedDense(kernel.swapaxes(1, 2)), x))
    cell = weights.under("slstm_cell") if first else weights
    recurrent = cell.take("_recurrent_kernel_", *((heads, size, 4 * size) if first else (heads, size, 4, size)))
    bias = cell.take("_bias_", *((4 * width,) if first else (heads, 4, size)))
    spec = CellSpec(4 * width, width, kind="slstm", heads=heads, use_kernel=False)
    arrays = recurrent.reshape(spec.shapes["recurrent_kernel"]), bias.reshape(heads, 4, size).swapaxes(0, 1).reshape(-1)
    y = graph.add("slstm", Recurrent((Cell(spec, *arrays),)), graph.concat("gates", *sums))
    gain = weights.take("group_norm.weight", width)
    if first:  # the difference from one is stored
        gain = gain + gain.dtype.type(1)
    return graph.add("group_norm", GroupNorm(heads, gain, epsilon=1e-5 if first else EPSILON, over_time=False), y)
