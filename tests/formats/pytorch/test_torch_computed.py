"""Weights that PyTorch computes: their axis, and conflicts with weights of the same name."""

import numpy as np
import pytest
import tolerances
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations

import cellstack as cs
from cellstack.formats import pytorch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning"),
]
SPECTRAL = {"hook": nn.utils.spectral_norm, "parametrised": parametrizations.spectral_norm}


def close(got, want):
    np.testing.assert_allclose(got, want.detach().numpy(), atol=tolerances.LOOP, rtol=tolerances.LOOP)


@pytest.fixture
def write(tmp_path):
    def write(value):
        path = tmp_path / f"file{len(list(tmp_path.iterdir()))}.pt"
        torch.save(value, path)
        return str(path)

    return write


def normed(how, dim, trained):
    """A square RNN whose recurrent weight has a spectral norm."""
    layer = nn.RNN(5, 5, batch_first=True)
    nn.init.normal_(layer.weight_hh_l0)
    SPECTRAL[how](layer, "weight_hh_l0", dim=dim)
    for _ in range(trained):
        layer.train()(torch.zeros(1, 1, 5))
    return layer.eval()


@pytest.mark.parametrize("trained", [3, 20])
@pytest.mark.parametrize(
    ("how", "dim"), [("hook", 0), ("hook", 1), ("parametrised", 0), ("parametrised", 1), ("parametrised", -1)]
)
def test_spectral_norms_of_either_axis_of_a_square_weight(write, how, dim, trained):
    layer, x = normed(how, dim, trained), torch.randn(2, 6, 5)
    want = layer(x)[0]
    close(cs.load(layer)(x.numpy()), want)
    linear = SPECTRAL[how](nn.Linear(4, 4), dim=dim)
    many = torch.randn(2, 3, 4)
    for _ in range(trained):
        linear.train()(many)
    linear.eval()
    close(cs.load(linear)(many.numpy()), linear(many))
    if how == "hook":  # torch pickles no parametrised module
        close(pytorch.load(write(layer))(x.numpy()), want)
        close(pytorch.load(write(nn.Sequential(linear, nn.ReLU())))(many.numpy()), torch.relu(linear(many)))
    if trained == 20:
        close(pytorch.load(write(layer.state_dict()))(x.numpy()), want)


def test_vectors_that_do_not_determine_the_axis_are_refused(write):
    state = normed("hook", 0, 1).state_dict()
    for name in ("u", "v"):  # as before the first training step
        state[f"weight_hh_l0_{name}"] = nn.functional.normalize(
            torch.arange(5.0) - (1.0 if name == "u" else 3.0), dim=0
        )
    state["weight_hh_l0_orig"] = torch.eye(5) + torch.triu(torch.ones(5, 5), 2)
    with pytest.raises(cs.FormatError, match="the axis of the spectral norm of this square weight can't be determined"):
        pytorch.load(write(state))


def test_a_symmetric_weight_has_the_same_norm_for_both_axes(write):
    layer, x = nn.RNN(5, 5, batch_first=True), torch.randn(2, 6, 5)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1])))
    nn.utils.spectral_norm(layer, "weight_hh_l0")
    want = layer.eval()(x)[0]
    close(pytorch.load(write(layer.state_dict()))(x.numpy()), want)


@pytest.mark.parametrize("change", [nn.utils.weight_norm, nn.utils.spectral_norm, parametrizations.weight_norm])
def test_a_weight_whole_and_in_pieces_is_refused(write, change):
    layer = nn.LSTM(5, 7)
    change(layer, "weight_ih_l0")
    state = {**layer.state_dict(), "weight_ih_l0": torch.zeros(28, 5)}
    for read in (pytorch.load, pytorch.extract):
        with pytest.raises(cs.FormatError, match=r"weight_ih_l0'? is stored both whole and in pieces"):
            read(write(state))


def test_a_weight_whole_and_packed_is_refused(write):
    packed = quantize_dynamic(nn.Sequential(nn.LSTM(5, 7)), {nn.LSTM}, dtype=torch.qint8)
    state = packed.state_dict()
    assert pytorch.extract(write(state))
    whole = {**state, "0.weight_ih_l0": torch.zeros(28, 5)}
    for found in (whole, dict(reversed(whole.items()))):
        with pytest.raises(cs.FormatError, match=r"0\.weight_ih_l0'? is stored both whole and in pieces"):
            pytorch.extract(write(found))


def test_the_last_result_of_a_hook_is_not_read_as_a_weight(write):
    layer, x = nn.utils.weight_norm(nn.LSTM(5, 7, batch_first=True), "weight_ih_l0"), torch.randn(2, 6, 5)
    with torch.no_grad():
        layer.weight_ih_l0_g.mul_(2)
    path = write(layer)  # its weight_ih_l0 is outdated
    close(pytorch.load(path)(x.numpy()), layer(x)[0])
    close(pytorch.extract(path)[""](x.numpy()), layer(x)[0])


@pytest.mark.parametrize("threshold", [20, 1])
def test_a_softplus_with_another_threshold_is_refused(write, threshold):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Softplus(1, threshold)), torch.randn(2, 6, 3)
    if threshold == 20:
        close(cs.load(model)(x.numpy()), model(x))
        close(pytorch.load(write(model))(x.numpy()), model(x))
        return
    with pytest.raises(TypeError, match=r"1 \(Softplus\): expected"):
        cs.load(model)
    with pytest.raises(cs.FormatError, match=r"1 \(torch.nn.modules.activation.Softplus\): expected"):
        pytorch.load(write(model))


def test_quantised_cells_use_the_packed_biases(write):
    cell = quantize_dynamic(nn.Sequential(nn.LSTMCell(5, 7)), {nn.LSTMCell}, dtype=torch.qint8)
    with torch.no_grad():
        before = cell[0](torch.ones(1, 5))[0]
        cell[0].bias_ih.add_(3.0)
        assert torch.equal(cell[0](torch.ones(1, 5))[0], before)  # torch ignores it
    state = cell.state_dict()
    ones = np.ones((1, 1, 5), np.float32)
    for found in (dict(state), dict(reversed(state.items()))):
        got = pytorch.extract(write(found))["0"](ones)
        np.testing.assert_allclose(got[:, 0], before.numpy(), atol=0.02)  # torch quantises the inputs
