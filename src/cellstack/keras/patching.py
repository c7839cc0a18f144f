"""Redirect the inner calls of Keras's recurrent layers to our op where it supports them."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any
from weakref import WeakSet

import keras

from cellstack.keras import states, torch_backend
from cellstack.keras.calls import count
from cellstack.keras.keras_cells import of, why_not, why_not_training

_RNN, _LSTM, _GRU = keras.layers.RNN, keras.layers.LSTM, keras.layers.GRU
_PLAIN = (_RNN, _LSTM, _GRU, keras.layers.SimpleRNN)

_everywhere = False
_accelerated: WeakSet[Any] = WeakSet()


def active(layer: Any) -> bool:
    """Whether a recurrent layer is accelerated."""
    return _everywhere or layer in _accelerated


def reason(layer: Any, sequences: Any, mask: Any, training: Any) -> str:
    """Return why Keras runs a call of an accelerated layer; "" if our op runs it."""
    return why_not(layer) or (why_not_training(of(layer)) if training else "") or torch_backend.why_not(sequences, mask)


# ── Replacements of Keras's methods ───────────────────────────────────────────────────────────────────────────────────


def _inner_loop(original: Callable[..., Any]) -> Callable[..., Any]:
    def inner_loop(self: Any, sequences: Any, initial_state: Any, mask: Any, training: Any = False) -> Any:
        # Keras's LSTM and GRU call that of RNN where they can't run: such calls have been decided already.
        if not active(self) or (original is _ORIGINAL[_RNN, "inner_loop"] and isinstance(self, (_LSTM, _GRU))):
            return original(self, sequences, initial_state, mask, training=training)
        used = mask[0] if isinstance(mask, (list, tuple)) else mask
        results, why = None, reason(self, sequences, used, training)
        if not why:
            given = list(initial_state) if keras.tree.is_nested(initial_state) else [initial_state]
            results, why = torch_backend.run_keras_layers(self, sequences, given, used, training)
        if not torch_backend.symbolic(sequences):
            count(why)
        return original(self, sequences, initial_state, mask, training=training) if results is None else results

    return inner_loop


def _call(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, sequences: Any, initial_state: Any = None, mask: Any = None, training: Any = False) -> Any:
        if active(self) and torch_backend.concrete(sequences):
            initial_state = states.start(self, sequences, initial_state)
            if initial_state is None and not training and _needs_only_the_op(self):
                results = _run_directly(self, sequences, mask)
                if results is not None:
                    return results
        return original(self, sequences, initial_state=initial_state, mask=mask, training=training)

    return call


def _needs_only_the_op(layer: Any) -> bool:
    """Whether inference from a zero state can skip what Keras does around a layer's loop.

    Keras creates the zeros, casts states, and draws dropout masks, which advance the seed even if they aren't used.
    """
    return (
        type(layer) in _PLAIN
        and not layer.stateful
        and not (layer.return_state and len(of(layer)) > 1)  # nested like the cells
        and not any(getattr(cell, "dropout", 0) or getattr(cell, "recurrent_dropout", 0) for cell in of(layer))
    )


def _run_directly(layer: Any, sequences: Any, mask: Any) -> Any:
    """Return the results of a call of a layer, directly from our op; None if Keras has to run it."""
    used = mask[0] if isinstance(mask, (list, tuple)) else mask
    if reason(layer, sequences, used, False):
        return None
    results, _ = torch_backend.run_keras_layers(layer, sequences, (), used, False)
    if results is None:
        return None
    count("")
    last, y, ends = results
    output = y if layer.return_sequences else last
    return (output, *ends) if layer.return_state else output


def _reset_state(original: Callable[..., Any]) -> Callable[..., Any]:
    def reset_state(self: Any) -> None:
        if not (active(self) and states.reset(self)):
            original(self)

    return reset_state


def _draw_masks(original: Callable[..., Any]) -> Callable[..., Any]:
    def draw_masks(self: Any, cell: Any, input_sequence: Any, input_state: Any) -> None:
        # Keras runs a step of every cell of a stack to find the widths, but its own cells have them as attributes.
        if active(self) and cell is self.cell and not why_not(self) and torch_backend.concrete(input_sequence):
            torch_backend.draw(of(self), input_sequence)
        else:
            original(self, cell, input_sequence, input_state)

    return draw_masks


_REPLACED = {
    (_RNN, "inner_loop"): _inner_loop,
    (_LSTM, "inner_loop"): _inner_loop,
    (_GRU, "inner_loop"): _inner_loop,
    (_RNN, "call"): _call,
    (_RNN, "reset_state"): _reset_state,
    (_RNN, "_maybe_config_dropout_masks"): _draw_masks,
}
_ORIGINAL = {(kind, name): vars(kind)[name] for kind, name in _REPLACED}
_OURS = {key: replacement(_ORIGINAL[key]) for key, replacement in _REPLACED.items()}


def _install() -> None:
    """Set our methods in Keras's classes while anything is accelerated, else Keras's own."""
    for (kind, name), function in (_OURS if _everywhere or _accelerated else _ORIGINAL).items():
        setattr(kind, name, function)


# ── The public functions ──────────────────────────────────────────────────────────────────────────────────────────────


class _Patched:
    """Context manager returned by `patch`, which restores the previous state."""

    def __init__(self, before: bool) -> None:
        self._before = before

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _set(self._before)


def _set(everywhere: bool) -> None:
    global _everywhere
    _everywhere = everywhere
    _install()


def patch() -> _Patched:
    """Accelerate all of Keras's recurrent layers, including existing ones: our op runs the calls that it supports.

    Classes, weights, configurations and files don't change. `plan` returns what runs each layer, `calls` counts calls.

    Returns:
        A context manager that restores the previous state: `with patch(): …`. Otherwise call `unpatch`.

    >>> with patch():
    ...     y = keras.layers.GRU(4)(keras.ops.zeros((32, 10, 3)))
    """
    before = _everywhere
    _set(True)
    return _Patched(before)


def unpatch() -> None:
    """Undo `patch`. Models passed to `accelerate` stay accelerated.

    >>> unpatch()
    """
    _set(False)


def recurrent(owner: str, model: Any) -> list[Any]:
    """Return every recurrent layer in a Keras layer or model, each once.

    Raises:
        TypeError: `model` is neither; the message names `owner`.
    """
    if not isinstance(model, keras.Layer):
        raise TypeError(f"{owner}: expected a Keras layer or model, got {type(model).__name__}")
    return [layer for layer in model._flatten_layers() if isinstance(layer, _RNN)]


def accelerate(model: Any) -> Any:
    """Accelerate the recurrent layers of one model in place: our op runs the calls that it supports.

    Copies of the model, and models loaded from a file, aren't accelerated.

    Args:
        model: a Keras layer or model.

    Returns:
        The model.

    Raises:
        TypeError: `model` is neither.
        ValueError: it has no recurrent layer. Build a model first if its layers are created in `build`.

    >>> model = accelerate(keras.Sequential([keras.Input((10, 3)), keras.layers.LSTM(4)]))
    >>> restore(model) is model
    True
    """
    found = recurrent("accelerate", model)
    if not found:
        raise ValueError(
            f"accelerate: the model {model.name} has no recurrent layer: build it first if it creates them in build()"
        )
    _accelerated.update(found)
    _install()
    return model


def restore(model: Any) -> Any:
    """Undo `accelerate`. While `patch` is active, the model stays accelerated.

    Args:
        model: a Keras layer or model.

    Returns:
        The model.

    Raises:
        TypeError: `model` is neither.
    """
    _accelerated.difference_update(recurrent("restore", model))
    _install()
    return model
