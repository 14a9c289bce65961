"""Arrays read by TensorStore: Zarr v2 and v3 with any codec, N5, archives, HTTP, S3, and whatever else it opens."""

import math
import re
from collections import deque
from itertools import pairwise, product
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import tensorstore as ts

from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.raw import CURES

__all__ = ["TensorStoreArray", "clean_message", "context"]

_REFUSES_MISSING = ("n5", "zarr", "zarr2", "zarr3")  # drivers that can tell a missing chunk from one of zeros
_RETRIES = {"max_retries": 3, "initial_delay": "200ms", "max_delay": "1s"}


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
    return re.split(r" \[(?:tensorstore_spec|source locations)", str(error))[0]


class TensorStoreArray:
    """Fetches whole stored chunks, ``in_flight`` at a time, and copies what was asked for into the caller's buffer."""

    leaf_bytes = 0
    encoding: ClassVar[Literal["compressed"]] = "compressed"

    def __init__(self, store: ts.TensorStore, source: str) -> None:
        self.store = store
        self.source = source
        self.in_flight = 4
        self.shape = tuple(store.shape)
        self.dtype = str(store.dtype.name)
        stored = store.chunk_layout.read_chunk.shape or self.shape
        chunk = [n or size for n, size in zip(stored, self.shape, strict=True)]
        self.stored_chunk = tuple(max(1, min(n, size)) for n, size in zip(chunk, self.shape, strict=True))
        itemsize = store.dtype.numpy_dtype.itemsize
        self.staging_bytes = 2 * math.prod(chunk) * itemsize  # as stored, and decoded
        self._row_bytes = self.shape[-1] * itemsize if self.shape else 0
        self.bytes_read = 0  # of the stored chunks fetched, decoded

    @classmethod
    def open(cls, source: str, kvstore: str | dict[str, Any], fill_missing: bool) -> "TensorStoreArray":
        """Open what a key-value store holds. Raises ArrayError in TensorStore's words."""
        try:
            found = ts.open({"driver": "auto", "kvstore": kvstore}, context=context(), read=True).result()
            return cls.of_store(found, fill_missing, source)
        except (ValueError, OSError, NotImplementedError) as error:
            raise ArrayError(f"{source}: {clean_message(error)}") from error

    @classmethod
    def of_store(cls, store: ts.TensorStore, fill_missing: bool, source: str | None = None) -> "TensorStoreArray":
        """Take an opened array. Where missing chunks can be refused, it is opened again so that they are."""
        spec = store.spec().to_json()
        kvstore = spec.get("kvstore", {})
        path = kvstore.get("path") if isinstance(kvstore, dict) and kvstore.get("driver") == "file" else None
        if spec["driver"] in _REFUSES_MISSING and (path or source):
            spec = {key: value for key, value in spec.items() if key != "context"}
            spec["fill_missing_data_reads"] = fill_missing
            store = ts.open(spec, context=context(), open=True, read=True).result()
        if any(store.domain.origin):
            store = store[ts.d[:].translate_to[0]]
        return cls(store, source or (str(Path(path)) if path else "memory"))

    def begin(self, in_flight: int) -> None:
        self.in_flight = in_flight

    def lead(self, batch: int, heads: range, tokens: range) -> int:
        return 0

    def read_into(self, batch: int, heads: range, tokens: range, buffer: np.ndarray) -> None:
        pending: deque[ts.WriteFutures] = deque()
        try:
            for head, token in product(_pieces(heads, self.stored_chunk[1]), _pieces(tokens, self.stored_chunk[2])):
                if len(pending) == self.in_flight:
                    pending.popleft().result()
                place = buffer[
                    head.start - heads.start : head.stop - heads.start,
                    token.start - tokens.start : token.stop - tokens.start,
                ]
                piece = self.store[batch, head.start : head.stop, token.start : token.stop]
                pending.append(ts.array(place, copy=False, write=True).write(piece))
                self.bytes_read += self._fetched(head, token)
            while pending:
                pending.popleft().result()
        except (ValueError, OSError, NotImplementedError) as error:
            raise ArrayError(
                f"{self.source}: {clean_message(error)}; write this chunk again (where it is missing: {CURES})"
            ) from error
        finally:
            for future in pending:  # the buffer must not be written after this call
                future.commit.exception()

    def _fetched(self, heads: range, tokens: range) -> int:
        """Return the size of the stored chunks that hold a piece, cut at the end of the token axis."""
        batch_chunk, head_chunk, token_chunk, _ = self.stored_chunk
        first = tokens.start // token_chunk * token_chunk
        stop = min(-(-tokens.stop // token_chunk) * token_chunk, self.shape[2])
        return batch_chunk * -(-len(heads) // head_chunk) * head_chunk * (stop - first) * self._row_bytes

    def check(self) -> None:
        """Look whether every chunk is stored, without reading any, where the store can list what it has."""
        spec = self.store.spec().to_json()
        if spec["driver"] not in _REFUSES_MISSING or spec.get("fill_missing_data_reads", True):
            return
        stored = self._stored(self.store)
        if stored is not False:
            return
        for cell in product(*(_pieces(range(n), m) for n, m in zip(self.shape, self.stored_chunk, strict=True))):
            if self._stored(self.store[tuple(slice(part.start, part.stop) for part in cell)]) is False:
                where = ", ".join(f"{part.start}:{part.stop}" for part in cell)
                raise ArrayError(f"{self.source}: the stored chunk of [{where}] is missing; {CURES}")

    def _stored(self, store: ts.TensorStore) -> bool | None:
        """Return whether all chunks are stored; None where that cannot be told."""
        try:
            return bool(store.storage_statistics(query_fully_stored=True).result().fully_stored)
        except (ValueError, OSError, NotImplementedError) as error:
            if "does not support listing" in str(error) or isinstance(error, NotImplementedError):
                return None
            raise ArrayError(f"{self.source}: {clean_message(error)}") from error


def _pieces(span: range, length: int) -> list[range]:
    """Cut a range at the multiples of a length."""
    cuts = [span.start, *range((span.start // length + 1) * length, span.stop, length), span.stop]
    return [range(a, b) for a, b in pairwise(cuts)]
