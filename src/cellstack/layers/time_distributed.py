"""`TimeDistributed`: a layer applied to each step by itself."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from cellstack.layers.base import Layer, as_input, as_mask
from cellstack.layers.bidirectional import Bidirectional
from cellstack.layers.rnn import RNN
from cellstack.spec import ShapeError, check_mask


class TimeDistributed(Layer):
    """A module applied to every step of a sequence by itself: time is folded into the batch, and unfolded after.

    Args:
        layer: any torch module that takes `[B, …]`.
        input_size: width of the last axis, to make the weights of a layer of ours at once.
        name: said in error messages.

    Raises:
        TypeError: no module, or a stateful layer: folded, its rows would not be those of the batch.

    >>> tuple(TimeDistributed(nn.Linear(6, 5))(torch.zeros(2, 3, 6)).shape)
    (2, 3, 5)
    """

    def __init__(self, layer: nn.Module, *, input_size: int | None = None, name: str | None = None) -> None:
        super().__init__(name)
        if not isinstance(layer, nn.Module):
            raise TypeError(f"{self._owner}: expected layer to be a torch module, got {type(layer).__name__}")
        if getattr(layer, "stateful", False):
            raise TypeError(f"{self._owner}: expected a layer without a state that it keeps, got stateful=True")
        self._config = {"layer": layer, "input_size": input_size, "name": name}
        self.layer = layer
        # A layer of Keras's on torch is a module whose forward takes anything; its call says what.
        own: Any = getattr(layer, "call", None)
        takes = own if isinstance(own, MethodType) else layer.forward
        self._takes = set(inspect.signature(takes).parameters) & {"mask", "training"}
        self._like = torch.empty(0)
        if input_size is not None:
            self.build(input_size)

    def build(self, input_size: int | Sequence[int | None]) -> None:
        """Make the weights of a layer of ours; other modules have theirs."""
        if isinstance(self.layer, Layer):
            self.layer.build(input_size)

    def _apply(self, fn: Any, recurse: bool = True) -> TimeDistributed:
        super()._apply(fn, recurse)
        self._like = fn(self._like)
        return self

    def forward(self, inputs: Any, mask: Any = None, training: bool | None = None) -> Any:
        """Apply the layer to each step.

        Args:
            inputs: `[B, T, …]`, at least three axes; or a `PackedSequence` of torch, whose steps lie folded already.
            mask: `[B, T, …]` of bool; handed on, folded, to a layer that takes a mask, else without effect. With a
                layer over sequences, `[B, T]` leaves out whole sequences.
            training: handed on to a layer that takes it.

        Returns:
            What the layer returns, with `[B, T]` in place of each result's first axis; packed where `inputs` were.

        Raises:
            ShapeError: fewer than three axes, or a mask of another shape.
            ValueError: a mask with a PackedSequence.
        """
        like = next((p for p in self.parameters() if p.is_floating_point()), self._like)
        how: dict[str, Any] = {"training": training} if "training" in self._takes else {}
        if isinstance(inputs, PackedSequence):
            if mask is not None:
                raise ValueError(f"{self._owner}: expected no mask with a PackedSequence, which has its lengths")
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
                # To a layer over sequences, a step that doesn't count is a sequence without steps.
                if used.ndim == 2 and isinstance(self.layer, (RNN, Bidirectional)):
                    used = used.unsqueeze(2).expand(*used.shape, x.shape[2])
                how["mask"] = used.reshape(batch * steps, *used.shape[2:])
        out = self.layer(x.reshape(batch * steps, *x.shape[2:]), **how)
        return pytree.tree_map_only(Tensor, lambda t: t.reshape(batch, steps, *t.shape[1:]), out)
