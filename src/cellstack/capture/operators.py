"""PyTorch's recurrent functions on the kernel's op while `torch.export` records a module, and packed rows padded.

`torch.export` can't record packed sequences, whose sizes depend on values, and fixes the number of steps of PyTorch's
own recurrent functions. Here a packed sequence `[B, T, ...]` stays padded: its data are `[B · T, ...]`, its layers
get the mask `arange(T) < lengths`, and unpacking writes the padding value after each row's length. So operations on
each packed step remain the same.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from cellstack.capture import complexes
from cellstack.capture.copied import duplicate
from cellstack.capture.counts import FUNCTIONS, SYMBOLS, is_open
from cellstack.capture.sizes import OURS, Renamed, outside, pytorch
from cellstack.layers.accelerated import run_stack
from cellstack.layers.eligibility import KINDS

LONG = 12  # operations in a size of a tensor, above which it becomes a symbol of its own
MODES = {mode.lower(): mode for mode in KINDS}  # of PyTorch's modules, by the function that each calls


def _selected(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask]


def _linspace(start: Any, end: Any, steps: Any, **kwargs: Any) -> Tensor:
    if isinstance(steps, int):
        return torch.linspace(start, end, steps, **kwargs)
    return start + torch.arange(steps, **kwargs) / torch.full((), steps - 1).clamp(min=1) * (end - start)


def _diff(x: Tensor, n: int = 1, dim: int = -1, prepend: Tensor | None = None, append: Tensor | None = None) -> Tensor:
    x = torch.cat([part for part in (prepend, x, append) if part is not None], dim)
    before, less = (slice(None),) * (dim % x.ndim), torch.logical_xor if x.dtype is torch.bool else torch.sub
    for _ in range(n):
        x = less(x[(*before, slice(1, None))], x[(*before, slice(-1))])
    return x


def _less_from(x: Tensor, other: Any, *, alpha: Any = 1) -> Tensor:
    return torch.sub(other if isinstance(other, Tensor) else torch.full((), other), x, alpha=alpha)


def _pooled(pool: Any, reduce: str, axes: int, x: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Pool to one entry along some axes, and leave the others."""
    kept = (output_size,) * axes if isinstance(output_size, int) else tuple(output_size)
    if set(kept) not in ({1}, {None, 1}) or return_indices:
        return pool(x, output_size, **({"return_indices": True} if return_indices else {}))
    return getattr(x, reduce)([n - axes for n, size in enumerate(kept) if size == 1], keepdim=True)


# Functions that PyTorch's exporter to ONNX lacks, or of which torch.export fixes the size, by others.
EQUAL = {
    "_is_all_true": torch.all,
    "diff": _diff,
    "linspace": _linspace,
    "rsub": _less_from,
    "__rsub__": _less_from,
    "masked_select": lambda x, mask: _selected(*torch.broadcast_tensors(x, mask)),
    **{
        (name := f"adaptive_{mode}_pool{n}d"): partial(_pooled, getattr(torch.nn.functional, name), reduce, n)
        for mode, reduce in (("avg", "mean"), ("max", "amax"))
        for n in (2, 3)
    },
}


def _tensors(call: Any) -> list[Tensor]:
    """Return the tensors in what a call returns, which sees that it is exported."""
    with torch.random.fork_rng(devices=[]), mock.patch.object(torch.compiler, "is_exporting", return_value=True):
        return [one for one in tree_leaves(call()) if isinstance(one, Tensor)]


def contiguous(x: Tensor) -> Tensor:
    """Return a contiguous copy: whether a tensor is contiguous already, `torch.export` would ask for its sizes."""
    return x.clone(memory_format=torch.contiguous_format)


class Padded(NamedTuple):
    """Padded rows that stand for packed ones: their lengths, and the sizes of the padded tensor."""

    lengths: Tensor
    rows: Any
    steps: Any
    sizes: Tensor  # in the place of batch_sizes; kept so that no other tensor gets its id

    @property
    def used(self) -> Tensor:
        """The mask, bool `[B, T]`."""
        return torch.arange(self.steps) < self.lengths[:, None]


def with_checks(module: Any) -> Any:
    """Return a copy of a module in which PyTorch's recurrent functions check their sizes.

    They don't do so themselves for packed rows, and read beyond the end of the weights or the states.
    """
    made = duplicate(module)
    made.forward = partial(_checked_forward, made.forward)
    return made


def _checked_forward(forward: Any, *args: Any) -> Any:
    with _Checks():
        return forward(*args)


class _Checks(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of PyTorch."""
        name = getattr(func, "__name__", "")
        if name in MODES:
            packed = isinstance(args[3], (tuple, list))
            x, hx, weights = (args[0], *args[2:4]) if packed else args[:3]
            check_sizes(name, x.shape[-1], int(args[1][0]) if packed else x.shape[0 if args[-1] else 1], hx, weights)
        return func(*args, **(kwargs or {}))


def check_sizes(name: str, features: Any, rows: Any, hx: Any, weights: Any) -> list[Tensor]:
    """Return the states of a recurrent function as a list.

    Raises:
        ValueError: they have another number of rows than x, or x has other features than the weights.
    """
    states = list(hx) if isinstance(hx, (tuple, list)) else [hx]
    if features != weights[0].shape[1] or any(state.shape[1] != rows for state in states):
        raise ValueError(f"{name}: x or a state has another size than the weights or the number of rows")
    return states


class Operators(TorchFunctionMode):
    """A context in which recurrent functions call the kernel's op, and packed rows are padded ones.

    Args:
        cut: whether unpacking returns the steps of the longest row, as in PyTorch, and not all steps. Other tensors
            may have all steps, and `torch.export` doesn't know whether the longest row has all.
        steps: whether single steps of cells call the op too; else they stay equations.
    """

    def __init__(self, cut: bool = True, steps: bool = True) -> None:
        super().__init__()
        self.cut, self.steps = cut, steps
        self.packed: dict[int, Padded] = {}  # by id of batch_sizes
        self.packs = False
        self.lists = {kind: kind.tolist for kind in (FakeTensor, FunctionalTensor)}
        self.renamed, self.finding, self.shorter = Renamed(FUNCTIONS), False, False

    def find(self, call: Any) -> None:
        """Call a module, to find the files in which functions on sizes are replaced: one may be called first in a file.

        Functions of PyTorch aren't, except those of complex numbers. If it packs rows, it is called again with padded
        ones, and of half the length except the first.

        Raises:
            ValueError: padded rows change its outputs.
        """
        self.finding = self.shorter = True
        expected = _tensors(call)
        self.finding = False
        if self.packs and self.cut:
            try:
                torch.testing.assert_close(_tensors(call), expected, rtol=1e-3, atol=1e-4, equal_nan=True)
            except AssertionError as error:
                raise ValueError(
                    "export_onnx: it returns a packed sequence, or computes across its steps: these are padded in the "
                    "file. Call pad_packed_sequence before, and use the lengths"
                ) from error
        self.shorter = False

    def __enter__(self) -> Operators:
        """Keep lengths a tensor in `pack_padded_sequence(x, lengths.tolist())`: a list has a fixed number of rows."""
        self.renamed.within(torch.nn.modules.rnn.__dict__)
        for kind, own in self.lists.items():
            kind.tolist = lambda t, own=own: t if is_open(t) else own(t)  # type: ignore[attr-defined]
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        """Restore the conversions."""
        self.renamed.restore()
        for kind, own in self.lists.items():
            kind.tolist = own  # type: ignore[attr-defined]
        super().__exit__(*raised)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of PyTorch."""
        self.renamed.at(outside(sys._getframe(1), pytorch(), OURS))
        name = getattr(func, "__name__", "")
        first = self.packed.get(id(args[0])) if args else None
        again = partial(self.__torch_function__, func, types)
        made = complexes.run(func, args, kwargs or {}, lambda *own, **named: again(own, named))
        if made is not NotImplemented:
            return made
        if name == "_pack_padded_sequence" and self.shorter:
            x, lengths, batch_first = args
            args = x, torch.cat([lengths[:1], (lengths[1:] // 2).clamp(min=1)]), batch_first
            self.packs = True
        if self.finding:
            return func(*args, **(kwargs or {}))
        if name in MODES and not kwargs:
            return self._recurrent(MODES[name], *args)
        if name.removesuffix("_cell") in MODES and not kwargs:
            return (_step if self.steps else _equations)(MODES[name.removesuffix("_cell")], *args)
        if func == Tensor.data.__get__:  # type: ignore[attr-defined] # which would be a constant
            return args[0].detach()
        if func == Tensor.nbytes.__get__:  # type: ignore[attr-defined] # which takes no open size
            return args[0].numel() * args[0].itemsize
        if name in EQUAL:
            func = EQUAL[name]
        if (
            name == "__setitem__"
            and isinstance(args[2], (int, float))
            and getattr(args[1], "dtype", None) is torch.bool
        ):
            x, mask, value = args  # PyTorch would make a constant of the number, and not use it
            return x.masked_fill_(mask[(..., *[None] * (x.ndim - mask.ndim))], value)
        if name == "_pack_padded_sequence":
            return self._pack(*args)
        if name == "_pad_packed_sequence":
            return self._pad(*args)
        if name == "chunk" and (parts := _chunks(*args, **(kwargs or {}))) is not None:
            return parts
        if name == "reshape" and not kwargs and not all(isinstance(size, int) for size in args[0].shape):
            return contiguous(args[0]).view(-1).view(*args[1:])  # PyTorch would compare each old size with the new ones
        if name == "__getitem__" and first is not None and args[1] == 0:  # the number of rows
            return first.rows
        if name in ("as_tensor", "tensor") and isinstance(args[0], SYMBOLS):  # which would be a number
            return torch.full((), args[0], **(kwargs or {}))  # type: ignore[arg-type]
        if name in ("__getitem__", "__setitem__"):
            args = args[0], _with_sizes(args[1]), *args[2:]
        if name == "batch_norm":  # of another tensor, torch.export records other strides than those of the result
            args = contiguous(args[0]), *args[1:]
        y = func(*args, **(kwargs or {}))
        return _with_short_sizes(y) if type(y) in self.lists else y

    def _pack(self, x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        x = x if batch_first else x.transpose(0, 1)
        rows, steps = x.shape[:2]
        longest: Any = lengths.max().item() if self.cut else steps
        torch._check(longest > 0)
        torch._check(longest <= steps)
        sizes = torch.full((longest,), rows)
        self.packed[id(sizes)] = Padded(lengths, rows, steps, sizes)
        return contiguous(x).view(rows * steps, *x.shape[2:]), sizes

    def _pad(self, data: Tensor, sizes: Tensor, batch_first: bool, value: float, total: int) -> tuple[Tensor, Tensor]:
        padded = self.packed[id(sizes)]
        y = contiguous(data).view(padded.rows, padded.steps, *data.shape[1:])
        y = torch.where(padded.used.reshape(padded.rows, padded.steps, *[1] * (y.ndim - 2)), y, value)
        torch._check(total <= y.shape[1])
        y = y[:, :total] if self.cut else y
        return y if batch_first else y.transpose(0, 1), padded.lengths

    def _recurrent(self, mode: str, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """Run `torch.lstm` and its like: on `(input, hx, …, batch_first)` or `(data, batch_sizes, hx, …)`."""
        padded = self.packed.get(id(args[0]))
        if padded is None:
            hx, weights, biases, layers, _, _, both, first = args
            x = x if first else x.transpose(0, 1)
        else:
            (hx, weights, biases, layers, _, _, both), first = args[1:], True
            x = contiguous(x).view(padded.rows, padded.steps, x.shape[-1])
        states = check_sizes(mode, x.shape[2], x.shape[0], hx, weights)
        used = None if padded is None else padded.used
        y, ends = run_stack(mode, x, weights, states, used, biases, layers, both)  # y [T, B, ·]
        y = y.transpose(0, 1) if first else y
        return y if padded is None else contiguous(y).view(padded.rows * padded.steps, y.shape[-1]), *ends


@torch.library.custom_op("cellstack::with_new_size", mutates_args=())
def with_new_size(x: Tensor, axis: int) -> Tensor:
    """Return x with a new symbol as the size of an axis."""
    return contiguous(x)  # as `new_empty` below: a fake tensor needs the strides of the real one


@with_new_size.register_fake
def _(x: Tensor, axis: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(shape)


def _with_short_sizes(x: Tensor) -> Tensor:
    """Return a tensor with new symbols in the place of long expressions, which take PyTorch minutes to compare."""
    for axis, size in enumerate(x.shape):
        if isinstance(size, SymInt) and size.node.expr.count_ops() > LONG:
            x = with_new_size(x, axis)
    return x


def _with_sizes(index: Any) -> Any:
    """Return an index with the bounds of slices as sizes: a tensor as a bound would become a number."""
    if isinstance(index, tuple):
        return tuple(map(_with_sizes, index))
    if not isinstance(index, slice):
        return index
    bounds = index.start, index.stop, index.step
    return slice(*(bound.item() if isinstance(bound, Tensor) else bound for bound in bounds))


def _chunks(x: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...] | None:
    """Return equal chunks along an open axis, which PyTorch's exporter would give a fixed size; None otherwise."""
    size = x.shape[dim]
    if isinstance(size, int) or not statically_known_true(size % chunks == 0):
        return None
    return x.unflatten(dim, (chunks, size // chunks)).unbind(dim)


def _step(mode: str, x: Tensor, hx: Any, *weights: Any) -> Any:
    """Run `torch.lstm_cell` and its like: one step on `x [B, I]`."""
    states = [state[None] for state in (hx if isinstance(hx, (tuple, list)) else (hx,))]
    arrays = [one for one in weights if one is not None]
    _, ends = run_stack(mode, x[:, None], arrays, states, None, len(arrays) > 2, 1, False)
    ends = [end[0] for end in ends]
    return tuple(ends) if len(ends) > 1 else ends[0]


def _equations(mode: str, x: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, *biases: Any) -> Any:
    """Run one step as PyTorch's equations, on its layout of weights.

    PyTorch's exporter has no operator for a step: it would record the whole graph a second time to get the equations.
    """
    h, *c = hx if isinstance(hx, (tuple, list)) else (hx,)
    b_ih, b_hh = biases or (None, None)
    of_x, of_h = linear(x, w_ih, b_ih), linear(h, w_hh, b_hh)
    if c:
        i, f, g, o = (of_x + of_h).chunk(4, 1)
        after = f.sigmoid() * c[0] + i.sigmoid() * g.tanh()
        return o.sigmoid() * after.tanh(), after
    if mode == "GRU":
        (xr, xz, xn), (hr, hz, hn) = of_x.chunk(3, 1), of_h.chunk(3, 1)
        n = (xn + (xr + hr).sigmoid() * hn).tanh()
        return (h - n) * (xz + hz).sigmoid() + n
    return getattr(torch, mode.removeprefix("RNN_").lower())(of_x + of_h)
