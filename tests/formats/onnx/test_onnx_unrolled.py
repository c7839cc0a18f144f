"""Loops that an exporter unrolled: the steps of cells become one node again, compared with ONNX Runtime."""

import time
import warnings

import numpy as np
import pairs
import pytest
import torch
from onnx import TensorProto, helper
from onnx_graphs import compare, export, model, write
from torch import nn

from cellstack.cells.errors import FormatError
from cellstack.formats import onnx as adapter

KINDS = {"LSTMCell": "lstm", "GRUCell": "gru", "RNNCell": "rnn"}


class Loop(nn.Module):
    """A loop over steps in Python, a cell or two in each, and a head on the selected steps."""

    def __init__(self, kind, bias=True, layers=1, backwards=False, how="all"):
        super().__init__()
        self.cells = nn.ModuleList(getattr(nn, kind)(3 if n == 0 else 4, 4, bias=bias) for n in range(layers))
        self.backwards, self.how, self.head = backwards, how, nn.Linear(4, 2)

    def forward(self, x):
        states = [(x.new_zeros(x.shape[0], 4), x.new_zeros(x.shape[0], 4)) for _ in self.cells]
        outputs, steps = [], range(x.shape[1])
        for t in reversed(steps) if self.backwards else steps:
            y = x[:, t]
            for n, cell in enumerate(self.cells):
                made = cell(y, states[n]) if isinstance(cell, nn.LSTMCell) else (cell(y, states[n][0]), states[n][1])
                y, states[n] = made[0], made
            outputs.append(y)
        if self.how == "all":
            return self.head(torch.stack(outputs[::-1] if self.backwards else outputs, 1))
        return self.head(outputs[-1] if self.how == "last" else outputs[1] + outputs[-1])


@pairs.parametrize(
    "kind, opset, form, bias", list(KINDS), [9, 12, 17], [(1, False, "all"), (2, True, "all"), (1, True, "two")], [1, 0]
)
def test_loops(tmp_path, kind, opset, form, bias):
    layers, backwards, how = form
    torch.manual_seed(6)
    module = Loop(kind, bias, layers, backwards, how)
    path, feeds = export(tmp_path / "net.onnx", module, (torch.randn(2, 4, 3),), fixed=("in0",), opset=opset)
    net = compare(path, feeds)
    assert [cell.spec.kind for cell in net.cells] == [KINDS[kind]] * layers
    assert net.cells[0].spec.use_bias == bias
    parts = adapter.extract(path)
    assert [part.cells[0].spec.kind for part in parts.values()] == [KINDS[kind]] * layers
    np.testing.assert_array_equal(next(iter(parts.values())).cells[0].kernel, net.cells[0].kernel)


def test_the_last_h_alone(tmp_path):
    net = compare(*export(tmp_path / "net.onnx", Loop("GRUCell", how="last"), (torch.randn(2, 4, 3),)))
    assert [type(node).__name__ for node in net.nodes] == ["Select", "Recurrent", "Dense"]  # of its four steps


def test_a_loop_over_some_of_the_steps(tmp_path):
    """A file that unrolls four steps uses four, even of longer sequences."""

    class Some(Loop):
        def forward(self, x):
            h = c = x.new_zeros(x.shape[0], 4)
            for t in range(3):
                h, c = self.cells[0](x[:, t], (h, c))
            return self.head(h)

    torch.manual_seed(7)
    compare(*export(tmp_path / "net.onnx", Some("LSTMCell"), (torch.randn(2, 6, 3),)))
    compare(*export(tmp_path / "fixed.onnx", Some("LSTMCell"), (torch.randn(2, 6, 3),), fixed=("in0",)))


class Odd(Loop):
    """Steps in a custom order."""

    def forward(self, x):
        h = x.new_zeros(x.shape[0], 4)
        for t in (0, 2, 1, 3):
            h = self.cells[0](x[:, t], h)
        return self.head(h)


class Changed(Loop):
    """A cell whose h is multiplied by 0.5 between its steps."""

    def forward(self, x):
        h = x.new_zeros(x.shape[0], 4)
        for t in range(4):
            h = self.cells[0](x[:, t], h) / 2
        return self.head(h)


@pytest.mark.parametrize("kind", ["GRUCell", "RNNCell"])
def test_steps_in_an_order_of_their_own_are_read_one_by_one(tmp_path, kind):
    net = compare(*export(tmp_path / "net.onnx", Odd(kind), (torch.randn(2, 4, 3),)))
    assert len(net.cells) == 4
    assert next(iter(net.metadata["onnx"]["unrolled"].values()))[0] == 4


@pytest.mark.parametrize("kind", ["GRUCell", "RNNCell"])
def test_loops_that_do_not_run_over_a_sequence(tmp_path, kind):
    path, _ = export(tmp_path / "net.onnx", Changed(kind), (torch.randn(2, 4, 3),))
    with pytest.raises(FormatError, match="the graph can't be read as a Network, found: "):
        adapter.load(path)
    assert not adapter.extract(path)


class Layers(nn.Module):
    """torch's layers with a norm and a head."""

    def __init__(self, kind, layers, both, batch_first, **named):
        super().__init__()
        self.rnn = getattr(nn, kind)(3, 4, layers, bidirectional=both, batch_first=batch_first, **named)
        self.norm, self.head = nn.LayerNorm(4 * (1 + both)), nn.Linear(4 * (1 + both), 2)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        y, state = self.rnn(x)
        return self.head(torch.relu(self.norm(y))), state[0] if isinstance(state, tuple) else state


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "layers", "both", "batch_first", "fixed"),
    [
        pytest.param("LSTM", 2, True, True, False, marks=pytest.mark.slow),
        ("GRU", 2, True, False, True),
        pytest.param("RNN", 2, True, True, False, marks=pytest.mark.slow),
        pytest.param("RNN", 2, True, False, True, marks=pytest.mark.slow),
        pytest.param("RNN", 1, False, True, True, marks=pytest.mark.slow),
    ],
)
def test_the_newer_exporter(tmp_path, kind, layers, both, batch_first, fixed):
    """It unrolls nn.RNN step by step; for fixed sizes, the product of the initial state of zeros is folded."""
    torch.manual_seed(8)
    x, path = torch.randn(4, 5, 3), tmp_path / "net.onnx"
    free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    module = Layers(kind, layers, both, batch_first).eval()
    given = {} if fixed else {"dynamic_shapes": (free,)}
    given |= {"input_names": ["in0"], "verbose": False, "external_data": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), str(path), dynamo=True, **given)
    net = compare(str(path), {"in0": x.numpy()})
    assert len(net.cells) == layers * (1 + both)
    assert any(type(node).__name__ == "LayerNorm" for node in net.nodes)


def ladder(count, weights):
    """An MLP that looks like the steps of an RNN, with alternating matrices."""
    nodes = [helper.make_node("MatMul", ["X", "W"], ["h0"])]
    for n in range(count):
        nodes += [
            helper.make_node("MatMul", [f"h{n}", f"R{n % weights}"], [f"p{n}"]),
            helper.make_node("MatMul", ["X", "W"], [f"q{n}"]),
            helper.make_node("Add", [f"p{n}", f"q{n}"], [f"s{n}"]),
            helper.make_node("Tanh", [f"s{n}"], ["Y" if n == count - 1 else f"h{n + 1}"]),
        ]
    rng = np.random.default_rng(0)
    arrays = {"W": rng.standard_normal((3, 4)).astype(np.float32)}
    arrays |= {f"R{n}": rng.standard_normal((4, 4)).astype(np.float32) for n in range(weights)}
    return model(nodes, {"X": (TensorProto.FLOAT, ["B", 3])}, {"Y": 2}, arrays)


@pytest.mark.long
def test_long_ladders_take_little_time(tmp_path):
    path = write(tmp_path / "net.onnx", ladder(500, 2))
    start = time.process_time()
    net = compare(path, {"X": np.ones((2, 3), np.float32)})
    assert not net.cells
    assert time.process_time() - start < 10
