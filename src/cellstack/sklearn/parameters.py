"""The parameters of the estimators, derived from the options of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, make_dataclass
from typing import Any, TypeVar

from sklearn.base import BaseEstimator

from cellstack.cells.arguments import Argument, documented
from cellstack.train.options import Architecture, ForecastOptions, Optimisation, applying, declared
from cellstack.train.tables.table import READING

C = TypeVar("C", bound=type)
RUN = ("validation", "threads", "device")
NOT_HERE = ("head", "loss", "model", "seed")  # `random_state` has the seed
VALIDATION = "share to choose the best epoch on, of each class; 0: none, keep the last"
OWN = (
    Argument("threads", "int | None", 1, "number of processor threads; None = the fastest, by measurement, which may "
    "differ between fits, and with it their last bits."),
    Argument("verbose", "bool | None", False, "show a progress bar; None = in terminals and notebooks."),
    Argument("random_state", "int | np.random.RandomState | None", None, "makes a fit repeatable; an int is the seed."),
)  # fmt: skip
SHORT = Argument("validation", "float | None", None, "share to choose settings on; None = 0.15, or 0 for short series.")
SEQUENCES = (
    Argument("bidirectional", "bool", True, declared()["bidirectional"].described("sequences")),
    Argument("validation", "float | None", 0.15, f"{VALIDATION}."),
    *OWN,
)  # fmt: skip
CLASSES = (
    Argument("validation", "float | None", None, f"{VALIDATION}; None = 0.15 if that is at least 20 "
    "sequences, else 0."),
    Argument("class_weight", "Mapping[Any, float] | str | None", None, f"{declared()['class_weight'].text}."),
)  # fmt: skip


def parameters(data: str, options: Iterable[str], own: Iterable[Argument]) -> dict[str, Argument]:
    """Return an estimator's parameters by name.

    Args:
        data: the kind of data.
        options: options of training that it has.
        own: parameters with other defaults, and further ones.
    """
    known = applying(data)
    found = {
        name: Argument(name, known[name].typed(data), known[name].defaults[data], known[name].described(data))
        for name in options
        if name in known and name not in NOT_HERE
    }
    return found | {one.name: one for one in own}


NETWORK = (*declared(Architecture, Optimisation), *RUN)
SEQUENCE = parameters("sequences", NETWORK, SEQUENCES)
CLASSIFIER = SEQUENCE | {one.name: one for one in CLASSES}
FORECASTER = parameters("forecasts", (*declared(ForecastOptions), *READING, *NETWORK), (*OWN, SHORT))


def parameters_class(name: str, of: Mapping[str, Argument], *bases: type) -> Any:
    """Return a dataclass with these parameters; scikit-learn needs all of them in the signature of `__init__`."""
    columns = [(one.name, one.type, field(default=one.default)) for one in of.values()]
    return make_dataclass(name, columns, bases=bases, repr=False, eq=False, kw_only=True)


SequenceParameters: Any = parameters_class("SequenceParameters", SEQUENCE, BaseEstimator)
ClassifierParameters: Any = parameters_class("ClassifierParameters", CLASSIFIER, SequenceParameters)
ForecasterParameters: Any = parameters_class("ForecasterParameters", FORECASTER, BaseEstimator)


def described(of: Mapping[str, Argument]) -> Callable[[C], C]:
    """Add the parameters to the docstring of an estimator."""

    def decorate(cls: C) -> C:
        cls.__doc__ = documented(cls.__doc__, of.values(), "\n\nAttributes:")
        return cls

    return decorate
