"""Modules written by PyTorch's two exporters, loaded and compared with ONNX Runtime."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_graphs import EIGHT_BITS, compare, export, model, run, write
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn

from cellstack.cells.errors import FormatError
from cellstack.formats import onnx as adapter


def random_norm(norm):
    """A norm with random parameters, and statistics if it has them, for each feature."""
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    if isinstance(norm, nn.BatchNorm1d):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


class Front(nn.Module):
    """Layers before a GRU, on channels or on features, and a head on each step."""

    def __init__(self, *front, channels=True):
        super().__init__()
        self.front, self.channels = nn.Sequential(*front), channels
        self.rnn, self.head = nn.GRU(5 if channels else 3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        y = self.front(x.transpose(1, 2)).transpose(1, 2) if self.channels else self.front(x)
        return self.head(self.rnn(y)[0])


class Head(nn.Module):
    """An activation between an LSTM's last h and a head of one number."""

    def __init__(self, activation):
        super().__init__()
        self.rnn, self.hidden, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 6), nn.Linear(6, 1)
        self.activation = activation

    def forward(self, x):
        return self.head(self.activation(self.hidden(self.rnn(x)[1][0].squeeze(0)))).squeeze(-1)


class WrittenOut(nn.Module):
    """A layer norm from means and powers."""

    def __init__(self, root):
        super().__init__()
        self.gain, self.bias, self.root = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3)), root

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True) + 1e-5
        normed = centred / torch.sqrt(variance) if self.root else centred * torch.rsqrt(variance)
        return normed * self.gain + self.bias


class Windows(nn.Module):
    """Six numbers of a head as three steps of two."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 6)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1]).view(x.shape[0], 3, 2)


def conv(*given, **named):
    return nn.Conv1d(3, 5, *given, **named)


FRONTS = {
    "same": lambda: Front(conv(3, padding="same"), nn.ReLU()),
    "same, even": lambda: Front(conv(4, padding="same"), nn.SiLU()),
    "strided, batch norm": lambda: Front(random_norm(nn.BatchNorm1d(3)), conv(3, padding=1, stride=2)),
    "prelu": lambda: Front(conv(3), nn.PReLU()),
    "max": lambda: Front(conv(3), nn.MaxPool1d(3, 2)),
    "max, padded": lambda: Front(conv(3), nn.ReLU(), nn.MaxPool1d(3, 2, padding=1)),
    "max, padded, up": lambda: Front(conv(3), nn.ReLU(), nn.MaxPool1d(3, 2, padding=1, ceil_mode=True)),
    "max, up": lambda: Front(conv(3), nn.MaxPool1d(2, ceil_mode=True)),
    "mean": lambda: Front(conv(3), nn.AvgPool1d(3, 2)),
    "mean, padded": lambda: Front(conv(3), nn.AvgPool1d(3, 2, padding=1)),
    "mean, up": lambda: Front(conv(3), nn.AvgPool1d(2, ceil_mode=True)),
    "layer norm": lambda: Front(random_norm(nn.LayerNorm(3)), channels=False),
    "layer norm without bias": lambda: Front(random_norm(nn.LayerNorm(3, bias=False)), channels=False),
    "layer norm written out": lambda: Front(WrittenOut(True), channels=False),
    "layer norm written out, inverse": lambda: Front(WrittenOut(False), channels=False),
    "windows": Windows,
}
ACTIVATIONS = {
    "gelu": nn.GELU(),
    "gelu of tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "hardswish": nn.Hardswish(),
    "hardtanh": nn.Hardtanh(-0.5, 0.25),
    "relu6": nn.ReLU6(),
    "selu": nn.SELU(),
    "logsoftmax": nn.LogSoftmax(-1),
}


@pytest.mark.parametrize("steps", [9, 10])
@pytest.mark.parametrize("name", FRONTS)
def test_fronts(tmp_path, name, steps):
    torch.manual_seed(3)
    compare(*export(tmp_path / "net.onnx", FRONTS[name](), (torch.randn(2, steps, 3),)))


@pytest.mark.parametrize("opset", [9, 11, 13, 18])
@pytest.mark.parametrize("name", ["same", "layer norm", "max", "strided, batch norm"])
def test_fronts_at_opsets(tmp_path, name, opset):
    torch.manual_seed(4)
    net = compare(*export(tmp_path / "net.onnx", FRONTS[name](), (torch.randn(2, 9, 3),), opset=opset))
    kinds = [type(node).__name__ for node in net.nodes]
    assert kinds[-2:] == ["Recurrent", "Dense"]
    if name == "layer norm":
        assert kinds[0] == "LayerNorm"
        np.testing.assert_allclose(net.nodes[0].epsilon, 1e-5, rtol=1e-9)


class Chosen(nn.Module):
    """One of two features, at all steps or the last."""

    def __init__(self, choose):
        super().__init__()
        self.front, self.choose = Front(nn.Tanh(), channels=False), choose

    def forward(self, x):
        return self.choose(self.front(x))


CHOICES = {"steps": lambda y: y[:, :, 1], "last step": lambda y: y[:, -1][:, 0], "from the end": lambda y: y[..., -2]}


@pytest.mark.parametrize("name", CHOICES)
def test_one_feature(tmp_path, name):
    torch.manual_seed(6)
    compare(*export(tmp_path / "net.onnx", Chosen(CHOICES[name]), (torch.randn(3, 5, 3),)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(tmp_path, name):
    torch.manual_seed(5)
    compare(*export(tmp_path / "net.onnx", Head(ACTIVATIONS[name]), (torch.randn(3, 5, 3),)))


@pytest.mark.parametrize(
    ("front", "message"),
    [
        (
            nn.MaxPool1d(2, 2, dilation=2),
            r"MaxPool .*: only windows over time are supported, found \[2\] and dilations",
        ),
        (
            nn.AvgPool1d(3, 2, padding=1, ceil_mode=True),
            r"AveragePool .*: ceil_mode with count_include_pad and pads isn't",
        ),
    ],
)
def test_unsupported_fronts(tmp_path, front, message):
    """They are named, and the GRU after them can still be extracted."""
    path, _ = export(tmp_path / "net.onnx", Front(conv(3), front), (torch.randn(2, 9, 3),))
    with pytest.raises(FormatError, match=message):
        adapter.load(path)
    assert [part.cells[0].spec.kind for part in adapter.extract(path).values()] == ["gru"]


class Tagger(nn.Module):
    """Ids to two numbers per step."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(11, 8), nn.Linear(16, 2)
        self.rnn = nn.LSTM(8, 8, 2, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.head(self.rnn(self.table(x))[0])


@pytest.mark.parametrize("per_channel", [False, True])
def test_eight_bits_throughout(tmp_path, per_channel):
    """A model quantised by ONNX Runtime's own tool: weights have 8 bits, x and h stay floats here."""
    torch.manual_seed(9)
    path, feeds = export(tmp_path / "net.onnx", Tagger(), (torch.randint(0, 11, (2, 6)),), opset=17)
    small = str(tmp_path / "small.onnx")
    # reduce_range: without VNNI, ONNX Runtime adds pairs of products in 16 bits, which weights of 8 bits overflow
    quantize_dynamic(path, small, per_channel=per_channel, reduce_range=True, weight_type=QuantType.QInt8)
    kinds = {node.op_type for node in onnx.load(small).graph.node}
    assert {"DynamicQuantizeLSTM", "DynamicQuantizeLinear", "MatMulInteger"} <= kinds
    net = adapter.load(small)
    y, _ = net.run(feeds["in0"])
    for file, least, most in ((small, 0.0, EIGHT_BITS), (path, 1e-6, EIGHT_BITS)):
        (expected,) = run(file, feeds)
        difference = np.abs(y - expected).max()
        assert least <= difference <= most * np.abs(expected).max()
    dense = next(node for node in net.nodes if type(node).__name__ == "Dense")
    steps = np.abs(dense.kernel).max(axis=0 if per_channel else None) / 63
    np.testing.assert_allclose(dense.kernel / steps, np.round(dense.kernel / steps), rtol=0, atol=0.02 * 63)


def test_rounded_values_of_another(tmp_path):
    """A product of one value's integers and another's grain isn't a product of either."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["X"], ["q", "s", "z"]),
        helper.make_node("Tanh", ["X"], ["t"]),
        helper.make_node("DynamicQuantizeLinear", ["t"], ["q2", "s2", "z2"]),
        helper.make_node("MatMulInteger", ["q", "W", "z"], ["p"]),
        helper.make_node("Cast", ["p"], ["c"], to=1),
        helper.make_node("Mul", ["c", "s2"], ["Y"], name="of two"),
    ]
    arrays = {"W": np.arange(6, dtype=np.int8).reshape(3, 2)}
    proto = model(nodes, {"X": (TensorProto.FLOAT, ["B", 3])}, {"Y": 2}, arrays)
    with pytest.raises(
        FormatError, match="Mul 'of two': expected an integer product times its grain, or a grain times scales"
    ):
        adapter.load(write(tmp_path / "net.onnx", proto))


def test_zeros_of_another_width(tmp_path):
    """PyTorch's newer exporter writes an LSTM with a projection as one without, and c of the original width."""
    arrays = {"W": np.ones((1, 20, 3)), "R": np.ones((1, 20, 5)), "h": np.zeros((1, 2, 5)), "c": np.zeros((1, 2, 7))}
    node = helper.make_node("LSTM", ["X", "W", "R", "", "", "h", "c"], ["Y"], name="lstm", hidden_size=5)
    given = {name: array.astype(np.float32) for name, array in arrays.items()}
    proto = model([node], {"X": (TensorProto.FLOAT, ["T", 2, 3])}, ["Y"], given)
    path = write(tmp_path / "net.onnx", proto, check=False)
    for read in (adapter.load, adapter.extract):
        with pytest.raises(FormatError, match=r"'lstm': expected initial_c of \[1, B, 5\], found \(1, 2, 7\)"):
            read(path)
