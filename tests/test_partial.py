"""The algebra of partials: merging is associative and commutative to rounding, with an identity."""

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st

from cqsa_stream.kernels.fold import fold


@dataclass
class Partial:
    """Attention of some queries over the keys in ``cover``: out float32, lse float64."""

    out: torch.Tensor
    lse: torch.Tensor
    cover: int = 0


def empty(heads: int, rows: int, value_dim: int) -> Partial:
    return Partial(torch.zeros(heads, rows, value_dim), torch.full((heads, rows), -torch.inf, dtype=torch.float64))


def merge(a: Partial, b: Partial) -> Partial:
    merged = Partial(a.out.clone(), a.lse.clone(), a.cover | b.cover)
    fold(merged.out, merged.lse, b.out, b.lse)
    return merged


def partial(scores: torch.Tensor, values: torch.Tensor, cover: int) -> Partial:
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse[..., None]).nan_to_num(nan=0.0)
    return Partial((weights @ values).float(), lse, cover)


def parts(seed: int, size: float, masked: int) -> list[Partial]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(3):
        scores = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64) * size
        if masked >> index & 1:
            scores[:, :3] = -torch.inf
        found.append(partial(scores, torch.randn(2, 4, 6, generator=generator, dtype=torch.float64), 1 << index))
    return found


def same(a: Partial, b: Partial) -> None:
    assert a.cover == b.cover
    torch.testing.assert_close(a.out, b.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.lse, b.lse, rtol=1e-12, atol=1e-12)
    assert torch.isfinite(a.out).all()
    assert not torch.isnan(a.lse).any()


@given(st.integers(0, 10**6), st.sampled_from([0.05, 1.0, 30.0, 1e4]), st.integers(0, 7))
def test_merging_is_associative_and_commutative(seed: int, size: float, masked: int) -> None:
    a, b, c = parts(seed, size, masked)
    same(merge(a, b), merge(b, a))
    same(merge(merge(a, b), c), merge(a, merge(b, c)))


@given(st.integers(0, 10**6), st.sampled_from([1.0, 1e4]), st.integers(0, 7))
def test_the_empty_partial_is_the_identity(seed: int, size: float, masked: int) -> None:
    a = parts(seed, size, masked)[0]
    none = empty(2, 5, 6)
    for merged in (merge(a, none), merge(none, a)):
        assert torch.equal(merged.out, a.out)
        assert torch.equal(merged.lse, a.lse)


def test_the_union_is_what_one_call_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 7, 90, generator=generator, dtype=torch.float64) * 40
    values = torch.randn(1, 90, 8, generator=generator, dtype=torch.float64)
    merged = empty(1, 7, 8)
    for i in range(9):
        span = slice(10 * i, 10 * i + 10)
        merged = merge(merged, partial(scores[:, :, span], values[:, span], 1 << i))
    same(merged, partial(scores, values, (1 << 9) - 1))


def test_a_large_lse_never_overflows() -> None:
    a, b = parts(0, 1.0, 0)[:2]
    a.lse += 1e5
    b.lse += 1e5 - 3
    merged = merge(a, b)
    assert torch.isfinite(merged.out).all()
    assert torch.isfinite(merged.lse).all()
