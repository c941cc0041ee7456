"""The whole way: trace, statistics, pictures, and one page that needs nothing else. What `hagmoe analyze` calls.

OUT/trace/       the recorded routing, from which an interrupted run goes on      OUT/*.png      the pictures
OUT/report.html  the page, pictures included                                     OUT/report.json  every number
"""

import base64
import hashlib
import html
import json
import os
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import sentence
from ..files import write_text
from . import plots, stats
from .probes import TokenView, expert_outputs, importance, token_views
from .summary import KINDS, Summary, findings, sample_rows, summarize, text_groups, text_map
from .texts import Texts, label_ids
from .trace import Trace, label_load, record, sparse_encoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PACKAGES = ("hagmoe_hf", "torch", "transformers", "sentence-transformers", "numpy")
PROBE_TEXTS = 256  # texts that are looked at again: by checkpoints, by the parent
CKA_TEXTS = 64
EXAMPLES = 3  # sentences that are drawn token by token
EXAMPLE_TOKENS = range(8, 49)  # how long these are, in tokens, where there are such

Picture = tuple[str, str]  # file name, caption


def analyze(
    model: str,
    texts: Texts,
    output: str | os.PathLike,
    *,
    parent: str | None = None,
    checkpoints: Sequence[str] = (),
    importance_task: str | None = None,
    batch_size: int = 32,
    prompt: str | None = None,
    seed: int = 0,
    show_progress_bar: bool = False,
    command: str = "",
) -> Summary:
    """Look inside a mixture: where texts go, whether experts specialise, how alike they are; write report, pictures, JSON.

    The same call goes on where a killed one stopped: the trace lies under `output`/trace.

    Args:
        model: A local folder or a Hub id of a HAG-MoE.
        texts: What to run through it.
        output: Folder of the report; it may hold that of an earlier run.
        parent: The dense model it came from, to see how far the vectors have turned away.
        checkpoints: Earlier states of the model in time, to see when the choices settled.
        importance_task: A set of the evaluation kit (KIND/SET), to see whom it would miss.
        batch_size: Texts per forward pass; it changes the speed and nothing else.
        prompt: Put before each text; the model's default prompt where None.
        seed: Of shuffles, samples and the map.
        show_progress_bar: Whether to show one.
        command: What the report says it was made by.

    Returns:
        Every number, as in report.json.

    Raises:
        ValueError: The model has no sparse layers, `output` holds the trace of something else, an unknown task, or a
            checkpoint of another shape.
        ImportError: An optional package is missing; the message names what to install.
        OSError: There is no such model.
    """
    output = Path(output)
    score = _kit_score(importance_task, output, batch_size) if importance_task else None
    loaded = sentence.load(model)
    sparse_encoder(loaded)
    options: dict[str, Any] = {"batch_size": batch_size, "prompt": prompt, "show_progress_bar": show_progress_bar}
    trace = record(loaded, texts, output / "trace", **options)
    pieces = {index: piece for piece, index in loaded.tokenizer.get_vocab().items()}
    summary = summarize(trace, pieces, seed=seed)
    summary |= {
        "model": model,
        "command": command,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    rows = sample_rows(trace, seed, PROBE_TEXTS)
    probe = Texts(tuple(trace.texts.texts[row] for row in rows))
    outputs = expert_outputs(loaded, list(probe.texts[:CKA_TEXTS]), seed=seed, prompt=prompt)
    summary["cka"] = [[[stats.linear_cka(one, other) for other in layer] for one in layer] for layer in outputs]
    if parent is not None:
        before = sentence.load(parent).encode(list(probe.texts), batch_size=batch_size, prompt=prompt)
        now = loaded.encode(list(probe.texts), batch_size=batch_size, prompt=prompt)
        summary["drift"] = stats.drift(now, before)
    if checkpoints:
        summary["saturation"] = _saturation(loaded, checkpoints, probe, output, options)
    if score is not None:
        whole, lost = importance(loaded, score, show_progress_bar=show_progress_bar)
        summary["importance"] = {"task": importance_task, "whole": whole, "lost": lost.tolist()}
    summary["findings"] = findings(summary)
    views = token_views(loaded, _examples(trace), prompt=prompt)
    sections = _draw(views, trace, summary, checkpoints, output, seed)
    write_text(output / "report.json", json.dumps(summary, indent=1) + "\n")
    write_text(output / "report.html", page(summary, sections, output))
    return summary


def _kit_score(task: str, output: Path, batch_size: int) -> Callable[["SentenceTransformer"], float]:
    """A model's main score on a set of the kit that ships; scores are kept, so that an interrupted run goes on."""
    from ..evaluation.kit import SHIPPED, find_sets
    from ..evaluation.models import candidate
    from ..evaluation.runner import score_models
    from ..evaluation.tasks import local_task

    sets = {kit_set.key: kit_set for kit_set in find_sets(SHIPPED)}
    if task not in sets:
        raise ValueError(f"importance_task={task!r} is not possible; allowed: {sorted(sets)}.")
    kit_task = local_task(sets[task])

    def score(model: "SentenceTransformer") -> float:
        scores = score_models([candidate(model, "masked")], [kit_task], output / "importance", batch_size=batch_size)
        return scores[0][kit_task.metadata.name].score

    return score


def _saturation(
    model: "SentenceTransformer", checkpoints: Sequence[str], probe: Texts, output: Path, options: dict[str, Any]
) -> Summary:
    final = record(model, probe, **options)
    shares = []
    for checkpoint in checkpoints:
        earlier = sentence.load(checkpoint)
        # Two runs may both have a checkpoint-500, and other texts may be looked at the next time
        key = hashlib.sha256(f"{sentence.fingerprint(earlier)} {probe.texts}".encode()).hexdigest()[:16]
        early = record(earlier, probe, output / "checkpoints" / f"{Path(checkpoint).name}-{key}", **options)
        if early.expert_index.shape != final.expert_index.shape:
            raise ValueError(
                f"checkpoint {checkpoint} chose {early.expert_index.shape} (tokens, sparse layers, experts per token); "
                f"allowed: {final.expert_index.shape}, as the model itself."
            )
        pairs = zip(np.moveaxis(early.expert_index, 1, 0), np.moveaxis(final.expert_index, 1, 0), strict=True)
        shares.append([stats.saturation(*pair) for pair in pairs])
    return {"checkpoints": [Path(checkpoint).name for checkpoint in checkpoints], "shares": shares}


def _draw(
    views: Sequence[TokenView], trace: Trace, summary: Summary, checkpoints: Sequence[str], folder: Path, seed: int
) -> list[tuple[str, list[Picture]]]:
    """Draw everything that there is something to draw of; sections of pictures, in the order of the page."""
    layers, num_experts = trace.layers, trace.num_experts
    titles = [f"layer {layer}" for layer in layers]
    experts = [str(expert) for expert in range(num_experts)]
    sections: list[tuple[str, list[Picture]]] = []

    counts = np.array([layer["load"]["counts"] for layer in summary["layers"]])
    plots.load_bars(counts, layers, trace.num_groups, folder / "load.png")
    sections.append(
        ("Who works", [("load.png", "Each expert's share of the choices; on the dashed line all would be even.")])
    )

    for kind, numbers in summary["labels"].items():
        name = f"{kind}_experts.png"
        plots.label_expert_heatmap(label_load(trace, kind), folder / name)
        pictures = [(name, f"Where each {kind}'s tokens went. A row sums to 100 in each layer.")]
        names = numbers["names"][: plots.MAX_LABELS]
        size = len(names)
        plots.matrix_heatmaps(
            [np.array(matrix)[:size, :size] for matrix in numbers["divergence"]],
            titles,
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

    bits: dict[str, list[tuple[float, float, float]]] = {}
    for layer in summary["layers"]:
        for key, one in layer["information"].items():
            bits.setdefault(f"I({key})", []).append((one["bits"], one["baseline"], one["highest"]))
    if bits:
        plots.information_bars(bits, layers, folder / "information.png")
        caption = (
            "Mutual information between the choice and what is known of a token. Only what stands out above the hatched "
            "bar, which is the same with shuffled labels, means something."
        )
        sections.append(("What a choice follows", [("information.png", caption)]))

    rows = sample_rows(trace, seed)
    places = text_map(trace, rows, seed)
    if places is not None:
        colourings: dict[str, Sequence[str]] = {}
        for kind, labels in zip(KINDS, (trace.texts.domains, trace.texts.languages), strict=True):
            if labels is not None and kind not in summary["missing"]:
                colourings[f"by {kind}"] = [labels[row] for row in rows]
        row, what = len(layers) // 2, "group" if trace.num_groups > 1 else "most used expert"
        colourings[f"by {what}, layer {layers[row]}"] = [f"{what} {choice}" for choice in text_groups(trace, row)[rows]]
        plots.text_maps(places, colourings, folder / "map.png")
        sections.append(
            ("The map", [("map.png", "One dot per text, near where its vector is near. The same dots each time.")])
        )

    pictures = []
    for number, view in enumerate(views):
        plots.token_experts(view, layers, folder / f"sentence{number}.png")
        pictures.append((f"sentence{number}.png", "A text, token by token, in the colours and numbers of its experts."))
        if view.gate_weight is not None:
            plots.gate_weights(view, layers, folder / f"gate{number}.png")
            pictures.append((f"gate{number}.png", "The same text, as the attention gate weighs it to choose the groups."))
    sections.append(("Inside a sentence", pictures))

    plots.matrix_heatmaps(
        [np.array(matrix) for matrix in summary["cka"]],
        titles,
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
            titles,
            experts,
            "lost",
            "What is lost without an expert",
            folder / "importance.png",
        )
        pictures.append(
            ("importance.png", "The fall of the main score when one expert is taken out and its tokens go elsewhere.")
        )
    sections.append(("The experts among themselves", pictures))

    pictures = []
    if "saturation" in summary:
        saturation = summary["saturation"]
        plots.saturation_curves(np.array(saturation["shares"]), saturation["checkpoints"], layers, folder / "saturation.png")
        pictures.append(("saturation.png", "How many of the final choices each checkpoint made already."))
        state = Path(checkpoints[-1]) / "trainer_state.json"
        if state.is_file():
            plots.training_curves(json.loads(state.read_text(encoding="utf-8"))["log_history"], folder / "curves.png")
            pictures.append(("curves.png", "What was logged while training."))
        sections.append(("Over the training", pictures))
    return sections


def _examples(trace: Trace) -> list[str]:
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


STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1b1b1b; background: #fafaf8; }
body { max-width: 62rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
h2 { margin-top: 2.6rem; border-bottom: 1px solid #d8d8d2; padding-bottom: .2rem; }
.about { color: #555; }
ol.findings { padding-left: 1.4rem; }
ol.findings li { margin: .7rem 0; font-size: 1.05rem; }
figure { margin: 1.4rem 0; padding: .8rem; background: #fff; border: 1px solid #e2e2dc; border-radius: 6px; }
figure, .wide { overflow-x: auto; }
img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
figcaption { color: #444; font-size: .92rem; margin-top: .6rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e2e2dc; text-align: right; }
th:first-child, td:first-child { text-align: left; }
td.words { text-align: left; font-family: ui-monospace, monospace; }
code { background: #eee; padding: .05rem .3rem; overflow-wrap: anywhere; }
summary { cursor: pointer; color: #0059a8; margin: .6rem 0; }
""".strip()


def page(summary: Summary, sections: list[tuple[str, list[Picture]]], folder: Path) -> str:
    """One HTML page with everything inside: no script, nothing from the network.

    Args:
        summary: As `analyze` makes it, with `findings`.
        sections: Headline, and pictures in `folder` with their captions.
        folder: Where the pictures are.
    """
    text = html.escape
    name = Path(summary["model"]).name or summary["model"]
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>Inside {text(name)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>Inside {text(name)}</h1>",
        f'<p class="about">{_counted(summary["texts"], "text")}, {_counted(summary["tokens"], "token")}, '
        f"{_counted(len(summary['layers']), 'sparse layer')} of {summary['num_experts']} experts in "
        f"{_counted(summary['num_groups'], 'group')}.</p>",
        '<ol class="findings">',
        *(f"<li>{text(finding)}</li>" for finding in summary["findings"]),
        "</ol>",
    ]
    for number, (headline, pictures) in enumerate(sections):
        parts.append(f"<h2>{text(headline)}</h2>")
        for file, caption in pictures:
            data = base64.b64encode((folder / file).read_bytes()).decode()
            parts.append(
                f'<figure><img src="data:image/png;base64,{data}" alt="{text(caption)}"><figcaption>{text(caption)}'
                "</figcaption></figure>"
            )
        if number == 0:
            parts.append(_load_table(summary))
    parts += ["<h2>Numbers</h2>", _information_table(summary), _pair_table(summary), _neighbour_table(summary)]
    parts.append(_vocabulary_table(summary))
    if summary["missing"]:
        parts.append("<h2>What could not be said</h2><ul>")
        parts += [f"<li>{text(reason)}</li>" for reason in summary["missing"].values()]
        parts.append("</ul>")
    skipped = "; ".join(f"{count} rows skipped: {reason}" for reason, count in summary["skipped"].items())
    versions = ", ".join(f"{package} {number}" for package, number in summary["versions"].items())
    parts.append(f'<p class="about">{text(summary["date"])}; {text(versions)}. {text(skipped)}</p>')
    if summary["command"]:
        parts.append(f"<p><code>{text(summary['command'])}</code></p>")
    parts.append("<p>Every number is in <code>report.json</code> beside this page.</p></body></html>")
    return "\n".join(part for part in parts if part) + "\n"


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str, *, words: bool = False) -> str:
    if not rows:
        return ""
    kind = ' class="words"' if words else ""
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for first, *others in rows:
        cells = "".join(f"<td{kind}>{html.escape(cell)}</td>" for cell in others)
        lines.append(f"<tr><td>{html.escape(first)}</td>{cells}</tr>")
    return (
        f'<details><summary>{html.escape(title)}</summary><div class="wide"><table>{"".join(lines)}</table></div></details>'
    )


def _load_table(summary: Summary) -> str:
    head = ("layer", "effective experts", "entropy (1 is even)", "CV", "MaxVio", "idle experts", "mean P(chosen)")
    rows = []
    for layer in summary["layers"]:
        load = layer["load"]
        numbers = (load["effective_experts"], load["entropy"], load["cv"], load["max_vio"])
        cells = [*(f"{number:.3f}" for number in numbers), str(load["dead_experts"]), f"{layer['confidence']:.3f}"]
        rows.append([str(layer["layer"]), *cells])
    return _table(head, rows, "The load in numbers")


def _information_table(summary: Summary) -> str:
    head = ("", "layer", "bits", "shuffled: mean", "shuffled: largest", "at most", "above chance", "of what could be known")
    rows = []
    for layer in summary["layers"]:
        for key, one in layer["information"].items():
            most = min(one["choice_entropy"], one["label_entropy"])
            numbers = [f"{one[name]:.4f}" for name in ("bits", "baseline", "highest")] + [f"{most:.4f}"]
            above = "yes" if one["is_above_chance"] else "no"
            rows.append([f"I({key})", str(layer["layer"]), *numbers, above, f"{one['explained']:.1%}"])
    return _table(head, sorted(rows), "Mutual information")


def _pair_table(summary: Summary) -> str:
    head = ("layer", "pairs", "same group as its positive", "same group as a negative")
    rows = [
        [str(layer["layer"]), str(pairs["pairs"]), f"{pairs['with_positive']:.1%}", f"{pairs['with_negatives']:.1%}"]
        for layer in summary["layers"]
        if (pairs := layer["pairs"])
    ]
    return _table(head, rows, "Queries and their positives")


def _neighbour_table(summary: Summary) -> str:
    head = ("nearest text has the same", "by sentence vector", "by routing alone", "by chance")
    rows = [
        [kind, *(f"{found[key]:.1%}" for key in ("by_vector", "by_routing", "chance"))]
        for kind, found in summary["neighbours"].items()
    ]
    return _table(head, rows, "Routing as an embedding")


def _vocabulary_table(summary: Summary) -> str:
    rows = []
    for layer in summary["layers"]:
        for one in layer["vocabulary"]:
            pairs = zip(one["tokens"], one["shares"], strict=True)
            rows.append(
                [
                    f"layer {layer['layer']}, expert {one['expert']}",
                    "  ".join(f"{token} {share:.0%}" for token, share in pairs),
                ]
            )
    even = f"(even: {1 / summary['num_experts']:.0%})"
    head = ("", f"its own tokens, and the share of them that it takes {even}")
    return _table(head, rows, "Vocabulary of each expert", words=True)
