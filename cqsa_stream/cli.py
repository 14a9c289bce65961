"""The command line: ``cqsa generate | plan | run | work | finish | status | verify | bench``.

Data goes to stdout, messages and progress to stderr. Exit codes: 0 done; 1 failed; 2 bad usage or input; 3 stopped and
resumable; 4 over budget; 5 locked; 6 another problem or other inputs; 130 Ctrl-C (resumable).
"""

import errno
import inspect
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from cqsa_stream.errors import RunInterrupted, RunStopped
from cqsa_stream.observers.streams import flushed, stand_in_for_what_is_closed

__all__ = ["main"]

app = typer.Typer(
    help="Exact attention over sequences on disk, within a memory budget, resumable.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Out = Annotated[str, typer.Argument(metavar="OUT")]
RunDir = Annotated[str, typer.Argument(metavar="RUN_DIR")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:<number>.")]


class Option(NamedTuple):
    """An option of `plan` and `run`, beside its word of `attention`. ``metavar`` None: as the parser names the kind."""

    flag: str
    kind: Any
    help: str
    default: Any = None
    metavar: str | None = None


RUN_OPTIONS = {
    "is_causal": Option("--causal", bool, "A query sees the keys up to its own position.", False),
    "window": Option("--window", int, "A query sees so many keys: its own, and those before it.", metavar="KEYS"),
    "mask": Option("--mask", str, "A mask, or several that are joined, as JSON.", metavar="FILE.json"),
    "documents": Option(
        "--documents", str, "Where packed documents begin, and the last one's end: .npy or .json.", metavar="FILE"
    ),
    "chunked": Option("--chunked", int, "A query sees the keys of its own chunk of so many.", metavar="TOKENS"),
    "prefix": Option(
        "--prefix", int, "All queries see the first so many keys, and those up to their own position.", metavar="TOKENS"
    ),
    "soft_cap": Option("--soft-cap", float, "Scores s become CAP tanh(s / CAP).", metavar="CAP"),
    "alibi_slopes": Option("--alibi", str, "A slope for each query head: .npy or .json.", metavar="FILE"),
    "sinks": Option("--sinks", str, "A sink's score for each query head: .npy or .json.", metavar="FILE"),
    "layout": Option(
        "--layout", str, "Axes of the arrays: bhtd, or bthd as flash-attention's (b batch, h head).", "bhtd"
    ),
    "scale": Option("--scale", float, "Factor of the scores; 1/sqrt(head dim) where not given."),
    "q_start": Option("--q-start", int, "Position of the first query row.", 0),
    "queries": Option("--queries", str, "Compute only the query rows A to B-1.", metavar="A:B"),
    "device": Option("--device", str, "auto, cpu, cuda (all), cuda:<number> or cuda:<number>,<number>."),
    "device_memory": Option("--device-memory", str, 'As "4GiB" or "512MiB".', metavar="SIZE"),
    "host_memory": Option("--host-memory", str, "80 % of what is free if not given.", metavar="SIZE"),
    "schedule": Option("--schedule", str, "auto, cqs or rectangular."),
    "chunks": Option("--chunks", int, "Number of chunks: 7, 13, 21, 31, 57, ..."),
    "fill_missing": Option("--fill-missing", bool, "Read missing stored chunks as the fill value.", False),
    "out_dtype": Option("--out-dtype", str, "float32, float16 or bfloat16; the inputs' if not given."),
    "checkpoint_every_s": Option("--checkpoint-every", float, "60 if not given.", metavar="SECONDS"),
    "max_seconds": Option("--max-seconds", float, "Stop, resumable, after so long."),
    "shares": Option("--shares", int, "Deal the tasks into so many shares: workers take them, and they fix the bits."),
    "workers": Option("--workers", int, "Processes that share the work and the memory; one for each device."),
    "executor": Option("--executor", str, "local: processes of this machine; ray: actors of a cluster."),
    "address": Option("--address", str, "Of the Ray cluster, as auto; without it one begins on this machine."),
    "kernel": Option("--kernel", str, "auto; on CUDA also fa4, torch-cuda; to compare with: online, cupy."),
    "lse": Option("--lse", str, "Where the log-sum-exp goes; into the run directory if not given."),
    "run_dir": Option("--run-dir", str, "OUT.run if not given."),
    "fresh": Option("--fresh", bool, "Discard the earlier run of OUT and its output.", False),
}


def _with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Declare Q, K, V and the run options in the place of a command's ``**words``: the parser reads the signature."""
    parameter, arrays = inspect.Parameter, {"query": "Q", "key": "K", "value": "V"}
    declared = [
        parameter(word, parameter.POSITIONAL_OR_KEYWORD, annotation=Annotated[str, typer.Argument(metavar=name)])
        for word, name in arrays.items()
    ]
    declared += [p for p in inspect.signature(command).parameters.values() if p.kind != p.VAR_KEYWORD]
    for word, (flag, kind, explained, default, metavar) in RUN_OPTIONS.items():
        option = typer.Option(flag, help=explained, metavar=metavar)
        hint = Annotated[kind if default is not None else kind | None, option]  # type: ignore[valid-type]
        declared.append(parameter(word, parameter.KEYWORD_ONLY, default=default, annotation=hint))
    command.__signature__ = inspect.Signature(sorted(declared, key=lambda p: p.kind))  # type: ignore[attr-defined]
    return command


def main() -> None:
    """Run the command line; every expected error becomes one line and its exit code."""
    stand_in_for_what_is_closed()
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
    if not flushed(sys.stdout) and code == 0:
        _say("what was printed could not be written to stdout")
        code = 1
    flushed(sys.stderr)
    sys.exit(code)


def _exit_code(error: Exception) -> int | None:
    """Return the exit code of an expected error, None for a defect."""
    if isinstance(error, typer.Abort):
        return RunInterrupted.exit_code
    code: int | None = getattr(error, "exit_code", None)  # ours, and the parser's
    return 1 if code is None and isinstance(error, OSError | MemoryError) else code


def _say(message: str) -> None:
    """Tell the user, if there is one who reads it."""
    with suppress(OSError):
        print(f"cqsa: {message}", file=sys.stderr, flush=True)


def _show(found: dict[str, Any], as_json: bool, described: Callable[[dict[str, Any]], str]) -> None:
    _print(json.dumps(found) if as_json else described(found))


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
    from cqsa_stream.command import local_path
    from cqsa_stream.generate import generate as make

    paths = make(
        local_path(directory), tokens=tokens, heads=heads, head_dim=head_dim, kv_heads=kv_heads, batch=batch,
        dtype=dtype, seed=seed, chunk_tokens=chunk_tokens, codec=codec,
    )  # fmt: skip
    for path in paths:
        _print(path)


@app.command()
@_with_run_options
def plan(out: Out = "out.zarr", *, as_json: AsJson = False, **words: Any) -> None:
    """Print what a new run would need and take, without running it. Exit code 4 where it does not fit."""
    from cqsa_stream.command import Command
    from cqsa_stream.planning import refuse_over_budget
    from cqsa_stream.run.inputs import refuse_other_inputs
    from cqsa_stream.run.session import planned

    found = planned(Command.of({**words, "out": out, "fresh": True}, refuse_other_inputs))
    _print(json.dumps(found.to_dict()) if as_json else found)
    refuse_over_budget(found)


@app.command()
@_with_run_options
def run(
    out: Out,
    *,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    **words: Any,
) -> None:
    """Compute OUT, a Zarr v3 array; the same command again resumes."""
    from cqsa_stream.run.stopping import Stopper

    here = Path.cwd()
    try:
        with Stopper((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), owns_process=True) as stop:
            # from here on a signal is a request to stop at the first safe point
            from cqsa_stream.command import Command
            from cqsa_stream.executors.choose import crew_of
            from cqsa_stream.observers.watching import terminal_observers
            from cqsa_stream.run.durable import compute
            from cqsa_stream.run.inputs import refuse_other_inputs

            command = Command.of({**words, "out": out}, refuse_other_inputs)
            compute(command, terminal_observers(as_json=as_json, quiet=quiet), stop, crew_of)
    except RunStopped as error:
        _say(f"{error}; the same command resumes {out}")
        sys.exit(error.exit_code)
    flushed(sys.stdout)  # events are news: the run is complete whether or not somebody reads them
    if not quiet and command.target is not None:
        where = command.target.run_dir
        _say(f"{out} is complete (run directory {where.relative_to(here) if where.is_relative_to(here) else where})")


@app.command()
def work(
    run_dir: RunDir,
    worker: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Worker I of N, from 0; by Slurm's or torchrun's variables if not given."),
    ] = None,
    device: Device = None,
    max_seconds: Annotated[float | None, typer.Option("--max-seconds", help="Stop, resumable, after so long.")] = None,
    fetch: Annotated[bool, typer.Option("--fetch", help="Fetch inputs from the URLs in the run directory.")] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Compute a part of a run that has begun, then what is left; the same command again goes on."""
    from cqsa_stream.run.stopping import Stopper

    try:
        with Stopper((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), owns_process=True) as stop:
            from cqsa_stream.command import local_path
            from cqsa_stream.observers.watching import terminal_observers
            from cqsa_stream.run.working import place_of
            from cqsa_stream.run.working import work as take_part

            observers = terminal_observers(as_json=as_json, quiet=quiet)
            place = place_of(worker, os.environ)
            take_part(local_path(run_dir), place, observers, stop, device=device, max_seconds=max_seconds, fetch=fetch)
    except RunStopped as error:
        _say(f"{error}; the same command goes on with {run_dir}")
        sys.exit(error.exit_code)
    if not quiet:
        _say(f"{run_dir} is complete")


@app.command()
def finish(run_dir: RunDir) -> None:
    """Merge what the shares of a run have completed. Exit code 3 where shares are left to compute."""
    from cqsa_stream.run.opened import open_run

    found = open_run(run_dir).finish()
    if found:
        some = ", ".join(map(str, found[:8])) + ", ..." * (len(found) > 8)
        _say(f"{run_dir}: of its shares {some} are not computed; cqsa work {run_dir} does that")
        sys.exit(RunStopped.exit_code)
    _say(f"{run_dir} is complete")


@app.command()
def bench(device: Device = None, as_json: AsJson = False) -> None:
    """Measure this machine and the disk of the current folder, so that plans tell its seconds. Under a minute."""
    from cqsa_stream.bench import measure
    from cqsa_stream.machine.device import device_of

    chosen = device_of(device or "auto")
    found = measure(chosen, Path.cwd())
    path = found.save(chosen)
    _print(found.to_json().decode().strip() if as_json else found)
    _say(f"kept in {path}")


@app.command()
def status(
    run_dir: RunDir,
    as_json: AsJson = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Again every second, until the run is complete or stops.")
    ] = False,
) -> None:
    """Say where a run stands, by what is on disk."""
    from cqsa_stream.observers.lines import status_lines
    from cqsa_stream.run.opened import open_run

    opened = open_run(run_dir)
    while watch and opened.directory.at_work():
        _show(opened.status(durable=False), as_json, status_lines)
        time.sleep(1)
    found = opened.status()
    _show(found, as_json, status_lines)
    if watch and not found["complete"]:
        _say("stopped; the same run command resumes it")


@app.command()
def verify(
    run_dir: RunDir,
    rows: Annotated[int, typer.Option(help="How many rows to compute anew.")] = 256,
    seed: Annotated[int, typer.Option()] = 0,
    fetch: Annotated[bool, typer.Option("--fetch", help="Fetch inputs from the URLs in the run directory.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check what is finished: its checksums, and sampled rows against float64. Exit code 1 where that fails.

    The tolerance bounds the worst case of one row; errors are far below it as a rule.
    """
    from cqsa_stream.observers.lines import figure_lines
    from cqsa_stream.run.opened import open_run

    found = open_run(run_dir).verify(rows=rows, seed=seed, fetch=fetch)
    _show(asdict(found), as_json, figure_lines)
    if not found.complete:
        _say("the run is incomplete: only its finished rows were checked")
    if found.not_finite_rows:
        _say(f"{found.not_finite_rows} of these rows are inf or NaN by their inputs, and so they should be")
    if not found.ok:
        damage = f"{found.damaged_rows} row chunks are not what was written: the same run command computes them again"
        wrong = "the output differs from the float64 reference beyond the tolerance"
        _say(damage if found.damaged_rows else wrong)
        sys.exit(1)
