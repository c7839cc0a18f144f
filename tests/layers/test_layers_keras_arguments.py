"""Compatibility with code for Keras: its objects, arguments that have no effect, and its method names."""

import json

import keras
import numpy as np
import pytest
import torch

from cellstack import ShapeError, layers
from cellstack.layers import weights

OF_OURS = {  # a Keras object, and the name or description of the same
    "kernel_initializer": (keras.initializers.HeNormal(seed=3), {"class_name": "HeNormal", "config": {"seed": 3}}),
    "recurrent_initializer": (
        keras.initializers.RandomNormal(0.1, 0.2, seed=4),
        {"class_name": "RandomNormal", "config": {"mean": 0.1, "stddev": 0.2, "seed": 4}},
    ),
    "bias_initializer": (keras.initializers.Constant(0.25), {"class_name": "Constant", "config": {"value": 0.25}}),
    "kernel_regularizer": (keras.regularizers.L1L2(0.1, 0.2), {"class_name": "L1L2", "config": {"l1": 0.1, "l2": 0.2}}),
    "recurrent_regularizer": (keras.regularizers.L2(0.3), {"class_name": "L2", "config": {"l2": 0.3}}),
    "activity_regularizer": (keras.regularizers.L1(0.25), {"class_name": "L1", "config": {"l1": 0.25}}),
    "kernel_constraint": (
        keras.constraints.MaxNorm(0.5),
        {"class_name": "MaxNorm", "config": {"max_value": 0.5, "axis": 0}},
    ),
    "recurrent_constraint": (keras.constraints.NonNeg(), {"class_name": "NonNeg", "config": {}}),
    "bias_constraint": (keras.constraints.UnitNorm(), {"class_name": "UnitNorm", "config": {"axis": 0}}),
}


@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU, layers.SimpleRNN])
def test_objects_of_keras_are_what_their_names_are(kind):
    given = {name: pair[0] for name, pair in OF_OURS.items()}
    described = {name: pair[1] for name, pair in OF_OURS.items()}
    x = torch.randn(2, 5, 3)
    ours, same = kind(4, **given), kind(4, **described)
    y = ours(x)
    assert torch.equal(y, same(x))
    assert torch.equal(torch.stack(ours.losses), torch.stack(same.losses))
    assert len(ours.losses) == 3
    for layer in (ours, same):
        layer.apply_constraints()
    for weight, other in zip(ours.get_weights(), same.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, other)
    assert {name: ours.get_config()[name] for name in described} == described
    again = kind.from_config(json.loads(json.dumps(ours.get_config())))  # only text, no Keras objects
    assert again.get_config() == ours.get_config()


class Ramp(keras.initializers.Initializer):
    """A user's initialiser in Keras's form: a callable of a shape."""

    def __call__(self, shape, dtype=None):
        return keras.ops.reshape(keras.ops.arange(int(np.prod(shape)), dtype=dtype), shape)


class Mean(keras.regularizers.Regularizer):
    def __call__(self, x):
        return keras.ops.mean(x)


class Half(keras.constraints.Constraint):
    def __call__(self, w):
        return w / 2


def test_classes_derived_from_keras_s_are_called_as_by_keras():
    layer = layers.LSTM(2, bias_initializer=Ramp(), unit_forget_bias=False, bias_regularizer=Mean(), input_size=3)
    np.testing.assert_array_equal(layer.get_weights()[2], np.arange(8, dtype=np.float32))
    assert [term.item() for term in layer.losses] == [3.5]
    layer = layers.GRU(2, kernel_initializer=Ramp(), kernel_constraint=Half(), input_size=3, dtype="float64")
    layer.apply_constraints()
    np.testing.assert_array_equal(layer.get_weights()[0], np.arange(18.0).reshape(3, 6) / 2)
    rows = layers.LSTM(2, recurrent_regularizer=keras.regularizers.OrthogonalRegularizer(mode="rows"), input_size=3)
    assert rows.losses[0].item() < 1e-6  # the initial rows are orthogonal
    rows.losses[0].backward()


def test_a_keras_initialiser_with_an_incomplete_description_is_called():
    layer = layers.SimpleRNN(3, recurrent_initializer=keras.initializers.Identity(0.5), input_size=2)
    np.testing.assert_array_equal(layer.get_weights()[1], np.eye(3, dtype=np.float32) / 2)
    seeded = keras.initializers.GlorotUniform(seed=keras.random.SeedGenerator(3))
    assert weights.described(seeded) is seeded
    layer = layers.LSTM(2, kernel_initializer=seeded, input_size=3)
    assert 0.0 < abs(layer.get_weights()[0]).max() < 1.0


def test_omitted_settings_of_keras_have_default_values():
    config = keras.initializers.serialize(keras.initializers.HeNormal(seed=1))
    config["config"] |= {"input_axes": None, "output_axes": None}  # as Keras 3.15 writes it
    ours = layers.SimpleRNN(4, kernel_initializer=config, input_size=3).get_weights()[0]
    same = layers.SimpleRNN(4, kernel_initializer=keras.initializers.HeNormal(seed=1), input_size=3).get_weights()[0]
    np.testing.assert_array_equal(ours, same)


@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU])
def test_arguments_without_effect_are_accepted_and_reported(kind):
    plain = kind(4, input_size=3)
    assert "no effect" not in str(plain.plan())
    layer = kind(4, use_cudnn=False, implementation=1, input_size=3)
    assert "; no effect: use_cudnn=False, implementation=1" in str(layer.plan())
    assert layer.get_config() | {"use_cudnn": "auto", "implementation": 2} == plain.get_config()
    assert kind.from_config(layer.get_config()).get_config() == layer.get_config()
    layer.set_weights(plain.get_weights())
    x = torch.randn(2, 5, 3)
    assert torch.equal(layer(x), plain(x))
    with pytest.raises(ValueError, match="expected use_cudnn to be 'auto', True or False, got 'yes'"):
        kind(4, use_cudnn="yes")
    with pytest.raises(ValueError, match="expected implementation to be 1 or 2, got 3"):
        kind(4, implementation=3)


def test_reset_state_is_keras_3_s_name():
    layer = layers.LSTM(4, stateful=True)
    x = torch.randn(2, 5, 3)
    first = layer(x)
    assert not torch.equal(layer(x), first)
    layer.reset_state()
    assert layer.states is None
    assert torch.equal(layer(x), first)


def test_the_states_of_a_stack_as_a_flat_list():
    lstm, gru = (torch.randn(2, 4), torch.randn(2, 4)), (torch.randn(2, 5),)
    nested, flat, x = [lstm, gru], [*lstm, *gru], torch.randn(2, 3, 6)
    stack = layers.RNN([layers.LSTMCell(4), layers.GRUCell(5)], return_state=True)
    expected = stack(x, initial_state=nested)
    for states in (flat, tuple(flat), [one.numpy() for one in flat]):
        assert all(map(torch.equal, map(as_row, stack(x, initial_state=states)), map(as_row, expected)))
    assert not torch.equal(stack(x, initial_state=[flat[1], flat[0], flat[2]])[0], expected[0])
    stack.states = flat
    assert all(map(torch.equal, [array for state in stack.states for array in state], flat))
    stack.reset_states(flat)
    assert torch.equal(stack(x)[0], expected[0])
    assert torch.equal(stack.cell(x[:, 0], flat)[0], stack.cell(x[:, 0], nested)[0])
    both = layers.Bidirectional(layers.RNN([layers.LSTMCell(4), layers.GRUCell(5)]))
    assert torch.equal(both(x, initial_state=flat + flat), both(x, initial_state=nested + nested))
    alone = layers.RNN([layers.LSTMCell(4)])
    assert torch.equal(alone(x, initial_state=list(lstm)), alone(x, initial_state=[lstm]))
    words = r"expected the state as one state per cell \(2\), or as a flat list of 3 arrays, got "
    for wrong, found in (
        (flat[:1], r"1 \(Tensor\)"),
        (flat + flat, r"6 \(Tensor, Tensor, Tensor, Tensor\)"),
        ([lstm, gru, gru], r"3 \(tuple, tuple, tuple\)"),
        (torch.zeros(3, 2, 4), "Tensor of length 3"),  # PyTorch's form, one array for all layers
    ):
        with pytest.raises(ShapeError, match=words + found):
            stack(x, initial_state=wrong)
    with pytest.raises(ShapeError, match=r"expected h of state of layer 1 \[B=2, H=5\], got \(2, 4\)"):
        stack(x, initial_state=[*lstm, lstm[0]])


def as_row(result):
    return torch.cat(list(result), 1) if isinstance(result, tuple) else result


class Counting(keras.layers.Layer):
    supports_masking = True

    def call(self, inputs, mask=None, training=None):
        return keras.ops.where(keras.ops.expand_dims(mask, -1), inputs, 0.0) if training is False else inputs


def test_time_distributed_passes_mask_and_training_to_a_keras_layer():
    x, mask = torch.ones(2, 3, 4), torch.tensor([[True, False, True], [True, True, False]])
    y = layers.TimeDistributed(Counting())(x, mask=mask, training=False)
    assert torch.equal(y, mask.unsqueeze(-1).expand(2, 3, 4).float())
    assert torch.equal(layers.TimeDistributed(Counting())(x, mask=mask, training=True), x)


@pytest.mark.parametrize(
    "inner", [lambda: layers.LSTM(6, input_size=5), lambda: layers.Bidirectional(layers.GRU(3, input_size=5))]
)
def test_a_mask_of_steps_of_sequences_leaves_out_whole_sequences(inner):
    layer = layers.TimeDistributed(inner())
    x, mask = torch.randn(2, 3, 4, 5), torch.tensor([[True, False, True], [True, True, False]])
    y = layer(x, mask=mask)
    assert torch.equal(y, layer(x, mask=mask.unsqueeze(2).expand(2, 3, 4)))
    assert not torch.equal(y, layer(x))
    assert torch.equal(y[0, 1], torch.zeros(6))  # all steps are masked: the initial state
