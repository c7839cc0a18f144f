"""Checkpoints that are folders: a configuration, and weights in safetensors files.

Read are those of xlstm, of Transformers' xLSTM and of TiRex-2: `config.json` or `config.yaml`, with
`model.safetensors`, the shards that `model.safetensors.index.json` lists, or `model_0.safetensors`,
`model_1.safetensors` and so on.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from typing import Any

from safetensors import SafetensorError, safe_open

from cellstack.cells.errors import FormatError
from cellstack.formats import tirex, xlstm
from cellstack.formats.files import parse
from cellstack.formats.safetensors_weights import Tensor, tensors_in
from cellstack.formats.xlstm import blocks
from cellstack.formats.xlstm.large import LargeSettings
from cellstack.network import Network

NAME = "checkpoint folders"
SUFFIXES = ()
CONFIGS = ("config.json", "config.yaml")
INDEX = "model.safetensors.index.json"


def recognises(head: bytes) -> bool:
    """Return False: no single file is such a checkpoint."""
    return False


def load(path: str) -> Network:
    """Read a checkpoint folder of an xLSTM or a TiRex-2.

    Returns:
        The network, with the configuration in its metadata.

    Raises:
        FormatError: a file is missing or damaged, a weight is missing, has another shape or no place in the model, or
            the configuration doesn't fit or has a part that isn't supported; the message names it.
        ModuleNotFoundError: PyYAML isn't installed, and the configuration is `config.yaml`.
        OSError: a file can't be read.
    """
    config = _config(path)
    with ExitStack() as files:
        tensors = _tensors(path, files)
        if tirex.is_second(tensors):
            return tirex.of_config(path, config, tensors)
        if not xlstm.recognises(tensors):
            few = ", ".join(list(tensors)[:4])
            raise FormatError(f"{path}: expected the weights of an xLSTM or a TiRex-2, found {few or 'no tensor'}")
        large = xlstm.is_large(tensors)
        if large and config.get("tie_word_embeddings") and "lm_head.weight" not in tensors:
            tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"]
        settings = _large_settings(path, config) if large else _block_settings(path, config)
        _check_sizes(path, config, tensors)
        network = xlstm.network_of(tensors, path, settings)
    network.metadata["config"] = config
    return network


def extract(path: str) -> dict[str, Network]:
    """Return the nodes with a state, by name."""
    network = load(path)
    return {
        name: Network([node], [name])
        for name, node in zip(network.names, network.nodes, strict=True)
        if node.cells or node.memory is not None
    }


def _config(path: str) -> dict[str, Any]:
    for name in CONFIGS:
        file = os.path.join(path, name)
        if not os.path.isfile(file):
            continue
        with open(file, encoding="utf-8") as stream:
            text = stream.read()
        found = parse(file, text) if name.endswith(".json") else _yaml(file, text)
        if not isinstance(found, dict):
            raise FormatError(f"{file}: expected settings by name, found {type(found).__name__}")
        return found
    raise FormatError(f"{path}: expected a folder with {' or '.join(CONFIGS)}, found none")


def _yaml(file: str, text: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"reading {file} needs PyYAML: pip install pyyaml", name="yaml") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise FormatError(f"{file}: expected YAML, found {' '.join(str(error).split())[:200]}") from None


def _tensors(path: str, files: ExitStack) -> dict[str, Tensor]:
    """Return all tensors of a folder by name, to be read while `files` is open."""
    names = _files(path)
    if not names:
        raise FormatError(f"{path}: expected weights in model.safetensors, {INDEX} or model_0.safetensors, found none")
    tensors: dict[str, Tensor] = {}
    for name in names:
        file = os.path.join(path, name)
        try:
            own = tensors_in(file, files.enter_context(safe_open(file, framework="numpy")))
        except SafetensorError as error:
            raise FormatError(f"{file}: expected a safetensors file, found {str(error)[:200]}") from None
        twice = sorted(tensors.keys() & own.keys())
        if twice:
            raise FormatError(f"{file}: the tensor {twice[0]!r} is in another file too")
        tensors |= own
    return tensors


def _files(path: str) -> list[str]:
    if os.path.isfile(os.path.join(path, "model.safetensors")):
        return ["model.safetensors"]
    index = os.path.join(path, INDEX)
    if os.path.isfile(index):
        with open(index, encoding="utf-8") as stream:
            try:
                listed = sorted(set(json.load(stream)["weight_map"].values()))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise FormatError(f"{index}: expected a weight_map of tensors and files") from None
        for name in listed:
            if not isinstance(name, str) or os.path.basename(name) != name:
                raise FormatError(f"{index}: expected names of files in the same folder, found {name!r:.80}")
            if not os.path.isfile(os.path.join(path, name)):
                raise FormatError(f"{index}: the file {name} isn't there")
        return listed
    found: list[str] = []
    while os.path.isfile(os.path.join(path, f"model_{len(found)}.safetensors")):
        found.append(f"model_{len(found)}.safetensors")
    return found


# ── configurations ──────────────────────────────────────────────────────────────────────────────────────────────────


def _large_settings(path: str, config: dict[str, Any]) -> LargeSettings:
    """Return the settings of an xLSTMLarge, or of Transformers' xLSTM."""
    values = LargeSettings()._asdict()
    for name in values:
        value = config.get(name, values[name])
        optional = value is None and name.endswith("cap")
        if not optional and (not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0):
            raise FormatError(f"{path}: config: expected {name} to be a number above 0, found {value!r:.80}")
        values[name] = value
    return LargeSettings(**values)


def _block_settings(path: str, config: dict[str, Any]) -> blocks.BlockSettings:
    """Return the settings of a block stack or of its language model."""
    values = blocks.BlockSettings()._asdict()
    for part, name, known in (("slstm", "function", blocks.CELLS), ("feedforward", "act_fn", blocks.ACTIVATIONS)):
        block = config.get("slstm_block")
        own = block.get(part) if isinstance(block, dict) else None
        values[name] = own.get(name, values[name]) if isinstance(own, dict) else values[name]
        if values[name] not in known:
            where = f"config: slstm_block.{part}.{name}"
            found = f"found {values[name]!r:.80}"
            raise FormatError(f"{path}: {where}: expected one of {', '.join(known)}, {found}")
    return blocks.BlockSettings(**values)


def _check_sizes(path: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise `FormatError` if the numbers of the configuration aren't those of the weights."""
    head = tensors.get("lm_head.weight")
    blocks = {name.split("blocks.")[1].split(".")[0] for name in tensors if "blocks." in name}
    gates = [tensor for name, tensor in tensors.items() if name.endswith("igate_preact.weight")]
    found = {"num_blocks": len(blocks), "num_hidden_layers": len(blocks)}
    if head is not None and len(head.shape) == 2:
        found |= {"vocab_size": head.shape[0], "embedding_dim": head.shape[1], "hidden_size": head.shape[1]}
    if gates:
        found |= {"num_heads": gates[0].shape[0]}
    for name, size in found.items():
        if config.get(name) not in (None, size):
            raise FormatError(f"{path}: config: {name} is {config[name]!r:.80}, and the weights have {size}")
