"""What a GPU and the disk beside it can do: the limits that ``benchmarks/gpu.py`` holds runs against."""

import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch

HEADS = 8
SIDE = 65_536
FILES = 6


def seconds(action: Callable[[], object], repeats: int = 5, *, warm_up: bool = True) -> float:
    """Return the median time of an action on the device."""
    if warm_up:
        action()
    found = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(found)


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, ...]:
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    found: tuple[torch.Tensor, ...] = attend(q, k, v, None, True, 0.0, causal, False, scale=q.shape[3] ** -0.5)
    return found


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> object:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=q.shape[3] ** -0.5)


def fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> object:
    from flash_attn.cute import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal, return_lse=True)


def kernels() -> dict[str, Callable[..., object]]:
    """Return the vendors' kernels that are here."""
    found: dict[str, Callable[..., object]] = {"cudnn": cudnn, "flash": flash}
    there = find_spec("flash_attn") and find_spec("flash_attn.cute")
    return {"fa4": fa4, **found} if there else found


def operations(tokens: int, dim: int, causal: bool = True) -> float:
    """Return the floating-point operations of all heads."""
    return 4.0 * dim * HEADS * tokens * tokens / (2 if causal else 1)


def limits() -> dict[str, float]:
    """Return TFLOP/s of the kernels at 65,536 tokens of one head, a moment's and over a second, and GB/s of the bus."""
    found: dict[str, float] = {}
    for dim, (name, attend), causal in product((64, 128), kernels().items(), (True, False)):
        q, k, v = (torch.randn(1, 1, SIDE, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        took = seconds(partial(attend, q, k, v, causal))
        kind = f"{name} d{dim} {'causal' if causal else 'full'}"
        found[f"{kind} TFLOP/s"] = operations(SIDE, dim, causal) / HEADS / took / 1e12
        if name != "flash" and not causal:
            found[f"{kind} TFLOP/s, 1 s"] = sustained(partial(attend, q, k, v, causal), dim)
    host = torch.empty(1 << 30, dtype=torch.uint8).pin_memory()
    there = torch.empty_like(host, device="cuda")
    found["bus to device GB/s"] = len(host) / seconds(lambda: there.copy_(host, non_blocking=True)) / 1e9
    found["bus to host GB/s"] = len(host) / seconds(lambda: host.copy_(there, non_blocking=True)) / 1e9
    return found


def sustained(action: Callable[[], object], dim: int) -> float:
    """Return TFLOP/s of full tiles, one after another on two streams by turns, over about a second."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    count = 400
    torch.cuda.synchronize()
    start = time.perf_counter()
    for turn in range(count):
        with torch.cuda.stream(streams[turn % 2]):
            action()
    torch.cuda.synchronize()
    return count * operations(SIDE, dim, causal=False) / HEADS / (time.perf_counter() - start) / 1e12


def disk(folder: Path) -> dict[str, float]:
    """Return GB/s of the disk, past the page cache and through it, by as many dd at a time as there are files."""
    files = [folder / f"file{n}" for n in range(FILES)]
    found = {}
    for name, flags in (
        ("written", ["if=/dev/zero", "of={}", "oflag=direct"]),
        ("cold", ["if={}", "of=/dev/null", "iflag=direct"]),
        ("cached", ["if={}", "of=/dev/null"]),
    ):
        for _ in range(2 if name == "cached" else 1):
            start = time.perf_counter()
            with ThreadPoolExecutor(FILES) as pool:
                list(pool.map(partial(_dd, flags), files))
            found[f"disk {name} GB/s"] = FILES * 64 * 16 * 2**20 / (time.perf_counter() - start) / 1e9
    for file in files:
        file.unlink()
    return found


def _dd(flags: list[str], file: Path) -> None:
    command = ["dd", "bs=16M", "count=64", *(flag.format(file) for flag in flags)]
    subprocess.run(command, check=True, capture_output=True)
