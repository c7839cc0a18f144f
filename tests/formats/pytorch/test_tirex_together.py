"""TiRex-2: series that are forecast together, with covariates: forecasts and streams agree with the package tirex-2."""

from io import StringIO

import numpy as np
import pandas as pd
import pytest
import tirex_cases as cases
import tirex_together
import tolerances

import cellstack as cs
from cellstack.cli.main import main
from cellstack.train import TiRexForecaster, UsageError

torch = pytest.importorskip("torch")
pytest.importorskip("tirex2")


def agree(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerances.TIREX * np.abs(expected).max())


@pytest.fixture(scope="module")
def model():
    return tirex_together.model_of({**cases.SECOND, "tta_diff": False})


@pytest.fixture(scope="module")
def forecaster(model):
    return TiRexForecaster(cs.load(model))


def rows(*shape):
    return np.random.default_rng(5).normal(size=shape).cumsum(axis=-1).astype(np.float32)


@pytest.mark.parametrize("seed", range(24))
def test_random_groups_with_random_covariates(seed):
    assert tirex_together.difference(seed) < tolerances.TIREX


def test_every_weight_of_the_mixers_matters(model, forecaster):
    targets, past, known = rows(1, 2, 40), rows(1, 2, 40), rows(1, 2, 48)
    whole = forecaster.forecast(targets, 8, past=past, known=known)
    for name, weight in model.named_parameters():
        if name.startswith("stack.0.") and ("variate_mixer" in name or "combination" in name):
            before = weight.detach().clone()
            with torch.no_grad():
                weight *= torch.linspace(0.5, 1.5, weight.shape[-1])
            changed = TiRexForecaster(cs.load(model)).forecast(targets, 8, past=past, known=known)
            assert np.abs(changed - whole).max() > 1e-3, name
            with torch.no_grad():
                weight[:] = before


def test_shapes_of_series_and_results(forecaster):
    x, past, known = rows(3, 40), rows(3, 2, 40), rows(3, 1, 50)
    assert forecaster.forecast(x, 8).shape == (3, 8, 5)
    each = forecaster.forecast(x, 8, past=past, known=known)
    agree(each, forecaster.forecast(x[:, None], 8, past=list(past), known=list(known))[:, 0])
    agree(each[1], forecaster.forecast(x[1], 8, past=past[1], known=known[1]))
    together = forecaster.forecast(x[None], 8)
    assert together.shape == (1, 3, 8, 5)
    assert np.abs(together[0] - forecaster.forecast(x, 8)).max() > 1e-3  # they influence each other
    parts = forecaster.forecast([x, x[:1], x[1:]], 8, past=[None, past[0], None])
    assert [part.shape for part in parts] == [(3, 8, 5), (1, 8, 5), (2, 8, 5)]
    agree(parts[0], together[0])
    agree(parts[1], forecaster.forecast(x[:1], 8, past=past[:1]))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_groups(forecaster, threads):
    groups, past, known = rows(3, 2, 40), rows(3, 1, 40), rows(3, 2, 48)
    alone = forecaster.forecast(groups, 8, past=past, known=known, threads=1)
    agree(forecaster.forecast(groups, 8, past=past, known=known, threads=threads), alone)


@pytest.mark.parametrize(("weights", "bound"), [("bfloat16", 3e-2), ("int8", 1.2e-1)])
def test_weights_with_fewer_bits(tmp_path, forecaster, weights, bound):
    groups, past, known = rows(2, 2, 40), rows(2, 1, 40), rows(2, 2, 48)
    exact = forecaster.forecast(groups, 8, past=past, known=known)
    found = TiRexForecaster(forecaster.network, weights).forecast(groups, 8, past=past, known=known)
    assert 0 < np.abs(found - exact).max() < bound * np.abs(exact).max()
    if weights == "bfloat16":
        forecaster.network.with_weights(weights).save(tmp_path / "net.safetensors")
        again = TiRexForecaster(cs.load(tmp_path / "net.safetensors"))
        np.testing.assert_array_equal(again.forecast(groups, 8, past=past, known=known), found)


def test_streams_repeat_full_forecasts_of_their_scaling(forecaster):
    groups, past = rows(2, 3, 32), rows(2, 2, 32)
    for given in ({}, {"past": past}):
        begun = {name: value[..., :20] for name, value in given.items()}
        stream = forecaster.stream(groups[..., :20], pad=False, **begun)
        agree(stream.forecast(9), forecaster.forecast(groups[..., :20], 9, pad=False, **begun))
        for at in range(20, 32, 4):
            next_past = {name: value[..., at : at + 4] for name, value in given.items()}
            stream.step(groups[..., at : at + 4], **next_past)
        again = forecaster.forecast(groups, 9, pad=False, scaling=stream.scaling, **given)
        agree(stream.forecast(9), again)
        agree(stream.forecast(9), again)  # a forecast doesn't change it
        assert stream.drift[0].shape == (2, 3)
        agree(stream.restarted().forecast(9), forecaster.forecast(groups, 9, pad=False, **given))


def test_a_stream_with_known_covariates_is_the_package_over_the_whole_sequence(model, forecaster):
    """After each patch, the median is that of the package's network over all patches, with the stream's scaling."""
    targets, known, ahead, quantile = rows(2, 2, 44), rows(2, 3, 44), 24, cases.QUANTILES.index(0.5)
    stream = forecaster.stream(targets[..., :20], known=known, pad=False)
    loc, scale, binary, _ = (torch.from_numpy(part) for part in stream.scaling)
    of_row = [row for group in stream.groups for part in group for row in part]
    scaling = loc[of_row].float(), scale[of_row].float(), binary[of_row]

    def scaled(x):
        z = (x - scaling[0]) / scaling[1]
        return torch.where(scaling[2], z, torch.arcsinh(z)), scaling

    agree(stream.forecast(8), forecaster.forecast(targets[..., :20], ahead, known=known, pad=False)[..., :8, :])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.scaler, "scale", scaled)
        for steps in range(20, 40, 4):
            x = np.full((2, 5, 44), np.nan, np.float32)
            x[:, :2, :steps], x[:, 2:] = targets[..., :steps], known
            batch = {
                "x": torch.from_numpy(x.reshape(10, 44)),
                "group_vector": torch.arange(2.0).repeat_interleave(5),
                "target_mask": torch.tensor([True, True, False, False, False] * 2),
            }
            with torch.no_grad():
                expected = model(batch).numpy().reshape(2, 5, len(cases.QUANTILES), -1)[:, :2, quantile]
            agree(stream.forecast(4)[..., quantile], expected[..., steps - cases.PATCH : steps][..., :4])
            stream.step(targets[..., steps : steps + 4])
    assert stream.restarted().forecast(4).shape == (2, 2, 4, 5)


def table(rows_of):
    """Return a frame of two shops of 40 days, without sales in the last 8 of `a`, and in the last 10 of `b`."""
    frame = pd.DataFrame({"shop": np.repeat(["b", "a"], 40), "day": [*pd.date_range("2024-01-01", periods=40)] * 2})
    for n, name in enumerate(("sales", "visits", "price", "rain")):
        frame[name] = rows_of[:, n].reshape(-1)
    frame.loc[[*range(30, 40), *range(72, 80)], ["sales", "visits", "rain"]] = np.nan
    return frame


def test_predict_of_a_frame(forecaster):
    x = rows(2, 4, 40).astype(np.float64)
    found = forecaster.predict(table(x), ["sales", "visits"], 8, inputs="rain", known="price", id="shop")
    assert list(found.ids) == ["b", "a"]
    for n, steps in enumerate((30, 32)):
        given = {"past": [x[n, 3:, :steps]], "known": [x[n, 2:3, : steps + 8]]}
        agree(found.values[n].swapaxes(0, 1), forecaster.forecast([x[n, :2, :steps]], 8, **given)[0])
    frame = found.to_frame()
    assert frame["day"].iloc[0] == pd.Timestamp("2024-01-31")
    assert list(frame.columns[:4]) == ["shop", "day", "sales", "sales_0.1"]
    earlier = forecaster.predict(table(x), "sales", 4, known=["price"], id="shop", origin="2024-01-20")
    assert np.isfinite(earlier.scores["sales"]["mae"])
    with pytest.warns(UserWarning, match="`price`, known in advance, has no value at 6 of 24 forecast steps"):
        forecaster.predict(table(x), "sales", 12, known="price", id="shop")
    with pytest.raises(UsageError, match="snow"):
        forecaster.predict(table(x), "sales", 8, inputs="snow", id="shop")


def test_the_command_forecasts_a_table(tmp_path, forecaster, capsys):
    x = rows(2, 4, 40).astype(np.float64)
    net, data = str(tmp_path / "tirex.safetensors"), str(tmp_path / "shops.csv")
    forecaster.network.save(net)
    table(x).to_csv(data, index=False)
    assert (
        main(["run", net, data, "--target", "sales,visits", "--horizon", "8", "--known", "price", "--id", "shop"]) == 0
    )
    found = pd.read_csv(StringIO(capsys.readouterr().out))
    expected = forecaster.predict(table(x), ["sales", "visits"], 8, known="price", id="shop").to_frame()
    agree(found["visits_0.1"], expected["visits_0.1"])
    assert main(["run", net, data, "--target", "sales"]) == 2
    assert "expected --horizon" in capsys.readouterr().err
    assert main(["run", net, data, "--horizon", "8"]) == 2
    assert "--horizon applies only to a TiRex, with --target" in capsys.readouterr().err


X = np.ones((2, 3, 9))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.forecast(X, 4, past=np.ones((2, 1, 8))), "expected past with the steps of series, got 8"),
        (lambda f: f.forecast(X, 4, known=np.ones((2, 1, 12))), "expected known to have at least 4 steps after .* 3"),
        (lambda f: f.forecast(X, 4, past=np.ones((1, 9))), r"expected past \[B, C, T\].* for 2 series or groups"),
        (lambda f: f.forecast(X, 4, past=[None, np.ones(9)]), r"expected past \[B, C, T\], .* got \(0, 9\) and \(9,\)"),
        (lambda f: f.forecast(X[0, 0], 4, past=np.ones(9)), r"expected past \[C, T\]"),
        (lambda f: f.forecast(X, 4, past=[None, [["a"] * 9]]), "expected past of numbers"),
        (lambda f: f.forecast([X[0], X[0, 0]], 4), "expected series"),
        (lambda f: f.stream(X, past=np.ones((2, 1, 9)), known=np.ones((2, 1, 17))), "past and known together aren't"),
        (lambda f: f.stream(X, known=[np.ones((1, 17)), np.ones((1, 13))]), "the same number of steps .* got 4, 8"),
        (lambda f: f.stream(X, known=np.ones((2, 1, 9))), "expected known to have .* one or more|1 or more"),
        (lambda f: f.stream(X, known=np.ones((2, 1, 17))).forecast(9), "expected horizon to be up to 8, as known is"),
        (
            lambda f: f.stream(X, known=np.ones((2, 1, 17))).step(np.ones((2, 3, 12))),
            "at most 8 observations, as known",
        ),
        (
            lambda f: f.stream(X, past=np.ones((2, 1, 9))).step(np.ones((2, 3, 4))),
            "expected 6 series and 2 of past of a multiple of 4 observations, got 6 series and 0 of past of 4",
        ),
        (lambda f: f.stream(X).step(np.ones((2, 2, 4))), "expected 6 series of a multiple of 4 .* got 4 series of 4"),
    ],
)
def test_wrong_covariates(forecaster, call, message):
    with pytest.raises(UsageError, match=message):
        call(forecaster)
