"""The estimators in sktime's API: for series, panels and hierarchies of all its types.

Ref: sktime, "Implementing your own estimator", https://www.sktime.net/en/stable/developer_guide/add_estimators.html
"""

from __future__ import annotations

from copy import copy
from typing import Any, ClassVar, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.base import clone
from sktime.classification.base import BaseClassifier
from sktime.datatypes import get_cutoff
from sktime.forecasting.base import BaseForecaster
from sktime.regression.base import BaseRegressor

from cellstack import sklearn

__all__ = ["SequenceClassifier", "SequenceForecaster", "SequenceRegressor"]

Frame: TypeAlias = Any  # a pandas frame: most of pandas' return types are imprecise

TAGS = {
    "X_inner_mtype": "df-list",
    "capability:multivariate": True,
    "capability:unequal_length": True,
    "capability:missing_values": True,
    "capability:categorical_in_X": False,
    "python_dependencies": "torch",
}
SMALL: tuple[dict[str, Any], ...] = (
    {"units": 4, "epochs": 2, "random_state": 0},
    {"units": 3, "epochs": 2, "cell": "gru", "random_state": 0},
)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # those of sktime's default coverage, and quartiles


class _OfSequences:
    """What the classifier and the regressor share; `_usual` is the estimator's class."""

    _tags: ClassVar = TAGS
    _usual: ClassVar[Any]

    def __init__(self, estimator: Any = None):
        self.estimator = estimator
        super().__init__()

    def _fit(self, X: list[Any], y: NDArray) -> Any:
        copy: Any = clone(self.estimator or self._usual())
        self.estimator_ = copy.fit(_arrays(X), y)
        return self

    def _predict(self, X: list[Any]) -> NDArray:
        return self.estimator_.predict(_arrays(X))

    @classmethod
    def get_test_params(cls, parameter_set: str = "default") -> Any:
        """Return parameters for sktime's estimator checks.

        Args:
            parameter_set: ignored, as there is one set.
        """
        return [{"estimator": cls._usual(**small)} for small in SMALL]


class SequenceClassifier(_OfSequences, BaseClassifier):
    """`cellstack.sklearn.SequenceClassifier` as an sktime classifier.

    Args:
        estimator: the estimator, of which a copy is fitted as `estimator_`; None: one with default parameters.

    Example:
        >>> import numpy as np
        >>> from cellstack import sklearn
        >>> from cellstack.adapters.sktime import SequenceClassifier
        >>> X = np.random.default_rng(0).normal(size=(20, 2, 9))  # [n, C, T]
        >>> model = SequenceClassifier(sklearn.SequenceClassifier(units=4, epochs=2)).fit(X, np.array(["a", "b"] * 10))
        >>> model.predict(X).shape
        (20,)
    """

    _tags: ClassVar = {**TAGS, "capability:predict_proba": True}
    _usual = sklearn.SequenceClassifier

    def _predict_proba(self, X: list[Any]) -> NDArray[np.float64]:
        return self.estimator_.predict_proba(_arrays(X))


class SequenceRegressor(_OfSequences, BaseRegressor):
    """`cellstack.sklearn.SequenceRegressor` as an sktime regressor.

    Args:
        estimator: the estimator, of which a copy is fitted as `estimator_`; None: one with default parameters.

    Example:
        >>> import numpy as np
        >>> from cellstack import sklearn
        >>> from cellstack.adapters.sktime import SequenceRegressor
        >>> X = np.random.default_rng(0).normal(size=(20, 2, 9))  # [n, C, T]
        >>> model = SequenceRegressor(sklearn.SequenceRegressor(units=4, epochs=2)).fit(X, X[:, 0, -1])
        >>> model.predict(X).shape
        (20,)
    """

    _usual = sklearn.SequenceRegressor


class SequenceForecaster(BaseForecaster):
    """`cellstack.sklearn.SequenceForecaster` as an sktime forecaster.

    `fit` trains one network for all steps up to the last of `fh`, all columns of y and all series of a panel or
    hierarchy together. `predict` takes any `fh` up to that step. `update` with `update_params=False` adds newer values
    and keeps the network. Columns of X are known in advance, except those in the estimator's `inputs`, which are known
    up to the present. In each series, `fh` counts from its last row. An index of whole numbers counts steps, with gaps
    where some are missing; dates and periods are read like those of a table. After `pretrain` on a panel, `fit` and
    `update` keep the network and use it to forecast other series.

    Args:
        estimator: the estimator, of which a copy is fitted as `estimator_`; None: one with default parameters and
            quantiles from 0.05 to 0.95. Its `target`, `id` and `time` are taken from y and its index; its `horizon` is
            the minimum number of steps, even if the `fh` of `fit` is shorter.

    Raises:
        ValueError: an `fh` beyond the fitted steps, quantiles outside the range of the estimator's, a missing column or
            step in X, and the errors of the estimator.
        NotImplementedError: an `fh` within the sample.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> from cellstack import sklearn
        >>> from cellstack.adapters.sktime import SequenceForecaster
        >>> months = pd.period_range("2010-01", periods=96, freq="M")
        >>> y = pd.Series(np.sin(np.arange(96) * np.pi / 6) + 5, months)
        >>> model = SequenceForecaster(sklearn.SequenceForecaster(units=4, members=1, epochs=2)).fit(y, fh=[1, 2, 3])
        >>> model.predict().index[-1], model.predict_interval(fh=[3], coverage=0.8).shape
        (Period('2018-03', 'M'), (1, 2))
    """

    _tags: ClassVar = {
        "y_inner_mtype": ["pd.DataFrame", "pd-multiindex", "pd_multiindex_hier"],
        "X_inner_mtype": ["pd.DataFrame", "pd-multiindex", "pd_multiindex_hier"],
        "requires-fh-in-fit": False,
        "X-y-must-have-same-index": True,
        "capability:multivariate": True,
        "capability:exogenous": True,
        "capability:categorical_in_X": True,
        "capability:non_contiguous_X": False,
        "capability:missing_values": True,
        "capability:unequal_length": True,
        "capability:insample": False,
        "capability:pred_int": True,
        "capability:pred_int:insample": False,
        "capability:update": True,
        "capability:pretrain": True,
        "python_dependencies": "torch",
    }
    _config: ClassVar = {"remember_data": False}  # `_rows` has the data
    _X = _y = None  # unused attributes of sktime's base class

    def __init__(self, estimator: sklearn.SequenceForecaster | None = None):
        self.estimator = estimator
        super().__init__()

    def _fit(self, y: Frame, X: Frame | None, fh: Any) -> Any:
        if not self._is_pretrained():
            return self._pretrain(y, X, fh)
        self._rows = self._together(y, X)
        self.estimator_ = copy(self.estimator_).set_params(**self._reading())
        return self

    def _pretrain(self, y: Frame, X: Frame | None = None, fh: Any = None) -> Any:
        self.targets_ = [str(name) for name in y.columns]
        names = [] if X is None else list(X.columns)
        self.known_ = {name: f"X {name}" if str(name) in self.targets_ else str(name) for name in names}
        self._rows = self._together(y, X)
        self._learn(fh, 0)
        return self

    def _update(self, y: Frame, X: Frame | None = None, update_params: bool = True) -> Any:
        rows = _series(self._rows)
        for name, new in _series(self._together(y, X)).items():
            old = rows.get(name, new[:0])
            old = old[(old.index <= new.index[-1]) & ~old.index.isin(new.index)]  # updates may be earlier
            rows[name] = pd.concat([old, new]).sort_index()
        self._rows = _joined(rows, self._rows.index.names)
        if update_params and not self._is_pretrained():
            self._learn(self._fh, self.estimator_.recipe_.horizon)
        return self

    def _is_pretrained(self) -> bool:
        """Whether the network was pretrained on another panel and must not change."""
        return bool(getattr(self, "_pretrained_attrs", ()))

    def _predict(self, fh: Any, X: Frame | None) -> Frame:
        index, values = self._forecasts(fh, X, [0.5])
        return pd.DataFrame(values[:, :, 0], index, self._get_columns())

    def _predict_quantiles(self, fh: Any, X: Frame | None, alpha: list[float]) -> Frame:  # type: ignore[override]
        index, values = self._forecasts(fh, X, alpha)
        columns = self._get_columns("predict_quantiles", alpha=alpha)
        return pd.DataFrame(values.reshape(len(index), -1), index, columns)

    def _together(self, y: Frame, X: Frame | None) -> Frame:
        """Join y and the rows of X with the same index, with the estimator's column names."""
        if len(y.columns) != len(self.targets_):
            raise ValueError(f"expected {len(self.targets_)} columns in y, as in fit, got {len(y.columns)}")
        y, X = y.set_axis(self.targets_, axis=1), self._named(X)
        if X is None:
            return y
        lacking = y.index.difference(X.index)
        if len(lacking):
            raise ValueError(f"expected X to have every row of y, got none at {lacking[0]}")
        return y.join(X)

    def _named(self, X: Frame | None) -> Frame | None:
        """Return X with the estimator's column names."""
        columns = [] if X is None else list(X.columns)
        if set(columns) != set(self.known_):
            have, needed = (", ".join(map(str, names)) or "no column" for names in (columns, self.known_))
            raise ValueError(f"expected X to hold {needed}, as in fit, got {have}")
        return None if X is None else X.rename(columns=self.known_)

    def _learn(self, fh: Any, least: int) -> None:
        """Fit the estimator for the steps of `fh`, and at least for `least` steps and its own horizon."""
        estimator: Any = clone(self.estimator or sklearn.SequenceForecaster(quantiles=QUANTILES))
        for name in ("target", "id", "time"):
            if getattr(estimator, name):
                got = getattr(estimator, name)
                raise ValueError(f"expected an estimator without {name}, as y and its index determine it, got {got!r}")
        groups = _series(self._rows)
        steps = max(least, estimator.horizon or 0)
        for rows in groups.values():
            if fh is None:
                break
            seen = rows[self.targets_].notna().any(axis=1).to_numpy()
            unseen = int(np.argmax(seen[::-1]))  # rows at the end without a value, which are forecast too
            steps = max(steps, unseen + int(max(fh.to_relative(get_cutoff(rows, return_index=True)))))
        how = {"target": self.targets_, **self._reading()}
        if not estimator.known:
            how["known"] = [name for name in self.known_.values() if name not in (estimator.inputs or ())]
        self.estimator_ = estimator.set_params(**how, horizon=steps or None)
        self.estimator_.fit(self._table(groups))

    def _forecasts(self, fh: Any, X: Frame | None, levels: list[float]) -> tuple[Any, NDArray[np.float64]]:
        """Return the index of the steps of `fh`, and their quantiles `[steps, targets, levels]`."""
        recipe, groups, whole = self.estimator_.recipe_, _series(self._rows), {}
        knows = bool(recipe.known) or any(category.known for category in recipe.categories)
        known = self._named(X) if X is not None or knows else None
        ahead = {} if known is None else _series(known)
        for name, rows in groups.items():
            more = ahead.get(name, rows[:0])
            whole[name] = pd.concat([rows, more[more.index > rows.index[-1]]])
        forecasts = self.estimator_.forecasts(self._table(whole))
        values, quantiles, index, begin = forecasts.at(levels), [], [], 0
        for n, (name, rows) in enumerate(whole.items()):
            if forecasts.times is None:
                first = rows.index[0] + int(forecasts.origins[n]) - begin + 1
                steps: Any = pd.RangeIndex(first, first + values.shape[1])
                begin += rows.index[-1] - rows.index[0] + 1
            else:
                steps = pd.Index(forecasts.times[n])
            times, at = _places(fh, self._cutoff_of(groups[name]), steps)
            lacking = ~steps[: at.max() + 1].isin(_clock(rows.index))
            if knows and lacking.any():
                raise ValueError(
                    f"expected X to have a row at every step up to the last of fh, {times.max()}, got none at step "
                    f"{lacking.argmax() + 1}"
                )
            quantiles.append(values[n, at])
            index.append(pd.MultiIndex.from_product([*([part] for part in name), times]) if name else times)
        return index[0].append(index[1:]).set_names(self._rows.index.names), np.concatenate(quantiles)

    def _cutoff_of(self, rows: Frame) -> Any:
        """Return the last time of a series, with the frequency of its dates; with missing rows, that of the table."""
        last: Any = get_cutoff(rows, return_index=True)
        if isinstance(last, pd.DatetimeIndex) and last.freq is None:
            spacing = self.estimator_.network_.metadata["reading"]["freq"]
            try:
                last.freq = spacing
            except ValueError:
                raise ValueError(
                    f"expected dates at a frequency of pandas, got {last[0]} as the last of y, with rows spaced by "
                    f"{spacing}: use an index of periods for y, as from y.to_period('M')"
                ) from None
        return last

    def _reading(self) -> dict[str, Any]:
        """Return the estimator's parameters for reading the rows."""
        *series, time = self._index_names()
        return {"id": series, "time": "" if _counts(self._rows) else time}

    def _index_names(self) -> list[str]:
        """Return the names of the columns that hold the index."""
        taken, names = [*self.targets_, *self.known_.values()], []
        for n, name in enumerate(self._rows.index.names, 1 - self._rows.index.nlevels):
            name = str(name if name is not None else f"series{n or ''}" if n else "time")
            while name in taken:
                name += "_"
            names.append(name)
            taken.append(name)
        return names

    def _table(self, groups: dict[tuple[Any, ...], Frame]) -> Frame:
        """Return the rows of all series as the estimator's table."""
        if not _counts(self._rows):
            return _joined(groups, self._index_names()).reset_index()
        even = {name: rows.reindex(range(rows.index[0], rows.index[-1] + 1)) for name, rows in groups.items()}
        names = self._index_names()
        return _joined(even, names).reset_index(level=names[:-1]).reset_index(drop=True)

    @classmethod
    def get_test_params(cls, parameter_set: str = "default") -> Any:
        """Return parameters for sktime's estimator checks.

        Args:
            parameter_set: ignored, as there is one set.
        """
        # The checks' series are as short as ten rows, too short for a validation part.
        small = {"members": 1, "seasons": (), "validation": 0.0, "quantiles": (0.01, 0.25, 0.75, 0.99)}
        return [{"estimator": sklearn.SequenceForecaster(**small, **each)} for each in SMALL]


def _arrays(X: list[Any]) -> list[NDArray]:
    """Return sktime's frames, one row per step, as `[T, C]`."""
    return [frame.to_numpy() for frame in X]


def _series(rows: Frame) -> dict[tuple[Any, ...], Frame]:
    """Return the rows of each series by its name, `()` for a single series without a name, with the time as index."""
    levels = list(range(rows.index.nlevels - 1))
    if not levels:
        return {(): rows}
    groups = rows.groupby(level=levels, sort=False)
    return {name if isinstance(name, tuple) else (name,): group.droplevel(levels) for name, group in groups}


def _joined(groups: dict[tuple[Any, ...], Frame], names: list[Any]) -> Frame:
    """Join the rows of all series, with these names of the index."""
    if () in groups:
        return groups[()].rename_axis(names)
    return pd.concat(groups, names=names)


def _counts(rows: Frame) -> bool:
    """Whether the times of the rows are whole numbers."""
    return pd.api.types.is_integer_dtype(rows.index.get_level_values(-1).dtype)


def _places(fh: Any, last: Any, steps: Any) -> tuple[Any, NDArray[np.int64]]:
    """Return the times of `fh` and their positions in the forecast steps.

    Args:
        fh: sktime's horizon.
        last: time of the series' last row.
        steps: the forecast times. They begin after the last value, which may be earlier than the last row.
    """
    times = fh.to_absolute_index(last)
    at = fh.to_relative(last).to_numpy() + next(iter(np.flatnonzero(steps == _clock(last)[0])), -1)
    if at.max() >= len(steps):
        raise ValueError(
            f"expected fh within {len(steps)} steps after the last value of y, for which the network was fitted, got "
            f"{times[at.argmax()]}, which is step {at.max() + 1}: pass fit an fh up to that step"
        )
    if not np.array_equal(steps[at], _clock(times)):
        raise ValueError(f"expected fh at the steps of y, {list(map(str, steps[at]))}, got {list(map(str, times))}")
    return times, at


def _clock(times: Any) -> Any:
    """Return times in the form of tables: the start of a period, without a time zone."""
    times = times.to_timestamp() if isinstance(times, pd.PeriodIndex) else times
    return times.tz_localize(None) if getattr(times, "tz", None) is not None else times
