"""How fast arrays are read from disk and from the page cache, against what the disk can do.

    python benchmarks/storage.py [--gib 4] [--rounds 3] [--folder DIR] [--json FILE]

For each way an array may lie on disk (chunks of 4, 16 and 64 MiB, plain, with crc32c, and by zstd; shards of 64 MiB
with inner chunks of 4 MiB, plain and with crc32c), float16 [1, 1, tokens, 64], an array of ``--gib`` is written and
read from end to end in ranges of 64 MiB (two at a time where a reader can), by each reader in turn, in rounds, so that
a drifting disk is the same for all:

    limit         O_DIRECT preadv of the array's own files, with the threads and block size that were fastest before
    fast path     storage/readers/plain.py, with 6 pieces in flight (the most that a plan takes)
    our TS path   storage/readers/tensorstore.py, with 32 chunks in flight (a plan takes 6 of them, for their memory)
    TensorStore   alone, into the same buffer
    zarr-python   into the same buffer
    memmap        copies out of np.memmap

``cold``: the files are dropped from the page cache before. ``CPU``: processor seconds of this process per GB.
``of limit``: the median over the rounds of the ratio to the limit in the same round; ``of TS`` likewise. ``left``: MiB
of the files in the page cache after a cold read by the fast path.
"""

import argparse
import ctypes
import json
import mmap
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import zarr
from zarr.core.buffer import default_buffer_prototype

from cqsa_stream.storage.open import TokenArray, open_array
from cqsa_stream.storage.output import create_array, write
from cqsa_stream.storage.readers.tensorstore import TensorStoreArray

MIB = 2**20
RANGE_BYTES = 64 * MIB
ROW_BYTES = 128
IN_FLIGHT, CHUNKS_IN_FLIGHT = 6, 32
THREADS, BLOCKS = (1, 2, 4, 8), (1 * MIB, 4 * MIB, 16 * MIB)


@dataclass(frozen=True)
class Lying:
    """How an array lies on disk: sizes in MiB, ``inner`` where chunks are shards."""

    chunk: int
    codec: str
    inner: int | None = None

    def __str__(self) -> str:
        return f"{self.chunk} MiB {f'shards of {self.inner} MiB' if self.inner else 'chunks'}, {self.codec}"


LAYOUTS = [Lying(chunk, codec) for codec in ("none", "crc32c", "zstd") for chunk in (4, 16, 64)]
LAYOUTS += [Lying(64, codec, 4) for codec in ("none", "crc32c")]


def tokens(mib: int) -> int:
    return mib * MIB // ROW_BYTES


def make(path: Path, lying: Lying, size: int) -> None:
    """Write an array of about ``size`` bytes, of numbers that look random."""
    count = size // RANGE_BYTES * tokens(64)
    inner = None if lying.inner is None else (1, 1, tokens(lying.inner), 64)
    array = create_array(path, (1, 1, count, 64), "float16", (1, 1, tokens(lying.chunk), 64), lying.codec, inner)
    values = np.random.default_rng(0).standard_normal((1, 1, tokens(64), 64), np.float32).astype(np.float16)
    for start in range(0, count, tokens(64)):
        values[0, 0, 0, 0] = start % 999
        write(array[:, :, start : start + tokens(64)], values)


def files_of(path: Path) -> list[Path]:
    return sorted((p for p in (path / "c").rglob("*") if p.is_file()), key=lambda p: [int(n) for n in p.parts[-4:]])


def drop(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_page_cache(files: list[Path]) -> float:
    """Return the MiB of the files that are in the page cache, by mincore."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = 0
    for path in files:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            mapped = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
            pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            view = np.frombuffer(mapped, np.uint8)
            address = ctypes.c_void_p(view.ctypes.data)
            assert libc.mincore(address, ctypes.c_size_t(size), pages.ctypes.data_as(ctypes.c_void_p)) == 0
            found += int((pages & 1).sum()) * mmap.PAGESIZE
            del view
            mapped.close()
    return found / MIB


def raw(files: list[Path], threads: int, block: int) -> None:
    """Read the files by O_DIRECT preadv, as many blocks at a time as there are threads."""
    work = ((path, start) for path in files for start in range(0, path.stat().st_size, block))
    lock = threading.Lock()

    def reader(buffer: mmap.mmap) -> None:
        last, number = None, -1
        while True:
            with lock:
                path, start = next(work, (None, 0))
            if path != last and number >= 0:
                os.close(number)
            if path is None:
                return
            if path != last:
                number, last = os.open(path, os.O_RDONLY | os.O_DIRECT), path
            os.preadv(number, [buffer], start)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(reader, [mmap.mmap(-1, block) for _ in range(threads)]))


def by_ranges(count: int) -> Iterator[range]:
    return (range(start, start + tokens(64)) for start in range(0, count, tokens(64)))


def by_array(array: TokenArray, buffers: list[np.ndarray], in_flight: int) -> None:
    """Read all ranges, two at a time, as the prefetcher does."""
    array.begin(in_flight // 2)
    spans = by_ranges(array.shape[2])
    lock = threading.Lock()

    def loader(buffer: np.ndarray) -> None:
        while True:
            with lock:
                span = next(spans, None)
            if span is None:
                return
            array.read_into(0, range(1), span, buffer[0])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(loader, buffers))


def by_tensorstore(path: Path, buffers: list[np.ndarray]) -> None:
    """Read all ranges, two at a time too, the rest being TensorStore's own choice."""
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    store = ts.open(spec, context=context, read=True).result()
    pending: deque[ts.WriteFutures] = deque()
    for number, span in enumerate(by_ranges(store.shape[2])):
        if len(pending) == 2:
            pending.popleft().result()
        target = ts.array(buffers[number % 2], copy=False, write=True)
        pending.append(target.write(store[:, :, span.start : span.stop]))
    for future in pending:
        future.result()


def by_zarr(path: Path, buffer: np.ndarray) -> None:
    array = zarr.open_array(path, mode="r")
    out: Any = default_buffer_prototype().nd_buffer.from_numpy_array(buffer)
    for span in by_ranges(array.shape[2]):
        array.get_basic_selection((slice(None), slice(None), slice(span.start, span.stop)), out=out)


def by_memmap(files: list[Path], buffer: np.ndarray) -> None:
    flat = buffer.reshape(-1).view(np.uint8)
    for path in files:
        mapped = np.memmap(path, np.uint8, "r")
        for start in range(0, len(mapped), RANGE_BYTES):
            part = mapped[start : start + RANGE_BYTES]
            np.copyto(flat[: len(part)], part[: len(flat)])


def in_pages() -> np.ndarray:
    """Return a buffer of a range in whole pages, as the ring's are, that has been used before."""
    buffer = np.frombuffer(mmap.mmap(-1, RANGE_BYTES), np.float16).reshape(1, 1, tokens(64), 64)
    buffer.fill(1)
    return buffer


def timed(action: Callable[[], object], size: int) -> tuple[float, float]:
    """Return (GB/s, processor seconds per GB)."""
    start, processor = time.perf_counter(), time.process_time()
    action()
    return size / (time.perf_counter() - start) / 1e9, (time.process_time() - processor) / size * 1e9


def fio(folder: Path) -> None:
    """Print what fio reads of the files in a folder, where it is installed."""
    if shutil.which("fio") is None:
        print("fio: not installed")
        return
    command = ["fio", "--name=read", "--rw=read", "--direct=1", "--bs=4M", "--ioengine=libaio", "--iodepth=8",
               f"--opendir={folder}", "--file_service_type=sequential", "--output-format=json",
               "--readonly"]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    job = json.loads(found[found.index("{") :])["jobs"][0]
    print(f"fio, 4 MiB, libaio, depth 8: {job['read']['bw_bytes'] / 1e9:.2f} GB/s")


def limits(files: list[Path], size: int, rounds: int) -> tuple[int, int]:
    """Print the limit by threads and block size, medians of the rounds, and return the fastest."""
    found: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for threads in THREADS:
            for block in BLOCKS:
                speed = timed(lambda threads=threads, block=block: raw(files, threads, block), size)  # type: ignore[misc]
                found.setdefault((threads, block), []).append(speed)
    print(f"{'O_DIRECT preadv':<16}" + "".join(f"{b // MIB:>4} MiB" + " " * 11 for b in BLOCKS) + "GB/s, CPU s/GB")
    middle = {key: (statistics.median(s for s, _ in all_), statistics.median(c for _, c in all_)) for key, all_ in
              found.items()}  # fmt: skip
    for threads in THREADS:
        cells = "".join(f"{middle[threads, b][0]:8.2f} {middle[threads, b][1]:6.3f}    " for b in BLOCKS)
        print(f"{threads:>2} threads      {cells}")
    return max(middle, key=lambda key: middle[key][0])


def measure(path: Path, lying: Lying, size: int, rounds: int, best: tuple[int, int]) -> dict[str, Any]:
    """Return the figures of every reader, cold in all rounds, warm in the last."""
    files, buffers = files_of(path), [in_pages(), in_pages()]
    readers: dict[str, Callable[[], object]] = {"limit": lambda: raw(files, *best)}
    if lying.codec != "zstd":
        readers["fast path"] = lambda: by_array(open_array(path), buffers, IN_FLIGHT)
    readers["TensorStore"] = lambda: by_tensorstore(path, buffers)
    kvstore = {"driver": "file", "path": f"{path}/"}
    readers["our TS path"] = lambda: by_array(
        TensorStoreArray.open(str(path), kvstore, False), buffers, CHUNKS_IN_FLIGHT
    )
    others: dict[str, Callable[[], object]] = {"zarr-python": lambda: by_zarr(path, buffers[0])}
    if lying.codec == "none":
        others["memmap"] = lambda: by_memmap(files, buffers[0])
    stored = sum(file.stat().st_size for file in files)
    cold: dict[str, list[tuple[float, float]]] = {}
    left = 0.0
    for number in range(rounds):
        names = [*readers, *(others if number == 0 else {})]
        for name in names[number % len(names) :] + names[: number % len(names)]:  # nobody is always the first
            reader = (readers | others)[name]
            drop(files)
            cold.setdefault(name, []).append(timed(reader, stored if name == "limit" else size))
            if name == "fast path":
                left = max(left, in_page_cache(files))
    warm = {}
    for path_of in files:
        path_of.read_bytes()
    for name, reader in (readers | others).items():
        warm[name] = timed(reader, stored if name == "limit" else size)
    return {"layout": str(lying), "stored": stored, "cold": cold, "warm": warm, "left_mib": left}


def show(found: dict[str, Any]) -> None:
    cold = found["cold"]
    print(f"\n{found['layout']}{'':<6}" + " cold GB/s     CPU  of limit   of TS   warm GB/s     CPU    left")
    for name, speeds in cold.items():
        speed, processor = (statistics.median(figures) for figures in zip(*speeds, strict=True))
        ratio = {other: statistics.median(a[0] / b[0] for a, b in zip(speeds, cold[other], strict=False))
                 for other in ("limit", "TensorStore")}  # fmt: skip
        left = f"{found['left_mib']:6.1f}" if name == "fast path" else ""
        print(
            f"  {name:<24} {speed:9.2f} {processor:7.3f} {ratio['limit']:9.2f} {ratio['TensorStore']:7.2f}   "
            f"{found['warm'][name][0]:9.2f} {found['warm'][name][1]:7.3f}  {left}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path.cwd())
    parser.add_argument("--only", type=int, nargs="*", help="numbers of layouts")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    size = int(options.gib * 1024) // 64 * RANGE_BYTES
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix=".cqsa-storage-") as temporary:
        best: tuple[int, int] | None = None
        for number, lying in enumerate(LAYOUTS):
            if options.only and number not in options.only:
                continue
            path = Path(temporary) / "a.zarr"
            make(path, lying, size)
            if best is None:
                print(f"{size / 1e9:.2f} GB, {lying}; {os.cpu_count()} processors")
                fio(path / "c")
                best = limits(files_of(path), size, options.rounds)
                print(f"the limit below: {best[0]} threads, {best[1] // MIB} MiB")
            results.append(measure(path, lying, size, options.rounds, best))
            show(results[-1])
            shutil.rmtree(path)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
