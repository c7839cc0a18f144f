"""The constructors of layers, cells and Keras's layers, their stubs and `CellSpec` agree with the declarations."""

import inspect
import typing
from dataclasses import fields, replace
from importlib import import_module

import pytest
import stubs

from cellstack import layers
from cellstack.cells import KINDS
from cellstack.cells.arguments import KEYWORD, POSITIONAL, RECURRENT, REQUIRED, signature
from cellstack.cells.spec import CellSpec

CLASSES = {
    f"{module}.{name}": getattr(import_module(f"cellstack.{module}"), name)
    for module, names in {
        "layers": ["LSTM", "GRU", "SimpleRNN", "LSTMCell", "GRUCell", "SimpleRNNCell"],
        "keras": ["LSTM", "GRU", "SimpleRNN"],
    }.items()
    for name in names
}


@pytest.mark.parametrize("module", [*stubs.MODULES, *stubs.TRAINING])
def test_stubs_are_those_of_the_declarations(module):
    assert stubs.path(module).read_text(encoding="utf-8") == stubs.stub(module), "run `make stubs`"


def test_the_table_of_options_is_that_of_the_declarations():
    assert stubs.PAGE.read_text(encoding="utf-8") == stubs.options_page(), "run `make stubs`"


@pytest.mark.parametrize("name", CLASSES)
def test_a_constructor_is_like_one_written_by_hand(name):
    cls = CLASSES[name]
    parameters = inspect.signature(cls).parameters
    assert next(iter(parameters)) == "units"
    assert typing.get_type_hints(cls.__init__).keys() == {*parameters, "return"}
    assert cls.__init__.__qualname__ == f"{cls.__name__}.__init__"
    for parameter in parameters:
        assert parameter == "kwargs" or f"\n    {parameter}: " in cls.__doc__
    with pytest.raises(TypeError, match=f"{cls.__name__}.__init__.* missing .*'units'"):
        cls()
    if "kwargs" not in parameters:  # Keras reports unknown arguments itself
        with pytest.raises(TypeError, match=f"{cls.__name__}.__init__.* unexpected keyword argument 'unit'"):
            cls(4, unit=5)
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'activations': did you mean 'activation'\?$"):
            cls(4, activations="tanh")
    with pytest.raises(TypeError, match="multiple values for argument 'units'"):
        cls(4, units=5)


def test_a_subclass_may_have_its_own_constructor():
    class Named(layers.GRU):
        def __init__(self, units, note):
            super().__init__(units, return_sequences=True)
            self.note = note

    assert list(inspect.signature(Named).parameters) == ["units", "note"]
    assert Named(4, "a").get_config() == layers.GRU(4, return_sequences=True).get_config()

    class Fixed(layers.GRUCell):
        kind = "gru"

        def __init__(self, units):
            super().__init__(units, clip=2.0)

    assert list(inspect.signature(Fixed).parameters) == ["units"]
    assert Fixed(4).get_config() == layers.GRUCell(4, clip=2.0).get_config()


def test_cell_spec_has_the_declared_fields():
    declared = {one.name: one for kind in KINDS.values() for one in kind.settings.values()}
    # None stands for the default of the kind.
    usual = {name: None for kind in KINDS.values() for name in kind.defaults}
    for field in fields(CellSpec):
        if field.name not in ("input_size", "kind"):
            argument = declared.pop(field.name)
            assert usual.get(field.name, argument.default) in (field.default, REQUIRED)
            assert argument.type == field.type or field.name.endswith("activation")
            assert f"\n    {field.name}: " in CellSpec.__doc__
    assert not declared


def test_names_that_a_kind_lacks_or_places_are_arguments():
    shared = {argument.name for argument in (*POSITIONAL, *KEYWORD)}
    assert shared.issuperset(RECURRENT)
    for kind in KINDS.values():
        own = {argument.name for argument in kind.flags}
        assert not shared & own
        assert shared.issuperset(kind.lacks)
        assert {*shared, *own}.issuperset(kind.positions)
        for of in ("cell", "layer", "keras"):
            names = [argument.name for some in signature(kind, of) for argument in some]
            assert len(names) == len(set(names))


def test_a_kind_without_a_recurrent_product_has_no_arguments_or_arrays_for_it(monkeypatch):
    kind = replace(KINDS["gru"], arrays=KINDS["mingru"].arrays, without=("layer_norm", "norm_epsilon"))
    for of in ("cell", "layer", "keras"):
        both = [{one.name for some in signature(k, of) for one in some} for k in (KINDS["gru"], kind)]
        assert both[0] - both[1] == {*RECURRENT, "layer_norm", "norm_epsilon"}
    assert "layer_norm" not in kind.settings
    monkeypatch.setitem(KINDS, "gru", kind)
    assert CellSpec(3, 4, kind="gru").shapes == {"kernel": (3, 12), "bias": (2, 12)}
