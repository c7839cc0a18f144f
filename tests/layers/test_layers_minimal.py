"""minGRU and minLSTM compared with minGRU-pytorch, the implementation of the paper's equations on PyPI."""

import numpy as np
import pytest
import tolerances
import torch
from minGRU_pytorch.minGRU import minGRU
from minGRU_pytorch.minLSTM import minLSTM

from cellstack import layers, load

KINDS = {"mingru": (layers.MinGRU, minGRU, "zg", "gz"), "minlstm": (layers.MinLSTM, minLSTM, "ifg", "gfi")}
UNITS = 6


def pair(kind, dtype=torch.float64):
    """Return our layer and theirs with the same weights: ours has the gates as columns, and a bias of zeros."""
    make, peer, order, their_order = KINDS[kind]
    ours = make(UNITS, use_bias=False, return_sequences=True, input_size=UNITS, dtype=dtype)
    theirs = peer(UNITS, proj_out=False).to(dtype)
    rows = dict(zip(their_order, linear(theirs).weight.detach().chunk(len(order)), strict=True))
    with torch.no_grad():
        ours.cell.kernel.copy_(torch.cat([rows[gate] for gate in order]).T)
    return ours, theirs


def linear(module):
    """Return their only layer with weights."""
    (found,) = (child for child in module.modules() if isinstance(child, torch.nn.Linear))
    return found


@pytest.mark.parametrize("steps", [2, 5, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_of_sequences(kind, steps):
    ours, theirs = pair(kind)
    x = 2.0 * torch.randn(3, steps, UNITS, dtype=torch.float64)
    mine, other = (x.clone().requires_grad_() for _ in range(2))
    y, expected = ours(mine), theirs(other)
    torch.testing.assert_close(y, expected, rtol=0, atol=tolerances.REFERENCE_DOUBLE)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=10 * tolerances.REFERENCE_DOUBLE)
    _, _, order, their_order = KINDS[kind]
    rows = dict(zip(their_order, linear(theirs).weight.grad.chunk(len(order)), strict=True))
    wanted = torch.cat([rows[gate] for gate in order]).T
    scale = max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(ours.cell.kernel.grad, wanted, rtol=0, atol=scale * 10 * tolerances.REFERENCE_DOUBLE)


@pytest.mark.parametrize("kind", KINDS)
def test_other_orders_of_gates_are_other_cells(kind):
    ours, theirs = pair(kind)
    x = torch.randn(3, 5, UNITS, dtype=torch.float64)
    with torch.no_grad():
        ours.cell.kernel.copy_(ours.cell.kernel.roll(UNITS, 1))
    assert (ours(x) - theirs(x)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_steps_from_a_state(kind):
    """Only steps: over a sequence, their minLSTM transforms the state that it is given."""
    ours, theirs = pair(kind)
    x, h = torch.randn(3, 4, UNITS, dtype=torch.float64), torch.rand(3, 1, UNITS, dtype=torch.float64)
    y, state = ours(x, initial_state=[h[:, 0]]), h
    for step in range(4):
        state = theirs(x[:, step : step + 1], state)
        torch.testing.assert_close(y[:, step : step + 1], state, rtol=0, atol=tolerances.REFERENCE_DOUBLE)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_networks_and_streams(kind):
    ours, theirs = pair(kind, torch.float32)
    net, x = load(ours), torch.randn(2, 30, UNITS)
    y = net(x.numpy())
    np.testing.assert_allclose(y, theirs(x).detach(), rtol=0, atol=tolerances.LOOP)
    np.testing.assert_array_equal(net.stream(2).run(x.numpy()), y)
