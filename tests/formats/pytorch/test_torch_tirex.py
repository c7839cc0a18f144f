"""TiRex and TiRex-2: networks, files and forecasts agree with the packages tirex-ts and tirex-2; bad files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tirex_cases as cases
import tolerances
import torch
from safetensors.numpy import save_file

import cellstack as cs
from cellstack import train
from cellstack.cli.main import main
from cellstack.train import TiRexForecaster, UsageError

EXPECTED = np.load(Path(__file__).with_name("tirex.npz"))  # written by tirex_cases.py


def checkpoint(path, weights, settings=cases.FIRST):
    """Write a checkpoint of a TiRex as Lightning does, with the names that the published one has."""
    tensors = {name.replace("blocks.", "block_stack.blocks."): torch.from_numpy(w) for name, w in weights.items()}
    torch.save({"state_dict": tensors, "hyper_parameters": settings, "pytorch-lightning_version": "2.5"}, path)
    return path


def folder(path, weights, settings=cases.SECOND):
    """Write the folder of a TiRex-2, and return the file of weights."""
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(settings))
    return path / "model.safetensors"


def write(path, first, weights=None, settings=None):
    weights = weights or cases.weights(first)
    if first:
        return checkpoint(path / "model.ckpt", weights, settings or cases.FIRST)
    return folder(path, weights, settings or cases.SECOND)


@pytest.fixture(scope="module", params=[True, False], ids=["TiRex", "TiRex-2"])
def model(request, tmp_path_factory):
    return request.param, cs.load(write(tmp_path_factory.mktemp("tirex"), request.param))


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    return TiRexForecaster(cs.load(write(tmp_path_factory.mktemp("second"), False)))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return TiRexForecaster(cs.load(write(tmp_path_factory.mktemp("first"), True)))


def agree(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerances.TIREX * np.abs(expected).max())


def test_network_agrees_with_the_package(model):
    first, net = model
    agree(net(cases.tokens()), EXPECTED["first" if first else "second"])


def test_stream_takes_patches_one_by_one(model):
    first, net = model
    x, stream = cases.tokens(), net.stream(2)
    found = np.stack([stream.step(x[:, t]) for t in range(x.shape[1])], axis=1)
    agree(found, EXPECTED["first" if first else "second"])


def test_every_gate_matters(tmp_path, model):
    first, net = model
    weights, x = cases.weights(first), cases.tokens()
    names = [name for name in weights if "gate" in name and name.endswith("weight")]
    for name in names[:8]:
        changed = {**weights, name: weights[name] * np.float32(1.5)}
        other = cs.load(write(tmp_path, first, changed))
        assert np.abs(other(x) - net(x)).max() > 1e-3, name


@pytest.mark.parametrize("first", [True, False])
def test_one_head(tmp_path, monkeypatch, first):
    monkeypatch.setattr(cases, "HEADS", 1)
    settings = json.loads(
        json.dumps(cases.FIRST if first else cases.SECOND).replace('"num_heads": 4', '"num_heads": 1')
    )
    weights = cases.weights(first)
    net = cs.load(write(tmp_path, first, weights, settings))
    stored = next(array for name, array in weights.items() if name.endswith("_recurrent_kernel_"))
    np.testing.assert_array_equal(net.cells[0].recurrent_kernel, stored.reshape(cases.WIDTH, 4 * cases.WIDTH))


@pytest.mark.parametrize("steps", [10, 40])
@pytest.mark.parametrize("together", [1, 2])
def test_forecasts_of_the_first(first, steps, together):
    found = first.forecast(cases.series(steps), cases.HORIZON, together=together)
    agree(found, EXPECTED[f"first {steps} {together}"])


@pytest.mark.parametrize("steps", [10, 40])
def test_forecasts_of_the_second(second, steps):
    x = cases.series(steps)
    agree(second.forecast(x, cases.HORIZON), EXPECTED[f"second {steps}"])
    agree(second.forecast(x, cases.HORIZON, pad=False), EXPECTED[f"second {steps} short"])
    agree(second.forecast(x[1], cases.HORIZON), EXPECTED[f"second {steps}"][1])


def test_flipped_signs(tmp_path):
    forecaster = TiRexForecaster(cs.load(write(tmp_path, False, settings={**cases.SECOND, "tta_sign_flip": True})))
    found = forecaster.forecast(cases.series(40), cases.HORIZON)
    agree(found, EXPECTED["second 40 flip"])
    stream = forecaster.stream(cases.series(40))
    agree(stream.forecast(cases.HORIZON), EXPECTED["second 40 flip"])
    stream.step(cases.series(44)[:, 40:])
    assert len(stream.drift[0]) == 4
    agree(stream.restarted().forecast(4), forecaster.forecast(cases.series(44)[:, -32:], 4))


def test_stream_agrees_with_the_package_at_the_same_scale(second):
    x = cases.series(28)
    stream = second.stream(x[:, :20], pad=False)
    stream.step(x[:, 20:24])
    stream.step(x[:, 24:])
    agree(stream.forecast(cases.HORIZON), EXPECTED["second stream"])


def test_a_full_forecast_repeats_a_stream_without_padding_only(second):
    x = cases.series(32)
    for pad, steps in ((False, 20), (False, 18), (True, 20)):
        stream = second.stream(x[:, :steps], pad=pad)
        stream.step(x[:, steps : steps + 8])
        again = second.forecast(x[:, : steps + 8], cases.HORIZON, scaling=stream.scaling, pad=pad)
        if pad:  # of the model's context, 12 observations were missing, now 4
            assert np.abs(stream.forecast(cases.HORIZON) - again).max() > 1e-3
        else:
            agree(stream.forecast(cases.HORIZON), again)


def test_stream_agrees_with_a_full_forecast_at_the_same_scale(model):
    first, net = model
    forecaster = TiRexForecaster(net)
    x = cases.series(100)
    stream = forecaster.stream(x[:, :40])
    patches = -(-cases.HORIZON // cases.PATCH)
    options = {"together": patches} if first else {}
    agree(stream.forecast(cases.HORIZON), forecaster.forecast(x[:, :40], cases.HORIZON, **options))
    before = stream.forecast(cases.HORIZON)
    assert np.array_equal(stream.forecast(cases.HORIZON), before)  # a forecast doesn't change the stream
    one, several = forecaster.stream(x[:, :40]), forecaster.stream(x[:, :40])
    for start in range(40, 60, 4):
        one.step(x[:, start : start + 4])
    several.step(x[:, 40:60])
    agree(one.forecast(4), several.forecast(4))
    assert np.array_equal(one.last, several.last)


@pytest.mark.parametrize(("weights", "bound"), [("bfloat16", 3e-2), ("int8", 6e-2)])
def test_weights_with_fewer_bits(model, weights, bound):
    first, net = model
    x = cases.series(40)
    narrow = TiRexForecaster(net, weights)
    options = {"together": -(-cases.HORIZON // cases.PATCH)} if first else {}
    exact = TiRexForecaster(net).forecast(x, cases.HORIZON, **options)
    found = narrow.forecast(x, cases.HORIZON, **options)
    assert 0 < np.abs(found - exact).max() < bound * np.abs(exact).max()
    stream = narrow.stream(x)
    assert np.abs(stream.forecast(cases.HORIZON) - found).max() < bound * np.abs(exact).max()
    if weights == "bfloat16":
        stored = TiRexForecaster(net.with_weights(weights))
        np.testing.assert_array_equal(stored.forecast(x, cases.HORIZON, **options), found)


def test_drift_says_when_to_restart(second):
    calm = np.random.default_rng(3).normal(size=40)
    stream = second.stream(calm)
    offset, ratio = stream.drift
    assert np.abs(offset).max() < 1e-9
    assert np.abs(ratio - 1).max() < 1e-9
    stream.step(10 + 3 * np.random.default_rng(4).normal(size=32))
    offset, ratio = stream.drift
    assert 8 < offset[0] < 12
    assert 2 < ratio[0] < 5
    assert np.abs(stream.restarted().drift[0]).max() < 1e-9


def test_lists_of_series_of_different_lengths(second):
    x = cases.series(40)
    rows = [x[1, 30:], x[3, :35], x[0]]
    found = second.forecast(rows, 6)
    for row, own in zip(rows, found, strict=True):
        agree(own, second.forecast(row, 6))
    stream = second.stream(rows)
    stream.step(np.ones((3, 4)))
    assert stream.forecast(6).shape == stream.restarted().forecast(6).shape == (3, 6, 5)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(second, threads):
    series = np.random.default_rng(0).normal(size=(3, 40)).cumsum(axis=1)
    np.testing.assert_array_equal(second.forecast(series, 8, threads=threads), second.forecast(series, 8, threads=1))


def test_saved_in_the_native_format(tmp_path, model):
    _, net = model
    net.save(tmp_path / "own.safetensors")
    again = cs.load(tmp_path / "own.safetensors")
    assert np.array_equal(again(cases.tokens()), net(cases.tokens()))
    assert TiRexForecaster(again).settings == TiRexForecaster(net).settings


def edited(settings, path, value):
    """Return a copy of a configuration with another value at `path`; without the key where the value is KeyError."""
    copy = json.loads(json.dumps(settings))
    inside = copy
    for key in path[:-1]:
        inside = inside[key]
    if value is KeyError:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return copy


BLOCK = ("stack_config", "templates", "s", "time_mixer")


@pytest.mark.parametrize(
    ("first", "path", "value", "message"),
    [
        (True, ("model_config", "output_patch_size"), 8, "expected output_patch_size=4"),
        (True, ("model_config", "block_kwargs", "num_heads"), 5, "expected num_heads to divide embedding_dim=32"),
        (
            True,
            ("model_config", "block_kwargs", "num_blocks"),
            3,
            "expected a weight 'blocks.2.norm_slstm.weight', found none",
        ),
        (True, ("model_config", "block_kwargs", "num_blocks"), 1, "no place in the model: blocks.1.norm_slstm.weight"),
        (True, ("model_config", "quantiles"), [0.5, 0.1], "expected ascending quantiles with 0.5"),
        (True, ("train_ctx_len",), 30, "expected train_ctx_len to be a multiple of 4, found 30"),
        (False, ("num_blocks",), "3", "expected num_blocks to be of type int, found '3'"),
        (False, ("embedding_dim",), KeyError, "expected embedding_dim to be of type int, found None"),
        (False, ("embedding_dim",), -1, "expected embedding_dim to be positive"),
        (False, ("embedding_dim",), 64, "expected embedding_dim=64, found 32"),
        (False, ("new_part",), True, "'new_part' isn't supported"),
        (False, ("tokenizer_cfg", "input_patch_stride"), 2, "expected input_patch_stride=4"),
        (False, ("act_func",), "torch.nn.PReLU", "expected act_func among .*, found 'PReLU'"),
        (False, (*BLOCK, "model_type"), "bi-gru", "expected model_type bi-slstm or bi-mlstm, found 'bi-gru'"),
        (False, (*BLOCK, "conv1d_kernel_size"), 4, "'conv1d_kernel_size' isn't supported"),
        (
            False,
            (*BLOCK, "num_slstm_heads"),
            2,
            r"stack\.0.*fgate.weight: expected the shape \[2, 16, 16\], found \[4, 8, 8\]",
        ),
        (False, ("stack_config", "recipe"), ["s", "m"], "expected a recipe of 3 blocks, found 2"),
        (False, ("stack_config", "recipe"), ["s", "m", "x"], "templates: x: expected a dict, found None"),
        (False, ("future_len",), 25, "expected future_len to be a multiple of 4, found 25"),
    ],
)
def test_unsupported_configurations_are_refused_by_name(tmp_path, first, path, value, message):
    settings = edited(cases.FIRST if first else cases.SECOND, path, value)
    with pytest.raises(cs.FormatError, match=message):
        cs.load(write(tmp_path, first, settings=settings))


def test_missing_other_and_contradicting_weights_are_refused_by_name(tmp_path):
    weights = cases.weights(False)
    name = "stack.1.time_mixer.fwd_cell.q.weight"
    less = {other: array for other, array in weights.items() if other != name}
    with pytest.raises(cs.FormatError, match=f"expected a weight '{name}', found none"):
        cs.load(folder(tmp_path, less))
    with pytest.raises(cs.FormatError, match=r"these weights have no place in the model: stack\.9\.extra"):
        cs.load(folder(tmp_path, {**weights, "stack.9.extra": np.ones(3, np.float32)}))
    shared = name.replace("fwd_cell", "rev_cell")
    cs.load(folder(tmp_path, {**weights, shared: weights[name]}))
    with pytest.raises(cs.FormatError, match="which is the same weight"):
        cs.load(folder(tmp_path, {**weights, shared: weights[name] + 1}))


def test_a_missing_or_damaged_configuration(tmp_path):
    path = folder(tmp_path, cases.weights(False))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(cs.FormatError, match="expected JSON"):
        cs.load(path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(cs.FormatError, match=r"expected config\.json, the configuration of this TiRex-2, next to it"):
        cs.load(path)


def test_the_folder_of_both_files(tmp_path):
    net = cs.load(folder(tmp_path, cases.weights(False)))
    assert np.array_equal(cs.load(tmp_path)(cases.tokens()), net(cases.tokens()))


def test_a_state_dict_of_torch_next_to_its_configuration(tmp_path):
    net = cs.load(folder(tmp_path, cases.weights(False)))
    tensors = {name: torch.from_numpy(array) for name, array in cases.weights(False).items()}
    torch.save({"state_dict": tensors}, tmp_path / "model.ckpt")
    assert np.array_equal(cs.load(tmp_path / "model.ckpt")(cases.tokens()), net(cases.tokens()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.forecast(np.ones(9), 25), "expected horizon to be a count from 1 to 24, got 25"),
        (lambda f: f.forecast(np.ones(9), 0), "expected horizon"),
        (lambda f: f.forecast(np.ones(0), 4), "with T >= 1"),
        (lambda f: f.forecast([], 4), "with T >= 1"),
        (lambda f: f.forecast(np.ones((2, 3, 4, 5)), 4), "expected series"),
        (lambda f: f.forecast([1.0, np.inf], 4), "got infinite ones"),
        (lambda f: f.forecast([1.0, -1e200], 4), r"float32 can hold, up to 3.4e\+38, got one of size 1e\+200"),
        (lambda f: f.stream([1.0, np.nan, 1e39]), r"got one of size 1e\+39"),
        (lambda f: f.forecast([10**400], 3), "float32 can hold, .* got one of size more than 1e308"),
        (lambda f: f.forecast([[1, 2], [10**400]], 3), "float32 can hold, .* got one of size more than 1e308"),
        (lambda f: f.forecast(["a", "b"], 4), "expected series of numbers"),
        (lambda f: f.forecast(np.ones(9), 4, together=2), "only for a TiRex"),
        (lambda f: f.stream(np.ones(9)).step(np.ones(3)), "expected 1 series of a multiple of 4 observations"),
        (lambda f: f.stream(np.ones((2, 9))).step(np.ones(4)), "expected 2 series"),
        (lambda f: f.stream(np.ones(9)).forecast(25), "expected horizon"),
        (lambda f: f.forecast(None, 4), "expected series"),
        (lambda f: f.forecast(3.0, 4), "expected series"),
        (lambda f: f.forecast(np.ones(9) * 1j, 4), "complex numbers aren't supported"),
        (lambda f: f.forecast(pd.DataFrame({"a": np.ones(9), "b": np.ones(9)}), 4), "predict takes tables"),
        (lambda f: f.forecast(np.ones((3, 9)), 4, scaling=f.stream(np.ones(9)).scaling), "as many series"),
        (lambda f: f.forecast(np.ones(9), 4, scaling=(0.0, 1.0)), "expected scaling"),
    ],
)
def test_invalid_series_and_horizons(second, call, message):
    with pytest.raises(cs.train.UsageError, match=message):
        call(second)


def test_large_values_are_forecast_if_float32_can_hold_them_scaled(model):
    first, net = model
    forecaster = TiRexForecaster(net)
    large, small = np.array([1e38, -3e38, 2e38, 1e38]), np.full(9, 1e-3)
    assert np.isfinite(forecaster.forecast(large, 4)).all()
    stream = forecaster.stream(small)
    if not first:  # takes the arcsinh of scaled values
        stream.step(large)
        assert np.isfinite(stream.forecast(4)).all()
        return
    with pytest.raises(cs.train.UsageError, match="float32 can hold after scaling"):
        stream.step(large)
    np.testing.assert_array_equal(stream.forecast(4), forecaster.stream(small).forecast(4))
    with pytest.raises(cs.train.UsageError, match="float32 can hold after scaling"):
        forecaster.forecast(large, 4, scaling=stream.scaling)


@pytest.mark.parametrize("pad", ["no", 0, None])
def test_pad_has_to_be_a_bool(second, pad):
    for call in (lambda: second.forecast(np.ones(9), 4, pad=pad), lambda: second.stream(np.ones(9), pad=pad)):
        with pytest.raises(TypeError, match=f"TiRexForecaster: expected pad to be True or False, got {pad!r}"):
            call()


def test_masked_values_are_missing(second):
    x = cases.series(40)[0]
    missing = np.arange(40) % 5 == 0
    found = second.forecast(np.ma.masked_array(x, missing), np.int64(4))
    np.testing.assert_array_equal(found, second.forecast(np.where(missing, np.nan, x), 4))


def test_other_networks_are_refused():
    net = cs.Network([cs.nodes.Dense(np.ones((2, 2), np.float32))])
    with pytest.raises(cs.FormatError, match="expected a network of a TiRex or a TiRex-2"):
        TiRexForecaster(net)
    with pytest.raises(TypeError, match=r"expected a Network, as cellstack\.load\(path\) returns it, got int"):
        TiRexForecaster(3)  # type: ignore[arg-type]


def test_unknown_weights_are_refused(second):
    with pytest.raises(ValueError, match=r"TiRexForecaster: expected weights to be one of float32, .*, got 'int4'"):
        TiRexForecaster(second.network, "int4")


@pytest.mark.models
def test_the_packages_return_what_these_tests_expect(tmp_path):
    """Install both packages into a folder, and run `tirex_cases.py` with them."""
    needed = ("tirex-ts==1.4.2", "tirex-2==0.4.0", "flashrnn==1.0.8", "mlstm_kernels==2.0.6")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path / "own")]
    subprocess.run([*pip, "--no-deps", *needed], check=True)
    subprocess.run(
        [*pip, "--no-deps", "huggingface_hub<1", "requests", "urllib3", "charset_normalizer", "einops"], check=True
    )
    program = str(Path(__file__).parents[2] / "tirex_cases.py")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "own"), "TORCHDYNAMO_DISABLE": "1"}
    subprocess.run([sys.executable, program, str(tmp_path / "found.npz")], check=True, env=environment)
    found = np.load(tmp_path / "found.npz")
    assert set(found) == set(EXPECTED)
    for name in found:
        agree(found[name], EXPECTED[name])


def table():
    n = np.arange(80)
    rain = np.random.default_rng(3).random(80)
    days = pd.date_range("2026-01-01", periods=80)
    return pd.DataFrame({"day": days, "a": 5 + np.sin(n) + rain, "b": np.cos(n) - rain, "rain": rain})


QUICK = {"known": "rain", "units": 4, "members": 1, "epochs": 1, "threads": 1, "seasons": 7}


@pytest.mark.parametrize("kind", ["TiRex", "TiRex-2"])
def test_it_is_compared_with_a_network_that_is_trained(tmp_path, kind):
    file = write(tmp_path, kind == "TiRex")
    done = train.fit_forecast(table(), ["a", "b"], horizon=5, pretrained=file, **QUICK)
    errors, found = done.scores["targets"]["b"], done.test.baselines[f"{kind}, pretrained"]
    forecaster, origin = TiRexForecaster(cs.load(file)), "2026-03-16"
    if kind == "TiRex":  # each target by itself
        one = forecaster.predict(table(), "b", 5, origin=origin)
    else:
        one = forecaster.predict(table(), ["a", "b"], 5, known="rain", origin=origin)
    np.testing.assert_allclose(found[-1, :, 1], one.median[0, :, -1], rtol=1e-5)
    off = np.abs(done.test.actual - found)[..., 1]
    assert errors[f"{kind}, pretrained"]["mae"] == pytest.approx(off.mean())


@pytest.mark.long
def test_comparisons_that_cant_be_made_are_refused_before_the_training(second):
    with pytest.raises(UsageError, match="has no effect without a test part"):
        train.fit_forecast(table(), "a", test=0, pretrained=second.network, **QUICK)
    longer = pd.concat([table()] * 4, ignore_index=True).drop(columns="day")
    with pytest.raises(UsageError, match="expected horizon to be a count from 1 to 24, got 30"):
        train.fit_forecast(longer, "a", horizon=30, pretrained=second.network, **QUICK)


def test_the_command_compares_too(tmp_path, capsys):
    table().to_csv(tmp_path / "table.csv", index=False)
    arguments = ["--target", "a", "--units", "4", "--members", "1", "--epochs", "1", "--threads", "1"]
    file = str(write(tmp_path, False))
    assert (
        main(["train", str(tmp_path / "table.csv"), *arguments, "--pretrained", file, "-o", str(tmp_path / "a")]) == 0
    )
    assert "TiRex-2, pretrained" in capsys.readouterr().out
