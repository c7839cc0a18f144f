"""LSTMs in cellstack and in its peers, with the same weights, ready to be timed.

Each engine is a function of `(x [B, T, I], cells, threads)`. It returns an `Engine`: a call to be timed, and a function
that returns the arrays to compare beforehand. `cells` has the arrays of each layer, bottom first; with `directions=2`
two per layer, forward and backward, whose outputs are concatenated.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack import CellSpec, Network, reference
from cellstack.network import processors
from cellstack.nodes import Bidirectional, Cell, Recurrent

Array = NDArray[Any]
Arrays = tuple[Array, Array, Array]  # kernel [I, 4H], recurrent_kernel [H, 4H], bias [4H]; gates i f g o

STEPS = 50  # of a stepping engine before its output is compared

NEEDS = {"torch": ("torch",), "onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino", "onnx")}
"""The peers, and the packages that each needs; those that run ONNX files also need onnx."""


class Engine(NamedTuple):
    """A call to time, and a function that returns the arrays to compare, by name; it is called once, before timing."""

    run: Callable[[], Any]
    outputs: Callable[[], dict[str, Array]]


def installed() -> tuple[dict[str, str], dict[str, str]]:
    """Return the available peers with their versions, and the missing ones with the reason."""
    reasons = {name: _absent(packages) for name, packages in NEEDS.items()}
    there = {name: str(importlib.import_module(name).__version__) for name, why in reasons.items() if why is None}
    return there, {name: why for name, why in reasons.items() if why is not None}


def _absent(packages: Sequence[str]) -> str | None:
    try:
        for package in packages:
            importlib.import_module(package)
    except ModuleNotFoundError as error:
        return f"{error.name} isn't installed"
    except (ImportError, OSError) as error:  # installed, but can't be loaded
        return f"it can't be imported: {' '.join(str(error).split())[:200]}"
    return None


def weights(input_size: int, units: int, layers: int, seed: int = 0, directions: int = 1) -> list[Arrays]:
    """Return the arrays of `layers` layers, initialised as in PyTorch, in Keras's layout and gate order."""
    rng = np.random.default_rng(seed)
    scale = units**-0.5
    new = lambda *shape: rng.uniform(-scale, scale, shape).astype(np.float32)  # noqa: E731
    widths = [input_size] * directions + [directions * units] * (directions * (layers - 1))
    return [(new(width, 4 * units), new(units, 4 * units), new(4 * units)) for width in widths]


def network(cells: Sequence[Arrays], directions: int = 1) -> Network:
    """Return the stack as a Network."""
    specs = [CellSpec(kernel.shape[0], recurrent.shape[0]) for kernel, recurrent, _ in cells]
    made = [Cell(spec, *cell) for spec, cell in zip(specs, cells, strict=True)]
    if directions == 1:
        return Network([Recurrent(tuple(made))])
    ahead, back = ([Recurrent((cell,), go_backwards=turned) for cell in made[turned::2]] for turned in (False, True))
    return Network([Bidirectional(*both) for both in zip(ahead, back, strict=True)])


def exact(x: Array, cells: Sequence[Arrays], directions: int = 1) -> Array:
    """Return the reference result for `x` in float64: the last layer's y `[B, T, H]` or `[B, T, 2H]`."""
    for n in range(0, len(cells), directions):
        outputs = []
        for kernel, recurrent, bias in cells[n : n + directions]:
            arrays = {"kernel": kernel, "recurrent_kernel": recurrent, "bias": bias}
            spec = CellSpec(kernel.shape[0], recurrent.shape[0])
            outputs.append(reference.forward(spec, arrays, x, reverse=len(outputs) == 1).y)
        x = np.concatenate(outputs, axis=-1)
    return x


def torch_lstm(cells: Sequence[Arrays], input_size: int, directions: int = 1) -> Any:
    """Return the stack as a `torch.nn.LSTM`."""
    import torch

    units, layers, both = cells[0][1].shape[0], len(cells) // directions, directions == 2
    module = torch.nn.LSTM(input_size, units, layers, batch_first=True, bidirectional=both)
    with torch.no_grad():
        for n, (kernel, recurrent, bias) in enumerate(cells):
            name = _torch_name(n, directions)
            getattr(module, f"weight_ih_{name}").copy_(torch.from_numpy(kernel.T))
            getattr(module, f"weight_hh_{name}").copy_(torch.from_numpy(recurrent.T))
            getattr(module, f"bias_ih_{name}").copy_(torch.from_numpy(bias))
            getattr(module, f"bias_hh_{name}").zero_()
    return module


def _torch_name(n: int, directions: int) -> str:
    """Return how PyTorch calls cell `n` in its parameters' names."""
    return f"l{n // directions}" + ("_reverse" if n % directions else "")


# ── ONNX files, for the peers that run them ───────────────────────────────────────────────────────────────────────────


def iofg(array: Array) -> Array:
    """Reorder the gates from our order to ONNX's."""
    return np.concatenate([np.split(array, 4, axis=-1)[k] for k in (0, 3, 1, 2)], axis=-1)


def _onnx_arrays(cells: Sequence[Arrays], suffix: str = "") -> dict[str, Array]:
    """Return the arrays of an ONNX operator from those of each direction."""
    kernels, recurrents, biases = (np.stack([iofg(array) for array in arrays]) for arrays in zip(*cells, strict=True))
    biases = np.concatenate([biases, np.zeros_like(biases)], axis=1)
    return {f"W{suffix}": kernels.swapaxes(1, 2), f"R{suffix}": recurrents.swapaxes(1, 2), f"B{suffix}": biases}


def _onnx_file(nodes: list[Any], inputs: Any, outputs: Any, arrays: dict[str, Array]) -> bytes:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    before, after = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in end.items()]
        for end in (inputs, outputs)
    )
    tensors = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "stack", before, after, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def onnx_model(cells: Sequence[Arrays], batch: int, steps: int, input_size: int, directions: int = 1) -> bytes:
    """Return the stack as an ONNX file for one shape, x `[B, T, I]` → y `[B, T, H]` or `[B, T, 2H]`."""
    from onnx import helper

    units = cells[0][1].shape[0]
    nodes, name = [helper.make_node("Transpose", ["x"], ["x_t"], perm=[1, 0, 2])], "x_t"
    arrays: dict[str, Array] = {"axis": np.array([1], np.int64), "merged": np.array([0, 0, -1], np.int64)}
    direction = "forward" if directions == 1 else "bidirectional"
    for n in range(0, len(cells), directions):
        new = _onnx_arrays(cells[n : n + directions], str(n))
        arrays |= new
        nodes.append(helper.make_node("LSTM", [name, *new], [f"Y{n}"], hidden_size=units, direction=direction))
        if directions == 1:
            nodes.append(helper.make_node("Squeeze", [f"Y{n}", "axis"], [f"y{n}"]))
        else:  # [T, 2, B, H] -> [T, B, 2H]
            nodes.append(helper.make_node("Transpose", [f"Y{n}"], [f"Y{n}_t"], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [f"Y{n}_t", "merged"], [f"y{n}"]))
        name = f"y{n}"
    nodes.append(helper.make_node("Transpose", [name], ["y"], perm=[1, 0, 2]))
    return _onnx_file(nodes, {"x": [batch, steps, input_size]}, {"y": [batch, steps, directions * units]}, arrays)


def onnx_step(cell: Arrays) -> bytes:
    """Return one step as an ONNX file: x `[1, 1, I]`, h and c `[1, 1, H]` → h_after, c_after."""
    from onnx import helper

    width, units = cell[0].shape[0], cell[1].shape[0]
    arrays, state = _onnx_arrays([cell]), [1, 1, units]
    nodes = [helper.make_node("LSTM", ["x", *arrays, "", "h", "c"], ["", "h_after", "c_after"], hidden_size=units)]
    inputs = {"x": [1, 1, width], "h": state, "c": state}
    return _onnx_file(nodes, inputs, {"h_after": state, "c_after": state}, arrays)


def _onnx_session(file: bytes, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _openvino_model(file: bytes, threads: int, precision: str = "f32") -> Any:
    core = importlib.import_module("openvino").Core()  # not installed for tests and type checks
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    return core.compile_model(core.read_model(file), "CPU", settings)


# ── whole sequences ───────────────────────────────────────────────────────────────────────────────────────────────────


def _sequence(run: Callable[[], Array]) -> Engine:
    return Engine(run, lambda: {"y": run()})


def cellstack(x: Array, cells: Sequence[Arrays], threads: int, element: str = "float32", directions: int = 1) -> Engine:
    """`net(x)`; where this process has more processors than `threads`, `net.run` with so many threads."""
    net = network(cells, directions).with_weights(element)
    if threads < processors():
        return _sequence(lambda: net.run(x, threads=threads)[0])
    return _sequence(lambda: net(x))


def pytorch(x: Array, cells: Sequence[Arrays], threads: int, element: str = "float32", directions: int = 1) -> Engine:
    """`torch.nn.LSTM`, in bfloat16, including x and y."""
    import torch

    torch.set_num_threads(threads)
    dtype = getattr(torch, element)
    module = torch_lstm(cells, x.shape[2], directions).to(dtype)
    tensor = torch.from_numpy(x).to(dtype)

    def run() -> Any:
        with torch.inference_mode():
            return module(tensor)[0]

    return Engine(run, lambda: {"y": run().float().numpy()})


def onnxruntime(x: Array, cells: Sequence[Arrays], threads: int, directions: int = 1) -> Engine:
    """Its LSTM, on its CPU execution provider."""
    session = _onnx_session(onnx_model(cells, *x.shape, directions=directions), threads)
    return _sequence(lambda: session.run(None, {"x": x})[0])


def openvino(x: Array, cells: Sequence[Arrays], threads: int, precision: str = "f32", directions: int = 1) -> Engine:
    """The same file, compiled for latency in float32 or bfloat16; it shares the memory of x and y."""
    request = _openvino_model(
        onnx_model(cells, *x.shape, directions=directions), threads, precision
    ).create_infer_request()
    return _sequence(lambda: request.infer({"x": x}, share_inputs=True, share_outputs=True)[0])


# ── forward and backward ──────────────────────────────────────────────────────────────────────────────────────────────


def _training(module: Any, x: Array, gradients: Callable[[], dict[str, Any]], x_gradient: bool) -> Engine:
    import torch

    tensor = torch.from_numpy(x).clone().requires_grad_(x_gradient)

    def run() -> Any:
        tensor.grad = None
        module.zero_grad()
        y = module(tensor)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.ones_like(y))
        return y

    def outputs() -> dict[str, Array]:
        y = run()
        found = {"y": y.detach(), **gradients(), **({"gradient of x": tensor.grad} if x_gradient else {})}
        return {name: value.numpy().copy() for name, value in found.items()}

    return Engine(run, outputs)


PARAMETERS = {"kernel": "weight_ih", "recurrent_kernel": "weight_hh", "bias": "bias_ih"}


def cellstack_layers(x: Array, cells: Sequence[Arrays], threads: int, directions: int = 1) -> Engine:
    """cellstack's layers, without gradients."""
    import torch

    module, _ = _layers(x, cells, threads, directions)
    tensor = torch.from_numpy(x)

    def run() -> Any:
        with torch.inference_mode():
            return module(tensor)

    return Engine(run, lambda: {"y": run().numpy()})


def cellstack_training(
    x: Array, cells: Sequence[Arrays], threads: int, x_gradient: bool = False, directions: int = 1
) -> Engine:
    """cellstack's layers; the sum of y is the loss."""
    module, stack = _layers(x, cells, threads, directions)

    def gradients() -> dict[str, Any]:
        return {
            f"gradient of {name}, {_torch_name(n, directions)}": getattr(cell, name).grad
            for n, cell in enumerate(stack)
            for name in PARAMETERS
        }

    return _training(module, x, gradients, x_gradient)


def _layers(x: Array, cells: Sequence[Arrays], threads: int, directions: int) -> tuple[Any, list[Any]]:
    """Return the module and its cells."""
    import torch

    from cellstack import layers

    torch.set_num_threads(threads)
    width, units = x.shape[2], cells[0][1].shape[0]
    if directions == 1:
        stack = [layers.LSTMCell(units) for _ in cells]
        module = layers.RNN(stack, return_sequences=True, input_size=width)
    else:
        both = [layers.Bidirectional(layers.RNN(layers.LSTMCell(units), return_sequences=True)) for _ in cells[::2]]
        module = torch.nn.Sequential(*both)
        module(torch.from_numpy(x))  # creates the weights
        stack = [layer.cells[0] for one in both for layer in (one.forward_layer, one.backward_layer)]
    with torch.no_grad():
        for cell, arrays in zip(stack, cells, strict=True):
            for name, array in zip(PARAMETERS, arrays, strict=True):
                getattr(cell, name).copy_(torch.from_numpy(array))
    return module, stack


def pytorch_training(
    x: Array, cells: Sequence[Arrays], threads: int, x_gradient: bool = False, directions: int = 1
) -> Engine:
    """`torch.nn.LSTM`; the sum of y is the loss."""
    import torch

    torch.set_num_threads(threads)
    module = torch_lstm(cells, x.shape[2], directions)

    def gradients() -> dict[str, Any]:
        return {  # t() leaves a bias unchanged
            f"gradient of {ours}, {name}": getattr(module, f"{theirs}_{name}").grad.t()
            for name in (_torch_name(n, directions) for n in range(len(cells)))
            for ours, theirs in PARAMETERS.items()
        }

    return _training(module, x, gradients, x_gradient)


# ── one step ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def stepping(step: Callable[[], Array]) -> Engine:
    """Return an engine whose call runs one step, from the state that the previous call left."""
    return Engine(step, lambda: {"h": [np.array(step()) for _ in range(STEPS)][-1].reshape(1, -1)})


def stream(x: Array, cells: Sequence[Arrays], threads: int, element: str = "float32") -> Engine:
    """`net.stream().step`."""
    steps, frame = network(cells).stream(threads=threads, weights=element), x[:, 0]
    return stepping(lambda: steps.step(frame))


def torch_cell(x: Array, cells: Sequence[Arrays], threads: int) -> Engine:
    """`torch.nn.LSTMCell`, with the state kept by the caller."""
    import torch

    torch.set_num_threads(threads)
    ((kernel, recurrent, bias),) = cells
    module = torch.nn.LSTMCell(kernel.shape[0], recurrent.shape[0])
    with torch.no_grad():
        module.weight_ih.copy_(torch.from_numpy(kernel.T))
        module.weight_hh.copy_(torch.from_numpy(recurrent.T))
        module.bias_ih.copy_(torch.from_numpy(bias))
        module.bias_hh.zero_()
    state, frame = None, torch.from_numpy(x[:, 0])

    def step() -> Array:
        nonlocal state
        with torch.no_grad():
            state = module(frame, state)
        return state[0].numpy()

    return stepping(step)


def onnx_bound(x: Array, cells: Sequence[Arrays], threads: int) -> Engine:
    """ONNX Runtime with io-binding: two bindings, each reads the states that the other one wrote."""
    import onnxruntime as ort

    (cell,) = cells
    units = cell[1].shape[0]
    session = _onnx_session(onnx_step(cell), threads)
    new = lambda: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, 1, units), np.float32))  # noqa: E731  its memory is used
    states = [{name: new() for name in "hc"} for _ in "01"]
    bindings = []
    for before, after in (states, states[::-1]):
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x))
        for name in "hc":
            binding.bind_ortvalue_input(name, before[name])
            binding.bind_ortvalue_output(f"{name}_after", after[name])
        bindings.append((binding, after["h"]))
    now = 0

    def step() -> Array:
        nonlocal now
        binding, h = bindings[now]
        now = 1 - now
        session.run_with_iobinding(binding)
        return h.numpy()[0]

    return stepping(step)


def openvino_step(x: Array, cells: Sequence[Arrays], threads: int) -> Engine:
    """OpenVINO: two requests, each reads the states that the other one wrote."""
    (cell,) = cells
    compiled = _openvino_model(onnx_step(cell), threads)
    requests = [compiled.create_infer_request() for _ in "01"]
    h = c = np.zeros((1, 1, cell[1].shape[0]), np.float32)
    now = 0

    def step() -> Array:
        nonlocal now, h, c
        now = 1 - now
        after = requests[now].infer({"x": x, "h": h, "c": c}, share_inputs=True, share_outputs=True)
        h, c = after[0], after[1]
        return h[0]

    return stepping(step)


SURFACES: Mapping[str, Mapping[str, Callable[..., Engine]]] = {
    "inference": {"cellstack": cellstack, "torch": pytorch, "onnxruntime": onnxruntime, "openvino": openvino},
    "bfloat16": {
        "cellstack": partial(cellstack, element="bfloat16"),
        "torch": partial(pytorch, element="bfloat16"),
        "openvino": partial(openvino, precision="bf16"),
    },
    "layers": {"cellstack": cellstack_layers, "torch": pytorch},
    "training": {"cellstack": cellstack_training, "torch": pytorch_training},
    "step": {"cellstack": stream, "torch": torch_cell, "onnxruntime": onnx_bound, "openvino": openvino_step},
}
"""The surfaces, and the engines of each, cellstack first. The other peers don't train LSTMs or run them in bfloat16."""
