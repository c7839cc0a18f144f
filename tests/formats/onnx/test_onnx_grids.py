"""Exported modules with 2-D convolutions, attention, and norms over time, compared with the module."""

import warnings

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnx_graphs import model, run, write
from torch import nn

import cellstack as cs
from cellstack import Network
from cellstack.cells.errors import FormatError, ShapeError
from cellstack.formats import onnx as adapter
from cellstack.nodes import Dense, GroupedDense, Scale

T = {0: "batch", 1: "steps"}


def exported(module, x, path, axes=T):
    """The network of a module with random statistics, for any batch and number of steps."""
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.running_mean.uniform_(-1, 1)
            part.running_var.uniform_(0.5, 2)
    module.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (x,), str(path), input_names=["x"], output_names=["y"], dynamo=False, dynamic_axes={"x": axes}
        )
    return adapter.read_whole(str(path))


class OfSpectra(nn.Module):
    """Spectra [B, T, F] through 2-D layers, then a GRU over time."""

    def __init__(self, front, width):
        super().__init__()
        self.front, self.rnn = front, nn.GRU(width, 4, batch_first=True)

    def forward(self, x):
        y = self.front(x[:, None])
        return self.rnn(y.permute(0, 2, 1, 3).flatten(2))[0]


class Glu(nn.Module):
    def forward(self, x):
        return nn.functional.glu(x, 1)


class Excited(nn.Module):
    """Channels weighted by a function of their means over time and frequencies."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.first(x)
        return y * torch.sigmoid(self.second(nn.functional.adaptive_avg_pool2d(y, 1)))


class Swapped(nn.Module):
    """Pooling of [B, T, C, F] over F: time has the place of the channels."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(1, 3, 3, padding=1), nn.MaxPool2d((1, 2))

    def forward(self, x):
        return self.pool(self.conv(x).permute(0, 2, 1, 3)).permute(0, 2, 1, 3)


class Computed(nn.Module):
    """A convolution whose weights are computed from parameters."""

    def __init__(self):
        super().__init__()
        self.low = nn.Parameter(torch.linspace(-0.2, 0.4, 4)[:, None])
        self.band = nn.Parameter(torch.linspace(0.1, 0.9, 4)[:, None])

    def forward(self, x):
        n = torch.arange(1, 4)[None] / 3
        high = torch.clamp(self.low.abs() + self.band.abs(), 0.1, 1.2)
        weights = torch.sin(high @ n) - torch.cos(self.low @ n) + torch.sqrt(high)
        return nn.functional.conv2d(x, weights.reshape(4, 1, 1, 3))


FRONTS = {
    "conv, norm, pool": (
        nn.Sequential(
            nn.Conv2d(1, 4, (3, 3), padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d((1, 2)),
            nn.Conv2d(4, 3, (3, 3), padding=(1, 0)), nn.BatchNorm2d(3), nn.ELU(), nn.AvgPool2d((1, 2)),
        ),
        3,
    ),
    "over frequencies": (nn.Sequential(nn.Conv2d(1, 3, (1, 3), (1, 2)), nn.Conv2d(3, 2, (1, 3)), nn.Tanh()), 2),
    "glu": (nn.Sequential(nn.Conv2d(1, 4, (2, 3), padding=(1, 1)), Glu(), nn.LeakyReLU(0.1)), 16),
    "padded": (nn.Sequential(nn.ReflectionPad2d((1, 1, 0, 0)), nn.ZeroPad2d((0, 0, 2, 0)), nn.Conv2d(1, 2, 3)), 16),
    "reflected steps": (nn.Sequential(nn.ReflectionPad2d((1, 1, 2, 1)), nn.Conv2d(1, 2, 3)), 16),
    "repeated edges": (nn.Sequential(nn.ReplicationPad2d((0, 2, 0, 2)), nn.Conv2d(1, 2, 3)), 16),
    "squeeze and excitation": (Excited(), 32),
    "steps as channels": (Swapped(), 12),
    "computed weights": (Computed(), 24),
    "transposed": (
        nn.Sequential(
            nn.Conv2d(1, 4, (1, 3), (1, 2)), nn.ConvTranspose2d(4, 2, (1, 3), (1, 2), output_padding=(0, 1), groups=2)
        ),
        16,
    ),
    "layer norm": (nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.LayerNorm(8), nn.PReLU()), 24),
    "instance norm": (nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.InstanceNorm2d(3, affine=True)), 24),
    "depthwise": (nn.Sequential(nn.Conv2d(1, 3, 1), nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.AvgPool2d((1, 8))), 3),
}  # fmt: skip


def compared(net, module, x, tolerance=1e-5):
    ours, theirs = net(x.numpy()), module(x).detach().numpy()
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", FRONTS)
def test_two_dimensional_layers_before_a_recurrent_one(name, tmp_path):
    torch.manual_seed(0)
    front, width = FRONTS[name]
    module = OfSpectra(front, width)
    net = exported(module, torch.randn(2, 9, 8), tmp_path / "net.onnx")
    for rows, steps in ((2, 9), (3, 14), (1, 5)):
        compared(net, module, torch.randn(rows, steps, 8))


def test_too_few_steps_to_reflect_are_rejected(tmp_path):
    """Also without lengths in the file: PyTorch rejects them too."""
    net = exported(OfSpectra(FRONTS["reflected steps"][0], 16), torch.randn(2, 9, 8), tmp_path / "net.onnx")
    assert net(np.zeros((1, 3, 8), np.float32)).shape == (1, 4, 4)
    with pytest.raises(ValueError, match="more than 2 entries"):
        net(np.zeros((1, 2, 8), np.float32))


def test_vectors_of_length_1(tmp_path):
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)

        def forward(self, x):
            return nn.functional.normalize(self.rnn(x)[0][:, -1], dim=1)

    torch.manual_seed(2)
    module = Normalised()
    net = exported(module, torch.randn(2, 9, 3), tmp_path / "net.onnx")
    for rows, steps in ((2, 9), (3, 5)):
        compared(net, module, torch.randn(rows, steps, 3))


def test_a_causal_grid_is_streamed(tmp_path):
    torch.manual_seed(1)
    module = OfSpectra(FRONTS["padded"][0], 16)
    net = exported(module, torch.randn(2, 9, 8), tmp_path / "net.onnx")
    x = torch.randn(2, 12, 8).numpy()
    whole, stream = net(x), net.stream(2)
    np.testing.assert_array_equal(np.stack([stream.step(x[:, t]) for t in range(12)], 1), whole)


class Pooled(nn.Module):
    """A GRU, and attention pooling."""

    def __init__(self, how):
        super().__init__()
        self.how, self.rnn, self.score = how, nn.GRU(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        y, h = self.rnn(x)
        if self.how == "products":
            return (torch.softmax(self.score(torch.tanh(y)), 1) * y).sum(1)
        if self.how == "squeezed":
            return (torch.softmax(self.score(y).squeeze(-1), -1)[..., None] * y).sum(1)
        if self.how == "matmul":
            return torch.bmm(torch.softmax(self.score(y), 1).transpose(1, 2), y)[:, 0]
        if self.how == "last state":
            scores = torch.softmax(torch.bmm(y, h[-1][:, :, None]), 1)
            return torch.bmm(y.transpose(1, 2), scores)[..., 0]
        if self.how == "statistics":
            mean = y.mean(1, keepdim=True)
            return torch.cat([mean[:, 0], torch.sqrt(((y - mean) ** 2).mean(1) + 1e-5)], -1)
        if self.how == "norm":
            return h[-1] / h[-1].norm(dim=1, keepdim=True)
        mean = y.mean((1, 2), keepdim=True)
        return ((y - mean) / torch.sqrt(((y - mean) ** 2).mean((1, 2), keepdim=True) + 1e-5)).sum(1)


@pytest.mark.parametrize("how", ["products", "squeezed", "matmul", "last state", "statistics", "norm", "global norm"])
def test_attention_pooling(how, tmp_path):
    torch.manual_seed(2)
    module = Pooled(how)
    net = exported(module, torch.randn(2, 6, 3), tmp_path / "net.onnx")
    for rows, steps in ((2, 6), (3, 11), (1, 2)):
        compared(net, module, torch.randn(rows, steps, 3))
    if how != "norm":
        with pytest.raises(ValueError, match=r"whole sequence|over time|one vector"):
            net.stream()


class SelfAttention(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.heads, self.rnn, self.parts = heads, nn.LSTM(3, 6, batch_first=True), nn.Linear(6, 18)

    def forward(self, x):
        y = self.rnn(x)[0]
        q, k, v = self.parts(y).chunk(3, -1)
        if self.heads > 1:
            q, k, v = (one.reshape(one.shape[0], one.shape[1], self.heads, -1).transpose(1, 2) for one in (q, k, v))
        y = torch.softmax(q @ k.transpose(-1, -2) / 1.5, -1) @ v
        return y if self.heads == 1 else y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("heads", [1, 3])
def test_self_attention(heads, tmp_path):
    torch.manual_seed(3)
    module = SelfAttention(heads)
    net = exported(module, torch.randn(2, 6, 3), tmp_path / "net.onnx")
    assert sum(type(node).__name__ == "Attention" for node in net.nodes) == 1
    for rows, steps in ((2, 6), (3, 11)):
        compared(net, module, torch.randn(rows, steps, 3))


G, IN, OUT = 3, 4, 5
SPLIT = {  # how [B, T, G·IN] times [G, IN, OUT] is written, without the GRU after it
    "transposed": lambda x, w: (x.unflatten(2, (G, IN)).transpose(1, 2) @ w).transpose(1, 2).flatten(2),
    "groups first": lambda x, w: (
        (x.unflatten(2, (G, IN)).permute(2, 0, 1, 3) @ w[:, None]).permute(1, 2, 0, 3).flatten(2)
    ),
    "rows": lambda x, w: (x.unflatten(2, (G, 1, IN)) @ w).flatten(2),
    "columns": lambda x, w: (w.transpose(1, 2) @ x.unflatten(2, (G, IN, 1))).flatten(2),
    "channels": lambda x, w: (
        (w.transpose(1, 2) @ x.transpose(1, 2).unflatten(1, (G, IN))).flatten(1, 2).transpose(1, 2)
    ),
    "bmm": lambda x, w: (
        torch.bmm(x.reshape(-1, G, IN).transpose(0, 1), w).transpose(0, 1).reshape(*x.shape[:2], G * OUT)
    ),
    "bmm, time in between": lambda x, w: (
        torch.bmm(x.unflatten(2, (G, IN)).permute(2, 0, 1, 3).reshape(G, -1, IN), w)
        .reshape(G, *x.shape[:2], OUT)
        .permute(1, 2, 0, 3)
        .flatten(2)
    ),
    "bias": lambda x, w: (x.unflatten(2, (G, IN)).transpose(1, 2) @ w + w[:, :1]).transpose(1, 2).flatten(2),
    "einsum": lambda x, w: torch.einsum("btgi,gio->btgo", x.unflatten(2, (G, IN)), w).flatten(2),
    "einsum, other order": lambda x, w: torch.einsum(
        "...gi,igo->...go", x.unflatten(2, (G, IN)), w.transpose(0, 1)
    ).flatten(2),
    "einsum, weights first": lambda x, w: torch.einsum("gio,btgi->btgo", w, x.unflatten(2, (G, IN))).flatten(2),
    "einsum, groups first": lambda x, w: (
        torch.einsum("btgi,gio->gbto", x.unflatten(2, (G, IN)), w).permute(1, 2, 0, 3).flatten(2)
    ),
    "interleaved": lambda x, w: (x.unflatten(2, (IN, G)).permute(0, 3, 1, 2) @ w).permute(0, 2, 1, 3).flatten(2),
    "a sum over groups": lambda x, w: torch.cat([(x.unflatten(2, (G, 1, IN)) @ w).sum(2).flatten(2)] * G, 2),
}
WHOLE = {  # the same of weights [IN, G·OUT]: each group takes the whole input
    "einsum": lambda x, w: torch.einsum("bti,io->bto", x, w),
    "einsum, turned": lambda x, w: torch.einsum("...x,yx->...y", x, w.T),
    "einsum, heads": lambda x, w: torch.einsum("bti,igo->btgo", x, w.unflatten(1, (G, OUT))).flatten(2),
    "heads": lambda x, w: (x[:, None] @ w.unflatten(1, (G, OUT)).transpose(0, 1)).transpose(1, 2).flatten(2),
}


class Products(nn.Module):
    """A product with weights, and a GRU."""

    def __init__(self, product, *shape):
        super().__init__()
        self.product, self.weights = product, nn.Parameter(torch.randn(shape))
        self.rnn = nn.GRU(G * OUT, 3, batch_first=True)

    def forward(self, x):
        return self.rnn(self.product(x, self.weights))[0]


@pytest.mark.parametrize("name", SPLIT)
def test_a_product_of_groups_of_features_with_a_matrix_each(name, tmp_path):
    torch.manual_seed(6)
    module = Products(SPLIT[name], G, IN, OUT)
    net = exported(module, torch.randn(2, 7, G * IN), tmp_path / "net.onnx")
    (grouped,) = (node for node in net.nodes if node.parameters and not node.cells)
    assert isinstance(grouped, GroupedDense)
    assert (grouped.bias is not None) == (name == "bias")
    for rows, steps in ((2, 7), (3, 10)):
        compared(net, module, torch.randn(rows, steps, G * IN))


@pytest.mark.parametrize("name", WHOLE)
def test_a_product_of_all_features(name, tmp_path):
    torch.manual_seed(6)
    module = Products(WHOLE[name], IN, G * OUT)
    net = exported(module, torch.randn(2, 7, IN), tmp_path / "net.onnx")
    assert [type(node).__name__ for node in net.nodes] == ["Dense", "Recurrent"]
    for rows, steps in ((2, 7), (3, 10)):
        compared(net, module, torch.randn(rows, steps, IN))


class OfVectors(nn.Module):
    """A product of groups of the last state's features."""

    def __init__(self):
        super().__init__()
        self.rnn, self.weights = nn.GRU(5, G * IN, batch_first=True), nn.Parameter(torch.randn(G, IN, OUT))

    def forward(self, x):
        h = self.rnn(x)[1][0]
        return torch.bmm(h.view(-1, G, IN).transpose(0, 1), self.weights).transpose(0, 1).reshape(-1, G * OUT)


def test_a_product_of_groups_without_time(tmp_path):
    module = OfVectors()
    net = exported(module, torch.randn(2, 7, 5), tmp_path / "net.onnx")
    assert [type(node).__name__ for node in net.nodes] == ["Recurrent", "GroupedDense"]
    compared(net, module, torch.randn(3, 4, 5))


@pytest.mark.long
@pytest.mark.parametrize("name", ["bmm", "bmm, time in between", "rows", "einsum"])
def test_a_product_of_groups_in_a_file_for_any_batch(name, tmp_path):
    """PyTorch's newer exporter writes the other lengths as numbers: the graph doesn't say which axis is which."""
    module, x = Products(SPLIT[name], G, IN, OUT).eval(), torch.randn(2, 7, G * IN)
    file = str(tmp_path / "net.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch")
        torch.onnx.export(module, (x,), file, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    compared(adapter.read_whole(file), module, torch.randn(3, 7, G * IN))


def test_a_matrix_for_each_step_is_refused(tmp_path):
    module = Products(lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), 7, 2, G * OUT)
    with pytest.raises(FormatError, match="expected weights for the feature axes"):
        exported(module, torch.randn(2, 7, 2), tmp_path / "net.onnx")


class Outer(nn.Module):
    """An einsum that isn't a product of the last axis."""

    def __init__(self):
        super().__init__()
        self.weights, self.rnn = nn.Parameter(torch.randn(4, 4)), nn.GRU(4, 3, batch_first=True)

    def forward(self, x):
        return self.rnn(torch.einsum("btc,cc->btc", x, self.weights))[0]


def test_another_einsum_is_refused_by_name(tmp_path):
    with pytest.raises(FormatError, match="Einsum"):
        exported(Outer(), torch.randn(2, 7, 4), tmp_path / "net.onnx")


class OfChannels(nn.Module):
    """Layers over [B, C, T] in a module that takes [B, T, C]."""

    def __init__(self, *layers):
        super().__init__()
        self.layers, self.rnn = nn.Sequential(*layers), nn.GRU(4, 3, batch_first=True)

    def forward(self, x):
        return self.rnn(self.layers(x.transpose(1, 2)).transpose(1, 2))[0]


@pytest.mark.parametrize(
    "layers",
    [
        (nn.GroupNorm(2, 4),),
        (nn.GroupNorm(1, 4), nn.Conv1d(4, 4, 3)),
        (nn.InstanceNorm1d(4, affine=True),),
        (nn.ConvTranspose1d(4, 4, 3, stride=2, padding=1, output_padding=1),),
        (nn.ConvTranspose1d(4, 4, 4, groups=2),),
    ],
    ids=["group", "global", "instance", "transposed", "grouped"],
)
def test_norms_over_time_and_transposed_convolutions(layers, tmp_path):
    torch.manual_seed(4)
    module = OfChannels(*layers)
    for part in module.layers.parameters():
        nn.init.normal_(part)
    net = exported(module, torch.randn(2, 7, 4), tmp_path / "net.onnx")
    for rows, steps in ((2, 7), (3, 10)):
        compared(net, module, torch.randn(rows, steps, 4), 2e-5)


class Masked(nn.Module):
    """Magnitudes [B, C, F, T], whose rows and steps are merged for a linear layer, times a mask."""

    def __init__(self):
        super().__init__()
        self.into, self.rnn, self.out = nn.Linear(10, 6), nn.LSTM(6, 3, bidirectional=True), nn.Linear(6, 14)

    def forward(self, x):
        y = x.permute(3, 0, 1, 2)
        steps, rows, channels, _ = y.shape
        y = torch.tanh(self.into(y[..., :5].reshape(-1, channels * 5))).reshape(steps, rows, 6)
        y = self.out(self.rnn(y)[0].reshape(-1, 6)).reshape(steps, rows, channels, 7)
        return torch.relu(y).permute(1, 2, 3, 0) * x


def test_features_in_two_axes_before_time(tmp_path):
    torch.manual_seed(5)
    module = Masked()
    net = exported(module, torch.rand(2, 2, 7, 9), tmp_path / "net.onnx", {0: "batch", 3: "steps"})
    assert net.metadata["onnx"]["inputs"] == {"x": "BCFT"}
    for rows, steps in ((2, 9), (3, 12)):
        x = torch.rand(rows, 2, 7, steps)
        ours = net(x.permute(0, 3, 1, 2).flatten(2).numpy())
        theirs = module(x).permute(0, 3, 1, 2).flatten(2).detach().numpy()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_a_reshape_that_mixes_time_and_features_is_refused(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.conv = nn.GRU(4, 4, batch_first=True), nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x):
            return self.conv(self.rnn(x)[0][:, None]).reshape(x.shape[0], 8, -1)

    with pytest.raises(adapter.FormatError, match=r"Reshape .*: the shape must keep batch, time and features separate"):
        exported(Mixed(), torch.randn(2, 6, 4), tmp_path / "net.onnx")


def floats(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_automatic_padding_of_strided_steps_is_that_of_the_file_s_number_of_steps(tmp_path):
    nodes = [
        helper.make_node("Conv", ["X", "W"], ["c"], auto_pad="SAME_UPPER", strides=[2, 1]),
        helper.make_node("Transpose", ["c"], ["t"], perm=[2, 0, 1, 3]),  # [T, B, C, F]
        helper.make_node("Reshape", ["t", "shape"], ["s"]),
        helper.make_node("LSTM", ["s", "k", "r"], ["Y"], hidden_size=3),
    ]
    arrays = {"W": floats(2, 1, 3, 3), "k": floats(1, 12, 8), "r": floats(1, 12, 3), "shape": np.array([0, 0, 8])}
    path = write(tmp_path / "n.onnx", model(nodes, {"X": (TensorProto.FLOAT, ["B", 1, 8, 4])}, ["Y"], arrays))
    net, x = adapter.load(path), floats(2, 1, 8, 4)
    np.testing.assert_allclose(net(x[:, 0]), run(path, {"X": x})[0][:, 0].transpose(1, 0, 2), atol=1e-6)
    with pytest.raises(ShapeError, match="8"):
        net(x[:, 0, :7])


@pytest.mark.parametrize("biased", [False, True])
def test_a_grouped_dense_is_read_back(biased, tmp_path):
    """Its product, one matrix per entry of the outer of two feature axes; the bias becomes a node of its own."""
    rng = np.random.default_rng(0)
    bias = rng.normal(size=12).astype("f4") if biased else None
    net = Network([GroupedDense(rng.normal(size=(3, 2, 4)).astype("f4"), bias)], inputs={"x": (None, 6)})
    net.save(tmp_path / "net.onnx")
    loaded, x = cs.load(tmp_path / "net.onnx"), rng.normal(size=(2, 5, 6)).astype("f4")
    assert isinstance(loaded.nodes[0], GroupedDense)
    np.testing.assert_allclose(loaded(x), net(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("shape", "kind"), [((1, 4, 3), Dense), ((3, 1, 1), Scale)])
def test_a_single_block_is_a_matrix_and_blocks_of_one_number_are_factors(rng, tmp_path, shape, kind):
    net = Network([GroupedDense(rng.normal(size=shape).astype("f4"), rng.normal(size=3).astype("f4"))])
    net.save(tmp_path / "net.onnx")
    loaded = cs.load(tmp_path / "net.onnx")
    assert isinstance(loaded.nodes[0], kind)
    x = rng.normal(size=(2, 5, shape[0] * shape[1])).astype("f4")
    np.testing.assert_allclose(loaded(x), net(x), rtol=0, atol=1e-6)
