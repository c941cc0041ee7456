"""Scores are right, belong to the model that earned them, and survive a kill."""

import signal
import subprocess
import sys

import mteb
import numpy as np
import pytest
from evaluation_helpers import mixture, parent, small_kit, tiny_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    BinaryClassificationEvaluator,
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    RerankingEvaluator,
)

from hagmoe_hf import sentence
from hagmoe_hf.evaluation import models, runner
from hagmoe_hf.evaluation.kit import find_sets
from hagmoe_hf.evaluation.tasks import local_task

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return {kit_set.kind: kit_set for kit_set in find_sets(small_kit(tmp_path_factory.mktemp("kit")))}


@pytest.fixture(scope="module")
def parent_scores(sets, tmp_path_factory):
    tasks = [local_task(kit_set) for kit_set in sets.values()]
    candidate = models.candidate(parent(), "parent")
    return runner.score_models([candidate], tasks, tmp_path_factory.mktemp("parent"))[0]


@pytest.fixture(scope="module")
def tiny_folders(tmp_path_factory):
    return [str(tiny_model(tmp_path_factory.mktemp(f"tiny{seed}"), seed)) for seed in (0, 1)]


def sentence_pairs(kit_set, third: str) -> tuple[list, list, list]:
    rows = kit_set.read()["test"]
    return tuple([row[field] for row in rows] for field in ("sentence1", "sentence2", third))


def test_sts_is_what_sentence_transformers_says(sets, parent_scores):
    """An adapter that swaps or drops a row still gives a plausible number."""
    first, second, scores = sentence_pairs(sets["sts"], "score")
    expected = EmbeddingSimilarityEvaluator(first, second, scores, main_similarity="cosine")(parent())["spearman_cosine"]
    assert parent_scores["sts.words"].score == pytest.approx(expected, abs=TOLERANCE)


def test_pair_classification_is_what_sentence_transformers_says(sets, parent_scores):
    """As above, for average precision."""
    first, second, labels = sentence_pairs(sets["pair_classification"], "label")
    expected = BinaryClassificationEvaluator(first, second, labels)(parent())["cosine_ap"]
    assert parent_scores["pair_classification.genes"].score == pytest.approx(expected, abs=TOLERANCE)


def test_retrieval_is_what_sentence_transformers_says(sets, parent_scores):
    """As above, for nDCG@10."""
    rows = sets["retrieval"].read()
    queries, corpus = ({row["_id"]: row["text"] for row in rows[name]} for name in ("queries", "corpus"))
    relevant: dict[str, set[str]] = {}
    for row in rows["qrels"]:
        relevant.setdefault(row["query-id"], set()).add(row["corpus-id"])
    expected = InformationRetrievalEvaluator(queries, corpus, relevant, ndcg_at_k=[10])(parent())["cosine_ndcg@10"]
    assert parent_scores["retrieval.papers"].score == pytest.approx(expected, abs=TOLERANCE)


def test_reranking_is_what_sentence_transformers_says(sets, parent_scores):
    """As above, for mean average precision; candidates that queries share are embedded once."""
    rows = sets["reranking"].read()["test"]
    expected = RerankingEvaluator(rows, at_k=20)(parent())["map"]
    assert parent_scores["reranking.leads"].score == pytest.approx(expected, abs=TOLERANCE)


def test_an_untrained_mixture_scores_what_its_parent_scores(sets, parent_scores, tmp_path):
    """The promise of upcycling, on every kind of task: without training nothing changes."""
    tasks = [local_task(kit_set) for kit_set in sets.values()]
    scores = runner.score_models([models.candidate(mixture(), "mixture")], tasks, tmp_path)[0]
    assert set(scores) == set(parent_scores)
    for name, score in scores.items():
        assert score.score == pytest.approx(parent_scores[name].score, abs=TOLERANCE), name


def test_items_make_the_score(sets, parent_scores):
    """The interval is drawn from the items: if they are not those of the score, it belongs to something else."""
    for name in ("retrieval.papers", "reranking.leads", "classification.reviews", "bitext.words", "clustering.topics"):
        score = parent_scores[name]
        assert np.mean(score.items[0].values) == pytest.approx(score.score, abs=TOLERANCE), name
    assert [
        len(parent_scores[f"{kind}.{sets[kind].name}"].items[0].values) for kind in ("retrieval", "reranking", "bitext")
    ] == [
        len(sets["retrieval"].read()["queries"]),
        len(sets["reranking"].read()["test"]),
        len(sets["bitext"].read()["en-es"]),
    ]


def test_languages_are_scored_apart(parent_scores):
    """A mean over languages hides the one that a model cannot read."""
    score = parent_scores["retrieval.papers"]
    assert set(score.languages) == {"en", "fr"}
    assert np.mean(list(score.languages.values())) == pytest.approx(score.score, abs=TOLERANCE)  # 15 queries each
    assert set(parent_scores["bitext.words"].languages) == {"es"}  # English is the other side


def test_two_local_models_keep_their_own_scores(sets, tiny_folders, tmp_path):
    """mteb calls both by the same name, and its cache would give the second one the first one's scores."""
    loaded = [SentenceTransformer(folder, device="cpu") for folder in tiny_folders]
    names = {mteb.models.ModelMeta.from_sentence_transformer_model(model, fill_missing=None).name for model in loaded}
    assert names == {"no_model_name/available"}
    tasks = [local_task(sets[kind]) for kind in ("sts", "pair_classification")]
    candidates = [models.load(folder) for folder in tiny_folders]
    together = runner.score_models(candidates, tasks, tmp_path / "together")
    again = runner.score_models(candidates[::-1], tasks, tmp_path / "together")[::-1]
    apart = [runner.score_models([candidate], tasks, tmp_path / str(i))[0] for i, candidate in enumerate(candidates)]
    for name in together[0]:
        assert together[0][name].score != together[1][name].score
        for i in (0, 1):
            assert together[i][name].score == again[i][name].score == apart[i][name].score


def test_the_fingerprint_is_of_the_model_and_not_of_its_folder(tiny_folders, tmp_path):
    """A moved folder would be computed anew; a model that was trained further in place would keep its old scores."""
    model = SentenceTransformer(tiny_folders[0], device="cpu")
    before = sentence.fingerprint(model)
    model.save_pretrained(str(tmp_path / "elsewhere"))
    model.encode("encoding sets padding in the tokenizer")
    assert sentence.fingerprint(model) == before
    assert sentence.fingerprint(SentenceTransformer(str(tmp_path / "elsewhere"), device="cpu")) == before
    model.prompts = {"query": "query: "}
    assert sentence.fingerprint(model) != before
    model.prompts = SentenceTransformer(tiny_folders[0], device="cpu").prompts
    assert sentence.fingerprint(model) == before
    next(model.parameters()).data[0, 0] += 1e-3
    assert sentence.fingerprint(model) != before


KILLED = """
import os, signal, sys
from pathlib import Path
from hagmoe_hf import files
from hagmoe_hf.evaluation import models, runner
from hagmoe_hf.evaluation.kit import find_sets
from hagmoe_hf.evaluation.tasks import local_task

replace, calls = os.replace, []
def replace_or_die(source, target):
    calls.append(target)
    if len(calls) == 3:  # the third score is written, but not under its name yet
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
files.os.replace = replace_or_die
kit, model, output = sys.argv[1:]
runner.score_models([models.load(model)], [local_task(s) for s in find_sets(kit)], Path(output))
"""


def test_a_kill_loses_one_task_at_most(tiny_folders, tmp_path, monkeypatch):
    """An evaluation of hours on a shared machine is killed sooner or later."""
    kit = small_kit(tmp_path / "kit")
    output = tmp_path / "output"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(kit), tiny_folders[0], str(output)], check=False)
    assert killed.returncode == -signal.SIGKILL
    stored = sorted((output / "scores").glob("*/*.json"))
    assert len(stored) == 2
    before = {path: path.read_bytes() for path in stored}

    ran = []
    run = runner._run
    monkeypatch.setattr(
        runner, "_run", lambda candidate, task, size: ran.append(task.metadata.name) or run(candidate, task, size)
    )
    tasks = [local_task(kit_set) for kit_set in find_sets(kit)]
    scores = runner.score_models([models.load(tiny_folders[0])], tasks, output)[0]
    assert len(scores) == len(tasks)
    assert sorted(ran) == sorted(task.metadata.name for task in tasks[2:])
    assert {path: path.read_bytes() for path in stored} == before


def test_changed_data_are_scored_anew_and_a_broken_score_is_named(sets, tiny_folders, tmp_path):
    """A stored score for data that have changed is a wrong score; a broken file must not be taken for a missing one."""
    kit = small_kit(tmp_path / "kit")
    candidate = models.load(tiny_folders[0])

    def score() -> runner.TaskScore:
        words = next(kit_set for kit_set in find_sets(kit) if kit_set.kind == "sts")
        return runner.score_models([candidate], [local_task(words)], tmp_path / "output")[0]["sts.words"]

    first = score()
    assert score() == first
    rows = (kit / "sts/words/test.jsonl").read_text(encoding="utf-8").splitlines()
    (kit / "sts/words/test.jsonl").write_text("\n".join(rows[:60]) + "\n", encoding="utf-8")
    assert score().score != first.score
    path = next((tmp_path / "output/scores").glob("*/sts.words.json"))
    path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")
    with pytest.raises(ValueError, match=r"sts.words.json: not a score that this version wrote"):
        score()


def test_bm25_ranks_and_does_nothing_else(sets, tmp_path):
    """The baseline that costs nothing: a model that loses to it on a domain should not be bought for it."""
    pytest.importorskip("bm25s")
    tasks = [local_task(kit_set) for kit_set in sets.values()]
    scores = runner.score_models([models.load("bm25")], tasks, tmp_path)[0]
    assert set(scores) == {"retrieval.papers", "reranking.leads"}
    assert all(0.2 < score.score < 1 for score in scores.values())
