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


def held_out(run: dict, point: int = -1, left_out: bool = False) -> float | None:
    """Macro MRR of a run over the domains that it was trained on, or over those that were left out.

    Args:
        run: A result.
        point: Of its curve; the last one by default.
        left_out: Which of the two.

    Returns:
        0 to 100; None where nothing was left out.
    """
    names = set(run["budget"].get("left_out", ()))
    scores = run["curve"][point]["dev_mrr"]
    chosen = {domain: score for domain, score in scores.items() if (domain in names) == left_out}
    return macro(chosen) if chosen else None


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
    if missing and len(budget.learning_rates) > 1:
        return missing
    wanted = [(arm, best_rate(arm, budget.learning_rates, first, done), seed) for seed in others for arm in arms]
    return missing + [(arm, rate, seed) for arm, rate, seed in wanted if run_name(arm, rate, seed) not in done]


def best_rate(arm: Arm, rates: Sequence[float], seed: int, done: dict[str, dict]) -> float:
    """The learning rate with the best `held_out` at the end of the first seed's runs. The kit has no say."""
    if len(rates) == 1:
        return rates[0]
    return max(rates, key=lambda rate: held_out(done[run_name(arm, rate, seed)]) or 0.0)


def read_results(folder: Path) -> dict[str, dict]:
    """Run name -> result, of every file."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*_seed*.json"))}
