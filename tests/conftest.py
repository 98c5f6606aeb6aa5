"""What every test starts from."""

from __future__ import annotations

import os
import shutil
import signal

# Without a GPU Triton runs in its interpreter; it must be told so before anything imports it (bitsandbytes does).
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

# A shell that starts the tests in the background lets them ignore Ctrl+C, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _the_same_draws_every_time() -> None:
    """Seed PyTorch: a test that draws at random must not pass on one machine and fail on the next."""
    torch.manual_seed(0)
