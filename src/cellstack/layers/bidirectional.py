"""`Bidirectional`: two layers over the same sequence, one forward in time and one backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cellstack.cells.errors import ShapeError
from cellstack.cells.plan import Plan
from cellstack.layers.base import Layer, describe
from cellstack.layers.foreign import state_counts
from cellstack.layers.rnn import RNN
from cellstack.layers.sequences import pack

MERGE_MODES = ("concat", "sum", "mul", "ave", None)


class Bidirectional(Layer):
    """Two layers over the same sequence, one in each direction; the backward output is returned in time order.

    With `return_sequences`, both outputs are zero at masked steps before they are merged, as in Keras.

    Args:
        layer: an `RNN`, `LSTM`, `GRU` or `SimpleRNN`; it becomes the forward layer and keeps its weights.
        merge_mode: how to merge the two outputs: "concat", "sum", "mul", "ave", or None (return both).
        backward_layer: None: a new layer of the same configuration, in the other direction.
        input_size: width I, to create the weights immediately; None: at the first call.
        name: the layer's name in error messages.

    Raises:
        TypeError: a layer isn't an RNN.
        ValueError: an unknown merge mode, or incompatible layers.

    >>> from cellstack import layers
    >>> both = Bidirectional(layers.LSTM(4, return_sequences=True))
    >>> tuple(both(torch.zeros(2, 3, 6)).shape)
    (2, 3, 8)

    Ref: Schuster and Paliwal 1997, "Bidirectional Recurrent Neural Networks".
    """

    def __init__(
        self,
        layer: RNN,
        merge_mode: str | None = "concat",
        backward_layer: RNN | None = None,
        *,
        input_size: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        for argument, value in (("layer", layer), ("backward_layer", backward_layer)):
            if not isinstance(value, RNN) and (argument == "layer" or value is not None):
                came = type(value).__name__
                raise TypeError(f"{self._owner}: expected {argument} to be an RNN, LSTM, GRU or SimpleRNN, got {came}")
        if merge_mode not in MERGE_MODES:
            raise ValueError(f"{self._owner}: expected merge_mode to be one of {MERGE_MODES}, got {merge_mode!r}")
        self._config = {"layer": None, "merge_mode": merge_mode, "backward_layer": None}
        self._config |= {"input_size": input_size, "name": name}
        self._given_backward = backward_layer is not None
        self.merge_mode = merge_mode
        self.forward_layer = layer
        if backward_layer is None:
            config = layer.get_config()
            # from_config copies the cells; of a built layer the new one takes the width, not the weights.
            backward_layer = type(layer).from_config({**config, "go_backwards": not layer.go_backwards})
            width = getattr(layer.cells[0], "input_size", None)
            if width is not None and not backward_layer.built:
                backward_layer.build(width)
        self.backward_layer = backward_layer
        for flag in ("return_sequences", "return_state", "stateful"):
            if getattr(layer, flag) != getattr(backward_layer, flag):
                raise ValueError(f"{self._owner}: expected the same {flag} in both layers")
        if layer.go_backwards == backward_layer.go_backwards:
            raise ValueError(
                f"{self._owner}: expected layers of opposite directions, got go_backwards={layer.go_backwards} in both"
            )
        self.return_sequences, self.return_state = layer.return_sequences, layer.return_state
        self.stateful = layer.stateful
        if input_size is not None:
            self.build(input_size)

    def extra_repr(self) -> str:
        """Return the merge mode."""
        return f"merge_mode={self.merge_mode!r}"

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments by name."""
        given = {"layer": describe(self.forward_layer)}
        if self._given_backward:
            given["backward_layer"] = describe(self.backward_layer)
        return {**self._config, **given}

    def build(self, input_size: int | Sequence[int | None]) -> None:
        """Create the weights of both layers for inputs of width `input_size`."""
        self.forward_layer.build(input_size)
        self.backward_layer.build(input_size)

    @property
    def states(self) -> tuple[Any, ...] | None:
        """Initial states of the next call, the forward layer's, then the backward layer's; None: see `RNN.states`."""
        ahead, back = self.forward_layer, self.backward_layer
        if ahead._states is None or back._states is None:
            return None
        return (*ahead.public_states(ahead._states), *back.public_states(back._states))

    @states.setter
    def states(self, value: Any) -> None:
        self.forward_layer.states, self.backward_layer.states = self._split(value)

    def reset_states(self, states: Any = None, indices: Any = None) -> None:
        """Reset or replace the states: see `RNN.reset_states`; `states` holds forward, then backward."""
        ahead, back = self._split(states)
        self.forward_layer.reset_states(ahead, indices)
        self.backward_layer.reset_states(back, indices)

    def _split(self, value: Any) -> tuple[Any, Any]:
        if value is None:
            return None, None
        ahead, back = self.forward_layer.state_count, self.backward_layer.state_count
        came = len(value) if hasattr(value, "__len__") else type(value).__name__
        flat = [sum(state_counts(layer.cells)) for layer in (self.forward_layer, self.backward_layer)]
        if came == sum(flat):  # the arrays of stacks in a flat list
            ahead, back = flat
        if came != ahead + back:
            raise ShapeError(
                f"{self._owner}: expected {ahead} states for the forward layer, then {back} for the backward layer, "
                f"got {came}"
            )
        return value[:ahead], value[ahead:]

    def plan(self) -> Plan:
        """Return which kernel runs each layer, and why; one line per layer."""
        return Plan(
            f"{direction}: {line}"
            for direction, layer in (("forward", self.forward_layer), ("backward", self.backward_layer))
            for line in layer.plan()
        )

    def forward(
        self,
        sequences: Any,
        initial_state: Any = None,
        mask: Any = None,
        training: bool | None = None,
        return_gates: bool = False,
        *,
        reset: Any = None,
        lengths: Any = None,
    ) -> Any:
        """Run over a sequence in both directions.

        Args:
            sequences, mask, return_gates, lengths: see `RNN.forward`.
            initial_state: the forward layer's states, then the backward layer's, in one list; those of stacks also as
                a flat list of arrays.
            training: whether dropout and zoneout are active; None: use the module's mode.
            reset: bool `[B, T]`, True where a new piece of a row begins, for both layers: see `RNN.forward`.

        Returns:
            y, merged: `[B, T, 2H]` or `[B, 2H]` with "concat", else `[B, T, H]` or `[B, H]`; two outputs if
            `merge_mode` is None. `return_state` adds the states, forward then backward; `return_gates` adds the pair of
            the layers' traces, both in time order.

        Raises:
            ShapeError, TypeError, ValueError: see `RNN.forward`.
        """
        ahead, back = self.forward_layer, self.backward_layer
        training = self._trains(training)
        start, start_back = self._split(initial_state)
        zero = self.return_sequences
        given = ahead.given(sequences, mask, reset, lengths)
        run = ahead.run(given, start, training, return_gates, zero)
        run_back = back.run(given._replace(x=back.as_x(given.x)), start_back, training, return_gates, zero)
        results: list[Any] = list(_merge(run.y, run_back.y, self.merge_mode))
        if given.packed is not None and self.return_sequences:
            results = [pack(y, given.packed) for y in results]
        if self.return_state:
            results += [*ahead.public_states(run.states), *back.public_states(run_back.states)]
        if return_gates:
            results.append((ahead.public_traces(run.traces), back.public_traces(run_back.traces)))
        return results[0] if len(results) == 1 else tuple(results)


def _merge(y: Tensor, y_back: Tensor, mode: str | None) -> tuple[Tensor, ...]:
    if mode == "concat":
        return (torch.cat([y, y_back], dim=-1),)
    if mode == "sum":
        return (y + y_back,)
    if mode == "ave":
        return ((y + y_back) / 2,)
    if mode == "mul":
        return (y * y_back,)
    return y, y_back
