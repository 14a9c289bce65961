"""Masks and scores end to end: exact against dense float64, planned, counted, resumed, verified, refused."""

import json
import math
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
from cqsa_stream.masks import Bands, Blocks, Chunked, Documents, Prefix, Rule, Strip, Window
from cqsa_stream.schedulers.grid import Axis
from cqsa_stream.schedulers.masks.calls import Packed, Tile, calls
from cqsa_stream.schedulers.masks.kinds import rule_of
from cqsa_stream.storage.open import open_array
from cqsa_stream.storage.output import create_array, write
from cqsa_stream.storage.readers.memory import MemoryArray
from cqsa_stream.verification.verify import verify_rows
from tests.conftest import Cli, environment, stopping_after
from tests.reference import error, inputs

N = 300
ROW, KEY = torch.arange(N)[:, None], torch.arange(N)
CU = [0, 1, 2, 40, 41, 130, 131, 131, 200, 280]  # the last 20 positions are in no document
DOCUMENT = torch.tensor([sum(start <= p for start in CU) if p < 280 else -p for p in range(N)])
SAME = (DOCUMENT[:, None] == DOCUMENT) & (DOCUMENT > 0)
BITMAP = np.random.default_rng(0).random((10, 10)) < 0.4
BITMAP[3] = False  # rows that see nothing
NOISE = torch.rand(N, N, generator=torch.Generator().manual_seed(0)) < 0.5
DIAGONALS = [(0, 100, 0, 50, None, 0), (0, 300, 50, 300, -10, 20), (150, 300, 0, 50, None, None)]
CAUSAL = Window(None, 0)
EVERYTHING = ROW + KEY >= 0


def by_bands() -> Tensor:
    found = torch.zeros(N, N, dtype=torch.bool)
    found |= (ROW < 100) & (KEY < 50) & (KEY <= ROW)
    found |= (KEY >= 50) & (KEY - ROW >= -10) & (KEY - ROW <= 20)
    return found | ((ROW >= 150) & (KEY < 50))


MASKS: dict[str, tuple[Rule | None, Tensor]] = {
    "full": (None, EVERYTHING),
    "documents": (Documents(CU), SAME),
    "causal documents": (Documents(CU) & CAUSAL, SAME & (KEY <= ROW)),
    "chunked": (Chunked(64) & CAUSAL, (ROW // 64 == KEY // 64) & (KEY <= ROW)),
    "prefix": (Prefix(33), (KEY < 33) | (KEY <= ROW)),
    "window": (Window(17, 5), (KEY >= ROW - 17) & (KEY <= ROW + 5)),
    "open window": (Window(None, 40), KEY <= ROW + 40),
    "strip": (Strip(4, 30), (KEY <= ROW) & ((KEY < 4) | (KEY > ROW - 30))),
    "blocks": (Blocks(BITMAP, 32), torch.from_numpy(BITMAP)[ROW // 32, KEY // 32]),
    "bands": (Bands(DIAGONALS), by_bands()),
    "blocks of documents": (
        Blocks(BITMAP, 32) & Documents(CU) & Window(50, None),
        torch.from_numpy(BITMAP)[ROW // 32, KEY // 32] & SAME & (KEY >= ROW - 50),
    ),
}
SLOPES, SINKS = (0.5, 0.1, 0.01, 2.0), (0.5, 100.0, -3.0, 0.0)
TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "soft cap": {"soft_cap": 5.0},
    "alibi": {"alibi_slopes": SLOPES},
    "sinks": {"sinks": SINKS},
    "all": {"soft_cap": 30.0, "alibi_slopes": SLOPES, "sinks": SINKS},
}


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    start: int = 0,
    scale: float | None = None,
    soft_cap: float | None = None,
    alibi_slopes: tuple[float, ...] = (),
    sinks: tuple[float, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Dense float64 attention by the definitions; a sink is a key without a value."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if alibi_slopes:
        distance = (torch.arange(q.shape[2])[:, None] + start - torch.arange(k.shape[2])).abs()
        scores = scores - torch.tensor(alibi_slopes).double()[:, None, None] * distance
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks:
        sink = torch.tensor(sinks).double()[:, None, None].expand(*scores.shape[:3], 1)
        scores, v = torch.cat([scores, sink], 3), torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)
    lse = torch.logsumexp(scores, 3)
    return torch.exp(scores - lse[..., None]).nan_to_num(nan=0.0) @ v, lse


def check(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """16-bit inputs are computed in float32, and rounded once."""
    difference = float((found[0].double() - expected[0]).norm())
    assert difference <= (2e-6 if dtype == torch.float32 else 2.1e-3) * float(expected[0].norm())
    blind = expected[1].isneginf()
    assert torch.equal(found[1].isneginf(), blind)
    assert torch.equal(found[0][blind], torch.zeros_like(found[0][blind]))
    torch.testing.assert_close(found[1][~blind].double(), expected[1][~blind], rtol=2e-6, atol=5e-6)


def stored(folder: Path, tensors: dict[str, Tensor]) -> list[str]:
    """Write tensors as arrays; return their paths."""
    paths = []
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        array = create_array(folder / name, tuple(tensor.shape), kind, (1, 1, 64, tensor.shape[3]), "none")
        for batch, head, start in np.ndindex(*tensor.shape[:2], -(-tensor.shape[2] // 64)):
            part = slice(start * 64, min(tensor.shape[2], (start + 1) * 64))
            write(array[batch, head, part], MemoryArray.of_tensor(tensor[batch, head, part]).values)
        paths.append(str(folder / name))
    return paths


def attended(paths: list[Any], name: str, terms: str, **options: Any) -> tuple[Any, Any]:
    query, key, value = paths
    words: dict[str, Any] = {"mask": MASKS[name][0], "enable_gqa": True, "device": "cpu", "return_lse": True}
    found: tuple[Any, Any] = cqsa.attention(query, key, value, **words, **TERMS[terms], **options)
    return found


def on_disk(folder: Path, tensors: tuple[Tensor, ...], name: str, terms: str, schedule: str) -> tuple[Tensor, Tensor]:
    """Return out and lse of a run from disk to disk that ``verify`` has checked."""
    paths = stored(folder, dict(zip("qkv", tensors, strict=True)))
    found = attended(paths, name, terms, out=folder / "out", schedule=schedule, chunks=7)
    assert cqsa.open_run(folder / "out.run").verify().ok
    out, lse = (torch.from_numpy(x.read().result().astype(np.float32)) for x in found)
    return out, lse


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_with_every_score_is_exact(name: str, terms: str, tmp_path: Path) -> None:
    number = list(MASKS).index(name) + list(TERMS).index(terms)
    schedules = ("cqs", "rectangular") if number % 4 < 2 else ("rectangular", "cqs")
    for n, (dtype, kv_heads) in enumerate([(torch.float32, 2), (torch.bfloat16, 4)]):
        schedule = schedules[n]
        tensors = inputs("normal", dtype, 4, kv_heads, N, 24)
        expected = reference(*tensors, MASKS[name][1], **TERMS[terms])
        check(attended([*tensors], name, terms, schedule=schedule, chunks=7), expected, dtype)
        if n == number % 2:
            check(on_disk(tmp_path, tensors, name, terms, schedule), expected, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("schedule", ["cqs", "rectangular"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_combination(dtype: torch.dtype, schedule: str, kv_heads: int, tmp_path: Path) -> None:
    for name in MASKS:
        for terms in TERMS:
            tensors = inputs("normal", dtype, 4, kv_heads, N, 24)
            expected = reference(*tensors, MASKS[name][1], **TERMS[terms])
            check(attended([*tensors], name, terms, schedule=schedule, chunks=7), expected, dtype)
            check(on_disk(tmp_path / name / terms, tensors, name, terms, schedule), expected, dtype)


def test_the_same_by_another_implementation() -> None:
    q, k, v = inputs("peaked", torch.float32, 4, 2, N, 24)
    for mask, seen in MASKS.values():
        found = cqsa.attention(q, k, v, mask=mask, kernel="online", enable_gqa=True, device="cpu", return_lse=True)
        expected = reference(q, k, v, seen)
        in_core = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        largest = float((q @ k.repeat_interleave(2, 1).transpose(2, 3)).abs().max()) * 24**-0.5
        allowed = max(2.0**-24 * (32 + largest), 1.1 * error(in_core.nan_to_num(0.0), expected[0]))
        assert error(found[0], expected[0]) <= allowed


@pytest.mark.parametrize(("queries", "keys", "start", "rows"), [
    (40, N, N - 40, None), (64, N, -20, None), (N, 40, 0, None), (50, 70, 7, (5, 20)), (20, 30, 1_000, None),
])  # fmt: skip
@pytest.mark.parametrize("name", MASKS)
def test_positions_are_absolute(name: str, queries: int, keys: int, start: int, rows: tuple[int, int] | None) -> None:
    mask, _ = MASKS[name]
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(2, 4, queries, 8, generator=generator)
    k, v = (torch.randn(2, 2, keys, 8, generator=generator) for _ in range(2))
    i, j = torch.arange(start, start + queries)[:, None], torch.arange(keys)
    there = (i >= 0) & (i < N) & (j < N)
    seen = there & MASKS[name][1][i.clamp(0, N - 1), j.clamp(0, N - 1)]
    if name in ("full", "window", "open window", "strip", "prefix"):  # which go on for ever
        seen = {
            "full": there | True, "window": (j >= i - 17) & (j <= i + 5), "open window": j <= i + 40,
            "strip": (j <= i) & ((j < 4) | (j > i - 30)), "prefix": (j < 33) | (j <= i),
        }[name]  # fmt: skip
    if name == "chunked":
        seen = (torch.div(i, 64, rounding_mode="floor") == j // 64) & (j <= i)
    part = slice(*rows) if rows else slice(None)
    terms = TERMS["all"]
    found = cqsa.attention(
        q, k, v, mask=mask, q_start=start, queries=rows, enable_gqa=True, return_lse=True, device="cpu", **terms
    )
    expected = reference(q, k, v, seen, start=start, **terms)
    check(found, (expected[0][:, :, part], expected[1][:, :, part]), torch.float32)


def test_a_boolean_mask_in_memory_becomes_bands() -> None:
    n = 90
    q, k, v = inputs("normal", torch.float32, 4, 2, n, 24)
    noise, all_ = NOISE[:n, :n], EVERYTHING[:n, :n]
    options: dict[str, Any] = {"enable_gqa": True, "device": "cpu"}
    for seen in (noise.tril(), all_.tril(3).triu(-9), noise[:1], noise[:, :1], noise[0], noise[None, None]):
        found = cqsa.attention(q, k, v, attn_mask=seen, return_lse=True, **options)
        check(found, reference(q, k, v, seen.expand(1, 1, n, n)), torch.float32)
    diagonal = cqsa.plan(q, k, v, attn_mask=all_.tril(3).triu(-9), **options)
    assert len(diagonal.grid.mask) <= 3, "rows that follow one another are one band"
    both = cqsa.attention(q, k, v, attn_mask=noise, is_causal=True, window=20, **options)
    key, row = torch.arange(n), torch.arange(n)[:, None]
    assert error(both, reference(q, k, v, noise & (key <= row) & (key > row - 20))[0]) <= 2e-6


def test_masks_that_cannot_be_are_refused(tmp_path: Path) -> None:
    q = torch.zeros(1, 2, 4, 8)
    for words, expected in (
        ({"attn_mask": torch.zeros(4, 4)}, "expected booleans.*alibi_slopes"),
        ({"attn_mask": torch.ones(4, 5) > 0}, r"shape \(4, 5\); expected \[1, 2, 4, 4\]"),
        ({"attn_mask": torch.rand(2, 4, 4) > 0.5}, "differs between batches or heads"),
        ({"attn_mask": [[True]]}, "found list"),
        ({"mask": "nowhere.json"}, r"nowhere.json.*: No such file"),
        ({"mask": 7}, "found a int; expected one of cqsa.masks"),
        ({"soft_cap": 0}, "soft_cap 0; expected a finite number above 0"),
        ({"soft_cap": math.inf}, "soft_cap inf"),
        ({"alibi_slopes": [1.0]}, "alibi_slopes: found .*; expected 2 finite numbers, one for each query head"),
        ({"alibi_slopes": [1.0, -1.0]}, "at least 0"),
        ({"sinks": [1.0, math.nan]}, "sinks: found"),
        ({"sinks": 3}, "sinks: found 3"),
        ({"sinks": {0: 1.0, 1: 2.0}}, "sinks: found"),
        ({"soft_cap": 1e39}, "at most 3e\\+38"),
        ({"alibi_slopes": [1e39, 0.0]}, "at most 3e\\+38"),
        ({"attn_mask": torch.ones(7, 4, 4) > 0}, r"shape \(7, 4, 4\); expected \[1, 2, 4, 4\]"),
        ({"attn_mask": torch.ones(0, 4, 4) > 0}, r"shape \(0, 4, 4\)"),
        ({"attn_mask": np.array(["a"])}, "expected booleans"),
        ({"attn_mask": (torch.ones(4, 4) > 0).to_sparse()}, "expected booleans"),
    ):
        with pytest.raises(cqsa.InputError, match=expected):
            cqsa.attention(q, q, q, device="cpu", **words)
    for make, expected in (
        (lambda: Documents([0, 5, 4]), "cu_seqlens: expected.*ascending"),
        (lambda: Documents([3]), "at least two"),
        (lambda: Documents([-1, 4]), "none negative"),
        (lambda: Documents([0.0, 4.0]), "expected whole numbers"),
        (lambda: Documents("nowhere.npy"), "nowhere.npy.*: No such file"),
        (lambda: Chunked(0), "chunk size 0; expected at least 1"),
        (lambda: Chunked(2.5), "chunk size 2.5; expected a whole number"),  # type: ignore[arg-type]
        (lambda: Window(-1, 0), "left -1; expected at least 0"),
        (lambda: Strip(-1, 4), "strip -1"),
        (lambda: Prefix(True), "prefix True; expected a whole number"),
        (lambda: Blocks([[1, 2]], 4), "expected True or False"),
        (lambda: Blocks([[1, 0]], 0), "block size 0"),
        (lambda: Bands([(0, 1, 0, 1)]), "expected six"),
        (lambda: Bands([(0, 9, 0, 9, None, None), (3, 4, 3, 4, None, None)]), "overlap"),
        (lambda: Bands([(0, 2**63, 0, 1, None, None)]), "expected"),
        (lambda: Bands(3), "expected lists of six numbers"),
        (lambda: Documents(torch.tensor([0.0, 4.0], dtype=torch.bfloat16)), "expected whole numbers"),
        (lambda: Blocks(torch.ones(2, 2, device="meta"), 4), "a tensor of torch.float32 on meta"),
    ):
        with pytest.raises(cqsa.InputError, match=expected):
            make()  # type: ignore[no-untyped-call]
    many: Any = torch.zeros(1_500, 3_000, dtype=torch.bool)
    many[:, ::4] = True
    many[1::2] = many[1::2].roll(2, 1)
    one = torch.zeros(1, 1, 3_000, 8)
    with pytest.raises(cqsa.InputError, match="1,125,000 bands; expected at most 1,000,000"):
        cqsa.attention(one[:, :, :1_500], one, one, attn_mask=many, device="cpu")
    long = torch.zeros(1, 1, 1, 8).expand(1, 1, 10**7, 8)
    with pytest.raises(cqsa.InputError, match="5,000,000 bands; expected at most"):
        cqsa.plan(long, long, long, mask=Chunked(2), device="cpu")


@pytest.mark.parametrize("schedule", ["cqs", "rectangular"])
def test_sinks(schedule: str) -> None:
    options: dict[str, Any] = {"device": "cpu", "return_lse": True, "schedule": schedule, "chunks": 7}
    q, k, v = inputs("normal", torch.float32, 4, 4, N, 8)
    for sink in (0.5, 100.0, 1e4, -1e4, 3e38):
        sinks = (sink, 0.0, sink, -sink)
        found = cqsa.attention(q, k, v, is_causal=True, sinks=sinks, **options)
        assert torch.isfinite(found[0]).all()
        torch.testing.assert_close(
            found[0].double(), reference(q, k, v, KEY <= ROW, sinks=sinks)[0], rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            found[1].double(), reference(q, k, v, KEY <= ROW, sinks=sinks)[1], rtol=1e-5, atol=1e-5
        )
    out, lse = cqsa.attention(q, k, v, attn_mask=KEY < 0, sinks=(0.5, 100.0, -7.0, 0.0), **options)
    assert torch.equal(out, torch.zeros_like(out)), "no key: the sink alone"
    assert torch.equal(lse[0, :, 5], torch.tensor([0.5, 100.0, -7.0, 0.0]))


@pytest.mark.parametrize("name", ["causal documents", "window", "blocks", "strip", "blocks of documents"])
@pytest.mark.parametrize("terms", ["plain", "all"])
def test_a_key_that_nobody_sees_is_never_read_into_a_result(name: str, terms: str) -> None:
    mask, seen = MASKS[name]
    q, k, v = inputs("normal", torch.float32, 4, 2, N, 24)
    seen = seen & (KEY % 7 != 3) & (KEY < 250)
    k[:, :, ~seen.any(0)], v[:, :, ~seen.any(0)] = math.nan, math.inf
    found = cqsa.attention(
        q, k, v, mask=mask, attn_mask=(KEY % 7 != 3) & (KEY < 250), enable_gqa=True, device="cpu", return_lse=True,
        **TERMS[terms],
    )  # fmt: skip
    check(found, reference(q, k.nan_to_num(0.0), v.nan_to_num(0, 0, 0), seen, **TERMS[terms]), torch.float32)


# What went wrong elsewhere.


def test_one_key_and_a_sink() -> None:
    one, two = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0)
    out = cqsa.attention(one, one, two, scale=1.0, sinks=[0.0], device="cpu")
    assert float(out) == pytest.approx(1.46211716, rel=1e-7)


def test_scores_that_are_all_far_below_0_are_an_ordinary_softmax() -> None:
    q, k = torch.full((1, 1, 40, 128), 64.0), torch.full((1, 1, 40, 128), -64.0)
    v = torch.randn(1, 1, 40, 128, generator=torch.Generator().manual_seed(0))
    assert float(q[0, 0, 0] @ k[0, 0, 0]) == -524_288
    for mask, expected in ((None, v.mean(2, keepdim=True).expand_as(v)), (Chunked(1), v)):
        out = cqsa.attention(q, k, v, mask=mask, scale=1.0, device="cpu")
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_more_queries_than_keys_under_a_causal_mask() -> None:
    q, k, v = torch.randn(1, 2, 90, 8), torch.randn(1, 2, 13, 8), torch.randn(1, 2, 13, 8)
    found = cqsa.attention(q, k, v, is_causal=True, device="cpu", return_lse=True)
    check(found, reference(q, k, v, torch.arange(13) <= torch.arange(90)[:, None]), torch.float32)


@pytest.mark.slow
def test_a_batch_of_65536() -> None:
    q, k, v = (torch.randn(65_536, 1, 2, 4) for _ in range(3))
    out = cqsa.attention(q, k, v, is_causal=True, device="cpu")
    expected, _ = reference(q[-9:], k[-9:], v[-9:], torch.ones(2, 2).tril() > 0)
    assert error(out[-9:], expected) <= 2e-6


@pytest.mark.parametrize("tokens", [65_536, 65_537])
def test_lengths_about_65536(tokens: int) -> None:
    q, k, v = (torch.randn(1, 1, tokens, 8) for _ in range(3))
    mask = Documents([0, 30_000, 65_530, tokens]) & Window(200, 3)
    out = cqsa.attention(q, k, v, mask=mask, device="cpu")
    i, j = torch.arange(65_200, tokens)[:, None], torch.arange(tokens)
    seen = ((i < 65_530) == (j < 65_530)) & (j >= 30_000) & (j >= i - 200) & (j <= i + 3)
    assert error(out[:, :, 65_200:], reference(q[:, :, 65_200:], k, v, seen)[0]) <= 2e-6


def test_one_key_more_than_a_multiple_of_32_without_strides() -> None:
    q = torch.randn(1, 2, 5, 16)
    k, v = (torch.randn(1, 2, 1, 16).expand(1, 2, 33, 16) for _ in range(2))
    for words in ({}, {"soft_cap": 3.0}, {"attn_mask": torch.rand(5, 33) < 0.8}):
        out = cqsa.attention(q, k, v, device="cpu", **words)
        torch.testing.assert_close(out, v[:, :, :1].expand(1, 2, 5, 16), rtol=1e-5, atol=1e-6)


# Plans, runs on disk, and what they keep.


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
        visible = sum(call.scores for call in found if isinstance(call, Packed))
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
