"""Base class of the cells: their weights, their masks, and the choice of the implementation that runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from cellstack.cells import KINDS
from cellstack.cells.activations import ACTIVATIONS
from cellstack.cells.arguments import ACTIVATION_ARGUMENTS, Argument, sign
from cellstack.cells.errors import ShapeError, as_integer, check_state, check_state_numbers, check_step
from cellstack.cells.spec import ARRAYS, CellSpec, described
from cellstack.layers import eager, op, weights
from cellstack.layers.base import (
    Layer,
    as_dtype,
    as_input,
    exporting,
    last_axis,
    recomputing,
    storable,
    training_tensors,
)


class Masks(NamedTuple):
    """Random masks for one call of a cell over T steps in training; None where there is none."""

    input: Tensor | None = None  # [B, I]
    recurrent: Tensor | None = None  # [B, P]
    zoneout: tuple[Tensor | None, ...] = ()  # of each state in `Kind.zoneout`, [B, T, P] or [B, T, H]

    def at(self, steps: slice) -> Masks:
        """Return the masks of some steps."""
        return self.with_each(lambda mask: mask[:, steps])

    def with_each(self, change: Callable[[Tensor], Tensor]) -> Masks:
        """Return the masks with each mask of zoneout changed by a function."""
        return self._replace(zoneout=tuple(None if mask is None else change(mask) for mask in self.zoneout))


NO_MASKS = Masks()


def op_masks(masks: Sequence[Masks], cells: Sequence[op.CellCall], like: Tensor) -> list[Tensor]:
    """Return the masks of layers as the op's list, with empty tensors like `like` for absent ones."""
    for of_layer in masks:  # faster than `all`, at every call
        if of_layer.recurrent is not None or of_layer.zoneout:
            break
    else:
        return []
    in_order: list[Tensor | None] = []
    for of_layer, cell in zip(masks, cells, strict=True):
        zoneout = of_layer.zoneout or (None,) * (len(cell.masks) - 1)
        in_order += [of_layer.recurrent, *zoneout]
    absent = like.new_empty(0)
    return [absent if mask is None else mask for mask in in_order] if any(mask is not None for mask in in_order) else []


ROLES = {"kernel": "kernel", "recurrent_kernel": "recurrent", "bias": "bias"}
"""Arrays with an initialiser, a regulariser and a constraint; the prefix of the constructor's arguments for them."""

_TABLES = {"initializer": weights.INITIALIZERS, "regularizer": weights.REGULARIZERS, "constraint": weights.CONSTRAINTS}


def usual_forget_bias(spec: CellSpec) -> float:
    """Return the value with which `unit_forget_bias` initialises: exp keeps everything at 0, and σ most of it at 1."""
    return 0.0 if spec.exponential_forget else 1.0


def _of_forget_bias(owner: str, value: Any) -> Any:
    """Return the initializer that a number, a name, a description or a callable stands for."""
    if isinstance(value, (int, float)):
        return partial(weights.constant, value=value)
    return weights.find(owner, "forget_bias", value, weights.INITIALIZERS)


class Cell(Layer):
    """Base class of the cells. Their arrays (`CellSpec.shapes`) are created in the constructor or at the first call.

    A subclass defines `kind`; its constructor and `State` follow from the kind's declaration in `cellstack.cells`.
    """

    kind: ClassVar[str]
    State: ClassVar[Any]
    signature: ClassVar[dict[str, Argument]]

    kernel: Tensor
    recurrent_kernel: Tensor
    bias: Tensor | None
    draws: Tensor | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in vars(cls):
            kind = KINDS[cls.kind]
            cls.State, cls.signature = kind.state, sign(cls, kind, "cell", globals())

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config["name"])
        self._config = config = {key: storable(value) for key, value in config.items()}
        for argument in self.signature.values():
            if "spec" not in argument.of:  # CellSpec checks its own
                argument.check(self._owner, config[argument.name])
        config["units"] = self.units = as_integer(self._owner, "units", config["units"])
        if not 1 <= self.units < 2**29:  # from here on the size of a recurrent kernel in bytes overflows 64 bits
            raise ShapeError(f"{self._owner}: expected units >= 1 and below {2**29}, got {self.units}")
        if "proj_size" in config:
            config["proj_size"] = as_integer(self._owner, "proj_size", config["proj_size"])
        self._functions, self._foreign, spec = self._described(config)
        self._describe(spec)
        self.activation = config.get("activation", spec.activation)
        self.recurrent_activation = config.get("recurrent_activation", spec.recurrent_activation)
        self.use_bias = spec.use_bias
        self.output_size = spec.output_size
        sizes = list(spec.state_sizes.values())
        self.state_size = sizes if len(sizes) > 1 else sizes[0]
        self.dropout, self.recurrent_dropout = float(config["dropout"]), float(config.get("recurrent_dropout", 0.0))
        for name in spec.of_kind.zoneout.values():
            setattr(self, name, getattr(spec, name))
        if config.get("forget_bias") is not None and not self._forgets:
            raise ValueError(f"{self._owner}: forget_bias needs a forget gate with a bias")
        _of_forget_bias(self._owner, config.get("forget_bias"))  # a name that isn't known is an error now
        seed = config["seed"]
        if seed is not None:
            config["seed"] = seed = as_integer(self._owner, "seed", seed)
            if abs(seed) >= 2**63:
                raise TypeError(f"{self._owner}: expected seed to be a 64-bit integer or None, got {seed!r}")
        self.seed = seed
        self.register_buffer("draws", None if seed is None or not self.drops else torch.zeros((), dtype=torch.int64))
        self._parts = {
            array: [
                weights.find(self._owner, f"{role}_{what}", config[f"{role}_{what}"], table)
                for what, table in _TABLES.items()
            ]
            for array, role in ROLES.items()
            if f"{role}_initializer" in config
        }
        for name in ARRAYS:
            self.register_parameter(name, None)
        self._like = torch.empty(0, dtype=as_dtype(config["dtype"]), device=config["device"])
        if config["input_size"] is not None:
            self.build(config["input_size"])

    def _described(self, config: dict[str, Any]) -> tuple[list[eager.Function], list[str], CellSpec]:
        """Return the functions of `CellSpec.slots`, the names of those that the kernel lacks, and the description.

        The description has the least width, to check the flags before there is an input. Activations that the kernel
        lacks are linear in it.
        """
        by_gate = config.get("gate_activations", ())
        try:
            by_gate = dict(by_gate.items() if isinstance(by_gate, Mapping) else by_gate)
        except (TypeError, ValueError):
            raise TypeError(f"{self._owner}: expected gate_activations as a dict by gate, got {by_gate!r}") from None
        usual = {name: config[name] for name in ACTIVATION_ARGUMENTS if name in config}
        texts = {}
        for key, value in (*usual.items(), *by_gate.items()):
            try:
                name = eager.activation_name(value)
            except (TypeError, ValueError) as error:
                turned = key == "activation" and isinstance(value, int)  # torch.nn.LSTM(input_size, hidden_size)
                hint = f" {value}: the first argument is units, and input_size= is the width of x" if turned else ""
                raise type(error)(f"{self._owner}: {key}: {error}{hint}") from None
            texts[key] = name if eager.known(name, key) else "linear"
        fields = {name: config[name] for name in KINDS[self.kind].settings if name in config}
        fields |= {key: texts[key] for key in usual}
        if "gate_activations" in fields:
            fields["gate_activations"] = {gate: texts[gate] for gate in by_gate}
        try:
            spec = CellSpec(1 + bool(config.get(KINDS[self.kind].scalar)), kind=self.kind, **fields)
        except (ShapeError, TypeError, ValueError) as error:
            raise type(error)(str(error).replace("CellSpec", self._owner, 1)) from None
        arguments = {slot: spec.of_kind.activation(slot) for slot in spec.slots}
        chosen = [by_gate.get(slot, usual.get(name, getattr(spec, name))) for slot, name in arguments.items()]
        names = [eager.activation_name(value) for value in chosen]
        foreign = [
            name or getattr(value, "__name__", type(value).__name__)
            for name, value, argument in zip(names, chosen, arguments.values(), strict=True)
            if not eager.known(name, argument)
        ]
        return [eager.as_function(value) for value in chosen], foreign, spec

    def _describe(self, spec: CellSpec) -> None:
        """Store the description, and the parts of it that each call needs."""
        self._spec, self._call, self._plain = spec, op.CellCall(spec), spec.plain
        self._names, self._sizes = tuple(spec.shapes), spec.state_sizes
        self._rates = tuple(spec.of_kind.zoneout.values())

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle stores: the description as text, without what follows from it."""
        derived = ("_spec", "_call", "_plain", "_names", "_sizes", "_rates")
        stored = {name: value for name, value in self.__dict__.items() if name not in derived}
        return {**stored, "_text": self._spec.text}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle, also one that stores what follows from the description."""
        attributes = dict(state)
        text = attributes.pop("_text")
        super().__setstate__(attributes)
        self._describe(described(text))

    def extra_repr(self) -> str:
        """Return the widths, and the arguments that differ from the defaults."""
        parts = [str(self.units)] + ([f"input_size={self.input_size}"] if self.built else [])
        declared = self._spec.of_kind.settings
        usual = {key: declared[key].default for key in ACTIVATION_ARGUMENTS if key in declared}
        changed = {key: self._config[key] for key in usual if self._config[key] != usual[key]}
        settings = [key for key in self._spec.settings if key not in ("input_size", "units", "kind", *usual)]
        changed |= {key: self._config[key] for key in sorted(settings, key=lambda key: key != "gate_activations")}
        return ", ".join([*parts, *(f"{key}={value!r}" for key, value in changed.items())])

    @property
    def drops(self) -> bool:
        """Whether training draws dropout or zoneout masks."""
        return max(self.dropout, self.recurrent_dropout, *[getattr(self, name) for name in self._rates]) > 0.0

    @property
    def built(self) -> bool:
        """Whether the weights exist."""
        return self.input_size is not None

    @property
    def like(self) -> Tensor:
        """A tensor of the cell's dtype and device: its kernel, once that exists."""
        kernel = self._array("kernel")
        return self._like if kernel is None else kernel

    @property
    def input_size(self) -> int | None:
        """Width I of the input, None before the weights exist."""
        kernel = self._array("kernel")
        return None if kernel is None else kernel.shape[0] + self._spec.scalar

    @property
    def spec(self) -> CellSpec:
        """Description of the built cell, without its arrays.

        Raises:
            ValueError: the cell isn't built, or an activation isn't in `cellstack.cells.activations.ACTIVATIONS`.
        """
        if not self.built:
            raise ValueError(f"{self._owner}: the weights don't exist yet: call the layer, or pass input_size=")
        if self._foreign:
            raise ValueError(f"{self._owner}: spec doesn't support the activation {self._foreign[0]}")
        return self._spec

    def build(self, input_size: int | Sequence[int | None]) -> None:
        """Create the weights for inputs of width `input_size`, or of this shape."""
        width = last_axis(self._owner, input_size)
        if self.input_size is not None:
            if width != self.input_size:
                raise ShapeError(f"{self._owner}: the weights are for input_size {self.input_size}, got {width}")
            return
        self._describe(replace(self._spec, input_size=width))
        with training_tensors():
            shapes, initializers = self._spec.shapes, {ROLES[name]: parts[0] for name, parts in self._parts.items()}
            for name, _, first, *_ in self._spec.of_kind.every_array:
                if name not in shapes:
                    continue
                values = self._like.new_zeros(shapes[name])
                if first == "ones":
                    values.fill_(1.0)
                elif first != "zeros":
                    self._fill(name, values, initializers[first])
                setattr(self, name, nn.Parameter(values))

    def _fill(self, name: str, values: Tensor, initializer: Any) -> None:
        """Initialise a matrix or a bias; the forget gate's bias with `forget_bias`, if that is given."""
        if initializer is None:
            raise ValueError(f"{self._owner}: expected an initializer for {name}, got None")
        if name != "bias" or self.forget_bias is None:
            for matrix in values if values.ndim == 3 else [values]:
                weights.fill(matrix, initializer)
            return
        at = self._spec.gates.index("f") * self.units
        for head in values[at : at + self.units].view(self._spec.heads, -1):
            weights.fill(head, _of_forget_bias(self._owner, self.forget_bias))
        for part in (values[:at], values[at + self.units :]):
            if len(part):
                weights.fill(part, initializer)

    @property
    def _forgets(self) -> bool:
        return self.use_bias and "f" in self._spec.gates

    @property
    def unit_forget_bias(self) -> bool:
        """Whether the forget gate's bias is initialised with 1 (see `forget_bias`), unless that is given."""
        return self._config.get("unit_forget_bias", False)

    @property
    def forget_bias(self) -> Any:
        """Initial value of the forget gate's bias, or its initializer; None: `bias_initializer` determines it."""
        bias = self._config.get("forget_bias")
        if bias is None and self.unit_forget_bias:
            bias = usual_forget_bias(self._spec)
        return bias if "f" in self._spec.gates else None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        kernel = state_dict.get(f"{prefix}kernel")
        if not self.built and kernel is not None:
            columns = self._spec.columns
            if kernel.ndim == 2 and kernel.shape[1] == columns:
                self.build(kernel.shape[0] + self._spec.scalar)
            else:
                letters = "U" if self._spec.backbone_units else f"{len(self._spec.gates)}H"
                expected = f"expected {prefix}kernel [I, {letters}={columns}], got {tuple(kernel.shape)}"
                args[-1].append(f"{self._owner}: {expected}")  # error_msgs
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _loss_terms(self) -> Iterator[Tensor]:
        for name, (_, regularizer, _) in self._parts.items():
            if regularizer is not None and getattr(self, name) is not None:
                yield regularizer(getattr(self, name))

    @torch.no_grad()
    def _constrain(self) -> None:
        for name, (_, _, constraint) in self._parts.items():
            weight = getattr(self, name)
            if constraint is not None and weight is not None:
                weight.copy_(constraint(weight))

    def get_initial_state(self, batch_size: int) -> list[Tensor]:
        """Return the initial state, `[batch_size, H]` for each array: zeros, or the learned values."""
        learned = self._spec.learn_initial_state and self.built
        return [
            getattr(self, f"initial_{name}").expand(batch_size, size)
            if learned
            else self.like.new_zeros(batch_size, size)
            for name, size in self._sizes.items()
        ]

    def arrays(self) -> list[Tensor]:
        """Return the arrays of a built cell for the op, in the order of `CellSpec.shapes`.

        Raises:
            TypeError: an array is of a subclass of torch.Tensor, which the kernel can't read.
        """
        arrays: list[Any] = [self._array(name) for name in self._names]
        for name, array in zip(self._names, arrays, strict=True):
            if type(array) not in op.PLAIN and not op.symbolic(array):
                raise TypeError(
                    f"{self._owner}: expected {name} to be a torch.Tensor or nn.Parameter, got {type(array).__name__}: "
                    "subclasses of torch.Tensor aren't supported as weights"
                )
        return arrays

    def _array(self, name: str) -> Tensor | None:
        """Return the attribute `name`; for a parameter without the slow attribute look-up of a module."""
        parameters = self._parameters
        return parameters[name] if name in parameters else getattr(self, name)

    def masks(self, batch: int, steps: int, training: bool) -> Masks:
        """Draw the masks of a call over `steps` steps: see `Masks`."""
        if not training or not self.drops:
            return NO_MASKS
        if self.draws is not None and recomputing():
            raise RuntimeError(
                f"{self._owner}: seed= isn't supported under torch.utils.checkpoint, as the second pass would draw "
                "other masks: leave seed at None, so that torch restores its generator for the second pass"
            )
        of_x = self._draw(batch, self._spec.features, self.dropout)
        if of_x is not None and self._spec.scalar:
            of_x = torch.nn.functional.pad(of_x, (0, 1), value=1.0)  # a scalar isn't dropped
        return Masks(
            of_x,
            self._draw(batch, self.output_size, self.recurrent_dropout),
            tuple(
                self._draw_zoneout(batch, steps, self._sizes[state], getattr(self, name))
                for state, name in self._spec.of_kind.zoneout.items()
            ),
        )

    def _draw(self, rows: int, width: int, share: float) -> Tensor | None:
        return op.dropout_mask(self.draws, self.kernel, rows, width, share, self.seed) if share else None

    def _draw_zoneout(self, batch: int, steps: int, width: int, share: float) -> Tensor | None:
        """Draw a mask of ones where the old value is kept: the complement of a dropout mask."""
        mask = self._draw(batch * steps, width, share)
        return None if mask is None else (mask == 0.0).to(mask.dtype).view(batch, steps, width)

    def route(self, kernel: Tensor) -> tuple[str, str]:
        """Return the implementation for weights like `kernel` ("fused", "cudnn", "torch" or "loop"), and the reason."""
        if self._foreign:
            return "loop", f"activation {self._foreign[0]} is not one of {', '.join(ACTIVATIONS)}"
        if kernel.is_cpu and kernel.dtype in op.ELEMENTS and op.untraced() and not op.transformed():
            return "fused", ""  # the usual case, checked at every training step
        device, dtype = kernel.device.type, kernel.dtype
        if device == "cuda":
            if not self._plain:
                return "loop", "cuDNN supports only the plain LSTM, with tanh and sigmoid"
            if torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled:
                return "cudnn", "the torch loop for masks, resets, return_gates, and recurrent dropout in training"
            return "loop", "cuDNN is not available"
        if device not in ("cpu", "meta"):
            return "loop", f"the fused kernel doesn't support {device}"
        if dtype not in (torch.float32, torch.float64):
            return "loop", f"{str(dtype).removeprefix('torch.')} is neither float32 nor float64"
        if exporting():
            return "torch", "torch.jit.trace and torch.onnx.export need torch's operators"
        if op.transformed():
            return "loop", "torch.func and forward-mode differentiation need torch's operators"
        return "fused", ""

    def forward(self, inputs: Any, states: Any = None, training: bool | None = None) -> tuple[Tensor, list[Tensor]]:
        """Run one step.

        Args:
            inputs: `[B, I]`.
            states: for an LSTM the pair (h, c), otherwise h or [h]; each `[B, H]`, a projected h `[B, P]`. None: the
                initial state.
            training: whether dropout and zoneout are active; None: use the module's mode.

        Returns:
            h, and the new state as a list: `[h, c]`, or `[h]`.

        Raises:
            ShapeError, TypeError: see `cellstack.layers`.
        """
        kernel = self.kernel
        like = self.like
        x = as_input(self._owner, "inputs", inputs, like)
        check_step(self._owner, x.shape, self.input_size, "inputs")
        if kernel is None:
            self.build(x.shape[1])
        state = None if states is None else self.as_state(self._owner, states, x.shape[0])
        ends = self.step(x, state, self.masks(x.shape[0], 1, self._trains(training)))
        return ends[0], list(ends)

    def as_state(self, owner: str, value: Any, batch: int | None, layer: int | None = None) -> Any:
        """Convert a state of tensors or arrays to `State` or `HiddenState`, and check it.

        A single array is h. If `batch` is None, it is that of h.
        """
        if not hasattr(value, "__len__"):
            raise TypeError(f"{owner}: expected a state of tensors or arrays, got {type(value).__name__}")
        parts = [value] if getattr(value, "ndim", 3) < 3 else list(value)
        like = self.like
        tensors = [as_input(owner, "state", part, like) for part in parts]
        for tensor in tensors:
            if op.wraps(tensor) and not op.symbolic(tensor):
                raise TypeError(
                    f"{owner}: expected the state as torch.Tensor, got {type(tensor).__name__}: subclasses of "
                    "torch.Tensor that define __torch_dispatch__ aren't supported as states"
                )
        shapes = [tuple(t.shape) for t in tensors]
        if batch is None:
            batch = shapes[0][0] if shapes and shapes[0] else 0
        check_state(owner, shapes, batch, self._sizes, layer)
        if tensors[0].is_cpu and op.direct(tensors[0]):  # elsewhere, the check would wait for the device
            where = f"{owner}: state" if layer is None else f"{owner}: state of layer {layer}"
            check_state_numbers(where, self._spec.of_kind, [tensor.detach() for tensor in tensors])
        return self.State(*tensors)

    def step(self, x: Tensor, state: Sequence[Tensor] | None, masks: Masks = NO_MASKS) -> tuple[Tensor, ...]:
        """Run one step on checked arguments: x `[B, I]`, a state, masks of one step (`Masks.at`)."""
        if masks.input is not None:
            x = x * masks.input
        arrays = self.arrays()
        starts = [] if state is None else list(state)
        drops = op_masks([masks], [self._call], self._like)
        if self.route(arrays[0])[0] != "fused":
            rest = [self._spec], [self._functions], False, False, False
            return tuple(eager.run_eagerly(x.unsqueeze(1), starts, arrays, drops, None, None, *rest))
        save = needs_grad(x, *starts, *arrays)
        if not save and not drops and x.is_cpu and op.direct(x):
            return op.step(x, starts, arrays, self._call)
        call = op.OpCall(x.unsqueeze(1), starts, arrays, drops, None, None, [self._call], sequences=False, save=save)
        out = op.run_op(call)
        return tuple(out[: len(self._sizes)])


def needs_grad(*tensors: Tensor) -> bool:
    """Whether a call on these tensors needs a backward pass."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
