"""Pictures of what the report computed: gains against pairs seen, and by domain."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

MARKERS, STYLES = "osD^vP*X<>", ("-", "--", ":", "-.")  # told apart in grey, too


class Crossover(NamedTuple):
    """Where an arm passes the dense parent, or falls behind it, for good."""

    pairs: int  # seen until then
    is_ahead: bool


def gain_curves(
    curves: dict[str, list[tuple[int, float]]], crossovers: dict[str, Crossover | None], title: str, path: Path
) -> None:
    """Draw one line per arm; a crossover is a ring around its point, or a square where the arm falls behind.

    Args:
        curves: Arm -> (pairs seen, gain over the dense parent).
        crossovers: Arm -> its crossover, if there is one.
        title: Of the picture.
        path: The PNG to make.
    """
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color="0.4", linewidth=1)
    for number, (name, points) in enumerate(curves.items()):
        pairs, gains = zip(*points, strict=True)
        colour = colormaps["cividis"](number / max(1, len(curves) - 1))
        style = STYLES[number % len(STYLES)]
        axis.plot(pairs, gains, style, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=4, label=name)
        if cross := crossovers[name]:
            ring = "o" if cross.is_ahead else "s"
            axis.plot(cross.pairs, dict(points)[cross.pairs], ring, color=colour, markersize=13, fillstyle="none")
    marks = "a ring marks where an arm passes the dense parent for good, a square where it falls behind"
    axis.set_xlabel(f"pairs seen ({marks})", fontsize=9)
    axis.set_ylabel("gain over the equally trained dense parent\n(held-out macro MRR, points)", fontsize=9)
    axis.set_title(title, fontsize=11)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def group_bars(bars: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """Draw a group of bars for each domain, a bar for each arm.

    Args:
        bars: Arm -> domain -> gain over the dense parent.
        title: Of the picture.
        path: The PNG to make.
    """
    domains = list(next(iter(bars.values())))
    figure = Figure(figsize=(max(8, 0.16 * len(domains) * len(bars) + 3), 4.8), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(bars)
    for number, (name, gains) in enumerate(bars.items()):
        colour = colormaps["cividis"](number / max(1, len(bars) - 1))
        place = np.arange(len(domains)) - 0.4 + width * (number + 0.5)
        axis.bar(place, [gains[domain] for domain in domains], width, color=colour, label=name)
    axis.axhline(0, color="0.4", linewidth=1)
    axis.set_xticks(range(len(domains)), domains, rotation=35, ha="right", fontsize=8)
    axis.set_ylabel("gain over the dense parent (points)", fontsize=9)
    axis.set_title(title, fontsize=11)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
