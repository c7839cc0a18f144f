"""Models of the package xlstm: modules in memory, state dicts, and checkpoints with a configuration.

A model is built from its weights by name (`blocks.py`, `large.py`); all of them have to be used. `model_of` reads a
module in memory, whose configuration says what the weights don't; `network_of` reads weights from a file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from cellstack.formats.build import Builder
from cellstack.formats.xlstm import blocks, large
from cellstack.formats.xlstm.weights import Graph, Weights
from cellstack.network import Network

__all__ = ["PACKAGES", "add_model", "is_large", "kind_of", "network_of", "recognises"]

PACKAGES = {
    "xlstm": (
        "xLSTMLMModel",
        "xLSTMBlockStack",
        "mLSTMBlock",
        "sLSTMBlock",
        "mLSTMLayer",
        "sLSTMLayer",
        "GatedFeedForward",
    ),
    "xlstm.xlstm_large.model": ("xLSTMLarge", "xLSTMLargeBlockStack"),
}
"""The classes that `add_model` reads, by the module from which they are imported."""

FEED_FORWARD_ASSUMED = "the gates of feed-forward layers use gelu"
CELL_ASSUMED = 'the cells of sLSTM layers are sLSTMs, function="slstm"'
LARGE_ASSUMED = "epsilons of 1e-6, gates capped at 15 and logits at 30"


def recognises(names: Collection[str]) -> bool:
    """Return whether weights have the names of a language model or a block stack of xlstm."""
    return any(name.endswith(("xlstm_norm.weight", "norm_mlstm.weight")) for name in names)


def is_large(names: Collection[str]) -> bool:
    """Return whether weights that `recognises` are those of an xLSTMLarge."""
    return any(name.endswith("norm_mlstm.weight") for name in names)


def kind_of(module: type) -> str:
    """Return the name of the class in `PACKAGES` that a class is or derives from."""
    known = {kind for kinds in PACKAGES.values() for kind in kinds}
    return next(one.__name__ for one in module.__mro__ if one.__name__ in known)


def add_model(builder: Builder, x: str, kind: str, config: Any, tensors: Mapping[str, Any], where: str) -> str:
    """Add a model in memory, of a class in `PACKAGES`, to a network, and return the wire of its output.

    Raises:
        FormatError: a configuration that isn't supported.
    """
    weights, graph = Weights(tensors, where), Graph(builder)
    if kind in PACKAGES["xlstm.xlstm_large.model"]:
        settings = large.LargeSettings(*(getattr(config, name) for name in large.LargeSettings._fields))
        read = large.language_model if kind == "xLSTMLarge" else large.block_stack
        wire = read(graph, weights, x, settings)
    elif kind == "mLSTMLayer":
        wire = blocks.mlstm_layer(graph, weights, x)
    else:
        readers = {
            "xLSTMLMModel": blocks.language_model,
            "xLSTMBlockStack": blocks.block_stack,
            "sLSTMLayer": blocks.slstm_layer,
            "GatedFeedForward": blocks.feed_forward,
        }
        wire = readers.get(kind, blocks.block)(graph, weights, x, _settings(config))
    weights.finish()
    return wire


def _settings(config: Any) -> blocks.BlockSettings:
    """Return the settings in the configuration of a model, a block or a part of one."""
    block = getattr(config, "slstm_block", config)
    slstm, ffn = (getattr(block, name, None) or config for name in ("slstm", "feedforward"))
    usual = blocks.BlockSettings()
    return blocks.BlockSettings(getattr(slstm, "function", usual.function), getattr(ffn, "act_fn", usual.act_fn))


def network_of(
    tensors: Mapping[str, Any], where: str, settings: large.LargeSettings | blocks.BlockSettings | None = None
) -> Network:
    """Return the network of weights in a file.

    Args:
        tensors: array-likes by name, those of `recognises`.
        where: the file, for messages.
        settings: what the weights don't tell, of an xLSTMLarge or of a block stack; None: the defaults, which the
            metadata lists under `"assumed"`.

    Returns:
        The network; it takes ids if there is a table of embeddings, else `[B, T, D]`. If all matrices of the file are
        bfloat16, so are those of its cells and products.

    Raises:
        FormatError: a weight is missing, has another shape, or has no place in the model.
    """
    builder = Builder()
    weights, x = Weights(tensors, where), builder.input("x")
    graph = Graph(builder, narrow=weights.narrow)
    metadata: dict[str, Any] = {"source": {"format": "xlstm"}}
    if is_large(tensors):
        chosen = settings if isinstance(settings, large.LargeSettings) else large.LargeSettings()
        whole = weights.has("embedding") or weights.has("backbone")
        wire = (large.language_model if whole else large.block_stack)(graph, weights, x, chosen)
        assumed = [LARGE_ASSUMED]
    else:
        own = settings if isinstance(settings, blocks.BlockSettings) else blocks.BlockSettings()
        whole = weights.has("token_embedding")
        wire = (blocks.language_model if whole else blocks.block_stack)(graph, weights, x, own)
        assumed = [FEED_FORWARD_ASSUMED] * any(".ffn." in name for name in tensors)
        assumed += [CELL_ASSUMED] * any(".slstm_cell." in name for name in tensors)
    weights.finish()
    builder.output(wire)
    if settings is None and assumed:
        metadata["assumed"] = "; ".join(assumed)
    return builder.network(metadata)
