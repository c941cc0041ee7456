"""Dictionaries in dictd's format become pairs of words."""

import gzip
from pathlib import Path

import pandas as pd
import pytest
from evaluation_helpers import write_rows
from word_pairs import DIGITS, entries, without_known, word_pairs

from hagmoe_hf.evaluation.kit import KitSet

DIGIT_OF = {value: digit for digit, value in DIGITS.items()}


def number(value: int) -> str:
    """A number as an index writes it: base 64, the highest digit first."""
    higher, lowest = divmod(value, 64)
    return (number(higher) if higher else "") + DIGIT_OF[lowest]


def write_dictionary(folder: Path, name: str, *articles: str) -> Path:
    """A dictionary as dictd reads it; its first article is about itself."""
    places, data = [], b""
    for article in ("00databaseinfo\n  the GNU General\n  Public License\n", *articles):
        encoded = (article + "\n").encode()
        places.append(f"{article.split()[0]}\t{number(len(data))}\t{number(len(encoded))}")
        data += encoded
    index = folder / f"freedict-{name}.index"
    index.write_text("\n".join([*places, places[-1]]) + "\n", encoding="utf-8")  # entries stand there once for each spelling
    with gzip.open(index.with_suffix(".dict.dz"), "wb") as file:
        file.write(data)
    return index


JOYA = """joya /xoja/ <n, fem>
1. jewel, (precious) gem
      "Una joya."
2. treasure
   Synonyms: {alhaja}
 see: {oro}"""
PLAYER = "CD player\nCD přehrávač"
LONG = "aboard /@bO:d/\na bordo de un barco o de un tren"


def test_a_meaning_is_what_is_neither_pronunciation_nor_grammar_nor_example(tmp_path):
    """What stands around a word in a dictionary would be learned as its translation."""
    found = list(entries(write_dictionary(tmp_path, "spa-eng", JOYA, PLAYER, LONG)))
    assert found == [("joya", "jewel"), ("joya", "gem"), ("joya", "treasure"), ("CD player", "CD přehrávač")]


def test_pairs_have_english_first_whichever_way_the_dictionary_goes(tmp_path):
    """A loss of translations takes the first text as the one that the model knows."""
    write_dictionary(tmp_path, "spa-eng", JOYA)
    write_dictionary(tmp_path, "eng-deu", "jewel /dju:@l/\nJuwel, Kleinod", "to run\nlaufen", "hotel\nHotel")
    write_dictionary(tmp_path, "fra-nld", "eau\nwater")
    pairs = word_pairs(tmp_path, 10)
    assert list(pairs.columns) == ["domain", "lang", "anchor", "positive", "source", "license", "split"]
    rows = set(zip(pairs.lang, pairs.anchor, pairs.positive, strict=True))
    spanish = {("es", word, "joya") for word in ("jewel", "gem", "treasure")}
    assert rows == spanish | {("de", "jewel", "Juwel"), ("de", "jewel", "Kleinod"), ("de", "run", "laufen")}
    assert set(pairs.license) == {"GPL-2.0-or-later"}
    assert set(word_pairs(tmp_path, 1, ["es"]).anchor) == {"jewel"}, "words that most dictionaries have come first"
    assert len(set(pairs[pairs.anchor == "jewel"].split)) == 1, "a word is held out in all languages or in none"


def test_a_folder_without_dictionaries_is_refused(tmp_path):
    """An empty file of pairs would be found out in training."""
    with pytest.raises(ValueError, match="holds no freedict"):
        word_pairs(tmp_path, 10)


def test_pairs_that_an_evaluation_set_compares_are_left_out(tmp_path):
    """Whoever learns them as translations has learned the answers."""
    path = tmp_path / "test.jsonl"
    write_rows(
        path, [{"sentence1": en, "sentence2": es, "score": score} for en, es, score in (("gem", "joya", 4), ("a", "b", 1))]
    )
    kit_set = KitSet("sts", "words", {"test": path}, "words", ("en", "es"), "none", "")
    words = pd.DataFrame([("Joya", "gem"), ("jewel", "joya")], columns=["anchor", "positive"])
    assert without_known(words, [kit_set]).to_numpy().tolist() == [["jewel", "joya"]]
