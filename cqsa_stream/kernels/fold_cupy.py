"""Merging on CUDA in one pass: a kernel that reads a tile and the accumulator once, and writes the accumulator.

It is compiled when it is first used (NVRTC, through CuPy) and runs on torch's current stream, on torch's own memory.
A warp takes a row: it computes the row's weight in float64 and merges as ``partial.fold`` does.
"""

from functools import cache
from typing import Any

import cupy
import torch
from torch import Tensor

from cqsa_stream.machine.streams import Foreign

__all__ = ["fold"]

_WARPS = 8
_SOURCE = r"""
typedef unsigned short u16;
struct Float32 { typedef float stored; static __device__ float read(float x) { return x; } };
struct BFloat16 {
    typedef u16 stored;
    static __device__ float read(u16 x) { return __uint_as_float((unsigned)x << 16); }
};
struct Float16 {
    typedef u16 stored;
    static __device__ float read(u16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
};

template <typename Number, int together>
__global__ void fold(float* out, double* lse, const typename Number::stored* tile, const float* tile_lse,
                     long long heads, long long rows, int dim, long long out_head, long long out_row,
                     long long lse_head, long long tile_head, long long tile_row, long long tile_lse_head,
                     long long tile_lse_row) {
    long long number = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (number >= heads * rows) return;
    long long head = number / rows, row = number % rows;
    double* held = lse + head * lse_head + row;
    double before = *held, added = (double)tile_lse[head * tile_lse_head + row * tile_lse_row];
    if (isinf(added) && added < 0) return;                       // the tile saw no key of this row
    double high = before < added ? added : before, low = before < added ? before : added;   // not fmax: it hides NaN
    double total = high + (high == low ? log(2.0) : log1p(exp(low - high)));
    float weight = (float)exp(added - total), kept = isinf(before) && before < 0 ? 0.0f : (float)exp(before - total);
    __syncwarp();
    if (lane == 0) *held = total;
    float* mine = out + head * out_head + row * out_row;
    const typename Number::stored* its = tile + head * tile_head + row * tile_row;
    for (int i = lane * together; i < dim; i += 32 * together) {
        float a[together]; typename Number::stored b[together];
        #pragma unroll
        for (int j = 0; j < together; j++) { a[j] = mine[i + j]; b[j] = its[i + j]; }
        #pragma unroll
        for (int j = 0; j < together; j++) {
            float its_own = Number::read(b[j]), difference = its_own - a[j];
            float merged = weight < 0.5f ? a[j] + weight * difference : its_own - difference * (1.0f - weight);
            if (!isfinite(merged))                               // one of them is not, or their difference overflows
                merged = (kept == 0.0f ? 0.0f : kept * a[j]) + (weight == 0.0f ? 0.0f : weight * its_own);
            mine[i + j] = merged;
        }
    }
}
"""
_NUMBERS = {torch.float32: "Float32", torch.bfloat16: "BFloat16", torch.float16: "Float16"}


@cache
def _kernel(dtype: torch.dtype, together: int) -> Any:
    name = f"fold<{_NUMBERS[dtype]}, {together}>"
    return cupy.RawModule(code=_SOURCE, options=("-std=c++17",), name_expressions=(name,)).get_function(name)


def fold(out: Tensor, lse: Tensor, tile_out: Tensor, tile_lse: Tensor) -> None:
    """Merge a kernel's tile ``[heads, rows, dv]`` of 16 or 32 bits into the float32 accumulator, in place."""
    heads, rows, dim = out.shape
    assert out.dtype == torch.float32
    assert lse.dtype == torch.float64
    assert lse.stride(1) == out.stride(2) == tile_out.stride(2) == 1
    if not out.numel():
        return
    even = not any(n % 2 for n in (dim, *out.stride()[:2], *tile_out.stride()[:2], tile_out.storage_offset()))
    tile_lse = tile_lse.float()
    with cupy.cuda.Stream.from_external(Foreign(torch.cuda.current_stream(out.device))):
        _kernel(tile_out.dtype, 2 if even else 1)(
            (-(-heads * rows // _WARPS),),
            (32 * _WARPS,),
            (
                *(x.data_ptr() for x in (out, lse, tile_out, tile_lse)), heads, rows, cupy.int32(dim),
                *out.stride()[:2], lse.stride(0), *tile_out.stride()[:2], *tile_lse.stride(),
            ),
        )  # fmt: skip
