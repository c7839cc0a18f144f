"""The autograd op: derivatives, registration, compilation, and its numbers against the reference."""

import itertools

import numpy as np
import pytest
import tolerances
import torch
from torch import Tensor

from cellstack import layers, reference
from cellstack.layers import eager, op
from cellstack.spec import ACTIVATIONS


def make(*sizes, seed=0, dtype=torch.float64, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, generator=generator, dtype=dtype).mul_(0.5).requires_grad_(grad)


def arguments(depth=2, batch=2, steps=3, width=2, started=True, masked=False, dropped=False, bias=True, **kwargs):
    units = [2, 3, 4][:depth]
    widths = [width, *units[:-1]]
    weights = []
    for i, h in zip(widths, units, strict=True):
        weights += [make(i, 4 * h, seed=h, **kwargs), make(h, 4 * h, seed=h + 10, **kwargs)]
        weights.append(make(4 * h, seed=h + 20, **kwargs) if bias else make(0, **kwargs).detach())
    h0 = [make(batch, h, seed=h + 30, **kwargs) for h in units] if started else []
    c0 = [make(batch, h, seed=h + 40, **kwargs) for h in units] if started else []
    drops = [torch.ones(batch, h, dtype=weights[0].dtype).bernoulli_(0.5).mul_(2) for h in units] if dropped else []
    mask = torch.rand(batch, steps) < 0.6 if masked else None
    return make(batch, steps, width, seed=1, **kwargs), h0, c0, weights, drops, mask


FLAGS = list(itertools.product((False, True), repeat=5))


@pytest.mark.parametrize(("started", "masked", "dropped", "reverse", "bias"), FLAGS)
def test_gradients_are_finite_differences(started, masked, dropped, reverse, bias):
    x, h0, c0, weights, drops, mask = arguments(started=started, masked=masked, dropped=dropped, bias=bias)
    counts = len(h0), len(c0)

    def run(x, *rest):
        h0, c0, weights = rest[: counts[0]], rest[counts[0] : sum(counts)], rest[sum(counts) :]
        return tuple(op.lstm(x, list(h0), list(c0), list(weights), drops, mask, [1, 0, 5, 0], reverse, True, True, 1))

    assert torch.autograd.gradcheck(run, (x, *h0, *c0, *weights), fast_mode=False)


@pytest.mark.parametrize(("phi", "sigma"), [(n, (n + 3) % 8) for n in range(8)])
def test_every_activation_has_its_derivative(phi, sigma):
    x, h0, c0, weights, drops, mask = arguments(depth=1)
    assert torch.autograd.gradcheck(
        lambda x, w: tuple(op.lstm(x, h0, c0, [w, *weights[1:]], drops, mask, [phi, sigma], False, True, True, 1)),
        (x, weights[0]),
    )


def test_second_derivatives_go_through_the_torch_loop():
    x, h0, c0, weights, drops, mask = arguments(depth=1, steps=2, masked=True)
    assert torch.autograd.gradgradcheck(
        lambda x, w: tuple(op.lstm(x, h0, c0, [w, *weights[1:]], drops, mask, [1, 0], False, True, True, 1)),
        (x, weights[0]),
    )


@pytest.mark.parametrize("wanted", range(1, 2**6))
def test_any_subset_of_inputs_may_ask_for_gradients(wanted):
    full = arguments(depth=2)
    leaves = [full[0], full[1][1], full[2][0], full[3][0], full[3][4], full[3][5]]
    asks = [bool(wanted >> n & 1) for n in range(6)]
    tensors = [*([full[0]]), *full[1], *full[2], *full[3]]
    expected = torch.autograd.grad(op.lstm(*full, [1, 0, 1, 0], False, True, True, 1)[5].sum(), leaves)
    for tensor in tensors:
        tensor.requires_grad_(any(tensor is leaf and ask for leaf, ask in zip(leaves, asks, strict=True)))
    op.lstm(*full, [1, 0, 1, 0], False, True, True, 1)[5].sum().backward()
    for leaf, ask, gradient in zip(leaves, asks, expected, strict=True):
        assert torch.equal(leaf.grad, gradient) if ask else leaf.grad is None


@pytest.mark.parametrize(
    ("save", "sequences", "masked", "dropped", "started"),
    [
        (True, True, True, True, True),
        (True, False, False, False, False),
        (False, True, True, False, True),
        (False, True, False, True, False),
        (False, False, False, False, False),
    ],
)
def test_opcheck_is_clean(save, sequences, masked, dropped, started):
    given = arguments(masked=masked, dropped=dropped, started=started, grad=save, dtype=torch.float32)
    torch.library.opcheck(op.lstm, (*given, [1, 0, 1, 0], False, sequences, save, 1))


def test_opcheck_of_the_backward_op_is_clean():
    x, h0, c0, weights, drops, mask = arguments(grad=False, masked=True)
    out = op.lstm(x, h0, c0, weights, drops, mask, [1, 0, 1, 0], False, True, True, 1)
    grads = [torch.ones_like(out[0]), None, None, torch.ones_like(out[3]), None, torch.ones_like(out[5]), *[None] * 4]
    wanted = [True, False, True, True, True, True, False, True, True, True, True]
    torch.library.opcheck(
        torch.ops.cellstack.lstm_backward.default,
        (x, h0, c0, weights, drops, mask, out[4:], grads, [1, 0, 1, 0], False, wanted, 1),
    )


def test_opcheck_of_the_dropout_mask_is_clean():
    torch.library.opcheck(
        torch.ops.cellstack.dropout_mask.default,
        (torch.zeros((), dtype=torch.int64), torch.zeros(1), 3, 4, 0.5, 7),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_results_never_share_memory():
    for steps in (0, 3):
        x, h0, c0, weights, drops, mask = arguments(steps=steps, grad=False)
        for save in (False, True):
            out = op.lstm(x, h0, c0, weights, drops, mask, [1, 0, 1, 0], False, True, save, 1)
            held = [t for t in (x, *h0, *c0, *weights, *out) if t.numel()]
            assert len({t.untyped_storage().data_ptr() for t in held}) == len(held)


def test_no_steps_and_no_rows():
    for batch, steps in ((2, 0), (0, 3), (0, 0)):
        x, h0, c0, weights, drops, mask = arguments(batch=batch, steps=steps)
        out = op.lstm(x, h0, c0, weights, drops, mask, [1, 0, 1, 0], False, True, True, 1)
        assert torch.equal(out[0], h0[0])
        assert torch.equal(out[3], c0[1])
        sum(part.sum() for part in out).backward()
        assert all(torch.count_nonzero(w.grad) == 0 for w in weights)
        assert torch.equal(h0[0].grad, torch.ones_like(h0[0]))


def through_reference(x, h0, c0, weights, drops, mask, activations, reverse):
    as_double = [t.detach().double().numpy() for t in (x, *h0, *c0, *weights)]
    depth = len(weights) // 3
    value, h0, c0, arrays = (
        as_double[0],
        as_double[1:][:depth],
        as_double[1 + depth :][:depth],
        as_double[1 + 2 * depth :],
    )
    results = []
    for n in range(depth):
        kernel, recurrent_kernel, bias = arrays[3 * n : 3 * n + 3]
        results.append(
            reference.lstm_forward(
                value,
                h0[n],
                c0[n],
                kernel,
                recurrent_kernel,
                bias if bias.size else None,
                mask=None if mask is None else mask.numpy(),
                recurrent_dropout=drops[n].double().numpy() if drops else None,
                activation=ACTIVATIONS[activations[2 * n]],
                recurrent_activation=ACTIVATIONS[activations[2 * n + 1]],
                reverse=reverse,
            )
        )
        value = results[-1].y
    return results


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("reverse", [False, True])
def test_every_result_is_that_of_the_reference(steps, reverse):
    given = arguments(depth=3, batch=3, steps=steps, masked=True, dropped=True, dtype=torch.float32, grad=False)
    out = op.lstm(*given, [1, 0] * 3, reverse, True, True, 2)
    expected = through_reference(*given, [1, 0] * 3, reverse)
    for n, layer in enumerate(expected):
        for got, wanted in ((out[n], layer.h), (out[3 + n], layer.c), (out[6 + n], layer.y), (out[9 + n], layer.gates)):
            assert np.abs(got.numpy() - wanted).max() <= tolerances.REFERENCE
        assert np.abs(out[12 + n].numpy() - layer.cells).max() <= tolerances.REFERENCE * np.abs(layer.cells).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("units", [16, 50, 64])
def test_a_thousand_steps_are_the_reference(dtype, units):
    cells = [layers.LSTMCell(units, dtype=dtype), layers.LSTMCell(units, dtype=dtype)]
    rnn = layers.RNN(cells, return_sequences=True, return_state=True, input_size=8)
    x = make(2, 1000, 8, dtype=dtype, grad=False) * 2
    zeros = [torch.zeros(2, units)] * 2
    expected = through_reference(x, zeros, zeros, [*cells[0].arrays(), *cells[1].arrays()], [], None, [1, 0] * 2, False)
    tolerance = tolerances.REFERENCE if dtype == torch.float32 else tolerances.REFERENCE_DOUBLE
    with torch.no_grad():
        y, *states = rnn(x)
    assert np.abs(y.numpy() - expected[-1].y).max() <= tolerance
    for state, layer in zip(states, expected, strict=True):
        assert np.abs(state.h.numpy() - layer.h).max() <= tolerance
        assert np.abs(state.c.numpy() - layer.c).max() <= tolerance


def test_linear_mode_is_exact(rng):
    """Identity activations and small integers leave nothing to round: every bit has to be right."""
    linear = ACTIVATIONS.index("linear")
    for units, width in ((1, 1), (3, 5), (16, 16), (17, 9)):

        def integers(*shape):
            return torch.tensor(rng.integers(-1, 2, size=shape), dtype=torch.float32)

        x, h0, c0 = integers(2, 3, width), [integers(2, units)], [integers(2, units)]
        weights = [integers(width, 4 * units), integers(units, 4 * units), integers(4 * units)]
        out = op.lstm(x, h0, c0, weights, [], None, [linear, linear], False, True, True, 1)
        (expected,) = through_reference(x, h0, c0, weights, [], None, [linear, linear], False)
        exact = np.abs(expected.cells) < 2**24  # beyond it float32 has no odd integers
        assert exact.mean() > 0.3
        first = expected.gates[:, 0]
        assert np.array_equal(out[3].numpy()[:, 0], first)
        assert np.array_equal(out[4].numpy()[exact], expected.cells[exact])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_torch_loop_is_the_kernel(reverse, masked):
    given = arguments(depth=2, masked=masked, dropped=True, dtype=torch.float32)
    functions = [eager.ACTIVATIONS[name] for name in ("tanh", "sigmoid")] * 2
    fused = op.lstm(*given, [1, 0, 1, 0], reverse, True, True, 1)
    loop = eager.lstm(*given, functions, reverse, True, True)
    for a, b in zip(fused, loop, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerances.LOOP)


def test_short_calls_follow_every_change():
    cell = layers.LSTMCell(4, input_size=3)
    x = torch.randn(1, 3)
    with torch.no_grad():
        before = cell(x)[0]
        assert torch.equal(before, cell(x)[0])
        optimiser = torch.optim.SGD(cell.parameters(), 0.1)
    cell(x)[0].sum().backward()
    optimiser.step()
    with torch.no_grad():
        after = cell(x)[0]
        assert not torch.equal(before, after)
        cell.kernel.zero_()
        assert not torch.equal(after, cell(x)[0])
        fresh = layers.LSTMCell(4, input_size=3)
        cell.load_state_dict(fresh.state_dict())
        assert torch.equal(cell(x)[0], fresh(x)[0])
        with torch.inference_mode():
            assert torch.equal(cell(x)[0], fresh(x)[0])


def test_short_calls_follow_writes_that_torch_does_not_count():
    cell, twin = (layers.LSTMCell(4, input_size=3) for _ in range(2))
    x, state = torch.randn(1, 3), [torch.randn(1, 4), torch.randn(1, 4)]
    writes = [
        lambda: cell.kernel.data.mul_(2.0),
        lambda: cell.recurrent_kernel.detach().numpy().__setitem__((1, 2), 7.0),
        lambda: cell.bias.data.copy_(torch.randn(16)),
    ]
    with torch.no_grad():
        for write in writes:
            before = cell(x, state)[0], cell.kernel._version
            write()
            twin.set_weights(cell.get_weights())
            assert not torch.equal(cell(x, state)[0], before[0])
            assert torch.equal(cell(x, state)[0], twin(x, state)[0])
            assert cell.kernel._version == before[1]


@pytest.mark.parametrize("steps", [1, 3, 40])  # read in place, then packed
def test_weights_are_read_at_every_call(steps):
    cell = layers.LSTM(64, input_size=64)
    x = torch.randn(1, steps, 64)
    twin = layers.LSTM(64, input_size=64)
    weights = [cell.cell.kernel, cell.cell.recurrent_kernel]
    with torch.no_grad():
        for change in (Tensor.neg_, lambda w: w.mul_(2), lambda w: w.mul_(0.5), lambda w: w.copy_(w.flip(0))):
            before = cell(x)
            for weight in weights:
                change(weight.data)
            twin.set_weights(cell.get_weights())
            assert torch.equal(cell(x), twin(x))
            assert not torch.equal(cell(x), before)


def test_a_stack_called_as_a_cell_is_one_call_of_the_op(monkeypatch):
    stack = layers.StackedRNNCells([layers.LSTMCell(4), layers.LSTMCell(5)], input_size=3)
    calls = []
    monkeypatch.setattr(op, "run", lambda *args, inner=op.run: calls.append(args) or inner(*args))
    x, states = torch.randn(2, 3), [[torch.randn(2, n) for _ in "hc"] for n in (4, 5)]
    y, ends = stack(x, states)
    assert len(calls) == 1
    h, (h1, c1) = stack.cells[0](x, states[0])
    top, (h2, c2) = stack.cells[1](h, states[1])
    for a, b in zip((y, *ends[0], *ends[1]), (top, h1, c1, h2, c2), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
