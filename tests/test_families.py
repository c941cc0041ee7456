import re

import pytest
import torch
import transformers
from conftest import TINY, route_hard, spread
from transformers import (
    ModernBertConfig,
    ModernBertModel,
    NomicBertConfig,
    NomicBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

from hagmoe_hf import upcycle
from hagmoe_hf.families import FAMILIES
from hagmoe_hf.upcycling import mixture_names

CONFIGS = {
    "bert": (transformers.BertConfig, {}),
    "roberta": (RobertaConfig, {"type_vocab_size": 1}),
    "xlm-roberta": (transformers.XLMRobertaConfig, {"type_vocab_size": 1}),
    "modernbert": (
        ModernBertConfig,
        {"local_attention": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "classifier_pooling": "mean"},
    ),
    "nomic_bert": (NomicBertConfig, {}),
}
CLASSES = [(family, name) for family, entry in FAMILIES.items() for name in entry.heads]
WAYS = {
    "default": {},
    "no shared expert": {"shared_expert_fraction": 0.0},
    "two experts in every layer": {
        "n_group": 1,
        "num_experts_per_tok": 2,
        "combine_rule": "normalized",
        "sparse_layers": [0, 1, 2],
    },
}
LENGTHS = (21, 9, 13)


def tiny_parent(family: str, name: str, **changes) -> PreTrainedModel:
    config_class, family_fields = CONFIGS[family]
    torch.manual_seed(0)
    # Wide enough to matter, and narrow enough that float32 rounding stays well below the gate
    return spread(getattr(transformers, name)(config_class(**{**TINY, **family_fields, **changes})), scale=0.2)


def batch(pad_token_id: int, choices: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, TINY["vocab_size"], (3, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]).long()
    inputs = {"input_ids": ids.masked_fill(mask == 0, pad_token_id), "attention_mask": mask}
    return {name: tensor.unsqueeze(1).repeat(1, 2, 1) if choices else tensor for name, tensor in inputs.items()}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize(("family", "name"), CLASSES)
def test_a_mixture_of_any_family_and_head_gives_its_parents_outputs(family, name, options):
    """People run these models today; on the day they switch, nothing may change."""
    parent = tiny_parent(family, name)
    mixture = route_hard(upcycle(parent, **options))
    inputs = batch(parent.config.pad_token_id, choices="MultipleChoice" in name)
    with torch.inference_mode():
        expected, got = parent(**inputs), mixture(**inputs)
    real = inputs["attention_mask"].bool()
    for key in expected.keys() & {"last_hidden_state", "pooler_output", "logits", "start_logits", "end_logits"}:
        want, have = expected[key], got[key]
        if want.shape[: real.dim()] == real.shape:
            want, have = want[real], have[real]
        assert want.std() > 0.01, "values too narrow to show a misplaced parameter"
        assert (have - want).abs().max() <= 1e-5, key


@pytest.mark.parametrize(("family", "name"), CLASSES)
def test_a_saved_parent_of_any_family_keeps_its_head(family, name, tmp_path):
    """A path is what people have; a head that gets lost on the way is a model that gets lost."""
    tiny_parent(family, name).save_pretrained(tmp_path)
    mixture = upcycle(tmp_path)
    assert type(mixture).__name__ == FAMILIES[family].heads[name].mixture_class
    mixture.save_pretrained(tmp_path / "mixture")
    _, info = type(mixture).from_pretrained(tmp_path / "mixture", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize(
    ("family", "name"), [("modernbert", "ModernBertModel"), ("nomic_bert", "NomicBertModel"), ("roberta", "RobertaModel")]
)
def test_the_report_and_the_config_count_the_parameters_of_every_shape(family, name):
    """What a user plans memory and FLOPs by."""
    parent = tiny_parent(family, name)
    mixture = upcycle(parent)
    report, counts = mixture.upcycling_report, mixture.config.parameter_counts(add_pooling_layer=mixture.pooler is not None)
    assert sum(n for _, n in report.copied) + sum(n for _, n in report.split) == parent.num_parameters()
    assert (report.total_parameters, report.active_parameters) == (counts.total, counts.active)
    assert report.total_parameters == sum(p.numel() for p in mixture.parameters())


def test_both_halves_of_a_gated_block_are_split_by_the_same_neurons():
    """Gate and up belong together: a neuron cut in two would compute something else."""
    parent = tiny_parent("modernbert", "ModernBertModel")
    mixture = upcycle(parent, sparse_layers=[1], shared_expert_fraction=0.25)
    dense, sparse = parent.layers[1].mlp, mixture.layers[1].mlp
    gate, up = dense.Wi.weight.chunk(2)
    shared_gate, shared_up = sparse.shared_expert.gate_up_proj.weight.chunk(2)
    for expert in sparse.experts.gate_up_proj:
        routed_gate, routed_up = expert.chunk(2)
        assert torch.equal(torch.cat([shared_gate, routed_gate]), gate)
        assert torch.equal(torch.cat([shared_up, routed_up]), up)


def test_a_mixture_sees_as_far_as_its_parent_in_local_layers():
    """Off by one at the window's edge is the usual mistake: a token just outside must not count, one just inside must."""
    parent = tiny_parent("modernbert", "ModernBertModel", layer_types=["sliding_attention"] * 3, num_hidden_layers=3)
    # Sequence routing lets every token weigh in on the groups; one group leaves attention as the only way to be seen
    mixture = upcycle(parent, sparse_layers=[0], n_group=1)
    ids = batch(0)["input_ids"][:1]
    reach = 3 * 3
    for distance, counts in ((reach, True), (reach + 1, False)):
        changed = ids.clone()
        changed[0, distance] = (changed[0, distance] - 2) % 90 + 3
        with torch.inference_mode():
            difference = (mixture(ids).last_hidden_state[0, 0] - mixture(changed).last_hidden_state[0, 0]).abs().max()
        assert (difference > 1e-5) == counts


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_rule_of_a_table_is_dead(model_type):
    """A rule that no parameter takes is a misspelt one, or one for something that is gone."""
    family = FAMILIES[model_type]
    for name, head in family.heads.items():
        parent = tiny_parent(model_type, name)
        keys = {key.removeprefix(f"{parent.base_model_prefix}.") for key in parent.state_dict()}
        for pattern, _ in head.key_rules:
            assert any(re.fullmatch(pattern, key) for key in keys), (name, pattern)
    keys = set(tiny_parent(model_type, next(iter(family.heads))).state_dict())
    for pattern, _ in family.key_rules:
        is_poolers = "pooler" in pattern and model_type == "nomic_bert"  # only its classifiers have one
        assert is_poolers or any(re.fullmatch(pattern, key) for key in keys), pattern


def test_a_fused_parameter_becomes_its_parts_in_order():
    rules = FAMILIES["modernbert"].key_rules
    names = mixture_names("layers.3.attn.Wqkv.weight", rules)
    assert names == tuple(f"layers.3.attention.{part}_proj.weight" for part in "qkv")
    assert mixture_names("layers.3.attn.unheard_of.weight", rules) == ()


def test_the_rotary_frequencies_stay_float32_in_a_half_precision_model():
    """Rounded to bfloat16, position 500 would point somewhere else."""
    parent = tiny_parent("nomic_bert", "NomicBertModel")
    mixture = upcycle(parent)
    exact = mixture.rotary_emb.full_attention_inv_freq.clone()
    assert torch.equal(mixture.to(torch.bfloat16).rotary_emb.full_attention_inv_freq, exact)
    assert upcycle(parent.to(torch.bfloat16)).rotary_emb.full_attention_inv_freq.dtype == torch.float32


def test_rotary_frequencies_come_back_from_disk(tmp_path):
    """They are no weights, so loading must compute them again: left empty, they would be whatever lay in memory."""
    mixture = upcycle(tiny_parent("modernbert", "ModernBertModel"))
    mixture.save_pretrained(tmp_path)
    again = type(mixture).from_pretrained(tmp_path)
    for name, buffer in mixture.rotary_emb.named_buffers():
        assert torch.equal(again.rotary_emb.get_buffer(name), buffer)
    inputs = batch(0)
    with torch.inference_mode():
        assert torch.equal(again(**inputs).last_hidden_state, mixture(**inputs).last_hidden_state)


def test_a_head_width_of_its_own_is_refused():
    with pytest.raises(ValueError, match="head_dim=16 in the parent's config cannot be upcycled; allowed: 8"):
        upcycle(NomicBertModel(NomicBertConfig(**TINY, head_dim=16)))


def test_a_window_of_nothing_is_refused_by_the_parents_field():
    """The mixture calls it otherwise, and its name would not be found in the parent's config."""
    with pytest.raises(ValueError, match="local_attention=1 in the parent's config cannot be upcycled; allowed: 2 or more"):
        upcycle(tiny_parent("modernbert", "ModernBertModel", local_attention=1))


def test_a_roberta_without_padding_id_is_refused():
    """Its positions start by that id."""
    parent = RobertaModel(RobertaConfig(**{**TINY, "pad_token_id": 1}))
    parent.config.pad_token_id = None
    with pytest.raises(ValueError, match="pad_token_id=None in the parent's config cannot be upcycled"):
        upcycle(parent)


def test_dropouts_follow_the_parent():
    """Fine-tuning must regularise as the parent's does."""
    config = ModernBertConfig(
        **{**TINY, **CONFIGS["modernbert"][1]}, embedding_dropout=0.1, attention_dropout=0.2, mlp_dropout=0.3
    )
    mixture = upcycle(ModernBertModel(config))
    layer = mixture.layers[0]
    assert (mixture.embeddings.dropout.p, layer.dropout.p, layer.mlp_dropout.p) == (0.1, 0.2, 0.3)
    assert mixture.config.attention_probs_dropout_prob == 0.2
