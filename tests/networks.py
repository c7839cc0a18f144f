"""Random networks, and their expected results in float64 from the reference and plain NumPy."""

from dataclasses import replace

import numpy as np
from family import random_activation, random_arrays, random_spec, random_state, resized

from cellstack import CellSpec, Network, reference
from cellstack.cells import activations
from cellstack.cells.spec import STATES
from cellstack.nodes import (
    Activation,
    Bidirectional,
    Cell,
    Conv1D,
    Dense,
    Embedding,
    Flatten,
    GlobalPool,
    LayerNorm,
    Masking,
    Merge,
    Permute,
    Pool1D,
    Recurrent,
    Repeat,
    Reshape,
    Scale,
    Select,
    Standardise,
)


def make_cell(rng, inputs, units, dtype="float32", **settings):
    return fill(rng, CellSpec(inputs, units, **settings), dtype)


def fill(rng, spec, dtype="float32"):
    """Return a cell with random arrays, in which all numbers differ."""
    return Cell(spec, **{name: array.astype(dtype) for name, array in random_arrays(rng, spec).items()})


def make_stack(rng, inputs, dtype="float32", **flags):
    """Return one to three random cells, a third of them standard LSTMs; many have the width of the one below."""
    cells = []
    for _ in range(rng.integers(1, 4)):
        made = resized(random_spec(rng, largest=20), inputs)
        if rng.random() < 1 / 3:
            made = CellSpec(inputs, made.units)
        if flags.get("residual") and rng.random() < 2 / 3:
            made = replace(made, units=inputs, proj_size=0, heads=1)
        cells.append(fill(rng, made, dtype))
        inputs = made.output_size
    return Recurrent(tuple(cells), **flags)


def make_network(seed, dtype="float32", streams=False):
    """Return a random network of one to five nodes; with `streams`, of nodes that can be streamed."""
    rng = np.random.default_rng(seed)
    width, sequence, nodes = int(rng.integers(1, 10)), True, []
    for n in range(rng.integers(1, 6)):
        kinds = ["dense", "activation"] if n else ["dense", "standardise"]  # the first node determines width and dtype
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
            nodes.append(GlobalPool("last" if streams else str(rng.choice(["mean", "max", "last"]))))
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
            made = replace(resized(random_spec(rng), width), units=units, proj_size=0, heads=1)
            back = Recurrent((fill(rng, made, dtype),), go_backwards=True, **of_both)
            nodes.append(Bidirectional(ahead, back, merge))
            width, sequence = (units + ahead.units if merge == "concat" else units), flags["return_sequences"]
    return Network(nodes)


def make_states(rng, net, batch):
    return tuple(
        STATES[cell.spec.kind](*(array.astype(net.dtype) for array in random_state(rng, cell.spec, batch)))
        for cell in net.cells
    )


def f64(array):
    return None if array is None else np.asarray(array, np.float64)


def _from_the_end(reset):
    """Return the resets of a backward run: the last step of every piece except the last one."""
    back = np.zeros(reset.shape, bool)
    for row, t in np.argwhere(reset):
        if t:
            back[row, t - 1] = True
    return back


def _residual(x, h, mask, reset, order):
    """Return h + x; a masked step repeats the sum of the last used step since the last reset, or h if there is none."""
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
    """Return the outputs in the order of x, or the last output; and the states."""
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
    name, alpha, beta = activations.activation(text)
    return reference.ACTIVATIONS[name][0](z, alpha, beta)


def _windows(x, span, strides, before, after):
    """Yield the steps of each window; None for padding."""
    steps = x.shape[1]
    for start in range(-before, steps + after - span + 1, strides):
        yield [t if 0 <= t < steps else None for t in range(start, start + span)]


def _same(steps, span, strides):
    missing = max(0, ((steps + strides - 1) // strides - 1) * strides + span - steps)
    return missing // 2, missing - missing // 2


def _conv(node, x):
    taps, channels, filters = node.kernel.shape
    span = (taps - 1) * node.dilation + 1
    around = {"valid": (0, 0), "same": _same(x.shape[1], span, node.strides), "causal": (span - 1, 0)}
    before, after = around[node.padding] if isinstance(node.padding, str) else node.padding
    kernel, per = f64(node.kernel), filters // node.groups
    steps = []
    for window in _windows(x, span, node.strides, before, after):
        y = np.zeros((len(x), filters)) + (0.0 if node.bias is None else f64(node.bias))
        for k in range(taps):
            t = window[k * node.dilation]
            for g in range(node.groups if t is not None else 0):
                block = x[:, t, g * channels : (g + 1) * channels]
                y[:, g * per : (g + 1) * per] += block @ kernel[k, :, g * per : (g + 1) * per]
        steps.append(y)
    y = np.stack(steps, axis=1) if steps else np.zeros((len(x), 0, filters))
    return _activate(node.activation, y)


def _pool1d(node, x):
    around = _same(x.shape[1], node.size, node.strides) if node.padding == "same" else (0, 0)
    taken = [[t for t in w if t is not None] for w in _windows(x, node.size, node.strides, *around)]
    rows = [x[:, w].mean(axis=1) if node.mode == "mean" else x[:, w].max(axis=1) for w in taken]
    return np.stack(rows, axis=1) if rows else np.zeros((len(x), 0, x.shape[2]))


def _norm(node, x):
    y = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + node.epsilon)
    return y * (1.0 if node.gain is None else f64(node.gain)) + (0.0 if node.bias is None else f64(node.bias))


def _merge(node, values):
    """Merge values with masks and without resets."""
    xs, masks = [value[0] for value in values], [value[1] for value in values]
    time = node.mode == "concat" and xs[0].ndim == 3 and node.axis == 1
    if all(mask is None for mask in masks):
        mask = None
    elif time:
        mask = np.concatenate(
            [np.ones(x.shape[:2], bool) if m is None else m for x, m in zip(xs, masks, strict=True)], 1
        )
    else:
        mask = None if any(m is None for m in masks) else np.any(masks, axis=0)
    if node.mode == "concat":
        return np.concatenate(xs, axis=node.axis), mask
    if node.mode in ("add", "ave", "sub"):
        y = xs[0] - xs[1] if node.mode == "sub" else sum(xs)
        return (y / len(xs) if node.mode == "ave" else y), mask
    y = np.zeros(np.broadcast_shapes(*(x.shape for x in xs)))
    for at in np.ndindex(y.shape):
        used = [x[at] for x, m in zip(xs, masks, strict=True) if m is None or m[at[:2]]]
        nothing = 0.0 if node.mode == "mul" else xs[0][at]
        y[at] = (np.prod(used) if node.mode == "mul" else max(used)) if used else nothing
    return y, mask


def _stepwise(node, x):
    """Return the output of a node that keeps mask and resets; None for other nodes."""
    if isinstance(node, Standardise):
        return (x - f64(node.mean)) / f64(node.scale)
    if isinstance(node, Scale):
        return x * f64(node.scale) + f64(node.shift)
    if isinstance(node, LayerNorm):
        return _norm(node, x)
    if isinstance(node, Activation):
        return _activate(node.activation, x)
    if isinstance(node, Dense):
        return _activate(node.activation, x @ f64(node.kernel) + (0.0 if node.bias is None else f64(node.bias)))
    return None


def _shaped(node, x):
    """Return the output of a node that drops the mask; None for other nodes."""
    if isinstance(node, Conv1D):
        return _conv(node, x)
    if isinstance(node, Pool1D):
        return _pool1d(node, x)
    if isinstance(node, Flatten):
        return x.reshape(len(x), int(np.prod(x.shape[1:])))
    if isinstance(node, Reshape):
        return np.stack([row.reshape(node.shape) for row in x])
    if isinstance(node, Permute):
        return np.moveaxis(x, node.dims, range(1, x.ndim))
    if isinstance(node, Repeat):
        return np.stack([x] * node.times, axis=1)
    return None


def _node(node, values, own):
    """Return a node's output for inputs `(x, mask, reset)`, and its states after the run."""
    x, mask, reset = values[0]
    if (y := _stepwise(node, x)) is not None:
        return (y, mask, reset), []
    if (y := _shaped(node, x)) is not None:
        return (y, None, None), []
    if isinstance(node, Merge):
        return (*_merge(node, values), reset), []
    if isinstance(node, Select):
        along = tuple(node.taken if axis == node.axis % x.ndim else slice(None) for axis in range(x.ndim))
        assert reset is None
        return (x[along], mask if mask is None or node.axis % x.ndim != 1 else mask[along[:2]], None), []
    if isinstance(node, Embedding):
        used = np.ones(x.shape, bool) if mask is None else mask
        table = f64(node.table)[np.where(used, x, 0).astype(int)]
        return (table, used & (np.where(used, x, 0) != 0) if node.mask_zero else mask, reset), []
    if isinstance(node, Masking):
        kept = (x != np.float32(node.value)).any(axis=-1)
        return (np.where(kept[..., None], x, 0.0), kept if mask is None else kept & mask, reset), []
    if isinstance(node, GlobalPool):
        return (_pool(node.mode, x, np.ones(x.shape[:2], bool) if mask is None else mask), None, None), []
    if isinstance(node, Recurrent):
        x, states = _stack(node, x, mask, reset, own)
        if node.go_backwards and node.return_sequences:
            x, mask = x[:, ::-1], None if mask is None else mask[:, ::-1]
            reset = None if reset is None else _from_the_end(reset)[:, ::-1]
        return (x, *((mask, reset) if node.return_sequences else (None, None))), states
    count = len(node.forward.cells)
    a, ahead = _stack(node.forward, x, mask, reset, own[:count])
    b, back = _stack(node.backward, x, mask, reset, own[count:])
    merged = {"sum": a + b, "mul": a * b, "ave": (a + b) / 2} if node.merge_mode != "concat" else {}
    x = merged[node.merge_mode] if merged else np.concatenate([a, b], axis=-1)
    return (x, *((mask, reset) if node.forward.return_sequences else (None, None))), ahead + back


def by_reference(net, x, state=None, mask=None, reset=None):
    """Return the expected result of `net.run` in float64, computed without the code under test."""
    given = x if isinstance(x, dict) else {net.inputs[0]: x}
    timed = {name: array.ndim == 3 or name in net.graph.ids for name, array in given.items()}
    values = {
        name: (array if name in net.graph.ids else f64(array), *((mask, reset) if timed[name] else (None, None)))
        for name, array in given.items()
    }
    left, after = list(state or [None] * len(net.cells)), []
    for name, node, sources in zip(net.names, net.nodes, net.wires, strict=True):
        own = [left.pop(0) for _ in node.cells]
        values[name], states = _node(node, [values[source] for source in sources], own)
        after += states
    answers = tuple(values[name][0] for name in net.outputs)
    return (answers[0] if len(answers) == 1 else answers), tuple(after)


# ── graphs ──────────────────────────────────────────────────────────────────────────────────────────────────────────

STEPS = 6  # length of all sequences in a random graph
STREAMED = ["dense", "activation", "scale", "layer_norm", "recurrent", "causal", "select", "merge"]
WHOLE = [
    "conv",
    "pool1d",
    "masking",
    "bidirectional",
    "flatten",
    "reshape",
    "permute",
    "repeat",
    "pool",
    "last",
    "slice",
]


def make_graph(seed, dtype="float32", streams=False):
    """Return a random graph of one to three inputs, whose outputs are all unused values, and arrays for its inputs.

    `values` are `(name, steps, width)`, with steps = 0 for a vector. With `streams`, all nodes can be streamed.
    """
    rng = np.random.default_rng(seed)
    floats = lambda *shape: rng.normal(0, 0.6, size=shape).astype(dtype)  # noqa: E731
    nodes, names, wires, shapes, values, given = [], [], [], {}, [], {}

    def add(node, sources, steps, width):
        nodes.append(node)
        names.append(f"n{len(nodes)}")
        wires.append(tuple(sources))
        values.append((names[-1], steps, width))

    kinds = [str(kind) for kind in rng.choice(["ids", "sequence", "vector"], rng.integers(1, 4), p=[0.35, 0.5, 0.15])]
    for number, kind in enumerate(kinds):
        name, width = f"in{number}", int(rng.integers(2, 6))
        if kind == "ids":
            given[name], shapes[name] = rng.integers(0, 9, size=(3, STEPS)), (None,)
            add(Embedding(floats(9, width), not streams and bool(rng.integers(2))), [name], STEPS, width)
        elif kind == "vector" and not streams:
            given[name], shapes[name] = rng.normal(size=(3, width)).astype(dtype), (width,)
            values.append((name, 0, width))
        else:
            given[name], shapes[name] = rng.normal(size=(3, STEPS, width)).astype(dtype), (None, width)
            values.append((name, STEPS, width))
    for number in range(rng.integers(2, 9)):
        name, steps, width = values[rng.integers(len(values))]
        kind = (
            str(rng.choice(STREAMED + ([] if streams else WHOLE))) if number else "scale"
        )  # the first node determines the dtype
        if kind == "dense":
            units = int(rng.integers(1, 6))
            add(Dense(floats(width, units), floats(units), random_activation(rng)), [name], steps, units)
        elif kind == "activation":
            add(Activation(str(rng.choice(["softmax", "tanh", "linear", "hard_sigmoid"]))), [name], steps, width)
        elif kind == "scale":
            add(Scale(floats(width), floats(width)), [name], steps, width)
        elif kind == "layer_norm":
            add(LayerNorm(floats(width) if rng.integers(2) else None, None, 0.1), [name], steps, width)
        elif kind == "select" and width > 1:
            first = int(rng.integers(0, width - 1))
            add(Select(first, None, int(rng.integers(1, 3)), -1), [name], steps, len(range(first, width)))
            taken = nodes[-1]
            values[-1] = (names[-1], steps, len(range(*taken.taken.indices(width))))
        elif kind == "merge":
            mode = str(rng.choice(["concat", "add", "mul", "ave", "max", "sub"]))
            fits = [v for v in values if v[1] == steps and (mode == "concat" or v[2] == width)]
            others = [fits[i] for i in rng.integers(len(fits), size=1 if mode == "sub" else rng.integers(1, 3))]
            total = width + sum(other[2] for other in others) if mode == "concat" else width
            add(Merge(mode, -1 if not steps or rng.integers(2) else 2), [name, *(v[0] for v in others)], steps, total)
        elif kind == "flatten":
            add(Flatten(), [name], 0, max(1, steps) * width)
        elif kind == "reshape":
            add(Reshape((-1, width) if rng.integers(2) else (max(1, steps), width)), [name], max(1, steps), width)
        elif kind == "repeat" and not steps:
            add(Repeat(STEPS), [name], STEPS, width)
        elif steps:
            _add_over_time(rng, kind, add, floats, (name, steps, width), streams)
    used = set().union(*wires)
    shown = [name for name in names if name not in used] or names[-1:]
    for name in [name for name in given if name not in used]:  # every input has to be used
        nodes.append(Activation("softsign"))
        names.append(f"n{len(nodes)}")
        wires.append((name,))
        shown.append(names[-1])
    extra = [name for name in names if name not in shown][:1] if rng.integers(2) else []
    inputs = shapes if rng.integers(2) else tuple(shapes)
    if not streams and any(len(shape) == 1 and name not in _ids_of(wires, nodes) for name, shape in shapes.items()):
        inputs = shapes
    net = Network(nodes, names, {"seed": seed}, inputs=inputs, wires=wires, outputs=shown + extra)
    return net, given


def _ids_of(wires, nodes):
    return {sources[0] for sources, node in zip(wires, nodes, strict=True) if isinstance(node, Embedding)}


def _add_over_time(rng, kind, add, floats, value, streams):
    """Add a node that takes a sequence."""
    name, steps, width = value
    units = int(rng.integers(1, 6))
    dtype = floats(1).dtype.name
    if kind == "causal":
        taps, dilation = int(rng.integers(1, 4)), int(rng.integers(1, 3))
        add(Conv1D(floats(taps, width, units), floats(units), 1, "causal", dilation), [name], steps, units)
    elif kind == "recurrent":
        flags = {"go_backwards": not streams and bool(rng.integers(4) == 0), "residual": bool(rng.integers(2))}
        node = make_stack(rng, width, dtype, return_sequences=streams or bool(rng.integers(3)), **flags)
        add(node, [name], steps if node.return_sequences else 0, node.units)
    elif kind == "conv":
        taps, strides = int(rng.integers(1, 4)), int(rng.integers(1, 3))
        padding = [("valid", "same", "causal")[rng.integers(3)], (int(rng.integers(3)), 1)][rng.integers(2)]
        node = Conv1D(floats(taps, width, 2 * units), None, strides, padding, 1, 1, "tanh")
        left = node.check("", (steps, width))[0]
        if left:
            add(node, [name], left, 2 * units)
    elif kind == "pool1d":
        node = Pool1D(str(rng.choice(["max", "mean"])), 2, int(rng.integers(1, 3)), str(rng.choice(["valid", "same"])))
        left = node.check("", (steps, width))[0]
        if left:
            add(node, [name], left, width)
    elif kind == "masking":
        add(Masking(0.0), [name], steps, width)
    elif kind == "bidirectional":
        ahead = Recurrent((make_cell(rng, width, units, dtype),))
        back = Recurrent((make_cell(rng, width, units, dtype, kind="gru"),), go_backwards=True)
        add(Bidirectional(ahead, back), [name], steps, 2 * units)
    elif kind == "permute":
        add(Permute((2, 1)), [name], width, steps)
    elif kind in ("pool", "last"):
        add(GlobalPool(str(rng.choice(["mean", "max", "last"]))), [name], 0, width)
    elif kind == "slice":
        add(Select(None, None, -1), [name], steps, width)
