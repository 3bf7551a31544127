"""What all tests share."""

import os
import random
import sys
from pathlib import Path

import pytest
import torch

# The helpers are shared with processes that tests start, which import them by name.
HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")]))
os.environ.setdefault("WANDB_MODE", "offline")
# OpenMP's threads do not survive a fork, and the tests fork: a forked process would wait for them for ever.
torch.set_num_threads(1)
# Nor do processes that tests start compete for the cores with those that run tests beside them.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # what other tests have compiled counts towards a limit, beyond which nothing is
        torch._dynamo.reset()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
