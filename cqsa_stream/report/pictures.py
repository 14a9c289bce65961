"""The pictures of a report, each with the words for those who cannot see it. No other file imports matplotlib."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from cqsa_stream.report.story import Story
from cqsa_stream.schedulers.units import amount_text, duration_text, size_text

__all__ = ["Picture", "pictures"]

_INK, _PALE = "#1a1a1a", "#d9d9d9"
_COLORS = {  # told apart also without colour vision (Okabe and Ito)
    "compute": "#0072b2", "bus": "#e69f00", "disk reads": "#009e73", "disk writes": "#d55e00",
    "kernel": "#0072b2", "copy": "#e69f00", "read": "#009e73", "write": "#d55e00", "commit": "#cc79a7",
    "wait": "#999999",
}  # fmt: skip
_KINDS = ("read", "wait", "copy", "kernel", "write", "commit")
_MIB = 2.0**20


@dataclass(frozen=True)
class Picture:
    """``png``: the file's content; ``alt``: what it shows, in words."""

    name: str
    title: str
    alt: str
    png: bytes


def pictures(story: Story) -> list[Picture]:
    """Draw all that there is to draw of a run."""
    made = [_pairs(story)]
    if story.samples:
        made += [_memory(story), _throughput(story)]
    if story.spans:
        made.append(_timeline(story))
    if story.status["predicted"]:
        made.append(_predicted(story))
    return made


def _drawn(name: str, title: str, alt: str, draw: Callable[[Figure], None], height: float = 3.4) -> Picture:
    with mpl.rc_context({"font.size": 11, "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK}):
        figure = Figure(figsize=(8, height), dpi=120, layout="constrained")
        draw(figure)
        figure.suptitle(title, fontsize=12)
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return Picture(name, title, alt, file.getvalue())


def _pairs(story: Story) -> Picture:
    status = story.status
    done = f"{status['pairs_done']:,} of {status['pairs_total']:,} pairs are done"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        cells = [[-1.0 if part is None else part for part in row] for row in story.pairs]
        shades = ["#ffffff", _PALE, "#a9c9e0", "#6aa6cf", _COLORS["compute"]]
        levels = [
            [0 if part < 0 else 1 if part == 0 else 4 if part == 1 else 2 + int(part * 2) for part in row]
            for row in cells
        ]
        axes.imshow(levels, cmap=ListedColormap(shades), vmin=-0.5, vmax=4.5, interpolation="nearest", aspect="equal")
        axes.set_xlabel("key chunks")
        axes.set_ylabel("query chunks")
        axes.set_xticks([])
        axes.set_yticks([])
        for shade, label in (
            (shades[4], "done"),
            (shades[2], "in part"),
            (shades[1], "to do"),
            (shades[0], "not needed"),
        ):
            axes.plot([], [], "s", color=shade, markeredgecolor=_INK, markeredgewidth=0.5, label=label)
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)

    alt = f"Map of the pairs of query chunks (down) and key chunks (across): {done}."
    return _drawn("pairs", "Pairs", alt, draw, 4.2)


def _memory(story: Story) -> Picture:
    status = story.status
    peak, allowed, planned = (
        status[name] for name in ("host_peak_bytes", "host_allowed_bytes", "host_projected_bytes")
    )

    def draw(figure: Figure) -> None:
        axes = _over_time(figure, story, "MiB of host memory")
        axes.plot(_seconds(story), [s.host_bytes / _MIB for s in story.samples], color=_COLORS["compute"], label="peak")
        for level, label, line in ((allowed, "budget", "-"), (planned, "planned", "--")):
            if level:
                axes.axhline(level / _MIB, color=_INK, linestyle=line, linewidth=1, label=label)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, loc="lower right")

    budget = f"; the budget is {size_text(allowed)}, the plan {size_text(planned)}" if allowed else ""
    return _drawn("memory", "Memory against the budget", f"Host memory peaked at {size_text(peak)}{budget}.", draw)


def _throughput(story: Story) -> Picture:
    last = story.samples[-1]
    mean = story.status["session_flops"] / max(last.seconds, 1e-9)

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True)
        rate = [s.flops_per_s for s in story.samples]
        scale, unit = _unit(max(rate, default=1.0))
        _stairs(above, story, [r / scale for r in rate], "compute")
        above.set_ylabel(f"{unit}FLOP/s")
        above.set_ylim(bottom=0)
        for stage in story.samples[0].busy:
            _stairs(below, story, [100 * s.busy[stage] for s in story.samples], stage)
        below.set_ylabel("% of the time busy")
        below.set_xlabel("seconds of the last session")
        below.set_ylim(0, 105)
        below.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.25), fontsize=9)

    alt = f"Computing went at {amount_text(mean, 'FLOP/s')} on average; below, how busy each stage was over time."
    return _drawn("throughput", "Throughput by stage", alt, draw, 4.6)


def _timeline(story: Story) -> Picture:
    shown = max(span.stop_s for span in story.spans)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for level, kind in enumerate(_KINDS):
            bars = [(s.start_s, s.stop_s - s.start_s) for s in story.spans if s.kind == kind]
            axes.broken_barh(bars, (level - 0.4, 0.8), color=_COLORS[kind])
        axes.set_yticks(range(len(_KINDS)), [kind.replace("kernel", "compute") for kind in _KINDS])
        axes.set_ylim(len(_KINDS) - 0.5, -0.5)
        axes.set_xlabel("seconds of the last session")

    busy = {kind: sum(s.stop_s - s.start_s for s in story.spans if s.kind == kind) for kind in _KINDS}
    said = ", ".join(f"{kind} {duration_text(seconds)}" for kind, seconds in busy.items() if seconds > 0)
    alt = f"What the threads and the device did in the first {duration_text(shown)}: {said}."
    return _drawn("timeline", "Timeline", alt, draw)


def _predicted(story: Story) -> Picture:
    predicted, measured = story.status["predicted"], story.status["measured"]
    names = [name for name in predicted if predicted[name]]
    shares = [100 * measured[name] / predicted[name] for name in names]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        labels = [name.replace("_", " ") for name in names]
        bars = axes.barh(labels, shares, color=_COLORS["compute"], height=0.6)
        axes.bar_label(bars, [f"{share:.0f} %" for share in shares], padding=4)
        axes.axvline(100, color=_INK, linewidth=1)
        axes.set_xlim(0, max([*shares, 100]) * 1.15)
        axes.set_xlabel("measured, in % of what was predicted")
        axes.invert_yaxis()

    said = ", ".join(f"{name.replace('_', ' ')} {share:.0f} %" for name, share in zip(names, shares, strict=True))
    return _drawn("predicted", "Predicted beside measured", f"Measured in percent of predicted: {said}.", draw, 2.8)


def _over_time(figure: Figure, story: Story, label: str) -> Axes:
    axes = figure.subplots()
    axes.set_xlabel("seconds of the last session")
    axes.set_ylabel(label)
    axes.set_xlim(0, story.samples[-1].seconds)
    return axes


def _stairs(axes: Axes, story: Story, values: list[float], stage: str) -> None:
    """Draw what was between each two moments."""
    axes.step([0.0, *_seconds(story)], [values[0], *values], where="pre", color=_COLORS[stage], label=stage)


def _seconds(story: Story) -> list[float]:
    return [sample.seconds for sample in story.samples]


def _unit(most: float) -> tuple[float, str]:
    for scale, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if most >= scale:
            return scale, unit
    return 1.0, ""
