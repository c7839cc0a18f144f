"""One step at batch 1 from Python: a stream, with weights of 32, 16 and 8 bits, and a layer's cell, beside their peers.

    python benchmarks/step.py [--rounds 20]

LiteRT runs its fused operator, ONNX Runtime its LSTM with the states bound to memory of its own, both in one thread, as
is everything here. Outputs are compared after 50 steps first. Rounds go through all engines in turn; the figure is the
fastest round's mean over its steps, in microseconds. `bytes` is the time that reading the float32 weights takes, by the
fastest of NumPy's ways to read them all in the same run, less that for reading one number.
"""

import argparse
import time

import litert
import numpy as np
import onnxruntime as ort
import peers
import torch
from onnx import TensorProto, helper, numpy_helper

import cellstack as cs
from cellstack import layers

ATOL = {"bfloat16": 0.02, "int8": 0.05}  # how far fewer bits may lead away in 50 steps of these weights


def stream(cell, x, weights="float32"):
    spec = cs.CellSpec(cell[0].shape[0], cell[1].shape[0])
    s = cs.Network([cs.Recurrent((cs.Cell(spec, *cell),))]).stream(weights=weights)
    return lambda: s.step(x)


def bfloat16(cell, x):
    return stream(cell, x, "bfloat16")


def int8(cell, x):
    return stream(cell, x, "int8")


def onnx_bound(cell, x):
    """ONNX Runtime with io-binding: two bindings, each of which reads the states that the other one wrote."""
    width, units = cell[0].shape[0], cell[1].shape[0]
    kernel, recurrent, bias = (peers.iofg(a) for a in cell)
    arrays = {"W": kernel.T[None], "R": recurrent.T[None], "B": np.concatenate([bias, np.zeros_like(bias)])[None]}
    info = lambda name, size: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, size])  # noqa: E731
    graph = helper.make_graph(
        [helper.make_node("LSTM", ["x", *arrays, "", "h", "c"], ["", "h_after", "c_after"], hidden_size=units)],
        "step",
        [info("x", width), info("h", units), info("c", units)],
        [info("h_after", units), info("c_after", units)],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    new = lambda size: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, 1, size), np.float32))  # noqa: E731
    states = [{name: new(units) for name in "hc"} for _ in range(2)]
    bindings = []
    for before, after in (states, states[::-1]):
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x[None]))
        for name in "hc":
            binding.bind_ortvalue_input(name, before[name])
            binding.bind_ortvalue_output(f"{name}_after", after[name])
        bindings.append((binding, after["h"]))
    now = 0

    def step():
        nonlocal now
        binding, h = bindings[now]
        now = 1 - now
        session.run_with_iobinding(binding)
        return h.numpy()[0]

    return step


def our_cell(cell, x):
    module = layers.LSTMCell(cell[1].shape[0], input_size=cell[0].shape[0])
    module.set_weights(list(cell))
    state = [torch.zeros(1, cell[1].shape[0])] * 2
    x = torch.from_numpy(x)

    def step():
        nonlocal state
        with torch.no_grad():
            y, state = module(x, state)
        return y.numpy()

    return step


def torch_cell(cell, x):
    kernel, recurrent, bias = (torch.from_numpy(a) for a in cell)
    module = torch.nn.LSTMCell(kernel.shape[0], recurrent.shape[0])
    with torch.no_grad():
        module.weight_ih.copy_(kernel.T)
        module.weight_hh.copy_(recurrent.T)
        module.bias_ih.copy_(bias)
        module.bias_hh.zero_()
    state = None
    x = torch.from_numpy(x)

    def step():
        nonlocal state
        with torch.no_grad():
            state = module(x, state)
        return state[0].numpy()

    return step


ENGINES = {
    "stream": stream,
    "bfloat16": bfloat16,
    "int8": int8,
    "LSTMCell": our_cell,
    "torch.nn.LSTMCell": torch_cell,
    "LiteRT": litert.step,
    "ONNX Runtime": onnx_bound,
}


def readers(cell):
    """NumPy's ways to read the weights, each with a way to read one number."""
    flat = np.concatenate([a.ravel() for a in cell])
    words, rows = flat.view(np.int32), cell[1]
    matrix = np.resize(flat, (flat.size // rows.shape[1], rows.shape[1]))
    ones = np.ones(len(matrix), np.float32)
    return {
        "max": (flat.max, flat[:1].max),
        "or": (lambda: np.bitwise_or.reduce(words), lambda: np.bitwise_or.reduce(words[:1])),
        "product": (lambda: ones @ matrix, lambda: ones[:1] @ matrix[:1, :1]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'I=H':>5}{'bytes':>8}" + "".join(f"{name:>{len(name) + 3}}" for name in ENGINES) + "   (us)")
    for units in (16, 32, 64, 128, 256):
        (cell,) = peers.weights(units, units, 1)
        x = np.random.default_rng(0).standard_normal((1, units)).astype(np.float32)
        ready = {name: make(cell, x) for name, make in ENGINES.items()}
        ends = {name: [step() for _ in range(50)][-1] for name, step in ready.items()}
        for name, end in ends.items():
            np.testing.assert_allclose(end, ends["torch.nn.LSTMCell"], atol=ATOL.get(name, 1e-5), err_msg=name)
        for name, (all_of_it, one) in readers(cell).items():
            ready[name, "all"], ready[name, "one"] = all_of_it, one
        best = dict.fromkeys(ready, np.inf)
        for _ in range(args.rounds):
            for name, step in ready.items():
                start = time.perf_counter()
                for _ in range(200):
                    step()
                best[name] = min(best[name], (time.perf_counter() - start) / 200 * 1e6)
        least = min(best[name, "all"] - best[name, "one"] for name in readers(cell))
        print(f"{units:>5}{least:>8.2f}" + "".join(f"{best[name]:>{len(name) + 3}.2f}" for name in ENGINES))
        over = {name: best[name] / best["stream"] for name in ENGINES if name != "stream"}
        print("over the stream's " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in over.items()), flush=True)


if __name__ == "__main__":
    main()
