"""Named ranges for a profiler of CUDA (NVTX), where the environment says ``CQSA_NVTX=1``; else nothing."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["span"]

_ON = os.environ.get("CQSA_NVTX") == "1"


def span(name: str) -> AbstractContextManager[object]:
    """Return a context whose time shows in a profiler's timeline under this name."""
    if not _ON:
        return nullcontext()
    found: AbstractContextManager[object] = torch.cuda.nvtx.range(name)
    return found
