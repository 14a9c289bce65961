"""What a sliding window costs beside the causal mask, in pairs within one run.

    python benchmarks/windows.py [--tokens 65536] [--heads 8] [--dim 64] [--windows 1024] [--device cpu] [--repeats 3]

Inputs are float32 on the CPU and bfloat16 on CUDA. A run goes from disk to disk, and its seconds are those of the
session. ``share`` is the window's median over the causal mask's; ``scores`` is the share of
visible scores: a kernel as fast on both would reach it.
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

import cqsa_stream as cqsa
from cqsa_stream.generate import generate


def seconds(folder: Path, paths: list[Path], device: str, window: int | None) -> float:
    """Return the seconds of a session."""
    query, key, value = paths
    out = folder / "out"
    cqsa.attention(query, key, value, is_causal=True, window=window, out=out, device=device)
    found = float(cqsa.open_run(folder / "out.run").status()["session_s"])
    for path in (out, folder / "out.run"):
        shutil.rmtree(path)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--windows", type=int, nargs="+", default=[1_024])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    tokens = options.tokens
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dtype = "float32" if options.device == "cpu" else "bfloat16"
        paths = generate(folder / "in", tokens=tokens, heads=options.heads, head_dim=options.dim, dtype=dtype)
        found: dict[int | None, list[float]] = {window: [] for window in (None, *options.windows)}
        for _ in range(options.repeats):
            for window, times in found.items():
                times.append(seconds(folder, paths, options.device, window))
        causal = statistics.median(found[None])
        print(f"{tokens:,} tokens x {options.heads} heads x {options.dim}, {dtype}, {options.device}")
        print(f"{'window':>9} {'seconds':>9} {'share':>8} {'scores':>8}")
        print(f"{'causal':>9} {causal:>9.2f} {1:>8.4f} {1:>8.4f}")
        for window in options.windows:
            median = statistics.median(found[window])
            width = min(window, tokens)
            visible = tokens * width - width * (width - 1) // 2
            scores = visible / (tokens * (tokens + 1) // 2)
            print(f"{window:>9,} {median:>9.2f} {median / causal:>8.4f} {scores:>8.4f}")


if __name__ == "__main__":
    main()
