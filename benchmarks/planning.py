"""What planning takes: seconds and memory, up to 10^9 tokens of sparse arrays; and the construction of Singer sets.

    python benchmarks/planning.py

``cqsa plan``'s own work (opening the arrays, planning), in a new process for each length, after the imports; the median
of five times, and the growth of resident memory. The arrays have metadata only: no chunk is stored. 10^6 tokens are
planned under several budgets, and the slowest is shown.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import takewhile
from pathlib import Path

from cqsa_stream.schedulers.quorums import singer_numbers, singer_set
from cqsa_stream.storage.output import create_array

MIB = 2**20
CHILD = """
import json, sys, time
import psutil
import cqsa_stream as cqsa
from cqsa_stream import api, bench
folder, budgets = sys.argv[1], json.loads(sys.argv[2])
paths = [f"{folder}/{name}.zarr" for name in "qkv"]
process, found = psutil.Process(), []
before = process.memory_info().rss
for budget in budgets:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        plan = cqsa.plan(*paths, out=f"{folder}/out", is_causal=True, device="cpu", host_memory=budget)
        seconds.append(time.perf_counter() - start)
    found.append((seconds[0], sorted(seconds)[2], budget, plan.schedule, plan.grid.rows.chunks, plan.fits))
print(json.dumps([found, process.memory_info().rss - before]))
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'tokens':>13} {'heads':>5} {'first s':>8} {'median s':>8} {'budget':>8}  plan")
        for tokens, heads, budgets in (
            (10**6, 8, ["40MiB", "64MiB", "512MiB", "4GiB", "16GiB"]),
            (10**7, 8, ["64MiB", "4GiB"]),
            (10**9, 1, ["1GiB", "64GiB"]),
            (10**9, 32, ["64GiB"]),
        ):
            where = Path(folder) / f"{tokens}-{heads}"
            where.mkdir()
            for name in "qkv":
                create_array(where / f"{name}.zarr", (1, heads, tokens, 64), "bfloat16", (1, 1, 32_768, 64), "none")
            done = subprocess.run(
                [sys.executable, "-c", CHILD, str(where), json.dumps(budgets)],
                capture_output=True, text=True, check=True, env={**os.environ, "XDG_CACHE_HOME": folder},
            )  # fmt: skip
            found, grown = json.loads(done.stdout)
            _, median, budget, schedule, chunks, fits = max(found, key=lambda row: row[1])
            print(f"{tokens:>13,} {heads:>5} {found[0][0]:>8.3f} {median:>8.3f} {budget:>8}  {schedule}, c = {chunks}, "
                  f"{'fits' if fits else 'over budget'}; {grown / MIB:.1f} MiB")  # fmt: skip
    seconds = []
    for c in takewhile(lambda c: c <= 10_303, singer_numbers()):
        start = time.perf_counter()
        singer_set(c)
        seconds.append((time.perf_counter() - start, c))
    slowest, c = max(seconds)
    print(f"Singer sets: {len(seconds)} up to c = 10,303; slowest {slowest * 1e3:.0f} ms (c = {c}), "
          f"median {statistics.median(s for s, _ in seconds) * 1e3:.1f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
