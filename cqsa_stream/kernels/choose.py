"""Kernels: exact attention of one tile on one device, with the log-sum-exp that merging needs.

The contract, tested for every back end by one suite: ``attend(q, k, v, mask, scale) -> (out, lse)`` with

- ``q [heads, rows, d]``, ``k [kv_heads, columns, d]``, ``v [kv_heads, columns, dv]``, the heads a multiple of kv_heads;
- ``mask``: ``"full"``, or ``"causal"``: the tile is square and row i sees columns 0..i;
- ``out [heads, rows, dv]`` float32 (float64 from the reference, 16 bits from the vendor's CUDA kernels), normalised;
  ``lse [heads, rows]``, natural logarithm, float32 or float64;
- a row that sees no key gives (0, -inf).

``tile`` is the largest call it likes, ``at_a_time`` how many of them, on streams of their own. ``score_bytes``: what
one holds besides its result, for each row and each of up to ``score_columns`` keys; ``workspace_bytes``: what its
libraries take from torch's allocator, once.

``fold_for`` gives what merges such tiles on a device; all implementations do what ``partial.fold`` does.
"""

from collections.abc import Callable, Hashable
from functools import cache
from importlib import import_module
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from cqsa_stream.errors import InputError
from cqsa_stream.kernels.fold import fold
from cqsa_stream.schedulers.masks.bands import TileMask
from cqsa_stream.schedulers.model.memory import Tile

__all__ = ["KERNELS", "Fold", "Kernel", "fold_for", "kernel_for", "merges_at_once"]

KERNELS = ("auto", "cupy")

Fold = Callable[[Tensor, Tensor, Tensor, Tensor], None]


class Kernel(Hashable, Protocol):
    """One back end."""

    name: str
    tile: Tile
    score_bytes: int
    score_columns: int
    at_a_time: int
    workspace_bytes: int

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


@cache
def kernel_for(device: torch.device, dtype: torch.dtype, name: str = "auto") -> Kernel:
    """Return the fastest exact kernel for the device and the stored dtype, or the one named.

    Raises InputError where that one cannot be.
    """
    if name == "cupy":
        if device.type == "cpu":
            raise InputError("kernel 'cupy' on the CPU; take --device cuda, or --kernel auto")
        if not _cupy_is_there():
            raise InputError("kernel 'cupy': CuPy cannot be imported; install cqsa-stream[cuda], or take --kernel auto")
    if device.type == "cpu":
        from cqsa_stream.kernels.torch_cpu import TorchCpuKernel

        return TorchCpuKernel()
    if name == "cupy" or (dtype == torch.float32 and _cupy_is_there()):
        from cqsa_stream.kernels.tile_cupy import CupyKernel

        return CupyKernel()
    if dtype == torch.float32:
        from cqsa_stream.kernels.reference import PlainKernel

        return PlainKernel(torch.float32)
    from cqsa_stream.kernels.torch_cuda import TorchCudaKernel

    return TorchCudaKernel()


def fold_for(device: torch.device) -> Fold:
    """Return the fastest way to merge tiles on the device: on CUDA one pass, where CuPy is there."""
    if not merges_at_once(device):
        return fold
    from cqsa_stream.kernels.fold_cupy import fold as fused

    return fused


def merges_at_once(device: torch.device) -> bool:
    """Return whether tiles are merged by one kernel, which holds nothing besides them."""
    return device.type == "cuda" and _cupy_is_there()


@cache
def _cupy_is_there() -> bool:
    try:
        import_module("cupy")
    except ImportError:
        return False
    return True
