"""Pictures of what was recorded. Nothing here sees a model or computes a statistic.

Readable in grey and to the colour-blind: maps run from dark to light (cividis), cells carry their numbers, lines differ in
dashes, dots in shape, and an expert's colour always comes with its number.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files import write_figure
from .stats import LabelLoad

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .probes import TokenView

# Okabe and Ito's colours for all kinds of sight, with light grey for black; light and dark take turns, for print in grey
COLOURS = ("#E69F00", "#0072B2", "#56B4E9", "#D55E00", "#F0E442", "#009E73", "#DDDDDD", "#CC79A7")
LIGHT, DARK = COLOURS[2], COLOURS[1]
MARKERS = "os^DvP*X<>hp8d"
DASHES = ("-", "--", ":", "-.")
MAX_LABELS = 24  # rows of a heatmap and entries of a legend; of more the largest are drawn
MAX_WIDTH = 13.0  # inches: what is wider is too small to read on a page
MAX_TOKENS = 64  # of a sentence that is drawn token by token


def label_expert_heatmap(load: LabelLoad, path: str | os.PathLike) -> Path:
    """Draw one heatmap per sparse layer: labels down, experts across, colour and number the share of a label's tokens.

    Args:
        load: What to draw; of more than `MAX_LABELS` labels those with the most tokens.
        path: The PNG (or any format that matplotlib writes) to make.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is missing.
    """
    most = np.sort(np.argsort(-load.counts[0].sum(axis=-1), kind="stable")[:MAX_LABELS])
    labels = [load.labels[row] for row in most]
    num_experts = load.counts.shape[2]
    panel, names = 0.46 * num_experts + 0.3, 0.085 * max(map(len, labels))
    across, down = _grid(len(load.layers), panel)
    figure = _figure(width=panel * across + names + 1.4, height=(0.34 * len(labels) + 0.8) * down + 0.8)
    axes = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    per_group = num_experts // load.num_groups
    shares = 100 * load.share[:, most]
    high = max(float(shares.max()), 200 / num_experts)  # an even load is not drawn as if it were a lot
    for axis, layer, share_CE in zip(axes, load.layers, shares, strict=False):
        image = _heatmap(axis, share_CE, ".0f", 0, high)
        for boundary in range(per_group, num_experts if load.num_groups > 1 else 0, per_group):
            axis.axvline(boundary - 0.5, color="w", linewidth=2.5)
        axis.set_title(f"layer {layer}", fontsize=10)
        axis.set_xlabel("expert" + (" (lines part the groups)" if load.num_groups > 1 else ""), fontsize=9)
        axis.set_xticks(range(num_experts))
        axis.set_yticks(range(len(labels)), labels)
    for axis in axes[len(load.layers) :]:
        axis.set_visible(False)
    figure.colorbar(image, ax=list(axes[: len(load.layers)]), label="% of the tokens", fraction=0.03)
    figure.suptitle(f"Where each {load.kind}'s tokens went (per cent)", fontsize=11)
    return _save(figure, path)


def load_bars(counts: np.ndarray, layers: Sequence[int], num_groups: int, path: str | os.PathLike) -> Path:
    """Draw each expert's share of the choices, one panel per sparse layer, with the line on which all would be even.

    Args:
        counts: (S, E) choices.
        layers: (S,) layer indices.
        num_groups: Expert groups, whose bars take turns in shade.
        path: The file to make.

    Returns:
        `path`.
    """
    share_SE = np.asarray(counts) / np.sum(counts, axis=1, keepdims=True)
    num_experts = share_SE.shape[1]
    panel = max(0.36 * num_experts + 1, 2.6)
    columns, rows = _grid(len(layers), panel)
    figure = _figure(width=panel * columns + 0.6, height=2.3 * rows + 0.7)
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axis, layer, share_E in zip(axes, layers, share_SE, strict=False):
        for expert, value in enumerate(share_E):
            group = expert * num_groups // num_experts
            axis.bar(expert, 100 * value, color=DARK if group % 2 else LIGHT, edgecolor="k", linewidth=0.5)
        axis.axhline(100 / num_experts, color="k", linestyle="--", linewidth=1.2)
        axis.set_title(f"layer {layer}", fontsize=10)
        axis.set_xlabel("expert" + (" (shade: group)" if num_groups > 1 else ""), fontsize=9)
        axis.set_xticks(range(num_experts))
        axis.tick_params(labelsize=8)
    for axis in axes[::columns]:
        axis.set_ylabel("% of choices", fontsize=9)
    for axis in axes[len(layers) :]:
        axis.set_visible(False)
    figure.suptitle("Load of the experts; dashed: all even", fontsize=11)
    return _save(figure, path)


def matrix_heatmaps(
    matrices: Sequence[np.ndarray],
    titles: Sequence[str],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    headline: str,
    path: str | os.PathLike,
    scale: tuple[float, float] | None = None,
) -> Path:
    """Draw matrices of one kind side by side, on one scale, their numbers in the cells.

    Args:
        matrices: Each (len(rows), len(columns)).
        titles: One per matrix.
        rows: Names.
        columns: Names.
        label: What the colour says.
        headline: What all of it shows.
        path: The file to make.
        scale: The darkest and the lightest value; from 0, or the smallest below it, to the largest where None.

    Returns:
        `path`.
    """
    tall = 0.09 * max(map(len, columns)) + 0.2 if max(map(len, columns)) > 3 else 0.3
    wide = 0.085 * max(map(len, rows))
    panel = 0.44 * len(columns) + wide + 0.5
    across, down = _grid(len(matrices), panel)
    figure = _figure(
        width=max(panel * across + 1.2, 4.5),
        height=(0.34 * len(rows) + tall + 0.5) * down + 0.7,
    )
    axes = figure.subplots(down, across, squeeze=False).flatten()
    if scale is None:
        low, high = min(0.0, *(np.min(matrix) for matrix in matrices)), max(np.max(matrix) for matrix in matrices)
        scale = low, high if high > low else low + 1
    for axis, matrix, title in zip(axes, matrices, titles, strict=False):
        image = _heatmap(axis, np.asarray(matrix), ".2f", *scale)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(columns)), columns, rotation=90 if tall > 0.3 else 0)
        axis.set_yticks(range(len(rows)), rows)
    for axis in axes[len(matrices) :]:
        axis.set_visible(False)
    figure.colorbar(image, ax=list(axes[: len(matrices)]), label=label, fraction=0.03)
    figure.suptitle(headline, fontsize=11)
    return _save(figure, path)


def information_bars(
    bits: Mapping[str, Sequence[tuple[float, float, float]]], layers: Sequence[int], path: str | os.PathLike
) -> Path:
    """Draw how much each label says about the choice, beside what shuffled labels say.

    Args:
        bits: Name -> for each sparse layer the bits, the shuffled labels' mean, and their largest.
        layers: (S,) layer indices.
        path: The file to make.

    Returns:
        `path`.
    """
    figure = _figure(width=max(2.2 * len(bits), 5), height=3.2)
    axes = figure.subplots(1, len(bits), squeeze=False)[0]
    for axis, (name, values) in zip(axes, bits.items(), strict=True):
        real, mean, highest = np.array(values).T
        at = np.arange(len(layers))
        axis.bar(at - 0.2, real, 0.4, color=DARK, edgecolor="k", linewidth=0.5, label="as it is")
        axis.bar(
            at + 0.2,
            mean,
            0.4,
            yerr=[np.zeros_like(mean), np.maximum(highest - mean, 0)],
            capsize=3,
            color="w",
            hatch="///",
            edgecolor="k",
            linewidth=0.5,
            label="shuffled: mean, largest",
        )
        axis.set_title(name, fontsize=10)
        axis.set_xticks(at, [str(layer) for layer in layers])
        axis.set_xlabel("layer", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("bits", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    figure.suptitle("What a choice says, and what shuffled labels would", fontsize=11)
    return _save(figure, path)


def saturation_curves(shares: np.ndarray, names: Sequence[str], layers: Sequence[int], path: str | os.PathLike) -> Path:
    """Draw the share of the last checkpoint's choices that earlier ones made already.

    Args:
        shares: (checkpoints, S), in [0, 1].
        names: Of the checkpoints, in time.
        layers: (S,) layer indices.
        path: The file to make.

    Returns:
        `path`.
    """
    figure = _figure(width=max(0.8 * len(names), 5), height=3.4 + 0.05 * max(map(len, names)))
    axis = figure.subplots()
    for number, (layer, values) in enumerate(zip(layers, np.asarray(shares).T, strict=True)):
        axis.plot(
            values,
            DASHES[number % 4],
            marker=MARKERS[number % len(MARKERS)],
            color=COLOURS[(1 + number) % len(COLOURS)],
            label=f"layer {layer}",
        )
    axis.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 6 else 0)
    axis.set_ylim(0, 1.05)
    axis.set_ylabel("choices already as in the end", fontsize=9)
    axis.tick_params(labelsize=8)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.suptitle("Router saturation", fontsize=11)
    return _save(figure, path)


def text_maps(places: np.ndarray, colourings: dict[str, Sequence[str]], path: str | os.PathLike) -> Path:
    """Draw the same map of texts once for each way of colouring it, side by side.

    Args:
        places: (N, 2).
        colourings: Title -> N names; of more than `MAX_LABELS` names the rest is grey.
        path: The file to make.

    Returns:
        `path`.
    """
    longest = max(len(name) for names in colourings.values() for name in names)
    most = max(min(len(set(names)), MAX_LABELS) for names in colourings.values())
    columns = max(int(4.6 / (0.085 * longest + 0.4)), 1)
    legend = 0.19 * (-(-most // columns)) + 0.3
    figure = _figure(width=4.8 * len(colourings) + 0.2, height=4.6 + legend)
    axes = figure.subplots(1, len(colourings), squeeze=False)[0]
    for axis, (title, names) in zip(axes, colourings.items(), strict=True):
        array = np.asarray(names)
        unique, sizes = np.unique(array, return_counts=True)
        shown = sorted(unique[np.argsort(-sizes, kind="stable")[:MAX_LABELS]])
        rest = ~np.isin(array, shown)
        axis.scatter(*places[rest].T, s=8, color="#dddddd", marker=".")
        for number, name in enumerate(shown):
            axis.scatter(
                *places[array == name].T,
                s=20,
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                edgecolors="k",
                linewidths=0.3,
                label=name,
            )
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=columns, fontsize=8, frameon=False, handletextpad=0.2
        )
    figure.suptitle("Sentence vectors, t-SNE", fontsize=11)
    return _save(figure, path)


def token_experts(view: "TokenView", layers: Sequence[int], path: str | os.PathLike) -> Path:
    """Draw a sentence token by token, each in the colour and with the number of its expert, once per sparse layer.

    Args:
        view: The sentence; at most `MAX_TOKENS` tokens are drawn.
        layers: (S,) layer indices.
        path: The file to make.

    Returns:
        `path`.
    """
    titles = [f"layer {layer}: each token's expert" for layer in layers]
    faces = [[COLOURS[int(expert) % len(COLOURS)] for expert in experts] for experts in view.expert_index]
    notes = [[str(expert) for expert in experts] for experts in view.expert_index]
    return _sentence(view.tokens, titles, faces, notes, path)


def gate_weights(view: "TokenView", layers: Sequence[int], path: str | os.PathLike) -> Path:
    """Draw what the attention gate weighs a sentence's tokens with, once per sparse layer; 1 is the even share.

    Args:
        view: The sentence, with gate weights; at most `MAX_TOKENS` tokens are drawn.
        layers: (S,) layer indices.
        path: The file to make.

    Returns:
        `path`.

    Raises:
        ValueError: There are no gate weights.
    """
    if view.gate_weight is None:
        raise ValueError("gate_weight=None: this router opens groups without an attention gate; allowed: gate weights.")
    import matplotlib

    relative = view.gate_weight * len(view.tokens)
    top = max(float(relative.max()), 2.0)
    titles = [f"layer {layer}: weight in the attention gate, in even shares (light is much)" for layer in layers]
    faces = [[matplotlib.colormaps["cividis"](weight / top) for weight in weights] for weights in relative]
    notes = [[f"{weight:.2f}" for weight in weights] for weights in relative]
    return _sentence(view.tokens, titles, faces, notes, path)


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
    for axis, (quantity, lines) in zip(axes, drawn.items(), strict=False):
        for number, (name, points) in enumerate(sorted(lines.items())):
            axis.plot(*zip(*points, strict=True), DASHES[number % len(DASHES)], label=name or None, linewidth=1.5)
        axis.set_title(CURVES[quantity], fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8)
        if any(lines):
            axis.legend(fontsize=8)
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    return _save(figure, path)


def _grid(count: int, width: float) -> tuple[int, int]:
    """Columns and rows for `count` panels of `width` inches, so that the picture stays readable on a page."""
    across = min(count, 3, max(int(MAX_WIDTH / width), 1))
    return across, -(-count // across)


def _heatmap(axis: "Axes", matrix: np.ndarray, spec: str, low: float, high: float):
    """Cells with their numbers, in ink that shows on the cell."""
    image = axis.imshow(matrix, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    for (row, column), value in np.ndenumerate(matrix):
        ink = "w" if (value - low) / (high - low) < 0.6 else "k"
        axis.text(column, row, format(value, spec), ha="center", va="center", fontsize=7, color=ink)
    axis.tick_params(labelsize=8)
    return image


def _drawable(token: str) -> str:
    """A piece as people know it: a leading blank is a low line, and what the font lacks stays a box."""
    return token.replace("\u0120", "_").replace("\u2581", "_")


def _sentence(
    tokens: Sequence[str],
    titles: Sequence[str],
    faces: Sequence[Sequence],
    notes: Sequence[Sequence[str]],
    path: str | os.PathLike,
) -> Path:
    """A sentence as boxes that flow over lines, once per title; each token has a face colour and a note below it."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    figure = _figure(width=10, height=1)
    pieces = [_drawable(token) for token in tokens[:MAX_TOKENS]]
    boxes, lines = _lay_out(pieces, width=100.0)
    figure.set_figheight((0.52 * lines + 0.45) * len(titles) + 0.2)
    for axis, title, face_T, note_T in zip(
        figure.subplots(len(titles), 1, squeeze=False)[:, 0], titles, faces, notes, strict=True
    ):
        for piece, face, note, (left, line, width) in zip(pieces, face_T, note_T, boxes, strict=False):
            axis.add_patch(Rectangle((left, line + 0.06), width, 0.88, facecolor=face, edgecolor="k", linewidth=0.4))
            ink = "k" if np.dot(to_rgb(face), (0.299, 0.587, 0.114)) > 0.45 else "w"
            style = {"ha": "center", "va": "center", "color": ink, "parse_math": False}
            axis.text(left + width / 2, line + 0.36, piece, family="monospace", fontsize=8, **style)
            axis.text(left + width / 2, line + 0.76, note, fontsize=6.5, **style)
        axis.set_xlim(0, 100)
        axis.set_ylim(lines, 0)
        axis.axis("off")
        axis.set_title(title, fontsize=9, loc="left")
    return _save(figure, path)


def _lay_out(pieces: Sequence[str], width: float) -> tuple[list[tuple[float, int, float]], int]:
    """(left, line, width) of each piece's box, and the lines needed, in units of a hundredth of the picture's width."""
    boxes, left, line = [], 0.0, 0
    for piece in pieces:
        size = min(0.95 * max(len(piece), 3) + 1.2, width)
        if left + size > width:
            left, line = 0.0, line + 1
        boxes.append((left, line, size))
        left += size + 0.3
    return boxes, line + 1


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install hagmoe_hf[plots]") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: str | os.PathLike) -> Path:
    with warnings.catch_warnings():
        # What the font lacks is drawn as a box: one look tells more than a warning for every sign
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        return write_figure(figure, path, dpi=130)
