"""CuPy's part on CUDA: an independent tile kernel, and the merge of tiles in one pass.

The tile kernel shares nothing with the vendors': cuBLAS products in float32, without tf32, and between them a fused
online softmax of our own. It is for float32 tiles; and for 16-bit ones where a second opinion is wanted, or no tile is
to be rounded to 16 bits. Keys are taken some thousands at a time: one product gives their scores; the fused kernel
turns each row of these into weights against the highest score so far, and scales what was summed before; a second
product adds the weighted values.

The merge reads a tile and the accumulator once, and writes the accumulator. A warp takes a row: it computes the row's
weight in float64 and merges as ``kernels.fold`` does.

Both are compiled when they are first used (NVRTC). All memory is torch's, all work goes to torch's current stream.
"""

from functools import cache
from typing import Any

import cupy
import numpy as np
import torch
from cupy.cuda import cublas
from torch import Tensor

from cqsa_stream.kernels.contract import Abilities, Attended, Keys, Queries, Values
from cqsa_stream.schedulers.masks.calls import Tile

__all__ = ["CupyKernel", "fold"]

_KEYS = 4_096
_THREADS = 256
_WARPS = 8
_SOFTMAX = r"""
#define INFINITY __int_as_float(0x7f800000)

__device__ float over_block(float mine, bool highest, float* shared) {
    for (int step = 16; step; step /= 2) {
        float other = __shfl_xor_sync(0xffffffffu, mine, step);
        mine = highest ? fmaxf(mine, other) : mine + other;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
    __syncthreads();
    float all = shared[0];
    for (int warp = 1; warp < blockDim.x / 32; warp++) all = highest ? fmaxf(all, shared[warp]) : all + shared[warp];
    return all;
}

// One block for each row: scores become weights, in place; out is what the products sum up, total what the weights do.
// Row i sees the keys from i - left to i + right, of which there are `keys` here, from first_key on; -1: unbounded.
extern "C" __global__ void online_softmax(float* scores, float* out, float* highest, float* total, int keys, int dim,
                                          int rows, int left, int right, int first_key) {
    __shared__ float shared[32];
    long long row = blockIdx.x;
    float* mine = scores + row * keys;
    int own = (int)(row % rows) - first_key;                                           // the row's own key
    int seen_from = left < 0 ? 0 : max(0, own - left), seen_to = right < 0 ? keys : min(keys, own + right + 1);
    float high = -INFINITY, sum = 0.0f, before = highest[row], earlier = total[row];
    for (int i = seen_from + threadIdx.x; i < seen_to; i += blockDim.x) high = fmaxf(high, mine[i]);
    high = fmaxf(before, over_block(high, true, shared));
    for (int i = threadIdx.x; i < keys; i += blockDim.x) {
        bool seen = i >= seen_from && i < seen_to && mine[i] != -INFINITY;               // -inf - -inf would be NaN
        float weight = seen ? expf(mine[i] - high) : 0.0f;
        mine[i] = weight;
        sum += weight;
    }
    sum = over_block(sum, false, shared);
    float keep = before == high ? 1.0f : expf(before - high);
    for (int i = threadIdx.x; i < dim; i += blockDim.x) out[row * dim + i] *= keep;
    if (threadIdx.x == 0) { highest[row] = high; total[row] = earlier * keep + sum; }
}
"""
_softmax = cupy.RawKernel(_SOFTMAX, "online_softmax")


class _Foreign:
    """A torch stream as other libraries take it (CUDA stream protocol), which older ones of torch's are not."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream.cuda_stream


def _on_torchs_stream(device: torch.device) -> Any:
    """Return a context in which CuPy's work goes to torch's current stream."""
    return cupy.cuda.Stream.from_external(_Foreign(torch.cuda.current_stream(device)))


class CupyKernel:
    """softmax(q k^T scale) v in float32."""

    abilities = Abilities(
        dtypes=(torch.float32,),
        tile=Tile(8_192, 65_536, 8_192, 2_048, bands=True),
        score_bytes=4,
        score_columns=_KEYS,
        calls_at_a_time=1,  # cuBLAS promises the same bits again for one stream at a time
        workspace_bytes=24 << 20,  # by which its tensors are rounded up
    )

    def attend(self, q: Queries, k: Keys, v: Values, left: int | None, right: int | None, scale: float) -> Attended:
        (heads, rows, _), keys, dim = q.shape, k.shape[1], v.shape[2]
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        out = q.new_zeros(heads, rows, dim)
        highest, total = q.new_full((heads, rows), -torch.inf), q.new_zeros(heads, rows)
        scores = q.new_empty(heads * rows * min(_KEYS, keys))
        bounds = [-1 if n is None or n >= rows + keys else n for n in (left, right)]  # larger may not fit 32 bits
        with _on_torchs_stream(q.device):
            for first in range(0, keys, _KEYS):
                part = slice(first, min(first + _KEYS, keys))
                width = part.stop - part.start
                weights = scores[: heads * rows * width].view(heads, rows, width)
                _product(q, k[:, part].transpose(1, 2), weights, scale, 0.0)
                arguments = (width, dim, rows, *bounds, first)
                _softmax(
                    (heads * rows,), (_THREADS,),
                    (*(x.data_ptr() for x in (weights, out, highest, total)), *map(np.int32, arguments)),
                )  # fmt: skip
                _product(weights, v[:, part], out, 1.0, 1.0)
        none = total == 0
        out.div_(total.masked_fill(none, 1.0).unsqueeze(2)).masked_fill_(none.unsqueeze(2), 0.0)
        return out, highest.double() + total.double().log()


def _product(a: Tensor, b: Tensor, c: Tensor, factor: float, keep: float) -> None:
    """``c = factor a b + keep c`` for ``a [heads, m, k]``, ``b [kv_heads, k, n]``, ``c [heads, m, n]``, of whole rows;
    ``b`` may be transposed. cuBLAS counts columns first: it is given the product's transpose.
    """
    (heads, m, k), n = a.shape, b.shape[2]
    group, transposed = heads // b.shape[0], b.stride(2) != 1
    alpha, beta = np.array([factor], np.float32), np.array([keep], np.float32)
    for kv_head in range(b.shape[0]):
        first = kv_head * group
        cublas.sgemmStridedBatched(
            cupy.cuda.device.get_cublas_handle(),
            cublas.CUBLAS_OP_T if transposed else cublas.CUBLAS_OP_N,
            cublas.CUBLAS_OP_N,
            n, m, k,
            alpha.ctypes.data,
            b[kv_head].data_ptr(), b.stride(2) if transposed else b.stride(1), 0,
            a[first].data_ptr(), a.stride(1), a.stride(0),
            beta.ctypes.data,
            c[first].data_ptr(), c.stride(1), c.stride(0),
            group,
        )  # fmt: skip


_FOLD = r"""
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
def _fold_kernel(dtype: torch.dtype, together: int) -> Any:
    name = f"fold<{_NUMBERS[dtype]}, {together}>"
    return cupy.RawModule(code=_FOLD, options=("-std=c++17",), name_expressions=(name,)).get_function(name)


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
    with _on_torchs_stream(out.device):
        _fold_kernel(tile_out.dtype, 2 if even else 1)(
            (-(-heads * rows // _WARPS),),
            (32 * _WARPS,),
            (
                *(x.data_ptr() for x in (out, lse, tile_out, tile_lse)), heads, rows, cupy.int32(dim),
                *out.stride()[:2], lse.stride(0), *tile_out.stride()[:2], *tile_lse.stride(),
            ),
        )  # fmt: skip
