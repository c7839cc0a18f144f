"""Sessions that survive the process: a snapshot of all of them, and a log of the frames since.

A frame is stored before it is stepped. After `kill -9` the next process reads the last snapshot and steps the frames of
the log again, so that every session has the same state, count and stored answers as before.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from cellstack.formats.files import digest_of, options_text
from cellstack.serve.generations import DamageError, numbers_of
from cellstack.serve.journal import OPTIONS, Journal
from cellstack.serve.models import Model, ServeError
from cellstack.serve.replay import Restored


class Store:
    """A durable folder, which one server uses at a time. It has a subfolder for each version of a model.

    Args:
        folder: is created if it doesn't exist.
        synced: whether each frame is flushed to the disk, so that it survives a power cut too.

    Raises:
        ServeError: another server uses the folder.
        OSError: it can't be created.
    """

    def __init__(self, folder: Path, synced: bool = False) -> None:
        try:
            import fcntl
        except ImportError:
            raise ServeError(503, "durable sessions need a system with file locks, such as Linux or macOS") from None
        self.folder, self.synced = folder, synced
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = open(folder / "lock", "a+")  # noqa: SIM115  (kept open while the folder is in use)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            process = self._lock.read(20).strip() or "unknown"
            self._lock.close()
            raise ServeError(
                409, f"{folder} is in use by another server (process {process}): stop it, or use another folder"
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    def stored_models(self) -> list[tuple[Path, dict[str, Any]]]:
        """Return the stored copies of model files of which there are stored sessions, oldest first, and their options.

        These are the model files of the last process, whose sessions need their version of the model, loaded with the
        same options.

        Raises:
            FormatError: a copy was changed, or is missing.
        """
        found: list[tuple[float, Path, dict[str, Any]]] = []
        for folder in self.folder.iterdir():
            if not folder.is_dir() or not numbers_of(folder, "snapshot"):
                continue
            paths = list((folder / "model").iterdir()) if (folder / "model").is_dir() else []
            options = json.loads((folder / OPTIONS).read_text()) if (folder / OPTIONS).is_file() else {}
            if len(paths) != 1 or digest_of(paths[0], options)[:16] != folder.name[-16:]:
                raise DamageError(
                    f"{folder / 'model'}: expected the unchanged model file of the sessions in {folder}: put it back, "
                    "or move the folder away to give up its sessions"
                )
            found.append((paths[0].stat().st_mtime, paths[0], options))
        return [(path, options) for _, path, options in sorted(found, key=lambda one: one[:2])]

    def restore(self, model: Model, path: Path | None = None) -> Restored | None:
        """Restore a model's sessions, and store them from now on. Must be called before the model accepts frames.

        Args:
            model: the model.
            path: its file, which is copied into the folder, so that the sessions survive when the file changes.

        Returns:
            what was found; None for a model without sessions.

        Raises:
            FormatError, ServeError, OSError: see `Journal.restore`.
        """
        if model.rows is None:
            return None
        folder = self.folder / f"{model.name}-{model.digest[:16]}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if path is not None and not (folder / "model").exists():
            _copy(path, folder, model)
        return Journal(folder, model, self.synced).restore()

    def close(self) -> None:
        """Let other servers use the folder. The models must have been stopped before."""
        self._lock.close()


def _copy(path: Path, folder: Path, model: Model) -> None:
    """Copy a model's file or folder to `folder/model/`, and its options."""
    new = folder / "model-new"
    if new.exists():  # of a process that was killed
        shutil.rmtree(new)
    new.mkdir()
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, new / path.name)
    if digest_of(new / path.name, model.options) != model.digest:
        shutil.rmtree(new)
        raise ServeError(503, f"{path} changed while it was loaded: load it again")
    if model.options:
        (folder / OPTIONS).write_text(options_text(model.options))
    new.rename(folder / "model")
