"""stdout and stderr that are closed, full, or read by nobody: the work is done all the same, and the exit code true."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import COMMAND, Cli, environment

QKV = ("d/q.zarr", "d/k.zarr", "d/v.zarr")
pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


@pytest.fixture
def data(cli: Cli) -> None:
    words = ("--tokens", 300, "--heads", 2, "--head-dim", 16, "--dtype", "float32")
    assert cli("generate", "d", *words).returncode == 0


def shell(folder: Path, *words: object, redirect: str) -> "subprocess.CompletedProcess[str]":
    """Run the command as a shell would that redirects its streams."""
    line = " ".join(f"'{word}'" for word in (*COMMAND, *map(str, words)))
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line} {redirect}"], cwd=folder, env=environment(), capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(
    ("redirect", "json_lines"),
    [
        ("2>&-", False), ("2>/dev/full", False), ("2> >(head -c 0)", True), ("<&- >&- 2>&-", True),
        (">/dev/full 2>/dev/full", True),
    ],
)  # fmt: skip
def test_a_run_completes_whoever_listens(redirect: str, json_lines: bool, cli: Cli, tmp_path: Path) -> None:
    words = ("run", *QKV, "out", "--device", "cpu", *(["--json"] if json_lines else []))
    found = shell(tmp_path, *words, redirect=redirect)
    assert found.returncode == 0, (found.stdout, found.stderr)
    assert json.loads(cli("status", "out.run", "--json").stdout)["complete"]
    assert json.loads(cli("verify", "out.run", "--json").stdout)["ok"]
    assert b"cqsa" not in (tmp_path / "out/zarr.json").read_bytes(), "no message went into a file that took its place"


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("command", ["plan", "status", "verify"])
@pytest.mark.parametrize("redirect", [">/dev/full", ">&-"])
def test_what_cannot_be_printed_is_a_failure(command: str, redirect: str, cli: Cli, tmp_path: Path) -> None:
    assert cli("run", *QKV, "out", "--device", "cpu").returncode == 0
    words = (command, *QKV, "o", "--device", "cpu") if command == "plan" else (command, "out.run")
    found = shell(tmp_path, *words, redirect=redirect)
    assert found.returncode == 1, found.stderr
    assert found.stderr.startswith("cqsa: ")
    assert len(found.stderr.splitlines()) == 1


@pytest.mark.usefixtures("data")
def test_errors_keep_their_code_where_nobody_reads_them(tmp_path: Path) -> None:
    for redirect in ("2>&-", "2>/dev/full"):
        assert shell(tmp_path, "run", "none", *QKV[1:], "out", redirect=redirect).returncode == 2


URLS = (
    "s3://bucket/o",
    "gs://bucket/o",
    "https://host/o",
    "http://host/o",
    "s3:/bucket/o",
    "memory://o",
    "file://host/o",
)


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("url", URLS)
def test_results_at_a_url_are_refused_before_any_work(url: str, cli: Cli, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    shape = ("--tokens", 10, "--heads", 1, "--head-dim", 8)
    for words in (
        ("run", *QKV, url), ("plan", *QKV, url), ("run", *QKV, "o", "--run-dir", url), ("run", *QKV, "o", "--lse", url),
        ("generate", url, *shape), ("status", url), ("verify", url),
    ):  # fmt: skip
        found = cli(*words)
        assert found.returncode == 2, words
        assert "path" in found.stderr
        assert len(found.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "nothing is written"


@pytest.mark.usefixtures("data")
def test_a_file_url_and_a_tilde_are_paths(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    assert cli("run", *QKV, f"file://{tmp_path}/a", "--lse", "~/lse").returncode == 0
    assert cli("status", f"file://localhost{tmp_path}/a.run").returncode == 0
    assert (tmp_path / "home/lse/zarr.json").exists()
    assert cli("generate", "~/d", "--tokens", 10, "--heads", 1, "--head-dim", 8).returncode == 0
    assert cli("run", "~/d/q.zarr", "~/d/k.zarr", "~/d/v.zarr", "~/out", "--run-dir", "~/run").returncode == 0
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"d", "lse", "out", "run"}
    assert not (tmp_path / "~").exists()
    assert not (tmp_path / "file:").exists()


@pytest.mark.usefixtures("data")
def test_a_name_that_is_not_utf_8_is_refused_clearly(cli: Cli) -> None:
    odd = os.fsdecode(b"odd-\xff")
    found = cli("run", *QKV, odd)
    assert found.returncode == 2
    assert "UTF-8" in found.stderr


@pytest.mark.usefixtures("data")
def test_a_run_begins_with_what_it_understood(cli: Cli) -> None:
    understood = "query 1 x 2 heads x 300 tokens x 16 float32, causal"
    assert cli("plan", *QKV, "o", "--causal").stdout.splitlines()[0] == understood
    ran = cli("run", *QKV, "o", "--causal")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d cqsa: (.*)", ran.stderr.splitlines()[0])[1] == understood  # type: ignore[index]
    assert cli("run", *QKV, "p", "--causal", "--quiet").stderr == ""


@pytest.mark.usefixtures("data")
def test_arrays_of_another_layout_are_noticed(cli: Cli, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import numpy as np

    for name in "qkv":
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).standard_normal((1, 300, 2, 16), np.float32))
    paths = ("q.npy", "k.npy", "v.npy")
    assert cli("run", *paths, "wrong").returncode == 0
    assert 'layout="bthd"' in caplog.text
    caplog.clear()
    assert cli("run", *paths, "right", "--layout", "bthd", "--max-seconds", 0).returncode in (0, 3)
    right = cli("run", *paths, "right", "--layout", "bthd")
    assert right.returncode == 0
    assert not caplog.records
    assert "2 heads x 300 tokens" in cli("plan", *paths, "--layout", "bthd").stdout
    assert json.loads(cli("verify", "right.run", "--json").stdout)["ok"]
    assert cli("run", *paths, "other", "--layout", "thd").returncode == 2


@pytest.mark.usefixtures("data")
def test_the_device_auto_inherits_what_the_last_session_had(cli: Cli) -> None:
    """It is the same device by another name."""
    words = ("--schedule", "rectangular", "--chunks", 13, "--checkpoint-every", 7)
    assert (
        cli("run", *QKV, "o", "--host-memory", "31MiB", "--device", "cpu", *words, "--max-seconds", 0).returncode == 3
    )
    ran = cli("run", *QKV, "o", "--device", "auto", "--json", "--quiet")
    assert ran.returncode == 0, ran.stderr
    plan = json.loads(ran.stdout.splitlines()[0])["plan"]
    assert plan["host_allowed_bytes"] == 31 * 2**20
    assert plan["schedule"] == "rectangular"


@pytest.mark.usefixtures("data")
def test_what_a_session_inherits_is_state(cli: Cli, tmp_path: Path) -> None:
    words = ("--host-memory", "31MiB", "--device", "cpu", "--chunks", 13)
    assert cli("run", *QKV, "o", *words, "--max-seconds", 0).returncode == 3
    (tmp_path / "o.run/events.jsonl").unlink()
    ran = cli("run", *QKV, "o", "--json", "--quiet")
    assert json.loads(ran.stdout.splitlines()[0])["plan"]["host_allowed_bytes"] == 31 * 2**20


@pytest.mark.usefixtures("data")
def test_verifys_tolerance_is_not_read_from_the_news(cli: Cli, tmp_path: Path) -> None:
    from cqsa_stream.run.directory import RunDirectory

    half = ("--tokens", 300, "--heads", 1, "--head-dim", 16, "--dtype", "float16")
    assert cli("generate", "e", *half).returncode == 0
    assert cli("run", *(f"e/{name}.zarr" for name in "qkv"), "o", "--device", "cpu").returncode == 0
    before = json.loads(cli("verify", "o.run", "--json").stdout)["tolerance"]
    RunDirectory(tmp_path / "o.run").append_event({"event": "told", "options": {"comment": "cuda"}})
    assert json.loads(cli("verify", "o.run", "--json").stdout)["tolerance"] == before


@pytest.mark.usefixtures("data")
def test_kernel_and_tile_belong_to_the_plan(cli: Cli) -> None:
    plan = json.loads(cli("plan", *QKV, "o", "--json").stdout)
    assert {"kernel", "operator", "tile"} <= set(plan)


@pytest.mark.usefixtures("data")
def test_watching_a_run_that_stopped_ends(cli: Cli) -> None:
    assert cli("run", *QKV, "o", "--max-seconds", 0, "--chunks", 13).returncode == 3
    found = cli("status", "o.run", "--watch", "--json")
    assert found.returncode == 0
    assert len(found.stdout.splitlines()) == 1
    assert "stopped" in found.stderr
    assert cli("run", *QKV, "o").returncode == 0
    found = cli("status", "o.run", "--watch")
    assert found.returncode == 0
    assert "stopped" not in found.stderr


@pytest.mark.usefixtures("data")
def test_watching_does_not_burden_the_run(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cqsa_stream as cqsa
    from cqsa_stream.storage.partials import PartialStore

    assert cli("run", *QKV, "o", "--max-seconds", 0, "--chunks", 13).returncode == 3
    past = time.time() - 60
    os.utime(tmp_path / "o.run/partials", (past, past))
    calls: list[str] = []
    covers = PartialStore.covers
    monkeypatch.setattr(PartialStore, "make_durable", lambda _: calls.append("fsync"))

    def counted(store: PartialStore) -> list[dict[int, int | None]]:
        calls.append("read")
        return covers(store)

    monkeypatch.setattr(PartialStore, "covers", counted)
    run = cqsa.open_run(tmp_path / "o.run")
    first = run.status(durable=False)
    assert [run.status(durable=False) for _ in range(3)] == [first] * 3
    assert calls == ["read"]
    assert run.status() == first
    assert calls == ["read", "read", "fsync"]


@pytest.mark.usefixtures("data")
def test_verify_says_that_a_run_is_incomplete(cli: Cli) -> None:
    words = ("--chunks", 13, "--schedule", "rectangular", "--causal", "--device", "cpu")
    assert cli("run", *QKV, "o", *words, "--max-seconds", 1e-3).returncode == 3
    for _ in range(200):
        if json.loads(cli("status", "o.run", "--json").stdout)["rows_done"]:
            break
        assert cli("run", *QKV, "o", "--causal", "--max-seconds", 1e-3, "--host-memory", "25MiB").returncode == 3
    found = cli("verify", "o.run", "--json")
    assert found.returncode == 0
    assert not json.loads(found.stdout)["complete"]
    assert "incomplete" in found.stderr


@pytest.mark.usefixtures("data")
def test_hanging_up_makes_a_checkpoint(cli: Cli, tmp_path: Path) -> None:
    words = ("--tokens", 20_000, "--heads", 2, "--head-dim", 64, "--dtype", "float32")
    assert cli("generate", "e", *words).returncode == 0
    long = [f"e/{name}.zarr" for name in "qkv"]
    process = subprocess.Popen(
        [*COMMAND, "run", *long, "o", "--chunks", "57", "--device", "cpu", "--json", "--quiet"],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    while json.loads(process.stdout.readline())["type"] != "progressed":
        assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    _, message = process.communicate(timeout=300)
    assert process.returncode == 3, message
    assert "stopped by SIGHUP" in message
    assert json.loads(cli("status", "o.run", "--json").stdout)["pairs_done"] > 0


@pytest.mark.usefixtures("data")
def test_an_interrupt_that_the_shell_ignores_is_ignored(cli: Cli, tmp_path: Path) -> None:
    """As `cmd &` in a script does it."""
    line = " ".join(
        f"'{word}'" for word in (*COMMAND, "run", *QKV, "o", "--chunks", "57", "--device", "cpu", "--quiet")
    )
    wait = "while [ ! -e o.run/events.jsonl ]; do sleep 0.05; done"
    script = f"trap '' INT; {line} & child=$!; {wait}; kill -INT $child; wait $child"
    found = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment(), check=False, timeout=300)
    assert found.returncode == 0
    assert json.loads(cli("status", "o.run", "--json").stdout)["complete"]
