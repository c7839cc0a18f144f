"""The cells of the family as C: for each form of cell, a struct of weights and a step function.

The texts are templates: `$name` is the network's prefix, `$real` is float or double, `$f` is the suffix of literals and
of the functions of <math.h>. Equations: `cellstack.reference`.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np

from cellstack.cells.spec import MATRICES, CellSpec
from cellstack.formats.c.narrow import Narrow
from cellstack.formats.c.step import Matrix, Step, times
from cellstack.nodes.base import Array

HELPERS = {
    "accumulate": """
/* out [n] += v [m] . matrix [m, n] */
static void ${name}_accumulate($real *out, size_t n, const $real *v, size_t m, const $real *matrix)
{
    for (size_t k = 0; k < m; k++, matrix += n) {
        const $real factor = v[k];
        for (size_t j = 0; j < n; j++) {
            out[j] += factor * matrix[j];
        }
    }
}
""",
    "normalise": """
/* v [n] = (v - mean) / sqrt(variance + epsilon) */
static void ${name}_normalise($real *v, size_t n, $real epsilon)
{
    $real mean = 0.0$f, variance = 0.0$f, scale;
    for (size_t j = 0; j < n; j++) {
        mean += v[j];
    }
    mean /= ($real)n;
    for (size_t j = 0; j < n; j++) {
        v[j] -= mean;
        variance += v[j] * v[j];
    }
    scale = 1.0$f / sqrt$f(variance / ($real)n + epsilon);
    for (size_t j = 0; j < n; j++) {
        v[j] *= scale;
    }
}
""",
    "clip": """
static $real ${name}_clip($real z, $real bound)
{
    return z > bound ? bound : z < -bound ? -bound : z;
}
""",
    "softmax": """
/* v [n] = exp(v) / sum of exp(v), shifted by the largest so that nothing overflows */
static void ${name}_softmax($real *v, size_t n)
{
    $real largest = v[0], sum = 0.0$f;
    for (size_t j = 1; j < n; j++) {
        largest = v[j] > largest ? v[j] : largest;
    }
    for (size_t j = 0; j < n; j++) {
        v[j] = exp$f(v[j] - largest);
        sum += v[j];
    }
    for (size_t j = 0; j < n; j++) {
        v[j] /= sum;
    }
}
""",
    "log_softmax": """
/* v [n] = v - log(sum of exp(v)), shifted by the largest so that nothing overflows */
static void ${name}_log_softmax($real *v, size_t n)
{
    $real largest = v[0], sum = 0.0$f;
    for (size_t j = 1; j < n; j++) {
        largest = v[j] > largest ? v[j] : largest;
    }
    for (size_t j = 0; j < n; j++) {
        v[j] -= largest;
        sum += exp$f(v[j]);
    }
    sum = log$f(sum);
    for (size_t j = 0; j < n; j++) {
        v[j] -= sum;
    }
}
""",
    "weigh": """
/* Add value [n] to sum, weighted by exp(scores [m]), m = 1 or n; all is relative to the largest score so far */
static void ${name}_weigh($real *sum, size_t n, const $real *value, const $real *scores, size_t m,
    $real *largest, $real *total)
{
    for (size_t j = 0; j < m; j++) {
        const $real next = scores[j] <= largest[j] ? largest[j] : scores[j];
        const $real kept = exp$f(largest[j] - next), weight = exp$f(scores[j] - next);
        largest[j] = next;
        total[j] = total[j] * kept + weight;
        for (size_t k = j; k < n; k += m) {
            sum[k] = sum[k] * kept + weight * value[k];
        }
    }
}
""",
    "gelu": """
static $real ${name}_gelu($real z)
{
    return z * (0.5$f + 0.5$f * erf$f(z * 0.70710678118654752$f));
}
""",
    "sigmoid": """
static $real ${name}_sigmoid($real z)
{
    const $real e = exp$f(-fabs$f(z)); /* at most 1 */
    return (z < 0.0$f ? e : 1.0$f) / (1.0$f + e);
}
""",
    "relu": """
static $real ${name}_relu($real z)
{
    return z <= 0.0$f ? 0.0$f : z;
}
""",
    "hard_sigmoid": """
static $real ${name}_hard_sigmoid($real z, $real alpha, $real beta)
{
    const $real y = alpha * z + beta;
    return y < 0.0$f ? 0.0$f : y > 1.0$f ? 1.0$f : y;
}
""",
    "softsign": """
static $real ${name}_softsign($real z)
{
    return z / (1.0$f + fabs$f(z));
}
""",
    "maximum": """
static $real ${name}_maximum($real a, $real b)
{
    return a > b ? a : b;
}
""",
    "softplus": """
static $real ${name}_softplus($real z)
{
    return (z > 0.0$f ? z : 0.0$f) + log1p$f(exp$f(-fabs$f(z)));
}
""",
    "elu": """
static $real ${name}_elu($real z, $real alpha)
{
    return z > 0.0$f ? z : alpha * expm1$f(z);
}
""",
    "affine": """
static $real ${name}_affine($real z, $real alpha, $real beta)
{
    return alpha * z + beta;
}
""",
    "leaky_relu": """
static $real ${name}_leaky_relu($real z, $real alpha)
{
    return z > 0.0$f ? z : alpha * z;
}
""",
    "thresholded_relu": """
static $real ${name}_thresholded_relu($real z, $real alpha)
{
    return z <= alpha ? 0.0$f : z;
}
""",
    "positive": """
static $real ${name}_positive($real z)
{
    const $real e = z < 0.0$f ? exp$f(z) : 0.0$f;
    return z < 0.0$f ? e / (1.0$f + e) : z + 0.5$f;
}
""",
    "scaled_tanh": """
static $real ${name}_scaled_tanh($real z, $real alpha, $real beta)
{
    return alpha * tanh$f(beta * z);
}
""",
    "memory_step": """
/* A step of an mLSTM's memory: C [heads, keys, values], n [heads, keys] and m [heads] after x; h [heads, values].
 * x is q [heads, keys], k [heads, keys], v [heads, values], and the input and forget gates [heads] each. */
static void ${name}_memory_step(size_t heads, size_t keys, size_t values, $real epsilon, const $real *x,
                                $real *C, $real *n, $real *m, $real *h)
{
    const $real *q = x, *k = q + heads * keys, *v = k + heads * keys, *gates = v + heads * values;
    for (size_t head = 0; head < heads; head++) {
        const $real kept = m[head] - ${name}_softplus(-gates[heads + head]), added = gates[head];
        const $real larger = kept > added ? kept : added;
        const $real f = exp$f(kept - larger), i = exp$f(added - larger), least = exp$f(-larger);
        const $real scale = i / sqrt$f(($real)keys);
        $real sum = 0.0$f;
        for (size_t c = 0; c < values; c++) {
            h[c] = 0.0$f;
        }
        for (size_t r = 0; r < keys; r++, C += values) {
            const $real key = scale * k[r];
            n[r] = f * n[r] + key;
            sum += n[r] * q[r];
            for (size_t c = 0; c < values; c++) {
                C[c] = f * C[c] + key * v[c];
                h[c] += q[r] * C[c];
            }
        }
        sum = fabs$f(sum);
        sum = (sum < least ? least : sum) + epsilon;
        for (size_t c = 0; c < values; c++) {
            h[c] /= sum;
        }
        m[head] = larger;
        q += keys, k += keys, v += values, n += keys, h += values;
    }
}
""",
}
"""Helper functions in C; only those that are called are written."""

WIDTHS = {"inputs": "I", "units": "H", "projected": "P", "backbone": "U"}


class Form(NamedTuple):
    """A form of cell: cells of one form share a function, regardless of their widths.

    `arrays` are the members of the struct that point to weights: each is one of the cell's arrays, or columns of one.
    `scratch` is the length of the function's last argument: how many times H, and how many times U.
    """

    text: str
    widths: tuple[str, ...]
    arrays: dict[str, Matrix]
    scratch: tuple[int, int]


def form_key(spec: CellSpec) -> str:
    """Return what identifies a form: every setting except the widths and the initial state."""
    apart = ("input_size", "units", "learn_initial_state")
    settings = {name: value for name, value in spec.settings.items() if name not in apart}
    some = {"proj_size": spec.proj_size > 0, "backbone_units": spec.backbone_units > 0}
    return json.dumps({**settings, **some}, sort_keys=True)


def form_of(spec: CellSpec, stem: str, narrow: Narrow | None) -> Form:
    """Return the struct and the step function of `spec`'s form of cell.

    Args:
        spec: the cell.
        stem: the name of both, after the network's prefix.
        narrow: the format of the matrices; None: that of the other arrays.

    Returns:
        The form; its text is a template.
    """
    step = Step(spec, narrow)
    height = {name: "P" if name == "h" and spec.proj_size else "H" for name in spec.state_sizes}
    arrays: dict[str, Matrix] = {}
    for name in spec.shapes:
        if not name.startswith("initial_"):
            parts = [matrix for matrix in step.matrices if matrix.array == name] or [Matrix(name, None)]
            arrays |= {matrix.name: matrix for matrix in parts}
    some = {"projected": spec.proj_size, "backbone": spec.backbone_units}
    widths = ("inputs", "units", *(width for width, size in some.items() if size))
    members = [(f"size_t {width};", WIDTHS[width]) for width in widths]
    for name, matrix in arrays.items():
        shape = shape_text(spec, matrix)
        if narrow and matrix.array in MATRICES:
            rows, columns = shape[1:-1].split(", ")
            shapes = (f"[{columns}, {rows}]", f"[{columns}]")
            members += [
                (f"const {type_} *{member};", its)
                for (type_, member), its in zip(narrow.members(name), shapes, strict=False)
            ]
        else:
            members.append((f"const $real *{name};", shape))
    passed = "".join(f", $real *{name}" for name in (*spec.state_sizes, "scratch"))
    passed += f", {narrow.row} *row" if narrow else ""
    state = " and ".join(f"{name} [{letter}]" for name, letter in height.items())
    lengths = step.lengths(step.scratch.values())
    scratch = " + ".join(f"{count}{letter}" for count, letter in lengths if count)
    heads = f", in {spec.heads} heads of D = H / {spec.heads}" if spec.heads > 1 else ""
    lines = [
        "",
        f"/* {spec.of_kind.title}, gates {' '.join(spec.gates)}: a block of H columns each{heads}. */",
        f"struct ${{name}}_{stem} {{",
        *(f"    {member:<32} /* {shape} */" for member, shape in members),
        "};",
        "",
        f"/* {state} after x [{'I + 1' if spec.scalar else 'I'}]; scratch [{scratch}]. */",
        f"static void ${{name}}_{stem}_step(const struct ${{name}}_{stem} *w, const $real *x{passed})",
        "{",
        *(f"    {line}" if line else "" for line in step.lines),
        "}",
        "",
    ]
    return Form("\n".join(lines), widths, arrays, (lengths[0][0], lengths[1][0]))


def by_gate(matrices: Array, spec: CellSpec, gates: tuple[int, int] | None) -> Array:
    """Return a recurrent kernel of heads with a matrix for each gate and head, `[gates, heads, H/heads, H/heads]`."""
    parts = matrices.reshape(*matrices.shape[:2], len(spec.gates), -1).transpose(2, 0, 1, 3)
    return np.ascontiguousarray(parts[slice(*gates) if gates else slice(None)])


def shape_text(spec: CellSpec, matrix: Matrix) -> str:
    """Return the shape of one of a cell's arrays in terms of its widths, such as `[I, 4H]`."""
    *rows, (count, letter) = spec.axes[matrix.array]
    if len(rows) == 2:
        first, end = matrix.gates or (0, len(spec.gates))
        return f"[{end - first}, {spec.heads}, D, D]"
    if matrix.gates is not None:
        count = matrix.gates[1] - matrix.gates[0]
    axes = (times(*axis).replace(" * ", "") if axis[1] else str(axis[0]) for axis in (*rows, (count, letter)))
    return f"[{', '.join(axes)}]"
