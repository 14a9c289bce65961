"""Disks that are full, or fail: a clear error that names the file, the run intact, and a resume that ends well."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import SCHEDULES, Cqsa, is_root, options
from tests.holding import go_on

EIO, ENOSPC = 5, 28
FOREVER = -1

# where, the rule, and what the message must name
READS = {
    "query": ("read:*/q.zarr/c/*", "q.zarr/c/"),
    "value": ("read:*/v.zarr/c/*", "v.zarr/c/"),
}
WRITES = {
    "manifest": ("write:*/run.json.*.tmp:1", "run.json"),
    "manifest, rename": ("rename:*/run.json:1", "run.json"),
    "state": ("write:*/state.json.*.tmp:1", "state.json"),
    "partial": ("write:*.partial.*.tmp:9", ".partial"),
    "partial, fsync": ("fsync:*.partial.*.tmp:9", ".partial"),
    "partial, rename": ("rename:*.partial:9", ".partial"),
    "partial, directory": ("fsync:*/partials:9", ".partial"),
    "output": ("write:*/out/c/*:3", "out/c/"),
    "output, fsync": ("fsync:*/out/c/*:3", "out/c/"),
    "output, rename": ("rename:*/out/c/*:3", "out/c/"),
    "output, directory": ("mkdir:*/out/c/0/0/*:3", "out/c/"),
    "lse": ("write:*/lse.zarr/c/*:3", "lse.zarr/c/"),
    "lse, created": ("write:*/lse.zarr/zarr.json*:1", "lse.zarr/"),
}


def check_end(cqsa: Cqsa, made: Cqsa, schedule: str, *more: object) -> None:
    found = cqsa.run("out", *options(schedule), *more)
    assert found.returncode == 0, found.stderr
    assert cqsa.result() == made.result(f"whole-{schedule}")
    assert cqsa.leftovers() == []


def check_failing_write(cqsa: Cqsa, made: Cqsa, schedule: str, where: str, error: int) -> None:
    rule, named = WRITES[where]
    found = cqsa.run("out", *options(schedule), faults=f"{rule}:{FOREVER}:{error}")
    [message] = [line for line in found.stderr.splitlines() if not line.endswith("resumes out")]
    assert found.returncode == (3 if error == ENOSPC else 1), message
    assert named in message
    if error == ENOSPC:
        assert "disk full" in message
        assert "MiB more" in message or "needed" in message
    check_end(cqsa, made, schedule)


@pytest.mark.parametrize(("where", "error"), [("output, fsync", EIO), ("partial", ENOSPC)])
def test_a_write_that_fails(where: str, error: int, cqsa: Cqsa, made: Cqsa) -> None:
    check_failing_write(cqsa, made, "cqs", where, error)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("error", [EIO, ENOSPC])
@pytest.mark.parametrize("where", WRITES)
def test_every_write_that_fails(where: str, error: int, schedule: str, cqsa: Cqsa, made: Cqsa) -> None:
    check_failing_write(cqsa, made, schedule, where, error)


@pytest.mark.slow
def test_news_that_cannot_be_written_end_no_run(cqsa: Cqsa, made: Cqsa) -> None:
    rules = f"write:*/events.jsonl:1:{FOREVER}:{ENOSPC};rename:*/session.json:1:{FOREVER}:{EIO}"
    found = cqsa.run("out", *options("cqs"), faults=rules)
    assert found.returncode == 0, found.stderr
    assert cqsa.result() == made.result("whole-cqs")


@pytest.mark.parametrize("what", ["query", pytest.param("value", marks=pytest.mark.slow)])
def test_a_read_that_fails_for_a_moment(what: str, cqsa: Cqsa, made: Cqsa) -> None:
    rule, named = READS[what]
    found = cqsa.run("out", *options("rectangular"), faults=f"{rule}:30:3:{EIO}")
    assert found.returncode == 0, found.stderr
    assert "trying again" in found.stderr
    assert named in found.stderr
    assert cqsa.result() == made.result("whole-rectangular")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("what", READS)
def test_a_read_that_fails_for_good(what: str, schedule: str, cqsa: Cqsa, made: Cqsa) -> None:
    rule, named = READS[what]
    found = cqsa.run("out", *options(schedule), faults=f"{rule}:30:{FOREVER}:{EIO}")
    assert found.returncode == 2
    last = found.stderr.splitlines()[-1]
    assert named in last
    assert "Input/output error" in last
    assert found.stderr.count("trying again") >= 4
    check_end(cqsa, made, schedule)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, FOREVER])
@pytest.mark.parametrize("file", ["*.partial", "*/run.json", "*/out/c/*"])
def test_what_a_run_wrote_cannot_be_read(file: str, count: int, cqsa: Cqsa, made: Cqsa) -> None:
    assert cqsa.run("out", *options("cqs"), "--max-seconds", 0).returncode == 3
    assert cqsa.run("out", *options("cqs"), faults="rename:*.partial:25:1:dead").returncode == -9
    found = cqsa.run("out", *options("cqs"), faults=f"read:{file}:1:{count}:{EIO}")
    if count == FOREVER:  # not even an output is taken for damaged because it cannot be read now
        assert found.returncode == 1, found.stderr
        assert file.strip("*") in found.stderr.splitlines()[-1]
        found = cqsa.run("out", *options("cqs"))
    assert found.returncode == 0, found.stderr
    assert cqsa.result() == made.result("whole-cqs")


@pytest.fixture
def small(cqsa: Cqsa) -> Iterator[Cqsa]:
    """A folder of 16 MiB on a file system of its own, but for the inputs."""
    if not is_root():
        pytest.skip("mounting a small file system takes root")
    mount = cqsa.folder / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        (mount / "d").symlink_to(cqsa.folder / "d")
        with Cqsa(mount, cqsa.library) as found:
            yield found
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def ballast(folder: Path, keep: int) -> Path:
    """Fill the file system but for so many bytes, whatever else is being written there."""
    file = folder / "ballast"
    with file.open("wb") as target:
        while True:
            try:
                os.posix_fallocate(target.fileno(), 0, shutil.disk_usage(folder).free - keep)
            except OSError as error:
                if error.errno != ENOSPC:
                    raise
            else:
                return file


def test_a_disk_too_small_is_told_before(small: Cqsa) -> None:
    ballast(small.folder, 4 << 20)
    found = small.run("out", *options("cqs"))
    assert found.returncode == 3
    assert "9.4 MiB needed, 4.0 MiB free" in found.stderr
    assert not (small.folder / "out.run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("keep", [0, 100_000, 1 << 20, 3 << 20])
def test_a_disk_that_fills_up(keep: int, schedule: str, small: Cqsa, made: Cqsa) -> None:
    process = small.held(*options(schedule))
    file = ballast(small.folder, keep)
    go_on(small.folder)
    _, message = process.communicate(timeout=300)
    assert process.returncode == 3, message
    assert "disk full" in message
    assert "MiB more" in message
    assert small.run("out", *options(schedule)).returncode == 3, "it is full still"
    file.unlink()
    check_end(small, made, schedule)
