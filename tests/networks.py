"""Random networks, and what they must return, worked out in float64 by the reference and plain NumPy."""

from dataclasses import replace

import numpy as np
from family import random_activation, random_arrays, random_spec

from cellstack import (
    Activation,
    Bidirectional,
    Cell,
    CellSpec,
    Dense,
    Network,
    Pool,
    Recurrent,
    Standardise,
    reference,
    spec,
)
from cellstack.spec import STATES


def make_cell(rng, inputs, units, dtype="float32", **settings):
    return fill(rng, CellSpec(inputs, units, **settings), dtype)


def fill(rng, spec, dtype="float32"):
    """A cell whose arrays differ in every number."""
    return Cell(spec, **{name: array.astype(dtype) for name, array in random_arrays(rng, spec).items()})


def make_stack(rng, inputs, dtype="float32", **flags):
    """One to three cells of any kind and flags, every third one a plain LSTM; many are as wide as the one below."""
    cells = []
    for _ in range(rng.integers(1, 4)):
        made = replace(random_spec(rng, largest=20), input_size=inputs)
        if rng.random() < 1 / 3:
            made = CellSpec(inputs, made.units)
        if flags.get("residual") and rng.random() < 2 / 3:
            made = replace(made, units=inputs, proj_size=0)
        cells.append(fill(rng, made, dtype))
        inputs = made.output_size
    return Recurrent(tuple(cells), **flags)


def make_network(seed, dtype="float32", streams=False):
    """A network of one to five nodes, of all kinds, or of those alone that a stream can run."""
    rng = np.random.default_rng(seed)
    width, sequence, nodes = int(rng.integers(1, 10)), True, []
    for n in range(rng.integers(1, 6)):
        kinds = ["dense", "activation"] if n else ["dense", "standardise"]  # the first one fixes width and dtype
        if sequence:
            kinds += ["recurrent"] * 3 + (["pool"] if n else []) + ([] if streams else ["bidirectional"])
        kind = str(rng.choice(kinds))
        flags = {
            "return_sequences": bool(rng.integers(3)),
            "zero_output_for_mask": bool(rng.integers(2)),
            "residual": bool(rng.integers(2)),
        }
        activation = str(rng.choice([random_activation(rng), random_activation(rng), "softmax"]))
        if kind == "standardise":
            mean, scale = rng.normal(size=width), rng.uniform(0.5, 2.0, size=width)
            nodes.append(Standardise(mean.astype(dtype), scale.astype(dtype)))
        elif kind == "dense":
            outputs = int(rng.integers(1, 12))
            bias = rng.normal(size=outputs).astype(dtype) if rng.integers(2) else None
            kernel = rng.normal(0, 0.5, size=(width, outputs)).astype(dtype)
            nodes.append(Dense(kernel, bias, activation))
            width = outputs
        elif kind == "activation":
            nodes.append(Activation(activation))
        elif kind == "pool":
            nodes.append(Pool("last" if streams else str(rng.choice(["mean", "max", "last"]))))
            sequence = False
        elif kind == "recurrent":
            backwards = not streams and bool(rng.integers(2))
            nodes.append(make_stack(rng, width, dtype, go_backwards=backwards, **flags))
            width, sequence = nodes[-1].units, flags["return_sequences"]
        else:
            merge = str(rng.choice(["concat", "sum", "mul", "ave"]))
            of_both = {"return_sequences": flags["return_sequences"], "residual": flags["residual"]}
            ahead = make_stack(rng, width, dtype, **of_both)
            units = ahead.units if merge != "concat" else int(rng.integers(1, 9))
            made = replace(random_spec(rng), input_size=width, units=units, proj_size=0)
            back = Recurrent((fill(rng, made, dtype),), go_backwards=True, **of_both)
            nodes.append(Bidirectional(ahead, back, merge))
            width, sequence = (units + ahead.units if merge == "concat" else units), flags["return_sequences"]
    return Network(nodes)


def make_states(rng, net, batch):
    return tuple(
        STATES[cell.spec.kind](
            *(rng.normal(0, 0.5, size=(batch, size)).astype(net.dtype) for size in cell.spec.state_sizes.values())
        )
        for cell in net.cells
    )


def f64(array):
    return None if array is None else np.asarray(array, np.float64)


def _from_the_end(reset):
    """Where a pass from the end begins anew: with the last step of every piece but the last."""
    back = np.zeros(reset.shape, bool)
    for row, t in np.argwhere(reset):
        if t:
            back[row, t - 1] = True
    return back


def _residual(x, h, mask, reset, order):
    """h + x; a masked step repeats that of the last step used, or h where there is none since the state was set."""
    y = np.empty_like(h)
    for row in range(len(h)):
        last = None
        for t in order:
            if reset is not None and reset[row, t]:
                last = None
            if mask is None or mask[row, t]:
                last = h[row, t] + x[row, t]
            y[row, t] = h[row, t] if last is None else last
    return y


def _stack(node, x, mask, reset, states):
    """Outputs in the order of x, or the last one; then the states."""
    after = []
    order = range(x.shape[1])[:: -1 if node.go_backwards else 1]
    reset = _from_the_end(reset) if reset is not None and node.go_backwards else reset
    for number, (cell, state) in enumerate(zip(node.cells, states, strict=True)):
        arrays = {name: f64(array) for name, array in cell.arrays.items()}
        state = None if state is None else tuple(map(f64, state))
        out = reference.forward(cell.spec, arrays, x, state, mask=mask, reset=reset, reverse=node.go_backwards)
        added = node.residual and number and cell.spec.input_size == cell.spec.output_size
        x = _residual(x, out.y, mask, reset, order) if added else out.y
        after.append(out.state)
    last = x[:, order[-1]].copy() if order else after[-1][0].copy()
    if mask is not None and node.zero_output_for_mask:
        x = np.where(mask[:, :, None], x, 0.0)
        if order:
            last = np.where(mask[:, order[-1], None], last, 0.0)
    return (x if node.return_sequences else last), after


def _pool(mode, x, mask):
    rows = []
    for row, used in zip(x, mask, strict=True):
        kept = row[used]
        if len(kept) == 0:
            rows.append(np.zeros(x.shape[2]))
        else:
            rows.append({"mean": kept.mean(axis=0), "max": kept.max(axis=0), "last": kept[-1]}[mode])
    return np.array(rows).reshape(len(x), x.shape[2])


def _activate(text, z):
    if text == "softmax":
        e = np.exp(z - z.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)
    name, alpha, beta = spec.activation(text)
    return reference.ACTIVATIONS[name][0](z, alpha, beta)


def by_reference(net, x, state=None, mask=None, reset=None):
    """What `net.run` must return, in float64, written without a line of the code under test."""
    x = f64(x)
    left, after = list(state or [None] * len(net.cells)), []
    for node in net.nodes:
        own = [left.pop(0) for _ in node.cells]
        if isinstance(node, Standardise):
            x = (x - f64(node.mean)) / f64(node.scale)
        elif isinstance(node, Activation):
            x = _activate(node.activation, x)
        elif isinstance(node, Dense):
            x = _activate(node.activation, x @ f64(node.kernel) + (0.0 if node.bias is None else f64(node.bias)))
        elif isinstance(node, Pool):
            x, mask, reset = _pool(node.mode, x, np.ones(x.shape[:2], bool) if mask is None else mask), None, None
        elif isinstance(node, Recurrent):
            x, states = _stack(node, x, mask, reset, own)
            after += states
            if node.go_backwards and node.return_sequences:
                x, mask = x[:, ::-1], None if mask is None else mask[:, ::-1]
                reset = None if reset is None else _from_the_end(reset)[:, ::-1]
            mask, reset = (mask, reset) if node.return_sequences else (None, None)
        else:
            half = len(node.forward.cells)
            a, ahead = _stack(node.forward, x, mask, reset, own[:half])
            b, back = _stack(node.backward, x, mask, reset, own[half:])
            after += ahead + back
            merged = {"sum": a + b, "mul": a * b, "ave": (a + b) / 2} if node.merge_mode != "concat" else {}
            x = merged[node.merge_mode] if merged else np.concatenate([a, b], axis=-1)
            mask, reset = (mask, reset) if node.forward.return_sequences else (None, None)
    return x, tuple(after)
