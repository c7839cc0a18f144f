"""LiGRU, attention and joint layer normalisation compared with the modules that have them in other packages."""

import pytest
import tolerances
import torch

from cellstack import layers, load

pytestmark = pytest.mark.models
B, T, I, H = 3, 7, 5, 6  # noqa: E741
SMALL = 10 * tolerances.REFERENCE_DOUBLE


def columns(weight, order, ours):
    """Return the weights of an nn.Linear as columns, with the gates in our order."""
    rows = dict(zip(order, weight.chunk(len(order)), strict=True))
    return torch.cat([rows[gate] for gate in ours]).T


def compared(ours, theirs, x, seen=lambda x: x):
    """Compare outputs and the gradients of x. `theirs` is a function of x; `seen` is what our layer gets."""
    mine, other = (x.clone().requires_grad_() for _ in range(2))
    y, expected = ours(seen(mine)), theirs(other)
    torch.testing.assert_close(y, expected, rtol=0, atol=SMALL)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=SMALL)
    found = torch.from_numpy(load(ours)(seen(x).numpy()))
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=SMALL)


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh", "leaky_relu"])
def test_a_ligru_is_that_of_speechbrain(nonlinearity):
    theirs = pytest.importorskip("speechbrain.nnet.RNN").LiGRU_Layer(I, H, 1, B, nonlinearity=nonlinearity).double()
    norm = theirs.norm
    with torch.no_grad():
        for array in (norm.weight, norm.bias, norm.running_mean):
            array.copy_(torch.randn_like(array))
    theirs.eval()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    phi = {"leaky_relu": "leaky_relu(0.01)"}.get(nonlinearity, nonlinearity)
    ours = layers.LiGRU(H, phi, return_sequences=True, input_size=I, dtype="float64")
    with torch.no_grad():
        ours.cell.kernel.copy_(columns(scale[:, None] * theirs.w.weight, "gz", "zg"))
        ours.cell.recurrent_kernel.copy_(columns(theirs.u.weight, "gz", "zg"))
        ours.cell.bias.copy_(columns((norm.bias - scale * norm.running_mean)[:, None], "gz", "zg")[0])
    compared(ours, theirs, torch.randn(B, T, I, dtype=torch.float64))


@pytest.mark.parametrize("name", ["AUGRUCell", "AGRUCell"])
def test_an_attention_is_that_of_deepctr(name):
    cell = getattr(pytest.importorskip("deepctr_torch.layers.sequence"), name)(I, H).double()
    with torch.no_grad():
        for array in cell.parameters():
            array.copy_(0.5 * torch.randn_like(array))
    ours = layers.GRU(H, attention=True, return_sequences=True, input_size=I + 1, dtype="float64")
    if name == "AGRUCell":
        gates = {"z": "affine(0, 0)"}
        ours = layers.GRU(
            H, attention=True, gate_activations=gates, return_sequences=True, input_size=I + 1, dtype="float64"
        )
    sign = torch.tensor([1.0, -1.0, 1.0]).repeat_interleave(H)[:, None]  # their update gate is 1 - z: z of -v
    with torch.no_grad():
        ours.cell.kernel.copy_(columns(sign * cell.weight_ih, "rzg", "zrg"))
        ours.cell.recurrent_kernel.copy_(columns(sign * cell.weight_hh, "rzg", "zrg"))
        biases = [columns(sign * bias[:, None], "rzg", "zrg")[0] for bias in (cell.bias_ih, cell.bias_hh)]
        ours.cell.bias.copy_(torch.stack(biases))

    def theirs(x):
        h, every = x.new_zeros(B, H), []
        for t in range(T):
            h = cell(x[:, t, :-1], h, x[:, t, -1])
            every.append(h)
        return torch.stack(every, dim=1)

    x = torch.randn(B, T, I + 1, dtype=torch.float64)
    x[..., -1] = torch.rand(B, T)
    compared(ours, theirs, x)


def test_joint_layer_normalisation_is_that_of_torchaudio():
    rnnt = pytest.importorskip("torchaudio.models.rnnt")
    theirs = rnnt._CustomLSTM(I, H, layer_norm=True, layer_norm_epsilon=1e-3).double()
    with torch.no_grad():
        for norm in (theirs.g_norm, theirs.c_norm):
            norm.weight.copy_(1.0 + 0.5 * torch.randn_like(norm.weight))
            norm.bias.copy_(torch.randn_like(norm.bias))
    ours = layers.LSTM(H, layer_norm="joint", norm_epsilon=1e-3, return_sequences=True, input_size=I, dtype="float64")
    with torch.no_grad():
        ours.cell.kernel.copy_(theirs.x2g.weight.T)
        ours.cell.recurrent_kernel.copy_(theirs.p2g.weight.T)
        ours.cell.bias.copy_(theirs.g_norm.bias)
        ours.cell.kernel_gain.copy_(theirs.g_norm.weight)
        ours.cell.cell_gain.copy_(theirs.c_norm.weight)
        ours.cell.cell_bias.copy_(theirs.c_norm.bias)
    x = torch.randn(B, T, I, dtype=torch.float64)
    compared(ours, lambda x: theirs(x.transpose(0, 1), None)[0].transpose(0, 1), x)
