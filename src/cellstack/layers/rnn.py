"""`RNN`: a cell or a stack of cells over a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from cellstack.layers import foreign, op, weights
from cellstack.layers.base import Layer, as_input
from cellstack.layers.cell import Cell
from cellstack.layers.foreign import as_cell, cell_name
from cellstack.layers.sequences import Given, as_steps, as_used, flipped, pack, shifted, unpack
from cellstack.layers.stack import Call, StackedRNNCells, run_cells
from cellstack.layers.state import StatefulLayer
from cellstack.spec import Plan, ShapeError, as_flag, check_sequence


class Run(NamedTuple):
    """What a pass over a sequence leaves; sequences in the order of time, in whichever direction it went."""

    y: Tensor  # [B, T, H] of the top cell, or [B, H] of the last step
    states: list[Any]  # one entry a cell
    traces: list[Any]  # one entry a cell; none where nobody asked


class RNN(StatefulLayer):
    """A cell, or a stack of cells, run over a sequence. A stack of cells of ours is one call of the fused kernel.

    Args:
        cell: a cell, or a list of cells (a stack): `LSTMCell`, `GRUCell`, `SimpleRNNCell`, in any mixture and of any
            widths; `StackedRNNCells`; or any object with `state_size` and a call `(x, states) -> (y, states)`, which
            runs in a Python loop.
        return_sequences: return the output of every step, not only of the last.
        return_state: return the states after the last step too.
        go_backwards: run from the last step to the first. Outputs come in the order processed.
        stateful: start each call from the states that the one before left; they are saved in the `state_dict`.
        unroll: accepted for Keras's sake; the result is the same either way.
        zero_output_for_mask: output zeros at steps that the mask leaves out, not the previous output.
        activity_regularizer: a term of the output that `losses` gives after a call.
        remat: keep of each step only h and c for the backward pass, which then makes the gates again: for an LSTM a
            third of the memory, for a longer step (see `docs/semantics.md`). Outputs and gradients have the same bits.
            A call with `return_gates` returns the gates, and so keeps them.
        input_size: width I, to make the weights at once; None: at the first call.
        name: said in error messages.

    Raises:
        TypeError: `cell` is no cell.

    >>> from cellstack.layers import GRUCell, LSTMCell
    >>> rnn = RNN(StackedRNNCells([LSTMCell(4), GRUCell(5)]), return_sequences=True, return_state=True)
    >>> y, state_1, state_2 = rnn(torch.zeros(2, 3, 6))
    >>> tuple(y.shape), state_1.shape, state_2.shape  # State(h, c), HiddenState(h)
    ((2, 3, 5), (2, 2, 4), (1, 2, 5))
    """

    _observers: tuple[Callable[[Call], None], ...] = ()  # are shown every call, see `observer`
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
        flags = {
            "return_sequences": return_sequences,
            "return_state": return_state,
            "go_backwards": go_backwards,
            "stateful": stateful,
            "unroll": unroll,
            "zero_output_for_mask": zero_output_for_mask,
            "remat": remat,
        }
        for flag, value in flags.items():
            flags[flag] = as_flag(self._owner, flag, value)
        self._config = {
            "cell": cell,
            **flags,
            "activity_regularizer": activity_regularizer,
            "input_size": input_size,
            "name": name,
        }
        self.cell = StackedRNNCells(cell) if isinstance(cell, (list, tuple)) else as_cell(self._owner, cell)
        self.return_sequences, self.return_state = return_sequences, return_state
        self.go_backwards, self.stateful, self.unroll = go_backwards, stateful, unroll
        self.zero_output_for_mask = zero_output_for_mask
        self.remat = flags["remat"]
        self.activity_regularizer = weights.find(activity_regularizer, weights.REGULARIZERS, "activity_regularizer")
        self._activity: Tensor | None = None
        self._ours = all(isinstance(part, Cell) for part in self.cells)
        self._like = torch.empty(0)  # for a stack without weights of its own
        if input_size is not None:
            self.build(input_size)

    @property
    def cells(self) -> Sequence[Any]:
        """The cells, bottom first."""
        cell: Any = self._modules["cell"]  # as `self.cell`, without the search of a module's attributes
        return cell.cells if isinstance(cell, StackedRNNCells) else (cell,)  # type: ignore[return-value]

    @property
    def stacked(self) -> bool:
        """Whether there is a stack, of however many cells: its states come one a cell."""
        return isinstance(self.cell, StackedRNNCells)

    @property
    def residual(self) -> bool:
        """Whether the cells of a stack add their input to their output: see `StackedRNNCells`."""
        cell = self._modules["cell"]
        return isinstance(cell, StackedRNNCells) and cell.residual

    def public_traces(self, traces: list[Any]) -> Any:
        """Return traces as a call returns them: a tuple, one a cell, for a stack; else the one."""
        return tuple(traces) if self.stacked else traces[0]

    def extra_repr(self) -> str:
        """Say which flags are set."""
        flags = ("return_sequences", "return_state", "go_backwards", "stateful", "zero_output_for_mask", "remat")
        return ", ".join(f"{flag}=True" for flag in flags if getattr(self, flag))

    def build(self, input_size: int | Sequence[int | None]) -> None:
        """Make the weights for inputs of width `input_size` (or of a shape that ends in it)."""
        if isinstance(self.cell, Layer):
            self.cell.build(input_size)

    def _apply(self, fn: Any, recurse: bool = True) -> RNN:
        super()._apply(fn, recurse)
        self._like = fn(self._like)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to a graph can't be copied; who looks on looks at this layer alone.
        return {**super().__getstate__(), "_activity": None, "_observers": ()}

    def _loss_terms(self) -> Iterator[Tensor]:
        if self._activity is not None:
            yield self._activity

    def plan(self) -> Plan:
        """Say which kernel runs each layer of the stack, and why; one line a layer.

        It runs the layer and its first derivatives: with `create_graph=True` the torch loop differentiates.
        """
        lines = []
        for n, cell in enumerate(self.cells):
            head = f"{self._owner} layer {n} {cell_name(cell)}"
            if not self._ours:
                foreign_names = sorted({cell_name(c) for c in self.cells if not isinstance(c, Cell)})
                idle = "; remat=True without effect" if self.remat else ""
                lines.append(f"{head}: torch loop: foreign cell {', '.join(foreign_names)}{idle}")
                continue
            kernel = cell.like
            route, why = cell.route(kernel)
            width = "?" if cell.input_size is None else cell.input_size
            how = {"fused": f"fused cpu kernel ({op.isa()}){op.autocast()}", "cudnn": f"cuDNN through torch; {why}"}
            again = ""
            if self.remat:
                again = "; backward makes the gates again" if route == "fused" else "; remat=True without effect"
            lines.append(f"{head} {width} -> {cell.output_size}: {how.get(route, f'torch loop: {why}')}{again}")
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
            sequences: `[B, T, I]`; a tensor of the weights' dtype and device, integers, or anything array-like. Or a
                `PackedSequence` of torch.
            initial_state: what this call starts from, in place of `states`: (h, c), h alone where there is no cell, or
                one such state a cell of a stack; each `[B, H]`. In a stateful layer the state that results is what is
                kept.
            mask: `[B, T]` of bool, True where a step counts. Elsewhere the state is carried, and the output repeats
                the previous one (before the first step that counts: the initial h), or is zero with
                `zero_output_for_mask`.
            training: whether dropout and zoneout draw masks; None: whether the module is in training mode.
            return_gates: return a trace too, of every step (`Trace`, `GRUTrace` or `RNNTrace`): a tuple of them for a
                stack. That of a PackedSequence is padded, its rows in the order of the batch.
            reset: `[B, T]` of bool, True where a row's next piece begins: what lies before that step has no influence
                on what lies after it, nor the other way round. A piece starts from the cells' initial state; where the
                call does, at its first step, that replaces `initial_state`.
            lengths: `[B]` integers from 0 to T, how many steps of each row count: in place of a mask.

        Returns:
            y: `[B, T, H]` with `return_sequences`, else `[B, H]`, H being the width of h (`proj_size` where it is
            projected); alone, or followed by the states with
            `return_state` (h, and c of an LSTM; for a stack one state a cell), then by the trace with `return_gates`.
            For a PackedSequence, y with `return_sequences` is one too; all else has its rows in the order of the batch.

        Raises:
            ShapeError: a wrong rank, width, batch or number of states.
            TypeError: a wrong dtype, a mask or reset that isn't bool, or `return_gates` of a cell that isn't ours.
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
        """Return what a call is given but for its state, checked; builds the weights where there are none."""
        owner = self._owner
        if isinstance(sequences, PackedSequence):
            if mask is not None or lengths is not None:
                raise ValueError(f"{owner}: expected no mask or lengths with a PackedSequence, which has its own")
            x, used = unpack(owner, sequences, self._reference())
            self._check(x)
        else:
            x = self.as_x(sequences)
            used = as_used(owner, x, mask, lengths)
        starts = None if reset is None else as_steps(owner, "reset", reset, x)
        return Given(x, used, starts, sequences if isinstance(sequences, PackedSequence) else None)

    def as_x(self, sequences: Any) -> Tensor:
        """Return `sequences` as a tensor `[B, T, I]`, checked; builds the weights where there are none."""
        x = as_input(self._owner, "sequences", sequences, self._reference())
        self._check(x)
        return x

    def _check(self, x: Tensor) -> None:
        first = next(iter(self.cells))
        if isinstance(first, Cell):
            check_sequence(self._owner, tuple(x.shape), first.input_size, "sequences")
        elif x.ndim < 3:
            mend = ": add a batch axis: x[None]" if x.ndim == 2 else ""
            raise ShapeError(f"{self._owner}: expected sequences [B, T, …], got {tuple(x.shape)}{mend}")
        if not self.built:
            self.build(x.shape[-1])

    def run(self, given: Given, initial_state: Any, training: bool | None, return_gates: bool, zero: bool) -> Run:
        """Run over what `given` returned, and keep the state. `zero` is `zero_output_for_mask` for this call."""
        owner = self._owner
        x, used, reset, packed = given
        states = self._start(initial_state, x.shape[0])
        training = self._trains(training)
        if reset is not None and self.go_backwards:
            reset = shifted(reset)
        if self._ours:
            y, last, states, traces = run_cells(
                self.cells,
                x,
                states,
                used,
                reset,
                training,
                return_gates,
                self.go_backwards,
                self.return_sequences,
                self.residual,
                self._observers,
                self.remat,
            )
        elif return_gates:
            raise TypeError(f"{owner}: expected return_gates=False: only cells of ours have gates to return")
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
        if self.activity_regularizer is not None:  # of what is returned: what pads a packed row isn't
            self._activity = self.activity_regularizer(
                out if packed is None or not self.return_sequences else out[used]
            )
        return Run(out, states, traces)

    def _reference(self) -> Tensor:
        """Return a tensor of the dtype and on the device that the layer works in."""
        first = next(iter(self.cells))  # by its number a ModuleList looks for longer
        if isinstance(first, Cell):
            return first.like
        return next((p for p in self.parameters() if p.is_floating_point()), self._like)
