"""A stack of LSTMs in cellstack's kernel and in its peers, with the same weights, ready to be timed.

Each engine is a function of no arguments that runs the whole stack on the same x and returns y `[B, T, H]`.
"""

import time

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

from cellstack import native
from cellstack.spec import CellSpec


def weights(input_size, units, layers, seed=0):
    """Keras's layout and gate order: [(kernel [I, 4H], recurrent_kernel [H, 4H], bias [4H])] * layers."""
    rng = np.random.default_rng(seed)
    scale = units**-0.5
    new = lambda *shape: rng.uniform(-scale, scale, shape).astype(np.float32)  # noqa: E731
    return [(new(units if n else input_size, 4 * units), new(units, 4 * units), new(4 * units)) for n in range(layers)]


def kernel_layer(spec, arrays, x, saved=False, y=True, **drops):
    """A layer for `native.forward`, from a state of zeros, and what it writes: y, hn, cn, gates, cells, norms."""
    batch, steps, _ = x.shape
    unwanted = {*(() if y else ("y",)), *(() if saved else ("gates", "cells", "norms"))}
    shapes = native.results(spec, batch, steps)
    out = {name: np.empty(shape, np.float32) for name, shape in shapes.items() if name not in unwanted}
    return native.Layer(native.weights(spec, arrays), **out, **drops), out


def cellstack(x, cells, threads):
    layers, out = [], {}
    for n, (kernel, recurrent, bias) in enumerate(cells):
        spec = CellSpec(kernel.shape[0], recurrent.shape[0])
        arrays = {"kernel": kernel, "recurrent_kernel": recurrent, "bias": bias}
        layer, out[n] = kernel_layer(spec, arrays, x, y=n + 1 == len(cells))
        layers.append(layer)
    sequences = native.sequences(x)

    def run():
        native.forward(sequences, layers, threads)
        return out[len(cells) - 1]["y"]

    return run


def torch_lstm(cells, input_size):
    units = cells[0][1].shape[0]
    module = torch.nn.LSTM(input_size, units, len(cells), batch_first=True)
    with torch.no_grad():
        for n, (kernel, recurrent, bias) in enumerate(cells):
            getattr(module, f"weight_ih_l{n}").copy_(torch.from_numpy(kernel.T))
            getattr(module, f"weight_hh_l{n}").copy_(torch.from_numpy(recurrent.T))
            getattr(module, f"bias_ih_l{n}").copy_(torch.from_numpy(bias))
            getattr(module, f"bias_hh_l{n}").zero_()
    return module


def pytorch(x, cells, threads):
    torch.set_num_threads(threads)
    module, x = torch_lstm(cells, x.shape[2]), torch.from_numpy(x)

    def run():
        with torch.inference_mode():
            return module(x)[0].numpy()

    return run


def iofg(array):
    """From our order of gates to ONNX's."""
    return np.concatenate([np.split(array, 4, axis=-1)[k] for k in (0, 3, 1, 2)], axis=-1)


def onnx_model(cells, batch, steps, input_size):
    units = cells[0][1].shape[0]
    nodes, initializers, name = [], [], "x_t"
    nodes.append(helper.make_node("Transpose", ["x"], ["x_t"], perm=[1, 0, 2]))
    for n, (kernel, recurrent, bias) in enumerate(cells):
        arrays = {
            f"W{n}": iofg(kernel).T[None],
            f"R{n}": iofg(recurrent).T[None],
            f"B{n}": np.concatenate([iofg(bias), np.zeros_like(bias)])[None],
        }
        initializers += [numpy_helper.from_array(np.ascontiguousarray(a), k) for k, a in arrays.items()]
        nodes.append(helper.make_node("LSTM", [name, *arrays], [f"Y{n}"], hidden_size=units))
        nodes.append(helper.make_node("Squeeze", [f"Y{n}", "axis"], [f"y{n}"]))
        name = f"y{n}"
    initializers.append(numpy_helper.from_array(np.array([1], np.int64), "axis"))
    nodes.append(helper.make_node("Transpose", [name], ["y"], perm=[1, 0, 2]))
    graph = helper.make_graph(
        nodes,
        "stack",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, steps, input_size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, steps, units])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def onnxruntime(x, cells, threads):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(onnx_model(cells, *x.shape), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})[0]


def openvino(x, cells, threads):
    import openvino as ov

    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(onnx_model(cells, *x.shape)), "CPU", settings).create_infer_request()
    return lambda: request.infer({"x": x}, share_inputs=True, share_outputs=True)[0]


def alternate(runs, rounds, clock=time.perf_counter):
    """Time each of `runs` once a round, in turn; returns the least and the median of each, in ms."""
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return {name: (min(t) * 1e3, float(np.median(t)) * 1e3) for name, t in times.items()}


ENGINES = {"cellstack": cellstack, "torch": pytorch, "onnxruntime": onnxruntime, "openvino": openvino}
