"""The same promises on a CUDA device: exact, within budget, bit-identical after a resume. Run by ``make test-gpu``."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import cqsa_stream as cqsa
from cqsa_stream.generate import generate
from cqsa_stream.kernels.choose import merges_at_once
from tests.conftest import stopping_after
from tests.reference import dense, error, inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MIB = 2**20


@pytest.fixture(autouse=True)
def empty_device() -> Iterator[None]:
    """What one test leaves on the device is not counted as the next one's."""
    clear()
    yield
    clear()


def clear() -> None:
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def expected_of(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Return (out, lse) by the formula in float64, computed on the device: it takes the CPU minutes."""
    out, lse = dense(q.float().cuda(), k.float().cuda(), v.float().cuda(), causal=causal)
    return out.cpu(), lse.cpu()


def skip_without_cupy() -> None:
    if not merges_at_once(torch.device("cuda")):
        pytest.skip("no CuPy")


@pytest.mark.parametrize("schedule", ["cqs", "rectangular"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_exact(dtype: torch.dtype, causal: bool, schedule: str) -> None:
    """16-bit tiles come rounded from the vendor's kernel: a 16-bit output is rounded twice."""
    for kind in ("normal", "uniform", "peaked", "sink", "early keys unseen"):
        q, k, v = inputs(kind, dtype, 4, 2, 3000, 64)
        expected, expected_lse = expected_of(q, k, v, causal=causal)
        in_core = scaled_dot_product_attention(q.cuda(), k.cuda(), v.cuda(), is_causal=causal, enable_gqa=True).cpu()
        out, lse = cqsa.attention(
            q, k, v, is_causal=causal, enable_gqa=True, device="cuda", schedule=schedule, chunks=13, return_lse=True
        )
        assert torch.isfinite(out).all(), kind
        allowed = 2e-6 if dtype == torch.float32 else 0.0
        factor = 1.10 if dtype == torch.float32 else 1.45
        assert error(out, expected) <= max(allowed, factor * error(in_core, expected)), kind
        step = 1e-5 if dtype == torch.float32 else 1e-3
        assert (lse.double() - expected_lse).abs().max() <= step * max(1.0, float(expected_lse.abs().max())), kind


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_is_upcast_on_the_device(dtype: torch.dtype, tmp_path: Path) -> None:
    q, k, v = (x.to(dtype) for x in inputs("normal", torch.float32, 4, 2, 3000, 64))
    expected, _ = expected_of(q, k, v, causal=True)
    wide_q, wide_k, wide_v = (x.half().cuda() for x in (q, k, v))
    in_core = scaled_dot_product_attention(wide_q, wide_k, wide_v, is_causal=True, enable_gqa=True).cpu()
    options: dict[str, Any] = {"is_causal": True, "enable_gqa": True, "device": "cuda", "chunks": 13}
    out = cqsa.attention(q, k, v, **options)
    assert out.dtype == torch.bfloat16
    assert error(out, expected) <= 1.45 * error(in_core.bfloat16(), expected)
    qp, kp, vp = generate(tmp_path / "d", tokens=20_000, heads=2, head_dim=64, dtype=str(dtype).removeprefix("torch."))
    cqsa.attention(qp, kp, vp, out=tmp_path / "out", device="cuda", device_memory="128MiB")
    run = cqsa.open_run(tmp_path / "out.run")
    assert run.verify().ok
    assert run.status()["device_peak_bytes"] <= run.status()["device_projected_bytes"] <= 128 * MIB


def test_float64_is_for_the_cpu() -> None:
    q, k, v = inputs("normal", torch.float64, 1, 1, 100, 16)
    with pytest.raises(cqsa.InputError, match='device="cpu"'):
        cqsa.attention(q, k, v, device="cuda")


@pytest.mark.parametrize("schedule", ["cqs", "rectangular"])
def test_resumed_runs_are_bit_identical_and_within_budget(schedule: str, tmp_path: Path) -> None:
    q, k, v = generate(tmp_path / "d", tokens=60_000, heads=4, kv_heads=2, head_dim=64, dtype="bfloat16")
    options: dict[str, Any] = {
        "is_causal": True, "enable_gqa": True, "device": "cuda", "schedule": schedule, "chunks": 57,
        "device_memory": "160MiB", "host_memory": "4GiB",
    }  # fmt: skip
    whole = cqsa.attention(q, k, v, out=tmp_path / "whole", **options).read().result()
    status = cqsa.open_run(tmp_path / "whole.run").status()
    assert 0 < status["device_peak_bytes"] <= 160 * MIB
    for steps in (0, 3, 11, 30):
        with stopping_after(steps), pytest.raises(cqsa.RunStopped):
            cqsa.attention(q, k, v, out=tmp_path / "out", **options)
    found = cqsa.open_run(tmp_path / "out.run").resume()
    np.testing.assert_array_equal(found.output().read().result().view(np.uint16), whole.view(np.uint16))
    assert found.verify(rows=64).ok


def test_a_run_moves_between_devices(tmp_path: Path) -> None:
    q, k, v = generate(tmp_path / "d", tokens=20_000, heads=2, head_dim=64, dtype="float16")
    with stopping_after(20), pytest.raises(cqsa.RunStopped):
        cqsa.attention(q, k, v, out=tmp_path / "out", device="cpu", chunks=31)
    cqsa.attention(q, k, v, out=tmp_path / "out", device="cuda")
    assert cqsa.open_run(tmp_path / "out.run").verify().ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_the_cupy_kernel_is_at_least_as_exact_as_the_vendors(dtype: torch.dtype, causal: bool) -> None:
    """An independent implementation: no tile is rounded to 16 bits, no product is tf32."""
    skip_without_cupy()
    for kind in ("normal", "peaked", "sink", "early keys unseen"):
        q, k, v = inputs(kind, dtype, 4, 2, 9000, 64)
        expected, expected_lse = expected_of(q, k, v, causal=causal)
        in_core = scaled_dot_product_attention(q.cuda(), k.cuda(), v.cuda(), is_causal=causal, enable_gqa=True).cpu()
        out, lse = cqsa.attention(
            q, k, v, is_causal=causal, enable_gqa=True, device="cuda", chunks=7, kernel="cupy", return_lse=True
        )
        allowed = 2e-6 if dtype == torch.float32 else 0.0
        factor = 1.10 if dtype == torch.float32 else 1.0  # the in-core kernel is of float32, too: noise of rounding
        assert error(out, expected) <= max(allowed, factor * error(in_core, expected)), kind
        assert (lse.double() - expected_lse).abs().max() <= 1e-5 * max(1.0, float(expected_lse.abs().max())), kind


def test_partials_park_in_host_memory_while_others_compute(tmp_path: Path) -> None:
    q, k, v = generate(tmp_path / "d", tokens=200_000, heads=2, head_dim=128, dtype="bfloat16")
    options: dict[str, Any] = {"is_causal": True, "device": "cuda", "schedule": "cqs", "chunks": 31}
    options |= {"device_memory": "120MiB", "host_memory": "4GiB"}
    plan = cqsa.plan(q, k, v, out=tmp_path / "out", **options)
    assert plan.fits
    assert plan.layout.parked_rows > 0
    first = cqsa.attention(q, k, v, out=tmp_path / "out", **options).read().result()
    run = cqsa.open_run(tmp_path / "out.run")
    assert run.verify(rows=64).ok
    assert run.status()["device_peak_bytes"] <= plan.footprint.device_bytes <= 120 * MIB
    again = cqsa.attention(q, k, v, out=tmp_path / "again", **options).read().result()
    np.testing.assert_array_equal(first.view(np.uint16), again.view(np.uint16))


@pytest.mark.parametrize("kernel", ["auto", "cupy"])
@pytest.mark.parametrize("schedule", ["cqs", "rectangular"])
def test_memory_as_the_driver_sees_it(schedule: str, kernel: str, tmp_path: Path) -> None:
    """What the process holds on the device is the budget and what is reserved for context and libraries, at most."""
    if kernel == "cupy":
        skip_without_cupy()
    q, k, v = generate(tmp_path / "d", tokens=100_000, heads=4, kv_heads=2, head_dim=64, dtype="bfloat16")
    options: dict[str, Any] = {"enable_gqa": True, "device": "cuda", "schedule": schedule, "device_memory": "256MiB"}
    cqsa.attention(q, k, v, out=tmp_path / "out", kernel=kernel, host_memory="4GiB", **options)
    status = cqsa.open_run(tmp_path / "out.run").status()
    assert 0 < status["device_peak_bytes"] <= status["device_projected_bytes"] <= 256 * MIB
    if status["device_driver_peak_bytes"]:
        assert status["device_driver_peak_bytes"] <= 256 * MIB + status["device_reserved_bytes"]


@pytest.mark.parametrize("window", [1, 2, 100, 1_000, 2_999, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_windows(dtype: torch.dtype, window: int) -> None:
    """A window's lower edge is a causal triangle with rows and keys reversed."""
    q, k, v = inputs("normal", dtype, 4, 2, 3_000, 64)
    position = torch.arange(3_000, device="cuda")
    seen = (position <= position[:, None]) & (position > position[:, None] - window)
    expected, expected_lse = dense(q.float().cuda(), k.float().cuda(), v.float().cuda(), seen=seen)
    for schedule in ("cqs", "rectangular"):
        out, lse = cqsa.attention(
            q, k, v, window=window, enable_gqa=True, device="cuda", schedule=schedule, chunks=7, return_lse=True
        )
        assert error(out, expected.cpu()) <= (2e-6 if dtype == torch.float32 else 6e-3)
        step = 1e-5 if dtype == torch.float32 else 2e-3
        assert (lse.double() - expected_lse.cpu()).abs().max() <= step * max(1.0, float(expected_lse.abs().max()))


def test_a_window_keeps_its_budget_on_disk(tmp_path: Path) -> None:
    query, key, value = generate(tmp_path / "inputs", tokens=300_000, heads=2, head_dim=64, dtype="bfloat16")
    out = tmp_path / "out"
    cqsa.attention(query, key, value, window=4_096, out=out, device="cuda", device_memory="600MiB", host_memory="2GiB")
    run = cqsa.open_run(tmp_path / "out.run")
    status = run.status()
    assert status["complete"]
    assert status["device_peak_bytes"] <= status["device_projected_bytes"] <= 600 * MIB
    assert run.verify(rows=64).ok


MASKS: list[tuple[str, Any]] = [
    ("documents", lambda: cqsa.masks.Documents([0, 3, 10, 700, 701, 1_500, 2_990])),
    ("small documents", lambda: cqsa.masks.Documents(list(range(0, 3_001, 17))) & cqsa.masks.Window(None, 0)),
    ("long documents", lambda: cqsa.masks.Documents([0, 1_400, 3_000]) & cqsa.masks.Window(300, 0)),
    ("chunked", lambda: cqsa.masks.Chunked(128)),
    ("prefix", lambda: cqsa.masks.Prefix(500)),
    ("window", lambda: cqsa.masks.Window(200, 31)),
    ("strip", lambda: cqsa.masks.Strip(4, 400)),
    ("blocks", lambda: cqsa.masks.Blocks(np.random.default_rng(0).random((47, 47)) < 0.4, 64)),
]


@pytest.mark.parametrize(("name", "mask"), MASKS, ids=[name for name, _ in MASKS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks(dtype: torch.dtype, name: str, mask: Any) -> None:
    from cqsa_stream.schedulers.masks.kinds import described
    from cqsa_stream.verification.definitions import seen

    q, k, v = inputs("normal", dtype, 4, 2, 3_000, 64)
    position = torch.arange(3_000)
    sees = seen(described(mask()), position[:, None], position).cuda()
    expected, expected_lse = dense(q.float().cuda(), k.float().cuda(), v.float().cuda(), seen=sees)
    for kernel in ("auto", "cupy", "online") if merges_at_once(torch.device("cuda")) else ("auto", "online"):
        for schedule in ("cqs", "rectangular"):
            out, lse = cqsa.attention(
                q, k, v, mask=mask(), enable_gqa=True, device="cuda", schedule=schedule, chunks=7, return_lse=True,
                kernel=kernel,
            )  # fmt: skip
            assert error(out, expected.cpu()) <= (2e-6 if dtype == torch.float32 else 6e-3), (kernel, schedule)
            same = lse.double().nan_to_num(neginf=-1e9) - expected_lse.cpu().nan_to_num(neginf=-1e9)
            step = 1e-5 if dtype == torch.float32 else 2e-3
            assert same.abs().max() <= step * max(1.0, float(expected_lse[expected_lse.isfinite()].abs().max()))


@pytest.mark.parametrize(
    "terms", [{"soft_cap": 20.0}, {"alibi_slopes": [0.5, 0.1, 0.01, 1.0]}, {"sinks": [0.5, 100.0, 0, -3]}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_score_terms(dtype: torch.dtype, terms: dict[str, Any]) -> None:
    """By two implementations, and as on the CPU."""
    q, k, v = inputs("normal", dtype, 4, 2, 3_000, 64)
    options: dict[str, Any] = {"mask": cqsa.masks.Strip(4, 900), "enable_gqa": True, "chunks": 7, "return_lse": True}
    expected, expected_lse = cqsa.attention(q.double(), k.double(), v.double(), device="cpu", **options, **terms)
    for kernel in ("auto", "cupy", "online") if merges_at_once(torch.device("cuda")) else ("auto", "online"):
        out, lse = cqsa.attention(q, k, v, device="cuda", kernel=kernel, **options, **terms)
        assert error(out, expected) <= (2e-6 if dtype == torch.float32 else 6e-3), kernel
        assert (lse - expected_lse).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-3) * 100, kernel
