"""Do training texts repeat evaluation texts? Exact and near duplicates, by normalised text and word shingles."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .kit import KitSet

SHINGLE_WORDS = 8
LARGEST_SHARE = 0.25  # of a pair's shingles that may be in the kit
SHORTEST_EXACT = 3  # words: shorter texts are names and labels, which say nothing when they repeat


@dataclass(frozen=True)
class KitTexts:
    """What evaluation texts look like to the check.

    Attributes:
        exact: Normalised texts of at least `SHORTEST_EXACT` words.
        shingles: Every run of `SHINGLE_WORDS` words in them.
    """

    exact: frozenset[str]
    shingles: frozenset[str]


def kit_texts(sets: Iterable[KitSet]) -> KitTexts:
    """Collect the texts of every field of every set.

    Args:
        sets: From `kit.find_sets`.
    """
    exact: set[str] = set()
    found: set[str] = set()
    for kit_set in sets:
        for rows in kit_set.read().values():
            for row in rows:
                for text in _texts(row.values()):
                    words = normalise(text)
                    if len(words.split()) >= SHORTEST_EXACT:
                        exact.add(words)
                        found |= shingles(words)
    return KitTexts(frozenset(exact), frozenset(found))


def is_contaminated(anchor: str, positive: str, kit: KitTexts) -> bool:
    """Whether a training pair repeats the kit.

    Args:
        anchor: The pair's first text.
        positive: The pair's second text.
        kit: From `kit_texts`.

    Returns:
        True where one of the two is, word for word, a text of the kit, or more than a quarter of the pair's 8-word
        shingles are in it.
    """
    words = [normalise(text) for text in (anchor, positive)]
    if any(text in kit.exact for text in words):
        return True
    of_pair = shingles(words[0]) | shingles(words[1])
    return len(of_pair & kit.shingles) > LARGEST_SHARE * len(of_pair)


def normalise(text: str) -> str:
    """Lower-case words joined by one space."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def shingles(normalised: str) -> set[str]:
    """Every run of `SHINGLE_WORDS` words of a normalised text; empty for shorter ones."""
    words = normalised.split()
    return {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def _texts(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from _texts(value)
