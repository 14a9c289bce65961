"""The whole sequence through a sliding window: every row of it computed, in a small memory, with a kill and a resume.

    python examples/billion/window.py FOLDER LOG [--tokens 2^30] [--window 512] [--head-dim 16] [--host-memory 1GiB]
        [--device cpu] [--processes 2] [--rows 64]

Q, K and V are genome-like (``genome.py``), in Zarr compressed with zstd. Before the run, disk, decompression and kernel
are measured each alone; the run should take little longer than the slowest of them.
"""

import argparse
import multiprocessing
from pathlib import Path

from genome import stored_bytes, write
from steps import KILLED, Log, amount


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
    found = measured_alone(folder, some, given.window, given.device, given.processes)
    alone = {f"{name}_alone_s": took * tokens / some for name, took in found.items()}
    log.figure(**alone)

    out = folder / "out.zarr"
    arrays = [folder / f"{name}.zarr" for name in "qkv"] + [out]
    how = ["--window", given.window, "--device", given.device, "--host-memory", given.host_memory]
    log.cqsa("plan", *arrays, *how)
    often = ["--checkpoint-every", given.checkpoint_every]
    first = log.cqsa("run", *arrays, *how, *often, kill_at=0.3, codes=(KILLED,))
    found, ran = log.json("status", out)
    log.figure(
        killed_s=first.seconds, row_chunks_kept=found["rows_done"], row_chunks=found["rows_total"], status_s=ran.seconds
    )
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


def measured_alone(folder: Path, tokens: int, window: int, device: str, threads: int) -> dict[str, float]:
    """Return the seconds of each part alone for so many tokens, measured in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_alone, (folder, tokens, window, device, threads))


def _alone(folder: Path, tokens: int, window: int, device: str, threads: int) -> dict[str, float]:
    import alone  # heavy, and what the process that watches holds would count as its children's

    return {
        "kernel": alone.kernel_s(folder, tokens, window, device),
        "decompression": alone.decompression_s(folder, tokens),
        "disk": alone.disk_s(folder, tokens, threads),
    }


if __name__ == "__main__":
    main()
