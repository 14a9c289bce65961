"""The command line: ``cqsa generate | plan | run | status | verify | bench``.

Data goes to stdout, messages and progress to stderr. Exit codes: 0 done; 1 failed; 2 bad usage or input; 3 stopped and
resumable; 4 over budget; 5 locked; 6 another problem or other inputs; 130 Ctrl-C (resumable).
"""

import errno
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from cqsa_stream.errors import InputError, RunInterrupted, RunStopped

if TYPE_CHECKING:
    from cqsa_stream.problem import Problem
    from cqsa_stream.run.admission import Target
    from cqsa_stream.storage.open import TokenArray

__all__ = ["main"]

app = typer.Typer(
    help="Exact attention over sequences on disk, within a memory budget, resumable.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Causal = Annotated[bool, typer.Option("--causal", help="A query sees the keys up to its own position.")]
Layout = Annotated[str, typer.Option(help="Axes of Q, K and V: bhtd, or bthd as in flash-attention (b batch, h head).")]
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
Lse = Annotated[str | None, typer.Option(help="Where the log-sum-exp goes; into the run directory if not given.")]
RunDir = Annotated[str | None, typer.Option("--run-dir", help="OUT.run if not given.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Discard the earlier run of OUT and its output.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]


def main() -> None:
    """Run the command line; every expected error becomes one line and its exit code."""
    _stand_in_for_what_is_closed()
    logging.basicConfig(format="cqsa: %(message)s", stream=sys.stderr)
    code = 0
    try:
        code = app(standalone_mode=False) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        code = RunInterrupted.exit_code
    except Exception as error:
        expected = _exit_code(error)
        if expected is None:
            raise
        code = expected
        usage = getattr(error, "format_message", None)  # what the parser has to say
        _say(" ".join((usage() if usage else str(error) or type(error).__name__).split()))
    if not _flushed(sys.stdout) and code == 0:
        _say("what was printed could not be written to stdout")
        code = 1
    _flushed(sys.stderr)
    sys.exit(code)


def _exit_code(error: Exception) -> int | None:
    """Return the exit code of an expected error, None for a defect."""
    if isinstance(error, typer.Abort):
        return RunInterrupted.exit_code
    code: int | None = getattr(error, "exit_code", None)  # ours, and the parser's
    return 1 if code is None and isinstance(error, OSError | MemoryError) else code


def _stand_in_for_what_is_closed() -> None:
    """Let no file that is opened later take the number of a closed stdin, stdout or stderr, where others print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends


def _flushed(stream: TextIO | None) -> bool:
    """Flush; where nobody can read it, send the rest nowhere, so that the process does not fail for it at its end."""
    if stream is None:
        return True
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return False
    return True


def _say(message: str) -> None:
    """Tell the user, if there is one who reads it."""
    with suppress(OSError):
        print(f"cqsa: {message}", file=sys.stderr, flush=True)


def _print(data: object) -> None:
    """Print what a command is for. Raises OSError where it cannot be."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, "stdout is closed; nothing could be printed")
    print(data, flush=True)


@app.command()
def generate(
    directory: Annotated[str, typer.Argument(metavar="DIR")],
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
    from cqsa_stream.run.places import local_path

    paths = make(
        local_path(directory), tokens=tokens, heads=heads, head_dim=head_dim, kv_heads=kv_heads, batch=batch,
        dtype=dtype, seed=seed, chunk_tokens=chunk_tokens, codec=codec,
    )  # fmt: skip
    for path in paths:
        _print(path)


@app.command()
def plan(
    q: Annotated[str, typer.Argument(metavar="Q")],
    k: Annotated[str, typer.Argument(metavar="K")],
    v: Annotated[str, typer.Argument(metavar="V")],
    out: Annotated[str | None, typer.Argument(metavar="OUT")] = None,
    causal: Causal = False,
    layout: Layout = "bhtd",
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
    from cqsa_stream.run.admission import Target

    where = None if out is None else Target.of(out, run_dir, lse).out
    options = Options(device, device_memory, host_memory, schedule, chunks, checkpoint_every, max_seconds, kernel)
    arrays, problem = _problem(q, k, v, fill_missing, layout, causal, scale, q_start, queries, out_dtype)
    found, _ = plan_run(problem, arrays, options, durable=True, out=where)
    _print(json.dumps(found.to_dict()) if as_json else found)
    refuse_over_budget(found)


@app.command()
def run(
    q: Annotated[str, typer.Argument(metavar="Q")],
    k: Annotated[str, typer.Argument(metavar="K")],
    v: Annotated[str, typer.Argument(metavar="V")],
    out: Annotated[str, typer.Argument(metavar="OUT")],
    causal: Causal = False,
    layout: Layout = "bhtd",
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
    from cqsa_stream.run.stopping import Stopper

    here = Path.cwd()
    stop = Stopper((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), max_seconds, owns_process=True)
    with stop, _interruptible(out):  # from here on a signal is a request to stop at the first safe point
        from cqsa_stream.observers import terminal_observer
        from cqsa_stream.planning import Options
        from cqsa_stream.run.admission import Target
        from cqsa_stream.run.session import run_on_disk

        target = Target.of(out, run_dir, lse, fresh=fresh, fill_missing=fill_missing, layout=layout)
        options = Options(
            device, device_memory, host_memory, schedule, chunks,
            checkpoint_every_s=checkpoint_every, max_seconds=max_seconds, kernel=kernel,
        )  # fmt: skip
        arrays, problem = _problem(q, k, v, fill_missing, layout, causal, scale, q_start, queries, out_dtype, target)
        run_on_disk(problem, arrays, options, target, terminal_observer(as_json=as_json, quiet=quiet), stop)
    _flushed(sys.stdout)  # events are news: the run is complete whether or not somebody reads them
    if not quiet:
        where = target.run_dir
        _say(f"{out} is complete (run directory {where.relative_to(here) if where.is_relative_to(here) else where})")


@app.command()
def bench(
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine and the disk of the current folder, so that plans tell its seconds. Under a minute."""
    from cqsa_stream.bench import measure
    from cqsa_stream.machine.budgets import choose_device

    chosen = choose_device(device or "auto")
    found = measure(chosen, Path.cwd())
    path = found.save(chosen)
    _print(found.to_json().decode().strip() if as_json else found)
    _say(f"kept in {path}")


@app.command()
def status(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR")],
    as_json: AsJson = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Again every second, until the run is complete or stops.")
    ] = False,
) -> None:
    """Say where a run stands, by what is on disk."""
    from cqsa_stream.run.opened import open_run

    opened = open_run(run_dir)
    at_work = watch and opened.directory.at_work()
    while at_work:
        found = opened.status(durable=False)
        _print(json.dumps(found) if as_json else _described(found))
        time.sleep(1)
        at_work = opened.directory.at_work()
    found = opened.status()
    _print(json.dumps(found) if as_json else _described(found))
    if watch and not found["complete"]:
        _say("stopped; the same run command resumes it")


@app.command()
def verify(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR")],
    rows: Annotated[int, typer.Option(help="How many rows to compute anew.")] = 256,
    seed: Annotated[int, typer.Option()] = 0,
    fetch: Annotated[bool, typer.Option("--fetch", help="Fetch inputs from the URLs in the run directory.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check what is finished: its checksums, and sampled rows against float64. Exit code 1 where that fails.

    The tolerance bounds the worst case of one row; errors are far below it as a rule.
    """
    from cqsa_stream.run.opened import open_run

    found = open_run(run_dir).verify(rows=rows, seed=seed, fetch=fetch)
    _print(json.dumps(asdict(found)) if as_json else _lines(asdict(found)))
    if not found.complete:
        _say("the run is incomplete: only its finished rows were checked")
    if found.not_finite_rows:
        _say(f"{found.not_finite_rows} of these rows are inf or NaN by their inputs, and so they should be")
    if not found.ok:
        damage = f"{found.damaged_rows} row chunks are not what was written: the same run command computes them again"
        wrong = "the output differs from the float64 reference beyond the tolerance"
        _say(damage if found.damaged_rows else wrong)
        sys.exit(1)


def _problem(
    q: str, k: str, v: str, fill_missing: bool, layout: str, causal: bool, scale: float | None, q_start: int,
    queries: str | None, out_dtype: str | None, target: "Target | None" = None,
) -> "tuple[dict[str, TokenArray], Problem]":  # fmt: skip
    from cqsa_stream.problem import Problem
    from cqsa_stream.run.inputs import open_inputs

    rows = _query_range(queries)
    arrays = open_inputs(q, k, v, fill_missing=fill_missing, layout=layout)
    if target is not None:
        from cqsa_stream.run.admission import refuse_other_inputs

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
        raise InputError(f"--queries {text!r}; expected A:B, as 0:4096")
    return int(first), int(stop)


@contextmanager
def _interruptible(out: str) -> Iterator[None]:
    """Say how to go on after a stop."""
    try:
        yield
    except RunStopped as error:
        _say(f"{error}; the same command resumes {out}")
        sys.exit(error.exit_code)


def _described(found: dict[str, Any]) -> str:
    """Return a run's status as text: its figures, then what was predicted beside what was measured."""
    from cqsa_stream.observers import side_by_side

    plain = {name: value for name, value in found.items() if name not in ("predicted", "measured")}
    return f"{_lines(plain)}\n\n{side_by_side(found['predicted'] or {}, found['measured'])}"


def _lines(fields: dict[str, Any]) -> str:
    width = max(map(len, fields))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in fields.items())
