"""Recurrent operators of ONNX files as networks, compared with ONNX Runtime: all attributes, all forms of weights."""

import numpy as np
import onnx
import pairs
import pytest
from onnx import TensorProto, helper
from onnx_graphs import model, operator_model, random_operator, run, write

from cellstack.cells.base import HiddenState, State
from cellstack.cells.errors import FormatError
from cellstack.formats import onnx as adapter

TOLERANCE = 1e-5  # float32 on both sides, relative to the greatest number above 1


def assert_near(got, expected, tolerance=TOLERANCE):
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max(initial=0.0)))


def run_ours(net, feeds):
    """Y [B, T, D·H] and the states [D, B, H] of a network from one operator, for the operator's feeds."""
    state = None
    if "initial_h" in feeds:
        ways = len(net.cells)
        if "initial_c" in feeds:
            state = tuple(State(feeds["initial_h"][d], feeds["initial_c"][d]) for d in range(ways))
        else:
            state = tuple(HiddenState(feeds["initial_h"][d]) for d in range(ways))
    y, after = net.run(feeds["X"].transpose(1, 0, 2), state=state, lengths=feeds.get("sequence_lens"))
    return [y, *(np.stack(arrays) for arrays in zip(*after, strict=True))]


def as_ours(y):
    """ONNX's Y [T, D, B, H] as [B, T, D·H]."""
    steps, ways, batch, units = y.shape
    return y.transpose(2, 0, 1, 3).reshape(batch, steps, ways * units)


@pairs.seeds(75, 150)
def test_every_attribute(tmp_path, seed):
    rng = np.random.default_rng(seed)
    node, arrays, feeds, outputs = random_operator(rng)
    path = write(tmp_path / "op.onnx", operator_model(node, arrays, feeds, outputs))
    net = adapter.extract(path)["the op"]
    y, *after = run(path, feeds)
    assert_near(run_ours(net, feeds)[0], as_ours(y))
    for got, expected in zip(run_ours(net, feeds)[1:], after, strict=True):
        assert_near(got, expected)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_layout_1_is_layout_0_with_the_batch_first(tmp_path, kind, direction):
    # ONNX Runtime doesn't run layout 1: the same operator in layout 0 gives the expected result
    rng = np.random.default_rng(3)
    ways, gates, units = 1 + (direction == "bidirectional"), {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], 3
    arrays = {
        "W": rng.standard_normal((ways, gates * units, 2)),
        "R": rng.standard_normal((ways, gates * units, units)),
    }
    arrays = {name: a.astype(np.float32) for name, a in arrays.items()}
    start = rng.standard_normal((ways, 1, units)).astype(np.float32)
    nets = []
    for layout in (0, 1):
        names = ["X", "W", "R", "", "", "h0"]
        node = helper.make_node(
            kind, names, ["Y"], name="op", hidden_size=units, direction=direction, **({"layout": 1} if layout else {})
        )
        h0 = start.transpose(1, 0, 2) if layout else start
        made = model([node], {"X": (TensorProto.FLOAT, ["a", "b", 2])}, ["Y"], {**arrays, "h0": h0})
        nets.append(adapter.extract(write(tmp_path / f"{layout}.onnx", made))["op"])
    x = rng.standard_normal((2, 4, 2)).astype(np.float32)
    np.testing.assert_array_equal(nets[0](x), nets[1](x))
    assert nets[0].cells[0].spec.learn_initial_state
    expected = run(str(tmp_path / "0.onnx"), {"X": x[:1].transpose(1, 0, 2)})[0]
    assert_near(nets[0](x[:1]), as_ours(expected))


# ── weights computed in the graph ─────────────────────────────────────────────────────────────────────────────────────


def constant(name, value):
    return helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(np.asarray(value)))


def built_lstm(rng):
    """An LSTM whose weights are built from parts, with every operator that exporters use, and its inputs."""
    units, width = 3, 2
    pieces = {
        "w": rng.standard_normal((width, 4 * units)).astype(np.float32),  # as in torch: i f g o; transposed
        "r": rng.standard_normal((4 * units, units)).astype(np.float32),
        "b": rng.standard_normal(8 * units).astype(np.float16),
        "two": np.float32(2.0),
    }
    make = helper.make_node
    nodes = [
        constant("axis0", np.array([0])),
        make("Transpose", ["w"], ["wt"], perm=[1, 0]),
        make("Identity", ["wt"], ["wi"]),
    ]
    for name, source in (("W", "wi"), ("R", "r")):
        for number, gate in enumerate("ifgo"):
            nodes += [
                constant(f"{name}{gate}0", np.array([number * units])),
                constant(f"{name}{gate}1", np.array([(number + 1) * units])),
                make("Slice", [source, f"{name}{gate}0", f"{name}{gate}1", "axis0"], [f"{name}{gate}"]),
            ]
        nodes += [
            make("Concat", [f"{name}i", f"{name}o", f"{name}f", f"{name}g"], [f"{name}c"], axis=0),
            make("Unsqueeze", [f"{name}c", "axis0"], [name]),
        ]
    nodes += [
        make("Cast", ["b"], ["bc"], to=TensorProto.FLOAT),
        constant("half", np.array([4 * units, 4 * units])),
        make("Split", ["bc", "half"], ["b0", "b1"], axis=0),
        make("Mul", ["b0", "two"], ["b2"]),
        make("Concat", ["b2", "b1"], ["bb"], axis=0),
        make("Shape", ["bb"], ["shape"]),
        constant("one", np.array([1])),
        make("Concat", ["one", "shape"], ["target"], axis=0),
        make("Reshape", ["bb", "target"], ["B"]),
        make("Shape", ["X"], ["xs"]),
        constant("index", np.array(1)),
        make("Gather", ["xs", "index"], ["batch"]),
        make("Unsqueeze", ["batch", "axis0"], ["batch1"]),
        constant("units", np.array([units])),
        make("Concat", ["one", "batch1", "units"], ["state"], axis=0),
        make("ConstantOfShape", ["state"], ["zeros"], value=onnx.numpy_helper.from_array(np.zeros(1, np.float32))),
        make("LSTM", ["X", "W", "R", "B", "", "zeros", "zeros"], ["Y", "Y_h", "Y_c"], name="lstm", hidden_size=units),
    ]
    return nodes, pieces, width


def test_weights_that_the_graph_builds(tmp_path):
    rng = np.random.default_rng(0)
    nodes, pieces, width = built_lstm(rng)
    made = model(nodes, {"X": (TensorProto.FLOAT, ["T", "B", width])}, ["Y", "Y_h", "Y_c"], pieces)
    path = write(tmp_path / "built.onnx", made)
    x = rng.standard_normal((5, 2, width)).astype(np.float32)
    net = adapter.extract(path)["lstm"]
    assert not net.cells[0].spec.learn_initial_state
    y, h, c = run(path, {"X": x})
    got = run_ours(net, {"X": x})
    for a, b in zip(got, (as_ours(y), h, c), strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("by", ["initializer", "Expand"])
def test_a_constant_start_is_a_learned_one(tmp_path, by):
    rng = np.random.default_rng(1)
    node, arrays, feeds, outputs = random_operator(np.random.default_rng(8), "LSTM", lengths=False)
    ways, units = arrays["R"].shape[0], arrays["R"].shape[2]
    starts = {name: rng.standard_normal((ways, 1, units)).astype(np.float32) for name in ("initial_h", "initial_c")}
    feeds = {"X": feeds["X"][:, :1]}
    del node.input[5:]
    nodes = [node]
    if by == "Expand":
        node.input.extend(["h", "c"])
        shape = [
            helper.make_node("Shape", ["X"], ["batch"], start=1, end=2),
            constant("ways", np.array([ways])),
            constant("units", np.array([units])),
            helper.make_node("Concat", ["ways", "batch", "units"], ["shape"], axis=0),
        ]
        spread = [helper.make_node("Expand", [f"initial_{n}", "shape"], [n]) for n in "hc"]
        nodes = [*shape, *spread, node]
    else:
        node.input.extend(["initial_h", "initial_c"])
    if "P" in arrays:
        node.input.append("P")
    made = model(nodes, {"X": (TensorProto.FLOAT, ["T", "B", arrays["W"].shape[2]])}, outputs, {**arrays, **starts})
    path = write(tmp_path / "op.onnx", made)
    net = adapter.extract(path)["the op"]
    assert net.cells[0].spec.learn_initial_state
    y, *after = run(path, feeds)
    for a, b in zip(run_ours(net, feeds), (as_ours(y), *after), strict=True):
        assert_near(a, b)


def test_a_start_whose_rows_differ_is_refused(tmp_path):
    node, arrays, feeds, outputs = random_operator(np.random.default_rng(2), "RNN", lengths=False)
    ways, units = arrays["R"].shape[0], arrays["R"].shape[2]
    arrays["initial_h"] = np.random.default_rng(0).standard_normal((ways, 2, units)).astype(np.float32)
    del node.input[5:]
    node.input.append("initial_h")
    path = write(tmp_path / "op.onnx", operator_model(node, arrays, {"X": feeds["X"]}, outputs))
    with pytest.raises(FormatError, match=r"node 'the op': the rows of initial_h must be equal"):
        adapter.extract(path)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("by_column", [False, True])
def test_dynamic_quantize_lstm(tmp_path, by_column, signed):
    rng = np.random.default_rng(4)
    ways, units, width, steps, batch = 2, 4, 3, 4, 2
    dtype, zero = (np.int8, 0) if signed else (np.uint8, 128)
    # 7 bits: without VNNI, ONNX Runtime adds pairs of products in 16 bits, which larger weights overflow
    whole = lambda rows: (zero + rng.integers(-64, 64, (ways, rows, 4 * units))).astype(dtype)  # noqa: E731
    shape = (ways, 4 * units) if by_column else (ways,)
    arrays = {
        "Wq": whole(width),
        "Rq": whole(units),
        "B": rng.standard_normal((ways, 8 * units)).astype(np.float32),
        "Ws": rng.uniform(0.003, 0.006, shape).astype(np.float32),
        "Wz": np.full(shape, zero, dtype),
        "Rs": rng.uniform(0.003, 0.006, shape).astype(np.float32),
        "Rz": np.full(shape, zero, dtype),
    }
    names = ["X", "Wq", "Rq", "B", "", "", "", "", "Ws", "Wz", "Rs", "Rz"]
    node = helper.make_node(
        "DynamicQuantizeLSTM",
        names,
        ["Y", "Y_h", "Y_c"],
        name="quantised",
        domain="com.microsoft",
        hidden_size=units,
        direction="bidirectional",
    )
    inputs = {"X": (TensorProto.FLOAT, ["T", "B", width])}
    made = model([node], inputs, ["Y", "Y_h", "Y_c"], arrays, domains=[("com.microsoft", 1)])
    path = write(tmp_path / "q.onnx", made, check=False)
    net = adapter.extract(path)["quantised"]
    x = rng.standard_normal((steps, batch, width)).astype(np.float32)
    y, h, c = run(path, {"X": x})
    got = run_ours(net, {"X": x})
    for a, b in zip(got, (as_ours(y), h, c), strict=True):
        assert_near(a, b, 0.03)  # the operator rounds x and h to 8 bits at every step, cellstack doesn't


def test_operators_within_operators(tmp_path):
    rng = np.random.default_rng(5)
    node, arrays, feeds, _ = random_operator(rng, "GRU", lengths=False)
    del node.input[4:]
    del node.output[1:]
    node.name = "inside"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list("tdbh")) for name in "YZ"]
    inner = helper.make_graph([node], "then", [], ends[:1])
    other = helper.make_node("GRU", list(node.input), ["Z"], name="inside")
    other.attribute.extend(node.attribute)
    outer = helper.make_graph(
        [other], "else", [], [helper.make_tensor_value_info("Z", TensorProto.FLOAT, list("tdbh"))]
    )
    branch = helper.make_node("If", ["which"], ["out"], name="if", then_branch=inner, else_branch=outer)
    inputs = {"X": (TensorProto.FLOAT, ["T", "B", arrays["W"].shape[2]]), "which": (TensorProto.BOOL, [])}
    path = write(tmp_path / "if.onnx", model([branch], inputs, {"out": 4}, arrays))
    parts = adapter.extract(path)
    assert sorted(parts) == ["inside", "inside.2"]
    for which, name in ((True, "inside"), (False, "inside.2")):
        (y,) = run(path, {"X": feeds["X"], "which": np.array(which)})
        assert_near(parts[name](feeds["X"].transpose(1, 0, 2)), as_ours(y))


def decomposed(rng, order, products="MatMul", steps=1):
    """A decomposed LSTM, its gates in some order; the model, its inputs and its outputs."""
    make, units, width = helper.make_node, 3, 3
    floats = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    arrays = {"cell.w": floats(width, 4 * units), "cell.r": floats(units, 4 * units), "b": floats(4 * units)}
    if products == "Gemm":
        arrays |= {"cell.w": arrays["cell.w"].T.copy(), "cell.r": arrays["cell.r"].T.copy(), "b2": floats(4 * units)}
    index = [constant("zero", np.array(0)), constant("one", np.array(1))]
    nodes = [*index, make("Gather", ["state", "zero"], ["h0"]), make("Gather", ["state", "one"], ["c0"])]
    for t in range(steps):
        if products == "Gemm":
            nodes += [
                make("Gemm", [f"h{t}", "cell.r", "b2"], [f"a{t}"], transB=1),
                make("Gemm", [f"x{t}", "cell.w", "b"], [f"q{t}"], transB=1),
                make("Add", [f"a{t}", f"q{t}"], [f"z{t}"]),
            ]
        else:
            nodes += [
                make("MatMul", [f"h{t}", "cell.r"], [f"a{t}"]),
                make("MatMul", [f"x{t}", "cell.w"], [f"q{t}"]),
                make("Add", [f"a{t}", f"q{t}"], [f"s{t}"]),
                make("Add", ["b", f"s{t}"], [f"z{t}"]),
            ]
        nodes.append(make("Split", [f"z{t}"], [f"{letter}z{t}" for letter in order], name=f"split {t}", axis=1))
        kinds = {"i": "Sigmoid", "f": "HardSigmoid", "g": "Softsign", "o": "Sigmoid"}
        nodes += [make(kinds[letter], [f"{letter}z{t}"], [f"{letter}{t}"]) for letter in "gofi"]
        nodes += [
            make("Mul", [f"c{t}", f"f{t}"], [f"cf{t}"]),
            make("Mul", [f"g{t}", f"i{t}"], [f"gi{t}"]),
            make("Add", [f"gi{t}", f"cf{t}"], [f"c{t + 1}"]),
            make("Tanh", [f"c{t + 1}"], [f"ct{t}"]),
            make("Mul", [f"ct{t}", f"o{t}"], [f"h{t + 1}"]),
        ]
    inputs = {f"x{t}": (TensorProto.FLOAT, ["B", width]) for t in range(steps)}
    inputs["state"] = (TensorProto.FLOAT, [2, "B", units])
    return model(nodes, inputs, {f"h{steps}": 2, f"c{steps}": 2}, arrays)


@pytest.mark.parametrize("products", ["MatMul", "Gemm"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("order", ["ifgo", "ofig", "gifo", "fogi"])
def test_a_decomposed_lstm(tmp_path, order, steps, products):
    rng = np.random.default_rng(6)
    path = write(tmp_path / "out.onnx", decomposed(rng, order, products, steps))
    parts = adapter.extract(path)
    assert list(parts) == ["cell"]
    x = rng.standard_normal((2, steps, 3)).astype(np.float32)
    state = rng.standard_normal((2, 2, 3)).astype(np.float32)
    h, c = run(path, {"state": state} | {f"x{t}": x[:, t] for t in range(steps)})
    _, (after,) = parts["cell"].run(x, State(state[0], state[1]))
    assert_near(after.h, h)
    assert_near(after.c, c)


# ── unsupported operators ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W": np.zeros((1, 12, 2, 1), np.float32)}, r"expected W of shape \[1, 12, 0\], found \[1, 12, 2, 1\]"),
        ({"W": np.zeros((1, 11, 2), np.float32)}, r"expected W of shape \[1, 12, 2\], found \[1, 11, 2\]"),
        ({"R": np.zeros((1, 12, 4), np.float32)}, r"expected R \[1, 4·H, H\] with H=3, found \(1, 12, 4\)"),
        ({"B": np.zeros((1, 12), np.float32)}, r"expected B of shape \[1, 24\], found \[1, 12\]"),
        ({"B": np.zeros((1, 24), np.int32)}, r"expected B as floats, found int32"),
        ({"P": np.zeros((1, 12), np.float32)}, r"expected P of shape \[1, 9\], found \[1, 12\]"),
        ({"W": None}, r"expected W to be constant, found 'W', from the input 'W'"),
        ({"direction": "sideways"}, r"expected direction to be one of forward, reverse, bidirectional"),
        ({"activations": ["Tanh"]}, r"expected 3 activations, found"),
        ({"activations": ["Tanh", "Tanh", "Selu"]}, r"expected activations of .*found 'Selu'"),
        ({"activations": ["Tanh", "Tanh", "Affine"]}, r"Affine needs alpha and beta"),
        ({"activations": ["Tanh", "Tanh", "Elu"], "activation_alpha": [-1.0]}, r"expected elu with alpha >= 0"),
        ({"clip": 0.0}, r"CellSpec: expected clip above 0"),
        ({"clip": -1.0}, r"CellSpec: expected clip above 0"),
        ({"hidden_size": 0}, r"expected R .* with H=0, found"),
        ({"thing": 1}, r"unknown attribute 'thing'"),
    ],
)
def test_refused_by_name(tmp_path, change, message):
    arrays = {"W": np.ones((1, 12, 2), np.float32), "R": np.ones((1, 12, 3), np.float32)}
    attributes = {"hidden_size": 3}
    inputs = {"X": (TensorProto.FLOAT, ["T", "B", 2])}
    for key, value in change.items():
        (arrays if key in ("W", "R", "B", "P") else attributes)[key] = value
    for name in [name for name, value in arrays.items() if value is None]:
        del arrays[name]
        inputs[name] = (TensorProto.FLOAT, None)
    names = ["X", "W", "R", "B" if "B" in arrays else "", "", "", "", "P" if "P" in arrays else ""]
    node = helper.make_node("LSTM", names, ["Y"], name="bad", **attributes)
    path = write(tmp_path / "bad.onnx", model([node], inputs, ["Y"], arrays), check=False)
    with pytest.raises(FormatError, match=r"bad\.onnx: .*node 'bad': " + message):
        adapter.extract(path)


def test_all_that_cannot_be_extracted_is_named(tmp_path):
    nodes = [helper.make_node("GRU", ["X", "W", "R"], [f"Y{n}"], name=f"gru {n}", hidden_size=3) for n in range(2)]
    inputs = dict.fromkeys("XWR", (TensorProto.FLOAT, None))
    path = write(tmp_path / "two.onnx", model(nodes, inputs, ["Y0", "Y1"], {}), check=False)
    with pytest.raises(FormatError, match=r"gru 0.*gru 1"):
        adapter.extract(path)


def test_onnx_files_are_recognised(tmp_path):
    node, arrays, feeds, outputs = random_operator(np.random.default_rng(0))
    path = write(tmp_path / "op.onnx", operator_model(node, arrays, feeds, outputs))
    with open(path, "rb") as file:
        assert adapter.recognises(file.read(64))
    assert not adapter.recognises(b"PK\x03\x04" + bytes(60))
    assert not adapter.recognises(b"\x08\x08")
