"""What a plan says of several workers: what each reads and holds, what is merged, when a shared disk is the limit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cqsa_stream as cqsa
from tests.conftest import Cli
from tests.workers import QKV

MIB = 2**20


def planned(tmp_path: Path, **options: Any) -> Any:
    array = tmp_path / "array.npy"
    np.save(array, np.zeros((1, 2, 20_000, 16), np.float32))
    words: dict[str, Any] = {"is_causal": True, "device": "cpu", "out": tmp_path / "out", **options}
    return cqsa.plan(array, array, array, **words)


def test_one_worker_has_no_crew(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    assert (plan.crew, plan.shares, plan.to_dict()["workers"]) == (None, 1, 1)


@pytest.mark.parametrize("schedule", ["cqs", "rectangular"])
def test_each_worker_has_its_part(schedule: str, tmp_path: Path) -> None:
    one, four = (planned(tmp_path, schedule=schedule, workers=n, executor="ray") for n in (1, 4))
    assert (one.shares, four.shares) == (4, 16)
    assert 4 * four.crew.bytes_read_each == pytest.approx(four.cost.bytes_read - four.crew.merge_bytes, rel=0.01)
    assert four.crew.host_bytes_each == four.footprint.host_bytes
    assert four.cost.seconds == four.crew.seconds
    assert four.crew.merge_s < four.crew.seconds < one.crew.seconds
    assert "4 for 16 shares" in str(four)


def test_what_is_merged(tmp_path: Path) -> None:
    """Rows that rectangular shares own are not; CQS's lie in several shares, and there are more of them with more."""
    assert planned(tmp_path, schedule="rectangular", workers=4).crew.merge_bytes == 0
    merged = [planned(tmp_path, schedule="cqs", shares=n, chunks=13).crew.merge_bytes for n in (4, 8, 26)]
    assert 0 < merged[0] < merged[1] < merged[2]
    plan = planned(tmp_path, schedule="cqs", shares=26, chunks=13, is_causal=False)
    assert plan.footprint.disk["partials of shares"] == plan.crew.merge_bytes
    quorums_of_a_row, rows = 4, 2 * 13
    file_bytes = 4096 + 2 + plan.grid.rows.chunk_tokens * (8 + 16 * 4)
    assert plan.crew.merge_bytes == quorums_of_a_row * rows * file_bytes


def test_few_rows_are_merged_from_ranges_of_columns(tmp_path: Path) -> None:
    plan = planned(tmp_path, queries=(19_744, 20_000), workers=4)
    assert plan.shares == 16
    assert plan.grid.columns.filled >= 8, "there is a range of columns for each share"
    assert plan.crew.merge_bytes > 0


def test_the_disk_that_all_share(tmp_path: Path) -> None:
    few, many = (planned(tmp_path, workers=n, executor="ray") for n in (2, 4096))
    assert few.crew.workers < few.crew.disk_limits_at
    assert many.crew.workers >= many.crew.disk_limits_at
    assert many.crew.seconds >= many.cost.bytes_read / 1e9, "nominal, of the disk"
    assert "is the limit where all share one" in str(many)


def test_local_workers_share_one_budget(cli: Cli) -> None:
    """That of the smallest plan for two, and what their leader holds."""
    words = ("--tokens", 9000, "--heads", 2, "--head-dim", 32, "--dtype", "float32")
    assert cli("generate", "d", *words).returncode == 0
    options = ("--causal", "--device", "cpu", "--schedule", "cqs", "--workers", 2)
    least = json.loads(cli("plan", *QKV, *options, "--json").stdout)["host_least_bytes"]
    budget = 2 * least + 21 * MIB
    assert cli("plan", *QKV, *options, "--host-memory", budget - 2 * MIB).returncode == 4
    found = cli("run", *QKV, "out", *options, "--host-memory", budget, "--json", "--quiet")
    assert found.returncode == 0, found.stderr
    ended = json.loads(found.stdout.splitlines()[-1])
    assert 0 < ended["measured"]["host_bytes"] <= ended["predicted"]["host_bytes"] + 21 * MIB <= budget


@pytest.mark.parametrize("shares", [3, 8])
@pytest.mark.parametrize("schedule", ["cqs", "rectangular"])
def test_what_shares_read_again_and_merge_is_counted(schedule: str, shares: int, cli: Cli) -> None:
    words = ("--tokens", 9000, "--heads", 2, "--head-dim", 64, "--dtype", "float32")
    assert cli("generate", "d", *words).returncode == 0
    options = ("--causal", "--device", "cpu", "--schedule", schedule, "--shares", shares, "--host-memory", "60MiB")
    found = cli("run", *QKV, "out", *options, "--json", "--quiet")
    assert found.returncode == 0, found.stderr
    ended = json.loads(found.stdout.splitlines()[-1])
    for name in ("bytes_read", "bytes_written"):
        assert ended["measured"][name] == pytest.approx(ended["predicted"][name], rel=0.1), name


def test_workers_need_a_place_to_meet() -> None:
    q = np.zeros((1, 1, 64, 8), np.float32)
    with pytest.raises(cqsa.InputError, match="workers without out"):
        cqsa.attention(q, q, q, workers=2)


def test_workers_need_paths(tmp_path: Path) -> None:
    q = np.zeros((1, 1, 64, 8), np.float32)
    with pytest.raises(cqsa.InputError, match="name paths"):
        cqsa.attention(q, q, q, workers=2, out=tmp_path / "out")
