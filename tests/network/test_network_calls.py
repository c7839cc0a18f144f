"""Calls of networks that run as one call of the kernel: the same bits as `run`."""

from itertools import pairwise

import numpy as np
import pytest

from cellstack import CellSpec, Network, Patch, ShapeError, native
from cellstack.nodes import Bidirectional, Cell, Conv1D, Dense, Merge, Recurrent, Select


def cells_of(rng, widths, dtype, **flags):
    for width, units in pairwise(widths):
        spec = CellSpec(width, units, **flags)
        yield Cell(spec, **{name: rng.normal(size=shape).astype(dtype) * 0.3 for name, shape in spec.shapes.items()})


def head(rng, width, units, dtype, activation="linear"):
    return Dense(rng.normal(size=(width, units)).astype(dtype), rng.normal(size=units).astype(dtype), activation)


def chains(rng, dtype):
    two = tuple(cells_of(rng, (3, 5, 17), dtype))
    gru = tuple(cells_of(rng, (17, 4), dtype, kind="gru"))
    yield "cells", [Recurrent(two)], True
    yield "two nodes", [Recurrent(two), Recurrent(gru)], True
    yield "a head at every step", [head(rng, 3, 3, dtype, "tanh"), Recurrent(two), head(rng, 17, 2, dtype)], True
    yield "the last step", [Recurrent(two, return_sequences=False)], True
    last = [
        Recurrent(two),
        Recurrent(gru, return_sequences=False),
        head(rng, 4, 6, dtype),
        head(rng, 6, 2, dtype, "relu"),
    ]
    yield "heads on the last step", last, True
    yield "backwards", [Recurrent(two, go_backwards=True)], False
    yield "residual", [Recurrent(tuple(cells_of(rng, (3, 3, 3), dtype)), residual=True)], False
    yield "an activation of NumPy's", [Recurrent(two), head(rng, 17, 2, dtype, "softmax")], False


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("number", range(8))
def test_a_call_gives_the_bits_of_a_run(number, dtype, rng):
    _, nodes, whole = list(chains(rng, dtype))[number]
    net = Network(nodes)
    assert (net.calls.whole is not None) == whole
    for shape in ((1, 1, 3), (1, 70, 3), (4, 9, 3), (70, 5, 3), (0, 4, 3), (2, 0, 3)):
        x = rng.normal(size=shape)
        for given in (x.astype(dtype), x, x.astype(dtype)[:, ::-1], np.asfortranarray(x.astype(dtype)), x.tolist()):
            if len(np.shape(given)) == 3:
                np.testing.assert_array_equal(net(given), net.run(given)[0])
    big = rng.normal(size=(64, 200, 3)).astype(dtype)  # work for several threads
    np.testing.assert_array_equal(net(big), net.run(big)[0])
    big[0, 3] = np.nan
    np.testing.assert_array_equal(net(big), net.run(big)[0])
    with pytest.raises(ShapeError, match=r"expected x \[B, T, I=3\], got \(2, 5, 4\)"):
        net(np.zeros((2, 5, 4), dtype))


def test_a_call_of_a_network_that_is_not_a_chain_uses_run(rng):
    cells = tuple(cells_of(rng, (3, 3), np.float32))
    graph = Network(
        [Recurrent(cells), Recurrent(cells), Merge("add")],
        names=["a", "b", "sum"],
        inputs={"x": (None, 3)},
        wires=[("x",), ("x",), ("a", "b")],
    )
    patched = Network([Recurrent(cells)]).edit(Patch("layer_0", gate="f", units=[1], value=0.5))
    for net in (graph, patched):
        assert net.calls.whole is None
        x = rng.normal(size=(2, 5, 3)).astype(np.float32)
        np.testing.assert_array_equal(net(x), net.run(x)[0])


@pytest.mark.parametrize("steps", [1, 3])
def test_an_output_has_positive_strides(steps):
    y = Network([Dense(np.ones((3, 2), np.float32)), Select(step=-1)])(np.zeros((2, steps, 3), np.float32))
    assert min(y.strides) > 0  # torch.from_numpy refuses negative ones, even for an axis of length 1


# ── Unaligned arrays ────────────────────────────────────────────────────────────────────────────────────────────────


def unaligned(array):
    """Return a copy of an array that is contiguous, and not aligned."""
    copied = np.frombuffer(bytearray(1 + array.nbytes), array.dtype, offset=1).reshape(array.shape)
    copied[...] = array
    assert copied.flags.c_contiguous
    assert not copied.flags.aligned
    return copied


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_unaligned_inputs_and_states_give_what_aligned_ones_give(dtype, rng):
    made = {what: Network(tuple(nodes)) for what, nodes, _ in chains(rng, dtype)}
    kernel = rng.normal(size=(3, 3, 4)).astype(dtype)
    made["a convolution"] = Network((Conv1D(kernel), Recurrent(tuple(cells_of(rng, (4, 5), dtype)))))
    back = Recurrent(tuple(cells_of(rng, (3, 5), dtype)), go_backwards=True)
    made["both directions"] = Network((Bidirectional(Recurrent(tuple(cells_of(rng, (3, 5), dtype))), back),))
    for what, net in made.items():
        x = rng.normal(size=(2, 6, 3)).astype(dtype)
        y, after = net.run(x)
        assert np.array_equal(net(unaligned(x)), net(x)), what
        assert np.array_equal(net.run(unaligned(x))[0], y), what
        state = [type(part)(*map(unaligned, part)) for part in after]
        assert np.array_equal(net.run(unaligned(x), state)[0], net.run(x, after)[0]), what
        mask = rng.random((2, 6)) < 0.7
        if "backwards" not in what:
            assert np.array_equal(net.run(unaligned(x), mask=mask)[0], net.run(x, mask=mask)[0]), what


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_unaligned_weights_give_what_aligned_ones_give(dtype, rng):
    (cell,) = cells_of(rng, (3, 5), dtype)
    other = Cell(cell.spec, **{name: unaligned(array) for name, array in cell.arrays.items()})
    first = head(rng, 5, 2, dtype, "tanh")
    nets = [
        Network((Recurrent((cell,)), first)),
        Network((Recurrent((other,)), Dense(unaligned(first.kernel), unaligned(first.bias), "tanh"))),
    ]
    x = rng.normal(size=(2, 6, 3)).astype(dtype)
    assert np.array_equal(nets[1](x), nets[0](x))
    found, expected = (net.trace(x).gradient(1) for net in reversed(nets))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_the_functions_of_native_take_unaligned_arrays(rng):
    (cell,) = cells_of(rng, (3, 5), np.float32)
    arrays = {name: unaligned(array) for name, array in cell.arrays.items()}
    x, found = rng.normal(size=(2, 6, 3)).astype(np.float32), []
    for weights, rows in (
        (native.weights(cell.spec, cell.arrays), native.sequences(x)),
        (native.weights(cell.spec, arrays), native.sequences(unaligned(x))),
        (native.weights(cell.spec, arrays), native.sequences(unaligned(np.repeat(x, 2, axis=1))[:, ::2])),
    ):
        found.append(np.empty((2, 6, 5), np.float32))
        native.forward(rows, [native.Layer(weights, y=found[-1])], 1)
    assert np.array_equal(found[1], found[0])
    assert np.array_equal(found[2], found[0])
    with pytest.raises(ValueError, match="weights: expected kernel to be contiguous and aligned with copy=False"):
        native.weights(cell.spec, arrays, copy=False)
