"""The problem: what is to be computed, checked before anything runs."""

import dataclasses
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from cqsa_stream.errors import InputError
from cqsa_stream.schedulers.masks.bands import Mask
from cqsa_stream.schedulers.masks.kinds import described, rule_of
from cqsa_stream.schedulers.masks.rule import Rule
from cqsa_stream.schedulers.masks.window import FULL
from cqsa_stream.scores import Terms, is_finite
from cqsa_stream.storage.dtypes import DTYPES, OUT_DTYPES, dtype_bytes

__all__ = ["DTYPES", "MOST_LANES", "OUT_DTYPES", "Problem", "dtype_bytes", "refuse_misfits"]

MOST_LANES = 1 << 20
_NO_TERMS, _NO_MASK = Terms(), Mask([], "none")


class Described(Protocol):
    """What the problem needs to know of an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True)
class Problem:
    """Attention of ``[batch, heads, query_tokens, head_dim]`` over ``[batch, kv_heads, keys, ...]``.

    ``first_query`` and ``queries`` name the computed slice of the query rows; the output has ``queries`` rows. Row i of
    the slice stands at position ``q_start + first_query + i``, key j at position j; ``mask`` is over these positions. A
    lane is one (batch, K/V head); the ``group`` query heads that share it ride together.
    """

    batch: int
    heads: int
    kv_heads: int
    query_tokens: int
    keys: int
    head_dim: int
    value_dim: int
    dtype: str
    out_dtype: str
    scale: float
    rule: Rule = dataclasses.field(compare=False)
    mask: Mask
    q_start: int
    first_query: int
    queries: int
    terms: Terms = _NO_TERMS

    @classmethod
    def of(
        cls,
        query: Described,
        key: Described,
        value: Described,
        *,
        scale: float | None = None,
        rule: Rule = FULL,
        q_start: int = 0,
        queries: tuple[int, int] | None = None,
        out_dtype: str | None = None,
        terms: Terms = _NO_TERMS,
    ) -> "Problem":
        """Check that the arrays and the options fit together. Raises InputError saying what was found and expected."""
        refuse_misfits(query, key, value)
        if out_dtype is not None and out_dtype not in OUT_DTYPES:
            raise InputError(f"output dtype {out_dtype!r}; expected one of {', '.join(OUT_DTYPES)}")
        (batch, heads, query_tokens, head_dim), (_, kv_heads, keys, _), value_dim = (
            query.shape,
            key.shape,
            value.shape[3],
        )
        if scale is not None and not is_finite(scale):
            raise InputError(f"scale {scale!r}; expected a finite number")
        try:
            first, stop = (0, query_tokens) if queries is None else map(operator.index, queries)
            q_start = operator.index(q_start)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"queries {queries!r}, q_start {q_start!r}; expected two whole numbers, and one"
            ) from error
        if max(abs(q_start), abs(q_start + query_tokens)) > 2**62 or batch * kv_heads > MOST_LANES:
            raise InputError(
                f"positions {q_start} to {q_start + query_tokens - 1}, batch x key/value heads {batch * kv_heads}; "
                f"expected positions below 2^62 (q_start is the first) and at most {MOST_LANES} heads"
            )
        if not 0 <= first < stop <= query_tokens:
            raise InputError(f"queries {first}:{stop}; expected 0 <= A < B <= {query_tokens} (the query tokens)")
        return cls(
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            query_tokens=query_tokens,
            keys=keys,
            head_dim=head_dim,
            value_dim=value_dim,
            dtype=query.dtype,
            out_dtype=out_dtype or (query.dtype if query.dtype in OUT_DTYPES else "bfloat16"),
            scale=head_dim**-0.5 if scale is None else float(scale),
            rule=rule,
            mask=_mask(rule, range(q_start, q_start + query_tokens), keys),
            q_start=q_start,
            first_query=first,
            queries=stop - first,
            terms=terms,
        )

    def __str__(self) -> str:
        """Say it in a line, as it was understood."""
        rows = f"{self.query_tokens:,} tokens"
        if self.queries != self.query_tokens:
            rows = f"rows {self.first_query:,} to {self.first_query + self.queries - 1:,} of {rows}"
        shared = "" if self.group == 1 else f" on {self.kv_heads}"
        keys = "" if self.keys == self.query_tokens else f", keys {self.keys:,} tokens"
        values = "" if self.value_dim == self.head_dim else f", values x {self.value_dim}"
        start = f", first query at {self.q_start:,}" if self.q_start else ""
        terms = f", {self.terms}" if str(self.terms) else ""
        return (
            f"query {self.batch} x {self.heads} heads{shared} x {rows} x {self.head_dim} {self.dtype}{keys}{values}, "
            f"{self.rule}{terms}{start}"
        )

    @property
    def group(self) -> int:
        """Query heads for each key/value head."""
        return self.heads // self.kv_heads

    @property
    def partial_dtype(self) -> str:
        """The dtype in which partials are kept: float32, or what the inputs have if that is finer."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def lanes(self) -> int:
        return self.batch * self.kv_heads

    def lane_heads(self, lane: int) -> tuple[int, range, range]:
        """Return (batch, query heads, key/value heads) of a lane."""
        batch, head = divmod(lane, self.kv_heads)
        return batch, range(head * self.group, (head + 1) * self.group), range(head, head + 1)

    def output_heads(self, sum_: int, lane: int) -> tuple[int, range]:
        """Return (batch, heads) of a lane in the output of the sum by query rows, the only one."""
        return self.lane_heads(lane)[:2]

    @property
    def same_positions(self) -> bool:
        """Whether queries and keys are the same positions of one sequence."""
        return self.queries == self.query_tokens == self.keys and self.q_start == 0

    @cached_property
    def visible(self) -> Mask:
        """The mask over (computed query rows, keys), both counted from 0."""
        first = self.q_start + self.first_query
        rows = range(first, first + self.queries)
        return self.mask.restricted(rows, range(self.keys)).shifted(-first, 0)

    @property
    def input_shapes(self) -> dict[str, tuple[int, int, int, int]]:
        return {
            "query": (self.batch, self.heads, self.query_tokens, self.head_dim),
            "key": (self.batch, self.kv_heads, self.keys, self.head_dim),
            "value": (self.batch, self.kv_heads, self.keys, self.value_dim),
        }

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.heads, self.queries, self.value_dim)

    @cached_property
    def scores(self) -> int:
        """The visible scores of one head."""
        return self.visible.scores(range(self.queries), range(self.keys))

    @property
    def flops(self) -> int:
        """Floating-point operations of all lanes: 2 (head_dim + value_dim) for each visible score."""
        return 2 * (self.head_dim + self.value_dim) * self.scores * self.heads * self.batch

    def to_dict(self, keep: Callable[[np.ndarray], Any] = np.ndarray.tolist) -> dict[str, Any]:
        """Return the problem as JSON holds it: the mask as its rule. ``keep`` returns what stands for an array."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        rule = [
            {name: keep(value) if isinstance(value, np.ndarray) else value for name, value in part.items()}
            for part in described(self.rule)
        ]
        del fields["mask"]
        return {**fields, "rule": rule, "terms": self.terms.to_list()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any], load: Callable[[str], np.ndarray] | None = None) -> "Problem":
        """Return the problem of what ``to_dict`` gave. ``load`` returns the array that a text stands for.

        Raises ValueError or TypeError where this is none.
        """
        parts = [
            {
                name: load(value) if load and name != "kind" and type(value) is str else value
                for name, value in it.items()
            }
            for it in fields["rule"]
        ]
        named = {**fields, "rule": rule_of(parts), "terms": Terms.from_list(fields["heads"], fields["terms"])}
        claimed = cls(**named, mask=_NO_MASK)
        for name, kind in cls.__annotations__.items():
            if kind in (int, str, float) and type(getattr(claimed, name)) is not kind:
                raise ValueError(f"{name} {getattr(claimed, name)!r}; expected {kind.__name__}")
            if kind is int and abs(getattr(claimed, name)) > 2**62:
                raise ValueError(f"{name} {getattr(claimed, name)}; expected at most 2^62")
        found = cls.of(
            *(_Shaped(shape, claimed.dtype) for shape in claimed.input_shapes.values()),
            scale=claimed.scale,
            rule=claimed.rule,
            q_start=claimed.q_start,
            queries=(claimed.first_query, claimed.first_query + claimed.queries),
            out_dtype=claimed.out_dtype,
            terms=claimed.terms,
        )
        assert dataclasses.replace(found, mask=_NO_MASK) == claimed
        return found


@dataclass(frozen=True)
class _Shaped:
    shape: tuple[int, ...]
    dtype: str


def refuse_misfits(query: Described, key: Described, value: Described) -> None:
    """Raise InputError where the arrays cannot be the query, key and value of one attention."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        if len(array.shape) != 4:
            raise InputError(f"{name}: shape {array.shape}; expected 4 axes [batch, head, token, feature]")
        if array.dtype not in DTYPES:
            raise InputError(f"{name}: dtype {array.dtype}; expected one of {', '.join(DTYPES)}: convert the array")
        if min(array.shape) < 1:
            raise InputError(f"{name}: shape {array.shape} has an axis of length 0; expected at least 1 of each")
    if not query.dtype == key.dtype == value.dtype:
        found = f"query {query.dtype}, key {key.dtype}, value {value.dtype}"
        raise InputError(f"mixed dtypes: {found}; expected one dtype, convert the arrays to one")
    (batch, heads, _, head_dim), kv_heads, value_dim = query.shape, key.shape[1], value.shape[3]
    if key.shape[0] != batch or value.shape[0] != batch:
        found = f"query {batch}, key {key.shape[0]}, value {value.shape[0]}"
        raise InputError(f"batch sizes differ: {found}; expected the same")
    if key.shape[1:3] != value.shape[1:3]:
        raise InputError(
            f"key has (heads, tokens) {key.shape[1:3]}, value {value.shape[1:3]}; expected the same of both"
        )
    if key.shape[3] != head_dim:
        raise InputError(f"query has head dim {head_dim}, key {key.shape[3]}; expected the same")
    if max(head_dim, value_dim) > 256:
        raise InputError(f"head dims {head_dim} and {value_dim} (value); expected at most 256")
    if heads % kv_heads:
        raise InputError(f"{heads} query heads over {kv_heads} key/value heads; expected a multiple")


def _mask(rule: Rule, positions: range, keys: int) -> Mask:
    """Return the mask of queries at these positions. Raises InputError."""
    try:
        return rule.over(positions, keys)
    except ValueError as error:
        raise InputError(f"mask: {error}") from error
