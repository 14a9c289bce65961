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
from pathlib import Path
from typing import Any

import torch

import cqsa_stream as cqsa
from cqsa_stream.events import Ended, Event
from cqsa_stream.generate import generate

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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[1 << 20])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.05])
    parser.add_argument("--hosts", nargs="+", default=["ample"], help="ample, or a part of Q + K + V + O")
    parser.add_argument("--schedules", nargs="+", default=["auto"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "limits": limits()}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        report["limits"].update(disk(folder))
        for name, value in report["limits"].items():
            print(f"{name:<32} {value:8.2f}")
        print(f"\n{'tokens':>8} {'d':>4} {'share':>6} {'host':>6} {'in core':>8} {'run':>7}  ratio {'call':>7}  plan")
        for tokens in options.tokens:
            for dim in options.dims:
                paths = tuple(
                    generate(folder / "d", tokens=tokens, heads=HEADS, head_dim=dim, dtype="bfloat16", seed=dim)
                )
                data = 4 * tokens * HEADS * dim * 2
                for share in options.shares:
                    for host in options.hosts:
                        for schedule in options.schedules:
                            memory = "64GiB" if host == "ample" else int(float(host) * data) + (1 << 30)
                            settings = {
                                "device_memory": int(share * data), "host_memory": memory, "schedule": schedule,
                            }  # fmt: skip
                            repeats = 1 if tokens > IN_CORE_TOKENS else options.repeats
                            there = in_core(tokens, dim, repeats)
                            found = [run(paths, folder / "out", settings) for _ in range(repeats)]
                            best = sorted(found, key=lambda it: it["run_s"])[len(found) // 2]
                            row = {
                                "tokens": tokens,
                                "dim": dim,
                                "share": share,
                                "host": host,
                                "in_core_s": there,
                                **best,
                            }
                            rows.append(row)
                            plan = f"{best['schedule']} {best['chunks']}"
                            print(
                                f"{tokens:>8} {dim:>4} {share:>6} {host:>6} {there:8.3f} {best['run_s']:7.3f} "
                                f"{best['run_s'] / there:6.3f} {best['call_s']:7.3f}  {plan}, "
                                f"device {best['device_peak_bytes'] / 2**20:.0f} of {share * data / 2**20:.0f} MiB, "
                                f"host {best['host_peak_bytes'] / 2**20:.0f} MiB",
                                flush=True,
                            )
                shutil.rmtree(folder / "d")
    report["runs"] = rows
    options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    sys.exit(main())
