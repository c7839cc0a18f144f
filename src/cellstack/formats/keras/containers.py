"""Writes the containers of Keras's files: the zip of `.keras`, and the HDF5 of whole models."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

from cellstack.formats.keras.config import layer_of, numbered
from cellstack.formats.keras.files import MEMBERS, NOTE, import_h5py
from cellstack.formats.keras.layers import slots
from cellstack.formats.keras.node_layers import OPERATIONS, entry_of
from cellstack.nodes.base import Array

VERSION = "3.10.0"  # the version that files are written for; it decides which hard_sigmoid is meant
Entry = tuple[str, str, dict[str, Any], list[Array]]  # a layer's class, name, settings and weights


def _named(entries: list[Entry]) -> Iterator[tuple[str, str, list[tuple[str, str, Array]]]]:
    """Yield each layer's name, its path, and the path, the name and the array of each of its weights."""
    entries = [entry for entry in entries if entry[0] not in OPERATIONS]
    for (kind, name, settings, arrays), place in zip(entries, numbered([entry[0] for entry in entries]), strict=True):
        found = slots(layer_of("save", entry_of(kind, name, settings), 0), 3)
        pairs = zip(found, arrays, strict=True)
        yield name, place, [(slot.path, slot.leaf, array) for slot, array in pairs]


def _hdf5(fill: Callable[[Any], None]) -> bytes:
    image = io.BytesIO()
    with import_h5py().File(image, "w") as file:
        fill(file)
    return image.getvalue()


def zipped(config: dict[str, Any], entries: list[Entry], metadata: dict[str, Any]) -> bytes:
    """Return a `.keras` file, uncompressed and with a fixed date, so that equal networks give equal files."""

    def fill(file: Any) -> None:
        for name, place, weights in _named(entries):
            file.create_group(f"layers/{place}/vars").attrs["name"] = name
            for path, _, array in weights:
                file.create_dataset(f"layers/{place}/{path}", data=array)
        file.create_group("vars").attrs["name"] = "cellstack"

    about = {"keras_version": VERSION, "date_saved": "", **({NOTE: metadata} if metadata else {})}
    contents = {
        MEMBERS["metadata"]: json.dumps(about).encode(),
        MEMBERS["config"]: json.dumps(config).encode(),
        MEMBERS["weights"]: _hdf5(fill),
    }
    image = io.BytesIO()
    with zipfile.ZipFile(image, "w", zipfile.ZIP_STORED) as archive:
        for name, content in contents.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return image.getvalue()


def hdf5_model(config: dict[str, Any], entries: list[Entry], metadata: dict[str, Any]) -> bytes:
    """Return the HDF5 of a whole model, its weights listed layer by layer."""

    def fill(file: Any) -> None:
        group = file.create_group("model_weights")
        for at in (file, group):
            at.attrs["keras_version"], at.attrs["backend"] = VERSION, "numpy"
        layers = [_older(layer) for layer in config["config"]["layers"]]
        file.attrs["model_config"] = json.dumps({**_older(config), "config": {**config["config"], "layers": layers}})
        if metadata:
            file.attrs[NOTE] = json.dumps(metadata)
        group.attrs["layer_names"] = [entry[1].encode() for entry in entries]
        for name, _, weights in _named(entries):
            own, names = group.create_group(name), []
            for path, leaf, array in weights:
                names.append(f"{name}/{path.rsplit('vars/', 1)[0]}{leaf}".encode())
                own.create_dataset(names[-1], data=array)
            own.attrs["weight_names"] = names
        group.create_group("top_level_model_weights").attrs["weight_names"] = []

    return _hdf5(fill)


def _older(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a description in HDF5's form, which names classes without their modules."""
    return {key: value for key, value in entry.items() if key not in ("module", "registered_name")}
