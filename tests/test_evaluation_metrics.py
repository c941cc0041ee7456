"""Scores without a task, against values that were worked out by hand."""

import numpy as np
import pytest

from hagmoe_hf.evaluation.metrics import correlations, embedding_statistics, knn_classification, ranking_scores


def test_ranking_scores_are_those_of_the_textbook():
    """A misread @k shifts every figure of a paper's table."""
    ranked = {"q1": {"a": 3.0, "b": 2.0, "c": 1.0}, "q2": {"a": 1.0, "b": 2.0, "c": 3.0}}
    relevant = {"q1": {"a": 1, "c": 1}, "q2": {"a": 1}}
    scores = ranking_scores(ranked, relevant, k=2)
    assert scores["precision@2"] == pytest.approx((1 / 2 + 0) / 2)
    assert scores["recall@2"] == pytest.approx((1 / 2 + 0) / 2)
    assert scores["mrr"] == pytest.approx((1 + 1 / 3) / 2)
    assert scores["map"] == pytest.approx(((1 + 2 / 3) / 2 + 1 / 3) / 2)
    assert scores["ndcg@2"] == pytest.approx((1 / (1 + 1 / np.log2(3))) / 2)
    with pytest.raises(ValueError, match="k=0 is not possible"):
        ranking_scores(ranked, relevant, k=0)
    with pytest.raises(ValueError, match="none of them judged"):
        ranking_scores({"q9": {"a": 1.0}}, relevant, k=1)


def test_nearest_neighbours_go_by_direction_not_by_length():
    """Vectors of models without a final normalisation differ in length for no good reason."""
    train = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]])
    scores = knn_classification(train, ["x", "x", "y", "y"], np.array([[50, 1], [0.01, 0.2], [3, 2]]), ["x", "y", "y"], k=1)
    assert scores.accuracy == pytest.approx(2 / 3)
    assert scores.precision == pytest.approx((1 / 2 + 1) / 2)
    assert scores.recall == pytest.approx((1 + 1 / 2) / 2)
    assert scores.f1 == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="k=5 is not possible; allowed: 1 to 4"):
        knn_classification(train, ["x", "x", "y", "y"], train, ["x", "x", "y", "y"], k=5)


def test_correlations_tell_line_from_order():
    """Spearman sees order only, Pearson the line."""
    scores = correlations([1, 2, 3, 4], [1, 8, 27, 64])
    assert scores.spearman == pytest.approx(1)
    assert scores.pearson == pytest.approx(0.9514, abs=1e-4)


def test_statistics_of_two_known_clouds():
    """Collapse (all vectors alike) and evenness are what the figures are read for."""
    even = embedding_statistics(np.vstack([np.eye(8), -np.eye(8)]))
    assert even.cosine_mean == pytest.approx(-1 / 15)
    assert even.effective_rank == pytest.approx(8)
    assert even.norm_mean == 1
    assert even.uniformity == pytest.approx(np.log((112 * np.exp(-4) + 8 * np.exp(-8)) / 120))
    collapsed = embedding_statistics(np.ones((5, 8)), positives=np.ones((5, 8)) * 2)
    assert collapsed.cosine_mean == pytest.approx(1)
    assert collapsed.cosine_percentiles["1"] == pytest.approx(1)
    assert collapsed.effective_rank == 0
    assert collapsed.uniformity == pytest.approx(0, abs=1e-12)
    assert collapsed.alignment == pytest.approx(0)


def test_nan_is_counted_and_left_out():
    """One NaN in 10,000 vectors would turn every figure into NaN, and hide which model has it."""
    vectors = np.eye(4)
    broken = np.vstack([vectors, np.full((1, 4), np.nan)])
    clean, with_nan = embedding_statistics(vectors), embedding_statistics(broken)
    assert (with_nan.nan_count, with_nan.count) == (1, 5)
    assert with_nan.uniformity == clean.uniformity
    with pytest.raises(ValueError, match="3 of them with NaN; allowed: at least 2"):
        embedding_statistics(np.vstack([np.full((3, 4), np.nan), np.ones((1, 4))]))
    with pytest.raises(ValueError, match=r"allowed: \(4, 4\)"):
        embedding_statistics(vectors, positives=np.eye(3))
