"""Passes over an ONNX file: each returns a new model, and leaves the one that it is given as it was."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import model, unrolled_model, write

from cellstack.cells.errors import FormatError
from cellstack.formats.onnx import load
from cellstack.formats.onnx.decomposed.loops import roll_steps
from cellstack.formats.onnx.file import read
from cellstack.formats.onnx.passes import passes
from cellstack.formats.onnx.specialize import KnownLengths

make = helper.make_node


def branches():
    """A graph that chooses by an input, and in the branch multiplies by 1."""
    tensors = [numpy_helper.from_array(np.eye(3, dtype=np.float32), "w")]
    bodies = [
        helper.make_graph(nodes, "branch", [], [helper.make_tensor_value_info("inner", 1, None)], tensors)
        for nodes in ([make("MatMul", ["x", "w"], ["inner"])], [make("Neg", ["x"], ["inner"])])
    ]
    nodes = [
        make("If", ["flag"], ["chosen"], name="choice", then_branch=bodies[0], else_branch=bodies[1]),
        make("Mul", ["chosen", "one"], ["y"]),
    ]
    inputs = {"x": (TensorProto.FLOAT, ["B", "T", 3]), "flag": (TensorProto.BOOL, [])}
    return model(nodes, inputs, {"y": 3}, {"one": np.array(1, np.float32)})


def gelu():
    """½·x·(1 + erf(x·√½)) as its operators."""
    nodes = [
        make("Mul", ["x", "root"], ["a"]),
        make("Erf", ["a"], ["b"]),
        make("Add", ["b", "one"], ["c"]),
        make("Mul", ["x", "c"], ["d"]),
        make("Mul", ["d", "half"], ["y"]),
    ]
    numbers = {"root": np.sqrt(0.5), "one": 1.0, "half": 0.5}
    numbers = {name: np.array(number, np.float32) for name, number in numbers.items()}
    return model(nodes, {"x": (TensorProto.FLOAT, ["B", "T", 3])}, {"y": 3}, numbers)


def softplus(limit=20.0, other="x"):
    """x > limit ? x : softplus(x) as its operators."""
    nodes = [
        make("Softplus", ["x"], ["a"]),
        make("Greater", ["x", "limit"], ["b"]),
        make("Where", ["b", other, "a"], ["y"]),
    ]
    tensors = {"limit": np.array(limit, np.float32), "twice": np.full(3, 2, np.float32)}
    nodes[:0] = [make("Mul", ["x", "twice"], ["xx"])] if other == "xx" else []
    return model(nodes, {"x": (TensorProto.FLOAT, ["B", "T", 3])}, {"y": 3}, tensors)


CASES = {
    "branches": (branches, {"flag": True}, ["MatMul", "Identity"]),
    "gelu": (gelu, {}, ["Gelu"]),
    "unrolled": (lambda: unrolled_model(4), {}, ["RNN"]),
}


@pytest.mark.parametrize("name", CASES)
def test_passes_change_none_of_the_models_that_they_are_given(tmp_path, name):
    build, fixed, operators = CASES[name]
    found = [read(write(tmp_path / "file.onnx", build()))]
    before = []
    for run in (*passes(fixed, {}, {}, False), roll_steps):
        messages = [part for field in found[-1].graph[1:] for part in field]
        before.append([message.SerializeToString() for message in messages])
        found.append(run(found[-1]))
    for made, texts in zip(found, before, strict=False):
        assert [part.SerializeToString() for field in made.graph[1:] for part in field] == texts
    kinds = [node.op_type for node in found[-1].graph.node]
    assert set(operators) <= set(kinds)
    assert not {*operators} <= {node.op_type for node in found[0].graph.node}


def test_a_softplus_that_is_linear_above_a_limit(tmp_path):
    path = str(write(tmp_path / "net.onnx", softplus()))
    x = np.array([-30.0, -1.0, 0.0, 3.0, 15.5, 16.5, 19.99, 20.01, 90.0], np.float32).reshape(1, 3, 3)
    expected = onnxruntime.InferenceSession(path).run(None, {"x": x})[0]
    np.testing.assert_allclose(load(path)(x), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("changed", [{"limit": 2.0}, {"other": "xx"}])
def test_another_choice_is_no_softplus(tmp_path, changed):
    with pytest.raises(FormatError, match="Where"):
        load(str(write(tmp_path / "net.onnx", softplus(**changed))))


KERNEL = np.ones((4, 3, 3), np.float32)
LENGTHS = {  # a node, and the shape of its output, where lengths are certain; None where they, or their number, aren't
    "convolution": (make("Conv", ["x", "kernel"], ["y"], strides=[2], pads=[1, 2]), [None, 4, 5]),
    "convolution with automatic pads": (make("Conv", ["x", "kernel"], ["y"], auto_pad="SAME_UPPER"), [None, 4, None]),
    "pool with dilation": (make("MaxPool", ["x"], ["y"], kernel_shape=[3], dilations=[2]), [None, None, 5]),
    "pool of whole windows": (make("MaxPool", ["x"], ["y"], kernel_shape=[2], ceil_mode=1), [None, None, None]),
    "wider than the kernel": (make("Conv", ["one", "kernel"], ["y"], pads=[2, 2]), [None, 4, 3]),
    "pads from the data": (make("Pad", ["x", "size"], ["y"]), [None, None, None]),
    "repeated": (make("Tile", ["x", "pair"], ["y"]), [None, None, None]),
    "expanded": (make("Expand", ["one", "pair"], ["y"]), [None, 3, None]),
    "sum with an unknown value": (make("Add", ["one", "size"], ["y"]), None),
    "product with a vector": (make("MatMul", ["x", "vector"], ["y"]), None),
    "squeezed where it is open": (make("Squeeze", ["x"], ["y"]), None),
    "parts": (make("Split", ["x"], ["y", "z", "w"], axis=2), [None, 3, 3]),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_lengths_are_known_where_they_are_certain(tmp_path, case):
    node, shape = LENGTHS[case]
    inputs = {"x": (TensorProto.FLOAT, ["B", 3, "T"]), "one": (TensorProto.FLOAT, ["B", 3, 1])}
    tensors = {"kernel": KERNEL, "pair": np.array([1, 1, 2]), "vector": np.ones(9, np.float32)}
    made = model([make("NonZero", ["x"], ["size"]), node], inputs, {"y": 3}, tensors)
    known = KnownLengths(read(write(tmp_path / "file.onnx", made)).scope(), {"x": [None, None, 9]})
    assert known.shapes.get("y") == shape
