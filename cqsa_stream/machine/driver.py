"""What the driver says this process holds on a CUDA device: the context, its libraries and all allocators together.

By NVML, the library behind nvidia-smi, through ``nvidia-ml-py``.
"""

import os
from functools import cache
from typing import Any

import torch

__all__ = ["process_bytes"]


def process_bytes(device: torch.device) -> int | None:
    """Return the bytes that this process holds on the device; None where nvidia-ml-py is missing, or NVML is silent."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(_handle(device))
    except pynvml.NVMLError:
        return None
    mine: list[int | None] = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
    return mine[0] if mine else None


@cache
def _handle(device: torch.device) -> Any:
    """Return NVML's handle of the device. Raises NVMLError."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode())
