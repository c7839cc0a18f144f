"""States that users set, `layer.states = (h, c)`, which Keras ignores in layers that aren't stateful."""

from __future__ import annotations

from typing import Any

import keras

from cellstack.cells.errors import ShapeError


def _set_by_user(layer: Any) -> bool:
    """Whether the user has set the states: those of Keras are variables."""
    return layer.states is not None and not all(
        isinstance(state, keras.Variable) for state in keras.tree.flatten(layer.states)
    )


def start(layer: Any, sequences: Any, initial_state: Any) -> Any:
    """Return the initial state of a call: its argument, or the states that the user set, which apply to one call.

    A stateful layer assigns the states to its variables.

    Raises:
        ShapeError: the states' shapes don't match the layer and this batch.
    """
    if not _set_by_user(layer):
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
    """Return the states that the user set, in the structure of the layer's states."""
    wanted = layer.get_initial_state(batch)
    shapes = [tuple(state.shape) for state in keras.tree.flatten(wanted)]
    dtype = layer.cell.compute_dtype
    convert: Any = keras.ops.convert_to_tensor
    values = [convert(state, dtype=dtype) for state in keras.tree.flatten(layer.states)]
    came = [tuple(value.shape) for value in values]
    if came != shapes:
        raise ShapeError(
            f"{layer.name}: expected states of shapes {shapes}, for a batch of {batch}, got {came}: set others, or set "
            "layer.states = None"
        )
    return keras.tree.pack_sequence_as(wanted, values)


def reset(layer: Any) -> bool:
    """Reset states that the user set, and nested states of a stack, which Keras's own reset doesn't support.

    Returns:
        Whether there were such states.
    """
    if _set_by_user(layer):
        if layer.built:  # Keras also resets a stateful layer when it builds it; keep the states for the first call
            layer.states = None
            if layer.stateful:
                layer._create_state_variables(layer._expected_batch_size)
        return True
    if layer.states is None or all(isinstance(state, keras.Variable) for state in layer.states):
        return False
    for variable in keras.tree.flatten(layer.states):
        variable.assign(keras.ops.zeros_like(variable.value))
    return True
