"""Masks and score terms with what they mean, densely; and attention by their definitions, in float64."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cqsa_stream.masks import Bands, Blocks, Chunked, Documents, Prefix, Rule, Strip, Window
from cqsa_stream.storage.output import create_array, write
from cqsa_stream.storage.readers.memory import MemoryArray

N = 300
ROW, KEY = torch.arange(N)[:, None], torch.arange(N)
CU = [0, 1, 2, 40, 41, 130, 131, 131, 200, 280]  # the last 20 positions are in no document
DOCUMENT = torch.tensor([sum(start <= p for start in CU) if p < 280 else -p for p in range(N)])
SAME = (DOCUMENT[:, None] == DOCUMENT) & (DOCUMENT > 0)
BITMAP = np.random.default_rng(0).random((10, 10)) < 0.4
BITMAP[3] = False  # rows that see nothing
NOISE = torch.rand(N, N, generator=torch.Generator().manual_seed(0)) < 0.5
DIAGONALS = [(0, 100, 0, 50, None, 0), (0, 300, 50, 300, -10, 20), (150, 300, 0, 50, None, None)]
CAUSAL = Window(None, 0)
EVERYTHING = ROW + KEY >= 0


def by_bands() -> Tensor:
    found = torch.zeros(N, N, dtype=torch.bool)
    found |= (ROW < 100) & (KEY < 50) & (KEY <= ROW)
    found |= (KEY >= 50) & (KEY - ROW >= -10) & (KEY - ROW <= 20)
    return found | ((ROW >= 150) & (KEY < 50))


MASKS: dict[str, tuple[Rule | None, Tensor]] = {
    "full": (None, EVERYTHING),
    "documents": (Documents(CU), SAME),
    "causal documents": (Documents(CU) & CAUSAL, SAME & (KEY <= ROW)),
    "chunked": (Chunked(64) & CAUSAL, (ROW // 64 == KEY // 64) & (KEY <= ROW)),
    "prefix": (Prefix(33), (KEY < 33) | (KEY <= ROW)),
    "window": (Window(17, 5), (KEY >= ROW - 17) & (KEY <= ROW + 5)),
    "open window": (Window(None, 40), KEY <= ROW + 40),
    "strip": (Strip(4, 30), (KEY <= ROW) & ((KEY < 4) | (KEY > ROW - 30))),
    "blocks": (Blocks(BITMAP, 32), torch.from_numpy(BITMAP)[ROW // 32, KEY // 32]),
    "bands": (Bands(DIAGONALS), by_bands()),
    "blocks of documents": (
        Blocks(BITMAP, 32) & Documents(CU) & Window(50, None),
        torch.from_numpy(BITMAP)[ROW // 32, KEY // 32] & SAME & (KEY >= ROW - 50),
    ),
}
SLOPES, SINKS = (0.5, 0.1, 0.01, 2.0), (0.5, 100.0, -3.0, 0.0)
TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "soft cap": {"soft_cap": 5.0},
    "alibi": {"alibi_slopes": SLOPES},
    "sinks": {"sinks": SINKS},
    "all": {"soft_cap": 30.0, "alibi_slopes": SLOPES, "sinks": SINKS},
}


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    start: int = 0,
    scale: float | None = None,
    soft_cap: float | None = None,
    alibi_slopes: tuple[float, ...] = (),
    sinks: tuple[float, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Dense float64 attention by the definitions; a sink is a key without a value."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if alibi_slopes:
        distance = (torch.arange(q.shape[2])[:, None] + start - torch.arange(k.shape[2])).abs()
        scores = scores - torch.tensor(alibi_slopes).double()[:, None, None] * distance
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks:
        sink = torch.tensor(sinks).double()[:, None, None].expand(*scores.shape[:3], 1)
        scores, v = torch.cat([scores, sink], 3), torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)
    lse = torch.logsumexp(scores, 3)
    return torch.exp(scores - lse[..., None]).nan_to_num(nan=0.0) @ v, lse


def check(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """16-bit inputs are computed in float32, and rounded once."""
    difference = float((found[0].double() - expected[0]).norm())
    assert difference <= (2e-6 if dtype == torch.float32 else 2.1e-3) * float(expected[0].norm())
    blind = expected[1].isneginf()
    assert torch.equal(found[1].isneginf(), blind)
    assert torch.equal(found[0][blind], torch.zeros_like(found[0][blind]))
    torch.testing.assert_close(found[1][~blind].double(), expected[1][~blind], rtol=2e-6, atol=5e-6)


def stored(folder: Path, tensors: dict[str, Tensor]) -> list[str]:
    """Write tensors as arrays; return their paths."""
    paths = []
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        array = create_array(folder / name, tuple(tensor.shape), kind, (1, 1, 64, tensor.shape[3]), "none")
        for batch, head, start in np.ndindex(*tensor.shape[:2], -(-tensor.shape[2] // 64)):
            part = slice(start * 64, min(tensor.shape[2], (start + 1) * 64))
            write(array[batch, head, part], MemoryArray.of_tensor(tensor[batch, head, part]).values)
        paths.append(str(folder / name))
    return paths
