"""Two workers of one run against two processes in core, side by side, with one thread each; and what a worker costs.

    python benchmarks/workers.py [--tokens 32768] [--repeats 3]

Both compute causal attention of the same heads in float32: ours from disk to disk by one command with two workers, in
core each process half of the heads by one call of torch's. Seconds are those of the slower of two. Ours are from a
worker's first event to its last; what it takes to start a process, and to import torch, stands beside it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cqsa_stream.generate import generate

HEADS, HEAD_DIM = 4, 64
IN_CORE = """
import sys, time, pathlib
import numpy, tensorstore, torch
folder, number, tokens = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
q, k, v = (torch.from_numpy(numpy.random.default_rng(number).standard_normal((1, 2, tokens, 64), numpy.float32)) for _ in "qkv")
(folder / f"ready{number}").touch()
while not all((folder / f"ready{n}").exists() for n in (0, 1)):
    time.sleep(0.001)
start = time.monotonic()
torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
print(time.monotonic() - start)
"""  # noqa: E501


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}  # of the leader: one for each worker


def in_core(tokens: int) -> float:
    """Return the seconds of the slower of two processes that compute two heads each."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-c", IN_CORE, folder]
        started = [
            subprocess.Popen([*words, str(n), str(tokens)], stdout=subprocess.PIPE, text=True, env=environment())
            for n in (0, 1)
        ]
        return max(float(process.communicate()[0]) for process in started)


def by_workers(folder: Path) -> tuple[float, float, float]:
    """Return the seconds of the slower worker, those from its start to its first event, and those after its last."""
    out = folder / "out"
    words = [str(folder / f"d/{name}.zarr") for name in "qkv"]
    command = [sys.executable, "-c", "from cqsa_stream.cli import main; main()", "run", *words, str(out), "--causal"]
    options = ["--device", "cpu", "--workers", "2", "--host-memory", "1GiB", "--quiet", "--fresh"]
    subprocess.run([*command, *options, "--max-seconds", "0"], env=environment(), capture_output=True, check=False)
    start = time.time()
    subprocess.run([*command, *options[:-1]], env=environment(), check=True)
    stop = time.time()
    seconds, before, after = [], [], []
    for number in (0, 1):
        with (folder / f"out.run/events-{number}.jsonl").open() as lines:
            events = [json.loads(line) for line in lines if line.strip()]
        first, last = (next(e["time"] for e in events if e["event"] == kind) for kind in ("started", "ended"))
        seconds.append(last - first)
        before.append(first - start)
        after.append(stop - last)
    return max(seconds), max(before), max(after)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder / "d", tokens=asked.tokens, heads=HEADS, head_dim=HEAD_DIM, dtype="float32")
        pairs = [(in_core(asked.tokens), *by_workers(folder)) for _ in range(asked.repeats)]
    for core, ours, before, after in pairs:
        rate = f"in core {core:.2f} s, workers {ours:.2f} s: {core / ours:.3f} of its rate"
        print(f"{rate}; {before:.2f} s from the command to a worker's first event, {after:.2f} s after its last")
    print(f"median {statistics.median(core / ours for core, ours, *_ in pairs):.3f}")
    overhead = statistics.median(before + after for *_, before, after in pairs)
    print(f"a worker costs {overhead:.2f} s besides: {100 * overhead / 600:.2f} % of ten minutes")


if __name__ == "__main__":
    main()
