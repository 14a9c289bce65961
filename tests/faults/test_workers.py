"""Workers that are killed at random, they or who leads them, and power cuts under two of them."""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.faults.harness import QKV, SCHEDULES, Cqsa, kill
from tests.faults.test_power import Disk, disk
from tests.workers import Workers, bits, ended, leftovers

__all__ = ["disk"]

TOKENS, SHARES = 6000, 8
BUDGET = {"cqs": "160MiB", "rectangular": "160MiB"}


def words(schedule: str) -> tuple[object, ...]:
    fixed = ("--causal", "--device", "cpu", "--chunks", 21, "--schedule", schedule, "--shares", SHARES)
    return (*fixed, "--host-memory", BUDGET[schedule], "--checkpoint-every", 0.05, "--quiet")


@pytest.fixture(scope="module")
def expected(made: Cqsa, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, bytes]]:
    """What one process makes of the shares, for each schedule; the inputs in ./d."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "d").symlink_to(made.folder / "d")
    found = {}
    with Workers(folder) as workers:
        for schedule in SCHEDULES:
            assert ended(workers.start("run", *QKV, schedule, *words(schedule)))[0] == 0
            found[schedule] = bits(folder, schedule)
    return found


def done(folder: Path) -> set[str]:
    """Return what is finished, by its files: it never becomes less."""
    return {path.name for path in (folder / "out.run/partials").glob("*.finished")}


def round_of_kills(folder: Path, schedule: str, chance: random.Random) -> int:
    """Work at a run by two to four workers of one command, or of an array; kill some; return how many."""
    count, kills = chance.randrange(2, 5), 0
    with Workers(folder) as workers:
        if chance.random() < 0.5:
            started = [workers.start("run", *QKV, "out", *words(schedule), "--workers", count)]
        else:
            run = ("run", *QKV, "out", *words(schedule), "--max-seconds", 0)
            assert ended(workers.start(*run))[0] in (0, 3)
            started = [workers.work(f"{n}/{count}") for n in range(count)]
        before = done(folder)
        for _ in range(chance.randrange(1, 4)):
            time.sleep(chance.random() * 6)
            victims = [process for process in started if process.poll() is None]
            if victims:
                victim = chance.choice(victims)
                victim.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
                kills += 1
            assert before <= (before := done(folder)), "what was finished is not any more"
        for process in started:
            if process.poll() is None and chance.random() < 0.5:
                kill(process)
                kills += 1
    return kills


def kill_until(kills: int, folder: Path, schedule: str, chance: random.Random) -> int:
    """Kill so often, then let the run come to its end."""
    count = 0
    while count < kills:
        count += round_of_kills(folder, schedule, chance)
    with Workers(folder) as workers:
        for process in [workers.start("run", *QKV, "out", *words(schedule), "--workers", 2)]:
            code, said = ended(process)
            assert code == 0, said
    return count


def orphans_end(folder: Path) -> None:
    """Wait for workers whose leader was killed: they stop at their next safe points."""
    deadline = time.monotonic() + 60
    while (folder / "out.run/workers").exists() and time.monotonic() < deadline:
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_hundred_kills(
    schedule: str, part: int, made: Cqsa, expected: dict[str, tuple[bytes, bytes]], tmp_path: Path
) -> None:
    (tmp_path / "d").symlink_to(made.folder / "d")
    kills = kill_until(5, tmp_path, schedule, random.Random(f"{schedule} {part}"))
    orphans_end(tmp_path)
    assert bits(tmp_path) == expected[schedule]
    assert leftovers(tmp_path) == []
    print(f"\n{schedule} {part}: {kills} kills")


@pytest.mark.slow
def test_kills(made: Cqsa, expected: dict[str, tuple[bytes, bytes]], tmp_path: Path) -> None:
    (tmp_path / "d").symlink_to(made.folder / "d")
    kill_until(1, tmp_path, "cqs", random.Random(3))
    orphans_end(tmp_path)
    assert bits(tmp_path) == expected["cqs"]
    assert leftovers(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_power_cuts_under_two_workers(
    schedule: str, disk: Disk, made: Cqsa, expected: dict[str, tuple[bytes, bytes]]
) -> None:
    """The disk of both loses what was not fsynced; whoever comes after it, goes on."""
    chance, folder = random.Random(schedule), disk.mount
    (folder / "d").symlink_to(made.folder / "d")
    for _ in range(4):
        with Workers(folder) as workers:
            assert ended(workers.start("run", *QKV, "out", *words(schedule), "--max-seconds", 0))[0] in (0, 3)
            started = [workers.work(f"{n}/2") for n in range(2)]
            time.sleep(2 + chance.random() * 5)
            before = done(folder)
            disk.cut()
            for process in started:
                kill(process)
        disk.detach()
        disk.attach()
        lost = before - done(folder)
        assert len(lost) <= 2, f"finished rows are gone: {lost}"  # seen a moment before their directory was synced
    with Workers(folder) as workers:
        assert ended(workers.start("run", *QKV, "out", *words(schedule)))[0] == 0
    assert bits(folder) == expected[schedule]
    assert leftovers(folder) == []
    shutil.rmtree(folder / "out.run")
