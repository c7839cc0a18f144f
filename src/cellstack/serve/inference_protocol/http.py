"""The Open Inference Protocol over HTTP: the routes under /v2, with binary tensors and compression."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import zlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route

from cellstack.serve.inference_protocol import service as shared
from cellstack.serve.inference_protocol.service import Service, as_bool, request_of
from cellstack.serve.inference_protocol.tensors import (
    DATATYPES,
    Tensor,
    datatype_of,
    from_bytes,
    from_values,
    to_bytes,
    to_json,
)
from cellstack.serve.models import Model, Models, ServeError
from cellstack.serve.texts import LARGE, converted, headers_of, loads

JSON_BYTES = "inference-header-content-length"  # the header with the length of the JSON part, before compression
WINDOWS = {"gzip": 31, "deflate": 15}  # wbits of zlib
WORTH_COMPRESSING = 1024  # bytes
BODY_SECONDS = 60.0  # in which a request's body must arrive
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]

Endpoint = Callable[[Service, Request], Awaitable[Response]]


def routes(models: Models, authorized: Callable[[HTTPConnection], bool]) -> list[Route]:
    """Return the routes of the Open Inference Protocol.

    Args:
        models: the server's models.
        authorized: returns whether a request has a valid token; not called for /v2/health.
    """
    service = Service.of(models)

    def route(path: str, method: str, endpoint: Endpoint) -> Route:
        return Route(path, partial(_answered, service, authorized, method, endpoint), methods=METHODS)

    found = [
        route("/v2/health/live", "GET", _live),
        route("/v2/health/ready", "GET", _ready),
        route("/v2", "GET", _server),
        route("/v2/models/stats", "GET", _statistics),
        route("/v2/repository/index", "POST", _index),
    ]
    for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version:int}"):
        found += [
            route(path, "GET", _metadata),
            route(f"{path}/ready", "GET", _model_ready),
            route(f"{path}/config", "GET", _config),
            route(f"{path}/stats", "GET", _statistics),
            route(f"{path}/infer", "POST", _infer),
        ]
    return [*found, route("/v2/{rest:path}", "", _unknown)]


async def _answered(
    service: Service, authorized: Callable[[HTTPConnection], bool], method: str, endpoint: Endpoint, request: Request
) -> Response:
    """Answer a request, with errors as JSON, which clients of the protocol require."""
    try:
        if not request.url.path.startswith("/v2/health/") and not authorized(request):
            raise ServeError(401, "a valid token is required: Authorization: Bearer TOKEN")
        if method and request.method not in (method, "HEAD" if method == "GET" else method):
            raise ServeError(405, f"expected {method}, got {request.method}")
        return await endpoint(service, request)
    except ServeError as error:
        return _json({"error": str(error)}, error.status, headers_of(error))
    except ClientDisconnect:
        return Response(status_code=400)
    except Exception:
        logging.getLogger("cellstack.serve").exception("%s %s", request.method, request.url.path)
        return _json({"error": "internal error"}, 500)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content), status, headers, "application/json")


def _model(request: Request) -> tuple[str, str]:
    """Return the name and version in a path."""
    return request.path_params.get("name", ""), str(request.path_params.get("version", ""))


# ── descriptions ────────────────────────────────────────────────────────────────────────────────────────────────────


async def _live(service: Service, request: Request) -> Response:
    return Response()


async def _ready(service: Service, request: Request) -> Response:
    return Response(status_code=200 if service.ready else 400)


async def _model_ready(service: Service, request: Request) -> Response:
    return Response(status_code=200 if service.model_ready(*_model(request)) else 400)


async def _server(service: Service, request: Request) -> Response:
    return _json(service.server())


async def _metadata(service: Service, request: Request) -> Response:
    return _json(service.metadata(*_model(request)))


async def _config(service: Service, request: Request) -> Response:
    return _json(service.config(*_model(request)))


async def _statistics(service: Service, request: Request) -> Response:
    return _json(service.statistics(*_model(request)))


async def _index(service: Service, request: Request) -> Response:
    body = await body_of(request, service.models.limits.message)
    asked = _parsed(body) if body else {}
    return _json(service.index(as_bool("ready", asked.get("ready", False))))


async def _unknown(service: Service, request: Request) -> Response:
    raise ServeError(404, f"there is no {request.url.path:.200}")


# ── inference ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def _infer(service: Service, request: Request) -> Response:
    name, version = _model(request)
    service.models.model(name, version)
    body = await body_of(request, service.models.limits.message)
    length = request.headers.get(JSON_BYTES)
    if length is None:
        size = len(body)
    elif length.isascii() and length.isdigit() and len(length) < 20 and int(length) <= len(body):
        size = int(length)
    else:
        raise ServeError(400, f"{JSON_BYTES}: expected a number from 0 to {len(body)}, got {length:.40}")
    raw = length is not None and size == 0
    binary = memoryview(body)[size:]
    encodings = _accepted(request.headers.get("accept-encoding", ""))
    if raw:
        asked: dict[str, Any] = {}
        read = partial(_raw, binary)
    else:
        asked = await converted(size, _parsed, body[:size])
        read = partial(_request, asked, binary)
        if size >= LARGE:
            found = await asyncio.to_thread(read, service.models.model(name, version))

            def read(model: Model) -> shared.Request:
                return found

    response = await service.start(name, version, read, lambda response: response)
    count = sum(array.nbytes for array in response.outputs.values())
    return await converted(count, _response, response, asked, raw, encodings)


async def body_of(request: Request, limit: int) -> bytes:
    """Return a request's body, decompressed, of at most `limit` bytes.

    Raises:
        ServeError: a larger or incomplete body, or one that takes too long.
    """
    try:
        return await asyncio.wait_for(_received(request, limit), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ServeError(408, f"the body didn't arrive within {BODY_SECONDS:.0f} seconds") from None


async def _received(request: Request, limit: int) -> bytes:
    encoding = request.headers.get("content-encoding", "").lower()
    if encoding in ("", "identity"):
        unpack = None
    elif encoding in WINDOWS:
        unpack = zlib.decompressobj(WINDOWS[encoding])
    else:
        raise ServeError(501, f"unsupported compression type {encoding:.40}: expected gzip or deflate")
    too_long = ServeError(413, f"the body is larger than {limit} bytes")
    declared = request.headers.get("content-length", "0")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
        raise too_long
    body, received = bytearray(), 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > limit:
            raise too_long
        if unpack is not None and chunk:
            try:
                chunk = unpack.decompress(chunk, limit + 1 - len(body))
            except zlib.error as error:
                raise ServeError(400, f"the body isn't compressed by {encoding}: {error}") from None
            if unpack.unused_data:
                raise ServeError(400, f"the body continues after its {encoding} data")
        body += chunk
        if len(body) > limit:
            raise too_long
    if unpack is not None and not unpack.eof:
        raise ServeError(400, f"the {encoding} data are incomplete")
    return bytes(body)


def _accepted(header: str) -> str:
    """Return the first supported encoding in Accept-Encoding, or nothing."""
    for entry in header.lower().split(","):
        name, _, quality = entry.partition(";")
        if name.strip() in WINDOWS and quality.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000"):
            return name.strip()
    return ""


def _no_number(name: str) -> float:
    raise ValueError(f"{name} isn't JSON")


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        found = loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ServeError(400, f"failed to parse the request JSON: {error!s:.200}") from None
    if not isinstance(found, dict):
        raise ServeError(400, f"expected a JSON object, got {type(found).__name__}")
    return found


def _of(found: dict[str, Any], key: str, kind: type, where: str = "") -> Any:
    """Return an entry of a JSON object, by default an empty one."""
    value = found.get(key, kind())
    if not isinstance(value, kind):
        raise ServeError(400, f"{where}{key}: expected {_KINDS[kind]}, got {value!r:.80}")
    return value


_KINDS = {dict: "an object", list: "a list", str: "text"}


def _named(found: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the parameters of an input or output."""
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise ServeError(400, f"{where}: expected objects with a name, got {found!r:.80}")
    parameters = _of(found, "parameters", dict, f"{found['name']:.100}: ")
    for key in ("shared_memory_region", "classification"):
        if key in parameters:
            raise ServeError(400, f"{found['name']:.100}: {key} isn't supported")
    return found["name"], parameters


def _request(asked: dict[str, Any], binary: memoryview, model: Model) -> shared.Request:
    _of(asked, "id", str)
    parameters = _of(asked, "parameters", dict)
    if reserved := [key for key in parameters if key.startswith("triton_")]:
        raise ServeError(400, f"parameter keys that begin with 'triton_' are reserved: {reserved[0]:.100}")
    inputs: dict[str, Tensor] = {}
    at = 0
    for found in _of(asked, "inputs", list):
        name, of = _named(found, "inputs")
        shown = f"{name:.100}"
        if name in inputs:
            raise ServeError(400, f"{shown} is given twice")
        datatype, shape = found.get("datatype"), found.get("shape")
        if "binary_data_size" in of:
            size = of["binary_data_size"]
            if type(size) is not int or size < 0 or size > len(binary) - at:
                raise ServeError(
                    400, f"{shown}: expected binary_data_size from 0 to {len(binary) - at}, got {size!r:.40}"
                )
            if "data" in found:
                raise ServeError(400, f"{shown}: expected data or binary_data_size, got both")
            inputs[name] = from_bytes(shown, datatype, shape, binary[at : at + size])
            at += size
        else:
            inputs[name] = from_values(shown, datatype, shape, found.get("data"))
    if at != len(binary):
        raise ServeError(400, f"unexpected additional input data for model '{model.name}': {len(binary) - at} bytes")
    outputs = tuple(_named(found, "outputs")[0] for found in _of(asked, "outputs", list))
    for found in asked.get("outputs", ()):
        as_bool("binary_data", found.get("parameters", {}).get("binary_data", False))
    as_bool("binary_data_output", parameters.get("binary_data_output", False))
    return request_of(inputs, outputs, parameters)


def _raw(binary: memoryview, model: Model) -> shared.Request:
    """Return a request without JSON: the values of the only input, one sequence."""
    network = model.network
    if len(network.inputs) != 1:
        raise ServeError(400, f"raw binary requests need a model with one input, got {', '.join(network.inputs)}")
    name = network.inputs[0]
    ids, sizes = name in network.graph.ids, network.shapes[name]
    datatype = "INT64" if ids else {4: "FP32", 8: "FP64"}[network.dtype.itemsize]
    step = DATATYPES[datatype].itemsize * (1 if ids else sizes[-1] or 1)
    shape = [1, len(binary) // step] if ids else [1, *([len(binary) // step] * (len(sizes) - 1)), sizes[-1] or 1]
    return shared.Request({name: from_bytes(name, datatype, shape, binary)})


def _response(response: shared.Response, asked: dict[str, Any], raw: bool, encoding: str) -> Response:
    everything = raw or asked.get("parameters", {}).get("binary_data_output", False)
    binary = {of["name"]: of.get("parameters", {}).get("binary_data", everything) for of in asked.get("outputs", ())}
    outputs, parts = [], []
    for name, array in response.outputs.items():
        output = json.dumps({"name": name, "datatype": datatype_of(array.dtype), "shape": list(array.shape)})[:-1]
        if binary.get(name, everything):
            parts.append(to_bytes(array))
            outputs.append(f'{output}, "parameters": {{"binary_data_size": {len(parts[-1])}}}}}')
        else:
            outputs.append(f'{output}, "data": {to_json(name, array)}}}')
    answer = {"id": asked["id"]} if "id" in asked else {}
    answer |= {"model_name": response.model.name, "model_version": str(response.model.version)}
    head = f'{json.dumps(answer)[:-1]}, "outputs": [{", ".join(outputs)}]}}'.encode()
    body, headers, kind = head, {}, "application/json"
    if parts:
        body, headers, kind = b"".join([head, *parts]), {JSON_BYTES: str(len(head))}, "application/octet-stream"
    if encoding and len(body) >= WORTH_COMPRESSING:
        body = gzip.compress(body, 1) if encoding == "gzip" else zlib.compress(body, 1)
        headers["content-encoding"] = encoding
    return Response(body, headers=headers, media_type=kind)
