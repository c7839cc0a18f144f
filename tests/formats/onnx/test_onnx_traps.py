"""ONNX files that are easily misread, compared with ONNX Runtime or refused."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_graphs import TOLERANCE, compare, export, model, run, write
from torch import nn

from cellstack import CellSpec
from cellstack.cells.errors import FormatError, ShapeError
from cellstack.formats import onnx as adapter
from cellstack.network import Network
from cellstack.nodes import Cell, Recurrent

FLOAT = TensorProto.FLOAT
LARGEST = float(np.finfo(np.float32).max)


def floats(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (-65504.0, 65504.0),
        (-LARGEST, LARGEST),
        (-LARGEST, 0.5),
        (0.0, LARGEST),
        (0.0, 6.0),
        (None, 2.0),
        (-1.5, None),
        (-1e4, 1.0),
        (-0.3, 0.7),
        (0.25, 0.25),
    ],
)
@pytest.mark.parametrize("opset", [7, 13])
def test_clip_is_exact(tmp_path, low, high, opset):
    given = {name: np.float32(bound) for name, bound in (("low", low), ("high", high)) if bound is not None}
    if opset == 7:
        bounds = {name: bound for name, bound in (("min", low), ("max", high)) if bound is not None}
        node = helper.make_node("Clip", ["X"], ["Y"], **bounds)
        given = {}
    else:
        node = helper.make_node("Clip", ["X", *(name if name in given else "" for name in ("low", "high"))], ["Y"])
    path = write(tmp_path / "net.onnx", model([node], {"X": (FLOAT, ["B", "T", 3])}, {"Y": 3}, given, opset))
    x = 3 * floats(2, 5, 3)
    x[0, 0], x[1, 2, 1] = (3e38, -3e38, 0.0), -70000.0
    if None not in (low, high) and LARGEST not in (-low, high):  # else ONNX Runtime's bounds are the largest numbers
        x[0, 0, :2] = np.inf, -np.inf
    y, _ = adapter.load(path).run(x)
    np.testing.assert_array_equal(y, run(path, {"X": x})[0])


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.5), (np.inf, np.inf), (np.nan, 1.0)])
def test_clip_without_bounds(tmp_path, low, high):
    arrays = {"low": np.float32(low), "high": np.float32(high)}
    node = helper.make_node("Clip", ["X", "low", "high"], ["Y"], name="clip")
    path = write(tmp_path / "net.onnx", model([node], {"X": (FLOAT, ["B", "T", 3])}, {"Y": 3}, arrays))
    with pytest.raises(FormatError, match="Clip 'clip': expected"):
        adapter.load(path)


class Candidate(nn.Module):
    """A GRU's step with r on the product of h, as it should be, or on that of x."""

    def __init__(self, on_x):
        super().__init__()
        self.on_x = on_x
        self.x, self.h = nn.Linear(3, 12), nn.Linear(4, 12)

    def forward(self, x):
        h = x.new_zeros(x.shape[0], 4)
        for t in range(3):
            of_x, of_h = self.x(x[:, t]).split(4, 1), self.h(h).split(4, 1)
            z, r = torch.sigmoid(of_x[0] + of_h[0]), torch.sigmoid(of_x[1] + of_h[1])
            n = torch.tanh(r * of_x[2] + of_h[2] if self.on_x else of_x[2] + r * of_h[2])
            h = (1 - z) * n + z * h
        return h


@pytest.mark.parametrize("on_x", [False, True])
def test_the_place_of_a_gru_s_reset_gate(tmp_path, on_x):
    torch.manual_seed(0)
    path, feeds = export(tmp_path / "net.onnx", Candidate(on_x), (torch.randn(2, 3, 3),))
    if on_x:
        with pytest.raises(FormatError, match="the graph can't be read as a Network, found: "):
            adapter.load(path)
        assert adapter.extract(path) == {}
    else:
        assert [cell.spec.kind for cell in compare(path, feeds).cells] == ["gru"]


def test_pads_that_hold_for_one_length_alone(tmp_path):
    """Windows that are all complete at nine steps aren't at ten; the file doesn't accept ten either."""
    net = nn.Sequential(nn.Conv1d(3, 4, 1), nn.AvgPool1d(3, 2, 1, ceil_mode=True), nn.Conv1d(4, 2, 1))
    path, feeds = export(tmp_path / "net.onnx", net, (torch.randn(2, 3, 9),), fixed=("in0",))
    net = compare(path, feeds)
    with pytest.raises(ShapeError, match="9"):
        net.run(np.zeros((2, 10, 3), np.float32))


@pytest.mark.parametrize("how", [{"padding": 1}, {"padding": 1, "ceil_mode": True}, {"ceil_mode": True}])
@pytest.mark.parametrize("steps", [9, 10])
def test_pads_of_any_length_from_a_file_of_one(tmp_path, how, steps):
    """A file written for one length is read correctly for all lengths."""
    torch.manual_seed(1)
    pool = nn.Sequential(nn.Conv1d(3, 4, 1), nn.MaxPool1d(3, 2, **how), nn.Conv1d(4, 2, 1))
    path, _ = export(tmp_path / "one.onnx", pool, (torch.randn(2, 3, 9),), fixed=("in0",))
    x = torch.randn(2, 3, steps)
    y, _ = adapter.load(path).run(x.numpy().swapaxes(1, 2))
    np.testing.assert_allclose(y, pool(x).detach().numpy().swapaxes(1, 2), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("fixed", [(), ("in0",)])
def test_windows_at_every_step_have_one_length_s_pads_at_all(tmp_path, fixed):
    torch.manual_seed(3)
    pool = nn.Sequential(nn.Conv1d(3, 4, 1), nn.MaxPool1d(3, 1, 1), nn.Conv1d(4, 2, 1))
    path, feeds = export(tmp_path / "net.onnx", pool, (torch.randn(2, 3, 9),), fixed=fixed)
    net, x = compare(path, feeds), torch.randn(2, 3, 10)
    y, _ = net.run(x.numpy().swapaxes(1, 2))
    np.testing.assert_allclose(y, pool(x).detach().numpy().swapaxes(1, 2), rtol=0, atol=TOLERANCE)


def lstm_steps(steps, sizes):
    """A decomposed LSTM of 2 units, its gates from a Split whose sizes are a constant, or an input."""
    make, nodes, h, c = helper.make_node, [], "zero", "zero"
    arrays = {"W": floats(3, 8), "R": floats(2, 8, seed=1), "zero": np.zeros((1, 2), np.float32)}
    arrays |= {f"at{t}": np.array(t) for t in range(steps)} | ({} if sizes is None else {"sizes": np.array(sizes)})
    for t in range(steps):
        x, z, i, o, f, g = (f"{name}{t}" for name in ("x", "z", "i", "o", "f", "g"))
        nodes += [
            make("Gather", ["X", f"at{t}"], [x], axis=0),
            make("MatMul", [x, "W"], [f"p{t}"]),
            make("MatMul", [h, "R"], [f"q{t}"]),
            make("Add", [f"p{t}", f"q{t}"], [z]),
            make("Split", [z, "sizes"], [f"{name}z" for name in (i, o, f, g)], axis=-1),
            *(make("Tanh" if name == g else "Sigmoid", [f"{name}z"], [name]) for name in (i, o, f, g)),
            make("Mul", [f, c], [f"kept{t}"]),
            make("Mul", [i, g], [f"new{t}"]),
            make("Add", [f"kept{t}", f"new{t}"], [f"c{t}"]),
            make("Tanh", [f"c{t}"], [f"wide{t}"]),
            make("Mul", [o, f"wide{t}"], [f"h{t}"]),
        ]
        h, c = f"h{t}", f"c{t}"
    inputs = {"X": (FLOAT, [steps, "B", 3])} | ({"sizes": (TensorProto.INT64, [4])} if sizes is None else {})
    return model(nodes, inputs, {h: 2}, arrays)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("sizes", [None, [2, 2, 2, 2], [1, 3, 2, 2]])
def test_gates_cut_by_sizes_that_are_not_known(tmp_path, steps, sizes):
    path = write(tmp_path / "net.onnx", lstm_steps(steps, sizes))
    found = adapter.extract(path)
    assert len(found) == (sizes == [2, 2, 2, 2])


def scan_of_a_cell():
    spec = CellSpec(2, 3, layer_norm=True)
    cell = Cell(spec, *(floats(*shape, seed=n) for n, shape in enumerate(spec.shapes.values())))
    return Network([Recurrent((cell,))])


@pytest.mark.parametrize("change", ["input", "output", "opset"])
def test_a_scan_of_another_form(tmp_path, change):
    path = str(tmp_path / "net.onnx")
    adapter.save(scan_of_a_cell(), path)
    adapter.load(path)
    proto = onnx.load(path)
    scan = next(node for node in proto.graph.node if node.op_type == "Scan")
    if change == "input":
        scan.input.insert(2, scan.input[0])
    elif change == "output":
        scan.output.append("more")
    else:
        proto.opset_import[0].version = 8
    with pytest.raises(
        FormatError, match=r"Scan node 'layer_0': (.*a step of a cell|expected a Scan over one sequence)"
    ):
        adapter.load(write(tmp_path / "other.onnx", proto, check=False))


class Unbound(nn.Module):
    """A loop over the results of unbind."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(3, 4)

    def forward(self, x):
        h, outputs = x.new_zeros(x.shape[0], 4), []
        for step in x.unbind(1):
            h = self.cell(step, h)
            outputs.append(h)
        return torch.stack(outputs, 1)


@pytest.mark.long
def test_long_loops_over_what_a_split_gives(tmp_path):
    torch.manual_seed(2)
    path, feeds = export(tmp_path / "net.onnx", Unbound(), (torch.randn(2, 40, 3),), fixed=("in0",))
    assert any(node.op_type == "Split" and len(node.output) == 40 for node in onnx.load(path).graph.node)
    net = compare(path, feeds)
    assert [cell.spec.kind for cell in net.cells] == ["gru"]
    assert "unused" not in net.metadata["onnx"]


def test_tensors_that_a_loop_was_read_from_are_used(tmp_path):
    proto = onnx.ModelProto()
    proto.CopyFrom(lstm_steps(3, [2, 2, 2, 2]))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "left over"))
    net = adapter.load(write(tmp_path / "net.onnx", proto))
    assert len(net.cells) == 1
    assert net.metadata["onnx"]["unused"] == ["left over"]


def test_the_message_on_a_pool_does_not_mention_axes(tmp_path):
    node = helper.make_node("MaxPool", ["X"], ["Y"], name="pool", kernel_shape=[3], strides=[2], dilations=[2])
    path = write(tmp_path / "net.onnx", model([node], {"X": (FLOAT, ["B", 4, "T"])}, {"Y": 3}, {}))
    with pytest.raises(FormatError, match=r"MaxPool 'pool': only windows over time are supported"):
        adapter.load(path)


def test_products_that_overflow_in_one(tmp_path):
    nodes = [
        helper.make_node("Mul", ["X", "k"], ["once"]),
        helper.make_node("Mul", ["once", "k"], ["twice"]),
        helper.make_node("Tanh", ["twice"], ["Y"]),
    ]
    arrays = {"k": np.array([1e30, 1.0, 1.0], np.float32)}
    path = write(tmp_path / "net.onnx", model(nodes, {"X": (FLOAT, ["B", "T", 3])}, {"Y": 3}, arrays))
    x = np.zeros((1, 2, 3), np.float32)
    np.testing.assert_array_equal(adapter.load(path)(x), run(path, {"X": x})[0])


@pytest.mark.parametrize(
    ("shape", "axis"), [(["B", "T", 4], 2), (["B", 5, 4], 2), (["B", "T", 4], 1), (["B", 4, "T"], 2)]
)
def test_pads_of_time_or_of_features(tmp_path, shape, axis):
    """The last axis is the features, unless it is the only one of open length."""
    pads = [0] * 6
    pads[axis], pads[axis + 3] = 2, 1
    node = helper.make_node("Pad", ["X", "pads"], ["Y"])
    path = write(tmp_path / "net.onnx", model([node], {"X": (FLOAT, shape)}, {"Y": 3}, {"pads": np.array(pads)}))
    net, x = adapter.load(path), floats(2, *(n if isinstance(n, int) else 5 for n in shape[1:]))
    order = (0, 2, 1) if shape[1:] == [4, "T"] else (0, 1, 2)
    np.testing.assert_array_equal(net(x.transpose(order)), run(path, {"X": x})[0].transpose(order))


def test_a_mean_less_an_array(tmp_path):
    nodes = [
        helper.make_node("ReduceMean", ["X"], ["mean"], axes=[-1]),
        helper.make_node("Sub", ["X", "mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "gain"], ["Y"], name="odd"),
    ]
    path = write(tmp_path / "net.onnx", model(nodes, {"X": (FLOAT, ["B", "T", 3])}, {"Y": 3}, {"gain": floats(3)}))
    with pytest.raises(FormatError, match="Mul 'odd': the operator isn't supported"):
        adapter.load(path)
