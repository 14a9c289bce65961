"""The three arrays of an attention: opened, checked, told apart by their content."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cqsa_stream.errors import ArrayError, InputError
from cqsa_stream.storage.contract import TokenArray
from cqsa_stream.storage.fingerprint import fingerprint
from cqsa_stream.storage.open import open_array

__all__ = ["check_inputs", "fingerprints", "naming", "open_inputs", "refuse_gradients"]

_log = logging.getLogger(__name__)


def open_inputs(
    query: Any, key: Any, value: Any, *, fill_missing: bool = False, layout: str = "bhtd"
) -> dict[str, TokenArray]:
    """Open the three arrays. Raises ArrayError saying which of them, and why."""
    arrays: dict[str, TokenArray] = {}
    for name, source in (("query", query), ("key", key), ("value", value)):
        with naming(name):
            arrays[name] = open_array(source, fill_missing=fill_missing, layout=layout)
    shape = arrays["key"].shape
    if len(shape) == 4 and shape[1] > shape[2] > 1:
        _log.warning(
            "key: %d heads of %d tokens, by its shape %s. Axes are [batch, head, token, feature]; arrays of "
            "flash-attention have tokens before heads: take layout=\"bthd\"",
            shape[1], shape[2], tuple(shape),
        )  # fmt: skip
    return arrays


def refuse_gradients(*sources: Any) -> None:
    """Raise InputError where a tensor wants a gradient of the result, which would have none."""
    for tensor in (source for source in sources if isinstance(source, torch.Tensor)):
        wanted = tensor.requires_grad and torch.is_grad_enabled()
        tangent = torch.autograd.forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
        if wanted or tangent is not None:
            raise InputError(
                "a tensor that requires grad: this computes the forward pass only, and its result has no gradient; "
                "call it inside torch.no_grad(), or with tensor.detach()"
            )


def check_inputs(arrays: dict[str, TokenArray]) -> None:
    """Raise ArrayError where an array is not all there, as far as that can be known before it is read."""
    for name, array in arrays.items():
        with naming(name):
            array.check()


def fingerprints(arrays: dict[str, TokenArray]) -> dict[str, str]:
    """Return the fingerprint of each array's content. Raises ArrayError."""
    found = {}
    for name, array in arrays.items():
        with naming(name):
            found[name] = fingerprint(array)
    return found


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Name the array that an error is about."""
    try:
        yield
    except ArrayError as error:
        raise ArrayError(f"{name}: {error}") from error
