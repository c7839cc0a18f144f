"""`MLSTM`: the layer of an xLSTM with a matrix memory, trained on the fused kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cellstack import native
from cellstack.cells.base import MatrixState
from cellstack.cells.errors import ShapeError, as_integer, check_sequence, check_state, check_state_numbers
from cellstack.cells.mlstm import MemorySpec
from cellstack.cells.plan import Plan
from cellstack.layers import weights
from cellstack.layers.base import EXPORT_HINT, Layer, as_dtype, as_input, last_axis
from cellstack.layers.eager import run_eagerly
from cellstack.layers.kernel_calls import address
from cellstack.layers.sequences import as_steps, as_used
from cellstack.layers.tracing import batched, symbolic, transformed


class _Memory(torch.autograd.Function):
    """The memory of an mLSTM, from q, k, v and the gates to h and the state after the last step."""

    @staticmethod
    def forward(
        ctx: Any,
        spec: MemorySpec,
        keeps_state: bool,
        keeps_scores: bool,
        x: Tensor,
        mask: Any,
        reset: Any,
        *before: Tensor,
    ) -> tuple[Tensor, ...]:
        batch, steps, _ = x.shape
        x = x if x.stride(2) == 1 else x.contiguous()
        y = x.new_empty(batch, steps, spec.units)
        shapes = spec.state_shapes.values() if keeps_state else ()
        after = [x.new_empty(batch, *shape) for shape in shapes]
        before = tuple(part.contiguous() for part in before)
        row = native.score_row(spec.key_size, spec.value_size, steps, bool(before), keeps_state)
        scores = x.new_empty(batch, spec.heads, steps, row) if row and keeps_scores else None
        call = _call(spec, x, mask, reset, scores, before, after, y)
        native.memory_forward(call, _twice(x), torch.get_num_threads())
        ctx.spec = spec
        ctx.save_for_backward(x, y, mask, reset, scores, *before)
        return (y, *after)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, y, mask, reset, scores, *before = ctx.saved_tensors
        if torch.is_grad_enabled() or any(part is not None and batched(part) for part in gradients):
            needs = ctx.needs_input_grad[3], *ctx.needs_input_grad[6:]
            dx, *dbefore = _loop_gradients(ctx.spec, (x, *before), mask, reset, gradients, needs)
            return (None, None, None, dx, None, None, *dbefore)
        dy, *dafter = (None if part is None else part.contiguous() for part in gradients)
        dx = x.new_empty(*x.shape[:2], ctx.spec.core)
        dbefore = [torch.empty_like(part) for part in before]
        native.memory_backward(
            _call(ctx.spec, x, mask, reset, scores, before, (), y),
            _twice(x),
            address(dy),
            [address(part) for part in dafter],
            address(dx),
            [address(part) for part in dbefore],
            torch.get_num_threads(),
        )
        return (None, None, None, dx, None, None, *dbefore)


def _loop(spec: MemorySpec, x: Tensor, before: Sequence[Tensor], mask: Any, reset: Any) -> tuple[Tensor, ...]:
    """Return h and the state after the last step by torch's operations."""
    *after, y = run_eagerly(x, before, (), (), mask, reset, (spec,), ((),), False, True, False)
    return y, *after


def _loop_gradients(
    spec: MemorySpec, tensors: Sequence[Tensor], mask: Any, reset: Any, gradients: Sequence[Any], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of x and the state before it, which can be differentiated, and be batches."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, as one input may depend on another: that dependency isn't part of this gradient.
        x, *before = (part.view_as(part) if graph else part.detach().requires_grad_() for part in tensors)
        outputs = zip(_loop(spec, x, before, mask, reset), gradients, strict=False)
        pairs = [(out, grad) for out, grad in outputs if grad is not None and out.requires_grad]
        computed = torch.autograd.grad(
            [out for out, _ in pairs],
            [part for part, need in zip((x, *before), needs, strict=True) if need],
            [grad for _, grad in pairs],
            create_graph=graph,
            allow_unused=True,
        )
    queue = iter(computed)
    return [next(queue) if need else None for need in needs]


def run_memory(
    spec: MemorySpec,
    x: Tensor,
    before: Sequence[Tensor] = (),
    keeps_state: bool = True,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return h `[B, T, spec.units]` and, if it is to be kept, the state after the last step, C, n and m.

    Args:
        spec: the memory, without an output gate.
        x: q, k, v, ĩ and f̃, `[B, T, spec.core]`.
        before: the state before the first step; empty: zeros.
        keeps_state: whether the state after the last step is returned, which costs a product.
        mask, reset: bool `[B, T]`, contiguous: see `MLSTM.forward`.
    """
    if transformed() or symbolic(x):
        outputs = _loop(spec, x, before, mask, reset)
        return outputs if keeps_state else outputs[:1]
    keeps_scores = torch.is_grad_enabled() and any(part.requires_grad for part in (x, *before))
    return _Memory.apply(spec, keeps_state, keeps_scores, x, mask, reset, *before)


def _twice(x: Tensor) -> bool:
    return x.dtype is torch.float64


def _call(
    spec: MemorySpec,
    x: Tensor,
    mask: Any,
    reset: Any,
    scores: Any,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    y: Tensor,
) -> native.Memory:
    flags = (address(mask), address(reset))
    batch, steps, _ = x.shape
    sequences = native.Sequences(batch, steps, x.data_ptr(), x.stride(0), x.stride(1), *flags)
    states = [address(part) for part in before], [address(part) for part in after]
    row = 0 if scores is None else scores.shape[-1]
    return native.Memory(sequences, *spec[:4], *states, y.data_ptr(), scores=address(scores), score_row=row)


class MLSTM(Layer):
    """An mLSTM layer: per head a matrix memory, with a key, a value and a query per step.

        q, k, v, ĩ, f̃, õ = x·kernel + bias    h = σ(õ)·(what q retrieves from C: see `cellstack.nodes.MLSTM`)

    Steps don't depend on the h before them, so a sequence runs as products of matrices. The layer computes on the CPU,
    in float32 or float64.

    Args:
        units: width of the output, all heads together.
        heads: the number of heads; it divides `units`.
        key_size: width of a head's queries and keys; None: that of its values, `units / heads`.
        use_bias: whether the projection has a bias.
        return_sequences: return h of every step; False: only that of the last step.
        return_state: also return the state after the last step, C, n and m.
        epsilon: added to the divisor of h, 0 or more.
        forget_bias: the initial bias of the heads' forget gates, evenly from the first number to the second.
        kernel_initializer: of the kernel; the columns of ĩ and f̃ start as zeros, so that the biases decide at first.
        input_size: width of the input; None: that of the first one.
        dtype: float32 or float64; None: torch's default.
        name: the layer's name in error messages.

    Raises:
        ShapeError: `heads` doesn't divide `units`.
        ValueError: a number below 1, a negative epsilon, or a forget_bias that isn't two finite numbers.

    >>> layer = MLSTM(8, heads=2, return_sequences=True, input_size=3)
    >>> tuple(layer(torch.zeros(2, 5, 3)).shape)
    (2, 5, 8)

    Ref: Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", eqs. 19 to 27.
    """

    kernel: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        units: int,
        heads: int = 4,
        key_size: int | None = None,
        use_bias: bool = True,
        return_sequences: bool = False,
        return_state: bool = False,
        epsilon: float = 1e-6,
        forget_bias: Sequence[float] = (3.0, 6.0),
        kernel_initializer: weights.Given = "glorot_uniform",
        input_size: int | None = None,
        dtype: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        owner = self._owner
        width = as_integer(owner, "units", units)
        sizes = {"units": width, "heads": as_integer(owner, "heads", heads)}
        sizes["key_size"] = (
            max(1, width // max(1, sizes["heads"])) if key_size is None else as_integer(owner, "key_size", key_size)
        )
        for argument, value in sizes.items():
            if value < 1:
                raise ValueError(f"{owner}: expected {argument} of at least 1, got {value}")
        self.units, self.heads = width, sizes["heads"]
        if width % self.heads:
            raise ShapeError(f"{owner}: expected heads to divide units={width}, got {self.heads}")
        if not 0 <= epsilon < float("inf"):
            raise ValueError(f"{owner}: expected epsilon to be a finite number of 0 or more, got {epsilon!r}")
        try:
            ends = () if isinstance(forget_bias, str) else tuple(map(float, forget_bias))
        except (TypeError, ValueError):
            ends = ()
        if len(ends) != 2 or not all(map(math.isfinite, ends)):
            raise ValueError(
                f"{owner}: expected forget_bias to be two finite numbers, of the first and the last head, got "
                f"{forget_bias!r}"
            )
        self.spec = MemorySpec(self.heads, sizes["key_size"], width // self.heads, float(epsilon), output_gate=True)
        self.return_sequences, self.return_state = bool(return_sequences), bool(return_state)
        self._initializer = weights.find(owner, "kernel_initializer", kernel_initializer, weights.INITIALIZERS)
        self._like = torch.empty(0, dtype=as_dtype(dtype))
        self._config = {
            "units": self.units,
            "heads": self.heads,
            "key_size": key_size,
            "use_bias": bool(use_bias),
            "return_sequences": self.return_sequences,
            "return_state": self.return_state,
            "epsilon": self.spec.epsilon,
            "forget_bias": ends,
            "kernel_initializer": kernel_initializer,
            "input_size": input_size,
            "dtype": dtype,
            "name": name,
        }
        self.register_parameter("kernel", None)
        self.register_parameter("bias", None)
        if input_size is not None:
            self.build(input_size)

    def build(self, input_size: int | Sequence[int | None]) -> None:
        """Create the weights for inputs of width `input_size`, or of this shape."""
        width, core = last_axis(self._owner, input_size), self.spec.core
        like = {"dtype": self._like.dtype, "device": self._like.device}
        kernel = torch.empty(width, core + self.units, **like)
        if self._initializer is not None:
            weights.fill(kernel, self._initializer)
        kernel[:, core - 2 * self.heads : core] = 0.0
        self.kernel = torch.nn.Parameter(kernel)
        if self._config["use_bias"]:
            first, last = self._config["forget_bias"]
            bias = torch.zeros(core + self.units, **like)
            bias[core - self.heads : core] = torch.linspace(first, last, self.heads)
            self.bias = torch.nn.Parameter(bias)

    @property
    def built(self) -> bool:
        """Whether the weights exist."""
        return self.kernel is not None

    def forward(
        self, sequences: Any, initial_state: Any = None, mask: Any = None, reset: Any = None, lengths: Any = None
    ) -> Any:
        """Run the layer over a batch of sequences.

        Args:
            sequences: `[B, T, I]`.
            initial_state: C `[B, heads, key_size, units / heads]`, n `[B, heads, key_size]` and m `[B, heads]`; None:
                zeros.
            mask: bool `[B, T]`, True at used steps: at others the state keeps its value, and the output is zeros.
            reset: bool `[B, T]`, True where the state is set to zeros before the step.
            lengths: `[B]`, the number of used steps of each row, instead of a mask.

        Returns:
            `[B, T, units]`, or `[B, units]`; with `return_state` a tuple of this and C, n and m.

        Raises:
            ShapeError: a wrong rank, width, batch or number of states.
            TypeError: another dtype or device than float32 or float64 on the CPU; a mask that isn't bool; a call that
                torch.jit.trace or torch.onnx.export records.
            ValueError: a tensor on another device; both `mask` and `lengths`.
        """
        owner, like = self._owner, self._like if self.kernel is None else self.kernel
        if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.float64):
            came = f"{str(like.dtype).removeprefix('torch.')} on {like.device}"
            raise TypeError(f"{owner}: expected weights of float32 or float64 on the CPU, got {came}")
        if torch._C._get_tracing_state() is not None:  # h would be recorded as a constant
            raise TypeError(f"{owner}: torch.jit.trace and torch.onnx.export aren't supported; {EXPORT_HINT}")
        x = as_input(owner, "sequences", sequences, like)
        check_sequence(owner, tuple(x.shape), None if self.kernel is None else self.kernel.shape[0], "sequences")
        if self.kernel is None:
            self.build(x.shape[-1])
        used = as_used(owner, x, mask, lengths)
        starts = None if reset is None else as_steps(owner, "reset", reset, x)
        before = () if initial_state is None else self._state(initial_state, x)
        assert self.kernel is not None
        used, starts = (None if one is None else one.contiguous() for one in (used, starts))
        with torch.autocast("cpu", enabled=False):  # the memory needs the dtype of the weights
            z = torch.nn.functional.linear(x, self.kernel.t(), self.bias)
            core, gate = z.split([self.spec.core, self.units], dim=-1)
            ungated = self.spec._replace(output_gate=False)
            h, *after = run_memory(ungated, core, before, self.return_state, used, starts)
            y = torch.sigmoid(gate) * h
        if not self.return_sequences:
            y = _last(y, used)
        return (y, *after) if self.return_state else y

    def _state(self, value: Any, x: Tensor) -> MatrixState:
        shapes = self.spec.state_shapes
        if not isinstance(value, Sequence):
            raise ShapeError(f"{self._owner}: expected initial_state to be C, n and m, got {type(value).__name__}")
        parts = [as_input(self._owner, "initial_state", part, x) for part in value]
        check_state(self._owner, [tuple(part.shape) for part in parts], len(x), shapes)
        check_state_numbers(f"{self._owner}: initial_state", self.spec.of_kind, [part.detach() for part in parts])
        return MatrixState(*parts)

    def plan(self) -> Plan:
        """Return which implementation runs the layer: a line of text."""
        dtype = str(self._like.dtype).removeprefix("torch.")
        how = f"fewer than {native.SHORT_CHUNK} steps step by step, others in chunks, as products of matrices"
        return Plan(
            [f"{self._owner}: a product in torch; the memory in the fused kernel ({native.isa()}, {dtype}): {how}"]
        )


def _last(y: Tensor, used: Tensor | None) -> Tensor:
    """Return the output of each row's last used step, zeros without one."""
    if not y.shape[1]:
        return y.new_zeros(len(y), y.shape[2])
    if used is None:
        return y[:, -1]
    steps = torch.arange(1, used.shape[1] + 1, device=used.device)
    last = torch.where(used, steps, 0).amax(1)
    picked = y[torch.arange(len(y), device=y.device), (last - 1).clamp(min=0)]
    return torch.where(last[:, None] > 0, picked, 0.0)
