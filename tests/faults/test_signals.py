"""Being told to stop: by a signal, by a second one, by a time limit."""

import json
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest

from cqsa_stream import inputs
from cqsa_stream.run import stopping
from cqsa_stream.run.stopping import Stopper
from tests.conftest import Cli
from tests.faults.harness import QKV, SCHEDULES, Cqsa, kill, options
from tests.holding import HELD, STUCK, TOLD, wait_for

HANG_S = 120


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "schedule"), [(signal.SIGTERM, 3, "rectangular"), (signal.SIGINT, 130, "cqs")]
)
def test_the_first_signal_stops_at_a_checkpoint(number: signal.Signals, code: int, schedule: str, cqsa: Cqsa) -> None:
    words = (*options(schedule), "--checkpoint-every", 1000)  # the interval is a part of what a plan is chosen by
    assert cqsa.run("whole", *words).returncode == 0
    process = cqsa.held(*words, at=7)
    process.send_signal(number)
    _, message = process.communicate(timeout=HANG_S)
    assert process.returncode == code, message
    assert "the same command resumes" in message
    found = cqsa.status()
    assert 0 < found["pairs_done"] < found["pairs_total"]
    assert found["pairs_done"] == cqsa.events()[-1]["pairs_done"], "all that was computed is on disk"
    assert cqsa.run("out", *options(schedule)).returncode == 0
    assert cqsa.result() == cqsa.result("whole")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_stops_at_once(number: signal.Signals, schedule: str, cqsa: Cqsa, made: Cqsa) -> None:
    """Whatever the process is at: here it is in a call that never ends."""
    process = cqsa.start_holding(STUCK, *options(schedule))
    try:
        assert wait_for(cqsa.folder / HELD, process)
        process.send_signal(number)
        assert wait_for(cqsa.folder / TOLD, process)
        process.send_signal(number)
        process.communicate(timeout=HANG_S)
    finally:
        kill(process)
    assert process.returncode == (130 if number == signal.SIGINT else 3)
    assert cqsa.status()["pid"] is None
    assert cqsa.run("out", *options(schedule)).returncode == 0
    assert cqsa.result() == made.result(f"whole-{schedule}")


def test_a_time_limit_counts_from_the_command(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that jumps past the limit while the inputs are looked at: the run stops at its first safe point."""
    words = ("--chunks", 21, "--schedule", "rectangular", "--device", "cpu")
    assert cli("generate", "d", "--tokens", 3000, "--heads", 1, "--head-dim", 16).returncode == 0
    assert cli("run", *QKV, "first", *words, "--max-seconds", 1e-3).returncode == 3
    jumped, looked_at = [0.0], inputs.fingerprints

    def jump(arrays: Any) -> dict[str, str]:
        jumped[0] += 2000
        return looked_at(arrays)

    monkeypatch.setattr("cqsa_stream.run.durable.fingerprints", jump)
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + jumped[0]))
    found = cli("run", *QKV, "out", *words, "--max-seconds", 1000)
    assert found.returncode == 3, found.stderr
    assert "1000 s" in found.stderr
    first, second = (cli("status", f"{out}.run", "--json").stdout for out in ("first", "out"))
    assert pairs_done(first) == pairs_done(second) > 0
    assert cli("run", *QKV, "out", *words, "--max-seconds", 10_000).returncode == 0, "it is not reached"


def pairs_done(status: str) -> int:
    found: int = json.loads(status)["pairs_done"]
    return found


def test_a_time_limit_is_reached_at_the_safe_point_nearest_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: now[0]))
    stop = Stopper(max_seconds=10.0)
    now[0] = 108.0
    assert stop() is None
    assert stop(1.9) is None
    assert stop(2.1) == "stopped after 10 s (max_seconds)"
    now[0] = 110.0
    assert stop() is not None
