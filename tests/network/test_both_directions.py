"""The two directions of a layer run at the same time, with the same bits."""

import threading
from itertools import pairwise

import numpy as np
import pytest

from cellstack import Network, native
from cellstack.cells.spec import CellSpec
from cellstack.nodes import Bidirectional, Cell, Recurrent

THREADS = (2, 3, 4)


def cells(rng, kind, sizes):
    made = []
    for width, units in pairwise(sizes):
        spec = CellSpec(width, units, kind=kind)
        made.append(Cell(spec, **{n: rng.normal(0, 0.1, shape).astype("f4") for n, shape in spec.shapes.items()}))
    return tuple(made)


def both(rng, kind="lstm", sizes=(64, 64), merge="concat", **flags):
    ahead, back = Recurrent(cells(rng, kind, sizes), **flags), Recurrent(cells(rng, kind, sizes), **flags)
    return Bidirectional(ahead, Recurrent(back.cells, go_backwards=True, **flags), merge)


def assert_same(found, expected):
    np.testing.assert_array_equal(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.fixture
def at_once(monkeypatch):
    """The results of `native.forward_each`: whether the stacks of each call ran at the same time."""
    real, seen = native.forward_each, []
    monkeypatch.setattr(native, "forward_each", lambda runs, threads: seen.append(real(runs, threads)))
    return seen


@pytest.mark.parametrize("merge", ["concat", "sum", "mul", "ave"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_any_number_of_threads_gives_the_same_bits(kind, merge, at_once):
    rng = np.random.default_rng(3)
    units, steps = (200, 40) if kind == "rnn" else (64, 50)
    layers = [both(rng, kind, (64, units), merge)]
    layers.append(both(rng, kind, (units * (2 if merge == "concat" else 1), units), merge, return_sequences=False))
    net = Network(layers)
    x = rng.standard_normal((3, steps, 64)).astype("f4")
    cases = [{}, {"mask": rng.random((3, steps)) < 0.7}, {"reset": rng.random((3, steps)) < 0.1}]
    cases.append({**cases[1], **cases[2]})
    for case in cases:
        one = net.run(x, threads=1, **case)
        assert not any(at_once)
        for threads in THREADS:
            assert_same(net.run(x, threads=threads, **case), one)
        assert any(at_once[2:])  # the choice depends on the measured latency of threads
        at_once.clear()


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_threads_divide_each_direction_too(batch):
    rng = np.random.default_rng(4)
    net = Network([both(rng, sizes=(40, 160, 160, 160), residual=True)])
    x = rng.standard_normal((batch, 30, 40)).astype("f4")
    one = net.run(x, threads=1)
    for threads in (*THREADS, 9):
        assert_same(net.run(x, threads=threads), one)


def test_a_recording_has_the_cells_in_order():
    rng = np.random.default_rng(5)
    net = Network([both(rng, sizes=(64, 64, 64), residual=True)])
    x = rng.standard_normal((2, 40, 64)).astype("f4")
    y, after = net.run(x, threads=2)
    traced = net.trace(x)["layer_0"].cells
    for trace, state, last in zip(traced, after, (-1, -1, 0, 0), strict=True):
        np.testing.assert_array_equal(trace.h[:, last], state.h)
    np.testing.assert_array_equal(y[..., 64:], traced[2].h + traced[3].h)


def test_small_calls_and_one_thread_run_one_after_the_other(at_once):
    rng = np.random.default_rng(6)
    net = Network([both(rng)])
    x = rng.standard_normal((1, 100, 64)).astype("f4")
    for steps, threads in ((100, 1), (20, 2), (100, 2)):
        net.run(x[:, :steps], threads=threads)
    net.run(x[:0], threads=2)
    assert at_once == [False, False, True, False]


def test_two_python_threads_at_once():
    rng = np.random.default_rng(7)
    nets = [Network([both(rng, kind)]) for kind in ("lstm", "gru")]
    x = rng.standard_normal((2, 60, 64)).astype("f4")
    expected = [net.run(x, threads=1)[0] for net in nets]
    wrong = []

    def work(net, y):
        wrong.extend(n for n in range(50) if not np.array_equal(net.run(x, threads=2)[0], y))

    workers = [threading.Thread(target=work, args=pair) for pair in zip(nets * 2, expected * 2, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
