"""ONNX models for tests, made with onnx.helper alone, and ONNX Runtime to run them."""

import warnings

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper

from cellstack.formats import onnx as adapter

EIGHT_BITS = 0.03  # relative to the greatest number: 8-bit operators round x and h at every step, cellstack's don't
TOLERANCE = 1e-5  # float32 on both sides, through a few nodes, numbers of about 1
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
ACTIVATIONS = {  # with a range for alpha and one for beta
    "Sigmoid": (),
    "Tanh": (),
    "Relu": (),
    "Softsign": (),
    "Softplus": (),
    "HardSigmoid": ((0.15, 0.35), (0.3, 0.6)),
    "Affine": ((-0.8, 0.8), (-0.3, 0.3)),
    "ScaledTanh": ((0.5, 1.5), (0.5, 1.5)),
    "Elu": ((0.5, 1.5),),
    "LeakyRelu": ((0.05, 0.5),),
    "ThresholdedRelu": ((-0.3, 0.3),),
}
BOUNDED = ("Sigmoid", "HardSigmoid", "Tanh")
ONNX_RUNTIME = [int(part) for part in onnxruntime.__version__.split(".")[:2]]
"""The version of ONNX Runtime; for Python 3.10, 1.23 is the last one."""
# Its RNN ended the process where only one direction's activation has an alpha or beta.
READS_BEYOND_ALPHA = ONNX_RUNTIME < [1, 24]


def model(nodes, inputs, outputs, arrays, opset=17, domains=()):
    """A model. `inputs`: name -> (type, shape); `outputs`: names, or name -> rank; `arrays`: name -> array."""
    ranks = outputs if isinstance(outputs, dict) else {name: 4 if name == "Y" else 3 for name in outputs}
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [f"{name}_{n}" for n in range(rank)])
            for name, rank in ranks.items()
        ],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", opset), *domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def write(path, made, check=True):
    """Write a model, after running the checker, and return the path."""
    if check:
        onnx.checker.check_model(made)
    path.write_bytes(made.SerializeToString())
    return str(path)


def run(path, feeds, outputs=None):
    """ONNX Runtime's outputs of a file, in order."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(outputs, feeds)


def random_operator(rng, kind=None, lengths=None):
    """A recurrent operator with random attributes, as (node, arrays, feeds, facts): outputs Y, Y_h and Y_c."""
    kind = str(rng.choice(list(GATES))) if kind is None else kind
    often = lambda share: bool(rng.random() < share)  # noqa: E731
    direction = str(rng.choice(["forward", "reverse", "bidirectional"]))
    ways, gates = 2 if direction == "bidirectional" else 1, GATES[kind]
    width, units = (int(n) for n in rng.integers(1, 7, 2))
    batch, steps = (int(n) for n in rng.integers(1, 6, 2))
    normal = lambda *shape: (0.5 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    arrays = {"W": normal(ways, gates * units, width), "R": normal(ways, gates * units, units)}
    attributes = {"hidden_size": units, "direction": direction}
    if often(0.8):
        arrays["B"] = normal(ways, 2 * gates * units)
    if often(0.4):
        attributes["clip"] = round(rng.uniform(0.3, 1.5), 2)
    if kind == "LSTM" and often(0.4):
        arrays["P"] = normal(ways, 3 * units)
    if kind == "LSTM" and often(0.3):
        attributes["input_forget"] = 1
    if kind == "GRU":
        attributes["linear_before_reset"] = int(rng.integers(2))
    if often(0.6):
        attributes |= random_activations(rng, kind, ways)
    x = normal(steps, batch, width)
    feeds, shape = {"X": x}, (ways, batch, units)
    started = often(0.5)
    states = ["initial_h", "initial_c"] if kind == "LSTM" else ["initial_h"]
    if started:
        feeds |= {name: normal(*shape) for name in states}
    if often(0.3) if lengths is None else lengths:
        feeds["sequence_lens"] = rng.integers(1, steps + 1, batch).astype(np.int32)
    order = ["X", "W", "R", "B", "sequence_lens", "initial_h", *(["initial_c", "P"] if kind == "LSTM" else [])]
    names = [name if name in arrays or name in feeds else "" for name in order]
    outputs = ["Y", "Y_h", *(["Y_c"] if kind == "LSTM" else [])]
    node = helper.make_node(kind, names, outputs, name="the op", **attributes)
    return node, arrays, feeds, outputs


def random_activations(rng, kind, ways):
    """Attributes: bounded ones on the gates that multiply, any on the candidate, with different parameters."""
    names, alphas, betas = [], [], []
    slots = {"LSTM": (BOUNDED, None, BOUNDED), "GRU": (BOUNDED, BOUNDED), "RNN": (None,)}[kind]
    for choices in slots * ways:
        name = str(rng.choice(choices or list(ACTIVATIONS)))
        names.append(name)
        for values, bounds in zip((alphas, betas), ACTIVATIONS[name], strict=False):
            values.append(round(rng.uniform(*bounds), 2))
    if READS_BEYOND_ALPHA and kind == "RNN" and {len(alphas), len(betas)} - {0, ways}:
        return {}
    attributes = {"activations": names, "activation_alpha": alphas, "activation_beta": betas}
    return {key: value for key, value in attributes.items() if value}


def operator_model(node, arrays, feeds, outputs, opset=17):
    """A model of one operator, weights as initializers."""
    types = {"sequence_lens": onnx.TensorProto.INT32}
    inputs = {
        name: (types.get(name, onnx.TensorProto.FLOAT), [f"{name}_{n}" for n in range(a.ndim)])
        for name, a in feeds.items()
    }
    return model([node], inputs, outputs, arrays, opset)


def export(path, module, inputs, fixed=(), opset=None):
    """Export a module with the tracing exporter; batch and time of any length except for the inputs in `fixed`."""
    names = [f"in{n}" for n in range(len(inputs))]
    free = {
        name: {axis: f"{name}_{axis}" for axis in range(min(2, x.dim()))}
        for name, x in zip(names, inputs, strict=True)
        if name not in fixed
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {"input_names": names, "dynamic_axes": free, "opset_version": opset}
        torch.onnx.export(module.eval(), inputs, str(path), dynamo=False, **given)
    return str(path), {name: x.numpy() for name, x in zip(names, inputs, strict=True)}


def compare(path, feeds):
    """Compare a loaded file with ONNX Runtime, with axes reordered according to the metadata; return the network."""
    net = adapter.load(path)
    said = net.metadata["onnx"]
    x = [
        feeds[name].transpose([axes.index(label) for label in "BTF" if label in axes])
        for name, axes in said["inputs"].items()
    ]
    y, _ = net.run(x[0] if len(x) == 1 else tuple(x))
    outputs = y if isinstance(y, tuple) else (y,)
    for (name, axes), got in zip(said["outputs"].items(), outputs, strict=True):
        (expected,) = run(path, feeds, [name])
        lengths = [n for n, label in zip(expected.shape, axes, strict=True) if label != "1"]
        labels = axes.replace("1", "")
        expected = expected.reshape(lengths).transpose([labels.index(label) for label in "BTDF" if label in labels])
        np.testing.assert_allclose(got, expected.reshape(got.shape), rtol=0, atol=TOLERANCE)
    return net


def unrolled_model(steps, chains=1, broken=False):
    """RNNs of 2 units, unrolled step by step; `broken`: the state isn't passed on after the second step."""
    rng = np.random.default_rng(5)
    floats = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    make, nodes, arrays = helper.make_node, [], {"zeros": np.zeros((1, 2), np.float32)}
    arrays |= {f"at {t}": np.array(t, np.int64) for t in range(steps)}
    for k in range(chains):
        arrays |= {f"W{k}": floats(3, 2), f"R{k}": floats(2, 2), f"b{k}": floats(2)}
        h = "zeros"
        for t in range(steps):
            end = f"{k} {t}"
            nodes += [
                make("Gather", ["X", f"at {t}"], [f"x{end}"], axis=0),
                make("MatMul", [f"x{end}", f"W{k}"], [f"p{end}"]),
                make("MatMul", ["zeros" if broken and t % 2 else h, f"R{k}"], [f"q{end}"]),
                make("Add", [f"p{end}", f"q{end}"], [f"s{end}"]),
                make("Add", [f"s{end}", f"b{k}"], [f"z{end}"]),
                make("Tanh", [f"z{end}"], [f"h{end}"], name=f"h{end}"),
            ]
            h = f"h{end}"
    ends = [f"h{k} {steps - 1}" for k in range(chains)]
    nodes.append(make("Concat", ends, ["Y"], axis=1))
    return model(nodes, {"X": (onnx.TensorProto.FLOAT, [steps, "B", 3])}, {"Y": 2}, arrays)
