"""Train networks to forecast a table, and compare their errors with those of simple rules.

The networks' outputs are added to exponential smoothing. The training part determines the parameters of the smoothing,
and these the seasons and the unit of the values. The validation part, the rows before the test part, determines the
best epoch of each network, the weight of the networks relative to the rule, and the shifts of the outer quantiles that
give them the right coverage. Then the smoothing is determined again and each network is trained from scratch, for as
many epochs, on the training and validation parts together, because the latest rows matter most for a forecast. If that
takes long, its training is continued instead, for a third of the epochs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from cellstack.formats import load_network
from cellstack.formats.files import check_replaceable
from cellstack.network import Network
from cellstack.train import history
from cellstack.train.checks import UsageError
from cellstack.train.examples import Inputs
from cellstack.train.fitting import Result, fitted
from cellstack.train.forecasting import backtest
from cellstack.train.forecasting.forecasts import Forecasts
from cellstack.train.forecasting.model import Calibration, Forecaster, as_network
from cellstack.train.forecasting.parts import OriginParts, WindowData, spread_out
from cellstack.train.forecasting.plan import plan, takes_long, understood
from cellstack.train.forecasting.plot import backtest_panels
from cellstack.train.forecasting.predict import forecasts_of, outputs
from cellstack.train.forecasting.prepare import MEASURED, prepared, refit_epochs, smoothings
from cellstack.train.forecasting.recipe import SMOOTHED, Recipe
from cellstack.train.forecasting.tirex import TiRexForecaster
from cellstack.train.forecasting.tirex_tables import medians
from cellstack.train.forecasting.windows import Windows
from cellstack.train.learner import Fit
from cellstack.train.locks import locked
from cellstack.train.options import Architecture, FitOptions, ForecastOptions
from cellstack.train.predict import predict
from cellstack.train.processes import is_first
from cellstack.train.progress import Bar, is_shown
from cellstack.train.sizes import check_memory
from cellstack.train.tables.table import Table, listed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
FEWEST = 50  # least number of points to determine the shift of a quantile
CONTINUED_RATE = 0.5  # share of the learning rate for continued training with the validation part


class Trained(NamedTuple):
    """A forecasting network and its training.

    Args:
        result: the network, and the fits of its members, with their histories concatenated.
        recipe: targets, inputs and windows.
        test: forecasts of the test part, None without one.
        understood: how the table was read, a sentence each.
    """

    result: Result
    recipe: Recipe
    test: backtest.Backtest | None
    understood: list[str]

    @property
    def network(self) -> Network:
        """The network, which runs without torch."""
        return self.result.network

    @property
    def scores(self) -> dict[str, Any]:
        """The errors of the network and its baselines on the test part; {} without one."""
        return self.result.scores

    def predict(self, data: Any, **options: Any) -> Forecasts:
        """Forecast the steps after the rows of a table with the network: see `Network.predict`."""
        return predict(self.network, data, **options)

    def plot(self) -> Figure:
        """Return a matplotlib figure: the losses of each network, and `test.plot()` if there is a test part.

        Raises:
            UsageError: matplotlib isn't installed.
        """
        curves = history.curves(self.result.history) if self.result.history else []
        return history.panels([*curves, *(backtest_panels(self.test) if self.test is not None else [])])

    def __repr__(self) -> str:
        """Describe the training in about five lines."""
        head = f"Trained: forecasts {listed(list(self.recipe.targets))} {self.recipe.horizon:,} steps ahead"
        lines = [self.result.described, *self.result.sentence.split("; ")]
        best = []
        for name, by_forecast in self.result.scores.get("targets", {}).items():
            mae = {key: errors["mae"] for key, errors in by_forecast.items() if key != "model"}
            best += [
                f"{name} {mae[key]:.4g} ({key})"
                for key in sorted(mae, key=lambda key: (np.isnan(mae[key]), mae[key]))[:1]
            ]
        lines += [f"the best baselines: {', '.join(best)}"] * bool(best)
        return "\n  ".join([head, *lines, self.result.fit.took])


def train_forecast(
    table: Table,
    request: ForecastOptions,
    build: Architecture,
    options: FitOptions,
    test: float = 0.2,
    recipe: Recipe | None = None,
    ready: tuple[Windows, OriginParts] | None = None,
) -> Trained:
    """Train on each series' earlier rows, and measure the errors of forecasts in its last rows.

    Args:
        table: the series.
        request: what to forecast.
        build: how the networks are built.
        options: how each is fitted; the validation part is between the training part and the test part.
        test: share of each series' last rows to test on; 0 for none.
        recipe: the result of `plan` for table and request, if already known.
        ready: the result of `prepared`, if already known.

    Raises:
        UsageError: a column that doesn't exist or is empty, too few rows, or a checkpoint that another training is
            writing; see `learn` for more.
    """
    if ready is None:
        recipe = recipe or plan(table, request, options.validation + test)
        ready = prepared(table, recipe, request, options.validation, test)
    windows, cut = ready
    pretrained = {} if options.pretrained is None or not is_first() else _pretrained(options, windows, cut)
    fits = _Fits(build, options, windows, cut)
    checkpoint, first = options.checkpoint, is_first()
    if checkpoint is not None and first:
        check_replaceable(str(fits.stage(0, whole=False).checkpoint))
    with locked(checkpoint if first else None), closing(fits.bar):  # for all members; each fit also locks its own
        members, calibration = fits.members()
    windows = fits.windows
    recipe = windows.recipe
    network = as_network(
        members,
        {
            "task": "forecast",
            "recipe": recipe.to_json(),
            "observed": list(fits.inputs.observed),
            "data": os.path.basename(table.path),
            "reading": table.reading,
        },
        calibration,
    )
    tested = None
    scores: dict[str, Any] = {}
    if len(cut.test) and fits.rank == 0:
        tested = measured(network, windows, fits.inputs, cut, pretrained)
        scores = tested.scores
    said = understood(table, recipe, request, cut)
    result = Result(
        network,
        nn.ModuleList(members),
        fits.whole,
        scores,
        fits.rank,
        len(fits.held),
        fits.summary(scores, calibration),
        said,
    )
    return Trained(result, recipe, tested, said)


def measured(
    network: Network, windows: Windows, inputs: Inputs, cut: OriginParts, pretrained: dict[str, Floats]
) -> backtest.Backtest:
    """Return the forecasts of a network and of its baselines on the test part: the rules, and `pretrained`."""
    table, recipe, typical = windows.table, windows.recipe, windows.typical
    assert typical is not None
    windows = Windows(recipe, table, backtest.origins(cut))
    forecasts = forecasts_of(network, inputs, windows)
    others = backtest.by_rules(table, windows) | pretrained
    actual = windows.actual(np.arange(len(windows.origins)))
    return backtest.Backtest(forecasts, actual, others, typical, windows.series)


def _pretrained(options: FitOptions, windows: Windows, cut: OriginParts) -> dict[str, Floats]:
    """Return the medians of the pretrained network on the test part, by its name."""
    if not len(cut.test):
        raise UsageError("`pretrained=…` has no effect without a test part, on which it is measured: see `test=…`")
    given = options.pretrained
    forecaster = TiRexForecaster(given if isinstance(given, Network) else load_network(given))
    name = f"{'TiRex-2' if forecaster.settings.second else 'TiRex'}, pretrained"
    return {name: medians(forecaster, Windows(windows.recipe, windows.table, backtest.origins(cut)), options.threads)}


class _Fits:
    """The fits of a training, and their combined result."""

    def __init__(self, build: Architecture, options: FitOptions, windows: Windows, cut: OriginParts):
        self.build, self.windows = build, windows
        self.kept = np.arange(len(cut.training))
        self.held = np.arange(len(cut.training), len(windows.origins))
        self.ends = cut.validation_ends
        self.inputs = Inputs.measure(windows, self.kept, MEASURED)
        self.scale = self._scale()
        self.long = takes_long(len(self.kept), int(windows.lengths[0]))
        self.whole, self.rank = Fit(), 0
        self.stops: list[str] = []
        most = [options.epochs] * build.members
        second = [refit_epochs(epochs, self.long) for epochs in most] if len(self.held) else []
        self.bar = Bar(is_shown(options.progress) and is_first(), most + second)
        self.options = replace(options, progress=self.bar)

    def summary(self, scores: dict[str, Any], calibration: Calibration | None) -> str:
        """Return why the fits stopped, which epochs were kept, what the networks add, and the errors in the test."""
        history, names = self.whole.history, {"epochs": "all", "patience": "early", "ctrl-c": "by Ctrl-C"}
        again = [0] * len(self.stops)
        for entry in history:
            if entry["whole"]:
                again[entry["member"] - 1] = entry["epoch"]
        done = [sum(entry["member"] == n + 1 and not entry["whole"] for entry in history) for n in range(len(again))]
        each = ", ".join(f"{n} ({names[how]})" for n, how in zip(done, self.stops, strict=False))
        parts = [f"trained {len(done)} {'networks' if len(done) > 1 else 'network'} for epochs: {each}"]
        if any(again):
            how = "trained further" if self.long else "again"
            parts.append(f"{how} with the validation part for {', '.join(map(str, again))}")
        recipe = self.windows.recipe
        if calibration is not None and not calibration.followed.all():
            alone = [name for name, weight in zip(recipe.targets, calibration.followed, strict=True) if not weight]
            rule = "exponential smoothing" if recipe.rule == SMOOTHED else "the latest value"
            parts.append(
                f"the networks don't clearly improve on {rule} in the validation part and have weight 0: the forecast "
                f"of {', '.join(alone)} is {rule} alone"
            )
        maes = [f"{name} {errors['model']['mae']:.4g}" for name, errors in scores.get("targets", {}).items()]
        what = f"mean absolute error on the test part: {', '.join(maes)}"
        return "; ".join([*parts, what if maes else "no data was held out to measure its accuracy on"])

    def _scale(self) -> Floats:
        """Return the scale of each target's outputs, `[targets]`: the mean absolute value in training, or 1."""
        some = self.windows.fetch(spread_out(self.kept, MEASURED))
        y, seen = (array.reshape(len(some.y), self.windows.recipe.horizon, -1) for array in (some.y, some.weight > 0))
        scale = np.abs(y).sum(axis=(0, 1)) / np.maximum(seen.sum(axis=(0, 1)), 1)
        return np.where(scale > 0, scale, 1.0)

    def fit(
        self,
        member: int,
        options: FitOptions,
        whole: bool = False,
        start: Forecaster | None = None,
        until: int | None = None,
    ) -> tuple[Forecaster, Fit]:
        """Fit one network.

        Args:
            member: its number, from 0.
            options: how to fit.
            whole: train on the training and validation parts, not only on the training part.
            start: model with the initial weights; None = random.
            until: stop after this epoch; the learning rate is that of all `options.epochs`.
        """
        inputs, windows, scale, build = self.inputs, self.windows, self.scale, self.build
        recipe = windows.recipe

        def make() -> Forecaster:
            model = Forecaster(inputs.standardise, scale, recipe.horizon, recipe.quantiles, build)
            if start is not None:
                model.load_state_dict(start.state_dict())
            return model

        check_memory(build, len(inputs.standardise[0]), len(scale))
        options = replace(options, seed=options.seed * self.build.members + member)
        if until is not None:
            options = replace(options, callbacks=[lambda epoch: epoch.entry["epoch"] >= until])
        everything = np.concatenate([self.kept, self.held])
        training, validation = (everything, self.held[:0]) if whole else (self.kept, self.held)
        data = WindowData(windows, inputs, training, validation, options.batch, options.seed)
        model, fit, self.rank = fitted(make, data, options)
        return model, fit

    def members(self) -> tuple[list[Forecaster], Calibration | None]:
        """Train the networks; return them, and the corrections of their outputs."""
        first: list[Forecaster] = []
        epochs: list[int] = []
        for member in range(self.build.members):
            model, fit = self.fit(member, self.stage(member, whole=False))
            self.join(fit, member)
            first.append(model)
            epochs.append(int(fit.best["epoch"]) if fit.best else 0)
            if fit.interrupted:
                break
        if not len(self.held):
            return first, None
        calibration = calibrated(first, self.windows, self.inputs, self.held)
        if self.whole.interrupted:
            return first, calibration
        before, self.windows = self.windows, self._smoothed_anew()
        if not calibration.followed.any():  # only the rule forecasts
            return first, calibration
        second: list[Forecaster] = []
        self.bar.expected = [refit_epochs(best, self.long) for best in epochs]
        for member, (model, best) in enumerate(zip(first, epochs, strict=True)):
            options = self.stage(member, whole=True)
            if self.long:
                options = replace(options, epochs=refit_epochs(best, self.long), lr=options.lr * CONTINUED_RATE)
                model, fit = self.fit(member, options, whole=True, start=model)
            else:
                model, fit = self.fit(member, options, whole=True, until=best)
            self.join(fit, member, whole=True)
            if fit.interrupted:  # all of the first ones are better than some of the second
                self.windows = before
                return first, calibration
            second.append(model)
        return second, calibration

    def _smoothed_anew(self) -> Windows:
        """Return the windows with the best smoothing for both parts."""
        windows = self.windows
        table, recipe, typical = windows.table, windows.recipe, windows.typical
        assert typical is not None
        fitted = smoothings(table, recipe, self.ends, typical) if recipe.smoothing else None
        if fitted is None:
            return windows
        return Windows(replace(recipe, smoothing=fitted[0]), table, windows.origins, typical)

    def stage(self, member: int, whole: bool) -> FitOptions:
        """Return the options of a member's fit: it has its own checkpoint; only the first fit is inspected."""
        checkpoint = self.options.checkpoint
        if checkpoint is not None:
            checkpoint = f"{os.fspath(checkpoint)}.{member + 1}{'-whole' * whole}"
        name = f"network {member + 1} of {self.build.members}{', with the validation part' * whole}"
        inspect = self.options.inspect and member == 0 and not whole
        return replace(self.options, checkpoint=checkpoint, inspect=inspect, name=name)

    def join(self, fit: Fit, member: int, whole: bool = False) -> None:
        """Add a fit to the combined result."""
        entries = [{"member": member + 1, "whole": whole} | entry for entry in fit.history]
        together = self.whole
        together.history += entries
        together.steps += fit.steps
        together.seconds += fit.seconds
        together.records += fit.records
        together.notes += [note for note in fit.notes if note not in together.notes]
        together.threads = fit.threads
        if not whole or fit.interrupted:
            together.stopped = fit.stopped
            self.stops.append(fit.stopped)
        together.checkpoint_error = fit.checkpoint_error or together.checkpoint_error
        if not whole and fit.best is not None:
            best = {"member": member + 1} | fit.best
            if together.best is None or best.get("validation_loss", 0) < together.best.get("validation_loss", 0):
                together.best = best


def calibrated(members: Sequence[Forecaster], windows: Windows, inputs: Inputs, held: Ints) -> Calibration:
    """Return the weight of the members' mean output, and the shifts of its quantiles.

    Ref: shifts of quantiles determined on held-out data: Romano et al. 2019, "Conformalized quantile regression".
    """
    recipe, some = windows.recipe, spread_out(held, MEASURED)
    network = as_network(members, {})
    out = outputs(network, inputs, windows, some)
    unit = windows.units(some).unit
    y = (windows.actual(some) - windows.reference(some)) / unit[:, None]
    weight = unit / windows.typical_of(some)
    middle = recipe.quantiles.index(0.5)
    followed = np.ones(len(recipe.targets))
    moved = np.zeros((len(recipe.targets), len(recipe.quantiles)))
    _, counts = np.unique(windows.series[some], return_counts=True)
    independent = float(np.maximum(counts / recipe.horizon, 1).sum())  # number of horizons that don't overlap
    for n in range(len(recipe.targets)):
        seen = ~np.isnan(y[..., n])
        if not seen.any():
            continue
        steps = np.linspace(0.0, 1.0, 11)
        median, weights = out[..., n, middle], np.broadcast_to(weight[:, None, n], seen.shape)
        errors = np.abs(y[..., n] - steps[:, None, None] * median) * weights  # [shares, B, horizon]
        followed[n] = steps[_smallest(np.where(seen, errors, 0.0).sum(-1), independent)]
        for q, level in enumerate(recipe.quantiles):
            if q == middle:
                continue
            if seen.sum() >= FEWEST:
                moved[n, q] = np.quantile((y[..., n] - followed[n] * out[..., n, q])[seen], level)
            else:  # too few: keep the network's distance from the median, although its weight is below 1
                moved[n, q] = (1 - followed[n]) * (out[..., n, q] - median)[seen].mean()
    return Calibration(followed, moved)


def _smallest(costs: Floats, independent: float) -> int:
    """Return the first row of `costs` `[N, B]` whose mean is within one standard error of the best.

    Ref: the one-standard-error rule: Breiman et al. 1984, "Classification and regression trees", section 3.4.3.
    """
    more = costs - costs[np.argmin(costs.mean(axis=1))]
    return int(np.argmax(more.mean(axis=1) <= more.std(axis=1) / np.sqrt(independent)))
