"""DistributedDataParallel over two processes gives the gradients of one."""

import importlib

import pytest
import tolerances
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from cellstack import layers

ROWS = 6


def model():
    torch.manual_seed(1)
    both = layers.Bidirectional(
        layers.RNN([layers.LSTMCell(4), layers.GRUCell(4, layer_norm=True), layers.LSTMCell(5)]), input_size=3
    )
    return torch.nn.Sequential(both, torch.nn.Linear(10, 2))


def batch():
    return torch.randn(ROWS, 7, 3, generator=torch.Generator().manual_seed(2))


def work(rank, folder):
    torch.set_num_threads(1)
    # DistributedDataParallel imports this; imported while a group exists, it would keep the group's threads alive
    importlib.import_module("torch._dynamo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        train(rank, folder)
    finally:
        dist.destroy_process_group()


def train(rank, folder):
    # A separate function, to delete the model before its group, for whose threads it would otherwise wait forever.
    parallel = DistributedDataParallel(model())
    for _ in range(2):
        parallel.zero_grad()
        parallel(batch()[rank::2]).square().mean().backward()
    torch.save([p.grad for p in parallel.parameters()], f"{folder}/{rank}.pt")


@pytest.mark.long
def test_two_processes_give_the_gradients_of_one(tmp_path):
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    one = model()
    one(batch()).square().mean().backward()
    for rank in range(2):
        gradients = torch.load(tmp_path / f"{rank}.pt")
        for got, (name, parameter) in zip(gradients, one.named_parameters(), strict=True):
            assert (got - parameter.grad).abs().max() <= tolerances.SHARDED, name
