"""ONNX graphs that use an operator's final states, as initial states or otherwise, compared with ONNX Runtime."""

import io
import json
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import make_cell, make_stack
from onnx import TensorProto, helper
from onnx_graphs import model, write
from torch import nn

import cellstack as cs
from cellstack import Network
from cellstack.cells.base import State
from cellstack.cells.errors import FormatError
from cellstack.formats import load_network
from cellstack.formats import onnx as adapter
from cellstack.nodes import Bidirectional, Recurrent, Scale, StepMask

TOLERANCE = 2e-6


def floats(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def runtime(path, feeds, outputs=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options).run(outputs, feeds)


class Seq2Seq(nn.Module):
    """An encoder, and a decoder that starts from its final states, for both directions through a separate layer."""

    def __init__(self, kind, layers=1, both_ways=False):
        super().__init__()
        units = 12 if both_ways else 6
        self.encoder = kind(5, 6, layers, batch_first=True, bidirectional=both_ways)
        self.decoder = kind(4, units, layers, batch_first=True)
        self.head, self.both_ways = nn.Linear(units, 3), both_ways
        self.h, self.c = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x, y):
        _, state = self.encoder(x)
        if self.both_ways:
            h, c = state if isinstance(state, tuple) else (state, None)
            h = torch.tanh(self.h(torch.cat((h[-2], h[-1]), dim=1))).unsqueeze(0)
            state = h if c is None else (h, self.c(torch.cat((c[-2], c[-1]), dim=1)).unsqueeze(0))
        return self.head(self.decoder(y, state)[0])


class Caption(nn.Module):
    """h from features, and c of zeros."""

    def __init__(self):
        super().__init__()
        self.features, self.decoder = nn.Linear(5, 6), nn.LSTM(4, 6, batch_first=True)

    def forward(self, x, y):
        h = self.features(x[:, 0]).unsqueeze(0)
        return self.decoder(y, (h, torch.zeros_like(h)))[0]


class Summary(nn.Module):
    """h and c of the last step as a vector."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.LSTM(5, 6, batch_first=True), nn.Linear(12, 3)

    def forward(self, x):
        _, (h, c) = self.encoder(x)
        return self.head(torch.cat((h[0], c[0]), dim=1))


MODULES = {
    "LSTM": lambda: Seq2Seq(nn.LSTM),
    "GRU": lambda: Seq2Seq(nn.GRU),
    "RNN": lambda: Seq2Seq(nn.RNN),
    "two layers": lambda: Seq2Seq(nn.LSTM, layers=2),
    "two layers of GRU": lambda: Seq2Seq(nn.GRU, layers=2),
    "both ways": lambda: Seq2Seq(nn.LSTM, both_ways=True),
    "both ways, GRU": lambda: Seq2Seq(nn.GRU, both_ways=True),
    "out of features": Caption,
    "as a value": Summary,
}


@pytest.mark.parametrize("case", MODULES)
def test_a_torch_export_is_one_network(tmp_path, case):
    torch.manual_seed(0)
    module, feeds = MODULES[case]().eval(), {"x": floats(3, 7, 5), "y": floats(3, 4, 4, seed=1)}
    if case == "as a value":
        del feeds["y"]
    data = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch warns that this exporter is the older one
        given = tuple(map(torch.tensor, feeds.values()))
        torch.onnx.export(module, given, data, input_names=list(feeds), output_names=["out"], dynamo=False)
        expected = module(*given).numpy()
    (tmp_path / "model.onnx").write_bytes(data.getvalue())
    net = cs.load(tmp_path / "model.onnx")
    np.testing.assert_allclose(net(feeds), expected, rtol=0, atol=TOLERANCE)
    assert any(net.initial_state_sources) or any(net.graph.states)
    net.save(tmp_path / "again.onnx")
    found = runtime(tmp_path / "again.onnx", feeds, list(net.outputs))
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=TOLERANCE)
    again = cs.load(tmp_path / "again.onnx")
    assert [type(node) for node in again.nodes] == [type(node) for node in net.nodes]
    np.testing.assert_array_equal(again(feeds), net(feeds))


# ── graphs by hand ────────────────────────────────────────────────────────────────────────────────────────────────────


def weights(kind, inputs, units, ways=1, seed=0):
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    return {"W": floats(ways, gates * units, inputs, seed=seed), "R": floats(ways, gates * units, units, seed=seed + 1)}


def pair(starts, ways=1, made=(), **second):
    """Two LSTMs over x and y, `[T, B, I]`, the second starting from `starts`, h and c."""
    arrays = {f"e{name}": a for name, a in weights("LSTM", 3, 4, ways).items()}
    arrays |= {f"d{name}": a for name, a in weights("LSTM", 2, 4, ways, 5).items()}
    way = {"direction": "bidirectional"} if ways == 2 else {}
    nodes = [
        helper.make_node("LSTM", ["x", "eW", "eR"], ["", "h", "c"], name="encoder", hidden_size=4, **way),
        *made,
        helper.make_node(
            "LSTM", ["y", "dW", "dR", "", "", *starts], ["Y"], name="decoder", hidden_size=4, **way, **second
        ),
        helper.make_node("Reshape", ["Y", "flat"], ["out"], name="out"),
    ]
    arrays["flat"] = np.array([0, 0, -1], np.int64)
    if ways == 2:
        nodes.insert(-1, helper.make_node("Transpose", ["Y"], ["Z"], perm=[0, 2, 1, 3]))
        nodes[-1].input[0] = "Z"
    else:
        nodes[-1] = helper.make_node("Squeeze", ["Y", "one"], ["out"], name="out")
        arrays["one"] = np.array([1], np.int64)
        del arrays["flat"]
    inputs = {"x": (TensorProto.FLOAT, ["T", "B", 3]), "y": (TensorProto.FLOAT, ["S", "B", 2])}
    return nodes, inputs, arrays


GRAPHS = {
    "h and c": lambda: pair(["h", "c"]),
    "both ways": lambda: pair(["h", "c"], ways=2),
    "h alone": lambda: pair(["h"]),
    "c alone": lambda: pair(["", "c"]),
    "the other way round": lambda: pair(["c", "h"]),
    "backwards": lambda: pair(["h", "c"], direction="reverse"),
    "computed": lambda: pair(["t", "c"], made=[helper.make_node("Tanh", ["h"], ["t"], name="t")]),
    "both ways, computed": lambda: pair(["t", "c"], ways=2, made=[helper.make_node("Tanh", ["h"], ["t"], name="t")]),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_states_by_hand(tmp_path, case):
    nodes, inputs, arrays = GRAPHS[case]()
    path = write(tmp_path / "model.onnx", model(nodes, inputs, ["out"], arrays))
    feeds = {"x": floats(5, 2, 3), "y": floats(4, 2, 2, seed=3)}
    (expected,) = runtime(path, feeds)
    net = cs.load(path)
    rows = {name: array.swapaxes(0, 1) for name, array in feeds.items()}
    np.testing.assert_allclose(net(rows), expected.swapaxes(0, 1), rtol=0, atol=TOLERANCE)
    assert any(isinstance(node, Scale) for node in net.nodes) == case.endswith("alone")
    net.save(tmp_path / "again.onnx")
    (again,) = runtime(tmp_path / "again.onnx", rows, list(net.outputs))
    np.testing.assert_allclose(again, net(rows), rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(cs.load(tmp_path / "again.onnx")(rows), net(rows))


def test_a_start_of_both_kinds_is_refused_by_name(tmp_path):
    nodes, inputs, arrays = pair(["h", "c0"])
    inputs["c0"] = (TensorProto.FLOAT, [1, "B", 4])
    path = write(tmp_path / "model.onnx", model(nodes, inputs, ["out"], arrays))
    with pytest.raises(
        FormatError, match="LSTM 'decoder': its initial states must be either all computed or all inputs"
    ):
        load_network(path)


def test_an_input_that_a_cell_starts_from_may_go_elsewhere_too(tmp_path):
    """It is then a value, not the network's state."""
    arrays = weights("GRU", 2, 4)
    nodes = [
        helper.make_node("Unsqueeze", ["h", "zero"], ["h0"], name="wide"),
        helper.make_node("GRU", ["y", "W", "R", "", "", "h0"], ["", "end"], name="gru", hidden_size=4),
        helper.make_node("Squeeze", ["end", "zero"], ["last"], name="narrow"),
        helper.make_node("Add", ["last", "h"], ["out"], name="sum"),
    ]
    inputs = {"y": (TensorProto.FLOAT, ["T", "B", 2]), "h": (TensorProto.FLOAT, ["B", 4])}
    path = write(tmp_path / "model.onnx", model(nodes, inputs, ["out"], {**arrays, "zero": np.array([0], np.int64)}))
    feeds = {"y": floats(5, 3, 2), "h": floats(3, 4, seed=1)}
    net = cs.load(path)
    found = net({"y": feeds["y"].swapaxes(0, 1), "h": feeds["h"]})
    np.testing.assert_allclose(found, runtime(path, feeds)[0], rtol=0, atol=TOLERANCE)


# ── written files ─────────────────────────────────────────────────────────────────────────────────────────────────────


def recurrent(inputs, *units, seed=0, dtype="float32", kind="lstm", flags=None, **ways):
    rng, cells = np.random.default_rng(seed), []
    for size in units:
        cells.append(make_cell(rng, inputs, size, dtype=dtype, kind=kind, **(flags or {})))
        inputs = size
    return Recurrent(tuple(cells), **ways)


def both_ways(inputs, units, seed=0, kind="lstm"):
    ahead = recurrent(inputs, units, seed=seed, kind=kind)
    return Bidirectional(ahead, recurrent(inputs, units, seed=seed + 1, kind=kind, go_backwards=True))


WRITTEN = {
    "stacks": lambda: (recurrent(3, 4, 5), recurrent(2, 4, 5, seed=1)),
    "both ways": lambda: (both_ways(3, 4), both_ways(2, 4, seed=5)),
    "GRU both ways": lambda: (both_ways(3, 4, kind="gru"), both_ways(2, 4, seed=5, kind="gru")),
    "scans of float64": lambda: (recurrent(3, 4, dtype="float64"), recurrent(2, 4, seed=1, dtype="float64")),
    "scans": lambda: (
        recurrent(3, 4, flags={"layer_norm": True}),
        recurrent(2, 4, seed=1, flags={"cell_clip": 0.3}, go_backwards=True),
    ),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_a_network_is_written_with_its_states(tmp_path, case):
    encoder, decoder = WRITTEN[case]()
    starts = [f"encoder/{state}" for state in encoder.state_sizes]
    outputs = ("decoder", *(f"decoder/{state}" for state in decoder.state_sizes))
    wires = [("x",), ("y", *starts)]
    net = Network([encoder, decoder], ["encoder", "decoder"], inputs=("x", "y"), wires=wires, outputs=outputs)
    feeds = {"x": floats(2, 5, 3).astype(net.dtype), "y": floats(2, 4, 2, seed=1).astype(net.dtype)}
    expected, after = net.run(feeds)
    adapter.save(net, tmp_path / "net.onnx", states=True)
    found = runtime(tmp_path / "net.onnx", feeds, list(outputs))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)
    given = {value.name for value in onnx.load(tmp_path / "net.onnx").graph.input}
    assert not any(name.startswith("decoder") for name in given)
    assert any(name.startswith("encoder") for name in given)  # its states can still be passed
    if case != "scans":
        again = cs.load(tmp_path / "net.onnx")
        for one, other in zip(again(feeds), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)
        found_after = again.run(feeds)[1]
        np.testing.assert_allclose(found_after[0].h, after[0].h, rtol=0, atol=TOLERANCE)


def test_flags_that_are_an_input_are_written(tmp_path):
    inputs = {"x": (None, 3), "used": (None,)}
    wires = [("x", "used"), ("layer_0",)]
    net = Network([StepMask(), recurrent(3, 4, kind="gru", return_sequences=False)], inputs=inputs, wires=wires)
    feeds = {"x": floats(3, 5, 3), "used": (floats(3, 5, seed=1) > 0).astype("float32")}
    net.save(tmp_path / "net.onnx")
    found = runtime(tmp_path / "net.onnx", feeds, ["layer_1"])[0]
    np.testing.assert_allclose(found, net(feeds), rtol=0, atol=TOLERANCE)


def test_what_an_older_file_says_of_its_states_holds(tmp_path):
    """Inputs that hold only states are the network's state, and states among a graph's outputs are the final ones."""
    net = Network([recurrent(3, 4)])
    adapter.save(net, tmp_path / "net.onnx", states=True)
    again = cs.load(tmp_path / "net.onnx")
    assert again.inputs == ("x",)
    x, state = floats(2, 5, 3), State(floats(2, 4, seed=1), floats(2, 4, seed=2))
    np.testing.assert_array_equal(again.run(x, state)[0], net.run(x, state)[0])
    said = json.loads(onnx.load(tmp_path / "net.onnx").metadata_props[0].value)
    assert said["states"] == [["layer_0.h", "layer_0.h.after"], ["layer_0.c", "layer_0.c.after"]]


@pytest.mark.parametrize("seed", range(12))
def test_cells_of_every_flag_start_from_each_other(tmp_path, seed):
    rng = np.random.default_rng(seed)
    ways = [bool(way) for way in rng.integers(2, size=4)]
    encoder = make_stack(rng, 3, residual=ways[0], return_sequences=ways[1], go_backwards=ways[2])
    decoder = Recurrent(encoder.cells, go_backwards=ways[3])
    wires = [("x",), ("y", *(f"a/{state}" for state in encoder.state_sizes))]
    outputs = ("b", *(f"b/{state}" for state in decoder.state_sizes))
    net = Network([encoder, decoder], ["a", "b"], inputs=("x", "y"), wires=wires, outputs=outputs)
    feeds = {"x": floats(2, 4, 3, seed=seed), "y": floats(2, 3, 3, seed=seed + 1)}
    expected = net(feeds)
    net.save(tmp_path / "net.onnx")
    again = cs.load(tmp_path / "net.onnx")
    scale = max(1.0, *(np.abs(one).max() for one in expected))
    for found in (runtime(tmp_path / "net.onnx", feeds, list(outputs)), again(feeds)):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * scale)
