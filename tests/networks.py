"""Random networks, and what they must return, worked out in float64 by the reference and plain NumPy."""

import numpy as np

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
    State,
    reference,
)
from cellstack.spec import ACTIVATIONS


def make_cell(rng, inputs, units, dtype="float32", scale=0.5, **settings):
    spec = CellSpec(inputs, units, **settings)
    return Cell(spec, **{name: rng.normal(0, scale, shape).astype(dtype) for name, shape in spec.shapes.items()})


def make_stack(rng, inputs, dtype="float32", **flags):
    """One to three cells of any width and activation; gates differ in every number."""
    cells = []
    for _ in range(rng.integers(1, 4)):
        units = int(rng.integers(1, 21))
        phi, sigma = rng.choice(["tanh", "softsign", "elu"]), rng.choice(["sigmoid", "hard_sigmoid"])
        settings = {"activation": str(phi), "recurrent_activation": str(sigma), "use_bias": bool(rng.integers(2))}
        cells.append(make_cell(rng, inputs, units, dtype, **settings))
        inputs = units
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
        flags = {"return_sequences": bool(rng.integers(3)), "zero_output_for_mask": bool(rng.integers(2))}
        if kind == "standardise":
            mean, scale = rng.normal(size=width), rng.uniform(0.5, 2.0, size=width)
            nodes.append(Standardise(mean.astype(dtype), scale.astype(dtype)))
        elif kind == "dense":
            outputs = int(rng.integers(1, 12))
            bias = rng.normal(size=outputs).astype(dtype) if rng.integers(2) else None
            kernel = rng.normal(0, 0.5, size=(width, outputs)).astype(dtype)
            nodes.append(Dense(kernel, bias, str(rng.choice([*ACTIVATIONS, "softmax"]))))
            width = outputs
        elif kind == "activation":
            nodes.append(Activation(str(rng.choice([*ACTIVATIONS, "softmax"]))))
        elif kind == "pool":
            nodes.append(Pool("last" if streams else str(rng.choice(["mean", "max", "last"]))))
            sequence = False
        elif kind == "recurrent":
            backwards = not streams and bool(rng.integers(2))
            nodes.append(make_stack(rng, width, dtype, go_backwards=backwards, **flags))
            width, sequence = nodes[-1].units, flags["return_sequences"]
        else:
            merge = str(rng.choice(["concat", "sum", "mul", "ave"]))
            ahead = make_stack(rng, width, dtype, return_sequences=flags["return_sequences"])
            units = ahead.units if merge != "concat" else int(rng.integers(1, 9))
            back = Recurrent((make_cell(rng, width, units, dtype),), flags["return_sequences"], go_backwards=True)
            nodes.append(Bidirectional(ahead, back, merge))
            width, sequence = (units + ahead.units if merge == "concat" else units), flags["return_sequences"]
    return Network(nodes)


def make_states(rng, net, batch):
    return tuple(State(*rng.normal(0, 0.5, size=(2, batch, cell.spec.units)).astype(net.dtype)) for cell in net.cells)


def f64(array):
    return None if array is None else np.asarray(array, np.float64)


def _stack(node, x, mask, states):
    """Outputs in the order of x, or the last one; then the states."""
    after = []
    for cell, state in zip(node.cells, states, strict=True):
        out = reference.lstm_forward(
            x,
            f64(state.h),
            f64(state.c),
            f64(cell.kernel),
            f64(cell.recurrent_kernel),
            f64(cell.bias),
            mask=mask,
            activation=cell.spec.activation,
            recurrent_activation=cell.spec.recurrent_activation,
            reverse=node.go_backwards,
        )
        x = out.y
        after.append(State(out.h, out.c))
    steps = range(x.shape[1])[:: -1 if node.go_backwards else 1]
    last = after[-1].h.copy()
    if mask is not None and node.zero_output_for_mask:
        x = np.where(mask[:, :, None], x, 0.0)
        if len(steps):
            last = np.where(mask[:, steps[-1], None], last, 0.0)
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


def _activate(name, z):
    if name == "softmax":
        e = np.exp(z - z.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)
    return reference.ACTIVATIONS[name][0](z)


def by_reference(net, x, state=None, mask=None):
    """What `net.run` must return, in float64, written without a line of the code under test."""
    x = f64(x)
    batch = len(x)
    if state is None:
        state = tuple(State(*np.zeros((2, batch, cell.spec.units))) for cell in net.cells)
    left, after = list(state), []
    for node in net.nodes:
        own = [left.pop(0) for _ in node.cells]
        if isinstance(node, Standardise):
            x = (x - f64(node.mean)) / f64(node.scale)
        elif isinstance(node, Activation):
            x = _activate(node.activation, x)
        elif isinstance(node, Dense):
            x = _activate(node.activation, x @ f64(node.kernel) + (0.0 if node.bias is None else f64(node.bias)))
        elif isinstance(node, Pool):
            x, mask = _pool(node.mode, x, np.ones(x.shape[:2], bool) if mask is None else mask), None
        elif isinstance(node, Recurrent):
            x, states = _stack(node, x, mask, own)
            after += states
            if node.go_backwards and node.return_sequences:
                x, mask = x[:, ::-1], None if mask is None else mask[:, ::-1]
            mask = mask if node.return_sequences else None
        else:
            half = len(node.forward.cells)
            a, ahead = _stack(node.forward, x, mask, own[:half])
            b, back = _stack(node.backward, x, mask, own[half:])
            after += ahead + back
            merged = {"sum": a + b, "mul": a * b, "ave": (a + b) / 2} if node.merge_mode != "concat" else {}
            x = merged[node.merge_mode] if merged else np.concatenate([a, b], axis=-1)
            mask = mask if node.forward.return_sequences else None
    return x, tuple(after)
