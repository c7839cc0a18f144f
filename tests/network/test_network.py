"""Networks: results compared with the reference, masks, resets, every kind of input, and errors."""

import copy
import inspect
import pickle
import threading
from dataclasses import replace

import numpy as np
import pairs
import pytest
import tolerances
from family import learned, random_spec
from kinds import named, of_seed
from networks import by_reference, fill, make_cell, make_network, make_stack, make_states

from cellstack import CellSpec, HiddenState, Network, ShapeError, State, native, reference
from cellstack.cells.spec import ARRAYS, GATES
from cellstack.nodes import Activation, Bidirectional, Cell, Dense, GlobalPool, Merge, Recurrent, Scale, Standardise
from cellstack.nodes.recording import Recording

TOLERANCE = {"float32": tolerances.NETWORK, "float64": tolerances.REFERENCE_DOUBLE}


def rng_of(seed=0):
    return np.random.default_rng(seed)


def small(return_sequences=True, dtype="float32", **flags):
    return Network([Recurrent((make_cell(rng_of(), 3, 4, dtype),), return_sequences, **flags)])


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pairs.seeds(60, 120)
def test_a_network_matches_the_reference(seed, dtype):
    net, rng = make_network(seed, dtype), rng_of(seed + 1000)
    batch, steps = int(rng.integers(1, 6)), int(rng.integers(1, 12))
    x = rng.normal(size=(batch, steps, net.input_size)).astype(dtype)
    mask = rng.random((batch, steps)) < 0.7 if seed % 3 else None
    reset = rng.random((batch, steps)) < 0.2 if seed % 5 < 3 else None
    state = make_states(rng, net, batch) if seed % 2 else None
    y, after = net.run(x, state=state, mask=mask, reset=reset)
    expected_y, expected_after = by_reference(net, x, state, mask, reset)
    assert y.dtype == dtype
    # relative to the largest value: some activations grow through layers
    tolerance = TOLERANCE[dtype] * max(1.0, np.abs(expected_y).max())
    np.testing.assert_allclose(y, expected_y, atol=tolerance, rtol=0)
    for got, want in zip(after, expected_after, strict=True):
        for one, other in zip(got, want, strict=True):
            assert one.dtype == dtype
            tolerance = TOLERANCE[dtype] * max(1.0, np.abs(other).max())
            np.testing.assert_allclose(one, other, atol=tolerance, rtol=0)


FLAGS = named("flags")


def test_the_signature_has_only_arguments_for_users():
    names = inspect.signature(Network).parameters
    assert [*names][:3] == ["nodes", "names", "metadata"]
    assert not [name for name in names if name.startswith("_")]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("case", FLAGS)
def test_every_flag_by_itself(case, backwards):
    rng = rng_of(7)
    cell = make_cell(rng, 3, 5, "float64", **FLAGS[case])
    net = Network([Recurrent((cell,), go_backwards=backwards)])
    x, mask, reset = rng.normal(size=(4, 7, 3)), rng.random((4, 7)) < 0.8, rng.random((4, 7)) < 0.3
    usual = {"kind": cell.spec.kind, "use_bias": cell.spec.use_bias}
    if cell.spec != CellSpec(3, 5, **usual):  # and the flag does something
        without = fill(rng_of(7), CellSpec(3, 5, **usual), "float64")
        kept = {name: array for name, array in cell.arrays.items() if without.spec.shapes.get(name) == array.shape}
        other = Cell(without.spec, **{**without.arrays, **kept})
        ours, others = net(x), Network([Recurrent((other,), go_backwards=backwards)])(x)
        assert ours.shape != others.shape or np.abs(ours - others).max() > 1e-3
    for state in (None, make_states(rng, net, 4)):
        for given in ({}, {"mask": mask}, {"reset": reset}, {"mask": mask, "reset": reset}):
            y, after = net.run(x, state, **given)
            expected, expected_after = by_reference(net, x, state, **given)
            np.testing.assert_allclose(y, expected, atol=tolerances.REFERENCE_DOUBLE, rtol=0)
            for one, other in zip(after[0], expected_after[0], strict=True):
                np.testing.assert_allclose(one, other, atol=tolerances.REFERENCE_DOUBLE, rtol=0)


def test_rows_start_from_the_learned_initial_state():
    for kind in filter(learned, GATES):
        cell = make_cell(rng_of(), 3, 4, kind=kind, learn_initial_state=True)
        net, x = Network([Recurrent((cell,))]), rng_of(1).normal(size=(2, 5, 3))
        start = [np.tile(cell.arrays[f"initial_{name}"], (2, 1)) for name in cell.spec.state_sizes]
        assert np.array_equal(net(x), net.run(x, state=[start])[0])
        assert not np.array_equal(net(x), net.run(x, state=[[0 * array for array in start]])[0])
        assert same(net.run(x[:, :0])[1][0], start)


# ── residual ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_residual_adds_the_input_if_the_widths_match():
    rng = rng_of(3)
    widths = [(3, 4, {}), (4, 4, {"kind": "gru"}), (4, 5, {"kind": "rnn"}), (5, 9, {"proj_size": 5}), (5, 5, {})]
    cells = tuple(make_cell(rng, i, h, **flags) for i, h, flags in widths)
    x = rng.normal(size=(2, 6, 3)).astype("float32")
    node = Recurrent(cells, residual=True)
    assert [(len(run), added) for run, added in node.parts] == [(1, False), (1, True), (1, False), (1, True), (1, True)]
    y, states = x, []
    for cell, added in zip(cells, (False, True, False, True, True), strict=True):
        out, after = Network([Recurrent((cell,))]).run(y)
        y = out + y if added else out
        states += after
    got, after = Network([node]).run(x)
    assert np.array_equal(got, y)
    assert all(same(one, other) for one, other in zip(after, states, strict=True))
    assert np.array_equal(Network([replace(node, return_sequences=False)])(x), y[:, -1])
    assert not np.array_equal(Network([replace(node, residual=False)])(x), y)
    assert node.summary == ("LSTM 3 -> 4, GRU -> 4, SimpleRNN -> 5, LSTM -> 5 (projected from 9), LSTM -> 5, residual")


@pytest.mark.parametrize("backwards", [False, True])
def test_a_residual_repeats_its_sum_at_masked_steps_and_not_across_resets(backwards):
    cells = tuple(make_cell(rng_of(n), 4, 4, kind="gru", learn_initial_state=True) for n in range(2))
    net = Network([Recurrent(cells, go_backwards=backwards, residual=True)])
    x, state = rng_of(1).normal(size=(1, 6, 4)), make_states(rng_of(2), net, 1)
    mask = np.array([[False, True, False, True, False, False]])
    reset = np.array([[False, False, False, False, False, True]])  # begins a piece without used steps
    if backwards:
        x, mask, reset = x[:, ::-1], mask[:, ::-1], np.array([[False, True, False, False, False, False]])
    y = net.run(x, state, mask=mask, reset=reset)[0][0]
    kept, _ = Network([Recurrent(cells, residual=True)]).run((x[:, ::-1] if backwards else x)[:, [1, 3]], state)
    assert np.array_equal(y[0], state[1].h[0])
    assert np.array_equal(y[[1, 2, 3, 4]], kept[0, [0, 0, 1, 1]])
    assert np.array_equal(y[5], cells[1].initial_h)


# ── resets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("masked", [False, True])
def test_a_reset_is_as_good_as_a_new_sequence(seed, masked):
    """Pieces in one call and in separate calls give the same bits, in every direction."""
    rng = rng_of(seed)
    ahead = make_stack(rng, 3, residual=bool(seed % 2))
    back = make_stack(rng, 3, go_backwards=True, residual=bool(seed % 3))
    zero = {"zero_output_for_mask": bool(seed % 5)}
    for node in (replace(ahead, **zero), replace(back, **zero), Bidirectional(ahead, back)):
        nodes = [node, make_stack(rng, node.check("", (None, 3))[-1], zero_output_for_mask=True)]
        net, x = Network(nodes), rng.normal(size=(2, 9, 3)).astype("float32")
        mask = rng.random((2, 9)) < 0.7 if masked else None
        reset = np.zeros((2, 9), bool)
        reset[:, [0, 4, 5]] = True
        turned = isinstance(node, Recurrent) and node.go_backwards
        pieces = [slice(0, 4), slice(4, 5), slice(5, 9)]
        parts = [net.run(x[:, piece], mask=None if mask is None else mask[:, piece]) for piece in pieces]
        y, after = net.run(x, mask=mask, reset=reset)
        order = parts[::-1] if turned else parts
        assert np.array_equal(y, np.concatenate([part for part, _ in order], axis=1))
        last = [0 if cell in back.cells else -1 for cell in node.cells]  # the piece that each cell processes last
        last += [0 if turned else -1] * len(nodes[1].cells)
        for n, piece in enumerate(last):
            assert same(after[n], parts[piece][1][n])


def test_a_reset_replaces_the_given_state():
    net, rng = small(), rng_of(4)
    x, state = rng.normal(size=(2, 5, 3)), make_states(rng, small(), 2)
    reset = np.array([[True, False, False, False, False], [False] * 5])
    y = net.run(x, state, reset=reset)[0]
    assert np.array_equal(y[0], net(x)[0])
    assert np.array_equal(y[1], net.run(x, state)[0][1])
    back = small(go_backwards=True)  # runs the last piece from the given state, also with a reset at the first step
    assert np.array_equal(back.run(x, state, reset=reset)[0], back.run(x, state)[0])


def test_a_reset_at_a_masked_step_counts():
    net, rng = small(), rng_of(5)
    x = rng.normal(size=(1, 6, 3))
    mask, reset = np.array([[True, True, False, False, True, True]]), np.array([[False, False, True] + [False] * 3])
    y = net.run(x, mask=mask, reset=reset)[0]
    assert np.array_equal(y[:, :2], net(x[:, :2]))
    assert (y[:, 2:4] == 0).all()
    assert np.array_equal(y[:, 4:], net(x[:, 4:]))


def test_softmax_takes_any_logits():
    y = Network([Activation("softmax")])(np.array([[[1000.0, 1000.0, -1000.0], [-1e30, -1e30, 0.0]]]))
    assert y.tolist() == [[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]]


@pytest.mark.parametrize("seed", range(12))
def test_rows_don_t_depend_on_other_rows_or_threads(seed):
    net, rng = make_network(seed), rng_of(seed)
    x = rng.normal(size=(7, 9, net.input_size)).astype("float32")
    y = net.run(x, threads=1)[0]
    assert np.array_equal(net.run(x, threads=3)[0], y)
    for row in range(7):
        np.testing.assert_array_equal(net(x[row : row + 1])[0], y[row])


# ── masks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_masked_step_carries_the_state_and_repeats_the_output():
    net, rng = small(), rng_of(1)
    x, state = rng.normal(size=(1, 5, 3)).astype("float32"), make_states(rng, small(), 1)
    mask = np.array([[False, True, False, False, True]])
    y, after = net.run(x, state=state, mask=mask)
    kept, kept_after = net.run(x[:, mask[0]], state=state)
    assert np.array_equal(y[0, 0], state[0].h[0])  # there is only the initial h before it
    assert np.array_equal(y[0, 1], y[0, 2])
    assert np.array_equal(y[0, 2], y[0, 3])
    assert np.array_equal(y[:, [1, 4]], kept)
    assert all(np.array_equal(a, b) for a, b in zip(after[0], kept_after[0], strict=True))


@pytest.mark.parametrize("backwards", [False, True])
def test_zero_output_for_mask(backwards):
    mask = np.array([[False, True, True, False]])
    x = rng_of(2).normal(size=(1, 4, 3))
    flags = {"go_backwards": backwards, "zero_output_for_mask": True}
    y = small(**flags)(x, mask)
    order = mask[:, ::-1] if backwards else mask
    assert (y[~order] == 0).all()
    assert (y[order] != 0).all()
    assert (small(return_sequences=False, **flags)(x, mask) == 0).all()  # the last processed step is masked


def test_backward_output_and_mask_are_in_the_order_of_processing():
    net, x = small(go_backwards=True), rng_of(3).normal(size=(2, 6, 3))
    assert np.array_equal(net(x), small()(x[:, ::-1]))
    mask = np.arange(6) < [[6], [2]]
    pooled = Network([*net.nodes, GlobalPool("last")])(x, mask)
    assert np.array_equal(pooled, net(x, mask)[:, -1])  # the used steps are the last ones now


def test_values_of_masked_steps_never_leak():
    net = Network(
        [
            Standardise(np.ones(3), np.ones(3)),
            small(dtype="float64").nodes[0],
            GlobalPool("mean"),
        ]
    )
    x = rng_of(4).normal(size=(3, 5, 3))
    mask = rng_of(5).random((3, 5)) < 0.6
    spoilt = np.where(mask[:, :, None], x, np.nan)
    assert np.array_equal(net(spoilt, mask), net(x, mask))


@pytest.mark.parametrize("mode", ["mean", "max", "last"])
def test_pooling_honours_the_mask(mode):
    x = np.array([[[1.0, -5.0], [3.0, -1.0], [9.0, 9.0]], [[7.0, 7.0], [7.0, 7.0], [7.0, 7.0]]])
    mask = np.array([[True, True, False], [False, False, False]])
    expected = {"mean": [2.0, -3.0], "max": [3.0, -1.0], "last": [3.0, -1.0]}[mode]
    y = Network([GlobalPool(mode)])(x, mask)
    assert y.tolist() == [expected, [0.0, 0.0]]
    assert Network([GlobalPool(mode)])(x[:, :0]).tolist() == [[0.0, 0.0]] * 2


def test_lengths_are_a_mask():
    net, x = make_network(11), rng_of(6).normal(size=(4, 6, make_network(11).input_size))
    lengths = [0, 6, 3, 1]
    mask = np.arange(6) < np.array(lengths)[:, None]
    assert np.array_equal(net.run(x, lengths=lengths)[0], net(x, mask))


# ── kinds of input ──────────────────────────────────────────────────────────────────────────────────────────────────

FORMS = {
    "float64": lambda x: x.astype("float64"),
    "float16": lambda x: x.astype("float16"),
    "integers": lambda x: x.astype("int8"),
    "bools": lambda x: x.astype(bool),
    "lists": lambda x: x.tolist(),
    "another byte order": lambda x: x.astype(">f4"),
    "fortran order": np.asfortranarray,
    "time first": lambda x: np.ascontiguousarray(x.transpose(1, 0, 2)).transpose(1, 0, 2),
    "features first": lambda x: np.ascontiguousarray(x.transpose(2, 1, 0)).transpose(2, 1, 0),
    "every other": lambda x: np.repeat(np.repeat(x, 2, axis=0), 2, axis=2)[::2, :, ::2],
    "backwards": lambda x: np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1],
    "one row for all": lambda x: np.broadcast_to(x[:1], x.shape),
    "one step for all": lambda x: np.broadcast_to(x[:, :1], x.shape),
    "between other fields": lambda x: np.rec.fromarrays([np.zeros(x.shape, "i1"), x], names="a,b").b,
    "rows a byte too long": lambda x: np.ndarray(
        x.shape,
        x.dtype,
        b"".join(b"-" + row.tobytes() for row in x.reshape(-1, x.shape[2])),
        1,
        (x.shape[1] * (4 * x.shape[2] + 1), 4 * x.shape[2] + 1, 4),
    ),
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(6))
def test_any_array_gives_what_a_plain_one_gives(form, seed):
    scale = Scale(np.full(33, 0.3, "float32"), np.full(33, 0.1, "float32"))
    net = [
        small(),
        small(go_backwards=True, return_sequences=False),
        make_network(7),
        make_network(23),
        Network([scale, Activation("softmax")]),
        Network([scale, Activation("log_softmax")]),
    ][seed]
    given = FORMS[form](rng_of(seed).integers(0, 5, size=(3, 4, net.input_size)).astype("float32"))
    plain = np.array(given, "float32", order="C")
    kept = copy.deepcopy(given)
    assert np.array_equal(net(given), net(plain))
    assert np.array_equal(given, kept)


@pytest.mark.parametrize("form", [name for name in FORMS if name not in ("bools", "rows a byte too long")])
def test_a_state_may_be_any_array_too(form):
    net, x = small(), np.zeros((6, 2, 3))
    h, c = rng_of(4).integers(-5, 5, size=(2, 3, 2, 4)).astype("float32")
    given = State(*(np.asarray(FORMS[form](array)).reshape(6, 4) for array in (h, c)))
    if form in ("fortran order", "features first"):
        given = State(*(np.asfortranarray(array) for array in given))
    plain = State(*(np.array(array, "float32", order="C") for array in given))
    assert np.array_equal(net.run(x, state=given)[0], net.run(x, state=[plain])[0])


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("seed", range(25))
def test_empty_batches_and_sequences(seed, batch, steps):
    net, rng = make_network(seed), rng_of(seed)
    x = rng.normal(size=(batch, steps, net.input_size))
    state = make_states(rng, net, batch)
    for mask in (None, np.zeros((batch, steps), bool)):
        y, after = net.run(x, state=state, mask=mask)
        expected, _ = by_reference(net, x, state, mask)
        np.testing.assert_allclose(y, expected, atol=1e-4, rtol=1e-5)
        if steps == 0:
            assert all(same(one, other) for one, other in zip(after, state, strict=True))


def test_the_state_of_a_cell_without_c_may_be_h_itself():
    cells = [make_cell(rng_of(n), 3, 4, kind=kind) for n, kind in enumerate(("gru", "rnn"))]
    x, h = rng_of(1).normal(size=(2, 5, 3)), rng_of(2).normal(size=(2, 4)).astype("float32")
    for cell in cells:
        net = Network([Recurrent((cell,))])
        y, after = net.run(x, state=(HiddenState(h),))
        assert isinstance(after[0], HiddenState)
        for state in (HiddenState(h), h, [h], ([h],), ((h.tolist(),),)):
            assert np.array_equal(net.run(x, state=state)[0], y)
    mixed = Network([Recurrent((cells[0], make_cell(rng_of(3), 4, 6)))])
    c = np.ones((2, 6))
    _, (gru, lstm) = mixed.run(x, state=(h, (c, c)))
    assert isinstance(gru, HiddenState)
    assert isinstance(lstm, State)
    assert (gru.shape, lstm.shape) == ((1, 2, 4), (2, 2, 6))


def test_arguments_are_not_changed_and_results_are_not_shared():
    net, rng = small(), rng_of(8)
    x, state = rng.normal(size=(2, 3, 3)).astype("float32"), make_states(rng, small(), 2)
    before = copy.deepcopy((x, state))
    y, after = net.run(x, state=state, mask=np.zeros((2, 3), bool))
    y[:], after[0].h[:], after[0].c[:] = 7, 7, 7
    assert all(np.array_equal(a, b) for a, b in zip((x, *state[0]), (before[0], *before[1][0]), strict=True))
    assert not np.shares_memory(Network([Activation("linear")])(x), x)


def test_weights_are_private_and_read_only():
    kernel = np.ones((3, 2), "float32")
    net = Network([Dense(kernel)])
    kernel[:] = np.nan
    assert (net(np.ones((1, 1, 3))) == 3).all()
    with pytest.raises(ValueError, match="read-only"):
        net.nodes[0].kernel[0] = 1
    with pytest.raises(AttributeError):
        net.nodes = ()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("seed", range(10))
def test_nan_and_infinity_pass_through(bad, seed):
    net = make_network(seed)
    x = rng_of(seed).normal(size=(3, 4, net.input_size))
    y = net(x)
    x[1, 2] = bad
    spoilt = net(x)  # without a warning, which would be an error here
    assert np.array_equal(spoilt[[0, 2]], y[[0, 2]])


def test_nan_weights_are_allowed_and_give_nan():
    cell = make_cell(rng_of(), 3, 4)
    kernel = cell.kernel.copy()
    kernel[0, 0] = np.nan
    y = Network([Recurrent((Cell(cell.spec, **{**cell.arrays, "kernel": kernel}),))])(np.ones((1, 2, 3)))
    assert np.isnan(y[0, 0, 0])
    assert not np.isnan(y[0, 0, 1])


# ── sharing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_threads_share_a_network():
    for seed in range(6):
        net, x = make_network(seed), rng_of(seed).normal(size=(4, 20, make_network(seed).input_size))
        expected, wrong = make_network(seed)(x), []

        def work(net=net, x=x, expected=expected, wrong=wrong):
            wrong.extend(n for n in range(20) if not np.array_equal(net(x), expected))

        threads = [
            threading.Thread(target=work) for _ in range(4)
        ]  # the first use packs the weights, in all threads at once
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_run_alike(clone):
    net = make_network(2)
    x = rng_of(1).normal(size=(2, 5, net.input_size))
    y = net(x)
    other = clone(net)
    assert np.array_equal(other(x), y)
    assert not any(cell.kernel.flags.writeable for cell in other.cells)


def test_a_cell_may_be_in_a_stack_twice():
    cell = make_cell(rng_of(), 4, 4, "float64")
    net, x = Network([Recurrent((cell, cell))]), rng_of(1).normal(size=(2, 5, 4))
    np.testing.assert_allclose(net(x), by_reference(net, x)[0], atol=1e-12)


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────

X = np.zeros((2, 5, 3))
H = np.zeros((2, 4))

CALLS = {
    "rank 2": ({"x": X[0]}, ShapeError, r"x \[B, T, I=3\], got \(5, 3\)"),
    "rank 4": ({"x": X[None]}, ShapeError, r"got \(1, 2, 5, 3\)"),
    "width": ({"x": X[:, :, :2]}, ShapeError, r"I=3\], got \(2, 5, 2\)"),
    "a number": ({"x": 3.0}, ShapeError, r"got \(\)"),
    "ragged": ({"x": [[[1, 2, 3]], [[1]]]}, ShapeError, "unequal length"),
    "complex": ({"x": X.astype(complex)}, TypeError, "real numbers, got complex128"),
    "objects": ({"x": X.astype(object)}, TypeError, "real numbers, got object"),
    "text": ({"x": X.astype(str)}, TypeError, "real numbers, got <U"),
    "dates": ({"x": X.astype("M8[s]")}, TypeError, "real numbers, got datetime64"),
    "nothing": ({"x": None}, TypeError, "real numbers, got object"),
    "masked array": ({"x": np.ma.masked_equal(X, 0)}, TypeError, "pass a plain array and mask="),
    "mask shape": ({"x": X, "mask": np.ones((2, 4), bool)}, ShapeError, r"mask \[B=2, T=5\], got \(2, 4\)"),
    "mask one row": ({"x": X, "mask": np.ones(5, bool)}, ShapeError, r"mask \[B=2, T=5\], got \(5,\)"),
    "mask of floats": ({"x": X, "mask": np.ones((2, 5))}, TypeError, "mask of bool, True = use the step, got float64"),
    "mask of integers": ({"x": X, "mask": np.ones((2, 5), int)}, TypeError, "got int64"),
    "mask ragged": ({"x": X, "mask": [[True], [True, False]]}, ShapeError, "unequal length"),
    "mask and lengths": ({"x": X, "mask": np.ones((2, 5), bool), "lengths": [1, 2]}, TypeError, "got both"),
    "reset shape": ({"x": X, "reset": np.ones((2, 4), bool)}, ShapeError, r"reset \[B=2, T=5\], got \(2, 4\)"),
    "reset of integers": (
        {"x": X, "reset": np.ones((2, 5), int)},
        TypeError,
        "reset of bool, True = a piece begins, got",
    ),
    "lengths shape": ({"x": X, "lengths": [1]}, ShapeError, r"lengths \[B=2\], got \(1,\)"),
    "lengths below": ({"x": X, "lengths": [-1, 5]}, ShapeError, "from 0 to T=5, got -1 to 5"),
    "lengths above": ({"x": X, "lengths": [0, 6]}, ShapeError, "from 0 to T=5, got 0 to 6"),
    "lengths of floats": ({"x": X, "lengths": [1.0, 2.0]}, TypeError, "integers, got float64"),
    "two states": (
        {"x": X, "state": (State(H, H),) * 2},
        ShapeError,
        r"one state per cell \(1\), or as a flat list of 2 arrays, got 2 \(State, State\)",
    ),
    "a state of another kind": ({"x": X, "state": HiddenState(H)}, ShapeError, r"pair \(h, c\), got 1 array"),
    "h alone": ({"x": X, "state": ((H,),)}, ShapeError, r"pair \(h, c\), got 1 array"),
    "an array as state": ({"x": X, "state": np.zeros((2, 2, 4))}, ShapeError, r"pair \(h, c\), got 1 array"),
    "a number as state": ({"x": X, "state": 3}, ShapeError, r"one state per cell \(1\), got int"),
    "a number in a state": ({"x": X, "state": (3,)}, ShapeError, "layer 0 to be arrays h, c, got int"),
    "state batch": (
        {"x": X, "state": (State(H[:1], H[:1]),)},
        ShapeError,
        r"h of state of layer 0 \[B=2, H=4\], got \(1",
    ),
    "state width": ({"x": X, "state": (State(H, H[:, :3]),)}, ShapeError, r"c of state of layer 0 .*got \(2, 3\)"),
    "state complex": ({"x": X, "state": (State(H + 1j, H),)}, TypeError, "state of layer 0 to hold real numbers"),
    "state of numbers": ({"x": X, "state": (1, 2)}, ShapeError, r"one state per cell \(1\), or .*, got 2 \(int, int\)"),
    "no threads": ({"x": X, "threads": 0}, ValueError, "threads to be an integer from 1 to 2147483647, got 0"),
    "half a thread": ({"x": X, "threads": 1.5}, ValueError, "threads to be an integer from 1 to 2147483647, got 1.5"),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_bad_call_says_what_was_expected(case):
    arguments, error, message = CALLS[case]
    with pytest.raises(error, match=message):
        small().run(**arguments)


def one(**flags):
    return Recurrent((make_cell(rng_of(), 3, 4),), **flags)


def back(**flags):
    return one(go_backwards=True, **flags)


F, D = np.ones, lambda *shape: np.ones(shape, "float32")
SPEC = CellSpec(3, 4)

BUILDS = {
    "kernel shape": (lambda: Cell(SPEC, D(3, 12), D(4, 16), D(16)), ShapeError, r"kernel \[3, 16\], got \(3, 12\)"),
    "swapped": (lambda: Cell(SPEC, D(4, 16), D(3, 16), D(16)), ShapeError, r"kernel \[3, 16\], got \(4, 16\)"),
    "bias shape": (lambda: Cell(SPEC, D(3, 16), D(4, 16), D(4)), ShapeError, r"bias \[16\], got \(4,\)"),
    "no bias": (lambda: Cell(SPEC, D(3, 16), D(4, 16)), ShapeError, r"bias \[16\], got none"),
    "one bias of two": (
        lambda: Cell(CellSpec(3, 4, kind="gru"), D(3, 12), D(4, 12), D(12)),
        ShapeError,
        r"bias \[2, 12\], got \(12,\)",
    ),
    "one array more": (
        lambda: Cell(SPEC, D(3, 16), D(4, 16), D(16), D(3, 4)),
        ShapeError,
        "expected 3 arrays, kernel, recurrent_kernel, bias, got 4",
    ),
    "peepholes of none": (
        lambda: Cell(SPEC, D(3, 16), D(4, 16), D(16), peepholes=D(3, 4)),
        ShapeError,
        "expected no peepholes, got one",
    ),
    "an array twice": (
        lambda: Cell(SPEC, D(3, 16), kernel=D(3, 16)),
        TypeError,
        "each of kernel, .* once, got kernel twice",
    ),
    "an unknown array": (lambda: Cell(SPEC, kernle=D(3, 16)), TypeError, "each of kernel, .* once, got kernle"),
    "half floats": (lambda: Cell(SPEC, D(3, 16).astype("f2"), D(4, 16), D(16)), TypeError, "got float16"),
    "integers": (lambda: Dense(np.ones((3, 2), int)), TypeError, "kernel in float32 or float64, got int64"),
    "mixed cell": (
        lambda: Cell(SPEC, D(3, 16), F((4, 16)), D(16)),
        TypeError,
        "recurrent_kernel in float32, .*float64",
    ),
    "not a spec": (lambda: Cell({"units": 4}, D(3, 16), D(4, 16)), TypeError, "CellSpec, got dict"),
    "no cells": (lambda: Recurrent(()), ShapeError, "at least one cell"),
    "no cell": (lambda: Recurrent((SPEC,)), TypeError, "cell 0 to be a Cell, got CellSpec"),
    "stack widths": (lambda: Recurrent(one().cells * 2), ShapeError, "cell 1 with I=4, .*got I=3"),
    "flag": (lambda: one(return_sequences=1), TypeError, "return_sequences to be True or False, got 1"),
    "residual": (lambda: one(residual=None), TypeError, "residual to be True or False, got None"),
    "projected widths": (
        lambda: Recurrent((make_cell(rng_of(), 3, 4, proj_size=2), make_cell(rng_of(), 4, 4))),
        ShapeError,
        "cell 1 with I=2, the width of the output .*got I=4",
    ),
    "stack dtypes": (
        lambda: Recurrent((make_cell(rng_of(), 3, 4), make_cell(rng_of(), 4, 4, "float64"))),
        TypeError,
        "cell 1 in float32, as cell 0 is, got float64",
    ),
    "two forwards": (lambda: Bidirectional(one(), one()), ValueError, "backward with go_backwards=True"),
    "merge": (lambda: Bidirectional(one(), back(), None), ValueError, "merge_mode to be one of concat"),
    "halves": (
        lambda: Bidirectional(one(), back(return_sequences=False)),
        ValueError,
        "return_sequences to be the same",
    ),
    "one direction": (lambda: Bidirectional(one(), None), TypeError, "backward to be a Recurrent, got NoneType"),
    "merged widths": (
        lambda: Bidirectional(one(), Recurrent((make_cell(rng_of(), 3, 5),), go_backwards=True), "sum"),
        ShapeError,
        "H=4 to sum, got H=5",
    ),
    "scale": (lambda: Standardise(F(3), F(2)), ShapeError, r"scale \[3\], got \(2,\)"),
    "no scale": (lambda: Standardise(F(3), np.array([1.0, 0.0, 1.0])), ValueError, "got 0 for feature 1"),
    "dense": (lambda: Dense(D(3)), ShapeError, r"kernel \[I, O\], got \(3,\)"),
    "dense of nothing": (lambda: Dense(D(0, 3)), ShapeError, r"kernel \[I, O\], got \(0, 3\)"),
    "dense bias": (lambda: Dense(D(3, 2), D(3)), ShapeError, r"bias \[2\], got \(3,\)"),
    "activation": (
        lambda: Activation("swish"),
        ValueError,
        "Activation: activation: expected .* sigmoid, .*got 'swish'",
    ),
    "activation list": (lambda: Activation([]), ValueError, "Activation: activation: "),
    "parameters": (lambda: Activation("elu(1, 2)"), ValueError, "expected elu with 1 finite parameters or without"),
    "dense activation": (lambda: Dense(D(3, 2), None, None), ValueError, "Dense: activation: expected .*got None"),
    "pool": (lambda: GlobalPool("median"), ValueError, "mode to be one of mean, max, last, final, got 'median'"),
    "no nodes": (lambda: Network([]), ShapeError, "at least one node"),
    "not a node": (lambda: Network([one(), "relu"]), TypeError, "node 1 to be a node, got str"),
    "nodes that don't match": (lambda: Network([one(), Dense(D(5, 2))]), ShapeError, "layer_1: .*5 features, got 4"),
    "past an activation": (
        lambda: Network([one(), Activation("relu"), Dense(D(5, 2))]),
        ShapeError,
        "layer_2: .*5 features, got 4",
    ),
    "time gone": (
        lambda: Network([one(return_sequences=False), GlobalPool()]),
        ShapeError,
        "layer_1: GlobalPool expected a seq",
    ),
    "time gone again": (lambda: Network([GlobalPool(), one()]), ShapeError, "layer_1: Recurrent expected a sequence"),
    "dtypes": (lambda: Network([one(), Dense(F((4, 2)))]), TypeError, "layer_1 in float32, .*got float64"),
    "names": (lambda: Network([one()], ["a", "b"]), ValueError, "1 different names, one per node"),
    "equal names": (lambda: Network([one(), GlobalPool()], ["a", "a"]), ValueError, "2 different names"),
    "slash": (lambda: Network([one()], ["a/b"]), ValueError, "without '/', got 'a/b'"),
    "unprintable": (lambda: Network([one()], ["a\ud800"]), ValueError, "printable"),
    "metadata": (lambda: Network([one()], metadata={"a": np.ones(2)}), TypeError, "JSON can hold"),
    "metadata nan": (lambda: Network([one()], metadata={"a": float("nan")}), TypeError, "JSON can hold"),
    "metadata keys": (lambda: Network([one()], metadata={1: 2}), TypeError, "strings as keys"),
}


@pytest.mark.parametrize("case", BUILDS)
def test_a_bad_network_is_refused_where_it_is_built(case):
    build, error, message = BUILDS[case]
    with pytest.raises(error, match=message):
        build()


# ── descriptions ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(30))
def test_cells_in_separate_nodes_run_like_a_stack(seed, monkeypatch):
    rng = rng_of(seed)
    width, ways = int(rng.integers(1, 9)), {"go_backwards": bool(rng.integers(2))}
    ends = {"return_sequences": bool(rng.integers(2)), "zero_output_for_mask": bool(rng.integers(2))}
    cells = make_stack(rng, width).cells
    cells = (*cells, fill(rng, CellSpec(cells[-1].spec.output_size, 4, kind=of_seed(seed))))
    first, *middle, last = cells
    nodes = [Recurrent((first,), **ways), *(Recurrent((cell,)) for cell in middle), Recurrent((last,), **ends)]
    apart, stack = Network(nodes), Network([Recurrent(cells, **ways, **ends)])
    batch, steps = int(rng.integers(1, 5)), int(rng.integers(0, 9))
    x = rng.normal(size=(batch, steps, width)).astype("f4")
    given = {"state": make_states(rng, stack, batch) if seed % 2 else None, "threads": 1 + seed % 2}
    if seed % 3:
        given |= {"mask": rng.random((batch, steps)) < 0.7, "reset": rng.random((batch, steps)) < 0.2}
    calls, records = [], (Recording(), Recording())
    forward = native.forward_each
    monkeypatch.setattr(native, "forward_each", lambda *arguments: (calls.append(1), forward(*arguments)))
    y, after = apart.run(x, **given, record=records[0])
    assert len(calls) == 1
    expected_y, expected_after = stack.run(x, **given, record=records[1])
    assert np.array_equal(y, expected_y)
    assert all(map(same, after, expected_after))
    for one, other in zip(*records, strict=True):
        assert same((one.gates, *one.states, one.x), (other.gates, *other.states, other.x))
        assert same(one.before or (), other.before or ())
    assert all("in the call of layer_0" in line for line in apart.plan()[1 : len(cells)])


def test_cells_run_separately_if_the_value_between_them_is_used():
    rng = rng_of()
    cells = [make_cell(rng, 3, 4), make_cell(rng, 4, 4)]
    nodes = [Recurrent((cell,)) for cell in cells]
    y, between = Network(nodes, ["a", "b"], outputs=["b", "a"])(np.ones((2, 5, 3)))
    assert np.array_equal(between, Network(nodes[:1])(np.ones((2, 5, 3))))
    assert np.array_equal(y, Network(nodes)(np.ones((2, 5, 3))))
    mask = np.arange(5) < np.array([[5], [2]])
    zeros = [replace(nodes[0], zero_output_for_mask=True), nodes[1]]
    assert np.array_equal(Network(zeros)(np.ones((2, 5, 3)), mask), Network(nodes)(np.ones((2, 5, 3)), mask))
    twice = Network([nodes[0], replace(nodes[1], go_backwards=True)])(np.ones((2, 5, 3)))
    assert not np.array_equal(twice, y)


def test_plan_and_repr_name_every_node():
    net = Network(
        [
            one(),
            Bidirectional(
                Recurrent((make_cell(rng_of(), 4, 5),)), Recurrent((make_cell(rng_of(), 4, 5),), go_backwards=True)
            ),
            GlobalPool("max"),
            Dense(D(10, 2)),
        ],
        ["a", "b", "c", "d"],
    )
    from cellstack import _kernel

    plan = net.plan()
    assert [line.split()[0] for line in plan[:-1]] == ["a", "b", "c", "d"]
    assert all("fused kernel" in line and _kernel.isa() in line for line in (*plan[:2], plan[3]))
    assert "NumPy" in plan[2]
    assert repr(plan) == "\n".join(plan)
    assert repr(net).splitlines()[0] == "Network of float32: [B, T, 3] -> [B, 2], 548 numbers"
    assert "[B, T, 10]" in repr(net)
    assert [cell.spec.units for cell in net.cells] == [4, 5, 5]
    assert "one call, one call back, merged in NumPy" in plan[1]
    stack = make_stack(rng_of(), 3)
    assert "fused kernel" in Network([stack]).plan()[0]
    deep = Network([Recurrent(tuple(make_cell(rng_of(), 3, 3) for _ in range(3)), residual=True)])
    assert "3 calls, NumPy's sums between them, for the stack of 3 cells" in deep.plan()[0]


SUMMARIES = {
    "LSTM 3 -> 4 -> 5": [(3, 4, {}), (4, 5, {})],
    "LSTM 3 -> 4, GRU -> 5": [(3, 4, {}), (4, 5, {"kind": "gru"})],
    "LSTM 3 -> 4 (peepholes, clip 5.0)": [(3, 4, {"peepholes": True, "clip": 5.0})],
    "GRU 3 -> 4 (no bias, no reset after), GRU -> 2": [
        (3, 4, {"kind": "gru", "use_bias": False, "reset_after": False}),
        (4, 2, {"kind": "gru"}),
    ],
    "SimpleRNN 3 -> 4 (activation relu, learn initial state)": [
        (3, 4, {"kind": "rnn", "activation": "relu", "learn_initial_state": True})
    ],
    "LSTM 3 -> 2 (o hard_sigmoid, projected from 4)": [
        (3, 4, {"proj_size": 2, "gate_activations": {"o": "hard_sigmoid"}})
    ],
}


@pytest.mark.parametrize("summary", SUMMARIES)
def test_a_summary_shows_settings_that_differ_from_the_defaults(summary):
    cells = tuple(make_cell(rng_of(), i, h, **flags) for i, h, flags in SUMMARIES[summary])
    assert Recurrent(cells).summary == summary
    if len(cells) == 1:
        assert repr(cells[0]) == f"Cell of float32: {summary}"


def test_the_summary_is_a_table_with_totals_and_says_what_can_be_streamed(capsys):
    net = small()
    net.summary()
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  layer    kind       computes     output shape  parameters",
        f"  layer_0  Recurrent  LSTM 3 -> 4  [B, T, 4]     {net.nodes[0].parameters:>10}",
        f"total: {net.nodes[0].parameters} parameters, {net.nodes[0].parameters * 4} bytes",
        "can be streamed",
    ]
    rng, lines = rng_of(), []
    nodes = [Recurrent((make_cell(rng, 300, 400),)), Recurrent((make_cell(rng, 400, 2),), go_backwards=True)]
    wires = [["x"], ["layer_0"], ["layer_0", "layer_1"]]
    graph = Network([*nodes, Merge("concat")], wires=wires, outputs=["layer_2"]).with_weights("bfloat16")
    graph.summary(print_fn=lines.append)
    (text,) = lines
    head, headings, *rows, total, streams = text.splitlines()
    assert head.startswith("Network of float32: [B, T, 300] -> [B, T, 402]")
    assert all(len(line) == len(headings) for line in rows)  # the numbers are aligned with their heading
    assert headings.index("inputs") == rows[2].index("of layer_0, layer_1")
    bias = sum(cell.stored_arrays["bias"].nbytes for cell in graph.cells)
    matrices = sum(cell.spec.parameters for cell in graph.cells) - bias // 4
    assert total == f"total: {matrices + bias // 4:,} parameters, {2 * matrices + bias:,} bytes"
    assert streams.startswith("can't be streamed: layer_1 can't run step by step: it runs backwards")


def test_activations_take_parameters():
    x = np.arange(-3.0, 4.0).reshape(1, 1, 7)
    expected = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
    np.testing.assert_allclose(Network([Activation("hard_sigmoid(0.2, 0.5)")])(x)[0, 0], expected, atol=1e-7)
    assert Activation("hard_sigmoid( .2,0.5 )").summary == "hard_sigmoid(0.2, 0.5)"
    assert Dense(D(3, 2), None, "leaky_relu(0.2)").activation == "leaky_relu"
    y = Network([Dense(D(1, 1), None, "leaky_relu(0.5)")])(np.array([[[-2.0], [2.0]]]))
    assert y.dtype == np.float32
    assert y.tolist() == [[[-1.0], [2.0]]]


@pytest.mark.parametrize("seed", range(30))
def test_a_cell_has_the_arrays_of_its_spec(seed):
    made = fill(rng_of(seed), random_spec(rng_of(seed)))
    by_place, by_name = Cell(made.spec, *made.arrays.values()), Cell(made.spec, **made.arrays)
    some = dict(list(made.arrays.items())[2:])
    mixed = Cell(made.spec, *list(made.arrays.values())[:2], **some)
    for cell in (by_place, by_name, mixed, pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert list(cell.arrays) == list(made.spec.shapes)
        for name, array in cell.arrays.items():
            assert np.array_equal(array, made.arrays[name])
            assert array is not made.arrays[name]
            assert not array.flags.writeable
    assert all(getattr(made, name) is None for name in set(ARRAYS) - set(made.spec.shapes))
    for name in made.spec.shapes:
        with pytest.raises(ShapeError, match=rf"Cell: expected {name} \[.*got none"):
            Cell(made.spec, **{**made.arrays, name: None})


def test_metadata_is_a_private_copy():
    labels = ["a", "b"]
    net = Network([one()], metadata={"labels": labels, "shape": (1, 2)})
    labels.append("c")
    assert net.metadata == {"labels": ["a", "b"], "shape": [1, 2]}


def test_a_network_writes_itself_as_c(tmp_path):
    header, source = small().export_c(tmp_path / "new", "lstm")
    assert (header.name, source.name) == ("lstm.h", "lstm.c")
    assert "lstm_step" in header.read_text()
    graph = Network([one(), Merge("concat")], ["lstm", "both"], wires=[("x",), ("lstm", "x")], inputs=("x",))
    with pytest.raises(ValueError, match="both"):
        graph.export_c(tmp_path)


def recorded(net, x, **given):
    """Return y, the states and the recording of a run, and check that a run without recording gives the same bits."""
    record = Recording()
    y, state = net.run(x, **given, record=record)
    plain_y, plain_state = net.run(x, **given)
    np.testing.assert_array_equal(y, plain_y)
    assert all(same(*pair) for pair in zip(state, plain_state, strict=True))
    assert len(record) == len(net.cells)
    return y, state, record


def assert_matches_reference(cell, x, got, dtype, **given):
    arrays = {name: array.astype(np.float64) for name, array in cell.arrays.items()}
    expected = reference.forward(cell.spec, arrays, x.astype(np.float64), **given)
    exact = expected.gates, expected.y, *expected.states
    for array, wanted in zip((got.gates, *got.states), exact, strict=True):
        assert array.dtype == dtype
        np.testing.assert_allclose(
            array, wanted, atol=tolerances.KERNEL[dtype] * max(1.0, np.abs(wanted).max()), rtol=0
        )
        assert array.shape == wanted.shape


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pairs.seeds(20, 40)
@pytest.mark.parametrize("return_sequences", [True, False])
def test_a_record_has_gates_and_states_of_every_cell_at_every_step(seed, dtype, return_sequences):
    rng = rng_of(seed)
    forward = make_stack(rng, 3, dtype, return_sequences=return_sequences)
    backward = make_stack(rng, 3, dtype, return_sequences=return_sequences, go_backwards=True)
    x, mask = rng.normal(size=(4, 7, 3)).astype(dtype), rng.random((4, 7)) < 0.7
    _, _, ahead = recorded(Network([replace(forward, zero_output_for_mask=True)]), x, mask=mask)
    _, _, back = recorded(Network([backward]), x, mask=mask)
    for stack, record in ((forward, ahead), (backward, back)):
        below = x
        for cell, got in zip(stack.cells, record, strict=True):
            assert_matches_reference(cell, below, got, dtype, mask=mask, reverse=stack.go_backwards)
            below = got.states.h
    _, _, both = recorded(Network([Bidirectional(forward, backward)]), x, mask=mask)
    for one, other in zip(both, (*ahead, *back), strict=True):
        fields = [(record.gates, *record.states, record.x) for record in (one, other)]
        assert all(np.array_equal(*pair) for pair in zip(*fields, strict=True))


def test_a_record_has_h_before_residual_and_masking():
    rng = rng_of(3)
    cells = tuple(make_cell(rng, 4, 4) for _ in range(3))
    x, mask = rng.normal(size=(2, 5, 4)).astype("float32"), np.arange(5) < [[3], [5]]
    net = Network([Recurrent(cells, residual=True, zero_output_for_mask=True)])
    y, _, record = recorded(net, x)
    np.testing.assert_array_equal(y, (record[0].states.h + record[1].states.h) + record[2].states.h)
    _, state, record = recorded(net, x, mask=mask)
    for got, after in zip(record, state, strict=True):
        np.testing.assert_array_equal(got.states.h[:, -1], after.h)
        np.testing.assert_array_equal(got.states.c[:, -1], after.c)
        assert (got.gates[0, 3:] == 0).all()
