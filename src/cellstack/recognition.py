"""Finds hand-written recurrent modules in a PyTorch model, and makes the fused kernel run them.

A module is traced, and its graph is compared with the step of each kind of cell (`formats/onnx/decomposed`). For the
trace its parameters are distinct random numbers, so that each number of an array that is found says which elements of
which parameters it consists of. Which arguments and results are x, y and the states is found by comparing numbers too.
Then the module and the kernel are run on random inputs and compared: outputs, states and gradients.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice, permutations, product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from cellstack.formats.compiled.exported import export
from cellstack.formats.onnx.decomposed.found import cells_of_module
from cellstack.layers import accelerate as integration
from cellstack.layers import forward, op
from cellstack.layers.eligibility import base_of, name_of, original_of
from cellstack.layers.forward import CellRun
from cellstack.layers.handwritten import (
    HandWritten,
    Known,
    Layer,
    Part,
    Place,
    Protocol,
    Recognised,
    arguments_of,
    arrays_of,
    class_for,
    form_of,
    names_of,
    refused,
    result_of,
    states_of,
    weight,
)
from cellstack.layers.known import ADAPTERS, Adapter
from cellstack.nodes.cell import Cell
from cellstack.spec import MATRICES, CellSpec, FormatError

BATCH, STEPS = 2, 3  # of the traced call
MOST_CALLS = 400  # calls that are tried
MOST_TRACES = 4  # calls that are traced
MOST_NUMBERS = 1 << 26  # elements of a module's parameters
NAMED = re.compile("lstm|gru|rnn|cell|recurrent", re.IGNORECASE)  # names of classes whose refusal is worth a line
TOLERANCE = 1e-9  # largest difference in float64, relative to the largest value


class Refused(ValueError):  # noqa: N818
    """A module isn't replaced; the message says why.

    Args:
        text: the reason.
        differs: whether its numbers differ from those of the cells that it was taken for.
    """

    def __init__(self, text: str, differs: bool = False) -> None:
        super().__init__(text)
        self.differs = differs


# ── a module with other numbers ───────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _experiments() -> Iterator[None]:
    """Make float64 the default dtype, on one thread, and hide the warnings of modules: they run on random values."""
    before, threads, state = torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)  # for small products
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def _copied(module: nn.Module) -> nn.Module:
    """Return a copy in float64 and evaluation mode."""
    return copy.deepcopy(module).to("cpu", torch.float64).eval()


def _fill(module: nn.Module, low: float, high: float, seed: int) -> dict[str, np.ndarray]:
    """Fill a module's parameters with random numbers, and return copies of them by name."""
    random = np.random.default_rng(seed)
    values = {}
    for name, weights in module.named_parameters():
        values[name] = random.uniform(low, high, tuple(weights.shape))
        with torch.no_grad():
            weights.copy_(torch.from_numpy(np.asarray(values[name])))
    return values


# ── where arrays come from ────────────────────────────────────────────────────────────────────────────────────────────


class _Origins:
    """Finds which parts of parameters an array consists of.

    Args:
        first, second: the values of the parameters in two traces, by name. The difference of an array between these is
            that of its parameters, without constants.
    """

    def __init__(self, first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> None:
        self.first = first
        self.apart = {name: array - second[name] for name, array in first.items()}
        self.names = list(self.apart)
        self.flat = np.concatenate([array.reshape(-1) for array in self.apart.values()])
        self.starts = np.cumsum([0, *(array.size for array in self.apart.values())])
        self.order = np.argsort(self.flat)
        self.sorted = self.flat[self.order]
        self.vectors = np.concatenate(
            [np.arange(a, b) for a, b, n in zip(self.starts[:-1], self.starts[1:], self.names, strict=True)
             if self.apart[n].squeeze().ndim < 2] or [np.empty(0, int)]
        )  # fmt: skip

    def _find(self, values: np.ndarray) -> np.ndarray:
        """Return the index of the element that has each value; -1 where none has."""
        places = np.clip(np.searchsorted(self.sorted, values), 1, len(self.sorted) - 1)
        places -= values - self.sorted[places - 1] < self.sorted[places] - values
        near = np.abs(self.sorted[places] - values) < 1e-11
        return np.where(near, self.order[places], -1)

    def _at(self, index: int) -> tuple[str, int]:
        place = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.names[place], int(index - self.starts[place])

    def matrix(self, one: np.ndarray, other: np.ndarray) -> Part:
        """Return the part that is a matrix `[units, inputs]`, given its values in both traces."""
        apart = one - other
        index = int(self._find(apart[:1, :1].reshape(-1))[0])
        if index >= 0:
            name, offset = self._at(index)
            whole, (rows, columns) = self.apart[name], apart.shape
            if whole.ndim == 2:
                r, c = divmod(offset, whole.shape[1])
                for transposed in (False, True):
                    sizes = (columns, rows) if transposed else (rows, columns)
                    found = whole[r : r + sizes[0], c : c + sizes[1]]
                    found = found.T if transposed else found
                    if found.shape == apart.shape and np.allclose(found, apart, rtol=0, atol=1e-11):
                        start, first = (c, r) if transposed else (r, c)
                        part = Part(name, (start, start + rows), (first, first + columns), transposed)
                        values = self.first[name][r : r + sizes[0], c : c + sizes[1]]
                        if np.allclose(values.T if transposed else values, one, rtol=0, atol=1e-11):
                            return part
        raise Refused("the weights of its gates aren't parts of its parameters: it computes them from other values")

    def vector(self, one: np.ndarray, other: np.ndarray) -> list[Part]:
        """Return the parts whose sum is a vector, given its values in both traces."""
        apart, parts = one - other, list[Part]()
        if np.abs(apart).max() > 1e-11:
            single = int(self._find(apart[:1])[0])
            pairs = [(single,)] if single >= 0 else []
            if not pairs:
                left = self._find(apart[0] - self.flat[self.vectors])
                pairs = [(int(a), int(b)) for a, b in zip(self.vectors, left, strict=True) if b >= a]
            for pair in pairs:
                found = [self._vector(index, len(apart)) for index in pair]
                total = sum(self.flat[index : index + len(apart)] for index in pair)
                if None not in found and np.allclose(total, apart, rtol=0, atol=1e-11):
                    parts = [part for part in found if part is not None]
                    break
            else:
                raise Refused("its biases aren't sums of one or two parameters")
        rest = one - sum((self.first[p.name].reshape(-1)[slice(*p.rows)] for p in parts), np.zeros(len(one)))
        if np.ptp(rest) > 1e-11:
            raise Refused("its biases contain numbers that aren't parameters")
        value = float(np.round(rest[0], 10))
        return [*parts, *([Part("", (0, len(one)), value=value)] if value or not parts else [])]

    def _vector(self, index: int, count: int) -> Part | None:
        name, offset = self._at(index)
        fits = offset + count <= self.apart[name].size
        return Part(name, (offset, offset + count)) if fits else None


def _layer(origins: _Origins, one: Cell, other: Cell) -> Layer:
    """Return a cell as a layer of a module, given the cell in both traces."""
    spec = one.spec
    if spec != other.spec:
        raise Refused("its equations depend on the values of its parameters")
    blocks: dict[str, list[list[Any]]] = {}
    for name in spec.shapes:
        first, second = (np.atleast_2d(cell.arrays[name]) for cell in (one, other))
        wide = spec.units if first.shape[1] % spec.units == 0 and name != "projection" else first.shape[1]
        ranges = [slice(n, n + wide) for n in range(0, first.shape[1], wide)]
        if name in MATRICES:
            blocks[name] = [[origins.matrix(first[:, r].T, second[:, r].T) for r in ranges]]
        else:
            blocks[name] = [[origins.vector(a[r], b[r]) for r in ranges] for a, b in zip(first, second, strict=True)]
    in_torch = _in_torch_layout(spec, blocks)
    if in_torch is not None:
        return in_torch
    weights = []
    for name, shape in spec.shapes.items():
        if name in MATRICES:
            weights.append(weight(blocks[name], shape))
        else:
            row = [block for each in blocks[name] for block in each]
            weights.append(weight(_terms(row), shape))
    return Layer(op.CellCall(spec), tuple(weights))


def _terms(row: Sequence[list[Part]]) -> list[list[Part]]:
    """Return vectors, each a sum of parts, as a sum of vectors."""
    count = max(map(len, row))
    return [[parts[n] if n < len(parts) else Part("", (0, _length(parts[0]))) for parts in row] for n in range(count)]


def _length(part: Part) -> int:
    return part.rows[1] - part.rows[0]


def _in_torch_layout(spec: CellSpec, blocks: Mapping[str, list[list[Any]]]) -> Layer | None:
    """Return a layer with the weights as PyTorch's modules have them, which are read in place; None for other cells."""
    known = spec.of_kind.names.get("torch")
    plain = CellSpec(
        spec.input_size, spec.units, kind=spec.kind, use_bias=spec.use_bias, activation=str(spec.activations[0])
        if not spec.of_kind.gated else "tanh"
    )  # fmt: skip
    if known is None or plain != spec:
        return None
    places = [spec.gates.index(gate) for gate in known.order]
    call = op.CellCall(spec, torch_layout=True)
    shapes = call.shapes
    weights = [
        weight([[blocks[name][0][n] for n in places]], shapes[theirs])
        for name, theirs in (("kernel", "weight_ih"), ("recurrent_kernel", "weight_hh"))
    ]
    if spec.use_bias:
        pairs = [[each[n] for each in blocks["bias"]] for n in places]
        two = [_apart(pair, fixed=spec.two_biases and gate == known.order[-1]) for pair, gate in
               zip(pairs, known.order, strict=True)]  # fmt: skip
        order = [next((p[n].name for p in two if p[n].name), "") for n in range(2)]
        fixed = two[-1]
        free = two[:-1] if spec.two_biases else two
        if spec.two_biases:
            order = [fixed[0].name, fixed[1].name]
        arranged = [pair[::-1] if (pair[0].name, pair[1].name) == tuple(order[::-1]) else pair for pair in free]
        arranged += [fixed] if spec.two_biases else []
        for n, name in enumerate(("bias_ih", "bias_hh")):
            weights.append(weight([[pair[n] for pair in arranged]], shapes[name]))
    return Layer(call, tuple(weights))


def _apart(pair: Sequence[list[Part]], fixed: bool) -> tuple[Part, Part]:
    """Return the biases of a gate as two vectors: of x and of h where that is `fixed`, otherwise in any order."""
    units = _length(pair[0][0])
    zeros = Part("", (0, units))
    if fixed:
        if any(len(parts) > 1 for parts in pair):
            raise Refused("its candidate's biases are sums of several parameters")
        return pair[0][0], pair[1][0]
    parts = [part for each in pair for part in each if part != zeros]
    if len(parts) > 2:
        raise Refused("its biases are sums of more than two vectors")
    first, second = [*parts, zeros, zeros][:2]
    return first, second


# ── calls ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _guesses(module: nn.Module, layers: int) -> Iterator[tuple[Any, ...]]:
    """Yield arguments with which a module of some layers may be called: x, and states where it takes some."""
    defaults = list(names_of(module).values())
    least, most = defaults.count(inspect.Parameter.empty), len(defaults)
    sizes = {size for array in module.parameters() for size in array.shape}
    own = {value for value in vars(module).values() if type(value) is int}  # such as self.hidden_size
    units = [size for size in sizes if any(size * n in sizes for n in (1, 2, 3, 4))]
    ordered = [sorted(each, key=lambda size: (size not in own, size)) for each in (units, sizes)]
    for hidden, width in product(*ordered):
        for shape in ((BATCH, STEPS, width), (BATCH, width)):
            x = torch.randn(shape)
            for args in _with_states(x, hidden, layers):
                if least <= len(args) <= most:
                    yield args


def _with_states(x: Tensor, hidden: int, layers: int) -> Iterator[tuple[Any, ...]]:
    """Yield x with states of `hidden` units, in several forms."""
    batches = (BATCH, STEPS) if x.ndim == 3 else (BATCH,)
    shapes = [shape for n in batches for shape in ((n, hidden), (1, n, hidden), (layers, n, hidden))]
    for shape in dict.fromkeys(shapes):
        h, c = torch.randn(shape), torch.randn(shape)
        yield x, h
        yield x, (h, c)
        yield x, [h, c]
        yield x, h, c
    yield (x,)
    yield x, None


class _Call(NamedTuple):
    """A call of a module: its arguments, their form, and the tensors: x and the states."""

    args: tuple[Any, ...]
    form: Any
    tensors: list[Tensor]


def _call(module: nn.Module, args: tuple[Any, ...]) -> _Call | None:
    """Return a call; None where the module rejects it, or it isn't a call with tensors only."""
    tensors: list[Tensor] = []
    given = arguments_of(names_of(module), args, {})
    form = form_of(given, tensors)
    if (
        given is None
        or not tensors
        or not all(tensor.is_floating_point() for tensor in tensors)
        or tensors[0].ndim not in (2, 3)
    ):
        return None
    try:
        with torch.no_grad():
            module(*args)
    except Exception:  # it has other arguments
        return None
    return _Call(given, form, tensors)


def _as_float64(args: Any) -> Any:
    if isinstance(args, Tensor):
        return args.detach().to("cpu", torch.float64) if args.is_floating_point() else args
    return type(args)(_as_float64(part) for part in args) if type(args) in (tuple, list) else args


def _shortened(args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Return recorded arguments with fewer steps, for either axis of time, and as they are."""
    x = args[0]
    if not isinstance(x, Tensor) or x.ndim != 3:
        return [args]
    return [(x[:, :STEPS], *args[1:]), (x[:STEPS], *args[1:]), args]


def _protocol(module: nn.Module, known: Known, call: _Call) -> Protocol:
    """Return how the arguments and results of a call correspond to x, y and the states."""
    x, *given = call.tensors
    with torch.no_grad():
        result = module(*call.args)
    count, layers = len(known.layers[0].call.sizes), len(known.layers)
    times = (-1,) if x.ndim == 2 else (1, 0)
    if x.ndim == 2 and layers > 1:
        raise Refused("it steps several layers at once")
    for time in times:
        for places in _arrangements(given, count, layers):
            protocol = Protocol(time, places, None)
            ran = _run(known, protocol, module, call.tensors)
            if ran is None:
                continue
            template = _template(result, time, *ran)
            if template is not None:
                return protocol._replace(result=template)
    raise Refused("its results aren't y and the states of its cells, so it computes more than these")


def _arrangements(given: Sequence[Tensor], count: int, layers: int) -> Iterator[tuple[Place, ...]]:
    """Yield what each tensor after x may be."""
    if not given:
        yield ()
        return
    single = [0 if tensor.ndim == 3 else -1 for tensor in given]
    if len(given) == count:
        for order in permutations(range(count)):
            if layers == 1:
                yield tuple(Place(n, 0, axis) for n, axis in zip(order, single, strict=True))
            if all(tensor.ndim == 3 for tensor in given):
                yield tuple(Place(n, -1) for n in order)
    if layers > 1 and len(given) == count * layers:
        for order in permutations(range(count)):
            by_layer = [(n, layer) for layer in range(layers) for n in order]
            by_state = [(n, layer) for n in order for layer in range(layers)]
            for way in (by_layer, by_state):
                yield tuple(Place(n, layer, axis) for (n, layer), axis in zip(way, single, strict=True))


def _run(
    known: Known, protocol: Protocol, module: nn.Module, tensors: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Sequence[Tensor]]] | None:
    """Return y in the axes of x, and the final states of each layer; None where the states don't fit."""
    x, *given = tensors
    if x.shape[-1] != known.layers[0].call.spec.input_size:
        return None
    states = states_of(known, protocol, given, x.shape[0 if protocol.time != 0 else 1])
    if states is None:
        return None
    sequence = x.unsqueeze(1) if protocol.time < 0 else x.transpose(0, 1) if protocol.time == 0 else x
    arrays = arrays_of(known, module, x)
    runs = [CellRun(layer.call, own, state) for layer, own, state in zip(known.layers, arrays, states, strict=True)]
    y, _, ends, _ = forward.run(runs, sequence, None, None)
    return y.squeeze(1) if protocol.time < 0 else y.transpose(0, 1) if protocol.time == 0 else y, ends


def _template(result: Any, time: int, y: Tensor, ends: Sequence[Sequence[Tensor]]) -> Any:
    """Return a result with a `Place` for each tensor; None where a tensor is none of y and the states."""
    if isinstance(result, Tensor):
        found = _places(time, y, ends)
        return next((place for place, value in found if _same(value, result)), None)
    if type(result) in (tuple, list) and result:
        parts = [_template(part, time, y, ends) for part in result]
        return None if any(part is None for part in parts) else type(result)(parts)
    return None


def _places(time: int, y: Tensor, ends: Sequence[Sequence[Tensor]]) -> Iterator[tuple[Place, Tensor]]:
    """Yield what a tensor of a result may be, with its value."""
    if time >= 0:
        yield Place(-1, axis=time), y
        yield Place(-1, axis=1 - time), y.transpose(0, 1)
    for layer, states in reversed([*enumerate(ends)]):
        for n, state in enumerate(states):
            for axis in (-1, 0, 1):
                yield Place(n, layer, axis), state if axis < 0 else state.unsqueeze(axis)
    if len(ends) > 1:
        for n in range(len(ends[0])):
            yield Place(n, -1), torch.stack([states[n] for states in ends])


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and _difference(one, other) <= TOLERANCE


def _difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the largest value, at least 1."""
    if not bool(torch.isfinite(one).all()) or not one.numel():
        return float("inf") if one.numel() else 0.0
    return float((one - other).abs().max() / other.abs().max().clamp(min=1.0))


# ── recognition ───────────────────────────────────────────────────────────────────────────────────────────────────────


def recognise(module: nn.Module, calls: Sequence[tuple[Any, ...]] = ()) -> Known:
    """Return what a hand-written module computes.

    Args:
        module: the module.
        calls: arguments of calls of it, where known.

    Raises:
        Refused: it isn't known to be the step of a cell, or a loop of steps.
    """
    if sum(array.numel() for array in module.parameters()) > MOST_NUMBERS:
        raise Refused(f"it has more than {MOST_NUMBERS} weights")
    with _experiments():
        copied = _copied(module)
        one, other = (_fill(copied, 0.1, 1.0, seed) for seed in (1, 2))
        recorded = [short for args in calls for short in _shortened(_as_float64(args))]
        seen = _accepted(copied, recorded or islice(_guesses(copied, 1), MOST_CALLS))
        if not seen:
            raise Refused("it accepts no arguments that a cell or a layer takes: pass example=")
        known = _traced(copied, seen, one, other)
        if len(known.layers) > 1 and not recorded:
            seen += _accepted(copied, islice(_guesses(copied, len(known.layers)), MOST_CALLS))
        _fill(copied, -0.4, 0.4, 3)
        chosen, refused = dict[Any, _Call](), Refused("")
        protocols: dict[Any, Protocol] = {}
        for call in seen:
            if call.form not in protocols:
                try:
                    protocols[call.form] = _protocol(copied, known, call)
                    chosen[call.form] = call
                except Refused as error:
                    refused = error
        if not protocols:
            raise refused
        known = replace(known, protocols=protocols, training=_is_steady(copied, chosen, protocols))
        _verify(copied, known, chosen)
        return known


def _accepted(module: nn.Module, calls: Iterable[tuple[Any, ...]]) -> list[_Call]:
    """Return the calls that a module accepts, those with the most states first; each combination of shapes once."""
    found: dict[Any, _Call] = {}
    for args in calls:
        call = _call(module, args)
        if call is not None:
            found.setdefault((call.form, *(tensor.shape for tensor in call.tensors)), call)
    return sorted(found.values(), key=lambda call: -len(call.tensors))


def _traced(
    module: nn.Module, calls: Sequence[_Call], one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]
) -> Known:
    """Return the cells of a module, without its protocols, from the first of some calls in which it has any."""
    why: Exception | None = None
    tried = set[Any]()
    for call in calls:
        key = call.form
        if key in tried or len(tried) == MOST_TRACES:
            continue
        tried.add(key)
        try:
            found = [_exported(module, call, values) for values in (one, other)]
            if len(found[0]) != len(found[1]):
                raise Refused("its equations depend on the values of its parameters")
            origins = _Origins(one, other)
            layers = tuple(_layer(origins, *pair) for pair in zip(*found, strict=True))
            return Known(layers, {}, names_of(module), False)
        except (Refused, FormatError) as error:
            why = why or error
    assert why is not None
    raise Refused(str(why)) from why


def _exported(module: nn.Module, call: _Call, values: Mapping[str, np.ndarray]) -> list[Cell]:
    """Return the cells in the graph of a call of a module whose parameters have these values."""
    with torch.no_grad():
        for name, array in module.named_parameters():
            array.copy_(torch.from_numpy(np.asarray(values[name])))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "module.onnx")
        try:
            export(module, call.args, path, {"input_names": [f"input_{n}" for n in range(len(call.tensors))]})
            return cells_of_module(path, len(call.tensors) - 1)
        except FormatError as error:
            raise FormatError(str(error).replace(f"{path}: ", "").replace(path, "its graph")) from error


def _is_steady(module: nn.Module, calls: Mapping[Any, _Call], protocols: Mapping[Any, Protocol]) -> bool:
    """Whether a module computes the same in training as in evaluation."""
    call = next(calls[form] for form in protocols)
    with torch.no_grad():
        steady = _flat(module(*call.args))
        try:
            results = [_flat(module.train()(*call.args)) for _ in range(2)]
        finally:
            module.eval()
    return all(_same(a, b) for result in results for a, b in zip(result, steady, strict=True))


def _flat(value: Any) -> list[Tensor]:
    """Return the tensors of floating-point numbers in a value."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [found for part in value for found in _flat(part)] if isinstance(value, (tuple, list)) else []


SCALES = (0.1, 1.0, 4.0)  # of inputs, in the comparison
SIZES = ((1, 1), (2, 3), (5, 7))  # rows and steps


def _verify(module: nn.Module, known: Known, calls: Mapping[Any, _Call]) -> None:
    """Compare a module with the kernel on random inputs of several scales and sizes.

    Raises:
        Refused: they differ.
    """
    random = torch.Generator().manual_seed(4)
    for form, protocol in known.protocols.items():

        def run(*args: Any, protocol: Protocol = protocol) -> Any:
            ran = _run(known, protocol, module, _flat(args))
            assert ran is not None
            return result_of(protocol, *ran, False)

        for scale, sizes in product(SCALES, SIZES):
            args = _resized(calls[form], protocol, *sizes, scale, random)
            if _call(module, args) is not None:  # the module accepts these sizes
                _compare(module, module, run, args, known.text())


def _compare(module: nn.Module, theirs: Any, ours: Any, args: tuple[Any, ...], text: str) -> None:
    """Compare two functions: their results, and the gradients of the arguments and of a module's parameters.

    Raises:
        Refused: they differ.
    """
    ran = []
    for function in (theirs, ours):
        given = _leaves(args)
        state = torch.get_rng_state()
        result = _flat(function(*given))
        torch.set_rng_state(state)
        wanted = [value for value in (*_flat(given), *module.parameters()) if value.requires_grad]
        total = torch.stack(
            [(value * torch.sin(torch.arange(value.numel()).view(value.shape))).sum() for value in result]
        ).sum()
        found = torch.autograd.grad(total, wanted, allow_unused=True)
        ran.append((result, [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]))
    for what, place in (("outputs", 0), ("gradients", 1)):
        pairs = [*zip(ran[1][place], ran[0][place], strict=True)]
        worst = max(_difference(a, b) if a.shape == b.shape else float("inf") for a, b in pairs)
        if worst > TOLERANCE:
            what = f"its {what} differ from those of the {text} that it was taken for by {worst:.1e}"
            raise Refused(what, differs=True)


def _resized(
    call: _Call, protocol: Protocol, rows: int, steps: int, scale: float, random: torch.Generator
) -> tuple[Any, ...]:
    """Return the arguments of a call with other numbers of rows and steps, and random values."""
    first = True

    def made(value: Any) -> Any:
        nonlocal first
        if not isinstance(value, Tensor):
            return type(value)(map(made, value)) if type(value) in (tuple, list) else value
        shape = list(value.shape)
        if first and protocol.time >= 0:
            shape[protocol.time], shape[1 - protocol.time] = steps, rows
        else:
            shape[-2] = rows
        first = False
        return scale * torch.randn(shape, generator=random)

    return made(call.args)


def _leaves(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone().requires_grad_()
    if isinstance(value, PackedSequence):
        return value._replace(data=value.data.clone().requires_grad_())
    return type(value)(map(_leaves, value)) if type(value) in (tuple, list) else value


# ── classes of other libraries ────────────────────────────────────────────────────────────────────────────────────────


def _adapted(module: nn.Module, adapter: Adapter) -> type:
    """Return the class that runs a module of a known class.

    Raises:
        Refused: the kernel doesn't support it as it is configured, or computes something else.
    """
    try:
        text = adapter.describe(module)
    except ValueError as error:
        raise Refused(str(error)) from None
    made = class_for(original_of(type(module)), adapter.base, cells_text=text)
    with _experiments():
        for training in (False, True):
            theirs = _copied(module).train(training)
            _fill(theirs, -0.4, 0.4, 3)
            ours = copy.deepcopy(theirs)
            ours.__class__ = made
            weights = dict(theirs.named_parameters())
            for args in adapter.examples(theirs):
                _compare(theirs, theirs, _with_parameters(ours, weights), args, text)
    return made


def _with_parameters(module: nn.Module, weights: Mapping[str, Tensor]) -> Any:
    """Return a function that calls a module with the parameters of another one."""
    return lambda *args: torch.func.functional_call(module, dict(weights), args)


# ── a whole model ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that may be hand-written cells or loops, outer ones first."""
    for name, part in model.named_modules():
        own = type(part).__module__
        if own.startswith(("torch.nn.modules.", "cellstack.")) or base_of(type(part)) is not None:
            continue
        if any(array.ndim > 1 for array in part.parameters()):
            yield name, part


def _recorded(model: nn.Module, example: Any) -> dict[int, list[tuple[Any, ...]]]:
    """Return the arguments of the first calls of the modules in a model, by the module's id."""
    found: dict[int, list[tuple[Any, ...]]] = {}

    def note(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values, calls = arguments_of(names_of(part), args, kwargs), found.setdefault(id(part), [])
        if values is not None and len(calls) < MOST_TRACES:
            calls.append(values)

    hooks = [part.register_forward_pre_hook(note, with_kwargs=True) for _, part in _candidates(model)]
    try:
        with torch.no_grad():
            model(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def accelerate(model: nn.Module, example: Any = None) -> nn.Module:
    """Replace the classes of the hand-written recurrent modules in a model: see `cellstack.accelerate`.

    Raises:
        TypeError: `model` isn't a torch module.
        ValueError: it contains no recurrent module that the kernel can run.
    """
    recorded = {} if example is None else _recorded(model, example)
    inside, why = set[int](), dict[str, tuple[nn.Module, Refused]]()
    for name, part in _candidates(model):
        if id(part) in inside:
            continue
        if not isinstance(part, HandWritten):
            try:
                part.__class__ = _class_of(part, recorded.get(id(part), ()))
            except Refused as error:
                why[name] = part, error
                continue
        refused.pop(part, None)
        inside |= {id(inner) for inner in part.modules()}
    differing = [f"{name or type(part).__name__}: {error}" for name, (part, error) in why.items() if error.differs]
    if differing:
        warnings.warn(f"accelerate: not replaced: {'; '.join(differing)}", stacklevel=3)
    for part, error in why.values():
        replaced = any(isinstance(inner, HandWritten) for inner in part.modules())
        if not replaced and (error.differs or NAMED.search(type(part).__name__)):
            refused[part] = str(error)
    try:
        return integration.accelerate(model)
    except ValueError as error:
        if any(isinstance(part, HandWritten) for part in model.modules()):
            return model
        listed = "; ".join(f"{name_of(part)}: {text}" for part in model.modules() if (text := refused.get(part)))
        raise ValueError(f"{error}{f'; hand-written modules: {listed}' if listed else ''}") from None


def _class_of(module: nn.Module, calls: Sequence[tuple[Any, ...]]) -> type:
    """Return the class that runs a hand-written module on the kernel."""
    adapter = ADAPTERS.get(f"{type(module).__module__}.{type(module).__qualname__}")
    if adapter is not None:
        return _adapted(module, adapter)
    known = recognise(module, calls)
    return class_for(type(module), Recognised, known=known, cells_text=known.text())
