"""Killing runs at random moments: 20 runs, each killed (SIGKILL) until it is done, compared bit for bit.

    python benchmarks/kill_resume.py [--runs 20] [--tokens 16384] [--every 1.0]

A run is killed again and again, at moments drawn evenly over a session's expected length, and begun again by the same
command until it ends by itself. ``lost`` is the longest time between a kill and the last moment at which what had been
computed was on disk (the start of the session's computing, or the end of a checkpoint).
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tensorstore as ts

from cqsa_stream.generate import generate

CQSA = [sys.executable, "-c", "from cqsa_stream.cli import main; main()"]


def content(path: Path) -> bytes:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    found: bytes = ts.open(spec).result().read().result().tobytes()
    return found


def last_durable_moment(run: Path) -> float | None:
    """When the last session's work was last on disk: its checkpoint's, or its start's, time."""
    try:
        lines = (run / "events.jsonl").read_text().splitlines()
    except OSError:
        return None
    return float(json.loads(lines[-1])["time"]) if lines else None


def killed_until_done(command: list[str], run: Path, session_s: float, chance: random.Random) -> tuple[int, float]:
    """Return how often the run was killed, and the most work lost in seconds."""
    kills, lost = 0, 0.0
    while True:
        started = time.time()
        process = subprocess.Popen([*command, "--quiet"])
        try:
            process.wait(timeout=2.0 + chance.random() * session_s)
        except subprocess.TimeoutExpired:
            killed = time.time()
            process.send_signal(signal.SIGKILL)
            process.wait()
            moment = last_durable_moment(run)
            if moment is not None and moment > started:  # else it was killed before it began to compute
                lost = max(lost, killed - moment)
            kills += 1
            continue
        if process.returncode != 0:
            sys.exit(f"exit code {process.returncode}")
        return kills, lost


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--every", type=float, default=1.0)
    options = parser.parse_args()
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        paths = generate(root, tokens=options.tokens, heads=4, head_dim=64, dtype="float32")
        print(f"checkpoints every {options.every} s")
        print(f"{'schedule':<12} {'run':>3} {'kills':>5} {'lost s':>7}  bit-identical")
        failed = 0
        for schedule in ("cqs", "rectangular"):
            common = ["--causal", "--schedule", schedule, "--host-memory", "64MiB", "--chunks", "31", "--device", "cpu"]
            common += ["--checkpoint-every", str(options.every)]
            start = time.monotonic()
            whole = root / f"whole-{schedule}"
            subprocess.run([*CQSA, "run", *map(str, paths), str(whole), *common, "--quiet"], check=True)
            session_s = max(1.0, time.monotonic() - start - 2.0)
            expected = content(whole), content(Path(f"{whole}.run/lse.zarr"))
            for number in range(options.runs // 2):
                out = root / f"{schedule}-{number}"
                command = [*CQSA, "run", *map(str, paths), str(out), *common]
                kills, lost = killed_until_done(command, Path(f"{out}.run"), session_s, chance)
                same = (content(out), content(Path(f"{out}.run/lse.zarr"))) == expected
                failed += not same
                print(f"{schedule:<12} {number:>3} {kills:>5} {lost:7.2f}  {same}", flush=True)
    sys.exit(f"{failed} runs differ" if failed else 0)


if __name__ == "__main__":
    main()
