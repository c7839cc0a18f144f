"""Operators that become one node each, compared with ONNX Runtime."""

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx_graphs import compare, model, write

from cellstack.cells.errors import FormatError
from cellstack.formats import onnx as adapter
from cellstack.formats.onnx.axis_rules import RULES
from cellstack.nodes import (
    Activation,
    Clip,
    Conv1D,
    Dense,
    GlobalPool,
    LayerNorm,
    Merge,
    Pad,
    Pool1D,
    Reduce,
    Scale,
    Select,
    Standardise,
)

FLOAT = TensorProto.FLOAT
RNG = np.random.default_rng(2)
make = helper.make_node


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def integers(*values):
    return np.array(values, np.int64)


W = floats(3, 4)
OVER_X = {  # operators in a row over x [B, T, 3]: operator, further constants, attributes; and the resulting node
    "a greatest and a number": ([("Max", [np.float32(0.2)], {})], Clip(0.2, None)),
    "a least and a number": ([("Min", [np.float32(0.2)], {})], Clip(None, 0.2)),
    "a greatest and 0": ([("Max", [np.float32(0.0)], {})], Activation("relu")),
    "bounds": ([("Clip", [np.float32(-0.4), np.float32(0.3)], {})], Clip(-0.4, 0.3)),
    "a sum over the features": ([("ReduceSum", [integers(-1)], {"keepdims": 1})], Reduce("sum", -1, True)),
    "a sum over time": ([("ReduceSum", [integers(1)], {"keepdims": 0})], Reduce("sum", 1)),
    "the least over time": ([("ReduceMin", [], {"axes": [1], "keepdims": 1})], Reduce("min", 1)),
    "the greatest over time": ([("ReduceMax", [], {"axes": [1], "keepdims": 0})], GlobalPool("max")),
    "the greatest feature": ([("ReduceMax", [], {"axes": [2], "keepdims": 1})], Reduce("max", -1, True)),
    "the mean feature": ([("ReduceMean", [], {"axes": [-1], "keepdims": 1})], Reduce("mean", -1, True)),
    "pads over time": ([("Pad", [integers(0, 1, 0, 0, 2, 0), np.float32(0.5)], {})], Pad(1, 2, 0.5)),
    "a quotient": ([("Div", [np.abs(floats(3)) + 1], {})], Standardise),
    "a sum and a quotient": ([("Sub", [floats(3)], {}), ("Div", [np.abs(floats(3)) + 1], {})], Standardise),
    "factors and sums": ([("Mul", [floats(3)], {}), ("Add", [floats(3)], {}), ("Mul", [floats(3)], {})], Scale),
    "a product, a bias and an activation": (
        [("MatMul", [W], {}), ("Add", [floats(4)], {}), ("Tanh", [], {})],
        Dense,
    ),
    "a product, a bias, factors and an activation": (
        [("MatMul", [W], {}), ("Add", [floats(4)], {}), ("Mul", [floats(4)], {}), ("Softplus", [], {})],
        Dense,
    ),
    "factors before a product": ([("Mul", [floats(3)], {}), ("MatMul", [W], {})], Dense),
    "a norm with gain and bias of its own": (
        [
            ("LayerNormalization", [np.ones(3, np.float32)], {"axis": -1}),
            ("Mul", [floats(3)], {}),
            ("Add", [floats(3)], {}),
        ],
        LayerNorm,
    ),
    "steps in reverse twice": (
        [("Slice", [integers(-1), integers(-(2**63)), integers(1), integers(-1)], {})],
        Select(step=-1),
    ),
}
OVER_CHANNELS = {  # over x [B, 3, T]
    "a batch norm behind a convolution": (
        [("Conv", [floats(4, 3, 2)], {}), ("BatchNormalization", [*floats(3, 4), np.abs(floats(4)) + 1], {})],
        Conv1D,
    ),
    "pads before a convolution": (
        [("Pad", [integers(0, 0, 1, 0, 0, 0)], {}), ("Conv", [floats(4, 3, 2)], {}), ("Relu", [], {})],
        Conv1D,
    ),
    "pads of a pool": ([("MaxPool", [], {"kernel_shape": [3], "strides": [2], "pads": [1, 1]})], Pool1D),
    "pads of a mean": ([("AveragePool", [], {"kernel_shape": [3], "strides": [2], "pads": [1, 1]})], Pool1D),
    "a last window that isn't whole": (
        [("MaxPool", [], {"kernel_shape": [3], "strides": [2], "ceil_mode": 1, "pads": [1, 0]})],
        Pool1D("max", 3, 2, (1, 1)),
    ),
}


def chain(path, steps, axes):
    """Write a chain of operators."""
    nodes, arrays, name = [], {}, "X"
    for number, (operator, constants, attributes) in enumerate(steps):
        given = [f"c{number}.{n}" for n in range(len(constants))]
        arrays |= dict(zip(given, constants, strict=True))
        output = "Y" if number == len(steps) - 1 else f"v{number}"
        nodes.append(make(operator, [name, *given], [output], name=f"node {number}", **attributes))
        name = output
    rank = 2 if any(not entry.get("keepdims", 1) for *_, entry in steps) else 3
    return write(path / "net.onnx", model(nodes, {"X": (FLOAT, axes)}, {"Y": rank}, arrays))


@pytest.mark.parametrize("name", [*OVER_X, *OVER_CHANNELS])
def test_operators_that_are_one_node(tmp_path, name):
    over_x = name in OVER_X
    steps, expected = (OVER_X if over_x else OVER_CHANNELS)[name]
    path = chain(tmp_path, steps, ["B", "T", 3] if over_x else ["B", 3, "T"])
    for length in (5, 6, 8):
        net = compare(path, {"X": floats(2, length, 3) if over_x else floats(2, 3, length)})
    own = [node for node in net.nodes if type(node).__name__ not in ("Permute", "Reshape")]
    assert [type(node) for node in own] == [expected if isinstance(expected, type) else type(expected)]
    if not isinstance(expected, type):
        assert all(getattr(own[0], key) == pytest.approx(value) for key, value in vars(expected).items())


def test_a_least_and_a_sum_of_values(tmp_path):
    nodes = [
        make("Relu", ["X"], ["a"]),
        make("Tanh", ["X"], ["b"]),
        make("Min", ["a", "b", "X"], ["c"]),
        make("Sum", ["a", "b", "c"], ["Y"]),
    ]
    path = write(tmp_path / "net.onnx", model(nodes, {"X": (FLOAT, ["B", "T", 3])}, {"Y": 3}, {}))
    net = compare(path, {"X": floats(2, 5, 3)})
    assert [node.mode for node in net.nodes if isinstance(node, Merge)] == ["min", "add"]


def test_a_state_without_an_output(tmp_path):
    """c may be the only used output of a cell."""
    arrays = {"W": floats(1, 16, 3), "R": floats(1, 16, 4)}
    nodes = [make("LSTM", ["X", "W", "R"], ["", "", "Y_c"], name="lstm", hidden_size=4), make("Relu", ["X"], ["Y"])]
    path = write(tmp_path / "net.onnx", model(nodes, {"X": (FLOAT, ["T", "B", 3])}, {"Y": 3, "Y_c": 3}, arrays))
    assert len(compare(path, {"X": floats(5, 2, 3)}).outputs) == 2


def test_pads_that_are_refused(tmp_path):
    for pads, value, mode, message in (
        ((0, -1, 0, 0, 0, 0), 0.0, "constant", "none negative"),
        ((0, 1, 0, 0, 0, 0), 0.0, "wrap", "padding with mode wrap needs an axis of known length"),
    ):
        steps = [("Pad", [integers(*pads), np.float32(value)], {"mode": mode})]
        path = chain(tmp_path, steps, ["B", "T", 3])
        with pytest.raises(FormatError, match=message):
            adapter.load(path)


def test_every_operator_has_a_rule_about_axes():
    assert adapter.HANDLERS.keys() <= RULES.keys()
