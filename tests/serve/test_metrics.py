"""The metrics of a server: counts, histograms, and figures of a sample of states."""

import asyncio

import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parsed_open
from prometheus_client.parser import text_string_to_metric_families as parsed

from cellstack import CellSpec, Network
from cellstack.formats import save
from cellstack.nodes import Cell, Recurrent
from cellstack.serve import Limits, Models, metrics
from cellstack.serve.app import application
from cellstack.serve.metrics import exposition

WIDTH, H = 3, 5


def network(kind="lstm", scale=1.0, forget=0.0, **flags):
    new = np.random.default_rng(0).standard_normal
    spec = CellSpec(WIDTH, H, kind=kind, **flags)
    arrays = {name: (scale * new(shape)).astype(np.float32) for name, shape in spec.shapes.items()}
    if kind == "lstm":
        arrays["bias"][H : 2 * H] = forget
    return Network([Recurrent((Cell(spec, **arrays),))], ["memory"])


def served(net, test, tmp_path):
    async def all_of_it():
        save(net, tmp_path / "vad.safetensors")
        models = Models(Limits(sessions=100))
        model = models.add(tmp_path / "vad.safetensors")
        model.start(asyncio.get_running_loop())
        try:
            return await test(models, model)
        finally:
            model.stop()

    return asyncio.run(all_of_it())


def values(models):
    content_type, text = exposition(models)
    assert content_type.startswith("text/plain")
    return {
        (
            sample.name,
            *(value for name, value in sample.labels.items() if name not in ("model", "version")),
        ): sample.value
        for family in parsed(text.decode())
        for sample in family.samples
    }


async def stepped(model, sessions, frames, value=1.0):
    rows = np.zeros(frames, model.rows.inputs)
    rows["x"] = value
    await asyncio.gather(*(model.steps(session, rows) for session in sessions))


def test_counts_and_histograms(tmp_path):
    async def test(models, model):
        sessions = [await model.open() for _ in range(3)]
        await stepped(model, sessions, 4)
        await stepped(model, sessions[:1], 1, np.nan)
        await model.close(sessions[2])
        found = values(models)
        assert found["cellstack_model",] == 1
        assert found["cellstack_sessions",] == 2
        assert found["cellstack_sessions_limit",] == 100
        assert (found["cellstack_sessions_opened_total",], found["cellstack_sessions_closed_total",]) == (3, 1)
        assert (found["cellstack_frames_total",], found["cellstack_frames_refused_total",]) == (13, 1)
        assert found["cellstack_batch_size_sum",] == 13
        assert (
            found["cellstack_batch_size_count",] == found["cellstack_batch_size_bucket", "+Inf"] == model.worker.batches
        )
        assert found["cellstack_step_latency_seconds_count",] == 13
        assert found["cellstack_step_latency_seconds_bucket", "+Inf"] == 13
        assert 0 < found["cellstack_step_latency_seconds_sum",] < 13
        assert found["process_cpu_seconds_total",] > 0

    served(network(), test, tmp_path)


def test_labels_and_the_format_of_openmetrics(tmp_path):
    async def test(models, model):
        content_type, text = exposition(models, "application/openmetrics-text; version=1.0.0")
        assert content_type.startswith("application/openmetrics-text")
        (sessions,) = [family for family in parsed_open(text.decode()) if family.name == "cellstack_sessions"]
        assert sessions.samples[0].labels == {"model": "vad", "version": "1"}

    served(network(), test, tmp_path)


def sampled(net, tmp_path, monkeypatch, value=1.0):
    """The figures of a sample after some steps of 5 sessions."""
    monkeypatch.setattr(metrics, "EVERY", 0.0)

    async def test(models, model):
        sessions = [await model.open() for _ in range(5)]
        first = values(models)
        assert ("cellstack_saturated_units_ratio", "memory") not in first
        for _ in range(3):
            await stepped(model, sessions, 10, value)
            found = values(models)
        return found

    return served(net, test, tmp_path)


@pytest.mark.parametrize(("forget", "most", "least"), [(-3.0, 1.0, 0.0), (30.0, np.inf, 100.0)])
def test_the_memory_of_cells(forget, most, least, tmp_path, monkeypatch):
    found = sampled(network(scale=0.1, forget=forget), tmp_path, monkeypatch)
    assert least <= found["cellstack_memory_steps", "memory"] <= most
    assert found["cellstack_saturated_units_ratio", "memory"] == 0


def test_saturated_units(tmp_path, monkeypatch):
    found = sampled(network(scale=3.0, forget=30.0), tmp_path, monkeypatch)  # c only grows
    assert found["cellstack_saturated_units_ratio", "memory"] > 0.5


def test_a_cell_without_gates_has_no_memory_length(tmp_path, monkeypatch):
    found = sampled(network("rnn", scale=3.0), tmp_path, monkeypatch)
    assert found["cellstack_saturated_units_ratio", "memory"] > 0.5
    assert ("cellstack_memory_steps", "memory") not in found


def test_a_sample_is_taken_rarely_and_leaves_the_answers(tmp_path):
    async def test(models, model):
        x = np.random.default_rng(1).standard_normal((30, WIDTH)).astype(np.float32)
        session, rows = await model.open(), np.zeros(30, model.rows.inputs)
        rows["x"] = x
        found, samples = [], set()
        for start in range(0, 30, 5):
            exposition(models)
            found.append((await model.steps(session, rows[start : start + 5])).rows["memory"])
            samples.add(id(model.worker.recorder.sample))
        assert len(samples) == 1
        stream = model.network.stream()
        assert (np.concatenate(found) == np.concatenate([stream.step(one[None]) for one in x])).all()

    served(network(), test, tmp_path)


def test_spans_of_opentelemetry_contain_no_token(tmp_path, monkeypatch):
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    provider, spans = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)

    async def test(models, model):
        app = application(models)

        async def get(path, query=""):
            scope = {"type": "http", "method": "GET", "path": path, "query_string": query.encode(), "headers": []}
            sent = []

            async def receive():
                return {"type": "http.request", "body": b""}

            async def send(message):
                sent.append(message)

            await app(scope, receive, send)
            return sent[0]["status"]

        session = await model.open()
        assert await get("/models/vad") == 200
        assert await get(f"/sessions/{session.token}") == 200
        assert await get("/models", "access_token=secret") == 200
        assert await get("/metrics") == 200

    served(network(), test, tmp_path)
    assert [span.attributes["url.path"] for span in spans.get_finished_spans()] == ["/models/vad"]
