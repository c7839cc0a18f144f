"""Nodes for signal frames: context from the previous frame, a small graph per frame, gathering by index."""

import numpy as np
import pytest
from networks import make_cell

from cellstack import Network, ShapeError
from cellstack.nodes import (
    Activation,
    Attention,
    Context,
    Conv1D,
    Dense,
    Flatten,
    GlobalPool,
    Magnitude,
    Masking,
    Merge,
    PerFrame,
    Recurrent,
    Reshape,
    Select,
    Take,
)
from cellstack.nodes.frames import BLOCK


def floats(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def lstm(inputs, units=4):
    return Recurrent((make_cell(np.random.default_rng(1), inputs, units),))


def by_hand(x, size, mask=None, reset=None):
    """Return the context frame by frame: the end of the last used frame since the last reset."""
    y = np.zeros((*x.shape[:2], size + x.shape[2]), x.dtype)
    for row in range(len(x)):
        before, begun = np.zeros(size, x.dtype), False
        for t in range(x.shape[1]):
            begun = begun or bool(reset is not None and reset[row, t])
            if mask is not None and not mask[row, t]:
                y[row, t] = np.concatenate([before, x[row, t]])
                continue
            if begun:
                before, begun = np.zeros(size, x.dtype), False
            y[row, t] = np.concatenate([before, x[row, t]])
            before = x[row, t, x.shape[2] - size :]
    return y


@pytest.mark.parametrize("seed", range(6))
def test_the_context_is_of_the_last_frame_that_is_used(seed):
    rng = np.random.default_rng(seed)
    x = floats(3, 9, 5, seed=seed)
    size = int(rng.integers(1, 6))
    mask, reset = rng.random((3, 9)) < 0.6, rng.random((3, 9)) < 0.3
    cell = lstm(size + 5)
    net, after = Network([Context(size), cell]), Network([cell])
    for flags in ({}, {"mask": mask}, {"reset": reset}, {"mask": mask, "reset": reset}):
        wide = by_hand(x, size, flags.get("mask"), flags.get("reset"))
        np.testing.assert_array_equal(net.run(x, **flags)[0], after.run(wide, **flags)[0])
    np.testing.assert_array_equal(net(x, lengths=[9, 4, 0])[1, :4], net(x[1:2, :4])[0])
    assert net(x[:, :0]).shape == (3, 0, 4)


def framed():
    """Return a graph with convolutions over the 12 samples of a frame, in two branches that are merged."""
    nodes = (
        Reshape((-1, 1)),
        Conv1D(floats(3, 1, 4), floats(4), strides=2, activation="relu"),
        Conv1D(floats(3, 4, 4, seed=2), padding="same"),
        Merge("add"),
        GlobalPool("max"),
    )
    return PerFrame((12,), nodes, ((0,), (1,), (2,), (2, 3), (4,)))


def test_frames_are_independent():
    node, x = framed(), floats(3, 2 * BLOCK + 5, 12)
    net = Network([node, lstm(4)])
    whole = node.apply(x)
    inner = Network(node.nodes, ["a", "b", "c", "d", "e"], inputs={"x": (12,)},
                    wires=[("x",), ("a",), ("b",), ("b", "c"), ("d",)])  # fmt: skip
    np.testing.assert_array_equal(whole.reshape(-1, 4), inner(x.reshape(-1, 12)))
    order = np.random.default_rng(3).permutation(x.shape[1])
    np.testing.assert_array_equal(node.apply(x[:, order]), whole[:, order])
    stream = net.stream(3)
    got = [stream.step(x[:, 0])[:, None], stream.run(x[:, 1:7]), stream.run(x[:, 7:])]
    np.testing.assert_array_equal(np.concatenate(got, axis=1), net(x))
    mask = np.random.default_rng(4).random(x.shape[:2]) < 0.5
    np.testing.assert_array_equal(net(x, mask), Network([lstm(4)])(whole, mask))  # the mask still applies
    reset = np.random.default_rng(5).random(x.shape[:2]) < 0.1
    np.testing.assert_array_equal(net.run(x, reset=reset)[0], Network([lstm(4)]).run(whole, reset=reset)[0])
    assert net(x[:0]).shape == (0, x.shape[1], 4)
    assert net(x[:, :0]).shape == (3, 0, 4)


def test_frames_of_several_axes():
    node = PerFrame((6, 2), (Conv1D(floats(3, 2, 5)), Flatten()), ((0,), (1,)))
    net = Network([node, Dense(floats(20, 3))], inputs={"x": (None, 6, 2)})
    x = floats(2, 4, 6, 2)
    assert net.shapes == {"x": (None, 6, 2), "layer_0": (None, 20), "layer_1": (None, 3)}
    np.testing.assert_array_equal(net(x)[:, 1], Network([*node.nodes, Dense(floats(20, 3))])(x[:, 1]))


def test_frames_of_any_length():
    node = PerFrame((None, 2), (Dense(floats(2, 3)), Attention()), ((0,), (1, 1, 1)))
    net = Network([node], inputs={"x": (None, None, 2)})
    x = floats(2, 3, 5, 2)
    assert net(x[:, :, :4]).shape == (2, 3, 4, 3)
    alone = Network(
        [Dense(node.nodes[0].kernel), Attention()], ["a", "b"], inputs={"x": (None, 2)}, wires=[("x",), ("a", "a", "a")]
    )
    np.testing.assert_array_equal(net(x)[1, 2], alone(x[1, 2][None])[0])


def test_the_plan_of_a_per_frame_graph():
    node = framed()
    assert node.parameters == 3 * 4 + 4 + 3 * 4 * 4
    assert node.multiplications == 5 * 3 * 4 + 5 * 3 * 4 * 4  # five windows of twelve samples
    assert "2 of 5 nodes in the fused kernel" in str(Network([node]).plan())


def test_edges_are_those_of_numpy():
    x = floats(2, 3, 7)
    for mode, before, after in (("reflect", 6, 2), ("edge", 9, 0), ("wrap", 3, 7)):
        node = Take.of_padding(mode, 7, before, after)
        np.testing.assert_array_equal(node.apply(x), np.pad(x, [(0, 0), (0, 0), (before, after)], mode=mode))


def test_magnitudes():
    x = floats(2, 3, 8)
    expected = np.abs(x[..., :4] + 1j * x[..., 4:])
    np.testing.assert_allclose(Network([Magnitude()])(x), expected, rtol=1e-6)
    np.testing.assert_allclose(Network([Magnitude(0.5)])(x), np.sqrt(expected**2 + 0.5), rtol=1e-6)


INSIDE = (Reshape((-1, 1)), Conv1D(floats(3, 1, 4)), Flatten())
BAD = {
    "context of 0": (lambda: Context(0), ValueError, "Context: expected size to be an integer from 1"),
    "a short frame": (
        lambda: Network([Context(4)], inputs={"x": (None, 3)}),
        ShapeError,
        "layer_0: Context expected frames of at least 4 numbers",
    ),
    "no nodes": (
        lambda: PerFrame((4,), (), ()),
        ValueError,
        "PerFrame: expected nodes and takes of the same length, got 0 and 0",
    ),
    "no frame": (
        lambda: PerFrame((), INSIDE, ((0,), (1,), (2,))),
        ValueError,
        "expected frame to be the shape of a frame",
    ),
    "cells within": (
        lambda: PerFrame((4, 3), (lstm(3),), ((0,),)),
        ValueError,
        "with cells, .* aren't allowed, got Recurrent",
    ),
    "a mask within": (lambda: PerFrame((4, 3), (Masking(),), ((0,),)), ValueError, "got Masking"),
    "a later value": (lambda: PerFrame((4,), INSIDE, ((0,), (2,), (1,))), ValueError, "node 2 to take earlier values"),
    "two for one": (lambda: PerFrame((4,), INSIDE, ((0,), (1, 1), (2,))), ValueError, "node 2 to take earlier values"),
    "unused": (lambda: PerFrame((4,), INSIDE, ((0,), (1,), (1,))), ValueError, "the output of node 2 isn't used"),
    "too short": (
        lambda: PerFrame((4, 1), (Dense(floats(2, 2)),), ((0,),)),
        ShapeError,
        "PerFrame: node 1: expected an input of 2 features",
    ),
    "two dtypes": (
        lambda: PerFrame((4,), (Dense(floats(4, 2)), Dense(np.ones((2, 2)))), ((0,), (1,))),
        TypeError,
        "PerFrame: expected nodes of one dtype, got float32, float64",
    ),
    "another frame": (
        lambda: Network([framed()], inputs={"x": (None, 13)}),
        ShapeError,
        r"layer_0: PerFrame expected frames \[B, T, 12\], got \[B, T, 13\]",
    ),
    "no indices": (lambda: Take(()), ValueError, "Take: expected a sequence of at least one index"),
    "below 0": (lambda: Take((0, -1)), ValueError, "Take: expected every index to be an integer from 0"),
    "beyond": (lambda: Network([Take((3,))], inputs={"x": (None, 3)}), ShapeError, "an axis of more than 3 entries"),
    "odd": (
        lambda: Network([Magnitude()], inputs={"x": (None, 3)}),
        ShapeError,
        "Magnitude expected an even number of features",
    ),
    "epsilon": (lambda: Magnitude(-1.0), ValueError, "Magnitude: expected epsilon to be 0 or above"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_nodes_and_inputs_are_refused(case):
    build, error, message = BAD[case]
    with pytest.raises(error, match=message):
        build()


def test_a_selection_of_steps_cannot_be_streamed():
    net = Network([Take((0, 2), axis=1), Activation("tanh")])
    with pytest.raises(ValueError, match="it selects steps of the whole sequence"):
        net.stream()
    net = Network([Select(0, 4, axis=-1), Take((3, 0)), Magnitude()], inputs={"x": (None, 6)})
    x = floats(1, 5, 6)
    np.testing.assert_array_equal(net.stream().run(x), net(x))
