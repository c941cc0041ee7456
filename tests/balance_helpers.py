"""What the tests of balance, auxiliary terms and monitoring share: tiny models, runs of the stock trainer, two ranks."""

import os
import socket
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses as st_losses
from torch import nn
from transformers import TrainerCallback

from hagmoe_hf.demo import read_corpus
from hagmoe_hf.modeling_hagmoe import HagMoeRouter, HagMoeSparseMLP
from hagmoe_hf.training.balance import Coefficients, StepRecorder
from hagmoe_hf.training.router_callback import RouterCallback

ROOT = Path(__file__).parents[1]


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


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def features(model: SentenceTransformer, data: Dataset, columns=("anchor", "positive")) -> list[dict]:
    return [model.preprocess(list(data[column])) for column in columns]


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


def recorder_on(model: nn.Module, coefficients: Coefficients) -> StepRecorder:
    blocks = blocks_of(model.train())
    recorder = StepRecorder(len(blocks), 8, coefficients, torch.device("cpu"))
    for row, block in enumerate(blocks):
        block.routing_observer = partial(lambda row, output, routing, packing: recorder.watch(output, routing, row), row)
    return recorder


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


def run_two_ranks(program: str, tmp_path, *program_arguments: str) -> None:
    script = tmp_path / "ranks.py"
    # A process group that is alive at a rank's exit may abort it; what trained holds it, in cycles
    end = "import gc\ngc.collect()\ntorch.distributed.destroy_process_group()\n"
    script.write_text(textwrap.dedent(program) + end)
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
