"""Does a file's own runtime answer as our network does, and a stream of fewer bits? The same input through all."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from os import PathLike, fspath
from typing import Any, NamedTuple

import numpy as np

from cellstack.formats import runtimes
from cellstack.formats.files import check_readable
from cellstack.formats.runtimes import CannotRunError, Inputs, OtherSizesError, named
from cellstack.network import Network
from cellstack.nodes import Embedding
from cellstack.nodes.base import Array
from cellstack.nodes.recurrent import WEIGHTS
from cellstack.spec import ShapeError

TOLERANCE = 1e-4
BFLOAT16_TOLERANCE = 2e-2  # of a network whose matrices were rounded, beside a file that may hold them as they were
"""Greatest relative difference that passes where none is given: float32 on both sides, sums in other orders."""
BATCH, STEPS = 5, 7  # of the input that is drawn, where neither the network nor the file has lengths of its own
MOST_STEPS = 256  # that are tried where a network takes one number of steps alone


class Difference(NamedTuple):
    """How far two answers lie apart: `relative` is the greatest difference over the greatest magnitude of theirs."""

    name: str
    shape: tuple[int, ...]
    theirs: tuple[int, ...]
    absolute: float
    relative: float


class Rounding(NamedTuple):
    """How far a stream whose weights have fewer bits lies from the float32 one, over all frames of an output.

    `greatest` and `mean` are of the differences, `relative` and `mean_relative` the same over the greatest magnitude
    that the float32 one answers with.
    """

    weights: str
    name: str
    greatest: float
    mean: float
    relative: float
    mean_relative: float


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Args:
        path: the file.
        runtime: what ran it, None where nothing could.
        version: of the runtime.
        inputs: shapes of the inputs, by name.
        differences: one an output, then one an array of the state.
        note: why nothing could run the file, and what would; or what was left out.
        drawn: whether the inputs were drawn at random, for want of a sample.
        streams: one an output for bfloat16, then one an output for int8.
        no_streams: why there are none.
        weights: what the network's cells hold their matrices in.
    """

    path: str
    runtime: str | None
    version: str
    inputs: dict[str, tuple[int, ...]]
    differences: tuple[Difference, ...]
    note: str = ""
    drawn: bool = False
    streams: tuple[Rounding, ...] = ()
    no_streams: str = ""
    weights: str = "float32"

    @property
    def tolerance(self) -> float:
        """The greatest relative difference that passes where nothing else is said.

        That of float32 sums in another order, or, for a network with matrices in bfloat16, what rounding them does: the
        file may hold them as they were.
        """
        return BFLOAT16_TOLERANCE if self.weights == "bfloat16" else TOLERANCE

    def ok(self, tolerance: float | None = None) -> bool:
        """Return whether both ran, and every answer has the other's shape and lies near it.

        Args:
            tolerance: greatest relative difference; None = the report's own.

        Returns:
            False too where nothing could run the file: nothing was verified then.
        """
        tolerance = self.tolerance if tolerance is None else tolerance
        return self.runtime is not None and all(
            one.shape == one.theirs and one.relative <= tolerance for one in self.differences
        )

    def verdict(self, tolerance: float | None = None) -> str:
        """Return what comes of it, in a line: `pass`, `fail` with what lies furthest apart, or `not verified`.

        Args:
            tolerance: greatest relative difference that passes; None = the report's own.
        """
        tolerance = self.tolerance if tolerance is None else tolerance
        if self.runtime is None:
            return f"not verified: {self.note}"
        if self.ok(tolerance):
            return f"pass: every relative difference is within {tolerance:.1e}"
        worst = max(self.differences, key=lambda one: (one.shape != one.theirs, one.relative))
        if worst.shape != worst.theirs:
            return f"fail: {worst.name} is of shape {list(worst.shape)}, theirs of {list(worst.theirs)}"
        return f"fail: {worst.name} differs by {worst.relative:.2e}, more than {tolerance:.1e}"

    def to_json(self) -> dict[str, Any]:
        """Return the report as what JSON can hold."""
        names = ("path", "runtime", "version", "inputs", "note", "drawn", "no_streams", "weights")
        return {name: getattr(self, name) for name in names} | {
            "ok": self.ok(),
            "differences": [one._asdict() for one in self.differences],
            "streams": [one._asdict() for one in self.streams],
        }

    def __str__(self) -> str:
        return self.text()

    def text(self, tolerance: float | None = None) -> str:
        """Return the report as lines, the verdict last.

        Args:
            tolerance: greatest relative difference that passes; None = the report's own.
        """
        given = ", ".join(f"{name} {list(shape)}" for name, shape in self.inputs.items())
        given += ", drawn at random" if self.drawn else ""
        lines = []
        if self.runtime is not None:
            rows = [("", "shape", "absolute", "relative")]
            for name, shape, theirs, absolute, relative in self.differences:
                found = str(list(shape)) if shape == theirs else f"{list(shape)}, theirs {list(theirs)}"
                rows.append((name, found, f"{absolute:.2e}", f"{relative:.2e}"))
            head = f"{self.path}: greatest difference to {self.runtime} {self.version} on {given}"
            lines = [head, *_aligned(rows), *([f"  {self.note}"] if self.note else [])]
        if self.streams:
            titles = ("", "", "greatest", "relative", "mean", "relative")
            rows = [titles] + [
                (weights, name, f"{most:.2e}", f"{relative:.2e}", f"{mean:.2e}", f"{mean_relative:.2e}")
                for weights, name, most, mean, relative, mean_relative in self.streams
            ]
            lines += [f"streams of fewer bits: difference to float32 on {given}", *_aligned(rows)]
        elif self.no_streams:
            lines.append(f"streams of fewer bits: not measured: {self.no_streams}")
        return "\n".join([*lines, f"{self.path}: {self.verdict(tolerance)}"])


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Return rows as lines whose columns stand below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def verify(net: Network, path: str | PathLike[str], x: Any = None, seed: int = 0, streams: bool = True) -> Report:
    """Run the same input through a network and through a file's own runtime, and compare what they return.

    Args:
        net: the network, such as what `load` made of the file, or what was saved to it.
        path: the file. `.onnx` is run by onnxruntime, `.keras` and `.h5` by keras, `.pt` and its like by torch (state
            dicts of one recurrent module), `.c` by the machine's C compiler, `.safetensors` by `load`.
        x: a sample of the data, as for `Network.run`, with a time axis; None draws one at random.
        seed: of what is drawn.
        streams: whether to measure how far streams of bfloat16 and int8 weights lie from the float32 one, on the same
            input, frame by frame.

    Returns:
        The differences, per output and, where the runtime returns them, per state; and those of the streams, or why
        the network can't have such. Where the runtime isn't installed or can't run the file, a report that says so,
        and what to install.

    Raises:
        ShapeError, TypeError: `x` doesn't fit the network.
        FormatError: a file of no format that is known.
        OSError: the file can't be read.

    >>> import tempfile
    >>> from cellstack import Cell, CellSpec, Recurrent
    >>> cell = Cell(CellSpec(1, 2, use_bias=False), np.ones((1, 8), "f4"), np.ones((2, 8), "f4"))
    >>> net = Network([Recurrent((cell,))])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     net.save(f"{folder}/net.safetensors")
    ...     report = verify(net, f"{folder}/net.safetensors", x=np.ones((1, 9, 1)))
    >>> report.ok(0.0)
    True
    >>> [(one.weights, one.relative < 0.02) for one in report.streams]
    [('bfloat16', True), ('int8', True)]
    """
    if not isinstance(net, Network):
        raise TypeError(f"verify: expected net to be a Network, such as load(path) returns, got {type(net).__name__}")
    path = fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(2, "no such file", path)
    check_readable(path)
    runtimes.runtime_of(path)  # a file of no known format is an error before anything is run
    inputs = drawn(net, seed, BATCH, usual_steps(net)) if x is None else net.as_inputs("verify", x)
    try:
        report = _run_both(net, path, inputs)
    except OtherSizesError as error:
        if x is None:
            inputs = drawn(net, seed, error.batch, error.steps)
            report = _run_both(net, path, inputs)
        else:
            report = _not_verified(path, inputs, error)
    rounded, why = _rounded(net, inputs) if streams else ((), "")
    return replace(report, drawn=x is None, streams=rounded, no_streams=why, weights=net.weights)


def _not_verified(path: str, inputs: Inputs, error: CannotRunError) -> Report:
    return Report(path, None, "", {name: array.shape for name, array in inputs.items()}, (), str(error))


def _run_both(net: Network, path: str, inputs: Inputs) -> Report:
    """Return the report on some inputs; `OtherSizesError` where the file takes others."""
    y, states = net.run(inputs)
    try:
        theirs = runtimes.run(net, path, inputs)
    except OtherSizesError:
        raise
    except CannotRunError as error:
        return _not_verified(path, inputs, error)
    ours = dict(zip(net.outputs, y if len(net.outputs) > 1 else (y,), strict=True)) | named(states)
    pairs = {**theirs.outputs, **theirs.states}
    left = [name for name in ours if name not in pairs]
    why = f": {theirs.no_states}" if theirs.no_states else ""
    return Report(
        path,
        theirs.runtime,
        theirs.version,
        {name: array.shape for name, array in inputs.items()},
        tuple(_difference(name, ours.get(name), array) for name, array in pairs.items()),
        "; ".join(filter(None, [f"not compared: {', '.join(left)}{why}" if left else "", theirs.note])),
    )


def _rounded(net: Network, inputs: Inputs) -> tuple[tuple[Rounding, ...], str]:
    """Return how far streams of fewer bits lie from the float32 one on some inputs; why, where there are none."""
    if not net.cells:
        return (), "the network has no cells, whose weights they round"
    if net.dtype != np.float32:
        return (), f"the network is in {net.dtype}, and they round weights of float32"
    batch = len(next(iter(inputs.values())))
    found: list[Rounding] = []
    try:
        whole, *others = (_streamed(net, inputs, batch, weights) for weights in WEIGHTS)
    except ValueError as error:  # a node that can't be streamed, or a frame that it would mask
        return (), str(error).removeprefix("Stream: ")
    for weights, answers in zip(list(WEIGHTS)[1:], others, strict=True):
        for name, exact, rounded in zip(net.outputs, whole, answers, strict=True):
            apart = np.nan_to_num(np.abs(rounded.astype(np.float64) - exact), nan=np.inf, posinf=np.inf)
            apart[(rounded == exact) | (np.isnan(rounded) & np.isnan(exact))] = 0.0
            largest = float(np.abs(exact[np.isfinite(exact)]).max(initial=0.0)) or 1.0
            most, mean = float(apart.max(initial=0.0)), float(apart.mean()) if apart.size else 0.0
            found.append(Rounding(weights, name, most, mean, most / largest, mean / largest))
    return tuple(found), ""


def _streamed(net: Network, inputs: Inputs, batch: int, weights: str) -> tuple[Array, ...]:
    y = net.stream(batch, weights=weights).run(dict(inputs) if len(inputs) > 1 else next(iter(inputs.values())))
    return y if isinstance(y, tuple) else (y,)


def usual_steps(net: Network, wanted: int = STEPS) -> int:
    """Return how many steps a network takes: those wanted, or what a Dense behind a Flatten, say, was made for."""
    for steps in (wanted, *range(1, MOST_STEPS + 1)):
        try:
            net.run(drawn(net, 0, 1, steps))
        except ShapeError:
            continue
        return steps
    return wanted


def drawn(net: Network, seed: int, batch: int, steps: int) -> dict[str, Array]:
    """Return random inputs for a network: normal, or ids that its tables have."""
    rng = np.random.default_rng(seed)
    rows = min((len(node.table) for node in net.nodes if isinstance(node, Embedding)), default=1)
    inputs = {}
    for name in net.inputs:
        shape = net.shapes[name]
        axes = [steps if axis is None else axis for axis in shape]
        if name in net.graph.ids:
            inputs[name] = rng.integers(0, rows, size=(batch, *axes))
        else:
            inputs[name] = rng.standard_normal((batch, *axes)).astype(net.dtype)
    return inputs


def _difference(name: str, ours: Array | None, theirs: Array) -> Difference:
    if ours is None or ours.shape != theirs.shape:
        return Difference(name, () if ours is None else ours.shape, theirs.shape, float("inf"), float("inf"))
    if not ours.size:
        return Difference(name, ours.shape, theirs.shape, 0.0, 0.0)
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.abs(a - b)
    apart[(a == b) | (np.isnan(a) & np.isnan(b))] = 0.0  # two infinities, two NaN
    absolute = float(np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max())
    largest = float(np.abs(b[np.isfinite(b)]).max(initial=0.0))
    return Difference(name, ours.shape, theirs.shape, absolute, absolute / largest if largest else absolute)
