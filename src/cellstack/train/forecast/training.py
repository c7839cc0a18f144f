"""From a table to a network that forecasts, and its errors beside those of simple rules.

Most choices are made on the validation part, the rows before the test part: the rule that outputs are added to, the
unit of the values, the epoch of each member, how far to follow the network rather than the rule, and by how much its
outer quantiles have to be moved to cover what they promise. Then each member is trained anew, for as many epochs, on
training and validation part together: the latest rows tell most of what comes next.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from cellstack.network import Network
from cellstack.train.checks import UsageError
from cellstack.train.examples import Inputs
from cellstack.train.fitting import Result, check_memory, fitted
from cellstack.train.forecast import backtest
from cellstack.train.forecast.model import Calibration, Forecaster, as_network
from cellstack.train.forecast.parts import Parts, WindowData, floors, parts, spread_out, typical_errors
from cellstack.train.forecast.plan import Request, plan
from cellstack.train.forecast.predict import forecasts_of, outputs
from cellstack.train.forecast.recipe import Recipe, Rule
from cellstack.train.forecast.windows import Windows
from cellstack.train.learner import Fit
from cellstack.train.settings import Architecture, Own, RunOptions, Settings
from cellstack.train.tables.table import Table

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MEASURED = 2048  # windows that scales are measured on
TRIED = 10  # epochs in which a recipe is tried
BETTER = 0.97  # of the usual recipe's error that another's must stay below
FEWEST = 50  # points by which a quantile is moved


@dataclass(frozen=True)
class Build:
    """How the networks are built.

    Args:
        units: width of each layer, bottom first.
        cell: what each layer is made of, `"lstm"`, `"gru"` or `"rnn"`.
        dropout: share of values dropped out after each layer in training.
        members: networks that are trained, each from a seed of its own, and averaged.

    Raises:
        UsageError: no member.
    """

    units: tuple[int, ...] = (48,)
    cell: str = "lstm"
    dropout: float = 0.1
    members: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.members <= 99:
            raise UsageError(f"expected members from 1 to 99, got {self.members}")


class Trained(NamedTuple):
    """A network that forecasts, and how it was come by.

    Args:
        result: the network, and what the fits of its members did: their histories one after the other.
        recipe: what is forecast from what.
        test: forecasts of the test part, None where there is none.
    """

    result: Result
    recipe: Recipe
    test: backtest.Backtest | None


def train_forecast(
    table: Table,
    request: Request,
    build: Build,
    settings: Settings,
    options: RunOptions,
    test: float = 0.2,
    rivals: bool = True,
) -> Trained:
    """Train on each series' earlier rows; measure by forecasts from origins in its last `test` of the rows.

    Args:
        table: the series.
        request: what is forecast from what.
        build: how the networks are built.
        settings: how each is fitted.
        options: how the training is run; the validation part lies between the training part and the test part.
        test: share of each series' rows to measure on; 0 for none.
        rivals: measure gradient boosting on lags too, where scikit-learn is installed.

    Raises:
        UsageError: a column that isn't there or holds nothing, or too few rows; see `learn` for more.
    """
    recipe = plan(table, request, options.validation + test)
    fits = _Fits(build, settings, options)
    windows, cut = fits.best(table, variants(table, recipe, request), test)
    members, calibration = fits.members(windows)
    recipe = windows.recipe
    network = as_network(
        members,
        {
            "task": "forecast",
            "recipe": recipe.to_json(),
            "observed": list(fits.inputs(windows).observed),
            "data": os.path.basename(table.path),
            "reading": table.reading,
        },
        calibration,
    )
    found = None
    scores: dict[str, Any] = {}
    if len(cut.test) and fits.rank == 0:
        found = measured(network, windows, fits.inputs(windows), cut, rivals)
        scores = found.scores
    result = Result(network, nn.ModuleList(members), fits.whole, scores, fits.rank, len(fits.held), fits.told(scores))
    return Trained(result, recipe, found)


def variants(table: Table, recipe: Recipe, request: Request) -> list[Recipe]:
    """Return what the validation part chooses from, the usual one first: what wasn't asked for may be another.

    The level is a unit of targets above 0 alone. A season that the window doesn't reach may do harm: what was a year
    before tells little of a series that changes, and its first year is lost to training.
    """
    found = [recipe]
    if request.scale is None and all(bool(np.nanmin(table.columns[name]) > 0) for name in recipe.targets):
        found.append(replace(recipe, scale="level"))
    if request.seasons is None and len(recipe.seasons) > 1 and recipe.seasons[-1] > recipe.window:
        found.append(replace(recipe, seasons=recipe.seasons[:-1]))
    return found


def prepared(table: Table, recipe: Recipe, validation: float, test: float) -> tuple[Windows, Parts]:
    """Return the windows of the training and then of the validation part, floors and rule measured; and the parts."""
    cut = parts(table, recipe, validation, test)
    typical = typical_errors(table, recipe, cut.ends)
    windows = Windows(recipe, table, np.concatenate([cut.training, cut.validation]), typical)
    kept, every = np.arange(len(cut.training)), np.arange(len(windows.origins))
    windows = windows.told(replace(recipe, floors=floors(windows, kept)))
    rule = best_rule(windows, every[len(kept) :] if len(cut.validation) else kept)
    return windows.told(replace(windows.recipe, rule=rule)), cut


def best_rule(windows: Windows, indices: Ints) -> Rule:
    """Return the rule whose forecasts are best by the series' typical errors, of the windows at `indices`."""
    recipe, some = windows.recipe, spread_out(indices, MEASURED)
    actual, typical = windows.actual(some), windows.typical_of(some)[:, None]
    errors = {}
    for rule in recipe.rules:
        said = np.stack([windows.rule(rule, n, some) for n in range(len(recipe.targets))], axis=-1)
        difference = np.abs(said - actual) / typical
        errors[rule] = float(np.nanmean(difference)) if np.isfinite(difference).any() else np.inf
    return min(errors, key=lambda rule: errors[rule])


def measured(network: Network, windows: Windows, inputs: Inputs, cut: Parts, rivals: bool) -> backtest.Backtest:
    """Return a network's forecasts of the test part beside those of its rivals."""
    table, recipe, typical = windows.table, windows.recipe, windows.typical
    assert typical is not None
    origins = spread_out(cut.test, backtest.MOST_ORIGINS)
    windows = Windows(recipe, table, origins)
    forecasts = forecasts_of(network, inputs, windows)
    others = backtest.by_rules(table, windows)
    if rivals:
        others |= backtest.by_boosting(table, recipe, origins, cut)
    return backtest.Backtest(forecasts, windows.actual(np.arange(len(origins))), others, typical, windows.series)


class _Fits:
    """The fits of a training, and what they did together."""

    def __init__(self, build: Build, settings: Settings, options: RunOptions):
        self.build, self.settings, self.options = build, settings, options
        self.whole, self.rank = Fit(), 0
        self.kept = self.held = np.empty(0, np.int64)
        self.measured: Inputs | None = None
        self.scale: Floats | None = None
        self.stops: list[str] = []

    def told(self, scores: dict[str, Any]) -> str:
        """Return what stopped the fits, which epochs are kept, and how well it does on what was never trained on."""
        history, names = self.whole.history, {"epochs": "all", "patience": "early", "ctrl-c": "by Ctrl-C"}
        kept = [0] * len(self.stops)
        for entry in history:
            if entry["whole"]:
                kept[entry["member"] - 1] = entry["epoch"]
        done = [sum(entry["member"] == n + 1 and not entry["whole"] for entry in history) for n in range(len(kept))]
        each = ", ".join(f"{n} ({names[how]})" for n, how in zip(done, self.stops, strict=False))
        parts = [f"trained {len(done)} {'networks' if len(done) > 1 else 'network'} for epochs: {each}"]
        if any(kept):
            parts.append(f"and anew, with the validation part, for {', '.join(map(str, kept))}")
        found = [f"{name} {errors['model']['mae']:.4g}" for name, errors in scores.get("targets", {}).items()]
        what = f"on the test part, which was never trained on, the mean absolute error of {', '.join(found)}"
        return "; ".join([*parts, what if found else "nothing was held out to measure it on"])

    def take(self, windows: Windows, cut: Parts) -> None:
        """Fit to these windows from now on."""
        self.kept = np.arange(len(cut.training))
        self.held = np.arange(len(cut.training), len(windows.origins))
        self.measured = self.scale = None

    def inputs(self, windows: Windows) -> Inputs:
        """Return what the training part says of the channels."""
        if self.measured is None:
            self.measured = Inputs.measure(windows, self.kept, MEASURED)
        return self.measured

    def outputs(self, windows: Windows) -> Floats:
        """Return the scale of each target's outputs, `[targets]`: the mean absolute one in the training part, or 1."""
        if self.scale is None:
            some = windows.fetch(spread_out(self.kept, MEASURED))
            y, seen = (array.reshape(len(some.y), windows.recipe.horizon, -1) for array in (some.y, some.weight > 0))
            scale = np.abs(y).sum(axis=(0, 1)) / np.maximum(seen.sum(axis=(0, 1)), 1)
            self.scale = np.where(scale > 0, scale, 1.0)
        return self.scale

    def fit(
        self, windows: Windows, member: int, settings: Settings, options: RunOptions, until: int | None = None
    ) -> tuple[Forecaster, Fit]:
        """Fit one network: on the training part, or, `until` an epoch, on the validation part as well."""
        inputs, recipe, build = self.inputs(windows), windows.recipe, self.build
        scale = self.outputs(windows)
        make = partial(
            Forecaster,
            inputs.standardise,
            scale,
            recipe.horizon,
            recipe.quantiles,
            build.units,
            build.cell,
            build.dropout,
        )
        check_memory(Architecture(build.units, cell=build.cell), len(inputs.standardise[0]), len(scale))
        settings = replace(settings, seed=settings.seed * self.build.members + member)
        everything = np.concatenate([self.kept, self.held])
        training, validation = (self.kept, self.held) if until is None else (everything, self.held[:0])
        data = WindowData(windows, inputs, training, validation, settings.batch, settings.seed)
        own = Own() if until is None else Own(callbacks=[lambda epoch: epoch.entry["epoch"] >= until])
        model, fit, self.rank = fitted(make, data, settings, options, own)
        return model, fit

    def best(self, table: Table, recipes: list[Recipe], test: float) -> tuple[Windows, Parts]:
        """Take the windows of the recipe that does best on the validation part after some epochs.

        Another than the first has to do clearly better.
        """
        validation = self.options.validation
        tried = [prepared(table, recipe, validation, test) for recipe in (recipes if validation else recipes[:1])]
        errors = [0.0]
        if len(tried) > 1:
            quick = replace(self.settings, epochs=min(TRIED, self.settings.epochs), patience=0)
            quiet = RunOptions(validation, device=self.options.device, threads=1, progress=self.options.progress)
            errors = []
            for windows, cut in tried:
                self.take(windows, cut)
                _, fit = self.fit(windows, 0, quick, quiet)
                if fit.interrupted:  # nothing was trained yet that could be kept
                    raise KeyboardInterrupt
                errors.append(min(entry["mase"] for entry in fit.history))
            errors[0] *= BETTER
        best = tried[int(np.argmin(errors))]
        self.take(*best)
        return best

    def members(self, windows: Windows) -> tuple[list[Forecaster], Calibration | None]:
        """Return the networks that are averaged, and what the validation part says of their outputs."""
        first: list[Forecaster] = []
        epochs: list[int] = []
        for member in range(self.build.members):
            model, fit = self.fit(windows, member, self.settings, self.stage(f"{member + 1}", member == 0))
            self.join(fit, member)
            first.append(model)
            epochs.append(int(fit.best["epoch"]) if fit.best else 0)
            if fit.interrupted:
                break
        if not len(self.held):
            return first, None
        calibration = calibrated(first, windows, self.inputs(windows), self.held)
        if self.whole.interrupted:
            return first, calibration
        again: list[Forecaster] = []
        for member, until in enumerate(epochs):
            model, fit = self.fit(windows, member, self.settings, self.stage(f"{member + 1}-whole", False), until)
            if fit.interrupted:  # half of it is worth less than the first one
                self.join(fit, member, whole=True)
                return [*again, *first[len(again) :]], calibration
            self.join(fit, member, whole=True)
            again.append(model)
        return again, calibration

    def stage(self, name: str, looks: bool) -> RunOptions:
        """Return how a member's fit is run: with a checkpoint of its own, and looked at where `looks`."""
        checkpoint = self.options.checkpoint
        if checkpoint is not None:
            checkpoint = f"{os.fspath(checkpoint)}.{name}"
        return replace(self.options, checkpoint=checkpoint, inspect=self.options.inspect and looks)

    def join(self, fit: Fit, member: int, whole: bool = False) -> None:
        """Add what a fit did to what all did."""
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
    """Return how far to follow the members' mean, and how far to move its quantiles.

    Ref: moving quantiles by what they miss on held-out data: Romano et al. 2019, "Conformalized quantile regression".
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
    for n in range(len(recipe.targets)):
        seen = ~np.isnan(y[..., n])
        if not seen.any():
            continue
        steps = np.linspace(0.0, 1.0, 11)
        median, weights = out[..., n, middle], np.broadcast_to(weight[:, None, n], seen.shape)
        costs = [float((np.abs(y[..., n] - share * median) * weights)[seen].sum()) for share in steps]
        followed[n] = steps[int(np.argmin(costs))]
        for q, level in enumerate(recipe.quantiles):
            if q != middle and seen.sum() >= FEWEST:
                moved[n, q] = np.quantile((y[..., n] - followed[n] * out[..., n, q])[seen], level)
    return Calibration(followed, moved)
