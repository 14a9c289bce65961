"""What users do by accident: two processes, other inputs, other problems, moved or read-only runs, wild clocks."""

import shutil
import socket
import subprocess

import numpy as np
import pytest
import zarr

from tests.faults.harness import QKV, SCHEDULES, Cqsa, is_root, kill, options
from tests.holding import go_on, wait_for


def stopped(cqsa: Cqsa, schedule: str = "cqs") -> None:
    """Leave a run half way, some of its rows finished."""
    assert cqsa.run("out", *options(schedule), faults="rename:*.partial:30:1:dead").returncode == -9
    found = cqsa.status()
    assert 0 < found["rows_done"] < found["rows_total"]


@pytest.mark.slow
@pytest.mark.parametrize("copied", [False, True])
def test_two_processes(copied: bool, cqsa: Cqsa, made: Cqsa) -> None:
    process = cqsa.held(*options("cqs"))
    try:
        if copied:  # a copy of the run directory names the same output
            shutil.copytree(cqsa.folder / "out.run", cqsa.folder / "copy.run", symlinks=True)
        found = cqsa.run("out", *options("cqs"), *(("--run-dir", "copy.run") if copied else ()))
        assert found.returncode == 5
        assert copied or f"process {process.pid} on {socket.gethostname()}" in found.stderr
        assert cqsa.status()["pid"] == process.pid
    finally:
        kill(process)
    assert cqsa.status()["pid"] is None
    assert cqsa.run("out", *options("cqs")).returncode == 0, "the lock of a dead process is free"
    assert cqsa.result() == made.result("whole-cqs")


def change_one_number(cqsa: Cqsa) -> None:
    array = zarr.open_array(cqsa.folder / "d/v.zarr", mode="r+")
    array[0, 1, 7777, 3] = np.asarray(array[0, 1, 7777, 3]) + np.float32(1e-3)


def other_dtype(cqsa: Cqsa) -> None:
    shutil.rmtree(cqsa.folder / "d")
    words = ("--tokens", 12_000, "--heads", 2, "--head-dim", 64, "--dtype", "bfloat16")
    assert cqsa("generate", "d", *words).returncode == 0


def other_shape(cqsa: Cqsa) -> None:
    shutil.rmtree(cqsa.folder / "d/k.zarr")
    zarr.create_array(cqsa.folder / "d/k.zarr", data=np.ones((1, 2, 11_000, 64), np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("change", [change_one_number, other_dtype, other_shape])
def test_inputs_that_changed(change: object, cqsa: Cqsa, made: Cqsa) -> None:
    (cqsa.folder / "d").unlink()
    shutil.copytree(made.folder / "d", cqsa.folder / "d")
    stopped(cqsa)
    before = sorted((p.name, p.read_bytes()) for p in (cqsa.folder / "out.run/partials").iterdir())
    assert callable(change)
    change(cqsa)
    found = cqsa.run("out", *options("cqs"))
    assert found.returncode == 6, found.stderr
    assert before == sorted((p.name, p.read_bytes()) for p in (cqsa.folder / "out.run/partials").iterdir())
    shutil.rmtree(cqsa.folder / "d")
    shutil.copytree(made.folder / "d", cqsa.folder / "d")
    assert cqsa.run("out", *options("cqs")).returncode == 0
    assert cqsa.result() == made.result("whole-cqs")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [("--scale", 0.5), ("--q-start", 5), ("--queries", "0:100"), ("--out-dtype", "bfloat16"), ("--chunks", 31)]
)
def test_another_problem(words: tuple[object, ...], cqsa: Cqsa) -> None:
    stopped(cqsa)
    fixed = [word for word in options("cqs") if words[0] != "--chunks" or word not in ("--chunks", 21)]
    found = cqsa.run("out", *fixed, *words)
    assert found.returncode == 6, found.stderr
    assert "began with" in found.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ["move", "copy"])
def test_a_run_that_is_elsewhere(how: str, cqsa: Cqsa, made: Cqsa) -> None:
    stopped(cqsa, "rectangular")
    place = cqsa.folder / "else" / "where"
    place.mkdir(parents=True)
    for name in ("out", "out.run"):
        if how == "move":
            (cqsa.folder / name).rename(place / name)
        else:
            shutil.copytree(cqsa.folder / name, place / name, symlinks=True)
    (place / "d").symlink_to(made.folder / "d")
    moved = Cqsa(place, cqsa.library)
    assert moved.run("out", *options("rectangular")).returncode == 0
    assert moved.result() == made.result("whole-rectangular")
    if how == "copy":
        assert not cqsa.status()["complete"]


@pytest.mark.slow
@pytest.mark.parametrize("complete", [False, True])
def test_a_run_directory_that_is_read_only(complete: bool, cqsa: Cqsa, made: Cqsa) -> None:
    if not is_root():
        pytest.skip("a read-only mount takes root")
    if complete:
        assert cqsa.run("out", *options("cqs")).returncode == 0
    else:
        stopped(cqsa)
    place = str(cqsa.folder / "out.run")
    if subprocess.run(["mount", "--bind", place, place], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True)
    try:
        found = cqsa.run("out", *options("cqs"))
        assert found.returncode == (0 if complete else 1), found.stderr
        assert complete or "Read-only file system: '" in found.stderr
        assert cqsa.status()["complete"] is complete
        assert cqsa("verify", "out.run", "--rows", 5).returncode == 0
    finally:
        subprocess.run(["umount", place], check=True)
    assert cqsa.run("out", *options("cqs")).returncode == 0
    assert cqsa.result() == made.result("whole-cqs")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("jump_s", [-400 * 86_400, 3600])
def test_a_clock_that_jumps(jump_s: int, schedule: str, cqsa: Cqsa, made: Cqsa) -> None:
    killed = cqsa.run("out", *options(schedule), faults="rename:*.partial:30:1:dead", FAULTS_CLOCK=jump_s)
    assert killed.returncode == -9
    process = cqsa.start("run", *QKV, "out", *options(schedule), FAULTS_CLOCK=jump_s)
    assert wait_for(cqsa.folder / "out.run/session.json", process)
    _, message = process.communicate(timeout=300)
    assert process.returncode == 0, message
    assert cqsa.result() == made.result(f"whole-{schedule}")
    found = cqsa.status()
    assert 0 < found["elapsed_s"] < 1800, "less than the clock jumps"


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_output_that_is_deleted_half_way(schedule: str, cqsa: Cqsa, made: Cqsa) -> None:
    stopped(cqsa, schedule)
    if schedule == "cqs":
        shutil.rmtree(cqsa.folder / "out")
    else:  # one chunk of it
        next(p for p in (cqsa.folder / "out/c").rglob("*") if p.is_file()).unlink()
    found = cqsa.run("out", *options(schedule))
    assert found.returncode == 0, found.stderr
    assert "computed again" in found.stderr
    assert cqsa.result() == made.result(f"whole-{schedule}")


@pytest.mark.slow
def test_an_output_that_is_deleted_while_it_is_written(cqsa: Cqsa, made: Cqsa) -> None:
    process = cqsa.held(*options("cqs"), at=100)
    assert (cqsa.folder / "out/c").exists()
    shutil.rmtree(cqsa.folder / "out", ignore_errors=True)
    go_on(cqsa.folder)
    _, message = process.communicate(timeout=300)
    assert process.returncode == 1, message
    assert "same command" in message or "No such file" in message
    assert cqsa.run("out", *options("cqs")).returncode == 0
    assert cqsa.result() == made.result("whole-cqs")
