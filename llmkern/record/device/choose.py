"""Which device a run takes."""

from __future__ import annotations

import re

import torch

from llmkern.errors import DeviceError, UsageError
from llmkern.record.device.interface import Device

_NAME = re.compile(r"^(?:auto|cpu|cuda(?::(\d{1,4}))?)$")


def check_device_name(name: str) -> None:
    """Raise UsageError for anything but auto, cpu, cuda or cuda:N."""
    if not _NAME.match(name):
        raise UsageError(
            f"--device {name!r} is none of auto, cpu, cuda and cuda:N (N counts GPUs from 0; ROCm and others cannot be "
            "recorded): choose one of them."
        )


def choose_device(name: str) -> Device:
    """Return the device for ``--device`` auto, cuda, cuda:N or cpu.

    Raises UsageError for another name, DeviceError when a GPU is asked for and cannot be used.
    """
    check_device_name(name)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        from llmkern.record.device.cpu import CpuDevice

        return CpuDevice()
    if not torch.cuda.is_available():
        reason = (
            f"this PyTorch ({torch.__version__}) was built without CUDA"
            if torch.version.cuda is None
            else "PyTorch finds no NVIDIA GPU or driver"
        )
        raise DeviceError(
            f"--device {name} needs a CUDA GPU, but {reason}: run with --device cpu, "
            "or see 'llmkern doctor' for what is missing."
        )
    index = int(name.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise DeviceError(
            f"--device {name}: there are {torch.cuda.device_count()} GPUs, numbered from 0: choose one of them."
        )
    from llmkern.record.device.cuda import CudaDevice

    return CudaDevice(index)
