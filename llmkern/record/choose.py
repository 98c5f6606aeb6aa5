"""Which device a run takes."""

from __future__ import annotations

import torch

from llmkern.errors import DeviceError
from llmkern.record.cpu import CpuDevice
from llmkern.record.cuda import CudaDevice
from llmkern.record.device import Device


def choose_device(name: str) -> Device:
    """Return the device for ``--device`` auto, cuda, cuda:N or cpu.

    Raises DeviceError when a GPU is asked for and cannot be used.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
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
    index = int(name.partition(":")[2] or 0) if name != "auto" else 0
    if index >= torch.cuda.device_count():
        raise DeviceError(
            f"--device {name}: there are {torch.cuda.device_count()} GPUs, numbered from 0: choose one of them."
        )
    return CudaDevice(index)
