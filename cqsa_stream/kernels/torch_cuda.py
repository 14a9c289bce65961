"""The vendor's attention on CUDA, by the aten operators that return the log-sum-exp; for float16 and bfloat16, and for
float8 arrays upcast to float16, which holds each of their numbers.

The operators are cuDNN's, which is faster on Hopper for almost all sizes, and flash attention. It alone takes windows
and packed bands, and takes no time for what they hide. Both want head dims that are equal and multiples of 8: others
are padded with zeros, which changes no score. (The memory-efficient operator is never used: its log-sum-exp and long
sequences are wrong, pytorch#162588.)

Flash attention counts a window from the last row and the last column of a tile; a bound below 0 would be none. The
bands of a call are tight, so both bounds are at least 0 from either corner.
"""

from functools import cache

import torch
from torch import Tensor

from cqsa_stream.kernels.contract import Abilities, Attended, Keys, Queries, Scores, Values
from cqsa_stream.kernels.sequences import sequences
from cqsa_stream.schedulers.masks.arrays import Bands64
from cqsa_stream.schedulers.masks.calls import Tile

__all__ = ["OPERATORS", "TorchCudaKernel", "operators"]


class TorchCudaKernel:
    """16-bit tiles on a CUDA device; each tile's output is rounded to 16 bits by the kernel."""

    abilities = Abilities(
        dtypes=(torch.float16, torch.bfloat16),
        tile=Tile(65_536, 65_536, 65_536, 65_536, bands=True, skips=True, small=4_096, pack=65_536),
        calls_at_a_time=2,
        whole_dims=8,
        rounded_tiles=True,
    )

    def __init__(self, operator: str = "cudnn") -> None:
        """``operator``: one of OPERATORS."""
        self.operator = operator

    def attend(
        self, q: Queries, k: Keys, v: Values, left: int | None, right: int | None, scores: Scores, ahead: int = 0
    ) -> Attended:
        (_, rows, _), columns, value_dim = q.shape, k.shape[1], v.shape[2]
        if columns == 0:
            empty = q.new_zeros(*q.shape[:2], v.shape[2], dtype=torch.float32)
            return empty, empty.new_full(q.shape[:2], -torch.inf)
        q, k, v = self.abilities.padded(q, k, v)
        if left is None and (right is None or (right == 0 and rows == columns)):
            out, lse = OPERATORS[self.operator](q, k, v, right == 0, scores.scale)
        else:
            back = columns - rows
            bounds = None if left is None else left + back, None if right is None else right - back
            out, lse = _windowed(q, k, v, bounds, scores.scale)
        return _without_unseen(out[:, :, :value_dim], lse)

    def attend_packed(self, q: Queries, k: Keys, v: Values, bands: Bands64, scores: Scores, ahead: int = 0) -> Attended:
        value_dim = v.shape[2]
        q, k, v = self.abilities.padded(q, k, v)
        out, lse = _packed(q, k, v, bands, scores.scale)
        return _without_unseen(out[:, :, :value_dim], lse)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = attend(q[None], k[None], v[None], None, True, 0.0, causal, False, scale=scale)
    return out[0], lse[0, :, : q.shape[1], 0]


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse, *_ = attend(q[None], k[None], v[None], 0.0, causal, False, scale=scale)
    return out[0], lse[0, :, : q.shape[1]]  # some versions round the rows of lse up


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int | None, int | None], scale: float
) -> tuple[Tensor, Tensor]:
    """Attend one tile; ``bounds``: left and right, counted from the last row and column."""
    assert min(bound for bound in bounds if bound is not None) >= 0, f"bounds {bounds}; expected a tight band"
    rows, columns = q.shape[1], k.shape[1]
    bounds = tuple(None if n is None or n >= rows + columns else n for n in bounds)  # type: ignore[assignment]
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), None, None, rows, columns, 0.0, False, False, scale=scale,
        window_size_left=bounds[0], window_size_right=bounds[1],
    )  # fmt: skip
    return out[0].transpose(0, 1), lse[0, :, :rows]


def _packed(q: Tensor, k: Tensor, v: Tensor, bands: Bands64, scale: float) -> tuple[Tensor, Tensor]:
    packed = sequences(bands, q.shape[1], q.device)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(x.transpose(0, 1) for x in (q, k, v)), packed.rows, packed.keys, packed.most_rows, packed.most_keys, 0.0,
        False, False, scale=scale, window_size_left=packed.left, window_size_right=packed.right, seqused_k=packed.used,
    )  # fmt: skip
    return out.transpose(0, 1), lse[:, : q.shape[1]]


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
