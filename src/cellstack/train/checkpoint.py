"""Checkpoints: all that a training needs to go on as if it had never stopped, in a file that is whole or absent."""

from __future__ import annotations

import io
import os
import zipfile
from pickle import UnpicklingError
from typing import Any

import torch

from cellstack.formats.files import replacing
from cellstack.spec import FormatError

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
    """Write `state` to `path`: a process that dies meanwhile leaves the file that was there before, whole.

    Raises:
        OSError: it can't be written, as where the disk is full; the file that was there before stays.
    """
    buffer = io.BytesIO()  # not the file, as torch makes errors of its own of those of writing
    torch.save({"cellstack_checkpoint": VERSION, **state}, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save` wrote. Only tensors and plain values are read: nothing in the file is run.

    Raises:
        FormatError: the file is damaged, or no checkpoint of this version, or a part of one is missing or no such part.
        FileNotFoundError: there is no such file.
    """
    try:
        with zipfile.ZipFile(path) as parts:  # checks every byte, before torch unpickles any
            damaged = parts.testzip()
        if damaged is not None:
            raise FormatError(f"{path}: expected a checkpoint, found a file whose part {damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, UnpicklingError, EOFError, KeyError) as error:
        raise FormatError(
            f"{path}: expected a checkpoint, found a file that can't be read: {first_line(error)}"
        ) from None
    if not isinstance(state, dict) or state.get("cellstack_checkpoint") != VERSION:
        found = state.get("cellstack_checkpoint") if isinstance(state, dict) else None
        found = f"one of version {found}" if isinstance(found, int) else "something else"
        raise FormatError(f"{path}: expected a checkpoint of version {VERSION}, found {found}")
    for name, kind in KINDS.items():
        if not isinstance(state.get(name, ...), kind):
            found = type(state[name]).__name__ if name in state else "none"
            raise FormatError(f"{path}: expected a checkpoint whose {name} is whole, found {found}")
    return state


def first_line(error: BaseException) -> str:
    """Return what an error says, in a part of one line."""
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
