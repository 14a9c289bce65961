"""What masks and scores cost from disk to disk, beside causal attention, and beside the kernel in core on a GPU.

    python benchmarks/masks.py [--tokens 65536] [--heads 8] [--dim 64] [--device cpu] [--repeats 3] [--cases ...]

Cases: causal, window:W, documents:L (equal ones, causal), strip:S:W, soft_cap, alibi. Inputs are float32 on the CPU and
bfloat16 on CUDA, in the page cache where there is room.

``session`` are a session's median seconds; ``kernel`` those in which a call or its merge is under way (on CUDA by
events; on the CPU by the clock); ``GFLOP/s`` counts visible scores and kernel seconds. ``to causal``: seconds for each
visible score over those of the causal mask, of kernels and, in brackets, of the session. On CUDA ``in core`` is the
rate of the same kernels on tensors that are on the device, one call for the whole sequence, over which ``share`` is
ours; ``bound``: the session's seconds over the larger of kernel seconds and bytes read and written by ``bus`` GB/s.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import cqsa_stream as cqsa
from cqsa_stream.generate import generate
from cqsa_stream.kernels.contract import Scores
from cqsa_stream.kernels.online import OnlineKernel
from cqsa_stream.kernels.torch_cpu import TorchCpuKernel
from cqsa_stream.kernels.torch_cuda import OPERATORS, TorchCudaKernel
from cqsa_stream.run import session

Case = tuple[str, dict[str, Any]]


def case(name: str, tokens: int, heads: int) -> Case:
    kind, *numbers = name.split(":")
    n = [int(number) for number in numbers]
    options: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "window": {"window": n[0] if n else 1},
        "documents": {"mask": cqsa.masks.Documents([*range(0, tokens, n[0] if n else 1), tokens]), "is_causal": True},
        "strip": {"mask": cqsa.masks.Strip(n[0] if n else 0, n[-1] if n else 1)},
        "soft_cap": {"is_causal": True, "soft_cap": 50.0},
        "alibi": {"is_causal": True, "alibi_slopes": [2.0 ** -(8 * (h + 1) / heads) for h in range(heads)]},
    }
    return name, options[kind]


class Clock:
    """Seconds in which at least one kernel call or merge of this process is under way."""

    def __init__(self, device: str) -> None:
        self._cuda = device != "cpu"
        self._spans: list[tuple[Any, Any]] = []
        for owner, name in (
            (TorchCudaKernel, "attend"), (TorchCudaKernel, "attend_packed"), (TorchCpuKernel, "attend"),
            (TorchCpuKernel, "attend_packed"), (OnlineKernel, "attend"), (OnlineKernel, "attend_packed"),
        ):  # fmt: skip
            setattr(owner, name, self._timed(getattr(owner, name)))
        fold_for = session.fold_for
        session.fold_for = lambda place: self._timed(fold_for(place))  # type: ignore[assignment]

    def _timed(self, action: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = self._now()
            found = action(*args)
            self._spans.append((start, self._now()))
            return found

        return timed

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Return the length of the union of all spans since the last time."""
        if not self._spans:
            return 0.0
        if self._cuda:
            torch.cuda.synchronize()
        base = self._spans[0][0]
        elapsed = (lambda t: base.elapsed_time(t) / 1e3) if self._cuda else (lambda t: t - base)
        total, reached = 0.0, -1.0
        for start, stop in sorted((elapsed(a), elapsed(b)) for a, b in self._spans):
            total += max(0.0, stop - max(start, reached))
            reached = max(reached, stop)
        self._spans.clear()
        return total


def in_core(name: str, tokens: int, heads: int, dim: int) -> Callable[[], object] | None:
    """Return the same attention by the same kernels on tensors that are on the device."""
    kind, *numbers = name.split(":")
    n = [int(number) for number in numbers]
    q, k, v = (torch.randn(heads, tokens, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    kernel, scores = TorchCudaKernel(), Scores(dim**-0.5)
    if kind == "causal":
        return lambda: OPERATORS["cudnn"](q, k, v, True, scores.scale)
    if kind == "window":
        return lambda: kernel.attend(q, k, v, n[0] - 1, 0, scores)
    if kind == "documents":
        parts = [x.view(heads * (tokens // n[0]), n[0], dim) for x in (q, k, v)]
        return lambda: OPERATORS["cudnn"](*parts, True, scores.scale)
    if kind == "strip":
        strip = k[:, : n[0]].contiguous(), v[:, : n[0]].contiguous()

        def both() -> None:
            kernel.attend(q, k, v, n[1] - 1, 0, scores)
            kernel.attend(q, *strip, None, None, scores)

        return both
    return None


def median_s(action: Callable[[], object]) -> float:
    found = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[2:])


def bus_bytes_per_s() -> float:
    host = torch.empty(1 << 30, dtype=torch.uint8).pin_memory()
    there = torch.empty_like(host, device="cuda")
    return host.numel() / median_s(lambda: there.copy_(host, non_blocking=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=["window:1024", "window:4096", "documents:4096", "strip:4:1024"])
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    tokens, heads, dim, device = options.tokens, options.heads, options.dim, options.device
    cases = [case(name, tokens, heads) for name in dict.fromkeys(["causal", *options.cases])]
    clock = Clock(device)
    bus = bus_bytes_per_s() if device != "cpu" else 0.0
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        dtype = "float32" if device == "cpu" else "bfloat16"
        query, key, value = generate(folder / "in", tokens=tokens, heads=heads, head_dim=dim, dtype=dtype)
        sessions: dict[str, list[float]] = {name: [] for name, _ in cases}
        kernels: dict[str, list[float]] = {name: [] for name, _ in cases}
        figures: dict[str, dict[str, Any]] = {}
        for turn in range(options.repeats + (device != "cpu")):
            for name, words in cases:
                out = folder / "out"
                clock.seconds()
                cqsa.attention(query, key, value, out=out, device=device, **words)
                status = cqsa.open_run(folder / "out.run").status()
                kernel_s = clock.seconds()
                if turn or device == "cpu":  # the first on a GPU compiles and warms up
                    sessions[name].append(status["session_s"])
                    kernels[name].append(kernel_s)
                figures[name] = status
                for path in (out, folder / "out.run"):
                    shutil.rmtree(path)
        print(f"{tokens:,} tokens x {heads} heads x {dim}, {dtype}, {device}; bus {bus / 1e9:.1f} GB/s")
        titles = ("session", "kernel", "GFLOP/s", "to causal", "(session)", "in core", "share", "bound")
        print(f"{'case':>16}", *(f"{title:>9}" for title in titles))
        base = None
        for name, _ in cases:
            whole, kernel = statistics.median(sessions[name]), statistics.median(kernels[name])
            flops = figures[name]["flops_done"]
            base = base or (kernel / flops, whole / flops)
            shown = [f"{whole:.3f}", f"{kernel:.4f}", f"{flops / kernel / 1e9:,.0f}"]
            shown += [f"{kernel / flops / base[0]:.2f}", f"{whole / flops / base[1]:.2f}"]
            action = in_core(name, tokens, heads, dim) if device != "cpu" else None
            if action is not None:
                rate = flops / median_s(action)
                moved = max(figures[name]["bytes_read"], figures[name]["bytes_written"])
                shown += [f"{rate / 1e9:,.0f}", f"{flops / kernel / rate:.2f}"]
                shown += [f"{whole / max(kernel, moved / bus):.2f}"]
            print(f"{name:>16}", *(f"{text:>9}" for text in shown))


if __name__ == "__main__":
    main()
