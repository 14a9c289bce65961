"""The command line: ``cqsa generate | plan | run | status | verify | bench``.

Data goes to stdout, messages and progress to stderr. Exit codes: 0 done; 1 failed; 2 bad usage or input; 3 stopped and
resumable; 4 over budget; 5 locked; 6 another problem or other inputs; 130 Ctrl-C (resumable).
"""

import errno
import json
import logging
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cqsa_stream.admission import Target
    from cqsa_stream.problem import Problem
    from cqsa_stream.storage.arrays import TokenArray

__all__ = ["main"]

app = typer.Typer(
    help="Exact attention over sequences on disk, within a memory budget, resumable.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Causal = Annotated[bool, typer.Option("--causal", help="A query sees the keys up to its own position.")]
Scale = Annotated[float | None, typer.Option(help="Factor of the scores; 1/sqrt(head dim) where not given.")]
QStart = Annotated[int, typer.Option("--q-start", help="Position of the first query row.")]
Queries = Annotated[str | None, typer.Option(metavar="A:B", help="Compute only the query rows A to B-1.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:<number>.")]
DeviceMemory = Annotated[str | None, typer.Option("--device-memory", metavar="SIZE", help='As "4GiB" or "512MiB".')]
HostMemory = Annotated[
    str | None, typer.Option("--host-memory", metavar="SIZE", help="80 % of what is free if not given.")
]
ScheduleName = Annotated[str | None, typer.Option("--schedule", help="auto, cqs or rectangular.")]
Chunks = Annotated[int | None, typer.Option(help="Number of chunks: 7, 13, 21, 31, 57, ...")]
KernelName = Annotated[str | None, typer.Option("--kernel", help="auto, or cupy: float32 on CUDA, to compare with.")]
FillMissing = Annotated[bool, typer.Option("--fill-missing", help="Read missing stored chunks as the fill value.")]
OutDtype = Annotated[
    str | None, typer.Option("--out-dtype", help="float32, float16 or bfloat16; the inputs' if not given.")
]
CheckpointEvery = Annotated[
    float | None, typer.Option("--checkpoint-every", metavar="SECONDS", help="60 if not given.")
]
MaxSeconds = Annotated[float | None, typer.Option("--max-seconds", help="Stop, resumable, after so long.")]
Lse = Annotated[Path | None, typer.Option(help="Where the log-sum-exp goes; into the run directory if not given.")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="OUT.run if not given.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Discard the earlier run of OUT and its output.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]


def main() -> None:
    """Run the command line; every expected error becomes one line and its exit code."""
    logging.basicConfig(format="cqsa: %(message)s")
    try:
        sys.exit(app(standalone_mode=False))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        usage = getattr(error, "format_message", None)  # what the parser has to say
        print(f"cqsa: {' '.join((usage() if usage else str(error) or type(error).__name__).split())}", file=sys.stderr)
        sys.exit(code)


def _exit_code(error: Exception) -> int | None:
    """Return the exit code of an expected error, None for a defect."""
    if type(error).__name__ == "Abort":
        return 130
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return 3
    code: int | None = getattr(error, "exit_code", None)
    return 1 if code is None and isinstance(error, OSError | MemoryError) else code


@app.command()
def generate(
    directory: Annotated[Path, typer.Argument(metavar="DIR")],
    tokens: Annotated[int, typer.Option()],
    heads: Annotated[int, typer.Option()],
    head_dim: Annotated[int, typer.Option("--head-dim")],
    kv_heads: Annotated[int | None, typer.Option("--kv-heads")] = None,
    batch: Annotated[int, typer.Option()] = 1,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    seed: Annotated[int, typer.Option()] = 0,
    chunk_tokens: Annotated[
        int | None, typer.Option("--chunk-tokens", help="Tokens of a stored chunk; 4 MiB's worth.")
    ] = None,
    codec: Annotated[str, typer.Option(help="none, crc32c or zstd.")] = "none",
) -> None:
    """Write normally distributed q.zarr, k.zarr and v.zarr into DIR."""
    from cqsa_stream.generate import generate as make

    paths = make(
        directory, tokens=tokens, heads=heads, head_dim=head_dim, kv_heads=kv_heads, batch=batch, dtype=dtype,
        seed=seed, chunk_tokens=chunk_tokens, codec=codec,
    )  # fmt: skip
    for path in paths:
        print(path)


@app.command()
def plan(
    q: Annotated[str, typer.Argument(metavar="Q")],
    k: Annotated[str, typer.Argument(metavar="K")],
    v: Annotated[str, typer.Argument(metavar="V")],
    out: Annotated[Path | None, typer.Argument(metavar="OUT")] = None,
    causal: Causal = False,
    scale: Scale = None,
    q_start: QStart = 0,
    queries: Queries = None,
    device: Device = None,
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    schedule: ScheduleName = None,
    chunks: Chunks = None,
    fill_missing: FillMissing = False,
    out_dtype: OutDtype = None,
    checkpoint_every: CheckpointEvery = None,
    max_seconds: MaxSeconds = None,
    kernel: KernelName = None,
    lse: Lse = None,  # these three change nothing that a plan says: a run's options are taken as they are
    run_dir: RunDir = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Say what a new run would need and take, without running it. Exit code 4 where it does not fit."""
    from cqsa_stream.planning import Options, plan_run, refuse_over_budget

    arrays, problem = _problem(q, k, v, fill_missing, causal, scale, q_start, queries, out_dtype)
    options = Options(device, device_memory, host_memory, schedule, chunks, checkpoint_every, max_seconds, kernel)
    found, _ = plan_run(problem, arrays, options, durable=True, out=out)
    print(json.dumps(found.to_dict()) if as_json else found)
    refuse_over_budget(found)


@app.command()
def run(
    q: Annotated[str, typer.Argument(metavar="Q")],
    k: Annotated[str, typer.Argument(metavar="K")],
    v: Annotated[str, typer.Argument(metavar="V")],
    out: Annotated[Path, typer.Argument(metavar="OUT")],
    causal: Causal = False,
    scale: Scale = None,
    q_start: QStart = 0,
    queries: Queries = None,
    device: Device = None,
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    schedule: ScheduleName = None,
    chunks: Chunks = None,
    fill_missing: FillMissing = False,
    out_dtype: OutDtype = None,
    checkpoint_every: CheckpointEvery = None,
    max_seconds: MaxSeconds = None,
    kernel: KernelName = None,
    lse: Lse = None,
    run_dir: RunDir = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Compute OUT, a Zarr v3 array; the same command again resumes."""
    from cqsa_stream.stopping import Stopper

    stop = Stopper((signal.SIGINT, signal.SIGTERM), max_seconds)
    with stop, _interruptible(out):  # from here on a signal is a request to stop at the first safe point
        from cqsa_stream.admission import Target
        from cqsa_stream.execute import run_on_disk
        from cqsa_stream.observers import terminal_observer
        from cqsa_stream.planning import Options

        target = Target.of(out, run_dir, lse, fresh=fresh, fill_missing=fill_missing)
        arrays, problem = _problem(q, k, v, fill_missing, causal, scale, q_start, queries, out_dtype, target)
        options = Options(
            device, device_memory, host_memory, schedule, chunks,
            checkpoint_every_s=checkpoint_every, max_seconds=max_seconds, kernel=kernel,
        )  # fmt: skip
        run_on_disk(problem, arrays, options, target, terminal_observer(as_json=as_json, quiet=quiet), stop)
    if not quiet:
        print(f"cqsa: {out} is complete (run directory {target.run_dir})", file=sys.stderr)


@app.command()
def bench(
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine and the disk of the current folder, so that plans tell its seconds. Under a minute."""
    from cqsa_stream.bench import measure
    from cqsa_stream.machine import choose_device

    chosen = choose_device(device or "auto")
    found = measure(chosen, Path.cwd())
    path = found.save(chosen)
    print(found.to_json().decode().strip() if as_json else found)
    print(f"cqsa: kept in {path}", file=sys.stderr)


@app.command()
def status(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")],
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again every second, until the run is complete.")] = False,
) -> None:
    """Say where a run stands, by what is on disk."""
    from cqsa_stream.api import open_run

    opened = open_run(run_dir)
    while True:
        found = opened.status()
        print(json.dumps(found) if as_json else _described(found), flush=True)
        if not watch or found["complete"]:
            return
        time.sleep(1)


@app.command()
def verify(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")],
    rows: Annotated[int, typer.Option(help="How many rows to compute anew.")] = 256,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: AsJson = False,
) -> None:
    """Check what is finished: its checksums, and sampled rows against float64. Exit code 1 where that fails."""
    from cqsa_stream.api import open_run

    found = open_run(run_dir).verify(rows=rows, seed=seed)
    print(json.dumps(asdict(found)) if as_json else _lines(asdict(found)))
    if not found.ok:
        damage = f"{found.damaged_rows} row chunks are not what was written: the same run command computes them again"
        wrong = "the output differs from the float64 reference beyond the tolerance"
        print(f"cqsa: {damage if found.damaged_rows else wrong}", file=sys.stderr)
        sys.exit(1)


def _problem(
    q: str, k: str, v: str, fill_missing: bool, causal: bool, scale: float | None, q_start: int, queries: str | None,
    out_dtype: str | None, target: "Target | None" = None,
) -> "tuple[dict[str, TokenArray], Problem]":  # fmt: skip
    from cqsa_stream.api import open_inputs
    from cqsa_stream.problem import Problem

    rows = _query_range(queries)
    arrays = open_inputs(q, k, v, fill_missing=fill_missing)
    if target is not None:
        from cqsa_stream.admission import refuse_other_inputs

        refuse_other_inputs(target, arrays)
    problem = Problem.of(
        arrays["query"], arrays["key"], arrays["value"], scale=scale, causal=causal, q_start=q_start, queries=rows,
        out_dtype=out_dtype,
    )  # fmt: skip
    return arrays, problem


def _query_range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, stop = text.partition(":")
    if not (colon and all(n.isdecimal() and len(n) < 19 for n in (first, stop))):
        from cqsa_stream.errors import InputError

        raise InputError(f"--queries {text!r}; expected A:B, as 0:4096")
    return int(first), int(stop)


@contextmanager
def _interruptible(out: Path) -> Iterator[None]:
    """Say how to go on after a stop; Ctrl-C is exit code 130."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "RunStopped":
            raise
        print(f"cqsa: {error}; the same command resumes {out}", file=sys.stderr)
        sys.exit(130 if "SIGINT" in str(error) else 3)


def _described(found: dict[str, Any]) -> str:
    """Return a run's status as text: its figures, then what was predicted beside what was measured."""
    from cqsa_stream.observers import side_by_side

    plain = {name: value for name, value in found.items() if name not in ("predicted", "measured")}
    return f"{_lines(plain)}\n\n{side_by_side(found['predicted'] or {}, found['measured'])}"


def _lines(fields: dict[str, Any]) -> str:
    width = max(map(len, fields))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in fields.items())
