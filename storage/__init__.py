"""Moving bytes: arrays to read and to write, and the durable store of partials. Knows nothing of attention.

Importing it teaches zarr-python bfloat16 and float8, where zarr-python is installed.
"""

from contextlib import suppress

with suppress(ImportError):
    from cqsa_stream.storage import zarr_dtypes as zarr_dtypes
