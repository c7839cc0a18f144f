"""Measurements over shapes: every engine in turn, outputs compared first, the machine's limits measured in between."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

import cellstack
from cellstack import native
from cellstack_bench import engines
from cellstack_bench.machine import Machine, processor
from cellstack_bench.turns import alternate, kept_on

TOLERANCE = 5e-5  # of outputs, which are between -1 and 1
BFLOAT16_TOLERANCE = 3e-2  # of outputs in bfloat16: several times 1/256, the spacing of its numbers below 1
GRADIENT_TOLERANCE = 1e-3  # relative to the largest value of an array: gradients sum over rows and steps
REST = 0.01  # seconds
BEFORE = {
    "nothing": "",
    "torch": "right after a matrix product of PyTorch",
    "rest": f"after {REST * 1e3:.0f} ms of rest",
}
"""What may precede each timed call, untimed, and its description in reports."""

MACHINE_ROUNDS = 10  # rounds of measuring its limits, spread over a run


class Shape(NamedTuple):
    """A stack of LSTMs of one width, and the shape of its input. With two directions, both have this width."""

    batch: int
    steps: int
    input_size: int
    units: int
    layers: int = 1
    directions: int = 1

    @property
    def inputs(self) -> int:
        """The sum of the widths of all layers' inputs."""
        return self.input_size + (self.layers - 1) * self.directions * self.units

    def flop(self, what: str) -> int:
        """Return the operations in its products, two per multiplication; training counts three forward passes."""
        widths = self.directions * (self.inputs + self.layers * self.units)
        return (3 if what == "training" else 1) * self.batch * self.steps * widths * 8 * self.units

    def bytes(self, what: str) -> int:
        """Return the minimum number of bytes to read and write.

        The matrices on h count once per step, those on x, x and y once per call; training counts three forward passes.
        A number takes four bytes, one of a matrix in bfloat16 two.
        """
        weights = self.directions * 4 * self.units * (self.layers * self.units * self.steps + self.inputs)
        flows = self.batch * self.steps * (self.input_size + self.directions * self.units)
        return (3 if what == "training" else 1) * ((2 if what == "bfloat16" else 4) * weights + 4 * flows)


def shapes(
    batch: Sequence[int], steps: Sequence[int], units: Sequence[int], layers: int = 1, directions: int = 1
) -> list[Shape]:
    """Return every combination; the input is as wide as a layer, up to 64."""
    return [Shape(b, t, min(h, 64), h, layers, directions) for t, b, h in product(steps, batch, units)]


def step_shapes(units: Iterable[int]) -> list[Shape]:
    """Return the shapes of a single step at batch 1; the input is as wide as the layer."""
    return [Shape(1, 1, h, h) for h in units]


def before(name: str, threads: int) -> Callable[[], Any] | None:
    """Return the function for a name in `BEFORE`; PyTorch's product uses all `threads`."""
    if name == "rest":
        return lambda: time.sleep(REST)
    if name == "torch":
        import torch

        torch.set_num_threads(threads)
        matrix = torch.ones(512, 512)
        return lambda: matrix @ matrix
    return None


def measure(
    what: str,
    shape: Shape,
    peers: Iterable[str],
    threads: int,
    rounds: int,
    seconds: float = 0.0,
    first: str = "nothing",
    **options: Any,
) -> dict[str, Any]:
    """Measure one shape.

    Args:
        what: one of `engines.SURFACES`.
        shape: the shape of the work.
        peers: the available peers.
        threads: the threads of every engine.
        rounds: the number of turns of each.
        seconds: the minimum duration of a turn.
        first: the name in `BEFORE` of what precedes each timed call.
        options: passed to the engines.

    Returns:
        the shape; `milliseconds`, the minimum and the median by engine; `ratio`, the fastest peer's time over ours, by
        minimum and median; `differs`, the deviation of outputs beyond the tolerance, by engine: ours compared with the
        float64 reference, the others compared with ours. Engines that differ aren't timed.
    """
    rng = np.random.default_rng(1)
    x = rng.standard_normal((shape.batch, shape.steps, shape.input_size)).astype(np.float32)
    cells = engines.weights(shape.input_size, shape.units, shape.layers, directions=shape.directions)
    makers = engines.SURFACES[what]
    if shape.directions > 1:
        options["directions"] = shape.directions
    ready = {name: makers[name](x, cells, threads, **options) for name in makers if name in {"cellstack", *peers}}
    outputs = {name: engine.outputs() for name, engine in ready.items()}
    ours = outputs["cellstack"]
    exact = equations(what, x, cells, shape.directions)
    differs = {}
    allowed = BFLOAT16_TOLERANCE if what == "bfloat16" else TOLERANCE
    for name, found in outputs.items():
        pairs = [(key, found[key], ours[key]) for key in ours]
        if name == "cellstack":
            key, rows = next(iter(ours)), [0, -1]
            pairs = [(key, ours[key][rows], exact)]
        worst = max(pairs, key=lambda pair: excess(*pair, allowed))
        if not excess(*worst, allowed) <= 1.0:
            differs[name] = {"output": worst[0], "difference": float(np.max(np.abs(worst[1] - worst[2])))}
    timed = {name: engine.run for name, engine in ready.items() if name not in differs}
    record: dict[str, Any] = {**shape._asdict(), "flop": shape.flop(what), "bytes": shape.bytes(what)}
    times = alternate(timed, rounds, seconds=seconds, before=before(first, threads))
    record["milliseconds"] = {name: {"least": least, "median": middle} for name, (least, middle) in times.items()}
    record["ratio"] = ratio(record["milliseconds"])
    record["differs"] = differs
    return record


def equations(what: str, x: engines.Array, cells: Sequence[engines.Arrays], directions: int = 1) -> engines.Array:
    """Return the expected first and last row, from the reference in float64."""
    if what == "step":
        return engines.exact(np.repeat(x, engines.STEPS, axis=1), cells)[[0, -1], -1]
    return engines.exact(x[[0, -1]], cells, directions)


def excess(name: str, found: engines.Array, expected: engines.Array, allowed: float) -> float:
    """Return the difference of two arrays as a multiple of the tolerance; infinite for different shapes."""
    if found.shape != expected.shape:
        return np.inf
    largest = float(np.max(np.abs(expected), initial=0.0))
    allowed = GRADIENT_TOLERANCE * max(1.0, largest) if name.startswith("gradient") else allowed
    off = float(np.max(np.abs(found - expected), initial=0.0))
    return off / allowed if np.isfinite(off) else np.inf


def ratio(milliseconds: Mapping[str, Mapping[str, float]]) -> dict[str, Any] | None:
    """Return the fastest peer, and its time over ours by minimum and median of the rounds; None without a peer."""
    peers = [name for name in milliseconds if name != "cellstack"]
    if not peers or "cellstack" not in milliseconds:
        return None
    ours = milliseconds["cellstack"]
    found = {key: min(milliseconds[name][key] for name in peers) / ours[key] for key in ("least", "median")}
    return {**found, "peer": min(peers, key=lambda name: milliseconds[name]["least"])}


def run(
    work: Mapping[str, Sequence[Shape]],
    threads: int,
    rounds: int,
    seconds: float,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
    first: str = "nothing",
) -> dict[str, Any]:
    """Measure surfaces, and the machine before, between and after them.

    Args:
        work: the shapes by surface.
        threads: the threads of every engine; the process is pinned to as many processors, if the system supports it.
        rounds: the number of turns of each engine at each shape.
        seconds: the minimum duration of a turn.
        progress: iterates over a list, and shows the progress.
        first: the name in `BEFORE` of what precedes each timed call.

    Returns:
        a JSON-compatible report: the engines and the machine, `missing` peers, `limits`, and `surfaces`, a record of
        `measure` for each shape. After Ctrl-C, it contains the results so far, and `stopped` is true.
    """
    peers, missing = engines.installed()
    surfaces: dict[str, list[dict[str, Any]]] = {what: [] for what in work}
    stopped = False
    with kept_on(threads), Machine(threads) as machine:
        try:
            machine.round()
            everything = [(what, shape) for what, some in work.items() for shape in some]
            every = max(1, len(everything) // MACHINE_ROUNDS)
            for n, (what, shape) in enumerate(progress(everything), 1):
                surfaces[what].append(measure(what, shape, peers, threads, rounds, seconds, first))
                if n % every == 0:
                    machine.round()
        except KeyboardInterrupt:
            stopped = True
        limits = machine.limits()
    return {
        "processor": processor(),
        "instructions": native.isa(),
        "threads": threads,
        "rounds": rounds,
        "seconds": seconds,
        "before": first,
        "versions": {
            "cellstack": cellstack.__version__,
            **peers,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "missing": missing,
        "limits": limits,
        "surfaces": surfaces,
        "stopped": stopped,
    }


# ── text reports ──────────────────────────────────────────────────────────────────────────────────────────────────────


def lines(report: Mapping[str, Any]) -> list[str]:
    """Return a report as lines: the machine, its limits, a table for each surface."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    text = [f"{report['processor']}, {report['instructions']}, threads: {report['threads']}", versions]
    if said := BEFORE[report["before"]]:
        text.append(f"each call {said}")
    text += [f"not measured: {name}, as {reason}" for name, reason in report["missing"].items()]
    text += ["", *limit_lines(report["limits"])]
    for what, records in report["surfaces"].items():
        text += ["", *table(what, records, report["limits"]), *summary(records)]
    return [*text, *(["", "stopped: these are the results so far"] if report["stopped"] else [])]


def limit_lines(limits: Mapping[str, Any]) -> list[str]:
    """Return the machine's limits as lines, with how they were measured."""
    shown = lambda value, unit: "not measured" if value is None else f"{value:.0f} {unit}"  # noqa: E731
    text = [f"peak of a core: {shown(limits['gflops_core'], 'GFLOP/s')}"]
    if limits["threads"] > 1:
        text[0] += f", of {limits['threads']} threads: {shown(limits['gflops_threads'], 'GFLOP/s')}"
    text[0] += f" ({limits['how']['gflops']})"
    levels = [f"{one['level']} {shown(one['gb_per_s'], 'GB/s')}" for one in limits["reading"]]
    text.append(f"reading: {', '.join(levels) or 'not measured'} ({limits['how']['reading']})")
    return [*text, f"barrier between threads: {limits['how']['barrier']}"]


def table(what: str, records: Sequence[Mapping[str, Any]], limits: Mapping[str, Any]) -> list[str]:
    """Return a surface as lines: the minimum of each engine, the ratio by minimum and median, our share of the peak.

    The first columns are those of `Shape`, with L layers and D directions.
    """
    scale, unit = (1e3, "µs") if what == "step" else (1.0, "ms")
    names = list(dict.fromkeys(name for record in records for name in (*record["milliseconds"], *record["differs"])))
    head = f"{'B':>5}{'T':>5}{'I':>5}{'H':>5}{'L':>3}{'D':>3}" + "".join(f"{name:>13}" for name in names)
    text = [
        f"{what}: {unit}, minimum of the rounds; ratio: the fastest peer's time over ours, by minimum and by median"
        + ("; the peak is for float32" if what == "bfloat16" else ""),
        head + f"{'ratio':>8}{'median':>8}{'GFLOP/s':>9}{'of peak':>9}",
    ]
    peak = limits["gflops_threads"]
    for record in records:
        row = "".join(f"{record[key]:>5}" for key in Shape._fields[:4]) + "".join(
            f"{record[key]:>3}" for key in Shape._fields[4:]
        )
        for name in names:
            time = record["milliseconds"].get(name)
            row += f"{'differs' if time is None else format(time['least'] * scale, '.4g'):>13}"
        times = record["ratio"]
        row += f"{'-':>8}{'-':>8}" if times is None else f"{times['least']:>8.2f}{times['median']:>8.2f}"
        speed = gflops(record)
        row += f"{'-':>9}" if speed is None else f"{speed:>9.1f}"
        text.append(row + (f"{'-':>9}" if speed is None or not peak else f"{speed / peak:>8.0%} "))
        text += [
            f"  {name}: {off['output']} differs by {off['difference']:.2g}" for name, off in record["differs"].items()
        ]
    return [line.rstrip() for line in text]


def gflops(record: Mapping[str, Any], name: str = "cellstack") -> float | None:
    """Return the GFLOP/s of an engine's fastest round, or None where it wasn't timed."""
    time = record["milliseconds"].get(name)
    return None if time is None else record["flop"] / time["least"] * 1e-6


def summary(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line on all ratios of a surface, by the minimum of the rounds."""
    ratios = [record["ratio"]["least"] for record in records if record["ratio"]]
    if not ratios:
        return []
    below = {bound: sum(one < bound for one in ratios) for bound in (1.0, 1.1)}
    said = ", ".join(f"{count} of {len(ratios)} below {bound}" for bound, count in below.items())
    return [f"ratio: smallest {min(ratios):.2f}, median {np.median(ratios):.2f}; {said}"]
