"""What a command would do: the plan of a new run, or of what is left of one that has begun."""

import logging
from dataclasses import replace
from typing import Any

from cqsa_stream.command import Command
from cqsa_stream.engine.progress import Progress
from cqsa_stream.errors import MismatchError
from cqsa_stream.machine.surroundings import undisturbed
from cqsa_stream.options import Options
from cqsa_stream.planning import plan_run
from cqsa_stream.run.admission import refuse_differences
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.inputs import refuse_other_inputs
from cqsa_stream.run.manifest import Manifest
from cqsa_stream.run.state import State
from cqsa_stream.schedulers.plan import Begun, Plan

__all__ = ["as_begun", "going_on", "planned"]

_log = logging.getLogger(__name__)


@undisturbed()
def planned(command: Command) -> Plan:
    """Return the plan, over budget or not; nothing is read but shapes and what is on disk of the run.

    Where another run has begun, it is that of a new one. Raises InputError.
    """
    manifest = _begun(command)
    if manifest is None:
        out = None if command.target is None else command.target.out
        options = command.options.of_a_worker()
        return plan_run(command.problem, command.arrays, options, durable=out is not None, out=out)[0]
    assert command.target is not None
    directory = RunDirectory(command.target.run_dir)
    options, known = going_on(manifest, directory.state(manifest.problem), command.options)
    plan = plan_run(manifest.problem, command.arrays, options, **known)[0]
    done = Progress(manifest.problem, manifest.grid, directory.store(manifest).covers())
    begun = Begun(done.pairs_done, done.pairs_total, done.flops_done, manifest.problem.flops)
    return replace(plan, begun=begun)


def _begun(command: Command) -> Manifest | None:
    """Return what has begun where the command's run would go, if that is the same run."""
    target = command.target
    if target is None or target.fresh or not RunDirectory(target.run_dir).begun:
        return None
    directory = RunDirectory(target.run_dir)
    manifest = directory.manifest()
    try:
        refuse_other_inputs(target, command.arrays)
        refuse_differences(manifest, directory, command)
    except MismatchError as error:
        _log.warning("%s. This is the plan of a new run", error)
        return None
    return manifest


def going_on(manifest: Manifest, state: State, asked: Options) -> tuple[Options, dict[str, Any]]:
    """Return the options by which a run that has begun goes on, and what ``plan_run`` has to know of it: what the user
    did not name is as it was.
    """
    each = asked.of_a_worker() if manifest.shares > 1 else asked.of_one_process()
    options, chosen = state.inherited(each)
    return options, {"durable": True, "fixed": chosen, **as_begun(manifest, options)}


def as_begun(manifest: Manifest, options: Options) -> dict[str, Any]:
    """Return what ``plan_run`` has to know of a run that has begun."""
    known: dict[str, Any] = {"grid": manifest.grid, "out_tokens": manifest.out_tokens, "shares": manifest.shares}
    return known if manifest.chosen is None else {**known, "fixed": (manifest.chosen, options)}
