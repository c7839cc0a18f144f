"""The mLSTM, a kind of cell with a matrix per head as its memory.

Its `MemorySpec` takes the place of a `CellSpec`: the cell has no arrays, as its step multiplies by no weights, and its
gates aren't blocks of H columns. The projection that computes them is a dense node before it.
"""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from cellstack.cells.activations import Activation, activation
from cellstack.cells.arrays import Axis
from cellstack.cells.base import Kind, MatrixState, Ops, V


class MemorySpec(NamedTuple):
    """Description of an mLSTM: the widths of a head, epsilon and the output gate, see `cellstack.nodes.MLSTM`."""

    heads: int
    key_size: int
    value_size: int
    epsilon: float
    output_gate: bool = False

    @property
    def of_kind(self) -> Kind:
        """The declaration of this kind of cell."""
        return _kind(self.output_gate)

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parts of the input by name, in their order."""
        keys, values = (self.heads, self.key_size), (self.heads, self.value_size)
        shapes = {"q": keys, "k": keys, "v": values, "z_i": (self.heads,), "z_f": (self.heads,)}
        return shapes | ({"z_o": values} if self.output_gate else {})

    @property
    def core(self) -> int:
        """Width of q, k, v, ĩ and f̃ of all heads."""
        return self.heads * (2 * self.key_size + self.value_size + 2)

    @property
    def units(self) -> int:
        """Width of h."""
        return self.heads * self.value_size

    @property
    def input_size(self) -> int:
        """Width of the input: `core`, and õ with an output gate."""
        return self.core + (self.units if self.output_gate else 0)

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array of the state, by name, without the batch."""
        keys = self.heads, self.key_size
        return {"C": (*keys, self.value_size), "n": keys, "m": (self.heads,)}

    @property
    def trace_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each field of a trace, by name, without the batch and the steps."""
        shapes = {name.removeprefix("z_"): shape for name, shape in self.parts.items()}
        shapes |= {**self.state_shapes, "h": shapes["v"]}
        return {name: shapes[name] for name in self.of_kind.trace._fields}

    @property
    def summary(self) -> str:
        """The description in a few words."""
        heads = f"{self.heads} head{'s' if self.heads > 1 else ''}"
        return f"{heads}, C {self.key_size} x {self.value_size}{', output gate' if self.output_gate else ''}"

    @property
    def state_axes(self) -> dict[str, Axis]:
        """The number of values of each array of the state, by name; see `CellSpec.state_axes`."""
        return {name: (math.prod(shape), "") for name, shape in self.state_shapes.items()}

    @property
    def zoneout_rates(self) -> dict[str, float]:
        """The share of each state, by name, that zoneout keeps: none."""
        return dict.fromkeys(self.state_shapes, 0.0)

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the activations: that of the output gate."""
        return ("o",) if self.output_gate else ()

    @property
    def activations(self) -> tuple[Activation, ...]:
        """The activation of each of `slots`."""
        return tuple(activation("sigmoid") for _ in self.slots)

    @property
    def form(self) -> dict[str, Any]:
        """The settings, all of which the form has: see `CellSpec.form`."""
        return {"kind": "mlstm", "input_size": self.input_size, "units": self.units, **self._asdict()}

    @property
    def axes(self) -> dict[str, tuple[Axis, ...]]:
        """The axes of the cell's arrays by name: it has none."""
        return {}

    # What a `CellSpec` also says of a cell.
    output_size, shapes = units, axes
    gates, clip, scalar, learn_initial_state, exponential_forget, parameters = (), None, False, False, False, 0


def inputs(ops: Ops[V], spec: MemorySpec, x: V) -> Sequence[V]:
    """Return the parts of x: see `Kind.inputs`."""
    parts = zip(spec.parts, ops.parts(x, spec.parts), strict=True)
    return tuple(ops.record(name, part) if name in ("q", "k", "v") else part for name, part in parts)


def step(ops: Ops[V], spec: MemorySpec, a: Sequence[V], C: V, n: V, m: V) -> tuple[Sequence[V], Sequence[V]]:
    """Return the gates, and h, C, n and m after the step; see `cellstack.reference.memory` for the equations."""
    q, k, v, z_i, z_f, *z_o = a
    kept = ops.add(ops.log_sigmoid(z_f), m)
    m = ops.record("m", ops.maximum(kept, z_i))
    i = ops.record("i", ops.exp(ops.sub(z_i, m)))
    f = ops.record("f", ops.exp(ops.sub(kept, m)))
    key = ops.scaled(k, ops.affine(i, spec.key_size**-0.5))
    C = ops.add(ops.scaled(C, f, 2), ops.outer(key, v))
    n = ops.record("n", ops.add(ops.scaled(n, f), key))
    size = ops.maximum(ops.absolute(ops.dot(n, q)), ops.exp(ops.affine(m, -1.0)))
    h = ops.divided(ops.retrieved(C, q), ops.affine(size, offset=spec.epsilon))
    gates = [i, f, *(ops.gate("o", z) for z in z_o)]
    if z_o:
        h = ops.mul(gates[-1], h)
    return gates, (ops.record("h", ops.joined(h)), C, n, m)


def refuses(state: Mapping[str, Any]) -> str:
    """Return why a state can't be one; see `Kind.refuses`."""
    for name, values in state.items():
        if not (abs(values) < math.inf).all():
            return f"expected finite numbers in {name}, got NaN or infinity; zeros are empty"
    return ""


@lru_cache
def _kind(output_gate: bool) -> Kind:
    gates = {"i": "write", "f": "keep"} | ({"o": "output"} if output_gate else {})
    return Kind(
        name="mlstm",
        title="mLSTM",
        gates=gates,
        state=MatrixState,
        trace=namedtuple("MLSTMTrace", (*"qkv", *gates, "m", "n", "h")),  # without C, which has too many numbers
        step=step,
        inputs=inputs,
        arrays=(),
        memory="C",
        stabiliser="m",
        zoneout={},
        update=lambda spec, gates: (gates["f"], gates["i"]),  # of k·vᵀ, the shares of steps
        refuses=refuses,
        meanings={
            "q": "query: what is looked for in the memory",
            "k": "key: under what the value is stored",
            "v": "value: what is stored",
            "i": "input gate: how much of the key with its value is added, exp(z_i − m)",
            "f": "forget gate: how much of C and n is kept, σ(z_f)·exp(m_prev − m)",
            "o": "output gate: how much of what the query retrieves is output",
            "m": "stabiliser: the logarithm of the scale of C and n",
            "n": "normaliser: the sum of the keys with their weights, times exp(−m)",
            "C": "memory: the sum of k·vᵀ with their weights, times exp(−m)",
            "h": "output: what the query retrieves" + (", times the output gate" if output_gate else ""),
        },
        ref='Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", eqs. 19 to 27',
    )
