"""One thread per test process, so that `pytest -n 2` uses two cores and not four halves."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture
def shared():
    """The folder with CIFAR-10 and published classifiers beside the checkout, if there is one."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared data beside the checkout")
    return SHARED


def pytest_addoption(parser):
    """`--kills`: how often the soak kills each command."""
    parser.addoption("--kills", type=int, default=200, help="kills per command of the soak")


@pytest.fixture
def kills(request):
    """How many kills the soak is to survive."""
    return request.config.getoption("--kills")
