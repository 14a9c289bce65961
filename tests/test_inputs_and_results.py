"""Writing inputs piece by piece, and reading results back as torch, numpy and xarray have them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cqsa_stream as cqsa
from tests.conftest import stopping_after

B, H, N, D = 2, 4, 300, 16
CPU: dict[str, Any] = {"device": "cpu", "host_memory": "64MiB"}


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def cut(length: int, sizes: list[int]) -> Iterator[slice]:
    start, turn = 0, 0
    while start < length:
        stop = min(length, start + sizes[turn % len(sizes)])
        yield slice(start, stop)
        start, turn = stop, turn + 1


@given(st.lists(st.integers(1, 200), min_size=1, max_size=5), st.booleans(), st.integers(0, 2**32))
def test_any_pieces_make_the_same_arrays(sizes: list[int], token_major: bool, place: int) -> None:
    import tempfile

    q, k, v = normal(B, H, N, D), normal(B, 2, N, D) + 1, normal(B, 2, N, 8) + 2
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("cqsa_stream.create._CHUNK_BYTES", 64 * D * 4)  # chunks of 64 tokens
        layout, shape = ("bthd", (B, N, H, D)) if token_major else ("bhtd", (B, H, N, D))
        with cqsa.create_inputs(folder, shape, "float32", layout, kv_heads=2, value_dim=8) as writer:
            for span in cut(N, sizes):
                pieces = [x[:, :, span] for x in (q, k, v)]
                writer.append(*(np.swapaxes(x, 1, 2) if token_major else x for x in pieces))
        for path, whole in zip(writer.paths, (q, k, v), strict=True):
            assert (zarr_values(path) == whole).all()


def zarr_values(path: Path) -> np.ndarray:
    import zarr

    found: np.ndarray = zarr.open_array(path, mode="r")[:]  # type: ignore[assignment]
    return found


def test_the_shape_may_be_head_first_in_either_layout(tmp_path: Path) -> None:
    q = torch.from_numpy(normal(1, N, H, D))
    for n, shape in enumerate(((1, N, H, D), (1, H, N, D))):
        with cqsa.create_inputs(tmp_path / str(n), shape, "float32", layout="bthd") as writer:
            writer.append(q, q, q)
        assert zarr_values(writer.paths[0]).shape == (1, H, N, D)


def test_from_a_model_to_a_result(tmp_path: Path) -> None:
    q, k, v = (torch.randn(1, heads, N, D, dtype=torch.bfloat16) for heads in (H, 2, 2))
    with cqsa.create_inputs(tmp_path, (1, H, N, D), torch.bfloat16, kv_heads=2) as writer:
        for span in cut(N, [7, 100]):
            writer.append(*(x[:, :, span] for x in (q, k, v)))
    cqsa.attention(*writer.paths, is_causal=True, enable_gqa=True, out=tmp_path / "o", **CPU)
    result = cqsa.open_result(tmp_path / "o")
    expected = cqsa.attention(q, k, v, is_causal=True, enable_gqa=True, device="cpu")
    assert result.torch().dtype == torch.bfloat16
    assert torch.equal(result.torch(), expected)
    assert result.numpy().dtype == ml_dtypes.bfloat16
    assert torch.equal(result.torch(queries=(5, 9)), expected[:, :, 5:9])
    named = cqsa.open_result(tmp_path / "o.run").xarray()
    assert named.dims == ("batch", "head", "token", "feature")
    assert named.shape == result.shape == (1, H, N, D)
    assert (named.values == result.numpy()).all()
    assert named.lse.dims == ("batch", "head", "token")
    assert repr(result) == f"<Result {tmp_path / 'o'}: [1, {H}, {N}, {D}] bfloat16>"


def test_a_result_without_its_run(tmp_path: Path) -> None:
    q = normal(1, 1, N, D)
    cqsa.attention(q, q, q, out=tmp_path / "o", **CPU)
    (tmp_path / "o").rename(tmp_path / "moved")
    result = cqsa.open_result(tmp_path / "moved")
    assert result.torch().shape == (1, 1, N, D)
    assert "lse" not in result.xarray().coords
    with pytest.raises(cqsa.InputError, match="run directory is not beside it"):
        result.lse()


def test_what_is_no_result(tmp_path: Path) -> None:
    q = normal(1, 2, 3000, D)
    with stopping_after(3), pytest.raises(cqsa.RunStopped):
        cqsa.attention(q, q, q, out=tmp_path / "o", chunks=7, **CPU)
    with pytest.raises(cqsa.InputError, match="row chunks are finished; resume the run first"):
        cqsa.open_result(tmp_path / "o")
    with pytest.raises(cqsa.InputError, match="no result and no run directory"):
        cqsa.open_result(tmp_path / "none")
    cqsa.attention(q, q, q, out=tmp_path / "o", **CPU)
    result = cqsa.open_result(tmp_path / "o")
    for queries in ((5, 4000), (1.5, 3), "0:10", (1, 2, 3)):
        with pytest.raises(cqsa.InputError, match="queries "):
            result.numpy(queries=queries)  # type: ignore[arg-type]


PIECE = normal(1, H, 5, D)
WRONG: dict[str, tuple[tuple[Any, Any, Any], str]] = {
    "other heads": ((normal(1, 3, 5, D), PIECE, PIECE), "query: a piece of"),
    "other tokens": ((PIECE, PIECE, normal(1, H, 6, D)), "value: a piece of"),
    "too many": ((normal(1, H, N + 1, D),) * 3, f"{N + 1} tokens; the array has {N}"),
    "dtype": ((PIECE.astype(np.float64),) * 3, "float64"),
    "rank": ((PIECE[0],) * 3, "4 axes"),
    "lists": (([1], [2], [3]), "found a list"),
}


@pytest.mark.parametrize(("pieces", "said"), WRONG.values(), ids=WRONG)
def test_pieces_that_do_not_fit(pieces: tuple[Any, Any, Any], said: str, tmp_path: Path) -> None:
    writer = cqsa.create_inputs(tmp_path, (1, H, N, D), "float32")
    with pytest.raises(cqsa.CqsaError, match=said):
        writer.append(*pieces)


def test_a_writer_is_closed_when_all_is_there(tmp_path: Path) -> None:
    writer = cqsa.create_inputs(tmp_path, (1, H, N, D), "float32")
    with pytest.raises(cqsa.InputError, match="0 of any tokens"):
        writer.close()
    writer.append(PIECE, PIECE, PIECE)
    with pytest.raises(cqsa.InputError, match=f"5 of {N} tokens were appended"):
        writer.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"shape": (1, H, N)}, "4 whole numbers"),
        ({"shape": (1, H, N, 1.5)}, "4 whole numbers"),
        ({"dtype": "int8"}, "int8"),
        ({"layout": "tbhd"}, "layout"),
    ],
)
def test_inputs_that_cannot_be_created(words: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(cqsa.CqsaError, match=said):
        cqsa.create_inputs(tmp_path, **{"shape": (1, H, N, D), "dtype": "float32", **words})


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "k.zarr").mkdir()
    with pytest.raises(cqsa.InputError, match=r"k\.zarr exists"):
        cqsa.create_inputs(tmp_path, (1, H, N, D), "float32")


def test_an_error_in_the_middle_is_not_hidden(tmp_path: Path) -> None:
    writer = cqsa.create_inputs(tmp_path, (1, H, N, D), "float32")

    def fail() -> None:
        with writer:
            writer.append(PIECE, PIECE, PIECE)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert writer.tokens == 5


def test_a_run_shows_itself(tmp_path: Path) -> None:
    q = normal(1, 1, N, D)
    cqsa.attention(q, q, q, out=tmp_path / "o", **CPU)
    run = cqsa.open_run(tmp_path / "o")
    assert repr(run).startswith(f"<Run {tmp_path / 'o.run'}: query 1 x 1 heads x 300 tokens")
    assert "pairs done>" in repr(run)


def test_a_piece_that_does_not_fit_creates_nothing(tmp_path: Path) -> None:
    writer = cqsa.create_inputs(tmp_path, (1, N, H, D), "float32", layout="bthd")
    wrong, right = normal(1, 5, 3, D), normal(1, N, H, D)
    with pytest.raises(cqsa.InputError, match="a piece of"):
        writer.append(wrong, wrong, wrong)
    assert not list(tmp_path.iterdir())
    writer.append(right, right, right)
    writer.close()


def test_a_write_that_fails_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cqsa_stream.storage.output import write as real

    writer, count = cqsa.create_inputs(tmp_path, (1, H, N, D), "float32"), 0

    def failing(target: Any, values: np.ndarray) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError("no")
        real(target, values)

    monkeypatch.setattr("cqsa_stream.create.write", failing)
    whole = normal(1, H, N, D)
    with pytest.raises(OSError, match="no"):
        writer.append(whole, whole, whole)
    with pytest.raises(cqsa.InputError, match="could not be written"):
        writer.append(whole, whole, whole)
    with pytest.raises(cqsa.InputError, match="could not be written"):
        writer.close()


def test_what_waits_in_memory_is_bounded(tmp_path: Path) -> None:
    writer = cqsa.create_inputs(tmp_path, (64, 128, 4_096, 64), "float32")
    piece = np.zeros((64, 128, 1, 64), np.float32)
    writer.append(piece, piece, piece)
    assert all(array._held.nbytes <= 64 << 20 for array in writer._arrays)


def test_an_incomplete_output_without_its_run(tmp_path: Path) -> None:
    q = normal(1, 2, 3000, D)
    with stopping_after(3), pytest.raises(cqsa.RunStopped):
        cqsa.attention(q, q, q, out=tmp_path / "o", chunks=7, run_dir=tmp_path / "elsewhere", **CPU)
    with pytest.raises(cqsa.InputError, match="not complete"):
        cqsa.open_result(tmp_path / "o")
    with pytest.raises(cqsa.InputError, match="3 axes"):
        cqsa.open_result(tmp_path / "elsewhere" / "lse.zarr")
