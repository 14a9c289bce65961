"""What a run says while it works: the bar of a terminal, the lines of a log, the events of a program."""

import dataclasses
import fcntl
import io
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cqsa_stream as cqsa
from cqsa_stream.events import Checkpointed, Ended, Event, Figures, Progressed, Started
from cqsa_stream.observers.bar import ProgressBar
from cqsa_stream.observers.lines import PlainLines, progress_parts, share_text, stages_text
from tests.conftest import COMMAND, Cli, environment

FIGURES = Figures(
    pairs_done=99, pairs_total=112, rows_done=0, rows_total=4, tokens_done=0, flops_done=7 * 10**11, flops_total=10**12,
    session_s=8.0, session_flops=376 * 10**9, bytes_read=72_000_000, bytes_written=0, device_peak_bytes=0,
    device_driver_peak_bytes=0, device_reserved_bytes=0, host_peak_bytes=1, kernel_s=7.2, copy_s=0.4, read_s=0.8,
)  # fmt: skip
STARTED = Started("the problem", {}, FIGURES)


def moment(session_s: float, done: float = 0.5) -> Figures:
    return dataclasses.replace(FIGURES, session_s=session_s, flops_done=int(done * 10**12))


def drawn(columns: int) -> list[str]:
    """Return what a bar draws on a terminal of so many columns, line by line."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(its, "w") as file:
        bar = ProgressBar(file)
        for event in (STARTED, Progressed(FIGURES), Ended("stopped", FIGURES, {}, {})):
            bar(event)
        file.flush()
        data = b""
        while select.select([ours], [], [], 0.1)[0]:
            data += os.read(ours, 1 << 16)
    os.close(ours)
    lines = re.split(r"[\r\n]", data.decode().replace("\x1b[A", ""))
    return [line.rstrip() for line in lines if line.strip()]


def test_the_words_of_progress() -> None:
    assert share_text(FIGURES) == " 70%"
    assert share_text(moment(8.0, 0.99999)) == " 99%", "100 only where all is done"
    assert progress_parts(FIGURES) == ["0:08 elapsed, 0:06 left", "47 GFLOP/s", "read 9.0 MB/s"]
    assert stages_text(FIGURES) == "limited by compute: compute 90% busy, bus 5% busy, disk reads 10% busy"
    assert stages_text(dataclasses.replace(FIGURES, kernel_s=0.0, copy_s=0.0, read_s=0.0)) == ""


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_the_time_left_is_never_cut_off(columns: int) -> None:
    line = next(line for line in reversed(drawn(columns)) if "left" in line)
    assert line.startswith(" 70% ")
    assert "0:08 elapsed, 0:06 left" in line
    assert len(line) <= columns
    assert ("47 GFLOP/s" in line, "read 9.0 MB/s" in line) == (columns >= 60, columns >= 80)


def test_a_resumed_run_says_what_is_on_disk() -> None:
    assert "cqsa: resuming: 99 of 112 pairs are on disk" in drawn(80)


def test_a_log_of_ten_minutes_has_about_ten_lines() -> None:
    found, now = io.StringIO(), 0.0
    lines = PlainLines(found, clock=lambda: now)
    lines.opening("q, k, v")
    lines(STARTED)
    for second in range(1, 601):
        now = float(second)
        lines(Progressed(moment(now, now / 600)))
        if second % 60 == 0:
            lines(Checkpointed(0.1, 1, moment(now, now / 600)))
    lines(Ended("done", moment(600.0, 1.0), {"seconds": 590.0}, {"seconds": 600.0}))
    logged = found.getvalue().splitlines()
    assert 10 <= len(logged) <= 16
    for line in logged:
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d cqsa: ", line), line
    assert "opening q, k, v" in logged[0]
    assert "100%   10:00 elapsed, 0:00 left" in logged[-2]
    assert "measured (predicted): took 10 min (10 min)" in logged[-1]


def test_why_a_run_stopped_stands_in_the_log() -> None:
    found = io.StringIO()
    PlainLines(found)(Ended("RunStopped: stopped by SIGTERM", FIGURES, {}, {}))
    assert found.getvalue().rstrip().endswith("(stopped by SIGTERM)")


def test_the_first_line_comes_before_torch_is_imported(tmp_path: Path) -> None:
    """On a terminal: the process says that it opens the arrays while nothing heavy is loaded."""
    code = (
        "import sys\n"
        "import cqsa_stream.observers.bar as bar\n"
        "say = bar.ProgressBar.opening\n"
        "def opening(self, what):\n"
        "    say(self, what)\n"
        "    print('heavy:', sorted({'torch', 'numpy', 'zarr', 'tensorstore'} & set(sys.modules)), file=sys.stderr)\n"
        "bar.ProgressBar.opening = opening\n"
        "from cqsa_stream.cli import main\n"
        "main()\n"
    )
    ours, its = pty.openpty()
    words = [sys.executable, "-c", code, "run", "none.zarr", "k.zarr", "v.zarr", "o"]
    process = subprocess.Popen(words, stderr=its, cwd=tmp_path, env=environment())
    os.close(its)
    text = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            text += os.read(ours, 4096)
        except OSError:
            break
    os.close(ours)
    assert process.wait() == 2
    lines = text.decode().splitlines()
    assert lines[:2] == ["cqsa: opening none.zarr, k.zarr, v.zarr", "heavy: []"]
    assert "no such file" in lines[-1]


def test_importing_the_package_or_asking_for_help_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'zarr', 'tensorstore', 'tqdm.auto', 'matplotlib'}"
    for code in (
        "import cqsa_stream",
        "import sys; sys.argv = ['cqsa', '--help']; from cqsa_stream.cli import main; main()",
    ):
        whole = (
            f"import atexit, sys; atexit.register(lambda: print('heavy', sorted({heavy} & set(sys.modules)))); {code}"
        )
        found = subprocess.run(
            [sys.executable, "-c", whole], capture_output=True, text=True, check=True, env=environment()
        )
        assert "heavy []" in found.stdout


def test_a_bar_in_python(capsys: pytest.CaptureFixture[str]) -> None:
    q = np.random.default_rng(0).standard_normal((1, 1, 300, 16), np.float32)
    cqsa.attention(q, q, q, device="cpu", progress=True)
    assert "elapsed" in capsys.readouterr().err
    with pytest.raises(cqsa.InputError, match="progress 'yes'"):
        cqsa.attention(q, q, q, device="cpu", progress="yes")  # type: ignore[arg-type]


def test_a_session_says_how_busy_its_stages_were() -> None:
    q = np.random.default_rng(0).standard_normal((1, 2, 3000, 32), np.float32)
    seen: list[Event] = []
    cqsa.attention(q, q, q, device="cpu", observers=[seen.append])
    figures = seen[-1].figures
    assert 0 < figures.kernel_s <= figures.session_s
    assert all(0 <= share <= 1 for share in figures.busy.values())


def test_a_result_comes_last(cli: Cli) -> None:
    assert cli("generate", "d", "--tokens", 500, "--heads", 1, "--head-dim", 16).returncode == 0
    words = ("run", "d/q.zarr", "d/k.zarr", "d/v.zarr", "o", "--device", "cpu", "--json")
    stopped = cli(*words, "--max-seconds", "0")
    last: dict[str, Any] = json.loads(stopped.stdout.splitlines()[-1])
    assert (stopped.returncode, last["type"], last["complete"]) == (3, "result", False)
    for _ in range(2):  # also where there was nothing to do
        last = json.loads(cli(*words).stdout.splitlines()[-1])
        assert (last["type"], last["complete"], last["shape"], last["dtype"]) == (
            "result",
            True,
            [1, 1, 500, 16],
            "bfloat16",
        )
        assert Path(last["output"]).name == "o"


def test_a_session_logs_samples_that_grow_rarer(tmp_path: Path) -> None:
    from cqsa_stream.observers.log import EventLog

    events: list[dict[str, Any]] = []

    class Nowhere:
        def write_session(self, figures: dict[str, Any]) -> None: ...
        def write_timeline(self, spans: Any) -> None: ...
        def append_event(self, event: dict[str, Any]) -> None:
            events.append(event)

    log = EventLog(Nowhere(), {}, every_s=0.0)
    for second in range(1, 7 * 86_400, 60):
        log(Progressed(moment(float(second))))
    assert 50 < len(events) < 200


def test_wide_terminals_have_a_second_line() -> None:
    assert any("limited by compute" in line for line in drawn(200))
    assert not any("limited by" in line for line in drawn(80))


def test_python_dash_m() -> None:
    words = [sys.executable, "-m", "cqsa_stream", "--version"]
    found = subprocess.run(words, capture_output=True, text=True, check=True, env=environment())
    assert found.stdout == f"cqsa-stream {cqsa.__version__}\n"
    bare = subprocess.run([*COMMAND], capture_output=True, text=True, check=True, env=environment())
    assert "  plan " in bare.stdout
    assert len(bare.stdout.splitlines()) > 15


def test_verbose_begins_with_the_plan(cli: Cli) -> None:
    assert cli("generate", "d", "--tokens", 500, "--heads", 1, "--head-dim", 16).returncode == 0
    words = ("run", "d/q.zarr", "d/k.zarr", "d/v.zarr", "o", "--device", "cpu")
    said = cli(*words, "-v").stderr
    assert "candidate" in said
    assert said.count("query 1 x 1 heads") == 1, "the plan begins with it"
    assert "limited by" in said
    assert "candidate" not in cli(*words, "--fresh").stderr
