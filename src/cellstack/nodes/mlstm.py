"""`MLSTM`: the matrix memory of an xLSTM, which takes queries, keys, values and gates from a projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellstack import native
from cellstack.cells.base import MatrixState
from cellstack.cells.mlstm import MemorySpec
from cellstack.nodes.base import (
    Array,
    CellState,
    Flow,
    GradientError,
    KernelLayers,
    Node,
    NodeRun,
    Shape,
    StateGradients,
    StepRule,
)
from cellstack.nodes.checks import check_flag, check_integer, check_number
from cellstack.nodes.values import MemoryCell
from cellstack.reference import ACTIVATIONS
from cellstack.reference import memory as reference

if TYPE_CHECKING:
    from cellstack.nodes.patches import CellPatches


@dataclass(frozen=True, eq=False)
class MLSTM(Node):
    """The memory of an mLSTM: per head a matrix C, to which each step adds a key with its value.

    The input is `[q | k | v | ĩ | f̃]`, of widths `heads·key_size`, `heads·key_size`, `heads·value_size`, `heads` and
    `heads`, followed by õ with an output gate; the output is h, or σ(õ)·h, of width `heads·value_size`. Per head, with
    k scaled by `1/√key_size`::

        m = max(log σ(f̃) + m₋, ĩ)    f = exp(log σ(f̃) + m₋ - m)    i = exp(ĩ - m)
        C = f·C₋ + i·k·vᵀ    n = f·n₋ + i·k    h = Cᵀq / (max(|nᵀq|, exp(-m)) + epsilon)

    The initial state is zeros. At a masked step the state keeps its value, and the output is zeros; at a reset the
    state is set to zeros. Streams and a few steps run one after the other; a sequence runs in chunks, as products of
    matrices. Both give the same results up to rounding.

    Args:
        heads: the number of heads, each with its own memory.
        key_size: the width of a head's queries and keys, the number of rows of C.
        value_size: the width of a head's values, the number of columns of C.
        epsilon: added to the divisor, 0 or more.
        output_gate: whether h is multiplied by σ(õ), whose pre-activations are the last part of the input.

    Raises:
        TypeError: `output_gate` isn't a bool.
        ValueError: a number below 1, or an epsilon that isn't a finite number of 0 or more.

    >>> node = MLSTM(heads=1, key_size=1, value_size=2, epsilon=0.0)
    >>> x = np.array([[[2.0, 1.0, 3.0, 4.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]])  # stores [3, 4], then asks
    >>> node.run([Flow(x)], (None,), 1).x
    array([[[3. , 4. ],
            [1.5, 2. ]]])

    Ref: Beck et al. 2024, "xLSTM: Extended Long Short-Term MemoryCell", eqs. 19 to 27.
    """

    heads: int
    key_size: int
    value_size: int
    epsilon: float = 1e-6
    output_gate: bool = False
    file_type = "mlstm"
    axes = (2, 2)
    heeds_mask = True

    def __post_init__(self) -> None:
        for name in ("heads", "key_size", "value_size"):
            object.__setattr__(self, name, check_integer("MLSTM", name, getattr(self, name)))
        epsilon = check_number("MLSTM", "epsilon", self.epsilon)
        if epsilon < 0:
            raise ValueError(f"MLSTM: expected epsilon to be 0 or more, got {epsilon:g}")
        object.__setattr__(self, "epsilon", epsilon)
        check_flag("MLSTM", "output_gate", self.output_gate)
        object.__setattr__(self, "input_size", self.memory.input_size)

    def memory_in(self, dtype: np.dtype[Any]) -> MemoryCell:
        """Return its cell in a network of this dtype."""
        return MemoryCell(self.memory, dtype)

    def cells_in(self, dtype: np.dtype[Any]) -> tuple[MemoryCell]:
        return (self.memory_in(dtype),)

    @property
    def memory(self) -> MemorySpec:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The description of its cell."""
        return MemorySpec(self.heads, self.key_size, self.value_size, self.epsilon, self.output_gate)

    @property
    def units(self) -> int:
        """Width of the output."""
        return self.memory.units

    @property
    def core_size(self) -> int:
        """Width of the input without õ."""
        return self.memory.core

    def check(self, owner: str, *shapes: Shape) -> Shape:
        steps, _ = super().check(owner, *shapes)
        return (steps, self.units)

    def call(
        self,
        flow: Flow,
        before: MatrixState | None,
        after: MatrixState | None,
        threads: int,
        places: NDArray[np.int64] | None = None,
        gated: bool = True,
    ) -> Array:
        """Run the memory over `flow.x [B, T, W]` and return the output.

        Args:
            flow: the input, with its mask and resets.
            before: the state before the first step, contiguous arrays; None: zeros.
            after: where the state after the last step is written, which may be `before`; None: nowhere.
            threads: the number of threads that the kernel may use.
            places: the row of the states of each row of the input; None: the same.
            gated: whether h is multiplied by the output gate, if there is one.
        """
        batch, steps, _ = flow.x.shape
        y = np.empty((batch, steps, self.units), flow.x.dtype)
        sequences = native.sequences(flow.x, flow.mask, flow.reset, places=places)
        call = self.kernel_call(sequences, before, after, y, gated=self.output_gate and gated)
        native.memory_forward(call, y.dtype == np.float64, threads)
        return y

    def output_gate_of(self, x: Array) -> Array:
        """Return σ(õ) of the input, `[B, T, units]`."""
        return ACTIVATIONS["sigmoid"][0](np.ascontiguousarray(x[..., self.core_size :]))

    def kernel_call(self, sequences: Any, before: Any, after: Any, y: Any, **more: Any) -> native.Memory:
        """Return the kernel's object for a call: see `call`; the arrays may be addresses."""
        return native.Memory(sequences, *self.memory[:4], before or (), after or (), y, **more)

    @property
    def kernel_layers(self) -> KernelLayers:
        return KernelLayers((((self,), False),), 1)

    def patched_call(
        self, flow: Flow, before: MatrixState, changed: reference.Patched | None
    ) -> tuple[Array, MatrixState]:
        """Run the memory in NumPy, step by step, with a function that applies patches.

        Args:
            flow: the input, with its mask and resets.
            before: the state before the first step.
            changed: see `CellPatches.changing`.

        Returns:
            The output, and the state after the last step.
        """
        x, sizes, o = flow.x, (self.heads, self.key_size, self.value_size), None
        if self.output_gate:
            o = self.output_gate_of(x).reshape(*x.shape[:2], self.heads, self.value_size)
        inputs = reference.split(x[..., : self.core_size], *sizes)
        h, after = reference.steps(inputs, before, self.epsilon, flow.mask, flow.reset, changed, o)
        return h.reshape(*x.shape[:2], self.units), after

    def run(
        self,
        flows: Sequence[Flow],
        states: tuple[CellState | None, ...],
        threads: int,
        patches: CellPatches | None = None,
    ) -> Flow:
        """See `Node`.

        Args:
            flows, states, threads: see there.
            patches: those of its cell.
        """
        (flow,), before = flows, next(iter(states), None)
        assert before is None or isinstance(before, MatrixState)
        after = self.memory_in(flow.x.dtype).zeros(len(flow.x))
        if patches is None:
            y = self.call(flow, before, after, threads)
        else:
            batch, steps, _ = flow.x.shape
            changes = patches.of_run(batch, steps, flow.mask, False, flow.x.dtype)
            y, after = self.patched_call(flow, before or after, patches.changing(changes, flow.mask))
        return flow._replace(x=y, states=(after,))

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        (flow,), (record,) = run.inputs, run.records
        if record is None:
            raise GradientError("its trace comes from a file, without the state before the run: trace it again")
        x, y, dy = (native.plain(array) for array in (flow.x, run.y, dy))
        of_gate = []
        if self.output_gate:
            o, y = (
                self.output_gate_of(x),
                self.call(flow._replace(reset=record.reset), record.before, None, 1, gated=False),
            )
            of_gate, dy = [dy * y * o * (1 - o)], dy * o
        dx = np.empty((*x.shape[:2], self.core_size), x.dtype)
        call = self.kernel_call(native.sequences(x, record.mask, record.reset), record.before, None, y)
        native.memory_backward(call, x.dtype == np.float64, dy, (), dx, (), 1)
        return [np.concatenate([dx, *of_gate], axis=-1)]

    def step_rule(self, *shapes: Shape) -> StepRule:
        return StepRule()

    @property
    def summary(self) -> str:
        return self.memory.summary

    def engine(self, dtype: np.dtype[Any]) -> str:
        return (
            f"fused kernel ({native.isa()}, {dtype}): sequences in chunks, as products of matrices; streams, "
            f"and fewer than {native.SHORT_CHUNK} steps, step by step"
        )
