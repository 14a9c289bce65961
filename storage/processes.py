"""Telling processes apart: a number is used again, but not with the same start within the same boot."""

import os
from pathlib import Path

__all__ = ["boot", "boot_and_start", "lives"]


def boot() -> str | None:
    """Return what names this boot of the machine; None where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def boot_and_start(pid: int) -> tuple[str, str] | None:
    """Return the boot in which a process runs, and when it started, in ticks since; None where it has ended."""
    running = boot()
    try:
        state, start = _state_and_start(pid)
    except OSError:
        return None
    return None if running is None or state in "ZX" else (running, start)


def lives(pid: int, start: str) -> bool:
    """Return whether the process that started then has not ended. One that the system hides counts as living."""
    try:
        state, found = _state_and_start(pid)
    except OSError:
        return _is_there(pid)
    return state not in "ZX" and found == start


def _state_and_start(pid: int) -> tuple[str, str]:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]


def _is_there(pid: int) -> bool:
    """Return whether a process has this number; /proc may not show those of other users."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
