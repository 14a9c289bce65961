"""A billion by a billion: what a whole run would take, and why the plan can be believed.

    python examples/billion/full.py FOLDER LOG [--tokens 1e9] [--head-dim 64] [--device cpu] [--from 2^14] [--to 2^18]
        [--workers 1,8,64]

Smaller runs are timed, of random queries, keys and values in FOLDER; a line through them is drawn on to all tokens, and
set beside the plan.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from steps import Log, amount

SECONDS_A_DAY = 86_400


def fit(tokens: list[int], seconds: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return ``(a, c, b)`` of ``a + c N + b N^2``, none negative, with the least relative residuals; and these."""
    n, t = np.array(tokens, float), np.array(seconds)
    found = np.zeros(3)
    kept = [0, 1, 2]
    while True:
        terms = np.stack([n**power for power in kept], 1) / t[:, None]
        scale = terms.max(0)
        some = np.linalg.lstsq(terms / scale, np.ones_like(t), rcond=None)[0] / scale
        if (some >= 0).all():
            break
        kept.remove(kept[int(np.argmin(some * scale))])
    found[kept] = some
    return found, found @ np.stack([np.ones_like(n), n, n**2]) / t - 1


def drawn_on(tokens: list[int], seconds: list[float], to: int) -> tuple[float, float, float]:
    """Return the seconds of ``to`` tokens by the fit of all runs; the least and most by it and those that lack one."""
    others = [fit(tokens[:i] + tokens[i + 1 :], seconds[:i] + seconds[i + 1 :])[0] for i in range(len(tokens))]
    powers = np.array([1.0, to, float(to) ** 2])
    whole = float(fit(tokens, seconds)[0] @ powers)
    every = [whole, *(float(found @ powers) for found in others)]
    return whole, min(every), max(every)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--tokens", type=amount, default=10**9)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--host-memory", default="4GiB")
    parser.add_argument("--from", dest="first", type=amount, default=2**14)
    parser.add_argument("--to", type=amount, default=2**18)
    parser.add_argument("--workers", default="1,8,64")
    parser.add_argument("--unmeasured", action="store_true", help="leave out cqsa bench")
    parser.add_argument("--times", type=int, default=2, help="how often each run is timed; the fastest counts")
    given = parser.parse_args()
    log = Log(given.log)
    how = ["--causal", "--device", given.device, "--host-memory", given.host_memory]
    shape = ["--shape", f"1,1,{given.tokens},{given.head_dim}", "--dtype", given.dtype]

    if not given.unmeasured:
        log.cqsa("bench", "--device", given.device, quiet=True)
    for workers in given.workers.split(","):
        some = ["--workers", workers] if workers != "1" else []
        log.cqsa("plan", *shape, *how, *some, codes=(0, 4))  # many workers may not fit one machine

    numbers = [given.first << step for step in range((given.to // given.first).bit_length())]
    measured, planned = zip(*(timed(log, given, tokens, how) for tokens in numbers), strict=True)
    (a, c, b), residuals = fit(numbers, [*measured])
    days, least, most = (seconds / SECONDS_A_DAY for seconds in drawn_on(numbers, [*measured], given.tokens))
    plan, _ = log.json("plan", *shape, *how)
    log.figure(fit=f"{a:.3g} s + {c:.3g} s N + {b:.4g} s N^2", residuals=[round(float(r), 3) for r in residuals])
    over = [round(m / p, 3) for m, p in zip(measured, planned, strict=True)]
    log.figure(measured_over_planned=over)
    log.figure(days_drawn_on=days, days_least=least, days_most=most, days_planned=plan["seconds"] / SECONDS_A_DAY)
    log.figure(over_planned=days * SECONDS_A_DAY / plan["seconds"])


def timed(log: Log, given: argparse.Namespace, tokens: int, how: list[object]) -> tuple[float, float]:
    """Return the seconds of the fastest of some runs of so many tokens, and what was planned."""
    data, out = given.folder / str(tokens), given.folder / "out.zarr"
    about = ["--tokens", tokens, "--heads", 1, "--head-dim", given.head_dim, "--dtype", given.dtype]
    log.cqsa("generate", data, *about)
    arrays = [data / "q.zarr", data / "k.zarr", data / "v.zarr", out]
    plan, _ = log.json("plan", *arrays, *how)
    took = []
    for _ in range(given.times):
        log.cqsa("run", *arrays, *how, "--fresh")
        took.append(log.json("status", out)[0]["session_s"])
    log.figure(**{f"seconds_{tokens}": took, f"planned_{tokens}": plan["seconds"]})
    shutil.rmtree(data)
    return min(took), plan["seconds"]


if __name__ == "__main__":
    main()
