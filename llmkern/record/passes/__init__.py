"""The passes over one loaded workload, a file each; all of them take the rig that the session made."""

from __future__ import annotations
