"""The whole way: load models and tasks, evaluate, compare, write the report. What `hagmoe evaluate` calls."""

import dataclasses
import json
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ..files import write_text
from . import models as models_room
from .compare import compare
from .kit import SHIPPED, KitSet, find_sets, kit_fingerprint
from .metrics import EmbeddingStatistics, embedding_statistics
from .models import Candidate
from .report import ModelReport, Report
from .runner import score_models
from .tasks import hub_tasks, local_task

PACKAGES = ("hagmoe_hf", "mteb", "sentence-transformers", "transformers", "torch", "numpy", "scikit-learn", "scipy")
TEXTS_PER_SET = 60  # of each set, for the statistics of the vectors: enough, since all pairs are looked at


def evaluate(
    model: str,
    against: Sequence[str] = (),
    *,
    output: str | os.PathLike,
    kit: str | os.PathLike = SHIPPED,
    tasks: Sequence[str] = (),
    benchmark: str | None = None,
    batch_size: int = 32,
    show_progress_bar: bool = False,
    command: str = "",
) -> Report:
    """Evaluate a model, compare it with others, and write report.json, report.md and report.png.

    The same call goes on where a killed one stopped: scores lie under `output`/scores as soon as a task is done.

    Args:
        model: A local folder or a Hub id.
        against: Models to compare with, or "bm25"; differences are to the first.
        output: Folder for scores and report; it may hold those of an earlier run.
        kit: Folder of local sets, see `kit`.
        tasks: Names of sets (KIND/SET or KIND), or of tasks that mteb knows; every set of the kit where neither this nor
            `benchmark` is given.
        benchmark: A benchmark that mteb knows; its data come from the Hub.
        batch_size: Texts per forward pass; it changes the speed and nothing else.
        show_progress_bar: Whether to show one.
        command: What the report says it was made by.

    Raises:
        KitError: A local set is broken; the message names file and line.
        ValueError: An unknown task or benchmark, a model given twice, or one that can run no task.
        ImportError: An optional package is missing; the message names what to install.
        OSError: There is no such model.
    """
    sets, hub_names = _choose(find_sets(kit), tasks, everything=not tasks and benchmark is None)
    chosen_tasks = [local_task(kit_set) for kit_set in sets] + hub_tasks(hub_names, benchmark)
    candidates = _load([model, *against])
    output = Path(output)
    scores = score_models(candidates, chosen_tasks, output, batch_size=batch_size, show_progress_bar=show_progress_bar)
    for candidate, of_model in zip(candidates, scores, strict=True):
        if not of_model:
            raise ValueError(f"{candidate.label} can run none of the tasks; allowed for it: retrieval and reranking.")
    reports = [
        ModelReport(
            label=candidate.label,
            fingerprint=candidate.fingerprint,
            scores=of_model,
            statistics=_statistics(candidate, sets, output, batch_size),
            comparison=None if i == 0 else compare(scores[0], of_model),
        )
        for i, (candidate, of_model) in enumerate(zip(candidates, scores, strict=True))
    ]
    report = Report(
        models=reports,
        kit_fingerprint=kit_fingerprint(sets) if sets else "",
        versions={name: version(name) for name in PACKAGES},
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
    )
    report.write(output)
    return report


def _choose(sets: Sequence[KitSet], names: Sequence[str], everything: bool) -> tuple[list[KitSet], list[str]]:
    """The local sets that are meant, and the names that are left for mteb."""
    if everything:
        return list(sets), []
    chosen: dict[str, KitSet] = {}
    hub_names = []
    for name in names:
        found = [kit_set for kit_set in sets if name in (kit_set.key, kit_set.kind)]
        if not found and "/" in name:
            keys = [kit_set.key for kit_set in sets]
            raise ValueError(f"task {name!r} is not possible; allowed: one of {keys}, or a name of mteb.")
        chosen.update({kit_set.key: kit_set for kit_set in found})
        if not found:
            hub_names.append(name)
    return list(chosen.values()), hub_names


def _load(names: Sequence[str]) -> list[Candidate]:
    candidates = [models_room.load(name) for name in names]
    seen: dict[str, str] = {}
    for name, candidate in zip(names, candidates, strict=True):
        if candidate.fingerprint in seen:
            raise ValueError(f"model {name!r} is the same as {seen[candidate.fingerprint]!r}; allowed: different models.")
        seen[candidate.fingerprint] = name
    labels = [candidate.label for candidate in candidates]
    return [
        candidate
        if labels.count(candidate.label) == 1
        else dataclasses.replace(candidate, label=f"{candidate.label} ({candidate.fingerprint[:6]})")
        for candidate in candidates
    ]


def _statistics(candidate: Candidate, sets: Sequence[KitSet], output: Path, batch_size: int) -> EmbeddingStatistics | None:
    """The shape of the vectors of every set's first pairs, stored like a score; None where no set has pairs."""
    if candidate.encoder is None or not sets:
        return None
    path = output / "scores" / candidate.fingerprint[:16] / f"statistics-{kit_fingerprint(sets)[:16]}.json"
    if path.is_file():
        return EmbeddingStatistics(**json.loads(path.read_text(encoding="utf-8")))
    pairs = [pair for kit_set in sets for pair in _pairs(kit_set)[:TEXTS_PER_SET]]
    if not pairs:
        return None
    vectors, positives = (
        np.asarray(candidate.encoder.encode(list(texts), batch_size=batch_size, show_progress_bar=False))
        for texts in zip(*pairs, strict=True)
    )
    statistics = embedding_statistics(vectors, positives)
    write_text(path, json.dumps(dataclasses.asdict(statistics), indent=1) + "\n")
    return statistics


def _pairs(kit_set: KitSet) -> list[tuple[str, str]]:
    """Texts of a set with one that means the same, where the set has such pairs."""
    rows = kit_set.read()
    if kit_set.kind == "retrieval":
        documents = {row["_id"]: row["text"] for row in rows["corpus"]}
        queries = {row["_id"]: row["text"] for row in rows["queries"]}
        return [(queries[row["query-id"]], documents[row["corpus-id"]]) for row in rows["qrels"] if row["score"] > 0]
    if kit_set.kind == "reranking":
        return [(row["query"], row["positive"][0]) for row in rows["test"]]
    if kit_set.kind == "pair_classification":
        return [(row["sentence1"], row["sentence2"]) for row in rows["test"] if row["label"] == 1]
    if kit_set.kind == "bitext":
        return [(row["sentence1"], row["sentence2"]) for of_language in rows.values() for row in of_language]
    return []
