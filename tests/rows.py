"""Parts of a second version of the equations: one row, plain Python numbers, entry by entry.

`kinds.py` has the step of each kind, `kernel/test_reference.py` compares them with the reference.
"""

import math
import statistics

from cellstack.cells.activations import OF_BACKBONES, activation

SCALARS = {
    "sigmoid": lambda z, a, b: 1.0 / (1.0 + math.exp(-z)),
    "tanh": lambda z, a, b: math.tanh(z),
    "linear": lambda z, a, b: z,
    "relu": lambda z, a, b: max(z, 0.0),
    "hard_sigmoid": lambda z, a, b: min(max(a * z + b, 0.0), 1.0),
    "softsign": lambda z, a, b: z / (1.0 + abs(z)),
    "softplus": lambda z, a, b: math.log1p(math.exp(z)),
    "elu": lambda z, a, b: z if z > 0.0 else a * (math.exp(z) - 1.0),
    "affine": lambda z, a, b: a * z + b,
    "leaky_relu": lambda z, a, b: z if z > 0.0 else a * z,
    "thresholded_relu": lambda z, a, b: z if z > a else 0.0,
    "scaled_tanh": lambda z, a, b: a * math.tanh(b * z),
    "positive": lambda z, a, b: z + 0.5 if z >= 0.0 else 1.0 / (1.0 + math.exp(-z)),
    "silu": lambda z, a, b: z / (1.0 + math.exp(-z)),
    "gelu": lambda z, a, b: 0.5 * z * math.erfc(-z * math.sqrt(0.5)),
}


def activated(spec, slot, z, clip=True):
    usual = getattr(spec, spec.of_kind.activation(slot))
    name, a, b = activation(dict(spec.gate_activations).get(slot, usual), OF_BACKBONES)
    if clip and spec.clip is not None:
        z = min(max(z, -spec.clip), spec.clip)
    return SCALARS[name](z, a, b)


def times(row, matrix):
    return [math.fsum(v * matrix[k, n] for k, v in enumerate(row)) for n in range(matrix.shape[1])]


def times_heads(spec, row, matrices, first=0):
    """Return the product of a row with a recurrent kernel, from its gate `first` on."""
    if spec.heads == 1:
        return times(row, matrices[:, first * spec.units :])
    size = spec.units // spec.heads
    out = []
    for gate in range(first, len(spec.gates)):
        for head, matrix in enumerate(matrices):
            out += times(row[head * size : (head + 1) * size], matrix[:, gate * size : (gate + 1) * size])
    return out


def normalised(row, gain, epsilon):
    mean, variance = statistics.fmean(row), statistics.pvariance(row)
    return [(v - mean) / math.sqrt(variance + epsilon) * g for v, g in zip(row, gain, strict=True)]


def sums_row(spec, w, x, h_in):
    """Return the pre-activations of kinds that add the two products."""
    a, b = times(x, w["kernel"]), times_heads(spec, h_in, w["recurrent_kernel"])
    if spec.layer_norm is True:
        a, b = normalised(a, w["kernel_gain"], spec.norm_epsilon), normalised(b, w["recurrent_gain"], spec.norm_epsilon)
    z = [a[n] + b[n] for n in range(len(a))]
    if spec.layer_norm == "joint":
        z = normalised(z, w["kernel_gain"], spec.norm_epsilon)
    return [v + shift for v, shift in zip(z, w["bias"] if spec.use_bias else [0.0] * len(z), strict=True)]


def row_of_x(spec, w, x):
    """Return the pre-activations of a kind without a recurrent product, for each gate."""
    a = times(x, w["kernel"])
    if spec.layer_norm:
        a = normalised(a, w["kernel_gain"], spec.norm_epsilon)
    a = [v + shift for v, shift in zip(a, w["bias"] if spec.use_bias else [0.0] * len(a), strict=True)]
    return [a[n : n + spec.units] for n in range(0, len(a), spec.units)]
