"""Compares a network with a file's own runtime or a torch module, and with its own reduced-precision streams."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from os import PathLike, fspath
from typing import Any, NamedTuple

import numpy as np

from cellstack.cells.errors import ShapeError
from cellstack.formats import runtimes
from cellstack.formats.files import check_readable
from cellstack.formats.onnx.runtime import RuntimeModel
from cellstack.formats.runtimes import onnxruntime
from cellstack.formats.runtimes.answers import CannotRunError, Inputs, OtherSizesError, named, package
from cellstack.formats.runtimes.differences import apart
from cellstack.formats.runtimes.in_memory import is_module, run_module
from cellstack.network import Network
from cellstack.network.layouts import one_row
from cellstack.nodes import Embedding
from cellstack.nodes.base import Array
from cellstack.nodes.cell_arrays import WEIGHTS
from cellstack.nodes.dense import Products

TOLERANCE = 1e-4
BFLOAT16_TOLERANCE = 2e-2  # for a network with rounded matrices, compared with a file that may hold the original ones
"""Default tolerances of the relative difference: float32 on both sides, with sums in different orders."""
BATCH, STEPS = 5, 7  # of random inputs, unless the network or the file requires other lengths
MOST_STEPS = 256  # that are tried for a network that takes a fixed number of steps


class Difference(NamedTuple):
    """The difference of two outputs; `relative` is the greatest difference over the greatest magnitude of `theirs`."""

    name: str
    shape: tuple[int, ...]
    theirs: tuple[int, ...]
    absolute: float
    relative: float


class Rounding(NamedTuple):
    """The difference between a stream with reduced-precision weights and the float32 stream, over all steps.

    `greatest` and `mean` are the absolute differences; `relative` and `mean_relative` are these divided by the greatest
    magnitude of the float32 stream's output.
    """

    weights: str
    name: str
    greatest: float
    mean: float
    relative: float
    mean_relative: float


@dataclass(frozen=True)
class Report:
    """The result of `verify`.

    Args:
        path: the file, or the class of the torch module.
        runtime: the runtime that ran it, None if none could.
        version: the runtime's version.
        inputs: shapes of the inputs, by name.
        differences: one for each output, then one for each array of the state.
        note: why no runtime could run the file, and how to get one; or what wasn't compared.
        drawn: whether the inputs are random, because no sample was given.
        streams: one for each output with bfloat16 weights, then one for each with int8 weights.
        no_streams: why there are none.
        weights: the dtype of the cells' matrices.
        unsure: why the comparison of a module for random inputs doesn't cover all sizes; "" if it does.
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
    unsure: str = ""

    @property
    def tolerance(self) -> float:
        """The default tolerance of the relative difference.

        It allows for float32 sums in another order and, for a network with bfloat16 matrices, for their rounding: the
        file may hold the original ones.
        """
        return BFLOAT16_TOLERANCE if self.weights == "bfloat16" else TOLERANCE

    def ok(self, tolerance: float | None = None) -> bool:
        """Return whether the file was run, and every shape matches and every difference is within the tolerance.

        Args:
            tolerance: greatest relative difference that passes; None = the report's own.

        Returns:
            True if so; False also if no runtime could run the file, or if a module may do something else for other
            sizes.
        """
        return self.runtime is not None and not self.unsure and self._agree(tolerance)

    def _agree(self, tolerance: float | None) -> bool:
        tolerance = self.tolerance if tolerance is None else tolerance
        return all(one.shape == one.theirs and one.relative <= tolerance for one in self.differences)

    def verdict(self, tolerance: float | None = None) -> str:
        """Return the verdict in a line: `pass`, `fail` with the greatest difference, or `not verified`.

        Args:
            tolerance: greatest relative difference that passes; None = the report's own.
        """
        tolerance = self.tolerance if tolerance is None else tolerance
        if self.runtime is None:
            return f"not verified: {self.note}"
        if self.ok(tolerance):
            return f"pass: every relative difference is within {tolerance:.1e}"
        if self._agree(tolerance):
            return f"not verified: every relative difference is within {tolerance:.1e}, but {self.unsure}"
        worst = max(self.differences, key=lambda one: (one.shape != one.theirs, one.relative))
        if worst.shape != worst.theirs:
            return f"fail: {worst.name} has the shape {list(worst.shape)}, theirs {list(worst.theirs)}"
        return f"fail: {worst.name} differs by {worst.relative:.2e}, more than {tolerance:.1e}"

    def to_json(self) -> dict[str, Any]:
        """Return the report as a dict that JSON can store."""
        names = ("path", "runtime", "version", "inputs", "note", "drawn", "no_streams", "weights", "unsure")
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
        inputs = ", ".join(f"{name} {list(shape)}" for name, shape in self.inputs.items())
        inputs += ", drawn at random" if self.drawn else ""
        lines = []
        if self.runtime is not None:
            rows = [("", "shape", "absolute", "relative")]
            for name, shape, theirs, absolute, relative in self.differences:
                shapes = str(list(shape)) if shape == theirs else f"{list(shape)}, theirs {list(theirs)}"
                rows.append((name, shapes, f"{absolute:.2e}", f"{relative:.2e}"))
            head = f"{self.path}: greatest difference from {self.runtime} {self.version} on {inputs}"
            lines = [head, *_aligned(rows), *([f"  {self.note}"] if self.note else [])]
        if self.streams:
            titles = ("", "", "greatest", "relative", "mean", "relative")
            rows = [titles] + [
                (weights, name, f"{most:.2e}", f"{relative:.2e}", f"{mean:.2e}", f"{mean_relative:.2e}")
                for weights, name, most, mean, relative, mean_relative in self.streams
            ]
            lines += [f"reduced-precision streams: difference from float32 on {inputs}", *_aligned(rows)]
        elif self.no_streams:
            lines.append(f"reduced-precision streams: not measured: {self.no_streams}")
        return "\n".join([*lines, f"{self.path}: {self.verdict(tolerance)}"])


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Return rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def verify(
    net: Network | RuntimeModel, path: str | PathLike[str] | Any, x: Any = None, seed: int = 0, streams: bool = True
) -> Report:
    """Run the same input through a network and through a file's own runtime or a torch module, and compare the outputs.

    Args:
        net: the network, such as the one that `load` returned for the file, or that was saved to it; or a
            `RuntimeModel`, which is compared with ONNX Runtime alone.
        path: the file. `.onnx` is run by onnxruntime, `.keras` and `.h5` by keras, `.pt` and similar by torch (state
            dicts of one recurrent module), `.c` with the machine's C compiler, `.safetensors` by `load`. Or a
            `torch.nn.Module`, which is called in evaluation mode. A state dict doesn't contain the `forward` of its
            model, so pass the model itself to verify a network of `load(path, order=[…])`.
        x: a sample of the data, as for `Network.run`, with a time axis; None = random. A module is called with random
            inputs of several batch sizes and lengths.
        seed: the seed of random inputs.
        streams: whether to also compare streams with bfloat16 and int8 weights with the float32 one, on the same input,
            step by step.

    Returns:
        The differences for each output and, if the runtime returns states, for each state; and those of the streams,
        or why the network can't be streamed with such weights. If the runtime isn't installed or can't run the file,
        the report says so, and what to install.

    Raises:
        ShapeError, TypeError: `x` doesn't fit the network.
        FormatError: the file is in no known format.
        OSError: the file can't be read.

    >>> import tempfile
    >>> from cellstack import CellSpec
    >>> from cellstack.nodes import Cell, Recurrent
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
    if isinstance(net, RuntimeModel) and not is_module(path):
        return _verify_runtime_model(net, fspath(path), x, seed)
    if not isinstance(net, Network):
        raise TypeError(f"verify: expected net to be a Network, such as load(path) returns, got {type(net).__name__}")
    if net.needs_lengths:
        if is_module(path):
            why = (
                "the module computes the rows' lengths, which verify can't: compare net(x, lengths=...) with its output"
            )
            return Report(type(path).__name__, None, "", {}, (), why)
        net = net.unpadded  # a file takes no lengths: all steps are used
    if is_module(path):
        inputs = (
            drawn(net, seed, 1 if one_row(net) else BATCH, usual_steps(net))
            if x is None
            else net.as_inputs("verify", x)
        )
        report = _with_module(net, path, inputs, seed if x is None else None)
        rounded, why = _rounded(net, inputs) if streams else ((), "")
        return replace(report, drawn=x is None, streams=rounded, no_streams=why, weights=net.weights)
    if not isinstance(path, (str, PathLike)):
        raise TypeError(f"verify: expected a file's path or a torch module, got {type(path).__name__}")
    path = fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(2, "no such file", path)
    check_readable(path)
    runtimes.runtime_of(path)  # raises for an unknown format before anything is run
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


def _verify_runtime_model(net: RuntimeModel, path: str, x: Any, seed: int) -> Report:
    """Return the report for a graph that ONNX Runtime runs in part, and its file."""
    rng, sizes, inputs = np.random.default_rng(seed), dict[Any, int](), dict[str, Array]()
    try:
        ort = package("onnxruntime", path)
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    except CannotRunError as error:
        return _not_verified(path, inputs, error)
    for one in session.get_inputs() if x is None else ():
        for place, axis in enumerate(one.shape):
            sizes.setdefault(axis, axis if isinstance(axis, int) else STEPS if place else BATCH)
        shape, dtype = [sizes[axis] for axis in one.shape], onnxruntime.ONNX_TYPES.get(one.type, "bool")
        floating = dtype.startswith("float")
        inputs[one.name] = (rng.standard_normal(shape) if floating else rng.integers(0, 2, shape)).astype(dtype)
    if x is not None:
        inputs = {name: np.asarray(value) for name, value in net.by_name(x).items()}
    try:
        theirs = session.run(None, dict(inputs))
    except Exception as error:  # ONNX Runtime's errors have no common base class
        if x is not None:
            raise
        why = f"ONNX Runtime rejects random inputs: {str(error).splitlines()[0]}: pass x, a sample of the data"
        return _not_verified(path, inputs, CannotRunError(why))
    pairs = zip(net.outputs, net.compute(inputs), theirs, strict=True)
    differences = tuple(_difference(name, array, other) for name, array, other in pairs)
    shapes = {name: array.shape for name, array in inputs.items()}
    return Report(path, "onnxruntime", ort.__version__, shapes, differences, drawn=x is None)


def _not_verified(path: str, inputs: Inputs, error: CannotRunError) -> Report:
    return Report(path, None, "", {name: array.shape for name, array in inputs.items()}, (), str(error))


def _run_both(net: Network, path: str, inputs: Inputs) -> Report:
    """Return the report for some inputs; raise `OtherSizesError` if the file takes other lengths."""
    weights = runtimes.c.weights_of(path) if path.lower().endswith(".c") else None
    y, states = net.run(inputs, weights=weights)
    try:
        theirs = runtimes.run_file(net, path, inputs)
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


def _with_module(net: Network, module: Any, inputs: Inputs, seed: int | None) -> Report:
    """Return the report for a torch module; if a seed is given, with the greatest differences over several sizes."""
    name = type(module).__name__
    shapes = {name: array.shape for name, array in inputs.items()}
    differences: dict[str, Difference] = {}
    sizes: list[str] = []
    notes: list[str] = []
    answers = None
    for size, values in (("", inputs), *(() if seed is None else _other_sizes(net, inputs, seed))):
        y, states = net.run(values)
        ours = dict(zip(net.outputs, y if len(net.outputs) > 1 else (y,), strict=True))
        try:
            theirs = run_module(net, module, values, ours)
        except CannotRunError as error:
            if answers is None:
                return Report(name, None, "", shapes, (), str(error))
            notes.append(f"not compared for {size}: {error}")
            continue
        answers = answers or theirs
        sizes += [size] if size else []
        ours |= named(states)
        for key, array in (theirs.outputs | theirs.states).items():
            one = _difference(key, ours.get(key), array)
            differences[key] = max(
                differences.get(key, one), one, key=lambda one: (one.shape != one.theirs, one.relative)
            )
    assert answers is not None
    also = f"the differences are the greatest of these inputs and of {', '.join(sizes)}" if sizes else ""
    places = ", ".join(net.metadata.get("onnx", {}).get("sizes", ())[:3])  # that `compile` found
    depends = f"the module depends on sizes of its input ({places})" if places else ""
    if depends and seed is None:
        notes.append(f"for these sizes only: {depends}")
    unsure = f"{depends}: pass x of the sizes that it will get" if depends and seed is not None else ""
    note = "; ".join(filter(None, [also, answers.note, *notes]))
    return Report(name, answers.runtime, answers.version, shapes, tuple(differences.values()), note, unsure=unsure)


def _other_sizes(net: Network, inputs: Inputs, seed: int) -> Iterator[tuple[str, Inputs]]:
    """Yield random inputs of other batch sizes and lengths that a network accepts, each with its sizes as text."""
    steps = next((array.shape[1] for name, array in inputs.items() if net.graph.timed(name)), 1)
    for batch, length in ((1, steps), (2, 1), (3, 4 * steps)):
        values = drawn(net, seed, batch, length)
        try:
            net.run(values)
        except ShapeError:
            continue
        yield f"B={batch} T={length}", values


def _rounded(net: Network, inputs: Inputs) -> tuple[tuple[Rounding, ...], str]:
    """Return the differences of reduced-precision streams from the float32 one, and why if there are none."""
    if not net.cells and not any(isinstance(node, Products) for node in net.nodes):
        return (), "the network has no cells or dense layers with weights to round"
    if net.dtype != np.float32:
        return (), f"the network is in {net.dtype}; only float32 weights can be rounded"
    batch = len(next(iter(inputs.values())))
    roundings: list[Rounding] = []
    try:
        whole, *others = (_streamed(net, inputs, batch, weights) for weights in WEIGHTS)
    except ValueError as error:  # a node that can't be streamed, or a step that it would mask
        return (), str(error).removeprefix("Stream: ")
    for weights, answers in zip(list(WEIGHTS)[1:], others, strict=True):
        for name, exact, rounded in zip(net.outputs, whole, answers, strict=True):
            differences, largest = apart(rounded, exact)
            most, mean = float(differences.max(initial=0.0)), float(differences.mean()) if differences.size else 0.0
            roundings.append(Rounding(weights, name, most, mean, most / (largest or 1.0), mean / (largest or 1.0)))
    return tuple(roundings), ""


def _streamed(net: Network, inputs: Inputs, batch: int, weights: str) -> tuple[Array, ...]:
    y = net.stream(batch, weights=weights).run(dict(inputs) if len(inputs) > 1 else next(iter(inputs.values())))
    return y if isinstance(y, tuple) else (y,)


def usual_steps(net: Network, preferred: int = STEPS) -> int:
    """Return a number of steps that a network accepts: `preferred` if possible; a Dense after a Flatten fixes it."""
    for steps in (preferred, *range(1, MOST_STEPS + 1)):
        try:
            net.run(drawn(net, 0, 1, steps))
        except ShapeError:
            continue
        return steps
    return preferred


def drawn(net: Network, seed: int, batch: int, steps: int) -> dict[str, Array]:
    """Return random inputs for a network: normally distributed, or valid ids for embeddings."""
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
    differences, largest = apart(ours, theirs)
    absolute = float(differences.max(initial=0.0))
    return Difference(name, ours.shape, theirs.shape, absolute, absolute / (largest or 1.0))
