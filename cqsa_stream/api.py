"""The Python surface: ``attention``, ``plan``, ``open_run``."""

import inspect
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

from cqsa_stream.command import Command, Look
from cqsa_stream.events import Observer
from cqsa_stream.executors.choose import crew_of
from cqsa_stream.observers.watching import checked, shown
from cqsa_stream.run.durable import compute
from cqsa_stream.run.inputs import refuse_other_inputs
from cqsa_stream.run.opened import Run, open_run
from cqsa_stream.run.planned import planned
from cqsa_stream.run.session import compute_in_memory
from cqsa_stream.run.stopping import Stopper
from cqsa_stream.schedulers.masks.rule import Rule
from cqsa_stream.schedulers.plan import Plan

__all__ = ["Run", "attention", "open_run", "plan"]

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    out: str | os.PathLike[str] | None = None,
    return_lse: bool = False,
    window: int | None = None,
    mask: Rule | str | os.PathLike[str] | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    q_start: int = 0,
    queries: tuple[int, int] | None = None,
    device: str = "auto",
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    schedule: str = "auto",
    chunks: int | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    checkpoint_every_s: float | str | None = None,
    max_seconds: float | str | None = None,
    kernel: str = "auto",
    shares: int | None = None,
    workers: int | None = None,
    executor: str | None = None,
    address: str | None = None,
    layout: str = "bhtd",
    fill_missing: bool = False,
    fresh: bool = False,
    out_dtype: str | None = None,
    lse: str | os.PathLike[str] | None = None,
    progress: bool = False,
    observers: Sequence[Observer] = (),
) -> Any:
    """Compute exact attention of arrays that need not fit in memory; the arguments are those of torch's SDPA, and more.

    ``query [batch, heads, query_tokens, head_dim]``, ``key [batch, kv_heads, keys, head_dim]`` and ``value [batch,
    kv_heads, keys, value_dim]``, each a path or URL, a ``zarr.Array``, a ``tensorstore.TensorStore``, a numpy array or
    a torch tensor, of float32, float16 or bfloat16. Fewer K/V than query heads need ``enable_gqa``. ``layout="bthd"``:
    their axes are [batch, token, head, feature], as flash-attention's; so are those of a tensor that is returned.
    Forward only: tensors that require grad are refused while grad is enabled.

    ``is_causal`` aligns by position: query row i stands at ``q_start + i`` and sees the keys up to its own position.
    ``window=w``: of these the last w, its own among them, with ``is_causal`` or without. ``mask``: one of
    ``cqsa_stream.masks``, joined with ``&``, or the path of a JSON file of one. ``attn_mask``: booleans
    [query_tokens, keys], True where a query sees a key, the same for all batches and heads. A query sees what all of
    these show it.
    ``soft_cap``: scores s become ``soft_cap * tanh(s / soft_cap)``. ``alibi_slopes``: one for each query head;
    ``slope * |distance|`` is taken from scores. ``sinks``: one for each query head, the score of a key without a value
    that joins each row's softmax, and its lse.
    ``queries=(a, b)`` computes only those rows. ``scale``: 1 / sqrt(head_dim) where None.

    ``out=None`` returns a tensor. ``out=path`` writes a Zarr v3 array, durably: progress is kept in ``run_dir``
    (``OUT.run`` where None) every ``checkpoint_every_s`` (60 seconds, or "5m", "1h"), the same call resumes, and the
    opened ``tensorstore.TensorStore`` is returned. ``lse``: a path for the log-sum-exp; by default in ``run_dir``.
    ``fresh`` discards the earlier run of this output.
    ``return_lse`` returns (output, lse [batch, heads, rows] float32). ``out_dtype``: the inputs' where None.
    ``fill_missing`` reads missing stored chunks as the fill value.

    ``device_memory``, ``host_memory``: bytes, "4GiB", or "4G", which is 4e9 bytes; None takes 80 % of what is free, or
    what the run's last session had. ``schedule``: "auto", "cqs" or "rectangular". ``chunks``: c, a Singer number where
    queries and keys are the
    same positions. ``kernel``: "auto", or to compare one of our own in float32: "online", on CUDA also "cupy".
    ``shares``: into how many the tasks are dealt, which fixes the result's bits; ``workers``: processes that compute
    them at the same time, of inputs that have a path, within ``host_memory`` together; by default one, or one for each
    device of "cuda" (all) or "cuda:0,2". ``executor="ray"``: actors of the cluster at ``address``, or of one of their
    own, each with a ``host_memory`` of its own.
    ``progress`` draws a bar, in a notebook one of its own.
    ``observers`` are called with each event (``cqsa_stream.events``); one that raises is told no more.

    Raises InputError, BudgetError, LockedError, MismatchError, ArrayError, FullDiskError or NoMemoryError; RunStopped
    at ``max_seconds``; with ``out``, in the main thread, RunInterrupted at Ctrl-C, KeyboardInterrupt at the second.
    """
    words, observers = locals(), (*shown(progress), *checked(observers))
    stop = Stopper(() if out is None else (signal.SIGINT,))
    command = _command(words)
    if command.target is None:
        found, found_lse = compute_in_memory(command, observers, stop, with_lse=return_lse)
        home = query.device if isinstance(query, torch.Tensor) else found.device
        found = found.to(home) if layout == "bhtd" else found.transpose(1, 2).to(home)
        return found if found_lse is None else (found, found_lse.to(home))
    compute(command, observers, stop, crew_of)
    stop.pass_on()
    run = Run(command.target.run_dir)
    return (run.output(), run.lse()) if return_lse else run.output()


def _taking_the_arguments_of(
    other: Callable[Arguments, Any],
) -> Callable[[Callable[..., Returned]], Callable[Arguments, Returned]]:
    """Give a function the signature of another."""

    def taking(function: Callable[..., Returned]) -> Callable[Arguments, Returned]:
        function.__signature__ = inspect.signature(other)  # type: ignore[attr-defined]
        return function

    return taking


@_taking_the_arguments_of(attention)
def plan(*args: Any, **options: Any) -> Plan:
    """Return what ``attention`` with the same arguments would do and need, reading nothing but shapes.

    A ``cqsa.Shape`` stands for an array that is not there yet. Where the run of ``out`` has begun, the plan is that of
    its continuation, and its ``begun`` says what is done; where another run has, it is that of a new one. The plan may
    be over budget: see its ``fits``. Print it, or take its ``to_dict()``. Raises InputError, ArrayError.
    """
    call = inspect.signature(attention).bind(*args, **options)
    call.apply_defaults()
    checked(call.arguments["observers"])
    return planned(_command(call.arguments, lambda _, __: None))


def _command(words: Mapping[str, Any], look: Look = refuse_other_inputs) -> Command:
    """Parse a call: what is "auto" by default was not named."""
    autos = {name: None for name in ("device", "schedule", "kernel") if str(words[name]) == "auto"}
    return Command.of({**words, **autos}, look)
