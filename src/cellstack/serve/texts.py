"""JSON of requests and answers.

Python runs one thread at a time, and C code such as json's isn't interrupted: the text of 16 MB would stop all other
clients for a second. So long texts and arrays are converted in another thread, and there in pieces.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cellstack.serve.models import Model, ServeError

LARGE = 64 << 10  # bytes that are converted in another thread
PIECE = 4096  # numbers that are converted at a time: less than a millisecond
T = TypeVar("T")


async def converted(size: int, function: Callable[..., T], *args: Any) -> T:
    """Return the result of a function that converts `size` bytes; if these are many, it is called in another thread."""
    return function(*args) if size < LARGE else await asyncio.to_thread(function, *args)


def loads(text: bytes | str, **options: Any) -> Any:
    """Return the value of a JSON text, see `json.loads`. In a long one, other threads can run after each number."""
    if len(text) >= LARGE:
        options |= {"parse_float": lambda number: float(number), "parse_int": lambda number: int(number)}
    return json.loads(text, object_pairs_hook=_object, **options)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)!r:.100} occurs more than once")
    return found


def check_keys(value: dict[str, Any], *known: str) -> None:
    """Raise `ServeError` if an object of a message has other keys than these."""
    if others := value.keys() - set(known):
        raise ServeError(400, f"expected no other keys than {', '.join(known)}, got {min(others)!r:.100}")


def array_of(values: Any) -> NDArray[Any]:
    """Return numbers or nested lists of numbers as an array, see `numpy.asarray`, in pieces.

    Raises:
        ValueError: lists of different lengths.
    """
    if not isinstance(values, list) or not values:
        return np.asarray(values)
    if len(values) > PIECE:
        return np.concatenate([array_of(values[n : n + PIECE]) for n in range(0, len(values), PIECE)])
    if isinstance(values[0], list) and len(values) * len(values[0]) > PIECE:
        return np.stack([array_of(one) for one in values])
    return np.asarray(values, object if _has_flags(values) else None)


def _has_flags(values: list[Any]) -> bool:
    """Return whether there are true or false among numbers, which NumPy would take as 1 and 0."""
    kinds = set(map(type, values))
    return bool in kinds or (list in kinds and any(_has_flags(one) for one in values if type(one) is list))


def text_of_array(array: NDArray[Any]) -> str:
    """Return an array as JSON in pieces, see `text_of`."""
    if array.size <= PIECE:
        return text_of(array.tolist())
    rows = PIECE * len(array) // array.size
    if rows == 0:
        parts = [text_of_array(one) for one in array]
    else:
        parts = [text_of(array[n : n + rows].tolist())[1:-1] for n in range(0, len(array), rows)]
    return f"[{', '.join(parts)}]"


def parsed(text: bytes | str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ServeError: it isn't JSON.
    """
    try:
        return loads(text)
    except (ValueError, RecursionError) as error:
        raise ServeError(400, f"expected JSON: {error}") from None


def headers_of(error: ServeError) -> dict[str, str]:
    """Return the headers of the answer to a refused request."""
    found = {} if error.retry is None else {"retry-after": str(error.retry)}
    if error.status in (408, 413):  # what the client continues to send after a refused body would be read and dropped
        found["connection"] = "close"
    return found


def text_of(value: Any) -> str:
    """Return a value as JSON; NaN and infinity, which JSON doesn't have, as null."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_without_nan(value))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def described(model: Model) -> dict[str, Any]:
    """Return the description of a model, for JSON."""
    graph, number = model.network.graph, model.network.dtype.name

    def tensor(name: str) -> dict[str, Any]:
        ids = name in graph.ids
        return {
            "name": name,
            "width": None if ids else model.network.shapes[name][-1],
            "dtype": "int64" if ids else number,
        }

    return {
        "name": model.name,
        "version": model.version,
        "inputs": [tensor(name) for name in model.network.inputs],
        "outputs": [tensor(name) for name in model.network.outputs],
        "sessions": len(model.sessions),
        "capacity": model.capacity,
        "streams": model.rows is not None,
        "why_not": model.why_not,
    }
