"""Local sets are real mteb tasks."""

import subprocess
import sys

import mteb
import pytest
from evaluation_helpers import small_kit, tiny_model
from mteb.abstasks import AbsTask
from sentence_transformers import SentenceTransformer

from hagmoe_hf.evaluation.kit import KINDS, find_sets
from hagmoe_hf.evaluation.tasks import hub_tasks, language_code, local_task


def test_every_kind_runs_through_stock_mteb_twice(tmp_path):
    """Who has an mteb script puts these tasks into it; mteb unloads a task's data after each run."""
    sets = find_sets(small_kit(tmp_path / "kit"))
    assert {kit_set.kind for kit_set in sets} == set(KINDS)
    tasks = [local_task(kit_set) for kit_set in sets]
    assert all(isinstance(task, AbsTask) for task in tasks)
    model = SentenceTransformer(str(tiny_model(tmp_path / "tiny", seed=0)), device="cpu")
    first, again = (mteb.evaluate(model, tasks, cache=None, show_progress_bar=False) for _ in range(2))
    assert [result.task_name for result in first.task_results] == [f"{kit_set.kind}.{kit_set.name}" for kit_set in sets]
    for one, other in zip(first.task_results, again.task_results, strict=True):
        assert -1 <= one.get_score() <= 1
        if not one.task_name.startswith("clustering"):  # mteb goes on in the task's random stream
            assert one.get_score() == pytest.approx(other.get_score(), abs=1e-9)


def test_queries_keep_their_language(tmp_path):
    """Otherwise a cross-lingual set could not say which language is weak."""
    papers = next(kit_set for kit_set in find_sets(small_kit(tmp_path)) if kit_set.kind == "retrieval")
    assert papers.languages == ("en", "fr")
    assert set(local_task(papers).query_languages.values()) == {"en", "fr"}


def test_languages_are_mtebs_or_refused():
    """mteb's own error for a wrong code names none of the short forms that kits use."""
    assert language_code("pt_BR") == "por-Latn"
    assert language_code("tam-Taml") == "tam-Taml"
    with pytest.raises(ValueError, match=r"language='english' is not possible; allowed: one of \['ar'"):
        language_code("english")


def test_names_of_the_hub_go_to_mteb():
    """People who are online want the tasks that papers report."""
    names = [task.metadata.name for task in hub_tasks(["STSBenchmark", "NFCorpus"], "MTEB(eng, v2)")]
    assert names[:2] == ["STSBenchmark", "NFCorpus"]
    assert "ArguAna" in names
    with pytest.raises(ValueError, match="NoSuchTask"):
        hub_tasks(["NoSuchTask"])


@pytest.mark.parametrize("module", ["tasks", "command"])
def test_without_mteb_the_error_says_what_to_install(module):
    """`pip install hagmoe_hf` alone must not end in a bare ModuleNotFoundError."""
    code = f"import sys; sys.modules['mteb'] = None; import hagmoe_hf.evaluation.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install hagmoe_hf[eval]" in done.stderr.splitlines()[-1]
