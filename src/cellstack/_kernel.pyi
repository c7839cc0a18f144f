"""What kernel/bind.cpp offers. Addresses are integers, 0 = absent; strides count elements; the caller checks shapes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

class Description:
    def __init__(
        self,
        kind: int,
        input_size: int,
        units: int,
        output_size: int,
        activations: list[tuple[int, float, float]],
        use_bias: bool,
        peepholes: bool,
        coupled: bool,
        layer_norm: bool,
        reset_after: bool,
        norm_epsilon: float,
        clip: float,
        cell_clip: float,
        zoneout: float,
        zoneout_cell: float,
    ) -> None: ...

class PackedSingle:
    @property
    def input_size(self) -> int: ...
    @property
    def units(self) -> int: ...
    @property
    def output_size(self) -> int: ...
    @property
    def double(self) -> bool: ...

class PackedDouble(PackedSingle): ...

class StreamSingle:
    def step(self, x: Any) -> NDArray[Any] | None: ...
    def run(self, x: Any) -> NDArray[Any] | None: ...
    def reset(self) -> None: ...
    def get_state(self) -> list[tuple[NDArray[Any], ...]]: ...
    def set_state(self, layer: int, h: NDArray[Any], c: NDArray[Any] | None = None) -> None: ...

class StreamDouble(StreamSingle): ...

def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def Packed(  # noqa: N802
    double: bool, description: Description, arrays: tuple[int, ...], copy: bool = True, bits: int = 32
) -> PackedSingle | PackedDouble: ...
def Stream(  # noqa: N802
    packed_list: list[PackedSingle] | list[PackedDouble] | list[PackedSingle | PackedDouble],
    batch: int,
    threads: int = 1,
) -> StreamSingle | StreamDouble: ...
def forward(
    batch: int,
    steps: int,
    layers: list[Any],
    x: int,
    x_stride_b: int,
    x_stride_t: int,
    mask: int,
    reset: int,
    reverse: bool,
    threads: int,
    places: int = 0,
) -> None: ...
def backward(
    double: bool,
    description: Description,
    batch: int,
    steps: int,
    arrays: tuple[int, ...],
    x: int,
    x_stride_b: int,
    x_stride_t: int,
    mask: int,
    reset: int,
    reverse: bool,
    saved: tuple[int, ...],
    given: tuple[int, ...],
    wanted: tuple[Any, ...],
    threads: int,
) -> None: ...
def activate(
    code: int, alpha: float, beta: float, x: NDArray[np.floating[Any]], y: NDArray[np.floating[Any]]
) -> None: ...
