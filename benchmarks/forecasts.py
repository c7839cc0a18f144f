"""Forecasts of real series: rules, gradient boosting on lags, and `cellstack train` with its defaults.

    python benchmarks/forecasts.py --out results                        everything that is missing
    python benchmarks/forecasts.py --out results --only rules co2 beer  a part of it
    python benchmarks/forecasts.py --out results --pretrained TiRex-2   also a TiRex or TiRex-2, whose file this is
    python benchmarks/forecasts.py --out results --table                the table of the results, as Markdown

The last fifth of every series is the test part, the 15 % before it the validation part. Forecasts start from
at most 400 origins, spread evenly over the test part; in a panel the series share them. MASE is the mean absolute
error over all steps ahead, divided by the mean absolute change over one season before the test part; for a panel, the
median over its series. Of the rules, the best one on the test part counts. `quick` is boosting with few settings,
`boosting` the tuned one. cellstack runs from its command line, with one thread and only the target, the horizon, the
series' column and the columns known in advance; its network then forecasts from the same origins. A JSON file for each
data set stores the results with their duration in seconds; the table shows processor time, which other work on the
machine doesn't affect.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from boosting import Boosting, Panel
from series import SERIES, options, write

import cellstack
from cellstack.train import TiRexForecaster
from cellstack.train.forecasting import predict, rules, seasons
from cellstack.train.forecasting.recipe import Recipe
from cellstack.train.forecasting.tirex_tables import medians
from cellstack.train.forecasting.windows import Windows
from cellstack.train.tables.table import Table, read_table

STEPS = {"hourly": "h", "half-hourly": "30min", "daily": "D", "weekly": "7D", "monthly": "MS", "quarterly": "QS"}
NATURAL = {
    "hourly": (24, 168),
    "half-hourly": (48, 336),
    "daily": (7, 365),
    "weekly": (52,),
    "monthly": (12,),
    "quarterly": (4,),
}
TEST, VALIDATION = 0.2, 0.15
ORIGINS = 400
COMPARED = ("rules", "quick", "boosting", "pretrained", "cellstack")


@dataclass(frozen=True)
class Problem:
    """A data set on even grids, and where forecasts of it start."""

    name: str
    panel: Panel
    labels: tuple[str, ...]

    @property
    def horizon(self) -> int:
        return SERIES[self.name].horizon

    @property
    def natural(self) -> tuple[int, ...]:
        return NATURAL[SERIES[self.name].spacing]

    def rows(self, low: float, high: float) -> np.ndarray:
        """Origins whose targets are all between two fractions of their series."""
        parts = []
        for a, b in pairwise(self.panel.starts):
            first, end = round((b - a) * low), round((b - a) * high)
            first = first - 1 if low else min(max(self.natural), end // 3)
            parts.append(a + np.arange(first, end - self.horizon))
        return np.concatenate(parts)

    @cached_property
    def origins(self) -> list[np.ndarray]:
        """Origins of the test part, of each series; counted from its first row."""
        most = max(10, ORIGINS // (len(self.panel.starts) - 1))
        found = []
        for a, b in pairwise(self.panel.starts):
            first, last = round((b - a) * (1 - TEST)) - 1, b - a - self.horizon - 1
            found.append(np.unique(np.linspace(first, last, min(most, last - first + 1)).round().astype(np.int64)))
        return found

    def measure(self, forecasts: list[np.ndarray]) -> dict[str, float]:
        """Medians over the series of the errors of forecasts `[B, horizon]` from `origins`."""
        measured = []
        for (a, b), origins, forecast in zip(pairwise(self.panel.starts), self.origins, forecasts, strict=True):
            values = self.panel.values[a:b]
            actual = values[origins[:, None] + np.arange(1, self.horizon + 1)]
            if np.isnan(forecast[~np.isnan(actual)]).any():
                raise ValueError(f"{self.name}: {np.isnan(forecast).sum()} forecasts are missing")
            before, season = values[: round(len(values) * (1 - TEST))], self.natural[0]
            unit = np.nanmean(np.abs(before[season:] - before[:-season]))
            mae = np.nanmean(np.abs(forecast - actual))
            measured.append((mae / unit, mae))
        return dict(zip(("mase", "mae"), np.nanmedian(measured, axis=0).tolist(), strict=True))


def problem(name: str) -> Problem:
    entry = SERIES[name]
    table = entry.make()
    table["date"] = pd.to_datetime(table.date)
    groups = table.groupby(entry.id, sort=False) if entry.id else [("", table)]
    parts = {str(label): group.set_index("date").asfreq(STEPS[entry.spacing]) for label, group in groups}
    whole = pd.concat(parts.values())
    columns, categories = {}, set()
    for column in whole.columns.drop([entry.target, *([entry.id] if entry.id else [])]):
        if pd.api.types.is_numeric_dtype(whole[column]):
            columns[column] = whole[column].to_numpy(np.float64)
        else:
            columns[column] = whole[column].astype("category").cat.codes.to_numpy(np.int64)
            categories.add(column)
    known = {column: values for column, values in columns.items() if column in entry.known}
    panel = Panel(
        values=whole[entry.target].to_numpy(np.float64),
        starts=np.cumsum([0, *map(len, parts.values())]),
        times=whole.index.to_numpy("datetime64[s]"),
        known=known,
        past={column: values for column, values in columns.items() if column not in known},
        categories=frozenset(categories),
    )
    return Problem(name, panel, tuple(parts))


def run_rules(task: Problem) -> dict[str, dict[str, float]]:
    """Every rule, with every natural season that the rows before the test part allow for most series of a panel."""
    results = {}
    series = [task.panel.values[a:b] for a, b in pairwise(task.panel.starts)]
    rows = round(float(np.median([len(values) for values in series])) * (1 - TEST))
    for name, rule in rules.rules(task.natural, rows).items():
        start = time.perf_counter()
        forecasts = []
        for values, origins in zip(series, task.origins, strict=True):
            forecast = rule(values, origins, task.horizon)
            naive = rules.seasonal(values, origins, task.horizon)  # where no value was observed at that phase
            forecasts.append(np.where(np.isnan(forecast), naive, forecast))
        results[name] = {**task.measure(forecasts), "seconds": time.perf_counter() - start}
    return results


def run_boosting(task: Problem, tuned: bool) -> dict[str, object]:
    start = time.perf_counter()
    panel = task.panel
    before = [panel.values[a : a + round((b - a) * (1 - TEST))] for a, b in pairwise(panel.starts)]
    found = seasons.find(np.concatenate(before), np.cumsum([0, *map(len, before)]), task.natural)
    train, validation = task.rows(0, 1 - TEST - VALIDATION), task.rows(1 - TEST - VALIDATION, 1 - TEST)
    model = Boosting(panel, task.horizon, found, train, validation, tuned=tuned)
    forecasts = [model.forecast(a + origins) for a, origins in zip(panel.starts[:-1], task.origins, strict=True)]
    chosen = {"seasons": found, "way": model.way, "settings": model.best[2]}
    return {**task.measure(forecasts), "seconds": time.perf_counter() - start, "chosen": chosen}


def run_pretrained(task: Problem, file: Path) -> dict[str, float]:
    """A TiRex or TiRex-2, which gets the columns known in advance as cellstack does."""
    start, forecaster, entry = time.perf_counter(), TiRexForecaster(cellstack.load(file)), SERIES[task.name]
    with tempfile.TemporaryDirectory() as folder:
        table = read_table(write(task.name, Path(folder)), id=(entry.id,) if entry.id else ())
    known = tuple(name for name in entry.known if name in table.columns)
    recipe = Recipe((entry.target,), task.horizon, forecaster.settings.context, known=known)
    origins = np.concatenate([a + each for a, each in zip(task.panel.starts[:-1], task.origins, strict=True)])
    found = medians(forecaster, Windows(recipe, table, origins), threads=1)[..., 0]
    parts = np.split(found, np.cumsum([len(each) for each in task.origins])[:-1])
    return {**task.measure(parts), "seconds": time.perf_counter() - start}


def run_cellstack(task: Problem, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        file, model = write(task.name, Path(folder)), Path(folder, "model.safetensors")
        arguments = ["--seed", str(seed), "--threads", "1", "-o", str(model), *options(task.name)]
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "cellstack", "train", str(file), *arguments], capture_output=True, text=True
        )
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise RuntimeError(f"{task.name}: {done.stderr[-2000:]}")
        entry = SERIES[task.name]
        table = read_table(file, id=(entry.id,) if entry.id else ())
        if not np.array_equal(table.columns[entry.target], task.panel.values, equal_nan=True):
            raise ValueError(f"{task.name}: the table differs from the data that the benchmark reads")
        net = cellstack.load(model)
        forecasts, alone = forecasts_of(task, net, table, str(model))
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        smoothing = task.measure(alone)["mase"]
        return {**task.measure(forecasts), "smoothing": smoothing, "seconds": seconds, "processor": processor}


def forecasts_of(
    task: Problem, net: cellstack.Network, table: Table, path: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Forecasts of a network from every origin, and of the underlying smoothing alone.

    Where a series is still too short for the network, both are the naive forecast.
    """
    needed = predict.trained(net, path)[0].needed
    naive = [
        rules.seasonal(task.panel.values[a:b], each, task.horizon)
        for (a, b), each in zip(pairwise(task.panel.starts), task.origins, strict=True)
    ]
    long = [each + 1 >= needed for each in task.origins]
    origins = [a + each[enough] for a, each, enough in zip(task.panel.starts[:-1], task.origins, long, strict=True)]
    found = predict.forecast(net, table, path, np.concatenate(origins), threads=1)
    both = []
    for said in (found.median, found.reference):
        parts = np.split(said[..., 0], np.cumsum([len(each) for each in origins])[:-1])
        both.append([forecast.copy() for forecast in naive])
        for forecast, enough, part in zip(both[-1], long, parts, strict=True):
            forecast[enough] = part
    return both[0], both[1]


def table(folder: Path) -> str:
    """Return the Markdown table of the results in a folder, and the number of wins."""
    lines = [
        "| | steps | series × rows | best rule | | boosting | pretrained | smoothing alone | cellstack, median (range "
        "of seeds) | processor s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    won: dict[bool, list[bool]] = {False: [], True: []}
    for name, entry in SERIES.items():
        path = folder / f"{name}.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        if not {"rules", "boosting", "cellstack"} <= results.keys():
            continue
        rule = min(results["rules"], key=lambda key: results["rules"][key]["mase"])
        seeds = sorted(run["mase"] for run in results["cellstack"].values())
        values = [results["rules"][rule]["mase"], results["boosting"]["boosting"]["mase"], float(np.median(seeds))]
        best = min(range(3), key=lambda n: values[n])
        shown = [f"**{value:.3f}**" if n == best else f"{value:.3f}" for n, value in enumerate(values)]
        spread = f" ({seeds[0]:.3f} to {seeds[-1]:.3f})" if len(seeds) > 1 else ""
        took, alone = (
            np.median([run[key] for run in results["cellstack"].values()]) for key in ("processor", "smoothing")
        )
        pretrained = f"{results['pretrained']['pretrained']['mase']:.3f}" if "pretrained" in results else "not measured"
        lines.append(
            f"| {name}{', held out' if entry.held_out else ''} | {entry.spacing} | {results['series']} × "
            f"{results['rows']:,} | {rule} | {shown[0]} | {shown[1]} | {pretrained} | {alone:.3f} | "
            f"{shown[2]}{spread} | {took:.0f} |"
        )
        won[entry.held_out].append(best == 2)
    every = won[False] + won[True]
    return "\n".join(
        [
            *lines,
            "",
            f"cellstack is better than the best rule and than boosting on {sum(every)} of {len(every)}; of those held "
            f"out, on {sum(won[True])} of {len(won[True])}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="data sets; default: all")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", choices=COMPARED, action="append", help="what to run; can be repeated")
    parser.add_argument("--pretrained", type=Path, metavar="FILE", help="a TiRex or TiRex-2, to compare with")
    parser.add_argument("--table", action="store_true", help="print the table of existing results without running")
    parser.add_argument("--seeds", type=int, default=5, help="number of trainings (%(default)s)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.table:
        print(table(arguments.out))
        return
    for name in arguments.names or SERIES:
        path = arguments.out / f"{name}.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        task = problem(name)
        results |= {"series": len(task.panel.starts) - 1, "rows": len(task.panel.values)}
        for what in arguments.only or COMPARED:
            runs = {
                "rules": lambda task=task: run_rules(task),
                "quick": lambda task=task: {"boosting": run_boosting(task, False)},
                "boosting": lambda task=task: {"boosting": run_boosting(task, True)},
            }
            if arguments.pretrained is not None:
                runs["pretrained"] = lambda task=task: {"pretrained": run_pretrained(task, arguments.pretrained)}
            if what in runs and what not in results:
                results[what] = runs[what]()
                keep(path, results)
                for rule, result in results[what].items():
                    print(f"{name:11} {what:9} {rule:32} {result['mase']:8.4f} {result['seconds']:7.1f} s", flush=True)
            for seed in range(arguments.seeds) if what == "cellstack" else ():
                runs = results.setdefault(what, {})
                if str(seed) not in runs:
                    result = runs[str(seed)] = run_cellstack(task, seed)
                    keep(path, results)
                    print(
                        f"{name:11} {what:9} seed {seed:<27} {result['mase']:8.4f} {result['seconds']:7.1f} s",
                        flush=True,
                    )


def keep(path: Path, results: dict) -> None:
    path.with_suffix(".part").write_text(json.dumps(results, indent=1))
    path.with_suffix(".part").replace(path)


if __name__ == "__main__":
    main()
