"""The command line as a user meets it: exit codes, one clear line, nothing written where something is wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from tests.conftest import COMMAND, Cli, environment

SMALL = ("--tokens", 300, "--heads", 4, "--kv-heads", 2, "--head-dim", 16, "--dtype", "float32", "--chunk-tokens", 100)
QKV = ("d/q.zarr", "d/k.zarr", "d/v.zarr")


@pytest.fixture
def data(cli: Cli) -> None:
    assert cli("generate", "d", *SMALL).returncode == 0


def save(path: Path, *shape: int, dtype: str = "float32") -> None:
    zarr.create_array(path, data=np.ones(shape, dtype), config={"write_empty_chunks": True}, compressors=None)


def no_codecs(folder: Path) -> None:
    metadata = folder / "d/k.zarr/zarr.json"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "codecs": []}))


def listing(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*")}


@pytest.mark.usefixtures("data")
def test_the_main_path(cli: Cli, tmp_path: Path) -> None:
    planned = cli("plan", *QKV, "o.zarr", "--causal", "--json")
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert plan["fits"]
    assert {candidate["schedule"] for candidate in plan["candidates"]} == {"cqs", "rectangular"}
    assert listing(tmp_path) == {f for f in listing(tmp_path) if f.startswith("d")}, "planning writes nothing"

    ran = cli("run", *QKV, "o.zarr", "--causal", "--json", "--quiet")
    assert ran.returncode == 0, ran.stderr
    events = [json.loads(line) for line in ran.stdout.splitlines()]
    assert (events[0]["type"], events[-2]["type"], events[-2]["reason"]) == ("started", "ended", "done")
    assert (events[-1]["type"], events[-1]["complete"], events[-1]["shape"]) == ("result", True, [1, 4, 300, 16])

    status = json.loads(cli("status", "o.zarr.run", "--json").stdout)
    assert status["complete"]
    assert status["pairs_done"] == status["pairs_total"] == plan["pairs"]
    assert status["flops_done"] == plan["flops"] == 2 * 32 * 4 * 300 * 301 // 2
    assert (status["tokens_done"], status["sessions"], status["pid"]) == (1200, 1, None)

    again = cli("run", *QKV, "o.zarr", "--causal")
    assert again.returncode == 0
    assert "complete" in again.stderr
    assert json.loads(cli("status", "o.zarr.run", "--json").stdout)["sessions"] == 1

    verified = json.loads(cli("verify", "o.zarr.run", "--rows", 50, "--json").stdout)
    assert verified["ok"]
    assert verified["rows"] == 50
    assert 0 < verified["max_relative_error"] < 1e-5


@pytest.mark.usefixtures("data")
def test_verify_finds_a_wrong_output(cli: Cli, tmp_path: Path) -> None:
    assert cli("run", *QKV, "o.zarr").returncode == 0
    output = zarr.open_array(tmp_path / "o.zarr", mode="r+")
    output[0, :, :50] = 0.5
    found = cli("verify", "o.zarr.run", "--json")
    assert found.returncode == 1
    assert not json.loads(found.stdout)["ok"]


BAD_INPUT: list[tuple[str, Callable[[Path], object], tuple[object, ...], str]] = [
    ("missing path", lambda d: None, ("none.zarr", *QKV[1:], "o"), "no such file"),
    ("not an array", lambda d: (d / "e").mkdir(), ("e", *QKV[1:], "o"), "neither zarr.json"),
    ("rank", lambda d: save(d / "r", 1, 300, 16), ("r", *QKV[1:], "o"), "4 axes"),
    ("head dims", lambda d: save(d / "r", 1, 4, 300, 8), ("r", *QKV[1:], "o"), "head dim 8"),
    ("batch", lambda d: save(d / "r", 2, 4, 300, 16), ("r", *QKV[1:], "o"), "batch"),
    ("heads", lambda d: save(d / "r", 1, 3, 300, 16), ("r", *QKV[1:], "o"), "3 query heads"),
    ("key tokens", lambda d: save(d / "r", 1, 2, 301, 16), ("d/q.zarr", "r", "d/v.zarr", "o"), "same of both"),
    ("integers", lambda d: save(d / "r", 1, 4, 300, 16, dtype="int32"), ("r", *QKV[1:], "o"), "int32"),
    ("float64", lambda d: save(d / "r", 1, 4, 300, 16, dtype="float64"), ("r", *QKV[1:], "o"), "float64"),
    ("mixed", lambda d: save(d / "r", 1, 4, 300, 16, dtype="float16"), ("r", *QKV[1:], "o"), "mixed dtypes"),
    ("empty", lambda d: save(d / "r", 1, 4, 0, 16), ("r", *QKV[1:], "o"), "length 0"),
    ("missing chunk", lambda d: (d / "d/k.zarr/c/0/1/2/0").unlink(), (*QKV, "o"), "--fill-missing"),
    ("truncated chunk", lambda d: (d / "d/v.zarr/c/0/0/0/0").write_bytes(b"x" * 50), (*QKV, "o"), "truncated"),
    ("output taken", lambda d: (d / "o").mkdir(), (*QKV, "o"), "no result of the run"),
    ("output is an input", lambda d: None, (*QKV, "d/k.zarr"), "overlaps"),
    ("output in an input", lambda d: None, (*QKV, "d/k.zarr/o"), "overlaps"),
    ("input in the output", lambda d: None, (*QKV, "d"), "overlaps"),
    ("negative size", lambda d: None, (*QKV, "o", "--host-memory=-4"), "--host-memory"),
    ("unreadable size", lambda d: None, (*QKV, "o", "--host-memory", "4 apples"), "4GiB"),
    ("no such device", lambda d: None, (*QKV, "o", "--device", "cuda:7"), "CUDA devices"),
    ("no device name", lambda d: None, (*QKV, "o", "--device", "tpu"), "cuda:<number>"),
    ("device memory on the CPU", lambda d: None, (*QKV, "o", "--device", "cpu", "--device-memory", "1GiB"), "one pool"),
    ("queries", lambda d: None, (*QKV, "o", "--queries", "5"), "A:B"),
    ("queries past the end", lambda d: None, (*QKV, "o", "--queries", "5:400"), "<= 300"),
    ("window", lambda d: None, (*QKV, "o", "--window", "0"), "at least 1"),
    ("chunks", lambda d: None, (*QKV, "o", "--chunks", "8"), "7 or 13"),
    ("cqs elsewhere", lambda d: None, (*QKV, "o", "--schedule", "cqs", "--queries", "0:9"), "same positions"),
    ("schedule", lambda d: None, (*QKV, "o", "--schedule", "best"), "rectangular"),
    ("out dtype", lambda d: None, (*QKV, "o", "--out-dtype", "int8"), "int8"),
    ("chunks without end", lambda d: None, (*QKV, "o", "--q-start", "3", "--chunks", "20000000"), "1 to 100000"),
    ("infinite size", lambda d: None, (*QKV, "o", "--host-memory", "1e400"), "--host-memory"),
    ("lse is the output", lambda d: None, (*QKV, "o", "--lse", "o"), "overlaps"),
    ("lse in the output", lambda d: None, (*QKV, "o", "--lse", "o/lse"), "overlaps"),
    ("lse is the run", lambda d: None, (*QKV, "o", "--lse", "o.run"), "overlaps"),
    ("output in the run", lambda d: None, (*QKV, "r/partials", "--run-dir", "r"), "overlaps"),
    ("run under a file", lambda d: (d / "f").write_text(""), (*QKV, "o", "--run-dir", "f/run"), "no directory"),
    ("run is a file", lambda d: (d / "o.run").write_text(""), (*QKV, "o"), "no directory"),
    ("link to nowhere", lambda d: (d / "o").symlink_to("gone"), (*QKV, "o"), "leads nowhere"),
    ("no codecs", no_codecs, (*QKV, "o"), "d/k.zarr"),
    ("no such option", lambda d: None, (*QKV, "o", "--fast"), "--fast"),
    ("scale", lambda d: None, (*QKV, "o", "--scale", "nan"), "finite"),
]


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(("prepare", "words", "message"), [c[1:] for c in BAD_INPUT], ids=[c[0] for c in BAD_INPUT])
def test_bad_input(
    prepare: Callable[[Path], object], words: tuple[object, ...], message: str, cli: Cli, tmp_path: Path
) -> None:
    prepare(tmp_path)
    before = listing(tmp_path)
    found = cli("run", *words)
    assert found.returncode == 2, found.stderr
    assert message in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    assert found.stdout == ""
    assert listing(tmp_path) == before, "nothing is written"


@pytest.mark.usefixtures("data")
def test_a_small_budget_names_one_that_does(cli: Cli, tmp_path: Path) -> None:
    refused = cli("run", *QKV, "o", "--host-memory", "1MiB")
    assert refused.returncode == 4
    assert not (tmp_path / "o").exists()
    budget = refused.stderr.split("--host-memory ")[1].split()[0].rstrip(";")
    assert cli("plan", *QKV, "o", "--host-memory", "1MiB").returncode == 4
    assert cli("run", *QKV, "o", "--host-memory", budget).returncode == 0


@pytest.mark.usefixtures("data")
def test_paths_mean_what_they_say(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for _ in range(2):
        assert cli("run", *QKV, "sub/../o").returncode == 0
    odd = "a %20#?|z"
    assert cli("generate", odd, *SMALL, "--codec", "crc32c").returncode == 0
    assert cli("run", *(f"{odd}/{n}.zarr" for n in "qkv"), f"{odd}/o").returncode == 0
    first, second = (np.asarray(zarr.open_array(tmp_path / p, mode="r")[...]) for p in ("o", f"{odd}/o"))
    np.testing.assert_array_equal(first, second)


@pytest.mark.usefixtures("data")
def test_another_problem_or_other_inputs_do_not_mix(cli: Cli, tmp_path: Path) -> None:
    assert cli("run", *QKV, "o", "--max-seconds", 0).returncode == 3
    for words in (
        ("--causal",),
        ("--scale", "0.5"),
        ("--chunks", 13),
        ("--out-dtype", "float16"),
        ("--queries", "0:9"),
    ):
        assert cli("run", *QKV, "o", *words).returncode == 6, words
    value = zarr.open_array(tmp_path / "d/v.zarr", mode="r+")
    value[0, 1, 299, 15] = 3.0
    changed = cli("run", *QKV, "o")
    assert changed.returncode == 6
    assert "value" in changed.stderr
    assert cli("run", *QKV, "o", "--fresh").returncode == 0
    assert json.loads(cli("verify", "o.run", "--json").stdout)["ok"]


def test_a_run_directory_is_needed(cli: Cli, tmp_path: Path) -> None:
    for command in ("status", "verify"):
        found = cli(command, "nothing")
        assert found.returncode == 2
        assert "no run directory" in found.stderr


def test_generate_does_not_depend_on_chunks_and_overwrites_nothing(cli: Cli, tmp_path: Path) -> None:
    common = ("--tokens", 2500, "--heads", 2, "--head-dim", 8, "--dtype", "float32", "--seed", 3)
    assert cli("generate", "a", *common, "--chunk-tokens", 700).returncode == 0
    assert cli("generate", "b", *common, "--codec", "zstd").returncode == 0
    for name in ("q", "k", "v"):
        first, second = (np.asarray(zarr.open_array(tmp_path / d / f"{name}.zarr")[...]) for d in "ab")
        np.testing.assert_array_equal(first, second)
        assert abs(float(first.std()) - 1) < 0.02
    again = cli("generate", "a", *common)
    assert again.returncode == 2
    assert "exists" in again.stderr
    assert cli("generate", "c", *common, "--kv-heads", 3).returncode == 2


def test_help_imports_nothing_heavy() -> None:
    heavy = "torch tensorstore zarr numpy"
    check = f"import sys; import cqsa_stream.cli; sys.exit(', '.join(set('{heavy}'.split()) & set(sys.modules)) or 0)"
    found = subprocess.run(
        [sys.executable, "-c", check], env=environment(), capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr


def test_the_command_runs_as_a_process(tmp_path: Path) -> None:
    found = subprocess.run(
        [*COMMAND, "status", "nothing"], env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("cqsa: ")
    assert len(found.stderr.splitlines()) == 1
