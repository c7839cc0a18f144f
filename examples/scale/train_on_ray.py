"""Train one model on several workers with Ray Train, which starts PyTorch's processes as torchrun does.

Needs `pip install 'cellstack[torch]' 'ray[train]'`. On one machine, `torchrun -m cellstack train …` does the same.
"""

from typing import Any

import ray.train.torch
import torch.distributed
from ray.train import RunConfig, ScalingConfig

from cellstack import train


def worker(config: dict[str, Any]) -> None:
    """Train in one of the processes; the first one saves the network."""
    torch.distributed.destroy_process_group()  # of Ray Train: `train.fit` joins its own, from the same addresses
    result = train.fit(**config["fit"], progress=False)
    if result.rank == 0:
        result.network.save(config["network"])


def fit_on_workers(workers: int, network: str, storage: str, **fit: Any) -> None:
    """Train on several workers.

    Args:
        workers: the number of processes.
        network: the file to save to, on a path that all machines share.
        storage: a folder for Ray Train.
        fit: arguments of `train.fit`; `checkpoint` and `resume=True` continue after a failure.
    """
    scaling = ScalingConfig(num_workers=workers)
    config = {"fit": fit, "network": network}
    run = RunConfig(storage_path=storage)
    ray.train.torch.TorchTrainer(worker, train_loop_config=config, scaling_config=scaling, run_config=run).fit()
