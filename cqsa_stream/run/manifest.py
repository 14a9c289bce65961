"""What a run is, as JSON that carries its own checksum; whatever a file claims is checked before it is believed."""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np

from cqsa_stream.problem import Problem
from cqsa_stream.schedulers.grid import Axis, Grid
from cqsa_stream.schedulers.model.memory import Layout
from cqsa_stream.schedulers.plan import Chosen
from cqsa_stream.schedulers.search import MOST_CHUNKS
from cqsa_stream.schedulers.shares import MOST_SHARES
from cqsa_stream.storage.open import LAYOUTS
from cqsa_stream.storage.readers.locations import is_url

__all__ = ["Manifest", "beside", "sealed", "unsealed"]

_FORMAT = 7
_MOST_LISTED = 256  # numbers of an array that stand in the manifest itself
_ID, _SHA256 = re.compile("[0-9a-f]{32}"), re.compile("[0-9a-f]{64}")
_INPUTS = {"query", "key", "value"}
_ABOUT_INPUT = {"source", "beside", "fingerprint"}


@dataclass(frozen=True)
class Manifest:
    """What a run is. ``inputs``: source and fingerprint of each ("" until it is taken: nothing is stored before), and
    ``beside``, its path relative to the run directory ("" where it has none); ``layout``: their axes as they are
    stored; ``out_tokens``: tokens of a stored output chunk; ``output`` and ``lse`` are paths relative to the run
    directory. ``shares`` fix the result's bits, with what the plan has ``chosen``: that is None where there is one
    share, and each session may choose anew. ``id`` is drawn when the run begins: nothing that an earlier run left in
    the same place is taken for its own.
    """

    problem: Problem
    rows: Axis
    columns: Axis
    out_tokens: int
    inputs: dict[str, dict[str, str]]
    output: str
    lse: str
    fill_missing: bool
    layout: str = "bhtd"
    shares: int = 1
    chosen: Chosen | None = None
    id: str = field(default_factory=lambda: token_hex(16))

    @cached_property
    def grid(self) -> Grid:
        return Grid(self.rows, self.columns, self.problem.visible, self.problem.same_positions)

    @cached_property
    def arrays(self) -> dict[str, bytes]:
        """The longer arrays of the mask, as .npy files, each by its SHA-256: the manifest names them by it."""
        found: dict[str, bytes] = {}
        self.problem.to_dict(lambda array: _kept(array, found))
        return found

    @property
    def run_hash(self) -> bytes:
        """The hash of problem, grid and id, which every stored partial carries."""
        fields = self._fields()
        return hashlib.sha256(_canonical([fields[name] for name in ("problem", "rows", "columns", "id")])).digest()

    def to_json(self) -> bytes:
        return sealed(_FORMAT, self._fields())

    def _fields(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        problem = self.problem.to_dict(lambda array: _kept(array, {}))
        chosen = self.chosen and asdict(self.chosen)
        axes = {"rows": asdict(self.rows), "columns": asdict(self.columns)}
        return {**fields, "problem": problem, **axes, "chosen": chosen}

    @classmethod
    def from_json(cls, data: bytes, load: Callable[[str], bytes] | None = None) -> "Manifest":
        """``load`` returns the file of an array by its SHA-256.

        Raises ValueError where this is not what ``to_json`` wrote, or says what no run can be.
        """
        fields = unsealed(_FORMAT, data)
        try:
            problem = Problem.from_dict(fields["problem"], load and (lambda name: _loaded(name, load)))
            axes = {name: Axis(**fields[name]) for name in ("rows", "columns")}
            chosen = None if fields["chosen"] is None else Chosen.from_dict(fields["chosen"])
            found = cls(**{**fields, "problem": problem, **axes, "chosen": chosen})
            found._refuse_the_impossible()
        except (KeyError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
            raise ValueError(f"not a manifest ({type(error).__name__}: {error})") from error
        return found

    def _refuse_the_impossible(self) -> None:
        """Raise ValueError where the fields do not fit together, or their sizes could exhaust memory."""
        for axis, tokens in ((self.rows, self.problem.queries), (self.columns, self.problem.keys)):
            if not all(type(n) is int for n in (axis.tokens, axis.chunk_tokens, axis.chunks)):
                raise ValueError(f"a grid {axis}; expected whole numbers")
            longest = tokens + tokens // 8  # as ``Axis.cut`` rounds
            fits = 0 < axis.chunk_tokens <= longest and axis.chunk_tokens * axis.chunks >= tokens
            if axis.tokens != tokens or not fits or not 0 < axis.chunks <= MOST_CHUNKS:
                raise ValueError(f"a grid {axis} for {tokens} tokens")
        if type(self.out_tokens) is not int or not 0 < self.out_tokens <= self.rows.chunk_tokens:
            raise ValueError(f"output chunks of {self.out_tokens!r} tokens, in row chunks of {self.rows.chunk_tokens}")
        if type(self.shares) is not int or not 0 < self.shares <= MOST_SHARES:
            raise ValueError(f"{self.shares!r} shares; expected 1 to {MOST_SHARES}")
        if (self.shares > 1) != (self.chosen is not None):
            raise ValueError(f"{self.shares} shares, and a plan {self.chosen}; expected a plan for several")
        if self.chosen is not None:
            Layout.from_dict(self.chosen.layout)
        if type(self.fill_missing) is not bool:
            raise ValueError(f"fill_missing {self.fill_missing!r}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r}; expected one of {', '.join(LAYOUTS)}")
        if type(self.id) is not str or not _ID.fullmatch(self.id):
            raise ValueError(f"an id {self.id!r}")
        for path in (self.output, self.lse):
            if type(path) is not str or not path or b"\0" in os.fsencode(path):
                raise ValueError(f"a path {path!r}")
        if set(self.inputs) != _INPUTS or not all(set(about) == _ABOUT_INPUT for about in self.inputs.values()):
            raise ValueError(f"inputs {sorted(self.inputs)}; expected {sorted(_ABOUT_INPUT)} of {sorted(_INPUTS)}")
        for about in self.inputs.values():
            if not all(type(word) is str and b"\0" not in os.fsencode(word) for word in about.values()):
                raise ValueError(f"an input {about}")


def _kept(array: np.ndarray, files: dict[str, bytes]) -> Any:
    """Return what stands for an array in a manifest: its numbers or, where they are many, the SHA-256 of its file."""
    if array.size <= _MOST_LISTED:
        return array.tolist()
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    name = hashlib.sha256(file.getvalue()).hexdigest()
    files[name] = file.getvalue()
    return name


def _loaded(name: str, load: Callable[[str], bytes]) -> np.ndarray:
    """Return the array of a file. Raises ValueError where it is not what was written."""
    if not _SHA256.fullmatch(name):
        raise ValueError(f"an array named {name[:80]!r}; expected a SHA-256")
    content = load(name)
    if hashlib.sha256(content).hexdigest() != name:
        raise ValueError(f"{name}.npy: it fails its checksum")
    try:
        array: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    except MemoryError as error:
        raise ValueError(f"{name}.npy: {error}") from error
    return array


def beside(source: str, run_directory: Path) -> str:
    """Return a source's path relative to the run directory, by which it is found when both were moved; else ""."""
    if source == "memory" or is_url(source):
        return ""
    folder, name = os.path.split(source)
    return os.path.relpath(Path(os.path.realpath(folder), name), run_directory)


def sealed(format_: int, fields: dict[str, Any]) -> bytes:
    """Return fields as JSON that says its format and carries its own SHA-256."""
    whole = {"format": format_, **fields}
    whole["sha256"] = hashlib.sha256(_canonical(whole)).hexdigest()
    return json.dumps(whole, indent=1).encode() + b"\n"


def unsealed(format_: int, data: bytes) -> dict[str, Any]:
    """Return the fields. Raises ValueError where this is not what ``sealed`` made of any."""
    try:
        fields = json.loads(data)
        if not isinstance(fields, dict) or fields.pop("format", None) != format_:
            raise ValueError(f"expected format {format_}")
        checksum = fields.pop("sha256", None)
        if checksum != hashlib.sha256(_canonical({"format": format_, **fields})).hexdigest():
            raise ValueError("it fails its checksum")
    except (RecursionError, UnicodeError) as error:
        raise ValueError(f"no JSON ({type(error).__name__}: {error})") from error
    return fields


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
