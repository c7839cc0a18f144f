"""Small changes of a graph that are easily overlooked: read correctly, or refused by name."""

from contextlib import suppress

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_graphs import TOLERANCE, compare, model, run, write

from cellstack.cells.base import State
from cellstack.cells.errors import FormatError
from cellstack.formats import onnx as adapter

FLOAT, FIRST = TensorProto.FLOAT, -(2**63)
X = {"X": (FLOAT, ["T", "B", 3])}
make = helper.make_node


def floats(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def integers(*values):
    return np.array(values, np.int64)


WEIGHTS = {"W": floats(1, 16, 3), "R": floats(1, 16, 4, seed=1)}
TO_THE_FRONT = {"last": integers(-1), "front": integers(FIRST)}


def lstm(before=(), after=(), arrays=None, outputs=None, h="h0", c="c0", shape=(1, "B", 4)):
    """An LSTM with its states as inputs and outputs, and the nodes before and after it."""
    inputs = X | {"h0": (FLOAT, list(shape)), "c0": (FLOAT, list(shape))}
    node = make("LSTM", ["X", "W", "R", "", "", h, c], ["Y", "Y_h", "Y_c"], name="lstm", hidden_size=4)
    ends = outputs or ["Y", "Y_h", "Y_c"]
    return model([*before, node, *after], inputs, ends, WEIGHTS | (arrays or {}))


def flip(source, target, axis):
    return make("Slice", [source, "last", "front", f"axis {axis}", "last"], [target], name="flip")


def axis(n):
    return TO_THE_FRONT | {f"axis {n}": integers(n)}


def casts(source, target):
    return [make("Cast", [source], ["whole"], name="cast", to=7), make("Cast", ["whole"], [target], to=1)]


BEFORE = {
    "flip of the batch": (
        [flip("h0", "h", 1)],
        axis(1),
        r"Slice 'flip': only slices along the stacked states are supported",
    ),
    "flip of the units": (
        [flip("h0", "h", 2)],
        axis(2),
        r"Slice 'flip': only slices along the stacked states are supported",
    ),
    "cast": (casts("h0", "h"), {}, r"Cast 'cast': expected a cast from floats to floats, or of ids"),
    "dropout": (
        [make("Dropout", ["h0", "ratio", "training"], ["h"], name="dropout")],
        {"ratio": np.float32(0.5), "training": np.array(True)},
        r"Dropout 'dropout': training mode isn't supported",
    ),
}


@pytest.mark.parametrize("name", BEFORE)
def test_what_changes_a_state_before_it_is_started_from(tmp_path, name):
    nodes, arrays, message = BEFORE[name]
    path = write(tmp_path / "net.onnx", lstm(nodes, arrays=arrays, h="h"))
    with pytest.raises(FormatError, match=message):
        adapter.load(path)


@pytest.mark.parametrize("by", ["cast", "flip of the batch", "flip of the units"])
def test_what_changes_a_state_after_the_last_step(tmp_path, by):
    n = 1 + (by == "flip of the units")
    nodes = casts("Y_h", "E") if by == "cast" else [flip("Y_h", "E", n)]
    path = write(tmp_path / "net.onnx", lstm([], nodes, axis(n), outputs=["Y", "E"]))
    with pytest.raises(FormatError, match=r"Cast 'cast': expected|Slice 'flip': only slices along the stacked"):
        adapter.load(path)


def test_swapped_or_reversed_states_of_inputs(tmp_path):
    """The metadata says which input holds which state, regardless of their order."""
    turned = make("Transpose", ["c0"], ["c"], perm=[1, 0, 2])
    path = write(tmp_path / "net.onnx", lstm([turned], h="c", c="h0", shape=("B", 1, 4)), check=False)
    made = onnx.load(path)
    made.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 1
    made.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "B"
    path = write(tmp_path / "net.onnx", made)
    net = adapter.load(path)
    said = net.metadata["onnx"]
    assert said["starts"] == {"c0": [[0, 0, "h"]], "h0": [[0, 0, "c"]]}
    assert said["state_axes"] == {"c0": "BSF", "h0": "SBF", "Y_h": "SBF", "Y_c": "SBF"}
    feeds = {"X": floats(5, 2, 3), "h0": floats(1, 2, 4, seed=2), "c0": floats(2, 1, 4, seed=3)}
    y, ((h, c),) = net.run(feeds["X"].swapaxes(0, 1), State(feeds["c0"][:, 0], feeds["h0"][0]))
    for got, want in zip((y.swapaxes(0, 1)[:, None], h[None], c[None]), run(path, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


def test_one_input_as_two_states(tmp_path):
    path = write(tmp_path / "net.onnx", lstm(c="h0"))
    with pytest.raises(FormatError, match=r"LSTM 'lstm': initial_c is also the initial state of another operator"):
        adapter.load(path)


def test_layers_whose_states_are_in_another_order(tmp_path):
    """The states of two layers in one input, the upper layer's first, as after a flip."""
    nodes, arrays = [flip("h0", "turned", 0)], axis(0) | {"W1": floats(1, 4, 3), "W2": floats(1, 4, 4)}
    arrays |= {"R1": floats(1, 4, 4, seed=1), "R2": floats(1, 4, 4, seed=2)}
    nodes += [
        make("Split", ["turned"], ["h1", "h2"], axis=0),
        make("RNN", ["X", "W1", "R1", "", "", "h1"], ["Y1", "E1"], hidden_size=4),
        make("Squeeze", ["Y1", "axis 1"], ["y1"]),
        make("RNN", ["y1", "W2", "R2", "", "", "h2"], ["Y", "E2"], hidden_size=4),
        make("Concat", ["E2", "E1"], ["E"], axis=0),
    ]
    made = model(nodes, X | {"h0": (FLOAT, [2, "B", 4])}, ["Y", "E"], arrays | axis(1))
    path = write(tmp_path / "net.onnx", made)
    net = adapter.load(path)
    assert net.metadata["onnx"]["starts"] == {"h0": [[1, 0, "h"], [0, 0, "h"]]}
    assert net.metadata["onnx"]["states"] == {"E": [[1, 0, "h"], [0, 0, "h"]]}


def test_a_cast_to_integers(tmp_path):
    nodes = [*casts("X", "rounded"), make("Unsqueeze", ["rounded", "two"], ["wide"])]
    nodes.append(make("LSTM", ["wide", "W", "R"], ["Y"], hidden_size=4))
    arrays = WEIGHTS | {"W": floats(1, 16, 1), "two": integers(2)}
    path = write(tmp_path / "net.onnx", model(nodes, {"X": (FLOAT, ["T", "B"])}, ["Y"], arrays))
    with pytest.raises(FormatError, match=r"Cast 'cast': expected a cast from floats to floats, or of ids"):
        adapter.load(path)


SLICES = [(-1, FIRST, -1), (-7, FIRST, -1), (-10, -20, -1), (4, -100, -1), (3, 1, 1), (-1, 0, 1), (100, 0, -2)]


@pytest.mark.parametrize("where", ["time", "features"])
@pytest.mark.parametrize("taken", SLICES)
def test_slices_that_run_past_an_end(tmp_path, taken, where):
    n, names = (0 if where == "time" else 2), ("start", "end", "axis", "step")
    arrays = WEIGHTS | dict(zip(names, map(integers, (*taken[:2], n, taken[2])), strict=True)) | {"one": integers(1)}
    nodes = [
        make("LSTM", ["X", "W", "R"], ["Y0"], hidden_size=4),
        make("Squeeze", ["Y0", "one"], ["y"]),
        make("Slice", ["y", *names], ["Y"], name="slice"),
    ]
    path = write(tmp_path / "net.onnx", model(nodes, {"X": (FLOAT, [6, "B", 3])}, {"Y": 3}, arrays))
    if where == "features" and taken in ((3, 1, 1), (-1, 0, 1)):  # empty
        with pytest.raises(FormatError, match="Slice 'slice'"):
            adapter.load(path)
        return
    compare(path, {"X": floats(6, 2, 3)})
    if taken[0] < -1 and where == "time":  # the start depends on the number of entries
        path = write(tmp_path / "any.onnx", model(nodes, X, {"Y": 3}, arrays))
        with pytest.raises(
            FormatError, match=r"Slice 'slice': the length is unknown, so the slice must start at the last"
        ):
            adapter.load(path)


def test_a_slice_of_constants_that_starts_before_the_first(tmp_path):
    arrays = WEIGHTS | {"b": floats(3), **TO_THE_FRONT, "before": integers(-9), "axis": integers(0)}
    nodes = [
        make("Slice", ["b", "before", "front", "axis", "last"], ["first"]),
        make("Add", ["X", "first"], ["sum"]),
        make("LSTM", ["sum", "W", "R"], ["Y"], hidden_size=4),
    ]
    compare(write(tmp_path / "net.onnx", model(nodes, X, ["Y"], arrays)), {"X": floats(4, 2, 3)})


@pytest.mark.parametrize("order", [[0, 2, 1, 3], [2, 0, 1, 3], [2, 1, 0, 3]])
def test_y_in_another_order(tmp_path, order):
    nodes = [
        make("LSTM", ["X", "W", "R"], ["Y0"], hidden_size=4),
        make("Transpose", ["Y0"], ["Y"], perm=order),
    ]
    net = compare(write(tmp_path / "net.onnx", model(nodes, X, ["Y"], WEIGHTS)), {"X": floats(4, 2, 3)})
    assert net.metadata["onnx"]["outputs"] == {"Y": "".join("T1BF"[n] for n in order)}


@pytest.mark.parametrize("which", ["gain", "bias", "epsilon"])
def test_a_layer_norm_whose_constants_have_more_axes(tmp_path, which):
    """The result then has one more axis."""
    shapes = {"gain": (3,), "bias": (3,), "epsilon": ()}
    arrays = {name: np.abs(floats(*((1,) * (4 - len(s)) + s if name == which else s))) for name, s in shapes.items()}
    nodes = [
        make("ReduceMean", ["X"], ["mean"], axes=[-1]),
        make("Sub", ["X", "mean"], ["centred"]),
        make("Mul", ["centred", "centred"], ["squares"]),
        make("ReduceMean", ["squares"], ["variance"], axes=[-1]),
        make("Add", ["variance", "epsilon"], ["kept"]),
        make("Sqrt", ["kept"], ["deviation"]),
        make("Div", ["centred", "deviation"], ["normed"]),
        make("Mul", ["normed", "gain"], ["scaled"]),
        make("Add", ["scaled", "bias"], ["Y"]),
    ]
    path = write(tmp_path / "net.onnx", model(nodes, X, {"Y": 4}, arrays))
    with pytest.raises(FormatError, match="the graph can't be read as a Network, found: "):
        adapter.load(path)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_threshold_that_is_not_given(tmp_path, kind):
    """ONNX's default is 1, ONNX Runtime's is different."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    names = (
        ["Sigmoid", "ThresholdedRelu", "Tanh"] if kind == "LSTM" else ["Sigmoid", "ThresholdedRelu"][-(gates > 1) - 1 :]
    )
    arrays = {"W": floats(1, 4 * gates, 3), "R": floats(1, 4 * gates, 4)}
    node = make(kind, ["X", "W", "R"], ["Y"], hidden_size=4, activations=names)
    path = write(tmp_path / "net.onnx", model([node], X, ["Y"], arrays))
    with pytest.raises(FormatError, match="ThresholdedRelu needs alpha and beta"):
        adapter.load(path)
    node.attribute.append(helper.make_attribute("activation_alpha", [0.2]))
    compare(write(tmp_path / "net.onnx", model([node], X, ["Y"], arrays)), {"X": floats(4, 2, 3)})


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_replaced_activation(tmp_path, kind):
    gates, names = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], ["Sigmoid", "Relu", "Tanh"]
    arrays = {"W": floats(1, 4 * gates, 3), "R": 0.3 * floats(1, 4 * gates, 4)}
    given = names[{"LSTM": slice(0, 3), "GRU": slice(0, 2), "RNN": slice(1, 2)}[kind]]
    node = make(kind, ["X", "W", "R"], ["Y"], hidden_size=4, activations=given)
    compare(write(tmp_path / "net.onnx", model([node], X, ["Y"], arrays)), {"X": floats(4, 2, 3)})


CONSTANTS = [
    {"value_int": 2}, {"value_ints": [1, 2, 3]}, {"value_float": 1.5}, {"value_floats": [1.0, 2.0, 3.0]},
    {"value_string": "a"}, {"value_strings": ["a", "b"]},
]  # fmt: skip
TAKERS = (
    "Add", "BatchNormalization", "Clip", "Conv", "Expand", "Gather", "Gemm", "GRU", "LSTM", "LayerNormalization",
    "MatMul", "PRelu", "Pow", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Unsqueeze", "Concat", "Cast", "Softmax",
    "Sqrt",
)  # fmt: skip
INPUTS = (["X", "k"], ["k", "X"], ["k"], ["X"], ["X", "k", "k"], ["X", "", "k"], ["", "X"], ["", "k"], [""], [])


@pytest.mark.parametrize("apart", [3, pytest.param(1, marks=pytest.mark.slow)])  # each with a third of the inputs
@pytest.mark.parametrize("operator", TAKERS)
def test_constants_of_every_kind_and_missing_inputs(tmp_path, operator, apart):
    for n, given in enumerate(CONSTANTS):
        for names in INPUTS[n % apart :: apart]:
            nodes = [make("Constant", [], ["k"], **given), make(operator, names, ["Y"])]
            path = write(tmp_path / "net.onnx", model(nodes, X, {"Y": 3}, {}), check=False)
            for read in (adapter.load, adapter.extract):
                with suppress(FormatError):
                    read(path)


def test_constants_as_numbers(tmp_path):
    for given in ({"value_float": 1.5}, {"value_floats": [1.0, 2.0, 3.0]}):
        nodes = [make("Constant", [], ["k"], **given), make("Add", ["X", "k"], ["Y"])]
        compare(write(tmp_path / "net.onnx", model(nodes, X, {"Y": 3}, {})), {"X": floats(2, 4, 3)})


def test_an_attribute_given_twice(tmp_path):
    made = lstm()
    made.graph.node[0].attribute.append(helper.make_attribute("hidden_size", 4))
    path = write(tmp_path / "net.onnx", made, check=False)
    for read in (adapter.load, adapter.extract):
        with pytest.raises(FormatError, match=r"node 'lstm': an attribute occurs twice"):
            read(path)


@pytest.mark.parametrize("turned", [False, True])
def test_gates_reversed_before_they_are_split(tmp_path, turned):
    nodes, h = [], "zero"
    arrays = {"W": floats(3, 12), "R": floats(4, 12, seed=1), "zero": np.zeros((1, 4), np.float32)} | axis(1)
    arrays |= {"one": np.float32(1.0), "axis 0": integers(0)} | {f"at{t}": np.array(t) for t in range(3)}
    for t in range(3):
        cut = "px" if not turned else "turned"
        nodes += [
            make("Gather", ["X", f"at{t}"], [f"x{t}"], axis=0),
            make("MatMul", [f"x{t}", "W"], [f"px{t}"]),
            make("MatMul", [h, "R"], [f"ph{t}"]),
            *([flip(f"px{t}", f"turned{t}", 1)] if turned else []),
            make("Split", [f"{cut}{t}"], [f"{g}x{t}" for g in "zrn"], axis=-1, num_outputs=3),
            make("Split", [f"ph{t}"], [f"{g}h{t}" for g in "zrn"], axis=-1, num_outputs=3),
        ]
        for g in "zr":
            nodes += [make("Add", [f"{g}x{t}", f"{g}h{t}"], [f"{g}s{t}"]), make("Sigmoid", [f"{g}s{t}"], [f"{g}{t}"])]
        nodes += [
            make("Mul", [f"r{t}", f"nh{t}"], [f"rn{t}"]),
            make("Add", [f"nx{t}", f"rn{t}"], [f"ns{t}"]),
            make("Tanh", [f"ns{t}"], [f"n{t}"]),
            make("Sub", ["one", f"z{t}"], [f"less{t}"]),
            make("Mul", [f"less{t}", f"n{t}"], [f"new{t}"]),
            make("Mul", [f"z{t}", h], [f"kept{t}"]),
            make("Add", [f"new{t}", f"kept{t}"], [f"h{t}"]),
        ]
        h = f"h{t}"
    for n, node in enumerate(nodes):  # unique names
        node.name = f"{node.op_type} {n}"
    path = write(tmp_path / "net.onnx", model(nodes, {"X": (FLOAT, [3, "B", 3])}, {h: 2}, arrays, opset=18))
    assert len(adapter.extract(path)) == (not turned)
    if turned:
        with pytest.raises(FormatError, match="the graph can't be read as a Network, found: "):
            adapter.load(path)
    else:
        compare(path, {"X": floats(3, 2, 3)})
