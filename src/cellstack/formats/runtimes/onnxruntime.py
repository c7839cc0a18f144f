"""ONNX files, run by ONNX Runtime."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from cellstack.cells.errors import FormatError
from cellstack.formats import onnx
from cellstack.formats.onnx.writer import state_names
from cellstack.formats.runtimes.answers import Answers, CannotRunError, Inputs, OtherSizesError, package, says
from cellstack.formats.runtimes.axes import parted
from cellstack.network import Network
from cellstack.network.layouts import Layout, rearranged
from cellstack.nodes import Bidirectional, Recurrent
from cellstack.nodes.base import Array

ONNX_TYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}


def run(net: Network, path: str, inputs: Inputs) -> Answers:
    """Run a model; its inputs that aren't inputs of the network are lengths, or states, which start at zero."""
    ort = package("onnxruntime", path)
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
        raise CannotRunError(says(f"onnxruntime {ort.__version__} can't run it", error)) from None
    batch = len(next(iter(inputs.values())))
    names = ends["outputs"] or dict.fromkeys(list(found)[: len(net.outputs)], "")
    if len(names) != len(net.outputs) or not names.keys() <= found.keys():
        raise CannotRunError(f"expected the outputs {', '.join(net.outputs)}, found {', '.join(found)}")
    outputs = {
        ours: Layout.of(names[name]).to_network(found[name], batch)
        for ours, name in zip(net.outputs, names, strict=True)
    }
    states: dict[str, Array] = {}
    for name, refs in ends["states"].items():
        cells = [ends["firsts"][node] + way for node, way, _ in refs]
        parts = parted(found[name], ends["state_axes"][name])
        states |= {f"cell {cell} {ref[2]}": part for cell, ref, part in zip(cells, refs, parts, strict=True)}
    for name, (number, part) in ends.get("memories", {}).items():  # in a state, the memories follow the cells
        states[f"cell {len(net.cells) + number} {part}"] = found[name]
    if not ends["outputs"]:  # our writer may write what our reader can't read, such as masks
        states = {name: found[after] for name, after in state_names(net).items() if after in found}
    return Answers("onnxruntime", ort.__version__, outputs, states, note=ends["note"])


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
        return {"inputs": {}, "outputs": {}, "states": {}, "note": ""}
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
        "memories": noted.get("memories", {}),
        "frames": noted.get("frames"),
        "given": noted.get("given", {}),
        "note": rearranged(read) if onnx.others(read) else "",
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
            if axes:
                sizes = [axis if isinstance(axis, int) else None for axis in entry.shape]
                array = Layout(axes, tuple(sizes)).from_network(array)
            fed[entry.name] = np.ascontiguousarray(array, dtype)
        elif dtype in ("float32", "float64"):
            fed[entry.name] = np.zeros([axis if isinstance(axis, int) else len(first) for axis in entry.shape], dtype)
        elif dtype is not None and len(entry.shape) == 1 and first.ndim > 1:
            fed[entry.name] = np.full(len(first), first.shape[1], dtype)
        else:
            raise CannotRunError(f"expected {', '.join(given)}, states and lengths, found {entry.name} ({entry.type})")
    return {name: axes for name, (_, axes) in given.items() if name in fed}, fed
