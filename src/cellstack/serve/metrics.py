"""Metrics of a server for Prometheus: counts, latencies and batch sizes of each model, and figures of its states."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstack.inspect.diagnostics import FLAT
from cellstack.serve.models import Model, Models
from cellstack.serve.tracing import Sample, arrays_of, recorder_of, why_not_traced
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

if TYPE_CHECKING:
    from cellstack.inspect.trace import CellTrace

EVERY = 10.0  # seconds between two samples of states
SAMPLED = 64  # sessions of a sample
NEAR_ONE = 0.95  # |h| of a saturated unit of a cell without c
LABELS = ["model", "version"]


class ServeCollector(Collector):
    """The metrics of all models at the time of a scrape. See docs/serve.md for their names."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._drift: dict[Model, Drift] = {}

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
        yield from self._drifts(stepped)

    def _drifts(self, models: Sequence[Model]) -> Iterator[Metric]:
        self._drift = {model: self._drift.get(model) or Drift(model) for model in models}
        saturated = GaugeMetricFamily(
            "cellstack_saturated_units_ratio",
            f"Share of units with |tanh(c)| above {FLAT}, or |h| above {NEAR_ONE} in cells without c, in a sample",
            labels=[*LABELS, "cell"],
        )
        memory = GaugeMetricFamily(
            "cellstack_memory_steps",
            "Steps in which a cell forgets half of its state, median of the units, in a sample",
            labels=[*LABELS, "cell"],
        )
        for model, drift in self._drift.items():
            drift.update()
            for family, figures in ((saturated, drift.saturated), (memory, drift.memory)):
                for cell, value in figures.items():
                    family.add_metric([*labels_of(model), cell], value)
        yield saturated
        yield memory


class Drift:
    """Figures of a model's cells in a sample of its sessions, taken from one batch at most every 10 seconds.

    Attributes:
        saturated: the share of saturated units by cell.
        memory: the median half-life of the units' states by cell, in steps, for cells with gates that keep a state.
    """

    def __init__(self, model: Model) -> None:
        self._model, self._recorder = model, recorder_of(model)
        self._traced = why_not_traced(model.network) is None
        self._sample: Sample | None = None
        self._requested = -EVERY
        self.saturated: dict[str, float] = {}
        self.memory: dict[str, float] = {}

    def update(self) -> None:
        """Examine the newest sample, and request another one if it is time."""
        sample = self._recorder.sample
        if sample is not None and sample is not self._sample:
            self._sample = sample
            self._examine(sample)
        now = time.monotonic()
        if now - self._requested >= EVERY:
            self._requested, self._recorder.wanted = now, SAMPLED

    def _examine(self, sample: Sample) -> None:
        network = self._model.network
        states = [
            type(entries[0])(*map(np.concatenate, zip(*entries, strict=True)))
            for entries in zip(*sample.states, strict=True)
        ]
        named = list(zip(cell_names(network), network.cells, states, strict=False))  # memories of nodes come after
        self.saturated = {name: saturated_share(cell, state) for name, cell, state in named}
        if not self._traced:
            return
        steps = [array[:, None] for array in arrays_of(sample.rows)]
        t = network.trace(dict(zip(network.inputs, steps, strict=True)), tuple(states))
        cells = (cell for node in t.values() for cell in node.cells)
        lives = zip(cell_names(network), map(median_half_life, cells), strict=True)
        self.memory = {name: steps for name, steps in lives if steps is not None}


def median_half_life(cell: CellTrace) -> float | None:
    """Return the median half-life of a cell's units in steps; None for a cell whose gates don't keep a state."""
    try:
        return float(np.median(cell.half_lives()))
    except ValueError:
        return None


def cell_names(network: Any) -> list[str]:
    """Return the names of a network's cells, in the order of its state."""
    nodes = zip(network.names, network.nodes, strict=True)
    counted = [(name, n, len(node.cells)) for name, node in nodes for n in range(len(node.cells))]
    return [name if count == 1 else f"{name}.cells[{n}]" for name, n, count in counted]


def saturated_share(cell: Any, state: Any) -> float:
    """Return the share of saturated units in the states of some sessions.

    Args:
        cell: the cell.
        state: its states, each array `[n, H]`.
    """
    spec = cell.spec
    kind = spec.of_kind
    values = getattr(state, kind.memory).astype(np.float64)
    if any(spec.activations[spec.slots.index(slot)].name == "tanh" for slot in kind.outputs):
        return float((np.abs(np.tanh(values)) > FLAT).mean())
    return float((np.abs(values) > NEAR_ONE).mean())


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
    return content_type, encoder(_registry(models))


@lru_cache(maxsize=1)  # a process has one server; the collector keeps the last sample of states
def _registry(models: Models) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(ServeCollector(models))
    ProcessCollector(registry=registry)
    return registry
