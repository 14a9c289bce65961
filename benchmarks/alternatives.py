"""What the planner does not offer, priced: recursion, numbers of chunks that are no Singer numbers, lanes together.

    python benchmarks/alternatives.py

``load`` counts how often each token is brought to the device (queries, keys and values alike): bytes are proportional
to it. ``share`` is the part of the sequence that a task holds: memory is proportional to that. Nothing is run.
"""

from dataclasses import replace
from itertools import pairwise, takewhile

from cqsa_stream.machine.habits import CUDA
from cqsa_stream.schedulers.masks.calls import Tile
from cqsa_stream.schedulers.masks.window import CAUSAL
from cqsa_stream.schedulers.model.memory import Workload
from cqsa_stream.schedulers.model.rates import Rates, Speeds, TileTimes
from cqsa_stream.schedulers.model.traffic import Stored
from cqsa_stream.schedulers.quorums import quorum_size, singer_numbers
from cqsa_stream.schedulers.search import Machine, Request, make_plan

MIB = 2**20
GPU = Speeds(
    read_bytes_per_s=5e9, write_bytes_per_s=2e9, stage_bytes_per_s=2e10, touch_bytes_per_s=4e9, file_s=2e-3,
    file_lost_s=1e-9, block_s=1e-4, read_cpu_s=2e-10, check_cpu_s=1e-9, expand_cpu_s=4e-9,
)  # fmt: skip
SINGER = [(c, quorum_size(c)) for c in takewhile(lambda c: c <= 400, singer_numbers())]

# The least sizes of difference covers modulo c, c up to 111: W. S. Luk and T. T. Wong, "Two new quorum based algorithms
# for distributed mutual exclusion", ICDCS 1997, found by exhaustive search. Given as k: the c that need so many.
COVERS = {
    3: [range(4, 8)],
    4: [range(8, 14)],
    5: [range(14, 20), range(21, 22)],
    6: [range(20, 21), range(22, 29), range(31, 32)],
    7: [range(29, 31), range(32, 38), range(39, 40)],
    8: [range(38, 39), range(40, 52), range(57, 58)],
    9: [range(52, 57), range(58, 66), range(73, 74)],
    10: [range(66, 73), range(74, 80), range(91, 92)],
    11: [range(80, 91), range(92, 94), range(95, 96)],
    12: [range(94, 95), range(96, 112)],
}


def recursion() -> None:
    print("Recursion (a quorum's chunks cut again by quorums) beside one cut of no larger share")
    print(f"{'':<10} {'tasks':>6} {'share':>7} {'load':>6}   one cut {'c':>4} {'share':>7} {'load':>6}")
    for outer, inner in ((7, 7), (7, 13), (13, 13), (13, 21), (21, 21)):
        share = quorum_size(outer) / outer * quorum_size(inner) / inner
        c, k = next((c, k) for c, k in SINGER if k / c <= share)
        tasks = outer * inner
        print(
            f"{outer:>3} by {inner:<3} {tasks:>6} {share:>7.3f} {tasks * share:>6.1f}   "
            f"{'':<7} {c:>4} {k / c:>7.3f} {k:>6}"
        )


def other_numbers() -> None:
    print("\nOther numbers of chunks: for every share of memory, the smallest load with and without them")
    covers = [(c, k) for k, spans in COVERS.items() for span in spans for c in span]
    shares = sorted({k / c for c, k in [*covers, *SINGER] if c <= 111}, reverse=True)
    gains = []
    for share, below in pairwise(shares):
        with_all = min((k, c) for c, k in [*covers, *SINGER] if k / c <= share)
        singer = min((k, c) for c, k in SINGER if k / c <= share)
        gains.append((singer[0] / with_all[0], share, share - below, with_all, singer))
    better = [g for g in gains if g[0] > 1]
    width = sum(g[2] for g in better) / (shares[0] - shares[-1])
    print(
        f"shares {shares[0]:.3f} to {shares[-1]:.3f}: Singer numbers have the least load over {1 - width:.0%} of them"
    )
    for ratio, share, _, (k, c), (singer_k, singer_c) in sorted(better, reverse=True)[:4]:
        print(f"share {share:.3f}: c = {c}, load {k}, pairs met {k * k / c:.2f} times; Singer c = {singer_c}, load "
              f"{singer_k}: {ratio:.2f} times the bytes")  # fmt: skip


def lanes_together() -> None:
    print("\nLanes together: 1,048,576 tokens, 8 heads x 64, float16, causal, rectangular, on a GPU")
    print(f"{'budget MiB':>10} {'apart: read GiB':>16} {'s':>7} {'together: read GiB':>19} {'s':>7}")
    tokens = 1 << 20
    mask = CAUSAL.over(range(tokens), tokens)
    rates = Rates(TileTimes.nominal(4e14, 128, 1e-4), GPU)
    for budget in (256, 512, 1_024, 4_096):
        machine = Machine(
            kernel="torch-cuda", operator="cudnn", habits=CUDA,
            device_allowed_bytes=budget * MIB, host_allowed_bytes=256 * MIB,
            host_reserved_bytes=0, rates=rates, measured=rates,
            tile=Tile(65_536, 65_536, 65_536, 65_536), step_flops=1e15,
        )  # fmt: skip
        apart = Workload(
            lanes=8, group=1, head_dim=64, value_dim=64, stored_itemsize=2, compute_itemsize=2, out_itemsize=2,
            row_bytes=264, left_bytes=132,
            flops=8 * 256 * mask.scores(range(tokens), range(tokens)), staging_bytes=0, durable=True,
            resident_output_bytes=0,
        )  # fmt: skip
        stored = Stored(tokens, 1, 1, 128)
        together = replace(apart, lanes=1, head_dim=8 * 64, value_dim=8 * 64, row_bytes=8 * 264, left_bytes=8 * 132)
        wide = replace(stored, row_bytes=8 * 128)
        fast = replace(rates, tiles=rates.tiles.scaled(8.0))  # the same work in an eighth of the calls
        found = []
        for work, array, speed in ((apart, stored, rates), (together, wide, fast)):
            request = Request(work, tokens, tokens, True, mask, (array, array, array), 1e12, "rectangular")
            found.append(make_plan(request, replace(machine, rates=speed, measured=speed)))
        cells = [f"{plan.cost.bytes_read / 2**30:.1f}" if plan.fits else "no plan" for plan in found]
        times = [f"{plan.cost.seconds:.1f}" if plan.fits else "" for plan in found]
        print(f"{budget:>10} {cells[0]:>16} {times[0]:>7} {cells[1]:>19} {times[1]:>7}")


if __name__ == "__main__":
    recursion()
    other_numbers()
    lanes_together()
