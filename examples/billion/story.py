"""The beginning and the end that the stories share: their options, their inputs, what a run took, and its check."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from genome import stored_bytes, write
from steps import Log, Ran, amount


def options(about: str | None, *, tokens: int, head_dim: int, host_memory: str, rows: int) -> argparse.ArgumentParser:
    """Return a parser of what every story takes, with these defaults."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--tokens", type=amount, default=tokens)
    parser.add_argument("--head-dim", type=int, default=head_dim)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--host-memory", default=host_memory)
    parser.add_argument("--checkpoint-every", default="60")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=rows, help="how many rows to verify in float64")
    return parser


def generated(log: Log, given: argparse.Namespace, tokens: int, queries: int | None = None) -> list[Path]:
    """Write genome-like inputs, of which q holds the last ``queries`` tokens or all; return q, k, v and the output."""
    about = f"{tokens:,} keys and values, {queries or tokens:,} queries, {given.head_dim} {given.dtype}"
    log.say(f"$ genome: {about}")
    seconds = write(given.folder, tokens, queries, given.head_dim, given.dtype, given.processes)
    *inputs, out = (given.folder / f"{name}.zarr" for name in ("q", "k", "v", "out"))
    plain = (2 * tokens + (queries or tokens)) * given.head_dim * 2
    log.figure(generating_s=seconds, plain_bytes=plain, stored_bytes=sum(map(stored_bytes, inputs)))
    return [*inputs, out]


def ended(log: Log, out: Path, last: Ran, names: Iterable[str]) -> dict[str, Any]:
    """Say what the sessions of a run took, the figures of these names among it; return its status."""
    found, looked = log.json("status", out)
    log.figure(
        last_session_s=last.seconds,
        running_s=found["elapsed_s"],
        **{name: found[name] for name in names},
        host_peak_bytes=found["host_peak_bytes"],
        resident_peak_bytes=last.peak_bytes,
        status_s=looked.seconds,
    )
    return found


def verified(log: Log, out: Path, rows: int) -> None:
    """Verify some rows; keep the run's events and its report."""
    checked, ran = log.json("verify", out, "--rows", rows)
    told = ("rows", "max_relative_error", "tolerance", "ok")
    log.figure(verifying_s=ran.seconds, **{name: checked[name] for name in told})
    log.keep(Path(f"{out}.run/events.jsonl"))
    log.keep_report(out)
