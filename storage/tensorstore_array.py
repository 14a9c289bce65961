"""Arrays read by TensorStore: Zarr v2 and v3 with any codec, N5, archives, HTTP, S3, and whatever else it opens."""

import math
import os
import re
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise, product
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import tensorstore as ts

from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.raw import CURES, lazy_product
from cqsa_stream.storage.retrying import retrying

__all__ = ["TensorStoreArray", "clean_message", "context", "system_error"]

_REFUSES_MISSING = ("n5", "zarr", "zarr2", "zarr3")  # drivers that can tell a missing chunk from one of zeros
_RETRIES = {"max_retries": 3, "initial_delay": "200ms", "max_delay": "1s"}

# a server that accepts and says nothing: read by TensorStore when it first opens a URL
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "10")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")


def context() -> ts.Context:
    """Return a context without a cache (memory is the caller's to plan) that gives up when a server does not answer."""
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},
            "http_request_retries": _RETRIES,
            "s3_request_retries": _RETRIES,
            "gcs_request_retries": _RETRIES,
        }
    )


def clean_message(error: Exception) -> str:
    """Return TensorStore's message without its spec and source locations."""
    return re.split(r" \[(?:tensorstore_spec|source locations|os_error_code)", str(error))[0]


def system_error(error: Exception) -> OSError | None:
    """Return the system's error behind one of TensorStore's, if there is one; its message names the file."""
    code = re.search(r"\[os_error_code='(\d+)'\]", str(error))
    return OSError(int(code[1]), clean_message(error)) if code else None


class TensorStoreArray:
    """Fetches whole stored chunks, ``in_flight`` at a time, and copies what was asked for into the caller's buffer."""

    leaf_bytes = kept_bytes = 0
    encoding: ClassVar[Literal["compressed"]] = "compressed"

    def __init__(self, store: ts.TensorStore, source: str, *, fill_missing: bool) -> None:
        self.store = store
        self.source = source
        self.in_flight = 4
        self.shape = tuple(store.shape)
        self.dtype = str(store.dtype.name)
        self._fill_missing = fill_missing
        stored = store.chunk_layout.read_chunk.shape or self.shape
        chunk = [n or size for n, size in zip(stored, self.shape, strict=True)]
        self.stored_chunk = tuple(max(1, min(n, size)) for n, size in zip(chunk, self.shape, strict=True))
        origin = store.chunk_layout.grid_origin or (0,) * len(chunk)
        self._origin = tuple(n or 0 for n in origin)  # of a view: its chunks begin before it does
        itemsize = store.dtype.numpy_dtype.itemsize
        self.staging_bytes = 2 * max(math.prod(chunk), _whole_chunk(store)) * itemsize  # as stored, and decoded
        self._row_bytes = self.shape[-1] * itemsize if self.shape else 0
        self.bytes_read = 0  # of the stored chunks fetched, decoded

    @classmethod
    def open(cls, source: str, kvstore: str | dict[str, Any], fill_missing: bool) -> "TensorStoreArray":
        """Open what a key-value store holds. Raises ArrayError in TensorStore's words."""
        try:
            found = ts.open({"driver": "auto", "kvstore": kvstore}, context=context(), read=True).result()
            spec = _told_of_missing(found.spec().to_json(), fill_missing)
            return cls(ts.open(spec, context=context(), read=True).result(), source, fill_missing=fill_missing)
        except (ValueError, OSError, NotImplementedError) as error:
            raise ArrayError(f"{source}: {clean_message(error)}") from error

    @classmethod
    def of_store(cls, store: ts.TensorStore, fill_missing: bool) -> "TensorStoreArray":
        """Take an opened array, or a view of one. Where it can be, it is opened again to refuse missing chunks."""
        spec = store.spec().to_json()
        with suppress(ValueError, OSError, NotImplementedError):  # what is in memory cannot; ``check`` looks there too
            store = ts.open(_told_of_missing(spec, fill_missing), context=context(), open=True, read=True).result()
        if any(store.domain.origin):
            store = store[ts.d[:].translate_to[0]]
        kvstore = spec.get("kvstore", {})
        path = kvstore.get("path") if isinstance(kvstore, dict) and kvstore.get("driver") == "file" else None
        whole = path is not None and not _is_view(spec)  # it can be opened again by this name
        return cls(store, str(Path(str(path))) if whole else "memory", fill_missing=fill_missing)

    def begin(self, in_flight: int) -> None:
        self.in_flight = in_flight

    def lead(self, batch: int, heads: range, tokens: range) -> int:
        return 0

    @retrying
    def read_into(self, batch: int, heads: range, tokens: range, buffer: np.ndarray) -> None:
        pending: deque[ts.WriteFutures] = deque()
        fetched = 0
        try:
            for head, token in self._cells(heads, tokens):
                if len(pending) == self.in_flight:
                    pending.popleft().result()
                place = buffer[
                    head.start - heads.start : head.stop - heads.start,
                    token.start - tokens.start : token.stop - tokens.start,
                ]
                piece = self.store[batch, head.start : head.stop, token.start : token.stop]
                pending.append(ts.array(place, copy=False, write=True).write(piece))
                fetched += self._fetched(head, token)
            while pending:
                pending.popleft().result()
        except (ValueError, OSError, NotImplementedError) as error:
            raise ArrayError(
                f"{self.source}: {clean_message(error)}; write this chunk again (where it is missing: {CURES})"
            ) from (system_error(error) or error)
        finally:
            for future in pending:  # the buffer must not be written after this call
                future.commit.exception()
        self.bytes_read += fetched

    def _cells(self, heads: range, tokens: range) -> Iterator[tuple[range, range]]:
        return product(
            _pieces(heads, self.stored_chunk[1], self._origin[1]),
            _pieces(tokens, self.stored_chunk[2], self._origin[2]),
        )

    def _fetched(self, heads: range, tokens: range) -> int:
        """Return the size of the stored chunks that hold a piece, cut at the end of the token axis."""
        batch_chunk, head_chunk, token_chunk, _ = self.stored_chunk
        origin = self._origin[2]
        first = (tokens.start - origin) // token_chunk * token_chunk + origin
        stop = min(-(-(tokens.stop - origin) // token_chunk) * token_chunk + origin, self.shape[2])
        return batch_chunk * -(-len(heads) // head_chunk) * head_chunk * (stop - first) * self._row_bytes

    def check(self) -> None:
        """Look whether every chunk is stored, without reading any, where the store can list what it has."""
        if self._fill_missing or self._stored(self.store) is not False:
            return
        starts = [
            range(-(-origin % m), n, m)
            for n, m, origin in zip(self.shape, self.stored_chunk, self._origin, strict=True)
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
            raise ArrayError(f"{self.source}: {clean_message(error)}") from error


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
    spec = store.spec().to_json()
    shape = spec.get("metadata", {}).get("chunks") or spec.get("metadata", {}).get("chunk_grid", {}).get(
        "configuration", {}
    ).get("chunk_shape")
    plain = isinstance(shape, list) and "sharding_indexed" not in str(spec["metadata"].get("codecs"))
    return math.prod(shape) if plain and isinstance(shape, list) else 0


def _pieces(span: range, length: int, origin: int) -> list[range]:
    """Cut a range where chunks begin: at multiples of a length from the origin on."""
    cuts = range(((span.start - origin) // length + 1) * length + origin, span.stop, length)
    return [range(a, b) for a, b in pairwise([span.start, *cuts, span.stop])]
