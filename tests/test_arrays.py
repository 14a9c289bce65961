"""The contract that every token array passes. A new back end is one line in FORMATS."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import zarr

from cqsa_stream.storage.arrays import TokenArray, open_array
from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.fingerprint import fingerprint
from cqsa_stream.storage.output import create_array, open_for_writing, write
from cqsa_stream.storage.dtypes import numpy_dtype

SHAPE = (2, 3, 100, 8)
Maker = Callable[[Path, np.ndarray], Any]


def by_zarr(**options: Any) -> Maker:
    def make(path: Path, values: np.ndarray) -> Path:
        settings: dict[str, Any] = {"chunks": (1, 1, 30, 8), "config": {"write_empty_chunks": True}, **options}
        array = zarr.create_array(path / "a.zarr", shape=values.shape, dtype=values.dtype, **settings)
        array[...] = values
        return path / "a.zarr"

    return make


def by_tensorstore(codec: str, chunk: tuple[int, ...]) -> Maker:
    def make(path: Path, values: np.ndarray) -> Path:
        array = create_array(path / "a.zarr", values.shape, values.dtype.name, chunk, codec)
        write(array, values)
        return path / "a.zarr"

    return make


def npy(path: Path, values: np.ndarray) -> Path:
    np.save(path / "a.npy", values)
    return path / "a.npy"


def memmap(path: Path, values: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.load(npy(path, values), mmap_mode="r")
    return found


def tensor(path: Path, values: np.ndarray) -> torch.Tensor:
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)


FORMATS: dict[str, tuple[Maker, tuple[str, ...]]] = {
    "zarr v2 raw": (by_zarr(zarr_format=2, compressors=None), ("float32", "float16")),
    "zarr v2 zstd": (by_zarr(zarr_format=2), ("float32",)),
    "zarr v3 raw": (by_zarr(compressors=None), ("float32", "float16")),
    "zarr v3 zstd": (by_zarr(), ("float32",)),
    "zarr v3 sharded": (by_zarr(shards=(1, 3, 60, 8)), ("float16",)),
    "zarr v3 chunks of several heads": (by_zarr(chunks=(2, 2, 17, 8), compressors=None), ("float32",)),
    "zarr v3 chunks larger than the array": (by_zarr(chunks=(4, 4, 300, 8), compressors=None), ("float16",)),
    "zarr v3 split features": (by_zarr(chunks=(1, 1, 40, 4), compressors=None), ("float32",)),
    "tensorstore raw": (by_tensorstore("none", (1, 1, 30, 8)), ("float32", "bfloat16")),
    "tensorstore crc32c": (by_tensorstore("crc32c", (1, 1, 30, 8)), ("float32", "float16", "bfloat16")),
    "tensorstore zstd": (by_tensorstore("zstd", (2, 3, 100, 8)), ("bfloat16",)),
    "npy": (npy, ("float32", "float16")),
    "memory map": (memmap, ("float32",)),
    "numpy": (lambda path, values: values, ("float32", "bfloat16")),
    "torch": (tensor, ("float32", "float16", "bfloat16")),
    "zarr object": (lambda path, values: zarr.open_array(by_zarr()(path, values)), ("float32",)),
    "tensorstore object": (
        lambda path, values: open_for_writing(by_tensorstore("none", (1, 1, 30, 8))(path, values)),
        ("bfloat16",),
    ),
}
CASES = [(name, dtype) for name, (_, dtypes) in FORMATS.items() for dtype in dtypes]


def numbers(dtype: str) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE).astype(numpy_dtype(dtype))


def read(array: TokenArray, batch: int, heads: range, tokens: range) -> np.ndarray:
    buffer = np.full((len(heads), len(tokens), array.shape[3]), 7, numpy_dtype(array.dtype))
    array.read_into(batch, heads, tokens, buffer)
    return buffer


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_contract(name: str, dtype: str, tmp_path: Path) -> None:
    values = numbers(dtype)
    array = open_array(FORMATS[name][0](tmp_path, values))
    assert array.shape == SHAPE
    assert array.dtype == dtype
    assert len(array.stored_chunk) == 4
    assert array.staging_bytes >= 0
    array.check()
    for batch, heads, tokens in [
        (0, range(0, 3), range(0, 100)),
        (1, range(1, 3), range(29, 91)),
        (1, range(2, 3), range(99, 100)),
        (0, range(0, 1), range(30, 60)),
    ]:
        found = read(array, batch, heads, tokens)
        expected = values[batch, heads.start : heads.stop, tokens.start : tokens.stop]
        assert found.tobytes() == expected.tobytes()
    assert array.bytes_read >= (3 * 100 + 2 * 62 + 1 + 30) * 8 * values.itemsize
    other = open_array(values)
    assert fingerprint(array) == fingerprint(other)
    changed = values.copy()
    changed[1, 2, 50, 3] += 1
    assert fingerprint(open_array(changed)) != fingerprint(array)


def chunk_files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith((".z", "zarr")))


STORED = ["zarr v2 raw", "zarr v2 zstd", "zarr v3 raw", "zarr v3 zstd", "tensorstore crc32c"]


@pytest.mark.parametrize("name", STORED)
def test_a_missing_chunk_is_named(name: str, tmp_path: Path) -> None:
    path = FORMATS[name][0](tmp_path, numbers("float32"))
    chunk_files(path)[5].unlink()
    with pytest.raises(ArrayError, match=r"missing.*--fill-missing"):
        open_array(path).check()
    filled = open_array(path, fill_missing=True)
    filled.check()
    whole = read(filled, 0, range(3), range(100))
    assert np.isfinite(whole.astype(np.float32)).all()


@pytest.mark.parametrize("name", STORED)
def test_a_truncated_chunk_is_named(name: str, tmp_path: Path) -> None:
    path = FORMATS[name][0](tmp_path, numbers("float32"))
    file = chunk_files(path)[0]
    file.write_bytes(file.read_bytes()[:-3])
    array = open_array(path)

    def use() -> None:
        array.check()
        read(array, 0, range(3), range(100))

    with pytest.raises(ArrayError, match=path.name):
        use()


def test_a_flipped_bit_under_crc32c_is_refused(tmp_path: Path) -> None:
    path = FORMATS["tensorstore crc32c"][0](tmp_path, numbers("float32"))
    file = chunk_files(path)[0]
    data = bytearray(file.read_bytes())
    data[100] ^= 4
    file.write_bytes(data)
    with pytest.raises(ArrayError, match="fails its crc32c"):
        read(open_array(path), 0, range(3), range(100))


def test_a_short_npy_is_refused(tmp_path: Path) -> None:
    path = npy(tmp_path, numbers("float32"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ArrayError, match="truncated"):
        open_array(path).check()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nothing", "no such file"),
        (lambda p: p, "neither zarr.json nor .zarray"),
        (lambda p: (p / "x.txt", (p / "x.txt").write_text("hello"))[0], "no .npy"),
        (lambda p: (p / "x.npy", (p / "x.npy").write_text("hello"))[0], "not a readable .npy"),
        (lambda p: (p / "g", zarr.create_group(p / "g"))[0], "group"),
        (lambda p: [1, 2, 3], "found a builtins.list"),
        (lambda p: np.zeros((1, 1, 4, 8), ">f4"), "byte order"),
    ],
)
def test_what_is_no_array_is_refused(make: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArrayError, match=message):
        open_array(make(tmp_path))


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"zarr_format": 3, "shape": [1, 1, -5, 8]}', b'{"shape": 3}'])
def test_damaged_metadata_is_refused(damage: bytes, tmp_path: Path) -> None:
    path = FORMATS["zarr v3 raw"][0](tmp_path, numbers("float32"))
    (path / "zarr.json").write_bytes(damage)
    with pytest.raises(ArrayError):
        open_array(path)


def test_the_output_is_open_to_others(tmp_path: Path) -> None:
    path = FORMATS["tensorstore crc32c"][0](tmp_path, numbers("float32"))
    found = zarr.open_array(path, mode="r")
    assert found.metadata.dimension_names == ("batch", "head", "token", "feature")  # type: ignore[union-attr]
    np.testing.assert_array_equal(np.asarray(found[...]), numbers("float32"))


def test_zeros_are_stored_too(tmp_path: Path) -> None:
    path = FORMATS["tensorstore crc32c"][0](tmp_path, np.zeros(SHAPE, np.float32))
    assert len(chunk_files(path)) == 2 * 3 * 4
    open_array(path).check()


def test_nothing_is_created_over_an_array(tmp_path: Path) -> None:
    path = FORMATS["tensorstore raw"][0](tmp_path, numbers("float32"))
    with pytest.raises(ArrayError, match="EXISTS"):
        create_array(path, SHAPE, "float32", (1, 1, 30, 8))


def test_a_view_of_a_tensorstore_is_read_as_such(tmp_path: Path) -> None:
    values = numbers("float32")
    store = open_for_writing(FORMATS["tensorstore raw"][0](tmp_path, values))
    array = open_array(store[:, :, 10:60])
    assert array.shape == (2, 3, 50, 8)
    assert read(array, 1, range(3), range(5, 9)).tobytes() == values[1, :, 15:19].tobytes()
