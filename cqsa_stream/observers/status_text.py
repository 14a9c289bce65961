"""How a run's status and a verification read on a terminal."""

from collections.abc import Sequence
from typing import Any

from cqsa_stream.observers.lines import side_by_side
from cqsa_stream.schedulers.units import amount_text, duration_text, size_text, time_text

__all__ = ["map_lines", "status_text", "verification_text"]

Map = Sequence[Sequence[float | None]]
_PARTS = "░▒▓"
_WIDE = 32  # cells; narrower maps are drawn two characters a cell


def status_text(found: dict[str, Any], pairs: Map = ()) -> str:
    """Return a run's status: a line, its figures, workers and map of pairs, and what was predicted of the session."""
    lines = [_headline(found), "", *_table(_figures(found)), *map(_worker, found["workers"])]
    if pairs:
        lines += ["", *map_lines(pairs)]
    if found["predicted"]:
        lines += ["", "The last session:" if found["sessions"] > 1 else "The session:"]
        lines.append(side_by_side(found["predicted"], found["measured"]))
    return "\n".join(lines)


def _headline(found: dict[str, Any]) -> str:
    """Say in a line whether the run works, how far it is, and what it holds."""
    state = found["state"]
    if found["pid"] is not None and state == "running":
        state = f"running (pid {found['pid']})"
    parts = [state, f"{100 * found['flops_done'] // max(1, found['flops_total'])} %"]
    if found["state"] == "running":
        parts.append(f"{time_text(found['session_s'])} elapsed, {time_text(found['eta_s'])} left")
    else:
        parts.append(f"{time_text(found['elapsed_s'])} elapsed")
    if found["host_allowed_bytes"]:
        parts.append(f"host {size_text(found['host_peak_bytes'])} of {size_text(found['host_allowed_bytes'])}")
    if found["device_allowed_bytes"]:
        parts.append(f"device {size_text(found['device_peak_bytes'])} of {size_text(found['device_allowed_bytes'])}")
    if found["checkpoint_s"] is not None:
        parts.append(f"checkpoint {duration_text(found['checkpoint_s'])} ago")
    return "  ".join(parts)


def _figures(found: dict[str, Any]) -> list[tuple[str, str]]:
    rate = found["session_flops"] / max(found["session_s"], 1e-9)
    shares = "" if found["shares"] == 1 else f", {found['shares']} shares"
    return [
        ("pairs", f"{found['pairs_done']:,} of {found['pairs_total']:,}"),
        ("rows", f"{found['rows_done']:,} of {found['rows_total']:,} finished, {found['tokens_done']:,} tokens"),
        (
            "work",
            f"{amount_text(found['flops_done'], 'FLOP')} of {amount_text(found['flops_total'], 'FLOP')}, "
            f"{amount_text(rate, 'FLOP/s')}",
        ),
        ("moved", f"{size_text(found['bytes_read'])} read, {size_text(found['bytes_written'])} written"),
        ("plan", f"{found['schedule'] or 'unknown'}, {found['chunks']:,} chunks{shares}"),
        ("sessions", f"{found['sessions']}, {duration_text(found['elapsed_s'])} in all"),
    ]


def _worker(worker: dict[str, Any]) -> str:
    state = "at work" if worker["lives"] else "gone"
    left = "waits" if worker["share"] is None else f"share {worker['share']}, {worker['tasks_left']} tasks left"
    return (
        f"worker {worker['name']:<5} {state}: process {worker['pid']} on {worker['host']}, {worker['device']}, "
        f"{amount_text(worker['flops_per_s'], 'FLOP/s')}, heard of {worker['silent_s']:.0f} s ago, {left}"
    )


def map_lines(pairs: Map) -> list[str]:
    """Draw the map of pairs: query chunks down, key chunks across."""
    wide = 2 if len(pairs[0]) <= _WIDE else 1
    return [
        "pairs of query chunks (down) and key chunks (across): █ done, ░▒▓ in part, · to do",
        *("".join(_cell(part) * wide for part in row).rstrip() for row in pairs),
    ]


def _cell(part: float | None) -> str:
    if part is None:
        return " "
    if part in (0.0, 1.0):
        return "·█"[int(part)]
    return _PARTS[int(part * len(_PARTS))]


def verification_text(found: dict[str, Any]) -> str:
    """Say whether the sampled rows are right, by how much they err, and what was looked at."""
    verdict = "ok" if found["ok"] else "NOT OK"
    part = "all rows are finished" if found["complete"] else "of the rows that are finished"
    rows = [
        ("rows", f"{found['rows']} computed anew in float64 ({part})"),
        ("max_relative_error", f"{found['max_relative_error']:.2e}"),
        ("mean_relative_error", f"{found['mean_relative_error']:.2e}"),
        ("tolerance", f"{found['tolerance']:.2e} (the worst case of one row)"),
        ("lse_max_abs_error", f"{found['lse_max_abs_error']:.2e}"),
        ("damaged_rows", str(found["damaged_rows"])),
        ("not_finite_rows", str(found["not_finite_rows"])),
    ]
    return "\n".join([f"verification: {verdict}", *_table(rows)])


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {text}" for name, text in rows]
