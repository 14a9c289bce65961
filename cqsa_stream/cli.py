"""The command line: ``cqsa generate | plan | run | work | finish | status | verify | report | doctor | bench``.

Data goes to stdout, messages and progress to stderr. Exit codes: 0 done; 1 failed; 2 bad usage or input; 3 stopped and
resumable; 4 over budget; 5 locked; 6 another problem or other inputs; 130 Ctrl-C (resumable).
"""

import logging
import sys
from typing import Annotated

import typer

import cqsa_stream
from cqsa_stream.commands import computing, looking
from cqsa_stream.commands.telling import Messages, in_flags, print_data, say
from cqsa_stream.errors import InputError, RunInterrupted
from cqsa_stream.observers.streams import flushed, stand_in_for_what_is_closed

__all__ = ["main"]

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, context_settings={"max_content_width": 100})


@app.callback(invoke_without_command=True)
def cqsa(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Exact attention over sequences on disk, within a memory budget, resumable.

    \b
    Begin with:
      $ cqsa generate demo --tokens 65536 --heads 4 --head-dim 64
      $ cqsa plan demo/q.zarr demo/k.zarr demo/v.zarr --causal
      $ cqsa run demo/q.zarr demo/k.zarr demo/v.zarr demo/out.zarr --causal
    """
    if version:
        print_data(f"cqsa-stream {cqsa_stream.__version__}")
    elif context.invoked_subcommand is None:
        print_data(context.get_help())


for command in (
    computing.generate, computing.plan, computing.run, computing.work, computing.finish,
    looking.status, looking.verify, looking.report, looking.doctor, looking.bench,
):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Run the command line; every expected error becomes one line and its exit code."""
    stand_in_for_what_is_closed()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Messages())
    logging.basicConfig(handlers=[handler])
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
        text = " ".join((usage() if usage else str(error) or type(error).__name__).split())
        say(in_flags(text, of_input=isinstance(error, InputError)))
    if not flushed(sys.stdout) and code == 0:
        say("what was printed could not be written to stdout")
        code = 1
    flushed(sys.stderr)
    sys.exit(code)


def _exit_code(error: Exception) -> int | None:
    """Return the exit code of an expected error, None for a defect."""
    if isinstance(error, typer.Abort):
        return RunInterrupted.exit_code
    code: int | None = getattr(error, "exit_code", None)  # ours, and the parser's
    return 1 if code is None and isinstance(error, OSError | MemoryError) else code
