"""The score of every query or item of a task, from the predictions that mteb writes: what a bootstrap draws from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .mteb_api import (
    AbsTask,
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
    pytrec_eval,
)

Statistic = Literal["mean", "spearman", "average_precision", "resampled_mean"]

_TREC_NAMES = {"ndcg_at_": "ndcg_cut.", "map_at_": "map_cut.", "recall_at_": "recall.", "precision_at_": "P."}


@dataclass(frozen=True)
class Items:
    """Per-item values of one split and subset, and how they make its score.

    Attributes:
        subset: mteb's name of the subset, "default" where there is one only.
        statistic: "mean" of `values`; "spearman" of `gold` and `values`; "average_precision" of `values` (similarities)
            against `gold` (0 or 1); "resampled_mean" of `values`, each of which is a score on a sample of the items.
        values: One number per item.
        gold: One number per item, empty for the two means.
        groups: The language of each item, empty where all have the same.
        variance_factor: For "resampled_mean": sample size over number of items, the m-out-of-n bootstrap's correction.
    """

    subset: str
    statistic: Statistic
    values: tuple[float, ...]
    gold: tuple[float, ...] = ()
    groups: tuple[str, ...] = ()
    variance_factor: float = 1.0


def items_of(
    task: AbsTask, predictions: Mapping[str, Any], scores: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[Items, ...]:
    """Per-item values of a task that was just evaluated.

    Args:
        task: With its data still loaded.
        predictions: What mteb wrote: subset -> split -> predictions of the task's kind.
        scores: mteb's result: split -> one mapping of scores per subset.

    Returns:
        One entry per split and subset; none where the main score is no function of items that is known here, so that no
        interval can be given.
    """
    make = _maker(task)
    if make is None:
        return ()
    parts = []
    data: Any = task.dataset
    for split, rows in scores.items():
        for row in rows:
            of_subset = data.get(row["hf_subset"], data)
            parts.append(make(task, row, of_subset[split], predictions[row["hf_subset"]][split]))
    return tuple(parts)


def _maker(task: AbsTask) -> Any:
    metric = task.metadata.main_score
    if isinstance(task, AbsTaskRetrieval) and _trec_name(metric) and not task.skip_first_result:
        return _ranking
    if isinstance(task, AbsTaskSTS) and metric == "cosine_spearman":
        return _similarity
    if isinstance(task, AbsTaskPairClassification) and metric in ("similarity_ap", "cosine_ap"):
        return _pair_classification
    if isinstance(task, AbsTaskClassification) and metric == "accuracy" and not task.is_cross_validation:
        return _classification
    if isinstance(task, AbsTaskBitextMining) and metric == "accuracy" and not task.parallel_subsets:
        return _bitext
    if isinstance(task, AbsTaskClustering) and metric == "v_measure":
        return _clustering
    return None


def _trec_name(metric: str) -> str:
    return next((trec + metric.removeprefix(name) for name, trec in _TREC_NAMES.items() if metric.startswith(name)), "")


def _ranking(task: Any, row: Mapping[str, Any], data: Any, ranked: Any) -> Items:
    """pytrec_eval gives mteb its scores, and here the same per query."""
    if task.ignore_identical_ids:
        ranked = {query: {doc: score for doc, score in docs.items() if doc != query} for query, docs in ranked.items()}
    measure = _trec_name(task.metadata.main_score)
    per_query = pytrec_eval.RelevanceEvaluator(data["relevant_docs"], {measure}).evaluate(ranked)
    column = measure.replace(".", "_")
    queries = list(data["queries"]["id"])
    values = tuple(float(per_query[query][column]) if query in per_query else 0.0 for query in queries)
    languages = getattr(task, "query_languages", {})
    groups = tuple(languages[query] for query in queries) if languages else ()
    return Items(row["hf_subset"], "mean", values, groups=groups)


def _similarity(task: Any, row: Mapping[str, Any], data: Any, predicted: Any) -> Items:
    return Items(row["hf_subset"], "spearman", _floats(predicted["cosine_scores"]), _floats(data["score"]))


def _pair_classification(task: Any, row: Mapping[str, Any], data: Any, predicted: Any) -> Items:
    name = "cosine_scores" if task.metadata.main_score == "cosine_ap" else "similarity_scores"
    return Items(row["hf_subset"], "average_precision", _floats(predicted[name]), _floats(data[task.label_column_name]))


def _classification(task: Any, row: Mapping[str, Any], data: Any, predicted: Any) -> Items:
    """Share of the experiments that labelled an item rightly."""
    right = np.asarray(predicted) == np.asarray(data[task.label_column_name])  # (experiments, items)
    return Items(row["hf_subset"], "mean", _floats(right.mean(axis=0)))


def _bitext(task: Any, row: Mapping[str, Any], data: Any, predicted: Any) -> Items:
    neighbours = predicted["sentence1-sentence2"]
    return Items(row["hf_subset"], "mean", tuple(float(hit["corpus_id"] == i) for i, hit in enumerate(neighbours)))


def _clustering(task: Any, row: Mapping[str, Any], data: Any, predicted: Any) -> Items:
    """Each of mteb's experiments clusters texts drawn with replacement, the same for every model: a bootstrap sample."""
    values = [value for level in row["v_measures"].values() for value in level]
    embedded = len(data)
    if task.max_document_to_embed is not None:
        embedded = min(embedded, task.max_document_to_embed)
    elif task.max_fraction_of_documents_to_embed is not None:
        embedded = int(task.max_fraction_of_documents_to_embed * embedded)
    factor = task.max_documents_per_cluster / embedded
    return Items(row["hf_subset"], "resampled_mean", _floats(values), variance_factor=factor)


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
