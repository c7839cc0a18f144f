"""RTNeural's JSON and neural-amp-modeler's .nam, compared with the Keras and torch models that they come from."""

import json

import keras
import numpy as np
import pytest
import torch

import cellstack as cs
from cellstack.cells.errors import FormatError
from cellstack.formats.json import nam

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras on torch

NEAR = 1e-6  # float32 on both sides


def rng_floats(*shape, seed=0, scale=0.5):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def entry(layer, shape, **more):
    """A layer in the form of RTNeural's exporter."""
    activation = getattr(getattr(layer, "activation", None), "__name__", "")
    weights = [array.tolist() for array in layer.get_weights()]
    words = {"LSTM": "lstm", "GRU": "gru", "Dense": "dense", "Conv1D": "conv1d", "PReLU": "prelu",
             "BatchNormalization": "batchnorm", "Activation": "activation"}  # fmt: skip
    kind = words[type(layer).__name__]
    return {
        "type": kind,
        "activation": "" if activation == "linear" else activation,
        "shape": shape,
        "weights": weights,
    } | more


def written(folder, model, extra=(), steps=None, **top):
    """A Keras model as a file, with its layers' extra keys in order."""
    layers = []
    more = dict(extra)
    for number, layer in enumerate(model.layers):
        layers.append(entry(layer, [None, steps, layer.output.shape[-1]], **more.get(number, {})))
    path = folder / "model.json"
    path.write_text(json.dumps({"in_shape": [None, steps, model.input_shape[-1]], "layers": layers, **top}))
    return path


def shaken(model):
    """The model with random weights; variances above 0."""
    for number, layer in enumerate(model.layers):
        arrays = [rng_floats(*array.shape, seed=10 * number + n) for n, array in enumerate(layer.get_weights())]
        if type(layer).__name__ == "BatchNormalization":
            arrays[-1] = np.abs(arrays[-1]) + 0.5
        layer.set_weights(arrays)
    return model


def answer(model, x):
    return model(x).detach().numpy()


def test_a_model_of_every_layer(tmp_path):
    layers = keras.layers
    model = shaken(
        keras.Sequential([
            keras.Input((None, 2)),
            layers.Dense(6, activation="tanh"),
            layers.Conv1D(4, 3, dilation_rate=2, padding="causal", activation="relu"),
            layers.BatchNormalization(epsilon=0.01),
            layers.PReLU(shared_axes=[1]),
            layers.Conv1D(6, 3, padding="causal", groups=2),
            layers.Activation("elu"),
            layers.LSTM(5, return_sequences=True),
            layers.GRU(4, return_sequences=True),
            layers.Dense(3, activation="softmax"),
            layers.Dense(1, use_bias=False, activation="sigmoid"),
        ])
    )  # fmt: skip
    extra = {
        1: {"kernel_size": [3], "dilation": [2], "groups": 1},
        2: {"epsilon": 0.01},
        4: {"kernel_size": [3], "dilation": [1], "groups": 2},
        6: {"name": "memory", "trained_on": "a guitar"},
    }
    path = written(tmp_path, model, extra, samplerate=48000, author="someone", esr=0.01)
    net = cs.load(path)
    x = rng_floats(2, 40, 2, scale=1.0)
    np.testing.assert_allclose(net(x), answer(model, x), rtol=0, atol=NEAR)
    stream = net.stream(2)
    np.testing.assert_array_equal(np.stack([stream.step(x[:, t]) for t in range(40)], axis=1), net(x))
    said = net.metadata["rtneural"]
    assert (said["samplerate"], said["author"], said["esr"]) == (48000, "someone", 0.01)
    assert said["layers"] == {"memory": {"trained_on": "a guitar"}}
    assert "memory" in net.names
    parts = cs.extract(path)
    assert list(parts) == ["memory", "gru_7"]
    np.testing.assert_allclose(
        parts["memory"](rng_floats(1, 9, 6)), answer(model.layers[6], rng_floats(1, 9, 6)), rtol=0, atol=NEAR
    )


def test_layers_with_the_same_name_get_different_ones(tmp_path):
    names = {n: {"name": "memory", "note": n} for n in range(2)}
    layers = [keras.layers.LSTM(units, return_sequences=True) for units in (3, 2)]
    path = written(tmp_path, shaken(keras.Sequential([keras.Input((None, 2)), *layers])), names)
    parts = cs.extract(path)
    assert {name: part.input_size for name, part in parts.items()} == {"memory": 2, "memory.2": 3}
    net = cs.load(path)
    assert net.names == ("memory", "memory.2")
    assert net.metadata["rtneural"]["layers"] == {"memory": {"note": 0}, "memory.2": {"note": 1}}


def test_windows_without_padding(tmp_path):
    """If the shapes show fewer steps after it, a convolution has no padding."""
    model = shaken(
        keras.Sequential([keras.Input((20, 1)), keras.layers.Conv1D(3, 5), keras.layers.Conv1D(2, 3, dilation_rate=2)])
    )
    layers = [
        entry(model.layers[0], [None, 16, 3], kernel_size=[5], dilation=[1]),
        entry(model.layers[1], [None, 12, 2], kernel_size=[3], dilation=[2]),
    ]
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"in_shape": [None, 20, 1], "layers": layers}))
    x = rng_floats(2, 20, 1)
    np.testing.assert_allclose(cs.load(path)(x), answer(model, x), rtol=0, atol=NEAR)


def plain():
    """The JSON object of a valid file."""
    return {
        "in_shape": [None, None, 1],
        "layers": [
            {"type": "lstm", "activation": "tanh", "shape": [None, None, 2],
             "weights": [rng_floats(1, 8).tolist(), rng_floats(2, 8).tolist(), rng_floats(8).tolist()]},
            {"type": "dense", "activation": "", "shape": [None, None, 1], "weights": [[[0.4], [-0.3]], [0.5]]},
        ],
    }  # fmt: skip


def changed(**more):
    """Return a function that changes the first layer."""
    return lambda found: found["layers"][0].update(more)


def of_dense(**more):
    """Return a function that changes the last layer."""
    return lambda found: found["layers"][1].update(more)


DAMAGE = {
    "no such layer": (changed(type="conv2d"), "expected layers of the types .*, found layer 0 of type 'conv2d'"),
    "no type": (lambda found: found["layers"][1].pop("type"), "found layer 1 of type None"),
    "no layers": (lambda found: found.update(layers=[]), "expected layers of the types .*, found none"),
    "layers as text": (lambda found: found.update(layers="lstm"), "expected layers to be a list, found 'lstm'"),
    "another width": (changed(shape=[None, None, 3]), r"layer 0 \(lstm\): weights 2: expected numbers \[12\], found"),
    "fewer arrays": (lambda found: found["layers"][0]["weights"].pop(), "expected 3 arrays of weights, found 2"),
    "ragged": (of_dense(weights=[[[1.0], []]]), r"layer 1 \(dense\): weights 0: expected lists of numbers"),
    "text": (of_dense(weights=[["a"]]), r"layer 1 \(dense\): weights 0: expected lists of numbers"),
    "another activation": (changed(activation="relu"), r"layer 0 \(lstm\): expected the activation tanh, found relu"),
    "no such activation": (of_dense(activation="swish"), "unknown activation 'swish'; RTNeural has tanh, "),
    "recurrent activation": (changed(recurrent_activation="hard_sigmoid"), "recurrent_activation sigmoid, found 'hard"),
    "strides": (of_dense(strides=[2]), r"expected strides 1, found \[2\]"),
    "open": (lambda found: found.update(in_shape=[None, None, None]), r"expected in_shape \[null, steps, features\]"),
    "a picture": (lambda found: found.update(in_shape=[None, 3, 4, 1]), r"expected in_shape \[null, steps, features\]"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_errors_name_the_damage(case, tmp_path):
    found = plain()
    path = tmp_path / "model.json"
    path.write_text(json.dumps(found))
    cs.load(path)
    change, message = DAMAGE[case]
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(FormatError, match=message) as error:
        cs.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON, found"),
        ('{"a": 1}', r"expected JSON with in_shape and layers \(RTNeural\), .*, found the keys \['a'\]"),
        ("{" * 20, "expected JSON, found"),
        ('{"architecture": "WaveNet"}', "expected the architecture LSTM or Linear, found 'WaveNet'"),
        ('{"a": ' + "[" * 5000 + "]" * 5000 + "}", "expected JSON, found|expected lists of numbers"),
    ],
)
def test_other_json_is_refused(text, message, tmp_path):
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=message):
        cs.load(path)


def test_content_determines_the_reader_and_saving_is_refused(tmp_path):
    path = tmp_path / "a model"
    path.write_text("\n  " + json.dumps(plain()))
    net = cs.load(path)
    with pytest.raises(ValueError, match=r"as one of safetensors \(\.safetensors\), .*got '.*net\.json'$") as refused:
        net.save(tmp_path / "net.json")
    assert ".nam" not in str(refused.value)
    assert not (tmp_path / "net.json").exists()
    assert "C++ libraries without a Python package" in cs.verify(net, path).note


def test_a_state_dict_as_lists(tmp_path):
    torch.manual_seed(0)
    module = torch.nn.GRU(2, 3, 2, batch_first=True)
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({name: tensor.tolist() for name, tensor in module.state_dict().items()}))
    x = rng_floats(1, 5, 2)
    expected = module(torch.from_numpy(x))[0].detach().numpy()
    np.testing.assert_allclose(cs.load(path)(x), expected, rtol=0, atol=NEAR)
    both = {f"{name}.{key}": tensor.tolist() for name in "ab" for key, tensor in module.state_dict().items()}
    path.write_text(json.dumps(both | {"head.weight": [[1.0]]}))
    assert list(cs.extract(path)) == ["a", "b"]
    with pytest.raises(FormatError, match="expected only one recurrent module"):
        cs.load(path)


# ── .nam ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Amp(torch.nn.Module):
    """A stack of LSTMs with learned initial states, and a linear head."""

    def __init__(self, inputs, units, layers):
        super().__init__()
        self.core, self.head = torch.nn.LSTM(inputs, units, layers, batch_first=True), torch.nn.Linear(units, 1)
        self.h, self.c = (torch.nn.Parameter(torch.randn(layers, units)) for _ in range(2))

    def forward(self, x):
        state = tuple(part[:, None].repeat(1, len(x), 1) for part in (self.h, self.c))
        return self.head(self.core(x, state)[0])

    def numbers(self):
        """The weights in the file's order: for each layer the rows of both matrices, bias and state; then the head."""
        parts = []
        for layer in range(self.core.num_layers):
            w, u, b, d = (
                getattr(self.core, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            parts += [torch.cat([w, u], dim=1), b + d, self.h[layer], self.c[layer]]
        return torch.cat([part.detach().flatten() for part in (*parts, self.head.weight, self.head.bias)]).tolist()


def amp_file(folder, module, **more):
    config = {
        "input_size": module.core.input_size,
        "hidden_size": module.core.hidden_size,
        "num_layers": module.core.num_layers,
    }
    found = {"version": "0.5.4", "architecture": "LSTM", "config": config, "weights": module.numbers()}
    path = folder / "amp.nam"
    path.write_text(json.dumps(found | more))
    return path


@pytest.mark.parametrize(("inputs", "units", "layers"), [(1, 16, 1), (1, 5, 3), (3, 4, 2)])
def test_an_amplifier(inputs, units, layers, tmp_path):
    torch.manual_seed(0)
    module = Amp(inputs, units, layers).eval()
    path = amp_file(tmp_path, module, sample_rate=48000.0, metadata={"name": "amp", "gain": 0.5})
    net = cs.load(path)
    x = rng_floats(2, 100, inputs)
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(net(x), expected, rtol=0, atol=NEAR)
    np.testing.assert_array_equal(net.stream(2).run(x), net(x))
    assert net.metadata["nam"]["sample_rate"] == 48000.0
    assert net.metadata["nam"]["metadata"] == {"name": "amp", "gain": 0.5}
    assert list(cs.extract(path)) == [f"lstm_{n}" for n in range(layers)]


def test_a_filter(tmp_path):
    taps, bias = rng_floats(32), 0.25
    path = tmp_path / "filter.nam"
    config = {"receptive_field": 32, "bias": True}
    path.write_text(json.dumps({"architecture": "Linear", "config": config, "weights": [*taps.tolist(), bias]}))
    x = rng_floats(1, 50, 1)
    expected = np.convolve(x[0, :, 0], taps[::-1])[:50] + bias
    np.testing.assert_allclose(cs.load(path)(x)[0, :, 0], expected, rtol=0, atol=NEAR)


def test_a_filter_with_a_number_as_bias_setting_is_refused(tmp_path):
    path = tmp_path / "filter.nam"
    config = {"receptive_field": 2, "bias": 1}
    path.write_text(json.dumps({"architecture": "Linear", "config": config, "weights": [0.5, 0.5, 0.1]}))
    with pytest.raises(FormatError, match="config: expected bias to be true or false, found 1"):
        cs.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [0.0] * 5}, "expected at least .* weights, found 5"),
        ({"weights": [0.0] * 500}, "expected .* weights, found 500"),
        ({"config": {"hidden_size": 4}}, r"config: expected input_size, .*, found \['hidden_size'\]"),
        ({"config": {"input_size": 1, "hidden_size": 0}}, "expected hidden_size to be a positive integer, found 0"),
        ({"config": {"input_size": 1, "hidden_size": 4, "dropout": 1}}, "config: expected input_size, hidden_size"),
        ({"config": []}, "expected config to be an object"),
        ({"architecture": 3}, "expected the architecture LSTM or Linear, found 3"),
    ],
)  # fmt: skip
def test_a_damaged_amplifier(change, message, tmp_path):
    path = amp_file(tmp_path, Amp(1, 4, 1), **change)
    with pytest.raises(FormatError, match=message):
        cs.load(path)


def test_unknown_architectures_are_named():
    assert list(nam.ARCHITECTURES) == ["LSTM", "Linear"]
