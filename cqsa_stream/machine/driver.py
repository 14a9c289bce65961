"""What the driver says this process holds on a CUDA device: the context, its libraries and all allocators together.

By NVML, the library behind nvidia-smi, which is there where the driver is.
"""

import ctypes
import os
from functools import cache

import torch

__all__ = ["process_bytes"]

_MOST_PROCESSES = 256


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t, https://docs.nvidia.com/deploy/nvml-api/structnvmlProcessInfo__t.html"""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


def process_bytes(device: torch.device) -> int | None:
    """Return the bytes that this process holds on the device; None where the driver does not tell."""
    library, handle = _nvml(device)
    if library is None:
        return None
    count, found = ctypes.c_uint(_MOST_PROCESSES), (_Process * _MOST_PROCESSES)()
    if library.nvmlDeviceGetComputeRunningProcesses_v3(handle, ctypes.byref(count), found):
        return None
    mine = [process.used for process in found[: count.value] if process.pid == os.getpid()]
    return mine[0] if mine and mine[0] < 2**63 else None


@cache
def _nvml(device: torch.device) -> tuple[ctypes.CDLL | None, ctypes.c_void_p]:
    handle = ctypes.c_void_p()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        failed = library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle))
    except (OSError, AttributeError):
        return None, handle
    return (None if failed else library), handle
