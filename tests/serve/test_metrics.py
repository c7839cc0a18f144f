"""The metrics of a server: counts and histograms."""

import asyncio

import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parsed_open
from prometheus_client.parser import text_string_to_metric_families as parsed

from cellstack import CellSpec, Network
from cellstack.formats import save
from cellstack.nodes import Cell, Recurrent
from cellstack.serve import Limits, Models
from cellstack.serve.app import application
from cellstack.serve.metrics import exposition

WIDTH, H = 3, 5


def network():
    new = np.random.default_rng(0).standard_normal
    spec = CellSpec(WIDTH, H)
    arrays = {name: new(shape).astype(np.float32) for name, shape in spec.shapes.items()}
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
