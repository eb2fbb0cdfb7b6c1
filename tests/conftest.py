"""One thread per test process, so that `pytest -n 2` uses two cores and not four halves."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

BESIDE = Path(__file__).parents[2] / "shared"
SHARED = Path(os.environ["ROBUSTIFY_SHARED"]) if os.environ.get("ROBUSTIFY_SHARED") else BESIDE


@pytest.fixture
def shared():
    """The folder with CIFAR-10 and published classifiers: $ROBUSTIFY_SHARED, or `../shared`."""
    if not SHARED.is_dir():
        pytest.skip(f"needs CIFAR-10 and classifiers in $ROBUSTIFY_SHARED; there is no {SHARED}")
    return SHARED


def pytest_addoption(parser):
    """`--kills`: how often the soak kills each command."""
    parser.addoption("--kills", type=int, default=200, help="kills per command of the soak")


@pytest.fixture
def kills(request):
    """How many kills the soak is to survive."""
    return request.config.getoption("--kills")
