"""Results reuse the memory of earlier ones of the same size, but only if nothing refers to it any more."""

import threading

import pytest
import torch

from cellstack import layers
from cellstack.layers import kernel_calls
from cellstack.layers.memory import Reused

LIKE = torch.empty(0)
SHAPE = (30, 700)


def test_memory_is_reused():
    memory = Reused()
    first = memory.empty(LIKE, SHAPE)
    assert (first.shape, first.dtype, first.is_contiguous()) == (SHAPE, torch.float32, True)
    at = first.data_ptr()
    del first
    assert memory.empty(LIKE, (700, 30)).data_ptr() == at
    assert memory.empty(LIKE, (30, 350)).data_ptr() != at  # another size
    other = memory.empty(LIKE.double(), (30, 350))
    assert (other.data_ptr(), other.dtype) == (at, torch.float64)
    assert memory.empty(LIKE, (0, 5)).shape == (0, 5)


@pytest.mark.parametrize(
    "keep",
    [
        lambda t: t[3:4],
        lambda t: t.detach(),
        lambda t: t.numpy(),
        lambda t: t.untyped_storage(),
        lambda t: torch.from_dlpack(t),
        lambda t: memoryview(t.numpy())[1:2],
        lambda t: t.share_memory_().numel(),  # another process may still read it
    ],
    ids=["view", "detached", "numpy", "storage", "dlpack", "buffer", "shared"],
)
def test_memory_in_use_is_not_reused(keep):
    memory = Reused()
    first = memory.empty(LIKE, SHAPE)
    kept = keep(first)
    at = first.data_ptr()
    del first
    assert memory.empty(LIKE, SHAPE).data_ptr() != at
    assert kept is not None


def test_results_can_be_resized_as_any_tensor():
    memory = Reused()
    first, second = memory.empty(LIKE, SHAPE), memory.empty(LIKE, SHAPE)
    first.untyped_storage().resize_(0)
    second.resize_(60, 700)
    second.fill_(1.0)
    del first
    third = memory.empty(LIKE, SHAPE)
    third.fill_(2.0)
    assert bool((second == 1.0).all())


def test_no_more_than_the_maximum_is_kept():
    memory = Reused(most=4 * 21_000 * 3)
    many = [memory.empty(LIKE, SHAPE) for _ in range(9)]
    places = {array.data_ptr() for array in many}
    assert len(places) == 9
    assert len(memory._storages) == 3
    last = [array.data_ptr() for array in many[-3:]]
    many.clear()
    again = [memory.empty(LIKE, SHAPE) for _ in range(3)]
    assert {array.data_ptr() for array in again} == set(last)
    assert memory.empty(LIKE, (1 << 20,)).shape == (1 << 20,)  # more than the maximum: not kept
    assert len(memory._storages) == 3


def test_a_thread_gets_new_memory_while_another_holds_the_lock():
    memory, wrong = Reused(), []

    def work(number):
        for _ in range(300):
            mine = memory.empty(LIKE, (2000,)).fill_(number)
            other = memory.empty(LIKE, (2000,)).fill_(-number)
            wrong.extend([1] * (not bool((mine == number).all() and (other == -number).all())))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    with memory._lock:
        assert memory.empty(LIKE, SHAPE).shape == SHAPE


def test_a_training_step_reuses_the_memory_of_the_previous_one():
    layer = layers.LSTM(64, return_sequences=True, input_size=8)
    x = torch.randn(20, 60, 8)

    def step():
        y = layer(x)
        y.sum().backward()
        return y

    wanted = step().detach().clone()
    places = {step().data_ptr() for _ in range(6)}
    assert len(places) < 4  # y and cells share the memory
    assert step().data_ptr() in {storage.data_ptr() for storage in kernel_calls._results._storages}
    kept = [step() for _ in range(3)]  # results that the caller keeps aren't overwritten
    assert len({y.data_ptr() for y in kept}) == 3
    for y in kept:
        torch.testing.assert_close(y.detach(), wanted, atol=0, rtol=0)
    del kept
    torch.testing.assert_close(step().detach(), wanted, atol=0, rtol=0)
