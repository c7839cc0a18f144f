"""Dense layers: the equation, and that cells and dense layers in one call give the same bits as separately."""

import itertools
import pickle

import numpy as np
import pytest
import tolerances
from networks import make_cell

from cellstack import Network, load
from cellstack.cells.activations import ACTIVATIONS
from cellstack.cells.errors import ShapeError
from cellstack.nodes import Dense, GlobalPool, GroupedDense, Merge, Recurrent, Select
from cellstack.nodes.activations import activation_function

LIMITS = {name: {"rtol": limit, "atol": limit} for name, limit in tolerances.KERNEL.items()}


def dense(rng, width, units, activation="linear", dtype="float32", bias=True):
    kernel = rng.uniform(-1, 1, (width, units)).astype(dtype)
    return Dense(kernel, rng.uniform(-1, 1, units).astype(dtype) if bias else None, activation)


def tuple_of(answer):
    return answer if isinstance(answer, tuple) else (answer,)


def assert_same(one, other):
    for a, b in zip(tuple_of(one), tuple_of(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "elu(0.3)", "leaky_relu(0.01)", "softmax", "gelu"])
def test_the_equation(activation, dtype):
    rng = np.random.default_rng(len(activation))
    for width, units, bias in ((1, 1, True), (5, 33, False), (70, 130, True)):
        node = dense(rng, width, units, activation, dtype, bias)
        x = rng.standard_normal((2, 7, width)).astype(dtype)
        z = x.astype("f8") @ node.kernel.astype("f8") + (node.bias.astype("f8") if bias else 0.0)
        y = node.apply(x)
        assert y.dtype == dtype
        np.testing.assert_allclose(y, activation_function(node.activation)(z), **LIMITS[dtype])
        alone = [node.apply(x[b, t]) for b in range(2) for t in range(7)]
        np.testing.assert_array_equal(np.stack(alone).reshape(y.shape), y)
        np.testing.assert_array_equal(node.apply(np.asfortranarray(x)), y)
        np.testing.assert_array_equal(node.apply(x[:, ::-1]), y[:, ::-1])
        assert node.apply(x[:, :0]).shape == (2, 0, units)
        assert node.apply(x[0, 0]).shape == (units,)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("batch", [1, 3])
def test_cells_and_dense_layers_in_one_call_give_the_same_bits(batch, dtype):
    rng = np.random.default_rng(7)

    def cells(*widths, **flags):
        return Recurrent(tuple(make_cell(rng, *pair, dtype=dtype) for pair in itertools.pairwise(widths)), **flags)

    def new(width, units, activation="linear"):
        return dense(rng, width, units, activation, dtype)

    plain = [new(4, 6, "relu"), cells(6, 9, 5), new(5, 8, "tanh"), cells(8, 7), new(7, 2, "sigmoid")]
    chained = [("x",), *[(name,) for name in "abcd"]]
    nets = {
        "plain": Network(plain),
        "tapped": Network(plain, list("abcde"), wires=chained, outputs=("b", "c", "e")),
        "forked": Network([*plain[:3], new(8, 8), Merge("add")], list("abcde"), wires=[*chained[:4], ("c", "d")]),
        "beyond": Network([cells(4, 6), new(6, 5, "softmax"), cells(5, 3), new(3, 2, "gelu")]),
        "added": Network([cells(4, 6, 6, residual=True), new(6, 3), cells(3, 3, 3, residual=True), new(3, 1)]),
        "at rest": Network([new(4, 3), new(3, 2, "softsign")]),
    }
    x = rng.standard_normal((batch, 70, 4)).astype(dtype)
    for net in nets.values():
        y, after = net.run(x)
        whole, steps, threads = net.stream(batch), net.stream(batch), net.stream(batch, threads=2)
        assert_same(whole.run(x), y)
        assert_same(threads.run(x), y)
        for t in range(5):
            assert_same(steps.step(x[:, t]), tuple(part[:, t] for part in tuple_of(y)))
        fork = steps.fork()
        for one, two in zip(whole.state, after, strict=True):
            assert_same(tuple(one), tuple(two))
        assert_same(fork.step(x[:, 5]), steps.step(x[:, 5]))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.ones((1, 4000), "f4"), ShapeError, r"expected x \[..., I=3\], got \(1, 4000\)"),
        (np.ones((2, 2), "f4"), ShapeError, r"expected x \[..., I=3\], got \(2, 2\)"),
        (np.float32(1), ShapeError, r"expected x \[..., I=3\], got \(\)"),
        (np.ones((1, 3)), TypeError, "expected x of float32, got float64"),
        (np.ones((1, 3), int), TypeError, "expected x of float32, got int64"),
    ],
)
def test_inputs_that_the_kernel_cannot_read_are_refused(x, error, message):
    with pytest.raises(error, match=message):
        dense(np.random.default_rng(0), 3, 1000).apply(x)


def test_widths_that_are_known_only_in_a_call():
    rng = np.random.default_rng(3)
    cell = make_cell(rng, 3, 4)
    wires = [("x",), ("a", "z"), ("b",)]
    nets = {
        "two": Network(
            [Recurrent((cell,)), Merge("add"), dense(rng, 4, 1000)], list("abc"), inputs=("x", "z"), wires=wires
        ),
        "cut": Network([Select(0, 3, axis=-1), Recurrent((cell,)), dense(rng, 4, 2)]),
        "head": Network([Select(1, None, axis=-1), dense(rng, 1, 1000)]),
    }
    right = {"two": [(1, 3), (1, 4)], "cut": [(1, 5)], "head": [(1, 2)]}
    wrong = {"two": [[(1, 3), (1, 9)], [(1, 3), (1, 3)]], "cut": [[(1, 2)], [(1, 0)]], "head": [[(1, 4001)], [(1, 1)]]}

    def one_or_all(arrays):
        return arrays if len(arrays) > 1 else arrays[0]

    for name, net in nets.items():
        stream, pool = net.stream(), net.pool(2) if len(net.inputs) == 1 else None
        session = pool.open() if pool else None
        good = tuple(np.ones(shape, "f4") for shape in right[name])
        expected = net(one_or_all(tuple(x[:, None] for x in good)))[:, -1]
        for shapes in wrong[name]:
            bad, before = tuple(np.ones(shape, "f4") for shape in shapes), stream.state
            with pytest.raises(ShapeError):
                stream.step(one_or_all(bad))
            with pytest.raises(ShapeError):
                stream.run(one_or_all(tuple(x[:, None] for x in bad)))
            for one, two in zip(stream.state, before, strict=True):
                assert_same(tuple(one), tuple(two))
            if pool:
                with pytest.raises(ShapeError):
                    pool.step([session], bad[0])
        assert_same(stream.step(one_or_all(good)), expected)
        if pool:
            assert_same(pool.step([session], good[0]), expected)


def test_a_subclass_of_dense():
    class Doubled(Dense):
        def apply(self, x):
            return 2 * super().apply(x)

    rng = np.random.default_rng(4)
    head = dense(rng, 4, 2)
    net = Network([Recurrent((make_cell(rng, 3, 4),)), Doubled(head.kernel, head.bias)])
    x = rng.standard_normal((1, 6, 3)).astype("f4")
    np.testing.assert_array_equal(net.stream().run(x), net(x))


def test_a_head_on_the_last_step():
    rng = np.random.default_rng(1)
    lstm = (make_cell(rng, 4, 6),)
    head = dense(rng, 6, 2, "sigmoid")
    x = rng.standard_normal((2, 9, 4)).astype("f4")
    expected = Network([Recurrent(lstm), head])(x)
    for net in (
        Network([Recurrent(lstm, return_sequences=False), head]),
        Network([Recurrent(lstm), GlobalPool("last"), head]),
    ):
        np.testing.assert_array_equal(net(x), expected[:, -1])
        np.testing.assert_array_equal(net.stream(2).run(x), expected)


@pytest.mark.parametrize("activation", ["linear", "softmax"])
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_heads_have_the_number_format_of_the_cells(weights, activation):
    rng = np.random.default_rng(2)
    cell = make_cell(rng, 4, 40)
    head, x = dense(rng, 40, 3, activation), rng.standard_normal((1, 30, 4)).astype("f4")
    net = Network([Recurrent((cell,)), head])
    y = net.stream(weights=weights).run(x)
    h = Network([Recurrent((cell,))]).stream(weights=weights).run(x)
    np.testing.assert_array_equal(y, head.product(h, weights))
    np.testing.assert_array_equal(y, net.run(x, weights=weights, threads=2)[0])
    assert 0 < np.abs(y - head.apply(h)).max() < 0.1


@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize(("weights", "bound"), [("bfloat16", 2**-7), ("int8", 1 / 127)])
def test_products_with_fewer_bits(weights, bound, groups):
    """Their errors are bounded by those of the two factors."""
    rng = np.random.default_rng(4)
    bias, x = rng.standard_normal(24).astype("f4"), rng.standard_normal((2, 7, 40)).astype("f4")
    if groups:
        node = GroupedDense(rng.standard_normal((groups, 10, 6)).astype("f4"), bias)
    else:
        node = Dense(rng.standard_normal((40, 24)).astype("f4"), bias)
    net = Network([node], inputs={"x": (None, 40)})
    y, exact = net.run(x, weights=weights)[0], net(x)
    most = bound * 40 * np.abs(x).max() * np.abs(node.kernel).max()
    assert 0 < np.abs(y - exact).max() < most
    for batch in (1, 2):
        np.testing.assert_array_equal(net.stream(batch, weights=weights).run(x[:batch]), y[:batch])
    pool = net.pool(2, weights=weights)
    np.testing.assert_array_equal(pool.step([pool.open(), pool.open()], x[:, 0]), y[:, 0])
    if weights == "bfloat16":
        small = net.with_weights(weights)
        assert (small.weights, small.nodes[0].kernel.dtype) == ("bfloat16", np.float32)
        np.testing.assert_array_equal(small(x), y)
        np.testing.assert_array_equal(small.run(x, weights="float32")[0], small.with_weights("float32")(x))
        assert "matrix in bfloat16" in small.plan()[0]
        assert len(pickle.dumps(small)) < len(pickle.dumps(net)) - node.kernel.size
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(small))(x), y)


def test_a_stored_bfloat16_kernel_comes_back_from_the_file(tmp_path):
    rng = np.random.default_rng(5)
    nodes = [dense(rng, 5, 8, "silu"), GroupedDense(rng.standard_normal((2, 4, 3)).astype("f4"))]
    net = Network(nodes).with_weights("bfloat16")
    net.save(tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors")
    x = rng.standard_normal((1, 3, 5)).astype("f4")
    assert [node.weights for node in again.nodes] == ["bfloat16", "bfloat16"]
    np.testing.assert_array_equal(again(x), net(x))


def test_number_formats_that_a_dense_layer_cannot_have():
    rng = np.random.default_rng(6)
    net = Network([Dense(rng.standard_normal((3, 2)))])
    for run in (lambda: net.run(np.ones((1, 1, 3)), weights="int8"), lambda: net.stream(weights="int8")):
        with pytest.raises(TypeError, match="Dense: expected float32 arrays for weights='int8', got float64"):
            run()
    with pytest.raises(TypeError, match="Dense: expected float32 arrays for weights='bfloat16', got float64"):
        net.with_weights("bfloat16")
    deep = Dense(np.zeros((133_145, 1), "f4"))
    with pytest.raises(ValueError, match="Dense: expected at most 133144 features and units for weights='int8'"):
        deep.packed_in("int8")


def test_the_plan_says_what_runs_a_head():
    rng = np.random.default_rng(5)
    net = Network([Recurrent((make_cell(rng, 3, 4),)), dense(rng, 4, 2), dense(rng, 2, 3, "softmax")])
    _, plain, beyond, _ = net.plan()
    assert "fused kernel" in plain
    assert plain.endswith("one product")
    assert beyond.endswith("one product, softmax in NumPy")
