"""JSON of requests and answers."""

from __future__ import annotations

import json
import math
from typing import Any

from cellstack.serve.models import Model, ServeError


def parsed(text: bytes | str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ServeError: it isn't JSON.
    """
    try:
        return json.loads(text)
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
