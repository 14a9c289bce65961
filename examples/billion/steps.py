"""What the scripts of this folder share: commands run, timed and killed as processes of their own, and their log."""

import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CQSA = [sys.executable, "-m", "cqsa_stream"]
KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Ran:
    """How a process went: its exit code (negative: the signal that killed it), what it printed, what it took."""

    code: int
    stdout: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def amount(text: str) -> int:
    """Return a number given as 1024, 1e9 or 2^30."""
    base, _, power = text.partition("^")
    return int(base) ** int(power) if power else int(float(text))


class Log:
    """Prints what is done, and keeps it in a folder of small files: log.txt, figures.json, events of runs, reports."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._figures = folder, {}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.txt").write_text("")
        self.say(f"{time.strftime('%Y-%m-%d')}, {_machine()}")

    def say(self, text: str) -> None:
        print(text, flush=True)
        with (self._folder / "log.txt").open("a") as file:
            print(text, file=file)

    def figure(self, **figures: Any) -> None:
        """Keep figures by name, and say them."""
        self._figures |= figures
        (self._folder / "figures.json").write_text(json.dumps(self._figures, indent=1) + "\n")
        self.say("   " + ", ".join(f"{name} {_short(value)}" for name, value in figures.items()))

    def cqsa(
        self, *words: object, codes: Sequence[int] = (0,), kill_at: float | None = None, quiet: bool = False
    ) -> Ran:
        """Run a command of cqsa; its stderr goes to the log, stdout too unless ``quiet``.

        ``kill_at``: once this part of all pairs is done, the process is killed (SIGKILL).
        """
        texts = [str(word) for word in words]
        self.say(f"$ cqsa {shlex.join(texts)}")
        begin = time.perf_counter()
        with (self._folder / "log.txt").open("ab") as said:
            process = subprocess.Popen([*CQSA, *texts], stdout=subprocess.PIPE, stderr=said, text=True)
            if kill_at is not None:
                _kill(process, Path(f"{texts[4]}.run"), kill_at)
            assert process.stdout is not None
            stdout = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = code = os.waitstatus_to_exitcode(status)
        said_so_far = self._folder / "log.txt"
        said_so_far.write_text(said_so_far.read_text().replace(f"{Path.cwd()}/", ""))  # where it ran is nobody's matter
        took = time.perf_counter() - begin
        ran = Ran(code, stdout, took, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
        if stdout and not quiet:
            self.say(stdout.rstrip())
        ended = "killed" if code == KILLED else f"exit code {code}"
        self.say(
            f"   {ended} after {took:.1f} s, {ran.cpu_seconds:.0f} s of CPU, {ran.peak_bytes / 2**20:.0f} MiB at most"
        )
        if code not in codes:
            raise SystemExit(
                f"cqsa {texts[0]}: exit code {code}, expected one of {list(codes)}; see {self._folder}/log.txt"
            )
        return ran

    def json(self, *words: object) -> tuple[dict[str, Any], Ran]:
        """Run a command with --json; return its object."""
        ran = self.cqsa(*words, "--json", quiet=True)
        found: dict[str, Any] = json.loads(ran.stdout)
        return found, ran

    def keep(self, file: Path) -> None:
        """Copy a small file into the folder."""
        if file.stat().st_size > 500_000:
            self.say(f"   {file.name} has {file.stat().st_size:,} bytes; it is not kept")
        else:
            shutil.copyfile(file, self._folder / file.name)

    def keep_report(self, out: Path) -> None:
        """Write a report of a run, and keep its page, which holds its pictures."""
        report = out.with_name(f"{out.name}.report")
        self.cqsa("report", out, "--out", report)
        self.keep(report / "report.html")


def _kill(process: "subprocess.Popen[str]", run_dir: Path, part: float) -> None:
    while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        try:
            seen = json.loads((run_dir / "session.json").read_text())
        except (OSError, ValueError):
            seen = {}
        if seen.get("pid") == process.pid and seen.get("pairs_done", 0) >= part * seen.get("pairs_total", 1):
            process.kill()
            return
        time.sleep(0.05)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _machine() -> str:
    """Describe the processor, its cores and the memory."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores of {name}, {memory:.0f} GiB of memory"
