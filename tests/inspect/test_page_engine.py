"""The page's engine, run in Chromium: held against the reference, forward and backward."""

import base64
import json
from importlib import resources

import numpy as np
import pytest
from family import random_case, random_spec
from networks import by_reference, fill, make_graph, make_network, make_states

from cellstack import Network, Recurrent, reference
from cellstack.inspect.payload import packed, payload_of
from cellstack.spec import GATES, STATES

NEAR = (
    1e-10  # float64 on both sides, relative to the greatest number above 1: sums in another order, other exp and tanh
)
DIFFERENCE = 1e-6  # of gradients with central differences of step 1e-6

# What the tests call: arrays come and go as base64 of float64, so that NaN and every bit arrive.
HARNESS = """
const engine = await import(URL.createObjectURL(new Blob([text], { type: "text/javascript" })));
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
    return (resources.files("cellstack.inspect") / "page" / "engine.js").read_text(encoding="utf-8")


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
    """What JSON can hold: arrays as they travel."""
    if isinstance(value, np.ndarray):
        return packed(np.asarray(value, np.float64))
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def read(value):
    """What came back: a value is an array of its shape."""
    if isinstance(value, list):
        return [read(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"data", "shape"}:
        return np.frombuffer(base64.b64decode(value["data"]["packed"])).reshape(value["shape"])
    return {key: read(inner) for key, inner in value.items()}


def evaluated(page, work, cases):
    """What `work`, a function in JavaScript of a network and the rest of a case, returns for each case."""
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
    """What a node that goes backwards returns, in the order of time."""
    return array[:, ::-1] if reverse else array


# ── forward ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def networks(seeds):
    """Random networks with what goes into them: chains and graphs, of both dtypes, with masks, states and resets."""
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


def test_random_networks_are_run_as_the_reference_runs_them(page):
    made = list(networks(range(150)))
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
    """Random cells with every flag, their arrays and a case each, without what only a training draws."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        spec = random_spec(rng, tuple(GATES)[seed % 3])
        case = random_case(rng, spec)
        for drawn in ("recurrent_dropout", "zoneout", "zoneout_cell"):
            case[drawn] = None
        net = one_cell(rng, spec, case["reverse"])
        if case["reset"] is not None and case["reverse"]:
            case["given"] = np.zeros_like(case["reset"])  # what `reset` is of a pass that goes backwards
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


def test_gates_and_states_are_those_of_the_reference_for_every_flag(page):
    made = list(members(range(240)))
    answers = evaluated(page, RUN, [sent_of(net, spec, case) for _, net, spec, case in made])
    for (_, net, spec, case), found in zip(made, answers, strict=True):
        arrays, out = referred(net, spec, case)
        (fields,) = found["cells"]["cell"]
        for plane, gate in enumerate(GATES[spec.kind]):
            near(fields[gate], out.gates[:, :, plane])
        near(fields["h"], out.y)
        if spec.kind == "lstm":
            near(fields["c"], out.cells)
        near(in_time(found["values"]["cell"], case["reverse"]), out.y)
        assert list(fields["pre"]) == list(spec.gates)
        for gate in spec.gates:
            sums = np.stack([step.sums[gate] for step in out.tape.steps], axis=1)
            near(fields["pre"][gate], np.where(out.tape.used, sums, 0.0))
    assert len({(spec.kind, *spec.settings) for _, _, spec, _ in made}) > 100


# ── backward ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_gradients_of_cells_are_those_of_the_reference_for_every_flag(page):
    made, seeds = list(members(range(1000, 1240))), []
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


def test_the_gradient_of_one_number_of_a_cell_is_that_of_the_reference(page):
    made, cases, wanted = list(members(range(2000, 2120))), [], []
    for rng, net, spec, case in made:
        arrays, out = referred(net, spec, case)
        gate = str(rng.choice([*GATES[spec.kind], *(["c"] if spec.kind == "lstm" else []), "h"]))
        width = spec.output_size if gate == "h" else spec.units
        row, step, unit = (int(rng.integers(n)) for n in (*case["x"].shape[:2], width))
        whole = {
            "dy": np.zeros_like(out.y),
            "dgates": np.zeros_like(out.gates),
            "dcells": np.zeros_like(out.gates[:, :, 0]),
        }
        if gate in ("c", "h"):
            whole["dcells" if gate == "c" else "dy"][row, step, unit] = 1.0
        else:
            whole["dgates"][row, step, GATES[spec.kind].index(gate), unit] = 1.0
        if spec.kind != "lstm":
            del whole["dcells"]
        wanted.append(reference.backward(spec, arrays, out, **whole))
        of = {"node": "cell", "cell": 0, "gate": gate, "row": row, "step": step, "unit": unit}
        cases.append(sent_of(net, spec, case, of=of))
    for expected, found in zip(wanted, evaluated(page, GRADIENT, cases), strict=True):
        near(found["inputs"]["x"], expected.x)
        for name, array in expected.arrays.items():
            near(found["arrays"]["cell"][0][name], array)


SLOPES = """(network, { inputs, options, seeds, along }) => {
  const found = engine.gradient(network, inputs, options, { seeds });
  const loss = () => {
    const { values } = engine.run(network, inputs, { ...options, pre: false });
    let sum = 0;
    for (const [name, seed] of Object.entries(seeds)) seed.data.forEach((w, n) => { sum += w * values[name].data[n]; });
    return sum;
  };
  // Everything that has a gradient is moved along a direction, all at once.
  const pairs = [];
  for (const [name, value] of Object.entries(inputs)) if (found.inputs[name]) pairs.push([value.data, found.inputs[name].data]);
  for (const node of network.nodes) {
    const own = node.cells.length ? node.cells.map((cell) => cell.arrays) : Object.keys(node.arrays).length ? [node.arrays] : [];
    own.forEach((arrays, n) => {
      for (const [name, { data }] of Object.entries(arrays)) pairs.push([data, found.arrays[node.name][n][name].data]);
    });
  }
  let at = 0;
  const ways = pairs.map(([data]) => Float64Array.from(data, () => along.data[at++ % along.data.length]));
  const told = pairs.reduce((sum, [, slope], k) => slope.reduce((own, d, n) => own + d * ways[k][n], sum), 0);
  const moved = (step) => {
    pairs.forEach(([data], k) => { ways[k].forEach((way, n) => { data[n] += step * way; }); });
    const value = loss();
    pairs.forEach(([data], k) => { ways[k].forEach((way, n) => { data[n] -= step * way; }); });
    return value;
  };
  return { told, seen: (moved(1e-6) - moved(-1e-6)) / 2e-6, loss: loss() };
}"""


def with_seeds(rng, case, shapes):
    seeds = {name: rng.standard_normal(shapes[name]) for name in case["network"].outputs}
    return {**case, "seeds": seeds, "along": rng.standard_normal(4999)}


def agree(page, made):
    """Hold the gradients of a random loss against its central difference along a random direction."""
    for case, found in zip(made, evaluated(page, SLOPES, made), strict=True):
        bound = DIFFERENCE * max(1.0, abs(found["told"]), abs(found["loss"]))
        assert abs(found["told"] - found["seen"]) <= bound, (str(case["network"]), found)


def test_gradients_of_random_networks_are_their_differences(page):
    rng, made = np.random.default_rng(0), []
    for case in networks(range(3000, 3120)):
        options = case["options"]
        y, _ = by_reference(case["network"], case["inputs"], options["state"], options["mask"], options["reset"])
        answers = dict(zip(case["network"].outputs, y if isinstance(y, tuple) else (y,), strict=True))
        made.append(with_seeds(rng, case, {name: answer.shape for name, answer in answers.items()}))
    agree(page, made)
