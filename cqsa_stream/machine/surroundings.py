"""The caller's settings of torch, which decide what plain calls do, put aside while we compute.

A default device or autocast of the caller's would move or round our tensors, inference mode would lock those that
another thread fills, and a lower precision of float32 products would show in results that are called exact.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["undisturbed"]

_lock = threading.Lock()
_before: list[str] = []  # the caller's precision, and an entry for each further call that computes


@contextmanager
def undisturbed() -> Iterator[None]:
    """Compute as torch does out of the box, whatever the caller has set; afterwards all is as it was."""
    with ExitStack() as stack:
        stack.enter_context(_highest_precision())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if torch.get_default_device().type != "cpu":  # each call of torch's would pass through it
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def _highest_precision() -> Iterator[None]:
    """Set what is one for all threads, as long as one of them computes."""
    with _lock:
        if not _before:
            _before.append(torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        else:
            _before.append("highest")
    try:
        yield
    finally:
        with _lock:
            if len(_before) > 1:
                _before.pop()
            else:
                torch.set_float32_matmul_precision(_before.pop())
