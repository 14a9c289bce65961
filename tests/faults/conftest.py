"""Fixtures of the fault suite: inputs made once, the library that makes system calls fail, built once."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import SCHEDULES, Cqsa, options

TOKENS, HEADS = 12_000, 2


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built faulty.c."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: faults under system calls cannot be played")
    built = tmp_path_factory.mktemp("faulty") / "faulty.so"
    source = Path(__file__).with_name("faulty.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", str(built), str(source), "-ldl"], check=True)
    return built


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Cqsa:
    """A folder with the inputs in d, and in whole-<schedule> what uninterrupted runs give."""
    cqsa = Cqsa(tmp_path_factory.mktemp("made"), library)
    words = ("--tokens", TOKENS, "--heads", HEADS, "--head-dim", 64, "--dtype", "float32", "--chunk-tokens", 1000)
    assert cqsa("generate", "d", *words).returncode == 0
    for schedule in SCHEDULES:
        found = cqsa.run(f"whole-{schedule}", *options(schedule))
        assert found.returncode == 0, found.stderr
        assert cqsa.leftovers(f"whole-{schedule}") == []
    return cqsa


@pytest.fixture
def cqsa(made: Cqsa, tmp_path: Path) -> Iterator[Cqsa]:
    """The command line in an empty folder but for the inputs."""
    (tmp_path / "d").symlink_to(made.folder / "d")
    with Cqsa(tmp_path, made.library) as found:
        yield found
