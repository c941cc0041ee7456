"""One run: an arm, a learning rate, a seed. Stops at a deadline, is killed, goes on, and ends where it would have ended.

A plain loop instead of the stock trainer: it reads token ids that lie on the device, so a small model keeps a GPU busy,
and waits for the GPU at the points of the curve and where transformers asks whether a mask masks anything. Model, balancing
and upcycling are the package's own; the loss is tested equal to MultipleNegativesRankingLoss.
"""

import os
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import TrainerState

from ablation.arms import DENSE, Arm
from ablation.budgets import Budget
from ablation.inputs import Pairs, plan
from ablation.models import build, mixture, parameter_groups
from ablation.routers import EXPERT_OF_DOMAIN, FixedRouter
from ablation.scoring import dev_scores
from hagmoe_hf import sentence
from hagmoe_hf.training.interpolation import interpolate, weights_to_learn
from hagmoe_hf.training.losses import TranslationLoss
from hagmoe_hf.training.router_callback import RouterCallback
from hagmoe_hf.training.slow_experts import SlowExpertsCallback

SCALE = 20.0  # of cosines, as in MultipleNegativesRankingLoss
LARGEST_GRADIENT = 1.0
CHECKPOINT_SECONDS = 120
clock = time.monotonic


class Contrastive(nn.Module):
    """In-batch InfoNCE over cosines, and on request the parent's similarities as a second target.

    Translations have the parent's vector of the English text as the target of both texts.

    Args:
        model: The model to train.
        parent: The model to imitate; None for none.
        weight: Of the imitation.
    """

    def __init__(self, model: SentenceTransformer, parent: SentenceTransformer | None = None, weight: float = 0.0):
        super().__init__()
        self.model, self.parent, self.weight = model, parent, weight

    def forward(self, features: list[dict[str, Tensor]]) -> Tensor:
        """A scalar for the features of anchors and positives."""
        logits = self.similarities(self.model, features)
        loss = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
        if self.weight and self.parent is not None:
            with torch.no_grad():
                target = self.similarities(self.parent, features).log_softmax(-1)
            loss = loss + self.weight * F.kl_div(logits.log_softmax(-1), target, reduction="batchmean", log_target=True)
        return loss

    def translations(self, features: list[dict[str, Tensor]]) -> Tensor:
        """A scalar for the features of English texts and of their translations, whose target is the parent's vector."""
        with torch.no_grad():
            target_BD = self.vectors(self.parent, features[0])
        return TranslationLoss(self.model)(features, target_BD.unsqueeze(1))

    def similarities(self, model: SentenceTransformer, features: list[dict[str, Tensor]]) -> Tensor:
        """(B, B) scaled cosines, under autocast in its dtype, as in MultipleNegativesRankingLoss."""
        anchors, positives = (self.vectors(model, part) for part in features)
        return SCALE * anchors @ positives.T

    @staticmethod
    def vectors(model: SentenceTransformer | None, features: dict[str, Tensor]) -> Tensor:
        """(B, D) of length 1."""
        assert model is not None
        return F.normalize(model(dict(features))["sentence_embedding"].float(), dim=-1)


@dataclass
class Run:
    """What a run has come to; all of it is in its checkpoint.

    Attributes:
        step: Optimizer steps done.
        curve: Points: step, pairs seen, held-out MRR by domain, routing by layer, training loss since the last point.
        seconds: Of training, without evaluation.
    """

    step: int = 0
    curve: list[dict] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Setting:
    """What a run is made of.

    Attributes:
        arm: What is trained.
        budget: How long.
        learning_rate: The highest.
        seed: Of data order, new weights and dropout.
        inputs: Folder that `prepare` made.
        device: Like "cpu" or "cuda".
        start: Kept weights of a run that this one follows; None where it starts from the parent.
    """

    arm: Arm
    budget: Budget
    learning_rate: float
    seed: int
    inputs: Path
    device: str
    start: Path | None = None

    @property
    def upcycling_step(self) -> int:
        """The step before which the model is dense; 0 where it is what it is from the start."""
        return 0 if self.start else round(self.arm.dense_share * self.budget.steps)


class Trainee:
    """A model with its optimizer, its balancing, its average and its random state: what a checkpoint holds.

    Args:
        setting: Of the run.
        model: To train.
        texts: Pairs for a later calibration.
        balancing: Its state, from a checkpoint.
        started: What its weights were before the first step, where they are not that any more.
    """

    def __init__(
        self,
        setting: Setting,
        model: SentenceTransformer,
        texts: list[tuple[str, str]],
        balancing: dict | None = None,
        started: dict[str, Tensor] | None = None,
    ):
        self.setting, self.model, self.texts = setting, model, texts
        self.started = started or (weights_to_learn(model) if setting.arm.interpolated != 1 else {})
        arm = setting.arm
        groups = parameter_groups(model, arm)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)
        distillation = arm.distillation or setting.budget.distillation
        imitates = bool(distillation or setting.budget.translated)
        parent = sentence.load(str(setting.inputs / "parent"), device=setting.device) if imitates else None
        self.loss = Contrastive(model, parent and parent.eval().requires_grad_(False), distillation)
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.slow_experts = SlowExpertsCallback(arm.preserved_rate) if arm.preserved_rate != 1 else None
        self.average = [parameter.detach().clone() for parameter in self.trained] if arm.average else []
        for group in groups if arm.shared_gradient else ():
            for stack in group["params"] if group["kind"] == "experts" else ():
                stack.register_hook(partial(share_gradient, arm.shared_gradient))
        self.routers = [module for module in model.modules() if isinstance(module, FixedRouter)]
        self.callback: RouterCallback | None = None
        if self.is_mixture and arm.balancing is not None:
            self.callback = RouterCallback(**arm.balancing)
            state = TrainerState(global_step=1 if balancing else 0)
            state.stateful_callbacks = {"RouterCallback": balancing} if balancing else {}
            self.callback.on_train_begin(None, state, None, model=model, loss=self.loss)

    @property
    def is_mixture(self) -> bool:
        """Whether there is something to balance."""
        return hasattr(sentence.encoder_of(self.model).config, "sparse_layers")

    def step(self, number: int, pairs: Pairs, rows: np.ndarray) -> Tensor:
        """One optimizer step; returns the loss, still on the device."""
        setting = self.setting
        for group in self.optimizer.param_groups:
            frozen = group["kind"] == "router" and number < setting.arm.frozen_gates * setting.budget.steps
            group["lr"] = 0.0 if frozen else setting.learning_rate * group["factor"] * _schedule(number, setting.budget)
        if self.routers:
            domains = np.searchsorted(pairs.first_rows, rows, side="right") - 1
            experts = torch.tensor([EXPERT_OF_DOMAIN.get(pairs.domains[d], 0) for d in domains]).to(setting.device)
            for router in self.routers:
                router.expert = experts
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.budget.bfloat16):
            features = pairs.features(rows)
            # Batches of one domain: budgets with translations have no others
            domain = pairs.domains[np.searchsorted(pairs.first_rows, rows[0], side="right") - 1]
            loss = self.loss.translations(features) if setting.budget.is_translated(domain) else self.loss(features)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, LARGEST_GRADIENT)
        if self.slow_experts is not None:
            self.slow_experts.on_pre_optimizer_step(None, None, None, model=self.model)
        self.optimizer.step()
        if self.slow_experts is not None:
            self.slow_experts.on_optimizer_step(None, None, None)
        self.optimizer.zero_grad(set_to_none=True)
        if self.callback is not None:
            self.callback.on_step_end(None, None, None)
        if self.average:
            torch._foreach_lerp_(self.average, [p.detach() for p in self.trained], 1 - setting.arm.average)
        return loss.detach()

    def upcycled(self) -> "Trainee":
        """The mixture of the model as it is now, with a new optimizer."""
        arm, seed = self.setting.arm, self.setting.seed
        return Trainee(self.setting, mixture(arm, self.model, self.texts, seed), self.texts)

    def use_average(self) -> None:
        """Put the averaged weights into the model, for good."""
        with torch.no_grad():
            for parameter, mean in zip(self.trained, self.average, strict=True) if self.average else ():
                parameter.copy_(mean)

    def close(self) -> None:
        """Take the taps off the model."""
        if self.callback is not None:
            self.callback.on_train_end(None, None, None)


def share_gradient(part: float, gradient: Tensor) -> Tensor:
    """(E, ...) -> (E, ...): each expert's own gradient, mixed with the sum over all experts."""
    return gradient.lerp(gradient.sum(0, keepdim=True).expand_as(gradient), part)


def _schedule(step: int, budget: Budget) -> float:
    """Factor on the learning rate: up in the first tenth, then down to 0."""
    rising = max(1, round(budget.warmup * budget.steps))
    return min((step + 1) / rising, (budget.steps - step) / max(1, budget.steps - rising))


def train(
    setting: Setting, pairs: Pairs, dev: Pairs, texts: list[tuple[str, str]], folder: Path, deadline: float
) -> tuple[Run, SentenceTransformer] | None:
    """Train, or go on training, until the end or the deadline.

    Args:
        setting: What to train.
        pairs: To train on.
        dev: Held out.
        texts: Pairs for calibration.
        folder: Where its checkpoint lies.
        deadline: `time.monotonic()` at which to stop.

    Returns:
        What came of it and the trained model; None where the deadline came first, with a checkpoint to go on from.
    """
    budget = setting.budget
    run, trainee, losses = _begin(setting, texts, folder)
    # What follows draws other batches than what came before
    steps = plan(pairs, budget, setting.seed + budget.pairs_before, setting.arm.mixed_batches)
    points = {round(part * budget.steps / budget.evaluations) for part in range(budget.evaluations + 1)}
    label = f"{setting.arm.name} {setting.learning_rate:g} seed {setting.seed}"
    saved = started = clock()
    with tqdm(total=budget.steps, initial=run.step, desc=label) as bar:
        while True:
            if run.step in points and (not run.curve or run.curve[-1]["step"] < run.step):
                run.seconds += clock() - started
                if run.step == budget.steps:
                    trainee.use_average()
                    interpolate(trainee.model, trainee.started, setting.arm.interpolated)
                run.curve.append(_point(run.step, setting, trainee.model, dev, losses))
                losses, started = [], clock()
            if run.step == budget.steps:
                trainee.close()
                return run, trainee.model
            now = clock()
            if now > deadline or now - saved > CHECKPOINT_SECONDS:
                run.seconds += now - started
                _save(run, trainee, losses, folder)
                saved = started = clock()
                if now > deadline:
                    trainee.close()
                    return None
            if run.step == setting.upcycling_step > 0:
                trainee.close()
                trainee = trainee.upcycled()
            trainee.model.train()
            losses.append(trainee.step(run.step, pairs, steps[run.step]))
            run.step += 1
            bar.update()


def _point(step: int, setting: Setting, model: SentenceTransformer, dev: Pairs, losses: list[Tensor]) -> dict:
    model.eval()
    mrr, routing = dev_scores(model, dev)
    loss = float(torch.stack(losses).mean()) if losses else None
    pairs = setting.budget.pairs_before + step * setting.budget.batch_size
    return {"step": step, "pairs": pairs, "loss": loss, "dev_mrr": mrr, "routing": routing}


def _begin(setting: Setting, texts: list[tuple[str, str]], folder: Path) -> tuple[Run, Trainee, list[Tensor]]:
    path = folder / "checkpoint.pt"
    begins = not path.is_file()
    arm = setting.arm
    if setting.start and arm.branches and begins:
        arm = DENSE
    elif setting.start:
        arm = replace(arm, dense_share=0.0, calibrated=False)
    torch.manual_seed(setting.seed)
    model = build(arm, setting.inputs / "parent", texts, setting.seed, setting.device)
    if begins:
        if setting.start is not None:
            model.load_state_dict(load_file(setting.start))
            if setting.arm.branches:
                model = mixture(setting.arm, model, texts, setting.seed)
        torch.manual_seed(setting.seed)  # the same dropout for every arm, however many weights it drew
        return Run(), Trainee(setting, model, texts), []
    saved = torch.load(path, map_location=setting.device, weights_only=True)
    run = Run(**saved["run"])
    if run.step > setting.upcycling_step > 0:
        model = mixture(setting.arm, model, texts, setting.seed)
    model.load_state_dict(saved["model"])
    trainee = Trainee(setting, model, texts, saved["balancing"], saved["started"])
    trainee.optimizer.load_state_dict(saved["optimizer"])
    trainee.average = saved["average"]
    torch.set_rng_state(saved["random"].cpu())
    if saved["cuda_random"] is not None:
        torch.cuda.set_rng_state(saved["cuda_random"].cpu())
    return run, trainee, saved["losses"]


def _save(run: Run, trainee: Trainee, losses: list[Tensor], folder: Path) -> None:
    """Write the checkpoint under another name, then rename."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "run": {"step": run.step, "curve": run.curve, "seconds": run.seconds},
        "model": trainee.model.state_dict(),
        "optimizer": trainee.optimizer.state_dict(),
        "balancing": trainee.callback.state() if trainee.callback else None,
        "average": trainee.average,
        "started": trainee.started,
        "losses": losses,
        "random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state() if trainee.setting.device != "cpu" else None,
    }
    partial = folder / "checkpoint.partial"  # one name for all: a run that is killed often leaves one, not many
    torch.save(state, partial)
    os.replace(partial, folder / "checkpoint.pt")
