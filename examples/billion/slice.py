"""The last queries of a sequence attend to all of it: exact, in a small memory, killed twice, resumed, verified.

    python examples/billion/slice.py FOLDER LOG [--tokens 2^30] [--queries 1024] [--head-dim 32] [--host-memory 2GiB]
        [--device cpu] [--processes 2] [--rows 4]

K and V are genome-like (``genome.py``), in Zarr compressed with zstd; FOLDER takes them and the output, LOG the small
files that tell what happened.
"""

import argparse
from pathlib import Path

from genome import stored_bytes, write
from steps import KILLED, Log, amount


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--tokens", type=amount, default=2**30)
    parser.add_argument("--queries", type=amount, default=1024)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--host-memory", default="2GiB")
    parser.add_argument("--checkpoint-every", default="60")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4, help="how many rows to verify in float64")
    parser.add_argument("--kills", type=int, default=2)
    given = parser.parse_args()
    log, folder, tokens = Log(given.log), given.folder, given.tokens

    log.say(f"$ genome: {tokens:,} keys and values, the last {given.queries:,} queries, {given.head_dim} {given.dtype}")
    seconds = write(folder, tokens, given.queries, given.head_dim, given.dtype, given.processes)
    stored = sum(stored_bytes(folder / f"{name}.zarr") for name in "qkv")
    log.figure(generating_s=seconds, plain_bytes=tokens * 2 * given.head_dim * 2, stored_bytes=stored)

    out = folder / "out.zarr"
    arrays = [folder / f"{name}.zarr" for name in "qkv"] + [out]
    how = [
        "--causal",
        "--q-start",
        tokens - given.queries,
        "--device",
        given.device,
        "--host-memory",
        given.host_memory,
    ]
    log.cqsa("plan", *arrays, *how)
    often = ["--checkpoint-every", given.checkpoint_every]
    for kill in range(given.kills):
        part = (kill + 1) / (given.kills + 1)
        killed = log.cqsa("run", *arrays, *how, *often, kill_at=part, codes=(KILLED,))
        found, ran = log.json("status", out)
        log.figure(**{f"killed_{kill + 1}_s": killed.seconds, f"pairs_kept_{kill + 1}": found["pairs_done"]})
    last = log.cqsa("run", *arrays, *how, *often)
    found, ran = log.json("status", out)
    log.figure(
        last_session_s=last.seconds,
        running_s=found["elapsed_s"],
        pairs=found["pairs_total"],
        flops=found["flops_done"],
        flops_per_s=found["flops_done"] / found["elapsed_s"],
        bytes_read=found["bytes_read"],
        host_peak_bytes=found["host_peak_bytes"],
        resident_peak_bytes=last.peak_bytes,
        status_s=ran.seconds,
    )
    checked, ran = log.json("verify", out, "--rows", given.rows)
    log.figure(
        verifying_s=ran.seconds, **{name: checked[name] for name in ("rows", "max_relative_error", "tolerance", "ok")}
    )
    log.keep(Path(f"{out}.run/events.jsonl"))
    log.keep_report(out)
    log.say("the whole slice is exact: killed, resumed, verified")


if __name__ == "__main__":
    main()
