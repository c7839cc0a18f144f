"""Settings of Keras's layers with unexpected meanings; and every setting changed, one at a time.

Whatever `cellstack.load` takes must give what Keras gives with the same file; all else is a `FormatError`.
"""

import copy
import io
import json
import random
import warnings
import zipfile

import keras
import numpy as np
import pytest
import tolerances
from test_keras_load import randomise

from cellstack import FormatError, load
from cellstack.formats import keras as adapter

L = keras.layers
STEPS, WIDTH = 6, 3
OTHERS = {  # other values of a text setting
    "activation": ["relu", "softmax", "hard_sigmoid", "gelu", "linear", "swish", "mish"],
    "recurrent_activation": ["hard_sigmoid", "tanh", "relu"],
    "padding": ["valid", "same", "causal"],
    "data_format": ["channels_first", "channels_last"],
    "merge_mode": ["sum", "mul", "ave", "concat", "max", None],
    "dtype": ["float64"],  # ours computes in the dtype of the weights, regardless of this setting
}
PASSED = {
    "build_config",
    "compile_config",
    "registered_name",
    "module",
    "shared_object_id",
}  # settings that don't matter


def ids(build):
    return keras.Input((STEPS,), dtype="int32"), build


def numbers(build):
    return keras.Input((STEPS, WIDTH)), build


MODELS = {
    "words": lambda: ids(
        lambda x: L.Dense(3, "softmax")(L.Bidirectional(L.LSTM(4))(L.Embedding(7, 5, mask_zero=True)(x)))
    ),
    "a stack": lambda: numbers(
        lambda x: L.Activation("sigmoid")(L.Dense(2)(L.GRU(4)(L.LSTM(4, return_sequences=True)(L.Masking(0.0)(x)))))
    ),
    "a convolution": lambda: numbers(
        lambda x: L.LSTM(3)(L.MaxPooling1D(2)(L.ReLU()(L.BatchNormalization()(L.Conv1D(4, 2, padding="same")(x)))))
    ),
    "norms": lambda: numbers(
        lambda x: L.SimpleRNN(3)(L.LayerNormalization()(L.Softmax()(L.LeakyReLU()(L.Rescaling(0.5)(x)))))
    ),
    "shapes": lambda: numbers(
        lambda x: L.Flatten()(L.Permute((2, 1))(L.Cropping1D((1, 1))(L.ZeroPadding1D((1, 2))(L.UpSampling1D(2)(x)))))
    ),
    "two branches": lambda: numbers(
        lambda x: L.Concatenate()([L.GlobalAveragePooling1D()(x), L.RNN([L.LSTMCell(3), L.GRUCell(2)])(x)])
    ),
    "frames": lambda: numbers(
        lambda x: L.GlobalMaxPooling1D()(L.AveragePooling1D(2)(L.TimeDistributed(L.Dense(4, "elu"))(x)))
    ),
    "merges": lambda: numbers(
        lambda x: L.RepeatVector(2)(
            L.Reshape((6,))(L.Add()([L.Dense(1)(x), L.SeparableConv1D(1, 3, padding="same")(x)]))
        )
    ),
}


def quietly(work):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return work()


def model_of(build):
    inputs, layers = build()
    model = keras.Model(inputs, layers(inputs))
    randomise(model, np.random.default_rng(1))
    return model


def written(model, path):
    """The members of the model's file."""
    quietly(lambda: model.save(path))
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def put(members, config, path):
    image = io.BytesIO()
    with zipfile.ZipFile(image, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, json.dumps(config) if name == "config.json" else data)
    path.write_bytes(image.getvalue())


def places(value, path=()):
    """The paths of the layers' settings in a description."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in PASSED:
                yield from places(inner, (*path, key))
        if path and path[-1] == "config":
            yield from ((*path, key) for key in value)
    elif not isinstance(value, list) or not value:
        yield path
    else:
        yield path
        for number, inner in enumerate(value):
            yield from places(inner, (*path, number))


REMOVED = object()


def others(path, value):
    """Other values for a setting."""
    name = next(key for key in reversed(path) if isinstance(key, str))
    yield from (other for other in OTHERS.get(name, ()) if other != value)
    if isinstance(path[-1], str) and path[-2:-1] == ("config",):
        yield REMOVED
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value - 1, -1, 0, None)
    elif isinstance(value, float):
        yield from (value + 0.5, -1.0, 0.0, None)
    elif value is None:
        yield from (True, 1, 2, 0.25, [1, 2])
    elif isinstance(value, list):
        yield from ([], value[:1], value[::-1], [*value, *value[-1:]])
    elif isinstance(value, str):
        yield from ("nothing", None)


def changes(config):
    for path in dict.fromkeys(places(config)):
        value = config
        for key in path:
            value = value[key]
        for other in others(path, value) if path else ():
            changed = copy.deepcopy(config)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            if other is REMOVED:
                del inner[path[-1]]
            else:
                inner[path[-1]] = other
            yield f"{'.'.join(map(str, path))} = {'removed' if other is REMOVED else other!r}", changed


def inputs_of(model, net, rng):
    """Random input with some masked steps."""
    shape = (3, *(axis or STEPS for axis in model.inputs[0].shape[1:]))
    if net.graph.ids:
        x = rng.integers(0, 7, shape)
        x[:, 4:] *= rng.integers(0, 2, (3, 1))
        return x
    x = rng.normal(size=shape).astype("float32")
    x[:, -2:] = 0.0
    return x


def check(path, rng):
    """Return whether we and Keras both accept a file; then both have to agree."""
    try:
        net = load(path)
    except FormatError:
        return False
    try:
        model = quietly(lambda: keras.saving.load_model(path))
        x = inputs_of(model, net, rng)
        wanted = quietly(lambda: model(x))
    except Exception:  # Keras may raise anything for a file that it can't read or run
        return False
    wanted = [value.detach().numpy() for value in (wanted if isinstance(wanted, (list, tuple)) else [wanted])]
    got = net(x)
    for one, other in zip(got if isinstance(got, tuple) else [got], wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerances.KERAS, atol=tolerances.KERAS * max(1, abs(other).max()))
    return True


def mutate(tmp_path, name, count):
    rng = np.random.default_rng(0)
    members = written(model_of(MODELS[name]), tmp_path / "model.keras")
    path = tmp_path / "changed.keras"
    put(members, json.loads(members["config.json"]), path)
    assert check(path, rng)
    every = list(changes(json.loads(members["config.json"])))
    random.Random(3).shuffle(every)
    agreed = 0
    for what, config in every[:count]:
        put(members, config, path)
        try:
            agreed += check(path, rng)
        except Exception as error:
            raise AssertionError(f"{name}: {what}: {type(error).__name__}") from error
    return agreed


@pytest.mark.parametrize("name", MODELS)
def test_settings_changed_one_at_a_time(tmp_path, name):
    assert mutate(tmp_path, name, 8) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_many_settings_changed_one_at_a_time(tmp_path, name):
    assert mutate(tmp_path, name, 400) >= 40


# ── settings with unexpected meanings ─────────────────────────────────────────────────────────────


def compared(model, x, tmp_path):
    """Compare Keras's model, in memory and in a file, with ours."""
    randomise(model, np.random.default_rng(2))
    quietly(lambda: model.save(tmp_path / "model.keras"))
    wanted = quietly(lambda: model(x)).detach().numpy()
    for net in (adapter.of_model(model), load(tmp_path / "model.keras")):
        np.testing.assert_allclose(net(x), wanted, rtol=0, atol=tolerances.KERAS)


@pytest.mark.parametrize("last", [True, False])
def test_a_masking_replaces_the_mask_before_it(tmp_path, last):
    rng = np.random.default_rng(0)
    words = rng.integers(0, 3, (4, STEPS))
    inputs = keras.Input((STEPS,), dtype="int32")
    embedded = L.Embedding(3, 2, mask_zero=True)(inputs)
    y = L.LSTM(3, return_sequences=not last)(L.Masking(0.25)(embedded))
    compared(keras.Model(inputs, y), words, tmp_path)
    inputs = keras.Input((STEPS, 2))
    y = L.LSTM(3, return_sequences=not last)(L.Masking(1.0)(L.Masking(0.0)(inputs)))
    compared(keras.Model(inputs, y), rng.integers(0, 2, (4, STEPS, 2)).astype("float32"), tmp_path)


def test_a_cropping_drops_a_mask(tmp_path):
    inputs = keras.Input((STEPS, 2))
    model = quietly(lambda: keras.Model(inputs, L.LSTM(3)(L.Cropping1D((1, 1))(L.Masking(0.0)(inputs)))))
    compared(model, np.random.default_rng(0).integers(0, 2, (4, STEPS, 2)).astype("float32"), tmp_path)


def test_rescaling_and_axes_that_are_not_the_last(tmp_path):
    x = np.random.default_rng(0).normal(size=(4, STEPS, WIDTH)).astype("float32")
    x[:, -2:] = 0.0
    for layers in (
        [L.Masking(0.0), L.Rescaling(0.5, offset=0.1), L.LSTM(3)],
        [L.LayerNormalization(axis=2), L.LSTM(3)],
        [L.BatchNormalization(axis=-2), L.LSTM(3)],
    ):
        compared(keras.Sequential([keras.Input((STEPS, WIDTH)), *layers]), x, tmp_path)


def test_a_layer_norm_over_time():
    """Keras can't compute it over PyTorch."""
    x, gain = np.random.default_rng(0).normal(size=(2, 4, STEPS, WIDTH)).astype("float32")[0], np.arange(1.0, STEPS + 1)
    inputs = keras.Input((STEPS, WIDTH))
    model = keras.Model(inputs, L.Activation("linear")(L.LayerNormalization(axis=1, epsilon=0.01)(inputs)))
    model.layers[1].set_weights([gain, -gain])
    wanted = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 0.01)
    wanted = wanted * gain[:, None] - gain[:, None]
    np.testing.assert_allclose(adapter.of_model(model)(x), wanted, rtol=0, atol=tolerances.KERAS)


REFUSED = {
    "padding of features": (lambda: L.ZeroPadding1D(1, data_format="channels_first"), "expected data_format channels"),
    "softmax over all": (lambda: L.Softmax(axis=None), "expected one axis, found None"),
    "softmax over two axes": (lambda: L.Softmax(axis=[1, 2]), r"expected one axis, found \[1, 2\]"),
    "a norm over two axes": (
        lambda: L.LayerNormalization(axis=[1, 2]),
        r"LayerNorm: expected gain \[W\], got \(6, 3\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_settings_are_refused_by_layer_name(tmp_path, case):
    make, message = REFUSED[case]
    inputs = keras.Input((STEPS, WIDTH))
    model = keras.Model(inputs, L.LSTM(3)(make()(inputs)))
    quietly(lambda: model.save(tmp_path / "model.keras"))
    with pytest.raises(FormatError, match=message):
        load(tmp_path / "model.keras")


@pytest.mark.parametrize("name", ["a stack", "two branches"])
def test_a_layer_that_is_called_without_a_tensor(tmp_path, name):
    members = written(model_of(MODELS[name]), tmp_path / "model.keras")
    for number in range(1, len(json.loads(members["config.json"])["config"]["layers"])):
        config = json.loads(members["config.json"])
        layer = config["config"]["layers"][number]
        layer["inbound_nodes"] = [{"args": [], "kwargs": {}}]
        put(members, config, tmp_path / "changed.keras")
        with pytest.raises(FormatError, match=f"{layer['name']}.*(found a call without any|this operation on masks)"):
            load(tmp_path / "changed.keras")
