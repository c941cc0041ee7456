"""What is found about trained runs: where experts part, what length and the memory are worth."""

import dataclasses

import numpy as np
import pytest
import torch
from ablation import scoring
from ablation.arms import DENSE, HAG
from ablation.lengths import scores_by_length
from ablation.memory import scores_by_memory, turned_down
from ablation.parting import mean_with_error, merged_experts, one_group, parting, ranks_by_merging, reciprocal_ranks
from ablation.staying import staying
from ablation_helpers import ARMS, model_of, trained

from hagmoe_hf import sentence


def test_parting_tells_agreement_distance_and_what_merging_does(prepared, pairs, dev, tmp_path):
    """At the start nothing has parted and every variant is the parent; later each figure is what its name says."""
    dense, start = model_of(DENSE, prepared), model_of(HAG, prepared)
    found = parting(start, dense, sentence.encoder_of(model_of(HAG, prepared)), dev)
    assert set(found["macro_mrr"]) == {
        "dense",
        "as trained",
        "experts merged",
        *(f"all texts in group {g}" for g in range(4)),
    }
    assert list(found["macro_mrr"].values()) == pytest.approx([found["macro_mrr"]["dense"]] * 7, abs=1e-9)
    assert sum(part["pairs"] for part in found["by_agreement"].values()) == dev.first_rows[-1]
    assert all(part["mean"] == 0 for part in found["by_agreement"].values())
    assert found["difference"] == {"pairs": dev.first_rows[-1], "mean": 0, "standard_error": 0}

    model = trained(HAG, prepared, pairs, dev, tmp_path)[1]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    encoder = sentence.encoder_of(start)
    found = parting(model, dense, encoder, dev)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items()), "it is left as it was"
    assert found["macro_mrr"]["as trained"] == pytest.approx(100 * np.mean(list(scoring.dev_scores(model, dev)[0].values())))
    merged = ranks_by_merging(model, dev, [0, 0.5, 1])
    assert merged["0"] == pytest.approx(found["macro_mrr"]["as trained"])
    assert merged["1"] == pytest.approx(found["macro_mrr"]["experts merged"])
    with torch.no_grad(), merged_experts(sentence.encoder_of(model), 0.25):
        stack = sentence.encoder_of(model).layers[0].mlp.experts.up_proj
        before = weights["0.model.layers.0.mlp.experts.up_proj"]
        assert torch.allclose(stack, 0.75 * before + 0.25 * before.mean(0), atol=1e-6)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    to_either_side = torch.tensor([1.0, -1.0]).repeat(4)
    with torch.no_grad():
        for layer in encoder.config.sparse_layers:
            for name, stack in sentence.encoder_of(model).layers[layer].mlp.experts.named_parameters():
                side = to_either_side.view(-1, *[1] * (stack.dim() - 1))
                stack.copy_(encoder.layers[layer].mlp.experts.get_parameter(name) + 4 + side)
    assert parting(model, dense, encoder, dev)["expert_distance"] == pytest.approx([1 / 4, 1 / 4])


def test_a_memory_can_be_turned_down(prepared, pairs, dev, tmp_path):
    """Off, it must be as if it had never been; and every row that was learned comes from training."""
    model = trained(dataclasses.replace(ARMS["memory"], memory=50), prepared, pairs, dev, tmp_path)[1]
    memory = sentence.encoder_of(model).ngram_memory
    assert memory.rows.shape[0] == 51
    assert memory.rows[1:].any()
    kit_set = next(one for one in scoring.kit_sets(prepared / "kit") if one.kind == "sts")
    found = scores_by_memory(model, dev, kit_set, [0, 1])
    with torch.no_grad():
        memory.rows.zero_()
    nothing = scores_by_memory(model, dev, kit_set, [1])
    assert found["0"] == nothing["1"]
    assert found["1"] != nothing["1"]
    with pytest.raises(ValueError, match="no memory"), turned_down(model_of(DENSE, prepared), 0.5):
        pass


def test_staying_tells_what_moved(prepared, pairs, dev, tmp_path):
    """A promise that nothing moves is worth what its measurement is."""
    parent = sentence.load(str(prepared / "parent"), device="cpu")
    start = staying(model_of(HAG, prepared), parent, dev, "en")
    assert {name: found["unchanged"] for name, found in start.items()} == {"code": 1, "lexical": 1, "software": 1}
    assert all(found["cosine"] == pytest.approx(1) for found in start.values())
    assert list(staying(parent, parent, dev, "xx")) == ["lexical"]
    count = sum(found["texts"] for found in start.values()) + staying(parent, parent, dev, "xx")["lexical"]["texts"]
    assert count == 2 * dev.first_rows[-1]
    learned = staying(trained(DENSE, prepared, pairs, dev, tmp_path)[1], parent, dev, "en")
    assert all(found["unchanged"] < 0.1 and found["cosine"] < 1 for found in learned.values())


def test_scores_by_length_are_those_of_texts_that_were_cut(prepared):
    """Untrained, the two are one model; a finding about lengths must come from lengths, and leave the model as it was."""
    mixture, dense = model_of(HAG, prepared), model_of(DENSE, prepared)
    weights = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    (kit_set,) = (one for one in scoring.kit_sets(prepared / "kit") if one.key == "retrieval/arxiv_tags")
    found = scores_by_length(mixture, dense, kit_set, [4, 64])
    assert set(found) == {"4", "64"}
    for scores in found.values():
        assert scores == pytest.approx(dict.fromkeys(("as trained", "dense", "experts merged"), scores["dense"]))
    assert found["4"]["dense"] != pytest.approx(found["64"]["dense"])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in mixture.state_dict().items())
    assert mixture.max_seq_length == dense.max_seq_length


def test_an_error_over_domains_is_that_of_their_means():
    random = np.random.default_rng(0)
    parts = [random.normal(size=(4000, size)) * spread + spread for size, spread in ((40, 1.0), (10, 3.0))]
    found = mean_with_error([part[0] for part in parts])
    assert found["pairs"] == 50
    assert found["mean"] == pytest.approx((parts[0][0].mean() + parts[1][0].mean()) / 2)
    drawn = [mean_with_error([part[i] for part in parts]) for i in range(4000)]
    assert np.std([one["mean"] for one in drawn]) == pytest.approx(
        np.mean([one["standard_error"] for one in drawn]), rel=0.1
    )
    assert mean_with_error([np.ones(1), np.ones(5)])["standard_error"] is None


def test_texts_of_one_group_agree(prepared, dev):
    model = model_of(HAG, prepared)
    encoder = sentence.encoder_of(model)
    with torch.no_grad(), one_group(encoder, 2):
        _, groups = reciprocal_ranks(model, dev)
    assert groups.shape == (2, dev.first_rows[-1], 2)
    assert (groups == 2).all()
    assert not any(encoder.layers[layer].mlp.router.group_bias.any() for layer in encoder.config.sparse_layers)
