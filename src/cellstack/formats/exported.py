"""A module of PyTorch as an ONNX file, with nothing printed to the console; and what to do where that fails."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cellstack.spec import FormatError

LOOKS = "Converting a tensor to a "  # how PyTorch's warnings begin that a trace doesn't show what comes of a number
LISTED = 2  # problems that a message names, if it names a mend; the rest is counted

# What is in the reason why a module can't be read, and what to do about it; the first that is in it counts.
MENDS = (
    (r"ScatterND|aten::index_put|aten::copy_", "it writes into a tensor that is there, as in out[:, t] = y: collect "
     "the parts in a list and join them by torch.stack(parts, 1)"),
    (r"Dropout '", "its dropout is on in evaluation too: give it training=self.training"),
    (r"Random|Multinomial|Bernoulli|aten::normal|aten::rand", "it draws random numbers, and a Network has none: let it "
     "return what they are drawn by, and draw outside"),
    (r"ArgMax|ArgMin|TopK|aten::sort", "it chooses by the numbers themselves: let it return these, and choose outside"),
    (r"Greater|Less|Equal|Where '|NonZero", "it chooses by the numbers themselves: let it return these, and choose "
     "outside"),
    (r"MatMul '[^']*': expected the weights to be constant|scaled_dot_product|aten::baddbmm", "it multiplies values by "
     "each other, as attention does, and a Network multiplies by weights: compile the module up to there"),
    (r"Einsum", "write the einsum as x @ weight, or as nn.Linear"),
    (r"aten::fft|aten::stft|STFT|DFT", "it computes a spectrum: compute that outside, and give the module without it"),
    (r"expected a vector to be repeated over time", "it repeats a vector as often as an input has steps, and a Network "
     "repeats by a number that is fixed: give that number"),
    (r"dynamo-optimized", "it is compiled by torch.compile: give what was, module._orig_mod"),
    (r"Python operator|PythonOp|lift_fresh", "a part of it, such as an autograd.Function, leaves PyTorch's own "
     "operators, as NumPy does: write its forward in these"),
    (r"no input;|found: no input", "its output doesn't come from the example: detach(), numpy() and .data leave the "
     "graph, and so does what is kept from another call"),
    (r"aten::\w+' to ONNX|Unsupported", "ONNX has no such operator: compute that outside of the module"),
)  # fmt: skip


def export(module: Any, inputs: tuple[Any, ...], path: str, options: dict[str, Any]) -> list[str]:
    """Write a module as an ONNX file, by tracing it once.

    Args:
        module: the module, in evaluation.
        inputs: what it takes.
        path: where to.
        options: those of `torch.onnx.export`.

    Returns:
        The places where the module looks at numbers, `file.py:12`: what it does by them the file doesn't show.

    Raises:
        FormatError: PyTorch can't; says why in a line.
        ModuleNotFoundError: the export needs a package that isn't installed.
    """
    import torch

    logs = torch._C._jit_is_onnx_log_enabled()  # on throughout an export of some versions, and after it

    def hush(*_: Any) -> None:
        torch._C._jit_set_onnx_log_enabled(False)

    handle = module.register_forward_pre_hook(hush) if not isinstance(module, torch.jit.ScriptModule) else None
    looks: list[str] = []
    theirs = os.path.dirname(torch.__file__)  # checks of PyTorch's own, which hold for any numbers
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                torch.onnx.export(module, inputs, path, **options, dynamo=False, autograd_inlining=False)
            except ModuleNotFoundError:
                raise
            except Exception as error:  # the exporter fails in as many ways as there are modules
                if "Python operator" not in str(error) and "PythonOp" not in str(error):
                    raise
                with _without_console():  # PyTorch warns there, past Python, of functions that it can't look into
                    torch.onnx.export(module, inputs, path, **options, dynamo=False, autograd_inlining=True)
        for warning in caught:
            own = not warning.filename.startswith(theirs)
            if own and warning.category.__name__ == "TracerWarning" and LOOKS in str(warning.message):
                looks.append(f"{os.path.basename(warning.filename)}:{warning.lineno}")
    except ModuleNotFoundError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FormatError(f"PyTorch can't export it: {first}") from error
    finally:
        torch._C._jit_set_onnx_log_enabled(logs)
        if handle is not None:
            handle.remove()
    return list(dict.fromkeys(looks))


@contextmanager
def _without_console() -> Iterator[None]:
    """Lead what is written past Python to the console elsewhere, as long as this lasts."""
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


def mend(why: str) -> str:
    """Return what to do about a reason why a module can't be read, in a sentence; "" where nothing is known."""
    return next((text for pattern, text in MENDS if re.search(pattern, why)), "")


def shortened(why: str) -> str:
    """Return a reason with the first of its problems, the others counted."""
    head, found, problems = why.partition(", found: ")
    parts = problems.split("; ")
    if not found or len(parts) <= LISTED:
        return why
    last = re.fullmatch(r"and (\d+) more", parts[-1])
    count = len(parts) - LISTED + (int(last[1]) - 1 if last else 0)
    return f"{head}{found}{'; '.join(parts[:LISTED])}; and {count} more"
