"""Shared fixtures. Shapes in signatures are checked at run time here, and only here.

Plans depend on how many threads compute and on what ``cqsa bench`` found: the tests, and the processes that they start,
have two threads, and find nothing.
"""

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

CHECKED = ("cqsa_stream.kernels.fold", "cqsa_stream.kernels.torch_cpu", "cqsa_stream.kernels.reference")
if find_spec("beartype"):  # without it shapes are not checked
    install_import_hook(CHECKED, "beartype.beartype")
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "2"  # before torch is imported
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL), (signal.SIGHUP, signal.SIG_DFL),
):  # fmt: skip
    if signal.getsignal(_number) is signal.SIG_IGN:  # by who started the tests: nohup, or a shell in the background
        signal.signal(_number, _handler)
settings.register_profile("cqsa", deadline=None, max_examples=60)
settings.load_profile("cqsa")

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-c", "from cqsa_stream.cli import main; main()"]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run ``cqsa`` in an empty folder, in this process: starting one anew for each command would take minutes."""
    from cqsa_stream.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> "subprocess.CompletedProcess[str]":
        out, err, code = io.StringIO(), io.StringIO(), 0
        monkeypatch.setattr(sys, "argv", ["cqsa", *map(str, words)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return subprocess.CompletedProcess(list(map(str, words)), code, out.getvalue(), err.getvalue())

    return run


def environment() -> dict[str, str]:
    """The environment of a subprocess that finds the package whether or not it is installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


@contextlib.contextmanager
def stopping_after(steps: int) -> Iterator[None]:
    """Stop the runs of this process when they have passed so many safe points, whatever time that takes."""
    left = iter([None] * steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cqsa_stream.run.stopping.Stopper.__call__", lambda *_: next(left, "stopped"))
        yield


def left_over(path: Path) -> Path:
    """Return where a process that is dead by now would have written what was to become the file."""
    from cqsa_stream.storage.atomic import temporary_name

    host, boot, namespace, pid, _, token = temporary_name(path).name.removeprefix(f"{path.name}.").split("-")
    return path.with_name(f"{path.name}.{host}-{boot}-{namespace}-{pid}-1-{token}")


@pytest.fixture(autouse=True, scope="session")
def nothing_measured(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No calibration of this machine's user is found."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def cold_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that a test has just written are read as those are that the page cache does not hold."""
    monkeypatch.setattr("cqsa_stream.storage.readers.ranges.all_cached", lambda *_: False)
