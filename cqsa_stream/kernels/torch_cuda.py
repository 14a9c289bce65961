"""The vendor's attention on CUDA, by the aten operators that return the log-sum-exp; for float16 and bfloat16, and for
float8 arrays upcast to float16, which holds each of their numbers.

The operators are cuDNN's, which is faster on Hopper for almost all sizes, and flash attention. Both want head dims that
are equal and multiples of 8: others are padded with zeros, which changes no score. (The memory-efficient operator is
never used: its log-sum-exp and long sequences are wrong, pytorch#162588.)
"""

from functools import cache

import torch
from torch import Tensor

from cqsa_stream.kernels.contract import Abilities, Attended, Keys, Queries, Values, by_triangles
from cqsa_stream.schedulers.masks.calls import Tile

__all__ = ["OPERATORS", "TorchCudaKernel", "operators"]


class TorchCudaKernel:
    """16-bit tiles on a CUDA device; each tile's output is rounded to 16 bits by the kernel."""

    abilities = Abilities(
        dtypes=(torch.float16, torch.bfloat16),
        tile=Tile(65_536, 65_536, 65_536, 65_536),
        calls_at_a_time=2,
        whole_dims=8,
        rounded_tiles=True,
    )

    def __init__(self, operator: str = "cudnn") -> None:
        """``operator``: one of OPERATORS."""
        self.operator = operator

    def attend(self, q: Queries, k: Keys, v: Values, left: int | None, right: int | None, scale: float) -> Attended:
        if k.shape[1] == 0:
            empty = q.new_zeros(*q.shape[:2], v.shape[2], dtype=torch.float32)
            return empty, empty.new_full(q.shape[:2], -torch.inf)
        value_dim = v.shape[2]
        q, k, v = self.abilities.padded(q, k, v)
        out, lse = by_triangles(OPERATORS[self.operator], q, k, v, left, right, scale)
        return _without_unseen(out[:, :, :value_dim], lse)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = attend(q[None], k[None], v[None], None, True, 0.0, causal, False, scale=scale)
    return out[0], lse[0, :, : q.shape[1], 0]


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse, *_ = attend(q[None], k[None], v[None], 0.0, causal, False, scale=scale)
    return out[0], lse[0, :, : q.shape[1]]  # some versions round the rows of lse up


def _without_unseen(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Give (0, -inf) to rows all of whose scores are -inf: of these flash says +inf, as it does where out is NaN."""
    unseen, wrong = lse.isposinf(), out[..., 0].isnan()
    lse.masked_fill_(unseen, -torch.inf).masked_fill_(unseen.logical_and_(wrong), torch.nan)
    return out.masked_fill_(lse.isneginf().unsqueeze(-1), 0.0), lse


OPERATORS = {"cudnn": _cudnn, "flash": _flash}


@cache
def operators(device: torch.device, stored: torch.dtype) -> list[str]:
    """Return those that run on the device, cuDNN's first: older devices refuse it when it is called."""
    dtype = TorchCudaKernel.abilities.compute_dtype(stored)
    tiny = torch.zeros(1, 64, 64, device=device, dtype=dtype)
    try:
        _cudnn(tiny, tiny, tiny, False, 1.0)
    except RuntimeError:
        return ["flash"]
    return ["cudnn", "flash"]
