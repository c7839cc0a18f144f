"""Options of training: what follows from their declarations."""

import inspect
import typing

import pytest

from cellstack import train
from cellstack.cli.main import parser
from cellstack.cli.options import has_flag
from cellstack.sklearn import SequenceClassifier, SequenceForecaster, SequenceRegressor
from cellstack.train import options
from cellstack.train.checks import OptionError
from cellstack.train.data.reading import SEQUENCES
from cellstack.train.declaration import DATA
from cellstack.train.options import RECORDS, applying, declared
from cellstack.train.tables.table import READING

FUNCTIONS = {"sequences": train.fit, "forecasts": train.fit_forecast, "texts": train.fit_text}


@pytest.mark.parametrize("data", DATA)
def test_a_function_is_like_one_written_by_hand(data):
    function = FUNCTIONS[data]
    parameters = inspect.signature(function).parameters
    assert list(parameters)[-1] == "inspect"
    assert {*parameters} - {"x", "y", "data", "text"} == {*applying(data)}
    assert typing.get_type_hints(function).keys() >= {*parameters}
    for name in parameters:
        assert f"\n    {name}: " in function.__doc__
    with pytest.raises(
        TypeError, match=rf"^{function.__name__}\(\) got an unexpected .* 'epoch': did you mean 'epochs'"
    ):
        function("x", epoch=3)
    other = next(name for name in declared() if name not in applying(data))
    with pytest.raises(TypeError, match=rf"^{function.__name__}: `{other}=…` doesn't apply to {data}, only to "):
        function("x", **{other: None})


def test_each_name_is_declared_once_and_has_a_text():
    assert sum(len(declared(record)) for record in RECORDS) == len(declared())
    assert all(one.text and one.defaults for one in declared().values())
    unused = [name for name, one in declared().items() if any(one.unset.values()) and None not in one.defaults.values()]
    assert unused == [], "these say what None means, but it isn't their default"
    assert applying("sequences").keys() >= {*SEQUENCES}
    assert applying("forecasts").keys() >= {*READING}


def test_a_flag_is_the_name_with_hyphens():
    train_parser = parser().parse_args(["train", "a.ts"]).parsers["train"]
    flags = {action.dest: action.option_strings for action in train_parser._actions}
    for name, one in declared().items():
        if has_flag(one):
            assert flags[name] == ["--" + name.replace("_", "-")] or name == "day_first"


def test_estimators_have_the_options_that_apply():
    for cls, data in (
        (SequenceClassifier, "sequences"),
        (SequenceRegressor, "sequences"),
        (SequenceForecaster, "forecasts"),
    ):
        names = {*inspect.signature(cls).parameters}
        assert {*declared(options.Optimisation)} & {*applying(data)} - {"seed"} <= names
        assert names - {*applying(data)} <= {"verbose", "random_state", "changes"}
        for name in names:
            assert f"\n    {name}: " in cls.__doc__


@pytest.mark.parametrize(
    ("record", "values", "message"),
    [
        (options.FitOptions, {"epochs": 0}, "expected epochs >= 1, got 0"),
        (options.FitOptions, {"epochs": 2.5}, "expected epochs to be an integer, got 2.5"),
        (options.FitOptions, {"epochs": None}, "expected epochs to be an integer, got None"),
        (options.FitOptions, {"lr": "fast"}, "expected lr to be a number, got 'fast'"),
        (options.Architecture, {"units": 0}, "expected units to be integers of at least 1, one for each layer, got 0"),
        (options.FitOptions, {"device": "tpu"}, "expected device to be one of auto, cpu, cuda, got 'tpu'"),
        (options.FitOptions, {"optimizer": 1}, "expected optimizer to be a function, such as lambda parameters: "),
        (options.Architecture, {"pooling": "sum"}, "expected pooling to be one of mean, max, last, none, got 'sum'"),
        (options.ForecastOptions, {"scale": "log"}, "expected scale to be one of spread, level, got 'log'"),
        (options.ForecastOptions, {"quantiles": 2}, "expected quantiles to be numbers between 0 and 1"),
    ],
)
def test_values_out_of_range(record, values, message):
    with pytest.raises(OptionError, match=message) as caught:
        record(**values)
    assert caught.value.option in values


def test_one_name_or_number_is_accepted_for_several():
    assert options.Architecture(8).units == (8,)
    request = options.ForecastOptions("y", seasons=1, known="price")
    assert (request.target, request.seasons, request.known) == (("y",), (), ("price",))
