"""The npm package in Node, compared with Python: `make test-web` compiles the kernel and runs these tests."""

import numpy as np
import pytest
from family import random_spec
from javascript import assert_near, assert_same, by_name, flags_of
from networks import fill, make_cell, make_graph, make_network, make_states

from cellstack import Network
from cellstack.cells.spec import GATES
from cellstack.nodes import (
    MLSTM,
    Bidirectional,
    Dense,
    GlobalPool,
    GroupedDense,
    GroupNorm,
    Masking,
    Recurrent,
    RMSNorm,
)

pytestmark = pytest.mark.web


@pytest.mark.usefixtures("baseline")
@pytest.mark.parametrize("kind", GATES)
def test_every_kind_and_flag_has_the_bits_of_the_baseline_set(package, kind):
    rng = np.random.default_rng(len(kind))
    expected = []
    for seed in range(40):
        net = Network([Recurrent((fill(rng, random_spec(rng, kind, largest=[8, 40][seed % 2])),))])
        B, T = int(rng.integers(1, 6)), int(rng.integers(0, 12))
        x = rng.normal(size=(B, T, net.input_size)).astype("f4")
        state, flags = make_states(rng, net, B), flags_of(rng, B, T) if seed % 3 else {}
        options = {"state": by_name(state), **flags}
        package.add(net, "run", x=x, options=options)
        package.add(net, "trace", x=x, options=options)
        y, after = net.run(x, state, **flags)
        trace = net.trace(x, state, **flags)
        # softplus calls the C library's log1p, and Emscripten has another one
        compare = assert_near if "softplus" in str(net.cells[0].spec) else assert_same
        expected += [(compare, (y, by_name(after))), (compare, dict(trace["layer_0"].cells[0]))]
    for n, (found, (compare, wanted)) in enumerate(zip(package.run(), expected, strict=True)):
        compare(found["cells"]["layer_0"][0] if n % 2 else (found["y"], found["state"]), wanted)


def test_random_networks(package):
    """Bidirectional and residual stacks, masks, resets, states, and nodes that the engine runs."""
    expected = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        net = make_network(seed)
        B, T = int(rng.integers(1, 5)), int(rng.integers(1, 12))
        x = rng.normal(size=(B, T, net.input_size)).astype("f4")
        state, flags = make_states(rng, net, B), flags_of(rng, B, T) if seed % 3 else {}
        package.add(net, "run", x=x, options={"state": by_name(state), **flags})
        y, after = net.run(x, state, **flags)
        expected.append((y, by_name(after)))
    for found, wanted in zip(package.run(), expected, strict=True):
        assert_near((found["y"], found["state"]), wanted)


def test_random_graphs(package):
    """Several inputs and outputs, ids, masks, convolutions, pools, merges, nodes that move numbers."""
    expected = []
    for seed in range(60):
        net, given = make_graph(seed)
        package.add(net, "run", x=given, options={})
        y, _ = net.run(given)
        expected.append(y if isinstance(y, tuple) else (y,))
    for found, wanted in zip(package.run(), expected, strict=True):
        assert_near(list(found["outputs"].values()), wanted)


@pytest.mark.usefixtures("baseline")  # some of the random networks amplify rounding errors
def test_any_chunks_of_a_stream_have_the_same_bits(package):
    expected = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        net = make_network(seed, streams=True)
        B, T = int(rng.integers(1, 4)), 9
        x = rng.normal(size=(B, T, net.input_size)).astype("f4")
        state = make_states(rng, net, B)
        chunks = [[1] * 9, [3, 1, 5], [1, 4, 0, 1, 3]][seed % 3]
        package.add(net, "stream", x=x, chunks=[T], state=by_name(state))
        package.add(net, "stream", x=x, chunks=chunks, state=by_name(state))
        stream = net.stream(B)
        stream.state = state
        expected.append((B, chunks, stream.run(x), by_name(stream.state)))
    results = iter(package.run())
    for B, chunks, y, state in expected:
        whole, parts = next(results), next(results)
        joined = [part.reshape(B, length, y.shape[2]) for part, length in zip(parts["parts"], chunks, strict=True)]
        assert_same(np.concatenate(joined, axis=1), whole["parts"][0].reshape(y.shape))
        assert_same(parts["state"], whole["state"])
        assert_near((whole["parts"][0].reshape(y.shape), whole["state"]), (y, state))


@pytest.mark.usefixtures("baseline")
@pytest.mark.parametrize("activation", ["linear", "softmax"])
def test_matrices_in_bfloat16_and_int8(package, rng, activation):
    head = Dense(rng.normal(size=(9, 2)).astype("f4"), activation=activation)
    net = Network([Recurrent((make_cell(rng, 12, 24), make_cell(rng, 24, 9, kind="gru"))), head])
    compare = assert_same if activation == "linear" else assert_near  # the engine computes softmax in float64
    x = rng.normal(size=(3, 8, 12)).astype("f4")
    package.add(net.with_weights("bfloat16"), "run", x=x, options={})
    for weights in ("bfloat16", "int8"):
        package.add(net, "run", load={"weights": weights}, x=x, options={})
    expected = [net.run(x, weights=weights)[0] for weights in ("bfloat16", "bfloat16", "int8")]
    for found, wanted in zip(package.run(), expected, strict=True):
        compare(found["y"], wanted)


def with_memories(seed):
    """Return a network with mLSTMs, the nodes around them in xlstm's models, and sometimes an LSTM; and an input."""
    rng = np.random.default_rng(seed)
    array = lambda *shape: rng.normal(0, 0.4, size=shape).astype("f4")  # noqa: E731
    heads, keys, values, width = (int(rng.integers(1, most)) for most in (4, 6, 6, 5))
    memory = MLSTM(heads, keys, values, float(rng.choice([1e-6, 0.1])), output_gate=bool(seed % 2))
    other = MLSTM(1, 2, 3, 1e-6)
    nodes = [RMSNorm(np.ones(width, "f4")), Dense(array(width, memory.input_size), array(memory.input_size)), memory]
    nodes += [GroupNorm(heads, array(memory.units), over_time=False)]
    nodes += [GroupedDense(array(heads, values, 4), array(heads * 4) if seed % 3 else None)]
    nodes += [Recurrent((make_cell(rng, heads * 4, 5),))] if seed % 4 == 0 else []
    nodes += [Dense(array(nodes[-1].units if seed % 4 == 0 else heads * 4, other.input_size)), other]
    return rng, Network(nodes), array(int(rng.integers(1, 5)), int(rng.integers(1, 90 if seed % 5 == 0 else 9)), width)


def in_order(net, states):
    """Return states in the order of the nodes; in Python, those of memories come last."""
    cells, memories = iter(states[: len(net.cells)]), iter(states[len(net.cells) :])
    return [next(cells if node.cells else memories) for node in net.nodes if node.cells or node.memory]


def flat(states):
    return [{name: array.reshape(len(array), -1) for name, array in one._asdict().items()} for one in states]


def memory_states(rng, net, batch):
    """Return random states, as Python and as the package take them."""
    states = [
        type(one)(*(rng.normal(size=array.shape).astype("f4") for array in one))
        for one in net.run(np.zeros((batch, 1, net.input_size), "f4"))[1]
    ]
    return states, flat(in_order(net, states))


@pytest.mark.usefixtures("baseline")
def test_a_memory_has_the_bits_of_the_baseline_set(package):
    expected = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        node = MLSTM(*(int(rng.integers(1, 20)) for _ in range(3)), output_gate=bool(seed % 2))
        net = Network([node], inputs={"x": (None, node.input_size)})
        B, T = int(rng.integers(1, 4)), int(rng.integers(0, 150 if seed % 5 == 0 else 9))
        x, (state, given) = rng.normal(size=(B, T, node.input_size)).astype("f4"), memory_states(rng, net, B)
        flags = flags_of(rng, B, T) if seed % 3 else {}
        package.add(net, "run", x=x, options={"state": given, **flags})
        y, after = net.run(x, state, **flags)
        expected.append((y, flat(after)))
    for found, wanted in zip(package.run(), expected, strict=True):
        assert_same((found["y"], found["state"]), wanted)


@pytest.mark.usefixtures("baseline")
def test_memories_of_mlstms(package):
    expected = []
    for seed in range(60):
        rng, net, x = with_memories(seed)
        flags = flags_of(rng, *x.shape[:2]) if seed % 3 else {}
        state, given = memory_states(rng, net, len(x)) if seed % 2 else (None, None)
        options = flags if given is None else {"state": given, **flags}
        package.add(net, "run", x=x, options=options)
        package.add(net, "trace", x=x, options=options)
        y, after = net.run(x, state, **flags)
        t = net.trace(x, state, **flags)["layer_2"]
        fields = {name: t.flat(name) for name in t.fields._fields}
        expected.append((y, flat(in_order(net, after)), fields))
    results = iter(package.run())
    for y, state, fields in expected:
        found, traced = next(results), next(results)
        assert_near((found["y"], found["state"]), (y, state))
        assert_near(traced["values"][list(traced["values"])[-1]], y)
        assert_near(traced["cells"]["layer_2"][0], fields)
        assert_near(traced["state"], state)


@pytest.mark.usefixtures("baseline")
def test_any_chunks_of_a_stream_with_memories_have_the_same_bits(package):
    expected = []
    for seed in range(20):
        rng, net, x = with_memories(seed)
        x = np.concatenate([x] * 9, axis=1)[:, :9]
        state, given = memory_states(rng, net, len(x))
        chunks = [[1] * 9, [3, 1, 5], [1, 4, 0, 1, 3]][seed % 3]
        for parts in ([9], chunks):
            package.add(net, "stream", x=x, chunks=parts, **({"state": given} if seed % 2 else {}))
        expected.append((len(x), chunks, *net.run(x, state if seed % 2 else None), net))
    results = iter(package.run())
    for B, chunks, y, after, net in expected:
        whole, parts = next(results), next(results)
        joined = [part.reshape(B, length, y.shape[2]) for part, length in zip(parts["parts"], chunks, strict=True)]
        assert_same(np.concatenate(joined, axis=1), whole["parts"][0].reshape(y.shape))
        assert_same(parts["state"], whole["state"])
        assert_near((whole["parts"][0].reshape(y.shape), whole["state"]), (y, flat(in_order(net, after))))


def test_nodes_that_need_the_whole_sequence_are_refused_in_streams(package, rng):
    cells = (make_cell(rng, 3, 4),)
    back = Recurrent((make_cell(rng, 3, 4),), go_backwards=True)
    for nodes, why in [
        ([Bidirectional(Recurrent(cells), back)], "layer_0 can't run step by step: its backward direction"),
        ([back], "layer_0 can't run step by step: it starts at the end of the sequence"),
        ([Recurrent(cells), GlobalPool("mean")], "layer_1 can't run step by step: the mean over time"),
        (
            [Recurrent(cells), Masking(0.5), Recurrent((make_cell(rng, 4, 2),))],
            "layer_1 can't run step by step: it may",
        ),
    ]:
        package.add(Network(nodes), "stream", x=np.zeros((1, 1, 3), "f4"), chunks=[1])
        assert why in package.run()[-1]["error"]


def test_a_step_that_is_masked_is_refused(package, rng):
    net = Network([Masking(0.0), Recurrent((make_cell(rng, 3, 4),))])
    x = np.ones((2, 2, 3), "f4")
    x[1, 1] = 0
    package.add(net, "stream", x=x, chunks=[2])
    (answer,) = package.run()
    assert answer["error"] == "stream: layer_0 masks a step: leave padding out of the stream"
