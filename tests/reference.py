"""Dense float64 attention, written without the package, and the inputs on which exactness is hard."""

import math

import torch
from torch import Tensor


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    q_start: int = 0,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) in float64; rows that see no key give 0 and -inf. ``seen``: which keys each query sees."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    if causal:
        position = torch.arange(q.shape[2], device=q.device)[:, None] + q_start
        scores = scores.masked_fill(torch.arange(k.shape[2], device=q.device)[None, :] > position, -math.inf)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, 3)
    weights = torch.exp(scores - lse[..., None]).nan_to_num(nan=0.0)
    return weights @ v, lse


def error(found: Tensor, expected: Tensor) -> float:
    """Return ‖found - expected‖ / ‖expected‖."""
    return float((found.double() - expected).norm() / expected.norm())


def inputs(
    kind: str, dtype: torch.dtype, heads: int, kv_heads: int, tokens: int, dim: int, *, batch: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v of one of the hard kinds."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int) -> Tensor:
        return torch.randn(batch, count, tokens, dim, generator=generator)

    q, k, v = normal(heads), normal(kv_heads), normal(kv_heads)
    if kind == "uniform":
        q, k = q * 0.05, k * 0.05
    elif kind == "peaked":
        q, k = q * 12, k * 12
    elif kind == "sink":
        k[:, :, 0] = 6 * q[:, :kv_heads].mean(2) + 8
        q = q + 1
    elif kind == "early keys unseen":
        k[:, :, : tokens // 3] = -40 * torch.sign(q.mean(2, keepdim=True))[:, :kv_heads]
        q = q.abs() * torch.sign(q.mean(2, keepdim=True))
    return q.to(dtype), k.to(dtype), v.to(dtype)
