"""How a plan reads on a terminal and in a notebook, by its ``to_dict()``: the verdict first, then what it rests on."""

from collections.abc import Iterator
from html import escape
from typing import Any

from cqsa_stream.schedulers.units import amount_text, duration_text, size_text

__all__ = ["plan_html", "plan_text"]

_ROUGH = "rough: this machine was not measured; run cqsa bench once (a minute), and plans tell its seconds"
_CANDIDATES = ("candidate", "chunks", "host", "device", "read", "written", "spills", "time", "")
_POOLS = ("memory", "projected", "reserved", "allowed", "free", "")
_OVER = "OVER BUDGET"

Fields = dict[str, Any]


def plan_text(plan: Fields) -> str:
    """Describe a plan: the problem, whether it fits, its time and disk; then its grid, pools and candidates."""
    quorum = f", {plan['quorum_size']} chunks each" if plan["quorum_size"] else ""
    return "\n".join(
        [
            *_verdict(plan),
            "",
            f"schedule   {plan['schedule']}: {_count(plan['tasks'], 'task')}{quorum}",
            f"grid       {plan['chunks']:,} x {plan['column_chunks']:,} chunks of {plan['chunk_tokens']:,} x "
            f"{plan['column_chunk_tokens']:,} tokens, {_count(plan['pairs'], 'pair')}, "
            f"{amount_text(plan['flops'], 'FLOP')}",
            f"mask       {plan['mask']}: {100 * plan['density']:.3g} % of the scores are visible",
            *_crew(plan["crew"]),
            "",
            *_columns([_POOLS, *_pools(plan)]),
            "",
            *_columns([_CANDIDATES, *_candidates(plan)]),
        ]
    )


def plan_html(plan: Fields) -> str:
    """Describe a plan as HTML: the verdict, and the candidates as a table."""
    head = "".join(f"<th>{escape(name)}</th>" for name in _CANDIDATES)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in _candidates(plan))
    said = "".join(f"<p>{escape(line)}</p>" for line in _verdict(plan) if line)
    return f"<div>{said}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _verdict(plan: Fields) -> Iterator[str]:
    """Yield the problem, whether it fits and what it takes, and what has begun."""
    if plan["about"]:
        yield plan["about"]
    if plan["begun"]:
        done, total = plan["begun"]["pairs_done"], plan["begun"]["pairs_total"]
        yield (
            f"complete: all {total:,} pairs are on disk"
            if done == total
            else (
                f"continues: {done:,} of {total:,} pairs are on disk, about {duration_text(plan['seconds_left'])} of "
                f"{duration_text(plan['seconds'])} left"
            )
        )
    yield f"{_fit(plan)}   time about {duration_text(plan['seconds_left'])}{_disk(plan)}"
    for name, projected, free in plan["lacking"]:
        yield f"{name}: {size_text(projected)} needed, {size_text(free)} free"
    if not plan["fits"]:
        device = f", device {size_text(plan['device_least_bytes'])}" if plan["device_allowed_bytes"] else ""
        yield f"the smallest that would do: host {size_text(plan['host_least_bytes'])}{device}"
    if not plan["calibrated"]:
        yield _ROUGH


def _fit(plan: Fields) -> str:
    """Say whether the plan fits, by each pool of memory."""
    fits = "fits" if plan["fits"] else "DOES NOT FIT"
    if plan["fits"] and plan["lacking"]:
        fits = "fits the budgets, NOT this machine"
    pools = [
        f"{name} memory {size_text(plan[f'{name}_projected_bytes'])} of {size_text(plan[f'{name}_allowed_bytes'])}"
        for name in ("device", "host")
        if plan[f"{name}_allowed_bytes"] is not None
    ]
    return f"{fits}: {', '.join(pools)}"


def _disk(plan: Fields) -> str:
    if not plan["disk_projected_bytes"]:
        return ""
    free = f" of {size_text(plan['disk_free_bytes'])} free" if plan["disk_free_bytes"] is not None else ""
    return f"   disk {size_text(plan['disk_projected_bytes'])}{free}"


def _crew(crew: Fields | None) -> list[str]:
    """Describe the workers, what they merge, and when the disk is their limit."""
    if crew is None:
        return []
    merge = f"{size_text(crew['merge_bytes'])} in {crew['merge_s']:,.1f} s" if crew["merge_bytes"] else "nothing"
    limit = f"a disk that all share is the limit from {crew['disk_limits_at']} workers on"
    if crew["workers"] >= crew["disk_limits_at"]:
        limit = f"the disk is the limit where all share one, as from {crew['disk_limits_at']} workers on"
    return [
        f"workers    {crew['workers']} for {_count(crew['shares'], 'share')}: each reads "
        f"{size_text(crew['bytes_read_each'])} and holds {size_text(crew['host_bytes_each'])}",
        f"merge      {merge}; {limit}",
    ]


def _pools(plan: Fields) -> list[tuple[str, ...]]:
    pools: list[tuple[str, ...]] = []
    for name in ("device", "host"):
        held, allowed = plan[f"{name}_projected_bytes"], plan[f"{name}_allowed_bytes"]
        if allowed is not None:
            sizes = (held, plan[f"{name}_reserved_bytes"], allowed, plan[f"{name}_free_bytes"])
            pools.append((name, *map(size_text, sizes), _OVER if held > allowed else ""))
    if plan["pinned_projected_bytes"]:
        pools.append(("  pinned", size_text(plan["pinned_projected_bytes"]), "", "", "", ""))
    if plan["disk_projected_bytes"]:
        disk, free = size_text(plan["disk_projected_bytes"]), size_text(plan["disk_free_bytes"])
        pools.append(("disk", disk, "", "", free, ""))
    return pools


def _candidates(shown: Fields) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for plan in shown.get("candidates") or (shown,):
        chosen = plan["schedule"] == shown["schedule"]
        sizes = (plan["host_projected_bytes"], plan["device_projected_bytes"] or None)
        moved = (plan["bytes_read"], plan["bytes_written"])
        verdict = _OVER if not plan["fits"] else "chosen" if chosen else ""
        rows.append(
            (f"{'*' if chosen else ' '} {plan['schedule']}", str(plan["chunks"]), *map(size_text, (*sizes, *moved)),
             str(plan["spills"]), duration_text(plan["seconds"]), verdict)
        )  # fmt: skip
    return rows


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Align a table: the first and last columns to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    lines = (
        "  ".join(
            text.ljust(width) if i in (0, last) else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return [line.rstrip() for line in lines]
