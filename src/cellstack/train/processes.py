"""Training with one process or many: this process's rank, and sums over all processes."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cellstack.train.checks import UsageError


@dataclass(frozen=True)
class Processes:
    """The processes that train together, as seen from this one.

    Args:
        rank: number of this process, from 0.
        world: number of processes.
        device: this process's device.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def rows(self, size: int) -> NDArray[np.int64]:
        """Return this process's rows of a batch of `size`: every `world`-th; none if the batch is too small."""
        return np.arange(self.rank, size, self.world)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model with gradients averaged over the processes."""
        if self.world == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def add(self, values: list[float]) -> list[float]:
        """Return the sums over all processes."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return the plain values of all processes, in the order of ranks."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found


def is_first() -> bool:
    """Return whether this is the only process, or the first of those that `torchrun` started."""
    return int(os.environ.get("RANK", "0")) == 0


def uses_gpu(device: str) -> bool:
    """Return whether `processes(device)` chooses a GPU."""
    return device != "cpu" and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Join the process group that `torchrun` started, if any, and leave it at the end.

    Args:
        device: `"cpu"`, `"cuda"`, or `"auto"`: CUDA if there is a GPU for each process on this machine, else the CPU.
            Processes communicate through NCCL on GPUs and gloo on CPUs.

    Raises:
        UsageError: an unknown device, CUDA without enough GPUs, or incomplete environment variables of torchrun.
    """
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count()
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"expected device auto, cpu or cuda, got {device!r}")
    needed = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "cuda" and gpus < needed:
        raise UsageError(f"expected {needed} GPU(s) for device cuda, found {gpus}")
    use_gpu = uses_gpu(device)
    place = torch.device("cuda", local) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(place)
    if world == 1:
        yield Processes(device=place)
        return
    # The wrapped model imports this module, which would keep a reference to the group if one existed.
    importlib.import_module("torch._dynamo")
    try:
        dist.init_process_group("nccl" if use_gpu else "gloo")
    except ValueError as error:  # WORLD_SIZE is set, but the address isn't
        raise UsageError(f"expected {world} processes started by torchrun: {error}") from None
    try:
        yield Processes(dist.get_rank(), world, place)
    finally:
        # As long as something refers to a group its threads run, and a thread that frees a tensor while the
        # interpreter shuts down aborts the process. The wrapped model is part of reference cycles: collect it first.
        gc.collect()
        dist.destroy_process_group()
