"""What the Open Inference Protocol does, regardless of HTTP or gRPC: descriptions, statistics, inference, sequences."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

import cellstack
from cellstack.serve.inference_protocol.tensors import Tensor, as_exactly, datatype_of
from cellstack.serve.models import Model, Models, ServeError, Session
from cellstack.serve.rows import Records

EXTENSIONS = [
    "sequence",
    "sequence(string_id)",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
]
LONGEST_ID = 128  # bytes of a sequence id that is text, as in Triton
ANSWERS = 4  # the size of the largest answer, in largest messages
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Request:
    """A request for inference.

    Attributes:
        inputs: by name.
        outputs: the names of the requested outputs; empty: all.
        sequence: the sequence that the request is a part of; None: it holds whole sequences.
        start: whether it is the sequence's first request.
        end: whether it is the last.
    """

    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...] = ()
    sequence: int | str | None = None
    start: bool = False
    end: bool = False


class Response(NamedTuple):
    """The model that answered, and the requested outputs by name."""

    model: Model
    outputs: dict[str, NDArray[Any]]


@dataclass
class Duration:
    """How often something happened, and the nanoseconds that it took together."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Count one."""
        self.count += 1
        self.ns += ns


TIMES = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")


@dataclass
class Statistics:
    """The requests to a model through this protocol.

    Attributes:
        times: by Triton's names. `queue` is the wait for earlier requests of the same sequence; `compute_infer`
            includes the wait for a place in a batch.
        last: milliseconds since 1970 at the last answer.
        runs: requests of whole sequences.
        rows: whole sequences in them.
    """

    times: dict[str, Duration] = field(default_factory=lambda: {name: Duration() for name in TIMES})
    last: int = 0
    runs: int = 0
    rows: int = 0


class Service:
    """The models of a server for clients of the Open Inference Protocol.

    Sequences are sessions of the models. A session is closed by the end of its sequence, or, like those of other
    clients, after `Limits.idle` seconds without a request.

    Attributes:
        ready: False while the server stops: new sequences are refused, open ones go on.
        stopping: set when streams should end, after the answers to the requests that were read.
    """

    def __init__(self, models: Models) -> None:
        self.models, self.ready, self.stopping = models, True, asyncio.Event()
        # An entry disappears with its session, whoever closes it. Requests of a sequence hold its lock one by one.
        self._sessions: WeakValueDictionary[tuple[str, int | str], Session] = WeakValueDictionary()
        self._locks: WeakValueDictionary[tuple[str, int | str], asyncio.Lock] = WeakValueDictionary()
        self._statistics: WeakKeyDictionary[Model, Statistics] = WeakKeyDictionary()
        self._running: set[asyncio.Task[Any]] = set()

    @classmethod
    def of(cls, models: Models) -> Service:
        """Return the only service of these models, which HTTP and gRPC share."""
        if "inference_protocol" not in vars(models):
            vars(models)["inference_protocol"] = cls(models)
        return vars(models)["inference_protocol"]

    def stop(self) -> None:
        """Refuse new sequences, and end streams."""
        self.ready = False
        self.stopping.set()

    def find_restored(self) -> None:
        """Find the sequences among sessions that were restored, so that their clients can continue."""
        for model in self.models.all():
            for token, session in model.sessions.items():
                if (sequence := sequence_of(token)) is not None:
                    self._sessions[model.name, sequence] = session

    # ── descriptions ────────────────────────────────────────────────────────────────────────────────────────────────

    def server(self) -> dict[str, Any]:
        """Return the server's metadata."""
        return {"name": "cellstack", "version": cellstack.__version__, "extensions": EXTENSIONS}

    def metadata(self, name: str, version: str) -> dict[str, Any]:
        """Return a model's metadata; the shapes are those of whole sequences, -1 for any size."""
        model = self.models.model(name, version)
        return {
            "name": name,
            "versions": [str(model.version) for model in self.models.versions[name]],
            "platform": "cellstack",
            "inputs": [_described(model, tensor, "datatype", "shape", "") for tensor in model.network.inputs],
            "outputs": [_described(model, tensor, "datatype", "shape", "") for tensor in model.network.outputs],
        }

    def config(self, name: str, version: str) -> dict[str, Any]:
        """Return a model's configuration in Triton's form."""
        model = self.models.model(name, version)
        config: dict[str, Any] = {
            "name": name,
            "platform": "cellstack",
            "backend": "cellstack",
            "max_batch_size": 0,  # which means in Triton: shapes include the batch
            "input": [_described(model, tensor, "data_type", "dims", "TYPE_") for tensor in model.network.inputs],
            "output": [_described(model, tensor, "data_type", "dims", "TYPE_") for tensor in model.network.outputs],
            "model_transaction_policy": {"decoupled": False},
        }
        if model.rows is not None:
            config["sequence_batching"] = {"max_sequence_idle_microseconds": int(model.limits.idle * 1e6)}
        return config

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Return the statistics of a model's versions, or of all models."""
        if version or name:
            models = [self.models.model(name, version)] if version else self.models.versions.get(name)
            models = models or [self.models.model(name)]
        else:
            models = self.models.all()
        return {"model_stats": [self._statistics_of(model) for model in models]}

    def _statistics_of(self, model: Model) -> dict[str, Any]:
        found = self._counts(model)
        stepped = (model.worker.frames, model.worker.batches) if model.rows is not None else (0, 0)
        return {
            "name": model.name,
            "version": str(model.version),
            "last_inference": found.last,
            "inference_count": found.rows + stepped[0],
            "execution_count": found.runs + stepped[1],
            "inference_stats": {name: {"count": of.count, "ns": of.ns} for name, of in found.times.items()},
        }

    def index(self, ready: bool = False) -> list[dict[str, str]]:
        """Return the models and their versions; with `ready`, only those that are, as far as the server is."""
        state = "READY" if self.ready else "UNAVAILABLE"
        models = [] if ready and not self.ready else self.models.all()
        return [{"name": m.name, "version": str(m.version), "state": state, "reason": ""} for m in models]

    def model_ready(self, name: str, version: str) -> bool:
        """Return whether a model answers.

        Raises:
            ServeError: there is no such model.
        """
        self.models.model(name, version)
        return self.ready

    # ── inference ───────────────────────────────────────────────────────────────────────────────────────────────────

    def start(
        self, name: str, version: str, read: Callable[[Model], Request], write: Callable[[Response], Answer]
    ) -> asyncio.Task[Answer]:
        """Answer a request for inference. Requests of a sequence are processed in the order of these calls.

        A client that gives up doesn't stop the task, so that a sequence never ends within a step.

        Args:
            name: of the model.
            version: of the model; empty: the sequence's, or the newest.
            read: returns the request, for the model that was named.
            write: returns the answer.

        Raises (the task):
            ServeError: the request is refused.
        """
        task = asyncio.get_running_loop().create_task(self._answer(name, version, read, write))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def _answer(
        self, name: str, version: str, read: Callable[[Model], Request], write: Callable[[Response], Answer]
    ) -> Answer:
        began = time.perf_counter_ns()
        model = self.models.model(name, version)
        times = self._counts(model).times
        try:
            request = read(model)
            read_at = time.perf_counter_ns()
            async with self._lock(name, request.sequence):
                turn_at = time.perf_counter_ns()
                step = self._run if request.sequence is None else self._step
                response = await step(model, version, request)
            stepped_at = time.perf_counter_ns()
            answer = write(response)
        except Exception:
            times["fail"].add(time.perf_counter_ns() - began)
            raise
        done = time.perf_counter_ns()
        times["success"].add(done - began)
        times["compute_input"].add(read_at - began)
        times["queue"].add(turn_at - read_at)
        times["compute_infer"].add(stepped_at - turn_at)
        times["compute_output"].add(done - stepped_at)
        self._counts(model).last = time.time_ns() // 1_000_000
        return answer

    def _lock(self, name: str, sequence: int | str | None) -> AbstractAsyncContextManager[Any]:
        """Return the lock of a sequence; of whole sequences, one that is free."""
        if sequence is None:
            return asyncio.Lock()
        found = self._locks.get((name, sequence))
        if found is None:
            found = self._locks[name, sequence] = asyncio.Lock()
        return found

    def _counts(self, model: Model) -> Statistics:
        return self._statistics.setdefault(model, Statistics())

    async def _run(self, model: Model, version: str, request: Request) -> Response:
        """Run whole sequences."""
        network = model.network
        _check_names(model, request)
        inputs = {}
        for name in network.inputs:
            dtype = np.dtype(np.int64) if name in network.graph.ids else network.dtype
            inputs[name] = as_exactly(name, request.inputs[name], dtype)
        first = next(iter(inputs.values()))
        # A small request can have a large answer, such as the 512 units at each of a million steps of one number.
        shapes = [network.shapes[name] for name in network.outputs]
        numbers = sum(math.prod(first.shape[: len(shape)]) * (shape[-1] or 1) for shape in shapes)
        if numbers * network.dtype.itemsize > ANSWERS * model.limits.message:
            raise ServeError(413, f"the answer would have {numbers} numbers: send fewer sequences or steps at a time")
        try:
            y = await model.run(inputs if len(inputs) > 1 else first)
        except (ValueError, TypeError) as error:
            raise ServeError(400, str(error)) from None
        except RuntimeError as error:  # the thread of a model that is being stopped accepts no work
            raise ServeError(503, f"{model.name} is stopping: {error}") from None
        counts = self._counts(model)
        counts.runs += 1
        counts.rows += len(first)
        outputs = dict(zip(network.outputs, y if len(shapes) > 1 else (y,), strict=True))
        return _selected(model, request, outputs)

    async def _step(self, model: Model, version: str, request: Request) -> Response:
        """Step a sequence."""
        assert request.sequence is not None
        key = (model.name, request.sequence)
        session = self._sessions.get(key)
        if session is not None and session.token not in session.model.sessions:
            session = None
        if not request.start:
            if session is None:
                raise ServeError(
                    400,
                    f"inference request for sequence {request.sequence} to model '{model.name}' must specify the START "
                    "flag on the first request of the sequence",
                )
            if version and session.model is not model:
                raise ServeError(
                    400, f"sequence {request.sequence} runs on version {session.model.version}, not {version}"
                )
            model = session.model
        elif not self.ready:
            raise ServeError(503, "the server is stopping and accepts no new sequences")
        if model.rows is None:
            raise ServeError(400, f"{model.name} has no sequences: {model.why_not}")
        rows, one = _records(model, request)
        try:
            if request.start:
                if session is not None:
                    await session.model.close(session)
                session = self._sessions[key] = await model.open(token=token_of(request.sequence))
            assert session is not None
            answers = await model.steps(session, rows)
            if request.end:
                await model.close(session)
        except RuntimeError as error:  # the thread of a model that is being stopped accepts no work
            raise ServeError(503, f"{model.name} is stopping: {error}") from None
        if answers.refused:
            step, why = next(iter(answers.refused.items()))
            raise ServeError(
                400, why if one else f"step {step + 1} of {len(rows)}: {why}; accepted steps are processed"
            )
        outputs = {}
        for name in model.network.outputs:
            y = answers.rows[name]  # [T, W]
            timed = len(model.network.shapes[name]) == 2
            outputs[name] = y if one else y[None] if timed else y[-1:]
        return _selected(model, request, outputs)


def _described(model: Model, name: str, datatype: str, shape: str, prefix: str) -> dict[str, Any]:
    ids = name in model.network.graph.ids
    return {
        "name": name,
        datatype: prefix + ("INT64" if ids else datatype_of(model.network.dtype)),
        shape: [-1, *(-1 if size is None else size for size in model.network.shapes[name])],
    }


def _check_names(model: Model, request: Request) -> None:
    if request.inputs.keys() != set(model.network.inputs):
        got = ", ".join(request.inputs) or "none"
        raise ServeError(400, f"{model.name}: expected the inputs {', '.join(model.network.inputs)}, got {got:.200}")
    for name in request.outputs:
        if name not in model.network.outputs:
            known = ", ".join(model.network.outputs)
            raise ServeError(400, f"unexpected inference output '{name:.100}' for model '{model.name}': it has {known}")


def _records(model: Model, request: Request) -> tuple[Records, bool]:
    """Return a sequence's next steps as records, and whether the request is one step without an axis of time."""
    _check_names(model, request)
    assert model.rows is not None
    dtype = model.rows.inputs
    names = dtype.names or ()
    shapes = {name: request.inputs[name].array.shape for name in names}
    first = shapes[model.network.inputs[0]]
    one = len(first) == 1 + dtype[0].ndim
    steps = 1 if one else (*first, 0, 0)[1]
    for name in names:
        expected = (1, *dtype[name].shape) if one else (1, steps, *dtype[name].shape)
        if shapes[name] != expected or not steps:
            wide = "".join(f", {size}" for size in dtype[name].shape)
            raise ServeError(
                400,
                f"{name}: expected the shape [1{wide}], or [1, T{wide}] for T steps of the sequence, "
                f"got {list(shapes[name])}",
            )
    if steps > model.limits.waiting:
        raise ServeError(413, f"expected at most {model.limits.waiting} steps in one request, got {steps}")
    rows = np.zeros(steps, dtype)
    for name in names:
        base = dtype[name].base
        rows[name] = as_exactly(name, request.inputs[name], base).reshape(steps, *dtype[name].shape)
    if model.rows.finite(rows) is not None:
        raise ServeError(400, "the request contains NaN or infinity")
    return rows, one


def _selected(model: Model, request: Request, outputs: dict[str, NDArray[Any]]) -> Response:
    return Response(model, {name: outputs[name] for name in request.outputs or outputs})


def token_of(sequence: int | str) -> str:
    """Return a token for a sequence's session. It contains the id, which is so stored with a durable session."""
    return f"{secrets.token_urlsafe(16)} {json.dumps(sequence)}"


def sequence_of(token: str) -> int | str | None:
    """Return the id of a sequence from `token_of`; None for the token of another session, which has no space."""
    _, _, text = token.partition(" ")
    return json.loads(text) if text else None


# ── what both protocols read ────────────────────────────────────────────────────────────────────────────────────────


def as_sequence(name: str, value: Any) -> int | str | None:
    """Return the id of a sequence: a number or text, which are different even if they look alike; None for 0 and ""."""
    if type(value) is int and 0 <= value < 2**64:
        return value or None
    if isinstance(value, str):
        if len(value.encode("utf-8", "surrogatepass")) > LONGEST_ID:
            raise ServeError(400, f"{name}: expected at most {LONGEST_ID} bytes")
        return value or None
    raise ServeError(400, f"{name}: expected a whole number from 0 to 2^64 - 1, or text, got {value!r:.40}")


def request_of(inputs: Mapping[str, Tensor], outputs: tuple[str, ...], parameters: Mapping[str, Any]) -> Request:
    """Return a request with what its parameters say about its sequence.

    Raises:
        ServeError: parameters of a wrong type, or outputs that are requested twice.
    """
    if len(set(outputs)) != len(outputs):
        raise ServeError(400, f"outputs are requested twice: {', '.join(outputs):.200}")
    sequence = as_sequence("sequence_id", parameters["sequence_id"]) if "sequence_id" in parameters else None
    start, end = (as_bool(name, parameters.get(name, False)) for name in ("sequence_start", "sequence_end"))
    if (start or end) and sequence is None:
        raise ServeError(400, "sequence_start and sequence_end need a sequence_id other than 0 and empty text")
    return Request(inputs, outputs, sequence, start, end)


def as_bool(name: str, value: Any) -> bool:
    """Return a parameter that has to be true or false."""
    if not isinstance(value, bool):
        raise ServeError(400, f"{name}: expected true or false, got {value!r:.40}")
    return value
