"""A well-known Keras tutorial with Keras instead of TensorFlow: its calls under `patch`, and its states."""

import keras
import numpy as np
import pytest
import torch

from cellstack.keras import calls, patch

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # torch's with NumPy 2

FIRST = """
LSTM_CELL_SIZE = 4
state = (tf.zeros([1, LSTM_CELL_SIZE]),) * 2
lstm = tf.keras.layers.LSTM(LSTM_CELL_SIZE, return_sequences=True, return_state=True)
lstm.states = state
sample_input = tf.constant([[3, 2, 2, 2, 2, 2]], dtype=tf.float32)
new_shape = (1, 1, 6)
inputs = tf.constant(np.reshape(sample_input, new_shape), dtype=tf.float32)
output, final_memory_state, final_carry_state = lstm(inputs)
"""

STACKED = """
cells = [tf.keras.layers.LSTMCell(4), tf.keras.layers.LSTMCell(5)]
stacked_lstm = tf.keras.layers.StackedRNNCells(cells)
lstm_layer = tf.keras.layers.RNN(stacked_lstm, return_sequences=True, return_state=True)
sample_input = [[[1,2,3,4,3,2], [1,2,1,1,1,2], [1,2,2,2,2,2]], [[1,2,3,4,3,2], [3,2,2,1,1,2], [0,0,0,0,3,2]]]
x = tf.constant(np.reshape(sample_input, (2, 3, 6)), dtype=tf.float32)
output, final_memory_state, final_carry_state = lstm_layer(x)
"""


class tf:  # noqa: N801 — the tutorial's name of TensorFlow
    keras = keras
    float32 = "float32"
    zeros = staticmethod(keras.ops.zeros)
    constant = staticmethod(keras.ops.convert_to_tensor)


def test_the_tutorial_runs_with_its_shapes():
    cells = {"np": np, "tf": tf}
    calls(reset=True)
    with patch():
        exec(FIRST, cells)
        assert [tuple(cells[name].shape) for name in ("output", "final_memory_state", "final_carry_state")] == [
            (1, 1, 4),
            (1, 4),
            (1, 4),
        ]
        exec(STACKED, cells)
    assert tuple(cells["output"].shape) == (2, 3, 5)
    states = cells["final_memory_state"], cells["final_carry_state"]
    assert [tuple(torch.stack(list(state)).shape) for state in states] == [(2, 2, 4), (2, 2, 5)]
    assert calls().served == 1  # the call of three steps; Keras runs single steps
    plain = cells["lstm_layer"](cells["x"])
    for a, b in zip(keras.tree.flatten(plain), keras.tree.flatten([cells["output"], *states]), strict=True):
        torch.testing.assert_close(a, b)


def test_the_state_that_it_sets_is_used():
    ones = FIRST.replace("tf.zeros([1, LSTM_CELL_SIZE])", "tf.constant(np.ones((1, LSTM_CELL_SIZE), 'float32'))")
    without, under = {"np": np, "tf": tf}, {"np": np, "tf": tf}
    keras.utils.set_random_seed(0)
    exec(ones, without)
    keras.utils.set_random_seed(0)
    with patch():
        exec(ones, under)
    lstm, inputs = under["lstm"], under["inputs"]
    wanted = lstm(inputs, initial_state=list(under["state"]))
    for name, value in zip(("output", "final_memory_state", "final_carry_state"), wanted, strict=True):
        torch.testing.assert_close(under[name], value)
    torch.testing.assert_close(without["output"], lstm(inputs)[0])  # Keras silently starts from zeros
    assert not torch.allclose(without["output"], under["output"])
