import json
import re

import pytest
from conftest import MODES, SHAPES, TINY, tiny_config
from huggingface_hub.errors import StrictDataclassError

from hagmoe_hf import HagMoeConfig, HagMoeModel
from hagmoe_hf.configuration_hagmoe import default_mlp_layer_types

CONFIGS = {
    **MODES,
    **SHAPES,
    "no shared expert": {"shared_expert_intermediate_size": 0},
    "all dense": {"mlp_layer_types": ["dense"] * 3},
    "all sparse": {"mlp_layer_types": ["sparse"] * 3},
    "more FLOPs": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 8},
}


@pytest.mark.parametrize("add_pooling_layer", [True, False])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_counted_parameters_are_those_of_the_built_model(changes, add_pooling_layer):
    """A model card or a budget planned from the config would otherwise be wrong."""
    config = tiny_config(**changes)
    model = HagMoeModel(config, add_pooling_layer=add_pooling_layer)
    counts = config.parameter_counts(add_pooling_layer)
    expert = [p.numel() // config.num_experts for n, p in model.named_parameters() if ".experts." in n]
    idle = sum(expert) * (config.num_experts - config.num_experts_per_tok)
    tables = sum(p.numel() for n, p in model.named_parameters() if "_embeddings." in n)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.active == counts.total - idle
    assert counts.embedding == tables
    assert counts.total_non_embedding == counts.total - tables
    assert counts.active_non_embedding == counts.active - tables


IMPOSSIBLE = {
    "num_experts": {"num_experts": 1, "n_group": 1},
    "n_group": {"n_group": 3},
    "n_group with groups from word embeddings": {"n_group": 1, "group_input": "word_embeddings"},
    "topk_group": {"topk_group": 5},
    "group_routing": {"group_routing": "token", "group_input": "word_embeddings"},
    "num_experts_per_tok": {"num_experts_per_tok": 3},
    "combine_rule": {"combine_rule": "normalized"},
    "moe_intermediate_size": {"moe_intermediate_size": 12},
    "shared_expert_intermediate_size": {"shared_expert_intermediate_size": -8, "moe_intermediate_size": 32},
    "mlp_layer_types": {"mlp_layer_types": ["sparse", "dense"]},
    "hidden_size": {"hidden_size": 36, "num_attention_heads": 4},
    "num_attention_heads": {"num_attention_heads": 0},
    "num_hidden_layers": {"num_hidden_layers": 0},
    "vocab_size": {"vocab_size": 0},
    "hidden_act": {"hidden_act": "gelo"},
    "hidden_dropout_prob": {"hidden_dropout_prob": 1.5},
    "layer_norm_eps": {"layer_norm_eps": float("nan")},
    "embedding_dropout": {"embedding_dropout": -0.1},
    "mlp_dropout": {"mlp_dropout": 2},
    "classifier_activation": {"classifier_activation": "tan"},
    "type_vocab_size": {"type_vocab_size": -1},
    "position_offset": {"position_offset": 64},
    "layer_types": {"layer_types": ["full_attention", "local", "full_attention"]},
    "sliding_window": {"sliding_window": None, "layer_types": ["sliding_attention"] * 3},
    "classifier_pooling": {"classifier_pooling": "mean"},
}


@pytest.mark.parametrize(("field", "changes"), IMPOSSIBLE.items(), ids=IMPOSSIBLE.keys())
def test_an_impossible_value_is_refused_with_field_value_and_what_is_allowed(field, changes):
    """Otherwise the user meets a shape error deep in a forward pass."""
    with pytest.raises(StrictDataclassError) as error:
        tiny_config(**changes)
    message, field = str(error.value), field.split(" ")[0]
    assert f"{field}={changes[field]!r} is not possible; allowed: " in message


def test_the_layer_types_name_the_wrong_word():
    with pytest.raises(
        StrictDataclassError, match="allowed: a list of num_hidden_layers=3 entries, each 'dense' or 'sparse'"
    ):
        tiny_config(mlp_layer_types=["dense", "sparse", "spares"])


@pytest.mark.parametrize("changes", [{"num_experts": "8"}, {"n_group": 2.0}, {"group_routing": "text"}, {"hidden_act": 3}])
def test_a_wrong_type_is_refused_by_name(changes):
    """`top_k: "2"` from a YAML file must not become a silent default."""
    (field,) = changes
    with pytest.raises(StrictDataclassError, match=field):
        tiny_config(**changes)


def test_normalized_weights_are_refused_where_a_gate_would_get_no_gradient():
    """With one open group its probability cancels out, and the group gate would never learn, silently."""
    with pytest.raises(StrictDataclassError, match=r"combine_rule='normalized'.*topk_group=1 of n_group=4"):
        tiny_config(combine_rule="normalized", num_experts_per_tok=2)


def test_a_width_of_zero_heads_is_not_a_division_error():
    with pytest.raises(StrictDataclassError, match="num_attention_heads=0"):
        HagMoeConfig(num_attention_heads=0)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_survives_the_disk(changes, tmp_path):
    """Derived fields must come back as they were, or the weights would not fit."""
    config = tiny_config(**changes)
    config.save_pretrained(tmp_path)
    assert HagMoeConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


def test_rotary_parameters_are_refused_where_positions_are_learned():
    """A flag that does nothing would be believed."""
    with pytest.raises(
        StrictDataclassError, match=r"rope_parameters=.*allowed: None with position_embedding_type='absolute'"
    ):
        tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 1000.0})


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ],
)
def test_rotary_positions_that_depend_on_the_batch_are_refused(parameters):
    """Dynamic frequencies follow the longest text of a batch, so a text would change with its neighbours."""
    with pytest.raises(StrictDataclassError, match=r"rope_parameters=.* is not possible; allowed: a rope_type of"):
        tiny_config(position_embedding_type="rope", rope_parameters=parameters)


def test_rotary_heads_need_an_even_width():
    with pytest.raises(StrictDataclassError, match="num_attention_heads=8 is not possible"):
        tiny_config(position_embedding_type="rope", hidden_size=40, num_attention_heads=8)


def test_rotary_parameters_may_be_one_for_all_layers_or_one_for_each_kind():
    """NomicBERT's configs say it once, ModernBERT's for each kind of layer."""
    kinds = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 2}
    flat = tiny_config(**kinds, position_embedding_type="rope", rope_parameters={"rope_type": "default", "rope_theta": 10.0})
    assert {kind: p["rope_theta"] for kind, p in flat.rope_parameters.items()} == dict.fromkeys(
        set(kinds["layer_types"]), 10.0
    )
    nested = {"full_attention": {"rope_theta": 7.0}, "sliding_attention": {"rope_theta": 8.0}}
    assert tiny_config(**kinds, position_embedding_type="rope", rope_parameters=nested).rope_parameters == {
        "full_attention": {"rope_theta": 7.0, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 8.0, "rope_type": "default"},
    }


def test_a_config_of_the_first_version_still_means_bert(tmp_path):
    """Saved mixtures have none of the shape fields; they must load as what they were."""
    config = tiny_config()
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    new = "position_ rope_ layer_types sliding_ norm_ gated_ attention_bias mlp_bias has_pooler classifier_ decoder_bias"
    old = {key: value for key, value in saved.items() if not key.startswith(tuple(new.split()))}
    assert len(old) < len(saved) - 10
    path.write_text(json.dumps(old))
    again = HagMoeConfig.from_pretrained(tmp_path)
    assert again.to_dict() == HagMoeConfig.from_dict(saved).to_dict()
    assert (again.position_embedding_type, again.norm_placement, again.gated_mlp) == ("absolute", "post", False)


@pytest.mark.parametrize("layers", range(1, 25))
def test_the_last_layer_is_dense_by_default(layers):
    """The last router of the best-known rival learned almost nothing."""
    kinds = default_mlp_layer_types(layers)
    assert len(kinds) == layers
    assert "sparse" in kinds
    assert kinds[-1] == "dense" or layers == 1


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("plan", ["base_model_tp_plan", "base_model_ep_plan", "base_model_fsdp_plan"])
def test_every_rule_of_a_parallel_plan_names_a_part_of_the_model(plan, changes):
    """A misspelt rule leaves its part on every rank, with a log line at best."""
    config = tiny_config(**changes)
    model = HagMoeModel(config)
    parts = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    generic = {re.sub(r"\.\d+", ".*", name) for name in parts}
    assert set(getattr(config, plan)) <= generic
    assert plan == "base_model_ep_plan" or getattr(config, plan)
    assert plan not in config.to_dict(), "a plan is code, not data: a saved one would outlive its model"


def test_experts_share_the_parents_width_by_default():
    """Equal active FLOPs are the promise of the defaults."""
    config = HagMoeConfig(**{**TINY, "intermediate_size": 88})
    assert config.shared_expert_intermediate_size + config.moe_intermediate_size == 88
    assert config.shared_expert_intermediate_size % 8 == config.moe_intermediate_size % 8 == 0
