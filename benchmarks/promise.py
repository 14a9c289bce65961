"""Is the plan right? Over a grid of runs: memory, bytes and seconds, as predicted and as measured.

    python benchmarks/promise.py [--repeats 3] [--json promise.json]

First this machine is measured, as ``cqsa bench`` does (into a folder of its own). Then every case runs under both
schedules, each in a new process: its first run gives the growth of resident memory over that after the imports, the
median of all its runs the seconds. ``speed`` is what a kernel call took around these runs beside what it took when the
machine was measured: machines that are shared change their speed. ``auto`` tells the schedule that the planner takes,
and its seconds beside those of the faster one.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

import cqsa_stream as cqsa
from cqsa_stream.bench import measure
from cqsa_stream.generate import generate
from cqsa_stream.machine.calibration import path_for
from cqsa_stream.machine.device import Host

MIB = 2**20
CHILD = """
import json, pathlib, shutil, sys
import psutil, torch
import cqsa_stream as cqsa
from cqsa_stream.bench import speed
from cqsa_stream.machine.calibration import load
from cqsa_stream.machine.device import Host
cqsa.attention
cpu = Host()
def high_water():
    return int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
directory, out, repeats, options = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
inputs = [f"{directory}/{name}.zarr" for name in "qkv"]
before = psutil.Process().memory_info().rss
found = {"seconds": [], "speed": []}
for number in range(repeats):
    planned = cqsa.plan(*inputs, out=out, **options)
    cqsa.attention(*inputs, out=out, **options)
    if not number:
        found["grown"] = high_water() - before
    found["speed"].append(speed(cpu, load(cpu)))
    status = cqsa.open_run(out + ".run").status()
    assert status["complete"]
    found["seconds"].append(status["session_s"])
    found["bytes_read"], found["bytes_written"] = status["bytes_read"], status["bytes_written"]
    for path in (out, out + ".run"):
        shutil.rmtree(path)
found["plan"] = planned.to_dict()
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Case:
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    codec: str
    causal: bool
    budget: str

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}" if self.heads != self.kv_heads else str(self.heads)
        mask = "causal" if self.causal else "full"
        codec = "" if self.codec == "none" else f" {self.codec}"
        return f"{self.tokens:>6} {heads:>4}x{self.head_dim:<3} {self.dtype + codec:<16} {mask:<6} {self.budget:<6}"


def cases() -> list[Case]:
    """Every length under every mask and budget, with heads, dtypes and codecs taking turns."""
    shapes = {
        4_096: [(8, 8, 64), (4, 4, 128), (8, 2, 64)],
        8_192: [(8, 8, 64), (2, 2, 128), (4, 4, 64)],
        16_384: [(4, 4, 64), (8, 4, 64), (1, 1, 128)],
        32_768: [(2, 2, 64), (1, 1, 64), (1, 1, 128)],
        65_536: [(1, 1, 64), (1, 1, 64), (2, 1, 64)],
    }
    kinds = [
        ("float32", "none"),
        ("bfloat16", "none"),
        ("float32", "crc32c"),
        ("float16", "none"),
        ("bfloat16", "zstd"),
    ]
    found = []
    for index, (tokens, causal, budget) in enumerate(product(shapes, (True, False), ("least", "tight", "ample"))):
        heads, kv_heads, head_dim = shapes[tokens][index % 3]
        dtype, codec = kinds[index % 5]
        found.append(Case(tokens, heads, kv_heads, head_dim, dtype, codec, causal, budget))
    extra = [
        Case(4_096, 1, 1, 64, "float32", "none", True, "ample"),
        Case(8_192, 1, 1, 64, "bfloat16", "none", False, "least"),
    ]
    return [*found, *extra]


def options_of(case: Case, directory: Path) -> dict[str, Any]:
    """The run's options; the smallest budget is what the planner says it is, for both schedules."""
    inputs = [directory / f"{name}.zarr" for name in "qkv"]
    fixed: dict[str, Any] = {"is_causal": case.causal, "enable_gqa": case.heads != case.kv_heads, "device": "cpu"}
    needs = [
        cqsa.plan(*inputs, out=directory / "out", schedule=name, host_memory="1GiB", **fixed).least.host_bytes
        for name in ("cqs", "rectangular")
    ]
    budget = {"least": max(needs), "tight": max(needs) * 3 // 2, "ample": 1 << 30}[case.budget]
    return {**fixed, "host_memory": budget}


def measured(case: Case, directory: Path, options: dict[str, Any], repeats: int) -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD, str(directory), str(directory / "out"), str(repeats), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{case}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", type=int, default=None, help="the first so many cases")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        cpu = Host()
        assert path_for(cpu).is_relative_to(folder)
        measure(cpu, folder).save(cpu)
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; MiB and seconds: "
              "predicted/measured")  # fmt: skip
        print(f"{'tokens heads  dtype            mask   budget':<47} {'schedule':<11} {'c':>4} {'cache':>5} "
              f"{'host MiB':>13} {'read MiB':>15} {'written MiB':>13} {'seconds':>13} "
              f"{'ratio':>6} {'speed':>6} auto")  # fmt: skip
        for case in cases()[: options.only]:
            directory = folder / "data"
            generate(
                directory, tokens=case.tokens, heads=case.heads, kv_heads=case.kv_heads, head_dim=case.head_dim,
                dtype=case.dtype, codec=case.codec, chunk_tokens=None if case.codec == "none" else 2_048,
            )  # fmt: skip
            fixed = options_of(case, directory)
            chosen = cqsa.plan(*(directory / f"{n}.zarr" for n in "qkv"), out=directory / "out", **fixed).schedule
            pair = {}
            for name in ("cqs", "rectangular"):
                pair[name] = measured(case, directory, {**fixed, "schedule": name}, options.repeats)
            medians = {name: statistics.median(found["seconds"]) for name, found in pair.items()}
            auto = medians[chosen] / min(medians.values())
            for name, found in pair.items():
                results.append({**asdict(case), "schedule": name, "auto": chosen, "auto_ratio": auto, **found})
                show(case, name, found, f"{auto:.2f}" if name == chosen else "")
            shutil.rmtree(directory)
    summarise(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def show(case: Case, name: str, found: dict[str, Any], auto: str) -> None:
    plan, seconds = found["plan"], statistics.median(found["seconds"])
    print(f"{case!s:<47} {name:<11} {plan['chunks']:>4} {plan['layout']['cache_slots']:>5} "
          f"{plan['host_projected_bytes'] / MIB:6.1f}/{found['grown'] / MIB:6.1f} "
          f"{plan['bytes_read'] / MIB:7.1f}/{found['bytes_read'] / MIB:7.1f} "
          f"{plan['bytes_written'] / MIB:6.1f}/{found['bytes_written'] / MIB:6.1f} "
          f"{plan['seconds']:6.2f}/{seconds:6.2f} {seconds / plan['seconds']:6.2f} "
          f"{statistics.median(found['speed']):6.2f} {auto}", flush=True)  # fmt: skip


def summarise(results: list[dict[str, Any]]) -> None:
    runs = len(results)
    host = [(r["plan"]["host_projected_bytes"], r["grown"]) for r in results]
    over = sum(1 for said, found in host if found > said)
    loose = sum(1 for said, found in host if said > max(1.15 * found, found + 32 * MIB))
    apart = [
        max(abs(r["plan"][name] / r[name] - 1) for name in ("bytes_read", "bytes_written"))
        for r in results
    ]  # fmt: skip
    ratios = [statistics.median(r["seconds"]) / r["plan"]["seconds"] for r in results]
    steady = [x / statistics.median(r["speed"]) for x, r in zip(ratios, results, strict=True)]
    autos = [r["auto_ratio"] for r in results if r["schedule"] == r["auto"]]
    print(f"\nruns {runs}; with a cache {sum(1 for r in results if r['plan']['layout']['cache_slots'])}")
    print(f"memory: {over} above the projection, {loose} of them more than 15 % and 32 MiB below it; nearest "
          f"{min(said - found for said, found in host) / MIB:.1f} MiB, farthest "
          f"{max(said - found for said, found in host) / MIB:.1f} MiB")  # fmt: skip
    print(f"bytes: {sum(1 for a in apart if a <= 0.01)} of {runs} within 1 %, worst {max(apart):.2%}")
    for label, found in (("seconds", ratios), ("seconds, the machine's speed taken out", steady)):
        within = sum(1 for x in found if 0.75 <= x <= 1.25)
        print(f"{label}: {within} of {runs} within 25 %, median ratio {statistics.median(found):.2f}")
    near = sum(1 for x in autos if x <= 1.1)
    print(f"auto: {near} of {len(autos)} within 10 % of the faster schedule, worst {max(autos):.2f}")


if __name__ == "__main__":
    main()
