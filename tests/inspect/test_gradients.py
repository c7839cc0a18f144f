"""Gradients of an output number, compared with central differences, the reference and torch autograd."""

from itertools import product

import numpy as np
import pairs
import pytest
import torch
from family import random_spec
from networks import fill, make_cell, make_graph, make_network

import cellstack as cs
from cellstack import Network, Patch, reference
from cellstack.cells.activations import ACTIVATIONS
from cellstack.nodes import (
    NODES,
    Activation,
    Attention,
    Clip,
    Context,
    Conv1D,
    Dense,
    Embedding,
    Flatten,
    Function,
    GlobalPool,
    GridConv,
    GridPool,
    GroupedDense,
    GroupNorm,
    LayerNorm,
    Magnitude,
    Masking,
    Merge,
    Node,
    PerFrame,
    Pool1D,
    Power,
    Recurrent,
    Reduce,
    RepeatLike,
    Reshape,
    RMSNorm,
    Select,
    Take,
    TimeSoftmax,
)
from cellstack.nodes.activations import MORE_ACTIVATIONS

STEP = 1e-6


def rng_of(seed):
    return np.random.default_rng(seed)


def differences(net, x, name, output, step, unit, **run):
    """Central differences of a number of each row with respect to each number of an input, in float64."""
    found = np.zeros_like(x[name])
    for at in product(*map(range, x[name].shape[1:])):
        ends = []
        for sign in (1, -1):
            moved = dict(x) | {name: x[name].copy()}
            moved[name][(slice(None), *at)] += sign * STEP
            y = net.run(moved, **run)[0]
            y = y[net.outputs.index(output)] if isinstance(y, tuple) else y
            ends.append(y[:, step, unit] if y.ndim == 3 else y[:, unit])
        found[(slice(None), *at)] = (ends[0] - ends[1]) / (2 * STEP)
    return found


def check(net, x, step=-1, unit=0, output=None, **run):
    x = net.as_inputs("test", x)
    t = net.trace(x, **run)
    output = net.outputs[0] if output is None else output
    found = t.gradient(unit, step, output)
    for name in net.inputs:
        if name in net.graph.ids:
            assert name not in found
            continue
        expected = differences(net, x, name, output, step, unit, **run)
        scale = max(1.0, np.abs(expected).max(initial=0))
        np.testing.assert_allclose(found[name], expected, atol=2e-5 * scale, rtol=2e-5)
    return found


@pairs.seeds(30, 60)
def test_random_networks(seed):
    rng = rng_of(seed)
    if seed % 2:
        net, x = make_graph(seed, "float64")
    else:
        net = make_network(seed, "float64")
        x = rng.normal(size=(2, 5, net.input_size))
    width = net.trace(x)[net.outputs[0]].y.shape[-1]
    check(net, x, unit=int(rng.integers(width)))


@pytest.mark.parametrize("seed", range(30))
def test_masks_resets_and_states(seed):
    rng = rng_of(seed)
    net = make_network(2 * seed, "float64")
    x = rng.normal(size=(2, 5, net.input_size))
    run = {"mask": rng.random((2, 5)) < 0.7} if seed % 2 else {"lengths": [3, 5]}
    mixes = any(node.mixes_steps for node in net.nodes)
    if seed % 3 == 0 and not mixes:
        run["reset"] = rng.random((2, 5)) < 0.3
    check(net, x, **run)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, *MORE_ACTIVATIONS])
def test_every_activation(activation):
    rng = rng_of(3)
    x = rng.normal(size=(2, 3, 4))
    check(Network([Dense(rng.normal(size=(4, 3)), rng.normal(size=3), activation), Activation(activation)]), x, unit=1)


@pytest.mark.long
def test_nodes_over_time():
    rng = rng_of(4)
    cell = make_cell(rng, 3, 4, "float64")
    x = rng.normal(size=(2, 9, 3))
    for number, (padding, strides, dilation, groups) in enumerate(
        product(["valid", "same", "causal", (1, 2)], [1, 2], [1, 2], [1, 2])
    ):
        kernel = rng.normal(size=(3, 4 // groups, 6))
        activation = ("linear", "tanh")[number % 2]
        conv = Conv1D(kernel, rng.normal(size=6), strides, padding, dilation, groups, activation)
        check(Network([Recurrent((cell,)), conv]), x, unit=2)
    for mode, padding, strides in product(["mean", "max"], ["valid", "same", "causal", (1, 1)], [1, 2, 3]):
        net = Network([Recurrent((cell,)), Pool1D(mode, 3, strides, padding)])
        check(net, x, unit=1, step=0)
        check(net, x, unit=1)
    for mode, mask in product(["mean", "max", "last"], [None, rng.random((2, 9)) < 0.6]):
        check(Network([Recurrent((cell,)), GlobalPool(mode)]), x, mask=mask)
    for mode, axis, keeps in product(["sum", "mean", "max", "min"], [1, -1], [True, False]):
        check(Network([Recurrent((cell,)), Reduce(mode, axis, keeps), *([] if keeps else [Activation("tanh")])]), x)
    check(Network([LayerNorm(rng.normal(size=3), rng.normal(size=3)), Recurrent((cell,)), Clip(-0.3, 0.2)]), x)
    net = Network([Masking(0.0), Recurrent((cell,)), LayerNorm()])
    check(net, x)
    x[0, 2] = 0
    found = net.trace(x).gradient(0)["x"]
    assert not found[0, 2].any()
    assert found[0, 1].any()


def test_nodes_of_signals():
    rng = rng_of(12)
    x = rng.normal(size=(2, 4, 6))
    check(Network([Take((2, 0, 0, 5)), Magnitude(0.1), Dense(rng.normal(size=(2, 3)))], inputs={"x": (None, 6)}), x)
    nodes = [Dense(rng.normal(size=(6, 6))), Magnitude(), Take((1, 0, 1, 2), axis=1)]
    check(Network(nodes, inputs={"x": (4, 6)}), x, step=2, unit=1)
    inner = (
        Reshape((-1, 2)),
        Conv1D(rng.normal(size=(2, 2, 3)), activation="tanh"),
        Select(stop=2),
        Select(start=-1, axis=2),
        Merge("concat"),
        Flatten(),
        Merge("concat"),
    )
    frames = PerFrame((6,), inner, ((0,), (1,), (2,), (2,), (3, 4), (5,), (6, 0)))
    check(Network([frames, Dense(rng.normal(size=(14, 2)))]), x, step=1, unit=1)
    assert not np.isnan(
        Network([Magnitude()], inputs={"x": (None, 2)}).trace(np.zeros((1, 2, 2))).gradient(0)["x"]
    ).any()


def test_nodes_over_a_grid():
    rng = rng_of(13)
    x, dense = rng.normal(size=(2, 4, 6)), Dense(rng.normal(size=(6, 6)))
    for settings in (
        {"padding": ((2, 0), (1, 0))},
        {"strides": (2, 1), "dilation": (2, 1), "padding": ((1, 2), (1, 1))},
        {"spread": (2, 3), "padding": ((2, 1), (1, 2))},
    ):
        conv = GridConv(rng.normal(size=(2, 3, 2, 2)), (3,), rng.normal(size=2), **settings)
        check(Network([dense, conv]), x, unit=1)
        grouped = GridConv(rng.normal(size=(2, 3, 1, 4)), (3,), rng.normal(size=4), groups=2, **settings)
        check(Network([dense, grouped]), x, unit=1)
    for mode, counts in (("max", False), ("mean", False), ("mean", True)):
        pool = GridPool(mode, (3,), 2, (2, 2), (2, 1), ((1, 1), (0, 1)), counts=counts)
        check(Network([dense, pool]), x, unit=2)


def test_powers_and_functions():
    rng = rng_of(16)
    x, cell = rng.normal(size=(2, 3, 3)), make_cell(rng, 3, 4, "float64")
    for node in (*map(Power, (0.5, -1.0, 2.0, 1.7)), *map(Function, ("abs", "cos", "log", "sin"))):
        ahead = [] if isinstance(node, Function) and node.function != "log" else [Activation("sigmoid")]
        check(Network([Recurrent((cell,)), *ahead, node]), x, unit=1)


def test_norms_and_sparse_products():
    rng = rng_of(17)
    x, dense = rng.normal(size=(2, 5, 4)), Dense(rng.normal(size=(4, 4)))
    nodes = [
        RMSNorm(rng.normal(size=4), rng.normal(size=4), 1e-2),
        GroupedDense(rng.normal(size=(2, 2, 3)), rng.normal(size=6)),
        GroupedDense(rng.normal(size=(1, 4, 2))),
        Conv1D(rng.normal(size=(3, 1, 4)), rng.normal(size=4), padding="causal", groups=4, activation="silu"),
    ]
    for node in nodes:
        check(Network([dense, node]), x, step=2, unit=1)


def test_nodes_that_weigh_steps():
    rng = rng_of(14)
    x, mask = rng.normal(size=(2, 5, 4)), rng_of(15).random((2, 5)) < 0.6
    dense = Dense(rng.normal(size=(4, 4)))
    for used in (None, mask):
        check(Network([dense, TimeSoftmax()]), x, step=1, mask=used)
        for groups, over_time in product((1, 2, 4), (True, False)):
            norm = GroupNorm(groups, rng.normal(size=4), rng.normal(size=4), 1e-2, over_time)
            check(Network([dense, norm]), x, step=1, unit=2, mask=used)
        for heads, causal in product((1, 2), (True, False)):
            nodes = [Dense(rng.normal(size=(4, 4))) for _ in range(3)]
            wires = [["x"], ["x"], ["x"], ["q", "k", "v"]]
            net = Network([*nodes, Attention(heads, 0.7, causal)], ["q", "k", "v", "y"], inputs=["x"], wires=wires)
            check(net, x, step=2, unit=3, mask=used)
        wires = [["x"], ["dense"], ["pool", "dense"], ["dense", "repeated"]]
        nodes = [dense, GlobalPool("mean"), RepeatLike(), Merge("add")]
        net = Network(nodes, ["dense", "pool", "repeated", "y"], inputs={"x": (None, 4)}, wires=wires)
        check(net, x, step=2, unit=3, mask=used)


def test_every_node_has_a_gradient_or_says_why_not():
    for node in NODES.values():
        assert node.gradients is not Node.gradients, node
    t = Network([Context(1)], inputs={"x": (None, 3)}).trace(np.ones((1, 4, 3)))
    with pytest.raises(ValueError, match=r"gradient: layer_0 \(Context\): it depends on the resets of its input"):
        t.gradient(0)


@pytest.mark.parametrize("mode", ["concat", "add", "mul", "ave", "max", "min", "sub"])
def test_merges(mode):
    rng = rng_of(5)
    cells = [make_cell(rng, 3, 4, "float64"), make_cell(rng, 3, 4, "float64", kind="gru")]
    head = Dense(rng.normal(size=(8 if mode == "concat" else 4, 2)))
    nodes = [*(Recurrent((cell,)) for cell in cells), Merge(mode), head]
    wires = [("x",), ("x",), ("layer_0", "layer_1"), ("layer_2",)]
    check(Network(nodes, wires=wires, inputs=["x"]), rng.normal(size=(2, 5, 3)), unit=1)


def test_ids_have_no_gradient_but_their_embeddings_do():
    rng = rng_of(6)
    net = Network([Embedding(rng.normal(size=(7, 3)), mask_zero=True), Recurrent((make_cell(rng, 3, 4, "float64"),))])
    ids = np.array([[1, 4, 0, 2], [3, 0, 0, 6]])
    found = net.trace(ids).gradient(2)
    assert sorted(found) == ["layer_0", "layer_1"]
    assert not found["layer_0"][ids == 0].any()
    assert found["layer_0"][ids != 0].any(axis=-1).all()


@pytest.mark.parametrize("seed", range(20))
def test_a_cell_gradient_equals_the_reference(seed):
    rng = rng_of(seed)
    spec = random_spec(rng)
    cell = fill(rng, spec, "float64")
    x = rng.normal(size=(2, 6, spec.input_size))
    unit, step = int(rng.integers(spec.output_size)), int(rng.integers(6))
    out = reference.forward(spec, cell.arrays, x)
    dy = np.zeros_like(out.y)
    dy[:, step, unit] = 1
    expected = reference.backward(spec, cell.arrays, out, dy=dy).x
    found = Network([Recurrent((cell,))]).trace(x).gradient(unit, step)["x"]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11 * max(1, np.abs(expected).max()))
    assert not found[:, step + 1 :].any()


def test_torch_gives_the_same():
    module = torch.nn.Sequential()
    lstm, head = torch.nn.LSTM(3, 8, num_layers=2, batch_first=True, bidirectional=True), torch.nn.Linear(16, 2)
    module.append(lstm)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = lstm, head

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    net = cs.load(torch.nn.Sequential(lstm))
    net = Network([*net.nodes, Dense(head.weight.detach().numpy().T, head.bias.detach().numpy())])
    x = torch.randn(4, 12, 3, requires_grad=True)
    Model()(x)[:, 1].sum().backward()
    assert x.grad is not None
    found = net.trace(x.detach().numpy()).gradient(1, step=-1)
    np.testing.assert_allclose(found["x" if "x" in found else net.inputs[0]], x.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_what_is_refused():
    rng = rng_of(8)
    net = Network([Recurrent((make_cell(rng, 3, 4),)), Dense(np.ones((4, 2), "f"))])
    t = net.trace(np.ones((2, 5, 3)))
    edited = net.edit(Patch("layer_0", "f", value=1.0))
    convolution, x = Network([Conv1D(np.ones((3, 3, 2), "f"), padding="causal")]), np.ones((2, 9, 3))
    for error, match, call in (
        (IndexError, "a unit of layer_1 below 2, got 2", lambda: t.gradient(2)),
        (IndexError, "a step of layer_1 below 5, got 5", lambda: t.gradient(0, 5)),
        (ValueError, "an output out of layer_0, layer_1", lambda: t.gradient(0, output="head")),
        (ValueError, "a trace of all nodes", lambda: net.trace(np.ones((2, 5, 3)), nodes="layer_0").gradient(0)),
        (ValueError, "a trace of all nodes", lambda: t.select(steps=slice(2)).gradient(0)),
        (ValueError, "a trace of all nodes, rows", lambda: t.select(rows=0).gradient(0)),
        (ValueError, "a trace of all nodes", lambda: convolution.trace(x, steps=slice(2, 5)).gradient(0)),
        (TypeError, "unit to be a whole number, got 0.5", lambda: t.gradient(0.5)),
        (TypeError, "step to be a whole number, got None", lambda: t.gradient(0, None)),
        (ValueError, "networks with patches have no gradient", lambda: edited.trace(np.ones((2, 5, 3))).gradient(0)),
    ):
        with pytest.raises(error, match=match):
            call()
    assert not t.gradient(3, output="layer_0")["layer_1"].any()
