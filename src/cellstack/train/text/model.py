"""The text model that is trained, and its training batches. `to_nodes` turns it into a Network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cellstack.nodes import Dense, Node
from cellstack.nodes.steps import Embedding
from cellstack.train.examples import Batch, digest
from cellstack.train.model import Dropout
from cellstack.train.options import Architecture
from cellstack.train.recurrent import as_array, nodes_of_layers, recurrent_layers
from cellstack.train.text.data import Streams, Text, TextParts, measured


class TextModel(nn.Module):
    """A model from characters to logits of the next one: embedding or one-hot, stacked cells, a dense head."""

    def __init__(self, size: int, architecture: Architecture):
        super().__init__()
        embedding, self.size, self.architecture = architecture.embedding, size, architecture
        self.embedding = nn.Embedding(size, embedding) if embedding else None
        units = architecture.units
        self.recurrent = recurrent_layers(architecture, embedding or size, return_state=True)
        self.dropout = Dropout(architecture.dropout)
        self.head = nn.Linear(units[-1], size)
        self.carried: tuple[Any, ...] | None = None  # the initial states of the next chunk, one per layer

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits `[B, T, V]` for ids `[B, T]`, starting from the carried state, which is then updated.

        Args:
            x: int64.
            mask: None = use all steps.
        """
        y = (
            nn.functional.one_hot(x, self.size).to(self.head.weight.dtype)
            if self.embedding is None
            else self.embedding(x)
        )
        before = self.carried or (None,) * len(self.recurrent)
        after = []
        for layer, state in zip(self.recurrent, before, strict=True):
            y, *state = layer(y, state, mask)
            after.append(tuple(state))
            y = self.dropout(y)
        self.carried = tuple(after)
        return self.head(y)

    def answer(self, out: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the probabilities `[B, T, V]`."""
        return out.softmax(-1)

    def losses(self, out: Tensor, mask: Tensor | None, y: Tensor) -> Tensor:
        """Return the cross-entropy of every character `[B, T]`, in nats."""
        return nn.functional.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)

    def measure(self, out: Tensor, mask: Tensor | None, y: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Return sums over a batch; added up over batches they are the argument of `measured`."""
        return {"nats": (self.losses(out, mask, y) * weight).sum(dtype=torch.float64), "characters": weight.sum()}

    def measured(self, sums: dict[str, float]) -> dict[str, float]:
        """Return `bits_per_character` from sums of `measure`."""
        return {"bits_per_character": sums["nats"] / max(sums["characters"], 1.0) / math.log(2.0)}

    def describe(self) -> dict[str, Any]:
        """Return what must match a checkpoint's model, in addition to the shapes of the weights."""
        return {"task": "text", "characters": self.size, **self.architecture.described()}

    def to_nodes(self) -> list[Node]:
        """Return the model as nodes, from ids or one-hot to the probabilities of the next character after each."""
        table = [] if self.embedding is None else [Embedding(as_array(self.embedding.weight))]
        head = Dense(as_array(self.head.weight.T), as_array(self.head.bias), "softmax")
        return [*table, *nodes_of_layers(self.recurrent), head]


class Chunks:
    """A text as `Data`: chunks of streams, in the order of the text, the same in every epoch.

    Args:
        text: the text.
        parts: its training and validation parts.
        batch: maximum number of streams.
        steps: of a chunk, over which gradients are backpropagated.
    """

    def __init__(self, text: Text, parts: TextParts, batch: int, steps: int):
        self.text, self.parts = text, parts
        self.streams = Streams(text.ids, parts.training, batch, steps)
        self.steps = len(self.streams)
        self.validates = parts.validation[1] > parts.validation[0]

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """See `Data`."""
        for chunk in range(first, self.steps):
            x, y = self.streams.chunk(chunk)
            yield Batch(x, y, np.ones(y.shape, np.float32))

    def held(self) -> Iterator[Batch]:
        """See `Data`."""
        for x, y, counts in measured(self.text.ids, self.parts.validation):
            yield Batch(x, y, counts.astype(np.float32))

    def describe(self) -> dict[str, Any]:
        """See `Data`."""
        return {
            "text": digest([self.text.ids]),
            "parts": [list(part) for part in self.parts],
            "streams": self.streams.rows,
            "truncated": self.streams.steps,
        }
