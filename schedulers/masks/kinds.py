"""All kinds of rules, by name; and rules as a list of named parameters, as files hold them."""

from collections.abc import Mapping, Sequence
from typing import Any

from cqsa_stream.schedulers.masks.blocks import Blocks
from cqsa_stream.schedulers.masks.chunked import Chunked
from cqsa_stream.schedulers.masks.dense import Dense
from cqsa_stream.schedulers.masks.documents import Documents
from cqsa_stream.schedulers.masks.listed import Bands
from cqsa_stream.schedulers.masks.prefix import Prefix
from cqsa_stream.schedulers.masks.rule import Joined, Rule
from cqsa_stream.schedulers.masks.strip import Strip
from cqsa_stream.schedulers.masks.window import Window

__all__ = ["KINDS", "described", "rule_of"]

KINDS: dict[str, type[Rule]] = {
    kind.kind: kind for kind in (Bands, Blocks, Chunked, Dense, Documents, Prefix, Strip, Window)
}


def described(rule: Rule) -> list[dict[str, Any]]:
    """Return kind, version and parameters of each part of a rule."""
    return [{"kind": part.kind, "version": part.version, **part.parameters()} for part in rule.parts]


def rule_of(parts: Sequence[Mapping[str, Any]]) -> Rule:
    """Return the rule of what ``described`` returned; the version may be missing. Raises ValueError."""
    if not parts:
        raise ValueError("a mask of no parts; expected at least one")
    rules = []
    for part in parts:
        parameters = dict(part)
        kind = KINDS.get(str(parameters.pop("kind", None)))
        if kind is None:
            raise ValueError(f"kind {str(part.get('kind'))[:40]!r}; expected one of {', '.join(sorted(KINDS))}")
        version = parameters.pop("version", kind.version)
        if type(version) is not int or version != kind.version:
            raise ValueError(f"{kind.kind} of version {version!r}; expected {kind.version}")
        rules.append(kind.named(parameters))
    return Joined.of(*rules)
