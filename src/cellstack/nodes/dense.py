"""`Dense` and `GroupedDense`: products along the last axis, run by the kernel; a stack and its head are one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from cellstack import native, spec
from cellstack.bfloat16 import BFloat16Array, rounded
from cellstack.nodes.activations import MORE_ACTIVATIONS, activation_function, activation_gradient, check_activation
from cellstack.nodes.base import (
    Array,
    CellState,
    Flow,
    KernelLayers,
    NodeRun,
    Shape,
    StateGradients,
    Stepwise,
    check_choice,
    frozen_bfloat16,
    frozen_copy,
    one_dtype,
)
from cellstack.nodes.cell import STORED_WEIGHTS, check_narrow
from cellstack.spec import ShapeError

if TYPE_CHECKING:
    from cellstack.nodes.stored import Entry


class Products(Stepwise):
    """Base class of nodes that multiply their input with a matrix, `kernel`, whose numbers may have fewer bits."""

    kernel: Array
    bias: Array | None
    units: int
    multiplied = ("kernel",)

    def _take_arrays(self, *axes: str) -> tuple[int, ...]:
        """Check kernel and bias, and return the shape of the kernel, which is `[I, O]` or `[groups, I, O]`."""
        owner, kernel, bias = type(self).__name__, self.kernel, self.bias
        if isinstance(kernel, BFloat16Array):
            stored = frozen_bfloat16(owner, "kernel", kernel, axes)
            object.__delattr__(self, "kernel")  # `__getattr__` returns it as float32
        else:
            stored = frozen_copy(owner, "kernel", kernel, axes)
            object.__setattr__(self, "kernel", stored)
        shape = stored.shape
        groups = shape[0] if len(axes) == 3 else 1
        if bias is not None:
            object.__setattr__(self, "bias", frozen_copy(owner, "bias", bias, (groups * shape[-1],)))
        whole = np.empty(0, np.float32) if isinstance(stored, BFloat16Array) else stored
        object.__setattr__(self, "dtype", one_dtype(owner, {"kernel": whole, "bias": self.bias}))
        object.__setattr__(self, "_stored", stored)
        object.__setattr__(self, "_packed", {})
        object.__setattr__(self, "input_size", groups * shape[-2])
        object.__setattr__(self, "units", groups * shape[-1])
        return shape

    def __getattr__(self, name: str) -> Array:
        """Return a kernel that is stored as bfloat16, converted to float32."""
        if name != "kernel" or "_stored" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        array = np.asarray(self.__dict__["_stored"])
        array.setflags(write=False)
        return array

    @property
    def weights(self) -> str:
        """The number format of the kernel: `"float32"`, `"float64"` or `"bfloat16"`."""
        assert self.dtype is not None
        return "bfloat16" if isinstance(self.__dict__["_stored"], BFloat16Array) else self.dtype.name

    def with_weights(self, weights: str) -> Any:
        """See `Cell.with_weights`."""
        owner = type(self).__name__
        check_choice(owner, "weights", weights, STORED_WEIGHTS)
        if weights == self.weights or (weights == "float32" and self.dtype == np.float64):
            return self
        kernel = self.kernel
        if weights == "bfloat16":
            check_narrow(owner, weights, kernel.dtype)
            kernel = BFloat16Array(rounded(kernel))
        make: Any = type(self)
        return make(kernel, *self._arguments()[1:])

    def check(self, owner: str, *shapes: Shape) -> Shape:
        return (*super().check(owner, *shapes)[:-1], self.units)

    def packed_in(self, weights: str | None) -> Any:
        """Return the weights in the kernel's layout, packed at the first use and shared by runs and streams.

        Args:
            weights: one of `WEIGHTS`; None: their own number format. A float64 node has only its own.

        Raises:
            TypeError, ValueError: see `Cell.pack`.
        """
        if weights is None or (weights == "float32" and self.dtype == np.float64):
            weights = self.weights
        packed = self.__dict__["_packed"]
        if weights not in packed:
            assert self.dtype is not None
            check_narrow(type(self).__name__, weights, self.dtype, self.kernel.shape[-2])
            packed[weights] = self._pack(weights)
        return packed[weights]

    def _pack(self, weights: str) -> Any:
        raise NotImplementedError

    def product(self, x: Array, weights: str | None = None, threads: int = 1) -> Array:
        """Return `[..., O]` for `x [..., I]` of the kernel's dtype.

        Args:
            x: the input.
            weights: see `packed_in`.
            threads: the number of threads that the kernel may use.
        """
        raise NotImplementedError

    def apply(self, x: Array) -> Array:
        """Return `[..., O]` for `x [..., I]`.

        Raises:
            ShapeError: a wrong width.
            TypeError: a wrong dtype.
        """
        owner = type(self).__name__
        if not x.ndim or x.shape[-1] != self.input_size:
            raise ShapeError(f"{owner}: expected x [..., I={self.input_size}], got {x.shape}")
        if x.dtype != self.dtype:
            raise TypeError(f"{owner}: expected x of {self.dtype}, got {x.dtype}")
        return self.product(x)

    def run(
        self,
        flows: Sequence[Flow],
        states: tuple[CellState | None, ...],
        threads: int,
        weights: str | None = None,
    ) -> Flow:
        """See `Node.run` and `packed_in`."""
        (flow,) = flows
        return Flow(self.product(flow.x, weights, threads), self.mask_of(flows), flow.reset)

    def stored(self) -> tuple[dict[str, Any], Mapping[str, Array | BFloat16Array]]:
        values, arrays = super().stored()
        return values, {**arrays, "kernel": self.__dict__["_stored"]}

    @classmethod
    def restored(cls, entry: Entry) -> Any:
        values = entry.take(cls.keys())
        arrays = {name: entry.array(name, shape, name == "kernel") for name, shape in cls.array_shapes(values).items()}
        return cls(**arrays, **{key: values[key] for key in cls.settings})

    def _arguments(self) -> tuple[Any, ...]:
        arguments: Any = self
        return self.__dict__["_stored"], *(getattr(self, argument.name) for argument in fields(arguments)[1:])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments()

    @property
    def bytes_read(self) -> int:
        return super().bytes_read - (self.kernel.size * 2 if self.weights == "bfloat16" else 0)

    @property
    def narrowed(self) -> str:
        """The number format of the kernel if it is bfloat16, in a few words, else ""."""
        return ", matrix in bfloat16" if self.weights == "bfloat16" else ""


@dataclass(frozen=True, eq=False)
class Dense(Products):
    """`activation(x·kernel + bias)` along the last axis.

    Args:
        kernel: `[I, O]`, float32, float64 or a `BFloat16Array`, which stays bfloat16: see `Network.with_weights`.
        bias: `[O]` of the same dtype, float32 if the kernel is bfloat16, or None.
        activation: see `Activation`.

    Raises:
        ShapeError: a wrong shape.
        TypeError: a wrong dtype.
        ValueError: an unknown activation.
    """

    kernel: Array
    bias: Array | None = None
    activation: str = "linear"
    file_type = "dense"
    arrays: ClassVar = {"kernel": ("input_size", "units"), "bias": ("units",)}
    settings: ClassVar = {"activation": str}

    def __post_init__(self) -> None:
        self._take_arrays("I", "O")
        object.__setattr__(self, "activation", check_activation("Dense", self.activation))

    @property
    def packed(self) -> Any:
        """The weights in the kernel's layout and in their own number format."""
        return self.packed_in(None)

    def _pack(self, weights: str) -> Any:
        activation = spec.activation("linear" if self.numpy_activation else self.activation)
        return native.dense(self.kernel, self.bias, activation, weights)

    @cached_property
    def numpy_activation(self) -> Callable[[Array], Array] | None:
        """The activation as a NumPy function if the kernel doesn't implement it, else None."""
        return activation_function(self.activation) if self.activation in MORE_ACTIVATIONS else None

    @property
    def kernel_layers(self) -> KernelLayers:
        return KernelLayers((((self,), False),), 1, finish=self.numpy_activation)

    def product(self, x: Array, weights: str | None = None, threads: int = 1) -> Array:
        x = np.require(x, requirements=("C", "A"))
        y = np.empty((*x.shape[:-1], self.units), x.dtype)
        rows = native.Sequences(1, x.size // x.shape[-1], x, 0, x.shape[-1])
        native.forward(rows, [native.Layer(self.packed_in(weights), y=y)], threads)
        return self.numpy_activation(y) if self.numpy_activation else y

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        z = run.inputs[0].x @ self.kernel + (0 if self.bias is None else self.bias)
        return [activation_gradient(self.activation, z, dy) @ self.kernel.T]

    @property
    def summary(self) -> str:
        return self.activation

    def engine(self, dtype: np.dtype[Any]) -> str:
        after = f", {self.activation} in NumPy" if self.numpy_activation else ""
        return f"fused kernel ({native.isa()}, {dtype}{self.narrowed}): one product{after}"


WIDE = 128  # features that a product of the kernel should have: smaller groups share one, with zeros between them


@dataclass(frozen=True, eq=False)
class GroupedDense(Products):
    """A dense layer of equal groups of features, each with its own matrix: a block-diagonal `x·kernel + bias`.

    Args:
        kernel: `[groups, I/groups, O/groups]`, float32, float64 or a `BFloat16Array`, which stays bfloat16.
        bias: `[O]` of the same dtype, float32 if the kernel is bfloat16, or None.

    Raises:
        ShapeError: a wrong shape.
        TypeError: a wrong dtype.

    >>> GroupedDense(np.array([[[2.0]], [[3.0]]])).apply(np.array([[1.0, 10.0]]))
    array([[ 2., 30.]])
    """

    kernel: Array
    bias: Array | None = None
    file_type = "grouped_dense"
    arrays: ClassVar = {"kernel": ("groups", "group_input_size", "group_units"), "bias": ("units",)}

    def __post_init__(self) -> None:
        self._take_arrays("G", "I/G", "O/G")

    def _pack(self, weights: str) -> list[Any]:
        """Return the matrices, small groups as one block-diagonal matrix."""
        kernel = self.kernel
        groups, inputs, outputs = kernel.shape
        each = max(n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or n * inputs <= WIDE))
        wide = np.zeros((groups // each, each, inputs, each, outputs), kernel.dtype)
        for n in range(each):
            wide[:, n, :, n] = kernel[n::each]
        matrices = wide.reshape(groups // each, each * inputs, each * outputs)
        return [native.dense(matrix, None, spec.activation("linear"), weights) for matrix in matrices]

    def product(self, x: Array, weights: str | None = None, threads: int = 1) -> Array:
        matrices = self.packed_in(weights)
        count = len(matrices)
        inputs, rows = x.shape[-1] // count, x.reshape(1, -1, x.shape[-1])
        parts = np.empty((count, rows.shape[1], self.units // count), x.dtype)
        for number, packed in enumerate(matrices):
            own = native.sequences(rows[:, :, number * inputs : (number + 1) * inputs])
            native.forward(own, [native.Layer(packed, y=parts[number])], threads)
        y = parts.swapaxes(0, 1).reshape(*x.shape[:-1], self.units)
        if self.bias is not None:
            y += self.bias
        return y

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        groups, inputs, outputs = self.kernel.shape
        parts = dy.reshape(*dy.shape[:-1], groups, 1, outputs)
        return [(parts @ self.kernel.swapaxes(1, 2)).reshape(*dy.shape[:-1], groups * inputs)]

    @property
    def summary(self) -> str:
        return f"{len(self.kernel)} groups"

    def engine(self, dtype: np.dtype[Any]) -> str:
        count = len(self.packed_in(None))
        return f"fused kernel ({native.isa()}, {dtype}{self.narrowed}): {count} product{'s' if count > 1 else ''}"
