"""Exact attention over sequences that fit neither the GPU nor host memory.

Importing the package imports nothing heavy; the first use of a name does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cqsa_stream import integrations, masks
    from cqsa_stream.api import attention, plan
    from cqsa_stream.create import InputWriter, create_inputs
    from cqsa_stream.errors import (
        ArrayError,
        BudgetError,
        CqsaError,
        FullDiskError,
        InputError,
        LockedError,
        MismatchError,
        NoMemoryError,
        RunInterrupted,
        RunStopped,
    )
    from cqsa_stream.integrations.sdpa import patch_sdpa
    from cqsa_stream.run.opened import Run, open_run
    from cqsa_stream.run.result import Result, open_result
    from cqsa_stream.storage.readers.shape import Shape

__version__ = "0.1.0"

_HOMES = {
    "ArrayError": "errors",
    "BudgetError": "errors",
    "CqsaError": "errors",
    "FullDiskError": "errors",
    "InputError": "errors",
    "InputWriter": "create",
    "LockedError": "errors",
    "MismatchError": "errors",
    "NoMemoryError": "errors",
    "Result": "run.result",
    "Run": "run.opened",
    "RunInterrupted": "errors",
    "RunStopped": "errors",
    "Shape": "storage.readers.shape",
    "attention": "api",
    "create_inputs": "create",
    "open_result": "run.result",
    "open_run": "run.opened",
    "patch_sdpa": "integrations.sdpa",
    "plan": "api",
}

__all__ = [
    "ArrayError",
    "BudgetError",
    "CqsaError",
    "FullDiskError",
    "InputError",
    "InputWriter",
    "LockedError",
    "MismatchError",
    "NoMemoryError",
    "Result",
    "Run",
    "RunInterrupted",
    "RunStopped",
    "Shape",
    "attention",
    "create_inputs",
    "integrations",
    "masks",
    "open_result",
    "open_run",
    "patch_sdpa",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name in ("integrations", "masks"):
        return import_module(f"cqsa_stream.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'cqsa_stream' has no attribute {name!r}")
    return getattr(import_module(f"cqsa_stream.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
