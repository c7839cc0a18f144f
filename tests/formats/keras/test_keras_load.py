"""Keras files compared with Keras 3: random models of every supported layer, in both formats."""

import json
import warnings

import keras
import numpy as np
import pairs
import pytest
import tolerances

from cellstack import FormatError
from cellstack.formats import keras as adapter

L = keras.layers
FUNCTIONS = ["tanh", "relu", "sigmoid", "linear", "softsign", "softplus", "elu", "leaky_relu", "hard_sigmoid"]


def close(ours, theirs):
    assert ours.shape == theirs.shape
    scale = max(1.0, np.abs(theirs).max(initial=0.0))
    np.testing.assert_allclose(ours, theirs, atol=tolerances.KERAS * scale, rtol=0)


def randomise(model, rng):
    """Randomise every weight; those with one number per feature stay above 0, as variances must."""
    for weight in model.weights:
        if not str(weight.dtype).startswith("int"):
            many = len(weight.shape) > 1
            weight.assign(rng.normal(size=weight.shape) * 0.6 if many else rng.uniform(0.3, 1.5, weight.shape))


def written(model, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(path)
    return path


def outputs_of(model, x):
    y = model(x)
    return [one.detach().numpy() for one in (y if isinstance(y, (list, tuple)) else [y])]


def compare(net, model, x):
    ours = net(x)
    theirs = outputs_of(model, x)
    for mine, other in zip(ours if isinstance(ours, tuple) else [ours], theirs, strict=True):
        close(mine, other)


def pick(rng, choices):
    return choices[rng.integers(len(choices))]


def random_cell(rng, masked=False):
    kind = pick(rng, ["LSTM", "GRU", "SimpleRNN"])
    settings = {
        "units": int(rng.integers(1, 7)),
        "activation": pick(rng, FUNCTIONS[:3]),
        "use_bias": bool(rng.integers(4)),
    }
    if kind != "SimpleRNN":
        settings["recurrent_activation"] = pick(rng, ["sigmoid", "hard_sigmoid", "sigmoid", "tanh"])
    if kind == "GRU":
        settings["reset_after"] = bool(rng.integers(2))
    return kind, settings


def random_recurrent(rng, sequences, masked=False):
    flags = {"return_sequences": sequences, "dropout": float(pick(rng, [0.0, 0.3]))}
    shape = rng.integers(4)
    if shape == 0:
        cells = []
        for _ in range(int(rng.integers(1, 4))):
            kind, settings = random_cell(rng)
            cells.append(getattr(L, f"{kind}Cell")(**settings))
        flags.pop("dropout")
        return L.RNN(cells if len(cells) > 1 else cells[0], go_backwards=bool(rng.integers(2) and not masked), **flags)
    kind, settings = random_cell(rng)
    if shape == 1:
        mode = pick(rng, ["concat", "sum", "mul", "ave"])
        layer = getattr(L, kind)(**settings, **flags)
        if rng.integers(2):
            back = random_cell(rng)
            back[1]["units"] = settings["units"]
            backward = getattr(L, back[0])(**back[1], **flags, go_backwards=True)
            return L.Bidirectional(layer, merge_mode=mode, backward_layer=backward)
        return L.Bidirectional(layer, merge_mode=mode)
    backwards = bool(rng.integers(2)) and not (masked and sequences)
    return getattr(L, kind)(
        **settings, **flags, go_backwards=backwards, stateful=False, zero_output_for_mask=bool(rng.integers(2))
    )


def random_plain(rng):
    """A layer from sequences to sequences that passes a mask on."""
    return pick(
        rng,
        [
            lambda: L.Dense(int(rng.integers(1, 7)), activation=pick(rng, FUNCTIONS), use_bias=bool(rng.integers(2))),
            lambda: L.TimeDistributed(L.Dense(int(rng.integers(1, 7)), activation=pick(rng, FUNCTIONS))),
            lambda: L.Activation(pick(rng, FUNCTIONS)),
            lambda: L.ReLU(negative_slope=float(pick(rng, [0.0, 0.3]))),
            lambda: L.ReLU(threshold=0.5),
            lambda: L.LeakyReLU(negative_slope=0.17),
            lambda: L.ELU(alpha=0.7),
            lambda: L.Dropout(0.4),
            lambda: L.SpatialDropout1D(0.4),
            lambda: L.GaussianNoise(0.4),
            lambda: L.BatchNormalization(epsilon=0.01, center=bool(rng.integers(2)), scale=bool(rng.integers(2))),
            lambda: L.LayerNormalization(center=bool(rng.integers(2)), scale=bool(rng.integers(2))),
        ],
    )()


def random_window(rng):
    return pick(
        rng,
        [
            lambda: L.Conv1D(int(rng.integers(1, 5)), 3, padding="causal", dilation_rate=2, activation="relu"),
            lambda: L.Conv1D(4, 2, strides=2, padding="same", use_bias=False),
            lambda: L.Conv1D(4, 2, padding="valid"),
            lambda: L.MaxPooling1D(2, padding="same"),
            lambda: L.AveragePooling1D(2, strides=1),
            lambda: L.Cropping1D((1, 0)),
        ],
    )()


def random_head(rng, masked):
    heads = [
        lambda: [random_recurrent(rng, False, masked)],
        lambda: [L.GlobalAveragePooling1D()],
        lambda: [L.GlobalMaxPooling1D()],
        lambda: [L.Flatten()],
        lambda: [random_recurrent(rng, False, masked), L.RepeatVector(3), random_recurrent(rng, True)],
        lambda: [L.Flatten(), L.Reshape((-1, 1)), L.Permute((2, 1))],
    ]
    return pick(rng, heads if not masked else heads[:3])()


def random_sequential(rng):
    """A Sequential model and its input: ids, padded sequences or plain ones."""
    start, steps, width = int(rng.integers(3)), 8, int(rng.integers(1, 5))
    if start == 0:
        ids = rng.integers(0, 6, (3, steps))
        ids[:, -2:] = 0
        mask_zero = bool(rng.integers(2))
        layers, x, masked = [keras.Input((steps,)), L.Embedding(6, width, mask_zero=mask_zero)], ids, mask_zero
    else:
        x = rng.normal(size=(3, steps, width)).astype("float32")
        layers, masked = [keras.Input((steps, width))], start == 1
        if masked:
            x[1, 5:] = x[2, 2:4] = -1.0
            layers.append(L.Masking(-1.0))
    for _ in range(int(rng.integers(0, 4))):
        kind = int(rng.integers(3))
        if kind == 2 and not masked:
            layers.append(random_window(rng))
        else:
            layers.append(random_recurrent(rng, True, masked) if kind else random_plain(rng))
    layers += random_head(rng, masked)
    layers.append(L.Dense(4, activation="softmax"))
    return keras.Sequential(layers), x


@pairs.seeds(10, 40)
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore:Layer .* does not support")
def test_sequential_models(tmp_path, seed, suffix):
    rng = np.random.default_rng(seed)
    model, x = random_sequential(rng)
    randomise(model, rng)
    path = written(model, tmp_path / f"model{suffix}")
    net = adapter.load(path)
    compare(net, model, x)
    assert net.metadata["source"] == {"format": "keras", "producer": f"Keras {keras.__version__}"}
    again = adapter.of_model(model)
    assert again.names == net.names
    assert np.array_equal(np.asarray(again(x)), np.asarray(net(x)))


def functional(rng, masked):
    """A graph: two inputs, layers used twice, merges of every kind, a model within, two outputs."""
    ids, other = keras.Input((7,), name="ids"), keras.Input((7, 3), name="features")
    x = L.Embedding(9, 4, mask_zero=masked, name="table")(ids)
    shared = L.LSTM(4, return_sequences=True, name="shared")
    a, b = shared(x), shared(L.Dense(4, name="to_4")(x))
    merged = [pick(rng, [L.Add, L.Multiply, L.Average, L.Maximum])()([a, b]), L.Subtract()([a, b])]
    x = L.Concatenate(name="both")(merged) if not masked else merged[0]
    x = L.BatchNormalization()(x)
    inner = keras.Sequential([keras.Input(other.shape[1:]), L.GRU(3, return_sequences=True), L.Dense(2)], name="inner")
    y = L.Bidirectional(L.SimpleRNN(3), name="both_ways")(inner(other))
    z = random_recurrent(rng, False, masked)(x)
    out = L.Concatenate()([y, z])
    return keras.Model([ids, other], [L.Dense(3, activation="softmax", name="label")(out), L.Dropout(0.5)(y)])


@pairs.seeds(6, 20)
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_functional_models(tmp_path, seed, suffix):
    rng = np.random.default_rng(seed)
    model = functional(rng, masked=bool(seed % 2))
    randomise(model, rng)
    x = [rng.integers(0, 9, (3, 7)), rng.normal(size=(3, 7, 3)).astype("float32")]
    x[0][:, 4:] = 0
    net = adapter.load(written(model, tmp_path / f"model{suffix}"))
    assert net.inputs == ("ids", "features")
    compare(net, model, x)
    parts = adapter.extract(tmp_path / f"model{suffix}")
    assert parts.keys() > {"shared", f"inner.{model.get_layer('inner').layers[0].name}", "both_ways"}
    assert len(parts) == 4
    ones = np.ones((2, 5, 2), "float32")
    close(parts["both_ways"](ones), outputs_of(model.get_layer("both_ways"), ones)[0])


def test_weights_only_with_a_separate_architecture(tmp_path):
    model = keras.Sequential([keras.Input((None, 3)), L.LSTM(4, return_sequences=True), L.LSTM(4), L.Dense(2)])
    randomise(model, np.random.default_rng(0))
    path = tmp_path / "model.weights.h5"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_weights(path)
    (tmp_path / "model.json").write_text(model.to_json())
    x = np.random.default_rng(1).normal(size=(2, 5, 3)).astype("float32")
    ways = [model.to_json(), json.loads(model.to_json()), tmp_path / "model.json", str(tmp_path / "model.json")]
    for way in ways:
        compare(adapter.load(path, architecture=way), model, x)
    parts = adapter.extract(path, ways[0])
    assert [net.nodes[0].cells[0].spec.input_size for net in parts.values()] == [3, 4]
    with pytest.raises(FormatError, match=r"weights only: .*architecture"):
        adapter.load(path)
    with pytest.raises(FormatError, match=r"weights only: .*architecture"):
        adapter.extract(path)
    written(model, tmp_path / "whole.keras")
    with pytest.raises(FormatError, match="architecture is for files of weights only"):
        adapter.load(tmp_path / "whole.keras", architecture=ways[0])


def test_only_the_weights_of_a_trained_model_are_read(tmp_path):
    model = keras.Sequential([keras.Input((5, 3)), L.LSTM(4, dropout=0.2), L.Dropout(0.1), L.Dense(2)])
    model.compile("adam", "mse", metrics=["mae"])
    x = np.random.default_rng(0).normal(size=(8, 5, 3)).astype("float32")
    model.fit(x, np.zeros((8, 2)), verbose=0)
    for suffix in (".keras", ".h5"):
        compare(adapter.load(written(model, tmp_path / f"model{suffix}")), model, x)


def test_layers_that_are_not_trainable(tmp_path):
    """HDF5 lists non-trainable weights after trainable ones, also in nested models."""
    frozen = L.Bidirectional(L.LSTM(3, return_sequences=True), trainable=False)
    still = L.Dense(6, trainable=False)
    inner = keras.Sequential([keras.Input((5, 6)), L.BatchNormalization(), still, L.BatchNormalization(), L.Dense(2)])
    model = keras.Sequential([keras.Input((5, 2)), frozen, inner, L.GRU(2)])
    randomise(model, np.random.default_rng(0))
    x = np.random.default_rng(1).normal(size=(2, 5, 2)).astype("float32")
    for suffix in (".keras", ".h5"):
        compare(adapter.load(written(model, tmp_path / f"model{suffix}")), model, x)


def test_float64(tmp_path):
    lstm, gru = L.LSTM(3, return_sequences=True, dtype="float64"), L.GRU(2, dtype="float64")
    inputs = keras.Input((5, 2), dtype="float64")
    model = keras.Model(inputs, gru(lstm(inputs)), dtype="float64")
    randomise(model, np.random.default_rng(0))
    x = np.random.default_rng(1).normal(size=(2, 5, 2))
    for suffix in (".keras", ".h5"):
        net = adapter.load(written(model, tmp_path / f"model{suffix}"))
        assert net.dtype == np.float64
        theirs = outputs_of(model, x)[0]
        # Keras 3.12, the last for Python 3.10, rounds some values to float32.
        np.testing.assert_allclose(
            net(x), theirs, rtol=0, atol=tolerances.NETWORK if keras.__version__.startswith("3.12.") else 1e-12
        )


def test_standardising_layers(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(50.0, 3.0, size=(4, 6, 3)).astype("float32")
    adapted, given = L.Normalization(), L.Normalization(mean=[1.0, 2.0, 3.0], variance=[4.0, 5.0, 6.0])
    adapted.adapt(x)
    model = keras.Sequential([keras.Input((6, 3)), adapted, given, L.LSTM(2)])
    for suffix in (".keras", ".h5"):
        compare(adapter.load(written(model, tmp_path / f"model{suffix}")), model, x)


def test_sequences_may_have_any_length_unless_a_layer_fixes_it(tmp_path):
    model = keras.Sequential([keras.Input((5, 3)), L.LSTM(4), L.Dense(2)])
    net = adapter.load(written(model, tmp_path / "model.keras"))
    assert net.shapes[net.inputs[0]] == (None, 3)
    assert net(np.zeros((2, 9, 3))).shape == (2, 2)
    flat = keras.Sequential([keras.Input((5, 3)), L.LSTM(4, return_sequences=True), L.Flatten(), L.Dense(2)])
    net = adapter.load(written(flat, tmp_path / "flat.keras"))
    assert net.shapes[net.inputs[0]] == (5, 3)


@keras.saving.register_keras_serializable(package="tests")
class Odd(L.Layer):
    """A custom layer with a weight."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1],), name="kernel")

    def call(self, x):
        return x * self.w


def test_all_unsupported_layers_are_named(tmp_path):
    inputs = keras.Input((5, 3))
    x = L.LSTM(4, return_sequences=True, name="fine")(inputs)
    x = Odd(name="odd_one")(x)
    x = L.UnitNormalization(name="unit_one")(x)
    x = L.Dense(3, activation="mish", name="mish_one")(x)
    x = L.ReLU(6.0, negative_slope=0.5, name="bounded")(x)
    model = keras.Model(inputs, L.GRU(2, name="after")(x))
    for suffix in (".keras", ".h5"):
        path = written(model, tmp_path / f"model{suffix}")
        with pytest.raises(FormatError) as caught:
            adapter.load(path)
        text = str(caught.value)
        for name in ("odd_one", "unit_one", "mish_one", "bounded"):
            assert repr(name) in text
        assert "'fine'" not in text
        assert text.startswith(f"{path}: ")
        assert text.endswith("gives its recurrent parts")
        assert list(adapter.extract(path)) == ["fine", "after"]
    with pytest.raises(FormatError, match="odd_one"):
        adapter.of_model(model)


REFUSED = {
    "an attention": lambda i: L.Attention()([i, i]),
    "channels first": lambda i: L.Conv1D(3, 2, data_format="channels_first")(i),
    "a recurrent activation": lambda i: L.LSTM(3, recurrent_activation="gelu")(i),
    "a lambda": lambda i: L.Lambda(lambda x: x + 1)(i),
    "another operation": lambda i: keras.ops.cumsum(L.LSTM(3, return_sequences=True)(i), axis=1),
    "rows that are mixed": lambda i: keras.ops.reshape(i, (-1, 3)),
    "a quotient": lambda i: i / (i + 2.0),
    "a part of the batch": lambda i: i[:2, :],
    "a recurrent layer within": lambda i: L.TimeDistributed(L.LSTM(2))(L.Reshape((5, 3, 1))(i)),
    "a convolution of pictures": lambda i: L.Conv2D(2, 2)(L.Reshape((5, 3, 1))(i)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_unsupported_layers_are_refused(tmp_path, what):
    inputs = keras.Input((5, 3))
    model = keras.Model(inputs, REFUSED[what](inputs))
    path = written(model, tmp_path / "model.keras")
    with pytest.raises(FormatError, match="expected layers that are supported, found: "):
        adapter.load(path)


@pytest.mark.parametrize(
    "between", [[], [L.Cropping1D((1, 2))], [L.Masking(0.5)], [L.Dense(2), L.Cropping1D(1), L.ReLU()]]
)
@pytest.mark.filterwarnings("ignore:Layer .* does not support")
def test_a_mask_is_passed_on_as_far_as_in_keras(between):
    """Cropping1D drops it, and a second Masking replaces it."""
    x = np.random.default_rng(0).normal(size=(4, 8, 2)).astype("float32")
    x[0, 3:], x[1, :2], x[2], x[3, 2] = 0.0, 0.0, 0.0, 0.5
    model = keras.Sequential([keras.Input((8, 2)), L.Masking(0.0), *between, L.LSTM(3)])
    compare(adapter.of_model(model), model, x)


def test_an_unused_state_is_ignored(tmp_path):
    inputs = keras.Input((5, 3))
    y, _, _ = L.LSTM(3, return_state=True, return_sequences=True)(inputs)
    model = keras.Model(inputs, y)
    x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype("float32")
    compare(adapter.load(written(model, tmp_path / "model.keras")), model, x)


def test_from_keras_refuses_other_objects():
    with pytest.raises(TypeError, match="expected a Sequential or functional model"):
        adapter.of_model(L.LSTM(3))

    class Mine(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(TypeError, match="got Mine"):
        adapter.of_model(Mine())
