"""One torch thread per test process: the fits are small, and pytest runs two processes."""

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# A minute is the promise; the machines of CI are slow and shared.
settings.register_profile("quick", max_examples=20, deadline=60_000, derandomize=True, database=None)
settings.register_profile("thorough", max_examples=600, deadline=60_000, database=None)
settings.load_profile("quick")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
