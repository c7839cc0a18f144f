"""Cells that a graph writes out: chains of steps, and LSTMs of one step alone, their sum split in four.

Exporters write a cell so where it runs for one step at a time. The gates are told by what becomes of them:

    c = Add(Mul(act(f), c_prev), Mul(act(i), act(g)))        h = Mul(act(o), act(c))
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cellstack.formats.onnx.cells import NAMES, Operator, activation_text
from cellstack.formats.onnx.file import Scope, label, short
from cellstack.formats.onnx.graph import MOVES
from cellstack.formats.onnx.linear import first_alike, sizes_of
from cellstack.formats.onnx.steps import cell_of, common, find_chains
from cellstack.layout import Array, from_rows
from cellstack.nodes.recurrent import Cell
from cellstack.spec import CellSpec, FormatError

MOST_TERMS = 8  # of the sum that is split: two products and a few biases


class Product(NamedTuple):
    """A product of a value and a constant matrix, and the bias that comes with it."""

    value: str
    weights: str
    rows: Array  # [4H, I]
    bias: Array | None


def _users(scope: Scope) -> dict[str, list[Any]]:
    users: dict[str, list[Any]] = {}
    for node in scope.graph.node:
        for name in dict.fromkeys(node.input):
            users.setdefault(name, []).append(node)
    return users


def _one(nodes: list[Any], operator: str) -> Any:
    """Return the one node of a kind; None where there is none or there are several."""
    found = [node for node in nodes if node.op_type == operator]
    return found[0] if len(found) == 1 else None


def _other(node: Any, name: str) -> str:
    """Return the other of a node's two inputs."""
    first, second = node.input
    return second if first == name else first


def find_unrolled(scope: Scope) -> Iterator[tuple[str, Operator]]:
    """Give the cells that a graph writes out, by name; each once, however many steps of it there are.

    Raises:
        FormatError: one of which it can't be told which product is that of h.
    """
    users, seen = _users(scope), set()
    for chain in find_chains(scope):
        weights = frozenset((chain.inputs[0].weights, chain.recurrent))
        if weights in seen:
            continue
        seen.add(weights)
        try:
            cell = cell_of(scope, chain)
        except ValueError:  # sums that look like a cell's, of matrices that no cell has
            continue
        started = {f"initial_{part}": name for part, name in zip("hc", chain.starts, strict=False)}
        yield chain.name, Operator((cell,), "forward", False, "", started)
    for node in scope.graph.node:
        if node.op_type == "Split" and len(node.output) == 4 and _is_even(scope, node):
            products, biases = _terms(scope, node.input[0])
            gates = _gates(scope, users, node) if len(products) == 2 else None
            weights = frozenset(product.weights for product in products)
            if gates is None or weights in seen:  # one more step of the same LSTM
                continue
            seen.add(weights)
            order, activations, c_prev = gates
            where = f"{scope.model.path}: node {short(label(node))}"
            x, h = _ordered(scope, where, products, c_prev)
            biases += [product.bias for product in (x, h) if product.bias is not None]
            yield common(x.weights, h.weights) or label(node), _operator(where, x, h, biases, order, activations)


def _is_even(scope: Scope, split: Any) -> bool:
    """Whether a Split gives parts that are known to be alike."""
    sizes = sizes_of(scope, split)
    return bool(split.input) and sizes is not None and len(set(sizes)) <= 1


def _terms(scope: Scope, name: str) -> tuple[list[Product], list[Array]]:
    """Return what is added up to make a value: products and biases; no product where anything else is in it."""
    products, biases, waiting = [], [], [name]
    while waiting and len(products) + len(biases) < MOST_TERMS:
        name = waiting.pop()
        node, constant = scope.producers.get(name), scope.constant(name)
        if isinstance(constant, np.ndarray):
            biases.append(constant.reshape(-1))
        elif node is None:
            return [], []
        elif node.op_type == "Add" and len(node.input) == 2:
            waiting += list(node.input)
        else:
            product = _product(scope, node)
            if product is None:
                return [], []
            products.append(product)
    return ([], []) if waiting else (products, biases)


def _product(scope: Scope, node: Any) -> Product | None:
    if node.op_type not in ("MatMul", "Gemm") or len(node.input) < 2:
        return None
    weights = scope.constant(node.input[1])
    found = scope.model.attributes(node)
    if not isinstance(weights, np.ndarray) or weights.ndim != 2 or found.get("transA", 0):
        return None
    if found.get("alpha", 1.0) != 1.0 or found.get("beta", 1.0) != 1.0:
        return None
    bias = scope.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if len(node.input) > 2 and node.input[2] and not isinstance(bias, np.ndarray):
        return None
    rows = weights if found.get("transB", 0) else weights.T
    return Product(
        node.input[0],
        first_alike(scope, node.input[1], weights),
        rows,
        bias.reshape(-1) if isinstance(bias, np.ndarray) else None,
    )


def _gates(scope: Scope, users: dict[str, list[Any]], split: Any) -> tuple[str, dict[str, str], str] | None:
    """Return the order of the gates, their activations, that of the cell by "cell", and the name of c_prev."""
    acts: dict[str, Any] = {}  # by what it gives: the activation, and which part of the split it is on
    for place, part in enumerate(split.output):
        taken = users.get(part, [])
        if len(taken) != 1 or taken[0].op_type not in NAMES:
            return None
        acts[taken[0].output[0]] = (place, taken[0])
    products = {}
    for name in acts:
        product = _one(users.get(name, []), "Mul")
        if product is None or len(product.input) != 2:
            return None
        products[name] = product
    both = [name for name in acts if _other(products[name], name) in acts]
    if len(both) != 2 or products[both[0]] is not products[both[1]]:
        return None
    total = _one(users.get(products[both[0]].output[0], []), "Add")
    rest = [name for name in acts if name not in both]
    kept = [name for name in rest if total is not None and products[name].output[0] in total.input]
    if total is None or len(kept) != 1:
        return None
    (f,), (o,) = kept, [name for name in rest if name not in kept]
    out = scope.producers.get(_other(products[o], o))
    if out is None or out.op_type not in NAMES or not out.input or out.input[0] != total.output[0]:
        return None
    i, g = both
    if acts[i][1].op_type == "Tanh" and acts[g][1].op_type != "Tanh":  # which is which doesn't matter to a product
        i, g = g, i
    letters = {acts[name][0]: letter for name, letter in ((i, "i"), (f, "f"), (g, "g"), (o, "o"))}
    nodes = {letters[place]: node for place, node in acts.values()} | {"cell": out}
    texts = {gate: activation_text(node, scope.model.attributes(node)) for gate, node in nodes.items()}
    known = {gate: text for gate, text in texts.items() if text is not None}
    order = "".join(letters[place] for place in range(4))
    return (order, known, _other(products[f], f)) if len(known) == len(texts) else None


def _root(scope: Scope, name: str) -> str:
    """Return what a value is a part of, past whatever only moves numbers."""
    seen = 0
    while seen < 1000:
        seen += 1
        node = scope.producers.get(name)
        if node is None or node.op_type not in MOVES or not node.input:
            break
        name = node.input[0]
    return name


def _ordered(scope: Scope, where: str, products: list[Product], c_prev: str) -> tuple[Product, Product]:
    """Return the product of x and that of h: h comes from where c_prev comes from, and its weights are square."""
    fits = [len(p.rows) == 4 * p.rows.shape[1] for p in products]
    if fits.count(True) == 2:
        start = _root(scope, c_prev)
        fits = [_root(scope, product.value) == start for product in products]
    if fits.count(True) != 1:
        raise FormatError(f"{where}: expected to tell the product of h from that of x, found two that could be either")
    h = fits.index(True)
    return products[1 - h], products[h]


def _operator(
    where: str, x: Product, h: Product, biases: list[Array], order: str, activations: dict[str, str]
) -> Operator:
    units = h.rows.shape[1]
    wide = 4 * units
    if len(x.rows) != wide or any(bias.shape != (wide,) for bias in biases):
        found = [list(x.rows.shape), list(h.rows.shape), *(list(bias.shape) for bias in biases)]
        raise FormatError(f"{where}: expected weights and biases of one LSTM, found {found}")
    dtype = np.dtype(np.float64 if h.rows.dtype == np.float64 else np.float32)
    rows, recurrent, *offsets = (np.asarray(array, dtype) for array in (x.rows, h.rows, *biases))
    try:
        spec = CellSpec(
            rows.shape[1],
            units,
            activations["g"],
            activations["i"],
            use_bias=bool(offsets),
            gate_activations={name: activations[name] for name in ("f", "o", "cell")},
        )
    except ValueError as error:
        raise FormatError(f"{where}: {error}") from None
    arrays = from_rows("lstm", rows, recurrent, tuple(offsets), order)
    cell = Cell(spec, **{name: array for name, array in arrays._asdict().items() if array is not None})
    return Operator((cell,), "forward", False, "", {"initial_h": h.value})
