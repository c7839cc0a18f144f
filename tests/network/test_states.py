"""States as values: nodes that start from the states of others give the same results as when run separately."""

import json
import pickle
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import make_cell
from tools import need

import cellstack as cs
from cellstack import Network, ShapeError
from cellstack.cells.base import HiddenState, State
from cellstack.cells.errors import FormatError
from cellstack.cells.spec import GATES
from cellstack.inspect.payload import payload_of
from cellstack.nodes import Bidirectional, Dense, Merge, Pool1D, Recurrent, StepMask


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def recurrent(inputs, *units, kind="lstm", seed=0, dtype="float32", **flags):
    rng, cells, width = np.random.default_rng(seed), [], inputs
    for size in units:
        cells.append(make_cell(rng, width, size, dtype=dtype, kind=kind))
        width = size
    return Recurrent(tuple(cells), **flags)


def both_ways(inputs, units, kind="lstm", seed=0, **flags):
    ahead, back = (recurrent(inputs, units, kind=kind, seed=seed + n, go_backwards=bool(n), **flags) for n in (0, 1))
    return Bidirectional(ahead, back)


def seq2seq(encoder, decoder, *head):
    """Return a decoder that starts from all last states of an encoder."""
    names = ["encoder", "decoder", *(f"head_{n}" for n in range(len(head)))]
    starts = [f"encoder/{state}" for state in encoder.state_sizes]
    wires = [("x",), ("y", *starts), *((name,) for name in names[1:-1])]
    return Network([encoder, decoder, *head], names, inputs=("x", "y"), wires=wires)


PAIRS = {
    "an LSTM": lambda: (recurrent(3, 4, return_sequences=False), recurrent(2, 4, seed=1)),
    "a GRU": lambda: (recurrent(3, 4, kind="gru"), recurrent(2, 4, kind="gru", seed=1)),
    "a SimpleRNN": lambda: (recurrent(3, 4, kind="rnn"), recurrent(2, 4, kind="rnn", seed=1, return_sequences=False)),
    "stacks": lambda: (recurrent(3, 4, 5), recurrent(2, 4, 5, seed=1)),
    "residual stacks": lambda: (recurrent(4, 4, 4, residual=True), recurrent(4, 4, 4, residual=True, seed=1)),
    "backwards": lambda: (recurrent(3, 4, go_backwards=True), recurrent(2, 4, seed=1, go_backwards=True)),
    "both ways": lambda: (both_ways(3, 4), both_ways(2, 4, seed=5)),
    "float64": lambda: (recurrent(3, 4, dtype="float64"), recurrent(2, 4, seed=1, dtype="float64")),
}


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_decoder_starts_where_its_encoder_ended(rng, case, masked):
    encoder, decoder = PAIRS[case]()
    net = seq2seq(encoder, decoder)
    x, y = rng.normal(size=(3, 6, encoder.input_size)), rng.normal(size=(3, 4, decoder.input_size))
    masks = {"x": rng.random((3, 6)) < 0.7, "y": rng.random((3, 4)) < 0.7} if masked else {"x": None, "y": None}
    found, after = net.run((x, y), mask=masks if masked else None)
    _, ended = Network([encoder], inputs=("x",)).run(x, mask=masks["x"])
    expected, rest = Network([decoder], inputs=("y",)).run(y, ended, mask=masks["y"])
    np.testing.assert_array_equal(found, expected)
    assert len(after) == len(ended) + len(rest)
    for one, other in zip(after, (*ended, *rest), strict=True):
        assert type(one) is type(other)
        for got, want in zip(one, other, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_states_are_inputs_and_outputs_of_a_step(rng, steps):
    node, head = recurrent(2, 4), Dense(rng.normal(size=(4, 3)).astype("float32"))
    wires = [("y", "h", "c"), ("cell",)]
    net = Network(
        [node, head], ["cell", "head"], inputs=("y", "h", "c"), wires=wires, outputs=("head", "cell/h", "cell/c")
    )
    assert net.shapes["h"] == net.shapes["cell/c"] == (4,)
    y, h, c = rng.normal(size=(3, steps, 2)), rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    (found, h_after, c_after), (state,) = net.run({"y": y, "h": h, "c": c})
    expected, (other,) = Network([node, head]).run(y, State(h, c))
    np.testing.assert_array_equal(found, expected)
    for got, want in zip((h_after, c_after), other, strict=True):
        np.testing.assert_array_equal(got, want)
    if steps == 0:
        np.testing.assert_array_equal(h_after, h.astype("float32"))
    h_after[:] = 7.0  # an output doesn't share memory with the state
    np.testing.assert_array_equal(state.h, other.h)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.sampled_from(list(GATES)), st.integers(0, 99))
def test_any_chunking_through_inputs_and_outputs_is_one_pass(chunks, kind, seed):
    rng, node = np.random.default_rng(seed), recurrent(2, 3, 4, kind=kind, seed=seed)
    states = list(node.state_sizes)
    inputs = {"y": (None, 2)} | {name.replace("/", "_"): (size,) for name, size in node.state_sizes.items()}
    outputs = ("cell", *(f"cell/{state}" for state in states))
    net = Network([node], ["cell"], inputs=inputs, wires=[tuple(inputs)], outputs=outputs)
    y = rng.normal(size=(2, sum(chunks), 2)).astype("float32")
    starts = [rng.normal(size=(2, size)).astype("float32") for size in node.state_sizes.values()]
    whole = net((y, *starts))
    parts, begun, first = [], starts, 0
    for count in chunks:
        part, *begun = net((y[:, first : first + count], *begun))
        parts.append(part)
        first += count
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole[0])
    for got, want in zip(begun, whole[1:], strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_state_goes_into_any_node(rng):
    """h and c are vectors per row, which a Merge, a Dense or an output can take."""
    node = recurrent(3, 4)
    head = Dense(rng.normal(size=(8, 2)).astype("float32"))
    net = Network(
        [node, Merge("concat"), head], ["lstm", "both", "head"], wires=[("x",), ("lstm/h", "lstm/c"), ("both",)]
    )
    x = rng.normal(size=(2, 5, 3))
    _, (state,) = Network([node]).run(x)
    np.testing.assert_array_equal(net(x), Network([head], inputs={"v": (8,)})(np.concatenate(state, axis=1)))
    lengths = [5, 2]
    _, (state,) = Network([node]).run(x, lengths=lengths)
    np.testing.assert_array_equal(
        net(x, lengths=lengths), Network([head], inputs={"v": (8,)})(np.concatenate(state, axis=1))
    )


def test_a_stack_in_one_call_gives_the_states_of_each(rng):
    """Two nodes that run in one call of the kernel; the decoder takes the states of both."""
    below, above = recurrent(3, 4), recurrent(4, 5, seed=1)
    decoders = recurrent(2, 4, seed=2), recurrent(4, 5, seed=3)
    wires = [("x",), ("a",), ("y", "a/h", "a/c"), ("c", "b/h", "b/c")]
    net = Network([below, above, *decoders], ["a", "b", "c", "d"], inputs=("x", "y"), wires=wires)
    assert "in the call of a" in str(net.plan())
    x, y = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 3, 2))
    _, ended = Network([below, above]).run(x)
    np.testing.assert_array_equal(net((x, y)), Network(decoders).run(y, ended)[0])


def test_repr_and_plan():
    net = seq2seq(*PAIRS["an LSTM"]())
    assert "decoder  of y, encoder/h, encoder/c" in repr(net)
    assert "of y, encoder/h, encoder/c" in str(net.plan())
    again = pickle.loads(pickle.dumps(net))
    assert again.wires == net.wires
    assert net.edit(()).wires == net.wires


WRONG = {
    "one state of two": (
        [("x",), ("y", "a/h")],
        None,
        ShapeError,
        "b: Recurrent expected one input, or 3 with the initial h, c,",
    ),
    "no such state": (
        [("x",), ("y", "a/h", "a/z")],
        None,
        ValueError,
        "the wires of b contain 'a/z', which doesn't exist: the states of a are h, c",
    ),
    "of an input": (
        [("x",), ("y", "x/h", "x/c")],
        None,
        ValueError,
        "the wires of b contain 'x/h', which doesn't exist: x has no states",
    ),
    "a later node's": ([("x", "b/h", "b/c"), ("y",)], None, ValueError, "the wires of a to be earlier nodes"),
    "its own": ([("x",), ("y", "b/h", "b/c")], None, ValueError, "the wires of b to be earlier nodes, got 'b/h'"),
    "another width": (
        [("x",), ("y", "a/h", "x")],
        None,
        ShapeError,
        "b: expected the initial state c .B, 4., got .B, T, 3.",
    ),
    "no such output": (
        [("x",), ("y", "a/h", "a/c")],
        ("b", "b/0/h"),
        ValueError,
        "the outputs contain 'b/0/h', which doesn't exist: the states of b are h, c",
    ),
    "a state twice": ([("x",), ("y", "a/h", "a/c")], ("b", "b/h", "b/h"), ValueError, "outputs that differ"),
    "a node unused": ([("x",), ("y", "a", "a")], ("a/h",), ValueError, "node 'b' doesn't lead to an output"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_wiring_is_refused(case):
    wires, outputs, error, message = WRONG[case]
    nodes = [recurrent(3, 4, return_sequences=False), recurrent(2, 4, seed=1)]
    with pytest.raises(error, match=message):
        Network(nodes, ["a", "b"], inputs=("x", "y"), wires=wires, outputs=outputs)


def test_a_state_that_is_wired_cannot_be_given(rng):
    net = seq2seq(*PAIRS["an LSTM"]())
    x, y = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 3, 2))
    begun = State(rng.normal(size=(2, 4)), rng.normal(size=(2, 4)))
    with pytest.raises(
        ShapeError, match="expected None as the state of layer 1, because decoder starts from encoder/h, enc"
    ):
        net.run((x, y), (begun, begun))
    found, _ = net.run((x, y), (begun, None))
    _, ended = Network([net.nodes[0]]).run(x, begun)
    np.testing.assert_array_equal(found, Network([net.nodes[1]]).run(y, ended)[0])
    np.testing.assert_array_equal(net.trace((x, y), (begun, None)).y, found)
    with pytest.raises(ValueError, match="reset of y isn't supported: decoder starts from encoder/h, encoder/c"):
        net.run((x, y), reset={"y": np.zeros((2, 3), bool)})
    net.run((x, y), reset={"x": np.zeros((2, 5), bool)})


def test_the_state_of_one_cell_is_given_alone(rng):
    x, h, c = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 4)), rng.normal(size=(2, 4))
    net = Network([recurrent(3, 4)])
    expected, _ = net.run(x, [State(h, c)])
    for state in ((h, c), [h, c], State(h, c), [(h, c)], [[h, c]]):
        np.testing.assert_array_equal(net.run(x, state)[0], expected)
    with pytest.raises(ShapeError, match="expected c of state of layer 0"):
        net.run(x, (h, c[:, :3]))
    gru = Network([recurrent(3, 4, kind="gru")])
    expected, _ = gru.run(x, [HiddenState(h)])
    for state in (h, (h,), HiddenState(h)):
        np.testing.assert_array_equal(gru.run(x, state)[0], expected)
    two = Network([recurrent(3, 4), recurrent(4, 4, seed=1)])
    some, _ = two.run(x, (None, State(h, c)))
    zeros = State(np.zeros((2, 4)), np.zeros((2, 4)))
    np.testing.assert_array_equal(some, two.run(x, (zeros, State(h, c)))[0])


# ── flags per step ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_flags_that_are_an_input_are_a_mask(rng):
    node = recurrent(3, 4, kind="gru", return_sequences=False)
    inputs = {"x": (None, 3), "used": (None,)}
    net = Network([StepMask(), node], ["flags", "gru"], inputs=inputs, wires=[("x", "used"), ("flags",)])
    x, used = rng.normal(size=(4, 6, 3)), rng.random((4, 6)) < 0.5
    used[3] = False
    np.testing.assert_array_equal(net((x, used)), Network([node])(x, used))
    lengths = [6, 3, 1, 6]
    both = used & (np.arange(6) < np.array(lengths)[:, None])
    np.testing.assert_array_equal(net((x, used), lengths={"x": lengths}), Network([node])(x, both))
    with pytest.raises(
        ShapeError, match=r"flags: StepMask expected a sequence \[B, T, W\] and its flags \[B, T\], got"
    ):
        net((x, used[:, :5]))
    with pytest.raises(ValueError, match=r"expected inputs with a time axis, got used"):
        net.stream()


# ── streams ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def arrays_of(states):
    return [array for state in states for array in state]


def test_the_states_of_several_cells_as_a_flat_list(rng):
    cells = (*recurrent(3, 4, 5).cells, *recurrent(5, 2, kind="gru").cells)
    net = Network([Recurrent(cells), Pool1D("max", 2, 1, "causal")])
    x, sizes = rng.normal(size=(2, 6, 3)).astype(np.float32), (4, 4, 5, 5, 2)
    h, c, h_2, c_2, h_3 = flat = [rng.normal(size=(2, size)).astype(np.float32) for size in sizes]
    nested = (State(h, c), State(h_2, c_2), HiddenState(h_3))
    expected, after = net.run(x, nested)
    for states in (flat, tuple(flat)):
        y, ends = net.run(x, states)
        assert np.array_equal(y, expected)
        assert all(map(np.array_equal, arrays_of(ends), arrays_of(after)))
        assert np.array_equal(net.trace(x, state=states).y, expected)
    with pytest.raises(ShapeError, match=r"one state per cell \(3\), or as a flat list of 5 arrays, got 4 \(ndarray"):
        net.run(x, flat[:4])
    stream = net.stream(2)
    stream.state = [*flat, *stream.state[3:]]
    assert len(stream.state) == 4  # with the memory of the pool
    assert all(map(np.array_equal, arrays_of(stream.state[:3]), flat))
    with pytest.raises(ShapeError, match="3 states, one per cell, and 1 Frames"):
        stream.state = flat


def test_which_states_can_be_streamed(rng):
    """The last cell's h is the node's output; a node that starts from a state or passes on c can't be streamed."""
    head = Dense(rng.normal(size=(4, 2)).astype("float32"))
    net = Network([recurrent(3, 5, 4), head], ["a", "b"], wires=[("x",), ("a/1/h",)], outputs=("b", "a", "a/1/h"))
    x = rng.normal(size=(2, 6, 3)).astype("float32")
    stream, pool = net.stream(2), net.pool(2)
    sessions = [pool.open(), pool.open()]
    for t in range(6):
        found, whole = stream.step(x[:, t]), net(x[:, : t + 1])
        again = pool.step(sessions, x[:, t])
        for one, other, want in zip(found, again, (whole[0], whole[1][:, -1], whole[2]), strict=True):
            np.testing.assert_array_equal(one, want)
            np.testing.assert_array_equal(other, want)
    chunk = net.stream(2).run(x)
    np.testing.assert_array_equal(chunk[2], whole[1])
    for case, message in (
        (
            seq2seq(*PAIRS["an LSTM"]()),
            "encoder can't run step by step: its state encoder/c is an input of a node or an output",
        ),
        (
            seq2seq(*PAIRS["a GRU"]()),
            "decoder can't run step by step: it starts from encoder/h, and a stream's cells continue from their own",
        ),
        (
            Network([recurrent(3, 5, 4), head], wires=[("x",), ("layer_0/1/c",)]),
            "layer_0 can't run step by step: its state layer_0/1/c is an input of a node or an output",
        ),
    ):
        for make in (case.stream, lambda case=case: case.pool(3), lambda case=case: case.export_c(".")):
            with pytest.raises(ValueError, match=message):
                make()


def test_the_error_of_a_decoder_says_how_to_run_it():
    net = Network([recurrent(2, 4)], ["cell"], inputs=("y", "h", "c"), wires=[("y", "h", "c")])
    with pytest.raises(
        ValueError, match=r"got h \[B, 4\]. It is the initial state of cell: call run\(\) instead, one step"
    ):
        net.stream()


# ── inspection ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", ["an LSTM", "a GRU", "stacks", "residual stacks", "backwards", "both ways"])
def test_gradients_through_states(rng, case):
    encoder, decoder = (_as_float64(node) for node in PAIRS[case]())
    net = seq2seq(encoder, decoder)
    x, y = rng.normal(size=(2, 4, encoder.input_size)), rng.normal(size=(2, 3, decoder.input_size))
    trace = net.trace((x, y))
    found = trace.gradient(1, step=1)
    assert np.abs(found["x"]).max() > 1e-4
    for name, value in (("x", x), ("y", y)):
        way, small = rng.normal(size=value.shape), 1e-6
        ends = []
        for sign in (1, -1):
            moved = {"x": x, "y": y, name: value + sign * small * way}
            ends.append(net(moved)[:, 1, 1])
        np.testing.assert_allclose(
            (found[name] * way).sum((1, 2)), (ends[0] - ends[1]) / (2 * small), rtol=1e-4, atol=1e-8
        )


def _as_float64(node):
    if isinstance(node, Bidirectional):
        return Bidirectional(_as_float64(node.forward), _as_float64(node.backward))
    cells = [
        cs.nodes.Cell(cell.spec, *(array.astype("float64") for array in cell.arrays.values())) for cell in node.cells
    ]
    return Recurrent(tuple(cells), node.return_sequences, node.go_backwards, residual=node.residual)


def test_a_trace_matches_the_run_and_is_restored_from_a_file(rng, tmp_path):
    net = seq2seq(*PAIRS["an LSTM"]())
    x, y = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 4, 2))
    trace = net.trace((x, y), pre=True)
    found, after = net.run((x, y))
    np.testing.assert_array_equal(trace.y, found)
    np.testing.assert_array_equal(trace["decoder"].x[1], after[0].h)
    alone = Network([net.nodes[1]]).trace(y, after[0])
    np.testing.assert_array_equal(trace["decoder"].f, alone["layer_0"].f)
    np.testing.assert_array_equal(trace["decoder"].pre["g"], alone["layer_0"].pre["g"])
    after[0].h[:] = 9.0
    trace.state[0].h[:] = 9.0
    np.testing.assert_array_equal(trace["decoder"].f, alone["layer_0"].f)
    again = pickle.loads(pickle.dumps(trace))
    np.testing.assert_array_equal(again["decoder"].x[1], trace["decoder"].x[1])
    trace.save_html(tmp_path / "a.html")
    assert "start from the states of others, or pass on their own" in (tmp_path / "a.html").read_text()


def test_the_pages_engine_refuses_it_by_name(tmp_path):
    need("node")
    net = seq2seq(*PAIRS["an LSTM"]())
    net = Network(net.nodes, net.names, inputs=net.inputs, wires=net.wires, outputs=("decoder", "decoder/c"))
    inputs = {"x": (None, 3), "used": (None,)}
    flags = Network([StepMask(), recurrent(3, 4)], inputs=inputs, wires=[("x", "used"), ("layer_0",)])
    (tmp_path / "net.json").write_text(json.dumps([payload_of(net), payload_of(flags)]))
    engine = cs.__file__.replace("__init__.py", "inspect/page/engine/engine.js")
    script = (
        f"import {{ readNetwork, unsupported }} from {json.dumps(engine)};"
        "import { readFileSync } from 'fs';"
        f"const payloads = JSON.parse(readFileSync({json.dumps(str(tmp_path / 'net.json'))}));"
        "console.log(JSON.stringify(payloads.map((payload) => unsupported(readNetwork(payload)))));"
    )
    (tmp_path / "a.mjs").write_text(script)
    ran = subprocess.run(["node", tmp_path / "a.mjs"], capture_output=True, text=True, check=True)
    said, of_flags = json.loads(ran.stdout)
    assert of_flags == ["layer_0: a node of the type step_mask isn't supported."]
    assert said[0].startswith("The output decoder/c, which is a state, isn't supported")
    assert said[1].startswith("decoder: reading the states encoder/h, encoder/c isn't supported")


# ── the native format ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", PAIRS)
def test_a_file_stores_the_wiring(rng, tmp_path, case):
    encoder, decoder = PAIRS[case]()
    first = seq2seq(encoder, decoder)
    outputs = ("decoder", *(f"decoder/{state}" for state in decoder.state_sizes))
    net = Network(first.nodes, first.names, inputs=first.inputs, wires=first.wires, outputs=outputs)
    net.save(tmp_path / "net.safetensors")
    again = cs.load(tmp_path / "net.safetensors")
    assert again.wires == net.wires
    assert again.outputs == net.outputs
    x, y = rng.normal(size=(2, 4, encoder.input_size)), rng.normal(size=(2, 3, decoder.input_size))
    for got, want in zip(again((x, y)), net((x, y)), strict=True):
        np.testing.assert_array_equal(got, want)
    assert cs.extract(tmp_path / "net.safetensors").keys() == {"encoder", "decoder"}


def test_flags_that_are_an_input_are_stored_in_a_file(rng, tmp_path):
    inputs = {"x": (None, 3), "used": (None,)}
    net = Network([StepMask(), recurrent(3, 4)], inputs=inputs, wires=[("x", "used"), ("layer_0",)])
    net.save(tmp_path / "net.safetensors")
    x, used = rng.normal(size=(2, 4, 3)), rng.random((2, 4)) < 0.5
    np.testing.assert_array_equal(cs.load(tmp_path / "net.safetensors")((x, used)), net((x, used)))


def test_a_file_whose_wiring_is_wrong_is_refused(tmp_path):
    net = seq2seq(*PAIRS["an LSTM"]())
    net.save(tmp_path / "net.safetensors")
    data = (tmp_path / "net.safetensors").read_bytes()
    (tmp_path / "net.safetensors").write_bytes(data.replace(b"encoder/c", b"encoder/q"))
    with pytest.raises(
        FormatError,
        match="the wires of decoder contain 'encoder/q', which doesn't exist: the states of encoder are h, c",
    ):
        cs.load(tmp_path / "net.safetensors")


def test_a_state_dict_cannot_hold_it(tmp_path):
    with pytest.raises(ValueError, match=r"save: .*PyTorch files only hold"):
        seq2seq(*PAIRS["a GRU"]()).save(tmp_path / "net.pt")
