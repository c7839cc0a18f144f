"""Pools: sessions that are opened and closed at any time, each with the results of a separate stream."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from networks import make_cell, make_network

from cellstack import CellSpec, Network, ShapeError
from cellstack.nodes import Conv1D, Dense, Embedding, Masking, Merge, Recurrent, Standardise


def speech(dtype="float32", **flags):
    """Return a stack of two kinds of cells between other nodes, like a speech model."""
    rng = np.random.default_rng(0)
    lstm, gru = make_cell(rng, 5, 9, dtype, **flags), make_cell(rng, 9, 9, dtype, kind="gru")
    new = lambda *shape: rng.normal(size=shape).astype(dtype)  # noqa: E731
    nodes = [Standardise(new(5), np.abs(new(5)) + 1), Recurrent((lstm, gru), residual=True), Dense(new(9, 3), new(3))]
    return Network(nodes)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("flags", [{}, {"peepholes": True, "learn_initial_state": True}, {"layer_norm": True}], ids=str)
def test_every_session_has_the_results_of_a_separate_stream(flags, threads):
    net = speech(**flags)
    rng = np.random.default_rng(1)
    pool = net.pool(capacity=12, threads=threads)
    alone = {pool.open(): net.stream() for _ in range(7)}
    for step in range(60):
        if step % 10 == 9:  # close one session and open another
            gone = list(alone)[int(rng.integers(len(alone)))]
            pool.close(gone)
            del alone[gone]
            number = pool.open()
            assert number not in alone
            alone[number] = net.stream()
        some = rng.permutation(list(alone))[: rng.integers(0, len(alone) + 1)]
        x = rng.normal(size=(len(some), 5)).astype(np.float32)
        y = pool.step(some, x)
        assert y.shape == (len(some), 3)
        for row, number in enumerate(some):
            np.testing.assert_array_equal(y[row], alone[int(number)].step(x[row : row + 1])[0])
    for number, stream in alone.items():
        for mine, its in zip(pool.state(number), stream.state, strict=True):
            for a, b in zip(mine, its, strict=True):
                np.testing.assert_array_equal(a, b)
    assert len(pool) == len(alone) == 7


@pytest.mark.parametrize("seed", range(20))
def test_any_network_that_streams(seed):
    net = make_network(seed, "float64", streams=True)
    pool, stream = net.pool(3), net.stream(2)
    numbers = [pool.open() for _ in range(3)][::2]
    for x in np.random.default_rng(seed).normal(size=(4, 2, net.input_size)):
        np.testing.assert_array_equal(pool.step(numbers, x), stream.step(x))


def test_a_state_can_be_moved_to_a_new_session():
    net = speech()
    pool, stream = net.pool(2), net.stream()
    x = np.random.default_rng(2).normal(size=(3, 1, 5))
    stream.step(x[0])
    number = pool.open(stream.state)
    np.testing.assert_array_equal(pool.step([number], x[1]), stream.step(x[1]))
    other = net.stream()
    other.state = pool.state(number)
    np.testing.assert_array_equal(other.step(x[2]), stream.step(x[2]))


def test_ids():
    rng = np.random.default_rng(3)
    cell = make_cell(rng, 4, 6)
    net = Network([Embedding(rng.normal(size=(10, 4)).astype("float32")), Recurrent((cell,))])
    pool = net.pool(4)
    numbers = [pool.open(), pool.open()]
    np.testing.assert_array_equal(pool.step(numbers, [3, 7]), net.stream(2).step([3, 7]))


def test_the_memory_layout_of_arguments_does_not_change_results():
    net = Network([lstm(5, 4)])
    x = floats(6, 5)
    wide, unaligned, read_only = (
        np.zeros((6, 9), "f4"),
        np.zeros(6 * 20 + 1, "u1")[1:].view("f4").reshape(6, 5),
        x.copy(),
    )
    wide[:, 2:7], unaligned[:], read_only.flags.writeable = x, x, False
    layouts = (x, wide[:, 2:7], np.asfortranarray(x), x[::-1].copy()[::-1], unaligned, read_only, x.astype(">f4"))
    pool, expected = net.pool(6), net.stream(6).step(x)
    for given in (*layouts, x.astype("f8"), x.tolist()):
        for kind in (list, tuple, np.array, np.uint32, lambda numbers: np.array(numbers).repeat(2)[::2]):
            numbers = kind([pool.open() for _ in range(6)])
            np.testing.assert_array_equal(pool.step(numbers, given), expected)
            for number in numbers:
                pool.close(number)
    with pytest.raises(KeyError):
        pool.step([1], x[:1])


def test_session_numbers_are_not_reused():
    pool = speech().pool(1)
    first = pool.open()
    with pytest.raises(RuntimeError, match="all 1 sessions are open"):
        pool.open()
    pool.close(first)
    second = pool.open()
    assert second != first
    for call in (pool.close, pool.state, lambda number: pool.step([number], np.zeros((1, 5)))):
        with pytest.raises(KeyError, match=f"session {first} is not open"):
            call(first)
    assert repr(pool).startswith("Sessions(1 of 1 sessions open) of Network")


@pytest.mark.parametrize("net", [speech, lambda: Network([lstm(5, 4)])], ids=["several parts", "one kernel call"])
def test_what_is_refused(net):
    net = net()
    pool = net.pool(4)
    a, b = pool.open(), pool.open()
    x = np.zeros((2, 5))
    with pytest.raises(ValueError, match="is given twice in one step"):
        pool.step([a, a], x)
    with pytest.raises(ShapeError, match="expected x with B=2, one step per session, got"):
        pool.step([a, b], x[:1])
    with pytest.raises(ShapeError, match="I=5"):
        pool.step([a, b], np.zeros((2, 4)))
    for sessions in (a, [0.5, 1.5], ["a"], [[a, b]]):
        with pytest.raises(TypeError, match="numbers that open"):
            pool.step(sessions, x)
    for number in (-1, 99, 2**40):
        with pytest.raises(KeyError):
            pool.step([a, number], x)
    with pytest.raises(ShapeError):
        pool.open(net.stream(2).state)
    for capacity in (0, -1, 2**31, 1.5, True):
        with pytest.raises(ValueError, match="capacity"):
            net.pool(capacity)
    with pytest.raises(ValueError, match="threads"):
        net.pool(2, threads=0)
    pool.step([a, b], x)  # no session is still locked


def test_networks_that_a_pool_cannot_serve():
    cell = make_cell(np.random.default_rng(4), 5, 4)
    with pytest.raises(ValueError, match="Sessions: layer_0 can't run step by step"):
        Network([Recurrent((cell,), go_backwards=True)]).pool(2)
    with pytest.raises(ValueError, match="Sessions: expected weights to be one of float32, bfloat16, int8, got 'int4'"):
        Network([Recurrent((cell,))]).pool(2, weights="int4")
    double = Network([Recurrent((make_cell(np.random.default_rng(4), 5, 4, "float64"),))])
    with pytest.raises(TypeError, match="expected float32 arrays for weights='int8', got float64"):
        double.pool(2, weights="int8")


def floats(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def lstm(width=3, units=4, seed=0):
    return Recurrent((make_cell(np.random.default_rng(seed), width, units),))


def two_inputs():
    """Return a network with inputs x and ids, a head and a sequence as outputs, and cells around a convolution."""
    nodes = [Embedding(floats(9, 2)), lstm(), Merge(), Conv1D(floats(3, 6, 5), padding="causal"), lstm(5, 6)]
    names = ["e", "low", "both", "conv", "high", "head"]
    wires = [("id",), ("x",), ("low", "e"), ("both",), ("conv",), ("high",)]
    head = Dense(floats(6, 2), None, "softmax")
    return Network([*nodes, head], names, inputs=("x", "id"), wires=wires, outputs=["head", "low"])


KINDS = {
    "two inputs and outputs": two_inputs,
    "convolution": lambda: Network([Conv1D(floats(3, 3, 4), dilation=2, padding="causal"), lstm(4, 5)]),
    "convolution alone": lambda: Network([Conv1D(floats(2, 3, 4), padding="causal", activation="relu")]),
    "stack with heads": lambda: Network(
        [Dense(floats(3, 4), None, "tanh"), lstm(4, 5), lstm(5, 4), Dense(floats(4, 2), floats(2), "sigmoid")]
    ),
    "head that NumPy runs": lambda: Network([lstm(), Dense(floats(4, 3), None, "softmax"), lstm(3, 2)]),
    "residual": lambda: Network(
        [
            Dense(floats(3, 4)),
            Recurrent(tuple(make_cell(np.random.default_rng(n), 4, 4) for n in range(3)), residual=True),
        ]
    ),
    "wide": lambda: Network([lstm(3, 70), lstm(70, 33)]),
    "gru": lambda: Network([Recurrent((make_cell(np.random.default_rng(1), 3, 20, kind="gru"),))]),
    "minimal gru": lambda: Network([Recurrent((make_cell(np.random.default_rng(1), 3, 20, kind="mingru"),))]),
    "minimal lstm": lambda: Network([Recurrent((make_cell(np.random.default_rng(1), 3, 33, kind="minlstm"),))]),
}


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_session_has_the_bits_of_its_stream(kind, weights):
    net = KINDS[kind]()
    pool, rng = net.pool(5, weights=weights), np.random.default_rng(2)
    streams = {pool.open(): net.stream(weights=weights) for _ in range(4)}
    for number in range(12):
        some = rng.permutation(list(streams))[: 1 + number % 4]
        given = {
            name: rng.integers(0, 9, len(some)) if name == "id" else floats(len(some), 3, seed=number)
            for name in net.inputs
        }
        answers = pool.step(some, given)
        for row, session in enumerate(some):
            own = streams[int(session)].step({name: array[row : row + 1] for name, array in given.items()})
            for answer, expected in zip(tuple_of(answers), tuple_of(own), strict=True):
                np.testing.assert_array_equal(answer[row : row + 1], expected)
    for session, stream in streams.items():  # states can be moved between streams and sessions
        for mine, its in zip(pool.state(session), stream.state, strict=True):
            assert type(mine) is type(its)
            for one, other in zip(mine, its, strict=True):
                np.testing.assert_array_equal(one, other)
        stream.state = pool.state(session)
    assert pool.open(stream.state) not in streams


def tuple_of(answers):
    return answers if isinstance(answers, tuple) else (answers,)


def test_steps_that_the_network_masks_are_refused_and_change_nothing():
    net = Network([Masking(0.0), lstm()], ["mask", "lstm"])
    pool = net.pool(2)
    numbers, x = [pool.open(), pool.open()], floats(2, 3)
    with pytest.raises(ValueError, match="Sessions: mask masks a step of row 1"):
        pool.step(numbers, x * [[1], [0]])
    assert not any(pool.state(number)[0].h.any() for number in numbers)


def test_a_memory_of_the_wrong_shape_is_refused():
    pool = KINDS["convolution"]().pool(2)
    with pytest.raises(
        ShapeError, match="tuple of 1 states, one per cell, and 1 Frames, one per node with a memory, got"
    ):
        pool.open(())
    assert len(pool) == 0


def test_threads_step_different_sessions_concurrently():
    net = Network([Recurrent((make_cell(np.random.default_rng(5), 64, 64),))])
    pool = net.pool(200)
    x = np.random.default_rng(6).normal(size=(40, 64)).astype(np.float32)

    def live(seed):
        """Open, step and close sessions; return whether each had the results of a separate stream."""
        numbers = [pool.open() for _ in range(40)]
        stream = net.stream(40)
        same = all(np.array_equal(pool.step(numbers, x + seed), stream.step(x + np.float32(seed))) for _ in range(50))
        for number in numbers:
            pool.close(number)
        return same

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(live, range(16)))
    assert len(pool) == 0


def test_a_session_refuses_concurrent_steps():
    net = Network([Recurrent((make_cell(np.random.default_rng(7), 128, 128),))])
    pool = net.pool(2000)
    numbers = [pool.open() for _ in range(2000)]
    x = np.zeros((2000, 128), np.float32)
    outcomes, go = [], threading.Barrier(4)

    def attempt():
        try:
            pool.step(numbers, x)
        except RuntimeError as error:
            return str(error)
        return "done"

    def run():
        go.wait()
        outcomes.extend(attempt() for _ in range(10))

    with ThreadPoolExecutor(4) as threads:
        for _ in range(4):
            threads.submit(run)
    assert "done" in outcomes
    refused = [outcome for outcome in outcomes if outcome != "done"]
    assert refused
    assert all("another thread is stepping session" in outcome for outcome in refused)


def test_a_step_in_a_large_pool_does_not_touch_other_sessions():
    spec = CellSpec(8, 16)
    net = Network([Recurrent((make_cell(np.random.default_rng(8), 8, 16),))])
    assert net.cells[0].spec == spec
    pool = net.pool(10_000)
    numbers = np.array([pool.open() for _ in range(10_000)])
    chosen = np.random.default_rng(9).choice(numbers, 1000, replace=False)
    pool.step(chosen, np.ones((1000, 8), np.float32))
    untouched = np.setdiff1d(numbers, chosen)
    assert all((pool.state(int(number))[0].h == 0).all() for number in untouched[:200])
    assert all((pool.state(int(number))[0].h != 0).all() for number in chosen[:200])


def test_a_session_that_is_closed_while_another_opens():
    """As a finaliser or a signal handler does, in the middle of an open()."""
    pool = speech().pool(3)
    old = pool.open()
    write, inner = pool._engine.write, []

    def closing(*arguments):
        if not inner:
            inner.append(None)
            pool.close(old)
            inner.append(pool.open())
        write(*arguments)

    pool._engine.write = closing
    new = pool.open()
    assert len({old, new, inner[1]}) == 3
    assert len(pool) == 2
    pool.step([new, inner[1]], np.zeros((2, 5)))


def resident():
    """Return the bytes of memory that this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kind", ["gru", "convolution alone", "convolution"])
def test_a_pool_takes_memory_only_for_sessions_that_are_open(kind):
    net, before = KINDS[kind](), resident()
    pool = net.pool(10**7)
    numbers = [pool.open() for _ in range(3)]
    answers, stream = pool.step(numbers, floats(3, 3)), net.stream(3)
    np.testing.assert_array_equal(answers, stream.step(floats(3, 3)))
    assert resident() - before < 100e6  # of 0.7 to 1.6 GB when all are open
