"""The step of an `MLSTM` as data, which the page interprets as it interprets the steps of cells."""

from __future__ import annotations

from typing import Any

from cellstack.nodes.mlstm import MLSTM
from cellstack.views.recorded import Value, listed

STATES = ("C", "n", "m")
MEANINGS = {
    "q": "query: what is looked for in the memory",
    "k": "key: under what the value is stored",
    "v": "value: what is stored",
    "i": "input gate: how much of the key with its value is added, exp(z_i − m)",
    "f": "forget gate: how much of C and n is kept, σ(z_f)·exp(m_prev − m)",
    "o": "output gate: how much of what the query retrieves is output",
    "m": "stabiliser: the logarithm of the scale of C and n",
    "n": "normaliser: the sum of the keys with their weights, times exp(−m)",
    "C": "memory: the sum of k·vᵀ with their weights, times exp(−m)",
    "h": "output: what the query retrieves",
}


class _Recorder:
    """The values of the step, in the order in which they are computed."""

    def __init__(self) -> None:
        self.values: list[Value] = []

    def __call__(self, operation: str, *of: Value, width: int | None = None, **more: Any) -> Value:
        self.values.append(Value(operation, of, of[0].width if width is None else (width, ""), **more))
        return self.values[-1]


def memory_form(node: MLSTM) -> dict[str, Any]:
    """Return an `MLSTM` as a form of cell without arrays, with the keys of `views.recorded.form_of`, and `heads`.

    Vectors are as wide as all heads together; C is `[heads, key_size, value_size]`. In addition to the operations of
    cells, there are `"part"`, some columns of x, the first of which is `part`; `"affine"`, `v·numbers[0] + numbers[1]`;
    `"scaled"`, a vector times a number per head, or only that number; `"outer"`, the products of two vectors of each
    head; and `"contract"`, a matrix of each head, transposed, times a vector.
    """
    heads, new = node.heads, _Recorder()
    keys, values = heads * node.key_size, heads * node.value_size
    sizes = dict(zip(STATES, (keys * node.value_size, keys, heads), strict=True))
    before = [new("state", width=size, name=name) for name, size in sizes.items()]
    C, n, m = before
    x, first = new("x", width=node.input_size), 0
    columns = {"q": keys, "k": keys, "v": values, "z_i": heads, "z_f": heads}
    parts = {}
    for name, width in (columns | ({"z_o": values} if node.output_gate else {})).items():
        parts[name] = new("part", x, width=width, name=name, part=first)
        first += width
    q, k, v = (new("record", parts[name], name=name) for name in "qkv")
    kept = new("add", new("log_sigmoid", parts["z_f"]), m)
    m = new("maximum", kept, parts["z_i"])
    i = new("record", new("exp", new("sub", parts["z_i"], m)), name="i")
    f = new("record", new("exp", new("sub", kept, m)), name="f")
    added = new("scaled", i, new("affine", k, numbers=(node.key_size**-0.5, 0.0)), width=keys)
    C = new("add", new("scaled", f, C, width=sizes["C"]), new("outer", added, v, width=sizes["C"]))
    n = new("add", new("scaled", f, n, width=keys), added)
    product = new("contract", n, q, width=heads)
    size = new("maximum", new("maximum", product, new("affine", product, numbers=(-1.0, 0.0))),
               new("exp", new("affine", m, numbers=(-1.0, 0.0))))  # fmt: skip
    divisor = new("scaled", new("affine", size, numbers=(1.0, node.epsilon)), width=values)
    h = new("div", new("contract", C, q, width=values), divisor)
    if node.output_gate:
        o = new("record", new("activation", parts["z_o"], name="o"), name="o")
        h = new("mul", o, h)
    new("record", h, name="h")
    place = {id(value): number for number, value in enumerate(new.values)}
    gates = {"i": "write", "f": "keep"} | ({"o": "output"} if node.output_gate else {})
    trace = [*"qkv", *gates, "m", "n", "h"]  # not C, which has too many numbers
    return {
        "settings": {"kind": "mlstm", "input_size": node.input_size, "units": node.units}
        | {name: getattr(node, name) for name in node.settings},
        "title": "mLSTM",
        "heads": heads,
        "gates": gates,
        "blocks": [],
        "trace": trace,
        "meanings": {name: MEANINGS[name] for name in (*trace, "C")},
        "scalar": "",
        "states": {name: {"width": [size, ""], "kept": 0.0} for name, size in sizes.items()},
        "activations": {"o": "sigmoid"} if node.output_gate else {},
        "shapes": {},
        "values": listed(new.values),
        "before": [place[id(value)] for value in before],
        "after": [place[id(value)] for value in (C, n, m)],
    }
