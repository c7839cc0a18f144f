"""`verify`: right files pass, wrong ones fail, and files that can't be run are reported."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace

import numpy as np
import onnx
import pairs
import pytest
import torch
from networks import make_cell, make_network
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from tools import need

from cellstack import CellSpec, FormatError, Network, ShapeError, load
from cellstack.formats import onnx as onnx_adapter
from cellstack.formats.c import export
from cellstack.formats.verify import Difference, Report, Rounding, _difference, verify
from cellstack.nodes import Activation, Bidirectional, Cell, Dense, Embedding, GlobalPool, Merge, Recurrent, Scale


def make_net(dtype="float32", **settings):
    rng = np.random.default_rng(0)
    return Network([Recurrent((make_cell(rng, 3, 4, dtype, **settings), make_cell(rng, 4, 5, dtype)))])


def other_than(net):
    """The same network with one number changed."""
    (stack,) = net.nodes
    kernel = np.array(stack.cells[0].kernel)
    kernel[0, 0] += 0.1
    cell = Cell(stack.cells[0].spec, **{**stack.cells[0].arrays, "kernel": kernel})
    return Network([Recurrent((cell, *stack.cells[1:]))])


# ── our own format ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(8))
def test_a_saved_network_is_equal_bit_for_bit(tmp_path, seed):
    net = make_network(seed)
    net.save(tmp_path / "net.safetensors")
    report = verify(net, tmp_path / "net.safetensors")
    assert report.ok(0.0)
    assert report.runtime == "cellstack"
    assert len(report.differences) == 1 + sum(len(cell.spec.state_sizes) for cell in net.cells)
    assert report.note == ""


def test_a_difference_is_found_in_every_output(tmp_path):
    net = make_net()
    other_than(net).save(tmp_path / "net.safetensors")
    report = verify(net, tmp_path / "net.safetensors")
    assert not report.ok()
    assert report.ok(10.0)
    assert [one.name for one in report.differences] == ["layer_0", "cell 0 h", "cell 0 c", "cell 1 h", "cell 1 c"]
    assert all(one.absolute > 0 for one in report.differences)


def test_several_inputs_ids_and_outputs(tmp_path):
    rng = np.random.default_rng(0)
    array = lambda *shape: rng.normal(size=shape).astype("f4")  # noqa: E731
    net = Network(
        [Embedding(array(7, 3)), Merge("add"), Dense(array(3, 2)), GlobalPool("mean")],
        ["table", "both", "each", "end"],
        inputs={"ids": None, "x": (None, 3)},
        wires=[("ids",), ("table", "x"), ("both",), ("each",)],
        outputs=("each", "end"),
    )
    net.save(tmp_path / "net.safetensors")
    report = verify(net, tmp_path / "net.safetensors")
    assert report.ok(0.0)
    assert [one.name for one in report.differences] == ["each", "end"]
    assert report.inputs == {"ids": (5, 7), "x": (5, 7, 3)}
    given = verify(net, tmp_path / "net.safetensors", x={"ids": [[6, 0]], "x": np.ones((1, 2, 3))})
    assert (given.ok(0.0), given.inputs) == (True, {"ids": (1, 2), "x": (1, 2, 3)})


def test_the_seed_determines_the_random_input(tmp_path):
    net = make_net()
    other_than(net).save(tmp_path / "net.safetensors")
    one, again, other = (verify(net, tmp_path / "net.safetensors", seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    x = np.ones((2, 3, 3))
    assert verify(net, tmp_path / "net.safetensors", x=x).inputs == {"x": (2, 3, 3)}
    with pytest.raises(ShapeError):
        verify(net, tmp_path / "net.safetensors", x=np.ones((2, 3, 4)))


def test_a_network_of_other_shapes(tmp_path):
    net = make_net()
    Network([*net.nodes, GlobalPool("last")]).save(tmp_path / "net.safetensors")
    report = verify(net, tmp_path / "net.safetensors")
    assert not report.ok(np.inf)
    assert "[5, 7, 5], theirs [5, 5]" in str(report)
    Network([*net.nodes, Recurrent((make_cell(np.random.default_rng(0), 5, 5),))]).save(tmp_path / "net.safetensors")
    report = verify(net, tmp_path / "net.safetensors")
    assert report.differences[-1][:3] == ("cell 2 c", (), (5, 5))
    assert not report.ok()
    Network([Scale(np.ones(2, "f4"), np.ones(2, "f4"))]).save(tmp_path / "net.safetensors")
    report = verify(net, tmp_path / "net.safetensors")
    assert (report.runtime, report.ok()) == (None, False)
    assert "takes other inputs" in str(report)


# ── C ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_c_is_compiled_and_run(tmp_path, dtype):
    need("cc")
    rng = np.random.default_rng(0)
    net = make_net(dtype, kind="gru", learn_initial_state=True)
    last = Network([*net.nodes, Dense(rng.normal(size=(5, 2)).astype(dtype)), GlobalPool("last")])
    ids = Network([Embedding(rng.normal(size=(9, 3)).astype(dtype)), *net.nodes])
    for n, one in enumerate((net, last, ids)):
        _, source = export(one, tmp_path, f"net{n}")
        report = verify(one, source)
        assert report.ok(1e-5 if dtype == "float32" else 1e-12), str(report)
        assert len(report.differences) == 1 + 3
        assert report.version[:1].isdigit()


def test_other_c_files_are_not_run(tmp_path, monkeypatch):
    need("cc")
    net = make_net()
    header, source = export(net, tmp_path)
    assert "isn't the file that export_c writes" in str(verify(other_than(net), source))
    source.write_text(source.read_text() + f'\n__attribute__((constructor)) void f(void) {{ remove("{header}"); }}\n')
    assert "isn't the file that export_c writes" in str(verify(net, source))
    assert header.exists()
    export(net, tmp_path)
    header.unlink()
    assert f"{header} isn't the file" in str(verify(net, source))
    export(net, tmp_path)
    monkeypatch.setenv("CC", "no-such-compiler")
    report = verify(net, source)
    assert (report.ok(), report.runtime) == (False, None)
    assert "install gcc or clang" in str(report)


# ── torch ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"num_layers": 3, "bias": False},
        {"num_layers": 2, "bidirectional": True},
        {"dtype": torch.float64},
        {"proj_size": 2},
        {"nonlinearity": "relu"},
    ],
    ids=str,
)
def test_a_state_dict(tmp_path, kind, flags):
    if ("proj_size" in flags and kind != "LSTM") or ("nonlinearity" in flags and kind != "RNN"):
        flags = {}
    module = getattr(torch.nn, kind)(3, 4, batch_first=True, **flags)
    net = load(module)
    for saved in (module.state_dict(), {"model": {f"rnn.{n}": t for n, t in module.state_dict().items()}, "epoch": 3}):
        torch.save(saved, tmp_path / "net.pt")
        report = verify(net, tmp_path / "net.pt")
        assert report.ok(1e-5), str(report)
        assert (report.runtime, report.version) == ("torch", torch.__version__)
        assert len(report.differences) == 1 + sum(len(cell.spec.state_sizes) for cell in net.cells)
    with torch.no_grad():
        module.weight_hh_l0[[0, 1]] = module.weight_hh_l0[[1, 0]]
    torch.save(module.state_dict(), tmp_path / "net.pt")
    assert not verify(net, tmp_path / "net.pt").ok()


def test_a_cell_s_state_dict(tmp_path):
    cell = torch.nn.LSTMCell(3, 4)
    module = torch.nn.LSTM(3, 4, batch_first=True)
    module.load_state_dict({f"{name}_l0": tensor for name, tensor in cell.state_dict().items()})
    torch.save(cell.state_dict(), tmp_path / "net.pt")
    assert verify(load(module), tmp_path / "net.pt").ok(1e-5)


class Trap:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_torch_files_that_aren_t_run(tmp_path):
    module = torch.nn.LSTM(3, 4, batch_first=True)
    net = load(module)
    for saved, message in (
        (module, "without running the file's own code: Weights only load failed"),
        ({"weight": Trap()}, "without running the file's own code"),
        (
            torch.nn.Sequential(module, torch.nn.Linear(4, 2)).state_dict(),
            "how its modules run (found 0, 1): compare with",
        ),
        (torch.nn.Linear(3, 4).state_dict(), "how its modules run (found weight, bias)"),
        (torch.nn.LSTM(3, 5).state_dict(), "torch.nn.LSTM doesn't take the file's weights"),
    ):
        torch.save(saved, tmp_path / "net.pt")
        report = verify(net, tmp_path / "net.pt")
        assert (report.ok(), report.runtime) == (False, None)
        assert message in str(report)
        assert "\x1b" not in str(report)  # torch colours its messages


# ── a torch module ──────────────────────────────────────────────────────────────────────────────────────────────────


class Classifier(torch.nn.Module):
    """The common model: both final states of the last layer, then a Linear."""

    def __init__(self, joined=False, **flags):
        super().__init__()
        self.lstm = torch.nn.LSTM(3, 4, 2, bidirectional=True, dropout=0.5, **{"batch_first": True} | flags)
        self.head, self.joined = torch.nn.Linear(8, 1), joined

    def forward(self, x):
        y, (h, _) = self.lstm(x)
        score = self.head(torch.cat((h[-2], h[-1]), 1)).squeeze(-1)
        return {"score": score, "steps": y} if self.joined else score


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_an_ordered_state_dict_is_compared_with_its_module(tmp_path, suffix):
    model = Classifier(joined=True)
    path = tmp_path / f"net.{suffix}"
    (torch.save if suffix == "pt" else save_file)(model.state_dict(), path)
    net = load(path, order=["lstm", "final", "head"])
    report = verify(net, model)
    assert (report.path, report.runtime, report.ok(1e-5)) == ("Classifier", "torch", True)
    assert "B=1 T=7, B=2 T=1, B=3 T=28; not compared: 1 more tensors" in report.note
    assert model.training
    assert model.lstm.training
    with pytest.warns(UserWarning, match='write "final" instead'):
        other = load(path, order=["lstm", "last", "head"])
    assert verify(other, model).verdict().startswith("fail: layer_3 differs by")
    assert verify(net, model, np.ones((2, 5, 3))).inputs == {"x": (2, 5, 3)}
    unable = verify(net, path)
    assert unable.runtime is None
    assert "compare with your module: cs.verify(cs.load(…), module)" in unable.note


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_module_that_takes_time_before_batch_gets_a_transposed_input(dtype):
    gru = torch.nn.GRU(3, 4, 2, bidirectional=True, dtype=dtype)
    with pytest.warns(UserWarning, match="has batch_first=False"):
        net = load(gru)
    report = verify(net, gru)
    assert report.ok(1e-5), str(report)
    assert [one.name for one in report.differences] == [net.outputs[0], *(f"cell {n} h" for n in range(4))]
    assert "axes in the module: [T, B, 3] -> [T, B, 8], and arrays were rearranged" in report.note
    assert not any(module._forward_pre_hooks for module in gru.modules())


def test_modules_that_can_t_be_compared():
    net = load(torch.nn.LSTM(3, 4, batch_first=True))
    assert "the module raised RuntimeError" in verify(net, torch.nn.Linear(5, 2)).verdict()
    assert "fail: layer_0 has the shape [5, 7, 4], theirs [5, 7, 2]" in str(verify(net, torch.nn.Linear(3, 2)))
    with pytest.raises(TypeError, match="expected a file's path or a torch module, got dict"):
        verify(net, {})


# ── ONNX ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def save_onnx(path, nodes, inputs, outputs, constants):
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "graph",
        [info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


@pytest.mark.long
def test_an_onnx_graph_with_our_axes(tmp_path):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 2)).astype("f4")
    net = Network([Dense(kernel, activation="tanh")])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("Tanh", ["z"], ["y"])]
    for batch in ("B", 1):
        save_onnx(tmp_path / "net.onnx", nodes, {"x": [batch, "T", 3]}, {"y": [batch, "T", 2]}, {"w": kernel})
        report = verify(net, tmp_path / "net.onnx")
        assert report.ok(1e-5), str(report)
        assert report.runtime == "onnxruntime"
        assert report.inputs == {"x": (5 if batch == "B" else 1, 7, 3)}
    assert not verify(Network([Dense(kernel + 0.1, activation="tanh")]), tmp_path / "net.onnx").ok()


def lstm_onnx(path, rng, layout, directions, batch="B", steps="T"):
    """An LSTM in ONNX's gate order, with states as inputs and outputs; returns its arrays."""
    shapes = {"w": (directions, 16, 3), "r": (directions, 16, 4), "b": (directions, 32)}
    arrays = {name: rng.normal(0, 0.5, size=shape).astype("f4") for name, shape in shapes.items()}
    node = helper.make_node(
        "LSTM", ["x", "w", "r", "b", "", "h0", "c0"], ["y", "h", "c"], hidden_size=4, layout=layout,
        direction="bidirectional" if directions == 2 else "forward",
    )  # fmt: skip
    state = [batch, directions, 4] if layout else [directions, batch, 4]
    y = [batch, steps, directions, 4] if layout else [steps, directions, batch, 4]
    x = [batch, steps, 3] if layout else [steps, batch, 3]
    save_onnx(path, [node], {"x": x, "h0": state, "c0": state}, {"y": y, "h": state, "c": state}, arrays)
    return arrays


def by_hand(arrays, **changes):
    """The network of these arrays, with reordered gates."""
    order = np.concatenate([np.arange(4 * n, 4 * n + 4) for n in (0, 2, 3, 1)])  # of i f g o in i o f g
    stacks = []
    for d in range(len(arrays["w"])):
        bias = arrays["b"][d, :16] + arrays["b"][d, 16:] + np.float32(changes.get("bias", 0.0))
        cell = Cell(CellSpec(3, 4), arrays["w"][d].T[:, order], arrays["r"][d].T[:, order], bias[order])
        stacks.append(Recurrent((cell,), go_backwards=d == 1))
    return Network([Bidirectional(*stacks) if len(stacks) == 2 else stacks[0]])


@pytest.mark.parametrize("directions", [1, 2])
def test_an_onnx_lstm_with_its_states(tmp_path, directions):
    arrays = lstm_onnx(tmp_path / "net.onnx", np.random.default_rng(0), 0, directions)
    report = verify(by_hand(arrays), tmp_path / "net.onnx")
    assert report.ok(1e-5), str(report)
    names = [f"cell {cell} {part}" for cell in range(directions) for part in "ch"]
    assert sorted(one.name for one in report.differences) == [*names, "layer_0"]
    assert report.inputs == {"x": (5, 7, 3)}
    wrong = verify(by_hand(arrays, bias=0.05), tmp_path / "net.onnx")
    assert all(one.relative > 1e-3 for one in wrong.differences)


@pytest.mark.parametrize(("batch", "steps"), [(1, "T"), ("B", 4), (2, 3)])
def test_an_onnx_file_with_fixed_lengths(tmp_path, batch, steps):
    arrays = lstm_onnx(tmp_path / "net.onnx", np.random.default_rng(0), 0, 1, batch, steps)
    report = verify(by_hand(arrays), tmp_path / "net.onnx")
    assert report.ok(1e-5), str(report)
    assert report.inputs == {"x": (5 if batch == "B" else batch, 7 if steps == "T" else steps, 3)}
    given = verify(by_hand(arrays), tmp_path / "net.onnx", x=np.ones((6, 5, 3)))
    assert (given.ok(), "only takes inputs with B=" in str(given)) == (False, True)


@pytest.mark.parametrize("batch", ["B", 1])
def test_an_onnx_file_of_one_step_is_run_step_by_step(tmp_path, batch):
    """Its states are passed from step to step, as in streaming."""
    arrays = lstm_onnx(tmp_path / "net.onnx", np.random.default_rng(0), 0, 1, batch, 1)
    report = verify(by_hand(arrays), tmp_path / "net.onnx")
    assert report.ok(1e-5), str(report)
    assert report.inputs == {"x": (5 if batch == "B" else 1, 7, 3)}
    assert len(report.differences) == 3
    assert not verify(by_hand(arrays, bias=0.05), tmp_path / "net.onnx").ok()


@pytest.mark.parametrize("learnt", [False, True])
def test_our_onnx_files_return_the_states_too(tmp_path, learnt):
    rng = np.random.default_rng(0)
    cells = (make_cell(rng, 3, 4, learn_initial_state=learnt), make_cell(rng, 4, 5, kind="gru"))
    ahead = Recurrent((make_cell(rng, 5, 4),))
    back = Recurrent((make_cell(rng, 5, 4, kind="rnn"),), go_backwards=True)
    net = Network([Recurrent(cells), Bidirectional(ahead, back), GlobalPool("last")])
    onnx_adapter.save(net, str(tmp_path / "net.onnx"))
    report = verify(net, tmp_path / "net.onnx")
    assert report.ok(1e-5), str(report)
    assert [one.name for one in report.differences][1:4] == ["cell 0 h", "cell 0 c", "cell 1 h"]
    assert len(report.differences) == 1 + 6


PER_FRAME = {  # operations on y [B, T, H], H = 4, after a Linear of 2
    "rows": lambda line, y: line(y.reshape(-1, 4)),
    "rows and back": lambda line, y: line(y.reshape(-1, 4)).reshape(y.shape[0], -1, 2),
    "features first": lambda line, y: line(y).transpose(1, 2),
    "steps first": lambda line, y: line(y).transpose(0, 1),
    "batch last": lambda line, y: line(y).permute(1, 2, 0),
    "features before rows": lambda line, y: line(y).permute(2, 0, 1),
    "one more axis": lambda line, y: line(y[:, -1])[:, None],
    "one more axis behind": lambda line, y: line(y[:, -1])[..., None],
    "flat": lambda line, y: line(y).flatten(1),
    "a number a step": lambda line, y: line(y).sum(-1),
    "a number a row": lambda line, y: line(y[:, -1]).sum(-1),
    "a number a row, cut out": lambda line, y: line(y[:, -1])[:, :1].squeeze(-1),
}


class PerFrame(torch.nn.Module):
    def __init__(self, end, width=4):
        super().__init__()
        self.lstm, self.line, self.end = torch.nn.LSTM(3, 4, batch_first=True), torch.nn.Linear(width, 2), end

    def forward(self, x):
        return self.end(self.line, self.lstm(x)[0])


def exported(path, module, axes):
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # torch's own
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), (torch.randn(2, 10, 3),), str(path), input_names=["x"], output_names=["y"],
            dynamic_axes=axes, dynamo=False,
        )  # fmt: skip
    return load(path)


AXES = [None, {"x": {0: "B"}}, {"x": {0: "B", 1: "T"}}]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("name", PER_FRAME)
def test_outputs_in_any_order_of_axes(tmp_path, name, axes):
    torch.manual_seed(0)
    module = PerFrame(PER_FRAME[name])
    net = exported(tmp_path / "net.onnx", module, axes)
    report = verify(net, tmp_path / "net.onnx")
    assert report.ok(1e-5), str(report)
    with torch.no_grad():
        module.line.weight += 0.1
    other = exported(tmp_path / "other.onnx", module, axes)
    assert not verify(other, tmp_path / "net.onnx").ok()


ORDERS = ("BTF", "TBF", "BFT", "TFB", "FTB", "FBT", "TF", "FT")
ENDS = (*ORDERS, "BF", "FB", "F")


@pytest.mark.parametrize("order", ORDERS)
def test_other_axes_are_reported_when_a_file_is_loaded_printed_and_verified(tmp_path, order):
    path = str(tmp_path / "net.onnx")
    onnx.save(in_order(order, order.replace("B", ""), "LSTM", 1, False, {}) if "B" not in order else
              in_order(order, "BTF", "LSTM", 1, False, {}), path)  # fmt: skip
    shown = f"[{', '.join(order.replace('F', '3'))}]"
    if order in ("BTF", "TF"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            net = load(path)
    else:
        says = re.escape(f"load: {path} has other axes than the network: input 'X' {shown} is [B, T, 3] in the network")
        with pytest.warns(UserWarning, match=f"^{says}") as record:
            net = load(path)
        assert record[0].filename == __file__
    line = f"axes in the source file: {shown} -> "
    assert (line in repr(net)) == (line in str(net.plan())) == (order != "BTF")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the report says it
        report = verify(net, path)
    assert report.ok(1e-5), str(report)
    assert (line in report.note) == (line in str(report)) == (order not in ("BTF", "TF"))
    with pytest.raises(ShapeError) as raised:
        net(np.zeros((2, 5, 7), np.float32))
    assert (f"; in the source file its axes are {shown}" in str(raised.value)) == (order != "BTF")
    net.save(tmp_path / "again.safetensors")
    net.save(tmp_path / "again.onnx")
    for name in ("again.safetensors", "again.onnx"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # these files have the network's axes
            again = load(tmp_path / name)
        assert again.metadata.get("layout") == net.metadata.get("layout")
        report = verify(again, tmp_path / name)
        assert report.ok(1e-5), str(report)
        assert "rearranged" not in report.note


def test_what_we_write_as_onnx_has_batch_before_time(tmp_path):
    net = Network([Recurrent((make_cell(np.random.default_rng(0), 3, 4),))])
    net.save(tmp_path / "net.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "rearranged" not in verify(load(tmp_path / "net.onnx"), tmp_path / "net.onnx").note


def in_order(order, end, kind, ways, states, sizes):
    """A recurrent operator whose input and output have different orders of axes."""
    make, floats = helper.make_node, np.random.default_rng(0).standard_normal
    wide, parts = {"LSTM": 16, "GRU": 12}[kind], ("h", "c")[: 1 + (kind == "LSTM")] if states else ()
    arrays = {
        name: np.float32(floats(shape))
        for name, shape in (("W", (ways, wide, 3)), ("R", (ways, wide, 4)), ("V", (4 * ways, 2)))
    }
    arrays |= {"0": np.array([0]), "1": np.array([1]), "last": np.array(-1), "wide": np.array([0, 0, -1])}
    nodes, axes = [], order
    if "B" not in order:
        nodes, axes = [make("Unsqueeze", ["X", "0"], ["row"])], f"B{order}"
    nodes.append(make("Transpose", [nodes[0].output[0] if nodes else "X"], ["x"], perm=[axes.index(a) for a in "TBF"]))
    given, after = ["", "", *(f"{part}0" for part in parts)] if parts else [], [f"{part}1" for part in parts]
    way = "bidirectional" if ways == 2 else "forward"
    nodes += [
        make(kind, ["x", "W", "R", *given], ["Y", *after], hidden_size=4, direction=way),
        make("Transpose", ["Y"], ["y"], perm=[0, 2, 1, 3]),
        make("Reshape", ["y", "wide"], ["h"]),
        make("MatMul", ["h", "V"], ["z"]),
    ]
    y, axes = "z", "TBF"
    for axis, node in (("B", make("Squeeze", [y, "1"], ["one"])), ("T", make("Gather", [y, "last"], ["at"], axis=0))):
        if axis not in end:
            node.input[0] = y
            nodes.append(node)
            y, axes = node.output[0], axes.replace(axis, "")
    nodes.append(make("Transpose", [y], ["out"], perm=[axes.index(a) for a in end]))
    value, batch = helper.make_tensor_value_info, sizes.get("B", "B") if "B" in order else 1
    inputs = [value("X", TensorProto.FLOAT, [3 if a == "F" else sizes.get(a, a) for a in order])]
    inputs += [value(name, TensorProto.FLOAT, [ways, batch, 4]) for name in given[2:]]
    outputs = [value("out", TensorProto.FLOAT, [f"out.{a}" for a in end])]
    outputs += [value(name, TensorProto.FLOAT, [f"{name}.{n}" for n in range(3)]) for name in after]
    held = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "orders", inputs, outputs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.long
@pairs.parametrize("order, sizes", ORDERS, [{}, {"B": 2, "T": 4}, {"T": 1}], unpaired=[1])
def test_inputs_in_any_order_of_axes(tmp_path, order, sizes):
    path = tmp_path / "net.onnx"
    for end in (end for end in ENDS if ("B" in end) == ("B" in order)):
        for kind, ways, states in (("LSTM", 1, True), ("GRU", 2, False), ("LSTM", 2, True)):
            made = in_order(order, end, kind, ways, states, sizes)
            onnx.checker.check_model(made)
            path.write_bytes(made.SerializeToString())
            net = load(path)
            assert net.metadata["onnx"]["inputs"] == {"X": order}
            report = verify(net, path)
            assert report.ok(1e-5), f"{end}: {report}"
            assert len(report.differences) == 1 + 2 * ways * states, f"{end}: {report}"


@pytest.mark.parametrize("axes", AXES)
def test_a_network_with_a_fixed_number_of_steps(tmp_path, axes):
    torch.manual_seed(0)
    net = exported(tmp_path / "net.onnx", PerFrame(lambda line, y: line(y.flatten(1)), 40), axes)
    report = verify(net, tmp_path / "net.onnx")
    assert report.ok(1e-5), str(report)
    assert report.inputs == {"x": (5 if axes else 2, 10, 3)}


def test_onnx_files_that_can_t_be_run(tmp_path):
    net = make_net()
    (tmp_path / "net.onnx").write_bytes(b"\x08\x07nonsense")
    report = verify(net, tmp_path / "net.onnx")
    assert "onnxruntime" in str(report)
    assert "can't run it" in str(report)
    nodes = [helper.make_node("Tanh", ["x"], ["y"])]
    save_onnx(tmp_path / "net.onnx", nodes, {"x": ["B", "T", 4]}, {"y": ["B", "T", 4]}, {})
    assert verify(net, tmp_path / "net.onnx").runtime is None


# ── Keras ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
def test_a_keras_file(tmp_path):
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((None, 3)), keras.layers.LSTM(4, return_sequences=True),
                              keras.layers.Dense(2, "relu")])  # fmt: skip
    lstm, dense = model.layers
    for name in ("net.keras", "net.h5"):
        with warnings.catch_warnings():  # keras's own
            warnings.simplefilter("ignore")
            model.save(tmp_path / name)
        cell = Cell(CellSpec(3, 4), *(weight.value.detach().numpy() for weight in lstm.weights))
        kernel, bias = (weight.value.detach().numpy() for weight in dense.weights)
        net = Network([Recurrent((cell,)), Dense(kernel, bias, "relu")])
        report = verify(net, tmp_path / name)
        assert report.ok(1e-5), str(report)
        assert (report.runtime, report.version) == ("keras", keras.__version__)
        assert [one.name for one in report.differences] == ["layer_1", "cell 0 h", "cell 0 c"]
        assert report.note == ""
        wrong = Network([Recurrent((cell,)), Dense(kernel, None, "tanh")])
        assert not verify(wrong, tmp_path / name).ok()


@pytest.mark.long
def test_a_keras_file_with_fixed_lengths(tmp_path):
    import keras

    model = keras.Sequential([keras.Input((4, 3), batch_size=2), keras.layers.Activation("tanh")])
    with warnings.catch_warnings():  # keras's own
        warnings.simplefilter("ignore")
        model.save(tmp_path / "net.keras")
    net = Network([Scale(np.ones(3, "f4"), np.zeros(3, "f4")), Activation("tanh")])
    report = verify(net, tmp_path / "net.keras")
    assert (report.ok(1e-5), report.inputs) == (True, {"x": (2, 4, 3)})
    assert "only takes inputs with B=2, T=4" in str(verify(net, tmp_path / "net.keras", x=np.ones((1, 1, 3))))


def test_a_keras_file_that_can_t_be_run(tmp_path):
    import keras

    with warnings.catch_warnings():  # keras's own
        warnings.simplefilter("ignore")
        keras.Sequential([keras.Input((None, 3)), keras.layers.Lambda(lambda x: x)]).save(tmp_path / "net.keras")
    report = verify(make_net(), tmp_path / "net.keras")
    assert report.runtime is None
    assert "can't run it" in str(report)
    with zipfile.ZipFile(tmp_path / "net.keras", "w") as file:
        file.writestr("config.json", "{}")
    assert verify(make_net(), tmp_path / "net.keras").runtime is None


def test_stateful_keras_layers(tmp_path):
    """Two consecutive ones and another layer: the model that returns the states runs the lower one twice."""
    import keras

    layers = keras.layers
    for number, (parts, count) in enumerate({
        (layers.LSTM(4, stateful=True, return_sequences=True), layers.LSTM(4, stateful=True), layers.Dense(1)): 4,
        (layers.Bidirectional(layers.GRU(4, stateful=True, return_sequences=True)), layers.GRU(3, stateful=True),
         layers.Dense(1)): 3,
    }.items()):  # fmt: skip
        path = tmp_path / f"net{number}.keras"
        with warnings.catch_warnings():  # keras's own
            warnings.simplefilter("ignore")
            keras.Sequential([keras.Input((None, 3), batch_size=2), *parts]).save(path)
        report = verify(load(path), path)
        assert report.ok(1e-5), str(report)
        assert len(report.differences) == 1 + count


# ── the worker process ────────────────────────────────────────────────────────────────────────────────────────────


def stand_in(tmp_path, monkeypatch, package, code):
    """Replace a package by `code`."""
    (tmp_path / "site").mkdir(exist_ok=True)
    (tmp_path / "site" / f"{package}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


@pytest.mark.long
def test_a_runtime_that_crashes(tmp_path):
    """Files on which ONNX Runtime crashes, by signal 11 and by abort(), if it still does."""
    rng = np.random.default_rng(0)
    w, r = (rng.normal(size=(1, 12, width)).astype("f4") for width in (3, 4))
    norm = [helper.make_node("LayerNormalization", ["x", "g", ""], ["y"])]
    save_onnx(tmp_path / "norm.onnx", norm, {"x": ["B", "T", 3]}, {"y": ["B", "T", 3]}, {"g": np.ones(3, "f4")})
    gru = [
        helper.make_node("Slice", ["x", "at", "at"], ["z"]),
        helper.make_node("GRU", ["z", "w", "r"], ["y"], hidden_size=4),
    ]
    constants = {"at": np.array([5]), "w": w, "r": r}
    save_onnx(tmp_path / "gru.onnx", gru, {"x": ["T", "B", 3]}, {"y": ["T", 1, "B", 4]}, constants)
    for name in ("norm", "gru", "norm"):
        report = verify(make_net(), tmp_path / f"{name}.onnx", streams=False)
        assert report.runtime is None or not report.ok()
    make_net().save(tmp_path / "net.onnx")
    assert verify(make_net(), tmp_path / "net.onnx").ok(1e-5)


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("import os; os.kill(os.getpid(), 11)", "the process of onnxruntime ended by SIGSEGV"),
        ("import os; os.write(2, b'bad alloc'); os.abort()", "the process of onnxruntime ended by SIGABRT: bad alloc"),
        ("import os; os._exit(3)", "the process of onnxruntime ended with exit status 3"),
        ("raise KeyError('x')", "onnxruntime raised KeyError: 'x'"),
    ],
)
def test_how_a_runtime_ended_is_reported(tmp_path, monkeypatch, code, how):
    make_net().save(tmp_path / "net.onnx")
    stand_in(tmp_path, monkeypatch, "onnxruntime", code)
    report = verify(make_net(), tmp_path / "net.onnx", streams=False)
    assert (report.ok(), report.runtime) == (False, None)
    assert report.note.startswith("can't run the file: ")
    assert report.note.endswith(how)
    assert str(report) == f"{tmp_path / 'net.onnx'}: not verified: {report.note}"


def test_without_an_interpreter_nothing_is_run(tmp_path, monkeypatch):
    make_net().save(tmp_path / "net.onnx")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])  # forces a new process
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    report = verify(make_net(), tmp_path / "net.onnx", streams=False)
    assert "the process of onnxruntime could not be started: " in report.note


def test_a_damaged_native_file_is_not_verified(tmp_path):
    make_net().save(tmp_path / "net.safetensors")
    whole = (tmp_path / "net.safetensors").read_bytes()
    (tmp_path / "net.safetensors").write_bytes(whole[:-4])
    assert verify(make_net(), tmp_path / "net.safetensors", streams=False).runtime is None


@pytest.mark.long
def test_the_process_is_kept_and_ends_with_ours(tmp_path):
    make_net().save(tmp_path / "net.onnx")
    code = (
        "import sys, cellstack; from cellstack.formats import worker\n"
        "net, pids = cellstack.load(sys.argv[1]), set()\n"
        "for _ in range(3):\n"
        "    assert cellstack.verify(net, sys.argv[1]).ok()\n"
        "    pids.add(worker._kept[0].process.pid)\n"
        "print(*pids)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, tmp_path / "net.onnx"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


# ── missing runtimes and files, and the report's text ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "package"), [("a.onnx", "onnxruntime"), ("a.keras", "keras"), ("a.pt", "torch")])
def test_a_runtime_that_isn_t_installed(tmp_path, monkeypatch, name, package):
    stand_in(tmp_path, monkeypatch, package, f"raise ModuleNotFoundError('', name={package!r})")
    (tmp_path / name).write_bytes(b"")
    report = verify(make_net(), tmp_path / name)
    assert (report.ok(), report.ok(np.inf), report.runtime) == (False, False, None)
    said = f"{tmp_path / name}: not verified: {tmp_path / name} is run by {package}, which needs {package}: pip install"
    assert str(report).splitlines()[-1] == f"{said} {package}"
    assert len(report.streams) == 2  # they need no runtime
    assert json.loads(json.dumps(report.to_json()))["ok"] is False


@pytest.mark.slow
def test_keras_uses_an_installed_backend(tmp_path):
    import keras

    with warnings.catch_warnings():  # keras's own
        warnings.simplefilter("ignore")
        keras.Sequential([keras.Input((None, 3)), keras.layers.LSTM(4)]).save(tmp_path / "net.keras")
    code = (
        "import os, sys, cellstack; net = cellstack.load(sys.argv[1])\n"
        "print(cellstack.verify(net, sys.argv[1]).verdict())\n"
        "print(os.environ.get('KERAS_BACKEND'), 'keras' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, tmp_path / "net.keras"],
        env=environment | {"KERAS_HOME": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "pass: every relative difference is within 1.0e-04\nNone False\n"


def test_missing_files_and_unknown_formats(tmp_path):
    with pytest.raises(FileNotFoundError):
        verify(make_net(), tmp_path / "net.onnx")
    (tmp_path / "net.txt").write_text("nothing")
    with pytest.raises(FormatError, match=r"net\.txt: expected one of safetensors"):
        verify(make_net(), tmp_path / "net.txt")
    make_net().save(tmp_path / "net.safetensors")
    (tmp_path / "net.safetensors").rename(tmp_path / "net.txt")
    assert verify(make_net(), tmp_path / "net.txt").ok(0.0)


def test_differences():
    nan, inf = np.nan, np.inf
    pairs = [
        ([1.0, 2.0], [1.0, 2.5], 0.5, 0.2),
        ([nan, inf, -inf], [nan, inf, -inf], 0.0, 0.0),
        ([nan, 1.0], [1.0, 1.0], inf, inf),
        ([inf, 1.0], [1.0, 1.0], inf, inf),
        ([inf, 1.0], [-inf, 1.0], inf, inf),
        ([0.1], [0.0], 0.1, 0.1),
        ([], [], 0.0, 0.0),
    ]
    for ours, theirs, absolute, relative in pairs:
        found = _difference("y", np.array(ours), np.array(theirs))
        assert found[3:] == pytest.approx((absolute, relative))
    assert _difference("y", np.ones((1, 2)), np.ones(2)).relative == inf


def test_the_text_of_a_report():
    found = (Difference("out", (2, 3), (2, 3), 1.5e-7, 2e-7), Difference("cell 0 h", (2, 4), (4, 2), np.inf, np.inf))
    rounded = (Rounding("bfloat16", "out", 1e-2, 2e-3, 5e-3, 1e-3), Rounding("int8", "out", 2e-2, 4e-3, 1e-2, 2e-3))
    report = Report(
        "a.onnx", "onnxruntime", "1.2", {"x": (2, 7, 3)}, found, "not compared: cell 0 c", streams=rounded, drawn=True
    )
    assert str(report) == (
        "a.onnx: greatest difference from onnxruntime 1.2 on x [2, 7, 3], drawn at random\n"
        "            shape                  absolute  relative\n"
        "  out       [2, 3]                 1.50e-07  2.00e-07\n"
        "  cell 0 h  [2, 4], theirs [4, 2]  inf       inf\n"
        "  not compared: cell 0 c\n"
        "reduced-precision streams: difference from float32 on x [2, 7, 3], drawn at random\n"
        "                 greatest  relative  mean      relative\n"
        "  bfloat16  out  1.00e-02  5.00e-03  2.00e-03  1.00e-03\n"
        "  int8      out  2.00e-02  1.00e-02  4.00e-03  2.00e-03\n"
        "a.onnx: fail: cell 0 h has the shape [2, 4], theirs [4, 2]"
    )
    report = replace(report, differences=found[:1], streams=())
    assert str(report).splitlines()[-1] == "a.onnx: pass: every relative difference is within 1.0e-04"
    assert report.text(1e-7).splitlines()[-1] == "a.onnx: fail: out differs by 2.00e-07, more than 1.0e-07"
    assert str(replace(report, runtime=None, note="no way")) == "a.onnx: not verified: no way"


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match="expected net to be a Network, such as load"):
        verify("net.safetensors", "net.onnx")
