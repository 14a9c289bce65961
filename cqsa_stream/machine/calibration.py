"""What ``cqsa bench`` found, kept per machine and device in the user's cache folder as JSON.

A file that cannot be read, or holds anything but positive numbers where they belong, counts as none.
"""

import hashlib
import json
import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs
import torch

from cqsa_stream.schedulers.model.rates import Rates, Speeds, TileTimes
from cqsa_stream.storage.atomic import make_directory, replace_file, sweep

__all__ = ["Calibration", "load", "path_for", "trying"]

_FORMAT = 3


@dataclass(frozen=True)
class Calibration:
    """Times of kernel calls by compute dtype and head dim, and what the machine takes besides."""

    tiles: dict[str, dict[int, TileTimes]]
    speeds: Speeds

    def nearest(self, dtype: str, dim: int) -> int | None:
        """Return the head dim that was measured and is nearest; None for another dtype."""
        return min(self.tiles.get(dtype, ()), key=lambda known: abs(math.log(known / dim)), default=None)

    def rates(self, dtype: str, head_dim: int, value_dim: int) -> Rates | None:
        """Return the rates for a compute dtype and head dims, from the nearest measured; None for another dtype."""
        nearest = self.nearest(dtype, max(head_dim, value_dim))
        if nearest is None:
            return None
        measured = self.tiles[dtype]
        return Rates(measured[nearest].scaled((head_dim + value_dim) / (2 * nearest)), self.speeds)

    def __str__(self) -> str:
        lines = []
        for dtype, by_dim in self.tiles.items():
            for dim, times in by_dim.items():
                lines.append(f"{dtype}, head dim {dim}: GFLOP/s by rows and columns of a call")
                lines.append(" " * 8 + "".join(f"{columns:>9,}" for columns in times.columns))
                for rows, seconds in zip(times.rows, times.seconds, strict=True):
                    rates = (4 * dim * rows * c / s / 1e9 for c, s in zip(times.columns, seconds, strict=True))
                    lines.append(f"{rows:>8,}" + "".join(f"{rate:>9,.0f}" for rate in rates))
                if times.operators:
                    lines.append("        the fastest operator of each:")
                    for rows, names in zip(times.rows, times.operators, strict=True):
                        lines.append(f"{rows:>8,}" + "".join(f"{name:>9}" for name in names))
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
        tiles = {
            dtype: {int(dim): _tile_times(times) for dim, times in by_dim.items()}
            for dtype, by_dim in fields["tiles"].items()
        }
        if not all(tiles.values()):
            raise ValueError("a dtype without times")
        return cls(tiles, _speeds(fields["speeds"]))

    def save(self, device: torch.device) -> Path:
        """Keep this for the plans to come; return where."""
        path = path_for(device)
        make_directory(path.parent)
        sweep(path.parent)
        replace_file(path, [self.to_json()])
        _stored.cache_clear()
        return path


def path_for(device: torch.device) -> Path:
    """Return where the calibration of this machine, device and build of torch is kept."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    machine = (platform.node(), device.type, name, torch.get_num_threads(), torch.__version__)
    digest = hashlib.sha256(json.dumps([str(part) for part in machine]).encode()).hexdigest()[:16]
    return Path(platformdirs.user_cache_dir("cqsa-stream", appauthor=False)) / f"{device.type}-{digest}.json"


def load(device: torch.device) -> Calibration | None:
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
def _stored(device: torch.device) -> Calibration | None:
    try:
        return Calibration.from_json(path_for(device).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _speeds(fields: dict[str, Any]) -> Speeds:
    on_processor = fields.pop("on_processor")
    if type(on_processor) is not bool:
        raise ValueError(f"on_processor {on_processor!r}; expected true or false")
    return Speeds(on_processor=on_processor, **{name: _positive(figure) for name, figure in fields.items()})


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
    operators = tuple(tuple(names) for names in fields["operators"])
    if operators and [len(names) for names in operators] != [len(columns)] * len(rows):
        raise ValueError("operators that do not belong to the sizes")
    if not {name for names in operators for name in names} <= {"cudnn", "flash"}:
        raise ValueError(f"operators {operators}; expected cudnn or flash")
    causal, stacked = _positive(fields["causal"]), _positive(fields["stacked"])
    return TileTimes(rows, columns, seconds, causal, stacked, threads, operators)


def _positive(value: Any) -> float:
    if type(value) not in (int, float) or not (0 < value < math.inf):
        raise ValueError(f"{value!r}; expected a positive number")
    return value  # type: ignore[no-any-return]
