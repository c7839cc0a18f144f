"""What all tests share."""

import os
import signal

os.environ["KERAS_BACKEND"] = "torch"  # before anything imports keras

import numpy as np
import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell: tests send it, though
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
