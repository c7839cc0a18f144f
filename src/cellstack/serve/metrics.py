"""Metrics of a server for Prometheus: counts, latencies and batch sizes of each model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from cellstack.serve.models import Model, Models
from cellstack.serve.worker import SECONDS, SIZES

try:
    from prometheus_client import CollectorRegistry, ProcessCollector
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "metrics need prometheus-client: pip install 'cellstack[serve]'", name=error.name
    ) from error

LABELS = ["model", "version"]


class ServeCollector(Collector):
    """The metrics of all models at the time of a scrape. See docs/serve.md for their names."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """Return the metrics."""
        models = self._models.all()
        stepped = [model for model in models if model.rows is not None]

        def each(kind: Any, name: str, text: str, of: Any, among: Iterable[Model] = stepped) -> Metric:
            family = kind(f"cellstack_{name}", text, labels=LABELS)
            for model in among:
                family.add_metric(labels_of(model), of(model))
            return family

        yield each(GaugeMetricFamily, "model", "Models that are loaded", lambda model: 1, models)
        yield each(GaugeMetricFamily, "sessions", "Open sessions", lambda model: len(model.sessions))
        yield each(GaugeMetricFamily, "sessions_limit", "Largest number of open sessions", lambda m: m.capacity)
        yield each(CounterMetricFamily, "sessions_opened", "Sessions that were opened", lambda model: model.opened)
        yield each(CounterMetricFamily, "sessions_closed", "Sessions that were closed", lambda model: model.closed)
        yield each(CounterMetricFamily, "frames", "Frames that were processed", lambda model: model.worker.frames)
        yield each(
            CounterMetricFamily, "frames_refused", "Frames that were refused", lambda model: model.worker.refused
        )
        yield each(GaugeMetricFamily, "queue_items", "Groups of frames that wait", lambda model: model.worker.waiting)
        latency = HistogramMetricFamily(
            "cellstack_step_latency_seconds", "Time from a frame's arrival to its answer, in the server", labels=LABELS
        )
        sizes = HistogramMetricFamily("cellstack_batch_size", "Frames per step of the network", labels=LABELS)
        for model in stepped:
            worker, labels = model.worker, labels_of(model)
            latency.add_metric(labels, buckets(SECONDS, worker.latencies), worker.seconds)
            sizes.add_metric(labels, buckets(SIZES, worker.sizes), worker.frames)
        yield latency
        yield sizes


def labels_of(model: Model) -> list[str]:
    """Return the values of the labels of a model's metrics."""
    return [model.name, str(model.version)]


def buckets(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return counts by bound as the cumulative buckets of a histogram; the last count is of what is larger."""
    ends = [*(str(float(bound)) for bound in bounds), "+Inf"]
    return list(zip(ends, accumulate(counts), strict=True))


def exposition(models: Models, accept: str = "") -> tuple[str, bytes]:
    """Return the content type and the body for `GET /metrics`: the metrics of the models and of the process.

    Args:
        models: the models of the server.
        accept: the request's header Accept; the format is OpenMetrics if it names it.
    """
    encoder, content_type = choose_encoder(accept)
    registry = CollectorRegistry()
    registry.register(ServeCollector(models))
    ProcessCollector(registry=registry)
    return content_type, encoder(registry)
