"""A HAG-MoE under the stock trainer and stock losses, with and without the callback."""

import pytest
import torch
from balance_helpers import arguments, features, gradients, pairs
from conftest import spread, tiny_config
from sentence_transformers import (
    SentenceTransformerTrainer,
)
from sentence_transformers.sentence_transformer import losses as st_losses
from transformers import Trainer, TrainingArguments

from hagmoe_hf import HagMoeForSequenceClassification
from hagmoe_hf.training.router_callback import RouterCallback

LOSSES = {
    "MultipleNegativesRanking": (lambda m: st_losses.MultipleNegativesRankingLoss(m), pairs(8)),
    "Cached, 1 of 8": (lambda m: st_losses.CachedMultipleNegativesRankingLoss(m, mini_batch_size=1), pairs(8)),
    "Cached, 3 of 8": (lambda m: st_losses.CachedMultipleNegativesRankingLoss(m, mini_batch_size=3), pairs(8)),
    "Cached, 8 of 8": (lambda m: st_losses.CachedMultipleNegativesRankingLoss(m, mini_batch_size=8), pairs(8)),
    "Matryoshka": (lambda m: st_losses.MatryoshkaLoss(m, st_losses.MultipleNegativesRankingLoss(m), [32, 16]), pairs(8)),
    "AdaptiveLayer": (lambda m: st_losses.AdaptiveLayerLoss(m, st_losses.MultipleNegativesRankingLoss(m)), pairs(8)),
    "CoSENT": (lambda m: st_losses.CoSENTLoss(m), pairs(8, score=[i / 8 for i in range(8)])),
    "Triplet": (lambda m: st_losses.TripletLoss(m), pairs(8, negative=["something else entirely"] * 8)),
}


def test_the_stock_trainer_evaluates_logits_alone_also_with_routing_on(tmp_path):
    """A user's compute_metrics knows nothing of routers, and their logits of a whole evaluation set need not be kept."""
    model = spread(HagMoeForSequenceClassification(tiny_config(output_router_logits=True)))
    rows = [{"input_ids": [1 + row % 90, 5, 6], "labels": row % 2} for row in range(12)]
    shapes = []
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), per_device_eval_batch_size=5, report_to="none", use_cpu=True),
        eval_dataset=rows,
        compute_metrics=lambda found: shapes.append(found.predictions.shape) or {},
    )
    trainer.evaluate()
    assert shapes == [(12, 2)]


@pytest.mark.parametrize(("make_loss", "data"), LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("callbacks", [[], [RouterCallback]], ids=["no callback", "RouterCallback"])
def test_stock_losses_train_under_the_stock_trainer(tiny, make_loss, data, callbacks, tmp_path):
    """A user changes the model and nothing else."""
    before = {name: p.clone() for name, p in tiny.named_parameters()}
    trainer = SentenceTransformerTrainer(
        model=tiny,
        args=arguments(tmp_path),
        train_dataset=data,
        loss=make_loss(tiny),
        callbacks=[callback() for callback in callbacks],
    )
    trainer.train()
    assert all(torch.isfinite(p).all() for p in tiny.parameters())
    moved = {name for name, p in tiny.named_parameters() if not torch.equal(p, before[name])}
    assert any(".experts." in name for name in moved)
    assert any(".router." in name for name in moved)


@pytest.mark.parametrize("mini_batch_size", [1, 3, 8])
def test_cached_and_plain_gradients_are_equal(tiny, mini_batch_size):
    """GradCache runs every forward twice: state written in between would show here."""
    data = pairs(8)
    tiny.train()
    st_losses.MultipleNegativesRankingLoss(tiny)(features(tiny, data), None).backward()
    expected = gradients(tiny)
    tiny.zero_grad()
    st_losses.CachedMultipleNegativesRankingLoss(tiny, mini_batch_size=mini_batch_size)(
        features(tiny, data), None
    ).backward()
    got = gradients(tiny)
    assert got.keys() == expected.keys()
    assert all((got[name] - expected[name]).abs().max() <= 1e-4 for name in expected)


def test_accumulated_gradients_equal_the_big_batch(tiny):
    """For a loss without in-batch negatives, accumulation is only a matter of memory."""
    data = pairs(8, score=[i / 8 for i in range(8)])
    tiny.train()
    loss = st_losses.CosineSimilarityLoss(tiny)
    loss(features(tiny, data), torch.tensor(data["score"])).backward()
    expected = gradients(tiny)
    tiny.zero_grad()
    for start in range(0, 8, 2):
        part = data.select(range(start, start + 2))
        (loss(features(tiny, part), torch.tensor(part["score"])) / 4).backward()
    got = gradients(tiny)
    assert all((got[name] - expected[name]).abs().max() <= 1e-4 for name in expected)
