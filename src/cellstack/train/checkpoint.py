"""Checkpoints: the complete state of a training in one file, from which it continues as if it had never stopped."""

from __future__ import annotations

import io
import os
import zipfile
from pickle import UnpicklingError
from typing import Any

import torch

from cellstack.cells.errors import FormatError
from cellstack.formats.files import replacing

VERSION = 2
KINDS: dict[str, type | tuple[type, ...]] = {
    "fingerprint": dict,
    "position": list,
    "epochs": int,
    "called_off": bool,
    "threads": int,
    "model": dict,
    "optimizer": dict,
    "schedule": dict,
    "best_weights": (dict, type(None)),
    "history": list,
    "best": (dict, type(None)),
    "records": list,
}


def save(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write `state` to `path` atomically: if the process dies meanwhile, the previous file is intact.

    Raises:
        OSError: the file can't be written, for example because the disk is full; the previous file is intact.
    """
    buffer = io.BytesIO()  # not the file: torch would replace an OSError by its own error
    torch.save({"cellstack_checkpoint": VERSION, **state}, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint. Only tensors and plain values are read: no code in the file is executed.

    Raises:
        FormatError: the file is damaged, isn't a checkpoint of this version, or lacks an entry or has one of a wrong
            type.
        FileNotFoundError: there is no such file.
    """
    try:
        with zipfile.ZipFile(path) as parts:  # checks every byte, before torch unpickles any
            damaged = parts.testzip()
        if damaged is not None:
            raise FormatError(f"{path}: the checkpoint is damaged, in its part {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, UnpicklingError, EOFError, KeyError) as error:
        raise FormatError(f"{path}: the file can't be read as a checkpoint: {first_line(error)}") from None
    if not isinstance(state, dict) or state.get("cellstack_checkpoint") != VERSION:
        found = state.get("cellstack_checkpoint") if isinstance(state, dict) else None
        found = f"version {found}" if isinstance(found, int) else "another kind of file"
        raise FormatError(f"{path}: expected a checkpoint of version {VERSION}, found {found}")
    for name, kind in KINDS.items():
        if not isinstance(state.get(name, ...), kind):
            found = f"has the type {type(state[name]).__name__}" if name in state else "is missing"
            raise FormatError(f"{path}: the checkpoint is damaged: its entry {name} {found}")
    return state


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 120 characters."""
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
