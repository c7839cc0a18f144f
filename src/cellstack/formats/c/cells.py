"""The cells of the family as C: for each form of cell, a struct of weights and a step function.

The texts are templates: `$name` is the network's prefix, `$real` is float or double, `$f` is the suffix of literals and
of the functions of <math.h>. Equations: `cellstack.reference`.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from cellstack.nodes.recurrent import KIND_NAMES
from cellstack.spec import PARAMETERS, Activation, CellSpec

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
    "silu": """
static $real ${name}_silu($real z)
{
    return z / (1.0$f + exp$f(-z));
}
""",
    "gelu": """
static $real ${name}_gelu($real z)
{
    return z * (0.5$f + 0.5$f * erf$f(z * 0.70710678118654752$f));
}
""",
    "gelu_tanh": """
static $real ${name}_gelu_tanh($real z)
{
    return 0.5$f * z * (1.0$f + tanh$f(0.79788456080286536$f * (z + 0.044715$f * z * z * z)));
}
""",
    "selu": """
static $real ${name}_selu($real z)
{
    return 1.0507009873554805$f * (z > 0.0$f ? z : 1.6732632423543772$f * expm1$f(z));
}
""",
    "exponential": """
static $real ${name}_exponential($real z)
{
    return exp$f(z);
}
""",
    "relu6": """
static $real ${name}_relu6($real z)
{
    return z < 0.0$f ? 0.0$f : z > 6.0$f ? 6.0$f : z;
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
    "scaled_tanh": """
static $real ${name}_scaled_tanh($real z, $real alpha, $real beta)
{
    return alpha * tanh$f(beta * z);
}
""",
}
"""Helper functions in C; only those that are called are written."""

STEMS = {"lstm": "lstm", "gru": "gru", "rnn": "simple_rnn"}
WIDTHS = {"inputs": "I", "units": "H", "projected": "P"}


class Form(NamedTuple):
    """A form of cell: cells of one form share a function, regardless of their widths.

    `arrays` are the members of the struct that point to weights; `scratch` are the arguments after the state, each with
    its length in units of H.
    """

    text: str
    widths: tuple[str, ...]
    arrays: dict[str, str]
    scratch: dict[str, int]


def form_key(spec: CellSpec) -> str:
    """Return what identifies a form: every setting except the widths and the initial state."""
    apart = ("input_size", "units", "learn_initial_state")
    settings = {name: value for name, value in spec.settings.items() if name not in apart}
    return json.dumps({**settings, "proj_size": spec.proj_size > 0}, sort_keys=True)


def literal(value: float) -> str:
    """Return a number as a C literal, in a template."""
    return f"{float(value)!r}$f"


def activate(found: Activation, inner: str) -> str:
    """Return a C expression, as a template, that applies an activation, which may be one of `MORE_ACTIVATIONS`."""
    if found.name == "linear":
        return inner
    if found.name == "tanh":
        return f"tanh$f({inner})"
    given = [literal(value) for value in (found.alpha, found.beta)[: len(PARAMETERS.get(found.name, ()))]]
    return f"${{name}}_{found.name}({', '.join([inner, *given])})"


def form_of(spec: CellSpec, stem: str) -> Form:
    """Return the struct and the step function of `spec`'s form of cell.

    Args:
        spec: the cell.
        stem: the name of both, after the network's prefix.

    Returns:
        The form; its text is a template.
    """
    wide = f"{len(spec.gates)}H"
    height = "P" if spec.proj_size else "H"
    apart = spec.kind == "gru" and not spec.reset_after  # g multiplies r*h, the other gates h
    recurrent = {"recurrent_zr": "[H, 2H]", "recurrent_g": "[H, H]"} if apart else {}
    shapes = {
        "kernel": f"[I, {wide}]",
        "recurrent_kernel": f"[{height}, {wide}]",
        "bias": f"[2, {wide}]" if spec.kind == "gru" and not apart else f"[{wide}]",
        "peepholes": f"[{len(spec.gates) - 1}, H]",
        "projection": "[H, P]",
        "kernel_gain": f"[{wide}]",
        "recurrent_gain": f"[{wide}]",
        "cell_gain": "[H]",
        "cell_bias": "[H]",
    }
    arrays: dict[str, str] = {}
    for name in spec.shapes:
        if not name.startswith("initial_"):
            arrays |= recurrent if recurrent and name == "recurrent_kernel" else {name: shapes[name]}
    body, scratch = {"lstm": _lstm, "gru": _gru, "rnn": _simple_rnn}[spec.kind](spec)
    widths = ("inputs", "units", "projected") if spec.proj_size else ("inputs", "units")
    members = [(f"size_t {width};", WIDTHS[width]) for width in widths]
    members += [(f"const $real *{name};", shape) for name, shape in arrays.items()]
    cell = ", $real *c" if spec.kind == "lstm" else ""
    passed = "".join(f", $real *{name}" for name in scratch)
    state = f"h [{height}]" + (" and c [H]" if cell else "")
    lines = [
        "",
        f"/* {KIND_NAMES[spec.kind]}, gates {' '.join(spec.gates)}: a block of H columns each. */",
        f"struct ${{name}}_{stem} {{",
        *(f"    {member:<32} /* {shape} */" for member, shape in members),
        "};",
        "",
        f"/* {state} after x [I]; {' and '.join(f'{name} [{n}H]' for name, n in scratch.items())}: scratch. */",
        f"static void ${{name}}_{stem}_step(const struct ${{name}}_{stem} *w, const $real *x, $real *h{cell}{passed})",
        "{",
        *(f"    {line}" if line else "" for line in body),
        "}",
        "",
    ]
    return Form("\n".join(lines), widths, arrays, scratch)


def _gate(spec: CellSpec, slot: str, inner: str) -> str:
    """Return the expression of a gate, given its pre-activation."""
    if spec.clip is not None:
        inner = f"${{name}}_clip({inner}, {literal(spec.clip)})"
    return activate(spec.activations[spec.slots.index(slot)], inner)


def _kept(rate: float, before: str, new: str) -> str:
    """Return a unit's value after zoneout: at inference, the rate is the share of the old value that is kept."""
    return f"{literal(rate)} * {before} + {literal(1.0 - rate)} * {new}" if rate else new


def _at(block: int) -> str:
    """Return the index expression of unit j in a block of H."""
    return f"{block} * H + j" if block > 1 else "H + j" if block else "j"


def _sums(spec: CellSpec, height: str) -> tuple[list[str], dict[str, int]]:
    """Return the lines that compute z [G*H] from x and h in one sum, and the scratch that they need."""
    count = len(spec.gates)
    wide = f"{count} * H" if count > 1 else "H"
    if not spec.layer_norm:
        start = "memcpy(z, w->bias, {} * sizeof *z);" if spec.use_bias else "memset(z, 0, {} * sizeof *z);"
        return [
            start.format(wide),
            f"${{name}}_accumulate(z, {wide}, x, w->inputs, w->kernel);",
            f"${{name}}_accumulate(z, {wide}, h, {height}, w->recurrent_kernel);",
        ], {"z": count}
    bias = " + w->bias[j]" if spec.use_bias else ""
    epsilon = literal(spec.norm_epsilon)
    return [
        f"memset(z, 0, {wide} * sizeof *z);",
        f"memset(q, 0, {wide} * sizeof *q);",
        f"${{name}}_accumulate(z, {wide}, x, w->inputs, w->kernel);",
        f"${{name}}_accumulate(q, {wide}, h, {height}, w->recurrent_kernel);",
        f"${{name}}_normalise(z, {wide}, {epsilon});",
        f"${{name}}_normalise(q, {wide}, {epsilon});",
        f"for (size_t j = 0; j < {wide}; j++) {{",
        f"    z[j] = z[j] * w->kernel_gain[j] + q[j] * w->recurrent_gain[j]{bias};",
        "}",
    ], {"z": count, "q": count}


def _lstm(spec: CellSpec) -> tuple[list[str], dict[str, int]]:
    sums, scratch = _sums(spec, "P" if spec.proj_size else "H")
    blocks = {gate: f"z[{_at(n)}]" for n, gate in enumerate(spec.gates)}
    seeing = [gate for gate in spec.gates if gate != "g"] if spec.peepholes else []
    holes = {gate: f" + w->peepholes[{_at(n)}]" for n, gate in enumerate(seeing)}

    def gate(slot: str, cell: str) -> str:
        hole = f"{holes[slot]} * {cell}" if slot in holes else ""
        return f"    const $real {slot} = {_gate(spec, slot, blocks[slot] + hole)};"

    new = "f * c[j] + i * g"
    if spec.cell_clip is not None:
        new = f"${{name}}_clip({new}, {literal(spec.cell_clip)})"
    lines = [
        "const size_t H = w->units;",
        *(["const size_t P = w->projected;"] if spec.proj_size else []),
        "",
        *sums,
        "for (size_t j = 0; j < H; j++) {",
        gate("i", "c[j]"),
        "    const $real f = 1.0$f - i;" if spec.coupled else gate("f", "c[j]"),
        gate("g", "c[j]"),
        f"    const $real c_new = {new};",
        gate("o", "c_new"),
        f"    c[j] = {_kept(spec.zoneout_cell, 'c[j]', 'c_new')};",
    ]
    on_cell = spec.activations[spec.slots.index("cell")]
    last = "z[j]" if spec.proj_size else "h[j]"  # the projection reads it from the place of i
    share = 0.0 if spec.proj_size else spec.zoneout
    if spec.layer_norm:
        out = _kept(share, "h[j]", f"z[H + j] * {activate(on_cell, 'c_out')}")
        lines += [
            f"    z[j] = c_new; /* overwrites i and {'g' if spec.coupled else 'f'}, no longer needed */",
            "    z[H + j] = o;",
            "}",
            f"${{name}}_normalise(z, H, {literal(spec.norm_epsilon)});",
            "for (size_t j = 0; j < H; j++) {",
            "    const $real c_out = z[j] * w->cell_gain[j] + w->cell_bias[j];",
            f"    {last} = {out};",
            "}",
        ]
    else:
        out = _kept(share, "h[j]", f"o * {activate(on_cell, 'c_new')}")
        lines += [f"    {last} = {out};", "}"]
    if spec.proj_size:
        target = "z + H" if spec.zoneout else "h"
        lines += [f"memset({target}, 0, P * sizeof *h);", f"${{name}}_accumulate({target}, P, z, H, w->projection);"]
    if spec.proj_size and spec.zoneout:
        lines += ["for (size_t j = 0; j < P; j++) {", f"    h[j] = {_kept(spec.zoneout, 'h[j]', 'z[H + j]')};", "}"]
    return lines, scratch


def _gru(spec: CellSpec) -> tuple[list[str], dict[str, int]]:
    update = "z * h[j] + (1.0$f - z) * g"
    update = _kept(spec.zoneout, "h[j]", f"({update})" if spec.zoneout else update)
    if not spec.reset_after:
        start = "memcpy(a, w->bias, 3 * H * sizeof *a);" if spec.use_bias else "memset(a, 0, 3 * H * sizeof *a);"
        return [
            "const size_t H = w->units;",
            "",
            start,
            "${name}_accumulate(a, 3 * H, x, w->inputs, w->kernel);",
            "${name}_accumulate(a, 2 * H, h, H, w->recurrent_zr);",
            "for (size_t j = 0; j < H; j++) {",
            f"    const $real r = {_gate(spec, 'r', 'a[H + j]')};",
            "    q[j] = r * h[j];",
            "}",
            "${name}_accumulate(a + 2 * H, H, q, H, w->recurrent_g);",
            "for (size_t j = 0; j < H; j++) {",
            f"    const $real z = {_gate(spec, 'z', 'a[j]')};",
            f"    const $real g = {_gate(spec, 'g', 'a[2 * H + j]')};",
            f"    h[j] = {update};",
            "}",
        ], {"a": 3, "q": 1}
    lines = ["const size_t H = w->units;", ""]
    bias, norm = spec.use_bias, spec.layer_norm
    for array, source, rows, kernel, at in (
        ("a", "x", "w->inputs", "kernel", "w->bias"),
        ("q", "h", "H", "recurrent_kernel", "w->bias + 3 * H"),
    ):
        start = f"memcpy({array}, {at}, " if bias and not norm else f"memset({array}, 0, "
        lines += [
            f"{start}3 * H * sizeof *{array});",
            f"${{name}}_accumulate({array}, 3 * H, {source}, {rows}, w->{kernel});",
        ]
    if norm:  # g is normalised separately from z and r
        epsilon = literal(spec.norm_epsilon)
        for array in ("a", "q"):
            lines += [
                f"${{name}}_normalise({array}, 2 * H, {epsilon});",
                f"${{name}}_normalise({array} + 2 * H, H, {epsilon});",
            ]
        lines += [
            "for (size_t j = 0; j < 3 * H; j++) {",
            f"    a[j] = a[j] * w->kernel_gain[j]{' + w->bias[j]' if bias else ''};",
            f"    q[j] = q[j] * w->recurrent_gain[j]{' + w->bias[3 * H + j]' if bias else ''};",
            "}",
        ]
    lines += [
        "for (size_t j = 0; j < H; j++) {",
        f"    const $real z = {_gate(spec, 'z', 'a[j] + q[j]')};",
        f"    const $real r = {_gate(spec, 'r', 'a[H + j] + q[H + j]')};",
        f"    const $real g = {_gate(spec, 'g', 'a[2 * H + j] + r * q[2 * H + j]')};",
        f"    h[j] = {update};",
        "}",
    ]
    return lines, {"a": 3, "q": 3}


def _simple_rnn(spec: CellSpec) -> tuple[list[str], dict[str, int]]:
    sums, scratch = _sums(spec, "H")
    return [
        "const size_t H = w->units;",
        "",
        *sums,
        "for (size_t j = 0; j < H; j++) {",
        f"    h[j] = {_kept(spec.zoneout, 'h[j]', _gate(spec, 'g', 'z[j]'))};",
        "}",
    ], scratch
