"""The binary messages of a connection with many sessions, as bytes and as records; shared with clients."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cellstack.serve.rows import Records

VERSION = 1
FRAMES, ANSWERS, REFUSED = 0, 1, 2  # kinds of messages
HEADER = struct.Struct("<BBHI")  # version, kind, number of the model in the connection, number of records
HEAD = 8  # bytes of a record before its row
REFUSAL = np.dtype([("number", "<u4"), ("frame", "<u4"), ("length", "<u4")])  # of the reason, in bytes of UTF-8


def numbered(row: DTypeLike) -> np.dtype:
    """Return the dtype of a record that also names its session and its frame.

    Args:
        row: `Rows.inputs` or `Rows.outputs`.
    """
    return np.dtype([("number", "<u4"), ("frame", "<u4"), ("row", row)])


def heads(records: Records) -> NDArray[np.uint8]:
    """Return the bytes of the numbers of sessions and frames, `[n, 8]`: a view."""
    return records.view(np.uint8).reshape(len(records), -1)[:, :HEAD]


def pack(kind: int, model: int, records: NDArray[Any]) -> bytes:
    """Return the message with these records, or their bytes `[n, size]`."""
    return HEADER.pack(VERSION, kind, model, len(records)) + records.tobytes()


def header(message: bytes) -> tuple[int, int, int]:
    """Return a message's kind, model and number of records.

    Raises:
        ValueError: a message that is shorter than a header, or of another version.
    """
    if len(message) < HEADER.size:
        raise ValueError(f"expected a message of at least {HEADER.size} bytes, got {len(message)}")
    version, kind, model, count = HEADER.unpack_from(message)
    if version != VERSION:
        raise ValueError(f"expected a message of version {VERSION}, got version {version}")
    return kind, model, count


def unpack(message: bytes, record: np.dtype) -> Records:
    """Return the records of a message, without a copy.

    Raises:
        ValueError: a length that doesn't match the header's number of records.
    """
    count = header(message)[2]
    wanted = HEADER.size + count * record.itemsize
    if len(message) != wanted:
        raise ValueError(
            f"expected {wanted} bytes for {count} records of {record.itemsize} bytes, got {len(message)} bytes"
        )
    return np.frombuffer(message, record, count, HEADER.size)


def pack_refused(model: int, refused: Sequence[tuple[int, int, str]]) -> bytes:
    """Return the message that says why frames were refused: each one's session, number and reason."""
    reasons = [reason.encode() for _, _, reason in refused]
    records = np.array(
        [(number, frame, len(reason)) for (number, frame, _), reason in zip(refused, reasons, strict=True)], REFUSAL
    )
    return pack(REFUSED, model, records) + b"".join(reasons)
