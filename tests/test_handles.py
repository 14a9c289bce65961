"""What is handed over opened is read as it shows itself, or refused."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
import torch
import zarr
from torch._subclasses import FakeTensorMode
from zarr.codecs import GzipCodec

from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.open import open_array
from cqsa_stream.storage.readers.memory import MemoryArray
from tests.test_arrays import SHAPE, by_n5, by_zarr, numbers, plain, plain_map, read

ALL = (range(SHAPE[1]), range(SHAPE[2]))
Replace = Callable[[Path], None]


def values_of(source: Any) -> np.ndarray:
    array = open_array(source)
    array.check()
    return np.stack([read(array, batch, *ALL) for batch in range(SHAPE[0])])


def rename_over(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-4] + b"\0\0\xa0\x40")
    other.replace(path)


def move_away(path: Path) -> None:
    path.rename(path.with_name("moved"))


def link_elsewhere(path: Path) -> None:
    move_away(path)
    other = path.with_name("other")
    other.write_bytes(bytes(path.with_name("moved").stat().st_size))
    path.symlink_to(other)


@pytest.mark.parametrize("change", [rename_over, Path.unlink, move_away, link_elsewhere])
@pytest.mark.parametrize("kind", ["npy", "plain"])
def test_a_map_whose_name_means_something_else_is_read_as_it_is(kind: str, change: Replace, tmp_path: Path) -> None:
    values, path = numbers("float32"), tmp_path / "a.npy"
    np.save(path, values)
    mapped: np.ndarray = np.load(path, mmap_mode="r") if kind == "npy" else plain_map(tmp_path, values)
    assert open_array(mapped).source != "memory"
    change(Path(str(mapped.filename)))  # type: ignore[attr-defined]
    assert open_array(mapped).source == "memory"
    assert values_of(mapped).tobytes() == values.tobytes()


@pytest.mark.parametrize("name", ["a b.bin", "a\nb.bin", "a\\012b.bin", "a (deleted)", "ä.bin", os.fsdecode(b"\xff")])
def test_a_map_of_any_name_is_its_file(name: str, tmp_path: Path) -> None:
    values = numbers("float32")
    (tmp_path / name).write_bytes(values.tobytes())
    mapped = np.memmap(tmp_path / name, values.dtype, "r", shape=values.shape)
    array = open_array(mapped)
    assert array.source == f"{tmp_path / name}#float32:2,3,100,8"
    assert values_of(mapped).tobytes() == values_of(array.source).tobytes() == values.tobytes()


def test_a_map_by_a_link_is_its_file(tmp_path: Path) -> None:
    source = plain(tmp_path, numbers("float32")).partition("#")[0]
    (tmp_path / "link.bin").symlink_to(source)
    assert open_array(np.memmap(tmp_path / "link.bin", "f4", "r", shape=SHAPE)).source != "memory"


def test_what_was_written_to_a_map_is_read(tmp_path: Path) -> None:
    mapped = np.memmap(plain(tmp_path, numbers("float32")).partition("#")[0], "f4", "r+", shape=SHAPE)
    mapped[1, 2, 50, 3] = 7.0
    assert values_of(mapped).tobytes() == mapped.tobytes()


@pytest.mark.parametrize("view", [lambda m: m, lambda m: m[:, :, ::2], lambda m: m[1:]])
def test_a_map_of_a_file_that_shrank_is_refused(view: Any, tmp_path: Path) -> None:
    source = plain(tmp_path, numbers("float32")).partition("#")[0]
    mapped = np.memmap(source, "f4", "r", shape=SHAPE)
    os.truncate(source, 100)
    with pytest.raises(ArrayError, match=r"a\.bin: 100 bytes; expected 19200: truncated.*again"):
        open_array(view(mapped))


def both_formats(path: Path, values: np.ndarray, first: int) -> None:
    for version in (first, 5 - first):
        zarr.create_array(path, data=values * version, chunks=(1, 1, 30, 8), zarr_format=version)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [2, 3])
@pytest.mark.parametrize("version", [2, 3])
def test_of_two_formats_in_a_folder_the_handles_is_read(version: Any, first: int, tmp_path: Path) -> None:
    values = numbers("float32")
    both_formats(tmp_path / "a", values, first)
    array = zarr.open_array(tmp_path / "a", mode="r", zarr_format=version)
    assert open_array(array).source == "memory"
    assert values_of(array).tobytes() == (values * version).tobytes()
    spec = {"driver": f"zarr{version}", "kvstore": {"driver": "file", "path": f"{tmp_path}/a/"}}
    store = ts.open(spec).result()
    assert open_array(store).source == ("memory" if version == 2 else str(tmp_path / "a"))
    assert values_of(store).tobytes() == (values * version).tobytes()
    assert values_of(tmp_path / "a").tobytes() == (values * 3).tobytes(), "as zarr-python does"


def make_other(path: Path, **options: Any) -> None:
    settings = {"chunks": (1, 1, 30, 8), "dtype": "float32", "shape": SHAPE, **options}
    zarr.create_array(path, overwrite=True, **settings)[...] = 5.0


OTHERS: dict[str, Replace] = {
    "shape": lambda path: make_other(path, shape=(2, 3, 50, 8)),
    "dtype": lambda path: make_other(path, dtype="float16"),
    "chunks": lambda path: make_other(path, chunks=(1, 1, 50, 8)),
    "codec": lambda path: make_other(path, compressors=GzipCodec()),
    "fill value": lambda path: make_other(path, fill_value=3),
    "none": move_away,
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_zarr_array_whose_folder_holds_another_is_refused(other: str, tmp_path: Path) -> None:
    path = by_zarr(fill_value=np.nan)(tmp_path, numbers("float32"))
    array, store = zarr.open_array(path), ts.open({"driver": "zarr3", "kvstore": f"file://{path}/"}).result()
    OTHERS[other](path)
    with pytest.raises(ArrayError, match=r"a\.zarr.*open it again"):
        open_array(array)
    with pytest.raises(ArrayError, match="open it again"):
        open_array(store)


def test_a_zarr_array_that_was_resized_is_refused(tmp_path: Path) -> None:
    path = by_zarr()(tmp_path, numbers("float32"))
    array = zarr.open_array(path)
    zarr.open_array(path).resize((2, 3, 120, 8))
    with pytest.raises(ArrayError, match="resized: open it again"):
        open_array(array)
    held = zarr.create_array({}, data=numbers("float32"), chunks=(1, 1, 30, 8))
    zarr.open_array(held.store).resize((2, 3, 120, 8))
    with pytest.raises(ArrayError, match="resized: open it again"):
        open_array(held)


@pytest.mark.parametrize("version", [2, 3])
def test_attributes_may_change(version: Any, tmp_path: Path) -> None:
    path = by_zarr(zarr_format=version, fill_value=np.nan)(tmp_path, numbers("float32"))
    array = zarr.open_array(path)
    zarr.open_array(path).attrs["note"] = "new"
    assert values_of(array).tobytes() == numbers("float32").tobytes()


def test_a_handle_by_a_relative_path_has_an_absolute_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_zarr()(tmp_path, numbers("float32"))
    monkeypatch.chdir(tmp_path)
    store = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": "a.zarr/"}}).result()
    for handle in (zarr.open_array("a.zarr"), store, "a.zarr", Path("a.zarr")):
        assert open_array(handle).source == str(tmp_path / "a.zarr")


def test_a_store_that_cannot_list_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = zarr.array(numbers("float32"), chunks=(1, 1, 30, 8))
    found = open_array(array)
    monkeypatch.setattr(type(array), "nchunks_initialized", property(lambda _: 1 / 0))
    found.check()


def test_a_transaction_is_refused(tmp_path: Path) -> None:
    path = by_zarr()(tmp_path, numbers("float32"))
    store = ts.open({"driver": "zarr3", "kvstore": f"file://{path}/"}).result()
    within = store.with_transaction(ts.Transaction())
    for refused in (within, ts.cast(within, ts.float64), within[:, :, 5:]):
        with pytest.raises(ArrayError, match=r"transaction.*commit it and open the array again"):
            open_array(refused)
    assert open_array(store).source == str(path)


def test_names_that_open_another_format_are_no_source(tmp_path: Path) -> None:
    by_n5(tmp_path, numbers("float32"))
    spec = {"driver": "n5", "kvstore": {"driver": "file", "path": f"{tmp_path}/a.n5/"}}
    assert open_array(ts.open(spec).result()).source == str(tmp_path / "a.n5")
    zarr.create_array(tmp_path / "a.n5", data=np.zeros(SHAPE, "f4"), chunks=(1, 1, 30, 8))
    store = ts.open(spec).result()
    assert open_array(store).source == "memory"
    assert values_of(store).tobytes() == numbers("float32").tobytes()


def test_a_key_of_its_own_for_metadata_is_no_name(tmp_path: Path) -> None:
    files = {"driver": "file", "path": f"{tmp_path}/a/"}
    metadata = {"shape": SHAPE, "chunks": [1, 1, 30, 8], "dtype": "<f4"}
    spec = {"driver": "zarr", "kvstore": files, "metadata": metadata, "metadata_key": ".other"}
    ts.open(spec, create=True).result().write(numbers("float32")).result()
    zarr.create_array(tmp_path / "a", data=np.zeros(SHAPE, "f4"), zarr_format=2)
    store = ts.open(spec, open=True).result()
    assert open_array(store).source == "memory"


def computed(values: np.ndarray, **layout: Any) -> ts.TensorStore:
    def fill(domain: ts.IndexDomain, chunk: np.ndarray, _: Any) -> None:
        chunk[...] = values[domain.index_exp]

    return ts.virtual_chunked(fill, dtype=ts.float32, shape=SHAPE, **layout)


def test_what_is_computed_or_in_memory_is_read() -> None:
    values = numbers("float32")
    layout = ts.ChunkLayout(read_chunk_shape=[1, 1, 30, 8])
    for store in (computed(values), computed(values, chunk_layout=layout), ts.array(values)):
        assert open_array(store).source == "memory"
        assert values_of(store).tobytes() == values.tobytes()
        assert values_of(ts.cast(store, ts.float64)).tobytes() == values.astype("f8").tobytes()
    assert open_array(computed(values, chunk_layout=layout)).stored_chunk == (1, 1, 30, 8)


def test_the_numbers_of_an_array_do_not_go_through_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ts.Spec, "to_json", lambda *_: pytest.fail("as long as the array"))
    for store in (ts.array(numbers("float32")), ts.cast(ts.array(numbers("float32")), ts.float64)):
        assert open_array(store).shape == SHAPE


def test_what_a_computed_store_raises_is_told() -> None:
    def fill(*_: Any) -> None:
        raise KeyError("no such day")

    store = ts.virtual_chunked(fill, dtype=ts.float32, shape=SHAPE)
    with pytest.raises(ArrayError, match="no such day"):
        read(open_array(store), 0, *ALL)


def test_a_store_for_writing_only_is_refused() -> None:
    values = np.zeros(SHAPE, np.float32)
    store = ts.virtual_chunked(None, lambda *_: None, dtype=ts.float32, shape=values.shape)
    with pytest.raises(ArrayError, match=r"writing only.*read=True"):
        open_array(store)


class Subclass(np.ndarray):
    """An array with units, say."""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.ma.masked_greater(numbers("float32"), 1), r"masked array.*filled\(value\).*-inf"),
        (np.ma.masked_array(numbers("float32")), r"masked array"),
        (np.zeros(SHAPE, "f4").view(Subclass), r"Subclass\).*numpy\.asarray"),
        (np.zeros(SHAPE, "f4").view(np.recarray), r"numpy\.rec\.recarray|subclass"),
        (np.zeros(SHAPE, object), r"dtype object"),
        (np.zeros(SHAPE, "f4,f4"), r"dtype \[.*expected one of"),
        (np.zeros(SHAPE, "S4"), r"dtype \|S4"),
        (np.zeros(SHAPE, "U4"), r"dtype <U4"),
        (np.zeros(SHAPE, "V4"), r"dtype \|V4"),
        (np.zeros(SHAPE, ">f4"), r"byte order.*newbyteorder"),
        (np.float32(3), r"found a numpy\.float32"),
        (torch.float32, r"found a torch\.dtype"),
        (zarr.create_group({}), r"found a zarr\.Group"),
        (b"a.npy", r"found a builtins\.bytes"),
    ],
)
@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_what_is_no_plain_array_is_refused(source: Any, message: str, layout: str) -> None:
    with pytest.raises(ArrayError, match=message):
        open_array(source, layout=layout)


def test_a_map_of_another_byte_order_is_refused(tmp_path: Path) -> None:
    numbers("float32").astype(">f4").tofile(tmp_path / "a.bin")
    with pytest.raises(ArrayError, match="byte order"):
        open_array(np.memmap(tmp_path / "a.bin", ">f4", "r", shape=SHAPE))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 8)])
def test_other_shapes_are_left_to_the_problem(shape: tuple[int, ...], dtype: Any) -> None:
    assert open_array(np.zeros(shape, dtype)).shape == shape
    assert open_array(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("dtype", [[("a", "f4")], "datetime64[ns]", "f4"])
def test_zarr_arrays_of_any_dtype_and_shape_are_left_to_the_problem(dtype: Any) -> None:
    assert open_array(zarr.create_array({}, shape=(3, 2), chunks=(3, 1), dtype=dtype, zarr_format=2)).shape == (3, 2)


class Named(torch.Tensor):
    """A subclass, as users and libraries make them."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: torch.nested.nested_tensor([x[0], x[0, :2]]), r"nested.*to_padded_tensor"),
        (
            lambda x: torch.nested.nested_tensor([x[0], x[0, :2]], layout=torch.jagged),
            r"NestedTensor.*to_padded_tensor",
        ),
        (lambda x: FakeTensorMode().from_tensor(x), r"FakeTensor.*plain"),
        (lambda x: torch.masked.masked_tensor(x, x > 0), r"MaskedTensor.*to_tensor"),
        (lambda x: x.as_subclass(Named), r"Named.*as_subclass\(torch\.Tensor\)"),
        (lambda x: torch.nn.UninitializedParameter(), r"UninitializedParameter"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), r"quantized.*dequantize"),
        (lambda x: torch.complex(x, x), r"complex64; expected one of"),
        (lambda x: torch.complex(x, x).conj(), r"complex64; expected one of"),
        (lambda x: x.to_sparse(), r"sparse.*strided"),
        (lambda x: x.to_mkldnn(), r"mkldnn.*strided"),
        (lambda x: x.to("meta"), r"meta"),
        (lambda x: torch.zeros(SHAPE, dtype=torch.float8_e4m3fnuz), r"float8_e4m3fnuz; expected one of"),
    ],
)
def test_tensors_that_are_more_than_numbers_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ArrayError, match=message):
        open_array(make(torch.from_numpy(numbers("float32"))))


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad, torch.func.functionalize])
def test_tensors_within_a_transform_are_refused(transform: Any) -> None:
    def inside(x: torch.Tensor) -> torch.Tensor:
        with pytest.raises(ArrayError, match=r"inside torch\.vmap or torch\.func"):
            open_array(x)
        return x.sum()

    transform(inside)(torch.from_numpy(numbers("float32")))


def test_a_tensor_under_fake_mode_is_refused() -> None:
    plain_tensor = torch.zeros(SHAPE)
    with FakeTensorMode(), pytest.raises(ArrayError, match="expected a plain"):
        open_array(plain_tensor)


def test_plain_tensors_of_all_kinds_are_read() -> None:
    values = torch.from_numpy(numbers("float32"))
    both = torch.complex(values, values).conj()
    assert both.imag.is_neg()
    for dtype in (torch.float32, torch.bfloat16):
        negative = both.imag.to(dtype) if dtype != torch.float32 else both.imag
        expected = (-values).to(dtype)
        assert values_of(negative).tobytes() == values_of(expected).tobytes()
    for tensor in (torch.nn.Parameter(values), torch.nn.Buffer(values), values.clone().requires_grad_()):
        assert values_of(tensor).tobytes() == values.numpy().tobytes()
    swapped = values.transpose(1, 2).contiguous().transpose(1, 2)
    assert values_of(swapped.bfloat16()).tobytes() == values_of(values.bfloat16()).tobytes()
    assert isinstance(open_array(values), MemoryArray)
