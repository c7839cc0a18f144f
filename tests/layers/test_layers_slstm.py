"""The sLSTM compared with the loop of the package xlstm."""

import pytest
import tolerances
import torch
from xlstm.blocks.slstm.src.vanilla import slstm_forward, slstm_pointwise_function_registry

from cellstack import layers

SMALL = 10 * tolerances.REFERENCE_DOUBLE
SHAPES = [(1, 1, 1, 1, 1), (2, 7, 3, 8, 4), (3, 20, 5, 12, 2), (5, 4, 9, 40, 1), (4, 9, 6, 48, 4), (1, 30, 2, 96, 8)]


def theirs(x, start, kernel, recurrent_kernel, bias, heads):
    """Return y [B, T, H], and the states after the last step."""
    matrices = recurrent_kernel.reshape(heads, -1, recurrent_kernel.shape[-1]).transpose(1, 2)
    pointwise = slstm_pointwise_function_registry["slstm"]
    every, last, _ = slstm_forward((x @ kernel).transpose(0, 1), torch.stack(start), matrices, bias, pointwise)
    return every[0, 1:].transpose(0, 1), list(last)


@pytest.mark.parametrize("started", [False, True], ids=["zeros", "started"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_states_and_gradients_are_those_of_xlstm(shape, started):
    B, T, inputs, H, heads = shape
    torch.manual_seed(H)
    layer = layers.SLSTM(
        H, heads=heads, return_sequences=True, return_state=True, input_size=inputs, dtype="float64", use_bias=True
    )
    weights = list(layer.parameters())
    with torch.no_grad():
        for array in weights:
            array.copy_(torch.randn_like(array) * (inputs**-0.5 if array.ndim == 1 else array.shape[-2] ** -0.5))
    x = torch.randn(B, T, inputs, dtype=torch.float64, requires_grad=True)
    start = [torch.zeros(B, H, dtype=torch.float64) for _ in range(4)]
    if started:
        start = [torch.randn(B, H, dtype=torch.float64) for _ in range(4)]
        start[2] = 0.5 + start[2].abs()
    start = [state.requires_grad_() for state in start]
    y, *state = layer(x, initial_state=start)
    expected, ends = theirs(x, start, *weights, heads)
    for ours, other in zip([y, *state], [expected, *ends], strict=True):
        torch.testing.assert_close(ours, other, rtol=SMALL, atol=SMALL)
    dy, dh = torch.randn_like(y), torch.randn_like(state[0])
    inputs = [x, *weights, *(start if started else start[:1])]  # an empty c, n or m has no gradient here
    got = torch.autograd.grad((y * dy).sum() + (state[0] * dh).sum(), inputs)
    wanted = torch.autograd.grad((expected * dy).sum() + (ends[0] * dh).sum(), inputs)
    for ours, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, other, rtol=SMALL, atol=SMALL * max(1.0, float(other.abs().max())))
