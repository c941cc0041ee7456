"""What is evaluated: the sets of a local folder, or named tasks and benchmarks of the Hub, all as real mteb tasks."""

import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from .kit import UNDETERMINED, UNSTATED, KitSet
from .mteb_api import (
    AbsTask,
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskReranking,
    AbsTaskRetrieval,
    AbsTaskSTS,
    Dataset,
    DatasetDict,
    TaskMetadata,
    mteb,
)

# What mteb calls the languages that people write as two letters; anything else is written as mteb does, like "eng-Latn".
LANGUAGES = {
    "ar": "ara-Arab", "ca": "cat-Latn", "cs": "ces-Latn", "da": "dan-Latn", "de": "deu-Latn", "el": "ell-Grek",
    "en": "eng-Latn", "es": "spa-Latn", "fi": "fin-Latn", "fr": "fra-Latn", "he": "heb-Hebr", "hi": "hin-Deva",
    "hu": "hun-Latn", "id": "ind-Latn", "it": "ita-Latn", "ja": "jpn-Jpan", "ko": "kor-Hang", "nl": "nld-Latn",
    "no": "nor-Latn", "pl": "pol-Latn", "pt": "por-Latn", "pt_BR": "por-Latn", "ro": "ron-Latn", "ru": "rus-Cyrl",
    "sv": "swe-Latn", "th": "tha-Thai", "tr": "tur-Latn", "uk": "ukr-Cyrl", "vi": "vie-Latn", "zh": "zho-Hans",
    "zh_CN": "zho-Hans", "zh_TW": "zho-Hant", UNDETERMINED: "und-Zyyy",
}  # fmt: skip
CODES = {code: short for short, code in reversed(LANGUAGES.items())}


def language_code(language: str) -> str:
    """mteb's code of a language, like "por-Latn" for "pt_BR".

    Raises:
        ValueError: Neither a short name of `LANGUAGES` nor a code that mteb knows.
    """
    code = LANGUAGES.get(language, language)
    try:
        mteb.languages.check_language_code(code)
    except ValueError as error:
        raise ValueError(
            f"language={language!r} is not possible; allowed: one of {sorted(LANGUAGES)}, or a code of mteb like 'eng-Latn'."
        ) from error
    return code


class LocalTask:
    """What makes an mteb task read a local set; the mteb class that it is mixed into does all the rest."""

    kit_set: KitSet
    dataset: Any
    data_loaded: bool

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """Read the set, once."""
        if not self.data_loaded:
            self.dataset = _DATASETS[self.kit_set.kind](self.kit_set)
            self.data_loaded = True


def local_task(kit_set: KitSet, seed: int = 42) -> AbsTask:
    """Make the mteb task of a local set.

    Args:
        kit_set: From `kit.find_sets`.
        seed: Draws training samples (classification) and texts (clustering).

    Returns:
        A task named KIND.SET that `mteb.evaluate` runs as any other.

    Raises:
        ValueError: mteb does not know a language of the set.
    """
    base, task_type, category, main_score = _BASES[kit_set.kind]
    codes = [language_code(language) for language in kit_set.languages]
    metadata = TaskMetadata(
        name=f"{kit_set.kind}.{kit_set.name}",
        description=f"Local evaluation set {kit_set.key}. Licence: {kit_set.licence}.",
        dataset={"path": kit_set.key, "revision": kit_set.fingerprint},
        type=task_type,
        category=category,
        eval_langs=_bitext_languages(kit_set) if kit_set.kind == "bitext" else codes,
        main_score=main_score,
    )
    attributes: dict[str, Any] = {"metadata": metadata, "kit_set": kit_set}
    if kit_set.kind == "sts":
        scores = [row["score"] for row in kit_set.read()["test"]]
        attributes |= {"min_score": min(scores), "max_score": max(scores)}
    if kit_set.kind == "retrieval":
        attributes["query_languages"] = {row["_id"]: row["lang"] for row in kit_set.read()["queries"] if "lang" in row}
    if kit_set.kind == "clustering":
        attributes["max_fraction_of_documents_to_embed"] = None  # mteb's default is a 25th: too few texts here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # mteb 2 asks new reranking tasks to be retrieval tasks
        return type(kit_set.name, (LocalTask, base), attributes)(seed=seed)


def hub_tasks(names: Sequence[str], benchmark: str | None = None) -> list[AbsTask]:
    """Tasks of mteb by name, and those of a benchmark; their data come from the Hub when they run.

    Args:
        names: Like "STSBenchmark".
        benchmark: Like "MTEB(eng, v2)".

    Raises:
        ValueError: mteb knows no such task or benchmark.
    """
    tasks: list[AbsTask] = []
    try:
        for name in names:
            tasks.append(mteb.get_task(name))
        if benchmark is not None:
            tasks.extend(mteb.get_benchmark(benchmark).tasks)
    except KeyError as error:
        raise ValueError(f"{error.args[0]} Allowed: a set of the kit as KIND/SET, or a name that mteb knows.") from error
    return tasks


def domain(task: AbsTask) -> str:
    """The domain of a local set, or the first one that mteb states."""
    if isinstance(task, LocalTask):
        return task.kit_set.domain
    return task.metadata.domains[0].lower() if task.metadata.domains else UNSTATED


def display_name(task_name: str) -> str:
    """KIND/SET for a local task, mteb's name for any other."""
    return task_name.replace(".", "/", 1)


def _bitext_languages(kit_set: KitSet) -> dict[str, list[str]]:
    return {name: [language_code(language) for language in name.split("-")] for name in kit_set.files}


def _bitext(kit_set: KitSet) -> dict[str, DatasetDict]:
    columns = ("sentence1", "sentence2")
    return {
        name: DatasetDict(test=Dataset.from_list([{column: row[column] for column in columns} for row in rows]))
        for name, rows in kit_set.read().items()
    }


def _classification(kit_set: KitSet) -> DatasetDict:
    splits = kit_set.read()
    number = {label: i for i, label in enumerate(sorted({row["label"] for row in splits["train"]}, key=str))}
    return DatasetDict(
        {
            split: Dataset.from_list([{"text": row["text"], "label": number[row["label"]]} for row in rows])
            for split, rows in splits.items()
        }
    )


def _clustering(kit_set: KitSet) -> DatasetDict:
    rows = kit_set.read()["test"]
    return DatasetDict(test=Dataset.from_list([{"sentences": row["text"], "labels": row["label"]} for row in rows]))


def _pair_classification(kit_set: KitSet) -> DatasetDict:
    rows = kit_set.read()["test"]
    columns = [{"sentence1": row["sentence1"], "sentence2": row["sentence2"], "labels": row["label"]} for row in rows]
    return DatasetDict(test=Dataset.from_list(columns))


def _sts(kit_set: KitSet) -> DatasetDict:
    rows = kit_set.read()["test"]
    return DatasetDict(test=Dataset.from_list([{**row, "score": float(row["score"])} for row in rows]))


def _retrieval(kit_set: KitSet) -> dict[str, dict[str, Any]]:
    rows = kit_set.read()
    relevant: dict[str, dict[str, int]] = defaultdict(dict)
    for row in rows["qrels"]:
        relevant[row["query-id"]][row["corpus-id"]] = int(row["score"])
    return _search_data(
        corpus={row["_id"]: row["text"] for row in rows["corpus"]},
        queries={row["_id"]: row["text"] for row in rows["queries"]},
        relevant=dict(relevant),
        candidates=None,
    )


def _reranking(kit_set: KitSet) -> dict[str, dict[str, Any]]:
    """Equal candidates of different queries are one document, so that each is embedded once."""
    document_ids: dict[str, str] = {}
    queries, relevant, candidates = {}, {}, {}
    for number, row in enumerate(kit_set.read()["test"]):
        query_id = f"q{number}"
        queries[query_id] = row["query"]
        ids = {text: document_ids.setdefault(text, f"d{len(document_ids)}") for text in (*row["positive"], *row["negative"])}
        candidates[query_id] = list(ids.values())
        relevant[query_id] = {ids[text]: int(text in row["positive"]) for text in ids}
    corpus = {document_id: text for text, document_id in document_ids.items()}
    return _search_data(corpus, queries, relevant, candidates)


def _search_data(
    corpus: dict[str, str],
    queries: dict[str, str],
    relevant: dict[str, dict[str, int]],
    candidates: dict[str, list[str]] | None,
) -> dict[str, dict[str, Any]]:
    data = {
        "corpus": Dataset.from_list([{"id": key, "text": text} for key, text in corpus.items()]),
        "queries": Dataset.from_list([{"id": key, "text": text} for key, text in queries.items()]),
        "relevant_docs": relevant,
        "top_ranked": candidates,
    }
    return {"default": {"test": data}}


_DATASETS = {
    "bitext": _bitext,
    "classification": _classification,
    "clustering": _clustering,
    "pair_classification": _pair_classification,
    "reranking": _reranking,
    "retrieval": _retrieval,
    "sts": _sts,
}
_BASES: dict[str, tuple[Any, Any, Any, str]] = {  # mteb's class, its name for the type, category, main score
    "bitext": (AbsTaskBitextMining, "BitextMining", "t2t", "accuracy"),
    "classification": (AbsTaskClassification, "Classification", "t2c", "accuracy"),
    "clustering": (AbsTaskClustering, "Clustering", "t2c", "v_measure"),
    "pair_classification": (AbsTaskPairClassification, "PairClassification", "t2t", "similarity_ap"),
    "reranking": (AbsTaskReranking, "Reranking", "t2t", "map_at_1000"),
    "retrieval": (AbsTaskRetrieval, "Retrieval", "t2t", "ndcg_at_10"),
    "sts": (AbsTaskSTS, "STS", "t2t", "cosine_spearman"),
}
