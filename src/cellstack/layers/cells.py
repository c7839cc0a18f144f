"""Cells: what happens in one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cellstack.layers import eager, op, weights
from cellstack.layers.base import Layer, as_dtype, as_input, as_integer, last_axis, recomputing, training_tensors
from cellstack.spec import ACTIVATIONS, GATES, CellSpec, ShapeError, State, check_state, check_step


def rate(owner: str, name: str, value: float) -> float:
    """Return a dropout rate, checked to lie in `[0, 1)`."""
    if not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ValueError(f"{owner}: expected {name} in [0, 1), got {value!r}: at 1 nothing would be left")
    return float(value)


class Cell(Layer):
    """What cells of every kind share: weights in blocks of H columns, one a gate, made at the first call or at once.

    A subclass names its `gates` and its `State`, and gives `as_state` and `step`.
    """

    gates: ClassVar[tuple[str, ...]]
    State: ClassVar[Any]

    kernel: Tensor
    recurrent_kernel: Tensor
    bias: Tensor | None
    draws: Tensor | None

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__(given["name"])
        self._config = given
        units, seed, device = as_integer(self._owner, "units", given["units"]), given["seed"], given["device"]
        given["units"] = units
        activation, recurrent_activation = given["activation"], given["recurrent_activation"]
        if not 1 <= units < 2**29:  # from here on the bytes of a recurrent kernel are past 64 bits
            raise ShapeError(f"{self._owner}: expected units >= 1 and below {2**29}, got {units}")
        self.units = self.output_size = units
        self.state_size = [units] * len(self.State._fields)
        self.activation, self.recurrent_activation = activation, recurrent_activation
        names = [eager.activation_name(a) for a in (activation, recurrent_activation)]
        self._functions = [
            eager.ACTIVATIONS[name] if name else a
            for name, a in zip(names, (activation, recurrent_activation), strict=True)
        ]
        # The kernel's codes, and the names of those that it hasn't: these take the torch loop.
        self._codes = [ACTIVATIONS.index(name) for name in names if name in ACTIVATIONS]
        self._foreign = [
            name or getattr(a, "__name__", type(a).__name__)
            for name, a in zip(names, (activation, recurrent_activation), strict=True)
            if name not in ACTIVATIONS
        ]
        self.use_bias = given["use_bias"]
        self.dropout = rate(self._owner, "dropout", given["dropout"])
        self.recurrent_dropout = rate(self._owner, "recurrent_dropout", given["recurrent_dropout"])
        if seed is not None:
            given["seed"] = seed = as_integer(self._owner, "seed", seed)
            if abs(seed) >= 2**63:
                raise TypeError(f"{self._owner}: expected seed to be an integer of 64 bits or None, got {seed!r}")
        self.seed = seed
        self.register_buffer("draws", None if seed is None or not self.drops else torch.zeros((), dtype=torch.int64))
        roles = {"kernel": "kernel", "recurrent_kernel": "recurrent", "bias": "bias"}
        self._parts = {
            weight: [
                weights.find(given[f"{role}_{kind}"], table, f"{role}_{kind}")
                for kind, table in (
                    ("initializer", weights.INITIALIZERS),
                    ("regularizer", weights.REGULARIZERS),
                    ("constraint", weights.CONSTRAINTS),
                )
            ]
            for weight, role in roles.items()
        }
        for weight in roles:
            self.register_parameter(weight, None)
        # Carries dtype and device until there are weights, so that .to() and .double() count before the first call too.
        self._like = torch.empty(0, dtype=as_dtype(given["dtype"]), device=device)
        self._no_bias = torch.empty(0, dtype=self._like.dtype, device=device)
        if given["input_size"] is not None:
            self.build(given["input_size"])

    @property
    def _columns(self) -> int:
        return len(self.gates) * self.units

    def extra_repr(self) -> str:
        """Say the widths, and the activations where they aren't the usual ones."""
        parts = [str(self.units)] + ([f"input_size={self.input_size}"] if self.built else [])
        for key, usual in (("activation", "tanh"), ("recurrent_activation", "sigmoid")):
            if getattr(self, key) != usual:
                parts.append(f"{key}={getattr(self, key)!r}")
        return ", ".join(parts)

    @property
    def drops(self) -> bool:
        """Whether training draws dropout masks."""
        return self.dropout > 0.0 or self.recurrent_dropout > 0.0

    @property
    def built(self) -> bool:
        """Whether the weights exist."""
        return self.input_size is not None

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device that the cell works in: its kernel, once there is one."""
        kernel = self.kernel
        return self._like if kernel is None else kernel

    @property
    def input_size(self) -> int | None:
        """Width I of the input, None before the weights exist."""
        kernel = self.kernel
        return None if kernel is None else kernel.shape[0]

    def build(self, input_size: int | Sequence[int | None]) -> None:
        """Make the weights for inputs of width `input_size` (or of a shape that ends in it)."""
        width = last_axis(self._owner, input_size)
        if self.input_size is not None:
            if width != self.input_size:
                raise ShapeError(f"{self._owner}: expected input_size {self.input_size}, as built, got {width}")
            return
        shapes: dict[str, tuple[int, ...]] = {
            "kernel": (width, self._columns),
            "recurrent_kernel": (self.units, self._columns),
        }
        if self.use_bias:
            shapes["bias"] = (self._columns,)
        with training_tensors():
            for name, shape in shapes.items():
                values, initializer = self._like.new_zeros(shape), self._parts[name][0]
                if initializer is None:
                    raise ValueError(f"{self._owner}: expected an initializer for {name}, got None")
                if name == "bias":
                    self._fill_bias(values, initializer)
                else:
                    weights.fill(values, initializer)
                setattr(self, name, nn.Parameter(values))

    def _fill_bias(self, bias: Tensor, initializer: Any) -> None:
        weights.fill(bias, initializer)

    def _apply(self, fn: Any, recurse: bool = True) -> Cell:
        super()._apply(fn, recurse)
        self._like, self._no_bias = fn(self._like), fn(self._no_bias)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        kernel = state_dict.get(f"{prefix}kernel")
        if not self.built and kernel is not None:
            if kernel.ndim == 2 and kernel.shape[1] == self._columns:
                self.build(kernel.shape[0])
            else:
                expected = f"expected {prefix}kernel [I, {len(self.gates)}H={self._columns}], got {tuple(kernel.shape)}"
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
        """Return zeros for h and c, each `[batch_size, H]`."""
        like = self.like
        return [like.new_zeros(batch_size, self.units) for _ in self.state_size]

    def arrays(self) -> list[Tensor]:
        """Return kernel, recurrent_kernel and bias (size 0: none) as the op takes them."""
        bias = self.bias
        return [self.kernel, self.recurrent_kernel, self._no_bias if bias is None else bias]

    def masks(self, batch: int, training: bool) -> tuple[Tensor | None, Tensor | None]:
        """Draw this call's dropout masks for x `[B, I]` and h `[B, H]`; None where nothing is dropped."""
        if not training or not self.drops:
            return None, None
        kernel, draws = self.kernel, self.draws
        if draws is not None and recomputing():
            raise RuntimeError(
                f"{self._owner}: expected the masks of the first pass, but with seed= each call draws its own: under "
                "torch.utils.checkpoint leave seed at None, torch's generator is put back for the second pass"
            )
        return (
            op.dropout_mask(draws, kernel, batch, kernel.shape[0], self.dropout, self.seed) if self.dropout else None,
            op.dropout_mask(draws, kernel, batch, self.units, self.recurrent_dropout, self.seed)
            if self.recurrent_dropout
            else None,
        )

    def as_state(self, owner: str, value: Any, batch: int | None, layer: int | None = None) -> Any:
        """Return a state that was given as tensors or arrays as a `State`, checked and converted."""
        raise NotImplementedError

    def step(
        self, x: Tensor, state: Sequence[Tensor] | None, drops: tuple[Tensor | None, Tensor | None] = (None, None)
    ) -> tuple[Tensor, ...]:
        """Run one step on what is known to be right: x `[B, I]`, a state, masks as `masks` drew them."""
        raise NotImplementedError


class LSTMCell(Cell):
    """One step of a long short-term memory.

        z = x·kernel + h_prev·recurrent_kernel + bias        i, f, o = σ(z_i, z_f, z_o)    g = φ(z_g)
        c = f·c_prev + i·g                                   h = o·φ(c)

    Args:
        units: width H of the state.
        activation: φ, by Keras's name or as a callable; None means linear.
        recurrent_activation: σ, likewise.
        use_bias: whether there is a bias.
        kernel_initializer, recurrent_initializer, bias_initializer: see `cellstack.layers.weights`.
        unit_forget_bias: start the forget gate's bias at 1. It is stored in the bias, never added at run time.
        kernel_regularizer, recurrent_regularizer, bias_regularizer: terms that `losses` gives.
        kernel_constraint, recurrent_constraint, bias_constraint: applied by `apply_constraints`.
        dropout: share of x that is dropped in training, in [0, 1); what stays is scaled by 1/(1-dropout). One mask
            serves all gates.
        recurrent_dropout: likewise of h_prev. A layer draws both masks once a call and uses them at every step; a
            cell that is called by itself draws them at each call.
        seed: makes the dropout masks repeatable: the n-th draw depends on the seed and n alone. The count is saved
            with the weights. None: torch's own generator.
        input_size: width I, to make the weights at once; None: at the first call.
        dtype, device: of the weights; None: torch's default and the CPU.
        name: said in error messages.

    Raises:
        ShapeError: a width below 1.
        ValueError: an unknown name, or a dropout outside [0, 1).

    >>> cell = LSTMCell(4)
    >>> h, (h, c) = cell(torch.zeros(2, 6), cell.get_initial_state(2))
    >>> tuple(h.shape), tuple(cell.kernel.shape)
    ((2, 4), (6, 16))

    Ref: Hochreiter and Schmidhuber 1997; the forget gate: Gers, Schmidhuber and Cummins 2000, eq. 2.4 to 2.8; dropout
    on the state: Gal and Ghahramani 2016.
    """

    gates = GATES
    State = State

    def __init__(
        self,
        units: int,
        activation: Any = "tanh",
        recurrent_activation: Any = "sigmoid",
        use_bias: bool = True,
        kernel_initializer: weights.Given = "glorot_uniform",
        recurrent_initializer: weights.Given = "orthogonal",
        bias_initializer: weights.Given = "zeros",
        unit_forget_bias: bool = True,
        kernel_regularizer: weights.Given = None,
        recurrent_regularizer: weights.Given = None,
        bias_regularizer: weights.Given = None,
        kernel_constraint: weights.Given = None,
        recurrent_constraint: weights.Given = None,
        bias_constraint: weights.Given = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        seed: int | None = None,
        *,
        input_size: int | None = None,
        dtype: str | torch.dtype | None = None,
        device: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__({key: value for key, value in locals().items() if key not in ("self", "__class__")})

    @property
    def unit_forget_bias(self) -> bool:
        """Whether the forget gate's bias starts at 1."""
        return self._config["unit_forget_bias"]

    def _fill_bias(self, bias: Tensor, initializer: Any) -> None:
        if not self.unit_forget_bias:
            super()._fill_bias(bias, initializer)
            return
        i, f, g_o = bias.split([self.units, self.units, 2 * self.units])
        weights.fill(i, initializer)
        weights.fill(g_o, initializer)
        f.fill_(1.0)

    @property
    def spec(self) -> CellSpec:
        """Description of the built cell, without its arrays.

        Raises:
            ValueError: the cell isn't built, or an activation isn't one of `cellstack.spec.ACTIVATIONS`.
        """
        if self.input_size is None:
            raise ValueError(f"{self._owner}: the weights don't exist yet: call the layer, or give input_size=")
        if self._foreign:
            raise ValueError(f"{self._owner}: no description for the activation {self._foreign[0]}")
        phi, sigma = (ACTIVATIONS[code] for code in self._codes)
        return CellSpec(self.input_size, self.units, phi, sigma, self.use_bias)

    def route(self, kernel: Tensor) -> tuple[str, str]:
        """Return which way weights like `kernel` are computed ("fused", "cudnn" or "loop"), and why."""
        if self._foreign:
            return "loop", f"activation {self._foreign[0]} is not one of {', '.join(ACTIVATIONS)}"
        device, dtype = kernel.device.type, kernel.dtype
        if device == "cuda":
            if self._codes != [ACTIVATIONS.index("tanh"), ACTIVATIONS.index("sigmoid")]:
                return "loop", "cuDNN computes tanh and sigmoid only"
            if torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled:
                return "cudnn", "a mask, recurrent dropout in training or return_gates take the torch loop"
            return "loop", "cuDNN is not available"
        if device not in ("cpu", "meta"):
            return "loop", f"there is no fused kernel for {device}"
        if dtype not in (torch.float32, torch.float64):
            return "loop", f"{str(dtype).removeprefix('torch.')} is neither float32 nor float64"
        if op.transformed():
            return "loop", "torch.func and forward-mode differentiation need torch's own operations"
        return "fused", ""

    def forward(self, inputs: Any, states: Any = None, training: bool | None = None) -> tuple[Tensor, list[Tensor]]:
        """Run one step.

        Args:
            inputs: `[B, I]`.
            states: the pair (h, c), each `[B, H]`; zeros where None.
            training: whether dropout is active; None: whether the module is in training mode.

        Returns:
            h `[B, H]`, and the new state `[h, c]`.

        Raises:
            ShapeError, TypeError: see `cellstack.layers`.
        """
        kernel = self.kernel
        like = self.like
        x = as_input(self._owner, "inputs", inputs, like)
        check_step(self._owner, x.shape, None if kernel is None else kernel.shape[0], "inputs")
        if kernel is None:
            self.build(x.shape[1])
        state = None if states is None else self.as_state(self._owner, states, x.shape[0])
        drops = self.masks(x.shape[0], self._trains(training))
        h, c = self.step(x, state, drops)
        return h, [h, c]

    def as_state(self, owner: str, value: Any, batch: int | None, layer: int | None = None) -> State:
        """Return a state that was given as a pair of tensors or arrays, checked and converted.

        A `batch` of None is taken from h.
        """
        if not hasattr(value, "__len__"):
            raise TypeError(f"{owner}: expected a state of tensors or arrays, got {type(value).__name__}")
        parts = [value] if isinstance(value, Tensor) and value.ndim < 3 else list(value)
        like = self.like
        tensors = [as_input(owner, "state", part, like) for part in parts]
        shapes = [tuple(t.shape) for t in tensors]
        if batch is None:
            batch = shapes[0][0] if shapes and shapes[0] else 0
        check_state(owner, shapes, batch, self.units, layer)
        return State(*tensors)

    def step(
        self, x: Tensor, state: Sequence[Tensor] | None, drops: tuple[Tensor | None, Tensor | None] = (None, None)
    ) -> tuple[Tensor, Tensor]:
        """Run one step on what is known to be right: x `[B, I]`, state (h, c), masks as `masks` drew them."""
        input_drop, recurrent_drop = drops
        if input_drop is not None:
            x = x * input_drop
        arrays = self.arrays()
        h0, c0 = (None, None) if state is None else (state[0], state[1])
        starts_h, starts_c = ([], []) if h0 is None or c0 is None else ([h0], [c0])
        drop = [] if recurrent_drop is None else [recurrent_drop]
        if self.route(arrays[0])[0] != "fused":
            functions = self._functions
            out = eager.lstm(x.unsqueeze(1), starts_h, starts_c, arrays, drop, None, functions, False, False, False)
            return out[0], out[1]
        save = needs_grad(x, *starts_h, *starts_c, *arrays)
        if not save and not drop and x.is_cpu and op.direct(x):
            return op.step(x, h0, c0, arrays, self._codes)
        out = op.lstm(x.unsqueeze(1), starts_h, starts_c, arrays, drop, None, self._codes, False, False, save, 0)
        return out[0], out[1]


def needs_grad(*tensors: Tensor) -> bool:
    """Whether a call on these has to keep what its backward pass needs."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
