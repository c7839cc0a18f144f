"""`RNN`: a cell or a stack of cells over a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from cellstack.cells import KINDS
from cellstack.cells.arguments import COMPATIBLE, sign
from cellstack.cells.errors import ShapeError, as_flag, check_sequence
from cellstack.cells.plan import Plan
from cellstack.layers import foreign, op, weights
from cellstack.layers.base import Layer, as_input, of_cell, storable
from cellstack.layers.cell_base import Cell
from cellstack.layers.foreign import as_cell, cell_name
from cellstack.layers.sequences import Given, as_steps, as_used, flipped, pack, unpack
from cellstack.layers.stack import StackCall, StackedRNNCells, run_cells
from cellstack.layers.state import StatefulLayer

FLAGS = ("return_sequences", "return_state", "go_backwards", "stateful", "unroll", "zero_output_for_mask", "remat")
OF_LAYER = (*FLAGS, "activity_regularizer", "name")


class Run(NamedTuple):
    """Results of a pass over a sequence, in time order for both directions."""

    y: Tensor  # [B, T, H] of the top cell, or [B, H] of the last step
    states: list[Any]  # one entry per cell
    traces: list[Any]  # one entry per cell; empty if not requested


class RNN(StatefulLayer):
    """Run a cell or a stack of cells over a sequence. The fused kernel runs a stack of our cells in one call.

    Args:
        cell: a cell, or a list of cells (a stack): `LSTMCell`, `GRUCell`, `SimpleRNNCell`, in any mixture and of any
            widths; `StackedRNNCells`; or any object with `state_size` and a call `(x, states) -> (y, states)`, which
            runs in a Python loop.
        return_sequences: return the output of every step, not only of the last.
        return_state: also return the states after the last step.
        go_backwards: run from the last step to the first. Outputs are in the order processed.
        stateful: start each call from the final states of the previous one; they are saved in the `state_dict`.
        unroll: for compatibility with Keras; it has no effect.
        zero_output_for_mask: output zeros at masked steps, instead of repeating the previous output.
        activity_regularizer: a regularisation term of the output; `losses` has it after a call.
        remat: save only h and c of each step, and recompute the gates in the backward pass: an LSTM needs a third of
            the memory and more time (see `docs/semantics.md`). Outputs and gradients have the same bits. Calls with
            `return_gates` save the gates.
        input_size: width I, to create the weights immediately; None: at the first call.
        name: the layer's name in error messages.

    Raises:
        TypeError: `cell` isn't a cell.

    >>> from cellstack.layers import GRUCell, LSTMCell
    >>> rnn = RNN(StackedRNNCells([LSTMCell(4), GRUCell(5)]), return_sequences=True, return_state=True)
    >>> y, state_1, state_2 = rnn(torch.zeros(2, 3, 6))
    >>> tuple(y.shape), state_1.shape, state_2.shape  # State(h, c), HiddenState(h)
    ((2, 3, 5), (2, 2, 4), (1, 2, 5))
    """

    _observers: tuple[Callable[[StackCall], None], ...] = ()  # called after each call, see `observer`
    remat = False

    def __init__(
        self,
        cell: Any,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        unroll: bool = False,
        zero_output_for_mask: bool = False,
        *,
        activity_regularizer: weights.Given = None,
        remat: bool = False,
        input_size: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        given = locals()
        self._config = {name: given[name] for name in ("cell", *OF_LAYER, "input_size")}
        self._config |= {flag: as_flag(self._owner, flag, given[flag]) for flag in FLAGS}
        self.cell = StackedRNNCells(cell) if isinstance(cell, (list, tuple)) else as_cell(self._owner, cell)
        self.return_sequences, self.return_state = return_sequences, return_state
        self.go_backwards, self.stateful, self.unroll = go_backwards, stateful, unroll
        self.zero_output_for_mask, self.remat = zero_output_for_mask, self._config["remat"]
        self.activity_regularizer = weights.find(
            self._owner, "activity_regularizer", activity_regularizer, weights.REGULARIZERS
        )
        self._activity: Tensor | None = None
        self._ours = all(isinstance(part, Cell) for part in self.cells)
        self._like = torch.empty(0)  # for a stack without weights
        if input_size is not None:
            self.build(input_size)

    @property
    def cells(self) -> Sequence[Any]:
        """The cells, bottom first."""
        cell: Any = self._modules["cell"]  # as `self.cell`, without the slow attribute look-up of a module
        return cell.cells if isinstance(cell, StackedRNNCells) else (cell,)  # type: ignore[return-value]

    @property
    def stacked(self) -> bool:
        """Whether the layer has a stack, of one or more cells: it then has one state per cell."""
        return isinstance(self.cell, StackedRNNCells)

    @property
    def residual(self) -> bool:
        """Whether the stack has residual connections: see `StackedRNNCells`."""
        cell = self._modules["cell"]
        return isinstance(cell, StackedRNNCells) and cell.residual

    def public_traces(self, traces: list[Any]) -> Any:
        """Return traces in the form that a call returns: a tuple, one per cell, for a stack; else one trace."""
        return tuple(traces) if self.stacked else traces[0]

    def extra_repr(self) -> str:
        """Return the flags that are set."""
        return ", ".join(f"{flag}=True" for flag in FLAGS if getattr(self, flag) and flag != "unroll")

    def build(self, input_size: int | Sequence[int | None]) -> None:
        """Create the weights for inputs of width `input_size`, or of this shape."""
        if isinstance(self.cell, Layer):
            self.cell.build(input_size)

    def __getstate__(self) -> dict[str, Any]:
        # A tensor with a graph can't be copied, and observers observe only this layer.
        return {**super().__getstate__(), "_activity": None, "_observers": ()}

    def _loss_terms(self) -> Iterator[Tensor]:
        if self._activity is not None:
            yield self._activity

    def plan(self) -> Plan:
        """Return which kernel runs each layer of the stack, and why; one line per layer.

        This applies to the layer and its first derivatives; with `create_graph=True` the torch loop differentiates.
        """
        lines = []
        for n, cell in enumerate(self.cells):
            head = f"{self._owner} layer {n} {cell_name(cell)}"
            if not self._ours:
                foreign_names = sorted({cell_name(c) for c in self.cells if not isinstance(c, Cell)})
                idle = "; no effect: remat=True" if self.remat else ""
                lines.append(f"{head}: torch loop: custom cell {', '.join(foreign_names)}{idle}")
                continue
            kernel = cell.like
            route, why = cell.route(kernel)
            width = "?" if cell.input_size is None else cell.input_size
            how = {"fused": f"fused cpu kernel ({op.isa()}){op.autocast()}", "cudnn": f"cuDNN through torch; {why}"}
            remat = ""
            if self.remat:
                remat = "; backward recomputes the gates" if route == "fused" else "; no effect: remat=True"
            lines.append(f"{head} {width} -> {cell.output_size}: {how.get(route, f'torch loop: {why}')}{remat}")
        return Plan(lines)

    def forward(
        self,
        sequences: Any,
        initial_state: Any = None,
        mask: Any = None,
        training: bool | None = None,
        return_gates: bool = False,
        *,
        reset: Any = None,
        lengths: Any = None,
    ) -> Any:
        """Run over a sequence.

        Args:
            sequences: `[B, T, I]`: a tensor of the weights' dtype and device, a tensor of integers, or an array-like.
                Or a torch `PackedSequence`.
            initial_state: the initial state of this call, instead of `states`: (h, c), h for kinds without c, or one
                such state per cell of a stack; each `[B, H]`. The states of a stack may also be a flat list of arrays:
                h, c, h, c for two LSTM cells. A stateful layer keeps the final state.
            mask: bool `[B, T]`, True where a step counts. At other steps the state is carried over, and the output
                repeats the previous one (before the first step that counts: the initial h), or is zero with
                `zero_output_for_mask`.
            training: whether dropout and zoneout are active; None: use the module's mode.
            return_gates: also return a trace of every step (`Trace`, `GRUTrace` or `RNNTrace`), for a stack a tuple of
                them. For a PackedSequence it is padded, with rows in batch order.
            reset: bool `[B, T]`, True where a new piece of a row begins. Each piece starts from the cells' initial
                state and is independent of the steps outside it; at the first step it replaces `initial_state`.
            lengths: `[B]` integers from 0 to T, the number of steps of each row, instead of a mask.

        Returns:
            y: `[B, T, H]` with `return_sequences`, else `[B, H]`, where H is the width of h (`proj_size` if it is
            projected). `return_state` adds the states (h, and c of an LSTM; for a stack one state per cell), then
            `return_gates` adds the trace. For a PackedSequence with `return_sequences`, y is one too; the other results
            have rows in batch order.

        Raises:
            ShapeError: a wrong rank, width, batch or number of states.
            TypeError: a wrong dtype, a mask or reset that isn't bool, or `return_gates` with a custom cell.
            ValueError: a tensor on another device; more than one of `mask`, `lengths` and a PackedSequence.
        """
        given = self.given(sequences, mask, reset, lengths)
        run = self.run(given, initial_state, training, return_gates, self.zero_output_for_mask)
        y: Any = run.y
        if self.return_sequences:
            y = flipped(y, given) if self.go_backwards else y
            y = y if given.packed is None else pack(y, given.packed)
        results = [y, *(self.public_states(run.states) if self.return_state else ())]
        if return_gates:
            traces = run.traces
            if self.go_backwards:
                traces = [type(trace)(*(flipped(part, given) for part in trace)) for trace in traces]
            results.append(self.public_traces(traces))
        return results[0] if len(results) == 1 else tuple(results)

    def given(self, sequences: Any, mask: Any, reset: Any, lengths: Any) -> Given:
        """Check and convert the arguments of a call except its state; create the weights if there are none."""
        owner = self._owner
        if isinstance(sequences, PackedSequence):
            if mask is not None or lengths is not None:
                raise ValueError(f"{owner}: mask and lengths aren't supported with a PackedSequence, which has lengths")
            x, used = unpack(owner, sequences, self._reference())
            self._check(x)
        else:
            x = self.as_x(sequences)
            used = as_used(owner, x, mask, lengths)
        starts = None if reset is None else as_steps(owner, "reset", reset, x)
        return Given(x, used, starts, sequences if isinstance(sequences, PackedSequence) else None)

    def as_x(self, sequences: Any) -> Tensor:
        """Return `sequences` as a checked tensor `[B, T, I]`; create the weights if there are none."""
        x = as_input(self._owner, "sequences", sequences, self._reference())
        self._check(x)
        return x

    def _check(self, x: Tensor) -> None:
        first = next(iter(self.cells))
        if isinstance(first, Cell):
            check_sequence(self._owner, tuple(x.shape), first.input_size, "sequences")
        elif x.ndim < 3:
            fix = ": add a batch axis: x[None]" if x.ndim == 2 else ""
            raise ShapeError(f"{self._owner}: expected sequences [B, T, …], got {tuple(x.shape)}{fix}")
        if not self.built:
            self.build(x.shape[-1])

    def run(self, given: Given, initial_state: Any, training: bool | None, return_gates: bool, zero: bool) -> Run:
        """Run over the result of `given`; a stateful layer keeps the state. `zero`: `zero_output_for_mask`."""
        owner = self._owner
        x, used, reset, packed = given
        states = self._start(initial_state, x.shape[0])
        training = self._trains(training)
        if self._ours:
            y, last, states, traces = run_cells(
                self.cells,
                x,
                states,
                used,
                reset,
                training=training,
                traced=return_gates,
                reverse=self.go_backwards,
                sequences=self.return_sequences,
                residual=self.residual,
                observers=self._observers,
                remat=self.remat,
            )
        elif return_gates:
            raise TypeError(f"{owner}: return_gates isn't supported with custom cells")
        else:
            y, last, states = foreign.loop(
                self.cells, x, states, used, reset, training, self.go_backwards, self._reference(), self.residual
            )
            traces = []
        if self.stateful:
            self._keep(states)
        out = y if self.return_sequences else last
        if zero and used is not None and packed is None and x.shape[1]:
            counts = used if self.return_sequences else used[:, 0 if self.go_backwards else -1]
            out = torch.where(counts.reshape(*counts.shape, *(1,) * (out.ndim - counts.ndim)), out, 0.0)
        if self.activity_regularizer is not None:  # without the padding of packed rows
            self._activity = self.activity_regularizer(
                out if packed is None or not self.return_sequences else out[used]
            )
        return Run(out, states, traces)

    def _reference(self) -> Tensor:
        """Return a tensor of the layer's dtype and device."""
        first = next(iter(self.cells))  # indexing a ModuleList is slower
        if isinstance(first, Cell):
            return first.like
        return next((p for p in self.parameters() if p.is_floating_point()), self._like)


class SingleCellRNN(RNN):
    """Base class of the layers of one cell: passes each argument to the cell or to `RNN`.

    A subclass defines `cell_type`; its constructor follows from the declaration of the cell's kind.
    """

    cell_type: ClassVar[type[Cell]]
    kind: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "cell_type" in vars(cls):
            cls.kind = cls.cell_type.kind
            sign(cls, KINDS[cls.kind], "layer", globals())

    def __init__(self, given: dict[str, Any]) -> None:
        given = {key: storable(value) for key, value in given.items()}
        # The cell has the layer's name, so that its error messages name the layer.
        cell = self.cell_type(**{name: value for name, value in given.items() if name in self.cell_type.signature})
        for argument in COMPATIBLE:
            if argument.name in given:
                argument.check(cell._owner, given[argument.name])
        super().__init__(cell, **{name: given[name] for name in OF_LAYER})
        self._config = {**given, "units": cell.units, "seed": cell.seed}

    def plan(self) -> Plan:
        """See `RNN.plan`. The lines also name arguments that have no effect."""
        given = ((argument, self._config.get(argument.name, argument.default)) for argument in COMPATIBLE)
        idle = [f"{argument.name}={value!r}" for argument, value in given if value != argument.default]
        lines = super().plan()
        return Plan([f"{line}; no effect: {', '.join(idle)}" for line in lines]) if idle else lines

    units = of_cell("units")
    input_size = of_cell("input_size")
    activation = of_cell("activation")
    recurrent_activation = of_cell("recurrent_activation")
    use_bias = of_cell("use_bias")
    dropout = of_cell("dropout")
    recurrent_dropout = of_cell("recurrent_dropout")
    spec = of_cell("spec")
