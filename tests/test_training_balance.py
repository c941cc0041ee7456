"""Balance and monitoring under the stock trainer: `training/balance.py`, `monitor.py` and `router_callback.py`."""

import os
import socket
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY, spread
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    models,
)
from sentence_transformers.sentence_transformer import losses as st_losses
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel, TrainerCallback
from transformers.trainer_callback import TrainerState

from hagmoe_hf import HagMoeConfig, HagMoeForMaskedLM, HagMoeForSequenceClassification, HagMoeModel, upcycle
from hagmoe_hf.demo import parent_folder, read_corpus
from hagmoe_hf.modeling_hagmoe import HagMoeRouter, HagMoeSparseMLP
from hagmoe_hf.routing_hagmoe import load_balancing_loss, router_z_loss
from hagmoe_hf.training.balance import BiasSteps, Coefficients, StepRecorder, bias_step
from hagmoe_hf.training.monitor import dead_experts, load_entropy, max_violation
from hagmoe_hf.training.router_callback import RouterCallback

ROOT = Path(__file__).parents[1]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A tiny random parent, upcycled, with the real tokenizer, as a SentenceTransformer folder."""
    folder = tmp_path_factory.mktemp("tiny")
    parent = spread(BertModel(BertConfig(**{**TINY, "vocab_size": 30522, **NO_DROPOUT})), scale=0.2)
    upcycle(parent, sparse_layers=[0, 2]).save_pretrained(folder / "encoder")
    AutoTokenizer.from_pretrained(parent_folder()).save_pretrained(folder / "encoder")
    transformer = models.Transformer(str(folder / "encoder"))
    transformer.max_seq_length = 24
    SentenceTransformer(modules=[transformer, models.Pooling(32)], device="cpu").save_pretrained(str(folder / "model"))
    return folder / "model"


@pytest.fixture
def tiny(tiny_folder):
    return SentenceTransformer(str(tiny_folder), device="cpu")


def blocks_of(model: nn.Module) -> list[HagMoeSparseMLP]:
    return [module for module in model.modules() if isinstance(module, HagMoeSparseMLP)]


def pairs(rows: int, **columns) -> Dataset:
    texts, _ = read_corpus()
    texts = [text[:80] for text in texts[:: len(texts) // (2 * rows)]]
    return Dataset.from_dict({"anchor": texts[:rows], "positive": texts[rows : 2 * rows], **columns})


def arguments(folder, **changes) -> SentenceTransformerTrainingArguments:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return SentenceTransformerTrainingArguments(**{**settings, **changes})


# The stock trainer, with no callback of ours


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


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def features(model: SentenceTransformer, data: Dataset, columns=("anchor", "positive")) -> list[dict]:
    return [model.preprocess(list(data[column])) for column in columns]


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


# Auxiliary terms: injected gradients against an explicit term


class ExplicitLoss(nn.Module):
    """The yardstick: adds the auxiliary terms to the loss itself, from routing caught in the forward pass."""

    def __init__(self, model: SentenceTransformer, loss: nn.Module, coefficients: Coefficients):
        super().__init__()
        self.model, self.inner, self.coefficients = model, loss, coefficients
        self.routers = [block.router for block in blocks_of(model)]
        self.caught: list[list] = [[] for _ in self.routers]
        for row, router in enumerate(self.routers):
            router.register_forward_hook(lambda module, inputs, routing, row=row: self.caught[row].append(routing))
        self.previous = None  # (load, tokens per loss) of the step before, by layer
        self.step: list[list] = []

    def forward(self, sentence_features, labels):
        self.caught[:] = [[] for _ in self.routers]
        loss = self.inner(sentence_features, labels)
        if not self.model.training:
            return loss
        self.step.append([[r.expert_index.clone() for r in routings] for routings in self.caught])
        if self.previous is None:
            return loss
        for routings, (load, tokens) in zip(self.caught, self.previous, strict=True):
            for routing in routings:
                real = routing.expert_index[:, 0] < load.shape[0]
                probs = routing.router_logits[real].exp().sum(0)
                loss = loss + self.coefficients.aux_loss * load.shape[0] * (load * probs).sum() / tokens
                loss = loss + self.coefficients.z_loss * routing.log_partition[real].square().sum() / tokens
        return loss

    def finish_step(self, num_experts=8):
        self.previous = []
        for row in range(len(self.routers)):
            index = torch.cat([part.flatten() for loss in self.step for part in loss[row]])
            counts = torch.bincount(index, minlength=num_experts + 1)[:num_experts].float()
            self.previous.append((counts / counts.sum(), counts.sum() / len(self.step)))
        self.step = []


class KeepGradients(TrainerCallback):
    def __init__(self, model, finish=lambda: None):
        self.model, self.finish, self.steps = model, finish, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.steps.append(gradients(self.model))

    def on_step_end(self, args, state, control, **kwargs):
        self.finish()


def injected_and_explicit(folder, tmp_path, make_loss=None, checkpointing=False, **changes):
    """Gradients of every optimizer step, with the callback and with the explicit term, at learning rate 0."""
    make_loss = make_loss or (lambda m: st_losses.MultipleNegativesRankingLoss(m))
    runs = []
    for explicit in (False, True):
        model = SentenceTransformer(str(folder), device="cpu")
        loss = (
            make_loss(model)
            if not explicit
            else ExplicitLoss(model, st_losses.MultipleNegativesRankingLoss(model), Coefficients(0.3, 0.01))
        )
        keep = KeepGradients(model, loss.finish_step if explicit else lambda: None)
        callback = RouterCallback(bias_update_rate=0.0, aux_loss_coef=0.3, z_loss_coef=0.01)
        settings = {
            "max_steps": -1,
            "num_train_epochs": 2,
            "learning_rate": 0.0,
            "max_grad_norm": 0.0,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": checkpointing and not explicit,
        }
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments(tmp_path, **{**settings, **changes}),
            train_dataset=pairs(10),
            loss=loss,
            callbacks=[keep] if explicit else [callback, keep],
        )
        trainer.train()
        runs.append(keep.steps)
    return runs


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


def recorder_on(model: nn.Module, coefficients: Coefficients) -> StepRecorder:
    blocks = blocks_of(model.train())
    recorder = StepRecorder(len(blocks), 8, coefficients, torch.device("cpu"))
    for row, block in enumerate(blocks):
        block.routing_observer = partial(lambda row, output, routing, packing: recorder.watch(output, routing, row), row)
    return recorder


@pytest.mark.parametrize("mini_batch_size", [None, 1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_real_token_is_counted_once(tiny, mini_batch_size, checkpointing):
    """Cached losses and checkpointing run the forward twice, padding is no token: both have spoiled counts elsewhere."""
    if checkpointing:
        tiny[0].model.gradient_checkpointing_enable()
    recorder = recorder_on(tiny, Coefficients(0.0, 0.0))
    inputs = features(tiny, pairs(8))
    tokens = sum(int(part["attention_mask"].sum()) for part in inputs)
    if mini_batch_size is None:
        loss = st_losses.MultipleNegativesRankingLoss(tiny)
    else:
        loss = st_losses.CachedMultipleNegativesRankingLoss(tiny, mini_batch_size=mini_batch_size)
    recorder.watch_loss(loss(inputs, None)).backward()
    step = recorder.finish_step()
    assert step.tokens.tolist() == [tokens, tokens]
    assert step.counts.sum(-1).tolist() == [tokens, tokens]
    assert step.prob_sums.sum(-1).tolist() == pytest.approx([tokens, tokens], rel=1e-5)
    assert step.losses == 1


# The balancing bias


def test_a_steps_length_follows_its_direction():
    """Long out of a collapse, short near balance; never longer than the user allows."""
    steps = BiasSteps(1, 1, torch.device("cpu"))
    up, down = torch.ones(1, 1, dtype=torch.float64), -torch.ones(1, 1, dtype=torch.float64)
    first = [steps.take(up, 0.1).item() for _ in range(3)]
    turned = [steps.take(direction, 0.1).item() for direction in (down, up, down)]
    lasting = [steps.take(down, 0.1).item() for _ in range(50)]
    assert first == pytest.approx([0.1, 0.1, 0.1])
    assert turned == pytest.approx([-0.07, 0.049, -0.0343])
    assert lasting[0] == pytest.approx(-0.0343 * 1.1)
    assert lasting[-1] == pytest.approx(-0.1)


def test_the_bias_moves_towards_balance_within_groups_and_between_them():
    """Up for the idle, down for the busy, nothing where nothing was counted."""
    counts = torch.tensor([[8.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    groups, experts = bias_step(counts, num_groups=2)
    assert groups.tolist() == [pytest.approx([-2 / 6, 2 / 6]), [0, 0]]
    assert experts.tolist() == [[-1.0, 1.0, 0.0, 0.0], [0.0] * 4]


def test_the_bias_balances_the_mean_load_and_not_the_median():
    """Batches of one domain give an expert everything or nothing: the sign of each batch would push it the wrong way."""
    busy_now_and_then = [torch.tensor([[8.0, 0.0, 0.0, 0.0]])] * 3 + [torch.tensor([[0.0, 3.0, 2.0, 3.0]])] * 7
    mean_direction = torch.stack([bias_step(counts, num_groups=4)[0] for counts in busy_now_and_then]).mean(0)
    assert mean_direction[0, 0] < 0, "it takes 30 % of the load where 25 % would be even"


def push_to_one_expert(model: nn.Module, strength: float = 4.0) -> None:
    """Collapse the routers: their gates' mean response to real text is raised for group 0 and expert 0 of each group."""
    texts, _ = read_corpus()
    batch = model.preprocess([text[:80] for text in texts[::10]])
    caught: dict[HagMoeRouter, torch.Tensor] = {}

    def catch(router, inputs) -> None:
        states, mask = inputs[:2]  # no mask where padding was left out
        caught[router] = (states if mask is None else states[mask]).flatten(0, -2).mean(0)

    hooks = [block.router.register_forward_pre_hook(catch) for block in blocks_of(model)]
    with torch.no_grad():
        model.eval()(batch)
        for hook in hooks:
            hook.remove()
        for router, mean in caught.items():
            direction = strength * mean / mean.square().sum()
            for gate, rows in ((router.group_gate, [0]), (router.expert_gate, [0, 2, 4, 6])):
                gate.weight[rows] += direction


def balance_run(model, folder, steps: int, lr: float = 1e-4, **changes):
    callback = RouterCallback(probe_size=0)
    texts, _ = read_corpus()
    data = Dataset.from_dict({"anchor": [t[:80] for t in texts], "positive": [t[-80:] for t in texts]})
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments(folder, max_steps=steps, logging_steps=25, learning_rate=lr, **changes),
        train_dataset=data,
        loss=st_losses.MultipleNegativesRankingLoss(model),
        callbacks=[callback],
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "router/aux_loss" in entry]


def assert_balanced_again(history: list[dict], layers: tuple[int, ...]) -> None:
    for layer in layers:
        assert history[0][f"router/layer{layer}/max_vio"] > 3, history[0]
        assert history[-1][f"router/layer{layer}/max_vio"] < 0.5, history[-1]
        assert history[-1][f"router/layer{layer}/dead_experts"] == 0


def test_a_collapsed_router_is_balanced_again(tiny, tmp_path):
    """Collapse is how mixtures fail: one expert takes all, and the others are dead weight on disk."""
    push_to_one_expert(tiny)
    assert_balanced_again(balance_run(tiny, tmp_path, steps=150, lr=0.0), layers=(0, 2))


@pytest.mark.slow
def test_a_collapsed_router_of_the_real_parent_is_balanced_while_it_trains(real_parent, tmp_path):
    """The same on real weights that move: 300 steps of 16 real texts."""
    model = upcycle(real_parent)
    model.max_seq_length = 24
    push_to_one_expert(model)
    assert_balanced_again(balance_run(model, tmp_path, steps=300, lr=2e-5), layers=(1, 3))


def test_without_the_callback_nothing_moves_the_biases(tiny, tmp_path):
    SentenceTransformerTrainer(
        model=tiny, args=arguments(tmp_path), train_dataset=pairs(8), loss=st_losses.MultipleNegativesRankingLoss(tiny)
    ).train()
    assert all((block.router.expert_bias == 0).all() for block in blocks_of(tiny))


def test_a_loop_without_trainer_is_balanced_as_by_the_trainer(tiny, tmp_path):
    """Whoever has a loop of their own drives the same callback by hand; one that stays silent there would never balance."""
    by_trainer = SentenceTransformer(tiny[0].model.name_or_path, device="cpu")
    SentenceTransformerTrainer(
        model=by_trainer,
        args=arguments(tmp_path, max_steps=1, learning_rate=0.0),
        train_dataset=pairs(8),
        loss=st_losses.MultipleNegativesRankingLoss(by_trainer),
        callbacks=[RouterCallback()],
    ).train()
    loss, callback = st_losses.MultipleNegativesRankingLoss(tiny), RouterCallback()
    tiny.train()
    callback.on_train_begin(None, TrainerState(), None, model=tiny, loss=loss)
    features = [tiny.preprocess(list(pairs(8)[column])) for column in ("anchor", "positive")]
    loss([dict(part) for part in features], None).backward()
    callback.on_step_end(None, TrainerState(), None)
    callback.on_train_end(None, TrainerState(), None)
    for mine, other in zip(blocks_of(tiny), blocks_of(by_trainer), strict=True):
        assert (mine.router.expert_bias != 0).any()
        assert torch.allclose(mine.router.expert_bias, other.router.expert_bias)
        assert mine.routing_observer is None


def test_evaluation_and_encoding_leave_counts_and_biases_alone(tiny, tmp_path):
    """A model evaluated more often would otherwise be balanced differently."""
    results = []
    for eval_steps in (1, 100):
        model = SentenceTransformer(tiny[0].model.name_or_path, device="cpu")
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=eval_steps),
            train_dataset=pairs(16),
            eval_dataset=pairs(4),
            loss=st_losses.MultipleNegativesRankingLoss(model),
            callbacks=[RouterCallback()],
        )
        trainer.train()
        results.append([block.router.expert_bias.clone() for block in blocks_of(model)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert any((bias != 0).any() for bias in results[0])


def test_biases_survive_the_disk_and_half_precision(tiny, tmp_path):
    """They decide the choice at inference too; half precision would lose their small steps."""
    for block in blocks_of(tiny):
        block.router.expert_bias.copy_(torch.arange(8) * 0.1001)
    tiny[0].model.save_pretrained(tmp_path)
    half = HagMoeModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for block in blocks_of(half):
        assert torch.equal(block.router.expert_bias, torch.arange(8) * 0.1001)
        assert block.experts.up_proj.dtype == torch.bfloat16


def test_the_bias_shifts_the_choice_and_no_weight(tiny):
    """It must balance without an influence on the gradient (arXiv 2408.15664)."""
    block = blocks_of(tiny)[0]
    states, mask = torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.bool)
    before = block.router(states, mask)
    block.router.group_bias.copy_(torch.tensor([0.0, 0.0, 50.0, 0.0]))
    block.router.expert_bias.copy_(torch.tensor([0.0] * 5 + [50.0] + [0.0] * 2))
    after = block.router(states, mask)
    assert (after.expert_index == 5).all()
    assert torch.equal(after.router_logits, before.router_logits)
    assert (after.expert_weight == 1).all()


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_folder, tmp_path):
    """Biases, the load that the auxiliary term uses and the drift's first vectors must all come back."""
    ends = []
    for stop in (None, 3):
        folder = tmp_path / str(stop)
        for resume in [False] if stop is None else [False, True]:
            model = SentenceTransformer(str(tiny_folder), device="cpu")
            callback = RouterCallback(aux_loss_coef=0.1, probe_size=4)
            steps = 3 if stop and not resume else 6
            trainer = SentenceTransformerTrainer(
                model=model,
                args=arguments(folder, max_steps=steps, save_strategy="steps", save_steps=3, per_device_train_batch_size=4),
                train_dataset=pairs(24),
                loss=st_losses.MultipleNegativesRankingLoss(model),
                callbacks=[callback],
            )
            trainer.train(resume_from_checkpoint=resume or None)
        ends.append((model.state_dict(), [e for e in trainer.state.log_history if e["step"] > 3]))
    (straight, straight_log), (resumed, resumed_log) = ends
    assert all((straight[name] - resumed[name]).abs().max() <= 1e-6 for name in straight)
    assert any("expert_bias" in name and (straight[name] != 0).any() for name in straight)
    for a, b in zip(straight_log, resumed_log, strict=True):
        for key in (key for key in a if key.startswith("router/") or key == "loss"):
            assert a[key] == pytest.approx(b[key], abs=1e-5), key


# Monitoring


def test_everything_worth_watching_is_logged(tiny, tmp_path):
    """Through the trainer's own log, so that every reporting tool gets it."""
    seen: list[dict] = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    SentenceTransformerTrainer(
        model=tiny,
        args=arguments(tmp_path),
        train_dataset=pairs(16),
        loss=st_losses.MultipleNegativesRankingLoss(tiny),
        callbacks=[Reporter(), RouterCallback()],
    ).train()
    (first, second) = [logs for logs in seen if "router/drift" in logs]
    per_layer = {"load_entropy", "max_vio", "max_vio_batch", "dead_experts", "confidence", "pair_agreement"}
    for layer in (0, 2):
        values = {name: first[f"router/layer{layer}/{name}"] for name in per_layer}
        assert 0 <= values["load_entropy"] <= 1
        assert 0 <= values["max_vio"] <= 7
        assert 0 < values["confidence"] <= 1
        assert 0 <= values["pair_agreement"] <= 1
    assert first["router/aux_loss"] >= 0.5
    assert 0 < first["router/drift"] < second["router/drift"] < 1


def test_pairs_of_equal_texts_agree(tiny, tmp_path):
    """The one case with a known answer, in plain and in cached losses."""
    texts = pairs(8)["anchor"]
    same = Dataset.from_dict({"anchor": texts, "positive": texts})
    for loss in (
        st_losses.MultipleNegativesRankingLoss(tiny),
        st_losses.CachedMultipleNegativesRankingLoss(tiny, mini_batch_size=3),
    ):
        trainer = SentenceTransformerTrainer(
            model=tiny,
            args=arguments(tmp_path, max_steps=1, learning_rate=0.0),
            train_dataset=same,
            loss=loss,
            callbacks=[RouterCallback(probe_size=0)],
        )
        trainer.train()
        (entry,) = [e for e in trainer.state.log_history if "router/aux_loss" in e]
        assert entry["router/layer0/pair_agreement"] == 1.0


def test_the_callback_leaves_no_trace(tiny, tmp_path):
    """Afterwards the model is exported, pickled, served: nothing of the training may cling to it."""
    loss = st_losses.MultipleNegativesRankingLoss(tiny)
    SentenceTransformerTrainer(
        model=tiny, args=arguments(tmp_path), train_dataset=pairs(8), loss=loss, callbacks=[RouterCallback()]
    ).train()
    assert all(block.routing_observer is None for block in blocks_of(tiny))
    assert not loss._forward_hooks
    assert not loss._forward_pre_hooks


def test_known_loads_give_known_numbers():
    counts = torch.tensor([[4.0, 4.0, 4.0, 4.0], [16.0, 0.0, 0.0, 0.0], [8.0, 8.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert max_violation(counts).tolist() == [0.0, 3.0, 1.0, 0.0]
    assert load_entropy(counts).tolist() == pytest.approx([1.0, 0.0, 0.5, 1.0])
    assert dead_experts(counts).tolist() == [0, 3, 2, 4]


def test_auxiliary_terms_have_their_known_values():
    uniform = torch.full((6, 4), 0.25).log()
    assert load_balancing_loss(uniform, torch.full((4,), 0.25), 6).item() == pytest.approx(1.0)
    one = torch.tensor([[1.0, 1e-9, 1e-9, 1e-9]] * 6).log()
    assert load_balancing_loss(one, torch.tensor([1.0, 0, 0, 0]), 6).item() == pytest.approx(4.0, rel=1e-4)
    assert router_z_loss(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), 2).item() == pytest.approx(3.0)


# Heads that compute their own loss


@pytest.mark.parametrize("cls", [HagMoeForMaskedLM, HagMoeForSequenceClassification])
def test_a_heads_loss_holds_the_load_balance_term_on_request(cls):
    """As in Mixtral: with router logits, and over real tokens only."""
    config = HagMoeConfig(**TINY, **NO_DROPOUT, router_aux_loss_coef=0.5)
    model = spread(cls(config))
    ids = torch.randint(1, 99, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7)[None] < torch.tensor([[7], [2], [5]])
    labels = ids.masked_fill(~mask, -100) if cls is HagMoeForMaskedLM else torch.tensor([0, 1, 0])
    plain = model(ids, attention_mask=mask.long(), labels=labels)
    output = model(ids, attention_mask=mask.long(), labels=labels, output_router_logits=True)
    (logits,), (index,) = output.router_logits, output.expert_index
    real = mask.flatten()
    load = torch.bincount(index[real].flatten(), minlength=8) / real.sum()
    expected = 0.5 * 8 * (load * logits[real].exp().mean(0)).sum()
    assert output.aux_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.loss.item() == pytest.approx((plain.loss + expected).item(), rel=1e-5)
    assert plain.aux_loss is None


# What a user can get wrong


@pytest.mark.parametrize("argument", ["bias_update_rate", "aux_loss_coef", "z_loss_coef", "probe_size"])
def test_a_negative_argument_is_refused_by_name(argument):
    with pytest.raises(ValueError, match=f"{argument}=-1 is not possible"):
        RouterCallback(**{argument: -1})


def test_a_dense_model_is_refused(real_parent, tmp_path):
    """The callback would watch nothing and say nothing."""
    trainer = SentenceTransformerTrainer(
        model=real_parent,
        args=arguments(tmp_path),
        train_dataset=pairs(8),
        loss=st_losses.MultipleNegativesRankingLoss(real_parent),
        callbacks=[RouterCallback()],
    )
    with pytest.raises(ValueError, match="has no sparse layer; allowed: a HAG-MoE"):
        trainer.train()


# Two processes


def run_two_ranks(program: str, tmp_path, *program_arguments: str) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(program))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *program_arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=500)[0] for process in ranks]
    for process, output in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]


BALANCE_ON_TWO_RANKS = """
    import os, sys
    import torch
    import test_training_balance as t
    from sentence_transformers import SentenceTransformer

    folder, out, steps, lr, layers = sys.argv[1:]
    model = SentenceTransformer(folder, device="cpu")
    model.max_seq_length = 24
    t.push_to_one_expert(model)
    history = t.balance_run(model, f"{out}/{os.environ['RANK']}", int(steps), float(lr), ddp_backend="gloo")
    routers = [block.router for block in t.blocks_of(model)]
    for bias in [router.expert_bias for router in routers] + [router.group_bias for router in routers]:
        both = [torch.empty_like(bias) for _ in range(2)]
        torch.distributed.all_gather(both, bias)
        assert torch.equal(*both), both
    t.assert_balanced_again(history, tuple(map(int, layers.split(","))))
    """


def test_two_ranks_balance_alike(tiny_folder, tmp_path):
    """The trainer does not broadcast buffers: ranks that count alone would drift apart, and route differently."""
    run_two_ranks(BALANCE_ON_TWO_RANKS, tmp_path, str(tiny_folder), str(tmp_path), "150", "0.0", "0,2")


@pytest.mark.slow
def test_two_ranks_balance_the_real_parent_alike_while_it_trains(real_mixture, tmp_path):
    real_mixture.save_pretrained(str(tmp_path / "model"))
    run_two_ranks(BALANCE_ON_TWO_RANKS, tmp_path, str(tmp_path / "model"), str(tmp_path), "300", "2e-5", "1,3")


def test_two_ranks_inject_the_mean_gradient(tiny_folder, tmp_path):
    """DDP averages gradients over ranks: the injected ones must come out as those of an explicit term would."""
    run_two_ranks(
        """
        import os, sys
        import torch
        import test_training_balance as t

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
