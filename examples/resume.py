"""A run that is killed goes on where its last checkpoint was; its bits are those of a run that was never killed.

python examples/resume.py [--tokens 40000]
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import cqsa_stream as cqsa
from cqsa_stream.generate import generate

CQSA = [sys.executable, "-m", "cqsa_stream"]
HOW = ["--causal", "--device", "cpu", "--host-memory", "48MiB", "--checkpoint-every", "1", "--quiet"]


def killed_half_way(command: list[str], run_dir: Path) -> bool:
    """Start a run and kill it (SIGKILL: it can do nothing about it) once half of its pairs are computed."""
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            seen = json.loads((run_dir / "session.json").read_text())
        except (OSError, ValueError):
            seen = {}
        if 2 * seen.get("pairs_done", 0) >= seen.get("pairs_total", 1):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    return process.wait() == -signal.SIGKILL


def main(tokens: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = list(map(str, generate(folder, tokens=tokens, heads=4, head_dim=64)))
        once, twice = folder / "once.zarr", folder / "twice.zarr"
        subprocess.run([*CQSA, "run", *inputs, str(once), *HOW], check=True)

        command = [*CQSA, "run", *inputs, str(twice), *HOW]
        print("killed half way:", killed_half_way(command, folder / "twice.zarr.run"))
        before = cqsa.open_run(twice).status()
        print(f"on disk: {before['pairs_done']} of {before['pairs_total']} pairs")
        subprocess.run(command, check=True)  # the same command again

        a, b = (cqsa.open_result(path).numpy().view(np.uint16) for path in (once, twice))
        print("the same bits as without the kill:", bool((a == b).all()))
        if not (a == b).all():
            sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=40_000)
    main(parser.parse_args().tokens)
