"""This machine as the planner sees it: devices, what is free, how fast it is, and the shapes its kernels like."""

import re
import time
from dataclasses import replace
from functools import cache

import psutil
import torch

from cqsa_stream.errors import InputError
from cqsa_stream.kernels import kernel_for
from cqsa_stream.problem import Problem
from cqsa_stream.schedulers.costs import Rates
from cqsa_stream.schedulers.planner import Machine

__all__ = ["choose_device", "describe", "parse_size"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_HOST_RESERVED_BYTES = {"cpu": 18 << 20, "cuda": 1 << 30}  # libraries' own: code pages, stacks, handles; measured
_THREAD_BYTES = 1 << 20  # a kernel's scratch for each compute thread
_DEVICE_RESERVED_BYTES = 64 << 20
_FREE_SHARE = 0.8


def parse_size(size: float | str | None, name: str) -> int | None:
    """Return bytes from a number or from "4GiB", "512MiB", "4e9". Raises InputError."""
    if size is None:
        return None
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\+?\d+)?)\s*([kmgt]i?)?b?\s*", size, re.IGNORECASE)
        if match is None:
            raise InputError(f'{name} {size!r}: no size; expected bytes or a number with a unit, as "4GiB" or "512MiB"')
        size = float(match[1]) * _UNITS[(match[2] or "").lower()]
    if not 1 <= size < 2**63:
        raise InputError(f"{name} {size}; expected 1 byte to 8 EiB")
    return int(size)


def choose_device(name: str) -> torch.device:
    """Return the device of "auto", "cpu", "cuda" or "cuda:1". Raises InputError where there is none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise InputError(f"device {name!r}; expected auto, cpu, cuda or cuda:<number>")
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(match[1] or 0)
    if index >= count:
        raise InputError(f"device {name!r}: this machine has {count} CUDA devices; take --device cpu")
    return torch.device("cuda", index)


def describe(device: torch.device, problem: Problem, device_memory: int | None, host_memory: int | None) -> Machine:
    """Return the machine; budgets that are not given are 80 % of what is free. Raises InputError."""
    if device.type == "cpu" and device_memory is not None:
        raise InputError("device_memory with device cpu: there is one pool there; give host_memory alone")
    dtype = getattr(torch, problem.dtype)
    nominal = 5e10 * torch.get_num_threads() if device.type == "cpu" else 3e13 if dtype == torch.float32 else 4e14
    rates = Rates(nominal, read_bytes_per_s=1e9, write_bytes_per_s=5e8, commit_s=0.02, call_s=1e-4)
    flops = _measured_flops(str(device), problem.dtype, problem.head_dim, problem.value_dim)
    measured = replace(rates, flops_per_s=flops)
    host = int(psutil.virtual_memory().available * _FREE_SHARE) if host_memory is None else host_memory
    reserved = _HOST_RESERVED_BYTES[device.type] + _THREAD_BYTES * torch.get_num_threads()
    if device.type == "cpu":
        return Machine(
            device="cpu", device_allowed_bytes=None, host_allowed_bytes=host, device_reserved_bytes=0,
            host_reserved_bytes=reserved, rates=rates, measured=measured, tile_rows=16_384, tile_columns=16_384,
            leaf=1_024, block_tokens=16_384, column_tokens=16_384, step_flops=2e11,
        )  # fmt: skip
    if device_memory is None:
        device_memory = int(torch.cuda.mem_get_info(device)[0] * _FREE_SHARE)
    plain = dtype == torch.float32  # its scores are written out: small tiles
    return Machine(
        device="cuda", device_allowed_bytes=device_memory, host_allowed_bytes=host,
        device_reserved_bytes=_DEVICE_RESERVED_BYTES, host_reserved_bytes=reserved, rates=rates, measured=measured,
        tile_rows=2_048 if plain else 65_536, tile_columns=2_048 if plain else 65_536,
        leaf=2_048 if plain else 65_536, block_tokens=65_536, column_tokens=131_072, step_flops=1e13 if plain else 1e15,
    )  # fmt: skip


@cache
def _measured_flops(device_name: str, dtype_name: str, head_dim: int, value_dim: int) -> float:
    """Time the kernel on one tile, small enough to take a moment and large enough to tell: the median of 5."""
    device = torch.device(device_name)
    dtype = getattr(torch, dtype_name)
    kernel = kernel_for(device, dtype)
    rows, columns = (4_096, 1_024) if device.type == "cpu" else (16_384, 16_384)
    if device.type == "cuda" and dtype == torch.float32:
        rows = columns = 2_048
    dtype = kernel.compute_dtype(dtype)
    q = torch.zeros(1, rows, head_dim, dtype=dtype, device=device)
    k = torch.zeros(1, columns, head_dim, dtype=dtype, device=device)
    v = torch.zeros(1, columns, value_dim, dtype=dtype, device=device)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        kernel.attend(q, k, v, "full", 1.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2.0 * (head_dim + value_dim) * rows * columns / sorted(seconds[1:])[2]
