"""The sLSTM: values worked by hand, the role of the stabiliser, extreme gates, and what a state may be."""

import math

import family
import kernel_calls as calls
import numpy as np
import pytest
import tolerances
import torch

import cellstack as cs
from cellstack import layers, reference
from cellstack.cells.spec import CellSpec
from cellstack.layers.eager import function_of
from cellstack.views.torch import TorchOps

IDENTITY = {"activation": "linear", "recurrent_activation": "linear", "kind": "slstm"}


def one_unit(x, state=None, **flags):
    """Return a run of one unit whose pre-activations i f g o are the columns of x."""
    spec = CellSpec(4, 1, **IDENTITY, use_bias=False, **flags)
    arrays = {"kernel": np.eye(4), "recurrent_kernel": np.zeros((1, 4))}
    return reference.forward(spec, arrays, np.array(x, np.float64)[None], state)


def test_two_steps_by_hand():
    ln2, even = math.log(2.0), 0.0  # log σ(0) = -ln 2
    out = one_unit([[ln2, even, 3.0, 1.0], [0.0, even, 1.0, 2.0]])
    c, n, m = (a[0, :, 0] for a in out.states)
    # Step 1: nothing is stored, so m = z_i, i = 1, f = 0: c = 3, n = 1. Step 2: both weights are 1: kept and z_i are 0.
    np.testing.assert_allclose(m, [ln2, 0.0], atol=1e-15)
    np.testing.assert_allclose(out.gates[0, :, :2, 0], [[1.0, 0.0], [1.0, 1.0]], atol=1e-15)
    np.testing.assert_allclose(c, [3.0, 4.0], atol=1e-15)
    np.testing.assert_allclose(n, [1.0, 2.0], atol=1e-15)
    np.testing.assert_allclose(out.y[0, :, 0], [3.0, 2.0 * 4.0 / 2.0], atol=1e-15)


def test_an_exponential_forget_gate_by_hand():
    ln3 = math.log(3.0)
    out = one_unit([[0.0, 0.0, 5.0, 1.0], [0.0, ln3, 1.0, 1.0]], exponential_forget=True)
    # Step 2: the weights 3 and 1 are scaled by exp(-m) = 1/3: c = 5 + 1/3, n = 1 + 1/3, h = (15 + 1)/4.
    np.testing.assert_allclose(out.gates[0, 1, :2, 0], [1.0 / 3.0, 1.0], atol=1e-15)
    np.testing.assert_allclose([a[0, 1, 0] for a in out.states], [5.0 + 1 / 3, 4.0 / 3.0, ln3], atol=1e-15)
    np.testing.assert_allclose(out.y[0, 1, 0], 4.0, atol=1e-15)


def test_h_is_the_weighted_mean_of_the_candidates():
    """Without the stabiliser: h = o·Σ w_t·g_t / Σ w_t, with w_t = exp(z_i) times the forget gates after step t."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, 4))
    weights = [math.exp(x[t, 0]) * math.prod(1.0 / (1.0 + np.exp(-x[t + 1 :, 1]))) for t in range(9)]
    expected = x[-1, 3] * np.dot(weights, x[:, 2]) / sum(weights)
    np.testing.assert_allclose(one_unit(x).y[0, -1, 0], expected, rtol=1e-13)


def test_each_row_and_unit_decides_by_itself_whether_something_is_stored():
    rng = np.random.default_rng(1)
    spec = CellSpec(3, 5, kind="slstm")
    arrays = family.random_arrays(rng, spec)
    x = rng.standard_normal((2, 4, 3))
    h, c, n, m = (0.5 * rng.standard_normal((2, 5)) for _ in range(4))
    n = np.abs(n) + 0.5
    empty = np.array([[True] * 5, [True, False, True, False, False]])
    given = [h, *(np.where(empty, 0.0, a) for a in (c, n, m))]
    other = [h, np.where(empty, 7.0, c), given[2], np.where(empty, -3.0, m)]  # c and m have no meaning where n is 0
    for run in (reference.forward, calls.forward):
        one, two = (run(spec, arrays, x, state) for state in (given, other))
        np.testing.assert_array_equal(one.y, two.y)
    alone = reference.forward(spec, arrays, x[:1], [h[:1], *np.zeros((3, 1, 5))])
    np.testing.assert_allclose(reference.forward(spec, arrays, x, given).y[:1], alone.y, rtol=1e-14)


@pytest.mark.parametrize("flags", [{}, {"exponential_forget": True}], ids=["sigmoid", "exponential"])
def test_the_stabiliser_has_no_gradient_if_only_h_has_one(flags):
    """h doesn't depend on m: a backward pass that treats m as a constant gives the same gradients."""
    torch.manual_seed(0)
    spec = CellSpec(3, 4, kind="slstm", **flags)
    rng = np.random.default_rng(2)
    arrays = {name: torch.tensor(a, requires_grad=True) for name, a in family.random_arrays(rng, spec).items()}
    start = [torch.tensor(a, requires_grad=True) for a in family.random_state(rng, spec, 2)]
    x, weights = torch.randn(2, 8, 3, dtype=torch.float64), torch.randn(2, 8, 4, dtype=torch.float64)

    class Constant(TorchOps):
        def maximum(self, a, b):
            self.most = super().maximum(a, b).detach()
            return self.most

        def select(self, test, a, b=None):
            found = super().select(test, a, b)
            return found.detach() if a is self.most else found

    def gradients(view):
        ops = view(spec, arrays, [function_of(activation) for activation in spec.activations], None)
        a, state, loss, stabilisers = spec.of_kind.inputs(ops, spec, x), start, 0.0, []
        for t in range(8):
            state = list(spec.of_kind.step(ops, spec, a[:, t], *state)[1])
            loss = loss + (weights[:, t] * state[0]).sum()
            stabilisers.append(state[3])
        asked = [*arrays.values(), *start]
        return torch.autograd.grad(loss, asked), stabilisers[-1].requires_grad

    (whole, carries), (constant, stays) = gradients(TorchOps), gradients(Constant)
    assert carries
    assert not stays
    for one, other in zip(whole, constant, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("flags", [{}, {"exponential_forget": True}], ids=["sigmoid", "exponential"])
@pytest.mark.parametrize("size", [200.0, 1e4])
def test_extreme_gates_neither_overflow_nor_lose_the_largest_weight(dtype, flags, size):
    spec = CellSpec(4, 1, **IDENTITY, use_bias=False, **flags)
    arrays = {"kernel": np.eye(4), "recurrent_kernel": np.zeros((1, 4))}
    signs = np.array([[i, f] for i in (-1, 0, 1) for f in (-1, 0, 1)])
    order = np.random.default_rng(3).permutation(np.repeat(np.arange(9), 6))
    x = np.concatenate([size * signs[order], np.arange(54.0)[:, None], np.ones((54, 1))], axis=1)[None]
    given = {name: a.astype(dtype) for name, a in arrays.items()}
    expected = reference.forward(spec, arrays, x)
    out = calls.forward(spec, given, x.astype(dtype))
    for array in (out.y, out.gates, *out.states):
        assert np.isfinite(array).all()
    assert (np.maximum(out.gates[:, :, 0], out.gates[:, :, 1]) == 1.0).all()
    bound = tolerances.KERNEL[dtype] * 54
    np.testing.assert_allclose(out.y, expected.y, rtol=0, atol=bound)
    gradient = calls.backward(spec, given, out, dy=np.ones_like(out.y))
    exact = reference.backward(spec, arrays, expected, dy=np.ones_like(expected.y))
    scale = max(1.0, np.abs(exact.x).max())
    assert np.isfinite(gradient.x).all()
    np.testing.assert_allclose(gradient.x, exact.x, rtol=0, atol=tolerances.KERNEL_GRADIENT * bound * scale)


@pytest.mark.parametrize("name", ["h", "c", "n", "m"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_state_that_is_not_finite_is_refused_by_name(name, bad):
    layer = layers.SLSTM(3, input_size=2, return_sequences=True)
    net, x = cs.load(layer), np.zeros((2, 4, 2), np.float32)
    state = {of: np.ones((2, 3), np.float32) for of in "hcnm"}
    state[name][1, 2] = bad
    for call in (
        lambda: net.run(x, [tuple(state.values())]),
        lambda: layer(x, initial_state=list(state.values())),
        lambda: layer.cell(x[:, 0], list(state.values())),
    ):
        with pytest.raises(ValueError, match=f"expected {name} to be finite"):
            call()


def test_a_negative_normaliser_is_refused_by_name():
    net = cs.load(layers.SLSTM(3, input_size=2))
    state = tuple(np.full((1, 3), -1.0 if name == "n" else 1.0, np.float32) for name in "hcnm")
    with pytest.raises(ValueError, match="expected n to be at least 0"):
        net.run(np.zeros((1, 4, 2), np.float32), [state])


def test_the_initial_bias_of_the_forget_gate_depends_on_its_activation():
    bias = {
        exponential: layers.SLSTM(2, input_size=1, exponential_forget=exponential).cell.bias.tolist()
        for exponential in (False, True)
    }
    assert bias == {False: [0, 0, 1, 1, 0, 0, 0, 0], True: [0] * 8}
    given = layers.SLSTM(2, input_size=1, exponential_forget=True, forget_bias=-0.5).cell.bias
    assert given.tolist() == [0, 0, -0.5, -0.5, 0, 0, 0, 0]
