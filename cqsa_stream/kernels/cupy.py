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

from cqsa_stream.kernels.contract import Abilities, Attended, Keys, Queries, Scores, Values
from cqsa_stream.kernels.mending import mend
from cqsa_stream.kernels.seeing import PACKING_BYTES, PACKING_NUMBERS, Seen, by_tiles, ranges
from cqsa_stream.schedulers.masks.arrays import Bands64
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

// One block for each row: products become scores, then weights, in place; out is what the products with values sum up,
// total what the weights do. A row sees the keys of its tile from firsts to, without, stops, of which there are `keys`
// here, from first_key on.
extern "C" __global__ void online_softmax(float* scores, float* out, float* highest, float* total, int keys, int dim,
                                          int rows, int first_key, int tile_heads, const long long* firsts,
                                          const long long* stops, float cap, const double* slopes,
                                          const long long* aheads) {
    __shared__ float shared[32];
    long long row = blockIdx.x, head = row / rows, i = row % rows, tile = head / tile_heads;
    float* mine = scores + row * keys;
    long long from = firsts[tile * rows + i], to = stops[tile * rows + i];
    int seen_from = (int)max(0ll, from - first_key), seen_to = (int)min((long long)keys, to - first_key);
    float slope = slopes ? (float)slopes[head] : 0.0f;
    long long nearest = slopes ? min(to - 1, max(from, i - aheads[tile])) - first_key : 0;  // from it distances count
    float high = -INFINITY, sum = 0.0f, before = highest[row], earlier = total[row];
    for (int j = seen_from + threadIdx.x; j < seen_to; j += blockDim.x) {
        float score = mine[j];
        if (cap > 0.0f) score = cap * tanhf(score / cap);
        if (slopes) score -= slope * fabsf((float)(nearest - j));
        mine[j] = score;
        high = fmaxf(high, score);
    }
    high = fmaxf(before, over_block(high, true, shared));
    for (int j = threadIdx.x; j < keys; j += blockDim.x) {
        bool seen = j >= seen_from && j < seen_to && mine[j] != -INFINITY;               // -inf - -inf would be NaN
        float weight = seen ? expf(mine[j] - high) : 0.0f;
        mine[j] = weight;
        sum += weight;
    }
    sum = over_block(sum, false, shared);
    float keep = before == high ? 1.0f : expf(before - high);
    for (int j = threadIdx.x; j < dim; j += blockDim.x) out[row * dim + j] *= keep;
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
    """Softmax of the scores, times v, in float32."""

    abilities = Abilities(
        dtypes=(torch.float32,),
        tile=Tile(8_192, 65_536, 8_192, 2_048, bands=True, small=1_024),
        terms=frozenset({"soft_cap", "alibi"}),
        score_bytes=4,
        score_columns=_KEYS,
        calls_at_a_time=1,  # cuBLAS promises the same bits again for one stream at a time
        workspace_bytes=24 << 20,  # by which its tensors are rounded up
        packing_bytes=PACKING_BYTES,
        packing_numbers=PACKING_NUMBERS,
    )

    def attend(
        self, q: Queries, k: Keys, v: Values, left: int | None, right: int | None, scores: Scores, ahead: int = 0
    ) -> Attended:
        first, stop = ranges(q.shape[1], k.shape[1], left, right, q.device)
        return _attend(q, k, v, Seen(first, stop, torch.tensor([ahead], device=q.device)), scores)

    def attend_packed(self, q: Queries, k: Keys, v: Values, bands: Bands64, scores: Scores, ahead: int = 0) -> Attended:
        def attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> Attended:
            own = scores.of_tiles(len(seen.ahead))
            out, lse = _attend(q, k, v, seen, own)
            mend(out, lse, ~out.sum(2).isfinite(), q, k, v, seen, own)  # gathered keys may be such as nobody sees
            return out, lse

        return by_tiles(q, k, v, bands, ahead, attend)


def _attend(q: Queries, k: Keys, v: Values, seen: Seen, scores: Scores) -> Attended:
    (heads, rows, _), keys, dim, tiles = q.shape, k.shape[1], v.shape[2], len(seen.ahead)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    seen = Seen(*(x.contiguous() for x in seen))
    out = q.new_zeros(heads, rows, dim)
    highest, total = q.new_full((heads, rows), -torch.inf), q.new_zeros(heads, rows)
    room = q.new_empty(heads * rows * min(_KEYS, keys))
    slopes = None if scores.slopes is None else scores.slopes.double().contiguous()
    cap = np.float32(scores.soft_cap or 0.0)
    with _on_torchs_stream(q.device):
        for start in range(0, keys, _KEYS):
            part = slice(start, min(start + _KEYS, keys))
            width = part.stop - part.start
            weights = room[: heads * rows * width].view(heads, rows, width)
            _product(q, k[:, part].transpose(1, 2), weights, scores.scale, 0.0)
            _softmax(
                (heads * rows,), (_THREADS,),
                (
                    *(x.data_ptr() for x in (weights, out, highest, total)),
                    *map(np.int32, (width, dim, rows, start, heads // tiles)),
                    seen.first.data_ptr(), seen.stop.data_ptr(), cap, slopes.data_ptr() if slopes is not None else 0,
                    seen.ahead.data_ptr(),
                ),
            )  # fmt: skip
            _product(weights, v[:, part], out, 1.0, 1.0)
    none = total == 0
    out.div_(total.masked_fill(none, 1.0).unsqueeze(2)).masked_fill_(none.unsqueeze(2), 0.0)
    lse = highest.double() + total.double().log()
    if slopes is not None:
        own = torch.arange(rows, device=q.device) - seen.ahead.unsqueeze(1)
        distance = (own - own.clamp(seen.first, seen.stop - 1)).abs().repeat_interleave(heads // tiles, 0)
        lse -= slopes.unsqueeze(1) * distance
    return out, lse.masked_fill_(none, -torch.inf)


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
    bool first = isinf(before) && before < 0 && isfinite(added);
    float weight = (float)exp(added - total), kept = isinf(before) && before < 0 ? 0.0f : (float)exp(before - total);
    __syncwarp();
    if (lane == 0) *held = total;
    float* mine = out + head * out_head + row * out_row;
    const typename Number::stored* its = tile + head * tile_head + row * tile_row;
    for (int i = lane * together; i < dim; i += 32 * together) {
        float a[together]; typename Number::stored b[together];
        #pragma unroll
        for (int j = 0; j < together; j++) { a[j] = first ? 0.0f : mine[i + j]; b[j] = its[i + j]; }
        if (first) {                                                 // what stands there is not even read
            #pragma unroll
            for (int j = 0; j < together; j++) mine[i + j] = Number::read(b[j]);
            continue;
        }
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
