"""One GPU, from disk: runs under budgets beside the kernel in core, as ratios within one run.

    python benchmarks/gpu.py [limits runs lengths errors rival] [--tokens 1048576] [--dims 64 128] [--shares 0.25 0.05]
                             [--hosts ample 0.5] [--caches cached cold] [--repeats 3] [--trace] [--out gpu.json]

Eight heads, bfloat16, causal. ``in core``: cuDNN on tensors that lie on the device. ``share``: device_memory as a part
of Q + K + V + O; ``host``: host_memory likewise. ``cached``: the inputs are in the page cache; ``cold``: they are not,
and ``disk`` is what their bytes and the output's take at the disk's rates. A run goes from disk to disk; its seconds
are those of the session. ``call`` is the whole call: opening, fingerprints, planning too.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu_limits import HEADS, cudnn, disk, limits, seconds

import cqsa_stream as cqsa
from cqsa_stream.events import Ended, Event
from cqsa_stream.inputs import open_inputs
from cqsa_stream.storage.atomic import make_directory, replace_file
from cqsa_stream.storage.open import TokenArray, open_array
from cqsa_stream.storage.output import create_array
from cqsa_stream.storage.readers.memory import MemoryArray
from cqsa_stream.verification.verify import verify_rows

MIB = 2**20
CHUNK_BYTES = 8 << 20
SECTIONS = ("limits", "runs", "lengths", "errors", "rival")


def write_inputs(folder: Path, tokens: int, dim: int) -> tuple[Path, ...]:
    """Write q.zarr, k.zarr and v.zarr, normally distributed, from the device."""
    chunk = min(tokens, CHUNK_BYTES // (2 * dim))
    paths = tuple(folder / f"{name}.zarr" for name in "qkv")
    with ThreadPoolExecutor(8) as pool:
        for path, head in product(paths, range(HEADS)):
            if head == 0:
                create_array(path, (1, HEADS, tokens, dim), "bfloat16", (1, 1, chunk, dim), "none")
            values = torch.randn(tokens, dim, device="cuda").bfloat16().view(torch.uint8).cpu().numpy()
            make_directory(path / "c" / "0" / str(head))
            for index in range(-(-tokens // chunk)):
                part = values[index * chunk : (index + 1) * chunk].reshape(-1).data
                make_directory(path / "c" / "0" / str(head) / str(index))
                pool.submit(replace_file, path / "c" / "0" / str(head) / str(index) / "0", [part])
    return paths


def drop_cache(paths: tuple[Path, ...]) -> None:
    """Let the system forget the inputs."""
    for path in paths:
        for file in path.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_cache(paths: tuple[Path, ...]) -> None:
    """Let the system hold the inputs."""
    for path in paths:
        for file in path.rglob("*"):
            if file.is_file():
                file.read_bytes()


def in_core(tokens: int, dim: int) -> float:
    """Return the seconds of cuDNN on resident tensors, once, after a warm-up."""
    q, k, v = (torch.randn(1, HEADS, tokens, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    cudnn(*(x[:, :, :4096] for x in (q, k, v)), causal=True)
    took = seconds(partial(cudnn, q, k, v, True), 1, warm_up=False)
    del q, k, v
    torch.cuda.empty_cache()
    return took


def run(paths: tuple[Path, ...], out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Run once, from disk to disk."""
    ends: list[Ended] = []

    def watch(event: Event) -> None:
        if isinstance(event, Ended):
            ends.append(event)

    discard(out)
    torch.cuda.empty_cache()
    start = time.perf_counter()
    cqsa.attention(*paths, out=out, is_causal=True, device="cuda", observers=[watch], **options)
    call_s = time.perf_counter() - start
    status = cqsa.open_run(out.with_name(out.name + ".run")).status()
    names = (
        "schedule", "chunks", "device_peak_bytes", "device_projected_bytes", "device_reserved_bytes",
        "device_driver_peak_bytes", "host_peak_bytes", "host_projected_bytes", "bytes_read", "bytes_written",
    )  # fmt: skip
    return {
        "run_s": ends[-1].figures.session_s,
        "call_s": call_s,
        "predicted_s": ends[-1].predicted["seconds"],
        **{name: status[name] for name in names},
    }


def discard(out: Path) -> None:
    for path in (out, out.with_name(out.name + ".run")):
        shutil.rmtree(path, ignore_errors=True)


def busy(paths: tuple[Path, ...], out: Path, options: dict[str, Any], trace_to: Path | None = None) -> float:
    """Return the share of the time from the first kernel to the last in which one ran, from a profiler's trace."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        run(paths, out, options)
    if trace_to is not None:
        trace.export_chrome_trace(str(trace_to))
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


def measured(paths: tuple[Path, ...], out: Path, row: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    """Return the figures of one row of the table, and print it: the in-core kernel and the runs by turns."""
    tokens, dim, options = row["tokens"], row["dim"], settings(row)
    kernel, runs = [], []
    for _ in range(row["repeats"]):
        kernel.append(in_core(tokens, dim) if row["in_core_s"] is None else row["in_core_s"])
        (drop_cache if row["cache"] == "cold" else warm_cache)(paths)
        runs.append(run(paths, out, options))
    middle = sorted(runs, key=lambda it: float(it["run_s"]))[len(runs) // 2]
    found = {**row, **middle, "in_core_s": statistics.median(kernel), "runs": runs}
    found["ratio"] = found["run_s"] / found["in_core_s"]
    line = f"{tokens:>8} {dim:>4} {row['share']:>6} {row['host']:>6} {row['cache']:>6} {found['in_core_s']:8.3f} "
    line += f"{found['run_s']:7.3f} {found['ratio']:6.3f} {found['call_s']:7.3f} "
    if row["cache"] == "cold" and rates:
        found["disk_s"] = (
            found["bytes_read"] / rates["disk cold GB/s"] + found["bytes_written"] / rates["disk written GB/s"]
        ) / 1e9
        line += f"{found['disk_s']:7.3f}"
    else:
        line += " " * 7
    if row["trace"]:
        found["busy"] = busy(paths, out, options, row["trace"])
        line += f" {found['busy']:6.1%}"
    budget = options["device_memory"]
    driver = found["device_driver_peak_bytes"] - (found["device_reserved_bytes"] or 0)
    print(
        f"{line}  {found['schedule']} {found['chunks']}, device {found['device_peak_bytes'] / MIB:.0f}, by the driver "
        f"{driver / MIB:.0f} of {budget / MIB:.0f} MiB, host {found['host_peak_bytes'] / MIB:.0f} of "
        f"{found['host_projected_bytes'] / MIB:.0f}, read {found['bytes_read'] / 1e9:.2f} GB",
        flush=True,
    )
    return found


def settings(row: dict[str, Any]) -> dict[str, Any]:
    """Return the run options of a row."""
    data = 4 * row["tokens"] * HEADS * row["dim"] * 2
    host = "64GiB" if row["host"] == "ample" else int(float(row["host"]) * data)
    return {"device_memory": int(row["share"] * data), "host_memory": host, "schedule": row.get("schedule", "auto")}


HEADER = (
    f"{'tokens':>8} {'d':>4} {'share':>6} {'host':>6} {'cache':>6} {'in core':>8} {'run':>7}  ratio {'call':>7} "
    f"{'disk':>7}   busy  plan"
)


def runs(folder: Path, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """The table of budgets."""
    print(f"\n{HEADER}")
    for tokens, dim in product(options.tokens, options.dims):
        paths = write_inputs(folder / "d", tokens, dim)
        once = in_core(tokens, dim) if tokens > 1 << 20 else None  # of a long sequence once, for all rows
        for number, (share, host, cache) in enumerate(product(options.shares, options.hosts, options.caches)):
            if host != "ample" and cache == "cold" and "cached" in options.caches:
                continue
            trace = (
                options.trace and cache == "cached" and options.out.with_suffix(f".{tokens}-{dim}-{number}.trace.json")
            )
            row = {
                "tokens": tokens, "dim": dim, "share": share, "host": host, "cache": cache,
                "schedule": options.schedule, "repeats": 1 if once else options.repeats, "in_core_s": once,
                "trace": trace or None,
            }  # fmt: skip
            found = measured(paths, folder / "out", row, report.get("limits", {}))
            report["runs"].append({**found, "trace": str(trace or "")})
            options.out.write_text(json.dumps(report, indent=1))
        shutil.rmtree(folder / "d")
        discard(folder / "out")


def lengths(folder: Path, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Seconds over tokens squared, at a quarter of the data."""
    print(f"\n{HEADER}")
    report["lengths"] = []
    for tokens in options.lengths:
        paths = write_inputs(folder / "d", tokens, 64)
        long = tokens > 1 << 20
        row = {
            "tokens": tokens, "dim": 64, "share": 0.25, "host": "ample", "cache": "cached",
            "repeats": 1 if long else 3, "in_core_s": float("nan") if long else None, "trace": None,
        }  # fmt: skip
        found = measured(paths, folder / "out", row, {})
        report["lengths"].append({"tokens": tokens, "s_per_square": found["run_s"] / tokens**2})
        print(f"{tokens:>8}  {found['run_s'] / tokens**2 * 1e12:.4f} s per 10^12 pairs of tokens")
        options.out.write_text(json.dumps(report, indent=1))
        shutil.rmtree(folder / "d")


def errors(folder: Path, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Mean error of sampled rows against float64, over the in-core kernel's: tiles merged under a small budget."""
    report["errors"] = []
    tokens = options.error_tokens
    print(f"\n{'tokens':>8} {'d':>4} {'kernel':>8} {'output':>9} {'error':>10} {'in core':>10}  ratio")
    for dim in options.dims:
        paths = write_inputs(folder / "d", tokens, dim)
        arrays = open_inputs(*paths)
        q, k, v = (whole(array).cuda() for array in arrays.values())
        there = MemoryArray.of_tensor(cudnn(q, k, v, True)[0].cpu())
        del q, k, v
        for kernel, dtype in product(("auto", "cupy"), ("bfloat16", "float32")):
            discard(folder / "out")
            run_it(paths, folder / "out", kernel, dtype, int(0.05 * 4 * tokens * HEADS * dim * 2) + (256 << 20))
            ours = cqsa.open_run(folder / "out.run")
            problem, axis = ours.manifest.problem, ours.manifest.rows
            finished = [set(range(axis.filled))] * problem.lanes
            checked = partial(
                verify_rows, problem, arrays, lse_at=lambda *_: 0.0, finished=finished, axis=axis, rows=64, seed=0,
                rounded_tiles=True, damaged=0,
            )  # fmt: skip
            found = [checked(out=array).mean_relative_error for array in (open_array(folder / "out"), there)]
            row = {"dim": dim, "kernel": kernel, "output": dtype, "error": found[0], "in_core": found[1]}
            report["errors"].append(row)
            line = f"{tokens:>8} {dim:>4} {kernel:>8} {dtype:>9} {found[0]:10.3e} {found[1]:10.3e}"
            print(f"{line} {found[0] / found[1]:6.3f}", flush=True)
        shutil.rmtree(folder / "d")


def run_it(paths: tuple[Path, ...], out: Path, kernel: str, dtype: str, memory: int) -> None:
    """Run by the command line, which takes the output's dtype."""
    command = ["run", *map(str, paths), str(out), "--causal", "--device", "cuda", "--device-memory", str(memory)]
    arguments, sys.argv = sys.argv, ["cqsa", *command, "--kernel", kernel, "--out-dtype", dtype, "--quiet"]
    try:
        from cqsa_stream.cli import main as cqsa_main

        cqsa_main()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = arguments


def whole(array: TokenArray) -> torch.Tensor:
    """Return an array of bfloat16 in host memory."""
    found = torch.empty(array.shape, dtype=torch.bfloat16)
    heads, tokens = array.shape[1:3]
    array.begin(1)
    array.read_into(0, range(heads), range(tokens), MemoryArray.of_tensor(found).values[0])
    return found


def rival(folder: Path, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """The same work by stream-cqsa: inputs in host memory, the same device budget; twice, the second counts."""
    import stream_cqsa

    report["rival"] = []
    print(f"\n{'tokens':>8} {'d':>4} {'share':>6} {'stream-cqsa':>11} {'run':>7}  times")
    for tokens, dim, share in product(options.tokens, options.dims, options.shares):
        budget = int(share * 4 * tokens * HEADS * dim * 2)
        q, k, v = (
            torch.randn(1, HEADS, tokens, dim, dtype=torch.bfloat16, device="cuda").cpu().pin_memory() for _ in "qkv"
        )
        took, info = [], {}
        for _ in range(2):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            _, info = stream_cqsa.attention(
                q, k, v, is_causal=True, hardware={"cuda:0": budget, "host": "100GiB"}, return_info=True
            )
            torch.cuda.synchronize()
            took.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated()
        mine = [it for it in report["runs"] if (it["tokens"], it["dim"], it["share"]) == (tokens, dim, share)]
        ours = mine[0]["run_s"] if mine else float("nan")
        told = {name: value for name, value in info.items() if isinstance(value, str | int | float)}
        report["rival"].append(
            {"tokens": tokens, "dim": dim, "share": share, "s": took, "run_s": ours, "peak": peak, "info": told}
        )
        line = f"{tokens:>8} {dim:>4} {share:>6} {took[-1]:11.3f} {ours:7.3f} {took[-1] / ours:6.2f}"
        print(
            f"{line}  peak {peak / MIB:.0f} of {budget / MIB:.0f} MiB; {told.get('engine')}, {told.get('kernel')}",
            flush=True,
        )
        options.out.write_text(json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", default=[], help=" ".join(SECTIONS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1 << 20])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << n for n in (19, 20, 21, 22)])
    parser.add_argument("--error-tokens", type=int, default=1 << 17)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.05])
    parser.add_argument("--hosts", nargs="+", default=["ample", "0.5"], help="ample, or a part of Q + K + V + O")
    parser.add_argument("--caches", nargs="+", default=["cached", "cold"])
    parser.add_argument("--schedule", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trace", action="store_true", help="trace a run for each row with cached inputs")
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "runs": []}
    sections = options.sections or SECTIONS
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        if "limits" in sections:
            report["limits"] = {**limits(), **disk(folder)}
            for name, value in report["limits"].items():
                print(f"{name:<32} {value:8.2f}", flush=True)
        for section in (runs, lengths, errors, rival):
            if section.__name__ in sections:
                section(folder, options, report)
    options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
