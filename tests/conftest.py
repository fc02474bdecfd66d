"""One thread and quiet, offline libraries for every test: figures are then steady and no test waits for a network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared():
    """The folder of optional material (labelled answers, GSM8K); tests that use it skip without COPO_SHARED."""
    place = os.environ.get("COPO_SHARED")
    if not place or not os.path.isdir(place):
        pytest.skip("COPO_SHARED does not name a directory")
    return place
