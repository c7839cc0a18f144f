"""A model gives the same graph, plan, outputs and speed from Keras's, PyTorch's and ONNX's files."""

import statistics
import time
import warnings
from dataclasses import replace

import keras
import numpy as np
import pytest
import tolerances
import torch
from torch import nn

import cellstack as cs
from cellstack import Network
from cellstack.formats import pytorch
from cellstack.nodes import GlobalPool, Permute

L = keras.layers
STEPS = 6


class Node(nn.Module):
    """A function, and its nodes."""

    def __init__(self, function, *nodes):
        super().__init__()
        self.function, self.nodes = function, nodes

    def forward(self, x):
        return self.function(x)

    def to_nodes(self):
        return list(self.nodes)


class Ends(nn.Module):
    """A bidirectional layer that returns the last state of each direction."""

    def __init__(self, kind, width, units):
        super().__init__()
        self.rnn = rnn(kind, width, units, bidirectional=True)

    def forward(self, x):
        return torch.cat(tuple(self.rnn(x)[1][0]), -1)

    def to_nodes(self):
        (node,) = pytorch.of_module(self.rnn).nodes
        return [replace(node, **{part: last_of(getattr(node, part)) for part in ("forward", "backward")})]


def last_of(node):
    return replace(node, return_sequences=False)


def output():
    return Node(lambda x: x[0])


def last():
    return Node(lambda x: x[0][:, -1], GlobalPool("last"))


def turned():
    return Node(lambda x: x.transpose(1, 2), Permute((2, 1)))


def rnn(kind, width, units, layers=1, **settings):
    return getattr(nn, kind)(width, units, layers, batch_first=True, **settings)


MODELS = {  # PyTorch's modules, Keras's layers, and the names of the nodes
    "words": (
        lambda: [nn.Embedding(11, 5), rnn("LSTM", 5, 4, bidirectional=True), output(), nn.Linear(8, 3), nn.Softmax(-1)],
        lambda: [
            L.Embedding(11, 5),
            L.Bidirectional(L.LSTM(4, return_sequences=True)),
            L.Dense(3, "softmax"),
        ],
        "Embedding Bidirectional Dense",
    ),
    "words as a whole": (
        lambda: [nn.Embedding(11, 5), Ends("LSTM", 5, 4), nn.Linear(8, 3), nn.Softmax(-1)],
        lambda: [L.Embedding(11, 5), L.Bidirectional(L.LSTM(4)), L.Dense(3), L.Softmax()],
        "Embedding Bidirectional Dense",
    ),
    "a stack": (
        lambda: [rnn("LSTM", 3, 32), output(), rnn("LSTM", 32, 32), output(), nn.Linear(32, 1), nn.Sigmoid()],
        lambda: [L.LSTM(32, return_sequences=True), L.LSTM(32, return_sequences=True), L.Dense(1, "sigmoid")],
        "Recurrent Recurrent Dense",
    ),
    "an activation apart": (
        lambda: [rnn("LSTM", 3, 32, 2), output(), nn.Linear(32, 1), nn.Sigmoid()],
        lambda: [
            L.LSTM(32, return_sequences=True),
            L.LSTM(32, return_sequences=True),
            L.Dense(1),
            L.Activation("sigmoid"),
        ],
        "Recurrent Recurrent Dense",
    ),
    "GRUs": (
        lambda: [rnn("GRU", 3, 8, 2), last(), nn.Linear(8, 4), nn.ELU(), nn.Linear(4, 2), nn.LeakyReLU(0.25)],
        lambda: [
            L.GRU(8, return_sequences=True),
            L.GRU(8),
            L.Dense(4, "elu"),
            L.Dense(2),
            L.LeakyReLU(negative_slope=0.25),
        ],
        "Recurrent Recurrent Dense Dense",
    ),
    "norms after Dense": (
        lambda: [
            rnn("LSTM", 3, 4),
            last(),
            nn.Linear(4, 5),
            nn.BatchNorm1d(5, eps=1e-3),
            nn.ReLU(),
            nn.Linear(5, 2),
            nn.Tanh(),
        ],
        lambda: [
            L.LSTM(4),
            L.Dense(5),
            L.BatchNormalization(),
            L.ReLU(),
            L.Dropout(0.5),
            L.Dense(2),
            L.Activation("tanh"),
        ],
        "Recurrent Dense Dense",
    ),
    "activations of every kind": (
        lambda: [
            *(nn.Linear(3, 4), nn.ReLU6(), nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4), nn.GELU()),
            *(nn.Linear(4, 4), nn.SELU(), nn.Linear(4, 4), nn.LogSoftmax(-1)),
        ],
        lambda: [
            *(L.Dense(4), L.ReLU(max_value=6), L.Dense(4, "silu"), L.Dense(4, "gelu")),
            *(L.Dense(4, "selu"), L.Dense(4, "log_softmax")),
        ],
        "Dense Dense Dense Dense Dense",
    ),
    "norms after Conv1D": (
        lambda: [
            turned(),
            nn.Conv1d(3, 4, 3, padding=1),
            nn.BatchNorm1d(4, eps=1e-3),
            nn.ReLU(),
            nn.Conv1d(4, 4, 2, dilation=2),
            nn.MaxPool1d(2),
            turned(),
            rnn("GRU", 4, 4),
            last(),
            nn.Linear(4, 2),
        ],
        lambda: [
            L.Conv1D(4, 3, padding="same"),
            L.BatchNormalization(),
            L.Activation("relu"),
            L.Conv1D(4, 2, dilation_rate=2),
            L.MaxPooling1D(2),
            L.GRU(4),
            L.Dense(2),
        ],
        "Conv1D Conv1D Pool1D Recurrent Dense",
    ),
}


def swapped(rows):
    """Rows of three gates, with the first two swapped."""
    r, z, n = rows.chunk(3)
    return torch.cat([z, r, n])


def weights_of(module):
    """A module's weights in Keras's layout: gates i f g o for an LSTM, z r g for a GRU."""
    module = module.rnn if isinstance(module, Ends) else module
    if isinstance(module, (nn.LSTM, nn.GRU)):
        for layer in range(module.num_layers):
            for way in ("", "_reverse")[: 1 + module.bidirectional]:
                own = [getattr(module, f"{name}_l{layer}{way}") for name in ("weight_ih", "weight_hh")]
                biases = torch.stack([getattr(module, f"{name}_l{layer}{way}") for name in ("bias_ih", "bias_hh")])
                if isinstance(module, nn.GRU):  # PyTorch's gates are r z n; Keras has both biases
                    own, biases = [swapped(one) for one in own], swapped(biases.T).T
                else:
                    biases = biases.sum(0)
                yield from (*(one.T for one in own), biases)
    elif isinstance(module, nn.Conv1d):
        yield from (module.weight.permute(2, 1, 0), module.bias)
    elif isinstance(module, nn.Linear):
        yield from (module.weight.T, module.bias)
    elif isinstance(module, nn.BatchNorm1d):
        yield from (module.weight, module.bias, module.running_mean, module.running_var)
    elif isinstance(module, nn.Embedding):
        yield module.weight


def both(name):
    """The model in PyTorch and in Keras, with the same weights, and its input."""
    modules, layers, _ = MODELS[name]
    module = nn.Sequential(*modules()).eval()
    for one in module:
        if isinstance(one, nn.BatchNorm1d):
            for array in (one.weight.data, one.bias.data, one.running_mean, one.running_var):
                array.uniform_(0.5, 2.0)
    words = isinstance(module[0], nn.Embedding)
    x = torch.randint(11, (2, STEPS)) if words else torch.randn(2, STEPS, 3)
    model = keras.Sequential([keras.Input((None,), dtype="int32") if words else keras.Input((None, 3)), *layers()])
    model.set_weights([array.detach().numpy() for one in module for array in weights_of(one)])
    return module, model, x


def exported(module, x, path, dynamo):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            batch, steps = torch.export.Dim("batch", max=64), torch.export.Dim("steps", max=64)
            given = {"dynamic_shapes": ({0: batch, 1: steps},), "external_data": False, "verbose": False}
        else:
            given = {"dynamic_axes": {"x": {0: "batch", 1: "steps"}}, "input_names": ["x"]}
        torch.onnx.export(nn.Sequential(*module).eval(), (x,), str(path), dynamo=dynamo, **given)
    return cs.load(path)


def file_of(model, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns that HDF5 is legacy
        model.save(path)
    return cs.load(path)


def pickled(module, path):
    """A file with PyTorch's own modules only, without those that take the output from a pair."""
    own = [one for one in module if not isinstance(one, Node) or one.nodes]
    if any(isinstance(one, (Node, Ends)) for one in own):
        return None
    torch.save(nn.Sequential(*own), path)
    return cs.load(path)


READ = {
    "module": lambda module, model, x, folder: cs.load(module),
    "module.pt": lambda module, model, x, folder: pickled(module, folder / "module.pt"),
    "model": lambda module, model, x, folder: cs.load(model),
    "model.keras": lambda module, model, x, folder: file_of(model, folder / "model.keras"),
    "model.h5": lambda module, model, x, folder: file_of(model, folder / "model.h5"),
    "traced": lambda module, model, x, folder: exported(module, x, folder / "traced.onnx", False),
    "dynamo": lambda module, model, x, folder: exported(module, x, folder / "dynamo.onnx", True),
    **{
        f"ours{suffix}": lambda module, model, x, folder, suffix=suffix: rewritten(module, folder / f"ours{suffix}")
        for suffix in (".onnx", ".keras", ".h5", ".safetensors")
    },
}


def rewritten(module, path):
    cs.load(module).save(path)
    return cs.load(path)


def described(net):
    """A network as text: nodes and cells with their settings, their wires, and the inputs."""
    wires = [[("x", *net.names).index(source if source in net.names else "x") for source in one] for one in net.wires]
    nodes = [
        [
            type(node).__name__,
            {key: value for key, value in node.stored()[0].items() if key != "cells"},
            [str(cell.spec) for cell in node.cells],
            sources,
        ]
        for node, sources in zip(net.nodes, wires, strict=True)
    ]
    return [net.shapes[net.inputs[0]], *nodes, [net.names.index(name) for name in net.outputs]]


def arrays_of(net):
    return [array for node in net.nodes for array in node.stored()[1].values()]


@pytest.mark.parametrize("name", MODELS)
def test_torch_and_keras_have_the_same_model(name):
    module, model, x = both(name)
    np.testing.assert_allclose(model(x.numpy()).detach(), module(x).detach(), atol=tolerances.KERAS, rtol=0)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=pytest.mark.slow if way == "dynamo" else ())
        for name in MODELS
        for way in READ
        if way != "module"
    ],
)
def test_the_same_graph_from_every_file(name, way, tmp_path):
    module, model, x = both(name)
    first, net = cs.load(module), READ[way](module, model, x, tmp_path)
    if net is None:
        pytest.skip("PyTorch has no module of its own for it")
    assert " ".join(type(node).__name__ for node in first.nodes) == MODELS[name][2]
    assert described(net) == described(first)
    assert str(Network(net.nodes).plan()) == str(Network(first.nodes).plan())  # under the same names
    for one, other in zip(arrays_of(net), arrays_of(first), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerances.KERAS, rtol=0)
    for each in (net, first):
        np.testing.assert_allclose(each(x.numpy()), module(x).detach(), atol=tolerances.KERAS, rtol=0)


FUNCTIONS = [nn.Hardtanh(), nn.GELU("tanh"), nn.Hardswish(), nn.Mish(), nn.ReLU6()]


@pytest.mark.parametrize(
    ("functions", "dynamo"),
    [*(([one], False) for one in FUNCTIONS), pytest.param(FUNCTIONS, True, marks=pytest.mark.slow)],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "dynamo" if value else "traced",
)
def test_the_same_activation_from_a_module_its_file_and_its_export(functions, dynamo, tmp_path):
    between = [part for one in functions for part in (one, nn.Linear(4, 4))]
    module, x = nn.Sequential(nn.Linear(3, 4), *between, nn.Linear(4, 2)).eval(), torch.randn(2, STEPS, 3)
    first = cs.load(module)
    for net in (exported(module, x, tmp_path / "net.onnx", dynamo), pickled(module, tmp_path / "net.pt")):
        assert described(net)[1:] == described(first)[1:]
        np.testing.assert_allclose(net(x.numpy()), module(x).detach(), atol=tolerances.KERAS, rtol=0)


def took(stream, frames):
    start = time.perf_counter()
    for frame in frames:
        stream.step(frame)
    return time.perf_counter() - start


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a stack", "an activation apart"])
def test_streams_of_the_same_model_run_at_the_same_speed(name, tmp_path):
    """Time the streams in rounds; compare the median ratio to the first stream of the round."""
    module, model, x = both(name)
    nets = {way: READ[way](module, model, x, tmp_path) for way in READ}
    streams = {way: net.stream() for way, net in nets.items()}
    frames = np.random.default_rng(0).standard_normal((500, 1, 3)).astype(np.float32)
    ratios = {way: [] for way in streams}
    for stream in streams.values():
        took(stream, frames)
    for turn in range(60):
        order = list(streams)
        order = order[turn % len(order) :] + order[: turn % len(order)]  # no stream is always the first
        times = {way: took(streams[way], frames) for way in order}
        for way in order:
            ratios[way].append(times[way] / times["module"])
    medians = {way: statistics.median(found) for way, found in ratios.items()}
    assert all(0.95 < median < 1.05 for median in medians.values()), medians
