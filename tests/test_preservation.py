"""A mixture that learns one kind of text and leaves another as it was."""

import json

import numpy as np
import pytest
import torch
from conftest import spread, tiny_config
from evaluation_helpers import shipped_rows
from sentence_transformers import SentenceTransformer
from torch.nn import functional as F
from transformers import TrainerState

from hagmoe_hf import HagMoeModel, sentence, upcycle
from hagmoe_hf.training.lora import add_lora
from hagmoe_hf.training.losses import build_loss
from hagmoe_hf.training.router_callback import RouterCallback
from hagmoe_hf.upcycling import freeze_preserved

# Two experts in the group that stays, and a shared one
SPLIT = {"sparse_layers": [0], "n_group": 4, "num_experts": 8, "shared_expert_fraction": 0.5}


@pytest.fixture(scope="module")
def languages() -> dict[str, list[str]]:
    """Real texts by language."""
    sets = {"en": "classification/wiki_topic_en", "fr": "classification/wiki_topic_fr"}
    return {language: [row["text"][:150] for row in shipped_rows(name, "train")] for language, name in sets.items()}


@pytest.fixture(scope="module")
def mixture(real_parent, languages) -> SentenceTransformer:
    """English stays, French is learned; half of the texts are kept to look at."""
    return upcycle(real_parent, ngram_texts=languages["fr"][::2], preserved_texts=languages["en"][::2])


def first_groups(model: SentenceTransformer, texts: list[str]) -> np.ndarray:
    """(texts, sparse layers) bool: where a text opens the first group"""
    encoder = sentence.encoder_of(model)
    found: dict[int, list] = {layer: [] for layer in encoder.config.sparse_layers}
    hooks = [
        encoder.layers[layer].mlp.router.register_forward_hook(
            lambda _, inputs, routing, mine=mine: mine.append(routing.expert_index.flatten()[0].item() == 0)
        )
        for layer, mine in found.items()
    ]
    for text in texts:
        model.encode(text)
    for hook in hooks:
        hook.remove()
    return np.array(list(found.values())).T


def learn(model: SentenceTransformer, texts: list[str], steps: int = 4) -> None:
    """A few steps of an optimizer that moves whatever has a gradient, however small."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    model.train()
    for step in range(steps):
        batch = model.preprocess(texts[16 * step : 16 * (step + 1)])
        vectors = F.normalize(model(batch)["sentence_embedding"], dim=-1)
        (vectors @ vectors.T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def test_nothing_changes_before_training(real_parent, mixture, languages):
    texts = languages["en"][1:40:2] + languages["fr"][1:40:2]
    assert np.abs(mixture.encode(texts) - real_parent.encode(texts)).max() <= 2e-6


def test_texts_that_were_not_seen_open_the_right_group(mixture, languages):
    """The gate decides what stays: it must know a language, not the texts that it started from."""
    stay, leave = (first_groups(mixture, languages[language][1:160:2]) for language in ("en", "fr"))
    assert stay.mean() > 0.95
    assert leave.mean() < 0.1
    calibration = mixture.upcycling_report.calibration
    assert calibration.preserved == pytest.approx(stay.all(1).mean(), abs=0.08)
    assert calibration.others == pytest.approx(1 - leave.any(1).mean(), abs=0.08)
    assert "of the preserved texts open the first group in every layer" in str(mixture.upcycling_report)


def test_what_gates_are_unsure_of_opens_the_first_group(real_parent, languages):
    """Single words look alike in many languages: those of the preserved one stay in it, were there few to start from."""
    words = sorted({word for text in languages["en"] for word in text.lower().split() if word.isalpha()})
    preserved = [*languages["en"][::2], *words[:200:2]]
    model = upcycle(real_parent, sparse_layers=[0], preserved_texts=preserved, calibration_texts=languages["fr"][::2])
    french = {word for text in languages["fr"] for word in text.lower().split()}
    assert first_groups(model, [word for word in words[1:600:2] if word not in french]).mean() > 0.95
    assert first_groups(model, languages["fr"][1:160:2]).mean() < 0.1


def test_training_leaves_preserved_texts_bit_for_bit(real_parent, languages):
    """Whoever has an index of English vectors need not make it again, though English texts were among those trained on."""
    model = upcycle(real_parent, ngram_texts=languages["fr"][::2], preserved_texts=languages["en"][::2])
    english, french = languages["en"][1:100:2], languages["fr"][1:100:2]
    at_home = first_groups(model, english).all(1)
    memory = sentence.encoder_of(model).ngram_memory
    before = [model.encode(text) for text in english], model.encode(french)
    learn(model, [text for pair in zip(languages["fr"], languages["en"], strict=False) for text in pair])
    for text, was, home in zip(english, before[0], at_home, strict=True):
        ids = model.preprocess([text])["input_ids"]
        follows = torch.ones_like(ids, dtype=torch.bool)
        if home and not memory(ids, follows).any():
            assert np.array_equal(model.encode(text), was)
    assert at_home.mean() > 0.9
    assert np.abs(model.encode(french) - before[1]).max(axis=1).min() > 1e-3
    dense = sentence.encoder_of(real_parent).state_dict()
    for layer in range(6):
        up = sentence.encoder_of(model).layers[layer].mlp.experts.up_proj
        assert torch.equal(up[0], dense[f"encoder.layer.{layer}.intermediate.dense.weight"])
        assert not torch.equal(up[1], up[0])


@pytest.mark.parametrize(("group_input", "stays"), [(None, True), ("hidden_states", False)])
def test_groups_stay_while_the_layers_below_learn(group_input, stays, real_parent, languages):
    """States drift as one while a model learns: gates that read them came to send nearly all texts to one group."""
    english, french = languages["en"], languages["fr"]
    kinds = {"preserved_texts": english[:1000:2], "calibration_texts": french[:1000:2]}
    model = upcycle(real_parent, **kinds, sparse_layers=[2], group_input=group_input)
    freeze_preserved(model, experts_only=True)
    texts = english[1:60:2] + french[1:60:2]
    before = first_groups(model, texts)
    assert before[:30].mean() > 0.9 > 0.1 > before[30:].mean()
    encoder = sentence.encoder_of(model)
    with torch.no_grad():  # a drift that every text shares
        encoder.layers[2].attention_norm.bias += torch.linspace(-1, 1, encoder.config.hidden_size)
    assert np.array_equal(first_groups(model, texts), before) == stays


def test_a_reloaded_mixture_can_be_frozen_again(mixture, tmp_path):
    """`requires_grad` is not saved, so going on would change what was to stay."""
    mixture.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert all(parameter.requires_grad for parameter in again.parameters())
    freeze_preserved(again)
    learned = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert learned == {name for name, parameter in mixture.named_parameters() if parameter.requires_grad}
    assert all(".experts." in name or name.endswith("ngram_memory.rows") for name in learned)


def test_all_but_gates_and_the_experts_that_stay_can_learn(tiny_parent, corpus):
    """Who can live with vectors that move a little gets more for the others."""
    model = upcycle(str(tiny_parent), preserved_texts=corpus[:40], calibration_texts=corpus[40:90], **SPLIT)
    freeze_preserved(model, experts_only=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    learn(model, corpus)
    (layer,) = sentence.encoder_of(model).config.sparse_layers
    for name, parameter in model.named_parameters():
        stays = parameter[:2] if ".experts." in name else parameter if ".router." in name else parameter[:0]
        assert torch.equal(stays, before[name][: len(stays)]), name
    for name in (f"layers.{layer}.mlp.experts.up_proj", "layers.0.attention.o_proj.weight"):
        assert not torch.equal(sentence.encoder_of(model).get_parameter(name), before[f"0.model.{name}"])
    freeze_preserved(model)
    assert all(p.requires_grad == (".experts." in name) for name, p in model.named_parameters())


def test_no_ngram_of_the_memory_is_in_the_texts_that_stay(mixture, languages):
    memory = sentence.encoder_of(mixture).ngram_memory
    memory.rows.data[1:] = 1.0
    batch = mixture.preprocess(languages["en"][:64:2])
    follows = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    follows[:, 0] = False
    assert not memory(batch["input_ids"], follows).any()
    french = mixture.preprocess(languages["fr"][:1])["input_ids"]
    assert memory(french, torch.arange(french.shape[1]).unsqueeze(0) > 0).any()
    memory.rows.data.zero_()


@pytest.mark.parametrize("held", [True, False], ids=["experts stay", "experts learn"])
def test_nothing_balances_what_is_preserved(held, mixture, monkeypatch):
    """A bias towards the first group's neighbours would send its texts there, also where its experts may learn."""
    monkeypatch.setattr(sentence.encoder_of(mixture).config, "preserve_first_group", held)
    before = {name: buffer.clone() for name, buffer in mixture.named_buffers()}
    callback, loss = RouterCallback(), build_loss("multiple_negatives_ranking", mixture)
    callback.on_train_begin(None, TrainerState(), None, model=mixture, loss=loss)
    mixture.train()
    loss([mixture.preprocess(["un texte", "un autre", "encore un"])] * 2, None).backward()
    callback.on_step_end(None, None, None)
    callback.on_train_end(None, None, None)
    mixture.zero_grad()
    mixture.eval()
    assert any("group_bias" in name for name in before)
    assert all(torch.equal(buffer, before[name]) for name, buffer in mixture.named_buffers())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preserved_texts": ["a text"]}, r"preserved_texts holds 1 texts, .*=None and ngram_texts=None"),
        ({"preserved_texts": [" "], "ngram_texts": ["b"]}, "preserved_texts holds no text that is not empty"),
        ({"preserved_texts": "a text", "ngram_texts": ["b"]}, "preserved_texts holds 'a text' of type str"),
        ({"preserved_texts": ["a", 3], "ngram_texts": ["b"]}, "preserved_texts holds 3 of type int"),
        ({"preserved_texts": ["a", "\ud800"], "ngram_texts": ["b"]}, r"preserved_texts\[1\] is not UTF-8"),
        ({"preserved_texts": ["a b"], "ngram_texts": ["a b"] * 9}, r"without an n-gram .* never in the 1 preserved_texts"),
        (
            {"preserved_texts": ["a"], "ngram_texts": ["a", *"bcd"] * 9, "n_group": 4, "sparse_layers": [0]},
            "ngram_texts holds 3 different texts .* nor preserved",
        ),
        (
            {"preserved_texts": ["a"], "calibration_texts": list("bcdefghijk"), "sparse_layers": []},
            r"sparse_layers=\[\] .*nothing learns",
        ),
        ({"preserved_texts": ["a"], "calibration_texts": list("bcdefghijk"), "n_group": 1}, "n_group=1 .* 2 or more"),
        (
            {"preserved_texts": ["a"], "calibration_texts": list("bcdefghijk"), "group_routing": "token"},
            "group_routing='token' .*preserve_first_group",
        ),
        ({"preserved_texts": ["a"], "calibration_texts": list("bcdefghijk"), "topk_group": 2}, "topk_group=2"),
        ({"preserved_texts": {"en": ["a"]}, "ngram_texts": ["b"]}, r"preserved_texts holds \{'en': \['a'\]\} of type dict"),
        (
            {"preserved_texts": ["a"], "calibration_texts": list("bcdefghijk"), "num_experts_per_tok": "2"},
            "'num_experts_per_tok' expected int",
        ),
        (
            {"preserved_texts": ["a"], "calibration_texts": list("bcdefghijk"), "num_experts_per_tok": 0},
            "num_experts_per_tok=0",
        ),
    ],
)
def test_what_cannot_be_preserved_is_refused(tiny_parent, options, message):
    with pytest.raises(ValueError, match=message):
        upcycle(str(tiny_parent), **options)


def test_texts_that_are_in_both_kinds_are_preserved(tiny_parent, corpus):
    """Translations are often the same as the text; a gate fitted to both at once would be fitted to nothing."""
    mixture = upcycle(str(tiny_parent), preserved_texts=corpus[:40], calibration_texts=corpus[20:90])
    assert mixture.upcycling_report.calibration.texts == 90
    assert all(torch.isfinite(parameter).all() for parameter in mixture.parameters())


@pytest.mark.parametrize("implementation", ["eager", "segmented_mm", "grouped_mm"])
@pytest.mark.parametrize("options", [{}, {"num_experts_per_tok": 2}])
def test_no_gradient_reaches_the_first_group(options, implementation, tiny_parent, corpus):
    """However experts are computed, with a shared expert and several experts in the group, padded and alone."""
    upcycled = upcycle(str(tiny_parent), preserved_texts=corpus[:40], calibration_texts=corpus[40:90], **SPLIT, **options)
    encoder = sentence.encoder_of(upcycled)
    encoder.config._experts_implementation = implementation
    upcycled.train()(upcycled.preprocess([*corpus[:6], *corpus[40:46]]))["sentence_embedding"].square().sum().backward()
    (layer,) = encoder.config.sparse_layers
    gradients = [parameter.grad for parameter in encoder.layers[layer].mlp.experts.parameters()]
    assert all(not gradient[:2].any() for gradient in gradients)
    assert any(gradient[2:].any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_comes_before_the_first_group_gets_the_gradient_that_it_has_without(dtype, tiny_parent, corpus):
    """Where all else learns, it learns from preserved texts, too: only their experts stay."""
    upcycled = upcycle(str(tiny_parent), preserved_texts=corpus[:40], calibration_texts=corpus[40:90], **SPLIT)
    upcycled.requires_grad_(True).eval()
    encoder = sentence.encoder_of(upcycled)
    found = []
    for preserves in (True, False):
        encoder.config.preserve_first_group = preserves
        upcycled.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            upcycled(upcycled.preprocess(corpus[:6]))["sentence_embedding"].square().sum().backward()
        found.append({name: parameter.grad for name, parameter in upcycled.named_parameters() if parameter.grad is not None})
    kept, free = found
    assert set(kept) == set(free)
    for name, gradient in kept.items():
        if ".experts." in name:
            assert not gradient[:2].any()
            assert free[name][:2].any()
            assert torch.equal(gradient[2:], free[name][2:])
        else:
            assert torch.equal(gradient, free[name]), name


def test_adapters_on_experts_that_stay_are_refused(tiny_parent, corpus):
    """They would move the first group's experts without a word."""
    mixture = upcycle(str(tiny_parent), calibration_texts=corpus[:40], preserved_texts=corpus[40:80], **SPLIT)
    encoder = sentence.encoder_of(mixture)
    add_lora(encoder, 2, 4.0, ["experts"])
    ids = torch.randint(3, 99, (2, 8))
    with pytest.raises(ValueError, match=r"preserve_first_group=True with .*lora_A.*: adapters on experts move preserved"):
        encoder(ids)
    with torch.no_grad():
        encoder(ids)


def test_the_first_group_stays_under_functional_gradients_as_well():
    model = spread(
        HagMoeModel(
            tiny_config(mlp_layer_types=["sparse", "dense", "dense"], n_group=2, num_experts=2, preserve_first_group=True)
        )
    )
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    ids = torch.randint(3, 99, (4, 8))

    def loss(weights: dict) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (ids,)).last_hidden_state.square().mean()

    gradient = torch.func.grad(loss)(weights)["layers.0.mlp.experts.down_proj"]
    assert not gradient[0].any()
    assert gradient.shape[0] == 2


def test_texts_that_stay_make_another_default_shape(tiny_parent, corpus):
    """The one that was measured with them; whoever wants another gives it."""
    texts = {"preserved_texts": corpus[:40], "calibration_texts": corpus[40:90]}
    shapes = [({}, (2, 2, 0, True)), ({"n_group": 3}, (3, 3, 0, True)), ({"num_experts": 4}, (2, 4, 0, True))]
    shapes += [({"num_experts_per_tok": 2}, (2, 4, 0, True))]
    shapes += [({"sparse_layers": [0], "shared_expert_fraction": 0.5}, (2, 2, 32, False))]
    for options, expected in shapes:
        config = sentence.encoder_of(upcycle(str(tiny_parent), **texts, **options)).config
        every_one = config.sparse_layers == list(range(config.num_hidden_layers))
        shape = (config.n_group, config.num_experts, config.shared_expert_intermediate_size, every_one)
        assert shape == expected, options


def test_only_what_preserves_can_be_frozen(real_parent):
    with pytest.raises(ValueError, match="preserve_first_group is not set"):
        freeze_preserved(HagMoeModel(tiny_config()))
    with pytest.raises(ValueError, match="This SentenceTransformer holds no HAG-MoE"):
        freeze_preserved(real_parent)


def test_the_configuration_says_it(mixture, tmp_path):
    sentence.encoder_of(mixture).config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["preserve_first_group"] is True
