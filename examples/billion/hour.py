"""An hour of the whole run on a directory of a billion tokens: status, a kill, a resume, a report, and what grows.

    python examples/billion/hour.py FOLDER LOG [--seconds 3600] [--host-memory 2GiB] [--device cpu]

FOLDER holds q.zarr, k.zarr and v.zarr of ``genome.py``. The run is causal, of all queries to all keys; it is killed
half way through the time and resumed.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from steps import CQSA, Log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--host-memory", default="2GiB")
    parser.add_argument("--checkpoint-every", default="60")
    given = parser.parse_args()
    log, out = Log(given.log), given.folder / "all.zarr"
    run_dir = Path(f"{out}.run")
    arrays = [given.folder / f"{name}.zarr" for name in "qkv"] + [out]
    how = ["--causal", "--device", given.device, "--host-memory", given.host_memory]
    log.cqsa("plan", *arrays, *how)
    words = ["run", *arrays, *how, "--checkpoint-every", given.checkpoint_every]
    first = half_an_hour(log, words, given, then="kill")
    statuses = first + half_an_hour(log, words, given, then="terminate")
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    commits = [event["seconds"] for event in events if event["event"] == "checkpointed"]
    half = len(commits) // 2
    found, _ = log.json("status", out)
    log.figure(
        commits=len(commits),
        commit_s_first_half=median(commits[:half] or [0.0]),
        commit_s_second_half=median(commits[half:] or [0.0]),
        status_median_s=median(statuses or [0.0]),
        status_most_s=max(statuses, default=0.0),
        elapsed_s=found["elapsed_s"],
        flops_done=found["flops_done"],
        flops_per_s=found["flops_done"] / found["elapsed_s"],
        years_left=(found["eta_s"] or 0.0) / 86_400 / 365,
        host_peak_bytes=found["host_peak_bytes"],
    )
    log.keep(run_dir / "events.jsonl")
    log.keep_report(out)


def half_an_hour(log: Log, words: Sequence[object], given: argparse.Namespace, then: str) -> list[float]:
    """Run a command for half of the time, or to its end, and look at it each minute; return what each look took."""
    log.say(f"$ cqsa {' '.join(map(str, words))}   # then: {then}")
    begin, looks = time.monotonic(), list[float]()
    with (given.log / "log.txt").open("ab") as said:
        process = subprocess.Popen([*CQSA, *map(str, words)], stderr=said)
    while time.monotonic() - begin < given.seconds / 2 and process.poll() is None:
        time.sleep(min(60.0, given.seconds / 20))
        looks += look(log, Path(str(words[4])))
    if process.poll() is None:
        getattr(process, then)()
    elif process.returncode:
        raise SystemExit(f"the run ended with exit code {process.returncode}")
    log.say(f"   exit code {process.wait()}")
    return looks


def look(log: Log, out: Path) -> list[float]:
    """Say where the run stands and how long its partials are; return the seconds of the status, of a run that began."""
    run_dir = Path(f"{out}.run")
    if not run_dir.exists():
        return []
    found, ran = log.json("status", out)
    log.figure(pairs_done=found["pairs_done"], pairs_total=found["pairs_total"], status_s=ran.seconds)
    partials = [file.stat().st_size for file in (run_dir / "partials").glob("*.partial")]
    log.figure(partials=len(partials), largest_partial_bytes=max(partials, default=0))
    return [ran.seconds]


if __name__ == "__main__":
    main()
