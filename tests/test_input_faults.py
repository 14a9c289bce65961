"""Inputs that go wrong before and during a run: a clear error, an exit code, nothing half-written taken for done."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import cqsa_stream as cqsa
from cqsa_stream.events import Event, Progressed
from cqsa_stream.storage.output import create_array, write
from tests.conftest import Cli

SHAPE = (1, 1, 18_000, 64)
QKV = ("q", "k", "v")


def make(folder: Path, codec: str = "crc32c") -> None:
    """Write inputs of more bytes than the budget below lets a run keep in memory."""
    for number, name in enumerate(QKV):
        values = np.random.default_rng(number).standard_normal(SHAPE, np.float32)
        write(create_array(folder / name, SHAPE, "float32", (1, 1, 3000, 64), codec), values)


def last_chunk(folder: Path) -> Path:
    return folder / "v/c/0/0/5/0"


def missing(file: Path) -> None:
    file.unlink()


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)


OPTIONS: Any = {"is_causal": True, "host_memory": "28MiB", "schedule": "rectangular", "chunks": 31, "device": "cpu"}
FAULTS: list[tuple[Callable[[Path], None], str, str]] = [
    (missing, "none", "missing"),
    (missing, "zstd", "missing"),
    (truncated, "none", "truncated"),
    (truncated, "zstd", "v"),
    (longer, "none", "not what was written"),
    (flipped, "crc32c", "crc32c"),
    (flipped, "zstd", "v"),
]


@pytest.mark.parametrize(("fault", "codec", "word"), FAULTS, ids=[f"{f.__name__} {c}" for f, c, _ in FAULTS])
def test_a_chunk_that_goes_wrong_during_a_run(
    fault: Callable[[Path], None], codec: str, word: str, tmp_path: Path
) -> None:
    make(tmp_path, codec)
    file = last_chunk(tmp_path)
    good = file.read_bytes()
    q, k, v = (tmp_path / name for name in QKV)
    before = cqsa.attention(q, k, v, out=tmp_path / "whole", **OPTIONS).read().result()

    def spoil(event: Event) -> None:
        if isinstance(event, Progressed) and file.exists() and file.read_bytes() == good:
            fault(file)

    with pytest.raises(cqsa.ArrayError, match=rf"value: .*{word}.*again") as caught:
        cqsa.attention(q, k, v, out=tmp_path / "out", observers=[spoil], **OPTIONS)
    assert caught.value.exit_code == 2
    assert codec == "zstd" or "v/c/0/0/5/0" in str(caught.value)
    status = cqsa.open_run(tmp_path / "out.run").status()
    assert not status["complete"]
    assert 0 < status["rows_done"] < status["rows_total"]
    file.write_bytes(good)
    after = cqsa.attention(q, k, v, out=tmp_path / "out", **OPTIONS).read().result()
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(("fault", "codec", "word"), FAULTS, ids=[f"{f.__name__} {c}" for f, c, _ in FAULTS])
def test_a_chunk_that_is_wrong_before(
    fault: Callable[[Path], None], codec: str, word: str, tmp_path: Path, cli: Cli
) -> None:
    make(tmp_path, codec)
    fault(last_chunk(tmp_path))
    found = cli("run", *QKV, "out", "--device", "cpu", "--host-memory", "64MiB")
    assert found.returncode == 2
    assert word in found.stderr
    assert "value: " in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.run").exists()


def test_a_missing_chunk_on_resume_is_told_before_work_begins(tmp_path: Path, cli: Cli) -> None:
    make(tmp_path)
    assert cli("run", *QKV, "out", "--device", "cpu", "--max-seconds", 0).returncode == 3
    missing(last_chunk(tmp_path))
    assert cli("run", *QKV, "out").returncode == 2
    assert json.loads(cli("status", "out.run", "--json").stdout)["sessions"] == 1


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float64"])
def test_8_bit_and_64_bit_inputs(dtype: str, tmp_path: Path, cli: Cli) -> None:
    words = ("--tokens", 2000, "--heads", 2, "--kv-heads", 1, "--head-dim", 32, "--dtype", dtype)
    assert cli("generate", "d", *words).returncode == 0
    run = ("run", *(f"d/{n}.zarr" for n in QKV), "out", "--causal", "--device", "cpu")
    ran = cli(*run, "--max-seconds", 0, "--chunks", 21)
    assert ran.returncode == 3, ran.stderr
    assert cli(*run).returncode == 0
    verified = json.loads(cli("verify", "out.run", "--json").stdout)
    assert verified["ok"]
    assert verified["tolerance"] < (1e-12 if dtype == "float64" else 1e-2)
    found = zarr.open_array(tmp_path / "out", mode="r")
    assert found.dtype.name == ("float64" if dtype == "float64" else "bfloat16")


@pytest.mark.parametrize("dtype", ["int8", "int32", "complex64", "bool"])
def test_other_numbers_are_refused(dtype: str, tmp_path: Path, cli: Cli) -> None:
    for name in QKV:
        zarr.create_array(tmp_path / name, data=np.ones((1, 1, 50, 8), dtype), config={"write_empty_chunks": True})
    found = cli("run", *QKV, "out")
    assert found.returncode == 2
    assert f"dtype {dtype}; expected one of float64, float32, float16, bfloat16, float8_e4m3fn" in found.stderr
