"""The balancing bias, on one process and on two: `training/balance.py` and `router_callback.py`."""

import pytest
import torch
from balance_helpers import (
    arguments,
    assert_balanced_again,
    balance_run,
    blocks_of,
    features,
    pairs,
    push_to_one_expert,
    recorder_on,
    run_two_ranks,
)
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
)
from sentence_transformers.sentence_transformer import losses as st_losses
from transformers.trainer_callback import TrainerState

from hagmoe_hf import HagMoeModel, upcycle
from hagmoe_hf.training.balance import BiasSteps, Coefficients, bias_step
from hagmoe_hf.training.router_callback import RouterCallback


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
    assert not callback._agreement._agreed, "nothing is logged, so nothing may pile up"
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
    cast = tiny[0].model.to(torch.bfloat16)
    assert all(torch.equal(block.router.expert_bias, torch.arange(8) * 0.1001) for block in blocks_of(cast))
    built = HagMoeModel._from_config(half.config, dtype=torch.bfloat16)
    assert {block.router.group_bias.dtype for block in blocks_of(built)} == {torch.float32}


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


BALANCE_ON_TWO_RANKS = """
    import os, sys
    import torch
    import balance_helpers as t
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
