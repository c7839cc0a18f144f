"""ONNX Runtime with recurrent operators on the fused kernel: `InferenceSession` takes any ONNX file.

Everything else of the package onnxruntime has the same name here: `import cellstack.onnxruntime as onnxruntime`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from types import SimpleNamespace
from typing import Any

try:
    import onnxruntime
except ModuleNotFoundError as error:
    needs = "cellstack.onnxruntime needs onnxruntime: pip install 'cellstack[onnxruntime]'"
    raise ModuleNotFoundError(needs, name=error.name) from None

from cellstack.formats.onnx.segments import SegmentedNetwork, undivided


def __getattr__(name: str) -> Any:
    return getattr(onnxruntime, name)


class InferenceSession(onnxruntime.InferenceSession):
    """A session of ONNX Runtime, in which the kernel runs LSTM, GRU and RNN with constant weights.

    All other operators run in sessions of ONNX Runtime. A file without such operators, or one that can't be divided,
    runs in one session of ONNX Runtime; `plan` says why. Of a divided file, only the methods below are available.

    Args:
        path_or_bytes: the file, or its content.
        sess_options: ONNX Runtime's SessionOptions. Its `intra_op_num_threads` also limits the kernel's threads.
        providers: ONNX Runtime's execution providers, for all other operators; None: the CPU's.
        provider_options: their options.
        **kwargs: further arguments of ONNX Runtime's session, which then runs the whole file.

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
        self._parts, self._why = None, f"it has the arguments {', '.join(kwargs)}"
        chosen = list(providers or ["CPUExecutionProvider"])
        if not kwargs:
            try:
                parts = _divided(path_or_bytes)
                reasons = "; ".join(f"{name}: {why}" for name, why in parts.refused.items())
                self._why = reasons or "it has no recurrent operator"
                if parts.kernels:
                    both = list(zip(chosen, provider_options, strict=True)) if provider_options else chosen
                    self._parts = parts.prepare(sess_options, both)
            except Exception as error:  # ONNX Runtime judges the whole file itself
                self._why = str(error)
        self._chosen = [one if isinstance(one, str) else one[0] for one in chosen]
        self._threads = getattr(sess_options, "intra_op_num_threads", 0) or None
        if self._parts is None:
            given = path_or_bytes if isinstance(path_or_bytes, bytes) else fspath(path_or_bytes)
            super().__init__(given, sess_options, chosen, provider_options, **kwargs)

    def run(self, output_names: Any, input_feed: Mapping[str, Any], run_options: Any = None) -> Any:
        """Return the outputs of these names, all for None, for inputs by name.

        Raises:
            ValueError: a missing input, or an unknown name.
            Exception: whatever ONNX Runtime raises.
        """
        if self._parts is None:
            return super().run(output_names, input_feed, run_options)
        every = self._parts.outputs
        if unknown := set(output_names or ()) - set(every):
            raise ValueError(f"run: expected names of {', '.join(every)}, got {', '.join(unknown)}")
        found = dict(zip(every, self._parts.compute(input_feed, self._threads, run_options), strict=True))
        return [found[name] for name in output_names or every]

    def get_inputs(self) -> Any:
        """Return the inputs, each with `name`, `type` and `shape`."""
        return super().get_inputs() if self._parts is None else self._parts.arguments(self._parts.inputs)

    def get_outputs(self) -> Any:
        """Return the outputs, likewise."""
        return super().get_outputs() if self._parts is None else self._parts.arguments(self._parts.outputs)

    def get_providers(self) -> Any:
        """Return the names of the execution providers of ONNX Runtime's part."""
        return super().get_providers() if self._parts is None else self._chosen

    def get_modelmeta(self) -> Any:
        """Return the metadata of the file."""
        if self._parts is None:
            return super().get_modelmeta()
        proto = self._parts.proto
        names = {"producer_name": "producer_name", "domain": "domain", "description": "doc_string"}
        found = {name: getattr(proto, own) for name, own in names.items()}
        own = {one.key: one.value for one in proto.metadata_props}
        more = {"graph_name": proto.graph.name, "graph_description": proto.graph.doc_string}
        return SimpleNamespace(**found, **more, version=proto.model_version, custom_metadata_map=own)

    def plan(self) -> Any:
        """Return what runs each part of the file, in order: a tuple of lines."""
        return undivided(self._why) if self._parts is None else self._parts.plan()


def _divided(path_or_bytes: str | PathLike[str] | bytes) -> SegmentedNetwork:
    """Return a file in parts."""
    if not isinstance(path_or_bytes, bytes):
        return SegmentedNetwork(fspath(path_or_bytes))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        with open(path, "wb") as file:
            file.write(path_or_bytes)
        return SegmentedNetwork(path)
