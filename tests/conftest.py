"""What every test starts from."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _the_same_draws_every_time() -> None:
    """Seed PyTorch: a test that draws at random must not pass on one machine and fail on the next."""
    torch.manual_seed(0)
