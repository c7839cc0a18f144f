"""Streams of graphs: the same bits as a run, memories of convolutions, and nodes that can't run step by step."""

import re

import numpy as np
import pairs
import pytest
from networks import make_cell, make_graph, make_states

from cellstack import Network, ShapeError
from cellstack.nodes import (
    Activation,
    Bidirectional,
    Context,
    Conv1D,
    Dense,
    Embedding,
    Flatten,
    GlobalPool,
    LayerNorm,
    Masking,
    Merge,
    PerFrame,
    Permute,
    Pool1D,
    Recurrent,
    Repeat,
    Reshape,
    Scale,
    Select,
    Take,
)
from cellstack.streaming.parts import Frames

SEEDS = pairs.seeds(75, 150)


def floats(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def lstm(inputs=3, units=4, **flags):
    return Recurrent((make_cell(np.random.default_rng(0), inputs, units),), **flags)


def tuple_of(answer):
    return answer if isinstance(answer, tuple) else (answer,)


def cut(given, piece):
    return {name: array[:, piece] for name, array in given.items()}


def equal(one, other):
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(tuple_of(one), tuple_of(other), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@SEEDS
def test_steps_and_chunks_are_a_pass(seed, dtype):
    net, given = make_graph(seed, dtype, streams=True)
    rng = np.random.default_rng(seed)
    expected, after = net.run(given)
    for cuts in ([], [1], [2, 5], [1, 2, 3, 4, 5], [3, 3]):
        stream, parts = net.stream(3), []
        for first, last in zip([0, *cuts], [*cuts, 6], strict=True):
            alone = last - first == 1 and rng.integers(2)
            y = tuple_of(stream.step(cut(given, first)) if alone else stream.run(cut(given, slice(first, last))))
            parts.append([one[:, None] if alone else one for one in y])
        assert equal(tuple(np.concatenate(pieces, axis=1) for pieces in zip(*parts, strict=True)), expected)
        for one, other in zip(stream.state, after, strict=False):
            assert equal(tuple(one), tuple(other))
    fork = stream.fork()
    assert equal(fork.step(cut(given, 0)), stream.step(cut(given, 0)))


@SEEDS
def test_states_can_be_read_and_set(seed):
    net, given = make_graph(seed, streams=True)
    stream, other = net.stream(3), net.stream(3)
    start = make_states(np.random.default_rng(seed), net, 3)
    stream.state = (*start, *stream.state[len(start) :])
    stream.run(cut(given, slice(0, 3)))
    other.run(cut(given, slice(0, 1)))
    other.state = stream.state
    expected = stream.run(cut(given, slice(3, 6)))
    assert equal(other.run(cut(given, slice(3, 6))), expected)
    stream.reset([0, 2])
    fresh = net.stream(3)
    rows = [0, 2]
    assert equal(
        tuple(one[rows] for one in tuple_of(stream.run(given))), tuple(one[rows] for one in tuple_of(fresh.run(given)))
    )


def causal(**settings):
    return Conv1D(floats(3, 3, 4), floats(4, seed=1), padding="causal", **settings)


def test_a_causal_convolution_keeps_the_steps_that_it_needs():
    net, x = Network([causal(dilation=2), lstm(4, 5)]), floats(2, 9, 3)
    stream = net.stream(2)
    assert [type(part).__name__ for part in stream.state] == ["State", "Frames"]
    assert not stream.state[1].x.any()
    steps = np.stack([stream.step(x[:, t]) for t in range(9)], axis=1)
    assert np.array_equal(steps, net(x))
    assert np.array_equal(stream.state[1].x, x[:, -4:])
    kept = stream.state
    kept[1].x[:] = 7  # this must not change the stream
    assert np.array_equal(stream.state[1].x, x[:, -4:])
    stream.reset(1)
    assert np.array_equal(stream.state[1].x, [x[0, -4:], np.zeros((4, 3))])
    stream.reset([0], (tuple(array[:1] for array in kept[0]), Frames(x[:1, :4])))
    assert np.array_equal(stream.state[1].x, [x[0, :4], np.zeros((4, 3))])
    assert np.array_equal(stream.state[0].h[0], kept[0].h[0])


def test_a_convolution_of_one_step_needs_none():
    net, x = Network([Conv1D(floats(1, 3, 4), groups=1)]), floats(2, 9, 3)
    stream = net.stream(2)
    assert stream.state == ()
    assert np.array_equal(np.stack([stream.step(x[:, t]) for t in range(9)], axis=1), net(x))


def test_two_inputs_of_features_and_ids():
    nodes = [Embedding(floats(9, 2)), lstm(), Merge(), Dense(floats(6, 2)), GlobalPool("last")]
    names, wires = ["e", "lstm", "both", "head", "last"], [("id",), ("x",), ("lstm", "e"), ("both",), ("head",)]
    net = Network(nodes, names, inputs=("x", "id"), wires=wires, outputs=["last", "lstm"])
    x, ids = floats(2, 5, 3), np.random.default_rng(0).integers(0, 9, size=(2, 5))
    stream = net.stream(2)
    for t in range(5):
        head, h = stream.step((x[:, t], ids[:, t]))
        assert np.array_equal(head, net((x[:, : t + 1], ids[:, : t + 1]))[0])
        assert np.array_equal(h, net((x, ids))[1][:, t])
    stream.reset()
    assert equal(stream.run({"id": ids.tolist(), "x": x.tolist()})[1], net((x, ids))[1])


def test_what_is_returned_is_the_caller_s():
    nodes = [Activation("linear"), Select(None, None, 1, -1), Scale(floats(3), floats(3))]
    net = Network(nodes, ["same", "all", "scaled"], wires=[("x",)] * 3, outputs=["same", "all", "scaled"])
    stream, x = net.stream(2), floats(2, 3)
    kept = x.copy()
    answers = stream.step(x)
    for number, answer in enumerate(answers):
        before = [other.copy() for other in answers]
        answer += 1
        changed = [not np.array_equal(one, other) for one, other in zip(answers, before, strict=True)]
        assert changed == [place == number for place in range(3)]
    assert np.array_equal(x, kept)


# ── masks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_steps_that_the_network_masks_are_refused_and_change_nothing():
    x, ids = floats(2, 3), np.array([3, 1])
    for node, good, bad in (
        (Masking(0.0), x, x * [[1], [0]]),
        (Embedding(floats(9, 3), mask_zero=True), ids, ids * [1, 0]),
    ):
        net = Network([node, Activation("tanh"), lstm()], ["mask", "tanh", "lstm"])
        stream = net.stream(2)
        first = stream.step(good)
        before = stream.state
        with pytest.raises(ValueError, match="mask masks a step of row 1: leave padding out"):
            stream.step(bad)
        assert equal(stream.state[0], before[0])
        chunk = np.stack([good, good], axis=1)
        assert np.array_equal(net(chunk)[:, 0], first)


def test_masks_that_affect_nothing_refuse_no_step():
    x, table = floats(2, 5, 3) * (np.arange(5) % 2)[:, None], floats(9, 3)
    ids = np.array([[0, 1, 0, 2, 3], [4, 0, 0, 5, 6]])
    dropped = Network([Masking(0.0), causal(), lstm(4)])
    assert np.array_equal(dropped.stream(2).run(x.astype("f4")), dropped(x))
    names, wires = ["a", "b", "both", "lstm"], [("x",), ("x",), ("a", "b"), ("both",)]
    merged = Network([Embedding(table, True), Embedding(table), Merge(), lstm(6)], names, wires=wires)
    assert np.array_equal(merged.stream(2).run(ids), merged(ids))
    alone = Network([Embedding(table, True), Dense(floats(3, 2))])
    assert np.array_equal(alone.stream(2).run(ids), alone(ids))


@pytest.mark.parametrize(("bad", "message"), [(9, "ids from 0 to 8, got 9$"), (0, "e masks a step of row 0")])
def test_bad_ids_change_nothing_even_after_cells(bad, message):
    nodes = [lstm(), Embedding(floats(9, 2), True), lstm(2), Merge()]
    wires = [("x",), ("id",), ("e",), ("a", "b")]
    stream = Network(nodes, ["a", "e", "b", "both"], inputs=("x", "id"), wires=wires).stream(1)
    stream.step((floats(1, 3), [1]))
    before = stream.state
    with pytest.raises(ValueError, match=message):
        stream.step((floats(1, 3), [bad]))
    assert all(equal(one, other) for one, other in zip(stream.state, before, strict=True))


# ── networks that can't be streamed ─────────────────────────────────────────────────────────────────────────────────

WHY = {
    "conv": ([Conv1D(floats(3, 3, 4))], "n0 can't run step by step: its windows contain future steps"),
    "same": ([Conv1D(floats(2, 3, 4), padding="same")], "n0 can't run step by step: its windows contain future steps"),
    "strides": (
        [Conv1D(floats(3, 3, 4), None, 2, "causal")],
        "n0 can't run step by step: it has an output every 2 steps",
    ),
    "pool1d": (
        [Pool1D("max", 2)],
        "n0 can't run step by step: the max of 2 steps needs padding='causal' and strides=1",
    ),
    "pool": ([GlobalPool("mean")], "n0 can't run step by step: the mean over time needs the whole sequence"),
    "flatten": ([Flatten()], "n0 can't run step by step: it changes the shape of the whole sequence"),
    "reshape": ([Reshape((-1, 3))], "n0 can't run step by step: it changes the shape of the whole sequence"),
    "permute": ([Permute((2, 1))], "n0 can't run step by step: it changes the shape of the whole sequence"),
    "repeat": ([GlobalPool("last"), Repeat(3)], "n1 can't run step by step: it returns 3 steps for every step"),
    "select": ([Select(-1, None)], "n0 can't run step by step: it selects steps of the whole sequence"),
    "ids": (
        [Select(-1, None), Embedding(floats(9, 3))],
        "n0 can't run step by step: it selects or moves ids of a sequence",
    ),
    "late mask": (
        [lstm(), Masking()],
        "n1 can't run step by step: it may mask a step after the state of n0 has changed",
    ),
}


@pytest.mark.parametrize("case", WHY)
def test_a_graph_that_can_t_be_a_stream_says_why_in_a_line(case):
    nodes, message = WHY[case]
    net = Network(nodes, [f"n{number}" for number in range(len(nodes))])
    with pytest.raises(ValueError, match=f"Stream: {message}") as error:
        net.stream()
    assert "\n" not in str(error.value)


def test_every_part_that_can_t_be_a_stream_is_named():
    """With advice that applies to the whole network."""
    back = Recurrent(lstm().cells, go_backwards=True)
    nodes = [Conv1D(floats(3, 3, 3), padding="same"), Conv1D(floats(3, 3, 3)), Bidirectional(lstm(), back)]
    names = ["same", "valid", "pair", "pool"]
    message = (
        "Stream: same, valid can't run step by step: its windows contain future steps, which a stream doesn't have "
        "(trained with padding='causal' they don't); pair can't run step by step: it runs backwards from the end of "
        "the sequence, which a stream doesn't have; pool can't run step by step: the mean over time needs the whole "
        "sequence, which a stream doesn't have; it runs whole sequences only: net(x), cellstack run"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        Network([*nodes, GlobalPool("mean")], names).stream()
    trained = Network([*nodes[2:], GlobalPool("mean")], names[2:], metadata={"task": "classify"})
    advice = "train without `bidirectional=True` and with `pooling='last'` for a network that"
    with pytest.raises(ValueError, match=re.escape(advice)):
        trained.stream()


def test_merging_along_time_can_t_be_a_stream():
    net = Network([Merge("concat", 1)], ["ends"], inputs=("x", "y"), wires=[("x", "y")])
    with pytest.raises(ValueError, match="ends can't run step by step: it concatenates whole sequences"):
        net.stream()


def test_an_input_without_time_can_t_be_a_stream():
    with pytest.raises(ValueError, match=r"expected inputs with a time axis, got x \[B, 3\]"):
        Network([Dense(floats(3, 2))], inputs={"x": (3,)}).stream()


def test_flatten_after_the_last_step_can_be_streamed():
    net, x = Network([lstm(return_sequences=False), Flatten(), LayerNorm(), Select(1, 3, axis=1)]), floats(2, 5, 3)
    stream = net.stream(2)
    steps = [stream.step(x[:, t]) for t in range(5)]
    assert all(np.array_equal(step, net(x[:, : t + 1])) for t, step in enumerate(steps))
    assert np.array_equal(net.stream(2).run(x), np.stack(steps, axis=1))


X, IDS = floats(2, 3), np.array([1, 2])
CALLS = {
    "one": (lambda s: s.step(X), TypeError, "Stream: expected the inputs x, id, by name or in order, got ndarray"),
    "rank": (lambda s: s.step((X[None], IDS)), ShapeError, r"x \[B, I=3\], got \(1, 2, 3\): one step has no time axis"),
    "ids": (lambda s: s.step((X, IDS[:, None])), ShapeError, r"expected id \(ids\) \[B\], got \(2, 1\)"),
    "chunk of ids": (lambda s: s.run((X[:, None], IDS)), ShapeError, r"expected id \(ids\) \[B, T\], got \(2,\)"),
    "batch": (lambda s: s.step((X, IDS[:1])), ShapeError, r"expected id with B=2, got \(1,\)"),
    "steps": (
        lambda s: s.run((X[:, None], np.array([[1, 2], [1, 2]]))),
        ShapeError,
        r"expected id with T=1, got \(2, 2\)",
    ),
    "state": (lambda s: setattr(s, "state", ()), ShapeError, "tuple of 1 states, one per cell, and 1 Frames, .*got 0"),
    "state number": (lambda s: setattr(s, "state", 3), ShapeError, "one per node with a memory, got int"),
    "memory": (
        lambda s: setattr(s, "state", (s.state[0], Frames(X))),
        ShapeError,
        r"expected Frames \[2, 2, 3\] in the state, got \(2, 3\)",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_bad_call_says_what_was_expected_and_changes_nothing(case):
    call, error, message = CALLS[case]
    nodes, wires = [causal(), Embedding(floats(9, 2)), Merge(), lstm(6)], [("x",), ("id",), ("a", "e"), ("both",)]
    stream = Network(nodes, ["a", "e", "both", "lstm"], inputs=("x", "id"), wires=wires).stream(2)
    stream.step((X, IDS))
    before = stream.state
    with pytest.raises(error, match=message):
        call(stream)
    assert all(equal(tuple(one), tuple(other)) for one, other in zip(stream.state, before, strict=True))


def test_known_widths_are_not_checked_again_at_every_step(monkeypatch):
    """The nodes were checked when the network was made; a step of the wrong width is still refused."""
    rng = np.random.default_rng(0)
    nodes = (Reshape((-1, 1)), Conv1D(rng.normal(size=(3, 1, 2)).astype("float32")), Flatten())
    mirrored = Take((1, 0, 1, 2, 3, 4))
    net = Network((Context(2), mirrored, PerFrame((6,), nodes, ((0,), (1,), (2,)))), inputs={"x": (None, 4)})
    monkeypatch.setattr("cellstack.streaming.engine.check_widths", None)
    x = rng.normal(size=(1, 3, 4)).astype("float32")
    stream = net.stream()
    answers = np.stack([stream.step(x[:, t]) for t in range(3)], axis=1)
    np.testing.assert_array_equal(answers, net(x))
    with pytest.raises(ShapeError, match=r"expected x \[B, I=4\], got \(1, 5\)"):
        stream.step(np.zeros((1, 5), np.float32))
