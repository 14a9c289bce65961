"""The map of pairs: which part of each is done, for a picture of a run."""

from collections.abc import Mapping, Sequence

from cqsa_stream.schedulers.grid import Grid

__all__ = ["pair_map"]

_ROWS_OF_A_CELL, _LANES = 4, 16  # of which a look at these tells enough


def pair_map(
    grid: Grid, covers: Sequence[Mapping[int, int | None]], height: int, width: int
) -> list[list[float | None]]:
    """Return which part of the needed pairs is done, by row and column chunks; None where none is needed.

    ``covers``: for each lane, by row chunk; None where the row is finished. Chunks beyond ``height`` and ``width`` are
    put together, and of many lanes and row chunks some are looked at.
    """
    columns = _parts(grid.columns.filled, width)
    lanes = _some(range(len(covers)), _LANES)
    found: list[list[float | None]] = []
    for rows in _parts(grid.rows.filled, height):
        needed, done = [0] * len(columns), [0] * len(columns)
        for row in _some(rows, _ROWS_OF_A_CELL):
            bits = grid.needed(row).bits
            parts = [(bits >> part.start) & ((1 << len(part)) - 1) for part in columns]
            for lane in lanes:
                cover = covers[lane].get(row, 0)
                for n, (part, wanted) in enumerate(zip(columns, parts, strict=True)):
                    needed[n] += wanted.bit_count()
                    done[n] += (wanted if cover is None else wanted & (cover >> part.start)).bit_count()
        found.append([d / n if n else None for d, n in zip(done, needed, strict=True)])
    return found


def _parts(count: int, most: int) -> list[range]:
    """Cut ``range(count)`` into at most so many parts of nearly equal lengths."""
    parts = max(1, min(count, most))
    return [range(count * n // parts, count * (n + 1) // parts) for n in range(parts)]


def _some(numbers: range, most: int) -> list[int]:
    """Return all of the numbers, or so many that lie evenly among them."""
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[(2 * n + 1) * len(numbers) // (2 * most)] for n in range(most)]
