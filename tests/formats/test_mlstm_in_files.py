"""An mLSTM's memory in ONNX and in C: compared with the network, by the files' own runtimes."""

import numpy as np
import pytest
from networks import make_cell
from test_export_c import build, compared_with_the_stream
from tools import need

import cellstack as cs
from cellstack import Network
from cellstack.formats import onnx
from cellstack.nodes import MLSTM, Dense, Recurrent


def network(dtype="float32", gate=True, scale=1.0):
    """Return a projection to a memory with keys and values of different widths, an LSTM and a head."""
    rng = np.random.default_rng(0)
    memory = MLSTM(2, 4, 3, epsilon=0.01, output_gate=gate)
    array = lambda *shape: (scale * rng.normal(size=shape)).astype(dtype)  # noqa: E731
    cell = make_cell(rng, memory.units, 4, dtype=dtype)
    head = array(4, 2) / scale
    return Network(
        [Dense(array(5, memory.input_size), array(memory.input_size)), memory, Recurrent((cell,)), Dense(head)],
        ["in", "memory", "lstm", "out"],
    )


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("suffix", ["onnx", "c"])
def test_the_runtime_computes_the_same(suffix, dtype, gate, tmp_path):
    """Outputs and all states, also of the cells next to the memory."""
    net, path = network(dtype, gate), tmp_path / f"net.{suffix}"
    if suffix == "c":
        need("cc")
        net.export_c(tmp_path, "net")
    else:
        net.save(path)
    report = cs.verify(net, path)
    assert {one.name for one in report.differences} == {
        "out",
        *(f"cell {n}" for n in ("0 h", "0 c", "1 C", "1 n", "1 m")),
    }
    assert report.ok(1e-5 if dtype == "float32" else 1e-13), report


def test_gates_that_would_overflow(tmp_path):
    """Pre-activations of hundreds, in both formats."""
    need("cc")
    net = network(scale=100.0)
    net.save(tmp_path / "net.onnx")
    net.export_c(tmp_path, "net")
    for suffix in ("onnx", "c"):
        assert cs.verify(net, tmp_path / f"net.{suffix}").ok(1e-3)


def test_a_session_continues_and_skips_steps(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    net, x = network(), np.random.default_rng(1).normal(size=(2, 12, 5)).astype("f4")
    onnx.save(net, tmp_path / "net.onnx", lengths=True, states=True)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(tmp_path / "net.onnx", options)
    after = [out.name for out in session.get_outputs()]
    first = dict(zip(after, session.run(None, {"x": x[:, :5]}), strict=True))
    state = {name.removesuffix(".after"): array for name, array in first.items() if name != "out"}
    second = session.run(["out"], {"x": x[:, 5:]} | state)[0]
    y, _ = net.run(x)
    assert np.abs(np.concatenate([first["out"], second], axis=1) - y).max() < 1e-5
    y, expected = net.run(x, lengths=[4, 12])
    found = dict(zip(after, session.run(None, {"x": x, "lengths": np.array([4, 12])}), strict=True))
    assert np.abs(found["out"] - y).max() < 1e-5
    for name, array in expected[1]._asdict().items():
        assert np.abs(found[f"memory.{name}.after"] - array).max() < 1e-5


def test_the_c_code_is_strict_and_is_the_stream(tmp_path):
    """No warning with the strictest flags; scratch needn't be kept; a reset empties the memory."""
    net = network()
    inside = build(tmp_path, {"net": net})["net"]
    compared_with_the_stream(net, inside)
    assert [inside.members[f"memory_{name}"][0] for name in "Cnm"] == [24, 8, 2]
    inside.call("reset")
    assert not any(inside.member(f"memory_{name}").any() for name in "Cnm")


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_onnx_is_read_back(dtype, gate, tmp_path):
    """The same nodes with the same bits; states are compared too, and the file is written again as it was."""
    net, path, again = network(dtype, gate), tmp_path / "net.onnx", tmp_path / "again.onnx"
    net.save(path)
    loaded = cs.load(path)
    (memory,) = (node for node in loaded.nodes if isinstance(node, MLSTM))
    assert memory.values() == net.nodes[1].values()
    x = np.random.default_rng(1).normal(size=(2, 12, 5)).astype(dtype)
    np.testing.assert_array_equal(loaded(x), net(x))
    report = cs.verify(loaded, path)
    assert {one.name for one in report.differences} >= {f"cell 1 {part}" for part in "Cnm"}
    assert report.ok(1e-5 if dtype == "float32" else 1e-13), report
    loaded.save(again)
    assert len(again.read_bytes()) == pytest.approx(len(path.read_bytes()), rel=0.1)


def edited(path, edit):
    """Edit the Scan of a file and its body."""
    onnx_package = pytest.importorskip("onnx")
    model = onnx_package.load(path)
    (scan,) = (node for node in model.graph.node if node.op_type == "Scan")
    (body,) = (one.g for one in scan.attribute if one.name == "body")
    edit(model.graph, scan, body)
    onnx_package.save(model, path)


def test_the_scan_is_recognised_by_what_it_computes(tmp_path):
    """Other names and orders are the same memory; another operator, constant or initial state isn't."""
    path, net = tmp_path / "net.onnx", network()
    x = np.random.default_rng(1).normal(size=(2, 12, 5)).astype("f4")

    def swap(graph, scan, body):
        for node in body.node:
            if node.op_type in ("Add", "Mul"):
                node.input[:] = node.input[::-1]

    net.save(path)
    edited(path, swap)
    np.testing.assert_array_equal(cs.load(path)(x), net(x))

    def replace(before, after):
        def edit(graph, scan, body):
            (*_, node) = (node for node in body.node if node.op_type == before)
            node.op_type = after

        return edit

    def scale(graph, scan, body):
        (number,) = (one for one in body.initializer if one.raw_data == np.float32(0.5).tobytes())
        number.raw_data = np.float32(0.25).tobytes()

    def start(graph, scan, body):
        (array,) = (one for one in graph.initializer if one.name == "memory.n")
        array.raw_data = np.ones(8, "f4").tobytes()

    def without_directions(graph, scan, body):
        for one in [one for one in scan.attribute if one.name.endswith("directions")]:
            scan.attribute.remove(one)

    def reverse(graph, scan, body):
        for one in scan.attribute:
            if one.name.endswith("directions"):
                one.ints[:] = [1]

    net.save(path)
    edited(path, without_directions)
    np.testing.assert_array_equal(cs.load(path)(x), net(x))
    for edit in (replace("Max", "Min"), replace("Add", "Sub"), replace("Neg", "Abs"), scale, reverse):
        net.save(path)
        edited(path, edit)
        with pytest.raises(cs.FormatError, match="Scan node 'memory': the body isn't a step of a cell"):
            onnx.load(path)

    def bodiless(graph, scan, body):
        (attribute,) = (one for one in scan.attribute if one.name == "body")
        attribute.ClearField("g")
        attribute.type, attribute.i = 2, 1

    net.save(path)
    edited(path, bodiless)
    with pytest.raises(cs.FormatError, match="expected a graph as its body"):
        onnx.load(path)
    net.save(path)
    edited(path, start)
    with pytest.raises(cs.FormatError, match="expected the initial n to be zeros"):
        onnx.load(path)
