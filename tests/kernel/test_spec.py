"""The description of a cell: valid and invalid arguments, and that every flag is implemented and documented."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from cellstack.cells.activations import ACTIVATIONS, PARAMETERS, Activation, activation
from cellstack.cells.errors import ShapeError
from cellstack.cells.spec import CellSpec, described

ROOT = Path(__file__).resolve().parents[2]
FIELDS = [field.name for field in dataclasses.fields(CellSpec)]


def test_numpy_scalars_are_accepted():
    spec = CellSpec(np.int64(3), np.int32(4), proj_size=np.int8(2), clip=np.float32(2.5), peepholes=np.bool_(True))
    assert spec == CellSpec(3, 4, proj_size=2, clip=2.5, peepholes=True)
    assert described(spec.text) == spec
    assert CellSpec(**json.loads(spec.text)) == spec


@pytest.mark.parametrize(
    "given",
    [
        {"units": 2.5},
        {"units": "4"},
        {"units": True},
        {"input_size": None},
        {"proj_size": True},
        {"clip": True},
        {"clip": "5"},
        {"norm_epsilon": None},
        {"zoneout": None},
        {"peepholes": 1},
        {"layer_norm": 1},
        {"gate_activations": 3},
    ],
    ids=str,
)
def test_wrong_types_are_refused(given):
    with pytest.raises(TypeError, match=f"CellSpec: expected {next(iter(given))}"):
        CellSpec(**{"input_size": 3, "units": 4, **given})


def test_the_number_of_parameters_of_a_huge_cell_is_exact():
    assert CellSpec(2**40, 2**40, use_bias=False).parameters == 2**83


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"units": 0}, "units >= 1"),
        ({"proj_size": 4}, "proj_size from 1 to below units=4"),
        ({"proj_size": -1}, "proj_size"),
        ({"clip": 0.0}, "clip above 0"),
        ({"clip": float("nan")}, "clip above 0"),
        ({"cell_clip": float("inf")}, "cell_clip above 0"),
        ({"norm_epsilon": 0.0}, "norm_epsilon above 0"),
        ({"layer_norm": "yes"}, "layer_norm to be True, False or 'joint'"),
        ({"kind": "gru", "layer_norm": "joint"}, "layer_norm='joint' isn't supported for GRU"),
        ({"kind": "mingru", "layer_norm": "joint"}, "layer_norm='joint' isn't supported for MinGRU"),
        ({"kind": "gru", "attention": True, "input_size": 1}, "input_size >= 2 with attention"),
        ({"attention": True}, "attention is valid with kind='gru' only"),
        ({"zoneout": 1.0}, r"zoneout in \[0, 1\)"),
        ({"zoneout_cell": -0.1}, "zoneout_cell in"),
        ({"kind": "xlstm"}, "kind to be one of lstm, gru, rnn"),
        ({"kind": ["lstm"]}, "kind to be one of"),
        ({"kind": "gru", "peepholes": True}, "peepholes is valid with kind='lstm' only, not with 'gru'"),
        ({"kind": "rnn", "reset_after": False}, "reset_after is valid with kind='gru' only"),
        (
            {"kind": "rnn", "recurrent_activation": "relu"},
            "recurrent_activation is valid with kind='lstm' or 'gru' or 'mingru' or .* only, not with 'rnn'",
        ),
        ({"kind": "gru", "layer_norm": True, "reset_after": False}, "expected reset_after=True with layer_norm"),
        ({"gate_activations": {"z": "tanh"}}, "gate_activations of i, f, g, o, cell"),
        ({"gate_activations": {"f": "tanh"}, "coupled": True}, "can't set f of a coupled cell"),
        ({"gate_activations": {"i": "tanh"}, "kind": "slstm"}, "can't set i of 'slstm'"),
        ({"learn_initial_state": True, "kind": "slstm"}, "learn_initial_state is valid with kind="),
        ({"gate_activations": {"s": "tanh"}, "kind": "cfc"}, "can't set s of 'cfc'"),
        ({"kind": "cfc", "timespans": True, "input_size": 1}, "input_size >= 2 with timespans"),
        (
            {"kind": "cfc", "mode": "pure"},
            "mode to be 'default' or 'no_gate', got 'pure': ncps's 'pure' is another kind, 'cfs'",
        ),
        ({"kind": "cfc", "backbone_units": -1}, "backbone_units to be at least 0, got -1"),
        ({"kind": "gru", "backbone_units": 8}, "backbone_units is valid with kind='cfc' or 'cfs' only"),
        ({"kind": "cfc", "backbone_units": 8, "layer_norm": True}, "expected layer_norm=False with backbone_units=8"),
        ({"kind": "cfc", "backbone_units": 8, "heads": 2}, "expected heads=1 with backbone_units=8, got 2"),
        ({"kind": "cfc", "backbone_units": 8, "use_kernel": False}, "expected use_kernel=True with backbone_units=8"),
        ({"kind": "cfc", "backbone_units": 8, "backbone_activation": "mish"}, "backbone_activation: expected one of"),
        ({"kind": "cfc", "activation": "gelu"}, "activation: expected one of .* positive, got 'gelu'"),
        ({"kind": "cfc", "backbone_activation": "relu"}, "backbone_activation is valid with backbone_units only"),
        ({"kind": "cfc", "backbone_layers": 2}, "backbone_layers is valid with backbone_units only"),
        ({"kind": "cfc", "backbone_units": 8, "backbone_layers": 0}, "backbone_layers to be at least 1, got 0"),
        ({"kind": "cfc", "backbone_units": 8, "gate_activations": {"backbone": "relu"}}, "gate_activations of g, k"),
        ({"activation": "swish"}, "activation"),
        ({"activation": "elu(-1)"}, "alpha >= 0"),
        ({"activation": "tanh(2)"}, "tanh with 0 finite parameters"),
        ({"activation": "hard_sigmoid(0.2)"}, "hard_sigmoid with 2"),
        ({"activation": "hard_sigmoid(0.2, nan)"}, "finite"),
        ({"activation": "elu(x)"}, "numbers"),
        ({"recurrent_activation": None}, "recurrent_activation"),
    ],
    ids=str,
)
def test_invalid_values_are_refused(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        CellSpec(**{"input_size": 3, "units": 4, **given})
    assert str(caught.value).startswith("CellSpec: ")
    assert isinstance(caught.value, ShapeError) == any(name in given for name in ("units", "proj_size", "input_size"))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_its_text(name):
    found = activation(name)
    assert str(found) == name
    if name in PARAMETERS:
        other = Activation(name, *(0.7 for _ in PARAMETERS[name]))
        assert activation(str(other)) == other
        assert str(activation(f" {other} ")) == str(other)
        assert CellSpec(3, 4, activation=f"{name}({', '.join(map(repr, PARAMETERS[name]))})").activation == name


def test_the_default_activation_is_that_of_the_kind():
    for kind, name in {
        "lstm": "tanh",
        "gru": "tanh",
        "rnn": "tanh",
        "mingru": "positive",
        "minlstm": "positive",
    }.items():
        for spec in (CellSpec(3, 4, kind=kind), CellSpec(3, 4, None, kind=kind), CellSpec(3, 4, name, kind=kind)):
            assert spec.activation == name
            assert "activation" not in spec.settings
    assert CellSpec(3, 4, "tanh", kind="mingru").settings["activation"] == "tanh"


def test_settings_omit_defaults():
    spec = CellSpec(3, 4, recurrent_activation="hard_sigmoid", gate_activations={"o": "hard_sigmoid", "cell": "relu"})
    assert spec.settings == {
        "input_size": 3,
        "units": 4,
        "recurrent_activation": "hard_sigmoid",
        "gate_activations": {"cell": "relu"},
    }


# Flags with a different name in the kernel.
ELSEWHERE = {"input_size": "input, units", "attention": "scalar", "timespans": "scalar"}


@pytest.mark.parametrize("name", FIELDS)
def test_every_flag_is_in_the_kernel_the_docs_and_the_reference(name):
    kernel = "".join(
        (ROOT / "kernel" / f"{file}.h").read_text(encoding="utf-8") for file in ("description", "declared")
    )
    assert ELSEWHERE.get(name, name) in kernel
    if name not in ("input_size", "units"):
        assert f"`{name}" in (ROOT / "docs" / "family.md").read_text(encoding="utf-8")
    reference = (ROOT / "src" / "cellstack" / "reference" / "__init__.py").read_text(encoding="utf-8")
    if "activation" not in name and name not in ("input_size", "use_bias", "learn_initial_state"):
        assert name in reference
