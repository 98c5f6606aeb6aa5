"""The device that runs the model, behind one small interface; nobody outside of this room asks for its kind."""

from __future__ import annotations
