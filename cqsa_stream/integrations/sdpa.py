"""Attention that calls ``torch.nn.functional.scaled_dot_product_attention``, computed here instead."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.backends import mha
from torch.nn import functional

from cqsa_stream.api import attention
from cqsa_stream.errors import InputError
from cqsa_stream.integrations.options import refuse_options

__all__ = ["patch_sdpa"]


@contextmanager
def patch_sdpa(**options: Any) -> Iterator[None]:
    """Inside, let torch's ``scaled_dot_product_attention`` be computed by ``cqsa_stream.attention``.

    ``options``: those of ``attention`` that torch's function lacks, as ``host_memory="4GiB"``, for all calls; the
    device is that of the query where none is named. What ``attention`` refuses raises: gradients, dropout, masks that
    differ between heads or are added to scores; so does a query of other leading axes than the keys'. All threads of
    the process are concerned, and torch's layers take their plain path, which calls the function.
    """
    refuse_options(options)
    before, fast = functional.scaled_dot_product_attention, mha.get_fastpath_enabled()

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
        _refuse_broadcasting(query, key, value)
        q, k, v = (_four_axes(x) for x in (query, key, value))
        found: Tensor = attention(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, **how)
        return found.reshape(*query.shape[:-3], *found.shape[1 if query.dim() > 2 else 2 :])

    functional.scaled_dot_product_attention = attend
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before
        mha.set_fastpath_enabled(fast)


def _refuse_broadcasting(*tensors: Tensor) -> None:
    """Raise InputError where the tensors differ in their axes before [head, token, feature]."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if min(map(len, shapes)) < 2 or len({len(shape) for shape in shapes}) > 1 or len({s[:-3] for s in shapes}) > 1:
        found = f"query {shapes[0]}, key {shapes[1]}, value {shapes[2]}"
        raise InputError(f"shapes differ before [head, token, feature]: {found}; expected the same: expand them")


def _four_axes(tensor: Tensor) -> Tensor:
    """Return ``[batch, head, token, feature]``: what is missing is 1, what is more is put together."""
    while tensor.dim() < 4:
        tensor = tensor[None]
    return tensor.flatten(0, -4) if tensor.dim() > 4 else tensor
