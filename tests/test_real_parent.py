"""The whole journey on all-MiniLM-L6-v2 and real texts."""

from pathlib import Path

import exactness
import exactness_multilingual as multilingual
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from hagmoe_hf import HagMoeForMaskedLM
from hagmoe_hf.demo import LARGEST_DIFFERENCE

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def multilingual_parent() -> SentenceTransformer:
    return SentenceTransformer(str(multilingual.parent_folder()), device="cpu")


@pytest.fixture(scope="module")
def parent_vectors(real_parent, corpus):
    return real_parent.encode(corpus)


# Each takes half a minute; the others run with `make test-all`, and all stand in docs/results/exactness.json
ALWAYS = ("default: groups by sequence, 2 sparse layers", "all layers sparse")
WAYS = [
    pytest.param(options, id=mode, marks=[] if mode in ALWAYS else pytest.mark.slow)
    for mode, options in exactness.MODES.items()
]


@pytest.mark.parametrize("options", WAYS)
def test_the_vectors_are_the_parents_for_every_way_of_routing(real_parent, parent_vectors, corpus, options):
    """Small initial gates would hide a router that changes the output; these decide hard."""
    assert len(corpus) >= 500
    result = exactness.measure(real_parent, parent_vectors, corpus, options)
    assert result["largest_difference"] <= LARGEST_DIFFERENCE
    assert result["median_probability_of_chosen_expert"] > 0.95
    if options.get("num_experts_per_tok", 1) == 1:
        assert result["active_over_parent"] < 1.003, "equal active FLOPs: only gates and expert biases are added"


def test_a_text_keeps_its_vector_in_any_batch(real_mixture, corpus):
    """Real lengths and real padding, against one text at a time."""
    texts = corpus[::9]
    alone = np.concatenate([real_mixture.encode([text]) for text in texts])
    for batch_size in (7, 64):
        assert np.abs(real_mixture.encode(texts, batch_size=batch_size) - alone).max() <= 1e-5


def test_the_published_figures_hold_for_the_committed_corpus(corpus):
    """The table in the README comes from this file; it must speak of the texts that are here."""
    result = exactness.json.loads((ROOT / "docs/results/exactness.json").read_text())
    assert result["texts"] == len(corpus)
    assert list(result["modes"]) == list(exactness.MODES)
    assert all(row["largest_difference"] <= result["bound"] for row in result["modes"].values())


@pytest.mark.slow
@pytest.mark.parametrize("options", multilingual.MODES.values(), ids=multilingual.MODES.keys())
def test_a_multilingual_parents_vectors_are_kept_in_six_languages(multilingual_parent, options):
    """The second parent: another tokenizer, twelve layers, and languages that an English parent never shows."""
    differences = multilingual.measure(multilingual_parent, options)
    assert len(differences) == 6
    assert max(differences.values()) <= multilingual.BOUND


def test_the_published_multilingual_figures_are_of_the_scripts_modes():
    result = multilingual.json.loads((ROOT / "docs/results/exactness_multilingual.json").read_text())
    assert list(result["largest_difference"]) == list(multilingual.MODES)
    for row in result["largest_difference"].values():
        assert set(row) == set(multilingual.TEXTS)
        assert max(row.values()) <= result["bound"] == multilingual.BOUND


def test_an_mlm_head_can_be_put_on_a_saved_mixture(real_mixture, tmp_path):
    """Domain-adaptive pre-training starts from the encoder and adds a fresh head."""
    real_mixture.save_pretrained(str(tmp_path))
    model, info = HagMoeForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert all(key.startswith("lm_head.") for key in info["missing_keys"])
    assert model.model.layers[1].mlp.experts.num_experts == 8
