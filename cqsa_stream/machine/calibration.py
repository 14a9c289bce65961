"""What ``cqsa bench`` found, kept per machine and device in the user's cache folder as JSON.

A file that cannot be read, or holds anything but positive numbers where they belong, counts as none.
"""

import hashlib
import json
import math
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs
import torch

from cqsa_stream.machine.device import Device
from cqsa_stream.schedulers.model.rates import Rates, Speeds, TileTimes
from cqsa_stream.storage.atomic import make_directory, replace_file, sweep

__all__ = ["Calibration", "Timed", "load", "path_for", "trying"]

_FORMAT = 5


@dataclass(frozen=True)
class Timed:
    """Times of calls by one operator in one compute dtype and head dim."""

    dtype: str
    dim: int
    operator: str
    times: TileTimes


@dataclass(frozen=True)
class Calibration:
    """Times of kernel calls, and what the machine takes besides."""

    tiles: tuple[Timed, ...]
    speeds: Speeds

    def _nearest(self, dtype: str, dim: int) -> dict[str, Timed]:
        """Return, by operator, what was measured of the nearest head dim; nothing of another dtype."""
        of_dtype = [timed for timed in self.tiles if timed.dtype == dtype]
        nearest = min((timed.dim for timed in of_dtype), key=lambda known: abs(math.log(known / dim)), default=0)
        return {timed.operator: timed for timed in of_dtype if timed.dim == nearest}

    def fastest(self, dtype: str, width: int, operators: Sequence[str], rows: int, columns: int) -> str | None:
        """Return the fastest operator for calls of this size; None where one of them was not measured."""
        found = self._nearest(dtype, width)
        if not found.keys() >= set(operators):
            return None
        return min(operators, key=lambda operator: found[operator].times.tile_s(rows, columns))

    def rates(self, dtype: str, operator: str, head_dim: int, value_dim: int) -> Rates | None:
        """Return the rates for a compute dtype, operator and head dims, from the nearest measured; None for others."""
        found = self._nearest(dtype, max(head_dim, value_dim)).get(operator)
        if found is None:
            return None
        return Rates(found.times.scaled((head_dim + value_dim) / (2 * found.dim)), self.speeds)

    def __str__(self) -> str:
        lines = []
        for timed in self.tiles:
            times = timed.times
            kind = f"{timed.dtype}, head dim {timed.dim}, {timed.operator}"
            lines.append(f"{kind}: GFLOP/s by rows and columns of a call")
            lines.append(" " * 8 + "".join(f"{columns:>9,}" for columns in times.columns))
            for rows, seconds in zip(times.rows, times.seconds, strict=True):
                rates = (4 * timed.dim * rows * c / s / 1e9 for c, s in zip(times.columns, seconds, strict=True))
                lines.append(f"{rows:>8,}" + "".join(f"{rate:>9,.0f}" for rate in rates))
        speeds = self.speeds
        lines.append(
            f"disk: {speeds.read_bytes_per_s / 1e9:.2f} GB/s read, {speeds.write_bytes_per_s / 1e9:.2f} GB/s written, "
            f"{speeds.file_s * 1e3:.2f} ms for a durable file, delaying kernels by {speeds.file_lost_s * 1e3:.2f} ms"
        )
        lines.append(
            f"processor: {speeds.read_cpu_s * 1e9:.2f} s/GB to read, {speeds.check_cpu_s * 1e9:.2f} with checksums, "
            f"{speeds.expand_cpu_s * 1e9:.2f} compressed; {speeds.block_s * 1e3:.2f} ms to hand over a block"
        )
        lines.append(
            f"memory: {speeds.stage_bytes_per_s / 1e9:.1f} GB/s to the kernel, {speeds.touch_bytes_per_s / 1e9:.1f} new"
        )
        return "\n".join(lines)

    def to_json(self) -> bytes:
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> "Calibration":
        """Raises ValueError, KeyError or TypeError where this is not what ``to_json`` wrote."""
        fields = json.loads(data)
        if fields.pop("format") != _FORMAT:
            raise ValueError(f"expected format {_FORMAT}")
        return cls(tuple(_timed(timed) for timed in fields["tiles"]), _speeds(fields["speeds"]))

    def save(self, device: Device) -> Path:
        """Keep this for the plans to come; return where."""
        path = path_for(device)
        make_directory(path.parent)
        sweep(path.parent)
        replace_file(path, [self.to_json()])
        _stored.cache_clear()
        return path


def path_for(device: Device) -> Path:
    """Return where the calibration of this machine, device and build of torch is kept."""
    machine = (platform.node(), device.torch.type, device.model, torch.get_num_threads(), torch.__version__)
    digest = hashlib.sha256(json.dumps([str(part) for part in machine]).encode()).hexdigest()[:16]
    return Path(platformdirs.user_cache_dir("cqsa-stream", appauthor=False)) / f"{device.torch.type}-{digest}.json"


def load(device: Device) -> Calibration | None:
    """Return this machine's calibration, None where there is none."""
    return _trying[-1] if _trying else _stored(device)


@contextmanager
def trying(calibration: Calibration) -> Iterator[None]:
    """Plan by a calibration that is not kept."""
    _trying.append(calibration)
    try:
        yield
    finally:
        _trying.pop()


_trying: list[Calibration] = []


@cache
def _stored(device: Device) -> Calibration | None:
    try:
        return Calibration.from_json(path_for(device).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _speeds(fields: dict[str, Any]) -> Speeds:
    return Speeds(**{name: _positive(figure) for name, figure in fields.items()})


def _timed(fields: dict[str, Any]) -> Timed:
    dtype, dim, operator = fields["dtype"], _positive(fields["dim"]), fields["operator"]
    if type(dtype) is not str or type(dim) is not int or type(operator) is not str:
        raise ValueError(f"{dtype!r}, {dim!r}, {operator!r}; expected the names and the head dim of what was measured")
    return Timed(dtype, dim, operator, _tile_times(fields["times"]))


def _tile_times(fields: dict[str, Any]) -> TileTimes:
    rows, columns = (tuple(fields[name]) for name in ("rows", "columns"))
    for sizes in (rows, columns):
        if len(sizes) < 2 or list(sizes) != sorted({int(_positive(n)) for n in sizes}):
            raise ValueError(f"sizes {sizes}; expected at least two, ascending")
    seconds = tuple(tuple(_positive(s) for s in row) for row in fields["seconds"])
    if len(seconds) != len(rows) or any(len(row) != len(columns) for row in seconds):
        raise ValueError("times that do not belong to the sizes")
    threads = fields["threads"]
    if type(threads) is not int or not 0 <= threads < 2**16:
        raise ValueError(f"threads {threads!r}")
    causal, stacked = _positive(fields["causal"]), _positive(fields["stacked"])
    return TileTimes(rows, columns, seconds, causal, stacked, threads)


def _positive(value: Any) -> float:
    if type(value) not in (int, float) or not (0 < value < math.inf):
        raise ValueError(f"{value!r}; expected a positive number")
    return value  # type: ignore[no-any-return]
