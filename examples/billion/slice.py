"""The last queries of a sequence attend to all of it: exact, in a small memory, killed twice, resumed, verified.

    python examples/billion/slice.py FOLDER LOG [--tokens 2^30] [--queries 1024] [--head-dim 32] [--host-memory 2GiB]
        [--device cpu] [--processes 2] [--rows 4]

K and V are genome-like (``genome.py``), in Zarr compressed with zstd; FOLDER takes them and the output, LOG the small
files that tell what happened.
"""

from steps import KILLED, Log, amount
from story import ended, generated, options, verified


def main() -> None:
    parser = options(__doc__, tokens=2**30, head_dim=32, host_memory="2GiB", rows=4)
    parser.add_argument("--queries", type=amount, default=1024)
    parser.add_argument("--kills", type=int, default=2)
    given = parser.parse_args()
    log, first = Log(given.log), given.tokens - given.queries
    arrays = generated(log, given, given.tokens, given.queries)
    out = arrays[-1]

    how = ["--causal", "--q-start", first, "--device", given.device, "--host-memory", given.host_memory]
    log.cqsa("plan", *arrays, *how)
    run = ["run", *arrays, *how, "--checkpoint-every", given.checkpoint_every]
    for kill in range(1, given.kills + 1):
        killed = log.cqsa(*run, kill_at=kill / (given.kills + 1), codes=(KILLED,))
        found, _ = log.json("status", out)
        log.figure(**{f"killed_{kill}_s": killed.seconds, f"pairs_kept_{kill}": found["pairs_done"]})
    found = ended(log, out, log.cqsa(*run), ("pairs_total", "flops_done", "bytes_read"))
    log.figure(flops_per_s=found["flops_done"] / found["elapsed_s"])
    verified(log, out, given.rows)
    log.say("the whole slice is exact: killed, resumed, verified")


if __name__ == "__main__":
    main()
