"""Claims: which worker computes which share of a run, agreed on through a file system that the workers share.

    claims/<share>.<epoch>   a worker's token; made with O_EXCL, never changed: who made it holds the share
    claims/<share>.done      the share is computed
    workers/<token>.json     who a worker is, and its news; its time of change is the worker's last sign of life

A share belongs to the maker of its latest epoch. When that worker has ended, or is silent for too long, another makes
the next epoch. Time is the file system's alone: the age of a sign of life is compared with that of a file changed just
now, so the clocks of the machines do not matter. Nothing that is computed rests on who holds what: two workers that
compute one share waste time, and nothing else.
"""

import errno
import json
import os
import re
import secrets
import shutil
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cqsa_stream.storage.atomic import has_ended, make_directory, open_regular, owner, temporary_name
from cqsa_stream.storage.errors import CqsaError, FullDiskError
from cqsa_stream.storage.retrying import retrying

__all__ = ["SILENT_S", "Claims", "Lost", "Worker", "age_s", "forget", "workers"]

SILENT_S = 60.0  # after which a worker of another machine counts as gone
_BEAT_S = 5.0
_MOST_BYTES = 1 << 16
_EPOCH = re.compile(r"(\d{1,9})\.(\d{1,9})", re.ASCII)
_TOKEN = re.compile(r"[0-9a-f]{32}", re.ASCII)


class Lost(CqsaError):
    """Another worker has taken over what this one was computing: nothing of it may be stored any more."""


@dataclass(frozen=True)
class Worker:
    """A worker as others see it. ``silent_s``: seconds since its last sign of life; ``news``: its own words."""

    token: str
    silent_s: float
    news: dict[str, Any]

    @property
    def lives(self) -> bool:
        """Whether it may be at work: its process is not known to have ended, and it was heard of lately."""
        return self.silent_s < SILENT_S and not has_ended(str(self.news.get("owner", "")))

    def said(self, name: str) -> str:
        """Return one of its words, fit for a terminal: anybody may have written them."""
        return "".join(filter(str.isprintable, str(self.news.get(name, "?"))))[:100]


def workers(folder: Path) -> list[Worker]:
    """Return the workers that are, or were and left their files, by their names."""
    found = []
    with suppress(OSError):
        for name in sorted(os.listdir(folder / "workers")):  # noqa: PTH208 - names are all that is needed
            token = name.removesuffix(".json")
            worker = _worker(folder, token) if _TOKEN.fullmatch(token) and name != token else None
            found += [] if worker is None else [worker]
    return sorted(found, key=lambda worker: str(worker.news.get("name", "")))


def _worker(folder: Path, token: str) -> Worker | None:
    """Return a worker; None where its file is gone, as it is when it has ended in good order."""
    path = folder / "workers" / f"{token}.json"
    try:
        with open_regular(path) as file:  # opened before it is asked for its time: so a network file system asks anew
            data, changed = file.read(_MOST_BYTES), os.fstat(file.fileno()).st_mtime
        news = json.loads(data)
    except FileNotFoundError:
        return None
    except OSError:  # nobody knows: it may live
        return Worker(token, 0.0, {})
    except (ValueError, RecursionError):
        news = {}
    return Worker(token, age_s(folder, changed), news if isinstance(news, dict) else {})


def age_s(folder: Path, changed: float) -> float:
    """Return how long ago a file was changed, by the clock of the folder's file system; by ours where it is closed to
    us. A time that is far ahead is as far from now as one that is past.
    """
    age = _now(folder) - changed
    return -age if age < -SILENT_S else max(0.0, age)


def _now(folder: Path) -> float:
    clock = temporary_name(folder / "clock")
    try:
        clock.touch(exist_ok=False)
        return clock.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            clock.unlink()


class Claims:
    """The claims of one worker; a context manager, which keeps the worker's file alive, and removes it at its end."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self.token = folder, secrets.token_hex(16)
        self.path = folder / "workers" / f"{self.token}.json"
        self._about = {"name": name, "owner": owner(), "host": socket.gethostname(), "pid": os.getpid()}
        self._held: dict[int, int] = {}
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="cqsa-claims", daemon=True)

    def __enter__(self) -> "Claims":
        for name in ("workers", "claims"):
            make_directory(self._folder / name)
        self.tell({})
        self._beating.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._beating.join()
        self.path.unlink(missing_ok=True)

    def tell(self, news: dict[str, Any]) -> None:
        """Replace what others see of this worker; not fsynced, and let be where it fails: it is news."""
        temporary = temporary_name(self.path)
        with suppress(OSError):
            try:
                with temporary.open("x") as file:
                    file.write(json.dumps({**self._about, "share": max(self._held, default=None), **news}))
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)

    def take(self, share: int) -> bool:
        """Claim a share that is not done and that no living worker holds; return whether it is ours now."""
        epoch, holder = self._latest(share)
        if holder == self.token:
            self._held = {share: epoch}
            return True
        if epoch and self._lives(share, epoch, holder):
            return False
        try:
            file = os.open(self._path(share, epoch + 1), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except (FileExistsError, FileNotFoundError):  # another was first; or the run is complete, and claims are gone
            return False
        except OSError as error:
            raise _full(error, self._folder) from error
        try:
            os.write(file, self.token.encode())
        except OSError as error:
            self._path(share, epoch + 1).unlink(missing_ok=True)
            raise _full(error, self._folder) from error
        finally:
            os.close(file)
        self._held = {share: epoch + 1}
        return True

    def check(self, share: int) -> None:
        """Raises Lost where the share is not this worker's any more."""
        path = self._path(share, self._held.get(share, 0))
        if _content(path) != self.token or self._path(share, self._held[share] + 1).exists():
            raise Lost(f"{path}: another worker has taken over share {share}")

    @property
    def there(self) -> bool:
        """Whether claims are kept: who completes the run removes them."""
        return (self._folder / "claims").exists()

    def is_done(self, share: int) -> bool:
        return self._done(share).exists()

    def done(self, share: int) -> None:
        """Note that a share is computed."""
        with suppress(FileNotFoundError):  # the run is complete, and claims are gone
            self._done(share).touch()

    def undo(self, share: int) -> None:
        """Take that back, and let the share be claimed anew: something of it was damaged."""
        make_directory(self._folder / "claims")
        self._done(share).unlink(missing_ok=True)
        self._held.pop(share, None)

    def _latest(self, share: int) -> tuple[int, str]:
        """Return the latest epoch of a share, 0 where there is none, and its maker's token."""
        try:
            names = os.listdir(self._folder / "claims")  # noqa: PTH208 - names are all that is needed
        except FileNotFoundError:
            return 0, ""
        found = [int(m[2]) for m in map(_EPOCH.fullmatch, names) if m is not None and int(m[1]) == share]
        epoch = max(found, default=0)
        return epoch, _content(self._path(share, epoch)) if epoch else ""

    def _lives(self, share: int, epoch: int, holder: str) -> bool:
        """Return whether the holder of a share may be at work. One that has not yet written who it is, counts from the
        making of its claim on.
        """
        if _TOKEN.fullmatch(holder):
            worker = _worker(self._folder, holder)
            return worker is not None and worker.lives
        path = self._path(share, epoch)
        try:
            return age_s(self._folder, path.stat().st_mtime) < SILENT_S
        except OSError:
            return False

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_S):
            with suppress(OSError):
                os.utime(self.path)

    def _path(self, share: int, epoch: int) -> Path:
        return self._folder / "claims" / f"{share:04d}.{epoch:06d}"

    def _done(self, share: int) -> Path:
        return self._folder / "claims" / f"{share:04d}.done"


@retrying
def _content(path: Path) -> str:
    """Return what a file holds, nothing where it is not there. Raises OSError where nobody knows."""
    try:
        with open_regular(path) as file:
            return file.read(_MOST_BYTES).decode("ascii", "replace")
    except FileNotFoundError:
        return ""


def _full(error: OSError, folder: Path) -> OSError:
    """Return the error of a claim that could not be made, FullDiskError where the disk is full."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FullDiskError(error.errno, "disk full; a claim is needed", str(folder / "claims"))
    return error


def forget(folder: Path) -> None:
    """Remove all claims, and the files of all workers; what cannot be removed harms nothing."""
    for name in 2 * ("claims", "workers"):  # a file may come between the look and the removal
        shutil.rmtree(folder / name, ignore_errors=True)
