"""Names of dtypes, as Zarr, torch and this package spell them, and numpy's types for them."""

from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["FLOATS", "numpy_dtype"]

FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy dtype of a name; those that numpy lacks come from ml_dtypes."""
    return np.dtype(getattr(ml_dtypes, name) if name.startswith(("bfloat", "float8")) else name)
