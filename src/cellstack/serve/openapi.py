"""The description of the HTTP API for `/openapi.json`."""

from __future__ import annotations

from typing import Any


def _answer(text: str, schema: dict[str, Any] | None = None, kind: str = "application/json") -> dict[str, Any]:
    return {"description": text, **({"content": {kind: {"schema": schema}}} if schema else {})}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _operation(text: str, *answers: tuple[int, dict[str, Any]], body: Any = None, query: str = "") -> dict[str, Any]:
    error = {"$ref": "#/components/responses/error"}
    found: dict[str, Any] = {"summary": text, "responses": {str(n): a for n, a in answers} | {"default": error}}
    if body is not None:
        found["requestBody"] = {"content": body}
    if query:
        found["parameters"] = [{"name": query, "in": "query", "schema": {"type": "string"}}]
    return found


def _path(name: str, **operations: dict[str, Any]) -> dict[str, Any]:
    where = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}] if name else []
    return {"parameters": where, **operations}


TEXT, COUNT, SECONDS, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}
BYTES = {"type": "string", "format": "binary"}
STATE = {"application/octet-stream": {"schema": BYTES}}
VALUES = {"description": "numbers as lists; an object by name where a network has several inputs or outputs"}
X = {"application/json": {"schema": _object(x=VALUES)}}
TENSOR = _object(name=TEXT, width={"type": ["integer", "null"]}, dtype=TEXT)
TENSORS = {"type": "array", "items": TENSOR}
SESSION = _object(session=TEXT, model=TEXT, version=COUNT, frames=COUNT)
MODEL = _object(
    name=TEXT,
    version=COUNT,
    inputs=TENSORS,
    outputs=TENSORS,
    sessions=COUNT,
    capacity=COUNT,
    streams=FLAG,
    why_not={"type": ["string", "null"]},
)
STATUS = _object(status=TEXT)

OPENAPI: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "cellstack serve", "version": "1"},
    "components": {
        "responses": {"error": _answer("an error", _object(error=TEXT))},
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
    },
    "security": [{}, {"token": []}],
    "paths": {
        "/health": _path("", get=_operation("Say that the process runs", (200, _answer("it runs", STATUS)))),
        "/ready": _path("", get=_operation("Say whether requests are taken", (200, _answer("they are", STATUS)))),
        "/models": _path(
            "", get=_operation("List the models", (200, _answer("the models", _object(models={"items": MODEL}))))
        ),
        "/models/{name}": _path("name", get=_operation("Describe a model", (200, _answer("the model", MODEL)))),
        "/models/{name}/run": _path(
            "name",
            post=_operation(
                "Run whole sequences, x [batch][step][width]", (200, _answer("outputs", _object(y=VALUES))), body=X
            ),
        ),
        "/models/{name}/sessions": _path(
            "name",
            post=_operation(
                "Open a session, from a state if the body has one",
                (201, _answer("the session", SESSION)),
                body=STATE,
                query="token",
            ),
        ),
        "/sessions/{token}": _path(
            "token",
            get=_operation("Describe a session", (200, _answer("the session", SESSION))),
            delete=_operation("Close a session", (204, _answer("it is closed"))),
        ),
        "/sessions/{token}/step": _path(
            "token",
            post=_operation(
                "Step a session once", (200, _answer("its output", _object(frame=COUNT, y=VALUES))), body=X
            ),
        ),
        "/sessions/{token}/steps": _path(
            "token",
            post=_operation(
                "Step a session several times, x [step][width]",
                (200, _answer("its outputs", _object(frame=COUNT, y=VALUES))),
                body=X,
            ),
        ),
        "/sessions/{token}/state": _path(
            "token",
            get=_operation("Return a session's state", (200, _answer("the state", BYTES, "application/octet-stream"))),
        ),
        "/sessions/{token}/trace": _path(
            "token",
            get=_operation(
                "Return the trace of a session's last steps as a page",
                (200, _answer("the page", TEXT, "text/html")),
                (202, _answer("no step is recorded yet; steps are recorded from now on", _object(error=TEXT))),
                query="steps",
            ),
        ),
        "/metrics": _path(
            "", get=_operation("Return metrics for Prometheus", (200, _answer("the metrics", TEXT, "text/plain")))
        ),
    },
}
