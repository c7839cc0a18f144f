"""Sessions that continue after a restart: they are stored when the server stops, and restored when it starts again."""

from __future__ import annotations

import os
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from cellstack import FormatError
from cellstack.formats.files import replacing
from cellstack.serve.models import Model, ServeError, Session


class Store:
    """A durable folder, which one server uses at a time. It has a file for each version of a model with sessions.

    Args:
        folder: is created if it doesn't exist.

    Raises:
        ServeError: another server uses the folder.
        OSError: it can't be created.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import fcntl
        except ImportError:
            raise ServeError(503, "durable sessions need a system with file locks, such as Linux or macOS") from None
        self.folder = folder
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

    def path_of(self, model: Model) -> Path:
        """Return the file of a model's sessions."""
        return self.folder / f"{model.name}-{model.digest[:16]}.npz"

    def restore(self, model: Model) -> int:
        """Restore a model's sessions, delete their file, and return their number.

        Must be called before the model accepts frames.

        Raises:
            FormatError: the file is damaged.
            ServeError: more sessions are stored than the model may have, or its network has patches.
        """
        path = self.path_of(model)
        if model.rows is None or not path.exists():
            return 0
        dtype = np.dtype([("refused", "?"), ("row", model.rows.outputs)])
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as read:
                found = {name: read[name] for name in read.files}
            tokens, counts, stored_from = found["tokens"].tolist(), found["counts"], found["stored_from"]
            answers = found["answers"].view(dtype).reshape(len(tokens), -1)
            states = [
                [found[f"state {n} {k}"] for k in range(len(tuple(entry)))] for n, entry in enumerate(model.initial)
            ]
        except (ValueError, KeyError, EOFError, BadZipFile) as error:
            raise FormatError(f"{path}: {error}: move the file away to give up its sessions") from None
        numbers = []
        for n in range(len(tokens)):
            like = zip(model.initial, states, strict=True)
            try:
                numbers.append(model.pool.open(tuple(type(one)(*(a[n : n + 1] for a in own)) for one, own in like)))
            except RuntimeError:
                limit = f"more than {model.capacity} sessions, the limit"
                raise ServeError(503, f"{path} contains {limit}") from None
        model.worker.restored(np.array(numbers, np.int64) % model.capacity, counts, stored_from, answers)
        for token, number in zip(tokens, numbers, strict=True):
            session = model.sessions[token] = Session(token, model, number)
            session.accepted = session.processed
            session.touch()
        path.unlink()
        return len(tokens)

    def save(self, model: Model) -> None:
        """Store the sessions of a model that has stopped.

        Raises:
            OSError: the file can't be written.
        """
        if model.rows is None or not model.sessions:
            return
        numbers = np.array([session.number for session in model.sessions.values()], np.int64)
        slots = numbers % model.capacity
        counts, answers = model.worker.stored_answers(slots)
        arrays = {
            "tokens": np.array(list(model.sessions)),
            "counts": counts,
            "stored_from": model.worker.all_stored_from(slots),
            "answers": np.ascontiguousarray(answers).view(np.uint8),
        }
        for n, entry in enumerate(model.pool.state(numbers)):
            arrays |= {f"state {n} {k}": array for k, array in enumerate(entry)}
        with replacing(self.path_of(model)) as file:
            np.savez(file, **arrays)

    def close(self) -> None:
        """Let other servers use the folder."""
        self._lock.close()
