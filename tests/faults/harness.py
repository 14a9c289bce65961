"""Driving the real command line in processes of its own, and breaking it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cqsa_stream import open_run
from tests.conftest import COMMAND, environment
from tests.holding import HELD, HOLDING, wait_for

QKV = ("d/q.zarr", "d/k.zarr", "d/v.zarr")
SCHEDULES = ("cqs", "rectangular")
INTERVAL_S = 0.1
LEFTOVERS = ("*.tmp", "*.__lock", "*.new", "*.damaged")


@dataclass(frozen=True)
class Cqsa:
    """The command line in a folder; ``library`` makes system calls fail (faulty.c)."""

    folder: Path
    library: Path
    started: "list[subprocess.Popen[str]]" = field(default_factory=list)

    def __enter__(self) -> "Cqsa":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave no process behind: one that is held would go on for long."""
        for process in self.started:
            if process.poll() is None:
                kill(process)

    def start(self, *words: object, faults: str = "", **variables: object) -> "subprocess.Popen[str]":
        """Start a command; ``faults`` as faulty.c reads them, ``variables`` of its environment."""
        return self._start([*COMMAND, *map(str, words)], {"FAULTS": faults, **variables})

    def _start(self, command: list[str], variables: dict[str, object]) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={**environment(), "LD_PRELOAD": str(self.library), **{k: str(v) for k, v in variables.items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def start_holding(self, how: Sequence[str], *options: object, at: int = 0) -> "subprocess.Popen[str]":
        """Start to compute out of the inputs in ./d by one of the commands of holding.py."""
        (self.folder / HELD).unlink(missing_ok=True)
        return self._start([*how, "run", *QKV, "out", *map(str, options), "--quiet"], {"HOLD_AT": at})

    def held(self, *options: object, at: int = 0) -> "subprocess.Popen[str]":
        """Return the process of a run that is held at a safe point now, the first being number 0."""
        process = self.start_holding(HOLDING, *options, at=at)
        assert wait_for(self.folder / HELD, process), process.communicate()
        return process

    def let_run(self, process: "subprocess.Popen[str]", seconds: float) -> None:
        """Wait for so long, or until the process is held, or has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and process.poll() is None and not (self.folder / HELD).exists():
            time.sleep(0.002)

    def __call__(self, *words: object, faults: str = "", **variables: object) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end."""
        process = self.start(*words, faults=faults, **variables)
        out, err = process.communicate(timeout=600)
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


def kill(process: "subprocess.Popen[str]") -> float:
    """Kill a process without a warning; return when."""
    moment = time.time()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return moment


def is_root() -> bool:
    return os.geteuid() == 0
