"""Arrays whose axes are [batch, token, head, feature] are read as what they are in our order."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from zarr.codecs import Crc32cCodec

from cqsa_stream.planning import _stored
from cqsa_stream.storage.dtypes import numpy_dtype
from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.fingerprint import fingerprint
from cqsa_stream.storage.open import TokenArray, open_array
from cqsa_stream.storage.readers import ranges, token_major
from cqsa_stream.storage.readers.plain import RawArray
from cqsa_stream.storage.readers.ranges import PAGE
from cqsa_stream.storage.readers.tensorstore import TensorStoreArray
from tests.test_arrays import CASES, FORMATS, Maker, by_tensorstore, by_zarr, memmap, npy, numbers, plain, read
from tests.test_arrays import served as served  # the servers that FORMATS needs

IN_FILES: dict[str, Maker] = {
    "npy": npy,
    "memory map": memmap,
    "plain file": plain,
    "safetensors": FORMATS["safetensors"][0],
}
IN_CHUNKS: dict[str, Maker] = {
    "raw": by_zarr(chunks=(1, 30, 4, 8), compressors=None),
    "zstd": by_zarr(chunks=(1, 30, 4, 8)),
    "crc32c": by_zarr(chunks=(2, 30, 4, 8), compressors=Crc32cCodec()),
    "sharded": by_zarr(chunks=(1, 30, 4, 8), shards=(1, 60, 12, 8)),
    "v2": by_zarr(chunks=(1, 30, 4, 8), zarr_format=2),
    "tensorstore": by_tensorstore("crc32c", (1, 30, 4, 8)),
    "in memory": lambda path, values: zarr.array(values, chunks=(1, 30, 4, 8)),
    "shards in memory": lambda path, values: zarr.create_array(
        {}, data=values, chunks=(1, 30, 4, 8), shards=(1, 60, 12, 8)
    ),
}
TOKENS, HEADS = 100, 12


def values_of(dtype: str = "float32", heads: int = HEADS) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, TOKENS, heads, 8), np.float32).astype(numpy_dtype(dtype))


def agree(array: TokenArray, values: np.ndarray, heads: range, tokens: range) -> None:
    for batch in range(values.shape[0]):
        expected = values[batch, tokens.start : tokens.stop, heads.start : heads.stop].swapaxes(0, 1)
        assert read(array, batch, heads, tokens).tobytes() == expected.tobytes()


def agree_with_the_prediction(array: TokenArray, group: int, tokens: range) -> None:
    """Read a range in all lanes of a batch; what was counted is what the plan counts."""
    before = array.bytes_read
    for first in range(0, array.shape[1], group):
        read(array, 1, range(first, first + group), tokens)
    assert array.bytes_read - before == _stored(array, group).fetched_bytes(tokens)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::zarr.errors.ZarrUserWarning")
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_contract(name: str, dtype: str, tmp_path: Path) -> None:
    values = numbers(dtype)  # of 3 tokens and 100 heads, seen so
    made = FORMATS[name][0](tmp_path, values)
    array = open_array(made, layout="bthd")
    assert array.shape == (2, 100, 3, 8)
    assert array.dtype == dtype
    assert array.source == open_array(made).source
    array.check()
    array.begin(in_flight=3)
    for heads, tokens in [(range(100), range(3)), (range(29, 91), range(1, 3)), (range(99, 100), range(2, 3))]:
        agree(array, values, heads, tokens)
    for group in (1, 4, 100):
        agree_with_the_prediction(array, group, range(3))
        agree_with_the_prediction(array, group, range(1, 2))
    assert fingerprint(array) == fingerprint(open_array(np.ascontiguousarray(values.swapaxes(1, 2))))


@pytest.mark.parametrize("name", IN_CHUNKS)
def test_ranges_inside_of_chunks(name: str, tmp_path: Path) -> None:
    values = values_of()
    array = open_array(IN_CHUNKS[name](tmp_path, values), layout="bthd")
    batches = 2 if name == "crc32c" else 1
    assert array.stored_chunk == (batches, 4, 30, 8)
    assert array.encoding == "compressed"
    array.check()
    for heads in (range(HEADS), range(4, 8), range(3, 5), range(11, 12)):
        for tokens in (range(TOKENS), range(31, 59), range(29, 91), range(99, 100)):
            agree(array, values, heads, tokens)
    for group in (1, 3, 4, 6, HEADS):
        for tokens in (range(TOKENS), range(31, 59), range(29, 91), range(99, 100)):
            agree_with_the_prediction(array, group, tokens)
    before = array.bytes_read
    read(array, 0, range(3, 5), range(85, 95))
    assert array.bytes_read - before == batches * (2 * 4) * (30 + 10) * 8 * 4, "two chunks of heads, two of tokens"


@pytest.mark.parametrize("past_cache", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("name", IN_FILES)
def test_files_are_read_in_slabs(
    name: str, dtype: str, past_cache: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype != "float32" and name in ("npy", "memory map"):
        pytest.skip("numpy has no name for it")
    if past_cache:
        monkeypatch.setattr("cqsa_stream.storage.readers.plain.CACHED_BYTES", -1)
    values = values_of(dtype)
    row_bytes = HEADS * 8 * values.itemsize
    monkeypatch.setattr(token_major, "_SLAB_BYTES", 7 * row_bytes + 5)
    array = open_array(IN_FILES[name](tmp_path, values), layout="bthd")
    assert isinstance(array, token_major.TokenMajorArray)
    assert (array.encoding, array.stored_chunk) == ("raw", (1, HEADS, 1, 8))
    assert array.staging_bytes >= 7 * row_bytes
    array.check()
    for in_flight in (1, 3):
        array.begin(in_flight)
        for heads in (range(HEADS), range(4, 8), range(11, 12)):
            for tokens in (range(TOKENS), range(29, 36), range(29, 91), range(99, 100)):
                agree(array, values, heads, tokens)
        for group in (1, 4, HEADS):
            agree_with_the_prediction(array, group, range(13, 77))
    before = array.bytes_read
    read(array, 0, range(2, 4), range(10, 20))
    assert array.bytes_read - before == 10 * row_bytes, "the rows of all heads"


def test_a_slab_is_never_longer_than_what_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lent: list[int] = []

    def watched(spare: list[np.ndarray], size: int) -> AbstractContextManager[np.ndarray]:
        lent.append(size)
        return ranges.lent(spare, size)

    monkeypatch.setattr(token_major, "lent", watched)
    monkeypatch.setattr(token_major, "_SLAB_BYTES", 10_000)
    array = open_array(plain(tmp_path, values_of()), layout="bthd")
    for in_flight in (1, 2, 3):
        array.begin(in_flight)
        read(array, 0, range(HEADS), range(TOKENS))
        assert lent[-1] + PAGE <= in_flight * array.staging_bytes, "rounded up to a page"
        assert len(token_major._spare) == 1
    before = token_major._spare[0]
    read(array, 1, range(HEADS), range(TOKENS))
    assert token_major._spare[0] is before, "memory is used again"
    array.begin(1)
    assert not token_major._spare


def test_one_head_is_read_straight_into_place(tmp_path: Path) -> None:
    values = values_of(heads=1)
    array = open_array(plain(tmp_path, values), layout="bthd")
    assert isinstance(array, RawArray)
    assert array.shape == (2, 1, TOKENS, 8)
    agree(array, values, range(1), range(17, 93))


def test_what_is_in_memory_is_not_copied(tmp_path: Path) -> None:
    values = values_of()
    for source in (values, torch.from_numpy(values)):
        array: Any = open_array(source, layout="bthd")
        assert np.shares_memory(array.values, values)
        agree(array, values, range(3, 9), range(5, 50))
    copied = np.load(npy(tmp_path, values), mmap_mode="c")
    copied[0, 0] = 5.0
    array = open_array(copied, layout="bthd")
    assert array.source == "memory"
    agree(array, copied, range(HEADS), range(TOKENS))


def test_a_missing_chunk_is_refused_and_filled(tmp_path: Path) -> None:
    path = IN_CHUNKS["raw"](tmp_path, values_of())
    (path / "c/0/1/2/0").unlink()
    array = open_array(path, layout="bthd")
    with pytest.raises(ArrayError, match=r"chunk of \[0:1, 8:12, 30:60, 0:8\] is missing"):
        array.check()
    with pytest.raises(ArrayError, match="missing"):
        read(array, 0, range(HEADS), range(TOKENS))
    filled = read(open_array(path, layout="bthd", fill_missing=True), 0, range(HEADS), range(TOKENS))
    assert not filled[8:, 30:60].any()


def test_a_short_file_is_refused(tmp_path: Path) -> None:
    path = npy(tmp_path, values_of())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ArrayError, match="truncated"):
        open_array(path, layout="bthd").check()


FLAT: dict[str, Maker] = {
    "npy": npy,
    "memory map": memmap,
    "numpy": lambda path, values: values,
    "torch": lambda path, values: torch.from_numpy(values),
    "zarr": lambda path, values: by_zarr(chunks=values.shape)(path, values),
    "zarr in memory": lambda path, values: zarr.array(values),
}


@pytest.mark.parametrize("shape", [(), (3, 5, 8), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("name", FLAT)
def test_other_than_four_axes_are_left_to_the_problem(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    source = FLAT[name](tmp_path, np.zeros(shape, np.float32))
    for layout in ("bhtd", "bthd"):
        assert open_array(source, layout=layout).shape == shape


@pytest.mark.parametrize("layout", ["bhdt", "", None, "BTHD"])
def test_another_layout_is_refused(layout: Any) -> None:
    with pytest.raises(ArrayError, match="expected one of bhtd, bthd"):
        open_array(values_of(), layout=layout)


def test_a_view_of_a_tensorstore(tmp_path: Path) -> None:
    values = values_of()
    opened = open_array(IN_CHUNKS["tensorstore"](tmp_path, values), layout="bthd")
    assert isinstance(opened, TensorStoreArray)
    found = TensorStoreArray.of_store(opened.store[:, :, 5:], fill_missing=False)
    assert read(found, 1, range(2, 7), range(20, 40)).tobytes() == (
        np.ascontiguousarray(values[1, 25:45, 2:7].swapaxes(0, 1)).tobytes()
    )
