"""Workers as processes of this machine, one for each device: started, watched, and stopped together."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from cqsa_stream.engine.job import Job
from cqsa_stream.errors import RunStopped
from cqsa_stream.executors.lead import lead, say_who_ended
from cqsa_stream.run.directory import RunDirectory

__all__ = ["Processes"]

_LONGEST_S = 60.0  # from the end of the run, or an error of ours, to that of a worker
_CODE = "from cqsa_stream.executors.process import main; main()"


class Processes:
    """The work of a run that has begun, done by one process for each device."""

    def __init__(self, directory: RunDirectory, devices: Sequence[str]) -> None:
        self._directory, self._devices = directory, devices
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ended: dict[int, int] = {}
        self._stopping = False

    @property
    def codes(self) -> list[int]:
        return list(self._ended.values())

    def __call__(self, job: Job) -> None:
        """Start the workers and wait for them. Raises RunStopped where that is asked, CqsaError where none is left."""
        with ExitStack() as stack:
            stack.callback(self._end)
            for number, device in enumerate(self._devices):
                self._processes.append(self._start(number, device))
            lead(self._directory, job, self)

    def look(self, seconds: float) -> bool:
        for number, process in enumerate(self._processes):
            code = process.poll()
            if code is None or number in self._ended:
                continue
            self._ended[number] = code
            if code and not (self._stopping and code in (RunStopped.exit_code, -signal.SIGTERM)):
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                left = sum(other.poll() is None for other in self._processes)
                say_who_ended(number, f"(process {process.pid}) {how}", left)
        time.sleep(seconds)
        return len(self._ended) < len(self._processes)

    def stop(self) -> None:
        self._stopping = True
        for process in self._processes:
            process.send_signal(signal.SIGTERM)

    def _start(self, number: int, device: str) -> "subprocess.Popen[bytes]":
        words = [str(self._directory.path), str(number), str(len(self._devices)), device]
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _CODE, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=_environment(len(self._devices)),
            start_new_session=True,  # a Ctrl-C is ours to pass on
        )

    def _end(self) -> None:
        """Leave no worker behind: whoever has not ended does so at its next safe point, by the end of its stdin."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        deadline = time.monotonic() + _LONGEST_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment(workers: int) -> dict[str, str]:
    """Return the environment of a worker: it imports what we import, and has its part of the processor."""
    ours = Path(__file__).parents[2]
    paths = [str(ours), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = str(max(1, torch.get_num_threads() // workers))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
