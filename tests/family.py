"""Random cells, with arrays, states and inputs, all in float64."""

from dataclasses import replace

import numpy as np
from kinds import TESTED, chosen

from cellstack.cells import KINDS
from cellstack.cells.activations import ACTIVATIONS, OF_BACKBONES, PARAMETERS
from cellstack.cells.spec import GATES, CellSpec

ALPHAS = {
    "hard_sigmoid": (0.15, 0.35),
    "elu": (0.5, 1.5),
    "affine": (-0.8, 0.8),
    "leaky_relu": (0.05, 0.5),
    "thresholded_relu": (-0.3, 0.3),
    "scaled_tanh": (0.5, 1.5),
}
POSITIVE = ("sigmoid", "softplus")
CONTINUOUS = tuple(name for name in ACTIVATIONS if name != "thresholded_relu")  # at a jump, rounding decides
BOUNDED = ("sigmoid", "tanh", "hard_sigmoid", "softsign", "scaled_tanh")
BETAS = {"hard_sigmoid": (0.3, 0.6), "affine": (-0.3, 0.3), "scaled_tanh": (0.5, 1.5)}


def random_activation(rng, names=ACTIVATIONS):
    """Return the text of a random activation, with random parameters half of the time."""
    name = str(rng.choice(names))
    ranges = (ALPHAS.get(name), BETAS.get(name))[: len(PARAMETERS.get(name, ()))]
    if not ranges or rng.random() < 0.5:
        return name
    return f"{name}({', '.join(str(round(rng.uniform(*bounds), 2)) for bounds in ranges)})"


def random_spec(rng, kind=None, largest=8):
    """Return a random valid cell: every flag of its kind is set independently, about one time in three.

    Gates that multiply unbounded values are bounded, so that float32 can be compared with float64; gates whose sum
    divides are positive.
    """
    kind = chosen(rng) if kind is None else kind
    declared, tested = KINDS[kind], TESTED[kind]
    often = lambda share: bool(rng.random() < share)  # noqa: E731
    units = int(rng.integers(1, largest + 1))
    flags = {
        "activation": random_activation(rng, BOUNDED if tested.bounded else CONTINUOUS),
        "recurrent_activation": random_activation(
            rng, POSITIVE if tested.positive else ("sigmoid", "sigmoid", "hard_sigmoid", "scaled_tanh")
        ),
        "use_bias": often(0.8),
        "layer_norm": often(0.3),
        "norm_epsilon": float(rng.choice([1e-3, 1e-2, 1e-1])),
        "clip": round(rng.uniform(0.3, 1.5), 2) if often(0.3) else None,
        "zoneout": round(rng.uniform(0.1, 0.6), 2) if often(0.3) else 0.0,
        "learn_initial_state": often(0.4),
    }
    flags |= tested.drawn(rng, often, units, largest)
    flags = {name: value for name, value in flags.items() if name in declared.settings}
    if flags.get("layer_norm") and "reset_after" in flags:
        flags["reset_after"] = True
    if flags.get("backbone_units") and often(0.5):
        flags["backbone_activation"] = random_activation(rng, OF_BACKBONES)
    if flags.get("layer_norm") and declared.joins and often(0.5):
        flags["layer_norm"] = "joint"
    if often(0.3):
        slots = [gate for gate in GATES[kind] if not (gate == "f" and flags.get("coupled"))]
        slots = [gate for gate in slots if gate not in declared.fixed]
        slot = str(rng.choice([*slots, *declared.outputs]))
        candidate = declared.activation(slot) == "activation"
        tame = candidate or (
            bool(declared.outputs) and declared.has_recurrent_kernel and flags["activation"].startswith(BOUNDED)
        )
        bounded = POSITIVE if tested.positive else BOUNDED
        flags["gate_activations"] = {slot: random_activation(rng, CONTINUOUS if tame else bounded)}
    width = int(rng.integers(1, largest + 1)) + flags.get(declared.scalar, False)
    heads = int(rng.choice([n for n in range(1, units + 1) if units % n == 0]))
    if declared.has_recurrent_kernel and not flags.get("proj_size") and not flags.get("backbone_units") and often(0.4):
        flags["heads"] = heads
    return CellSpec(width, units, kind=kind, **flags)


def resized(spec, width):
    """Return the cell with another input width; without its scalar where x has a single column."""
    scalar = {} if width > 1 or not spec.scalar else {spec.of_kind.scalar: False}
    return replace(spec, input_size=width, **scalar)


def learned(kind):
    """Return the flag of a learned initial state, if the kind has it."""
    return {"learn_initial_state": True} if "learn_initial_state" in KINDS[kind].settings else {}


def random_arrays(rng, spec):
    """Return random arrays of the cell, by name; all numbers differ, and gains are near 1."""
    scales = {"kernel": spec.features**-0.5, "recurrent_kernel": 0.7 * spec.output_size**-0.5}
    scales |= {"projection": spec.units**-0.5, "gate_kernel": max(spec.backbone_units, 1) ** -0.5}
    scales["backbone_kernel"] = scales["gate_kernel"]
    return {
        name: name.endswith("_gain") * 1.0 + scales.get(name, 0.4) * rng.standard_normal(shape)
        for name, shape in spec.shapes.items()
    }


def random_state(rng, spec, batch):
    """Return a random state, an array for each name in `spec.state_sizes`."""
    state = {name: 0.5 * rng.standard_normal((batch, size)) for name, size in spec.state_sizes.items()}
    if "n" in state:  # a sum of positive weights, here at least 0.5; 0: nothing is stored yet
        state["n"] = np.where(rng.random(state["n"].shape) < 0.2, 0.0, 0.5 + np.abs(state["n"]))
    return tuple(state.values())


def random_case(rng, spec, batch=3, steps=5):
    """Return random arguments of `reference.forward` after the cell and its arrays, by name.

    State, mask, reset, recurrent dropout and the masks of zoneout (if the cell has a rate) are each None half of the
    time; reverse is True half of the time.
    """
    there = lambda: bool(rng.random() < 0.5)  # noqa: E731
    x = rng.standard_normal((batch, steps, spec.input_size))
    if spec.scalar:
        x[..., -1] = rng.random((batch, steps))
    training = there()
    kept = lambda rate, width: rng.random((batch, steps, width)) < rate  # noqa: E731
    return {
        "x": x,
        "state": random_state(rng, spec, batch) if there() else None,
        "mask": rng.random((batch, steps)) < 0.7 if there() else None,
        "reset": rng.random((batch, steps)) < 0.25 if there() else None,
        "recurrent_dropout": (rng.random((batch, spec.output_size)) < 0.6) / 0.6 if there() else None,
        "zoneout": kept(spec.zoneout, spec.output_size) * 1.0 if training and spec.zoneout else None,
        "zoneout_cell": kept(spec.zoneout_cell, spec.units) * 1.0 if training and spec.zoneout_cell else None,
        "reverse": there(),
    }
