"""Being told to stop: by a signal, by a second one, by a time limit."""

import signal
import time

import pytest

from tests.faults.harness import QKV, SCHEDULES, Cqsa, options, wait_for


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "schedule"), [(signal.SIGTERM, 3, "rectangular"), (signal.SIGINT, 130, "cqs")]
)
def test_the_first_signal_stops_at_a_checkpoint(
    number: signal.Signals, code: int, schedule: str, cqsa: Cqsa, made: Cqsa
) -> None:
    process = cqsa.start("run", *QKV, "out", *options(schedule), "--checkpoint-every", 60, "--quiet")
    assert wait_for(cqsa.folder / "out.run/events.jsonl", process)
    time.sleep(0.2)
    process.send_signal(number)
    told = time.monotonic()
    _, message = process.communicate(timeout=30)
    assert process.returncode == code, message
    assert time.monotonic() - told < 5
    assert "the same command resumes" in message
    found = cqsa.status()
    assert 0 < found["pairs_done"] < found["pairs_total"]
    assert found["pairs_done"] == cqsa.events()[-1]["pairs_done"], "all that was computed is on disk"
    assert cqsa.run("out", *options(schedule)).returncode == 0
    assert cqsa.result() == made.result(f"whole-{schedule}")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_stops_at_once(number: signal.Signals, schedule: str, cqsa: Cqsa) -> None:
    assert cqsa("generate", "e", "--tokens", 60_000, "--heads", 1, "--head-dim", 64).returncode == 0
    long = [f"e/{name}.zarr" for name in "qkv"]
    words = ("--schedule", schedule, "--chunks", 7, "--device", "cpu", "--checkpoint-every", 1.0)
    process = cqsa.start("run", *long, "out", *words, "--quiet")
    assert wait_for(cqsa.folder / "out.run/events.jsonl", process)
    time.sleep(2.5)
    process.send_signal(number)
    time.sleep(0.05)
    process.send_signal(number)
    told = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGINT else 3)
    assert time.monotonic() - told < 1
    assert cqsa.status()["pid"] is None
    assert cqsa("run", *long, "out", "--quiet").returncode == 0
    assert cqsa("verify", "out.run", "--rows", 20).returncode == 0


@pytest.mark.slow
def test_a_time_limit_counts_from_the_command(cqsa: Cqsa) -> None:
    words = ("--tokens", 120_000, "--heads", 2, "--head-dim", 64, "--dtype", "float32")
    assert cqsa("generate", "e", *words).returncode == 0
    began = time.monotonic()
    limit_s = 6.0
    found = cqsa(
        "run", *(f"e/{name}.zarr" for name in "qkv"), "out", "--device", "cpu", "--max-seconds", limit_s, "--quiet"
    )
    took = time.monotonic() - began
    assert found.returncode == 3, found.stderr
    assert abs(took - limit_s) < 2
    assert cqsa.status()["pairs_done"] > 0
