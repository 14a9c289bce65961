"""Masks and scores are exact against dense float64, in memory and on disk; what cannot be is refused."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cqsa_stream as cqsa
from cqsa_stream.masks import Bands, Blocks, Chunked, Documents, Prefix, Strip, Window
from tests.masked import (
    EVERYTHING,
    KEY,
    MASKS,
    NOISE,
    ROW,
    TERMS,
    N,
    check,
    reference,
    stored,
)
from tests.reference import error, inputs


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
