"""The Python surface: ``attention``, ``plan``, ``open_run``."""

import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tensorstore as ts
import torch

from cqsa_stream.admission import Target, refuse_other_inputs, refuse_strange_places
from cqsa_stream.errors import ArrayError, CqsaError, InputError
from cqsa_stream.events import Figures, Observer
from cqsa_stream.execute import run_in_memory, run_on_disk
from cqsa_stream.manifest import Manifest
from cqsa_stream.meter import covered, tokens_done
from cqsa_stream.outputs import damaged_rows, outputs_exist
from cqsa_stream.planning import Options, plan_run
from cqsa_stream.problem import Problem
from cqsa_stream.run import RunDirectory
from cqsa_stream.schedulers.plan import Plan
from cqsa_stream.stopping import Stopper
from cqsa_stream.storage.arrays import TokenArray, open_array
from cqsa_stream.storage.output import open_for_writing
from cqsa_stream.verify import Verification, verify_rows

__all__ = ["Run", "attention", "open_inputs", "open_run", "plan"]


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    out: str | Path | None = None,
    return_lse: bool = False,
    q_start: int = 0,
    queries: tuple[int, int] | None = None,
    device: str = "auto",
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    schedule: str = "auto",
    chunks: int | None = None,
    run_dir: str | Path | None = None,
    checkpoint_every_s: float | None = None,
    max_seconds: float | None = None,
    kernel: str = "auto",
    observers: Sequence[Observer] = (),
) -> Any:
    """Compute exact attention of arrays that need not fit in memory; the arguments are those of torch's SDPA, and more.

    ``query [batch, heads, query_tokens, head_dim]``, ``key [batch, kv_heads, keys, head_dim]`` and ``value [batch,
    kv_heads, keys, value_dim]``, each a path or URL, a ``zarr.Array``, a ``tensorstore.TensorStore``, a numpy array or
    a torch tensor, of float32, float16 or bfloat16. Fewer K/V than query heads need ``enable_gqa``.

    ``is_causal`` aligns by position: query row i stands at ``q_start + i`` and sees the keys up to its own position.
    ``queries=(a, b)`` computes only those rows. ``scale``: 1 / sqrt(head_dim) where None.

    ``out=None`` returns a tensor. ``out=path`` writes a Zarr v3 array, durably: progress is kept in ``run_dir``
    (``OUT.run`` where None) every ``checkpoint_every_s`` seconds (60), the same call resumes, and the opened
    ``tensorstore.TensorStore`` is returned. ``return_lse`` returns (output, lse [batch, heads, rows] float32).

    ``device_memory``, ``host_memory``: bytes or "4GiB"; None takes 80 % of what is free, or what the run's last session
    had. ``schedule``: "auto", "cqs" or "rectangular". ``chunks``: c, a Singer number where queries and keys are the
    same positions. ``kernel``: "auto", or "cupy": on CUDA products in float32 and a softmax of its own, to compare.
    ``observers`` are called with each event (``cqsa_stream.events``).

    Raises InputError, BudgetError, LockedError, MismatchError or ArrayError, and RunStopped at ``max_seconds``.
    """
    stop = Stopper((signal.SIGINT,), max_seconds)
    target = None if out is None else Target.of(out, run_dir)
    arrays, problem = _problem(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        q_start=q_start, queries=queries, target=target,
    )  # fmt: skip
    options = Options(
        device=None if str(device) == "auto" else str(device),
        device_memory=device_memory,
        host_memory=host_memory,
        schedule=None if schedule == "auto" else schedule,
        chunks=chunks,
        checkpoint_every_s=checkpoint_every_s,
        max_seconds=max_seconds,
        kernel=None if kernel == "auto" else kernel,
    )
    if target is None:
        if run_dir is not None:
            raise InputError("run_dir without out: a run that can be resumed needs a path for its output; give out")
        sink = run_in_memory(problem, arrays, options, observers, with_lse=return_lse)
        home = query.device if isinstance(query, torch.Tensor) else torch.device("cpu")
        return (sink.out.to(home), sink.lse.to(home)) if sink.lse is not None else sink.out.to(home)
    directory = run_on_disk(problem, arrays, options, target, observers, stop)
    run = Run(directory.path)
    return (run.output(), run.lse()) if return_lse else run.output()


def plan(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    out: str | Path | None = None,
    return_lse: bool = False,
    q_start: int = 0,
    queries: tuple[int, int] | None = None,
    device: str = "auto",
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    schedule: str = "auto",
    chunks: int | None = None,
    run_dir: str | Path | None = None,
    checkpoint_every_s: float | None = None,
    max_seconds: float | None = None,
    kernel: str = "auto",
    observers: Sequence[Observer] = (),
) -> Plan:
    """Return what ``attention`` with the same options would do and need in a new run, reading nothing but shapes.

    The plan may be over budget: see its ``fits``. Print it, or take its ``to_dict()``. Raises InputError, ArrayError.
    """
    arrays, problem = _problem(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, q_start=q_start, queries=queries
    )
    options = Options(
        str(device), device_memory, host_memory, schedule, chunks, checkpoint_every_s, max_seconds, kernel
    )
    where = None if out is None else Target.of(out, run_dir).out
    return plan_run(problem, arrays, options, durable=out is not None, out=where)[0]


def _problem(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    *,
    q_start: int,
    queries: tuple[int, int] | None,
    target: Target | None = None,
) -> tuple[dict[str, TokenArray], Problem]:
    if attn_mask is not None:
        raise InputError("attn_mask: a mask in memory is not supported; take is_causal, q_start and queries")
    if dropout_p != 0.0:
        raise InputError(f"dropout_p {dropout_p}: not supported, the result is exact; leave it 0.0")
    arrays = open_inputs(query, key, value)
    if target is not None:
        refuse_other_inputs(target, arrays)
    problem = Problem.of(
        arrays["query"], arrays["key"], arrays["value"], scale=scale, causal=is_causal, q_start=q_start, queries=queries
    )
    if problem.group > 1 and not enable_gqa:
        raise InputError(f"{problem.heads} query heads over {problem.kv_heads} key/value heads; set enable_gqa=True")
    return arrays, problem


def open_inputs(query: Any, key: Any, value: Any, *, fill_missing: bool = False) -> dict[str, TokenArray]:
    """Open the three arrays. Raises ArrayError saying which of them, and why."""
    arrays = {}
    for name, source in (("query", query), ("key", key), ("value", value)):
        try:
            arrays[name] = open_array(source, fill_missing=fill_missing)
        except ArrayError as error:
            raise ArrayError(f"{name}: {error}") from error
    return arrays


def open_run(path: str | Path) -> "Run":
    """Open a run directory. Raises InputError where it is none."""
    return Run(Path(path))


class Run:
    """A run on disk, finished or not."""

    def __init__(self, path: Path) -> None:
        self.directory = RunDirectory(path)
        self.manifest: Manifest = self.directory.manifest()

    def status(self) -> dict[str, Any]:
        """Return where the run stands, by what is on disk, and the last session's figures."""
        problem, grid = self.manifest.problem, self.manifest.grid
        store = self.directory.store(self.manifest)
        finished: list[set[int]] = []
        pairs = flops = 0
        stored = store.covers()
        store.make_durable()
        for covers in stored:
            finished.append({row for row, cover in covers.items() if cover is None})
            for row, cover in covers.items():
                row_pairs, row_flops = covered(problem, grid, row, cover)
                pairs, flops = pairs + row_pairs, flops + row_flops
        rows_total = problem.lanes * grid.rows.filled
        rows_done = sum(map(len, finished))
        sessions = _sessions(self.directory.events())
        last: dict[str, Any] = {**(sessions[-1] if sessions else {}), **_figures(self.directory.session())}
        plan = last.get("plan", {})
        complete = rows_done == rows_total and outputs_exist(self.directory, self.manifest)
        before = sessions[:-1]
        found = {
            "complete": complete,
            "schedule": plan.get("schedule"),
            "chunks": grid.rows.chunks,
            "pairs_done": pairs,
            "pairs_total": grid.pairs * problem.lanes,
            "rows_done": rows_done,
            "rows_total": rows_total,
            "tokens_done": tokens_done(problem, grid, finished),
            "elapsed_s": sum(s["session_s"] for s in before) + last.get("session_s", 0.0),
            "session_s": last.get("session_s", 0.0),
            "eta_s": 0.0 if complete else _eta(problem.flops - flops, last),
            "flops_done": flops,
            "bytes_read": sum(s["bytes_read"] for s in before) + last.get("bytes_read", 0),
            "bytes_written": sum(s["bytes_written"] for s in before) + last.get("bytes_written", 0),
            "device_peak_bytes": max([last.get("device_peak_bytes", 0), *(s["device_peak_bytes"] for s in sessions)]),
            "host_peak_bytes": max([last.get("host_peak_bytes", 0), *(s["host_peak_bytes"] for s in sessions)]),
            "device_projected_bytes": plan.get("device_projected_bytes"),
            "host_projected_bytes": plan.get("host_projected_bytes"),
            **{
                name: max([last.get(name, 0), *(s[name] for s in sessions)])
                for name in ("device_reserved_bytes", "device_driver_peak_bytes")
            },
            "sessions": len(sessions),
            "pid": self.directory.live_pid(),
        }
        predicted = ("seconds", "bytes_read", "bytes_written", "host_projected_bytes", "device_projected_bytes")
        measured = ("elapsed_s", "bytes_read", "bytes_written", "host_peak_bytes", "device_peak_bytes")
        names = ("seconds", "bytes_read", "bytes_written", "host_bytes", "device_bytes")
        found["predicted"] = (
            {n: plan[key] if _is_figure(plan.get(key)) else 0 for n, key in zip(names, predicted, strict=True)}
            if plan
            else None
        )
        found["measured"] = {name: found[key] for name, key in zip(names, measured, strict=True)}
        return found

    def resume(self, observers: Sequence[Observer] = (), max_seconds: float | None = None) -> "Run":
        """Go on to the end, as the last session did. Raises as ``attention`` does."""
        stop = Stopper((signal.SIGINT,), max_seconds)
        refuse_strange_places(self.manifest, self.directory, ())
        out, lse = self.directory.output_path(self.manifest), self.directory.lse_path(self.manifest)
        target = Target(out, self.directory.path, lse, fill_missing=self.manifest.fill_missing)
        options = Options(max_seconds=max_seconds)
        run_on_disk(self.manifest.problem, self._inputs(), options, target, observers, stop)
        return self

    def verify(self, rows: int = 256, seed: int = 0) -> Verification:
        """Compare every finished row with the checksum of what was written, and sampled ones with float64.

        Raises InputError where no row is finished, CqsaError where the output cannot be read.
        """
        if rows < 1:
            raise InputError(f"rows {rows}; expected at least 1")
        problem, store = self.manifest.problem, self.directory.store(self.manifest)
        finished = [{row for row, cover in covers.items() if cover is None} for covers in store.covers()]
        if not any(finished):
            raise InputError(f"{self.directory.path}: no row is finished yet; resume the run first")
        try:
            damaged = sum(not good for _, _, good in damaged_rows(self.directory, self.manifest))
            out, lse = open_array(self.directory.output_path(self.manifest)), self.lse()
        except ArrayError as error:
            raise CqsaError(f"the output of the run cannot be read: {error}; run the same command again") from error
        on_cuda = any("cuda" in str(event.get("options")) for event in self.directory.events())
        return verify_rows(
            problem,
            self._inputs(),
            out,
            lambda batch, head, row: float(lse[batch, head, row].read().result()),
            finished,
            self.manifest.rows,
            rows,
            seed,
            rounded_tiles=on_cuda and problem.dtype != "float32",
            damaged=damaged,
        )

    def output(self) -> ts.TensorStore:
        """Return the output array ``[batch, head, token, feature]``, opened."""
        return open_for_writing(self.directory.output_path(self.manifest))

    def lse(self) -> ts.TensorStore:
        """Return the log-sum-exp ``[batch, head, token]``, float32, opened."""
        return open_for_writing(self.directory.lse_path(self.manifest))

    def _inputs(self) -> dict[str, TokenArray]:
        sources = {name: entry["source"] for name, entry in self.manifest.inputs.items()}
        if "memory" in sources.values():
            raise InputError("the run's inputs were in memory: call attention with the same tensors and out path")
        return open_inputs(sources["query"], sources["key"], sources["value"], fill_missing=self.manifest.fill_missing)


def _sessions(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each session, its plan and the latest figures it logged."""
    sessions: list[dict[str, Any]] = []
    for event in events:
        if event.get("event") == "started":
            sessions.append({**dict.fromkeys(Figures.__dataclass_fields__, 0), "plan": _plan(event)})
        if sessions:
            sessions[-1].update(_figures(event))
    return sessions


def _figures(found: dict[str, Any]) -> dict[str, float]:
    """Return those of a file's words that are figures of a run."""
    return {name: n for name, n in found.items() if name in Figures.__dataclass_fields__ and _is_figure(n)}


def _is_figure(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**62  # not so: NaN, too


def _plan(event: dict[str, Any]) -> dict[str, Any]:
    plan = event.get("plan")
    return {k: v for k, v in plan.items() if _is_figure(v) or type(v) is str} if isinstance(plan, dict) else {}


def _eta(flops_left: int, last: dict[str, Any]) -> float | None:
    if not last.get("session_flops"):
        return None
    return float(flops_left * last["session_s"] / last["session_flops"])
