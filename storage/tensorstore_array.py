"""Arrays read by TensorStore: Zarr v2 and v3 with any codec, sharded or not, and whatever else it opens."""

import math
import re
from collections import deque
from itertools import pairwise, product
from pathlib import Path
from typing import Literal

import numpy as np
import tensorstore as ts

from cqsa_stream.storage.errors import ArrayError
from cqsa_stream.storage.raw import CURES, RawArray

__all__ = ["TensorStoreArray", "clean_message", "context"]

_IN_FLIGHT_BYTES = 4 << 20
_ZARR = ("zarr", "zarr2", "zarr3")


def context() -> ts.Context:
    """Return a context without a cache, with few threads: memory is the caller's to plan."""
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},
            "data_copy_concurrency": {"limit": 2},
            "file_io_concurrency": {"limit": 4},
        }
    )


def clean_message(error: Exception) -> str:
    """Return TensorStore's message without its spec and source locations."""
    return re.split(r" \[(?:tensorstore_spec|source locations)", str(error))[0]


class TensorStoreArray:
    """Fetches whole stored chunks, a few at a time, and copies what was asked for into the caller's buffer."""

    def __init__(self, store: ts.TensorStore, source: str, layout: RawArray | None = None) -> None:
        self.store = store
        self.source = source
        self.layout = layout  # the chunks' files, where their sizes are known beforehand
        self.encoding: Literal["checked", "compressed"] = "checked" if layout is not None else "compressed"
        self.shape = tuple(store.shape)
        self.dtype = str(store.dtype.name)
        stored = store.chunk_layout.read_chunk.shape or self.shape
        chunk = [n or size for n, size in zip(stored, self.shape, strict=True)]
        self.stored_chunk = tuple(max(1, min(n, size)) for n, size in zip(chunk, self.shape, strict=True))
        chunk_bytes = math.prod(chunk) * store.dtype.numpy_dtype.itemsize
        self._in_flight = max(1, _IN_FLIGHT_BYTES // max(1, chunk_bytes))
        chunks = math.prod(-(-n // m) for n, m in zip(self.shape, self.stored_chunk, strict=True))
        self.staging_bytes = 2 * min(self._in_flight, chunks) * chunk_bytes  # as stored, and decoded
        self._row_bytes = self.shape[-1] * store.dtype.numpy_dtype.itemsize if self.shape else 0
        self.bytes_read = 0  # of the stored chunks fetched, decoded

    @classmethod
    def open(cls, source: str, fill_missing: bool, layout: RawArray | None = None) -> "TensorStoreArray":
        """Open a directory or URL. Raises ArrayError in TensorStore's words."""
        kvstore = source if "://" in source else {"driver": "file", "path": f"{source}/"}
        try:
            found = ts.open({"driver": "auto", "kvstore": kvstore}, context=context(), read=True).result()
            return cls.of_store(found, fill_missing, source, layout)
        except (ValueError, OSError) as error:
            raise ArrayError(f"{source}: {clean_message(error)}") from error

    @classmethod
    def of_store(
        cls, store: ts.TensorStore, fill_missing: bool, source: str | None = None, layout: RawArray | None = None
    ) -> "TensorStoreArray":
        """Take an opened array. A Zarr array in files is opened again, so that missing chunks are refused."""
        spec = store.spec().to_json()
        kvstore = spec.get("kvstore", {})
        path = kvstore.get("path") if isinstance(kvstore, dict) and kvstore.get("driver") == "file" else None
        if spec["driver"] in _ZARR and (path or source):
            spec = {key: value for key, value in spec.items() if key != "context"}
            spec["fill_missing_data_reads"] = fill_missing
            store = ts.open(spec, context=context(), open=True, read=True).result()
        if any(store.domain.origin):
            store = store[ts.d[:].translate_to[0]]
        return cls(store, source or (str(Path(path)) if path else "memory"), layout)

    def read_into(self, batch: int, heads: range, tokens: range, buffer: np.ndarray) -> None:
        pending: deque[ts.WriteFutures] = deque()
        try:
            for head, token in product(_pieces(heads, self.stored_chunk[1]), _pieces(tokens, self.stored_chunk[2])):
                if len(pending) == self._in_flight:
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
        except (ValueError, OSError) as error:
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
        """Look whether every chunk is stored, without reading any, and where sizes are known that none is short."""
        spec = self.store.spec().to_json()
        if spec["driver"] in _ZARR and not spec.get("fill_missing_data_reads", True):
            self._refuse_missing()
        if self.layout is not None:
            self.layout.check()

    def _refuse_missing(self) -> None:
        if _stored(self.store):
            return
        for cell in product(*(_pieces(range(n), m) for n, m in zip(self.shape, self.stored_chunk, strict=True))):
            if not _stored(self.store[tuple(slice(part.start, part.stop) for part in cell)]):
                where = ", ".join(f"{part.start}:{part.stop}" for part in cell)
                raise ArrayError(f"{self.source}: the stored chunk of [{where}] is missing; {CURES}")


def _stored(store: ts.TensorStore) -> bool:
    try:
        return bool(store.storage_statistics(query_fully_stored=True).result().fully_stored)
    except (ValueError, OSError) as error:
        raise ArrayError(clean_message(error)) from error


def _pieces(span: range, length: int) -> list[range]:
    """Cut a range at the multiples of a length."""
    cuts = [span.start, *range((span.start // length + 1) * length, span.stop, length), span.stop]
    return [range(a, b) for a, b in pairwise(cuts)]
