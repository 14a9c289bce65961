"""How fast a machine is: figures that were measured, or nominal ones where nothing was."""

from bisect import bisect_right
from dataclasses import dataclass, replace
from math import exp, log

__all__ = ["Rates", "Speeds", "TileTimes"]

_ROW_BLOCKS = ((768, 256), (192, 64), (0, 32))  # (rows from which on, rows of a block)


@dataclass(frozen=True)
class TileTimes:
    """Seconds of one kernel call and its merge: ``seconds[i][j]`` for ``rows[i]`` by ``columns[j]``, both ascending.

    ``causal``, ``stacked``: the seconds of a causal tile, alone and of several in one call, over those of a full one.
    ``threads`` share the rows of a call in blocks, so that some wait for others; 0: on a device of its own.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    causal: float
    stacked: float
    threads: int = 0

    @classmethod
    def nominal(
        cls, flops_per_s: float, width: int, call_s: float, triangles: tuple[float, float] = (1.0, 0.7)
    ) -> "TileTimes":
        """Return the times of a kernel of this rate for head dims that sum up to ``width``: small tiles cost more.

        ``triangles``: what ``causal`` and ``stacked`` are.
        """
        sizes = tuple(2**n for n in range(7, 17, 3))
        seconds = tuple(
            tuple(call_s + 2.0 * width * r * c * (1 + 40 / c + 64 / r) / flops_per_s for c in sizes) for r in sizes
        )
        return cls(sizes, sizes, seconds, *triangles)

    def scaled(self, factor: float) -> "TileTimes":
        """Return the times of a kernel that takes ``factor`` times as long: of another head dim."""
        return replace(self, seconds=tuple(tuple(s * factor for s in row) for row in self.seconds))

    def best_rows(self) -> int:
        """Return the fewest rows of a call that is as fast as any, to 2 %: more would only take memory."""
        per_row = [row[-1] / rows for rows, row in zip(self.rows, self.seconds, strict=True)]
        return next(rows for rows, s in zip(self.rows, per_row, strict=True) if s <= 1.02 * min(per_row))

    def _dealt(self, rows: int) -> int:
        """Return the rows of a call in which every thread has as many blocks as the busiest one.

        Blocks are those of torch's kernel (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp).
        """
        if not self.threads:
            return rows
        block = next(block for least, block in _ROW_BLOCKS if rows >= least)
        return -(-rows // (block * self.threads)) * block * self.threads

    def call_s(self, rows: int, columns: int, causal: bool, tiles: int) -> float:
        """Return the seconds of a call of so many equal tiles of these rows by these columns."""
        share = (self.causal if tiles == 1 else self.stacked) if causal else 1.0
        return tiles * share * self.tile_s(rows, columns)

    def tile_s(self, rows: int, columns: int) -> float:
        """Return the seconds of a full tile: between the measured sizes, and beyond the largest, by power laws."""
        i, u = _place(self.rows, self._dealt(rows))
        j, v = _place(self.columns, columns)
        near, far = self.seconds[i], self.seconds[i + 1]
        return exp(
            (1 - u) * ((1 - v) * log(near[j]) + v * log(near[j + 1]))
            + u * ((1 - v) * log(far[j]) + v * log(far[j + 1]))
        )


def _place(sizes: tuple[int, ...], size: int) -> tuple[int, float]:
    """Return the interval of a size and how far in it, in logarithms; below the smallest as the smallest."""
    size = max(size, sizes[0])
    index = min(bisect_right(sizes, size), len(sizes) - 1) - 1
    return index, log(size / sizes[index]) / log(sizes[index + 1] / sizes[index])


@dataclass(frozen=True)
class Speeds:
    """What a machine takes besides its kernels. Bytes per second: ``read`` from disk, ``write`` durably, ``stage`` from
    host buffers to where the kernel reads, ``touch`` of memory used for the first time.

    ``file_s``: seconds for a small durable file, ``file_lost_s``: by which it delays the kernels that run meanwhile;
    ``block_s``: for handing a block from thread to thread.
    ``read_cpu_s``, ``check_cpu_s``, ``expand_cpu_s``: processor seconds to read a byte, plainly, of chunks with a
    checksum, and of compressed ones.
    """

    read_bytes_per_s: float
    write_bytes_per_s: float
    stage_bytes_per_s: float
    touch_bytes_per_s: float
    file_s: float
    file_lost_s: float
    block_s: float
    read_cpu_s: float
    check_cpu_s: float
    expand_cpu_s: float


@dataclass(frozen=True)
class Rates:
    """How fast a machine is at one problem: its kernel's times, for the problem's dtype and head dims, and the rest."""

    tiles: TileTimes
    speeds: Speeds
