"""One GPU, from disk: limits of the device, the in-core kernel, and runs under budgets, as ratios within one run.

    python benchmarks/gpu.py [--tokens 1048576] [--dims 64 128] [--shares 0.25 0.05] [--repeats 3] [--out gpu.json]

Eight heads, bfloat16, causal. ``in core``: cuDNN on tensors that lie on the device; of longer sequences, scaled by the
operations. ``share``: device_memory as a part of Q + K + V + O. A run reads from disk and writes to disk; its seconds
are those of the session (``run``) and of the whole call (``call``: opening, fingerprints, planning, page-locking too).
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

import cqsa_stream as cqsa
from cqsa_stream.api import open_inputs
from cqsa_stream.events import Ended, Event
from cqsa_stream.generate import generate
from cqsa_stream.storage.arrays import TokenArray, open_array
from cqsa_stream.storage.memory import MemoryArray
from cqsa_stream.verify import verify_rows

HEADS = 8
IN_CORE_TOKENS = 1 << 20


def seconds(action: Callable[[], object], repeats: int = 5) -> float:
    """Return the median time of an action on the device, after a warm-up."""
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


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> object:
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    return attend(q, k, v, None, True, 0.0, causal, False, scale=q.shape[3] ** -0.5)


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> object:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=q.shape[3] ** -0.5)


def operations(tokens: int, dim: int, causal: bool = True) -> float:
    return 4.0 * dim * HEADS * tokens * tokens / (2 if causal else 1)


def limits() -> dict[str, float]:
    """Return what the device can do: TFLOP/s of the kernels at 65,536 tokens, GB/s of the bus and of its memory."""
    found: dict[str, float] = {}
    for dim in (64, 128):
        q, k, v = (torch.randn(1, 1, 65_536, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        for name, attend in (("cudnn", cudnn), ("flash", flash)):
            for causal in (True, False):
                took = seconds(partial(attend, q, k, v, causal))
                rate = operations(65_536, dim, causal) / HEADS / took / 1e12
                found[f"{name} d{dim} {'causal' if causal else 'full'} TFLOP/s"] = rate
    host = torch.empty(1 << 30, dtype=torch.uint8).pin_memory()
    there = torch.empty_like(host, device="cuda")
    found["bus to device GB/s"] = len(host) / seconds(lambda: there.copy_(host, non_blocking=True)) / 1e9
    found["bus to host GB/s"] = len(host) / seconds(lambda: host.copy_(there, non_blocking=True)) / 1e9
    return found


def disk(folder: Path) -> dict[str, float]:
    """Return GB/s of the disk, past the page cache and through it, in 16 MiB pieces by dd."""
    file, found = folder / "file", {}
    for name, flags in (
        ("written", ["if=/dev/zero", f"of={file}", "oflag=direct"]),
        ("cold", [f"if={file}", "of=/dev/null", "iflag=direct"]),
        ("cached", [f"if={file}", "of=/dev/null"]),
    ):
        for _ in range(2 if name == "cached" else 1):
            start = time.perf_counter()
            subprocess.run(["dd", "bs=16M", "count=256", *flags], check=True, capture_output=True)
            found[f"disk {name} GB/s"] = 256 * 16 * 2**20 / (time.perf_counter() - start) / 1e9
    file.unlink()
    return found


def in_core(tokens: int, dim: int, repeats: int) -> float:
    """Return the seconds of cuDNN on resident tensors, of a longer sequence scaled by the operations."""
    there = min(tokens, IN_CORE_TOKENS)
    q, k, v = (torch.randn(1, HEADS, there, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    took = seconds(partial(cudnn, q, k, v, True), repeats) * operations(tokens, dim) / operations(there, dim)
    del q, k, v
    torch.cuda.empty_cache()
    return took


def run(paths: tuple[Path, ...], out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Run once, from disk to disk."""
    ends: list[Ended] = []

    def watch(event: Event) -> None:
        if isinstance(event, Ended):
            ends.append(event)

    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name(out.name + ".run"), ignore_errors=True)
    torch.cuda.empty_cache()
    start = time.perf_counter()
    cqsa.attention(*paths, out=out, is_causal=True, device="cuda", observers=[watch], **options)
    call_s = time.perf_counter() - start
    status = cqsa.open_run(out.with_name(out.name + ".run")).status()
    return {
        "run_s": ends[-1].figures.session_s,
        "call_s": call_s,
        "schedule": status["schedule"],
        "chunks": status["chunks"],
        "device_peak_bytes": status["device_peak_bytes"],
        "device_projected_bytes": status["device_projected_bytes"],
        "host_peak_bytes": status["host_peak_bytes"],
        "bytes_read": status["bytes_read"],
        "predicted_s": ends[-1].predicted["seconds"],
    }


def busy(paths: tuple[Path, ...], out: Path, options: dict[str, Any]) -> float:
    """Return the share of the time from the first kernel to the last in which one ran, from a profiler's trace."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        run(paths, out, options)
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in trace.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Mem")
    )
    end, working = kernels[0][0], 0.0
    for start, stop in kernels:
        working += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return working / (end - kernels[0][0])


def errors(paths: tuple[Path, ...], out: Path, rows: int) -> tuple[float, float]:
    """Return the mean error of sampled rows against float64, of the run's output and of cuDNN on resident tensors."""
    ours = cqsa.open_run(out.with_name(out.name + ".run"))
    problem, axis = ours.manifest.problem, ours.manifest.rows
    arrays = open_inputs(*paths)
    q, k, v = (read_whole(array).cuda() for array in arrays.values())
    whole = MemoryArray.of_tensor(cudnn(q, k, v, True)[0])  # type: ignore[index]
    finished = [set(range(axis.filled))] * problem.lanes
    found = []
    for array in (open_array(out), whole):
        checked = verify_rows(
            problem, arrays, array, lambda *_: 0.0, finished, axis, rows, 0, rounded_tiles=True, damaged=0
        )
        found.append(checked.mean_relative_error)
    return found[0], found[1]


def read_whole(array: TokenArray) -> torch.Tensor:
    """Return an array of bfloat16 in host memory."""
    batch, heads, tokens, dim = array.shape
    values = np.empty((batch * heads, tokens, dim), ml_dtypes.bfloat16)
    for lane in range(batch * heads):
        head = lane % heads
        array.read_into(lane // heads, range(head, head + 1), range(tokens), values[lane : lane + 1])
    return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16).view(array.shape)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[1 << 20])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.05])
    parser.add_argument("--hosts", nargs="+", default=["ample"], help="ample, or a part of Q + K + V + O")
    parser.add_argument("--schedules", nargs="+", default=["auto"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checks", action="store_true", help="trace a run for each row, and compare with float64")
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "limits": limits()}
    report["runs"] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        report["limits"].update(disk(folder))
        for name, value in report["limits"].items():
            print(f"{name:<32} {value:8.2f}")
        print(f"\n{'tokens':>8} {'d':>4} {'share':>6} {'host':>6} {'in core':>8} {'run':>7}  ratio {'call':>7}  plan")
        for tokens, dim in product(options.tokens, options.dims):
            paths = tuple(generate(folder / "d", tokens=tokens, heads=HEADS, head_dim=dim, dtype="bfloat16", seed=dim))
            for share, host, schedule in product(options.shares, options.hosts, options.schedules):
                row = measured(paths, folder / "out", tokens, dim, share, host, schedule, options)
                report["runs"].append(row)
                options.out.write_text(json.dumps(report, indent=1))
            shutil.rmtree(folder / "d")


def measured(
    paths: tuple[Path, ...], out: Path, tokens: int, dim: int, share: float, host: str, schedule: str,
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Return the figures of one row of the table, and print it: the in-core kernel and the runs by turns."""
    data = 4 * tokens * HEADS * dim * 2
    memory = "64GiB" if host == "ample" else int(float(host) * data) + (1 << 30)
    settings = {"device_memory": int(share * data), "host_memory": memory, "schedule": schedule}
    kernel, runs = [], []
    for _ in range(1 if tokens > IN_CORE_TOKENS else options.repeats):
        kernel.append(in_core(tokens, dim, 1))
        runs.append(run(paths, out, settings))
    there = statistics.median(kernel)
    middle = sorted(runs, key=lambda it: float(it["run_s"]))[len(runs) // 2]
    row = {"tokens": tokens, "dim": dim, "share": share, "host": host, "in_core_s": there, **middle}
    line = (
        f"{tokens:>8} {dim:>4} {share:>6} {host:>6} {there:8.3f} {middle['run_s']:7.3f} {middle['run_s'] / there:6.3f} "
        f"{middle['call_s']:7.3f}  {middle['schedule']} {middle['chunks']}, device "
        f"{middle['device_peak_bytes'] / 2**20:.0f} of {share * data / 2**20:.0f} MiB, "
        f"read {middle['bytes_read'] / 1e9:.2f} GB"
    )
    if options.checks:
        row["busy"] = busy(paths, out, settings)
        line += f", busy {row['busy']:.1%}"
        if tokens <= IN_CORE_TOKENS:
            row["error"], row["in_core_error"] = errors(paths, out, 64)
            line += f", error {row['error'] / row['in_core_error']:.2f} of in core"
    print(line, flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
