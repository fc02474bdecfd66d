"""One thread and quiet, offline libraries in every test: steady figures, no wait for a network."""

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
    """The folder of optional material (labelled answers, GSM8K). Tests skip without COPO_SHARED."""
    folder = os.environ.get("COPO_SHARED")
    if not folder or not os.path.isdir(folder):
        pytest.skip("COPO_SHARED does not name a directory")
    return folder
