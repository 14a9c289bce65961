"""Numbers that break softmaxes and merges, four ways: in memory or on disk, in one chunk or in many; and resumed.

Where torch's own result is finite or infinite, so is ours; keys whose score is -inf, and such that a row does not see,
change nothing.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cqsa_stream as cqsa
from tests.reference import dense

INF, NAN = torch.inf, torch.nan
TOKENS = 120
Inputs = tuple[Tensor, Tensor, Tensor]


def plain() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, TOKENS, 8, generator=generator) for _ in range(3))
    return q, k, v


def padded(keys: slice) -> Inputs:
    """Keys are masked by -inf in a feature that every query has as 1."""
    q, k, v = plain()
    q[..., 0], k[..., 0] = 1, -60
    k[:, :, keys, 0] = -INF
    return q, k, v + 3


def filled(value: float, *places: int, head: int = 0) -> Inputs:
    q, k, v = plain()
    for place in places:
        v[0, head, place, 3] = value
        value = -value if len(places) > 1 else value
    return q, k, v


def near_the_largest() -> Inputs:
    """Two keys that all rows see alike, of values whose difference overflows, in different chunks."""
    q, k, v = plain()
    q[..., 0] = 1
    k[:, :, (5, 100)] = 0
    k[:, :, (5, 100), 0] = 90
    v[:, :, 5], v[:, :, 100] = 3e38, -3e38
    return q, k, v


CASES: dict[str, Callable[[], Inputs]] = {
    "the last keys are padding": lambda: padded(slice(40, None)),
    "the first keys are padding": lambda: padded(slice(0, 80)),
    "all keys are padding": lambda: padded(slice(None)),
    "every second key is padding": lambda: padded(slice(0, None, 2)),
    "a value is inf": lambda: filled(INF, 77),
    "a value is -inf": lambda: filled(-INF, 118),
    "inf and -inf": lambda: filled(INF, 3, 117),
    "a value is NaN": lambda: filled(NAN, 80, head=1),
    "a difference overflows": near_the_largest,
}


def expected_of(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Return what the definition gives; a weight of 0 times anything is 0."""
    finite = torch.where(v.isfinite(), v, 0.0)
    out, lse = dense(q, k, finite, causal=causal)
    scores = q.double() @ k.double().mT * q.shape[3] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -INF)
    seen = (scores > -INF).double()
    high, low, none = (seen @ (kind.double()) > 0 for kind in (v == INF, v == -INF, v.isnan()))
    out = torch.where(high, INF, torch.where(low, -INF, out))
    return torch.where(none | (high & low), NAN, out), lse


def four_ways(inputs: Inputs, causal: bool, folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    paths: Any = [folder / f"{name}.npy" for name in "qkv"]
    for path, tensor in zip(paths, inputs, strict=True):
        np.save(path, tensor.numpy())
    options: dict[str, Any] = {"is_causal": causal, "return_lse": True, "device": "cpu"}
    for chunks, schedule in ((None, "auto"), (7, "cqs")):
        settings = {**options, "chunks": chunks, "schedule": schedule}
        out, lse = cqsa.attention(*inputs, **settings)
        yield f"memory, {chunks} chunks", out, lse
        target = folder / f"out-{chunks}"
        for limit in (0, None) if chunks else (None,):
            try:
                stored, stored_lse = cqsa.attention(*paths, out=target, max_seconds=limit, **settings)
            except cqsa.RunStopped:
                assert limit == 0
        out, lse = (torch.from_numpy(x.read().result()) for x in (stored, stored_lse))
        yield f"disk, {chunks} chunks", out, lse
        assert chunks is None or cqsa.open_run(f"{target}.run").verify(rows=100).ok


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_four_ways(case: str, causal: bool, tmp_path: Path) -> None:
    inputs: Any = CASES[case]()
    q, k, v = inputs
    expected, expected_lse = expected_of(q, k, v, causal)
    largest = float(expected[expected.isfinite()].abs().max()) if expected.isfinite().any() else 1.0
    for way, out, lse in four_ways(inputs, causal, tmp_path):
        torch.testing.assert_close(
            out.double(), expected, rtol=2e-5, atol=2e-6 * max(1.0, largest), equal_nan=True, msg=way
        )
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5, msg=way)


@pytest.mark.parametrize("case", ["a value is inf", "a value is -inf", "inf and -inf", "a value is NaN"])
def test_as_sdpa(case: str) -> None:
    inputs: Any = CASES[case]()
    theirs = torch.nn.functional.scaled_dot_product_attention(*inputs)
    for chunks in (7, 21):
        torch.testing.assert_close(
            cqsa.attention(*inputs, chunks=chunks, device="cpu"), theirs, rtol=2e-5, atol=2e-6, equal_nan=True
        )


@pytest.mark.parametrize("where", ["query", "key"])
def test_scores_that_are_nan_or_too_large_are_nan_as_sdpas(where: str) -> None:
    q, k, v = plain()
    tensor = q if where == "query" else k
    tensor[0, 0, 40, 2], tensor[0, 1, 41, 2] = NAN, INF
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for chunks in (7, 21):
        found, lse = cqsa.attention(q, k, v, chunks=chunks, return_lse=True, device="cpu")
        assert torch.equal(found.isnan(), theirs.isnan())
        assert torch.equal(lse.isnan() | lse.isinf(), theirs.isnan().any(3))


def test_float64_and_peaked_scores_stay_above_the_stated_floor() -> None:
    """u (32 + s): u is the rounding unit, s the largest score; each weight of a merge carries the scores' rounding."""
    for dtype, unit in ((torch.float32, 2.0**-24), (torch.float64, 2.0**-53)):
        for tokens, size, chunks in ((5, 12.0, 7), (5, 60.0, 7), (300, 12.0, 7)):
            for seed in range(4):
                generator = torch.Generator().manual_seed(seed)
                shape = (1, 1, tokens, 64)
                q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
                q, k[:, :, tokens // 2] = q * size, k[:, :, tokens // 2] * 3
                expected, _ = dense(q, k, v, causal=True)
                largest = float((q.double() @ k.double().mT).abs().max()) / 8
                found = cqsa.attention(q, k, v, is_causal=True, schedule="cqs", chunks=chunks, device="cpu")
                error = float((found.double() - expected).norm() / expected.norm())
                assert error <= unit * (32 + largest), (dtype, tokens, size, chunks, seed)


SETTINGS: dict[str, Callable[[], Any]] = {
    "inference mode": torch.inference_mode,
    "a default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_callers_settings_of_torch_change_nothing(setting: str, tmp_path: Path) -> None:
    q, k, v = plain()
    expected, expected_lse = cqsa.attention(q, k, v, chunks=7, schedule="cqs", return_lse=True)
    with SETTINGS[setting]():
        out, lse = cqsa.attention(q, k, v, chunks=7, schedule="cqs", return_lse=True)
        assert cqsa.plan(q, k, v, chunks=7).fits
        for name, tensor in zip("qkv", (q, k, v), strict=True):
            np.save(tmp_path / f"{name}.npy", tensor.numpy())
        paths: Any = [tmp_path / f"{name}.npy" for name in "qkv"]
        stored = cqsa.attention(*paths, chunks=7, schedule="cqs", out=tmp_path / "out")
        assert cqsa.open_run(tmp_path / "out.run").verify(rows=20).ok
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert out.device.type == "cpu"
    assert np.array_equal(stored.read().result(), expected.numpy())


def test_products_are_not_made_less_precise_by_the_caller() -> None:
    q, k, v = plain()
    k[..., 0] = -INF
    q[..., 0] = 1  # rows that are computed by plain products
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(cqsa.attention(q, k, v), torch.zeros_like(q))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
