"""What a later session of a run takes from those before it: the same command makes the same bits."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from cqsa_stream.options import Options
from cqsa_stream.planning import plan_run
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.manifest import sealed, unsealed
from cqsa_stream.run.state import State
from cqsa_stream.schedulers.plan import Chosen
from tests.conftest import Cli

QKV = ("d/q.zarr", "d/k.zarr", "d/v.zarr")
STOPPED = ("--max-seconds", 0)


@pytest.fixture
def data(cli: Cli) -> None:
    assert cli("generate", "d", "--tokens", 3000, "--heads", 1, "--head-dim", 16, "--dtype", "float16").returncode == 0


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> list[Chosen | None]:
    """What sessions ask the planner to keep, in order."""
    asked: list[Chosen | None] = []

    def watched(*args: Any, fixed: tuple[Chosen, Options] | None = None, **known: Any) -> Any:
        asked.append(fixed and fixed[0])
        return plan_run(*args, fixed=fixed, **known)

    monkeypatch.setattr("cqsa_stream.run.session.plan_run", watched)
    return asked


@pytest.mark.usefixtures("data")
def test_the_same_command_keeps_what_was_chosen(fixed: list[Chosen | None], cli: Cli, tmp_path: Path) -> None:
    words = ("--host-memory", "48MiB", "--device", "cpu", "--schedule", "cqs", "--chunks", 21, *STOPPED)
    for _ in range(2):
        assert cli("run", *QKV, "out", *words).returncode == 3
    state = json.loads((tmp_path / "out.run/state.json").read_bytes())
    chosen = Chosen(**state["chosen"])
    assert (chosen.schedule, chosen.kernel) == ("cqs", "torch-cpu")
    assert state["options"]["host_memory"] == 48 * 2**20
    assert not state["rounded_tiles"]
    assert fixed == [None, chosen]
    for same in ((), ("--checkpoint-every", 5), ("--device", "cpu"), ("--kernel", "auto", "--host-memory", 48 * 2**20)):
        fixed.clear()
        assert cli("run", *QKV, "out", *STOPPED, *same).returncode == 3
        assert fixed == [chosen], same
    for other in (("--host-memory", "40MiB"), ("--schedule", "rectangular"), ("--schedule", "auto")):
        assert cli("run", *QKV, "out", *words).returncode == 3
        fixed.clear()
        assert cli("run", *QKV, "out", *STOPPED, *other).returncode == 3
        assert fixed == [None], other


@pytest.mark.usefixtures("data")
def test_what_was_chosen_and_does_not_fit_is_planned_anew(fixed: list[Chosen | None], cli: Cli, tmp_path: Path) -> None:
    assert cli("run", *QKV, "out", *STOPPED, "--device", "cpu", "--chunks", 21).returncode == 3
    directory = RunDirectory(tmp_path / "out.run")
    problem = directory.manifest().problem
    before = directory.state(problem)
    assert before.chosen is not None
    good = before.chosen.layout
    tile = good["tile"]
    wrong: list[dict[str, Any]] = [
        {"resident_rows": 1 << 40}, {"resident_rows": 0}, {"rows_per_task": 10**6}, {"slot_bytes": 1}, {"stride": 3},
        {"out_tokens": 7}, {"tile": {**tile, "rows": 0}}, {"query_places": 1}, {"leaving_rows": 4},
        {"block_tokens": 10**9},
    ]  # fmt: skip
    for layout in (*({**good, **change} for change in wrong), {"rows_per_task": 1}, {}):
        directory.write_state(dataclasses.replace(before, chosen=dataclasses.replace(before.chosen, layout=layout)))
        assert cli("run", *QKV, "out", *STOPPED).returncode == 3
        assert fixed[-1] is not None
        found = directory.state(problem).chosen
        assert found is not None
        assert set(found.layout) == set(before.chosen.layout)
        assert found.layout != layout
    assert cli("run", *QKV, "out").returncode == 0


@pytest.mark.usefixtures("data")
def test_what_is_free_may_change_as_long_as_the_plan_fits_it(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A session takes 80 % of what is free; the next keeps its plan while that fits what is free then, to the byte."""

    def chosen(free: int) -> tuple[Any, Any]:
        caplog.clear()
        monkeypatch.setattr("cqsa_stream.machine.budgets.free_host_bytes", lambda: free)
        assert cli("run", *QKV, "out", *STOPPED, "--device", "cpu", "--causal").returncode == 3
        state = json.loads((tmp_path / "out.run/state.json").read_bytes())
        return state["chosen"], state["options"]["host_memory"]

    least = json.loads(cli("plan", *QKV, "--causal", "--device", "cpu", "--json").stdout)["host_least_bytes"]
    before, budget = chosen(2 * least)
    held = json.loads(cli("status", "out.run", "--json").stdout)["host_projected_bytes"]
    assert 0.8 * held < least, "80 % of that lets no plan in"
    assert chosen(held) == (before, budget)
    assert not caplog.records
    monkeypatch.setattr("cqsa_stream.machine.budgets.free_host_bytes", lambda: held - 1)
    assert cli("run", *QKV, "out", *STOPPED, "--causal").returncode == 4
    assert "does not fit any more" in caplog.text


@pytest.mark.usefixtures("data")
def test_tiles_that_were_rounded_once_were_rounded(cli: Cli, tmp_path: Path) -> None:
    """By any session of the run: a later one on the CPU takes no rounding back."""
    assert cli("run", *QKV, "out", *STOPPED, "--device", "cpu", "--chunks", 21).returncode == 3
    directory = RunDirectory(tmp_path / "out.run")
    problem = directory.manifest().problem
    before = directory.state(problem)
    directory.write_state(dataclasses.replace(before, rounded_tiles=True))
    assert cli("run", *QKV, "out").returncode == 0
    assert directory.state(problem).rounded_tiles
    loose = json.loads(cli("verify", "out.run", "--json").stdout)["tolerance"]
    directory.write_state(before)
    assert json.loads(cli("verify", "out.run", "--json").stdout)["tolerance"] < loose
    (tmp_path / "out.run/state.json").unlink()
    assert json.loads(cli("verify", "out.run", "--json").stdout)["tolerance"] == loose, "nobody knows"


IMPOSSIBLE: list[dict[str, Any]] = [
    {"options": {"device": 3}}, {"options": {"host_memory": True}}, {"options": {"host_memory": 1e300}},
    {"options": {"schedule": "best"}}, {"options": {"checkpoint_every_s": -1.0}}, {"options": {"more": 1}},
    {"options": 7}, {"rounded_tiles": 1}, {"chosen": None}, {"chosen": {"layout": {"block_tokens": -1}}},
    {"chosen": {"layout": [1]}}, {"chosen": {"layout": {"tile": {"tile": {"rows": 1}}}}}, {"chosen": {"x": 1}},
    {"chosen": {"kernel": "k" * 1000}}, {"chosen": {"schedule": "s"}}, {"chosen": {"schedule": ["cqs"]}},
    {"chosen": {"layout": {str(n): 1 for n in range(100)}}},
]  # fmt: skip


@pytest.mark.parametrize("change", IMPOSSIBLE, ids=lambda change: str(change)[:60])
def test_a_state_that_says_what_cannot_be_is_not_believed(change: dict[str, Any]) -> None:
    options = Options(device="cpu", host_memory=2**30, schedule="cqs", kernel="auto")
    state = State(options, Chosen("cqs", {"block_tokens": 4, "tile": {"rows": 1}}, "torch-cpu", ""), rounded_tiles=True)
    assert State.from_json(state.to_json()) == state
    fields = unsealed(1, state.to_json())
    for name, value in change.items():
        fields[name] = {**fields[name], **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError):  # noqa: PT011 - each says something else
        State.from_json(sealed(1, fields))
