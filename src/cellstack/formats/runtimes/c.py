"""C files, compiled and run, if each equals the one that `export_c` writes."""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path, PurePath

import numpy as np

from cellstack.formats import c
from cellstack.formats.runtimes.answers import Answers, CannotRunError, Inputs
from cellstack.network import Network
from cellstack.nodes.base import Array


def run(net: Network, path: str, inputs: Inputs) -> Answers:
    """Compile and run the C code that `export_c` writes for the network, if the file is identical to it."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise CannotRunError(f"{path} needs a C compiler, cc or what CC names: install gcc or clang")
    name = PurePath(path).stem
    with tempfile.TemporaryDirectory() as folder:
        try:
            header, source = c.export(net, folder, name, weights_of(path))
        except (TypeError, ValueError) as error:
            raise CannotRunError(str(error)) from None
        for own, theirs in ((header, Path(path).with_suffix(".h")), (source, Path(path))):
            if not theirs.exists() or own.read_bytes() != theirs.read_bytes():
                raise CannotRunError(f"{theirs} isn't the file that export_c writes for this network")
        built = os.path.join(folder, "library.so")
        command = [
            compiler,
            "-std=c99",
            "-O2",
            "-ffp-contract=off",
            "-shared",
            "-fPIC",
            "-o",
            built,
            str(source),
            "-lm",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotRunError(f"{compiler}: {done.stderr.strip()[:300]}")
        version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True, check=False).stdout
        text = header.read_text(encoding="ascii")
        outputs, states = _in_c(ctypes.CDLL(built), name, text, net, next(iter(inputs.values())))
    return Answers(PurePath(compiler).name, version.strip(), outputs, states)


def weights_of(path: str) -> str:
    """Return the number format of the matrices in a C file, which its header states."""
    header = Path(path).with_suffix(".h")
    return c.format_in(header.read_text(encoding="utf-8", errors="replace")) if header.exists() else "float32"


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
    shapes = {f"cell {n} {name}": s for n, one in enumerate(net.stateful) for name, s in one.state_shapes.items()}
    blocks = np.split(memory, np.cumsum([math.prod(shape) for shape in shapes.values()]), axis=1)  # scratch comes last
    states = {name: block.reshape(-1, *shapes[name]) for name, block in zip(shapes, blocks, strict=False)}
    return {net.outputs[0]: y if whole else y[:, -1]}, states


def _number(pattern: str, header: str) -> int:
    """Return a number in a header that we wrote."""
    found = re.search(pattern, header)
    assert found is not None
    return int(found[1].replace(",", ""))
