"""CQS against rectangular on 1 to 1,024 workers: the bytes each worker touches and reads, and seconds. Nothing is run.

    python benchmarks/scaling.py [--plot docs/scaling.svg] [--json scaling.json]

Bytes are counted worker by worker, from the quorums and the row blocks that it is dealt. Seconds follow from these and
from the speeds given as options. One head of 64, bfloat16; a partial is out in float32 and lse in float64.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise, product, takewhile
from math import ceil, sqrt
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cqsa_stream.schedulers.quorums import neighbours, quorum_size, singer_numbers, singer_set

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

GB = 1e9
TOKENS = 10**9
HEAD_DIM = 64
QUERY, KEY_VALUE, PARTIAL = 2 * HEAD_DIM, 2 * 2 * HEAD_DIM, 4 * HEAD_DIM + 8  # bytes a token
ALL_BYTES = (QUERY + KEY_VALUE) * TOKENS
WORKERS = tuple(2**power for power in range(11))
STORES = ("shared", "copied", "in place")
SCHEDULES = CQS, RECTANGULAR, TILES = "cqs", "rectangular", "tiles"
COLOURS = ("tab:orange", "tab:blue", "tab:green")
_TASKS_EACH, _CHUNKS_AT_LEAST = 8, 500  # Singer numbers up to 8 tasks a worker, or up to 500, are weighed
_COLUMNS_MOST, _STEPS = 32, 16  # tiles of up to 32 ranges of columns; 1/16, 2/16, ... of the workers busy
_LEAST_GIB = 8  # less memory takes more than some thousand chunks
_NEVER = 2**62
_FASTER = 0.99  # what differs by less is a tie


@dataclass(frozen=True)
class Machine:
    """What each worker has, and what all of them share."""

    flops_per_s: float
    memory_bytes: float
    shared_bytes_per_s: float
    disk_bytes_per_s: float


@dataclass(frozen=True)
class Dealt:
    """What each worker does under one way of dealing. ``parts``: chunks (CQS), or ranges of columns.

    ``scores``, ``touched``, ``read`` (partials that come back among them) and ``spilled``: one number a worker, the
    last three in bytes. ``merged_bytes``: partials of rows in several shares, written and read, in all.
    """

    parts: int
    tasks_most: int
    scores: Floats
    touched: Floats
    read: Floats
    spilled: Floats
    merged_bytes: float

    def seconds(self, machine: Machine, store: str) -> float:
        """Return the longer of computing and moving, and the merging after it; the copying before it, where there is
        any."""
        compute = 4 * HEAD_DIM * self.scores / machine.flops_per_s
        moved, shared = self.read + self.spilled, machine.shared_bytes_per_s
        merging = self.merged_bytes / shared
        if store == "shared":
            return max(float(compute.max()), float(moved.sum()) / shared) + merging
        copying = float(self.touched.sum()) / shared if store == "copied" else 0.0
        return copying + float(np.maximum(compute, moved / machine.disk_bytes_per_s).max()) + merging


@dataclass(frozen=True)
class Point:
    """The fastest way of dealing one schedule out, to all workers or (``idle``) to as many of them as is fastest.

    Bytes are the most that any worker has, merged ones are of all.
    """

    causal: bool
    workers: int
    schedule: str
    store: str
    idle: bool
    busy: int
    parts: int
    tasks_most: int
    touched_bytes: float
    read_bytes: float
    merged_bytes: float
    merge_s: float
    seconds: float


def cqs(workers: int, c: int, causal: bool, memory_bytes: float) -> Dealt | None:
    """Deal the c quorums out, neighbouring ones to one worker; None where a task's rows do not fit its memory."""
    members, is_row, is_column = quorums(c, causal)
    chunk = TOKENS / c
    room = memory_bytes - quorum_size(c) * chunk * (QUERY + PARTIAL)
    if room < 0:
        return None
    bounds = [c * worker // workers for worker in range(workers + 1)]
    touched, read, spilled, shares = [], [], [], np.zeros(c, np.int64)
    for first, stop in pairwise(bounds):
        rows = [members[i][is_row[i]] for i in range(first, stop)]
        columns = [members[i][is_column[i]] for i in range(first, stop)]
        own_rows, own_columns = np.unique(np.concatenate(rows)), np.unique(np.concatenate(columns))
        shares[own_rows] += 1
        partials = min(len(own_rows), int(room / (chunk * PARTIAL)))
        blocks = int((room - partials * chunk * PARTIAL) / (chunk * (QUERY + KEY_VALUE)))
        back = (fetches(rows, c, partials) - len(own_rows)) * chunk * PARTIAL
        inputs = (fetches(rows, c, blocks) * QUERY + fetches(columns, c, blocks) * KEY_VALUE) * chunk
        touched.append((len(own_rows) * QUERY + len(own_columns) * KEY_VALUE) * chunk)
        read.append(inputs + back)
        spilled.append(back)
    tasks = np.diff(bounds)
    merged = 2 * float(shares[shares > 1].sum()) * chunk * PARTIAL
    scores = tasks / c * TOKENS**2 / (2 if causal else 1)  # every quorum has as many pairs
    return Dealt(c, int(tasks.max()), scores, np.array(touched), np.array(read), np.array(spilled), merged)


@cache
def quorums(c: int, causal: bool) -> tuple[Ints, Bools, Bools]:
    """Return the chunks of each quorum, ascending; which of them are rows of any pair, and which are columns."""
    first = np.arange(c)[:, None]
    members = np.sort((first + np.array(singer_set(c))) % c, axis=1)
    is_row, is_column = np.ones_like(members, bool), np.ones_like(members, bool)
    if causal:  # the first sees no other, the last is seen by no other; the diagonal pair of chunk i is quorum i's
        is_row[:, 0] = members[:, 0] == first[:, 0]
        is_column[:, -1] = members[:, -1] == first[:, 0]
    return members, is_row, is_column


def fetches(tasks: list[Ints], c: int, places: int) -> int:
    """Return how many chunks the tasks fetch, one task after another, where those used again soonest stay in memory.

    ``places``: chunks that stay from one task to the next.
    """
    distinct = len(np.unique(np.concatenate(tasks)))
    if distinct <= places:
        return distinct
    later, uses = np.full(c, _NEVER), []
    for number in reversed(range(len(tasks))):
        uses.append(later[tasks[number]])
        later[tasks[number]] = number
    fetched, due = 0, np.full(c, _NEVER)  # when what is in memory is used next
    for number, chunks in enumerate(tasks):
        fetched += int((due[chunks] != number).sum())
        due[chunks] = uses[-1 - number]
        held = np.flatnonzero(due < _NEVER)
        if len(held) > places:
            due[held[np.argsort(due[held], kind="stable")[places:]]] = _NEVER
    return fetched


def rectangular(workers: int, parts: int, causal: bool, memory_bytes: float) -> Dealt:
    """Deal ranges of rows out, each cut into ``parts`` ranges of columns: all of them have as many scores.

    With one part, a share owns its rows, and nothing is merged.
    """
    ranges = workers // parts  # what is left over is idle
    cuts = [TOKENS * (sqrt(n / ranges) if causal else n / ranges) for n in range(ranges + 1)]
    touched, read, partials = [], [], 0.0
    for start, stop in pairwise(cuts):
        for first, last in pairwise(column_cuts(start, stop, parts, causal)):
            top = max(start, first) if causal else start  # rows above see none of these keys
            touched.append((stop - top) * QUERY + (last - first) * KEY_VALUE)
            read.append((stop - top) * QUERY + keys_read(top, stop, first, last, causal, memory_bytes))
            partials += (stop - top) * PARTIAL
    scores = np.full(len(read), TOKENS**2 / (2 if causal else 1) / len(read))
    merged = 2 * partials if parts > 1 else 0.0
    return Dealt(parts, 1, scores, np.array(touched), np.array(read), np.zeros(len(read)), merged)


def column_cuts(start: float, stop: float, parts: int, causal: bool) -> list[float]:
    """Return where the keys that some rows see are cut, so that all parts have as many scores."""
    if not causal:
        return [TOKENS * n / parts for n in range(parts + 1)]
    rows = stop - start
    square, triangle = start * rows, rows * rows / 2
    scores = [(square + triangle) * n / parts for n in range(parts)]
    return [s / rows if s <= square else stop - sqrt(2 * (triangle - s + square)) for s in scores] + [stop]


def keys_read(top: float, stop: float, first: float, last: float, causal: bool, memory_bytes: float) -> float:
    """Return the bytes of keys and values that stream past the rows, block of rows by block; what there is room for
    stays for the next block.
    """
    blocks = ceil((stop - top) * (QUERY + PARTIAL) / memory_bytes)
    rows = (stop - top) / blocks
    room, read, before = memory_bytes - rows * (QUERY + PARTIAL), 0.0, 0.0
    for block in range(1, blocks + 1):
        seen = (min(last, top + block * rows) if causal else last) - first
        read += seen * KEY_VALUE - min(room, before)
        before = seen * KEY_VALUE
    return read


def singer_numbers_weighed(workers: int, memory_bytes: float) -> list[int]:
    """Return Singer numbers from half the number of workers on."""
    fits = (TOKENS * (QUERY + PARTIAL) / memory_bytes) ** 2  # about: one task's rows are 1 / sqrt(c) of all
    most = max(_TASKS_EACH * workers, _CHUNKS_AT_LEAST, 2 * fits)
    return [c for c in takewhile(lambda c: c <= most, singer_numbers()) if 2 * c >= workers]


def ways(workers: int, causal: bool, memory_bytes: float) -> dict[str, list[Dealt]]:
    """Return the ways of dealing that are weighed of each schedule: to all workers, or to some of them."""
    numbers = singer_numbers_weighed(workers, memory_bytes)
    quorums_dealt = (cqs(min(workers, c), c, causal, memory_bytes) for c in numbers)
    some = sorted({-(-workers * step // _STEPS) for step in range(1, _STEPS + 1)})
    columns = range(2, min(workers, _COLUMNS_MOST) + 1)
    rows = [rectangular(busy, 1, causal, memory_bytes) for busy in some]
    cut = (rectangular(b, n, causal, memory_bytes) for b, n in product(some, columns) if n <= b and 2 * b >= workers)
    return {CQS: [dealt for dealt in quorums_dealt if dealt], RECTANGULAR: rows, TILES: [*rows, *cut]}


def fastest(weighed: list[Dealt], workers: int, machine: Machine, store: str, idle: bool) -> tuple[float, Dealt]:
    """Return the seconds and the way of dealing, of those that leave no worker idle or of all."""
    found = [
        (dealt.seconds(machine, store), float(dealt.read.sum()), number)
        for number, dealt in enumerate(weighed)
        if idle or len(dealt.scores) == workers
    ]
    seconds, _, best = min(found)
    return seconds, weighed[best]


Found = dict[tuple[bool, int, str, str, bool], Point]


def points(machine: Machine) -> Iterator[Point]:
    """Yield the fastest way of each schedule, for each mask, number of workers and store."""
    for causal, workers in product((False, True), WORKERS):
        for schedule, weighed in ways(workers, causal, machine.memory_bytes).items():
            for store, idle in product(STORES, (False, True)):
                seconds, best = fastest(weighed, workers, machine, store, idle)
                yield Point(
                    causal, workers, schedule, store, idle, len(best.scores), best.parts, best.tasks_most,
                    float(best.touched.max()), float(best.read.max()), best.merged_bytes,
                    best.merged_bytes / machine.shared_bytes_per_s, seconds,
                )  # fmt: skip


def bytes_table(found: Found) -> None:
    print("GB of the worker that has most (merged: of all). All are busy, dealt as is fastest with the shared store")
    print(f"{'':14} | {'CQS':^51} | {'rectangular':^14} | {'tiles':>20}")
    moved = f"{'touched':>7} {'read':>6} {'merged':>7} {'merge s':>7}"
    print(f"{'mask':<6} {'workers':>7} | {'c':>4} {'tasks':>5} {moved} {'touched':>10} | "
          f"{'touched':>7} {'read':>6} | {'columns':>7} {moved}")  # fmt: skip
    for causal, workers in product((False, True), WORKERS):
        cqs, rows, tiles = (found[causal, workers, name, "shared", False] for name in SCHEDULES)
        print(f"{_name(causal):<6} {workers:>7} | {cqs.parts:>4} {cqs.tasks_most:>5} {_moved(cqs)} "
              f"{cqs.touched_bytes / ALL_BYTES:>10.1%} | {rows.touched_bytes / GB:>7.1f} "
              f"{rows.read_bytes / GB:>6.1f} | {tiles.parts:>7} {_moved(tiles)}")  # fmt: skip


def _moved(point: Point) -> str:
    sizes = f"{point.touched_bytes / GB:>7.1f} {point.read_bytes / GB:>6.1f} {point.merged_bytes / GB:>7.0f}"
    return f"{sizes} {point.merge_s:>7.0f}"


def _name(causal: bool) -> str:
    return "causal" if causal else "full"


def seconds_table(found: Found) -> None:
    print("\nSeconds with all workers busy, each schedule dealt as is fastest with that store")
    print(f"{'':14}" + f" | {'shared store':^32} | {'copied to local disks':^32} | {'in place':>20}")
    print(f"{'mask':<6} {'workers':>7}" + f" | {'c':>4} {'CQS':>7} {'rectangular':>11} {'tiles':>7}" * len(STORES))
    for causal, workers in product((False, True), WORKERS):
        line = f"{_name(causal):<6} {workers:>7}"
        for store in STORES:
            cqs, rows, tiles = (found[causal, workers, name, store, False] for name in SCHEDULES)
            line += f" | {cqs.parts:>4} {cqs.seconds:>7.0f} {rows.seconds:>11.0f} {tiles.seconds:>7.0f}"
        print(line)


def idle_table(found: Found) -> None:
    print("\nSeconds where workers may be idle, and how many are busy")
    three = "".join(f" | {name:^13}" for name in ("CQS", "rectangular", "tiles"))
    print(f"{'':14} | {'shared store':^45} | {'copied to local disks':^45} | {'in place':>10}")
    print(f"{'':14}{three}{three} | {'CQS':>8}")
    print(f"{'mask':<6} {'workers':>7}" + f" | {'busy':>5} {'s':>7}" * 7)
    for causal, workers in product((False, True), WORKERS):
        cells = [*product(STORES[:2], SCHEDULES), (STORES[2], CQS)]
        some = [found[causal, workers, schedule, store, True] for store, schedule in cells]
        if any(point.busy < workers for point in some):
            print(f"{_name(causal):<6} {workers:>7}" + "".join(f" | {p.busy:>5} {p.seconds:>7.0f}" for p in some))


def law_table(machine: Machine) -> None:
    print("\nThe law: of all bytes, what is touched by the worker that touches most. One task each; the squarest tiles")
    print(f"{'mask':<6} {'workers':>7} | {'c':>4} {'CQS':>6} {'k/c':>6} {'1/sqrt(c)':>9} | {'rectangular':>11} | "
          f"{'columns':>7} {'tiles':>6}")  # fmt: skip
    for causal, workers in product((False, True), WORKERS):
        c = neighbours(workers)[0]  # no power of two is a Singer number
        if c and (one := cqs(c, c, causal, machine.memory_bytes)):
            rows, *cut = (rectangular(workers, 2**n, causal, machine.memory_bytes) for n in range(6))
            tiles = min(cut, key=lambda dealt: float(dealt.touched.max()))
            shares = [float(dealt.touched.max()) / ALL_BYTES for dealt in (one, rows, tiles)]
            print(f"{_name(causal):<6} {workers:>7} | {c:>4} {shares[0]:>6.1%} {quorum_size(c) / c:>6.1%} "
                  f"{1 / sqrt(c):>9.1%} | {shares[1]:>11.1%} | {tiles.parts:>7} {shares[2]:>6.1%}")  # fmt: skip


def verdict(found: Found) -> None:
    print("\nWhere CQS is faster by more than 1 %: workers (time, CQS / the other)")
    print(f"{'workers':<12} {'mask':<6} {'store':<8} | {'than rectangular':<47} | than tiles")
    for idle, causal, store in product((False, True), (False, True), STORES):
        line = f"{'some idle' if idle else 'all busy':<12} {_name(causal):<6} {store:<8}"
        for other, width in ((RECTANGULAR, 47), (TILES, 0)):
            where = []
            for workers in WORKERS:
                ours, theirs = (found[causal, workers, name, store, idle].seconds for name in (CQS, other))
                if ours < _FASTER * theirs:
                    where.append(f"{workers} ({ours / theirs:.2f})")
            line += f" | {', '.join(where) if where else 'nowhere':<{width}}"
        print(line)


def plot(found: Found, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "scaling", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, (moved, time) = pyplot.subplots(1, 2, figsize=(10, 4.6))
    for schedule, colour in zip(SCHEDULES, COLOURS, strict=True):
        of = {store: [found[False, workers, schedule, store, False] for workers in WORKERS] for store in STORES}
        touched, read = ([getattr(p, name) / GB for p in of["shared"]] for name in ("touched_bytes", "read_bytes"))
        moved.loglog(WORKERS, touched, "-", marker="o", ms=3, color=colour, label=f"{schedule}, touched")
        moved.loglog(WORKERS, read, "--", color=colour, label=f"{schedule}, read")
        for store, style in zip(STORES, ("-", "--", ":"), strict=True):
            time.loglog(WORKERS, [p.seconds for p in of[store]], style, color=colour, label=f"{schedule}, {store}")
    law = [ALL_BYTES / GB / sqrt(workers) for workers in WORKERS]
    moved.loglog(WORKERS, law, ":", color="grey", label="all / sqrt(workers)")
    moved.set_title("GB of the worker that has most (full, shared store)", fontsize=9)
    time.set_title("seconds (full, all workers busy)", fontsize=9)
    for axis in (moved, time):
        axis.set_xticks(WORKERS, [f"{workers:,}" for workers in WORKERS], rotation=60)
        axis.minorticks_off()
        axis.tick_params(labelsize=7)
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.set_xlabel("workers", fontsize=8)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tflops", type=float, default=500, help="of a worker, in 10^12 a second")
    parser.add_argument("--memory-gib", type=float, default=64, help="of a worker, at least 8")
    parser.add_argument("--shared-gb-per-s", type=float, default=20, help="of the shared store, to all workers")
    parser.add_argument("--disk-gb-per-s", type=float, default=6, help="of a worker's own disk")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    if o.memory_gib < _LEAST_GIB:
        parser.error(f"--memory-gib {o.memory_gib:g}; expected at least {_LEAST_GIB}")
    machine = Machine(o.tflops * 1e12, o.memory_gib * 2**30, o.shared_gb_per_s * GB, o.disk_gb_per_s * GB)
    print(f"{TOKENS:,} tokens, {ALL_BYTES / GB:.0f} GB of Q, K and V; each worker {o.tflops:g} TFLOP/s, "
          f"{o.memory_gib:g} GiB;\nthe shared store {o.shared_gb_per_s:g} GB/s in all, "
          f"local disks {o.disk_gb_per_s:g} GB/s each\n")  # fmt: skip
    found = {(p.causal, p.workers, p.schedule, p.store, p.idle): p for p in points(machine)}
    bytes_table(found)
    seconds_table(found)
    idle_table(found)
    law_table(machine)
    verdict(found)
    if o.plot:
        plot(found, o.plot)
    if o.json:
        o.json.write_text(json.dumps([asdict(point) for point in found.values()], indent=1))


if __name__ == "__main__":
    main()
