"""The goal, as code: what a gain on the kit has to be, and where nothing may be lost.

It asks for every domain and language. Many a single set differs by more than half a point between two runs of the same
arm, so what several sets ask of the same texts is taken together, and sets that lost more are named beside the verdict.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# So much better on the kit's macro average, by more than so many standard deviations, nowhere worse by more
LEAST_GAIN, DEVIATIONS, LARGEST_LOSS = 1.0, 2.0, 0.5
# Sets of the kit from sources that contributed no training pair
UNSEEN = (
    "sts.wordsim353", "sts.simlex999", "sts.rg65_en_es", "classification.uci_sentences", "retrieval.arxiv_tags",
    "retrieval.faq_tech", "retrieval.debian_faq_xlingual", "reranking.faq_tech",
)  # fmt: skip
# What several sets ask of the same texts in the same language; any other set is a domain of its own
DOMAINS = {
    "encyclopedia, English": (
        "classification.wiki_topic_en", "clustering.wiki_topic_en", "retrieval.wiki_description_en",
        "reranking.wiki_description_en",
    ),
    "packages, English": ("classification.debian_section", "clustering.debian_section", "retrieval.debian_packages"),
    "questions about software, English": ("reranking.faq_tech", "retrieval.faq_tech"),
    "words, English": ("sts.wordsim353", "sts.simlex999"),
}  # fmt: skip
_DOMAIN_OF = {name: domain for domain, names in DOMAINS.items() for name in names}


@dataclass(frozen=True)
class Difference:
    """Paired differences over seeds.

    Attributes:
        mean: Their mean.
        deviation: Their standard deviation (n - 1); NaN for one seed.
        seeds: How many.
    """

    mean: float
    deviation: float
    seeds: int

    def __format__(self, spec: str) -> str:
        """The mean with its sign, and the deviation where there is one, each as the spec says; ".2f" by default."""
        spec = spec or ".2f"
        return f"{self.mean:+{spec}}" + (f" ± {self.deviation:{spec}}" if self.seeds > 1 else "")

    def __str__(self) -> str:
        return format(self)


def difference(values: list[float]) -> Difference:
    """From one difference per seed."""
    return Difference(
        float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"), len(values)
    )


def verdict(
    gain: Difference | None, parts: Mapping[str, Difference], sets: Mapping[str, Difference], seeds_wanted: int
) -> str:
    """What the goal says to a gain on the kit's macro average.

    Args:
        gain: Of the macro average; None where the kit was not scored.
        parts: The same of every domain and language.
        sets: The same of every set.
        seeds_wanted: Of the budget.
    """
    if gain is None:
        return "no kit scores: no verdict"
    if gain.seeds < seeds_wanted:
        return f"{gain.seeds} of {seeds_wanted} seeds: no verdict"
    against = []
    if gain.mean < LEAST_GAIN:
        against.append(f"gain under {LEAST_GAIN:+.1f}")
    if gain.mean <= DEVIATIONS * gain.deviation:
        against.append(f"within {DEVIATIONS:g} sd")
    against += _lost(parts)[:1]
    if against:
        return "no: " + ", ".join(against)
    lost = _lost(sets)
    return f"**yes** (sets: {', '.join(lost)})" if lost else "**yes**"


def _lost(parts: Mapping[str, Difference]) -> list[str]:
    """What lost more than the goal allows, the worst first."""
    worst_first = sorted(parts, key=lambda name: parts[name].mean)
    return [f"{name} {parts[name].mean:+.2f}" for name in worst_first if parts[name].mean < -LARGEST_LOSS]


def kit_macro(result: dict, names: tuple[str, ...] | None = None) -> float | None:
    """Mean over the kit's sets (or those named), 0 to 100; None where they were not scored."""
    scores = [score for name, score in kit_sets(result).items() if names is None or name in names]
    return float(np.mean(scores)) if scores else None


def kit_sets(result: dict) -> dict[str, float]:
    """Set -> score, 0 to 100."""
    return {name: 100 * entry["score"] for name, entry in (result["kit"] or {}).items()}


def kit_parts(result: dict) -> dict[str, float]:
    """Domain or language -> score, 0 to 100."""
    parts: dict[str, list[float]] = {}
    for name, score in kit_sets(result).items():
        parts.setdefault(_DOMAIN_OF.get(name, name), []).append(score)
    for entry in (result["kit"] or {}).values():
        for language, value in entry["languages"].items():
            parts.setdefault(f"language {language}", []).append(100 * value)
    return {name: float(np.mean(values)) for name, values in parts.items()}
