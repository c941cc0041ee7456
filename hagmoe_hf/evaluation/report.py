"""What was measured, as JSON, as Markdown tables, and as a bar plot. Nothing here runs a model."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import write_figure, write_text
from .compare import Comparison, Difference
from .metrics import EmbeddingStatistics
from .runner import TaskScore
from .tasks import display_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BAR_COLOURS = ("#00224e", "#a59c74", "#707173", "#fee838")  # of cividis: even in grey, and to the colour-blind


@dataclass(frozen=True)
class ModelReport:
    """One model's scores.

    Attributes:
        label: What tables call it.
        fingerprint: SHA-256 of what decides its vectors.
        scores: Task name -> score.
        statistics: Shape of its vectors on a sample of the kit's pairs; None for BM25, and where no set has pairs.
        comparison: The evaluated model against this one; None for the evaluated model itself.
    """

    label: str
    fingerprint: str
    scores: Mapping[str, TaskScore]
    statistics: EmbeddingStatistics | None
    comparison: Comparison | None

    @property
    def macro(self) -> float:
        """Mean score over the tasks that the model ran."""
        return float(np.mean([score.score for score in self.scores.values()]))

    @property
    def domains(self) -> dict[str, float]:
        """Domain -> mean score over its tasks."""
        by_domain: dict[str, list[float]] = {}
        for score in self.scores.values():
            by_domain.setdefault(score.domain, []).append(score.score)
        return {domain: float(np.mean(values)) for domain, values in sorted(by_domain.items())}

    @property
    def languages(self) -> dict[str, float]:
        """Language -> mean over the tasks that have it."""
        by_language: dict[str, list[float]] = {}
        for score in self.scores.values():
            for language, value in score.languages.items():
                by_language.setdefault(language, []).append(value)
        return {language: float(np.mean(values)) for language, values in sorted(by_language.items())}

    @property
    def worst_domain(self) -> str:
        """The domain with the lowest mean."""
        domains = self.domains
        return min(domains, key=lambda domain: domains[domain])


@dataclass(frozen=True)
class Report:
    """A whole evaluation.

    Attributes:
        models: The evaluated model first, then those it is compared with.
        kit_fingerprint: SHA-256 of the local sets that were used; "" where none was.
        versions: Package -> version.
        date: ISO 8601, UTC.
        command: What was typed.
    """

    models: Sequence[ModelReport]
    kit_fingerprint: str
    versions: Mapping[str, str]
    date: str
    command: str

    def write(self, folder: str | os.PathLike) -> None:
        """Write report.json, report.md and report.png.

        Raises:
            ImportError: matplotlib is missing; the other two files are there then.
        """
        write_text(Path(folder, "report.json"), json.dumps(to_dict(self), indent=1) + "\n")
        write_text(Path(folder, "report.md"), markdown(to_dict(self)))
        bar_plot(to_dict(self), Path(folder, "report.png"))


def to_dict(report: Report) -> dict[str, Any]:
    """The report as JSON keeps it: all figures of the tables, without the per-item scores."""
    return {
        "command": report.command,
        "date": report.date,
        "versions": dict(report.versions),
        "kit_fingerprint": report.kit_fingerprint,
        "models": [_model_dict(model) for model in report.models],
    }


def _model_dict(model: ModelReport) -> dict[str, Any]:
    tasks = {
        display_name(name): {
            "type": score.type,
            "domain": score.domain,
            "metric": score.metric,
            "score": score.score,
            "revision": score.revision,
            "seconds": round(score.seconds, 2),
        }
        for name, score in model.scores.items()
    }
    return {
        "label": model.label,
        "fingerprint": model.fingerprint,
        "macro": model.macro,
        "worst_domain": model.worst_domain,
        "tasks": tasks,
        "domains": model.domains,
        "languages": model.languages,
        "embedding_statistics": None if model.statistics is None else dataclasses.asdict(model.statistics),
        "difference": None if model.comparison is None else _comparison_dict(model.comparison),
    }


def _comparison_dict(comparison: Comparison) -> dict[str, Any]:
    return {
        "macro": dataclasses.asdict(comparison.macro),
        "domains": {name: dataclasses.asdict(value) for name, value in comparison.domains.items()},
        "tasks": {display_name(name): dataclasses.asdict(value) for name, value in comparison.tasks.items()},
    }


def markdown(report: Mapping[str, Any]) -> str:
    """Tables of a report.

    Args:
        report: From `to_dict`, or read from a report.json.

    Returns:
        Markdown: tasks, domains, languages, and the shape of the vectors; differences with their 95 % intervals.
    """
    models = report["models"]
    first, *others = models
    lines = [f"# {first['label']}" + (f" against {', '.join(model['label'] for model in others)}" if others else ""), ""]
    lines += _table("task", "tasks", models, value=lambda entry: entry["score"])
    lines += _table("domain", "domains", models)
    lines += _table("language", "languages", models, difference=False)
    lines += _statistics_table(models)
    if others:
        lines += [
            f"The last column is {first['label']} minus {others[0]['label']}, paired, with a 95 % bootstrap interval over "
            "queries and items; **bold** where the interval leaves out 0. Tasks that only one of the two ran are not in it.",
            "",
        ]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += [f"Made on {report['date']} by `{report['command']}` with {versions}."]
    if report["kit_fingerprint"]:
        lines += [f"Kit fingerprint: `{report['kit_fingerprint'][:16]}`."]
    return "\n".join(lines) + "\n"


def _table(
    title: str, key: str, models: Sequence[Mapping[str, Any]], *, value: Any = lambda entry: entry, difference: bool = True
) -> list[str]:
    names = list(dict.fromkeys(name for model in models for name in model[key]))
    gaps = models[1]["difference"] if difference and len(models) > 1 else None
    with_metric = key == "tasks"
    head = [title, *(["metric"] if with_metric else []), *(model["label"] for model in models)]
    head += ["difference"] if gaps else []
    rows = []
    for name in names:
        row = [name]
        if with_metric:
            row.append(next(model[key][name]["metric"] for model in models if name in model[key]))
        row += [f"{value(model[key][name]):.4f}" if name in model[key] else "" for model in models]
        if gaps:
            row.append(_interval(gaps[key].get(name)))
        rows.append(row)
    if key == "tasks":
        row = [f"**mean of {len(names)}**", "", *(_macro(model, len(names)) for model in models)]
        rows.append(row + ([_interval(gaps["macro"])] if gaps else []))
    if key == "domains":
        worst = [f"{model['worst_domain']} {model['domains'][model['worst_domain']]:.4f}" for model in models]
        lost = [_most_lost(gaps["domains"])] if gaps else []
        rows.append(["**worst domain**", *worst, *lost])
    alignment = ["---"] + ["---" if cell == "metric" else "---:" for cell in head[1:]]
    return ["| " + " | ".join(row) + " |" for row in (head, alignment, *rows)] + [""]


def _macro(model: Mapping[str, Any], all_tasks: int) -> str:
    count = len(model["tasks"])
    return f"{model['macro']:.4f}" + ("" if count == all_tasks else f" (of its {count})")


def _most_lost(domains: Mapping[str, Mapping[str, Any]]) -> str:
    name = min(domains, key=lambda domain: domains[domain]["value"])
    return f"{name} {domains[name]['value']:+.4f}"


def _interval(gap: Mapping[str, Any] | None) -> str:
    if gap is None:
        return ""
    difference = Difference(**gap)
    if difference.low is None or difference.high is None:
        return f"{difference.value:+.4f}"
    text = f"{difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
    return f"**{text}**" if difference.is_clear else text


def _statistics_table(models: Sequence[Mapping[str, Any]]) -> list[str]:
    known = [model for model in models if model["embedding_statistics"]]
    if not known:
        return []
    fields = ("nan_count", "norm_mean", "cosine_mean", "uniformity", "alignment", "effective_rank")
    rows = [["vectors of the kit's texts", *(model["label"] for model in known)], ["---", *("---:" for _ in known)]]
    for name in fields:
        figures = [model["embedding_statistics"][name] for model in known]
        rows.append([name, *("" if figure is None else f"{figure:.4g}" for figure in figures)])
    return ["| " + " | ".join(row) + " |" for row in rows] + [""]


def bar_plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw one bar per task and model.

    Args:
        report: From `to_dict`, or read from a report.json.
        path: The PNG to make.

    Raises:
        ImportError: matplotlib is missing.
    """
    models = report["models"]
    names = list(dict.fromkeys(name for model in models for name in model["tasks"]))
    height = 0.8 / len(models)
    figure = _figure(width=8.5, height=0.16 * len(names) * (len(models) + 1) + 1.4)
    axis = figure.subplots()
    for i, model in enumerate(models):
        rows = [row for row, name in enumerate(names) if name in model["tasks"]]
        axis.barh(
            [row + (i - (len(models) - 1) / 2) * height for row in rows],
            [model["tasks"][names[row]]["score"] for row in rows],
            height=height,
            label=model["label"],
            color=_BAR_COLOURS[i % len(_BAR_COLOURS)],
        )
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(right=1)
    axis.set_xlabel("main score of the task")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(models), fontsize=9)
    write_figure(figure, path)


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install hagmoe_hf[eval]") from error
    return Figure(figsize=(width, height), layout="constrained")
