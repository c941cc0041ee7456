"""Arms that learn languages: what stays, what learns slowly, and where their translations and words come from."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ablation import inputs, loop, run
from ablation_helpers import ARMS, TINY_BUDGET, model_of, trained

from hagmoe_hf.ngrams_hagmoe import spell_ngrams


def test_experts_may_learn_slowly(prepared, pairs, dev, tmp_path):
    """One step, at a quarter of the rate: a quarter of the way, for one group only."""
    moved = {}
    for part in (0.25, 1.0):
        arm = dataclasses.replace(ARMS["hag-words"], memory=40, fitted=False, words=False, preserved_rate=part)
        budget = {"left_out_languages": ("en",), "translated": ("software",), "steps": 1, "evaluations": 1}
        model = trained(arm, prepared, pairs, dev, tmp_path / f"{part}", **budget)[1]
        before = model_of(arm, prepared).state_dict()
        moved[part] = {name: weight - before[name] for name, weight in model.state_dict().items() if ".experts." in name}
    assert all(step[0].any() for step in moved[1.0].values())
    for name, step in moved[1.0].items():
        torch.testing.assert_close(moved[0.25][name][0], step[0] / 4, atol=1e-6, rtol=1e-2)
        torch.testing.assert_close(moved[0.25][name][1], step[1])


def test_a_flat_router_over_the_same_experts_learns(prepared, pairs, dev, tmp_path):
    """Every token of any language may go to either expert, and the memory still holds no English n-gram."""
    arm = dataclasses.replace(ARMS["flat-words"], memory=40, fitted=False, words=False)
    budget = {"left_out_languages": ("en",), "translated": ("software",)}
    model = trained(arm, prepared, pairs, dev, tmp_path, **budget)[1]
    before, after = model_of(arm, prepared).state_dict(), model.state_dict()
    for place in (".experts.", ".router.", ".ngram_memory.", "attention.o_proj"):
        assert any(place in name and not torch.equal(before[name], after[name]) for name in before), place


def test_weights_may_be_left_at_a_part_of_their_way(prepared, pairs, dev, tmp_path):
    """All but the memory's, which is what makes the most of its way before the first step."""
    budget = {"left_out_languages": ("en",), "translated": ("software",)}
    ends = []
    for name in ("hag-words", "hag-words-interpolated"):
        arm = dataclasses.replace(ARMS[name], memory=40, fitted=False, words=False)
        run, model = trained(arm, prepared, pairs, dev, tmp_path / name, **budget)
        ends.append(model.state_dict())
    before = model_of(arm, prepared).state_dict()
    assert run.curve[-1]["dev_mrr"]
    for name, start in before.items():
        whole, part = (end[name] for end in ends)
        if ".ngram_memory." in name:
            assert torch.equal(part, whole)
        elif start.is_floating_point():
            torch.testing.assert_close(part, start.lerp(whole, 0.75))


def test_the_dense_parents_word_embeddings_may_learn(prepared, pairs, dev, tmp_path):
    arm = ARMS["dense-embeddings"]
    before = model_of(arm, prepared).state_dict()
    after = trained(arm, prepared, pairs, dev, tmp_path)[1].state_dict()
    tables = {name: not torch.equal(before[name], after[name]) for name in before if "_embeddings.weight" in name}
    assert {name.split(".")[-2]: moved for name, moved in tables.items()} == {
        "word_embeddings": True,
        "position_embeddings": False,
        "token_type_embeddings": False,
    }


def write_words(path: Path) -> None:
    words = [("word-bitext", "xx", f"{i}", "b" + "c" * (i % 9), "dev" if i % 9 == 0 else "train") for i in range(90)]
    pd.DataFrame(words, columns=["domain", "lang", "anchor", "positive", "split"]).to_parquet(path)


def test_a_dense_arm_may_be_trained_on_words(prepared, tmp_path):
    """What dictionaries say is then its as well; it is a domain of translations, of pairs that no language leaves out."""
    folder = tmp_path / "inputs"
    shutil.copytree(prepared, folder)
    write_words(tmp_path / "words.parquet")
    inputs.add_words(tmp_path / "words.parquet", folder)
    budget = dataclasses.replace(
        TINY_BUDGET, name="tiny", seeds=(0,), left_out_languages=("xx",), translated=("software",), learning_rates=(1e-3,)
    )
    seen = []
    place = run.Place(folder, tmp_path / "results", tmp_path / "work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plan", lambda pairs, *rest: seen.append(pairs) or inputs.plan(pairs, *rest))
        assert run.run_table((ARMS["dense-words"], ARMS["dense"]), budget, place, 9, "x", kit=False)
    with_words, without = seen
    assert with_words.domains == (*without.domains, "words")
    assert len(with_words.rows_of(3, budget)) == 80
    assert not (with_words.languages[with_words.rows_of(1, budget)] == "xx").any()
    assert {*range(*with_words.first_rows[3:5])} & set(np.concatenate(inputs.plan(with_words, budget, 0, False)))


def test_a_memory_may_start_from_words_that_nothing_is_trained_on(prepared, tmp_path):
    """Other arms have the same inputs with them and without."""
    folder = tmp_path / "inputs"
    shutil.copytree(prepared, folder)
    write_words(tmp_path / "words.parquet")
    with pytest.raises(FileNotFoundError, match=r"words\.npz is missing; allowed: inputs that --add-words gave some"):
        inputs.training_translations(folder, words=True)
    inputs.add_words(tmp_path / "words.parquet", folder)
    assert [len(lengths) for _, lengths in inputs.training_translations(folder, words=True)] == [80, 80]
    assert [len(lengths) for _, lengths in inputs.training_translations(folder)] == [0, 0]
    pairs = [inputs.load_pairs(one, "train", 24, "cpu") for one in (folder, prepared)]
    assert pairs[0].domains == pairs[1].domains
    rows = [set(spell_ngrams(inputs.training_ngrams(folder, 200, 4, "en", words)[0])) for words in (False, True)]
    assert rows[0] < rows[1]
    own, others = (set(texts) for texts in inputs.texts_by_language(folder, "en", words=True))
    assert {"1", "2"} <= own
    assert "bc" in others


def test_translations_alone_may_tell_languages(prepared, tmp_path, monkeypatch):
    """As in `hagmoe train`, to which nobody says in what languages other domains are."""
    monkeypatch.setattr(inputs, "TRANSLATED", ("lexical",))
    folder = tmp_path / "inputs"  # n-grams are kept by folder
    shutil.copytree(prepared, folder)
    texts = json.loads((folder / "calibration/lexical.json").read_text(encoding="utf-8"))
    own, others = inputs.texts_by_language(folder, "en", translated=True)
    assert set(texts[: len(texts) // 2]) <= set(own)
    assert set(own + others) == set(texts)
    assert others
    rows = [set(spell_ngrams(inputs.training_ngrams(folder, 1000, 4, "en", translated=only)[0])) for only in (False, True)]
    assert rows[1]
    assert rows[1] != rows[0]
    lexical = inputs.training_translations(folder)[1][0]
    assert {token for ngram in rows[1] for token in ngram} <= set(lexical.tolist())


def test_experts_may_stay_where_all_else_learns(prepared, pairs, dev, tmp_path):
    arm = dataclasses.replace(ARMS["hag-translations-home"], memory=40, fitted=False)
    budget = {"left_out_languages": ("en",), "translated": ("software",)}
    model = trained(arm, prepared, pairs, dev, tmp_path, **budget)[1]
    before = model_of(arm, prepared).state_dict()
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("attention.o_proj" in name for name in moved)
    assert not any(".router." in name or ".embeddings." in name for name in moved)
    stacks = [name for name in moved if ".experts." in name]
    assert stacks
    for name in stacks:
        assert torch.equal(before[name][0], after[name][0])
        assert not torch.equal(before[name][1], after[name][1])


def test_articles_of_one_title_are_translations():
    """Names are the same in many languages; what gives them away is cut off, and who held out a text holds out its pair."""
    rows = [
        ("encyclopedia", "en", "Ada Lovelace, English mathematician", "Augusta Ada King was", "train"),
        ("encyclopedia", "es", "Ada Lovelace, matemática, inglesa", "Augusta Ada King fue", "train"),
        ("encyclopedia", "fr", "Ada Lovelace, mathématicienne", "Augusta Ada King est", "dev"),
        ("encyclopedia", "es", "Ada Lovelace, otra", "Otra vez", "train"),  # the same title once more
        ("encyclopedia", "en", "Orinoco, river", "The Orinoco is", "dev"),
        ("encyclopedia", "es", "Orinoco, río", "El Orinoco es", "train"),  # its English is held out
        ("encyclopedia", "es", "Lima es una ciudad", "Capital", "train"),  # no title
        ("encyclopedia", "es", "x" * 61 + ", largo", "Largo", "train"),
        ("encyclopedia", "en", "x" * 61 + ", long", "Long", "train"),
        ("software", "es", "Ada Lovelace, programa", "Un programa", "train"),
    ]
    pairs = pd.DataFrame(rows, columns=["domain", "lang", "anchor", "positive", "split"])
    found = inputs.same_titles(pairs)
    assert set(found.domain) == {"encyclopedia-bitext"}
    assert {tuple(row) for row in found[["lang", "anchor", "positive", "split"]].values} == {
        ("es", "English mathematician", "matemática, inglesa", "train"),
        ("es", "Augusta Ada King was", "Augusta Ada King fue", "train"),
        ("fr", "English mathematician", "mathématicienne", "dev"),
        ("fr", "Augusta Ada King was", "Augusta Ada King est", "dev"),
    }


def test_a_run_on_translations_moves_what_may_learn(prepared, pairs, dev, tmp_path):
    arm = dataclasses.replace(ARMS["hag-languages"], memory=40)
    budget = {"left_out_languages": ("en",), "translated": ("software",)}
    model = trained(arm, prepared, pairs, dev, tmp_path, **budget)[1]
    before = model_of(arm, prepared).state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.endswith("ngram_memory.rows") for name in moved)
    assert any(".experts." in name for name in moved)
    assert all(".experts." in name or name.endswith("ngram_memory.rows") for name in moved)
