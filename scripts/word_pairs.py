"""Bilingual dictionaries become training pairs: an English word, and a word of another language that means it.

    python scripts/word_pairs.py /usr/share/dictd words.parquet

Reads FreeDict's dictionaries from and into English in the format of dictd, as Debian's `dict-freedict-*` packages hold them
(GPL, AGPL or CC BY-SA; the column `license` says what each says of itself). Their words are what a memory needs to know, and
what `fit_translations` sets at once: `hagmoe train --fit_translations --dictionaries words.parquet`.
"""

import argparse
import gzip
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from hagmoe_hf.evaluation.kit import KitSet, find_sets
from hagmoe_hf.files import new_file

# ISO 639-3, as the dictionaries are named, to the codes that other pairs have
CODES = {
    "afr": "af", "ara": "ar", "bul": "bg", "ces": "cs", "cym": "cy", "dan": "da", "deu": "de", "ell": "el", "epo": "eo",
    "fin": "fi", "fra": "fr", "gle": "ga", "hin": "hi", "hrv": "hr", "hun": "hu", "ind": "id", "isl": "is", "ita": "it",
    "jpn": "ja", "kur": "ku", "lat": "la", "lit": "lt", "nld": "nl", "nor": "no", "pol": "pl", "por": "pt", "rus": "ru",
    "slk": "sk", "slv": "sl", "spa": "es", "srp": "sr", "swe": "sv", "swh": "sw", "tur": "tr",
}  # fmt: skip
DIGITS = {digit: value for value, digit in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
# Words of a dictionary's notes -> its licence; the first that are there count
LICENCES = {
    "Affero": "AGPL-3.0-or-later",
    "Creative Commons Attribution": "CC-BY-SA-3.0",
    "General Public License": "GPL-2.0-or-later",
}
NOTES = 3000  # bytes
MOST_WORDS = 3  # of either side; longer ones explain, they do not translate
MOST_MEANINGS = 3  # of a headword, first ones first
HELD_OUT = 0.02  # of English words, with all that translates them
PRONUNCIATION = re.compile(r"\s/.*|\s*<.*")
ASIDES = re.compile(r"\([^)]*\)|\[[^\]]*\]|<[^>]*>|\{[^}]*\}")
NUMBER = re.compile(r"^\s{0,2}(\d+\.|[IVX]+\.)\s*")


def word_pairs(folder: Path, most: int, wanted: list[str] | None = None) -> pd.DataFrame:
    """Pairs of words from all of a folder's dictionaries that have English on one side.

    Args:
        folder: With `freedict-*-eng.dict.dz`, `freedict-eng-*.dict.dz` and their `.index` files.
        most: Pairs of a language. Words that more of the dictionaries translate come first: they are the common ones.
        wanted: Codes of languages; None for all.

    Returns:
        Columns domain ("word-bitext"), lang, anchor (English), positive, source, license, split.

    Raises:
        ValueError: The folder holds no such dictionary.
    """
    found: dict[tuple[str, str, str], str] = {}
    paths = [path for path in sorted(folder.glob("freedict-*.index")) if _language(path)]
    if not paths:
        raise ValueError(
            f"{folder} holds no freedict-*-eng.index or freedict-eng-*.index; allowed: a folder of dictionaries."
        )
    licences = {}
    for path in tqdm(paths, desc="Dictionaries"):
        licences[path.stem] = licence(path)
        for headword, meaning in entries(path):
            english, other = (meaning, headword) if path.stem.endswith("-eng") else (headword, meaning)
            english = english.removeprefix("to ").removeprefix("the ")
            if re.fullmatch(r"[A-Za-z][A-Za-z' -]*", english) and english.lower() != other.lower():
                found.setdefault((_language(path), english.lower(), other), path.stem)
    languages = defaultdict(set)
    for language, english, _ in found:
        languages[english].add(language)
    rows = sorted(((-len(languages[key[1]]), _hash(" ".join(key)), key, source) for key, source in found.items()))
    taken: dict[str, int] = defaultdict(int)
    pairs = []
    for _, _, (language, english, other), source in rows:
        if taken[language] < most and (wanted is None or language in wanted):
            taken[language] += 1
            split = "dev" if _hash(english) < HELD_OUT else "train"
            pairs.append(("word-bitext", language, english, other, source, licences[source], split))
    return pd.DataFrame(pairs, columns=["domain", "lang", "anchor", "positive", "source", "license", "split"])


def licence(index: Path) -> str:
    """What a dictionary says about itself before its first entry."""
    with gzip.open(index.with_suffix(".dict.dz")) as file:
        notes = " ".join(file.read(NOTES).decode("utf-8", "replace").split())
    return next((name for words, name in LICENCES.items() if words.lower() in notes.lower()), "see its notes")


def entries(index: Path) -> Iterator[tuple[str, str]]:
    """(headword, a meaning) of one dictionary; both without pronunciation, grammar and remarks."""
    with gzip.open(index.with_suffix(".dict.dz")) as file:
        data = file.read()
    places = {
        tuple(line.split("\t")[1:3]) for line in index.read_text(encoding="utf-8").splitlines() if "00database" not in line
    }
    for start, length in sorted((_number(start), _number(length)) for start, length in places):
        lines = data[start : start + length].decode("utf-8", "replace").splitlines()
        headword = PRONUNCIATION.sub("", lines[0]).strip() if lines else ""
        if _is_word(headword):
            yield from ((headword, meaning) for meaning in _meanings(lines[1:])[:MOST_MEANINGS])


def _meanings(lines: list[str]) -> list[str]:
    """Meanings stand in the first line after the headword, or in numbered ones; others hold remarks and examples."""
    meanings: list[str] = []
    is_first = True
    for line in lines:
        is_numbered = NUMBER.match(line) is not None
        if line.startswith("   ") or not (is_first or is_numbered):
            continue
        text = ASIDES.sub(" ", NUMBER.sub("", line)).strip()
        if text:
            is_first = False
            parts = (" ".join(part.split()) for part in re.split(r"[,;、]", text))
            meanings += [part for part in parts if _is_word(part) and part not in meanings]
    return meanings


def _is_word(text: str) -> bool:
    return bool(text) and len(text.split()) <= MOST_WORDS and not re.search(r"[~./\"\d:?]", text)


def _language(index: Path) -> str:
    """The code of the language that is not English, "" where neither or both are."""
    first, second = index.stem.split("-")[1:3]
    return CODES.get(first if second == "eng" else second if first == "eng" else "", "")


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = 64 * value + DIGITS[digit]
    return value


def _hash(text: str) -> float:
    return int(hashlib.sha1(text.encode()).hexdigest()[:12], 16) / 16**12


def without_known(words: pd.DataFrame, sets: Sequence[KitSet]) -> pd.DataFrame:
    """Pairs of words without those that a set of the kit compares, in either order and in any case."""
    compared = {
        frozenset(str(row[side]).lower() for side in ("sentence1", "sentence2"))
        for kit_set in sets
        for rows in kit_set.read().values()
        for row in rows
        if "sentence1" in row
    }
    pairs = zip(words.anchor.str.lower(), words.positive.str.lower(), strict=True)
    return words[[frozenset(pair) not in compared for pair in pairs]]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of dictionaries, such as /usr/share/dictd")
    parser.add_argument("output", type=Path, help="a Parquet file to write")
    parser.add_argument("--most", type=int, default=10_000, help="pairs of a language")
    parser.add_argument("--without", type=Path, metavar="KIT", help="leave out the pairs that a set of this kit compares")
    parser.add_argument("--languages", nargs="+", choices=sorted(CODES.values()), default=None, help="these only")
    arguments = parser.parse_args()
    pairs = word_pairs(arguments.folder, arguments.most, arguments.languages)
    if arguments.without is not None:
        pairs = without_known(pairs, find_sets(arguments.without))
    with new_file(arguments.output) as partial:
        pairs.to_parquet(partial, index=False)
    print(pairs.groupby(["lang", "split"]).size().unstack(fill_value=0).to_string())


if __name__ == "__main__":
    main()
