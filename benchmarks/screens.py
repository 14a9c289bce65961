"""How long users wait for a first word, and what being told costs a run.

python benchmarks/screens.py [--repeats 5]

Starts are processes of their own, the median of several. The cost of observers and of the timeline is measured in pairs
within one process: the same run in memory with a bar, a log and JSON lines, and without; and as the time that their
calls take, over that of the session.
"""

import argparse
import contextlib
import io
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

import cqsa_stream as cqsa
from cqsa_stream.engine.timeline import Timeline
from cqsa_stream.events import Ended, Event
from cqsa_stream.observers.bar import ProgressBar
from cqsa_stream.observers.jsonl import JsonLines
from cqsa_stream.observers.lines import PlainLines


def process_s(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def first_word_s(folder: str) -> float:
    """Return the seconds from the start of ``cqsa run`` to its first line on a terminal."""
    ours, its = pty.openpty()
    start = time.perf_counter()
    words = [sys.executable, "-m", "cqsa_stream", "run", "q.npy", "k.npy", "v.npy", "o"]
    process = subprocess.Popen(words, stderr=its, cwd=folder)
    os.close(its)
    os.read(ours, 1)
    found = time.perf_counter() - start
    with contextlib.suppress(OSError):
        while os.read(ours, 4096):
            pass
    os.close(ours)
    process.wait()
    return found


def session_s(arrays: list[np.ndarray], observers: list[object]) -> float:
    seen: list[Event] = []
    q, k, v = arrays
    cqsa.attention(q, k, v, is_causal=True, device="cpu", observers=[*observers, seen.append])  # type: ignore[list-item]
    last = seen[-1]
    assert isinstance(last, Ended)
    return last.figures.session_s


def main(repeats: int) -> None:
    bare = statistics.median(process_s("pass") for _ in range(repeats))
    package = statistics.median(process_s("import cqsa_stream") for _ in range(repeats))
    helping = "import sys; sys.argv = ['cqsa', '--help']; from cqsa_stream.cli import main; main()"
    help_s = statistics.median(process_s(helping) for _ in range(repeats))
    with tempfile.TemporaryDirectory() as folder:
        word = statistics.median(first_word_s(folder) for _ in range(repeats))
    print(f"python alone                    {1e3 * bare:6.0f} ms")
    print(f"import cqsa_stream, besides     {1e3 * (package - bare):6.0f} ms")
    print(f"cqsa --help                     {1e3 * help_s:6.0f} ms")
    print(f"first word of cqsa run          {1e3 * word:6.0f} ms")

    arrays = [np.random.default_rng(0).standard_normal((1, 4, 40_000, 64), np.float32) for _ in range(3)]
    spent = 0.0
    real = Timeline._add

    def timed(self: Timeline, kind: str, seconds: float) -> None:
        nonlocal spent
        start = time.perf_counter()
        real(self, kind, seconds)
        spent += time.perf_counter() - start

    session_s(arrays, [])
    ratios, told_s = [], []
    for _ in range(repeats):
        watching: list[object] = []
        for make in (ProgressBar, PlainLines, JsonLines):
            watching.append(_timing(make(io.StringIO()), told_s))
        quiet, watched = session_s(arrays, []), session_s(arrays, watching)
        ratios.append(watched / quiet)
        total = watched
    print(f"a run with bar, log and JSON, over one without: {statistics.median(ratios):.4f} (of {repeats} pairs)")
    print(f"all their calls together: {100 * sum(told_s) / repeats / total:.3f} % of the session")
    Timeline._add = timed  # type: ignore[method-assign]
    seconds = session_s(arrays, [])
    Timeline._add = real  # type: ignore[method-assign]
    calls = _calls_s()
    print(f"sums of the timeline: {100 * spent / seconds:.3f} % of the session; a span takes {1e6 * calls:.1f} us")


def _timing(observer: object, told_s: list[float]) -> object:
    def observe(event: Event) -> None:
        start = time.perf_counter()
        observer(event)  # type: ignore[operator]
        told_s.append(time.perf_counter() - start)

    return observe


def _calls_s() -> float:
    from cqsa_stream.machine.device import Host

    timeline, count = Timeline(Host()), 20_000
    start = time.perf_counter()
    for _ in range(count):
        with timeline.on_device("kernel"):
            pass
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    main(parser.parse_args().repeats)
