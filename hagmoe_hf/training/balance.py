"""What one optimizer step knows about its routing: counts of the global batch, and the gradients that balance it.

Nothing is written in a forward pass, because cached losses and gradient checkpointing run it twice. `RoutingTap` is the
identity on a sparse block's output; its backward runs exactly once for every forward that counts, and does two things: it
counts the choices, and it adds the auxiliary terms' gradients to the router's logits (as MoEAuxLossAutoScaler of Megatron).
`ScaleTap` is the identity on the loss; its backward runs before all others and tells how the loss was scaled.

Axes:  S sparse layers   T tokens   G groups   R experts per group   E = G*R experts
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..routing_hagmoe import Routing, load_balancing_loss, router_z_loss


@dataclass
class Coefficients:
    """Weights of the auxiliary terms; both 0 leave the loss's gradient as it is."""

    aux_loss: float
    z_loss: float


@dataclass(frozen=True)
class StepSummary:
    """Routing of one optimizer step, over all ranks, accumulation steps and cached mini-batches.

    Attributes:
        counts: (S, E) float64, choices of real tokens.
        prob_sums: (S, E) float64, sum of P(expert) over real tokens.
        confidence_sums: (S,) float64, sum over choices of the chosen expert's probability.
        z_sums: (S,) float64, sum of squared log-partitions.
        tokens: (S,) float64, real tokens.
        losses: float, how many losses ran backward: ranks times accumulation steps.
    """

    counts: Tensor
    prob_sums: Tensor
    confidence_sums: Tensor
    z_sums: Tensor
    tokens: Tensor
    losses: float

    @property
    def load(self) -> Tensor:
        """(S, E) float64 share of the choices that each expert took; uniform in a layer that saw no token."""
        totals_S1 = self.counts.sum(dim=-1, keepdim=True)
        uniform = torch.full_like(self.counts, 1 / self.counts.shape[-1])
        return torch.where(totals_S1 > 0, self.counts / totals_S1.clamp(min=1), uniform)


class StepRecorder:
    """Collects one optimizer step's routing in the backward passes, and sums it over the ranks at its end.

    Args:
        num_layers: Sparse layers S.
        num_experts: Experts E per layer.
        coefficients: Weights of the auxiliary terms, read at every backward.
        device: Where to count.
    """

    def __init__(self, num_layers: int, num_experts: int, coefficients: Coefficients, device: torch.device):
        self.coefficients = coefficients
        # One flat tensor per layer: E counts, E probability sums, confidence, z, tokens; one all-reduce sends everything
        self._sums = torch.zeros(num_layers, 2 * num_experts + 3, dtype=torch.float64, device=device)
        self._losses = 0
        self.loss_scale: Tensor | None = None
        # The auxiliary terms of a step are linear in its tokens: load and token count come from the step before
        self.previous_load: Tensor | None = None  # (S, E)
        self.previous_tokens_per_loss: Tensor | None = None  # (S,)

    def watch(self, output: Tensor, routing: Routing, layer: int) -> Tensor:
        """Put a tap on a sparse block's (B, L, D) output; returns the same values."""
        return RoutingTap.apply(output, routing.router_logits, routing.log_partition, routing.expert_index, self, layer)

    def watch_loss(self, loss: Tensor, first: bool = True) -> Tensor:
        """Put a tap on a scalar loss; `first` is False for further parts of the same loss."""
        return ScaleTap.apply(loss, self, first)

    @torch.no_grad()
    def record(self, layer: int, router_logits: Tensor, log_partition: Tensor, expert_index: Tensor) -> None:
        """Add one block's choices: (T, E) log-probabilities, (T, gates) log-partitions, (T, K) experts; padding included."""
        num_experts = router_logits.shape[-1]
        real_T = (expert_index[:, 0] < num_experts).to(torch.float32)
        # Not bincount: it waits for the GPU to learn the largest index
        choices = expert_index.flatten()
        counts_E = choices.new_zeros(num_experts + 1).scatter_add(0, choices, torch.ones_like(choices))[:num_experts]
        probs_TE = router_logits.exp()
        chosen_TK = probs_TE.gather(-1, expert_index.clamp(max=num_experts - 1))
        sums = self._sums[layer]
        sums[:num_experts] += counts_E
        sums[num_experts : 2 * num_experts] += real_T @ probs_TE
        sums[-3:] += torch.stack([real_T @ chosen_TK.sum(-1), real_T @ log_partition.square().sum(-1), real_T.sum()])

    def auxiliary_gradients(
        self, layer: int, router_logits: Tensor, log_partition: Tensor, expert_index: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the weighted auxiliary terms, times the loss's own scale, or None where there are none."""
        weights = self.coefficients
        if not (weights.aux_loss or weights.z_loss) or self.previous_load is None or self.previous_tokens_per_loss is None:
            return None, None
        if self.loss_scale is None:
            raise RuntimeError(
                "aux_loss_coef or z_loss_coef is set, but the loss was not watched, so its scale is unknown; allowed: the "
                "losses of a SentenceTransformerTrainer. A model with its own head has config.router_aux_loss_coef."
            )
        real = expert_index[:, 0] < router_logits.shape[-1]
        num_tokens = self.previous_tokens_per_loss[layer]
        with torch.enable_grad():
            logits, partition = router_logits.detach().requires_grad_(), log_partition.detach().requires_grad_()
            term = weights.aux_loss * load_balancing_loss(logits[real], self.previous_load[layer].float(), num_tokens)
            term = term + weights.z_loss * router_z_loss(partition[real], num_tokens)
            logits_grad, partition_grad = torch.autograd.grad(term, (logits, partition))
        scale = self.loss_scale.to(logits_grad)
        return logits_grad * scale, partition_grad * scale

    def finish_step(self) -> StepSummary:
        """Sum the step over all ranks, keep what the next step's auxiliary terms need, and start anew."""
        device = self._sums.device
        sums, losses = self._sums.clone(), float(self._losses)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            flat = torch.cat([sums.flatten(), torch.tensor([losses], dtype=torch.float64, device=device)])
            torch.distributed.all_reduce(flat)
            sums, losses = flat[:-1].view_as(sums), float(flat[-1])  # only here the step waits for the GPU
        num_experts = (sums.shape[-1] - 3) // 2
        confidence, z, tokens = sums[:, -3:].unbind(-1)
        summary = StepSummary(sums[:, :num_experts], sums[:, num_experts : 2 * num_experts], confidence, z, tokens, losses)
        if summary.losses:
            self.previous_load = summary.load
            self.previous_tokens_per_loss = (tokens / summary.losses).clamp(min=1)
        self._sums.zero_()
        self._losses = 0
        self.loss_scale = None
        return summary

    def count_loss(self, scale: Tensor) -> None:
        """Called in the backward of each loss, before any block's: one more loss, scaled by `scale`."""
        self._losses += 1
        self.loss_scale = scale.detach()


class RoutingTap(torch.autograd.Function):
    """The identity on a block's output; see the head of this file."""

    @staticmethod
    def forward(ctx, output, router_logits, log_partition, expert_index, recorder, layer):  # noqa: D102
        ctx.save_for_backward(router_logits, log_partition, expert_index)
        ctx.recorder, ctx.layer = recorder, layer
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad_output):  # noqa: D102
        router_logits, log_partition, expert_index = ctx.saved_tensors
        ctx.recorder.record(ctx.layer, router_logits, log_partition, expert_index)
        logits_grad, partition_grad = ctx.recorder.auxiliary_gradients(ctx.layer, router_logits, log_partition, expert_index)
        return grad_output, logits_grad, partition_grad, None, None, None


class ScaleTap(torch.autograd.Function):
    """The identity on a loss; its backward learns by what the trainer multiplied it (accumulation, GradScaler)."""

    @staticmethod
    def forward(ctx, loss, recorder, first):  # noqa: D102
        ctx.recorder, ctx.first = recorder, first
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad_output):  # noqa: D102
        if ctx.first:
            ctx.recorder.count_loss(grad_output)
        return grad_output, None, None


class BiasSteps:
    """How far each balancing bias moves: long steps out of a collapse, short ones near balance.

    A bias's step grows while its direction lasts and shrinks when it turns (as in Rprop, Riedmiller and Braun 1993), up to
    the user's rate. A fixed step is too long for fresh gates, whose logits hardly differ between texts: all texts then
    swing together from one group to the next, at every step, and no group can specialise (docs/decisions/0003).

    Args:
        num_layers: Sparse layers S.
        num_biases: Biases per layer: G groups, or E experts.
        device: Where the biases are.
    """

    GROW, SHRINK, SMALLEST = 1.1, 0.7, 0.02  # factors, and the shortest step as a share of the rate

    def __init__(self, num_layers: int, num_biases: int, device: torch.device):
        self.share = torch.ones(num_layers, num_biases, dtype=torch.float64, device=device)  # of the user's rate
        self.direction = torch.zeros_like(self.share)

    def take(self, direction: Tensor, rate: float) -> Tensor:
        """(S, biases) changes of the biases for (S, biases) directions, with at most `rate` for an idle expert."""
        lasting = direction.sign() * self.direction.sign()
        factor = torch.where(lasting > 0, self.GROW, torch.where(lasting < 0, self.SHRINK, 1.0))
        self.share = (self.share * factor).clamp(self.SMALLEST, 1.0)
        self.direction = direction
        return rate * self.share * direction


def bias_step(counts: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Directions in which the balancing biases move: up for the underloaded, down for the overloaded.

    A group is compared with the mean group, an expert with the mean expert of its own group, so the two levels do not
    fight. A direction is the relative deviation `(mean - load) / mean`, whose average over steps is 0 exactly where the
    average load is even. Its sign alone (arXiv 2408.15664) would even out medians instead: an expert that takes a whole
    batch now and then, and is idle in between, would be pushed further up.

    Args:
        counts: (S, E) choices of one step.
        num_groups: G.

    Returns:
        (S, G) and (S, E) directions: 1 for the idle, down to 1 - n for one of n that took all; 0 where nothing was counted.
    """
    counts_SGR = counts.unflatten(-1, (num_groups, -1))
    groups_SG = counts_SGR.sum(dim=-1)
    return _relative_deviation(groups_SG), _relative_deviation(counts_SGR).flatten(-2)


def _relative_deviation(load: Tensor) -> Tensor:
    mean = load.mean(dim=-1, keepdim=True)
    return torch.where(mean > 0, (mean - load) / mean.clamp(min=1e-12), torch.zeros_like(load))
