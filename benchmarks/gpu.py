"""One GPU, from disk: runs under budgets beside the kernels in core, as ratios within one run.

    python benchmarks/gpu.py [limits runs lengths errors rival] [--tokens 1048576] [--dims 64 128] [--shares 0.25 0.05]
                             [--hosts ample 0.5] [--caches cached cold] [--repeats 3] [--out gpu.json]

Eight heads, bfloat16, causal. ``in core``: the fastest of the vendors' kernels on tensors that lie on the device.
``share``: device_memory as a part of Q + K + V + O; ``host``: host_memory likewise. ``cached``: the inputs are in the
page cache; ``cold``: they are not, and ``disk`` is what their bytes and the output's take at the disk's rates. ``call``
is the whole call, from disk to the last fsync: opening, planning, fingerprints too; ``session`` the part of it that the
run counts. ``busy``: the share of the time from the first kernel to the last in which one ran, by the session's own
timeline; ``first``: from the first read to the first kernel. A run before the first warms up.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu_limits import HEADS, cudnn, disk, kernels, limits, operations, seconds

import cqsa_stream as cqsa
from cqsa_stream.events import Ended, Event, Span, Started
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


def in_core(tokens: int, dim: int, repeats: int) -> dict[str, float]:
    """Return the seconds of each vendor's kernel on resident tensors, after a warm-up; of FA-4 the median."""
    q, k, v = (torch.randn(1, HEADS, tokens, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    found = {}
    for name, attend in kernels().items():
        if name != "flash" or len(kernels()) == 2:
            attend(*(x[:, :, :4096] for x in (q, k, v)), True)
            found[name] = seconds(partial(attend, q, k, v, True), repeats if name == "fa4" else 1, warm_up=False)
    del q, k, v
    torch.cuda.empty_cache()
    return found


def run(paths: tuple[Path, ...], out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Run once, from disk to disk."""
    seen: list[Event] = []
    discard(out)
    torch.cuda.empty_cache()
    start = time.perf_counter()
    cqsa.attention(*paths, out=out, is_causal=True, device="cuda", observers=[seen.append], **options)
    call_s = time.perf_counter() - start
    status = cqsa.open_run(out.with_name(out.name + ".run")).status()
    names = (
        "schedule", "chunks", "device_peak_bytes", "device_projected_bytes", "device_reserved_bytes",
        "device_driver_peak_bytes", "host_peak_bytes", "host_projected_bytes", "bytes_read", "bytes_written",
    )  # fmt: skip
    begun, ended = seen[0], seen[-1]
    assert isinstance(begun, Started)
    assert isinstance(ended, Ended)
    share, first_s = busy(ended.spans)
    return {
        "run_s": ended.figures.session_s,
        "call_s": call_s,
        "predicted_s": ended.predicted["seconds"],
        "busy": share,
        "first_s": first_s,
        "kernel": begun.plan["kernel"],
        "reserved_told_bytes": begun.plan["device_reserved_bytes"],
        **{name: status[name] for name in names},
    }


def discard(out: Path) -> None:
    for path in (out, out.with_name(out.name + ".run")):
        shutil.rmtree(path, ignore_errors=True)


def busy(spans: Sequence[Span]) -> tuple[float, float]:
    """Return the share of the time between the first kernel and the last in which one ran, and what came before."""
    kernels = sorted((span.start_s, span.stop_s) for span in spans if span.kind == "kernel")
    reads = [span.start_s for span in spans if span.kind == "read"]
    end, working = kernels[0][0], 0.0
    for start, stop in kernels:
        working += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return working / (end - kernels[0][0]), kernels[0][0] - min(reads, default=0.0)


def measured(paths: tuple[Path, ...], out: Path, row: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    """Return the figures of one row of the table, and print it: after a run to warm up, the middle one of several."""
    tokens, dim, options = row["tokens"], row["dim"], settings(row)
    runs = []
    for number in range(row["repeats"] + 1):
        (drop_cache if row["cache"] == "cold" else warm_cache)(paths)
        found = run(paths, out, options)
        runs += [found] if number else []
    middle = sorted(runs, key=lambda it: float(it["call_s"]))[len(runs) // 2]
    found = {**row, **middle, "runs": runs}
    found["ratio"], found["session_ratio"] = (found[name] / found["in_core_s"] for name in ("call_s", "run_s"))
    line = f"{tokens:>8} {dim:>4} {row['share']:>6} {row['host']:>6} {row['cache']:>6} {found['in_core_s']:8.3f} "
    line += f"{found['call_s']:7.3f} {found['ratio']:6.3f} {found['run_s']:7.3f} {found['session_ratio']:6.3f} "
    line += f"{found['predicted_s']:9.3f} {found['busy']:6.1%} {found['first_s'] * 1e3:5.0f} ms "
    if row["cache"] == "cold" and rates:
        found["disk_s"] = (
            found["bytes_read"] / rates["disk cold GB/s"] + found["bytes_written"] / rates["disk written GB/s"]
        ) / 1e9
        line += f"disk {found['disk_s']:7.3f} "
    budget, told = options["device_memory"], (found["reserved_told_bytes"] or 0) / MIB
    driver = found["device_driver_peak_bytes"] - (found["device_reserved_bytes"] or 0)
    found["told"] = f"{found['kernel']}, {found['schedule']} {found['chunks']}"
    print(
        f"{line} {found['told']}, device {found['device_peak_bytes'] / MIB:.0f}, by the driver {driver / MIB:.0f} of "
        f"{budget / MIB:.0f} MiB, reserved {(found['device_reserved_bytes'] or 0) / MIB:.0f} ({told:.0f} told), "
        f"host {found['host_peak_bytes'] / MIB:.0f} of {found['host_projected_bytes'] / MIB:.0f}, "
        f"read {found['bytes_read'] / 1e9:.2f} GB",
        flush=True,
    )
    return found


def settings(row: dict[str, Any]) -> dict[str, Any]:
    """Return the run options of a row."""
    data = 4 * row["tokens"] * HEADS * row["dim"] * 2
    host = "64GiB" if row["host"] == "ample" else int(float(row["host"]) * data)
    return {"device_memory": int(row["share"] * data), "host_memory": host, "schedule": row.get("schedule", "auto")}


HEADER = (
    f"{'tokens':>8} {'d':>4} {'share':>6} {'host':>6} {'cache':>6} {'in core':>8} {'call':>7}  ratio "
    f"{'session':>7}  ratio {'predicted':>9}   busy  first  plan"
)


def in_core_of(tokens: int, dim: int, repeats: int, report: dict[str, Any]) -> float:
    """Return the seconds of the fastest kernel in core, and print those of all."""
    found = in_core(tokens, dim, repeats)
    report.setdefault("in core", {})[f"{tokens} x {dim}"] = found
    rates = (f"{name} {s:.3f} s, {operations(tokens, dim) / s / 1e12:.0f} TFLOP/s" for name, s in found.items())
    print(f"{tokens:>8} {dim:>4} in core: {'; '.join(rates)}", flush=True)
    return min(found.values())


def runs(folder: Path, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """The table of budgets."""
    print(f"\n{HEADER}")
    for tokens, dim in product(options.tokens, options.dims):
        paths = write_inputs(folder / "d", tokens, dim)
        long = tokens > 1 << 20
        best = in_core_of(tokens, dim, 1 if long else options.repeats, report)
        for share, host, cache in product(options.shares, options.hosts, options.caches):
            if host != "ample" and cache == "cold" and "cached" in options.caches:
                continue
            row = {
                "tokens": tokens, "dim": dim, "share": share, "host": host, "cache": cache,
                "schedule": options.schedule, "repeats": 1 if long else options.repeats, "in_core_s": best,
            }  # fmt: skip
            report["runs"].append(measured(paths, folder / "out", row, report.get("limits", {})))
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
            "tokens": tokens, "dim": 64, "share": 0.25, "host": "ample", "cache": "cached", "repeats": 1 if long else 3,
            "in_core_s": float("nan") if long else in_core_of(tokens, 64, 1, report),
        }  # fmt: skip
        found = measured(paths, folder / "out", row, {})
        report["lengths"].append({"tokens": tokens, "s_per_square": found["call_s"] / tokens**2})
        print(f"{tokens:>8}  {found['call_s'] / tokens**2 * 1e12:.4f} s per 10^12 pairs of tokens")
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
