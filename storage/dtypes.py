"""The dtypes of arrays: their names, as Zarr, torch and this package spell them, their sizes, and numpy's types."""

from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["DTYPES", "ML_DTYPES", "OUT_DTYPES", "dtype_bytes", "numpy_dtype"]

DTYPES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
OUT_DTYPES = ("float64", "float32", "float16", "bfloat16")
ML_DTYPES = ("bfloat16", "float8_e4m3fn", "float8_e5m2")  # those that numpy lacks


def dtype_bytes(name: str) -> int:
    """Return the bytes of one number."""
    return DTYPES[name]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy dtype of a name; those that numpy lacks come from ml_dtypes."""
    return np.dtype(getattr(ml_dtypes, name) if name in ML_DTYPES else name)
