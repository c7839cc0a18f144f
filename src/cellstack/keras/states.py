"""States that were set by hand: `layer.states = (h, c)`, which Keras ignores in layers that aren't stateful."""

from __future__ import annotations

from typing import Any

import keras

from cellstack.spec import ShapeError


def _by_hand(layer: Any) -> bool:
    """Whether somebody has set the states: Keras's own are variables."""
    return layer.states is not None and not all(
        isinstance(state, keras.Variable) for state in keras.tree.flatten(layer.states)
    )


def start(layer: Any, sequences: Any, initial_state: Any) -> Any:
    """Return what a call starts from: what it was given, else states set by hand, which then have served.

    Those of a stateful layer become the values of its variables.

    Raises:
        ShapeError: states that aren't those of the layer for this batch.
    """
    if not _by_hand(layer):
        return initial_state
    batch = sequences.shape[0]
    values = None if initial_state is not None and not layer.stateful else _checked(layer, batch)
    if layer.stateful:
        layer._create_state_variables(batch)
        layer._expected_batch_size = batch
        for variable, value in zip(keras.tree.flatten(layer.states), keras.tree.flatten(values), strict=True):
            variable.assign(value)
        return initial_state
    if initial_state is not None:
        return initial_state
    layer.states = None
    return values


def _checked(layer: Any, batch: int) -> Any:
    """Return the states that were set, in the structure in which the layer has them."""
    wanted = layer.get_initial_state(batch)
    shapes = [tuple(state.shape) for state in keras.tree.flatten(wanted)]
    dtype = layer.cell.compute_dtype
    convert: Any = keras.ops.convert_to_tensor
    values = [convert(state, dtype=dtype) for state in keras.tree.flatten(layer.states)]
    came = [tuple(value.shape) for value in values]
    if came != shapes:
        raise ShapeError(
            f"{layer.name}: expected states of shapes {shapes}, for a batch of {batch}, got {came}: set others, or "
            "layer.states = None"
        )
    return keras.tree.pack_sequence_as(wanted, values)


def reset(layer: Any) -> bool:
    """Forget states that were set by hand, or those of a stack, whose nesting Keras's own reset doesn't know.

    Returns:
        Whether there were any.
    """
    if _by_hand(layer):
        if layer.built:  # while it is built, Keras resets what a stateful layer holds: these are yet to serve
            layer.states = None
            if layer.stateful:
                layer._create_state_variables(layer._expected_batch_size)
        return True
    if layer.states is None or all(isinstance(state, keras.Variable) for state in layer.states):
        return False
    for variable in keras.tree.flatten(layer.states):
        variable.assign(keras.ops.zeros_like(variable.value))
    return True
