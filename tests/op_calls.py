"""Helpers for tests of the op: random cells as its arguments, and runs of the op, the torch loop and the reference."""

from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from family import random_arrays, random_spec, random_state, resized
from kinds import named
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
    return op.run_op(op.OpCall(*g[:6], [op.CellCall(spec) for spec in g.specs], g.reverse, sequences, save))


def loop(g, sequences=True, save=True):
    """Run the torch loop."""
    functions = [[eager.function_of(activation) for activation in spec.activations] for spec in g.specs]
    return eager.run_eagerly(*g[:6], g.specs, functions, g.reverse, sequences, save)


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


FLAGS = named("flags")


def flagged(name, width=2, units=3):
    """Return the cell with this name in FLAGS."""
    return CellSpec(width, units, **FLAGS[name])
