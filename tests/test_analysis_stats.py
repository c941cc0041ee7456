"""Every statistic is held to cases whose answer is known without a computer, and to what must hold for any counts."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hagmoe_hf.analysis import stats
from hagmoe_hf.training import monitor

EXPERTS = 4
SPECIALISED = np.eye(EXPERTS, dtype=np.int64) * 10  # each label has its own expert
UNIFORM = np.full((EXPERTS, EXPERTS), 10)
ONE_DEAD = np.array([[10, 10, 10, 0]] * 3)

some_counts = arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(2, 6)), elements=st.integers(0, 50))


def starts(lengths) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def test_counts_are_of_each_text_and_of_every_choice():
    index = np.array([[0, 1], [0, 2], [3, 1]])
    counts = stats.counts_per_text(index, starts([2, 0, 1]), EXPERTS)
    assert counts.tolist() == [[2, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]]
    assert stats.counts_per_label(counts, np.array([1, 1, 0]), 2).tolist() == [[0, 1, 0, 1], [2, 1, 1, 0]]
    assert stats.group_counts(counts, 2).tolist() == [[3, 1], [0, 0], [1, 1]]


def test_load_of_the_three_known_cases():
    """Uniform, one expert for all, and one dead: a report's first sentence rests on these."""
    uniform, single, dead = np.array([5, 5, 5, 5]), np.array([0, 9, 0, 0]), ONE_DEAD[0]
    loads = np.stack([uniform, single, dead])
    assert stats.load_entropy(loads) == pytest.approx([1, 0, np.log2(3) / 2])
    assert stats.effective_experts(loads) == pytest.approx([4, 1, 3])
    assert stats.coefficient_of_variation(loads) == pytest.approx([0, np.sqrt(3), np.sqrt(1 / 3)])
    assert stats.max_violation(loads) == pytest.approx([0, 3, 1 / 3])
    assert stats.dead_experts(loads).tolist() == [0, 3, 1]


@given(some_counts)
def test_the_report_and_the_training_log_compute_the_same(counts):
    """Two numbers of one name that differ would send a user looking for a bug of theirs."""
    counts = counts[counts.sum(axis=1) > 0]
    theirs = torch.from_numpy(counts).double()
    assert stats.max_violation(counts) == pytest.approx(monitor.max_violation(theirs).numpy())
    assert stats.load_entropy(counts) == pytest.approx(monitor.load_entropy(theirs).numpy())
    assert (stats.dead_experts(counts) == monitor.dead_experts(theirs).numpy()).all()


def test_specialization_against_the_uniform_line():
    assert stats.specialization(SPECIALISED) == pytest.approx(EXPERTS * np.eye(EXPERTS))
    assert stats.specialization(UNIFORM) == pytest.approx(np.ones((EXPERTS, EXPERTS)))
    assert (stats.specialization(ONE_DEAD)[:, 3] == 0).all()


def test_mutual_information_of_known_cases():
    assert stats.mutual_information(SPECIALISED) == pytest.approx(2)  # log2 of 4 labels
    assert stats.mutual_information(UNIFORM) == pytest.approx(0)
    assert stats.mutual_information(ONE_DEAD) == pytest.approx(0)
    assert stats.mutual_information(np.array([[3, 0], [0, 1]])) == pytest.approx(-0.75 * np.log2(0.75) + 0.5)
    assert stats.mutual_information(np.zeros((2, 2))) == 0


@given(some_counts)
def test_mutual_information_keeps_its_bounds(joint):
    """I(expert; label) is at most either entropy, and merging experts into groups cannot add to it."""
    bits = stats.mutual_information(joint)
    assert 0 <= bits <= stats.entropy(stats.share(joint.sum(axis=0))) + 1e-9
    assert bits <= stats.entropy(stats.share(joint.sum(axis=1))) + 1e-9 or joint.sum() == 0
    if joint.shape[1] % 2 == 0:
        assert stats.mutual_information(stats.group_counts(joint, joint.shape[1] // 2)) <= bits + 1e-9
    label_shares = stats.share(joint.sum(axis=1))
    assert bits <= stats.information_bound(label_shares, joint.shape[1]) + 1e-9


def test_labels_that_decide_the_expert_are_above_chance_and_random_ones_are_not():
    """The baseline is what keeps a report from praising noise."""
    random = np.random.default_rng(0)
    labels = random.integers(0, EXPERTS, size=60)
    decided = np.eye(EXPERTS, dtype=np.int64)[labels] * 20
    information = stats.label_information(decided, labels)
    assert information.is_above_chance
    assert information.bits == pytest.approx(information.label_entropy)
    assert information.explained > 0.8
    # One expert per text, whatever the label: by single tokens this would look highly significant
    noise = stats.label_information(np.eye(EXPERTS, dtype=np.int64)[random.integers(0, EXPERTS, size=60)] * 20, labels)
    assert not noise.is_above_chance
    assert noise.bits == pytest.approx(noise.baseline, abs=0.1)
    assert noise.baseline > 0.05


def test_one_label_tells_nothing():
    information = stats.label_information(UNIFORM, np.zeros(EXPERTS, dtype=np.int64))
    assert information.bits == pytest.approx(0)
    assert not information.is_above_chance
    assert information.explained == 0


def test_a_router_by_token_id_is_known_from_one_by_text_or_by_position():
    random = np.random.default_rng(1)
    lengths = random.integers(5, 15, size=80)
    start = starts(lengths)
    token = random.integers(0, EXPERTS, size=start[-1])
    position = np.arange(start[-1]) - np.repeat(start[:-1], lengths)
    by_token = token[:, None]
    assert stats.token_information(by_token, token, start, EXPERTS).explained > 0.9
    assert not stats.token_information(by_token, position, start, EXPERTS).is_above_chance
    assert stats.token_information(position[:, None] % EXPERTS, position, start, EXPERTS).explained > 0.3
    # Words that a text repeats, experts by text: related only through the texts, so shuffling single tokens would be fooled
    words = np.repeat(random.integers(0, 20, size=80), lengths)
    by_text = np.repeat(random.integers(0, EXPERTS, size=80), lengths)[:, None]
    information = stats.token_information(by_text, words, start, EXPERTS, shuffles=99)
    assert information.bits > 0.1
    assert information.bits < 1.5 * information.baseline


def test_jensen_shannon_of_known_cases():
    assert stats.jensen_shannon(SPECIALISED) == pytest.approx(1 - np.eye(EXPERTS))
    assert stats.jensen_shannon(UNIFORM) == pytest.approx(np.zeros((EXPERTS, EXPERTS)))


@given(some_counts)
def test_jensen_shannon_is_symmetric_and_bounded(counts):
    divergence = stats.jensen_shannon(counts)
    assert divergence == pytest.approx(divergence.T)
    assert (np.diag(divergence) == 0).all()
    assert divergence.min() >= 0
    assert divergence.max() <= 1


def test_coactivation_of_one_layer_and_of_two():
    pairs = np.array([[0, 1], [0, 1], [0, 2], [2, 3]])
    within = stats.coactivation(pairs, pairs, EXPERTS)
    assert np.diag(within) == pytest.approx(np.ones(EXPERTS))
    assert within[0] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    one = np.array([[0], [0], [1]])
    across = stats.coactivation(one, np.array([[2], [3], [2]]), EXPERTS)
    assert across[0] == pytest.approx([0, 0, 0.5, 0.5])
    assert across[3].sum() == 0  # never chosen


def test_consistency_within_texts_of_known_cases():
    assert stats.consistency(SPECIALISED) == pytest.approx((1, 0.25))
    within, overall = stats.consistency(np.full((3, EXPERTS), 1000))
    assert within == pytest.approx(0.25, abs=1e-3)
    assert overall == pytest.approx(0.25)
    assert stats.consistency(np.array([[1, 0], [0, 1]])) == (0, 0.5)  # single tokens have no other to agree with


def test_saturation_counts_choices_that_stay():
    early, late = np.array([[0, 1], [2, 3]]), np.array([[1, 0], [0, 3]])
    assert stats.saturation(early, early) == 1
    assert stats.saturation(early, late) == 0.75
    assert stats.saturation(np.array([[0]]), np.array([[1]])) == 0


@given(arrays(np.float64, (12, 3), elements=st.integers(-9, 9)), st.integers(0, 99))
def test_cka_ignores_rotation_and_scale(x, seed):
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    other = stats.linear_cka(x, 7 * x @ rotation)
    varies = np.ptp(x, axis=0).any()
    assert other == pytest.approx(1.0 if varies else 0.0)


def test_cka_of_unrelated_outputs_is_low():
    x, y = np.random.default_rng(0).normal(size=(2, 4000, 4))
    assert stats.linear_cka(x, y) < 0.01


def test_drift_of_known_cases():
    vectors = np.random.default_rng(0).normal(size=(6, 5))
    assert stats.drift(vectors, 3 * vectors) == pytest.approx(0)
    assert stats.drift(vectors, -vectors) == pytest.approx(2)


def test_pairs_agree_with_positives_and_not_with_negatives():
    choice, pairs = np.array([0, 0, 1, 1, 2, 2]), np.array([[0, 1], [2, 3], [4, 5]])
    assert stats.pair_agreement(choice, pairs) == (1, 0)
    assert stats.pair_agreement(np.zeros(6, dtype=int), pairs) == (1, 1)
    assert stats.pair_agreement(choice, pairs[:1]) == (1, 0)
    assert stats.pair_agreement(np.array([0, 1, 1, 0]), pairs[:2]) == (0, 1)


def test_neighbours_of_separated_labels_are_pure():
    labels = np.repeat([0, 1], 10)
    features = np.eye(2)[labels] + 0.01 * np.random.default_rng(0).normal(size=(20, 2))
    assert stats.neighbour_purity(features, labels) == pytest.approx((1, 9 / 19))
    mixed, chance = stats.neighbour_purity(np.random.default_rng(1).normal(size=(400, 8)), np.repeat([0, 1], 200))
    assert mixed == pytest.approx(chance, abs=0.1)
