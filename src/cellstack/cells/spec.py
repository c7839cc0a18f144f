"""`CellSpec`, the description of a cell: what formats read and write, kernels run, and layers train."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

from cellstack.cells import KINDS, Kind
from cellstack.cells.activations import ACTIVATIONS, OF_BACKBONES, Activation, activation, names_for
from cellstack.cells.arguments import ACTIVATION_ARGUMENTS, Argument, documented
from cellstack.cells.arrays import Axis, axes_of
from cellstack.cells.errors import ShapeError, as_flag, as_integer, as_number
from cellstack.cells.mlstm import MemorySpec

GATES = {name: tuple(kind.gates) for name, kind in KINDS.items()}
"""The kinds of cell, and the order of their gate blocks in every array that has H columns per gate."""

_DECLARED = {array.name: array for kind in KINDS.values() for array in kind.arrays}
_DECLARED |= {array.name: array for kind in KINDS.values() for array in kind.every_array}

ARRAYS = tuple(_DECLARED)
"""Every array that a cell may have, in the order in which the kernel takes them; see `CellSpec.shapes`."""

MATRICES = tuple(name for name, array in _DECLARED.items() if array.pack == "matrix")
"""The arrays that are matrices multiplied by x, h, a backbone's layers or m: nearly all of a cell's numbers."""


DTYPES = ("float32", "float64")

STATES = {name: kind.state for name, kind in KINDS.items()}
"""The type of the state of each kind of cell."""

TRACES = {name: kind.trace for name, kind in KINDS.items()}
"""The type of the trace of each kind of cell."""


@dataclass(frozen=True)
class CellSpec:
    """Description of one cell, without its arrays. For the equations of every flag see `cellstack.reference`.

    Args:
        input_size: number I of input features, including a number of the step such as an attention: see `scalar`.
        units: number H of units.
        activation: activation of the candidate g, and of an LSTM's c before the output gate; see `activation`. None:
            "tanh", and "positive" of a minGRU and a minLSTM.
        recurrent_activation: activation of the other gates.
        use_bias: whether the pre-activations have a bias.
        kind: the kind of cell, a name in `cellstack.cells.KINDS`: "lstm", "gru", "rnn" …
        gate_activations: activations of single gates, such as `{"o": "hard_sigmoid"}`; the key of an LSTM's c is
            "cell".

    Raises:
        ShapeError: a width below 1, another input_size than G·H with `use_kernel=False`, a projection that isn't
            narrower than the units, or units that `heads` doesn't divide.
        TypeError: a flag of the wrong type.
        ValueError: an unknown kind or activation, a value out of range, or a flag that this kind doesn't have.

    >>> CellSpec(input_size=3, units=4).parameters
    128
    >>> CellSpec(3, 4, kind="gru").shapes
    {'kernel': (3, 12), 'recurrent_kernel': (4, 12), 'bias': (2, 12)}
    """

    input_size: int
    units: int
    activation: str = None  # pyright: ignore[reportAssignmentType]  # that of the kind
    recurrent_activation: str = "sigmoid"
    use_bias: bool = True
    kind: str = "lstm"
    gate_activations: Any = ()
    peepholes: bool = False
    coupled: bool = False
    proj_size: int = 0
    layer_norm: bool | str = False
    norm_epsilon: float = 1e-5
    clip: float | None = None
    cell_clip: float | None = None
    zoneout: float = 0.0
    zoneout_cell: float = 0.0
    reset_after: bool = True
    attention: bool = False
    timespans: bool = False
    mode: str = "default"
    backbone_units: int = 0
    backbone_activation: str = "scaled_tanh(1.7159, 0.666)"
    backbone_layers: int = 1
    learn_initial_state: bool = False
    exponential_forget: bool = False
    heads: int = 1
    use_kernel: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in GATES:
            raise ValueError(f"CellSpec: expected kind to be one of {', '.join(GATES)}, got {self.kind!r}")
        for field in fields(self):
            if getattr(self, field.name) is field.default is None and field.name in self.of_kind.settings:
                object.__setattr__(self, field.name, self.of_kind.settings[field.name].default)
            convert = _CONVERTERS.get(field.type)
            if convert is not None:
                object.__setattr__(self, field.name, convert("CellSpec", field.name, getattr(self, field.name)))
        self._check_values()
        self._check_activations()

    def _check_values(self) -> None:
        for name in ("input_size", "units"):
            if getattr(self, name) < 1:
                raise ShapeError(f"CellSpec: expected {name} >= 1, got {getattr(self, name)}")
        if not (self.proj_size == 0 or 1 <= self.proj_size < self.units):
            raise ShapeError(
                f"CellSpec: expected proj_size from 1 to below units={self.units}, or 0, got {self.proj_size}"
            )
        settings = self.of_kind.settings
        for field in fields(self)[1:]:
            name, value = field.name, getattr(self, field.name)
            if name in settings:
                settings[name].check("CellSpec", value)
            elif name != "kind" and value != field.default:
                kinds = " or ".join(repr(kind.name) for kind in KINDS.values() if name in kind.settings)
                raise ValueError(f"CellSpec: {name} is valid with kind={kinds} only, not with {self.kind!r}")
        if self.units % self.heads:
            raise ShapeError(f"CellSpec: units {self.units} can't be divided into heads={self.heads}")
        if self.heads > 1 and self.proj_size:
            raise ValueError(f"CellSpec: expected heads=1 with proj_size={self.proj_size}, got heads={self.heads}")
        self._check_backbone()
        wide = len(self.gates) * self.units
        if not self.use_kernel and self.features != wide:
            raise ShapeError(
                f"CellSpec: expected input_size {wide + self.scalar} with use_kernel=False, the sums of "
                f"{len(self.gates)} gates of {self.units} units, got {self.input_size}"
            )
        if self.features < 1:
            raise ShapeError(f"CellSpec: expected input_size >= 2 with {self.of_kind.scalar}, got {self.input_size}")
        if self.joint and not self.of_kind.joins:
            raise ValueError(
                f"CellSpec: layer_norm='joint' isn't supported for {self.of_kind.title}: its gates aren't functions "
                "of one sum over x and h"
            )
        if self.layer_norm and not self.reset_after:
            raise ValueError(
                "CellSpec: expected reset_after=True with layer_norm: the two products are normalised separately"
            )

    def _check_backbone(self) -> None:
        usual = {field.name: field.default for field in fields(self)}
        if self.backbone_units:
            for name in ("layer_norm", "heads", "use_kernel"):
                if getattr(self, name) != usual[name]:
                    raise ValueError(
                        f"CellSpec: expected {name}={usual[name]} with backbone_units={self.backbone_units}, got "
                        f"{getattr(self, name)!r}"
                    )
            return
        for name in ("backbone_activation", "backbone_layers"):
            if getattr(self, name) != usual[name]:
                raise ValueError(f"CellSpec: {name} is valid with backbone_units only, which is 0")

    def _check_activations(self) -> None:
        chosen = self.gate_activations
        try:
            chosen = dict(chosen.items() if isinstance(chosen, Mapping) else chosen)
        except (TypeError, ValueError):
            raise TypeError(
                f"CellSpec: expected gate_activations to map gates to activations, got {chosen!r}"
            ) from None
        for gate in chosen:
            if self.coupled and gate == "f":
                raise ValueError("CellSpec: gate_activations can't set f of a coupled cell: it is 1 - i")
            if gate in self.of_kind.fixed:
                raise ValueError(
                    f"CellSpec: gate_activations can't set {gate} of {self.kind!r}: its activation is part of the kind"
                )
            if gate not in self.of_kind.slots:
                slots = ", ".join(self.of_kind.slots)
                raise ValueError(f"CellSpec: expected gate_activations of {slots}, got {gate!r}")
        for name in ACTIVATION_ARGUMENTS:
            object.__setattr__(self, name, _canonical(name, getattr(self, name)))
        named = {gate: _canonical(f"gate_activations[{gate!r}]", text) for gate, text in chosen.items()}
        kept = tuple((s, named[s]) for s in self.of_kind.slots if s in named and named[s] != self._usual(s))
        object.__setattr__(self, "gate_activations", kept)

    def _usual(self, slot: str) -> str:
        return getattr(self, self.of_kind.activation(slot))

    @property
    def of_kind(self) -> Kind:
        """The declaration of this kind of cell."""
        return KINDS[self.kind]

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the activations: the gates, "cell" for an LSTM's c, "backbone". That of a coupled f isn't used."""
        return (*self.of_kind.slots, *(["backbone"] if self.backbone_units else []))

    @property
    def activations(self) -> tuple[Activation, ...]:
        """The activation of each of `slots`."""
        named = dict(self.gate_activations)
        return tuple(activation(named.get(slot, self._usual(slot)), OF_BACKBONES) for slot in self.slots)

    @property
    def gates(self) -> tuple[str, ...]:
        """Gates with a block of H columns in the arrays, in order."""
        return tuple(gate for gate in GATES[self.kind] if not (self.coupled and gate == "f"))

    @property
    def columns(self) -> int:
        """The number of columns of `kernel`, `recurrent_kernel` and `bias`: G·H, or U with a backbone."""
        return self.backbone_units or len(self.gates) * self.units

    @property
    def scalar(self) -> bool:
        """Whether the last column of x is a number of the step, which isn't multiplied by the kernel: `Kind.scalar`."""
        return bool(self.of_kind.scalar) and getattr(self, self.of_kind.scalar)

    @property
    def features(self) -> int:
        """The number of columns of x that are multiplied by the kernel: all except that of a `scalar`."""
        return self.input_size - self.scalar

    @property
    def joint(self) -> bool:
        """Whether layer normalisation applies to the sum of the products with x and h."""
        return self.layer_norm == "joint"

    @property
    def output_size(self) -> int:
        """Width of h: P with a projection, else H."""
        return self.proj_size or self.units

    @cached_property
    def state_sizes(self) -> dict[str, int]:
        """Width of each array of the state, by name: h, and others such as an LSTM's c."""
        names = STATES[self.kind]._fields
        return {name: self.output_size if name == "h" else self.units for name in names}

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array of the state, by name, without the batch."""
        return {name: (size,) for name, size in self.state_sizes.items()}

    @property
    def trace_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each field of a trace, by name, without the batch and the steps."""
        return {name: (self.output_size if name == "h" else self.units,) for name in self.of_kind.trace._fields}

    @property
    def state_axes(self) -> dict[str, Axis]:
        """The number of values of each array of the state, by name, as a number of blocks and a letter; see `axes`."""
        return {name: (1, "P" if name == "h" and self.proj_size else "H") for name in self.state_sizes}

    @property
    def zoneout_rates(self) -> dict[str, float]:
        """The share of each state, by name, that zoneout keeps; 0 for states without zoneout."""
        rates = self.of_kind.zoneout
        return {name: getattr(self, rates[name]) if name in rates else 0.0 for name in self.state_sizes}

    @cached_property
    def planes(self) -> int:
        """Number of arrays `[B, T, H]` in which the kernel saves the gates of a forward pass.

        One per gate of `GATES[kind]`; with `reset_after`, one more for the recurrent product of a GRU's candidate.
        """
        return len(GATES[self.kind]) + len(self.of_kind.planes(self))

    @cached_property
    def intermediate_size(self) -> int:
        """How many intermediate values of layer normalisation or a backbone the kernel saves per row and step.

        Of each layer of a backbone they are its output, and the derivative of its activation where that isn't a
        function of the output.
        """
        if self.backbone_units:
            return self.backbone_layers * self.backbone_units * (1 + (self.activations[-1].name not in ACTIVATIONS))
        products = sum(name in self.shapes for name in ("kernel_gain", "recurrent_gain"))
        return products * (len(self.gates) * self.units + 2)

    @cached_property
    def two_biases(self) -> bool:
        """Whether the products with x and with h have a bias each, `[2, G·H]`."""
        return self.use_bias and self.reset_after and "reset_after" in self.of_kind.settings

    @property
    def plain(self) -> bool:
        """Whether this is the standard LSTM, which cuDNN has too: tanh, sigmoid, and no flag except `use_bias`."""
        return self == CellSpec(self.input_size, self.units, use_bias=self.use_bias)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the cell's arrays by name, in the order of `Kind.arrays`."""
        widths = {"": 1, "I": self.features, "H": self.units, "P": self.proj_size}
        widths |= {"U": self.backbone_units, "D": self.units // self.heads}
        return {name: tuple(n * widths[letter] for n, letter in axes) for name, axes in self.axes.items()}

    @cached_property
    def axes(self) -> dict[str, tuple[Axis, ...]]:
        """The axes of the cell's arrays by name, each as a number of blocks and the letter of their width.

        >>> CellSpec(3, 4, kind="gru").axes["bias"]
        ((2, ''), (3, 'H'))
        """
        return axes_of(self)

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def settings(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON values; `CellSpec(**settings)` is the same cell."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        usual = _usual_values(self)
        changed = {name: value for name, value in values.items() if value != usual[name]}
        if self.gate_activations:
            changed["gate_activations"] = dict(self.gate_activations)
        return changed

    @property
    def form(self) -> dict[str, Any]:
        """All fields as JSON values, except the widths: what cells of one form have in common."""
        values = {**asdict(self), "gate_activations": dict(self.gate_activations)}
        return {name: value for name, value in values.items() if name not in ("input_size", "units")}

    @property
    def numbers(self) -> dict[str, float]:
        """The settings of `FLAGS` as numbers: an infinity for None, and the place in its options for a text."""
        by_flag = {}
        for name, one in FLAGS.items():
            value = getattr(self, name)
            if isinstance(value, str) and one.limit is not None:
                value = one.limit.options.index(value)
            by_flag[name] = math.inf if value is None else float(value)
        return by_flag

    @property
    def text(self) -> str:
        """The description as one line of JSON, which `described` parses."""
        return json.dumps(self.settings)


Spec = CellSpec | MemorySpec
"""The description of a cell: what the views of a step have in common."""


def _flags() -> Iterator[Argument]:
    """Yield the fields of `CellSpec` after `gate_activations`, from the declarations of the kinds that have them."""
    names = [field.name for field in fields(CellSpec)]
    for name in names[names.index("gate_activations") + 1 :]:
        kinds = [kind for kind in KINDS.values() if name in kind.settings]
        flag = kinds[0].settings[name]
        only = "" if len(kinds) == len(KINDS) else f"{' and '.join(kind.title for kind in kinds)} only: "
        yield flag._replace(text=only + flag.text)


FLAGS: dict[str, Argument] = {
    name: one
    for kind in KINDS.values()
    for name, one in kind.settings.items()
    if name not in (*ACTIVATION_ARGUMENTS, "units", "gate_activations", kind.scalar)
} | {"scalar": Argument("scalar", "bool", False, "`CellSpec.scalar`")}
"""The settings that the kernel takes as numbers, by name."""


CellSpec.__doc__ = documented(CellSpec.__doc__, _flags())


# How the fields of CellSpec are checked and converted, by annotation.
_CONVERTERS: dict[Any, Callable[[str, str, Any], Any]] = {
    "bool": as_flag,
    "int": as_integer,
    "float": as_number,
    "bool | str": lambda owner, name, value: value if isinstance(value, str) else as_flag(owner, name, value),
    "float | None": lambda owner, name, value: None if value is None else as_number(owner, name, value),
}


def _usual_values(spec: CellSpec) -> dict[str, Any]:
    settings = spec.of_kind.settings
    return {field.name: settings.get(field.name, field).default for field in fields(spec)}


def _canonical(name: str, text: str) -> str:
    try:
        return str(activation(text, names_for(name)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"CellSpec: {name}: {error}") from None


@lru_cache(maxsize=1024)
def described(text: str) -> CellSpec:
    """Return the `CellSpec` of a `CellSpec.text`.

    >>> described(CellSpec(3, 4, kind="gru", clip=5.0).text) == CellSpec(3, 4, kind="gru", clip=5.0)
    True
    """
    return CellSpec(**json.loads(text))
