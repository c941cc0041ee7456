"""The doors of the ecosystem people come through: each encodes and trains on a mixture with its stock classes."""

import json

import numpy as np
import pytest
import torch
import transformers
from conftest import NO_DROPOUT, SHAPES, TINY, route_hard, spread, tiny_config
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling
from transformers import AutoTokenizer, pipeline, pipelines

from hagmoe_hf import HagMoeForMaskedLM, HagMoeForSequenceClassification, HagMoeForTokenClassification, HagMoeModel, upcycle
from hagmoe_hf.cli.main import app
from hagmoe_hf.demo import parent_folder
from hagmoe_hf.training.router_callback import RouterCallback

TEXTS = ["free the disk space", "Wie spät ist es?", "a recipe for lentil soup", ""]
PAIRS = {"anchor": [f"question {i}" for i in range(8)], "positive": [f"the answer to {i}" for i in range(8)]}
each_shape = pytest.mark.parametrize("shape", ["bert", "modernbert"])
# A dense model's head behind each door, and what the door gives
DOORS = {
    CrossEncoder: ("ForSequenceClassification", lambda model: [model.predict([("a", text) for text in TEXTS])]),
    SparseEncoder: ("ForMaskedLM", lambda model: [model.encode(TEXTS).to_dense().numpy()]),
    MultiVectorEncoder: ("Model", lambda model: [np.asarray(vectors) for vectors in model.encode_document(TEXTS)]),
}
DENSE = {"Bert": {}, "Roberta": {"pad_token_id": 1, "type_vocab_size": 1}}


def save_dense(folder, family: str, head: str) -> str:
    """Save a tiny dense model of some family and head with a real tokenizer; what `from_pretrained` is given."""
    config = getattr(transformers, f"{family}Config")(
        **{**TINY, **NO_DROPOUT, **DENSE[family], "vocab_size": 30522}, **({"num_labels": 1} if "Sequence" in head else {})
    )
    spread(getattr(transformers, family + head)(config), scale=0.2).save_pretrained(folder)
    names = ["input_ids", "attention_mask", "token_type_ids"][: 2 + (family == "Bert")]
    tokenizer = AutoTokenizer.from_pretrained(parent_folder(), model_input_names=names)
    tokenizer.model_max_length = 60
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    """Saves a tiny model of some class and shape with a real tokenizer; what `from_pretrained` is given."""

    def save(cls, shape: str, **changes):
        # Small initial values, as a real checkpoint has them, so that three steps can lower a loss
        torch.manual_seed(0)
        model = cls(
            tiny_config(
                **{
                    **SHAPES[shape],
                    "vocab_size": 30522,
                    "hidden_dropout_prob": 0.0,
                    "attention_probs_dropout_prob": 0.0,
                    **changes,
                }
            )
        )
        model.save_pretrained(tmp_path / "model")
        has_types = SHAPES[shape].get("type_vocab_size", 2) > 0
        names = ["input_ids", "attention_mask", "token_type_ids"][: 2 + has_types]  # as each family's tokenizers have it
        tokenizer = AutoTokenizer.from_pretrained(parent_folder(), model_input_names=names)
        tokenizer.model_max_length = TINY["max_position_embeddings"]
        tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


def three_steps(trainer_class, arguments_class, model, data, loss, folder, callbacks=()) -> list[float]:
    """Train with the stock trainer and nothing added but `callbacks`; the losses."""
    arguments = arguments_class(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        warmup_steps=0,
        seed=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    data = Dataset.from_dict(data)
    trainer = trainer_class(model=model, args=arguments, train_dataset=data, loss=loss, callbacks=list(callbacks))
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any(".router." in name for name in moved)
    assert any(".experts." in name for name in moved)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@each_shape
def test_sentence_transformer_encodes_and_trains(shape, folder, tmp_path):
    """The main door; a bare model becomes a SentenceTransformer with mean pooling, as any other does."""
    model = SentenceTransformer(folder(HagMoeModel, shape), device="cpu")
    vectors = model.encode(TEXTS)
    assert vectors.shape == (4, TINY["hidden_size"])
    assert np.abs(model.encode(TEXTS, batch_size=1) - vectors).max() <= 1e-5
    loss = MultipleNegativesRankingLoss(model)
    losses = three_steps(
        SentenceTransformerTrainer, SentenceTransformerTrainingArguments, model, PAIRS, loss, tmp_path / "run"
    )
    assert losses[-1] < losses[0]


@each_shape
def test_cross_encoder_ranks_and_trains(shape, folder, tmp_path):
    """Rerankers score pairs of texts with a sequence-classification head."""
    model = CrossEncoder(folder(HagMoeForSequenceClassification, shape, num_labels=1), device="cpu")
    scores = model.predict([("a", text) for text in TEXTS])
    assert scores.shape == (4,)
    assert np.abs(model.predict([("a", text) for text in TEXTS], batch_size=1) - scores).max() <= 1e-5
    assert [entry["corpus_id"] for entry in model.rank("a", TEXTS)]
    data = {"query": ["same"] * 4 + ["other"] * 4, "text": ["same"] * 8, "label": [1.0] * 4 + [0.0] * 4}
    loss = BinaryCrossEntropyLoss(model)
    losses = three_steps(CrossEncoderTrainer, CrossEncoderTrainingArguments, model, data, loss, tmp_path / "run")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_what_is_behind_a_door_is_upcycled_with_its_head_and_scores(door, family, tmp_path):
    """All are saved with a modules.json, as a SentenceTransformer is; read as one, a reranker would lose its classifier."""
    head, outputs = DOORS[door]
    options = {"activation_fn": torch.nn.Identity(), "prompts": {"q": "query: "}} if door is CrossEncoder else {}
    parent = door(save_dense(tmp_path / "dense", family, head), device="cpu", **options)
    parent.save_pretrained(str(tmp_path / "parent"))
    expected = outputs(parent)
    assert np.std(expected[0]) > 0.01, "values too narrow to show a lost head"
    for given in (parent, str(tmp_path / "parent")):
        mixture = route_hard(upcycle(given))
        mixture.save_pretrained(str(tmp_path / "mixture"))
        for model in (mixture, door(str(tmp_path / "mixture"), device="cpu")):
            assert type(model) is door
            assert model.prompts == parent.prompts
            for want, have in zip(expected, outputs(model), strict=True):
                assert np.abs(have - want).max() <= 1e-5


@pytest.mark.parametrize(
    "field",
    [
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.1.0"}},
        {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
    ],
    ids=lambda field: next(iter(field)),
)
def test_a_reranker_of_an_older_version_keeps_its_activation(field, tmp_path):
    """It is in config.json; without it, scores of -10 to 10 would come out of a sigmoid, and thresholds on them fail."""
    dense = save_dense(tmp_path / "dense", "Bert", "ForSequenceClassification")
    config = json.loads((tmp_path / "dense/config.json").read_text())
    (tmp_path / "dense/config.json").write_text(json.dumps(config | field))
    mixture = upcycle(dense)
    assert type(mixture) is HagMoeForSequenceClassification
    mixture.save_pretrained(tmp_path / "mixture")
    AutoTokenizer.from_pretrained(dense).save_pretrained(tmp_path / "mixture")
    parent, reranker = (CrossEncoder(str(folder), device="cpu") for folder in (dense, tmp_path / "mixture"))
    assert type(reranker.activation_fn) is torch.nn.Identity
    pairs = [("a", text) for text in TEXTS]
    assert np.abs(reranker.predict(pairs) - parent.predict(pairs)).max() <= 1e-5


def test_the_command_upcycles_a_reranker_into_one(tmp_path):
    """Its folder, and no line of Python, is what most people have."""
    dense = save_dense(tmp_path / "dense", "Bert", "ForSequenceClassification")
    CrossEncoder(dense, device="cpu").save_pretrained(str(tmp_path / "parent"))
    app(["upcycle", str(tmp_path / "parent"), str(tmp_path / "mixture")], standalone_mode=False)
    parent, reranker = (CrossEncoder(str(tmp_path / name), device="cpu") for name in ("parent", "mixture"))
    assert isinstance(reranker[0].model, HagMoeForSequenceClassification)
    pairs = [("a", text) for text in TEXTS]
    assert np.abs(reranker.predict(pairs) - parent.predict(pairs)).max() <= 1e-5
    card = (tmp_path / "mixture/README.md").read_text(encoding="utf-8").split("# The parent's model card")[0]
    assert "pipeline_tag: text-ranking" in card
    assert "model = CrossEncoder(" in card
    assert "model.predict(" in card
    assert "SentenceTransformer" not in card


@pytest.mark.skipif(not hasattr(CrossEncoder, "set_keep_in_fp32_modules"), reason="needs a later sentence-transformers")
def test_layers_that_a_reranker_computes_in_float32_stay_so(tmp_path):
    """They are layers of the encoder that is replaced."""
    dense = save_dense(tmp_path / "dense", "Bert", "ForSequenceClassification")
    parent = CrossEncoder(dense, device="cpu", keep_in_fp32_modules=["0.model.classifier"])
    parent.bfloat16()
    mixture = upcycle(parent)
    assert type(mixture[0].model.classifier) is type(parent[0].model.classifier) is not torch.nn.Linear


@each_shape
def test_sparse_encoder_encodes_and_trains(shape, folder, tmp_path):
    """SPLADE reads the masked-LM head: one weight for each word of the vocabulary."""
    modules = [MLMTransformer(folder(HagMoeForMaskedLM, shape)), SpladePooling()]
    model = SparseEncoder(modules=modules, device="cpu")
    vectors = model.encode(TEXTS).to_dense()
    assert vectors.shape == (4, 30522)
    assert (model.encode(TEXTS, batch_size=1).to_dense() - vectors).abs().max() <= 1e-5
    loss = SpladeLoss(
        model, SparseMultipleNegativesRankingLoss(model), document_regularizer_weight=1e-6, query_regularizer_weight=1e-6
    )
    losses = three_steps(SparseEncoderTrainer, SparseEncoderTrainingArguments, model, PAIRS, loss, tmp_path / "run")
    assert len(losses) == 3
    assert np.isfinite(losses).all()


def test_models_without_dense_vectors_train_with_the_router_callback(folder, tmp_path):
    """It follows the drift of vectors; a reranker has none, other models have sparse ones, or one for each token."""
    reranker = CrossEncoder(folder(HagMoeForSequenceClassification, "bert", num_labels=1), device="cpu")
    data = {"query": ["same"] * 4 + ["other"] * 4, "text": ["same"] * 8, "label": [1.0] * 4 + [0.0] * 4}
    loss = BinaryCrossEntropyLoss(reranker)
    classes = CrossEncoderTrainer, CrossEncoderTrainingArguments
    assert three_steps(*classes, reranker, data, loss, tmp_path / "reranker", [RouterCallback()])

    sparse = SparseEncoder(modules=[MLMTransformer(folder(HagMoeForMaskedLM, "bert")), SpladePooling()], device="cpu")
    ranking = SparseMultipleNegativesRankingLoss(sparse)
    loss = SpladeLoss(sparse, ranking, document_regularizer_weight=1e-6, query_regularizer_weight=1e-6)
    classes = SparseEncoderTrainer, SparseEncoderTrainingArguments
    assert three_steps(*classes, sparse, PAIRS, loss, tmp_path / "sparse", [RouterCallback()])

    late = MultiVectorEncoder(folder(HagMoeModel, "bert"), device="cpu")
    loss = MultiVectorMultipleNegativesRankingLoss(late)
    classes = MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments
    assert three_steps(*classes, late, PAIRS, loss, tmp_path / "late", [RouterCallback()])


def test_stock_pipelines_take_a_mixture_without_a_complaint(folder, monkeypatch):
    """`pipeline` logs as an error that a class it was not told of is not supported: users would stop there."""
    monkeypatch.setattr(pipelines.base.logger, "error", pytest.fail)
    classify = pipeline("text-classification", model=folder(HagMoeForSequenceClassification, "bert", num_labels=3))
    assert classify(TEXTS[0])[0]["label"] in {"LABEL_0", "LABEL_1", "LABEL_2"}
    tag = pipeline("token-classification", model=folder(HagMoeForTokenClassification, "bert", num_labels=3))
    assert len(tag(TEXTS[0])) == 4
    fill = pipeline("fill-mask", model=folder(HagMoeForMaskedLM, "bert"))
    assert len(fill("free the [MASK] space", top_k=5)) == 5


@each_shape
def test_token_embeddings_for_late_interaction(shape, folder):
    """ColBERT-style models keep every token's vector, cut to the text's own length."""
    model = SentenceTransformer(folder(HagMoeModel, shape), device="cpu")
    together = model.encode(TEXTS[:3], output_value="token_embeddings")
    for text, tokens in zip(TEXTS[:3], together, strict=True):
        alone = model.encode([text], output_value="token_embeddings")[0]
        assert tokens.shape == alone.shape
        assert (tokens - alone).abs().max() <= 1e-5


EXPERT_STACKS = {
    "bert": ["experts.up_proj", "experts.down_proj"],
    "modernbert": ["experts.gate_up_proj", "experts.down_proj"],
}


@each_shape
def test_lora_attaches_to_experts_and_router_and_trains(shape, tmp_path):
    """Stacked experts are no Linear modules, so adapters that only know those would leave the mixture untouched."""
    base = spread(HagMoeModel(tiny_config(**SHAPES[shape])), scale=0.1)
    ids = torch.randint(3, TINY["vocab_size"], (4, 9), generator=torch.Generator().manual_seed(0))
    expected = base(ids).last_hidden_state.detach()
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj", "expert_gate", "group_gate"],
        target_parameters=EXPERT_STACKS[shape],
        modules_to_save=[],
    )
    model = get_peft_model(base, lora)
    adapted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(".experts." in name for name in adapted)
    assert any(".router." in name for name in adapted)
    assert all("lora_" in name for name in adapted)
    assert (model.eval()(ids).last_hidden_state - expected).abs().max() <= 1e-5, "a fresh adapter changes nothing"

    target = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(3):
        loss = (model(ids).last_hidden_state - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if "lora_B" in name and p.abs().max() > 0}
    assert any(".experts." in name for name in moved)
    assert any(".router." in name for name in moved)

    trained = model(ids).last_hidden_state.detach()
    model.save_pretrained(tmp_path)
    fresh = spread(HagMoeModel(tiny_config(**SHAPES[shape])), scale=0.1)
    again = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert (again(ids).last_hidden_state - trained).abs().max() <= 1e-5
