"""Set-up of all tests: one thread per process, the same random numbers and the same logging in each test."""

import logging
import os
import random

import numpy as np
import pytest
import torch

from dinov2.logging import setup_logging

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _end_logging():
    """Programs set levels and outputs for their whole process, which would change what later tests see."""
    yield
    setup_logging(None, rank=1)  # no file, no console
    logging.captureWarnings(False)
    for name in ("dinov2", "data_adapters"):
        logging.getLogger(name).setLevel(logging.NOTSET)
