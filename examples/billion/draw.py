"""Draw what the logs of this folder's scripts say: docs/billion/fit.svg and docs/billion/slice.svg.

    python examples/billion/draw.py [docs/billion]

Needs matplotlib: pip install "cqsa-stream[plot]".
"""

import json
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from full import SECONDS_A_DAY, fit

mpl.use("svg")
from matplotlib import pyplot as plt

TO = 10**9
INK = {"cpu": "#2f6ea5", "h200": "#a8413a"}
NAMES = {"cpu": "2 cores", "h200": "one H200"}


def draw_fit(folder: Path) -> None:
    """Draw measured seconds against tokens, the line through them, and where it ends at a billion tokens."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for machine, ink in INK.items():
        found = json.loads((folder / f"full-{machine}/figures.json").read_text())
        times = {int(name.split("_")[1]): min(took) for name, took in found.items() if name.startswith("seconds_")}
        tokens, seconds = list(times), list(times.values())
        a, c, b = fit(tokens, seconds)[0]
        line = np.geomspace(min(tokens), TO, 200)
        axes.plot(line, a + c * line + b * line**2, color=ink, linewidth=1, linestyle="--")
        axes.plot(tokens, seconds, "o", color=ink, label=f"{NAMES[machine]}: measured, and the line through it")
        days = found["days_planned"]
        axes.plot([TO], [days * SECONDS_A_DAY], "x", color=ink, label=f"{NAMES[machine]}: the plan, {days:,.1f} days")
    axes.set(xscale="log", yscale="log", xlabel="tokens (causal, one head of 64)", ylabel="seconds")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "fit.svg", metadata={"Date": None})


def draw_slice(folder: Path) -> None:
    """Draw the pairs done by the seconds that a slice's sessions worked; what a kill took is done again."""
    figure, axes = plt.subplots(figsize=(7, 3))
    events = [json.loads(line) for line in (folder / "slice-cpu/events.jsonl").read_text().splitlines()]
    before, number, points = 0.0, 0, [[]]
    for event in (event for event in events if "pairs_done" in event):
        if event["event"] == "started" and points[-1]:
            before, number = before + points[-1][-1][0], number + 1
            points.append([])
        points[-1].append((event["session_s"], 100 * event["pairs_done"] / event["pairs_total"]))
    start = 0.0
    for index, session in enumerate(points):
        seconds, share = np.array(session).T
        axes.plot((start + seconds) / 60, share, color="#2f6ea5")
        start += seconds[-1]
        if index < len(points) - 1:
            axes.axvline(start / 60, color="#a8413a", linewidth=1, label="killed" if index == 0 else None)
    axes.set(xlabel="minutes of work", ylabel="pairs done, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "slice.svg", metadata={"Date": None})


if __name__ == "__main__":
    mpl.rcParams["svg.hashsalt"] = "cqsa"
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/billion")
    draw_fit(place)
    draw_slice(place)
