"""Triton runs in its interpreter here: it must be told so before it is imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
