"""Diagnostics: each measure compared with its definition, computed differently, and reports that name the problem."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from family import random_spec
from networks import fill, make_cell, make_states

from cellstack import CellSpec, Network, Patch, inspect, reference
from cellstack.cells import KINDS
from cellstack.cells.base import HiddenState, Kind
from cellstack.nodes import Cell, Dense, Recurrent


def rng_of(seed):
    return np.random.default_rng(seed)


def traced(cell, x, **given):
    backwards = given.pop("backwards", False)
    return Network([Recurrent((cell,), go_backwards=backwards)]).trace(x, **given)["layer_0"].cells[0]


KEEPING = [name for name, kind in KINDS.items() if {"keep", "write"} & set(kind.gates.values())]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_contributions_sum_to_the_state(seed, backwards):
    rng = rng_of(seed)
    spec = random_spec(rng, kind=KEEPING[seed % len(KEEPING)], largest=8)
    cell = fill(rng, spec, "float64")
    x = rng.normal(size=(3, 9, spec.input_size))
    net = Network([Recurrent((cell,), go_backwards=backwards)])
    given = {"state": make_states(rng, net, 3)} if seed % 3 else {}
    if seed % 5 == 1:
        given["mask"] = rng.random((3, 9)) < 0.7
    if seed % 5 == 2:
        given["reset"] = rng.random((3, 9)) < 0.3
    seen = net.trace(x, **given)["layer_0"].cells[0]
    if spec.scalar or spec.kind == "cfc" or (spec.joint and spec.of_kind.memory == "c"):
        with pytest.raises(ValueError, match=r"gates alone determine its state|cell_clip"):
            seen.contributions()
        return
    if spec.cell_clip is not None:
        with pytest.raises(ValueError, match="cell_clip isn't supported"):
            seen.contributions()
        return
    state = seen[spec.of_kind.memory]
    for step in (0, 4, 8, -1, -9):
        parts = seen.contributions(step)
        past = (9 - step % 9) if backwards else step % 9 + 1
        assert parts.shape == (3, past + 1, spec.units)
        scale = max(1.0, np.abs(state).max())
        np.testing.assert_allclose(parts.sum(axis=1), state[:, step], atol=1e-11 * scale, rtol=0)


def test_contributions_are_what_each_step_wrote_and_later_gates_kept():
    rng = rng_of(0)
    seen = traced(make_cell(rng, 3, 4, "float64"), rng.normal(size=(2, 6, 3)))
    for step in range(6):
        parts = seen.contributions(5)[:, 1 + step]
        expected = seen.i[:, step] * seen.g[:, step] * np.prod(seen.f[:, step + 1 :], axis=1)
        np.testing.assert_allclose(parts, expected, atol=1e-14)
    assert not seen.contributions(5)[:, 0].any()  # the initial state is zeros


def test_what_has_no_contributions():
    rng = rng_of(0)
    x = rng.normal(size=(2, 6, 3))
    seen = traced(make_cell(rng, 3, 4, "float64", kind="rnn"), x)
    with pytest.raises(ValueError, match="SimpleRNN has no gate that keeps a state"):
        seen.contributions()
    with pytest.raises(ValueError, match="SimpleRNN has no gate"):
        seen.half_lives()
    seen = traced(make_cell(rng, 3, 4, "float64"), x)
    for step in (6, -7):
        with pytest.raises(IndexError, match=f"expected a step from 0 to 5, got {step}"):
            seen.contributions(step)
    part = traced(make_cell(rng, 3, 4, "float64"), x, steps=slice(3))
    for measure in (part.contributions, part.lyapunov_exponent):
        with pytest.raises(ValueError, match="expected the trace of a whole run, got some of its steps or units"):
            measure()


def constant(gates, units=2, dtype="float64"):
    """An LSTM whose gates are the same at every step: `gates` are their pre-activations, i f g o."""
    spec = CellSpec(1, units)
    bias = np.repeat(np.array(gates, dtype), units)
    return Cell(spec, np.zeros((1, 4 * units), dtype), np.zeros((units, 4 * units), dtype), bias)


@pytest.mark.parametrize("forget", [-2.0, 0.0, 3.0])
def test_the_half_life_of_a_constant_gate(forget):
    seen = traced(constant([0.0, forget, 1.0, 0.0]), np.zeros((1, 50, 1)))
    kept = 1 / (1 + math.exp(-forget))
    np.testing.assert_allclose(kept ** seen.half_lives(), 0.5, rtol=1e-12)
    whole = traced(constant([0.0, 800.0, 1.0, 0.0]), np.zeros((1, 50, 1)))
    assert np.isinf(whole.half_lives()).all()


@pytest.mark.parametrize(("forget", "expected"), [(-0.5, 1.0), (0.0, 0.0), (-2.0, math.inf), (2.0, math.inf)])
def test_the_half_life_of_a_gate_outside_0_to_1_is_that_of_its_magnitude(forget, expected):
    spec = CellSpec(1, 2, recurrent_activation="linear")
    bias = np.repeat([0.5, forget, 0.5, 0.5], 2)
    seen = traced(Cell(spec, np.zeros((1, 8)), np.zeros((2, 8)), bias), np.zeros((1, 5, 1)))
    np.testing.assert_allclose(seen.half_lives(), expected)


def test_gates_outside_0_to_1_are_reported_without_warnings():
    spec = CellSpec(2, 4, recurrent_activation="scaled_tanh(1.7159, 0.666)")
    rng = rng_of(7)
    net = Network([Recurrent((fill(rng, spec, "float32"),))])
    trace = net.trace(rng.normal(size=(2, 9, 2)))
    assert (trace["layer_0"].f < 0.0).any()
    assert trace.report().figures["layer_0"]["half-life in steps"]["median"] > 0.0


@pytest.mark.parametrize("exponential", [False, True])
def test_the_half_life_of_an_slstm_is_that_of_its_forget_gate(exponential):
    """And not of the f of its equations, which is 0 at the first step and depends on the input gate."""
    spec = CellSpec(1, 2, kind="slstm", exponential_forget=exponential)
    cell = Cell(spec, np.zeros((1, 8)), np.zeros((2, 8)), np.repeat([3.0, -1.0, 1.0, 0.0], 2))
    seen = traced(cell, np.zeros((1, 50, 1)))
    kept = math.exp(-1.0) if exponential else 1 / (1 + math.e)
    np.testing.assert_allclose(kept ** seen.half_lives(), 0.5, rtol=1e-12)
    with pytest.raises(ValueError, match="no pre-activations"):
        traced(cell, np.zeros((1, 50, 1)), steps=slice(3, 9)).half_lives()


def test_shares_of_gates():
    rng = rng_of(3)
    x, mask = 3 * rng.normal(size=(4, 30, 2)), rng.random((4, 30)) < 0.6
    seen = traced(make_cell(rng, 2, 5, "float64"), x, mask=mask)
    shares = seen.gate_shares()
    assert list(shares) == ["i", "f", "o"]
    for gate, (left, right) in shares.items():
        values = [seen[gate][row, step] for row, step in np.argwhere(mask)]
        np.testing.assert_allclose(left, np.mean([value < 0.1 for value in values], axis=0))
        np.testing.assert_allclose(right, np.mean([value > 0.9 for value in values], axis=0))
    assert list(traced(make_cell(rng, 2, 5, kind="gru"), x).gate_shares()) == ["z", "r"]
    assert traced(make_cell(rng, 2, 5, kind="rnn"), x).gate_shares() == {}


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
def test_the_exponent_of_a_linear_recurrence_is_the_logarithm_of_its_radius(factor):
    angle = 0.3
    turn = factor * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    spec = CellSpec(1, 2, "linear", kind="rnn", use_bias=False)
    cell = Cell(spec, np.ones((1, 2)), turn)
    assert inspect.spectral_radii(cell)["g"] == pytest.approx(factor)
    seen = traced(cell, np.zeros((3, 40, 1)))
    assert seen.lyapunov_exponent() == pytest.approx(math.log(factor), abs=1e-6)


def test_the_exponent_of_an_lstm_is_that_of_its_jacobians():
    """From the product of all steps' Jacobians, by central differences of the reference, normalised to length 1."""
    rng = rng_of(5)
    cell = make_cell(rng, 2, 3, "float64")
    x = rng.normal(size=(1, 12, 2))
    state, log, v = np.zeros(6), 0.0, rng_of(0).standard_normal(6)
    v /= np.linalg.norm(v)

    def after(s, frame):
        out = reference.forward(cell.spec, cell.arrays, frame[None, None], (s[None, :3], s[None, 3:])).state
        return np.concatenate([out.h[0], out.c[0]])

    for frame in x[0]:
        nudges = 1e-6 * np.eye(6)
        jacobian = np.stack([(after(state + n, frame) - after(state - n, frame)) / 2e-6 for n in nudges], axis=1)
        state, v = after(state, frame), jacobian @ v
        log += math.log(np.linalg.norm(v))
        v /= np.linalg.norm(v)
    assert traced(cell, x).lyapunov_exponent() == pytest.approx(log / 12, abs=1e-5)


def test_a_projected_cell_s_radius_goes_through_its_projection():
    cell = fill(rng_of(1), CellSpec(2, 6, proj_size=3), "float64")
    block = cell.recurrent_kernel[:, 6:12]
    expected = np.abs(np.linalg.eigvals(block @ cell.projection)).max()  # the same except for zeros
    assert inspect.spectral_radii(cell)["f"] == pytest.approx(expected)


# ── reports ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def report_of(cell, x, **given):
    return Network([Recurrent((cell,))], ["lstm"]).trace(x, **given).report()


def test_a_report_names_units_and_remedies():
    x = np.ones((1, 120, 1))
    said = report_of(constant([-9.0, 0.0, 1.0, 0.0], 8), x).findings
    assert said[0].startswith("lstm: units 0, 1, 2, 3, 4 and 3 more are dead: |h| stays below 0.01. Use fewer units")
    assert any("closed to new input: i is below 0.1 at nearly every step" in sentence for sentence in said)
    said = report_of(constant([9.0, 9.0, 1.0, 9.0], 1), x).findings
    assert any(sentence.startswith("lstm: unit 0 is saturated: |tanh(c)| is above 0.99") for sentence in said)
    assert any("the state grows by a factor of 2.3" in sentence for sentence in said)
    said = report_of(constant([0.0, 9.0, 0.0, 0.0], 1), x).findings
    assert any("keeping more than half over the whole run of 120 steps: reset the state" in one for one in said)
    x[0, 5] = np.nan
    assert report_of(make_cell(rng_of(0), 1, 2), x).findings[0].startswith("lstm: units 0, 1 are NaN or infinite")


def test_shares_of_steps_are_printed_in_percent():
    x = np.ones((1, 120, 1))
    said = report_of(constant([-9.0, 0.0, 1.0, 9.0], 2), x)
    assert said.figures["lstm"]["share of steps at which i is"] == {"shut (below 0.1)": 1.0, "open (above 0.9)": 0.0}
    lines = repr(said).splitlines()
    assert "  share of steps at which o is: shut (below 0.1) 0.0%, open (above 0.9) 100.0%" in lines
    name = "growth of the state (mean size in the last quarter of the run, relative to the second quarter)"
    assert name in said.figures["lstm"]


def test_chaos_is_reported():
    rng = rng_of(0)
    cell = Cell(CellSpec(1, 30, kind="rnn"), np.zeros((1, 30)), rng.normal(size=(30, 30)) * 0.5, np.zeros(30))
    net = Network([Recurrent((cell,))])
    start = (rng.normal(size=(1, 30)),)
    said = net.trace(np.zeros((1, 300, 1)), start).report()
    assert said.figures["layer_0"]["largest Lyapunov exponent, nats a step"] > 0.1
    assert any("small differences in the state grow by" in sentence for sentence in said.findings)


def test_a_stable_network_has_no_findings():
    rng = rng_of(0)
    cells = [make_cell(rng, 3, 6), make_cell(rng, 6, 5, kind="gru")]
    t = Network([Recurrent(tuple(cells)), Dense(rng.normal(size=(5, 2)).astype("f4"))]).trace(
        rng.normal(size=(3, 200, 3))
    )
    said = t.report()
    assert list(said.figures) == ["layer_0.cells[0]", "layer_0.cells[1]"]
    assert "spectral radius of the recurrent weights: z " in repr(said)
    assert repr(said).endswith("nothing stands out") == (not said.findings)


def test_traces_without_a_report():
    rng = rng_of(0)
    net = Network([Recurrent((make_cell(rng, 3, 6),))])
    x = rng.normal(size=(2, 8, 3))
    with pytest.raises(ValueError, match="expected the trace of a whole run"):
        net.trace(x, units=[1]).report()
    for nothing in (x[:0], x[:, :0]):
        with pytest.raises(ValueError, match="expected at least one used step, got none in layer_0"):
            net.trace(nothing).report()
    with pytest.raises(ValueError, match="the trace has no cells"):
        Network([Dense(rng.normal(size=(3, 2)))]).trace(x).report()


# ── plots ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_plot_has_a_map_for_each_gate_and_state():
    rng = rng_of(0)
    net = Network([Recurrent((make_cell(rng, 3, 6),)), Recurrent((make_cell(rng, 6, 5, kind="gru"),))])
    t = net.trace(rng.normal(size=(2, 40, 3)))
    figure = t.plot(row=1)
    maps = [axis for axis in figure.axes if axis.get_images()]
    assert [axis.get_ylabel() for axis in maps] == [f"{field}, unit" for field in ("ifgoch" + "zrgh")]
    titles = [axis.get_title(loc="left") for axis in maps]
    assert titles == ["layer_0", *[""] * 5, "layer_1", *[""] * 3]
    np.testing.assert_array_equal(maps[1].get_images()[0].get_array(), t["layer_0"].f[1].T)
    some = t.plot("layer_1", ["h"])
    assert [axis.get_ylabel() for axis in some.axes if axis.get_ylabel()] == ["h, unit"]
    with pytest.raises(ValueError, match="plot: no cells with f in layer_1"):
        t.plot("layer_1", ["f"])


@pytest.mark.long
@pytest.mark.parametrize("steps", [1, 200])
def test_the_labels_of_a_plot_do_not_overlap(steps):
    rng = rng_of(0)
    names = ["a_bidirectional_encoder_with_a_name_that_is_longer_than_its_panel_is_high", "decoder"]
    lower = Recurrent((make_cell(rng, 3, 64), make_cell(rng, 64, 1)))
    figure = (
        Network([lower, Recurrent((make_cell(rng, 1, 150, kind="gru"),))], names)
        .trace(rng.normal(size=(1, steps, 3)))
        .plot()
    )
    figure.draw_without_rendering()  # lays it out
    boxes = [
        (text.get_text(), text.get_window_extent())
        for axis in figure.axes
        for text in (
            axis.yaxis.label,
            axis._left_title,
            *(
                label
                for label in axis.get_yticklabels()
                if min(axis.get_ylim()) <= label.get_position()[1] <= max(axis.get_ylim())
            ),
        )
        if text.get_text() and text.get_visible()
    ]
    width, height = figure.bbox.size
    for number, (text, box) in enumerate(boxes):
        assert box.x0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
        assert not [other for other, there in boxes[:number] if box.overlaps(there)], text
    ticks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert all("." not in tick for tick in ticks)  # units are whole


@pytest.mark.parametrize("kind", KEEPING)
def test_patched_states_have_no_contributions_and_no_exponent(kind):
    rng = rng_of(3)
    net, x = Network([Recurrent((make_cell(rng, 3, 4, "float64", kind=kind),))]), rng.normal(size=(2, 9, 3))
    state = KINDS[kind].memory
    with pytest.raises(ValueError, match=f"patches of {state} aren't supported"):
        net.edit(Patch("layer_0", state, [1], value=0.3)).trace(x)["layer_0"].contributions()
    patched = net.edit(Patch("layer_0", "g", [1], value=0.3)).trace(x)
    seen = patched["layer_0"].cells[0]
    np.testing.assert_allclose(seen.contributions().sum(axis=1), seen[state][:, -1], atol=1e-12)
    with pytest.raises(ValueError, match="patched cells aren't supported"):
        patched["layer_0"].lyapunov_exponent()
    report = patched.report()
    assert "largest Lyapunov exponent, nats a step" not in report.figures["layer_0"]
    assert any("patched" in sentence for sentence in report.findings)


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS.values() if not kind.has_recurrent_kernel])
def test_a_kind_without_recurrent_weights(kind):
    """The report has no spectral radius, and a masked step is no division by zero."""
    rng = rng_of(4)
    net, x = Network([Recurrent((make_cell(rng, 3, 4, "float64", kind=kind),))]), rng.normal(size=(2, 9, 3))
    t = net.trace(x, mask=np.arange(9) < [[9], [6]])
    assert inspect.spectral_radii(net.cells[0]) == {}
    figures = t.report().figures["layer_0"]
    assert "spectral radius of the recurrent weights" not in figures
    assert figures["largest Lyapunov exponent, nats a step"] < 0.0  # each step keeps a share below 1
    seen = t["layer_0"].cells[0]
    assert list(seen.gate_shares()) == list(KINDS[kind].multipliers)
    assert (seen.half_lives() > 0.0).all()
    with np.errstate(invalid="ignore"):  # at masked steps
        kept, _ = KINDS[kind].update(net.cells[0].spec, {gate: getattr(seen, gate) for gate in KINDS[kind].gates})
    expected = np.log(0.5) / np.log(kept[np.arange(9) < [[9], [6]]]).mean(axis=0)
    np.testing.assert_allclose(seen.half_lives(), expected)


def test_nan_has_no_half_life():
    rng = rng_of(5)
    x = rng.normal(size=(1, 6, 3))
    x[0, 2] = np.nan
    seen = traced(make_cell(rng, 3, 4, "float64"), x)
    assert np.isnan(seen.half_lives()).all()
    with pytest.raises(ValueError, match="steps to be an integer from 1"):
        seen.lyapunov_exponent(-5)


@pytest.mark.parametrize(
    ("roles", "update", "gates"),
    [
        ({"z": "write", "g": "candidate"}, (0.75, 0.5), ("z",)),
        ({"z": "keep", "r": "reset", "g": "candidate"}, (0.25, 1.5), ("z", "r")),
        ({"z": "write", "f": "keep", "g": "candidate"}, (0.5, 0.5), ("z", "f")),
        ({"g": "candidate", "o": "output"}, None, ("o",)),
    ],
)
def test_what_a_kind_keeps_and_writes_follows_from_the_roles_of_its_gates(roles, update, gates):
    kind = Kind("toy", "Toy", roles, HiddenState, HiddenState, step=lambda *_: ((), ()))
    values = {"z": 0.25, "f": 0.5, "g": 2.0}
    assert (
        kind.update(SimpleNamespace(scalar=False, joint=False, of_kind=kind), values | {"r": 1.0, "o": 1.0}) == update
    )
    assert kind.multipliers == gates
