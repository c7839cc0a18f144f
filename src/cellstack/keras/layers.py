"""`LSTM`, `GRU` and `SimpleRNN` as Keras layers, with all flags of our cells.

They work with functional models, `fit`, `summary`, masks, `Bidirectional`, and files, which need `import
cellstack.keras` before they are loaded. They need the torch backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar

import keras

from cellstack.keras import cells, torch_backend
from cellstack.spec import TRACES, CellSpec, as_flag, as_integer, check_state

_ops: Any = keras.ops

_SETTINGS = {field.name for field in fields(CellSpec)} - {"input_size", "units", "kind"}
_OF_CALLS = ("return_sequences", "return_state", "go_backwards", "zero_output_for_mask", "return_gates")
_ROLES = {"kernel": "kernel", "recurrent_kernel": "recurrent", "bias": "bias"}
_TABLES = {"initializer": keras.initializers, "regularizer": keras.regularizers, "constraint": keras.constraints}


class _Recurrent(keras.layers.Layer):
    """Base class: makes a description from the arguments and its arrays as weights, and calls the op."""

    kind: ClassVar[str]
    stateful, states = False, None  # Keras's Bidirectional reads them

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        given = {key: value for key, value in arguments.items() if key not in ("self", "__class__", "kwargs")}
        super().__init__(activity_regularizer=given.pop("activity_regularizer"), **arguments["kwargs"])
        self._given = given
        self.units = as_integer(self.name, "units", given["units"])
        for name in _OF_CALLS:
            setattr(self, name, as_flag(self.name, name, given[name]))
        for name in {"activation", "recurrent_activation"} & given.keys():
            given[name] = _activation(self.name, name, given[name])
        settings = {name: given[name] for name in _SETTINGS & given.keys()}
        self._spec = CellSpec(1, self.units, kind=self.kind, **settings)
        for rate in ("dropout", "recurrent_dropout"):
            if not 0.0 <= given[rate] < 1.0:
                raise ValueError(f"{self.name}: expected {rate} in [0, 1), got {given[rate]!r}")
        self._made = {
            f"{role}_{kind}": table.get(given[f"{role}_{kind}"])
            for role in _ROLES.values()
            for kind, table in _TABLES.items()
        }
        self.seed_generator = keras.random.SeedGenerator(given["seed"])
        self.input_spec = keras.layers.InputSpec(ndim=3)
        self.supports_masking = True
        self.state_size = list(self._spec.state_sizes.values())

    @property
    def spec(self) -> CellSpec:
        """The description of the cell; of width 1 before the layer is built."""
        return self._spec

    def build(self, input_shape: Sequence[Any]) -> None:
        """Create the weights, those of `CellSpec.shapes`."""
        width = int(input_shape[-1])
        self._spec = replace(self._spec, input_size=width)
        self._arrays = [self._added(name, shape) for name, shape in self._spec.shapes.items()]

    def _added(self, name: str, shape: tuple[int, ...]) -> Any:
        role = _ROLES.get(name)
        if role is None:
            first = (
                self._made["kernel_initializer"]
                if name == "projection"
                else "ones"
                if name.endswith("_gain")
                else "zeros"
            )
            return self.add_weight(shape=shape, name=name, initializer=first)
        made = {kind: self._made[f"{role}_{kind}"] for kind in _TABLES}
        if name == "bias" and self._given.get("unit_forget_bias") and "f" in self._spec.gates:
            made["initializer"] = _forgetting(made["initializer"], self.units)
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
        drops = self._drawn(sequences) if training else (None,) * 4
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
        """Draw the masks: dropout of x `[B, I]` and h `[B, P]`, zoneout of h `[B, T, P]` and c `[B, T, H]`."""
        batch, steps, width = _ops.shape(x)
        spec = self._spec
        kept = [
            self._mask((batch, steps, size), rate)
            for size, rate in ((spec.output_size, spec.zoneout), (self.units, spec.zoneout_cell))
        ]
        return (
            self._mask((batch, width), self._given["dropout"]),
            self._mask((batch, spec.output_size), self._given["recurrent_dropout"]),
            *(None if mask is None else _ops.cast(mask == 0.0, self.compute_dtype) for mask in kept),
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
        made = {}
        for name, value in self._made.items():
            table = _TABLES[name.rsplit("_", 1)[1]]
            made[name] = None if value is None else table.serialize(value)
        activity = keras.regularizers.serialize(self.activity_regularizer) if self.activity_regularizer else None
        given = {**self._given, "units": self.units, "gate_activations": dict(self._spec.gate_activations)}
        return {**super().get_config(), **given, **made, "activity_regularizer": activity}


def _forgetting(initializer: Any, units: int) -> Any:
    """Return an initialiser of a bias that sets the forget gate's block, the second, to ones."""

    def first(shape: Any, dtype: Any = None) -> Any:
        parts = [initializer((units,), dtype=dtype), _ops.ones((units,), dtype=dtype)]
        return _ops.concatenate([*parts, initializer((shape[0] - 2 * units,), dtype=dtype)])

    return first


def _activation(owner: str, name: str, given: Any) -> str:
    text = given if isinstance(given, str) else cells.activation(given)
    if not text:
        raise ValueError(f"{owner}: expected {name} to name an activation that the kernel supports, got {given!r}")
    return text


def _traced(spec: CellSpec) -> list[int]:
    """Return the width of each array of a trace."""
    return [spec.output_size if field == "h" else spec.units for field in TRACES[spec.kind]._fields]


def _registered(kind: type) -> type:
    return keras.saving.register_keras_serializable(package="cellstack")(kind)


@_registered
class LSTM(_Recurrent):
    """A long short-term memory for Keras, with flags that Keras's LSTM lacks.

    Args:
        units, use_bias, kernel_initializer, recurrent_initializer, bias_initializer, unit_forget_bias,
        kernel_regularizer, recurrent_regularizer, bias_regularizer, activity_regularizer, kernel_constraint,
        recurrent_constraint, bias_constraint, dropout, recurrent_dropout, seed, return_sequences, return_state,
        go_backwards, zero_output_for_mask: see Keras's LSTM. Dropout draws one mask per call for all gates.
        activation, recurrent_activation: names, optionally with parameters: "hard_sigmoid(0.2, 0.5)".
        peepholes, coupled, proj_size, layer_norm, norm_epsilon, clip, cell_clip, zoneout, zoneout_cell,
        gate_activations, learn_initial_state: see `cellstack.CellSpec`.
        return_gates: also return i, f, g, o, c and h of every step, in the order processed.
        kwargs: name, dtype and trainable, as for every Keras layer.

    Raises:
        ShapeError: a width below 1, or a projection that isn't narrower than the units.
        TypeError: a flag of the wrong type.
        ValueError: an unknown name, or a number out of range.

    >>> y, h, c = LSTM(4, peepholes=True, proj_size=3, return_state=True)(keras.ops.zeros((2, 5, 6)))
    >>> tuple(y.shape), tuple(h.shape), tuple(c.shape)
    ((2, 3), (2, 3), (2, 4))
    """

    kind = "lstm"

    def __init__(
        self,
        units: int,
        activation: Any = "tanh",
        recurrent_activation: Any = "sigmoid",
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        recurrent_initializer: Any = "orthogonal",
        bias_initializer: Any = "zeros",
        unit_forget_bias: bool = True,
        kernel_regularizer: Any = None,
        recurrent_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        recurrent_constraint: Any = None,
        bias_constraint: Any = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        seed: int | None = None,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        zero_output_for_mask: bool = False,
        *,
        peepholes: bool = False,
        coupled: bool = False,
        proj_size: int = 0,
        layer_norm: bool = False,
        norm_epsilon: float = 1e-5,
        clip: float | None = None,
        cell_clip: float | None = None,
        zoneout: float = 0.0,
        zoneout_cell: float = 0.0,
        gate_activations: Any = (),
        learn_initial_state: bool = False,
        return_gates: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(locals())


@_registered
class GRU(_Recurrent):
    """Gated recurrent units for Keras, with flags that Keras's GRU lacks.

    Args:
        units, activation, recurrent_activation, use_bias, kernel_initializer, recurrent_initializer, bias_initializer,
        kernel_regularizer, recurrent_regularizer, bias_regularizer, activity_regularizer, kernel_constraint,
        recurrent_constraint, bias_constraint, dropout, recurrent_dropout, seed, return_sequences, return_state,
        go_backwards, zero_output_for_mask, kwargs: see `LSTM`.
        reset_after: whether the reset gate acts after the recurrent product, as in Keras's GRU.
        layer_norm, norm_epsilon, clip, zoneout, gate_activations, learn_initial_state: see `cellstack.CellSpec`.
        return_gates: also return z, r, g and h of every step, in the order processed.

    Raises:
        ShapeError: a width below 1.
        TypeError: a flag of the wrong type.
        ValueError: an unknown name, or a number out of range.

    >>> y = GRU(4, layer_norm=True, zoneout=0.1, return_sequences=True)(keras.ops.zeros((2, 5, 6)))
    >>> tuple(y.shape)
    (2, 5, 4)
    """

    kind = "gru"

    def __init__(
        self,
        units: int,
        activation: Any = "tanh",
        recurrent_activation: Any = "sigmoid",
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        recurrent_initializer: Any = "orthogonal",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        recurrent_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        recurrent_constraint: Any = None,
        bias_constraint: Any = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        seed: int | None = None,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        reset_after: bool = True,
        zero_output_for_mask: bool = False,
        *,
        layer_norm: bool = False,
        norm_epsilon: float = 1e-5,
        clip: float | None = None,
        zoneout: float = 0.0,
        gate_activations: Any = (),
        learn_initial_state: bool = False,
        return_gates: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(locals())


@_registered
class SimpleRNN(_Recurrent):
    """A fully connected recurrence for Keras, with flags that Keras's SimpleRNN lacks.

    Args:
        units, activation, use_bias, kernel_initializer, recurrent_initializer, bias_initializer, kernel_regularizer,
        recurrent_regularizer, bias_regularizer, activity_regularizer, kernel_constraint, recurrent_constraint,
        bias_constraint, dropout, recurrent_dropout, seed, return_sequences, return_state, go_backwards,
        zero_output_for_mask, kwargs: see `LSTM`.
        layer_norm, norm_epsilon, clip, zoneout, gate_activations, learn_initial_state: see `cellstack.CellSpec`.
        return_gates: also return g and h of every step, in the order processed.

    Raises:
        ShapeError: a width below 1.
        TypeError: a flag of the wrong type.
        ValueError: an unknown name, or a number out of range.

    >>> y = SimpleRNN(4, clip=3.0)(keras.ops.zeros((2, 5, 6)))
    >>> tuple(y.shape)
    (2, 4)
    """

    kind = "rnn"

    def __init__(
        self,
        units: int,
        activation: Any = "tanh",
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        recurrent_initializer: Any = "orthogonal",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        recurrent_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        recurrent_constraint: Any = None,
        bias_constraint: Any = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        seed: int | None = None,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        zero_output_for_mask: bool = False,
        *,
        layer_norm: bool = False,
        norm_epsilon: float = 1e-5,
        clip: float | None = None,
        zoneout: float = 0.0,
        gate_activations: Any = (),
        learn_initial_state: bool = False,
        return_gates: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(locals())
