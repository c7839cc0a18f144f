"""`Dense` and `GroupedDense`: products along the last axis, run by the kernel; a stack and its head are one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from cellstack import native
from cellstack.cells.bfloat16 import BFloat16Array, rounded
from cellstack.cells.errors import ShapeError
from cellstack.nodes.activations import activation_function, activation_gradient, check_activation, in_kernel
from cellstack.nodes.base import Array, CellState, Flow, KernelLayers, NodeRun, Shape, StateGradients, Stepwise
from cellstack.nodes.cell_arrays import STORED_WEIGHTS, check_narrow
from cellstack.nodes.checks import check_choice, frozen_bfloat16, frozen_copy, one_dtype

if TYPE_CHECKING:
    from cellstack.nodes.stored import Entry


class Products(Stepwise):
    """Base class of nodes that multiply their input with a matrix, `kernel`, whose numbers may have fewer bits."""

    kernel: Array
    bias: Array | None
    units: int
    _made: dict[str | None, tuple[list[Any], Any]]  # what `layers_in` returns, by number format
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
        object.__setattr__(self, "_made", {})
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

    def layers_in(self, weights: str | None) -> tuple[list[Any], Any]:
        """Return the matrices in the kernel's layout, and the object that multiplies them; made at the first use.

        Args:
            weights: one of `WEIGHTS`; None: their own number format. A float64 node has only its own.

        Raises:
            TypeError, ValueError: see `Cell.pack`.
        """
        found = self._made.get(weights)
        if found is None:
            own = self.weights
            used = own if weights is None or (weights == "float32" and own == "float64") else weights
            found = self._made.get(used)
            if found is None:
                assert self.dtype is not None
                check_narrow(type(self).__name__, used, self.dtype, self.kernel.shape[-2])
                layers = self._pack(used)
                found = self._made[used] = layers, native.products(layers)
            self._made[weights] = found
        return found

    def _pack(self, weights: str) -> list[Any]:
        raise NotImplementedError

    def product(self, x: Array, weights: str | None = None, threads: int = 1) -> Array:
        """Return `[..., O]` for `x [..., I]` of the kernel's dtype.

        Args:
            x: the input.
            weights: see `layers_in`.
            threads: the number of threads that the kernel may use.
        """
        return native.on_rows(self.layers_in(weights)[1].run, x, threads)

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
        """See `Node.run` and `layers_in`."""
        (flow,) = flows
        return Flow(self.product(flow.x, weights, threads), self.mask_of(flows), flow.reset)

    def stored(self) -> tuple[dict[str, Any], Mapping[str, Array | BFloat16Array]]:
        values, arrays = super().stored()
        return values, {**arrays, "kernel": self.__dict__["_stored"]}

    @classmethod
    def restored(cls, entry: Entry) -> Any:
        values = entry.take(cls.keys())
        arrays = {name: entry.array(name, shape, name == "kernel") for name, shape in cls.array_shapes(values).items()}
        return cls(**arrays, **{key: values[key] for key in cls.settings()})

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
    about = "{0.activation}"
    arrays: ClassVar = {"kernel": ("input_size", "units"), "bias": ("units",)}

    def __post_init__(self) -> None:
        self._take_arrays("I", "O")
        object.__setattr__(self, "activation", check_activation("Dense", self.activation))

    @property
    def packed(self) -> Any:
        """The weights in the kernel's layout and in their own number format."""
        return self.packed_in(None)

    def packed_in(self, weights: str | None) -> Any:
        """Return the weights in the kernel's layout: see `layers_in`."""
        (layer,), _ = self.layers_in(weights)
        return layer

    def _pack(self, weights: str) -> list[Any]:
        activation = in_kernel(self.activation) or native.LINEAR
        return [native.dense(self.kernel, self.bias, activation, weights)]

    @cached_property
    def numpy_activation(self) -> Callable[[Array], Array] | None:
        """The activation as a NumPy function if the kernel doesn't implement it, else None."""
        return None if in_kernel(self.activation) else activation_function(self.activation)

    @property
    def kernel_layers(self) -> KernelLayers:
        return KernelLayers((((self,), False),), 1, finish=self.numpy_activation)

    def product(self, x: Array, weights: str | None = None, threads: int = 1) -> Array:
        y = super().product(x, weights, threads)
        return self.numpy_activation(y) if self.numpy_activation else y

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        z = run.inputs[0].x @ self.kernel + (0 if self.bias is None else self.bias)
        return [activation_gradient(self.activation, z, dy) @ self.kernel.T]

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
        biases = np.zeros(0) if self.bias is None else self.bias.reshape(len(matrices), -1)
        return [
            native.dense(matrix, None if self.bias is None else biases[n], element=weights)
            for n, matrix in enumerate(matrices)
        ]

    def gradients(self, run: NodeRun, dy: Array, dstates: StateGradients = ()) -> list[Array]:
        groups, inputs, outputs = self.kernel.shape
        parts = dy.reshape(*dy.shape[:-1], groups, 1, outputs)
        return [(parts @ self.kernel.swapaxes(1, 2)).reshape(*dy.shape[:-1], groups * inputs)]

    @property
    def summary(self) -> str:
        return f"{len(self.kernel)} groups"

    def engine(self, dtype: np.dtype[Any]) -> str:
        count = len(self.layers_in(None)[0])
        return f"fused kernel ({native.isa()}, {dtype}{self.narrowed}): {count} product{'s' if count > 1 else ''}"
