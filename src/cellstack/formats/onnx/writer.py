"""Networks as ONNX files: every node as its operators, every cell's state as an input and an output."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cellstack.formats.files import replacing
from cellstack.formats.onnx.cells import write_operator
from cellstack.formats.onnx.compositions import (
    attention,
    grid_conv,
    grid_pool,
    group_norm,
    grouped_dense,
    rms_norm,
    time_softmax,
)
from cellstack.formats.onnx.file import KEY, onnx_package
from cellstack.formats.onnx.masks import GraphMasks, last_used, masked, neutral, of_lengths, reduced
from cellstack.formats.onnx.memories import memory
from cellstack.formats.onnx.pieces import LAST, Pieces
from cellstack.formats.onnx.scan import body_of
from cellstack.network import Network
from cellstack.nodes import (
    MLSTM,
    Activation,
    Attention,
    Bidirectional,
    Cell,
    Clip,
    Conv1D,
    Dense,
    Embedding,
    Flatten,
    Function,
    GlobalPool,
    GridConv,
    GridPool,
    GroupedDense,
    GroupNorm,
    LayerNorm,
    Magnitude,
    Masking,
    Merge,
    Node,
    Pad,
    Permute,
    Pool1D,
    Power,
    Recurrent,
    Reduce,
    Repeat,
    RepeatLike,
    Reshape,
    RMSNorm,
    Scale,
    Select,
    Standardise,
    StepMask,
    Take,
    TimeSoftmax,
)

OPSET, IR_VERSION = 17, 8
MERGES = {"concat": "Concat", "add": "Add", "mul": "Mul", "ave": "Mean", "max": "Max", "min": "Min", "sub": "Sub"}


def _padding(padding: str | tuple[int, int], span: int) -> dict[str, Any]:
    """Return the attributes for padding a sequence to windows of `span` steps."""
    if padding in ("valid", "same"):
        return {"auto_pad": "SAME_UPPER" if padding == "same" else "VALID"}
    return {"pads": [span - 1, 0] if padding == "causal" else list(padding)}


def can_be_operator(cells: tuple[Cell, ...]) -> bool:
    """Whether cells, one per direction, can be written as one of ONNX's recurrent operators."""
    try:
        write_operator("", cells, "forward")
    except ValueError:
        return False
    return True


class Writer(Pieces):
    """Writes a network's nodes into a graph.

    Args:
        network: the network; its names become the names of values.
    """

    def __init__(self, network: Network) -> None:
        super().__init__(onnx_package(), network.dtype, {*network.inputs, *network.names})
        self.network = network
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.states: list[list[str]] = []  # by cell and part: the input's name, "" without one, and the output's
        self.begun: list[list[str]] = []  # of the current operator: the inputs, and the names of its states
        self.zeros: list[str] = []  # operators whose output is zero at masked steps
        self.masks: dict[str, str] = {}  # masks by value: a flag per step, [B, T, 1], True where it is used

    def finish(self, name: str, x: str, text: str, output: str) -> None:
        """Add a node's final activation of `x`, the output of the last operator added."""
        if text == "linear":
            self.nodes[-1].output[0] = output
        else:
            self.activate(f"{name}.activation", x, text, output)

    # ── states ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(
        self, where: str, cells: tuple[Cell, ...], names: list[str], x: str, ways: bool, given: Sequence[str]
    ) -> list[str]:
        """Add the inputs for the initial states, and return the values of each part.

        They are `[D, B, H]` where `ways`, else those of one cell, `[B, H]`. An omitted input takes the cell's own
        initial state, `[1, H]`. Cells whose initial states are values of the graph, `given`, in order of the cells,
        have no such inputs.
        """
        if given:
            parts = list(cells[0].spec.state_sizes)
            ready = []
            for place, part in enumerate(parts):
                self.begun += [["", f"{name}.{part}"] for name in names]
                each = [*given[place :: len(parts)]]
                if ways:
                    wide = self.fresh(f"{where}.{part}.wide")
                    each = [self.put("Unsqueeze", [one, self.integers(0)], self.fresh(wide)) for one in each]
                if len(each) > 1:
                    each = [self.put("Concat", each, self.fresh(f"{where}.{part}.start"), axis=0)]
                ready += each
            return ready
        batch = self.put("Shape", [x], self.fresh(f"{where}.batch"), start=0, end=1)
        ready = []
        for part, size in cells[0].spec.state_sizes.items():
            each = []
            shape = self.fresh(f"{where}.{part}.shape")
            self.put("Concat", [*([self.integers(1)] if ways else []), batch, self.integers(size)], shape, axis=0)
            for name, cell in zip(names, cells, strict=True):
                start = self.tensor(f"{name}.{part}", cell.initial[part][None])
                rows = self.fresh(f"{start}.rows")
                self.inputs.append(self.onnx.helper.make_tensor_value_info(start, self.type, [rows, size]))
                self.begun.append([start, start])
                if ways:
                    start = self.put("Unsqueeze", [start, self.integers(0)], self.fresh(f"{start}.wide"))
                each.append(self.put("Expand", [start, shape], self.fresh(f"{name}.{part}.start")))
            if len(each) > 1:
                each = [self.put("Concat", each, self.fresh(f"{where}.{part}.start"), axis=0)]
            ready += each
        return ready

    def after(self, shapes: Iterable[Sequence[int]]) -> list[str]:
        """Add outputs `[B, …]` for the states added last, and return their names, which are yet to be computed."""
        names = []
        for (given, name), shape in zip(self.begun, shapes, strict=True):
            after = self.fresh(f"{name}.after")
            self.states.append([given, after])
            self.outputs.append(self.onnx.helper.make_tensor_value_info(after, self.type, ["batch", *shape]))
            names.append(after)
        self.begun = []
        return names

    def lengths(self) -> Any:
        """Add the rows' lengths as masks of the inputs with time, and return the graph's input.

        If it is omitted, all steps are used.
        """
        timed = [name for name in self.network.inputs if self.network.graph.timed(name)]
        if not timed:
            raise ValueError("save: lengths need an input with a time axis")
        given = self.tensor("lengths", np.array([LAST]))
        for name in timed:
            self.masks[name] = of_lengths(self, name, given)
        return self.onnx.helper.make_tensor_value_info(given, self.onnx.TensorProto.INT64, [f"{given}.rows"])

    # ── recurrent nodes ───────────────────────────────────────────────────────────────────────────────────────────────

    def operator(
        self,
        where: str,
        cells: tuple[Cell, ...],
        names: list[str],
        direction: str,
        x: str,
        steps: str,
        wanted: bool,
        given: Sequence[str],
    ) -> tuple[str, str]:
        """Add a recurrent operator.

        Args:
            where: the name of the operator.
            cells: one per direction.
            names: the names of their states.
            direction: ONNX's direction.
            x: a value `[B, …]` with the batch size.
            steps: X, `[T, B, I]`.
            wanted: whether Y is used.
            given: the initial states as values; empty = inputs of the graph.

        Returns:
            Y `[T, D, B, H]`, "" where unused, and Y_h `[D, B, H]`.
        """
        written = write_operator(where, cells, direction)
        arrays = {key: self.tensor(f"{where}.{key}", array) for key, array in written.arrays.items()}
        parts = cells[0].spec.state_sizes
        states = self.start(where, cells, names, x, True, given)
        inputs = [steps, arrays["W"], arrays["R"], arrays.get("B", ""), "", *states, arrays.get("P", "")]
        while not inputs[-1]:
            inputs.pop()
        ends = [self.fresh(f"{where}.Y_{part}") for part in parts]
        y = self.fresh(f"{where}.Y") if wanted else ""
        self.nodes.append(
            self.onnx.helper.make_node(written.kind, inputs, [y, *ends], name=where, **written.attributes)
        )
        each = [(end, way, size) for end, size in zip(ends, parts.values(), strict=True) for way in range(len(cells))]
        for (end, way, _), after in zip(each, self.after([size] for *_, size in each), strict=True):
            self.put("Gather", [end, self.tensor(f"{after}.way", np.array(way, np.int64))], after, axis=0)
        return y, ends[0]

    def scan(
        self,
        where: str,
        cell: Cell,
        direction: str,
        x: str,
        steps: str,
        mask: str,
        residual: bool,
        given: Sequence[str],
    ) -> tuple[str, str]:
        """Add a cell as a Scan; the arguments are as in `operator`, the mask is `[T, B, 1]`, or "".

        Returns:
            y `[T, B, P]`, and y after the last step `[B, P]`; with a mask and a residual, both are h + x.
        """
        states = self.start(where, (cell,), [where], x, False, given)
        body = body_of(where, cell, bool(mask), residual)
        ends = self.after([size] for size in cell.spec.state_sizes.values())
        last, y = ends[0], self.fresh(f"{where}.y")
        if mask:
            states.append(states[0])
            last = self.fresh(f"{where}.y_last")
        way = [int(direction == "reverse")]
        flows = [steps, mask] if mask else [steps]
        self.nodes.append(
            self.onnx.helper.make_node(
                "Scan",
                [*states, *flows],
                [*ends, *([last] if mask else []), y],
                name=where,
                body=body,
                num_scan_inputs=len(flows),
                scan_input_directions=way * len(flows),
                scan_output_directions=way,
            )
        )
        return y, last

    def stack(self, name: str, node: Recurrent, x: str, output: str, mask: str, starts: Sequence[str] = ()) -> None:
        """Add a stack of cells; `mask` is the mask of `x`, or "", `starts` the initial states."""
        direction = "reverse" if node.go_backwards else "forward"
        steps = self.put("Transpose", [x], self.fresh(f"{name}.steps"), perm=[1, 0, 2])
        transposed = self.of("Transpose", mask, perm=[1, 0, 2]) if mask else ""
        top = len(node.cells) - 1
        at = np.array(0 if node.go_backwards else -1, np.int64)
        last = ""  # the top cell's final output, [B, P]; "": taken from its steps
        for number, cell in enumerate(node.cells):
            own = f"{name}.{number}" if top else name
            added = node.residual and number > 0 and cell.spec.input_size == cell.spec.output_size
            if node.zero_output_for_mask and number == top:
                self.zeros.append(own)
            wanted = number < top or node.return_sequences or added
            given, starts = starts[: len(cell.spec.state_sizes)], starts[len(cell.spec.state_sizes) :]
            if mask or self.dtype == np.float64 or not can_be_operator((cell,)):
                flat, last = self.scan(own, cell, direction, x, steps, transposed, added, given)
                added = added and not mask
            else:
                y, h = self.operator(own, (cell,), [own], direction, x, steps, wanted, given)
                flat = self.put("Squeeze", [y, self.integers(1)], self.fresh(f"{own}.flat")) if wanted else ""
                last = "" if wanted else self.put("Squeeze", [h, self.integers(0)], self.fresh(f"{own}.last"))
            steps = self.put("Add", [flat, steps], self.fresh(f"{own}.added")) if added else flat
            last = "" if added else last
        if node.return_sequences:
            rows = self.put("Transpose", [steps], self.fresh(f"{name}.rows"), perm=[1, 0, 2])
            if mask and node.zero_output_for_mask:
                rows = self.of("Where", mask, rows, self.number(0.0))
            if node.go_backwards:
                self.cut(rows, slice(None, None, -1), 1, output, self.fresh(f"{name}.in_order"))
            else:
                self.nodes[-1].output[0] = output
            return
        last = last or self.put("Gather", [steps, self.tensor(f"{name}.at", at)], self.fresh(f"{name}.last"), axis=0)
        if mask and node.zero_output_for_mask:
            used = self.of("Gather", mask, self.tensor(f"{name}.at", at), axis=1)
            last = self.of("Where", used, last, self.number(0.0))
        if list(self.nodes[-1].output) == [last]:
            self.nodes[-1].output[0] = output
        else:  # it is also the state after the call
            self.put("Identity", [last], output, f"{name}.end")

    def bidirectional(
        self, name: str, node: Bidirectional, x: str, output: str, mask: str, starts: Sequence[str]
    ) -> None:
        """Add a pair of stacks: as one operator where each is one cell, with the same flags."""
        directions = (node.forward, node.backward)
        cells = tuple(cell for direction in directions for cell in direction.cells)
        names = [f"{name}.{way}" for way in ("forward", "backward")]
        one = node.merge_mode == "concat" and len(cells) == 2 and not mask and self.dtype == np.float32
        if one and can_be_operator(cells):
            steps = self.put("Transpose", [x], self.fresh(f"{name}.steps"), perm=[1, 0, 2])
            wanted = node.forward.return_sequences
            y, h = self.operator(name, cells, names, "bidirectional", x, steps, wanted, starts)
            perm, shape = ([2, 0, 1, 3], (0, 0, -1)) if wanted else ([1, 0, 2], (0, -1))
            rows = self.put("Transpose", [y if wanted else h], self.fresh(f"{name}.rows"), perm=perm)
            self.put("Reshape", [rows, self.integers(*shape)], output, f"{name}.concat")
            return
        ends = [self.fresh(f"{way}.out") for way in names]
        count = len(node.forward.state_sizes)
        each = (starts[:count], starts[count:])
        for way, direction, end, given in zip(names, directions, ends, each, strict=True):
            if way == names[0] or not direction.return_sequences:
                self.stack(way, direction, x, end, mask, given)
            else:
                backwards = self.fresh(f"{way}.backwards")
                self.stack(way, direction, x, backwards, mask, given)
                self.cut(backwards, slice(None, None, -1), 1, end, f"{way}.out")
        self.merge(node.merge_mode.replace("sum", "add"), ends, -1, output, f"{name}.merged")

    # ── the other nodes ───────────────────────────────────────────────────────────────────────────────────────────────

    def merge(self, mode: str, sources: list[str], axis: int, output: str, name: str = "") -> None:
        """Add a Merge."""
        if mode == "sub" or len(sources) == 2 or mode in ("concat", "ave", "max", "min"):
            self.put(MERGES[mode], sources, output, name, **({"axis": axis} if mode == "concat" else {}))
            return
        total = sources[0]
        for number, source in enumerate(sources[1:]):
            last = number == len(sources) - 2
            total = self.put(MERGES[mode], [total, source], output if last else self.fresh(f"{output}.{number}"))

    def channels(self, name: str, x: str) -> str:
        """Transpose `[B, T, W]` to `[B, W, T]`, the order that ONNX's windows need."""
        return self.put("Transpose", [x], self.fresh(f"{name}.channels"), perm=[0, 2, 1])

    def node(self, name: str, node: Node, sources: list[str]) -> None:
        """Add a node; its output has its name.

        Raises:
            ValueError: a node that ONNX can't express.
        """
        x, starts = sources[0], node.apart(sources)[1]
        masks = [self.masks.get(source, "") for source in sources]
        known, axes = [mask or None for mask in masks], len(self.network.shapes[x])
        if isinstance(node, (Embedding, Masking)):
            own = masked(self, name, node, x, masks[0])
            self.masks[name] = node.mask_after(known, axes, GraphMasks(self, own, sources)) or ""
            return
        if isinstance(node, StepMask):
            flags = self.of("Not", self.of("Equal", sources[1], self.number(0.0)))
            own = self.of("Unsqueeze", flags, self.integers(2))
            self.masks[name] = node.mask_after(known, axes, GraphMasks(self, own, sources)) or ""
            self.put("Identity", [x], name)
            return
        self.masks[name] = node.mask_after(known, axes, GraphMasks(self, "", sources)) or ""
        if isinstance(node, Recurrent):
            self.stack(name, node, x, name, masks[0], starts)
        elif isinstance(node, Bidirectional):
            self.bidirectional(name, node, x, name, masks[0], starts)
        elif isinstance(node, MLSTM):
            memory(self, name, node, x, masks[0])
        elif isinstance(node, Dense):
            product = self.put("MatMul", [x, self.tensor(f"{name}.kernel", node.kernel)], self.fresh(f"{name}.z"), name)
            if node.bias is not None:
                bias = self.tensor(f"{name}.bias", node.bias)
                product = self.put("Add", [product, bias], self.fresh(f"{name}.sum"))
            self.finish(name, product, node.activation, name)
        elif isinstance(node, Conv1D):
            self.conv(name, node, x)
        elif isinstance(node, Pool1D):
            if isinstance(node.padding, tuple) and max(node.padding) >= node.size:
                raise ValueError(f"save: {name}: expected padding below the window's {node.size}, got {node.padding}")
            sizes = {"kernel_shape": [node.size], "strides": [node.strides], **_padding(node.padding, node.size)}
            operator = "MaxPool" if node.mode == "max" else "AveragePool"
            y = self.put(operator, [self.channels(name, x)], self.fresh(f"{name}.pooled"), name, **sizes)
            self.put("Transpose", [y], name, f"{name}.rows", perm=[0, 2, 1])
        elif isinstance(node, GlobalPool):
            if node.mode != "last":
                reduced(self, name, node.mode, x, 1, False, masks[0])
            elif masks[0]:
                last_used(self, name, x, masks[0])
            else:
                at = self.tensor(f"{name}.at", np.array(-1, np.int64))
                self.put("Gather", [x, at], name, axis=1)
        elif isinstance(node, Reduce):
            place = node.place(axes)
            reduced(self, name, node.mode, x, place, node.keepdims, masks[0] if place == 1 else "")
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
        elif isinstance(node, GridConv):
            grid_conv(self, name, node, x, axes == 1)
        elif isinstance(node, GridPool):
            grid_pool(self, name, node, x, axes == 1)
        elif isinstance(node, TimeSoftmax):
            time_softmax(self, name, x, masks[0])
        elif isinstance(node, GroupNorm):
            group_norm(self, name, node, x, self.network.shapes[x], masks[0] if node.over_time else "")
        elif isinstance(node, RMSNorm):
            rms_norm(self, name, node, x)
        elif isinstance(node, GroupedDense):
            grouped_dense(self, name, node, x, axes)
        elif isinstance(node, Attention):
            width = self.network.shapes[x][-1]
            if width is None:
                raise ValueError(f"save: {name}: an Attention needs a known width")
            attention(self, name, node, sources, width, [mask for mask in masks[1:] if mask])
        else:
            self.shaping(name, node, sources)

    def conv(self, name: str, node: Conv1D, x: str) -> None:
        """Add a convolution."""
        arrays = [self.tensor(f"{name}.kernel", node.kernel.transpose(2, 1, 0))]
        if node.bias is not None:
            arrays.append(self.tensor(f"{name}.bias", node.bias))
        sizes = {"strides": [node.strides], "dilations": [node.dilation], "group": node.groups}
        channels = self.channels(name, x)
        y = self.put(
            "Conv", [channels, *arrays], self.fresh(f"{name}.z"), name, **sizes, **_padding(node.padding, node.span)
        )
        y = self.put("Transpose", [y], self.fresh(f"{name}.rows"), perm=[0, 2, 1])
        self.finish(name, y, node.activation, name)

    def layer_norm(self, name: str, node: LayerNorm, x: str) -> None:
        """Add a LayerNorm; ONNX requires a gain, so a missing one becomes ones."""
        width = self.network.shapes[name][-1]
        if node.gain is None and width is None:
            raise ValueError(f"save: {name}: a LayerNorm without a gain needs a known width")
        arrays = [self.tensor(f"{name}.gain", np.ones(width or 1, self.dtype) if node.gain is None else node.gain)]
        if node.bias is not None:
            arrays.append(self.tensor(f"{name}.bias", node.bias))
        self.put("LayerNormalization", [x, *arrays], name, axis=-1, epsilon=float(node.epsilon))

    def magnitude(self, name: str, node: Magnitude, x: str) -> None:
        """Add the magnitudes of complex numbers: a slice for the real parts and one for the imaginary parts."""
        width = self.network.shapes[x][-1]
        if width is None:
            raise ValueError(f"save: {name}: a Magnitude needs a known width")
        squares = []
        for part, taken in (("real", slice(0, width // 2)), ("imaginary", slice(width // 2, width))):
            cut = self.fresh(f"{name}.{part}")
            self.cut(x, taken, -1, cut)
            squares.append(self.put("Mul", [cut, cut], self.fresh(f"{cut}.squared")))
        total = self.put("Add", squares, self.fresh(f"{name}.total"))
        if node.epsilon:
            total = self.put("Add", [total, self.number(node.epsilon)], self.fresh(f"{name}.above"))
        self.put("Sqrt", [total], name)

    def shaping(self, name: str, node: Node, sources: list[str]) -> None:
        """Add a node that moves numbers, an activation or a table."""
        x = sources[0]
        if isinstance(node, Activation):
            self.activate(name, x, node.activation, name)
        elif isinstance(node, Clip):
            bounds = ["" if bound is None else self.number(bound) for bound in (node.low, node.high)]
            self.put("Clip", [x, *bounds], name)
        elif isinstance(node, Power):
            names = {0.5: "Sqrt", -1.0: "Reciprocal"}
            if node.exponent in names:
                self.put(names[node.exponent], [x], name)
            else:
                self.put("Pow", [x, self.number(node.exponent)], name)
        elif isinstance(node, Function):
            self.put(node.function.title(), [x], name)
        elif isinstance(node, Pad):
            axes = len(self.network.shapes[x]) + 1
            ends = [0] * axes
            ends[node.place(axes - 1)] = node.before
            ends += [0] * axes
            ends[axes + node.place(axes - 1)] = node.after
            self.put("Pad", [x, self.integers(*ends), self.number(node.value)], name)
        elif isinstance(node, Flatten):
            self.put("Flatten", [x], name, axis=1)
        elif isinstance(node, Reshape):
            self.put("Reshape", [x, self.integers(0, *node.shape)], name)
        elif isinstance(node, Permute):
            self.put("Transpose", [x], name, perm=[0, *node.dims])
        elif isinstance(node, Repeat):
            wide = self.put("Unsqueeze", [x, self.integers(1)], self.fresh(f"{name}.wide"))
            self.put("Tile", [wide, self.integers(1, node.times, 1)], name)
        elif isinstance(node, RepeatLike):
            wide = self.put("Unsqueeze", [x, self.integers(1)], self.fresh(f"{name}.wide"))
            steps = self.put("Shape", [sources[1]], self.fresh(f"{name}.steps"), start=1, end=2)
            times = self.put("Concat", [self.integers(1), steps, self.integers(1)], self.fresh(f"{name}.times"), axis=0)
            self.put("Tile", [wide, times], name)
        elif isinstance(node, Select):
            self.cut(x, node.taken, node.axis, name)
        elif isinstance(node, Take):
            place = node.place(len(self.network.shapes[x]))
            self.put("Gather", [x, self.integers(*node.indices)], name, axis=place)
        elif isinstance(node, Magnitude):
            self.magnitude(name, node, x)
        elif isinstance(node, Merge):
            masks = [self.masks.get(source, "") for source in sources]
            self.merge(node.mode, neutral(self, node, sources, masks), node.axis, name)
        else:
            raise ValueError(f"save: {name}: {type(node).__name__} isn't supported in ONNX files")


def cell_names(name: str, node: Node) -> list[str]:
    """Return the names of the states of a node's cells."""
    directions = {name: node.cells}
    if isinstance(node, Bidirectional):
        directions = {f"{name}.forward": node.forward.cells, f"{name}.backward": node.backward.cells}
    return [own if len(cells) == 1 else f"{own}.{n}" for own, cells in directions.items() for n in range(len(cells))]


def state_names(network: Network) -> dict[str, str]:
    """Return the outputs that hold the final states, by their number and part, such as `cell 0 h`."""
    entries = list(zip(network.names, network.nodes, strict=True))
    names = [own for name, node in entries for own in cell_names(name, node)]
    names += [name for name, node in entries if isinstance(node, MLSTM)]
    return {
        f"cell {number} {part}": f"{name}.{part}.after"
        for number, (name, one) in enumerate(zip(names, network.stateful, strict=True))
        for part in one.state_shapes
    }


def model_of(network: Network, lengths: bool = False) -> Any:
    """Return a network as a ModelProto.

    Args:
        network: what to write.
        lengths: whether to add an input with the rows' lengths.

    Raises:
        ValueError: something that ONNX can't express; the message names it.
    """
    writer = Writer(network)
    helper = writer.onnx.helper
    inputs = []
    for name in network.inputs:
        ids = name in network.graph.ids
        axes = [axis if axis is not None else f"{name}.{n + 1}" for n, axis in enumerate(network.shapes[name])]
        kind = writer.onnx.TensorProto.INT64 if ids else writer.type
        inputs.append(helper.make_tensor_value_info(name, kind, ["batch", *axes]))
    if lengths:
        inputs.append(writer.lengths())
    for name, node, sources, states in zip(
        network.names, network.nodes, network.wires, network.graph.states, strict=True
    ):
        writer.node(name, node, list(sources))
        owns = cell_names(name, node)
        for value, cell, part in states:
            writer.put("Identity", [f"{owns[cell]}.{part}.after"], value)
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
    said = {"metadata": network.metadata, "states": writer.states, "zero_output_for_mask": writer.zeros}
    helper.set_model_props(model, {KEY: json.dumps(said)})
    return model


def write(network: Network, path: str, lengths: bool = False) -> None:
    """Write a network to a file, whole or not at all; `lengths` as for `model_of`.

    Raises:
        ValueError: something that ONNX can't express, or more data than protobuf allows, 2 GiB.
        OSError: the file can't be written.
    """
    data = model_of(network, lengths).SerializeToString()
    with replacing(path) as file:
        file.write(data)
