"""The runtimes that `verify` compares a network with: ONNX Runtime, Keras, PyTorch and compiled C. Imported on use.

They run in a separate process (`worker`), so that a crash becomes a report. None runs code from a file: torch loads
weights only, keras refuses lambdas, and a C file is compiled only if it equals the one that `export_c` writes.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from cellstack.formats import adapter_of, worker
from cellstack.formats.runtimes import c, keras, native, onnxruntime, pytorch
from cellstack.formats.runtimes.answers import Answers, CannotRunError, Inputs, OtherSizesError, says
from cellstack.network import Network
from cellstack.nodes.base import Array


def run_file(net: Network, path: str, inputs: Inputs) -> Answers:
    """Run a file in its own runtime, which is determined by its suffix, or else by its content.

    Args:
        net: the network to compare the file with; it defines the names of inputs and outputs.
        path: the file.
        inputs: arrays by the network's names.

    Returns:
        The runtime's answers.

    Raises:
        CannotRunError: the runtime can't run the file; `OtherSizesError` if it could with inputs of other lengths.
        FormatError: the file is in no known format.
        OSError: the file can't be read.
    """
    name = runtime_of(path)
    if name == "cellstack":
        return native.run(net, path, inputs)
    loaded = sys.modules.get("keras")  # use the backend that our own process uses
    chosen = os.environ.get("KERAS_BACKEND") if loaded is None else loaded.config.backend()
    environment = {"KERAS_BACKEND": chosen} if chosen else {}
    try:
        said, arrays = worker.call(f"{__name__}:run_here", name, net, path, dict(inputs), **environment)
    except worker.WorkerDiedError as error:
        raise CannotRunError(f"can't run the file: the process of {name} {error}") from None
    if "sizes" in said:
        raise OtherSizesError(*said["sizes"])
    if "why" in said:
        raise CannotRunError(said["why"])
    outputs = dict(zip(said["outputs"], arrays, strict=False))
    states = dict(zip(said["states"], arrays[len(outputs) :], strict=True))
    return Answers(said["runtime"], said["version"], outputs, states, said["no_states"], said["note"])


def run_here(name: str, net: Network, path: str, inputs: Inputs) -> tuple[dict[str, Any], list[Array]]:
    """Run a file in this process, and return the result or the error of `run` as JSON and arrays."""
    try:
        with warnings.catch_warnings():  # runtimes warn about themselves, such as which algorithm they use
            warnings.simplefilter("ignore")
            answers = RUNTIMES[name](net, path, inputs)
    except OtherSizesError as error:
        return {"sizes": [error.batch, error.steps]}, []
    except CannotRunError as error:
        return {"why": str(error)}, []
    except Exception as error:  # a runtime may raise anything
        return {"why": says(f"can't run the file: {name} raised {type(error).__name__}", error)}, []
    arrays = [*answers.outputs.values(), *answers.states.values()]
    odd = next((array.dtype for array in arrays if array.dtype.kind not in "biuf"), None)
    if odd is not None:
        return {"why": f"can't compare what the file answers: expected numbers, found {odd}"}, []
    return answers._asdict() | {"outputs": list(answers.outputs), "states": list(answers.states)}, arrays


def runtime_of(path: str) -> str:
    """Return the name of a file's runtime.

    Raises:
        FormatError: the file is in no known format.
        OSError: the file can't be read.
    """
    suffix = PurePath(path).suffix.lower()
    return BY_SUFFIX[suffix if suffix in BY_SUFFIX else adapter_of(path).SUFFIXES[0]]


def _by_nothing(net: Network, path: str, inputs: Inputs) -> Answers:
    """Refuse: the runtimes of such files are C++ libraries without a Python package."""
    raise CannotRunError(f"{path} is run by RTNeural or neural-amp-modeler, C++ libraries without a Python package")


RUNTIMES: dict[str, Callable[[Network, str, Inputs], Answers]] = {
    "onnxruntime": onnxruntime.run,
    "keras": keras.run,
    "torch": pytorch.run,
    "the C compiler's program": c.run,
    "RTNeural": _by_nothing,
}
BY_SUFFIX = {
    ".safetensors": "cellstack",
    ".onnx": "onnxruntime",
    **dict.fromkeys((".keras", ".h5", ".hdf5"), "keras"),
    **dict.fromkeys((".pt", ".pth", ".bin", ".pkl", ".ckpt"), "torch"),
    ".c": "the C compiler's program",
    **dict.fromkeys((".json", ".nam"), "RTNeural"),
}
