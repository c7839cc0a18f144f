"""The CfC compared with the package ncps: a sequence, its state, and the gradients, also with respect to the times."""

import pytest
import torch

from cellstack import layers

I, H, B, T = 3, 6, 2, 7


@pytest.fixture(params=["default", "no_gate"])
def both(request):
    """Return ncps's cell without a backbone, and a layer with its weights; in float64."""
    cell = pytest.importorskip("ncps.torch").CfCCell(I, H, request.param, backbone_layers=0).double()
    torch.nn.init.normal_(cell.ff1.bias)
    layer = layers.CfC(
        H,
        mode=request.param,
        timespans=True,
        return_sequences=True,
        return_state=True,
        input_size=I + 1,
        dtype="float64",
    )
    parts = [cell.ff1, cell.ff2, cell.time_a, cell.time_b]
    of_x, of_h = torch.cat([part.weight for part in parts]).T.split([I, H])
    with torch.no_grad():
        layer.cell.kernel.copy_(of_x)
        layer.cell.recurrent_kernel.copy_(of_h)
        layer.cell.bias.copy_(torch.cat([part.bias for part in parts]))
    return cell, layer


def theirs(cell, x, times, h):
    """Return the outputs of ncps's cell, step by step."""
    outs = []
    for step, elapsed in zip(x.unbind(1), times.unbind(1), strict=True):
        h, _ = cell(step, h, elapsed[:, None])
        outs.append(h)
    return torch.stack(outs, dim=1)


def test_a_cfc_is_that_of_ncps(both):
    cell, layer = both
    torch.manual_seed(0)
    x, h = torch.randn(B, T, I, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)
    times = torch.rand(B, T, dtype=torch.float64) * 4 - 1
    given = [one.requires_grad_() for one in (x, times, h)]
    expected = theirs(cell, *given)
    y, last = layer(torch.cat([x, times[..., None]], dim=-1), initial_state=h)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(last, expected[:, -1], rtol=0, atol=1e-14)
    weights = torch.randn_like(y)
    slopes = torch.autograd.grad((y * weights).sum(), given)
    for ours, other in zip(slopes, torch.autograd.grad((expected * weights).sum(), given), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-13)


def test_without_timespans_every_step_takes_a_time_of_1(both):
    cell, layer = both
    plain = layers.CfC(H, mode=cell.mode, return_sequences=True, input_size=I, dtype="float64")
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(B, T, I, dtype=torch.float64)
    expected = theirs(cell, x, torch.ones(B, T, dtype=torch.float64), torch.zeros(B, H, dtype=torch.float64))
    torch.testing.assert_close(plain(x), expected, rtol=0, atol=1e-14)
