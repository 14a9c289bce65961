"""What is done to scores besides scaling: named and versioned, as a run's manifest holds it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from cqsa_stream.errors import InputError

__all__ = ["TERMS", "Terms", "is_finite", "is_number"]

TERMS = {"soft_cap": "soft_cap", "alibi_slopes": "alibi"}
"""The terms that kernels compute, by the names of their parameters; sinks join when a row is complete."""

_VERSION = 1
_MOST = 3e38  # of what a kernel computes in float32


def is_number(value: object) -> bool:
    """Return whether a value is a real number, numpy's among them; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Return whether a value is a real number that a float can hold."""
    try:
        return isinstance(value, Real) and is_number(value) and math.isfinite(value)
    except OverflowError:
        return False


@dataclass(frozen=True)
class Terms:
    """With s the scaled product of query and key at positions i and j, in this order:

    ``soft_cap``: ``soft_cap * tanh(s / soft_cap)`` in the place of s (Gemma 2); ``alibi_slopes``, one a query head:
    ``s - slope * |i - j|`` (ALiBi, arXiv 2108.12409); ``sinks``, one a query head: the score of a key without a value
    that every row sees besides its own (gpt-oss), and that the log-sum-exp includes.
    """

    soft_cap: float | None = None
    alibi_slopes: tuple[float, ...] | None = None
    sinks: tuple[float, ...] | None = None

    @classmethod
    def of(cls, heads: int, soft_cap: Any = None, alibi_slopes: Any = None, sinks: Any = None) -> "Terms":
        """Raises InputError where a value cannot be, for so many query heads."""
        if soft_cap is not None and not (is_finite(soft_cap) and 0 < soft_cap <= _MOST):
            raise InputError(f"soft_cap {str(soft_cap)[:40]}; expected a finite number above 0, at most {_MOST:g}")
        slopes = _one_a_head("alibi_slopes", alibi_slopes, heads)
        if slopes is not None and min(slopes) < 0:
            raise InputError(f"alibi_slopes {min(slopes)}; expected at least 0: scores fall with the distance")
        return cls(None if soft_cap is None else float(soft_cap), slopes, _one_a_head("sinks", sinks, heads))

    @property
    def of_kernels(self) -> frozenset[str]:
        """What a kernel must know, by the names of ``TERMS``."""
        return frozenset(term for name, term in TERMS.items() if getattr(self, name) is not None)

    def to_list(self) -> list[dict[str, Any]]:
        """Return name, version and value of each term that there is."""
        found = ((field.name, getattr(self, field.name)) for field in fields(self))
        return [{"term": name, "version": _VERSION, "value": value} for name, value in found if value is not None]

    @classmethod
    def from_list(cls, heads: int, terms: Any) -> "Terms":
        """Raises ValueError, KeyError or TypeError where this is not what ``to_list`` returned."""
        named = {term["term"]: term["value"] for term in terms}
        other = len(named) != len(terms) or type(terms) is not list
        if (
            other
            or any(type(t["version"]) is not int or t["version"] != _VERSION for t in terms)
            or not set(named) <= {field.name for field in fields(cls)}
        ):
            raise ValueError(f"score terms {terms!r}; expected version {_VERSION} of {[f.name for f in fields(cls)]}")
        return cls.of(heads, **named)

    def __str__(self) -> str:
        cap = [] if self.soft_cap is None else [f"soft cap {self.soft_cap:g}"]
        return ", ".join([*cap, *["ALiBi"] * bool(self.alibi_slopes), *["sinks"] * bool(self.sinks)])


def _one_a_head(name: str, values: Any, heads: int) -> tuple[float, ...] | None:
    """Return one finite number for each head."""
    if values is None:
        return None
    try:
        found = values.tolist() if hasattr(values, "tolist") else list(values)
    except TypeError:
        found = []
    numbers = isinstance(found, list) and not isinstance(values, Mapping) and all(map(is_finite, found))
    if not numbers or len(found) != heads or max(map(abs, found)) > _MOST:
        raise InputError(
            f"{name}: found {str(values)[:60]}; expected {heads} finite numbers, one for each query head, of at most "
            f"{_MOST:g}"
        )
    return tuple(map(float, found))
