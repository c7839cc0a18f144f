"""Cells with any flags as ONNX's Scan: the equations of `cellstack.reference` as the graph of one step.

Used for cells that ONNX's LSTM, GRU and RNN can't express, and for float64 cells, which ONNX Runtime's operators don't
support. The body maps the states and x to the states and y. It holds its arrays, and the cell's description as its
`doc_string`: the reader takes the cell from the equations, and from the description only numbers that float32 rounded.

Ref: ONNX, Operators.md, Scan.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from cellstack.formats.onnx.file import onnx_package
from cellstack.formats.onnx.pieces import Pieces
from cellstack.nodes.recurrent import Cell

FIRST_OPSET = 9  # earlier, a Scan had other inputs


class _Step(Pieces):
    """The graph of one step of a cell."""

    def __init__(self, where: str, cell: Cell) -> None:
        super().__init__(onnx_package(), cell.dtype, set(), f"{where}/")  # names of a Network have no slash
        self.spec, self.where = cell.spec, where
        self.w = {
            name: self.tensor(f"{where}/{name}", array)
            for name, array in cell.arrays.items()
            if not name.startswith("initial_")
        }

    def columns(self, v: str, gates: int, *only: int) -> list[str]:
        """Split an array with a block of H columns per gate into these blocks, or into some of them."""
        units = self.spec.units
        places = only or range(gates)
        axis = self.integers(-1)
        return [self.of("Slice", v, self.integers(n * units), self.integers((n + 1) * units), axis) for n in places]

    def rows(self, name: str, count: int) -> list[str]:
        """Split an array into its rows."""
        return [self.of("Gather", self.w[name], self.at(n), axis=0) for n in range(count)]

    def at(self, place: int) -> str:
        """Return the name of a constant index."""
        key = ("at", place)
        if key not in self.constants:
            self.constants[key] = self.tensor(f"{self.prefix}at_{place}", np.array(place, np.int64))
        return self.constants[key]

    def unit(self, v: str) -> str:
        """Normalise a row: `(v - mean) / sqrt(variance + epsilon)`."""
        apart = self.of("Sub", v, self.of("ReduceMean", v, axes=[-1], keepdims=1))
        variance = self.of("ReduceMean", self.of("Mul", apart, apart), axes=[-1], keepdims=1)
        scale = self.of("Sqrt", self.of("Add", variance, self.number(self.spec.norm_epsilon)))
        return self.of("Div", apart, scale)

    def product(self, v: str, name: str, gain: str) -> str:
        """Multiply by one of the two matrices, and normalise; a GRU normalises g separately from z and r."""
        out = self.of("MatMul", v, self.w[name])
        if not self.spec.layer_norm:
            return out
        if self.spec.kind == "gru":
            cut, end, axis = self.integers(2 * self.spec.units), self.integers(3 * self.spec.units), self.integers(-1)
            parts = [self.of("Slice", out, self.integers(0), cut, axis), self.of("Slice", out, cut, end, axis)]
            out = self.of("Concat", *map(self.unit, parts), axis=-1)
        else:
            out = self.unit(out)
        return self.of("Mul", out, self.w[gain])

    def clipped(self, v: str, bound: float | None) -> str:
        """Clip to ±bound."""
        return v if bound is None else self.of("Clip", v, self.number(-bound), self.number(bound))

    def gate(self, slot: str, z: str) -> str:
        """Apply the activation of a gate, or of the cell output."""
        z = z if slot == "cell" else self.clipped(z, self.spec.clip)
        text = str(self.spec.activations[self.spec.slots.index(slot)])
        made = self.fresh(f"{self.prefix}{slot}")
        return self.activate(made, z, text, made, plain=self.dtype == np.float64)

    def less_than_one(self, v: str) -> str:
        """Return `1 - v`."""
        return self.of("Sub", self.number(1.0), v)

    def sums(self, x: str, h: str) -> str:
        """Return the pre-activations of an LSTM or a SimpleRNN."""
        a, b = self.product(x, "kernel", "kernel_gain"), self.product(h, "recurrent_kernel", "recurrent_gain")
        z = self.of("Add", a, b)
        return self.of("Add", z, self.w["bias"]) if self.spec.use_bias else z

    def lstm(self, x: str, h: str, c: str) -> list[str]:
        """Return h and c after a step."""
        spec, of = self.spec, self.of
        z = dict(zip(spec.gates, self.columns(self.sums(x, h), len(spec.gates)), strict=True))
        seeing = [gate for gate in spec.gates if gate != "g"]
        p = dict(zip(seeing, self.rows("peepholes", len(seeing)), strict=True)) if spec.peepholes else {}
        for gate in list(p)[:-1]:
            z[gate] = of("Add", z[gate], of("Mul", p[gate], c))
        i = self.gate("i", z["i"])
        f = self.less_than_one(i) if spec.coupled else self.gate("f", z["f"])
        g = self.gate("g", z["g"])
        c_new = self.clipped(of("Add", of("Mul", f, c), of("Mul", i, g)), spec.cell_clip)
        if spec.peepholes:
            z["o"] = of("Add", z["o"], of("Mul", p["o"], c_new))
        o = self.gate("o", z["o"])
        out = c_new
        if spec.layer_norm:
            out = of("Add", of("Mul", self.unit(c_new), self.w["cell_gain"]), self.w["cell_bias"])
        h_new = of("Mul", o, self.gate("cell", out))
        return [of("MatMul", h_new, self.w["projection"]) if spec.proj_size else h_new, c_new]

    def gru(self, x: str, h: str) -> list[str]:
        """Return h after a step."""
        spec, of = self.spec, self.of
        a, q = self.product(x, "kernel", "kernel_gain"), self.product(h, "recurrent_kernel", "recurrent_gain")
        if spec.use_bias and spec.reset_after:
            one, other = self.rows("bias", 2)
            a, q = of("Add", a, one), of("Add", q, other)
        elif spec.use_bias:
            a = of("Add", a, self.w["bias"])
        a_z, a_r, a_g = self.columns(a, 3)
        q_z, q_r = self.columns(q, 3, 0, 1)
        z, r = self.gate("z", of("Add", a_z, q_z)), self.gate("r", of("Add", a_r, q_r))
        if spec.reset_after:
            b_g = of("Mul", r, *self.columns(q, 3, 2))
        else:
            b_g = of("MatMul", of("Mul", r, h), *self.columns(self.w["recurrent_kernel"], 3, 2))
        g = self.gate("g", of("Add", a_g, b_g))
        return [of("Add", of("Mul", z, h), of("Mul", self.less_than_one(z), g))]

    def rnn(self, x: str, h: str) -> list[str]:
        """Return h after a step."""
        return [self.gate("g", self.sums(x, h))]


def body_of(where: str, cell: Cell, masked: bool = False, residual: bool = False) -> Any:
    """Return a step of a cell as a GraphProto: states and x in, states and y out.

    Args:
        where: the prefix of all names.
        cell: the cell.
        masked: whether it takes a flag per row too, False where the step is skipped: then all states are carried over.
            The previous y is then an additional state, the last one.
        residual: whether y is h + x; only with `masked`.
    """
    step, spec = _Step(where, cell), cell.spec
    info = step.onnx.helper.make_tensor_value_info
    sizes = dict(spec.state_sizes) | ({"y": spec.output_size} if masked else {})
    before = {name: step.fresh(f"{where}/{name}_before") for name in sizes}
    x = step.fresh(f"{where}/x")
    own = [before[name] for name in spec.state_sizes]
    new = getattr(step, spec.kind)(x, *own)
    for n, kept in enumerate((spec.zoneout, spec.zoneout_cell)[: len(new)]):
        if kept:
            old = step.of("Mul", own[n], step.number(kept))
            new[n] = step.of("Add", old, step.of("Mul", new[n], step.number(1.0 - kept)))
    inputs = [info(before[name], step.type, ["batch", size]) for name, size in sizes.items()]
    inputs.append(info(x, step.type, ["batch", spec.input_size]))
    if masked:
        used = step.fresh(f"{where}/used")
        inputs.append(info(used, step.onnx.TensorProto.BOOL, ["batch", 1]))
        new.append(step.of("Add", new[0], x) if residual else new[0])
        new = [step.of("Where", used, now, then) for now, then in zip(new, before.values(), strict=True)]
    outputs = []
    for name, value in zip([*sizes, "out"], [*new, new[-1] if masked else new[0]], strict=True):
        size = sizes.get(name, spec.output_size)
        outputs.append(info(step.put("Identity", [value], step.fresh(f"{where}/{name}_after")), step.type,
                            ["batch", size]))  # fmt: skip
    return step.onnx.helper.make_graph(
        step.nodes, f"{where}/step", inputs, outputs, step.tensors, doc_string="" if masked else described(cell)
    )


def described(cell: Cell) -> str:
    """Return a cell's description as one line of JSON; without its initial state, which isn't part of the step."""
    settings = {**cell.spec.settings, "input_size": cell.spec.input_size, "units": cell.spec.units}
    settings.pop("learn_initial_state", None)
    return json.dumps(settings)
