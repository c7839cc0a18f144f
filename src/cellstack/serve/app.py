"""The HTTP API, and the application that uvicorn runs: routes, tokens, limits of requests, errors as JSON."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cellstack.serve.bodies import body_of
from cellstack.serve.clients import EXTENSION
from cellstack.serve.metrics import exposition
from cellstack.serve.models import Model, Models, ServeError
from cellstack.serve.multiplex_socket import Multiplex
from cellstack.serve.page import page
from cellstack.serve.sockets import Connections, Endpoint
from cellstack.serve.stream_socket import Stream
from cellstack.serve.texts import array_of, check_keys, converted, described, headers_of, parsed, text_of, text_of_array
from cellstack.serve.worker import StoppingError

if TYPE_CHECKING:
    from cellstack.serve.http import Http
    from cellstack.serve.websocket import WebSocket

try:
    from starlette.middleware.opentelemetry import OpenTelemetryMiddleware
except ImportError:  # OpenTelemetry is optional
    OpenTelemetryMiddleware = None

OPEN_PATHS = ("/", "/health", "/ready")  # without a token: the page has no data, and probes have no tokens

# Spans have the whole URL: requests with a secret in it get none, and frequent ones from probes neither.
UNTRACED = (r"/sessions/", r"[?&](access_)?token=", r"/(health|ready|metrics)$")

Authorized = Callable[[HTTPConnection], bool]


def application(
    models: Models,
    tokens: Collection[str] = (),
    allow_origins: Collection[str] = (),
    state: Any = None,
    allow_hosts: Collection[str] = (),
) -> Starlette:
    """Return the application.

    Args:
        models: what it serves.
        tokens: one of them is required in each request, as `Authorization: Bearer TOKEN` or, for WebSockets of
            browsers, in the query as `access_token`; none: no token is required.
        allow_origins: the origins, such as `https://example.org`, of pages that may also use the server.
        state: an object whose attribute `ready` says whether the server takes requests; None: it always does.
        allow_hosts: the names of the server in the header Host, without the port; none: any.
    """
    connections = Connections()
    known = [token.encode() for token in tokens]

    def authorized(connection: HTTPConnection) -> bool:
        if not known:
            return True
        kind, _, sent = connection.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            sent = connection.query_params.get("access_token", "")
        return max(hmac.compare_digest(sent.encode(), token) for token in known)  # of all, in constant time

    api = Api(models, state)
    routes = [
        Route("/", api.page),
        Route("/metrics", api.metrics),
        Route("/health", api.health),
        Route("/ready", api.ready),
        Route("/models", api.models_),
        Route("/models/{name}", api.model),
        Route("/models/{name}/run", api.run, methods=["POST"]),
        Route("/models/{name}/sessions", api.open, methods=["POST"]),
        Route("/sessions/{token}", api.session),
        Route("/sessions/{token}", api.close, methods=["DELETE"]),
        Route("/sessions/{token}/step", api.step, methods=["POST"]),
        Route("/sessions/{token}/steps", api.steps, methods=["POST"]),
        Route("/sessions/{token}/state", api.state),
        WebSocketRoute("/models/{name}/stream", Endpoint(Stream, models, connections)),
        WebSocketRoute("/multiplex", Endpoint(Multiplex, models, connections)),
    ]
    allowed = {"allow_origins": frozenset(allow_origins), "allow_hosts": frozenset(allow_hosts)}
    middleware = [Middleware(Guard, authorized=authorized, **allowed)]
    if allow_origins:
        cors = Middleware(CORSMiddleware, list(allow_origins), allow_methods=["*"], allow_headers=["*"])
        middleware.insert(0, cors)
    if OpenTelemetryMiddleware is not None:
        middleware.insert(0, Middleware(OpenTelemetryMiddleware, excluded_urls=UNTRACED))
    handlers: dict[Any, Any] = {
        ServeError: _serve_error,
        StoppingError: _stopping,
        HTTPException: _http_error,
        ClientDisconnect: _gone,
        Exception: _bug,
    }
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    app.state.connections = connections
    return app


def _error(status: int, message: str, **headers: str) -> JSONResponse:
    return JSONResponse({"error": message}, status, headers)


async def _serve_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    return _error(error.status, str(error), **headers_of(error))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = {404: f"no such path: {request.url.path}", 405: f"{request.method} isn't possible here"}
    return JSONResponse({"error": text.get(error.status_code, error.detail)}, error.status_code, error.headers)


async def _stopping(request: Request, error: Exception) -> Response:
    return _error(503, str(error))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody receives it


async def _bug(request: Request, error: Exception) -> Response:
    return _error(500, "internal error; the server's log has the details")


class Guard:
    """Refuses requests without a valid token, and those that pages of other origins make in a browser.

    A page can also give its own name the address of the server (DNS rebinding); then Host has that name.
    """

    def __init__(
        self, app: ASGIApp, authorized: Authorized, allow_origins: frozenset[str], allow_hosts: frozenset[str]
    ) -> None:
        self.app, self.authorized, self.allow_origins, self.allow_hosts = app, authorized, allow_origins, allow_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a refused request, or pass the request on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        client: Http | WebSocket | None = scope.get("extensions", {}).get(EXTENSION)
        origin, host = connection.headers.get("origin"), connection.headers.get("host")
        if host is not None and self.allow_hosts and name_of(host) not in self.allow_hosts:  # browsers always send it
            refusal = _error(403, f"the host {host[:100] or repr(host)} isn't allowed: see --allow-host")
        elif origin and origin not in self.allow_origins and urlsplit(origin).netloc != host:
            refusal = _error(403, f"the origin {origin} isn't allowed: see --allow-origin")
        elif not self.authorized(connection):
            if scope["path"] in OPEN_PATHS:
                await self.app(scope, receive, _closing(send))
                return
            refusal = _error(401, "a valid token is required: Authorization: Bearer TOKEN")
            refusal.headers["www-authenticate"] = "Bearer"
        elif client is not None and not client.clients.know(client.transport):
            refusal = _error(503, f"more than {client.clients.most} connections are open")
        else:
            await self.app(scope, receive, send)
            return
        await refusal(scope, receive, _closing(send))


def _closing(send: Send) -> Send:
    """Return a `send` with which the connection ends after the answer, as its client may not use the server."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
        await send(message)

    return sent


def name_of(host: str) -> str:
    """Return the name in a header Host, without the port."""
    name = host.lower()
    return name.partition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]


class Api:
    """The handlers of HTTP requests."""

    def __init__(self, models: Models, state: Any = None) -> None:
        self.models, self.state_of_server = models, state

    async def health(self, request: Request) -> Response:
        """Say that the process runs."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Say whether the server takes requests."""
        if self.state_of_server is not None and not self.state_of_server.ready:
            raise ServeError(503, "the server is starting or stopping")
        return JSONResponse({"status": "ready"})

    async def page(self, request: Request) -> Response:
        """Return the page on which the models are tried."""
        return HTMLResponse(page())

    async def metrics(self, request: Request) -> Response:
        """Return the metrics for Prometheus."""
        content_type, body = exposition(self.models, request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def models_(self, request: Request) -> Response:
        """List the models."""
        return JSONResponse({"models": [described(versions[-1]) for versions in self.models.versions.values()]})

    async def model(self, request: Request) -> Response:
        """Describe a model."""
        return JSONResponse(described(self._model(request)))

    async def run(self, request: Request) -> Response:
        """Run a network over whole sequences."""
        model = self._model(request)
        body = await self._body(request)

        def inputs() -> Any:
            x, names = _x(parsed(body)), model.network.inputs
            if not isinstance(x, dict):
                return _array("x", x)
            if x.keys() != set(names):
                raise ServeError(400, f"expected the inputs {', '.join(names)}, got {', '.join(x) or 'none'}")
            return {name: _array(name, x[name]) for name in x}

        try:
            y = await model.run(await converted(len(body), inputs))
        except (ValueError, TypeError) as error:
            raise ServeError(400, str(error)) from None

        def answer() -> str:
            if len(names) == 1:
                return f'{{"y": {text_of_array(y)}}}'
            parts = (f"{text_of(name)}: {text_of_array(of)}" for name, of in zip(names, y, strict=True))
            return f'{{"y": {{{", ".join(parts)}}}}}'

        names = model.network.outputs
        size = y.nbytes if len(names) == 1 else sum(of.nbytes for of in y)
        return Response(await converted(size, answer), media_type="application/json")

    async def open(self, request: Request) -> Response:
        """Open a session."""
        model = self._model(request)
        state = await self._body(request) or None
        token = request.query_params.get("token") or request.headers.get("token")
        if token is not None and (not 16 <= len(token) <= 128 or " " in token):
            raise ServeError(400, "expected a session's token of 16 to 128 characters without spaces")
        session = await model.open(state, token=token)
        about = {
            "session": session.token,
            "model": model.name,
            "version": model.version,
            "frames": session.accepted,
        }
        return JSONResponse(about, 201)

    async def session(self, request: Request) -> Response:
        """Describe a session."""
        session = self._session(request)
        idle = time.monotonic() - session.used if session.owner is None else 0.0
        model = session.model
        about = {
            "session": session.token,
            "model": model.name,
            "version": model.version,
            "frames": session.processed,
        }
        return JSONResponse({**about, "idle": round(max(idle, 0.0), 3)})

    async def close(self, request: Request) -> Response:
        """Close a session."""
        session = self._session(request)
        await session.model.close(session)
        return Response(status_code=204)

    async def step(self, request: Request) -> Response:
        """Step a session once."""
        session = self._session(request)
        frame, y, refused = await self._steps(session, await self._body(request), one=True)
        return _json({"frame": frame, "y": y[0]}) if not refused else _error(400, refused[0])

    async def steps(self, request: Request) -> Response:
        """Step a session by several frames."""
        session = self._session(request)
        frame, y, refused = await self._steps(session, await self._body(request), one=False)
        if len(refused) == len(y):
            return _error(400, "; ".join(f"step {n}: {why}" for n, why in list(refused.items())[:10]))
        said = {"refused": {str(n): why for n, why in refused.items()}} if refused else {}
        return _json({"frame": frame, "y": y, **said})

    async def state(self, request: Request) -> Response:
        """Return a session's state."""
        session = self._session(request)
        return Response(await session.model.state(session), media_type="application/octet-stream")

    async def _steps(self, session: Any, body: bytes, one: bool) -> tuple[int, list[Any], dict[int, str]]:
        """Step a session; return the last frame's number, the outputs, None where refused, and the reasons."""
        rows = session.model.rows

        def read() -> list[Any]:
            x, frames = _x(parsed(body)), []
            if one:
                x = [x]
            elif not isinstance(x, list) or not x:
                raise ServeError(400, "x: expected a list of one or more steps")
            try:
                for values in x:
                    frames.append(rows.parse(values))  # noqa: PERF401  (its length is the refused step's number)
            except ValueError as error:  # then no frame is stepped
                raise ServeError(400, f"step {len(frames)}: {error}" if len(x) > 1 else str(error)) from None
            return frames

        frames = await converted(len(body), read)
        if session.owner is not None:
            raise ServeError(409, "a WebSocket sends this session's frames; close it first")
        frame = session.accepted + len(frames)
        answers = await session.model.steps(session, np.concatenate(frames))
        y = [None if n in answers.refused else rows.plain(row) for n, row in enumerate(answers.rows)]
        return frame, y, answers.refused

    def _model(self, request: Request) -> Model:
        return self.models.model(request.path_params["name"], request.query_params.get("version"))

    def _session(self, request: Request) -> Any:
        return self.models.session(request.path_params["token"])

    async def _body(self, request: Request) -> bytes:
        return await body_of(request, self.models.limits.message)


def _x(body: Any) -> Any:
    if not isinstance(body, dict) or "x" not in body:
        raise ServeError(400, 'expected a JSON object with the key "x"')
    check_keys(body, "x")
    return body["x"]


def _array(name: str, values: Any) -> Any:
    try:
        array = array_of(values)
    except ValueError:
        raise ServeError(400, f"{name}: expected sequences of equal lengths and widths") from None
    if array.dtype.kind not in "iuf":
        raise ServeError(400, f"{name}: expected numbers")
    return array


def _json(value: Any) -> Response:
    return Response(text_of(value), media_type="application/json")
