"""The whole story in a minute: inputs on disk, a budget they do not fit in, a kill in the middle, an exact result.

Run it with ``make demo``. It drives the command line as a user would, in processes of their own, inside ./demo.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path("demo")
CQSA = [sys.executable, "-m", "cqsa_stream"]
SHAPE = ["--tokens", "65536", "--heads", "4", "--head-dim", "64", "--dtype", "bfloat16"]
RUN = [
    *(f"{FOLDER}/{name}.zarr" for name in ("q", "k", "v", "out")),
    "--causal",
    "--device",
    "cpu",
    "--host-memory",
    "48MiB",
    "--checkpoint-every",
    "2",
]
OUT = f"{FOLDER}/out.zarr"


def say(*words: str) -> list[str]:
    print("\n$ cqsa", *words, flush=True)
    return [*CQSA, *words]


def status() -> dict[str, Any]:
    found = subprocess.run([*CQSA, "status", OUT, "--json"], capture_output=True, text=True, check=True)
    report: dict[str, Any] = json.loads(found.stdout)
    return report


def figures() -> dict[str, Any]:
    """The run's latest figures, read from its directory while it works."""
    try:
        found: dict[str, Any] = json.loads(Path(f"{OUT}.run", "session.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def kill_half_way() -> None:
    """Start the run and end it, without a warning, once half of its pairs are computed."""
    process = subprocess.Popen(say("run", *RUN))
    while process.poll() is None:
        seen = figures()
        if "pairs_total" in seen and 2 * seen["pairs_done"] >= seen["pairs_total"]:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.05)
    code = process.wait()
    if code != -signal.SIGKILL:
        sys.exit(f"the run ended by itself (exit code {code}) before it could be killed")
    done = status()
    print(f"\n-- killed (SIGKILL); on disk: {done['pairs_done']} of {done['pairs_total']} pairs --")


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    subprocess.run(say("generate", str(FOLDER), *SHAPE), check=True)
    subprocess.run(say("plan", *RUN), check=True)
    kill_half_way()
    subprocess.run(say("run", *RUN), check=True)
    subprocess.run(say("verify", OUT), check=True)
    subprocess.run(say("status", OUT), check=True)
    if not status()["complete"]:
        sys.exit("the run is not complete")


if __name__ == "__main__":
    main()
