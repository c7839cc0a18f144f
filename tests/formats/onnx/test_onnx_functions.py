"""Functions of an ONNX file: each call equals the function's nodes, compared with ONNX Runtime."""

import time
from itertools import pairwise

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import compare, model, run, write

from cellstack.cells.errors import FormatError
from cellstack.formats import onnx as adapter

OWN = "of.mine"
OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid(OWN, 1)]


def reference(node, name, attribute, kind):
    """An attribute of a function's node that refers to an attribute of the call."""
    node.attribute.append(onnx.AttributeProto(name=name, ref_attr_name=attribute, type=kind))
    return node


def functions():
    """`layer`: an LSTM whose direction the call sets, and a transpose of its Y; `both`: two calls of it."""
    lstm = helper.make_node("LSTM", ["x", "w", "r", "b"], ["y"], name="lstm", hidden_size=4)
    layer = [
        reference(lstm, "direction", "way", onnx.AttributeProto.STRING),
        helper.make_node("Squeeze", ["y", "one"], ["z"], name="squeeze"),
    ]
    constant = helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.array([1], np.int64)))
    both = [
        helper.make_node("layer", ["x", "w", "r", "b"], ["p"], name="ahead", domain=OWN, way="forward"),
        helper.make_node("layer", ["p", "v", "r", "b"], ["q"], name="again", domain=OWN),
    ]
    default = helper.make_attribute("way", "reverse")
    return [
        helper.make_function(
            OWN, "layer", ["x", "w", "r", "b"], ["z"], [constant, *layer], OPSETS, [], attribute_protos=[default]
        ),
        helper.make_function(OWN, "both", ["x", "w", "v", "r", "b"], ["q", "p"], both, OPSETS),
    ]


def made(nodes, **named):
    rng = np.random.default_rng(0)
    shapes = {"W": (1, 16, 3), "V": (1, 16, 4), "R": (1, 16, 4), "B": (1, 32)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    outputs = dict.fromkeys(nodes[-1].output, 3)
    return model(nodes, {"X": (TensorProto.FLOAT, ["T", "B", 3])}, outputs, arrays, domains=[(OWN, 1)], **named)


def test_calls_equal_their_functions(tmp_path):
    proto = made([helper.make_node("both", ["X", "W", "V", "R", "B"], ["Q", "P"], name="stack", domain=OWN)])
    proto.functions.extend(functions())
    path = write(tmp_path / "net.onnx", proto)
    x = np.random.default_rng(1).standard_normal((6, 2, 3)).astype(np.float32)
    net = compare(path, {"X": x})
    assert [name for name in net.names if "lstm" in name] == [
        "stack.ahead.lstm",
        "stack.again.lstm",
        "stack.again.lstm.in_order",
    ]
    parts = adapter.extract(path)
    assert list(parts) == ["stack/ahead/lstm", "stack/again/lstm"]
    (expected,) = run(path, {"X": x}, ["P"])
    got, _ = parts["stack/ahead/lstm"].run(x.swapaxes(0, 1))
    np.testing.assert_allclose(got, expected.swapaxes(0, 1), rtol=0, atol=1e-5)


def test_two_calls_of_one_name(tmp_path):
    """ONNX Runtime refuses two nodes of one name; the format doesn't."""
    nodes = [
        helper.make_node("layer", ["X", "W", "R", "B"], ["one"], name="call", domain=OWN),
        helper.make_node("layer", ["one", "V", "R", "B"], ["two"], name="call", domain=OWN),
    ]
    proto = made(nodes)
    proto.functions.extend(functions())
    path = write(tmp_path / "net.onnx", proto)
    assert list(adapter.extract(path)) == ["call/lstm", "call.2/lstm"]


def test_an_output_that_is_an_input(tmp_path):
    """ONNX Runtime refuses such a function; the format doesn't."""
    nodes = [helper.make_node("Tanh", ["x"], ["y"])]
    proto = made([helper.make_node("f", ["X"], ["Y", "same"], domain=OWN)])
    proto.functions.append(helper.make_function(OWN, "f", ["x"], ["y", "x"], nodes, OPSETS))
    net = adapter.load(write(tmp_path / "net.onnx", proto, check=False))
    x = np.random.default_rng(3).standard_normal((2, 5, 3)).astype(np.float32)
    (y, same), _ = net.run(x)
    np.testing.assert_array_equal(same, x)
    np.testing.assert_allclose(y, np.tanh(x), rtol=0, atol=1e-6)


def chain(depth, calls):
    """Functions each of which calls the next `calls` times: the innermost is reached calls^depth times."""
    found = []
    for n in range(depth):
        inner = "Identity" if n == depth - 1 else f"f{n + 1}"
        domain = "" if n == depth - 1 else OWN
        names = ["x", *(f"v{k}" for k in range(calls - 1)), "y"]
        nodes = [helper.make_node(inner, [a], [b], domain=domain) for a, b in pairwise(names)]
        found.append(helper.make_function(OWN, f"f{n}", ["x"], ["y"], nodes, OPSETS))
    return found


def loops():
    nodes = [helper.make_node("f0", ["x"], ["y"], domain=OWN)]
    return [helper.make_function(OWN, "f0", ["x"], ["y"], nodes, OPSETS)]


def other_opset():
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    return [helper.make_function(OWN, "f0", ["x"], ["y"], nodes, [helper.make_opsetid("", 11)])]


def long_names():
    """A name that the call lengthens, used very often."""
    nodes = [helper.make_node("Sum", ["x"] * 100_000, ["y"])]
    return [helper.make_function(OWN, "f0", ["x"], ["y"], nodes, OPSETS)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: chain(12, 12), "the calls expand to more than the limit"),
        (lambda: chain(40, 1), "recursive or too deeply nested functions aren't supported"),
        (long_names, "the calls expand to more than the limit"),
        (loops, "function 'f0': recursive or too deeply nested functions aren't supported"),
        (lambda: [*loops(), *loops()], "function 'f0' occurs twice"),
        (other_opset, "function 'f0' has another opset than the file: 11"),
    ],
)
def test_hostile_functions(tmp_path, given, message):
    long = "X" * (100_000 if given is long_names else 1000)
    nodes = [helper.make_node("Identity", ["X"], [long]), helper.make_node("f0", [long], ["Y"], domain=OWN)]
    proto = made(nodes)
    proto.functions.extend(given())
    path = write(tmp_path / "net.onnx", proto, check=False)
    start = time.process_time()
    for read in (adapter.load, adapter.extract):
        with pytest.raises(FormatError, match=message):
            read(path)
    assert time.process_time() - start < 10


def one_function(tmp_path, function, calls):
    proto = made([*calls, helper.make_node("Identity", ["X"], ["Y"])])
    proto.functions.append(function)
    return write(tmp_path / "net.onnx", proto, check=False)


def test_calls_of_a_function_with_many_inputs(tmp_path):
    """Even with an empty body, a call takes time proportional to the function's inputs."""
    function = helper.make_function(OWN, "f", [f"i{n}" for n in range(10_000)], [], [], OPSETS)
    path = one_function(tmp_path, function, [helper.make_node("f", [], [], domain=OWN) for _ in range(3000)])
    start = time.process_time()
    with pytest.raises(FormatError, match="function 'f': the calls expand to more than the limit"):
        adapter.extract(path)
    assert time.process_time() - start < 2


def test_many_inputs_and_many_nodes(tmp_path):
    """The cost of a node of a function doesn't grow with the function's inputs."""
    nodes = [helper.make_node("Identity", ["i0"], [f"v{n}"]) for n in range(10_000)]
    function = helper.make_function(OWN, "f", [f"i{n}" for n in range(10_000)], [], nodes, OPSETS)
    path = one_function(tmp_path, function, [helper.make_node("f", ["X"], [], domain=OWN)])
    start = time.process_time()
    assert adapter.extract(path) == {}
    assert time.process_time() - start < 4


def test_outputs_that_are_an_input_under_a_long_name(tmp_path):
    function = helper.make_function(OWN, "f", ["x"], ["x"] * 2000, [], OPSETS)
    outputs = [f"o{n}" for n in range(2000)]
    path = one_function(tmp_path, function, [helper.make_node("f", ["X"], outputs, domain=OWN, name="n" * 100_000)])
    with pytest.raises(FormatError, match="function 'f': the calls expand to more than the limit"):
        adapter.extract(path)
