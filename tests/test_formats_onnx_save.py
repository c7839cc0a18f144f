"""Networks written as ONNX: checked by onnx, run by ONNX Runtime with states in and out, and read again."""

import json
from itertools import pairwise

import numpy as np
import onnx
import pytest
from networks import make_graph
from onnx_graphs import run

from cellstack import CellSpec
from cellstack.formats import onnx as adapter
from cellstack.network import Network
from cellstack.nodes import (
    Activation,
    Bidirectional,
    Cell,
    Conv1D,
    Dense,
    Embedding,
    Flatten,
    LayerNorm,
    Masking,
    Merge,
    Permute,
    Pool,
    Pool1D,
    Recurrent,
    Repeat,
    Reshape,
    Scale,
    Select,
    Standardise,
)
from cellstack.spec import FormatError, HiddenState, State

GRAPHS = 3e-5  # as TOLERANCE, through more nodes
TOLERANCE = 2e-5  # float32 on both sides, through a few nodes, relative to the greatest number above 1
ACTIVATIONS = (
    "tanh",
    "relu",
    "softsign",
    "elu(0.5)",
    "affine(0.5, 0.1)",
    "linear",
    "scaled_tanh(0.9, 0.6)",
    "softplus",
)
GATES = ("sigmoid", "hard_sigmoid", "hard_sigmoid(0.3, 0.4)")


def floats(rng, *shape):
    return (0.5 * rng.standard_normal(shape)).astype(np.float32)


def random_cell(rng, inputs, units, kind=None, **given):
    """A cell with any of the flags that ONNX's operators have."""
    kind = str(rng.choice(["lstm", "gru", "rnn"])) if kind is None else kind
    often = lambda share: bool(rng.random() < share)  # noqa: E731
    flags = {
        "activation": str(rng.choice(ACTIVATIONS)) if often(0.5) else "tanh",
        "use_bias": often(0.8),
        "clip": 0.7 if often(0.3) else None,
        "learn_initial_state": often(0.3),
    }
    if kind != "rnn":
        flags["recurrent_activation"] = str(rng.choice(GATES))
    if kind == "lstm":
        flags |= {"peepholes": often(0.4), "coupled": often(0.3)}
        flags["gate_activations"] = {"cell": "tanh"}
    if kind == "gru":
        flags["reset_after"] = often(0.5)
    spec = CellSpec(inputs, units, kind=kind, **(flags | given))
    return Cell(spec, *(floats(rng, *shape) for shape in spec.shapes.values()))


def random_states(rng, net, batch):
    kinds = {"lstm": State, "gru": HiddenState, "rnn": HiddenState}
    return tuple(
        kinds[cell.spec.kind](*(floats(rng, batch, size) for size in cell.spec.state_sizes.values()))
        for cell in net.cells
    )


def check(tmp_path, net, x, states=None, tolerance=TOLERANCE, exact_names=False):
    """Save `net`, hold ONNX Runtime's answer and that of what is read again against its own; return what is read."""
    path = str(tmp_path / "net.onnx")
    adapter.save(net, path)
    onnx.checker.check_model(path, full_check=True)
    feeds = dict(zip(net.inputs, x if isinstance(x, tuple) else (x,), strict=True))
    y, after = net.run(x, states)
    outputs = y if isinstance(y, tuple) else (y,)
    names = json.loads({entry.key: entry.value for entry in onnx.load(path).metadata_props}["cellstack"])["states"]
    if states is not None:
        feeds |= dict(zip([before for before, _ in names], by_parts(net, states), strict=True))
    answers = run(path, feeds, [*net.outputs, *(end for _, end in names)])
    for got, expected in zip(answers, [*outputs, *by_parts(net, after)], strict=True):
        near(got, expected, tolerance)
    again = adapter.load(path)
    y_again, after_again = again.run(x, states)
    for got, expected in zip(y_again if isinstance(y_again, tuple) else (y_again,), outputs, strict=True):
        near(got, expected, tolerance)
    for got, expected in zip(by_parts(again, after_again), by_parts(net, after), strict=True):
        near(got, expected, tolerance)
    return again


def by_parts(net, states):
    """States in the order in which they are written: node by node, and of a pair of cells by parts."""
    flat, left = [], list(states)
    for node in net.nodes:
        own = [left.pop(0) for _ in node.cells]
        paired = isinstance(node, Bidirectional) and len(own) == 2 and _as_one(node)
        flat += [array for part in zip(*own, strict=True) for array in part] if paired else [a for s in own for a in s]
    return flat


def _as_one(node):
    first, second = (cell.spec for cell in node.cells)
    flags = ("kind", "units", "clip", "coupled", "reset_after", "peepholes", "use_bias")
    return node.merge_mode == "concat" and all(getattr(first, flag) == getattr(second, flag) for flag in flags)


def near(got, expected, tolerance=TOLERANCE):
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max(initial=0.0)))


@pytest.mark.parametrize("seed", range(60))
def test_stacks(tmp_path, seed):
    rng = np.random.default_rng(seed)
    widths = [int(n) for n in rng.integers(1, 6, int(rng.integers(2, 5)))]
    residual = bool(rng.integers(2))
    if residual:
        widths[1:] = [widths[1]] * (len(widths) - 1)
    cells = [random_cell(rng, *pair) for pair in pairwise(widths)]
    node = Recurrent(
        tuple(cells), return_sequences=bool(rng.integers(2)), go_backwards=bool(rng.integers(2)), residual=residual
    )
    net = Network([node, Dense(floats(rng, widths[-1], 2), floats(rng, 2))], ["stack", "head"])
    batch, steps = (int(n) for n in rng.integers(1, 5, 2))
    x = floats(rng, batch, steps, widths[0])
    check(tmp_path, net, x, random_states(rng, net, batch) if rng.integers(2) else None)


@pytest.mark.parametrize("seed", range(40))
def test_pairs(tmp_path, seed):
    rng = np.random.default_rng(seed)
    inputs, units, depth = (int(n) for n in rng.integers(1, 5, 3))
    depth = 1 if seed % 2 else min(depth, 2)
    mode, sequences = str(rng.choice(["concat", "sum", "mul", "ave"])), bool(rng.integers(2))
    kind = str(rng.choice(["lstm", "gru", "rnn"]))
    alike = {"peepholes": False, "coupled": False} if kind == "lstm" else {}
    alike |= {"use_bias": True, "clip": None} | ({"reset_after": True} if kind == "gru" else {})
    widths = [inputs, *[units] * depth]
    halves = [
        Recurrent(
            tuple(random_cell(rng, *pair, kind, **alike) for pair in pairwise(widths)),
            return_sequences=sequences,
            go_backwards=back,
        )
        for back in (False, True)
    ]
    net = Network([Bidirectional(*halves, mode)], ["pair"])
    batch, steps = (int(n) for n in rng.integers(1, 5, 2))
    states = random_states(rng, net, batch) if rng.integers(2) else None
    again = check(tmp_path, net, floats(rng, batch, steps, inputs), states)
    if mode == "concat" and depth == 1:
        assert again.names == ("pair",)
        assert isinstance(again.nodes[0], Bidirectional)


def lstm(rng, inputs, units, **flags):
    return Recurrent((random_cell(rng, inputs, units, "lstm"),), **flags)


def chains(rng):
    """Nodes of every kind in a row over x [B, T, 3], by what they show."""
    f = lambda *shape: floats(rng, *shape)  # noqa: E731
    return {
        "standardise": [Standardise(f(3), np.float32([0.5, 2.0, 1.5])), lstm(rng, 3, 4), Pool("last")],
        "scale": [Scale(f(3), f(3)), lstm(rng, 3, 4), Pool("mean")],
        "norm": [lstm(rng, 3, 4), LayerNorm(f(4), f(4), 1e-3), Pool("max"), Dense(f(4, 2), None, "softmax")],
        "norm without bias": [lstm(rng, 3, 4), LayerNorm(f(4))],
        "norm alone": [lstm(rng, 3, 4), LayerNorm(None, f(4), 1e-2)],
        "causal": [Conv1D(f(3, 3, 5), f(5), 1, "causal", 2, 1, "relu"), lstm(rng, 5, 4)],
        "same": [Conv1D(f(2, 1, 6), f(6), 2, "same", 1, 3), lstm(rng, 6, 4)],
        "padded": [Conv1D(f(3, 3, 4), None, 2, (2, 1), 1, 1, "softplus"), lstm(rng, 4, 4)],
        "max": [Conv1D(f(1, 3, 4)), Pool1D("max", 2), lstm(rng, 4, 4, return_sequences=False), Dense(f(4, 1), f(1))],
        "mean": [Pool1D("mean", 3, 2, "same"), lstm(rng, 3, 4)],
        "turned": [lstm(rng, 3, 4), Select(None, None, -1)],
        "last two": [lstm(rng, 3, 4), Select(-2, None), Activation("elu(0.5)")],
        "some features": [Select(1, 3, 1, -1), lstm(rng, 2, 4, go_backwards=True)],
        "repeat": [lstm(rng, 3, 4, return_sequences=False), Repeat(3), lstm(rng, 4, 2)],
        "reshape": [Dense(f(3, 8), f(8)), Pool("mean"), Reshape((4, 2)), lstm(rng, 2, 4)],
        "flatten": [lstm(rng, 3, 4), Pool("last"), Flatten(), Dense(f(4, 2), f(2), "hard_sigmoid(0.3, 0.4)")],
        "permute at the end": [lstm(rng, 3, 4), Permute((2, 1))],
        "activations": [*(Activation(text) for text in ACTIVATIONS), Activation("leaky_relu"), lstm(rng, 3, 4)],
        "thresholds": [Dense(f(3, 3)), Activation("thresholded_relu(0.1)"), lstm(rng, 3, 4), Activation("sigmoid")],
        "two layers": [lstm(rng, 3, 4), Activation("relu"), lstm(rng, 4, 5), Dense(f(5, 2), f(2), "softmax")],
    }


@pytest.mark.parametrize("name", chains(np.random.default_rng(0)))
def test_chains(tmp_path, name):
    rng = np.random.default_rng(7)
    net = Network(chains(rng)[name], metadata={"labels": ["a", "b"]})
    x = floats(rng, 2, 6, 3)
    again = check(tmp_path, net, x, random_states(rng, net, 2))
    assert again.metadata["labels"] == ["a", "b"]
    assert again.metadata["source"] == {"format": "onnx", "producer": "cellstack", "opset": 17}
    check(tmp_path, net, x)


@pytest.mark.parametrize("name", ["standardise", "scale", "causal", "same", "norm", "two layers"])
def test_plain_nodes_come_back_as_they_were(tmp_path, name):
    net = Network(chains(np.random.default_rng(7))[name])
    path = str(tmp_path / "net.onnx")
    adapter.save(net, path)
    again = adapter.load(path)
    assert [type(node) for node in again.nodes] == [type(node) for node in net.nodes]
    assert again.names == net.names
    assert [cell.spec for cell in again.cells] == [cell.spec for cell in net.cells]
    for node, expected in zip(again.nodes, net.nodes, strict=True):
        for key, value in vars(expected).items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(getattr(node, key), value)
            elif key in ("strides", "padding", "dilation", "groups", "activation", "mode"):
                assert getattr(node, key) == value


def test_a_graph_of_two_inputs_and_two_outputs(tmp_path):
    rng = np.random.default_rng(0)
    nodes = [
        Embedding(floats(rng, 9, 3)),
        lstm(rng, 3, 4, return_sequences=False),
        Merge("concat"),
        Dense(floats(rng, 6, 2), floats(rng, 2)),
        Dense(floats(rng, 6, 2), floats(rng, 2), "tanh"),
        Merge("ave"),
        Merge("sub"),
    ]
    net = Network(
        nodes,
        ["table", "lstm", "both", "a", "b", "mean", "less"],
        inputs={"ids": (None,), "speaker": (2,)},
        wires=[("ids",), ("table",), ("lstm", "speaker"), ("both",), ("both",), ("a", "b"), ("mean", "a")],
        outputs=("less", "b"),
    )
    x = (rng.integers(0, 9, (3, 5)), floats(rng, 3, 2))
    again = check(tmp_path, net, x)
    assert again.inputs == ("ids", "speaker")


def test_a_stream_goes_on_in_onnx_runtime(tmp_path):
    rng = np.random.default_rng(1)
    net = Network([Recurrent((random_cell(rng, 3, 4, "lstm"), random_cell(rng, 4, 2, "gru")))], ["stack"])
    path = str(tmp_path / "net.onnx")
    adapter.save(net, path)
    x = floats(rng, 1, 6, 3)
    held, frames = {}, []
    names = ["stack", "stack.0.h.after", "stack.0.c.after", "stack.1.h.after"]
    for t in range(6):
        y, *after = run(path, {"x": x[:, t : t + 1], **held}, names)
        held = dict(zip([name.removesuffix(".after") for name in names[1:]], after, strict=True))
        frames.append(y)
    near(np.concatenate(frames, axis=1), net(x))


def test_float64(tmp_path):
    rng = np.random.default_rng(2)
    spec = CellSpec(3, 4)
    cell = Cell(spec, *(rng.standard_normal(shape) for shape in spec.shapes.values()))
    net = Network([Recurrent((cell,)), Dense(rng.standard_normal((4, 2)))])
    path = str(tmp_path / "net.onnx")
    adapter.save(net, path)
    onnx.checker.check_model(path, full_check=True)
    again = adapter.load(path)
    assert again.dtype == np.float64
    x = rng.standard_normal((2, 5, 3))
    np.testing.assert_array_equal(again(x), net(x))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"proj_size": 2}, "one with proj_size"),
        ({"layer_norm": True}, "one with layer_norm"),
        ({"cell_clip": 1.0}, "one with cell_clip"),
        ({"zoneout": 0.1}, "one with zoneout"),
        ({"zoneout_cell": 0.1}, "one with zoneout_cell"),
        ({"gate_activations": {"f": "hard_sigmoid"}}, "gates i and f with one activation"),
        ({"gate_activations": {"o": "hard_sigmoid"}}, "gates i and o with one activation"),
    ],
)
def test_cells_that_onnx_has_not(tmp_path, flags, message):
    rng = np.random.default_rng(3)
    spec = CellSpec(3, 4, **flags)
    cell = Cell(spec, *(floats(rng, *shape) for shape in spec.shapes.values()))
    path = tmp_path / "net.onnx"
    with pytest.raises(ValueError, match=f"save: my cell: expected .*{message}"):
        adapter.save(Network([Recurrent((cell,))], ["my cell"]), str(path))
    assert not path.exists()


@pytest.mark.parametrize("node", [Masking(), Embedding(np.ones((3, 3), np.float32), mask_zero=True)])
def test_masks_are_refused(tmp_path, node):
    net = Network([node, lstm(np.random.default_rng(0), 3, 4)], ["makes a mask", "lstm"])
    with pytest.raises(ValueError, match=r"save: makes a mask: expected a node that ONNX has, got .*mask"):
        adapter.save(net, str(tmp_path / "net.onnx"))


@pytest.mark.parametrize("seed", range(60))
def test_random_graphs(tmp_path, seed):
    """A graph is refused by name or runs in ONNX Runtime with the same answers; read again, refused or equal."""
    net, given = make_graph(seed)[:2]
    path = str(tmp_path / "net.onnx")
    try:
        adapter.save(net, path)
    except ValueError as error:
        assert str(error).startswith("save: ")  # noqa: PT017
        return
    onnx.checker.check_model(path, full_check=True)
    feeds = given if isinstance(given, dict) else {net.inputs[0]: given}
    answers = run(path, feeds, list(net.outputs))
    y = net(given)
    for got, expected in zip(answers, y if isinstance(y, tuple) else (y,), strict=True):
        near(got, expected, GRAPHS)
    try:
        again = adapter.load(path)
    except FormatError as error:  # such as a node along an axis that a Permute made
        assert "found: " in str(error)  # noqa: PT017
        return
    y_again = again(given if len(again.inputs) > 1 else feeds[net.inputs[0]])
    for got, expected in zip(y_again if isinstance(y_again, tuple) else (y_again,), answers, strict=True):
        near(got, expected, GRAPHS)


def test_an_h_after_the_last_step_may_be_one_answer_of_several(tmp_path):
    rng = np.random.default_rng(4)
    nodes = [lstm(rng, 3, 4, return_sequences=False), Scale(floats(rng, 3), floats(rng, 3)), Repeat(1)]
    net = Network(
        nodes, ["lstm", "scale", "again"], wires=[("x",), ("x",), ("lstm",)], outputs=("scale", "lstm", "again")
    )
    again = check(tmp_path, net, floats(rng, 2, 5, 3))
    assert len(again.outputs) == 3
