import copy
import json
import math

import numpy as np
import pytest
import torch
from conftest import MODES, TINY, route_hard, spread
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    BertModel,
    ElectraConfig,
    ElectraModel,
)

from hagmoe_hf import HagMoeForMaskedLM, HagMoeForSequenceClassification, HagMoeModel, upcycle
from hagmoe_hf.demo import parent_folder

WAYS = {
    **MODES,
    "no shared expert": {"shared_expert_fraction": 0.0},
    "a narrow shared expert": {"shared_expert_fraction": 0.13},
    "all layers": {"sparse_layers": [0, 1, -1]},
}
HEADS = [
    (BertModel, HagMoeModel),
    (BertForMaskedLM, HagMoeForMaskedLM),
    (BertForSequenceClassification, HagMoeForSequenceClassification),
]


def tiny_parent(cls=BertModel, **changes):
    return spread(cls(BertConfig(**{**TINY, **changes})))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, TINY["vocab_size"], (3, 11), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(11)[None] < torch.tensor([[11], [4], [7]])).long()
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize(("dense_class", "mixture_class"), HEADS)
def test_a_mixture_gives_its_parents_outputs_however_it_routes(dense_class, mixture_class, options):
    """The promise of the package: nobody's vectors change on the day they switch."""
    parent = tiny_parent(dense_class)
    mixture = route_hard(upcycle(parent, **options))
    assert type(mixture) is mixture_class
    inputs = batch()
    with torch.inference_mode():
        expected, got = parent(**inputs)[0], mixture(**inputs)[0]
    if got.dim() == 3:
        real = inputs["attention_mask"].bool()
        expected, got = expected[real], got[real]
    assert (got - expected).abs().max() <= 1e-5


def test_the_pooled_output_is_the_parents_too():
    parent = tiny_parent()
    with torch.inference_mode():
        difference = upcycle(parent)(**batch()).pooler_output - parent(**batch()).pooler_output
    assert difference.abs().max() <= 1e-5


def test_a_parent_without_pooler_gives_a_mixture_without_pooler():
    """An invented pooler would be random, and look real."""
    parent = spread(BertModel(BertConfig(**TINY), add_pooling_layer=False))
    assert upcycle(parent).pooler is None


def test_every_number_of_the_parent_is_in_the_mixture_exactly_once():
    """Shared slice and routed slice, put together again, are the parent's feed-forward block."""
    parent = tiny_parent()
    mixture = upcycle(parent, sparse_layers=[1], shared_expert_fraction=0.25)
    dense, sparse = parent.encoder.layer[1], mixture.layers[1].mlp
    shared, experts = sparse.shared_expert, sparse.experts
    for expert in range(8):
        assert torch.equal(torch.cat([shared.up_proj.weight, experts.up_proj[expert]]), dense.intermediate.dense.weight)
        assert torch.equal(torch.cat([shared.up_proj.bias, experts.up_proj_bias[expert]]), dense.intermediate.dense.bias)
        assert torch.equal(torch.cat([shared.down_proj.weight, experts.down_proj[expert]], dim=1), dense.output.dense.weight)
    assert torch.equal(shared.down_proj.bias, dense.output.dense.bias)
    assert (experts.down_proj_bias == 0).all()


def test_experts_are_copies_that_can_part():
    """A view shared by all experts would train them as one."""
    experts = upcycle(tiny_parent()).layers[1].mlp.experts
    with torch.no_grad():
        experts.up_proj[0].add_(1)
    assert not torch.equal(experts.up_proj[0], experts.up_proj[1])


def test_the_parent_is_left_as_it_was():
    parent = tiny_parent()
    before = copy.deepcopy(parent.state_dict())
    mixture = upcycle(parent)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[key], value) for key, value in parent.state_dict().items())


def test_the_report_counts_every_parameter():
    """It is what a user reads to believe the rest."""
    parent = tiny_parent()
    mixture = upcycle(parent, sparse_layers=[0, 2])
    report = mixture.upcycling_report
    assert report.sparse_layers == (0, 2)
    assert sum(n for _, n in report.copied) + sum(n for _, n in report.split) == report.parent_parameters
    assert report.parent_parameters == sum(p.numel() for p in parent.parameters())
    assert report.total_parameters == sum(p.numel() for p in mixture.parameters())
    counts = mixture.config.parameter_counts()
    assert (report.total_parameters, report.active_parameters) == (counts.total, counts.active)
    named = dict(mixture.named_parameters())
    assert {name: p.numel() for name, p in named.items() if ".router." in name or "down_proj_bias" in name} == dict(
        report.new
    )
    assert "sparse layers: 0, 2" in str(report)
    assert report.to_dict()["num_experts"] == 8


def test_the_seed_decides_the_routers_and_nothing_else_is_disturbed():
    """Two people who upcycle the same parent must get the same mixture."""
    parent = tiny_parent()
    torch.manual_seed(5)
    first = upcycle(parent).state_dict()
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1)), "upcycling must not use up the caller's random numbers"
    assert all(torch.equal(first[key], value) for key, value in upcycle(parent).state_dict().items())
    other = upcycle(parent, seed=1).state_dict()
    changed = {key for key, value in other.items() if not torch.equal(first[key], value)}
    assert changed == {key for key in first if ".router." in key and not key.endswith("_bias")}


def test_a_gpus_random_numbers_are_left_alone(monkeypatch):
    """Unlike a CPU's, they are not put back by fork_rng unless it is told of each GPU."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded every GPU"))
    upcycle(tiny_parent())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_mode_follow_the_parent(dtype):
    parent = tiny_parent().to(dtype).train()
    mixture = upcycle(parent)
    assert mixture.training
    assert {p.dtype for p in mixture.parameters()} == {dtype}
    biases = [buffer for name, buffer in mixture.named_buffers() if name.endswith(("group_bias", "expert_bias"))]
    assert {bias.dtype for bias in biases} == {torch.float32}, "training moves them by steps that half precision loses"
    assert not upcycle(parent.eval()).training


@pytest.mark.parametrize(("dense_class", "mixture_class"), HEADS)
def test_a_saved_parent_is_upcycled_as_what_it_is(dense_class, mixture_class, tmp_path):
    """A path to a masked-LM checkpoint must not lose its head."""
    parent = tiny_parent(dense_class)
    parent.save_pretrained(tmp_path)
    mixture = upcycle(tmp_path)
    assert type(mixture) is mixture_class
    with torch.inference_mode():
        real = batch()["attention_mask"].bool()
        expected, got = parent(**batch())[0], mixture(**batch())[0]
        assert ((got - expected)[real] if got.dim() == 3 else got - expected).abs().max() <= 1e-5


def test_an_encoder_in_a_subfolder_is_found(tmp_path):
    """So older sentence-transformers saved it; what they saved is still out there."""
    tiny_parent(vocab_size=30522).save_pretrained(tmp_path / "0_Transformer")
    AutoTokenizer.from_pretrained(parent_folder(), model_max_length=60).save_pretrained(tmp_path / "0_Transformer")
    (tmp_path / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(pooling))
    names = {"0_Transformer": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{name}"}
        for place, (path, name) in enumerate(names.items())
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    texts = ["free the disk space", "Wie spät ist es?"]
    difference = upcycle(tmp_path).encode(texts) - SentenceTransformer(str(tmp_path), device="cpu").encode(texts)
    assert abs(difference).max() <= 1e-5


def test_layers_and_texts_may_come_from_any_iterable(corpus):
    """A generator is gone after one look, and would be reported as empty."""
    parent = SentenceTransformer(str(parent_folder()), device="cpu")
    texts = corpus[:64]
    mixture = upcycle(parent, sparse_layers=(layer for layer in (0, 2)), calibration_texts=(text for text in texts))
    assert mixture.upcycling_report == upcycle(parent, sparse_layers=[0, 2], calibration_texts=texts).upcycling_report


def test_labels_survive():
    parent = tiny_parent(BertForSequenceClassification, id2label={0: "cat", 1: "dog", 2: "owl"}, label2id={"cat": 0})
    assert upcycle(parent).config.id2label == {0: "cat", 1: "dog", 2: "owl"}


# What a user can get wrong


REFUSED = {
    "fraction too high": ({"shared_expert_fraction": 1.0}, "shared_expert_fraction=1.0 is not possible"),
    "fraction negative": ({"shared_expert_fraction": -0.1}, "shared_expert_fraction=-0.1 is not possible"),
    "fraction not a number": ({"shared_expert_fraction": "half"}, "shared_expert_fraction='half' is not possible"),
    "fraction NaN": ({"shared_expert_fraction": math.nan}, "shared_expert_fraction=nan is not possible"),
    "nothing left": ({"shared_expert_fraction": 0.99}, "leaves no neuron of intermediate_size=64"),
    "layer out of range": ({"sparse_layers": [1, 3]}, "names layer 3; allowed: 0 to 2"),
    "layers as text": ({"sparse_layers": "1,2"}, "sparse_layers='1,2' is not possible"),
    "a layer alone": ({"sparse_layers": 1}, "sparse_layers=1 is not possible; allowed: a list of layer numbers"),
    "a text alone": ({"calibration_texts": "a b"}, "calibration_texts holds 'a b' of type str; allowed: a list of texts"),
    "texts as a number": ({"calibration_texts": 9}, "calibration_texts holds 9 of type int; allowed: a list of texts"),
    "softmax": ({"combine_rule": "softmax"}, "combine_rule='softmax' cannot be upcycled"),
    "groups": ({"n_group": 3}, "n_group=3 is not possible; allowed: a divisor of num_experts=8"),
    "groups as text": ({"n_group": "4"}, "'n_group' expected int, got str"),
    "seed as text": ({"seed": "0"}, "seed='0' is not possible; allowed: an integer from 0 to 4294967295"),
    "seed too large": ({"seed": 2**32}, "seed=4294967296 is not possible"),
    "no seed": ({"seed": None}, "seed=None is not possible"),
    "layers as truth": ({"sparse_layers": [True]}, r"sparse_layers=\[True\] is not possible"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_impossible_upcycling_is_refused_with_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        upcycle(tiny_parent(), **options)


def test_a_width_that_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="intermediate_size=37 in the parent's config cannot be split"):
        upcycle(tiny_parent(intermediate_size=37))


def test_an_unknown_family_is_refused():
    parent = ElectraModel(ElectraConfig(**TINY))
    with pytest.raises(ValueError, match="model_type='electra' cannot be upcycled; allowed: bert, modernbert"):
        upcycle(parent)


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match="BertForNextSentencePrediction cannot be upcycled; allowed: BertForMaskedLM"):
        upcycle(tiny_parent(BertForNextSentencePrediction))


def test_a_decoder_is_refused():
    """Its attention is causal: the mixture would silently see the future."""
    with pytest.raises(ValueError, match="is_decoder=True"):
        upcycle(tiny_parent(is_decoder=True))


def test_a_mixture_is_refused():
    with pytest.raises(ValueError, match="HagMoeModel is a mixture already"):
        upcycle(upcycle(tiny_parent()))


def test_a_parent_with_parameters_of_its_own_is_refused():
    """Leaving them out would change the vectors."""
    parent = tiny_parent()
    parent.encoder.layer[0].adapter = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"no place for: \['encoder\.layer\.0\.adapter\.weight'"):
        upcycle(parent)


@pytest.mark.parametrize("thing", [None, 3, torch.nn.Linear(2, 2), ["bert"]])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(TypeError, match="allowed: a path or Hub id"):
        upcycle(thing)


def test_a_parent_that_diverged_is_refused_by_name():
    parent = tiny_parent()
    with torch.no_grad():
        parent.encoder.layer[2].output.dense.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"encoder\.layer\.2\.output\.dense\.weight in .* holds NaN"):
        upcycle(parent)


def test_a_missing_folder_is_refused():
    """The library below would ask the Hub for it and complain about repository names."""
    with pytest.raises(FileNotFoundError, match="parent='/no/such/folder' is no folder"):
        upcycle("/no/such/folder")
    with pytest.raises(OSError, match="'no-such-folder' is no folder, and could not be loaded from the Hub"):
        upcycle("no-such-folder")


def test_a_truncated_parent_is_refused_with_its_folder(tmp_path):
    tiny_parent().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"A weights file of {tmp_path} is damaged"):
        upcycle(tmp_path)


@pytest.mark.parametrize("as_sentence_transformer", [False, True])
def test_missing_and_left_over_weights_are_named_and_refused_unless_asked_for(as_sentence_transformer, tmp_path):
    """transformers would fill the gap with random numbers, drop the rest, and say so in a log line at best."""
    parent = tiny_parent()
    state = {key: value for key, value in parent.state_dict().items() if "layer.1.output.dense" not in key}
    state["encoder.layer.7.attention.self.query.weight"] = torch.ones(2, 2)
    parent.save_pretrained(tmp_path, state_dict=state)
    if as_sentence_transformer:
        AutoTokenizer.from_pretrained(parent_folder()).save_pretrained(tmp_path)
        module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
        (tmp_path / "modules.json").write_text(json.dumps([module]))
    names = r"lacks the weights \['encoder\.layer\.1\.output\.dense\.bias'.* leaves over \['encoder\.layer\.7\.attention"
    with pytest.raises(ValueError, match=names):
        upcycle(tmp_path)
    with pytest.warns(UserWarning, match=names):
        mixture = upcycle(tmp_path, allow_key_mismatch=True)
    encoder = mixture[0].model if as_sentence_transformer else mixture
    assert torch.equal(encoder.layers[0].attention.q_proj.weight, parent.encoder.layer[0].attention.self.query.weight)


def test_a_checkpoint_without_pooler_gives_a_mixture_without_pooler_also_after_saving(tmp_path):
    """Most sentence models are saved without one; a random one would look like a part of the model."""
    spread(BertModel(BertConfig(**TINY), add_pooling_layer=False)).save_pretrained(tmp_path)
    mixture = upcycle(tmp_path)
    assert mixture.pooler is None
    mixture.save_pretrained(tmp_path / "mixture")
    assert AutoModel.from_pretrained(tmp_path / "mixture").pooler is None


def test_numbers_of_numpy_are_numbers():
    sizes = {"n_group": np.int64(2), "num_experts": np.int32(4)}
    mixture = upcycle(tiny_parent(), sparse_layers=np.array([0, 2]), seed=np.int64(3), **sizes)
    assert mixture.config.sparse_layers == [0, 2]
    assert (mixture.config.n_group, mixture.config.num_experts) == (2, 4)


def test_what_the_parent_outputs_the_mixture_outputs():
    """Modules after the encoder may weigh its hidden states; without them they would quietly do something else."""
    parent = tiny_parent(output_hidden_states=True)
    ids = torch.arange(5, 12).unsqueeze(0)
    mixture = upcycle(parent)
    assert len(mixture(ids).hidden_states) == len(parent(ids).hidden_states) == 4
    for ours, theirs in zip(mixture(ids).hidden_states, parent(ids).hidden_states, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert isinstance(upcycle(tiny_parent(return_dict=False))(ids), tuple)
