/* Products with matrices in bfloat16. */

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
