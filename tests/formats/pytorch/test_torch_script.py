"""TorchScript: settings in the source, and code that isn't PyTorch's."""

import io
import time
import types
import zipfile

import numpy as np
import pytest
import tolerances
import torch
from torch import nn
from torch.nn import functional

import cellstack as cs
from cellstack.formats import pytorch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
OTHER = "its TorchScript code doesn't compute the forward pass of PyTorch's class"
HOOKS = "forward hooks aren't supported"


@pytest.fixture
def saved(tmp_path):
    def saved(scripted):
        path = str(tmp_path / "file.pt")
        scripted.save(path)
        return path

    return saved


def close(path, model, x):
    got = model(x)
    want = (got[0] if isinstance(got, tuple) else got).detach().numpy()
    np.testing.assert_allclose(pytorch.load(path)(x.numpy()), want, atol=tolerances.LOOP, rtol=tolerances.LOOP)


def after(self, input: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    return output * 2


def before(self, input: tuple[torch.Tensor]) -> torch.Tensor:
    return input[0] * 2


def doubled(self, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, self.weight, self.bias) * 2


def without_bias(self, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, self.weight)


def backwards(self, x):
    return self[1](self[0](self[2](x)))


def model(width=3):
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)).eval()


@pytest.mark.parametrize("write", [torch.jit.script, lambda made: torch.jit.trace(made, torch.randn(2, 4, 3))])
def test_supported_layers(saved, write):
    made, x = model(), torch.randn(2, 4, 3)
    close(saved(write(made)), made, x)


@pytest.mark.parametrize("at", ["layer", "whole"])
@pytest.mark.parametrize("how", ["after", "before"])
@pytest.mark.parametrize("traced", [False, True])
def test_hooks_are_refused(saved, at, how, traced):
    made = model()
    place = made[0] if at == "layer" else made
    hook = after if how == "after" else before
    if traced:
        x = torch.randn(2, 4, 3)
        register = place.register_forward_hook if how == "after" else place.register_forward_pre_hook
        register(lambda module, *given: given[-1] * 2 if how == "after" else given[0][0] * 2)
        written = torch.jit.trace(nn.Sequential(made) if at == "whole" else made, x)
    else:
        (place.register_forward_hook if how == "after" else place.register_forward_pre_hook)(hook)
        written = torch.jit.script(made)
    with pytest.raises(cs.FormatError, match=OTHER if traced else f"{HOOKS}|{OTHER}"):
        pytorch.load(saved(written))


CHANGED = [
    (doubled, 4, True),
    (doubled, 5, False),
    (without_bias, 4, True),
    (without_bias, 6, False),
    (backwards, 4, True),
]


@pytest.mark.parametrize(("forward", "width", "traced"), CHANGED)  # torch compiles equal layers only once
def test_changed_forward_passes_are_refused(saved, forward, width, traced):
    made, x = model(width), torch.randn(2, 4, width)
    place, own = made if forward is backwards else made[0], made(x)
    place.forward = types.MethodType(forward, place)
    written = torch.jit.trace(made, x) if traced else torch.jit.script(made)
    assert not torch.allclose(written(x), own)
    with pytest.raises(cs.FormatError, match=OTHER):
        pytorch.load(saved(written))


ALONE = {
    "leaky": lambda: nn.LeakyReLU(0.3),
    "elu": lambda: nn.ELU(0.7),
    "softplus": nn.Softplus,
    "relu6": nn.ReLU6,
    "relu6 in place": lambda: nn.ReLU6(inplace=True),
    "hardtanh": lambda: nn.Hardtanh(-0.5, 0.8),
    "silu": nn.SiLU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "gelu by tanh": lambda: nn.GELU("tanh"),
    "log softmax": lambda: nn.LogSoftmax(-1),
    "hardswish": nn.Hardswish,
    "mish": nn.Mish,
    "normalised": lambda: nn.LayerNorm(3, eps=0.3),
    "dropout": lambda: nn.Dropout(0.3),
}


@pytest.mark.parametrize("what", ALONE)
def test_settings_that_are_also_in_the_code(saved, what):
    made, x = nn.Sequential(nn.Linear(3, 3), ALONE[what]()).eval(), torch.randn(2, 4, 3)
    close(saved(torch.jit.script(made)), made, x)
    close(saved(torch.jit.trace(made, x)), made, x)


def steeper(self, x: torch.Tensor) -> torch.Tensor:
    return functional.leaky_relu(x, 0.8)


def test_a_setting_that_contradicts_the_code_is_refused(saved):
    made = nn.Sequential(nn.Linear(3, 3), nn.LeakyReLU(0.45)).eval()
    made[1].forward = types.MethodType(steeper, made[1])
    with pytest.raises(cs.FormatError, match=OTHER):
        pytorch.load(saved(torch.jit.script(made)))


def test_a_single_recurrent_layer_with_more_code_is_refused(saved):
    layer = nn.LSTM(3, 4, batch_first=True).eval()
    layer.register_forward_hook(lambda module, given, output: (output[0] * 2, output[1]))
    x = torch.randn(2, 5, 3)
    with pytest.raises(cs.FormatError, match=OTHER):
        pytorch.load(saved(torch.jit.trace(nn.Sequential(layer), x)))
    layer = nn.LSTM(3, 4, batch_first=True).eval()
    own = layer.forward
    layer.forward = lambda x: own(x * 2)
    path = saved(torch.jit.trace(layer, x))
    with pytest.raises(cs.FormatError, match=OTHER):
        pytorch.load(path)
    assert list(pytorch.extract(path)) == [""]  # regardless of the code


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("traced", [False, True])
def test_the_nonlinearity_of_an_rnn_is_read_from_the_source(saved, traced, activation):
    layer, x = nn.RNN(3, 4, batch_first=True, nonlinearity=activation).eval(), torch.randn(2, 5, 3)
    path = saved(torch.jit.trace(layer, x) if traced else torch.jit.script(layer))
    close(path, layer, x)
    (network,) = pytorch.extract(path).values()
    assert "assumed" not in network.metadata
    assert network.nodes[0].cells[0].spec.activation == activation


def test_an_rnn_without_its_nonlinearity_in_the_source_is_refused(saved):
    path = saved(torch.jit.trace(nn.RNNCell(3, 4, nonlinearity="relu").eval(), torch.randn(2, 3)))
    for read in (pytorch.load, pytorch.extract):
        with pytest.raises(cs.FormatError, match="the file doesn't specify nonlinearity"):
            read(path)


def test_source_of_many_classes_is_read_once(tmp_path):
    """One module with 200 class names, whose source is long and empty, in a zip of many members."""
    kind = b"c__torch__.torch.nn.modules.activation\nReLU%d\n)\x81}X\x08\0\0\0trainingNsb"
    layers = b"".join(b"X\x03\0\0\0%03d" % n + kind % n for n in range(200))
    body = b"\x80\x02c__torch__.torch.nn.modules.container\nSequential\n)\x81}(" + layers + b"ub."
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", body)
        archive.writestr("archive/code/__torch__/torch/nn/modules/activation.py", "")
        for n in range(8000):
            archive.writestr(f"archive/data/{n}", b"")
    path = tmp_path / "file.pt"
    path.write_bytes(file.getvalue())
    start = time.process_time()
    with pytest.raises(cs.FormatError, match="the file doesn't hold the source of its class"):
        pytorch.load(str(path))
    assert time.process_time() - start < 10
