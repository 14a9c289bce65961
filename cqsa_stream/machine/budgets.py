"""This machine as the planner sees it: devices, what is free, how fast it is, and the shapes its kernels like."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import psutil
import torch

from cqsa_stream.errors import InputError
from cqsa_stream.kernels.choose import fold_for, kernel_of
from cqsa_stream.kernels.contract import TRIANGLES, Kernel, KernelChoice, Scores
from cqsa_stream.machine.calibration import load
from cqsa_stream.machine.device import Device
from cqsa_stream.problem import Problem
from cqsa_stream.schedulers import units
from cqsa_stream.schedulers.model.rates import Rates, TileTimes
from cqsa_stream.schedulers.request import Machine
from cqsa_stream.scores import Terms, is_number

__all__ = [
    "FREE_SHARE",
    "describe",
    "free_budgets",
    "free_host_bytes",
    "nominal_rates",
    "parse_size",
]

_THREAD_BYTES = 1 << 20  # a kernel's scratch for each compute thread
_CALL_S = 1e-4  # nominal, of a kernel call besides its work
FREE_SHARE = 0.8


def parse_size(size: float | str | None, name: str) -> int | None:
    """Return bytes from a number or from "4GiB", "512MiB", "4G" (4e9), "4e9". Raises InputError."""
    if size is None:
        return None
    if not isinstance(size, str) and not is_number(size):
        raise InputError(f'{name} {size!r}; expected bytes or a size, as "4GiB" or "512MiB"')
    if isinstance(size, str):
        try:
            size = units.parse_size(size)
        except ValueError as error:
            raise InputError(f"{name} {size!r}: {error}") from error
    if not 1 <= size < 2**63:
        raise InputError(f"{name} {size}; expected 1 byte to 8 EiB")
    return int(size)


def describe(
    device: Device,
    problem: Problem,
    choice: KernelChoice,
    device_memory: int | None,
    host_memory: int | None,
    out: Path | None,
) -> Machine:
    """Return the machine; budgets that are not given are 80 % of what is free. Raises InputError."""
    habits, stored = device.habits, getattr(torch, problem.dtype)
    if not habits.own_memory and device_memory is not None:
        raise InputError(f"device_memory with device {device}: there is one pool there; give host_memory alone")
    kernel = kernel_of(choice, device.torch, stored)
    can = kernel.abilities
    compute = can.compute_dtype(stored)
    dtype = str(compute).removeprefix("torch.")
    calibration = load(device)
    known = calibration.rates(dtype, choice.operator, problem.head_dim, problem.value_dim) if calibration else None
    nominal = nominal_rates(device, compute, problem.head_dim + problem.value_dim)
    measured = known or _tried(nominal, device, kernel, problem)
    free, tile = free_host_bytes(), can.tile
    on_device = device.free_bytes()
    return Machine(
        kernel=choice.kernel,
        operator=choice.operator,
        habits=habits,
        device_allowed_bytes=_allowed(on_device) if device_memory is None else device_memory,
        host_allowed_bytes=int(free * FREE_SHARE) if host_memory is None else host_memory,
        host_reserved_bytes=habits.host_reserved_bytes + _THREAD_BYTES * torch.get_num_threads(),
        rates=known or nominal,
        measured=measured,
        tile=tile if known is None or can.merges else replace(tile, rows=min(tile.rows, known.tiles.best_rows())),
        step_flops=habits.step_flops[compute.itemsize > 2],
        turn=can.turn(problem.head_dim, device.processors),
        device_reserved_bytes=_reserved_bytes(device, kernel, compute, problem.head_dim, problem.value_dim)
        if habits.own_memory
        else None,
        device_free_bytes=on_device,
        host_free_bytes=free,
        host_total_bytes=psutil.virtual_memory().total,
        disk_free_bytes=None if out is None else _free_disk_bytes(out),
        calibrated=known is not None,
    )


def nominal_rates(device: Device, compute: torch.dtype, width: int) -> Rates:
    """Return rates for a machine that was not measured, for head dims that sum up to ``width``."""
    flops = device.habits.flops_per_s[compute.itemsize > 2] * max(1, device.threads)
    return Rates(TileTimes.nominal(flops, width, _CALL_S, device.habits.triangles), device.habits.nominal)


def free_budgets(device: Device) -> tuple[int | None, int]:
    """Return the budgets, of device and host, of who names none: 80 % of what is free. On a host there is one pool."""
    return _allowed(device.free_bytes()), int(free_host_bytes() * FREE_SHARE)


def _allowed(free: int | None) -> int | None:
    return None if free is None else int(free * FREE_SHARE)


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


def _tried(rates: Rates, device: Device, kernel: Kernel, problem: Problem) -> Rates:
    """Return the rates with the kernel's times as a quick trial finds them."""
    flops = _measured_flops(device, kernel, problem.dtype, problem.head_dim, problem.value_dim, problem.terms)
    tiles = TileTimes.nominal(flops, problem.head_dim + problem.value_dim, _CALL_S, device.habits.triangles)
    return replace(rates, tiles=tiles)


@cache
def _measured_flops(device: Device, kernel: Kernel, stored: str, head_dim: int, value_dim: int, terms: Terms) -> float:
    """Time the kernel on one tile, small enough to take a moment and large enough to show: the median of 3."""
    tile, dtype = kernel.abilities.tile, kernel.abilities.compute_dtype(getattr(torch, stored))
    rows, columns = (min(pair) for pair in zip(device.habits.trial, (tile.rows, tile.columns), strict=True))
    shapes = (rows, head_dim), (columns, head_dim), (columns, value_dim)
    q, k, v = (torch.randn(1, *shape, device=device.torch).to(dtype) for shape in shapes)  # zeros would be faster
    slopes = torch.ones(1, device=device.torch) if terms.alibi_slopes else None
    scores = Scores(1.0, terms.soft_cap, slopes)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        kernel.attend(q, k, v, None, None, scores)
        device.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2.0 * (head_dim + value_dim) * rows * columns / sorted(seconds[1:])[1]


@cache
def _reserved_bytes(device: Device, kernel: Kernel, dtype: torch.dtype, head_dim: int, value_dim: int) -> int | None:
    """Return what the driver holds for this process besides torch's memory: context, code, handles of libraries.

    All that a run needs of these is there once the kernel and the merge have run. None where the driver is silent.
    """
    place = device.torch
    q, v = (torch.zeros(1, 64, dim, dtype=dtype, device=place) for dim in (head_dim, value_dim))
    out, lse = v.float(), torch.full((1, 64), -torch.inf, dtype=torch.float64, device=place)
    with device.current(), device.on(device.new_stream()):
        for left, right in TRIANGLES:
            fold_for(place)(out, lse, *kernel.attend(q, q, v, left, right, Scores(1.0)))
        for rounded in (torch.bfloat16, torch.float16):
            out.to(rounded)
        lse.float()
        device.synchronize()
    held = device.process_bytes()
    return None if held is None else max(0, held - device.held_bytes())
