"""Traces: the bits of a run, the values of every node and cell, and the gates' pre-activations."""

import copy
import gc
import itertools
import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pairs
import pytest
import tolerances
from family import random_spec
from networks import fill, make_cell, make_graph, make_network, make_states

from cellstack import CellSpec, Network, Patch, reference
from cellstack.cells.base import State
from cellstack.cells.spec import TRACES
from cellstack.nodes import Bidirectional, Conv1D, Dense, Embedding, GlobalPool, Merge, Pool1D, Recurrent


def rng_of(seed):
    return np.random.default_rng(seed)


def equal(one, other):
    one, other = (value if isinstance(value, tuple) else (value,) for value in (one, other))
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pairs.seeds(30, 60)
def test_a_trace_has_the_bits_of_the_run_and_of_every_node(seed):
    rng = rng_of(seed)
    dtype = ("float32", "float64")[seed % 2]
    if seed % 3:
        net, x = make_graph(seed, dtype)
    else:
        net = make_network(seed, dtype)
        x = {net.inputs[0]: rng.normal(size=(3, 6, net.input_size)).astype(dtype)}
    first = next(iter(x.values()))
    state = make_states(rng, net, 3) if net.cells else None
    timed = all(net.graph.timed(name) for name in net.inputs)
    mask = rng.random(first.shape[:2]) < 0.8 if seed % 5 == 0 and timed else None
    y, after = net.run(x, state, mask)
    t = net.trace(x, state, mask)
    assert equal(t.y, y)
    assert all(equal(tuple(one), tuple(other)) for one, other in zip(t.state, after, strict=True))
    assert list(t) == list(net.names)
    assert len(t) == len(net.nodes)
    # Request each node's value as an output, so that nodes run separately.
    every = Network(net.nodes, net.names, inputs=net_inputs(net), wires=net.wires, outputs=net.names)
    apart, _ = every.run(x, state, mask)
    for name, value, sources in zip(net.names, apart if len(net.names) > 1 else (apart,), net.wires, strict=True):
        assert equal(t[name].y, value)
        took = [t[source].y if source in net.names else x[source] for source in sources]
        assert equal(t[name].x, tuple(took))
    for name, node in zip(net.names, net.nodes, strict=True):
        assert len(t[name].cells) == len(node.cells)
        for cell, seen in zip(node.cells, t[name].cells, strict=True):
            assert tuple(seen) == TRACES[cell.spec.kind]._fields


def net_inputs(net):
    return {name: net.shapes[name] for name in net.inputs}


def before(record, name):
    """Return a state of a cell without a learned initial state before each step."""
    turn = slice(None, None, -1 if record.reverse else 1)
    after = getattr(record.states, name)[:, turn]
    start = np.zeros_like(after[:, 0]) if record.before is None else getattr(record.before, name)
    previous = np.concatenate([start[:, None], after[:, :-1]], axis=1)
    fresh = np.zeros(1, bool) if record.reset is None else record.reset[:, turn, None]
    return np.where(fresh, 0.0, previous)[:, turn]


def activated(seen, gate):
    """Return the values of a gate that follow from its pre-activations and, for an sLSTM's i and f, from n and m."""
    spec, z = seen.cell.spec, seen.pre[gate]
    if spec.kind == "cfc" and gate == "s":
        return z
    if spec.kind == "slstm" and gate == "i":
        return np.exp(z - seen.m)
    if spec.kind == "slstm" and gate == "f":
        log_f = z if spec.exponential_forget else -np.logaddexp(0.0, -z)
        return np.where(before(seen.record, "n") == 0, 0.0, np.exp(log_f + before(seen.record, "m") - seen.m))
    name, alpha, beta = spec.activations[spec.slots.index(gate)]
    bound = np.inf if spec.clip is None else spec.clip
    return reference.ACTIVATIONS[name][0](np.clip(z, -bound, bound), alpha, beta)


@pytest.mark.parametrize("backwards", [False, True])
@pairs.seeds(30, 60)
def test_cells_and_their_sums_are_the_reference(seed, backwards):
    """Every flag: gates, c and h equal those of the equations for the same x; gates equal the activated sums."""
    rng = rng_of(seed)
    first = fill(rng, random_spec(rng, largest=12), "float64")
    second = make_cell(rng, first.spec.output_size, 5, "float64")
    net = Network([Recurrent((first, second), go_backwards=backwards)])
    x = rng.normal(size=(3, 6, first.spec.input_size))
    state = make_states(rng, net, 3) if seed % 2 else None
    mask = rng.random((3, 6)) < 0.7 if seed % 3 == 0 else None
    reset = rng.random((3, 6)) < 0.3 if seed % 5 == 0 else None
    t, below = net.trace(x, state, mask, reset=reset), x
    begun = reset
    if reset is not None and backwards:  # a backward direction starts with a sequence's last step
        begun = np.concatenate([reset[:, 1:], np.zeros((3, 1), bool)], axis=1)
    for number, seen in enumerate(t["layer_0"].cells):
        cell, start = seen.cell, None if state is None else state[number]
        exact = reference.forward(cell.spec, cell.arrays, below, start, mask=mask, reset=begun, reverse=backwards)
        gates = [exact.gates[:, :, plane] for plane in range(exact.gates.shape[2])][: len(cell.spec.of_kind.gates)]
        fields = [*gates, *exact.states, exact.y]
        for field, expected in zip(seen.fields, fields, strict=True):
            np.testing.assert_allclose(field, expected, atol=tolerances.KERNEL_ACTIVATIONS * 10, rtol=1e-9)
        used = np.ones((3, 6), bool) if mask is None else mask
        for gate, z in seen.pre.items():
            np.testing.assert_allclose(seen[gate][used], activated(seen, gate)[used], atol=1e-9, rtol=1e-9)
            assert not z[~used].any()
        below = exact.y


def stack(seed=0, dtype="float32"):
    rng = rng_of(seed)
    nodes = [Recurrent((make_cell(rng, 3, 8, dtype),)), Recurrent((make_cell(rng, 8, 6, dtype, kind="gru"),))]
    return Network([*nodes, Dense(rng.normal(size=(6, 2)).astype(dtype))])


def x_of(batch=2, steps=10, width=3, seed=1):
    return rng_of(seed).normal(size=(batch, steps, width)).astype("float32")


def test_some_nodes_steps_and_units_are_those_of_the_whole():
    net, x = stack(), x_of()
    whole = net.trace(x)
    part = net.trace(x, nodes="layer_1", units=[1, 4], steps=slice(2, 7), pre=True)
    assert list(part) == ["layer_1"]
    assert equal(part.y, whole.y[:, 2:7])
    assert all(equal(tuple(one), tuple(other)) for one, other in zip(part.state, whole.state, strict=True))
    assert part.steps.tolist() == [2, 3, 4, 5, 6]
    for field in "zrgh":
        assert equal(getattr(part["layer_1"], field), getattr(whole["layer_1"], field)[:, 2:7][..., [1, 4]])
    assert equal(part["layer_1"].pre["z"], whole["layer_1"].pre["z"][:, 2:7][..., [1, 4]])
    assert part["layer_1"].units.tolist() == [1, 4]
    assert equal(part["layer_1"].x, whole["layer_0"].y[:, 2:7])
    with pytest.raises(ValueError, match="request them with trace"):
        net.trace(x, steps=slice(3))["layer_0"].cells[0].pre  # noqa: B018
    with pytest.raises(KeyError, match="got 'layer_0', which isn't kept"):
        part["layer_0"]
    with pytest.raises(KeyError, match="expected one of layer_1, got 'nobody', which isn't in the network"):
        part["nobody"]
    with pytest.raises(ValueError, match="expected nodes out of layer_0, layer_1, layer_2, got 'lstm'"):
        net.trace(x, nodes=["lstm"])
    with pytest.raises(TypeError, match="expected nodes as names, got 5"):
        net.trace(x, nodes=5)
    for wrong in (-1, np.nan, "a", None):
        with pytest.raises(ValueError, match="expected in_memory as a number of bytes, 0 or more, got"):
            net.trace(x, in_memory=wrong)


SOME = {
    "tuple": ((0, 1), [0, 1]),
    "numbers": ([1, -1, 1], [1, 9, 1]),
    "array": (np.array([3, 2]), [3, 2]),
    "number": (2, [2]),
    "scalar": (np.array(2), [2]),
    "slice": (slice(1, None, 3), [1, 4, 7]),
    "backwards": (slice(None, None, -4), [9, 5, 1]),
    "flags": (np.arange(10) % 4 == 0, [0, 4, 8]),
    "none": ([], []),
}
WRONG = {
    "beyond": ([3, 10], "expected steps from 0 to 9, got 10"),
    "before": (-11, "expected steps from 0 to 9, got -11"),
    "nested": ([[0, 1]], r"expected steps as a slice, a number, numbers, or 10 flags, got \[\[0, 1\]\]"),
    "ragged": ([[0], [1, 2]], "expected steps as a slice, a number, numbers"),
    "text": ("a", "expected steps as a slice, a number, numbers"),
    "flags": ([True, False], "expected steps as a slice, a number, numbers"),
    "slice of text": (slice("a"), "expected steps as a slice of whole numbers, got slice"),
}


@pytest.mark.parametrize("case", SOME)
def test_what_selects_steps(case):
    index, numbers = SOME[case]
    whole = stack().trace(x_of())
    for part in (whole.select(steps=index), stack().trace(x_of(), steps=index)):
        assert part.steps.tolist() == numbers
        assert equal(part["layer_1"].z, whole["layer_1"].z[:, numbers])
        assert equal(part.y, whole.y[:, numbers])


@pytest.mark.parametrize("case", WRONG)
def test_what_selects_no_steps(case):
    index, message = WRONG[case]
    with pytest.raises(IndexError, match=message):
        stack().trace(x_of(), steps=index)


def test_rows_and_units_that_are_not_there():
    t = stack().trace(x_of())
    with pytest.raises(IndexError, match="expected rows from 0 to 1, got 2"):
        t.select(rows=[2])
    with pytest.raises(IndexError, match="expected units from 0 to 5, got 7"):
        t.select(units=[7])  # of the GRU, which has 6


def test_memory_of_omitted_parts_is_freed():
    net = Network([Recurrent((make_cell(rng_of(0), 3, 100),))])
    x = x_of(20, 500)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    part = net.trace(x, units=[0], steps=[0, 1])
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert part["layer_0"].f.shape == (20, 2, 1)
    assert used < 1e6  # the full run has 4 MB of h, 24 MB of gates and c


def test_later_writes_of_the_caller_do_not_change_a_trace():
    net, x = stack(), x_of()
    state = (State(np.ones((2, 8), "f4"), np.ones((2, 8), "f4")), (np.ones((2, 6), "f4"),))
    t, same = net.trace(x, state), net.trace(x.copy(), copy.deepcopy(state))
    x[:] = 0
    state[0].h[:] = 9
    assert equal(t["layer_0"].pre["f"], same["layer_0"].pre["f"])
    assert equal(t["layer_0"].x, same["layer_0"].x)


def test_an_interrupted_access_spoils_no_other():
    rng = rng_of(0)
    net = Network([Recurrent((make_cell(rng, 3, 4),), go_backwards=True), Recurrent((make_cell(rng, 4, 5),))])
    whole, t = net.trace(x_of()), net.trace(x_of())
    made = t._made
    for _ in range(3):  # as if every access but the last had been interrupted before it was stored
        made()
    assert equal(t["layer_1"].h, whole["layer_1"].h)
    assert equal(t["layer_1"].y, net(x_of()))


def test_selected_steps_are_in_order():
    rng = rng_of(0)
    back = Network([Recurrent((make_cell(rng, 3, 4),), go_backwards=True), Recurrent((make_cell(rng, 4, 5),))])
    whole, part = back.trace(x_of()), back.trace(x_of()).select(steps=[0])
    assert equal(part["layer_0"].h, whole["layer_0"].h[:, :1])
    assert equal(part["layer_0"].y, whole["layer_0"].y)  # in the order of processing: not sliced by steps
    assert equal(part["layer_1"].h, whole["layer_1"].h)
    nodes = [Recurrent((make_cell(rng, 3, 4),)), Pool1D("max", 2), Recurrent((make_cell(rng, 4, 4),))]
    t = Network(nodes).trace(x_of(2, 8)).select(steps=slice(0, 4)).select(steps=slice(0, 2))
    assert [t[name].y.shape[1] for name in t] == [2, 4, 4]


def test_slices_are_not_copies():
    t = stack().trace(x_of(5))
    part = t.select(rows=slice(1, 3), steps=slice(2, 9), units=slice(0, 4))
    assert part["layer_0"].f.shape == (2, 7, 4)
    assert np.shares_memory(part["layer_0"].f, t["layer_0"].f)
    assert np.shares_memory(part["layer_2"].y, t["layer_2"].y)
    assert np.array_equal(part["layer_0"].c, t["layer_0"].c[1:3, 2:9, :4])
    assert part.y.shape == (2, 7, 2)
    assert part.state[0].h.shape == (2, 8)
    assert t.select(rows=1)["layer_1"].z.shape == (1, 10, 6)


def test_steps_apply_to_aligned_nodes():
    rng = rng_of(0)
    nodes = [Recurrent((make_cell(rng, 3, 4),)), Pool1D("max", 2), GlobalPool("mean")]
    t = Network(nodes).trace(x_of(), steps=slice(0, 3))
    assert [t[name].y.shape for name in t] == [(2, 3, 4), (2, 5, 4), (2, 4)]


def test_fields_by_name_and_by_attribute():
    t = stack().trace(x_of())
    assert tuple(t["layer_0"].cells[0]) == ("i", "f", "g", "o", "c", "h")
    assert t["layer_0"].cells[0]["f"] is t["layer_0"].f
    with pytest.raises(AttributeError, match="a trace of this node has x, y, z, r, g, h, pre, not 'f'"):
        t["layer_1"].f  # noqa: B018
    with pytest.raises(AttributeError, match="a trace of this node has x, y, not 'f'"):
        t["layer_2"].f  # noqa: B018
    with pytest.raises(KeyError, match="expected one of z, r, g, h, got 'f'"):
        t["layer_1"].cells[0]["f"]
    rng = rng_of(0)
    both = Bidirectional(*(Recurrent((make_cell(rng, 3, 4),), go_backwards=way) for way in (False, True)))
    t = Network([both]).trace(x_of())
    with pytest.raises(AttributeError, match=r"this node has 2 cells: select one of them, \.cells\[0\]\.f"):
        t["layer_0"].f  # noqa: B018
    assert "i f g o c h | i f g o c h" in repr(t)
    assert repr(t["layer_0"]).splitlines()[1] == "  LSTM 3 -> 4: i, f, g, o, c, h [2, 10, 4]"


def test_gates_and_states_of_some_hundred_kilobytes_share_large_pages(rng):
    net = Network([Recurrent((make_cell(rng, 8, 64), make_cell(rng, 64, 64)))])
    cells = net.trace(np.zeros((8, 100, 8), np.float32))["layer_0"].cells
    arrays = [array for cell in cells for array in (cell.record.states.c, cell.record.gates)]
    roots = [_root(array) for array in arrays]
    assert len({id(root) for root in roots}) == 1
    assert roots[0].nbytes > 4 << 20  # from which NumPy asks for large pages
    assert all(array.ctypes.data % 64 == 0 for array in arrays)
    assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(arrays, 2))


@pytest.mark.parametrize("in_memory", [0, 5000])
def test_large_traces_are_stored_in_files(in_memory):
    net, x = stack(), x_of(7, 20)
    whole, mapped = net.trace(x), net.trace(x, in_memory=in_memory)
    assert equal(whole.y, mapped.y)
    for name in ("layer_0", "layer_1"):
        assert all(map(equal, whole[name].cells[0].fields, mapped[name].cells[0].fields))
    assert isinstance(_root(mapped["layer_1"].z), np.memmap)
    assert not isinstance(_root(whole["layer_1"].z), np.memmap)


def _root(array):
    while array.base is not None and isinstance(array.base, np.ndarray):
        array = array.base
    return array


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (0, 0, 3), (1, 1, 3)])
def test_no_rows_and_no_steps(shape):
    net, x = stack(), np.zeros(shape, "float32")
    t = net.trace(x, pre=True)
    y, state = net.run(x)
    assert equal(t.y, y)
    assert all(equal(tuple(one), tuple(other)) for one, other in zip(t.state, state, strict=True))
    assert t["layer_0"].f.shape == t["layer_0"].pre["f"].shape == (*shape[:2], 8)


def test_nan_and_infinities():
    net, x = stack(), x_of()
    x[0, 3] = np.nan
    x[1, 4] = np.inf
    t = net.trace(x, pre=True)
    np.testing.assert_array_equal(t.y, net(x))
    assert np.isnan(t["layer_0"].c[0, 3:]).all()
    assert np.isfinite(t["layer_0"].c[0, :3]).all()


def test_traces_are_copied_and_pickled():
    whole = stack().trace(x_of())
    read = pickle.loads(pickle.dumps(whole))
    assert repr(read) == repr(copy.deepcopy(whole)) == repr(whole)
    assert equal(read["layer_0"].pre["f"], whole["layer_0"].pre["f"])
    assert equal(read.network(x_of()), whole.y)
    cell = stack().trace(x_of())["layer_0"].cells[0]
    for other in (copy.copy(cell), copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert equal(other.f, cell.f)
        assert equal(other.pre["f"], cell.pre["f"])


def test_a_state_goes_in_and_comes_out():
    net = Network([Recurrent((make_cell(rng_of(0), 3, 8),))])
    x = x_of(2, 10)
    first = net.trace(x[:, :4])
    second = net.trace(x[:, 4:], first.state)
    whole = net.trace(x)
    assert isinstance(first.state[0], State)
    for field in "ifgoch":
        both = np.concatenate([getattr(t["layer_0"], field) for t in (first, second)], axis=1)
        assert equal(both, getattr(whole["layer_0"], field))
    assert equal(second["layer_0"].pre["f"], whole["layer_0"].pre["f"][:, 4:])


def test_wide_cells_and_projections_keep_their_own_widths():
    rng = rng_of(0)
    net = Network([Recurrent((fill(rng, CellSpec(3, 8, proj_size=5)),))])
    t = net.trace(x_of(), units=slice(6, 8))
    assert t["layer_0"].f.shape == (2, 10, 2)
    assert t["layer_0"].h.shape == (2, 10, 5)  # projected: not tied to single units


# ── streams ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(12))
def test_a_stream_s_last_steps_are_bit_identical(seed):
    rng = rng_of(seed)
    net, most = stack(seed), int(rng.integers(1, 9))
    stream, twin = net.stream(2), net.stream(2)
    frames = x_of(2, 40, seed=seed)
    start = int(rng.integers(0, 6))
    stream.run(frames[:, :start])
    twin.run(frames[:, :start])
    stream.remember(most)
    before = twin.state
    whole = net.trace(frames[:, start:], before)
    at = 0
    while at < 30:
        size = int(rng.integers(1, 6))
        chunk = frames[:, start + at : start + at + size]
        y = stream.run(chunk) if size > 1 else stream.step(chunk[:, 0])[:, None]
        assert equal(y, twin.run(chunk))
        at += size
        asked = int(rng.integers(1, most + 1))
        t = stream.trace(asked)
        count = min(asked, at)
        for name in ("layer_0", "layer_1"):
            for field, expected in zip(t[name].cells[0].fields, whole[name].cells[0].fields, strict=True):
                assert equal(field, expected[:, at - count : at])
        assert equal(t.y, whole.y[:, at - count : at])
    assert all(equal(tuple(one), tuple(other)) for one, other in zip(stream.trace().state, stream.state, strict=True))
    assert stream.trace(1000)["layer_0"].f.shape[1] == most


def test_a_stream_must_remember_before_it_can_be_traced():
    stream = stack().stream(1)
    with pytest.raises(RuntimeError, match=r"needs a call of remember\(steps\)"):
        stream.trace(3)
    stream.remember(5)
    with pytest.raises(RuntimeError, match="no step was taken since remember"):
        stream.trace()
    x = x_of(1, 1)[:, 0]
    stream.step(x)
    assert stream.trace()["layer_0"].f.shape[1] == 1
    stream.reset()
    with pytest.raises(RuntimeError, match="no step was taken since remember"):
        stream.trace()
    stream.step(x)
    assert equal(stream.trace().y, stack()(x[:, None]))
    for _ in range(3):
        stream.run(x[:, None][:, :0])  # no step
    assert stream.trace()["layer_0"].f.shape[1] == 1
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="expected steps to be an integer"):
            stream.remember(wrong)
    with pytest.raises(ValueError, match="expected weights='float32' to trace, got 'int8'"):
        stack().stream(weights="int8").remember(3)
    kernel = np.ones((2, 3, 3), "float32")
    convolved = Network([Conv1D(kernel, padding="causal"), Recurrent((make_cell(rng_of(0), 3, 4),))], ["conv", "lstm"])
    with pytest.raises(ValueError, match="doesn't support nodes with a memory, got conv"):
        convolved.stream().remember(3)


def test_ids_and_frames_of_a_stream_are_traced():
    rng = rng_of(0)
    nodes = [Embedding(rng.normal(size=(9, 2)).astype("f4")), Merge(), Recurrent((make_cell(rng, 5, 4),))]
    net = Network(nodes, ["e", "both", "lstm"], inputs=("x", "id"), wires=[("id",), ("x", "e"), ("both",)])
    stream, x, ids = net.stream(2), x_of(2, 6), rng.integers(0, 9, (2, 6))
    stream.remember(4)
    for step in range(6):
        stream.step({"x": x[:, step], "id": ids[:, step]})
    t = stream.trace()
    assert equal(t["lstm"].f, net.trace({"x": x, "id": ids})["lstm"].f[:, 2:])
    assert equal(t["e"].x, ids[:, 2:])


def test_an_interrupted_step_is_forgotten(monkeypatch):
    stream = stack().stream(1)
    stream.remember(5)
    x = x_of(1, 4)
    stream.run(x[:, :2])
    with monkeypatch.context() as patch:
        patch.setattr(stream._history, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stream.step(x[:, 2])
    with pytest.raises(RuntimeError, match="no step was taken since remember"):
        stream.trace()
    y = stream.step(x[:, 3])
    assert equal(stream.trace().y[:, 0], y)


def test_rows_of_a_masked_run_have_no_gradients():
    mask = np.arange(10) < np.array([[10], [6]])
    t = stack().trace(x_of(), mask=mask)
    for part in (t.select(rows=1), t.select(rows=[1], steps=slice(1, 5)), t.select(rows=[0, 0, 1])):
        with pytest.raises(ValueError, match="a trace of all nodes, rows"):
            part.gradient(0)


@pairs.seeds(40, 80)
def test_pre_activations_of_a_patched_run_give_its_gates(seed):
    rng = rng_of(seed)
    spec = replace(random_spec(rng, largest=6), clip=None)
    cell = fill(rng, spec, "float64")
    gate = str(rng.choice(TRACES[spec.kind]._fields))
    how = str(rng.choice(["set", "add", "scale", "freeze"]))
    patch = Patch("layer_0", gate, units=[0], steps=slice(2, 5), value=None if how == "freeze" else 0.4, how=how)
    t = (
        Network([Recurrent((cell,), go_backwards=bool(seed % 3 == 0))])
        .edit(patch)
        .trace(rng.normal(size=(2, 7, spec.input_size)))
    )
    seen = t["layer_0"].cells[0]
    for name, sums in seen.pre.items():
        own = np.ones(sums.shape, bool)
        if gate == name or (gate == "m" and name in "if"):  # i and f used m before it was patched
            own[:, 2:5, 0] = False  # a patched value isn't an activation
        np.testing.assert_allclose(seen[name][own], activated(seen, name)[own], atol=1e-9)
