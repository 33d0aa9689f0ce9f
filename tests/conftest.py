"""What holds for every test: no network, no tracking service, one thread, a fixed random seed."""

from __future__ import annotations

import os
import random
import sys

import pytest

# The run scripts read them: a user's own, or that of `make test PYTHON=...`, is not for the tests.
for name in ("PYTHON", "NUM_PROCESSES", "NUM_GPUS"):
    os.environ.pop(name, None)
# Before any import of these libraries, and inherited by every process that a test starts.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_MODE="offline",
    DO_NOT_TRACK="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # tiny models: more threads are slower, and sums depend on their number
    PYTHONHASHSEED="0",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start several processes come first: at the end no worker waits for a long one."""
    long_files = {item.path for item in items if item.get_closest_marker("dist")}
    items.sort(key=lambda item: item.path not in long_files)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Start each test from the same random state, whichever tests ran before it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
