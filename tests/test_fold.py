"""The contract of merging a tile into an accumulator: every implementation does what the formula says, in place."""

import pytest
import torch

from cqsa_stream.kernels.choose import fold_for
from cqsa_stream.kernels.contract import Fold
from cqsa_stream.kernels.fold import fold

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def implementation(name: str) -> tuple[Fold, torch.device]:
    if name == "cpu":
        return fold_for(CPU), CPU
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if name == "torch":
        return fold, CUDA
    pytest.importorskip("cupy")
    from cqsa_stream.kernels.cupy import fold as fused

    return fused, CUDA


FOLDS = ["cpu", pytest.param("torch", marks=pytest.mark.gpu), pytest.param("cupy", marks=pytest.mark.gpu)]


def expected(
    out: torch.Tensor, lse: torch.Tensor, tile: torch.Tensor, tile_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in float64: weights by the exponentials of what each side exceeds the larger by."""
    high = torch.maximum(lse, tile_lse.double()).clamp_min(-1e300)
    a, b = torch.exp(lse - high), torch.exp(tile_lse.double() - high)
    total = a + b
    merged = (a[..., None] * out.double() + b[..., None] * tile.double()) / total.clamp_min(1e-300)[..., None]
    merged_lse = torch.where(total > 0, high + total.log(), -torch.inf)
    return torch.where(total[..., None] > 0, merged, out.double()), merged_lse


@pytest.mark.parametrize("name", FOLDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [1, 7, 8, 64, 80, 128, 256])
def test_fold(dim: int, dtype: torch.dtype, name: str) -> None:
    run, device = implementation(name)
    generator = torch.Generator().manual_seed(dim)
    for heads, rows, size in ((1, 1, 1.0), (3, 37, 1.0), (2, 300, 1e4)):
        out = torch.randn(heads, rows + 9, dim, generator=generator)
        lse = torch.randn(heads, rows + 9, generator=generator, dtype=torch.float64) * size
        tile = torch.randn(heads, rows, dim + 3, generator=generator).to(dtype)[:, :, :dim]
        tile_lse = torch.randn(heads, rows, generator=generator) * size
        lse[:, 0::3] = -torch.inf
        tile_lse[:, 0::2] = -torch.inf
        out[:, 0::3] = 0
        tile[:, 0::2] = 0
        wanted = expected(out[:, 5 : 5 + rows], lse[:, 5 : 5 + rows], tile, tile_lse)
        before = out.clone(), lse.clone()
        on_device = [x.to(device) for x in (out, lse, tile, tile_lse)]
        run(on_device[0][:, 5 : 5 + rows], on_device[1][:, 5 : 5 + rows], on_device[2], on_device[3])
        found_out, found_lse = on_device[0].cpu(), on_device[1].cpu()
        torch.testing.assert_close(found_out[:, 5 : 5 + rows].double(), wanted[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found_lse[:, 5 : 5 + rows], wanted[1], rtol=1e-14, atol=1e-14)
        for found, old in zip((found_out, found_lse), before, strict=True):
            assert torch.equal(found[:, :5], old[:, :5])
            assert torch.equal(found[:, 5 + rows :], old[:, 5 + rows :])


INF, NAN = torch.inf, torch.nan
MOST = torch.finfo(torch.float32).max
CASES = [  # held, its lse, added, its lse, merged, its lse
    (0.0, -INF, INF, 0.0, INF, 0.0),
    (0.0, -INF, -INF, 3.0, -INF, 3.0),
    (INF, 0.0, 1.0, 0.0, INF, 0.6931471805599453),
    (1.0, 0.0, INF, 0.0, INF, 0.6931471805599453),
    (INF, 5.0, 1.0, -5.0, INF, 5.000045398899217),
    (INF, 0.0, -INF, 0.0, NAN, 0.6931471805599453),
    (MOST, 0.0, -MOST, 0.0, 0.0, 0.6931471805599453),
    (-MOST, 0.0, MOST, 0.0, 0.0, 0.6931471805599453),
    (MOST, 0.0, MOST, 0.0, MOST, 0.6931471805599453),
    (NAN, 0.0, 1.0, 0.0, NAN, 0.6931471805599453),
    (2.0, 1.0, NAN, -INF, 2.0, 1.0),
    (2.0, 1.0, INF, -INF, 2.0, 1.0),
    (0.0, -INF, NAN, -INF, 0.0, -INF),
    (2.0, 0.0, INF, -2000.0, 2.0, 0.0),
    (2.0, NAN, 1.0, 0.0, NAN, NAN),
    (2.0, 0.0, 1.0, NAN, NAN, NAN),
    (0.0, -INF, 1.0, NAN, NAN, NAN),
    (NAN, INF, 1.0, 0.0, NAN, INF),
]  # fmt: skip


@pytest.mark.parametrize("name", FOLDS)
@pytest.mark.parametrize("dim", [1, 8, 33])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_of_any_kind(case: tuple[float, ...], dim: int, name: str) -> None:
    """Beside an ordinary row, which stays exact."""
    run, device = implementation(name)
    held, held_lse, added, added_lse, merged, merged_lse = case
    out = torch.tensor([held, 1.0], device=device)[None, :, None].repeat(1, 1, dim)
    lse = torch.tensor([[held_lse, 0.0]], device=device, dtype=torch.float64)
    tile = torch.tensor([added, 3.0], device=device)[None, :, None].repeat(1, 1, dim)
    run(out, lse, tile, torch.tensor([[added_lse, 0.0]], device=device))
    torch.testing.assert_close(out[0, 0].cpu(), torch.full((dim,), merged), rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(out[0, 1].cpu(), torch.full((dim,), 2.0))
    wanted = torch.tensor([merged_lse, 0.6931471805599453], dtype=torch.float64)
    torch.testing.assert_close(lse[0].cpu(), wanted, rtol=1e-14, atol=1e-14, equal_nan=True)
