"""Streams: the same bits for any chunking, independent states, and networks that can't be streamed."""

import copy
import pickle
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from family import learned, random_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import fill, make_cell, make_network, make_stack, make_states

from cellstack import CellSpec, Network, Sessions, ShapeError, State
from cellstack.cells.spec import GATES, STATES
from cellstack.nodes import Activation, Bidirectional, Cell, Conv1D, Dense, Embedding, GlobalPool, Recurrent

DTYPES = st.sampled_from(["float32", "float64"])


def make_x(net, batch, steps, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, steps, net.input_size)).astype(net.dtype)


def make_lstm(inputs=3, units=(4,), dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    widths = (inputs, *units)
    return Network([Recurrent(tuple(make_cell(rng, i, h, dtype) for i, h in zip(widths, units, strict=False)))])


def same(one, other):
    return all(equal(a, b) for a, b in zip(one, other, strict=True))


def equal(one, other):
    """Whether arrays are equal, NaN included: with unbounded gates a cell may overflow."""
    return np.array_equal(one, other, equal_nan=True)


@given(
    seed=st.integers(0, 10_000),
    dtype=DTYPES,
    batch=st.integers(1, 9),
    chunks=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    steps_alone=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_chunking_gives_the_same_bits(seed, dtype, batch, chunks, steps_alone):
    net = make_network(seed, dtype, streams=True)
    total = sum(chunks)
    x = make_x(net, batch, total, seed)
    start = make_states(np.random.default_rng(seed), net, batch)
    whole, stream = net.stream(batch), net.stream(batch)
    whole.state = stream.state = start
    y, parts, at = whole.run(x), [], 0
    for size in chunks:
        if size == 1 or steps_alone:
            parts += [stream.step(x[:, t])[:, None] for t in range(at, at + size)]
        else:
            parts.append(stream.run(x[:, at : at + size]))
        at += size
    assert y.dtype == dtype
    assert equal(np.concatenate([y[:, :0], *parts], axis=1), y)
    expected, after = net.run(x, state=start)
    for one, other, third in zip(whole.state, stream.state, after, strict=True):
        assert same(one, other)
        assert same(one, third)
    if total and expected.ndim == 3:
        assert equal(y, expected)
    elif total:
        assert equal(y[:, -1], expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("seed", range(12))
def test_every_kind_of_cell_by_itself(seed, kind, dtype):
    """Steps, chunks and one pass: the same bits, from the cell's own initial state."""
    rng = np.random.default_rng(seed)
    net = Network([Recurrent((fill(rng, random_spec(rng, kind, largest=40), dtype),))])
    x = make_x(net, 3, 10)
    y, after = net.run(x)
    for cuts in ([], [1], [3, 4], list(range(1, 10))):
        stream = net.stream(3)
        parts = [
            stream.run(x[:, a:b]) if b - a > 1 else stream.step(x[:, a])[:, None]
            for a, b in zip([0, *cuts], [*cuts, 10], strict=True)
        ]
        assert np.array_equal(np.concatenate(parts, axis=1), y)
        assert type(stream.state[0]) is type(after[0])
        assert same(stream.state[0], after[0])
    fork = stream.fork()
    assert np.array_equal(fork.step(x[:, 0]), stream.step(x[:, 0]))


def test_a_residual_is_added_between_kernel_streams():
    rng = np.random.default_rng(0)
    cells = tuple(make_cell(rng, 4, 4, kind=kind) for kind in GATES)
    plain, residual = Network([Recurrent(cells)]), Network([Recurrent(cells, residual=True)])
    x = make_x(plain, 2, 8)
    stream, expected = residual.stream(2), residual(x)
    assert not np.array_equal(expected, plain(x))
    assert np.array_equal(np.stack([stream.step(x[:, t]) for t in range(8)], axis=1), expected)
    assert [len(state) for state in stream.state] == [len(STATES[kind]._fields) for kind in GATES]
    stream.reset()
    assert np.array_equal(stream.run(x), expected)
    assert all(same(one, other) for one, other in zip(stream.state, residual.run(x)[1], strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_a_step_is_what_the_network_returns_after_that_step(seed):
    nodes = make_network(seed, streams=True).nodes
    net = (
        Network([*nodes, GlobalPool("last")])
        if Network(nodes)(np.zeros((1, 1, nodes[0].input_size))).ndim == 3
        else Network(nodes)
    )
    x, stream = make_x(net, 2, 6), net.stream(2)
    expected = np.stack([net(x[:, : t + 1]) for t in range(6)], axis=1)
    assert np.array_equal(np.stack([stream.step(x[:, t]) for t in range(6)], axis=1), expected)
    stream.reset()
    assert np.array_equal(stream.run(x), expected)


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize(("inputs", "units"), [(1, (1,)), (12, (64, 64)), (128, (128,)), (5, (17, 3, 33))])
def test_wide_layers_too(inputs, units, batch):
    net = Network(
        [*make_lstm(inputs, units).nodes, Dense(np.random.default_rng(1).normal(size=(units[-1], 40)).astype("f4"))]
    )
    x, stream = make_x(net, batch, 30), net.stream(batch)
    steps = np.stack([stream.step(x[:, t]) for t in range(30)], axis=1)
    assert np.array_equal(steps, net(x))
    assert same([s for pair in stream.state for s in pair], [s for pair in net.run(x)[1] for s in pair])


@given(order=st.lists(st.integers(0, 2), max_size=30), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_interleaved_streams_are_independent(order, seed):
    net = make_network(seed, streams=True)
    streams = [net.stream(2) for _ in range(3)]
    xs = [make_x(net, 2, 30, n) for n in range(3)]
    seen = [[] for _ in range(3)]
    for which in order:
        seen[which].append(streams[which].step(xs[which][:, len(seen[which])]))
    for n in range(3):
        expected = net.stream(2).run(xs[n])
        for t, y in enumerate(seen[n]):
            assert np.array_equal(y, expected[:, t])


def test_rows_are_independent():
    net = make_lstm(3, (20, 5))
    x = make_x(net, 4, 6)
    clean = net.stream(4).run(x)
    x[2, 1] = np.nan
    spoilt = net.stream(4).run(x)
    assert np.array_equal(spoilt[[0, 1, 3]], clean[[0, 1, 3]])
    assert np.isnan(spoilt[2, 1:]).all()


def test_threads_each_with_a_stream():
    net = make_lstm(3, (30, 30))
    x, expected, wrong = make_x(net, 1, 200), make_lstm(3, (30, 30))(make_x(net, 1, 200)), []

    def work():
        stream = net.stream()
        wrong.extend(t for t in range(200) if not np.array_equal(stream.step(x[:, t]), expected[:, t]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ── state ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
def test_one_thread_at_a_time():
    """Two threads in one stream would mix their steps: the second call is refused, and the first isn't affected."""
    net = make_lstm(8, (64, 64))
    stream, alone = net.stream(8), net.stream(8)
    x = make_x(net, 8, 20_000)
    got = []
    thread = threading.Thread(target=lambda: got.append(stream.run(x)))
    thread.start()

    def look_while_it_runs():
        while thread.is_alive():
            stream.state  # noqa: B018  (unlike a step, it doesn't change the state)

    with pytest.raises(RuntimeError, match="Stream: only one thread at a time"):
        look_while_it_runs()
    thread.join()
    assert np.array_equal(got[0], alone.run(x))
    assert all(same(one, other) for one, other in zip(stream.state, alone.state, strict=True))


def test_reading_and_setting_the_state_copies():
    net = make_lstm(3, (4, 5))
    x, stream = make_x(net, 2, 8), net.stream(2)
    assert [pair.shape for pair in stream.state] == [(2, 2, 4), (2, 2, 5)]
    assert all((array == 0).all() for pair in stream.state for array in pair)
    stream.run(x[:, :4])
    kept = stream.state
    rest = stream.run(x[:, 4:])
    kept_before = [array.copy() for pair in kept for array in pair]
    stream.state = kept
    kept[0].h[:] = 9  # this must not change the stream
    assert np.array_equal(stream.run(x[:, 4:]), rest)
    stream.state = [State(*kept_before[:2]), kept_before[2:]]  # other pairs are accepted too
    assert np.array_equal(stream.run(x[:, 4:]), rest)


def test_a_stream_whose_state_is_nan_can_be_forked():
    net = Network([Recurrent((make_cell(np.random.default_rng(0), 2, 3, kind="slstm"),))])
    stream = net.stream()
    stream.step(np.full((1, 2), np.nan, "float32"))
    fork, x = stream.fork(), np.ones((1, 2), "float32")
    assert np.isnan(fork.state[0].c).all()
    assert np.array_equal(fork.step(x), stream.step(x), equal_nan=True)
    with pytest.raises(ValueError, match="to be finite"):
        fork.state = stream.state


def test_a_fork_is_independent():
    net = make_lstm(3, (4,))
    x, stream = make_x(net, 1, 9), net.stream()
    stream.run(x[:, :5])
    other = stream.fork()
    expected = net(x)
    assert np.array_equal(other.run(x[:, 5:]), expected[:, 5:])
    assert np.array_equal(stream.run(x[:, 5:]), expected[:, 5:])
    assert other.network is net


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_and_pickles_are_refused_with_what_to_use_instead(copied):
    net = make_lstm()
    with pytest.raises(TypeError, match=r"Stream: can't be copied or pickled: fork\(\)"):
        copied(net.stream())
    with pytest.raises(TypeError, match=r"Sessions: can't be copied or pickled: .* state\(session\)"):
        copied(net.pool(3))


@pytest.mark.parametrize(
    ("rows", "hit"),
    [
        (None, [0, 1, 2, 3]),
        (2, [2]),
        (-1, [3]),
        ([0, 3], [0, 3]),
        (np.array([3, 1]), [1, 3]),
        (slice(1, 3), [1, 2]),
        ([True, False, False, True], [0, 3]),
        ([], []),
    ],
)
def test_reset_of_some_rows(rows, hit):
    net = make_lstm(3, (4, 5))
    x, stream = make_x(net, 4, 6), net.stream(4)
    stream.run(x)
    before = stream.state
    stream.reset(rows)
    for pair, old in zip(stream.state, before, strict=True):
        for array, kept in zip(pair, old, strict=True):
            for row in range(4):
                assert np.array_equal(array[row], np.zeros_like(kept[row]) if row in hit else kept[row])
    assert np.array_equal(stream.run(x)[hit], net(x)[hit])


@pytest.mark.parametrize("kind", [kind for kind in GATES if learned(kind)])
def test_a_stream_starts_and_resets_to_the_learned_state(kind):
    cell = make_cell(np.random.default_rng(0), 3, 4, kind=kind, learn_initial_state=True)
    net = Network([Recurrent((cell,))])
    start = [np.tile(cell.arrays[f"initial_{name}"], (3, 1)) for name in cell.spec.state_sizes]
    x, stream = make_x(net, 3, 6), net.stream(3)
    assert same(stream.state[0], start)
    assert np.array_equal(stream.run(x), net(x))
    ended = stream.state[0]
    stream.reset([0, 2])
    for array, first, kept in zip(stream.state[0], start, ended, strict=True):
        assert np.array_equal(array, [first[0], kept[1], first[2]])
    stream.reset()
    assert same(stream.state[0], start)


@pytest.mark.parametrize("seed", range(6))
def test_a_stream_of_resets_is_a_pass_with_resets(seed):
    rng = np.random.default_rng(seed)
    below = make_stack(rng, 3, residual=True)
    net = Network([below, Activation("softsign"), make_stack(rng, below.units)])
    x = make_x(net, 2, 9)
    reset = np.zeros((2, 9), bool)
    reset[0, 3] = reset[1, 5] = reset[1, 8] = True
    stream, steps = net.stream(2), []
    for t in range(9):
        stream.reset(reset[:, t])
        steps.append(stream.step(x[:, t]))
    assert np.array_equal(np.stack(steps, axis=1), net.run(x, reset=reset)[0])


def test_reset_to_a_state_of_these_rows():
    net = make_lstm(3, (4,))
    stream, state = net.stream(3), make_states(np.random.default_rng(0), net, 2)
    stream.reset([2, 0], state)
    assert np.array_equal(stream.state[0].h[[2, 0, 1]], [*state[0].h, np.zeros(4)])
    assert np.array_equal(stream.state[0].c[[2, 0, 1]], [*state[0].c, np.zeros(4)])


def test_reset_clears_nan():
    net = make_lstm(3, (4,))
    stream, x = net.stream(2), make_x(net, 2, 3)
    stream.run(x * np.float32("nan"))
    stream.reset()
    assert np.array_equal(stream.run(x), net(x))


# ── kinds of input ──────────────────────────────────────────────────────────────────────────────────────────────────

FORMS = {
    "float64": lambda x: x.astype("float64"),
    "integers": lambda x: x.astype("int32"),
    "lists": lambda x: x.tolist(),
    "fortran order": np.asfortranarray,
    "strided": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "another byte order": lambda x: x.astype(">f4"),
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "unaligned": lambda x: np.frombuffer(b" " + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dense", [False, True])
def test_any_array_gives_what_a_plain_one_gives(form, dense):
    nodes = make_lstm(3, (4,)).nodes + ((Dense(np.ones((4, 2), "f4")),) if dense else ())
    net = Network(nodes)
    x = np.round(make_x(net, 2, 4) * 3)
    stream, expected = net.stream(2), net(x)
    assert np.array_equal(stream.run(FORMS[form](x)), expected)
    stream.reset()
    assert np.array_equal(np.stack([stream.step(FORMS[form](x[:, t])) for t in range(4)], axis=1), expected)


@pytest.mark.parametrize("nodes", [(Activation("linear"),), (GlobalPool("last"),), make_lstm().nodes])
def test_what_is_returned_is_the_caller_s(nodes):
    net = Network(nodes)
    x, stream = np.ones((1, 3), "f4"), net.stream()
    first = stream.step(x)
    kept = first.copy()
    second = stream.step(2 * x)
    assert np.array_equal(first, kept)
    second[:] = 7
    chunk = stream.run(x[:, None])
    chunk[:] = 7
    assert (x == 1).all()


def test_a_chunk_of_no_steps():
    net = make_lstm(3, (4,))
    stream = net.stream(2)
    stream.run(make_x(net, 2, 3))
    before = stream.state
    assert stream.run(np.zeros((2, 0, 3))).shape == (2, 0, 4)
    assert same(stream.state[0], before[0])


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────

X = np.zeros((2, 3), "f4")
CALLS = {
    "rank": (lambda s: s.step(X[None]), ShapeError, r"x \[B, I=3\], got \(1, 2, 3\): one step has no time axis"),
    "vector": (lambda s: s.step(X[0]), ShapeError, r"x \[B, I=3\], got \(3,\)"),
    "width": (lambda s: s.step(X[:, :2]), ShapeError, r"I=3\], got \(2, 2\)"),
    "batch": (lambda s: s.step(X[:1]), ShapeError, r"B=2, got \(1, 3\): use net\.stream\(batch=1\)"),
    "dtype": (lambda s: s.step(X + 1j), TypeError, "real numbers, got complex64"),
    "chunk rank": (lambda s: s.run(X), ShapeError, r"x \[B, T, I=3\], got \(2, 3\)"),
    "chunk batch": (lambda s: s.run(X[:1, None]), ShapeError, r"B=2, got \(1, 1, 3\)"),
    "state": (lambda s: setattr(s, "state", (State(X, X),)), ShapeError, r"h of state of layer 0 \[B=2, H=4\]"),
    "states": (
        lambda s: setattr(s, "state", ()),
        ShapeError,
        r"one state per cell \(1\), or as a flat list of 2 arrays, got tuple of length 0",
    ),
    "no state": (lambda s: setattr(s, "state", None), TypeError, "got None: use reset"),
    "row": (lambda s: s.reset(2), IndexError, "out of bounds"),
    "rows": (lambda s: s.reset([0, 1], (State(X, X),)), ShapeError, r"\[B=2, H=4\], got \(2, 3\)"),
}


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("dense", [False, True])
def test_a_bad_call_says_what_was_expected_and_changes_nothing(case, dense):
    call, error, message = CALLS[case]
    nodes = make_lstm().nodes + ((Activation("relu"),) if dense else ())
    stream = Network(nodes).stream(2)
    stream.step(X + 1)
    before = stream.state
    with pytest.raises(error, match=message):
        call(stream)
    assert same(stream.state[0], before[0])


BACKWARDS = Recurrent(make_lstm(4).nodes[0].cells, go_backwards=True)


@pytest.mark.parametrize(
    ("node", "why"),
    [
        (GlobalPool("mean"), "layer_1 can't run step by step: the mean over time needs the whole sequence"),
        (GlobalPool("max"), "layer_1 can't run step by step: the max over time needs the whole sequence"),
        (BACKWARDS, "layer_1 can't run step by step: it runs backwards from the end of the sequence"),
    ],
)
def test_a_network_that_needs_the_whole_sequence_is_no_stream(node, why):
    with pytest.raises(ValueError, match=why) as error:
        Network([*make_lstm().nodes, node]).stream()
    assert "\n" not in str(error.value)


def test_a_bidirectional_network_is_no_stream():
    cells = make_lstm().nodes[0].cells
    net = Network([Bidirectional(Recurrent(cells), Recurrent(cells, go_backwards=True))])
    with pytest.raises(
        ValueError, match="layer_0 can't run step by step: it runs backwards from the end of the sequence"
    ):
        net.stream()


@pytest.mark.parametrize("batch", [0, -1, 1.5, "2", None, 2**31, 2**62, 2**70])
def test_a_batch_is_a_number_of_rows(batch):
    with pytest.raises(ValueError, match="batch to be an integer from 1 to 2147483647, got "):
        make_lstm().stream(batch)


@pytest.mark.parametrize("threads", [2**31, 2**40, 2**70])
def test_more_threads_than_can_be(threads):
    with pytest.raises(ValueError, match="threads to be an integer from 1 to 2147483647, got "):
        make_lstm().run(np.zeros((1, 2, 3)), threads=threads)
    assert make_lstm().run(np.zeros((1, 2, 3)), threads=2**31 - 1)[0].shape == (1, 2, 4)


# ── bfloat16 and int8 weights ───────────────────────────────────────────────────────────────────────────────────────


def narrow_net(dtype="float32"):
    rng = np.random.default_rng(11)
    cells = (make_cell(rng, 6, 24, dtype), make_cell(rng, 24, 24, dtype, kind="gru"))
    return Network([Recurrent(cells, residual=True), Dense(rng.normal(size=(24, 3)).astype(dtype))])


@pytest.mark.parametrize(("weights", "near", "far"), [("bfloat16", 2e-2, 1e-5), ("int8", 5e-2, 1e-5)])
def test_results_with_bfloat16_and_int8_weights_are_close(weights, near, far):
    net = narrow_net()
    x = np.random.default_rng(12).normal(size=(2, 40, 6)).astype(np.float32)
    stream = net.stream(2, weights=weights)
    assert f"weights='{weights}'" in repr(stream)
    y, whole = stream.run(x), net(x)
    assert far < np.abs(y - whole).max() / np.abs(whole).max() < near
    again = net.stream(2, weights=weights)
    steps = [again.step(x[:, t]) for t in range(20)]
    fork = again.fork()
    steps += [fork.step(x[:, t]) for t in range(20, 40)]
    np.testing.assert_array_equal(np.stack(steps, axis=1), y)


def test_unsupported_weights_are_refused():
    with pytest.raises(ValueError, match="weights to be one of float32, bfloat16, int8, got 'int4'"):
        narrow_net().stream(weights="int4")
    with pytest.raises(TypeError, match="expected float32 arrays for weights='int8', got float64"):
        narrow_net("float64").stream(weights="int8")


@pytest.mark.parametrize("batch", [1, 5])
def test_bits_do_not_depend_on_threads(batch):
    net = make_network(3, "float32", streams=True)
    x, one, two = make_x(net, batch, 700), net.stream(batch), net.stream(batch, threads=2)
    assert "threads=2" in repr(two)
    assert equal(two.run(x), one.run(x))
    fork = two.fork()
    assert fork.threads == 2
    for stream in (two, fork):
        assert all(same(a, b) for a, b in zip(stream.state, one.state, strict=True))
    two.reset(rows=0)
    one.reset(rows=0)
    assert equal(two.step(x[:, 0]), one.step(x[:, 0]))
    for bad in (0, -1, 1.0, "2", True):
        with pytest.raises(ValueError, match="expected threads to be an integer from 1"):
            net.stream(threads=bad)


@pytest.mark.parametrize("nodes", [("cell",), ("cell", "tanh", "cell")])
def test_refused_concurrent_calls_change_no_state(nodes):
    """The cells count their steps: a refused call has changed none of them."""
    one = np.ones((1, 1), "f4")
    counts = Cell(CellSpec(1, 1, kind="rnn", activation="linear"), 0 * one, one, np.ones(1, "f4"))  # h = h_prev + 1
    net = Network([Recurrent((counts,)) if node == "cell" else Activation(node) for node in nodes])
    stream, x = net.stream(), np.zeros((1, 300, 1), "f4")
    outcomes = []

    def go():
        for _ in range(50):
            try:
                stream.run(x)
                outcomes.append("done")
            except RuntimeError as error:  # noqa: PERF203
                outcomes.append(str(error))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: go(), range(3)))
    assert outcomes.count("done") > 0
    assert all(outcome == "done" or "one thread at a time" in outcome for outcome in outcomes)
    assert all(state.h[0, 0] == 300 * outcomes.count("done") for state in stream.state)


def test_ids_that_the_network_computes_cannot_be_streamed():
    table = Embedding(np.ones((5, 2), "f4"))
    cell = make_network(0, "float32", streams=True).cells[0]
    net = Network([Recurrent((cell,), return_sequences=False), table])
    for open_it in (net.stream, lambda: net.pool(2)):
        with pytest.raises(ValueError, match="it takes a vector of ids that the network computes"):
            open_it()


def test_layers_too_wide_for_int8_sums_are_refused():
    width = 133_153
    cell = Cell(CellSpec(width, 1, kind="rnn", use_bias=False), np.ones((width, 1), "f4"), np.ones((1, 1), "f4"))
    with pytest.raises(ValueError, match="expected at most 133144 features and units for weights='int8', got 133153"):
        Network([Recurrent((cell,))]).stream(weights="int8")


class AlarmError(Exception):
    """The exception of the signal handler in these tests."""


@pytest.fixture
def alarms():
    """Return a function that runs a call which an alarm may interrupt anywhere, and returns whether it did."""

    def ring(*_):
        raise AlarmError

    def call(seconds, function, *arguments):
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                function(*arguments)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except AlarmError:
            return True
        return False

    before = signal.signal(signal.SIGALRM, ring)
    yield call
    signal.signal(signal.SIGALRM, before)


def several_parts(rng):
    """Return a network whose cells, convolution and residual have separate states, in parts that run in sequence."""
    cells = tuple(make_cell(rng, 6, 6) for _ in range(3))
    kernel = rng.normal(size=(3, 6, 6)).astype(np.float32)
    head = rng.normal(size=(6, 6)).astype(np.float32)
    return Network([Recurrent(cells, residual=True), Conv1D(kernel, padding="causal"), Dense(head, None, "softmax")])


@pytest.mark.parametrize("kind", ["stream", "sessions"])
def test_a_signal_leaves_a_stream_before_or_after_a_step(alarms, kind):
    rng = np.random.default_rng(0)
    net = several_parts(rng)
    xs = rng.normal(size=(400, 2, 6)).astype(np.float32)
    twin, interrupted, taken = net.stream(2), 0, 0
    pool, stream = net.pool(4), net.stream(2)
    numbers = [pool.open(), pool.open()]
    for x_t in xs:
        step = (lambda x: pool.step(numbers, x)) if kind == "sessions" else stream.step
        before = twin.state
        twin.step(x_t)
        if alarms(rng.uniform(1e-6, 150e-6), step, x_t):
            interrupted += 1
            states = [pool.state(number) for number in numbers]
            now = stacked(states) if kind == "sessions" else stream.state
            if same(now, before):
                twin.state = before
            else:
                taken += 1
        now = stacked([pool.state(number) for number in numbers]) if kind == "sessions" else stream.state
        assert same(now, twin.state)
    assert interrupted > taken  # some in the middle of a step, which then had no effect


def stacked(states):
    """Return the states of sessions as one state, with a row per session."""
    return tuple(
        type(entries[0])(*(np.concatenate(arrays) for arrays in zip(*entries, strict=True)))
        for entries in zip(*states, strict=True)
    )


def test_an_exception_at_any_line_of_open_loses_no_session():
    pool = several_parts(np.random.default_rng(1)).pool(3)
    lines = 0

    def interrupt(frame, event, arg):
        nonlocal reached, lines
        if (
            event == "line" and frame.f_lineno > reached
        ):  # not at the exit of a with statement, which signals don't interrupt
            reached, lines = frame.f_lineno, lines + 1
            if lines == place:
                raise AlarmError
        return interrupt

    place = number = 0
    while not number:
        place, reached, lines = place + 1, 0, 0
        sys.settrace(lambda frame, event, arg: interrupt if frame.f_code is Sessions.open.__code__ else None)
        try:
            number = 1 + pool.open()
        except AlarmError:
            assert len(pool) == 0
        finally:
            sys.settrace(None)
    assert place > 6
    pool.close(number - 1)
    assert len({pool.open() for _ in range(3)}) == len(pool) == 3
