"""Ablation and differences of traces, each compared with single edited runs."""

import numpy as np
import pytest
from networks import make_cell, make_graph, make_stack

import cellstack as cs
from cellstack import Network, Patch, ShapeError
from cellstack.inspect import interventions
from cellstack.nodes import Bidirectional, Dense, GlobalPool, Recurrent


def rng_of(seed):
    return np.random.default_rng(seed)


def classifier(seed, dtype="float64"):
    rng = rng_of(seed)
    both = Bidirectional(
        Recurrent((make_cell(rng, 3, 4, dtype),)),
        Recurrent((make_cell(rng, 3, 2, dtype, kind="gru"),), go_backwards=True),
    )
    above = Recurrent((make_cell(rng, 6, 5, dtype, proj_size=3), make_cell(rng, 3, 4, dtype, kind="rnn")))
    head = Dense(rng.normal(size=(4, 2)).astype(dtype), rng.normal(size=2).astype(dtype), "softmax")
    net = Network([both, above, GlobalPool("mean"), head], ["both", "above", "pool", "head"])
    return net, rng.normal(size=(3, 6, 3)).astype(dtype), rng


def metric(y):
    return float(np.log(y[:, 1]).sum())


@pytest.mark.parametrize("how", ["zero", "mean"])
@pytest.mark.parametrize("gate", ["h", "g"])
def test_ablation_equals_edited_runs(how, gate, monkeypatch):
    net, x, rng = classifier(0)
    mask = rng.random((3, 6)) < 0.8
    monkeypatch.setattr(interventions, "AT_ONCE", 2000)  # a few units per run
    found = cs.ablate(net, x, how=how, metric=metric, gate=gate, mask=mask)
    t = net.trace(x, mask=mask)
    assert found.metric == metric(t.y)
    assert list(found.effects) == [("both", 0), ("both", 1), ("above", 0), ("above", 1)]
    for (name, number), effects in found.effects.items():
        cell = t[name].cells[number]
        for unit, effect in enumerate(effects):
            value = 0.0 if how == "zero" else cell[gate][cell.mask][:, unit].mean()
            y, _ = net.edit(Patch(name, gate, unit, value=value, cell=number)).run(x, mask=mask)
            assert effect == pytest.approx(metric(y) - found.metric, abs=1e-12)
    ranked = found.ranked
    assert len(ranked) == sum(map(len, found.effects.values()))
    assert abs(ranked[0].effect) == max(np.abs(effects).max() for effects in found.effects.values())
    assert f"{ranked[0].effect:+.6g}" in repr(found).splitlines()[1]


def test_resampling_uses_values_of_the_same_unit():
    net, x, _ = classifier(1)
    found = cs.ablate(net, x, "both", how="resample", metric=metric, seed=3)
    again = cs.ablate(net, x, "both", how="resample", metric=metric, seed=3)
    other = cs.ablate(net, x, "both", how="resample", metric=metric, seed=4)
    assert all(np.array_equal(found.effects[key], again.effects[key]) for key in found.effects)
    assert any(not np.array_equal(found.effects[key], other.effects[key]) for key in found.effects)
    cell = net.trace(x)["both"].cells[0]
    values = interventions._replacements(cell, "h", "resample", rng_of(3))
    assert np.array_equal(np.sort(values.reshape(-1, 4), axis=0), np.sort(cell.h.reshape(-1, 4), axis=0))
    y = net.edit(Patch("both", "h", 2, steps=slice(6), value=values[..., 2:3], cell=0))(x)
    assert found.effects["both", 0][2] == pytest.approx(metric(y) - found.metric, abs=1e-12)


def test_the_default_metric_is_the_change_of_the_output():
    net, x, _ = classifier(2)
    found = cs.ablate(net, x, ["above"], how="zero")
    y = net.edit(Patch("above", "h", 1, value=0.0, cell=1))(x)
    assert found.metric == 0.0
    assert found.effects["above", 1][1] == pytest.approx(np.abs(y - net(x)).mean(), abs=1e-12)


def test_networks_of_several_inputs_and_outputs():
    done = 0
    for seed in range(12):
        net, x = make_graph(seed, "float64")
        if not net.cells:
            continue
        name = next(name for name, node in zip(net.names, net.nodes, strict=True) if node.cells)
        count = lambda y: float(sum(np.sum(one) for one in (y if isinstance(y, tuple) else (y,))))  # noqa: E731
        found = cs.ablate(net, x, name, how="zero", metric=count)
        y = net.edit(Patch(name, "h", 0, value=0.0, cell=0)).run(x)[0]
        assert found.effects[name, 0][0] == pytest.approx(count(y) - found.metric, abs=1e-9)
        done += 1
    assert done > 3


def test_differences_of_two_traces():
    net, x, _ = classifier(5)
    one = net.trace(x)
    other = net.edit(Patch("above", "f", [1], rows=1, steps=slice(3, 5), value=1.0, cell=0)).trace(x)
    found = one.diff(other)
    assert list(found) == list(net.names)
    assert not any(array.any() for fields in found["both"] for array in fields.values())
    below = found["above"][0]
    assert np.array_equal(below["f"], other["above"].cells[0].f - one["above"].cells[0].f)
    assert not below["f"][:, :3].any()
    lines = repr(found).splitlines()
    assert lines[1] == "  both, cell 0: none"
    assert lines[3].startswith("  above, cell 0: from step 3 on; at most i ")
    first = found.largest(1)[0]
    assert abs(first.other - first.one) == max(
        np.abs(array).max() for fields in found["above"] for array in fields.values()
    )
    cell = one["above"].cells[first.cell]
    assert getattr(cell, first.field)[first.row, first.step, first.unit] == first.one
    assert len(found.largest(3)) == 3
    nothing = one.diff(net.trace(x))
    assert nothing.largest() == []
    late = one.select(steps=slice(2, None), units=[1, 0]).diff(other.select(steps=slice(2, None), units=[1, 0]))
    assert {entry.unit for entry in late.largest(100) if entry.field == "f" and entry.cell == 0} <= {0, 1}
    assert "from step 3 on" in repr(late)
    with pytest.raises(ShapeError, match="the same rows, steps and units"):
        one.diff(other.select(rows=slice(1)))


def test_plots():
    net, x, _ = classifier(6)
    pytest.importorskip("matplotlib")
    assert cs.ablate(net, x).plot(5).axes[0].get_xlabel() == "change of the metric, h by mean"


def test_what_is_refused():
    net, x, _ = classifier(7)
    without_cells = Network([Dense(np.ones((x.shape[-1], 2)))], ["head"])
    for error, match, call in (
        (ValueError, "nodes with cells, both, above, got 'head'", lambda: cs.ablate(net, x, "head")),
        (ValueError, "a network with cells, and this one has none", lambda: cs.ablate(without_cells, x, "head")),
        (ValueError, "how to be one of", lambda: cs.ablate(net, x, how="median")),
        (ValueError, "a gate of both out of z, r, g, h, got 'f'", lambda: cs.ablate(net, x, gate="f")),
        (
            ValueError,
            r"one number for the batch, got shape \[3\]",
            lambda: cs.ablate(net, x, metric=lambda y: y[:, 0]),
        ),
        (ShapeError, "at least one row and one step", lambda: cs.ablate(net, x[:0])),
        (ShapeError, "at least one row and one step", lambda: cs.ablate(net, x[:, :0])),
        (ValueError, "the network has no cells", lambda: cs.ablate(Network([Dense(np.ones((3, 1)))]), x)),
    ):
        with pytest.raises(error, match=match):
            call()


def test_nan_metrics_are_shown_last():
    net, x, _ = classifier(8)
    values = iter([1.0, np.nan, 3.0, *[0.0] * 30])
    found = cs.ablate(net, x, "both", metric=lambda y: next(values))
    assert found.ranked[0].effect == 2.0
    assert np.isnan(found.ranked[-1].effect)


def test_a_stack_of_odd_cells():
    rng = rng_of(9)
    net = Network([make_stack(rng, 3, "float64", residual=True)])
    found = cs.ablate(net, rng.normal(size=(2, 4, 3)))
    assert len(found.effects) == len(net.cells)


def test_patches_of_some_rows_apply_in_every_run():
    net, x, rng = classifier(4)
    for patch in (
        Patch("both", "f", [1], rows=[0], value=0.1, cell=0),
        Patch("both", "f", [1], rows=[2, 0], value=rng.random((2, 1, 1)), cell=0),
        Patch("both", "f", [1], value=rng.random((3, 1, 1)), cell=0),
        Patch("both", "f", [1], rows=slice(1, None), steps=slice(2, 4), value=rng.random((2, 2, 1)), cell=0),
    ):
        patched = net.edit(patch)
        found = cs.ablate(patched, x, "above", how="zero", metric=metric).effects["above", 1]
        for unit in range(4):
            one = patched.edit(Patch("above", "h", unit, value=0.0, cell=1))
            np.testing.assert_allclose(found[unit], metric(one(x)) - metric(patched(x)), atol=1e-12)


def test_traces_that_do_not_fit_are_not_compared():
    net, x, _ = classifier(2)
    t = net.trace(x)
    with pytest.raises(ShapeError, match="steps must be equal"):
        t.select(steps=slice(0, 3)).diff(t.select(steps=slice(3, 6)))
    cells = {
        kind: Network([Recurrent((make_cell(rng_of(1), 3, 4, "float64", kind=kind),))]) for kind in ("lstm", "gru")
    }
    with pytest.raises(ValueError, match="the cells of layer_0 differ"):
        cells["lstm"].trace(x).diff(cells["gru"].trace(x))


def test_what_has_no_effect_says_why():
    net, x, _ = classifier(3)
    with pytest.raises(ValueError, match="none of the nodes has cells"):
        cs.ablate(net, x, [])
    with pytest.raises(ShapeError, match="at least one row and one step"):
        cs.ablate(net, 3.0)


def test_a_plot_needs_an_existing_row():
    net, x, _ = classifier(3)
    t = net.trace(x)
    for row in (3, slice(0, 3), True, None):
        with pytest.raises(IndexError, match="row as a number below 3"):
            t.plot(row=row)
    for empty in (t.select(units=[]), net.trace(x[:, :0])):
        with pytest.raises(ValueError, match="at least one step and one unit"):
            empty.plot("both")
