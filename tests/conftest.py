"""Shared fixtures. Shapes in signatures are checked at run time here, and only here."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook(
    ["cqsa_stream.partial", "cqsa_stream.kernels.torch_cpu", "cqsa_stream.kernels.reference"], "beartype.beartype"
)
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
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(autouse=True)
def cold_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that a test has just written are read as those are that the page cache does not hold."""
    monkeypatch.setattr("cqsa_stream.storage.ranges.all_cached", lambda *_: False)
