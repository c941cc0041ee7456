"""Training in phases: what learns how fast, how strongly experts are balanced, how many groups are open, on which data.

The phase follows from the trainer's step alone, so a resumed run is in the right one without any further state.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import TrainerCallback

from ..configuration_hagmoe import HagMoeConfig
from ..modeling_hagmoe import HagMoePreTrainedModel
from .parameters import encoder_parameters, value_by_pattern
from .yaml_files import read_yaml

ROUTER_FIELDS = ("aux_loss_coef", "z_loss_coef", "bias_update_rate")


@dataclass(frozen=True)
class Phase:
    """One stretch of a run; what is None (or empty) stays as the run was set up.

    Attributes:
        name: Shown in the log.
        until: Where it ends: a step (int) or a fraction of the run (float in (0, 1]).
        learning_rates: Shell-style pattern of encoder parameter names -> factor on the scheduled learning rate, 0 or more;
            of several that match a name the last counts, 0 holds the parameter still.
        aux_loss_coef: Coefficient of the load-balance term, 0 or more.
        z_loss_coef: Coefficient of the router z-loss, 0 or more.
        bias_update_rate: Step of the balancing bias, 0 or more.
        topk_group: Groups that stay open.
        max_length: Longest text in tokens; longer ones are cut.
        mix: Domain -> weight, 0 or more; domains left out are not drawn.
    """

    name: str
    until: int | float = 1.0
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    aux_loss_coef: float | None = None
    z_loss_coef: float | None = None
    bias_update_rate: float | None = None
    topk_group: int | None = None
    max_length: int | None = None
    mix: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Curriculum:
    """Phases in order, each under a name of its own.

    Raises:
        ValueError: Two phases have the same name.
    """

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        names = [phase.name for phase in self.phases]
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if twice:
            raise ValueError(f"Several phases are named {twice[0]!r}; allowed: a name of its own for each phase.")

    def ends(self, max_steps: int) -> list[int]:
        """The step before which each phase ends, in a run of `max_steps` optimizer steps.

        Raises:
            ValueError: A phase would be empty, or the last one ends before the run or after it.
        """
        ends, start = [], 0
        for phase in self.phases:
            end = phase.until if isinstance(phase.until, int) else round(phase.until * max_steps)
            if end <= start:
                raise ValueError(
                    f"Phase {phase.name!r}: until={phase.until!r} is step {end} of {max_steps}; allowed: after step "
                    f"{start}, where the phase before it ends."
                )
            ends.append(end)
            start = end
        if start != max_steps:
            raise ValueError(
                f"Phase {self.phases[-1].name!r}: until={self.phases[-1].until!r} is step {start}; allowed for the last "
                f"phase: the end of the run, 1.0 or {max_steps}."
            )
        return ends

    def phase_at(self, step: int, max_steps: int) -> Phase:
        """The phase of the optimizer step `step`, counted from 0."""
        ends = self.ends(max_steps)
        return next((phase for phase, end in zip(self.phases, ends, strict=True) if step < end), self.phases[-1])


def read_curriculum(path: str | Path) -> Curriculum:
    """Read a YAML file with one key, `phases`: a list of the fields of `Phase`.

    Raises:
        ValueError: Not such a file; the message names the file, the phase, the field, its value and what is allowed.
        OSError: The file cannot be read.
    """
    try:
        content = read_yaml(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML ({error}); allowed: a YAML file with the key 'phases'.") from error
    entries = content.get("phases") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or set(content) != {"phases"}:
        raise ValueError(f"{path} has the wrong form; allowed: one key 'phases' with a list of phases.")
    phases = tuple(_phase(entry, number, str(path)) for number, entry in enumerate(entries, 1))
    try:
        return Curriculum(phases)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _phase(entry: Any, number: int, source: str) -> Phase:
    known = [f.name for f in fields(Phase)]
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ValueError(f"{source}: phase {number} has no name; allowed: a mapping with a 'name' and some of {known[1:]}.")
    place = f"{source}: phase {entry['name']!r}"
    for key, value in entry.items():
        if key not in known:
            raise ValueError(f"{place}: unknown field {key!r}; allowed: {known}.")
        allowed = _complaint(key, value)
        if allowed:
            raise ValueError(f"{place}: {key}={value!r} is not possible; allowed: {allowed}.")
    return Phase(**entry)


def _complaint(key: str, value: Any) -> str | None:
    """What is allowed for a phase's field, None where `value` is fine."""
    if key == "until":
        fits = _is_number(value) and (value >= 1 if isinstance(value, int) else 0 < value <= 1)
        return None if fits else "a step (an integer from 1) or a fraction of the run (a float over 0, up to 1.0)"
    if key in ROUTER_FIELDS:
        return None if _is_number(value) and value >= 0 else "a finite number, 0 or more"
    if key in ("topk_group", "max_length"):
        smallest = 1 if key == "topk_group" else 3  # a text needs room beside its two special tokens
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= smallest
        return None if fits else f"an integer, at least {smallest}"
    if key in ("learning_rates", "mix"):
        fits = isinstance(value, dict) and bool(value) and all(_is_number(v) and v >= 0 for v in value.values())
        fits = fits and all(isinstance(k, str) for k in value) and (key != "mix" or sum(value.values()) > 0)
        kind = "parameter name pattern -> factor" if key == "learning_rates" else "domain -> weight, not all 0"
        return None if fits else f"a mapping of {kind}, each a finite number, 0 or more"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class CurriculumCallback(TrainerCallback):
    """Puts each phase into force at its first step, in any transformers or sentence-transformers trainer.

    A learning rate factor m is applied to what the optimizer did: `theta = before + m * (after - before)`. This works with
    any optimizer and scheduler, changes neither `requires_grad` (which DDP would not follow) nor parameter groups (which a
    checkpoint would have to match), and with m = 0 restores the parameter exactly.

    A data mix is not drawn here: the sampler asks `mix_at`.

    Args:
        curriculum: The phases.
        router_callback: The `RouterCallback` of the same trainer, whose coefficients phases set; None if none does.

    Raises:
        ValueError: A phase sets a coefficient, and there is no `router_callback`.
    """

    def __init__(self, curriculum: Curriculum, router_callback: Any = None):
        for phase in curriculum.phases:
            given = [name for name in ROUTER_FIELDS if getattr(phase, name) is not None]
            if given and router_callback is None:
                raise ValueError(f"Phase {phase.name!r} sets {given[0]} without a router_callback; allowed: pass one.")
        self.curriculum = curriculum
        self.router_callback = router_callback
        self.phase: Phase | None = None
        self.max_steps = 0
        self._before: list[tuple[nn.Parameter, Tensor, float]] = []
        self._hook: Any = None

    def mix_at(self, step: int) -> Mapping[str, float] | None:
        """Domain -> weight at the optimizer step `step`, None for the run's own sampling; known once training began."""
        return self.curriculum.phase_at(step, self.max_steps).mix

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Check all phases against the model before the first step.

        Raises:
            ValueError: A phase that does not fit the run, the model or DeepSpeed.
        """
        self.phase, self.max_steps = None, state.max_steps
        self.curriculum.ends(state.max_steps)
        self._parameters = encoder_parameters(model)
        self._factors = {
            phase.name: value_by_pattern(list(self._parameters), phase.learning_rates) for phase in self.curriculum.phases
        }
        if args.deepspeed and any(phase.learning_rates for phase in self.curriculum.phases):
            raise ValueError(
                "learning_rates in a phase with DeepSpeed, which keeps copies of the weights out of this callback's reach; "
                "allowed: DDP, FSDP or one process, or `freeze` instead."
            )
        self._config = _mixture_config(model)
        self._usual_topk_group = self._config.topk_group
        self._usual_coefficients = {name: getattr(self.router_callback, name, None) for name in ROUTER_FIELDS}
        for phase in self.curriculum.phases:  # each must be possible before the first one begins
            self._open_groups(phase)
        self._config.topk_group = self._usual_topk_group
        self.on_train_end(args, state, control)  # of a training that was interrupted
        if any(phase.max_length for phase in self.curriculum.phases):
            trained = _sentence_transformer(model)
            side = getattr(trained.tokenizer, "padding_side", "right")
            if side != "right":
                raise ValueError(f"max_length in a phase with padding on the {side}; allowed: a tokenizer that pads right.")
            self._hook = trained.register_forward_pre_hook(self._cut)

    def on_step_begin(self, args, state, control, **kwargs):
        """Enter the phase of this step."""
        phase = self.curriculum.phase_at(state.global_step, state.max_steps)
        if phase is self.phase:
            return
        self.phase = phase
        self._open_groups(phase)
        for name, usual in self._usual_coefficients.items():
            if self.router_callback is not None:
                value = getattr(phase, name)
                setattr(self.router_callback, name, usual if value is None else value)
        logged = [entry["phase"] for entry in state.log_history if "phase" in entry]
        if logged[-1:] != [phase.name]:  # a resumed run has the line already
            state.log_history.append({"phase": phase.name, "step": state.global_step})

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Remember what the optimizer is about to change more than the phase allows."""
        assert self.phase is not None
        self._before = [
            (parameter, parameter.detach().clone(), factor)
            for name, factor in self._factors[self.phase.name].items()
            if factor != 1 and (parameter := self._parameters[name]).requires_grad
        ]

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        """Scale what the optimizer did."""
        for parameter, before, factor in self._before:
            parameter.copy_(before if factor == 0 else before + factor * (parameter - before))
        self._before = []

    def on_train_end(self, args, state, control, **kwargs):
        """Stop cutting texts; the number of open groups stays that of the last phase, with which the model was trained."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _open_groups(self, phase: Phase) -> None:
        self._config.topk_group = phase.topk_group or self._usual_topk_group
        try:
            self._config.validate_mixture()
        except ValueError as error:
            self._config.topk_group = self._usual_topk_group
            raise ValueError(f"Phase {phase.name!r}: {error}") from error

    def _cut(self, module: nn.Module, arguments: tuple) -> tuple | None:
        """Shorten a training batch on its way into the model: the loader has tokenised ahead, maybe in the phase before."""
        if not module.training or self.phase is None or self.phase.max_length is None:
            return None
        return (cut_features(arguments[0], self.phase.max_length), *arguments[1:])


def cut_features(features: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    """Cut tokenised texts as a tokenizer would have: the first `max_length` - 1 tokens and the closing special token.

    Args:
        features: `input_ids` and `attention_mask` (B, L), padded on the right; other (B, L) tensors are cut alike.
        max_length: Tokens to keep.

    Returns:
        New features; those that are short enough as they are.
    """
    ids, mask = features["input_ids"], features["attention_mask"]
    if ids.shape[1] <= max_length:
        return dict(features)
    cut = {
        key: value[:, :max_length].clone() if isinstance(value, Tensor) and value.shape == ids.shape else value
        for key, value in features.items()
    }
    length_B = mask.sum(dim=1)
    too_long = length_B > max_length
    last_token = ids.gather(1, (length_B - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    cut["input_ids"][too_long, -1] = last_token[too_long]
    return cut


def _mixture_config(model: nn.Module) -> HagMoeConfig:
    for module in model.modules():
        if isinstance(module, HagMoePreTrainedModel):
            return module.config
    raise ValueError(f"A curriculum needs a HAG-MoE, not a {type(model).__name__}; allowed: upcycle the model first.")


def _sentence_transformer(model: nn.Module) -> nn.Module:
    from sentence_transformers import SentenceTransformer

    for module in model.modules():
        if isinstance(module, SentenceTransformer):
            return module
    raise ValueError(
        f"max_length in a phase needs a SentenceTransformer, not a {type(model).__name__}; allowed: no max_length here."
    )
