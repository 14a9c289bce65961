"""Shared fixtures. Shapes in signatures are checked at run time here, and only here."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook(["cqsa_stream.partial", "cqsa_stream.kernels.torch_cpu", "cqsa_stream.kernels.reference"], "beartype.beartype")
settings.register_profile("cqsa", deadline=None, max_examples=60)
settings.load_profile("cqsa")

ROOT = Path(__file__).parents[1]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run ``cqsa`` as a user would, in a process of its own, in an empty folder."""

    def run(*words: object, timeout: float = 120) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-c", "from cqsa_stream.cli import main; main()", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=tmp_path,
            env=environment(),
            check=False,
        )

    return run


def environment() -> dict[str, str]:
    """The environment of a subprocess that finds the package whether or not it is installed."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}
