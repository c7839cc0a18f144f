"""An mLSTM's memory as C: a function for its step, and the lines that call it, as templates like those of `cells`."""

from __future__ import annotations

from cellstack.formats.c.step import literal
from cellstack.nodes import MLSTM

FUNCTION = """
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
"""


def lines_of(node: MLSTM, at: str, target: str, state: list[str]) -> list[str]:
    """Return the lines that run a memory on `at`, and write h, times its output gate if it has one, to `target`.

    Args:
        node: the memory.
        at, target: C expressions for the input and the output, different arrays.
        state: C expressions for C, n and m.
    """
    sizes = f"{node.heads}, {node.key_size}, {node.value_size}, {literal(node.epsilon)}"
    lines = [f"    ${{name}}_memory_step({sizes}, {at}, {', '.join(state)}, {target});"]
    if node.output_gate:
        lines += [
            f"    for (size_t j = 0; j < {node.units}; j++) {{",
            f"        {target}[j] *= ${{name}}_sigmoid({at}[{node.core_size} + j]);",
            "    }",
        ]
    return lines
