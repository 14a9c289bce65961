"""Masks and scores in runs: counted, planned, called, stopped, killed, verified, from the command line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cqsa_stream as cqsa
from cqsa_stream.masks import Bands, Blocks, Chunked, Documents, Prefix, Strip, Window
from cqsa_stream.schedulers.grid import Axis
from cqsa_stream.schedulers.masks.arrays import scores
from cqsa_stream.schedulers.masks.calls import Packed, Tile, calls
from cqsa_stream.schedulers.masks.kinds import rule_of
from cqsa_stream.storage.open import open_array
from cqsa_stream.verification.verify import verify_rows
from tests.conftest import Cli, environment, stopping_after
from tests.masked import (
    BITMAP,
    CAUSAL,
    CU,
    DIAGONALS,
    KEY,
    MASKS,
    ROW,
    SINKS,
    SLOPES,
    TERMS,
    N,
    check,
    reference,
    stored,
)
from tests.reference import inputs


def test_work_is_counted_exactly_and_empty_pairs_are_not_read(tmp_path: Path) -> None:
    q, k, v = inputs("normal", torch.float32, 4, 2, N, 24)
    query, key, value = stored(tmp_path, {"q": q, "k": k, "v": v})
    for name, (mask, seen) in MASKS.items():
        options: dict[str, Any] = {"mask": mask, "enable_gqa": True, "device": "cpu", "schedule": "rectangular"}
        plan = cqsa.plan(query, key, value, out=tmp_path / "out", chunks=21, **options)
        rows, columns = plan.grid.rows, plan.grid.columns
        visible = int(seen.sum())
        assert plan.flops == 2 * (24 + 24) * 4 * visible, name
        assert plan.density == pytest.approx(visible / N**2), name
        needed = sum(
            bool(seen[rows.span(a).start : rows.span(a).stop, columns.span(b).start : columns.span(b).stop].any())
            for a in range(rows.filled) for b in range(columns.filled)
        )  # fmt: skip
        assert plan.pairs == 2 * needed, name
        cqsa.attention(query, key, value, out=tmp_path / "out", chunks=21, **options)
        status = cqsa.open_run(tmp_path / "out.run").status()
        assert status["bytes_read"] == plan.cost.bytes_read, name
        assert status["flops_done"] == plan.flops, name
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "out.run")
    assert "% of the scores are visible" in str(plan)


def test_a_hundred_thousand_documents_go_into_few_calls() -> None:
    tokens = 1 << 20
    cuts = np.random.default_rng(0).choice(tokens - 1, 10**5 - 1, replace=False) + 1
    q = torch.zeros(1, 1, 1, 8).expand(1, 1, tokens, 8)
    for mask in (Documents(np.sort(np.r_[0, cuts, tokens])), Documents(np.sort(np.r_[0, cuts, tokens])) & CAUSAL):
        plan = cqsa.plan(q, q, q, mask=mask, device="cpu", host_memory="1GiB", out="out")
        grid, tile = plan.grid, plan.layout.tile
        found = [
            call
            for row in range(grid.rows.filled)
            for column in grid.needed(row)
            for call in calls(grid.mask, grid.rows.span(row), grid.columns.span(column), tile)
        ]
        assert len(found) <= 2 * tokens / 4096
        visible = sum(scores(call.bands) for call in found if isinstance(call, Packed))
        visible += sum(grid.mask.scores(call.rows, call.columns) for call in found if not isinstance(call, Packed))
        assert visible == plan.scores


def test_bands_that_share_rows_are_shared_out_to_calls() -> None:
    mask = Blocks(np.random.default_rng(0).random((40, 40)) < 0.3, 4).over(range(160), 160)
    found = list(calls(mask, range(160), range(160), Tile(160, 160, 160, 160, small=100)))
    assert 1 < len(found) < len(mask) / 8
    assert all(isinstance(call, Packed) for call in found)


@pytest.mark.parametrize("schedule", ["cqs", "rectangular"])
@pytest.mark.parametrize("name", ["causal documents", "strip", "blocks of documents"])
def test_sessions_give_the_bits_of_one_session(name: str, schedule: str, tmp_path: Path) -> None:
    q, k, v = inputs("normal", torch.float32, 4, 2, N, 24)
    options: dict[str, Any] = {
        "mask": MASKS[name][0], "enable_gqa": True, "device": "cpu", "schedule": schedule, "chunks": 21,
        "host_memory": "64MiB", "return_lse": True, **TERMS["all"],
    }  # fmt: skip
    whole = cqsa.attention(q, k, v, out=tmp_path / "whole", **options)
    for steps in (0, 1, 3, 8):
        with stopping_after(steps), pytest.raises(cqsa.RunStopped):
            cqsa.attention(q, k, v, out=tmp_path / "parts", **options)
    parts = cqsa.attention(q, k, v, out=tmp_path / "parts", **options)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a.read().result().view(np.uint32), b.read().result().view(np.uint32))
    with stopping_after(5), pytest.raises(cqsa.RunStopped):
        cqsa.attention(q, k, v, out=tmp_path / "moved", **options)
    other = {"cqs": "rectangular", "rectangular": "cqs"}[schedule]
    out, lse = cqsa.attention(q, k, v, out=tmp_path / "moved", **{**options, "schedule": other, "host_memory": "40MiB"})
    expected = reference(q, k, v, MASKS[name][1], **TERMS["all"])
    check((torch.from_numpy(out.read().result()), torch.from_numpy(lse.read().result())), expected, torch.float32)


KILLED = """
import os, sys
import cqsa_stream as cqsa
from cqsa_stream.storage.partials import PartialStore
finish, left = PartialStore.finish, [int(sys.argv[1])]
def dying(*args):
    left[0] -= 1
    if left[0] < 0:
        os._exit(9)  # the output is written, the partial not yet replaced
    finish(*args)
PartialStore.finish = dying
cqsa.attention("q", "k", "v", out="out", mask=cqsa.masks.Strip(4, 30), sinks=[0.5, 2.0, -3.0, 0.0], enable_gqa=True,
               device="cpu", schedule=sys.argv[2], chunks=21, checkpoint_every_s=0.0)
"""


@pytest.mark.parametrize("schedule", ["cqs", "rectangular"])
def test_a_sink_joins_once_whatever_is_killed(schedule: str, tmp_path: Path) -> None:
    """Killed between writing a row, with its sink, and noting that it is finished."""
    q, k, v = inputs("normal", torch.float32, 4, 2, N, 24)
    stored(tmp_path, {"q": q, "k": k, "v": v})
    for survived in ("0", "3", "999"):
        found = subprocess.run(
            [sys.executable, "-c", KILLED, survived, schedule], cwd=tmp_path, env=environment(), check=False
        )
        assert found.returncode == (0 if survived == "999" else 9)
    run = cqsa.open_run(tmp_path / "out.run")
    assert run.status()["complete"]
    found_ = torch.from_numpy(run.output().read().result()), torch.from_numpy(run.lse().read().result())
    check(found_, reference(q, k, v, MASKS["strip"][1], sinks=(0.5, 2.0, -3.0, 0.0)), torch.float32)
    assert run.verify(rows=64).ok


def test_verify_finds_what_is_wrong(tmp_path: Path) -> None:
    """The check of the check: each mask and term is told from its neighbour."""
    q, k, v = inputs("normal", torch.float32, 2, 1, N, 16)
    query, key, value = stored(tmp_path, {"q": q, "k": k, "v": v})
    neighbours: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"mask": Documents([0, 100, 300])}, {"mask": Documents([0, 101, 300])}),
        ({"mask": Chunked(64)}, {"mask": Chunked(65)}),
        ({"mask": Prefix(9)}, {"mask": Prefix(10)}),
        ({"mask": Strip(3, 20)}, {"mask": Strip(4, 20)}),
        ({"mask": Window(9, 9)}, {"mask": Window(9, 10)}),
        ({"mask": Blocks(BITMAP, 32)}, {"mask": Blocks(~BITMAP, 32)}),
        ({"mask": Bands(DIAGONALS)}, {"mask": Bands(DIAGONALS[:2])}),
        ({"soft_cap": 2.0}, {"soft_cap": 2.001}),
        ({"alibi_slopes": [0.1, 0.2]}, {"alibi_slopes": [0.1, 0.201]}),
        ({"sinks": [1.0, 2.0]}, {"sinks": [1.0, 2.01]}),
    ]
    arrays = {name: open_array(path) for name, path in zip(("query", "key", "value"), (query, key, value), strict=True)}
    for ours, other in neighbours:
        runs = []
        for name, words in (("ours", ours), ("other", other)):
            cqsa.attention(query, key, value, out=tmp_path / name, enable_gqa=True, device="cpu", fresh=True, **words)
            runs.append(cqsa.open_run(tmp_path / f"{name}.run"))
        lse = runs[0].lse().read().result()
        for run, right in zip(runs, (True, False), strict=True):
            found = verify_rows(
                run.manifest.problem, arrays, open_array(tmp_path / "ours"), lambda *at, lse=lse: float(lse[at]),
                [{0}], Axis(N, N, 1), 2 * N, 0, rounded_tiles=False, damaged=0,
            )  # fmt: skip
            assert found.rows == 2 * N
            assert found.ok == right, ours


def test_the_command_line(cli: Cli, tmp_path: Path) -> None:
    q, k, v = inputs("normal", torch.float32, 4, 2, N, 24)
    stored(tmp_path, {"q": q, "k": k, "v": v})
    long = np.sort(np.r_[0, np.random.default_rng(0).choice(N - 1, 280, replace=False) + 1, N])
    np.save("long.npy", long)
    Path("cu.json").write_text(json.dumps(CU))
    Path("sinks.json").write_text(json.dumps(SINKS))
    np.save("alibi.npy", np.array(SLOPES))
    blocks = {"kind": "blocks", "bitmap": BITMAP.tolist(), "size": 32}
    Path("mask.json").write_text(json.dumps([blocks, {"kind": "window", "left": 50, "right": None}]))
    Path("one.json").write_text(json.dumps({"kind": "documents", "cu_seqlens": "cu.json"}))
    many = torch.from_numpy(np.searchsorted(long, np.arange(N), "right"))
    cases: list[tuple[list[object], Tensor, dict[str, Any]]] = [
        (["--documents", "cu.json", "--causal"], MASKS["causal documents"][1], {}),
        (["--documents", "long.npy"], many[:, None] == many, {}),
        (["--chunked", 64, "--causal", "--soft-cap", 5], MASKS["chunked"][1], {"soft_cap": 5.0}),
        (["--prefix", 33, "--alibi", "alibi.npy"], MASKS["prefix"][1], {"alibi_slopes": SLOPES}),
        (["--mask", "mask.json", "--sinks", "sinks.json"], MASKS["blocks"][1] & (KEY >= ROW - 50), {"sinks": SINKS}),
        (["--mask", "one.json", "--window", 7], MASKS["documents"][1] & (KEY <= ROW) & (KEY > ROW - 7), {}),
    ]  # fmt: skip
    for n, (words, seen, terms) in enumerate(cases):
        out = f"out{n}"
        plan = json.loads(cli("plan", "q", "k", "v", out, *words, "--device", "cpu", "--json").stdout)
        assert plan["density"] == pytest.approx(int(seen.sum()) / N**2)
        stopped = cli("run", "q", "k", "v", out, *words, "--device", "cpu", "--max-seconds", 0)
        assert stopped.returncode == 3, stopped.stderr
        done = cli("run", "q", "k", "v", out, *words, "--device", "cpu")
        assert done.returncode == 0, done.stderr
        run = cqsa.open_run(f"{out}.run")
        found = torch.from_numpy(run.output().read().result()), torch.from_numpy(run.lse().read().result())
        check(found, reference(q, k, v, seen, **terms), torch.float32)
        assert cli("verify", f"{out}.run").returncode == 0
    assert cli("run", "q", "k", "v", "out0", "--documents", "cu.json", "--device", "cpu").returncode == 6
    assert cli("run", "q", "k", "v", "out2", "--chunked", 64, "--causal", "--soft-cap", 6).returncode == 6
    wrong: list[list[object]] = [
        ["--mask", "sinks.json"],
        ["--chunked", 0],
        ["--documents", "no.npy"],
        ["--soft-cap", -1],
    ]
    for words in wrong:
        refused = cli("plan", "q", "k", "v", *words)
        assert refused.returncode == 2
        assert refused.stderr.startswith("cqsa: ")
        assert len(refused.stderr.splitlines()) == 1


def test_long_masks_are_kept_beside_the_manifest_and_checked(cli: Cli, tmp_path: Path) -> None:
    q, k, v = inputs("normal", torch.float32, 1, 1, 3_000, 8)
    stored(tmp_path, {"q": q, "k": k, "v": v})
    np.save("cu.npy", np.arange(0, 3_001, 5))
    words = ("q", "k", "v", "out", "--documents", "cu.npy", "--device", "cpu")
    assert cli("run", *words, "--max-seconds", 0).returncode == 3
    [kept] = Path("out.run/arrays").glob("*.npy")
    assert kept.stem in Path("out.run/run.json").read_text()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused = cli("run", *words)
    assert refused.returncode == 2
    assert "fails its checksum" in refused.stderr
    kept.unlink()
    assert cli("status", "out.run").returncode == 2
    kept.write_bytes(whole)
    assert cli("run", *words).returncode == 0
    assert cli("run", *words).returncode == 0, "complete"
    assert cli("run", *words, "--fresh").returncode == 0


def test_verify_believes_alibi_far_from_all_keys(tmp_path: Path) -> None:
    """Distances are counted from the nearest key there, too: float64 has no digits for large ones and small ones."""
    q, k, v = inputs("normal", torch.float64, 1, 1, 300, 8)
    query, key, value = stored(tmp_path, {"q": q, "k": k, "v": v})
    for start in (0, 1_000, 2**36):
        out = tmp_path / f"out{start}"
        cqsa.attention(query, key, value, out=out, device="cpu", q_start=start, alibi_slopes=[0.5])
        found = cqsa.open_run(f"{out}.run").verify(rows=300)
        assert found.ok
        assert found.tolerance < 1e-11


def test_runs_of_keys_that_end_far_away() -> None:
    """Rows 0 and 9 alone see keys, however far their runs go."""
    rule = rule_of([{"kind": "dense", "runs": [[0, 0, 2**61 - 2], [9, 0, 2**61 - 2]]}])
    assert rule.over(range(300), 300).bands[:4].T.tolist() == [[0, 1, 0, 300], [9, 10, 0, 300]]
    with pytest.raises(ValueError, match="runs"):
        rule_of([{"kind": "dense", "runs": [[-(2**63), 0, 1]]}])
    for runs in (5, None, [[1, 2]]):
        with pytest.raises(ValueError, match="runs"):
            rule_of([{"kind": "dense", "runs": runs}])
