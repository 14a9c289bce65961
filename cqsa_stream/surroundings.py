"""The caller's settings of torch, which decide what plain calls do, put aside while we compute.

A default device or autocast of the caller's would move or round our tensors, inference mode would lock those that
another thread fills, and a lower precision of float32 products would show in results that are called exact.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["undisturbed"]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Compute as torch does out of the box, whatever the caller has set; afterwards all is as it was."""
    precision = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if torch.get_default_device().type != "cpu":  # each call of torch's would pass through it
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, precision)
        yield
