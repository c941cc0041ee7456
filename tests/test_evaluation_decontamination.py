"""Training texts that repeat the kit are found."""

import json
from pathlib import Path

import pytest
from evaluation_helpers import shipped_rows

import hagmoe_hf.demo
from hagmoe_hf.evaluation.decontamination import is_contaminated, kit_texts
from hagmoe_hf.evaluation.kit import SHIPPED, find_sets


@pytest.fixture(scope="module")
def kit():
    return kit_texts(find_sets(SHIPPED))


def test_exact_and_near_copies_are_found_on_either_side(kit):
    """A model that has read the answers wins every comparison."""
    for row in shipped_rows("retrieval/wiki_description_en", "corpus")[:50]:
        lead = row["text"]
        assert is_contaminated("a question of ours", lead.upper() + "!", kit)  # case and punctuation do not matter
        assert is_contaminated(lead, "an answer of ours", kit)
        words = lead.split()
        if len(words) > 30:
            assert is_contaminated("title", " ".join(["Well,", *words[:-2], "and so on"]), kit)


def test_other_texts_pass_even_with_a_short_quotation(kit):
    """A check that refuses everything would leave nothing to train on."""
    row = shipped_rows("retrieval/wiki_description_en", "corpus")[0]["text"].split()
    essay = " ".join(f"this is sentence number {i} of an essay that nobody has written before" for i in range(8))
    assert not is_contaminated("A new essay", essay, kit)
    assert not is_contaminated("A new essay", f"{essay} {' '.join(row[:9])}", kit)  # 2 shingles of about 100
    assert not is_contaminated("cat", "dog", kit)  # single words are names, not leaks


def test_a_sample_of_the_training_pairs_is_disjoint_from_the_kit(kit):
    """The demo's corpus was drawn from the pairs: if one of its texts were in the kit, the hold-out would be broken."""
    corpus = Path(hagmoe_hf.demo.__file__).parent / "corpus.jsonl"
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    assert len(texts) > 300
    assert not [text for text in texts if is_contaminated("", text, kit)]
