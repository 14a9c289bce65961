"""The commands that look: at a run, and at this machine."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cqsa_stream.commands.options import AsJson, Device, Fetch, RunDir
from cqsa_stream.commands.telling import print_data, say, show

__all__ = ["bench", "doctor", "report", "status", "verify"]


def status(
    run_dir: RunDir,
    as_json: AsJson = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Again every second, until the run is complete or stops.")
    ] = False,
) -> None:
    """Say where a run stands, by what is on disk.

    \b
    Examples:
      $ cqsa status out.zarr
      $ cqsa status out.zarr --watch
    """
    from cqsa_stream.observers.screen import Screen
    from cqsa_stream.observers.status_text import status_text
    from cqsa_stream.run.standing import Standing, run_place

    opened = Standing(run_place(run_dir))
    if watch:
        screen = Screen(sys.stdout)
        while opened.directory.at_work():
            found = opened.status(durable=False)
            screen.show(json.dumps(found) if as_json else status_text(found, opened.pairs()))
            screen.wait(1.0)
        screen.clear()
    found = opened.status()
    show(found, as_json, lambda found: status_text(found, opened.pairs()))
    if watch and not found["complete"]:
        say("stopped; resume with the command that began it")


def verify(
    run_dir: RunDir,
    rows: Annotated[int, typer.Option(help="How many rows to compute anew.")] = 256,
    seed: Annotated[int, typer.Option()] = 0,
    fetch: Fetch = False,
    as_json: AsJson = False,
) -> None:
    """Check what is finished: its checksums, and sampled rows against float64. Exit code 1 where that fails.

    The tolerance bounds the worst case of one row; errors are far below it as a rule.

    \b
    Example:
      $ cqsa verify out.zarr --rows 1000
    """
    from cqsa_stream.observers.status_text import verification_text
    from cqsa_stream.run.opened import open_run

    found = open_run(run_dir).verify(rows=rows, seed=seed, fetch=fetch)
    show(asdict(found), as_json, verification_text)
    if not found.complete:
        say("the run is incomplete: only its finished rows were checked")
    if found.not_finite_rows:
        say(f"{found.not_finite_rows} of these rows are inf or NaN by their inputs, and so they should be")
    if not found.ok:
        damage = f"{found.damaged_rows} row chunks are not what was written: the same run command computes them again"
        wrong = "the output differs from the float64 reference beyond the tolerance"
        say(damage if found.damaged_rows else wrong)
        sys.exit(1)


def report(
    run_dir: RunDir,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="By default RUN.report.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a page about a run, report.html, and its pictures as PNGs.

    Needs matplotlib: pip install "cqsa-stream[plot]".

    \b
    Example:
      $ cqsa report out.zarr --out report
    """
    from cqsa_stream.run.opened import open_run

    files = open_run(run_dir).report(out)
    if as_json:
        print_data(json.dumps({"page": str(files[0]), "pictures": [str(path) for path in files[1:]]}))
    else:
        print_data(files[0])


def doctor(as_json: AsJson = False) -> None:
    """Look at this machine: versions, devices, kernels, memory, disk and bus, and whether a small result is exact.

    \b
    Example:
      $ cqsa doctor
    """
    from cqsa_stream.doctor import doctor_text, examine

    found = examine(Path.cwd())
    show(found, as_json, doctor_text)
    if not found["exact"]["ok"]:
        sys.exit(1)


def bench(device: Device = None, as_json: AsJson = False) -> None:
    """Measure this machine and the disk of the current folder, so that plans tell its seconds. Under a minute.

    \b
    Example:
      $ cqsa bench
    """
    from cqsa_stream.bench import measure
    from cqsa_stream.machine.device import device_of

    chosen = device_of(device or "auto")
    found = measure(chosen, Path.cwd(), say)
    path = found.save(chosen)
    print_data(json.dumps(json.loads(found.to_json())) if as_json else found)
    say(f"kept in {path}")
