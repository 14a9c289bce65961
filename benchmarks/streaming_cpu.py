"""Streaming from disk against in-core attention, on the CPU: time, interleaved in one process.

    python benchmarks/streaming_cpu.py [--tokens 65536] [--heads 4] [--head-dim 64] [--repeats 5] [--full]

Each repeat times torch's ``scaled_dot_product_attention`` on tensors in memory, in the dtype and in float32, and this
package from files on disk under a quarter of Q+K+V as its budget (48 MiB at the least), output and lse made durable.
The bar is 1.08 times the slower of the two in-core calls.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tensorstore as ts
import torch
from torch.nn.functional import scaled_dot_product_attention

import cqsa_stream as cqsa
from cqsa_stream.generate import generate

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def load(path: Path) -> torch.Tensor:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    values = ts.open(spec).result().read().result()
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view("uint16")).view(torch.bfloat16)
    return torch.from_numpy(values)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    causal = not options.full
    print(f"{options.tokens} tokens x {options.heads} heads x {options.head_dim}, {'causal' if causal else 'full'}, "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {options.repeats}")  # fmt: skip
    print(f"{'dtype':>9} {'budget MiB':>10} {'in-core s':>9} {'fp32 s':>7} {'stream s':>8} {'ratio':>6} {'worst':>6}")
    for dtype in options.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            sizes = {"tokens": options.tokens, "heads": options.heads, "head_dim": options.head_dim}
            paths = generate(Path(folder), dtype=dtype, **sizes)
            total = 3 * options.tokens * options.heads * options.head_dim * BYTES[dtype]
            budget = max(total // 4, 48 * 2**20)
            tensors = [load(path) for path in paths]
            wide = [tensor.float() for tensor in tensors]
            out = Path(folder) / "out"

            def stream(paths: list[Path] = paths, out: Path = out, budget: int = budget) -> None:
                cqsa.attention(*paths, is_causal=causal, out=out, device="cpu", host_memory=budget)

            times: dict[str, list[float]] = {"in-core": [], "float32": [], "stream": []}
            for _ in range(options.repeats):
                times["in-core"].append(seconds(lambda t=tensors: scaled_dot_product_attention(*t, is_causal=causal)))
                times["float32"].append(seconds(lambda t=wide: scaled_dot_product_attention(*t, is_causal=causal)))
                times["stream"].append(seconds(stream))
                shutil.rmtree(out)
                shutil.rmtree(f"{out}.run")
            median = {name: statistics.median(values) for name, values in times.items()}
            slower = max(median["in-core"], median["float32"])
            worst = max(
                s / max(a, b) for s, a, b in zip(times["stream"], times["in-core"], times["float32"], strict=True)
            )
            print(f"{dtype:>9} {budget / 2**20:10.1f} {median['in-core']:9.2f} {median['float32']:7.2f} "
                  f"{median['stream']:8.2f} {median['stream'] / slower:6.3f} {worst:6.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
