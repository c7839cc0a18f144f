"""The base class of our Keras layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import keras

from cellstack.cells import KINDS
from cellstack.cells.arguments import ACTIVATION_ARGUMENTS, Argument, sign
from cellstack.cells.errors import as_flag, as_integer, check_state
from cellstack.cells.spec import CellSpec
from cellstack.keras import keras_cells, torch_backend
from cellstack.layers.cell_base import ROLES, usual_forget_bias

_ops: Any = keras.ops

_FLAGS = ("return_sequences", "return_state", "go_backwards", "zero_output_for_mask", "return_gates")
_TABLES = {"initializer": keras.initializers, "regularizer": keras.regularizers, "constraint": keras.constraints}


class Recurrent(keras.layers.Layer):
    """Base class: makes a description from the arguments and its arrays as weights, and calls the op.

    A subclass defines `kind`; its constructor follows from the kind's declaration in `cellstack.cells`.
    """

    kind: ClassVar[str]
    signature: ClassVar[dict[str, Argument]]
    stateful, states = False, None  # Keras's Bidirectional reads them

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in vars(cls):
            cls.signature = sign(cls, KINDS[cls.kind], "keras", globals())
            keras.saving.register_keras_serializable(package="cellstack")(cls)

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__(activity_regularizer=given.pop("activity_regularizer"), **given.pop("kwargs"))
        self._given = given
        self.units = as_integer(self.name, "units", given["units"])
        for name in _FLAGS:
            setattr(self, name, as_flag(self.name, name, given[name]))
        for name in {*ACTIVATION_ARGUMENTS} & given.keys():
            given[name] = _activation(self.name, name, given[name])
        settings = {name: given[name] for name in KINDS[self.kind].settings if name in given}
        least = 1 + bool(settings.get(KINDS[self.kind].scalar))
        self._spec = CellSpec(least, kind=self.kind, **{**settings, "units": self.units})
        for argument in self.signature.values():
            if "spec" not in argument.of and argument.name in given:  # CellSpec checks its own
                argument.check(self.name, given[argument.name])
        names = [f"{role}_{kind}" for role in ROLES.values() for kind in _TABLES]
        self._made = {name: _table(name).get(given[name]) for name in names if name in given}
        self.seed_generator = keras.random.SeedGenerator(given["seed"])
        self.input_spec = keras.layers.InputSpec(ndim=3)
        self.supports_masking = True
        self.state_size = list(self._spec.state_sizes.values())

    @property
    def spec(self) -> CellSpec:
        """The description of the cell; of the least width before the layer is built."""
        return self._spec

    def build(self, input_shape: Sequence[Any]) -> None:
        """Create the weights, those of `CellSpec.shapes`."""
        width = int(input_shape[-1])
        self._spec = replace(self._spec, input_size=width)
        shapes, declared = self._spec.shapes, self._spec.of_kind.every_array
        self._arrays = [self._added(one.name, shapes[one.name], one.first) for one in declared if one.name in shapes]

    def _added(self, name: str, shape: tuple[int, ...], first: str) -> Any:
        role = ROLES.get(name)
        if role is None:
            first = self._made.get(f"{first}_initializer", first)
            return self.add_weight(shape=shape, name=name, initializer=first)
        made = {kind: self._made[f"{role}_{kind}"] for kind in _TABLES}
        if name == "bias" and self._given.get("unit_forget_bias") and "f" in self._spec.gates:
            made["initializer"] = _forgetting(made["initializer"], self._spec)
        if name == "recurrent_kernel" and self._spec.heads > 1:
            made["initializer"] = _by_head(made["initializer"])
        return self.add_weight(shape=shape, name=name, **made)

    def call(
        self, sequences: Any, initial_state: Any = None, mask: Any = None, reset: Any = None, training: bool = False
    ) -> Any:
        """Run over sequences.

        Args:
            sequences: `[B, T, I]`.
            initial_state: arrays of the state, h `[B, P]` and an LSTM's c `[B, H]`; None: zeros, or the learned state.
            mask: bool `[B, T]`, True where a step counts. At other steps the state is carried over, and the output
                repeats the previous one (before the first step that counts: the initial h), or is zero with
                `zero_output_for_mask`.
            reset: bool `[B, T]`, True where a new piece of a row begins: the steps before it have no influence on it.
            training: whether dropout and zoneout are active.

        Returns:
            y `[B, T, P]` with `return_sequences`, else `[B, P]`; then the arrays of the state, with `return_state`;
            then the gates and states of every step `[B, T, H]`, with `return_gates`, in the order of the kind's trace.
        """
        if mask is None:  # Keras passes it only to layers with a single tensor argument
            mask = getattr(sequences, "_keras_mask", None)
        states = None
        if initial_state is not None:
            dtype = self.compute_dtype
            states = [_ops.convert_to_tensor(state, dtype=dtype) for state in keras.tree.flatten(initial_state)]
            shapes = [tuple(state.shape) for state in states]
            check_state(self.name, shapes, sequences.shape[0], self._spec.state_sizes)
        drops = self._drawn(sequences) if training else ()
        arrays = [variable.value for variable in self._arrays]
        y, last, ends, every = torch_backend.run_layer(
            self._spec, sequences, states, arrays, drops, mask, reset, self.go_backwards, self.return_gates
        )
        out = y if self.return_sequences else last
        if self.zero_output_for_mask and mask is not None:
            used = _ops.flip(mask, 1) if self.go_backwards else mask
            used = _ops.cast(used if self.return_sequences else used[:, -1], out.dtype)
            out = out * _ops.expand_dims(used, -1)
        results = (out, *(ends if self.return_state else ()), *(every if self.return_gates else ()))
        return results if len(results) > 1 else out

    def _drawn(self, x: Any) -> tuple[Any, ...]:
        """Draw the fields of torch's `Masks`."""
        batch, steps, _ = _ops.shape(x)
        spec = self._spec
        of_x = self._mask((batch, spec.features), self._given["dropout"])
        if of_x is not None and spec.scalar:
            of_x = _ops.pad(of_x, ((0, 0), (0, 1)), constant_values=1.0)  # a scalar isn't dropped
        sizes, rates = spec.state_sizes, spec.zoneout_rates
        kept = [self._mask((batch, steps, sizes[state]), rates[state]) for state in spec.of_kind.zoneout]
        return (
            of_x,
            self._mask((batch, spec.output_size), self._given.get("recurrent_dropout", 0.0)),
            tuple(None if mask is None else _ops.cast(mask == 0.0, self.compute_dtype) for mask in kept),
        )

    def _mask(self, shape: tuple[Any, ...], rate: float) -> Any:
        ones = _ops.ones(shape, dtype=self.compute_dtype) if rate else None
        return None if ones is None else keras.random.dropout(ones, rate, seed=self.seed_generator)

    def compute_output_shape(self, sequences_shape: Sequence[Any], *_: Any) -> Any:
        """Return the shapes of a call's results."""
        batch, steps = sequences_shape[:2]
        spec = self._spec
        shapes = [(batch, steps, spec.output_size) if self.return_sequences else (batch, spec.output_size)]
        if self.return_state:
            shapes += [(batch, size) for size in self.state_size]
        if self.return_gates:
            shapes += [(batch, steps, size) for size in _traced(spec)]
        return shapes[0] if len(shapes) == 1 else tuple(shapes)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        """Return the mask of each result: that of the sequences for y of every step, None for the others."""
        own = keras.tree.flatten(previous_mask)[0] if self.return_sequences else None
        more = len(self.state_size) * self.return_state + len(_traced(self._spec)) * self.return_gates
        return [own, *[None] * more] if more else own

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments by name."""
        made = {name: value and _table(name).serialize(value) for name, value in self._made.items()}
        activity = keras.regularizers.serialize(self.activity_regularizer) if self.activity_regularizer else None
        given = {**self._given, "units": self.units}
        if "gate_activations" in given:
            given["gate_activations"] = dict(self._spec.gate_activations)
        return {**super().get_config(), **given, **made, "activity_regularizer": activity}


def _table(name: str) -> Any:
    return _TABLES[name.rsplit("_", 1)[1]]


def _by_head(initializer: Any) -> Any:
    """Return an initialiser that initialises the matrix of each head by itself."""

    def every(shape: Any, dtype: Any = None) -> Any:
        # an initialiser without a seed gives the same numbers at each call, and its clones others
        made = [initializer.clone() if hasattr(initializer, "clone") else initializer for _ in range(shape[0])]
        return _ops.stack([one(tuple(shape[1:]), dtype=dtype) for one in made])

    return every


def _forgetting(initializer: Any, spec: CellSpec) -> Any:
    """Return an initialiser of a bias that sets the forget gate's block to its usual value."""
    units, at = spec.units, spec.gates.index("f")

    def first(shape: Any, dtype: Any = None) -> Any:
        ahead, behind = at * units, shape[0] - (at + 1) * units
        parts = [initializer((ahead,), dtype=dtype), _ops.full((units,), usual_forget_bias(spec), dtype=dtype)]
        return _ops.concatenate([*parts, initializer((behind,), dtype=dtype)])

    return first


def _activation(owner: str, name: str, given: Any) -> str:
    text = given if isinstance(given, str) else keras_cells.activation(given)
    if not text:
        raise ValueError(f"{owner}: expected {name} to name an activation that the kernel supports, got {given!r}")
    return text


def _traced(spec: CellSpec) -> list[int]:
    """Return the width of each array of a trace."""
    return [spec.output_size if field == "h" else spec.units for field in spec.of_kind.trace._fields]
