"""The one edge of the Python surface and the command line: their words are parsed and checked here, once.

A command holds what is computed (the problem), of which arrays, how (the options) and where the result goes (the
target). What comes after it takes these values as they are.
"""

import logging
import operator
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from cqsa_stream.errors import InputError
from cqsa_stream.inputs import open_inputs, refuse_gradients
from cqsa_stream.machine.places import local_path
from cqsa_stream.machine.surroundings import undisturbed
from cqsa_stream.masks import Chunked, Documents, Prefix, from_dense, load, numbers
from cqsa_stream.options import Options
from cqsa_stream.problem import Problem, refuse_misfits
from cqsa_stream.schedulers.masks.rule import Joined, Rule
from cqsa_stream.schedulers.masks.window import CAUSAL, FULL, last_keys
from cqsa_stream.scores import Terms, is_number
from cqsa_stream.storage.open import TokenArray

__all__ = ["Command", "Look", "Target", "parse_queries", "parse_window"]

_SMALL_BYTES = 1 << 20  # no budget is so small: the unit is missing

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """Where a durable run goes, and how its inputs are read. ``lse`` None: into the run directory."""

    out: Path
    run_dir: Path
    lse: Path | None = None
    fresh: bool = False
    fill_missing: bool = False
    layout: str = "bhtd"

    @classmethod
    def of(
        cls,
        out: str | os.PathLike[str],
        run_dir: str | os.PathLike[str] | None = None,
        lse: str | os.PathLike[str] | None = None,
        **reading: Any,
    ) -> "Target":
        """The run directory is ``OUT.run`` beside the output where none is named. ``reading``: the other fields."""
        path = _place(out)
        directory = path.with_name(path.name + ".run") if run_dir is None else _place(run_dir)
        return cls(path, directory, None if lse is None else _place(lse), **reading)

    def disk(self, begun: bool) -> Path | None:
        """Return a place on the disk that the run will fill; None where that is several, or is emptied before."""
        places = [self.out, self.run_dir, *([self.lse] if self.lse else [])]
        there = {next(p for p in (path, *path.parents) if p.exists()).stat().st_dev for path in places}
        return None if len(there) > 1 or (begun and self.fresh) else self.out


Look = Callable[[Target, dict[str, TokenArray]], None]
"""Refuses arrays with which the target's run cannot have begun."""


@dataclass(frozen=True)
class Command:
    """What is computed, of what, how, and where the result goes; ``target`` None: into memory."""

    arrays: dict[str, TokenArray]
    problem: Problem
    options: Options
    target: Target | None = None

    @classmethod
    def of(cls, words: Mapping[str, Any], look: Look = lambda _, __: None) -> "Command":
        """Parse the arguments of ``attention`` by their names, and open the arrays. Those of torch's may be missing.

        Raises InputError and ArrayError; MismatchError where the target's run began with other arrays.
        """
        _refuse_what_cannot_be(words)
        options = Options(**{field.name: words.get(field.name) for field in fields(Options)})
        _warn_of_sizes_without_unit(words)
        reading = {name: words[name] for name in ("fill_missing", "layout")}
        out, places = words["out"], (words["run_dir"], words["lse"])
        target = None if out is None else Target.of(out, *places, fresh=words["fresh"], **reading)
        with undisturbed():
            arrays = open_inputs(words["query"], words["key"], words["value"], **reading)
        if any(array.source == "memory" for array in arrays.values()):
            options = options.in_one_process()
        if target is not None:
            look(target, arrays)
        refuse_misfits(arrays["query"], arrays["key"], arrays["value"])
        heads = arrays["query"].shape[1]
        problem = Problem.of(
            arrays["query"],
            arrays["key"],
            arrays["value"],
            scale=words["scale"],
            rule=_rule(words, (*arrays["query"].shape[:3], arrays["key"].shape[2])),
            q_start=words["q_start"],
            queries=parse_queries(words["queries"]),
            out_dtype=words["out_dtype"],
            terms=Terms.of(heads, words.get("soft_cap"), *(numbers(words.get(n)) for n in ("alibi_slopes", "sinks"))),
        )
        if problem.group > 1 and not words.get("enable_gqa", True):
            raise InputError(
                f"{problem.heads} query heads over {problem.kv_heads} key/value heads; set enable_gqa=True"
            )
        return cls(arrays, problem, options, target)


def _rule(words: Mapping[str, Any], shape: tuple[int, ...]) -> Rule:
    """Return what all that is named of a mask lets through together. Raises InputError."""
    given, window = words.get("mask"), parse_window(words["window"])
    if isinstance(given, str | os.PathLike):
        given = load(given)
    elif given is not None and not isinstance(given, Rule):
        raise InputError(
            f"mask: found a {type(given).__name__}; expected one of cqsa.masks, or the path of a JSON file"
        )
    parts = [given or FULL, CAUSAL if words["is_causal"] else FULL, FULL if window is None else last_keys(window)]
    for name, kind in (("documents", Documents), ("chunked", Chunked), ("prefix", Prefix)):
        if words.get(name) is not None:
            try:
                parts.append(kind(words[name]))
            except InputError as error:
                raise InputError(f"{name} {words[name]!r}: {str(error).removeprefix('mask: ')}") from error
    if words.get("attn_mask") is not None:
        start = parse_number("q_start", words["q_start"])
        parts.append(from_dense(words["attn_mask"], start, shape))
    return Joined.of(*parts)


def parse_number(name: str, value: Any) -> int:
    """Return a whole number. Raises InputError where that is none."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise InputError(f"{name} {value!r}; expected a whole number") from error


def parse_window(window: Any) -> int | None:
    """Return the keys that a row sees, its own and those before it. Raises InputError where that is none."""
    if window is None:
        return None
    try:
        keys = 0 if isinstance(window, bool | np.bool_) else operator.index(window)
    except TypeError:
        keys = 0
    if keys < 1:
        raise InputError(f"window {window!r}; expected a whole number of keys, at least 1 (a row's own)")
    return keys


def parse_queries(queries: Any) -> Any:
    """Return (first, stop) of "A:B", as the command line has it; what else it may be is for the problem to check."""
    if not isinstance(queries, str):
        return queries
    match = re.fullmatch(r"(\d{1,18}):(\d{1,18})", queries, re.ASCII)
    if match is None:
        raise InputError(f"queries {queries!r}; expected A:B, as 0:4096")
    return int(match[1]), int(match[2])


def _refuse_what_cannot_be(words: Mapping[str, Any]) -> None:
    """Raise InputError where a word asks for what there is not, or a flag is no flag ("no" would count as True)."""
    refuse_gradients(words["query"], words["key"], words["value"])
    dropout = words.get("dropout_p", 0.0)
    if not is_number(dropout) or dropout != 0:
        raise InputError(f"dropout_p {dropout!r}: not supported, the result is exact; leave it 0.0")
    for name in ("run_dir", "lse"):
        if words["out"] is None and words[name] is not None:
            raise InputError(f"{name} without out: a run that can be resumed needs a path for its output; give out")
    for name in ("shares", "workers", "executor", "address"):
        if words["out"] is None and words.get(name) is not None:
            raise InputError(f"{name} without out: workers meet on disk; give out, a path for the output")
    for name in ("is_causal", "enable_gqa", "return_lse", "fill_missing", "fresh"):
        flag = words.get(name, False)
        if not isinstance(flag, bool | np.bool_):
            raise InputError(f"{name} {flag!r}; expected True or False")


def _warn_of_sizes_without_unit(words: Mapping[str, Any]) -> None:
    for name in ("device_memory", "host_memory"):
        size = str(words.get(name)).strip()
        if size.isdigit() and int(size) < _SMALL_BYTES:
            _log.warning('%s=%s is %s bytes; sizes take a unit, as "%sMiB"', name, size, size, size)


def _place(path: str | os.PathLike[str]) -> Path:
    """Return an absolute path without links in the folders that lead to it. Raises InputError where it names none."""
    whole = Path(os.path.abspath(local_path(path)))  # noqa: PTH100 - Path.absolute keeps ".."
    if not whole.name:
        raise InputError(f"{path}: no name for a file; expected a path like out.zarr")
    return Path(os.path.realpath(whole.parent), whole.name)
