"""The bindings of kernel/bind.cpp. The caller checks shapes and dtypes. Strides count numbers, not bytes.

An array may also be given as an address (0: absent) or None; a sequence of them has an entry for each of some states.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[Any] | int | None
_States = Sequence[_Array] | None

class Description:
    def __init__(
        self,
        kind: str,
        input_size: int,
        units: int,
        output_size: int,
        activations: list[tuple[int, float, float]],
        flags: dict[str, float],
        rows: bool = False,
    ) -> None: ...

class WeightsSingle:
    @property
    def element(self) -> str: ...

class WeightsDouble(WeightsSingle): ...

Weights = WeightsSingle | WeightsDouble  # for annotations

class Sequences:
    def __init__(
        self,
        batch: int,
        steps: int,
        x: _Array,
        stride_batch: int,
        stride_time: int,
        mask: _Array = None,
        reset: _Array = None,
        reverse: bool = False,
        places: _Array = None,
        time_major: bool = False,
    ) -> None: ...

class Layer:
    def __init__(
        self,
        weights: Weights,
        before: _States = None,
        after: _States = None,
        y: _Array = None,
        gates: _Array = None,
        states: _States = None,
        intermediate: _Array = None,
        recurrent_dropout: _Array = None,
        zoneout: _Array = None,
        zoneout_cell: _Array = None,
        patch_lines: _Array = None,
        patch_table: _Array = None,
        patch_width: int = 0,
        patch_held: _Array = None,
    ) -> None: ...

class Gradients:
    def __init__(
        self,
        dy: _Array = None,
        dafter: _States = None,
        dgates: _Array = None,
        dstates: _States = None,
        dx: _Array = None,
        dbefore: _States = None,
        arrays: tuple[_Array, ...] | None = None,
    ) -> None: ...

class StreamSingle:
    def step(self, x: Any) -> NDArray[Any] | None: ...
    def run(self, x: Any) -> NDArray[Any] | None: ...
    def reset(self) -> None: ...
    def keep(self) -> None: ...
    def undo(self) -> None: ...
    def get_state(self) -> list[tuple[NDArray[Any], ...]]: ...
    def set_state(self, layer: int, states: Sequence[NDArray[Any]]) -> None: ...

class StreamDouble(StreamSingle): ...

Stream = StreamSingle | StreamDouble  # for annotations

class StackSingle:
    def run(self, x: Any, threads: int) -> NDArray[Any] | None: ...

class StackDouble(StackSingle): ...

Stack = StackSingle | StackDouble  # for annotations

class Attempt:
    def __enter__(self) -> bool: ...
    def __exit__(self, *raised: Any) -> None: ...

class CallLock:
    def __init__(self) -> None: ...
    def attempt(self) -> Attempt: ...

class SessionLock:
    def __enter__(self) -> NDArray[np.int64]: ...
    def __exit__(self, *raised: Any) -> None: ...

class Opening:
    def __enter__(self) -> int | None: ...
    def __exit__(self, *raised: Any) -> None: ...

class SessionTable:
    def __init__(self, capacity: int) -> None: ...
    def __len__(self) -> int: ...
    def opening(self) -> Opening: ...
    def locked(self, numbers: NDArray[np.int64]) -> SessionLock: ...
    def close(self, number: int) -> None: ...

class SessionStepsSingle:
    def step(self, sessions: Any, x: Any) -> NDArray[Any] | None: ...

class SessionStepsDouble(SessionStepsSingle): ...

SessionSteps = SessionStepsSingle | SessionStepsDouble  # for annotations

class Recurrent:  # absent in Pyodide
    def __init__(
        self,
        cells: list[tuple[Description, tuple[_Array, ...]]],
        twice: bool,
        reverse: bool,
        batch_first: bool,
        directions: bool,
        lengths: bool,
        started: list[bool],
        threads: int,
    ) -> None: ...
    @property
    def handle(self) -> int: ...

def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def weights(
    description: Description, element: str, arrays: tuple[_Array, ...], copy: bool = True, threads: int = 1
) -> Weights: ...

ARRAYS: tuple[str, ...]
THREAD_WORK: int
SHORT_CHUNK: int

NODE_ACTIVATIONS: tuple[str, ...]

class Products:
    def run(self, x: Any, threads: int) -> NDArray[Any] | None: ...

def products(weights: list[Weights]) -> Products: ...

class Norm:
    def __init__(self, groups: int, centred: bool, epsilon: float, gain: Any, bias: Any) -> None: ...
    def run(self, x: Any) -> NDArray[Any] | None: ...

class Convolution:
    def __init__(
        self, taps: int, width: int, dilation: int, kernel: Any, bias: Any, code: int, alpha: float, beta: float
    ) -> None: ...
    def run(self, x: Any) -> NDArray[Any] | None: ...

class Memory:
    def __init__(
        self,
        sequences: Sequences,
        heads: int,
        keys: int,
        values: int,
        epsilon: float,
        before: Sequence[Any],
        after: Sequence[Any],
        y: Any,
        form: int = 0,
        gated: bool = False,
        scores: Any = None,
        score_row: int = 0,
    ) -> None: ...

class MemorySteps:
    def set_states(self, number: int, states: list[Any]) -> None: ...
    def step(self, x: Any, places: Any = None, before: int = 0, after: int = 0) -> NDArray[Any] | None: ...

def memory_steps(stages: list[Any], rows: int, twice: bool, threads: int) -> MemorySteps: ...
def score_row(keys: int, values: int, steps: int, before: bool, after: bool) -> int: ...
def memory_forward(memory: Memory, twice: bool, threads: int) -> None: ...
def memory_backward(
    memory: Memory, twice: bool, dy: Any, dafter: Sequence[Any], dx: Any, dbefore: Sequence[Any], threads: int
) -> None: ...
def stream(weights: list[Weights], batch: int, threads: int = 1) -> Stream: ...
def session_steps(table: SessionTable, layers: list[Layer], threads: int) -> SessionSteps: ...
def stack(weights: list[Weights], timed: int, last: bool) -> Stack: ...
def cut(weights: list[Weights], batch: int, steps: int, resets: bool, threads: int) -> tuple[int, int, int]: ...
def prefer_large_pages(memory: int, bytes: int) -> None: ...
def forward(sequences: Sequences, layers: list[Layer], threads: int) -> None: ...
def forward_each(runs: Sequence[tuple[Sequences, list[Layer]]], threads: int) -> bool: ...
def backward(sequences: Sequences, layers: list[Layer], gradients: list[Gradients], threads: int) -> None: ...
def activate(
    code: int, alpha: float, beta: float, x: NDArray[np.floating[Any]], y: NDArray[np.floating[Any]]
) -> None: ...
