"""From a problem, its arrays and a device to a plan."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cqsa_stream.errors import BudgetError, InputError
from cqsa_stream.kernels.choose import KERNELS, Kernel, kernel_for, merges_at_once
from cqsa_stream.machine.budgets import FREE_SHARE, choose_device, describe, parse_size
from cqsa_stream.problem import Problem, dtype_bytes, is_finite, is_number
from cqsa_stream.schedulers.grid import Grid
from cqsa_stream.schedulers.model.memory import Workload
from cqsa_stream.schedulers.model.traffic import Stored
from cqsa_stream.schedulers.plan import Plan
from cqsa_stream.schedulers.quorums import quorum_size
from cqsa_stream.schedulers.search import MOST_CHUNKS, Request, make_plan
from cqsa_stream.storage.errors import FullDiskError
from cqsa_stream.storage.open import TokenArray
from cqsa_stream.storage.readers.plain import CACHED_BYTES

__all__ = ["CHECKPOINT_EVERY_S", "Options", "plan_run", "refuse_over_budget", "refuse_what_is_not_there"]

SCHEDULES = ("auto", "cqs", "rectangular")
CHECKPOINT_EVERY_S = 60.0


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what: none of it changes the result beyond rounding. None: not named by the user."""

    device: str | None = None
    device_memory: int | str | None = None
    host_memory: int | str | None = None
    schedule: str | None = None
    chunks: int | None = None
    checkpoint_every_s: float | None = None
    max_seconds: float | None = None
    kernel: str | None = None

    def __post_init__(self) -> None:
        """Raises InputError where a value cannot be, whatever the problem."""
        if self.kernel is not None and self.kernel not in KERNELS:
            raise InputError(f"kernel {self.kernel!r}; expected one of {', '.join(KERNELS)}")
        if self.chunks is not None:
            if not is_number(self.chunks) or self.chunks % 1 or not 0 < self.chunks <= MOST_CHUNKS:
                raise InputError(f"chunks {self.chunks!r}; expected a whole number, 1 to {MOST_CHUNKS}")
            object.__setattr__(self, "chunks", int(self.chunks))  # numpy's numbers are none of JSON's
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise InputError(f"schedule {self.schedule!r}; expected one of {', '.join(SCHEDULES)}")
        for name in ("checkpoint_every_s", "max_seconds"):
            value = getattr(self, name)
            if value is not None and not (is_finite(value) and value >= 0):
                raise InputError(f"{name} {value!r}; expected seconds, at least 0")
            if value is not None:
                object.__setattr__(self, name, float(value))
        for name in ("device_memory", "host_memory"):
            parse_size(getattr(self, name), name)

    def check(self, problem: Problem) -> None:
        """Raises InputError where a value cannot be, for this problem on this machine."""
        self.kernel_on(choose_device(self.device or "auto"), problem)
        if self.chunks is not None and problem.same_positions:
            try:
                quorum_size(self.chunks)
            except ValueError as error:
                raise InputError(str(error)) from error

    def kernel_on(self, device: torch.device, problem: Problem) -> Kernel:
        """Return the kernel that computes the problem on a device. Raises InputError where there is none."""
        return kernel_for(device, getattr(torch, problem.dtype), self.kernel or "auto")


def plan_run(
    problem: Problem,
    arrays: dict[str, TokenArray],
    options: Options,
    *,
    durable: bool,
    out: Path | None = None,
    grid: Grid | None = None,
    out_tokens: int | None = None,
) -> tuple[Plan, torch.device]:
    """Return the plan, over budget or not, and the device it is for. ``out``: where a new durable run's output goes.

    Raises InputError.
    """
    options.check(problem)
    device = choose_device(options.device or "auto")
    if problem.dtype == "float64" and device.type != "cpu":
        raise InputError(f"float64 arrays on {device}: take --device cpu, or convert them to float32")
    kernel = options.kernel_on(device, problem)
    machine = describe(
        device,
        problem,
        kernel,
        parse_size(options.device_memory, "device_memory"),
        parse_size(options.host_memory, "host_memory"),
        out,
    )
    every = options.checkpoint_every_s
    request = Request(
        work=_workload(problem, arrays, device, kernel, durable=durable),
        queries=problem.queries,
        keys=problem.keys,
        first_query=problem.first_query,
        same_positions=problem.same_positions,
        mask=problem.mask,
        arrays=(
            _stored(arrays["query"], problem.group),
            _stored(arrays["key"], 1),
            _stored(arrays["value"], 1),
        ),
        checkpoint_every_s=CHECKPOINT_EVERY_S if every is None else every,
        schedule=options.schedule or "auto",
        chunks=options.chunks,
        grid=grid,
        out_tokens=out_tokens,
    )
    try:
        return replace(make_plan(request, machine), about=str(problem)), device
    except ValueError as error:
        raise InputError(str(error)) from error


def refuse_over_budget(plan: Plan) -> None:
    """Raise BudgetError where the plan does not fit, naming what would."""
    if plan.fits:
        return
    host, device = -(-plan.least.host_bytes // 2**20), -(-plan.least.device_bytes // 2**20)
    allowed = plan.host_allowed_bytes / 2**20
    lines = [
        f"no plan fits: host memory {allowed:.1f} MiB allowed; the smallest that would do: --host-memory {host}MiB"
    ]
    if plan.device_allowed_bytes is not None:
        lines.append(f"device memory {plan.device_allowed_bytes / 2**20:.1f} MiB allowed; --device-memory {device}MiB")
    if plan.least.pageable["output"]:
        lines.append("the output stays in memory: name a path for it (out) to need less")
    raise BudgetError("; ".join(lines))


def refuse_what_is_not_there(plan: Plan) -> None:
    """Raise BudgetError or FullDiskError where the machine has less free than the plan needs, whatever is allowed."""
    for pool, projected, free in plan.lacking():
        found = f"{pool}: {projected / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free"
        if pool == "disk":
            raise FullDiskError(f"{found}; make room where the output goes, and run the same command again")
        option = "--" + pool.replace(" ", "-")
        raise BudgetError(f"{found}; allow less ({option} {int(free * FREE_SHARE) // 2**20}MiB), or free some")


def _workload(
    problem: Problem, arrays: dict[str, TokenArray], device: torch.device, kernel: Kernel, *, durable: bool
) -> Workload:
    out_itemsize = dtype_bytes(problem.out_dtype)
    return Workload(
        lanes=problem.lanes,
        group=problem.group,
        head_dim=problem.head_dim,
        value_dim=problem.value_dim,
        stored_itemsize=dtype_bytes(problem.dtype),
        compute_itemsize=kernel.compute_dtype(getattr(torch, problem.dtype)).itemsize,
        partial_itemsize=dtype_bytes(problem.partial_dtype),
        out_itemsize=out_itemsize,
        flops=problem.flops,
        staging_bytes=max(array.staging_bytes for array in arrays.values()),
        calls_at_a_time=kernel.at_a_time,
        score_bytes=kernel.score_bytes,
        score_columns=kernel.score_columns,
        workspace_bytes=kernel.workspace_bytes,
        merged_at_once=merges_at_once(device),
        kept_bytes=sum(array.kept_bytes for array in arrays.values()),
        durable=durable,
        resident_output_bytes=0
        if durable
        else math.prod(problem.out_shape) * out_itemsize + 4 * math.prod(problem.out_shape[:3]),
    )


def _stored(array: TokenArray, heads: int) -> Stored:
    """Describe what reading ``heads`` neighbouring heads fetches: chunks that hold other heads too come whole."""
    batch_chunk, head_chunk, token_chunk, _ = array.stored_chunk
    lanes = array.shape[1] // heads
    whole = array.encoding == "checked"  # then the last chunk is read with what pads it
    chunks = sum(-(-(lane + 1) * heads // head_chunk) - lane * heads // head_chunk for lane in range(lanes))
    return Stored(
        axis_tokens=-(-array.shape[2] // token_chunk) * token_chunk if whole else array.shape[2],
        chunk_tokens=token_chunk,
        heads_fetched=chunks * head_chunk * batch_chunk,
        lanes=lanes,
        row_bytes=array.shape[3] * dtype_bytes(array.dtype),
        encoding=array.encoding,
        in_memory=array.source == "memory",
        leaf_bytes=array.leaf_bytes,
        past_cache=array.encoding != "compressed" and _bytes(array) > CACHED_BYTES,
    )


def _bytes(array: TokenArray) -> int:
    return math.prod(array.shape) * dtype_bytes(array.dtype)
