"""torch.compile and torch.export capture a layer as one graph."""

import copy

import pytest
import torch
from tools import need

from cellstack import layers


def lstm(**kwargs):
    return layers.LSTM(5, return_sequences=True, return_state=True, input_size=3, **kwargs)


def stack():
    return layers.RNN([layers.LSTMCell(4), layers.LSTMCell(5)], return_state=True, input_size=3)


FLAGS = {
    "peepholes": True,
    "proj_size": 2,
    "layer_norm": True,
    "norm_epsilon": 0.1,
    "clip": 3.0,
    "cell_clip": 2.0,
    "coupled": True,
}
FLAGS |= {"zoneout": 0.2, "zoneout_cell": 0.3, "learn_initial_state": True, "gate_activations": {"o": "elu(0.5)"}}


def gru(**kwargs):
    return layers.GRU(5, return_sequences=True, return_state=True, input_size=3, **kwargs)


def residual():
    cells = [layers.LSTMCell(4, proj_size=3), layers.GRUCell(3), layers.SimpleRNNCell(3)]
    return layers.RNN(layers.StackedRNNCells(cells, residual=True), return_sequences=True, input_size=3)


LAYERS = {
    "gru": gru,
    "gru, reset before": lambda: gru(reset_after=False, zoneout=0.3, seed=1, go_backwards=True),
    "gru, torch loop": lambda: gru(activation="gelu", layer_norm=True),
    "simple": lambda: layers.SimpleRNN(5, input_size=3, learn_initial_state=True),
    "minimal gru": lambda: layers.MinGRU(
        5, zoneout=0.3, seed=1, return_sequences=True, return_state=True, input_size=3
    ),
    "minimal lstm": lambda: layers.MinLSTM(5, return_sequences=True, return_state=True, input_size=3),
    "minimal lstm, torch loop": lambda: layers.MinLSTM(5, activation="gelu", layer_norm=True, input_size=3),
    "flags": lambda: lstm(**FLAGS, seed=3),
    "flags, torch loop": lambda: lstm(**FLAGS, seed=3, activation="gelu"),
    "residual": residual,
    "lstm": lstm,
    "backwards": lambda: lstm(go_backwards=True, zero_output_for_mask=True),
    "stack": stack,
    "bidirectional": lambda: layers.Bidirectional(lstm()),
    "dropout": lambda: lstm(dropout=0.5, recurrent_dropout=0.5, seed=3),
    "torch loop": lambda: lstm(activation="gelu"),
}


def flatten(results):
    if isinstance(results, torch.Tensor):
        return [results]
    return [part for result in results for part in flatten(result)]


@pytest.fixture(autouse=True)
def uncompiled():
    """Forget what other tests compiled: torch limits how often it compiles a function again."""
    torch.compiler.reset()


def check(name, backend):
    layer = LAYERS[name]()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    mask = torch.tensor([[True, True, False, True], [True, False, True, True]])
    for call in range(2):
        x = torch.randn(2, 4, 3, requires_grad=True)
        twin_x = x.detach().clone().requires_grad_()
        expected, got = flatten(layer(x, mask=mask)), flatten(compiled(twin_x, mask=mask))
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(a, b)
        sum(part.sum() for part in expected).backward()
        sum(part.sum() for part in got).backward()
        torch.testing.assert_close(x.grad, twin_x.grad)
        for (key, a), b in zip(layer.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=f"{key} in call {call}")


# Each kind of cell and each way to run it. The others are slower, and test_compiled_by_inductor has all.
QUICK = ["lstm", "gru, reset before", "minimal gru", "flags", "bidirectional"]
MOST = ["gru", "gru, torch loop", "minimal lstm", "residual", "backwards", "dropout"]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in MOST)])
def test_compiled_in_one_graph(name):
    check(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_by_inductor(name):
    need("g++")
    check(name, "inductor")


@pytest.mark.parametrize("name", ["lstm", "gru", "minimal gru", "minimal lstm", "flags"])
def test_compiled_without_gradients_and_with_gates(name):
    layer = LAYERS[name]().eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 3)
    with torch.no_grad():
        for a, b in zip(flatten(layer(x, return_gates=True)), flatten(compiled(x, return_gates=True)), strict=True):
            torch.testing.assert_close(a, b)


def test_compiled_with_pieces():
    layer = layers.Bidirectional(gru(learn_initial_state=True))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    reset = torch.tensor([[False, True, False, True], [True, False, False, False]])
    x = torch.randn(2, 4, 3)
    for a, b in zip(flatten(layer(x, reset=reset)), flatten(compiled(x, reset=reset)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.long
@pytest.mark.parametrize("make", [lstm, gru])
def test_compiled_stateful(make):
    layer = make(stateful=True)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(2, 4, 3)
        torch.testing.assert_close(layer(x)[0], compiled(x)[0])
    for a, b in zip(layer.states, twin.states, strict=True):
        torch.testing.assert_close(a, b)


EXPORTED = ["lstm", "stack", "bidirectional", "gru", "minimal gru", "minimal lstm", "flags", "residual"]


@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in EXPORTED), ("lstm", True), ("bidirectional", True)]
)
def test_exported_whole(name, strict):
    layer = LAYERS[name]().eval()
    x = torch.randn(2, 4, 3)
    batch, steps = torch.export.Dim("batch", min=2), torch.export.Dim("steps", min=2)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch, 1: steps}, *[None] * 0), strict=strict)
    assert any("cellstack.recurrent" in str(node.target) for node in program.graph.nodes)
    longer = torch.randn(3, 9, 3)
    for a, b in zip(flatten(layer(longer)), flatten(program.module()(longer)), strict=True):
        torch.testing.assert_close(a, b)
