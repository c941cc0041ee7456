"""Pictures of what was recorded. Nothing here sees a model or computes a statistic."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .stats import LabelLoad

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def domain_expert_heatmap(load: LabelLoad, path: str | os.PathLike) -> Path:
    """Draw one heatmap per sparse layer: domains down, experts across, colour and number the share of a domain's tokens.

    Args:
        load: What to draw.
        path: The PNG (or any format that matplotlib writes) to make.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = _figure(width=0.62 * load.counts.shape[2] * len(load.layers) + 2.8, height=0.42 * len(load.labels) + 1.7)
    axes = figure.subplots(1, len(load.layers), sharey=True, squeeze=False)[0]
    per_group = load.counts.shape[2] // load.num_groups
    for axis, layer, share_SE in zip(axes, load.layers, load.share, strict=True):
        image = axis.imshow(share_SE, cmap="cividis", vmin=0, vmax=1, aspect="auto")  # even in grey, and to the colour-blind
        for (row, expert), value in np.ndenumerate(share_SE):
            axis.text(
                expert, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color="w" if value < 0.6 else "k"
            )
        for boundary in range(per_group, share_SE.shape[1], per_group):
            axis.axvline(boundary - 0.5, color="w", linewidth=2)
        axis.set_title(f"layer {layer}", fontsize=10)
        axis.set_xlabel("expert (white lines part the groups)", fontsize=9)
        axis.set_xticks(range(share_SE.shape[1]))
        axis.set_yticks(range(len(load.labels)), load.labels)
        axis.tick_params(labelsize=8)
    figure.colorbar(image, ax=list(axes), label="share of the domain's tokens", fraction=0.03)
    figure.suptitle("Where each domain's tokens went (per cent)", fontsize=11)
    path = Path(path)
    figure.savefig(path, dpi=130)
    return path


CURVES = {
    "loss": "loss (without auxiliary terms)",
    "max_vio": "MaxVio since the last entry",
    "load_entropy": "load entropy (1 is even)",
    "confidence": "probability of the chosen expert",
    "pair_agreement": "pairs in the same group",
    "drift": "drift from the start (1 - cosine)",
}


def training_curves(log_history: list[dict], path: str | os.PathLike) -> Path:
    """Draw what `RouterCallback` logged, one panel per quantity and one line per sparse layer.

    Args:
        log_history: A trainer's `state.log_history`.
        path: The PNG (or any format that matplotlib writes) to make.

    Returns:
        `path`.

    Raises:
        ValueError: Nothing was logged.
        ImportError: matplotlib is missing.
    """
    series: dict[str, dict[str, list[tuple[int, float]]]] = {quantity: {} for quantity in CURVES}
    for entry in log_history:
        for key, value in entry.items():
            quantity = key.rsplit("/", 1)[-1]
            if quantity in series and (key == "loss" or key.startswith("router/")):
                line = key.split("/")[1] if key.count("/") == 2 else ""
                series[quantity].setdefault(line, []).append((entry["step"], value))
    drawn = {quantity: lines for quantity, lines in series.items() if lines}
    if not drawn:
        raise ValueError(f"{len(log_history)} log entries hold none of {sorted(CURVES)}; allowed: a log of a training run.")
    rows = -(-len(drawn) // 3)
    figure = _figure(width=12, height=3 * rows)
    axes = figure.subplots(rows, 3, squeeze=False).flatten()
    styles = ("-", "--", ":", "-.")  # told apart in grey, too
    for axis, (quantity, lines) in zip(axes, drawn.items(), strict=False):
        for number, (name, points) in enumerate(sorted(lines.items())):
            axis.plot(*zip(*points, strict=True), styles[number % len(styles)], label=name or None, linewidth=1.5)
        axis.set_title(CURVES[quantity], fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8)
        if any(lines):
            axis.legend(fontsize=8)
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    path = Path(path)
    figure.savefig(path, dpi=110)
    return path


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install hagmoe_hf[plots]") from error
    return Figure(figsize=(width, height), layout="constrained")
