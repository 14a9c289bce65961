"""Power cuts: an ext4 file system on a loop device is shut down at random instants, without its journal being written.

What was not fsynced by then is gone, as it would be on a disk of its own. Takes root, loop devices and mkfs.ext4.
"""

import fcntl
import os
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cqsa_stream.errors import InputError
from tests.faults.harness import SCHEDULES, Cqsa, is_root, kill, options
from tests.holding import HOLDING, wait_for

_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN
_NO_LOG_FLUSH = 2


class Disk:
    """An ext4 file system in a file, mounted on a folder."""

    def __init__(self, folder: Path) -> None:
        self.image, self.mount = folder / "image", folder / "disk"
        self.mount.mkdir()
        with self.image.open("wb") as file:
            file.truncate(192 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(self.image)], check=True)

    def attach(self) -> None:
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.mount)], check=True, capture_output=True)

    def detach(self) -> None:
        for _ in range(600):  # a loop device may be busy for a moment after a cut
            if subprocess.run(["umount", str(self.mount)], capture_output=True).returncode == 0:
                return
            time.sleep(0.1)
        raise AssertionError(f"{self.mount} stays busy")

    def cut(self) -> None:
        """Take the power away."""
        folder = os.open(self.mount, os.O_RDONLY)
        fcntl.ioctl(folder, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        os.close(folder)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if not is_root() or shutil.which("mkfs.ext4") is None:
        pytest.skip("playing a power cut takes root and mkfs.ext4")
    made = Disk(tmp_path)
    try:
        made.attach()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no loop device can be mounted here: {error.stderr.decode().strip()}")
    yield made
    made.detach()


def status(cqsa: Cqsa) -> dict[str, Any]:
    """Return where the run stands; nothing is done where it has not begun."""
    try:
        return cqsa.status()
    except InputError:
        return {"pairs_done": 0, "rows_done": 0, "complete": False}


def cut_until_done(cqsa: Cqsa, disk: Disk, schedule: str, cuts: int, chance: random.Random) -> int:
    """Cut the power under a run at random instants; return how often, before it was complete."""
    for count in range(cuts):
        (cqsa.folder / "out.run/session.json").unlink(missing_ok=True)
        process = cqsa.start_holding(HOLDING, *options(schedule), at=chance.randrange(40))
        if wait_for(cqsa.folder / "out.run/session.json", process):
            cqsa.let_run(process, chance.random() * 0.5)
        before = status(cqsa)
        disk.cut()
        kill(process)
        disk.detach()
        disk.attach()
        after = status(cqsa)
        for name in ("pairs_done", "rows_done"):
            assert after[name] >= before[name], f"{name}: what status called done is gone"
        if after["complete"]:
            return count
    return cuts


def check_cuts(disk: Disk, made: Cqsa, schedule: str, cuts: int, chance: random.Random) -> int:
    cqsa = Cqsa(disk.mount, made.library)
    (disk.mount / "d").symlink_to(made.folder / "d")
    count = cut_until_done(cqsa, disk, schedule, cuts, chance)
    found = cqsa.run("out", *options(schedule))
    assert found.returncode == 0, found.stderr
    assert cqsa.result() == made.result(f"whole-{schedule}")
    assert cqsa.leftovers() == []
    for path in ("out", "out.run"):
        shutil.rmtree(disk.mount / path)
    (disk.mount / "d").unlink()
    return count


def test_a_power_cut(disk: Disk, made: Cqsa) -> None:
    assert check_cuts(disk, made, "rectangular", 2, random.Random(1)) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_twenty_power_cuts(schedule: str, disk: Disk, made: Cqsa) -> None:
    chance, cuts = random.Random(schedule), 0
    while cuts < 20:
        cuts += check_cuts(disk, made, schedule, min(6, 20 - cuts), chance)
