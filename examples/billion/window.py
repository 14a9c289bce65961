"""The whole sequence through a sliding window: every row of it computed, in a small memory, with a kill and a resume.

    python examples/billion/window.py FOLDER LOG [--tokens 2^30] [--window 512] [--head-dim 16] [--host-memory 1GiB]
        [--device cpu] [--processes 2] [--rows 64]

Q, K and V are genome-like (``genome.py``), in Zarr compressed with zstd. Before the run, disk, decompression and kernel
are measured each alone; the run should take little longer than the slowest of them.
"""

import argparse
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from genome import BLOCK, stored_bytes, write
from steps import KILLED, Log, amount

import cqsa_stream as cqsa
from cqsa_stream.events import Event, Figures
from cqsa_stream.storage.open import open_array
from cqsa_stream.storage.output import create_array, write_chunk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--tokens", type=amount, default=2**30)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--head-dim", type=int, default=16)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--host-memory", default="1GiB")
    parser.add_argument("--checkpoint-every", default="60")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=64, help="how many rows to verify in float64")
    parser.add_argument("--alone-tokens", type=amount, default=2**22, help="how many to measure each part alone with")
    given = parser.parse_args()
    log, folder, tokens = Log(given.log), given.folder, given.tokens

    log.say(f"$ genome: {tokens:,} queries, keys and values, {given.head_dim} {given.dtype}")
    seconds = write(folder, tokens, None, given.head_dim, given.dtype, given.processes)
    stored = sum(stored_bytes(folder / f"{name}.zarr") for name in "qkv")
    log.figure(generating_s=seconds, plain_bytes=tokens * 3 * given.head_dim * 2, stored_bytes=stored)

    some = min(tokens, given.alone_tokens)
    alone = {
        "kernel": kernel_alone(folder, some, given.window, given.device) * tokens / some,
        "decompression": decompression_alone(folder, some) * tokens / some,
        "disk": disk_alone(folder, some, given.head_dim, given.dtype, given.processes) * tokens / some,
    }
    log.figure(**{f"{name}_alone_s": took for name, took in alone.items()})

    out = folder / "out.zarr"
    arrays = [folder / f"{name}.zarr" for name in "qkv"] + [out]
    how = ["--window", given.window, "--device", given.device, "--host-memory", given.host_memory]
    log.cqsa("plan", *arrays, *how)
    often = ["--checkpoint-every", given.checkpoint_every]
    first = log.cqsa("run", *arrays, *how, *often, kill_at=0.3, codes=(KILLED,))
    found, ran = log.json("status", out)
    log.figure(killed_s=first.seconds, rows_kept=found["rows_done"], rows=found["rows_total"], status_s=ran.seconds)
    last = log.cqsa("run", *arrays, *how, *often)
    found, ran = log.json("status", out)
    log.figure(
        last_session_s=last.seconds,
        running_s=found["elapsed_s"],
        of_the_slowest=max(alone.values()) / found["elapsed_s"],
        tokens_per_s=tokens / found["elapsed_s"],
        bytes_read=found["bytes_read"],
        bytes_written=found["bytes_written"],
        host_peak_bytes=found["host_peak_bytes"],
        resident_peak_bytes=last.peak_bytes,
        status_s=ran.seconds,
    )
    checked, ran = log.json("verify", out, "--rows", given.rows)
    told = {name: checked[name] for name in ("rows", "max_relative_error", "tolerance", "ok")}
    log.figure(verifying_s=ran.seconds, **told)
    log.keep(Path(f"{out}.run/events.jsonl"))
    log.keep_report(out)
    log.say("every row is computed: killed, resumed, verified")


def kernel_alone(folder: Path, tokens: int, window: int, device: str) -> float:
    """Return the seconds in which kernels compute these rows, of arrays in memory; the second time, when all is warm."""
    arrays = []
    for name in "qkv":
        array = open_array(str(folder / f"{name}.zarr"))
        found = np.empty((1, tokens, array.shape[3]), array.dtype)
        array.read_into(0, range(1), range(tokens), found)
        arrays.append(torch.from_numpy(found)[None])
    seen: list[Figures] = []

    def note(event: Event) -> None:
        seen.append(event.figures)

    for _ in range(2):
        cqsa.attention(*arrays, window=window, device=device, observers=[note])
    return seen[-1].kernel_s


def decompression_alone(folder: Path, tokens: int) -> float:
    """Return the seconds in which all cores read and decompress these rows of Q, K and V."""
    arrays = [open_array(str(folder / f"{name}.zarr")) for name in "qkv"]

    def read(start: int) -> None:
        rows = range(start, min(tokens, start + BLOCK))
        for array in arrays:
            array.read_into(0, range(1), rows, np.empty((1, len(rows), array.shape[3]), array.dtype))

    begin = time.perf_counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(read, range(0, tokens, BLOCK)))
    return time.perf_counter() - begin


def disk_alone(folder: Path, tokens: int, head_dim: int, dtype: str, threads: int) -> float:
    """Return the seconds in which these rows of the output are written durably, and those of the inputs read."""
    scratch = folder / "scratch.zarr"
    array = create_array(scratch, (1, 1, tokens, head_dim), dtype, (1, 1, BLOCK, head_dim))
    values = np.ones((1, 1, BLOCK, head_dim), dtype)

    def read(file: Path) -> None:
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        while os.read(handle, 1 << 22):
            pass
        os.close(handle)

    files = [folder / f"{name}.zarr/c/0/0/{chunk}/0" for chunk in range(-(-tokens // BLOCK)) for name in "qkv"]
    with ThreadPoolExecutor(threads) as pool:
        begin = time.perf_counter()
        list(pool.map(lambda chunk: write_chunk(array, (0, 0, chunk, 0), values), range(-(-tokens // BLOCK))))
        list(pool.map(read, files))
        took = time.perf_counter() - begin
    shutil.rmtree(scratch)
    return took


if __name__ == "__main__":
    main()
