"""Matrices in int8 or bfloat16 in C: their numbers, and functions that compute the bits of the kernel's streams.

The order of sums, the roundings and the fused multiply-adds are those of kernel/narrow.h and kernel/vec.h: two chains
per unit and gate, over x and over h. Other arrays remain float32, as in a stream.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.bfloat16 import rounded
from cellstack.network import Network
from cellstack.nodes.base import Array
from cellstack.nodes.cell_arrays import WEIGHTS, check_narrow
from cellstack.nodes.checks import check_choice
from cellstack.nodes.dense import Dense


class Narrow(NamedTuple):
    """A format: the C types of its weights and of a vector that is multiplied by them, and its functions."""

    name: str
    weights: str
    row: str
    bytes_each: int  # of a weight
    scaled: bool  # whether each column has a scale; then a row has as many bytes as numbers
    helpers: dict[str, str]

    def members(self, name: str) -> list[tuple[str, str]]:
        """Return the arrays of a matrix: the C type and the name of each."""
        return [(self.weights, name), *([("float", f"{name}_scales")] if self.scaled else [])]

    def columns(self, matrix: Array) -> tuple[list[list[str]], Array | None]:
        """Return the numbers of each column of a matrix `[m, n]` as C, and the scales `[n]` if the format has them."""
        if self.scaled:
            numbers, scales = quantised(matrix)
            return [[str(number) for number in column] for column in numbers.T.tolist()], scales
        bits = rounded(np.ascontiguousarray(matrix.T, np.float32))
        return [[f"0x{number:04x}" for number in column] for column in bits.tolist()], None


def quantised(matrix: Array) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return a matrix as integers from -127 to 127, and the scale of each column; NaN if a number in it isn't finite.

    Args:
        matrix: `[m, n]`, float32.

    Returns:
        `[m, n]` and `[n]`.

    >>> quantised(np.array([[1, 0], [-2, 0]], np.float32))[0].tolist()
    [[64, 0], [-127, 0]]
    """
    with np.errstate(all="ignore"):
        scales = np.abs(matrix).max(axis=0, initial=0.0) / np.float32(127)
        check = (matrix * np.float32(0)).sum(axis=0)
        some = (scales > 0) & (check == 0)
        steps = np.rint(matrix / np.where(some, scales, np.float32(1)))
    return np.where(some, steps, 0).astype(np.int8), np.where(check == 0, scales, np.float32(np.nan))


def format_of(network: Network, weights: str | None) -> Narrow | None:
    """Return the format of the matrices; None: that of the other arrays.

    Args:
        network: the network.
        weights: one of `WEIGHTS`; None: as the network stores them.

    Raises:
        ValueError: an unknown format; int8 with so many features or units that integer sums could overflow.
        TypeError: a narrow format for a float64 network.
    """
    if weights is None:
        weights = network.weights if network.weights == "bfloat16" else "float32"
    check_choice("export_c", "weights", weights, WEIGHTS)
    if weights == "float32":
        return None
    if network.dtype != np.float32:
        raise TypeError(f"export_c: expected a float32 network for weights={weights!r}, got {network.dtype}")
    depths = [max(cell.spec.input_size, cell.spec.units) for cell in network.cells]
    depths += [node.kernel.shape[0] for node in network.nodes if isinstance(node, Dense)]
    for depth in depths:
        check_narrow("export_c", weights, network.dtype, depth)
    return FORMATS[weights]


INT8 = """
/* row [m] = v [m] in steps of the scale that is returned, v's largest magnitude / 127; NaN if a value isn't finite */
static float ${name}_quantise(int8_t *row, const float *v, size_t m)
{
    float largest = 0.0f, check = 0.0f, inverse;
    for (size_t k = 0; k < m; k++) {
        const float size = fabsf(v[k]);
        largest = size > largest ? size : largest;
        check += v[k] * 0.0f;
    }
    inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    for (size_t k = 0; k < m; k++) {
        const float step = v[k] * inverse + 128.5f; /* rounds to a whole number, 128 for 0 */
        row[k] = (int8_t)((step >= 1.0f && step < 256.0f ? (int)step : 128) - 128);
    }
    return largest / 127.0f + check;
}

/* out [n] = bias [n] + v [m] . matrix [n, m], where the product is in int8; added to out if bias is NULL */
static void ${name}_multiply(float *out, size_t n, const float *bias, const float *v, size_t m, const int8_t *matrix,
                             const float *scales, int8_t *row)
{
    const float scale = ${name}_quantise(row, v, m);
    for (size_t j = 0, columns; j < n; j += columns, matrix += columns * m) {
        int32_t sums[4] = {0, 0, 0, 0}; /* of four columns, which share the numbers of the row, or of one */
        columns = n - j < 4 ? 1 : 4;
        if (columns == 4) {
            for (size_t k = 0; k < m; k++) {
                sums[0] += row[k] * matrix[k];
                sums[1] += row[k] * matrix[m + k];
                sums[2] += row[k] * matrix[2 * m + k];
                sums[3] += row[k] * matrix[3 * m + k];
            }
        } else {
            for (size_t k = 0; k < m; k++) {
                sums[0] += row[k] * matrix[k];
            }
        }
        for (size_t i = j; i < j + columns; i++) {
            const float product = fmaf((float)sums[i - j], scale * scales[i], bias != NULL ? bias[i] : 0.0f);
            out[i] = bias != NULL ? product : out[i] + product;
        }
    }
}
"""

BFLOAT16 = """
/* row [m] = v [m], rounded to bfloat16: to the nearest, ties to even */
static void ${name}_round(float *row, const float *v, size_t m)
{
    for (size_t k = 0; k < m; k++) {
        uint32_t bits;
        memcpy(&bits, v + k, sizeof bits);
        bits = v[k] == v[k] ? bits + 0x7fffu + (bits >> 16 & 1u) : bits | 0x400000u;
        bits &= 0xffff0000u;
        memcpy(row + k, &bits, sizeof bits);
    }
}

/* A bfloat16 as a float. */
static float ${name}_widened(uint16_t number)
{
    const uint32_t bits = (uint32_t)number << 16;
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* out [n] = bias [n] + v [m] . matrix [n, m], where the factors are bfloat16; added to out if bias is NULL. As the
 * products are exact, it doesn't matter whether they are fused with the addition. */
static void ${name}_multiply(float *out, size_t n, const float *bias, const float *v, size_t m, const uint16_t *matrix,
                             float *row)
{
    ${name}_round(row, v, m);
    for (size_t j = 0, columns; j < n; j += columns, matrix += columns * m) {
        float sums[4]; /* of four columns, which share the numbers of the row, or of one */
        columns = n - j < 4 ? 1 : 4;
        for (size_t i = 0; i < 4; i++) {
            sums[i] = bias != NULL && i < columns ? bias[j + i] : 0.0f;
        }
        if (columns == 4) {
            for (size_t k = 0; k < m; k++) {
                sums[0] += row[k] * ${name}_widened(matrix[k]);
                sums[1] += row[k] * ${name}_widened(matrix[m + k]);
                sums[2] += row[k] * ${name}_widened(matrix[2 * m + k]);
                sums[3] += row[k] * ${name}_widened(matrix[3 * m + k]);
            }
        } else {
            for (size_t k = 0; k < m; k++) {
                sums[0] += row[k] * ${name}_widened(matrix[k]);
            }
        }
        for (size_t i = j; i < j + columns; i++) {
            out[i] = bias != NULL ? sums[i - j] : out[i] + sums[i - j];
        }
    }
}
"""

EXACT = {
    "accumulate": """
/* out [n] += v [m] . matrix [m, n] */
static void ${name}_accumulate(float *out, size_t n, const float *v, size_t m, const float *matrix)
{
    for (size_t k = 0; k < m; k++, matrix += n) {
        const float factor = v[k];
        for (size_t j = 0; j < n; j++) {
            out[j] = fmaf(factor, matrix[j], out[j]);
        }
    }
}
""",
    "power": """
/* 2^n, where n + 127 are the low bits of `shifted` */
static float ${name}_power(float shifted)
{
    uint32_t bits;
    float power;
    memcpy(&bits, &shifted, sizeof bits);
    bits <<= 23;
    memcpy(&power, &bits, sizeof power);
    return power;
}
""",
    "exp_parts": """
/* exp(z) = power * (1 + rest), for z of at most 88.3 and at least -88.3 */
static float ${name}_exp_parts(float z, float *power)
{
    const float shifted = fmaf(z, 1.44269504088896341f, 12583039.0f), n = shifted - 12583039.0f;
    const float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, z));
    float sum = fmaf(1.3814540e-3f, r, 8.3687451e-3f);
    sum = fmaf(sum, r, 4.1668391e-2f);
    sum = fmaf(sum, r, 1.6666520e-1f);
    sum = fmaf(sum, r, 4.9999994e-1f);
    *power = ${name}_power(shifted);
    return fmaf(r * r, sum, r);
}
""",
    "sigmoid": """
static float ${name}_sigmoid(float z)
{
    float power, rest;
    z = z > 87.3f ? 87.3f : z < -88.3f ? -88.3f : z;
    rest = ${name}_exp_parts(-z, &power);
    return 1.0f / fmaf(power, rest, power + 1.0f);
}
""",
    "expm1": """
static float ${name}_expm1(float z)
{
    float power, rest;
    z = z > 88.3f ? 88.3f : z < -87.3f ? -87.3f : z;
    rest = ${name}_exp_parts(z, &power);
    return fmaf(power, rest, power - 1.0f);
}
""",
    "tanh": """
static float ${name}_tanh(float z)
{
    const float square = z * z, u = fabsf(z) > 10.0f ? 10.0f : fabsf(z);
    if (square >= 0.36f) { /* 1 - 2 / (exp(2u) + 1) */
        const float shifted = fmaf(u, 2.88539008177792681f, 12583038.0f);
        const float r = fmaf(shifted - 12583038.0f, -0.34657359028f, u), power = ${name}_power(shifted);
        const float sign = z < 0.0f ? -1.0f : 1.0f;
        float sum = fmaf(8.9993104e-2f, r, 2.6812989e-1f);
        sum = fmaf(sum, r, 6.6663635e-1f);
        sum = fmaf(sum, r, 1.3333092f);
        sum = fmaf(sum, r, 2.0000002f);
        sum = fmaf(sum, r, 2.0f);
        return sign - sign / fmaf(power * r, sum, power + 0.5f);
    } else { /* also NaN */
        float sum = fmaf(-5.8951583e-3f, square, 2.0795971e-2f);
        sum = fmaf(sum, square, -5.3783830e-2f);
        sum = fmaf(sum, square, 1.3331924e-1f);
        sum = fmaf(sum, square, -3.3333299e-1f);
        return fmaf(square * z, sum, z);
    }
}
""",
    "hard_sigmoid": """
static float ${name}_hard_sigmoid(float z, float alpha, float beta)
{
    const float y = fmaf(z, alpha, beta);
    return y < 0.0f ? 0.0f : y > 1.0f ? 1.0f : y;
}
""",
    "elu": """
static float ${name}_elu(float z, float alpha)
{
    return z > 0.0f ? z : alpha * ${name}_expm1(z);
}
""",
    "affine": """
static float ${name}_affine(float z, float alpha, float beta)
{
    return fmaf(z, alpha, beta);
}
""",
    "positive": """
static float ${name}_positive(float z)
{
    return z < 0.0f ? ${name}_sigmoid(z) : z + 0.5f;
}
""",
    "scaled_tanh": """
static float ${name}_scaled_tanh(float z, float alpha, float beta)
{
    return alpha * ${name}_tanh(beta * z);
}
""",
}
"""Helper functions that compute the kernel's bits: the operations of kernel/vec.h and kernel/activations.h."""

FORMATS = {
    "bfloat16": Narrow("bfloat16", "uint16_t", "float", 2, False, {"multiply": BFLOAT16, **EXACT}),
    "int8": Narrow("int8", "int8_t", "int8_t", 1, True, {"multiply": INT8, **EXACT}),
}
