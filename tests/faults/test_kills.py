"""SIGKILL: at random instants, and at named points of beginning, committing, finishing and resuming."""

import random

import pytest

from tests.faults.harness import INTERVAL_S, SCHEDULES, Cqsa, kill, options
from tests.holding import HOLDING, wait_for

# (name, rule): the process dies before ("kill") or after ("dead") a system call, or half way through a write ("torn")
POINTS = {
    "begin: lock taken": "rename:*/out.run/session.json:1:1:dead",
    "begin: group made": "mkdir:*/results.zarr:1:1:dead",
    "begin: links made": "symlink:*/results.zarr/lse:1:1:dead",
    "begin: state half written": "write:*/state.json.*.tmp:1:1:torn",
    "begin: state renamed": "rename:*/state.json:1:1:dead",
    "begin: manifest half written": "write:*/run.json.*.tmp:1:1:torn",
    "begin: manifest not yet renamed": "rename:*/run.json:1:1:kill",
    "begin: manifest renamed": "rename:*/run.json:1:1:dead",
    "begin: partials made": "mkdir:*/out.run/partials:1:1:dead",
    "begin: output made": "mkdir:*/out:1:1:dead",
    "begin: output half described": "write:*/out/zarr.json.__lock:1:1:torn",
    "begin: lse described": "rename:*/lse.zarr/zarr.json:1:1:kill",
    "begin: first event": "write:*/events.jsonl:1:1:torn",
    "commit: created": "create:*.partial.*.tmp:7:1:dead",
    "commit: half written": "write:*.partial.*.tmp:10:1:torn",
    "commit: written": "fsync:*.partial.*.tmp:3:1:kill",
    "commit: synced": "fsync:*.partial.*.tmp:3:1:dead",
    "commit: renamed": "rename:*.partial:5:1:dead",
    "commit: directory not synced": "fsync:*/partials:6:1:kill",
    "commit: directory synced": "fsync:*/partials:6:1:dead",
    "commit: event half written": "write:*/events.jsonl:2:1:torn",
    "finish: directory of a chunk": "mkdir:*/out/c/0/0/*:2:1:dead",
    "finish: chunk half written": "write:*/out/c/*:3:1:torn",
    "finish: chunk not renamed": "rename:*/out/c/*:3:1:kill",
    "finish: chunk renamed": "rename:*/out/c/*:4:1:dead",
    "finish: lse not renamed": "rename:*/lse.zarr/c/*:2:1:kill",
    "finish: output whole, row not yet": "fsync:*/lse.zarr/c/*:4:1:dead",
    "finish: row finished": "fsync:*/partials:30:1:dead",
}


LOST_S = 60  # what only a run that has ceased to checkpoint loses, be the machine as busy as it may


def resume_and_compare(cqsa: Cqsa, made: Cqsa, schedule: str) -> None:
    """Run to the end what was killed; it is as if it had never been."""
    found = cqsa.run("out", *options(schedule))
    assert found.returncode == 0, found.stderr
    assert cqsa.result() == made.result(f"whole-{schedule}")
    assert cqsa.leftovers() == []
    assert cqsa.status()["complete"]


def check_point(cqsa: Cqsa, made: Cqsa, schedule: str, name: str) -> None:
    found = cqsa.run("out", *options(schedule), faults=POINTS[name])
    assert found.returncode == -9, f"the point was not met: {found.stderr}"
    resume_and_compare(cqsa, made, schedule)


@pytest.mark.parametrize("name", ["commit: half written"])
def test_a_kill_at_a_named_point(name: str, cqsa: Cqsa, made: Cqsa) -> None:
    check_point(cqsa, made, SCHEDULES[len(name) % 2], name)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", POINTS)
def test_a_kill_at_every_named_point(name: str, schedule: str, cqsa: Cqsa, made: Cqsa) -> None:
    check_point(cqsa, made, schedule, name)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "rule",
    [
        "unlink:*.tmp:1:1:dead",
        "read:*.partial:5:1:dead",
        "create:*/lock:1:1:dead",
        "write:*/session.json.*.tmp:1:1:torn",
        "write:*/state.json.*.tmp:1:1:torn",
    ],
)
def test_a_kill_while_resuming(rule: str, schedule: str, cqsa: Cqsa, made: Cqsa) -> None:
    assert cqsa.run("out", *options(schedule), faults="write:*.partial.*.tmp:10:1:torn").returncode == -9
    assert cqsa.run("out", *options(schedule), faults=rule).returncode == -9
    resume_and_compare(cqsa, made, schedule)


def killed_until_done(cqsa: Cqsa, schedule: str, kills: int, chance: random.Random) -> tuple[int, float]:
    """Kill a run at random instants again and again; return how often, and the longest work lost in seconds."""
    count, lost = 0, 0.0
    run = cqsa.folder / "out.run"
    while count < kills:
        (run / "session.json").unlink(missing_ok=True)
        process = cqsa.start_holding(HOLDING, *options(schedule), at=chance.randrange(40))
        begun = wait_for(run / "session.json", process)
        before = len(cqsa.events())
        if begun:
            cqsa.let_run(process, chance.random() * 0.6)
        moment = kill(process)
        if process.returncode != -9:
            assert process.returncode == 0
            break
        count += 1
        events = cqsa.events()
        if len(events) > before and events[-1]["event"] != "ended":
            lost = max(lost, moment - events[-1]["time"])
        found = cqsa.status() if (run / "run.json").exists() else None
        if found is not None:
            done = max((e.get("pairs_done", 0) for e in events if e["event"] == "checkpointed"), default=0)
            assert found["pairs_done"] >= done, "what a checkpoint said to be on disk is not there"
            assert found["pid"] is None
    return count, lost


def test_kills_at_random_instants(cqsa: Cqsa, made: Cqsa) -> None:
    count, lost = killed_until_done(cqsa, "cqs", 2, random.Random(5))
    assert count >= 1
    resume_and_compare(cqsa, made, "cqs")
    assert lost <= LOST_S, "seconds of work"


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_hundred_kills(schedule: str, made: Cqsa, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A hundred for each schedule, spread over as many runs as they take."""
    chance, kills, losses = random.Random(f"long {schedule}"), 0, [0.0]
    while kills < 100:
        folder = tmp_path_factory.mktemp("killed")
        (folder / "d").symlink_to(made.folder / "d")
        cqsa = Cqsa(folder, made.library)
        count, lost = killed_until_done(cqsa, schedule, min(8, 100 - kills), chance)
        kills += count
        losses.append(lost)
        resume_and_compare(cqsa, made, schedule)
    print(f"\n{schedule}: {kills} kills, most work lost {max(losses):.2f} s of {INTERVAL_S} s")
    assert max(losses) <= LOST_S, "seconds of work"
