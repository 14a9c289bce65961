"""bfloat16 and float8 for zarr-python, which has no names for them: arrays written by TensorStore or here open there.

Importing ``cqsa_stream.storage`` registers them, before or after zarr. (zarr-python 3.1 collects entry points of the
group "zarr.data_type", but never loads them.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeGuard

import numpy as np
from zarr.core.dtype.common import HasEndianness, HasItemSize
from zarr.dtype import DataTypeValidationError, ZDType, data_type_registry

from cqsa_stream.storage.dtypes import numpy_dtype

__all__ = ["BFloat16", "Float8E4M3FN", "Float8E5M2"]

_SPECIAL = {"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf}


@dataclass(frozen=True, kw_only=True)
class _MlFloat(ZDType[Any, Any], HasEndianness, HasItemSize):
    """A float of ml_dtypes. Scalars are stored as numbers, or as the specification's words for those JSON lacks."""

    native: ClassVar[np.dtype[Any]]

    def __init_subclass__(cls) -> None:
        cls.native = numpy_dtype(cls._zarr_v3_name)
        cls.dtype_cls = type(cls.native)
        data_type_registry.register(cls._zarr_v3_name, cls)

    @property
    def item_size(self) -> int:
        return self.native.itemsize

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        if not cls._check_native_dtype(dtype):
            raise DataTypeValidationError(f"dtype {dtype}; expected {cls.native}")
        return cls()

    @classmethod
    def _check_native_dtype(cls, dtype: Any) -> TypeGuard[np.dtype[Any]]:
        return bool(dtype == cls.native)

    def to_native_dtype(self) -> np.dtype[Any]:
        return self.native

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        if not isinstance(data, Mapping) or data.get("name") != cls._zarr_v3_name:
            raise DataTypeValidationError(f"data type {data!r}; expected {cls._zarr_v3_name!r}")
        return cls()

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data != cls._zarr_v3_name:
            raise DataTypeValidationError(f"data type {data!r}; expected {cls._zarr_v3_name!r}")
        return cls()

    def to_json(self, zarr_format: Literal[2, 3]) -> Any:
        return self._zarr_v3_name if zarr_format == 3 else {"name": self._zarr_v3_name, "object_codec_id": None}

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, int | float | np.number | self.native.type)

    def cast_scalar(self, data: object) -> Any:
        if not self._check_scalar(data):
            raise TypeError(f"{data!r}; expected a number, to be made a {self._zarr_v3_name}")
        return self.native.type(data)

    def default_scalar(self) -> Any:
        return self.native.type(0)

    def from_json_scalar(self, data: Any, *, zarr_format: Literal[2, 3]) -> Any:
        if isinstance(data, str) and data.startswith("0x"):
            bits = int(data, 16).to_bytes(self.item_size, "little")
            return np.frombuffer(bits, self.native)[0]
        if isinstance(data, str) and data in _SPECIAL:
            data = _SPECIAL[data]
        if not isinstance(data, int | float):
            raise TypeError(f"fill value {data!r}; expected a number, 'NaN', 'Infinity', '-Infinity' or '0x...'")
        return self.native.type(data)

    def to_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> Any:
        value = float(self.cast_scalar(data))
        if np.isnan(value):
            return "NaN"
        return value if np.isfinite(value) else "Infinity" if value > 0 else "-Infinity"


class BFloat16(_MlFloat):
    """https://github.com/zarr-developers/zarr-extensions/tree/main/data-types/bfloat16"""

    _zarr_v3_name = "bfloat16"


class Float8E4M3FN(_MlFloat):
    """https://github.com/zarr-developers/zarr-extensions/tree/main/data-types/float8_e4m3"""

    _zarr_v3_name = "float8_e4m3fn"


class Float8E5M2(_MlFloat):
    """https://github.com/zarr-developers/zarr-extensions/tree/main/data-types/float8_e5m2"""

    _zarr_v3_name = "float8_e5m2"
