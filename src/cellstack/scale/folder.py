"""The output folder: which model and options it belongs to, what is complete, and the states of sequences.

Beside the outputs it has the folder `_cellstack`, with the manifest, and `states`. Readers of data sets skip names that
begin with an underscore. An output that exists is complete: files are written under another name and then renamed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from cellstack.formats.files import replacing
from cellstack.scale.reading import readable
from cellstack.train.checks import UsageError
from cellstack.train.locks import locked

KEY = b"cellstack"  # of the metadata of an output
VERSION = 1


class InputFile(NamedTuple):
    """An input file: its path, and its output's name below the output folder."""

    path: Path
    output: str

    @property
    def identity(self) -> dict[str, Any]:
        """What an output stores of its input, to notice if that has changed since."""
        found = self.path.stat()
        return {"source": self.path.name, "bytes": found.st_size, "modified_ns": found.st_mtime_ns}


class Folder(NamedTuple):
    """An output folder."""

    path: Path

    @property
    def records(self) -> Path:
        """The folder of what isn't output."""
        return self.path / "_cellstack"

    def output(self, name: str) -> Path:
        """Return the path of an output."""
        return self.path / name

    def state(self, name: str) -> Path:
        """Return the path of the states after the file with this output."""
        return self.records / "states" / name

    def remove_states_but(self, name: str) -> None:
        """Delete the states after other files of the same folder."""
        for path in self.state(name).parent.glob("*.parquet"):
            if path != self.state(name):
                path.unlink(missing_ok=True)

    def outputs(self) -> list[str]:
        """Return the names of complete outputs in order."""
        names = (path.relative_to(self.path) for path in self.path.rglob("*.parquet"))
        return sorted(name.as_posix() for name in names if name.parts[0] != self.records.name)

    def last_beside(self, name: str) -> str | None:
        """Return the name of the last complete output in the folder of an output; None if there is none."""
        names = (path.relative_to(self.path).as_posix() for path in self.output(name).parent.glob("*.parquet"))
        return max(names, default=None)

    @contextmanager
    def opened(self, manifest: Mapping[str, Any]) -> Iterator[None]:
        """Create the folder, or check that it belongs to the same model and options, and lock it for this process.

        Raises:
            UsageError: the folder belongs to another model or other options, has other content, or another process is
                writing to it.
        """
        self.records.mkdir(parents=True, exist_ok=True)
        path = self.records / "manifest.json"
        with locked(path, "another process"):
            new = {"version": VERSION, **manifest}
            others = [name for name in os.listdir(self.path) if name != self.records.name]
            if path.exists() and self.outputs():
                self._check(path, new)
            elif others and not path.exists():
                raise UsageError(
                    f"{self.path}: expected a new or empty folder, or an earlier output, found {others[0]}"
                )
            else:  # without outputs, options can still be changed
                with replacing(path) as file:
                    file.write(json.dumps(new, indent=2).encode())
            for draft in self.path.rglob(".cellstack-*.tmp"):  # of processes that were killed
                draft.unlink()
            yield

    def _check(self, path: Path, new: Mapping[str, Any]) -> None:
        try:
            before = json.loads(path.read_text())
            differs = next((name for name in new if before[name] != new[name]), None)
        except (ValueError, TypeError, KeyError):
            raise UsageError(f"{path}: expected the manifest of an earlier output, found other content") from None
        if differs == "model":
            was, now = (f"{one['name']} (SHA-256 {one['model'][:12]}…)" for one in (before, new))
            raise UsageError(
                f"{self.path}: it has the output of another model, {was}, not of {now}: name another folder (-o)"
            )
        if differs and differs != "name":
            raise UsageError(
                f"{self.path}: it has the output for {differs} {before[differs]!r}, not {new[differs]!r}: use the same "
                "options, or name another folder (-o)"
            )

    def check_unchanged(self, source: InputFile) -> None:
        """Raise `UsageError` if a file has changed since it was scored."""
        path = self.output(source.output)
        with readable(path):
            metadata = pq.read_schema(path).metadata or {}
        before, now = json.loads(metadata.get(KEY, b"{}")), source.identity
        if before != now:
            raise UsageError(
                f"{source.path}: it has changed since it was scored: delete {path} to score it again, and with "
                "`across_files='continue'` those of later files in its folder too"
            )

    def ids(self, name: str, id: str, carried: bool = False) -> list[Any]:
        """Return the distinct ids of an output; `carried`: of the states after it, which include earlier files'."""
        path = self.state(name) if carried else self.output(name)
        with readable(path):
            return pq.read_table(path, columns=[id])[id].unique().to_pylist()

    def rows(self, name: str) -> int:
        """Return the number of rows of an output."""
        path = self.output(name)
        with readable(path):
            return pq.read_metadata(path).num_rows
