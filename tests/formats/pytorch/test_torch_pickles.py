"""The reader of pickles: plain data as in Python, everything else as a placeholder."""

import collections
import copyreg
import enum
import pickle
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cellstack as cs
from cellstack.formats.pytorch import pickles

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text() | st.binary()
)
KEYS = st.text() | st.integers(-(2**50), 2**50) | st.booleans() | st.tuples(st.text(), st.integers(0, 300))
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(KEYS, inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(), inner).map(collections.OrderedDict)
    ),
)


@pytest.mark.long
@settings(max_examples=40, deadline=None)
@given(value=VALUES, protocol=st.integers(2, 5), shared=st.booleans())
def test_plain_data_is_read_as_by_python(value, protocol, shared):
    value = [value, {"again": value}] if shared else value
    data = pickle.dumps(value, protocol)
    got, end = pickles.read("the pickle", data + b"more")
    assert got == pickle.loads(data)
    assert end == len(data)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_sets_are_lists_and_special_dicts_are_dicts(protocol):
    counts = collections.defaultdict(list, {"a": [1]})
    data = pickle.dumps([{1}, frozenset([2]), counts, collections.Counter("aab"), bytearray(b"xy"), range(3)], protocol)
    one, two, default, counter, _, numbers = pickles.read("the pickle", data)[0]
    assert (one, two, default, counter) == ([1], [2], {"a": [1]}, {"a": 2, "b": 1})
    assert isinstance(numbers, pickles.Standin)
    assert numbers.kind == ("builtins.xrange" if protocol == 2 else "builtins.range")
    assert numbers.args == (0, 3, 1)


class Plain:
    def __init__(self):
        self.size, self.parts = 3, {"a": [1, 2]}


class Slotted:
    __slots__ = ("size",)

    def __init__(self):
        self.size = 3


class Table(dict):
    pass


class Row(list):
    pass


class Colour(enum.Enum):
    RED = 1


class Keyed:
    def __new__(cls, *, size):
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (), {"size": 3}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_become_placeholders_with_class_and_state(protocol, monkeypatch):
    def touched(*args, **kwargs):
        raise AssertionError("a class of the file's was used")

    table, row = Table(a=1), Row([4, 5])
    data = pickle.dumps([Plain(), Slotted(), table, row, Colour.RED, Keyed(size=3), Plain], protocol)
    for kind in (Plain, Slotted, Table, Row, Keyed):
        monkeypatch.setattr(kind, "__new__", touched)
    plain, slotted, table, row, red, keyed, kind = pickles.read("the pickle", data)[0]
    here = __name__
    assert (plain.kind, plain.args, plain.state) == (f"{here}.Plain", (), {"size": 3, "parts": {"a": [1, 2]}})
    assert (slotted.kind, slotted.state) == (f"{here}.Slotted", (None, {"size": 3}))
    assert (table.kind, table.pairs) == (f"{here}.Table", {"a": 1})
    assert (row.kind, row.items) == (f"{here}.Row", [4, 5])
    assert (red.kind, red.args) == (f"{here}.Colour", (1,))
    assert keyed.kind == (f"{here}.Keyed" if protocol >= 4 else "functools.partial")
    assert kind == pickles.Global(f"{here}.Plain")


def test_a_module_is_not_imported():
    data = b"\x80\x02cno.such.module\nThing\n)\x81."
    assert repr(pickles.read("the pickle", data)[0]) == "Standin('no.such.module.Thing')"


def test_pickles_of_python_2():
    """Text as bytes, a dict built from pairs, an object of an old-style class, the modules' old names."""
    pairs = b"ccollections\nOrderedDict\n](U\x01aK\x01\x86U\x01bK\x02\x86e\x85R"
    assert pickles.read("x", b"\x80\x02" + pairs + b".")[0] == {"a": 1, "b": 2}
    assert pickles.read("x", b"\x80\x02(U\x02hiT\x02\0\0\0\xff\xfet.")[0] == ("hi", b"\xff\xfe")
    made = pickles.read("x", b"\x80\x02(cthe.module\nThing\nK\x01o}U\x01aK\x02sb.")[0]
    assert (made.kind, made.args, made.state) == ("the.module.Thing", (1,), {"a": 2})
    assert pickles.read("x", b"\x80\x02c__builtin__\nset\n](K\x01K\x02e\x85R.")[0] == [1, 2]
    made = pickles.read("x", b"\x80\x02ccopy_reg\n_reconstructor\n(cthe.module\nThing\nc__builtin__\nobject\nNtR.")[0]
    assert (made.kind, made.args) == ("the.module.Thing", ())
    assert copyreg.__name__ == "copyreg"  # today's name


def test_builders_are_called():
    data = b"\x80\x02cthe.module\nThing\nK\x01K\x02\x86R."
    builders = {"the.module.Thing": lambda args: sum(args)}
    assert pickles.read("x", data, builders=builders)[0] == 3


def test_calls_of_attributes():
    """A bound method is pickled as a call of getattr, which only gives a placeholder."""
    data = pickle.dumps(types.SimpleNamespace(f=[1].append), 2)
    made = pickles.read("x", data)[0]
    assert made.state["f"].kind == "builtins.getattr"
    called = pickles.read("x", b"\x80\x02c__builtin__\ngetattr\n](U\x01aeU\x05clear\x86R)R.")[0]
    assert called.kind == "builtins.getattr"


def test_errors_name_the_file_and_the_position():
    with pytest.raises(cs.FormatError, match=r"^model.pt: byte 13: expected the classes of a model, found 'os.system'"):
        pickles.read("model.pt", b"\x80\x02cos\nsystem\n.", 0)
    with pytest.raises(cs.FormatError, match=r"^model.pt: byte 4: persistent ids aren't supported"):
        pickles.read("model.pt", b"\x80\x02NQ.")
