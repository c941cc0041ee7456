"""Run models on tasks through `mteb.evaluate`, and keep every score as soon as it is there.

A score lies in OUTPUT/scores/FINGERPRINT/TASK.json, written under another name first and then renamed: a killed run
loses the task that it was in, and the same command goes on from there.
"""

import copy
import dataclasses
import json
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..files import write_text
from ..version import __version__
from .items import Items, items_of
from .models import Candidate
from .mteb_api import AbsTask, AbsTaskAggregate, AbsTaskRetrieval, mteb
from .tasks import CODES, domain

MADE_BY = f"mteb {mteb.__version__}, hagmoe_hf {__version__}"  # another version may score otherwise
_ENGLISH = "eng-Latn"


@dataclass(frozen=True)
class TaskScore:
    """What one model scored on one task.

    Attributes:
        model: Fingerprint of the model.
        task: mteb's name of the task.
        revision: Of the task's data.
        made_by: Versions of mteb and of this package, which computed it.
        type: mteb's type, like "Retrieval".
        domain: What the texts are about.
        metric: mteb's name of the main score.
        score: The main score, 0 to 1 (correlations: -1 to 1), mean over splits and subsets.
        languages: Language -> main score. A cross-lingual score counts for the language that is not English.
        items: What the score is made of, empty where that is not known.
        seconds: Wall time, loading data included.
        mteb_result: mteb's own result, with all other scores.
    """

    model: str
    task: str
    revision: str
    made_by: str
    type: str
    domain: str
    metric: str
    score: float
    languages: Mapping[str, float]
    items: tuple[Items, ...]
    seconds: float
    mteb_result: Mapping[str, Any]


def score_models(
    candidates: Sequence[Candidate],
    tasks: Sequence[AbsTask],
    output: Path,
    *,
    batch_size: int = 32,
    show_progress_bar: bool = False,
) -> list[dict[str, TaskScore]]:
    """Score every model on every task that applies to it; what an earlier run stored is read, not run again.

    Args:
        candidates: The models.
        tasks: None of them is changed: each model gets a fresh copy, with the same random draws.
        output: Folder that receives `scores/`.
        batch_size: Texts per forward pass; it changes the speed and nothing else.
        show_progress_bar: Whether to show one, a step per model and task.

    Returns:
        For each model, task name -> score.

    Raises:
        ValueError: A stored score is broken.
    """
    results: list[dict[str, TaskScore]] = []
    steps = [(candidate, task) for candidate in candidates for task in tasks if applies(candidate, task)]
    with tqdm(total=len(steps), desc="Evaluating", disable=not show_progress_bar) as bar:
        for candidate in candidates:
            scores = {}
            for task in tasks:
                if applies(candidate, task):
                    bar.set_postfix_str(f"{candidate.label}: {task.metadata.name}")
                    scores[task.metadata.name] = _score_once(candidate, task, output, batch_size)
                    bar.update()
            results.append(scores)
    return results


def applies(candidate: Candidate, task: AbsTask) -> bool:
    """Whether a model can run a task: BM25 ranks documents for queries, and can do nothing else."""
    return candidate.encoder is not None or isinstance(task, AbsTaskRetrieval)


def _score_once(candidate: Candidate, task: AbsTask, output: Path, batch_size: int) -> TaskScore:
    path = output / "scores" / candidate.fingerprint[:16] / f"{task.metadata.name}.json"
    if path.is_file():
        stored = _read(path)
        if (stored.model, stored.revision, stored.made_by) == (
            candidate.fingerprint,
            task.metadata.revision,
            MADE_BY,
        ):
            return stored
    score = _run(candidate, task, batch_size)
    write_text(path, json.dumps(dataclasses.asdict(score), indent=1) + "\n")
    return score


def _read(path: Path) -> TaskScore:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        entry["items"] = tuple(_read_items(part) for part in entry["items"])
        return TaskScore(**entry)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a score that this version wrote ({error!r}); delete it to have it computed again."
        ) from error


def _read_items(part: Mapping[str, Any]) -> Items:
    fields: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in part.items()}
    return Items(**fields)


def _run(candidate: Candidate, task: AbsTask, batch_size: int) -> TaskScore:
    task = copy.deepcopy(task)  # mteb's tasks carry random states: a second model would get other draws
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="mteb")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="mteb")
        aggregate = isinstance(task, AbsTaskAggregate)
        if not aggregate:
            task.load_data()  # mteb unloads what it loaded itself, but the items need the data, too
        results = mteb.evaluate(
            candidate.model,
            task,
            cache=None,  # its key is the model's name, which is the same for all local models
            co2_tracker=False,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
            prediction_folder=folder,
            show_progress_bar=False,
        )
        result = results.task_results[0]
        items: tuple[Items, ...] = ()
        if not aggregate:
            predictions = json.loads((Path(folder) / task.prediction_file_name).read_text(encoding="utf-8"))
            items = items_of(task, predictions, result.scores)
    return TaskScore(
        model=candidate.fingerprint,
        task=task.metadata.name,
        revision=task.metadata.revision,
        made_by=MADE_BY,
        type=task.metadata.type,
        domain=domain(task),
        metric=task.metadata.main_score,
        score=float(result.get_score()),
        languages=_language_scores(result.scores, items),
        items=items,
        seconds=float(result.evaluation_time or 0.0),
        mteb_result=json.loads(result.model_dump_json()),  # dates become texts
    )


def _language_scores(scores: Mapping[str, Sequence[Mapping[str, Any]]], items: Sequence[Items]) -> dict[str, float]:
    by_language: dict[str, list[float]] = defaultdict(list)
    grouped = [part for part in items if part.groups]
    for part in grouped:
        for group in sorted(set(part.groups)):
            chosen = [value for value, other in zip(part.values, part.groups, strict=True) if other == group]
            by_language[group].append(float(np.mean(chosen)))
    if not grouped:
        for rows in scores.values():
            for row in rows:
                for code in [code for code in row["languages"] if code != _ENGLISH] or row["languages"]:
                    by_language[CODES.get(code, code)].append(float(row["main_score"]))
    return {language: float(np.mean(values)) for language, values in sorted(by_language.items())}
