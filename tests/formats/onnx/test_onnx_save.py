"""Networks written as ONNX: checked by onnx, run by ONNX Runtime with states in and out, and read again."""

import json
from itertools import pairwise

import numpy as np
import onnx
import onnxruntime
import pairs
import pytest
from family import random_state
from networks import make_graph, make_network
from onnx_graphs import run

from cellstack import CellSpec
from cellstack.cells import KINDS
from cellstack.cells.errors import FormatError
from cellstack.cells.spec import STATES
from cellstack.formats import onnx as adapter
from cellstack.formats.verify import verify
from cellstack.network import Network
from cellstack.nodes import (
    Activation,
    Bidirectional,
    Cell,
    Clip,
    Conv1D,
    Dense,
    Embedding,
    Flatten,
    GlobalPool,
    LayerNorm,
    Masking,
    Merge,
    Pad,
    Permute,
    Pool1D,
    Recurrent,
    Reduce,
    Repeat,
    Reshape,
    Scale,
    Select,
    Standardise,
)
from cellstack.nodes.activations import MORE_ACTIVATIONS

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
    kind = str(rng.choice(list(KINDS))) if kind is None else kind
    often = lambda share: bool(rng.random() < share)  # noqa: E731
    flags = {
        "activation": str(rng.choice(ACTIVATIONS)) if often(0.5) else "tanh",
        "use_bias": often(0.8),
        "clip": 0.7 if often(0.3) else None,
        "learn_initial_state": often(0.3),
    }
    if kind not in ("rnn", "minlstm"):  # which has none; which divides by a sum of gates
        flags["recurrent_activation"] = str(rng.choice(GATES))
    if kind == "lstm":
        flags |= {"peepholes": often(0.4), "coupled": often(0.3)}
        flags["gate_activations"] = {"cell": "tanh"}
    if kind == "gru":
        flags["reset_after"] = often(0.5)
    flags = {name: value for name, value in flags.items() if name in KINDS[kind].settings}
    spec = CellSpec(inputs, units, kind=kind, **(flags | given))
    return Cell(spec, *(floats(rng, *shape) for shape in spec.shapes.values()))


def random_states(rng, net, batch):
    states = (random_state(rng, cell.spec, batch) for cell in net.cells)
    return tuple(
        STATES[cell.spec.kind](*(array.astype(np.float32) for array in state))
        for cell, state in zip(net.cells, states, strict=True)
    )


def check(tmp_path, net, x, states=None, tolerance=TOLERANCE, exact_names=False):
    """Save `net`, compare ONNX Runtime's output and that of the network read back with its own; return the latter."""
    path = str(tmp_path / "net.onnx")
    adapter.save(net, path, states=states is not None)
    onnx.checker.check_model(path, full_check=True)
    feeds = dict(zip(net.inputs, x if isinstance(x, tuple) else (x,), strict=True))
    y, after = net.run(x, states)
    outputs = y if isinstance(y, tuple) else (y,)
    names = state_names(net)
    said = json.loads({entry.key: entry.value for entry in onnx.load(path).metadata_props}["cellstack"])["states"]
    assert sorted(said) == sorted(["" if states is None else name, f"{name}.after"] for name in names)
    if states is not None:
        feeds |= dict(zip(names, flat(states), strict=True))
    answers = run(path, feeds, [*net.outputs, *(f"{name}.after" for name in names)])
    for got, expected in zip(answers, [*outputs, *flat(after)], strict=True):
        near(got, expected, tolerance)
    declared = {entry.name: entry.type.tensor_type.shape.dim for entry in onnx.load(path).graph.output}
    for name, got in zip([*net.outputs, *(f"{name}.after" for name in names)], answers, strict=True):
        assert len(declared[name]) == got.ndim
        assert all(axis.dim_value in (0, size) for axis, size in zip(declared[name], got.shape, strict=True))
    again = adapter.load(path)
    y_again, after_again = again.run(x, states)
    for got, expected in zip(y_again if isinstance(y_again, tuple) else (y_again,), outputs, strict=True):
        near(got, expected, tolerance)
    for got, expected in zip(flat(after_again), flat(after), strict=True):
        near(got, expected, tolerance)
    return again


def flat(states):
    return [array for state in states for array in state]


def state_names(net):
    """The names of the state's arrays, in the network's order."""
    names = []
    for name, node in zip(net.names, net.nodes, strict=True):
        directions = {name: node} if node.cells else {}
        if isinstance(node, Bidirectional):
            directions = {f"{name}.forward": node.forward, f"{name}.backward": node.backward}
        for own, direction in directions.items():
            for n, cell in enumerate(direction.cells):
                cell_name = own if len(direction.cells) == 1 else f"{own}.{n}"
                names += [f"{cell_name}.{part}" for part in cell.spec.state_sizes]
    return names


def near(got, expected, tolerance=TOLERANCE):
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max(initial=0.0)))


@pairs.seeds(30, 60)
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


@pairs.seeds(20, 40)
def test_pairs(tmp_path, seed):
    rng = np.random.default_rng(seed)
    inputs, units, depth = (int(n) for n in rng.integers(1, 5, 3))
    depth = 1 if seed % 2 else min(depth, 2)
    mode, sequences = str(rng.choice(["concat", "sum", "mul", "ave"])), bool(rng.integers(2))
    kind = str(rng.choice(list(KINDS)))
    alike = {"peepholes": False, "coupled": False} if kind == "lstm" else {}
    alike |= {"use_bias": True, "clip": None} | ({"reset_after": True} if kind == "gru" else {})
    widths = [inputs, *[units] * depth]
    directions = [
        Recurrent(
            tuple(random_cell(rng, *pair, kind, **alike) for pair in pairwise(widths)),
            return_sequences=sequences,
            go_backwards=back,
        )
        for back in (False, True)
    ]
    net = Network([Bidirectional(*directions, mode)], ["pair"])
    batch, steps = (int(n) for n in rng.integers(1, 5, 2))
    states = random_states(rng, net, batch) if rng.integers(2) else None
    again = check(tmp_path, net, floats(rng, batch, steps, inputs), states)
    if mode == "concat" and depth == 1 and "onnx" in KINDS[kind].names:  # written as one operator
        assert again.names == ("pair",)
        assert isinstance(again.nodes[0], Bidirectional)


def lstm(rng, inputs, units, **flags):
    return Recurrent((random_cell(rng, inputs, units, "lstm"),), **flags)


def chains(rng):
    """Chains of nodes of every kind over x [B, T, 3], by description."""
    f = lambda *shape: floats(rng, *shape)  # noqa: E731
    return {
        "standardise": [Standardise(f(3), np.float32([0.5, 2.0, 1.5])), lstm(rng, 3, 4), GlobalPool("mean")],
        "scale": [lstm(rng, 3, 4), Scale(f(4), f(4)), GlobalPool("mean")],
        "scale before": [Scale(f(3), f(3)), lstm(rng, 3, 4), GlobalPool("last")],
        "norm": [lstm(rng, 3, 4), LayerNorm(f(4), f(4), 1e-3), GlobalPool("max"), Dense(f(4, 2), None, "softmax")],
        "norm without bias": [lstm(rng, 3, 4), LayerNorm(f(4))],
        "norm alone": [lstm(rng, 3, 4), LayerNorm(None, f(4), 1e-2)],
        "causal": [Conv1D(f(3, 3, 5), f(5), 1, "causal", 2, 1, "relu"), lstm(rng, 5, 4)],
        "same": [Conv1D(f(2, 1, 6), f(6), 2, "same", 1, 3), lstm(rng, 6, 4)],
        "padded": [Conv1D(f(3, 3, 4), None, 2, (2, 1), 1, 1, "softplus"), lstm(rng, 4, 4)],
        "max": [Conv1D(f(1, 3, 4)), Pool1D("max", 2), lstm(rng, 4, 4, return_sequences=False), Dense(f(4, 1), f(1))],
        "mean": [Pool1D("mean", 3, 2, "same"), lstm(rng, 3, 4)],
        "pads": [Pad(1, 2, 0.5), lstm(rng, 3, 4), Pad(0, 1)],
        "pads of the features": [Pad(2, 1, 0.0, -1), lstm(rng, 6, 4)],
        "windows with pads": [Pool1D("max", 3, 2, (1, 1)), Pool1D("mean", 3, 1, (2, 1)), lstm(rng, 3, 4)],
        "bounds": [Clip(-0.5, 0.7), lstm(rng, 3, 4), Clip(None, 0.1), Clip(-0.2, None)],
        "sums": [lstm(rng, 3, 4), Reduce("sum", -1, keepdims=True), Reduce("sum", 1)],
        "least": [lstm(rng, 3, 4), Reduce("min", 1), Reduce("min", -1, keepdims=True)],
        "greatest": [Dense(f(3, 4)), Reduce("max", -1, keepdims=True), lstm(rng, 1, 4), Reduce("max", 1)],
        "mean of the features": [lstm(rng, 3, 4), Reduce("mean", -1, keepdims=True)],
        "turned": [lstm(rng, 3, 4), Select(None, None, -1)],
        "last two": [lstm(rng, 3, 4), Select(-2, None), Activation("elu(0.5)")],
        "some features": [Select(1, 3, 1, -1), lstm(rng, 2, 4, go_backwards=True)],
        "repeat": [lstm(rng, 3, 4, return_sequences=False), Repeat(3), lstm(rng, 4, 2)],
        "reshape": [Dense(f(3, 8), f(8)), GlobalPool("mean"), Reshape((4, 2)), lstm(rng, 2, 4)],
        "flatten": [lstm(rng, 3, 4), GlobalPool("last"), Flatten(), Dense(f(4, 2), f(2), "hard_sigmoid(0.3, 0.4)")],
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
def test_plain_nodes_are_read_back_unchanged(tmp_path, name):
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
    adapter.save(net, path, states=True)
    x = floats(rng, 1, 6, 3)
    state, frames = {}, []
    names = ["stack", "stack.0.h.after", "stack.0.c.after", "stack.1.h.after"]
    for t in range(6):
        y, *after = run(path, {"x": x[:, t : t + 1], **state}, names)
        state = dict(zip([name.removesuffix(".after") for name in names[1:]], after, strict=True))
        frames.append(y)
    near(np.concatenate(frames, axis=1), net(x))


# ── cells as Scans, masks ─────────────────────────────────────────────────────────────────────────────────────────────

FLAGS = {
    "proj_size": {"proj_size": 2},
    "layer_norm": {"layer_norm": True, "norm_epsilon": 1e-2},
    "cell_clip": {"cell_clip": 0.2},
    "clip": {"clip": 0.3, "cell_clip": 0.4},
    "zoneout": {"zoneout": 0.1, "zoneout_cell": 0.3},
    "f": {"gate_activations": {"f": "hard_sigmoid", "cell": "softsign"}, "peepholes": True},
    "o": {"gate_activations": {"o": "hard_sigmoid(0.3, 0.4)", "i": "elu(0.5)"}, "coupled": True, "peepholes": True},
    "all": {
        "proj_size": 3, "layer_norm": True, "cell_clip": 0.5, "clip": 0.9, "zoneout": 0.2, "zoneout_cell": 0.1,
        "peepholes": True, "coupled": True, "gate_activations": {"o": "softplus", "g": "thresholded_relu(0.1)"},
        "learn_initial_state": True,
    },
    "gru": {"kind": "gru", "layer_norm": True, "zoneout": 0.2, "learn_initial_state": True},
    "gru gates": {"kind": "gru", "gate_activations": {"r": "hard_sigmoid"}, "reset_after": False, "clip": 0.3},
    "rnn": {"kind": "rnn", "layer_norm": True, "zoneout": 0.4, "use_bias": False, "activation": "leaky_relu(0.2)"},
}  # fmt: skip
DOUBLE = 1e-12  # float64 on both sides


def flagged(rng, inputs, dtype="float32", **flags):
    spec = CellSpec(inputs, **{"units": 4, **flags})
    return Cell(spec, *(rng.normal(0, 0.7, shape).astype(dtype) for shape in spec.shapes.values()))


@pairs.parametrize("dtype, name", ["float32", "float64"], list(FLAGS), unpaired=[0])
def test_cells_that_onnx_lacks(tmp_path, name, dtype):
    """They are written as Scans, run in ONNX Runtime, and are read back unchanged."""
    rng = np.random.default_rng(3)
    first = flagged(rng, 3, dtype, **FLAGS[name])
    second = flagged(rng, first.spec.output_size, dtype, **FLAGS[name])
    x = rng.standard_normal((3, 5, 3)).astype(dtype)
    tolerance = TOLERANCE if dtype == "float32" else DOUBLE
    for flags in ({}, {"return_sequences": False}, {"go_backwards": True, "residual": True}):
        net = Network([Recurrent((first, second), **flags)], ["my cell"])
        states = tuple(type(state)(*(a.astype(dtype) for a in state)) for state in random_states(rng, net, 3))
        for given in (None, states):
            again = check(tmp_path, net, x, given, tolerance)
            assert [cell.spec for cell in again.cells] == [cell.spec for cell in net.cells]
            for cell, expected in zip(again.cells, net.cells, strict=True):
                for key, array in expected.arrays.items():
                    np.testing.assert_array_equal(cell.arrays[key], array)
    back = Recurrent((first,), go_backwards=True)
    check(tmp_path, Network([Bidirectional(Recurrent((first,)), back)], ["pair"]), x, None, tolerance)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn", "cfc"])
def test_cells_without_a_kernel(tmp_path, kind):
    """They are written as Scans too, which aren't read back."""
    rng = np.random.default_rng(0)
    width = 3 * len(CellSpec(1, 3, kind=kind).gates)
    net = Network([Recurrent((flagged(rng, width, kind=kind, units=3, use_kernel=False),))], ["cell"])
    path = str(tmp_path / "net.onnx")
    net.save(path)
    assert verify(net, path).ok()
    with pytest.raises(FormatError, match="Scan node 'cell': the body isn't a step of a cell"):
        adapter.load(path)


@pytest.mark.parametrize("what", ["doc", "text", "width", "name", "names"])
def test_a_scan_is_read_from_its_body(tmp_path, what):
    """Regardless of its description and of its names."""
    path = str(tmp_path / "net.onnx")
    net = Network([Recurrent((flagged(np.random.default_rng(0), 3, proj_size=2),))], ["cell"])
    adapter.save(net, path)
    model = onnx.load(path)
    (scan,) = (node for node in model.graph.node if node.op_type == "Scan")
    body = next(entry.g for entry in scan.attribute if entry.name == "body")
    if what == "doc":
        body.doc_string = body.doc_string.replace('"proj_size": 2', '"proj_size": 1')
    elif what == "text":
        body.doc_string = "[" * 100_000
    elif what == "width":
        body.doc_string = body.doc_string.replace('"units": 4', '"units": 4000000000000')
    elif what == "name":
        scan.name = "other"
    else:
        for holder in (*body.node, body):
            for names in (holder.input, holder.output):
                for n, entry in enumerate(names):
                    if isinstance(entry, str):
                        names[n] = f"my {entry}"
                    else:
                        entry.name = f"my {entry.name}"
        for tensor in body.initializer:
            tensor.name = f"my {tensor.name}"
    onnx.save(model, path)
    again = adapter.load(path)
    x = np.random.default_rng(1).standard_normal((2, 5, 3)).astype(np.float32)
    np.testing.assert_array_equal(again(x), net(x))
    assert again.cells[0].spec == net.cells[0].spec


QUICK = ("all", "gru")  # "all" has every operator that the flags of an LSTM add


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FLAGS]
)
def test_changes_of_a_scan_s_body(tmp_path, name):
    """Each operator replaced by another: it is refused, or another cell, equal to ONNX Runtime's result."""
    path = str(tmp_path / "net.onnx")
    adapter.save(Network([Recurrent((flagged(np.random.default_rng(0), 3, **FLAGS[name]),))], ["cell"]), path)
    x = np.random.default_rng(1).standard_normal((2, 5, 3)).astype(np.float32)
    whole = onnx.load(path).SerializeToString()
    others = {
        "Sigmoid": "Tanh",
        "Tanh": "Sigmoid",
        "Add": "Mul",
        "Mul": "Add",
        "Sub": "Add",
        "MatMul": "Add",
        "Div": "Mul",
    }
    others |= {"Sqrt": "Tanh", "Clip": "Identity", "Identity": "Tanh"}
    for n in range(1000):
        model = onnx.ModelProto.FromString(whole)
        (scan,) = (node for node in model.graph.node if node.op_type == "Scan")
        body = next(entry.g for entry in scan.attribute if entry.name == "body")
        if n == len(body.node):
            break
        node = body.node[n]
        if node.op_type == "Clip":
            del node.input[1:]
        elif node.op_type == "Sub":
            node.input[:] = node.input[::-1]
        node.op_type = others.get(node.op_type, "Neg") if node.op_type != "Sub" else "Sub"
        del node.attribute[:]
        if node.op_type == "Neg":
            del node.input[1:]
        onnx.save(model, path)
        try:
            got = adapter.load(path)(x)
        except FormatError as error:
            assert "a step of a cell" in str(error)  # noqa: PT017
            continue
        (expected,) = run(path, {"x": x}, ["cell"])
        near(got, expected)


def test_a_scan_with_opposite_directions(tmp_path):
    path = str(tmp_path / "net.onnx")
    adapter.save(Network([Recurrent((flagged(np.random.default_rng(0), 3, proj_size=2),))], ["cell"]), path)
    model = onnx.load(path)
    (scan,) = (node for node in model.graph.node if node.op_type == "Scan")
    next(entry for entry in scan.attribute if entry.name == "scan_output_directions").ints[0] = 1
    onnx.save(model, path)
    with pytest.raises(FormatError, match="Scan node 'cell': inputs and outputs must run in the same direction"):
        adapter.load(path)


def masked_networks(rng):
    """Networks that mask steps of x [B, T, 3], and the padding value."""
    cells = lambda *kinds: tuple(random_cell(rng, 3, 3, kind) for kind in kinds)  # noqa: E731
    two = {"inputs": {"x": (None, 3)}, "wires": [("x",), ("x",), ("a", "b"), ("both",)]}
    ends = {mode: [Recurrent(cells("lstm")), GlobalPool(mode)] for mode in ("mean", "max", "last")}
    return {
        "stack": Network([Masking(), Recurrent(cells(*KINDS))]),
        "residual": Network([Masking(), Recurrent(cells("lstm", "gru"), residual=True)]),
        "residual end": Network([Masking(), Recurrent(cells("lstm", "gru"), return_sequences=False, residual=True)]),
        "backwards": Network([Masking(), Recurrent(cells("gru", "lstm"), go_backwards=True), *ends["last"]]),
        "zeros": Network([Masking(), Recurrent(cells("lstm"), zero_output_for_mask=True), Dense(floats(rng, 3, 2))]),
        "zero at the end": Network([Masking(), Recurrent(cells("gru"), False, False, True), Dense(floats(rng, 3, 2))]),
        "pair": Network([Masking(), Bidirectional(Recurrent(cells("lstm")), Recurrent(cells("gru"), True, True))]),
        "last two": Network([Masking(), Select(-3, -1), Recurrent(cells("lstm"))]),
        "layers": Network([Masking(), Recurrent(cells("gru")), LayerNorm(floats(rng, 3)), Recurrent(cells("rnn"))]),
        "convolved": Network([Masking(), Conv1D(floats(rng, 2, 3, 3), padding="causal"), *ends["mean"]]),
        **{mode: Network([Masking(), *nodes]) for mode, nodes in ends.items()},
        **{
            f"{mode} of two": Network(
                [Masking(), Select(None, None, -1), Merge(mode, axis), GlobalPool("mean")],
                ["a", "b", "both", "end"],
                **two,
            )
            for mode, axis in (("mul", -1), ("max", -1), ("add", -1), ("concat", 1))
        },
        **{
            f"{mode} of two masks": Network(
                [Masking(), Masking(1.0), Merge(mode), Recurrent(cells("gru"))], ["a", "b", "both", "end"], **two
            )
            for mode in ("mul", "max", "ave")
        },
    }


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("name", masked_networks(np.random.default_rng(0)))
def test_masks(tmp_path, name, lengths):
    """They are computed in the graph, from x and, if requested, from lengths."""
    rng = np.random.default_rng(8)
    net = masked_networks(rng)[name]
    x = floats(rng, 4, 6, 3)
    x[rng.random((4, 6)) < 0.4] = 0.0
    x[rng.random((4, 6)) < 0.2] = 1.0
    x[1] = 0.0
    path = str(tmp_path / "net.onnx")
    adapter.save(net, path, lengths, states=True)
    onnx.checker.check_model(path, full_check=True)
    names = state_names(net)
    for given in [None, rng.integers(0, 7, 4)] if lengths else [None]:
        states = random_states(rng, net, 4)
        feeds = dict(zip(names, flat(states), strict=True)) | ({} if given is None else {"lengths": given})
        y, after = net.run(x, states, lengths=given)
        answers = run(path, {"x": x, **feeds}, [*net.outputs, *(f"{name}.after" for name in names)])
        for got, expected in zip(answers, [y, *flat(after)], strict=True):
            near(got, expected)
    with pytest.raises(FormatError, match="the graph can't be read as a Network, found: "):
        adapter.load(path)


@pytest.mark.parametrize("lengths", [False, True])
def test_ids_that_are_masked(tmp_path, lengths):
    rng = np.random.default_rng(0)
    net = Network([Embedding(floats(rng, 9, 3), mask_zero=True), lstm(rng, 3, 4), GlobalPool("mean")])
    path = str(tmp_path / "net.onnx")
    adapter.save(net, path, lengths)
    ids = rng.integers(0, 9, (3, 5)) * rng.integers(0, 2, (3, 5))
    given = {"lengths": np.array([2, 0, 5])} if lengths else {}
    near(run(path, {"x": ids, **given}, list(net.outputs))[0], net.run(ids, **given)[0])
    if lengths:  # masked steps may have any value
        ids[0, 2:] = 2**40
        near(run(path, {"x": ids, **given}, list(net.outputs))[0], net.run(ids, **given)[0])


def test_lengths_without_time(tmp_path):
    net = Network([Dense(floats(np.random.default_rng(0), 3, 2))], inputs={"x": (3,)})
    with pytest.raises(ValueError, match="save: lengths need an input with a time axis"):
        adapter.save(net, str(tmp_path / "net.onnx"), lengths=True)


@pytest.mark.parametrize("text", sorted(MORE_ACTIVATIONS))
def test_activations_that_cells_lack(tmp_path, text):
    rng = np.random.default_rng(0)
    path = str(tmp_path / "net.onnx")
    net = Network([Dense(3 * floats(rng, 3, 5), floats(rng, 5), text)])
    adapter.save(net, path)
    x = floats(rng, 4, 6, 3)
    near(run(path, {"x": x})[0], net(x))
    again = adapter.load(path)
    assert [(type(node).__name__, node.activation) for node in again.nodes] == [("Dense", text)]
    near(again(x), net(x))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("sequences", [True, False])
def test_zeros_at_masked_steps_are_read_back(tmp_path, kind, sequences):
    rng = np.random.default_rng(0)
    stack = tuple(random_cell(rng, 3, 3, kind) for _ in range(2))
    net = Network([Recurrent(stack, sequences, zero_output_for_mask=True), Dense(floats(rng, 3, 2))], ["stack", "head"])
    path, x = str(tmp_path / "net.onnx"), floats(rng, 3, 5, 3)
    adapter.save(net, path)
    again = adapter.load(path)
    for lengths in (None, np.array([5, 2, 0])):
        near(again.run(x, lengths=lengths)[0], net.run(x, lengths=lengths)[0])


@pytest.mark.long
def test_onnx_runtime_does_not_warn_of_a_file(tmp_path, capfd):
    """Except that an initial state, if requested as an optional input, isn't a constant."""
    path = str(tmp_path / "net.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 2  # warnings
    options.intra_op_num_threads = 1
    networks = [*(make_graph(seed)[0] for seed in range(40)), *(make_network(seed) for seed in range(40))]
    networks += masked_networks(np.random.default_rng(0)).values()
    networks += [make_network(seed, "float64") for seed in (8, 16, 19)]
    for net in networks:
        states = state_names(net)
        for takes_states in (False, True):
            adapter.save(net, path, states=takes_states)
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            said = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
            assert len(said) == (len(states) if takes_states else 0), said  # the runtime does report what is wrong
            assert all(f"Initializer {name} appears in graph inputs" in "".join(said) for name in states if said)
            assert [entry.name for entry in session.get_inputs()] == list(net.inputs)
            assert len(session.get_outputs()) == len(net.outputs) + len(states)


def test_the_axes_of_inputs_and_outputs_are_named(tmp_path):
    rng, path = np.random.default_rng(0), str(tmp_path / "net.onnx")

    def axes(net):
        adapter.save(net, path, states=True)
        graph = onnx.load(path).graph
        return {
            value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in [*graph.input, *graph.output]
        }

    found = axes(Network([lstm(rng, 3, 4)], ["lstm"]))
    assert found["x"] == ["batch", "time", 3]
    assert found["lstm"] == ["batch", "lstm.time", 4]
    assert found["lstm.h"] == ["lstm.h.rows", 4]  # one row, or the whole batch
    assert found["lstm.h.after"] == ["batch", 4]
    two = {"inputs": {"x": (None, 3), "ids": (None,)}, "wires": [("x",), ("ids",)], "outputs": ("lstm", "table")}
    found = axes(Network([lstm(rng, 3, 4), Embedding(floats(rng, 9, 3))], ["lstm", "table"], **two))
    assert (found["x"], found["ids"]) == (["batch", "x.time", 3], ["batch", "ids.time"])  # of any two lengths


@pairs.seeds(20, 40)
def test_random_networks_read_again(tmp_path, seed):
    """A network read back gives equal results, with the same axes; unsupported ones are refused by name."""
    net = make_network(seed)
    path = str(tmp_path / "net.onnx")
    adapter.save(net, path)
    x = np.random.default_rng(seed).normal(size=(3, 7, net.input_size)).astype(np.float32)
    try:
        again = adapter.load(path)
    except FormatError as error:
        assert "found: " in str(error)  # noqa: PT017
        return
    near(again(x), net(x), GRAPHS)


@pairs.seeds(30, 60)
def test_random_graphs(tmp_path, seed):
    """A graph gives the same results in ONNX Runtime; read back, it is refused by name or equal."""
    net, given = make_graph(seed)[:2]
    path = str(tmp_path / "net.onnx")
    adapter.save(net, path)
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
