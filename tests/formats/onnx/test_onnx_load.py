"""Whole ONNX files as Networks: files of PyTorch's exporter, and idioms of others, compared with ONNX Runtime."""

import numpy as np
import onnx
import pairs
import pytest
import torch
from onnx import TensorProto, helper
from onnx_graphs import TOLERANCE, compare, export, model, run, write
from torch import nn
from torch.nn import functional

from cellstack.cells.base import State
from cellstack.cells.errors import FormatError
from cellstack.formats import onnx as adapter


class Layers(nn.Module):
    """torch's recurrent layers, and uses of their output."""

    def __init__(self, kind, layers, both, batch_first, how):
        super().__init__()
        self.rnn = getattr(nn, kind)(3, 4, layers, bidirectional=both, batch_first=batch_first)
        self.head = nn.Linear(4 * (1 + both) if how != "hn" else 4, 2)
        self.time, self.how = int(batch_first), how

    def forward(self, x):
        y, state = self.rnn(x)
        h = state[0] if isinstance(state, tuple) else state
        if self.how == "all":
            return y, state
        of = {
            "last": lambda: y.select(self.time, -1),
            "seq": lambda: y,
            "hn": lambda: h[-1],
            "hcat": lambda: torch.cat([h[-2], h[-1]], dim=1),
            "mean": lambda: torch.relu(y.mean(dim=self.time)),
        }
        return self.head(of[self.how]())


HOW = {"LSTM": ["last", "seq", "hn", "hcat", "mean", "all"], "GRU": ["last", "hn", "hcat", "all"]}
HOW["RNN"] = HOW["GRU"]


CASES = [(kind, both, how) for kind in HOW for both in (False, True) for how in HOW[kind] if both or how != "hcat"]


@pairs.parametrize("case, layers, batch_first", CASES, [1, 2], [False, True], unpaired=[0])
def test_torch_layers(tmp_path, case, layers, batch_first):
    kind, both, how = case
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3) if batch_first else torch.randn(5, 2, 3)
    net = compare(*export(tmp_path / "net.onnx", Layers(kind, layers, both, batch_first, how), (x,)))
    assert len(net.cells) == layers * (1 + both)
    assert net.metadata["onnx"]["inputs"] == {"in0": "BTF" if batch_first else "TBF"}
    if how == "all":
        _, states = net.run(x.numpy() if batch_first else x.numpy().swapaxes(0, 1))
        _, *expected = run(str(tmp_path / "net.onnx"), {"in0": x.numpy()})
        for got, want in zip(zip(*states, strict=True), expected, strict=True):
            np.testing.assert_allclose(np.stack(got), want, rtol=0, atol=TOLERANCE)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.pool = nn.Conv1d(3, 6, 3, padding=1), nn.BatchNorm1d(6), nn.MaxPool1d(2)
        self.two, self.rnn, self.head = (
            nn.Conv1d(6, 4, 3, dilation=2, groups=2),
            nn.LSTM(4, 5, batch_first=True),
            nn.Linear(5, 3),
        )
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        y = self.two(self.pool(torch.relu(self.norm(self.one(x.transpose(1, 2))))))
        y, _ = self.rnn(y.transpose(1, 2))
        return functional.softmax(self.head(torch.tanh(y[:, -1])), -1)


class Channels(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.rnn, self.head = nn.Conv1d(3, 6, 3), nn.GRU(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        y, _ = self.rnn(functional.leaky_relu(self.one(x), 0.1).permute(0, 2, 1))
        return torch.sigmoid(self.head(y))


class Words(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(11, 4), nn.LayerNorm(10), nn.Linear(10, 3)
        self.rnn = nn.LSTM(4, 5, 2, batch_first=batch_first, bidirectional=True)
        self.time = int(batch_first)

    def forward(self, x):
        y, _ = self.rnn(self.table(x))
        return self.head(functional.dropout(self.norm(y), training=False).amax(self.time))


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.start = nn.GRU(3, 4, 2, batch_first=True), nn.Parameter(torch.randn(2, 1, 4))

    def forward(self, x):
        return self.rnn(x, self.start.expand(-1, x.shape[0], -1).contiguous())[0]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = (
            nn.LSTM(4, 4, batch_first=True),
            nn.GRU(4, 4, batch_first=True),
            nn.Linear(8, 2),
        )

    def forward(self, x):
        y = self.one(x)[0] + x
        z = self.two(y)[0]
        return self.head(torch.cat([y, z * torch.sigmoid(z)], -1)).mean(1)


class Flat(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.rnn, self.head, self.channels = nn.LSTM(3, 4, batch_first=True), nn.Linear(20, 2), channels

    def forward(self, x):
        y, _ = self.rnn(x)
        return functional.elu(self.head((y.transpose(1, 2) if self.channels else y).flatten(1)))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(6, 2)

    def forward(self, x, z):
        y, _ = self.rnn((x - 0.5) / 2.0)
        return self.head(torch.cat([y[:, -1], z], 1))


class OneNumber(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.rnn(x.unsqueeze(-1))[0]).squeeze(-1)


class Rows(nn.Module):
    """The head over rows of batch and time in one, both directions added, the last three steps."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True, bidirectional=True), nn.Linear(4, 2)

    def forward(self, x):
        y, _ = self.rnn(x)
        z = (y[:, :, :4] + y[:, :, 4:]).contiguous()
        return torch.softmax(self.head(z.view(-1, 4)).view(x.size(0), x.size(1), 2), -1)[:, -3:]


MODULES = {
    "convolutions": lambda: (Convolutions(), (torch.randn(2, 11, 3),)),
    "channels": lambda: (Channels(), (torch.randn(2, 3, 9),)),
    "words": lambda: (Words(True), (torch.randint(0, 11, (2, 7)),)),
    "words, time first": lambda: (Words(False), (torch.randint(0, 11, (7, 2)),)),
    "learned start": lambda: (Learned(), (torch.randn(2, 5, 3),)),
    "residual": lambda: (Residual(), (torch.randn(2, 5, 4),)),
    "flat": lambda: (Flat(False), (torch.randn(2, 5, 3),)),
    "flat channels": lambda: (Flat(True), (torch.randn(2, 5, 3),)),
    "two inputs": lambda: (Two(), (torch.randn(2, 5, 3), torch.randn(2, 2))),
    "one number a step": lambda: (OneNumber(), (torch.randn(2, 6),)),
    "rows": lambda: (Rows(), (torch.randn(2, 6, 3),)),
}


@pytest.mark.parametrize("name", MODULES)
def test_torch_modules(tmp_path, name):
    torch.manual_seed(1)
    module, inputs = MODULES[name]()
    fixed = ("in0", "in1") if name in ("flat", "flat channels", "two inputs") else ()
    net = compare(*export(tmp_path / "net.onnx", module, inputs, fixed))
    if name == "learned start":
        np.testing.assert_array_equal(net.cells[1].initial_h, module.start[1, 0].detach())


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, 2), nn.Linear(4, 2)

    def forward(self, x, h, c):
        y, (h, c) = self.rnn(x, (h, c))
        return self.head(y), h, c


def test_states_as_inputs_are_the_network_s_state(tmp_path):
    torch.manual_seed(2)
    inputs = (torch.randn(5, 2, 3), torch.randn(2, 2, 4), torch.randn(2, 2, 4))
    path, feeds = export(tmp_path / "net.onnx", Stateful(), inputs)
    net = adapter.load(path)
    assert net.inputs == ("in0",)
    h, c = feeds["in1"], feeds["in2"]
    y, after = net.run(feeds["in0"].swapaxes(0, 1), tuple(State(h[n], c[n]) for n in range(2)))
    expected, hn, cn = run(path, feeds)
    np.testing.assert_allclose(y, expected.swapaxes(0, 1), rtol=0, atol=TOLERANCE)
    for got, want in zip(zip(*after, strict=True), (hn, cn), strict=True):
        np.testing.assert_allclose(np.stack(got), want, rtol=0, atol=TOLERANCE)
    assert list(net.metadata["onnx"]["states"].values()) == [
        [[0, 0, "h"], [1, 0, "h"]],
        [[0, 0, "c"], [1, 0, "c"]],
    ]


def lengths_model(extra=(), outputs=None):
    rng = np.random.default_rng(0)
    arrays = {"W": rng.standard_normal((2, 9, 2)), "R": rng.standard_normal((2, 9, 3))}
    arrays = {name: a.astype(np.float32) for name, a in arrays.items()}
    inputs = {"X": (TensorProto.FLOAT, ["T", "B", 2]), "long": (TensorProto.INT32, ["B"])}
    node = helper.make_node(
        "GRU", ["X", "W", "R", "", "long"], ["Y", "Y_h"], name="gru", direction="bidirectional", hidden_size=3
    )
    return model([node, *extra], inputs, outputs or ["Y", "Y_h"], arrays)


def test_rows_lengths_as_an_input(tmp_path):
    path = write(tmp_path / "net.onnx", lengths_model())
    net = adapter.load(path)
    assert net.inputs == ("X",)
    assert net.metadata["onnx"]["lengths"] == ["long"]
    x, lengths = np.random.default_rng(1).standard_normal((2, 5, 2)).astype(np.float32), np.array([5, 3], np.int32)
    y, after = net.run(x, lengths=lengths)
    expected, h = run(path, {"X": x.swapaxes(0, 1), "long": lengths})
    np.testing.assert_allclose(y, expected.transpose(2, 0, 1, 3).reshape(2, 5, 6), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(np.stack([state.h for state in after]), h, rtol=0, atol=TOLERANCE)


def test_steps_past_a_row_s_end_are_not_mixed_in(tmp_path):
    mean = helper.make_node("ReduceMean", ["Y"], ["mean"], name="the mean", axes=[0], keepdims=0)
    path = write(tmp_path / "net.onnx", lengths_model([mean], {"mean": 3}))
    with pytest.raises(
        FormatError,
        match=r"ReduceMean 'the mean': it also combines steps past the ends of rows, given by sequence_lens",
    ):
        adapter.load(path)


def test_all_that_cannot_be_run_is_named(tmp_path):
    nodes = [
        helper.make_node("Tan", ["X"], ["a"], name="first"),
        helper.make_node("LSTM", ["a", "W", "R"], ["b"], name="lstm", hidden_size=1),
        helper.make_node("Erf", ["b"], ["c"], name="second"),
        helper.make_node("Strange", ["c"], ["Y"], name="third", domain="of.mine"),
        helper.make_node("Tan", ["X"], ["unused"], name="leads nowhere"),
    ]
    arrays = {"W": np.ones((1, 4, 2), np.float32), "R": np.ones((1, 4, 1), np.float32)}
    made = model(nodes, {"X": (TensorProto.FLOAT, ["T", "B", 2])}, ["Y"], arrays, domains=[("of.mine", 1)])
    path = write(tmp_path / "net.onnx", made, check=False)
    message = (
        r"Tan 'first': the operator isn't supported; Erf 'second': the operator isn't supported; "
        r"Strange 'third': the operator of of.mine isn't supported; "
        r"cellstack\.extract\(path\) \(or `cellstack info FILE`\) gives its recurrent parts$"
    )
    with pytest.raises(FormatError, match=message):
        adapter.load(path)
    assert list(adapter.extract(path)) == ["lstm"]


def test_unused_tensors_are_reported(tmp_path):
    made = lengths_model()
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "left over"))
    net = adapter.load(write(tmp_path / "net.onnx", made))
    assert net.metadata["onnx"]["unused"] == ["left over"]


def test_idioms_of_the_converters_from_tensorflow(tmp_path):
    """A Keras CNN-LSTM as converters write it: windows over two axes, an LSTM per direction, rows of B and T."""
    rng = np.random.default_rng(0)
    floats = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    make, lists = helper.make_node, {}

    def integers(*values):
        name = "to " + " ".join(map(str, values))
        lists[name] = np.array(values, np.int64)
        return name

    arrays = {"k": floats(5, 3, 1, 2), "kb": floats(5), "dense": floats(8, 2), "bias": floats(2)}
    for way in "fb":
        arrays |= {f"W{way}": floats(1, 16, 5), f"R{way}": floats(1, 16, 4), f"B{way}": floats(1, 32)}
    nodes = [
        make("Transpose", ["x"], ["x1"], perm=[0, 2, 1]),
        make("Unsqueeze", ["x1", integers(2)], ["x2"]),
        make("Conv", ["x2", "k", "kb"], ["x3"], name="conv", pads=[0, 1, 0, 0], kernel_shape=[1, 2]),
        make("Squeeze", ["x3", integers(2)], ["x4"]),
        make("Relu", ["x4"], ["x5"], name="relu"),
        make("Transpose", ["x5"], ["x6"], perm=[2, 0, 1]),
        make("Shape", ["x6"], ["shape"], start=1, end=2),
        make("Concat", [integers(1), "shape", integers(4)], ["start"], axis=0),
        make("Expand", ["zero", "start"], ["zeros"]),
    ]
    arrays["zero"] = np.zeros((), np.float32)
    for way, direction in (("f", "forward"), ("b", "reverse")):
        inputs = ["x6", f"W{way}", f"R{way}", f"B{way}", "", "zeros", "zeros"]
        nodes += [
            make("LSTM", inputs, [f"Y{way}"], name=f"lstm {way}", hidden_size=4, direction=direction),
            make("Squeeze", [f"Y{way}", integers(1)], [f"y{way}"]),
            make("Transpose", [f"y{way}"], [f"z{way}"], perm=[1, 0, 2]),
        ]
    nodes += [
        make("Concat", ["zf", "zb"], ["both"], name="both", axis=-1),
        make("Reshape", ["both", integers(-1, 8)], ["rows"]),
        make("MatMul", ["rows", "dense"], ["product"], name="dense"),
        make("Add", ["product", "bias"], ["sum"], name="dense add"),
        make("Shape", ["both"], ["lengths"], start=0, end=2),
        make("Concat", ["lengths", integers(2)], ["target"], axis=0),
        make("Reshape", ["sum", "target"], ["again"]),
        make("Softmax", ["again"], ["out"], name="softmax", axis=-1),
    ]
    made = model(nodes, {"x": (TensorProto.FLOAT, ["B", "T", 3])}, {"out": 3}, arrays | lists)
    path = write(tmp_path / "net.onnx", made)
    net = compare(path, {"x": floats(2, 6, 3)})
    kinds = [(name, type(node).__name__) for name, node in zip(net.names, net.nodes, strict=True)]
    assert kinds == [("conv", "Conv1D"), ("both", "Bidirectional"), ("dense", "Dense")]
    assert net.nodes[0].padding == "causal"


@pytest.mark.parametrize("old", [False, True])
def test_weights_that_are_inputs_too(tmp_path, old):
    """Files before version 4 of the format list their initializers among the inputs."""
    made = lengths_model()
    if old:
        made.ir_version = 3
    for tensor in made.graph.initializer:
        made.graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, list(tensor.dims)))
    assert adapter.load(write(tmp_path / "net.onnx", made)).inputs == ("X",)
