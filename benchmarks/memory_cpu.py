"""Memory on the CPU, measured from outside: growth of the process over what it held after its imports.

    python benchmarks/memory_cpu.py [--tokens 131072] [--budget 128MiB]

The parent process samples the child's resident memory every 2 ms; the child says when its imports are done. The whole
run of 4 heads x 64 float32, then a slice of 4,096 queries over as many and over four times the keys.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from cqsa_stream.generate import generate
from cqsa_stream.machine.budgets import parse_size

MIB = 2**20
CHILD = """
import json, sys
import cqsa_stream
attention = cqsa_stream.attention
print("ready", flush=True)
sys.stdin.readline()
directory, out, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
attention(*(f"{directory}/{name}.zarr" for name in "qkv"), out=out, **options)
"""


def growth(directory: str, out: str, **options: object) -> int:
    """Return the highest resident memory of the child above that after its imports."""
    command = [sys.executable, "-c", CHILD, directory, out, json.dumps(options)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    process = psutil.Process(child.pid)
    before = highest = process.memory_info().rss
    child.stdin.write("go\n")
    child.stdin.flush()
    while child.poll() is None:
        try:
            highest = max(highest, process.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.002)
    assert child.wait() == 0
    return highest - before


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--budget", default="128MiB")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    budget = parse_size(options.budget, "--budget")
    assert budget is not None
    print(f"{'run':<34} {'budget':>8} {'planned':>8} {'measured':>9}  MiB")
    slices = [
        ("whole", 1, {}),
        ("4,096 queries", 1, {"queries": [options.tokens - 4096, options.tokens]}),
        ("4,096 queries, 4 times the keys", 4, {"queries": [4 * options.tokens - 4096, 4 * options.tokens]}),
    ]
    import cqsa_stream as cqsa

    with tempfile.TemporaryDirectory() as folder:
        for factor in (1, 4):
            where = Path(folder) / str(factor)
            generate(where, tokens=factor * options.tokens, heads=4, head_dim=64, dtype=options.dtype)
        for index, (name, factor, more) in enumerate(slices):
            directory, out = f"{folder}/{factor}", f"{folder}/out{index}"
            settings = {"host_memory": budget, "device": "cpu", **more}
            plan = cqsa.plan(*(f"{directory}/{n}.zarr" for n in "qkv"), out=out, **settings)
            found = growth(directory, out, **settings)
            print(
                f"{name:<34} {budget / MIB:8.1f} {plan.footprint.host_bytes / MIB:8.1f} {found / MIB:9.1f}", flush=True
            )


if __name__ == "__main__":
    main()
