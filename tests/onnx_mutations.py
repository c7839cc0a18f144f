"""ONNX models with one change each, and ONNX Runtime in a separate process, as some changes make it crash."""

import pickle
import struct
import subprocess
import sys

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WORKER = """
import pickle, struct, sys
import onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level, options.intra_op_num_threads = 4, 1
source, sink = sys.stdin.buffer, sys.stdout.buffer
while head := source.read(8):
    data, feeds = pickle.loads(source.read(struct.unpack("q", head)[0]))
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        found = session.run(None, feeds)
        answer = dict(zip([entry.name for entry in session.get_outputs()], found))
    except Exception as error:
        answer = str(error)
    answer = pickle.dumps(answer)
    sink.write(struct.pack("q", len(answer)) + answer)
    sink.flush()
"""
ACTIVATIONS = ("Relu", "Tanh", "Sigmoid", "HardSigmoid", "Softsign", "ThresholdedRelu", "Elu", "LeakyRelu", "Affine")


class Runtime:
    """ONNX Runtime, or another program, in a separate process that is restarted when it dies."""

    def __init__(self, worker=WORKER):
        self.worker = worker
        self.process = None
        self.crashes = 0

    def __call__(self, data, feeds):
        """Return outputs by name; None where it doesn't run the model."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", self.worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        given = pickle.dumps((data, feeds))
        try:
            self.process.stdin.write(struct.pack("q", len(given)) + given)
            self.process.stdin.flush()
            head = self.process.stdout.read(8)
            answer = pickle.loads(self.process.stdout.read(struct.unpack("q", head)[0])) if len(head) == 8 else None
        except BrokenPipeError:
            answer = None
        if answer is None:
            self.crashes += 1
            self.close()
        return answer if isinstance(answer, dict) else None

    def close(self):
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


def mutated(data, rng):
    """Return a model with one change, and its description."""
    made = onnx.ModelProto.FromString(data)
    change = (attribute, attribute, inputs, constant, constant, inserted, inserted)[int(rng.integers(7))]
    return made, f"{change.__name__}: {change(made.graph, rng)}"


def attribute(graph, rng):
    """Change an attribute, or omit it."""
    held = [(node, entry) for node in graph.node for entry in node.attribute if entry.type != 5]
    if not held:
        return inserted(graph, rng)
    node, entry = held[int(rng.integers(len(held)))]
    before = f"{node.op_type} {node.output[0]} {entry.name}"
    if rng.random() < 0.15:
        node.attribute.remove(entry)
        return f"{before} left out"
    if entry.type == 1:
        entry.f = float(rng.choice([0.0, 1.0, -1.0, 0.5, 2.0 * entry.f]))
    elif entry.type == 2:
        entry.i = int(rng.choice([0, 1, -1, 2, entry.i + 1]))
    elif entry.type == 3:
        entry.s = bytes(rng.choice([b"forward", b"reverse", b"bidirectional", b"SAME_UPPER", b"SAME_LOWER", b"VALID"]))
    elif entry.type == 4:
        entry.t.CopyFrom(numpy_helper.from_array(_changed(numpy_helper.to_array(entry.t), rng), entry.t.name))
    else:
        values = {6: entry.floats, 7: entry.ints, 8: entry.strings}[entry.type]
        if len(values):
            n, m = (int(k) for k in rng.integers(len(values), size=2))
            if entry.type == 8:
                values[n] = str(rng.choice(ACTIVATIONS)).encode()
            elif rng.random() < 0.5:
                values[n], values[m] = values[m], values[n]
            else:
                values[n] = values[n] + int(rng.choice([-1, 1]))
    return before


def inputs(graph, rng):
    """Swap two inputs of an operator, omit one, or use another value."""
    node = graph.node[int(rng.integers(len(graph.node)))]
    if not node.input:
        return inserted(graph, rng)
    n, m = (int(k) for k in rng.integers(len(node.input), size=2))
    way = int(rng.integers(3))
    what = f"{node.op_type} {node.output[0]} input {n}"
    if way == 0:
        node.input[n], node.input[m] = node.input[m], node.input[n]
        return f"{what} and {m} swapped"
    if way == 1:
        node.input[n] = ""
        return f"{what} left out"
    known = [value.name for value in graph.input] + [tensor.name for tensor in graph.initializer]
    for one in graph.node:
        if one is node or one.output[0] == node.output[0]:
            break
        known += list(one.output)
    node.input[n] = str(rng.choice(known))
    return f"{what} is {node.input[n]}"


def constant(graph, rng):
    """Change numbers, or the shape, of a constant; preferring short lists of integers."""
    if not graph.initializer:
        return attribute(graph, rng)
    small = [n for n, tensor in enumerate(graph.initializer) if tensor.data_type == TensorProto.INT64]
    pick = small if small and rng.random() < 0.6 else range(len(graph.initializer))
    tensor = graph.initializer[int(rng.choice(pick))]
    array = numpy_helper.to_array(tensor)
    name = tensor.name
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(_changed(array, rng)), name))
    return f"{name} {array.shape}"


def _changed(array, rng):
    if array.dtype.kind == "i":
        changed = array.copy().reshape(-1)
        if changed.size:
            value = int(rng.choice([-1, 0, 1, 2, -2, -7, 9, 2**31 - 1, -(2**63)]))
            changed[int(rng.integers(changed.size))] = value
        return changed.reshape(array.shape)
    way = int(rng.integers(4))
    if way == 0 or array.dtype.kind != "f":
        return array[None]
    if way == 1:
        return array.reshape(-1)
    if way == 2 and array.ndim:
        return array[..., ::-1]
    return (array * rng.choice([0.0, -1.0, 2.0])).astype(array.dtype)


def inserted(graph, rng):
    """Insert an operator before an input of another, or before an output."""
    place = int(rng.integers(len(graph.node)))
    node = graph.node[place]
    taken = [n for n, name in enumerate(node.input) if name]
    if not taken:
        return "nothing"
    n = int(rng.choice(taken))
    source, axis = node.input[n], int(rng.integers(3))
    make, put, target = helper.make_node, [], f"{source} changed"

    def integers(*values):
        name = f"{source} by {len(graph.initializer)}"
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    kinds = ("cast", "flip", "turn", "Relu", "Tanh", "Neg", "double", "Softmax", "mean", "twice", "wide", "flat",
             "Identity", "first", "last", "Dropout", "reshape")  # fmt: skip
    kind = str(rng.choice(kinds))
    if kind == "cast":
        put = [make("Cast", [source], [f"{source} whole"], to=7), make("Cast", [f"{source} whole"], [target], to=1)]
    elif kind == "flip":
        put = [make("Slice", [source, integers(-1), integers(-(2**63)), integers(axis), integers(-1)], [target])]
    elif kind in ("first", "last"):
        ends = (0, 1) if kind == "first" else (-1, 2**63 - 1)
        put = [make("Slice", [source, *map(integers, ends), integers(axis)], [target])]
    elif kind == "turn":
        perm = list(range(int(rng.choice([2, 3, 3, 4]))))
        rng.shuffle(perm)
        put = [make("Transpose", [source], [target], perm=[int(k) for k in perm])]
    elif kind == "double":
        graph.initializer.append(numpy_helper.from_array(np.float32(2.0), f"{source} two"))
        put = [make("Mul", [source, f"{source} two"], [target])]
    elif kind == "mean":
        put = [make("ReduceMean", [source], [target], axes=[axis], keepdims=int(rng.integers(2)))]
    elif kind == "twice":
        put = [make("Concat", [source, source], [target], axis=axis)]
    elif kind == "wide":
        put = [make("Unsqueeze", [source, integers(axis)], [target])]
    elif kind == "flat":
        put = [make("Squeeze", [source, integers(axis)], [target])]
    elif kind == "reshape":
        put = [make("Reshape", [source, integers(0, -1, int(rng.integers(1, 5)))], [target])]
    else:
        put = [make(kind, [source], [target], **({"axis": axis} if kind == "Softmax" else {}))]
    node.input[n] = target
    nodes = [*graph.node[:place], *put, *graph.node[place:]]
    del graph.node[:]
    graph.node.extend(nodes)
    return f"{kind} (axis {axis}) before input {n} of {node.op_type} {node.output[0]}"
