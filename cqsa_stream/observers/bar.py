"""A progress bar, for terminals."""

from typing import Any, TextIO

from tqdm import tqdm

from cqsa_stream.events import Ended, Event, Started
from cqsa_stream.observers.lines import rates, side_by_side

__all__ = ["ProgressBar"]


class ProgressBar:
    """A tqdm bar over pairs, for terminals."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._bar: tqdm[Any] | None = None

    def __call__(self, event: Event) -> None:
        figures = event.figures
        if isinstance(event, Started):
            print(f"cqsa: {event.problem}", file=self._file)
            self._bar = tqdm(
                total=figures.pairs_total,
                initial=figures.pairs_done,
                unit="pair",
                file=self._file,
                dynamic_ncols=True,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} pairs [{elapsed}{postfix}]",
            )
        if self._bar is None:
            return
        self._bar.set_postfix_str(rates(figures), refresh=False)
        self._bar.update(figures.pairs_done - self._bar.n)
        if isinstance(event, Ended):
            self._bar.close()
            if event.reason == "done":
                print(side_by_side(event.predicted, event.measured), file=self._file)
