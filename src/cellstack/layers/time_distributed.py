"""`TimeDistributed`: a layer applied to each step separately."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from cellstack.cells.errors import ShapeError, check_mask
from cellstack.layers.base import Layer, as_input, as_mask
from cellstack.layers.bidirectional import Bidirectional
from cellstack.layers.rnn import RNN


class TimeDistributed(Layer):
    """Apply a module to every step of a sequence separately: the time axis becomes part of the batch.

    Args:
        layer: any torch module that takes `[B, …]`.
        input_size: width of the last axis, to create the weights of a layer of ours immediately.
        name: the layer's name in error messages.

    Raises:
        TypeError: `layer` isn't a module, or it is stateful: its rows would be steps, not rows of the batch.

    >>> tuple(TimeDistributed(nn.Linear(6, 5))(torch.zeros(2, 3, 6)).shape)
    (2, 3, 5)
    """

    def __init__(self, layer: nn.Module, *, input_size: int | None = None, name: str | None = None) -> None:
        super().__init__(name)
        if not isinstance(layer, nn.Module):
            raise TypeError(f"{self._owner}: expected layer to be a torch module, got {type(layer).__name__}")
        if getattr(layer, "stateful", False):
            raise TypeError(f"{self._owner}: stateful layers aren't supported")
        self._config = {"layer": layer, "input_size": input_size, "name": name}
        self.layer = layer
        # On the torch backend a Keras layer is a module; only the signature of its `call` has the arguments.
        own: Any = getattr(layer, "call", None)
        takes = own if isinstance(own, MethodType) else layer.forward
        self._takes = set(inspect.signature(takes).parameters) & {"mask", "training"}
        self._like = torch.empty(0)
        if input_size is not None:
            self.build(input_size)

    def build(self, input_size: int | Sequence[int | None]) -> None:
        """Create the weights of a layer of ours; other modules already have theirs."""
        if isinstance(self.layer, Layer):
            self.layer.build(input_size)

    def forward(self, inputs: Any, mask: Any = None, training: bool | None = None) -> Any:
        """Apply the layer to each step.

        Args:
            inputs: `[B, T, …]`, at least three axes; or a torch `PackedSequence`.
            mask: bool `[B, T, …]`, passed to the layer if it takes a mask, otherwise ignored. For a recurrent layer, a
                mask `[B, T]` masks whole sequences.
            training: passed to the layer if it takes it.

        Returns:
            The layer's results, with `[B, T]` instead of the first axis; packed if `inputs` are.

        Raises:
            ShapeError: fewer than three axes, or a mask of another shape.
            ValueError: a mask with a PackedSequence.
        """
        like = next((p for p in self.parameters() if p.is_floating_point()), self._like)
        how: dict[str, Any] = {"training": training} if "training" in self._takes else {}
        if isinstance(inputs, PackedSequence):
            if mask is not None:
                raise ValueError(f"{self._owner}: a mask isn't supported with a PackedSequence, which has lengths")
            y = self.layer(as_input(self._owner, "inputs", inputs.data, like), **how)
            return pytree.tree_map_only(Tensor, lambda t: PackedSequence(t, *inputs[1:]), y)
        x = as_input(self._owner, "inputs", inputs, like)
        if x.ndim < 3:
            raise ShapeError(f"{self._owner}: expected inputs [B, T, …] with at least three axes, got {tuple(x.shape)}")
        batch, steps = x.shape[:2]
        if mask is not None:
            used = as_mask(self._owner, mask, x)
            check_mask(self._owner, tuple(used.shape[:2]), batch, steps)
            if "mask" in self._takes:
                # For a recurrent layer, each step is a sequence: mask all of its steps.
                if used.ndim == 2 and isinstance(self.layer, (RNN, Bidirectional)):
                    used = used.unsqueeze(2).expand(*used.shape, x.shape[2])
                how["mask"] = used.reshape(batch * steps, *used.shape[2:])
        out = self.layer(x.reshape(batch * steps, *x.shape[2:]), **how)
        return pytree.tree_map_only(Tensor, lambda t: t.reshape(batch, steps, *t.shape[1:]), out)
