"""Memory of results that comes back for the next ones of their size."""

import gc
import os

import numpy as np
import pytest
import torch

from cellstack import layers, native


def address(array):
    return array.ctypes.data


def test_memory_comes_back_when_all_that_shares_it_is_gone():
    first = native.reused((3, 700), True)
    assert (first.shape, first.dtype, first.flags.writeable) == ((3, 700), np.float32, True)
    at, view = address(first), first[1]
    del first
    other = native.reused((3, 700), True)
    assert address(other) != at  # a view still has it
    del view
    assert address(native.reused((700, 3), True)) == at
    assert native.reused((2, 3), False).dtype == np.float64
    assert native.reused((0, 5), True).shape == (0, 5)


def test_a_block_is_taken_for_what_needs_most_of_it():
    at = address(native.reused((1 << 20,), True))
    assert address(native.reused((1 << 18,), True)) != at
    assert address(native.reused((1 << 20,), True)) == at
    assert address(native.reused((900_000,), True)) == at


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the system doesn't tell what is resident")
def test_no_more_is_kept_than_256_mb():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    many = [native.reused((1 << 24,), True) for _ in range(8)]  # 512 MB
    for array in many:
        array[:] = 1
    full = resident()
    del many, array
    gc.collect()
    assert 200 << 20 < full - resident() < 400 << 20


@pytest.mark.parametrize("shape", [(-1, 3), (1 << 40, 1 << 40), (1,) * 9])
def test_sizes_that_no_array_has(shape):
    with pytest.raises((ValueError, MemoryError)):
        native.reused(shape, True)


def test_a_training_step_finds_the_memory_of_the_step_before():
    layer = layers.LSTM(64, return_sequences=True, input_size=8)
    x = torch.randn(20, 60, 8)

    def step():
        y = layer(x)
        y.sum().backward()
        return y

    wanted = step().detach().clone()
    places = {step().data_ptr() for _ in range(6)}
    assert len(places) < 4  # y, gates and cells take turns in what there is
    kept = [step() for _ in range(3)]  # what a caller keeps is the caller's
    assert len({y.data_ptr() for y in kept}) == 3
    for y in kept:
        torch.testing.assert_close(y.detach(), wanted, atol=0, rtol=0)
    del kept
    torch.testing.assert_close(step().detach(), wanted, atol=0, rtol=0)
