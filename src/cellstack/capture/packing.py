"""Converts modules that pack sequences to modules of padded sequences; their networks take `lengths` or `mask`.

The module is read as if all rows had the same length: every operation on packed rows runs on padded rows instead. The
network skips padding by its lengths or mask. It is then compared with the module for rows of different lengths.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from cellstack.capture.copied import duplicate
from cellstack.capture.equality import FLAGS, Ends
from cellstack.capture.nested import array_of, fresh, wider
from cellstack.network import Network
from cellstack.nodes import Bidirectional, Node, Recurrent, StepMask

ROWS = 4  # in the comparison of rows of different lengths
OPERATORS = ("lstm", "gru", "rnn_tanh", "rnn_relu")  # PyTorch's operators that take packed sequences
LESS = ("sub", "__sub__", "sub_")
# Methods whose result has the same lengths, in another shape or type
MOVES = (
    "to", "cpu", "long", "int", "contiguous", "clone", "detach", "view", "reshape", "unsqueeze", "expand", "squeeze",
    "expand_as", "repeat", "__getitem__", "type",
)  # fmt: skip
# Methods whose result is the same order of rows
KEPT = (
    "to", "cpu", "cuda", "type", "long", "int", "contiguous", "clone", "detach",
)  # fmt: skip


class Packed(NamedTuple):
    """A call of `pack_padded_sequence`: the rows' lengths, and the number of rows and of steps of its input."""

    lengths: Any
    rows: int
    steps: int


class Padded(NamedTuple):
    """A module of padded sequences.

    Attributes:
        module: takes the inputs except the lengths or mask, and treats all rows as equally long.
        inputs: the example without the lengths or mask.
        place: the index of the lengths or the mask among the original inputs; None: the module computes them.
        kind: `"lengths"`, `"mask"`, `"padding mask"`, which is True where a step is not used, or `"computed"`.
        note: says how to pass the lengths to the network.
    """

    module: Any
    inputs: tuple[Any, ...]
    place: int | None
    kind: str
    note: str

    @property
    def source(self) -> str:
        """What the lengths or the mask are in the module, in words."""
        return "the lengths, which it computes," if self.place is None else f"input {self.place}"


def packs(module: Any, inputs: tuple[Any, ...]) -> list[Packed]:
    """Run a module, and return its calls of `pack_padded_sequence`."""
    calls: list[Packed] = []
    unsorted: list[Any] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(func, "__name__", "")
            if name == "sort" and sys._getframe(1).f_code.co_name == "pack_padded_sequence":
                unsorted.append(args[0])
            if name == "_pack_padded_sequence":
                x, lengths, batch_first = args
                rows, steps = x.shape[:2] if batch_first else x.shape[1::-1]
                calls.append(Packed((unsorted.pop() if unsorted else lengths).clone(), rows, steps))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        module(*fresh(inputs))
    return calls


def padded(module: Any, inputs: tuple[Any, ...], calls: list[Packed]) -> Padded | str:
    """Return a module that packs sequences as one of padded sequences, or why that is impossible."""
    lengths, rows, steps = calls[0]
    if any(call.rows != rows or not torch.equal(call.lengths, lengths) for call in calls):
        return "it packs the same rows by several lengths, but a Network takes one length per row"
    place, kind = _source(inputs, lengths)
    found = [(n, *axes) for n, value in enumerate(inputs) if n != place and (axes := _axes(value, rows, steps))]
    if not found or (kind == "computed" and found[0][1:] != (0, 1)):
        return (
            "it packs sequences by lengths that it computes, or that don't fit the axes of an input: make the lengths, "
            "one for each row, an argument of forward"
        )
    given = [value for n, value in enumerate(inputs) if n != place]
    keep = [n for n, value in enumerate(module(*fresh(inputs))) if not is_count(value, rows)]
    data, row, step = found[0]
    at = data - (place is not None and place < data), row, step
    around = duplicate(module)
    around.forward = partial(_padded_forward, around.forward, inputs, place, kind, at, keep)
    if kind == "lengths":
        note = f"pass input {place} as lengths: net(x, lengths=...)"
    elif kind == "computed":
        note = "pass the lengths, which it computes, to the network: net(x, lengths=...)"
    else:
        sign = "" if kind == "mask" else ", inverted: True at the used steps"
        note = f"pass input {place} as mask: net(x, mask=...){sign}"
    return Padded(around, tuple(given), place, kind, note)


def with_lengths(module: Any, inputs: tuple[Any, ...]) -> tuple[Padded, Packed] | None:
    """Return a module that selects each row's last step, as one of padded sequences, and its lengths; else None.

    Such a module takes lengths without packing, as in `y[torch.arange(len(y)), lengths - 1]`.
    """
    data: Any = next((value for value in inputs if value.ndim > 1), None)
    if data is None:
        return None
    for value in inputs:
        if value.ndim != 1 or value.is_floating_point() or len(value) != data.shape[0] or value.min() < 1:
            continue
        for steps in (size for size in data.shape[1:] if int(value.max()) <= size):
            call = Packed(value, len(value), steps)
            made = padded(module, inputs, [call])
            if not isinstance(made, str):
                return made, call
    return None


def _axes(value: Any, rows: int, steps: int) -> tuple[int, int] | None:
    """Return which axes of a tensor are its rows and its steps, by their lengths; None if it lacks one."""
    for row, step in ((0, 1), (1, 0), *((0, n) for n in range(2, value.ndim))):
        if value.ndim > max(row, step) and (value.shape[row], value.shape[step]) == (rows, steps):
            return row, step
    return None


def is_count(value: Any, rows: int) -> bool:
    """Return whether an output is an integer for each row, as `pad_packed_sequence` returns the lengths."""
    return value.ndim == 1 and len(value) == rows and not value.is_floating_point()


def _source(inputs: tuple[Any, ...], lengths: Any) -> tuple[int | None, str]:
    """Return the index of the input that holds the lengths, and its kind: see `Padded`. The lengths may be sorted."""
    wanted = sorted(lengths.tolist())
    for n, value in enumerate(inputs):
        if value.ndim == 1 and sorted(value.tolist()) == wanted:
            return n, "lengths"
        if value.ndim == 2 and bool(((value == 0) | (value == 1)).all()):
            for kind, used in (("mask", value != 0), ("padding mask", value == 0)):
                if sorted(used.sum(1).tolist()) == wanted:
                    return n, kind
    return None, "computed"


def _given(kind: str, example: Any, lengths: Any, steps: Any) -> Any:
    """Return lengths as an input of this kind: lengths, a mask or a padding mask, in the dtype of the example."""
    if kind == "lengths":
        return lengths.to(example.dtype)
    used = torch.arange(steps) < lengths[:, None]
    return (used if kind == "mask" else ~used).to(example.dtype)


def _padded_forward(
    forward: Any, inputs: Any, place: int | None, kind: str, at: tuple[int, int, int], keep: list[int], *given: Any
) -> tuple[Any, ...]:
    """Call a module for rows of equal length.

    Args:
        forward: its forward.
        inputs: the example, with the lengths.
        place, kind: see `Padded`.
        at: the index of a given tensor that has rows and steps, and its axes of rows and of steps.
        keep: the indices of the outputs that are returned.
        *given: its inputs except the lengths.
    """
    tensors = list(given)
    data, row, step = at
    rows, steps = given[data].shape[row], given[data].shape[step]
    full = None
    if place is not None:
        counts = torch.zeros(rows, dtype=torch.int64) + steps
        full = _given(kind, inputs[place], counts, steps)
        tensors.insert(place, full)
    with unpacked(full if kind == "lengths" else None):
        made = forward(*tensors)
    return tuple(made[n] for n in keep)


def unpacked(lengths: Any = None) -> Any:
    """Return a context in which operations on packed sequences run on padded ones, as if all rows were equally long.

    A packed sequence then holds `[rows · steps, ...]`, in the order of its padded input. Sorting by length keeps the
    order. Steps that are selected by `lengths - 1` are the last ones.

    Args:
        lengths: the tensor of the rows' lengths, if the module takes one.
    """
    sizes: dict[int, tuple[Any, Any, bool, Any]] = {}  # by id of batch_sizes: rows, steps, batch first, the tensor
    orders: dict[int, Any] = {}  # orders of the rows, by id
    moved = {id(lengths): (lengths, 0)}  # by id: a tensor of lengths, or of lengths - 1, and 0 or -1

    def shifted(value: Any) -> int | None:
        return moved[id(value)][1] if value is not None and id(value) in moved else None

    def as_last(func: Any, args: Any, kwargs: Any) -> Any:
        """Return the last step of all rows where a function selects step `lengths - 1` of each row; else None."""
        name = getattr(func, "__name__", "")
        if name == "gather":
            x, axis, index = [*args, *(kwargs[key] for key in ("dim", "index") if key in kwargs)]
            last = x.select(axis, -1).unsqueeze(axis)
            return last if shifted(index) == -1 and last.shape == index.shape else None
        if name == "__getitem__" and isinstance(args[1], tuple) and len(args[1]) == 2 and shifted(args[1][1]) == -1:
            x, (rows, _) = args
            every = isinstance(rows, torch.Tensor) and rows.ndim == 1 and len(rows) == x.shape[0]
            return x[:, -1] if every else None
        return None

    def is_order(value: Any) -> bool:
        return id(value) in orders

    def order(value: Any) -> Any:
        orders[id(value)] = value
        return value

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(func, "__name__", "")
        if name == "_pack_padded_sequence":
            x, _, first = args
            rows, steps = (x.shape[0], x.shape[1]) if first else (x.shape[1], x.shape[0])
            counts = torch.full((int(steps),), int(rows))
            sizes[id(counts)] = rows, steps, first, counts
            return x.reshape(-1, *x.shape[2:]), counts
        if len(args) > 1 and id(args[1]) in sizes and name in OPERATORS:
            data, counts, hx, *rest = args
            rows, steps, first, _ = sizes[id(counts)]
            for state in hx if isinstance(hx, (tuple, list)) else (hx,):
                if int(state.shape[1]) != int(rows):  # PyTorch's operator would read beyond the end of the state
                    raise ValueError(f"expected states of {int(rows)} rows, got {int(state.shape[1])}")
            shape = (rows, steps, data.shape[-1]) if first else (steps, rows, data.shape[-1])
            y, *after = func(data.reshape(shape), hx, *rest, first)
            return (y.reshape(-1, y.shape[-1]), *after)
        if name == "_pad_packed_sequence":
            data, counts, first, *_ = args
            rows, steps, own, _ = sizes[id(counts)]
            y = data.reshape(*((rows, steps) if own else (steps, rows)), *data.shape[1:])
            return (y if own == first else y.transpose(0, 1)), torch.zeros(rows, dtype=torch.int64) + steps
        if name == "__getitem__" and id(args[0]) in sizes and type(args[1]) is int:
            return sizes[id(args[0])][0]
        if name in ("sort", "argsort") and args[0].ndim == 1 and not args[0].is_floating_point():
            own = order(torch.arange(args[0].shape[0]))
            return own if name == "argsort" else (args[0], own)
        if name in KEPT and is_order(args[0]):
            return args[0]
        if name == "index_select" and is_order(args[2]):
            return args[0]
        if name == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(map(is_order, index)):
                return args[0][tuple(slice(None) if is_order(one) else one for one in index)]
        if name == "scatter_" and is_order(args[2]):
            return order(args[0])
        if (last := as_last(func, args, kwargs)) is not None:
            return last
        made = func(*args, **kwargs)
        by = shifted(args[0]) if args else None
        if by is not None and isinstance(made, torch.Tensor) and (name in MOVES or (name in LESS and args[1] == 1)):
            moved[id(made)] = made, by - (name in LESS)
        return made

    class Unpacked(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return run(func, args, kwargs or {})

    return Unpacked()


def with_zeros(network: Network) -> Network:
    """Return a network whose recurrent nodes return zeros at padded steps, as `pad_packed_sequence` does."""
    nodes = [
        replace(node, zero_output_for_mask=True) if isinstance(node, Recurrent) and node.return_sequences else node
        for node in network.nodes
    ]
    wired = {"inputs": {name: network.shapes[name] for name in network.inputs}, "wires": network.wires}
    return Network(nodes, network.names, network.metadata, **wired, outputs=network.outputs, _warn=False)


def with_flags(network: Network) -> Network:
    """Return a network with one more input, `mask [B, T]`, which masks the steps of the recurrent nodes' inputs.

    It is needed where other nodes before them, such as convolutions, end the mask of the network's own input.
    """
    nodes, names, wires = list[Node](), list[str](), list[tuple[str, ...]]()
    masked: set[str] = set()
    for node, name, taken in zip(network.nodes, network.names, network.wires, strict=True):
        if isinstance(node, (Recurrent, Bidirectional)) and taken[0] not in masked:
            flags = f"{name}.used"
            nodes.append(StepMask())
            names.append(flags)
            wires.append((taken[0], FLAGS))
            taken = (flags, *taken[1:])
            masked.add(flags)
        if taken[0] in masked and node.keeps_steps(2):
            masked.add(name)
        nodes.append(node)
        names.append(name)
        wires.append(taken)
    inputs = {name: network.shapes[name] for name in network.inputs} | {FLAGS: (None,)}
    return Network(nodes, names, network.metadata, inputs=inputs, wires=wires, outputs=network.outputs, _warn=False)


def ragged_difference(
    network: Network, module: Any, inputs: tuple[Any, ...], call: Packed, how: Padded, tolerance: float
) -> str | None:
    """Return how the outputs of a network and a module differ for rows of different lengths; None if they agree."""
    generator = torch.Generator().manual_seed(0)
    tall = [_with_rows(value, call.rows, ROWS) for value in inputs]
    rows, steps = max(call.rows, ROWS), call.steps
    compared = False
    for lengths in ([max(steps - 2 * n, 1) for n in range(rows)], [steps, *[1] * (rows - 1)]):  # sorted: some need it
        counts = torch.tensor(lengths)
        given = [torch.randn(v.shape, generator=generator, dtype=v.dtype) if v.is_floating_point() else v for v in tall]
        if how.place is not None:
            given[how.place] = _given(how.kind, inputs[how.place], counts, steps)
        else:
            given = [_cut(value, counts, steps) for value in given]
        try:
            with torch.no_grad():
                expected = module(*fresh(given))
                counts = counts if how.place is not None else packs(module, tuple(given))[0].lengths
        except Exception:  # the module rejects these lengths
            continue
        if int(counts.max()) != steps:
            continue
        own = [value for n, value in enumerate(given) if n != how.place]
        ends = Ends(network, len(own))
        try:
            ours, states = ends.run(network, own, array_of(counts))
        except (TypeError, ValueError) as error:
            return f"the network rejects rows of different lengths: {error}"
        why = ends.unlike(ours, states, [value for value in expected if not is_count(value, rows)], tolerance)
        if why is not None:
            return f"with rows of different lengths {why}"
        compared = True
    return None if compared else "the module rejects rows of different lengths"


def _with_rows(value: Any, rows: int, least: int) -> Any:
    """Return a tensor with more rows, if it has fewer than `least`."""
    axis = next((n for n, size in enumerate(value.shape[:2]) if size == rows), None)
    return value if axis is None or rows >= least else wider(value, axis, least - rows)


def _cut(value: Any, counts: Any, steps: int) -> Any:
    """Return a tensor `[B, T, ...]` with zeros after each row's length."""
    if value.ndim < 2 or value.shape[:2] != (len(counts), steps):
        return value
    used = torch.arange(steps) < counts[:, None]
    return value * used.reshape(*used.shape, *[1] * (value.ndim - 2)).to(value.dtype)
