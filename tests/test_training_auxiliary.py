"""Auxiliary terms: injected gradients against an explicit term, and the terms of heads with a loss of their own."""

import pytest
import torch
from balance_helpers import (
    KeepGradients,
    arguments,
    features,
    gradients,
    injected_and_explicit,
    pairs,
    recorder_on,
    run_two_ranks,
)
from conftest import NO_DROPOUT, TINY, spread
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer import losses as st_losses

from hagmoe_hf import (
    HagMoeConfig,
    HagMoeForMaskedLM,
    HagMoeForMultipleChoice,
    HagMoeForQuestionAnswering,
    HagMoeForSequenceClassification,
    HagMoeForTokenClassification,
)
from hagmoe_hf.routing_hagmoe import load_balancing_loss, router_z_loss
from hagmoe_hf.training.balance import Coefficients
from hagmoe_hf.training.router_callback import RouterCallback

WAYS = {
    "plain": {},
    "accumulation with a short last step": {"gradient_accumulation_steps": 3},
    "cached mini-batches": {
        "make_loss": lambda m: st_losses.CachedMultipleNegativesRankingLoss(m, mini_batch_size=1),
        "per_device_train_batch_size": 5,
    },
    "gradient checkpointing": {"checkpointing": True},
    "cached, accumulated": {
        "make_loss": lambda m: st_losses.CachedMultipleNegativesRankingLoss(m, mini_batch_size=1),
        "gradient_accumulation_steps": 3,
    },
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_injected_auxiliary_gradients_equal_an_explicit_term(tiny_folder, tmp_path, way):
    """A scale that is off by the accumulation steps, or a term per cached chunk, would quietly change the training."""
    injected, explicit = injected_and_explicit(tiny_folder, tmp_path, **way)
    assert len(injected) == len(explicit) >= 4
    for step, (got, expected) in enumerate(zip(injected, explicit, strict=True)):
        for name in expected:
            assert torch.allclose(got[name], expected[name], atol=2e-5, rtol=1e-3), (step, name)
    plain, _ = injected[0], injected[1]
    routers = [name for name in plain if "expert_gate" in name]
    assert any((injected[1][name] - plain[name]).abs().max() > 1e-3 for name in routers)


def test_a_loss_that_several_datasets_share_counts_once(tiny_folder, tmp_path):
    """sentence-transformers takes one loss by dataset, often the same one: the terms must not grow with the datasets."""
    steps = {}
    for name in ("one", "shared"):
        model = SentenceTransformer(str(tiny_folder), device="cpu")
        loss, keep = st_losses.MultipleNegativesRankingLoss(model), KeepGradients(model)
        SentenceTransformerTrainer(
            model=model,
            args=arguments(tmp_path, learning_rate=0.0, max_grad_norm=0.0),
            train_dataset={"a": pairs(8), "b": pairs(8)},
            loss={"a": loss, "b": loss} if name == "shared" else loss,
            callbacks=[RouterCallback(bias_update_rate=0.0, aux_loss_coef=0.3, probe_size=0), keep],
        ).train()
        steps[name] = keep.steps
    for one, shared in zip(steps["one"], steps["shared"], strict=True):
        assert all(torch.equal(one[name], shared[name]) for name in one)


def test_a_gradient_scaler_scales_the_injected_gradients_too(tiny):
    """Under float16 the loss is multiplied by thousands; a term that is not would vanish."""

    def run(scale):
        tiny.zero_grad()
        recorder = recorder_on(tiny, Coefficients(0.3, 0.01))
        recorder.previous_load = torch.full((2, 8), 1 / 8, dtype=torch.float64).cumsum(-1)
        recorder.previous_tokens_per_loss = torch.tensor([50.0, 50.0], dtype=torch.float64)
        loss = st_losses.MultipleNegativesRankingLoss(tiny)(features(tiny, pairs(8)), None)
        (recorder.watch_loss(loss) * scale).backward()
        return gradients(tiny)

    once, scaled = run(1.0), run(1024.0)
    assert all(torch.allclose(once[name] * 1024, scaled[name], rtol=1e-3, atol=1e-2) for name in once)


def test_auxiliary_terms_have_their_known_values():
    uniform = torch.full((6, 4), 0.25).log()
    assert load_balancing_loss(uniform, torch.full((4,), 0.25), 6).item() == pytest.approx(1.0)
    one = torch.tensor([[1.0, 1e-9, 1e-9, 1e-9]] * 6).log()
    assert load_balancing_loss(one, torch.tensor([1.0, 0, 0, 0]), 6).item() == pytest.approx(4.0, rel=1e-4)
    assert router_z_loss(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), 2).item() == pytest.approx(3.0)


@pytest.mark.parametrize("cls", [HagMoeForMaskedLM, HagMoeForMultipleChoice, HagMoeForQuestionAnswering,
                                 HagMoeForSequenceClassification, HagMoeForTokenClassification])  # fmt: skip
def test_a_heads_loss_holds_the_load_balance_term_on_request(cls):
    """As in Mixtral: with router logits, and over real tokens only."""
    config = HagMoeConfig(**TINY, **NO_DROPOUT, router_aux_loss_coef=0.5)
    model = spread(cls(config))
    ids = torch.randint(1, 99, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7)[None] < torch.tensor([[7], [2], [5]])
    of_texts, of_tokens = torch.tensor([0, 1, 0]), ids.masked_fill(~mask, -100)
    labels = {
        HagMoeForMaskedLM: {"labels": of_tokens},
        HagMoeForTokenClassification: {"labels": of_tokens.remainder(2).masked_fill(~mask, -100)},
        HagMoeForQuestionAnswering: {"start_positions": of_texts, "end_positions": of_texts},
    }.get(cls, {"labels": of_texts})
    texts = {"input_ids": ids, "attention_mask": mask.long()}
    if cls is HagMoeForMultipleChoice:  # three choices of one question
        texts, labels = {name: value.unsqueeze(0) for name, value in texts.items()}, {"labels": torch.tensor([1])}
    plain = model(**texts, **labels)
    output = model(**texts, **labels, output_router_logits=True)
    (logits,), (index,) = output.router_logits, output.expert_index
    real = mask.flatten()
    load = torch.bincount(index[real].flatten(), minlength=8) / real.sum()
    expected = 0.5 * 8 * (load * logits[real].exp().mean(0)).sum()
    assert output.aux_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.loss.item() == pytest.approx((plain.loss + expected).item(), rel=1e-5)
    assert plain.aux_loss is None


def test_two_ranks_inject_the_mean_gradient(tiny_folder, tmp_path):
    """DDP averages gradients over ranks: the injected ones must come out as those of an explicit term would."""
    run_two_ranks(
        """
        import os, sys
        import torch
        import balance_helpers as t

        folder, out = sys.argv[1:]

        class AllReduced(t.ExplicitLoss):
            def finish_step(self, num_experts=8):
                counts = []
                for row in range(len(self.routers)):
                    index = torch.cat([part.flatten() for loss in self.step for part in loss[row]])
                    counts.append(torch.bincount(index, minlength=num_experts + 1)[:num_experts].float())
                counts, losses = torch.stack(counts), torch.tensor(float(len(self.step)))
                torch.distributed.all_reduce(counts)
                torch.distributed.all_reduce(losses)
                self.previous = [(c / c.sum(), c.sum() / losses) for c in counts]
                self.step = []

        t.ExplicitLoss = AllReduced
        injected, explicit = t.injected_and_explicit(folder, f"{out}/{os.environ['RANK']}", ddp_backend="gloo")
        assert len(injected) == len(explicit) >= 4, len(injected)
        for got, expected in zip(injected, explicit):
            for name in expected:
                assert torch.allclose(got[name], expected[name], atol=2e-5, rtol=1e-3), name
        """,
        tmp_path,
        str(tiny_folder),
        str(tmp_path),
    )
