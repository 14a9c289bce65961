"""Exactness end to end: the engine against float64, beside torch's own in-core kernel on the same inputs."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import cqsa_stream as cqsa
from cqsa_stream import planning
from cqsa_stream.schedulers.model.traffic import moved
from cqsa_stream.schedulers.plan import Plan
from cqsa_stream.schedulers.request import Machine, Request
from cqsa_stream.schedulers.schedules import make_schedule
from cqsa_stream.schedulers.search import make_plan
from tests.reference import dense, error, inputs

KINDS = ("normal", "uniform", "peaked", "sink", "early keys unseen")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("schedule", ["cqs", "rectangular"])
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_the_in_core_kernel(dtype: torch.dtype, causal: bool, kv_heads: int, schedule: str) -> None:
    for kind in KINDS:
        q, k, v = inputs(kind, dtype, 2, kv_heads, 1500, 64)
        expected, expected_lse = dense(q, k, v, causal=causal)
        in_core = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=kv_heads != 2)
        out, lse = cqsa.attention(
            q, k, v, is_causal=causal, enable_gqa=True, device="cpu", schedule=schedule, chunks=13, return_lse=True
        )
        assert out.dtype == dtype
        assert torch.isfinite(out).all(), kind
        assert torch.isfinite(lse).all(), kind
        allowed = 1.10 * error(in_core, expected)
        allowed = max(allowed, 2e-6) if dtype == torch.float32 else allowed
        assert error(out, expected) <= allowed, kind
        step = 1e-5 if dtype == torch.float32 else 1e-3
        assert (lse.double() - expected_lse).abs().max() <= step * max(1.0, float(expected_lse.abs().max())), kind


Shape = tuple[int, int, int, int, int, int, int, int, tuple[int, int] | None]
SHAPES: list[Shape] = [
    # batch, heads, kv_heads, queries, keys, dim, value_dim, q_start, rows
    (1, 1, 1, 1, 1, 8, 8, 0, None),
    (1, 1, 1, 2, 2, 64, 64, 0, None),
    (2, 4, 2, 97, 97, 32, 32, 0, None),
    (1, 3, 1, 40, 333, 64, 64, 293, None),
    (2, 2, 2, 333, 40, 16, 16, 0, None),
    (1, 2, 1, 64, 300, 64, 64, -20, None),
    (1, 4, 4, 500, 500, 24, 40, 0, None),
    (1, 2, 2, 500, 500, 128, 64, 0, (123, 456)),
    (1, 1, 1, 300, 300, 256, 256, 0, (299, 300)),
    (1, 2, 1, 260, 260, 12, 12, 7, (5, 200)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_shapes(shape: Shape, causal: bool) -> None:
    batch, heads, kv_heads, queries, keys, dim, value_dim, q_start, rows = shape
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(batch, heads, queries, dim, generator=generator)
    k = torch.randn(batch, kv_heads, keys, dim, generator=generator)
    v = torch.randn(batch, kv_heads, keys, value_dim, generator=generator)
    expected, expected_lse = dense(q, k, v, causal=causal, q_start=q_start)
    part = slice(*rows) if rows else slice(None)
    out, lse = cqsa.attention(
        q, k, v, is_causal=causal, enable_gqa=True, q_start=q_start, queries=rows, return_lse=True, device="cpu"
    )
    assert out.shape == (batch, heads, *expected[:, :, part].shape[2:])
    torch.testing.assert_close(out.double(), expected[:, :, part], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(lse.double(), expected_lse[:, :, part], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("schedule", "chunks"), list(itertools.product(["cqs", "rectangular"], [7, 57, 307])))
def test_every_grid_gives_the_same(schedule: str, chunks: int) -> None:
    q, k, v = inputs("normal", torch.float32, 2, 1, 100, 16)
    expected, _ = dense(q, k, v, causal=True, scale=0.3)
    out = cqsa.attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3, schedule=schedule, chunks=chunks)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("resident", "parked"), [(5, 0), (5, 3), (5, 16), (9, 4)])
def test_partials_may_leave_the_device_for_memory_or_disk(
    resident: int, parked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan says how many stay where; the bytes that it counts are those that move; the result is the same."""

    def tight(request: Request, machine: Machine) -> Plan:
        plan = make_plan(request, machine)
        layout = replace(plan.layout, resident_rows=resident, parked_rows=parked, stride=4)
        schedule = make_schedule("cqs", plan.grid, layout)
        found = moved(request.work, schedule, layout, request.arrays)
        cost = replace(plan.cost, bytes_written=found.bytes_written, bytes_read=found.bytes_read, spills=found.spills)
        return replace(plan, layout=layout, cost=cost)

    q, k, v = inputs("normal", torch.float32, 2, 1, 400, 16)
    expected = cqsa.attention(q, k, v, is_causal=True, enable_gqa=True, schedule="cqs", chunks=21, device="cpu")
    monkeypatch.setattr(planning, "make_plan", tight)
    arrays, out = [tmp_path / f"{name}.npy" for name in "qkv"], tmp_path / "out"
    for path, tensor in zip(arrays, (q, k, v), strict=True):
        np.save(path, tensor.numpy())
    found = cqsa.attention(
        arrays[0], arrays[1], arrays[2], is_causal=True, enable_gqa=True, schedule="cqs", chunks=21, device="cpu",
        out=out,
    )  # fmt: skip
    torch.testing.assert_close(torch.from_numpy(found.read().result()), expected, rtol=2e-5, atol=2e-6)
    status = cqsa.open_run(tmp_path / "out.run").status()
    assert status["measured"]["bytes_read"] == status["predicted"]["bytes_read"]
    assert status["measured"]["bytes_written"] == status["predicted"]["bytes_written"]


def test_rows_that_see_no_key_wait_for_their_place(tmp_path: Path) -> None:
    """Several lanes under the smallest budget: the only place for a partial may still be leaving for disk."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 3, 2048, 16, generator=generator) for _ in range(3))
    expected, _ = dense(q, k, v, causal=True, q_start=-1024)
    arrays, out = [tmp_path / f"{name}.npy" for name in "qkv"], tmp_path / "out"
    for path, tensor in zip(arrays, (q, k, v), strict=True):
        np.save(path, tensor.numpy())
    query, key, value = arrays
    plan = cqsa.plan(query, key, value, is_causal=True, q_start=-1024, out=out, device="cpu")
    found = cqsa.attention(
        query, key, value, is_causal=True, q_start=-1024, out=out, device="cpu", host_memory=plan.least.host_bytes
    )
    torch.testing.assert_close(torch.from_numpy(found.read().result()).double(), expected, rtol=2e-5, atol=2e-6)


def test_numpy_inputs_are_taken_as_they_are() -> None:
    q, k, v = inputs("normal", torch.float16, 1, 1, 50, 8)
    expected = cqsa.attention(q, k, v)
    found = cqsa.attention(q.numpy(), k.numpy(), v.numpy())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_any_scale_under_a_causal_mask(scale: float) -> None:
    """Kernels that mask before they scale give NaN here, torch's own included."""
    q, k, v = inputs("normal", torch.float32, 1, 1, 300, 16)
    expected, _ = dense(q, k, v, causal=True, scale=scale)
    out = cqsa.attention(q, k, v, is_causal=True, scale=scale, device="cpu")
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-6)


def test_a_kernel_that_is_not_there_is_refused() -> None:
    q, k, v = inputs("normal", torch.float32, 1, 1, 100, 16)
    with pytest.raises(cqsa.InputError, match='take device="cuda"'):
        cqsa.attention(q, k, v, device="cpu", kernel="cupy")
    with pytest.raises(cqsa.InputError, match="expected one of auto, fa4, torch-cuda, cupy"):
        cqsa.attention(q, k, v, device="cpu", kernel="triton")
