import pytest
import torch
from conftest import spread, tiny_config

from hagmoe_hf import HagMoeModel
from hagmoe_hf.training.lora import add_lora, merge_lora
from hagmoe_hf.training.parameters import encoder_parameters, freeze, value_by_pattern


def states(model):
    ids = torch.randint(1, 99, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    return model(input_ids=ids, attention_mask=mask).last_hidden_state


@pytest.mark.parametrize("targets", [["experts"], ["router"], ["experts", "router"]])
@pytest.mark.parametrize(("implementation", "is_gated"), [("eager", False), ("grouped_mm", True)])
def test_adapters_begin_as_nothing_learn_and_merge_into_the_weights(targets, implementation, is_gated):
    """Someone fine-tunes with little memory, and ships a model that needs no PEFT."""
    torch.manual_seed(0)
    model = spread(HagMoeModel(tiny_config(gated_mlp=is_gated)))
    model.set_experts_implementation(implementation)
    before, names = states(model), list(model.state_dict())
    add_lora(model, 2, 4.0, targets)
    assert torch.equal(states(model), before)

    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    stacks = 2 * 2 * len(model.config.sparse_layers)  # what enters and what leaves the experts, A and B
    assert sum(".experts." in name for name in trained) == (stacks if "experts" in targets else 0)
    assert all("lora_" in name for name in trained)
    assert {"experts": "router", "router": "experts"}.get("".join(targets), "neither") not in " ".join(trained)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05)
    for _ in range(2):  # the first step can only move lora_B, which starts at 0
        optimizer.zero_grad()
        states(model.train()).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)
    with torch.no_grad():  # large enough to change who is chosen: an adapter that merging forgets must show
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=10)
    after = states(model.eval())
    assert (after - before).abs().max() > 1e-2

    merge_lora(model)
    assert sorted(model.state_dict()) == sorted(names)
    assert (states(model) - after).abs().max() < 1e-4
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match=r"lora_targets=\['attention'\] is not possible; allowed: 'experts', 'router'"):
        add_lora(HagMoeModel(tiny_config()), 2, 4.0, ["attention"])


def test_freezing_by_name_holds_exactly_what_matches():
    """The parent's weights stay, or the experts alone learn: whoever says so means it."""
    model = HagMoeModel(tiny_config())
    frozen = freeze(model, ["embeddings.*", "*.attention.*"])
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not (name.startswith("embeddings.") or ".attention." in name)), name
    assert sorted(frozen) == sorted(name for name, parameter in model.named_parameters() if not parameter.requires_grad)


def test_a_pattern_that_matches_nothing_is_refused_with_names_that_exist():
    """A misspelt pattern would train what was to be held."""
    with pytest.raises(ValueError, match=r"pattern '\*.expert_gates.\*' matches no parameter; allowed: .*'embeddings"):
        freeze(HagMoeModel(tiny_config()), ["*.expert_gates.*"])
    with pytest.raises(ValueError, match=r"freeze=\['\*'\] leaves no parameter to train"):
        freeze(HagMoeModel(tiny_config()), ["*"])


def test_of_several_patterns_the_last_counts():
    assert value_by_pattern(["a.b", "a.c", "d"], {"*": 0.0, "a.*": 1.0, "*.c": 2.0}) == {"a.b": 1.0, "a.c": 2.0, "d": 0.0}


def test_names_are_the_encoders_whatever_wraps_it(real_mixture):
    """A pattern must not stop to match because a run has two processes."""
    own = {name for name, _ in real_mixture[0].model.named_parameters()}
    wrapped = torch.nn.Module()
    wrapped.module = real_mixture
    assert set(encoder_parameters(real_mixture[0].model)) == own
    assert set(encoder_parameters(real_mixture)) == own
    assert set(encoder_parameters(wrapped)) == own
