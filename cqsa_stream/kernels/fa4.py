"""Flash attention 4 on Hopper, merging as it ends: tiles of 16-bit inputs that are never rounded to 16 bits.

FlashAttention-4 (github.com/Dao-AILab/flash-attention, flash_attn/cute) is Python that is compiled for the device. When
a thread block is done with the keys, it holds its rows' output and log-sum-exp in float32 registers. There this kernel
merges them into the accumulator, in place: no tile is written and read again, and calls of one stream keep the order of
the arithmetic.

A shape class (dtype, head dims, kind of mask) compiles in seconds, once on a machine: what was compiled is
kept in the user's cache folder, under a name that depends on all that it was made of.

Windows are counted from the last row and the last column of a tile, as in flash attention, and None is unbounded.
"""

import hashlib
import warnings
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import cutlass
import platformdirs
import torch
from cutlass import Float32, Float64, Int32, const_expr, cute
from flash_attn.cute.cache_utils import JITCache, JITPersistentCache
from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90
from flash_attn.cute.interface import _tile_size_fwd_sm90
from flash_attn.cute.utils import AuxData
from quack import layout_utils
from quack.compile_utils import make_fake_tensor
from torch import Tensor

from cqsa_stream.kernels.contract import Abilities, Attended, Keys, Partial, Queries, Scores, Values
from cqsa_stream.kernels.sequences import sequences
from cqsa_stream.schedulers.masks.arrays import Bands64
from cqsa_stream.schedulers.masks.calls import Call, Packed, Tile

__all__ = ["Fa4Kernel"]

_LN2 = 0.6931471805599453
_MOST = 202_752  # rows of a call: 12 turns of 132 processors with blocks of 128 rows, 8 with blocks of 192
_MOST_TILES = 65_535  # of a launch: CUDA's third dimension of a grid
_WRITTEN_FOR = "4.0.0b36"  # of flash-attn-4: what is overridden here is its own affair
_MADE_OF = ("flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels", "apache-tvm-ffi")
_NUMBERS = {torch.float16: cutlass.Float16, torch.bfloat16: cutlass.BFloat16}


if version("flash-attn-4") != _WRITTEN_FOR:
    raise ImportError(f"flash-attn-4 {version('flash-attn-4')}; this kernel is written for {_WRITTEN_FOR}")


class _Kind(NamedTuple):
    """A shape class: what a compiled kernel depends on."""

    dtype: str
    head_dim: int
    value_dim: int
    group: int
    causal: bool
    left: bool
    right: bool
    packed: bool


class _Merging(FlashAttentionForwardSm90):
    """The forward kernel whose output is a float32 accumulator, with a float64 log-sum-exp."""

    use_tma_O = property(lambda self: False, lambda self, value: None)  # so that the epilogue gets its address

    def _check_type(self, *types: Any) -> None:
        """Take an accumulator that is finer than the inputs."""

    @cute.jit
    def epilogue(
        self,
        acc_O: cute.Tensor,
        lse: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor,
        sO: cute.Tensor,
        seqlen: Any,
        gmem_tiled_copy_O: cute.TiledCopy,
        tma_atom_O: Any,
        tiled_mma: cute.TiledMma,
        tidx: Int32,
        m_block: Int32,
        head_idx: Int32,
        batch_idx: Int32,
    ) -> None:
        held_O = seqlen.offset_batch_Q(mO, batch_idx, dim=3)[None, None, head_idx]
        held_LSE = seqlen.offset_batch_Q(mLSE, batch_idx, dim=2)[None, head_idx]
        gO = cute.local_tile(held_O, (self.tile_m, self.tile_hdimv), (m_block, 0))
        thr_mma = tiled_mma.get_slice(tidx)
        tOgO = layout_utils.reshape_acc_to_mn(thr_mma.partition_C(gO))
        cO = cute.make_identity_tensor((self.tile_m, self.tile_hdimv))
        tOcO = layout_utils.reshape_acc_to_mn(thr_mma.partition_C(cO))
        acc = layout_utils.reshape_acc_to_mn(acc_O)
        for m in cutlass.range_constexpr(cute.size(acc.shape[0])):
            row = m_block * self.tile_m + tOcO[m, 0][0]
            if row < seqlen.seqlen_q:
                added = lse[m]
                if added == -Float32.inf and acc[m, 0] != acc[m, 0] and seqlen.seqlen_k > 0:
                    added = acc[m, 0]
                if added != -Float32.inf:
                    held = held_LSE[row]
                    first = held == -Float64.inf
                    ahead = Float32(Float64(added) - held)
                    apart = ahead if ahead >= 0.0 else -ahead
                    less = cute.math.exp2(-apart * (1.0 / _LN2))
                    more = (
                        less * (1.0 - less * (0.5 - less * (1.0 / 3.0)))
                        if less < 0.01
                        else cute.math.log2(1.0 + less) * _LN2
                    )
                    low, high = less / (1.0 + less), 1.0 / (1.0 + less)
                    its = high if ahead >= 0.0 else low
                    mine = low if ahead >= 0.0 else high
                    total = (Float64(added) if ahead >= 0.0 else held) + Float64(more)
                    if ahead != ahead:
                        its = ahead
                        total = Float64(ahead)
                    if first:
                        total = Float64(added)
                    for n in cutlass.range_constexpr(cute.size(acc.shape[1])):
                        if const_expr(not self.check_hdim_v_oob) or tOcO[0, n][1] < mO.shape[1]:
                            own = acc[m, n]
                            if not first:
                                before = tOgO[m, n]
                                kept = before * mine if mine != 0.0 else 0.0
                                own = (own * its if its != 0.0 else 0.0) + kept
                            tOgO[m, n] = own
                    cute.arch.sync_warp()
                    if tOcO[m, 0][1] == 0:
                        held_LSE[row] = total


class Fa4Kernel:
    """16-bit tiles on a Hopper GPU, merged in float32 by the kernel itself."""

    abilities = Abilities(
        dtypes=(torch.float16, torch.bfloat16),
        tile=Tile(_MOST, _MOST, _MOST, _MOST, bands=True, skips=True, small=4_096, pack=65_536),
        whole_dims=8,
        merges=True,
        block_rows=((96, 192), (256, 128)),
    )

    def attend(
        self, q: Queries, k: Keys, v: Values, left: int | None, right: int | None, scores: Scores, ahead: int = 0
    ) -> Attended:
        call = Call(range(q.shape[1]), range(k.shape[1]), left, right)
        return self._alone(q, k, v, call, scores, ahead)

    def attend_packed(self, q: Queries, k: Keys, v: Values, bands: Bands64, scores: Scores, ahead: int = 0) -> Attended:
        return self._alone(q, k, v, Packed(bands), scores, ahead)

    def _alone(self, q: Queries, k: Keys, v: Values, call: Call | Packed, scores: Scores, ahead: int) -> Attended:
        value_dim = v.shape[2]
        q, k, v = self.abilities.padded(q, k, v)
        out = torch.zeros(*q.shape[:2], v.shape[2], device=q.device)
        lse = torch.full(q.shape[:2], -torch.inf, device=q.device, dtype=torch.float64)
        self.merge((out, lse), q, k, v, call, scores, ahead)
        return out[..., :value_dim], lse

    def merge(
        self, partial: Partial, q: Queries, k: Keys, v: Values, call: Call | Packed, scores: Scores, ahead: int = 0
    ) -> None:
        """Merge what the rows see of the keys into their partial (out, lse), in place."""
        out, lse = partial
        if not k.shape[1] or not q.shape[1]:
            return
        if isinstance(call, Call) and call.tiles > _MOST_TILES:
            for part in call.parts(_MOST_TILES):
                mine = slice(part.rows.start - call.rows.start, part.rows.stop - call.rows.start)
                its = slice(part.reach.start - call.reach.start, part.reach.stop - call.reach.start)
                self.merge((out[:, mine], lse[:, mine]), q[:, mine], k[:, its], v[:, its], part, scores, ahead)
            return
        if isinstance(call, Packed):
            rows, keys, used, _, _, left, right = sequences(call.here, q.shape[1], q.device)
            views = [*(x.transpose(0, 1) for x in (q, k, v, out)), lse]
            lengths: tuple[Tensor | None, ...] = (rows, keys, None, used)
        else:
            views, lengths = _tiles(out, lse, q, k, v, call), (None, None, None, None)
            back = len(call.columns) - call.height
            left, right = (None if n is None else n + sign * back for n, sign in ((call.left, 1), (call.right, -1)))
            most = len(call.columns) + call.height
            left, right = (None if n is None or n >= most else n for n in (left, right))
        causal = left is None and right == 0
        kind = _Kind(
            str(q.dtype).removeprefix("torch."), q.shape[2], out.shape[2], q.shape[0] // k.shape[0], causal,
            left is not None, right is not None and not causal, isinstance(call, Packed),
        )  # fmt: skip
        bounds = left, None if causal else right
        _compiled(kind)(*views, scores.scale, *lengths, None, *bounds, None, None, AuxData(None, None), None, None)


def _tiles(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, call: Call) -> list[Tensor]:
    """Return the call's tiles as so many batches ``[tile, token, head, feature]``, all of them views."""
    n, height = call.tiles, call.height
    queries, held = (x.view(x.shape[0], n, height, x.shape[2]).permute(1, 2, 0, 3) for x in (q, out))
    keys, values = (x.unfold(1, len(call.columns), height).permute(1, 3, 0, 2) for x in (k, v))
    return [queries, keys, values, held, lse.view(-1, n, height).transpose(0, 1)]


@cache
def _compiled(kind: _Kind) -> Any:
    """Return the compiled kernel of a shape class: from the disk, where it was compiled before."""
    stored = _stored()
    if kind not in stored:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler, about its own code
            stored[kind] = _compile(kind)
    return stored[kind]


@cache
def _stored() -> JITCache:
    """Return what keeps compiled kernels: on disk, where that can be written, else for this process."""
    source = Path(__file__).read_bytes() + "".join(version(name) for name in _MADE_OF).encode()
    digest = hashlib.sha256(source).hexdigest()[:16]
    with suppress(OSError):
        return JITPersistentCache(Path(platformdirs.user_cache_dir("cqsa-stream", appauthor=False)) / f"fa4-{digest}")
    return JITCache()


def _compile(kind: _Kind) -> Any:
    number = _NUMBERS[getattr(torch, kind.dtype)]
    local = kind.left or kind.right
    tile = _tile_size_fwd_sm90(kind.head_dim, kind.value_dim, kind.causal, local)
    kernel = _Merging(
        number, kind.head_dim, kind.value_dim, kind.group, is_causal=kind.causal, is_local=local, pack_gqa=False,
        tile_m=tile.m_block_size, tile_n=tile.n_block_size, num_stages=2, num_threads=384, Q_in_regs=False,
        intra_wg_overlap=tile.intra_wg_overlap, mma_pv_is_rs=tile.mma_pv_is_rs,
    )  # fmt: skip
    some = cute.sym_int
    heads, kv_heads, rows, keys, batch, head_dim = (some() for _ in range(6))
    first = () if kind.packed else (batch,)
    lengths = [some(), some()]

    def whole(length: Any) -> Any:
        return make_fake_tensor(Int32, (length,), 1) if kind.packed else None

    return cute.compile(
        kernel,
        make_fake_tensor(number, (*first, rows, heads, head_dim), 8),
        make_fake_tensor(number, (*first, keys, kv_heads, head_dim), 8),
        make_fake_tensor(number, (*first, keys, kv_heads, some()), 8),
        make_fake_tensor(Float32, (*first, rows, heads, some()), 4),
        make_fake_tensor(Float64, (*first, heads, rows), 1),
        Float32(1.0),
        whole(lengths[0]), whole(lengths[0]), None, whole(lengths[1]), None,
        Int32(0) if kind.left else None,
        Int32(0) if kind.right else None,
        None, None, AuxData(None, None), None, None,
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
        options="--enable-tvm-ffi",
    )  # fmt: skip
