"""`RNN`: a cell or a stack of cells over a sequence; `LSTM`: an RNN of one LSTMCell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cellstack.layers import foreign, op, weights
from cellstack.layers.base import Layer, as_input, as_mask, of_cell
from cellstack.layers.cells import LSTMCell
from cellstack.layers.foreign import as_cell, cell_name
from cellstack.layers.stack import StackedRNNCells, run_lstms
from cellstack.layers.state import StatefulLayer
from cellstack.spec import Plan, ShapeError, Trace, check_mask, check_sequence


class Run(NamedTuple):
    """What a pass over a sequence leaves."""

    y: Tensor  # [B, T, H] of the top cell, or [B, H] of the last step
    states: list[Any]  # one entry a cell
    traces: Any  # a Trace, for a stack a tuple of them; None where nobody asked


class RNN(StatefulLayer):
    """A cell, or a stack of cells, run over a sequence. A stack of LSTMCells is one call of the fused kernel.

    Args:
        cell: a cell, or a list of cells (a stack): `LSTMCell`s, `StackedRNNCells`, or any object with `state_size` and
            a call `(x, states) -> (y, states)`; the latter run in a Python loop.
        return_sequences: return the output of every step, not only of the last.
        return_state: return the states after the last step too.
        go_backwards: run from the last step to the first. Outputs come in the order processed.
        stateful: start each call from the states that the one before left; they are saved in the `state_dict`.
        unroll: accepted for Keras's sake; the result is the same either way.
        zero_output_for_mask: output zeros at steps that the mask leaves out, not the previous output.
        activity_regularizer: a term of the output that `losses` gives after a call.
        input_size: width I, to make the weights at once; None: at the first call.
        name: said in error messages.

    Raises:
        TypeError: `cell` is no cell.

    >>> rnn = RNN(StackedRNNCells([LSTMCell(4), LSTMCell(5)]), return_sequences=True, return_state=True)
    >>> y, state_1, state_2 = rnn(torch.zeros(2, 3, 6))
    >>> tuple(y.shape), state_1.shape, state_2.shape
    ((2, 3, 5), (2, 2, 4), (2, 2, 5))
    """

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
        input_size: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self._config = {
            "cell": cell,
            "return_sequences": return_sequences,
            "return_state": return_state,
            "go_backwards": go_backwards,
            "stateful": stateful,
            "unroll": unroll,
            "zero_output_for_mask": zero_output_for_mask,
            "activity_regularizer": activity_regularizer,
            "input_size": input_size,
            "name": name,
        }
        self.cell = StackedRNNCells(cell) if isinstance(cell, (list, tuple)) else as_cell(self._owner, cell)
        self.return_sequences, self.return_state = return_sequences, return_state
        self.go_backwards, self.stateful, self.unroll = go_backwards, stateful, unroll
        self.zero_output_for_mask = zero_output_for_mask
        self.activity_regularizer = weights.find(activity_regularizer, weights.REGULARIZERS, "activity_regularizer")
        self._activity: Tensor | None = None
        self._fusable = all(isinstance(part, LSTMCell) for part in self.cells)
        self._like = torch.empty(0)  # for a stack without weights of its own
        if input_size is not None:
            self.build(input_size)

    @property
    def cells(self) -> Sequence[Any]:
        """The cells, bottom first."""
        cell = self.cell
        return cell.cells if isinstance(cell, StackedRNNCells) else (cell,)  # type: ignore[return-value]

    @property
    def stacked(self) -> bool:
        """Whether there is a stack, of however many cells: its states come one a cell."""
        return isinstance(self.cell, StackedRNNCells)

    def extra_repr(self) -> str:
        """Say which flags are set."""
        flags = ("return_sequences", "return_state", "go_backwards", "stateful", "zero_output_for_mask")
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
        return {**super().__getstate__(), "_activity": None}  # belongs to a graph, which can't be copied

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
            if not self._fusable:
                foreign_names = sorted({cell_name(c) for c in self.cells if not isinstance(c, LSTMCell)})
                lines.append(f"{head}: torch loop: foreign cell {', '.join(foreign_names)}")
                continue
            kernel = cell.like
            route, why = cell.route(kernel)
            width = "?" if cell.input_size is None else cell.input_size
            how = {"fused": f"fused cpu kernel ({op.isa()})", "cudnn": f"cuDNN through torch; {why}"}
            lines.append(f"{head} {width} -> {cell.units}: {how.get(route, f'torch loop: {why}')}")
        return Plan(lines)

    def forward(
        self,
        sequences: Any,
        initial_state: Any = None,
        mask: Any = None,
        training: bool | None = None,
        return_gates: bool = False,
    ) -> Any:
        """Run over a sequence.

        Args:
            sequences: `[B, T, I]`; a tensor of the weights' dtype and device, integers, or anything array-like.
            initial_state: what this call starts from, in place of `states`: (h, c), or one such pair a cell of a
                stack; each `[B, H]`. In a stateful layer the state that results is what is kept.
            mask: `[B, T]` of bool, True where a step counts. Elsewhere the state is carried, and the output repeats
                the previous one (before the first step that counts: the initial h), or is zero with
                `zero_output_for_mask`.
            training: whether dropout is active; None: whether the module is in training mode.
            return_gates: return a `Trace` too, of every step: a tuple of them for a stack.

        Returns:
            y: `[B, T, H]` with `return_sequences`, else `[B, H]`; alone, or followed by the states with
            `return_state` (h, c; for a stack one `State` a cell), then by the trace with `return_gates`.

        Raises:
            ShapeError: a wrong rank, width, batch or number of states.
            TypeError: a wrong dtype, a mask that isn't bool, or `return_gates` of a cell that isn't ours.
            ValueError: a tensor on another device.
        """
        run = self.run(sequences, initial_state, mask, training, return_gates, self.zero_output_for_mask)
        results = [run.y, *(self.public_states(run.states) if self.return_state else ())]
        if return_gates:
            results.append(run.traces)
        return results[0] if len(results) == 1 else tuple(results)

    def run(
        self, sequences: Any, initial_state: Any, mask: Any, training: bool | None, return_gates: bool, zero: bool
    ) -> Run:
        """Check the arguments, run, keep the state, and put y and the traces into the shape that is returned.

        `zero` is `zero_output_for_mask` for this call. In what comes back `states` has one entry a cell, and `traces`
        is one Trace, or for a stack a tuple of them.
        """
        owner = self._owner
        x = self._input(sequences)
        batch, steps = x.shape[:2]
        used = None
        if mask is not None:
            used = as_mask(owner, mask, x)
            check_mask(owner, tuple(used.shape), batch, steps)
        states = self._start(initial_state, batch)
        training = self._trains(training)
        if self._fusable:
            y, last, states, traces = run_lstms(
                self.cells, x, states, used, training, return_gates, self.go_backwards, self.return_sequences
            )
        elif return_gates:
            raise TypeError(f"{owner}: expected return_gates=False: only LSTMCells have gates to return")
        else:
            y, last, states = foreign.loop(self.cells, x, states, used, training, self.go_backwards, self._reference())
            traces = []
        if self.stateful:
            self._keep(states)
        if zero and used is not None:
            if self.return_sequences:
                y = torch.where(_expand(used, y), y, 0.0)
            elif steps:
                last = torch.where(_expand(used[:, 0 if self.go_backwards else -1], last), last, 0.0)
        if self.go_backwards:  # in the order processed
            y = y.flip(1) if self.return_sequences else y
            traces = [Trace(*(part.flip(1) for part in trace)) for trace in traces]
        out = y if self.return_sequences else last
        if self.activity_regularizer is not None:
            self._activity = self.activity_regularizer(out)
        return Run(out, states, tuple(traces) if self.stacked else traces[0] if traces else None)

    def _input(self, sequences: Any) -> Tensor:
        """Return x as a tensor `[B, T, I]`, checked; builds the weights where that hasn't happened."""
        first = self.cells[0]
        x = as_input(self._owner, "sequences", sequences, self._reference())
        if isinstance(first, LSTMCell):
            check_sequence(self._owner, tuple(x.shape), first.input_size, "sequences")
        elif x.ndim < 3:
            raise ShapeError(f"{self._owner}: expected sequences [B, T, …], got {tuple(x.shape)}")
        if not self.built:
            self.build(x.shape[-1])
        return x

    def _reference(self) -> Tensor:
        """Return a tensor of the dtype and on the device that the layer works in."""
        first = self.cells[0]
        if isinstance(first, LSTMCell):
            return first.like
        return next((p for p in self.parameters() if p.is_floating_point()), self._like)


def _expand(mask: Tensor, like: Tensor) -> Tensor:
    """Return `mask` with axes of size 1 added at its end, up to the rank of `like`."""
    return mask.reshape(*mask.shape, *(1,) * (like.ndim - mask.ndim))


class LSTM(RNN):
    """A long short-term memory over a sequence: an RNN of one `LSTMCell`.

    Args:
        units, activation, recurrent_activation, use_bias, kernel_initializer, recurrent_initializer, bias_initializer,
        unit_forget_bias, kernel_regularizer, recurrent_regularizer, bias_regularizer, kernel_constraint,
        recurrent_constraint, bias_constraint, dropout, recurrent_dropout, seed, input_size, dtype, device: see
            `LSTMCell`.
        activity_regularizer, return_sequences, return_state, go_backwards, stateful, unroll, zero_output_for_mask,
        name: see `RNN`.

    Raises:
        ShapeError: a width below 1.
        ValueError: an unknown name, or a dropout outside [0, 1).

    >>> lstm = LSTM(4, return_sequences=True, return_state=True)
    >>> y, h, c = lstm([[[3, 2, 2, 2, 2, 2]]])
    >>> tuple(y.shape), tuple(h.shape), tuple(c.shape)
    ((1, 1, 4), (1, 4), (1, 4))
    """

    cell: LSTMCell

    def __init__(
        self,
        units: int,
        activation: Any = "tanh",
        recurrent_activation: Any = "sigmoid",
        use_bias: bool = True,
        kernel_initializer: weights.Given = "glorot_uniform",
        recurrent_initializer: weights.Given = "orthogonal",
        bias_initializer: weights.Given = "zeros",
        unit_forget_bias: bool = True,
        kernel_regularizer: weights.Given = None,
        recurrent_regularizer: weights.Given = None,
        bias_regularizer: weights.Given = None,
        activity_regularizer: weights.Given = None,
        kernel_constraint: weights.Given = None,
        recurrent_constraint: weights.Given = None,
        bias_constraint: weights.Given = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        seed: int | None = None,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        unroll: bool = False,
        zero_output_for_mask: bool = False,
        *,
        input_size: int | None = None,
        dtype: str | torch.dtype | None = None,
        device: Any = None,
        name: str | None = None,
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        of_layer = ("return_sequences", "return_state", "go_backwards", "stateful", "unroll", "zero_output_for_mask")
        shared = {"activity_regularizer": activity_regularizer, "name": name}
        # The cell is named after the layer, so that its errors are the layer's.
        cell = LSTMCell(**{key: value for key, value in given.items() if key not in (*of_layer, *shared)}, name=name)
        super().__init__(cell, **{key: given[key] for key in of_layer}, **shared)
        self._config = {**given, "units": cell.units, "seed": cell.seed}

    units = of_cell("units")
    input_size = of_cell("input_size")
    activation = of_cell("activation")
    recurrent_activation = of_cell("recurrent_activation")
    use_bias = of_cell("use_bias")
    dropout = of_cell("dropout")
    recurrent_dropout = of_cell("recurrent_dropout")
