"""Writes what `torch.export` recorded as ONNX files, in which each cell of the kernel's op is a recurrent operator."""

from __future__ import annotations

import ast
import copy
import importlib
import sys
import warnings
from collections.abc import Sequence
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from torch._ops import OperatorBase, OpOverload

from cellstack.capture.recording import own_sizes
from cellstack.cells.errors import check_installed
from cellstack.cells.layout import from_rows
from cellstack.cells.spec import CellSpec
from cellstack.formats.onnx.cell_writer import operator_of_specs, write_operator
from cellstack.formats.onnx.scan import body_of
from cellstack.layers import op
from cellstack.layers.cell_call import CellCall, of_text
from cellstack.nodes.cell_arrays import Cell

SCOPES = "pkg.torch.onnx.name_scopes"  # metadata in which PyTorch's exporter lists the modules around an operator
DOMAIN = "cellstack"  # of the operators that stand for cells until their weights are computed
INT32, BOOL, DOUBLE = 6, 9, 11  # of onnx.TensorProto.DataType


def write(
    program: Any,
    path: str,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    free: Sequence[Sequence[int]] | None = None,
) -> None:
    """Write what `recorded` returns as an ONNX file.

    Args:
        program: the recorded program.
        path: the file.
        input_names, output_names: see `export_onnx`.
        free: for a file that is read as a Network, the axes of each input that get a name, not a number, where
            recording fixed their size, as a loop does. The file then has no inputs that nothing uses.
    """
    check_installed("cellstack.capture", "onnxscript", "compile")
    script = importlib.import_module("onnxscript")
    onnx = script.opset18
    registration = importlib.import_module("torch.onnx._internal.exporter._registration")
    registry = registration.ONNXRegistry
    build = partial(_copied_table, registry.from_torchlib)
    known = importlib.import_module("torch._export.utils")
    passes = importlib.import_module("torch.onnx._internal.exporter._fx_passes")
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        own_sizes(),
        mock.patch.object(registration.logger, "disabled", True),  # it warns where torchvision is absent
        mock.patch.object(registry, "from_torchlib", build),
        mock.patch.object(passes, "decompose_with_registry", partial(_decomposed, passes.decompose_with_registry)),
        # It lists all operators dozens of times, to which no export adds any.
        mock.patch.object(known, "_materialize_cpp_cia_ops", cache(known._materialize_cpp_cia_ops)),
    ):
        warnings.simplefilter("ignore")
        table = {
            op.recurrent: _translated,
            torch.ops.cellstack.with_new_size.default: lambda x, axis: onnx.Identity(x),
            torch.ops.aten.sym_numel.default: onnx.Size,
            # The exporter's Log(Sigmoid(x)) is never below -18 in ONNX Runtime.
            torch.ops.aten.log_sigmoid.default: lambda x: onnx.Neg(onnx.Softplus(onnx.Neg(x))),
        }
        # Its own optimisation drops x + eps for eps up to 1e-8, and computes small constants only.
        given: dict[str, Any] = {"dynamo": True, "custom_translation_table": table, "verbose": False, "optimize": False}
        try:
            made: Any = torch.onnx.export(program, **given)
        except torch.onnx.OnnxExporterError as error:
            raise ValueError(f"export_onnx: {first_reason(error)}") from error
    most = 1 + max((value.nbytes for value in program.state_dict.values()), default=0)  # weights in ONNX's order
    common = script.ir.passes.common
    common.InlinePass()(made.model)
    script.optimizer.fold_constants(made.model, input_size_limit=most, output_size_limit=most)
    for run in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveUnusedNodesPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
    ):
        run(made.model)
    _put_cells(made.model)
    _rename(script.ir, made.model.graph, input_names or (), output_names or ())
    _name_nodes(script.ir, made.model.graph)
    common.NameFixPass()(made.model)
    for value in made.model.graph.inputs:  # a size that became fixed while it was recorded has its number as its name
        for axis, size in enumerate(value.shape):
            value.shape[axis] = int(str(size)) if str(size).isdigit() else size
    if free is not None:
        inputs = made.model.graph.inputs
        for value, axes in zip(tuple(inputs), free, strict=True):
            for axis in axes:
                value.shape[axis] = f"{value.name}_{axis}" if isinstance(value.shape[axis], int) else value.shape[axis]
            if not value.uses():
                inputs.remove(value)
    made.save(path)


def first_reason(error: BaseException) -> str:
    """Return the first line of an error's message, or of its first cause's: exporters raise long errors from others."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _decomposed(decompose: Any, program: Any, registry: Any) -> Any:
    """Decompose operators where the exporter lacks one, or one changes a tensor: this takes longer than all else."""
    for target in (node.target for part in program.graph_module.modules() for node in part.graph.nodes):
        changes = isinstance(target, OpOverload) and target._schema.is_mutable
        if changes or (isinstance(target, OperatorBase) and not registry.is_registered(target)):
            return decompose(program, registry)
    return program


def _copied_table(build: Any, opset_version: int) -> Any:
    """Return a new table of PyTorch's operators, `build(opset_version)`, to which one export adds its own."""
    made = _table(build, opset_version, "torchvision" in sys.modules)  # whose import registers operators
    table = copy.copy(made)
    table.functions = {name: list(functions) for name, functions in made.functions.items()}
    return table


@cache
def _table(build: Any, opset_version: int, torchvision: bool) -> Any:
    """Build a table once: for that, PyTorch reads the source of hundreds of functions."""
    return build(opset_version)


def _name_nodes(ir: Any, graph: Any) -> None:
    """Name each operator after its module, as `/encoder/lstm/LSTM`; count the axis of layer norms from the last one."""
    for node in graph:
        if node.op_type == "LayerNormalization" and node.attributes["axis"].as_int() >= 0:
            node.attributes["axis"] = ir.AttrInt64("axis", node.attributes["axis"].as_int() - len(node.inputs[0].shape))
        scopes = node.metadata_props.get(SCOPES)
        if scopes:
            path = ["", *ast.literal_eval(scopes)][-2].replace(".", "/")
            node.name = "/".join(["", *filter(None, [path]), node.op_type])


def _rename(ir: Any, graph: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Rename the inputs and outputs of a graph; an output that is an input or another output becomes a copy.

    Raises:
        ValueError: more names than there are inputs or outputs, or names that occur twice.
    """
    for place, value in enumerate(graph.outputs):
        if value.is_graph_input() or value in graph.outputs[:place]:
            graph.outputs[place] = ir.Value(name=f"{value.name}_{place}", shape=value.shape, type=value.type)
            graph.append(ir.node("Identity", [value], outputs=[graph.outputs[place]]))
    for what, values, names in (("input", graph.inputs, inputs), ("output", graph.outputs, outputs)):
        if len(names) > len(values):
            raise ValueError(f"export_onnx: expected {what}_names of at most {len(values)} {what}s, got {names!r}")
        for value, name in zip(values, names, strict=False):
            value.name = name
    every = [value.name for value in (*graph.inputs, *graph.outputs)]
    if len(set(every)) < len(every):
        raise ValueError(f"export_onnx: the names of inputs and outputs must differ, found {', '.join(every)}")


# ── Cells ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_operator(spec: CellSpec, double: bool) -> bool:
    """Whether ONNX Runtime has an operator for a cell; others are written as Scans."""
    if double:
        return False
    try:
        operator_of_specs("", [spec], "forward")
    except ValueError:
        return False
    return True


def _translated(
    x: Any,
    starts: Sequence[Any],
    weights: Sequence[Any],
    drops: Sequence[Any],
    mask: Any,
    reset: Any,
    cells: Sequence[str],
    reverse: bool,
    sequences: bool,
    save: bool,
    threads: int,
    time_major: bool,
) -> list[Any]:
    """Return the results of `cellstack::recurrent` as operators; see `layers.op` for the arguments.

    Each cell becomes an operator `Cell`, which takes X, the lengths, the states and the weights, and returns the states
    and Y. `_put_cells` replaces it when PyTorch's exporter has computed the weights.
    """
    onnx = importlib.import_module("onnxscript").opset18
    steps, used, lengths = onnx.Transpose(x, perm=[1, 0, 2]), None, []
    if mask is not None:
        lengths = [onnx.ReduceSum(onnx.Cast(mask, to=INT32), [1], keepdims=0)]
        used = onnx.Unsqueeze(onnx.Transpose(mask, perm=[1, 0]), [2])  # [T, B, 1]
    given, arrays, results = iter(starts), iter(weights), []
    for call in map(of_text, cells):
        spec, operator = call.spec, _is_operator(call.spec, x.dtype == DOUBLE)
        own = {name: next(arrays) for name in call.shapes}
        begin = [next(given) for _ in call.sizes] if starts else []
        if not begin and (spec.learn_initial_state or not operator):
            rows, zero = onnx.Shape(steps, start=1, end=2), onnx.CastLike(0.0, x)
            for name, size in spec.state_sizes.items():
                begin.append(
                    onnx.Expand(
                        own.get(f"initial_{name}", zero), onnx.Concat(rows, onnx.Constant(value_ints=[size]), axis=0)
                    )
                )
        states = [onnx.Unsqueeze(state, [0]) for state in begin] if operator else begin
        inputs = [steps, *lengths, *states, *own.values()]
        *ends, y = _cell_operator(len(call.sizes))(*inputs, cell=call.text, reverse=int(reverse), states=len(states))
        if operator:
            ends, y = [onnx.Squeeze(end, [0]) for end in ends], onnx.Squeeze(y, [1])  # [T, B, H]
        if lengths and begin:  # ONNX Runtime returns zeros as the states of a row without steps
            some = onnx.Unsqueeze(onnx.Cast(lengths[0], to=BOOL), [1])  # [B, 1]
            ends = [onnx.Where(some, end, start) for end, start in zip(ends, begin, strict=True)]
        if used is not None:  # ONNX returns zeros past the end of a row, our op the last output before
            y = onnx.Where(used, y, (begin[0] if begin else 0.0) if reverse else ends[0])
        steps = y
        results += ends
    return [*results, *([steps if time_major else onnx.Transpose(steps, perm=[1, 0, 2])] if sequences else [])]


def _cell_operator(states: int) -> Any:
    """Return the operator `Cell` of cells with this number of states."""
    schemas, values = importlib.import_module("onnx.defs").OpSchema, importlib.import_module("onnxscript.values")
    several = schemas.FormalParameterOption.Variadic
    taken = schemas.FormalParameter("inputs", "T", param_option=several, is_homogeneous=False)
    made = [schemas.FormalParameter(f"output_{n}", "R") for n in range(states + 1)]
    attributes = [
        schemas.Attribute("cell", schemas.AttrType.STRING, required=True),
        schemas.Attribute("reverse", schemas.AttrType.INT, required=True),
        schemas.Attribute("states", schemas.AttrType.INT, required=True),
    ]
    types = [
        (name, [f"tensor({one})" for one in ("float16", "bfloat16", "float", "double", "int32")], "") for name in "TR"
    ]
    schema = schemas("Cell", DOMAIN, 1, inputs=[taken], outputs=made, attributes=attributes, type_constraints=types)
    return values.Op(values.Opset(DOMAIN, 1), "Cell", schema)


def _put_cells(model: Any) -> None:
    """Replace each operator `Cell` of an `onnx_ir.Model` by one of ONNX's recurrent operators, or by a Scan.

    Raises:
        ValueError: weights that the graph computes from its inputs.
    """
    ir = importlib.import_module("onnxscript").ir
    nodes = [node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.domain == DOMAIN]
    for number, node in enumerate(nodes):
        call, name, x = of_text(node.attributes["cell"].as_string()), f"cell_{number}", node.inputs[0]
        first = len(node.inputs) - len(call.shapes)
        given, constants = node.inputs[1:first], [*map(ir.convenience.get_const_tensor, node.inputs[first:])]
        if None in constants:
            raise ValueError(f"export_onnx: {call.spec.of_kind.title}: its weights depend on an input")
        cell = _cell(call, {key: one.numpy() for key, one in zip(call.shapes, constants, strict=True)})
        reverse, count = node.attributes["reverse"].as_int(), node.attributes["states"].as_int()
        *ends, y = node.outputs
        if _is_operator(cell.spec, cell.dtype == "float64"):
            kind, arrays, attributes = write_operator(name, (cell,), "reverse" if reverse else "forward")
            w, r, b, p = (_constant(ir, node.graph, f"{name}.{key}", arrays.get(key)) for key in "WRBP")
            states = given[len(given) - count :] or [None] * len(ends)
            lengths = given[0] if len(given) > count else None
            inputs, outputs = [x, w, r, b, lengths, *states, p], [y, *ends]
        else:
            body = ir.serde.deserialize_graph(body_of(name, cell, opset=model.opset_imports[""]))
            kind, inputs, outputs = "Scan", [*given, x], [*ends, y]
            way = {f"scan_{end}_directions": [reverse] for end in ("input", "output")}
            attributes = {"body": body, "num_scan_inputs": 1, **way}
        made = ir.node(
            kind, inputs, attributes, num_outputs=len(outputs), name=name, metadata_props=node.metadata_props
        )
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], [made], outputs, made.outputs)
    model.opset_imports.pop(DOMAIN, None)
    ir.passes.common.RemoveUnusedNodesPass()(model)


def _constant(ir: Any, graph: Any, name: str, array: Any) -> Any:
    """Return a new tensor of a graph; None for an array that is absent."""
    if array is None:
        return None
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _cell(call: CellCall, arrays: dict[str, Any]) -> Cell:
    """Return the cell of a call."""
    spec = call.spec
    if not call.torch_layout:
        return Cell(spec, **arrays)
    w, r, *biases = (array for name, array in arrays.items() if name != "weight_hr")
    made = from_rows(spec.kind, w, r, tuple(biases), spec.of_kind.names["torch"].order, spec.reset_after)
    projection = {"projection": arrays["weight_hr"].T} if spec.proj_size else {}
    return Cell(spec, **made._asdict(), **projection)
