"""The commands that make something: inputs, plans, results."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cqsa_stream.commands.options import AsJson, Device, Fetch, Quiet, RunDir, Verbose, with_run_options
from cqsa_stream.commands.telling import in_flags, print_data, say
from cqsa_stream.errors import InputError, RunStopped
from cqsa_stream.observers.streams import flushed
from cqsa_stream.schedulers.units import parse_duration

if TYPE_CHECKING:
    from cqsa_stream.run.stopping import Stopper

__all__ = ["finish", "generate", "plan", "run", "work"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Out = Annotated[str, typer.Argument(metavar="OUT", help="A Zarr v3 array: a local path.")]


def generate(
    directory: Annotated[str, typer.Argument(metavar="DIR")],
    tokens: Annotated[str, typer.Option(help="As 65536 or 1e9.")],
    heads: Annotated[int, typer.Option()],
    head_dim: Annotated[int, typer.Option("--head-dim")],
    kv_heads: Annotated[int | None, typer.Option("--kv-heads", help="By default as many as heads.")] = None,
    batch: Annotated[int, typer.Option()] = 1,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    seed: Annotated[int, typer.Option()] = 0,
    chunk_tokens: Annotated[
        int | None, typer.Option("--chunk-tokens", help="Tokens of a stored chunk; by default 4 MiB's worth.")
    ] = None,
    codec: Annotated[str, typer.Option(help="none, crc32c or zstd.")] = "none",
    as_json: AsJson = False,
) -> None:
    """Write normally distributed q.zarr, k.zarr and v.zarr into DIR.

    \b
    Example:
      $ cqsa generate demo --tokens 65536 --heads 4 --head-dim 64
    """
    from cqsa_stream.generate import generate as make
    from cqsa_stream.machine.places import local_path

    paths = make(
        local_path(directory), tokens=_whole("tokens", tokens), heads=heads, head_dim=head_dim, kv_heads=kv_heads,
        batch=batch, dtype=dtype, seed=seed, chunk_tokens=chunk_tokens, codec=codec,
    )  # fmt: skip
    if as_json:
        print_data(json.dumps({path.name[0]: str(path) for path in paths}))
        return
    for path in paths:
        print_data(path)


@with_run_options(optional=True)
def plan(
    out: Annotated[str | None, typer.Argument(metavar="OUT", help="Where the run would go; out.zarr.")] = None,
    *,
    shape: Annotated[
        str | None, typer.Option(metavar="B,H,N,D", help="Plan arrays that are not there yet, as 1,8,1e9,64.")
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option("--kv-heads", help="With --shape; by default as many as heads.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="With --shape; by default bfloat16.")] = None,
    as_json: AsJson = False,
    **words: Any,
) -> None:
    """Print what a run would need and take, without running it. Exit code 4 where it does not fit.

    Where OUT has begun, it is what is left of it.

    \b
    Examples:
      $ cqsa plan q.zarr k.zarr v.zarr out.zarr --causal --host-memory 8GiB
      $ cqsa plan --shape 1,8,1e9,64 --dtype bfloat16 --causal --device cpu
    """
    named = [words[name] for name in ("query", "key", "value")]
    if shape is not None:
        if any(named):
            raise InputError("shape with arrays: name Q, K and V, or --shape")
        words |= _shapes(shape, kv_heads, dtype or "bfloat16")
    elif None in named:
        raise InputError("Q, K and V are missing: name three arrays, or a --shape, as --shape 1,8,1e9,64")
    elif kv_heads is not None or dtype is not None:
        raise InputError("kv-heads or dtype without --shape: the arrays say what they are; leave it out")

    from cqsa_stream.command import Command
    from cqsa_stream.planning import refuse_over_budget
    from cqsa_stream.run.planned import planned

    if out is None:  # some output: what has begun there, if anything, is not meant
        words |= {"out": "out.zarr", "fresh": True}
    found = planned(Command.of({"out": out, **words}))
    print_data(json.dumps(found.to_dict()) if as_json else found)
    refuse_over_budget(found)


def _shapes(shape: str, kv_heads: int | None, dtype: str) -> dict[str, Any]:
    """Return what stands for arrays that are not there yet. Raises InputError, ArrayError."""
    parts = [_whole("shape", part) for part in shape.split(",")]
    if len(parts) != 4:
        raise InputError(f"shape {shape!r}; expected 4 numbers: batch, heads, tokens, head dim, as 1,8,1e9,64")

    from cqsa_stream.storage.readers.shape import Shape

    fewer = (parts[0], parts[1] if kv_heads is None else kv_heads, *parts[2:])
    return {"query": Shape(tuple(parts), dtype), "key": Shape(fewer, dtype), "value": Shape(fewer, dtype)}


def _whole(name: str, text: str) -> int:
    """Return a whole number of "65536", "65_536" or "1e9". Raises InputError."""
    with suppress(ValueError, OverflowError):
        found = float(text)
        if found.is_integer() and 0 <= found < 2**62:
            return int(text) if text.strip().isdigit() else int(found)
    raise InputError(f"{name} {text!r}; expected a whole number, as 65536 or 1e9")


@with_run_options()
def run(
    out: Out,
    *,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    **words: Any,
) -> None:
    """Compute OUT, a Zarr v3 array; the same command again resumes.

    With --json events go to stdout, an object a line, and the last line is the result.

    \b
    Examples:
      $ cqsa run q.zarr k.zarr v.zarr out.zarr --causal --host-memory 8GiB
      $ cqsa run q.npy k.npy v.npy out.zarr --layout bthd --max-seconds 55m
    """
    from cqsa_stream.observers.watching import terminal_observers

    here = Path.cwd()
    arrays = ", ".join(words[name] for name in ("query", "key", "value"))
    observers = terminal_observers(as_json=as_json, quiet=quiet, verbose=verbose, opening=arrays)
    with _stoppable(_resuming(out, words["max_seconds"]), as_json) as stop:
        from cqsa_stream.command import Command
        from cqsa_stream.executors.choose import crew_of
        from cqsa_stream.run.durable import compute
        from cqsa_stream.run.inputs import refuse_other_inputs

        command = Command.of({**words, "out": out}, refuse_other_inputs)
        compute(command, observers, stop, crew_of)
    assert command.target is not None
    where = command.target.run_dir
    shown = where.relative_to(here) if where.is_relative_to(here) else where
    _tell_of_the_end(where, f"{out} is complete (run directory {shown})", as_json=as_json, quiet=quiet)


def _resuming(out: str, max_seconds: str | None) -> str:
    """Say what goes on with a run that was stopped: where no time was allowed, the same command would do nothing."""
    with suppress(ValueError):
        if max_seconds is not None and parse_duration(max_seconds) == 0:
            return f"cqsa work {out} computes it, and so does the same command without --max-seconds"
    return f"the same command resumes {out}"


@contextmanager
def _stoppable(then: str, as_json: bool) -> Iterator["Stopper"]:
    """Take a signal as a request to stop at the first safe point; end there with its exit code, saying what then."""
    from cqsa_stream.run.stopping import Stopper

    try:
        with Stopper(_SIGNALS, owns_process=True) as stop:
            yield stop
    except RunStopped as error:
        if as_json:
            with suppress(OSError):
                print_data(json.dumps({"type": "result", "complete": False, "reason": str(error)}))
        say(f"{in_flags(str(error), of_input=False)}; {then}")
        sys.exit(error.exit_code)


def _tell_of_the_end(run_dir: Path, message: str, *, as_json: bool, quiet: bool) -> None:
    """Print the result where JSON is wanted: news, for the run is complete whether or not somebody reads it."""
    if as_json:
        with suppress(OSError):
            print_data(json.dumps(_result(run_dir)))
    flushed(sys.stdout)
    if not quiet:
        say(message)


def _result(run_dir: Path) -> dict[str, Any]:
    """Return what a run that is complete has made, and took."""
    from cqsa_stream.run.opened import open_run

    found = open_run(run_dir)
    status = found.status()
    counted = ("pairs", "rows", "tokens", "flops", "session", "elapsed", "bytes")
    return {
        "type": "result",
        "output": str(found.directory.output_path(found.manifest)),
        "lse": str(found.directory.lse_path(found.manifest)),
        "run_dir": str(run_dir.absolute()),
        "shape": list(found.manifest.problem.out_shape),
        "dtype": found.manifest.problem.out_dtype,
        "complete": status["complete"],
        "reason": "done",
        "figures": {name: status[name] for name in status if name.partition("_")[0] in counted},
        "predicted": status["predicted"],
        "measured": status["measured"],
    }


def work(
    run_dir: RunDir,
    worker: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Worker I of N, from 0; by default by Slurm's or torchrun's variables."),
    ] = None,
    device: Device = None,
    max_seconds: Annotated[
        str | None, typer.Option("--max-seconds", metavar="TIME", help="Stop, resumable, after so long: 90, 5m or 1h.")
    ] = None,
    fetch: Fetch = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compute a part of a run that has begun, then what is left; the same command again goes on.

    \b
    Examples:
      $ cqsa run q.zarr k.zarr v.zarr out.zarr --shares 64 --max-seconds 0
      $ cqsa work out.zarr --worker 0/4
    """
    from cqsa_stream.observers.watching import terminal_observers

    observers = terminal_observers(as_json=as_json, quiet=quiet, verbose=verbose, opening=run_dir)
    with _stoppable(f"the same command goes on with {run_dir}", as_json) as stop:
        from cqsa_stream.run.standing import run_place
        from cqsa_stream.run.working import place_of
        from cqsa_stream.run.working import work as take_part

        path, place = run_place(run_dir), place_of(worker, os.environ)
        take_part(path, place, observers, stop, device=device, max_seconds=max_seconds, fetch=fetch)
    _tell_of_the_end(path, f"{run_dir} is complete", as_json=as_json, quiet=quiet)


def finish(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Merge what the shares of a run have completed. Exit code 3 where shares are left to compute.

    \b
    Example:
      $ cqsa finish out.zarr
    """
    from cqsa_stream.run.opened import open_run

    found = open_run(run_dir).finish()
    if as_json:
        print_data(json.dumps({"complete": not found, "shares_left": found}))
    if found:
        some = ", ".join(map(str, found[:8])) + ", ..." * (len(found) > 8)
        say(f"{run_dir}: of its shares {some} are not computed; cqsa work {run_dir} does that")
        sys.exit(RunStopped.exit_code)
    say(f"{run_dir} is complete")
