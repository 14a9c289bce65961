"""From a problem, its arrays and a device to a plan."""

import logging
import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from cqsa_stream.errors import BudgetError, InputError
from cqsa_stream.kernels.choose import kernel_of, merges_at_once
from cqsa_stream.kernels.contract import Kernel, KernelChoice
from cqsa_stream.machine.budgets import FREE_SHARE, describe
from cqsa_stream.machine.device import Device, device_of
from cqsa_stream.machine.habits import CUDA, HOST
from cqsa_stream.operations.sums import forward_sums
from cqsa_stream.options import Options
from cqsa_stream.problem import Problem, dtype_bytes
from cqsa_stream.schedulers.grid import Grid
from cqsa_stream.schedulers.model.memory import Layout, Workload
from cqsa_stream.schedulers.model.traffic import Stored
from cqsa_stream.schedulers.plan import Chosen, Plan
from cqsa_stream.schedulers.request import Machine, Request
from cqsa_stream.schedulers.schedules import AUTO
from cqsa_stream.schedulers.search import make_plan, plan_again
from cqsa_stream.storage.contract import TokenArray
from cqsa_stream.storage.errors import FullDiskError
from cqsa_stream.storage.readers.plain import CACHED_BYTES

__all__ = ["plan_run", "refuse_over_budget", "refuse_what_is_not_there"]

_log = logging.getLogger(__name__)


def plan_run(
    problem: Problem,
    arrays: dict[str, TokenArray],
    options: Options,
    *,
    durable: bool,
    out: Path | None = None,
    grid: Grid | None = None,
    out_tokens: int | None = None,
    shares: int | None = None,
    fixed: tuple[Chosen, Options] | None = None,
) -> tuple[Plan, Device]:
    """Return the plan, over budget or not, and the device it is for. ``out``: where a new durable run's output goes;
    ``grid``, ``out_tokens`` and ``shares`` of a run that has begun, and ``fixed``, what its last session chose, by what
    options. With several shares nothing else can be chosen.

    Raises InputError; BudgetError where what is fixed does not fit.
    """
    options.check(problem)
    dealt = shares or options.dealt if durable else 1
    device, stored = device_of(options.device or "auto"), getattr(torch, problem.dtype)
    if problem.dtype == "float64" and device.habits.own_memory:
        raise InputError(f'float64 arrays on {device}: take device="cpu", or convert them to float32')

    def asked(options: Options, choice: KernelChoice) -> tuple[Request, Machine]:
        kernel = kernel_of(choice, device.torch, stored)
        work = _workload(problem, arrays, kernel, merged_at_once=merges_at_once(device.torch), durable=durable)
        work = replace(work, merged_shares=dealt > 1)
        request = _request(problem, arrays, work, options, grid=grid, out_tokens=out_tokens, shares=dealt)
        return request, describe(device, problem, choice, *options.budgets, out)

    plan = None
    if fixed is not None:
        chosen, before = fixed
        alone = shares in (None, 1)
        with suppress(*((ValueError, KeyError, TypeError) if alone else ())):  # by another version, or elsewhere
            layout = Layout.from_dict(chosen.layout)
            plan = plan_again(*asked(before, KernelChoice(chosen.kernel, chosen.operator)), chosen.schedule, layout)
        if plan is None and not alone:
            raise BudgetError(
                "the plan by which the run began does not fit this worker, or it is none of this device: allow as much "
                "memory as it began with, or begin anew with less (fresh=True)"
            )
        if plan is None:
            _log.warning("what the last session chose does not fit any more; the run is planned anew")
    try:
        plan = plan or make_plan(*asked(options, options.kernel_choice(device, problem)))
    except ValueError as error:
        raise InputError(str(error)) from error
    about = str(problem)
    candidates = tuple(replace(candidate, about=about) for candidate in plan.candidates)
    return replace(plan, about=about, shares=dealt, candidates=candidates), device


def _request(
    problem: Problem,
    arrays: dict[str, TokenArray],
    work: Workload,
    options: Options,
    *,
    grid: Grid | None,
    out_tokens: int | None,
    shares: int,
) -> Request:
    return Request(
        work=work,
        queries=problem.queries,
        keys=problem.keys,
        same_positions=problem.same_positions,
        mask=problem.visible,
        arrays=(
            _stored(arrays["query"], problem.group, problem.first_query),
            _stored(arrays["key"], 1),
            _stored(arrays["value"], 1),
        ),
        cached=_cached_share(arrays),
        checkpoint_every_s=options.interval_s,
        schedule=options.schedule or AUTO,
        chunks=options.chunks,
        shares=shares,
        workers=len(options.devices),
        together=options.executor != "ray",
        grid=grid,
        out_tokens=out_tokens,
    )


def refuse_over_budget(plan: Plan) -> None:
    """Raise BudgetError where the plan does not fit, naming what would."""
    if plan.fits:
        return
    host, device = -(-plan.least.host_bytes // 2**20), -(-plan.least.device_bytes // 2**20)
    allowed = plan.host_allowed_bytes / 2**20
    lines = [
        f'no plan fits: host memory {allowed:.1f} MiB allowed; the smallest that would do: host_memory="{host}MiB"'
    ]
    if plan.crew is not None and plan.crew.workers > 1:
        lines = [
            f"no plan fits: host memory {allowed:.1f} MiB allowed to each of {plan.crew.workers} workers; the smallest "
            f"that would do: {host} MiB for each, {_crew_host(plan, host)}"
        ]
    if plan.device_allowed_bytes is not None:
        lines.append(f'device memory {plan.device_allowed_bytes / 2**20:.1f} MiB allowed; device_memory="{device}MiB"')
    if plan.least.pageable["output"]:
        lines.append("the output stays in memory: name a path for it (out) to need less")
    raise BudgetError("; ".join(lines))


def _crew_host(plan: Plan, host_mib: int) -> str:
    """Say which budget gives each worker so much: local workers share it with the process that leads them."""
    assert plan.crew is not None
    leading = (HOST if plan.layout.in_place else CUDA).host_reserved_bytes // 2**20
    total = host_mib * plan.crew.workers + leading
    return f'which is host_memory="{total}MiB" for workers of this machine together, "{host_mib}MiB" for those of Ray'


def refuse_what_is_not_there(plan: Plan) -> None:
    """Raise BudgetError or FullDiskError where the machine has less free than the plan needs, whatever is allowed."""
    for pool, projected, free in plan.lacking():
        found = f"{pool}: {projected / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free"
        if pool == "disk":
            raise FullDiskError(f"{found}; make room where the output goes, and run the same command again")
        option = pool.replace(" ", "_")
        raise BudgetError(f'{found}; allow less ({option}="{int(free * FREE_SHARE) // 2**20}MiB"), or free some')


def _workload(
    problem: Problem, arrays: dict[str, TokenArray], kernel: Kernel, *, merged_at_once: bool, durable: bool
) -> Workload:
    can = kernel.abilities
    [by_rows] = forward_sums(problem)
    in_memory = math.prod(problem.out_shape[:3]) * (problem.value_dim * dtype_bytes(problem.out_dtype) + 4)
    return Workload(
        lanes=problem.lanes,
        group=problem.group,
        head_dim=problem.head_dim,
        value_dim=problem.value_dim,
        stored_itemsize=dtype_bytes(problem.dtype),
        compute_itemsize=can.compute_dtype(getattr(torch, problem.dtype)).itemsize,
        partial_itemsize=dtype_bytes(problem.partial_dtype),
        out_itemsize=dtype_bytes(problem.out_dtype),
        row_bytes=by_rows.token_bytes,
        left_bytes=by_rows.left_bytes,
        flops=problem.flops,
        staging_bytes=max(array.staging_bytes for array in arrays.values()),
        calls_at_a_time=can.calls_at_a_time,
        score_bytes=can.score_bytes,
        score_rows=can.score_rows,
        whole_dims=can.whole_dims,
        packing_bytes=_packing_bytes(problem, kernel),
        score_columns=can.score_columns,
        workspace_bytes=can.workspace_bytes,
        merged_at_once=merged_at_once,
        merges=can.merging(problem.head_dim, problem.value_dim),
        rounded_tiles=can.rounded_tiles,
        lower_edges=problem.visible.has_lower_edges,
        kept_bytes=sum(array.kept_bytes for array in arrays.values()) + problem.visible.nbytes,
        durable=durable,
        resident_output_bytes=0 if durable else in_memory,
    )


def _packing_bytes(problem: Problem, kernel: Kernel) -> int:
    """Return what a call of small bands holds, where the mask has several bands that may be such."""
    if len(problem.visible) == 1:
        return 0
    can, width = kernel.abilities, max(problem.head_dim, problem.value_dim)
    itemsize = can.compute_dtype(getattr(torch, problem.dtype)).itemsize
    return can.packing_bytes + can.packing_numbers * width * itemsize


def _cached_share(arrays: dict[str, TokenArray]) -> float:
    """Return which share of the stored arrays' bytes the system holds in memory."""
    sizes = {
        name: math.prod(array.shape) * dtype_bytes(array.dtype) * (array.source != "memory")
        for name, array in arrays.items()
    }
    cached = sum(sizes[name] * array.cached_share() for name, array in arrays.items())
    return cached / max(1, sum(sizes.values()))


def _stored(array: TokenArray, heads: int, first: int = 0) -> Stored:
    """Describe what reading ``heads`` neighbouring heads fetches: chunks that hold other heads too come whole.

    ``first``: the first token that is used.
    """
    batches, all_heads, tokens, features = array.shape
    batch_chunk, head_chunk, token_chunk, _ = array.stored_chunk
    lanes, row_bytes = all_heads // heads, features * dtype_bytes(array.dtype)
    whole = array.encoding == "checked"  # chunks come once with what pads them, and then by ranges
    chunks = sum(-(-(lane + 1) * heads // head_chunk) - lane * heads // head_chunk for lane in range(lanes))
    starts = range(0, all_heads, head_chunk)
    asked = sum(min((start // heads + 1) * heads, start + head_chunk, all_heads) - start for start in starts)
    groups = -(-batches // batch_chunk)  # of chunks; their heads are shared out to the batches
    return Stored(
        axis_tokens=-(-tokens // token_chunk) * token_chunk if whole else tokens,
        chunk_tokens=token_chunk,
        heads_fetched=all_heads if whole else chunks * head_chunk * batch_chunk,
        lanes=lanes,
        row_bytes=row_bytes,
        encoding=array.encoding,
        first=first,
        in_memory=array.source == "memory",
        heads_checked=-(-len(starts) * head_chunk * batch_chunk * groups // batches),
        heads_first=-(-asked * groups // batches),
        past_cache=array.encoding != "compressed" and math.prod(array.shape[:3]) * row_bytes > CACHED_BYTES,
    )
