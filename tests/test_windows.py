"""Sliding windows end to end: row i sees the W keys up to and including its own position."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import cqsa_stream as cqsa
from cqsa_stream.problem import Problem
from cqsa_stream.schedulers.grid import Axis
from cqsa_stream.schedulers.masks.window import last_keys
from cqsa_stream.storage.open import open_array
from cqsa_stream.verification.verify import verify_rows
from tests.conftest import Cli, stopping_after
from tests.reference import dense, error, inputs

N = 300


def seen(queries: int, keys: int, window: int, q_start: int) -> torch.Tensor:
    """Which keys each row sees, from the definition."""
    position = torch.arange(queries)[:, None] + q_start
    key = torch.arange(keys)[None, :]
    return (key <= position) & (key > position - window)


def check(found: tuple[torch.Tensor, torch.Tensor], tensors: tuple[torch.Tensor, ...], mask: torch.Tensor) -> None:
    expected, expected_lse = dense(*tensors, seen=mask)
    torch.testing.assert_close(found[0].double(), expected, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(found[1].double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", ["cqs", "rectangular"])
@pytest.mark.parametrize("window", [1, 2, 3, 16, 43, 44, 128, 299, 300, 301, 10**12, np.int64(7)])
def test_every_width_is_exact(window: int, schedule: str) -> None:
    tensors = inputs("normal", torch.float32, 2, 1, N, 16)
    options: Any = {"enable_gqa": True, "schedule": schedule, "chunks": 7, "device": "cpu", "return_lse": True}
    found = cqsa.attention(*tensors, window=window, **options)
    check(found, tensors, seen(N, N, int(window), 0))
    both = cqsa.attention(*tensors, window=window, is_causal=True, **options)
    assert torch.equal(found[0], both[0]), "a window is causal"


@pytest.mark.parametrize(
    ("queries", "keys", "q_start", "rows"),
    [(N, N, 0, (100, 250)), (40, N, N - 40, None), (64, N, -20, None), (N, 40, 0, None), (50, 50, 7, (5, 20)),
     (20, 30, 1000, None), (1, 1, 0, None)],
)  # fmt: skip
@pytest.mark.parametrize("window", [1, 2, 17, 64, 10**6])
def test_shapes(queries: int, keys: int, q_start: int, rows: tuple[int, int] | None, window: int) -> None:
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(2, 4, queries, 8, generator=generator)
    k, v = (torch.randn(2, 2, keys, 8, generator=generator) for _ in range(2))
    expected, expected_lse = dense(q, k, v, seen=seen(queries, keys, window, q_start))
    part = slice(*rows) if rows else slice(None)
    out, lse = cqsa.attention(
        q, k, v, window=window, enable_gqa=True, q_start=q_start, queries=rows, return_lse=True, device="cpu"
    )
    torch.testing.assert_close(out.double(), expected[:, :, part], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(lse.double(), expected_lse[:, :, part], rtol=1e-5, atol=1e-5)


def test_sessions_of_one_task_give_the_bits_of_one_session(tmp_path: Path) -> None:
    """Whatever place a row's queries come to: 17 numbers do not fill lines of a processor's cache."""
    tensors = inputs("normal", torch.float32, 2, 2, 600, 17)
    options: Any = {"window": 64, "schedule": "cqs", "chunks": 21, "device": "cpu", "host_memory": "64MiB"}
    whole = cqsa.attention(*tensors, out=tmp_path / "whole", **options).read().result()
    for _ in range(30):
        with pytest.raises(cqsa.RunStopped):
            cqsa.attention(*tensors, out=tmp_path / "parts", max_seconds=0, **options)
    parts = cqsa.attention(*tensors, out=tmp_path / "parts", **options).read().result()
    np.testing.assert_array_equal(whole.view(np.uint32), parts.view(np.uint32))


@pytest.mark.parametrize("kind", ["peaked", "sink", "uniform", "early keys unseen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hard_inputs_and_long_stacks(dtype: torch.dtype, kind: str) -> None:
    """Wider than a leaf, longer than a call: stacks of triangles, and rectangles between them."""
    tensors = inputs(kind, dtype, 1, 1, 9_000, 16)
    for window in (5, 300, 1_500):
        out = cqsa.attention(*tensors, window=window, device="cpu", chunks=7)
        first = 8_000
        q, mask = tensors[0][:, :, first:], seen(9_000 - first, 9_000, window, first)
        expected, _ = dense(q, *tensors[1:], seen=mask)
        in_core = error(scaled_dot_product_attention(q, *tensors[1:], attn_mask=mask), expected)
        assert error(out[:, :, first:], expected) <= max(1.1 * in_core, 2e-6), window


def test_visible_counts() -> None:
    """With equal scores the log-sum-exp is the logarithm of the number of visible keys: 1, 2, ..., 2048, 2048."""
    q, k, v = torch.zeros(1, 1, 5_000, 8), torch.zeros(1, 1, 5_000, 8), torch.ones(1, 1, 5_000, 8)
    out, lse = cqsa.attention(q, k, v, window=2_048, return_lse=True, device="cpu")
    counts = lse[0, 0].double().exp()
    expected = torch.tensor([min(row + 1, 2_048) for row in range(5_000)]).double()
    torch.testing.assert_close(counts, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(out, torch.ones_like(out))
    plan = cqsa.plan(q, k, v, window=2_048, device="cpu")
    assert plan.flops == 2 * (8 + 8) * (5_000 * 2_048 - 2_048 * 2_047 // 2)
    assert "window of 2048" in str(plan)


@pytest.mark.parametrize("window", [0, -1, -(10**9), True, 2.0, "4", math.inf])
def test_what_is_no_window_is_refused(window: Any, cli: Cli) -> None:
    q = torch.zeros(1, 1, 10, 8)
    with pytest.raises(cqsa.InputError, match="window"):
        cqsa.attention(q, q, q, window=window)
    with pytest.raises(cqsa.InputError, match="window"):
        cqsa.plan(q, q, q, window=window)
    if isinstance(window, int) and window <= 0 and window is not True:
        assert cli("plan", "q", "k", "v", "--window", window).returncode == 2


def test_on_disk_it_is_planned_counted_resumed_and_verified(cli: Cli, tmp_path: Path) -> None:
    words = ("--tokens", 3000, "--heads", 2, "--head-dim", 16, "--dtype", "float32")
    assert cli("generate", "d", *words).returncode == 0
    qkv = [f"d/{name}.zarr" for name in "qkv"]
    how = ("--window", 100, "--chunks", 57, "--device", "cpu", "--schedule", "rectangular")
    plan = json.loads(cli("plan", *qkv, "o", *how, "--json").stdout)
    assert plan["pairs"] == 2 * (1 + 2 + 54 * 3), "each of 56 filled chunks meets its own and the two before it"
    with stopping_after(20):
        assert cli("run", *qkv, "o", *how, "--quiet").returncode == 3
    assert cli("run", *qkv, "o", "--window", 101, "--quiet").returncode == 6, "another mask is another problem"
    assert cli("run", *qkv, "o", "--causal", "--quiet").returncode == 6
    ran = cli("run", *qkv, "o", "--window", 100, "--quiet", "--json")
    assert ran.returncode == 0, ran.stderr
    status = json.loads(cli("status", "o.run", "--json").stdout)
    assert status["complete"]
    assert status["pairs_done"] == status["pairs_total"] == plan["pairs"]
    assert json.loads(cli("verify", "o.run", "--json").stdout)["ok"]
    whole = cli("run", *qkv, "p", *how, "--quiet", "--json")
    ended = json.loads(whole.stdout.splitlines()[-1])
    assert ended["measured"]["bytes_read"] == ended["predicted"]["bytes_read"]
    a, b = (cqsa.open_run(tmp_path / f"{name}.run").output().read().result() for name in "op")
    np.testing.assert_array_equal(a, b)


def test_verify_finds_a_window_that_is_wrong(tmp_path: Path) -> None:
    """The check of the check: as the output of a window that is one wider, it is beyond the tolerance."""
    q, k, v = inputs("normal", torch.float32, 1, 1, 800, 16)
    out = cqsa.attention(q, k, v, window=64, device="cpu")
    lse = dense(q, k, v, seen=seen(800, 800, 64, 0))[1]
    arrays = {name: open_array(tensor) for name, tensor in zip(("query", "key", "value"), (q, k, v), strict=True)}
    for window, right in ((64, True), (63, False), (65, False)):
        problem = Problem.of(arrays["query"], arrays["key"], arrays["value"], rule=last_keys(window))
        found = verify_rows(
            problem, arrays, open_array(out), lambda *at: float(lse[at]), [set(range(8))], Axis(800, 100, 8), 64, 0,
            rounded_tiles=False, damaged=0,
        )  # fmt: skip
        assert found.rows == 64
        assert found.ok == right
