"""A tile kernel for CUDA that shares nothing with the vendors': cuBLAS products in float32, without tf32, and between
them a fused online softmax of our own (compiled by NVRTC, through CuPy). For float32 tiles; and for 16-bit ones where a
second opinion is wanted, or no tile is to be rounded to 16 bits.

Keys are taken ``KEYS`` at a time: one product gives their scores; the fused kernel turns each row of these into weights
against the highest score so far, and scales what was summed before; a second product adds the weighted values. All
memory is torch's, all work goes to torch's current stream.
"""

import cupy
import numpy as np
import torch
from cupy.cuda import cublas
from jaxtyping import Float
from torch import Tensor

from cqsa_stream.machine.streams import Foreign
from cqsa_stream.schedulers.masks.bands import TileMask
from cqsa_stream.schedulers.model.memory import Tile

__all__ = ["CupyKernel"]

KEYS = 4_096
_THREADS = 256
_SOURCE = r"""
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
extern "C" __global__ void online_softmax(float* scores, float* out, float* highest, float* total, int keys, int dim,
                                          int rows, int causal, int first_key) {
    __shared__ float shared[32];
    long long row = blockIdx.x;
    float* mine = scores + row * keys;
    int seen = causal ? min(keys, max(0, (int)(row % rows) + 1 - first_key)) : keys;
    float high = -INFINITY, sum = 0.0f, before = highest[row], earlier = total[row];
    for (int i = threadIdx.x; i < seen; i += blockDim.x) high = fmaxf(high, mine[i]);
    high = fmaxf(before, over_block(high, true, shared));
    for (int i = threadIdx.x; i < keys; i += blockDim.x) {
        float weight = i < seen && mine[i] != -INFINITY ? expf(mine[i] - high) : 0.0f;   // -inf - -inf would be NaN
        mine[i] = weight;
        sum += weight;
    }
    sum = over_block(sum, false, shared);
    float keep = before == high ? 1.0f : expf(before - high);
    for (int i = threadIdx.x; i < dim; i += blockDim.x) out[row * dim + i] *= keep;
    if (threadIdx.x == 0) { highest[row] = high; total[row] = earlier * keep + sum; }
}
"""
_softmax = cupy.RawKernel(_SOURCE, "online_softmax")


class CupyKernel:
    """softmax(q k^T scale) v in float32."""

    name = "cupy"
    tile = Tile(8_192, 65_536, 8_192)
    score_bytes = 4
    score_columns = KEYS
    at_a_time = 1  # cuBLAS promises the same bits again for one stream at a time
    workspace_bytes = 24 << 20  # by which its tensors are rounded up

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        return torch.float32

    def attend(
        self,
        q: Float[Tensor, "heads q d"],
        k: Float[Tensor, "kv_heads k d"],
        v: Float[Tensor, "kv_heads k dv"],
        mask: TileMask,
        scale: float,
    ) -> tuple[Float[Tensor, "heads q dv"], Float[Tensor, "heads q"]]:
        (heads, rows, _), keys, dim = q.shape, k.shape[1], v.shape[2]
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        out = q.new_zeros(heads, rows, dim)
        highest, total = q.new_full((heads, rows), -torch.inf), q.new_zeros(heads, rows)
        scores = q.new_empty(heads * rows * min(KEYS, keys))
        with cupy.cuda.Stream.from_external(Foreign(torch.cuda.current_stream(q.device))):
            for first in range(0, keys, KEYS):
                part = slice(first, min(first + KEYS, keys))
                width = part.stop - part.start
                weights = scores[: heads * rows * width].view(heads, rows, width)
                _product(q, k[:, part].transpose(1, 2), weights, scale, 0.0)
                arguments = (width, dim, rows, int(mask == "causal"), first)
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
