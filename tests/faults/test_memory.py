"""Memory that runs out: a clear error, and a run that another session finishes bit for bit."""

from pathlib import Path

import pytest

from tests.faults.harness import SCHEDULES, Cqsa, options

ENOMEM = 12
SELDOM = ("--checkpoint-every", 1000)  # what is allocated does not depend on how long it takes
# what TensorStore's and OpenMP's own threads say when they cannot allocate; they end the process themselves
BY_LIBRARIES = ("bad_alloc", "std::system_error", "Out of memory", "libgomp")


def allocations(made: Cqsa, schedule: str, tmp: Path) -> int:
    """Return how many allocations of 128 KiB and more a command makes."""
    log = tmp / "log"
    assert made.run(f"counted-{schedule}-{tmp.name}", *options(schedule), *SELDOM, FAULTS_LOG=log).returncode == 0
    return log.read_text().splitlines().count("alloc memory")


def check_failing(cqsa: Cqsa, made: Cqsa, schedule: str, number: int, count: int) -> int:
    found = cqsa.run("out", *options(schedule), *SELDOM, faults=f"alloc:*:{number}:{count}:{ENOMEM}")
    told = "no host memory left" in found.stderr and "the run is intact" in found.stderr
    assert found.returncode == 0 or told or any(words in found.stderr for words in BY_LIBRARIES), found
    resumed = cqsa.run("out", *options(schedule))
    assert resumed.returncode == 0, resumed.stderr
    assert cqsa.result() == made.result(f"whole-{schedule}")
    return found.returncode


@pytest.mark.slow
def test_an_allocation_that_fails(cqsa: Cqsa, made: Cqsa) -> None:
    number = allocations(made, "cqs", cqsa.folder)
    assert check_failing(cqsa, made, "cqs", number - 20, -1) != 0


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("part", range(12))
def test_allocations_that_fail_anywhere(part: int, schedule: str, cqsa: Cqsa, made: Cqsa) -> None:
    total = allocations(made, schedule, cqsa.folder)
    check_failing(cqsa, made, schedule, total - 1 - part * total // 16, -1 if part % 2 else 1)
