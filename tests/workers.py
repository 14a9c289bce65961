"""Workers in processes of their own, as tests start them: on hosts and by clocks that are made up."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import zarr

from tests.conftest import environment
from tests.holding import HELD, HOLDING, wait_for

__all__ = ["QKV", "Workers", "bits", "ended", "leftovers"]

QKV = ("d/q.zarr", "d/k.zarr", "d/v.zarr")
_PREAMBLE = """
import os, socket, time
import cqsa_stream.storage.claims as claims

claims.SILENT_S = float(os.environ.get("SILENT_S", "60"))
claims._BEAT_S = claims.SILENT_S / 20
name, real, jump = os.environ.get("HOST"), time.time, float(os.environ.get("CLOCK_JUMP", "0"))
if name:
    socket.gethostname = lambda: name
time.time = lambda: real() + jump
"""


def command(held: bool) -> list[str]:
    code = HOLDING[-1] if held else "from cqsa_stream.cli import main; main()"
    return [sys.executable, "-c", _PREAMBLE + code]


class Workers:
    """Starts commands in a folder; as a context manager, leaves none behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def start(self, *words: object, held_at: int | None = None, **variables: object) -> "subprocess.Popen[str]":
        """Start a command, to be held at a safe point; ``variables``: SILENT_S, HOST, CLOCK_JUMP."""
        if held_at is not None:
            (self.folder / HELD).unlink(missing_ok=True)
        env = {**environment(), "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in variables.items()}}
        process = subprocess.Popen(
            [*command(held_at is not None), *map(str, words)],
            cwd=self.folder,
            env={**env, "HOLD_AT": str(held_at or 0)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def work(self, worker: str, held_at: int | None = None, **variables: object) -> "subprocess.Popen[str]":
        """Start a worker of the run of ./out; where it is to be held, return when it is."""
        process = self.start("work", "out.run", "--worker", worker, "--quiet", held_at=held_at, **variables)
        if held_at is not None:
            assert wait_for(self.folder / HELD, process), process.communicate()
        return process


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Wait for a process; return its exit code, and what it said."""
    said = process.communicate(timeout=300)[1]
    assert "Traceback" not in said, said
    return process.returncode, said


def bits(folder: Path, out: str = "out") -> tuple[bytes, bytes]:
    """Return output and lse, as zarr-python reads them."""
    arrays = (zarr.open_array(folder / path, mode="r") for path in (out, f"{out}.run/lse.zarr"))
    output, lse = (np.asarray(array[...]).tobytes() for array in arrays)
    return output, lse


def leftovers(folder: Path, out: str = "out") -> list[str]:
    """Return what no finished run leaves."""
    run = folder / f"{out}.run"
    found = [str(p) for place in (folder / out, run) for p in place.rglob("*") if p.suffix in (".tmp", ".damaged")]
    partials = [p.name for p in (run / "partials").iterdir() if p.suffix != ".finished"]
    return found + partials + [name for name in ("claims", "workers") if (run / name).exists()]
