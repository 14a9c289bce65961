"""Looking at this machine: what is installed and usable, how fast memory, disk and bus are, and whether results are
exact. It names no users and no paths.
"""

import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from cqsa_stream.api import attention
from cqsa_stream.kernels.choose import choices
from cqsa_stream.machine.budgets import free_host_bytes
from cqsa_stream.machine.calibration import load
from cqsa_stream.machine.device import ALL, Device, device_of, devices_of
from cqsa_stream.schedulers.units import amount_text, size_text

__all__ = ["doctor_text", "examine"]

_PACKAGES = (
    "cqsa-stream", "torch", "numpy", "zarr", "tensorstore", "cupy-cuda13x", "cupy-cuda12x", "nvidia-ml-py",
    "flash-attn-4", "ray", "matplotlib", "transformers", "xarray",
)  # fmt: skip
_NEEDED_FREE = 1 << 30
_BLOCK = 64 << 20
_EXACT = (1, 2, 1_000, 64)
_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # absolute: the first rows reach 4, where bfloat16 rounds by 8e-3


def examine(folder: Path) -> dict[str, Any]:
    """Return what is found of this machine, and of the disk of a folder: within seconds."""
    devices = [device_of(name) for name in ("cpu", *(d for d in devices_of(ALL) if d != ALL))]
    exact = [_exact(device) for device in devices]
    found: dict[str, Any] = {
        "versions": _versions(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "host_total_bytes": psutil.virtual_memory().total,
        "host_free_bytes": free_host_bytes(),
        "devices": [_described(device) for device in devices],
        "memory_bytes_per_s": _memory(),
        "disk": _disk_of(folder),
        "exact": {"ok": all(check["ok"] for check in exact), "checks": exact},
    }
    found["advice"] = _advice(found)
    return found


def doctor_text(found: dict[str, Any]) -> str:
    """Describe what was found."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    disk, disk_text = found["disk"], "nothing can be written here"
    if disk is not None:
        written, read = (amount_text(disk[f"{name}_bytes_per_s"], "B/s") for name in ("write", "read"))
        disk_text = f"{size_text(disk['free_bytes'])} free, {written} written durably, {read} read"
    lines = [
        f"versions    {versions}",
        f"system      {found['system']}, {found['processors']} processors, {found['threads']} threads compute",
        f"memory      {size_text(found['host_free_bytes'])} of {size_text(found['host_total_bytes'])} free, "
        f"{amount_text(found['memory_bytes_per_s'], 'B/s')} copied",
        f"disk here   {disk_text}",
    ]
    for device in found["devices"]:
        free = "" if device["free_bytes"] is None else f", {size_text(device['free_bytes'])} free"
        bus = f", bus {amount_text(device['bus_bytes_per_s'], 'B/s')}" if device["bus_bytes_per_s"] else ""
        lines.append(f"{device['name']:<11} {device['model']}{free}{bus}")
        for dtype, kernels in device["kernels"].items():
            lines.append(f"            {dtype}: {kernels['chosen']} (usable: {', '.join(kernels['usable'])})")
    for check in found["exact"]["checks"]:
        verdict = "exact" if check["ok"] else "NOT EXACT"
        lines.append(
            f"check       {verdict} on {check['device']}: {check['dtype']} differs from float64 by "
            f"{check['max_abs_error']:.1e} (at most {check['tolerance']:.0e})"
        )
    return "\n".join([*lines, *(f"advice      {advice}" for advice in found["advice"])])


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _described(device: Device) -> dict[str, Any]:
    kernels = {}
    for dtype in (torch.float32, torch.bfloat16):
        usable = list(dict.fromkeys(choice.kernel for choice in choices(device.torch, dtype)))
        kernels[str(dtype).removeprefix("torch.")] = {"chosen": usable[0], "usable": usable}
    return {
        "name": str(device),
        "model": device.model,
        "free_bytes": device.free_bytes(),
        "bus_bytes_per_s": _bus(device) if device.habits.own_memory else None,
        "kernels": kernels,
        "calibrated": load(device) is not None,
    }


def _exact(device: Device) -> dict[str, Any]:
    """Compute a small attention on a device, and compare it with the definition in float64."""
    dtype = torch.bfloat16 if device.habits.own_memory else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(_EXACT, generator=generator).to(dtype) for _ in range(3))
    found = attention(q, k, v, is_causal=True, device=str(device)).double()
    scores = q.double() @ k.double().transpose(2, 3) * _EXACT[3] ** -0.5
    hidden = torch.ones(_EXACT[2], _EXACT[2], dtype=torch.bool).triu(1)
    expected = scores.masked_fill(hidden, -torch.inf).softmax(3) @ v.double()
    name = str(dtype).removeprefix("torch.")
    error = float((found - expected).abs().max())
    return {
        "device": str(device),
        "dtype": name,
        "max_abs_error": error,
        "tolerance": _TOLERANCE[name],
        "ok": error <= _TOLERANCE[name],
    }


def _memory() -> float:
    """Return the bytes per second at which host memory is copied."""
    source, target = np.ones(_BLOCK, np.uint8), np.empty(_BLOCK, np.uint8)
    return _rate(lambda: np.copyto(target, source))


def _bus(device: Device) -> float:
    """Return the bytes per second from page-locked memory to a device."""
    source = torch.zeros(_BLOCK, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=device.torch)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        device.synchronize()

    return _rate(copy)


def _disk_of(folder: Path) -> dict[str, float] | None:
    """Return what ``_disk`` finds; None where nothing can be written in the folder."""
    try:
        return _disk(folder)
    except OSError:
        return None


def _disk(folder: Path) -> dict[str, float]:
    """Return what is free on a folder's disk, and its bytes per second: written until they are durable, and read."""
    block = np.random.default_rng(0).integers(0, 256, _BLOCK, np.uint8).data
    with tempfile.TemporaryDirectory(dir=folder, prefix=".cqsa-doctor-") as temporary:
        path = Path(temporary, "block")

        def write() -> None:
            with path.open("wb") as file:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())

        def read() -> None:
            with path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while file.read(8 << 20):
                    pass

        rates = {"write_bytes_per_s": _rate(write), "read_bytes_per_s": _rate(read)}
    return {"free_bytes": psutil.disk_usage(str(folder)).free, **rates}


def _rate(action: Callable[[], object]) -> float:
    """Return bytes per second of an action on a block: the best of 3."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return _BLOCK / max(min(seconds), 1e-9)


def _advice(found: dict[str, Any]) -> list[str]:
    advice = []
    rough = [device["name"] for device in found["devices"] if not device["calibrated"]]
    if rough:
        advice.append(f"run cqsa bench: plans for {', '.join(rough)} are rough until then")
    if not found["exact"]["ok"]:
        advice.append("a result is not exact: do not use this installation; reinstall torch, and tell us")
    gpus = [device for device in found["devices"] if device["bus_bytes_per_s"]]
    if not gpus and torch.version.cuda is None:
        advice.append("this build of torch has no CUDA: for a GPU install one that has, then cqsa-stream[cuda]")
    if gpus and not any(found["versions"][name] for name in ("cupy-cuda13x", "cupy-cuda12x")):
        advice.append(
            "install cqsa-stream[cuda] (or [cuda12]): merges are faster with CuPy, and plans know the driver's memory"
        )
    if found["disk"] is None:
        advice.append("nothing can be written in this folder: run where the output is to go")
    free = {"host memory": found["host_free_bytes"], "the disk": (found["disk"] or {}).get("free_bytes", _NEEDED_FREE)}
    advice += [
        f"only {size_text(count)} of {name} are free: make room, or name a small budget"
        for name, count in free.items()
        if count < _NEEDED_FREE
    ]
    return advice
