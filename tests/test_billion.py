"""Sequences of up to 2^40 tokens: numbers stay exact, memory and files do not grow, what is not needed is not read."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
import torch

import cqsa_stream as cqsa
from cqsa_stream.events import Event, Figures
from cqsa_stream.run import opened
from cqsa_stream.run.inputs import reopen_inputs
from cqsa_stream.schedulers.grid import Axis, Grid
from cqsa_stream.schedulers.masks.bands import Mask
from cqsa_stream.schedulers.masks.window import CAUSAL, last_keys
from cqsa_stream.schedulers.runs import Runs
from cqsa_stream.storage import atomic
from tests.conftest import ROOT, Cli, environment
from tests.reference import error

MOST = 2**40
HEADS, DIM = 2, 16


def sparse(path: Path, tokens: int, last: np.ndarray, chunk: int = 4_096) -> Path:
    """Create a compressed array of so many tokens of which only the last are stored; the others are zeros."""
    metadata = {
        "shape": [1, last.shape[1], tokens, last.shape[3]],
        "data_type": str(last.dtype),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 1, chunk, last.shape[3]]}},
        "codecs": [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 1}}],
    }
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}, "metadata": metadata}
    array = ts.open(spec, create=True).result()
    array[:, :, tokens - last.shape[2] :].write(last).result()
    return path


def holes(path: Path, shape: Sequence[int], dtype: str = "float16") -> Path:
    """Create a .npy file of zeros that takes no room on disk."""
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=tuple(shape)).flush()
    return path


def figures_of(q: Path, k: Path, v: Path, **options: Any) -> Figures:
    """Return the last figures of a run."""
    seen: list[Figures] = []

    def note(event: Event) -> None:
        seen.append(event.figures)

    cqsa.attention(q, k, v, device="cpu", observers=[note], **options)
    return seen[-1]


@pytest.fixture
def ends(tmp_path: Path) -> dict[str, np.ndarray]:
    """The last rows of arrays of 2^40 tokens, as q.zarr, k.zarr and v.zarr."""
    generator = np.random.default_rng(0)
    found = {name: generator.standard_normal((1, HEADS, 5_000, DIM), np.float32) for name in "qkv"}
    for name, rows in found.items():
        sparse(tmp_path / f"{name}.zarr", MOST, rows)
    return found


@pytest.mark.parametrize("documents", [False, True])
def test_the_end_of_a_trillion_tokens(ends: dict[str, np.ndarray], tmp_path: Path, *, documents: bool) -> None:
    mask: dict[str, Any] = {"window": 512}
    i, j = torch.arange(5_000)[:, None], torch.arange(5_000)
    seen = (j <= i) & (j > i - 512)
    if documents:
        mask = {"mask": cqsa.masks.Documents(np.array([0, MOST - 1_500, MOST - 1_100, MOST])), "window": 512}
        of = torch.searchsorted(torch.tensor([3_500, 3_900]), torch.arange(5_000), right=True)
        seen &= of[:, None] == of
    found, lse = cqsa.attention(
        tmp_path / "q.zarr", tmp_path / "k.zarr", tmp_path / "v.zarr", queries=(MOST - 3_000, MOST),
        out=tmp_path / "out.zarr", fill_missing=True, device="cpu", host_memory="256MiB", return_lse=True, **mask,
    )  # fmt: skip
    q, k, v = (torch.from_numpy(ends[name]).double() for name in "qkv")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)[:, :, -3_000:]
    assert error(torch.from_numpy(found.read().result()), expected) < 1e-6
    scores = (q @ k.mT * DIM**-0.5).masked_fill(~seen, -torch.inf)[:, :, -3_000:]
    torch.testing.assert_close(torch.from_numpy(lse.read().result()).double(), scores.logsumexp(-1), rtol=0, atol=1e-5)
    status = cqsa.open_run(tmp_path / "out.zarr").status()
    assert (status["complete"], status["pairs_done"]) == (True, status["pairs_total"])
    stored = 3 * HEADS * 2 * 4_096 * DIM * 4
    assert status["bytes_read"] <= 4 * stored, "a column chunk is long here; its blocks that no row sees are not read"


def test_a_query_far_behind_its_keys(tmp_path: Path) -> None:
    q, k, v = (torch.randn(1, 1, 300, DIM) for _ in range(3))
    found = cqsa.attention(q, k, v, is_causal=True, q_start=MOST, device="cpu")
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert error(found, expected) < 1e-6
    _, lse = cqsa.attention(q, k, v, window=100, q_start=MOST, device="cpu", return_lse=True)
    assert bool(lse.isneginf().all()), "no key is so near"


def test_scores_are_counted_exactly() -> None:
    everywhere = range(MOST)
    assert CAUSAL.over(everywhere, MOST).scores(everywhere, everywhere) == MOST * (MOST + 1) // 2
    assert last_keys(512).over(everywhere, MOST).scores(everywhere, everywhere) == 512 * MOST - 512 * 511 // 2
    half = cqsa.masks.Documents([0, MOST // 2, MOST]).over(everywhere, MOST)
    assert half.scores(everywhere, everywhere) == 2 * (MOST // 2) ** 2
    mask = last_keys(700).over(range(5_000), 5_000)
    moved = mask.shifted(MOST, MOST)
    rows, columns = range(1_000, 3_000), range(900, 2_500)
    far = (range(part.start + MOST, part.stop + MOST) for part in (rows, columns))
    assert moved.scores(*far) == mask.scores(rows, columns) > 0


@pytest.mark.parametrize(
    "words", [["--causal"], ["--window", 4_096], ["--causal", "--queries", f"{MOST - 1024}:{MOST}"]]
)
def test_a_plan_of_a_trillion_tokens(cli: Cli, words: list[object]) -> None:
    shape = ["--shape", f"1,1,{MOST},64", "--device", "cpu", "--host-memory", "128GiB", *words]
    found = json.loads(cli("plan", *shape, "--json").stdout)
    rows = 1024 if "--queries" in words else MOST
    scores = {"--causal": MOST * (MOST + 1) // 2, "--window": 4_096 * MOST - 4_096 * 4_095 // 2}[str(words[0])]
    if rows == 1024:
        scores = sum(range(MOST - 1023, MOST + 1))
    assert found["flops"] == 4 * 64 * scores
    assert found["fits"]
    assert found["seconds"] > 0
    assert found["bytes_read"] >= 2 * 2 * 64 * MOST
    assert found["column_chunks"] <= 100_000
    assert cli("plan", *shape).returncode == 0


def test_figures_of_a_billion_by_a_billion_are_figures(tmp_path: Path) -> None:
    """Ten hours of a GPU are 2^64 floating-point operations; what is left of them is told by them."""
    q = torch.randn(1, 1, 2_000, DIM).numpy()
    np.save(tmp_path / "q.npy", q)
    path = tmp_path / "q.npy"
    with pytest.raises(cqsa.RunStopped):
        cqsa.attention(path, path, path, out=tmp_path / "out.zarr", device="cpu", max_seconds=0)
    session = tmp_path / "out.zarr.run/session.json"
    found = json.loads(session.read_text())
    session.write_text(json.dumps({**found, "session_flops": 2**66, "session_s": 36_000.0}))
    status = cqsa.open_run(tmp_path / "out.zarr").status()
    assert status["session_flops"] == 2**66
    assert status["eta_s"] == pytest.approx(status["flops_total"] * 36_000 / 2**66)


def test_memory_does_not_grow_with_the_keys(tmp_path: Path) -> None:
    """64 queries over 2^14 and 2^22 keys, which are holes in files; each stored range is read as it comes."""
    held = {}
    queries = holes(tmp_path / "q.npy", (1, 1, 64, DIM))
    for keys in (2**14, 2**22):
        array = holes(tmp_path / f"{keys}.npy", (1, 1, keys, DIM))
        inputs = {"q": queries, "k": array, "v": array}
        figures = figures_of(**inputs, out=tmp_path / f"{keys}.zarr", host_memory="64MiB", q_start=keys, is_causal=True)
        held[keys] = figures.host_peak_bytes
        assert figures.bytes_read >= 2 * keys * DIM * 2
    assert held[2**22] <= held[2**14] + (6 << 20), "256 times the keys"


def test_files_of_partials_do_not_grow_with_the_keys(tmp_path: Path) -> None:
    """What says which keys a partial holds is a bit for each column chunk: these get longer, not more."""
    for keys, most in ((2**28, 10_303), (2**30, 10_303), (2**34, 10_303), (2**40, 100_000)):
        query, key = (cqsa.Shape((1, 1, rows, DIM), "float16") for rows in (64, keys))
        plan = cqsa.plan(query, key, key, device="cpu", host_memory="1GiB")
        assert most // 2 < plan.grid.columns.chunks <= most
        assert plan.cost.bytes_read > 2 * keys * DIM * 2


def test_blocks_that_no_row_sees_are_not_used() -> None:
    axis = Axis.cut(7_000, 7)
    mask = last_keys(100).over(range(7_000), 7_000)
    grid = Grid(axis, axis, mask, True)
    size = axis.chunk_tokens
    assert list(grid.blocks(1, [2], 256)) == [range(size + 768, 2 * size)], "the last keys of the chunk before"
    assert [block.start for block in grid.blocks(2, [2], 256)] == list(range(2 * size, 3 * size, 256))
    assert list(grid.blocks(5, [1], 256)) == []
    everything = Grid(axis, axis, CAUSAL.over(range(7_000), 7_000), True)
    assert len(list(everything.blocks(0, [0, 3], 256))) == 4
    runs = Runs([range(0, 10), range(20, 30)])
    assert (runs.covers(range(2, 10)), runs.covers(range(2, 11)), runs.covers(range(12, 14))) == (True, False, False)
    assert (runs.meets(range(10, 20)), runs.meets(range(10, 21))) == (False, True)


def test_a_window_reads_what_it_sees_once(tmp_path: Path) -> None:
    tokens = 7 * 4_096
    generator = np.random.default_rng(0)
    rows = {name: generator.standard_normal((1, 1, tokens, DIM), np.float32) for name in "qkv"}
    inputs = {name: sparse(tmp_path / f"{name}.zarr", tokens, array, 256) for name, array in rows.items()}
    figures = figures_of(**inputs, out=tmp_path / "out.zarr", window=64, chunks=7, host_memory="26MiB")
    assert figures.bytes_read <= 1.4 * 3 * tokens * DIM * 4, (
        "the chunk before a row chunk is not read again, but its end"
    )
    assert cqsa.open_run(tmp_path / "out.zarr").verify(rows=32).ok


def test_a_plan_keeps_no_blocks_that_nobody_reads_again(tmp_path: Path) -> None:
    query, key = (cqsa.Shape((1, 1, rows, 32), "float16") for rows in (1_024, 2**30))
    plan = cqsa.plan(query, key, key, is_causal=True, q_start=2**30 - 1_024, device="cpu", host_memory="8GiB")
    assert plan.layout.cache_slots == 0
    assert plan.cost.bytes_read >= 2 * 2**30 * 64
    assert plan.footprint.host_bytes < 64 << 20


def test_verify_reads_each_stored_chunk_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 40_000
    generator = np.random.default_rng(0)
    rows = {name: generator.standard_normal((1, 1, tokens, DIM), np.float32) for name in "qkv"}
    q, k, v = (sparse(tmp_path / f"{name}.zarr", tokens, array, 16_384) for name, array in rows.items())
    cqsa.attention(
        q, k, v, fill_missing=True, queries=(39_000, 39_100), is_causal=True, out=tmp_path / "out.zarr", device="cpu"
    )
    arrays, before = {}, {}

    def remembered(*words: Any, **options: Any) -> Any:
        arrays.update(reopen_inputs(*words, **options))
        before.update({name: array.bytes_read for name, array in arrays.items()})
        return arrays

    monkeypatch.setattr(opened, "reopen_inputs", remembered)
    threads = torch.get_num_threads()
    assert cqsa.open_run(tmp_path / "out.zarr").verify(rows=8).ok
    assert torch.get_num_threads() == threads
    for name in ("key", "value"):
        assert arrays[name].bytes_read - before[name] <= 3 * 16_384 * DIM * 4


def test_a_long_report_tells_what_verify_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "q.npy", np.random.default_rng(0).standard_normal((1, 1, 500, DIM), np.float32))
    path = tmp_path / "q.npy"
    cqsa.attention(path, path, path, out=tmp_path / "out.zarr", device="cpu")
    run = cqsa.open_run(tmp_path / "out.zarr")
    monkeypatch.setattr(opened, "_KEYS_REPORTED", 100)
    assert "verify the run" in run.report()[0].read_text()
    assert run.verify(rows=7).ok
    assert "7 computed anew" in run.report()[0].read_text()
    for rows in ("many", 10**400):
        run.directory.append_event({**asdict(run.verify(rows=7)), "event": "verified", "rows": rows})
    assert "7 computed anew" in run.report()[0].read_text(), "what is no figure is left out"
    run.directory.append_event({"event": "started"})
    assert "verify the run" in run.report()[0].read_text(), "since then it was computed again"


def test_looking_at_a_run_loads_no_torch() -> None:
    code = "import sys; from cqsa_stream.run import standing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, check=False).returncode == 0


def test_few_directories_are_remembered(tmp_path: Path) -> None:
    for number in range(200):
        atomic.make_directory(tmp_path / str(number) / "0")
    assert len(atomic._durable) <= 64
    assert (tmp_path / "199/0").is_dir()


def test_the_masks_of_a_trillion_tokens_are_few_bands() -> None:
    for mask in (cqsa.masks.Chunked(2**38), cqsa.masks.Prefix(2**39), cqsa.masks.Strip(4, 2**20)):
        found = mask.over(range(MOST), MOST)
        assert isinstance(found, Mask)
        assert len(found) <= 8
        rows = range(MOST - 2, MOST)
        assert found.scores(rows, range(MOST)) == sum(found.scores(range(i, i + 1), range(MOST)) for i in rows) > 0
