"""Files that lie: nothing hangs, no memory beyond the budget is taken, nothing outside the run directory is written."""

import copy
import hashlib
import json
import os
import re
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cqsa_stream as cqsa
from cqsa_stream.engine.meter import HostPeak
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.manifest import Manifest
from cqsa_stream.storage.atomic import temporary_name
from cqsa_stream.storage.open import open_array
from cqsa_stream.storage.output import create_array, write
from tests.conftest import ROOT, Cli

SHAPE = (1, 2, 700, 16)
NASTY: list[Any] = [
    None, True, False, -1, 0, 1, 7, 2**31, 2**53, 2**63, 2**70, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "0", "x" * 5000, "../../../outside", "/outside", "a\0b", "\ud800", [], [[]], [0] * 4, [1, 1, 2**40, 16], {},
    {"a": {}}, "bfloat16", "int8", "zstd", "http://127.0.0.1:1/x",
]  # fmt: skip
BUDGET_MIB = 64
HANG_S = 120
QKV = ("d/q.zarr", "d/k.zarr", "d/v.zarr")


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to everything in a JSON value."""
    yield before
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*before, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a copy in which something else stands at a path; what was there goes where new is the class ``list``."""
    if not path:
        return new
    found = copy.deepcopy(value)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    if new is list:
        del inner[path[-1]]
    else:
        inner[path[-1]] = copy.deepcopy(new)
    return found


def hostile(value: Any) -> st.SearchStrategy[Any]:
    """Draw JSON values with one to three things changed."""
    change = st.tuples(st.sampled_from(list(places(value))[1:]), st.sampled_from([*NASTY, list]))

    def apply(changes: list[tuple[tuple[Any, ...], Any]]) -> Any:
        found = value
        for path, new in changes:
            try:
                found = changed(found, path, new)
            except (KeyError, IndexError, TypeError):
                continue  # what it was in is gone
        return found

    return st.lists(change, min_size=1, max_size=3).map(apply)


def signed(fields: Any) -> bytes:
    """Return a manifest as one who knows how would forge it."""
    if isinstance(fields, dict):
        fields.pop("sha256", None)
        fields["sha256"] = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return json.dumps(fields).encode()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with inputs, and a run of them that has just begun."""
    folder = tmp_path_factory.mktemp("hostile") / "inner"
    folder.mkdir()
    for number, name in enumerate("qkv"):
        values = np.random.default_rng(number).standard_normal(SHAPE, np.float32)
        write(create_array(folder / name, SHAPE, "float32", (1, 1, 100, 16), "none"), values)
    q, k, v = (folder / name for name in "qkv")
    with pytest.raises(cqsa.RunStopped):
        cqsa.attention(q, k, v, out=folder / "out", max_seconds=0.0, chunks=13, device="cpu")
    return folder


def forge(stopped: Path, data: bytes) -> Path:
    """Put a manifest into a copy of the run."""
    folder = stopped / "forged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(stopped / "out.run", folder / "out.run", symlinks=True)
    (folder / "out.run/run.json").write_bytes(data)
    return folder


def outside(stopped: Path) -> dict[str, float]:
    """Return the files beside the forged run, and around it, with their times."""
    around = [*stopped.parent.rglob("*"), *Path("/").glob("outside*")]
    return {str(p): p.lstat().st_mtime for p in around if "forged" not in p.parts}


ANY_ERROR = (cqsa.CqsaError, cqsa.ArrayError, OSError)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_forged_manifests(data: st.DataObject, stopped: Path) -> None:
    fields = json.loads((stopped / "out.run/run.json").read_bytes())
    folder = forge(stopped, signed(data.draw(hostile(fields))))
    before, host, began = outside(stopped), HostPeak(), time.monotonic()
    try:
        run = cqsa.open_run(folder / "out.run")
        run.status()
        run.resume(max_seconds=0.0)
    except ANY_ERROR:
        pass
    assert outside(stopped) == before
    assert host.bytes() < BUDGET_MIB << 20
    assert time.monotonic() - began < HANG_S


@settings(max_examples=100)
@given(st.binary(max_size=2000) | st.recursive(st.none() | st.text() | st.floats(), st.lists).map(str).map(str.encode))
def test_manifests_of_any_bytes(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        Manifest.from_json(data)


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_a_manifest_with_chunks_longer_than_its_tokens(axis: str, stopped: Path) -> None:
    fields = json.loads((stopped / "out.run/run.json").read_bytes())
    fields[axis]["chunk_tokens"] = 1 << 31
    folder = forge(stopped, signed(fields))
    with pytest.raises(cqsa.InputError, match="a grid"):
        cqsa.open_run(folder / "out.run")


def test_a_manifest_nested_without_end(stopped: Path) -> None:
    folder = forge(stopped, b"[" * 500_000)
    with pytest.raises(cqsa.InputError, match="unreadable"):
        cqsa.open_run(folder / "out.run")


def test_a_manifest_without_end(stopped: Path) -> None:
    folder = forge(stopped, b" " * (3 << 20))
    with pytest.raises(cqsa.InputError, match="over 1048576 bytes"):
        cqsa.open_run(folder / "out.run")


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.lists(st.integers(0, 2**64 - 1), min_size=7, max_size=7), finished=st.integers(0, 255))
def test_forged_partials(fields: list[int], finished: int, stopped: Path) -> None:
    """Headers whose checksums are right, of the right run, that claim any lengths."""
    directory = RunDirectory(forge(stopped, (stopped / "out.run/run.json").read_bytes()) / "out.run")
    manifest = directory.manifest()
    head = struct.pack("<8sIB3x32s7QII", b"CQSAPART", 2, finished, manifest.run_hash, *fields, 0, 0).ljust(4092, b"\0")
    (directory.path / "partials/000-00-000000-000003.partial").write_bytes(head + struct.pack("<I", crc32c(head)))
    host = HostPeak()
    cover = directory.store(manifest).covers()[0].get(3, 0)
    assert cover in (0, None)
    assert cover == 0 or fields[:4] == [0, 0, 0, 3]
    assert host.bytes() < 8 << 20


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), codec=st.sampled_from(["none", "crc32c", "zstd"]))
def test_hostile_zarr_metadata(data: st.DataObject, codec: str, stopped: Path) -> None:
    place = stopped / f"hostile-{codec}"
    if not place.exists():
        write(create_array(place, SHAPE, "float32", (1, 1, 100, 16), codec), np.ones(SHAPE, np.float32))
        (place / "zarr.json").rename(place / "kept.json")
    fields = json.loads((place / "kept.json").read_bytes())
    (place / "zarr.json").write_text(json.dumps(data.draw(hostile(fields))))
    before, host, began = outside(stopped), HostPeak(), time.monotonic()
    try:
        open_array(place).check()
        out = stopped / "forged" / "hostile-out"
        shutil.rmtree(out.parent, ignore_errors=True)
        cqsa.attention(
            stopped / "q", stopped / "k", place, out=out, host_memory=f"{BUDGET_MIB}MiB", device="cpu", max_seconds=0.0
        )
    except ANY_ERROR:
        pass
    place.joinpath("zarr.json").unlink()
    after = outside(stopped)
    assert {p for p in after if p not in before} == set()
    assert host.bytes() < BUDGET_MIB << 20
    assert time.monotonic() - began < HANG_S


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("codec", ["none", "crc32c", "zstd"])
def test_zarr_metadata_that_claims_more_chunks_than_can_be_listed(codec: str, axis: int, tmp_path: Path) -> None:
    write(create_array(tmp_path / "a", SHAPE, "float32", (1, 1, 100, 16), codec), np.ones(SHAPE, np.float32))
    fields = json.loads((tmp_path / "a/zarr.json").read_bytes())
    fields["shape"][axis] = 1 << 40
    (tmp_path / "a/zarr.json").write_text(json.dumps(fields))
    host = HostPeak()
    with pytest.raises(cqsa.ArrayError, match="missing"):
        open_array(tmp_path / "a").check()
    assert host.bytes() < 8 << 20


def test_links_out_of_a_run_directory_are_refused(stopped: Path, tmp_path: Path) -> None:
    for name in ("partials", "lse.zarr", "events.jsonl", "run.json"):
        folder = forge(stopped, (stopped / "out.run/run.json").read_bytes())
        place = folder / "out.run" / name
        place.rename(tmp_path / name)
        place.symlink_to(tmp_path / name)
        with pytest.raises(cqsa.InputError, match="is a link"):
            cqsa.open_run(folder / "out.run").resume()


def test_fresh_removes_nothing_that_only_a_manifest_names(cli: Cli, tmp_path: Path) -> None:
    assert cli("generate", "d", "--tokens", 300, "--heads", 1, "--head-dim", 16).returncode == 0
    assert cli("run", *QKV, "out").returncode == 0
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    fields = json.loads((tmp_path / "out.run/run.json").read_bytes())
    for name in ("output", "lse"):
        (tmp_path / "out.run/run.json").write_bytes(signed({**fields, name: "../precious"}))
        cli("run", *QKV, "out", "--fresh")
        assert (precious / "file").read_text() == "mine"


def test_nothing_here_runs_what_a_file_says() -> None:
    """No pickle, no eval: not in the package, not by numpy's readers."""
    wrong = re.compile(r"\b(pickle|marshal|shelve|dill|joblib|eval|exec)\b|allow_pickle=True|torch\.load|yaml\.load")
    found = [
        f"{path.name}: {line}"
        for folder in ("cqsa_stream", "storage", "schedulers")
        for path in (ROOT / folder).glob("**/*.py")
        for line in path.read_text().splitlines()
        if wrong.search(line)
    ]
    assert found == []


def test_what_leads_out_of_the_output_is_refused(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("generate", "d", "--tokens", 300, "--heads", 1, "--head-dim", 16).returncode == 0
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "victim").write_text("mine")
    assert cli("run", *QKV, "out", "--max-seconds", 0, "--chunks", 7).returncode == 3
    for place in (tmp_path / "out/c", tmp_path / "out.run/lse.zarr/c"):
        shutil.rmtree(place, ignore_errors=True)
        place.symlink_to(outside)
        found = cli("run", *QKV, "out")
        assert found.returncode == 1
        assert "a link leads out" in found.stderr
        place.unlink()
    monkeypatch.setattr("secrets.token_hex", lambda _: "0123456789abcdef")
    temporary_name(tmp_path / "out.run/session.json").symlink_to(tmp_path / "victim")
    assert cli("run", *QKV, "out").returncode == 0
    assert list(outside.iterdir()) == []
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_forged_place_for_the_lse_is_refused(cli: Cli, tmp_path: Path) -> None:
    work = tmp_path / "a/b"
    assert cli("generate", "d", "--tokens", 300, "--heads", 1, "--head-dim", 16).returncode == 0
    assert cli("run", *QKV, work / "out", "--max-seconds", 0, "--chunks", 7).returncode == 3
    fields = json.loads((work / "out.run/run.json").read_bytes())
    (work / "out.run/run.json").write_bytes(signed({**fields, "lse": "../../../deep/lse"}))
    found = cli("run", *QKV, work / "out")
    assert found.returncode == 2
    assert "not beside the run directory" in found.stderr
    assert not (tmp_path / "deep").exists()


def test_pipes_and_devices_hang_nothing(cli: Cli, tmp_path: Path) -> None:
    assert cli("generate", "d", "--tokens", 300, "--heads", 1, "--head-dim", 16).returncode == 0
    assert cli("run", *QKV, "out").returncode == 0
    events = tmp_path / "out.run/events.jsonl"
    events.unlink()
    os.mkfifo(events)
    assert cli("status", "out.run").returncode == 0
    events.unlink()
    events.symlink_to("/dev/zero")
    assert cli("status", "out.run").returncode == 0
    events.unlink()
    partial = next((tmp_path / "out.run/partials").iterdir())
    partial.unlink()
    os.mkfifo(partial)
    assert cli("status", "out.run").returncode == 1


def test_forged_news(cli: Cli, tmp_path: Path) -> None:
    assert cli("generate", "d", "--tokens", 300, "--heads", 1, "--head-dim", 16).returncode == 0
    assert cli("run", *QKV, "out", "--max-seconds", 0, "--chunks", 7).returncode == 3
    (tmp_path / "out.run/session.json").write_text('{"host_peak_bytes": 1' + "0" * 400 + ', "pid": "x", "ended": 0}')
    for event in (
        {"event": "started", "options": {"checkpoint_every_s": "abc", "host_memory": [], "schedule": 7}, "plan": {}},
        {"event": "started", "options": [], "plan": {"seconds": "x", "schedule": {}}},
    ):
        with (tmp_path / "out.run/events.jsonl").open("a") as log:
            log.write(json.dumps(event) + "\n")
        assert cli("status", "out.run").returncode == 0
        assert cli("status", "out.run", "--json").returncode == 0
    found = cli("run", *QKV, "out")
    assert found.returncode == 0, found.stderr
