"""Moving bytes: arrays to read and to write, and the durable store of partials. Knows nothing of attention.

Importing it teaches zarr-python bfloat16 and float8: now, if zarr is imported already, or the moment that it is. Who
does not use zarr-python does not pay for it.
"""

import sys
import threading
from contextlib import suppress
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_DTYPES = f"{__name__}.readers.zarr_dtypes"


class _WithZarr(MetaPathFinder, threading.local):
    """Stands in the way of imports of zarr, until it was imported: to add our dtypes to it as soon as it is there."""

    looking = False

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "zarr" or self.looking:
            return None
        self.looking = True
        try:
            spec = find_spec(fullname)
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_add(module: ModuleType) -> None:
                execute(module)
                with suppress(ValueError):
                    sys.meta_path.remove(self)
                import_module(_DTYPES)

            spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec


if "zarr" in sys.modules:
    import_module(_DTYPES)
else:
    sys.meta_path.insert(0, _WithZarr())
