"""A rule says which keys a query sees, by their positions; over given queries and keys it becomes a list of bands.

Rules are what users name, and what a run's manifest holds: a kind, its version, and parameters, which are whole
numbers, None, or arrays of whole numbers.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import reduce
from typing import Any, ClassVar

import numpy as np

from cqsa_stream.schedulers.masks.bands import Mask

__all__ = ["Joined", "Rule", "array_of", "number_of"]

_FARTHEST = 2**62


@dataclass(frozen=True, eq=False)
class Rule(ABC):
    """With i the query's and j the key's position. ``kind`` and ``version`` are its name in files."""

    kind: ClassVar[str]
    version: ClassVar[int] = 1

    @abstractmethod
    def over(self, rows: range, keys: int) -> Mask:
        """Return the mask of queries at these positions over keys at positions 0 to ``keys - 1``.

        Raises ValueError where it takes too many bands.
        """

    def __and__(self, other: "Rule") -> "Rule":
        """Return what both let through."""
        if not isinstance(other, Rule):
            return NotImplemented
        return Joined.of(self, other)

    @property
    def parts(self) -> "tuple[Rule, ...]":
        """The rules of which this one is joined; itself where it is of one piece."""
        return (self,)

    @property
    def bounded(self) -> bool:
        """Whether it hides anything."""
        return True

    def merged(self, other: "Rule") -> "Rule | None":
        """Return one rule of what both let through, where there is one of the same kind."""
        return None

    def parameters(self) -> dict[str, Any]:
        """Return its parameters by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def named(cls, parameters: Mapping[str, Any]) -> "Rule":
        """Return the rule of parameters by name. Raises ValueError where they are not its own."""
        wanted = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if not needed <= set(parameters) <= wanted:
            raise ValueError(f"{cls.kind} with {sorted(parameters)}; expected {sorted(wanted)}")
        return cls(**parameters)


@dataclass(frozen=True, eq=False)
class Joined(Rule):
    """What each of several rules lets through."""

    rules: tuple[Rule, ...]
    kind: ClassVar[str] = "joined"

    @classmethod
    def of(cls, *rules: Rule) -> Rule:
        """Join rules; those that can become one do, and what lets all through is left out."""
        kept: list[Rule] = []
        for part in (part for rule in rules for part in rule.parts):
            merged = ((n, both) for n, other in enumerate(kept) if (both := other.merged(part)) is not None)
            place, both = next(merged, (len(kept), part))
            kept[place : place + 1] = [both]
        found = [rule for rule in kept if rule.bounded] or kept[:1]
        return found[0] if len(found) == 1 else cls(tuple(found))

    @property
    def parts(self) -> tuple[Rule, ...]:
        return self.rules

    def over(self, rows: range, keys: int) -> Mask:
        first, *others = (rule.over(rows, keys) for rule in self.rules)
        return reduce(lambda a, b: a.joined(b, str(self)), others, first)

    def __str__(self) -> str:
        return " and ".join(map(str, self.rules))


def number_of(name: str, value: object, least: int = 1) -> int:
    """Return a whole number. Raises ValueError where it is none, too small, or beyond 2^62."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = int(value.__index__())  # type: ignore[attr-defined]
    except (TypeError, AttributeError):
        raise ValueError(f"{name} {str(value)[:40]}; expected a whole number") from None
    if not least <= number <= _FARTHEST:
        raise ValueError(f"{name} {str(number)[:40]}; expected at least {least}, and at most 2^62")
    return number


def array_of(name: str, values: Any, axes: int) -> np.ndarray:
    """Return whole numbers as an int64 array that nobody changes. Raises ValueError where they are no such."""
    try:
        found = np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name}: {error}; expected whole numbers") from None
    if found.ndim != axes or found.dtype.kind not in "iu" or (found.dtype.kind == "u" and np.any(found > _FARTHEST)):
        raise ValueError(f"{name}: found {found.dtype} of shape {found.shape}; expected whole numbers, {axes} axes")
    kept = found.astype(np.int64)
    kept.flags.writeable = False
    return kept
