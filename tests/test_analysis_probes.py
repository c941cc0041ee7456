import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from hagmoe_hf import upcycle
from hagmoe_hf.analysis.probes import (
    expert_outputs,
    importance,
    sparse_blocks,
    strongest_ngrams,
    token_views,
    without_expert,
)
from hagmoe_hf.analysis.stats import counts_per_text, linear_cka
from hagmoe_hf.analysis.texts import Texts
from hagmoe_hf.analysis.trace import record
from hagmoe_hf.routing_hagmoe import attention_pool


def mixture_of(parent, **options):
    return upcycle(SentenceTransformer(str(parent), device="cpu"), sparse_layers=[0, 1], **options)


@pytest.fixture(scope="module")
def tiny_mixture(tiny_parent):
    return mixture_of(tiny_parent)


def different_experts(model):
    """Give each expert weights of its own."""
    with torch.no_grad():
        for _, block in sparse_blocks(model[0].model):
            for parameter in block.experts.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))


def test_gate_weights_are_those_of_the_router(tiny_mixture, corpus):
    """A picture of other weights than the model's would be a lie that looks plausible."""
    view = token_views(tiny_mixture, [corpus[0]])[0]
    router = tiny_mixture[0].model.layers[0].mlp.router
    seen = []
    hook = router.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    tiny_mixture[0].model(**tiny_mixture.tokenizer([corpus[0]], return_tensors="pt", truncation=True))
    hook.remove()
    summary = attention_pool(seen[0], router.attention_query, None)[0].detach().numpy()
    assert view.gate_weight[0] @ seen[0][0].detach().numpy() == pytest.approx(summary, abs=1e-5)
    assert view.gate_weight.shape == view.expert_index.shape == (2, len(view.tokens))


def test_probes_see_what_encode_sees(tiny_parent, corpus):
    """A prompt is part of the text: without it, the pictures would be of another one."""
    model = mixture_of(tiny_parent)
    bare, asked = token_views(model, [corpus[0]])[0], token_views(model, [corpus[0]], prompt="query: ")[0]
    assert len(asked.tokens) > len(bare.tokens)
    plain = expert_outputs(model, corpus[:4], max_tokens=10_000)
    prompted = expert_outputs(model, corpus[:4], max_tokens=10_000, prompt="query: ")
    assert prompted[0].shape[1] > plain[0].shape[1]
    model.prompts, model.default_prompt_name = {"query": "query: "}, "query"
    assert token_views(model, [corpus[0]])[0].tokens == asked.tokens
    assert expert_outputs(model, corpus[:4], max_tokens=10_000)[0].shape == prompted[0].shape


def test_without_sequence_groups_there_are_no_gate_weights(tiny_parent, corpus):
    assert token_views(mixture_of(tiny_parent, n_group=1), [corpus[0]])[0].gate_weight is None


def test_fresh_experts_compute_the_same_and_changed_ones_do_not(tiny_parent, corpus):
    """CKA 1 at step 0 is what upcycling means."""
    model = mixture_of(tiny_parent)
    fresh = expert_outputs(model, corpus[:8], max_tokens=64)
    assert [layer.shape for layer in fresh] == [(8, 64, 32)] * 2
    assert linear_cka(fresh[0][0], fresh[0][5]) == pytest.approx(1)
    different_experts(model)
    changed = expert_outputs(model, corpus[:8], max_tokens=64)
    assert linear_cka(changed[0][0], changed[0][5]) < 0.9


@pytest.mark.parametrize("options", [{}, {"n_group": 1}, {"n_group": 8}, {"n_group": 8, "group_routing": "token"}])
def test_an_expert_taken_out_is_never_chosen_and_comes_back(options, tiny_parent, corpus):
    model, texts = mixture_of(tiny_parent, **options), Texts(tuple(corpus[:20]))
    before = record(model, texts)
    used = int(np.bincount(before.expert_index[:, 1].ravel()).argmax())
    with without_expert(model, layer=1, expert=used):
        during = record(model, texts)
    assert used not in during.expert_index[:, 1]
    assert (during.expert_index[:, 0] == before.expert_index[:, 0]).all(), "the other layer comes first and is as it was"
    assert (record(model, texts).expert_index == before.expert_index).all()


def test_importance_is_nothing_while_experts_are_copies(tiny_parent, corpus):
    """And something for an expert in use once they differ."""
    model = mixture_of(tiny_parent)
    vectors = model.encode(corpus[:20])

    def score(model):
        return -float(np.abs(model.encode(corpus[:20]) - vectors).max())

    whole, lost = importance(model, score)
    assert whole == 0
    assert np.abs(lost).max() < 1e-5
    different_experts(model)
    vectors = model.encode(corpus[:20])
    whole, lost = importance(model, score)
    trace = record(model, Texts(tuple(corpus[:20])))
    counts = counts_per_text(trace.expert_index[:, 0], trace.text_start, 8).sum(axis=0)
    assert ((lost[0] > 1e-3) == (counts > 0)).all()


def test_an_expert_that_cannot_be_spared_is_an_error(tiny_parent, tiny_mixture):
    with (
        pytest.raises(ValueError, match=r"layer=2, expert=0 is not possible; allowed: layers \[0, 1\]"),
        without_expert(tiny_mixture, 2, 0),
    ):
        pass
    both = mixture_of(tiny_parent, num_experts_per_tok=2)  # both experts of the one open group
    with pytest.raises(ValueError, match="none can be taken out"), without_expert(both, 0, 0):
        pass


def test_the_ngrams_that_moved_furthest_are_named(tiny_parent, corpus):
    """A reader wants words, not rows; what never moved was not learned."""
    model = mixture_of(tiny_parent, ngram_texts=corpus, ngram_memory_size=50)
    memory = model[0].model.ngram_memory
    assert strongest_ngrams(model) == []
    with torch.no_grad():
        memory.rows[7], memory.rows[3] = 1.0, 2.0
    furthest, next_one = strongest_ngrams(model)
    width, scale = memory.rows.shape[1], memory.config.ngram_memory_scale
    assert furthest.count == memory.counts[2]
    assert furthest.shift == pytest.approx(2 * width**0.5 * scale, rel=1e-5)
    assert next_one.count == memory.counts[6]
    assert furthest.text
    assert any(furthest.text in text.lower() for text in corpus)
    assert strongest_ngrams(mixture_of(tiny_parent)) == []
