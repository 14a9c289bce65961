"""Damaged files: each is detected when it is used next; none goes unnoticed into a result."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import cqsa_stream as cqsa
from cqsa_stream.generate import generate
from tests.conftest import Cli
from tests.reference import dense, error

QKV = ("d/q.zarr", "d/k.zarr", "d/v.zarr")
TOKENS = 1500
COVER_BYTES, LSE_BYTES = 2, 8 * 116  # of a row chunk of the run below
REGIONS = {
    "magic": 0,
    "version": 8,
    "finished": 12,
    "run": 20,
    "share": 48,
    "sum": 56,
    "lane": 64,
    "chunk": 72,
    "lengths": 80,
    "checksum of the numbers": 108,
    "padding": 3000,
    "checksum of the header": 4093,
    "cover": 4096,
    "lse": 4096 + COVER_BYTES + 11,
    "out": -5,
}


OPTIONS = ("--causal", "--chunks", 13, "--schedule", "cqs", "--device", "cpu", "--host-memory", "64MiB")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, a whole run, and one that was stopped half way: finished rows, and partials that hold numbers."""
    folder = tmp_path_factory.mktemp("kept")
    generate(folder / "d", tokens=TOKENS, heads=1, head_dim=32, dtype="float32")
    q, k, v = (folder / path for path in QKV)
    settings: Any = {"is_causal": True, "chunks": 13, "schedule": "cqs", "device": "cpu", "host_memory": "64MiB"}
    cqsa.attention(q, k, v, out=folder / "whole", **settings)
    left = iter([None] * 35)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cqsa_stream.run.stopping.Stopper.__call__", lambda *_: next(left, "stopped"))
        with pytest.raises(cqsa.RunStopped):
            cqsa.attention(q, k, v, out=folder / "out", **settings)
    sizes = [p.stat().st_size for p in (folder / "out.run/partials").iterdir()]
    assert min(sizes) == 4096 < max(sizes)
    return folder


@pytest.fixture
def half(kept: Path, tmp_path: Path) -> Path:
    """A copy of all that, in the folder where ``cli`` works."""
    shutil.copytree(kept, tmp_path, symlinks=True, dirs_exist_ok=True)
    return tmp_path


def run(cli: Cli, out: str) -> None:
    found = cli("run", *QKV, out, *OPTIONS)
    assert found.returncode == 0, found.stderr


def flip(file: Path, place: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)


def result(folder: Path, out: str = "out") -> tuple[np.ndarray, np.ndarray]:
    arrays = (zarr.open_array(folder / path, mode="r") for path in (out, f"{out}.run/lse.zarr"))
    output, lse = (np.asarray(array[...]) for array in arrays)
    return output, lse


def check_exact(folder: Path) -> None:
    """Compare with the uninterrupted run: to rounding, as merges may come in another order."""
    for found, expected in zip(result(folder), result(folder, "whole"), strict=True):
        assert error(torch.from_numpy(found), torch.from_numpy(expected)) < 1e-6


def test_the_reference_is_exact(half: Path) -> None:
    q, k, v = (torch.from_numpy(np.asarray(zarr.open_array(half / path, mode="r")[...])) for path in QKV)
    expected, _ = dense(q, k, v, causal=True)
    assert error(torch.from_numpy(result(half, "whole")[0]), expected) < 2e-6


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("region", REGIONS)
def test_each_region_of_a_partial(
    region: str, finished: bool, half: Path, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    place = REGIONS[region]
    if finished and not 0 <= place < 4096:
        pytest.skip("a finished row's partial is its header")
    file = next(p for p in sorted((half / "out.run/partials").iterdir()) if (p.stat().st_size == 4096) == finished)
    flip(file, place, 3)
    run(cli, "out")
    assert f"{file.name}: damaged" in caplog.text
    assert file.with_suffix(".damaged").exists()
    check_exact(half)
    assert json.loads(cli("verify", "out.run", "--json").stdout)["ok"]


def spoil_manifest(folder: Path) -> None:
    file = folder / "out.run/run.json"
    flip(file, file.read_bytes().index(b'"kind": "window"') + 9)


def spoil_state(folder: Path) -> None:
    file = folder / "out.run/state.json"
    flip(file, file.read_bytes().index(b'"host_memory": ') + 16)


def spoil_last_event(folder: Path) -> None:
    file = folder / "out.run/events.jsonl"
    flip(file, file.read_bytes().rindex(b'"session_s": ') + 13)


def spoil_output(folder: Path) -> None:
    flip(next(p for p in sorted((folder / "out/c").rglob("*")) if p.is_file()), 100)


def stale_output(folder: Path) -> None:
    """A chunk that is whole, but another's."""
    first, second = sorted(p for p in (folder / "out/c").rglob("*") if p.is_file())[:2]
    shutil.copy(first, second)


def spoil_lse(folder: Path) -> None:
    flip(next(p for p in (folder / "out.run/lse.zarr/c").rglob("*") if p.is_file()), 10)


def spoil_description(folder: Path) -> None:
    flip(folder / "out/zarr.json", 1)


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (spoil_output, "computed again"),
    (stale_output, "computed again"),
    (spoil_lse, "computed again"),
    (spoil_description, "written again"),
]


@pytest.mark.parametrize(("damage", "word"), DAMAGES, ids=[f.__name__ for f, _ in DAMAGES])
@pytest.mark.parametrize("complete", [False, True])
def test_other_files(
    damage: Callable[[Path], None], word: str, complete: bool, half: Path, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    if complete:
        run(cli, "out")
    damage(half)
    if damage in (spoil_output, stale_output, spoil_lse):
        assert cli("verify", "out.run", "--json").returncode == 1
    run(cli, "out")
    assert word in caplog.text
    check_exact(half)
    assert json.loads(cli("verify", "out.run", "--json").stdout)["ok"]


def test_the_manifest(half: Path, cli: Cli) -> None:
    """Nothing is resumed without it; put back as it was, the run goes on."""
    whole = (half / "out.run/run.json").read_bytes()
    spoil_manifest(half)
    found = cli("run", *QKV, "out", *OPTIONS)
    assert found.returncode == 2
    assert "run.json: unreadable" in found.stderr
    assert "put a copy of it back" in found.stderr
    (half / "out.run/run.json").write_bytes(whole)
    run(cli, "out")
    check_exact(half)


def test_the_state(half: Path, cli: Cli, caplog: pytest.LogCaptureFixture) -> None:
    spoil_state(half)
    run(cli, "out")
    assert "state.json: damaged" in caplog.text
    check_exact(half)
    caplog.clear()
    assert json.loads(cli("verify", "out.run", "--json").stdout)["ok"]
    assert not caplog.records, "it was written again"


def test_the_last_event(half: Path, cli: Cli) -> None:
    before = json.loads(cli("status", "out.run", "--json").stdout)
    spoil_last_event(half)
    assert json.loads(cli("status", "out.run", "--json").stdout)["pairs_done"] == before["pairs_done"]
    run(cli, "out")
    check_exact(half)


def check_flips(half: Path, cli: Cli, count: int, chance: random.Random) -> dict[str, int]:
    """Flip a bit of a random byte of a run half way, finish the run, compare; again and again. Return what was met."""
    kept, met = half / "kept", {"exact": 0, "refused": 0}
    for name in ("out", "out.run"):
        shutil.copytree(half / name, kept / name, symlinks=True)
    for _ in range(count):
        for name in ("out", "out.run"):
            shutil.rmtree(half / name)
            shutil.copytree(kept / name, half / name, symlinks=True)
        files = sorted(p for name in ("out", "out.run") for p in (half / name).rglob("*") if p.is_file())
        chosen = chance.choice([p for p in files if p.stat().st_size])
        flip(chosen, chance.randrange(chosen.stat().st_size), chance.randrange(8))
        found = cli("run", *QKV, "out", *OPTIONS)
        if found.returncode == 0:
            check_exact(half)
            met["exact"] += 1
        else:
            assert len(found.stderr.strip().splitlines()) == 1, found.stderr
            met["refused"] += 1
    return met


def test_random_bit_flips(half: Path, cli: Cli) -> None:
    assert check_flips(half, cli, 20, random.Random(0))["exact"] > 10


@pytest.mark.slow
def test_five_hundred_bit_flips(half: Path, cli: Cli) -> None:
    met = check_flips(half, cli, 500, random.Random(1))
    print(f"\n{met}")
    assert met["exact"] > 450
