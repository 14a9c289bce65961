"""Opening the three arrays of an attention, and saying what looks wrong about them."""

import logging
from typing import Any

import torch

from cqsa_stream.errors import ArrayError, InputError
from cqsa_stream.storage.open import TokenArray, open_array

__all__ = ["open_inputs", "refuse_gradients"]

_log = logging.getLogger(__name__)


def open_inputs(
    query: Any, key: Any, value: Any, *, fill_missing: bool = False, layout: str = "bhtd"
) -> dict[str, TokenArray]:
    """Open the three arrays. Raises ArrayError saying which of them, and why."""
    arrays: dict[str, TokenArray] = {}
    for name, source in (("query", query), ("key", key), ("value", value)):
        try:
            arrays[name] = open_array(source, fill_missing=fill_missing, layout=layout)
        except ArrayError as error:
            raise ArrayError(f"{name}: {error}") from error
    shape = arrays["key"].shape
    if len(shape) == 4 and shape[1] > shape[2] > 1:
        _log.warning(
            "key: %d heads of %d tokens, by its shape %s. Axes are [batch, head, token, feature]; arrays of "
            "flash-attention have tokens before heads: take --layout bthd, or layout=\"bthd\"",
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
