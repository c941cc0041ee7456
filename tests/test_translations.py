"""A memory that starts from translations: real English, and a language whose words are English ones, turned around."""

import numpy as np
import pytest
import torch
from evaluation_helpers import shipped_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import CrossEncoder, SentenceTransformer

from hagmoe_hf import HagMoeModel, fit_translations, sentence, upcycle
from hagmoe_hf.translations import _ridge


def turned(text: str) -> str:
    """Every word spelled backwards, which makes it one that the parent does not know."""
    return " ".join(word[::-1] + "q" for word in text.lower().split())


@pytest.fixture(scope="module")
def english() -> list[str]:
    texts = [row["text"][:60] for row in shipped_rows("classification/uci_sentences", "test")]
    return list(dict.fromkeys(text for text in texts if text.strip()))


@pytest.fixture
def mixture(real_parent, english) -> SentenceTransformer:
    """No layer has experts: what is tested is the memory alone."""
    others = [turned(text) for text in english]
    return upcycle(real_parent, sparse_layers=[], ngram_texts=others, preserved_texts=english)


def found_again(model: SentenceTransformer, texts: list[str]) -> float:
    """Share of texts whose turned ones are nearest to them."""
    nearest = (model.encode([turned(text) for text in texts]) @ model.encode(texts).T).argmax(axis=1)
    return float((nearest == np.arange(len(texts))).mean())


def test_translations_that_were_not_fitted_are_found_as_well(mixture, english):
    """Words are learned, not texts: what held-out texts share with the others is their words."""
    held_out, fitted = english[:100], english[100:]
    before = found_again(mixture, held_out)
    fit = fit_translations(mixture, [(text, turned(text)) for text in fitted], penalty=0.01, strength=1.0)
    assert found_again(mixture, held_out) > before + 0.3
    assert fit.pairs == len(fitted)
    assert 0 < fit.after < fit.before
    assert "translations" in str(fit)


def test_preserved_texts_keep_their_vectors_to_the_bit(mixture, english):
    before = mixture.encode(english[:50])
    fit_translations(mixture, [(text, turned(text)) for text in english])
    assert np.array_equal(mixture.encode(english[:50]), before)
    memory = sentence.encoder_of(mixture).ngram_memory
    assert not memory.rows[0].any()
    assert not memory.rows[1:][memory.counts == 0].any(), "n-grams that are only beginnings are silent"


def test_fitting_again_replaces_what_was_there_and_dropout_does_not_matter(mixture, english):
    """Also in a model that is being trained, whose mode stays."""
    pairs = [(text, turned(text)) for text in english[:60]]
    rows = sentence.encoder_of(mixture).ngram_memory.rows
    fit_translations(mixture, pairs)
    first = rows.detach().clone()
    mixture.train()
    fit_translations(mixture, pairs)
    assert mixture.training
    assert sentence.encoder_of(mixture).training
    assert torch.allclose(rows, first, atol=1e-7)


def test_half_the_strength_is_half_of_the_rows_and_a_higher_penalty_is_smaller_rows(mixture, english):
    pairs = [(text, turned(text)) for text in english[:60]]
    rows = sentence.encoder_of(mixture).ngram_memory.rows

    def fitted(**options: float) -> torch.Tensor:
        fit_translations(mixture, pairs, **options)
        return rows.detach().clone()

    whole = fitted(strength=1.0)
    assert torch.allclose(fitted(strength=0.25), whole / 4, atol=1e-7)
    assert fitted(strength=1.0, penalty=10.0).norm() < whole.norm() / 2


def test_pairs_without_words_count_for_nothing(mixture, english):
    pairs = [(text, turned(text)) for text in english[:40]]
    rows = sentence.encoder_of(mixture).ngram_memory.rows
    fit_translations(mixture, pairs)
    first = rows.detach().clone()
    fit = fit_translations(mixture, [("", turned(english[50])), *pairs, (english[51], " ")])
    assert fit.pairs == 40
    assert torch.allclose(rows, first, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 12), st.floats(0.01, 10))
def test_conjugate_gradients_solve_the_normal_equations(seed, pairs, rows, penalty):
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(pairs, rows, generator=generator) * (torch.rand(pairs, rows, generator=generator) < 0.4)
    target = torch.randn(pairs, 3, generator=generator)
    exact = torch.linalg.solve(
        (shares.double().T @ shares.double()) + penalty * torch.eye(rows, dtype=torch.float64), (shares.T @ target).double()
    )
    assert torch.allclose(
        _ridge(shares.to_sparse(), target, penalty).double(), exact, rtol=0.02, atol=0.02 * float(exact.norm()) + 1e-9
    )


def test_an_encoder_alone_needs_its_tokenizer(mixture, english):
    pairs = [(text, turned(text)) for text in english[:30]]
    encoder = sentence.encoder_of(mixture)
    assert isinstance(encoder, HagMoeModel)
    with pytest.raises(ValueError, match="tokenizer=None with a HagMoeModel"):
        fit_translations(encoder, pairs)
    assert fit_translations(encoder, pairs, tokenizer=mixture.tokenizer).pairs == 30


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([], {}, "pairs holds nothing; allowed"),
        (["ab"], {}, r"pairs\[0\] holds 1 texts; allowed: a text and its translation"),
        ([("a", "b"), ("a", "b", "c")], {}, r"pairs\[1\] holds 3 texts; allowed: a text and its translation"),
        ([("a", None)], {}, "pairs holds None of type NoneType"),
        ([("a", "\ud800")], {}, r"pairs\[0\] is not UTF-8"),
        ([("a", "b")], {"penalty": 0}, "penalty=0 is not possible; allowed: a number over 0"),
        ([("a", "b")], {"penalty": float("nan")}, "penalty=nan"),
        ([("a", "b")], {"strength": 1.5}, "strength=1.5 is not possible; allowed: a number over 0, at most 1"),
        ([("a", "b")], {"strength": True}, "strength=True"),
    ],
)
def test_what_is_no_translation_is_refused(pairs, options, message, mixture):
    with pytest.raises(ValueError, match=message):
        fit_translations(mixture, pairs, **options)


def test_a_model_without_memory_is_refused(real_parent):
    with pytest.raises(ValueError, match=r"model holds a BertModel; allowed: a HAG-MoE"):
        fit_translations(real_parent, [("a", "b")])
    with pytest.raises(ValueError, match="ngram_memory_size=0 leaves no memory to fit"):
        fit_translations(upcycle(real_parent), [("a", "b")])


def test_a_mixture_with_a_head_is_fitted_as_well(tiny_parent, english):
    pairs = [(text, turned(text)) for text in english[:30]]
    reranker = upcycle(CrossEncoder(str(tiny_parent), device="cpu"), sparse_layers=[], ngram_texts=pairs)
    assert fit_translations(reranker, pairs).pairs == 30
    assert sentence.encoder_of(reranker).base_model.ngram_memory.rows.any()


def test_a_memory_is_not_lost_to_pairs_that_teach_nothing(mixture, english):
    fit_translations(mixture, [(text, turned(text)) for text in english[:30]])
    encoder = sentence.encoder_of(mixture)
    before = encoder.ngram_memory.rows.clone()
    with pytest.raises(ValueError, match="pairs holds 1 pairs, none with words on both sides"):
        fit_translations(mixture, [("", "le chat")])
    encoder.config.ngram_memory_scale = 0.0
    with pytest.raises(ValueError, match="ngram_memory_scale=0 turns the memory off"):
        fit_translations(mixture, [("the cat", "le chat")])
    assert torch.equal(encoder.ngram_memory.rows, before)
