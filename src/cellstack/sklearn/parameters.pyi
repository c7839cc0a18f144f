# Written by `make stubs`.
# fmt: off
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from sklearn.base import BaseEstimator

from cellstack.cells.arguments import Argument

C = TypeVar('C', bound=type)
SEQUENCE: dict[str, Argument]
CLASSIFIER: dict[str, Argument]
FORECASTER: dict[str, Argument]

def described(of: Mapping[str, Argument]) -> Callable[[C], C]: ...

@dataclass(repr=False, eq=False, kw_only=True)
class SequenceParameters(BaseEstimator):
    units: int | Sequence[int] = (48, 48)
    cell: str = 'lstm'
    heads: int | None = None
    bidirectional: bool = True
    dropout: float = 0.3
    pooling: str | None = None
    every_step: bool = False
    changes: bool | None = None
    noise: float | None = None
    offset: float | None = None
    filters: int | None = None
    stride: int | None = None
    init: Any = None
    epochs: int | None = None
    batch: int = 16
    lr: float = 0.005
    clip: float = 1.0
    patience: int | None = None
    validation: float | None = 0.15
    threads: int | None = 1
    device: str = 'auto'
    verbose: bool | None = False
    random_state: int | np.random.RandomState | None = None

@dataclass(repr=False, eq=False, kw_only=True)
class ClassifierParameters(SequenceParameters):
    units: int | Sequence[int] = (48, 48)
    cell: str = 'lstm'
    heads: int | None = None
    bidirectional: bool = True
    dropout: float = 0.3
    pooling: str | None = None
    every_step: bool = False
    changes: bool | None = None
    noise: float | None = None
    offset: float | None = None
    filters: int | None = None
    stride: int | None = None
    init: Any = None
    epochs: int | None = None
    batch: int = 16
    lr: float = 0.005
    clip: float = 1.0
    patience: int | None = None
    validation: float | None = None
    threads: int | None = 1
    device: str = 'auto'
    verbose: bool | None = False
    random_state: int | np.random.RandomState | None = None
    class_weight: Mapping[Any, float] | str | None = None

@dataclass(repr=False, eq=False, kw_only=True)
class ForecasterParameters(BaseEstimator):
    target: str | Sequence[str] | None = None
    horizon: int | None = None
    window: int | None = None
    seasons: int | Sequence[int] | None = None
    inputs: str | Sequence[str] | None = None
    known: str | Sequence[str] = ()
    holidays: str = ''
    scale: str | None = None
    quantiles: float | Sequence[float] = (0.1, 0.5, 0.9)
    time: str | Sequence[str] | None = None
    day_first: bool | None = None
    date_format: str | None = None
    zone: str | None = None
    id: str | Sequence[str] | None = None
    freq: str | None = None
    decimal: str | None = None
    encoding: str | None = None
    categories: str | Sequence[str] = ()
    units: int | Sequence[int] | None = None
    cell: str = 'lstm'
    heads: int | None = None
    dropout: float | None = None
    members: int | None = None
    epochs: int | None = None
    batch: int | None = None
    lr: float | None = None
    clip: float = 1.0
    patience: int | None = None
    validation: float | None = None
    threads: int | None = 1
    device: str = 'auto'
    verbose: bool | None = False
    random_state: int | np.random.RandomState | None = None
