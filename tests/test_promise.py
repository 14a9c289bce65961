"""What users read of a plan: the table, the offenders, what is free, and afterwards prediction beside measurement."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from cqsa_stream.errors import BudgetError, FullDiskError
from cqsa_stream.observers.lines import side_by_side
from cqsa_stream.planning import refuse_what_is_not_there
from cqsa_stream.schedulers.search import make_plan
from cqsa_stream.storage.output import create_array, write
from tests.conftest import Cli
from tests.test_planner import MACHINE, MIB, allowed, request

INPUTS = ["d/q.zarr", "d/k.zarr", "d/v.zarr"]


def test_the_table_marks_the_chosen_and_the_offenders() -> None:
    plan = make_plan(request(60_000, causal=True), MACHINE)
    lines = str(plan).splitlines()
    chosen = [line for line in lines if line.startswith("*")]
    assert len(chosen) == 1
    assert plan.schedule in chosen[0]
    assert chosen[0].endswith("chosen")
    assert {line.split()[0] for line in lines if line.startswith("  ") and "GiB" not in line} >= {"rectangular"}
    assert "OVER BUDGET" not in str(plan)
    over = make_plan(request(60_000, causal=True), allowed(20 * MIB))
    assert str(over).count("OVER BUDGET") == 3, "the pool and both candidates"
    assert f"the smallest that would do: host {over.least.host_bytes / MIB:.1f} MiB" in str(over)


def test_candidates_carry_the_same_figures(cli: Cli) -> None:
    assert cli("generate", "d", "--tokens", 3000, "--heads", 1, "--head-dim", 16).returncode == 0
    found = json.loads(cli("plan", *INPUTS, "o", "--json", "--device", "cpu").stdout)
    assert {candidate["schedule"] for candidate in found["candidates"]} == {"cqs", "rectangular"}
    for candidate in found["candidates"]:
        assert set(candidate) == set(found) - {"candidates"}
    same = next(c for c in found["candidates"] if c["schedule"] == found["schedule"])
    assert same == {name: value for name, value in found.items() if name != "candidates"}
    assert found["disk_projected_bytes"] < found["disk_free_bytes"]
    assert found["host_reserved_bytes"] < found["host_least_bytes"] <= found["host_projected_bytes"]


def test_what_the_machine_has_not_got_is_refused() -> None:
    plan = make_plan(request(60_000), dataclasses.replace(MACHINE, host_free_bytes=2**30, disk_free_bytes=2**40))
    refuse_what_is_not_there(plan)
    held = plan.footprint
    with pytest.raises(BudgetError, match=r"host memory: .* MiB needed, 10.0 MiB free; allow less \(host_memory="):
        refuse_what_is_not_there(dataclasses.replace(plan, host_free_bytes=10 * MIB))
    with pytest.raises(FullDiskError, match=f"disk: {held.disk_bytes / MIB:.1f} MiB needed, 1.0 MiB free"):
        refuse_what_is_not_there(dataclasses.replace(plan, disk_free_bytes=MIB))
    assert "disk: " in str(dataclasses.replace(plan, disk_free_bytes=MIB))


def test_too_small_a_disk_is_told_before_anything_is_written(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("generate", "d", "--tokens", 3000, "--heads", 1, "--head-dim", 16).returncode == 0
    monkeypatch.setattr("cqsa_stream.machine.budgets._free_disk_bytes", lambda _: 1000)
    refused = cli("run", *INPUTS, "o", "--device", "cpu")
    assert refused.returncode == 3
    assert "MiB needed, 0.0 MiB free" in refused.stderr
    assert not Path("o").exists()
    assert not Path("o.run").exists()
    monkeypatch.undo()


def test_prediction_stands_beside_measurement(cli: Cli) -> None:
    assert cli("generate", "d", "--tokens", 3000, "--heads", 1, "--head-dim", 16).returncode == 0
    done = cli("run", *INPUTS, "o", "--device", "cpu")
    assert "measured (predicted): took" in done.stderr
    status = json.loads(cli("status", "o.run", "--json").stdout)
    assert set(status["predicted"]) == set(status["measured"])
    assert status["predicted"]["bytes_read"] == status["measured"]["bytes_read"] > 0
    assert status["predicted"]["bytes_written"] == status["measured"]["bytes_written"] > 0
    text = cli("status", "o.run").stdout
    assert side_by_side(status["predicted"], status["measured"]) in text
    events = [json.loads(line) for line in Path("o.run/events.jsonl").read_text().splitlines()]
    assert events[-1]["predicted"] == {**status["predicted"], "device_bytes": 0}
    assert events[-1]["measured"]["bytes_read"] == status["measured"]["bytes_read"]


@pytest.mark.parametrize(("heads", "kv_heads", "stored"), [(6, 3, 3), (12, 4, 4), (4, 4, 4), (8, 2, 1)])
def test_stored_chunks_that_hold_several_heads(heads: int, kv_heads: int, stored: int, cli: Cli) -> None:
    for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        values = np.random.default_rng(0).standard_normal((1, count, 700, 8), dtype=np.float32)
        write(
            create_array(Path("d") / f"{name}.zarr", values.shape, "float32", (1, min(stored, count), 100, 8)), values
        )
    assert cli("run", *INPUTS, "o", "--device", "cpu").returncode == 0
    status = json.loads(cli("status", "o.run", "--json").stdout)
    assert status["predicted"]["bytes_read"] == status["measured"]["bytes_read"]


@pytest.mark.parametrize("schedule", ["cqs", "rectangular"])
@pytest.mark.parametrize("inner", [None, (1, 1, 4096, 64)])
def test_bytes_and_memory_of_chunks_with_a_checksum(
    inner: tuple[int, ...] | None, schedule: str, cli: Cli, tmp_path: Path
) -> None:
    for name, heads in (("q", 2), ("k", 1), ("v", 1)):
        values = np.random.default_rng(0).standard_normal((1, heads, 20_000, 64), dtype=np.float32)
        path = tmp_path / "d" / f"{name}.zarr"
        write(create_array(path, values.shape, "float32", (1, 1, 8192, 64), "crc32c", inner), values)
    words = ("--causal", "--schedule", schedule, "--device", "cpu", "--host-memory", "36MiB")
    assert cli("run", *INPUTS, "o", *words).returncode == 0
    status = json.loads(cli("status", "o.run", "--json").stdout)
    assert status["predicted"]["bytes_read"] == status["measured"]["bytes_read"]
    assert status["measured"]["host_bytes"] <= status["predicted"]["host_bytes"] <= 36 * MIB


def test_a_billion_tokens_are_planned_from_metadata(cli: Cli, tmp_path: Path) -> None:
    for name in "qkv":
        create_array(tmp_path / "d" / f"{name}.zarr", (1, 1, 10**9, 64), "bfloat16", (1, 1, 32_768, 64), "none")
    done = cli("plan", *INPUTS, "--causal", "--device", "cpu", "--host-memory", "64GiB", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["flops"] == 256 * (10**9 * (10**9 + 1) // 2)
    assert found["host_projected_bytes"] <= 64 * 2**30
    assert found["disk_projected_bytes"] > 10**9 * 132


def test_plan_takes_the_options_of_run(cli: Cli) -> None:
    assert cli("generate", "d", "--tokens", 3000, "--heads", 1, "--head-dim", 16).returncode == 0
    words = ("--checkpoint-every", 5, "--max-seconds", 9, "--lse", "l", "--run-dir", "r", "--fresh")
    assert cli("plan", *INPUTS, "o", "--device", "cpu", *words).returncode == 0
    assert not Path("r").exists()
