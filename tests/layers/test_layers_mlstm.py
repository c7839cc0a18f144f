"""`layers.MLSTM`: gradients by differences, states, masks, the network of a trained layer, refusals."""

import numpy as np
import pytest
import torch
from tolerances import LOOP

import cellstack as cs
from cellstack import ShapeError, layers


def layer(**flags):
    torch.manual_seed(0)
    return layers.MLSTM(8, heads=2, input_size=3, **flags)


def test_gradients_are_differences():
    """Of the input, the weights and the state, into the output and the state, with a mask and resets."""
    own = layer(key_size=3, return_sequences=True, return_state=True, dtype="float64")
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    shapes = ((2, 2, 3, 4), (2, 2, 3), (2, 2))
    state = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mask, reset = torch.rand(2, 9) < 0.8, torch.rand(2, 9) < 0.2

    def run(x, kernel, bias, *state):
        return torch.func.functional_call(own, {"kernel": kernel, "bias": bias}, (x, state, mask, reset))

    assert torch.autograd.gradcheck(run, (x, own.kernel, own.bias, *state), atol=1e-5, fast_mode=True)


def test_a_call_continues_from_a_state():
    own = layer(return_sequences=True, return_state=True)
    x = torch.randn(2, 70, 3)
    y, *after = own(x)
    first, *state = own(x[:, :9])
    second, *ends = own(x[:, 9:], state)
    for found, expected in zip([torch.cat([first, second], 1), *ends], [y, *after], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_network_of_a_layer():
    x = torch.randn(2, 30, 3)
    for flags in ({"return_sequences": True}, {}, {"return_sequences": True, "use_bias": False, "key_size": 5}):
        own = layer(**flags)
        net = cs.load(own)
        np.testing.assert_allclose(net(x.numpy()), own(x).detach().numpy(), atol=LOOP)
    lengths = [30, 11]
    own = layer()
    found = cs.load(own)(x.numpy(), lengths=lengths)
    np.testing.assert_allclose(found, own(x, lengths=lengths).detach().numpy(), atol=LOOP)


def test_training_stores_and_retrieves():
    """The layer learns to answer with the number that was stored first."""
    torch.manual_seed(1)
    own, head = layers.MLSTM(16, heads=2, return_sequences=False, input_size=2), torch.nn.Linear(16, 1)
    optimiser = torch.optim.Adam([*own.parameters(), *head.parameters()], 3e-2)
    losses = []
    for _ in range(60):
        x = torch.randn(16, 8, 2)
        x[:, :, 1] = 0.0
        x[:, 0, 1] = 1.0
        loss = (head(own(x)) - x[:, 0, :1]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.3 * np.mean(losses[:10])


def test_configuration():
    own = layer(key_size=5, return_state=True)
    again = layers.MLSTM.from_config(own.get_config())
    assert again.get_config() == own.get_config()
    again.set_weights(own.get_weights())
    x = torch.randn(1, 4, 3)
    torch.testing.assert_close(again(x), own(x))
    assert "in chunks" in repr(own.plan())
    assert layers.MLSTM(8)(torch.zeros(1, 2, 5)).shape == (1, 8)  # built at the first call


def test_refusals():
    own = layer(return_state=True)
    x = torch.zeros(2, 4, 3)
    _, C, n, m = own(x)
    with pytest.raises(ShapeError, match="expected heads to divide units=7, got 2"):
        layers.MLSTM(7, heads=2)
    with pytest.raises(ValueError, match="expected heads of at least 1"):
        layers.MLSTM(8, heads=0)
    for wrong in (3.0, None, "power_law", "36", (1.0,), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="MLSTM: expected forget_bias to be two finite numbers"):
            layers.MLSTM(8, forget_bias=wrong)
    with pytest.raises(ShapeError, match=r"expected sequences \[B, T, I=3\]"):
        own(torch.zeros(2, 4, 5))
    with pytest.raises(ShapeError, match=r"expected state to be 3 array\(s\), C, n, m"):
        own(x, (C, n))
    with pytest.raises(ShapeError, match="expected n of state"):
        own(x, (C, n[:, :1], m))
    with pytest.raises(ValueError, match="MLSTM: initial_state: expected finite numbers in m"):
        own(x, (C, n, m - torch.inf))
    with pytest.raises(TypeError, match="expected weights of float32 or float64 on the CPU, got bfloat16"):
        own.to(torch.bfloat16)(x.to(torch.bfloat16))


@pytest.mark.long
def test_second_derivatives_and_transforms():
    """Of the input and the state, with a mask and resets; a torch loop computes them."""
    own = layer(key_size=3, return_sequences=True, return_state=True, dtype="float64")
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    state = [
        torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in own.spec.state_shapes.values()
    ]
    mask, reset = torch.rand(2, 4) < 0.8, torch.rand(2, 4) < 0.2

    def run(x, *state):
        return own(x, state, mask, reset)

    assert torch.autograd.gradgradcheck(run, (x, *state), fast_mode=True)
    plain = layer(return_sequences=True)
    x = torch.randn(2, 4, 3)
    y = plain(x)
    torch.testing.assert_close(torch.func.vmap(plain)(x[None]), y[None], atol=LOOP, rtol=0)
    one, each = (torch.autograd.functional.jacobian(plain, x, vectorize=vectorize) for vectorize in (True, False))
    torch.testing.assert_close(one, each, atol=LOOP, rtol=0)
    exported = torch.export.export(plain, (x,)).module()
    torch.testing.assert_close(exported(x), y, atol=LOOP, rtol=0)


def test_autocast():
    """The memory computes in the dtype of the weights, whatever the dtype of products is."""
    own, x = layer(return_sequences=True), torch.randn(2, 9, 3)
    y = own(x)
    (expected,) = torch.autograd.grad(y.sum(), own.kernel)
    with torch.autocast("cpu", torch.bfloat16):
        found, widened = own(x), own(x.bfloat16())
    assert found.equal(y)
    assert widened.equal(own(x.bfloat16().float()))
    assert torch.autograd.grad(found.sum(), own.kernel)[0].equal(expected)


def test_no_steps():
    for flags, shape in (({}, (2, 8)), ({"return_sequences": True}, (2, 0, 8))):
        y, C, _, _ = layer(return_state=True, **flags)(torch.zeros(2, 0, 3))
        assert y.shape == shape
        assert not y.any()
        assert not C.any()
