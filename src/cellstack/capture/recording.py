"""Records PyTorch modules with `torch.export`, with the kernel's op in their recurrent layers."""

from __future__ import annotations

import copy
import importlib
import logging
import operator
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import _export, nn
from torch._guards import detect_fake_mode
from torch._library import utils
from torch._subclasses import meta_utils
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import exported_program
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map_only
from torch.utils._sympy.reference import PythonReferenceAnalysis

from cellstack.capture.copied import duplicate, fold
from cellstack.capture.corrections import corrected
from cellstack.capture.operators import Operators
from cellstack.capture.sizes import OURS, line_of, outside, pytorch, unscripted
from cellstack.formats.onnx.cell_writer import operator_of_specs
from cellstack.layers import accelerate, op
from cellstack.layers.base import EXPORT_HINT
from cellstack.layers.cell_call import of_text
from cellstack.layers.eligibility import base_of

# PyTorch's warning about tensors that forward stores in attributes, except those of its own recurrent layers.
ASSIGNED = r"The tensor attributes? .*self\.(\w+\.)*(?!_flat_weights)\w+(\[[^]]*\])*,? .*assigned during export"
FIXING = ("aten.lstm.", "aten.gru.", "aten.rnn_tanh.", "aten.rnn_relu.")  # operators whose export fixes the length


def served(module: nn.Module, _: Any) -> nn.Module:
    """Accelerate the recurrent modules of PyTorch in a module, if there are any."""
    has = any(base_of(type(part)) is not None for part in module.modules())
    return accelerate.accelerate(module) if has else module


def recorded(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    strict: bool = False,
    cut: bool = True,
    serve: Callable[[nn.Module, Any], nn.Module] | None = served,
    steps: bool = True,
) -> Any:
    """Return what `torch.export.export` records of a module in evaluation mode, with the kernel's op in its layers.

    Args:
        module, args, kwargs, dynamic_shapes, strict: see `export_onnx`.
        cut: see `Operators`.
        serve: accelerates a copy of the module, for the arguments of a call; None: only the functions that PyTorch's
            recurrent modules call run on the op. The graph then has initial states of zeros.
        steps: see `Operators`.

    Raises:
        ValueError, Exception: see `export_onnx`.
    """
    for part in map(type, module.modules()):
        if issubclass(part, torch.jit.ScriptModule) or ".quantized." in part.__module__:
            raise ValueError(
                f"export_onnx: torch.export can't record {part.__module__}.{part.__name__}: pass the module from which "
                "torch.jit or quantisation made it"
            )
    # A tensor that is two inputs, as h in (h, h), would be one.
    args, named = tree_map_only(torch.Tensor, lambda one: one.detach().clone(), (args, dict(kwargs or {})))
    ready = duplicate(module)
    ready.eval()  # which some modules don't return
    fold(ready)
    if serve is not None:
        ready = serve(ready, None if named else args)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        warnings.filterwarnings("default", ASSIGNED)
        with unscripted(), nullcontext() if strict else Operators(cut, steps) as operators:
            if operators:
                operators.find(lambda: duplicate(ready)(*copy.deepcopy(args), **copy.deepcopy(named)))
            with own_sizes():
                program = torch.export.export(ready, args, named, dynamic_shapes=dynamic_shapes, strict=strict)
    _check(program.graph)
    corrected(program.graph)
    return program


@contextmanager
def own_sizes() -> Iterator[None]:
    """Let graphs take each size from the tensor of which code asked for it.

    PyTorch would compute it from sizes of the inputs, in a pass that also adds assertions, which ONNX doesn't have.
    """
    with (
        mock.patch.object(_export.utils, "insert_deferred_runtime_asserts"),
        mock.patch.object(exported_program, "insert_deferred_runtime_asserts"),
    ):
        yield


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
