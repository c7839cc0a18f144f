/* Products with matrices in int8. */

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
