"""Arrays read by TensorStore: Zarr v2 and v3 with any codec, N5, archives, HTTP, S3, and whatever else it opens."""

import math
import os
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import tensorstore as ts

from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.readers.chunks import Chunks
from cqsa_stream.storage.readers.locations import redacted
from cqsa_stream.storage.readers.plain import CURES, lazy_product
from cqsa_stream.storage.retrying import retrying

__all__ = ["TensorStoreArray", "clean_message", "context", "system_error"]

_OTHERS_NAME = ("field", "metadata_key", "open_as_void")  # what a spec may say of a folder besides its name
_REFUSES_MISSING = ("n5", "zarr", "zarr2", "zarr3")  # drivers that can tell a missing chunk from one of zeros
_RECHECKS = ("recheck_cached_data", "recheck_cached_metadata")
_RETRIES = {"max_retries": 3, "initial_delay": "200ms", "max_delay": "1s"}

# a server that accepts and says nothing: read by TensorStore when it first opens a URL
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "10")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")


def context() -> ts.Context:
    """Return a context without a cache (memory is the caller's to plan) that gives up when a server does not answer."""
    retries = {f"{service}_request_retries": _RETRIES for service in ("http", "s3", "gcs")}
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, **retries})


def clean_message(error: Exception) -> str:
    """Return TensorStore's message without its spec, its source locations, and the secrets of URLs."""
    return redacted(re.split(r" \[(?:tensorstore_spec|source locations|os_error_code)", str(error))[0])


def system_error(error: Exception) -> OSError | None:
    """Return the system's error behind one of TensorStore's, if there is one; its message names the file."""
    code = re.search(r"\[os_error_code='(\d+)'\]", str(error))
    return OSError(int(code[1]), clean_message(error)) if code else None


def _cause(error: Exception) -> Exception | None:
    """Return what a traceback may show as an error's cause: not what has the secrets of a URL in it."""
    return system_error(error) or (error if redacted(str(error)) == str(error) else None)


class TensorStoreArray:
    """Fetches whole stored chunks, ``in_flight`` at a time, and copies what was asked for into the caller's buffer."""

    kept_bytes = 0
    encoding: ClassVar[Literal["compressed"]] = "compressed"

    def __init__(self, store: ts.TensorStore, source: str, *, fill_missing: bool) -> None:
        self.store = store
        self.source = source
        self.in_flight = 4
        self.shape = tuple(store.shape)
        self.dtype = str(store.dtype.name)
        self._fill_missing = fill_missing
        stored = store.chunk_layout.read_chunk.shape or self.shape
        chunk = tuple(n or size for n, size in zip(stored, self.shape, strict=True))
        origin = tuple(n or 0 for n in store.chunk_layout.grid_origin or (0,) * len(chunk))
        itemsize = store.dtype.numpy_dtype.itemsize
        self._chunks = Chunks(self.shape, chunk, itemsize, origin)
        self.stored_chunk = self._chunks.stored_chunk
        self.staging_bytes = 2 * max(self._chunks.chunk_bytes, _whole_chunk(store) * itemsize)  # as stored, and decoded
        self.bytes_read = 0  # of the stored chunks fetched, decoded

    @classmethod
    def open(
        cls, source: str, kvstore: str | dict[str, Any], *, fill_missing: bool, token_major: bool, driver: str = "auto"
    ) -> "TensorStoreArray":
        """Open what a key-value store holds. Raises ArrayError in TensorStore's words."""
        try:
            source.encode()
            found = ts.open({"driver": driver, "kvstore": kvstore}, context=context(), read=True).result()
            spec = _told_of_missing(found.spec().to_json(), fill_missing)
            store = ts.open(spec, context=context(), read=True).result()
            return cls(_presented(store, token_major), source, fill_missing=fill_missing)
        except UnicodeEncodeError as error:
            raise ArrayError(f"{source!a}: a name that is not UTF-8, which TensorStore needs: rename it") from error
        except (ValueError, OSError, NotImplementedError) as error:
            raise ArrayError(f"{source}: {clean_message(error)}") from _cause(error)

    @classmethod
    def of_store(cls, store: ts.TensorStore, *, fill_missing: bool, token_major: bool = False) -> "TensorStoreArray":
        """Take an opened array, or a view of one. Where it can be, it is opened again to refuse missing chunks.

        Raises ArrayError where it would show something else then, or does now: a transaction.
        """
        if store.transaction is not None:
            raise ArrayError(
                "a TensorStore in a transaction, whose writes nobody else sees; commit it and open the array again, "
                "or pass a store opened without the transaction"
            )
        spec = _spec_of(store)
        store = _opened_again(store, spec, fill_missing)
        if not store.readable:
            raise ArrayError("a TensorStore opened for writing only; expected one opened with read=True")
        if any(store.domain.origin):
            store = store[ts.d[:].translate_to[0]]
        return cls(_presented(store, token_major), _name_of(spec), fill_missing=fill_missing)

    def begin(self, in_flight: int) -> None:
        self.in_flight = in_flight

    def lead(self, batch: int, heads: range, tokens: range) -> int:
        return 0

    @retrying
    def read_into(self, batch: int, heads: range, tokens: range, buffer: np.ndarray) -> None:
        pending: deque[ts.WriteFutures] = deque()
        try:
            for some, span, place in self._chunks.pieces(heads, tokens, buffer):
                if len(pending) == self.in_flight:
                    pending.popleft().result()
                piece = self.store[batch, some.start : some.stop, span.start : span.stop]
                pending.append(ts.array(place, copy=False, write=True).write(piece))
            while pending:
                pending.popleft().result()
        except Exception as error:  # of the store, or of what a virtual one calls
            raise ArrayError(
                f"{self.source}: {clean_message(error)}; write this chunk again (where it is missing: {CURES})"
            ) from _cause(error)
        finally:
            for future in pending:  # the buffer must not be written after this call
                future.commit.exception()
        self.bytes_read += self._chunks.fetched_bytes(heads, tokens)

    def cached_share(self) -> float:
        return 0.0

    def check(self) -> None:
        """Look whether every chunk is stored, without reading any, where the store can list what it has."""
        if self._fill_missing or self._stored(self.store) is not False:
            return
        starts = [
            range(-(-origin % m), n, m)
            for n, m, origin in zip(self.shape, self.stored_chunk, self._chunks.origin, strict=True)
        ]
        for cell in lazy_product(starts):
            begin = [max(start, 0) for start in cell]
            end = [min(start + m, n) for start, m, n in zip(cell, self.stored_chunk, self.shape, strict=True)]
            if self._stored(self.store[tuple(map(slice, begin, end))]) is False:
                where = ", ".join(f"{first}:{stop}" for first, stop in zip(begin, end, strict=True))
                raise ArrayError(f"{self.source}: the stored chunk of [{where}] is missing; {CURES}")

    def _stored(self, store: ts.TensorStore) -> bool | None:
        """Return whether all chunks are stored; None where that cannot be told."""
        try:
            return bool(store.storage_statistics(query_fully_stored=True).result().fully_stored)
        except (ValueError, OSError, NotImplementedError) as error:
            if "support" in str(error) or isinstance(error, NotImplementedError):
                return None
            raise ArrayError(f"{self.source}: {clean_message(error)}") from _cause(error)


def _presented(store: ts.TensorStore, token_major: bool) -> ts.TensorStore:
    """Return a store with its axes in our order: TensorStore copies from what it decoded, whatever their order is."""
    return store[ts.d[0, 2, 1, 3].transpose[:]] if token_major and store.rank == 4 else store


def _spec_of(store: ts.TensorStore) -> dict[str, Any] | None:
    """Return a store's spec; None where it has none, or one with all its numbers in it."""
    base = store
    while base.base is not None:  # of a cast, or of a store of lower resolution
        base = base.base
    if base.kvstore is None and base.chunk_layout.inner_order is not None:  # no stack: an array, or computed
        return None
    try:
        spec: dict[str, Any] = store.spec().to_json()
    except (ValueError, NotImplementedError):
        return None
    return spec


def _opened_again(store: ts.TensorStore, spec: dict[str, Any] | None, fill_missing: bool) -> ts.TensorStore:
    """Return what a store's spec opens now; the store itself where that cannot be: ``check`` looks there too."""
    if spec is None:
        return store
    if any(part.get(name, True) is not True for part in _parts(spec) for name in _RECHECKS):
        raise ArrayError(
            "a TensorStore that may show what it remembers, not what is stored (recheck_cached_data, "
            "recheck_cached_metadata); open the array without these"
        )
    told = _told_of_missing(spec, fill_missing)
    try:
        again = ts.open(told, context=context(), open=True, read=True).result()
    except (ValueError, OSError, NotImplementedError) as error:
        drivers = [part.get("driver") for part in _parts(spec)]
        if "file" not in drivers or "memory" in drivers or "array" in drivers:
            return store
        raise ArrayError(
            f"a TensorStore that cannot be opened again: {clean_message(error)}; another array is there by now, or "
            "none: open it again"
        ) from error
    found, expected = ((tuple(it.domain.origin), tuple(it.shape), it.dtype.name) for it in (again, store))
    if found != expected:
        raise ArrayError(
            f"a TensorStore of shape {expected[1]} and dtype {expected[2]}; where it was opened there is shape "
            f"{found[1]} and dtype {found[2]} by now: open it again"
        )
    return again


def _parts(spec: Any) -> Iterator[dict[str, Any]]:
    """Yield a spec and the specs in it: bases, layers, key-value stores."""
    if isinstance(spec, dict):
        yield spec
    if isinstance(spec, dict | list):
        for part in spec.values() if isinstance(spec, dict) else spec:
            yield from _parts(part)


def _name_of(spec: dict[str, Any] | None) -> str:
    """Return the folder by whose name ``open_array`` would open the same array; "memory" where there is none."""
    kvstore = (spec or {}).get("kvstore")
    if spec is None or not isinstance(kvstore, dict) or kvstore.get("driver") != "file" or _is_view(spec):
        return "memory"
    folder = Path(str(kvstore.get("path"))).absolute()
    same_format = spec["driver"] in _drivers_by_name(folder) and not any(name in spec for name in _OTHERS_NAME)
    return str(folder) if same_format else "memory"


def _drivers_by_name(folder: Path) -> tuple[str, ...]:
    """Return the names of the driver that a folder's files call for, as ``open_array`` looks for them."""
    if (folder / "zarr.json").is_file():
        return ("zarr3",)
    if (folder / ".zarray").is_file():
        return ("zarr", "zarr2")
    return () if (folder / ".zgroup").is_file() else ("n5",)


def _told_of_missing(spec: Any, fill_missing: bool) -> Any:
    """Return a spec in which every driver that can is told what to do where a chunk is missing."""
    if isinstance(spec, list):
        return [_told_of_missing(part, fill_missing) for part in spec]
    if not isinstance(spec, dict):
        return spec
    told = {key: _told_of_missing(value, fill_missing) for key, value in spec.items() if key != "context"}
    if spec.get("driver") in _REFUSES_MISSING and "kvstore" in spec:
        told["fill_missing_data_reads"] = fill_missing
    return told


def _is_view(spec: dict[str, Any]) -> bool:
    """Return whether a spec names a part of an array only: bounds that are the array's own are written in brackets."""
    transform = spec.get("transform", {})
    return "output" in transform or not all(isinstance(n, list) for n in transform.get("input_exclusive_max", []))


def _whole_chunk(store: ts.TensorStore) -> int:
    """Return the elements of a stored chunk in all its dimensions, where the store is a view of some."""
    metadata = (_spec_of(store) or {}).get("metadata", {})
    shape = metadata.get("chunks") or metadata.get("chunk_grid", {}).get("configuration", {}).get("chunk_shape")
    whole = isinstance(shape, list) and "sharding_indexed" not in str(metadata.get("codecs"))
    return math.prod(shape) if whole else 0
