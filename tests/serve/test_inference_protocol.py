"""The Open Inference Protocol over HTTP and gRPC: sequences, tensors, bad input, other clients."""

import asyncio
import gzip
import itertools
import json
import random
import re
import shutil
import socket
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import uvicorn
from google.protobuf import descriptor_pb2
from google.protobuf.json_format import MessageToDict
from starlette.applications import Starlette

from cellstack import CellSpec, Network
from cellstack.nodes import Cell, Dense, Embedding, Recurrent
from cellstack.serve.inference_protocol import grpc as over_grpc
from cellstack.serve.inference_protocol import http as over_http
from cellstack.serve.inference_protocol.grpc import InferRequest, InferResponse, StreamResponse, bound, message
from cellstack.serve.inference_protocol.service import Request, Service
from cellstack.serve.inference_protocol.tensors import Tensor, as_exactly
from cellstack.serve.models import Limits, Models, ServeError
from cellstack.serve.server import listen

WIDTH, H = 3, 5
MESSAGE = 100_000  # bytes: the limit of the tests' server
PROTOCOL = Path(over_http.__file__).parent
IDS = itertools.count(1000)


def lstm(width=WIDTH, units=H, seed=0, **kwargs):
    new = np.random.default_rng(seed).standard_normal
    spec = CellSpec(width, units)
    return Recurrent((Cell(spec, *(new(shape).astype(np.float32) for shape in spec.shapes.values())),), **kwargs)


def networks():
    # INPUT + 1 at the first step and INPUT later, as in Triton's model of this name.
    spec = CellSpec(1, 2, kind="rnn", activation="linear", learn_initial_state=True)
    arrays = ([[1, 0]], [[0, 0], [1, 0]], [0, 0], [0, 1])
    first = Recurrent((Cell(spec, *(np.array(array, np.float32) for array in arrays)),))
    table = np.random.default_rng(3).standard_normal((7, WIDTH)).astype(np.float32)
    return {
        "lstm": Network([lstm()]),
        "last": Network([lstm(return_sequences=False)], outputs=["layer_0"]),
        "words": Network([Embedding(table), lstm()]),
        "whole": Network([lstm(go_backwards=True)]),
        "wide": Network([lstm(1, 512)]),
        "simple_sequence": Network(
            [first, Dense(np.array([[1], [0]], np.float32))],
            ["cell", "OUTPUT"],
            inputs=("INPUT",),
            wires=[("INPUT",), ("cell",)],
        ),
    }


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Served:
    """Both servers, with clients, on an event loop in a thread of its own."""

    def __init__(self, folder, limits, token=None):
        for name, network in networks().items():
            network.save(folder / f"{name}.safetensors")
        self.folder, self.models = folder, Models(limits)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        listening = listen("127.0.0.1", 0)
        self.http_port, self.grpc_port = listening.getsockname()[1], free_port()

        async def begin():
            for name in networks():
                self.add(name)
            tokens = (token,) if token else ()
            self.grpc = bound(self.models, "127.0.0.1", self.grpc_port, tokens)
            await self.grpc.start()
            wanted = f"Bearer {token}"
            routes = over_http.routes(
                self.models, lambda request: not token or request.headers.get("authorization") == wanted
            )
            config = uvicorn.Config(Starlette(routes=routes), log_level="critical", lifespan="off")
            self.uvicorn = uvicorn.Server(config)
            self.serving = asyncio.create_task(self.uvicorn._serve([listening]))
            while not self.uvicorn.started:
                await asyncio.sleep(0.005)

        self.do(begin())
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.http_port}/v2", timeout=60)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}")

    def do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def add(self, name):
        model = self.models.add(self.folder / f"{name}.safetensors")
        model.start(asyncio.get_running_loop())
        return model

    def stop(self):
        async def end():
            self.uvicorn.should_exit = True
            await self.serving
            await self.grpc.stop(0)
            for model in self.models.all():
                model.stop()

        self.http.close()
        self.channel.close()
        self.do(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def unary(self, method, request=None, **kwargs):
        kind = {of.name: of for of in InferRequest.DESCRIPTOR.file.services_by_name["GRPCInferenceService"].methods}
        ends = kind[method].input_type.name, kind[method].output_type.name
        call = self.channel.unary_unary(
            f"/inference.GRPCInferenceService/{method}",
            request_serializer=message(ends[0]).SerializeToString,
            response_deserializer=message(ends[1]).FromString,
        )
        return call(message(ends[0])() if request is None else request, timeout=60, **kwargs)

    def stream(self, requests, **kwargs):
        call = self.channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=InferRequest.SerializeToString,
            response_deserializer=StreamResponse.FromString,
        )
        return call(iter(requests), timeout=60, **kwargs)


@contextmanager
def served(folder, limits=None, token=None):
    found = Served(folder, limits or Limits(sessions=50, message=MESSAGE, waiting=100), token)
    try:
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("models")) as found:
        yield found


# ── the same request in each way in which it can be sent ────────────────────────────────────────────────────────────


def in_json(server, x, model="lstm", **parameters):
    body = {"inputs": [as_json(x)], "parameters": parameters}
    return array_of(server.http.post(f"/models/{model}/infer", json=body))


def as_json(x, name="x"):
    datatype = {"f": "FP32", "i": "INT64"}[x.dtype.kind]
    return {"name": name, "datatype": datatype, "shape": list(x.shape), "data": np.atleast_1d(x).tolist()}


def binary(x, name="x", datatype=None, **parameters):
    """Return the content and the headers of a request with binary tensors."""
    data, datatype = x.tobytes(), datatype or {"f": "FP32", "i": "INT64"}[x.dtype.kind]
    tensor = {"name": name, "datatype": datatype, "shape": x.shape, "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True, **parameters}}).encode()
    return {"content": head + data, "headers": {"Inference-Header-Content-Length": str(len(head))}}


def in_binary(server, x, model="lstm", **parameters):
    return array_of(server.http.post(f"/models/{model}/infer", **binary(x, **parameters)))


def array_of(response):
    assert response.status_code == 200, response.text
    length = response.headers.get("inference-header-content-length")
    size = len(response.content) if length is None else int(length)
    (output,) = json.loads(response.content[:size])["outputs"]
    dtype = {"FP32": "<f4"}[output["datatype"]]
    if "data" in output:
        return np.array(output["data"], dtype).reshape(output["shape"])
    assert output["parameters"]["binary_data_size"] == len(response.content) - size
    return np.frombuffer(response.content[size:], dtype).reshape(output["shape"])


def message_of(x, model="lstm", name="x", id="", raw=True, **parameters):
    datatype = {"f": "FP32", "i": "INT32"}[x.dtype.kind]
    request = InferRequest(
        model_name=model, id=id, inputs=[{"name": name, "datatype": datatype, "shape": list(x.shape)}]
    )
    if raw:
        request.raw_input_contents.append(x.astype({"f": "<f4", "i": "<i4"}[x.dtype.kind]).tobytes())
    else:
        field = {"f": "fp32_contents", "i": "int_contents"}[x.dtype.kind]
        getattr(request.inputs[0].contents, field).extend(x.ravel().tolist())
    for key, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
        setattr(request.parameters[key], kind, value)
    return request


def values_of(response):
    (output,), (data,) = response.outputs, response.raw_output_contents
    assert output.datatype == "FP32"
    return np.frombuffer(data, "<f4").reshape(output.shape)


def in_unary(server, x, model="lstm", **parameters):
    return values_of(server.unary("ModelInfer", message_of(x, model, **parameters)))


def in_contents(server, x, model="lstm", **parameters):
    return values_of(server.unary("ModelInfer", message_of(x, model, raw=False, **parameters)))


def in_stream(server, x, model="lstm", **parameters):
    (response,) = server.stream([message_of(x, model, **parameters)])
    assert not response.error_message, response.error_message
    return values_of(response.infer_response)


WAYS = [in_json, in_binary, in_unary, in_contents, in_stream]
ways = pytest.mark.parametrize("way", WAYS)


def sequence(seed=1, steps=6):
    return np.random.default_rng(seed).standard_normal((1, steps, WIDTH)).astype(np.float32)


def expected(x, name="lstm"):
    return networks()[name](x)


@ways
@pytest.mark.parametrize("form", ["[1, I]", "[1, 1, I]"])
def test_a_sequence_step_by_step(server, way, form):
    x, number = sequence(), next(IDS)
    found = []
    for t in range(6):
        step = x[:, t] if form == "[1, I]" else x[:, t : t + 1]
        found.append(way(server, step, sequence_id=number, sequence_start=t == 0, sequence_end=t == 5))
        assert found[-1].shape == ((1, H) if form == "[1, I]" else (1, 1, H))
    stream = networks()["lstm"].stream()
    wanted = [stream.step(x[:, t]) for t in range(6)]
    assert (np.concatenate(found).reshape(6, H) == np.concatenate(wanted)).all()
    assert not server.models.model("lstm").sessions


def test_one_sequence_in_all_ways(server):
    x, number = sequence(steps=10), next(IDS)
    found = [
        way(server, x[:, 2 * n : 2 * n + 2], sequence_id=number, sequence_start=n == 0, sequence_end=n == 4)
        for n, way in enumerate(WAYS)
    ]
    stream = networks()["lstm"].stream()
    assert (np.concatenate(found, 1)[0] == np.concatenate([stream.step(x[:, t]) for t in range(10)])).all()


@ways
def test_whole_sequences(server, way):
    x = np.concatenate([sequence(seed) for seed in range(4)])
    for name in ("lstm", "whole"):
        assert (way(server, x, name) == expected(x, name)).all()
    assert way(server, x, "last").shape == (4, H)


@ways
def test_a_network_whose_output_is_that_of_the_last_step(server, way):
    x, number = sequence(), next(IDS)
    found = way(server, x[:, :4], "last", sequence_id=number, sequence_start=True)
    np.testing.assert_allclose(found, expected(x[:, :4], "last"), rtol=1e-5)
    found = way(server, x[:, 4:], "last", sequence_id=number, sequence_end=True)
    np.testing.assert_allclose(found, expected(x, "last"), rtol=1e-5)


@ways
def test_ids(server, way):
    ids, number = np.array([[3, 1, 6, 2]]), next(IDS)
    assert (way(server, ids, "words") == expected(ids, "words")).all()
    one = way(server, ids[:, 0], "words", sequence_id=number, sequence_start=True)
    rest = way(server, ids[:, 1:], "words", sequence_id=number, sequence_end=True)
    assert one.shape == (1, H)
    np.testing.assert_allclose(np.concatenate([one[None], rest], 1), expected(ids, "words"), rtol=1e-5, atol=1e-6)


@ways
def test_ids_of_sequences_that_are_numbers_or_text(server, way):
    x = sequence(steps=2)
    one = way(server, x[:, 0], sequence_id=7, sequence_start=True)
    assert (way(server, x[:, 0], sequence_id="7", sequence_start=True) == one).all()
    after = way(server, x[:, 1], sequence_id=7, sequence_end=True)
    assert (way(server, x[:, 1], sequence_id="7", sequence_end=True) == after).all()
    # 0 and "" aren't ids: such requests hold whole sequences.
    for none in (0, ""):
        assert (way(server, x, sequence_id=none) == expected(x)).all()


@ways
def test_ids_are_64_bits_without_a_sign(server, way):
    x = sequence(steps=1)[:, 0]
    http = way in (in_json, in_binary)
    way(server, x, sequence_id=2**64 - 1 if http else -1, sequence_start=True)
    other = in_unary if http else in_json
    other(server, x, sequence_id=-1 if http else 2**64 - 1, sequence_end=True)


@ways
def test_a_start_begins_again_and_an_end_ends(server, way):
    x, number = sequence(steps=2), next(IDS)
    one = way(server, x[:, 0], sequence_id=number, sequence_start=True)
    way(server, x[:, 1], sequence_id=number)
    assert (way(server, x[:, 0], sequence_id=number, sequence_start=True) == one).all()
    assert len(server.models.model("lstm").sessions) == 1
    way(server, x[:, 1], sequence_id=number, sequence_end=True)
    assert refusal(way, server, x[:, 0], sequence_id=number) == (
        400,
        f"inference request for sequence {number} to model 'lstm' must specify the START flag on the first request of "
        "the sequence",
    )
    alone = way(server, x[:, 0], sequence_id=number, sequence_start=True, sequence_end=True)
    assert (alone == one).all()
    assert not server.models.model("lstm").sessions


STATUS = {grpc.StatusCode.INVALID_ARGUMENT: 400, grpc.StatusCode.NOT_FOUND: 404, grpc.StatusCode.UNAVAILABLE: 503}


def refusal(way, server, *args, **kwargs):
    """Return the status and the text with which a request is refused."""
    if way in (in_json, in_binary):
        original = server.http.post
        found = []
        try:
            server.http.post = lambda *args, **kwargs: found.append(original(*args, **kwargs)) or found[0]
            with pytest.raises(AssertionError):
                way(server, *args, **kwargs)
        finally:
            server.http.post = original
        assert found[0].headers["content-type"] == "application/json"
        return found[0].status_code, found[0].json()["error"]
    if way is in_stream:
        (response,) = server.stream([message_of(*args, **kwargs)])
        assert not response.infer_response.outputs
        return 400, response.error_message
    with pytest.raises(grpc.RpcError) as error:
        way(server, *args, **kwargs)
    return STATUS[error.value.code()], error.value.details()


@ways
@pytest.mark.parametrize(
    ("x", "model", "parameters", "text"),
    [
        (np.zeros((1, 2, 4), np.float32), "lstm", {}, "the last axis is the feature axis"),
        (np.zeros((3,), np.float32), "lstm", {}, "expected x"),
        (np.zeros((1, 4), np.float32), "lstm", {"sequence_id": 5, "sequence_start": True}, r"\[1, 3\], or \[1, T, 3\]"),
        (np.zeros((2, 3), np.float32), "lstm", {"sequence_id": 5, "sequence_start": True}, r"got \[2, 3\]"),
        (np.zeros((1, 0, 3), np.float32), "lstm", {"sequence_id": 5, "sequence_start": True}, r"got \[1, 0, 3\]"),
        (np.zeros((3,), np.float32), "lstm", {"sequence_id": 5, "sequence_start": True}, r"got \[3\]"),
        (np.zeros((), np.float32), "lstm", {"sequence_id": 5, "sequence_start": True}, r"got \[\]"),
        (np.zeros((1, 101, 3), np.float32), "lstm", {"sequence_id": 5, "sequence_start": True}, "at most 100 steps"),
        (np.zeros((1, 3), np.float32), "whole", {"sequence_id": 5, "sequence_start": True}, "whole has no sequences"),
        (np.array([9]), "words", {"sequence_id": 5, "sequence_start": True, "sequence_end": True}, "id"),
        (np.zeros((1, 3), np.float32), "lstm", {"sequence_start": True}, "need a sequence_id"),
        (
            np.zeros((1, 3), np.float32),
            "lstm",
            {"sequence_id": 5, "sequence_start": 1},
            "sequence_start: expected true",
        ),
        (np.zeros((1, 3), np.float32), "lstm", {"sequence_id": True, "sequence_start": True}, "sequence_id"),
        (np.zeros((1, 3), np.float32), "lstm", {"sequence_id": "a" * 129, "sequence_start": True}, "at most 128 bytes"),
        (np.zeros((1, 3), np.float32), "lstm", {"triton_key": 1}, "reserved"),
        (np.zeros((1, 2_000, 1), np.float32), "wide", {}, "the answer would have 1024000 numbers"),
    ],
)
def test_refused_requests(server, way, x, model, parameters, text):
    status, found = refusal(way, server, x, model, **parameters)
    assert status in (400, 413)
    assert re.search(text, found), found
    assert not server.models.model(model).sessions


@ways
def test_refused_requests_leave_a_sequence_as_it_is(server, way):
    x, number = sequence(steps=2), next(IDS)
    stream = networks()["lstm"].stream()
    assert (way(server, x[:, 0], sequence_id=number, sequence_start=True) == stream.step(x[:, 0])).all()
    nan = np.full((1, 4, WIDTH), np.nan, np.float32)
    for wrong in (np.zeros((1, 4), np.float32), np.zeros((2, WIDTH), np.float32)):
        refusal(way, server, wrong, sequence_id=number, sequence_start=True)
        refusal(way, server, wrong, sequence_id=number, sequence_end=True)
    if way is not in_json:  # JSON has no NaN
        assert refusal(way, server, nan, sequence_id=number)[1] == "the request contains NaN or infinity"
    found = way(server, x[:, 1], sequence_id=number, sequence_end=True)
    assert (found == stream.step(x[:, 1])).all()


def test_many_sequences_at_once(server):
    x = np.concatenate([sequence(seed, 8) for seed in range(20)])

    def client(b):
        way = WAYS[b % len(WAYS)]
        return np.concatenate(
            [way(server, x[b : b + 1, t], sequence_id=f"c{b}", sequence_start=t == 0, sequence_end=t == 7)
             for t in range(8)]
        )  # fmt: skip

    with ThreadPoolExecutor(20) as threads:
        found = np.stack(list(threads.map(client, range(20))))
    np.testing.assert_array_equal(found, expected(x))


def test_requests_of_a_sequence_that_arrive_together_keep_their_order(server):
    x = sequence(steps=4)

    def request(n):
        t = n % 4
        return Request({"x": Tensor("FP32", x[:, t])}, sequence="together", start=t == 0, end=t == 3)

    async def all_of_them():
        service = Service.of(server.models)
        tasks = [service.start("lstm", "", lambda model, n=n: request(n), lambda found: found) for n in range(12)]
        return [found.outputs["layer_0"] for found in await asyncio.gather(*tasks)]

    found = np.concatenate(server.do(all_of_them()))
    assert (found == np.tile(expected(x)[0], (3, 1))).all()


# ── gRPC ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_answers_in_order_and_continues_after_errors(server):
    x = np.concatenate([sequence(seed, 40) for seed in range(3)])
    requests = [
        message_of(x[b : b + 1, t], id=f"{b}_{t}", sequence_id=f"s{b}", sequence_start=t == 0, sequence_end=t == 39)
        for t in range(40)
        for b in range(3)
    ]
    requests.insert(10, message_of(np.zeros((1, 7), np.float32), id="wrong shape", sequence_id="s0"))
    requests.insert(20, message_of(x[:1, 0], "nothing", id="unknown"))
    requests.insert(30, message_of(x, id="whole"))
    found = list(server.stream(requests))
    assert [response.infer_response.id for response in found] == [request.id for request in requests]
    errors = {response.infer_response.id: response.error_message for response in found if response.error_message}
    assert errors.keys() == {"wrong shape", "unknown"}
    assert errors["unknown"].startswith("Request for unknown model")
    answers = {r.infer_response.id: r.infer_response for r in found if not r.error_message}
    assert all(answer.parameters["triton_final_response"].bool_param is True for answer in answers.values())
    assert (values_of(answers.pop("whole")) == expected(x)).all()
    for b in range(3):
        own = np.concatenate([values_of(answers[f"{b}_{t}"]) for t in range(40)])
        assert (own == expected(x[b : b + 1])[0]).all()


def test_a_stream_that_ends_at_the_first_error_on_request(server):
    requests = [message_of(np.zeros((1, 7), np.float32)), message_of(sequence())]
    with pytest.raises(grpc.RpcError) as error:
        list(server.stream(requests, metadata=[("triton_grpc_error", "true")]))
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_stream_of_more_bytes_than_the_largest_message(server):
    x = np.tile(sequence(), (1, 1000, 1))  # 72 kB
    found = list(server.stream([message_of(x, id=str(n)) for n in range(6)]))
    assert [response.infer_response.id for response in found] == list("012345")
    assert not any(response.error_message for response in found)


def test_a_cancelled_stream_leaves_its_sequences_usable(server):
    x, number = sequence(steps=2), next(IDS)
    waiting = threading.Event()

    def requests():
        yield message_of(x[:, 0], sequence_id=number, sequence_start=True)
        waiting.wait(60)

    call = server.stream(requests())
    stream = networks()["lstm"].stream()
    assert (values_of(next(call).infer_response) == stream.step(x[:, 0])).all()
    call.cancel()
    waiting.set()
    assert (in_json(server, x[:, 1], sequence_id=number, sequence_end=True) == stream.step(x[:, 1])).all()


def changed(request, change):
    change(request)
    return request


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r: r.raw_input_contents.append(b""), "expected 1 raw_input_contents, one per input, got 2"),
        (lambda r: r.inputs[0].shape.__setitem__(1, 2**40), "from 0 to 2\\^31 - 1"),
        (lambda r: r.inputs[0].shape.__setitem__(1, 2**30), "expected 12884901888 bytes"),
        (lambda r: r.inputs[0].shape.__setitem__(1, -1), "from 0 to 2\\^31 - 1"),
        (lambda r: r.inputs[0].shape.extend([1] * 100), "at most 8 axes"),
        (lambda r: setattr(r.inputs[0], "datatype", "FP8"), "expected one of the datatypes"),
        (lambda r: setattr(r.inputs[0], "datatype", "BYTES"), "expected one of the datatypes"),
        (lambda r: setattr(r.inputs[0], "datatype", "FP64"), "expected 144 bytes"),
        (lambda r: setattr(r.inputs[0], "name", "y"), "expected the inputs x, got y"),
        (lambda r: r.inputs[0].contents.fp32_contents.append(1), "contents field must not be specified when using raw"),
        (lambda r: r.inputs.append(r.inputs[0]) or r.raw_input_contents.append(b""), "x is given twice|expected"),
        (lambda r: r.outputs.add(name="z"), "unexpected inference output 'z'"),
        (lambda r: [r.outputs.add(name="layer_0") for _ in range(2)], "requested twice"),
        (lambda r: setattr(r.parameters["sequence_id"], "uint64_param", 1), "expected int64_param or string_param"),
        (lambda r: r.parameters["sequence_id"].SetInParent(), "expected int64_param or string_param"),
        (lambda r: setattr(r.inputs[0].parameters["shared_memory_region"], "string_param", "a"), "isn't supported"),
        (lambda r: setattr(r, "model_version", "2"), "has no version 2"),
        (lambda r: setattr(r, "model_version", "é" * 20_000), "Request for unknown model"),
        (lambda r: r.ClearField("inputs"), "expected 0 raw_input_contents"),
        (lambda r: r.Clear(), "Request for unknown model"),
    ],
)  # fmt: skip
def test_wrong_messages(server, change, text):
    with pytest.raises(grpc.RpcError) as error:
        server.unary("ModelInfer", changed(message_of(sequence()), change))
    assert error.value.code() in STATUS
    assert re.search(text, error.value.details()), error.value.details()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda i: i.contents.fp32_contents.append(1), "expected 18 values for the shape \\[1, 6, 3\\], got 19"),
        (lambda i: setattr(i, "datatype", "INT32"), "expected int_contents for INT32, got fp32_contents"),
        (lambda i: setattr(i, "datatype", "FP16"), "expected 36 bytes for FP16"),
        (lambda i: i.shape.__setitem__(1, 2**30), "expected 3221225472 values"),
    ],
)
def test_wrong_contents(server, change, text):
    request = message_of(sequence(), raw=False)
    change(request.inputs[0])
    with pytest.raises(grpc.RpcError, match=text):
        server.unary("ModelInfer", request)


def test_messages_that_are_too_large(server):
    with pytest.raises(grpc.RpcError) as error:
        server.unary("ModelInfer", message_of(np.zeros((1, MESSAGE, 3), np.float32)))
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.RpcError, match=r"(?i)decompressed message larger than max"):
        server.unary("ModelInfer", message_of(np.zeros((1, MESSAGE, 3), np.float32)), compression=grpc.Compression.Gzip)


def test_messages_that_are_not_protocol_buffers(server):
    send = server.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    for body in (b"\xff" * 50, b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x05abc"):
        with pytest.raises(grpc.RpcError) as error:
            send(body, timeout=60)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert error.value.details() == "malformed request: expected an inference.ModelInferRequest"
    stream = server.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    found = [
        StreamResponse.FromString(one) for one in stream(iter([b"\xff", message_of(sequence()).SerializeToString()]))
    ]
    assert [one.error_message for one in found] == ["malformed request: expected an inference.ModelInferRequest", ""]
    assert in_unary(server, sequence()).shape == (1, 6, H)


def test_the_descriptors_are_those_of_the_proto_file(tmp_path):
    protoc = pytest.importorskip("grpc_tools.protoc")
    compiled = tmp_path / "compiled.binpb"
    arguments = ["", f"-I{PROTOCOL}", f"--descriptor_set_out={compiled}", "inference_protocol.proto"]
    assert protoc.main(arguments) == 0
    read = descriptor_pb2.FileDescriptorSet.FromString
    assert read(compiled.read_bytes()) == read((PROTOCOL / "inference_protocol.binpb").read_bytes())


# ── HTTP ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def posted(server, **kwargs):
    return server.http.post("/models/lstm/infer", **kwargs)


def test_requested_outputs_and_the_id(server):
    x = sequence()
    head, data = json.dumps({"id": "é\ud800", "inputs": [as_json(x)], "outputs": [{"name": "layer_0"}]}), expected(x)
    found = posted(server, content=head.encode()).json()
    assert found["id"] == "é\ud800"
    assert (found["model_name"], found["model_version"]) == ("lstm", "1")
    assert found["outputs"] == [
        {"name": "layer_0", "datatype": "FP32", "shape": [1, 6, H], "data": [float(value) for value in data.ravel()]}
    ]
    outputs = [{"name": "layer_0", "parameters": {"binary_data": True}}]
    assert (array_of(posted(server, json={"inputs": [as_json(x)], "outputs": outputs})) == data).all()


def test_a_body_of_values_alone(server):
    x, header = sequence(), {"Inference-Header-Content-Length": "0"}
    assert (array_of(posted(server, content=x.tobytes(), headers=header)) == expected(x)).all()
    found = posted(server, content=x.tobytes()[:-1], headers=header)
    assert (found.status_code, "expected 60 bytes" in found.text) == (400, True)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compression(server, encoding):
    x, pack = np.tile(sequence(), (1, 20, 1)), {"gzip": gzip.compress, "deflate": zlib.compress}[encoding]
    sent = binary(x)
    sent["content"] = pack(sent["content"])
    sent["headers"] |= {"Content-Encoding": encoding, "Accept-Encoding": f"br, {encoding}"}
    found = posted(server, **sent)
    assert found.headers["content-encoding"] == encoding
    assert (array_of(found) == expected(x)).all()
    assert (
        "content-encoding"
        not in posted(server, **sent | {"headers": sent["headers"] | {"Accept-Encoding": "br"}}).headers
    )


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_wrong_compression(server, encoding):
    pack = {"gzip": gzip.compress, "deflate": zlib.compress}[encoding]
    good = pack(json.dumps({"inputs": [as_json(sequence())]}).encode())
    for content, status, text in (
        (pack(bytes(10**7)), 413, "larger than 100000 bytes"),
        (good[:-3], 400, "incomplete"),
        (good + b"more", 400, "continues after"),
        (b"nothing of the kind", 400, "isn't compressed"),
        (b"", 400, "incomplete"),
    ):
        found = posted(server, content=content, headers={"Content-Encoding": encoding})
        assert (found.status_code, text in found.json()["error"]) == (status, True), found.text
    assert posted(server, content=good, headers={"Content-Encoding": "br"}).status_code == 501


def test_bodies_that_are_too_long(server):
    found = posted(server, content=bytes(MESSAGE + 1))
    assert (found.status_code, found.headers["connection"]) == (413, "close")

    def chunks():
        for _ in range(20):
            yield bytes(10_000)

    assert posted(server, content=chunks()).status_code == 413


GOOD = {"name": "x", "datatype": "FP32", "shape": [1, 2, 3], "data": [1, 2, 3, 4, 5, 6]}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "failed to parse"),
        (b"{", "failed to parse"),
        (b"\xff\xfe", "failed to parse"),
        (b"[" * 90_000, "failed to parse"),
        (b'{"inputs": NaN}', "NaN isn't JSON"),
        (b"[]", "expected a JSON object, got list"),
        ({}, "expected the inputs x, got none"),
        ({"inputs": {}}, "inputs: expected a list"),
        ({"inputs": [7]}, "expected objects with a name"),
        ({"inputs": [{"name": 7}]}, "expected objects with a name"),
        ({"inputs": [{**GOOD, "datatype": None}]}, "expected one of the datatypes"),
        ({"inputs": [{**GOOD, "datatype": []}]}, "expected one of the datatypes"),
        ({"inputs": [{**GOOD, "shape": "abc"}]}, "expected a shape"),
        ({"inputs": [{**GOOD, "shape": [1, 2, True]}]}, "expected a shape"),
        ({"inputs": [{**GOOD, "shape": [1, 2, 3.0]}]}, "expected a shape"),
        ({"inputs": [{**GOOD, "shape": [1, 10**9, 1]}]}, "expected 1000000000 values for the shape"),
        ({"inputs": [{**GOOD, "shape": [1, 10**30, 1]}]}, "from 0 to 2\\^31 - 1"),
        ({"inputs": [{**GOOD, "data": None}]}, "expected data as a list"),
        ({"inputs": [{**GOOD, "data": "123456"}]}, "expected data as a list"),
        ({"inputs": [{**GOOD, "data": ["1", 2, 3, 4, 5, 6]}]}, "expected values of the datatype FP32"),
        ({"inputs": [{**GOOD, "data": [True] * 6}]}, "expected values of the datatype FP32"),
        ({"inputs": [{**GOOD, "data": [None] * 6}]}, "expected values of the datatype FP32"),
        ({"inputs": [{**GOOD, "data": [[1, 2, 3], [4, 5]]}]}, "expected values of the datatype FP32"),
        ({"inputs": [{**GOOD, "data": [1e300] * 6}]}, "outside the range of FP32"),
        ({"inputs": [{**GOOD, "data": [10**400] * 6}]}, "expected values of the datatype FP32"),
        ({"inputs": [{**GOOD, "datatype": "INT8", "data": [128] * 6}]}, "outside the range of INT8"),
        ({"inputs": [{**GOOD, "datatype": "UINT64", "data": [-1] * 6}]}, "outside the range of UINT64"),
        ({"inputs": [{**GOOD, "datatype": "INT32", "data": [1.5] * 6}]}, "expected values of the datatype INT32"),
        ({"inputs": [{**GOOD, "datatype": "BF16"}]}, "only supported as binary"),
        ({"inputs": [GOOD, GOOD]}, "x is given twice"),
        ({"inputs": [GOOD, {**GOOD, "name": "y"}]}, "expected the inputs x, got x, y"),
        ({"inputs": [GOOD], "outputs": [{"name": "y"}]}, "unexpected inference output 'y'"),
        ({"inputs": [GOOD], "outputs": ["y"]}, "expected objects with a name"),
        ({"inputs": [GOOD], "outputs": [{"name": "layer_0", "parameters": {"classification": 3}}]}, "isn't supported"),
        ({"inputs": [GOOD], "outputs": [{"name": "layer_0", "parameters": {"binary_data": 1}}]}, "binary_data"),
        ({"inputs": [GOOD], "parameters": []}, "parameters: expected an object"),
        ({"inputs": [GOOD], "parameters": {"binary_data_output": "yes"}}, "binary_data_output: expected true or false"),
        ({"inputs": [GOOD], "parameters": {"sequence_id": 2**64}}, "sequence_id: expected a whole number"),
        ({"inputs": [GOOD], "parameters": {"sequence_id": -1}}, "sequence_id: expected a whole number"),
        ({"inputs": [GOOD], "parameters": {"sequence_id": 1.0}}, "sequence_id: expected a whole number"),
        ({"inputs": [GOOD], "parameters": {"sequence_id": [7]}}, "sequence_id: expected a whole number"),
        ({"inputs": [GOOD], "parameters": {"sequence_id": 1, "sequence_end": "true"}}, "sequence_end: expected true"),
        ({"inputs": [GOOD], "id": 7}, "id: expected text"),
        ({"inputs": [{**GOOD, "parameters": {"binary_data_size": 24}}]}, "binary_data_size from 0 to 0, got 24"),
        ({"inputs": [{**GOOD, "parameters": {"shared_memory_region": "a"}}]}, "isn't supported"),
    ],
)  # fmt: skip
def test_wrong_bodies(server, body, text):
    found = posted(server, content=body if isinstance(body, bytes) else json.dumps(body).encode())
    assert found.status_code == 400
    assert re.search(text, found.json()["error"]), found.text


@pytest.mark.parametrize(
    ("size", "header", "text"),
    [
        (1, None, "expected 72 bytes"),
        (10**9, None, "binary_data_size from 0 to 72, got 1000000000"),
        (-1, None, "binary_data_size"),
        (2.0, None, "binary_data_size"),
        ("72", None, "binary_data_size"),
        (72, 10**9, "expected a number from 0 to"),
        (72, -1, "expected a number from 0 to"),
        (72, "abc", "expected a number from 0 to"),
        (72, "²", "expected a number from 0 to"),
        (72, 10, "failed to parse"),
    ],
)
def test_binary_sizes_that_do_not_add_up(server, size, header, text):
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 6, 3], "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {b"Inference-Header-Content-Length": str(len(head) if header is None else header).encode()}
    found = posted(server, content=head + sequence().tobytes(), headers=headers)
    assert (found.status_code, text in found.json()["error"]) == (400, True), found.text


def test_bytes_that_no_input_takes(server):
    sent = binary(sequence())
    found = posted(server, content=sent["content"] + b"123", headers=sent["headers"])
    assert found.json() == {"error": "unexpected additional input data for model 'lstm': 3 bytes"}


def test_paths_and_methods(server):
    for path, status in (
        ("/models/nothing", 404),
        ("/models/nothing/infer", 405),
        ("/models/lstm/versions/2/config", 404),
        ("/models/lstm/versions/x", 404),
        ("/models/lstm/infer", 405),
        ("/systemsharedmemory/status", 404),
        ("/", 404),
    ):
        found = server.http.get(path)
        assert (found.status_code, list(found.json())) == (status, ["error"]), path
    found = server.http.post("/models/nothing/infer", json={})
    assert (found.status_code, found.json()["error"][:25]) == (404, "Request for unknown model")


def test_changed_bodies_get_clear_answers(server):
    change, sent = random.Random(5), binary(sequence(), sequence_id=77, sequence_start=True, sequence_end=True)
    seen = set()
    for _ in range(150):
        body = bytearray(sent["content"])
        for _ in range(change.randint(1, 4)):
            at = change.randrange(len(body))
            body[at : at + change.randint(0, 3)] = change.choice(
                [b"", b"[", b"-", b"9", b"null", b'"', bytes([change.randrange(256)])]
            )
        found = posted(server, content=bytes(body), headers=sent["headers"])
        seen.add(found.status_code)
        assert found.status_code == 200 or isinstance(found.json()["error"], str)
    assert seen <= {200, 400, 413}
    assert 400 in seen


def test_changed_messages_get_clear_answers(server):
    change, sent = random.Random(6), message_of(sequence(), sequence_id=78, sequence_start=True, sequence_end=True)
    body = sent.SerializeToString()
    send = server.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    seen, texts = set(), set()
    for _ in range(150):
        other = bytearray(body)
        for _ in range(change.randint(1, 4)):
            other[change.randrange(len(other))] = change.randrange(256)
        try:
            InferResponse.FromString(send(bytes(other), timeout=60))
        except grpc.RpcError as error:
            seen.add(error.code())
            texts.add(error.details())
    codes = grpc.StatusCode
    assert "internal error" not in texts  # that is our own, for bugs
    assert codes.INVALID_ARGUMENT in seen
    assert seen <= {codes.INVALID_ARGUMENT, codes.NOT_FOUND}


# ── datatypes ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("datatype", ["INT8", "INT16", "INT32", "INT64", "UINT8", "UINT64", "FP16", "FP64", "BOOL"])
def test_other_datatypes_whose_values_are_exact(server, datatype):
    dtype = {"BOOL": "?", "FP16": "<f2", "FP64": "<f8"}.get(datatype, datatype.lower())
    x = np.array([[[1, 0, 1], [0, 1, 1]]]).astype(dtype)
    found = array_of(posted(server, **binary(x, datatype=datatype)))
    assert (found == expected(x.astype(np.float32))).all()
    if datatype != "FP16":
        body = {"inputs": [{"name": "x", "datatype": datatype, "shape": [1, 2, 3], "data": x.ravel().tolist()}]}
        assert (array_of(posted(server, json=body)) == found).all()


def test_bfloat16(server):
    x = np.array([[[1.5, -2, 0.25]]], np.float32)
    found = array_of(posted(server, **binary((x.view(np.uint32) >> 16).astype("<u2"), datatype="BF16")))
    assert (found == expected(x)).all()


@pytest.mark.parametrize(
    ("value", "dtype", "to"),
    [
        (2**24 + 1, "i4", "f4"),
        (2**63 - 1, "i8", "f4"),
        (2**53 + 1, "u8", "f8"),
        (0.1, "f8", "f4"),
        (1e300, "f8", "f4"),
        (0.5, "f4", "i8"),
        (np.nan, "f4", "i8"),
        (np.inf, "f2", "i8"),
        (2.0**63, "f8", "i8"),
        (2**64 - 1, "u8", "i8"),
        (2**64 - 1, "u8", "f4"),
    ],
)
def test_values_that_are_not_exact(value, dtype, to):
    tensor = Tensor("ANY", np.array([1, value], dtype))
    with pytest.raises(ServeError, match="of ANY isn't exactly representable: send"):
        as_exactly("x", tensor, np.dtype(to))


@pytest.mark.parametrize(
    ("value", "dtype", "to"),
    [
        (-(2**24), "i4", "f4"),
        (-(2**63), "i8", "f4"),
        (2**63, "u8", "f4"),
        (np.nan, "f8", "f4"),
        (np.inf, "f8", "f4"),
        (65504, "f2", "i8"),
        (-(2.0**63), "f8", "i8"),
        (7, "u8", "i8"),
        (True, "?", "f4"),
    ],
)
def test_values_that_are_exact(value, dtype, to):
    array = np.array([1, value], dtype)
    found = as_exactly("x", Tensor("ANY", array), np.dtype(to))
    assert found.dtype == to
    np.testing.assert_array_equal(found.astype(object) if dtype != "f8" else found, array.tolist())


def test_nan_in_json(server):
    x = np.full((1, 1, 3), np.nan, np.float32)
    sent = binary(x, binary_data_output=False)
    found = posted(server, **sent)
    assert (found.status_code, "request binary data" in found.json()["error"]) == (400, True)
    assert np.isnan(array_of(posted(server, **binary(x)))).all()


# ── descriptions ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_descriptions_are_the_same_over_both_protocols(server):
    def from_grpc(method, kind, **fields):
        found = server.unary(method, message(kind)(**fields))
        return MessageToDict(found, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)

    def plain(found):  # 64-bit numbers are text in the JSON of protocol buffers
        if isinstance(found, dict):
            return {key: plain(value) for key, value in found.items()}
        return [plain(value) for value in found] if isinstance(found, list) else str(found)

    def get(path):
        return server.http.get(str(server.http.base_url).rstrip("/") + path).json()

    assert from_grpc("ServerMetadata", "ServerMetadataRequest") == get("")
    assert {"sequence", "sequence(string_id)", "binary_tensor_data", "statistics"} <= set(get("")["extensions"])
    for name in networks():
        for path in ("", "/versions/1"):
            version = path[-1:]
            found = get(f"/models/{name}{path}")
            assert plain(from_grpc("ModelMetadata", "ModelMetadataRequest", name=name, version=version)) == plain(found)
            config = get(f"/models/{name}{path}/config")
            ours = from_grpc("ModelConfig", "ModelConfigRequest", name=name, version=version)["config"]
            assert plain(ours) == plain(config)
            assert ("sequence_batching" in config) == (name != "whole")
            stats = get(f"/models/{name}{path}/stats")
            ours = from_grpc("ModelStatistics", "ModelStatisticsRequest", name=name, version=version)
            assert plain(ours) == plain(stats)
    assert get("/models/words")["inputs"] == [{"name": "x", "datatype": "INT64", "shape": [-1, -1]}]
    assert get("/models/lstm")["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, -1, 3]}]
    assert get("/models/last")["outputs"] == [{"name": "layer_0", "datatype": "FP32", "shape": [-1, 5]}]
    assert len(get("/models/stats")["model_stats"]) == len(networks())
    index = server.http.post("/repository/index").json()
    assert index == from_grpc("RepositoryIndex", "RepositoryIndexRequest")["models"]
    assert {entry["state"] for entry in index} == {"READY"}


def test_statistics_count_requests_and_steps(server):
    def counts():
        (found,) = server.http.get("/models/simple_sequence/stats").json()["model_stats"]
        times = found["inference_stats"]
        return np.array([found["inference_count"], times["success"]["count"], times["fail"]["count"]])

    before, x = counts(), np.zeros((1, 1), np.float32)

    def step(way, x, **parameters):
        request = message_of(x, "simple_sequence", "INPUT", **parameters)
        return values_of(server.unary("ModelInfer", request))

    assert step(in_unary, x + 5, sequence_id=1, sequence_start=True).tolist() == [[6]]
    assert step(in_unary, np.array([[[7], [8]]], "i4"), sequence_id=1, sequence_end=True).tolist() == [[[7], [8]]]
    with pytest.raises(grpc.RpcError):
        step(in_unary, x, sequence_id=1)
    assert (counts() - before).tolist() == [3, 2, 1]


@pytest.mark.parametrize(
    "sent",
    [b"", b"PRI * HT", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"],
)
def test_grpc_connections_without_a_call_end(monkeypatch, sent):
    monkeypatch.setattr(over_grpc, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(over_grpc, "NEW_SECONDS", 0.2)

    async def connect():
        port = free_port()
        server = bound(Models(Limits()), "127.0.0.1", port, ())
        await server.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        await asyncio.wait_for(reader.read(), 20)  # until the server closes it
        writer.close()
        await server.stop(0)

    asyncio.run(connect())


# ── the life of sequences ───────────────────────────────────────────────────────────────────────────────────────────


def test_tokens(tmp_path):
    with served(tmp_path, token="abc") as server:
        assert server.http.get("/health/live").status_code == 200
        assert server.unary("ServerReady").ready
        found = server.http.get("/models/lstm")
        assert (found.status_code, "valid token" in found.json()["error"]) == (401, True)
        assert server.http.get("/models/lstm", headers={"authorization": "Bearer abc"}).status_code == 200
        right, wrong = [("authorization", "Bearer abc")], [("authorization", "Bearer abd")]
        for metadata in (None, wrong, [*right, *wrong]):
            for call in (
                lambda metadata=metadata: server.unary("ServerMetadata", metadata=metadata),
                lambda metadata=metadata: server.unary("ModelInfer", message_of(sequence()), metadata=metadata),
                lambda metadata=metadata: list(server.stream([message_of(sequence())], metadata=metadata)),
            ):
                with pytest.raises(grpc.RpcError) as error:
                    call()
                assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert next(server.stream([message_of(sequence())], metadata=right)).infer_response.outputs


def test_idle_sequences_reload_and_stop(tmp_path):
    with served(tmp_path, Limits(sessions=2, idle=0.05)) as server:
        x, model = sequence(steps=3), server.models.model("lstm")
        in_json(server, x[:, 0], sequence_id=1, sequence_start=True)
        in_unary(server, x[:, 0], sequence_id=2, sequence_start=True)
        text = "all 2 sessions of lstm are in use"
        assert refusal(in_json, server, x[:, 0], sequence_id=3, sequence_start=True) == (503, text)
        assert refusal(in_unary, server, x[:, 0], sequence_id=3, sequence_start=True) == (503, text)
        server.do(asyncio.sleep(0.06))
        server.do(server.models.drop_unused())
        assert not model.sessions
        assert "must specify the START" in refusal(in_json, server, x[:, 0], sequence_id=1)[1]

        # A sequence stays with its version when the file is loaded again.
        stream = networks()["lstm"].stream()
        in_json(server, x[:, 0], sequence_id=1, sequence_start=True)
        stream.step(x[:, 0])
        Network([lstm(seed=9)]).save(tmp_path / "other.safetensors")
        shutil.move(tmp_path / "other.safetensors", tmp_path / "lstm.safetensors")

        async def again():
            return server.add("lstm")

        server.do(again())
        assert server.http.get("/models/lstm").json()["versions"] == ["1", "2"]
        assert (in_json(server, x[:, 1], sequence_id=1) == stream.step(x[:, 1])).all()
        found = server.http.post(
            "/models/lstm/versions/2/infer", json={"inputs": [as_json(x[:, 2])], "parameters": {"sequence_id": 1}}
        )
        assert found.json() == {"error": "sequence 1 runs on version 1, not 2"}

        # While the server stops, sequences and streams end and none begin.
        stream_of = server.stream(messages_until(ended := threading.Event(), message_of(x)))
        assert next(stream_of).infer_response.outputs
        server.loop.call_soon_threadsafe(Service.of(server.models).stop)
        assert not list(stream_of)
        ended.set()
        assert server.http.get("/health/ready").status_code == 400
        assert not server.unary("ServerReady").ready
        assert refusal(in_json, server, x[:, 0], sequence_id=5, sequence_start=True)[0] == 503
        assert (in_unary(server, x[:, 2], sequence_id=1, sequence_end=True) == stream.step(x[:, 2])).all()


def messages_until(event, *messages):
    yield from messages
    event.wait()


def test_a_port_that_is_in_use(tmp_path):
    async def twice():
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(OSError, match=r"gRPC can't listen on 127\.0\.0\.1"):
                bound(Models(Limits()), "127.0.0.1", taken.getsockname()[1])

    asyncio.run(twice())


# ── Triton's client, whose requirements don't allow the newest versions of other packages of the tests ──────────────


@pytest.mark.models
def test_names_and_numbers_are_those_of_triton():
    pb = pytest.importorskip("tritonclient.grpc.service_pb2")
    for name, ours in InferRequest.DESCRIPTOR.file.message_types_by_name.items():
        theirs = (
            pb.DESCRIPTOR.message_types_by_name.get(name)
            or pb.model__config__pb2.DESCRIPTOR.message_types_by_name[name]
        )
        pending = [(ours, theirs)]
        while pending:
            ours, theirs = pending.pop()
            for field in ours.fields:
                public = theirs.fields_by_name[field.name]
                assert (field.number, field.type, field.is_repeated) == (public.number, public.type, public.is_repeated)
            pending += [(nested, theirs.nested_types_by_name[nested.name]) for nested in ours.nested_types]


@pytest.mark.models
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_triton_over_http(server, compression):
    triton = pytest.importorskip("tritonclient.http")
    x = np.tile(sequence(), (1, 40, 1))
    with triton.InferenceServerClient(f"127.0.0.1:{server.http_port}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("lstm")
        assert client.get_server_metadata()["name"] == "cellstack"
        assert client.get_model_metadata("lstm")["inputs"][0]["name"] == "x"
        assert client.get_model_config("lstm", "1")["max_batch_size"] == 0
        assert client.get_inference_statistics("lstm")["model_stats"][0]["version"] == "1"
        assert len(client.get_model_repository_index()) == len(networks())
        packed = {"request_compression_algorithm": compression, "response_compression_algorithm": compression}
        for given, wanted in itertools.product((False, True), repeat=2):
            tensor = triton.InferInput("x", x.shape, "FP32")
            tensor.set_data_from_numpy(x, binary_data=given)
            outputs = [triton.InferRequestedOutput("layer_0", binary_data=wanted)]
            found = client.infer("lstm", [tensor], outputs=outputs, request_id="a", **packed)
            assert found.get_response()["id"] == "a"
            assert (found.as_numpy("layer_0") == expected(x)).all()
        with pytest.raises(triton.InferenceServerException, match="Request for unknown model"):
            client.infer("nothing", [tensor])
        for number in (2**64 - 1, "text"):
            found = []
            for t in range(4):
                tensor = triton.InferInput("x", [1, WIDTH], "FP32")
                tensor.set_data_from_numpy(x[:, t])
                ends = {"sequence_id": number, "sequence_start": t == 0, "sequence_end": t == 3}
                found.append(client.infer("lstm", [tensor], **ends).as_numpy("layer_0"))
            assert (np.concatenate(found) == expected(x)[0, :4]).all()


@pytest.mark.models
@pytest.mark.parametrize("package", ["http", "grpc"])
def test_triton_asynchronously(server, package):
    triton = pytest.importorskip(f"tritonclient.{package}.aio")
    kinds = pytest.importorskip(f"tritonclient.{package}")
    x = sequence()

    async def run():
        port = {"http": server.http_port, "grpc": server.grpc_port}[package]
        async with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
            found = []
            for t in range(6):
                tensor = kinds.InferInput("x", [1, WIDTH], "FP32")
                tensor.set_data_from_numpy(x[:, t])
                ends = {"sequence_id": 3, "sequence_start": t == 0, "sequence_end": t == 5}
                found.append((await client.infer("lstm", [tensor], **ends)).as_numpy("layer_0"))
            assert (np.concatenate(found) == expected(x)[0]).all()

    asyncio.run(run())


@pytest.mark.models
def test_triton_over_grpc(server):
    triton = pytest.importorskip("tritonclient.grpc")
    x, answers = sequence(), []
    arrived = threading.Semaphore(0)

    def callback(result, error):
        answers.append(result if error is None else error)
        arrived.release()

    with triton.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        assert client.is_server_live()
        assert client.is_model_ready("lstm")
        assert "sequence" in client.get_server_metadata().extensions
        assert client.get_model_metadata("lstm").inputs[0].shape == [-1, -1, WIDTH]
        assert client.get_model_config("lstm").config.HasField("sequence_batching")
        assert client.get_inference_statistics().model_stats
        client.start_stream(callback)
        for t in range(-1, 6):
            tensor = triton.InferInput("x", [1, WIDTH], "FP32")
            tensor.set_data_from_numpy(x[:, max(t, 0)])
            ends = {"sequence_id": "first request fails", "sequence_start": t == 0, "sequence_end": t == 5}
            client.async_stream_infer("lstm", [tensor], enable_empty_final_response=True, **ends)
        for _ in range(7):
            assert arrived.acquire(timeout=60)
        client.stop_stream()
        assert "must specify the START flag" in str(answers[0])
        found = np.concatenate([answer.as_numpy("layer_0") for answer in answers[1:]])
        assert (found == expected(x)[0]).all()
