"""Replacing files: writers do not meet, and what killed ones left is told from what living ones write."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.storage.atomic import replace_file, sweep, temporary_name
from cqsa_stream.storage.output import create_array, write_chunk
from tests.conftest import environment, left_over

PART = 50_000
WRITER = """
import os, signal, sys
from pathlib import Path
from cqsa_stream.storage.atomic import replace_file
os.fsync = lambda _: os.kill(os.getpid(), getattr(signal, sys.argv[2]))
replace_file(Path(sys.argv[1]), [b"half"])
"""


def replace_often(path: Path, letters: bytes, times: int = 60) -> None:
    """Replace a file by many of one letter, in parts, and look at it: what stands there is of one writer."""
    for number in range(times):
        letter = letters[number % len(letters) :][:1]
        replace_file(path, [letter * PART, letter * PART])
        found = path.read_bytes()
        assert len(found) == 2 * PART
        assert len(set(found)) == 1


def test_threads_that_replace_one_file(tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def work(letters: bytes) -> None:
        try:
            replace_often(tmp_path / "file", letters)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(letters,)) for letters in (b"ab", b"cd")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_processes_that_replace_one_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=replace_often, args=(tmp_path / "file", b)) for b in (b"ab", b"cd")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def write_half(path: Path, number: str) -> "subprocess.Popen[bytes]":
    """Start a process that sends itself a signal between writing a file and renaming it."""
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), number], env=environment())


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"before")
    process = write_half(tmp_path / "file", "SIGKILL")
    assert process.wait() == -signal.SIGKILL
    [left] = tmp_path.glob("*.tmp")
    assert left.read_bytes() == b"half"
    assert (tmp_path / "file").read_bytes() == b"before"
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_a_living_process_writes_is_kept_until_it_ends(tmp_path: Path) -> None:
    process = write_half(tmp_path / "file", "SIGSTOP")
    try:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        [left] = tmp_path.glob("*.tmp")
        sweep(tmp_path)
        assert left.exists()
    finally:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    sweep(tmp_path)
    assert not left.exists(), "a zombie writes nothing"
    process.wait()


def test_a_number_that_another_process_has_now_is_no_owner(tmp_path: Path) -> None:
    temporary = temporary_name(tmp_path / "file")
    host, boot, namespace, pid, start, token = owner(temporary)
    mine, before = (tmp_path / f"file.{host}-{boot}-{namespace}-{pid}-{n}-{token}" for n in (start, int(start) - 1))
    for path in (mine, before):
        path.touch()
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [mine]


def owner(temporary: Path) -> list[str]:
    return temporary.name.removeprefix("file.").split("-")


@pytest.mark.parametrize(
    ("part", "swept"), [("host", False), ("boot", True), ("pid namespace", False)], ids=["host", "boot", "namespace"]
)
@pytest.mark.parametrize("lives", [False, True])
def test_another(part: str, swept: bool, lives: bool, tmp_path: Path) -> None:
    """Only what was written here, be it before the machine was started anew, is known to have lost its writer."""
    parts = owner(temporary_name(tmp_path / "file"))
    if not lives:
        parts[4] = "1"
    place = ["host", "boot", "pid namespace"].index(part)
    parts[place] = "12345678" if place < 2 else str(int(parts[place]) + 1)
    left = tmp_path / f"file.{'-'.join(parts)}"
    left.touch()
    sweep(tmp_path)
    assert left.exists() is not swept


@pytest.mark.parametrize("name", ["run.json.tmp", "a.partial.tmp", "a.00000000-11111111-2-3-4-5.tmp", "x-1-2-3.tmp"])
def test_names_that_are_not_understood_are_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    sweep(tmp_path)
    assert (tmp_path / name).exists()


def test_what_cannot_be_swept_harms_nothing(tmp_path: Path) -> None:
    sweep(tmp_path / "none")
    (tmp_path / "file").touch()
    sweep(tmp_path / "file")
    left_over(tmp_path / "file").mkdir()
    sweep(tmp_path)


def test_a_chunk_sweeps_where_it_goes(tmp_path: Path) -> None:
    array = create_array(tmp_path / "a", (1, 1, 4, 8), "float32", (1, 1, 2, 8))
    left = left_over(tmp_path / "a/c/0/0/1/0")
    left.parent.mkdir(parents=True)
    left.touch()
    write_chunk(array, (0, 0, 1, 0), np.zeros((2, 8), np.float32))
    assert [p.name for p in left.parent.iterdir()] == ["0"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "inside").touch()
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "file"))):
        replace_file(tmp_path / "file", [b"x"])
    with pytest.raises(TypeError):
        replace_file(tmp_path / "other", [b"x", None])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_run_directory(tmp_path: Path) -> None:
    """What was left of beginning a run is not foreign, and is swept. News that cannot be written leave none."""
    directory = RunDirectory(tmp_path)
    (tmp_path / "results.zarr").mkdir()
    names = ("run.json", "state.json", "session.json", "results.zarr/zarr.json")
    for name in names:
        assert write_half(tmp_path / name, "SIGKILL").wait() == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*.tmp"))) == len(names)
    assert directory.foreign() == []
    (tmp_path / temporary_name(tmp_path / "other").name).touch()
    assert directory.foreign() == [p.name for p in tmp_path.glob("other.*")]
    (tmp_path / "session.json").mkdir()
    directory.write_session({})
    directory.sweep()
    assert [p.name.split(".")[0] for p in tmp_path.rglob("*.tmp")] == ["other"], "this process lives"
