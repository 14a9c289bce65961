"""The contract that every kernel passes. A new one is a line in KERNELS."""

import itertools

import pytest
import torch

from cqsa_stream.errors import InputError
from cqsa_stream.kernels.choose import Kernel, kernel_for
from cqsa_stream.kernels.reference import PlainKernel
from cqsa_stream.kernels.torch_cpu import TorchCpuKernel
from cqsa_stream.kernels.torch_cuda import TorchCudaKernel
from cqsa_stream.schedulers.masks.bands import TileMask
from tests.reference import dense

GPU = pytest.param(TorchCudaKernel(), "cuda", torch.float16, 3e-3, 2e-3, marks=pytest.mark.gpu, id="torch-cuda")
PLAIN_GPU = pytest.param(
    PlainKernel(torch.float32), "cuda", torch.float32, 2e-6, 1e-5, marks=pytest.mark.gpu, id="plain-cuda"
)


def cupy_kernel() -> Kernel | None:
    try:
        return kernel_for(torch.device("cuda"), torch.float32, "cupy")
    except InputError:
        return None


CUPY = pytest.param(cupy_kernel(), "cuda", torch.float32, 2e-6, 1e-5, marks=pytest.mark.gpu, id="cupy")
KERNELS = [
    pytest.param(TorchCpuKernel(), "cpu", torch.float32, 2e-6, 1e-5, id="torch-cpu"),
    pytest.param(PlainKernel(torch.float64), "cpu", torch.float64, 1e-14, 1e-13, id="plain-float64"),
    pytest.param(PlainKernel(torch.float32), "cpu", torch.float32, 2e-6, 1e-5, id="plain-float32"),
    GPU,
    PLAIN_GPU,
    CUPY,
]
DIMS = [(8, 8), (12, 12), (64, 64), (80, 80), (64, 128), (128, 64), (256, 256)]


@pytest.fixture(autouse=True)
def _device_is_there(device: str, kernel: Kernel | None) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if kernel is None:
        pytest.skip("no CuPy")


@pytest.mark.parametrize(("kernel", "device", "dtype", "tolerance", "lse_tolerance"), KERNELS)
@pytest.mark.parametrize(("dim", "value_dim"), DIMS)
def test_contract(
    kernel: Kernel, device: str, dtype: torch.dtype, tolerance: float, lse_tolerance: float, dim: int, value_dim: int
) -> None:
    generator = torch.Generator().manual_seed(dim)
    masks: tuple[TileMask, ...] = ("full", "causal")
    for (heads, kv_heads), (rows, columns), mask in itertools.product(
        [(1, 1), (4, 2), (3, 1)], [(1, 1), (5, 9), (9, 5), (130, 257), (257, 257), (9, 5000)], masks
    ):
        if mask == "causal" and rows != columns:
            continue
        q = torch.randn(heads, rows, dim, generator=generator).to(device, dtype)
        k = torch.randn(kv_heads, columns, dim, generator=generator).to(device, dtype)
        v = torch.randn(kv_heads, columns, value_dim, generator=generator).to(device, dtype)
        scale = dim**-0.5
        out, lse = kernel.attend(q, k, v, mask, scale)
        expected, expected_lse = dense(
            q[None].cpu(), k[None].cpu(), v[None].cpu(), causal=mask == "causal", scale=scale
        )
        assert out.shape == (heads, rows, value_dim)
        assert lse.shape == (heads, rows)
        assert float((out.cpu().double() - expected[0]).norm() / expected.norm()) <= tolerance
        torch.testing.assert_close(lse.cpu().double(), expected_lse[0], rtol=lse_tolerance, atol=lse_tolerance)


@pytest.mark.parametrize(("kernel", "device", "dtype", "tolerance", "lse_tolerance"), KERNELS)
def test_a_row_without_keys_is_the_identity(
    kernel: Kernel, device: str, dtype: torch.dtype, tolerance: float, lse_tolerance: float
) -> None:
    q, none = torch.randn(2, 3, 8, device=device, dtype=dtype), torch.empty(1, 0, 8, device=device, dtype=dtype)
    out, lse = kernel.attend(q, none, none, "full", 1.0)
    assert torch.equal(out.cpu(), torch.zeros_like(out, device="cpu"))
    assert torch.equal(lse.cpu(), torch.full_like(lse, -torch.inf, device="cpu"))


@pytest.mark.parametrize(("kernel", "device", "dtype", "tolerance", "lse_tolerance"), KERNELS)
def test_the_same_call_gives_the_same_bits(
    kernel: Kernel, device: str, dtype: torch.dtype, tolerance: float, lse_tolerance: float
) -> None:
    q, k, v = (torch.randn(2, 300, 64, device=device, dtype=dtype) for _ in range(3))
    first, second = (kernel.attend(q, k, v, "causal", 0.125) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def attended(
    kernel: Kernel, device: str, dtype: torch.dtype, *qkv: torch.Tensor, mask: TileMask = "full"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and lse of one head, by float64 tensors on the CPU."""
    q, k, v = (x[None].to(device, dtype) for x in qkv)
    out, lse = kernel.attend(q, k, v, mask, 1.0)
    return out[0].cpu().double(), lse[0].cpu().double()


@pytest.mark.parametrize(("kernel", "device", "dtype", "tolerance", "lse_tolerance"), KERNELS)
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


@pytest.mark.parametrize(("kernel", "device", "dtype", "tolerance", "lse_tolerance"), KERNELS)
def test_rows_before_the_first_key_that_counts_are_the_identity(
    kernel: Kernel, device: str, dtype: torch.dtype, tolerance: float, lse_tolerance: float
) -> None:
    q, k, v = (torch.randn(300, 8) for _ in range(3))
    q[:, 0], k[:, 0], k[:200, 0] = 1, 0, -torch.inf
    out, lse = attended(kernel, device, dtype, q, k, v, mask="causal")
    assert torch.equal(out[:200], torch.zeros_like(out[:200]))
    assert torch.equal(lse[:200], torch.full_like(lse[:200], -torch.inf))
    rounded = [x.to(dtype).double()[None, None] for x in (q, k[200:], v[200:])]
    expected, expected_lse = dense(rounded[0], rounded[1], rounded[2], causal=True, scale=1.0, q_start=-200)
    torch.testing.assert_close(out[200:], expected[0, 0, 200:], rtol=10 * tolerance, atol=10 * tolerance)
    torch.testing.assert_close(lse[200:], expected_lse[0, 0, 200:], rtol=lse_tolerance, atol=lse_tolerance)


@pytest.mark.parametrize(("kernel", "device", "dtype", "tolerance", "lse_tolerance"), KERNELS)
def test_lse_0_and_output_0_can_be_real(
    kernel: Kernel, device: str, dtype: torch.dtype, tolerance: float, lse_tolerance: float
) -> None:
    q, k, v = torch.zeros(3, 8), torch.randn(1, 8), torch.zeros(1, 8)
    out, lse = attended(kernel, device, dtype, q, k, v)
    assert torch.equal(out, torch.zeros_like(out))
    torch.testing.assert_close(lse, torch.zeros_like(lse), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("kernel", "device", "dtype", "tolerance", "lse_tolerance"), KERNELS)
def test_nan_stays_nan(kernel: Kernel, device: str, dtype: torch.dtype, tolerance: float, lse_tolerance: float) -> None:
    q, k, v = (torch.randn(100, 8) for _ in range(3))
    q[3], q[7, 0], k[:, 0] = torch.nan, torch.nan, -torch.inf
    q[8:, 0], k[50:, 0] = 1, 0
    out, lse = attended(kernel, device, dtype, q, k, v)
    for row in (3, 7):
        assert out[row].isnan().all()
        assert lse[row].isnan()
    assert torch.isfinite(out[8:]).all()
    assert torch.isfinite(lse[8:]).all()


CPU_KERNELS = [KERNELS[0], KERNELS[1], KERNELS[2]]


@pytest.mark.parametrize(("kernel", "device", "dtype", "tolerance", "lse_tolerance"), CPU_KERNELS)
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_values_of_keys_that_are_not_seen_change_nothing(
    kernel: Kernel, device: str, dtype: torch.dtype, tolerance: float, lse_tolerance: float, number: float
) -> None:
    q, k, v = (torch.randn(700, 8) for _ in range(3))
    expected, expected_lse = attended(kernel, device, dtype, q, k, v, mask="causal")
    v[500, 2] = number
    out, lse = attended(kernel, device, dtype, q, k, v, mask="causal")
    torch.testing.assert_close(out[:500], expected[:500], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out[500:, 3:], expected[500:, 3:], rtol=tolerance, atol=tolerance)
    assert torch.equal(
        out[500:, 2].nan_to_num(7.0, 8.0, 9.0), torch.full((200,), number).nan_to_num(7.0, 8.0, 9.0).double()
    )
    torch.testing.assert_close(lse, expected_lse, rtol=lse_tolerance, atol=lse_tolerance)
