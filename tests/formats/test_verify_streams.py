"""`verify` beyond outputs: states of Keras's layers and of masked graphs, and reduced-precision streams."""

import json
import warnings

import numpy as np
import pytest
from networks import make_cell

from cellstack import Network, load
from cellstack.formats import onnx as onnx_adapter
from cellstack.formats.verify import verify
from cellstack.nodes import Bidirectional, Cell, Dense, Embedding, GlobalPool, LayerNorm, Masking, Recurrent


def make_net(dtype="float32", **settings):
    rng = np.random.default_rng(0)
    return Network([Recurrent((make_cell(rng, 3, 4, dtype, **settings), make_cell(rng, 4, 5, dtype)))])


def keras_models(keras):
    """Models with recurrent layers, and how many state arrays verify compares, or why none."""
    layers, sequence, end = keras.layers, {"return_sequences": True}, keras.Input((None, 3))
    x = keras.Input((None, 3))
    one = layers.GRU(4, name="b_first")(x)
    branches = layers.Concatenate()([layers.LSTM(4, name="a_second")(x), one])
    vector = keras.Input((2,), name="vector")
    twice = layers.GRU(3, **sequence)
    made = lambda *parts, batch=None: keras.Sequential([keras.Input((None, 3), batch_size=batch), *parts])  # noqa: E731
    return {
        "stack": (made(layers.RNN([layers.LSTMCell(4), layers.GRUCell(5)], **sequence), layers.SimpleRNN(3)), 4),
        "pair": (made(layers.Bidirectional(layers.LSTM(4, **sequence)), layers.Bidirectional(layers.GRU(3))), 6),
        "stateful": (made(layers.LSTM(4, stateful=True, **sequence), layers.Dense(2), batch=2), 2),
        "backwards": (made(layers.LSTM(4, go_backwards=True, **sequence)), 2),
        "masking": (made(layers.Masking(), layers.LSTM(4)), 2),
        "two inputs": (keras.Model([x, vector], layers.Concatenate()([branches, vector])), 3),
        "no time": (keras.Sequential([keras.Input((3,)), layers.Dense(2)]), 0),
        "shared": (keras.Model(end, twice(twice(end))), "states of widths [3], the network's cells [3, 3]"),
        "nested": (made(made(layers.LSTM(4))), "states of widths [], the network's cells [4, 4]"),
    }


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["stack", "pair", "stateful", "backwards", "masking", "two inputs", "no time", "shared", "nested"]
)
def test_the_states_of_keras_layers(tmp_path, name):
    import keras

    with warnings.catch_warnings():  # keras's own
        warnings.simplefilter("ignore")
        model, expected = keras_models(keras)[name]
        rng = np.random.default_rng(1)
        model.set_weights([rng.normal(0, 0.5, weight.shape) for weight in model.get_weights()])
        model.save(tmp_path / "net.keras")
    net = load(tmp_path / "net.keras")
    report = verify(net, tmp_path / "net.keras")
    assert report.ok(1e-5), str(report)
    states = [one for one in report.differences if one.name.startswith("cell")]
    assert len(states) == (expected if isinstance(expected, int) else 0)
    if isinstance(expected, str):
        assert report.note.startswith("not compared: cell 0 h")
        assert expected in report.note
    if name == "backwards":
        (node, *_) = net.nodes
        cell = Cell(node.cells[0].spec, **{**node.cells[0].arrays, "bias": node.cells[0].bias + np.float32(0.1)})
        wrong = verify(Network([Recurrent((cell,), go_backwards=True)]), tmp_path / "net.keras")
        assert all(one.relative > 1e-3 for one in wrong.differences)


# ── reduced-precision streams, on the user's sample ─────────────────────────────────────────────────────────────────


def test_streams_are_measured_on_the_sample(tmp_path):
    rng = np.random.default_rng(0)
    net = Network([*make_net().nodes, Dense(rng.normal(size=(5, 2)).astype("f4")), GlobalPool("last")])
    net.save(tmp_path / "net.safetensors")
    x = rng.normal(size=(3, 40, 3)).astype("f4")
    report = verify(net, tmp_path / "net.safetensors", x)
    assert [(one.weights, one.name) for one in report.streams] == [("bfloat16", "layer_2"), ("int8", "layer_2")]
    exact = net.stream(3).run(x).astype("f8")
    for one in report.streams:
        apart = np.abs(net.stream(3, weights=one.weights).run(x) - exact)
        assert (one.greatest, one.mean) == pytest.approx((apart.max(), apart.mean()))
        largest = np.abs(exact).max()
        assert (one.relative, one.mean_relative) == pytest.approx((apart.max() / largest, apart.mean() / largest))
        assert 0 < one.mean_relative < one.relative < 0.05
    assert (report.drawn, report.no_streams) == (False, "")
    assert "on x [3, 40, 3]\n" in str(report)
    drawn = verify(net, tmp_path / "net.safetensors")
    assert drawn.drawn
    assert str(drawn).count("on x [5, 7, 3], drawn at random\n") == 2
    assert drawn.streams != report.streams
    found = json.loads(json.dumps(report.to_json()))
    assert found["streams"][1]["weights"] == "int8"
    assert found["streams"][1]["greatest"] == report.streams[1].greatest
    assert verify(net, tmp_path / "net.safetensors", x, streams=False).streams == ()


def test_streams_of_two_outputs_and_ids(tmp_path):
    rng = np.random.default_rng(0)
    table = Embedding(rng.normal(size=(7, 3)).astype("f4"))
    net = Network(
        [table, *make_net().nodes, Dense(np.ones((5, 1), "f4"))], ["table", "rnn", "sum"], outputs=("rnn", "sum")
    )
    net.save(tmp_path / "net.safetensors")
    report = verify(net, tmp_path / "net.safetensors", rng.integers(0, 7, (2, 9)))
    assert [one.name for one in report.streams] == ["rnn", "sum"] * 2


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (make_net("float64"), "the network is in float64"),
        (Network([LayerNorm(np.ones(3, "f4"))]), "the network has no cells or dense layers"),
        (Network([Bidirectional(Recurrent(make_net().cells), Recurrent(make_net().cells, go_backwards=True))]),
         "layer_0 can't run step by step: it runs backwards"),
        (Network([*make_net().nodes, GlobalPool("mean")]), "layer_1 can't run step by step: the mean over time"),
        (Network([Masking(), *make_net().nodes]), "layer_0 masks a step of row 1"),
    ],
)  # fmt: skip
def test_networks_without_reduced_precision_streams(tmp_path, net, why):
    net.save(tmp_path / "net.safetensors")
    x = np.ones((2, 4, 3))
    x[1, 2] = 0.0
    report = verify(net, tmp_path / "net.safetensors", x)
    assert report.ok(0.0)
    assert report.streams == ()
    assert why in report.no_streams
    assert str(report).splitlines()[-2] == f"reduced-precision streams: not measured: {report.no_streams}"


# ── ONNX that we write ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_onnx_with_masks_and_all_flags_gives_its_states(tmp_path, dtype):
    rng = np.random.default_rng(0)
    cells = (make_cell(rng, 3, 4, dtype, zoneout=0.2), make_cell(rng, 4, 5, dtype, kind="gru", layer_norm=True))
    back = Recurrent((make_cell(rng, 5, 4, dtype),), go_backwards=True)
    net = Network([Masking(), Recurrent(cells), Bidirectional(Recurrent((make_cell(rng, 5, 4, dtype),)), back)])
    onnx_adapter.save(net, str(tmp_path / "net.onnx"))
    x = rng.normal(size=(4, 6, 3))
    x[rng.random((4, 6)) < 0.5] = 0.0
    report = verify(net, tmp_path / "net.onnx", x)
    assert report.ok(1e-5 if dtype == "float32" else 1e-12), str(report)
    assert len(report.differences) == 1 + 7
    assert report.note == ""


def test_operators_that_onnx_runtime_lacks_in_float64(tmp_path):
    net = Network([Dense(np.ones((3, 2)), None, "softsign")])
    onnx_adapter.save(net, str(tmp_path / "net.onnx"))
    report = verify(net, tmp_path / "net.onnx")
    assert report.runtime is None
    assert report.note.endswith("can't run it: it has no Softsign in float64")
