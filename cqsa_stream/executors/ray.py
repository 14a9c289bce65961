"""Workers as actors of a Ray cluster: one for each device, restarted by Ray where a node or process dies.

What goes between us and them are numbers and a line of text. An actor that is started again takes its part of the run
as a new worker: what its predecessor had not committed is computed again.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from cqsa_stream.engine.job import Job
from cqsa_stream.errors import CqsaError, InputError, RunStopped
from cqsa_stream.executors.lead import lead, say_who_ended
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.stopping import Stopper

__all__ = ["Actor", "Actors"]

_STOPPING_S, _LEAVING_S = 60.0, 5.0  # in which actors come to a safe point; in which they see that the run is complete
_QUIET = {  # of a cluster of our own: on this machine alone, and without a word to anybody
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # read when ray is imported: it listens on the loopback address only
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class Actor:
    """A worker in an actor's process; ``stop`` may be called while ``work`` goes on."""

    def __init__(self) -> None:
        self._stop = Stopper()

    def work(self, path: str, number: int, count: int, device: str) -> tuple[int, str]:
        """Compute until the run is complete; return an exit code, and what there is to say."""
        from cqsa_stream.run.working import work

        try:
            work(Path(path), (number, count), (), self._stop, device=device, fetch=True)
        except CqsaError as error:
            return error.exit_code, "" if isinstance(error, RunStopped) else " ".join(str(error).split())
        return 0, ""

    def stop(self) -> None:
        """Let ``work`` stop at the next safe point."""
        self._stop.ask("stopped by who started it")


class Actors:
    """The work of a run that has begun, done by one actor for each device. ``address``: of the cluster, as "auto"; one
    of our own begins and ends with the work where that is None.
    """

    def __init__(self, directory: RunDirectory, count: int, address: str | None) -> None:
        self._directory, self._count, self._address = directory, count, address
        self.codes: list[int] = []
        self._ray: Any = None
        self._actors: list[Any] = []
        self._pending: dict[Any, int] = {}

    def __call__(self, job: Job) -> None:
        """Start the actors and wait for them. Raises RunStopped, and CqsaError where none is left; InputError where
        Ray is not there.
        """
        with self._connected(job):
            try:
                lead(self._directory, job, self)
            finally:
                self._end()

    def look(self, seconds: float) -> bool:
        ready, _ = self._ray.wait(list(self._pending), timeout=seconds)
        for found in ready:
            number = self._pending.pop(found)
            try:
                code, said = self._ray.get(found)
            except self._ray.exceptions.RayError as error:
                code, said = 1, " ".join(str(error).split())[:300]
            self.codes.append(code)
            if code not in (0, RunStopped.exit_code):
                say_who_ended(number, f"ended: {said}", len(self._pending))
        return bool(self._pending) and 0 not in self.codes  # who returns 0 has seen the run complete

    def stop(self) -> None:
        for actor in self._actors:
            actor.stop.remote()

    @contextmanager
    def _connected(self, job: Job) -> Iterator[None]:
        """Connect to the cluster, and start an actor for each device."""
        own = job.device.habits.own_memory
        device = f"{job.device.torch.type}:0" if own else str(job.device)  # Ray shows an actor its own alone
        with _imported(own=self._address is None) as self._ray:
            ours = not self._ray.is_initialized()
            if ours:
                resources = {"num_cpus": self._count, "include_dashboard": False}
                words = resources if self._address is None else {"address": self._address}
                self._ray.init(log_to_driver=False, logging_level="ERROR", **words)
            try:
                actor = self._ray.remote(
                    num_cpus=1,
                    num_gpus=int(own),
                    max_restarts=-1,
                    max_task_retries=-1,
                    max_concurrency=2,
                    runtime_env={"env_vars": _environment()},
                )(Actor)
                self._actors = [actor.remote() for _ in range(self._count)]
                for number, one in enumerate(self._actors):
                    self._pending[one.work.remote(str(self._directory.path), number, self._count, device)] = number
                yield
            finally:
                if ours:
                    self._ray.shutdown()

    def _end(self) -> None:
        """End the actors when they have come to a safe point; those that cannot, as their node is gone, at once."""
        if self._pending:
            self.stop()
            seconds = _LEAVING_S if 0 in self.codes else _STOPPING_S
            self._ray.wait(list(self._pending), num_returns=len(self._pending), timeout=seconds)
        for actor in self._actors:
            self._ray.kill(actor)


def _environment() -> dict[str, str]:
    """Return what an actor needs of our environment to import what we import."""
    ours = str(Path(__file__).parents[2])
    return {"PYTHONPATH": os.pathsep.join([ours, *filter(None, [os.environ.get("PYTHONPATH")])])}


@contextmanager
def _imported(*, own: bool) -> Iterator[Any]:
    """Import Ray, told what a cluster of our own needs. Raises InputError where it is not there."""
    said = {name: value for name, value in _QUIET.items() if own and name not in os.environ}
    os.environ.update(said)
    try:
        yield import_module("ray")
    except ImportError as error:
        raise InputError(f'executor ray: {error}; install cqsa-stream[ray], or take executor="local"') from error
    finally:
        for name in said:
            del os.environ[name]
