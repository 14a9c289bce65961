"""A million packed documents of a billion tokens: planned in seconds, and a tenth of them run.

    python examples/billion/documents.py FOLDER LOG [--tokens 1e9] [--documents 1e6] [--run 1e8] [--head-dim 16]
        [--host-memory 1GiB] [--device cpu] [--processes 2] [--rows 64]

Lengths are log-normal, as those of web pages are: most are short, a few are a hundred times as long as the median. A
token sees those of its own document up to itself.
"""

import numpy as np
from steps import KILLED, Log, amount
from story import ended, generated, options, verified


def lengths(tokens: int, documents: int, seed: int = 0) -> np.ndarray:
    """Return log-normal lengths of at least 1 that add up to ``tokens``."""
    found = np.random.default_rng(seed).lognormal(0.0, 1.2, documents)
    ends = np.round(np.cumsum(found) / found.sum() * (tokens - documents)).astype(np.int64)
    return np.diff(ends, prepend=0) + 1


def main() -> None:
    parser = options(__doc__, tokens=10**9, head_dim=16, host_memory="1GiB", rows=64)
    parser.add_argument("--documents", type=amount, default=10**6)
    parser.add_argument("--run", type=amount, default=10**8, help="how many tokens to run, at least")
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
    log.figure(tokens=tokens, documents_run=len(some) - 1)
    arrays = generated(log, given, tokens)
    out = arrays[-1]
    run = ["run", *arrays, "--documents", folder / "some.npy", *how, "--checkpoint-every", given.checkpoint_every]
    killed = log.cqsa(*run, kill_at=0.5, codes=(KILLED,))
    log.figure(killed_s=killed.seconds)
    state = ended(log, out, log.cqsa(*run), ("flops_done",))
    log.figure(tokens_per_s=tokens / state["elapsed_s"])
    verified(log, out, given.rows)
    log.say("a tenth of the documents is computed: killed, resumed, verified")


if __name__ == "__main__":
    main()
