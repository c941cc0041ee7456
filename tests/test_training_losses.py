import json

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from hagmoe_hf import sentence, upcycle
from hagmoe_hf.training.losses import LOSSES, SimilarityDistillationLoss, TaughtLoss, build_loss, with_teacher_vectors


@pytest.fixture
def model(tiny_parent):
    return upcycle(sentence.load(str(tiny_parent), device="cpu"))


@pytest.fixture
def rows(pairs_file):
    return [json.loads(line) for line in pairs_file.read_text(encoding="utf-8").splitlines()][:8]


def loss_of(loss, model, kind, rows, labels=None):
    features = [model.tokenize([row[column] for row in rows]) for column in kind.columns]
    if labels is None:
        labels = torch.tensor([float(row["label"]) for row in rows]) if kind.needs_label else None
    return loss(features, labels)  # a scalar, or a dictionary of them


@pytest.mark.parametrize("dims", [None, [32, 8]])
@pytest.mark.parametrize("name", [name for name, kind in LOSSES.items() if not kind.needs_teacher])
def test_every_named_loss_teaches_every_part_of_the_mixture(name, dims, model, rows):
    """A name that trains nothing, or not the router, would go unnoticed for a whole run."""
    torch.manual_seed(0)
    loss = build_loss(name, model, matryoshka_dims=dims)
    assert isinstance(loss, MatryoshkaLoss) == bool(dims)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)  # with 1e-2 the last of six steps may overshoot
    losses = []
    for _ in range(6):
        value = loss_of(loss, model.train(), LOSSES[name], rows)
        value = sum(value.values()) if isinstance(value, dict) else value
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < losses[0]
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    for part in ("experts.up_proj", "router.group_gate", "router.expert_gate", "router.attention_query"):
        assert any(part in name for name in trained), part


def test_texts_and_translations_are_drawn_to_the_teachers_vectors_of_the_texts(model, tiny_parent, rows):
    """The other way round, a teacher that lacks a language would teach it."""
    teacher = sentence.load(str(tiny_parent), device="cpu")
    texts = [row["anchor"] for row in rows]
    data = Dataset.from_dict({"anchor": texts, "positive": [row["positive"] for row in rows]})
    labels = torch.tensor(with_teacher_vectors(data, teacher, "translation", 32, batch_size=3)["label"])
    assert labels.shape == (8, 1, 32)
    model.eval()
    same = [{"anchor": text, "positive": text} for text in texts]
    only_distance = build_loss("translation", model, {"scale": 1e-9, "imitation": 1.0})
    chance = torch.log(torch.tensor(8.0))
    assert float(loss_of(only_distance, model, LOSSES["translation"], same, labels) - chance) == pytest.approx(0, abs=1e-5)
    apart = float(loss_of(only_distance, model, LOSSES["translation"], rows, labels) - chance)
    vectors = teacher.encode([row["positive"] for row in rows], normalize_embeddings=True)
    targets = teacher.encode(texts, normalize_embeddings=True)
    assert apart == pytest.approx(1 - float((vectors * targets).sum(1).mean()), abs=1e-5)
    told_apart = build_loss("translation", model, {"imitation": 0.0})
    expected = torch.nn.functional.cross_entropy(20 * torch.from_numpy(vectors @ targets.T), torch.arange(8))
    assert float(loss_of(told_apart, model, LOSSES["translation"], rows, labels)) == pytest.approx(float(expected), abs=1e-4)


def test_what_the_trainer_wraps_reaches_a_loss_with_its_own_teacher(model, tiny_parent):
    """The wrapper puts gradients of several processes together; a loss around the bare model would train each alone."""
    loss = TaughtLoss(build_loss("translation", model), sentence.load(str(tiny_parent), device="cpu"), True)
    assert loss.model is model, "the trainer asks for this attribute"
    trainer = SentenceTransformerTrainer.__new__(SentenceTransformerTrainer)
    wrapped = trainer.override_model_in_loss(loss, torch.nn.Identity())
    assert isinstance(wrapped.loss.model, torch.nn.Identity)
    assert isinstance(wrapped.model, torch.nn.Identity)
    assert not any("teacher" in name for name, _ in loss.named_modules())


@pytest.mark.parametrize("name", ["distill_mse", "distill_kl"])
def test_a_students_loss_is_zero_exactly_where_it_agrees_with_its_teacher(name, model, rows, tiny_parent):
    """At step 0 an upcycled student is its teacher; a loss that is not 0 there compares the wrong things."""
    teacher = sentence.load(str(tiny_parent), device="cpu")
    data = Dataset.from_dict({column: [row[column] for row in rows] for column in ("anchor", "positive")})
    labelled = with_teacher_vectors(data, teacher, name, width=32, batch_size=3)
    assert labelled.column_names == ["anchor", "positive", "label"]
    labels = torch.tensor(labelled["label"])
    assert labels.shape == (8, 2, 32)
    loss = build_loss(name, model.eval())
    assert loss_of(loss, model, LOSSES[name], rows, labels).abs() < 1e-6
    assert loss_of(loss, model, LOSSES[name], rows, labels.flip(0)) > 1e-5


def test_the_similarity_loss_is_the_divergence_written_out(model, rows):
    """By hand, in float64, for every pair of an anchor and a candidate."""
    torch.manual_seed(0)
    kind = LOSSES["distill_kl"]
    labels = torch.randn(8, 2, 16)
    got = loss_of(SimilarityDistillationLoss(model.eval(), temperature=0.1), model, kind, rows, labels)

    def probabilities(queries, candidates):
        cosines = torch.nn.functional.cosine_similarity(queries.double()[:, None], candidates.double()[None], dim=-1)
        return (cosines / 0.1).softmax(-1)

    student = [model(model.tokenize([row[column] for row in rows]))["sentence_embedding"] for column in kind.columns]
    p, q = probabilities(*labels.unbind(1)), probabilities(*student)
    assert (got - (p * (p.log() - q.log())).sum() / 8).abs() < 1e-5


def test_distilled_ranking_is_ranking_and_the_similarities_of_the_teacher(model, rows):
    """Each against the loss that has it alone."""
    torch.manual_seed(0)
    kind = LOSSES["ranking_distill_kl"]
    labels = torch.randn(8, 2, 16)
    model.eval()
    both = loss_of(build_loss("ranking_distill_kl", model, {"imitation": 0.5}), model, kind, rows, labels)
    ranking = loss_of(build_loss("multiple_negatives_ranking", model), model, kind, rows)
    similarities = loss_of(build_loss("distill_kl", model), model, kind, rows, labels)
    assert float(both) == pytest.approx(float(ranking + 0.5 * similarities), abs=1e-5)


def test_what_a_loss_cannot_do_is_refused(model, rows):
    """With what it can."""
    with pytest.raises(ValueError, match=r"loss_options of triplet has 'scale'; allowed: \['distance_metric', 'tri"):
        build_loss("triplet", model, {"scale": 2})
    with pytest.raises(ValueError, match=r"matryoshka_dims=\[64\] is not possible; allowed: numbers from 1 to 32"):
        build_loss("cosent", model, matryoshka_dims=[64])
    with pytest.raises(ValueError, match=r"matryoshka_dims=\[8\] with loss='distill_mse'; allowed: losses without"):
        build_loss("distill_mse", model, matryoshka_dims=[8])
    data = Dataset.from_dict({"anchor": ["a"], "positive": ["b"]})
    with pytest.raises(ValueError, match="a teacher of width 32 and a student of 16; allowed: equal widths"):
        with_teacher_vectors(data, model, "distill_mse", width=16, batch_size=2)
