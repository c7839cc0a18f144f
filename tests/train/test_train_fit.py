"""The model and the fit loop: reproducible, resumable, interruptible, and equal to the exported network."""

import copy
import errno
import os
import signal
import stat
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from cellstack import FormatError, Network, layers, load, train
from cellstack.nodes import GlobalPool
from cellstack.train import Sequences, custom
from cellstack.train import checkpoint as checkpoints
from cellstack.train.cell_names import CELLS
from cellstack.train.checks import UsageError
from cellstack.train.custom import Architecture, FitOptions, Indexed, Inputs, Labelled, Model, learn
from cellstack.train.examples import ChangeWeights, padded
from cellstack.train.fitting import as_network

CLASSES = ("a", "b", "c")


@pytest.fixture
def sequences(rng):
    """Sequences that a model can learn to classify: each class has its own mean."""
    y = np.arange(36) % 3
    x = [rng.normal(size=(int(rng.integers(3, 7)), 4)).astype(np.float32) + np.float32(label) for label in y]
    return Sequences(x, y, CLASSES, "toy")


def prepare(sequences, seed=0, **options):
    examples = Labelled(sequences)
    kept, held = np.arange(27), np.arange(27, 36)
    inputs = Inputs.measure(examples, kept)
    torch.manual_seed(seed)
    outputs = len(CLASSES) if options.get("task", "classify") == "classify" else examples.y.shape[1]
    more = {name: options.pop(name) for name in ("task", "targets") if name in options}
    model = Model(inputs, outputs, Architecture((5, 4), **NOISE | options), **more)
    return model, inputs, examples, kept, held


def fit(model, inputs, examples, kept, held, settings, **how):
    data = Indexed(examples, inputs, kept, held, settings.batch, settings.seed)
    return learn(model, data, replace(settings, **how))


SETTINGS = FitOptions(epochs=4, batch=4, seed=3)
NOISE = {"noise": 0.1, "offset": 0.1}


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


class Raising:
    """Examples that call a function at the n-th fetched batch."""

    def __init__(self, examples, at, action):
        self.examples, self.lengths, self.left, self.action = examples, examples.lengths, at, action

    def fetch(self, indices):
        self.left -= 1
        if self.left == 0:
            self.action()
        return self.examples.fetch(indices)


def test_a_run_repeats_bit_for_bit(sequences):
    ends = []
    for seed in (0, 0, 1):
        model, *rest = prepare(sequences)
        torch.manual_seed(123 + len(ends))  # the previous state of the generator must not matter
        result = fit(model, *rest, FitOptions(epochs=3, batch=4, seed=seed))
        ends.append((weights(model), result.history))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert any(not torch.equal(value, ends[2][0][name]) for name, value in ends[0][0].items())


def test_the_fit_leaves_the_global_generator_alone(sequences):
    model, *rest = prepare(sequences)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fit(model, *rest, SETTINGS)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.long
def test_it_learns_and_keeps_the_best(sequences):
    model, *rest = prepare(sequences)
    result = fit(model, *rest, FitOptions(epochs=25, batch=4, lr=2e-2, patience=0))
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert result.best["accuracy"] >= 2 / 3  # a third by chance
    assert result.best["validation_loss"] == min(entry["validation_loss"] for entry in result.history)
    inputs, examples, _, held = rest
    losses = []
    for n in held:
        batch = examples.fetch(np.array([n]))
        x, _ = inputs(batch.x)
        losses.append(model.losses(model(torch.from_numpy(x)), None, torch.from_numpy(batch.y)).item())
    assert np.mean(losses) == pytest.approx(result.best["validation_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bidirectional": True, "pooling": "max"},
        {"cell": "gru", "pooling": "last"},
        {"every_step": True},
        {"task": "regress", "every_step": True, "cell": "rnn"},
        {"pooling": "none", "bidirectional": True},
        {"pooling": "none", "task": "regress"},
    ],
    ids=str,
)
def test_padding_changes_no_loss_and_no_gradient(sequences, rng, options):
    """A batch of several lengths has the losses, metrics and gradients of its sequences one by one."""
    classes, per_step = options.get("task") != "regress", options.get("pooling") == "none"
    if not classes:
        sequences = replace(sequences, labels=(), y=rng.normal(size=36).astype(np.float32))
    if per_step:
        y = [np.full(len(x), y) for x, y in zip(sequences.x, sequences.y, strict=True)]
        sequences = replace(sequences, y=y)
    sequences.x[0][1:, :] = np.nan  # a gap at the end, next to padding
    sequences.x[1][0, 2] = np.nan  # a channel with an indicator
    examples, chosen = Labelled(sequences), np.arange(12)
    inputs = Inputs.measure(examples, chosen, changes=classes)
    torch.manual_seed(0)
    more = {name: options.pop(name) for name in ("task", "targets") if name in options}
    architecture = Architecture((5, 4), **{"dropout": 0.0, "noise": 0.0, "offset": 0.0, **options})
    model = Model(inputs, len(CLASSES) if classes else 1, architecture, **more)
    data = Indexed(examples, inputs, chosen, chosen, 12, 0)
    (batch,) = data.epoch(0)
    assert len(np.unique(examples.lengths[chosen])) > 2
    assert batch.mask is not None
    assert np.isfinite(batch.x).all()

    def measured(one):
        x, y, weight, mask = (None if part is None else torch.from_numpy(part) for part in one)
        model.zero_grad()
        out = model(x, mask)
        loss = (model.losses(out, mask, y) * weight).sum()
        loss.backward()
        return [loss.detach(), *model.measure(out, mask, y, weight).values(), *(p.grad for p in model.parameters())]

    single = [measured(inputs.fill(examples.fetch(np.array([n])))) for n in chosen]
    for found, *parts in zip(measured(batch), *single, strict=True):
        torch.testing.assert_close(found, sum(parts), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_batches_of_one_length_each_is_refused_for_sequences_of_many(sequences, tmp_path):
    path = tmp_path / "run.ckpt"
    model, *rest = prepare(sequences)
    fit(model, *rest, FitOptions(epochs=1), checkpoint=path)
    state = torch.load(path, weights_only=True)
    del state["fingerprint"]["batches"]
    torch.save(state, path)
    with pytest.raises(UsageError, match=r"expected a checkpoint with batches of similar lengths.*, found None"):
        fit(model, *rest, FitOptions(epochs=1), checkpoint=path, resume=True)
    alike = replace(sequences, x=[x[:3] for x in sequences.x])
    model, *rest = prepare(alike)
    fit(model, *rest, FitOptions(epochs=1), checkpoint=path, overwrite=True)
    assert "batches" not in torch.load(path, weights_only=True)["fingerprint"]  # earlier checkpoints can be resumed


SLOW_CELLS = [pytest.param(cell, marks=pytest.mark.slow) for cell in ("rnn", "minlstm", "ligru", "slstm")]


@pytest.mark.long
@pytest.mark.parametrize("cell", ["gru", "mingru", *SLOW_CELLS])
def test_other_cells_learn_too(sequences, cell):
    model, *rest = prepare(sequences, cell=cell)
    result = fit(model, *rest, FitOptions(epochs=25, batch=4, lr=2e-2, patience=0))
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert result.best["accuracy"] >= 2 / 3
    with pytest.raises(UsageError, match=f"expected cell to be one of {', '.join(CELLS)}, got 'mlp'"):
        prepare(sequences, cell="mlp")


def test_early_stopping(sequences):
    model, *rest = prepare(sequences)
    result = fit(model, *rest, FitOptions(epochs=50, batch=4, lr=1e-9, patience=3))
    assert len(result.history) == result.best["epoch"] + 3


@pytest.mark.parametrize("at", [1, *(pytest.param(at, marks=pytest.mark.slow) for at in (9, 14)), 30])
def test_resume_after_ctrl_c_equals_an_uninterrupted_run(sequences, tmp_path, at):
    path = tmp_path / "run.ckpt"
    whole, *rest = prepare(sequences)
    expected = fit(whole, *rest, SETTINGS)

    broken, inputs, examples, kept, held = prepare(sequences)
    stopping = Raising(examples, at, lambda: signal.raise_signal(signal.SIGINT))
    first = fit(broken, inputs, stopping, kept, held, SETTINGS, checkpoint=path)
    assert first.interrupted
    assert len(first.history) < 4

    resumed, *rest = prepare(sequences, seed=99)
    second = fit(resumed, *rest, SETTINGS, checkpoint=path, resume=True)
    assert second.history == expected.history
    assert second.steps == expected.steps
    assert_same(weights(resumed), weights(whole))


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "every_step": True}, {"cell": "gru"}, {"cell": "rnn"}])
def test_inspecting_the_layers_changes_no_bit(sequences, options):
    plain, *rest = prepare(sequences, **options)
    expected = fit(plain, *rest, SETTINGS)
    looked, *rest = prepare(sequences, **options)
    result = fit(looked, *rest, SETTINGS, inspect=2)
    assert result.history == expected.history
    assert_same(weights(looked), weights(plain))
    assert expected.records == []
    assert [record.epoch for record in result.records] == [1, 3]
    names = [f"recurrent.{n}" for n in range(2)]
    if "bidirectional" in options:
        names = [f"{name}.{way}_layer" for name in names for way in ("forward", "backward")]
    assert list(result.records[0].layers) == names
    assert all(not layer._observers for layer in looked.modules() if isinstance(layer, layers.RNN))


def test_records_of_the_layers_continue_after_a_resume(sequences, tmp_path):
    path = tmp_path / "run.ckpt"
    whole, *rest = prepare(sequences)
    expected = fit(whole, *rest, SETTINGS, inspect=1)
    broken, inputs, examples, kept, held = prepare(sequences)
    stopping = Raising(examples, 14, lambda: signal.raise_signal(signal.SIGINT))
    first = fit(broken, inputs, stopping, kept, held, SETTINGS, checkpoint=path, inspect=1)
    assert first.interrupted
    assert 0 < len(first.records) < 4
    resumed, *rest = prepare(sequences, seed=99)
    second = fit(resumed, *rest, SETTINGS, checkpoint=path, resume=True, inspect=1)
    assert [record.epoch for record in second.records] == [1, 2, 3, 4]
    ended = len(first.records)  # the interrupted epoch is recorded in another batch
    for place in (*range(ended), *range(ended + 1, 4)):
        assert second.records[place].to_json() == expected.records[place].to_json()
    torch.save({**torch.load(path, weights_only=True), "records": [{"epoch": 1}]}, path)
    with pytest.raises(FormatError, match="the checkpoint doesn't fit this training"):
        fit(resumed, *rest, SETTINGS, checkpoint=path, resume=True)


def test_resume_after_a_crash_equals_an_uninterrupted_run(sequences, tmp_path):
    path = tmp_path / "run.ckpt"
    whole, *rest = prepare(sequences)
    expected = fit(whole, *rest, SETTINGS)

    def crash():
        raise OSError("the disk is gone")

    broken, inputs, examples, kept, held = prepare(sequences)
    with pytest.raises(OSError, match="gone"):
        fit(broken, inputs, Raising(examples, 30, crash), kept, held, SETTINGS, checkpoint=path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.ckpt"]
    resumed, *rest = prepare(sequences, seed=99)
    second = fit(resumed, *rest, SETTINGS, checkpoint=path, resume=True)
    assert second.history == expected.history
    assert_same(weights(resumed), weights(whole))
    third = fit(resumed, *rest, SETTINGS, checkpoint=path, resume=True)  # nothing is left to do
    assert third.history == expected.history


def test_a_checkpoint_of_other_settings_is_refused(sequences, tmp_path):
    path = tmp_path / "run.ckpt"
    model, *rest = prepare(sequences)
    fit(model, *rest, FitOptions(epochs=1), checkpoint=path)
    with pytest.raises(ValueError, match=r"expected a checkpoint with lr 0.1, as in this training, found 0.005"):
        fit(model, *rest, FitOptions(epochs=1, lr=0.1), checkpoint=path, resume=True)


def changed(examples, at, **values):
    """The examples with one number of one of them changed."""
    other = copy.deepcopy(examples)
    for name, value in values.items():
        getattr(other, name)[at][...] = value
    return other


def test_a_checkpoint_of_another_model_or_other_data_is_refused(sequences, tmp_path):
    path = tmp_path / "run.ckpt"
    model, *rest = prepare(sequences)
    fit(model, *rest, FitOptions(epochs=1), checkpoint=path)
    inputs, examples, kept, held = rest
    relabelled = copy.deepcopy(examples)
    relabelled.y[0] = (relabelled.y[0] + 1) % 3
    heavier = copy.deepcopy(examples)
    heavier.weight[0] = 2
    others = [
        ("dropout", prepare(sequences, dropout=0.0)),
        ("pooling", prepare(sequences, pooling="mean")),
        ("every_step", prepare(sequences, every_step=True, pooling="max")),
        ("cell", prepare(sequences, cell="gru")),
        ("task", (Model(inputs, 3, Architecture((5, 4)), "regress"), *rest)),
        ("inputs", (model, replace(inputs, mean=inputs.mean + 1), *rest[1:])),
        ("inputs", (model, replace(inputs, scale=inputs.scale * 2), *rest[1:])),
        ("targets", (Model(inputs, 3, Architecture((5, 4)), targets=(np.ones(3), np.ones(3))), *rest)),
        ("training", (model, inputs, changed(examples, kept[0], x=0.5), kept, held)),
        ("training", (model, inputs, relabelled, kept, held)),
        ("training", (model, inputs, heavier, kept, held)),
        ("validation", (model, inputs, changed(examples, held[-1], x=0.5), kept, held)),
        ("training", (model, inputs, examples, np.roll(np.arange(36), 1)[:27], held)),
    ]
    for name, other in others:
        with pytest.raises(
            UsageError, match=rf"run\.ckpt: expected a checkpoint with {name} .*, as in this training"
        ) as error:
            fit(*other, FitOptions(epochs=1), checkpoint=path, resume=True)
        assert "\n" not in str(error.value)
    fit(model, *rest, FitOptions(epochs=1), checkpoint=path, resume=True)


def test_missing_values_don_t_change_the_digest_of_the_data(sequences, tmp_path):
    """NaN isn't equal to itself and has several bit patterns, but the data is the same."""
    path = tmp_path / "run.ckpt"
    for bits in (0x7FC00000, 0xFFC00001):
        sequences.x[3][1, 2] = np.array(bits, np.uint32).view(np.float32)
        model, *rest = prepare(sequences)
        fit(model, *rest, FitOptions(epochs=1), checkpoint=path, resume=True)


@pytest.mark.parametrize(
    "parts",
    [{}, {"fingerprint": 3}, {"position": [0]}, {"position": "0123"}, {"model": None}, {"optimizer": {}}, {"best": 1}],
    ids=str,
)
def test_a_checkpoint_that_lacks_a_part_is_a_format_error(sequences, tmp_path, parts):
    path = tmp_path / "run.ckpt"
    model, *rest = prepare(sequences)
    fit(model, *rest, FitOptions(epochs=1), checkpoint=path)
    state = torch.load(path, weights_only=True) if parts else {"cellstack_checkpoint": checkpoints.VERSION}
    torch.save({**state, **parts}, path)
    with pytest.raises(
        FormatError, match=r"run\.ckpt: the checkpoint (is damaged: its entry|doesn't fit this training)"
    ) as error:
        fit(model, *rest, FitOptions(epochs=1), checkpoint=path, resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["empty", "half", "bit", "other", "text"])
def test_a_damaged_checkpoint_is_a_format_error(tmp_path, damage):
    path = tmp_path / "run.ckpt"
    checkpoints.save(path, {"weights": torch.ones(1000)})
    whole = path.read_bytes()
    if damage == "other":
        torch.save({"weights": 1}, path)
    elif damage == "bit":
        path.write_bytes(whole.replace(b"\0\0\x80?\0\0\x80?", b"\0\0\x80?\0\1\x80?", 1))
    else:
        path.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "text": b"hello there"}[damage])
    with pytest.raises(
        FormatError,
        match=r"run\.ckpt: .*(expected a checkpoint of|checkpoint is damaged|can't be read as a checkpoint)",
    ):
        checkpoints.load(path)


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path / "run.ckpt"
    checkpoints.save(path, {"n": 1})
    whole = path.read_bytes()
    with pytest.raises(Exception, match=r"pickle|lambda"):
        checkpoints.save(path, {"n": lambda: None})
    assert path.read_bytes() == whole
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.ckpt"]


def test_training_continues_on_a_full_disk(sequences, tmp_path, monkeypatch):
    """The old checkpoint is intact; there is one warning; the weights equal those without checkpoints."""
    path = tmp_path / "run.ckpt"
    whole, *rest = prepare(sequences)
    expected = fit(whole, *rest, SETTINGS)
    wrote, sync = [], os.fsync

    def full(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            wrote.append(path.read_bytes() if path.exists() else b"")
            if len(wrote) > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    model, *rest = prepare(sequences)
    with pytest.warns(RuntimeWarning, match=r"training continues: .*run\.ckpt: No space left on device") as said:
        result = fit(model, *rest, SETTINGS, checkpoint=path)
    assert len(said) == 1
    assert result.checkpoint_error == f"{path}: No space left on device"
    assert result.history == expected.history
    assert_same(weights(model), weights(whole))
    assert len(wrote) == SETTINGS.epochs
    assert path.read_bytes() == wrote[1]
    assert len(checkpoints.load(path)["history"]) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.ckpt"]


def test_a_checkpoint_that_can_t_be_written_is_reported_before_the_first_step(sequences, tmp_path):
    model, inputs, examples, *parts = prepare(sequences)
    never = Raising(examples, 0, lambda: pytest.fail("a batch was fetched"))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        fit(model, inputs, never, *parts, SETTINGS, checkpoint=tmp_path / "no" / "run.ckpt")


def test_an_ignored_sigint_stays_ignored(sequences):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        model, inputs, examples, *parts = prepare(sequences)
        sends = Raising(examples, 3, lambda: signal.raise_signal(signal.SIGINT))
        assert not fit(model, inputs, sends, *parts, FitOptions(epochs=1, batch=4)).interrupted
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_stops_at_once_and_the_handler_comes_back(sequences):
    started_with = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    try:
        before = signal.getsignal(signal.SIGINT)
        interrupt_twice(sequences)
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, started_with)


def interrupt_twice(sequences):
    model, inputs, examples, kept, held = prepare(sequences)

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(model, inputs, Raising(examples, 3, twice), kept, held, SETTINGS)


def test_a_loss_that_explodes_is_an_error(sequences):
    model, *rest = prepare(sequences)
    with torch.no_grad():
        model.head.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"no longer finite in epoch 1"):
        fit(model, *rest, SETTINGS)
    with pytest.raises(ValueError, match="there are no examples to train on"):
        fit(model, rest[0], rest[1], np.arange(0), rest[3], SETTINGS)


def test_constraints_and_penalties_are_applied(sequences):
    from cellstack import layers

    model, *rest = prepare(sequences)
    layer = layers.LSTM(5, return_sequences=True, input_size=4, kernel_constraint="non_neg", kernel_regularizer="l2")
    model.recurrent[0] = layer
    fit(model, *rest, FitOptions(epochs=1, batch=4))
    assert (torch.from_numpy(layer.get_weights()[0]) >= 0).all()
    strong = []
    for factor in (None, "l2"):
        model, *rest = prepare(sequences)
        torch.manual_seed(0)
        layer = layers.LSTM(5, return_sequences=True, input_size=4, kernel_regularizer=factor)
        model.recurrent[0] = layer
        fit(model, *rest, FitOptions(epochs=1, batch=4))
        strong.append(layer.get_weights()[0])
    assert not np.array_equal(*strong)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "max", "last"])
@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("task", ["classify", "regress"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "mingru", "minlstm"])
@pytest.mark.parametrize("changes", [False, True])
def test_the_network_gives_the_model_s_outputs(rng, bidirectional, pooling, every_step, task, cell, changes):
    mean, scale = rng.normal(size=(2, 4)).astype(np.float32)
    targets = None if task == "classify" else (np.array([5.0, -2, 1]), np.array([2.0, 3, 0.5]))
    kernel = rng.normal(size=(2, 3, 4))
    inputs = Inputs(
        mean[:3],
        np.abs(scale[:3]) + 1,
        (1,),
        ChangeWeights(*map(np.float32, (kernel, [0.1, 0, 0, 0.2]))) if changes else None,
    )
    how = {"bidirectional": bidirectional, "pooling": pooling, "every_step": every_step}
    architecture = Architecture((5, 4), cell, **how)
    if bidirectional and every_step and pooling == "last":
        with pytest.raises(UsageError, match="every_step with pooling last isn't supported for bidirectional layers"):
            Model(inputs, 3, architecture, task, targets)
        return
    model = Model(inputs, 3, architecture, task, targets).eval()
    net = as_network(model, {})
    assert {held.spec.kind for held in net.cells} == {cell}
    x = rng.normal(size=(6, 7, 4)).astype(np.float32)
    used = rng.random((6, 7)) < 0.6
    used[0] = False
    used[1] = True
    for mask in (None, used):
        held = None if mask is None else torch.from_numpy(mask)
        with torch.no_grad():
            expected = model.answer(model(torch.from_numpy(x), held), held).numpy()
        np.testing.assert_allclose(net(x, mask=mask), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "MinLSTM"])
def test_last_of_both_directions_takes_the_final_states(rng, cell):
    """As in torch's h[-2] and h[-1], not the last step, at which the backward direction has read one step."""
    architecture = Architecture((4, 5), cell.lower(), bidirectional=True, pooling="last")
    model = Model(Inputs(np.zeros(3), np.ones(3)), 2, architecture).eval()
    net = Network(tuple(model.to_nodes()))
    assert not any(isinstance(node, GlobalPool) for node in net.nodes)
    x = rng.normal(size=(1, 6, 3)).astype(np.float32)
    _, ends = net.run(x)
    with torch.no_grad():
        final = torch.from_numpy(np.concatenate([ends[-2].h, ends[-1].h], axis=1))
        expected = model.head(final).softmax(-1).numpy()
    np.testing.assert_allclose(net(x), expected, atol=1e-6)


def test_missing_targets_don_t_count(sequences):
    """The value of a target with weight 0 doesn't matter: gradients, and so the weights, are the same."""
    ends = []
    for value in (0.0, 1e6):
        y = np.stack([np.arange(36, dtype=np.float32) % 3, np.full(36, value, np.float32)], axis=1)
        examples = Labelled(sequences)
        examples.y, examples.weight = y, np.stack([np.ones(36), np.zeros(36)], axis=1).astype(np.float32)
        inputs = Inputs.measure(examples, np.arange(27))
        torch.manual_seed(0)
        model = Model(inputs, 2, Architecture((4,), dropout=0.0), "regress")
        fit(model, inputs, examples, np.arange(27), np.arange(27, 36), FitOptions(epochs=1))
        ends.append(weights(model))
    assert_same(*ends)


def test_the_bar_shows_epoch_loss_metric_and_time_left(sequences, capsys):
    model, *rest = prepare(sequences)
    fit(model, *rest, SETTINGS, progress=True)
    shown = capsys.readouterr().err
    for part in ("epoch 1/4", ", loss 1.", "; validation loss 1.", ", accuracy ", "<00:00"):
        assert part in shown


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch", 0),
        ("lr", 0.0),
        ("clip", -1.0),
        ("seed", 2**63),
        *((name, value) for name in ("lr", "clip", "noise", "offset") for value in (-0.1, np.nan, np.inf, -np.inf)),
    ],
)
def test_settings_out_of_range(name, value):
    record = Architecture if name in ("noise", "offset") else FitOptions
    with pytest.raises(UsageError, match=f"expected {name} .*got {value}"):
        record(**{name: value})


@pytest.mark.long
def test_ctrl_c_in_a_terminal_keeps_the_best(tmp_path):
    """A SIGINT to a `cellstack train` process: it stops soon, reports that, and writes a network that runs."""
    from importlib.resources import files

    data = files("cellstack_demo") / "data" / "JapaneseVowels_TRAIN.ts"
    output, checkpoint = tmp_path / "net.safetensors", tmp_path / "run.ckpt"
    command = [sys.executable, "-m", "cellstack", "train", str(data), "-o", str(output), "--units", "8"]
    command += ["--epochs", "100000", "--patience", "0", "--threads", "1", "--checkpoint", str(checkpoint), "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "stopped by Ctrl-C" in out
    assert "Traceback" not in err
    from cellstack import load

    assert load(output)(np.zeros((1, 3, 12))).shape == (1, 9)
    assert checkpoints.load(checkpoint)["history"]


# ── checkpoints ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_existing_checkpoint_is_not_overwritten_by_default(sequences, tmp_path):
    path = tmp_path / "run.ckpt"
    model, *rest = prepare(sequences)
    fit(model, *rest, FitOptions(epochs=1), checkpoint=path)
    whole = path.read_bytes()
    with pytest.raises(UsageError, match=r"run\.ckpt: the checkpoint already exists: `resume=True` continues"):
        fit(model, *rest, FitOptions(epochs=1), checkpoint=path)
    assert path.read_bytes() == whole
    path.write_bytes(b"something else")
    fit(prepare(sequences)[0], *rest, FitOptions(epochs=2), checkpoint=path, overwrite=True)
    assert len(checkpoints.load(path)["history"]) == 2


@pytest.mark.long
def test_more_epochs_after_a_resume(sequences, tmp_path):
    """The learning rate is that of a run of as many epochs; with fewer than were done there is nothing to do."""
    path = tmp_path / "run.ckpt"
    model, *rest = prepare(sequences)
    fit(model, *rest, FitOptions(epochs=3, batch=4), checkpoint=path)
    result = fit(model, *rest, FitOptions(epochs=8, batch=4), checkpoint=path, resume=True)
    straight = fit(prepare(sequences)[0], *rest, FitOptions(epochs=8, batch=4))
    rates, expected = ([entry["lr"] for entry in one.history] for one in (result, straight))
    assert len(rates) == 8
    assert rates[3:] == pytest.approx(expected[3:], rel=1e-12)
    assert rates[:3] != pytest.approx(expected[:3], rel=1e-3)
    assert result.resumed == 3
    assert result.notes == [
        "the checkpoint is of a training of 3 epochs: from epoch 4 on, the learning rate is that of a training of 8 "
        "epochs, now 0.00347"
    ]
    again = fit(model, *rest, FitOptions(epochs=2, batch=4), checkpoint=path, resume=True)
    assert again.history == result.history
    assert again.stopped == "epochs"


def test_a_user_s_scheduler_and_optimizer_are_resumed_too(sequences, tmp_path):
    path = tmp_path / "run.ckpt"
    how = {
        "optimizer": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    }
    whole, *rest = prepare(sequences)
    expected = fit(whole, *rest, SETTINGS, **how)
    broken, *_ = prepare(sequences)
    fit(broken, *rest, SETTINGS, checkpoint=path, callbacks=[lambda epoch: epoch.entry["epoch"] == 2], **how)
    resumed, *_ = prepare(sequences, seed=99)
    second = fit(resumed, *rest, SETTINGS, checkpoint=path, resume=True, **how)
    assert second.history == expected.history
    assert_same(weights(resumed), weights(whole))
    with pytest.raises(UsageError, match="expected a checkpoint with optimizer Adam, as in this training, found SGD"):
        fit(resumed, *rest, SETTINGS, checkpoint=path, resume=True)


def test_a_run_that_a_callback_stopped_stays_stopped(sequences, tmp_path):
    ends = lambda epoch: epoch.entry["epoch"] >= 2  # noqa: E731

    def train(epochs, *callbacks):
        model, *rest = prepare(sequences)
        how = {"checkpoint": tmp_path / "run.ckpt", "resume": True, "callbacks": callbacks}
        return weights(model), fit(model, *rest, FitOptions(epochs=epochs, batch=4), **how)

    (_, once), (_, again) = train(4, ends), train(4, ends)
    assert (again.stopped, again.history, again.steps) == ("callback", once.history, once.steps)
    assert len(train(5, ends)[1].history) == 3  # more epochs
    assert len(train(5)[1].history) == 5


def test_what_a_callback_adds_is_in_the_history_and_the_checkpoint(sequences, tmp_path):
    path = tmp_path / "run.ckpt"
    model, *rest = prepare(sequences)

    def add(epoch):
        assert not epoch.model.training
        epoch.entry["said"] = f"epoch {epoch.entry['epoch']} of {len(epoch.fit.history)}"

    result = fit(model, *rest, FitOptions(epochs=2), checkpoint=path, callbacks=[add])
    assert [entry["said"] for entry in result.history] == ["epoch 1 of 1", "epoch 2 of 2"]
    assert checkpoints.load(path)["history"] == result.history


KILLED = """
import os, sys
import numpy as np
from cellstack import train
from cellstack.train import examples
rng = np.random.default_rng(0)
x, y = rng.normal(size=(40, 6, 2)), np.tile(["a", "b"], 20)
path, kill = sys.argv[1], int(sys.argv[2])
fetch, count = examples.Labelled.fetch, 0
def dying(self, indices):
    global count
    count += 1
    if count == kill:
        os.kill(os.getpid(), 9)
    return fetch(self, indices)
examples.Labelled.fetch = dying
result = train.fit(x, y, units=4, epochs=4, batch=4, checkpoint=path, resume=True, threads=1)
print(result.history, result.network(x.astype(np.float32)).tobytes().hex())
"""


@pytest.mark.slow
def test_a_run_killed_within_an_epoch_is_resumed(tmp_path):
    ends = []
    for name, kills in (("whole", [0]), ("killed", [27, 0])):  # the 27th batch is one of the third epoch
        for kill in kills:
            command = [sys.executable, "-c", KILLED, str(tmp_path / name), str(kill)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr
            assert (tmp_path / name).exists()
        ends.append(done.stdout)
    assert ends[0] == ends[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


# ── a model that carries its state from batch to batch ──────────────────────────────────────────────────────────────


class Carrying(torch.nn.Module):
    """Sums up its inputs with a GRU cell whose state is carried from batch to batch."""

    def __init__(self):
        super().__init__()
        self.cell, self.head, self.carried = torch.nn.GRUCell(1, 3), torch.nn.Linear(3, 1), None
        self.seen = []

    def forward(self, x, mask):
        state = torch.zeros(len(x["values"]), 3) if self.carried is None else self.carried[0]["h"]
        self.seen.append((self.training, self.carried is None))
        assert not state.requires_grad
        for step in x["values"].unbind(1):
            state = self.cell(step, state)
        self.carried = ({"h": state},)
        return self.head(state)

    def losses(self, out, mask, y):
        return (out - y).square()

    def measure(self, out, mask, y, weight):
        return {"off": (out - y).abs().sum()}

    def measured(self, sums):
        return {"off": sums["off"]}

    def describe(self):
        return {"kind": "carrying"}


class Stripes:
    """Two parallel streams, cut into batches in a fixed order."""

    steps, validates = 5, True

    def __init__(self, stop_at=None):
        self.left, self.stop_at = 0, stop_at
        self.x = np.random.default_rng(0).normal(size=(2, 24, 1)).astype(np.float32)

    def batch(self, part):
        x = self.x[:, 4 * part : 4 * part + 4]
        return custom.Batch({"values": x}, x.sum(1), np.ones((2, 1), np.float32))

    def epoch(self, number, first=0):
        for part in range(first, 5):
            if (number, part) == self.stop_at:
                signal.raise_signal(signal.SIGINT)
            yield self.batch(part)

    def held(self):
        yield self.batch(5)

    def describe(self):
        return {"training": "stripes"}


@pytest.mark.parametrize("stop_at", [(0, 2), (1, 0), (2, 4)])
def test_a_carried_state_is_part_of_the_checkpoint(tmp_path, stop_at):
    path, settings = tmp_path / "run.ckpt", FitOptions(epochs=4, lr=1e-2, threads=1)

    def made():
        torch.manual_seed(0)
        return Carrying()

    whole = made()
    expected = learn(whole, Stripes(), settings)
    began = [fresh for training, fresh in whole.seen if training]
    assert began == [True, False, False, False, False] * 4  # reset at the start of an epoch
    assert all(fresh for training, fresh in whole.seen if not training)
    broken = made()
    first = learn(broken, Stripes(stop_at), replace(settings, checkpoint=path))
    assert first.stopped == "ctrl-c"
    resumed = made()
    with torch.no_grad():
        resumed.head.weight.zero_()
    second = learn(resumed, Stripes(), replace(settings, checkpoint=path, resume=True))
    assert second.history == expected.history
    assert_same(weights(resumed), weights(whole))


def test_data_that_ends_early_is_an_error():
    class Short(Stripes):
        steps = 6

    with pytest.raises(UsageError, match="expected 6 batches in every epoch, got 5 in epoch 1"):
        learn(Carrying(), Short(), FitOptions(epochs=1, threads=1))


# ── threads ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("one", "two", "taken"), [(1.0, 0.95, 1), (1.0, 0.5, 2), (1.0, 20.0, 1)])
def test_the_faster_number_of_threads_is_taken(monkeypatch, two_threads, one, two, taken):
    from cellstack.train import threads

    clock = [0.0]
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])

    def step():
        clock[0] += {1: one, 2: two}[torch.get_num_threads()]

    took = threads.fastest([step, step], left=1000)
    assert took == {1: pytest.approx(one), 2: pytest.approx(two)}
    assert torch.get_num_threads() == taken
    torch.set_num_threads(2)
    assert threads.fastest([step], left=2) == {1: one}  # too short to measure
    assert torch.get_num_threads() == 1


@pytest.mark.long
def test_measuring_changes_no_bit_and_restores_torch_s_threads(sequences, monkeypatch, two_threads):
    from cellstack.train import threads

    monkeypatch.setattr(threads, "LONG", 0.0)  # measure even short fits
    monkeypatch.setattr(threads, "WORTH", 1e9)  # and choose one thread
    monkeypatch.setattr(threads, "AT_MOST", 0.0)
    plain, *rest = prepare(sequences)
    expected = fit(plain, *rest, SETTINGS, threads=1, inspect=1)
    measured, *rest = prepare(sequences)
    measured.head = torch.nn.Sequential(measured.head, torch.nn.BatchNorm1d(3, affine=False))
    plain.head = torch.nn.Sequential(prepare(sequences)[0].head, torch.nn.BatchNorm1d(3, affine=False))
    plain.load_state_dict(measured.state_dict())
    expected = fit(plain, *rest, SETTINGS, threads=1, inspect=1)
    result = fit(measured, *rest, SETTINGS, inspect=1)
    assert set(result.timed) == {1, 2}
    assert result.threads == expected.threads == 1
    assert result.history == expected.history
    assert [one.to_json() for one in result.records] == [one.to_json() for one in expected.records]
    assert_same(weights(measured), weights(plain))
    assert torch.get_num_threads() == 2


def test_a_resumed_run_takes_the_threads_of_its_checkpoint(sequences, tmp_path, two_threads):
    path = tmp_path / "run.ckpt"
    model, *rest = prepare(sequences)
    for asked, used in ((1, 1), (None, 1), (2, 2), (None, 2)):
        result = fit(model, *rest, FitOptions(epochs=1), checkpoint=path, resume=True, threads=asked)
        assert result.threads == used
        if asked == 2:
            state = torch.load(path, weights_only=True)
            torch.save({**state, "threads": 2}, path)


def test_a_network_sees_changes_and_holds_values_over_gaps(rng, tmp_path):
    """Its input stays the raw values; the change at a gap is 0, after it the one since the last observed value."""
    x = [rng.normal(size=(8, 2)).astype(np.float32).cumsum(0) for _ in range(24)]
    x[0][3], x[1][2:4, 0] = np.nan, np.nan
    y = np.arange(24) % 2
    result = train.fit(x, y, units=3, epochs=1, threads=1, baseline=False, validation=0)
    net = result.network
    steps = np.concatenate([[0], *(np.diff(one[~np.isnan(one[:, 0]), 0]) for one in x)])
    assert [*net.names] == ["standardise", "changes", "inputs", "layer_0", "pool", "head"]
    known = train.predict.trained(net, "net").inputs
    given, mask = known(x[1][None])
    assert mask is None
    np.testing.assert_array_equal(given[0, :, 0], np.where(np.isnan(x[1][:, 0]), x[1][1, 0], x[1][:, 0]))
    np.testing.assert_array_equal(given[0, :, 2], ~np.isnan(x[1][:, 0]))
    nodes = dict(zip(net.names, net.nodes, strict=True))
    moved = nodes["changes"].apply(nodes["standardise"].apply(given))[0]
    observed = x[1][~np.isnan(x[1][:, 0]), 0]
    np.testing.assert_allclose(moved[[2, 3], 0], 0, atol=1e-6)
    np.testing.assert_allclose(
        moved[[1, 4, 5, 6, 7], 0], np.tanh(np.diff(observed) / np.nanstd(steps)), rtol=1e-4, atol=1e-6
    )
    used = ~np.isnan(x[0]).all(1)
    np.testing.assert_allclose(result.predict([x[0]]).outputs, result.predict([x[0][used]]).outputs, rtol=1e-5)
    net.save(tmp_path / "net.safetensors")
    np.testing.assert_array_equal(load(tmp_path / "net.safetensors").predict(x).outputs, result.predict(x).outputs)
    assert train.fit(x, y, units=3, epochs=1, changes=False, baseline=False).network.names[1] == "layer_0"
    assert train.fit(x, y + 0.5, units=3, epochs=1, baseline=False).network.names[1] == "changes"
    assert train.fit(x, y + 0.5, units=3, epochs=1, every_step=True, baseline=False).network.names[1] == "layer_0"


@pytest.mark.long
def test_a_channel_that_spans_orders_of_magnitude_is_seen_in_finer_units(rng, tmp_path):
    """Where a few large sequences determine the standard deviation, the others are classified by their size."""
    size = np.array([1e-4, 1e-4, 3e-2, 3.0] * 15)
    x = [(factor * rng.normal(size=(12, 1)) + 7e-3).astype(np.float32) for factor in size]
    y = np.searchsorted([1e-3, 1.0], size)
    result = train.fit(x, y, units=16, threads=1, epochs=60, noise=0, offset=0, validation=0, baseline=False)
    net = result.network
    assert np.mean(result.predict(x).outputs.argmax(1) == y) > 0.9
    assert result.understood[-1] == "values span orders of magnitude, so also seen in finer units: channel 0"
    changes = net.nodes[1]
    assert changes.kernel.shape == (2, 1, 1 + 4 + 4)
    all_x, moves = np.concatenate(x), np.concatenate([np.zeros((1, 1)), *(np.diff(one, axis=0) for one in x)])
    unit = all_x.std() / 8 ** np.arange(1, 5)
    seen = changes.apply(net.nodes[0].apply(x[0][None]))[0]
    np.testing.assert_allclose(seen[:, 5:], np.tanh((x[0] - np.median(all_x)) / unit), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        seen[1:, :5], np.tanh(np.diff(x[0], axis=0) / (moves.std() / 8 ** np.arange(5))), rtol=1e-2, atol=1e-5
    )
    net.save(tmp_path / "net.safetensors")
    np.testing.assert_array_equal(load(tmp_path / "net.safetensors").predict(x).outputs, result.predict(x).outputs)
    again = train.fit(x, y, units=16, threads=1, epochs=1, init=net, validation=0, baseline=False)
    assert [*again.network.names] == [*net.names]


@pytest.mark.parametrize("steps", [[1], [1, 3]], ids=["one", "one or three"])
def test_sequences_of_one_step_have_no_changes(rng, steps):
    x = [rng.normal(size=(steps[n % len(steps)], 2)) for n in range(24)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = train.fit(x, np.arange(24) % 2, units=3, epochs=1, baseline=False)
    assert np.isfinite(result.predict(x).outputs).all()


@pytest.mark.parametrize("stride", [1, 3])
def test_a_convolution_before_the_layers(rng, tmp_path, stride):
    """Predictions don't depend on the other sequences of a batch, and a network continues from its weights."""
    x = [rng.normal(size=(n, 2)).astype(np.float32).cumsum(0) for n in rng.integers(9, 20, 24)]
    x[0][3], x[1][2:4, 0] = np.nan, np.nan
    y = np.arange(24) % 2
    how = {"units": 3, "filters": 5, "stride": stride, "threads": 1, "baseline": False}
    result = train.fit(x, y, epochs=2, **how)
    net = result.network
    assert [*net.names] == [
        "standardise",
        "changes",
        "inputs",
        "filters",
        "norm",
        "activation",
        "layer_0",
        "pool",
        "head",
    ]
    whole = result.predict(x).outputs
    np.testing.assert_allclose(np.concatenate([result.predict([one]).outputs for one in x]), whole, atol=1e-6)
    given, mask = train.predict.trained(net, "net").inputs(padded(x, np.nan))
    with torch.no_grad():
        out = result.model.eval()(torch.from_numpy(given), torch.from_numpy(mask))
    np.testing.assert_allclose(result.model.answer(out).numpy(), whole, atol=1e-6)
    net.save(tmp_path / "net.safetensors")
    np.testing.assert_array_equal(load(tmp_path / "net.safetensors").predict(x).outputs, whole)
    still = train.fit(x, y, epochs=1, lr=1e-12, init=net, **how | {"filters": None, "stride": None})
    np.testing.assert_allclose(still.predict(x).outputs, whole, atol=1e-5)
    with pytest.raises(UsageError, match="expected a convolution with"):
        train.fit(x, y, epochs=1, init=net, **how | {"filters": 4})


def test_a_stride_follows_from_the_length_and_refuses_outputs_per_step(rng):
    x, y = rng.normal(size=(8, 250, 1)), np.arange(8) % 2
    net = train.fit(x, y, units=2, epochs=1, baseline=False).network
    assert net.nodes[net.names.index("filters")].strides == 2
    with pytest.raises(UsageError, match="an output at every step needs stride 1"):
        train.fit(x, y, units=2, epochs=1, baseline=False, every_step=True, stride=2)
    with pytest.raises(UsageError, match="stride has no effect without a convolution"):
        train.fit(x[:, :20], y, units=2, epochs=1, baseline=False, stride=2)
    assert "filters" not in train.fit(x, y, units=2, epochs=1, baseline=False, filters=0).network.names


def test_few_validation_examples_do_not_select_the_epoch(rng):
    x, y = rng.normal(size=(40, 5, 2)), np.arange(40) % 2
    few = train.fit(x, y, units=3, epochs=12, patience=1, lr=0.05, baseline=False)
    assert few.fit.best["epoch"] == len(few.history) == 12
    assert "the last, as 6 validation examples can't select one; on the 6 validation examples: accuracy" in few.sentence
    many = train.fit(x, y, units=3, epochs=12, patience=1, lr=0.05, validation=0.5, baseline=False)
    assert many.fit.best["validation_loss"] == min(entry["validation_loss"] for entry in many.history)
    assert len(many.history) < 12
    assert "which also selected the epoch" in many.sentence
