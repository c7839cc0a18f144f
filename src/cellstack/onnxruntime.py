"""ONNX Runtime with recurrent operators on the fused kernel: `InferenceSession` takes any ONNX file.

Everything else of the package onnxruntime has the same name here: `import cellstack.onnxruntime as onnxruntime`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from os import PathLike, fspath
from typing import Any

try:
    import onnxruntime
except ModuleNotFoundError as error:
    needs = "cellstack.onnxruntime needs onnxruntime: pip install 'cellstack[onnxruntime]'"
    raise ModuleNotFoundError(needs, name=error.name) from None

from cellstack.formats.onnx.outputs import described
from cellstack.formats.onnx.runtime import FOLDER, Plan, Replacement, entry_of


def __getattr__(name: str) -> Any:
    return getattr(onnxruntime, name)


class InferenceSession(onnxruntime.InferenceSession):
    """A session of ONNX Runtime, in which the kernel runs LSTM, GRU and RNN with constant weights.

    A file without such operators, or that cellstack can't read, runs as in ONNX Runtime's own class: `plan` says why.

    Args:
        path_or_bytes: the file, or its content.
        sess_options: ONNX Runtime's SessionOptions. Its `intra_op_num_threads` also limits the kernel's threads. Unless
            it sets `session.intra_op.allow_spinning`, this becomes 0: else both kinds of threads would compete.
        providers: ONNX Runtime's execution providers, for all other operators; None: the CPU's.
        provider_options: their options.
        **kwargs: further arguments of ONNX Runtime's session.

    Raises:
        Exception: whatever ONNX Runtime raises for an invalid file.
    """

    def __init__(
        self,
        path_or_bytes: str | PathLike[str] | bytes,
        sess_options: Any = None,
        providers: Sequence[Any] | None = None,
        provider_options: Sequence[dict[Any, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        given = path_or_bytes if isinstance(path_or_bytes, bytes) else fspath(path_or_bytes)

        def start(model: str | bytes, options: Any) -> None:
            both = provider_options if providers else None
            super(InferenceSession, self).__init__(
                model, options, providers or ["CPUExecutionProvider"], both, **kwargs
            )

        self._operators: list[Any] = []
        own = sess_options or onnxruntime.SessionOptions()
        try:
            made = _replaced(given, own)
        except Exception as error:  # ONNX Runtime judges the file itself
            self._plan = Plan([f"ONNX Runtime: {error}"])
        else:
            self._plan = made.plan
            if made.kernels:
                _, self._operators = made.session(start, own)
                return
        start(given, sess_options)

    def get_outputs(self) -> Sequence[Any]:
        """Return the outputs, each with its `name`, `type` and `shape`."""
        return described(super().get_outputs(), self._operators)

    def plan(self) -> Plan:
        """Return what runs each operator of the file: a tuple of lines."""
        return self._plan


def _replaced(given: str | bytes, options: Any) -> Replacement:
    """Return a file, given by its path or its content, with the kernel's operators.

    Raises:
        ValueError, OSError: it can't be read, or `options` ask for a copy of it.
    """
    if options.optimized_model_filepath:
        raise ValueError("a file can't hold the kernel's operators, and optimized_model_filepath asks for one")
    if isinstance(given, bytes):
        return Replacement(os.path.join(entry_of(options, FOLDER), "model"), given)
    with open(given, "rb") as file:
        return Replacement(given, file.read())
