"""The reference, compared with finite differences, numbers worked by hand, and a second version of the equations."""

import math

import numpy as np
import pairs
import pytest
from family import POSITIVE, learned, random_arrays, random_case, random_spec, random_state
from kinds import TESTED, named, of_seed
from rows import SCALARS

from cellstack import reference
from cellstack.cells import KINDS
from cellstack.cells.activations import ACTIVATIONS, OF_BACKBONES, activation
from cellstack.cells.spec import GATES, STATES, CellSpec

ln = math.log

ROUNDING = 1e-12  # float64 on both sides, different summation order
STEP = 1e-6
DIFFERENCES = 2e-7  # central differences in float64: rounding over the step (1e-10) and STEP² times third derivatives
DIRECTIONS = 4  # per array


def results(out):
    """Return all differentiable results of a forward pass, by name."""
    every = {f"every {name}": a for name, a in zip(out.state._fields[1:], out.states, strict=True)}
    return {"y": out.y, "gates": out.gates, **every, **out.state._asdict()}


def check_gradients(rng, spec, arrays, case):
    """Compare `backward` with central differences of a random linear function of all results of `forward`.

    They are taken along random directions of each array, in which every entry has a part: a wrong one shows in all.
    """
    out = reference.forward(spec, arrays, **case)
    weights = {name: rng.standard_normal(a.shape) for name, a in results(out).items()}
    weights["gates"][:, :, len(GATES[spec.kind]) :] = 0.0  # q_g of a GRU, l of an sLSTM
    given = {"dy": weights["y"], "dgates": weights["gates"]}
    given["dstates"] = [a for name, a in weights.items() if name.startswith("every ")]
    got = reference.backward(spec, arrays, out, dstate=[weights[name] for name in spec.state_sizes], **given)

    def loss():
        again = results(reference.forward(spec, arrays, **case))
        return sum((weights[name] * a).sum() for name, a in again.items())

    pairs = [("x", case["x"], got.x), *((name, arrays[name], got.arrays[name]) for name in spec.shapes)]
    if case.get("state") is not None:
        pairs += list(zip(spec.state_sizes, case["state"], got.state, strict=True))
    for name, array, gradient in pairs:
        assert gradient.shape == array.shape, name
        kept = array.copy()
        # n is 0: nothing is stored, and at another n, the result would be a different one
        fixed = (kept == 0.0) & (name == "n")
        assert (gradient[fixed] == 0.0).all(), f"{name} of {spec}"
        for _ in range(DIRECTIONS):
            way = np.where(fixed, 0.0, rng.standard_normal(array.shape))
            way /= np.linalg.norm(way) or 1.0
            array[...] = kept + STEP * way
            above = loss()
            array[...] = kept - STEP * way
            expected = (above - loss()) / (2 * STEP)
            array[...] = kept
            scale = max(1.0, abs(expected), np.abs(gradient).max(initial=0.0))
            assert abs((gradient * way).sum() - expected) <= DIFFERENCES * scale, f"{name} of {spec}"


@pytest.mark.parametrize("flags", named("flags").values(), ids=named("flags"))
def test_gradients_of_every_flag_alone(rng, flags):
    spec = CellSpec(2, 3, **flags)
    case = {"x": rng.standard_normal((2, 3, 2)), "state": random_state(rng, spec, 2)}
    check_gradients(rng, spec, random_arrays(rng, spec), case)


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("argument", ["mask", "reset", "recurrent_dropout", "zoneout", "reverse", "state"])
def test_gradients_of_every_argument_alone(rng, kind, argument):
    spec = CellSpec(2, 3, kind=kind, **learned(kind))
    case = {"x": rng.standard_normal((2, 4, 2)), "state": random_state(rng, spec, 2)}
    case |= {
        "mask": {"mask": np.array([[True, False, True, True], [False, True, False, False]])},
        "reset": {"reset": np.array([[False, False, True, False], [True, False, False, True]])},
        "recurrent_dropout": {"recurrent_dropout": 2.0 * (rng.random((2, 3)) < 0.5)},
        "zoneout": {"zoneout": (rng.random((2, 4, 3)) < 0.4) * 1.0},
        "reverse": {"reverse": True},
        "state": {"state": None},
    }[argument]
    if argument == "zoneout" and kind == "lstm":
        case["zoneout_cell"] = (rng.random((2, 4, 3)) < 0.4) * 1.0
    check_gradients(rng, spec, random_arrays(rng, spec), case)


@pairs.parametrize("kind, name", list(STATES), ACTIVATIONS, unpaired=[0])
def test_gradients_of_every_activation_in_every_place(rng, kind, name):
    gates = name if name in POSITIVE or not TESTED[kind].positive else "sigmoid"
    gates = {"recurrent_activation": gates} if KINDS[kind].gated else {}
    spec = CellSpec(2, 2, kind=kind, activation=name, **gates)
    case = {"x": rng.standard_normal((2, 2, 2)), "state": random_state(rng, spec, 2)}
    check_gradients(rng, spec, random_arrays(rng, spec), case)


@pairs.seeds(24, 60)
def test_gradients_of_products_of_flags(seed):
    rng = np.random.default_rng(seed)
    spec = random_spec(rng, of_seed(seed), largest=4)
    check_gradients(rng, spec, random_arrays(rng, spec), random_case(rng, spec, batch=2, steps=3))


# ── a second version of the equations: one row, plain Python numbers, entry by entry ────────────────────────────────


def by_rows(spec, w, x, state, mask, reset, recurrent_dropout, zoneout, zoneout_cell, reverse):
    """Return the results of `reference.forward`, by name."""
    B, T, _ = x.shape
    sizes = tuple(spec.state_sizes.items())
    found = {name: np.zeros((B, T, size)) for name, size in sizes}
    gates = np.zeros((B, T, spec.planes, spec.units))
    last = {name: np.zeros((B, size)) for name, size in sizes}
    rates = {name: (rate, None) for name, rate in spec.zoneout_rates.items()}
    rates |= {"h": (spec.zoneout, zoneout), "c": (spec.zoneout_cell, zoneout_cell)}
    for b in range(B):
        fresh = [w[f"initial_{name}"] if spec.learn_initial_state else np.zeros(size) for name, size in sizes]
        now = fresh if state is None else [a[b] for a in state]
        for t in reversed(range(T)) if reverse else range(T):
            if reset is not None and reset[b, t]:
                now = fresh
            if mask is None or mask[b, t]:
                h_in = now[0] if recurrent_dropout is None else now[0] * recurrent_dropout[b]
                if spec.of_kind.drops == "candidate":  # the mask itself
                    h_in = [1.0] * spec.units if recurrent_dropout is None else recurrent_dropout[b]
                new, gates[b, t] = TESTED[spec.kind].row(spec, w, x[b, t], h_in, now)
                now = [list(a) for a in now]
                for a, a_new, (name, size) in zip(now, new, sizes, strict=True):
                    rate, drawn = rates[name]
                    for n in range(size):
                        k = rate if drawn is None else drawn[b, t, n]
                        a[n] = k * a[n] + (1.0 - k) * a_new[n]
            for name, a in zip(found, now, strict=True):
                found[name][b, t] = a
        for name, a in zip(last, now, strict=True):
            last[name][b] = a
    every = {f"every {name}": a for name, a in found.items() if name != "h"}
    return {"y": found["h"], "gates": gates, **every, **last}


@pytest.mark.parametrize("seed", range(150))
def test_products_of_flags_match_the_second_version(seed):
    rng = np.random.default_rng(seed)
    spec = random_spec(rng, of_seed(seed))
    arrays, case = random_arrays(rng, spec), random_case(rng, spec)
    got, expected = results(reference.forward(spec, arrays, **case)), by_rows(spec, arrays, **case)
    assert list(got) == list(expected)
    for name, array in got.items():
        scale = max(1.0, np.abs(expected[name]).max(initial=0.0))
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=ROUNDING * scale, err_msg=f"{name} of {spec}")


@pytest.mark.parametrize("flags", named("flags").values(), ids=named("flags"))
def test_every_flag_alone_matches_the_second_version(rng, flags):
    spec = CellSpec(3, 5, **flags)
    arrays = random_arrays(rng, spec)
    case = dict.fromkeys(("mask", "reset", "recurrent_dropout", "zoneout", "zoneout_cell"))
    case |= {"x": 2.0 * rng.standard_normal((2, 4, 3)), "state": random_state(rng, spec, 2), "reverse": False}
    got, expected = results(reference.forward(spec, arrays, **case)), by_rows(spec, arrays, **case)
    for name, array in got.items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=ROUNDING, err_msg=name)


# ── numbers worked by hand ──────────────────────────────────────────────────────────────────────────────────────────
# σ(ln 3) = 3/4, σ(ln 9) = 9/10, σ(0) = 1/2; tanh(ln 2) = 3/5, tanh(ln 3) = 4/5


def one_step(spec, arrays, x, *state):
    arrays = {name: np.array(a, float) for name, a in arrays.items()}
    return reference.forward(spec, arrays, np.array([[x]], float), [np.array([a], float) for a in state])


def test_an_lstm_step_by_hand():
    # c = 1/2·c_prev + 3/4·3/5 = ln 2, with c_prev = 2·(ln 2 - 9/20); h = 9/10·tanh(ln 2) = 27/50
    arrays = {"kernel": [[ln(3), 0, ln(2), 0]], "recurrent_kernel": [[0, 0, 0, ln(9)]], "bias": [0, 0, 0, 0]}
    out = one_step(CellSpec(1, 1), arrays, [1], [1], [2 * (ln(2) - 0.45)])
    np.testing.assert_allclose(out.gates[0, 0, :, 0], [0.75, 0.5, 0.6, 0.9], rtol=1e-15)
    np.testing.assert_allclose(
        [*out.state.c[0], *out.state.h[0], *out.y[0, 0], *out.states[0][0, 0]], [ln(2), 0.54, 0.54, ln(2)]
    )


@pytest.mark.parametrize(
    ("flags", "arrays", "gates", "h", "c"),
    [
        # z = (1, 3, 2, 4)·1 + (0, 1, 1, 0)·2 + (1, 0, 0, 1) = 2, 5, 4, 5; c = 5·3 + 2·4 = 23; h = 5·23
        ({}, {}, [2, 5, 4, 5], [115], 23),
        # i = 2 + 1·3 = 5, f = 5 - 2·3 = -1; c = -1·3 + 5·4 = 17; o = 5 + 3·17 = 56; h = 56·17
        ({"peepholes": True}, {"peepholes": [[1], [-2], [3]]}, [5, -1, 4, 56], [952], 17),
        # the same, with o = 5 + 3·7 from c clipped to 7
        ({"peepholes": True, "cell_clip": 7.0}, {"peepholes": [[1], [-2], [3]]}, [5, -1, 4, 26], [182], 7),
        # z clipped to 3 is 2, 3, 3, 3; c = 3·3 + 2·3 = 15; h = 3·15
        ({"clip": 3.0}, {}, [2, 3, 3, 3], [45], 15),
    ],
)
def test_an_lstm_s_flags_by_hand(flags, arrays, gates, h, c):
    plain = {"kernel": [[1, 3, 2, 4]], "recurrent_kernel": [[0, 1, 1, 0]], "bias": [1, 0, 0, 1]}
    spec = CellSpec(1, 1, activation="linear", recurrent_activation="linear", **flags)
    out = one_step(spec, plain | arrays, [1], [2], [3])
    assert out.gates[0, 0, :, 0].tolist() == gates
    assert (out.state.h[0].tolist(), out.state.c[0].tolist()) == (h, [c])


def test_coupled_gates_and_a_projection_by_hand():
    # i = 2 + p_i·c_prev = 3·1 + 1·1 - 2·1 = 2 and -1·1 + 0 - 0 = -1; f = 1 - i = -1, 2
    # c = -1·1 + 2·3, 2·0 + -1·1 = 5, -1; o = 1·1 + 4·5, 2·1 = 21, 2; m = 105, -2; h = 105·1 - 2·2
    spec = CellSpec(1, 2, activation="linear", recurrent_activation="linear", coupled=True, peepholes=True, proj_size=1)
    arrays = {
        "kernel": [[3, -1, 3, 1, 1, 2]],
        "recurrent_kernel": [[1, 0, 0, 0, 0, 0]],
        "bias": [0, 0, 0, 0, 0, 0],
        "peepholes": [[-2, 7], [4, 0]],
        "projection": [[1], [2]],
    }
    out = one_step(spec, arrays, [1], [1], [1, 0])
    assert out.gates[0, 0].tolist() == [[2, -1], [-1, 2], [3, 1], [21, 2]]
    assert out.state.c.tolist() == [[5, -1]]
    assert out.state.h.tolist() == [[101]]


def test_a_gru_step_by_hand():
    # z = σ(ln 3), r = σ(0); g = tanh(0 + 1/2·(2·ln 2 + 2·ln(3/2))) = tanh(ln 3); h = 3/4·1 + 1/4·4/5 = 19/20
    arrays = {
        "kernel": [[ln(3), 0, 0]],
        "recurrent_kernel": [[0, 0, 2 * ln(2)]],
        "bias": [[0, 0, 0], [0, 0, 2 * ln(1.5)]],
    }
    out = one_step(CellSpec(1, 1, kind="gru"), arrays, [1], [1])
    np.testing.assert_allclose(out.gates[0, 0, :, 0], [0.75, 0.5, 0.8, 2 * ln(3)], rtol=1e-15)
    np.testing.assert_allclose(out.state.h, [[0.95]], rtol=1e-15)


@pytest.mark.parametrize(
    ("reset_after", "g"), [(True, [1 * 3, 2 * 7]), (False, [1 * 1 + 2 * 2 * 1, 1 * 3 + 2 * 2 * 2])]
)
def test_where_a_gru_s_reset_acts_by_hand(reset_after, g):
    # r = 1, 2; h_prev = 1, 2; recurrent_kernel_g = [[1, 3], [1, 2]], so h_prev·recurrent_kernel_g = 3, 7; z = 0
    U = [[0, 0, 0, 0, 1, 3], [0, 0, 0, 0, 1, 2]]
    spec = CellSpec(
        1, 2, kind="gru", activation="linear", recurrent_activation="linear", use_bias=False, reset_after=reset_after
    )
    out = one_step(spec, {"kernel": [[0, 0, 1, 2, 0, 0]], "recurrent_kernel": U}, [1], [1, 2])
    assert out.state.h.tolist() == [g]


def test_a_simple_rnn_s_step_by_hand():
    # tanh(2·(ln 3)/2 - 1·ln 3 + ln 2) = tanh(ln 2)
    arrays = {"kernel": [[ln(3) / 2]], "recurrent_kernel": [[-ln(3)]], "bias": [ln(2)]}
    out = one_step(CellSpec(1, 1, kind="rnn"), arrays, [2], [1])
    np.testing.assert_allclose([out.state.h.item(), out.gates.item()], [0.6, 0.6], rtol=1e-15)


@pytest.mark.parametrize(
    ("flags", "x", "t", "h"),
    [
        # g = tanh(ln 2) = 3/5, k = tanh(ln 3) = 4/5, s = ln 3; t = σ(ln 3 + ln 3·τ): σ(ln 9) = 9/10 for τ = 1, the only
        # one without timespans, σ(0) = 1/2 for τ = -1; h = (1 - t)·3/5 + t·4/5, or 3/5 + t·4/5
        ({}, [1], 0.9, 0.1 * 0.6 + 0.9 * 0.8),
        ({"timespans": True}, [1, 1], 0.9, 0.1 * 0.6 + 0.9 * 0.8),
        ({"timespans": True}, [1, 0], 0.75, 0.25 * 0.6 + 0.75 * 0.8),
        ({"timespans": True, "mode": "no_gate"}, [1, -1], 0.5, 0.6 + 0.5 * 0.8),
    ],
)
def test_a_cfc_s_step_by_hand(flags, x, t, h):
    arrays = {"kernel": [[0, ln(3), ln(3), 0]], "recurrent_kernel": [[ln(2) / 2, 0, 0, 0]], "bias": [0, 0, 0, ln(3)]}
    out = one_step(CellSpec(len(x), 1, kind="cfc", **flags), arrays, x, [2])
    np.testing.assert_allclose(out.gates[0, 0, :, 0], [0.6, 0.8, ln(3), t], rtol=1e-14)
    np.testing.assert_allclose(out.state.h.item(), h, rtol=1e-14)


@pytest.mark.parametrize(("time", "h"), [(1, 1.5), (2, 1.75), (0, 1), (-1, 0)])
def test_a_cfs_s_step_by_hand(time, h):
    # g = 1/4·1 + 1/8·2 = 1/2, at a rate of ln 2: h = 2·(1 - 1/2·2^-τ)
    arrays = {"kernel": [[0.25]], "recurrent_kernel": [[0.125]], "bias": [0], "decay": [0.5 - ln(2)], "limit": [2]}
    out = one_step(CellSpec(2, 1, kind="cfs", timespans=True), arrays, [1, time], [2])
    np.testing.assert_allclose(out.gates.item(), 0.5)
    np.testing.assert_allclose(out.state.h.item(), h, rtol=1e-14, atol=1e-15)


def test_a_light_gru_s_step_by_hand():
    # z = σ(ln 3) = 3/4, g = relu(2·3 - 1·2) = 4, dropped to 2·4; h = 3/4·2 + 1/4·8
    arrays = {"kernel": [[ln(3) / 3, 2]], "recurrent_kernel": [[0, -1]], "bias": [0, 0]}
    arrays = {name: np.array(a, float) for name, a in arrays.items()}
    case = np.array([[[3.0]]]), [np.array([[2.0]])]
    out = reference.forward(CellSpec(1, 1, kind="ligru"), arrays, *case, recurrent_dropout=np.array([[2.0]]))
    np.testing.assert_allclose(out.gates.ravel(), [0.75, 4])
    np.testing.assert_allclose(out.y, 3.5)


def test_an_attention_by_hand():
    # z = σ(ln 3) = 3/4, g = tanh(ln 2) = 3/5, attention 1/2: h = (1 - 1/2·1/4)·2 + 1/2·1/4·3/5
    arrays = {"kernel": [[ln(3), 0, ln(2)]], "recurrent_kernel": [[0, 0, 0]], "bias": [[0, 0, 0], [0, 0, 0]]}
    out = one_step(CellSpec(2, 1, kind="gru", attention=True), arrays, [1, 0.5], [2])
    np.testing.assert_allclose(out.state.h, 1.825)
    # with z = 0 the attention is the share of g itself: 1/2·2 + 1/2·3/5
    alone = CellSpec(2, 1, kind="gru", attention=True, gate_activations={"z": "affine(0.0, 0.0)"})
    np.testing.assert_allclose(one_step(alone, arrays, [1, 0.5], [2]).state.h, 1.3)


def test_joint_layer_normalisation_by_hand():
    # LN(1 + 0, 3 + 4) = (-3, 3)/sqrt(9 + 7) = (-3/4, 3/4), times 4, 8, plus 0, 10
    spec = CellSpec(1, 2, kind="rnn", activation="linear", layer_norm="joint", norm_epsilon=7.0)
    arrays = {"kernel": [[1, 3]], "recurrent_kernel": [[0, 1], [0, 1]], "bias": [0, 10], "kernel_gain": [4, 8]}
    assert one_step(spec, arrays, [1], [1, 3]).state.h.tolist() == [[-3, 16]]


def test_joint_layer_normalisation_keeps_the_normalised_cell_state():
    # all gates are 1: c = LN(2 + 1, 8 + 1) = (-3, 3)/sqrt(9 + 7), times 4, plus 1; h = c
    spec = CellSpec(1, 2, "linear", "linear", layer_norm="joint", norm_epsilon=7.0)
    arrays = {"kernel": [[0] * 8], "recurrent_kernel": [[0] * 8] * 2, "bias": [1] * 8, "kernel_gain": [5] * 8}
    arrays |= {"cell_gain": [4, 4], "cell_bias": [1, 1]}
    out = one_step(spec, arrays, [1], [0, 0], [2, 8])
    assert out.state.c.tolist() == out.state.h.tolist() == [[-2, 4]]


def test_layer_normalisation_by_hand():
    # g of a SimpleRNN: LN(1, 3) = (-1, 1)/sqrt(1 + 3) = (-1/2, 1/2), times 2, 4; LN(0, 0) = 0
    spec = CellSpec(1, 2, kind="rnn", activation="linear", layer_norm=True, norm_epsilon=3.0)
    arrays = {
        "kernel": [[1, 3]],
        "recurrent_kernel": [[1, 1], [1, 1]],
        "bias": [0, 10],
        "kernel_gain": [2, 4],
        "recurrent_gain": [5, 5],
    }
    assert one_step(spec, arrays, [1], [0, 0]).state.h.tolist() == [[-1, 12]]


def test_zoneout_by_hand():
    # h_new = x, so the rate 1/4 gives 1/4·8 + 3/4·4 = 5, then 1/4·5 + 3/4·1 = 2; a drawn mask keeps or replaces
    spec = CellSpec(1, 1, kind="rnn", activation="linear", use_bias=False, zoneout=0.25)
    arrays = {"kernel": np.ones((1, 1)), "recurrent_kernel": np.zeros((1, 1))}
    x, state = np.array([[[4.0], [1.0]]]), [np.array([[8.0]])]
    assert reference.forward(spec, arrays, x, state).y.ravel().tolist() == [5, 2]
    kept = np.array([[[1.0], [0.0]]])
    assert reference.forward(spec, arrays, x, state, zoneout=kept).y.ravel().tolist() == [8, 1]


# ── mask, reset, start ──────────────────────────────────────────────────────────────────────────────────────────────


def everything(spec, arrays, case, given):
    out = reference.forward(spec, arrays, **case)
    d = reference.backward(spec, arrays, out, **given(out))
    return {**results(out), "dx": d.x, **{f"d{n}": a for n, a in d.state._asdict().items()}, **d.arrays}


@pytest.mark.parametrize("seed", range(30))
def test_masked_steps_affect_no_result_and_no_gradient(seed):
    rng = np.random.default_rng(seed)
    spec = random_spec(rng, of_seed(seed))
    arrays = random_arrays(rng, spec)
    mask = rng.random((3, 5)) < 0.6
    mask[0] = False
    case = random_case(rng, spec) | {"mask": mask, "reset": None}
    weights = rng.standard_normal((3, 5, spec.output_size))
    given = lambda out: {"dy": weights, "dgates": out.gates}  # noqa: E731
    expected = everything(spec, arrays, case, given)
    assert not expected["gates"][~mask].any()
    assert not expected["dx"][~mask].any()
    case["x"] = np.where(mask[:, :, None], case["x"], np.nan)
    for name, array in everything(spec, arrays, case, given).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_a_nan_in_the_state_of_a_masked_row_stays_in_that_row(rng):
    spec = CellSpec(2, 3, layer_norm=True, peepholes=True, zoneout_cell=0.2)
    arrays, state = random_arrays(rng, spec), random_state(rng, spec, 2)
    state[0][1], state[1][1] = np.nan, np.nan
    mask = np.array([[True] * 3, [False] * 3])
    case = {"x": rng.standard_normal((2, 3, 2)), "state": state, "mask": mask}
    got = everything(spec, arrays, case, lambda out: {"dy": np.ones_like(out.y)})
    assert np.isnan(got["y"][1]).all()
    assert np.isfinite(got["y"][0]).all()
    assert all(np.isfinite(got[name]).all() for name in (*spec.shapes, "dx", "dh", "dc"))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", STATES)
def test_a_reset_starts_a_new_piece(rng, kind, reverse):
    spec = CellSpec(2, 3, kind=kind, **learned(kind))
    arrays, x = random_arrays(rng, spec), rng.standard_normal((2, 6, 2))
    reset = np.zeros((2, 6), bool)
    reset[:, 3 if reverse else 2] = True  # a reverse pass runs steps 5 4, then 3 2 1 0
    out = reference.forward(spec, arrays, x, reset=reset, reverse=reverse)
    cut = 4 if reverse else 2
    parts = [reference.forward(spec, arrays, part, reverse=reverse) for part in (x[:, :cut], x[:, cut:])]
    np.testing.assert_array_equal(out.y, np.concatenate([part.y for part in parts], axis=1))
    whole = reference.backward(spec, arrays, out, dy=out.y)
    pieces = [reference.backward(spec, arrays, part, dy=part.y) for part in parts]
    np.testing.assert_allclose(whole.x, np.concatenate([piece.x for piece in pieces], axis=1), rtol=1e-13)
    for name, gradient in whole.arrays.items():
        np.testing.assert_allclose(gradient, pieces[0].arrays[name] + pieces[1].arrays[name], atol=1e-14, err_msg=name)


@pytest.mark.parametrize("kind", STATES)
def test_a_reset_at_a_masked_step_still_resets(rng, kind):
    spec = CellSpec(2, 3, kind=kind, **learned(kind))
    arrays, state = random_arrays(rng, spec), random_state(rng, spec, 1)
    mask, reset = np.array([[True, False, True]]), np.array([[False, True, False]])
    x = rng.standard_normal((1, 3, 2))
    out = reference.forward(spec, arrays, x, state, mask=mask, reset=reset)
    np.testing.assert_array_equal(out.y[0, 1], arrays.get("initial_h", np.zeros(3)))
    np.testing.assert_array_equal(out.y[:, 2], reference.forward(spec, arrays, x[:, 2:]).y[:, 0])
    d = reference.backward(spec, arrays, out, dy=np.array([[[0.0] * 3, [0.0] * 3, [1.0] * 3]]))
    assert not any(a.any() for a in d.state)
    assert not d.x[:, 0].any()


@pytest.mark.parametrize("kind", STATES)
def test_a_pass_over_no_steps_returns_the_initial_state(rng, kind):
    spec = CellSpec(2, 3, kind=kind, **learned(kind))
    arrays = random_arrays(rng, spec)
    out = reference.forward(spec, arrays, np.zeros((2, 0, 2)))
    assert out.y.shape == (2, 0, 3)
    assert all((a == arrays.get(f"initial_{name}", 0.0)).all() for name, a in out.state._asdict().items())
    d = reference.backward(spec, arrays, out, dstate=[np.ones((2, 3))] * len(out.state))
    if learned(kind):
        assert (d.arrays["initial_h"] == 2.0).all()


def test_float32_is_computed_in_float64(rng):
    spec = CellSpec(2, 3)
    single = {name: a.astype(np.float32) for name, a in random_arrays(rng, spec).items()}
    double = {name: a.astype(np.float64) for name, a in single.items()}
    x = rng.standard_normal((2, 3, 2)).astype(np.float32)
    y = reference.forward(spec, single, x).y
    assert y.dtype == np.float64
    np.testing.assert_array_equal(y, reference.forward(spec, double, x.astype(np.float64)).y)


@pytest.mark.parametrize("name", OF_BACKBONES)
def test_activations_stay_finite_and_propagate_nan(name):
    _, alpha, beta = activation(name, OF_BACKBONES)
    function, slope = reference.ACTIVATIONS[name]
    z = np.array([-1e3, -1.0, 0.0, 1.0, 1e3, np.nan])
    y = function(z, alpha, beta)
    expected = [SCALARS[name](v, alpha, beta) for v in z[1:4]]
    np.testing.assert_allclose(y[1:4], expected, rtol=1e-14)
    assert np.isfinite(y[:5]).all()
    assert np.isfinite(slope(z, y, alpha, beta)[:5]).all()
    assert np.isnan(y[5])
