"""Records of calls of the op: a cell as one call runs it, the call itself, and its results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from cellstack import native
from cellstack.cells.spec import ARRAYS, STATES, CellSpec
from cellstack.layers import eager

_FLAGS = ("torch_layout", "recompute_gates", "bf16_matmul")


@dataclass(frozen=True, eq=False)
class CellCall:
    """A cell, and how a call runs it.

    Args:
        spec: the cell.
        torch_layout: its weights are those of PyTorch's modules, in this order: `weight_ih [G·H, I]`, `weight_hh
            [G·H, P]`, with a bias `bias_ih` and `bias_hh [G·H]`, and with a projection `weight_hr [P, H]`; the gates
            have PyTorch's order.
        recompute_gates: the backward pass recomputes gates and intermediate values, instead of reading saved ones.
        bf16_matmul: the factors of products are rounded to bfloat16, forward and backward; for float32 only.

    Attributes:
        text: the record as JSON, the form in which PyTorch's dispatcher passes it; `of_text` parses it.
        state: the type of the state.
        in_bf16, recomputing: the record with this flag. They are made in advance, as compilers can't trace that.
    """

    spec: CellSpec
    torch_layout: bool = False
    recompute_gates: bool = False
    bf16_matmul: bool = False
    text: str = field(init=False)
    state: Any = field(init=False)
    in_bf16: CellCall = field(init=False)
    recomputing: CellCall = field(init=False)

    def __post_init__(self) -> None:
        flags = {name: True for name in _FLAGS if getattr(self, name)}
        layout, again, bf16 = self.torch_layout, self.recompute_gates, self.bf16_matmul
        bf16_one = self if bf16 else CellCall(self.spec, layout, again, True)
        again_one = self if again else CellCall(self.spec, layout, True, bf16)
        made = {"text": json.dumps(self.spec.settings | flags), "state": self.spec.of_kind.state}
        made |= {"in_bf16": bf16_one, "recomputing": again_one}
        for name, value in made.items():
            object.__setattr__(self, name, value)

    def __reduce__(self) -> Any:
        return CellCall, (self.spec, *(getattr(self, name) for name in _FLAGS))

    @cached_property
    def description(self) -> Any:
        """The kernel's object."""
        return native.description(self.spec, self.torch_layout)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights by name, in the order in which a call takes them."""
        spec = self.spec
        if not self.torch_layout:
            return spec.shapes
        columns = len(spec.gates) * spec.units
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (columns, spec.features)}
        shapes["weight_hh"] = (columns, spec.output_size)
        shapes |= {"bias_ih": (columns,), "bias_hh": (columns,)} if spec.use_bias else {}
        return shapes | ({"weight_hr": (spec.output_size, spec.units)} if spec.proj_size else {})

    @cached_property
    def places(self) -> tuple[int, ...]:
        """The position in ARRAYS of each of the cell's arrays."""
        return tuple(ARRAYS.index(name) for name in self.spec.shapes)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The widths of the states."""
        return tuple(self.spec.state_sizes.values())

    @cached_property
    def masks(self) -> tuple[str, ...]:
        """The names of the random masks that a call takes in training."""
        return self.spec.of_kind.masks

    @cached_property
    def functions(self) -> list[eager.Function]:
        """The activations of the torch loop."""
        return [eager.function_of(activation) for activation in self.spec.activations]

    def saved(self, batch: int, steps: int, time_major: bool) -> Saved:
        """Return the shapes of what is saved at every step, `(0,)` for absent ones."""
        names = ("y", "states") if self.recompute_gates else ("y", "gates", "states", "intermediate")
        shapes = native.results(self.spec, batch, steps, names=names)
        if time_major:
            shapes["y"] = (steps, batch, self.spec.output_size)
        return Saved(**{name: shapes.get(name, (0,)) for name in Saved._fields})


@lru_cache(maxsize=1024)
def of_text(text: str) -> CellCall:
    """Return the record of a `CellCall.text`; that of a plain cell is its `CellSpec.text`."""
    settings = json.loads(text)
    flags = {name: settings.pop(name) for name in _FLAGS if name in settings}
    return CellCall(CellSpec(**settings), **flags)


class Saved(NamedTuple):
    """What a call with `save` returns of a layer for every step: see `cellstack.layers.op`."""

    y: Any
    gates: Any
    states: Sequence[Any]
    intermediate: Any


class OpCall(NamedTuple):
    """The arguments of the op; see `cellstack.layers.op`."""

    x: Tensor
    starts: Sequence[Tensor]
    weights: Sequence[Tensor]
    drops: Sequence[Tensor]
    mask: Tensor | None
    reset: Tensor | None
    cells: Sequence[CellCall]
    reverse: bool = False
    sequences: bool = True
    save: bool = False
    threads: int = 0
    time_major: bool = False

    @classmethod
    def of_op(cls, *arguments: Any) -> OpCall:
        """Return the record of the op's own arguments, which have the cells as texts."""
        x, starts, weights, drops, *rest = arguments
        call = cls(x, starts or (), weights, drops or (), *rest)  # AOTInductor passes None for an empty list
        return call._replace(cells=[of_text(text) for text in arguments[6]])

    def as_op(self) -> tuple[Any, ...]:
        """Return the op's arguments."""
        return *self[:6], [cell.text for cell in self.cells], *self[7:]


def by_layer(specs: Sequence[CellSpec], out: Sequence[Any]) -> tuple[list[Sequence[Any]], list[Saved]]:
    """Return each layer's final states, and what a call with `save` saved of it at every step, from its results."""
    ends, stop = [], 0
    for spec in specs:
        start, stop = stop, stop + len(STATES[spec.kind]._fields)
        ends.append(out[start:stop])
    return ends, saved_by_layer(specs, out[stop:])


def saved_by_layer(specs: Sequence[CellSpec], saved: Sequence[Any]) -> list[Saved]:
    """Return what is saved of each layer at every step, from the results after the final states."""
    count, found = len(specs), []
    stop = 2 * count
    for n, spec in enumerate(specs):
        start, stop = stop, stop + len(STATES[spec.kind]._fields) - 1
        found.append(Saved(saved[n], saved[count + n], saved[start:stop], saved[n - count]))
    return found
