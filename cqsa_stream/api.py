"""The Python surface: ``attention``, ``plan``, ``open_run``."""

import os
import signal
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cqsa_stream.errors import InputError
from cqsa_stream.events import Observer
from cqsa_stream.machine.surroundings import undisturbed
from cqsa_stream.observers import checked
from cqsa_stream.planning import Options, plan_run
from cqsa_stream.problem import Problem, is_number
from cqsa_stream.run.admission import Target, refuse_other_inputs
from cqsa_stream.run.inputs import open_inputs, refuse_gradients
from cqsa_stream.run.opened import Run, open_run
from cqsa_stream.run.session import run_in_memory, run_on_disk
from cqsa_stream.run.stopping import Stopper
from cqsa_stream.schedulers.plan import Plan
from cqsa_stream.storage.open import TokenArray

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
    out: str | os.PathLike[str] | None = None,
    return_lse: bool = False,
    q_start: int = 0,
    queries: tuple[int, int] | None = None,
    device: str = "auto",
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    schedule: str = "auto",
    chunks: int | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    checkpoint_every_s: float | None = None,
    max_seconds: float | None = None,
    kernel: str = "auto",
    layout: str = "bhtd",
    observers: Sequence[Observer] = (),
) -> Any:
    """Compute exact attention of arrays that need not fit in memory; the arguments are those of torch's SDPA, and more.

    ``query [batch, heads, query_tokens, head_dim]``, ``key [batch, kv_heads, keys, head_dim]`` and ``value [batch,
    kv_heads, keys, value_dim]``, each a path or URL, a ``zarr.Array``, a ``tensorstore.TensorStore``, a numpy array or
    a torch tensor, of float32, float16 or bfloat16. Fewer K/V than query heads need ``enable_gqa``. ``layout="bthd"``:
    their axes are [batch, token, head, feature], as flash-attention's; so are those of a tensor that is returned.
    Forward only: tensors that require grad are refused while grad is enabled.

    ``is_causal`` aligns by position: query row i stands at ``q_start + i`` and sees the keys up to its own position.
    ``queries=(a, b)`` computes only those rows. ``scale``: 1 / sqrt(head_dim) where None.

    ``out=None`` returns a tensor. ``out=path`` writes a Zarr v3 array, durably: progress is kept in ``run_dir``
    (``OUT.run`` where None) every ``checkpoint_every_s`` seconds (60), the same call resumes, and the opened
    ``tensorstore.TensorStore`` is returned. ``return_lse`` returns (output, lse [batch, heads, rows] float32).

    ``device_memory``, ``host_memory``: bytes or "4GiB"; None takes 80 % of what is free, or what the run's last session
    had. ``schedule``: "auto", "cqs" or "rectangular". ``chunks``: c, a Singer number where queries and keys are the
    same positions. ``kernel``: "auto", or "cupy": on CUDA products in float32 and a softmax of its own, to compare.
    ``observers`` are called with each event (``cqsa_stream.events``); one that raises is told no more.

    Raises InputError, BudgetError, LockedError, MismatchError, ArrayError, FullDiskError or NoMemoryError; RunStopped
    at ``max_seconds``; with ``out``, in the main thread, RunInterrupted at Ctrl-C, KeyboardInterrupt at the second.
    """
    refuse_gradients(query, key, value)
    _refuse_what_cannot_be(out, run_dir, return_lse=return_lse, is_causal=is_causal, enable_gqa=enable_gqa)
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
    observers = checked(observers)
    stop = Stopper((signal.SIGINT,), max_seconds)
    target = None if out is None else Target.of(out, run_dir, layout=layout)
    arrays, problem = _problem(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        q_start=q_start, queries=queries, layout=layout, target=target,
    )  # fmt: skip
    if target is None:
        sink = run_in_memory(problem, arrays, options, observers, with_lse=return_lse)
        home = query.device if isinstance(query, torch.Tensor) else torch.device("cpu")
        found = sink.out.to(home) if layout == "bhtd" else sink.out.transpose(1, 2).to(home)
        return found if sink.lse is None else (found, sink.lse.to(home))
    directory = run_on_disk(problem, arrays, options, target, observers, stop)
    stop.pass_on()
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
    out: str | os.PathLike[str] | None = None,
    return_lse: bool = False,
    q_start: int = 0,
    queries: tuple[int, int] | None = None,
    device: str = "auto",
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    schedule: str = "auto",
    chunks: int | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    checkpoint_every_s: float | None = None,
    max_seconds: float | None = None,
    kernel: str = "auto",
    layout: str = "bhtd",
    observers: Sequence[Observer] = (),
) -> Plan:
    """Return what ``attention`` with the same options would do and need in a new run, reading nothing but shapes.

    The plan may be over budget: see its ``fits``. Print it, or take its ``to_dict()``. Raises InputError, ArrayError.
    """
    _refuse_what_cannot_be(out, run_dir, return_lse=return_lse, is_causal=is_causal, enable_gqa=enable_gqa)
    checked(observers)
    options = Options(
        str(device), device_memory, host_memory, schedule, chunks, checkpoint_every_s, max_seconds, kernel
    )
    where = None if out is None else Target.of(out, run_dir).out
    arrays, problem = _problem(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        q_start=q_start, queries=queries, layout=layout,
    )  # fmt: skip
    with undisturbed():
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
    layout: str,
    target: Target | None = None,
) -> tuple[dict[str, TokenArray], Problem]:
    if attn_mask is not None:
        raise InputError("attn_mask: a mask in memory is not supported; take is_causal, q_start and queries")
    if not is_number(dropout_p) or dropout_p != 0:
        raise InputError(f"dropout_p {dropout_p!r}: not supported, the result is exact; leave it 0.0")
    with undisturbed():
        arrays = open_inputs(query, key, value, layout=layout)
    if target is not None:
        refuse_other_inputs(target, arrays)
    problem = Problem.of(
        arrays["query"], arrays["key"], arrays["value"], scale=scale, causal=is_causal, q_start=q_start, queries=queries
    )
    if problem.group > 1 and not enable_gqa:
        raise InputError(f"{problem.heads} query heads over {problem.kv_heads} key/value heads; set enable_gqa=True")
    return arrays, problem


def _refuse_what_cannot_be(out: object, run_dir: object, **flags: object) -> None:
    """Raise InputError where a flag is neither True nor False ("no" would count as True), or a run has no output."""
    if out is None and run_dir is not None:
        raise InputError("run_dir without out: a run that can be resumed needs a path for its output; give out")
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise InputError(f"{name} {value!r}; expected True or False")
