/* Helper functions of all networks. These files are templates: $name is the network's prefix, $real is float or double,
 * and $f is the suffix of literals and of the functions of <math.h>. Only the functions that are called are written. */

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

static $real ${name}_clip($real z, $real bound)
{
    return z > bound ? bound : z < -bound ? -bound : z;
}

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

static $real ${name}_gelu($real z)
{
    return z * (0.5$f + 0.5$f * erf$f(z * 0.70710678118654752$f));
}

static $real ${name}_sigmoid($real z)
{
    const $real e = exp$f(-fabs$f(z)); /* at most 1 */
    return (z < 0.0$f ? e : 1.0$f) / (1.0$f + e);
}

static $real ${name}_relu($real z)
{
    return z <= 0.0$f ? 0.0$f : z;
}

static $real ${name}_hard_sigmoid($real z, $real alpha, $real beta)
{
    const $real y = alpha * z + beta;
    return y < 0.0$f ? 0.0$f : y > 1.0$f ? 1.0$f : y;
}

static $real ${name}_softsign($real z)
{
    return z / (1.0$f + fabs$f(z));
}

static $real ${name}_maximum($real a, $real b)
{
    return a > b ? a : b;
}

static $real ${name}_softplus($real z)
{
    return (z > 0.0$f ? z : 0.0$f) + log1p$f(exp$f(-fabs$f(z)));
}

static $real ${name}_elu($real z, $real alpha)
{
    return z > 0.0$f ? z : alpha * expm1$f(z);
}

static $real ${name}_affine($real z, $real alpha, $real beta)
{
    return alpha * z + beta;
}

static $real ${name}_leaky_relu($real z, $real alpha)
{
    return z > 0.0$f ? z : alpha * z;
}

static $real ${name}_thresholded_relu($real z, $real alpha)
{
    return z <= alpha ? 0.0$f : z;
}

static $real ${name}_positive($real z)
{
    const $real e = z < 0.0$f ? exp$f(z) : 0.0$f;
    return z < 0.0$f ? e / (1.0$f + e) : z + 0.5$f;
}

static $real ${name}_scaled_tanh($real z, $real alpha, $real beta)
{
    return alpha * tanh$f(beta * z);
}

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
