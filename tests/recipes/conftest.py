"""Recipes are tested on toy networks, in seconds; see toys.py."""

import pytest


@pytest.fixture(params=[10, 100])
def classes(request):
    """Losses that hide a division by the number of classes give themselves away."""
    return request.param
