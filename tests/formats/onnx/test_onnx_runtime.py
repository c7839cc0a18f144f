"""Files that no Network can express: ONNX Runtime runs them, with recurrent operators on the kernel."""

import gc
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tolerances
from onnx import TensorProto, helper, numpy_helper

import cellstack as cs
from cellstack.formats import load_network
from cellstack.formats.onnx import save
from cellstack.formats.onnx.runtime import FOLDER, SPINNING, RuntimeModel
from cellstack.onnxruntime import InferenceSession

RNG = np.random.default_rng(7)
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
SIZES = ((9, 2), (31, 3), (7, 1), (1, 5))  # T, B
WIDTH, UNITS = 6, 5


def weights(kind, name, width=WIDTH, ways=1, dtype: Any = np.float32):
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


def graph(kind="LSTM", ways=1, given=(), layout=0, last=False, *, path, **attributes):
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


def compared(path, model, sizes=SIZES):
    session = theirs(path)
    for steps, batch in sizes:
        fed = inputs_of(session, steps, batch)
        for ours, other in zip(model.compute(fed), session.run(None, fed), strict=True):
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
def test_the_results_equal_onnxruntimes(case, tmp_path):
    path = str(graph(path=tmp_path / "model.onnx", **CASES[case]))
    model = loaded(path)
    assert isinstance(model, RuntimeModel)
    assert [kernel.name for kernel in model.kernels] == ["layer"]
    compared(path, model)


def test_the_plan_says_what_runs_where_and_why(tmp_path):
    model = loaded(graph(path=tmp_path / "model.onnx", ways=2))
    head, layer, others = model.plan()
    assert head.startswith("not a Network: the graph can't be read as a Network, found: ")
    assert "TopK 'top'" in head
    assert layer.startswith("layer: LSTM 6 -> 5 and back: fused cpu kernel")
    assert others == "other operators: ONNX Runtime: Conv, Transpose, Abs, Constant, TopK, Erf"
    assert repr(model).startswith("RuntimeModel: x ['B', 4, 'T'] -> y")


def test_layers_on_top_of_each_other(tmp_path):
    """Two layers, and a third that reads the same input."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("LSTM", ["r", "a.W", "a.R", "a.B"], ["a"], "a", hidden_size=UNITS),
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
    tensors += [numpy_helper.from_array(np.array([0.3], "f4"), "m"), numpy_helper.from_array(np.array([1]), "axes")]
    path = str(write(tmp_path / "model.onnx", nodes, [floats("x", "T", "B", WIDTH)], ["y", "h"], tensors))
    model = RuntimeModel(path)
    assert [kernel.name for kernel in model.kernels] == ["a", "b", "c"]
    compared(path, model)


def inner(name, kind, tensors, taken="x", last=()):
    """A graph with a recurrent operator, whose weights are its own."""
    nodes = [
        helper.make_node(kind, [taken, *(f"{name}.{key}" for key in "WRB")], ["", f"{name}.h"], name, hidden_size=UNITS)
    ]
    nodes += [helper.make_node("Squeeze", [f"{name}.h", "axes"], [f"{name}.out"]), *last]
    ends = [node.output[0] for node in (nodes[1], *last)]
    return helper.make_graph(nodes, name, [], [helper.make_empty_tensor_value_info(end) for end in ends], tensors)


def test_operators_in_the_branches_of_an_if(tmp_path):
    """The weights of one are in its branch, those of the other in the outer graph."""
    own, outer = weights("LSTM", "a"), weights("GRU", "b")
    then, other = inner("a", "LSTM", own), inner("b", "GRU", [])
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["test"]),
        helper.make_node("If", ["test"], ["y"], then_branch=then, else_branch=other),
    ]
    constants = [numpy_helper.from_array(np.array(0, "f4"), "zero"), numpy_helper.from_array(np.array([0]), "axes")]
    inputs = [floats("x", "T", "B", WIDTH)]
    path = str(write(tmp_path / "model.onnx", nodes, inputs, ["y"], [*outer, *constants]))
    model = RuntimeModel(path)
    assert [kernel.name for kernel in model.kernels] == ["b", "a"]  # in the order of attributes
    compared(path, model, SIZES * 3)  # some inputs take each branch


def test_operators_in_the_body_of_a_loop(tmp_path):
    """The body adds the final state, as its carried value, of an operator over the outer graph's input."""
    end = [helper.make_node("Add", ["s", "a.out"], ["s1"]), helper.make_node("Identity", ["go"], ["go1"])]
    body = inner("a", "LSTM", weights("LSTM", "a"), last=end)
    body.input.extend(
        [
            helper.make_tensor_value_info("n", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            floats("s", "B", UNITS),
        ]
    )
    del body.output[:]
    body.output.extend([helper.make_tensor_value_info("go1", TensorProto.BOOL, []), floats("s1", "B", UNITS)])
    nodes = [helper.make_node("Loop", ["three", "", "start"], ["y"], "loop", body=body)]
    constants = [numpy_helper.from_array(np.array(3), "three"), numpy_helper.from_array(np.array([0]), "axes")]
    inputs = [floats("x", "T", "B", WIDTH), floats("start", "B", UNITS)]
    path = str(write(tmp_path / "model.onnx", nodes, inputs, ["y"], constants))
    model = RuntimeModel(path)
    assert [kernel.name for kernel in model.kernels] == ["a"]
    compared(path, model)


def test_operators_in_functions(tmp_path):
    """ONNX Runtime gets the functions' operators in place of calls."""
    function = helper.make_function(
        "of",
        "Twice",
        ["v"],
        ["out"],
        [helper.make_node("Add", ["v", "v"], ["s"]), helper.make_node("Gelu", ["s"], ["out"], domain="com.microsoft")],
        [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
    )
    nodes = [
        helper.make_node("LSTM", ["x", "a.W", "a.R", "a.B"], ["a"], "a", hidden_size=UNITS),
        helper.make_node("Twice", ["a"], ["y"], domain="of"),
    ]
    inputs = [floats("x", "T", "B", WIDTH)]
    path = str(write(tmp_path / "model.onnx", nodes, inputs, ["y"], weights("LSTM", "a"), domains=["of"]))
    made = onnx.load(path)
    made.functions.append(function)
    onnx.save(made, path)
    compared(path, RuntimeModel(path))


def test_what_the_kernel_lacks_stays_in_onnxruntime(tmp_path):
    """A layer whose weights are an input, and one that the kernel runs."""
    nodes = [
        helper.make_node("LSTM", ["x", "a.W", "a.R", "a.B"], ["a"], "fixed", hidden_size=UNITS),
        helper.make_node("LSTM", ["x", "W", "b.R", "b.B"], ["b"], "given", hidden_size=UNITS),
        helper.make_node("Sub", ["a", "b"], ["y"]),
    ]
    tensors = [*weights("LSTM", "a"), *weights("LSTM", "b")[1:]]
    inputs = [floats("x", "T", "B", WIDTH), floats("W", 1, 4 * UNITS, WIDTH)]
    path = str(write(tmp_path / "model.onnx", nodes, inputs, ["y"], tensors))
    model = RuntimeModel(path)
    assert [kernel.name for kernel in model.kernels] == ["fixed"]
    assert model.plan()[-1].startswith("given: ONNX Runtime: node 'given': expected W to be constant, found 'W'")
    compared(path, model)


@pytest.mark.parametrize("external", [False, True])
def test_a_saved_file_is_the_same(tmp_path, external):
    path = graph(path=tmp_path / "model.onnx")
    if external:
        onnx.save(onnx.load(path), path, save_as_external_data=True, location="data", size_threshold=0)
    model = loaded(path)
    (tmp_path / "elsewhere").mkdir()
    model.save(tmp_path / "elsewhere" / "again.onnx")
    x = RNG.normal(size=(2, 4, 9)).astype("f4")
    for ours, again in zip(model(x), loaded(tmp_path / "elsewhere" / "again.onnx")({"x": x}), strict=True):
        np.testing.assert_array_equal(ours, again)


def test_what_needs_every_operator_names_those_of_onnxruntime(tmp_path):
    model = loaded(graph(path=tmp_path / "model.onnx"))
    first = r"ONNX Runtime's operators, Conv, Transpose, .*; not a Network: .*TopK 'top'"
    for call in (
        model.stream,
        lambda: model.export_c(tmp_path, "net"),
        lambda: model.save(tmp_path / "net.safetensors"),
    ):
        with pytest.raises(ValueError, match=first):
            call()
    with pytest.raises(cs.FormatError, match="TopK 'top'"):
        load_network(tmp_path / "model.onnx")


def test_wrong_inputs_are_refused(tmp_path):
    path = str(graph(path=tmp_path / "model.onnx", given=("lengths", "h", "c")))
    model = RuntimeModel(path)
    good = inputs_of(theirs(path), 9, 2)
    with pytest.raises(ValueError, match="expected the inputs x, h, c, lengths, got x"):
        model({"x": good["x"]})
    for x, got in ((good["x"], "ndarray"), ((good["x"],), "1 in order")):
        with pytest.raises(ValueError, match=f"expected the inputs x, h, c, lengths, by name or in order, got {got}"):
            model(x)
    for given, message in (
        ({"c": np.zeros((1, 3, UNITS), "f4")}, r"layer: expected initial_c of shape \[1, 2, 5\], found \[1, 3, 5\]"),
        ({"h": np.zeros((1, 2, UNITS + 1), "f4")}, "invalid dimensions for input: h"),
        ({"lengths": np.array([4], "i4")}, r"layer: expected sequence_lens of shape \[2\], found \[1\]"),
        ({"lengths": np.array([4, -1], "i4")}, r"layer: expected sequence_lens from 0 to 9, found -1"),
        ({"lengths": np.array([10, 3], "i4")}, r"layer: expected sequence_lens from 0 to 9, found 10"),
        ({"h": np.zeros((1, 2, UNITS))}, r"expected: \(tensor\(float\)\)"),
    ):
        with pytest.raises(Exception, match=message):
            model(good | given)
    model(good)


def test_an_operator_checks_x(tmp_path):
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["steps"]),
        helper.make_node("GRU", ["steps", "a.W", "a.R", "a.B"], ["y"], "a", hidden_size=UNITS),
    ]
    inputs = [floats("x", "N"), helper.make_tensor_value_info("shape", TensorProto.INT64, ["R"])]
    model = RuntimeModel(str(write(tmp_path / "m.onnx", nodes, inputs, ["y"], weights("GRU", "a"))))
    x = np.zeros(24, "f4")
    assert model((x, np.array([2, 2, 6])))[0].shape == (1, 2, UNITS)
    for shape in ([4, 6], [2, 3, 4], [1, 2, 2, 6]):
        found = rf"a: expected X of shape \[any, any, 6\], found \[{', '.join(map(str, shape))}\]"
        with pytest.raises(Exception, match=found):
            model((x, np.array(shape)))


@pytest.mark.parametrize("sizes", [(0, 3), (9, 0), (0, 0)])
def test_no_steps_and_no_rows(tmp_path, sizes):
    path = str(graph(path=tmp_path / "model.onnx", ways=2, given=("lengths", "h", "c"), last=True))
    made = onnx.load(path)
    del made.graph.node[3:], made.graph.output[0], made.graph.node[:2], made.graph.initializer[0]
    made.graph.input[0].CopyFrom(floats("steps", "T", "B", WIDTH))
    onnx.save(made, path)
    steps, batch = sizes
    given = {name: RNG.normal(size=(2, batch, UNITS)).astype("f4") for name in ("h", "c")}
    given |= {"steps": np.zeros((steps, batch, WIDTH), "f4"), "lengths": np.full(batch, steps, "i4")}
    h, c = RuntimeModel(path)(given)
    assert h.shape == c.shape == (2, batch, UNITS)
    if not steps:
        np.testing.assert_array_equal(h, given["h"])
        np.testing.assert_array_equal(c, given["c"])


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


@pytest.mark.long
def test_without_onnxruntime_a_call_names_what_needs_it(tmp_path):
    path = graph(path=tmp_path / "model.onnx")
    code = (
        "import sys, warnings; sys.modules['onnxruntime'] = None; warnings.simplefilter('ignore')\n"
        f"import numpy, cellstack as cs; model = cs.load({str(path)!r}); print(len(model.plan()), repr(model)[:20])\n"
        "try: model(numpy.zeros((1, 4, 5), 'f4'))\nexcept ModuleNotFoundError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, message = done.stdout.splitlines()
    assert count == "3 RuntimeModel: x -> y"
    assert message.endswith(
        "its operators Conv, Transpose, Abs, Constant, TopK, Erf need onnxruntime: pip install 'cellstack[onnxruntime]'"
    )


def test_float64(tmp_path):
    """ONNX Runtime has no such operator."""
    path = str(tmp_path / "model.onnx")
    node = helper.make_node("LSTM", ["x", "a.W", "a.R", "a.B"], ["y", "h"], "a", hidden_size=UNITS)
    x = helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["T", "B", WIDTH])
    write(path, [node], [x], ["y", "h"], weights("LSTM", "a", dtype=np.float64))
    given = RNG.normal(size=(9, 2, WIDTH))
    y, h = RuntimeModel(path)(given)
    expected, _ = cs.extract(path)["a"].run(given.swapaxes(0, 1))
    assert y.dtype == h.dtype == np.float64
    np.testing.assert_array_equal(y[:, 0].swapaxes(0, 1), expected)
    np.testing.assert_array_equal(h[0], expected[:, -1])


def test_verify_asks_for_a_sample_where_random_inputs_are_rejected(tmp_path):
    nodes = [
        helper.make_node("LSTM", ["x", "a.W", "a.R", "a.B"], ["all", "y"], "a", hidden_size=UNITS),
        helper.make_node("Gather", ["all", "places"], ["some"], axis=0),
    ]
    places = helper.make_tensor_value_info("places", TensorProto.INT64, ["N", "M"])
    path = str(write(tmp_path / "m.onnx", nodes, [floats("x", 1, "B", 6), places], ["some", "y"], weights("LSTM", "a")))
    model = RuntimeModel(path)
    assert re.search("rejects random inputs: .*Gather.*: pass x, a sample", str(cs.verify(model, path)))
    assert cs.verify(model, path, (np.zeros((1, 2, 6), "f4"), np.zeros((1, 1), int))).ok()


def test_verify_compares_with_onnxruntime_alone(tmp_path):
    path = graph(path=tmp_path / "model.onnx", ways=2)
    model = loaded(path)
    report = cs.verify(model, path)
    assert report.ok()
    assert report.inputs == {"x": (5, 4, 7)}
    assert [one.name for one in report.differences] == ["y", "Y_h", "Y_c"]
    assert cs.verify(model, path, RNG.normal(size=(1, 4, 30)).astype("f4")).ok()
    proto = onnx.load(path)
    weight = next(one for one in proto.graph.initializer if one.name == "a.R")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[:, ::-1], "a.R"))
    onnx.save(proto, path)
    assert not cs.verify(model, path).ok()


# ── InferenceSession ──────────────────────────────────────────────────────────────────────────────────────────────────


def described(session):
    """The names, types and shapes of inputs and outputs."""
    return [[(one.name, one.type, one.shape) for one in ends] for ends in (session.get_inputs(), session.get_outputs())]


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_rows_without_steps_have_onnxruntimes_states(direction, tmp_path):
    ways = 2 if direction == "bidirectional" else 1
    path = str(graph("LSTM", ways, ("lengths", "h", "c"), path=tmp_path / "net.onnx", direction=direction))
    session = theirs(path)
    fed = inputs_of(session, 6, 4) | {"lengths": np.array([0, 6, 0, 2], "i4")}
    for ours, other in zip(RuntimeModel(path).compute(fed), session.run(None, fed), strict=True):
        np.testing.assert_allclose(ours, other, atol=tolerances.NETWORK, rtol=0)


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
    bound = ours.io_binding()
    for name, array in fed.items():
        bound.bind_cpu_input(name, array)
    bound.bind_output("Y_c")
    ours.run_with_iobinding(bound)
    np.testing.assert_array_equal(bound.copy_outputs_to_cpu()[0], found)
    assert "fused cpu kernel" in repr(ours.plan())
    assert isinstance(ours, onnxruntime.InferenceSession)


@pytest.mark.parametrize("kind", ["lstm", "mingru"])
def test_states_that_are_inputs_with_a_default_may_be_given(kind, tmp_path):
    spec, path = cs.CellSpec(WIDTH, UNITS, kind=kind), str(tmp_path / "net.onnx")
    cell = cs.nodes.Cell(spec, **{key: RNG.normal(size=shape).astype("f4") for key, shape in spec.shapes.items()})
    save(cs.Network([cs.nodes.Recurrent((cell,))], ["a"]), path, states=True)
    ours: Any = InferenceSession(path)
    other = theirs(path)
    assert "fused cpu kernel" in ours.plan()[0]
    states = [one.name for one in other.get_overridable_initializers()]
    assert (
        [one.name for one in ours.get_overridable_initializers()] == states == [f"a.{key}" for key in spec.state_sizes]
    )
    fed = {other.get_inputs()[0].name: RNG.normal(size=(2, 7, WIDTH)).astype("f4")}
    for given in ({}, {name: RNG.normal(size=(2, UNITS)).astype("f4") for name in states}):
        for one, expected in zip(ours.run(None, fed | given), other.run(None, fed | given), strict=True):
            np.testing.assert_allclose(one, expected, atol=tolerances.NETWORK, rtol=0)


def test_weights_that_are_inputs_with_a_default_may_not_be_given(tmp_path):
    """Other operators use them too: they would have the given values, and the kernel those of the file."""
    nodes = [
        helper.make_node("LSTM", ["x", "a.W", "a.R", "a.B"], ["y"], hidden_size=UNITS),
        helper.make_node("Erf", ["a.W"], ["of_w"]),
    ]
    inputs = [floats("x", "T", "B", WIDTH), floats("a.W", 1, 4 * UNITS, WIDTH)]
    path = str(write(tmp_path / "net.onnx", nodes, inputs, ["y", "of_w"], weights("LSTM", "a")))
    session: Any = InferenceSession(path)
    fed = {"x": RNG.normal(size=(7, 2, WIDTH)).astype("f4")}
    np.testing.assert_allclose(session.run(None, fed)[0], theirs(path).run(None, fed)[0], atol=tolerances.NETWORK)
    with pytest.raises(Exception, match=r"Invalid input name: a\.W"):
        session.run(None, fed | {"a.W": np.ones((1, 4 * UNITS, WIDTH), "f4")})


def test_a_file_without_recurrent_operators_runs_in_onnxruntime(tmp_path):
    path = str(write(tmp_path / "m.onnx", [helper.make_node("Erf", ["x"], ["y"])], [floats("x", "B", 3)], ["y"], []))
    session: Any = InferenceSession(path)
    assert session.plan() == ("other operators: ONNX Runtime: Erf",)
    x = RNG.normal(size=(2, 3)).astype("f4")
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], theirs(path).run(None, {"x": x})[0])
    assert session.get_session_options().intra_op_num_threads == 0
    with pytest.raises(Exception, match="NO_SUCHFILE"):
        InferenceSession(str(tmp_path / "none.onnx"))


def test_a_session_with_other_providers(tmp_path):
    """It is created again."""
    path = str(graph(path=tmp_path / "model.onnx"))
    session: Any = InferenceSession(path)
    fed = inputs_of(session, 9, 2)
    expected = session.run(None, fed)
    session.set_providers(["CPUExecutionProvider"])
    for found, own in zip(session.run(None, fed), expected, strict=True):
        np.testing.assert_array_equal(found, own)


def test_an_optimised_copy_has_onnxruntimes_operators(tmp_path):
    path, options = str(graph(path=tmp_path / "model.onnx")), onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "copy.onnx")
    session: Any = InferenceSession(path, options)
    assert session.plan() == (
        "ONNX Runtime: a file can't hold the kernel's operators, and optimized_model_filepath asks for one",
    )
    fed = inputs_of(session, 9, 2)
    for found, own in zip(theirs(tmp_path / "copy.onnx").run(None, fed), session.run(None, fed), strict=True):
        np.testing.assert_array_equal(found, own)


def test_weights_are_read_from_the_folder_that_the_options_name(tmp_path, monkeypatch):
    """The working directory has a file of the same name."""
    paths = {}
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        paths[name] = graph(path=tmp_path / name / "model.onnx")
        external = {"save_as_external_data": True, "location": "weights", "size_threshold": 100}
        onnx.save(onnx.load(paths[name]), paths[name], **external)
    monkeypatch.chdir(tmp_path / "here")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(FOLDER, str(tmp_path / "there"))
    session: Any = InferenceSession(paths["there"].read_bytes(), options)
    assert "fused cpu kernel" in session.plan()[0]
    fed = inputs_of(session, 9, 2)
    expected = theirs(str(paths["there"])).run(None, fed)
    np.testing.assert_allclose(session.run(None, fed)[0], expected[0], atol=tolerances.NETWORK, rtol=0)


def test_an_operator_without_a_name_is_called_so(tmp_path):
    nodes = [helper.make_node("GRU", ["x", "a.W", "a.R", "a.B"], ["y"], hidden_size=UNITS)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    session: Any = InferenceSession(str(write(tmp_path / "net.onnx", nodes, [x], ["y"], weights("GRU", "a"))))
    with pytest.raises(Exception, match=r"a recurrent operator without a name: expected X of shape \[any, any, 6\]"):
        session.run(None, {"x": np.ones((2, 5), "f4")})


def test_options_serve_several_sessions(tmp_path):
    paths = [str(graph(path=tmp_path / f"{kind}.onnx", kind=kind)) for kind in ("LSTM", "GRU")]
    options = onnxruntime.SessionOptions()
    fed = {"x": RNG.normal(size=(2, 4, 9)).astype("f4")}
    for path in paths:
        ours: Any = InferenceSession(path, options)
        np.testing.assert_allclose(ours.run(None, fed)[0], theirs(path).run(None, fed)[0], atol=tolerances.NETWORK)
    plain: Any = onnxruntime.InferenceSession(paths[0], options)
    assert len(plain.run(None, fed)) == 3
    assert options.get_session_config_entry(SPINNING) == "0"
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(SPINNING, "1")
    InferenceSession(paths[0], options)
    assert options.get_session_config_entry(SPINNING) == "1"


def test_a_session_outlives_what_made_it(tmp_path):
    path = str(graph(path=tmp_path / "model.onnx", ways=2))
    model = RuntimeModel(path)
    fed = {"x": RNG.normal(size=(2, 4, 9)).astype("f4")}
    expected, session = model.compute(fed), model.session
    del model
    gc.collect()
    for ours, again in zip(expected, session.run(None, fed), strict=True):
        np.testing.assert_array_equal(ours, again)


def test_a_file_with_the_kernels_operators_is_refused(tmp_path):
    """Their handles are valid in the session that they were made for only."""
    path = graph(path=tmp_path / "model.onnx")
    ours = helper.make_node("Recurrent", ["steps"], ["Z", "", ""], "z", domain="cellstack", handle=1 << 40)
    made = onnx.load(path)
    made.graph.node.insert(2, ours)
    made.graph.output.append(helper.make_empty_tensor_value_info("Z"))
    made.opset_import.append(helper.make_opsetid("cellstack", 1))
    onnx.save(made, path)
    with pytest.raises(Exception, match="z: found no weights of this type under the handle 1099511627776"):
        RuntimeModel(str(path)).prepare()


def test_sessions_in_several_threads_at_once(tmp_path):
    """Sessions with one and with two threads, each called by several threads; results don't depend on it."""
    calls = []
    for kind, threads in (("LSTM", 1), ("GRU", 2), ("LSTM", 2)):
        path = tmp_path / f"{kind}{threads}.onnx"
        nodes = [
            helper.make_node(kind, ["x", "a.W", "a.R", "a.B"], ["y"], hidden_size=UNITS, direction="bidirectional")
        ]
        path = str(write(path, nodes, [floats("x", "T", "B", WIDTH)], ["y"], weights(kind, "a", ways=2)))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session: Any = InferenceSession(path, options)
        for batch in (1, 64):
            fed = {"x": RNG.normal(size=(300, batch, WIDTH)).astype("f4")}
            calls.append((session, fed, session.run(None, fed)[0]))
    with ThreadPoolExecutor(6) as pool:
        found = [(pool.submit(session.run, None, fed), expected) for session, fed, expected in calls * 8]
        for future, expected in found:
            np.testing.assert_array_equal(future.result(timeout=60)[0], expected)


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
    model = RuntimeModel(path)
    assert len(model.kernels) == 1
    compared(path, model)
    # ONNX Runtime doesn't have the other layout
    node.attribute.append(helper.make_attribute("layout", 1))
    for one in inputs:
        for axis in one.type.tensor_type.shape.dim:
            axis.Clear()
    batch_first = RuntimeModel(
        str(write(tmp_path / "other.onnx", [node], inputs, list(filter(None, outputs)), tensors))
    )
    for steps, batch in SIZES:
        fed = inputs_of(theirs(path), steps, batch)
        found = batch_first.compute({name: a if name == "lengths" else a.swapaxes(0, 1) for name, a in fed.items()})
        for name, ours, turned in zip(filter(None, outputs), model.compute(fed), found, strict=True):
            np.testing.assert_array_equal(turned, ours.transpose(2, 0, 1, 3) if name == "Y" else ours.swapaxes(0, 1))
