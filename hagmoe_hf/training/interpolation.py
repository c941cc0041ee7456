"""Weights between where they started and where training took them: less is lost of what the model knew."""

from collections.abc import Mapping

import torch
from accelerate import DistributedType, PartialState
from torch import Tensor, nn

from .parameters import encoder_parameters


def weights_to_learn(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that need a gradient, but for a memory's rows, by name.

    Args:
        model: As for `encoder_parameters`, before its first step.

    Raises:
        ValueError: Training is going to cut the parameters into pieces (FSDP).
    """
    if PartialState().distributed_type == DistributedType.FSDP:
        raise ValueError(
            "interpolation under FSDP, which cuts weights into pieces; allowed: 1, or several processes under DDP."
        )
    parameters = {name: one for name, one in encoder_parameters(model).items() if one.requires_grad}
    return {name: one.detach().clone() for name, one in parameters.items() if "ngram_memory." not in name}


@torch.no_grad()
def interpolate(model: nn.Module, started: Mapping[str, Tensor], part: float) -> None:
    """Leave weights at a part of their way, in place.

    Args:
        model: As it was trained.
        started: What `weights_to_learn` gave for it.
        part: 0 for where they started, 1 for where they are.

    Source: WiSE-FT, arXiv 2109.01903.
    """
    parameters = encoder_parameters(model)
    for name, before in started.items():
        parameters[name].lerp_(before.to(parameters[name].device), 1 - part)
