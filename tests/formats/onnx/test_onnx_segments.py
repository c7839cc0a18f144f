"""Files that no Network can express: recurrent operators on the kernel, all others in ONNX Runtime."""

import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tolerances
from onnx import TensorProto, helper, numpy_helper

import cellstack as cs
from cellstack.formats import load_network
from cellstack.formats.onnx.segments import Kernel, Segment, SegmentedNetwork
from cellstack.onnxruntime import InferenceSession

RNG = np.random.default_rng(7)
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
SIZES = ((9, 2), (31, 3), (7, 1), (1, 5))  # T, B
WIDTH, UNITS = 6, 5


def weights(kind, name, width=WIDTH, ways=1, dtype=np.float32):
    """Return the tensors of an operator, with different values in every gate."""
    rows = GATES[kind] * UNITS
    shapes = {"W": (ways, rows, width), "R": (ways, rows, UNITS), "B": (ways, 2 * rows)}
    return [numpy_helper.from_array(RNG.normal(0, 0.4, s).astype(dtype), f"{name}.{key}") for key, s in shapes.items()]


def floats(name, *shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def write(path, nodes, inputs, outputs, tensors, opset=17, domains=()):
    graph = helper.make_graph(
        nodes, "graph", inputs, [helper.make_empty_tensor_value_info(one) for one in outputs], tensors
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def graph(kind="LSTM", ways=1, given=(), layout=0, last=False, path=None, **attributes):
    """Write a graph with a convolution, a recurrent operator, and an operator without a node: TopK."""
    name = {1: "forward", 2: "bidirectional"}[ways]
    attributes = {"hidden_size": UNITS, "direction": name, "layout": layout} | attributes
    extra = {"lengths": "sequence_lens", "h": "initial_h", "c": "initial_c"}
    taken = ["steps", "a.W", "a.R", "a.B", *(key if key in given else "" for key in extra)]
    outputs = ["Y", "Y_h", "Y_c"][: 3 if kind == "LSTM" else 2]
    perm = [0, 2, 1] if layout else [2, 0, 1]
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["conv"], pads=[1, 1]),
        helper.make_node("Transpose", ["conv"], ["steps"], "to_steps", perm=perm),
        helper.make_node(kind, taken[: 4 + len(extra)] if given else taken[:4], outputs, "layer", **attributes),
        helper.make_node("Abs", ["Y_h" if last else "Y"], ["size"]),
        helper.make_node("Constant", [], ["two"], value_ints=[2]),
        helper.make_node("TopK", ["size", "two"], ["top", "places"], "top", axis=-1),
        helper.make_node("Erf", ["top"], ["y"]),
    ]
    ends = ["B", ways, UNITS] if layout else [ways, "B", UNITS]
    inputs = [floats("x", "B", 4, "T"), *(floats(key, *ends) for key in given if key != "lengths")]
    inputs += [helper.make_tensor_value_info("lengths", TensorProto.INT32, ["B"])] if "lengths" in given else []
    kernel = numpy_helper.from_array(RNG.normal(0, 0.5, (WIDTH, 4, 3)).astype("f4"), "k")
    return write(path, nodes, inputs, ["y", *outputs[1:]], [kernel, *weights(kind, "a", ways=ways)])


def inputs_of(session, steps, batch):
    """Return inputs for the axes B and T."""
    sizes, found = {"B": batch, "T": steps}, {}
    for one in session.get_inputs():
        shape = [sizes.get(axis, axis) for axis in one.shape]
        if one.type == "tensor(int32)":
            found[one.name] = RNG.integers(1, steps + 1, shape).astype(np.int32)
        else:
            found[one.name] = RNG.normal(size=shape).astype(np.float32)
    return found


def theirs(path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def compared(path, parts, sizes=SIZES):
    session = theirs(path)
    for steps, batch in sizes:
        fed = inputs_of(session, steps, batch)
        for ours, other in zip(parts.compute(fed), session.run(None, fed), strict=True):
            assert ours.dtype == other.dtype
            np.testing.assert_allclose(ours, other, atol=tolerances.NETWORK, rtol=0)


def loaded(path) -> Any:
    with pytest.warns(UserWarning, match=r"TopK 'top'.* ONNX Runtime runs all but the recurrent operators: see plan"):
        return cs.load(path)


CASES = {
    "lstm": {},
    "both directions": {"ways": 2},
    "reverse": {"direction": "reverse"},
    "gru": {"kind": "GRU", "ways": 2, "linear_before_reset": 1},
    "rnn": {"kind": "RNN", "activations": ["Relu"]},
    "states": {"ways": 2, "given": ("h", "c")},
    "one state": {"given": ("c",)},
    "lengths": {"ways": 2, "given": ("lengths",)},
    "lengths and states": {"given": ("lengths", "h", "c"), "direction": "reverse"},
    "last": {"last": True, "ways": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_parts_equal_onnxruntime(case, tmp_path):
    path = str(graph(path=tmp_path / "model.onnx", **CASES[case]))
    parts = loaded(path)
    assert isinstance(parts, SegmentedNetwork)
    assert [type(part) for part in parts.parts] == [Segment, Kernel, Segment]
    compared(path, parts)


def test_the_plan_says_what_runs_where_and_why(tmp_path):
    parts = loaded(graph(path=tmp_path / "model.onnx", ways=2))
    head, first, layer, second = parts.plan()
    assert head.startswith("not a Network: the graph can't be read as a Network, found: ")
    assert "TopK 'top'" in head
    assert first == "segment 0: ONNX Runtime: Conv, Transpose"
    assert layer.startswith("layer: LSTM 6 -> 5 and back: fused cpu kernel")
    assert second == "segment 2: ONNX Runtime: Abs, TopK, Erf"
    assert repr(parts).startswith("SegmentedNetwork: x ['B', 4, 'T'] -> y")


def deep(path):
    """Two layers on top of each other and a third that reads the same input; their values meet in several segments."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("LSTM", ["r", "a.W", "a.R", "a.B"], ["a"], "a", hidden_size=UNITS),
        helper.make_node("Constant", [], ["one"], value_ints=[1]),
        helper.make_node("Neg", ["one"], ["less"]),  # depends on no input, and is part of two segments
        helper.make_node("Neg", ["less"], ["axes"]),
        helper.make_node("Squeeze", ["a", "axes"], ["a1"]),
        helper.make_node("GRU", ["a1", "b.W", "b.R", "b.B"], ["b", "b_h"], "b", hidden_size=UNITS),
        helper.make_node("LSTM", ["x", "c.W", "c.R", "c.B"], ["c"], "c", hidden_size=UNITS, direction="reverse"),
        helper.make_node("Squeeze", ["b", "axes"], ["b1"]),
        helper.make_node("Squeeze", ["c", "axes"], ["c1"]),
        helper.make_node("Concat", ["a1", "b1", "c1", "r"], ["all"], axis=2),
        helper.make_node("Mod", ["all", "m"], ["y"], "mod", fmod=1),
        helper.make_node("Identity", ["b_h"], ["h"]),
    ]
    tensors = [*weights("LSTM", "a"), *weights("GRU", "b", UNITS), *weights("LSTM", "c")]
    tensors.append(numpy_helper.from_array(np.array([0.3], "f4"), "m"))
    return str(write(path, nodes, [floats("x", "T", "B", WIDTH)], ["y", "h"], tensors))


def test_segments_are_few_and_get_what_they_use(tmp_path):
    path = deep(tmp_path / "model.onnx")
    parts = SegmentedNetwork(path)
    kinds = [part.name if isinstance(part, Kernel) else sorted(n.op_type for n in part.nodes) for part in parts.parts]
    assert kinds == [["Relu"], "a", "c", ["Squeeze", "Squeeze"], "b", ["Concat", "Identity", "Mod", "Squeeze"]]
    inside = [node.op_type for part in parts.segments for node in part.model.graph.node]
    assert inside.count("Neg") == 4
    assert [[one.name for one in part.model.graph.initializer] for part in parts.segments] == [[], [], ["m"]]
    compared(path, parts)


def test_inner_graphs_take_values_of_the_outer_one(tmp_path):
    then, other = (
        helper.make_graph(
            [helper.make_node(kind, ["a"], ["out"])], kind, [], [helper.make_empty_tensor_value_info("out")]
        )
        for kind in ("Abs", "Neg")
    )
    nodes = [
        helper.make_node("LSTM", ["x", "a.W", "a.R", "a.B"], ["a"], "a", hidden_size=UNITS),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["test"]),
        helper.make_node("If", ["test"], ["y"], then_branch=then, else_branch=other),
    ]
    tensors = [*weights("LSTM", "a"), numpy_helper.from_array(np.array(0, "f4"), "zero")]
    path = str(write(tmp_path / "model.onnx", nodes, [floats("x", "T", "B", WIDTH)], ["y"], tensors))
    parts = SegmentedNetwork(path)
    assert len(parts.kernels) == 1
    compared(path, parts)


def test_what_the_kernel_lacks_stays_in_a_segment(tmp_path):
    """A layer whose weights are an input, and one that the kernel runs."""
    nodes = [
        helper.make_node("LSTM", ["x", "a.W", "a.R", "a.B"], ["a"], "fixed", hidden_size=UNITS),
        helper.make_node("LSTM", ["x", "W", "b.R", "b.B"], ["b"], "given", hidden_size=UNITS),
        helper.make_node("Sub", ["a", "b"], ["y"]),
    ]
    tensors = [*weights("LSTM", "a"), *weights("LSTM", "b")[1:]]
    inputs = [floats("x", "T", "B", WIDTH), floats("W", 1, 4 * UNITS, WIDTH)]
    path = str(write(tmp_path / "model.onnx", nodes, inputs, ["y"], tensors))
    parts = SegmentedNetwork(path)
    assert [kernel.name for kernel in parts.kernels] == ["fixed"]
    assert parts.plan()[-1].startswith("given: ONNX Runtime: node 'given': expected W to be constant, found 'W'")
    compared(path, parts)


def test_a_saved_file_is_the_same(tmp_path):
    parts = loaded(graph(path=tmp_path / "model.onnx"))
    parts.save(tmp_path / "again.onnx")
    x = RNG.normal(size=(2, 4, 9)).astype("f4")
    for ours, again in zip(parts(x), loaded(tmp_path / "again.onnx")({"x": x}), strict=True):
        np.testing.assert_array_equal(ours, again)


def test_what_needs_every_operator_names_a_segment(tmp_path):
    parts = loaded(graph(path=tmp_path / "model.onnx"))
    first = r"segment 0: ONNX Runtime: Conv, Transpose; not a Network: .*TopK 'top'"
    for call in (
        parts.stream,
        lambda: parts.export_c(tmp_path, "net"),
        lambda: parts.save(tmp_path / "net.safetensors"),
    ):
        with pytest.raises(ValueError, match=first):
            call()
    with pytest.raises(cs.FormatError, match="TopK 'top'"):
        load_network(tmp_path / "model.onnx")


def test_wrong_inputs_are_refused(tmp_path):
    parts = SegmentedNetwork(str(graph(path=tmp_path / "model.onnx", given=("h", "c"))))
    good = inputs_of(theirs(str(tmp_path / "model.onnx")), 9, 2)
    with pytest.raises(ValueError, match="expected the inputs x, h, c, got x"):
        parts({"x": good["x"]})
    with pytest.raises(cs.ShapeError, match=r"layer: expected \[1, 2, 5\], got \(1, 3, 5\)"):
        parts(good | {"c": np.zeros((1, 3, UNITS), "f4")})
    with pytest.raises(TypeError, match="layer: expected float32, got float64"):
        parts(good | {"h": np.zeros((1, 2, UNITS))})


def test_a_file_that_onnxruntime_refuses_raises_the_first_reason(tmp_path):
    nodes = [
        helper.make_node("LSTM", ["x", "a.W", "a.R", "a.B"], ["a"], "a", hidden_size=UNITS),
        helper.make_node("Unheard", ["a"], ["y"], domain="of"),
    ]
    path = write(
        tmp_path / "m.onnx", nodes, [floats("x", "T", "B", WIDTH)], ["y"], weights("LSTM", "a"), domains=["of"]
    )
    with pytest.raises(cs.FormatError, match="Unheard"):
        cs.load(path)


def test_without_onnxruntime_a_call_names_the_segment(tmp_path):
    path = graph(path=tmp_path / "model.onnx")
    code = (
        "import sys, warnings; sys.modules['onnxruntime'] = None; warnings.simplefilter('ignore')\n"
        f"import numpy, cellstack as cs; parts = cs.load({str(path)!r}); print(len(parts.plan()))\n"
        "try: parts(numpy.zeros((1, 4, 5), 'f4'))\nexcept ModuleNotFoundError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, message = done.stdout.splitlines()
    assert count == "4"
    assert message.endswith(
        "segment 0: ONNX Runtime: Conv, Transpose needs onnxruntime: pip install 'cellstack[onnxruntime]'"
    )


def test_a_layout_with_the_batch_first(tmp_path):
    """ONNX Runtime doesn't have this layout: the results are those of the other one, with the axes in another order."""
    path, other = str(graph(path=tmp_path / "a.onnx", ways=2, given=("lengths", "h", "c"))), str(tmp_path / "b.onnx")
    model = onnx.load(path)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "layout":
                attribute.i = 1
            elif attribute.name == "perm":
                attribute.ints[:] = [0, 2, 1]
    for value in model.graph.input[1:3]:
        value.CopyFrom(floats(value.name, "B", 2, UNITS))
    onnx.save(model, other)
    given = inputs_of(theirs(path), 9, 3)
    turned = given | {name: given[name].swapaxes(0, 1) for name in ("h", "c")}
    expected, found = SegmentedNetwork(path)(given), SegmentedNetwork(other)(turned)
    np.testing.assert_array_equal(found[0], expected[0].transpose(2, 0, 1, 3))
    for ours, end in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(ours, end.swapaxes(0, 1))


def test_verify_compares_with_onnxruntime_alone(tmp_path):
    path = graph(path=tmp_path / "model.onnx", ways=2)
    parts = loaded(path)
    report = cs.verify(parts, path)
    assert report.ok()
    assert report.inputs == {"x": (5, 4, 7)}
    assert [one.name for one in report.differences] == ["y", "Y_h", "Y_c"]
    assert cs.verify(parts, path, RNG.normal(size=(1, 4, 30)).astype("f4")).ok()
    model = onnx.load(path)
    weight = next(one for one in model.graph.initializer if one.name == "a.R")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[:, ::-1], "a.R"))
    onnx.save(model, path)
    assert not cs.verify(parts, path).ok()


# ── InferenceSession ──────────────────────────────────────────────────────────────────────────────────────────────────


def described(session):
    every = session.get_inputs(), session.get_outputs()
    return [[(one.name, one.type, len(one.shape)) for one in ends] for ends in every]


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_session_has_onnxruntimes_interface(tmp_path, as_bytes):
    path = str(graph(path=tmp_path / "model.onnx", ways=2, given=("h", "c")))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    given = onnx.load(path).SerializeToString() if as_bytes else path
    ours: Any = InferenceSession(given, options, providers=["CPUExecutionProvider"])
    other = theirs(path)
    assert described(ours) == described(other)
    assert ours.get_providers() == other.get_providers()
    assert ours.get_modelmeta().graph_name == other.get_modelmeta().graph_name
    fed = inputs_of(other, 12, 3)
    (found,) = ours.run(["Y_c"], fed)
    np.testing.assert_allclose(found, other.run(["Y_c"], fed)[0], atol=tolerances.NETWORK)
    assert [array.shape for array in ours.run(None, fed)] == [array.shape for array in other.run(None, fed)]
    with pytest.raises(ValueError, match="expected names of y, Y_h, Y_c, got z"):
        ours.run(["z"], fed)
    assert "fused cpu kernel" in repr(ours.plan())
    assert isinstance(ours, onnxruntime.InferenceSession)


def test_a_file_without_recurrent_operators_runs_in_onnxruntime(tmp_path):
    path = str(write(tmp_path / "m.onnx", [helper.make_node("Erf", ["x"], ["y"])], [floats("x", "B", 3)], ["y"], []))
    session: Any = InferenceSession(path)
    assert session.plan() == ("ONNX Runtime: it has no recurrent operator",)
    x = RNG.normal(size=(2, 3)).astype("f4")
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], theirs(path).run(None, {"x": x})[0])
    assert session.get_session_options().intra_op_num_threads == 0
    with pytest.raises(Exception, match="NO_SUCHFILE"):
        InferenceSession(str(tmp_path / "none.onnx"))


# ── Every variant of an operator ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 100))])
def test_random_operators(seed, tmp_path):
    """Attributes, optional inputs and used outputs in any combination."""
    rng = np.random.default_rng(seed)

    def maybe(share):
        return bool(rng.random() < share)

    kind, ways = str(rng.choice(list(GATES))), int(rng.integers(1, 3))
    direction = "bidirectional" if ways == 2 else str(rng.choice(["forward", "reverse"]))
    attributes = {"hidden_size": UNITS, "direction": direction}
    attributes |= {"clip": float(rng.uniform(0.3, 2))} if maybe(0.3) else {}
    attributes |= {"linear_before_reset": int(maybe(0.5))} if kind == "GRU" else {}
    attributes |= {"input_forget": int(maybe(0.3))} if kind == "LSTM" else {}
    taken = ["x", "a.W", "a.R", "a.B" if maybe(0.7) else "", "lengths" if maybe(0.4) else ""]
    taken += [name if maybe(0.4) else "" for name in ("h", "c")[: 2 if kind == "LSTM" else 1]]
    taken += ["P"] if kind == "LSTM" and maybe(0.3) else []
    while not taken[-1]:
        taken.pop()
    every = ["Y", "Y_h", "Y_c"][: 3 if kind == "LSTM" else 2]
    outputs = [name if maybe(0.6) else "" for name in every]
    outputs = outputs if any(outputs) else every
    peepholes = numpy_helper.from_array(rng.normal(0, 0.4, (ways, 3 * UNITS)).astype("f4"), "P")
    tensors = [one for one in (*weights(kind, "a", ways=ways), peepholes) if one.name in taken]
    inputs = [floats("x", "T", "B", WIDTH), *(floats(name, ways, "B", UNITS) for name in ("h", "c") if name in taken)]
    inputs += [helper.make_tensor_value_info("lengths", TensorProto.INT32, ["B"])] if "lengths" in taken else []
    node = helper.make_node(kind, taken, outputs, "layer", **attributes)
    path = str(write(tmp_path / "model.onnx", [node], inputs, list(filter(None, outputs)), tensors))
    parts = SegmentedNetwork(path)
    assert [type(part) for part in parts.parts] == [Kernel]
    compared(path, parts)
