"""Attention that calls ``torch.nn.functional.scaled_dot_product_attention``, computed here instead."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import functional

from cqsa_stream.api import attention
from cqsa_stream.errors import InputError

__all__ = ["patch_sdpa"]


@contextmanager
def patch_sdpa(**options: Any) -> Iterator[None]:
    """Inside, let torch's ``scaled_dot_product_attention`` be computed by ``cqsa_stream.attention``.

    ``options``: those of ``attention`` that torch's function lacks, as ``host_memory="4GiB"``, for all calls; the
    device is that of the query where none is named. What ``attention`` refuses raises: gradients, dropout, masks that
    differ between heads or are added to scores. All threads of the process are concerned.
    """
    if "out" in options:
        raise InputError("out: a call of torch's function returns a tensor; leave it out")
    before = functional.scaled_dot_product_attention

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        how = {"device": str(query.device), **options}
        lead = query.shape[:-3]
        q, k, v = (_four_axes(x) for x in (query, key, value))
        found: Tensor = attention(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, **how)
        return found.reshape(*lead, *found.shape[1 if query.dim() > 2 else 2 :])

    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before


def _four_axes(tensor: Tensor) -> Tensor:
    """Return ``[batch, head, token, feature]``: what is missing is 1, what is more is put together."""
    if tensor.dim() < 2:
        raise InputError(f"a tensor of shape {tuple(tensor.shape)}; expected [..., token, feature]")
    while tensor.dim() < 4:
        tensor = tensor[None]
    return tensor.flatten(0, -4) if tensor.dim() > 4 else tensor
