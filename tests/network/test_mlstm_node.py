"""The node `MLSTM` in a network: states, streams, pools, masks, traces, files; what refuses it by name."""

import contextlib
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from networks import make_cell
from tolerances import NETWORK

import cellstack as cs
from cellstack import Network, ShapeError
from cellstack.cells.base import MatrixState
from cellstack.nodes import MLSTM, Conv1D, Dense, PerFrame, Recurrent
from cellstack.reference import memory as reference

HEADS, KEYS, VALUES = 2, 4, 3


def network(dtype="float32", gate=False):
    """Return a projection, a memory, an LSTM and a head."""
    rng = np.random.default_rng(0)
    node = MLSTM(HEADS, KEYS, VALUES, output_gate=gate)
    array = lambda *shape: rng.normal(size=shape).astype(dtype)  # noqa: E731
    nodes = [
        Dense(array(5, node.input_size), array(node.input_size)),
        node,
        Recurrent((make_cell(rng, node.units, 4, dtype=dtype),)),
        Dense(array(4, 2)),
    ]
    return Network(nodes, ["in", "memory", "lstm", "out"])


def sequences(batch=2, steps=20, dtype="float32"):
    return np.random.default_rng(1).normal(size=(batch, steps, 5)).astype(dtype)


def near(found, expected, tolerance=NETWORK):
    assert np.abs(found - expected).max() <= tolerance * max(1, np.abs(expected).max())


@pytest.mark.parametrize("gate", [False, True])
def test_a_run_continues_from_its_state(gate):
    net, x = network(gate=gate), sequences()
    y, state = net.run(x)
    assert [type(one).__name__ for one in state] == ["State", "MatrixState"]  # cells first
    assert [part.shape for part in state[1]] == [(2, HEADS, KEYS, VALUES), (2, HEADS, KEYS), (2, HEADS)]
    first, half = net.run(x[:, :7])
    second, after = net.run(x[:, 7:], half)
    near(np.concatenate([first, second], axis=1), y)
    for own, other in zip(after[1], state[1], strict=True):
        near(own, other)


def test_the_node_is_the_reference():
    node = MLSTM(HEADS, KEYS, VALUES, output_gate=True)
    x = np.random.default_rng(2).normal(size=(2, 11, node.input_size))
    (y, *_), core = Network([node], inputs={"x": (None, node.input_size)}).run(x.astype("f4")), node.core_size
    h, _ = reference.steps(reference.split(x[..., :core], HEADS, KEYS, VALUES), reference.zero_state(2, 2, 4, 3))
    near(y, h.reshape(2, 11, -1) / (1 + np.exp(-x[..., core:])))


def test_streams_and_pools_are_the_run():
    net, x = network(), sequences()
    y, state = net.run(x)
    stream = net.stream(batch=2)
    near(np.stack([stream.step(x[:, t]) for t in range(20)], axis=1), y)
    for own, other in zip(stream.state[1], state[1], strict=True):
        near(own, other)
    stream.state = net.run(x[:, :7])[1]
    near(stream.run(x[:, 7:]), y[:, 7:])
    stream.reset(rows=[1])
    assert not stream.state[1].C[1].any()
    assert stream.state[1].C[0].any()
    pool = net.pool(3)
    a, _, b = pool.open(), pool.open(), pool.open()
    near(np.stack([pool.step([b, a], x[:, t]) for t in range(20)], axis=1), y)
    near(pool.state(b)[1].C, state[1].C[:1])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_stack_of_memories_is_one_call_of_a_stream(dtype):
    """Also with dense layers below, between and above, the last with an activation in NumPy."""
    rng = np.random.default_rng(3)
    array = lambda *shape: (0.4 * rng.normal(size=shape)).astype(dtype)  # noqa: E731
    first, second = MLSTM(HEADS, KEYS, VALUES, output_gate=True), MLSTM(3, 2, 5)
    dense = [Dense(array(a, b), array(b)) for a, b in ((5, first.input_size), (first.units, second.input_size))]
    head = Dense(array(second.units, 4), None, "softmax")
    net, x = Network([dense[0], first, dense[1], second, head]), sequences(dtype=dtype)
    assert [len(call.nodes) for call in net.calls.steps] == [5]
    assert [len(call.nodes) for call in net.calls.sequences] == [1] * 5
    y, state = net.run(x)
    stream, chunks = net.stream(batch=2), net.stream(batch=2)
    streamed = np.stack([stream.step(x[:, t]) for t in range(20)], axis=1)
    near(streamed, y)
    for own, other in zip(stream.state, state, strict=True):
        for part, wanted in zip(own, other, strict=True):
            near(part, wanted)
    parts = [chunks.run(x[:, start:end]) for start, end in ((0, 1), (1, 4), (4, 9), (9, 20))]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), streamed)
    np.testing.assert_array_equal(net.stream(batch=2).run(x), streamed)
    assert net.stream(batch=2).run(x[:, :0]).shape == (2, 0, 4)
    alone = Network([dense[0], first]).stream(batch=2)
    assert alone.step(x[:, 0, ::-1]) is not None  # an array that the kernel doesn't take as it is
    assert alone.step(x[:, 0].tolist()).dtype == dtype
    with pytest.raises(ShapeError, match=r"expected x \[B, I=5\]|expected input \[B, I=5\]"):
        alone.step(x[:, 0, :4])
    with pytest.raises(ShapeError, match="B=2"):
        alone.step(x[:1, 0])


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_a_stream_with_fewer_bits_is_joined_too(weights):
    net, x = network(gate=True), sequences()
    stream = net.stream(batch=2, weights=weights)
    y, exact = np.stack([stream.step(x[:, t]) for t in range(20)], axis=1), net(x)
    assert 1e-5 < np.abs(y - exact).max() < 0.2 * np.abs(exact).max()


def test_threads_step_different_sessions_at_the_same_time():
    """A step takes long enough for the other thread to be within one of its own."""
    rng, node = np.random.default_rng(0), MLSTM(1, 256, 256)
    net = Network([Dense(rng.normal(size=(5, node.input_size)).astype("f4")), node])
    pool, x = net.pool(2), sequences(batch=1, steps=40)
    numbers = [pool.open(), pool.open()]

    def run(number):
        return np.stack([pool.step([number], x[:, t]) for t in range(40)], axis=1)

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(run, numbers)
    np.testing.assert_array_equal(first, second)


def test_a_step_during_another_call_is_refused():
    rng, node = np.random.default_rng(0), MLSTM(1, 64, 64)
    stream = Network([Dense(rng.normal(size=(5, node.input_size)).astype("f4")), node]).stream()
    x, began = sequences(batch=1, steps=20_000), threading.Event()

    def chunk():
        began.set()
        while not done.is_set():
            with contextlib.suppress(RuntimeError):  # a step is running
                stream.run(x)
                return

    def step_while_it_runs():
        while thread.is_alive():
            stream.step(x[:, 0])

    done, thread = threading.Event(), threading.Thread(target=chunk)
    thread.start()
    began.wait()
    with pytest.raises(RuntimeError, match="Stream: only one thread at a time"):
        step_while_it_runs()
    done.set()
    thread.join()
    assert stream.step(x[:, 0]).shape == (1, 64)


def test_a_failing_step_leaves_the_state(monkeypatch):
    net, x = network(), sequences()
    stream = net.stream(batch=2)
    stream.run(x[:, :5])
    before = stream.state
    last = stream._engine._parts[-1]

    def fail(rows, x):
        raise KeyboardInterrupt

    for _ in range(2):
        stream._engine._parts[-1] = (fail, last[1])
        with pytest.raises(KeyboardInterrupt):
            stream.step(x[:, 5])
        for own, other in zip(stream.state[1], before[1], strict=True):
            np.testing.assert_array_equal(own, other)
        stream._engine._parts[-1] = last
        stream.step(x[:, 5])
        stream.state = before


def test_masks_and_resets():
    net, x = network(), sequences()
    mask, reset = np.ones((2, 20), bool), np.zeros((2, 20), bool)
    mask[0, 3:6] = False
    reset[1, 8] = True
    y, state = net.run(x, mask=mask, reset=reset)
    t = net.trace(x, mask=mask, reset=reset)
    assert not t["memory"].y[0, 3:6].any()
    used, ends = net.run(np.delete(x[:1], [3, 4, 5], axis=1))
    near(y[:1][:, mask[0]], used)
    near(state[1].C[:1], ends[1].C)
    near(y[1, 8:], net(x[1:, 8:])[0])


def test_a_trace_shows_gates_states_and_what_a_key_retrieves():
    """One-hot keys and a large forget gate: a key retrieves its own value, until another value has its key."""
    node = MLSTM(1, 4, 3, epsilon=0.0)
    keys, values = np.eye(4)[[0, 1, 2, 0]], np.arange(12.0).reshape(4, 3) + 1
    x = np.concatenate([keys, 2 * keys, values, np.zeros((4, 1)), np.full((4, 1), 30.0)], axis=1)[None]
    net = Network([Dense(np.eye(13)), node], ["in", "memory"])
    t = net.trace(x)["memory"]
    np.testing.assert_allclose(t.retrieve(np.eye(4)[1])[0, 0], values[1], rtol=1e-10)
    np.testing.assert_allclose(t.retrieve(np.eye(4)[0], 2)[0, 0], values[0], rtol=1e-10)
    np.testing.assert_allclose(t.retrieve(np.eye(4)[0])[0, 0], (values[0] + values[3]) / 2, rtol=1e-10)
    assert not t.retrieve(np.eye(4)[3])[0, 0].any()
    np.testing.assert_allclose(t.shares()[0, 0], np.ones(4), rtol=1e-10)
    np.testing.assert_allclose(t.n[0, -1, 0], [2, 1, 1, 0], atol=1e-10)
    assert t.memory(1).shape == (1, 1, 4, 3)
    with pytest.raises(ShapeError, match=r"retrieve: expected query \[4\] or \[1, 4\], got \(3,\)"):
        t.retrieve(np.ones(3))
    with pytest.raises(IndexError):
        t.retrieve(np.ones(4), 4)


def test_traces_of_random_runs():
    net, x = network("float64"), sequences(dtype="float64")
    state = net.run(sequences(steps=3, dtype="float64") * 2)[1]
    reset = np.random.default_rng(3).random((2, 20)) < 0.1
    t = net.trace(x, state, reset=reset)
    own = t["memory"]
    for step in (0, 9, 19):
        for row in range(2):
            near(own.retrieve(own.q[row, step], step)[row], own.h[row, step], 1e-10)
    near(own.memory(), t.state[1].C, 1e-10)
    near(own.n[:, -1], t.state[1].n, 1e-10)
    near(own.m[:, -1], t.state[1].m, 1e-10)
    part = t.select(rows=[1], steps=slice(4, 9))["memory"]
    np.testing.assert_array_equal(part.f, own.f[1:, 4:9])
    with pytest.raises(ValueError, match="only part of a run"):
        part.retrieve(own.q[0, 0])


def test_its_trace_is_that_of_a_cell():
    net, x = network("float64", gate=True), sequences(dtype="float64")
    mask = np.ones((2, 20), bool)
    mask[1, 15:] = False
    t = net.trace(x, mask=mask, pre=True)
    own = t["memory"].cells[0]
    assert {name: array.shape[2:] for name, array in own.items()} == own.cell.spec.trace_shapes
    z = np.where(mask[..., None], t["memory"].x, 0)[..., -HEADS * (2 + VALUES) :]
    for gate, part in zip("ifo", np.split(z, [HEADS, 2 * HEADS], axis=-1), strict=True):
        np.testing.assert_array_equal(own.pre[gate].reshape(2, 20, -1), part)
    assert not own.f[1, 15:].any()
    near(own.half_lives(), np.log(2) / np.logaddexp(0, -own.pre["f"])[mask].mean(axis=0), 1e-12)
    shares = own.gate_shares()
    assert [len(shares[gate].left) for gate in "ifo"] == [HEADS, HEADS, HEADS * VALUES]
    figures = t.report().figures["memory"]
    assert figures["half-life in steps"]["most"] == own.half_lives().max()
    assert not any("Lyapunov" in name or "growth" in name for name in figures)
    for refused in (own.lyapunov_exponent, own.contributions):
        with pytest.raises(ValueError, match="mLSTM isn't supported"):
            refused()
    moved = x.copy()
    moved[:, 6:] += 1
    difference = t.diff(net.trace(moved, mask=mask))
    assert "memory: from step 6 on" in repr(difference)
    largest = max(difference.largest(1000), key=lambda one: (one.node == "memory", abs(one.one - one.other)))
    assert (largest.node, largest.one) == ("memory", own.flat(largest.field)[largest.row, largest.step, largest.unit])
    assert len(t.plot("memory").axes) == 2 * len(own)  # a map and its colours for each field
    part = t.select(rows=[0], steps=slice(2, 5), units=[1])["memory"]
    np.testing.assert_array_equal(part.pre["i"], own.pre["i"][:1, 2:5])
    np.testing.assert_array_equal(part.n, own.n[:1, 2:5])


def test_findings_name_heads():
    node = MLSTM(2, 2, 2)
    x = np.random.default_rng(4).normal(size=(1, 40, node.input_size))
    x[..., -4], x[..., -2] = -9.0, 9.0  # head 0 adds nothing and forgets nothing
    t = Network([node], inputs={"x": (None, node.input_size)}).trace(x)
    findings = t.report().findings
    assert any("head 0 is closed to new input" in text for text in findings)
    assert any("head 0 is keeping more than half" in text for text in findings)


@pytest.mark.parametrize("gate", [False, True])
def test_the_gradient_of_a_trace_is_a_difference(gate):
    net, x = network("float64", gate), sequences(dtype="float64", steps=9)
    state = net.run(sequences(steps=3, dtype="float64"))[1]
    reset = np.zeros((2, 9), bool)
    reset[0, 4] = True
    gradient = net.trace(x, state, reset=reset).gradient(1)["x"]
    for place in [(0, 1, 2), (0, 6, 0), (1, 0, 4), (1, 8, 3)]:
        values = []
        for step in (1e-6, -1e-6):
            moved = x.copy()
            moved[place] += step
            values.append(net.run(moved, state, reset=reset)[0][place[0], -1, 1])
        assert abs((values[0] - values[1]) / 2e-6 - gradient[place]) < 1e-6


def test_files(tmp_path):
    net, x = network(gate=True), sequences()
    net.save(tmp_path / "net.safetensors")
    np.testing.assert_array_equal(cs.load(tmp_path / "net.safetensors")(x), net(x))
    t = net.trace(x)
    again = pickle.loads(pickle.dumps(t))
    for name, array in t["memory"].cells[0].items():
        np.testing.assert_array_equal(again["memory"][name], array)
    np.testing.assert_array_equal(again["memory"].retrieve(np.ones(4)), t["memory"].retrieve(np.ones(4)))
    np.testing.assert_array_equal(again.state[1].C, t.state[1].C)
    np.testing.assert_array_equal(again["memory"].y, t["memory"].y)
    t.save_html(tmp_path / "t.html")
    with pytest.raises(ValueError, match="memory"):
        net.save(tmp_path / "net.keras")


def test_a_stream_with_nan_is_traced():
    """Its state holds numbers that a caller can't set."""
    net, x = network(), sequences(batch=1, steps=4)
    stream = net.stream()
    stream.remember(1)
    stream.step(np.full((1, 5), np.nan, "f4"))
    for n in range(4):
        stream.step(x[:, n])
    own = stream.trace()["memory"]
    assert np.isnan(own.n).all()
    assert np.isfinite(own.x).all()


def test_the_plan_says_which_form_runs():
    assert "in chunks, as products of matrices; streams, and fewer than 6 steps" in repr(network().plan())


def test_refusals():
    net, x = network(), sequences()
    state = net.run(x)[1]
    for value in (np.nan, -np.inf):
        bad = state[1]._replace(m=np.full_like(state[1].m, value))
        with pytest.raises(ValueError, match="state of layer 1: expected finite numbers in m"):
            net.run(x, (state[0], bad))
        with pytest.raises(ValueError, match="Stream: state of layer 1: expected finite numbers in m"):
            net.stream(batch=2).state = (state[0], bad)
    with pytest.raises(ShapeError, match=r"expected C of state of layer 1 \[B=2, 2, 4, 3\], got \(2, 24\)"):
        net.run(x, (state[0], MatrixState(state[1].C.reshape(2, -1), *state[1][1:])))
    with pytest.raises(ShapeError, match="expected an input of 26 features, got 25"):
        Network([Dense(np.ones((5, 25), "f4")), MLSTM(HEADS, KEYS, VALUES)])
    with pytest.raises(ValueError, match="expected heads to be an integer from 1"):
        MLSTM(0, KEYS, VALUES)
    with pytest.raises(ValueError, match="expected epsilon to be 0 or more"):
        MLSTM(1, KEYS, VALUES, -1.0)
    with pytest.raises(ValueError, match="nodes with cells"):
        PerFrame((26,), (MLSTM(HEADS, KEYS, VALUES), Conv1D(np.ones((1, 6, 1), "f4"))), ((0,), (1,)))
