"""Low-rank adapters (LoRA, arXiv 2106.09685) on the routed experts and the router's gates, through PEFT."""

from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedModel

GATES = r".*\.router\.(group_gate|expert_gate)"


def add_lora(encoder: PreTrainedModel, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Add adapters to a HAG-MoE and freeze everything else; at first they change nothing.

    Args:
        encoder: A HAG-MoE model.
        rank: r of the adapters, at least 1; each expert has its own.
        alpha: Their scale is alpha / r.
        targets: "experts", "router", or both.

    Raises:
        ValueError: Targets that do not exist.
        ImportError: PEFT is missing.
    """
    if not targets or not set(targets) <= {"experts", "router"}:
        raise ValueError(f"lora_targets={list(targets)} is not possible; allowed: 'experts', 'router', or both.")
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("LoRA needs PEFT: pip install hagmoe_hf[train]") from error
    first = "gate_up_proj" if encoder.config.gated_mlp else "up_proj"
    stacks = [f"mlp.experts.{first}", "mlp.experts.down_proj"]  # 3-D parameters, not modules
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides it by r, any number will do
        target_modules=GATES if "router" in targets else [],
        target_parameters=stacks if "experts" in targets else None,
    )
    encoder.add_adapter(config)


def merge_lora(encoder: PreTrainedModel) -> None:
    """Add the adapters to the weights and remove them; the vectors stay the same, and PEFT is not needed any more."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(encoder.named_modules()):
        if not isinstance(module, BaseTunerLayer) or name.endswith(".base_layer"):
            continue
        layer: Any = module
        layers = [layer]  # adapters of several parameters of one module are nested
        while isinstance(layer, BaseTunerLayer):
            layer = cast(Any, layer).base_layer
            layers.append(layer)
        for layer in reversed(layers[:-1]):
            layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(encoder.get_submodule(parent), child, layers[-1])
    encoder._hf_peft_config_loaded = False
    del encoder.peft_config
    encoder.requires_grad_(True)
