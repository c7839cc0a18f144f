"""Exports PyTorch modules to ONNX with their recurrent layers as single operators, for any batch size and length.

PyTorch's exporter fixes the number of steps of an nn.LSTM, nn.GRU or nn.RNN. Here the layers run on `layers.op`, which
`torch.export` records with symbolic sizes, and each cell of that op becomes one of ONNX's recurrent operators.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import logging
import operator
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from os import PathLike, fspath
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch._library import utils
from torch._subclasses import meta_utils
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map_only
from torch.utils._sympy.reference import PythonReferenceAnalysis

from cellstack.capture.copied import duplicate, fold
from cellstack.capture.corrections import corrected
from cellstack.capture.exported import first_reason
from cellstack.capture.nested import has_packed
from cellstack.capture.operators import Operators
from cellstack.capture.recognition import accelerate as accelerate_cells
from cellstack.capture.sizes import OURS, line_of, outside, pytorch
from cellstack.cells.layout import from_rows
from cellstack.cells.spec import CellSpec
from cellstack.formats.onnx.cell_writer import operator_of_specs, write_operator
from cellstack.formats.onnx.scan import body_of
from cellstack.layers import accelerate, op
from cellstack.layers.base import EXPORT_HINT
from cellstack.layers.cell_call import CellCall, of_text
from cellstack.layers.eligibility import base_of, original_of
from cellstack.layers.handwritten import HandWritten
from cellstack.nodes.cell_arrays import Cell

SCOPES = "pkg.torch.onnx.name_scopes"  # metadata in which PyTorch's exporter lists the modules around an operator
DOMAIN = "cellstack"  # of the operators that stand for cells until their weights are computed
INT32, BOOL, DOUBLE = 6, 9, 11  # of onnx.TensorProto.DataType
# PyTorch's warning about tensors that forward stores in attributes, except those of its own recurrent layers.
ASSIGNED = r"The tensor attributes? .*self\.(\w+\.)*(?!_flat_weights)\w+(\[[^]]*\])*,? .*assigned during export"
FIXING = ("aten.lstm.", "aten.gru.", "aten.rnn_tanh.", "aten.rnn_relu.")  # operators whose export fixes the length


def export_onnx(
    module: nn.Module,
    args: tuple[Any, ...],
    path: str | PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    strict: bool = False,
    cells: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> None:
    """Write a module in evaluation mode as an ONNX file whose recurrent layers take any batch size and length.

    Each layer of an nn.LSTM, nn.GRU or nn.RNN, or of cellstack's layers, becomes an operator LSTM, GRU or RNN per
    direction or, where ONNX has no operator for the cell, a Scan. The module isn't changed.

    Args:
        module: the module, accelerated or not.
        args: an example of its inputs, with 2 or more entries along axes that may have other lengths.
        path: the file to write; weights above 2 GiB go into a second file in its folder.
        kwargs: an example of its inputs by name.
        dynamic_shapes: which axes may have other lengths, as for `torch.export.export`:
            `({0: Dim("batch"), 1: Dim("time")},)`. None: none.
        strict: as for `torch.export.export`.
        cells: whether hand-written recurrent modules become single operators too, as for `accelerate`.
        input_names: the names of the file's inputs.
        output_names: the names of its outputs.

    Raises:
        TypeError: `module` isn't a module, or `args` isn't a tuple.
        ValueError: a recurrent module that stays with PyTorch, a cell or a call that ONNX's operators can't express, or
            names that aren't unique.
        ModuleNotFoundError: onnx or onnxscript isn't installed.
        Exception: whatever `torch.export.export` and `torch.onnx.export` raise.

    >>> time = torch.export.Dim("time")
    >>> export_onnx(nn.LSTM(3, 4), (torch.zeros(5, 1, 3),), "lstm.onnx", dynamic_shapes=({0: time},))  # doctest: +SKIP
    """
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    if not isinstance(module, nn.Module) or not isinstance(args, tuple):
        got = f"{type(module).__name__} and {type(args).__name__}"
        raise TypeError(f"export_onnx: expected a module of PyTorch and a tuple of its inputs, such as (x,), got {got}")
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        module = module.module
    for part in map(type, module.modules()):
        if issubclass(part, torch.jit.ScriptModule) or ".quantized." in part.__module__:
            raise ValueError(
                f"export_onnx: torch.export can't record {part.__module__}.{part.__name__}: pass the module from which "
                "torch.jit or quantisation made it"
            )
    if has_packed(args):
        raise ValueError(
            "export_onnx: a packed sequence can't be an input: let forward take the padded one and its lengths, and "
            "pack them"
        )
    program = recorded(module, args, kwargs, dynamic_shapes, strict, cells=cells)
    changed = _changed_buffers(program)
    if changed:
        warnings.warn(
            f"export_onnx: forward changes the buffers {', '.join(changed)}, and the file doesn't: each of its calls "
            "starts from their present values. Return what the next call needs, and take it as an argument",
            stacklevel=2,
        )
    write(program, fspath(path), input_names, output_names)


def recorded(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    strict: bool = False,
    cut: bool = True,
    cells: bool = False,
    served: bool = True,
    steps: bool = True,
) -> Any:
    """Return what `torch.export.export` records of a module in evaluation mode, with the kernel's op in its layers.

    Args:
        module, args, kwargs, dynamic_shapes, strict, cells: see `export_onnx`.
        cut: see `Operators`.
        served: whether PyTorch's recurrent modules are accelerated, instead of the functions that they call: the graph
            then has no initial states of zeros, but packed sequences must be PyTorch's own.
        steps: see `Operators`.

    Raises:
        ValueError, Exception: see `export_onnx`.
    """
    # A tensor that is two inputs, as h in (h, h), would be one.
    args, named = tree_map_only(torch.Tensor, lambda one: one.detach().clone(), (args, dict(kwargs or {})))
    ready = duplicate(module).eval()
    fold(ready)
    if cells:
        accelerate_cells(ready, None if named else args)
        ready = _Named(ready).eval() if isinstance(ready, HandWritten) else ready
    elif served and any(base_of(type(part)) is not None for part in ready.modules()):
        accelerate.accelerate(ready)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        warnings.filterwarnings("default", ASSIGNED)
        with nullcontext() if strict else Operators(cut, steps) as operators:
            if operators:
                operators.find(lambda: duplicate(ready)(*copy.deepcopy(args), **copy.deepcopy(named)))
            program = torch.export.export(ready, args, named, dynamic_shapes=dynamic_shapes, strict=strict)
    _check(program.graph)
    corrected(program.graph)
    return program


def _changed_buffers(program: Any) -> list[str]:
    """Return the names of the buffers that a recorded module writes to."""
    buffers = program.graph_signature.inputs_to_buffers
    calls = [node for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload) and node.args]
    written = [getattr(node.args[0], "name", "") for node in calls if node.target._schema.is_mutable]
    return list(dict.fromkeys(buffers[name] for name in written if name in buffers))


class _Named(nn.Module):
    """Runs a hand-written module on the kernel, whose forward takes any arguments, with those of its own class."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

        def forward(*args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs)

        own: Any = original_of(type(inner)).forward
        forward.__signature__ = inspect.signature(own.__get__(inner))  # type: ignore[attr-defined]
        self.forward = forward


@contextmanager
def example_values(looks: list[str]) -> Iterator[None]:
    """Let `recorded` and `write` use the example's values where a module's code depends on values, as `if` does.

    The graph contains what it did for these. The places, such as `file.py:12`, are added to `looks`.
    """

    def note(record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith("propagate_real_tensors"):
            return True
        line = line_of(outside(sys._getframe(1), pytorch(), OURS, logging.__file__))
        looks.extend([line] if line and line not in looks else [])
        return False

    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    own, copy = utils.is_builtin, meta_utils._safe_copy
    known = ShapeEnv.set_real_tensor_prop_unbacked_vals
    loop = type(torch.ops.higher_order.scan)
    schema = loop.gen_schema

    def keep(env: Any, size: Any, value: Any) -> None:
        known(env, size, value)
        values = env.real_tensor_prop_unbacked_vals
        values[size] = values[size].xreplace(env.backed_var_to_val)

    def schema_of(of: Any, step: Any, *args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(detect_fake_mode(args), "propagate_real_tensors", False):
            return schema(of, step, *args, **kwargs)

    logger.addFilter(note)
    try:
        with (
            importlib.import_module("torch._functorch.config").patch(fake_tensor_propagate_real_tensors=True),
            # In its assertions about sizes, it would divide the graph's symbols by a function of SymPy.
            mock.patch.object(PythonReferenceAnalysis, "int_truediv", staticmethod(operator.truediv)),
            # PyTorch doesn't copy the values of parameters.
            mock.patch.object(
                meta_utils, "_safe_copy", lambda to, value: copy(to, None if value is None else value.detach())
            ),
            # Its checks fix sizes, by comparing them, and take an absent optional tensor for a changed one.
            mock.patch.object(FakeTensorMode, "_maybe_infer_fake_kernel_from_pytree_out", lambda *args: args[4]),
            # A size of an example may be an expression of other sizes, of which it expects a number.
            mock.patch.object(ShapeEnv, "set_real_tensor_prop_unbacked_vals", keep),
            mock.patch.object(utils, "is_builtin", lambda called: called is op.recurrent or own(called)),
            # It runs the step of a loop on tensors that it doesn't initialise, such as indices.
            mock.patch.object(loop, "gen_schema", schema_of),
        ):
            yield
    finally:
        logger.removeFilter(note)


def write(program: Any, path: str, input_names: Sequence[str] | None, output_names: Sequence[str] | None) -> None:
    """Write what `recorded` returns as an ONNX file."""
    script = importlib.import_module("onnxscript")
    onnx = script.opset18
    registration = importlib.import_module("torch.onnx._internal.exporter._registration")
    registry = registration.ONNXRegistry
    build = partial(_copied_table, registry.from_torchlib)
    known = importlib.import_module("torch._export.utils")
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        mock.patch.object(registration.logger, "disabled", True),  # it warns where torchvision is absent
        mock.patch.object(registry, "from_torchlib", build),
        # It lists all operators dozens of times, to which no export adds any.
        mock.patch.object(known, "_materialize_cpp_cia_ops", cache(known._materialize_cpp_cia_ops)),
    ):
        warnings.simplefilter("ignore")
        table = {
            op.recurrent: _translated,
            torch.ops.cellstack.with_new_size.default: lambda x, axis: onnx.Identity(x),
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
    _name_nodes(made.model.graph)
    common.NameFixPass()(made.model)
    for value in made.model.graph.inputs:  # a size that became fixed while it was recorded has its number as its name
        for axis, size in enumerate(value.shape):
            value.shape[axis] = int(str(size)) if str(size).isdigit() else size
    made.save(path)


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


def _name_nodes(graph: Any) -> None:
    """Name each operator after the module that it comes from, as `/encoder/lstm/LSTM`."""
    for node in graph:
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


def _check(graph: Any) -> None:
    """Refuse an exported graph that has other recurrent operators than ours, or calls that ONNX can't express."""
    for value in graph.output_node().args[0]:
        if isinstance(value, (int, float, str)):
            raise ValueError(f"export_onnx: the module returns {value!r}: a file returns tensors only")
    for node in graph.nodes:
        name = str(node.target)
        if name.startswith(FIXING):
            raise ValueError(f"export_onnx: PyTorch runs {name}, which fixes the number of steps: see cs.plan(module)")
        if node.target is op.recurrent:
            x, _, _, drops, mask, reset, texts, *_ = node.args
            dtype = x.meta["val"].dtype
            if dtype not in (torch.float32, torch.float64):
                raise ValueError(f"export_onnx: a recurrent layer of {dtype}: export module.float()")
            if dtype is torch.float64 and mask is not None:
                raise ValueError(
                    "export_onnx: ONNX Runtime has no float64 cells that take lengths: export module.float()"
                )
            if reset is not None or drops or not (mask is None or _of_lengths(mask)):
                given = "resets" if reset is not None else "dropout" if drops else "a mask, only lengths"
                raise ValueError(f"export_onnx: ONNX's recurrent operators don't take {given}; {EXPORT_HINT}")
            for spec in (of_text(text).spec for text in texts if mask is not None):
                operator_of_specs("export_onnx: a Scan takes no lengths", [spec], "forward")


def _of_lengths(mask: Any) -> bool:
    """Whether a mask is computed from lengths, as `arange(T) < lengths[:, None]`."""
    if str(mask.target) != "aten.lt.Tensor" or mask.args[1].meta["val"].shape[-1] != 1:
        return False
    return str(mask.args[0].target) in ("aten.arange.default", "aten.arange.start")


# ── ONNX ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


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
