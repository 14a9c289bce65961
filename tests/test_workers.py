"""Many workers in one run: the bits depend on the shares alone, whoever works, stops, dies, or comes back too late."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cqsa_stream.errors import InputError
from cqsa_stream.run.inputs import reopen_inputs
from cqsa_stream.run.working import place_of
from tests.conftest import ROOT, Cli, environment
from tests.holding import go_on
from tests.workers import QKV, Workers, bits, ended, leftovers

SMALL = ("--tokens", 3000, "--heads", 2, "--head-dim", 16, "--dtype", "float32", "--chunk-tokens", 500)
MASKS = {
    "full": (),
    "causal": ("--causal",),
    "window": ("--window", 700),
    "few": ("--causal", "--queries", "2488:3000"),
}
FIXED = ("--device", "cpu", "--host-memory", "400MiB", "--quiet", "--checkpoint-every", 0)


def begin(cli: Cli, schedule: str, *options: object, out: str = "out", shares: int = 6) -> tuple[object, ...]:
    """Make the inputs where there are none, create a run that nobody works in; return its options."""
    if not Path("d").exists():
        assert cli("generate", "d", *SMALL).returncode == 0
    words = (*FIXED, "--schedule", schedule, "--shares", shares, *options)
    created = cli("run", *QKV, out, *words, "--max-seconds", 0)
    assert created.returncode == 3, created.stderr
    return words


def alone(cli: Cli, words: tuple[object, ...]) -> tuple[bytes, bytes]:
    """Return what one process makes of the same shares."""
    found = cli("run", *QKV, "alone", *words, "--json")
    assert found.returncode == 0, found.stderr
    last = json.loads(found.stdout.splitlines()[-1])
    assert last["figures"]["rows_done"] == last["figures"]["rows_total"]
    assert cli("verify", "alone.run").returncode == 0
    assert leftovers(Path.cwd(), "alone") == []
    return bits(Path.cwd(), "alone")


@pytest.mark.parametrize(
    ("schedule", "mask", "count"),
    [
        ("cqs", "causal", 3),
        ("rectangular", "few", 2),
        *(
            pytest.param(schedule, mask, count, marks=pytest.mark.slow)
            for schedule in ("cqs", "rectangular")
            for mask in MASKS
            for count in (1, 2, 3, 8)
            if schedule != "cqs" or mask != "few"
        ),
    ],
)
def test_an_array_of_workers(schedule: str, mask: str, count: int, cli: Cli, tmp_path: Path) -> None:
    words = begin(cli, schedule, *MASKS[mask], shares=16 if mask == "few" else 6)
    status = json.loads(cli("status", "out.run", "--json").stdout)
    assert status["pairs_done"] == 0, "nothing is computed within 0 s"
    assert not status["complete"]
    with Workers(tmp_path) as workers:
        for process in [workers.work(f"{n}/{count}") for n in range(count)]:
            assert ended(process)[0] == 0
    assert bits(tmp_path) == alone(cli, words)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("schedule", ["cqs", pytest.param("rectangular", marks=pytest.mark.slow)])
def test_workers_of_one_command(schedule: str, cli: Cli, tmp_path: Path) -> None:
    words = begin(cli, schedule, "--causal")
    found = cli("run", *QKV, "out", *words, "--workers", 2, "--json")
    assert found.returncode == 0, found.stderr
    last = json.loads(found.stdout.splitlines()[-1])
    assert last["figures"]["pairs_done"] == last["figures"]["pairs_total"]
    assert last["figures"]["rows_done"] == last["figures"]["rows_total"]
    assert last["measured"]["bytes_read"] > 0, "what workers read is told"
    assert bits(tmp_path) == alone(cli, words)
    assert leftovers(tmp_path) == []


def test_two_workers_of_one_number(cli: Cli, tmp_path: Path) -> None:
    words = begin(cli, "cqs", "--causal")
    with Workers(tmp_path) as workers:
        for process in [workers.work("0/1") for _ in range(2)]:
            assert ended(process)[0] == 0
    assert bits(tmp_path) == alone(cli, words)


def test_a_worker_that_dies_is_replaced_by_the_others(cli: Cli, tmp_path: Path) -> None:
    words = begin(cli, "cqs", "--causal")
    with Workers(tmp_path) as workers:
        lost = workers.work("0/2", held_at=2)
        lost.kill()
        lost.communicate()
        done = json.loads(cli("status", "out.run", "--json").stdout)["pairs_done"]
        assert done, "what it had committed"
        other = workers.work("1/2", held_at=1)
        assert json.loads(cli("status", "out.run", "--json").stdout)["pairs_done"] >= done
        go_on(tmp_path)
        assert ended(other)[0] == 0
    assert bits(tmp_path) == alone(cli, words)
    assert leftovers(tmp_path) == []


def test_a_worker_of_a_silent_host_is_replaced_whatever_the_clocks_say(cli: Cli, tmp_path: Path) -> None:
    """Hosts an hour apart: what counts is the clock of the file system, by which one is silent for as long as it is."""
    words = begin(cli, "rectangular", "--causal")
    with Workers(tmp_path) as workers:
        lost = workers.work("0/2", held_at=1, HOST="first", CLOCK_JUMP=3600, SILENT_S=600)
        lost.kill()
        lost.communicate()
        patient = workers.work("1/2", HOST="second", CLOCK_JUMP=-3600, SILENT_S=600)
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("out.run/claims/*.done"))) < 5 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert patient.poll() is None, "it waits for what the lost one holds: nobody knows that it is lost"
        assert ended(workers.work("1/2", HOST="third", CLOCK_JUMP=7200, SILENT_S=0.5))[0] == 0
        assert ended(patient)[0] == 0
    assert bits(tmp_path) == alone(cli, words)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("schedule", ["cqs", pytest.param("rectangular", marks=pytest.mark.slow)])
def test_a_stopped_worker_that_wakes_does_no_harm(schedule: str, cli: Cli, tmp_path: Path) -> None:
    words = begin(cli, schedule, "--causal")
    with Workers(tmp_path) as workers:
        stopped = workers.work("0/2", held_at=2, SILENT_S=0.5)
        stopped.send_signal(signal.SIGSTOP)
        time.sleep(1)
        second = workers.work("0/2", held_at=2, SILENT_S=0.5)  # has taken over, and is in the middle of it
        stopped.send_signal(signal.SIGCONT)
        go_on(tmp_path)
        code, said = ended(stopped)
        assert (code, "taken over share" in said) == (0, True), said
        assert ended(second)[0] == 0
    assert bits(tmp_path) == alone(cli, words)
    assert leftovers(tmp_path) == []


def test_a_stopped_worker_wakes_when_all_is_done(cli: Cli, tmp_path: Path) -> None:
    words = begin(cli, "cqs", "--causal")
    with Workers(tmp_path) as workers:
        stopped = workers.work("0/2", held_at=2, SILENT_S=0.5)
        stopped.send_signal(signal.SIGSTOP)
        time.sleep(1)
        assert ended(workers.work("1/2", SILENT_S=0.5))[0] == 0
        expected = bits(tmp_path)
        stopped.send_signal(signal.SIGCONT)
        go_on(tmp_path)
        assert ended(stopped)[0] == 0
    assert bits(tmp_path) == expected == alone(cli, words)
    assert leftovers(tmp_path) == []


def test_a_stopped_worker_wakes_after_fresh(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run was begun anew, on other inputs of the same shape, and is complete or not."""
    words = begin(cli, "cqs", "--causal")
    with Workers(tmp_path) as workers:
        stopped = workers.work("0/2", held_at=2)
        refused = cli("run", *QKV, "out", *words, "--fresh")
        assert refused.returncode == 5, "it lives"
        assert f"process {stopped.pid}" in refused.stderr
        stopped.send_signal(signal.SIGSTOP)
        monkeypatch.setattr("cqsa_stream.storage.claims.SILENT_S", 0.0)
        shutil.rmtree("d")
        assert cli("generate", "d", *SMALL, "--seed", 7).returncode == 0
        assert cli("run", *QKV, "out", *words, "--fresh", "--max-seconds", 0).returncode == 3
        stopped.send_signal(signal.SIGCONT)
        go_on(tmp_path)
        code, said = ended(stopped)
        assert (code, "begun anew" in said) == (5, True), said
        assert json.loads(cli("status", "out.run", "--json").stdout)["pairs_done"] == 0
    assert cli("run", *QKV, "out", *words).returncode == 0
    assert bits(tmp_path) == alone(cli, words)
    assert leftovers(tmp_path) == []


def test_a_worker_stops_and_goes_on(cli: Cli, tmp_path: Path) -> None:
    words = begin(cli, "cqs", "--causal")
    with Workers(tmp_path) as workers:
        process = workers.work("0/1", held_at=2)
        process.send_signal(signal.SIGTERM)
        code, said = ended(process)
        assert code == 3, said
        assert not list((tmp_path / "out.run/workers").iterdir())
        assert cli("finish", "out.run").returncode == 3
        assert ended(workers.work("0/1"))[0] == 0
    found = cli("finish", "out.run")
    assert (found.returncode, "complete" in found.stderr) == (0, True)
    assert bits(tmp_path) == alone(cli, words)


def test_finish_merges_what_died_before_the_merge(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = begin(cli, "cqs", "--causal")
    with monkeypatch.context() as patch:
        for place in ("engine.loop", "run.sharing"):
            patch.setattr(f"cqsa_stream.{place}.merge_shares", lambda *_: None)
        assert cli("work", "out.run", "--quiet").returncode == 1, "nothing is merged"
    assert cli("finish", "out.run").returncode == 0
    assert bits(tmp_path) == alone(cli, words)
    assert leftovers(tmp_path) == []


def test_a_damaged_share_is_computed_again(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = begin(cli, "cqs", "--causal")
    with monkeypatch.context() as patch:
        for place in ("engine.loop", "run.sharing"):
            patch.setattr(f"cqsa_stream.{place}.merge_shares", lambda *_: None)
        cli("work", "out.run", "--quiet")
    partial = sorted((tmp_path / "out.run/partials").glob("*.partial"))[3]
    data = bytearray(partial.read_bytes())
    data[-9] ^= 4
    partial.write_bytes(data)
    assert cli("finish", "out.run").returncode == 3
    assert cli("work", "out.run", "--quiet").returncode == 0
    assert bits(tmp_path) == alone(cli, words)
    assert list((tmp_path / "out.run/partials").glob("*.damaged"))


def test_what_cannot_be(cli: Cli, tmp_path: Path) -> None:
    words = begin(cli, "cqs", "--causal")
    assert cli("work", "out.run", "--worker", "2/2").returncode == 2
    assert cli("work", "nothing.run").returncode == 2
    other = cli("run", *QKV, "out", *words[:-3], "--shares", 4, "--causal")
    assert other.returncode == 6
    assert "shares 6 (now 4)" in other.stderr
    for option, value in (("--schedule", "rectangular"), ("--kernel", "online")):
        other = cli("run", *QKV, "out", "--causal", option, value)
        assert other.returncode == 6
        assert f"(now {value})" in other.stderr
    assert cli("run", *QKV, "more", "--workers", 0).returncode == 2
    assert cli("run", *QKV, "more", "--address", "auto").returncode == 2
    assert cli("run", *QKV, "one", *FIXED, "--max-seconds", 0).returncode == 3
    assert cli("work", "one.run", "--quiet").returncode == 0, "a run of one share is resumed"


SLURM = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "5"}


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("1/4", SLURM, (1, 4)),
        (None, {}, (0, 1)),
        (None, {"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        (None, SLURM, (2, 3)),
        (None, {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "5", "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_STEP": "2"}, (4, 5)),
    ],
)  # fmt: skip
def test_the_place_of_a_worker(text: str | None, environment: dict[str, str], expected: tuple[int, int]) -> None:
    assert place_of(text, environment) == expected


@pytest.mark.parametrize("text", ["", "1", "a/b", "-1/4", "4/4", "1/4/2", "1/0", "٣/٤"])
def test_no_place_of_a_worker(text: str) -> None:
    with pytest.raises(InputError, match="expected"):
        place_of(text, {})


SBATCH = """#!/usr/bin/env python3
'''Run the tasks of an array at once, as Slurm would; task numbers in KILL get SIGTERM, those of DIE SIGKILL.'''
import os, signal, subprocess, sys, time
from pathlib import Path
array, script, *words = sys.argv[1:]
first, last = map(int, array.removeprefix("--array=").split("-"))
tasks = {}
for number in range(first, last + 1):
    slurm = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_MIN": str(first),
             "SLURM_ARRAY_TASK_COUNT": str(last - first + 1)}
    tasks[number] = subprocess.Popen(["bash", script, *words], env={**os.environ, **slurm}, start_new_session=True)
for variable, how in (("KILL", signal.SIGTERM), ("DIE", signal.SIGKILL)):
    for number in map(int, filter(None, os.environ.get(variable, "").split(","))):
        deadline = time.monotonic() + 100
        name, workers = '"name": "%d"' % (number - first), Path(words[0], "workers")
        while not any(name in path.read_text() for path in workers.glob("*.json")):
            if time.monotonic() > deadline or tasks[number].poll() is not None:
                break
            time.sleep(0.01)
        if how == signal.SIGTERM:
            tasks[number].send_signal(how)
        else:
            os.killpg(tasks[number].pid, how)
print([task.wait() for task in tasks.values()])
"""


def test_a_slurm_array_killed_and_submitted_again(cli: Cli, tmp_path: Path) -> None:
    """The script of the examples under an ``sbatch`` of our own: of five tasks three are killed, and it comes again."""
    words = begin(cli, "cqs", "--causal", shares=10)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (
        ("sbatch", SBATCH),
        ("scontrol", '#!/bin/bash\necho "$@" >> requeued\n'),
        ("cqsa", f"#!/bin/bash\nexec {sys.executable} -c 'from cqsa_stream.cli import main; main()' \"$@\"\n"),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    line = ["sbatch", "--array=3-7", str(ROOT / "examples/slurm/array.sh"), "out.run"]

    def submit(**killed: str) -> list[int]:
        env = {**environment(), "PATH": path, "OMP_NUM_THREADS": "1", **killed}
        found = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=True, timeout=300)
        codes: list[int] = json.loads(found.stdout)
        return codes

    first = submit(KILL="3,4", DIE="5")
    assert first[2] in (-9, 0), first
    assert set(first) <= {0, 3, -9}
    if 3 in first:
        assert (tmp_path / "requeued").read_text().startswith("requeue 17_")
    assert submit() == [0] * 5
    assert bits(tmp_path) == alone(cli, words)
    assert leftovers(tmp_path) == []


def test_a_late_worker_takes_nothing_of_a_run_begun_anew_for_damaged(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has read the manifest of the run before, and comes to the partials when the new run is complete."""
    words, name = begin(cli, "cqs", "--causal"), "cqsa_stream.run.working.reopen_inputs"

    def late(*args: object, **options: bool) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(name, reopen_inputs)
            found = reopen_inputs(*args, **options)  # type: ignore[arg-type]
            assert cli("run", *QKV, "out", *words, "--fresh").returncode == 0
        return found

    monkeypatch.setattr(name, late)
    found = cli("work", "out.run", "--quiet")
    assert (found.returncode, "begun anew" in found.stderr) == (5, True), found.stderr
    status = json.loads(cli("status", "out.run", "--json").stdout)
    assert status["complete"]
    assert not list((tmp_path / "out.run/partials").glob("*.damaged"))
