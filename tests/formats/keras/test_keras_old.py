"""Hand-made files in the form of Keras 1 and 2: their names, layouts and hard_sigmoid, and cuDNN's layers."""

import json

import h5py
import numpy as np
import pytest
import tolerances

from cellstack import FormatError, reference
from cellstack.formats import keras as adapter


def f64(array):
    return np.asarray(array, np.float64)


def write(path, config, weights, version=None, backend="tensorflow", whole=True):
    """Write HDF5 as Keras 1 and 2 did: names as fixed-length text, a group per layer, a dataset per weight."""
    with h5py.File(path, "w") as file:
        if whole:
            file.attrs["model_config"] = json.dumps(config).encode()
        group = file.create_group("model_weights") if whole else file
        for at in {file.name: file, group.name: group}.values():
            if version is not None:
                at.attrs["keras_version"] = version.encode()
                at.attrs["backend"] = backend.encode()
        group.attrs["layer_names"] = np.array([name.encode() for name in weights])
        for name, arrays in weights.items():
            own = group.create_group(name)
            own.attrs["weight_names"] = np.array([key.encode() for key in arrays])
            for key, array in arrays.items():
                own.create_dataset(key, data=array)
    return path


def f32(rng, *shape):
    return rng.normal(size=shape).astype("float32") * np.float32(0.5)


def sigmoid(z):
    return 1.0 / (1.0 + np.exp(-z))


def hard_sigmoid_2(z):
    return np.clip(0.2 * z + 0.5, 0.0, 1.0)


def lstm(x, gates, inner=sigmoid):
    """An LSTM in float64 from a dict of (W, U, b) by gate, written out: i f c o."""
    units = gates["i"][1].shape[0]
    h, c, ys = np.zeros((len(x), units)), np.zeros((len(x), units)), []
    for t in range(x.shape[1]):
        z = {key: f64(x[:, t]) @ f64(W) + h @ f64(U) + f64(b) for key, (W, U, b) in gates.items()}
        c = inner(z["f"]) * c + inner(z["i"]) * np.tanh(z["c"])
        h = inner(z["o"]) * np.tanh(c)
        ys.append(h)
    return np.stack(ys, axis=1)


def gru(x, gates, inner=sigmoid, after=None):
    """A GRU in float64, likewise: z r h; `after` are the second biases, with the reset after the product."""
    h, ys = np.zeros((len(x), gates["z"][1].shape[0])), []
    for t in range(x.shape[1]):
        a = {key: f64(x[:, t]) @ f64(W) + f64(b) for key, (W, U, b) in gates.items()}
        second = {key: 0.0 if after is None else f64(after[key]) for key in gates}
        z, r = (inner(a[key] + h @ f64(gates[key][1]) + second[key]) for key in "zr")
        U = f64(gates["h"][1])
        g = np.tanh(a["h"] + ((r * h) @ U if after is None else r * (h @ U + second["h"])))
        h = z * h + (1.0 - z) * g
        ys.append(h)
    return np.stack(ys, axis=1)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerances.NETWORK * max(1.0, np.abs(theirs).max()))


# ── Keras 1 ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def gates_of(rng, letters, inputs, units):
    return {key: (f32(rng, inputs, units), f32(rng, units, units), f32(rng, units)) for key in letters}


def keras_1(name, gates, order):
    return {f"{name}_{what}_{key}": gates[key][n] for key in order for n, what in enumerate("WUb")}


RNN_1 = {"activation": "tanh", "inner_activation": "hard_sigmoid", "consume_less": "cpu", "return_sequences": True}


@pytest.mark.parametrize("version", ["1.2.2", None])
def test_a_whole_model_of_keras_1(tmp_path, rng, version):
    lstm_gates, gru_gates = gates_of(rng, "ifco", 4, 5), gates_of(rng, "zrh", 5, 3)
    table, kernel, bias = f32(rng, 9, 4), f32(rng, 3, 2), f32(rng, 2)
    gamma, beta, mean, variance = f32(rng, 5), f32(rng, 5), f32(rng, 5), np.abs(f32(rng, 5)) + 0.1
    config = {
        "class_name": "Sequential",
        "config": [
            {
                "class_name": "Embedding",
                "config": {
                    "name": "embedding_1",
                    "input_dim": 9,
                    "output_dim": 4,
                    "batch_input_shape": [None, 6],
                    "dropout": 0.0,
                },
            },
            {"class_name": "LSTM", "config": {"name": "lstm_1", "output_dim": 5, "dropout_W": 0.1, **RNN_1}},
            {"class_name": "BatchNormalization", "config": {"name": "bn_1", "mode": 0, "axis": -1, "epsilon": 0.001}},
            {"class_name": "Dropout", "config": {"name": "dropout_1", "p": 0.5}},
            {"class_name": "GRU", "config": {"name": "gru_1", "output_dim": 3, **RNN_1, "return_sequences": False}},
            {
                "class_name": "Dense",
                "config": {"name": "dense_1", "output_dim": 2, "activation": "softmax", "bias": True},
            },
        ],
    }
    weights = {
        "embedding_1": {"embedding_1_W": table},
        "lstm_1": keras_1("lstm_1", lstm_gates, "icfo"),
        "bn_1": {"bn_1_gamma": gamma, "bn_1_beta": beta, "bn_1_running_mean": mean, "bn_1_running_std": variance},
        "dropout_1": {},
        "gru_1": keras_1("gru_1", gru_gates, "zrh"),
        "dense_1": {"dense_1_W": kernel, "dense_1_b": bias},
    }
    net = adapter.load(write(tmp_path / "model.h5", config, weights, version))
    ids = rng.integers(0, 9, (3, 6))
    y = lstm(table[ids], lstm_gates, hard_sigmoid_2)
    y = f64(gamma) * (y - mean) / np.sqrt(f64(variance) + 0.001) + beta
    y = gru(y, gru_gates, hard_sigmoid_2)[:, -1] @ f64(kernel) + bias
    close(net(ids), np.exp(y) / np.exp(y).sum(axis=1, keepdims=True))
    source = net.metadata["source"]
    assert ("assumed" in source) == (version is None)
    assert "hard_sigmoid(0.2, 0.5)" in repr(net)


def test_a_graph_of_keras_1(tmp_path, rng):
    """Bidirectional, arrays with all gates, a Merge and a model with two inputs."""
    ahead, back = gates_of(rng, "ifco", 3, 4), gates_of(rng, "ifco", 3, 4)

    def joined(name, gates):
        return {
            f"{name}_{what}": np.concatenate([gates[key][n] for key in "ifco"], axis=-1) for n, what in enumerate("WUb")
        }

    inner = {"name": "lstm_1", "output_dim": 4, **RNN_1, "consume_less": "gpu"}
    config = {
        "class_name": "Model",
        "config": {
            "name": "model_1",
            "layers": [
                {
                    "class_name": "InputLayer",
                    "name": "a",
                    "config": {"name": "a", "batch_input_shape": [None, None, 3]},
                    "inbound_nodes": [],
                },
                {
                    "class_name": "InputLayer",
                    "name": "b",
                    "config": {"name": "b", "batch_input_shape": [None, None, 8]},
                    "inbound_nodes": [],
                },
                {
                    "class_name": "Bidirectional",
                    "name": "both",
                    "config": {
                        "name": "both",
                        "merge_mode": "concat",
                        "layer": {"class_name": "LSTM", "config": inner},
                    },
                    "inbound_nodes": [[["a", 0, 0]]],
                },
                {
                    "class_name": "Merge",
                    "name": "merge_1",
                    "config": {"name": "merge_1", "mode": "sum", "concat_axis": -1},
                    "inbound_nodes": [[["both", 0, 0], ["b", 0, 0]]],
                },
            ],
            "input_layers": [["a", 0, 0], ["b", 0, 0]],
            "output_layers": [["merge_1", 0, 0]],
        },
    }
    weights = {
        "a": {},
        "b": {},
        "both": {**joined("forward_lstm_1", ahead), **joined("backward_lstm_1", back)},
        "merge_1": {},
    }
    net = adapter.load(write(tmp_path / "model.h5", config, weights, "1.1.0"))
    a, b = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 5, 8))
    y = np.concatenate([lstm(a, ahead, hard_sigmoid_2), lstm(a[:, ::-1], back, hard_sigmoid_2)[:, ::-1]], axis=-1) + b
    close(net({"a": a, "b": b}), y)


@pytest.mark.parametrize("backend", ["tensorflow", "theano"])
def test_a_convolution_of_keras_1(tmp_path, rng, backend):
    kernel, bias = f32(rng, 3, 1, 2, 4), f32(rng, 4)
    settings = {
        "nb_filter": 4,
        "filter_length": 3,
        "border_mode": "valid",
        "subsample_length": 1,
        "activation": "linear",
    }
    config = {
        "class_name": "Sequential",
        "config": [
            {"class_name": "Convolution1D", "config": {"name": "conv", "batch_input_shape": [None, 7, 2], **settings}},
            {
                "class_name": "MaxPooling1D",
                "config": {"name": "pool", "pool_length": 2, "stride": 2, "border_mode": "valid"},
            },
        ],
    }
    weights = {"conv": {"conv_W": kernel, "conv_b": bias}, "pool": {}}
    net = adapter.load(write(tmp_path / "model.h5", config, weights, "1.2.0", backend))
    x, taps = rng.normal(size=(2, 7, 2)), f64(kernel[:, 0])
    taps = taps[::-1] if backend == "theano" else taps
    y = sum(x[:, k : k + 5] @ taps[k] for k in range(3)) + bias
    close(net(x), np.maximum(y[:, 0:4:2], y[:, 1:5:2]))


# ── Keras 2, and cuDNN's layers ─────────────────────────────────────────────────────────────────────────────────────


def cudnn_blocks(gates, order):
    """Arrays of a cuDNN layer in Keras 2's form: each block `[units, n]` row by row, with the shape `[n, units]`."""
    kernel = [np.ascontiguousarray(gates[key][0].T).reshape(gates[key][0].shape) for key in order]
    recurrent = [gates[key][1].T for key in order]
    return np.concatenate(kernel, axis=1), np.concatenate(recurrent, axis=1)


@pytest.mark.parametrize("kind", ["CuDNNLSTM", "LSTM", "alone"])
def test_cudnn_lstm(tmp_path, rng, kind):
    """With its own class, with the description of an LSTM, as Keras 2 allows, and without any description."""
    order = "ifco"
    gates = gates_of(rng, order, 5, 3)
    kernel, recurrent = cudnn_blocks(gates, order)
    second = {key: f32(rng, 3) for key in order}
    bias = np.concatenate([*(gates[key][2] for key in order), *(second[key] for key in order)])
    weights = {"rnn_1": {"rnn_1/kernel:0": kernel, "rnn_1/recurrent_kernel:0": recurrent, "rnn_1/bias:0": bias}}
    settings = {"name": "rnn_1", "units": 3, "return_sequences": True, "batch_input_shape": [None, None, 5]}
    if kind == "LSTM":
        settings |= {"activation": "tanh", "recurrent_activation": "sigmoid", "time_major": False}
    config = {"class_name": "Sequential", "config": {"name": "s", "layers": [{"class_name": kind, "config": settings}]}}
    path = write(tmp_path / "model.h5", config, weights, "2.1.5", whole=kind != "alone")
    net = adapter.extract(path)["rnn_1"] if kind == "alone" else adapter.load(path)
    summed = {key: (*gates[key][:2], gates[key][2] + second[key]) for key in order}
    x = rng.normal(size=(2, 6, 5))
    close(net(x), lstm(x, summed))


@pytest.mark.parametrize("kind", ["CuDNNGRU", "alone"])
def test_cudnn_gru(tmp_path, rng, kind):
    order = "zrh"
    gates = gates_of(rng, order, 2, 4)
    kernel, recurrent = cudnn_blocks(gates, order)
    second = {key: f32(rng, 4) for key in order}
    bias = np.concatenate([*(gates[key][2] for key in order), *(second[key] for key in order)])
    weights = {"g": {"g/kernel:0": kernel, "g/recurrent_kernel:0": recurrent, "g/bias:0": bias}}
    layer = {"class_name": kind, "config": {"name": "g", "units": 4, "return_sequences": True}}
    config = {"class_name": "Sequential", "config": {"name": "s", "layers": [layer]}}
    path = write(tmp_path / "model.h5", config, weights, "2.2.4", whole=kind != "alone")
    net = adapter.extract(path)["g"] if kind == "alone" else adapter.load(path)
    x = rng.normal(size=(3, 5, 2))
    close(net(x), gru(x, gates, after=second))


@pytest.mark.parametrize("version", ["2.0.6", "2.2.4-tf", "2.4.0", None])
def test_a_functional_model_of_keras_2(tmp_path, rng, version):
    """Nested lists of inputs, a shared layer, a bidirectional stack of cells, and 0.2 in hard_sigmoid."""
    lstm_gates, gru_gates = gates_of(rng, "ifco", 3, 4), gates_of(rng, "zrh", 4, 2)
    kernel, bias = f32(rng, 2, 3), f32(rng, 3)

    def joined(name, gates, order):
        names = ("kernel", "recurrent_kernel", "bias")
        return {
            f"{name}/{what}:0": np.concatenate([gates[k][n] for k in order], axis=-1) for n, what in enumerate(names)
        }

    words = {"activation": "tanh", "recurrent_activation": "hard_sigmoid", "use_bias": True, "trainable": True}
    config = {
        "class_name": "Model",
        "config": {
            "name": "model_1",
            "layers": [
                {
                    "class_name": "InputLayer",
                    "name": "a",
                    "config": {"name": "a", "batch_input_shape": [None, 6, 3]},
                    "inbound_nodes": [],
                },
                {
                    "class_name": "Masking",
                    "name": "masking",
                    "config": {"name": "masking", "mask_value": 0.0},
                    "inbound_nodes": [[["a", 0, 0, {}]]],
                },
                {
                    "class_name": "LSTM",
                    "name": "lstm",
                    "config": {
                        "name": "lstm",
                        "units": 4,
                        "return_sequences": True,
                        "time_major": False,
                        "implementation": 1,
                        **words,
                    },
                    "inbound_nodes": [[["masking", 0, 0, {}]]],
                },
                {
                    "class_name": "GRU",
                    "name": "gru",
                    "config": {"name": "gru", "units": 2, "reset_after": False, **words},
                    "inbound_nodes": [[["lstm", 0, 0, {"training": False}]]],
                },
                {
                    "class_name": "Dense",
                    "name": "dense",
                    "config": {"name": "dense", "units": 3, "activation": "linear", "use_bias": True},
                    "inbound_nodes": [[["gru", 0, 0, {}]]],
                },
            ],
            "input_layers": [["a", 0, 0]],
            "output_layers": [["dense", 0, 0]],
        },
    }
    weights = {
        "a": {},
        "masking": {},
        "lstm": joined("lstm/lstm_cell", lstm_gates, "ifco"),
        "gru": joined("gru_1", gru_gates, "zrh"),
        "dense": {"dense/kernel:0": kernel, "dense/bias:0": bias},
    }
    net = adapter.load(write(tmp_path / "model.hdf5", config, weights, version))
    x = rng.normal(size=(2, 6, 3))
    y = gru(lstm(x, lstm_gates, hard_sigmoid_2), gru_gates, hard_sigmoid_2)[:, -1]
    close(net(x), y @ f64(kernel) + bias)
    padded = np.concatenate([x, np.zeros((2, 3, 3))], axis=1)
    close(net(padded), net(x))
    assert net.metadata["source"].get("assumed", "").startswith("Keras 2" if version is None else "")


def small(tmp_path, rng, *, settings=None, weights=None, version="2.2.4", layer="LSTM"):
    config = {
        "class_name": "Sequential",
        "config": [
            {
                "class_name": layer,
                "config": {
                    "name": "r",
                    "units": 2,
                    "activation": "tanh",
                    "recurrent_activation": "sigmoid",
                    **(settings or {}),
                },
            }
        ],
    }
    usual = {"r": {"r/kernel:0": f32(rng, 3, 8), "r/recurrent_kernel:0": f32(rng, 2, 8), "r/bias:0": f32(rng, 8)}}
    return write(tmp_path / "small.h5", config, weights or usual, version)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"time_major": True}}, "time_major=False"),
        ({"settings": {"units": 3}}, r"expected kernel \[I, 12\]"),
        ({"settings": {"units": -1}}, "expected units to be an integer"),
        ({"settings": {"units": "many"}}, "expected units to be an integer"),
        ({"settings": {"return_sequences": 3}}, "expected return_sequences to be bool"),
        ({"settings": {"activation": "swish"}}, "'swish' isn't supported"),
        ({"version": "4.0"}, "expected keras_version 1, 2 or 3"),
        ({"layer": "ConvLSTM2D"}, "ConvLSTM2D 'r': this layer isn't supported"),
        ({"layer": "Lambda"}, "Lambda 'r': this layer isn't supported"),
        ({"layer": "mine>LSTM"}, "mine>LSTM 'r': this layer isn't supported"),
    ],
)
def test_wrong_shapes_and_settings_are_refused(tmp_path, rng, change, message):
    with pytest.raises(FormatError, match=message):
        adapter.load(small(tmp_path, rng, **change))


def test_unused_and_missing_weights_are_named(tmp_path, rng):
    kernel, recurrent, bias = f32(rng, 3, 8), f32(rng, 2, 8), f32(rng, 8)
    full = {"r/kernel:0": kernel, "r/recurrent_kernel:0": recurrent, "r/bias:0": bias}
    with pytest.raises(FormatError, match=r"no layer uses the weights 'gone/kernel:0'"):
        adapter.load(small(tmp_path, rng, weights={"r": full, "gone": {"kernel:0": kernel}}))
    with pytest.raises(FormatError, match=r"LSTM 'r': expected 3 weights.*found 4"):
        adapter.load(small(tmp_path, rng, weights={"r": {**full, "r/more:0": bias}}))
    with pytest.raises(FormatError, match=r"LSTM 'r': expected 3 weights.*found 2"):
        adapter.load(small(tmp_path, rng, weights={"r": dict(list(full.items())[:2])}))
    square = {"r/recurrent_kernel:0": recurrent, "r/kernel:0": f32(rng, 2, 8), "r/bias:0": bias}
    with pytest.raises(FormatError, match=r"expected its kernel, found 'r/r/recurrent_kernel:0' in its place"):
        adapter.load(small(tmp_path, rng, weights={"r": square}))
    with pytest.raises(FormatError, match="expected float32 or float64, found int64"):
        adapter.load(small(tmp_path, rng, weights={"r": {**full, "r/bias:0": np.arange(8)}}))


def test_weights_are_assigned_by_order_if_names_differ(tmp_path, rng):
    gates = gates_of(rng, "ifco", 3, 2)
    arrays = {
        f"l/{what}:0": np.concatenate([gates[k][n] for k in "ifco"], -1)
        for n, what in enumerate(["kernel", "recurrent_kernel", "bias"])
    }
    path = write(tmp_path / "weights.h5", None, {"lstm_7": arrays}, "2.2.0", whole=False)
    layer = {
        "class_name": "LSTM",
        "config": {"units": 2, "activation": "tanh", "recurrent_activation": "hard_sigmoid", "return_sequences": True},
    }
    x = rng.normal(size=(2, 4, 3))
    close(adapter.load(path, architecture=[layer])(x), lstm(x, gates, hard_sigmoid_2))
    unsaid = {"class_name": "LSTM", "config": {"units": 2}}
    with pytest.raises(FormatError, match="expected activation, found none: its default differs"):
        adapter.load(path, architecture=[unsaid])
    with pytest.raises(FormatError, match=r"expected the weights of cuDNN layers, found layers 'lstm_7'"):
        adapter.extract(path)


def test_the_reference_agrees_with_the_equations_of_this_file(rng):
    """The hard_sigmoid of this file equals that of cellstack.reference."""
    z = rng.normal(size=50) * 3
    assert np.allclose(hard_sigmoid_2(z), reference.ACTIVATIONS["hard_sigmoid"][0](z, 0.2, 0.5))
