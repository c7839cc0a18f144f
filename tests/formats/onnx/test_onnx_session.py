"""`InferenceSession` beside ONNX Runtime's: shapes of outputs, errors, and what only the kernel runs."""

from itertools import product
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tolerances
from onnx import ModelProto, TensorProto, helper, numpy_helper

import cellstack as cs
from cellstack.formats.onnx import save
from cellstack.formats.onnx.runtime import RuntimeModel
from cellstack.onnxruntime import InferenceSession

WIDTH, UNITS = 6, 5
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
SHAPES = (None, [None, None, None], [None, 2, WIDTH], ["T", None, None], ["T", "B", WIDTH])  # of x
KINDS = pytest.mark.parametrize("kind", GATES)
WAYS = pytest.mark.parametrize("ways", [1, 2])
PLACES = pytest.mark.parametrize("place", ["graph", "If", "Loop"])


def operator(kind, ways, dtype: Any = np.float32, given=(), **attributes):
    """Return an operator over x, whose initial states are h and c, as far as `given`; its outputs, and its weights."""
    outputs, rows = ["Y", "Y_h", "Y_c"][: 3 if kind == "LSTM" else 2], GATES[kind] * UNITS
    states = [name if name in given else "" for name in ("h", "c")[: len(outputs) - 1]]
    attributes |= {"hidden_size": UNITS, "direction": "bidirectional" if ways == 2 else "forward"}
    node = helper.make_node(kind, ["x", "W", "R", "B", "", *states], outputs, "layer", **attributes)
    rng = np.random.default_rng(3)
    shapes = {"W": (ways, rows, WIDTH), "R": (ways, rows, UNITS), "B": (ways, 2 * rows)}
    weights = {name: rng.normal(0, 0.4, shape).astype(dtype) for name, shape in shapes.items()}
    return node, outputs, [numpy_helper.from_array(array, name) for name, array in weights.items()]


def empty(names):
    """Values of unknown types."""
    return [helper.make_empty_tensor_value_info(name) for name in names]


def file_of(node, outputs, tensors, place="graph", x: Any = None, given=(), dtype=TensorProto.FLOAT):
    """Return a file with an operator in its graph, in both branches of an If or in a Loop, which `n` decides."""
    inputs = [helper.make_tensor_value_info(name, dtype, x if name == "x" else None) for name in ("x", *given)]
    scalar = {"If": TensorProto.BOOL, "Loop": TensorProto.INT64}
    inputs += [helper.make_tensor_value_info("n", scalar[place], [])] if place in scalar else []
    nodes, ends = [node], outputs
    if place == "If":
        branch, ends = helper.make_graph([node], "branch", [], empty(outputs)), [f"{name}s" for name in outputs]
        nodes = [helper.make_node("If", ["n"], ends, then_branch=branch, else_branch=branch)]
    elif place == "Loop":
        taken = [helper.make_tensor_value_info("k", TensorProto.INT64, [])]
        taken += [helper.make_tensor_value_info("go", TensorProto.BOOL, [])]
        inner = [node, helper.make_node("Identity", ["go"], ["on"])]
        body, ends = helper.make_graph(inner, "body", taken, empty(["on", *outputs])), [f"{name}s" for name in outputs]
        nodes = [helper.make_node("Loop", ["n", ""], ends, body=body)]
    graph = helper.make_graph(nodes, "graph", inputs, empty(ends), tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return made.SerializeToString()


def both(file) -> tuple[Any, Any]:
    """Return our session and ONNX Runtime's."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    ours = InferenceSession(file, options)
    assert "fused cpu kernel" in ours.plan()[0]
    return ours, onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def described(session):
    """The names, types and shapes of a session's outputs."""
    return [(one.name, one.type, one.shape) for one in session.get_outputs()]


# ── Shapes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@KINDS
@WAYS
@PLACES
def test_outputs_are_described_as_by_onnxruntime(kind, ways, place):
    for x in SHAPES:
        ours, other = both(file_of(*operator(kind, ways), place, x))
        assert described(ours) == described(other)
        assert list(map(str, ours.get_outputs())) == list(map(str, other.get_outputs()))
        ours.set_providers(["CPUExecutionProvider"])
        assert described(ours) == described(other)


def test_a_model_that_onnxruntime_runs_names_no_axis_of_its_own(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(file_of(*operator("GRU", 1), x=[None, "B", WIDTH]))
    model = RuntimeModel(str(path)).prepare()
    assert repr(model).startswith("RuntimeModel: x [None, 'B', 6] -> Y [None, 1, 'B', 5], Y_h [1, 'B', 5]")


@KINDS
@WAYS
def test_a_loop_without_iterations_has_onnxruntimes_shapes(kind, ways):
    for x, count in product(SHAPES, (0, 2)):
        sessions = both(file_of(*operator(kind, ways), "Loop", x))
        fed = {"x": np.ones((4, 2, WIDTH), "f4"), "n": np.array(count)}
        ours, other = (session.run(None, fed) for session in sessions)
        assert [array.shape for array in ours] == [array.shape for array in other]


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def error_of(session, fed):
    """Return the class and the text of the error of a call."""
    with pytest.raises(Exception, match="layer") as caught:
        session.run(None, fed)
    return caught.type, str(caught.value)


@KINDS
@WAYS
@PLACES
def test_a_wrong_initial_state_raises_onnxruntimes_error(kind, ways, place):
    given = ("h", "c") if kind == "LSTM" else ("h",)
    ours, other = both(file_of(*operator(kind, ways, given=given), place, ["T", "B", WIDTH], given))
    good = {name: np.zeros((ways, 3, UNITS), "f4") for name in given} | {"x": np.ones((4, 3, WIDTH), "f4")}
    good |= {"If": {"n": np.array(True)}, "Loop": {"n": np.array(2)}}.get(place, {})
    for name in given:
        for shape in (
            (),
            (ways, 2, UNITS),
            (ways, 3, UNITS + 1),
            (3 - ways, 3, UNITS),
            (3, UNITS),
            (ways, 3, UNITS, 1),
        ):
            fed = good | {name: np.zeros(shape, "f4")}
            raised, text = error_of(ours, fed)
            assert raised is error_of(other, fed)[0]
            assert f"expected initial_{name} of shape {[ways, 3, UNITS]}, found {list(shape)}" in text
    ours.run(None, good)


def test_a_wrong_initial_state_of_a_scan_raises_onnxruntimes_error(tmp_path):
    spec = cs.CellSpec(WIDTH, UNITS, layer_norm=True)
    rng = np.random.default_rng(3)
    cell = cs.nodes.Cell(spec, **{name: rng.normal(size=shape).astype("f4") for name, shape in spec.shapes.items()})
    path = tmp_path / "net.onnx"
    save(cs.Network([cs.nodes.Recurrent((cell,))], ["layer"]), path)
    made = ModelProto.FromString(path.read_bytes())
    (scan,) = (node for node in made.graph.node if node.op_type == "Scan")
    scan.input[0] = "h"
    made.graph.input.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, None))
    ours, other = both(made.SerializeToString())
    for shape in ((2, UNITS), (3, UNITS - 1), (3, 1)):
        fed = {made.graph.input[0].name: np.ones((3, 4, WIDTH), "f4"), "h": np.zeros(shape, "f4")}
        raised, text = error_of(ours, fed)
        assert raised is error_of(other, fed)[0]
        assert f"expected initial_h of shape [3, 5], found {list(shape)}" in text


# ── What only the kernel runs ─────────────────────────────────────────────────────────────────────────────────────────


def refused(file, fed, match):
    """ONNX Runtime refuses a file or its input, and our session runs it; return the outputs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match=match):
        onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"]).run(None, fed)
    session: Any = InferenceSession(file, options)
    assert "fused cpu kernel" in session.plan()[0]
    return session.run(None, fed)


@KINDS
@WAYS
def test_operators_that_onnxruntime_refuses(kind, ways):
    x = np.random.default_rng(4).normal(size=(4, 3, WIDTH))
    expected = both(file_of(*operator(kind, ways)))[1].run(None, {"x": x.astype("f4")})
    node, outputs, tensors = operator(kind, ways, np.float64)
    double = file_of(node, outputs, tensors, dtype=TensorProto.DOUBLE)
    for found, one in zip(
        refused(double, {"x": x}, "does not support double|Could not find an implementation"), expected, strict=True
    ):
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, one, atol=tolerances.NETWORK, rtol=0)
    turned = refused(file_of(*operator(kind, ways, layout=1)), {"x": x.swapaxes(0, 1).astype("f4")}, "layout_ == 0")
    np.testing.assert_allclose(turned[0].transpose(1, 2, 0, 3), expected[0], atol=tolerances.NETWORK, rtol=0)
    np.testing.assert_allclose(turned[1].swapaxes(0, 1), expected[1], atol=tolerances.NETWORK, rtol=0)


@KINDS
@WAYS
def test_a_constant_initial_state_with_one_row_serves_all_rows(kind, ways):
    given = ("h", "c") if kind == "LSTM" else ("h",)
    node, outputs, tensors = operator(kind, ways, given=given)
    start = np.random.default_rng(5).normal(size=(ways, 1, UNITS)).astype("f4")
    x = np.random.default_rng(4).normal(size=(4, 3, WIDTH)).astype("f4")
    file = file_of(node, outputs, [*tensors, *(numpy_helper.from_array(start, name) for name in given)])
    found = refused(file, {"x": x}, "Input initial_h must have shape")
    fed = {"x": x} | {name: start.repeat(3, axis=1) for name in given}
    for ours, other in zip(found, both(file_of(node, outputs, tensors, given=given))[1].run(None, fed), strict=True):
        np.testing.assert_allclose(ours, other, atol=tolerances.NETWORK, rtol=0)
