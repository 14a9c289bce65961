"""A million packed documents of a billion tokens: planned in seconds, and a tenth of them run.

    python examples/billion/documents.py FOLDER LOG [--tokens 1e9] [--documents 1e6] [--run 1e8] [--head-dim 16]
        [--host-memory 1GiB] [--device cpu] [--processes 2] [--rows 64]

Lengths are log-normal, as those of web pages are: most are short, a few are a hundred times as long as the median. A
token sees those of its own document up to itself.
"""

import argparse
from pathlib import Path

import numpy as np
from genome import stored_bytes, write
from steps import KILLED, Log, amount


def lengths(tokens: int, documents: int, seed: int = 0) -> np.ndarray:
    """Return log-normal lengths of at least 1 that add up to ``tokens``."""
    found = np.random.default_rng(seed).lognormal(0.0, 1.2, documents)
    ends = np.round(np.cumsum(found) / found.sum() * (tokens - documents)).astype(np.int64)
    return np.diff(ends, prepend=0) + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--tokens", type=amount, default=10**9)
    parser.add_argument("--documents", type=amount, default=10**6)
    parser.add_argument("--run", type=amount, default=10**8, help="how many tokens to run, at least")
    parser.add_argument("--head-dim", type=int, default=16)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--host-memory", default="1GiB")
    parser.add_argument("--checkpoint-every", default="60")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=64, help="how many rows to verify in float64")
    given = parser.parse_args()
    log, folder = Log(given.log), given.folder
    folder.mkdir(parents=True, exist_ok=True)

    found = lengths(given.tokens, given.documents)
    begins = np.concatenate([[0], np.cumsum(found)])
    assert begins[-1] == given.tokens
    np.save(folder / "documents.npy", begins)
    log.figure(documents=len(found), median=int(np.median(found)), longest=int(found.max()))
    how = ["--causal", "--device", given.device, "--host-memory", given.host_memory]
    shape = ["--shape", f"1,1,{given.tokens},{given.head_dim}", "--dtype", given.dtype]
    planned = log.cqsa("plan", *shape, "--documents", folder / "documents.npy", *how)
    log.figure(planning_s=planned.seconds)

    some = begins[: int(np.searchsorted(begins, given.run)) + 1]
    np.save(folder / "some.npy", some)
    tokens = int(some[-1])
    log.say(f"$ genome: {tokens:,} queries, keys and values, {given.head_dim} {given.dtype}")
    seconds = write(folder, tokens, None, given.head_dim, given.dtype, given.processes)
    stored = sum(stored_bytes(folder / f"{name}.zarr") for name in "qkv")
    log.figure(generating_s=seconds, tokens=tokens, documents_run=len(some) - 1, stored_bytes=stored)

    out = folder / "out.zarr"
    run = ["run", *(folder / f"{name}.zarr" for name in "qkv"), out, "--documents", folder / "some.npy", *how]
    often = ["--checkpoint-every", given.checkpoint_every]
    first = log.cqsa(*run, *often, kill_at=0.5, codes=(KILLED,))
    last = log.cqsa(*run, *often)
    state, ran = log.json("status", out)
    log.figure(
        killed_s=first.seconds,
        last_session_s=last.seconds,
        running_s=state["elapsed_s"],
        flops=state["flops_done"],
        tokens_per_s=tokens / state["elapsed_s"],
        host_peak_bytes=state["host_peak_bytes"],
        resident_peak_bytes=last.peak_bytes,
        status_s=ran.seconds,
    )
    checked, ran = log.json("verify", out, "--rows", given.rows)
    told = {name: checked[name] for name in ("rows", "max_relative_error", "tolerance", "ok")}
    log.figure(verifying_s=ran.seconds, **told)
    log.keep(Path(f"{out}.run/events.jsonl"))
    log.keep_report(out)
    log.say("a tenth of the documents is computed: killed, resumed, verified")


if __name__ == "__main__":
    main()
