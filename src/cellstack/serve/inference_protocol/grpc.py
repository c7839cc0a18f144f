"""The Open Inference Protocol over gRPC, with streams of requests."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

from cellstack.serve.clients import NEW_SECONDS
from cellstack.serve.http import HEAD_SECONDS
from cellstack.serve.inference_protocol import service as shared
from cellstack.serve.inference_protocol.service import Service, as_bool, request_of
from cellstack.serve.inference_protocol.tensors import Tensor, datatype_of, from_bytes, from_values, to_bytes
from cellstack.serve.models import Model, Models, ServeError

try:
    import grpc
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    from google.protobuf.message import DecodeError
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the Open Inference Protocol over gRPC needs {error.name}: pip install 'cellstack[grpc]'", name=error.name
    ) from None

# Messages in the default pool would clash with those of clients in the same process, which have the same names.
_POOL = descriptor_pool.DescriptorPool()
for _file in descriptor_pb2.FileDescriptorSet.FromString(
    Path(__file__).with_name("inference_protocol.binpb").read_bytes()
).file:
    _POOL.Add(_file)
SERVICE = _POOL.FindServiceByName("inference.GRPCInferenceService")


def message(name: str) -> Any:
    """Return the class of a message of `inference_protocol.proto`."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"inference.{name}"))


InferRequest, InferResponse = message("ModelInferRequest"), message("ModelInferResponse")
StreamResponse = message("ModelStreamInferResponse")

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
WITHOUT_TOKEN = ("ServerLive", "ServerReady")
STREAMED = 256  # requests of a stream that are read before their answers are sent
LONGEST_ERROR = 1000  # characters: errors over gRPC are sent as headers, which are limited
CONTENTS = {
    "BOOL": "bool_contents",
    **{f"INT{bits}": "int_contents" for bits in (8, 16, 32)},
    **{f"UINT{bits}": "uint_contents" for bits in (8, 16, 32)},
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


def bound(
    models: Models,
    host: str,
    port: int,
    tokens: Collection[str] = (),
    credentials: grpc.ServerCredentials | None = None,
    reuse_port: bool = False,
) -> grpc.aio.Server:
    """Return a server of the Open Inference Protocol over gRPC that listens, but answers only after its `start()`.

    Args:
        models: the server's models.
        host: the address to listen on.
        port: the port.
        tokens: one of them is required in the metadata of each call, as `authorization: Bearer TOKEN`; none: no token
            is required. ServerLive and ServerReady need none.
        credentials: for TLS, from `grpc.ssl_server_credentials`; None: no TLS.
        reuse_port: allow several servers on the port, among which the system divides the connections.

    Returns:
        The server, of the running event loop: `await server.start()`, and `await server.stop(seconds)` ends it.

    Raises:
        OSError: the port can't be used.
    """
    known = [f"Bearer {token}".encode() for token in tokens]
    server = grpc.aio.server(
        interceptors=[_Guard(known)] if known else [],
        options=[
            ("grpc.max_receive_message_length", models.limits.message),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", int(reuse_port)),
            # Clients that check idle connections once per second aren't disconnected.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
            # As gRPC has no limit on connections, those without a call end; a client connects anew with its next call.
            ("grpc.server_handshake_timeout_ms", int(HEAD_SECONDS * 1000)),
            ("grpc.max_connection_idle_ms", int(NEW_SECONDS * 1000)),
        ],
    )
    service = Service.of(models)
    handlers = {method.name: _handler(service, method) for method in SERVICE.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if credentials is None:
            server.add_insecure_port(address)
        else:
            server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise OSError(f"gRPC can't listen on {address}: {error}") from None
    return server


class _Guard(grpc.aio.ServerInterceptor):
    """Refuses calls without a valid token, before their messages are read."""

    def __init__(self, known: list[bytes]) -> None:
        self.known = known
        self.refusal = grpc.stream_stream_rpc_method_handler(self.refuse)

    async def intercept_service(self, continuation: Callable[..., Awaitable[Any]], handler_call_details: Any) -> Any:
        """Return the handler of a call."""
        if handler_call_details.method.rpartition("/")[2] in WITHOUT_TOKEN:
            return await continuation(handler_call_details)
        metadata = handler_call_details.invocation_metadata or ()
        given = "".join(str(value) for key, value in metadata if key == "authorization")
        if any(hmac.compare_digest(given.encode(), token) for token in self.known):
            return await continuation(handler_call_details)
        return self.refusal

    async def refuse(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        """Answer a call without a valid token."""
        text = "a valid token is required in the metadata: authorization: Bearer TOKEN"
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, text)


def _handler(service: Service, method: Any) -> grpc.RpcMethodHandler:
    answer = message(method.output_type.name)
    messages = {
        "request_deserializer": partial(_parsed, message(method.input_type.name)),
        "response_serializer": answer.SerializeToString,
    }
    if method.name == "ModelStreamInfer":
        return grpc.stream_stream_rpc_method_handler(partial(_stream, service), **messages)
    if method.name == "ModelInfer":
        return grpc.unary_unary_rpc_method_handler(partial(_answered, partial(_infer, service)), **messages)
    describe = DESCRIPTIONS[method.name]

    async def described(request: Any) -> Any:
        return answer(**describe(service, request))

    return grpc.unary_unary_rpc_method_handler(partial(_answered, described), **messages)


def _parsed(kind: Any, data: bytes) -> Any:
    """Return a request, or the error if it is malformed: gRPC would answer an exception with UNKNOWN."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return ServeError(400, f"malformed request: expected an inference.{kind.DESCRIPTOR.name}")


DESCRIPTIONS: dict[str, Callable[[Service, Any], dict[str, Any]]] = {
    "ServerLive": lambda service, request: {"live": True},
    "ServerReady": lambda service, request: {"ready": service.ready},
    "ServerMetadata": lambda service, request: service.server(),
    "ModelReady": lambda service, request: {"ready": service.model_ready(request.name, request.version)},
    "ModelMetadata": lambda service, request: service.metadata(request.name, request.version),
    "ModelConfig": lambda service, request: {"config": service.config(request.name, request.version)},
    "ModelStatistics": lambda service, request: service.statistics(request.name, request.version),
    "RepositoryIndex": lambda service, request: {"models": service.index(request.ready)},
}


async def _answered(answer: Callable[[Any], Awaitable[Any]], request: Any, context: grpc.aio.ServicerContext) -> Any:
    try:
        if isinstance(request, ServeError):
            raise request
        return await answer(request)
    except ServeError as error:
        found = error
    except Exception as error:
        found = _internal(error)
    return await context.abort(CODES.get(found.status, grpc.StatusCode.INTERNAL), str(found)[:LONGEST_ERROR])


def _internal(error: Exception) -> ServeError:
    logging.getLogger("cellstack.serve").error("gRPC", exc_info=error)
    return ServeError(500, "internal error")


# ── inference ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _started(service: Service, request: Any) -> asyncio.Task[Any]:
    return service.start(request.model_name, request.model_version, partial(_read, request), partial(_write, request))


async def _infer(service: Service, request: Any) -> Any:
    # A client that cancels doesn't stop the step, which other requests of the sequence follow.
    return await asyncio.shield(_started(service, request))


async def _stream(
    service: Service, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext
) -> AsyncIterator[Any]:
    """Answer the requests of a stream in their order. A refused request doesn't end it.

    No more are read while `STREAMED` requests, or more bytes than the largest message, wait for their answers.
    """
    ends = any(key == "triton_grpc_error" and value == "true" for key, value in context.invocation_metadata() or ())
    pending: asyncio.Queue[tuple[Any, asyncio.Task[Any] | ServeError] | Exception | None] = asyncio.Queue()
    most, held, answered = service.models.limits.message, 0, asyncio.Event()

    async def read() -> None:
        nonlocal held
        try:
            async for found in requests:
                request = InferRequest() if isinstance(found, ServeError) else found
                held += request.ByteSize()
                pending.put_nowait((request, found if request is not found else _started(service, request)))
                while held > most or pending.qsize() >= STREAMED:
                    answered.clear()
                    await answered.wait()
            pending.put_nowait(None)
        except Exception as error:
            pending.put_nowait(error)

    async def end() -> None:
        await service.stopping.wait()
        reading.cancel()
        pending.put_nowait(None)

    reading, ending = asyncio.create_task(read()), asyncio.create_task(end())
    try:
        while (item := await pending.get()) is not None:
            if isinstance(item, Exception):
                raise item
            request, task = item
            try:
                if isinstance(task, ServeError):
                    raise task
                response = StreamResponse(infer_response=await asyncio.shield(task))
                response.infer_response.parameters["triton_final_response"].bool_param = True
            except Exception as error:
                found = error if isinstance(error, ServeError) else _internal(error)
                text = str(found)[:LONGEST_ERROR]
                if ends:
                    await context.abort(CODES.get(found.status, grpc.StatusCode.INTERNAL), text)
                response = StreamResponse(error_message=text, infer_response=InferResponse(id=request.id))
            yield response
            held -= request.ByteSize()
            answered.set()
    finally:
        reading.cancel()
        ending.cancel()


def _parameters(found: Any) -> dict[str, Any]:
    """Return a map of parameters as Python values, None where none is set."""
    return {key: getattr(value, value.WhichOneof("parameter_choice") or "", None) for key, value in found.items()}


def _read(request: Any, model: Model) -> shared.Request:
    parameters = _parameters(request.parameters)
    for key in parameters:
        if key.startswith("triton_") and key != "triton_enable_empty_final_response":
            raise ServeError(400, f"parameter keys that begin with 'triton_' are reserved: {key:.100}")
    as_bool("triton_enable_empty_final_response", parameters.get("triton_enable_empty_final_response", False))
    if "sequence_id" in parameters:
        kind = request.parameters["sequence_id"].WhichOneof("parameter_choice")
        if kind not in ("int64_param", "string_param"):
            raise ServeError(
                400, "invalid value type for 'sequence_id' parameter, expected int64_param or string_param."
            )
        if kind == "int64_param":  # ids from 2^63 are sent as negative numbers
            parameters["sequence_id"] %= 2**64
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise ServeError(400, f"expected {len(request.inputs)} raw_input_contents, one per input, got {len(raw)}")
    inputs: dict[str, Tensor] = {}
    for number, found in enumerate(request.inputs):
        name, shape = f"{found.name:.100}", list(found.shape)
        if found.name in inputs:
            raise ServeError(400, f"{name} is given twice")
        if "shared_memory_region" in found.parameters:
            raise ServeError(400, f"{name}: shared_memory_region isn't supported")
        if raw:
            if found.HasField("contents"):
                raise ServeError(
                    400,
                    f"contents field must not be specified when using raw_input_contents for '{name}' for model "
                    f"'{model.name}'",
                )
            inputs[found.name] = from_bytes(name, found.datatype, shape, raw[number])
        else:
            inputs[found.name] = _from_contents(name, found, shape)
    for found in request.outputs:
        for key in ("shared_memory_region", "classification"):
            if key in found.parameters:
                raise ServeError(400, f"{found.name:.100}: {key} isn't supported")
    return request_of(inputs, tuple(found.name for found in request.outputs), parameters)


def _from_contents(name: str, found: Any, shape: list[int]) -> Tensor:
    field = CONTENTS.get(found.datatype)
    if field is None:
        return from_bytes(name, found.datatype, shape, b"")  # raises for an unknown datatype and for missing data
    others = [of.name for of, _ in found.contents.ListFields() if of.name != field]
    if others:
        raise ServeError(400, f"{name}: expected {field} for {found.datatype}, got {', '.join(others)}")
    return from_values(name, found.datatype, shape, list(getattr(found.contents, field)))


def _write(request: Any, response: shared.Response) -> Any:
    return InferResponse(
        model_name=response.model.name,
        model_version=str(response.model.version),
        id=request.id,
        outputs=[
            {"name": name, "datatype": datatype_of(array.dtype), "shape": array.shape}
            for name, array in response.outputs.items()
        ],
        raw_output_contents=[to_bytes(array) for array in response.outputs.values()],
    )
