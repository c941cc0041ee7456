"""Experts that learn more slowly than the others of their layer."""

from typing import Any

import torch
from accelerate import DistributedType, PartialState
from torch import Tensor
from transformers import TrainerCallback

from ..modeling_hagmoe import HagMoeModel


class SlowExpertsCallback(TrainerCallback):
    """Let the first group's experts learn at a part of the rate at which the others learn.

    For a mixture whose first group is that of texts which it should nearly keep (`upcycle(..., preserved_texts=...)`), with
    `preserve_first_group` turned off in its configuration. An optimizer has one rate for all experts of a layer, which are
    one parameter, and those of Adam's kind take steps that do not depend on the gradient's size. So it is the step that is
    made smaller: after each, these experts go back a part of the way. It works with every optimizer that steps in place, and
    on whole parameters (not under FSDP).

    Args:
        rate: Part of each step that is left, from 0 to 1.

    Raises:
        ValueError: A rate out of its range; in training, parameters that FSDP has cut into pieces.
    """

    def __init__(self, rate: float):
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise ValueError(f"rate={rate!r} is not possible; allowed: a number from 0 to 1.")
        self.rate = float(rate)
        self._before: list[tuple[Tensor, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what it cannot slow down."""
        if PartialState().distributed_type == DistributedType.FSDP:
            raise ValueError(
                f"rate={self.rate} under FSDP, which cuts experts into pieces; allowed: one process, or several under DDP."
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Keep what the experts are."""
        encoder: Any = next(module for module in model.modules() if isinstance(module, HagMoeModel))
        first = slice(encoder.config.experts_per_group)
        blocks = (encoder.layers[layer].mlp for layer in encoder.config.sparse_layers)
        experts = [stack.detach()[first] for block in blocks for stack in block.experts.parameters()]
        self._before = [(expert, expert.clone()) for expert in experts]

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go back a part of the step."""
        for expert, before in self._before:
            expert.lerp_(before, 1 - self.rate)
        self._before = []
