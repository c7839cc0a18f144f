"""The page's engine, run in Chromium, compared with the reference, forward and backward."""

import base64
import json
from dataclasses import asdict

import numpy as np
import pytest
from family import random_case, random_spec
from kinds import TESTED, of_seed
from networks import by_reference, fill, make_cell, make_graph, make_network, make_states
from safetensors import safe_open
from toy import ToyTrace, evaluate, register

from cellstack import CellSpec, Network, Patch, reference
from cellstack.cells.activations import ACTIVATIONS
from cellstack.cells.base import MatrixState
from cellstack.cells.spec import GATES, STATES, TRACES
from cellstack.inspect import html
from cellstack.inspect.payload import packed, payload_of
from cellstack.nodes import (
    MLSTM,
    NODES,
    Activation,
    Bidirectional,
    Clip,
    Context,
    Conv1D,
    Dense,
    Embedding,
    Flatten,
    Function,
    GlobalPool,
    GroupedDense,
    GroupNorm,
    LayerNorm,
    Magnitude,
    Masking,
    Merge,
    Pad,
    PerFrame,
    Permute,
    Pool1D,
    Power,
    Recurrent,
    Reduce,
    Repeat,
    Reshape,
    RMSNorm,
    Scale,
    Select,
    Skipped,
    Standardise,
    Take,
)
from cellstack.nodes.activations import MORE_ACTIVATIONS
from cellstack.reference import memory as reference_mlstm

NEAR = (
    1e-10  # float64 on both sides, relative to the greatest number above 1: sums in another order, other exp and tanh
)
DIFFERENCE = 1e-6  # of gradients with central differences of step 1e-6

# Helpers for the tests: arrays are passed as base64 of float64, which preserves NaN and every bit.
HARNESS = """
const names = "cellActivation, createTrainer, gradient, multiplications, readNetwork, run, unsupported, TASKS";
const module = new Blob([text, `export { ${names} };`], { type: "text/javascript" });
const engine = await import(URL.createObjectURL(module));
const isArray = (value) => ArrayBuffer.isView(value);
const pack = (value) => {
  if (isArray(value)) {
    const bytes = new Uint8Array(Float64Array.from(value).buffer);
    let found = "";
    for (let n = 0; n < bytes.length; n += 8192) found += String.fromCharCode(...bytes.subarray(n, n + 8192));
    return { packed: btoa(found) };
  }
  if (Array.isArray(value)) return value.map(pack);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, pack(inner)]));
};
const unpack = (value) => {
  if (Array.isArray(value)) return value.map(unpack);
  if (value === null || typeof value !== "object") return value;
  if (typeof value.data === "string") {
    const bytes = Uint8Array.from(atob(value.data), (letter) => letter.charCodeAt(0));
    return { data: new Float64Array(bytes.buffer), shape: value.shape };
  }
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, unpack(inner)]));
};
window.engine = engine;
window.cases = (text, work) => JSON.stringify(pack(JSON.parse(text).map((one) => {
  const { payload, ...rest } = one;
  const network = engine.readNetwork(payload);
  return work(network, unpack(rest));
})));
"""


@pytest.fixture(scope="module")
def text():
    return html.engine_text()


@pytest.fixture(scope="module")
def page(browser, text):
    page, said, asked = browser.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.evaluate("async (text) => {" + HARNESS + "}", text)
    yield page
    page.close()
    assert said == []
    assert [url for url in asked if not url.startswith("blob:")] == []


def plain(value):
    """Encode arrays for JSON."""
    if isinstance(value, np.ndarray):
        return packed(np.asarray(value, np.float64))
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def read(value):
    """Decode a result: values become arrays of their shape."""
    if isinstance(value, list):
        return [read(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"data", "shape"}:
        return np.frombuffer(base64.b64decode(value["data"]["packed"])).reshape(value["shape"])
    return {key: read(inner) for key, inner in value.items()}


def evaluated(page, work, cases):
    """Results of `work`, a JavaScript function of a network and the rest of a case, for each case."""
    sent = [
        {"payload": payload_of(case["network"]), **plain({key: case[key] for key in case if key != "network"})}
        for case in cases
    ]
    return read(json.loads(page.evaluate("(text) => cases(text, " + work + ")", json.dumps(sent))))


def near(found, expected, within=NEAR):
    found, expected = np.asarray(found), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    finite = np.isfinite(expected)
    assert np.array_equal(found[~finite], expected[~finite], equal_nan=True)
    bound = within * max(1.0, np.abs(expected[finite]).max(initial=0.0))
    assert np.abs(found[finite] - expected[finite]).max(initial=0.0) <= bound


RUN = "(network, { inputs, options }) => engine.run(network, inputs, options)"
GRADIENT = "(network, { inputs, options, of }) => engine.gradient(network, inputs, options, of)"


def inputs_of(net, x):
    return {name: np.asarray(x[name], np.float64) for name in net.inputs}


def one_cell(rng, spec, reverse=False):
    return Network([Recurrent((fill(rng, spec, "float64"),), go_backwards=reverse)], ["cell"], inputs=["x"])


def in_time(array, reverse):
    """The output of a backward node, in the order of time."""
    return array[:, ::-1] if reverse else array


# ── forward ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def networks(seeds):
    """Random networks with inputs: chains and graphs, of both dtypes, with masks, states and resets."""
    for seed in seeds:
        rng, dtype, kind = np.random.default_rng(seed), ("float32", "float64")[seed % 2], seed % 3
        if kind == 0:
            net, x = make_graph(seed, dtype)
        else:
            net = make_network(seed, dtype, streams=kind == 1)
            x = {net.inputs[0]: rng.normal(size=(3, 6, net.input_size)).astype(dtype)}
        first = next(iter(x.values()))
        timed = all(net.graph.timed(name) for name in net.inputs)
        options = {
            "state": make_states(rng, net, 3) if net.cells and rng.random() < 0.5 else None,
            "mask": rng.random(first.shape[:2]) < 0.7 if timed and rng.random() < 0.5 else None,
            "reset": rng.random(first.shape[:2]) < 0.3 if kind == 1 and rng.random() < 0.7 else None,
        }
        yield {"network": net, "inputs": inputs_of(net, x), "options": options}


@pytest.mark.long
def test_random_networks_are_run_as_the_reference_runs_them(page):
    made = list(networks(range(60)))
    for case, found in zip(made, evaluated(page, RUN, made), strict=True):
        net, options = case["network"], case["options"]
        y, states = by_reference(net, case["inputs"], options["state"], options["mask"], options["reset"])
        for name, answer in zip(net.outputs, y if isinstance(y, tuple) else (y,), strict=True):
            near(found["values"][name], answer)
        for after, state in zip(found["state"], states, strict=True):
            for part, array in zip(state._fields, state, strict=True):
                near(after[part], array)
    kinds = {node.file_type for case in made for node in case["network"].nodes}
    assert len(kinds) >= 17


def members(seeds):
    """Random cells with every flag, their arrays and a case each, without training-time randomness."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        spec = random_spec(rng, of_seed(seed))
        case = random_case(rng, spec)
        for drawn in ("recurrent_dropout", "zoneout", "zoneout_cell"):
            case[drawn] = None
        net = one_cell(rng, spec, case["reverse"])
        if case["reset"] is not None and case["reverse"]:
            case["given"] = np.zeros_like(case["reset"])  # `reset` in a backward direction
            case["given"][:, 1:] = case["reset"][:, :-1]
            case["reset"][:, -1] = False
        yield rng, net, spec, case


def sent_of(net, spec, case, **more):
    state = None if case["state"] is None else [STATES[spec.kind](*case["state"])]
    options = {"state": state, "mask": case["mask"], "reset": case.get("given", case["reset"]), "pre": True}
    return {"network": net, "inputs": {"x": case["x"]}, "options": options, **more}


def referred(net, spec, case):
    given = {key: value for key, value in case.items() if key not in ("given", "x", "state")}
    arrays = net.nodes[0].cells[0].arrays
    return arrays, reference.forward(spec, arrays, case["x"], case["state"], **given)


@pytest.mark.long
def test_gates_and_states_are_those_of_the_reference_for_every_flag(page):
    made = list(members(range(240)))
    answers = evaluated(page, RUN, [sent_of(net, spec, case) for _, net, spec, case in made])
    for (_, net, spec, case), found in zip(made, answers, strict=True):
        _, out = referred(net, spec, case)
        (fields,) = found["cells"]["cell"]
        for plane, gate in enumerate(GATES[spec.kind]):
            near(fields[gate], out.gates[:, :, plane])
        near(fields["h"], out.y)
        for name, array in zip(out.state._fields[1:], out.states, strict=True):
            near(fields[name], array)
        near(in_time(found["values"]["cell"], case["reverse"]), out.y)
        assert list(fields["pre"]) == list(spec.gates)
        for gate in spec.gates:
            sums = np.stack([step.sums[gate] for step in out.tape.steps], axis=1)
            near(fields["pre"][gate], np.where(out.tape.used, sums, 0.0))
    assert len({(spec.kind, *spec.settings) for _, _, spec, _ in made}) > 100


# ── backward ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
def test_gradients_of_cells_are_those_of_the_reference_for_every_flag(page):
    made, seeds = list(members(range(1000, 1120))), []
    for rng, net, spec, case in made:
        seeds.append(rng.standard_normal((*case["x"].shape[:2], spec.output_size)))
        del net
    cases = [
        sent_of(net, spec, case, of={"seeds": {"cell": np.ascontiguousarray(in_time(dy, case["reverse"]))}})
        for (_, net, spec, case), dy in zip(made, seeds, strict=True)
    ]
    for (_, net, spec, case), dy, found in zip(made, seeds, evaluated(page, GRADIENT, cases), strict=True):
        arrays, out = referred(net, spec, case)
        expected = reference.backward(spec, arrays, out, dy=dy)
        near(found["inputs"]["x"], expected.x)
        assert found["arrays"]["cell"][0].keys() == expected.arrays.keys()
        for name, array in expected.arrays.items():
            near(found["arrays"]["cell"][0][name], array)
        for part, array in zip(expected.state._fields, expected.state, strict=True):
            near(found["state"][0][part], array)


@pytest.mark.long
def test_the_gradient_of_one_number_of_a_cell_is_that_of_the_reference(page):
    made, cases, wanted = list(members(range(2000, 2120))), [], []
    for rng, net, spec, case in made:
        arrays, out = referred(net, spec, case)
        gate = str(rng.choice([*GATES[spec.kind], *(["c"] if spec.state_sizes.keys() == {"h", "c"} else []), "h"]))
        width = spec.output_size if gate == "h" else spec.units
        row, step, unit = (int(rng.integers(n)) for n in (*case["x"].shape[:2], width))
        whole = {
            "dy": np.zeros_like(out.y),
            "dgates": np.zeros_like(out.gates),
            "dstates": [np.zeros_like(array) for array in out.states],
        }
        if gate in spec.state_sizes:
            (whole["dy"] if gate == "h" else whole["dstates"][0])[row, step, unit] = 1.0
        else:
            whole["dgates"][row, step, GATES[spec.kind].index(gate), unit] = 1.0
        wanted.append(reference.backward(spec, arrays, out, **whole))
        of = {"node": "cell", "cell": 0, "gate": gate, "row": row, "step": step, "unit": unit}
        cases.append(sent_of(net, spec, case, of=of))
    for expected, found in zip(wanted, evaluated(page, GRADIENT, cases), strict=True):
        near(found["inputs"]["x"], expected.x)
        for name, array in expected.arrays.items():
            near(found["arrays"]["cell"][0][name], array)


SLOPES = """(network, { inputs, options, seeds, along, still }) => {
  const found = engine.gradient(network, inputs, options, { seeds });
  const loss = () => {
    const { values } = engine.run(network, inputs, { ...options, pre: false });
    let sum = 0;
    for (const [name, seed] of Object.entries(seeds)) seed.data.forEach((w, n) => { sum += w * values[name].data[n]; });
    return sum;
  };
  // Everything that has a gradient is moved along a direction, all at once.
  const pairs = [];
  for (const [name, slope] of Object.entries(found.inputs)) if (slope) pairs.push([inputs[name].data, slope.data]);
  for (const node of network.nodes) {
    found.arrays[node.name].forEach((slopes, n) => {
      const arrays = node.cells.length ? node.cells[n].arrays : node.arrays;
      for (const [name, { data }] of Object.entries(slopes)) pairs.push([arrays[name].data, data]);
    });
  }
  let at = 0;
  const next = () => along.data[at++ % along.data.length];
  const ways = pairs.map(([data]) => Float64Array.from(data, (x) => (x === still ? 0 : next())));
  const predicted = pairs.reduce((sum, [, slope], k) => slope.reduce((own, d, n) => own + d * ways[k][n], sum), 0);
  const moved = (step) => {
    pairs.forEach(([data], k) => { ways[k].forEach((way, n) => { data[n] += step * way; }); });
    const value = loss();
    pairs.forEach(([data], k) => { ways[k].forEach((way, n) => { data[n] -= step * way; }); });
    return value;
  };
  return { predicted, seen: (moved(1e-6) - moved(-1e-6)) / 2e-6, loss: loss() };
}"""


def with_seeds(rng, case, shapes):
    seeds = {name: rng.standard_normal(shapes[name]) for name in case["network"].outputs}
    return {**case, "seeds": seeds, "along": rng.standard_normal(4999)}


def agree(page, made):
    """Compare the gradients of a random loss with its central difference along a random direction."""
    for case, found in zip(made, evaluated(page, SLOPES, made), strict=True):
        bound = DIFFERENCE * max(1.0, abs(found["predicted"]), abs(found["loss"]))
        assert abs(found["predicted"] - found["seen"]) <= bound, (str(case["network"]), found)


@pytest.mark.slow
def test_gradients_of_random_networks_are_their_differences(page):
    rng, made = np.random.default_rng(0), []
    for case in networks(range(3000, 3120)):
        options = case["options"]
        y, _ = by_reference(case["network"], case["inputs"], options["state"], options["mask"], options["reset"])
        answers = dict(zip(case["network"].outputs, y if isinstance(y, tuple) else (y,), strict=True))
        made.append(with_seeds(rng, case, {name: answer.shape for name, answer in answers.items()}))
    agree(page, made)


# ── every kind of node ────────────────────────────────────────────────────────────────────────────────────────────────


def floats(rng, *shape):
    return rng.normal(0, 0.6, size=shape)


def every_node():
    """Each kind of node and mode, in a small network: with inputs, a mask if it supports one, and no ties."""
    rng = np.random.default_rng(7)
    sequence = {"x": rng.normal(size=(2, 7, 4))}
    mask = np.array([[True, False, True, True, False, True, False], [False] * 7])
    reset = np.array([[False, True, False, False, True, False, False], [True, False, False, True, False, False, True]])
    alone = []

    def add(*nodes, inputs=None, x=None, wires=None, names=None, outputs=None, **options):
        x = sequence if x is None else x
        for node in nodes:  # a network is float64 where a node has arrays
            assert node.dtype in (None, np.dtype("float64"))
        net = Network(nodes, names, inputs=inputs or list(x), wires=wires, outputs=outputs)
        alone.append({"network": net, "inputs": x, "options": options})

    # A node that only moves numbers fixes neither its dtype nor the width of its input.
    first = Scale(floats(rng, 4) + 1.0, floats(rng, 4))
    for activation in [*ACTIVATIONS, *MORE_ACTIVATIONS]:
        add(Dense(floats(rng, 4, 3), floats(rng, 3), activation))
        add(first, Activation(activation))
    add(Dense(floats(rng, 4, 3)))
    add(Standardise(floats(rng, 4), floats(rng, 4) + 2.0), mask=mask)
    add(first, Clip(-0.5, 0.7))
    add(first, Clip(low=-0.5))
    for function in ("abs", "cos", "sin"):
        add(first, Function(function))
    add(first, Function("abs"), Function("log"))
    for exponent in (2.0, -1.0, 3.0):
        add(first, Power(exponent))
    add(first, Function("abs"), Power(0.5))
    add(LayerNorm(floats(rng, 4), floats(rng, 4)))
    add(LayerNorm(None, floats(rng, 4), 0.1))
    add(first, LayerNorm())
    add(RMSNorm(floats(rng, 4), floats(rng, 4)))
    add(first, RMSNorm(epsilon=0.1))
    add(GroupNorm(2, floats(rng, 4), floats(rng, 4), over_time=False))
    add(first, GroupNorm(4, epsilon=0.1, over_time=False))
    add(GroupedDense(floats(rng, 2, 2, 3), floats(rng, 6)))
    add(GroupedDense(floats(rng, 4, 1, 2)))
    add(Skipped((None, 4), (Dense(floats(rng, 4, 2)), Reshape((-1, 4))), ((0,), (1,))))
    ids = {"x": np.array([[0, 3, 1, 0, 2, 5, 4], [1, 1, 0, 5, 0, 2, 3]], float)}
    for mask_zero in (False, True):
        add(Embedding(floats(rng, 6, 3), mask_zero), GlobalPool("mean"), x=ids, inputs={"x": (None,)}, mask=mask)
    add(Embedding(floats(rng, 6, 3), True), make_stacked(rng, 3), x=ids, inputs={"x": (None,)})
    add(Select(1, 6), Embedding(floats(rng, 6, 3)), x=ids, inputs={"x": (None,)}, mask=mask)
    masked = {"x": np.where(rng.random((2, 7, 1)) < 0.5, 0.25, sequence["x"])}
    add(Masking(0.25), Scale(floats(rng, 4), floats(rng, 4)), GlobalPool("mean"), x=masked, mask=mask)
    for padding in ("valid", "same", "causal", (2, 1)):
        for strides, dilation, groups in ((1, 1, 1), (2, 1, 2), (1, 2, 1), (3, 1, 1)):
            kernel, bias = floats(rng, 3, 4 // groups, 6), floats(rng, 6)
            add(Conv1D(kernel, bias, strides, padding, dilation, groups, "tanh"))
        for mode in ("mean", "max"):
            add(first, Pool1D(mode, 3, 2, padding))
    add(Conv1D(floats(rng, 1, 4, 2)), make_stacked(rng, 2), mask=mask, reset=reset)
    for mode in ("mean", "max", "last"):
        add(first, GlobalPool(mode), mask=mask)
        add(first, GlobalPool(mode))
    for mode in ("sum", "mean", "max", "min"):
        for axis in (1, 2, -1, -2):
            add(first, Reduce(mode, axis, True), mask=mask)
            add(first, Reduce(mode, axis), mask=mask)
    for axis in (1, 2, -1):
        add(first, Pad(2, 1, 0.5, axis), GlobalPool("mean"), mask=mask)  # the pool reveals the resulting mask
        for taken in ((1, None, 2), (None, -1, 1), (-2, 0, -1), (None, None, -3)):
            add(first, Select(*taken, axis), mask=mask)
    add(first, Select(1, None, 2), make_stacked(rng, 4), mask=mask, reset=reset)
    add(first, Flatten())
    add(first, Reshape((14, 2)))
    add(first, Reshape((2, -1, 7)), Permute((3, 1, 2)))
    add(first, Permute((2, 1)))
    add(Scale(floats(rng, 4), floats(rng, 4)), Repeat(3), x={"x": rng.normal(size=(2, 4))}, inputs={"x": (4,)})
    other = np.array([[False, False, True, False, False, True, True], [True, False, False, False, True, True, False]])
    pair = {"x": sequence["x"], "z": rng.normal(size=(2, 7, 4))}
    for mode in ("concat", "add", "mul", "ave", "max", "min", "sub"):
        for masks in (None, mask, {"x": mask, "z": other}, {"z": other}):
            nodes = [first, Merge(mode, -1)]
            add(*nodes, x=pair, names=["s", "m"], wires=[("x",), ("s", "z")], mask=masks)
            pooled = [*nodes, GlobalPool("mean")]  # reveals the resulting masks
            add(*pooled, x=pair, names=["s", "m", "p"], wires=[("x",), ("s", "z"), ("m",)], mask=masks)
    long = {"x": sequence["x"], "z": rng.normal(size=(2, 3, 4))}
    joined = {"x": mask, "z": other[:, :3]}
    for masks in (None, joined, {"z": other[:, :3]}):
        add(first, Merge("concat", 1), GlobalPool(), x=long, names=["s", "m", "p"],
            wires=[("x",), ("s", "z"), ("m",)], mask=masks)  # fmt: skip
    wide = {"x": sequence["x"], "z": rng.normal(size=(2, 1, 4)), "w": rng.normal(size=(2, 7, 1))}
    add(first, Merge("mul"), Merge("add"), x=wide, inputs={"x": (None, 4), "z": (1, 4), "w": (None, 1)},
        names=["s", "m", "p"], wires=[("x",), ("s", "z"), ("m", "w")])  # fmt: skip
    for sequences in (True, False):
        for flags in ({"mask": mask}, {"reset": reset}, {"mask": mask, "reset": reset}):
            for backwards in (True, False):
                add(make_stacked(rng, 4, sequences, go_backwards=backwards, zero_output_for_mask=True), **flags)
                add(make_stacked(rng, 4, True, go_backwards=backwards), make_stacked(rng, 4, sequences), **flags)
            for node in (MLSTM(2, 2, 3), MLSTM(3, 4, 1, output_gate=True)):
                add(Dense(rng.normal(size=(4, node.input_size))), node, **flags)
            for merge in ("concat", "sum", "mul", "ave"):
                ahead, back = make_stacked(rng, 4, sequences), make_stacked(rng, 4, sequences, go_backwards=True)
                add(Bidirectional(ahead, back, merge), **flags)
    return alone


def make_stacked(rng, inputs, sequences=True, **flags):
    """Cells of every kind, with residual sums over the upper two."""
    kinds = tuple(GATES)
    cells = [make_cell(rng, inputs if n == 0 else 4, 4, "float64", kind=kind) for n, kind in enumerate(kinds)]
    return Recurrent(tuple(cells), sequences, residual=True, **flags)


@pytest.mark.long
def test_every_kind_of_node_is_run_as_the_network_runs_it(page):
    made = every_node()
    kinds = {node.file_type for case in made for node in case["network"].nodes}
    refused = {"take", "magnitude", "context", "per_frame", "step_mask"}
    refused |= {"grid_conv", "grid_pool", "time_softmax", "attention", "repeat_like"}
    assert kinds == set(NODES) - refused
    for case, found in zip(made, evaluated(page, RUN, made), strict=True):
        net, options = case["network"], case["options"]
        t = net.trace(case["inputs"], mask=options.get("mask"), reset=options.get("reset"))
        for name in net.names:
            near(found["values"][name], t[name].y)


@pytest.mark.long
def test_masking_compares_in_the_dtype_of_the_network(page):
    net = Network([Scale(np.ones(1, "float32"), np.zeros(1, "float32")), Masking(0.1)], inputs=["x"])
    x = np.array([[[np.float32(0.1)], [2.0]]], np.float64)
    (found,) = evaluated(page, RUN, [{"network": net, "inputs": {"x": x}}])
    near(found["values"]["layer_1"], net(x))
    assert found["values"]["layer_1"].ravel().tolist() == [0.0, 2.0]


@pytest.mark.long
def test_gradients_of_every_kind_of_node_are_their_differences(page):
    rng, made = np.random.default_rng(1), []
    for case in every_node():
        net, options = case["network"], case["options"]
        y = net.run(case["inputs"], mask=options.get("mask"), reset=options.get("reset"))[0]
        made.append(
            with_seeds(rng, {**case, "still": 0.25}, {net.outputs[0]: y.shape})
        )  # the value that `Masking` masks
    agree(page, made)


# ── memories ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def memories(seeds):
    """Random memories of mLSTMs: their node, the arguments of the reference, the gradient of h, and a case each."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        heads, keys, values, batch, steps = (int(rng.integers(1, most)) for most in (4, 5, 5, 4, 9))
        node = MLSTM(heads, keys, values, float(rng.choice([0.0, 1e-6, 0.1])), output_gate=bool(seed % 2))
        x = rng.normal(scale=2.0, size=(batch, steps, node.input_size))
        state = None
        if rng.random() < 0.6:
            state = MatrixState(*(rng.normal(size=(batch, *shape)) for shape in node.memory.state_shapes.values()))
        flags = [rng.random((batch, steps)) < share if rng.random() < 0.6 else None for share in (0.7, 0.3)]
        options = {"mask": flags[0], "reset": flags[1], "pre": True}
        if state is not None:
            options["state"] = [{name: array.reshape(batch, -1) for name, array in state._asdict().items()}]
        network = Network(
            [Scale(np.ones(node.input_size), np.zeros(node.input_size)), node], ["x_", "memory"], inputs=["x"]
        )
        dy = rng.standard_normal((batch, steps, node.units))
        case = {"network": network, "inputs": {"x": x}, "options": options, "of": {"seeds": {"memory": dy}}}
        inputs = reference_mlstm.split(x[..., : node.core_size], heads, keys, values)
        before = reference_mlstm.zero_state(batch, heads, keys, values) if state is None else state
        yield node, inputs, before, flags, case


def test_memories_are_run_as_the_reference_runs_them(page):
    made = list(memories(range(60)))
    for (node, inputs, before, (mask, reset), case), found in zip(
        made, evaluated(page, RUN, [case for *_, case in made]), strict=True
    ):
        x = case["inputs"]["x"]
        h, after = reference_mlstm.steps(inputs, before, node.epsilon, mask, reset)
        gates = reference_mlstm.fields_of(inputs, before, mask, reset)
        used = np.ones(x.shape[:2], bool) if mask is None else mask
        o = 1 / (1 + np.exp(-x[..., node.core_size :])) if node.output_gate else 1.0
        near(found["values"]["memory"], h.reshape(*x.shape[:2], -1) * o)
        (fields,) = found["cells"]["memory"]
        near(fields["i"], gates.i)
        near(fields["f"], np.where(used[..., None], gates.f, 0))
        near(fields["m"], gates.m)
        for name, array in after._asdict().items():
            near(found["state"][0][name], array.reshape(len(x), -1))
        near(fields["n"][:, -1], after.n.reshape(len(x), -1))
        for name, array in inputs._asdict().items():
            if name in "qkv":
                near(fields[name], np.where(used[..., None], array.reshape(*x.shape[:2], -1), 0))


def test_gradients_of_memories_are_those_of_the_reference(page):
    made = list(memories(range(100, 160)))
    answers = evaluated(page, GRADIENT, [case for *_, case in made])
    for (node, inputs, before, (mask, reset), case), found in zip(made, answers, strict=True):
        x, dy = case["inputs"]["x"], case["of"]["seeds"]["memory"]
        z_o = x[..., node.core_size :]
        o = 1 / (1 + np.exp(-z_o)) if node.output_gate else np.ones_like(dy)
        zeros = MatrixState(*map(np.zeros_like, before))
        dh = (dy * o).reshape(inputs.v.shape)
        dx, dbefore = reference_mlstm.backward(inputs, before, dh, zeros, node.epsilon, mask, reset)
        parts = [array.reshape(*x.shape[:2], -1) for array in dx]
        if node.output_gate:
            h, _ = reference_mlstm.steps(inputs, before, node.epsilon, mask, reset)
            parts.append(dy * h.reshape(dy.shape) * o * (1 - o))
        near(found["inputs"]["x"], np.concatenate(parts, axis=-1))
        for name, array in dbefore._asdict().items():
            near(found["state"][0][name], array.reshape(len(x), -1))


DIFFERENCES = """(network, { inputs, options, of, along }) => {
  const found = engine.gradient(network, inputs, options, of).inputs.x.data;
  const { data } = inputs.x;
  const moved = (step) => {
    along.data.forEach((way, n) => { data[n] += step * way; });
    const { data: field, shape: [, steps, width] } = engine.run(network, inputs, options).cells.memory[0][of.gate];
    along.data.forEach((way, n) => { data[n] -= step * way; });
    return field[(of.row * steps + of.step) * width + of.unit];
  };
  const predicted = found.reduce((sum, d, n) => sum + d * along.data[n], 0);
  return { predicted, seen: (moved(1e-6) - moved(-1e-6)) / 2e-6 };
}"""


def test_the_gradient_of_one_number_of_a_memory_is_its_difference(page):
    rng, cases = np.random.default_rng(0), []
    for number, (node, inputs, _, (mask, _), case) in enumerate(memories(range(200, 264))):
        name = "qkvifmnh"[number % 8]
        width = {"i": node.heads, "f": node.heads, "m": node.heads, "v": node.units, "h": node.units}
        unit = int(rng.integers(width.get(name, node.heads * node.key_size)))
        of = {"node": "memory", "cell": 0, "gate": name, "row": 0, "step": inputs.i.shape[1] - 1, "unit": unit}
        cases.append({**case, "of": of, "along": rng.standard_normal(case["inputs"]["x"].shape)})
        if mask is not None:
            mask[0, -1] = True  # else most of them are 0
    found = evaluated(page, DIFFERENCES, cases)
    assert sum(one["predicted"] != 0 for one in found) > 50
    for one in found:
        assert one["predicted"] == pytest.approx(one["seen"], rel=1e-5, abs=1e-6)


# ── patches ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def random_patches(rng, spec, batch, steps):
    """One to four patches of gates and states, which often overlap."""
    names, patches = [*GATES[spec.kind], *(["c"] if spec.kind == "lstm" else []), "h"], []
    for _ in range(rng.integers(1, 5)):
        gate = str(rng.choice(names))
        width = spec.output_size if gate == "h" else spec.units
        some = lambda n: [int(k) for k in rng.choice(n, rng.integers(1, n + 1), replace=False)]  # noqa: E731
        ranges = [
            [int(rng.integers(steps)), None, int(rng.integers(1, 3))],
            [-3, -1, 1],
            [None, None, -1],
            {"start": 1, "stop": 4, "step": None},
            {"numbers": some(steps)},
        ]
        patch = {
            "node": "cell",
            "cell": 0,
            "gate": gate,
            "units": some(width) if rng.random() < 0.7 else None,
            "rows": some(batch) if rng.random() < 0.5 else None,
            "steps": ranges[rng.integers(len(ranges))] if rng.random() < 0.7 else None,
            "how": str(rng.choice(["set", "add", "scale", "freeze"])),
            "value": round(float(rng.normal(0, 0.7)), 2),
        }
        if rng.random() < 0.4:
            whole = [len(entries) for entries in entries_of(patch, batch, steps, width)]
            patch["value"] = rng.normal(0, 0.7, [n if rng.random() < 0.6 else 1 for n in whole][rng.integers(3) :])
        patches.append(patch)
    return patches


def entries_of(patch, batch, steps, width):
    """The rows, steps and units that a patch names, in their order."""
    found = []
    for name, length in (("rows", batch), ("steps", steps), ("units", width)):
        index = patch[name]
        if isinstance(index, dict):
            index = index.get("numbers") or list(range(length)[index["start"] : index["stop"] : index["step"]])
        elif index is None:
            index = list(range(length))
        elif name == "steps":
            index = list(range(length)[slice(*index)])
        found.append(index)
    return found


def patched_fields(spec, arrays, case, patches):
    """The fields of a cell with patches, each `[B, T, ·]`, by the reference."""
    shape, last = case["x"].shape[:2], {}  # last: the gates after each row's last step, if it had one

    def changed(name, t, value, before):
        value = np.array(value)
        rows = range(len(value)) if case["mask"] is None else np.flatnonzero(case["mask"][:, t])
        for row in rows:
            gate = before is None
            now, previous = value[row], last.get((name, row)) if gate else before[row]
            for patch in patches:
                if patch["gate"] != name:
                    continue
                entries = entries_of(patch, *shape, value.shape[1])
                if row not in entries[0] or t not in entries[1]:
                    continue
                given, units = np.broadcast_to(patch["value"], tuple(map(len, entries))), entries[2]
                number = given[entries[0].index(row), entries[1].index(t)]
                if patch["how"] == "set":
                    now[units] = number
                elif patch["how"] == "add":
                    now[units] += number
                elif patch["how"] == "scale":
                    now[units] *= number
                elif previous is not None:
                    now[units] = previous[units]
            if gate:
                last[name, row] = now
        return value

    given = {name: value for name, value in case.items() if name != "given"}
    out = reference.forward(spec, arrays, **given, patched=changed)
    gates = dict(zip(GATES[spec.kind], np.moveaxis(out.gates, 2, 0), strict=False))
    return {**gates, "h": out.y, **dict(zip(out.state._fields[1:], out.states, strict=True))}


def patched_cases(seeds):
    for rng, net, spec, case in members(seeds):
        batch, steps, _ = case["x"].shape
        patches = random_patches(rng, spec, batch, steps)
        sent = sent_of(net, spec, case)
        sent["options"]["patches"] = patches
        yield rng, net, spec, case, patches, sent


@pytest.mark.long
def test_patches_act_where_specified(page):
    made = list(patched_cases(range(4000, 4300)))
    answers = evaluated(page, RUN, [sent for *_, sent in made])
    for (_, net, spec, case, patches, _), found in zip(made, answers, strict=True):
        fields = patched_fields(spec, net.nodes[0].cells[0].arrays, case, patches)
        for name in found["cells"]["cell"][0].keys() - {"pre"}:
            near(found["cells"]["cell"][0][name], fields[name])


def patched_memories(seeds):
    """Networks with patches of an mLSTM, and a case each."""
    for node, _, _, (mask, reset), case in memories(seeds):
        batch, steps, width = case["inputs"]["x"].shape
        rng, patches = np.random.default_rng(width), []
        for name in rng.choice(node.memory.of_kind.trace._fields, 3):
            width = int(np.prod(node.memory.trace_shapes[name]))
            how, unit, first = (
                str(rng.choice(["set", "add", "scale", "freeze"])),
                rng.integers(width),
                rng.integers(steps),
            )
            value = None if how == "freeze" else rng.normal()
            patches.append(Patch("memory", str(name), unit, rng.integers(batch), slice(first, None), value, how))
        net = case["network"].edit(patches)
        yield net, (mask, reset), {**case, "network": net}


@pytest.mark.long
def test_patches_of_memories_are_those_of_a_run(page):
    made = list(patched_memories(range(300, 360)))
    answers = evaluated(page, RUN, [case for *_, case in made])
    for (net, (mask, reset), case), found in zip(made, answers, strict=True):
        state = None
        if "state" in case["options"]:
            shapes = net.stateful[0].state_shapes
            of = case["options"]["state"][0]
            state = (MatrixState(*(of[name].reshape(-1, *shape) for name, shape in shapes.items())),)
        t = net.trace(case["inputs"]["x"], state, mask, reset=reset)
        for name in t["memory"].fields._fields:
            near(found["cells"]["memory"][0][name], t["memory"].flat(name))
        near(found["values"]["memory"], t.y)


@pytest.mark.long
def test_gradients_through_patches_of_memories_are_their_differences(page):
    agree(
        page,
        [
            with_seeds(np.random.default_rng(0), case, {"memory": case["of"]["seeds"]["memory"].shape})
            for *_, case in patched_memories(range(400, 430))
        ],
    )


def test_patches_of_a_network_act_before_those_of_a_run(page):
    rng = np.random.default_rng(0)
    net, x = one_cell(rng, CellSpec(2, 3)), rng.normal(size=(2, 6, 2))
    payload = payload_of(net)  # as in a native file
    payload["description"]["patches"] = [
        {"node": "cell", "gate": "h", "how": "set", "units": [0, 2], "steps": [1, 2, 4], "value": [3, 1]},
        {"node": "cell", "gate": "f", "how": "freeze", "steps": {"start": 2, "stop": None, "step": None}},
        {"node": "cell", "gate": "o", "how": "set", "steps": {"start": 4, "stop": 9, "step": 1}, "value": [5, 1]},
    ]
    payload["arrays"]["patch/0/value"] = packed(np.array([[1.0], [2.0], [3.0]]))
    payload["arrays"]["patch/2/value"] = packed(np.arange(5.0)[:, None])  # for more steps than the run has
    doubled = {"node": "cell", "cell": 0, "gate": "h", "units": [2], "how": "scale", "value": 2.0}
    work = "(text) => cases(text, " + RUN + ")"
    sent = [{"payload": payload, "inputs": plain({"x": x}), "options": {"patches": [doubled]}}]
    (fields,) = read(json.loads(page.evaluate(work, json.dumps(sent))))[0]["cells"]["cell"]
    assert (fields["h"][:, [1, 2, 4], 0] == [1.0, 2.0, 3.0]).all()
    assert (fields["h"][:, [1, 2, 4], 2] == [2.0, 4.0, 6.0]).all()
    assert (fields["f"][:, 2:] == fields["f"][:, 1:2]).all()
    assert (fields["o"][:, 4:] == [[[0.0], [1.0]]]).all()
    assert (np.diff(fields["f"][:, :2], axis=1) != 0).all()
    payload["description"]["heads"] = 2
    work = "(payload) => engine.unsupported(engine.readNetwork(payload))"
    assert page.evaluate(work, payload) == ["The network's heads aren't supported."]


@pytest.mark.long
def test_gradients_through_patches_are_their_differences(page):
    made = []
    for rng, _, spec, case, _, sent in patched_cases(range(5000, 5060)):
        made.append(with_seeds(rng, sent, {"cell": (*case["x"].shape[:2], spec.output_size)}))
    agree(page, made)


BY_FIELDS = """(network, { inputs, options, seeds, places }) => {
  const { cells } = engine.gradient(network, inputs, options, { seeds });
  return places.map(({ gate, row, step, unit }) => {
    const { data, shape } = cells.cell[0][gate];
    const loss = (value) => {
      const where = { node: "cell", cell: 0, gate, rows: [row], steps: [step, step + 1, 1], units: [unit] };
      const patch = { ...where, how: "add", value };
      const { values } = engine.run(network, inputs, { ...options, patches: [patch] });
      return values.cell.data.reduce((sum, y, n) => sum + y * seeds.cell.data[n], 0);
    };
    return { predicted: data[(row * shape[1] + step) * shape[2] + unit], seen: (loss(1e-6) - loss(-1e-6)) / 2e-6 };
  });
}"""


@pytest.mark.long
def test_gradients_of_gates_and_states_equal_differences(page):
    made = []
    for rng, net, spec, case in members(range(6100, 6140)):
        if spec.zoneout_cell:  # φ then uses a different c than the kept one, and a patch changes both
            continue
        batch, steps, _ = case["x"].shape
        names = [*GATES[spec.kind], *(["c"] if spec.kind == "lstm" else []), "h"]
        places = [
            {"gate": gate, "row": int(rng.integers(batch)), "step": step,
             "unit": int(rng.integers(spec.output_size if gate == "h" else spec.units))}
            for gate in names for step in range(steps)
        ]  # fmt: skip
        if case["mask"] is not None:  # masked steps aren't patched
            places = [place for place in places if case["mask"][place["row"], place["step"]]]
        sent = sent_of(net, spec, case, places=places)
        made.append(with_seeds(rng, sent, {"cell": (batch, steps, spec.output_size)}))
    for one, found in zip(made, evaluated(page, BY_FIELDS, made), strict=True):
        for place in found:
            assert abs(place["predicted"] - place["seen"]) <= DIFFERENCE * max(1.0, abs(place["predicted"])) * 10, (
                str(one["network"]),
                place,
            )


def test_a_patch_of_one_of_two_directions_leaves_the_other(page):
    rng = np.random.default_rng(0)
    both = Bidirectional(
        Recurrent((make_cell(rng, 3, 4, "float64"),)),
        Recurrent((make_cell(rng, 3, 5, "float64", kind="gru"),), go_backwards=True),
    )
    net, x = Network([both], ["both"], inputs=["x"]), {"x": rng.normal(size=(2, 6, 3))}
    patch = {"node": "both", "cell": 1, "gate": "h", "units": [2], "steps": [1, 3, 1], "how": "set", "value": 0.5}
    one, other = evaluated(page, RUN, [{"network": net, "inputs": x, "options": {"patches": p}} for p in ([], [patch])])
    assert np.array_equal(one["values"]["both"][:, :, :4], other["values"]["both"][:, :, :4])
    assert (other["values"]["both"][:, 1:3, 6] == 0.5).all()
    moved = one["values"]["both"][:, :, 4:] != other["values"]["both"][:, :, 4:]
    assert moved[:, :3].any(axis=(0, 2)).all()  # it runs from the end, so earlier steps change
    assert not moved[:, 3:].any()


# ── edges ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("batch", "steps"), [(0, 5), (3, 0), (0, 0)])
def test_no_rows_and_no_steps(page, batch, steps):
    rng, made = np.random.default_rng(0), []
    for sequences in (True, False):
        for node in (
            make_stacked(rng, 4, sequences),
            make_stacked(rng, 4, sequences, go_backwards=True),
            Bidirectional(make_stacked(rng, 4, sequences), make_stacked(rng, 4, sequences, go_backwards=True)),
        ):
            after = [Dense(floats(rng, node.check("", (None, 4))[-1], 2), None, "softmax")]
            after += [GlobalPool("max")] if sequences else []
            net = Network([node, *after], inputs=["x"])
            state = make_states(rng, net, batch)
            made.append({"network": net, "inputs": {"x": np.zeros((batch, steps, 4))}, "options": {"state": state}})
    for case, found in zip(made, evaluated(page, RUN, made), strict=True):
        y, after = case["network"].run(case["inputs"], case["options"]["state"])
        near(found["values"][case["network"].outputs[0]], y)
        for one, state in zip(found["state"], after, strict=True):
            near(one["h"], state.h)
    for case in made:
        net = case["network"]
        case["of"] = {"seeds": {net.outputs[0]: rng.normal(size=(batch, 2))}}
    for case, found in zip(made, evaluated(page, GRADIENT, made), strict=True):
        assert found["inputs"]["x"].shape == (batch, steps, 4)
        moved = any(array.any() for cell in found["state"] for array in cell.values())
        assert moved == (batch > 0 and steps == 0 and case["network"].nodes[0].axes[1] == 1)  # y is then the previous h


def test_nan_and_infinity_propagate_except_at_masked_steps(page):
    rng, made = np.random.default_rng(0), []
    for kind in GATES:
        cell = make_cell(rng, 3, 4, "float64", kind=kind, activation="tanh")  # bounded, so infinity isn't NaN
        net = Network([Recurrent((cell,)), Dense(floats(rng, 4, 2), None, "tanh")], inputs=["x"])
        for bad in (np.nan, np.inf, -np.inf):
            x = rng.normal(size=(2, 5, 3))
            x[0, 2, 1] = bad
            masks = (None, np.isfinite(x).all(axis=-1))
            made += [{"network": net, "inputs": {"x": x}, "options": {"mask": mask}} for mask in masks]
    for case, found in zip(made, evaluated(page, RUN, made), strict=True):
        with np.errstate(invalid="ignore"):  # some BLAS libraries warn of infinity times zero
            y, _ = by_reference(case["network"], case["inputs"], mask=case["options"]["mask"])
        near(found["values"]["layer_1"], y)
        spoilt = np.isnan(y)
        assert not spoilt[1].any()
        masked, x = case["options"]["mask"] is not None, case["inputs"]["x"]
        kind = case["network"].cells[0].spec.kind
        undefined = not TESTED[kind].finite or kind == "cfc"  # 0/0 where i and f are 0; inf - inf
        if masked or not np.isinf(x).any() or not undefined:
            assert spoilt[0, 2:].all() == (not masked and np.isnan(x).any())


# ── unsupported networks and invalid inputs ───────────────────────────────────────────────────────────────────────────


@pytest.mark.long
def test_unsupported_parts_are_named_and_never_run(page):
    rng = np.random.default_rng(0)
    net = Network([make_stacked(rng, 3), Dense(floats(rng, 4, 2))], ["stack", "head"], inputs=["x"])
    spoil = {
        "network.nodes[1].type = 'attention'": "head: a node of the type attention isn't supported.",
        "network.nodes[1].settings.heads = 4": "head: the setting heads of dense isn't supported.",
        "network.nodes[1].settings.activation = 'mish'": "head: the activation mish isn't supported.",
        "network.nodes[1].arrays.gate = { shape: [2] }": "head: the array gate of dense isn't supported.",
        "network.nodes[0].cells[0].spec.kind = 'xlstm'": "stack, cell 0: a cell of the kind xlstm isn't supported.",
        "network.nodes[0].cells[1].spec.depth = 2": "stack, cell 1: the setting depth isn't supported.",
        "network.nodes[0].cells[1].form.values.at(-1).operation = 'max'": "stack, cell 1: a cell of the kind gru isn't "
        "supported.",
        "network.nodes[0].cells[2].form.activations.g = 'sin'": "stack, cell 2: the activation sin of g isn't "
        "supported.",
        "delete network.nodes[0].cells[2].arrays.bias": "stack, cell 2: expected the array bias [4], got [].",
        "network.nodes[0].settings.stateful = true": "stack: the setting stateful of recurrent isn't supported.",
    }
    for change, sentence in spoil.items():
        work = "(network) => { " + change + "; let said = ''; "
        work += "try { engine.run(network, {}); } catch (error) { said = error.message; } "
        work += "return [engine.unsupported(network), said]; }"
        assert evaluated(page, work, [{"network": net}]) == [[[sentence], sentence]]
    assert evaluated(page, "(network) => engine.unsupported(network)", every_node()) == [[] for _ in every_node()]
    over_time = Network([GroupNorm(2)], ["node"], inputs={"x": (None, 2)})
    said = ["node: a norm over time isn't supported."]
    assert evaluated(page, "(network) => engine.unsupported(network)", [{"network": over_time}]) == [said]
    for node in (Take((1, 0)), Magnitude(), Context(1), PerFrame((2,), (Reshape((-1, 1)), Flatten()), ((0,), (1,)))):
        net = Network([node], ["node"], inputs={"x": (None, 2)})
        said = [f"node: a node of the type {node.file_type} isn't supported."]
        assert evaluated(page, "(network) => engine.unsupported(network)", [{"network": net}]) == [said]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"inputs": {}}, "the input x is missing"),
        ({"inputs": {"x": 3}}, "expected the input x as { data, shape }, got number"),
        ({"inputs": {"x": np.zeros((2, 5, 4))}}, "expected x [B, any, 3], got [2, 5, 4]"),
        ({"options": {"mask": np.ones((2, 4))}}, "expected mask of x [B=2, T=5], got 8 numbers"),
        ({"options": {"state": []}}, f"expected {len(GATES)} states, got 0"),
        (
            {"options": {"state": [{"h": np.zeros((2, 3))}] * len(GATES)}},
            "expected h of state 0 [B=2, 4], got another shape",
        ),
        ({"options": {"patches": [{"node": "no", "gate": "f"}]}}, "patch: expected a cell of the network"),
        ({"options": {"patches": [{"node": "stack", "cell": 1, "gate": "f"}]}}, "patch of stack: expected gate to be"),
        (
            {
                "options": {
                    "patches": [{"node": "stack", "cell": 0, "gate": "f", "how": "add", "value": 1, "units": [4]}]
                }
            },
            "patch of stack: expected units from 0 to 3, got 4",
        ),
        (
            {"of": {"value": "stack", "row": 0, "step": 5, "unit": 0}},
            "gradient: expected row, step and unit within stack",
        ),
        ({"of": {"node": "stack", "cell": 0, "gate": "z"}}, "gradient: expected a gate or state of a cell, got z"),
        ({"of": {"seeds": {"stack": np.zeros(3)}}}, "gradient: expected 40 numbers as the seed of stack, got 3"),
    ],
)
def test_invalid_inputs_are_refused_by_name(page, more, message):
    net = Network([make_stacked(np.random.default_rng(0), 3)], ["stack"], inputs=["x"])
    case = {
        "inputs": {"x": np.zeros((2, 5, 3))},
        "options": {},
        "of": {"value": "stack", "row": 0, "step": 0, "unit": 0},
    }
    work = "(network, { inputs, options, of }) => { try { engine.gradient(network, inputs, options, of); } "
    work += "catch (error) { return error.message; } return 'nothing'; }"
    (said,) = evaluated(page, work, [{"network": net, **case, **more}])
    assert said.startswith(message)


def test_resets_across_nodes_that_take_steps_together_are_refused(page):
    rng = np.random.default_rng(0)
    net = Network([make_stacked(rng, 3), Conv1D(floats(rng, 2, 4, 2))], inputs=["x"])
    options = {"reset": np.ones((2, 5), bool)}
    work = "(network, { inputs, options }) => { try { engine.run(network, inputs, options); return 'nothing'; } "
    work += "catch (error) { return error.message; } }"
    (said,) = evaluated(page, work, [{"network": net, "inputs": {"x": np.zeros((2, 5, 3))}, "options": options}])
    assert said.startswith("layer_1: reset isn't supported, as it combines steps across sequences")


def test_omitted_settings_have_their_defaults(page):
    rng, work = np.random.default_rng(0), "(network) => network.nodes[0].cells[0].spec"
    for kind in GATES:
        net = one_cell(rng, CellSpec(2, 3, kind=kind))
        (found,) = evaluated(page, work, [{"network": net}])
        expected = {**asdict(net.cells[0].spec), "gate_activations": {}}
        assert found == expected


# ── the payload, a worker, speed ──────────────────────────────────────────────────────────────────────────────────────


def test_the_payload_equals_a_native_file(page, tmp_path):
    net, _ = make_graph(5, "float32")
    net.save(tmp_path / "net.safetensors")
    with safe_open(tmp_path / "net.safetensors", "numpy") as file:
        description, names = json.loads(file.metadata()["cellstack"]), list(file.keys())
    payload = json.loads(json.dumps(payload_of(net)))
    assert payload["description"] == description
    assert payload["arrays"].keys() == set(names)
    work = "(network) => Object.fromEntries(network.nodes.map(({ name, arrays }) => [name, arrays]))"
    (found,) = evaluated(page, work, [{"network": net}])
    for name, node in zip(net.names, net.nodes, strict=True):
        for key, array in ({} if node.cells else node.stored()[1]).items():
            assert np.array_equal(found[name][key], array)
    size = sum(node.multiplications for node in net.nodes)
    assert evaluated(page, "(network) => engine.multiplications(network, 10)", [{"network": net}]) == [10 * size]


def test_a_worker_made_of_the_same_text_computes_the_same(page, text):
    rng = np.random.default_rng(0)
    net = Network([make_stacked(rng, 3)], ["stack"], inputs=["x"])
    asked = "onmessage = ({ data }) => postMessage(run(readNetwork(data.payload), data.inputs).values.stack.data);"
    work = """async ([text, payload, x]) => {
      const inputs = { x: { data: Float64Array.from(x), shape: [1, 4, 3] } };
      const url = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
      const worker = new Worker(url);
      const answer = new Promise((resolve, reject) => {
        worker.onmessage = ({ data }) => resolve([...data]);
        worker.onerror = (error) => reject(error.message);
      });
      worker.postMessage({ payload, inputs });
      const own = engine.run(engine.readNetwork(payload), inputs).values.stack.data;
      const found = await answer;
      worker.terminate();
      return [found, [...own]];
    }"""
    found, own = page.evaluate(work, [text + asked, payload_of(net), list(rng.normal(size=12))])
    assert found == own
    assert any(found)


@pytest.mark.long
def test_steps_of_64_units_take_a_few_times_their_multiplications(page):
    """Compared with a plain loop, which other processes delay as much."""
    rng = np.random.default_rng(0)
    net = Network([Recurrent((make_cell(rng, 64, 64),))], ["lstm"], inputs=["x"])
    work = """(network, { inputs }) => {
      const weights = Float64Array.from({ length: 128 * 256 }, (_, n) => n), sums = new Float64Array(256);
      const multiply = (value) => {
        for (let k = 0; k < 128; ++k) for (let j = 0; j < 256; ++j) sums[j] += value * weights[256 * k + j];
      };
      return Array.from({ length: 8 }, () => {
        const times = [performance.now()];
        const took = (work) => { work(); times.push(performance.now()); };
        took(() => { for (let step = 0; step < 200; ++step) multiply(step); });
        took(() => engine.run(network, inputs));
        took(() => engine.gradient(network, inputs, {}, { value: "lstm", row: 0, step: 199, unit: 0 }));
        return times.slice(1).map((time, n) => time - times[n]);
      });
    }"""
    (times,) = evaluated(page, work, [{"network": net, "inputs": {"x": rng.normal(size=(1, 200, 64))}}])
    loop, run, gradient = np.min(times, axis=0)
    print(f"LSTM, 200 steps, I = H = 64: loop {loop:.0f} ms, run {run:.0f} ms, run and gradient {gradient:.0f} ms")
    assert run < 6 * loop
    assert gradient < 25 * loop


# ── the playground ────────────────────────────────────────────────────────────────────────────────────────────────────

TRAINED = """([options, steps]) => {
  const trainer = engine.createTrainer(options);
  const start = performance.now();
  const losses = Array.from({ length: steps }, () => trainer.step().loss);
  const shown = Array.from({ length: 100 }, (_, seed) => trainer.example(seed + 1));
  const mean = (name) => shown.reduce((sum, one) => sum + one[name], 0) / shown.length;
  const cells = Object.fromEntries(Object.entries(shown[0].cells).map(([gate, { shape }]) => [gate, shape]));
  return {
    first: losses[0], last: losses[steps - 1], loss: mean("loss"), accuracy: mean("accuracy"), cells,
    milliseconds: (performance.now() - start) / steps, losses: losses.slice(0, 5), target: [...shown[0].target.data],
    output: shown[0].output.shape, iteration: trainer.iteration,
  };
}"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("task", "kind", "steps", "bound"),
    [
        ("echo", "lstm", 250, 0.02),  # nats per bit; 0.69 by chance
        ("parity", "gru", 250, 0.02),
        pytest.param("echo", "rnn", 250, 0.02, marks=pytest.mark.slow),
        pytest.param("adding", "gru", 400, 0.03, marks=pytest.mark.slow),  # squared error; 0.17 for always 1
        pytest.param("wave", "lstm", 300, 0.01, marks=pytest.mark.slow),  # 0.37 for always 0
        pytest.param("brackets", "lstm", 300, 0.05, marks=pytest.mark.slow),  # 3 for always the mean
    ],
)
def test_small_networks_learn_each_task_in_seconds(page, task, kind, steps, bound):
    found = page.evaluate(TRAINED, [{"task": task, "kind": kind, "units": 12, "seed": 1}, steps])
    print(f"{task}, {kind}: {found['first']:.3f} to {found['loss']:.4f}, {found['milliseconds']:.1f} ms per batch")
    assert found["loss"] < bound < found["first"] / 4
    if task in ("echo", "parity", "brackets"):
        assert found["accuracy"] > 0.97


def test_a_trainer_draws_the_same_for_the_same_seed_and_shows_every_gate(page):
    one, same, other = (
        page.evaluate(TRAINED, [{"task": "wave", "kind": "gru", "units": 5, "steps": 9, "seed": seed}, 5])
        for seed in (3, 3, 4)
    )
    assert one["losses"] == same["losses"] != other["losses"]
    assert one["target"] == other["target"]  # an example depends on its own seed
    assert one["cells"] == {"z": [1, 9, 5], "r": [1, 9, 5], "g": [1, 9, 5], "h": [1, 9, 5], "pre": None}
    assert one["output"] == [1, 9, 1]
    assert one["iteration"] == 5


def test_tasks_have_the_described_targets(page):
    work = """(task) => {
      const trainer = engine.createTrainer({ task, delay: 2 });
      return Array.from({ length: 20 }, (_, seed) => {
        const { input, target, weight } = trainer.example(seed);
        return [input, target, weight].map(({ data, shape }) => ({ data: [...data], shape }));
      });
    }"""
    for task in ("echo", "parity", "adding", "wave", "brackets"):
        for values in page.evaluate(work, task):
            x, y, w = (np.reshape(value["data"], value["shape"])[0] for value in values)
            y, w, first = y[:, 0], w[:, 0], x[:, 0]
            if task == "echo":
                assert np.array_equal(w, np.arange(len(w)) >= 2)
                assert np.array_equal(y[2:], (first[:-2] + 1) / 2)
            elif task == "parity":
                assert np.array_equal(y, np.cumsum(first > 0) % 2)
            elif task == "adding":
                assert x[:, 1].sum() == 2
                assert w.tolist() == [0] * (len(w) - 1) + [1]
                assert np.isclose(y[-1], first @ x[:, 1])
            elif task == "wave":
                last = np.maximum.accumulate(np.where(x[:, 1] == 1, np.arange(len(x)), -1))
                assert np.array_equal(y, np.where(last < 0, 0.0, first[last]))
            else:
                assert np.array_equal(y, np.cumsum(first - x[:, 1]))
                assert (x.sum(axis=1) == 1).all()
                assert y.min() >= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"task": "chess"},
            "createTrainer: expected task to be one of echo, parity, adding, wave, brackets, got chess",
        ),
        ({"kind": "cnn"}, f"createTrainer: expected kind to be one of {', '.join(GATES)}, got cnn"),
        ({"units": 0}, "createTrainer: expected units to be a whole number above 0, got 0"),
        ({"rate": -1}, "createTrainer: expected rate above 0, got -1"),
        ({"delay": 20}, "createTrainer: expected delay from 0 to below steps=20, got 20"),
    ],
)
def test_a_trainer_refuses_by_name(page, options, message):
    work = "(options) => { try { engine.createTrainer(options); } catch (error) { return error.message; } }"
    assert page.evaluate(work, options) == message


@pytest.mark.long
def test_edited_networks_are_run_as_the_kernel_runs_them(page):
    made = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        spec, batch, steps = random_spec(rng), int(rng.integers(1, 5)), int(rng.integers(1, 9))
        net = Network([Recurrent((fill(rng, spec, "float64"),), go_backwards=seed % 3 == 0)], inputs=["x"])
        patches = []
        for _ in range(rng.integers(1, 5)):
            # by an n of 0, h would be infinite
            gate = str(rng.choice([name for name in TRACES[spec.kind]._fields if name != "n"]))
            some = lambda n: None if rng.random() < 0.3 else rng.choice(n, rng.integers(1, n + 1), False)  # noqa: B023, E731
            how = str(rng.choice(["set", "add", "scale", "freeze"]))
            width = spec.output_size if gate == "h" else spec.units
            value = None if how == "freeze" else round(float(rng.normal()), 3)
            patches.append(Patch("layer_0", gate, some(width), some(batch), some(steps), value, how))
        options = {
            "state": make_states(rng, net, batch),
            "mask": rng.random((batch, steps)) < 0.7 if seed % 4 == 0 else None,
            "reset": rng.random((batch, steps)) < 0.3 if seed % 5 == 0 else None,
        }
        x = {"x": rng.normal(size=(batch, steps, spec.input_size))}
        made.append({"network": net.edit(patches), "inputs": x, "options": options})
    for case, found in zip(made, evaluated(page, RUN, made), strict=True):
        t = case["network"].trace(case["inputs"], **case["options"])
        near(found["values"]["layer_0"], t["layer_0"].y)
        for gate, array in t["layer_0"].cells[0].items():
            near(found["cells"]["layer_0"][0][gate], array)


# ── a new kind of cell ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def toys(monkeypatch):
    """Cells of a kind that only tests have: networks, inputs, and the fields of each run by NumPy."""
    register(monkeypatch)
    rng, made = np.random.default_rng(0), []
    flags = {}, {"zoneout": 0.2, "clip": 0.8}, {"layer_norm": True}, {"use_bias": False, "zoneout_cell": 0.4}
    for own in flags:
        spec = CellSpec(3, 4, kind="toy", **own)
        net = one_cell(rng, spec)
        x = rng.normal(size=(2, 5, 3))
        fields, _ = evaluate(spec, net.cells[0].arrays, x)
        made.append({"network": net, "inputs": {"x": x}, "options": {}, "fields": fields})
    return made


def test_a_new_kind_runs_and_is_differentiated(page, toys):
    rng = np.random.default_rng(1)
    for case, found in zip(toys, evaluated(page, RUN, toys), strict=True):
        for name, field in case["fields"].items():
            near(found["cells"]["cell"][0][name], field)
        near(found["state"][0]["n"], case["fields"]["n"][:, -1])
    agree(page, [with_seeds(rng, case, {"cell": (2, 5, 4)}) for case in toys])
    patches = [{"node": "cell", "gate": gate, "how": how, "value": 0.3, "units": [1, 2], "steps": [2, 4, 1]}
               for gate in ("q", "n", "c", "m") for how in ("scale", "freeze")]  # fmt: skip
    changed = [{**case, "options": {"patches": patches}} for case in toys]
    agree(page, [with_seeds(rng, case, {"cell": (2, 5, 4)}) for case in changed])


EXPLAINED = """async ([text, networks]) => {
  const names = "CellStep, keepingOf, meaningOf, readNetwork, wiringOf";
  const module = new Blob([text, `export { ${names} };`], { type: "text/javascript" });
  const { CellStep, keepingOf, meaningOf, readNetwork, wiringOf } = await import(URL.createObjectURL(module));
  return networks.map(({ payload, x, before, now }) => {
    const [cell] = readNetwork(payload).nodes[0].cells;
    const step = new CellStep(cell, { x, before, now });
    const lines = Object.fromEntries(cell.form.trace.map((name) => [name, step.explain(name, 1)]));
    const keeping = keepingOf(cell.form);
    const kept = [keeping.name, keeping.of((name) => now[name][1])];
    return { lines, kept, ports: Object.keys(wiringOf(cell.form).ports), meaning: meaningOf(cell.form, "n") };
  });
}"""


def test_a_new_kind_is_explained(page, toys):
    sent = []
    for case in toys:
        now = {name: field[0, 3].tolist() for name, field in case["fields"].items()}
        before = {name: case["fields"][name][0, 2].tolist() for name in "hcnm"}
        sent.append({"payload": payload_of(case["network"]), "x": case["inputs"]["x"][0, 3].tolist(),
                     "before": before, "now": now})  # fmt: skip
    for given, found in zip(sent, page.evaluate(EXPLAINED, [html.module_text(), sent]), strict=True):
        now = given["now"]
        for name, lines in found["lines"].items():
            last = float(lines[-1]["text"].split("=")[-1].replace("−", "-"))
            assert last == pytest.approx(now[name][1], rel=1e-4, abs=1e-9), (name, lines)
        texts = [line["text"] for line in found["lines"]["c"]]
        assert texts[0] == "c = f · c_prev + i · g · q"
        assert found["lines"]["h"][0]["text"].startswith("h = o · tanh(c) · (1 − tanh(n)) = ")
        assert "count" in found["meaning"]
        name, (share, rest) = found["kept"]
        assert name == "c"
        assert share == now["f"][1]
        assert rest == pytest.approx(now["i"][1] * now["g"][1] * now["q"][1])
        assert set(found["ports"]) == {*ToyTrace._fields, "x", "h_prev", "c_prev", "n_prev", "m_prev"}
