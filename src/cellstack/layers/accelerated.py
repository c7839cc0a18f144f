"""Subclasses of PyTorch's recurrent modules that run on the kernel."""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from cellstack import cells
from cellstack.cells.spec import STATES, CellSpec
from cellstack.layers import eligibility, forward, op
from cellstack.layers.base import exporting
from cellstack.layers.cell_base import needs_grad
from cellstack.layers.eligibility import (
    KINDS,
    arrays_of,
    base_of,
    is_ready,
    mode_of,
    name_of,
    overrides_forward,
    why_not,
)
from cellstack.layers.forward import CellRun
from cellstack.layers.sequences import pack

# Attributes of a module within `packed_weights`: its packed weights, and the number of its open contexts.
CONTEXT_ATTRIBUTES = ("_packed", "_contexts")


class Accelerated(nn.Module):
    """Base of the subclasses."""

    _class_before: type[nn.Module]
    _base_forward: Any  # what super().forward is, at which torch.compile fails after a break of the graph
    _packed: dict[Any, Any] | None = None


@lru_cache(maxsize=64)
def _copying(layout: type) -> type:
    """Return the first base of the subclasses: copying keeps the class, pickling saves PyTorch's own module.

    Python changes an object's class only if both classes have the same layout in memory. The first base determines it:
    `layout` is the class to which a user's class adds the attribute dictionary, usually `object`.
    """

    class Copying(layout):
        def __init_subclass__(cls) -> None:
            """Bypass the user's class, whose `__init_subclass__` may register or refuse subclasses."""

        def __getstate__(self: Any) -> Any:
            state = super().__getstate__()
            attributes, *slots = state if isinstance(state, tuple) else (state,)
            if isinstance(attributes, dict):
                attributes = {name: value for name, value in attributes.items() if name not in CONTEXT_ATTRIBUTES}
            return (attributes, *slots) if slots else attributes

        def __reduce_ex__(self: Any, protocol: Any) -> Any:
            reduced = super().__reduce_ex__(protocol)
            if isinstance(reduced, str):
                return reduced
            make, args, *rest = reduced
            if getattr(make, "__name__", None) == "__newobj__":  # pickle requires the object's own class there
                make, args = copyreg._reconstructor, (self._class_before, object, None)  # type: ignore[attr-defined]
            make, *args = (self._class_before if part is type(self) else part for part in (make, *args))
            return make, tuple(args), *rest

        def __copy__(self: Any) -> Any:
            method = getattr(super(), "__copy__", None)
            return self._as_this(copy._reconstruct(self, None, *self.__reduce_ex__(4)) if method is None else method())  # type: ignore[attr-defined]

        def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
            method = getattr(super(), "__deepcopy__", None)
            if method is not None:
                return self._as_this(method(memo))
            if parametrize.is_parametrized(self):  # its class forbids pickling
                return copied(self, memo)
            return self._as_this(copy._reconstruct(self, memo, *self.__reduce_ex__(4)))  # type: ignore[attr-defined]

        def _as_this(self: Any, copied: Any) -> Any:
            """Give a copy the class of this module."""
            if type(copied) is self._class_before:
                copied.__class__ = type(self)
            return copied

        def __prepare_scriptable__(self: Any) -> nn.Module:
            # Returning another module here would replace this one in the user's model for good.
            raise RuntimeError(
                "torch.jit.script doesn't support accelerated modules: call cellstack.restore(model) before, and "
                "accelerate(model) afterwards"
            )

    return Copying


def _layout_of(kind: type) -> type:
    """Return the last class from which `kind` gets its layout in memory that has no attribute dictionary."""
    while kind.__dictoffset__:
        kind = kind.__base__  # type: ignore[assignment]
    return kind


def copied(module: nn.Module, memo: dict[int, Any]) -> Any:
    """Return a deep copy of a module, with the same class."""
    copied = memo[id(module)] = type(module).__new__(type(module))
    attributes = {name: value for name, value in module.__dict__.items() if name not in CONTEXT_ATTRIBUTES}
    copied.__dict__ = copy.deepcopy(attributes, memo)
    return copied


class _Sequence(Accelerated, nn.RNNBase):
    """An `nn.LSTM`, `nn.GRU` or `nn.RNN`."""

    _own_forward: bool

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Any, hx: Any = None, *, reset: Tensor | None = None, return_gates: bool = False
    ) -> Any:
        """Run over a sequence like PyTorch's module; see its documentation for `input`, `hx` and the results.

        Args:
            input: `[T, B, I]`, with `batch_first` `[B, T, I]`; `[T, I]` without a batch; or a PackedSequence.
            hx: the initial state.
            reset: bool, of the shape of `input` without its last axis. Where it is True, the row's state is set to
                zeros before that step.
            return_gates: also return a trace (`Trace`, `GRUTrace` or `RNNTrace`) of each layer and direction, in the
                order of h_n and with the axes of the output. For a PackedSequence the traces are padded, with rows in
                batch order.

        Raises:
            ValueError: `reset` has another shape, isn't bool, or comes with a PackedSequence.
            RuntimeError: `reset` or `return_gates` in a call that PyTorch's forward has to run.
        """
        asked = reset is not None or return_gates
        if isinstance(input, Tensor) and not asked and (exporting() or self._is_short(input)):
            # torch.jit.trace names values after local variables, and repeats the call without gradients to compare the
            # graphs: both calls have to take the same path.
            return self._base_forward(input, hx)
        packed = input if isinstance(input, PackedSequence) else None
        if packed is not None and torch.compiler.is_exporting():  # see capture.operators
            return self._base_forward(input, hx)
        x: Any = input if packed is None else packed.data
        weights = self._weights()
        states = arrays_of(hx, self.mode)
        if not self._supports(x, weights, states, packed):
            if asked:
                raise _needs_kernel(self)
            if packed is not None and isinstance(x, Tensor) and x.ndim == 2 and x.shape[1] != self.input_size:
                raise RuntimeError(  # PyTorch doesn't check packed input, and writes beyond its arrays
                    f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[1]}"
                )
            return self._base_forward(input, hx)
        sizes = None if packed is None else packed.batch_sizes
        padded = sizes is None or bool(sizes[-1] == sizes[0])  # packed rows of equal length run like padded ones
        returned = None
        if torch.is_autocast_enabled("cpu"):
            returned = _autocast_dtypes(self.mode, x, states, padded, bool(self.proj_size))
            x, states = _in_weights_dtype(x, states, weights[0].dtype)
        batched = packed is not None or x.ndim == 3
        used = None
        if packed is not None:
            x, used = _padded(x, packed)
            if packed.sorted_indices is not None:
                states = [state.index_select(1, packed.sorted_indices) for state in states]
        elif not batched:
            x, states = x.unsqueeze(0), [state.unsqueeze(1) for state in states]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        flags = None if reset is None else self._flags(reset, input)
        y, ends, traces = self._run(x, weights, states, used, flags, return_gates, packed)  # y [T, B, ·]
        if returned is not None:
            y, ends = y.to(returned[0]), [end.to(dtype) for end, dtype in zip(ends, returned, strict=True)]
        if packed is not None:
            y = PackedSequence(_packed(y, packed), *packed[1:])
            if packed.unsorted_indices is not None:
                ends = [end.index_select(1, packed.unsorted_indices) for end in ends]
        elif not batched:
            y, ends = y.squeeze(1), [end.squeeze(1) for end in ends]
        elif self.batch_first:
            y = y.transpose(0, 1)
        out = y, tuple(ends) if len(ends) > 1 else ends[0]
        return (*out, [self._with_axes_of_output(trace, packed, batched) for trace in traces]) if return_gates else out

    def _weights(self) -> list[Any]:
        """Return the weights, in PyTorch's order."""
        if self._own_forward:
            return self._replaced_weights()
        parameters = self._parameters
        try:
            return [parameters[name] for name in self._flat_weights_names]
        except KeyError:  # a hook, such as that of weight_norm, computes one
            return self._replaced_weights()

    def _replaced_weights(self) -> list[Any]:
        """Return the list of weights that PyTorch's forward reads; users may write to it."""
        self._update_flat_weights()
        return self._flat_weights  # type: ignore[return-value]

    def _supports(self, x: Any, weights: list[Any], states: Sequence[Any], packed: PackedSequence | None) -> bool:
        """Whether the kernel supports this call."""
        if not is_ready(x, self.input_size, weights, states) or x.ndim not in ((2,) if packed else (2, 3)):
            return False
        if not states:
            return True
        width = self.proj_size or self.hidden_size
        layers = self.num_layers * (1 + self.bidirectional)
        if packed is not None:
            shape: tuple[int, ...] = (layers, int(packed.batch_sizes[0]))
        else:
            shape = (layers,) if x.ndim == 2 else (layers, x.shape[0 if self.batch_first else 1])
        sizes = (width, self.hidden_size)[: len(STATES[KINDS[self.mode]]._fields)]
        return [state.shape for state in states] == [(*shape, size) for size in sizes]

    def _is_short(self, x: Tensor) -> bool:
        """Whether a call has so few steps that PyTorch is at least as fast."""
        if torch.compiler.is_exporting():
            return False
        limits = eligibility.LIMITS[self.mode]
        if torch.is_grad_enabled():
            least = limits.training
            if limits.rows and (self.hidden_size >= limits.units or x.numel() >= limits.rows * self.input_size):
                return False
        else:
            least = limits.inference if self._packed is None else limits.packed
        return least > 1 and x.ndim > 1 and x.shape[1 if self.batch_first and x.ndim == 3 else 0] < least

    def _flags(self, reset: Any, sequence: Any) -> Tensor:
        """Return `reset` as `[B, T]`, after checking it against the input that was passed."""
        if isinstance(sequence, PackedSequence):
            raise ValueError(f"{name_of(self)}: reset isn't supported with a PackedSequence")
        reset = _checked_reset(self, reset, sequence.shape[:-1])
        return reset.unsqueeze(0) if reset.ndim == 1 else reset if self.batch_first else reset.transpose(0, 1)

    def _run(
        self,
        x: Tensor,
        weights: list[Any],
        states: Sequence[Tensor],
        used: Tensor | None,
        reset: Tensor | None,
        traced: bool,
        packed: PackedSequence | None,
    ) -> tuple[Tensor, list[Tensor], list[Any]]:
        """Run over `x [B, T, I]`; return y `[T, B, ·]`, the final states' arrays `[layers, B, ·]`, and the traces."""
        directions = (False, True) if self.bidirectional else (False,)
        count, sizes = self.num_layers * len(directions), (self.input_size, self.hidden_size, self.proj_size)
        runs = _cells(self.mode, sizes, self.bias, weights, states, count, len(directions))
        share = self.dropout if self.training and self.num_layers > 1 else 0.0

        def between(y: Tensor) -> Tensor:  # as PyTorch draws it: with time before batch, or on packed data
            if packed is not None:
                return _padded(dropout(_packed(y.transpose(0, 1), packed), share), packed)[0]
            return dropout(y.transpose(0, 1), share).transpose(0, 1)

        y, _, ends, traces = forward.run_layers(
            runs,
            x,
            used,
            reset,
            directions=directions,
            traced=traced,
            time_major=True,
            between=between if share else None,
            packed=self._packed,
        )
        # Callers may write to the output of PyTorch's modules, except to that of oneDNN's LSTM. Ours is needed later.
        writable = self.mode != "LSTM" or y.dtype is not torch.float32
        if (traced or y.requires_grad) and writable and len(directions) == 1 and packed is None:
            y = y.clone()
        return y, _stacked(ends), traces

    def _with_axes_of_output(self, trace: Any, packed: PackedSequence | None, batched: bool) -> Any:
        """Give a trace of arrays `[B, T, H]` the axes of the output."""
        if packed is not None and packed.unsorted_indices is not None:
            trace = type(trace)(*(part.index_select(0, packed.unsorted_indices) for part in trace))
        if not batched:
            return type(trace)(*(part.squeeze(0) for part in trace))
        return trace if self.batch_first else type(trace)(*(part.transpose(0, 1) for part in trace))


def run_stack(
    mode: str,
    x: Tensor,
    weights: list[Any],
    states: Sequence[Tensor],
    used: Tensor | None,
    bias: bool,
    layers: int,
    bidirectional: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Run what PyTorch's functions lstm, gru, rnn_tanh and rnn_relu compute, in evaluation.

    Args:
        mode: as that of PyTorch's modules.
        x: `[B, T, I]`.
        weights, states: as for PyTorch's functions.
        used: the mask, bool `[B, T]`; None: all steps count.
        bias, layers, bidirectional: as for PyTorch's functions.

    Returns:
        y `[T, B, ·]`, and the final states' arrays `[layers, B, ·]`.
    """
    directions = (False, True) if bidirectional else (False,)
    count = layers * len(directions)
    size = len(weights) // count
    projected = weights[size - 1].shape[0] if size % 2 else 0
    hidden = weights[1].shape[0] // 4 if projected else weights[1].shape[1]  # only an LSTM has a projection
    runs = _cells(mode, (weights[0].shape[1], hidden, projected), bias, weights, states, count, len(directions))
    y, _, ends, _ = forward.run_layers(runs, x, used, None, directions=directions, time_major=True)
    return y, _stacked(ends)


def _cells(
    mode: str, sizes: tuple[int, int, int], bias: bool, weights: list[Any], states: Any, count: int, ways: int
) -> list[CellRun]:
    """Return the cells of a stack, from its input size, hidden size and projection."""
    first, hidden, projected = sizes
    size, runs = len(weights) // count, []
    # squeeze takes a fifth of the time of unbind
    parts = [(state.squeeze(0),) if count == 1 else state.unbind(0) for state in states]
    for n in range(count):
        cell = _cell(mode, first if n < ways else (projected or hidden) * ways, hidden, projected, bias)
        runs.append(CellRun(cell, weights[n * size : (n + 1) * size], [part[n] for part in parts]))
    return runs


def _stacked(ends: list[Any]) -> list[Tensor]:
    """Return the final states of a stack's cells as arrays `[layers, B, ·]`."""
    return [torch.stack(part) if len(ends) > 1 else part[0].unsqueeze(0) for part in zip(*ends, strict=True)]


def _padded(data: Tensor, packed: PackedSequence) -> tuple[Tensor, Tensor | None]:
    """Return packed data as `[B, T, ·]`, longest row first, and the mask `[B, T]`, None if all steps count."""
    sizes = packed.batch_sizes
    x, _ = pad_packed_sequence(PackedSequence(data, sizes))
    used = None if sizes[-1] == sizes[0] else torch.arange(x.shape[1])[:, None] < sizes
    return x.transpose(0, 1), used


def _packed(y: Tensor, packed: PackedSequence) -> Tensor:
    """Return `y [T, B, ·]`, longest row first, as packed data."""
    return pack(y.transpose(0, 1), PackedSequence(packed.data, packed.batch_sizes)).data


class _Step(Accelerated, nn.RNNCellBase):
    """An `nn.LSTMCell`, `nn.GRUCell` or `nn.RNNCell`."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Any, hx: Any = None, *, reset: Tensor | None = None, return_gates: bool = False
    ) -> Any:
        """Run one step like PyTorch's module; see its documentation for `input`, `hx` and the results.

        Args:
            input: `[B, I]`, or `[I]` without a batch.
            hx: the initial state.
            reset: bool `[B]`, a scalar without a batch. Where it is True, the row's state is set to zeros first.
            return_gates: return `(state, trace)`: a `Trace`, `GRUTrace` or `RNNTrace` of arrays shaped like the state.

        Raises:
            ValueError: `reset` has another shape or isn't bool.
            RuntimeError: `reset` or `return_gates` in a call that PyTorch's forward has to run.
        """
        keep = self._packed
        asked = reset is not None or return_gates
        # Packing at every call, or the backward pass of one step, costs more than the kernel saves.
        if not asked and (keep is None or eligibility.is_narrow(self)):
            return self._base_forward(input, hx)
        mode = mode_of(self)
        states = arrays_of(hx, mode)
        weights = [self.weight_ih, self.weight_hh, *((self.bias_ih, self.bias_hh) if self.bias else ())]
        if not self._supports(input, states, weights):
            if asked:
                raise _needs_kernel(self)
            return self._base_forward(input, hx)
        if reset is not None:
            begins = _checked_reset(self, reset, input.shape[:-1]).unsqueeze(-1)
            states = [torch.where(begins, 0.0, state) for state in states]
        kernel = keep is not None and not needs_grad(input, *states, *weights) and op.direct(input)
        if not (kernel or return_gates):
            return self._base_forward(input, hx if reset is None or not states else self._as_one(states))
        x, returned = input, None
        if torch.is_autocast_enabled("cpu"):
            returned = _autocast_dtypes(mode, x, states, False, False)
            x, states = _in_weights_dtype(x, states, weights[0].dtype)
        batched = input.ndim == 2
        if not batched:
            x, states = x.unsqueeze(0), [state.unsqueeze(0) for state in states]
        cell, trace = _cell(mode, self.input_size, self.hidden_size, 0, self.bias), None
        if return_gates:
            run = CellRun(cell, weights, states)
            _, _, (ends,), (every,) = forward.run_layers([run], x.unsqueeze(1), None, None, traced=True)
            trace = type(every)(*(part.squeeze(1) if batched else part[0, 0] for part in every))
        else:
            ends = op.step(x, states, weights, cell, keep)
        if returned is not None:
            ends = tuple(end.to(dtype) for end, dtype in zip(ends, returned, strict=True))
        state = self._as_one(ends if batched else [end.squeeze(0) for end in ends])
        return state if trace is None else (state, trace)

    def _as_one(self, parts: Sequence[Tensor]) -> Any:
        """Return a state's arrays in the module's form: a tuple if there are several, otherwise one array."""
        return tuple(parts) if len(parts) > 1 else parts[0]

    def _supports(self, x: Any, states: Sequence[Any], weights: Sequence[Any]) -> bool:
        """Whether the kernel supports a call on these tensors."""
        if not is_ready(x, self.input_size, weights, states) or x.ndim not in (1, 2):
            return False
        shape = (*x.shape[:-1], self.hidden_size)
        count = len(STATES[KINDS[mode_of(self)]]._fields)
        return not states or (len(states) == count and all(state.shape == shape for state in states))


def _cell(mode: str, width: int, hidden: int, proj: int, bias: bool) -> op.CellCall:
    """Return the op's record of a layer's cell."""
    return _cell_call(mode, width, hidden, proj, bias)


# The compiler would otherwise trace into the description, even through the cache. torch.compiler.assume_constant_result
# sets this attribute too, but imports the whole compiler.
_cell._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=1024)
def _cell_call(mode: str, width: int, hidden: int, proj: int, bias: bool) -> op.CellCall:
    activation = mode.partition("_")[2].lower() or "tanh"
    spec = CellSpec(width, hidden, activation, use_bias=bias, kind=KINDS[mode], proj_size=proj)
    return op.CellCall(spec, torch_layout=True)


def _in_weights_dtype(x: Tensor, states: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Any]:
    """Convert x and the states to the weights' dtype, from which they may differ under autocast."""
    return x.to(dtype), [state.to(dtype) for state in states]


def _autocast_dtypes(
    mode: str, x: Tensor, states: Sequence[Tensor], padded: bool, projects: bool
) -> tuple[torch.dtype, ...]:
    """Return the dtypes of h (and y) and of c that PyTorch's module returns under autocast.

    Products have autocast's dtype, and an operation on two dtypes returns the wider one. So the dtype of c, and that of
    h unless h is a product or its activation, depends on the initial state. oneDNN's LSTM returns only its own dtype.
    """
    product, kind = torch.get_autocast_dtype("cpu"), KINDS[mode]
    mixed = torch.promote_types(product, states[-1].dtype if states else x.dtype)
    if len(STATES[kind]._fields) == 1:
        return (mixed if "keep" in cells.KINDS[kind].gates.values() else product,)
    if projects:
        return product, mixed
    if padded and product is torch.bfloat16 and _onednn_takes(product) and _onednn_takes(x.dtype):
        return product, product
    return mixed, mixed


def _onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN runs LSTMs of this dtype on this processor."""
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return torch.backends.mkldnn.is_available() and (
        dtype not in checks or bool(getattr(torch.ops.mkldnn, checks[dtype])())
    )


def _checked_reset(module: nn.Module, reset: Any, shape: tuple[int, ...]) -> Tensor:
    """Return `reset` on the CPU, after checking that it is a bool tensor of this shape."""
    if not isinstance(reset, Tensor) or op.wraps(reset) or reset.dtype is not torch.bool:
        known = isinstance(reset, Tensor) and not op.wraps(reset)
        came = str(reset.dtype).removeprefix("torch.") if known else type(reset).__name__
        raise ValueError(f"{name_of(module)}: expected reset to be a bool tensor, got {came}")
    if reset.shape != shape:
        raise ValueError(
            f"{name_of(module)}: expected reset {tuple(shape)}, the shape of input without its last axis, "
            f"got {tuple(reset.shape)}"
        )
    return reset.to("cpu")


def _needs_kernel(module: nn.Module) -> RuntimeError:
    return RuntimeError(
        f"{name_of(module)}: reset and return_gates need the kernel, but PyTorch runs this call: {why_not(module)}"
    )


@lru_cache(maxsize=256)
def class_of(kind: type) -> type:
    """Return our subclass of one of PyTorch's recurrent classes, or of a class that derives from one.

    Our forward comes directly before PyTorch's in the order of methods, so a user's own forward runs as before and
    reaches the kernel through `super().forward`.
    """
    base = base_of(kind)
    assert base is not None
    serves = _Step if issubclass(kind, nn.RNNCellBase) else _Sequence
    bases = (serves, kind) if kind is base else (kind, serves, base)
    return subclass_of(kind, bases, _own_forward=overrides_forward(kind), _base_forward=base.forward)


def subclass_of(kind: type, bases: tuple[type, ...], **attributes: Any) -> type:
    """Return a subclass with the name of `kind`, one of the bases; copies keep it, and pickles hold `kind`.

    Args:
        kind: the class that it replaces.
        bases: its bases after the one that copies.
        **attributes: its further attributes.
    """
    named = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (_copying(_layout_of(kind)), *bases), {"_class_before": kind, **named, **attributes})
