import json

import numpy as np
import pytest
import torch
from conftest import tiny_config
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    models,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from hagmoe_hf import HagMoeForMaskedLM, HagMoeModel, sentence, upcycle
from hagmoe_hf.demo import parent_folder

TEXTS = ["free the disk space", "Wie spät ist es?", "", "a " * 400, "def f(x):\n    return x", "日本語のテキスト"]


def test_only_the_encoder_changes(real_parent, real_mixture):
    """A module class of our own would need trust_remote_code wherever the model is loaded."""
    assert [type(module) for module in real_mixture] == [type(module) for module in real_parent]
    assert all(type(module).__module__.startswith("sentence_transformers.") for module in real_mixture)
    assert isinstance(real_mixture[0].model, HagMoeModel)
    assert type(real_parent[0].model).__name__ == "BertModel"


def test_everything_around_the_encoder_is_kept():
    """Prompts, lengths and similarity are part of what a user serves."""
    parent = SentenceTransformer(
        str(parent_folder()),
        device="cpu",
        prompts={"query": "query: ", "document": "passage: "},
        default_prompt_name="query",
        similarity_fn_name="dot",
        truncate_dim=64,
    )
    parent.max_seq_length = 100
    mixture = upcycle(parent)
    for name in ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim", "max_seq_length"):
        assert getattr(mixture, name) == getattr(parent, name), name
    assert mixture.encode(["one"]).shape == (1, 64)
    assert np.abs(mixture.encode(TEXTS) - parent.encode(TEXTS)).max() <= 2e-6
    assert not np.allclose(mixture.encode(TEXTS), mixture.encode(TEXTS, prompt_name="document"))


def test_a_pooling_other_than_the_mean_is_kept(real_parent):
    cls_pooled = SentenceTransformer(modules=[real_parent[0], models.Pooling(384, pooling_mode="cls")], device="cpu")
    mixture = upcycle(cls_pooled)
    assert np.abs(mixture.encode(TEXTS) - cls_pooled.encode(TEXTS)).max() <= 1e-5


def test_every_output_of_encode_works(real_mixture):
    """What people call on a dense model, called on a mixture."""
    vectors = real_mixture.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), 384)
    assert np.isfinite(vectors).all()
    assert np.abs(real_mixture.encode(TEXTS, batch_size=2) - vectors).max() <= 1e-5
    assert np.abs(real_mixture.encode(TEXTS[0]) - vectors[0]).max() <= 1e-5
    tokens = real_mixture.encode(TEXTS[:2], output_value="token_embeddings")
    assert [t.shape[1] for t in tokens] == [384, 384]
    assert real_mixture.encode(TEXTS, truncate_dim=32).shape == (len(TEXTS), 32)
    assert real_mixture.encode(TEXTS, precision="int8").dtype == np.int8
    assert real_mixture.similarity(vectors, vectors).shape == (len(TEXTS), len(TEXTS))


def test_a_very_long_text_is_truncated_not_refused(real_parent, real_mixture):
    """100,000 characters arrive sooner or later."""
    text = "word and another one, " * 5000
    assert np.abs(real_mixture.encode([text]) - real_parent.encode([text])).max() <= 2e-6


def test_several_processes_encode_the_same_vectors(real_parent):
    """Workers are fresh processes, which must find the model's class on their own."""
    mixture = upcycle(real_parent)  # any transformers model that recorded outputs once holds hooks that cannot be pickled
    texts = TEXTS * 3
    got = mixture.encode(texts, device=["cpu", "cpu"], chunk_size=6)
    assert np.abs(got - mixture.encode(texts)).max() <= 1e-5


def test_it_comes_back_from_disk_with_stock_classes(real_mixture, tmp_path):
    """Save, load, encode: through a path that names no class of this package."""
    real_mixture.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert sentence.fingerprint(again) == sentence.fingerprint(real_mixture)
    # To rounding, which goes by where weights lie in memory
    assert np.abs(again.encode(TEXTS) - real_mixture.encode(TEXTS)).max() <= 1e-6
    assert again.max_seq_length == real_mixture.max_seq_length
    assert not list(tmp_path.rglob("*.bin"))


def test_the_saved_card_says_what_the_model_is(tmp_path):
    """The parent's card alone would claim to be the parent, and its snippet would not load a mixture."""
    upcycle(str(parent_folder())).save_pretrained(str(tmp_path))  # its own: a trainer of another test renews a shared card
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "import hagmoe_hf" in card
    assert "license: apache-2.0" in card
    assert "# The parent's model card" in card
    assert str(parent_folder()) not in card, "a card must not show where files lay on the author's machine"


def test_a_model_of_another_library_is_refused_by_its_type(tmp_path):
    """Loaded as a SentenceTransformer it would get modules that it was not trained with."""
    SentenceTransformer(str(parent_folder()), device="cpu").save_pretrained(str(tmp_path))
    file = tmp_path / "config_sentence_transformers.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "ColBERT"}))
    with pytest.raises(ValueError, match=r"model_type='ColBERT' in .* cannot be loaded here; allowed: SentenceTransf"):
        upcycle(tmp_path)
    with pytest.raises(
        ValueError, match=r"model_type='ColBERT' in .* cannot be loaded here; allowed: SentenceTransformer\."
    ):
        sentence.load(str(tmp_path))


def test_a_model_that_is_not_there_or_damaged_is_named(tmp_path):
    """Of several models one must know which."""
    with pytest.raises(OSError, match="'no-such-folder' is no folder, and could not be loaded from the Hub"):
        sentence.load("no-such-folder")
    (tmp_path / "modules.json").write_text("[{")
    with pytest.raises(ValueError, match=r"modules\.json of .* is damaged"):
        sentence.encoder_subfolder(str(tmp_path))


def test_only_a_mixture_of_remote_code_is_told_so():
    """A head of this package's own is no reason to load the model in another way."""
    with_head = HagMoeForMaskedLM(tiny_config())
    assert sentence.allowed_mixture(with_head) == "a HAG-MoE, see hagmoe_hf.upcycle"
    with_head.model.__class__ = type("HagMoeModel", (type(with_head.model),), {"__module__": "transformers_modules.me"})
    assert "this is its own remote code's" in sentence.allowed_mixture(with_head)


def test_a_model_whose_first_module_is_no_encoder_is_refused(real_parent):
    """Two encoders, or none, are not what a mixture can take the place of."""
    with pytest.raises(ValueError, match="A str is no model of sentence-transformers; allowed: SentenceTransformer"):
        sentence.encoder_of("my-model")  # type: ignore[arg-type]
    routed = models.Router.for_query_document([real_parent[0]], [real_parent[0]])
    with pytest.raises(ValueError, match="first module of this SentenceTransformer is a Router; allowed: the stock"):
        upcycle(SentenceTransformer(modules=[routed, real_parent[1]], device="cpu"))


@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
def test_three_training_steps_lower_the_loss(real_parent, experts, tmp_path):
    """The stock trainer and a stock loss, with nothing added."""
    torch.manual_seed(0)
    model = upcycle(real_parent)
    model[0].model.set_experts_implementation(experts)
    anchors = [f"What is the capital of country number {i}?" for i in range(8)]
    answers = [f"City {chr(65 + i)} is where government number {i} sits." for i in range(8)]
    loss = MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=8,
            learning_rate=2e-4,
            warmup_steps=0,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"anchor": anchors, "positive": answers}),
        loss=loss,
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any(".router." in name for name in moved)
    assert any(".experts." in name for name in moved)
