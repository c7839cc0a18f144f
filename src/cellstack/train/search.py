"""Search for the settings of a training, by the loss on the validation part.

Ref: Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization" (the tree-structured Parzen estimator);
Akiba et al. 2019, "Optuna: A Next-generation Hyperparameter Optimization Framework".
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from cellstack.cells.errors import check_installed
from cellstack.formats.files import check_replaceable
from cellstack.train.checks import UsageError, refuse_existing
from cellstack.train.learner import Epoch
from cellstack.train.options import OFFSET_SHARE, Architecture, FitOptions, declared

WIDTHS, DEPTHS, RATES = (16, 128), (1, 3), (1e-3, 2e-2)  # fewest and most units, layers; lowest and highest rate
WIDTH_STEP = 8  # the default heads of each kind of cell divide the units
CHOICES = {"cell": ("lstm", "gru"), "pooling": ("mean", "max", "last"), "noise": (0.0, 0.3, 0.6)}
SHOWN = 10  # trials in the table
STUDY = "cellstack"


class Trial(NamedTuple):
    """One training of a search.

    Args:
        settings: the options that were searched, by name.
        epoch: the entry in the history whose weights were kept; of a stopped trial the last one.
        completed: False if it was stopped early, because its loss was above the median of the earlier trials.
    """

    settings: dict[str, Any]
    epoch: dict[str, Any]
    completed: bool

    @property
    def loss(self) -> float:
        """The validation loss."""
        return float(self.epoch["validation_loss"])


class Trials(list[Trial]):
    """The trials of a search, the best one first. They are shown as a table."""

    def __repr__(self) -> str:
        """Return a table of the best ones."""
        if not self:
            return "[]"
        measures = [name for name in ("accuracy", "rmse") if name in self[0].epoch]
        head = ["validation loss", *measures, "epochs", *self[0].settings]
        rows = [
            [f"{one.loss:.4g}", *(f"{one.epoch[name]:.4g}" for name in measures), str(one.epoch["epoch"])]
            + [_shown(value) for value in one.settings.values()]
            for one in self[:SHOWN]
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in (head, *rows)]
        stopped = sum(not one.completed for one in self)
        best = f", the best {SHOWN} of them shown" * (len(self) > SHOWN)
        return "\n".join([f"{len(self)} trials{best}; {stopped} stopped early", *lines])


def best_settings(
    fit: Callable[[Architecture, FitOptions], Any], architecture: Architecture, options: FitOptions, task: str
) -> tuple[Architecture, FitOptions, Trials]:
    """Train with `options.search` settings; return the best ones, and all trials.

    Options that aren't at their defaults are kept. The first trial has the defaults.

    Args:
        fit: trains with settings, and returns a `Result`.
        architecture, options: what is given. The trials are stored in `options.checkpoint`, if it is given; with
            `resume` those in it count.
        task: `"classify"` or `"regress"`.

    Raises:
        UsageError: all options that could be searched are given; a checkpoint that exists without `resume` or
            `overwrite`, or that is of another search; several processes.
        ModuleNotFoundError: Optuna isn't installed.
        KeyboardInterrupt: Ctrl-C before the first trial was completed; after it, the search ends.
    """
    check_installed("search", "optuna", "search")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("search: expected one process: several can't share its trials")
    usual = _usual(architecture, options, task)
    if not usual:
        raise UsageError("search: all options that it would choose are given: leave out units, cell, lr or pooling")
    optuna = import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = _study(optuna, architecture, options, sorted(usual))
    if not study.trials:
        study.enqueue_trial(usual)

    def objective(trial: Any) -> float:
        settings = {name: _suggested(trial, name) for name in usual}

        def report(epoch: Epoch) -> bool:
            trial.report(epoch.entry["validation_loss"], epoch.entry["epoch"])
            return trial.should_prune()

        name = f"trial {len(study.trials)} of {options.search}"
        alone = {"checkpoint": None, "resume": False, "overwrite": False, "log": None, "inspect": False}
        how = replace(options, search=None, baseline=False, callbacks=(report,), name=name, **alone)
        try:
            done = fit(*_applied(settings, architecture, how)).fit
        except UsageError:
            if not trial.number:  # also with the defaults
                raise
            raise optuna.TrialPruned from None  # such as a loss that isn't finite, with a high rate
        if done.interrupted:
            study.stop()
            raise KeyboardInterrupt
        completed = done.stopped != "callback"
        kept = {name: value for name, value in done.best.items() if isinstance(value, (int, float))}
        trial.set_user_attr("epoch", kept)
        if not completed:
            raise optuna.TrialPruned
        return kept["validation_loss"]

    left = int(options.search or 0) - sum(trial.state.is_finished() for trial in study.trials)
    try:
        study.optimize(objective, n_trials=max(left, 0), catch=())
    except KeyboardInterrupt:
        if not any(trial.state.name == "COMPLETE" for trial in study.trials):
            raise
    found = Trials(
        Trial(dict(trial.params), trial.user_attrs["epoch"], trial.state.name == "COMPLETE")
        for trial in study.trials
        if "epoch" in trial.user_attrs
    )
    found.sort(key=lambda one: (not one.completed, one.loss))
    return *_applied(study.best_params, architecture, options), found


def _usual(architecture: Architecture, options: FitOptions, task: str) -> dict[str, Any]:
    """Return the options to search with their defaults: those that aren't given."""
    settled = architecture.of(task)
    given = {name: getattr(architecture, name) for name in ("units", "cell", "pooling", "noise")} | {"lr": options.lr}
    unset = {name for name, value in given.items() if value == declared()[name].defaults["sequences"]}
    if architecture.offset is not None:
        unset -= {"noise"}
    if architecture.model is not None:  # the rest describes layers
        unset &= {"lr"}
    if architecture.heads is not None:  # they have to divide the units
        unset -= {"units"}
    if architecture.every_step and architecture.bidirectional:  # refuses one of the ways of pooling
        unset -= {"pooling"}
    usual: dict[str, Any] = {"layers": len(settled.units), "width": settled.units[0]} if "units" in unset else {}
    usual |= {"lr": options.lr} if "lr" in unset else {}
    return usual | {name: getattr(settled, name) for name in CHOICES if name in unset}


def _suggested(trial: Any, name: str) -> Any:
    if name in CHOICES:
        return trial.suggest_categorical(name, CHOICES[name])
    if name == "lr":
        return trial.suggest_float(name, *RATES, log=True)
    return trial.suggest_int(name, *WIDTHS, step=WIDTH_STEP) if name == "width" else trial.suggest_int(name, *DEPTHS)


def _applied(
    settings: dict[str, Any], architecture: Architecture, options: FitOptions
) -> tuple[Architecture, FitOptions]:
    """Return the records with the settings of a trial."""
    values = dict(settings)
    if "width" in values:
        values["units"] = (values.pop("width"),) * values.pop("layers")
    if "noise" in values:
        values["offset"] = OFFSET_SHARE * values["noise"]
    rate = {"lr": values.pop("lr")} if "lr" in values else {}
    return replace(architecture, **values), replace(options, **rate)


def _study(optuna: Any, architecture: Architecture, options: FitOptions, searched: list[str]) -> Any:
    """Return the study in the checkpoint, or a new one."""
    storage, path = None, None if options.checkpoint is None else os.fspath(options.checkpoint)
    if path is not None:
        check_replaceable(path)
        if not options.resume:
            if not options.overwrite:
                refuse_existing(path)
            Path(path).unlink(missing_ok=True)
        journal = optuna.storages.journal.JournalFileBackend(path)
        storage = optuna.storages.JournalStorage(journal)
    study = optuna.create_study(
        storage=storage,
        study_name=STUDY,
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_warmup_steps=options.epochs // 4),
    )
    mine = {
        "searched": searched,
        "seed": options.seed,
        "epochs": options.epochs,
        "given": repr(architecture.described()),
    }
    for name, value in mine.items():
        if study.trials and study.user_attrs.get(name) != value:
            found = study.user_attrs.get(name)
            raise UsageError(f"{path}: expected the trials of a search with {name} {value}, as now, found {found}")
        study.set_user_attr(name, value)
    # A resumed search must not draw the first trials again.
    study.sampler = optuna.samplers.TPESampler(seed=options.seed + len(study.trials))
    return study


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
