"""A difference is called clear when it is, and not when it is luck."""

import numpy as np
import pytest

from hagmoe_hf.evaluation.compare import compare
from hagmoe_hf.evaluation.items import Items
from hagmoe_hf.evaluation.runner import TaskScore


def task_score(items: Items, score: float, task: str = "t", domain: str = "d") -> TaskScore:
    return TaskScore("m", task, "r", "v", "Retrieval", domain, "metric", score, {"en": score}, (items,), 0.0, {})


def mean_score(values: np.ndarray, **names: str) -> TaskScore:
    return task_score(Items("default", "mean", tuple(map(float, values))), float(np.mean(values)), **names)


def test_equal_models_differ_by_nothing():
    """An untrained mixture is its parent: a table that showed a difference would be noise."""
    values = np.random.default_rng(0).random(50)
    gap = compare({"t": mean_score(values)}, {"t": mean_score(values)}).macro
    assert (gap.value, gap.low, gap.high, gap.is_clear) == (0, 0, 0, False)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """An interval that is too narrow makes people switch models for luck."""
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(200):
        hard = rng.normal(size=80)  # how hard an item is, for both models
        ours, theirs = hard + rng.normal(0.1, 0.3, 80), hard + rng.normal(0, 0.3, 80)
        gap = compare({"t": mean_score(ours)}, {"t": mean_score(theirs)}, resamples=200, seed=trial).macro
        held += gap.low <= 0.1 <= gap.high
    assert 0.90 <= held / 200 <= 0.985


def test_pairing_sees_what_separate_draws_would_not():
    """Items differ far more than models do; without pairing no difference would ever be clear."""
    rng = np.random.default_rng(2)
    hard = rng.normal(size=200)
    ours, theirs = hard + 0.05 + rng.normal(0, 0.05, 200), hard
    gap = compare({"t": mean_score(ours)}, {"t": mean_score(theirs)}).macro
    assert gap.is_clear
    assert gap.high - gap.low < 0.2 * 4 * hard.std() / np.sqrt(200)


@pytest.mark.parametrize("statistic", ["spearman", "average_precision"])
def test_scores_that_are_no_means_are_recomputed_on_every_draw(statistic):
    """The mean of similarities is no score: Spearman and average precision have to be taken again."""
    rng = np.random.default_rng(3)
    gold = (rng.random(150) > 0.5).astype(float) if statistic == "average_precision" else rng.random(150)
    good, bad = gold + rng.normal(0, 0.3, 150), gold + rng.normal(0, 2.0, 150)
    entries = [
        task_score(Items("default", statistic, tuple(map(float, v)), tuple(map(float, gold))), 0.0) for v in (good, bad)
    ]
    gap = compare({"t": entries[0]}, {"t": entries[1]}, resamples=200).macro
    assert gap.low > 0.05
    assert gap.high < 1


def test_a_clustering_interval_is_as_wide_as_its_samples_are_small():
    """mteb may draw 16,384 of 1,000 texts: their spread is smaller than that of the texts themselves."""

    def gap(factor: float):
        rng = np.random.default_rng(4)
        ours, theirs = (Items("default", "resampled_mean", tuple(rng.random(10)), variance_factor=factor) for _ in range(2))
        return compare({"t": task_score(ours, 0.5)}, {"t": task_score(theirs, 0.5)}).macro

    assert (gap(16).high - gap(16).low) == pytest.approx(4 * (gap(1).high - gap(1).low))


def test_means_over_tasks_get_the_interval_of_their_tasks():
    """The macro average decides, so it needs an interval, too; a domain averages its own tasks only."""
    rng = np.random.default_rng(5)
    ours = {
        name: mean_score(rng.random(40), task=name, domain=domain) for name, domain in (("a", "x"), ("b", "x"), ("c", "y"))
    }
    theirs = {name: mean_score(rng.random(40), task=name, domain=ours[name].domain) for name in ours}
    comparison = compare(ours, theirs)
    assert comparison.macro.value == pytest.approx(np.mean([gap.value for gap in comparison.tasks.values()]))
    assert comparison.domains["y"] == comparison.tasks["c"]
    widths = [gap.high - gap.low for gap in comparison.tasks.values()]
    assert comparison.macro.high - comparison.macro.low < min(widths)


def test_a_task_without_items_has_no_interval_and_neither_has_its_mean():
    """An interval that leaves a task out would look like one of the whole."""
    plain = TaskScore("m", "t", "r", "v", "Summarization", "d", "metric", 0.5, {}, (), 0.0, {})
    comparison = compare({"t": plain}, {"t": plain})
    assert (comparison.macro.low, comparison.tasks["t"].high) == (None, None)


def test_different_items_and_no_common_task_are_refused():
    """Scores on different data have no paired difference."""
    with pytest.raises(ValueError, match="3 and 4 items"):
        compare({"t": mean_score(np.ones(3))}, {"t": mean_score(np.ones(4))})
    with pytest.raises(ValueError, match="none in common"):
        compare({"t": mean_score(np.ones(3))}, {"u": mean_score(np.ones(3))})
