"""One callback for stock trainers: it balances the routers of a HAG-MoE and logs what there is to watch."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from .. import sentence
from ..modeling_hagmoe import HagMoeSparseMLP
from ..routing_hagmoe import Packing, Routing
from .balance import BiasSteps, Coefficients, StepRecorder, StepSummary, bias_step
from .monitor import dead_experts, load_entropy, max_violation


class RouterCallback(TrainerCallback, ExportableState):
    """Keep the experts of a HAG-MoE balanced and log their routing, in any stock trainer.

    ```python
    trainer = SentenceTransformerTrainer(model=model, ..., callbacks=[RouterCallback()])
    ```

    Balance comes from a bias on each group's and expert's probability, which shifts choices and nothing else; it moves once
    per optimizer step, by what the whole global batch chose (arXiv 2408.15664). The auxiliary terms are off by default. In
    a mixture whose groups are for kinds of text (`balance_routing=False` in its configuration) no bias moves.

    With every entry of the training loss, one more entry is logged (TensorBoard, W&B and the like get it through
    `report_to`). Per sparse layer N: `router/layerN/load_entropy` (1 is even), `max_vio` and `dead_experts` of all steps
    since the last entry, `max_vio_batch` of the last step, `confidence` (mean probability of the chosen expert), and
    `pair_agreement` (share of first and second texts of a pair whose most probable group is the same; sequence routing
    only). Over all layers: `router/aux_loss`, `router/z_loss` (both before their weights; the logged `loss` is without
    them), and `router/drift`, 1 minus the mean cosine between the vectors of some training texts now and at the start
    (only of models that give a text one dense vector).

    A loop without trainer gives its model and its loss (a module) to `on_train_begin(None, TrainerState(), None, model=...,
    loss=...)` and calls `on_step_end(None, state, None)` after every optimizer step, and `on_train_end` last; nothing is
    logged then.

    Args:
        bias_update_rate: Largest step of an idle group's or expert's bias, in nats; 0 leaves the biases alone.
        aux_loss_coef: Weight of the load balance term.
        z_loss_coef: Weight of the router z-loss.
        probe_size: Training texts whose drift is followed; 0 for none.

    Raises:
        ValueError: A negative argument.
    """

    def __init__(
        self,
        bias_update_rate: float = 0.05,
        aux_loss_coef: float = 0.0,
        z_loss_coef: float = 0.0,
        probe_size: int = 16,
    ):
        arguments = {
            "bias_update_rate": bias_update_rate,
            "aux_loss_coef": aux_loss_coef,
            "z_loss_coef": z_loss_coef,
            "probe_size": probe_size,
        }
        for name, value in arguments.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value!r} is not possible; allowed: a finite number, 0 or more.")
        self.bias_update_rate = bias_update_rate
        self.coefficients = Coefficients(aux_loss_coef, z_loss_coef)
        self.probe_size = probe_size
        self.saved: dict[str, Any] = {}  # what a resumed run needs beside the model's own buffers, as plain JSON
        self._recorder: StepRecorder | None = None
        self._bias_steps: tuple[BiasSteps, BiasSteps] | None = None  # of groups and of experts
        self._trainer: Trainer | None = None
        self._layers: list[tuple[int, HagMoeSparseMLP]] = []
        self._window: StepSummary | None = None
        self._last: StepSummary | None = None
        self._agreement = _PairAgreement()
        self._undo: list[Callable[[], None]] = []

    @property
    def aux_loss_coef(self) -> float:
        """Weight of the load balance term; may be set while training."""
        return self.coefficients.aux_loss

    @aux_loss_coef.setter
    def aux_loss_coef(self, value: float) -> None:
        self.coefficients.aux_loss = value

    @property
    def z_loss_coef(self) -> float:
        """Weight of the router z-loss; may be set while training."""
        return self.coefficients.z_loss

    @z_loss_coef.setter
    def z_loss_coef(self, value: float) -> None:
        self.coefficients.z_loss = value

    def state(self) -> dict[str, Any]:
        """What the trainer keeps in a checkpoint's `trainer_state.json`."""
        arguments = {
            "bias_update_rate": self.bias_update_rate,
            "aux_loss_coef": self.aux_loss_coef,
            "z_loss_coef": self.z_loss_coef,
            "probe_size": self.probe_size,
        }
        return {"args": arguments, "attributes": {"saved": self._saved_now()}}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Find the sparse blocks and the losses, and put the taps on them.

        Raises:
            ValueError: The model has no sparse layer, or is about to be copied onto several GPUs of one process.
        """
        model = kwargs["model"]
        if args is not None and args.n_gpu > 1:
            raise ValueError(
                f"n_gpu={args.n_gpu} GPUs in one process: routing is not summed up over DataParallel's copies; allowed: "
                "one process for each GPU (accelerate launch, torchrun), or one GPU (CUDA_VISIBLE_DEVICES=0)."
            )
        self._layers = [
            (int(name.split("layers.")[-1].split(".")[0]), module)
            for name, module in model.named_modules()
            if isinstance(module, HagMoeSparseMLP)
        ]
        if not self._layers:
            raise ValueError(f"{type(model).__name__} has no sparse layer; allowed: {sentence.allowed_mixture(model)}.")
        self._take_off()
        config = self._layers[0][1].router.config
        device = _device(self._layers[0][1])
        rows = len(self._layers)
        self._recorder = StepRecorder(rows, config.num_experts, self.coefficients, device)
        self._bias_steps = BiasSteps(rows, config.n_group, device), BiasSteps(rows, config.num_experts, device)
        self._trainer = _calling_trainer()
        stored = state.stateful_callbacks.get(type(self).__name__) or {}
        self._restore(stored.get("attributes", {}).get("saved", {}) if state.global_step else {})
        for row, (_, block) in enumerate(self._layers):
            block.routing_observer = partial(self._observe, row)
            self._undo.append(partial(setattr, block, "routing_observer", None))
        losses = kwargs.get("loss", getattr(self._trainer, "loss", None))
        # Several datasets may share one loss, which is to be watched once
        for loss in dict.fromkeys(losses.values()) if isinstance(losses, dict) else [losses]:
            if isinstance(loss, nn.Module):
                self._undo.append(loss.register_forward_pre_hook(self._agreement.start).remove)
                self._undo.append(loss.register_forward_hook(self._watch_loss).remove)
        self._start_probe(model)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Sum up the step over all ranks and move the balancing biases."""
        if self._recorder is None:
            return
        self._last = self._recorder.finish_step()
        self._window = self._last if self._window is None else _added(self._window, self._last)
        if self.bias_update_rate and self._last.losses and self._layers[0][1].router.config.balance_routing:
            self._move_biases(self._last)

    def on_log(self, args, state, control, **kwargs) -> None:
        """Log the routing beside every entry of the training loss."""
        if self._window is None or self._trainer is None or "loss" not in kwargs.get("logs", {}):
            return
        metrics = self._metrics()
        if self._trainer.is_world_process_zero():
            metrics |= self._drift(kwargs["model"])
        self._window = None
        self._trainer.log(metrics)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Take the taps off: the model is as it would be without this callback, but for its balancing biases."""
        self._take_off()
        self.saved = {}
        self._recorder = self._window = self._last = None
        self._agreement = _PairAgreement()

    def _take_off(self) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _observe(self, row: int, output: Tensor, routing: Routing, packing: Packing | None) -> Tensor:
        if self._trainer is not None:  # nobody else asks for it
            self._agreement.see(row, output, routing, packing, self._layers[row][1].router.config)
        return output if self._recorder is None else self._recorder.watch(output, routing, row)

    def _watch_loss(self, module: nn.Module, inputs: tuple, loss: Any) -> Any:
        self._agreement.finish()
        if self._recorder is None or not torch.is_grad_enabled():
            return loss
        if isinstance(loss, dict):
            parts = enumerate(loss.items())
            return {name: self._recorder.watch_loss(part, first=number == 0) for number, (name, part) in parts}
        return self._recorder.watch_loss(loss)

    @torch.no_grad()
    def _move_biases(self, step: StepSummary) -> None:
        assert self._bias_steps is not None
        directions = bias_step(step.counts, self._layers[0][1].router.config.n_group)
        changes = [
            steps.take(direction, self.bias_update_rate)
            for steps, direction in zip(self._bias_steps, directions, strict=True)
        ]
        for (_, block), group_change, expert_change in zip(self._layers, *changes, strict=True):
            for bias, change in ((block.router.group_bias, group_change), (block.router.expert_bias, expert_change)):
                if bias is not None:
                    bias.add_(change.to(bias))

    def _metrics(self) -> dict[str, float]:
        assert self._window is not None
        assert self._last is not None
        window, metrics = self._window, dict[str, float]()
        is_counted = window.counts.sum(-1) > 0  # a layer that no gradient reaches is not: it is frozen, and all before it
        if not is_counted.any():
            return metrics
        columns = {
            "load_entropy": load_entropy(window.counts),
            "max_vio": max_violation(window.counts),
            "max_vio_batch": max_violation(self._last.counts),
            "dead_experts": dead_experts(window.counts),
            "confidence": window.confidence_sums / window.counts.sum(-1).clamp(min=1),
        }
        for name, values in columns.items():
            for (layer, _), value, counted in zip(self._layers, values.tolist(), is_counted.tolist(), strict=True):
                if counted:
                    metrics[f"router/layer{layer}/{name}"] = float(value)
        for row, share in self._agreement.pop().items():
            metrics[f"router/layer{self._layers[row][0]}/pair_agreement"] = share
        tokens = window.tokens.clamp(min=1)
        mean_probs = window.prob_sums / tokens.unsqueeze(-1)
        metrics["router/aux_loss"] = float((window.load * mean_probs).sum(-1)[is_counted].mean() * mean_probs.shape[-1])
        metrics["router/z_loss"] = float((window.z_sums / tokens)[is_counted].mean())
        return metrics

    def _start_probe(self, model: nn.Module) -> None:
        """Remember the vectors of a few training texts, unless a checkpoint brought those of the first start."""
        dataset = getattr(self._trainer, "train_dataset", None)
        if not self.probe_size or not hasattr(model, "encode") or dataset is None or "probe_vectors" in self.saved:
            return
        texts = _first_texts(dataset, self.probe_size)
        vectors = _encode(model, texts) if texts else None
        if vectors is not None:
            self.saved["probe_texts"] = texts
            self.saved["probe_vectors"] = vectors.tolist()

    def _drift(self, model: nn.Module) -> dict[str, float]:
        if "probe_vectors" not in self.saved:
            return {}
        start = torch.tensor(self.saved["probe_vectors"])
        now = cast(Tensor, _encode(model, self.saved["probe_texts"]))
        return {"router/drift": float(1 - nn.functional.cosine_similarity(now, start).mean())}

    def _tensors(self) -> dict[str, tuple[Any, str]]:
        """What a resumed run needs beside the model's own buffers: where each tensor lives."""
        recorder, (groups, experts) = self._recorder, self._bias_steps or (None, None)
        return {
            "previous_load": (recorder, "previous_load"),
            "previous_tokens_per_loss": (recorder, "previous_tokens_per_loss"),
            "group_step_share": (groups, "share"),
            "group_step_direction": (groups, "direction"),
            "expert_step_share": (experts, "share"),
            "expert_step_direction": (experts, "direction"),
        }

    def _saved_now(self) -> dict[str, Any]:
        if self._recorder is None:
            return self.saved
        now = {name: getattr(owner, attribute) for name, (owner, attribute) in self._tensors().items()}
        return {**self.saved, **{name: tensor.tolist() for name, tensor in now.items() if tensor is not None}}

    def _restore(self, saved: dict[str, Any]) -> None:
        self.saved = saved
        for name, (owner, attribute) in self._tensors().items():
            if name in saved:
                device = _device(self._layers[0][1])
                setattr(owner, attribute, torch.tensor(saved[name], dtype=torch.float64, device=device))


class _PairAgreement:
    """Whether the first and the second text of a pair prefer the same group, seen inside the forward pass of a loss."""

    def __init__(self) -> None:
        self._columns = 0  # texts per row of the batch; 0 outside a loss
        self._groups: dict[int, list[Tensor]] = {}  # sparse layer -> most probable group of each text, in order
        self._agreed: dict[int, list[Tensor]] = {}

    def start(self, module: nn.Module, inputs: tuple) -> None:
        """Before a loss: `inputs` begins with one dict of features per column."""
        features = inputs[0] if inputs else None
        self._columns = len(features) if isinstance(features, list | tuple) else 0
        self._groups = {}

    def see(self, row: int, output: Tensor, routing: Routing, packing: Packing | None, config: Any) -> None:
        """One sparse block's forward pass over (B, L, D) states, of one text per row, or packed."""
        if self._columns < 2 or config.n_group == 1 or config.group_routing != "sequence":
            return
        # every token of a text carries its text's P(group): the first will do, also where it is padding
        if packing is None:
            firsts = torch.arange(output.shape[0], device=output.device) * output.shape[1]
        else:
            firsts = packing.starts()
        log_probs_BE = routing.router_logits.detach()[firsts]
        groups = log_probs_BE.unflatten(-1, (config.n_group, -1)).logsumexp(dim=-1).argmax(dim=-1)
        self._groups.setdefault(row, []).append(groups)

    def finish(self) -> None:
        """After a loss: compare the columns, which the losses of sentence-transformers encode one after the other."""
        for row, groups in self._groups.items():
            flat = torch.cat(groups)
            if self._columns >= 2 and len(flat) % self._columns == 0:
                by_column = flat.view(self._columns, -1)
                self._agreed.setdefault(row, []).append((by_column[0] == by_column[1]).float().mean())
        self._columns, self._groups = 0, {}

    def pop(self) -> dict[int, float]:
        """Mean share of agreeing pairs by sparse layer since the last call."""
        shares = {row: float(torch.stack(values).mean()) for row, values in self._agreed.items()}
        self._agreed = {}
        return shares


def _device(block: HagMoeSparseMLP) -> torch.device:
    return next(block.experts.parameters()).device


def _added(a: StepSummary, b: StepSummary) -> StepSummary:
    return StepSummary(
        a.counts + b.counts,
        a.prob_sums + b.prob_sums,
        a.confidence_sums + b.confidence_sums,
        a.z_sums + b.z_sums,
        a.tokens + b.tokens,
        a.losses + b.losses,
    )


def _calling_trainer() -> Trainer | None:
    """The trainer whose loop is running: transformers hands callbacks everything but the trainer itself."""
    frame = sys._getframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Trainer):
            return frame.f_locals["self"]
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _first_texts(dataset: Any, number: int) -> list[str]:
    """The first texts of a dataset, or of each of a dict of datasets."""
    if isinstance(dataset, dict):
        share = max(1, number // max(1, len(dataset)))
        return [text for part in dataset.values() for text in _first_texts(part, share)][:number]
    texts = []
    for row in dataset:
        texts += [value for value in row.values() if isinstance(value, str) and value.strip()][:1]
        if len(texts) >= number:
            break
    return texts


def _encode(model: Any, texts: list[str]) -> Tensor | None:
    """(texts, D) float32 vectors on CPU; the model's mode stays as it was.

    None where a text has no dense vector: a SparseEncoder's is as long as the vocabulary, too long to be kept in every
    checkpoint's JSON, and a MultiVectorEncoder has one for each token. Only a SentenceTransformer gives NumPy by default.
    """
    training = model.training
    vectors = model.encode(texts, show_progress_bar=False)
    model.train(training)
    return torch.from_numpy(vectors).float() if isinstance(vectors, np.ndarray) else None
