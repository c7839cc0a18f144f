"""Networks as graphs: results, masks, shapes, errors, and descriptions."""

import copy
import pickle

import numpy as np
import pairs
import pytest
import tolerances
from networks import by_reference, make_cell, make_graph, make_states

import cellstack as cs
from cellstack import Network, ShapeError, State
from cellstack.nodes import (
    Activation,
    Conv1D,
    Dense,
    Embedding,
    Flatten,
    GlobalPool,
    GroupedDense,
    LayerNorm,
    Masking,
    Merge,
    Permute,
    Pool1D,
    Recurrent,
    Repeat,
    Reshape,
    Scale,
    Select,
)

TOLERANCE = {"float32": tolerances.NETWORK, "float64": tolerances.REFERENCE_DOUBLE}
SEEDS = pairs.seeds(75, 150)


def tuple_of(answer):
    return answer if isinstance(answer, tuple) else (answer,)


def equal(one, other):
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(tuple_of(one), tuple_of(other), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@SEEDS
def test_a_graph_matches_the_reference(seed, dtype):
    net, given = make_graph(seed, dtype)
    rng = np.random.default_rng(seed)
    timed = any(net.graph.timed(name) for name in net.inputs)
    mask = rng.random((3, 6)) < 0.7 if timed and seed % 3 else None
    state = make_states(rng, net, 3) if seed % 2 else None
    y, after = net.run(given, state, mask=mask)
    expected, expected_after = by_reference(net, given, state, mask)
    assert len(tuple_of(y)) == len(net.outputs)
    for name, got, want in zip(net.outputs, tuple_of(y), tuple_of(expected), strict=True):
        assert got.dtype == dtype
        assert got.shape == want.shape
        known = net.shapes[name]
        assert all(length in (None, found) for length, found in zip(known, got.shape[1:], strict=True))
        np.testing.assert_allclose(got, want, atol=10 * TOLERANCE[dtype] * max(1.0, np.abs(want).max()), rtol=0)
    for got, want in zip(after, expected_after, strict=True):
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one, other, atol=10 * TOLERANCE[dtype] * max(1.0, np.abs(other).max()), rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@SEEDS
def test_a_saved_graph_is_restored_bit_for_bit(seed, dtype, tmp_path):
    net, given = make_graph(seed, dtype)
    path, again = tmp_path / "net.safetensors", tmp_path / "again.safetensors"
    net.save(path)
    other = cs.load(path)
    for name in ("names", "inputs", "wires", "outputs", "shapes", "dtype", "metadata"):
        assert getattr(other, name) == getattr(net, name), name
    assert [type(node) for node in other.nodes] == [type(node) for node in net.nodes]
    assert [node.summary for node in other.nodes] == [node.summary for node in net.nodes]
    mask = None
    if any(net.graph.timed(name) for name in net.inputs):
        mask = np.random.default_rng(seed).random((3, 6)) < 0.7
    assert equal(other(given, mask), net(given, mask))
    other.save(again)
    assert again.read_bytes() == path.read_bytes()


@SEEDS
def test_rows_of_a_graph_are_independent(seed):
    net, given = make_graph(seed)
    y = tuple_of(net(given))
    for row in range(3):
        alone = tuple_of(net({name: array[row : row + 1] for name, array in given.items()}))
        assert equal(tuple(one[0] for one in alone), tuple(one[row] for one in y))
    nothing = tuple_of(net({name: array[:0] for name, array in given.items()}))
    assert [one.shape for one in nothing] == [(0, *one.shape[1:]) for one in y]


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_of_a_graph_run_alike(clone):
    for seed in range(20):
        net, given = make_graph(seed)
        y, other = net(given), clone(net)
        assert equal(other(given), y)
        assert repr(other) == repr(net)
        for node in other.nodes:
            assert not any(value.flags.writeable for value in vars(node).values() if isinstance(value, np.ndarray))


# ── inputs and outputs ──────────────────────────────────────────────────────────────────────────────────────────────


def floats(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def lstm(inputs=3, units=4, **flags):
    return Recurrent((make_cell(np.random.default_rng(0), inputs, units),), **flags)


def two_in_two_out():
    """Return a network with a sequence and a vector as inputs, and an LSTM and a head over both as outputs."""
    nodes = [lstm(), GlobalPool("mean"), Merge(), Dense(floats(6, 2))]
    wires = [("x",), ("lstm",), ("pool", "speaker"), ("both",)]
    inputs, names = {"x": (None, 3), "speaker": (2,)}, ["lstm", "pool", "both", "head"]
    return Network(nodes, names, inputs=inputs, wires=wires, outputs=["head", "lstm"])


def test_two_inputs_and_two_outputs():
    net, x, speaker = two_in_two_out(), floats(5, 7, 3), floats(5, 2, seed=1)
    head, h = net({"x": x, "speaker": speaker})
    chain = Network([lstm(), GlobalPool("mean")])
    assert np.array_equal(h, Network([lstm()])(x))
    np.testing.assert_allclose(head, np.concatenate([chain(x), speaker], axis=1) @ floats(6, 2), atol=1e-6)
    for given in ((x, speaker), [x, speaker], {"speaker": speaker.tolist(), "x": x.astype("float64")}):
        assert equal(net(given), (head, h))
    mask = np.arange(7) < np.array([7, 3, 0, 1, 5])[:, None]
    masked, after = net.run((x, speaker), mask=mask)
    assert equal(net.run((x, speaker), lengths=[7, 3, 0, 1, 5])[0], masked)
    assert equal(net.run((x, speaker), lengths={"x": [7, 3, 0, 1, 5]})[0], masked)
    assert equal(net((x, speaker), lengths=[7, 3, 0, 1, 5]), masked)
    with pytest.raises(TypeError, match="expected mask or lengths, got both"):
        net((x, speaker), mask, lengths=[7, 3, 0, 1, 5])
    assert isinstance(after[0], State)
    assert np.array_equal(after[0].h, masked[1][:, -1])


def test_each_input_has_its_own_mask():
    nodes = [lstm(return_sequences=False), lstm(return_sequences=False), Merge("sub")]
    net = Network(nodes, ["a", "b", "less"], inputs=("x", "y"), wires=[("x",), ("y",), ("a", "b")])
    x, y, alone = floats(4, 5, 3), floats(4, 9, 3, seed=1), Network([lstm(return_sequences=False)])
    lengths = {"x": [1, 2, 3, 4], "y": [9, 8, 0, 6]}
    parts = [alone.run(array, lengths=lengths[name])[0] for name, array in (("x", x), ("y", y))]
    assert np.array_equal(net.run((x, y), lengths=lengths)[0], parts[0] - parts[1])
    mask = np.arange(5) < np.array([1, 2, 3, 4])[:, None]
    assert np.array_equal(net((x, y), {"x": mask}), parts[0] - alone(y))
    with pytest.raises(ShapeError, match=r"mask \[B=4, T=9\], got \(4, 5\)"):
        net((x, y), mask)


def test_states_are_in_the_order_of_the_nodes():
    net = Network([lstm(), lstm(4, 5)], ["a", "b"], wires=[("x",), ("a",)], outputs=["a", "b"])
    x, state = floats(2, 6, 3), make_states(np.random.default_rng(0), net, 2)
    (a, b), after = net.run(x, state)
    halves = net.run(x[:, :3], state)
    (a_end, b_end), again = net.run(x[:, 3:], halves[1])
    assert np.array_equal(np.concatenate([halves[0][0], a_end], axis=1), a)
    assert np.array_equal(np.concatenate([halves[0][1], b_end], axis=1), b)
    assert equal(tuple(s.c for s in again), tuple(s.c for s in after))


def test_what_a_graph_returns_is_the_caller_s():
    nodes = [Activation("linear"), Select(None, None, 1, -1), Flatten(), Scale(floats(3), floats(3))]
    names = ["same", "all", "flat", "scaled"]
    wires = [("x",), ("x",), ("x",), ("x",)]
    net, x = Network(nodes, names, inputs={"x": (1, 3)}, wires=wires, outputs=names), floats(2, 1, 3)
    kept = x.copy()
    answers = net(x)
    for answer in answers:
        assert answer.flags.c_contiguous
        before = [other.copy() for other in answers]
        answer += 1
        assert np.array_equal(x, kept)
        assert sum(np.array_equal(one, other) for one, other in zip(answers, before, strict=True)) == 3


@pytest.mark.parametrize("form", [lambda a: a.tolist(), lambda a: a.astype("float64"), lambda a: a.astype(">i2")])
def test_ids_may_be_any_whole_numbers(form):
    table, ids = floats(9, 3), np.random.default_rng(0).integers(0, 9, size=(2, 5))
    net = Network([Embedding(table)])
    assert net.input_size is None
    assert np.array_equal(net(form(ids)), table[ids])


def test_ids_keep_their_dtype_through_nodes_that_only_reshape():
    """16,777,217 can't be represented in float32: a conversion would change the id."""
    table = np.zeros((2**24 + 2, 1), "float32")
    table[2**24 + 1] = 7
    net = Network([Select(-1, None), Embedding(table)])
    assert net(np.array([[0, 2**24 + 1]]))[0, 0, 0] == 7
    assert net.graph.ids == {"x"}


def test_masked_ids_may_be_anything():
    net = Network([Embedding(floats(9, 3)), lstm(return_sequences=False)])
    ids, mask = np.array([[1, 2, -1], [3, 99, -7]]), np.array([[True, True, False], [True, False, False]])
    assert np.array_equal(net(ids, mask), net(np.where(mask, ids, 0), mask))
    assert np.array_equal(net(np.where(mask, ids, np.nan), mask), net(np.where(mask, ids, 0), mask))


# ── resets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_resets_reach_every_cell():
    names, wires = ["scale", "a", "b", "both", "c"], [("x",), ("scale",), ("scale",), ("a", "b"), ("both",)]
    nodes = [Scale(floats(3), floats(3)), lstm(), lstm(3, 5), Merge(), lstm(9, 2)]
    net, x = Network(nodes, names, wires=wires), floats(2, 8, 3)
    reset = np.zeros((2, 8), bool)
    reset[:, [3, 5]] = True
    parts = [net(x[:, piece]) for piece in (slice(0, 3), slice(3, 5), slice(5, 8))]
    assert np.array_equal(net.run(x, reset=reset)[0], np.concatenate(parts, axis=1))


def test_a_slice_of_time_keeps_resets():
    net, x = Network([Select(None, None, 2), lstm()]), floats(1, 9, 3)
    reset = np.zeros((1, 9), bool)
    reset[0, 3] = True  # not in the slice: the reset moves to the next selected step
    expected = np.concatenate([net(x[:, :4]), net(x[:, 4:])], axis=1)
    assert np.array_equal(net.run(x, reset=reset)[0], expected)


@pytest.mark.parametrize(
    "node",
    [Conv1D(floats(2, 3, 3)), Pool1D("max", 2), Permute((2, 1)), Select(None, None, -1), Reshape((-1, 3))],
    ids=lambda node: type(node).__name__,
)
def test_resets_are_refused_where_pieces_would_mix(node):
    net, x = Network([node], ["mixes"], inputs={"x": (4, 3)}), floats(1, 4, 3)
    net.run(x)
    with pytest.raises(ValueError, match=rf"reset isn't supported: mixes \({type(node).__name__}\) combines steps"):
        net.run(x, reset=np.zeros((1, 4), bool))


def test_a_convolution_of_one_step_supports_resets():
    net, x = Network([Conv1D(floats(1, 3, 3)), lstm()]), floats(1, 6, 3)
    reset = np.array([[False, False, True, False, False, False]])
    assert np.array_equal(net.run(x, reset=reset)[0], np.concatenate([net(x[:, :2]), net(x[:, 2:])], axis=1))


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def graph(nodes=None, names=("a", "b"), **wiring):
    return Network(nodes or [Activation("tanh"), Activation("relu")], names, **wiring)


TWO = {"inputs": ("x", "y"), "wires": [("x",), ("a",)]}
MERGED = {"inputs": {"x": (None, 3), "y": (None, 3)}, "wires": [("x", "y")]}

WIRINGS = {
    "to the future": (lambda: graph(wires=[("b",), ("a",)]), ValueError, "wires of a to be earlier nodes, got 'b'"),
    "to itself": (lambda: graph(wires=[("a",), ("a",)]), ValueError, "wires of a to be earlier nodes, got 'a'"),
    "to nothing": (lambda: graph(wires=[("x",), ("c",)]), ValueError, "wires of b to be inputs or nodes, got 'c'"),
    "number": (lambda: graph(wires=[("x",), (0,)]), ValueError, "to be inputs or nodes, got 0"),
    "text": (lambda: graph(wires=["x", "a"]), ValueError, "wires of a to be a tuple of names, got 'x'"),
    "none": (lambda: graph(wires=[("x",), ()]), ValueError, r"wires of b to be a tuple of names, got \(\)"),
    "too few": (lambda: graph(wires=[("x",)]), ValueError, "wires to be 2 tuples of names, one per node, got 1"),
    "wires text": (lambda: graph(wires="xa"), ValueError, "wires to be 2 tuples"),
    "wires number": (lambda: graph(wires=3), ValueError, "wires to be 2 tuples of names, one per node, got int"),
    "two to one": (lambda: graph(wires=[("x",), ("x", "a")]), ShapeError, "b: Activation expected one input, got 2"),
    "one to a merge": (lambda: Network([Merge()]), ShapeError, "layer_0: Merge expected at least two values to concat"),
    "three to sub": (
        lambda: Network([Merge("sub")], inputs="xyz", wires=[("x", "y", "z")]),
        TypeError,
        "inputs to be a tuple of names, got 'xyz'",
    ),
    "three less": (
        lambda: Network([Merge("sub")], inputs=("x", "y", "z"), wires=[("x", "y", "z")]),
        ShapeError,
        "Merge expected two values to sub, got 3",
    ),
    "unused node": (lambda: graph(wires=[("x",), ("x",)]), ValueError, "node 'a' doesn't lead to an output"),
    "unused after": (lambda: graph(outputs=["a"]), ValueError, "node 'b' doesn't lead to an output"),
    "unused input": (lambda: graph(**TWO), ValueError, "input 'y' doesn't lead to an output"),
    "no wires": (lambda: graph(inputs=("x", "y")), ValueError, "several inputs, x, y, require wires"),
    "no inputs": (lambda: graph(inputs=()), ValueError, "inputs to be different names, at least one"),
    "equal inputs": (lambda: graph(inputs=("x", "x")), ValueError, "inputs to be different names"),
    "input a node": (lambda: graph(inputs=("a",)), ValueError, "an input and a node have the same name, 'a'"),
    "input's slash": (lambda: graph(inputs=("a/b",)), ValueError, "input's name to be printable text without '/'"),
    "input number": (lambda: graph(inputs=(1,)), ValueError, "input's name to be printable text"),
    "shape text": (lambda: graph(inputs={"x": "T"}), ValueError, "shape of input x to be its axes after B, got 'T'"),
    "shape of nothing": (lambda: graph(inputs={"x": ()}), ValueError, r"its axes after B, got \(\)"),
    "shape of zero": (lambda: graph(inputs={"x": (0, 3)}), ValueError, "input x: expected every axis to be an integer"),
    "shape of true": (lambda: graph(inputs={"x": (True, 3)}), ValueError, "every axis to be an integer from 1 .*True"),
    "long shape": (lambda: graph(inputs={"x": (1,) * 17}), ValueError, "shape of input x to be its axes after B"),
    "width": (lambda: Network([lstm()], inputs={"x": (None, 5)}), ShapeError, "input of 3 features, got 5 from before"),
    "rank": (lambda: Network([lstm()], inputs={"x": (3,)}), ShapeError, "Recurrent expected a sequence"),
    "output text": (lambda: graph(outputs="b"), ValueError, "outputs to be a tuple of nodes' names, got 'b'"),
    "no output": (lambda: graph(outputs=()), ValueError, "outputs to be a tuple"),
    "output an input": (
        lambda: graph(outputs=("x",)),
        ValueError,
        "every output to be a node or a state of one, got 'x'",
    ),
    "equal outputs": (lambda: graph(outputs=("b", "b")), ValueError, "outputs that differ"),
    "merged ranks": (
        lambda: Network([Merge("add")], inputs={"x": (None, 3), "y": (3,)}, wires=[("x", "y")]),
        ShapeError,
        r"the same number of axes, got \[B, T, 3\] and \[B, 3\]",
    ),
    "merged widths": (
        lambda: Network([Merge("add")], inputs={"x": (None, 3), "y": (None, 2)}, wires=[("x", "y")]),
        ShapeError,
        r"of compatible shapes to add, got \[B, T, 3\] and \[B, T, 2\]",
    ),
    "merged steps": (
        lambda: Network([Merge()], inputs={"x": (4, 3), "y": (5, 3)}, wires=[("x", "y")]),
        ShapeError,
        r"of compatible shapes to concat, got \[B, 4, 3\] and \[B, 5, 3\]",
    ),
    "merged axis": (lambda: Network([Merge("concat", 3)], **MERGED), ShapeError, "values with an axis 3"),
    "reshape": (
        lambda: Network([Reshape((2, 4))], inputs={"x": (3, 3)}),
        ShapeError,
        r"layer_0: can't reshape \[B, 3, 3\] to \[B, 2, 4\]: the sizes",
    ),
    "reshape rest": (
        lambda: Network([Reshape((-1, 4))], inputs={"x": (3, 3)}),
        ShapeError,
        r"can't reshape \[B, 3, 3\] to \[B, -1, 4\]",
    ),
    "permute": (lambda: Network([Permute((2, 1))], inputs={"x": (3,)}), ShapeError, "2 axes after the batch, got"),
    "repeat": (lambda: Network([Repeat(2)], inputs={"x": (3, 3)}), ShapeError, "Repeat expected a vector"),
    "select": (lambda: Network([Select(0, 1, 1, 3)]), ShapeError, "a value with an axis 3"),
    "select nothing": (lambda: Network([lstm(), Select(4, 9, 1, -1)]), ShapeError, "at least one of 4 features"),
    "rank 4": (lambda: Network([Reshape((2, 2, 2)), Activation("relu")]), ShapeError, r"or \[B, W\], got \[B, 2, 2, 2"),
    "embedding": (
        lambda: Network([lstm(), Embedding(floats(3, 3))]),
        ShapeError,
        r"layer_1: Embedding expected ids \[B, T\], got \[B, T, 4\]",
    ),
    "flat width": (
        lambda: Network([Flatten(), Dense(floats(9, 2))], inputs={"x": (4, 3)}),
        ShapeError,
        "layer_1: expected an input of 9 features, got 12",
    ),
    "dtypes": (
        lambda: Network([Scale(floats(3), floats(3)), LayerNorm(np.ones(3))]),
        TypeError,
        "layer_1 in float32, .*got float64",
    ),
}


@pytest.mark.parametrize("case", WIRINGS)
def test_a_bad_graph_is_refused_where_it_is_built(case):
    build, error, message = WIRINGS[case]
    with pytest.raises(error, match=message) as raised:
        build()
    assert "\n" not in str(raised.value)


NODES = {
    "embedding rank": (lambda: Embedding(floats(3)), ShapeError, r"Embedding: expected table \[V, E\], got \(3,\)"),
    "embedding dtype": (lambda: Embedding(np.ones((3, 2), int)), TypeError, "table in float32 or float64, got int64"),
    "mask zero": (lambda: Embedding(floats(3, 2), 1), TypeError, "mask_zero to be True or False, got 1"),
    "masking": (lambda: Masking("0"), ValueError, "Masking: expected value to be a finite number, got '0'"),
    "masking nan": (lambda: Masking(float("nan")), ValueError, "value to be a finite number, got nan"),
    "scale": (lambda: Scale(floats(3), floats(2)), ShapeError, r"Scale: expected shift \[3\], got \(2,\)"),
    "norm": (lambda: LayerNorm(floats(3), floats(2)), ShapeError, r"LayerNorm: expected bias \[3\], got \(2,\)"),
    "norm dtypes": (lambda: LayerNorm(floats(3), np.ones(3)), TypeError, "bias in float32, as gain is, got float64"),
    "grouped kernel": (lambda: GroupedDense(floats(3, 2)), ShapeError, r"kernel \[G, I/G, O/G\], got \(3, 2\)"),
    "grouped bias": (lambda: GroupedDense(floats(3, 2, 4), floats(4)), ShapeError, r"bias \[12\], got \(4,\)"),
    "epsilon": (lambda: LayerNorm(epsilon=0.0), ValueError, "epsilon to be a finite number above 0, got 0.0"),
    "conv rank": (lambda: Conv1D(floats(3, 2)), ShapeError, r"kernel \[K, C/groups, F\], got \(3, 2\)"),
    "conv bias": (lambda: Conv1D(floats(3, 2, 4), floats(3)), ShapeError, r"bias \[4\], got \(3,\)"),
    "groups": (lambda: Conv1D(floats(3, 2, 4), groups=3), ValueError, "groups to divide F=4, got 3"),
    "mask": (lambda: Conv1D(floats(3, 2, 4), keeps_mask=True), ValueError, "causal windows .* keeps_mask, got valid"),
    "strides": (lambda: Conv1D(floats(3, 2, 4), strides=0), ValueError, "strides to be an integer from 1"),
    "dilation": (lambda: Conv1D(floats(3, 2, 4), dilation=1.0), ValueError, "dilation to be an integer from 1"),
    "padding": (
        lambda: Conv1D(floats(3, 2, 4), padding="full"),
        ValueError,
        "padding to be one of valid, same, causal",
    ),
    "padding pair": (lambda: Conv1D(floats(3, 2, 4), padding=(1, -1)), ValueError, "padding to be an integer from 0"),
    "padding three": (lambda: Conv1D(floats(3, 2, 4), padding=(1, 1, 1)), ValueError, "padding to be one of"),
    "conv activation": (lambda: Conv1D(floats(3, 2, 4), activation="x"), ValueError, "Conv1D: activation: expected"),
    "pool mode": (lambda: Pool1D("last", 2), ValueError, "Pool1D: expected mode to be one of mean, max, got 'last'"),
    "pool size": (lambda: Pool1D("max", 0), ValueError, "size to be an integer from 1"),
    "pool strides": (lambda: Pool1D("max", 2, -1), ValueError, "strides to be an integer from 1"),
    "pool padding": (lambda: Pool1D("max", 2, 2, "full"), ValueError, "padding to be one of valid, same, causal, got"),
    "reshape": (lambda: Reshape(()), ValueError, r"shape to be lengths, at most one of them -1, got \(\)"),
    "reshape two": (lambda: Reshape((-1, -1)), ValueError, "at most one of them -1"),
    "reshape zero": (lambda: Reshape((0, 2)), ValueError, "every axis to be an integer from 1"),
    "reshape float": (lambda: Reshape((2, -1.0)), ValueError, "every axis to be an integer from 1 .*got -1.0"),
    "reshape true": (lambda: Reshape((True, 2)), ValueError, "every axis to be an integer from 1 .*got True"),
    "reshape text": (lambda: Reshape("12"), ValueError, "shape to be lengths"),
    "reshape long": (lambda: Reshape((1,) * 17), ValueError, "shape to be lengths"),
    "permute": (lambda: Permute((1, 1)), ValueError, r"dims to be each axis once, counted from 1, got \(1, 1\)"),
    "permute zero": (lambda: Permute((0, 1)), ValueError, "dims to be each axis once"),
    "permute float": (lambda: Permute((2.0, 1)), ValueError, "dims to be each axis once"),
    "repeat": (lambda: Repeat(0), ValueError, "times to be an integer from 1"),
    "merge mode": (
        lambda: Merge("dot"),
        ValueError,
        "mode to be one of concat, add, mul, ave, max, sub, min, got 'dot'",
    ),
    "merge axis": (lambda: Merge("concat", 0), ValueError, "axis to be an integer other than 0, got 0"),
    "select step": (lambda: Select(step=0), ValueError, "step and axis other than 0, got 0 and 1"),
    "select axis": (lambda: Select(axis=0), ValueError, "step and axis other than 0, got 1 and 0"),
    "select start": (lambda: Select("a"), ValueError, "start to be an integer, got 'a'"),
    "select axis none": (lambda: Select(axis=None), ValueError, "axis to be an integer, got None"),
}


@pytest.mark.parametrize("case", NODES)
def test_a_bad_node_is_refused_where_it_is_built(case):
    build, error, message = NODES[case]
    with pytest.raises(error, match=message):
        build()


X, SPEAKER = np.zeros((2, 5, 3)), np.zeros((2, 2))
CALLS = {
    "one of two": (X, TypeError, "expected the inputs x, speaker, by name or in order, got ndarray"),
    "three of two": ((X, X, X), TypeError, "by name or in order, got 3 values"),
    "none": ({}, TypeError, "expected the inputs x, speaker, got none"),
    "missing": ({"x": X}, TypeError, "expected the inputs x, speaker, got x"),
    "unknown": ({"x": X, "speaker": SPEAKER, "y": X}, TypeError, "expected the inputs x, speaker, got x, speaker, y"),
    "rank": ((X, X), ShapeError, r"expected speaker \[B, 2\], got \(2, 5, 3\)"),
    "width": ((X, SPEAKER[:, :1]), ShapeError, r"expected speaker \[B, 2\], got \(2, 1\)"),
    "sequence": ((X[:, :, :1], SPEAKER), ShapeError, r"expected x \[B, T, I=3\], got \(2, 5, 1\)"),
    "batch": ((X, SPEAKER[:1]), ShapeError, r"expected speaker with B=2, as x has, got \(1, 2\)"),
    "text": ((X, SPEAKER.astype(str)), TypeError, "expected speaker to hold real numbers"),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_bad_call_of_a_graph_says_what_was_expected(case):
    given, error, message = CALLS[case]
    with pytest.raises(error, match=message):
        two_in_two_out()(given)


def test_masks_of_inputs_without_time_are_refused():
    with pytest.raises(
        ValueError, match="mask for 'speaker', which has no time axis: the inputs with a time axis are x"
    ):
        two_in_two_out()((X, SPEAKER), {"speaker": np.ones((2, 2), bool)})
    with pytest.raises(ValueError, match="mask isn't supported: no input has a time axis"):
        Network([Activation("relu")], inputs={"x": (3,)})(np.ones((2, 3)), np.ones((2, 3), bool))


IDS = {
    "above": ([[1, 9]], ValueError, "Embedding: expected ids from 0 to 8, got 1 to 9"),
    "one above": ([[9, 9]], ValueError, "Embedding: expected ids from 0 to 8, got 9$"),
    "below": ([[-1, 2]], ValueError, "expected ids from 0 to 8, got -1 to 2"),
    "fractions": ([[0.5, 2]], ValueError, "ids to be integers, got numbers that aren't whole"),
    "nan": ([[np.nan, 2]], ValueError, "ids to be integers, got numbers that aren't whole"),
    "text": ([["a", "b"]], TypeError, "expected x to hold real numbers, got <U1"),
    "rank": ([1, 2], ShapeError, r"expected x \[B, T\], got \(2,\)"),
    "features": ([[[1], [2]]], ShapeError, r"expected x \[B, T\], got \(1, 2, 1\)"),
}


@pytest.mark.parametrize("case", IDS)
def test_bad_ids_say_what_was_expected(case):
    ids, error, message = IDS[case]
    with pytest.raises(error, match=message):
        Network([Embedding(floats(9, 3))])(np.array(ids))


LATE = {
    "flat": ([Flatten(), Dense(floats(12, 2))], r"layer_1: expected an input of 12 features, got 9"),
    "reshape": ([Reshape((2, -1))], r"layer_0: can't reshape \[B, 3, 3\] to \[B, 2, -1\]: the sizes"),
    "permuted": ([Permute((2, 1)), Dense(floats(4, 2))], "layer_1: expected an input of 4 features, got 3"),
}


@pytest.mark.parametrize("case", LATE)
def test_errors_that_only_a_call_can_find_name_the_node(case):
    nodes, message = LATE[case]
    net = Network(nodes)
    net(floats(1, 4, 3))
    with pytest.raises(ShapeError, match=message):
        net(floats(1, 3, 3))


def test_lengths_that_don_t_match_are_refused_by_name():
    net = Network([Merge("add")], ["sum"], inputs=("x", "y"), wires=[("x", "y")])
    with pytest.raises(
        ShapeError, match=r"sum: Merge expected values of compatible shapes .* \[B, 4, 3\] and \[B, 5, 3\]"
    ):
        net((floats(1, 4, 3), floats(1, 5, 3)))
    one = net((floats(2, 4, 3), floats(2, 1, 3)))  # one step is broadcast, as in NumPy and ONNX
    assert np.array_equal(one, floats(2, 4, 3) + floats(2, 1, 3))


def test_an_input_without_a_batch_axis_gets_a_hint():
    net = two_in_two_out()
    with pytest.raises(ShapeError, match=r"expected x \[B, T, I=3\], got \(7, 3\): add a batch axis: x\[None\]$"):
        net((floats(7, 3), floats(5, 2)))
    with pytest.raises(ShapeError, match=r"expected speaker \[B, 2\], got \(2,\): add a batch axis: x\[None\]$"):
        net((floats(1, 7, 3), floats(2)))
    with pytest.raises(ShapeError, match="got \\(7, 4\\): the last axis is the feature axis"):
        net((floats(7, 4), floats(5, 2)))
    chain = Network([lstm()])
    with pytest.raises(ShapeError, match=r"got \(3,\): add a batch axis: x\[None\]$"):
        chain.stream().step(floats(3))
    with pytest.raises(ShapeError, match=r"got \(7, 3\): add a batch axis: x\[None\]$"):
        chain.stream().run(floats(7, 3))


# ── descriptions ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_repr_shows_wires_unless_they_are_to_the_node_before():
    net = two_in_two_out()
    assert repr(net).splitlines() == [
        "Network of float32: x [B, T, 3], speaker [B, 2] -> head [B, 2], lstm [B, T, 4], 140 numbers",
        "  lstm                    Recurrent   LSTM 3 -> 4           [B, T, 4]  128",
        "  pool                    GlobalPool  mean over time        [B, 4]       0",
        "  both  of pool, speaker  Merge       concat along axis -1  [B, 6]       0",
        "  head                    Dense       linear                [B, 2]      12",
    ]
    plan = net.plan()
    assert [line.split()[0] for line in plan] == ["lstm", "pool", "both", "head", "total"]
    assert "of pool, speaker" in plan[2]
    assert "of " not in plan[3].split("NumPy")[0]
    shown = repr(Network([Embedding(floats(9, 3)), lstm()]))
    assert shown.splitlines()[0] == "Network of float32: [B, T] -> [B, T, 4], 155 numbers"


@pytest.mark.parametrize(
    ("node", "summary"),
    [
        (Conv1D(floats(3, 2, 4)), "2 -> 4, 3 taps, valid"),
        (
            Conv1D(floats(3, 2, 4), None, 2, (1, 0), 3, 2, "relu"),
            "4 -> 4, 3 taps, (1, 0), strides 2, dilation 3, groups 2, relu",
        ),
        (Pool1D("max", 3, 2, "same"), "max of 3 steps every 2, same"),
        (Embedding(floats(9, 3), True), "9 ids, 0 is masked"),
        (Masking(-1.0), "steps of -1"),
        (LayerNorm(), "over the features, epsilon 0.001"),
        (Scale(floats(3), floats(3)), "x·scale + shift"),
        (Flatten(), "to one axis"),
        (Reshape((2, -1)), "to [B, 2, -1]"),
        (Permute((2, 1)), "axes 2, 1"),
        (Repeat(4), "4 times"),
        (Select(-1, None), "-1: of axis 1"),
        (Select(None, 5, 2, -1), ":5:2 of axis -1"),
        (Merge("concat", 1), "concat along axis 1"),
        (Merge("max"), "max"),
    ],
)
def test_summaries(node, summary):
    assert node.summary == summary


def test_parameters_are_counted():
    nodes = [Embedding(floats(9, 3)), LayerNorm(floats(3), floats(3)), Conv1D(floats(2, 3, 4), floats(4)), Flatten()]
    assert [node.parameters for node in nodes] == [27, 6, 28, 0]


# ── inference of inputs ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("nodes", "shape"),
    [
        ([Repeat(3), lstm()], (3,)),
        ([Dense(floats(7, 3)), Repeat(3)], (7,)),
        ([Activation("relu"), GlobalPool(), Dense(floats(7, 3))], (None, 7)),
        ([Embedding(floats(9, 3))], (None,)),
        ([Select(None, 2), Embedding(floats(9, 3))], (None,)),
        ([Reshape((2, 3)), Permute((2, 1)), Flatten()], (None, None)),
        ([Conv1D(floats(2, 3, 4), groups=2)], (None, 6)),
        ([Flatten(), Dense(floats(12, 2))], (None, None)),
        ([Activation("relu")], (None, None)),
    ],
)
def test_shapes_of_inputs_are_inferred_from_the_nodes(nodes, shape):
    assert Network(nodes).shapes["x"] == shape


def test_merged_values_have_the_same_number_of_axes():
    nodes = [lstm(return_sequences=False), Dense(floats(2, 4)), Merge("add")]
    net = Network(nodes, ["a", "b", "sum"], inputs=("x", "c"), wires=[("x",), ("c",), ("a", "b")])
    assert net.shapes["c"] == (2,)
    assert net((floats(2, 5, 3), floats(2, 2))).shape == (2, 4)


def test_construction_takes_linear_time():
    count = 3000
    nodes = [Activation("relu")] * count + [Merge("add")]
    names = [f"n{n}" for n in range(count + 1)]
    wires = [(f"in{n}",) for n in range(count)] + [tuple(names[:count])]
    net = Network(nodes, names, inputs=[f"in{n}" for n in range(count)], wires=wires)
    assert net.graph.done[-1] == tuple(names[:count])
