"""A session of a run, from the command to the report: admit -> hold -> plan -> take -> compute."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cqsa_stream.command import Command
from cqsa_stream.engine.loop import Engine, Job
from cqsa_stream.engine.meter import HostPeak, Meter
from cqsa_stream.engine.sinks import MemorySink, Sink
from cqsa_stream.engine.stores import NoStore, Store
from cqsa_stream.engine.timeline import Timeline
from cqsa_stream.errors import RunStopped
from cqsa_stream.events import Ended, Observer, Started
from cqsa_stream.inputs import check_inputs
from cqsa_stream.kernels.choose import fold_for, kernel_of
from cqsa_stream.kernels.contract import KernelChoice
from cqsa_stream.machine.allocator import return_small_blocks, returning_freed_memory
from cqsa_stream.machine.surroundings import undisturbed
from cqsa_stream.observers.watching import everyone
from cqsa_stream.operations.forward import Forward
from cqsa_stream.options import Options
from cqsa_stream.planning import plan_run, refuse_over_budget, refuse_what_is_not_there
from cqsa_stream.run.running_out import saying_what_ran_out
from cqsa_stream.run.state import State
from cqsa_stream.run.stopping import Stopper
from cqsa_stream.schedulers.plan import Plan
from cqsa_stream.schedulers.schedules import AUTO

__all__ = ["Session", "Workplace", "compute_in_memory"]


def compute_in_memory(
    command: Command, observers: Sequence[Observer], stop: Stopper, *, with_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return output and lse as tensors. Raises BudgetError, and RunStopped at the time limit."""
    home = InMemory(command, with_lse=with_lse)
    Session(command, home, observers, stop).run()
    return home.out, home.lse


@dataclass(frozen=True)
class Workplace:
    """Where finished rows go, partials are kept and news are written; and what does the ``work``: one engine, or what
    deals it out.
    """

    sink: Sink
    store: Store
    logs: tuple[Observer, ...] = ()
    work: Callable[[Job], None] = lambda job: Engine(job).run()


class Home(Protocol):
    """The steps of a session that depend on where the run lives, in this order. ``held``: until the session ends."""

    def surroundings(self) -> AbstractContextManager[object]:
        """Return what the whole session runs inside."""

    def admit(self, stop: Stopper) -> bool:
        """Refuse what may not be; return whether there is anything to do. Raises the errors of errors.py."""

    def hold(self, held: ExitStack) -> tuple[Options, dict[str, Any]]:
        """Return the options to plan by, and what else ``plan_run`` has to know; hold a run that has begun."""

    def take(self, plan: Plan, state: State, held: ExitStack) -> Workplace:
        """Begin the run, or go on with it, by a plan that fits."""

    def stopped(self, reason: str, stop: Stopper) -> RunStopped:
        """Return what a session that was stopped raises."""

    def close(self) -> None:
        """Look whether the result is there."""


class InMemory:
    """A run into tensors; nothing is written anywhere, and nothing is locked."""

    def __init__(self, command: Command, *, with_lse: bool) -> None:
        self._command, self._with_lse = command, with_lse

    def surroundings(self) -> AbstractContextManager[object]:
        """Return freed memory to the system only where it is counted: else the process's allocator is left alone."""
        return nullcontext() if self._command.options.host_memory is None else returning_freed_memory()

    def admit(self, _: Stopper) -> bool:
        return True

    def hold(self, _: ExitStack) -> tuple[Options, dict[str, Any]]:
        return self._command.options, {"durable": False}

    def take(self, plan: Plan, _: State, __: ExitStack) -> Workplace:
        check_inputs(self._command.arrays)
        problem = self._command.problem
        self.out = torch.empty(problem.out_shape, dtype=getattr(torch, problem.out_dtype))
        self.lse = torch.empty(problem.out_shape[:3], dtype=torch.float32) if self._with_lse else None
        sink = MemorySink([[self.lse, self.out]], [plan.grid.rows], problem.output_heads)
        return Workplace(sink, NoStore(1, problem.lanes))

    def stopped(self, reason: str, _: Stopper) -> RunStopped:
        return RunStopped(f"{reason}; nothing is kept of a run in memory: give out to be able to go on")

    def close(self) -> None:
        pass


class Session:
    """One session of a run. Those in memory and on disk are the same, with other homes."""

    def __init__(self, command: Command, home: Home, observers: Sequence[Observer], stop: Stopper) -> None:
        self.problem, self.arrays, self.options = command.problem, command.arrays, command.options
        self.home, self.observers, self.stop = home, tuple(observers), stop
        stop.limit(command.options.limit_s)

    @saying_what_ran_out()
    @undisturbed()
    def run(self) -> None:
        with self.home.surroundings():
            self.host = HostPeak()
            self.options.check(self.problem)
            try:
                if self.home.admit(self.stop):
                    with ExitStack() as held:
                        self._work(held)
            except RunStopped as stopped:
                raise self.home.stopped(str(stopped), self.stop) from None
            self.home.close()

    def _work(self, held: ExitStack) -> None:
        self.options, known = self.home.hold(held)
        self._plan(known)
        place = self.home.take(self.plan, self._state(), held)
        self._compute(place)

    def _plan(self, known: dict[str, Any]) -> None:
        """Plan as the last session did where that fits, else anew. Raises BudgetError and FullDiskError."""
        self.plan, self.device = plan_run(self.problem, self.arrays, self.options, **known)
        refuse_over_budget(self.plan)
        refuse_what_is_not_there(self.plan)
        choice = KernelChoice(self.plan.kernel, self.plan.operator)
        self.kernel = kernel_of(choice, self.device.torch, getattr(torch, self.problem.dtype))

    def _state(self) -> State:
        """Return what the next session needs of this one."""
        used = Options(
            device=str(self.device),
            device_memory=self.plan.device_allowed_bytes,
            host_memory=self.plan.host_allowed_bytes,
            schedule=self.plan.schedule,
            checkpoint_every_s=self.options.checkpoint_every_s,
            kernel=self.options.kernel or AUTO,
        )
        return State(used, self.plan.chosen, self.kernel.abilities.rounded_tiles)

    def _compute(self, place: Workplace) -> None:
        """Run the engine between the events that open and close a session."""
        problem, plan, device = self.problem, self.plan, self.device
        return_small_blocks()
        observer = everyone((*place.logs, *self.observers))
        meter = Meter(problem, plan.grid, self.arrays, place.store, place.sink, device).since(self.host)
        with self.stop, device.current():
            timeline = Timeline(device)
            habits = device.habits
            meter.timing(timeline, min(habits.reads_at_a_time, plan.layout.in_flight), habits.writers)
            job = Job(
                problem=problem,
                plan=plan,
                operation=Forward(problem, plan.layout.tile, self.kernel, fold_for(device.torch), device, timeline),
                arrays=self.arrays,
                sink=place.sink,
                store=place.store,
                device=device,
                stop=self.stop,
                observer=observer,
                meter=meter,
                checkpoint_every_s=self.options.interval_s,
                timeline=timeline,
            )
            meter.restart(place.store.covers())
            begun = meter.figures()
            predicted = plan.predicted(1 - begun.flops_done / max(1, begun.flops_total))
            observer(Started(str(problem), plan.to_dict(), begun, predicted))
            reason = "done"
            try:
                if self.options.limit_s == 0:
                    raise RunStopped("the run is begun, and nothing is computed (max_seconds=0)")
                place.work(job)
            except BaseException as error:
                reason = f"{type(error).__name__}: {error}"
                raise
            finally:
                figures = meter.figures()
                observer(Ended(reason, figures, predicted, figures.measured(), timeline.spans()))
