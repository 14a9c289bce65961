"""This machine as the planner sees it: devices, what is free, how fast it is, and the shapes its kernels like."""

import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import psutil
import torch

from cqsa_stream.errors import InputError
from cqsa_stream.kernels.choose import Kernel, fold_for
from cqsa_stream.machine.calibration import load
from cqsa_stream.machine.driver import process_bytes
from cqsa_stream.machine.streams import new_stream
from cqsa_stream.problem import Problem, is_number
from cqsa_stream.schedulers.masks.bands import TileMask
from cqsa_stream.schedulers.model.rates import Rates, Speeds, TileTimes
from cqsa_stream.schedulers.search import Machine

__all__ = [
    "FREE_SHARE",
    "choose_device",
    "describe",
    "free_budgets",
    "free_host_bytes",
    "nominal_rates",
    "parse_size",
]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_HOST_RESERVED_BYTES = {"cpu": 20 << 20, "cuda": 1 << 30}  # libraries' own: code pages, stacks, handles; measured
_THREAD_BYTES = 1 << 20  # a kernel's scratch for each compute thread
FREE_SHARE = 0.8


def parse_size(size: float | str | None, name: str) -> int | None:
    """Return bytes from a number or from "4GiB", "512MiB", "4e9". Raises InputError."""
    if size is None:
        return None
    if not isinstance(size, str) and not is_number(size):
        raise InputError(f'{name} {size!r}; expected bytes or a size, as "4GiB" or "512MiB"')
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


def describe(
    device: torch.device,
    problem: Problem,
    kernel: Kernel,
    device_memory: int | None,
    host_memory: int | None,
    out: Path | None,
) -> Machine:
    """Return the machine; budgets that are not given are 80 % of what is free. Raises InputError."""
    if device.type == "cpu" and device_memory is not None:
        raise InputError("device_memory with device cpu: there is one pool there; give host_memory alone")
    stored = getattr(torch, problem.dtype)
    dtype = str(kernel.compute_dtype(stored)).removeprefix("torch.")
    width = problem.head_dim + problem.value_dim
    calibration = load(device)
    known = calibration.rates(dtype, problem.head_dim, problem.value_dim) if calibration else None
    nominal = nominal_rates(device, dtype, width)
    measured = known or _tried(nominal, device, kernel, problem)
    free = free_host_bytes()
    machine = Machine(
        device=device.type,
        device_allowed_bytes=None,
        host_allowed_bytes=int(free * FREE_SHARE) if host_memory is None else host_memory,
        host_reserved_bytes=_HOST_RESERVED_BYTES[device.type] + _THREAD_BYTES * torch.get_num_threads(),
        rates=known or nominal,
        measured=measured,
        tile=replace(kernel.tile, rows=min(kernel.tile.rows, known.tiles.best_rows())) if known else kernel.tile,
        block_tokens=16_384 if device.type == "cpu" else 65_536,
        column_tokens=16_384 if device.type == "cpu" else 131_072,
        step_flops=2e11 if device.type == "cpu" else 1e13 if dtype == "float32" else 1e15,
        host_free_bytes=free,
        host_total_bytes=psutil.virtual_memory().total,
        disk_free_bytes=None if out is None else _free_disk_bytes(out),
    )
    if device.type == "cpu":
        return machine
    device_free = _free_device_bytes(device)
    return replace(
        machine,
        device_allowed_bytes=int(device_free * FREE_SHARE) if device_memory is None else device_memory,
        device_reserved_bytes=_reserved_bytes(device, kernel, kernel.compute_dtype(stored)),
        device_free_bytes=device_free,
    )


_NOMINAL = Speeds(
    read_bytes_per_s=1e9, write_bytes_per_s=5e8, stage_bytes_per_s=4e9, touch_bytes_per_s=2e9, file_s=2e-3,
    file_lost_s=1e-3, block_s=1e-4, read_cpu_s=1e-10, check_cpu_s=2.5e-10, expand_cpu_s=4e-9, on_processor=True,
)  # fmt: skip


def nominal_rates(device: torch.device, dtype: str, width: int) -> Rates:
    """Return rates for a machine that was not measured."""
    if device.type == "cpu":
        return Rates(TileTimes.nominal(5e10 * torch.get_num_threads(), width, 1e-4), _NOMINAL)
    beside = replace(
        _NOMINAL,
        read_bytes_per_s=2e9,
        write_bytes_per_s=1e9,
        stage_bytes_per_s=2e10,
        file_lost_s=1e-9,
        on_processor=False,
    )
    return Rates(TileTimes.nominal(3e13 if dtype == "float32" else 4e14, width, 1e-4), beside)


def free_budgets(device: torch.device) -> tuple[int | None, int]:
    """Return the budgets, of device and host, of who names none: 80 % of what is free. On the CPU there is one pool."""
    on_device = None if device.type == "cpu" else int(_free_device_bytes(device) * FREE_SHARE)
    return on_device, int(free_host_bytes() * FREE_SHARE)


def _free_device_bytes(device: torch.device) -> int:
    """Return what is free on a CUDA device, what torch holds of it without using it included."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def free_host_bytes() -> int:
    """Return what is free of host memory: of the machine's, or of what the control group of the process may have."""
    free = psutil.virtual_memory().available
    for limit, used, reclaimable in _control_group():
        free = min(free, max(0, limit - used + reclaimable))
    return free


def _control_group() -> Iterator[tuple[int, int, int]]:
    """Yield (limit, in use, of which can be taken back) of each group (version 2) that the process is in."""
    try:
        path = Path("/proc/self/cgroup").read_text().partition("0::")[2].strip().lstrip("/")
    except OSError:
        return
    root = Path("/sys/fs/cgroup")
    for folder in (root / path, *(root / path).parents):
        try:
            limit = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit.isdecimal():
            names = ("inactive_file", "active_file", "slab_reclaimable")
            yield int(limit), used, sum(int(statistics.get(name, 0)) for name in names)


def _free_disk_bytes(path: Path) -> int:
    """Return what is free where a path is or will be."""
    path = path.absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def _tried(rates: Rates, device: torch.device, kernel: Kernel, problem: Problem) -> Rates:
    """Return the rates with the kernel's times as a quick trial finds them."""
    flops = _measured_flops(device, kernel, problem.dtype, problem.head_dim, problem.value_dim)
    return replace(rates, tiles=TileTimes.nominal(flops, problem.head_dim + problem.value_dim, 1e-4))


@cache
def _measured_flops(device: torch.device, kernel: Kernel, stored: str, head_dim: int, value_dim: int) -> float:
    """Time the kernel on one tile, small enough to take a moment and large enough to tell: the median of 3."""
    rows, columns = (2_048, 1_024) if device.type == "cpu" else (min(32_768, kernel.tile.rows), kernel.tile.columns)
    dtype = kernel.compute_dtype(getattr(torch, stored))
    q = torch.zeros(1, rows, head_dim, dtype=dtype, device=device)
    k = torch.zeros(1, columns, head_dim, dtype=dtype, device=device)
    v = torch.zeros(1, columns, value_dim, dtype=dtype, device=device)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        kernel.attend(q, k, v, "full", 1.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2.0 * (head_dim + value_dim) * rows * columns / sorted(seconds[1:])[1]


@cache
def _reserved_bytes(device: torch.device, kernel: Kernel, dtype: torch.dtype) -> int | None:
    """Return what the driver holds for this process besides torch's memory: context, code, handles of libraries.

    All that a run needs of these is there once the kernel and the merge have run. None where the driver does not tell.
    """
    q, out = torch.zeros(1, 64, 64, dtype=dtype, device=device), torch.zeros(1, 64, 64, device=device)
    lse = torch.full((1, 64), -torch.inf, dtype=torch.float64, device=device)
    masks: tuple[TileMask, ...] = ("full", "causal")
    with torch.cuda.device(device), torch.cuda.stream(new_stream(device)):
        for mask in masks:
            fold_for(device)(out, lse, *kernel.attend(q, q, q, mask, 1.0))
        for rounded in (torch.bfloat16, torch.float16):
            out.to(rounded)
        lse.float()
        torch.cuda.synchronize(device)
    held = process_bytes(device)
    return None if held is None else max(0, held - torch.cuda.memory_reserved(device))
