"""Is one model better than another? Paired differences, with a bootstrap interval over queries and items.

The same items are drawn for both models, so that what makes an item hard for both cancels out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .items import Items
from .runner import TaskScore

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A difference of scores, model minus the other.

    Attributes:
        value: The difference.
        low: Lower end of the 95 % percentile interval; None where a task's items are not known.
        high: Upper end.
    """

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Comparison:
    """A model against another, on the tasks that both ran.

    Attributes:
        tasks: Task name -> difference.
        domains: Domain -> difference of the means over its tasks.
        macro: Difference of the means over all tasks.
    """

    tasks: Mapping[str, Difference]
    domains: Mapping[str, Difference]
    macro: Difference


def compare(
    scores: Mapping[str, TaskScore], against: Mapping[str, TaskScore], *, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """Compare two models.

    Args:
        scores: Task name -> score of the model.
        against: Task name -> score of the other; tasks that only one of them ran are left out.
        resamples: Bootstrap samples per task.
        seed: Seed of the draws.

    Returns:
        Differences with their intervals. A mean over tasks gets its interval from the tasks' own draws.

    Raises:
        ValueError: No task in common, or a task's items differ in number.
    """
    common = [name for name in scores if name in against]
    if not common:
        raise ValueError(f"tasks {sorted(scores)} and {sorted(against)} have none in common; allowed: at least one.")
    values = {name: scores[name].score - against[name].score for name in common}
    draws = {name: _task_draws(scores[name], against[name], resamples, seed + i) for i, name in enumerate(common)}

    def mean_difference(names: Sequence[str]) -> Difference:
        of_tasks = [draws[name] for name in names]
        known = [draw for draw in of_tasks if draw is not None]
        mean = np.mean(known, axis=0) if len(known) == len(names) else None
        return _difference(float(np.mean([values[name] for name in names])), mean)

    domains: dict[str, list[str]] = {}
    for name in common:
        domains.setdefault(scores[name].domain, []).append(name)
    return Comparison(
        tasks={name: mean_difference([name]) for name in common},
        domains={domain: mean_difference(names) for domain, names in sorted(domains.items())},
        macro=mean_difference(common),
    )


def _difference(value: float, draws: np.ndarray | None) -> Difference:
    if draws is None:
        return Difference(value)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail])  # a draw of one class only has no average precision
    return Difference(value, float(low), float(high))


def _task_draws(score: TaskScore, against: TaskScore, resamples: int, seed: int) -> np.ndarray | None:
    """(resamples,) bootstrap differences of a task: the mean over its splits and subsets."""
    if not score.items or len(score.items) != len(against.items):
        return None
    rng = np.random.default_rng(seed)
    return np.mean([_draws(a, b, resamples, rng) for a, b in zip(score.items, against.items, strict=True)], axis=0)


def _draws(items: Items, against: Items, resamples: int, rng: np.random.Generator) -> np.ndarray:
    from scipy.stats import spearmanr

    n = len(items.values)
    if n != len(against.values) or items.gold != against.gold:
        raise ValueError(f"subset {items.subset!r}: {n} and {len(against.values)} items; allowed: the same items for both.")
    values, other, gold = (np.asarray(column) for column in (items.values, against.values, items.gold))
    if items.statistic == "resampled_mean":
        # mteb drew the samples; their spread is the bootstrap's, on whatever number of items they held (m out of n)
        differences = values - other
        error = differences.std(ddof=1) * np.sqrt(items.variance_factor)
        return differences.mean() + error * rng.standard_t(n - 1, resamples)
    draws = np.empty(resamples)
    for i in range(resamples):
        chosen = rng.integers(0, n, n)
        if items.statistic == "mean":
            draws[i] = (values[chosen] - other[chosen]).mean()
        elif items.statistic == "spearman":
            draws[i] = spearmanr(gold[chosen], values[chosen])[0] - spearmanr(gold[chosen], other[chosen])[0]
        else:
            draws[i] = _average_precision(gold[chosen], values[chosen]) - _average_precision(gold[chosen], other[chosen])
    return draws


def _average_precision(gold: np.ndarray, values: np.ndarray) -> float:
    from sklearn.metrics import average_precision_score

    return average_precision_score(gold, values) if gold.any() else np.nan
