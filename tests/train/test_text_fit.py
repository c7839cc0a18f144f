"""Training a text model: the carried state, held-out parts, reproducibility, and results."""

import math
import signal
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch

from cellstack import Network, load
from cellstack.train import checkpoint as checkpoints
from cellstack.train import fit_text, generate
from cellstack.train.checks import UsageError
from cellstack.train.custom import Architecture, FitOptions, learn
from cellstack.train.text.data import Text, bits_per_character
from cellstack.train.text.model import Chunks, TextModel
from cellstack.train.text.workflow import adam, train_text

ALICE = (files("cellstack_demo") / "data" / "alice.txt").read_text(encoding="utf-8")[:2400]
SMALL = {"units": (10, 8), "embedding": 6, "steps": 16, "batch": 4, "threads": 1}
SETTINGS = FitOptions(epochs=3, batch=4, lr=5e-3, seed=3, patience=0)


def chunks(kind=Chunks, text=ALICE, batch=4, steps=16):
    whole = Text.of(text)
    return kind(whole, whole.parts(), batch, steps)


def made(seed=0, **options):
    torch.manual_seed(seed)
    return TextModel(len(set(ALICE)), Architecture((7, 6), **{"embedding": 5, **options}))


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# ── the model ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "options", [{}, {"embedding": 0}, {"cell": "gru"}, {"cell": "rnn"}], ids=["lstm", "one-hot", "gru", "rnn"]
)
def test_chunk_by_chunk_is_one_pass_and_the_network_is_the_model(options):
    model = made(**options).eval()
    data = chunks()
    batches = [torch.from_numpy(batch.x) for batch in data.epoch(0)]
    with torch.no_grad():
        parts = torch.cat([model(x) for x in batches], dim=1)
        model.carried = None
        whole = torch.cat(batches, dim=1)
        assert torch.equal(parts, model(whole))
    net = Network(model.to_nodes(), metadata=data.text.alphabet.metadata())
    ids = whole.numpy()
    given = ids if model.embedding is not None else np.eye(model.size, dtype="f4")[ids]
    np.testing.assert_allclose(net(given), parts.softmax(-1), atol=1e-6)
    np.testing.assert_allclose(net.stream(len(ids)).run(given[:, :20]), parts[:, :20].softmax(-1), atol=1e-6)


def test_the_state_is_carried_without_its_graph_and_reset_in_each_epoch():
    model, seen = made(), []

    class Watched(Chunks):
        def epoch(self, number, first=0):
            for batch in super().epoch(number, first):
                seen.append(model.carried)
                yield batch

    data = chunks(Watched)
    learn(model, data, replace(SETTINGS, epochs=2, threads=1))
    assert [n for n, state in enumerate(seen) if state is None] == [0, data.steps]
    assert not any(part.requires_grad for state in seen[1] for part in state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": ()}, "units to be integers of at least 1"),
        ({"units": (4, 0)}, "units to be integers of at least 1"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\)"),
        ({"cell": "elman"}, "cell to be one of lstm, gru, rnn"),
        ({"embedding": -1}, "expected embedding >= 0"),
        ({"steps": 0}, "steps >= 1"),
        ({"text": "short"}, "at least 200 characters"),
        ({"text": 5}, "a text as str or bytes, got int"),
        ({"validation": 0.6}, "together at most 0.5"),
    ],
)
def test_invalid_arguments_of_fit_text(options, message):
    with pytest.raises(UsageError, match=message):
        fit_text(**{"text": ALICE, **options})


# ── training ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
def test_train_and_measure():
    result = fit_text(ALICE, epochs=6, lr=1e-2, **SMALL)
    history = result.history
    assert [entry["epoch"] for entry in history] == list(range(1, 7))
    assert history[-1]["bits_per_character"] < history[0]["bits_per_character"] < math.log2(len(set(ALICE)))
    best = min(history, key=lambda entry: entry["validation_loss"])
    assert best["bits_per_character"] == pytest.approx(best["validation_loss"] / math.log(2))
    # The loop's result, in torch, equals the network's, in NumPy.
    assert result.scores["validation_bits_per_character"] == pytest.approx(best["bits_per_character"], rel=1e-5)
    text = Text.of(ALICE)
    last = text.ids[-120:]
    assert text.parts().test == (2280, 2400)
    assert result.scores["bits_per_character"] == pytest.approx(
        bits_per_character(result.network, text.ids, (2280, 2400)), rel=1e-6
    )
    assert bits_per_character(result.network, last) == pytest.approx(result.scores["bits_per_character"], abs=0.1)
    assert "on the test part: bits per character" in result.sentence
    assert all(len(entry["sample"]) == 80 for entry in history)
    assert set("".join(generate(result.network, "Alice", length=100))) <= set(ALICE)


def test_held_out_parts_are_not_trained_on():
    first = fit_text(ALICE, epochs=1, **SMALL)
    other = ALICE[:2160] + "".join(sorted(ALICE[2160:]))
    second = fit_text(other, epochs=1, **SMALL)
    assert_same(first.model.state_dict(), second.model.state_dict())
    assert first.scores != second.scores
    third = fit_text(ALICE[:100] + "e" + ALICE[101:], epochs=1, **SMALL)
    assert not torch.equal(first.model.head.weight, third.model.head.weight)


def test_bytes_one_hot_and_a_file(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(ALICE[:1000] + "é" * 20, encoding="utf-8")
    result = fit_text(path, epochs=1, **SMALL)
    assert "é" in result.network.metadata["characters"]
    assert result.network.metadata["data"] == "book.txt"
    result = fit_text(path.read_bytes(), epochs=1, **{**SMALL, "embedding": 0})
    assert result.network.input_size == 256
    assert result.network.metadata["characters"] is None
    result.network.save(tmp_path / "net.safetensors")
    net = load(tmp_path / "net.safetensors")
    written = [list(generate(each, "é", length=40, seed=1)) for each in (net, result.network)]
    assert written[0] == written[1]


class Stopping(Chunks):
    """Sends Ctrl-C as the n-th batch of all epochs is fetched."""

    at = 0

    def epoch(self, number, first=0):
        for n, batch in enumerate(super().epoch(number, first), number * self.steps + first):
            if n == self.at:
                signal.raise_signal(signal.SIGINT)
            yield batch


@pytest.mark.long
@pytest.mark.parametrize("at", [pytest.param(0, marks=pytest.mark.slow), 33, pytest.param(50, marks=pytest.mark.slow)])
def test_resume_after_ctrl_c_equals_an_uninterrupted_run(tmp_path, at):
    how = {"threads": 1, "optimizer": adam(SETTINGS.lr)}
    whole = made()
    unbroken = learn(whole, chunks(), replace(SETTINGS, **how))
    stopping, path = chunks(Stopping), tmp_path / "book.checkpoint"
    stopping.at = at
    assert stopping.steps == 34
    first = learn(made(), stopping, replace(SETTINGS, checkpoint=path, **how))
    assert first.interrupted
    state = checkpoints.load(path)
    assert state["position"][:2] == [(at + 1) // 34, (at + 1) % 34]
    assert [tuple(part.shape for part in layer) for layer in state["carried"]] == [((4, 7),) * 2, ((4, 6),) * 2]
    resumed = made(seed=99)
    second = learn(resumed, chunks(), replace(SETTINGS, checkpoint=path, resume=True, **how))
    assert second.history == unbroken.history
    assert_same(weights(resumed), weights(whole))
    with pytest.raises(UsageError, match="expected a checkpoint with truncated 8, as in this training, found 16"):
        learn(made(), chunks(steps=8), replace(SETTINGS, checkpoint=path, resume=True))
    with pytest.raises(UsageError, match="expected a checkpoint with characters 55, as in this training, found"):
        learn(TextModel(55, Architecture((7, 6))), chunks(), replace(SETTINGS, checkpoint=path, resume=True))
    with pytest.raises(UsageError, match=r"expected a checkpoint with text .*, as in this training"):
        learn(made(), chunks(text=ALICE[::-1]), replace(SETTINGS, checkpoint=path, resume=True))


@pytest.mark.long
def test_inspecting_and_progress_change_nothing(tmp_path):
    text, said = Text.of(ALICE), []
    built = Architecture((6,), embedding=4)
    runs = []
    for say, more in ((None, {}), (said.append, {"inspect": True})):
        options = replace(SETTINGS, steps=16, threads=1, **more)
        runs.append(train_text(text, text.parts(), built, options, say=say))
    assert_same(*(run.model.state_dict() for run in runs))
    assert len(runs[1].fit.records) == 3
    assert [line.split("  ")[0] for line in said] == ["epoch 1", "epoch 2", "epoch 3"]
    assert "bits per character" in said[0]
