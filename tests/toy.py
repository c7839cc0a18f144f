"""A kind of cell that only tests have: four states, zoneout of the first and third. The kernel doesn't have it."""

import sys
from typing import Any, NamedTuple

import numpy as np

import cellstack.formats.pytorch.ours
import cellstack.layers  # noqa: F401  # `register` changes what these have imported
from cellstack import native, reference
from cellstack.cells import KINDS
from cellstack.cells import spec as words
from cellstack.cells.arguments import BELOW_ONE, Argument
from cellstack.cells.base import Kind, product
from cellstack.cells.spec import GATES, STATES, TRACES


class ToyState(NamedTuple):
    h: Any
    c: Any
    n: Any
    m: Any


class ToyTrace(NamedTuple):
    i: Any
    f: Any
    g: Any
    q: Any
    o: Any
    n: Any
    c: Any
    m: Any
    h: Any


def toy_step(ops, spec, a, h, c, n, m):
    """An LSTM whose candidate is a product of two gates; n counts what was written, m opens the output gate."""
    sums = ops.split(ops.add(a, product(ops, spec, ops.dropped(h), "recurrent_kernel")), 5)
    i, f, g, q = (ops.gate(name, z) for name, z in zip("ifgq", sums[:4], strict=True))
    n = ops.record("n", ops.add(ops.mul(f, n), i))
    c = ops.add(ops.mul(f, c), ops.mul(i, ops.mul(g, q)))
    o = ops.gate("o", ops.add(sums[4], m))
    m = ops.add(ops.mul(f, m), ops.mul(ops.one_minus(f), q))
    h = ops.mul(ops.mul(o, ops.activation("cell", c)), ops.one_minus(ops.activation("count", n)))
    return (i, f, g, q, o), (h, c, n, m)


TOY = Kind(
    name="toy",
    title="Toy",
    gates={"i": "write", "f": "keep", "g": "candidate", "q": "candidate", "o": "output"},
    state=ToyState,
    trace=ToyTrace,
    step=toy_step,
    flags=(Argument("zoneout_cell", "float", 0.0, "the same as zoneout, for n.", BELOW_ONE),),
    outputs=("cell", "count"),
    memory="c",
    zoneout={"h": "zoneout", "n": "zoneout_cell"},
    update=lambda spec, gates: (gates["f"], gates["i"] * gates["g"] * gates["q"]),
    meanings={"c": "cell state", "n": "count: how much was written", "m": "mean of q"},
)


def register(monkeypatch):
    """Add the kind for one test."""
    for table, value in ((KINDS, TOY), (GATES, tuple(TOY.gates)), (STATES, ToyState), (TRACES, ToyTrace)):
        monkeypatch.setitem(table, "toy", value)
    known, modules = words.ARRAYS, list(sys.modules.values())
    for module in modules:
        if getattr(module, "ARRAYS", None) is known:
            monkeypatch.setattr(module, "ARRAYS", (*known, "initial_n", "initial_m"))


class NumPyOps:
    """See `cellstack.cells.base.Ops`; `seen` are the gates and states that the step records."""

    def __init__(self, spec, arrays):
        self.spec, self.arrays, self.seen = spec, arrays, {}

    def product(self, v, name, gates=slice(None)):
        return v @ self.arrays[name].reshape(len(v), -1, self.spec.units)[:, gates].reshape(len(v), -1)

    def weight(self, name, row=None):
        return self.arrays[name] if row is None else self.arrays[name][row]

    def norm(self, v, blocks=(1,)):
        parts = np.split(v, np.cumsum(blocks)[:-1] * self.spec.units)
        return np.concatenate([(p - p.mean()) / np.sqrt(p.var() + self.spec.norm_epsilon) for p in parts])

    def clip(self, v, bound):
        return v if bound is None else np.clip(v, -bound, bound)

    def activation(self, slot, v):
        name, alpha, beta = self.spec.activations[self.spec.slots.index(slot)]
        return reference.ACTIVATIONS[name][0](v, alpha, beta)

    def gate(self, name, z):
        return self.record(name, self.activation(name, self.clip(z, self.spec.clip)))

    def record(self, name, v):
        self.seen[name] = v
        return v

    add, mul = staticmethod(np.add), staticmethod(np.multiply)
    split, dropped = staticmethod(np.split), staticmethod(lambda h: h)
    one_minus = staticmethod(lambda v: 1.0 - v)


def evaluate(spec, arrays, x, before=None, mask=None, kept=None):
    """Run the toy over `x [B, T, I]`; return its gates and states at every step, and the states after the last.

    `kept`: masks `[B, T, H]` of zoneout by state, instead of the rates. At masked steps the gates are zero.
    """
    batch, steps, _ = x.shape
    fields = {name: np.zeros((batch, steps, spec.units)) for name in ToyTrace._fields}
    rates = {"h": spec.zoneout, "c": 0.0, "n": spec.zoneout_cell, "m": 0.0}
    last = [np.zeros((batch, spec.units)) for _ in rates]
    for row in range(batch):
        start = [np.zeros((1, spec.units))] * 4 if before is None else before
        learned = [arrays.get(f"initial_{name}", own[0]) for name, own in zip(rates, start, strict=True)]
        states = learned if before is None else [own[row] for own in before]
        for t in range(steps):
            seen = {}
            if mask is None or mask[row, t]:
                ops = NumPyOps(spec, arrays)
                new = toy_step(ops, spec, TOY.inputs(ops, spec, x[row, t]), *states)[1]
                shares = {**rates, **{name: own[row, t] for name, own in (kept or {}).items()}}
                shares = [shares[name] for name in rates]
                states = [k * old + (1 - k) * now for k, old, now in zip(shares, states, new, strict=True)]
                seen = ops.seen
            for name, value in {**seen, **dict(zip(rates, states, strict=True))}.items():
                fields[name][row, t] = value
        for end, own in zip(last, states, strict=True):
            end[row] = own
    return fields, ToyState(*last)


def run_without_kernel(monkeypatch):
    """Replace the kernel's forward pass by `evaluate`, for networks of one toy."""

    def weights(spec, arrays, element=None, copy=True):
        return spec, arrays

    def layer(weights, before=None, after=None, y=None, gates=None, states=None):
        return weights, before, after, y, gates, states

    def sequences(x, mask=None, reset=None, reverse=False):
        assert reset is None
        assert not reverse
        return x, mask

    def forward(sequences, layers, threads):
        (((spec, arrays), before, after, y, gates, states),), (x, mask) = layers, sequences
        fields, ends = evaluate(spec, arrays, x, before, mask)
        for into, end in zip(after, ends, strict=True):
            into[:] = end
        if y is not None:
            y[:] = fields["h"]
        if gates is not None:
            gates[:] = np.stack([fields[gate] for gate in TOY.gates], axis=2)
        for into, name in zip(states or (), ToyState._fields[1:], strict=False):
            into[:] = fields[name]

    def forward_each(runs, threads):
        for run in runs:
            forward(*run, threads)

    functions = {"weights": weights, "Layer": layer, "sequences": sequences, "forward": forward}
    for name, function in {**functions, "forward_each": forward_each}.items():
        monkeypatch.setattr(native, name, function)
