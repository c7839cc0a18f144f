"""What kernel/bind.cpp offers. Addresses are integers, 0 = absent; strides count elements; the caller checks shapes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

class PackedSingle:
    @property
    def input_size(self) -> int: ...
    @property
    def units(self) -> int: ...
    @property
    def double(self) -> bool: ...

class PackedDouble(PackedSingle): ...

class StreamSingle:
    def step(self, x: NDArray[Any], y: NDArray[Any]) -> None: ...
    def run(self, x: NDArray[Any], y: NDArray[Any]) -> None: ...
    def get_state(self) -> list[tuple[NDArray[Any], NDArray[Any]]]: ...
    def set_state(self, layer: int, h: NDArray[Any], c: NDArray[Any]) -> None: ...

class StreamDouble(StreamSingle): ...

def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def Packed(  # noqa: N802
    double: bool,
    input_size: int,
    units: int,
    kernel: int,
    recurrent_kernel: int,
    bias: int,
    activation: int,
    recurrent_activation: int,
    copy: bool = True,
) -> PackedSingle | PackedDouble: ...
def Stream(  # noqa: N802
    packed_list: list[PackedSingle] | list[PackedDouble] | list[PackedSingle | PackedDouble], batch: int
) -> StreamSingle | StreamDouble: ...
def lstm_forward(
    batch: int,
    steps: int,
    layers: list[Any],
    x: int,
    x_stride_b: int,
    x_stride_t: int,
    mask: int,
    reverse: bool,
    threads: int,
) -> None: ...
def lstm_backward(
    double: bool,
    batch: int,
    steps: int,
    input_size: int,
    units: int,
    kernel: int,
    recurrent_kernel: int,
    x: int,
    x_stride_b: int,
    x_stride_t: int,
    h0: int,
    c0: int,
    y: int,
    gates: int,
    cells: int,
    recurrent_dropout: int,
    mask: int,
    dy: int,
    dhn: int,
    dcn: int,
    dgates: int,
    dcells: int,
    dx: int,
    dh0: int,
    dc0: int,
    dkernel: int,
    drecurrent_kernel: int,
    dbias: int,
    activation: int,
    recurrent_activation: int,
    reverse: bool,
    threads: int,
) -> None: ...
def activate(activation: int, x: NDArray[np.floating[Any]], y: NDArray[np.floating[Any]]) -> None: ...
