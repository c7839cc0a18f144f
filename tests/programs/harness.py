"""What a program is, and what is measured of it.

`python -m programs.harness NAME` measures one program and prints a JSON object. Programs are declared in the other
modules of this package by `@program`; each imports its package only when it is built.
"""

import copy
import importlib
import importlib.util
import itertools
import json
import pkgutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import cellstack as cs
from cellstack.capture.copied import copied
from cellstack.capture.equality import Ends
from cellstack.capture.nested import array_of, flattened, tensors_in
from cellstack.capture.packing import packs, padded, with_lengths
from cellstack.formats.onnx.runtime import RuntimeModel
from cellstack.layers.accelerated import Accelerated
from cellstack.layers.handwritten import HandWritten

SIZES = ((2, 20), (1, 20), (3, 20), (2, 33), (2, 7))
SECONDS = 0.5  # of each timing
ROUNDS = 7


@dataclass(frozen=True)
class Program:
    """A module of a package.

    Attributes:
        name: the package and the module, such as `openunmix: OpenUnmix`.
        build: returns the module, and a function of the number of rows and steps that returns a call's arguments.
        needs: the requirements to install, without their dependencies, each with its exact version.
        sizes: rows and steps; the first is the example for `compile`, and results are compared for all of them.
        served: how many of the recurrent modules `accelerate` must serve.
        cells: whether `accelerate` is called with `cells=True`, which serves hand-written modules too.
        refused: words of the message with which `compile` must refuse the module; None: it must compile.
        runtime: whether ONNX Runtime must run a part of what `compile` returns: a RuntimeModel, not a Network.
        accepts: how many of the sizes that must accept; None: all. A graph with the steps of a loop takes one length.
        streams: whether the compiled network must run step by step.
        trains: whether a call in training mode takes the same arguments; otherwise gradients are those in evaluation.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Callable[[int, int], tuple[Any, ...]]]]
    needs: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...] = SIZES
    served: int = 1
    cells: bool = False
    refused: str | None = None
    runtime: bool = False
    accepts: int | None = None
    streams: bool = False
    trains: bool = True

    def make(self) -> nn.Module:
        """Return the module with seeded weights, the same at each call."""
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 packages draw from it
        return self.build()[0]

    def example(self, rows: int, steps: int) -> tuple[Any, ...]:
        """Return the arguments of a call, the same at each call."""
        torch.manual_seed(0)
        call = self.build()[1]
        torch.manual_seed(rows * 1000 + steps)
        return call(rows, steps)


PROGRAMS: dict[str, Program] = {}


def program(name: str, *needs: str, **options: Any) -> Callable[[Any], Any]:
    """Declare the decorated function as the `build` of a program."""

    def declare(build: Any) -> Any:
        assert name not in PROGRAMS, name
        PROGRAMS[name] = Program(name, build, needs, **options)
        return build

    return declare


def all_programs() -> dict[str, Program]:
    """Return the programs of all modules in this package, by name."""
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if info.name != "harness" and not info.name.startswith("test_"):
            importlib.import_module(f"programs.{info.name}")
    return PROGRAMS


def skip_init(package: str) -> None:
    """Let modules of a package be imported without its `__init__`, which imports or downloads what they don't need."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, package
    sys.modules[package] = importlib.util.module_from_spec(spec)


@dataclass
class Result:
    """What was measured of a program. Differences are relative to the largest value of the tensor.

    Where both differences under `accelerate` are 0, PyTorch ran every call: `accelerate` leaves to it what it runs as
    fast, such as single steps.
    """

    name: str
    modules: int = 0  # recurrent modules of PyTorch in the program
    served: int = 0  # how many `accelerate` serves
    written: int = 0  # of those served, how many are hand-written
    off: float = 0.0  # the greatest difference of an output under `accelerate`
    off_gradients: float = 0.0  # the same of a parameter's gradient
    same_draws: bool = True  # whether training drew the same random numbers
    inference: tuple[float, float] | None = None  # ms before and after
    training: tuple[float, float] | None = None
    refused: str | None = None  # the message of `compile`
    warned: tuple[str, ...] = ()  # its warnings
    runtime: bool = False  # whether ONNX Runtime runs a part
    cells: int = 0  # with ONNX Runtime, the recurrent operators on the kernel
    nodes: int = 0
    off_compiled: float = 0.0  # the greatest difference of the network's outputs, at all sizes
    sizes: str = ""  # of the sizes, how many the network accepts
    streams: bool = False
    off_stream: float = 0.0  # the greatest difference between the stream and the network
    no_stream: str | None = None  # why it doesn't stream


def results(program: Program, timed: bool = True) -> Result:
    """Measure a program."""
    torch.set_num_threads(1)
    made = Result(program.name)
    _accelerate(program, made, timed)
    _compile(program, made)
    return made


def _accelerate(program: Program, made: Result, timed: bool) -> None:
    plain, ours = program.make(), program.make()
    made.modules = sum(isinstance(part, (nn.RNNBase, nn.RNNCellBase)) for part in plain.modules())
    try:
        cs.accelerate(ours, cells=program.cells)
    except ValueError:  # nothing in it can be served
        return
    made.served = sum(isinstance(part, Accelerated) for part in ours.modules())
    made.written = sum(isinstance(part, HandWritten) for part in ours.modules())
    for rows, steps in program.sizes:
        inputs = program.example(rows, steps)
        theirs, answers = (evaluated(part, inputs) for part in (plain, ours))
        made.off = max([made.off, *map(_off, answers, theirs)])
    inputs = program.example(*program.sizes[0])
    gradients, draws = [], []
    for part in (plain, ours):
        part.train(program.trains)
        torch.manual_seed(0)
        gradients.append(train(part, inputs))
        draws.append(torch.get_rng_state())
    made.same_draws = torch.equal(*draws)
    largest = max((float(g.abs().max()) for g in gradients[0].values()), default=0.0)
    for name, wanted in gradients[0].items():
        off = float((gradients[1][name] - wanted).abs().max()) / max(float(wanted.abs().max()), 1e-1 * largest)
        made.off_gradients = max(made.off_gradients, off)
    if timed:
        made.training = _alternate([lambda: train(plain, inputs), lambda: train(ours, inputs)])
        plain.eval(), ours.eval()
        with torch.no_grad():
            made.inference = _alternate([lambda: plain(*inputs), lambda: ours(*inputs)])


def _compile(program: Program, made: Result) -> None:
    module = program.make()
    module.eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            net = cs.compile(module, program.example(*program.sizes[0]))
        except (TypeError, ValueError) as error:  # FormatError is a ValueError
            made.refused = str(error)
        except Exception as error:  # compile must not raise anything else; the table says where
            made.refused = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    made.warned = tuple(str(one.message) for one in caught if str(one.message).startswith("compile:"))
    if made.refused is not None:
        return
    made.runtime = isinstance(net, RuntimeModel)
    if isinstance(net, RuntimeModel):
        _compare_graph(program, net, made)
        return
    made.cells, made.nodes = len(net.cells), len(net.nodes)
    still = flattened(copied(program.make()), program.example(*program.sizes[0]))
    accepted = 0
    for rows, steps in program.sizes:
        inputs = tuple(leaf for leaf in tensors_in(program.example(rows, steps)) if isinstance(leaf, torch.Tensor))
        own, lengths = without_lengths(still, inputs, any("takes lengths" in one for one in made.warned))
        ends = Ends(net, len(own))
        with torch.no_grad():
            expected = ends.answers(still, list(inputs))
        try:
            ours, states = ends.run(net, own, lengths)
        except (TypeError, ValueError):
            continue  # `sizes` says so
        accepted += 1
        found = [np.asarray(part) for part in (*ours, *(part for state in states for part in state))]
        arranged = in_network_order(ends, expected, len(ours[0]))
        made.off_compiled = max([made.off_compiled, *(matched(found, one) for one in arranged)])
        if accepted == 1:
            try:
                stream = net.stream(rows)
            except ValueError as error:
                made.no_stream = str(error)
            else:
                made.streams, made.off_stream = True, _off_stream(net, stream, own)
    made.sizes = f"{accepted}/{len(program.sizes)}"


def _compare_graph(program: Program, net: RuntimeModel, made: Result) -> None:
    """Compare a graph with its module: it takes and returns the same tensors."""
    made.cells, accepted = len(net.kernels), 0
    still = flattened(copied(program.make()), program.example(*program.sizes[0]))
    for rows, steps in program.sizes:
        inputs = tensors_in(program.example(rows, steps))
        with torch.no_grad():
            expected = tensors_in(still(*inputs))
        try:
            found = net.compute(dict(zip(net.inputs, map(array_of, inputs), strict=True)))
        except Exception:  # ONNX Runtime's errors have no common base class; `sizes` says so
            continue
        accepted += 1
        made.off_compiled = max([made.off_compiled, *map(_off, found, map(array_of, expected))])
    made.sizes = f"{accepted}/{len(program.sizes)}"


def without_lengths(module: nn.Module, inputs: tuple[Any, ...], takes: bool) -> tuple[list[Any], Any]:
    """Return the inputs of a module's network, and the rows' lengths; None if it takes none.

    Args:
        module: the module.
        inputs: its inputs.
        takes: whether it takes lengths without packing.
    """
    calls = packs(module, inputs)
    how = padded(module, inputs, calls) if calls else ""
    if takes and (found := with_lengths(module, inputs)) is not None:
        how, calls = found[0], [found[1]]
    if isinstance(how, str):
        return list(inputs), None
    return [value for n, value in enumerate(inputs) if n != how.place], np.asarray(calls[0].lengths)


def in_network_order(ends: Ends, expected: list[Any], rows: int) -> list[np.ndarray]:
    """Return a module's outputs with the axes in the order of the network's, as far as its metadata describe them."""
    made = []
    for n, value in enumerate(expected):
        layout = ends.returned.get(f"output_{n}")
        for one in floats(value):
            array = one.detach().numpy()
            made.append(array if layout is None else layout.to_network(array, rows))
    return made


def floats(value: Any) -> list[torch.Tensor]:
    """Return the tensors of numbers in a module's output, which may hold anything."""
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return [value.data]
    if isinstance(value, torch.Tensor):
        value = torch.view_as_real(value) if value.is_complex() else value
        return [value] if value.is_floating_point() else []
    if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, dict, tuple)):  # a record of results
        value = vars(value)
    parts: Iterable[Any] = value.values() if isinstance(value, dict) else value
    return [one for part in parts for one in floats(part)] if isinstance(value, (dict, list, tuple)) else []


def evaluated(module: nn.Module, inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    """Return a module's outputs in evaluation mode."""
    torch.manual_seed(0)
    module.eval()  # which returns None in some packages, as train() does
    with torch.no_grad():
        return [one.detach() for one in floats(module(*copy.deepcopy(inputs)))]  # a parameter may be among them


def train(module: nn.Module, inputs: tuple[Any, ...]) -> dict[str, torch.Tensor]:
    """Return the gradients of a sum of a module's outputs, each weighted by a fixed random number."""
    module.zero_grad()
    answers = [one for one in floats(module(*copy.deepcopy(inputs))) if one.requires_grad]
    if not answers:  # it draws samples
        return {}
    generator = torch.Generator().manual_seed(1)
    total = sum((one * torch.randn(one.shape, generator=generator)).sum() for one in answers)
    assert isinstance(total, torch.Tensor)
    total.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def _off(ours: Any, theirs: Any) -> float:
    """Return the greatest difference, relative to the largest value of `theirs`; infinite for another shape."""
    ours, theirs = (np.asarray(one) * 1 for one in (ours, theirs))  # of a mask, numbers
    if ours.shape != theirs.shape:
        return float("inf")
    apart = np.abs(ours - theirs).max(initial=0.0) / max(np.abs(theirs).max(initial=0.0), 1e-30)
    return float("inf") if np.isnan(apart) else float(apart)


def matched(found: list[np.ndarray], wanted: np.ndarray) -> float:
    """Return how far the nearest array is from `wanted`, with its axes in any order.

    A stack of states `[S, B, H]` may be several arrays.
    """

    def nearest(wanted: np.ndarray) -> float:
        least = float("inf")
        wanted = wanted.squeeze()
        for array in found:
            array = array.squeeze()
            if sorted(array.shape) == sorted(wanted.shape):
                orders = itertools.permutations(range(array.ndim))
                least = min([least, *(_off(array.transpose(order), wanted) for order in orders)])
            elif array.size == wanted.size:  # axes of features merged
                least = min(least, _off(array.reshape(wanted.shape), wanted))
        return least

    stacked = wanted.ndim if wanted.ndim > 2 else 0
    parts = [max(map(nearest, np.moveaxis(wanted, axis, 0))) for axis in range(stacked)]
    return min([nearest(wanted), *parts])


def _off_stream(net: cs.Network, stream: cs.Stream, inputs: list[Any]) -> float:
    """Return how far a stream's outputs, in two chunks, are from those of the network for the whole sequence."""
    ends = Ends(net, len(inputs))
    arrays = [ends.layouts[n].to_network(array_of(inputs[n])) for n in ends.data]
    if ends.steps:
        arrays = [np.stack([np.roll(array, t, -1) for t in range(4)], 1) for array in arrays]

    def call(run: Any, part: slice) -> tuple[np.ndarray, ...]:
        now = tuple(array[:, part] for array in arrays)
        made = run(now if len(now) > 1 else now[0])
        return made if isinstance(made, tuple) else (made,)

    half = arrays[0].shape[1] // 2
    whole, first, last = call(net, slice(None)), call(stream.run, slice(half)), call(stream.run, slice(half, None))
    off = 0.0
    for one, begin, end in zip(whole, first, last, strict=True):
        if one.ndim < end.ndim:  # the network returns the last step, and its stream every step
            end = end[:, -1]
        off = max(off, _off(np.concatenate([begin, end], 1) if end.ndim > 2 else end, one))
    return off


def _alternate(calls: list[Callable[[], Any]]) -> tuple[float, ...]:
    """Return the minimum time of each call in milliseconds, over alternating rounds."""
    counts = []
    for call in calls:
        start = time.perf_counter()
        call()
        counts.append(max(1, int(SECONDS / ROUNDS / max(time.perf_counter() - start, 1e-6))))
    least = [float("inf")] * len(calls)
    for _ in range(ROUNDS):
        for n, (call, count) in enumerate(zip(calls, counts, strict=True)):
            start = time.process_time()
            for _ in range(count):
                call()
            least[n] = min(least[n], (time.process_time() - start) / count * 1e3)
    return tuple(least)


def main() -> None:
    """Measure the named program, without times after `--untimed`."""
    name, *options = sys.argv[1:]
    found = results(all_programs()[name], timed="--untimed" not in options)
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    from programs import harness  # not this module under its name __main__, whose PROGRAMS would stay empty

    harness.main()
