"""A trained mixture as what differs from its parent: small enough to be kept beside code.

What training left alone is not there, nor what upcycling makes again. Matrices that moved are differences of 8 bits with a
scale for each row, the rows of a memory 4 bits with a scale for every `GROUP` numbers; small tensors are as they were.
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import sentence
from .configuration_hagmoe import HagMoeConfig
from .files import new_folder, write_text
from .modeling_hagmoe import HagMoeModel
from .upcycling import upcycle

DIFFERENCE = "difference.safetensors"
SMALL = 2**14  # numbers; a tensor with fewer is kept as it is
SMALLEST = 1e-30  # scale of what is 0 everywhere
GROUP = 32  # numbers of a memory's row that share a scale
ROWS, COUNTS = "ngram_memory.rows", "ngram_memory.counts"
POOLER = "pooler."
SETTINGS = ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim")  # of the model around the encoder


def pack(model: Any, parent: Any, folder: str | os.PathLike) -> Path:
    """Write what a mixture has and its parent has not.

    Args:
        model: A trained mixture, as a `SentenceTransformer` without another module that learned, or its path.
        parent: The dense `SentenceTransformer` that it was upcycled from, or its path.
        folder: A new folder.

    Returns:
        The folder, with the mixture's `config.json` and the difference.

    Raises:
        ValueError: `model` holds no HAG-MoE, one that `parent` could not have become, or other modules than `parent`.
        FileExistsError: `folder` exists and is not empty.
    """
    model, parent = _loaded(model), _loaded(parent)
    encoder = sentence.encoder_of(model)
    if not isinstance(encoder, HagMoeModel):
        raise ValueError(
            f"model holds a {type(encoder).__name__}; allowed: a HagMoeModel, {sentence.allowed_mixture(encoder)}."
        )
    if (modules := _modules(model)) != _modules(parent):
        raise ValueError(
            f"model is made of {', '.join(modules)}; allowed: the modules of parent, {', '.join(_modules(parent))}."
        )
    start = _start(encoder.config, parent)
    memory = encoder.ngram_memory
    packed: dict[str, Tensor] = {}
    for name, tensor in encoder.state_dict().items():
        tensor, was = tensor.detach().cpu(), start.get(name)
        if was is None and name.startswith(POOLER):
            continue  # of no use to a SentenceTransformer, and the parent came without
        if name == ROWS and memory is not None:
            packed |= _to_4_bits(name, tensor[1:][memory.counts.cpu() > 0])
        elif name.startswith("ngram_memory."):
            packed[name] = tensor
        elif was is None or was.shape != tensor.shape:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} is not what parent becomes; allowed: the parent of this mixture."
            )
        elif not torch.equal(tensor, was):
            packed |= {name: tensor} if tensor.numel() < SMALL else _to_8_bits(name, tensor.float() - was.float())
    settings = json.dumps({name: getattr(model, name) for name in SETTINGS})
    about = {"parent": weights_hash(parent), "max_seq_length": str(model.max_seq_length), "settings": settings}
    with new_folder(Path(folder)) as partial:
        save_file({name: tensor.contiguous() for name, tensor in packed.items()}, partial / DIFFERENCE, about)
        write_text(partial / "config.json", encoder.config.to_json_string(use_diff=False))
    return Path(folder)


def unpack(folder: str | os.PathLike, parent: Any) -> Any:
    """Put a packed mixture and its parent together.

    Args:
        folder: That `pack` made.
        parent: The same parent as there, a `SentenceTransformer` or its path; it is left as it was.

    Returns:
        The mixture as a `SentenceTransformer`, in float32 on the CPU.

    Raises:
        ValueError: `parent` is another model than the one that was packed against, or the folder holds other tensors.
        OSError: `folder` holds no packed mixture.
    """
    folder = Path(folder)
    parent = _loaded(parent)
    config = HagMoeConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    with safe_open(folder / DIFFERENCE, "pt") as file:
        about = _about(file, folder)
        packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    if (found := weights_hash(parent)) != about["parent"]:
        raise ValueError(
            f"parent has the weights {found[:12]}; allowed: those that were packed against, {about['parent'][:12]}."
        )
    state = _start(config, parent)
    for name, tensor in packed.items():
        if name.endswith(".int8"):
            own = name.removesuffix(".int8")
            state[own] = state[own] + tensor.float() * packed[f"{own}.scale"].float()
        elif name.endswith(".int4"):
            own = name.removesuffix(".int4")
            rows = torch.zeros(config.ngram_memory_size + 1, config.hidden_size)
            rows[1:][packed[COUNTS] > 0] = _from_4_bits(tensor, packed[f"{own}.scale"])
            state[own] = rows
        elif not name.endswith(".scale"):
            state[name] = tensor
    state = {name: tensor for name, tensor in state.items() if config.has_pooler or not name.startswith(POOLER)}
    config.has_pooler = any(name.startswith(POOLER) for name in state)
    encoder = HagMoeModel(config)
    encoder.load_state_dict(state)
    model = sentence.with_encoder(parent, encoder.eval(), "")
    model.max_seq_length = int(about["max_seq_length"])
    for name, value in json.loads(about.get("settings", "{}")).items():
        setattr(model, name, value)
    return model


def fits(folder: str | os.PathLike, parent: Any) -> bool:
    """Whether a packed mixture is there, and `parent`, a `SentenceTransformer`, is what it was packed against.

    Raises:
        ValueError: The folder holds other tensors under that name.
    """
    path = Path(folder) / DIFFERENCE
    if not path.is_file():
        return False
    with safe_open(path, "pt") as file:
        return bool(_about(file, folder)["parent"] == weights_hash(parent))


def _modules(model: Any) -> list[str]:
    return [type(module).__name__ for module in model]


def _loaded(model: Any) -> Any:
    return sentence.load(os.fspath(model), device="cpu") if isinstance(model, str | os.PathLike) else model


def _about(file: Any, folder: str | os.PathLike) -> dict[str, str]:
    about = file.metadata() or {}
    if not {"parent", "max_seq_length"} <= set(about):
        raise ValueError(f"{folder}/{DIFFERENCE} says {about or 'nothing'} of itself; allowed: a file that `pack` wrote.")
    return about


def weights_hash(model: Any) -> str:
    """SHA-256 (hex) of the weights of a model's encoder, and of nothing that a library's version may change."""
    digest = hashlib.sha256()
    for name, tensor in sorted(sentence.encoder_of(model).named_parameters()):
        if "pooler" not in name:  # of no use to a SentenceTransformer, which may leave it out
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _start(config: HagMoeConfig, parent: Any) -> dict[str, Tensor]:
    """The weights of a mixture of this configuration before training, without a memory."""
    shared = config.shared_expert_intermediate_size
    assert shared is not None  # a configuration works it out
    mixture = upcycle(
        parent,
        sparse_layers=config.sparse_layers,
        n_group=config.n_group,
        num_experts=config.num_experts,
        topk_group=config.topk_group,
        num_experts_per_tok=config.num_experts_per_tok,
        shared_expert_fraction=shared / config.intermediate_size,
        group_routing=config.group_routing,
        group_input=config.group_input,
        combine_rule=config.combine_rule,
    )
    return {name: tensor.detach().cpu() for name, tensor in sentence.encoder_of(mixture).state_dict().items()}


def _to_8_bits(name: str, difference: Tensor) -> dict[str, Tensor]:
    """(..., D) -> (..., D) int8 and (..., 1) float32, whose product it nearly is."""
    scale = (difference.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=SMALLEST)
    return {f"{name}.int8": (difference / scale).round().to(torch.int8), f"{name}.scale": scale}


def _to_4_bits(name: str, rows: Tensor) -> dict[str, Tensor]:
    """(N, D) -> (N, D / 2) uint8, two numbers from -7 to 7 in each, and (N, D / GROUP, 1) bfloat16."""
    grouped = rows.float().unflatten(-1, (-1, math.gcd(GROUP, rows.shape[-1])))
    scale = (grouped.abs().amax(dim=-1, keepdim=True) / 7).clamp(min=SMALLEST).bfloat16()
    numbers = (grouped / scale.float()).round().clamp(-7, 7).flatten(1) + 8
    low, high = numbers.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return {f"{name}.int4": low | (high << 4), f"{name}.scale": scale}


def _from_4_bits(packed: Tensor, scale: Tensor) -> Tensor:
    numbers = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).float() - 8
    return (numbers.unflatten(-1, (scale.shape[1], -1)) * scale.float()).flatten(1)


__all__ = ["fits", "pack", "unpack"]
