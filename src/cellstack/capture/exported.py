"""Exports a PyTorch module to ONNX without printing to the console, and says how to fix modules that can't be read."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from cellstack.capture.sizes import OURS, line_of, outside
from cellstack.cells.errors import FormatError

LOOKS = "Converting a tensor to a "  # start of PyTorch's warnings about a tensor's value that a trace can't record
IN_PLACE = ("add_", "sub_", "mul_", "floor_divide_", "remainder_")
ADAPTIVE = {f"adaptive_{mode}_pool{n}d": (how, n) for mode, how in (("avg", "mean"), ("max", "amax")) for n in (2, 3)}
CELLS = ("gru_cell", "rnn_tanh_cell", "rnn_relu_cell")  # not lstm_cell, whose equations the reader finds
LISTED = 2  # problems that a message lists if it also gives a remedy; the rest are counted

# Patterns in the reason why a module can't be read, and how to fix each; the first that matches is used.
REMEDIES = (
    (r"size of a frame is unknown|found axes F 1 1|found T B 1|found axis F of B F(?! [A-Z1])", "it takes samples "
     "without an axis of features: let forward take [B, T, 1], without x[:, :, None], and pass such an example"),
    (r"ScatterND|aten::index_put|aten::copy_", "it writes into an existing tensor, as in out[:, t] = y: collect "
     "the parts in a list and join them by torch.stack(parts, 1)"),
    (r"Dropout '", "its dropout is active in evaluation mode too: pass training=self.training to it"),
    (r"Random|Multinomial|Bernoulli|aten::normal|aten::rand", "it draws random numbers, which a Network can't: "
     "return the distribution's parameters, and draw outside the module"),
    (r"division of ids", "it divides ids, which rounds: compute these ids outside the module"),
    (r"ArgMax|ArgMin|TopK|aten::sort", "its output depends on comparing values: return the values, and choose outside "
     "the module"),
    (r"a branch depends on the values", "its scripted code branches on values, as in if x.sum() > 0: compute both "
     "branches and select by torch.where, or decide outside the module"),
    (r"Greater|Less|Equal|Where '|NonZero", "its output depends on comparing values: return the values, and choose "
     "outside the module"),
    (r"MatMul '[^']*': expected the weights to be constant|scaled_dot_product|aten::baddbmm", "it multiplies computed "
     "values by each other, as attention does, but a Network only multiplies by weights: compile the part before it"),
    (r"Einsum", "write the einsum as x @ weight, or as nn.Linear"),
    (r"aten::fft|aten::stft|STFT|DFT", "it computes a spectrum: compute it outside, and compile the module without it"),
    (r"dynamo-optimized", "it is compiled by torch.compile: pass the original module, module._orig_mod"),
    (r"Python operator|PythonOp|lift_fresh", "a part of it, such as an autograd.Function or NumPy code, doesn't use "
     "PyTorch's operators: write its forward with these"),
    (r"no input;|found: no input", "its output doesn't depend on the example: detach(), numpy() and .data break the "
     "graph, and so do values kept from another call"),
    (r"aten::\w+' to ONNX|Unsupported", "ONNX has no such operator: compute that part outside the module"),
)  # fmt: skip


class ExportError(FormatError):
    """PyTorch can't export a module."""


def export(
    module: Any, inputs: tuple[Any, ...], path: str, options: dict[str, Any], one_step: bool = False
) -> list[str]:
    """Write a module in evaluation mode as an ONNX file, by tracing it once.

    Args:
        module: the module, which takes tensors as arguments, as `flattened` returns it.
        inputs: the example.
        path: the file.
        options: options of `torch.onnx.export`.
        one_step: whether the module calls its cells once, as a step: these then become recurrent operators, of which
            the states are known.

    Returns:
        The places, such as `file.py:12`, where the module reads tensors' values: the file doesn't record how its output
        depends on them.

    Raises:
        ExportError: PyTorch can't export the module; the message gives the reason in one line.
        ModuleNotFoundError: the export needs a package that isn't installed.
    """
    logs = torch._C._jit_is_onnx_log_enabled()  # some versions turn it on during an export, and leave it on

    def hush(*_: Any) -> None:
        torch._C._jit_set_onnx_log_enabled(False)

    handle = module.register_forward_pre_hook(hush) if not isinstance(module, torch.jit.ScriptModule) else None
    looks: list[str] = []

    def look(message: Warning | str, category: type[Warning], *_: Any) -> None:
        if category.__name__ == "TracerWarning" and LOOKS in str(message):
            # PyTorch's own checks of values don't change what a module computes.
            own = warnings.__file__, warnings.simplefilter.__code__.co_filename  # two since Python 3.14
            line = line_of(outside(sys._getframe(1), OURS, *own))
            looks.extend([line] if line else [])

    def run(inlining: bool) -> None:
        with _traceable(one_step), _rounding():
            torch.onnx.export(module, inputs, path, **options, dynamo=False, verbose=True, autograd_inlining=inlining)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = look
            try:
                # The console output of a scripted module, which takes no hook, can't be suppressed otherwise.
                with without_console() if handle is None else nullcontext():
                    run(False)
            except Exception as error:  # the exporter fails in as many ways as there are modules
                if "Python operator" not in str(error) and "PythonOp" not in str(error):
                    raise
                with without_console():  # C++ code of PyTorch prints warnings about functions that it can't inline
                    run(True)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"PyTorch can't export it: {first}") from error
    finally:
        torch._C._jit_set_onnx_log_enabled(logs)
        if handle is not None:
            handle.remove()
    return list(dict.fromkeys(looks))


def first_reason(error: BaseException) -> str:
    """Return the first line of an error's message, or of its first cause's: exporters raise long errors from others."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _traceable(one_step: bool) -> Any:
    """Return a context that replaces functions which the exporter can't trace, or not with an open length.

    - A size is a tensor while traced: `length *= 2` makes a new one, as it does for integers.
    - Adaptive pooling to one entry along some axes becomes a mean or maximum over these.
    - RMS norms and differences, which ONNX lacks, and single steps of PyTorch's cells are computed by their equations.
    """

    def rms_norm(x: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
        axes = tuple(range(-len(shape), 0))
        least = torch.finfo(x.dtype).eps if eps is None else eps
        y = x / (x.square().mean(axes, keepdim=True) + least).sqrt()
        return y if weight is None else y * weight

    def diff(x: Any, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Any:
        parts = [one for one in (prepend, x, append) if one is not None]
        x, before = torch.cat(parts, dim) if len(parts) > 1 else x, (slice(None),) * (dim % x.ndim)
        for _ in range(n):
            x = x[(*before, slice(1, None))] - x[(*before, slice(-1))]
        return x

    class Traceable(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name, named = getattr(func, "__name__", ""), kwargs or {}
            if name in IN_PLACE and args[0].ndim == 0 and not args[0].is_floating_point():
                return getattr(args[0], name[:-1])(*args[1:], **named)
            if name in own:
                return own[name](*args, **named)
            if one_step and name in CELLS:
                x, h, *weights = (one for one in args if one is not None)
                run = getattr(torch._VF, name.removesuffix("_cell"))
                return run(x[None], h[None], weights, len(weights) > 2, 1, 0.0, False, False, False)[1][0]
            if name in ("lstm_cell", "gru_cell"):
                return _step(name, *args)
            reduce, count = ADAPTIVE.get(name, ("", 0))
            sizes = named.get("output_size", args[1] if len(args) > 1 else None)
            if reduce and isinstance(sizes, tuple) and len(sizes) == count and set(sizes) == {None, 1}:
                return getattr(args[0], reduce)([n - count for n in range(count) if sizes[n] == 1], keepdim=True)
            return func(*args, **named)

    own = {"rms_norm": rms_norm, "diff": diff}
    return Traceable()


@contextmanager
def _rounding() -> Iterator[None]:
    """Make math.ceil and math.floor of a size, which is a tensor while traced, operators of the graph.

    Both look for a method of the tensor's class, and otherwise convert the tensor to a float. A torch function mode
    can't intercept the first, and can only return a float for the second, after which the trace has a constant.
    """
    own = [name for name in ("__ceil__", "__floor__") if not hasattr(torch.Tensor, name)]
    for name in own:
        function = getattr(torch, name.strip("_"))
        setattr(torch.Tensor, name, lambda size, function=function: function(size).long())
    try:
        yield
    finally:
        for name in own:
            delattr(torch.Tensor, name)


def _step(name: str, x: Any, state: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
    """Return the new state of `lstm_cell` or `gru_cell`; the exporter can't split their gates if sizes are unknown."""
    h, units = state[0] if name == "lstm_cell" else state, w_hh.shape[1]
    of_x, of_h = linear(x, w_ih, b_ih), linear(h, w_hh, b_hh)

    def gates(values: Any) -> list[Any]:
        return [values[:, n * units : (n + 1) * units] for n in range(len(w_hh) // units)]

    if name == "lstm_cell":
        i, f, g, o = gates(of_x + of_h)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    (r, z, g), (r_h, z_h, g_h) = gates(of_x), gates(of_h)
    z = (z + z_h).sigmoid()
    g = (g + (r + r_h).sigmoid() * g_h).tanh()
    return (1 - z) * g + z * h


@contextmanager
def without_console() -> Iterator[None]:
    """Redirect console output that bypasses Python to a temporary file."""
    with tempfile.TemporaryFile() as elsewhere:
        kept = {}
        try:
            for number in (1, 2):
                try:
                    kept[number] = os.dup(number)
                except OSError:  # a process without a console
                    continue
                os.dup2(elsewhere.fileno(), number)
            yield
        finally:
            for number, own in kept.items():
                os.dup2(own, number)
                os.close(own)


def remedy(why: str) -> str:
    """Return how to fix a module that can't be read for the reason `why`; "" if that is unknown."""
    return next((text for pattern, text in REMEDIES if re.search(pattern, why)), "")


def shortened(why: str) -> str:
    """Return a reason with the first few of its problems and the number of the others."""
    head, found, problems = why.partition(", found: ")
    parts = problems.split("; ")
    if not found or len(parts) <= LISTED:
        return why
    last = re.fullmatch(r"and (\d+) more", parts[-1])
    count = len(parts) - LISTED + (int(last[1]) - 1 if last else 0)
    return f"{head}{found}{'; '.join(parts[:LISTED])}; and {count} more"
