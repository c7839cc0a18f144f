"""Networks as ONNX files: every node as the operators that it is, every cell's state as an input and an output."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from cellstack.formats.files import replacing
from cellstack.formats.layout import Array
from cellstack.formats.onnx.cells import ONNX_NAMES, unique, write_operator
from cellstack.formats.onnx.file import KEY, onnx_package
from cellstack.network import Network
from cellstack.nodes import (
    Activation,
    Bidirectional,
    Cell,
    Conv1D,
    Dense,
    Embedding,
    Flatten,
    LayerNorm,
    Merge,
    Node,
    Permute,
    Pool,
    Pool1D,
    Recurrent,
    Repeat,
    Reshape,
    Scale,
    Select,
    Standardise,
)
from cellstack.spec import PARAMETERS, ShapeError, activation

OPSET, IR_VERSION = 17, 8
FIRST, LAST = -(2**63), 2**63 - 1
NOT_IN_ONNX = "it leaves steps out by a mask, which ONNX doesn't have"
MERGES = {"concat": "Concat", "add": "Add", "mul": "Mul", "ave": "Mean", "max": "Max", "sub": "Sub"}


class Writer:
    """Puts a network's nodes into a graph.

    Args:
        network: whose names the values have.
    """

    def __init__(self, network: Network) -> None:
        self.onnx = onnx_package()
        self.network = network
        self.dtype = network.dtype
        self.type = self.onnx.helper.np_dtype_to_tensor_dtype(network.dtype)
        self.taken = {*network.inputs, *network.names}
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.states: list[list[str]] = []  # by cell and part: the input's name and the output's
        self.constants: dict[tuple[int, ...], str] = {}

    # ── what writers of nodes use ───────────────────────────────────────────────────────────────────────────────────

    def fresh(self, name: str) -> str:
        """Return a name that nothing has, and keep it."""
        name = unique(self.taken, name)
        self.taken.add(name)
        return name

    def put(self, operator: str, inputs: list[str], output: str, name: str = "", **attributes: Any) -> str:
        """Put an operator in that makes `output`, and return that; it goes by `name`, else by its output."""
        self.nodes.append(self.onnx.helper.make_node(operator, inputs, [output], name=name or output, **attributes))
        return output

    def tensor(self, name: str, array: Array) -> str:
        """Put an array in, and return its name."""
        name = self.fresh(name)
        self.tensors.append(self.onnx.numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def integers(self, *values: int) -> str:
        """Return the name of a list of integers; lists alike are one."""
        if values not in self.constants:
            name = "to_" + "_".join(str(value).replace("-", "minus") for value in values)
            self.constants[values] = self.tensor(name, np.array(values, np.int64))
        return self.constants[values]

    def activate(self, name: str, x: str, text: str, output: str) -> str:
        """Put an activation in."""
        if text == "softmax":
            return self.put("Softmax", [x], output, name, axis=-1)
        kind, alpha, beta = activation(text)
        if kind in ("affine", "scaled_tanh"):
            inner, outer = (alpha, beta) if kind == "affine" else (beta, alpha)
            number = lambda value: self.tensor(f"{name}.number", np.array(value, self.dtype))  # noqa: E731
            x = self.put("Mul", [x, number(inner)], self.fresh(f"{name}.in"))
            if kind == "affine":
                return self.put("Add", [x, number(outer)], output, name)
            return self.put("Mul", [self.put("Tanh", [x], self.fresh(f"{name}.tanh")), number(outer)], output, name)
        keys = ("alpha", "beta")[: len(PARAMETERS.get(kind, ()))]
        given = dict(zip(keys, (alpha, beta), strict=False))
        return self.put("Identity" if kind == "linear" else ONNX_NAMES[kind], [x], output, name, **given)

    def finish(self, name: str, x: str, text: str, output: str) -> None:
        """Put in the activation with which a node ends, whose value before it is `x`; `x` is made last."""
        if text == "linear":
            self.nodes[-1].output[0] = output
        else:
            self.activate(f"{name}.activation", x, text, output)

    # ── states ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self, where: str, cells: tuple[Cell, ...], names: list[str], x: str) -> list[str]:
        """Put in the inputs that hold a call's states, and return `[D, B, H]` of each part.

        Each is `[B, H]`, and may be left out: the cell's own initial state then takes its place, `[1, H]`.
        """
        batch = self.put("Shape", [x], self.fresh(f"{where}.batch"), start=0, end=1)
        spec = cells[0].spec
        ready = []
        for part, size in spec.state_sizes.items():
            each = []
            shape = self.fresh(f"{where}.{part}.shape")
            self.put("Concat", [self.integers(1), batch, self.integers(size)], shape, axis=0)
            for name, cell in zip(names, cells, strict=True):
                usual = cell.arrays.get(f"initial_{part}", np.zeros(size, self.dtype))
                given = self.tensor(f"{name}.{part}", usual[None])
                rows = self.fresh(f"{given}.rows")
                self.inputs.append(self.onnx.helper.make_tensor_value_info(given, self.type, [rows, size]))
                wide = self.put("Unsqueeze", [given, self.integers(0)], self.fresh(f"{given}.wide"))
                each.append(self.put("Expand", [wide, shape], self.fresh(f"{given}.start")))
                self.states.append([given])
            if len(each) > 1:
                each = [self.put("Concat", each, self.fresh(f"{where}.{part}.start"), axis=0)]
            ready += each
        return ready

    def end(self, where: str, cells: tuple[Cell, ...], ends: list[str]) -> None:
        """Put in the outputs that hold the states after the call, out of `[D, B, H]` of each part."""
        waiting = [entry for entry in self.states if len(entry) == 1]
        spec = cells[0].spec
        for (_, size), end in zip(spec.state_sizes.items(), ends, strict=True):
            for way in range(len(cells)):
                entry = waiting.pop(0)
                after = self.fresh(f"{entry[0]}.after")
                self.put("Gather", [end, self.tensor(f"{after}.way", np.array(way, np.int64))], after, axis=0)
                self.outputs.append(self.onnx.helper.make_tensor_value_info(after, self.type, ["batch", size]))
                entry.append(after)

    # ── recurrent nodes ─────────────────────────────────────────────────────────────────────────────────────────────

    def operator(
        self, where: str, cells: tuple[Cell, ...], names: list[str], direction: str, x: str, steps: str, wanted: bool
    ) -> tuple[str, str]:
        """Put a recurrent operator in.

        Args:
            where: its name.
            cells: one a direction.
            names: what their states go by.
            direction: as ONNX has it.
            x: a value `[B, …]`, for the batch.
            steps: X, `[T, B, I]`.
            wanted: whether Y is.

        Returns:
            Y `[T, D, B, H]`, "" where it isn't wanted, and Y_h `[D, B, H]`.
        """
        written = write_operator(where, cells, direction)
        arrays = {key: self.tensor(f"{where}.{key}", array) for key, array in written.arrays.items()}
        states = self.start(where, cells, names, x)
        inputs = [steps, arrays["W"], arrays["R"], arrays.get("B", ""), "", *states, arrays.get("P", "")]
        while not inputs[-1]:
            inputs.pop()
        parts = cells[0].spec.state_sizes
        ends = [self.fresh(f"{where}.Y_{part}") for part in parts]
        y = self.fresh(f"{where}.Y") if wanted else ""
        self.nodes.append(
            self.onnx.helper.make_node(written.kind, inputs, [y, *ends], name=where, **written.attributes)
        )
        self.end(where, cells, ends)
        return y, ends[0]

    def stack(self, name: str, node: Recurrent, x: str, output: str) -> None:
        """Put a stack of cells in."""
        direction = "reverse" if node.go_backwards else "forward"
        steps = self.put("Transpose", [x], self.fresh(f"{name}.steps"), perm=[1, 0, 2])
        last = len(node.cells) - 1
        h = ""
        for number, cell in enumerate(node.cells):
            own = f"{name}.{number}" if last else name
            added = node.residual and number > 0 and cell.spec.input_size == cell.spec.output_size
            wanted = number < last or node.return_sequences or added
            y, h = self.operator(own, (cell,), [own], direction, x, steps, wanted)
            if wanted:
                flat = self.put("Squeeze", [y, self.integers(1)], self.fresh(f"{own}.flat"))
                steps = self.put("Add", [flat, steps], self.fresh(f"{own}.added")) if added else flat
                h = "" if added else h
        if node.return_sequences:
            turned = self.put("Transpose", [steps], self.fresh(f"{name}.rows"), perm=[1, 0, 2])
            if node.go_backwards:
                self.cut(turned, slice(None, None, -1), 1, output, f"{name}.in_order")
            else:
                self.nodes[-1].output[0] = output
        elif h:
            self.put("Squeeze", [h, self.integers(0)], output, f"{name}.last")
        else:
            at = self.tensor(f"{name}.at", np.array(0 if node.go_backwards else -1, np.int64))
            self.put("Gather", [steps, at], output, f"{name}.last", axis=0)

    def bidirectional(self, name: str, node: Bidirectional, x: str, output: str) -> None:
        """Put a pair of stacks in: as one operator where they are one cell each, with the same flags."""
        halves = (node.forward, node.backward)
        cells = tuple(cell for half in halves for cell in half.cells)
        one = node.merge_mode == "concat" and len(cells) == 2
        try:
            one = one and bool(write_operator(name, cells, "bidirectional"))
        except ValueError:  # the halves differ in a flag, or can't be written: said below, where they are apart
            one = False
        names = [f"{name}.{way}" for way in ("forward", "backward")]
        if one:
            steps = self.put("Transpose", [x], self.fresh(f"{name}.steps"), perm=[1, 0, 2])
            wanted = node.forward.return_sequences
            y, h = self.operator(name, cells, names, "bidirectional", x, steps, wanted)
            perm, shape = ([2, 0, 1, 3], (0, 0, -1)) if wanted else ([1, 0, 2], (0, -1))
            rows = self.put("Transpose", [y if wanted else h], self.fresh(f"{name}.rows"), perm=perm)
            self.put("Reshape", [rows, self.integers(*shape)], output, f"{name}.concat")
            return
        ends = [self.fresh(f"{way}.out") for way in names]
        for way, half, end in zip(names, halves, ends, strict=True):
            if way == names[0] or not half.return_sequences:
                self.stack(way, half, x, end)
            else:
                turned = self.fresh(f"{way}.turned")
                self.stack(way, half, x, turned)
                self.cut(turned, slice(None, None, -1), 1, end, f"{way}.out")
        self.merge(node.merge_mode.replace("sum", "add"), ends, -1, output, f"{name}.merged")

    # ── the other nodes ─────────────────────────────────────────────────────────────────────────────────────────────

    def cut(self, x: str, taken: slice, axis: int, output: str, name: str = "") -> str:
        """Put a slice of an axis in."""
        step = taken.step or 1
        start = taken.start if taken.start is not None else 0 if step > 0 else LAST
        stop = taken.stop if taken.stop is not None else LAST if step > 0 else FIRST
        given = [self.integers(value) for value in (start, stop, axis, step)]
        return self.put("Slice", [x, *given], output, name)

    def merge(self, mode: str, sources: list[str], axis: int, output: str, name: str = "") -> None:
        """Put a Merge in."""
        if mode == "sub" or len(sources) == 2 or mode in ("concat", "ave", "max"):
            self.put(MERGES[mode], sources, output, name, **({"axis": axis} if mode == "concat" else {}))
            return
        total = sources[0]
        for number, source in enumerate(sources[1:]):
            last = number == len(sources) - 2
            total = self.put(MERGES[mode], [total, source], output if last else self.fresh(f"{output}.{number}"))

    def channels(self, name: str, x: str) -> str:
        """Put `[B, T, W]` as `[B, W, T]` in, as ONNX's windows take it."""
        return self.put("Transpose", [x], self.fresh(f"{name}.channels"), perm=[0, 2, 1])

    def node(self, name: str, node: Node, sources: list[str]) -> None:
        """Put a node in; what it returns goes by its name.

        Raises:
            ValueError: a node that ONNX can't hold.
        """
        x = sources[0]
        if isinstance(node, Recurrent):
            self.stack(name, node, x, name)
        elif isinstance(node, Bidirectional):
            self.bidirectional(name, node, x, name)
        elif isinstance(node, Dense):
            product = self.put("MatMul", [x, self.tensor(f"{name}.kernel", node.kernel)], self.fresh(f"{name}.z"), name)
            if node.bias is not None:
                bias = self.tensor(f"{name}.bias", node.bias)
                product = self.put("Add", [product, bias], self.fresh(f"{name}.sum"))
            self.finish(name, product, node.activation, name)
        elif isinstance(node, Conv1D):
            self.conv(name, node, x)
        elif isinstance(node, Pool1D):
            sizes = {"kernel_shape": [node.size], "strides": [node.strides]}
            auto = "SAME_UPPER" if node.padding == "same" else "VALID"
            operator = "MaxPool" if node.mode == "max" else "AveragePool"
            turned = self.channels(name, x)
            y = self.put(operator, [turned], self.fresh(f"{name}.pooled"), name, auto_pad=auto, **sizes)
            self.put("Transpose", [y], name, f"{name}.rows", perm=[0, 2, 1])
        elif isinstance(node, Pool):
            if node.mode == "last":
                at = self.tensor(f"{name}.at", np.array(-1, np.int64))
                self.put("Gather", [x, at], name, axis=1)
            else:
                self.put("ReduceMean" if node.mode == "mean" else "ReduceMax", [x], name, axes=[1], keepdims=0)
        elif isinstance(node, (Standardise, Scale)):
            pairs = (
                {"Sub": "mean", "Div": "scale"} if isinstance(node, Standardise) else {"Mul": "scale", "Add": "shift"}
            )
            for operator, array in pairs.items():
                value = self.tensor(f"{name}.{array}", getattr(node, array))
                x = self.put(
                    operator, [x, value], self.fresh(f"{name}.{operator}"), name if operator in "SubMul" else ""
                )
            self.nodes[-1].output[0] = name
        elif isinstance(node, LayerNorm):
            self.layer_norm(name, node, x)
        else:
            self.shaping(name, node, sources)

    def conv(self, name: str, node: Conv1D, x: str) -> None:
        """Put a convolution in."""
        arrays = [self.tensor(f"{name}.kernel", node.kernel.transpose(2, 1, 0))]
        if node.bias is not None:
            arrays.append(self.tensor(f"{name}.bias", node.bias))
        if isinstance(node.padding, tuple):
            padding = {"pads": list(node.padding)}
        elif node.padding == "causal":
            padding = {"pads": [node.span - 1, 0]}
        else:
            padding = {"auto_pad": "SAME_UPPER" if node.padding == "same" else "VALID"}
        sizes = {"strides": [node.strides], "dilations": [node.dilation], "group": node.groups}
        turned = self.channels(name, x)
        y = self.put("Conv", [turned, *arrays], self.fresh(f"{name}.z"), name, **sizes, **padding)
        y = self.put("Transpose", [y], self.fresh(f"{name}.rows"), perm=[0, 2, 1])
        self.finish(name, y, node.activation, name)

    def layer_norm(self, name: str, node: LayerNorm, x: str) -> None:
        """Put a LayerNorm in; ONNX's must have a gain: ones, where this one hasn't any."""
        width = self.network.shapes[name][-1]
        if node.gain is None and width is None:
            raise ValueError(f"save: {name}: expected a LayerNorm with a gain, or one whose width is known")
        arrays = [self.tensor(f"{name}.gain", np.ones(width or 1, self.dtype) if node.gain is None else node.gain)]
        if node.bias is not None:
            arrays.append(self.tensor(f"{name}.bias", node.bias))
        self.put("LayerNormalization", [x, *arrays], name, axis=-1, epsilon=float(node.epsilon))

    def shaping(self, name: str, node: Node, sources: list[str]) -> None:
        """Put a node in that moves numbers, an activation or a table."""
        x = sources[0]
        if isinstance(node, Activation):
            self.activate(name, x, node.activation, name)
        elif isinstance(node, Embedding) and not node.mask_zero:
            self.put("Gather", [self.tensor(f"{name}.table", node.table), x], name, axis=0)
        elif isinstance(node, Flatten):
            self.put("Flatten", [x], name, axis=1)
        elif isinstance(node, Reshape):
            self.put("Reshape", [x, self.integers(0, *node.shape)], name)
        elif isinstance(node, Permute):
            self.put("Transpose", [x], name, perm=[0, *node.dims])
        elif isinstance(node, Repeat):
            wide = self.put("Unsqueeze", [x, self.integers(1)], self.fresh(f"{name}.wide"))
            self.put("Tile", [wide, self.integers(1, node.times, 1)], name)
        elif isinstance(node, Select):
            self.cut(x, node.taken, node.axis, name)
        elif isinstance(node, Merge):
            self.merge(node.mode, sources, node.axis, name)
        else:
            raise ValueError(f"save: {name}: expected a node that ONNX has, got {type(node).__name__}: {NOT_IN_ONNX}")


def model_of(network: Network) -> Any:
    """Return a network as a ModelProto.

    Raises:
        ValueError: something that ONNX can't hold; the message names it.
    """
    writer = Writer(network)
    helper = writer.onnx.helper
    inputs = []
    for name in network.inputs:
        ids = name in network.graph.ids
        axes = [axis if axis is not None else f"{name}.{n + 1}" for n, axis in enumerate(network.shapes[name])]
        kind = writer.onnx.TensorProto.INT64 if ids else writer.type
        inputs.append(helper.make_tensor_value_info(name, kind, ["batch", *axes]))
    for name, node, sources in zip(network.names, network.nodes, network.wires, strict=True):
        writer.node(name, node, list(sources))
    outputs = []
    for name in network.outputs:
        axes = [axis if axis is not None else f"{name}.{n + 1}" for n, axis in enumerate(network.shapes[name])]
        outputs.append(helper.make_tensor_value_info(name, writer.type, ["batch", *axes]))
    graph = helper.make_graph(
        writer.nodes, "network", [*inputs, *writer.inputs], [*outputs, *writer.outputs], writer.tensors
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="cellstack"
    )
    said = {"metadata": network.metadata, "states": writer.states}
    helper.set_model_props(model, {KEY: json.dumps(said)})
    return model


def write(network: Network, path: str) -> None:
    """Write a network to a file, whole or not at all.

    Raises:
        ValueError: something that ONNX can't hold, or more than protobuf does, 2 GiB.
        OSError: the file can't be written.
    """
    try:
        data = model_of(network).SerializeToString()
    except ShapeError as error:  # a ValueError too: one text for all
        raise ValueError(str(error)) from None
    with replacing(path) as file:
        file.write(data)
