"""Writes the nodes with cells: as ONNX's recurrent operators, else as Scans; their states as inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cellstack.cells.layout import Array, CellArrays, reorder, to_rows
from cellstack.cells.spec import CellSpec
from cellstack.formats.onnx.cells import (
    FLAGS,
    ONNX_NAMES,
    OPERATORS_OF,
    ORDER,
    PARAMETERS,
    blocks_of,
    gates_of,
    gates_of_arrays,
    orders_of_peepholes,
    slots_of,
)
from cellstack.formats.onnx.file import onnx_package
from cellstack.formats.onnx.pieces import Pieces
from cellstack.formats.onnx.scan import body_of
from cellstack.network import Network
from cellstack.nodes import MLSTM, Bidirectional, Cell, Node, Recurrent
from cellstack.nodes.values import Celled

NOT_IN_ONNX = {
    "heads": 1,
    "proj_size": 0,
    "layer_norm": False,
    "cell_clip": None,
    "attention": False,
    "use_kernel": True,
}


class Written(NamedTuple):
    """A recurrent operator to be written: its attributes, and its inputs by name, except X and the states."""

    kind: str
    arrays: dict[str, Array]
    attributes: dict[str, Any]


def write_operator(where: str, cells: tuple[Cell, ...], direction: str) -> Written:
    """Return cells, one per direction, as one recurrent operator.

    Raises:
        ValueError: a flag or an activation that the operator lacks, or a flag that differs between the directions.
    """
    cells = tuple(cell.one_head for cell in cells)
    operator, attributes = operator_of_specs(f"save: {where}", [cell.spec for cell in cells], direction)
    rows = [_rows(cell) for cell in cells]
    arrays = {key: np.ascontiguousarray(np.stack([row[key] for row in rows])) for key in rows[0]}
    return Written(operator, arrays, attributes)


def operator_of_specs(where: str, specs: Sequence[CellSpec], direction: str) -> tuple[str, dict[str, Any]]:
    """Return the recurrent operator of cells, one per direction, and its attributes.

    Raises:
        ValueError: a flag or an activation that the operator lacks, or a flag that differs between the directions.
    """
    first = specs[0]
    kind, operator = first.of_kind, OPERATORS_OF.get(first.kind)
    if operator is None:
        raise ValueError(f"{where}: ONNX has no operator for {kind.title}")
    for spec in specs:
        for flag, usual in (NOT_IN_ONNX | dict.fromkeys(kind.zoneout.values(), 0.0)).items():
            if getattr(spec, flag) != usual:
                raise ValueError(f"{where}: ONNX's {operator} has no {flag}")
        alike = ("kind", "input_size", "units", "clip", "coupled", "reset_after", "peepholes", "use_bias")
        for flag in alike:
            if getattr(spec, flag) != getattr(first, flag):
                raise ValueError(f"{where}: ONNX needs the same {flag} forward and backward")
        named = dict(zip(spec.slots, spec.activations, strict=True))
        usual, *others = [gate for gate in gates_of(kind) if gate in spec.gates] or [""]
        for gate in others:
            if named[gate] != named[usual]:
                raise ValueError(f"{where}: ONNX needs the same activation for gates {usual} and {gate}")
    attributes: dict[str, Any] = {"hidden_size": first.units, "direction": direction}
    attributes |= _written_activations(where, specs)
    if first.clip is not None:
        attributes["clip"] = float(first.clip)
    for ours, theirs in FLAGS.items():
        if ours in kind.settings and getattr(first, ours):
            attributes[theirs] = 1
    return operator, attributes


def _rows(cell: Cell) -> dict[str, Array]:
    """Return a cell's arrays in ONNX's layout, without the direction axis."""
    spec, units = cell.spec, cell.spec.units
    arrays = {name: a for name, a in cell.arrays.items() if name in ("kernel", "recurrent_kernel", "bias", "peepholes")}
    for name, gates in gates_of_arrays(spec.of_kind).items():  # zeros for a coupled f
        if name in arrays:
            array = arrays[name].reshape(-1) if name == "peepholes" else arrays[name]
            whole = np.zeros((*array.shape[:-1], len(gates), units), array.dtype)
            whole[..., [n for n, gate in enumerate(gates) if gate in spec.gates], :] = blocks_of(array, units)
            arrays[name] = whole.reshape(*array.shape[:-1], -1)
    weight, recurrent, bias = to_rows(
        spec.kind, CellArrays(arrays["kernel"], arrays["recurrent_kernel"], arrays.get("bias")), ORDER[spec.kind]
    )
    rows = {"W": weight, "R": recurrent}
    if bias is not None:
        rows["B"] = bias.reshape(-1) if bias.ndim == 2 else np.concatenate([bias, np.zeros_like(bias)])
    if spec.peepholes:
        theirs, ours = orders_of_peepholes(spec.of_kind)
        rows["P"] = reorder(arrays["peepholes"], ours, theirs)
    return rows


def _written_activations(where: str, specs: Sequence[CellSpec]) -> dict[str, Any]:
    names, alphas, betas = [], [], []
    for spec in specs:
        named = dict(zip(spec.slots, spec.activations, strict=True))
        for slot in slots_of(spec.of_kind):
            name, alpha, beta = named[slot]
            if name not in ONNX_NAMES:
                raise ValueError(f"{where}: ONNX has no activation {name}")
            names.append(ONNX_NAMES[name])
            count = len(PARAMETERS.get(names[-1], ()))
            if count:
                alphas.append(1.0 if name == "linear" else alpha)
            if count == 2:
                betas.append(beta)
    attributes = {"activations": names, "activation_alpha": alphas, "activation_beta": betas}
    return {key: value for key, value in attributes.items() if value}


def can_be_operator(cells: tuple[Cell, ...]) -> bool:
    """Whether cells, one per direction, can be written as one of ONNX's recurrent operators."""
    try:
        write_operator("", cells, "forward")
    except ValueError:
        return False
    return True


class CellWriter(Pieces):
    """Writes a network's cells into a graph, where the network's names become those of values."""

    def __init__(self, network: Network, takes_states: bool = False) -> None:
        super().__init__(onnx_package(), network.dtype, {*network.inputs, *network.names})
        self.network, self.takes_states = network, takes_states
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.states: list[list[str]] = []  # by cell and part: the input's name, "" without one, and the output's
        self.begun: list[list[str]] = []  # of the current operator: the inputs, and the names of its states
        self.zeros: list[str] = []  # operators whose output is zero at masked steps
        self.masks: dict[str, str] = {}  # masks by value: a flag per step, [B, T, 1], True where it is used

    def start(
        self,
        where: str,
        cells: tuple[Celled, ...],
        names: list[str],
        x: str,
        ways: bool,
        sources: Sequence[str],
    ) -> list[str]:
        """Add the initial states, and return the values of each part.

        They are `[D, B, H]` where `ways`, else those of one cell, `[B, H]`. Where `ways`, "" stands for zeros, the
        operators' default. Cells whose initial states are values of the graph, `sources`, in order of the cells, have
        no inputs for them.
        """
        if sources:
            parts = list(cells[0].spec.state_shapes)
            ready = []
            for place, part in enumerate(parts):
                self.begun += [["", f"{name}.{part}"] for name in names]
                each = [*sources[place :: len(parts)]]
                if ways:
                    wide = self.fresh(f"{where}.{part}.wide")
                    each = [self.put("Unsqueeze", [one, self.integers(0)], self.fresh(wide)) for one in each]
                if len(each) > 1:
                    each = [self.put("Concat", each, self.fresh(f"{where}.{part}.start"), axis=0)]
                ready += each
            return ready
        shapes = cells[0].spec.state_shapes
        if ways and not self.takes_states and not any(cell.initial[part].any() for cell in cells for part in shapes):
            self.begun += [["", f"{name}.{part}"] for part in shapes for name in names]
            return [""] * len(shapes)
        batch = self.put("Shape", [x], self.fresh(f"{where}.batch"), start=0, end=1)
        ready = []
        for part, axes in shapes.items():
            each = []
            shape = self.fresh(f"{where}.{part}.shape")
            self.put("Concat", [*([self.integers(1)] if ways else []), batch, self.integers(*axes)], shape, axis=0)
            for name, cell in zip(names, cells, strict=True):
                start = self.initial(f"{name}.{part}", cell.initial[part][None])
                if ways:
                    start = self.put("Unsqueeze", [start, self.integers(0)], self.fresh(f"{start}.wide"))
                each.append(self.put("Expand", [start, shape], self.fresh(f"{name}.{part}.start")))
            if len(each) > 1:
                each = [self.put("Concat", each, self.fresh(f"{where}.{part}.start"), axis=0)]
            ready += each
        return ready

    def initial(self, name: str, array: Array) -> str:
        """Add an initial state `[1, …]`, the default of an input if the file takes states, and return its name."""
        start = self.tensor(name, array)
        if self.takes_states:
            axes = [self.fresh(f"{start}.rows"), *array.shape[1:]]
            self.inputs.append(self.onnx.helper.make_tensor_value_info(start, self.type, axes))
        self.begun.append([start if self.takes_states else "", start])
        return start

    def after(self, shapes: Iterable[Sequence[int]]) -> list[str]:
        """Add outputs `[B, …]` for the states added last, and return their names, which are yet to be computed."""
        names = []
        for (source, name), shape in zip(self.begun, shapes, strict=True):
            after = self.fresh(f"{name}.after")
            self.states.append([source, after])
            self.outputs.append(self.onnx.helper.make_tensor_value_info(after, self.type, ["batch", *shape]))
            names.append(after)
        self.begun = []
        return names

    def operator(
        self,
        where: str,
        cells: tuple[Cell, ...],
        names: list[str],
        direction: str,
        x: str,
        steps: str,
        needs_y: bool,
        sources: Sequence[str],
    ) -> tuple[str, str]:
        """Add a recurrent operator.

        Args:
            where: the name of the operator.
            cells: one per direction.
            names: the names of their states.
            direction: ONNX's direction.
            x: a value `[B, …]` with the batch size.
            steps: X, `[T, B, I]`.
            needs_y: whether Y is used.
            sources: the initial states as values; empty = inputs of the graph.

        Returns:
            Y `[T, D, B, H]`, "" where unused, and Y_h `[D, B, H]`.
        """
        written = write_operator(where, cells, direction)
        arrays = {key: self.tensor(f"{where}.{key}", array) for key, array in written.arrays.items()}
        parts = cells[0].spec.state_sizes
        states = self.start(where, cells, names, x, True, sources)
        inputs = [steps, arrays["W"], arrays["R"], arrays.get("B", ""), "", *states, arrays.get("P", "")]
        while not inputs[-1]:
            inputs.pop()
        ends = [self.fresh(f"{where}.Y_{part}") for part in parts]
        y = self.fresh(f"{where}.Y") if needs_y else ""
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
        cell: Celled,
        direction: str,
        x: str,
        steps: str,
        mask: str,
        residual: bool,
        sources: Sequence[str],
    ) -> tuple[str, str]:
        """Add a cell as a Scan; the arguments are as in `operator`, the mask is `[T, B, 1]`, or "".

        Returns:
            y `[T, B, P]`, and y after the last step `[B, P]`; with a mask and a residual, both are h + x.
        """
        states = self.start(where, (cell,), [where], x, False, sources)
        body = body_of(where, cell, bool(mask), residual)
        ends = self.after(cell.spec.state_shapes.values())
        last, y = ends[0], self.fresh(f"{where}.y")
        repeats = mask and cell.spec.of_kind.carries_h
        if repeats:
            states.append(states[0])
            last = self.fresh(f"{where}.y_last")
        way = [int(direction == "reverse")]
        flows = [steps, mask] if mask else [steps]
        self.nodes.append(
            self.onnx.helper.make_node(
                "Scan",
                [*states, *flows],
                [*ends, *([last] if repeats else []), y],
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
            owner = f"{name}.{number}" if top else name
            added = node.residual and number > 0 and cell.spec.input_size == cell.spec.output_size
            if node.zero_output_for_mask and number == top:
                self.zeros.append(owner)
            needs_y = number < top or node.return_sequences or added
            sources, starts = starts[: len(cell.spec.state_sizes)], starts[len(cell.spec.state_sizes) :]
            if mask or self.dtype == np.float64 or not can_be_operator((cell,)):
                flat, last = self.scan(owner, cell, direction, x, steps, transposed, added, sources)
                added = added and not mask
            else:
                y, h = self.operator(owner, (cell,), [owner], direction, x, steps, needs_y, sources)
                flat = self.put("Squeeze", [y, self.integers(1)], self.fresh(f"{owner}.flat")) if needs_y else ""
                last = "" if needs_y else self.put("Squeeze", [h, self.integers(0)], self.fresh(f"{owner}.last"))
            steps = self.put("Add", [flat, steps], self.fresh(f"{owner}.added")) if added else flat
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

    def memory(self, name: str, node: MLSTM, x: str, mask: str) -> None:
        """Add the memory of an mLSTM, as a stack of one cell that returns all steps."""
        steps, flags = [self.of("Transpose", flow, perm=[1, 0, 2]) if flow else "" for flow in (x, mask)]
        y, _ = self.scan(name, node.memory_in(self.dtype), "forward", x, steps, flags, False, ())
        self.put("Transpose", [y], name, f"{name}.rows", perm=[1, 0, 2])

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
            sequences = node.forward.return_sequences
            y, h = self.operator(name, cells, names, "bidirectional", x, steps, sequences, starts)
            perm, shape = ([2, 0, 1, 3], (0, 0, -1)) if sequences else ([1, 0, 2], (0, -1))
            rows = self.put("Transpose", [y if sequences else h], self.fresh(f"{name}.rows"), perm=perm)
            self.put("Reshape", [rows, self.integers(*shape)], output, f"{name}.concat")
            return
        ends = [self.fresh(f"{way}.out") for way in names]
        count = len(node.forward.state_sizes)
        each = (starts[:count], starts[count:])
        for way, direction, end, sources in zip(names, directions, ends, each, strict=True):
            if way == names[0] or not direction.return_sequences:
                self.stack(way, direction, x, end, mask, sources)
            else:
                backwards = self.fresh(f"{way}.backwards")
                self.stack(way, direction, x, backwards, mask, sources)
                self.cut(backwards, slice(None, None, -1), 1, end, f"{way}.out")
        self.merge(node.merge_mode.replace("sum", "add"), ends, -1, output, f"{name}.merged")


def cell_names(name: str, node: Node) -> list[str]:
    """Return the names of the states of a node's cells."""
    if isinstance(node, Bidirectional):
        return [*cell_names(f"{name}.forward", node.forward), *cell_names(f"{name}.backward", node.backward)]
    return [name] if len(node.cells) == 1 else [f"{name}.{n}" for n in range(len(node.cells))]
