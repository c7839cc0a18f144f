"""The model xLSTMLarge of the package xlstm, which xLSTM-7B is, from its weights.

A block is `x + mlstm(norm(x))`, then `x + ffn(norm(x))`, with root mean square norms. The gates of the mLSTM and the
logits are limited by `cap·tanh(z / cap)`.

Ref: Beck et al. 2025, "xLSTM 7B: A Recurrent LLM for Fast and Efficient Inference", section 3.
"""

from __future__ import annotations

from typing import NamedTuple

from cellstack.formats.xlstm.weights import Graph, Weights, cut, joined, linear
from cellstack.nodes import MLSTM, Dense, Embedding, GroupNorm, RMSNorm


class LargeSettings(NamedTuple):
    """What the weights of the model don't tell.

    Attributes:
        norm_eps: epsilon of the norms.
        eps: epsilon of the mLSTM's normaliser.
        gate_soft_cap: bound of the gates before their activations; None: none.
        output_logit_soft_cap: bound of the logits; None: none.
    """

    norm_eps: float = 1e-6
    eps: float = 1e-6
    gate_soft_cap: float | None = 15.0
    output_logit_soft_cap: float | None = 30.0


def _capped(cap: float | None) -> str:
    return "linear" if cap is None else f"scaled_tanh({float(cap)!r}, {1.0 / cap!r})"


def _rms_norm(weights: Weights, epsilon: float) -> RMSNorm:
    gain = weights.take("weight", "D")
    return RMSNorm(gain, weights.maybe("bias", len(gain)), epsilon)


def mlstm_layer(graph: Graph, weights: Weights, x: str, settings: LargeSettings) -> str:
    """Add an `mLSTMLayer`, and return the wire of its output."""
    down = linear(weights.under("out_proj"))
    values = down.kernel.shape[0]
    if weights.has("qkv_opreact"):
        fused, gates = (linear(weights.under(name)) for name in ("qkv_opreact", "ifgate_preact"))
        total = fused.kernel.shape[1] - values
        qkv, output = cut(fused, 0, total), cut(fused, total, total + values, "sigmoid")
    else:
        qkv = joined([linear(weights.under(name)) for name in "qkv"])
        gates = joined([linear(weights.under(f"{name}gate_preact")) for name in "if"])
        total, output = qkv.kernel.shape[1], linear(weights.under("ogate_preact"), activation="sigmoid")
    heads, keys = gates.kernel.shape[1] // 2, (total - values) // 2
    parts = graph.add("qkv", qkv, x)
    gates = graph.add("gates", Dense(gates.kernel, gates.bias, _capped(settings.gate_soft_cap)), x)
    memory = MLSTM(heads, keys // heads, values // heads, settings.eps)
    h = graph.add("mlstm", memory, graph.concat("mlstm.input", parts, gates))
    norm = weights.under("multihead_norm")
    gain, bias = norm.take("weight", values), norm.maybe("bias", values)
    h = graph.add("multihead_norm", GroupNorm(heads, gain, bias, settings.norm_eps, over_time=False), h)
    return graph.add("out_proj", down, graph.gated("gated", graph.add("ogate", output, x), h))


def feed_forward(graph: Graph, weights: Weights, x: str) -> str:
    """Add a `FeedForward`, and return the wire of its output."""
    down = linear(weights.under("proj_down"))
    inner = down.kernel.shape[0]
    if weights.has("proj_up_gate_z"):
        fused = linear(weights.under("proj_up_gate_z"), outputs=2 * inner)
        gate, up = cut(fused, 0, inner, "silu"), cut(fused, inner, 2 * inner)
    else:
        gate, up = (
            linear(weights.under(name), outputs=inner, activation=activation)
            for name, activation in (("proj_up_gate", "silu"), ("proj_up", "linear"))
        )
    y = graph.gated("gated", graph.add("proj_up_gate", gate, x), graph.add("proj_up", up, x))
    return graph.add("proj_down", down, y)


def block_stack(graph: Graph, weights: Weights, x: str, settings: LargeSettings) -> str:
    """Add an `xLSTMLargeBlockStack`, and return the wire of its output."""
    for number in range(weights.count("blocks")):
        own, name = weights.under(f"blocks.{number}"), f"blocks.{number}"
        part = graph.under(name)

        def mlstm(wire: str, part: Graph = part, own: Weights = own) -> str:
            wire = part.add("norm_mlstm", _rms_norm(own.under("norm_mlstm"), settings.norm_eps), wire)
            return mlstm_layer(part.under("mlstm_layer"), own.under("mlstm_layer"), wire, settings)

        def ffn(wire: str, part: Graph = part, own: Weights = own) -> str:
            wire = part.add("norm_ffn", _rms_norm(own.under("norm_ffn"), settings.norm_eps), wire)
            return feed_forward(part.under("ffn"), own.under("ffn"), wire)

        x = part.residual("ffn_residual", part.residual("mlstm_residual", x, mlstm), ffn)
    if not weights.has("out_norm"):
        return x
    return graph.add("out_norm", _rms_norm(weights.under("out_norm"), settings.norm_eps), x)


def language_model(graph: Graph, weights: Weights, ids: str, settings: LargeSettings) -> str:
    """Add an `xLSTMLarge`, which takes ids, and return the wire of the logits.

    The name of its table of embeddings is `embedding` in the package xlstm, `backbone.embeddings` in Transformers.
    """
    name = "embedding" if weights.has("embedding") else "backbone.embeddings"
    table = weights.take(f"{name}.weight", "V", "D")
    x = graph.add("embedding", Embedding(table), ids)
    y = block_stack(graph, weights.under("backbone"), x, settings)
    kernel = weights.take("lm_head.weight", "V", table.shape[1]).T
    return graph.add("lm_head", Dense(kernel, None, _capped(settings.output_logit_soft_cap)), y)
