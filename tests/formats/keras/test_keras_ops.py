"""Keras 3's operations, layers that become several nodes, and states, compared with Keras."""

import json
import tracemalloc
import warnings

import keras
import numpy as np
import pytest
import tolerances
from keras import ops

from cellstack import FormatError, load
from cellstack.formats import keras as adapter
from cellstack.nodes import Activation, Clip, Dense, GlobalPool, Masking, Merge, Pad, Permute, Reduce

L = keras.layers


def sequences(units=4, **settings):
    return L.LSTM(units, return_sequences=True, **settings)


def attended(h):
    """The weighted mean over time of hand-written attention layers."""
    return ops.sum(h * ops.softmax(L.Dense(1, activation="tanh")(h), axis=1), axis=1)


def attended_by_layers(h):
    score = L.Activation("softmax")(L.Flatten()(L.Dense(1, activation="tanh")(h)))
    return L.Multiply()([h, L.Permute((2, 1))(L.RepeatVector(4)(score))])


def both(i):
    ahead, back = L.Bidirectional(sequences(), merge_mode=None)(i)
    return L.Concatenate()([ahead, L.Dense(2)(back)])


def states_of_both(i):
    y, ahead, back = L.Bidirectional(L.GRU(4, return_sequences=True, return_state=True))(i)
    return L.Concatenate()([L.GlobalMaxPooling1D()(y), ahead, back])


def two_of(i, cut):
    one, other = ops.split(i, cut, axis=-1)
    return L.Concatenate()([L.LSTM(3)(one), L.GRU(2)(other)])


def frames(i):
    """Three frames of two steps out of the six steps."""
    return L.Reshape((2, 3, 3))(i)


def per_frame(*layers):
    return L.TimeDistributed(keras.Sequential([keras.Input((3, 3)), *layers]))


OPERATIONS = {
    "the last step": lambda i: L.Dense(2)(sequences()(i)[:, -1]),
    "the last step, kept": lambda i: sequences()(i)[:, -1:, :],
    "the second step": lambda i: sequences()(i)[:, 1, :],
    "every second step": lambda i: L.LSTM(4)(i[:, 1:5:2]),
    "some features": lambda i: L.LSTM(4)(i[..., 1:]),
    "one feature": lambda i: L.Dense(2)(i[:, :, 1]),
    "an axis more": lambda i: L.LSTM(4)(i[:, :, 0][:, :, None]),
    "take": lambda i: ops.take(sequences()(i), -2, axis=1),
    "squeeze": lambda i: ops.squeeze(L.Dense(1)(sequences()(i)), axis=-1),
    "expand": lambda i: L.LSTM(4)(ops.expand_dims(L.GRU(3)(i), 1)),
    "concatenate": lambda i: L.LSTM(4)(ops.concatenate([i, L.Dense(2)(i)], axis=-1)),
    "concatenate in time": lambda i: L.LSTM(4)(ops.concatenate([i, i], axis=1)),
    "stack": lambda i: L.LSTM(4)(ops.stack([L.GRU(3)(i), L.LSTM(3)(i)], axis=1)),
    "split": lambda i: two_of(L.Dense(4)(i), 2),
    "split unevenly": lambda i: two_of(L.Dense(5)(i), [2]),
    "mean": lambda i: ops.mean(sequences()(i), axis=1),
    "mean, kept": lambda i: L.LSTM(2)(ops.mean(sequences()(i), axis=1, keepdims=True)),
    "mean of features": lambda i: ops.mean(sequences()(i), axis=-1),
    "max": lambda i: ops.max(sequences()(i), axis=1),
    "min": lambda i: ops.min(sequences()(i), axis=2),
    "sum": lambda i: ops.sum(sequences()(i), axis=1),
    "sum of features": lambda i: ops.sum(L.LSTM(4)(i), axis=-1, keepdims=True),
    "sum within frames": lambda i: L.LSTM(2)(ops.sum(frames(i), axis=2)),
    "add": lambda i: sequences(3)(i) + i,
    "multiply": lambda i: sequences(3)(i) * i,
    "subtract": lambda i: sequences(3)(i) - i,
    "maximum": lambda i: ops.maximum(sequences(3)(i), i),
    "minimum": lambda i: ops.minimum(sequences(3)(i), i),
    "a number more": lambda i: 1.5 + L.LSTM(3)(i),
    "a number less": lambda i: L.LSTM(3)(i - 0.5),
    "a number less it": lambda i: 1.0 - L.LSTM(3)(i),
    "a number times": lambda i: L.LSTM(3)(i * 0.1),
    "over a number": lambda i: L.LSTM(3)(i / 255.0),
    "numbers within frames": lambda i: L.LSTM(3)(ops.reshape(2.0 - frames(i) * 3.0, (-1, 6, 3))),
    "at least": lambda i: ops.maximum(L.LSTM(3)(i), 0.25),
    "negative": lambda i: -L.LSTM(3)(i),
    "square": lambda i: ops.square(L.LSTM(3)(i)),
    "absolute": lambda i: ops.abs(L.LSTM(3)(i)),
    "activations": lambda i: ops.relu(ops.tanh(L.Dense(3)(ops.sigmoid(L.Dense(3)(ops.exp(L.LSTM(3)(i))))))),
    "activations with parameters": lambda i: ops.gelu(ops.leaky_relu(ops.elu(L.LSTM(3)(i)), 0.3), approximate=False),
    "softmax": lambda i: ops.softmax(L.LSTM(3)(i), axis=-1),
    "softmax over time": lambda i: ops.softmax(sequences()(i), axis=1),
    "reshape": lambda i: L.LSTM(3)(ops.reshape(i, (-1, 3, 6))),
    "transpose": lambda i: L.LSTM(3)(ops.transpose(i, (0, 2, 1))),
    "swap": lambda i: L.LSTM(3)(ops.swapaxes(i, -1, 1)),
    "flip": lambda i: L.LSTM(3)(ops.flip(i, axis=1)),
    "cast": lambda i: L.LSTM(3)(ops.cast(i, "float32")),
    "repeat": lambda i: L.LSTM(3)(ops.repeat(ops.expand_dims(L.GRU(3)(i), 1), 4, axis=1)),
    "tile": lambda i: L.LSTM(3)(ops.tile(i, [1, 2, 3])),
    "attention by hand": lambda i: attended(sequences()(i)),
    "attention of layers": lambda i: attended_by_layers(sequences()(i)),
    "dot over time": lambda i: L.Dot(axes=1)([L.Softmax(axis=1)(L.Dense(1)(i)), i]),
    "dot": lambda i: L.Dot(axes=1)([L.LSTM(4)(i), L.GRU(4)(i)]),
    "minimum of layers": lambda i: L.Minimum()([L.LSTM(4)(i), L.GRU(4)(i), L.SimpleRNN(4)(i)]),
    "parametric relu": lambda i: L.LSTM(4)(L.PReLU(shared_axes=[1])(L.Dense(4)(i))),
    "parametric relu of steps": lambda i: L.LSTM(4)(L.PReLU()(L.Dense(4)(i))),
    "parametric relu of all": lambda i: L.PReLU(shared_axes=[1])(L.LSTM(4)(i)),
    "bounded relu": lambda i: L.ReLU(max_value=0.3)(L.ReLU(max_value=6.0)(L.LSTM(4)(i))),
    "gelu as it is by default": lambda i: ops.gelu(L.LSTM(3)(i) * 3.0),
    "activations of layers": lambda i: L.Dense(3, "swish")(L.Dense(3, "gelu")(L.Dense(3, "selu")(L.LSTM(4)(i)))),
    "rescaling": lambda i: L.LSTM(4)(L.Rescaling(1 / 255.0, offset=-0.5)(i)),
    "zero padding": lambda i: L.LSTM(4)(L.ZeroPadding1D((2, 1))(i)),
    "up-sampling": lambda i: L.LSTM(4)(L.UpSampling1D(3)(i)),
    "a pool that keeps time": lambda i: L.LSTM(4)(L.GlobalAveragePooling1D(keepdims=True)(i)),
    "batch normalisation of steps": lambda i: L.LSTM(3)(L.BatchNormalization(axis=1)(i)),
    "convolutions by channel": lambda i: L.LSTM(3)(
        L.SeparableConv1D(4, 2)(L.DepthwiseConv1D(2, depth_multiplier=2)(i))
    ),
    "both directions": both,
    "both directions summed": lambda i: L.Add()(L.Bidirectional(L.LSTM(4), merge_mode=None)(i)),
    "a state": lambda i: L.Dense(2)(sequences(return_state=True)(i)[1]),
    "a state and a step": lambda i: L.Concatenate()(L.LSTM(4, return_state=True)(i)[:2]),
    "a state backwards": lambda i: sequences(return_state=True, go_backwards=True)(i)[1],
    "states of both ways": states_of_both,
    "a model at every step": lambda i: L.LSTM(3)(
        L.TimeDistributed(
            keras.Sequential([keras.Input((3,)), L.Dense(5, "relu"), L.BatchNormalization(), L.Dense(2)])
        )(i)
    ),
    "a convolution of frames": lambda i: L.LSTM(3)(
        L.TimeDistributed(L.Flatten())(
            L.TimeDistributed(L.MaxPooling1D(2))(L.TimeDistributed(L.Conv1D(4, 2))(frames(i)))
        )
    ),
    "a model of frames": lambda i: L.LSTM(3)(
        per_frame(L.Conv1D(4, 3, padding="same", activation="relu"), L.Dropout(0.5), L.GlobalMaxPooling1D())(frames(i))
    ),
    "causal frames": lambda i: L.LSTM(3)(per_frame(L.Conv1D(4, 2, 2, padding="causal"), L.Flatten())(frames(i))),
}


def randomise(model, rng):
    for weight in model.weights:
        if not str(weight.dtype).startswith("int"):
            many = len(weight.shape) > 1
            weight.assign(rng.normal(size=weight.shape) * 0.6 if many else rng.uniform(0.3, 1.5, weight.shape))


def close(ours, theirs):
    assert ours.shape == theirs.shape
    scale = max(1.0, np.abs(theirs).max(initial=0.0))
    np.testing.assert_allclose(ours, theirs, atol=tolerances.KERAS * scale, rtol=0)


def weights_of(model, path):
    """Write only the weights; Keras's torch backend causes a NumPy warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_weights(path)
    return path


def ways(model, folder):
    """The network of a model, read from every kind of file and from memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for suffix in (".keras", ".h5"):
            model.save(folder / f"model{suffix}")
            yield adapter.load(folder / f"model{suffix}")
    weights_of(model, folder / "model.weights.h5")
    yield adapter.load(folder / "model.weights.h5", architecture=model.to_json())
    yield adapter.of_model(model)


def compare(model, folder, x):
    theirs = model(x).detach().numpy()
    for net in ways(model, folder):
        close(net(x), theirs)
    return net


@pytest.mark.parametrize("what", OPERATIONS)
def test_operations_and_layers_of_several_nodes(tmp_path, what):
    rng = np.random.default_rng(0)
    inputs = keras.Input((6, 3))
    model = keras.Model(inputs, OPERATIONS[what](inputs))
    randomise(model, rng)
    x = rng.normal(size=(4, 6, 3)).astype("float32")
    net = compare(model, tmp_path, x)
    copy = tmp_path / "copy.safetensors"
    net.save(copy)
    assert np.array_equal(load(copy)(x), net(x))


MASKED = {
    "an operation ends a mask": lambda e: L.LSTM(3)(sequences(3)(e) + e),
    "so does a number": lambda e: L.LSTM(3)(e * 2.0),
    "a slice": lambda e: L.LSTM(3)(sequences(3)(e)[:, 1:]),
    "the last step": lambda e: sequences(3)(e)[:, -1],
    "the mean": lambda e: ops.mean(sequences(3)(e), axis=1),
    "a layer keeps it": lambda e: L.LSTM(3)(L.Add()([sequences(3)(e), e])),
    "so does a concatenation": lambda e: L.LSTM(3)(L.Concatenate()([sequences(3)(e), e])),
    "also in time": lambda e: L.LSTM(3)(L.Concatenate(axis=1)([sequences(3)(e), e])),
    "and a parametric relu": lambda e: L.LSTM(3)(L.PReLU(shared_axes=[1])(e)),
    "a bounded relu": lambda e: L.LSTM(3)(L.ReLU(max_value=0.5)(e)),
    "a padding ends it": lambda e: L.LSTM(3)(L.ZeroPadding1D(1)(e)),
    "a copy of steps ends it": lambda e: L.LSTM(3)(L.UpSampling1D(2)(e)),
    "a state": lambda e: sequences(3, return_state=True)(e)[1],
    "a layer at every step": lambda e: L.LSTM(3)(L.TimeDistributed(L.Dense(2))(e)),
}


@pytest.mark.parametrize("what", MASKED)
@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask attached to it")
@pytest.mark.filterwarnings("ignore:Layer .* does not support")
def test_where_masks_are_dropped(tmp_path, what):
    rng = np.random.default_rng(0)
    inputs = keras.Input((6,))
    model = keras.Model(inputs, MASKED[what](L.Embedding(7, 3, mask_zero=True)(inputs)))
    randomise(model, rng)
    x = rng.integers(1, 7, (4, 6))
    x[1, 3:] = x[2, 5:] = x[3, 2] = 0
    compare(model, tmp_path, x)


def test_a_siamese_model(tmp_path):
    """An embedding and an LSTM that are used twice, and the distance between their outputs."""
    a, b = keras.Input((5,), name="a"), keras.Input((7,), name="b")
    table, lstm = L.Embedding(9, 3), L.LSTM(4)
    one, other = lstm(table(a)), lstm(table(b))
    model = keras.Model([a, b], L.Dense(1)(ops.abs(one - other)))
    rng = np.random.default_rng(0)
    randomise(model, rng)
    x = [rng.integers(0, 9, (3, 5)), rng.integers(0, 9, (3, 7))]
    compare(model, tmp_path, x)


@pytest.mark.long
def test_int8_weights(tmp_path):
    """Dense and Embedding after `quantize`: weights are dequantised; the metadata says that inputs aren't rounded."""
    rng = np.random.default_rng(0)
    inputs = keras.Input((6,))
    model = keras.Model(inputs, L.Dense(2)(L.Dense(5, "relu")(L.LSTM(4)(L.Embedding(9, 4)(inputs)))))
    randomise(model, rng)
    whole = keras.Model.from_config(model.get_config())
    for mine, other in zip(whole.weights, model.weights, strict=True):
        mine.assign(other.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.quantize("int8")
    by_name = {layer.name: layer for layer in model.layers}
    for layer in whole.layers:  # as in Keras, except for the rounding of inputs
        quantised = by_name[layer.name]
        if isinstance(layer, L.Dense):
            layer.kernel.assign(quantised._kernel.value / quantised.kernel_scale.value)
        elif isinstance(layer, L.Embedding):
            layer.embeddings.assign(quantised._embeddings.value / quantised.embeddings_scale.value[:, None])
    x = rng.integers(0, 9, (4, 6))
    for net in ways(model, tmp_path):
        close(net(x), whole(x).detach().numpy())
        assert "aren't rounded to 8 bits" in net.metadata["source"]["assumed"]
    assert np.abs(net(x) - model(x).detach().numpy()).max() < 2e-2


def test_operations_that_need_a_length_keep_that_of_the_file(tmp_path):
    inputs = keras.Input((6, 3))
    cut = adapter.of_model(keras.Model(inputs, ops.split(sequences()(inputs), 2, axis=1)[0]))
    assert cut.shapes[cut.inputs[0]] == (6, 3)
    total = adapter.of_model(keras.Model(inputs, ops.sum(sequences()(inputs), axis=1)))
    assert total.shapes[total.inputs[0]] == (None, 3)
    mean = adapter.of_model(keras.Model(inputs, ops.mean(sequences()(inputs)[:, -1:], axis=1)))
    assert mean.shapes[mean.inputs[0]] == (None, 3)
    last = adapter.of_model(keras.Model(inputs, sequences()(inputs)[:, -1]))
    stream = last.stream()
    x = np.random.default_rng(0).normal(size=(1, 9, 3))
    steps = [stream.step(x[:, t]) for t in range(9)]
    assert np.array_equal(steps[-1], last(x))
    anything = keras.Input((None, 3))
    with pytest.raises(FormatError, match="needs the length of axis 1, which the file doesn't specify"):
        adapter.of_model(keras.Model(anything, ops.reshape(sequences()(anything), (-1, 12))))


ONE_NODE = {  # Keras operations on sequences [B, 6, 3] that become one node
    "ReLU up to a bound": (lambda x: L.ReLU(max_value=0.8)(x), Clip(0.0, 0.8)),
    "ReLU6": (lambda x: L.ReLU(max_value=6.0)(x), Activation("relu6")),
    "from 0 to 6": (lambda x: ops.clip(x, 0, 6), Activation("relu6")),
    "zeros around": (lambda x: L.ZeroPadding1D((2, 1))(x), Pad(2, 1)),
    "a mean that stays": (lambda x: L.GlobalAveragePooling1D(keepdims=True)(x), Reduce("mean", 1, True)),
    "the greatest, which stays": (lambda x: L.GlobalMaxPooling1D(keepdims=True)(x), Reduce("max", 1, True)),
    "the least of two": (lambda x: L.Minimum()([x, x]), Merge("min")),
    "bounds": (lambda x: ops.clip(x, -0.5, 0.8), Clip(-0.5, 0.8)),
    "one bound": (lambda x: ops.minimum(x, 0.8), Clip(None, 0.8)),
    "the other": (lambda x: ops.maximum(x, -0.5), Clip(-0.5, None)),
    "no less than zero": (lambda x: ops.maximum(x, 0.0), Activation("relu")),
    "a sum over time": (lambda x: ops.sum(x, axis=1), Reduce("sum", 1)),
    "the least over time": (lambda x: ops.min(x, axis=1, keepdims=True), Reduce("min", 1, True)),
    "a sum of features": (lambda x: ops.sum(x, axis=-1, keepdims=True), Reduce("sum", -1, True)),
    "the greatest over time": (lambda x: ops.max(x, axis=1), GlobalPool("max")),
}


@pytest.mark.parametrize(
    ("work", "activation"),
    [
        (lambda x: ops.clip(x, 0, 6), "relu6"),
        (lambda x: ops.relu6(x), "relu6"),
        (lambda x: ops.maximum(x, 0.0), "relu"),
        (lambda x: x * ops.sigmoid(x), "silu"),
        (lambda x: ops.silu(x), "silu"),
    ],
)
def test_activations_after_a_dense_become_its_own_in_every_notation(work, activation, tmp_path):
    inputs = keras.Input((None, 3))
    model = keras.Model(inputs, work(L.Dense(4)(inputs)))
    x = np.random.default_rng(0).normal(size=(4, 6, 3)).astype("float32")
    for net in ways(model, tmp_path):
        assert [(type(node), node.activation) for node in net.nodes] == [(Dense, activation)]
        close(net(x), model(x).detach().numpy())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("work", "node"), ONE_NODE.values(), ids=ONE_NODE.keys())
def test_operations_that_become_one_node(work, node, masked, tmp_path):
    inputs = keras.Input((6, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warns that a layer drops the mask
        model = keras.Model(inputs, work(L.Masking(0.0)(inputs) if masked else inputs))
        x = np.random.default_rng(0).normal(size=(4, 6, 3)).astype("float32")
        x[:, -2:] = 0.0
        wanted = model(x).detach().numpy()
    for net in ways(model, tmp_path):
        close(net(x), wanted)
        found = [one for one in net.nodes if not isinstance(one, (Masking, Permute))]
        assert [(type(one), one.summary) for one in found] == [(type(node), node.summary)]
        assert masked or len(net.nodes) == 1


def changed(model, change):
    """A model's description, with one operation's changed."""
    config = json.loads(model.to_json())
    for layer in config["config"]["layers"]:
        if "ops" in (layer.get("module") or ""):
            change(layer)
    return config


DAMAGED = {
    "another operation": (lambda layer: layer.update(class_name="Bogus", registered_name=None), "Bogus"),
    "no arguments": (
        lambda layer: layer["inbound_nodes"][0].update(args=[]),
        "this operation isn't supported|expected",
    ),
    "no key": (lambda layer: layer["inbound_nodes"][0]["args"].pop(), "expected"),
    "a text": (lambda layer: layer["inbound_nodes"][0]["args"].__setitem__(1, "x"), "expected"),
    "a step of 0": (
        lambda layer: layer["inbound_nodes"][0]["args"][1][1]["config"].update(step=0),
        "a slice of integers",
    ),
    "a text in a slice": (lambda layer: layer["inbound_nodes"][0]["args"][1][1]["config"].update(start="a"), "slice"),
    "too many keys": (lambda layer: layer["inbound_nodes"][0]["args"][1].extend([0, 0]), "at most 3 keys"),
    "a step that isn't": (
        lambda layer: layer["inbound_nodes"][0]["args"][1].__setitem__(1, 99),
        "index 99 is out of range for axis 1",
    ),
    "lists in each other": (
        lambda layer: layer["inbound_nodes"][0]["args"].__setitem__(1, json.loads("[" * 900 + "]" * 900)),
        "lists are nested more than 16 deep",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_operations(tmp_path, what):
    change, message = DAMAGED[what]
    inputs = keras.Input((6, 3))
    model = keras.Model(inputs, L.Dense(2)(sequences()(inputs)[:, 1:3]))
    path = weights_of(model, tmp_path / "m.weights.h5")
    with pytest.raises(FormatError, match=message):
        adapter.load(path, architecture=json.dumps(changed(model, change)))


def test_wide_inputs_in_a_file_allocate_no_large_arrays(tmp_path):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, L.Dense(2)(inputs * 2.0))
    path = weights_of(model, tmp_path / "m.weights.h5")
    config = json.loads(model.to_json())
    config["config"]["layers"][0]["config"]["batch_shape"] = [None, 2**31 - 1]
    with pytest.raises(FormatError, match="more than 16777216 numbers that aren't stored in the file"):
        adapter.load(path, architecture=config)


def test_a_gelu_without_the_setting_approximate(tmp_path):
    """Keras reads it with the default, `approximate=True`."""
    inputs = keras.Input((6, 3))
    model = keras.Model(inputs, ops.gelu(inputs * 2.0))
    config = changed(model, lambda layer: layer["config"].pop("approximate", None))
    assert "approximate" not in json.dumps(config)
    x = np.random.default_rng(0).normal(size=(2, 6, 3))
    net = adapter.load(weights_of(model, tmp_path / "m.weights.h5"), architecture=config)
    close(net(x), keras.Model.from_config(config["config"])(x).detach().numpy())


@pytest.mark.parametrize("of", [lambda i: ops.split(i, 3, axis=1)[0], lambda i: L.PReLU(shared_axes=[1])(i)])
def test_long_axes_in_a_file_make_no_long_lists(tmp_path, of):
    inputs = keras.Input((3, 1))
    model = keras.Model(inputs, of(inputs))
    path = weights_of(model, tmp_path / "m.weights.h5")
    config = json.loads(model.to_json())
    first, last = config["config"]["layers"]
    first["config"]["batch_shape"] = [None, 900_000_000, 1]
    if "PReLU" in last["class_name"]:
        first["config"]["batch_shape"] = [None, 3, 900_000_000]
    else:
        text = json.dumps(last["inbound_nodes"]) + json.dumps(last["config"])
        assert "3" in text
        for where in (last["config"], last["inbound_nodes"][0]["kwargs"]):
            if "indices_or_sections" in where:
                where["indices_or_sections"] = 900_000_000
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="more than 16777216 numbers that aren't stored in the file"):
            adapter.load(path, architecture=config)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
