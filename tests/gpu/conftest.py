"""Everything here needs a CUDA GPU and says so where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and there is none on this machine")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)
