"""Inspecting training: gradients by lag, compared with torch's autograd and a separate loop; unchanged bits."""

import copy
import io
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.utils.parametrize
import torch.utils._pytree
import torch.utils.checkpoint
from torch.nn.utils.rnn import pack_padded_sequence

import cellstack as cs
from cellstack import layers
from cellstack.inspect import TrainingMonitor, TrainingRecord
from cellstack.inspect.monitoring.records import VANISHED
from cellstack.layers import observer

DOUBLE = {"dtype": "float64"}


def lstm_steps(cell, x):
    """The states of a plain LSTM over one row `[T, I]`, implemented separately: `[(h, c), …]` with their graph."""
    h, c = (torch.zeros(cell.units, dtype=x.dtype) for _ in "hc")
    seen = []
    for frame in x:
        i, f, g, o = (frame @ cell.kernel + h @ cell.recurrent_kernel + cell.bias).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        seen.append((h, c))
    return seen


def expected_lags(cell, rows, weights):
    """Norms of dL/dh and dL/dc by lag, and the share of the last output's gradient that is left in c.

    Args:
        rows: each row's steps in the order of processing, `[T, I]`.
        weights: the gradient of the loss with respect to each row's outputs, `[T, H]`; the last is the output's.
    """
    longest = max(len(x) for x in rows)
    sums = {name: np.zeros((longest, 2)) for name in ("h", "c")}  # squared norms, rows
    carried = np.zeros((longest, 2))
    for x, weight in zip(rows, weights, strict=True):
        seen = lstm_steps(cell, x)
        states = [part for pair in seen for part in pair]
        whole = torch.autograd.grad(sum((h * w).sum() for (h, _), w in zip(seen, weight, strict=True)), states)
        seen = lstm_steps(cell, x)
        states = [part for pair in seen for part in pair]
        alone = torch.autograd.grad((seen[-1][0] * weight[-1]).sum(), states, allow_unused=True)
        alone = [None if g is None else float(g.square().sum()) for g in alone]
        for lag in range(len(x)):
            place = 2 * (len(x) - 1 - lag)
            for name, gradient in zip(("h", "c"), whole[place : place + 2], strict=True):
                sums[name][lag] += float(gradient.square().sum()), 1.0
            carried[lag] += alone[place + 1], alone[-1]
    return {name: np.sqrt(s[:, 0] / s[:, 1]) for name, s in sums.items()} | {
        "carried": np.sqrt(carried.T[0] / carried.T[1])
    }


def lags_of(layer, loss, **options):
    """A monitor's record of one batch: the lags of its first cell."""
    with TrainingMonitor(layer, **options) as monitor:
        loss().backward()
        record = monitor.epoch()
    return next(iter(record.layers.values())).lags


def assert_lags(found, wanted, count=None):
    assert list(found) == ["h", "c", "carried"]
    for name, values in found.items():
        np.testing.assert_allclose(values, wanted[name][:count], rtol=1e-9, atol=1e-300, err_msg=name)


def test_gradients_by_lag_are_those_of_autograd():
    layer = layers.LSTM(5, return_sequences=True, input_size=3, **DOUBLE)
    x, w = torch.randn(4, 12, 3, dtype=torch.float64), torch.randn(4, 12, 5, dtype=torch.float64)
    found = lags_of(layer, lambda: (layer(x) * w).sum())
    assert found["h"].shape == (12,)
    assert_lags(found, expected_lags(layer.cell, x, w))


def test_only_the_last_output_is_used():
    layer = layers.LSTM(5, input_size=3, **DOUBLE)
    x, w = torch.randn(4, 12, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    found = lags_of(layer, lambda: (layer(x) * w).sum())
    weights = torch.zeros(4, 12, 5, dtype=torch.float64)
    weights[:, -1] = w
    wanted = expected_lags(layer.cell, x, weights)
    assert_lags(found, wanted)
    np.testing.assert_allclose(found["carried"], found["c"] / found["c"][0], rtol=1e-9)  # there are no other gradients


def test_the_state_that_a_call_returns_counts():
    layer = layers.LSTM(4, return_state=True, input_size=3, **DOUBLE)
    x = torch.randn(2, 6, 3, dtype=torch.float64)

    def loss():
        _, h, c = layer(x)
        return h.sum() + (3.0 * c).sum()

    found = lags_of(layer, loss)
    seen = [lstm_steps(layer.cell, row) for row in x]
    total = sum(states[-1][0].sum() + 3.0 * states[-1][1].sum() for states in seen)
    for lag in range(6):
        gradients = torch.autograd.grad(total, [states[5 - lag][1] for states in seen], retain_graph=True)
        norm = float(torch.stack(gradients).square().sum() / 2) ** 0.5
        np.testing.assert_allclose(found["c"][lag], norm, rtol=1e-9)
        np.testing.assert_allclose(found["carried"][lag], norm / found["c"][0], rtol=1e-9)


@pytest.mark.parametrize("backwards", [False, True])
def test_rows_of_several_lengths_count_from_their_own_ends(backwards):
    layer = layers.LSTM(5, return_sequences=True, go_backwards=backwards, input_size=3, **DOUBLE)
    x, lengths = torch.randn(4, 9, 3, dtype=torch.float64), [9, 4, 7, 1]
    w = torch.randn(4, 9, 5, dtype=torch.float64)
    rows = [row[:n].flip(0) if backwards else row[:n] for row, n in zip(x, lengths, strict=True)]

    def padded():
        y = layer(x, lengths=lengths)  # in the order of processing: padding precedes the first used step
        return sum((y[r, 9 - n :] if backwards else y[r, :n]).mul(w[r, :n]).sum() for r, n in enumerate(lengths))

    def packed():
        y = layer(pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False))
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, batch_first=True)
        return sum((y[r, :n] * w[r, :n]).sum() for r, n in enumerate(lengths))

    wanted = expected_lags(layer.cell, rows, [w[r, :n] for r, n in enumerate(lengths)])
    assert_lags(lags_of(layer, padded), wanted)
    assert_lags(lags_of(layer, packed), wanted)


def test_steps_that_a_mask_leaves_out_are_no_lags():
    layer = layers.LSTM(5, return_sequences=True, input_size=3, **DOUBLE)
    x, w = torch.randn(3, 10, 3, dtype=torch.float64), torch.randn(3, 10, 5, dtype=torch.float64)
    mask = torch.rand(3, 10) < 0.6
    mask[:, 2] = True
    found = lags_of(layer, lambda: (layer(x, mask=mask) * w)[mask].sum())
    rows, weights = ([row[used] for row, used in zip(of, mask, strict=True)] for of in (x, w))
    assert_lags(found, expected_lags(layer.cell, rows, weights))


def test_the_past_ends_at_a_reset():
    layer = layers.LSTM(5, return_sequences=True, input_size=3, **DOUBLE)
    x, w = torch.randn(2, 10, 3, dtype=torch.float64), torch.randn(2, 10, 5, dtype=torch.float64)
    reset = torch.zeros(2, 10, dtype=torch.bool)
    reset[0, 2] = reset[0, 6] = reset[1, 3] = True
    found = lags_of(layer, lambda: (layer(x, reset=reset) * w).sum())
    assert_lags(found, expected_lags(layer.cell, [x[0, 6:], x[1, 3:]], [w[0, 6:], w[1, 3:]]))


@pytest.mark.parametrize("backwards", [False, True])
def test_the_last_steps_alone_give_the_same(backwards):
    layer = layers.LSTM(5, return_sequences=True, go_backwards=backwards, input_size=3, **DOUBLE)
    x, w = torch.randn(3, 30, 3, dtype=torch.float64), torch.randn(3, 30, 5, dtype=torch.float64)
    found = lags_of(layer, lambda: (layer(x) * w).sum(), lags=7)
    assert len(found["carried"]) == 7
    assert_lags(found, expected_lags(layer.cell, x.flip(1) if backwards else x, w), 7)


def test_rows_are_those_that_end_last():
    layer = layers.LSTM(5, return_sequences=True, input_size=3, **DOUBLE)
    x, w, lengths = torch.randn(4, 9, 3, dtype=torch.float64), torch.randn(4, 9, 5, dtype=torch.float64), [5, 9, 2, 9]
    found = lags_of(layer, lambda: (layer(x, lengths=lengths) * w).sum(), rows=2)
    assert_lags(found, expected_lags(layer.cell, x[[1, 3]], w[[1, 3]]))


FLAGS = [
    (layers.LSTM, {"peepholes": True, "proj_size": 3, "layer_norm": True}),
    (layers.LSTM, {"coupled": True, "cell_clip": 0.3, "learn_initial_state": True}),
    (layers.LSTM, {"activation": torch.sin}),
    (layers.GRU, {}),
    (layers.GRU, {"reset_after": False, "clip": 1.0, "dropout": 0.4, "recurrent_dropout": 0.3}),
    (layers.SimpleRNN, {"layer_norm": True}),
]


@pytest.mark.parametrize(("kind", "flags"), FLAGS)
def test_every_flag_equals_the_layer_s_gradient(kind, flags):
    """dL/dh by lag, compared with the layer split after each step."""
    layer = kind(4, return_sequences=True, return_state=True, input_size=3, **flags, **DOUBLE)
    if flags.get("dropout"):
        layer.eval()  # a split layer redraws its masks
    x = torch.randn(2, 8, 3, dtype=torch.float64)
    w = torch.randn(2, 8, layer(x)[0].shape[2], dtype=torch.float64)
    found = lags_of(layer, lambda: (layer(x)[0] * w).sum())
    for lag in range(7):
        _, *state = layer(x[:, : 8 - lag])
        after = layer(x[:, 8 - lag :], initial_state=state)[0] if lag else w[:, :0]
        total = (after * w[:, 8 - lag :]).sum() + (state[0] * w[:, 7 - lag]).sum()
        (gradient,) = torch.autograd.grad(total, [state[0]])
        np.testing.assert_allclose(found["h"][lag], float(gradient.square().sum() / 2) ** 0.5, rtol=1e-8)


@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU])
def test_masks_of_dropout_and_zoneout_are_those_of_the_call(kind):
    zoneout = {"zoneout": 0.3, **({"zoneout_cell": 0.2} if kind is layers.LSTM else {})}
    layer = kind(
        6,
        return_sequences=True,
        return_state=True,
        input_size=3,
        dropout=0.4,
        recurrent_dropout=0.3,
        **zoneout,
        **DOUBLE,
    )
    x = torch.randn(3, 20, 3, dtype=torch.float64)
    with TrainingMonitor(layer, lags=8) as monitor:
        y, *_, trace = layer(x, return_gates=True)
        y.sum().backward()
        (looked,) = monitor._observers[kind.__name__].looked()
    for name, field in looked.trace._asdict().items():
        np.testing.assert_allclose(field.numpy(), trace._asdict()[name][:, 12:].detach().numpy(), atol=1e-12)


def random_stack(draw):
    """A stack of cellstack cells with flags, run forward or backward."""
    flags = [
        {}, {"peepholes": True}, {"coupled": True}, {"layer_norm": True}, {"cell_clip": 0.5},
        {"zoneout": 0.2, "zoneout_cell": 0.1}, {"learn_initial_state": True},
    ]  # fmt: skip
    cells = []
    for _ in range(draw.integers(1, 4)):
        kind = [layers.LSTMCell, layers.GRUCell, layers.SimpleRNNCell][draw.integers(3)]
        options = flags[draw.integers(len(flags))] if kind is layers.LSTMCell else {}
        rates = {name: 0.3 for name in ("dropout", "recurrent_dropout") if draw.random() < 0.3}
        cells.append(kind(4, **options, **rates, **DOUBLE))
    names = ("return_sequences", "return_state", "go_backwards")
    stack = layers.StackedRNNCells(cells, residual=draw.random() < 0.5)
    return layers.RNN(stack, input_size=4, **{name: draw.random() < 0.5 for name in names})


@pytest.mark.parametrize("seed", range(25))
def test_the_repeated_run_equals_the_call(seed, monkeypatch):
    """The repeated run gives the same weight gradients as the call, with its masks, resets and dropout."""
    draw = np.random.default_rng(seed)
    layer, (batch, steps) = random_stack(draw), draw.integers(1, 12, 2)
    x = torch.randn(batch, steps, 4, dtype=torch.float64)
    given = {"mask": torch.rand(batch, steps) < 0.7} if draw.random() < 0.5 else {}
    given |= {"reset": torch.rand(batch, steps) < 0.2} if draw.random() < 0.5 else {}
    weights, found = [], []

    def run(x, starts, arrays, *rest):
        weights.extend(arrays)
        return eager_run(x, starts, arrays, *rest)

    def gradients(outputs, states, given):
        if not found:
            found.extend(torch.autograd.grad(outputs, weights, given, retain_graph=True, materialize_grads=True))
        return own(outputs, states, given)

    eager_run, own = observer.eager.run_eagerly, observer._gradients
    with TrainingMonitor(layer) as monitor:
        results = layer(x, **given)
        parts = torch.utils._pytree.tree_leaves(results)
        sum((part * torch.randn_like(part)).sum() for part in parts).backward()
        monkeypatch.setattr(observer.eager, "run_eagerly", run)
        monkeypatch.setattr(observer, "_gradients", gradients)
        assert monitor.epoch().layers
    wanted = [array.grad for cell in layer.cells for array in cell.arrays()]
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-8, atol=1e-10)


class Stacks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.low = layers.RNN(
            layers.StackedRNNCells(
                [layers.LSTMCell(6, dropout=0.2), layers.GRUCell(6), layers.LSTMCell(6)], residual=True
            ),
            return_sequences=True,
            input_size=3,
        )
        self.both = layers.Bidirectional(layers.GRU(4, return_sequences=True), input_size=6)
        self.top = layers.LSTM(5, input_size=8)
        self.head = torch.nn.Linear(5, 1)

    def forward(self, x, mask=None):
        return self.head(self.top(self.both(self.low(x, mask=mask), mask=mask), mask=mask))


def trained(monitored, model=None, epochs=3, **options):
    torch.manual_seed(1)
    model = Stacks() if model is None else model
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    monitor = TrainingMonitor(model, **options) if monitored else None
    for _ in range(epochs):
        for _ in range(3):
            x, y = torch.randn(8, 15, 3), torch.randn(8, 1)
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x, torch.rand(8, 15) < 0.8), y).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if monitor is not None:
            monitor.epoch()
    return model, monitor, torch.rand(3)


def test_training_is_bit_identical_with_the_monitor():
    plain, _, draws = trained(False)
    looked, monitor, draws_too = trained(True, rows=4, lags=6)
    assert torch.equal(draws, draws_too)
    for (name, value), other in zip(plain.state_dict().items(), looked.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert list(monitor.records[0].layers) == [
        "low.cells[0]",
        "low.cells[1]",
        "low.cells[2]",
        "both.forward_layer",
        "both.backward_layer",
        "top",
    ]
    assert [record.epoch for record in monitor.records] == [1, 2, 3]
    layer = monitor.records[-1].layers["low.cells[1]"]
    assert layer.kind == "gru"
    assert set(layer.lags) == {"h", "carried"}
    assert layer.rows == 4


def test_a_residual_stack_compared_with_torch():
    """Lower cells have two paths to the output, through the cell above and past it."""
    cells = [layers.LSTMCell(4, **DOUBLE), layers.LSTMCell(4, **DOUBLE)]
    stack = layers.RNN(layers.StackedRNNCells(cells, residual=True), return_sequences=True, input_size=4)
    x, w = torch.randn(1, 7, 4, dtype=torch.float64), torch.randn(1, 7, 4, dtype=torch.float64)
    with TrainingMonitor(stack) as monitor:
        (stack(x) * w).sum().backward()
        record = monitor.epoch()
    low = lstm_steps(cells[0], x[0])
    high = lstm_steps(cells[1], torch.stack([h for h, _ in low]))
    total = sum(((h + below) * weight).sum() for (h, _), (below, _), weight in zip(high, low, w[0], strict=True))
    for name, seen in (("RNN.cells[0]", low), ("RNN.cells[1]", high)):
        for place, state in enumerate(("h", "c")):
            gradients = torch.autograd.grad(total, [pair[place] for pair in seen], retain_graph=True)
            norms = [float(gradient.norm()) for gradient in reversed(gradients)]
            np.testing.assert_allclose(record.layers[name].lags[state], norms, rtol=1e-9)


def test_norms_are_of_the_whole_batch_and_before_clipping():
    layer = layers.LSTM(4, input_size=3)
    with TrainingMonitor(layer, rows=2) as monitor:
        layer(torch.randn(9, 11, 3)).sum().backward()
        before = {name: float(p.grad.double().norm()) for name, p in layer.cell.named_parameters()}
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1e-3)
        weights = {name: float(p.detach().double().norm()) for name, p in layer.cell.named_parameters()}
        with torch.no_grad():
            layer.cell.kernel.zero_()  # like an optimiser step
        figures = monitor.epoch().layers["LSTM"].figures
    for group, norms in (("gradients", before), ("weights", weights)):
        assert list(figures[group]) == ["kernel", "recurrent_kernel", "bias", "all"]
        for name, norm in norms.items():
            assert figures[group][name] == pytest.approx(norm, rel=1e-5)
        assert figures[group]["all"] == pytest.approx(np.linalg.norm(list(norms.values())), rel=1e-5)


def test_gates_and_states_are_those_of_the_call():
    layer = layers.LSTM(4, return_sequences=True, input_size=3)
    x = 3.0 * torch.randn(5, 11, 3)
    with TrainingMonitor(layer) as monitor:
        y, trace = layer(x, return_gates=True)
        y.sum().backward()
        figures = monitor.epoch().layers["LSTM"].figures
    f, c = (part.detach().double() for part in (trace.f, trace.c))
    assert figures["gates"]["f"] == pytest.approx(float(f.mean()), rel=1e-6)
    assert figures["gates shut"]["f"] == pytest.approx(float((f < 0.1).double().mean()))
    assert figures["gates open"]["f"] == pytest.approx(float((f > 0.9).double().mean()))
    assert figures["states"]["c"] == pytest.approx(float(c.square().mean()) ** 0.5, rel=1e-6)
    lives = np.log(2) / -np.log(f.numpy()).mean(axis=(0, 1))
    assert figures["half-life"]["median"] == pytest.approx(np.median(lives), rel=1e-5)


def test_other_batches_run_without_the_monitor():
    layer = layers.LSTM(4, input_size=3)
    x = torch.randn(2, 5, 3)
    with TrainingMonitor(layer, every=2) as monitor:
        with torch.no_grad():
            layer(x)  # as in validation: must not count
        assert len(layer._observers) == 1
        layer(x)  # nor one without a gradient
        layer(x).sum().backward()
        assert layer._observers == ()
        first = monitor.epoch()
        assert layer._observers == ()  # the second epoch isn't inspected
        layer(x).sum().backward()
        assert monitor.epoch() is None
        assert len(layer._observers) == 1
    assert layer._observers == ()
    assert not monitor._observers["LSTM"]._hooks
    assert [record.epoch for record in monitor.records] == [1]
    assert "was called 2 times before a gradient reached it" in first.findings[-1]


def test_a_closed_monitor_says_so():
    layer = layers.LSTM(4, input_size=3)
    with TrainingMonitor(layer) as monitor:
        layer(torch.randn(2, 5, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="the monitor is closed"):
        monitor.epoch()
    assert layer._observers == ()


def test_two_monitors_see_the_same():
    layer = layers.LSTM(4, input_size=3)
    with TrainingMonitor(layer) as outer, TrainingMonitor(layer) as inner:
        layer(torch.randn(2, 5, 3)).sum().backward()
        assert inner.epoch().scalars() == outer.epoch().scalars()
    assert layer._observers == ()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_inspected_like_a_plain_call(reentrant):
    layer, x = layers.LSTM(4, input_size=3), torch.randn(2, 5, 3, requires_grad=True)
    wanted = lags_of(layer, lambda: layer(x).sum())
    found = lags_of(layer, lambda: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).sum())
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values)


def test_computed_and_bfloat16_weights_are_inspected():
    class Scaled(torch.nn.Module):
        def forward(self, weight):
            return weight / 2

    layer = layers.LSTM(4, input_size=3, **DOUBLE)
    torch.nn.utils.parametrize.register_parametrization(layer.cell, "recurrent_kernel", Scaled())
    x, w = torch.randn(2, 6, 3, dtype=torch.float64), torch.zeros(2, 6, 4, dtype=torch.float64)
    w[:, -1] = 1.0
    assert_lags(lags_of(layer, lambda: layer(x).sum()), expected_lags(layer.cell, x, w))
    small = layers.LSTM(4, input_size=3, dtype="bfloat16")
    assert lags_of(small, lambda: small(x.bfloat16()).sum())["carried"].shape == (6,)


def test_truncated_backpropagation_is_inspected_chunk_by_chunk():
    layer, head = layers.LSTM(4, return_sequences=True, input_size=3), torch.nn.Linear(4, 1)
    x, targets = torch.randn(2, 40, 3), torch.randn(2, 40, 1)
    with TrainingMonitor(layer) as monitor:
        layers.truncated_backward(layer, x, targets, lambda y, t: (head(y) - t).square().mean(), steps=15)
        record = monitor.epoch()
    assert record.layers["LSTM"].lags["carried"].shape == (15,)


def test_a_copy_and_a_pickle_are_not_inspected():
    model, x = torch.nn.Sequential(layers.LSTM(4, input_size=3)), torch.randn(2, 5, 3)
    with TrainingMonitor(model) as monitor:
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (twin, torch.load(file, weights_only=False)):
            assert other[0]._observers == ()
            other(x).sum().backward()
        model(x).sum().backward()
        twin = copy.deepcopy(model)
        assert monitor.epoch().layers


@pytest.mark.parametrize("kind", ["frozen", "unused", "compiled"])
def test_a_layer_without_a_gradient_is_named(kind):
    model = torch.nn.ModuleDict({"a": layers.LSTM(4, input_size=3), "b": layers.LSTM(4, input_size=3)})
    x, b = torch.randn(2, 12, 3), model["b"]
    if kind == "frozen":
        b.requires_grad_(False)
    call = torch.compile(b, backend="eager") if kind == "compiled" else b
    with TrainingMonitor(model) as monitor, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile's own
        y = model["a"](x).sum() + (0.0 if kind == "unused" else call(x).sum())
        y.backward()
        record = monitor.epoch()
    assert list(record.layers) == ["a"]
    assert any(sentence.startswith("b: no gradient reached it") for sentence in record.findings)


def test_foreign_cells_and_other_models_are_refused_by_name():
    class Foreign(torch.nn.Module):
        state_size = 3

        def forward(self, x, states):
            return x + states[0], [x + states[0]]

    foreign = layers.RNN(Foreign())
    with pytest.raises(ValueError, match="no supported cellstack layers; not supported: rnn"):
        TrainingMonitor(torch.nn.ModuleDict({"rnn": foreign}))
    model = torch.nn.ModuleDict({"rnn": foreign, "lstm": layers.LSTM(3, input_size=3)})
    with TrainingMonitor(model) as monitor:
        model["lstm"](torch.randn(2, 4, 3)).sum().backward()
        record = monitor.epoch()
    assert monitor.left_out == {"rnn": "its cells aren't cellstack's"}
    assert "rnn: isn't supported, its cells aren't cellstack's" in record.findings
    with pytest.raises(ValueError, match=r"no supported cellstack layers$"):
        TrainingMonitor(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected a torch module, got int"):
        TrainingMonitor(3)
    with pytest.raises(ValueError, match="expected lags as a whole number from 1 on, got 0"):
        TrainingMonitor(layers.LSTM(3), lags=0)


def test_findings_name_the_layer_the_steps_and_the_remedy():
    model = torch.nn.ModuleDict(
        {
            "short": layers.LSTM(8, input_size=3, forget_bias=-1.0),
            "long": layers.LSTM(8, input_size=3, forget_bias=8.0),
            "wild": layers.SimpleRNN(8, input_size=3, activation="linear"),
            "gru": layers.GRU(8, input_size=3),
        }
    )
    with torch.no_grad():
        model["wild"].cell.recurrent_kernel.mul_(1.5)
        model["short"].cell.bias[2] = -40.0  # a unit whose input gate stays closed
    x = torch.randn(4, 60, 3)
    with TrainingMonitor(model) as monitor:
        sum(layer(x).sum() for layer in model.values()).backward()
        record = monitor.epoch()
    said = "\n".join(record.findings)
    assert re.search(r"short: the gradient of its last output vanishes within \d+ of 60 .*forget_bias=", said)
    assert re.search(r"gru: the gradient of its last output vanishes within \d+ of 60 .*gate z higher", said)
    assert re.search(
        r"wild: the gradient explodes: .* grows by a factor of .* within 59 steps back.*clip_grad_norm_", said
    )
    assert "short: unit 2 is dead" in said or "short: unit 2 is closed" in said
    assert not any(sentence.startswith("long: the gradient") for sentence in record.findings)
    assert record.layers["long"].figures["reach"]["a hundredth"] == np.inf
    assert str(record).startswith("epoch 1\nshort: lstm, 4 rows\n")


def test_infinite_gradients_are_reported():
    layer = layers.LSTM(4, input_size=3)
    with TrainingMonitor(layer) as monitor:
        (layer(torch.randn(2, 5, 3)).sum() * torch.inf).backward()
        record = monitor.epoch()
    assert record.findings[0].startswith("LSTM: the gradient of its states isn't finite: clip it")


def test_a_loss_of_the_gates_is_named():
    layer = layers.LSTM(4, return_sequences=True, input_size=3)
    with TrainingMonitor(layer) as monitor:
        y, trace = layer(torch.randn(2, 5, 3), return_gates=True)
        (y.sum() + trace.f.sum()).backward()
        record = monitor.epoch()
    assert any("the loss also depends on its gates" in sentence for sentence in record.findings)


def test_empty_batches_and_rows_without_a_step():
    layer = layers.LSTM(4, input_size=3)
    with TrainingMonitor(layer) as monitor:
        layer(torch.zeros(2, 0, 3)).sum().backward()
        layer(torch.zeros(0, 4, 3)).sum().backward()
        assert not monitor.epoch().layers
        layer(torch.randn(3, 5, 3), lengths=[0, 5, 0]).sum().backward()
        assert monitor.epoch().layers["LSTM"].lags["carried"].shape == (5,)
        layer(torch.randn(2, 5, 3), lengths=[0, 0]).sum().backward()
        record = monitor.epoch()
    assert record.layers["LSTM"].lags["carried"].shape == (0,)
    assert "zero at every step" in record.findings[0]


def test_records_go_through_json():
    _, monitor, _ = trained(True, epochs=1)
    (record,) = monitor.records
    again = TrainingRecord.from_json(record.to_json())
    assert again.scalars() == record.scalars()
    assert again.findings == record.findings
    assert isinstance(cs.inspect.LayerRecord, type)
    assert VANISHED == 0.01


def test_tensorboard_reads_back_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        _, monitor, _ = trained(True, epochs=2, writer=writer)
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    wanted = monitor.records[1].scalars()
    assert set(read.Tags()["scalars"]) == set(wanted)
    (first, second) = read.Scalars("top/gradients/kernel")
    assert (first.step, second.step) == (1, 2)
    assert second.value == pytest.approx(wanted["top/gradients/kernel"], rel=1e-6)


@pytest.mark.long
def test_lightning_trains_for_two_epochs(tmp_path):
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Stacks()

        def training_step(self, batch, _):
            x, y = batch
            return torch.nn.functional.mse_loss(self.model(x), y)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.01)

    def run(*callbacks, name):
        torch.manual_seed(2)
        data = torch.utils.data.TensorDataset(torch.randn(16, 10, 3), torch.randn(16, 1))
        module, logger = Module(), CSVLogger(tmp_path, name=name)
        trainer = pl.Trainer(
            max_epochs=2, accelerator="cpu", devices=1, logger=logger, callbacks=list(callbacks),
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice on workers
            trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8, shuffle=True))
        return module

    page = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if "pl.Callback" in block)
    names = {"cs": cs, "pl": pl}
    exec(code, names)
    callback = names["Monitoring"]()
    module = run(callback, name="looked")
    for value, other in zip(module.state_dict().values(), run(name="plain").state_dict().values(), strict=True):
        assert torch.equal(value, other)
    assert [record.epoch for record in callback.monitor.records] == [1, 2]
    assert "model.both.backward_layer" in callback.monitor.records[0].layers
    header = (tmp_path / "looked" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert "model.top/gradients/kernel" in header
