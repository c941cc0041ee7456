"""What is due, what the goal says, and the tables: the part of the apparatus that runs no model."""

import dataclasses

import pytest
from ablation import results
from ablation.arms import DENSE, HAG, Arm
from ablation.budgets import Budget
from ablation.goal import Difference, difference, kit_parts, verdict
from ablation.report import crossover, curve_gains, runs_of, table

TINY_BUDGET = Budget("tiny", 8, 6, 16, (1e-3,), (0, 1), 10, 2, calibration_pairs=20)


def result(
    arm: Arm, seed: int, gain: float, kit: float | None = None, rate: float = 1e-4, budget: Budget = TINY_BUDGET
) -> dict:
    """A result file as a run writes it, whose held-out MRR is .5 plus `gain`, and half of that in the middle."""
    curve = [
        {
            "step": step,
            "pairs": step * 48,
            "dev_mrr": {"a": 0.5 + part * gain, "b": 0.5 + part * gain},
            "routing": {},
            "loss": 1,
        }
        for step, part in ((0, 0), (75, 0.5), (150, 1))
    ]
    scores = None if kit is None else {"sts.words": {"score": kit, "languages": {"en": kit}}}
    return {
        "arm": dataclasses.asdict(arm), "seed": seed, "learning_rate": rate, "curve": curve, "kit": scores, "seconds": 9.0,
        "parameters": {"total": 2e6, "active": 1e6}, "device": "CPU", "versions": {}, "date": "2026", "command": "c",
        "commit": "x", "budget": dataclasses.asdict(budget),
    }  # fmt: skip


def test_what_is_due_is_the_grid_first_then_seeds_at_the_best_rate():
    budget = dataclasses.replace(TINY_BUDGET, learning_rates=(1e-4, 2e-4), seeds=(0, 1))
    arms = (DENSE, HAG)
    done = {}
    order = []
    while todo := results.due(arms, budget, done):
        arm, rate, seed = todo[0]
        order.append((arm.name, rate, seed))
        better = 0.2 if (arm.name, rate) in (("dense", 1e-4), ("hag", 2e-4)) else 0.1
        done[results.run_name(arm, rate, seed)] = result(arm, seed, better, rate=rate)
    assert order == [
        ("dense", 1e-4, 0), ("dense", 2e-4, 0), ("hag", 1e-4, 0), ("hag", 2e-4, 0), ("dense", 1e-4, 1), ("hag", 2e-4, 1),
    ]  # fmt: skip
    assert runs_of(HAG, budget, done)[1]["learning_rate"] == 2e-4


@pytest.mark.parametrize(
    ("gain", "parts", "sets", "expected"),
    [
        (None, {}, {}, "no kit scores: no verdict"),
        (Difference(1.5, 0.1, 2), {}, {}, "2 of 3 seeds: no verdict"),
        (Difference(1.5, 0.1, 3), {"a": -0.4}, {}, "**yes**"),
        (Difference(0.9, 0.1, 3), {}, {}, "no: gain under +1.0"),
        (Difference(1.5, 0.8, 3), {}, {}, "no: within 2 sd"),
        (Difference(1.5, 0.1, 3), {"a": 1.0, "b": -0.6, "c": -0.7}, {"b": -0.6}, "no: c -0.70"),
        (Difference(1.5, 0.1, 3), {"b": -0.6}, {"b": -0.6}, "no: b -0.60"),
        (Difference(1.5, 0.1, 3), {"a": -0.1}, {"a1": -0.6, "a2": 0.4, "a3": -2.0}, "**yes** (sets: a3 -2.00, a1 -0.60)"),
    ],
)
def test_the_verdict_is_the_goals(gain, parts, sets, expected):
    """+1.0 on the macro average, over twice the deviation, no domain or language worse by more than 0.5, three seeds."""
    parts, sets = ({name: Difference(mean, 0, 3) for name, mean in of.items()} for of in (parts, sets))
    assert verdict(gain, parts, sets, 3) == expected


def test_sets_of_the_same_texts_are_one_domain():
    """Two tasks over one collection say the same of it, each with its own noise; languages stay apart."""
    scores = {"reranking.faq_tech": 0.8, "retrieval.faq_tech": 0.7, "retrieval.debian_faq_xlingual": 0.4}
    kit = {name: {"score": score, "languages": {"en": score}} for name, score in scores.items()}
    expected = {"questions about software, English": 75, "retrieval.debian_faq_xlingual": 40, "language en": 190 / 3}
    assert kit_parts({"kit": kit}) == pytest.approx(expected)
    assert kit_parts({"kit": None}) == {}


def test_a_crossover_is_where_the_gain_takes_the_side_on_which_it_ends():
    assert crossover([(0, 0.0), (1, -1.0), (2, 0.5), (3, -0.1), (4, 0.2), (5, 0.3)]) == (4, True)
    assert crossover([(0, 0.0), (1, 0.1), (2, 0.2)]) is None
    assert crossover([(0, 0.5), (1, 0.1), (2, -0.2)]) == (2, False)
    assert crossover([(0, 0.0)]) is None


def test_tables_pair_runs_by_seed(tmp_path):
    """Seeds differ by more than arms do: only differences within a seed count."""
    done = {}
    budget = dataclasses.replace(TINY_BUDGET, learning_rates=(1e-4,), seeds=(0, 1, 2), steps=150)
    for seed, luck in enumerate((0.0, 0.1, 0.2)):
        done[results.run_name(DENSE, 1e-4, seed)] = result(DENSE, seed, luck, kit=0.5 + luck)
        done[results.run_name(HAG, 1e-4, seed)] = result(HAG, seed, luck + 0.02 + seed / 1000, kit=0.52 + luck + seed / 1000)
    dense, hag = (runs_of(arm, budget, done) for arm in (DENSE, HAG))
    pairs_seen, gain = zip(*curve_gains(hag, dense), strict=True)
    assert pairs_seen == (0, 75 * 48, 150 * 48)
    assert gain == pytest.approx((0, 1.05, 2.1))
    text = table(1, [DENSE, HAG], budget, done, {})
    row = next(line for line in text.splitlines() if line.startswith("| hag "))
    assert row.count("+2.10 ± 0.10") == 2
    assert row.endswith("**yes** |")
    assert kit_parts(done[results.run_name(HAG, 1e-4, 0)]) == {"sts.words": 52.0, "language en": 52.0}
    assert str(difference([1.0])) == "+1.00"
    done[results.run_name(HAG, 1e-4, 0)]["kit"] = None
    row = next(line for line in table(1, [DENSE, HAG], budget, done, {}).splitlines() if line.startswith("| hag "))
    assert "+2.15 ± 0.07 (2 of 3 seeds)" in row, "a run without kit scores must not hide the others'"
    assert row.endswith("2 of 3 seeds: no verdict |")


def test_domains_that_were_left_out_have_columns_of_their_own():
    """What training costs elsewhere must not be averaged into what it gains."""
    budget = dataclasses.replace(TINY_BUDGET, learning_rates=(1e-4,), seeds=(0,), left_out=("b",))
    done = {results.run_name(arm, 1e-4, 0): result(arm, 0, 0.1, budget=budget) for arm in (DENSE, HAG)}
    done[results.run_name(HAG, 1e-4, 0)]["curve"][-1]["dev_mrr"] = {"a": 0.63, "b": 0.58}
    rows = [line.split(" | ") for line in table(1, [DENSE, HAG], budget, done, {}).splitlines() if " | " in line]
    headings, dense, hag = rows[:3]
    trained, left_out = headings.index("held-out MRR"), headings.index("left-out MRR")
    assert (dense[trained], dense[left_out]) == ("60.00", "60.00")
    assert hag[trained : trained + 2] == ["63.00", "+3.00"]
    assert hag[left_out : left_out + 2] == ["58.00", "-2.00"]
    assert any(row[0] == "| b (left out)" for row in rows)
