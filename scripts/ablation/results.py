"""The files of results: their names, which of them are still due, and which learning rate was best. No torch."""

import json
from collections.abc import Sequence
from pathlib import Path

from ablation.arms import Arm
from ablation.budgets import Budget


def run_name(arm: Arm, learning_rate: float, seed: int) -> str:
    """The file name of a run's result, without ending."""
    return f"{arm.name}_lr{learning_rate:g}_seed{seed}"


def macro(scores: dict[str, float]) -> float:
    """Mean over domains, 0 to 100."""
    return 100 * sum(scores.values()) / len(scores)


def due(arms: tuple[Arm, ...], budget: Budget, done: dict[str, dict]) -> list[tuple[Arm, float, int]]:
    """The runs to do now: the grid with the first seed, arm by arm; then further seeds at each arm's best rate.

    Args:
        arms: Of a table.
        budget: Grid and seeds.
        done: Run name -> result.
    """
    first, *others = budget.seeds
    missing = [
        (arm, rate, first) for arm in arms for rate in budget.learning_rates if run_name(arm, rate, first) not in done
    ]
    if missing:
        return missing
    best = {arm.name: best_rate(arm, budget.learning_rates, first, done) for arm in arms}
    wanted = [(arm, best[arm.name], seed) for seed in others for arm in arms]
    return [(arm, rate, seed) for arm, rate, seed in wanted if run_name(arm, rate, seed) not in done]


def best_rate(arm: Arm, rates: Sequence[float], seed: int, done: dict[str, dict]) -> float:
    """The learning rate with the best held-out MRR at the end of the first seed's runs. The kit has no say."""
    return max(rates, key=lambda rate: macro(done[run_name(arm, rate, seed)]["curve"][-1]["dev_mrr"]))


def read_results(folder: Path) -> dict[str, dict]:
    """Run name -> result, of every file."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*_seed*.json"))}
