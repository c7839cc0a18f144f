"""What TiRex and TiRex-2 compute before and after their network: differences, scaling, the widths of intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cellstack.cells.errors import FormatError

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

# Of TiRex-2: a series with a trend is differenced, and the distances of the quantiles from the median grow with the
# step t of the horizon: sqrt(scale)·t^(exponent - 0.5) times what the network returns.
TREND_SLOPE, TREND_R2 = 1.5, 0.87
RAW_SCALE, RAW_EXPONENT = 0.90, 0.52
DIFFERENCED_SCALE, DIFFERENCED_EXPONENT = 1.68, 0.51
LARGEST_SINH = 20.0
FEWEST = 4  # observations with which a trend is looked for


@dataclass(frozen=True)
class ScalingSettings:
    """What a network's metadata says about the series that it takes.

    Attributes:
        model: `"TiRex"` or `"TiRex-2"`.
        patch: the number of observations that the network takes in a step.
        context: the number of observations before the forecast that are used.
        quantiles: the levels of the quantiles, ascending.
        future: the longest horizon; None: any.
        epsilon: the smallest scale.
        arcsinh: whether scaled values are replaced by their arcsinh.
        binary: whether series of zeros and ones aren't scaled.
        difference: whether series with a trend are differenced.
        sign_flip: whether forecasts are averaged with those of the negated series.
    """

    model: str
    patch: int
    context: int
    quantiles: tuple[float, ...]
    future: int | None = None
    epsilon: float = 1e-5
    arcsinh: bool = False
    binary: bool = False
    difference: bool = False
    sign_flip: bool = False

    @classmethod
    def of(cls, metadata: Any) -> ScalingSettings:
        """Return the settings in a network's metadata.

        Raises:
            FormatError: the network isn't a TiRex or a TiRex-2, or its metadata is damaged.
        """
        found = metadata.get("tirex")
        try:
            made = cls(**{**found, "quantiles": tuple(found["quantiles"])})
            middle = made.quantiles[len(made.quantiles) // 2]
            good = made.model in ("TiRex", "TiRex-2") and made.patch > 0 and made.context % made.patch == 0
        except (TypeError, KeyError, IndexError):
            raise FormatError(f"expected a network of a TiRex or a TiRex-2, found the metadata {found!r:.80}") from None
        if not good or (made.model == "TiRex-2" and middle != 0.5):
            raise FormatError(f"expected the metadata of a TiRex or a TiRex-2, found {found!r:.200}")
        return made

    @property
    def second(self) -> bool:
        """Whether the model is a TiRex-2."""
        return self.model == "TiRex-2"


class Scaling(NamedTuple):
    """How series are scaled for the network, each `[B, 1]`: differences first, then `(x - loc) / scale`.

    Attributes:
        loc: the mean of the context.
        scale: its standard deviation.
        binary: whether the series holds zeros and ones only, and is left as it is.
        differenced: whether the network takes the differences of consecutive observations.
    """

    loc: Floats
    scale: Floats
    binary: Flags
    differenced: Flags

    @classmethod
    def of(cls, values: Floats, differenced: Flags, settings: ScalingSettings) -> Scaling:
        """Return the scaling for a context, `[B, T]`, whose rows are already differenced where they should be."""
        there = ~np.isnan(values)
        count = np.maximum(there.sum(axis=-1, keepdims=True), 1)
        loc = np.where(there, values, 0.0).sum(axis=-1, keepdims=True) / count
        spread = np.sqrt(np.where(there, (values - loc) ** 2, 0.0).sum(axis=-1, keepdims=True) / count)
        none = ~there.any(axis=-1, keepdims=True)
        if settings.second:
            scale = np.maximum(np.where(none, 1.0, spread), settings.epsilon)
        else:
            scale = np.where(none, 1.0, np.where(spread == 0, np.abs(loc) + settings.epsilon, spread))
        binary = np.zeros_like(none)
        if settings.binary:
            binary = ((values == 0) | (values == 1) | ~there).all(axis=-1, keepdims=True)
        return cls(np.where(binary, 0.0, loc), np.where(binary, 1.0, scale), binary, differenced[:, None])

    def of_first(self, count: int) -> Scaling:
        """Return the scaling of the first series."""
        loc, scale, binary, differenced = self
        return Scaling(loc[:count], scale[:count], binary[:count], differenced[:count])

    def apply(self, values: Floats, settings: ScalingSettings) -> Floats:
        """Return values `[B, T]` scaled."""
        scaled = (values - self.loc) / self.scale
        return np.where(self.binary, scaled, np.arcsinh(scaled)) if settings.arcsinh else scaled

    def undo(self, outputs: Floats, settings: ScalingSettings) -> Floats:
        """Return outputs of the network `[B, T, Q]` in the units of the series or of its differences."""
        loc, scale, binary, _ = (part[..., None] for part in self)
        if settings.arcsinh:
            outputs = np.where(binary, outputs, np.sinh(np.clip(outputs, -LARGEST_SINH, LARGEST_SINH)))
        return outputs * scale + loc


def has_trend(row: Floats) -> bool:
    """Return whether TiRex-2 differences a series `[T]`: a line describes it well and rises or falls enough.

    With observations scaled to a standard deviation of 1, the line's change over the whole series has to be at least
    `TREND_SLOPE`, and its coefficient of determination at least `TREND_R2`.
    """
    at = np.flatnonzero(~np.isnan(row)).astype(np.float64)
    values = row[~np.isnan(row)]
    if len(values) < FEWEST or values.std(ddof=1) < 1e-12:
        return False
    at -= at.mean()
    centred = values - values.mean()
    correlation = (at @ centred) / np.sqrt((at @ at) * (centred @ centred))
    change = abs(correlation) / at.std(ddof=1) * len(row)
    return bool(change >= TREND_SLOPE and correlation**2 >= TREND_R2)


def differences(row: Floats) -> Floats:
    """Return the differences of consecutive observations of a series `[T]`, with 0 for the first one."""
    return np.concatenate([np.zeros(1), np.diff(row)])


def last_observed(row: Floats) -> float:
    """Return the last value of a series that isn't missing; 0 if all are."""
    there = np.flatnonzero(~np.isnan(row))
    return float(row[there[-1]]) if len(there) else 0.0


def finished(outputs: Floats, differenced: Flags, last: Floats, settings: ScalingSettings) -> Floats:
    """Return the forecasts of TiRex-2: widen the intervals with the horizon, and sum differences.

    Args:
        outputs: `[B, T, Q]`, in the units of the series or of its differences.
        differenced: `[B]`.
        last: the last observation of each series, `[B]`.
        settings: of the model.

    Returns:
        `[B, T, Q]`, in the units of the series.
    """
    steps = np.arange(1, outputs.shape[1] + 1)[:, None]
    middle = outputs.shape[2] // 2
    median = outputs[:, :, middle : middle + 1]
    offset = outputs - median
    raw = median + np.sqrt(RAW_SCALE) * steps ** (RAW_EXPONENT - 0.5) * offset
    signs = np.sign(offset.sum(axis=1, keepdims=True))
    band = signs * np.sqrt((offset * offset).cumsum(axis=1)) * steps ** (DIFFERENCED_EXPONENT - 0.5)
    summed = median.cumsum(axis=1) + np.sqrt(DIFFERENCED_SCALE) * band + last[:, None, None]
    return np.where(differenced[:, None, None], summed, raw)


def mirrored(settings: ScalingSettings) -> list[int]:
    """Return for each quantile the index of its complement, with which a negated series is forecast.

    Raises:
        FormatError: there is none.
    """
    levels = np.array(settings.quantiles)
    nearest = np.abs(levels[None] - (1 - levels[:, None])).argmin(axis=1)
    if np.abs(levels[nearest] - (1 - levels)).max() > 1e-6:
        raise FormatError(f"expected quantiles that are symmetric around 0.5, found {settings.quantiles}")
    return nearest.tolist()


def padded(rows: Sequence[Floats]) -> Floats:
    """Return series of any lengths as `[B, T]`, with NaN before the shorter ones."""
    longest = max(map(len, rows))
    return np.stack([np.concatenate([np.full(longest - len(row), np.nan), row]) for row in rows])
