"""The vendor's attention on CUDA, by the aten operators that return the log-sum-exp; for float16 and bfloat16, and for
float8 arrays upcast to float16, which holds each of their numbers.

Of cuDNN's and flash attention that which ``cqsa bench`` found faster for a call's size; where nothing was measured,
cuDNN's (it is faster on Hopper for almost all sizes), if it runs on the device. Both want head dims that are equal and
multiples of 8: others are padded with zeros, which changes no score. (The memory-efficient operator is never used: its
log-sum-exp and long sequences are wrong, pytorch#162588.)
"""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from cqsa_stream.machine.calibration import load
from cqsa_stream.schedulers.masks.bands import TileMask
from cqsa_stream.schedulers.model.memory import Tile

__all__ = ["OPERATORS", "TorchCudaKernel", "cudnn_runs"]


class TorchCudaKernel:
    """16-bit tiles on a CUDA device; each tile's output is rounded to 16 bits by the kernel."""

    name = "torch-cuda"
    tile = Tile(65_536, 65_536, 65_536)
    score_bytes = score_columns = 0
    at_a_time = 2
    workspace_bytes = 0

    def __init__(self, operator: str | None = None) -> None:
        """``operator``: "cudnn" or "flash", where it is not to be chosen by the size of a call."""
        self._operator = operator

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        return torch.float16 if stored.itemsize == 1 else stored

    def attend(
        self,
        q: Float[Tensor, "heads q d"],
        k: Float[Tensor, "kv_heads k d"],
        v: Float[Tensor, "kv_heads k dv"],
        mask: TileMask,
        scale: float,
    ) -> tuple[Float[Tensor, "heads q dv"], Float[Tensor, "heads q"]]:
        if k.shape[1] == 0:
            empty = q.new_zeros(*q.shape[:2], v.shape[2], dtype=torch.float32)
            return empty, empty.new_full(q.shape[:2], -torch.inf)
        value_dim = v.shape[2]
        width = -(-max(q.shape[2], value_dim) // 8) * 8
        q, k, v = (x if x.shape[2] == width else pad(x, (0, width - x.shape[2])) for x in (q, k, v))
        name = self._operator or _chosen(q.device, q.dtype, width, q.shape[0] * q.shape[1], k.shape[1])
        out, lse = OPERATORS[name](q[None], k[None], v[None], mask == "causal", scale)
        return _without_unseen(out[0, :, :, :value_dim], lse[0, :, : q.shape[1]])


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = attend(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse[..., 0]


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


def _without_unseen(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Give (0, -inf) to rows all of whose scores are -inf: of these flash says +inf, as it does where out is NaN."""
    unseen, wrong = lse.isposinf(), out[..., 0].isnan()
    lse.masked_fill_(unseen, -torch.inf).masked_fill_(unseen.logical_and_(wrong), torch.nan)
    return out.masked_fill_(lse.isneginf().unsqueeze(-1), 0.0), lse


OPERATORS = {"cudnn": _cudnn, "flash": _flash}


@cache
def _chosen(device: torch.device, dtype: torch.dtype, dim: int, rows: int, columns: int) -> str:
    """Return the faster operator for a call of so many rows, of all heads, and columns."""
    if not cudnn_runs(device, dtype):
        return "flash"
    name, calibration = str(dtype).removeprefix("torch."), load(device)
    nearest = calibration.nearest(name, dim) if calibration else None
    known = calibration.tiles[name][nearest].operator(rows, columns) if calibration and nearest else None
    return known or "cudnn"


@cache
def cudnn_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether cuDNN attends on this device at all: older ones are refused when it is called."""
    tiny = torch.zeros(1, 1, 64, 64, device=device, dtype=dtype)
    try:
        _cudnn(tiny, tiny, tiny, False, 1.0)
    except RuntimeError:
        return False
    return True
