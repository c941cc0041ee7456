"""Numbers to watch while training, from counted routing. Pure arithmetic on what `balance` summed up.

Axes:  S sparse layers   E experts
"""

import math

import torch
from torch import Tensor


def max_violation(counts: Tensor) -> Tensor:
    """How far the most loaded expert is above the mean: max(load) / mean(load) - 1, 0 when all is even.

    Args:
        counts: (S, E) choices.

    Returns:
        (S,), in [0, E - 1]; 0 where nothing was counted.

    Source: MaxVio of arXiv 2408.15664, section 3.
    """
    mean = counts.mean(dim=-1)
    return torch.where(mean > 0, counts.amax(dim=-1) / mean.clamp(min=1e-12) - 1, torch.zeros_like(mean))


def load_entropy(counts: Tensor) -> Tensor:
    """Entropy of the load over its largest possible value, log E: 1 is uniform, 0 is one expert for all.

    Args:
        counts: (S, E) choices.

    Returns:
        (S,), in [0, 1]; 1 where nothing was counted.
    """
    num_experts = counts.shape[-1]
    load = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    entropy = -torch.special.xlogy(load, load).sum(dim=-1) / math.log(num_experts)
    return torch.where(counts.sum(dim=-1) > 0, entropy, torch.ones_like(entropy))


def dead_experts(counts: Tensor) -> Tensor:
    """(S,) number of experts of (S, E) that took nothing."""
    return (counts == 0).sum(dim=-1)
