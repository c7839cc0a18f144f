"""Exports PyTorch modules to ONNX with their recurrent layers as single operators, for any batch size and length.

PyTorch's exporter fixes the number of steps of an nn.LSTM, nn.GRU or nn.RNN. Here the layers run on `layers.op`, which
`torch.export` records with symbolic sizes, and each cell of that op becomes one of ONNX's recurrent operators.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from os import PathLike, fspath
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._library import utils
from torch._subclasses import meta_utils
from torch._subclasses.fake_tensor import FakeTensorMode

from cellstack.capture.copied import duplicate
from cellstack.capture.operators import Operators
from cellstack.capture.sizes import OURS, line_of, outside, pytorch
from cellstack.formats.onnx.cell_writer import operator_of_specs
from cellstack.formats.onnx.cells import ORDER, orders_of_peepholes
from cellstack.layers import accelerate, op
from cellstack.layers.base import EXPORT_HINT
from cellstack.layers.cell_call import of_text
from cellstack.layers.eligibility import base_of

INT32 = 6
FIXING = ("aten.lstm.", "aten.gru.", "aten.rnn_tanh.", "aten.rnn_relu.")  # operators whose export fixes the length


def export_onnx(
    module: nn.Module,
    args: tuple[Any, ...],
    path: str | PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    strict: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> None:
    """Write a module in evaluation mode as an ONNX file whose recurrent layers take any batch size and length.

    Each layer of an nn.LSTM, nn.GRU or nn.RNN, or of cellstack's layers with the same equations, becomes an operator
    LSTM, GRU or RNN per direction. The module isn't changed.

    Args:
        module: the module, accelerated or not.
        args: an example of its inputs.
        path: the file to write; weights above 2 GiB go into a second file in its folder.
        kwargs: an example of its inputs by name.
        dynamic_shapes: which axes may have other lengths, as for `torch.export.export`:
            `({0: Dim("batch"), 1: Dim("time")},)`. None: none.
        strict: as for `torch.export.export`.
        input_names: the names of the file's inputs.
        output_names: the names of its outputs.

    Raises:
        ValueError: a recurrent module that stays with PyTorch, or a cell or a call that ONNX's operators can't express.
        ModuleNotFoundError: onnx or onnxscript isn't installed.
        Exception: whatever `torch.export.export` and `torch.onnx.export` raise.

    >>> time = torch.export.Dim("time")
    >>> export_onnx(nn.LSTM(3, 4), (torch.zeros(5, 1, 3),), "lstm.onnx", dynamic_shapes=({0: time},))  # doctest: +SKIP
    """
    write(recorded(module, args, kwargs, dynamic_shapes, strict), fspath(path), input_names, output_names)


def recorded(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    strict: bool = False,
    cut: bool = True,
) -> Any:
    """Return what `torch.export.export` records of a module in evaluation mode, with the kernel's op in its layers.

    Raises:
        ValueError, Exception: see `export_onnx`.
    """
    ready = duplicate(module).eval()
    if any(base_of(type(part)) is not None for part in ready.modules()):
        accelerate.accelerate(ready)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        with nullcontext() if strict else Operators(cut):
            program = torch.export.export(ready, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=strict)
    _check(program.graph)
    _keep_axes(program.graph)
    return program


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
    logger.addFilter(note)
    try:
        with (
            importlib.import_module("torch._functorch.config").patch(fake_tensor_propagate_real_tensors=True),
            # PyTorch doesn't copy the values of parameters.
            mock.patch.object(
                meta_utils, "_safe_copy", lambda to, value: copy(to, None if value is None else value.detach())
            ),
            # Its checks fix sizes, by comparing them, and take an absent optional tensor for a changed one.
            mock.patch.object(FakeTensorMode, "_maybe_infer_fake_kernel_from_pytree_out", lambda *args: args[4]),
            mock.patch.object(utils, "is_builtin", lambda called: called is op.recurrent or own(called)),
        ):
            yield
    finally:
        logger.removeFilter(note)


def _keep_axes(graph: Any) -> None:
    """Make copies of squeezes of an axis that is longer than 1, which keep it: the exporter writes them as they are."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.squeeze.dim:
            value, axis = node.args
            size = value.meta["val"].shape[axis]
            if not isinstance(size, int) or size != 1:
                node.target, node.args = torch.ops.aten.clone.default, (value,)


def write(program: Any, path: str, input_names: Sequence[str] | None, output_names: Sequence[str] | None) -> None:
    """Write what `recorded` returns as an ONNX file."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        made: Any = torch.onnx.export(
            program,
            dynamo=True,
            custom_translation_table={op.recurrent: _translated},
            input_names=input_names,
            output_names=output_names,
            verbose=False,
        )
    # The exporter itself only computes small constants; weights are stored in ONNX's order too.
    most = 1 + max((value.nbytes for value in program.state_dict.values()), default=0)
    importlib.import_module("onnxscript").optimizer.optimize(made.model, input_size_limit=most, output_size_limit=most)
    made.save(path)


def _check(graph: Any) -> None:
    """Refuse an exported graph that has other recurrent operators than ours, or calls that ONNX can't express."""
    for node in graph.nodes:
        name = str(node.target)
        if name.startswith(FIXING):
            raise ValueError(f"export_onnx: PyTorch runs {name}, which fixes the number of steps: see cs.plan(module)")
        if node.target is op.recurrent:
            _, _, _, drops, mask, reset, texts, *_ = node.args
            if reset is not None or drops or not (mask is None or _of_lengths(mask)):
                given = "resets" if reset is not None else "dropout" if drops else "a mask, only lengths"
                raise ValueError(f"export_onnx: ONNX's recurrent operators don't take {given}; {EXPORT_HINT}")
            for spec in (of_text(text).spec for text in texts):
                operator_of_specs("export_onnx", [spec], "forward")
                if spec.coupled or spec.learn_initial_state:
                    flag = "coupled" if spec.coupled else "learn_initial_state"
                    raise ValueError(f"export_onnx: {spec.of_kind.title} with {flag} isn't supported; {EXPORT_HINT}")


def _of_lengths(mask: Any) -> bool:
    """Whether a mask is computed from lengths, as `arange(T) < lengths[:, None]`."""
    if str(mask.target) != "aten.lt.Tensor" or mask.args[1].meta["val"].shape[-1] != 1:
        return False
    return str(mask.args[0].target) in ("aten.arange.default", "aten.arange.start")


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
    """Return the results of `cellstack::recurrent` as ONNX's operators; see `layers.op` for the arguments."""
    onnx = importlib.import_module("onnxscript").opset18
    steps, used, lengths = onnx.Transpose(x, perm=[1, 0, 2]), None, None
    if mask is not None:
        lengths = onnx.ReduceSum(onnx.Cast(mask, to=INT32), [1], keepdims=0)
        used = onnx.Unsqueeze(onnx.Transpose(mask, perm=[1, 0]), [2])  # [T, B, 1]
    given, arrays, results = iter(starts), iter(weights), []
    for call in map(of_text, cells):
        spec = call.spec
        operator, attributes = operator_of_specs("export_onnx", [spec], "reverse" if reverse else "forward")
        w, r, b, p = _weights(onnx, call, {name: next(arrays) for name in call.shapes})
        begin = [next(given) for _ in call.sizes] if starts else []
        states = [onnx.Unsqueeze(state, [0]) for state in begin] or [None] * len(call.sizes)
        inputs = [steps, w, r, b, lengths, *states, *([p] if p is not None else [])]
        y, *ends = getattr(onnx, operator)(*inputs, **attributes)
        ends = [onnx.Squeeze(end, [0]) for end in ends]
        steps = onnx.Squeeze(y, [1])  # [T, B, H]
        if used is not None:  # ONNX returns zeros past the end of a row, our op the last output before
            steps = onnx.Where(used, steps, (begin[0] if begin else 0.0) if reverse else ends[0])
        results += ends
    return [*results, *([steps if time_major else onnx.Transpose(steps, perm=[1, 0, 2])] if sequences else [])]


def _weights(onnx: Any, call: Any, arrays: dict[str, Any]) -> list[Any]:
    """Return W, R, B and P of a recurrent operator; None for those that are absent."""
    kind, units = call.spec.of_kind, call.spec.units
    theirs, ours = ORDER[kind.name], call.spec.of_kind.names["torch"].order if call.torch_layout else kind.gates

    def ordered(array: Any, to: Any = theirs, of: Any = ours, transposed: bool = False) -> Any:
        """Return blocks of rows in another order."""
        rows = [units * list(of).index(gate) + n for gate in to for n in range(units)]
        return onnx.Gather(onnx.Transpose(array, perm=[1, 0]) if transposed else array, rows, axis=0)

    if call.torch_layout:
        w, r, *rest = arrays.values()
        made = [ordered(w), ordered(r), onnx.Concat(*map(ordered, rest), axis=0) if rest else None, None]
    else:
        b, p = arrays.get("bias"), arrays.get("peepholes")
        if b is not None:
            blocks = [ordered(onnx.Gather(b, n, axis=0)) for n in range(2)] if call.spec.two_biases else [ordered(b)]
            b = onnx.Concat(*blocks, *([] if len(blocks) > 1 else [onnx.Mul(blocks[0], 0.0)]), axis=0)
        if p is not None:
            p = ordered(onnx.Reshape(p, [-1]), *orders_of_peepholes(kind))
        made = [*(ordered(arrays[name], transposed=True) for name in ("kernel", "recurrent_kernel")), b, p]
    return [None if one is None else onnx.Unsqueeze(one, [0]) for one in made]
