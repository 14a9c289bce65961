"""Attention of Hugging Face's models: ``register()``, then ``attn_implementation="cqsa"``.

A model hides keys by a function of positions. Which of our masks that is, is found by comparing both at the positions
where they could differ: masks that we do not have are refused, and none is guessed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from cqsa_stream import masks
from cqsa_stream.api import attention
from cqsa_stream.errors import InputError
from cqsa_stream.integrations.options import refuse_options
from cqsa_stream.schedulers.masks.rule import Rule

__all__ = ["Seen", "register"]

_COMPARED = 1 << 16  # queries for which a mask is compared at a time
_UNDERSTOOD = {"dropout", "scaling", "sliding_window", "softcap", "s_aux", "is_causal"}
_HARMLESS = {  # what models hand on to every attention, and none has to look at
    "cache", "cache_position", "labels", "layer_idx", "logits_to_keep", "num_items_in_batch", "output_attentions",
    "output_hidden_states", "output_router_logits", "past_key_value", "past_key_values", "position_embeddings",
    "position_ids", "return_dict", "use_cache",
}  # fmt: skip

Visible = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Seen:
    """What a layer's queries see: a mask over positions, and the position of the first query; keys begin at 0.

    ``shape``: [1, 1, queries, keys], as that of a mask of numbers.
    """

    rule: Rule | None
    q_start: int
    shape: tuple[int, int, int, int]

    @property
    def ndim(self) -> int:
        return len(self.shape)


def register(name: str = "cqsa", **options: Any) -> None:
    """Make ``attn_implementation=name`` known to transformers: its attention is then computed by ``attention``.

    ``options``: those of ``attention``, for all layers, as ``host_memory="4GiB"``; the device is that of the query
    where none is named. Causal and bidirectional attention, sliding windows, chunks, soft caps and sinks are taken
    from the model. Raises InputError, at the call of a model, for what is not supported: padding, packed sequences,
    biases, dropout, gradients.
    """

    refuse_options(options)

    def attend(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **words: Any
    ) -> tuple[Tensor, None]:
        _refuse(words)
        found = attention(
            query,
            key,
            value,
            dropout_p=words.get("dropout", 0.0),
            enable_gqa=True,
            scale=words.get("scaling"),
            soft_cap=words.get("softcap"),
            sinks=words.get("s_aux"),
            **_masking(module, query, key, attention_mask, words),
            **{"device": str(query.device), **options},
        )
        return found.transpose(1, 2), None

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, _seen)


def _masking(module: torch.nn.Module, query: Tensor, key: Tensor, mask: Any, words: dict[str, Any]) -> dict[str, Any]:
    """Return the words of ``attention`` that say what the queries see. Raises InputError where nothing says it."""
    queries, keys = query.shape[2], key.shape[2]
    if isinstance(mask, Seen):
        if mask.shape[2:] != (queries, keys):
            raise InputError(f"this model attends {queries} queries to {keys} keys by a mask of {mask.shape[2:]}")
        return {"mask": mask.rule, "q_start": mask.q_start}
    if mask is not None:
        return {"attn_mask": mask}
    causal, window = words.get("is_causal"), words.get("sliding_window")
    causal = (getattr(module, "is_causal", True) if causal is None else causal) and queries > 1
    if queries != keys and (causal or window):
        raise InputError(
            f"a model without a mask, for {queries} queries and {keys} keys: their positions are not known"
        )
    return {"is_causal": bool(causal), "window": window}


def _refuse(words: dict[str, Any]) -> None:
    """Raise InputError where a model says something of its attention that we do not know."""
    for name, value in words.items():
        said = value is not None and value is not False
        if said and name not in _UNDERSTOOD | _HARMLESS:
            raise InputError(f"{name}: this model passes it to its attention, and it is not supported here")


def _seen(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Any = None,
    config: Any = None,
    use_vmap: bool = False,
    device: Any = None,
    **_: Any,
) -> Seen:
    """Return what the queries see, for a model's mask. Raises InputError."""
    if isinstance(attention_mask, Seen):  # made before, and handed on
        return attention_mask
    if mask_function is None or use_vmap:
        raise InputError("a mask function of the user's own is not supported; call cqsa_stream.attention with a mask")
    start, batch = int(q_offset) - int(kv_offset), torch.arange(batch_size, device=device)[:, None]
    known = list(_known(config))
    for first in range(start, start + q_length, _COMPARED):
        queries = torch.arange(first, min(first + _COMPARED, start + q_length), device=device)
        q, k = _where_they_could_differ(queries, kv_length, _sizes(config))
        seen = mask_function(batch, torch.tensor(0, device=device), q[None] + kv_offset, k[None] + kv_offset)
        known = [(rule, visible) for rule, visible in known if bool((visible(q, k) == seen).all())]
    if not known:
        raise InputError(
            "this model's mask is none of full, causal, sliding window or chunked (packed sequences, for example); "
            "call cqsa_stream.attention with a mask of cqsa_stream.masks"
        )
    found = Seen(known[0][0], start, (1, 1, q_length, kv_length))
    _refuse_padding(attention_mask, found, int(kv_offset))
    return found


def _refuse_padding(tokens: Tensor | None, seen: Seen, kv_offset: int) -> None:
    """Raise InputError where a mask of tokens hides any that a query would see; what it lacks at its end is hidden."""
    if tokens is None:
        return
    keys, last = seen.shape[3], seen.q_start + seen.shape[2] - 1
    told = tokens[:, kv_offset : kv_offset + keys]
    future = seen.rule is not None and last < told.shape[1]  # what is not told is after every query
    if not bool(told[:, : last + 1 if seen.rule else keys].all()) or (told.shape[1] < keys and not future):
        raise InputError(
            "attention_mask hides tokens: padding is not supported; pass sequences of one length, without padding"
        )


def _known(config: Any) -> Iterator[tuple[Rule | None, Visible]]:
    """Yield the masks that this model may mean, and whether they let a query see a key."""
    yield None, lambda q, k: torch.ones_like(q, dtype=torch.bool)
    yield masks.Window(None, 0), lambda q, k: k <= q
    window, chunk = _sizes(config)
    for left in (window - 1, window) if window else ():
        yield masks.Window(left, 0), partial(_in_window, left, 0)
        yield masks.Window(left, left), partial(_in_window, left, left)
    if chunk:
        yield masks.Chunked(chunk) & masks.Window(None, 0), partial(_in_chunk, chunk)


def _in_window(left: int, right: int, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q + right) & (k >= q - left)


def _in_chunk(size: int, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & (q // size == k // size)


def _sizes(config: Any) -> list[int]:
    return [getattr(config, name, None) or 0 for name in ("sliding_window", "attention_chunk_size")]


def _where_they_could_differ(q: Tensor, keys: int, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Return positions of queries and keys: each query with its neighbours, the ends, edges of windows and chunks."""
    near = {0, 1, -1, *(sign * (size + more) for size in sizes for sign in (-1, 1) for more in (-1, 0, 1))}
    columns = [q + distance for distance in sorted(near)]
    columns += [q // size * size + more for size in sizes if size for more in (-1, 0)]
    columns += [torch.zeros_like(q), torch.full_like(q, keys - 1), q // 2]
    k = torch.stack(columns).clamp(0, keys - 1)
    return q.expand_as(k).flatten(), k.flatten()
