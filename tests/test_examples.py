"""The examples, each run as a user runs it, at a size for tests."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Cli, environment

BILLION = {  # the stories of a billion tokens, at sizes for tests: what each says at its end, or draws
    "slice": (["--tokens", "60000", "--queries", "100", "--kills", "1", "--checkpoint-every", "0"], "verified"),
    "window": (["--tokens", "50000", "--checkpoint-every", "0", "--alone-tokens", "16384"], "verified"),
    "documents": (
        ["--tokens", "2e6", "--documents", "2000", "--run", "40000", "--checkpoint-every", "0"],
        "verified",
    ),
    "full": (["--from", "1024", "--to", "4096", "--unmeasured", "--times", "1", "--workers", "1,8"], "over_planned"),
    "memory": (["--tokens", "2^12,2^14", "--seconds", "2", "--files", "50"], "together_s"),
}
EXAMPLES = {
    "quickstart": (5_000, "the last row is that of torch's own attention"),
    "resume": (16_000, "the same bits as without the kill: True"),
    "remote_zarr": (3_000, "ok=True"),
    "sparse_ground_truth": (6_000, "relative error of the sparse method: median 0."),
    "huggingface_layer": (5_000, "the layer from disk is the layer in memory"),
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*EXAMPLES, "demo"}, "make demo runs the demo"


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_an_example(name: str, tmp_path: Path) -> None:
    tokens, said = EXAMPLES[name]
    words = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--tokens", str(tokens)]
    found = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment())
    assert found.returncode == 0, found.stderr
    assert said in found.stdout
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("name", sorted(BILLION))
def test_a_story_of_a_billion_tokens(name: str, tmp_path: Path) -> None:
    words, said = BILLION[name]
    command = [sys.executable, str(ROOT / f"examples/billion/{name}.py"), "data", "log", *words]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment())
    assert found.returncode == 0, found.stdout + found.stderr
    log = (tmp_path / "log/log.txt").read_text()
    assert said in log
    assert str(tmp_path) not in log
    assert json.loads((tmp_path / "log/figures.json").read_text())


def test_an_hour_of_the_whole_run(tmp_path: Path) -> None:
    """On most machines too long for its seconds: it is killed, resumed and stopped; on any, there is a log."""
    billion = ROOT / "examples/billion"
    env = environment()
    for words in (
        ["genome.py", "data", "--tokens", "200000", "--head-dim", "16"],
        ["hour.py", "data", "log", "--seconds", "16", "--host-memory", "26MiB", "--checkpoint-every", "1"],
    ):
        command = [sys.executable, str(billion / words[0]), *words[1:]]
        found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
        assert found.returncode == 0, found.stdout + found.stderr
    figures = json.loads((tmp_path / "log/figures.json").read_text())
    assert figures["flops_done"] > 0
    assert "data/all.zarr" in (tmp_path / "log/log.txt").read_text()


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_slurm_job_comes_again_until_the_run_is_complete(cli: Cli, tmp_path: Path) -> None:
    """The script of the examples under an ``sbatch`` of our own, which sends SIGTERM when the time is over."""
    assert cli("generate", "d", "--tokens", 20_000, "--heads", 2, "--head-dim", 64).returncode == 0
    tools = tmp_path / "tools"
    tools.mkdir()
    script(tools / "cqsa", f'exec "{sys.executable}" -m cqsa_stream "$@"')
    script(tools / "scontrol", f'echo "$@" >> {tmp_path}/requeued')
    script(
        tools / "sbatch",
        'script=$1; shift\nbash "$script" "$@" & job=$!\n'
        "while ! grep -q pairs_done out.run/session.json 2>/dev/null; do sleep 0.05; done\n"
        'if [ -n "$LIMIT" ]; then kill -TERM $job; fi\nwait $job',
    )

    def submit(limit: str) -> int:
        env = {**environment(), "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "LIMIT": limit}
        words = ["sbatch", str(ROOT / "examples/slurm/job.sh"), "d/q.zarr", "d/k.zarr", "d/v.zarr", "out"]
        more = ["--device", "cpu", "--host-memory", "30MiB", "--checkpoint-every", "1"]
        return subprocess.run([*words, *more], cwd=tmp_path, env=env, check=False, capture_output=True).returncode

    assert submit("1") == 3, "stopped, resumable"
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    assert submit("") == 0
    assert (tmp_path / "requeued").read_text() == "requeue 17\n", "once"
    assert cli("verify", "out").returncode == 0
