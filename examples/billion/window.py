"""The whole sequence through a sliding window: every row of it computed, in a small memory, with a kill and a resume.

    python examples/billion/window.py FOLDER LOG [--tokens 2^30] [--window 512] [--head-dim 16] [--host-memory 1GiB]
        [--device cpu] [--processes 2] [--rows 64]

Q, K and V are genome-like (``genome.py``), in Zarr compressed with zstd. Before the run, disk, decompression and kernel
are measured each alone; the run should take little longer than the slowest of them.
"""

import multiprocessing
from pathlib import Path

from steps import KILLED, Log, amount
from story import ended, generated, options, verified


def main() -> None:
    parser = options(__doc__, tokens=2**30, head_dim=16, host_memory="1GiB", rows=64)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--alone-tokens", type=amount, default=2**22, help="how many to measure each part alone with")
    given = parser.parse_args()
    log, tokens = Log(given.log), given.tokens
    arrays = generated(log, given, tokens)
    out = arrays[-1]

    some = min(tokens, given.alone_tokens)
    parts = measured_alone(given.folder, some, given.window, given.device, given.processes)
    alone = {f"{name}_alone_s": took * tokens / some for name, took in parts.items()}
    log.figure(**alone)

    how = ["--window", given.window, "--device", given.device, "--host-memory", given.host_memory]
    log.cqsa("plan", *arrays, *how)
    run = ["run", *arrays, *how, "--checkpoint-every", given.checkpoint_every]
    killed = log.cqsa(*run, kill_at=0.3, codes=(KILLED,))
    found, _ = log.json("status", out)
    log.figure(killed_s=killed.seconds, row_chunks_kept=found["rows_done"], row_chunks=found["rows_total"])
    found = ended(log, out, log.cqsa(*run), ("bytes_read", "bytes_written"))
    log.figure(of_the_slowest=max(alone.values()) / found["elapsed_s"], tokens_per_s=tokens / found["elapsed_s"])
    verified(log, out, given.rows)
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
