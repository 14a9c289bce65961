"""A progress bar, for terminals and notebooks."""

from typing import Any, TextIO

from tqdm import tqdm

from cqsa_stream.events import Ended, Event, Figures, Started
from cqsa_stream.observers.lines import begun_lines, progress_parts, share_text, side_by_side, stages_text

__all__ = ["ProgressBar"]

_LEAST_BAR, _WIDE = 10, 100  # columns


class ProgressBar:
    """A bar of tqdm's over the work, in floating-point operations; on wide terminals a second line says what limits.

    ``kind``: ``tqdm``, or a class like it, as ``tqdm.auto.tqdm``.
    """

    def __init__(self, file: TextIO, kind: type[Any] = tqdm, *, verbose: bool = False) -> None:
        self._file, self._kind, self._verbose = file, _with_words(kind), verbose
        self._bar: Any = None
        self._below: Any = None

    def opening(self, what: str) -> None:
        """Say that a run is being opened."""
        self._say(f"opening {what}")

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            for line in begun_lines(event, verbose=self._verbose):
                self._say(line)
            self._begin(event.figures)
        if self._bar is None:
            return
        self._draw(event.figures)
        if isinstance(event, Ended):
            self._end()
            if self._verbose and stages_text(event.figures):
                self._say(stages_text(event.figures))
            if event.reason == "done":
                print(side_by_side(event.predicted, event.measured), file=self._file)

    def _say(self, text: str) -> None:
        print(f"cqsa: {text}", file=self._file, flush=True)

    def _begin(self, figures: Figures) -> None:
        self._bar = self._kind(
            total=max(1, figures.flops_total),
            initial=figures.flops_done,
            file=self._file,
            dynamic_ncols=True,
            bar_format="{left}{bar}{right}",
            mininterval=0,
        )
        if (self._bar.format_dict["ncols"] or 0) >= _WIDE:
            self._below = self._kind(
                file=self._file, dynamic_ncols=True, bar_format="{left}", position=1, leave=False, mininterval=0
            )

    def _draw(self, figures: Figures) -> None:
        self._bar.n = figures.flops_done
        self._bar.words = f"{share_text(figures)} ", progress_parts(figures)
        self._bar.refresh()
        if self._below is not None:
            self._below.words = f"      {stages_text(figures)}", []
            self._below.refresh()

    def _end(self) -> None:
        if self._below is not None:
            self._below.close()
        self._bar.close()
        self._bar = self._below = None


def _with_words(kind: type[Any]) -> type[Any]:
    """Return a bar with words of ours beside it: those that the width has no room for are left out."""

    class Bar(kind):  # type: ignore[misc]
        words: tuple[str, list[str]] = ("", [])

        @property
        def format_dict(self) -> dict[str, Any]:
            found: dict[str, Any] = super().format_dict
            left, parts = self.words
            room = (found["ncols"] or 80) - len(left) - _LEAST_BAR
            while len(parts) > 1 and len("  " + "   ".join(parts)) > room:
                parts = parts[:-1]
            found.update(left=left, right="  " + "   ".join(parts) if parts else "")
            return found

    return Bar
