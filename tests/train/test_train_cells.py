"""Training with every cell by its name: heads, the mLSTM, and what is refused."""

import csv
import io
import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from cellstack import load, train
from cellstack.cli import main as cli
from cellstack.sklearn import SequenceClassifier, SequenceForecaster, SequenceRegressor
from cellstack.train import UsageError
from cellstack.train.cell_names import CELLS, WITH_HEADS
from cellstack.train.options import Architecture
from cellstack.train.recurrent import check_supported, recurrent_layers
from cellstack.train.sizes import size_of

SMALL = {"units": (4, 8), "epochs": 2, "threads": 1}
HEADS = [("slstm", 2), ("lstm", 4), ("mlstm", 2), ("mlstm", None)]


@pytest.fixture
def toy(rng):
    """40 sequences `[12, 3]` of two classes, one of them three times as loud."""
    x, y = rng.normal(size=(40, 12, 3)).astype(np.float32), np.tile(["calm", "busy"], 20)
    x[y == "busy"] *= 3
    return x, y


@pytest.mark.parametrize(("cell", "heads"), [*((cell, None) for cell in CELLS), *HEADS[:3]])
def test_the_layers_have_the_weights_that_were_announced(cell, heads):
    for both in (False, True)[: 1 + (cell != "mlstm")]:
        said = size_of(Architecture((8, 12), cell, heads, both), 3)
        stack = recurrent_layers(Architecture((8, 12), cell, heads, both), 3)
        assert said.weights == sum(parameter.numel() for parameter in stack.parameters())
        assert said.width == 12 * (1 + both)
    assert "of 2 heads 3 -> 8 -> 12" in size_of(Architecture((8, 12), cell="slstm", heads=2), 3).layers


@pytest.mark.parametrize(("cell", "heads"), HEADS)
def test_a_saved_network_runs_streams_and_starts_another_training(toy, tmp_path, cell, heads):
    x, y = toy
    result = train.fit(x, y, cell=cell, heads=heads, every_step=True, pooling="last", test=0.25, **SMALL)
    counts = {layer.heads if cell == "mlstm" else layer.cell.spec.heads for layer in result.model.recurrent}
    assert counts == {heads or 4}
    result.network.save(tmp_path / "net.safetensors")
    net = load(tmp_path / "net.safetensors")
    np.testing.assert_array_equal(net(x), result.network(x))
    with torch.no_grad():
        model = result.model.eval()
        np.testing.assert_allclose(net(x), model.answer(model(torch.from_numpy(x))), atol=1e-5)
    np.testing.assert_allclose(net.stream(40).run(x)[:, -1], net(x), atol=1e-5)
    how = {"cell": cell, "heads": heads, "every_step": True, "pooling": "last"}
    again = train.fit(x, y, init=tmp_path / "net.safetensors", lr=1e-12, **how, **SMALL)
    np.testing.assert_allclose(again.network(x), net(x), atol=1e-5)
    other = {"heads": 1} if heads is None else {"heads": 4 if heads == 2 else 2}
    with pytest.raises(UsageError, match="expected cell 0 with heads"):
        train.fit(x, y, init=net, **how | other, **SMALL)


def test_an_mlstm_is_described_with_its_nodes_named(toy):
    result = train.fit(*toy, cell="mlstm", **SMALL)
    assert result.network.names[3:7] == ("projection_3", "layer_0", "projection_5", "layer_1")
    assert "MLSTM of 4 heads" in result.described


@pytest.mark.long
def test_a_resumed_mlstm_equals_an_uninterrupted_one(toy, tmp_path):
    how = {"cell": "mlstm", "units": 8, "threads": 1, "checkpoint": tmp_path / "run.ckpt"}
    train.fit(*toy, epochs=3, callbacks=[lambda epoch: epoch.entry["epoch"] == 1], **how)
    resumed = train.fit(*toy, epochs=3, resume=True, **how)
    whole = train.fit(*toy, epochs=3, **how | {"checkpoint": None})
    assert resumed.history == whole.history
    with pytest.raises(UsageError, match=r"run\.ckpt: expected a checkpoint with"):
        train.fit(*toy, epochs=3, resume=True, **how | {"heads": 2})


def test_texts(tmp_path):
    how = {"units": 16, "batch": 4, "steps": 32, "threads": 1, "cell": "mlstm", "heads": 2, "scheduler": "constant"}
    text = "a rose is " * 100
    result = train.fit_text(text, epochs=4, **how)
    assert result.history[-1]["loss"] < 0.7 * result.history[0]["loss"]
    result.network.save(tmp_path / "net.safetensors")
    net = load(tmp_path / "net.safetensors")
    assert set("".join(train.generate(net, "a ro", length=9, seed=0))) <= set(text)
    model, x = result.model.eval(), torch.randint(len(net.metadata["characters"]), (2, 40))
    with torch.no_grad():
        model.carried = None
        parts = torch.cat([model(part) for part in x.split(16, dim=1)], dim=1)  # the state is carried between them
    np.testing.assert_allclose(net(x.numpy()), parts.softmax(-1), atol=1e-5)
    train.fit_text(text, epochs=2, checkpoint=tmp_path / "run.ckpt", **how)
    resumed = train.fit_text(text, epochs=4, checkpoint=tmp_path / "run.ckpt", resume=True, **how)
    assert resumed.history == result.history


@pytest.fixture
def sales(rng):
    month = np.arange(120)
    return pd.DataFrame({"sales": 10 + np.sin(month * np.pi / 6) + 0.1 * rng.normal(size=120)})


@pytest.mark.parametrize(("cell", "heads"), [("slstm", 2), ("mlstm", 2)])
def test_forecasts(sales, tmp_path, cell, heads):
    how = {"units": (4, 8), "members": 2, "epochs": 1, "threads": 1, "seasons": 12}
    trained = train.fit_forecast(sales, "sales", horizon=3, cell=cell, heads=heads, **how)
    trained.result.network.save(tmp_path / "net.safetensors")
    net = load(tmp_path / "net.safetensors")
    expected = np.asarray(trained.result.network.predict(sales).median)
    np.testing.assert_array_equal(net.predict(sales).median, expected)
    kinds = [type(node).__name__ for node in net.nodes]
    assert (kinds.count("MLSTM"), kinds.count("Recurrent")) == ((4, 0) if cell == "mlstm" else (0, 2))


@pytest.mark.long
def test_estimators(toy, sales):
    x, y = toy
    quick = {"units": 4, "epochs": 2, "random_state": 0, "heads": 2}
    assert SequenceClassifier(cell="slstm", **quick).fit(x, y).predict(x).shape == (40,)
    model = SequenceRegressor(cell="mlstm", bidirectional=False, **quick).fit(x, x.mean((1, 2)))
    assert model.predict(x).shape == (40,)
    assert SequenceForecaster(cell="mlstm", members=1, horizon=3, **quick).fit(sales).predict().shape == (3,)
    with pytest.raises(UsageError, match="cell mlstm runs forward only: expected bidirectional to be off"):
        SequenceClassifier(cell="mlstm", **quick).fit(x, y)


REFUSED = [
    ({"cell": "lstn"}, f"expected cell to be one of {', '.join(CELLS)}, got 'lstn'"),
    ({"cell": "mingru", "heads": 2}, f"cell mingru has no heads: expected none, or one of the cells {WITH_HEADS[0]}, "),
    ({"cell": "slstm", "heads": 0}, "expected heads to be an integer of at least 1, got 0"),
    ({"cell": "slstm", "heads": 2.0}, "expected heads to be an integer, got 2.0"),
    (
        {"cell": "slstm", "heads": 3, "units": (48, 32)},
        "expected heads to divide the units of every layer, got heads 3 and units 32: choose heads from 1, 2, 4, 8,",
    ),
    (
        {"cell": "mlstm", "units": (6,)},
        "got heads 4, the default of mlstm, and units 6: choose heads from 1, 2, 3, 6, or other units",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_layers_that_don_t_exist(options, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        Architecture(**{"units": (8,), **options})


def test_what_an_mlstm_doesn_t_support(toy):
    with pytest.raises(UsageError, match="cell mlstm can't be inspected in training"):
        train.fit(*toy, cell="mlstm", inspect=True, **SMALL)
    model = nn.Sequential(*recurrent_layers(Architecture((4,), "mlstm", 2), 3))
    with pytest.raises(UsageError, match="cell mlstm is trained on the CPU only: expected device cpu, got cuda"):
        check_supported(model, torch.device("cuda"), 0)
    check_supported(nn.Sequential(*recurrent_layers(Architecture((4,), "slstm", 2), 3)), torch.device("cuda"), 1)


def test_the_command_line(toy, tmp_path, capsys):
    x, y = toy
    np.savez(tmp_path / "toy.npz", x=x, y=y)
    words = [
        "train",
        str(tmp_path / "toy.npz"),
        "-o",
        str(tmp_path / "net"),
        "--units",
        "4",
        "--epochs",
        "2",
        "--quiet",
    ]
    assert cli.main([*words, "--threads", "1", "--cell", "mlstm", "--heads", "2"]) == 0
    assert "1 network: MLSTM of 2 heads 6 -> 4, " in capsys.readouterr().out
    assert cli.main(["run", str(tmp_path / "net"), str(tmp_path / "toy.npz")]) == 0
    assert len(list(csv.reader(io.StringIO(capsys.readouterr().out)))) == 41
    for more, message in (
        (["--cell", "mlstm", "--heads", "3"], "got heads 3 and units 4: choose heads from 1, 2, 4, or other units"),
        (["--cell", "minlstm", "--heads", "2"], "cell minlstm has no heads"),
        (["--cell", "mlstm", "--bidirectional"], "cell mlstm runs forward only"),
    ):
        assert cli.main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
