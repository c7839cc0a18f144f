"""Takes the place of the compiled module `_kernel` where it is missing: forward passes by the equations in NumPy.

`native` imports this module instead. Networks run, are traced and stream, at a small fraction of the kernel's speed.
Everything else raises `ImportError`: training, gradients, patches, sessions, and weights with fewer bits.

The names and arguments are those of `_kernel.pyi`. Arrays are NumPy arrays here, not addresses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from cellstack import reference
from cellstack.cells.activations import ACTIVATIONS
from cellstack.cells.base import MatrixState
from cellstack.cells.spec import ARRAYS, CellSpec
from cellstack.reference import memory as reference_mlstm

INSTALL = "install a wheel of cellstack for this platform, or a C++17 compiler and then cellstack from its source"
THREAD_WORK = 1 << 20

warnings.warn(
    f"cellstack: the compiled kernel is missing, so networks run slowly, in NumPy, and can't be trained: {INSTALL}",
    RuntimeWarning,
    stacklevel=2,
)


_REFUSED = {
    "SessionTable": "a pool of sessions needs",
    "Gradients": "gradients need",
}  # by the name that they call first


def _refuse(what: str) -> NoReturn:
    raise ImportError(f"{what} the compiled kernel: {INSTALL}")


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **kwargs: _refuse(_REFUSED.get(name, f"{name} needs"))


class Dense(NamedTuple):
    """A dense layer without its arrays."""

    input_size: int
    activation: tuple[int, float, float]


def Description(kind: str, input_size: int, *others: Any) -> Dense:  # noqa: N802
    """Return the description of a dense layer; that of a cell is its `CellSpec`: see `native.description`."""
    ((activation,),) = (part for part in others if isinstance(part, list))
    return Dense(input_size, activation)


class Weights:
    """Weights of a cell or of a dense layer."""

    def __init__(self, description: CellSpec | Dense, element: str, arrays: Sequence[Any], copy: bool = True) -> None:
        if element not in ("float32", "float64"):
            _refuse(f"{element} weights need")
        given = {name: array for name, array in zip(ARRAYS, arrays, strict=False) if array is not None}
        if not all(isinstance(array, np.ndarray) for array in given.values()):
            _refuse("the torch layers need")
        self.description, self.dtype = description, np.dtype(element)
        self.arrays = {name: array.astype(np.float64) for name, array in given.items()}

    def dense(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return the output of a dense layer in float64."""
        assert isinstance(self.description, Dense)
        code, alpha, beta = self.description.activation
        z = x @ self.arrays["kernel"] + self.arrays.get("bias", 0.0)
        return reference.ACTIVATIONS[ACTIVATIONS[code]][0](z, alpha, beta)


weights = Weights


class Sequences:
    """The input of a call; strides count numbers."""

    def __init__(
        self,
        batch: int,
        steps: int,
        x: Any,
        stride_batch: int,
        stride_time: int,
        mask: NDArray[Any] | None = None,
        reset: NDArray[Any] | None = None,
        reverse: bool = False,
        places: NDArray[Any] | None = None,
        time_major: bool = False,
    ) -> None:
        if not isinstance(x, np.ndarray) or time_major:
            _refuse("the torch layers need")
        self.shape, self.given, self.strides = (batch, steps), x, (stride_batch, stride_time, 1)
        self.flags = {"mask": mask, "reset": reset, "reverse": reverse}
        self.places: Any = slice(None) if places is None else places

    def x(self, width: int) -> NDArray[Any]:
        """Return the input, `[B, T, width]`."""
        strides = [stride * self.given.itemsize for stride in self.strides]
        return as_strided(self.given, (*self.shape, width), strides, writeable=False)


class Layer(NamedTuple):
    """One layer of a call, and the arrays for its results."""

    weights: Weights
    before: Sequence[Any] | None = None
    after: Sequence[Any] | None = None
    y: NDArray[Any] | None = None
    gates: NDArray[Any] | None = None
    states: Sequence[Any] | None = None
    intermediate: None = None
    recurrent_dropout: None = None
    zoneout: None = None
    zoneout_cell: None = None
    patch_lines: None = None
    patch_table: None = None
    patch_width: int = 0
    patch_held: None = None

    def run(self, sequences: Sequences, x: NDArray[Any]) -> NDArray[Any]:
        """Run the layer over `x [B, T, I]`, write the results that are asked for, and return y `[B, T, P]`."""
        if any(array is not None for array in (self.recurrent_dropout, self.zoneout, self.zoneout_cell)):
            _refuse("training needs")
        if self.patch_lines is not None:
            _refuse("patches need")
        own, places = self.weights, sequences.places
        if isinstance(own.description, Dense):
            y = own.dense(x)
        else:
            before = [state[places] for state in self.before] if self.before else None
            done = reference.forward(own.description, own.arrays, x, before, **sequences.flags)
            y = done.y
            for into, state in zip(self.after or (), done.state, strict=False):
                into[places] = state
            for into, states in zip(self.states or (), done.states, strict=False):
                into[...] = states
            if self.gates is not None:
                self.gates[...] = done.gates
        if self.y is not None:
            self.y[...] = y.reshape(self.y.shape)
        return y.astype(own.dtype)


def forward(sequences: Sequences, layers: Sequence[Layer], threads: int) -> None:
    """Run a stack; y of one layer is x of the next."""
    y = sequences.x(layers[0].weights.description.input_size)
    for layer in layers:
        y = layer.run(sequences, y)


def forward_each(runs: Sequence[tuple[Sequences, Sequence[Layer]]], threads: int) -> bool:
    """Run independent stacks, one after the other."""
    for sequences, layers in runs:
        forward(sequences, layers, threads)
    return False


NODE_ACTIVATIONS = ()  # NumPy computes all of them


class Products:
    """Dense layers that take equal parts of x, and return their y side by side."""

    def __init__(self, weights: list[Weights]) -> None:
        self.weights = weights

    def run(self, x: NDArray[Any], threads: int) -> NDArray[Any]:
        """Return y `[..., O]` of x `[..., I]`."""
        parts = np.split(x, len(self.weights), axis=-1)
        y = np.concatenate([own.dense(part) for own, part in zip(self.weights, parts, strict=True)], axis=-1)
        return y.astype(x.dtype)


products = Products


class Norm(NamedTuple):
    """A norm of each group of features; see kernel/nodes.h."""

    groups: int
    centred: bool
    epsilon: float
    gain: NDArray[Any] | None
    bias: NDArray[Any] | None

    def run(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return y `[..., W]` of x `[..., W]`."""
        z = x.reshape(*x.shape[:-1], self.groups, -1).astype(np.float64)
        if self.centred:
            z -= z.mean(axis=-1, keepdims=True)
        y = (z / np.sqrt((z * z).mean(axis=-1, keepdims=True) + self.epsilon)).reshape(x.shape)
        y = y if self.gain is None else y * self.gain
        return (y if self.bias is None else y + self.bias).astype(x.dtype)


class Convolution(NamedTuple):
    """A convolution of each feature by itself; see kernel/nodes.h."""

    taps: int
    width: int
    dilation: int
    kernel: NDArray[Any]
    bias: NDArray[Any] | None
    code: int
    alpha: float
    beta: float

    def run(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return y `[B, T', C]` of a padded x `[B, T, C]`."""
        steps = x.shape[1] - (self.taps - 1) * self.dilation
        z = np.zeros((len(x), steps, self.width)) if self.bias is None else np.float64(self.bias)
        for tap in range(self.taps):
            z = z + x[:, tap * self.dilation : tap * self.dilation + steps] * np.float64(self.kernel[tap].ravel())
        return reference.ACTIVATIONS[ACTIVATIONS[self.code]][0](z, self.alpha, self.beta).astype(x.dtype)


SHORT_CHUNK = 0  # all steps run one after the other


class Memory(NamedTuple):
    """A call of an mLSTM's memory."""

    sequences: Sequences
    heads: int
    keys: int
    values: int
    epsilon: float
    before: Sequence[NDArray[Any]]
    after: Sequence[NDArray[Any]]
    y: NDArray[Any]
    form: int = 0
    gated: bool = False


def _core(heads: int, keys: int, values: int) -> int:
    """Return the width of a memory's input without an output gate."""
    return heads * (2 * keys + values + 2)


def memory_forward(memory: Memory, twice: bool, threads: int) -> None:
    """Run the memory; write h and the state after the last step."""
    sequences, sizes = memory.sequences, (memory.heads, memory.keys, memory.values)
    core = _core(*sizes)
    whole = sequences.x(core + memory.gated * memory.y.shape[-1]).astype(np.float64)
    x = whole[..., :core]
    state = reference_mlstm.zero_state(len(x), *sizes)
    if memory.before:
        state = MatrixState(*(part[sequences.places].astype(np.float64) for part in memory.before))
    flags = sequences.flags["mask"], sequences.flags["reset"]
    h, after = reference_mlstm.steps(reference_mlstm.split(x, *sizes), state, memory.epsilon, *flags)
    memory.y[...] = h.reshape(memory.y.shape)
    if memory.gated:
        memory.y[...] *= reference.ACTIVATIONS["sigmoid"][0](whole[..., core:])
    for into, part in zip(memory.after, after, strict=False):
        into[sequences.places] = part


class MemorySteps:
    """Dense layers and memories in turn, run one step at a time."""

    def __init__(self, stages: Sequence[Any], rows: int, twice: bool, threads: int) -> None:
        self.stages, self.rows, self.dtype = stages, rows, np.dtype(np.float64 if twice else np.float32)
        self.states: dict[int, Sequence[NDArray[Any]]] = {}

    def set_states(self, number: int, states: Sequence[NDArray[Any]]) -> None:
        """Set one of the two sets of states: C, n and m of each memory in turn."""
        self.states[number] = states

    def step(self, x: Any, places: Any = None, before: int = 0, after: int = 0) -> NDArray[Any] | None:
        """Return y `[n, W]` of x `[n, I]`; None if x isn't such an array."""
        first = self.stages[0]
        width = (
            first.description.input_size
            if isinstance(first, Weights)
            else _core(*first[:3]) + first[4] * first[0] * first[2]
        )
        fits = isinstance(x, np.ndarray) and x.ndim == 2 and x.dtype == self.dtype and x.shape[1] == width
        if not fits or (places is None and len(x) != self.rows):
            return None
        states = zip(self.states[before], self.states[after], strict=True)
        for stage in self.stages:
            if isinstance(stage, Weights):
                x = Products([stage]).run(x, 1)
            else:
                old, new = zip(*(next(states) for _ in range(3)), strict=True)
                x = np.ascontiguousarray(x)
                given = Sequences(len(x), 1, x, x.shape[1], x.shape[1], places=places)
                heads, keys, values, epsilon, gated = stage
                y = np.empty((len(x), 1, heads * values), x.dtype)
                memory_forward(Memory(given, heads, keys, values, epsilon, old, new, y, 0, gated), False, 1)
                x = y[:, 0]
        return x


def memory_steps(stages: Sequence[Any], rows: int, twice: bool, threads: int) -> MemorySteps:
    """See `MemorySteps`."""
    return MemorySteps(stages, rows, twice, threads)


class Stream:
    """A stack with its state, `[B, P]`, `[B, H]` … of each cell."""

    def __init__(self, weights: Sequence[Weights], batch: int, threads: int = 1) -> None:
        self.weights, self.batch = weights, batch
        self.reset()

    def step(self, x: Any) -> NDArray[Any] | None:
        """Return y `[B, P]` of x `[B, I]`; None if x isn't such an array."""
        y = self.run(x[:, None]) if isinstance(x, np.ndarray) and x.ndim == 2 else None
        return y if y is None else y[:, 0]

    def run(self, x: Any) -> NDArray[Any] | None:
        """Return y `[B, T, P]` of x `[B, T, I]`; None if x isn't such an array."""
        first = self.weights[0]
        if not isinstance(x, np.ndarray) or x.dtype != first.dtype or x.ndim != 3:
            return None
        if x.shape[::2] != (self.batch, first.description.input_size):
            return None
        sequences = Sequences(self.batch, x.shape[1], x, 0, 0)
        for own, state in zip(self.weights, self.states, strict=True):
            x = Layer(own, state, state).run(sequences, x)
        return x

    def reset(self) -> None:
        """Set the cells' initial states."""
        self.states = [
            [
                np.broadcast_to(own.arrays.get(f"initial_{name}", 0.0), (self.batch, size)).astype(own.dtype)
                for name, size in getattr(own.description, "state_sizes", {}).items()
            ]
            for own in self.weights
        ]

    def keep(self) -> None:
        """Save the state for `undo`."""
        self.kept = self.get_state()

    def undo(self) -> None:
        """Go back to the saved state."""
        self.states = [list(state) for state in self.kept]

    def get_state(self) -> list[tuple[NDArray[Any], ...]]:
        """Return copies of the states."""
        return [tuple(array.copy() for array in state) for state in self.states]

    def set_state(self, layer: int, states: Sequence[NDArray[Any]]) -> None:
        """Set the states of a cell."""
        self.states[layer] = [np.array(state) for state in states]


stream = Stream


class Stack:
    """A network as one call: here it never is, so that `Network.run` runs it node by node."""

    def __init__(self, weights: Sequence[Weights], timed: int, last: bool) -> None:
        pass

    def run(self, x: Any, threads: int) -> None:
        """Return None."""


stack = Stack


class CallLock:
    """The lock of a stream."""

    class Attempt:
        """A call's attempt to lock it: True if it did, False during another call."""

        def __init__(self, lock: CallLock) -> None:
            self.lock, self.locked = lock, False

        def __enter__(self) -> bool:
            self.locked, self.lock.locked = not self.lock.locked, True
            return self.locked

        def __exit__(self, *raised: Any) -> None:
            if self.locked:
                self.lock.locked = False

    def __init__(self) -> None:
        self.locked = False

    def attempt(self) -> Attempt:
        """Return a context manager."""
        return self.Attempt(self)


def isa() -> str:
    """Return what computes, in the place of an instruction set."""
    return "not compiled: NumPy"


def prefer_large_pages(memory: int, bytes: int) -> None:
    """Do nothing: it is a hint."""
