"""What all tests share."""

import os

os.environ["KERAS_BACKEND"] = "torch"  # before anything imports keras

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
