"""The runtimes that `verify` compares a network with: ONNX Runtime, Keras, PyTorch and compiled C. Imported on use.

They run in a separate process (`worker`), so that a crash becomes a report. None runs code from a file: torch loads
weights only, keras refuses lambdas, and a C file is compiled only if it equals the one that `export_c` writes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from cellstack.formats import adapter_of, c, onnx, safetensors, worker
from cellstack.formats.build import Names
from cellstack.formats.onnx.writer import state_names
from cellstack.network import Network
from cellstack.nodes import Bidirectional, Recurrent
from cellstack.nodes.base import Array, CellState
from cellstack.spec import FormatError


class Answers(NamedTuple):
    """A runtime's answers: outputs by the network's names, and states by the names that `named` gives them, if any.

    `no_states` says why states are missing, if the reason is known; `note` says what to know about the run.
    """

    runtime: str
    version: str
    outputs: dict[str, Array]
    states: dict[str, Array]
    no_states: str = ""
    note: str = ""


class CannotRunError(Exception):
    """No runtime can run a file here; the message says why, and what to install if that helps."""


class OtherSizesError(CannotRunError):
    """A file only takes inputs with `batch` rows of `steps` steps."""

    def __init__(self, batch: int, steps: int) -> None:
        super().__init__(f"the file only takes inputs with B={batch}, T={steps}")
        self.batch, self.steps = batch, steps


ONNX_TYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}
Inputs = Mapping[str, Array]
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")  # colours for terminals, which torch writes into its messages
MODULE = "compare with your module: cs.verify(cs.load(…), module)"


def named(states: Sequence[CellState]) -> dict[str, Array]:
    """Return every array of a network's state by a name, such as `cell 0 c`."""
    return {
        f"cell {number} {name}": array
        for number, state in enumerate(states)
        for name, array in zip(state._fields, state, strict=True)
    }


def run(net: Network, path: str, inputs: Inputs) -> Answers:
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
        return _by_us(net, path, inputs)
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
        return {"why": _says(f"can't run the file: {name} raised {type(error).__name__}", error)}, []
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


def _package(name: str, path: str) -> Any:
    """Import and return a package; raise `CannotRunError` if it isn't installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise CannotRunError(f"{path} is run by {name}, which needs {error.name}: pip install {error.name}") from None


def _says(what: str, error: Exception) -> str:
    text = " ".join(ESCAPE.sub("", str(error)).split())
    return f"{what}: {text if len(text) <= 300 else text[:297] + '...'}"


def _by_name(names: Sequence[str], found: Sequence[str], arrays: Sequence[Any], what: str) -> dict[str, Any]:
    """Return arrays by `names`: matched by name if all of them are in `found`, else by order."""
    if set(names) <= set(found):
        return {name: arrays[found.index(name)] for name in names}
    if len(names) != len(found):
        raise CannotRunError(f"expected the {what} {', '.join(names)}, found {', '.join(found)}")
    return dict(zip(names, arrays, strict=True))


# ── ours ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _by_us(net: Network, path: str, inputs: Inputs) -> Answers:
    """Load and run a file in the native format."""
    try:
        other = safetensors.load(path)
        y, states = other.run(_by_name(other.inputs, list(inputs), list(inputs.values()), "inputs"))
    except FormatError as error:
        ordered = net.metadata.get("source", {}).get("order")
        raise CannotRunError(MODULE if ordered else str(error)) from None
    except ValueError as error:
        raise CannotRunError(_says("the network in the file takes other inputs", error)) from None
    arrays = y if isinstance(y, tuple) else (y,)
    outputs = _by_name(net.outputs, other.outputs, arrays, "outputs")
    return Answers("cellstack", metadata.version("cellstack"), outputs, named(states))


# ── ONNX ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _by_onnxruntime(net: Network, path: str, inputs: Inputs) -> Answers:
    """Run a model; its inputs that aren't inputs of the network are lengths, or states, which start at zero."""
    ort = _package("onnxruntime", path)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # its exceptions hold the same messages
    ends = _ends_of(net, path)
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found = _run_session(net, ends, session, inputs)
    except CannotRunError:
        raise
    except Exception as error:  # its errors have no common base class
        lacks = re.search(r"Could not find an implementation for (\w+)", str(error))
        if lacks is not None and net.dtype == np.float64:
            raise CannotRunError(
                f"onnxruntime {ort.__version__} can't run it: it has no {lacks[1]} in float64"
            ) from None
        raise CannotRunError(_says(f"onnxruntime {ort.__version__} can't run it", error)) from None
    batch = len(next(iter(inputs.values())))
    names = ends["outputs"] or dict.fromkeys(list(found)[: len(net.outputs)], "")
    if len(names) != len(net.outputs) or not names.keys() <= found.keys():
        raise CannotRunError(f"expected the outputs {', '.join(net.outputs)}, found {', '.join(found)}")
    outputs = {ours: ordered(found[name], names[name], batch) for ours, name in zip(net.outputs, names, strict=True)}
    states: dict[str, Array] = {}
    for name, refs in ends["states"].items():
        cells = [ends["firsts"][node] + way for node, way, _ in refs]
        parts = parted(found[name], ends["state_axes"][name])
        states |= {f"cell {cell} {ref[2]}": part for cell, ref, part in zip(cells, refs, parts, strict=True)}
    if not ends["outputs"]:  # our writer may write what our reader can't read, such as masks
        states = {name: found[after] for name, after in state_names(net).items() if after in found}
    turned = onnx.time_first(ends["inputs"])
    note = f"{turned}, and x was transposed for the file" if turned else ""
    return Answers("onnxruntime", ort.__version__, outputs, states, note=note)


def _run_session(net: Network, ends: dict[str, Any], session: Any, inputs: Inputs) -> dict[str, Array]:
    """Return a session's outputs by name. A model of one step is run step by step if it takes its states as inputs."""
    if ends.get("frames"):
        return _run_frames(ends, session, inputs)
    entries, outs = session.get_inputs(), [entry.name for entry in session.get_outputs()]
    axes, fed = _fed(net, ends, entries, inputs)
    declared = {entry.name: entry.shape for entry in entries}
    found = {
        axis: (want, got)
        for name, letters in axes.items()
        for axis, want, got in zip(letters or "BTF", declared[name], fed[name].shape, strict=False)
    }
    if any(letters and "B" not in letters for letters in axes.values()):
        found["B"] = (1, len(next(iter(inputs.values()))))
    wanted = {axis: want for axis, (want, got) in found.items() if isinstance(want, int) and want != got}
    before, after = [name for name in fed if name not in axes], list(ends["states"])
    backwards = any(isinstance(n, Bidirectional) or (isinstance(n, Recurrent) and n.go_backwards) for n in net.nodes)
    by_steps = wanted.get("T") == 1 and len(before) == len(after) > 0 and not backwards
    if "B" in wanted or ("T" in wanted and not by_steps):
        sizes = {axis: want if axis in wanted else got for axis, (want, got) in found.items()}
        raise OtherSizesError(sizes.get("B", 1), found["T"][1] if by_steps else sizes.get("T", 1))
    if not by_steps:
        return dict(zip(outs, session.run(None, fed), strict=True))
    steps: list[dict[str, Array]] = []
    for t in range(found["T"][1]):
        frame = {name: fed[name].take([t], axis=axes[name].index("T")) for name in axes}
        states = [steps[-1][name] for name in after] if steps else [fed[name] for name in before]
        frame |= dict(zip(before, states, strict=True))
        steps.append(dict(zip(outs, session.run(None, frame), strict=True)))
    joined = {
        name: np.concatenate([step[name] for step in steps], axis=letters.index("T"))
        for name, letters in ends["outputs"].items()
        if "T" in letters
    }
    return steps[-1] | joined


def _run_frames(ends: dict[str, Any], session: Any, inputs: Inputs) -> dict[str, Array]:
    """Return the outputs of a model that takes frames, each preceded by its context: one per call, or all as rows."""
    entries = {entry.name: entry for entry in session.get_inputs()}
    outs = [entry.name for entry in session.get_outputs()]
    batch, steps = next(iter(inputs.values())).shape[:2]
    given = dict(zip(ends["inputs"], inputs.values(), strict=True))
    by_rows = ends["frames"]["steps"] == "rows"
    first = entries[next(iter(given))].shape[0]
    if batch != 1 and (by_rows or isinstance(first, int)):
        raise OtherSizesError(1, steps)
    fed: dict[str, Array] = {}
    whole: dict[str, Array] = {}
    for name, entry in entries.items():
        dtype = ONNX_TYPES.get(entry.type)
        if name in given:
            x, size = given[name], ends["frames"]["context"].get(name, 0)
            ahead = np.zeros((batch, steps, size), x.dtype)
            ahead[:, 1:] = x[:, :-1, x.shape[2] - size :]
            whole[name] = np.concatenate([ahead, x], axis=2).astype(dtype or x.dtype)
        elif name in ends["given"] and dtype is not None:
            if ends["given"][name] is None:
                raise CannotRunError(f"the value that was passed for {name} on loading isn't stored in the network")
            fed[name] = np.asarray(ends["given"][name], dtype)
        elif name in ends["starts"]:
            fed[name] = np.zeros([axis if isinstance(axis, int) else batch for axis in entry.shape], dtype)
        else:
            raise CannotRunError(f"expected {', '.join(given)} and states, found {name} ({entry.type})")
    after = {start: end for start, refs in ends["starts"].items() for end, own in ends["states"].items() if own == refs}

    def shaped(name: str, x: Array) -> Array:
        return x.reshape([x.shape[1] if axis == "F" else len(x) if axis == "B" else 1 for axis in ends["inputs"][name]])

    made: list[dict[str, Array]] = []
    for frame in [slice(None)] if by_rows else range(steps):
        rows = {name: shaped(name, x[0] if by_rows else x[:, frame]) for name, x in whole.items()}
        fed |= {start: made[-1][end] for start, end in after.items()} if made else {}
        made.append(dict(zip(outs, session.run(None, {**fed, **rows}), strict=True)))
    rows = steps if by_rows else batch
    answers = {name: np.stack([call[name].reshape(rows, -1) for call in made], axis=1) for name in ends["outputs"]}
    answers = {name: array.reshape(batch, steps, -1) for name, array in answers.items()}
    ends["outputs"] = dict.fromkeys(ends["outputs"], "BTF")
    return made[-1] | answers


def parted(array: Array, axes: str) -> Array:
    """Return the states `[S, B, H]` in an output whose axes are given by letters; without a B there is one row."""
    array = array.transpose(sorted(range(array.ndim), key=lambda n: "SBF".index(axes[n])))
    array = array if "B" in axes else array[..., None, :]
    return array.reshape(-1, *array.shape[-2:])


def _ends_of(net: Network, path: str) -> dict[str, Any]:
    """Return how the graph's inputs and outputs correspond to the network's, as our ONNX reader records it.

    `inputs` and `outputs` are in the network's order, each with its axes. `states` are the outputs that hold states of
    operators, with their `state_axes`; `firsts` are the indices of the operators' first cells. If our reader can't read
    the file, all are empty, and inputs and outputs are matched by order.
    """
    own = net.metadata.get("onnx")
    if isinstance(own, dict) and own.keys() & {"frames", "given"}:  # a file that was loaded with options
        return _noted(net, net)
    try:
        read = onnx.read_whole(path)
    except (FormatError, ModuleNotFoundError):
        return {"inputs": {}, "outputs": {}, "states": {}}
    return _noted(read, net)


def _noted(read: Network, net: Network) -> dict[str, Any]:
    """Return the graph's inputs and outputs from the metadata of the network that our reader returned."""
    noted = read.metadata["onnx"]
    counts = [len(node.cells) for node in read.nodes if node.cells]
    return {
        "inputs": noted["inputs"] if len(noted["inputs"]) == len(net.inputs) else {},
        "outputs": noted["outputs"],
        "states": noted["states"],
        "state_axes": noted.get("state_axes", {}),
        "starts": noted.get("starts", {}),
        "frames": noted.get("frames"),
        "given": noted.get("given", {}),
        "firsts": [sum(counts[:number]) for number in range(len(counts))],
    }


def _fed(
    net: Network, ends: dict[str, Any], entries: Sequence[Any], inputs: Inputs
) -> tuple[dict[str, str], dict[str, Array]]:
    """Return the axes of the inputs that carry data, and all arrays to feed a session with, in its order of axes."""
    names = ends["inputs"] or dict.fromkeys([entry.name for entry in entries][: len(inputs)], "")
    given = {name: (inputs[ours], axes) for ours, (name, axes) in zip(net.inputs, names.items(), strict=False)}
    first = next(iter(inputs.values()))
    fed: dict[str, Array] = {}
    for entry in entries:
        dtype = ONNX_TYPES.get(entry.type)
        if entry.name in given and dtype is not None:
            array, axes = given[entry.name]
            array = array[0] if axes and "B" not in axes else array  # the file takes one row
            ours = [axis for axis in "BTF" if axis in axes]
            order = [ours.index(axis) for axis in axes]
            fed[entry.name] = np.ascontiguousarray(array.transpose(order) if axes else array, dtype)
        elif dtype in ("float32", "float64"):
            fed[entry.name] = np.zeros([axis if isinstance(axis, int) else len(first) for axis in entry.shape], dtype)
        elif dtype is not None and len(entry.shape) == 1 and first.ndim > 1:
            fed[entry.name] = np.full(len(first), first.shape[1], dtype)
        else:
            raise CannotRunError(f"expected {', '.join(given)}, states and lengths, found {entry.name} ({entry.type})")
    return {name: axes for name, (_, axes) in given.items() if name in fed}, fed


def ordered(array: Array, axes: str, batch: int) -> Array:
    """Return an output in a Network's layout: rows, steps, then features with the directions concatenated.

    Args:
        array: the runtime's output.
        axes: a letter for each of its axes, as our reader records them; `N` is rows and steps merged. If features come
            before steps, or an axis of length 1 is next to the features, the network's output has that layout too.
        batch: the number of rows.
    """
    if len(axes) != array.ndim or not axes or not set(axes) <= set("BTFD1N"):
        return array
    if "N" in axes and array.shape[at := axes.index("N")] % batch == 0:
        array = array.reshape(*array.shape[:at], batch, -1, *array.shape[at + 1 :])
        axes = axes.replace("N", "BT")
    if axes in ("B1F", "BF1") or "N" in axes:
        return array
    if axes.replace("1", "") in ("BFT", "FT"):
        array = array.reshape([size for size, axis in zip(array.shape, axes, strict=True) if axis != "1"])
        return array if "B" in axes else array[None]
    order = sorted(range(array.ndim), key=lambda n: "BT1DF".index(axes[n]))
    array = array.transpose(order)
    kept = sum(axis in "BT" for axis in axes)
    if "1" in axes or "D" in axes or axes == "B":  # one number per row is one feature in a Network
        array = array.reshape(*array.shape[:kept], -1)
    return array if "B" in axes else array[None]


# ── Keras ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _choose_backend(ours: bool) -> None:
    """Choose an installed backend for keras, if none is chosen; cellstack's layers only run on torch."""
    names = ("torch",) if ours else ("tensorflow", "torch", "jax")
    there = next((name for name in names if find_spec(name) is not None), None)
    if there is not None and "keras" not in sys.modules:
        os.environ.setdefault("KERAS_BACKEND", there)


def _holds(path: str, text: bytes) -> bool:
    """Return whether a file contains these bytes: both of Keras's containers store the description uncompressed."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:  # an empty file can't be mapped
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            return whole.find(text) >= 0


def _check_sizes(net: Network, shapes: Sequence[Any], inputs: Inputs) -> None:
    """Raise `OtherSizesError` if a model, whose inputs are in the network's order, requires other lengths."""
    for name, shape in zip(net.inputs, shapes, strict=False):
        want, got = list(shape[:2]), list(inputs[name].shape[:2])
        sizes = [one or other for one, other in zip(want, got, strict=True)]
        if net.graph.timed(name) and sizes != got:
            raise OtherSizesError(*sizes)


def _by_keras(net: Network, path: str, inputs: Inputs) -> Answers:
    ours = _holds(path, b"cellstack>")
    _choose_backend(ours)
    keras = _package("keras", path)
    try:
        if ours:
            import_module("cellstack.keras")  # registers cellstack's layers with Keras
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
        names = [tensor.name for tensor in model.inputs]
        _check_sizes(net, [tensor.shape for tensor in model.inputs], inputs)
        given = _by_name(names, list(inputs), list(inputs.values()), "inputs")
        arrays = [given[name] for name in names]
        made, why = _with_states(keras, net, model)
        y = (made or model)(arrays if len(arrays) > 1 else arrays[0], training=False)
    except CannotRunError:
        raise
    except Exception as error:  # building a model from a file may raise anything
        raise CannotRunError(_says(f"keras {keras.__version__} can't run it", error)) from None
    found = [keras.ops.convert_to_numpy(one) for one in keras.tree.flatten(y)]
    count = len(keras.tree.flatten(model.outputs))
    found, states = found[:count], found[count:]
    names = list(getattr(model, "output_names", [])) or [f"output {number}" for number in range(len(found))]
    outputs = _by_name(net.outputs, names, found, "outputs")
    cells = [f"cell {n} {part}" for n, cell in enumerate(net.cells) for part in cell.spec.state_sizes]
    return Answers("keras", keras.__version__, outputs, dict(zip(cells, states, strict=bool(states))), why)


def _inner(layer: Any) -> Iterator[Any]:
    """Yield a layer and all layers inside it."""
    yield layer
    parts = [getattr(layer, name, None) for name in ("forward_layer", "backward_layer", "layer")]
    for part in (*parts, *getattr(layer, "layers", ())):
        if part is not None:
            yield from _inner(part)


def _with_states(keras: Any, net: Network, model: Any) -> tuple[Any, str]:
    """Return a model that also returns the states of its recurrent layers; or None and the reason why there is none.

    Each recurrent layer is copied with `return_state=True` and its weights, on the same input; the states are in the
    order of the network's cells.
    """
    ours = sys.modules.get("cellstack.keras")
    kinds = (keras.layers.RNN, *((ours.LSTM, ours.GRU, ours.SimpleRNN) if ours is not None else ()))
    wraps = keras.layers.Bidirectional
    layers = {layer.name: layer for layer in model.layers if isinstance(layer, (*kinds, wraps))}
    for layer in _inner(model):  # a stateful layer may run twice in the new model; a fresh one starts at zero
        if getattr(layer, "stateful", False):
            layer.stateful = False
    nodes = {name: node for name, node in zip(net.names, net.nodes, strict=True) if node.cells}
    order = list(nodes) if nodes.keys() == layers.keys() else list(layers)
    tensors: list[Any] = []
    names = Names((layer.name for layer in model.layers), "_")
    for name in order:
        layer = layers[name]
        settings = keras.saving.serialize_keras_object(layer)
        settings["config"]["name"] = names.fresh(f"{name}_states")
        for one in (settings, *(settings["config"].get(key) for key in ("layer", "backward_layer"))):
            if one is not None and isinstance(layer, wraps) == (one is not settings):
                own = {"return_gates": False} if "return_gates" in one["config"] else {"stateful": False}
                one["config"] |= {"return_state": True, **own}
        try:
            again = keras.saving.deserialize_keras_object(settings)
            x, *others = keras.tree.flatten(layer.input)
            masks = [one for one in others if one.dtype == "bool"]
            if others != masks:
                return None, f"{name} takes its initial state from the model"
            states = keras.tree.flatten(again(x, **dict(zip(["mask"], masks, strict=False))))[1:]
            again.set_weights(layer.get_weights())
        except Exception as error:  # any, as above; an AttributeError if a layer is called twice
            return None, _says(f"keras can't give the states of {name}", error)
        tensors += states
    sizes = [size for cell in net.cells for size in cell.spec.state_sizes.values()]
    found = [tensor.shape[-1] for tensor in tensors]
    if found != sizes:
        return None, f"the model's top-level layers have states of widths {found}, the network's cells {sizes}"
    return keras.Model(model.inputs, [*keras.tree.flatten(model.outputs), *tensors]), ""


# ── PyTorch ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _tensors(torch: Any, found: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors of nested dicts with their paths."""
    if isinstance(found, Mapping):
        for name, value in found.items():
            yield from _tensors(torch, value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(found, torch.Tensor):
        yield prefix, found


def _by_torch(net: Network, path: str, inputs: Inputs) -> Answers:
    """Run the recurrent module whose state dict is in a file."""
    torch = _package("torch", path)
    try:
        tensors = dict(_tensors(torch, torch.load(path, map_location="cpu", weights_only=True)))
    except Exception as error:  # such as UnpicklingError: the file holds more than weights
        said = _says("torch can't load it without running the file's own code", error)
        raise CannotRunError(f"{said}; {MODULE}") from None
    weights = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    weights = {f"{name}_l0" if re.search(r"_(ih|hh)$", name) else name: one for name, one in weights.items()}
    layers = [re.search(r"_l(\d+)(_reverse)?$", name) for name in weights]
    if len(weights) != len(tensors) or "weight_hh_l0" not in weights or len(inputs) != 1 or None in layers:
        modules = dict.fromkeys(name.rpartition(".")[0] or name for name in tensors)
        raise CannotRunError(
            f"a state dict doesn't say how its modules run (found {', '.join(modules)[:200]}): {MODULE}"
        )
    cell = net.cells[0].spec
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[cell.kind]
    flags = {"proj_size": cell.proj_size} if cell.kind == "lstm" else {}
    flags |= {"nonlinearity": cell.activation} if cell.kind == "rnn" else {}
    module = kind(
        weights["weight_ih_l0"].shape[1],
        cell.units,
        num_layers=1 + max(int(found[1]) for found in layers if found is not None),
        bias="bias_ih_l0" in weights,
        bidirectional="weight_hh_l0_reverse" in weights,
        batch_first=True,
        dtype=getattr(torch, net.dtype.name),
        **flags,
    )
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise CannotRunError(_says(f"torch.nn.{kind.__name__} doesn't take the file's weights", error)) from None
    (x,) = inputs.values()
    with torch.no_grad():
        y, after = module(torch.from_numpy(np.array(x)))
    arrays = [array.numpy() for array in (after if isinstance(after, tuple) else (after,))]  # each [layers, B, H]
    states = {
        f"cell {number} {name}": array[number]
        for number in range(len(arrays[0]))
        for name, array in zip("hc", arrays, strict=False)
    }
    return Answers("torch", str(torch.__version__), {net.outputs[0]: y.numpy()}, states)


# ── C ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _by_compiler(net: Network, path: str, inputs: Inputs) -> Answers:
    """Compile and run the C code that `export_c` writes for the network, if the file is identical to it."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise CannotRunError(f"{path} needs a C compiler, cc or what CC names: install gcc or clang")
    name = PurePath(path).stem
    with tempfile.TemporaryDirectory() as folder:
        try:
            header, source = c.export(net, folder, name)
        except ValueError as error:
            raise CannotRunError(str(error)) from None
        for own, theirs in ((header, Path(path).with_suffix(".h")), (source, Path(path))):
            if not theirs.exists() or own.read_bytes() != theirs.read_bytes():
                raise CannotRunError(f"{theirs} isn't the file that export_c writes for this network")
        built = os.path.join(folder, "library.so")
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", built, str(source), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotRunError(f"{compiler}: {done.stderr.strip()[:300]}")
        version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True, check=False).stdout
        text = header.read_text(encoding="ascii")
        outputs, states = _in_c(ctypes.CDLL(built), name, text, net, next(iter(inputs.values())))
    return Answers(PurePath(compiler).name, version.strip(), outputs, states)


def _in_c(
    library: ctypes.CDLL, name: str, header: str, net: Network, x: Array
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Run each row, step by step unless the network takes whole sequences."""
    frames = np.ascontiguousarray(x.reshape(*x.shape[:2], -1), net.dtype)
    size = _number(r"RAM: +([\d,]+) bytes", header)
    y = np.empty((*frames.shape[:2], net.shapes[net.outputs[0]][-1] or 1), net.dtype)
    memory = np.zeros((len(frames), size // net.dtype.itemsize), net.dtype)

    def call(what: str, *arrays: Array) -> None:
        getattr(library, f"{name}_{what}")(*(array.ctypes.data_as(ctypes.c_void_p) for array in arrays))

    whole = len(net.shapes[net.outputs[0]]) == 2
    by_steps = hasattr(library, f"{name}_step")
    work = np.empty(0 if by_steps else frames.shape[1] * _number(r"_WORK\(steps\) .*\* (\d+)", header), net.dtype)
    for row, state in enumerate(memory):
        if not by_steps:
            out = y[row] if whole else y[row, -1]
            pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (state, frames[row], out, work)]
            getattr(library, f"{name}_run")(*pointers[:2], ctypes.c_size_t(frames.shape[1]), *pointers[2:])
            continue
        call("init", state)
        for t in range(frames.shape[1]):
            call("step", state, frames[row, t], y[row, t])
    sizes = [size for cell in net.cells for size in cell.spec.state_sizes.values()]
    blocks = np.split(memory, np.cumsum(sizes), axis=1)  # scratch comes last
    names = (f"cell {n} {array}" for n, cell in enumerate(net.cells) for array in cell.spec.state_sizes)
    return {net.outputs[0]: y if whole else y[:, -1]}, dict(zip(names, blocks, strict=False))


def _number(pattern: str, header: str) -> int:
    """Return a number in a header that we wrote."""
    found = re.search(pattern, header)
    assert found is not None
    return int(found[1].replace(",", ""))


def _by_nothing(net: Network, path: str, inputs: Inputs) -> Answers:
    """Refuse: the runtimes of such files are C++ libraries without a Python package."""
    raise CannotRunError(f"{path} is run by RTNeural or neural-amp-modeler, C++ libraries without a Python package")


RUNTIMES: dict[str, Callable[[Network, str, Inputs], Answers]] = {
    "onnxruntime": _by_onnxruntime,
    "keras": _by_keras,
    "torch": _by_torch,
    "the C compiler's program": _by_compiler,
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
