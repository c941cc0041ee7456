"""A mixture packed as what differs from its parent, and put together again."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from transformers.models.bert.modeling_bert import BertPooler

from hagmoe_hf import fit_translations, sentence, upcycle
from hagmoe_hf.packing import DIFFERENCE, fits, pack, unpack


@pytest.fixture
def trained(tiny_parent, corpus) -> SentenceTransformer:
    """A mixture of everything that can be packed, whose trained weights moved, and whose embeddings did not."""
    pairs = [(text, text[::-1]) for text in corpus[:80]]
    model = upcycle(str(tiny_parent), ngram_texts=pairs, calibration_texts=corpus[:60], n_group=2, num_experts=4)
    fit_translations(model, pairs)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sentence.encoder_of(model).named_parameters():
        if not name.startswith(("embeddings", "ngram_memory")):
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.max_seq_length = 24
    return model


def test_a_packed_mixture_gives_nearly_the_same_vectors(trained, tiny_parent, corpus, tmp_path):
    """What is lost is rounding; what is gained is size."""
    folder = pack(trained, str(tiny_parent), tmp_path / "packed")
    again = unpack(folder, str(tiny_parent))
    assert again.max_seq_length == 24
    vectors, expected = (torch.from_numpy(model.encode(corpus[:80])) for model in (again, trained))
    assert torch.nn.functional.cosine_similarity(vectors, expected).min() > 0.99
    assert not torch.equal(vectors, expected)
    before, after = (sentence.encoder_of(model).state_dict() for model in (trained, again))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.startswith("embeddings") or "router" in name or not tensor.is_floating_point():
            assert torch.equal(tensor, after[name]), name
        elif name != "ngram_memory.rows":
            torch.testing.assert_close(tensor, after[name], atol=0.02 * 5 / 127, rtol=0)
    rows, packed = before["ngram_memory.rows"], after["ngram_memory.rows"]
    assert (rows - packed).norm() < 0.15 * rows.norm()
    whole = tmp_path / "whole"
    trained.save_pretrained(str(whole))
    assert (folder / DIFFERENCE).stat().st_size < 0.5 * (whole / "model.safetensors").stat().st_size
    from_path = pack(whole, str(tiny_parent), tmp_path / "from-path")
    one, other = (load_file(one / DIFFERENCE) for one in (folder, from_path))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_what_stands_around_the_encoder_is_kept(trained, tiny_parent, tmp_path):
    """Vectors of another length, or without their prompt, would be another model's."""
    trained.prompts, trained.default_prompt_name = {"query": "query: "}, "query"
    trained.similarity_fn_name, trained.truncate_dim = "dot", 16
    again = unpack(pack(trained, str(tiny_parent), tmp_path / "packed"), str(tiny_parent))
    assert again.prompts["query"] == "query: "
    assert (again.default_prompt_name, again.similarity_fn_name, again.truncate_dim) == ("query", "dot", 16)
    assert again.encode("a text").shape == (16,)
    trained.append(Dense(32, 8))
    with pytest.raises(ValueError, match=r"model is made of Transformer, Pooling, .*Dense; allowed: the modules of parent"):
        pack(trained, str(tiny_parent), tmp_path / "other")


@pytest.mark.parametrize("is_in_mixture", [True, False])
def test_a_pooler_that_nobody_uses_may_be_there_or_not(is_in_mixture, tiny_parent, tmp_path):
    with_pooler, without = (SentenceTransformer(str(tiny_parent), device="cpu") for _ in range(2))
    sentence.encoder_of(without).pooler = None
    sentence.encoder_of(with_pooler).pooler = BertPooler(sentence.encoder_of(with_pooler).config)
    parents = (with_pooler, without) if is_in_mixture else (without, with_pooler)
    mixture = upcycle(parents[0])
    again = unpack(pack(mixture, parents[1], tmp_path / "packed"), parents[1])
    assert torch.equal(*(torch.from_numpy(model.encode("a text")) for model in (mixture, again)))


def test_what_did_not_learn_takes_no_place(tiny_parent, tmp_path):
    model = upcycle(str(tiny_parent))
    folder = pack(model, str(tiny_parent), tmp_path / "packed")
    assert (folder / DIFFERENCE).stat().st_size < 1000
    again = unpack(folder, str(tiny_parent))
    for name, tensor in sentence.encoder_of(model).state_dict().items():
        assert torch.equal(tensor, sentence.encoder_of(again).state_dict()[name])


def test_another_parent_is_refused(trained, tiny_parent, tmp_path):
    """Differences from one model, added to another, would be a third that nobody trained."""
    pack(trained, str(tiny_parent), tmp_path / "packed")
    other = SentenceTransformer(str(tiny_parent), device="cpu")
    with torch.no_grad():
        sentence.encoder_of(other).embeddings.word_embeddings.weight[5] += 1
    assert fits(tmp_path / "packed", SentenceTransformer(str(tiny_parent), device="cpu"))
    assert not fits(tmp_path / "packed", other)
    assert not fits(tmp_path, other)
    with pytest.raises(ValueError, match=r"parent has the weights .*; allowed: those that were packed against"):
        unpack(tmp_path / "packed", other)


def test_tensors_that_say_nothing_of_themselves_are_refused(trained, tiny_parent, tmp_path):
    """Another's file of that name, or one that a tool wrote anew without what stood in its head."""
    pack(trained, str(tiny_parent), tmp_path / "packed")
    save_file(load_file(tmp_path / "packed" / DIFFERENCE), tmp_path / "packed" / DIFFERENCE)
    for read in (unpack, fits):
        with pytest.raises(ValueError, match=r"difference\.safetensors says nothing of itself; allowed: a file that `pack`"):
            read(tmp_path / "packed", SentenceTransformer(str(tiny_parent), device="cpu"))


def test_a_dense_model_is_refused(tiny_parent, tmp_path):
    with pytest.raises(ValueError, match="model holds a BertModel; allowed: a HagMoeModel, a HAG-MoE, see"):
        pack(SentenceTransformer(str(tiny_parent), device="cpu"), str(tiny_parent), tmp_path / "packed")
    with pytest.raises(OSError, match=r"config\.json"):
        unpack(tmp_path, str(tiny_parent))
