"""Forecasts of single series by TiRex and TiRex-2, whole or continued patch by patch. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstack.network import Network, processors
from cellstack.nodes import Merge, Select
from cellstack.nodes.cell_arrays import WEIGHTS
from cellstack.nodes.checks import check_choice, check_flag, check_integer
from cellstack.train.checks import UsageError, is_count, unmasked
from cellstack.train.forecasting.tirex_scaling import (
    Floats,
    Scaling,
    ScalingSettings,
    differences,
    finished,
    has_trend,
    last_observed,
    mirrored,
    padded,
)

LARGEST = float(np.finfo(np.float32).max)


class TiRexForecaster:
    """Forecasts series with a network of TiRex or TiRex-2: `cellstack.load` returns such networks.

    Each series is forecast for itself. A context shorter than the model's is preceded by missing values, of a longer
    one the end is used, as in the packages of the models.

    Args:
        network: the network.
        weights: the number format of its matrices in forecasts and streams, `"float32"`, `"bfloat16"` or `"int8"`: see
            `Network.run`; None: the network's own. Fewer bits are faster and change forecasts a little.

    Raises:
        TypeError: something else than a network.
        FormatError: another network.
        ValueError: unknown weights.

    Attributes:
        network: the network.
        weights: the number format.
        settings: the model's patch, context, longest horizon and so on.
    """

    def __init__(self, network: Network, weights: str | None = None) -> None:
        if not isinstance(network, Network):
            kind = type(network).__name__
            raise TypeError(f"TiRexForecaster: expected a Network, as cellstack.load(path) returns it, got {kind}")
        if weights is not None:
            check_choice("TiRexForecaster", "weights", weights, WEIGHTS)
        self.network, self.weights = network, weights
        self.settings = ScalingSettings.of(network.metadata)
        self._networks: dict[int, Network] = {}  # by the number of steps that they return

    @property
    def quantiles(self) -> tuple[float, ...]:
        """The levels of the quantiles that are forecast."""
        return self.settings.quantiles

    def forecast(
        self,
        series: Any,
        horizon: int,
        *,
        scaling: Scaling | None = None,
        pad: bool = True,
        together: int | None = None,
        threads: int | None = None,
    ) -> Floats:
        """Forecast the observations after one or more series.

        Args:
            series: `[T]` or `[B, T]`, or a list of series of any lengths; NaN for missing observations.
            horizon: the number of observations to forecast. TiRex-2 has a longest one.
            scaling: as in a stream, to repeat its forecasts; None: of the context.
            pad: whether a context shorter than the model's is preceded by missing values up to the model's context, as
                in its training; False is faster. TiRex always pads.
            together: the number of patches that TiRex forecasts in one run; for the next ones the context moves, and is
                scaled anew. None: 1, the default of its package. TiRex-2 forecasts all in one run.
            threads: the number of threads, which share the series if there are enough; None: one per processor.

        Returns:
            The quantiles, `[horizon, Q]` for one series, else `[B, horizon, Q]`.

        Raises:
            UsageError: a series that isn't numbers, or has numbers that float32 can't hold; an invalid horizon; the
                scaling of other series; `pad=False` for a TiRex.
            TypeError: `pad` isn't a bool.
        """
        rows, single = _rows(series)
        patches = self._patches(horizon)
        self._check_pad(pad)
        if together is not None and (self.settings.second or not is_count(together)):
            raise UsageError("TiRexForecaster: expected together to be a count of patches, and only for a TiRex")
        if self.settings.sign_flip:
            rows += [-row for row in rows]
        if scaling is not None and (not isinstance(scaling, Scaling) or len(scaling.loc) != len(rows)):
            raise UsageError("TiRexForecaster: expected scaling to be that of a stream of as many series")
        prepared = _Prepared(rows, scaling, self.settings)
        parts, done = [], 0
        while done < patches:
            count = patches if self.settings.second else min(patches - done, together or 1)
            values = np.pad(prepared.values, ((0, 0), (0, done * self.settings.patch)), constant_values=np.nan)
            context = _context(values, self.settings, pad)
            used = scaling or Scaling.of(context, prepared.differenced, self.settings)
            tokens = _tokens(used.apply(context, self.settings), self.settings, count - 1)
            parts.append(self._undone(self._outputs(tokens, count, threads), used))
            done += count
        return self._finished(np.concatenate(parts, axis=1)[:, :horizon], prepared, single)

    def stream(self, series: Any, *, pad: bool = True, threads: int = 1) -> TiRexStream:
        """Return a stream that continues one or more series, patch by patch, without computing their context again.

        The scaling, and whether a series is differenced, stay those of this first context: see `TiRexStream`.

        Args:
            series: the first context, as for `forecast`.
            pad: see `forecast`.
            threads: see `Network.stream`.

        Raises:
            UsageError: a series that isn't numbers, or has numbers that float32 can't hold; `pad=False` for a TiRex.
            TypeError: `pad` isn't a bool.
        """
        rows, single = _rows(series)
        self._check_pad(pad)
        return TiRexStream(self, rows, single, pad, threads)

    def _outputs(self, tokens: NDArray[np.float32], count: int, threads: int | None) -> NDArray[np.float32]:
        """Return the last `count` steps of the network's output.

        If there are enough series, each thread runs the whole network over some of them: threads that divide each node
        wait for each other after it, and some nodes use only one thread.
        """
        network = self._last_steps(count)
        threads = processors() if threads is None else check_integer("TiRexForecaster", "threads", threads)
        if threads == 1 or len(tokens) < threads:
            return network.run(tokens, threads=threads, weights=self.weights)[0]
        with ThreadPoolExecutor(threads) as pool:
            parts = pool.map(
                lambda part: network.run(part, threads=1, weights=self.weights)[0], np.array_split(tokens, threads)
            )
            return np.concatenate(list(parts))

    def _check_pad(self, pad: bool) -> None:
        check_flag("TiRexForecaster", "pad", pad)
        if not pad and not self.settings.second:
            raise UsageError("TiRexForecaster: expected pad=True for a TiRex, which always pads its context")

    def _last_steps(self, count: int) -> Network:
        """Return the network with only the last `count` steps of its output."""
        if count not in self._networks:
            self._networks[count] = last_steps(self.network, count)
        return self._networks[count]

    def _patches(self, horizon: int) -> int:
        """Return the number of patches of a horizon."""
        longest = self.settings.future
        horizon = int(horizon) if isinstance(horizon, np.integer) else horizon
        if not is_count(horizon) or (longest is not None and horizon > longest):
            expected = "a count of observations" if longest is None else f"a count from 1 to {longest}"
            raise UsageError(f"TiRexForecaster: expected horizon to be {expected}, got {horizon!r:.80}")
        return -(-horizon // self.settings.patch)

    def _undone(self, outputs: Any, scaling: Scaling) -> Floats:
        """Return outputs `[B, n, Q·patch]` as `[B, n·patch, Q]`, in the units of the series or of its differences."""
        batch, count, _ = outputs.shape
        apart = outputs.reshape(batch, count, len(self.quantiles), self.settings.patch).swapaxes(2, 3)
        return scaling.undo(apart.reshape(batch, -1, len(self.quantiles)).astype(np.float64), self.settings)

    def _finished(self, outputs: Floats, prepared: _Prepared | TiRexStream, single: bool) -> Floats:
        """Return outputs in the units of the series; of a sign flip, the mean of both."""
        if self.settings.second:
            outputs = finished(outputs, prepared.differenced, prepared.last, self.settings)
        if self.settings.sign_flip:
            half = len(outputs) // 2
            outputs = (outputs[:half] - outputs[half:, :, mirrored(self.settings)]) / 2
        return outputs[0] if single else outputs


class TiRexStream:
    """Series that are continued patch by patch: a new patch costs one step of the network.

    A full forecast scales a series with the mean and the standard deviation of its whole context, so that each new
    observation changes all inputs of the network. A stream keeps the scaling of its first context, and whether the
    series is differenced. Its forecasts are those of the network over all patches since the start of the first context,
    with this scaling and, with `pad`, the missing values before that context. With `pad=False`,
    `TiRexForecaster.forecast` repeats them for a series that isn't longer than a context. `drift` says how much the
    statistics of the last observations differ from the scaling, and `restarted` returns a stream with a new one.

    Attributes:
        scaling: of the first context.
        differenced: whether each series is differenced, `[B]`.
        last: the last observation of each series, `[B]`.
    """

    def __init__(
        self,
        forecaster: TiRexForecaster,
        rows: list[Floats],
        single: bool,
        pad: bool,
        threads: int,
    ) -> None:
        self._forecaster, self._single, self._options = forecaster, single, (pad, threads)
        settings = forecaster.settings
        if settings.sign_flip:
            rows = rows + [-row for row in rows]
        prepared = _Prepared(rows, None, settings)
        context = _context(prepared.values, settings, pad)
        self.differenced, self.last = prepared.differenced, prepared.last
        self.scaling = Scaling.of(context, self.differenced, settings)
        self._before = np.array([row[-1] for row in rows])  # the observation before the next patch, NaN if missing
        self._recent = padded(rows)[:, -settings.context - 1 :]
        self._stream = forecaster.network.stream(len(rows), threads, forecaster.weights)
        self._ahead = self._stream.fork()  # takes the steps of a horizon
        self._run(context)

    def step(self, values: Any) -> None:
        """Take the next observations.

        Args:
            values: `[n·patch]` for one series, else `[B, n·patch]`: whole patches; NaN for missing observations.

        Raises:
            UsageError: another number of series or of observations, or values that aren't numbers, or that float32
                can't hold, scaled or not.
        """
        rows, _ = _rows(values)
        patch, count = self._forecaster.settings.patch, len(self.last)
        flipped = self._forecaster.settings.sign_flip
        if flipped:
            rows = rows + [-row for row in rows]
        if len(rows) != count or any(len(row) != len(rows[0]) or len(row) % patch for row in rows):
            series = count // 2 if flipped else count
            got = f"{len(rows) // (1 + flipped)} of {', '.join(sorted({str(len(row)) for row in rows}))}"
            raise UsageError(f"TiRexStream: expected {series} series of a multiple of {patch} observations, got {got}")
        new = np.stack(rows)
        changes = np.diff(new, axis=1, prepend=self._before[:, None])
        self._run(np.where(self.differenced[:, None], changes, new))
        self._before = new[:, -1]
        observed = (~np.isnan(new)).any(axis=1)
        self.last = np.where(observed, [last_observed(row) for row in new], self.last)
        self._recent = np.concatenate([self._recent, new], axis=1)[:, -self._forecaster.settings.context - 1 :]

    def forecast(self, horizon: int) -> Floats:
        """Forecast the observations after the last patch, without changing the stream.

        Args:
            horizon: the number of observations. More than one patch costs a step of the network for each further one.

        Returns:
            The quantiles, `[horizon, Q]` for one series, else `[B, horizon, Q]`.

        Raises:
            UsageError: an invalid horizon.
        """
        more = self._forecaster._patches(horizon) - 1
        outputs = self._outputs
        if more:
            self._ahead.state = self._stream.state
            missing = np.zeros((len(self.last), more, 2 * self._forecaster.settings.patch), np.float32)
            outputs = np.concatenate([outputs, self._ahead.run(missing)], axis=1)
        outputs = self._forecaster._undone(outputs, self.scaling)
        return self._forecaster._finished(outputs[:, :horizon], self, self._single)

    @property
    def drift(self) -> tuple[Floats, Floats]:
        """How the scaling of the last observations, of a context's length, differs from the stream's, each `[B]`.

        The change of the mean, in units of the stream's scale; and the new scale, divided by the stream's.
        """
        recent, settings = self._recent, self._forecaster.settings
        values = np.where(self.differenced[:, None], np.diff(recent, axis=1, prepend=np.nan), recent)
        now = Scaling.of(values[:, -settings.context :], self.differenced, settings)
        series = len(self.last) // 2 if settings.sign_flip else len(self.last)
        change, ratio = (now.loc - self.scaling.loc) / self.scaling.scale, now.scale / self.scaling.scale
        return change[:series, 0], ratio[:series, 0]

    def restarted(self) -> TiRexStream:
        """Return a stream with the last observations, of a context's length, as its first context."""
        recent, settings = self._recent[:, -self._forecaster.settings.context :], self._forecaster.settings
        rows = [_begun(row) for row in (recent[: len(recent) // 2] if settings.sign_flip else recent)]
        return TiRexStream(self._forecaster, rows, self._single, *self._options)

    def _run(self, values: Floats) -> None:
        """Run the network over whole patches, and keep the output after the last one."""
        settings = self._forecaster.settings
        tokens = _tokens(self.scaling.apply(values, settings), settings, 0)
        self._outputs = self._stream.run(tokens)[:, -1:]


class _Prepared:
    """Series as the network takes them, before they are scaled.

    Args:
        rows: the series.
        scaling: says which of them are differenced; None: those with a trend, if the model differences.
        settings: of the model.

    Attributes:
        differenced: which of them are differenced, `[B]`.
        values: the series or their differences, `[B, T]`, with NaN before the shorter ones.
        last: the last observation of each, `[B]`.
    """

    def __init__(self, rows: Sequence[Floats], scaling: Scaling | None, settings: ScalingSettings) -> None:
        if scaling is None:
            self.differenced = np.array([settings.difference and has_trend(row) for row in rows])
        else:
            self.differenced = scaling.differenced[:, 0]
        pairs = zip(rows, self.differenced, strict=True)
        self.values = padded([differences(row) if changes else row for row, changes in pairs])
        self.last = np.array([last_observed(row) for row in rows])


def last_steps(network: Network, count: int) -> Network:
    """Return a network that returns the last steps of another one's output.

    What follows the last node with a memory and its residual runs for these steps only.
    """
    stateful = max(number for number, node in enumerate(network.nodes) if node.cells or node.memory is not None)
    place = next(
        number
        for number, node in enumerate(network.nodes)
        if number > stateful and isinstance(node, Merge) and node.mode == "add"
    )
    before, name = network.names[place], "last_steps"
    wires = [tuple(name if wire == before else wire for wire in wires) for wires in network.wires[place + 1 :]]
    return Network(
        [*network.nodes[: place + 1], Select(start=-count), *network.nodes[place + 1 :]],
        [*network.names[: place + 1], name, *network.names[place + 1 :]],
        inputs={name: network.shapes[name] for name in network.inputs},
        wires=[*network.wires[: place + 1], (before,), *wires],
        outputs=network.outputs,
    )


def _rows(series: Any) -> tuple[list[Floats], bool]:
    """Return series as a list of arrays, and whether there is only one, without a batch axis."""
    if hasattr(series, "columns"):
        raise UsageError(
            "TiRexForecaster: expected series [T] or [B, T], got a table, whose columns are series: pass "
            "table.to_numpy().T"
        )
    several = isinstance(series, (list, tuple)) and any(np.ndim(row) for row in series)
    try:
        rows = [_floats(row) for row in series] if several else _floats(series)
    except OverflowError:  # an integer beyond float64
        raise _too_large("more than 1e308") from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"TiRexForecaster: expected series of numbers, got {series!r:.80}: {error}") from None
    single = isinstance(rows, np.ndarray) and rows.ndim == 1
    arrays = [rows] if isinstance(rows, np.ndarray) and rows.ndim < 2 else list(rows)
    if not arrays or any(row.ndim != 1 or not len(row) for row in arrays):
        raise UsageError("TiRexForecaster: expected series [T] or [B, T], or a list of series [T], with T >= 1")
    if any(np.isinf(row).any() for row in arrays):
        raise UsageError("TiRexForecaster: expected finite observations, or NaN for missing ones, got infinite ones")
    largest = max((float(np.nanmax(np.abs(row), initial=0.0)) for row in arrays), default=0.0)
    if largest > LARGEST:
        raise _too_large(f"{largest:.3g}")
    return arrays, single


def _too_large(size: str) -> UsageError:
    return UsageError(
        f"TiRexForecaster: expected observations that float32 can hold, up to {LARGEST:.3g}, got one of size {size}: "
        "divide the series by a number"
    )


def _floats(row: Any) -> Floats:
    """Return numbers as float64, NaN where they are masked."""
    row = unmasked(row)
    if np.iscomplexobj(row):
        raise TypeError("complex numbers aren't supported")
    return np.asarray(row, np.float64)


def _begun(row: Floats) -> Floats:
    """Return a series without the missing observations at its start, but not empty."""
    return row[min(int(np.isnan(row).argmin()), len(row) - 1) :]


def _context(values: Floats, settings: ScalingSettings, pad: bool) -> Floats:
    """Return the last observations `[B, T]`, at most a context, as whole patches."""
    values = values[:, -settings.context :]
    whole = settings.context if pad else -(-values.shape[1] // settings.patch) * settings.patch
    return np.pad(values, ((0, 0), (whole - values.shape[1], 0)), constant_values=np.nan)


def _tokens(scaled: Floats, settings: ScalingSettings, missing: int) -> NDArray[np.float32]:
    """Return scaled observations `[B, n·patch]` as the network's input, and `missing` patches without any."""
    if (np.abs(scaled) > LARGEST).any():  # with the scaling of other observations
        raise UsageError(
            "TiRexForecaster: expected observations that float32 can hold after scaling, got one that is too large for "
            "the scaling of an earlier context: make a new stream, or forecast with scaling=None"
        )
    patches = scaled.reshape(len(scaled), -1, settings.patch)
    there = ~np.isnan(patches)
    tokens = np.concatenate([np.where(there, patches, 0.0), there], axis=2)
    return np.pad(tokens, ((0, 0), (0, missing), (0, 0))).astype(np.float32)
