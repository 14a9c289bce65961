"""Driving the real command line in processes of its own, and breaking it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cqsa_stream import open_run
from tests.conftest import COMMAND, environment

QKV = ("d/q.zarr", "d/k.zarr", "d/v.zarr")
SCHEDULES = ("cqs", "rectangular")
INTERVAL_S = 0.1
LEFTOVERS = ("*.tmp", "*.__lock", "*.new", "*.damaged")


@dataclass(frozen=True)
class Cqsa:
    """The command line in a folder; ``library`` makes system calls fail (faulty.c)."""

    folder: Path
    library: Path

    def start(self, *words: object, faults: str = "", **variables: object) -> "subprocess.Popen[str]":
        """Start a command; ``faults`` as faulty.c reads them, ``variables`` of its environment."""
        added = {"FAULTS": faults, "LD_PRELOAD": str(self.library), **{k: str(v) for k, v in variables.items()}}
        return subprocess.Popen(
            [*COMMAND, *map(str, words)],
            cwd=self.folder,
            env={**environment(), **added},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: object, faults: str = "", **variables: object) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end."""
        process = self.start(*words, faults=faults, **variables)
        out, err = process.communicate(timeout=300)
        assert "Traceback" not in err, err
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def run(
        self, out: str, *options: object, faults: str = "", **variables: object
    ) -> "subprocess.CompletedProcess[str]":
        """Compute OUT of the inputs in ./d, checkpointing often."""
        return self("run", *QKV, out, *options, "--quiet", faults=faults, **variables)

    def status(self, out: str = "out") -> dict[str, Any]:
        """Return what ``cqsa status`` says, asked in this process: it is asked often."""
        return open_run(self.folder / f"{out}.run").status()

    def result(self, out: str = "out") -> tuple[bytes, bytes]:
        """Return output and lse, as zarr-python reads them."""
        arrays = (zarr.open_array(self.folder / path, mode="r") for path in (out, f"{out}.run/lse.zarr"))
        output, lse = (np.asarray(array[...]).tobytes() for array in arrays)
        return output, lse

    def leftovers(self, out: str = "out") -> list[str]:
        """Return what no finished run should leave, and partials that still hold numbers."""
        places = [self.folder / out, self.folder / f"{out}.run"]
        found = [str(p) for place in places for pattern in LEFTOVERS for p in place.rglob(pattern)]
        return found + [p.name for p in (places[1] / "partials").iterdir() if p.stat().st_size != 4096]

    def events(self, out: str = "out") -> list[dict[str, Any]]:
        """Return the lines of the event log that are whole."""
        return list(_json_lines(self.folder / f"{out}.run" / "events.jsonl"))


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def options(schedule: str, *more: object) -> tuple[object, ...]:
    """Return the options of a small run that has many steps and checkpoints."""
    budget = "26MiB" if schedule == "cqs" else "25MiB"
    fixed = ("--causal", "--device", "cpu", "--chunks", 21, "--schedule", schedule, "--host-memory", budget)
    return (*fixed, "--checkpoint-every", INTERVAL_S, *more)


def wait_for(path: Path, process: "subprocess.Popen[str]", timeout_s: float = 60) -> bool:
    """Wait until a file is there; return False where the process ends before."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, f"no {path} in {timeout_s} s"
        time.sleep(0.002)
    return True


def kill(process: "subprocess.Popen[str]") -> float:
    """Kill a process without a warning; return when."""
    moment = time.time()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return moment


def is_root() -> bool:
    return os.geteuid() == 0
