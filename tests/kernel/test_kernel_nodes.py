"""Nodes without a state on the kernel: norms, convolutions of each feature, products of groups, activations."""

import math

import numpy as np
import pytest
import tolerances
from test_kernel import FLOAT_ISAS, isa

from cellstack import native
from cellstack.nodes import Conv1D, Dense, GroupedDense, GroupNorm, LayerNorm, RMSNorm

__all__ = ["isa"]

DTYPES = ["float32", "float64"]
EACH = pytest.mark.parametrize("isa", FLOAT_ISAS, indirect=True)
WIDTHS = [1, 7, 16, 33, 130]


def near(found, expected, dtype):
    assert found.dtype == dtype
    limit = tolerances.KERNEL[dtype]
    np.testing.assert_allclose(found, expected, rtol=limit, atol=limit)


def normalised(x, groups, centred, epsilon):
    z = x.astype("f8").reshape(*x.shape[:-1], groups, -1)
    z = z - z.mean(axis=-1, keepdims=True) if centred else z
    return (z / np.sqrt((z * z).mean(axis=-1, keepdims=True) + epsilon)).reshape(x.shape)


@EACH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms(isa, dtype, width, rng):
    x = (3 + rng.normal(size=(2, 5, 3 * width))).astype(dtype)
    gain, bias = (rng.normal(size=3 * width).astype(dtype) for _ in range(2))
    for node, groups, centred in [
        (LayerNorm(gain, bias, 1e-3), 1, True),
        (LayerNorm(epsilon=1e-3), 1, True),
        (RMSNorm(gain, None, 1e-3), 1, False),
        (RMSNorm(None, bias, 1e-3), 1, False),
        (GroupNorm(3, gain, bias, 1e-3, over_time=False), 3, True),
    ]:
        unit = normalised(x, groups, centred, 1e-3)
        expected = unit * (1 if node.gain is None else node.gain) + (0 if node.bias is None else node.bias)
        y = node.apply(x)
        near(y, expected, dtype)
        np.testing.assert_array_equal(node.apply(x[1, 2]), y[1, 2])  # whatever the other rows are
        np.testing.assert_array_equal(node.apply(np.asfortranarray(x)), y)
        assert node.apply(x[:0]).shape == (0, 5, 3 * width)
        assert np.isnan(node.apply(np.where(x == x[0, 0, 0], np.nan, x))[0, 0]).any()


@EACH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "dilation"), [(1, 1), (7, 2), (33, 1), (130, 3)])
def test_convolutions_of_each_feature(isa, dtype, width, dilation, rng):
    kernel, bias = rng.normal(size=(4, 1, width)).astype(dtype), rng.normal(size=width).astype(dtype)
    x = rng.normal(size=(3, 17, width)).astype(dtype)
    steps = 17 - 3 * dilation
    z = sum(x[:, k * dilation : k * dilation + steps].astype("f8") * kernel[k, 0] for k in range(4))
    for activation, of in [("linear", lambda z: z), ("silu", lambda z: z / (1 + np.exp(-z))), ("tanh", np.tanh)]:
        node = Conv1D(kernel, bias, dilation=dilation, groups=width, activation=activation)
        near(node.apply(x), of(z + bias), dtype)
    near(Conv1D(kernel, None, dilation=dilation, groups=width).apply(x[::2]), z[::2], dtype)


@EACH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("groups", "inputs", "outputs"), [(1, 5, 3), (3, 7, 9), (32, 4, 4), (4, 128, 128), (2, 200, 1)]
)
def test_products_of_groups(isa, dtype, groups, inputs, outputs, rng):
    kernel = rng.uniform(-1, 1, (groups, inputs, outputs)).astype(dtype)
    bias = rng.normal(size=groups * outputs).astype(dtype)
    x = rng.normal(size=(3, 50, groups * inputs)).astype(dtype)
    node = GroupedDense(kernel, bias)
    expected = np.einsum("btgi,gio->btgo", x.reshape(3, 50, groups, inputs).astype("f8"), kernel).reshape(3, 50, -1)
    y = node.apply(x)
    near(y, expected + bias, dtype)
    np.testing.assert_array_equal(node.apply(x[1, 7]), y[1, 7])
    np.testing.assert_array_equal(node.product(x, threads=3), y)


@EACH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "gelu"])
def test_activations_of_nodes(isa, dtype, name):
    z = np.concatenate([np.linspace(-12, 12, 2001), [-1e4, -100.0, 0.0, 100.0, 1e4]]).astype(dtype)
    wide = z.astype("f8")
    expected = {
        "silu": wide / (1 + np.exp(-np.maximum(wide, -700))),
        "gelu_tanh": wide / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))),
        "gelu": wide / 2 * (1 + np.array([math.erf(value / math.sqrt(2)) for value in wide])),
    }[name]
    node = Dense(np.ones((1, 1), dtype), None, name)
    assert node.numpy_activation is None
    near(node.apply(z[:, None])[:, 0], expected, dtype)
    assert np.isnan(node.apply(np.full((1, 1), np.nan, dtype)))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_bits(threads, rng):
    node = Dense(rng.normal(size=(700, 900)).astype("f4"), rng.normal(size=900).astype("f4"), "silu")
    for rows in (1, 5, 300):
        x = rng.normal(size=(rows, 700)).astype("f4")
        np.testing.assert_array_equal(node.product(x, threads=threads), node.apply(x))


def test_arrays_that_do_not_fit():
    norm = LayerNorm(np.ones(3, "f4"))
    with pytest.raises(TypeError, match=r"expected x of the node's dtype and width .*, got int64 \(2, 3\)"):
        norm.apply(np.ones((2, 3), int))
    made = native.Norm(3, True, 1e-3, None, None)
    assert made.run(np.ones((2, 4), "f4")) is None
    assert made.run([1.0]) is None
    with pytest.raises(ValueError, match="expected at least one layer"):
        native.products([])
