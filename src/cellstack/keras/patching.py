"""The calls that Keras's recurrent layers make below them, led to our op where it can serve them."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any
from weakref import WeakSet

import keras

from cellstack.keras import engines, states
from cellstack.keras.calls import count
from cellstack.keras.cells import of, why_not, why_not_training

_RNN, _LSTM, _GRU = keras.layers.RNN, keras.layers.LSTM, keras.layers.GRU
_PLAIN = (_RNN, _LSTM, _GRU, keras.layers.SimpleRNN)

_everywhere = False
_accelerated: WeakSet[Any] = WeakSet()


def active(layer: Any) -> bool:
    """Whether a recurrent layer's calls are led to our op where it can serve them."""
    return _everywhere or layer in _accelerated


def reason(layer: Any, sequences: Any, mask: Any, training: Any) -> str:
    """Say why a call of an accelerated layer is left to Keras; "" where our op serves it."""
    return (
        engines.why_not_here()
        or why_not(layer)
        or (why_not_training(of(layer)) if training else "")
        or engines.why_not(sequences, mask)
    )


# ── What stands in Keras's place ───────────────────────────────────────────────────────────────────────────────────


def _inner_loop(original: Callable[..., Any]) -> Callable[..., Any]:
    def inner_loop(self: Any, sequences: Any, initial_state: Any, mask: Any, training: Any = False) -> Any:
        # Keras's LSTM and GRU hand on to RNN what they can't do: they have been asked already.
        if not active(self) or (original is _ORIGINAL[_RNN, "inner_loop"] and isinstance(self, (_LSTM, _GRU))):
            return original(self, sequences, initial_state, mask, training=training)
        used = mask[0] if isinstance(mask, (list, tuple)) else mask
        results, why = None, reason(self, sequences, used, training)
        if not why:
            given = list(initial_state) if keras.tree.is_nested(initial_state) else [initial_state]
            results, why = engines.run(self, sequences, given, used, training)
        if not engines.symbolic(sequences):
            count(why)
        return original(self, sequences, initial_state, mask, training=training) if results is None else results

    return inner_loop


def _call(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, sequences: Any, initial_state: Any = None, mask: Any = None, training: Any = False) -> Any:
        if active(self) and engines.concrete(sequences):
            initial_state = states.start(self, sequences, initial_state)
            if initial_state is None and not training and _goes_straight(self):
                results = _inferred(self, sequences, mask)
                if results is not None:
                    return results
        return original(self, sequences, initial_state=initial_state, mask=mask, training=training)

    return call


def _goes_straight(layer: Any) -> bool:
    """Whether what Keras does around a layer's loop comes to nothing where it starts from zeros, at inference.

    It makes the zeros, casts states, and draws masks of dropout, which count as draws even where they aren't used.
    """
    return (
        type(layer) in _PLAIN
        and not layer.stateful
        and not (layer.return_state and len(of(layer)) > 1)  # nested as the cells are
        and not any(getattr(cell, "dropout", 0) or getattr(cell, "recurrent_dropout", 0) for cell in of(layer))
    )


def _inferred(layer: Any, sequences: Any, mask: Any) -> Any:
    """Return what a call of a layer returns, straight from our op; None where Keras has to run it."""
    used = mask[0] if isinstance(mask, (list, tuple)) else mask
    if reason(layer, sequences, used, False):
        return None
    results, _ = engines.run(layer, sequences, (), used, False)
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
        # Keras runs a step of every cell of a stack to learn the widths, which its own cells say themselves.
        if active(self) and cell is self.cell and not why_not(self) and engines.concrete(input_sequence):
            engines.draw(of(self), input_sequence)
        else:
            original(self, cell, input_sequence, input_state)

    return draw_masks


_IN_PLACE_OF = {
    (_RNN, "inner_loop"): _inner_loop,
    (_LSTM, "inner_loop"): _inner_loop,
    (_GRU, "inner_loop"): _inner_loop,
    (_RNN, "call"): _call,
    (_RNN, "reset_state"): _reset_state,
    (_RNN, "_maybe_config_dropout_masks"): _draw_masks,
}
_ORIGINAL = {(kind, name): vars(kind)[name] for kind, name in _IN_PLACE_OF}
_OURS = {key: replacement(_ORIGINAL[key]) for key, replacement in _IN_PLACE_OF.items()}


def _install() -> None:
    """Let Keras's classes have our functions, as long as anything is accelerated."""
    for (kind, name), function in (_OURS if _everywhere or _accelerated else _ORIGINAL).items():
        setattr(kind, name, function)


# ── The door ───────────────────────────────────────────────────────────────────────────────────────────────────────


class _Patched:
    """What `patch` returns: as a context it ends with what was before."""

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
    """Let all recurrent layers of Keras run on our op where it can serve them, those that exist already too.

    Classes, weights, configurations and files stay Keras's. `plan` says what runs each layer, `calls` what was served.

    Returns:
        A context, at whose end all is as it was before: `with patch(): …`. Or call `unpatch`.

    >>> with patch():
    ...     y = keras.layers.GRU(4)(keras.ops.zeros((32, 10, 3)))
    """
    before = _everywhere
    _set(True)
    return _Patched(before)


def unpatch() -> None:
    """Undo `patch`. Models that were accelerated by themselves stay so.

    >>> unpatch()
    """
    _set(False)


def recurrent(owner: str, model: Any) -> list[Any]:
    """Return every recurrent layer within a layer or model of Keras, each once.

    Raises:
        TypeError: it is neither, as a message of `owner`.
    """
    if not isinstance(model, keras.Layer):
        raise TypeError(f"{owner}: expected a layer or a model of Keras, got {type(model).__name__}")
    return [layer for layer in model._flatten_layers() if isinstance(layer, _RNN)]


def accelerate(model: Any) -> Any:
    """Let the recurrent layers within one model run on our op where it can serve them, in place.

    A copy of the model, or one read from a file, is Keras's own again.

    Args:
        model: a layer or a model of Keras.

    Returns:
        The model.

    Raises:
        TypeError: something else.
        ValueError: it has no recurrent layer; a model of one's own class has those of `build` only once it is built.

    >>> model = accelerate(keras.Sequential([keras.Input((10, 3)), keras.layers.LSTM(4)]))
    >>> restore(model) is model
    True
    """
    found = recurrent("accelerate", model)
    if not found:
        raise ValueError(
            f"accelerate: expected a model with a recurrent layer, got {model.name} without one: build it before"
        )
    _accelerated.update(found)
    _install()
    return model


def restore(model: Any) -> Any:
    """Undo `accelerate`. Under `patch` the model runs on our op all the same.

    Args:
        model: a layer or a model of Keras.

    Returns:
        The model.

    Raises:
        TypeError: something else.
    """
    _accelerated.difference_update(recurrent("restore", model))
    _install()
    return model
