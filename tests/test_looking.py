"""Fingerprints that are taken while a run computes already: nothing is stored before they are known."""

import shutil
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import cqsa_stream as cqsa
from cqsa_stream.errors import ArrayError, MismatchError
from cqsa_stream.inputs import fingerprints, open_inputs
from cqsa_stream.run import looking
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.looking import Looking, known, opened_again
from cqsa_stream.storage.contract import TokenArray
from cqsa_stream.storage.open import open_array
from tests.masked import stored
from tests.reference import dense

SHAPE = (1, 2, 300, 16)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.randn(SHAPE) for name in "qkv"}


def attend(paths: list[str], out: Path, max_seconds: float | None = None) -> None:
    query, key, value = paths
    cqsa.attention(query, key, value, out=out, device="cpu", max_seconds=max_seconds)


def begun(tmp_path: Path, paths: list[str]) -> RunDirectory:
    """Return a run that was begun and ended before it knew its inputs, and so before anything was stored."""
    with pytest.raises(cqsa.RunStopped):
        attend(paths, tmp_path / "out", max_seconds=0)
    directory = RunDirectory(tmp_path / "out.run")
    shutil.rmtree(directory.path / "partials")
    directory.write_manifest(known(directory.manifest(), dict.fromkeys(("query", "key", "value"), "")))
    return directory


def test_a_run_that_ended_before_it_knew_its_inputs_takes_those_of_now(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    paths = stored(tmp_path, tensors)
    directory = begun(tmp_path, paths)
    others = stored(tmp_path / "others", {name: tensor + 1 for name, tensor in tensors.items()})
    with pytest.raises(cqsa.RunStopped):
        attend(others, tmp_path / "out", max_seconds=0)
    prints = fingerprints(open_inputs(*others))
    assert {name: about["fingerprint"] for name, about in directory.manifest().inputs.items()} == prints
    with pytest.raises(MismatchError, match="not the content"):
        attend(paths, tmp_path / "out")
    attend(others, tmp_path / "out")
    q, k, v = (tensor + 1 for tensor in tensors.values())
    expected, _ = dense(q, k, v, causal=False)
    found = torch.from_numpy(cqsa.open_run(tmp_path / "out.run").output().read().result())
    assert float((found - expected).norm() / expected.norm()) < 2e-6


def test_nothing_is_stored_before_they_are_known(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = stored(tmp_path, tensors)
    directory, arrays, go_on = begun(tmp_path, paths), open_inputs(*paths), threading.Event()

    def slowly(arrays: dict[str, TokenArray]) -> dict[str, str]:
        assert go_on.wait(60)
        return fingerprints(arrays)

    monkeypatch.setattr(looking, "fingerprints", slowly)
    manifest = directory.manifest()
    store = directory.store(manifest)
    store.prepare()
    with Looking(arrays, directory, manifest) as look:
        store.guard = look.wait
        thread = threading.Thread(target=store.of(0).finish, args=(0, 0, 0, 1))
        thread.start()
        assert thread.is_alive()
        assert not list(store.directory.glob("*.finished"))
        go_on.set()
        thread.join()
    assert list(store.directory.glob("*.finished"))
    assert directory.manifest().inputs["query"]["fingerprint"] == fingerprints(arrays)["query"]
    assert directory.manifest().run_hash == manifest.run_hash


def test_what_reading_them_raises_ends_the_run(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = stored(tmp_path, tensors)
    directory = begun(tmp_path, paths)

    def refuse(_: object) -> dict[str, str]:
        raise ArrayError("key: damaged")

    monkeypatch.setattr(looking, "fingerprints", refuse)
    store = directory.store(directory.manifest())
    store.prepare()
    with ExitStack() as held:
        store.guard = held.enter_context(Looking({}, directory, directory.manifest())).wait
        with pytest.raises(ArrayError, match="damaged"):
            store.finish(0, 0, 0, 1)
        with pytest.raises(ArrayError, match="damaged"):
            held.close()
    error = ValueError("another")
    Looking({}, directory, directory.manifest()).__enter__().__exit__(ValueError, error, None)


def test_only_local_arrays_of_which_any_range_can_be_read_are_opened_again(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = open_inputs(*stored(tmp_path, tensors))
    again = opened_again(arrays, "bhtd", fill_missing=False)
    assert again is not None
    assert fingerprints(again) == fingerprints(arrays)
    assert all(array is not arrays[name] for name, array in again.items())
    memory = open_inputs(*(tensor.numpy() for tensor in tensors.values()))
    assert opened_again(memory, "bhtd", fill_missing=False) is None
    monkeypatch.setattr(looking, "SMALL_BYTES", 100)
    assert opened_again(arrays, "bhtd", fill_missing=False) is None, (
        "reading them would hold memory that is not planned"
    )


def test_it_is_opened_again_as_it_was_opened(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads missing chunks as zeros must do so again."""
    arrays, opened = open_inputs(*stored(tmp_path, tensors)), []

    def opening(source: str, *, layout: str, fill_missing: bool) -> TokenArray:
        opened.append((source, layout, fill_missing))
        return open_array(source, layout=layout, fill_missing=fill_missing)

    monkeypatch.setattr(looking, "open_array", opening)
    assert opened_again(arrays, "bhtd", fill_missing=True) is not None
    assert opened == [(array.source, "bhtd", True) for array in arrays.values()]
