"""Weights of a model by name, each of which has to be used, and the nodes that several models share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cellstack.cells.errors import FormatError
from cellstack.cells.layout import Array
from cellstack.cells.spec import DTYPES
from cellstack.formats.build import Builder
from cellstack.nodes import Dense, Merge, Node

Number = int | str
"""The length of an axis, or a letter for any length."""


class Weights:
    """The weights under a prefix of their names.

    Args:
        tensors: array-likes by their full names.
        where: the file or the module, for messages.
        prefix: what their names begin with, `""` or `"blocks.0."`.
        used: the full names that have been taken; shared by all `under` parts.
    """

    def __init__(self, tensors: Mapping[str, Any], where: str, prefix: str = "", used: set[str] | None = None) -> None:
        self.tensors, self.where, self.prefix = tensors, where, prefix
        self.used: set[str] = set() if used is None else used

    def under(self, name: str) -> Weights:
        """Return the weights of a part of the model."""
        return Weights(self.tensors, self.where, f"{self.prefix}{name}.", self.used)

    def has(self, name: str) -> bool:
        """Return whether there is a weight of this name, or any whose name begins with it and a dot."""
        full = self.prefix + name
        return full in self.tensors or any(key.startswith(full + ".") for key in self.tensors)

    def count(self, name: str) -> int:
        """Return how many numbered parts `name.0`, `name.1` and so on there are."""
        number = 0
        while self.has(f"{name}.{number}"):
            number += 1
        return number

    def take(self, name: str, *shape: Number) -> Array:
        """Return a weight of this shape, float32 or float64; narrower floats are widened.

        Raises:
            FormatError: it is missing, or has another shape or dtype.
        """
        full = self.prefix + name
        if full not in self.tensors:
            near = [key for key in self.tensors if key.startswith(self.prefix)][:6]
            raise FormatError(f"{self.where}: expected a weight {full!r}, found none: {', '.join(near) or 'nothing'}")
        array = np.asarray(self.tensors[full])
        if array.dtype.kind != "f":
            raise FormatError(f"{self.where}: {full}: expected floats, found {array.dtype}")
        fits = array.ndim == len(shape) and all(
            isinstance(want, str) or want == got for want, got in zip(shape, array.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(map(str, shape))
            raise FormatError(f"{self.where}: {full}: expected the shape [{wanted}], found {list(array.shape)}")
        self.used.add(full)
        return array if array.dtype.name in DTYPES else array.astype(np.float32)

    def maybe(self, name: str, *shape: Number) -> Array | None:
        """Return a weight as `take` does, or None if there is none of this name."""
        return self.take(name, *shape) if self.prefix + name in self.tensors else None

    @property
    def narrow(self) -> bool:
        """Whether all matrices are stored as bfloat16."""
        return all(tensor.dtype in ("bfloat16", "BF16") for tensor in self.tensors.values() if len(tensor.shape) > 1)

    def finish(self) -> None:
        """Raise `FormatError` if a weight wasn't used."""
        unused = [name for name in self.tensors if name not in self.used]
        if unused:
            more = f" and {len(unused) - 6} more" if len(unused) > 6 else ""
            raise FormatError(f"{self.where}: these weights have no place in the model: {', '.join(unused[:6])}{more}")


def linear(weights: Weights, inputs: Number = "I", outputs: Number = "O", activation: str = "linear") -> Dense:
    """Return a `torch.nn.Linear` as a node."""
    kernel = weights.take("weight", outputs, inputs)
    return Dense(kernel.T, weights.maybe("bias", len(kernel)), activation)


def joined(parts: list[Dense]) -> Dense:
    """Return dense layers of the same input and activation as one, with their outputs side by side."""
    kernel = np.concatenate([part.kernel for part in parts], axis=1)
    biases = [part.bias for part in parts if part.bias is not None]
    if biases and len(biases) < len(parts):
        raise FormatError(f"expected a bias for each of {len(parts)} layers or for none, found {len(biases)}")
    return Dense(kernel, np.concatenate(biases) if biases else None, parts[0].activation)


def cut(dense: Dense, start: int, stop: int, activation: str = "linear") -> Dense:
    """Return the layer of some outputs of a dense layer."""
    bias = None if dense.bias is None else dense.bias[start:stop]
    return Dense(dense.kernel[:, start:stop], bias, activation)


class Graph:
    """Adds nodes to a builder, with names from the model.

    Args:
        builder: the network's builder.
        prefix: the path of the part within the model, `""` or `"blocks.0."`.
        narrow: whether matrices become bfloat16, one node after the other: all at once in float32 take twice the room.
    """

    def __init__(self, builder: Builder, prefix: str = "", narrow: bool = False) -> None:
        self.builder, self.prefix, self.narrow = builder, prefix, narrow

    def under(self, name: str) -> Graph:
        """Return the graph of a part of the model."""
        return Graph(self.builder, f"{self.prefix}{name}.", self.narrow)

    def add(self, name: str, node: Node, *wires: str) -> str:
        """Add a node, and return its wire."""
        return self.builder.add(self.prefix + name, node.with_weights("bfloat16") if self.narrow else node, *wires)

    def concat(self, name: str, *wires: str) -> str:
        """Join values along the features."""
        return self.add(name, Merge("concat"), *wires)

    def gated(self, name: str, gate: str, value: str) -> str:
        """Multiply two values."""
        return self.add(name, Merge("mul"), gate, value)

    def residual(self, name: str, wire: str, part: Callable[[str], str]) -> str:
        """Add the output of a part of the model to its input."""
        return self.add(name, Merge("add"), wire, part(wire))
