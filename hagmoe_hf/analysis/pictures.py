"""What is drawn of a trace and its numbers, section by section, in the order of the page."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import plots
from .probes import TokenView
from .summary import KINDS, Summary, sample_rows, text_groups, text_map
from .texts import label_ids
from .trace import Trace, label_load

EXAMPLES = 3  # sentences that are drawn token by token
EXAMPLE_TOKENS = range(8, 49)  # how long these are, in tokens, where there are such

Picture = tuple[str, str]  # file name, caption
Section = tuple[str, list[Picture]]  # headline, pictures


def draw(
    trace: Trace,
    summary: Summary,
    views: Sequence[TokenView],
    folder: Path,
    *,
    seed: int = 0,
    training_log: list[dict] | None = None,
) -> list[Section]:
    """Draw everything that there is something to draw of.

    Args:
        trace: What was recorded.
        summary: Its numbers, as `analyze` makes them.
        views: Of `example_texts`.
        folder: Where the pictures go, as PNG files.
        seed: Of the map.
        training_log: What a trainer logged; None where nothing was.

    Returns:
        Headlines, each with its pictures.
    """
    return [
        *_load(trace, summary, folder),
        *_labels(trace, summary, folder),
        *_information(trace, summary, folder),
        *_map(trace, summary, folder, seed),
        *_sentences(trace, views, folder),
        *_experts(trace, summary, folder),
        *_training(trace, summary, folder, training_log),
    ]


def example_texts(trace: Trace) -> list[str]:
    """A few texts to draw token by token: short enough to read, of different labels where there are labels."""
    lengths = np.diff(trace.text_start)
    labels = trace.texts.domains or trace.texts.languages or tuple("" for _ in lengths)
    _, ids = label_ids(labels)
    readable = [row for row in range(len(lengths)) if lengths[row] in EXAMPLE_TOKENS] or [int(lengths.argmin())]
    chosen: dict[int, int] = {}
    for row in readable:
        chosen.setdefault(int(ids[row]), row)
    rows = [*chosen.values(), *(row for row in readable if row not in chosen.values())][:EXAMPLES]
    return [trace.texts.texts[row] for row in rows]


def _load(trace: Trace, summary: Summary, folder: Path) -> list[Section]:
    counts = np.array([layer["load"]["counts"] for layer in summary["layers"]])
    plots.load_bars(counts, trace.layers, trace.num_groups, folder / "load.png")
    return [("Who works", [("load.png", "Each expert's share of the choices; on the dashed line all would be even.")])]


def _labels(trace: Trace, summary: Summary, folder: Path) -> list[Section]:
    sections = []
    for kind, numbers in summary["labels"].items():
        file = f"{kind}_experts.png"
        plots.label_expert_heatmap(label_load(trace, kind), folder / file)
        pictures = [(file, f"Where each {kind}'s tokens went. A row sums to 100 in each layer.")]
        names = numbers["names"][: plots.MAX_LABELS]
        size = len(names)
        plots.matrix_heatmaps(
            [np.array(matrix)[:size, :size] for matrix in numbers["divergence"]],
            _titles(trace),
            names,
            names,
            "bits",
            f"How differently two {kind}s use the experts (Jensen-Shannon)",
            folder / f"{kind}_divergence.png",
        )
        pictures.append((f"{kind}_divergence.png", f"0: two {kind}s use the experts alike; 1: they share none."))
        plots.matrix_heatmaps(
            [np.array(numbers["similarity"])[:size, :size]],
            ["sentence vectors"],
            names,
            names,
            "mean cosine",
            f"How alike the texts of two {kind}s are",
            folder / f"{kind}_similarity.png",
        )
        pictures.append((f"{kind}_similarity.png", "Mean cosine of two texts' sentence vectors, for comparison."))
        sections.append((f"{kind.capitalize()}s", pictures))
    return sections


def _information(trace: Trace, summary: Summary, folder: Path) -> list[Section]:
    bits: dict[str, list[tuple[float, float, float]]] = {}
    for layer in summary["layers"]:
        for key, one in layer["information"].items():
            bits.setdefault(f"I({key})", []).append((one["bits"], one["baseline"], one["highest"]))
    if not bits:
        return []
    plots.information_bars(bits, trace.layers, folder / "information.png")
    caption = (
        "Mutual information between the choice and what is known of a token. Only what stands out above the hatched "
        "bar, which is the same with shuffled labels, means something."
    )
    return [("What a choice follows", [("information.png", caption)])]


def _map(trace: Trace, summary: Summary, folder: Path, seed: int) -> list[Section]:
    rows = sample_rows(trace, seed)
    places = text_map(trace, rows, seed)
    if places is None:
        return []
    colourings: dict[str, Sequence[str]] = {}
    for kind, labels in zip(KINDS, (trace.texts.domains, trace.texts.languages), strict=True):
        if labels is not None and kind not in summary["missing"]:
            colourings[f"by {kind}"] = [labels[row] for row in rows]
    middle, what = len(trace.layers) // 2, "group" if trace.num_groups > 1 else "most used expert"
    choices = text_groups(trace, middle)[rows]
    colourings[f"by {what}, layer {trace.layers[middle]}"] = [f"{what} {choice}" for choice in choices]
    plots.text_maps(places, colourings, folder / "map.png")
    return [("The map", [("map.png", "One dot per text, near where its vector is near. The same dots each time.")])]


def _sentences(trace: Trace, views: Sequence[TokenView], folder: Path) -> list[Section]:
    pictures = []
    for number, view in enumerate(views):
        plots.token_experts(view, trace.layers, folder / f"sentence{number}.png")
        pictures.append((f"sentence{number}.png", "A text, token by token, in the colours and numbers of its experts."))
        if view.gate_weight is not None:
            plots.gate_weights(view, trace.layers, folder / f"gate{number}.png")
            pictures.append((f"gate{number}.png", "The same text, as the attention gate weighs it to choose the groups."))
    return [("Inside a sentence", pictures)]


def _experts(trace: Trace, summary: Summary, folder: Path) -> list[Section]:
    experts = [str(expert) for expert in range(trace.num_experts)]
    plots.matrix_heatmaps(
        [np.array(matrix) for matrix in summary["cka"]],
        _titles(trace),
        experts,
        experts,
        "CKA",
        "How alike two experts' outputs are for the same tokens",
        folder / "cka.png",
        scale=(0, 1),
    )
    pictures = [
        ("cka.png", "1: the same up to rotation and scale. A fresh mixture has 1 everywhere: experts begin as copies.")
    ]
    if summary["coactivation"]:
        plots.matrix_heatmaps(
            [np.array(one["share"]) for one in summary["coactivation"]],
            [f"layer {one['from']} (down) to {one['to']} (across)" for one in summary["coactivation"]],
            experts,
            experts,
            "share",
            "Where the tokens of an expert go next",
            folder / "coactivation.png",
            scale=(0, 1),
        )
        pictures.append(
            ("coactivation.png", "Of the tokens of the expert on the left, the share that the expert below takes, too.")
        )
    if "importance" in summary:
        plots.matrix_heatmaps(
            [np.array(summary["importance"]["lost"])],
            [summary["importance"]["task"]],
            _titles(trace),
            experts,
            "lost",
            "What is lost without an expert",
            folder / "importance.png",
        )
        pictures.append(
            ("importance.png", "The fall of the main score when one expert is taken out and its tokens go elsewhere.")
        )
    return [("The experts among themselves", pictures)]


def _training(trace: Trace, summary: Summary, folder: Path, log: list[dict] | None) -> list[Section]:
    if "saturation" not in summary:
        return []
    shares, checkpoints = summary["saturation"]["shares"], summary["saturation"]["checkpoints"]
    plots.saturation_curves(np.array(shares), checkpoints, trace.layers, folder / "saturation.png")
    pictures = [("saturation.png", "How many of the final choices each checkpoint made already.")]
    if log is not None:
        plots.training_curves(log, folder / "curves.png")
        pictures.append(("curves.png", "What was logged while training."))
    return [("Over the training", pictures)]


def _titles(trace: Trace) -> list[str]:
    return [f"layer {layer}" for layer in trace.layers]
