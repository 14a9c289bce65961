"""CQS against rectangular: bytes that moved, counted as they moved, and seconds, over lengths, budgets and masks.

    python benchmarks/traffic.py [--plot docs/traffic.svg] [--json traffic.json]

The runs are of one head of 64, float32, uncompressed, on the CPU. Under the runs stand plans of lengths that take days:
nothing was run there, the bytes are the planner's (``benchmarks/promise.py`` says how far those are from counted ones).
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import cqsa_stream as cqsa
from cqsa_stream.generate import generate
from cqsa_stream.machine.habits import CUDA
from cqsa_stream.schedulers.masks.calls import Tile
from cqsa_stream.schedulers.masks.window import CAUSAL, FULL
from cqsa_stream.schedulers.model.memory import Workload
from cqsa_stream.schedulers.model.rates import Rates, Speeds, TileTimes
from cqsa_stream.schedulers.model.traffic import Stored
from cqsa_stream.schedulers.plan import Plan
from cqsa_stream.schedulers.search import Machine, Request, make_plan

MIB = 2**20
GPU = Speeds(
    read_bytes_per_s=5e9, write_bytes_per_s=2e9, stage_bytes_per_s=2e10, touch_bytes_per_s=4e9, file_s=2e-3,
    file_lost_s=1e-9, block_s=1e-4, read_cpu_s=2e-10, check_cpu_s=1e-9, expand_cpu_s=4e-9,
)  # fmt: skip
LENGTHS = (16_384, 32_768, 65_536)
BUDGETS = (22, 24, 28, 40, 64, 128)
SCHEDULES = ("cqs", "rectangular")
_NEVER_S = 1e12  # no checkpoints: their number depends on the interval, not on the schedule


@dataclass(frozen=True)
class Point:
    """Bytes moved to and from the disk, and seconds, of one schedule at one length, mask and budget."""

    tokens: int
    causal: bool
    budget_bytes: int
    schedule: str
    chunks: int
    spills: int
    bytes_moved: int
    planned_bytes: int
    seconds: float | None


def ran(folder: Path) -> list[Point]:
    found = []
    for tokens in LENGTHS:
        paths = generate(folder / str(tokens), tokens=tokens, heads=1, head_dim=64, dtype="float32")
        for causal, budget, schedule in product((True, False), BUDGETS, SCHEDULES):
            options: dict[str, Any] = {"is_causal": causal, "schedule": schedule, "host_memory": budget * MIB,
                                       "device": "cpu", "out": folder / "out"}  # fmt: skip
            plan = cqsa.plan(*paths, **options)
            if not plan.fits:
                continue
            cqsa.attention(*paths, **options)
            status = cqsa.open_run(folder / "out.run").status()
            moved = status["bytes_read"] + status["bytes_written"]
            found.append(_point(plan, tokens, causal, budget * MIB, moved, status["session_s"]))
            for path in ("out", "out.run"):
                shutil.rmtree(folder / path)
        shutil.rmtree(folder / str(tokens))
    return found


def planned(lengths: tuple[int, ...], budgets: tuple[int, ...]) -> list[Point]:
    """Plan 8 heads of 64, float16, on a GPU with a budget of device memory and twice that of host memory."""
    found = []
    rates = Rates(TileTimes.nominal(4e14, 128, 1e-4), GPU)
    for tokens, causal, budget, schedule in product(lengths, (True, False), budgets, SCHEDULES):
        mask, stored = (CAUSAL if causal else FULL).over(range(tokens), tokens), Stored(tokens, 1, 1, 128)
        work = Workload(
            lanes=8, group=1, head_dim=64, value_dim=64, stored_itemsize=2, compute_itemsize=2, out_itemsize=2,
            row_bytes=264, left_bytes=132,
            flops=8 * 256 * mask.scores(range(tokens), range(tokens)), staging_bytes=0, durable=True,
            resident_output_bytes=0,
        )  # fmt: skip
        machine = Machine(
            kernel="torch-cuda", operator="cudnn", habits=CUDA,
            device_allowed_bytes=budget * MIB, host_allowed_bytes=2 * budget * MIB,
            host_reserved_bytes=0, rates=rates, measured=rates,
            tile=Tile(65_536, 65_536, 65_536, 65_536), step_flops=1e15,
        )  # fmt: skip
        request = Request(work, tokens, tokens, True, mask, (stored, stored, stored), _NEVER_S, schedule)
        plan = make_plan(request, machine)
        if plan.fits:
            moved = plan.cost.bytes_read + plan.cost.bytes_written
            found.append(_point(plan, tokens, causal, budget * MIB, moved, None))
    return found


def _point(plan: Plan, tokens: int, causal: bool, budget: int, moved: int, seconds: float | None) -> Point:
    said = plan.cost.bytes_read + plan.cost.bytes_written
    return Point(tokens, causal, budget, plan.schedule, plan.grid.rows.chunks, plan.cost.spills, moved, said, seconds)


def table(points: list[Point]) -> None:
    print(f"{'tokens':>10} {'mask':<6} {'budget MiB':>10} | {'CQS c':>6} {'spills':>6} {'moved MiB':>10} {'s':>7} | "
          f"{'rect c':>6} {'moved MiB':>10} {'s':>7} | {'bytes':>6} {'time':>5}  CQS / rectangular")  # fmt: skip
    for tokens, causal, budget in dict.fromkeys((p.tokens, p.causal, p.budget_bytes) for p in points):
        pair = {p.schedule: p for p in points if (p.tokens, p.causal, p.budget_bytes) == (tokens, causal, budget)}
        cqs, rectangular = pair.get("cqs"), pair.get("rectangular")
        ratio = f"{cqs.bytes_moved / rectangular.bytes_moved:6.2f}" if cqs and rectangular else " " * 6
        time = (
            f"{cqs.seconds / rectangular.seconds:5.2f}"
            if cqs and rectangular and cqs.seconds and rectangular.seconds
            else ""
        )
        print(f"{tokens:>10} {'causal' if causal else 'full':<6} {budget / MIB:>10.0f} | {_cells(cqs, True)} | "
              f"{_cells(rectangular, False)} | {ratio} {time}".rstrip())  # fmt: skip


def _cells(point: Point | None, spills: bool) -> str:
    if point is None:
        return "no plan fits".ljust(32 if spills else 25)
    seconds = "" if point.seconds is None else f"{point.seconds:.2f}"
    many = f"{point.spills:>6} " if spills else ""
    return f"{point.chunks:>6} {many}{point.bytes_moved / MIB:>10.1f} {seconds:>7}"


def plot(points: list[Point], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "traffic", "svg.fonttype": "none"})
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    lengths = list(dict.fromkeys(p.tokens for p in points))
    figure, axes = pyplot.subplots(2, len(lengths), figsize=(3.2 * len(lengths), 5.6), squeeze=False)
    for (row, causal), (column, tokens) in product(enumerate((True, False)), enumerate(lengths)):
        axis = axes[row][column]
        for schedule, colour in zip(SCHEDULES, ("tab:orange", "tab:blue"), strict=True):
            some = [p for p in points if (p.tokens, p.causal, p.schedule) == (tokens, causal, schedule)]
            style = "--" if any(p.seconds is None for p in some) else "-"
            x = [p.budget_bytes / MIB for p in some]
            axis.loglog(x, [p.bytes_moved / MIB for p in some], style, marker="o", ms=3, color=colour, label=schedule)
        kind = "planned" if any(p.seconds is None for p in points if p.tokens == tokens) else "counted"
        axis.set_title(f"{tokens:,} tokens, {'causal' if causal else 'full'}\n({kind})", fontsize=8)
        shown = [p for p in points if (p.tokens, p.causal) == (tokens, causal)]
        least, most = (choose(p.bytes_moved / MIB for p in shown) for choose in (min, max))
        axis.set_ylim(least / 1.5, max(1.5 * most, 6 * least))
        budgets = sorted({p.budget_bytes // MIB for p in shown})
        axis.set_xticks(budgets, [f"{b:,}" for b in budgets], rotation=60)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.tick_params(labelsize=7)
        axis.set_xlabel("budget, MiB", fontsize=7)
    axes[0][0].set_ylabel("moved to and from disk, MiB", fontsize=7)
    axes[1][0].set_ylabel("moved to and from disk, MiB", fontsize=7)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counted = ran(Path(folder))
    print("Counted: 1 head x 64, float32, on the CPU; the budget is of host memory")
    table(counted)
    expected = planned((1 << 20, 1 << 24), (256, 1_024, 4_096, 16_384))
    print("\nPlanned, not run: 8 heads x 64, float16, on a GPU; the budget is of device memory, host memory twice that")
    table(expected)
    if options.plot:
        plot([*counted, *expected], options.plot)
    if options.json:
        options.json.write_text(json.dumps([vars(p) for p in [*counted, *expected]], indent=1))


if __name__ == "__main__":
    main()
