"""Genome-like queries, keys and values: rows looked up by k-mer along a sequence over four letters, in compressed Zarr.

    python examples/billion/genome.py DIR [--tokens 2^30] [--queries 1024] [--head-dim 32] [--processes 2]

A token is a position of the sequence; its row is that of the six letters from there on, in a table of 4,096 rows, times
a factor that changes from block to block of 16,384 tokens. As in a genome, a block repeats itself: it is made of
pieces, 100 to 500 letters each, of a motif of 1,000 letters that it shares with 63 neighbours, and 0.3 % of the letters
are mutated. So zstd stores the rows in a small fraction of their size, and attention is far from uniform: a query
weighs the keys of its own six letters most. Killed and called again, it goes on: a stored chunk that is there is whole.
"""

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import ml_dtypes  # noqa: F401 - numpy learns the name bfloat16
import numpy as np
import tensorstore as ts
from steps import amount

BLOCK = 16_384
_LETTERS, _MOTIF, _SHARING, _MUTATED = 6, 1_000, 64, 0.003
_STREAMS = {"q": 0, "k": 0, "v": 1}  # queries and keys have one table, so that equal letters attend to each other


def tables(head_dim: int, seed: int = 0) -> np.ndarray:
    """Return the rows of each k-mer, ``[table, 4096, head_dim]`` float32."""
    return 1.5 * np.random.default_rng(seed).standard_normal((2, 4**_LETTERS, head_dim), np.float32)


def codes(block: int, seed: int = 0) -> np.ndarray:
    """Return the k-mer at each position of a block, ``[BLOCK]``, 0 to 4,095."""
    motif = np.random.default_rng((seed, 1, block // _SHARING)).integers(0, 4, _MOTIF)
    random = np.random.default_rng((seed, 2, block))
    count = BLOCK + _LETTERS - 1
    lengths = random.integers(100, 501, -(-count // 100))
    begins = random.integers(0, _MOTIF, len(lengths)) - np.cumsum(lengths) + lengths
    letters = motif[(np.repeat(begins, lengths)[:count] + np.arange(count)) % _MOTIF]
    mutated = random.random(count) < _MUTATED
    letters[mutated] = random.integers(0, 4, int(mutated.sum()))
    found = np.zeros(BLOCK, np.int64)
    for place in range(_LETTERS):
        found = 4 * found + letters[place : place + BLOCK]
    return found


def factor(block: int, seed: int = 0) -> float:
    """Return what the rows of a block are multiplied by, 0.5 to 1.5."""
    return float(0.5 + np.random.default_rng((seed, 3, block)).random())


def created(path: Path, tokens: int, head_dim: int, dtype: str) -> ts.TensorStore:
    """Create an array ``[1, 1, tokens, head_dim]`` of Zarr v3, or open the one that is there."""
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/", "file_io_sync": False},  # a lost one is written again
        "metadata": {
            "shape": [1, 1, tokens, head_dim],
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 1, min(BLOCK, tokens), head_dim]}},
            "codecs": [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 1}}],
        },
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(spec, create=True, open=True).result()


def write_some(
    number: int, processes: int, folder: Path, tokens: int, head_dim: int, dtype: str, first: dict[str, int]
) -> None:
    """Write every so-many-th block of the streams, each from the position ``first`` names on."""
    rows = tables(head_dim)
    arrays = {name: created(folder / f"{name}.zarr", tokens - at, head_dim, dtype) for name, at in first.items()}
    for block in range(number, -(-tokens // BLOCK), processes):
        begin, end = block * BLOCK, min(tokens, (block + 1) * BLOCK)
        wanted = {name: at for name, at in first.items() if end > at and not _stored(folder, name, begin, at)}
        if wanted:
            found, scale = codes(block), factor(block)
            scaled = (rows * scale).astype(np.dtype(dtype))
            for name, at in wanted.items():
                kept = found[max(at, begin) - begin : end - begin]
                place = max(at, begin) - at
                arrays[name][0, 0, place : place + len(kept)].write(scaled[_STREAMS[name]][kept]).result()


def _stored(folder: Path, name: str, begin: int, at: int) -> bool:
    """Return whether the chunk of a block is there; where chunks and blocks do not meet, it is written again."""
    return at % BLOCK == 0 and (folder / f"{name}.zarr/c/0/0/{(begin - at) // BLOCK}/0").exists()


def write(
    folder: Path,
    tokens: int,
    queries: int | None,
    head_dim: int,
    dtype: str,
    processes: int,
    streams: Sequence[str] = "qkv",
) -> float:
    """Write q.zarr (the last ``queries`` tokens; None: all), k.zarr and v.zarr; return the seconds that it took."""
    begin = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    first = {name: tokens - queries if name == "q" and queries else 0 for name in streams}
    for name, at in first.items():
        created(folder / f"{name}.zarr", tokens - at, head_dim, dtype)
    each = partial(
        write_some, processes=processes, folder=folder, tokens=tokens, head_dim=head_dim, dtype=dtype, first=first
    )
    with multiprocessing.get_context("spawn").Pool(processes) as pool:  # TensorStore does not survive a fork
        pool.map(each, range(processes), chunksize=1)
    return time.perf_counter() - begin


def stored_bytes(path: Path) -> int:
    """Return what an array takes on disk."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=amount, default=2**30)
    parser.add_argument("--queries", type=amount, help="only the last so many rows of q.zarr")
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    took = write(given.folder, given.tokens, given.queries, given.head_dim, given.dtype, given.processes)
    for name in "qkv":
        rows = given.queries if name == "q" and given.queries else given.tokens
        plain, stored = rows * given.head_dim * 2, stored_bytes(given.folder / f"{name}.zarr")
        print(
            f"{name}.zarr: {rows:,} rows of {given.head_dim} {given.dtype}, {stored / 1e9:.2f} of {plain / 1e9:.2f} GB"
        )
    print(f"generated in {took:.0f} s by {given.processes} processes")


if __name__ == "__main__":
    main()
