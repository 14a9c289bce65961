"""The contract that every kernel passes. A new one is a line in KERNELS."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from cqsa_stream.engine.calls import Calls
from cqsa_stream.engine.timeline import Timeline
from cqsa_stream.errors import InputError
from cqsa_stream.kernels.choose import choices, chosen, kernel_of
from cqsa_stream.kernels.contract import TRIANGLES, Kernel, KernelChoice, Scores
from cqsa_stream.kernels.fold import fold
from cqsa_stream.kernels.online import OnlineKernel
from cqsa_stream.kernels.reference import PlainKernel
from cqsa_stream.kernels.torch_cpu import TorchCpuKernel
from cqsa_stream.kernels.torch_cuda import OPERATORS, TorchCudaKernel
from cqsa_stream.machine.device import Host
from cqsa_stream.schedulers.masks.arrays import LEAST, MOST, sorted_bands
from cqsa_stream.schedulers.masks.calls import Call

Band = tuple[int | None, int | None]
FULL, CAUSAL, REVERSED = TRIANGLES
BANDS: list[Band] = [(0, 0), (3, 0), (0, 3), (2, 5), (None, 4), (7, None), (200, 100), (10**12, 2), (1, 10**12)]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
VENDORS = [
    pytest.param(
        TorchCudaKernel(operator), "cuda", torch.float16, 3e-3, 2e-3, marks=pytest.mark.gpu, id=f"torch-cuda-{operator}"
    )
    for operator in OPERATORS
]
PLAIN_GPU = pytest.param(
    OnlineKernel(tall=True), "cuda", torch.float32, 2e-6, 1e-5, marks=pytest.mark.gpu, id="online-cuda"
)


def where_it_is(name: str, operator: str, dtype: torch.dtype) -> Kernel | None:
    """A kernel of an optional package."""
    if not torch.cuda.is_available():
        return None
    try:
        return kernel_of(KernelChoice(name, operator), CUDA, dtype)
    except InputError:
        return None


CUPY, FA4 = (
    pytest.param(where_it_is(name, operator, dtype), "cuda", dtype, *tolerances, marks=pytest.mark.gpu, id=name)
    for name, operator, dtype, tolerances in (
        ("cupy", "cublas", torch.float32, (2e-6, 1e-5)), ("fa4", "merging", torch.float16, (3e-3, 2e-3))
    )
)  # fmt: skip
KERNELS = [
    pytest.param(TorchCpuKernel(), "cpu", torch.float32, 2e-6, 1e-5, id="torch-cpu"),
    pytest.param(PlainKernel(torch.float64), "cpu", torch.float64, 1e-14, 1e-13, id="plain-float64"),
    pytest.param(OnlineKernel(), "cpu", torch.float32, 2e-6, 1e-5, id="online-float32"),
    pytest.param(OnlineKernel(), "cpu", torch.float64, 1e-14, 1e-13, id="online-float64"),
    *VENDORS,
    PLAIN_GPU,
    CUPY,
    FA4,
]
PARAMETERS = ("kernel", "device", "dtype", "tolerance", "lse_tolerance")
DIMS = [(8, 8), (12, 12), (64, 64), (80, 80), (64, 128), (128, 64), (256, 256)]


@pytest.fixture(autouse=True)
def _device_is_there(request: pytest.FixtureRequest) -> None:
    found = getattr(request.node, "callspec", None)
    if found is None or "device" not in found.params:
        return
    if found.params["device"] == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if found.params["kernel"] is None:
        pytest.skip("no CuPy, or no flash-attn-4 on a Hopper GPU")
    if isinstance(found.params["kernel"], TorchCudaKernel):
        operator = found.params["kernel"].operator
        if operator not in {choice.operator for choice in choices(CUDA, torch.float16)}:
            pytest.skip(f"{operator} does not run on this device")


def expected_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, band: Band, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse) by the definition, in float64 on the CPU; keys that a row does not see change nothing."""
    q, k, v = (x.cpu().double() for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    scores, (left, right) = q @ k.transpose(1, 2) * scale, band
    for i in range(q.shape[1]):
        scores[:, i, : 0 if left is None else max(0, i - left)] = -math.inf
        scores[:, i, k.shape[1] if right is None else i + right + 1 :] = -math.inf
    lse = torch.logsumexp(scores, 2)
    return torch.exp(scores - lse[..., None]).nan_to_num(nan=0.0) @ v, lse


def bands_of(kernel: Kernel, rows: int, columns: int) -> list[Band]:
    """Return what a kernel attends in a tile: triangles are square."""
    tile = kernel.abilities.tile
    if tile.bands and not tile.skips:
        return [*TRIANGLES, *BANDS]
    triangles = list(TRIANGLES) if rows == columns else [FULL]
    return [*triangles, *(band for band in BANDS if tile.bands and is_tight(band, rows, columns))]


def is_tight(band: Band, rows: int, columns: int) -> bool:
    """Whether each row sees a key and each key is seen, as bands are cut, of no more rows than keys."""
    left, right = (10**9 if bound is None else bound for bound in band)
    return rows <= columns and columns - 1 + left >= rows - 1 and rows - 1 + right >= columns - 1


@pytest.mark.parametrize(PARAMETERS, KERNELS)
@pytest.mark.parametrize(("dim", "value_dim"), DIMS)
def test_contract(
    kernel: Kernel, device: str, dtype: torch.dtype, tolerance: float, lse_tolerance: float, dim: int, value_dim: int
) -> None:
    generator = torch.Generator().manual_seed(dim)
    for (heads, kv_heads), (rows, columns) in itertools.product(
        [(1, 1), (4, 2), (3, 1)], [(1, 1), (5, 9), (9, 5), (130, 257), (257, 257), (9, 5000)]
    ):
        q = torch.randn(heads, rows, dim, generator=generator).to(device, dtype)
        k = torch.randn(kv_heads, columns, dim, generator=generator).to(device, dtype)
        v = torch.randn(kv_heads, columns, value_dim, generator=generator).to(device, dtype)
        scale = dim**-0.5
        for band in bands_of(kernel, rows, columns):
            out, lse = kernel.attend(q, k, v, *band, Scores(scale))
            expected, expected_lse = expected_of(q, k, v, band, scale)
            assert out.shape == (heads, rows, value_dim)
            assert lse.shape == (heads, rows)
            assert float((out.cpu().double() - expected).norm() / expected.norm()) <= tolerance, band
            torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=lse_tolerance, atol=lse_tolerance)


@pytest.mark.parametrize(PARAMETERS, KERNELS)
@pytest.mark.parametrize("band", TRIANGLES, ids=str)
def test_keys_and_values_may_be_views_whose_heads_overlap(
    kernel: Kernel, device: str, dtype: torch.dtype, tolerance: float, lse_tolerance: float, band: Band
) -> None:
    tiles, height, width = 5, 40 if band == FULL else 96, 96
    q = torch.randn(2 * tiles, height, 64).to(device, dtype)
    k, v = (torch.randn(width + 4 * 40, 64).to(device, dtype).unfold(0, width, 40).transpose(1, 2) for _ in range(2))
    assert k.shape == (tiles, width, 64)
    out, lse = kernel.attend(q, k, v, *band, Scores(0.125))
    expected, expected_lse = expected_of(q, k, v, band, 0.125)
    assert float((out.cpu().double() - expected).norm() / expected.norm()) <= tolerance
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=lse_tolerance, atol=lse_tolerance)


@pytest.mark.parametrize(PARAMETERS, KERNELS)
def test_a_row_without_keys_is_the_identity(
    kernel: Kernel, device: str, dtype: torch.dtype, tolerance: float, lse_tolerance: float
) -> None:
    q, none = torch.randn(2, 3, 8, device=device, dtype=dtype), torch.empty(1, 0, 8, device=device, dtype=dtype)
    out, lse = kernel.attend(q, none, none, *FULL, Scores(1.0))
    assert torch.equal(out.cpu(), torch.zeros_like(out, device="cpu"))
    assert torch.equal(lse.cpu(), torch.full_like(lse, -torch.inf, device="cpu"))
    if kernel.abilities.tile.bands and not kernel.abilities.tile.skips:  # which take tight bands alone
        q, k = (torch.randn(1, n, 8, device=device, dtype=dtype) for n in (9, 4))
        out, lse = kernel.attend(q, k, k, 1, 0, Scores(1.0))
        assert torch.equal(out[:, 5:].cpu(), torch.zeros_like(out[:, 5:], device="cpu"))
        assert torch.equal(lse.isneginf().cpu(), torch.arange(9)[None] > 4)


@pytest.mark.parametrize(PARAMETERS, KERNELS)
def test_the_same_call_gives_the_same_bits(
    kernel: Kernel, device: str, dtype: torch.dtype, tolerance: float, lse_tolerance: float
) -> None:
    q, k, v = (torch.randn(2, 300, 64, device=device, dtype=dtype) for _ in range(3))
    for band in TRIANGLES:
        first, second = (kernel.attend(q, k, v, *band, Scores(0.125)) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


def attended(
    kernel: Kernel, device: str, dtype: torch.dtype, *qkv: torch.Tensor, band: Band = FULL
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and lse of one head, by float64 tensors on the CPU."""
    q, k, v = (x[None].to(device, dtype) for x in qkv)
    out, lse = kernel.attend(q, k, v, *band, Scores(1.0))
    return out[0].cpu().double(), lse[0].cpu().double()


@pytest.mark.parametrize(PARAMETERS, KERNELS)
@pytest.mark.parametrize("columns", [1, 7, 300, 5000])
def test_a_row_whose_scores_are_all_minus_inf_is_the_identity(
    kernel: Kernel, device: str, dtype: torch.dtype, tolerance: float, lse_tolerance: float, columns: int
) -> None:
    """-inf in a feature of a key is how people mask padding."""
    q, k, v = torch.randn(400, 8), torch.zeros(columns, 8), torch.randn(columns, 8) + 3
    q[:, 0], k[:, 0] = 1, -torch.inf
    out, lse = attended(kernel, device, dtype, q, k, v)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    k[columns // 2, 0] = 0  # all rows see this key alone
    out, lse = attended(kernel, device, dtype, q, k, v)
    torch.testing.assert_close(out, v[columns // 2].to(dtype).double().expand(400, 8), rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(lse, torch.zeros_like(lse), rtol=0, atol=lse_tolerance)


@pytest.mark.parametrize(PARAMETERS, KERNELS)
def test_rows_before_the_first_key_that_counts_are_the_identity(
    kernel: Kernel, device: str, dtype: torch.dtype, tolerance: float, lse_tolerance: float
) -> None:
    """And, where rows see the keys from their own on, those after the last one."""
    q, k, v = (torch.randn(300, 8) for _ in range(3))
    q[:, 0], k[:, 0] = 1, 0
    for band, blind, seeing in ((CAUSAL, slice(0, 200), slice(200, 300)), (REVERSED, slice(100, 300), slice(0, 100))):
        keys = k.clone()
        keys[blind, 0] = -torch.inf
        out, lse = attended(kernel, device, dtype, q, keys, v, band=band)
        assert torch.equal(out[blind], torch.zeros_like(out[blind]))
        assert torch.equal(lse[blind], torch.full_like(lse[blind], -torch.inf))
        rounded = [x[None, seeing].to(dtype) for x in (q, keys, v)]
        expected, expected_lse = expected_of(rounded[0], rounded[1], rounded[2], band, 1.0)
        torch.testing.assert_close(out[seeing], expected[0], rtol=10 * tolerance, atol=10 * tolerance)
        torch.testing.assert_close(lse[seeing], expected_lse[0], rtol=lse_tolerance, atol=lse_tolerance)


@pytest.mark.parametrize(PARAMETERS, KERNELS)
def test_lse_0_and_output_0_can_be_real(
    kernel: Kernel, device: str, dtype: torch.dtype, tolerance: float, lse_tolerance: float
) -> None:
    q, k, v = torch.zeros(3, 8), torch.randn(1, 8), torch.zeros(1, 8)
    out, lse = attended(kernel, device, dtype, q, k, v)
    assert torch.equal(out, torch.zeros_like(out))
    torch.testing.assert_close(lse, torch.zeros_like(lse), rtol=0, atol=1e-7)


@pytest.mark.parametrize(PARAMETERS, KERNELS)
def test_nan_stays_nan(kernel: Kernel, device: str, dtype: torch.dtype, tolerance: float, lse_tolerance: float) -> None:
    q, k, v = (torch.randn(100, 8) for _ in range(3))
    q[3], q[7, 0], k[:, 0] = torch.nan, torch.nan, -torch.inf
    q[8:, 0], k[50:, 0] = 1, 0
    for band in (FULL, REVERSED):
        out, lse = attended(kernel, device, dtype, q, k, v, band=band)
        for row in (3, 7):
            assert out[row].isnan().all()
            assert lse[row].isnan()
        assert torch.isfinite(out[8:]).all()
        assert torch.isfinite(lse[8:]).all()


CPU_KERNELS = KERNELS[:4]


@pytest.mark.parametrize(PARAMETERS, CPU_KERNELS)
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_values_of_keys_that_are_not_seen_change_nothing(
    kernel: Kernel, device: str, dtype: torch.dtype, tolerance: float, lse_tolerance: float, number: float
) -> None:
    q, k, v = (torch.randn(700, 8) for _ in range(3))
    odd = v.clone()
    odd[500, 2] = number
    for band, blind, seeing in ((CAUSAL, slice(0, 500), slice(500, 700)), (REVERSED, slice(501, 700), slice(0, 501))):
        expected, expected_lse = attended(kernel, device, dtype, q, k, v, band=band)
        out, lse = attended(kernel, device, dtype, q, k, odd, band=band)
        torch.testing.assert_close(out[blind], expected[blind], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(out[seeing, 3:], expected[seeing, 3:], rtol=tolerance, atol=tolerance)
        found = out[seeing, 2].nan_to_num(7.0, 8.0, 9.0)
        assert torch.equal(found, torch.full_like(found, number).nan_to_num(7.0, 8.0, 9.0))
        torch.testing.assert_close(lse, expected_lse, rtol=lse_tolerance, atol=lse_tolerance)


@pytest.mark.parametrize(PARAMETERS, CPU_KERNELS)
@pytest.mark.parametrize("width", [40, 25, 100])
def test_a_call_of_several_tiles_is_as_many_calls(
    kernel: Kernel, device: str, dtype: torch.dtype, tolerance: float, lse_tolerance: float, width: int
) -> None:
    """Also where their columns overlap, or leave some out; no key is copied."""
    tiles, height, heads = 6, 40, 2
    call = Call(range(tiles * height), range(width), right=0 if width == height else None, tiles=tiles)
    q = torch.randn(heads, tiles * height, 16, dtype=dtype)
    k, v = (torch.randn(1, len(call.reach), 16, dtype=dtype) for _ in range(2))
    seen: list[torch.Tensor] = []

    class Watched:
        abilities = kernel.abilities

        def attend(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            left: int | None,
            right: int | None,
            scores: Scores,
            ahead: int = 0,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(k)
            return kernel.attend(q, k, v, left, right, scores, ahead)

        attend_packed = kernel.attend_packed

    merged = torch.zeros(heads, tiles * height, 16, dtype=dtype)
    merged_lse = torch.full((heads, tiles * height), -torch.inf, dtype=torch.float64)
    Calls(Watched(), fold, Host(), Timeline(Host())).attend((merged, merged_lse), q, k, v, call, Scores(0.25))
    assert seen[0].data_ptr() == k.data_ptr()
    for t in range(tiles):
        rows, columns = slice(t * height, (t + 1) * height), slice(t * height, t * height + width)
        out, lse = kernel.attend(q[:, rows], k[:, columns], v[:, columns], call.left, call.right, Scores(0.25))
        torch.testing.assert_close(merged[:, rows], out, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(merged_lse[:, rows], lse.double(), rtol=lse_tolerance, atol=lse_tolerance)


def documents(lengths: Sequence[int], *, causal: bool, gap: int = 0) -> np.ndarray:
    """Return the bands of documents one after another, some rows and columns apart."""
    stops = np.cumsum(np.array(lengths) + gap)
    starts = stops - np.array(lengths)
    unbounded = np.full_like(starts, LEAST), np.full_like(starts, MOST)
    return sorted_bands(np.stack([starts, stops, starts, stops, unbounded[0], starts * 0 if causal else unbounded[1]]))


def expected_of_scores(scores: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, 2)
    values = v.cpu().double().repeat_interleave(len(scores) // len(v), 0)
    return torch.exp(scores - lse[..., None]).nan_to_num(nan=0.0) @ values, lse


def scores_of(
    q: torch.Tensor, k: torch.Tensor, cap: float | None, slopes: torch.Tensor | None, ahead: int
) -> torch.Tensor:
    """Scores by their definition, in float64."""
    q, k = q.cpu().double(), k.cpu().double().repeat_interleave(len(q) // len(k), 0)
    scores = q @ k.transpose(1, 2) * 0.3
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if slopes is not None:
        distance = torch.arange(k.shape[1])[None, :] + ahead - torch.arange(q.shape[1])[:, None]
        scores = scores - slopes.cpu().double()[:, None, None] * distance.abs()
    return scores


@pytest.mark.parametrize(PARAMETERS, KERNELS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[1] * 40, [3, 1, 1, 60, 200, 2, 130, 129, 1, 1, 5], [500, 7, 511, 300]], ids=len)
def test_packed_bands_are_as_many_tiles(
    kernel: Kernel, device: str, dtype: torch.dtype, tolerance: float, lse_tolerance: float, lengths: list[int],
    causal: bool,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(len(lengths))
    for gap, (heads, kv_heads) in ((0, (1, 1)), (3, (4, 2)), (40, (3, 1))):
        bands = documents(lengths, causal=causal, gap=gap)
        rows = int(bands[1, -1])
        q = torch.randn(heads, rows, 24, generator=generator).to(device, dtype)
        k, v = (torch.randn(kv_heads, rows, 24, generator=generator) for _ in range(2))
        seen = torch.zeros(rows, rows, dtype=torch.bool)
        for r0, r1, c0, c1, *_ in bands.T.tolist():
            seen[r0:r1, c0:c1] = torch.ones(r1 - r0, c1 - c0).tril() > 0 if causal else True
        nobody = ~seen.any(0)
        k[:, nobody], v[:, nobody] = torch.nan, torch.inf
        k, v = k.to(device, dtype), v.to(device, dtype)
        out, lse = kernel.attend_packed(q, k, v, bands, Scores(0.3))
        plain = [x.nan_to_num(0.0, 0.0, 0.0) for x in (k, v)]
        expected, expected_lse = expected_of_scores(scores_of(q, plain[0], None, None, 0), plain[1], seen)
        assert float((out.cpu().double() - expected).norm() / expected.norm()) <= tolerance
        torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=lse_tolerance, atol=lse_tolerance)


@pytest.mark.parametrize(PARAMETERS, KERNELS)
@pytest.mark.parametrize("ahead", [0, -70, 300, -(10**9)])
@pytest.mark.parametrize("terms", [("soft_cap",), ("alibi",), ("soft_cap", "alibi")], ids=" and ".join)
def test_score_terms(
    kernel: Kernel, device: str, dtype: torch.dtype, tolerance: float, lse_tolerance: float, ahead: int,
    terms: tuple[str, ...],
) -> None:  # fmt: skip
    """As exact far away as near: a slope's part is counted from the nearest key."""
    if not kernel.abilities.terms >= set(terms):
        pytest.skip(f"it does not know {terms}")
    generator = torch.Generator().manual_seed(ahead % 1000)
    for (heads, kv_heads), (rows, columns) in itertools.product([(1, 1), (4, 2)], [(5, 9), (1, 1), (530, 1_100)]):
        q = (4 * torch.randn(heads, rows, 24, generator=generator)).to(device, dtype)
        k, v = (torch.randn(kv_heads, columns, 24, generator=generator).to(device, dtype) for _ in range(2))
        cap = 5.0 if "soft_cap" in terms else None
        slopes = torch.tensor([2.0**-n for n in range(heads)], device=device).double() if "alibi" in terms else None
        position = torch.arange(columns) - torch.arange(rows)[:, None]
        most = max(4 * tolerance, 1e-15 * abs(ahead))  # the reference rounds large scores, too
        for left, right in bands_of(kernel, rows, columns)[::3]:
            seen = torch.ones(rows, columns, dtype=torch.bool)
            seen &= position >= -left if left is not None else True
            seen &= position <= right if right is not None else True
            out, lse = kernel.attend(q, k, v, left, right, Scores(0.3, cap, slopes), ahead)
            expected, expected_lse = expected_of_scores(scores_of(q, k, cap, slopes, ahead), v, seen)
            assert float((out.cpu().double() - expected).norm() / expected.norm()) <= most
            torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=lse_tolerance, atol=4 * lse_tolerance)
        bands = documents([columns], causal=rows == columns)
        bands[1] = rows
        if not kernel.abilities.tile.skips:
            out, lse = kernel.attend_packed(q, k, v, bands, Scores(0.3, cap, slopes), ahead)
            seen = position <= 0 if rows == columns else position < 10**9
            expected, expected_lse = expected_of_scores(scores_of(q, k, cap, slopes, ahead), v, seen)
            assert float((out.cpu().double() - expected).norm() / expected.norm()) <= most
            torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=lse_tolerance, atol=4 * lse_tolerance)


@pytest.mark.parametrize("threads", [1, 4])
def test_our_own_kernel_gives_the_same_bits_for_any_number_of_threads(threads: int) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, n, 64, generator=generator) for n in (1_100, 2_300, 2_300))
    scores = Scores(0.125, 50.0, torch.tensor([0.5, 0.01]).double())
    bands = documents([3, 5, 200, 90, 400, 400], causal=True)

    def all_bits() -> list[torch.Tensor]:
        kernel = OnlineKernel()
        edges: list[Band] = [(None, None), (40, 90), (None, 0)]
        found = [kernel.attend(q, k, v, left, right, scores, -70) for left, right in edges]
        found.append(kernel.attend_packed(q, k, v, bands, scores))
        return [x for pair in found for x in pair]

    before, expected = torch.get_num_threads(), all_bits()
    try:
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(all_bits(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


class Fastest:
    """What was measured of operators: the last one named is the fastest."""

    def fastest(self, dtype: str, width: int, operators: Sequence[str], rows: int, columns: int) -> str | None:
        assert (dtype, width, rows, columns) == ("float32", 64, 4096, 1024)
        return operators[-1]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.float64], ids=str)
def test_a_choice_is_two_names_from_which_the_kernel_is_made(stored: torch.dtype) -> None:
    choice = chosen(CPU, stored, None, None, 4096, 1024, 64)
    assert choice == chosen(CPU, stored, "auto", None, 1, 1, 8) == KernelChoice("torch-cpu", "flash-for-cpu")
    assert choice in choices(CPU, stored)
    kernel = kernel_of(choice, CPU, stored)
    assert isinstance(kernel, TorchCpuKernel)
    assert kernel.abilities.compute_dtype(stored) == (torch.float64 if stored == torch.float64 else torch.float32)


def test_the_operator_is_the_fastest_that_was_measured() -> None:
    assert chosen(CPU, torch.float32, None, Fastest(), 4096, 1024, 64).operator == "flash-for-cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_operators_of_a_cuda_device() -> None:
    found = [choice.operator for choice in choices(CUDA, torch.bfloat16) if choice.kernel == "torch-cuda"]
    assert found in (["cudnn", "flash"], ["flash"])
    choice = chosen(CUDA, torch.float8_e4m3fn, None, None, 4096, 1024, 64)
    assert choice == KernelChoice("torch-cuda", found[0])
    assert kernel_of(choice, CUDA, torch.float8_e4m3fn).abilities.compute_dtype(torch.float8_e4m3fn) == torch.float16


def test_a_kernel_that_cannot_be_here_is_refused() -> None:
    with pytest.raises(InputError, match='take device="cuda"'):
        chosen(CPU, torch.float32, "cupy", None, 1, 1, 64)
    for choice in (KernelChoice("torch-cuda", "flash"), KernelChoice("torch-cpu", "magic"), KernelChoice("", "")):
        with pytest.raises(InputError, match="cannot compute float32 arrays on cpu here"):
            kernel_of(choice, CPU, torch.float32)
