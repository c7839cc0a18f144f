"""Helpers for tests of the op: random cells as its arguments, and runs of the op, the torch loop and the reference."""

from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from family import random_arrays, random_spec, random_state, resized
from torch import Tensor

from cellstack import reference
from cellstack.cells.spec import GATES, CellSpec
from cellstack.layers import eager, op


class Given(NamedTuple):
    """Arguments of the op, up to `reset`, and the specs of the cells."""

    x: Tensor
    starts: list[Tensor]
    weights: list[Tensor]
    drops: list[Tensor]
    mask: Tensor | None
    reset: Tensor | None
    specs: list[CellSpec]
    reverse: bool

    @property
    def leaves(self):
        """The tensors that can require gradients."""
        return [self.x, *self.starts, *self.weights]


def tensor(array, dtype=torch.float64):
    return torch.tensor(np.asarray(array), dtype=dtype)


CHOICES = ("started", "masked", "resets", "dropped", "zoned", "reverse")


def given(specs, seed=0, dtype=torch.float64, grad=True, batch=3, steps=4, **choices):
    """Return random arguments for a stack. `choices` sets some of CHOICES by name; the others are random."""
    rng = np.random.default_rng(seed)
    there = {name: choices.get(name, bool(rng.integers(2))) for name in CHOICES}
    drops = []
    for spec in specs:
        drops.append((rng.random((batch, spec.output_size)) < 0.5) * 2.0 if there["dropped"] else [])
        for state in spec.of_kind.zoneout:
            shape, zoned = (batch, steps, spec.state_sizes[state]), there["zoned"] and spec.zoneout_rates[state]
            drops.append((rng.random(shape) < 0.4) * 1.0 if zoned else [])
    found = Given(
        tensor(rng.standard_normal((batch, steps, specs[0].input_size)), dtype),
        [tensor(part, dtype) for spec in specs for part in random_state(rng, spec, batch)] if there["started"] else [],
        [tensor(part, dtype) for spec in specs for part in random_arrays(rng, spec).values()],
        [tensor(drop, dtype) for drop in drops] if there["dropped"] or there["zoned"] else [],
        torch.tensor(rng.random((batch, steps)) < 0.7) if there["masked"] else None,
        torch.tensor(rng.random((batch, steps)) < 0.3) if there["resets"] else None,
        list(specs),
        there["reverse"],
    )
    for leaf in found.leaves:
        leaf.requires_grad_(grad)
    return found


def stack(seed, kind=None, largest=6):
    """Return one to three random cells, each with the input size that the cell below it has as output size."""
    rng = np.random.default_rng(seed)
    specs = [random_spec(rng, kind, largest) for _ in range(rng.integers(1, 4))]
    for n, below in enumerate(specs[:-1]):
        specs[n + 1] = resized(specs[n + 1], below.output_size)
    return specs


def fused(g, sequences=True, save=True):
    """Run the op on its fast path."""
    return op.run(op.Call(*g[:6], [op.CellCall(spec) for spec in g.specs], g.reverse, sequences, save))


def loop(g, sequences=True, save=True):
    """Run the torch loop."""
    functions = [[eager.function_of(activation) for activation in spec.activations] for spec in g.specs]
    return eager.run(*g[:6], g.specs, functions, g.reverse, sequences, save)


def split(g, out):
    """Split the results of a run with save into states (tuples), ys, gates and the other states at every step."""
    states, saved = op.by_layer(g.specs, out)
    return states, *(list(of) for of in list(zip(*saved, strict=True))[:3])


def differentiable(g, out):
    """Return the differentiable results of a run with save: no intermediate values, no product in a GRU's gates."""
    states, ys, gates, inner = split(g, out)
    gates = [t[:, :, : len(GATES[spec.kind])] for spec, t in zip(g.specs, gates, strict=True)]
    flat = [*(part for of in states for part in of), *ys, *gates, *(part for of in inner for part in of)]
    return [t for t in flat if t.requires_grad]


def numbers(t):
    """Return a tensor as a float64 array; None if it is empty."""
    return t.detach().double().numpy() if t.numel() else None


def by_reference(g, dy=None, dstates=None):
    """Run the reference: a `Forward` per layer; with `dy` of the top layer, also the gradients of `g.leaves`."""
    weights, starts = ([t.detach().double().numpy() for t in group] for group in (g.weights, g.starts))
    left, begin, drops = iter(weights), iter(starts), iter(g.drops)
    value, cells, outs = g.x.detach().double().numpy(), [], []
    for spec in g.specs:
        cells.append((spec, dict(zip(spec.shapes, islice(left, len(spec.shapes)), strict=True))))
        masks = {name: numbers(drop) for name, drop in zip(spec.of_kind.masks, drops, strict=False)}
        flags = {name: None if t is None else t.numpy() for name, t in (("mask", g.mask), ("reset", g.reset))}
        state = tuple(islice(begin, len(spec.state_sizes))) if starts else None
        outs.append(reference.forward(*cells[-1], value, state, **flags, **masks, reverse=g.reverse))
        value = outs[-1].y
    if dy is None:
        return outs
    gradients = []
    for cell, out, dstate in reversed(list(zip(cells, outs, dstates or [None] * len(cells), strict=True))):
        gradients.insert(0, reference.backward(*cell, out, dy=dy, dstate=dstate))
        dy = gradients[0].x
    of_starts = [part for found in gradients for part in found.state] if starts else []
    return outs, [dy, *of_starts, *(part for found in gradients for part in found.arrays.values())]


def furthest(got, wanted):
    """Return the largest difference of two lists of arrays, relative to the largest entry above 1 of each array."""
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        a, b = (np.asarray(t.detach() if isinstance(t, Tensor) else t, np.float64) for t in (a, b))
        assert a.shape == b.shape
        if a.size:
            worst = max(worst, np.abs(a - b).max() / max(1.0, np.abs(b).max()))
    return worst


# One cell for every flag, each with a distinct effect on every result.
FLAGS = {
    "lstm": {},
    "lstm, no bias": {"use_bias": False},
    "lstm, peepholes": {"peepholes": True},
    "lstm, coupled": {"coupled": True},
    "lstm, coupled with peepholes": {"coupled": True, "peepholes": True},
    "lstm, projection": {"proj_size": 2},
    "lstm, layer norm": {"layer_norm": True},
    "lstm, clip": {"clip": 0.3},
    "lstm, cell clip": {"cell_clip": 0.2},
    "lstm, zoneout": {"zoneout": 0.3},
    "lstm, zoneout of c": {"zoneout_cell": 0.3},
    "lstm, activations": {"gate_activations": {"i": "tanh", "f": "softsign", "o": "hard_sigmoid", "cell": "elu(0.5)"}},
    "lstm, learned start": {"learn_initial_state": True},
    "lstm, all": {
        "peepholes": True,
        "coupled": True,
        "proj_size": 2,
        "layer_norm": True,
        "norm_epsilon": 1e-2,  # a smaller one would amplify rounding errors for rows near zero
        "clip": 1.1,
        "cell_clip": 0.9,
        "zoneout": 0.2,
        "zoneout_cell": 0.3,
        "gate_activations": {"cell": "scaled_tanh(1.2, 0.7)"},
        "learn_initial_state": True,
    },
    "gru": {"kind": "gru"},
    "gru, no bias": {"kind": "gru", "use_bias": False},
    "gru, reset before": {"kind": "gru", "reset_after": False},
    "gru, reset before, no bias": {"kind": "gru", "reset_after": False, "use_bias": False},
    "gru, layer norm": {"kind": "gru", "layer_norm": True},
    "gru, attention": {"kind": "gru", "attention": True},
    "gru, clip": {"kind": "gru", "clip": 0.3},
    "gru, zoneout": {"kind": "gru", "zoneout": 0.3},
    "gru, activations": {"kind": "gru", "gate_activations": {"z": "hard_sigmoid", "r": "tanh", "g": "softplus"}},
    "gru, learned start": {"kind": "gru", "learn_initial_state": True},
    "rnn": {"kind": "rnn"},
    "rnn, no bias": {"kind": "rnn", "use_bias": False},
    "rnn, layer norm": {"kind": "rnn", "layer_norm": True},
    "rnn, joint layer norm": {"kind": "rnn", "layer_norm": "joint"},
    "rnn, clip": {"kind": "rnn", "clip": 0.3},
    "rnn, zoneout": {"kind": "rnn", "zoneout": 0.3},
    "rnn, activation": {"kind": "rnn", "activation": "leaky_relu(0.3)"},
    "rnn, learned start": {"kind": "rnn", "learn_initial_state": True},
    "mingru": {"kind": "mingru"},
    "mingru, no bias": {"kind": "mingru", "use_bias": False},
    "mingru, layer norm": {"kind": "mingru", "layer_norm": True},
    "mingru, clip": {"kind": "mingru", "clip": 0.3},
    "mingru, zoneout": {"kind": "mingru", "zoneout": 0.3},
    "mingru, activations": {"kind": "mingru", "gate_activations": {"z": "hard_sigmoid", "g": "tanh"}},
    "mingru, learned start": {"kind": "mingru", "learn_initial_state": True},
    "minlstm": {"kind": "minlstm"},
    "minlstm, no bias": {"kind": "minlstm", "use_bias": False},
    "minlstm, layer norm": {"kind": "minlstm", "layer_norm": True},
    "minlstm, clip": {"kind": "minlstm", "clip": 0.3},
    "minlstm, zoneout": {"kind": "minlstm", "zoneout": 0.3},
    "minlstm, activations": {"kind": "minlstm", "gate_activations": {"f": "softplus", "g": "tanh"}},
    "minlstm, learned start": {"kind": "minlstm", "learn_initial_state": True},
    "lstm, joint layer norm": {"layer_norm": "joint"},
    "ligru": {"kind": "ligru"},
    "ligru, no bias": {"kind": "ligru", "use_bias": False},
    "ligru, layer norm": {"kind": "ligru", "layer_norm": True},
    "ligru, joint layer norm": {"kind": "ligru", "layer_norm": "joint"},
    "ligru, clip": {"kind": "ligru", "clip": 0.3},
    "ligru, zoneout": {"kind": "ligru", "zoneout": 0.3},
    "ligru, activations": {"kind": "ligru", "gate_activations": {"z": "hard_sigmoid", "g": "tanh"}},
    "ligru, learned start": {"kind": "ligru", "learn_initial_state": True},
    "cfc": {"kind": "cfc"},
    "cfc, no bias": {"kind": "cfc", "use_bias": False},
    "cfc, timespans": {"kind": "cfc", "timespans": True},
    "cfc, no gate": {"kind": "cfc", "mode": "no_gate"},
    "cfc, layer norm": {"kind": "cfc", "layer_norm": True},
    "cfc, joint layer norm": {"kind": "cfc", "layer_norm": "joint", "timespans": True},
    "cfc, backbone": {"kind": "cfc", "backbone_units": 5, "timespans": True},
    "cfc, clip": {"kind": "cfc", "clip": 0.3},
    "cfc, zoneout": {"kind": "cfc", "zoneout": 0.3},
    "cfc, activations": {"kind": "cfc", "gate_activations": {"g": "softsign", "t": "hard_sigmoid"}},
    "cfc, learned start": {"kind": "cfc", "learn_initial_state": True},
    "slstm": {"kind": "slstm"},
    "slstm, no bias": {"kind": "slstm", "use_bias": False},
    "slstm, exponential forget": {"kind": "slstm", "exponential_forget": True},
    "slstm, zoneout": {"kind": "slstm", "zoneout": 0.3},
    "slstm, activations": {"kind": "slstm", "gate_activations": {"g": "softsign", "o": "hard_sigmoid"}},
}


def flagged(name, width=2, units=3):
    """Return the cell with this name in FLAGS."""
    return CellSpec(width, units, **FLAGS[name])
