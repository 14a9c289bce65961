"""What was measured is kept and believed only where it makes sense; and plans use it."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from cqsa_stream import bench
from cqsa_stream.kernels.contract import KernelChoice
from cqsa_stream.machine import budgets, calibration
from cqsa_stream.machine.calibration import Calibration, Timed, load, path_for, trying
from cqsa_stream.machine.device import Host
from cqsa_stream.problem import Problem
from cqsa_stream.schedulers.model.rates import Speeds, TileTimes
from tests.conftest import Cli

CPU = Host()
TIMES = TileTimes((128, 1024), (128, 1024), ((1e-4, 5e-4), (6e-4, 4e-3)), 1.0, 0.6, 2)
FOUND = Calibration(
    (Timed("float32", 64, "flash-for-cpu", TIMES), Timed("float32", 128, "flash-for-cpu", TIMES.scaled(2))),
    Speeds(
        read_bytes_per_s=1e9, write_bytes_per_s=4e8, stage_bytes_per_s=3e10, touch_bytes_per_s=5e9, file_s=1e-3,
        file_lost_s=5e-4, block_s=1e-4, read_cpu_s=1e-10, check_cpu_s=1e-9, expand_cpu_s=3e-9,
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    shape: tuple[int, ...]
    dtype: str


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calibration._stored.cache_clear()
    yield tmp_path / "cache"
    calibration._stored.cache_clear()


def test_what_is_saved_is_loaded(cache: Path) -> None:
    path = FOUND.save(CPU)
    assert path == path_for(CPU)
    assert path.is_relative_to(cache)
    assert load(CPU) == FOUND
    table = str(FOUND).splitlines()
    assert table[0] == "float32, head dim 64, flash-for-cpu: GFLOP/s by rows and columns of a call"
    assert table[3].split() == ["1,024", "56", "67"], "256 x 1024 x 128 / 6e-4 and 256 x 1024 x 1024 / 4e-3"


def test_head_dims_in_between_take_the_nearest_times() -> None:
    found = FOUND.rates("float32", "flash-for-cpu", 96, 64)
    assert found is not None
    assert found.tiles.tile_s(1024, 1024) == pytest.approx(2 * 4e-3 * 160 / 256)
    assert FOUND.rates("float32", "flash-for-cpu", 64, 64).tiles == TIMES  # type: ignore[union-attr]
    assert FOUND.rates("bfloat16", "flash-for-cpu", 64, 64) is None
    assert FOUND.rates("float32", "cublas", 64, 64) is None


@pytest.mark.parametrize(
    "change",
    [
        {"format": 1}, {"speeds": 3}, {"file_s": 0}, {"file_s": -1.0}, {"file_s": "1"}, {"file_s": None},
        {"read_cpu_s": True},
        {"tiles": {}}, {"tiles": [{}]}, {"tiles": [1]}, {"tiles": 3},
        {"dtype": 3}, {"dim": "64"}, {"dim": 0}, {"dim": 64.5}, {"operator": None}, {"times": 1}, {"times": {}},
        {"times": {"rows": [128], "columns": [128], "seconds": [[1.0]], "causal": 1.0, "stacked": 1.0, "threads": 2}},
        {"block_s": float("inf")},
    ],
)  # fmt: skip
@pytest.mark.usefixtures("cache")
def test_nonsense_counts_as_not_measured(change: dict[str, object]) -> None:
    path = FOUND.save(CPU)
    fields = json.loads(path.read_bytes())
    [place] = [it for it in (fields, fields["speeds"], fields["tiles"][0]) if change.keys() <= it.keys()]
    place.update(change)
    path.write_text(json.dumps(fields))
    calibration._stored.cache_clear()
    found, empty = load(CPU), change.get("tiles") == {}
    assert found is None or (empty and found.rates("float32", "flash-for-cpu", 64, 64) is None)


@pytest.mark.usefixtures("cache")
def test_a_file_that_is_no_json_counts_as_none() -> None:
    path = FOUND.save(CPU)
    for data in (b"", b"[]", b"{", b"\xff"):
        path.write_bytes(data)
        calibration._stored.cache_clear()
        assert load(CPU) is None


def test_a_tried_calibration_is_used_and_dropped() -> None:
    before = load(CPU)
    with trying(FOUND):
        assert load(CPU) is FOUND
    assert load(CPU) == before


@pytest.mark.usefixtures("cache")
def test_plans_take_what_was_measured() -> None:
    array = Shape((1, 1, 4096, 64), "float32")
    problem = Problem.of(array, array, array)
    kernel = KernelChoice("torch-cpu", "flash-for-cpu")
    known = FOUND.rates("float32", "flash-for-cpu", 64, 64)
    assert budgets.describe(CPU, problem, kernel, None, None, None).rates != known
    with trying(FOUND):
        described = budgets.describe(CPU, problem, kernel, None, None, None)
    assert described.rates == described.measured == known


@pytest.mark.usefixtures("cache")
def test_bench_measures_and_keeps(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_ROUNDS", 1)
    monkeypatch.setattr(bench, "_HEAD_DIMS", (64,))
    monkeypatch.setattr(bench, "_PARTS", (128, 16))
    monkeypatch.setattr(bench, "_FILES", 2)
    monkeypatch.setattr(bench, "_RUNS", 1)
    monkeypatch.setattr(bench, "_RUN", {"tokens": 1024, "heads": 1, "head_dim": 64, "dtype": "float32"})
    done = cli("bench", "--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    kept = Calibration.from_json(done.stdout.encode())
    assert load(CPU) == kept
    [timed] = kept.tiles
    assert (timed.dtype, timed.dim, timed.operator) == ("float32", 64, "flash-for-cpu")
    times = timed.times
    assert (times.rows, times.columns) == ((128, 1024), (128, 1024))
    measured = [*itertools.chain(*times.seconds), times.causal, times.stacked, bench.speed(CPU, kept)]
    measured += [getattr(kept.speeds, field.name) for field in dataclasses.fields(kept.speeds)]
    assert all(0 < figure < math.inf for figure in measured)


def test_free_memory_is_no_more_than_the_control_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    free = budgets.free_host_bytes()
    assert free > 0
    monkeypatch.setattr(budgets, "_control_group", lambda: iter([(1000, 900, 50), (10**15, 0, 0)]))
    assert budgets.free_host_bytes() == 1000 - 900 + 50


def test_a_run_takes_the_operator_that_is_the_fastest_for_its_largest_calls(cache: Path) -> None:
    slow = dataclasses.replace(TIMES, seconds=((5e-5, 6e-4), (7e-4, 3e-3)), causal=0.9)
    names = ("cudnn", "flash")
    tiles = tuple(Timed("float16", 64, *timed) for timed in zip(names, (TIMES, slow), strict=True))
    found = dataclasses.replace(FOUND, tiles=tiles)
    sizes = ((128, 128), (128, 1024), (1024, 128), (1024, 1024), (2048, 2048))
    fastest = [found.fastest("float16", 64, names, *size) for size in sizes]
    assert fastest == ["flash", "cudnn", "cudnn", "flash", "flash"]
    assert found.fastest("float16", 72, ("cudnn",), 128, 128) == "cudnn"
    assert found.fastest("float32", 64, names, 128, 128) is None
    assert found.fastest("float16", 64, ("cudnn", "magic"), 128, 128) is None
    for operator, times in (("cudnn", TIMES), ("flash", slow)):
        assert found.rates("float16", operator, 64, 64).tiles == times  # type: ignore[union-attr]
    found.save(CPU)
    assert load(CPU) == found
    titles = [line for line in str(found).splitlines() if line.startswith("float16")]
    assert titles == [f"float16, head dim 64, {name}: GFLOP/s by rows and columns of a call" for name in names]
