"""Kernels: exact attention of one tile on one device, with the log-sum-exp that merging needs.

The contract, tested for every back end by one suite: ``attend(q, k, v, mask, scale) -> (out, lse)`` with

- ``q [heads, rows, d]``, ``k [kv_heads, columns, d]``, ``v [kv_heads, columns, dv]``, the heads a multiple of kv_heads;
- ``mask``: ``"full"``, or ``"causal"``: the tile is square and row i sees columns 0..i;
- ``out [heads, rows, dv]`` float32 (float64 from the reference, 16 bits from the vendor's CUDA kernels), normalised;
  ``lse [heads, rows]``, natural logarithm, float32 or float64;
- a row that sees no key gives (0, -inf).

``fold_for`` gives what merges such tiles on a device; all implementations do what ``partial.fold`` does.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from cqsa_stream.partial import fold
from cqsa_stream.schedulers.masks import TileMask

__all__ = ["Fold", "Kernel", "fold_for", "kernel_for"]

Fold = Callable[[Tensor, Tensor, Tensor, Tensor], None]


class Kernel(Protocol):
    """One back end."""

    name: str

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        """Return the dtype in which tiles must stand on the device."""

    def attend(
        self,
        q: Float[Tensor, "heads q d"],
        k: Float[Tensor, "kv_heads k d"],
        v: Float[Tensor, "kv_heads k dv"],
        mask: TileMask,
        scale: float,
    ) -> tuple[Float[Tensor, "heads q dv"], Float[Tensor, "heads q"]]:
        """Return (out, lse) of the tile."""


def kernel_for(device: torch.device, dtype: torch.dtype) -> Kernel:
    """Return the fastest exact kernel for the device and the stored dtype."""
    if device.type == "cpu":
        from cqsa_stream.kernels.torch_cpu import TorchCpuKernel

        return TorchCpuKernel()
    if dtype == torch.float32:
        from cqsa_stream.kernels.reference import PlainKernel

        return PlainKernel(torch.float32)
    from cqsa_stream.kernels.torch_cuda import TorchCudaKernel

    return TorchCudaKernel()


def fold_for(device: torch.device) -> Fold:
    """Return the fastest way to merge tiles on the device: on CUDA one pass, where CuPy is there."""
    if device.type == "cuda":
        try:
            from cqsa_stream.kernels.merge_cupy import fold as fused
        except ImportError:
            return fold
        return fused
    return fold
