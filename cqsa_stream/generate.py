"""Making inputs: normally distributed Q, K and V as Zarr v3, any length in bounded memory.

The numbers depend on the seed and on their place alone, never on how the arrays are chunked: each run of 1,024 tokens
of a head has a counter-based generator (Philox) of its own.
"""

import shutil
from pathlib import Path

import numpy as np

from cqsa_stream.errors import InputError
from cqsa_stream.problem import DTYPES
from cqsa_stream.schedulers.units import size_text
from cqsa_stream.storage.atomic import make_directory
from cqsa_stream.storage.dtypes import numpy_dtype
from cqsa_stream.storage.output import create_array, write

__all__ = ["generate"]

_RUN_TOKENS = 1_024
_CHUNK_BYTES = 4 << 20
CODECS = ("none", "crc32c", "zstd")


def generate(
    directory: Path,
    *,
    tokens: int,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    batch: int = 1,
    dtype: str = "bfloat16",
    seed: int = 0,
    chunk_tokens: int | None = None,
    codec: str = "none",
) -> list[Path]:
    """Write q.zarr, k.zarr and v.zarr and return their paths. Raises InputError; nothing is overwritten."""
    kv_heads = heads if kv_heads is None else kv_heads
    sizes = {"tokens": tokens, "heads": heads, "kv-heads": kv_heads, "head-dim": head_dim, "batch": batch}
    for name, size in {**sizes, "chunk-tokens": 1 if chunk_tokens is None else chunk_tokens}.items():
        if size < 1:
            raise InputError(f"{name} {size}; expected at least 1")
    if heads % kv_heads:
        raise InputError(f"{heads} heads over {kv_heads} kv-heads; expected a multiple")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    if codec not in CODECS:
        raise InputError(f"codec {codec!r}; expected one of {', '.join(CODECS)}")
    if not 0 <= seed < 2**64:
        raise InputError(f"seed {seed}; expected 0 to 2^64 - 1")
    if not next(p for p in (directory, *directory.absolute().parents) if p.exists()).is_dir():
        raise InputError(f"{directory}: no directory can be made there; name another")
    paths = [directory / f"{name}.zarr" for name in "qkv"]
    for path in paths:
        if path.exists():
            raise InputError(f"{path} exists; name another directory")
    needed = batch * tokens * head_dim * DTYPES[dtype] * (heads + 2 * kv_heads)
    free = shutil.disk_usage(next(p for p in (directory, *directory.absolute().parents) if p.exists())).free
    if codec != "zstd" and needed > free:
        raise InputError(
            f"{directory}: {size_text(needed)} needed, {size_text(free)} free; make room, or generate less"
        )
    if chunk_tokens is None:
        chunk_tokens = max(1, _CHUNK_BYTES // (head_dim * DTYPES[dtype]))
    make_directory(directory)
    for index, path in enumerate(paths):
        shape = (batch, heads if index == 0 else kv_heads, tokens, head_dim)
        _write_array(path, shape, dtype, min(chunk_tokens, tokens), codec, (seed, index))
    return paths


def _write_array(
    path: Path, shape: tuple[int, int, int, int], dtype: str, chunk: int, codec: str, key: tuple[int, int]
) -> None:
    batch, heads, tokens, head_dim = shape
    target = create_array(path, shape, dtype, (1, 1, chunk, head_dim), codec)
    for lane in range(batch * heads):
        for start in range(0, tokens, chunk):
            span = range(start, min(start + chunk, tokens))
            values = _numbers(lane, span, head_dim, dtype, key)
            write(target[lane // heads, lane % heads, span.start : span.stop], values)


def _numbers(lane: int, span: range, head_dim: int, dtype: str, key: tuple[int, int]) -> np.ndarray:
    values = np.empty((len(span), head_dim), numpy_dtype(dtype))
    for run in range(span.start // _RUN_TOKENS, (span.stop - 1) // _RUN_TOKENS + 1):
        generator = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64), counter=[0, 0, run, lane]))
        numbers = generator.standard_normal((_RUN_TOKENS, head_dim), np.float32)
        first, stop = max(span.start, run * _RUN_TOKENS), min(span.stop, (run + 1) * _RUN_TOKENS)
        values[first - span.start : stop - span.start] = numbers[first - run * _RUN_TOKENS : stop - run * _RUN_TOKENS]
    return values
