"""Durability: real processes killed at real moments, then resumed, end bit-identical to an uninterrupted run."""

import dataclasses
import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import cqsa_stream as cqsa
from cqsa_stream.run.directory import RunDirectory
from tests.conftest import Cli, environment, stopping_after
from tests.holding import HELD, HOLDING, wait_for
from tests.reference import dense, inputs

TOKENS, HEADS = 6000, 2
QKV = ("d/q.zarr", "d/k.zarr", "d/v.zarr")


@pytest.fixture
def data(cli: Cli) -> None:
    words = ("--tokens", TOKENS, "--heads", HEADS, "--head-dim", 64, "--dtype", "float32", "--chunk-tokens", 1000)
    assert cli("generate", "d", *words).returncode == 0


def held(tmp_path: Path, out: str, *words: object) -> "subprocess.Popen[str]":
    """Return the process of a run that is held at a safe point now."""
    process = subprocess.Popen(
        [*HOLDING, "run", *QKV, out, *map(str, words)],
        cwd=tmp_path,
        env={**environment(), "HOLD_AT": "5"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert wait_for(tmp_path / HELD, process), process.communicate()
    return process


def result(path: Path) -> tuple[bytes, bytes]:
    return tuple(
        np.asarray(zarr.open_array(where, mode="r")[...]).tobytes()
        for where in (path, path.with_name(path.name + ".run") / "lse.zarr")
    )  # type: ignore[return-value]


@pytest.mark.usefixtures("data")
def test_what_status_calls_done_is_not_computed_again(cli: Cli, tmp_path: Path) -> None:
    with stopping_after(12):
        assert cli("run", *QKV, "out", "--chunks", 31).returncode == 3
    before = json.loads(cli("status", "out.run", "--json").stdout)
    assert 0 < before["pairs_done"] < before["pairs_total"]
    finished = cli("run", *QKV, "out", "--json", "--quiet")
    events = [json.loads(line) for line in finished.stdout.splitlines()]
    assert events[0]["figures"]["pairs_done"] == before["pairs_done"]
    assert events[-1]["figures"]["session_flops"] == before_total(before) - before["flops_done"]


def before_total(status: dict[str, int]) -> int:
    assert status["chunks"] == 31
    return 2 * 128 * HEADS * TOKENS * TOKENS


@pytest.mark.usefixtures("data")
def test_resume_under_another_schedule_and_budget_is_exact(cli: Cli, tmp_path: Path) -> None:
    with stopping_after(12):
        assert cli("run", *QKV, "out", "--causal", "--schedule", "cqs", "--chunks", 21).returncode == 3
    words = ("--schedule", "rectangular", "--device", "cpu", "--host-memory", "30MiB")
    with stopping_after(7):
        assert cli("run", *QKV, "out", "--causal", *words).returncode == 3
    assert cli("run", *QKV, "out", "--causal", "--schedule", "cqs").returncode == 0
    assert json.loads(cli("verify", "out.run", "--json").stdout)["ok"]


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 3)])
def test_a_signal_stops_at_a_checkpoint(number: signal.Signals, code: int, cli: Cli, tmp_path: Path) -> None:
    process = held(tmp_path, "out", "--chunks", 21)
    process.send_signal(number)
    _, message = process.communicate(timeout=300)
    assert process.returncode == code, message
    assert "same command resumes" in message
    stopped = json.loads(cli("status", "out.run", "--json").stdout)
    assert 0 < stopped["pairs_done"] < stopped["pairs_total"]
    assert cli("run", *QKV, "out").returncode == 0


@pytest.mark.usefixtures("data")
def test_one_process_at_a_time(cli: Cli, tmp_path: Path) -> None:
    process = held(tmp_path, "out", "--chunks", 21)
    try:
        status = json.loads(cli("status", "out.run", "--json").stdout)
        assert status["pid"] == process.pid
        refused = cli("run", *QKV, "out")
        assert refused.returncode == 5
        assert str(process.pid) in refused.stderr
    finally:
        process.kill()
        process.communicate()
    assert cli("run", *QKV, "out", "--max-seconds", 0).returncode == 3, "the lock of a dead process is free"


@pytest.mark.usefixtures("data")
def test_damaged_partials_are_computed_again(cli: Cli, tmp_path: Path) -> None:
    words = ("--chunks", 21, "--schedule", "cqs")
    assert cli("run", *QKV, "whole", *words).returncode == 0
    assert cli("run", *QKV, "out", *words, "--max-seconds", 1e-3).returncode == 3
    files = sorted((tmp_path / "out.run" / "partials").iterdir(), key=lambda p: -p.stat().st_size)
    for file, place in zip(files[:3], (200, 4097, -5), strict=True):
        data = bytearray(file.read_bytes())
        data[place] ^= 1
        file.write_bytes(data)
    assert cli("run", *QKV, "out").returncode == 0
    assert json.loads(cli("verify", "out.run", "--json").stdout)["ok"]


@pytest.mark.usefixtures("data")
def test_an_output_that_is_gone_is_computed_again(cli: Cli, tmp_path: Path) -> None:
    words = ("--causal", "--chunks", 21, "--schedule", "rectangular", "--device", "cpu", "--host-memory", "30MiB")
    assert cli("run", *QKV, "whole", *words).returncode == 0
    with stopping_after(40):
        assert cli("run", *QKV, "out", *words).returncode == 3
    assert json.loads(cli("status", "out.run", "--json").stdout)["rows_done"] > 0
    subprocess.run(["rm", "-r", str(tmp_path / "out")], check=True)
    assert cli("run", *QKV, "out", *words).returncode == 0
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_the_python_call_resumes_too(tmp_path: Path) -> None:
    q, k, v = inputs("normal", torch.float32, 1, 1, 3000, 32)
    out = tmp_path / "out"
    with pytest.raises(cqsa.RunStopped):
        cqsa.attention(q, k, v, is_causal=True, out=out, chunks=21, schedule="cqs", max_seconds=0.0)
    run = cqsa.open_run(tmp_path / "out.run")
    assert not run.status()["complete"]
    with pytest.raises(cqsa.InputError, match="in memory"):
        run.resume()
    stored, lse = cqsa.attention(q, k, v, is_causal=True, out=out, schedule="cqs", return_lse=True)
    expected, expected_lse = cqsa.attention(q, k, v, is_causal=True, return_lse=True, chunks=21, schedule="cqs")
    assert run.status()["complete"]
    np.testing.assert_array_equal(stored.read().result(), expected.numpy())
    np.testing.assert_array_equal(lse.read().result(), expected_lse.numpy())


def test_a_run_is_resumed_from_its_directory(cli: Cli, tmp_path: Path) -> None:
    words = ("--tokens", 2000, "--heads", 1, "--head-dim", 32, "--dtype", "bfloat16", "--codec", "crc32c")
    assert cli("generate", "d", *words).returncode == 0
    assert cli("run", *QKV, "out", "--causal", "--max-seconds", 0, "--out-dtype", "float32").returncode == 3
    run = cqsa.open_run(tmp_path / "out.run").resume()
    assert run.status()["complete"]
    assert run.verify(rows=20).ok
    assert run.output().dtype.name == "float32"


def test_a_run_can_be_moved(cli: Cli, tmp_path: Path) -> None:
    words = ("--tokens", 2000, "--heads", 1, "--head-dim", 32)
    assert cli("generate", "d", *words).returncode == 0
    assert cli("run", *QKV, "a/out", "--max-seconds", 0).returncode == 3
    (tmp_path / "a").rename(tmp_path / "b")
    assert cli("run", *QKV, "b/out").returncode == 0
    assert json.loads(cli("verify", "b/out.run", "--json").stdout)["ok"]


@pytest.mark.usefixtures("data")
def test_every_partial_damaged_at_once_is_survived(cli: Cli, tmp_path: Path) -> None:
    budget = ("--device", "cpu", "--host-memory", "48MiB")
    words = ("--chunks", 7, "--schedule", "rectangular", *budget, "--max-seconds", 1e-3)
    for _ in range(2):
        assert cli("run", *QKV, "out", *words).returncode == 3
    damaged = [p for p in (tmp_path / "out.run" / "partials").iterdir() if p.stat().st_size > 4096]
    assert damaged
    for file in damaged:
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(data)
    assert cli("run", *QKV, "out").returncode == 0
    assert json.loads(cli("verify", "out.run", "--json").stdout)["ok"]


def test_what_a_file_says_of_an_empty_chunk_counts_for_nothing(tmp_path: Path) -> None:
    """57 chunks of 50 tokens: those past the end are no rows, whatever a file says that looks like one of the run."""
    tensors = inputs("normal", torch.float32, 1, 1, 50, 8)
    options: Any = {"chunks": 57, "device": "cpu", "out": tmp_path / "out"}
    with pytest.raises(cqsa.RunStopped):
        cqsa.attention(*tensors, max_seconds=0, **options)
    directory = RunDirectory(tmp_path / "out.run")
    store = directory.store(directory.manifest())
    store.prepare()
    store.sums = [dataclasses.replace(store.sums[0], chunks=57)]
    for chunk in range(50, 57):
        store.finish(0, 0, chunk, 1)
    found = torch.from_numpy(cqsa.attention(*tensors, **options).read().result())
    torch.testing.assert_close(found.double(), dense(*tensors)[0], rtol=2e-5, atol=2e-6)
    assert cqsa.open_run(tmp_path / "out.run").status()["complete"]
    assert len(store.covers()[0]) == 57
    assert len(directory.store(directory.manifest()).covers()[0]) == 50


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("place", ["out", "out.run/lse.zarr"])
def test_an_array_that_was_not_quite_created_is_created(place: str, cli: Cli, tmp_path: Path) -> None:
    assert cli("run", *QKV, "out", "--max-seconds", 0).returncode == 3
    shutil.rmtree(tmp_path / place)
    (tmp_path / place).mkdir()
    assert cli("run", *QKV, "out").returncode == 0
    assert json.loads(cli("verify", "out.run", "--json").stdout)["ok"]


def test_a_torn_event_log_loses_one_line(cli: Cli, tmp_path: Path) -> None:
    assert cli("generate", "d", "--tokens", 2000, "--heads", 1, "--head-dim", 32).returncode == 0
    assert cli("run", *QKV, "out", "--max-seconds", 0).returncode == 3
    with (tmp_path / "out.run" / "events.jsonl").open("ab") as log:
        log.write(b'{"event": "checkp')
    assert cli("run", *QKV, "out").returncode == 0
    assert json.loads(cli("status", "out.run", "--json").stdout)["sessions"] == 2


def test_a_damaged_state_is_a_warning_and_a_new_plan(
    cli: Cli, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert cli("generate", "d", "--tokens", 500, "--heads", 1, "--head-dim", 32).returncode == 0
    for damage in ("cut", "gone", "forged", "endless"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert cli("run", *QKV, "out", "--max-seconds", 0, "--fresh", "--chunks", 7).returncode == 3
        state = tmp_path / "out.run/state.json"
        whole = state.read_bytes()
        state.unlink()
        if damage != "gone":
            data = {"cut": whole[:-40], "forged": b'{"format": 1}', "endless": b"[" * 500_000}
            state.write_bytes(data[damage])
        caplog.clear()
        assert cli("run", *QKV, "out").returncode == 0
        assert "state.json: damaged or missing" in caplog.text
        assert set(json.loads(state.read_bytes())) == set(json.loads(whole)), "it is written again"
        assert json.loads(cli("verify", "out.run", "--json").stdout)["ok"]


def test_a_damaged_manifest_is_told_and_fresh_starts_anew(cli: Cli, tmp_path: Path) -> None:
    assert cli("generate", "d", "--tokens", 500, "--heads", 1, "--head-dim", 32).returncode == 0
    assert cli("run", *QKV, "out").returncode == 0
    manifest = tmp_path / "out.run/run.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:-40])
    for command in (("run", *QKV, "out"), ("status", "out.run"), ("verify", "out.run")):
        found = cli(*command)
        assert found.returncode == 2
        assert "run.json: unreadable" in found.stderr
        assert "--fresh" in found.stderr
    assert cli("run", *QKV, "out", "--fresh").returncode == 2, "it cannot tell any more whose output this is"
    manifest.write_bytes(whole)
    assert cli("run", *QKV, "out").returncode == 0
    manifest.write_bytes(whole[:-40])
    shutil.rmtree(tmp_path / "out")
    assert cli("run", *QKV, "out", "--fresh").returncode == 0
