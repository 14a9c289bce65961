"""The contract that every token array passes. A new back end is one line in FORMATS."""

import json
import multiprocessing
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numcodecs
import numpy as np
import pytest
import tensorstore as ts
import torch
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, GzipCodec, TransposeCodec

from cqsa_stream.storage.dtypes import numpy_dtype
from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.fingerprint import fingerprint
from cqsa_stream.storage.open import TokenArray, open_array
from cqsa_stream.storage.output import create_array, open_output, write
from cqsa_stream.storage.readers import ranges
from tests.servers import BUCKET, http_server, s3_server

SHAPE = (2, 3, 100, 8)
Maker = Callable[[Path, np.ndarray], Any]


def by_zarr(**options: Any) -> Maker:
    def make(path: Path, values: np.ndarray) -> Path:
        settings = {"dtype": values.dtype, "chunks": (1, 1, 30, 8), "config": {"write_empty_chunks": True}, **options}
        array = zarr.create_array(path / "a.zarr", shape=values.shape, **settings)
        array[...] = values
        return path / "a.zarr"

    return make


def by_tensorstore(codec: str, chunk: tuple[int, ...]) -> Maker:
    def make(path: Path, values: np.ndarray) -> Path:
        array = create_array(path / "a.zarr", values.shape, values.dtype.name, chunk, codec)
        write(array, values)
        return path / "a.zarr"

    return make


def by_n5(path: Path, values: np.ndarray) -> Path:
    metadata = {"dimensions": values.shape, "blockSize": [1, 1, 30, 8], "dataType": values.dtype.name,
                "compression": {"type": "gzip"}}  # fmt: skip
    spec = {"driver": "n5", "kvstore": {"driver": "file", "path": f"{path}/a.n5/"}, "metadata": metadata,
            "store_data_equal_to_fill_value": True}  # fmt: skip
    ts.open(spec, create=True).result().write(values).result()
    return path / "a.n5"


def by_dask(path: Path, values: np.ndarray) -> Path:
    chunked = pytest.importorskip("dask.array")
    chunked.to_zarr(chunked.from_array(values, chunks=(1, 3, 40, 8)), str(path / "a.zarr"))
    return path / "a.zarr"


def by_xarray(path: Path, values: np.ndarray) -> Path:
    xarray = pytest.importorskip("xarray")
    named = xarray.DataArray(values, dims=("batch", "head", "token", "feature"), name="a")
    named.to_dataset().to_zarr(path / "group.zarr", encoding={"a": {"chunks": (1, 1, 30, 8)}}, consolidated=False)
    return path / "group.zarr" / "a"


def by_sharding(inner: str, **more: Any) -> Maker:
    """Shards whose index stands at the start or the end, of inner chunks with the codecs of ``create_array``."""

    def make(path: Path, values: np.ndarray) -> Path:
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        codecs = {"none": [little], "crc32c": [little, {"name": "crc32c"}]}[inner]
        settings = {"chunk_shape": [1, 1, 10, 8], "codecs": codecs, **more}
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/a.zarr/"},
                "metadata": {"shape": values.shape, "data_type": values.dtype.name,
                             "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 3, 40, 8]}},
                             "codecs": [{"name": "sharding_indexed", "configuration": settings}]},
                "store_data_equal_to_fill_value": True}  # fmt: skip
        ts.open(spec, create=True).result().write(values).result()
        return path / "a.zarr"

    return make


def in_archive(path: Path, values: np.ndarray) -> Path:
    with zipfile.ZipFile(path / "a.zip", "w") as archive:
        made = by_zarr(zarr_format=2)(path, values)
        for file in sorted(p for p in made.rglob("*") if p.is_file()):
            archive.write(file, file.relative_to(made))
    return path / "a.zip"


def in_chained_archive(path: Path, values: np.ndarray) -> str:
    with zipfile.ZipFile(path / "b.zip", "w") as archive:
        made = by_zarr()(path, values)
        for file in sorted(p for p in made.rglob("*") if p.is_file()):
            archive.write(file, file.relative_to(path))
    return f"zip://a.zarr::file://{path}/b.zip"


def over_http(path: Path, values: np.ndarray) -> str:
    return f"{SERVED['http']}{by_zarr()(path, values)}"


def over_s3(path: Path, values: np.ndarray) -> str:
    pytest.importorskip("moto")
    folder = f"{path.name}/a.zarr"
    store = {"driver": "s3", "bucket": BUCKET, "path": f"{folder}/", "endpoint": SERVED["s3"],
             "aws_region": "us-east-1", "aws_credentials": {"type": "environment"}}  # fmt: skip
    spec = {"driver": "zarr3", "kvstore": store,
            "metadata": {"shape": values.shape, "data_type": values.dtype.name,
                         "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 1, 30, 8]}}},
            "store_data_equal_to_fill_value": True}  # fmt: skip
    ts.open(spec, create=True).result().write(values).result()
    return f"s3://{BUCKET}/{folder}"


SERVED: dict[str, str] = {}


@pytest.fixture(scope="module", autouse=True)
def served() -> Iterator[None]:
    with http_server() as url, s3_server() if find_spec("moto") else nullcontext("") as endpoint:
        SERVED.update(http=url, s3=endpoint)
        yield


def in_safetensors(path: Path, values: np.ndarray) -> str:
    tensors = {"other": torch.ones(3), "keys.0": tensor(path, values).contiguous()}
    pytest.importorskip("safetensors.torch").save_file(tensors, path / "model.safetensors")
    return f"{path}/model.safetensors#keys.0"


def plain(path: Path, values: np.ndarray) -> str:
    (path / "a.bin").write_bytes(values.tobytes())
    return f"{path}/a.bin#{values.dtype.name}:{','.join(map(str, values.shape))}"


def plain_map(path: Path, values: np.ndarray) -> np.ndarray:
    return np.memmap(plain(path, values).partition("#")[0], values.dtype, "r", shape=values.shape)


def part_of_a_map(path: Path, values: np.ndarray) -> np.ndarray:
    np.save(path / "b.npy", np.concatenate([values, values[::-1]]))
    mapped: np.ndarray = np.load(path / "b.npy", mmap_mode="r")
    return mapped[:2]


def npy(path: Path, values: np.ndarray) -> Path:
    np.save(path / "a.npy", values)
    return path / "a.npy"


def memmap(path: Path, values: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.load(npy(path, values), mmap_mode="r")
    return found


def tensor(path: Path, values: np.ndarray) -> torch.Tensor:
    if values.dtype.kind == "V" or values.dtype == ml_dtypes.bfloat16:
        plain = values.view(np.uint16 if values.itemsize == 2 else np.uint8)
        return torch.from_numpy(plain).view(getattr(torch, values.dtype.name))
    return torch.from_numpy(values)


FORMATS: dict[str, tuple[Maker, tuple[str, ...]]] = {
    "zarr v2 raw": (by_zarr(zarr_format=2, compressors=None), ("float64", "float32", "float16")),
    "zarr v2 blosc": (by_zarr(zarr_format=2, compressors=numcodecs.Blosc()), ("float32",)),
    "zarr v2 Fortran order": (by_zarr(zarr_format=2, order="F"), ("float32",)),
    "zarr v2 Fortran order raw": (by_zarr(zarr_format=2, order="F", compressors=None), ("float16",)),
    "zarr v2 big endian": (by_zarr(zarr_format=2, dtype=">f4", compressors=None), ("float32",)),
    "zarr v3 big endian": (by_zarr(serializer=BytesCodec(endian="big"), compressors=None), ("float32",)),
    "zarr v3 gzip": (by_zarr(compressors=GzipCodec()), ("float32",)),
    "zarr v3 crc32c": (by_zarr(compressors=Crc32cCodec()), ("float32",)),
    "zarr v3 transposed": (
        by_zarr(filters=TransposeCodec(order=(3, 1, 0, 2)), compressors=None),
        ("float32",),
    ),
    "zarr v3 v2 keys": (by_zarr(chunk_key_encoding={"name": "v2", "separator": "."}, compressors=None), ("float32",)),
    "n5": (by_n5, ("float32",)),
    "dask": (by_dask, ("float32",)),
    "xarray": (by_xarray, ("float32",)),
    "shards": (by_sharding("none"), ("float32", "bfloat16", "float8_e5m2")),
    "shards with crc32c": (by_sharding("crc32c"), ("float32", "bfloat16")),
    "shards with the index first": (by_sharding("crc32c", index_location="start"), ("float16",)),
    "zip": (in_archive, ("float32",)),
    "zip by a chain": (in_chained_archive, ("float16",)),
    "http": (over_http, ("float32",)),
    "s3": (over_s3, ("float32", "bfloat16")),
    "safetensors": (in_safetensors, ("float32", "bfloat16", "float8_e4m3fn")),
    "plain file": (plain, ("float32", "bfloat16", "float8_e5m2", "float64")),
    "plain memory map": (plain_map, ("float32",)),
    "part of a memory map": (part_of_a_map, ("float32",)),
    "zarr in memory": (lambda path, values: zarr.array(values, chunks=(1, 1, 30, 8)), ("float32", "bfloat16")),
    "zarr v2 zstd": (by_zarr(zarr_format=2), ("float32",)),
    "zarr v3 raw": (by_zarr(compressors=None), ("float32", "float16")),
    "zarr v3 zstd": (by_zarr(), ("float32",)),
    "zarr v3 sharded": (by_zarr(shards=(1, 3, 60, 8)), ("float16",)),
    "zarr v3 chunks of several heads": (by_zarr(chunks=(2, 2, 17, 8), compressors=None), ("float32",)),
    "zarr v3 chunks larger than the array": (by_zarr(chunks=(4, 4, 300, 8), compressors=None), ("float16",)),
    "zarr v3 split features": (by_zarr(chunks=(1, 1, 40, 4), compressors=None), ("float32",)),
    "tensorstore raw": (by_tensorstore("none", (1, 1, 30, 8)), ("float32", "bfloat16")),
    "tensorstore crc32c": (
        by_tensorstore("crc32c", (1, 1, 30, 8)),
        ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    ),
    "tensorstore crc32c, several heads": (by_tensorstore("crc32c", (2, 2, 30, 8)), ("float32",)),
    "tensorstore zstd": (by_tensorstore("zstd", (2, 3, 100, 8)), ("bfloat16",)),
    "npy": (npy, ("float32", "float16")),
    "memory map": (memmap, ("float32",)),
    "numpy": (lambda path, values: values, ("float32", "bfloat16")),
    "torch": (tensor, ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn")),
    "zarr object": (lambda path, values: zarr.open_array(by_zarr()(path, values)), ("float32",)),
    "tensorstore object": (
        lambda path, values: open_output(by_tensorstore("none", (1, 1, 30, 8))(path, values)),
        ("bfloat16",),
    ),
}
CASES = [(name, dtype) for name, (_, dtypes) in FORMATS.items() for dtype in dtypes]


def numbers(dtype: str) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32).astype(numpy_dtype(dtype))


def read(array: TokenArray, batch: int, heads: range, tokens: range) -> np.ndarray:
    buffer = np.full((len(heads), len(tokens), array.shape[3]), 7, numpy_dtype(array.dtype))
    array.read_into(batch, heads, tokens, buffer)
    return buffer


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::zarr.errors.ZarrUserWarning")
@pytest.mark.parametrize("past_cache", [False, True])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_contract(name: str, dtype: str, past_cache: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, once as small arrays are read and once as large ones are: past the page cache."""
    if past_cache:
        for module in ("plain", "zarr_plain"):
            monkeypatch.setattr(f"cqsa_stream.storage.readers.{module}.CACHED_BYTES", -1)
    values = numbers(dtype)
    array = open_array(FORMATS[name][0](tmp_path, values))
    assert array.shape == SHAPE
    assert array.dtype == dtype
    assert len(array.stored_chunk) == 4
    assert array.staging_bytes >= 0
    array.check()
    array.begin(in_flight=3)
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
    lead = array.lead(1, range(2, 3), range(29, 91))
    assert 0 <= lead < 4096
    assert lead % 64 == 0
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
    with pytest.raises(ArrayError, match=r"missing.*fill_missing=True"):
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


WITH_CRC = ["tensorstore crc32c", "tensorstore crc32c, several heads", "shards with crc32c"]


@pytest.mark.parametrize("name", WITH_CRC)
@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_flipped_bit_under_crc32c_is_refused(name: str, place: int, tmp_path: Path) -> None:
    path = FORMATS[name][0](tmp_path, numbers("float32"))
    file = chunk_files(path)[0]
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)
    for tokens in (range(3, 5), range(100)):
        with pytest.raises(ArrayError, match=r"a\.zarr/c/0/0/0/0.*fails its crc32c.*again"):
            read(open_array(path), 0, range(3) if tokens.start == 0 else range(1), tokens)


@pytest.mark.parametrize("name", ["zarr v3 raw", "tensorstore crc32c", "shards", "npy"])
@pytest.mark.parametrize("change", [-4, 4])
def test_a_file_of_another_length_is_refused(name: str, change: int, tmp_path: Path) -> None:
    if name == "npy" and change > 0:
        return  # numpy too takes what follows for somebody else's
    path = FORMATS[name][0](tmp_path, numbers("float32"))
    array = open_array(path)
    file = path if path.is_file() else chunk_files(path)[0]
    data = file.read_bytes()
    file.write_bytes(data[:change] if change < 0 else data + b"more")
    for use in (lambda: array.check(), lambda: read(array, 0, range(3), range(100))):
        with pytest.raises(ArrayError, match=r"a\.(zarr/c/0/0/0/0|npy): .*(expected|crc32c).*again"):
            use()


@pytest.mark.parametrize("name", ["zarr v3 raw", "zarr v3 zstd", "shards", "zarr in memory"])
def test_a_missing_chunk_is_refused_in_reading_too(name: str, tmp_path: Path) -> None:
    made = FORMATS[name][0](tmp_path, numbers("float32"))
    if isinstance(made, Path):
        array = open_array(made)
        chunk_files(made)[0].unlink()
        with pytest.raises(ArrayError, match=r"missing"):
            read(array, 0, range(3), range(100))
    else:
        empty = zarr.create_array({}, shape=SHAPE, chunks=(1, 1, 30, 8), dtype="float32")
        empty[:, :, :90] = 1
        with pytest.raises(ArrayError, match=r"6 stored chunks are missing.*fill_missing=True"):
            open_array(empty).check()


def test_a_missing_inner_chunk_is_named(tmp_path: Path) -> None:
    settings: Any = {"chunks": (1, 1, 10, 8), "shards": (1, 3, 40, 8), "compressors": None}
    array = zarr.create_array(tmp_path / "a.zarr", shape=SHAPE, dtype="float32", **settings)
    array[:, :, :90] = numbers("float32")[:, :, :90]
    found = open_array(tmp_path / "a.zarr")
    assert found.encoding == "raw"
    with pytest.raises(ArrayError, match=r"inner chunk .* is missing"):
        found.check()
    with pytest.raises(ArrayError, match=r"inner chunk .* is missing"):
        read(found, 0, range(3), range(85, 100))


def test_a_damaged_index_of_a_shard_is_refused(tmp_path: Path) -> None:
    path = FORMATS["shards"][0](tmp_path, numbers("float32"))
    file = chunk_files(path)[0]
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArrayError, match=r"index of the shard fails its crc32c"):
        open_array(path).check()


@pytest.mark.parametrize("name", ["zarr v3 raw", "tensorstore crc32c", "zarr v3 zstd", "npy"])
def test_what_may_not_be_read_is_told(name: str, tmp_path: Path) -> None:
    """As root nothing is forbidden, so another user tries."""
    with tempfile.TemporaryDirectory() as folder:
        path = FORMATS[name][0](Path(folder), numbers("float32"))
        array, file = open_array(path), path if path.is_file() else chunk_files(path)[0]
        file.chmod(0)
        Path(folder).chmod(0o755)
        me = os.geteuid()
        try:
            if me == 0:
                os.seteuid(65534)
            with pytest.raises(ArrayError, match=r"(?i)a\.(zarr|npy).*permission"):
                read(array, 0, range(3), range(100))
        finally:
            os.seteuid(me)


def test_a_server_that_does_not_answer_is_told_soon() -> None:
    with pytest.raises(ArrayError, match=r"http://127\.0\.0\.1:9/a\.zarr"):
        open_array("http://127.0.0.1:9/a.zarr")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ftp://host/a.zarr", "ftp:// is not known"),
        ("tar://a::file:///b.tar", "tar:: is not known"),
        ("{}/model.safetensors#none", "no tensor of this name.*keys.0, other"),
        ("{}/model.safetensors", "no tensor of this name"),
        ("{}/model.safetensors#other", None),
        ("{}/a.bin#int8:1,2", "dtype and a shape"),
        ("{}/a.bin#float32:1,2,x", "dtype and a shape"),
        ("{}/a.bin", "as a.bin#bfloat16:1,8,4096,64"),
        ("{}/broken.safetensors#a", "not a readable .safetensors"),
        ("{}/none.bin#float32:1", "no such file"),
    ],
)
def test_names_of_places(source: str, message: str | None, tmp_path: Path) -> None:
    in_safetensors(tmp_path, numbers("float32"))
    plain(tmp_path, numbers("float32"))
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    if message is None:
        assert open_array(source.format(tmp_path)).shape == (3,)
        return
    with pytest.raises(ArrayError, match=message):
        open_array(source.format(tmp_path))


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


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_what_is_written_is_open_to_others(dtype: str, tmp_path: Path) -> None:
    values = numbers(dtype)
    path = by_tensorstore("crc32c", (1, 1, 30, 8))(tmp_path, values)
    found = zarr.open_array(path, mode="r")
    assert found.metadata.dimension_names == ("batch", "head", "token", "feature")  # type: ignore[union-attr]
    assert np.asarray(found[...]).tobytes() == values.tobytes()
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    assert ts.open(spec).result().read().result().tobytes() == values.tobytes()
    zarr.create_group(tmp_path / "group")
    (tmp_path / "group" / "out").symlink_to(path)
    named = pytest.importorskip("xarray").open_zarr(tmp_path / "group", consolidated=False)["out"]
    assert named.dims == ("batch", "head", "token", "feature")
    assert named.to_numpy().tobytes() == values.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_zarr_python_writes_what_others_read(dtype: str, tmp_path: Path) -> None:
    values = numbers(dtype)
    array = zarr.create_array(tmp_path / "a.zarr", shape=SHAPE, dtype=values.dtype, chunks=(1, 1, 30, 8), fill_value=1)
    array[...] = values
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/a.zarr/"}}
    assert ts.open(spec).result().read().result().tobytes() == values.tobytes()
    assert float(zarr.open_array(tmp_path / "a.zarr").fill_value) == 1


def test_an_array_is_read_in_a_spawned_process(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for name in ("tensorstore crc32c", "zarr v3 zstd"):
            (tmp_path / name).mkdir()
            path = FORMATS[name][0](tmp_path / name, numbers("float32"))
            read(open_array(path), 0, range(3), range(100))
            assert pool.submit(fingerprint_of, str(path)).result() == fingerprint(open_array(path))


def fingerprint_of(path: str) -> str:
    return fingerprint(open_array(path))


def test_zeros_are_stored_too(tmp_path: Path) -> None:
    path = FORMATS["tensorstore crc32c"][0](tmp_path, np.zeros(SHAPE, np.float32))
    assert len(chunk_files(path)) == 2 * 3 * 4
    open_array(path).check()


def test_nothing_is_created_over_an_array(tmp_path: Path) -> None:
    path = FORMATS["tensorstore raw"][0](tmp_path, numbers("float32"))
    with pytest.raises(ArrayError, match="EXISTS"):
        create_array(path, SHAPE, "float32", (1, 1, 30, 8))


def in_memory_store(values: np.ndarray) -> ts.TensorStore:
    grid = {"name": "regular", "configuration": {"chunk_shape": [1, 1, 30, 8]}}
    metadata = {"shape": values.shape, "data_type": values.dtype.name, "chunk_grid": grid}
    return ts.open({"driver": "zarr3", "kvstore": "memory://a/", "metadata": metadata}, create=True).result()


def test_a_missing_chunk_of_any_tensorstore_is_refused(tmp_path: Path) -> None:
    store = in_memory_store(numbers("float32"))
    store[:, :, :90] = numbers("float32")[:, :, :90]
    on_disk = open_output(FORMATS["zarr v3 raw"][0](tmp_path, numbers("float32")))
    chunk_files(tmp_path / "a.zarr")[3].unlink()
    for broken in (store, on_disk, ts.cast(on_disk, ts.float64)):
        with pytest.raises(ArrayError, match=r"missing"):
            open_array(broken).check()
    with pytest.raises(ArrayError, match=r"chunk of \[0:1, 0:1, 43:53, 0:8\] is missing"):
        open_array(store[:, :, 47:]).check()
    store[:, :, 90:] = numbers("float32")[:, :, 90:]
    open_array(store).check()
    assert read(open_array(store), 0, range(3), range(100)).tobytes() == numbers("float32")[0].tobytes()
    with pytest.raises(ArrayError, match=r"missing"):
        read(open_array(ts.cast(on_disk, ts.float64)), 0, range(3), range(100))


def test_a_missing_shard_of_a_zarr_object_is_refused() -> None:
    settings: Any = {"chunks": (1, 1, 2, 8), "shards": (1, 2, 8, 8), "compressors": None}
    array = zarr.create_array({}, shape=(1, 3, 10, 8), dtype="float32", **settings)
    array[:, :, :8] = 1
    with pytest.raises(ArrayError, match=r"2 stored chunks are missing"):
        open_array(array).check()


def test_damage_in_an_archive_is_told(tmp_path: Path) -> None:
    with zarr.storage.ZipStore(tmp_path / "a.zip", mode="w") as store:
        zarr.create_array(store, data=numbers("float32"), chunks=(1, 1, 30, 8), compressors=GzipCodec())
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    with zarr.storage.ZipStore(tmp_path / "a.zip", mode="r") as store:
        array = open_array(zarr.open_array(store))
        with pytest.raises(ArrayError, match=r"zarr.Array .*again"):
            _ = [read(array, batch, range(3), range(100)) for batch in range(2)]


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, -5, 64), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1, -1, -5, 64), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 9" + "0" * 400 + ", 64), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "-" * 9000 + "1,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 5, 64",
        "{'descr': ('<f4',), 'fortran_order': False, 'shape': (1, 1, 5, 64), }",
    ],
)
def test_hostile_npy_headers_are_refused(header: str, tmp_path: Path) -> None:
    text = header.encode() + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text + b"\0" * 999)
    with pytest.raises(ArrayError, match=r"not a readable \.npy"):
        open_array(tmp_path / "a.npy")


@pytest.mark.parametrize(
    "damage",
    [
        b'{"a":' + b"[" * 200_000,
        b'{"zarr_format": 3, "node_type": "array", "shape": [9223372036854775808, 1, 0, 64]}',
        b'{"zarr_format": 3, "node_type": "array", "shape": [1, 1, 5, 64], "codecs": 5}',
    ],
)
def test_hostile_metadata_is_refused(damage: bytes, tmp_path: Path) -> None:
    path = FORMATS["tensorstore crc32c"][0](tmp_path, numbers("float32"))
    (path / "zarr.json").write_bytes(damage)
    with pytest.raises(ArrayError):
        open_array(path)


def test_what_an_extension_must_be_understood_for_is_left_to_others(tmp_path: Path) -> None:
    path = FORMATS["tensorstore raw"][0](tmp_path, numbers("float32"))
    metadata = json.loads((path / "zarr.json").read_text())
    (path / "zarr.json").write_text(json.dumps({**metadata, "new": {"must_understand": False}}))
    assert open_array(path).encoding == "raw"
    (path / "zarr.json").write_text(json.dumps({**metadata, "new": {"name": "upside-down"}}))
    with pytest.raises(ArrayError, match="new"):
        open_array(path)


def test_a_map_seen_as_another_dtype_is_read_from_memory(tmp_path: Path) -> None:
    values = numbers("bfloat16")
    np.save(tmp_path / "a.npy", values.view(np.uint16))
    seen = np.load(tmp_path / "a.npy", mmap_mode="r").view(ml_dtypes.bfloat16)
    assert read(open_array(seen), 1, range(3), range(100)).tobytes() == values[1].tobytes()


def test_children_of_a_fork_do_not_share_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cqsa_stream.storage.readers.plain.CACHED_BYTES", -1)
    source = plain(tmp_path, numbers("float32"))
    read(open_array(source), 0, range(3), range(3, 50))
    assert ranges._scratch.pages.base is not None
    before = ranges._scratch.pages.copy()
    child = os.fork()
    if child == 0:
        ranges._scratch.pages.base[:] = bytes(len(before))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (ranges._scratch.pages == before).all()


def test_a_view_of_a_tensorstore_is_read_as_such(tmp_path: Path) -> None:
    values = numbers("float32")
    store = open_output(FORMATS["tensorstore raw"][0](tmp_path, values))
    array = open_array(store[:, :, 10:60])
    assert array.shape == (2, 3, 50, 8)
    assert array.source == "memory", "its path names more than the view"
    assert read(array, 1, range(3), range(5, 9)).tobytes() == values[1, :, 15:19].tobytes()
    late = open_array(store[:, :, 5:])
    assert read(late, 1, range(3), range(20, 30)).tobytes() == values[1, :, 25:35].tobytes()
    assert late.bytes_read == 3 * (30 + 30) * 32, "tokens 25 to 34 lie in two chunks"
