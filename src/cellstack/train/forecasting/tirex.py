"""Forecasts by TiRex and TiRex-2, whole or continued patch by patch. Needs no torch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cellstack.network import Network, processors
from cellstack.nodes.cell_arrays import WEIGHTS
from cellstack.nodes.checks import check_choice, check_flag, check_integer
from cellstack.train.checks import UsageError, is_count
from cellstack.train.forecasting.forecasts import Forecasts
from cellstack.train.forecasting.tirex_running import Array, Model, Together
from cellstack.train.forecasting.tirex_scaling import (
    Floats,
    Scaling,
    ScalingSettings,
    finished,
    last_observed,
    mirrored,
)
from cellstack.train.forecasting.tirex_series import LARGEST, Group, Prepared, groups_of, shaped
from cellstack.train.forecasting.tirex_tables import forecasts_of_table


class TiRexForecaster:
    """Forecasts series with a network of TiRex or TiRex-2: `cellstack.load` returns such networks.

    A TiRex-2 forecasts the variates of a group together, and uses covariates. A context shorter than the model's is
    preceded by missing values, of a longer one the end is used, as in the packages of the models.

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
        self._model = Model(network, weights)

    @property
    def quantiles(self) -> tuple[float, ...]:
        """The levels of the quantiles that are forecast."""
        return self.settings.quantiles

    def forecast(
        self,
        series: Any,
        horizon: int,
        *,
        past: Any = None,
        known: Any = None,
        scaling: Scaling | None = None,
        pad: bool = True,
        together: int | None = None,
        threads: int | None = None,
    ) -> Any:
        """Forecast the observations after one or more series, or groups of series.

        Args:
            series: one series `[T]`; several, each forecast by itself, `[B, T]`; or groups `[B, V, T]`, whose variates
                are forecast together. Also a list of series `[T]` or groups `[V, T]` of any sizes. NaN for missing
                observations.
            horizon: the number of observations to forecast. TiRex-2 has a longest one.
            past: covariates up to the forecast: `[P, T]` for one series, else an array or a list of one `[P, T]`, or
                None, for each series or group. Only of a TiRex-2, as are `known` and groups.
            known: covariates whose future is known, `[K, T + horizon]` in the same way; later values aren't used. One
                without any value after T is treated as one of `past`.
            scaling: as in a stream, to repeat its forecasts; None: of the context.
            pad: whether a context shorter than the model's is preceded by missing values up to the model's context, as
                in its training; False is faster. TiRex always pads.
            together: the number of patches that TiRex forecasts in one run; for the next ones the context moves, and is
                scaled anew. None: 1, the default of its package. TiRex-2 forecasts all in one run.
            threads: the number of threads, which share the groups if there are enough; None: one per processor.

        Returns:
            The quantiles: `[horizon, Q]` for one series, `[B, horizon, Q]` for several, `[B, V, horizon, Q]` for
            groups; a list of `[V, horizon, Q]` if groups have different numbers of variates.

        Raises:
            UsageError: values that aren't numbers, or that float32 can't hold; an invalid horizon; covariates of other
                lengths; the scaling of other series; groups, covariates or `pad=False` for a TiRex.
            TypeError: `pad` isn't a bool.
        """
        settings = self.settings
        patches = self._patches(horizon)
        groups, axes = self._groups(series, past, known, horizon, pad)
        if together is not None and (settings.second or not is_count(together)):
            raise UsageError("TiRexForecaster: expected together to be a count of patches, and only for a TiRex")
        if scaling is not None and not isinstance(scaling, Scaling):
            raise UsageError("TiRexForecaster: expected scaling to be that of a stream of as many series")
        threads = processors() if threads is None else check_integer("TiRexForecaster", "threads", threads)
        prepared = Prepared(groups, scaling, settings)
        parts, done = [], 0
        while done < patches:
            count = patches if settings.second else min(patches - done, together or 1)
            future = settings.future if len(prepared.values) > len(prepared.last) else None
            window, steps = self._window(prepared, done, pad, future or (count - 1) * settings.patch)
            used = scaling or Scaling.of(window, prepared.differenced, settings)
            tokens = _tokens(used.apply(window, settings), settings)
            parts.append(self._undone(self._outputs(tokens, steps + count - 1, count, prepared, threads), used))
            done += count
        return self._finished(np.concatenate(parts, axis=1)[:, :horizon], prepared, axes)

    def predict(
        self,
        data: Any,
        target: str | Sequence[str],
        horizon: int,
        *,
        inputs: str | Sequence[str] = (),
        known: str | Sequence[str] = (),
        origin: Any = None,
        pad: bool = True,
        threads: int | None = None,
        **reading: Any,
    ) -> Forecasts:
        """Forecast columns of a table; those of a series together.

        Args:
            data: a pandas or polars frame, the name of a CSV or Parquet file, or a `Table`.
            target: the columns to forecast.
            horizon: the number of steps to forecast.
            inputs: the columns of covariates up to the forecast.
            known: those of covariates whose future is known: the table has them in later rows.
            origin: the last row to use: see `Network.predict`; None: in each series the last row with a target.
            pad, threads: see `forecast`.
            reading: arguments of `read_table`, such as `id` and `time`.

        Returns:
            A `Forecasts`, with an entry for each series: see `Network.predict`.

        Raises:
            UsageError, FormatError: see `read_table` and `forecast`; also a column that doesn't exist.
        """
        how = {"inputs": inputs, "known": known, "origin": origin, "pad": pad, "threads": threads}
        found, notes = forecasts_of_table(self, data, target, horizon, **how, **reading)
        for note in notes:
            warnings.warn(note, stacklevel=2)
        return found

    def stream(
        self, series: Any, *, past: Any = None, known: Any = None, pad: bool = True, threads: int = 1
    ) -> TiRexStream:
        """Return a stream that continues series or groups, patch by patch, without computing their context again.

        The scaling, and whether a series is differenced, stay those of this first context: see `TiRexStream`.

        Args:
            series: the first context, as for `forecast`.
            past: covariates up to the forecast, as for `forecast`; `TiRexStream.step` takes their next patches.
            known: covariates `[K, T + n]` whose future is known for all n steps that the stream will take and forecast.
            pad: see `forecast`.
            threads: the number of threads.

        Raises:
            UsageError: see `forecast`; both `past` and `known`, which together can't be continued.
            TypeError: `pad` isn't a bool.
        """
        groups, axes = self._groups(series, past, known, None, pad)
        check_integer("TiRexForecaster", "threads", threads)
        return TiRexStream(self, groups, axes, pad, threads)

    def _groups(self, series: Any, past: Any, known: Any, ahead: int | None, pad: bool) -> tuple[list[Group], int]:
        """Return groups, with the negated ones if signs are flipped, and the number of axes: see `groups_of`."""
        groups, axes = groups_of(series, past, known, ahead)
        check_flag("TiRexForecaster", "pad", pad)
        if not pad and not self.settings.second:
            raise UsageError("TiRexForecaster: expected pad=True for a TiRex, which always pads its context")
        if not self.settings.second and any(sum(map(len, group)) > 1 for group in groups):
            raise UsageError("TiRexForecaster: groups and covariates aren't supported by a TiRex, only by a TiRex-2")
        return groups + [group.negated for group in groups if self.settings.sign_flip], axes

    def _window(self, prepared: Prepared, moved: int, pad: bool, future: int) -> tuple[Floats, int]:
        """Return what the network sees, `[rows, T]`, as whole patches, and the number of patches before the forecast.

        Args:
            prepared: the series. At most a context of them is used.
            moved: the number of patches, without values, by which the forecast moved.
            pad: see `forecast`.
            future: the number of steps after the series, whole patches, NaN where there is no value.
        """
        settings, values = self.settings, prepared.values
        past = np.pad(values[:, : prepared.steps], ((0, 0), (0, moved * settings.patch)), constant_values=np.nan)
        past, after = past[:, -settings.context :], values[:, prepared.steps :]
        patches = settings.context // settings.patch if pad else -(-past.shape[1] // settings.patch)
        missing = patches * settings.patch - past.shape[1], future - after.shape[1]
        window = np.concatenate([past, after], axis=1)
        return np.pad(window, ((0, 0), missing), constant_values=np.nan), patches

    def _outputs(self, tokens: Array, steps: int, count: int, prepared: Prepared, threads: int) -> Array:
        """Return the last `count` outputs of the targets up to a step.

        If there are enough groups, each thread runs the whole network over some of them: threads that divide each node
        wait for each other after it, and some nodes use only one thread.
        """
        y = np.empty((len(prepared.last), count, len(self.quantiles) * self.settings.patch), np.float32)

        def run(each: Together) -> None:
            each.foresee(tokens, slice(steps - count, steps))
            y[each.targets] = each.run(tokens[:, :steps], count, keep=False)

        for targets, covariates, known in prepared.alike():
            apart = threads if len(targets) >= threads else 1
            rows = zip(np.array_split(targets, apart), np.array_split(covariates, apart), strict=True)
            with ThreadPoolExecutor(apart) as pool:
                list(pool.map(run, [Together(self._model, *part, known, threads // apart) for part in rows]))
        return y

    def _patches(self, horizon: int) -> int:
        """Return the number of patches of a horizon."""
        longest = self.settings.future
        horizon = int(horizon) if isinstance(horizon, np.integer) else horizon
        if not is_count(horizon) or (longest is not None and horizon > longest):
            expected = "a count of observations" if longest is None else f"a count from 1 to {longest}"
            raise UsageError(f"TiRexForecaster: expected horizon to be {expected}, got {horizon!r:.80}")
        return -(-horizon // self.settings.patch)

    def _undone(self, outputs: Any, scaling: Scaling) -> Floats:
        """Return outputs `[R, n, Q·patch]` as `[R, n·patch, Q]`, in the units of the series or of its differences."""
        batch, count, _ = outputs.shape
        apart = outputs.reshape(batch, count, len(self.quantiles), self.settings.patch).swapaxes(2, 3)
        return scaling.of_first(batch).undo(
            apart.reshape(batch, -1, len(self.quantiles)).astype(np.float64), self.settings
        )

    def _finished(self, outputs: Floats, prepared: Prepared | TiRexStream, axes: int) -> Any:
        """Return outputs in the units of the series; of a sign flip, the mean of both. `axes`: see `groups_of`."""
        if self.settings.second:
            differenced = prepared.differenced[: len(outputs)]
            outputs = finished(outputs, differenced, prepared.last, self.settings)
        groups = prepared.groups
        if self.settings.sign_flip:
            half = len(outputs) // 2
            outputs = (outputs[:half] - outputs[half:, :, mirrored(self.settings)]) / 2
            groups = groups[: len(groups) // 2]
        return shaped(outputs, groups, axes)


class TiRexStream:
    """Series that are continued patch by patch: a new patch costs one step of the network.

    A full forecast scales a series with the mean and the standard deviation of its whole context, so that each new
    observation changes all inputs of the network. A stream keeps the scaling of its first context, and whether the
    series is differenced. Its forecasts are those of the network over all patches since the start of the first context,
    with this scaling and, with `pad`, the missing values before that context. With `pad=False`,
    `TiRexForecaster.forecast` repeats them for a series that isn't longer than a context. `drift` says how much the
    statistics of the last observations differ from the scaling, and `restarted` returns a stream with a new one.

    Covariates whose future is known are read in both directions: all their values are given at the start, and end the
    sequence that the network sees.

    Attributes:
        scaling: of the first context: of all variates, then of their covariates.
        differenced: whether each variate is differenced.
        last: the last observation of each variate.
        groups: the rows of each group in these arrays: its variates, its past and its known covariates.
    """

    def __init__(self, forecaster: TiRexForecaster, groups: list[Group], axes: int, pad: bool, threads: int) -> None:
        if any(len(group.past) and len(group.known) for group in groups):
            raise UsageError(
                "TiRexStream: past and known together aren't supported: the known ones are read backwards, and attend "
                "to the others, so that each new value changes the whole context: forecast the series in full"
            )
        self._forecaster, self._axes, self._options = forecaster, axes, (pad, threads)
        settings, prepared = forecaster.settings, Prepared(groups, None, forecaster.settings)
        self._left = prepared.values.shape[1] - prepared.steps  # steps of known covariates
        known = len(prepared.values) > prepared.moving
        future = -(-max(self._left, settings.future or 0) // settings.patch) * settings.patch if known else 0
        window, patches = forecaster._window(prepared, 0, pad, future)
        self.differenced, self.last, self.groups = prepared.differenced, prepared.last, prepared.groups
        self.scaling = Scaling.of(window, self.differenced, settings)
        self._moving, self._known = prepared.moving, prepared.observed[prepared.moving :]
        recent = prepared.observed[: prepared.moving, : prepared.steps]
        self._recent = recent[:, -settings.context - 1 :]
        self._runs = [Together(forecaster._model, *rows, threads) for rows in prepared.alike()]
        tokens = _tokens(self.scaling.apply(window, settings), settings)
        for run in self._runs:
            run.foresee(tokens)
        self._outputs = self._run(tokens[:, :patches], 1)

    def step(self, values: Any, past: Any = None) -> None:
        """Take the next observations.

        Args:
            values: whole patches: `[n·patch]` for one series, else `[B, n·patch]` or `[B, V, n·patch]`; NaN for missing
                observations.
            past: those of the covariates without a known future, as for `TiRexForecaster.forecast`.

        Raises:
            UsageError: other numbers of series, covariates or observations, values that aren't numbers, or that float32
                can't hold, scaled or not; more steps than the known covariates have.
        """
        forecaster = self._forecaster
        settings, patch = forecaster.settings, forecaster.settings.patch
        groups, _ = forecaster._groups(values, past, None, None, True)
        sizes = [(len(group.targets), len(group.past)) for group in groups]
        own = [(len(targets), len(covariates)) for targets, covariates, _ in self.groups]
        steps = {group.targets.shape[1] for group in groups}
        if sizes != own or len(steps) > 1 or max(steps) % patch:
            flips = 1 + settings.sign_flip
            want, got = (
                f"{sum(a for a, _ in found) // flips} series"
                + f" and {sum(b for _, b in found) // flips} of past" * covered
                for found in (own, sizes)
                for covered in [any(b for _, b in own + sizes)]
            )
            counts = ", ".join(map(str, sorted(steps)))
            raise UsageError(
                f"TiRexStream: expected {want} of a multiple of {patch} observations, got {got} of {counts}"
            )
        (count,) = steps
        if len(self._known) and count > self._left:
            raise UsageError(f"TiRexStream: expected at most {self._left} observations, as known has left, got {count}")
        new = np.concatenate([row for part in range(2) for group in groups for row in group[part][:, None]])
        before, differenced = self._recent[:, -1:], self.differenced[: self._moving, None]
        changes = np.where(differenced, np.diff(new, axis=1, prepend=before), new)
        scaling = self.scaling.of_first(self._moving)
        self._outputs = self._run(_tokens(scaling.apply(changes, settings), settings), 1)
        self._left -= count
        targets = new[: len(self.last)]
        observed = (~np.isnan(targets)).any(axis=1)
        self.last = np.where(observed, [last_observed(row) for row in targets], self.last)
        self._recent = np.concatenate([self._recent, new], axis=1)[:, -settings.context - 1 :]

    def forecast(self, horizon: int) -> Any:
        """Forecast the observations after the last patch, without changing the stream.

        Args:
            horizon: the number of observations. More than one patch costs a step of the network for each further one.

        Returns:
            The quantiles, as `TiRexForecaster.forecast` returns them.

        Raises:
            UsageError: an invalid horizon, or one beyond the known covariates.
        """
        more = self._forecaster._patches(horizon) - 1
        if len(self._known) and horizon > self._left:
            raise UsageError(f"TiRexStream: expected horizon to be up to {self._left}, as known is, got {horizon}")
        outputs = self._outputs
        if more:
            missing = np.zeros((self._moving, more, 2 * self._forecaster.settings.patch), np.float32)
            outputs = np.concatenate([outputs, self._run(missing, more, keep=False)], axis=1)
        outputs = self._forecaster._undone(outputs, self.scaling)
        return self._forecaster._finished(outputs[:, :horizon], self, self._axes)

    @property
    def drift(self) -> tuple[Any, Any]:
        """How the scaling of the last observations, of a context's length, differs from the stream's.

        Both are `[B]`, of groups `[B, V]`. The change of the mean, in units of the stream's scale; and the new scale,
        divided by the stream's.
        """
        recent, settings, count = self._recent[: len(self.last)], self._forecaster.settings, len(self.last)
        differenced, scaling = self.differenced[:count], self.scaling.of_first(count)
        values = np.where(differenced[:, None], np.diff(recent, axis=1, prepend=np.nan), recent)
        now = Scaling.of(values[:, -settings.context :], differenced, settings)
        groups = self.groups[: len(self.groups) // (1 + settings.sign_flip)]
        change, ratio = (now.loc - scaling.loc) / scaling.scale, now.scale / scaling.scale
        series = sum(len(targets) for targets, _, _ in groups)
        change, ratio = (shaped(one[:series, 0], groups, max(self._axes, 1)) for one in (change, ratio))
        return change, ratio

    def restarted(self) -> TiRexStream:
        """Return a stream with the last observations, of a context's length, as its first context."""
        settings = self._forecaster.settings
        recent = self._recent[:, -settings.context :]
        count, groups = recent.shape[1], []
        known = self._known[:, self._known.shape[1] - self._left - count :]
        for targets, past, ahead in self.groups:
            there = ~np.isnan(recent[[*targets, *past]]).all(axis=0)
            begun = min(int(there.argmax()), count - 1)
            parts = recent[targets], recent[past], known[[row - self._moving for row in ahead]]
            groups.append(Group(*(part[:, begun:] for part in parts)))
        return TiRexStream(self._forecaster, groups, self._axes, *self._options)

    def _run(self, tokens: Array, count: int, keep: bool = True) -> Array:
        """Run the network over whole patches `[rows, n, 2·patch]`, and return the last outputs of the variates."""
        settings = self._forecaster.settings
        y = np.empty((len(self.last), count, len(settings.quantiles) * settings.patch), np.float32)
        for run in self._runs:
            y[run.targets] = run.run(tokens, count, keep)
        return y


def _tokens(scaled: Floats, settings: ScalingSettings) -> Array:
    """Return scaled observations `[rows, n·patch]` as the network's input."""
    if (np.abs(scaled) > LARGEST).any():  # with the scaling of other observations
        raise UsageError(
            "TiRexForecaster: expected observations that float32 can hold after scaling, got one that is too large for "
            "the scaling of an earlier context: make a new stream, or forecast with scaling=None"
        )
    patches = scaled.reshape(len(scaled), -1, settings.patch)
    there = ~np.isnan(patches)
    return np.concatenate([np.where(there, patches, 0.0), there], axis=2).astype(np.float32)
