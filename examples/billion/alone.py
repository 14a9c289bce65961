"""What a run is made of, each measured alone: the kernels, reading with decompression, and the disk."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from genome import BLOCK

import cqsa_stream as cqsa
from cqsa_stream.events import Event, Figures
from cqsa_stream.storage.open import open_array
from cqsa_stream.storage.output import create_array, write_chunk


def kernel_s(folder: Path, tokens: int, window: int, device: str) -> float:
    """Return the seconds in which kernels compute these rows, of arrays in memory, when all is warm."""
    arrays = []
    for name in "qkv":
        array = open_array(str(folder / f"{name}.zarr"))
        found = np.empty((1, tokens, array.shape[3]), array.dtype)
        array.read_into(0, range(1), range(tokens), found)
        arrays.append(torch.from_numpy(found)[None])
    seen: list[Figures] = []

    def note(event: Event) -> None:
        seen.append(event.figures)

    for _ in range(2):
        cqsa.attention(*arrays, window=window, device=device, observers=[note])
    return seen[-1].kernel_s


def decompression_s(folder: Path, tokens: int) -> float:
    """Return the seconds in which all cores read and decompress these rows of Q, K and V."""
    arrays = [open_array(str(folder / f"{name}.zarr")) for name in "qkv"]

    def read(start: int) -> None:
        rows = range(start, min(tokens, start + BLOCK))
        for array in arrays:
            array.read_into(0, range(1), rows, np.empty((1, len(rows), array.shape[3]), array.dtype))

    begin = time.perf_counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(read, range(0, tokens, BLOCK)))
    return time.perf_counter() - begin


def disk_s(folder: Path, tokens: int, threads: int) -> float:
    """Return the seconds in which these rows of the output are written durably, and those of the inputs read."""
    scratch = folder / "scratch.zarr"
    like = open_array(str(folder / "v.zarr"))
    values = np.ones((1, 1, BLOCK, like.shape[3]), like.dtype)
    array = create_array(scratch, (1, 1, tokens, like.shape[3]), like.dtype, values.shape)

    def read(file: Path) -> None:
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        while os.read(handle, 1 << 22):
            pass
        os.close(handle)

    files = [folder / f"{name}.zarr/c/0/0/{chunk}/0" for chunk in range(-(-tokens // BLOCK)) for name in "qkv"]
    with ThreadPoolExecutor(threads) as pool:
        begin = time.perf_counter()
        list(pool.map(lambda chunk: write_chunk(array, (0, 0, chunk, 0), values), range(-(-tokens // BLOCK))))
        list(pool.map(read, files))
        took = time.perf_counter() - begin
    shutil.rmtree(scratch)
    return took
