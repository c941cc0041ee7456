"""What RouterCallback logs, and what it refuses: `training/monitor.py` and `router_callback.py`."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from balance_helpers import arguments, blocks_of, pairs
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformerTrainer,
)
from sentence_transformers.sentence_transformer import losses as st_losses
from transformers import TrainerCallback, TrainerState

from hagmoe_hf.training.monitor import dead_experts, load_entropy, max_violation
from hagmoe_hf.training.parameters import freeze
from hagmoe_hf.training.router_callback import RouterCallback


def watched(model, folder) -> SentenceTransformerTrainer:
    return SentenceTransformerTrainer(
        model=model,
        args=arguments(folder),
        train_dataset=pairs(8),
        loss=st_losses.MultipleNegativesRankingLoss(model),
        callbacks=[RouterCallback()],
    )


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


def test_a_model_can_be_pickled_while_it_trains_and_after_an_interruption(tiny, tmp_path):
    """A notebook's Ctrl-C, then a process pool: the observer holds on to a trainer that cannot be pickled."""
    sizes = []

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            sizes.append(len(pickle.dumps(tiny)))
            raise KeyboardInterrupt

    loss, callback = st_losses.MultipleNegativesRankingLoss(tiny), RouterCallback()

    def train(*more) -> None:
        SentenceTransformerTrainer(
            model=tiny, args=arguments(tmp_path), train_dataset=pairs(8), loss=loss, callbacks=[callback, *more]
        ).train()

    with pytest.raises(KeyboardInterrupt):
        train(Interrupt())
    assert pickle.loads(pickle.dumps(tiny)).encode(["a"]) == pytest.approx(tiny.encode(["a"]), abs=1e-6)
    hooks = len(loss._forward_hooks)
    seen = []
    train(type("See", (TrainerCallback,), {"on_step_end": lambda self, *_, **__: seen.append(len(loss._forward_hooks))})())
    assert set(seen) == {hooks}, "the same callback, twice on one loss, counts everything twice"
    assert sizes


def test_a_layer_that_is_not_counted_is_not_said_to_be_even(tiny, tmp_path):
    """No gradient reaches a frozen beginning, so nothing is counted there: 0 tokens look like perfect balance."""
    freeze(tiny[0].model, ["embeddings.*", "layers.0.*"])
    trainer = watched(tiny, tmp_path)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "router/aux_loss" in entry)
    assert "router/layer2/load_entropy" in entry
    assert "router/layer0/load_entropy" not in entry


def test_a_mixture_of_remote_code_is_told_what_to_do():
    """Its classes are another module's, and look to us like a dense model's."""
    copy = type("HagMoeSparseMLP", (torch.nn.Linear,), {})(2, 2)
    with pytest.raises(ValueError, match="after `import hagmoe_hf`, without trust_remote_code"):
        RouterCallback().on_train_begin(None, TrainerState(), None, model=torch.nn.Sequential(copy))


def test_several_gpus_in_one_process_are_refused(tiny):
    """DataParallel's copies would count on GPUs of their own, and the sums break in the middle of the first step."""
    two = SimpleNamespace(n_gpu=2)
    with pytest.raises(ValueError, match=r"n_gpu=2 GPUs in one process.*allowed: one process for each GPU"):
        RouterCallback().on_train_begin(two, TrainerState(), None, model=tiny)


def test_known_loads_give_known_numbers():
    counts = torch.tensor([[4.0, 4.0, 4.0, 4.0], [16.0, 0.0, 0.0, 0.0], [8.0, 8.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert max_violation(counts).tolist() == [0.0, 3.0, 1.0, 0.0]
    assert load_entropy(counts).tolist() == pytest.approx([1.0, 0.0, 0.5, 1.0])
    assert dead_experts(counts).tolist() == [0, 3, 2, 4]


@pytest.mark.parametrize("argument", ["bias_update_rate", "aux_loss_coef", "z_loss_coef", "probe_size"])
def test_a_negative_argument_is_refused_by_name(argument):
    with pytest.raises(ValueError, match=f"{argument}=-1 is not possible"):
        RouterCallback(**{argument: -1})


def test_a_dense_model_is_refused(real_parent, tmp_path):
    """The callback would watch nothing and say nothing."""
    trainer = watched(real_parent, tmp_path)
    with pytest.raises(ValueError, match="has no sparse layer; allowed: a HAG-MoE"):
        trainer.train()
