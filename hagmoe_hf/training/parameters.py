"""Which parameters a pattern names, whatever wraps the model while it trains."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

# What DDP, FSDP, torch.compile and checkpointing put into names, and the way from the outermost module to the encoder
_WRAPPERS = re.compile(r"(^|(?<=\.))(module|_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
_WAY_TO_ENCODER = re.compile(r"^(0\.)?(auto_)?model\.")


def encoder_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters under the names they have in the encoder alone, such as `layers.1.mlp.router.group_gate.weight`.

    Args:
        model: A `SentenceTransformer`, an encoder or one with a head, wrapped for distributed training or not. Parameters
            outside the encoder keep their names.
    """
    return {_WAY_TO_ENCODER.sub("", _WRAPPERS.sub("", name)): parameter for name, parameter in model.named_parameters()}


def value_by_pattern(names: Sequence[str], patterns: Mapping[str, float]) -> dict[str, float]:
    """The value of the last pattern that matches each name; names that none matches are left out.

    Args:
        names: Parameter names.
        patterns: Shell-style pattern -> value, in order: later patterns override earlier ones.

    Raises:
        ValueError: A pattern matches no name.
    """
    values = {}
    for pattern, value in patterns.items():
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(
                f"The pattern {pattern!r} matches no parameter; allowed: shell-style patterns of names such as "
                f"{', '.join(map(repr, names[:: max(1, len(names) // 4)][:4]))}."
            )
        values.update(dict.fromkeys(matched, value))
    return values


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Exclude the parameters that match from training; call it before there is an optimizer.

    Args:
        model: As for `encoder_parameters`.
        patterns: Shell-style patterns, such as `*.experts.*` or `embeddings.*`.

    Returns:
        The names that are frozen now.

    Raises:
        ValueError: A pattern matches no parameter, or together they leave nothing to train.
    """
    parameters = encoder_parameters(model)
    frozen = list(value_by_pattern(list(parameters), dict.fromkeys(patterns, 0.0)))
    for name in frozen:
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"freeze={list(patterns)} leaves no parameter to train; allowed: patterns that spare some.")
    return frozen
