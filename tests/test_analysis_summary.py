import dataclasses

import numpy as np
import planted_languages
import pytest
import test_importing
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoTokenizer

from hagmoe_hf import upcycle
from hagmoe_hf.analysis.summary import findings, routing_features, summarize, text_map
from hagmoe_hf.analysis.texts import Texts
from hagmoe_hf.analysis.trace import Trace, record
from hagmoe_hf.importing import import_nomic_moe

NAMES = ("alpha", "beta", "gamma", "delta")


def made(experts_of_texts, domains=None, languages=None, pairs=None) -> Trace:
    """A trace of one layer of 4 experts in 2 groups, where each text's tokens went as said; ids are positions."""
    lengths = [len(experts) for experts in experts_of_texts]
    index = np.concatenate(experts_of_texts).astype(np.uint8)[:, None, None]
    texts = Texts(tuple(f"text {row}" for row in range(len(lengths))), domains, languages)
    if pairs is not None:
        texts = dataclasses.replace(texts, pairs=np.array(pairs))
    start = np.concatenate([[0], np.cumsum(lengths)])
    mean = np.stack([np.bincount(experts, minlength=4) / len(experts) for experts in experts_of_texts])[:, None]
    return Trace(
        texts=texts,
        layers=(1,),
        num_experts=4,
        num_groups=2,
        group_routing="sequence",
        text_start=start,
        token_id=np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
        expert_index=index,
        expert_probability=np.ones(index.shape, dtype=np.float16),
        mean_probability=mean.astype(np.float32),
        vector=np.random.default_rng(0).normal(size=(len(lengths), 6)).astype(np.float32),
    )


def specialised(**labels) -> Trace:
    return made([[row % 4] * 5 for row in range(40)], **labels)


def domains_of(count: int) -> tuple[str, ...]:
    return tuple(NAMES[row % 4] for row in range(count))


def test_perfectly_specialised_experts_are_reported_as_such():
    summary = summarize(specialised(domains=domains_of(40)))
    layer = summary["layers"][0]
    assert layer["information"]["expert;domain"]["bits"] == pytest.approx(2)
    assert layer["information"]["group;domain"]["bits"] == pytest.approx(1)
    assert layer["load"]["effective_experts"] == pytest.approx(4)
    assert layer["consistency"] == pytest.approx({"within": 1, "over_all": 0.25})
    assert summary["neighbours"]["domain"]["by_routing"] == 1
    told = findings(summary)
    assert "evenly used" in told[0]
    assert "tell the 4 domains apart in 1 of 1 layers" in told[1]
    assert "2.00 bits" in told[1]
    assert "4.0 times its even share" in told[1]
    assert "follows its domain most" in told[3]


def test_uniform_use_is_reported_as_no_specialisation():
    """A report that finds something in noise teaches its readers to ignore it."""
    random = np.random.default_rng(0)
    summary = summarize(made([random.integers(0, 4, size=30) for _ in range(40)], domains=domains_of(40)))
    assert not summary["layers"][0]["information"]["expert;domain"]["is_above_chance"]
    assert "do not tell the 4 domains apart" in findings(summary)[1]
    assert "follows none of what was measured" in findings(summary)[3]


def test_a_dead_expert_is_counted():
    summary = summarize(made([[row % 3] * 4 for row in range(30)], domains=domains_of(30)))
    assert summary["layers"][0]["load"]["dead_experts"] == 1
    assert "and 1 took no token at all" in findings(summary)[0]


def test_what_cannot_be_said_is_said_with_its_reason():
    """Missing columns, one domain, one text: each its own sentence, and no crash."""
    nothing = summarize(specialised())
    assert "no column 'domain'" in findings(nothing)[1]
    assert "no column 'language'" in findings(nothing)[2]
    one = summarize(specialised(domains=("law",) * 40, languages=domains_of(40)))
    assert "All texts are of one domain, 'law'" in findings(one)[1]
    assert "tell the 4 languages apart" in findings(one)[2]
    assert "bits of 1" in findings(one)[2]
    single = summarize(made([[0, 1, 2]], domains=("law",)))
    assert "There is 1 text" in findings(single)[1]
    assert "With one text" in findings(single)[3]


def test_pairs_are_compared_with_positives_and_negatives():
    pairs = [(row, row + 4) for row in range(8)]
    found = summarize(specialised(pairs=pairs))["layers"][0]["pairs"]
    assert found["pairs"] == 8
    assert found["with_positive"] == 1
    assert found["with_negatives"] == pytest.approx(24 / 56)  # half of the others are of the same group


def test_an_experts_vocabulary_is_what_goes_to_it():
    trace = made([[0, 0, 1, 2]] * 6)
    vocabulary = summarize(trace, {0: "a", 1: "b", 2: "c", 3: "d"})["layers"][0]["vocabulary"]
    assert [one["tokens"] for one in vocabulary] == [["a", "b"], ["c"], ["d"], []]
    assert vocabulary[0]["shares"] == [1, 1]


def test_few_texts_make_no_map():
    trace = specialised()
    assert text_map(trace, np.arange(9)) is None
    assert text_map(trace, np.arange(40)).shape == (40, 2)
    assert routing_features(trace).shape == (40, 4)


def test_a_planted_structure_is_seen_by_every_statistic_that_claims_to_see_it(tiny_parent, corpus):
    """If a language's own group could be missed, nothing that the report says about real models would mean anything."""
    chosen = tuple(corpus[:24])
    languages = tuple(("en", "fr", "pt")[row // 8] for row in range(24))
    random = tuple("xy"[label] for label in np.random.default_rng(1).integers(0, 2, size=24))
    texts = Texts(chosen, random, languages, np.arange(24).reshape(-1, 2))
    model = upcycle(SentenceTransformer(str(tiny_parent), device="cpu"), sparse_layers=[0, 1], n_group=3, num_experts=6)
    planted_languages.plant(model, texts)
    found = planted_languages.measure(model, texts)
    for layer in found["layers"]:
        group, expert = layer["I(group;language)"], layer["I(expert;language)"]
        assert group["bits"] == pytest.approx(group["label_entropy"])
        assert expert["bits"] == pytest.approx(expert["label_entropy"])
        assert group["is_above_chance"]
        assert expert["is_above_chance"]
        assert not layer["I(group;random label)"]["is_above_chance"]
        assert layer["smallest divergence of two languages"] == pytest.approx(1)
        assert layer["largest specialization"] > 3
        assert layer["same group: pairs of one language, others"] == pytest.approx([1, 36 / 132])
        within, over_all = layer["two tokens share an expert: of one text, of any"]
        assert within > over_all
    assert found["neighbours"]["language"]["by_routing"] == 1
    assert "tell the 3 languages apart in 2 of 2 layers" in found["finding"]


def test_a_nomic_mixture_is_traced_like_any_other(tmp_path, tiny_parent, corpus, monkeypatch):
    """Flat token routing with two experts per token, as the one published embedding mixture has it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_parent)
    monkeypatch.setitem(test_importing.CONFIG, "vocab_size", len(tokenizer))
    import_nomic_moe(test_importing.saved(tmp_path / "nomic")).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    module = Transformer(str(tmp_path / "model"))
    model = SentenceTransformer(modules=[module, Pooling(module.get_embedding_dimension())], device="cpu")
    texts = Texts(tuple(corpus[:40]), domains=domains_of(40))
    trace = record(model, texts)
    assert trace.expert_index.shape[1:] == (2, 2)
    summary = summarize(trace)
    assert summary["num_groups"] == 1
    assert "group;domain" not in summary["layers"][0]["information"]
    within = summary["coactivation"][0]
    assert within["from"] == within["to"] == 1
    totals = np.array(within["share"]).sum(axis=1)  # of a chosen expert: itself and the other one
    assert totals[totals > 0] == pytest.approx(2)
