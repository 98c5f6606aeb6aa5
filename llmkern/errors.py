"""Errors that a user may cause: each is one sentence with the value, the limit and the next step."""

from __future__ import annotations


class LlmkernError(Exception):
    """Base of every error that ends a command with one sentence on stderr and a non-zero exit code."""

    exit_code = 2


class UsageError(LlmkernError):
    """An option or an input file cannot be used as given."""


class DeviceError(LlmkernError):
    """The device, its driver or one of its sensors cannot do what the run needs."""

    exit_code = 3


class OutOfMemoryError(DeviceError):
    """The model or its activations do not fit on the device."""


class RecordingError(LlmkernError):
    """Recording stopped early; whatever was written before stays readable."""

    exit_code = 4


class RunFolderError(LlmkernError):
    """A run folder is missing, torn or of another schema version."""

    exit_code = 5


class InterruptedRunError(LlmkernError):
    """A signal ended the run; the exit code is the shell's for it."""

    def __init__(self, sentence: str, exit_code: int = 130) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code
