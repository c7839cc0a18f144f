/* Helper functions that compute the kernel's bits: the operations of kernel/vec.h and kernel/activations.h. */

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

static float ${name}_sigmoid(float z)
{
    float power, rest;
    z = z > 87.3f ? 87.3f : z < -88.3f ? -88.3f : z;
    rest = ${name}_exp_parts(-z, &power);
    return 1.0f / fmaf(power, rest, power + 1.0f);
}

static float ${name}_expm1(float z)
{
    float power, rest;
    z = z > 88.3f ? 88.3f : z < -87.3f ? -87.3f : z;
    rest = ${name}_exp_parts(z, &power);
    return fmaf(power, rest, power - 1.0f);
}

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

static float ${name}_hard_sigmoid(float z, float alpha, float beta)
{
    const float y = fmaf(z, alpha, beta);
    return y < 0.0f ? 0.0f : y > 1.0f ? 1.0f : y;
}

static float ${name}_elu(float z, float alpha)
{
    return z > 0.0f ? z : alpha * ${name}_expm1(z);
}

static float ${name}_affine(float z, float alpha, float beta)
{
    return fmaf(z, alpha, beta);
}

static float ${name}_positive(float z)
{
    return z < 0.0f ? ${name}_sigmoid(z) : z + 0.5f;
}

static float ${name}_scaled_tanh(float z, float alpha, float beta)
{
    return alpha * ${name}_tanh(beta * z);
}
