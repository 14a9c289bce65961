"""Where a run stands: by the covers on disk, and by the news of its sessions."""

import time
from collections.abc import Iterable
from typing import Any

from cqsa_stream.engine.progress import Progress
from cqsa_stream.events import Figures
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.manifest import Manifest
from cqsa_stream.run.outputs import Results
from cqsa_stream.run.shares import Left
from cqsa_stream.verification.found import Verification

__all__ = ["is_figure", "last_session", "last_verification", "sessions_of", "status"]

_COMPARED = {  # of the last session: name of what was predicted, and of the figure
    "seconds": "session_s",
    "bytes_read": "bytes_read",
    "bytes_written": "bytes_written",
    "host_bytes": "host_peak_bytes",
    "device_bytes": "device_peak_bytes",
}
_OF_PLAN = {
    "seconds": "seconds",
    "bytes_read": "bytes_read",
    "bytes_written": "bytes_written",
    "host_bytes": "host_projected_bytes",
    "device_bytes": "device_projected_bytes",
}
_MOVED = ("session_flops", "bytes_read", "bytes_written")
_PEAKS = ("device_peak_bytes", "host_peak_bytes", "device_reserved_bytes", "device_driver_peak_bytes")
_PLANNED = ("device_projected_bytes", "host_projected_bytes", "device_allowed_bytes", "host_allowed_bytes")


def status(directory: RunDirectory, manifest: Manifest, covers: list[dict[int, int | None]]) -> dict[str, Any]:
    """Return what ``cqsa status --json`` prints, by the stored covers of each lane."""
    problem, grid = manifest.problem, manifest.grid
    done = Progress(problem, grid, covers)
    complete = done.rows_done == done.rows_total and Results(directory, manifest).exist
    every = _with_news(sessions_of(directory.events()), directory)
    last, workers = _last(every), _workers(directory, manifest, covers)
    plan = last["plan"]

    def summed(name: str) -> Any:
        return sum(session[name] for session in every if not session["leads"])

    def highest(name: str) -> Any:
        return max((session[name] for session in every), default=0)

    pid = directory.live_pid()
    found = {
        "state": "running" if pid is not None or directory.at_work() else "complete" if complete else "stopped",
        "complete": complete,
        "schedule": plan.get("schedule"),
        "chunks": grid.rows.chunks,
        "shares": manifest.shares,
        "pairs_done": done.pairs_done,
        "pairs_total": done.pairs_total,
        "rows_done": done.rows_done,
        "rows_total": done.rows_total,
        "tokens_done": done.tokens_done,
        "elapsed_s": summed("session_s"),
        "session_s": last["session_s"],
        "eta_s": 0.0 if complete else _eta(problem.flops - done.flops_done, last, workers),
        "flops_done": done.flops_done,
        "flops_total": problem.flops,
        "session_flops": last["session_flops"],
        "bytes_read": summed("bytes_read"),
        "bytes_written": summed("bytes_written"),
        **{name: highest(name) for name in _PEAKS},
        **{name: plan[name] * _led(last) if is_figure(plan.get(name)) else None for name in _PLANNED},
        "sessions": len(every),
        "checkpoint_s": max(0.0, time.time() - last["checkpointed"]) if last["checkpointed"] else None,
        "pid": pid,
        "workers": workers,
        "predicted": _predicted(last),
        "measured": {name: last[of] for name, of in _COMPARED.items()},
    }
    return found


def _with_news(sessions: list[dict[str, Any]], directory: RunDirectory) -> list[dict[str, Any]]:
    """Return the sessions in the order of their beginnings; that of the latest process which held the run by itself, or
    led it, with its latest figures.
    """
    ours = [session for session in sessions if not session["of_worker"]]
    if ours:
        ours[-1].update(_figures(directory.session()))
    return sorted(sessions, key=lambda session: session["began"])


def _last(every: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the last session. Workers that nobody leads, since the run was begun or last held, are one together."""
    ours = [session for session in every if not session["of_worker"]]
    last = ours[-1] if ours else {**_NO_SESSION}
    crew = [session for session in every if session["of_worker"] and session["began"] >= last["began"]]
    if last["leads"] or not crew:
        return last
    together = {name: sum(session[name] for session in crew) for name in _MOVED}
    together |= {name: max(session[name] for session in crew) for name in (*_PEAKS, "checkpointed")}
    ends = max(session["began"] + session["session_s"] for session in crew)
    alone = crew[0]["predicted"] if len(crew) == 1 else {}  # what a plan tells is of one at a time
    return {**crew[-1], **together, "session_s": ends - crew[0]["began"], "predicted": alone}


def _led(last: dict[str, Any]) -> int:
    """Return how many workers the session led: a plan tells what each of them holds, the figures what all do."""
    return max(1, int(last["plan"].get("workers") or 1)) if last["leads"] else 1


def _predicted(last: dict[str, Any]) -> dict[str, Any] | None:
    """Return what was predicted of a session; of older versions' what their plans say of a whole run."""
    if last["of_worker"] and not last["predicted"]:
        return None
    found = last["predicted"] or {name: last["plan"].get(of) or 0 for name, of in _OF_PLAN.items()}
    return {name: found.get(name, 0) for name in _COMPARED} if any(found.values()) else None


def _workers(directory: RunDirectory, manifest: Manifest, covers: list[dict[int, int | None]]) -> list[dict[str, Any]]:
    """Describe the workers that are there, or died: the seconds since their last sign of life, their rates in FLOP/s,
    and the tasks left of the share that each one holds.
    """
    left = Left(manifest, covers) if manifest.chosen is not None else None
    found = []
    for worker in directory.workers():
        news, share = worker.news, worker.news.get("share")
        figures = {**_NOTHING, **_figures(news)}
        if type(share) is not int or not 0 <= share < manifest.shares:
            share = None
        found.append(
            {
                **{name: worker.said(name) for name in ("name", "host", "device")},
                "pid": news["pid"] if is_figure(news.get("pid")) else None,
                "lives": worker.lives,
                "silent_s": worker.silent_s,
                "flops_per_s": figures["session_flops"] / max(figures["session_s"], 1e-9),
                "share": share,
                "tasks_left": 0 if left is None or share is None else len(list(left.tasks(share))),
            }
        )
    return found


_NOTHING: dict[str, Any] = dict.fromkeys(Figures.__dataclass_fields__, 0)
_NO_SESSION: dict[str, Any] = {
    **_NOTHING, "plan": {}, "predicted": {}, "leads": False, "of_worker": False, "began": 0.0, "checkpointed": 0.0,
}  # fmt: skip


def sessions_of(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each session, its plan, what was predicted of it, and the latest figures and checkpoint it logged."""
    sessions: list[dict[str, Any]] = []
    for event in events:
        if event.get("event") == "started":
            sessions.append(
                {
                    **_NO_SESSION,
                    "plan": _numbers(event.get("plan")),
                    "predicted": {k: v for k, v in _numbers(event.get("predicted")).items() if type(v) is not str},
                    "leads": event.get("leads") is True,
                    "of_worker": "worker" in event,
                    "began": event["time"] if is_figure(event.get("time")) else 0.0,
                }
            )
        if sessions:
            sessions[-1].update(_figures(event))
            if event.get("event") == "checkpointed" and is_figure(event.get("time")):
                sessions[-1]["checkpointed"] = event["time"]
    return sessions


def last_session(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events of the last session that have figures, those of its workers left out."""
    found: list[dict[str, Any]] = []
    for event in events:
        if "worker" in event:
            continue
        if event.get("event") == "started":
            found = []
        if is_figure(event.get("session_s")):
            plan = event.get("plan")
            found.append({**_figures(event), **({"plan": plan} if isinstance(plan, dict) else {})})
    return found


def last_verification(events: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Return what ``verify`` found, if it was asked since the last session; None where it was not."""
    names, found = Verification.__dataclass_fields__, None
    for event in events:
        if event.get("event") == "started":
            found = None
        elif event.get("event") == "verified":
            values = {name: event.get(name) for name in names}
            if all(type(value) in (bool, float) or is_figure(value) for value in values.values()):  # inf, NaN: an error
                found = values
    return found


def _figures(found: dict[str, Any]) -> dict[str, float]:
    """Return those of a file's words that are figures of a run."""
    return {name: n for name, n in found.items() if name in _NOTHING and is_figure(n)}


def is_figure(value: Any) -> bool:
    """Return whether a value from a file is a number that a figure can be."""
    return type(value) in (int, float) and abs(value) < 2**128  # a billion by a billion: 2^67 FLOP; not so: NaN, too


def _numbers(found: Any) -> dict[str, Any]:
    """Return the figures and the words of what a file holds."""
    return {k: v for k, v in found.items() if is_figure(v) or type(v) is str} if isinstance(found, dict) else {}


def _eta(flops_left: int, last: dict[str, Any], workers: list[dict[str, Any]]) -> float | None:
    together = sum(worker["flops_per_s"] for worker in workers if worker["lives"])
    if together:
        return float(flops_left / together)
    return float(flops_left * last["session_s"] / last["session_flops"]) if last["session_flops"] else None
