"""A soak: one run, killed, stopped, resumed under other schedules and budgets for ten minutes, and exact at its end."""

import json
import os
import random
import subprocess
import time
from contextlib import suppress

import pytest
import torch
import zarr

from tests.faults.harness import QKV, Cqsa, kill
from tests.holding import wait_for
from tests.reference import dense, error

SECONDS = float(os.environ.get("CQSA_SOAK_SECONDS", "600"))


def words(chance: random.Random) -> tuple[object, ...]:
    """Return the options of a session: schedule, budget and interval as they come."""
    schedule = chance.choice(["cqs", "rectangular", "auto"])
    budget = chance.choice(["26MiB", "32MiB", "48MiB", "96MiB"])
    return ("--causal", "--device", "cpu", "--schedule", schedule, "--host-memory", budget,
            "--checkpoint-every", chance.choice([0.05, 0.1, 0.3]))  # fmt: skip


def one_session(cqsa: Cqsa, chance: random.Random) -> str:
    """Run until the session is killed, stopped or done; return which."""
    more = ("--max-seconds", 2.6) if chance.random() < 0.2 else ()
    process = cqsa.start("run", *QKV, "out", *words(chance), *more, "--chunks", 31, "--quiet")
    (cqsa.folder / "out.run/session.json").unlink(missing_ok=True)
    wait_for(cqsa.folder / "out.run/session.json", process)
    with suppress(subprocess.TimeoutExpired):
        process.wait(chance.random() * 0.4)
    how = chance.choice(["kill", "kill", "interrupt", "terminate"])
    if how == "kill":
        kill(process)
    else:
        process.send_signal(2 if how == "interrupt" else 15)
        process.communicate(timeout=300)
    assert process.returncode in (0, 3, 130, -9, -2, -15)
    return "done" if process.returncode == 0 else how


@pytest.mark.slow
def test_a_soak(cqsa: Cqsa) -> None:
    """One run after another until the time is up; each goes through many sessions, and each is compared."""
    chance, deadline = random.Random(2), time.monotonic() + SECONDS
    q, k, v = (torch.from_numpy(zarr.open_array(cqsa.folder / path, mode="r")[...]) for path in QKV)
    picked = torch.arange(0, q.shape[2], 97)
    expected = torch.stack(
        [dense(q[:, :, i : i + 1], k, v, causal=True, q_start=int(i))[0][:, :, 0] for i in picked], 2
    )
    counts: dict[str, int] = {}
    while time.monotonic() < deadline:
        how = one_session(cqsa, chance)
        counts[how] = counts.get(how, 0) + 1
        if how == "done" or time.monotonic() >= deadline:
            found = cqsa.run("out", *words(chance))
            assert found.returncode == 0, found.stderr
            out = torch.from_numpy(zarr.open_array(cqsa.folder / "out", mode="r")[...])
            assert error(out[:, :, picked], expected) < 2e-6
            assert json.loads(cqsa("verify", "out.run", "--json", "--rows", 100).stdout)["ok"]
            assert cqsa.leftovers() == []
            subprocess.run(["rm", "-r", str(cqsa.folder / "out"), str(cqsa.folder / "out.run")], check=True)
            counts["runs"] = counts.get("runs", 0) + 1
    print(f"\n{counts}")
    assert counts["runs"] >= 1
