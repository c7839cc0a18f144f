"""Files where a call is one step: frames, their context, branches resolved at load, weights passed at load."""

import io
import json
import warnings

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx_graphs import run, write

import cellstack as cs
from cellstack.cells.base import State
from cellstack.cells.errors import FormatError
from cellstack.cli import main as cli
from cellstack.cli.files import load_options
from cellstack.formats import onnx as adapter

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
NEAR = 2e-6  # of probabilities: float32 on both sides
FRAME, CONTEXT, HOP, WINDOW, BINS, UNITS = 24, 8, 8, 16, 5, 6
TOTAL, ENDS = FRAME + CONTEXT, ("output", "stateN")


def floats(rng, *shape, scale=0.4):
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def detector_nodes(rng, prefix, mirror, rows=False):
    """A detector's nodes and tensors: a transform as a convolution, magnitudes, an encoder, an LSTM, a head."""
    arrays = {
        "basis": floats(rng, 2 * BINS, 1, WINDOW),
        "w0": floats(rng, 7, BINS, 3), "b0": floats(rng, 7),
        "w1": floats(rng, UNITS, 7, 3), "b1": floats(rng, UNITS),
        "W": floats(rng, 1, 4 * UNITS, UNITS), "R": floats(rng, 1, 4 * UNITS, UNITS), "B": floats(rng, 1, 8 * UNITS),
        "hw": floats(rng, 1, UNITS, 1), "hb": floats(rng, 1),
        "pads": np.array([0, 0, 0, mirror], np.int64), "zero": np.array([0], np.int64), "one": np.array([1], np.int64),
        "two": np.array([2], np.int64), "bins": np.array([BINS], np.int64), "end": np.array([2**63 - 1], np.int64),
        "power": np.array(2.0, np.float32), "last": np.array([-1], np.int64),
    }  # fmt: skip
    node = helper.make_node
    nodes = [
        node("Pad", ["input", "pads"], ["padded"], mode="reflect"),
        node("Unsqueeze", ["padded", "one"], ["channel"]),
        node("Conv", ["channel", "basis"], ["stft"], kernel_shape=[WINDOW], strides=[HOP]),
        node("Slice", ["stft", "zero", "bins", "one"], ["real"]),
        node("Slice", ["stft", "bins", "end", "one"], ["imaginary"]),
        node("Pow", ["real", "power"], ["real2"]),
        node("Pow", ["imaginary", "power"], ["imaginary2"]),
        node("Add", ["real2", "imaginary2"], ["total"]),
        node("Sqrt", ["total"], ["magnitude"]),
        node("Conv", ["magnitude", "w0", "b0"], ["e0"], kernel_shape=[3], pads=[1, 1], strides=[2]),
        node("Relu", ["e0"], ["r0"]),
        node("Conv", ["r0", "w1", "b1"], ["e1"], kernel_shape=[3], pads=[1, 1], strides=[2]),
        node("Relu", ["e1"], ["r1"]),
    ]
    if rows:  # frames are rows, and the LSTM's steps
        nodes += [
            node("Transpose", ["r1"], ["X"], perm=[0, 2, 1]),
            node("LSTM", ["X", "W", "R", "B", "", "h", "c"], ["Y", "hn", "cn"], hidden_size=UNITS),
            node("Squeeze", ["Y", "one"], ["y"]),
            node("Relu", ["y"], ["r2"]),
            node("Transpose", ["r2"], ["t2"], perm=[1, 2, 0]),
            node("Conv", ["t2", "hw", "hb"], ["z"], kernel_shape=[1]),
            node("Sigmoid", ["z"], ["p"]),
            node("Reshape", ["p", "last"], ["output"]),
        ]
    else:
        branch = lambda nodes, out: helper.make_graph(nodes, "g", [], [helper.make_empty_tensor_value_info(out)])  # noqa: E731
        nodes += [
            node("Shape", ["r1"], ["lengths"]),
            node("Gather", ["lengths", "last"], ["length"], axis=0),
            node("Equal", ["length", "one"], ["single"]),
            node("If", ["single"], ["features"],
                 then_branch=branch([node("Squeeze", ["r1", "last"], ["chosen"])], "chosen"),
                 else_branch=branch([node("Identity", ["r1"], ["chosen"])], "chosen")),
            node("Slice", ["state", "zero", "one", "zero"], ["h"]),
            node("Slice", ["state", "one", "two", "zero"], ["c"]),
            node("Unsqueeze", ["features", "zero"], ["X"]),
            node("LSTM", ["X", "W", "R", "B", "", "h", "c"], ["Y", "hn", "cn"], hidden_size=UNITS),
            node("Squeeze", ["hn", "zero"], ["hs"]),
            node("Unsqueeze", ["hs", "last"], ["h3"]),
            node("Relu", ["h3"], ["r2"]),
            node("Conv", ["r2", "hw", "hb"], ["z"], kernel_shape=[1]),
            node("Sigmoid", ["z"], ["p"]),
            node("Squeeze", ["p", "last"], ["p2"]),
            node("ReduceMean", ["p2"], ["p1"], axes=[1], keepdims=0),
            node("Unsqueeze", ["p1", "one"], ["output"]),
            node("Concat", ["hn", "cn"], ["stateN"], axis=0),
        ]  # fmt: skip
    own = {name for one in nodes for name in one.output} | arrays.keys()
    for one in nodes:
        for field in (one.input, one.output):
            renamed = [prefix + name if name in own else name for name in field]
            del field[:]
            field.extend(renamed)
        for entry in one.attribute:
            for inner in entry.g.node:
                inner.input[:] = [prefix + name if name in own else name for name in inner.input]
    return nodes, {prefix + name: array for name, array in arrays.items()}


def detector(folder, by_rate=False, rows=False, seed=0):
    """A file of a detector; by rate: two of them, chosen by an input; the other one has longer mirror padding."""
    rng = np.random.default_rng(seed)
    shapes = {"input": (FLOAT, ["batch", "samples"]), "state": (FLOAT, [2, "batch", UNITS])}
    if rows:
        shapes = {"input": (FLOAT, ["frames", TOTAL]), "h": (FLOAT, [1, 1, UNITS]), "c": (FLOAT, [1, 1, UNITS])}
    value = lambda name, kind: helper.make_tensor_value_info(name, *kind)  # noqa: E731
    if not by_rate:
        nodes, arrays = detector_nodes(rng, "", 4, rows)
        outputs = {
            "output": (FLOAT, None),
            **({"hn": (FLOAT, None), "cn": (FLOAT, None)} if rows else {"stateN": (FLOAT, None)}),
        }
    else:
        parts = [detector_nodes(rng, prefix, mirror) for prefix, mirror in (("a/", 4), ("b/", 6))]
        branches = [
            helper.make_graph(nodes, prefix, [], [value(f"{prefix}/{end}", (FLOAT, None)) for end in ENDS],
                              [numpy_helper.from_array(array, name) for name, array in arrays.items()])
            for prefix, (nodes, arrays) in zip("ab", parts, strict=True)
        ]  # fmt: skip
        shapes["sr"] = (INT64, [])
        arrays = {"rate": np.array(16000, np.int64)}
        nodes = [
            helper.make_node("Equal", ["sr", "rate"], ["fast"]),
            helper.make_node("If", ["fast"], ["output", "stateN"], then_branch=branches[0], else_branch=branches[1]),
        ]
        outputs = {"output": (FLOAT, None), "stateN": (FLOAT, None)}
    graph = helper.make_graph(
        nodes,
        "graph",
        [value(name, kind) for name, kind in shapes.items()],
        [value(name, kind) for name, kind in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)
    return write(folder / f"detector{seed}{rows}{by_rate}.onnx", made, check=False)


def theirs(path, x, context, **more):
    """A recording, frame by frame, in ONNX Runtime: probabilities, and the state after."""
    batch = len(x)
    state, ahead, answers = np.zeros((2, batch, UNITS), np.float32), np.zeros((batch, context), np.float32), []
    for t in range(x.shape[1]):
        taken = np.concatenate([ahead, x[:, t]], axis=1)
        y, state = run(path, {"input": taken, "state": state, **more})
        ahead = taken[:, taken.shape[1] - context :]
        answers.append(y)
    return np.stack(answers, axis=1), state


@pytest.mark.parametrize("context", [0, CONTEXT])
@pytest.mark.parametrize("rate", [None, 16000, 8000])
def test_a_recording_frame_by_frame(rate, context, tmp_path):
    path = detector(tmp_path, by_rate=rate is not None)
    given = {} if rate is None else {"constants": {"sr": rate}}
    net = cs.load(path, frames={"input": TOTAL - context}, context={"input": context}, **given)
    x = floats(np.random.default_rng(1), 3, 9, TOTAL - context, scale=1.0)
    expected, state = theirs(path, x, context, **({} if rate is None else {"sr": np.array(rate, np.int64)}))
    y, (after,) = net.run(x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=NEAR)
    np.testing.assert_allclose(np.stack(after), state, rtol=0, atol=NEAR)
    stream = net.stream(batch=3)
    np.testing.assert_array_equal(np.stack([stream.step(x[:, t]) for t in range(9)], axis=1), y)
    pool = net.pool(2)
    sessions = [pool.open(), pool.open()]
    for t in range(4):
        np.testing.assert_array_equal(pool.step(sessions, x[:2, t]), y[:2, t])
    report = cs.verify(net, path)
    assert report.ok(1e-5), str(report)
    assert len(report.differences) == 3


def test_a_stream_goes_on_from_its_state_with_the_context(tmp_path):
    net = cs.load(detector(tmp_path), frames={"input": FRAME}, context={"input": CONTEXT})
    x = floats(np.random.default_rng(2), 1, 10, FRAME)
    whole, stream = net(x), net.stream()
    np.testing.assert_array_equal(stream.run(x[:, :4]), whole[:, :4])
    other = net.stream()
    other.state = stream.state
    np.testing.assert_array_equal(other.run(x[:, 4:]), whole[:, 4:])
    np.testing.assert_array_equal(stream.fork().run(x[:, 4:]), whole[:, 4:])


def test_frames_that_are_rows_of_a_call(tmp_path):
    path = detector(tmp_path, rows=True)
    net = cs.load(path, context={"input": CONTEXT})
    assert net.shapes["input"] == (None, FRAME)
    x = floats(np.random.default_rng(3), 1, 9, FRAME)
    ahead = np.concatenate([np.zeros((1, CONTEXT), np.float32), x[0, :-1, -CONTEXT:]])
    zeros = np.zeros((1, 1, UNITS), np.float32)
    y, h, c = run(path, {"input": np.concatenate([ahead, x[0]], axis=1), "h": zeros, "c": zeros})
    got, (after,) = net.run(x)
    np.testing.assert_allclose(got[0, :, 0], y, rtol=0, atol=NEAR)
    np.testing.assert_allclose(np.stack(after), np.concatenate([h, c]), rtol=0, atol=NEAR)
    assert cs.load(path).shapes["input"] == (None, TOTAL)  # the file fixes the size of a frame
    assert cs.verify(net, path).ok(1e-5)


def test_the_network_is_saved_and_read_again(tmp_path):
    net = cs.load(detector(tmp_path), frames={"input": FRAME}, context={"input": CONTEXT})
    net.save(tmp_path / "net.safetensors")
    again = cs.load(tmp_path / "net.safetensors")
    x = floats(np.random.default_rng(4), 2, 5, FRAME)
    np.testing.assert_array_equal(again(x), net(x))
    assert again.metadata == net.metadata
    kinds = [type(node).__name__ for node in again.nodes]
    assert kinds == ["Context", "Take", "PerFrame", "Recurrent", "Activation", "Dense"]
    inside = [type(node).__name__ for node in again.nodes[2].nodes]
    assert inside == ["Reshape", "Conv1D", "Magnitude", "Conv1D", "Conv1D", "Flatten"]  # no slices, no casts


RATE = r"branches depend on 'sr' \(int64\): pass the values.*cs\.load\(path, constants=\{'sr': \.\.\.\}\)"
LENGTH = r"If .*depends on the lengths of 'input'.*cs\.load\(path, frames=\{'input': 512\}\)"
TOO_MUCH = "frame and context must add up to .*, with the frame at least as long as the context, got 12 and 20"
LOADS = {
    "no rate": ({"frames": {"input": 24}}, RATE),
    "no length": ({"constants": {"sr": 8000}}, LENGTH),
    "another": ({"constants": {"speed": 1}}, "constants: no input 'speed'; the inputs are 'input', 'state', 'sr'"),
    "a fraction": ({"constants": {"sr": 0.5}}, "input 'sr': expected a value of type int64, got float64 0.5"),
    "a list": ({"constants": {"sr": [8000]}}, r"input 'sr': expected a value \[\], got \[1\]"),
    "text": ({"constants": {"sr": "fast"}}, "input 'sr': expected a value of type int64, got <U4 'fast'"),
    "frames of another": ({"constants": {"sr": 1}, "frames": {"x": 24}}, "frames: no input 'x'; the inputs are"),
    "a frame of 0": (
        {"constants": {"sr": 1}, "frames": {"input": 0}},
        "frames of 'input' to be a whole number from 1 up, got 0",
    ),
    "context alone": ({"constants": {"sr": 1}, "context": {"input": 8}}, "depends on the lengths of 'input'"),
    "too much": ({"constants": {"sr": 1}, "frames": {"input": 12}, "context": {"input": 20}}, TOO_MUCH),
    "too short": (
        {"constants": {"sr": 1}, "frames": {"input": 4}},
        r"Take: an axis of length \d+ is too short for \w+ padding of 0, 6",
    ),
}


@pytest.mark.parametrize("case", LOADS)
def test_what_is_missing_is_named(case, tmp_path):
    options, message = LOADS[case]
    path = detector(tmp_path, by_rate=True)
    with pytest.raises(FormatError, match=message):
        cs.load(path, **options)


def test_options_depend_on_the_format(tmp_path):
    path = detector(tmp_path)
    with pytest.raises(
        TypeError, match=r"ONNX files take the options constants, weights, frames, context.*, got order"
    ):
        cs.load(path, order=["a"])
    with pytest.raises(TypeError, match="load: expected frames to be a dict by names of inputs, got int"):
        cs.load(path, frames=512)
    cs.load(path, frames={"input": FRAME}).save(tmp_path / "net.safetensors")
    with pytest.raises(TypeError, match="safetensors files take the option order, got frames"):
        cs.load(tmp_path / "net.safetensors", frames={"input": FRAME})


def test_the_command_line_takes_the_options(tmp_path, capsys, monkeypatch):
    path, out = detector(tmp_path, by_rate=True), str(tmp_path / "net.safetensors")
    options = ("--constants", "sr=8000", "--frames", f"input={FRAME}", "--context", f"input={CONTEXT}")
    net = cs.load(path, constants={"sr": 8000}, frames={"input": FRAME}, context={"input": CONTEXT})
    x = floats(np.random.default_rng(5), 1, 4, FRAME)
    np.save(tmp_path / "x.npy", x)
    assert cli.main(["info", str(path), *options]) == 0
    assert "Context" in capsys.readouterr().out
    assert cli.main(["run", str(path), str(tmp_path / "x.npy"), "--json", *options]) == 0
    (answer,) = json.loads(capsys.readouterr().out).values()
    np.testing.assert_array_equal(np.array(answer, np.float32), net(x))
    assert cli.main(["convert", str(path), out, *options]) == 0
    np.testing.assert_array_equal(cs.load(out)(x), net(x))
    lines = "\n".join(",".join(map(repr, frame)) for frame in x[0].tolist())
    given = io.TextIOWrapper(io.BytesIO(lines.encode()))
    monkeypatch.setattr("sys.stdin", given)
    answers = tmp_path / "answers.csv"
    with open(answers, "w") as file:
        monkeypatch.setattr("sys.stdout", file)
        assert cli.main(["stream", str(path), *options]) == 0
    monkeypatch.undo()
    np.testing.assert_array_equal(np.loadtxt(answers, np.float32, ndmin=2), net(x)[0])
    assert cli.main(["info", out, *options]) == 2
    assert "--constants, --frames, --context: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "no number": (["--frames", "input=12.5"], "--frames: expected a whole number for 'input', got '12.5'"),
        "no name": (["--constants", "16000"], "--constants: expected NAME=NUMBER with distinct names, got '16000'"),
        "twice": (["--context", "a=1,a=2"], "--context: expected NAME=NUMBER with distinct names, got 'a=1,a=2'"),
        "a word": (["--constants", "sr=fast"], "expected a number, true or false for 'sr', got 'fast'"),
    }.values(),
)
def test_options_on_the_command_line_that_can_t_be_read(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["info", "model.onnx", *words])
    assert message in capsys.readouterr().err


def test_command_line_values_have_their_types():
    args = cli.parser().parse_args(["info", "model.onnx", "--constants", "on=true,gain=0.5,n=3,a=b=-1"])
    assert repr(load_options(args)) == "{'constants': {'on': True, 'gain': 0.5, 'n': 3, 'a=b': -1}}"


def decomposed(folder, units=3, wide=4):
    """A decomposed single LSTM step, as exporters write nn.LSTMCell, its states as inputs and outputs."""
    rng = np.random.default_rng(5)
    arrays = {
        "cell.w_ih": floats(rng, wide, 4 * units),
        "cell.w_hh": floats(rng, units, 4 * units),
        "b": floats(rng, 4 * units),
    }
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "cell.w_ih"], ["xw"]),
        node("MatMul", ["h", "cell.w_hh"], ["hw"]),
        node("Add", ["xw", "hw"], ["s"]),
        node("Add", ["s", "b"], ["z"]),
        node("Split", ["z"], ["i", "f", "g", "o"], axis=1),
        *(node("Sigmoid", [gate], [f"s{gate}"]) for gate in "ifo"),
        node("Tanh", ["g"], ["tg"]),
        node("Mul", ["sf", "c"], ["fc"]),
        node("Mul", ["si", "tg"], ["ig"]),
        node("Add", ["fc", "ig"], ["c_after"]),
        node("Tanh", ["c_after"], ["tc"]),
        node("Mul", ["so", "tc"], ["h_after"]),
        node("Identity", ["h_after"], ["y"]),
    ]
    shapes = {"x": wide, "h": units, "c": units}
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, FLOAT, ["batch", width]) for name, width in shapes.items()],
        [helper.make_tensor_value_info(name, FLOAT, ["batch", units]) for name in ("y", "h_after", "c_after")],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return write(folder / "cell.onnx", made)


def test_a_decomposed_lstm_of_one_step(tmp_path):
    path = decomposed(tmp_path)
    net = cs.load(path)
    assert [type(node).__name__ for node in net.nodes] == ["Recurrent"]
    x = floats(np.random.default_rng(6), 2, 7, 4, scale=1.0)
    h, c = np.zeros((2, 2, 3), np.float32)
    expected = []
    for t in range(7):
        y, h, c = run(path, {"x": x[:, t], "h": h, "c": c})
        expected.append(y)
    got, (after,) = net.run(x)
    np.testing.assert_allclose(got, np.stack(expected, axis=1), rtol=0, atol=NEAR)
    np.testing.assert_allclose(after, State(h, c), rtol=0, atol=NEAR)


def lstm_with_inputs(folder, defaults):
    """An LSTM whose weights are inputs of the graph; `defaults`: the file also has default values for them."""
    rng = np.random.default_rng(7)
    arrays = {"W": floats(rng, 1, 12, 4), "R": floats(rng, 1, 12, 3), "B": floats(rng, 1, 24)}
    inputs = {"X": ["t", "b", 4], **{name: array.shape for name, array in arrays.items()}}
    graph = helper.make_graph(
        [helper.make_node("LSTM", ["X", "W", "R", "B"], ["Y"], hidden_size=3)], "graph",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("Y", FLOAT, ["t", 1, "b", 3])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items() if defaults],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    return write(folder / f"weights{defaults}.onnx", made), arrays


@pytest.mark.parametrize("option", ["weights", "constants"])
def test_weights_that_are_inputs(option, tmp_path):
    path, arrays = lstm_with_inputs(tmp_path, defaults=False)
    x = floats(np.random.default_rng(8), 5, 2, 4, scale=1.0)
    (y,) = run(path, {"X": x, **arrays})
    net = cs.load(path, **{option: arrays})
    np.testing.assert_allclose(net(x.swapaxes(0, 1)), y[:, 0].swapaxes(0, 1), rtol=0, atol=NEAR)
    defaults, _ = lstm_with_inputs(tmp_path, defaults=True)
    np.testing.assert_array_equal(cs.load(defaults)(x.swapaxes(0, 1)), net(x.swapaxes(0, 1)))
    others = {name: 2 * array for name, array in arrays.items()}
    (y,) = run(defaults, {"X": x, **others})
    np.testing.assert_allclose(
        cs.load(defaults, **{option: others})(x.swapaxes(0, 1)), y[:, 0].swapaxes(0, 1), rtol=0, atol=NEAR
    )
    with pytest.raises(
        FormatError, match=r"input 'W': pass its weights when loading: cs\.load\(path, weights=\{'W': \.\.\.\}\)"
    ):
        cs.load(path)
    with pytest.raises(FormatError, match=r"input 'W': expected a value \[1, 12, 4\], got \[12, 4\]"):
        cs.load(path, weights=arrays | {"W": arrays["W"][0]})


def graph_of(nodes, out, arrays=()):
    return helper.make_graph(nodes, "g", [], [helper.make_empty_tensor_value_info(out)], list(arrays))


def one_node(operator):
    return graph_of([helper.make_node(operator, ["x"], ["r"])], "r")


def test_branches_with_the_same_names_are_distinct(tmp_path):
    """Two nested choices whose branches use the same names for values."""
    node = helper.make_node
    number = lambda name, value: numpy_helper.from_array(np.full(3, value, np.float32), name)  # noqa: E731
    inner = node("If", ["flag"], ["t"], name="inner",
                 then_branch=graph_of([node("Mul", ["x", "k"], ["t"])], "t", [number("k", 2.0)]),
                 else_branch=graph_of([node("Identity", ["x"], ["t"])], "t"))  # fmt: skip
    nodes = [
        node("If", ["flag"], ["a"], name="first", else_branch=graph_of([node("Identity", ["x"], ["r"])], "r"),
             then_branch=graph_of([inner, node("Add", ["t", "k"], ["r"])], "r", [number("k", 3.0)])),
        node("If", ["other"], ["b"], name="second", then_branch=graph_of([node("Identity", ["a"], ["r"])], "r"),
             else_branch=graph_of([node("Mul", ["a", "k"], ["r"])], "r", [number("k", 5.0)])),
        node("Tanh", ["b"], ["y"]),
    ]  # fmt: skip
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["b", "t", 3])]
    inputs += [helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, []) for name in ("flag", "other")]
    made = helper.make_model(
        helper.make_graph(nodes, "graph", inputs, [helper.make_tensor_value_info("y", FLOAT, ["b", "t", 3])]),
        opset_imports=[helper.make_opsetid("", 16)], ir_version=8,
    )  # fmt: skip
    path = write(tmp_path / "ifs.onnx", made, check=False)
    x = floats(np.random.default_rng(9), 2, 4, 3)
    for flag in (False, True):
        for other in (False, True):
            net = cs.load(path, constants={"flag": flag, "other": other})
            expected = (2 * x + 3 if flag else x) * (1 if other else 5)
            np.testing.assert_allclose(net(x), np.tanh(expected), rtol=0, atol=NEAR)
    with pytest.raises(FormatError, match=r"branches depend on 'other' \(bool\): pass the values"):
        cs.load(path, constants={"flag": True})


def test_a_choice_by_the_numbers_is_refused(tmp_path):
    node = helper.make_node
    nodes = [
        node("ReduceMax", ["x"], ["most"], keepdims=0),
        node("Greater", ["most", "k"], ["loud"]),
        node("If", ["loud"], ["y"], name="gate", then_branch=one_node("Tanh"), else_branch=one_node("Identity")),
    ]
    made = helper.make_model(
        helper.make_graph(nodes, "graph", [helper.make_tensor_value_info("x", FLOAT, ["b", "t", 3])],
                          [helper.make_tensor_value_info("y", FLOAT, ["b", "t", 3])],
                          [numpy_helper.from_array(np.array(1.0, np.float32), "k")]),
        opset_imports=[helper.make_opsetid("", 16)], ir_version=8,
    )  # fmt: skip
    with pytest.raises(FormatError, match=r"If 'gate': its branch must be known when the file is loaded"):
        cs.load(write(tmp_path / "if.onnx", made, check=False))


@pytest.mark.parametrize(("mode", "opset"), [("reflect", 13), ("edge", 13), ("wrap", 19)])
def test_padding_made_from_the_signal(mode, opset, tmp_path):
    """Over the features, and over the steps of a sequence whose length the file fixes."""
    node = helper.make_node
    for axes, pads in ((["b", 5, 4], [0, 0, 2, 0, 0, 3]), (["b", 5, 4], [0, 1, 0, 0, 3, 0])):
        made = helper.make_model(
            helper.make_graph(
                [node("Pad", ["x", "pads"], ["padded"], mode=mode), node("Softmax", ["padded"], ["y"])],
                "graph",
                [helper.make_tensor_value_info("x", FLOAT, axes)],
                [helper.make_tensor_value_info("y", FLOAT, ["b", "t", "f"])],
                [numpy_helper.from_array(np.array(pads, np.int64), "pads")]),
            opset_imports=[helper.make_opsetid("", opset)], ir_version=9,
        )  # fmt: skip
        path = write(tmp_path / "pad.onnx", made)
        x = floats(np.random.default_rng(10), 2, 5, 4, scale=1.0)
        np.testing.assert_allclose(cs.load(path)(x), run(path, {"x": x})[0], rtol=0, atol=NEAR)


def test_pads_of_the_axes_that_are_named(tmp_path):
    node = helper.make_node
    arrays = {"pads": np.array([1, 2], np.int64), "axes": np.array([-1], np.int64)}
    for mode in ("constant", "edge"):
        made = helper.make_model(
            helper.make_graph(
                [node("Pad", ["x", "pads", "", "axes"], ["padded"], mode=mode), node("Softmax", ["padded"], ["y"])],
                "graph",
                [helper.make_tensor_value_info("x", FLOAT, ["b", "t", 4])],
                [helper.make_tensor_value_info("y", FLOAT, ["b", "t", 7])],
                [numpy_helper.from_array(array, name) for name, array in arrays.items()]),
            opset_imports=[helper.make_opsetid("", 18)], ir_version=8,
        )  # fmt: skip
        path = write(tmp_path / "pad.onnx", made)
        x = floats(np.random.default_rng(11), 2, 5, 4)
        np.testing.assert_allclose(cs.load(path)(x), run(path, {"x": x})[0], rtol=0, atol=NEAR)


def test_torch_s_own_export_of_a_step(tmp_path):
    """A module whose call is one step, with its state as input and output, as torch exports it."""
    import torch

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.front = torch.nn.Conv1d(1, 6, 8, stride=4)
            self.rnn, self.head = torch.nn.GRU(30, 5), torch.nn.Linear(5, 2)

        def forward(self, x, h):
            features = torch.relu(self.front(x.unsqueeze(1))).flatten(1)
            y, h = self.rnn(features.unsqueeze(0), h)
            return self.head(y.squeeze(0)), h

    torch.manual_seed(0)
    module, x, h = Step().eval(), torch.randn(2, 6, 24), torch.zeros(1, 2, 5)
    path = str(tmp_path / "step.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x[:, 0], h), path, dynamo=False, input_names=["x", "h"], output_names=["y", "hn"],
                          dynamic_axes={"x": {0: "b"}, "h": {1: "b"}})  # fmt: skip
    net, expected, state = adapter.load(path), [], h
    with torch.no_grad():
        for t in range(6):
            y, state = module(x[:, t], state)
            expected.append(y.numpy())
    got, (after,) = net.run(x.numpy())
    np.testing.assert_allclose(got, np.stack(expected, axis=1), rtol=0, atol=NEAR)
    np.testing.assert_allclose(after.h, state[0].numpy(), rtol=0, atol=NEAR)
    assert net.stream().step(np.zeros((1, 24))).shape == (1, 2)
