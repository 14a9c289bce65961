"""What the commands print: plans, status, messages; as text and as JSON."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cqsa_stream as cqsa
from cqsa_stream.commands.options import FLAGS, RUN_OPTIONS
from cqsa_stream.observers.screen import Screen
from cqsa_stream.observers.status_text import map_lines
from cqsa_stream.run.pair_map import pair_map
from cqsa_stream.schedulers.grid import Axis, Grid
from cqsa_stream.schedulers.masks.window import CAUSAL, FULL
from tests.conftest import ROOT, Cli, environment, stopping_after

QKV = ("d/q.zarr", "d/k.zarr", "d/v.zarr")
CPU = ("--device", "cpu", "--host-memory", "64MiB")
COMMANDS = ("generate", "plan", "run", "work", "finish", "status", "verify", "report", "doctor", "bench")


@pytest.fixture
def data(cli: Cli) -> None:
    assert cli("generate", "d", "--tokens", 3000, "--heads", 2, "--head-dim", 16, "--dtype", "float32").returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, cli: Cli) -> None:
    found = cli(command, "--help")
    assert found.returncode == 0
    assert re.search(rf"Examples?:\n(.*\n)*? +\$ cqsa .*{command}", found.stdout), found.stdout


@pytest.mark.usefixtures("data")
def test_the_json_of_every_command(cli: Cli, tmp_path: Path) -> None:
    made = json.loads(cli("generate", "e", "--tokens", 300, "--heads", 1, "--head-dim", 16, "--json").stdout)
    assert sorted(made) == ["k", "q", "v"]
    assert json.loads(cli("plan", *QKV, "o", *CPU, "--json").stdout)["fits"]
    assert cli("run", *QKV, "o", *CPU, "--shares", 3, "--max-seconds", 0).returncode == 3
    assert json.loads(cli("finish", "o", "--json").stdout) == {"complete": False, "shares_left": [0, 1, 2]}
    assert json.loads(cli("work", "o", "--json").stdout.splitlines()[-1])["complete"]
    assert json.loads(cli("finish", "o", "--json").stdout) == {"complete": True, "shares_left": []}
    status = json.loads(cli("status", "o", "--json").stdout)
    assert (status["state"], status["complete"], status["pid"]) == ("complete", True, None)
    assert json.loads(cli("verify", "o", "--json").stdout)["ok"]
    report = json.loads(cli("report", "o", "--json").stdout)
    assert all(Path(path).exists() for path in (report["page"], *report["pictures"]))
    assert json.loads(cli("doctor", "--json").stdout)["exact"]["ok"]


def test_bench_shows_its_stages(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cqsa_stream.bench._all_times", lambda _: ())
    monkeypatch.setattr("cqsa_stream.bench._delay_s", lambda *_: 1e-4)
    monkeypatch.setattr("psutil.cpu_percent", lambda _: 90.0)
    found = cli("bench", "--device", "cpu", "--json")
    assert found.returncode == 0, found.stderr
    assert set(json.loads(found.stdout)) >= {"tiles", "speeds"}
    for said in ("other processes use 90 %", "kernels of cpu (1 of 3)", "(2 of 3)", "(3 of 3)", "kept in"):
        assert said in found.stderr


@pytest.mark.usefixtures("data")
def test_a_plan_opens_with_its_verdict(cli: Cli) -> None:
    lines = cli("plan", *QKV, "o", "--causal", *CPU).stdout.splitlines()
    assert lines[0] == "query 1 x 2 heads x 3,000 tokens x 16 float32, causal"
    assert re.fullmatch(
        r"fits: host memory [\d.]+ MiB of 64.0 MiB   time about .+   disk [\d.]+ [KM]iB of .+ free", lines[1]
    )
    assert lines[2].startswith("rough: this machine was not measured; run cqsa bench")
    refused = cli("plan", *QKV, "o", "--device", "cpu", "--host-memory", "8MiB")
    assert refused.returncode == 4
    assert refused.stdout.splitlines()[1].startswith("DOES NOT FIT: host memory ")


@pytest.mark.usefixtures("data")
def test_a_plan_of_what_has_begun_is_its_continuation(cli: Cli, caplog: pytest.LogCaptureFixture) -> None:
    with stopping_after(5):
        assert cli("run", *QKV, "o", "--causal", *CPU, "--chunks", 13).returncode == 3
    done = json.loads(cli("status", "o", "--json").stdout)
    plan = json.loads(cli("plan", *QKV, "o", "--causal", "--json").stdout)
    assert 0 < plan["begun"]["pairs_done"] == done["pairs_done"] < plan["begun"]["pairs_total"] == done["pairs_total"]
    assert 0 < plan["seconds_left"] < plan["seconds"]
    assert plan["chunks"] == 13
    text = cli("plan", *QKV, "o", "--causal").stdout
    assert f"continues: {done['pairs_done']} of {done['pairs_total']} pairs are on disk" in text
    for words in (("--causal", "--fresh"), ()):  # begun anew, or another problem
        assert json.loads(cli("plan", *QKV, "o", *words, "--json").stdout)["begun"] is None
    assert "This is the plan of a new run" in caplog.text


def test_a_plan_of_a_shape(cli: Cli) -> None:
    words = ("--dtype", "bfloat16", "--causal", "--device", "cpu", "--host-memory", "2GiB", "--json")
    plan = json.loads(cli("plan", "--shape", "1,8,1e9,64", *words).stdout)
    assert plan["flops"] == 4 * 64 * 8 * (10**9 * (10**9 + 1) // 2)
    fewer = json.loads(cli("plan", "--shape", "1,8,100000,64", "--kv-heads", 2, *words).stdout)
    assert fewer["bytes_read"] < json.loads(cli("plan", "--shape", "1,8,100000,64", *words).stdout)["bytes_read"]
    shape = cqsa.Shape((1, 8, 10**9, 64), "bfloat16")
    mine = cqsa.plan(shape, shape, shape, is_causal=True, device="cpu", host_memory="2GiB", out="out.zarr")
    assert mine.to_dict()["bytes_read"] == plan["bytes_read"]
    assert "<table>" in mine._repr_html_()
    with pytest.raises(cqsa.ArrayError, match="not an array"):
        cqsa.attention(*(cqsa.Shape((1, 1, 300, 16)),) * 3, out="out.zarr", device="cpu")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--shape", "1,8,100"), "expected 4 numbers"),
        (("--shape", "1,8,x,64"), "expected a whole number"),
        (("--shape", "1,8,0,64"), "expected 4 whole numbers"),
        (("--shape", "1,8,100,64", "--dtype", "int8"), "int8"),
        (("q", "k", "v", "--shape", "1,8,100,64"), "name Q, K and V, or --shape"),
        (("q", "k"), "--shape 1,8,1e9,64"),
        (("q", "k", "v", "--dtype", "float32"), "without --shape"),
    ],
)
def test_shapes_that_cannot_be(words: tuple[str, ...], said: str, cli: Cli) -> None:
    found = cli("plan", *words)
    assert (found.returncode, found.stdout) == (2, "")
    assert said in found.stderr


@pytest.mark.usefixtures("data")
def test_status_reads_as_a_line_a_table_and_a_map(cli: Cli) -> None:
    with stopping_after(5):
        assert cli("run", *QKV, "o", "--causal", *CPU, "--chunks", 7, "--schedule", "rectangular").returncode == 3
    text = cli("status", "o").stdout
    by_its_directory = cli("status", "o.run").stdout
    assert text.splitlines()[1:] == by_its_directory.splitlines()[1:]
    lines = text.splitlines()
    host, ago = r"host [\d.]+ ([KM]iB|bytes) of 64.0 MiB", r"checkpoint .+ ago"
    assert re.fullmatch(rf"stopped  \d+ %  [\d:]+ elapsed  {host}  {ago}", lines[0])
    start = next(n for n, line in enumerate(lines) if line.startswith("pairs of query chunks"))
    drawn = lines[start + 1 : start + 8]
    assert [len(line) for line in drawn] == [2 * n for n in range(1, 8)], "causal: a triangle"
    assert len(set("".join(drawn))) > 1, "some is done, some is not"
    assert cli("run", *QKV, "o", "--causal").returncode == 0
    status = json.loads(cli("status", "o", "--json").stdout)
    assert status["sessions"] == 2
    assert status["measured"]["seconds"] == status["session_s"] < status["elapsed_s"]
    assert (
        status["predicted"]["seconds"]
        < json.loads(cli("plan", *QKV, "x", "--causal", *CPU, "--json").stdout)["seconds"]
    )
    assert "The last session:" in cli("status", "o").stdout


@pytest.mark.usefixtures("data")
def test_watching_ends_with_the_run(cli: Cli) -> None:
    with stopping_after(5):
        assert cli("run", *QKV, "o", *CPU, "--chunks", 7).returncode == 3
    found = cli("status", "o", "--watch")
    assert found.returncode == 0
    assert "stopped; resume with" in found.stderr


def test_a_screen_is_drawn_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "4")
    file = Terminal()
    screen = Screen(file)
    screen.show("x" * 50 + "\nsecond\nthird\nfourth\nfifth")
    assert [len(line) for line in file.getvalue().splitlines()] == [19, 6, 5], "cut, so that it can be drawn over"
    screen.show("again")
    assert file.getvalue().endswith("\x1b[3A\r\x1b[0Jagain\n")
    plain = io.StringIO()
    for text in ("one", "two"):
        Screen(plain).show(text)
    assert plain.getvalue() == "one\ntwo\n"


def test_the_map_of_pairs_counts_what_is_needed() -> None:
    axis = Axis.cut(70, 7)
    causal = Grid(axis, axis, CAUSAL.over(range(70), 70), True)
    covers: list[dict[int, int | None]] = [{0: None, 3: 0b0011}, {3: 0b1011}]
    found = pair_map(causal, covers, 64, 64)
    assert found[0][:2] == [0.5, None], "finished in one of two lanes"
    assert found[3][:5] == [1.0, 1.0, 0.0, 0.5, None]
    assert found[6][0] == 0.0
    small = pair_map(causal, [dict.fromkeys(range(7)), dict.fromkeys(range(7))], 3, 3)
    assert small[2] == [1.0, 1.0, 1.0]
    assert map_lines(found)[4] == "████··▒▒"


def test_the_map_of_a_large_grid_is_small() -> None:
    axis = Axis.cut(10**9, 10_303)
    grid = Grid(axis, axis, FULL.over(range(10**9), 10**9), True)
    found = pair_map(grid, [{}], 24, 64)
    assert (len(found), {len(row) for row in found}) == (24, {64})
    assert {part for row in found for part in row} == {0.0}


def test_every_option_has_its_flag() -> None:
    import inspect

    words = set(inspect.signature(cqsa.attention).parameters)
    only_there = {"documents", "chunked", "prefix"}  # masks, which Python has as objects
    assert set(RUN_OPTIONS) - words == only_there
    torchs = {"query", "key", "value", "attn_mask", "dropout_p", "enable_gqa", "out", "return_lse"}
    assert words - set(RUN_OPTIONS) == {*torchs, "progress", "observers"}
    assert set(RUN_OPTIONS) <= set(FLAGS)


def test_sizes_that_have_lost_their_unit_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    q = np.ones((1, 1, 300, 16), np.float32)
    with pytest.raises(cqsa.BudgetError, match='host_memory="'):
        cqsa.attention(q, q, q, device="cpu", host_memory=48)
    assert 'host_memory=48 is 48 bytes; sizes take a unit, as "48MiB"' in caplog.text


def test_times_with_units(cli: Cli) -> None:
    assert cli("generate", "d", "--tokens", 300, "--heads", 1, "--head-dim", 16).returncode == 0
    assert cli("run", *QKV, "o", *CPU, "--checkpoint-every", "5m", "--max-seconds", "1h").returncode == 0
    found = cli("run", *QKV, "p", *CPU, "--max-seconds", "5 apples")
    assert found.returncode == 2
    assert "--max-seconds '5 apples': no duration" in found.stderr


def test_the_reference_is_what_the_code_says() -> None:
    words = [sys.executable, str(ROOT / "docs" / "reference.py"), "--check"]
    found = subprocess.run(words, capture_output=True, text=True, check=False, env=environment())
    assert found.returncode == 0, found.stderr


@pytest.mark.usefixtures("data")
def test_status_of_workers_that_nobody_leads(cli: Cli) -> None:
    """As in a Slurm array: the run is created, then workers come; the last session is theirs."""
    assert cli("run", *QKV, "o", *CPU, "--shares", 4, "--max-seconds", 0).returncode == 3
    assert cli("work", "o", "--worker", "0/2").returncode == 0
    status = json.loads(cli("status", "o", "--json").stdout)
    assert status["complete"]
    assert status["session_flops"] == status["flops_done"] == status["flops_total"]
    assert 0 < status["session_s"] <= status["elapsed_s"] + 1
    assert status["measured"]["bytes_read"] == status["bytes_read"] > 0
    assert status["predicted"]["bytes_read"] > 0


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("redirect", [">/dev/full", ">&-", "| true"])
def test_a_stopped_run_keeps_its_exit_code_whoever_listens(redirect: str, tmp_path: Path) -> None:
    """A job script decides by it whether to come again."""
    command = f"'{sys.executable}' -m cqsa_stream run {' '.join(QKV)} o --json --max-seconds 0"
    line = (
        f"{{ {command}; echo $? > code; }} {redirect}"
        if redirect.startswith("|")
        else f"{command} {redirect}; echo $? > code"
    )
    subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment(), check=False, capture_output=True)
    assert (tmp_path / "code").read_text() == "3\n"


@pytest.mark.usefixtures("data")
def test_status_in_plain_letters(cli: Cli, tmp_path: Path) -> None:
    assert cli("run", *QKV, "o", *CPU).returncode == 0
    words = [sys.executable, "-m", "cqsa_stream", "status", "o"]
    plain = {**environment(), "PYTHONIOENCODING": "ascii"}
    found = subprocess.run(words, cwd=tmp_path, env=plain, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "######" in found.stdout


@pytest.mark.usefixtures("data")
def test_runs_of_an_older_version_are_told_of(cli: Cli, tmp_path: Path) -> None:
    """Their events lack what newer ones have."""
    assert cli("run", *QKV, "o", *CPU).returncode == 0
    log = tmp_path / "o.run/events.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    for event in events:
        event.pop("predicted", None)
        for name in ("about", "calibrated", "begun", "lacking", "mask"):
            event.get("plan", {}).pop(name, None)
    log.write_text("\n".join(map(json.dumps, events)))
    status = json.loads(cli("status", "o", "--json").stdout)
    assert status["predicted"]["bytes_read"] == status["measured"]["bytes_read"]
    assert cli("report", "o", "--out", "r").returncode == 0
    refused = cli("report", "o", "--out", "d")
    assert (refused.returncode, "holds no report" in refused.stderr) == (2, True)


@pytest.mark.usefixtures("data")
def test_the_budget_that_is_named_for_workers_does(cli: Cli) -> None:
    refused = cli("plan", *QKV, "o", "--device", "cpu", "--workers", 2, "--host-memory", "24MiB")
    assert refused.returncode == 4
    budget = refused.stderr.split("--host-memory ")[1].split()[0]
    assert cli("plan", *QKV, "o", "--device", "cpu", "--workers", 2, "--host-memory", budget).returncode == 0
    less = f"{int(budget.removesuffix('MiB')) - 4}MiB"
    assert cli("plan", *QKV, "o", "--device", "cpu", "--workers", 2, "--host-memory", less).returncode == 4


@pytest.mark.usefixtures("data")
def test_a_run_that_is_only_begun_says_what_computes_it(cli: Cli) -> None:
    begun = cli("run", *QKV, "o", *CPU, "--max-seconds", "0s")
    assert begun.returncode == 3
    assert "cqsa work o computes it" in begun.stderr
    assert "complete: all" not in cli("plan", *QKV, "o").stdout
    assert cli("work", "o").returncode == 0
    assert "complete: all" in cli("plan", *QKV, "o").stdout


@pytest.mark.parametrize(("flag", "value"), [("--chunked", 0), ("--prefix", -1), ("--documents", "none.npy")])
@pytest.mark.usefixtures("data")
def test_a_mask_that_cannot_be_is_named_by_its_flag(flag: str, value: object, cli: Cli) -> None:
    found = cli("run", *QKV, "o", f"{flag}={value}")
    assert found.returncode == 2
    assert found.stderr.startswith(f"cqsa: {flag} ")


def test_inputs_that_the_disk_cannot_hold_are_not_begun(cli: Cli, tmp_path: Path) -> None:
    found = cli("generate", "d", "--tokens", "1e12", "--heads", 8, "--head-dim", 64)
    assert (found.returncode, "free; make room" in found.stderr) == (2, True)
    assert not list(tmp_path.iterdir())
