"""Checkpoints that are mixtures already: nomic-embed-text-v2-moe becomes a HAG-MoE with the same outputs.

Its published form needs remote code, and plain `AutoModel` drops its experts without a word; its weights map onto the one
model here (a flat token router, softmax top-2 whose weights are not renormalised, one output bias for each sparse block).
"""

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor

from .configuration_hagmoe import HagMoeConfig
from .modeling_hagmoe import HagMoeModel, naming_damaged_weights, refuse_non_finite

# What travels with the weights: the tokenizer, and the stock modules of a SentenceTransformer
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "sentencepiece.bpe.model",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
REQUIRED = {
    "prenorm": False,
    "use_rms_norm": False,
    "parallel_block": False,
    "causal": False,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "moe_normalize_expert_weights": False,
    "expert_choice_router": False,
    "num_shared_experts": 0,
    "activation_function": "gelu",
    "scale_attn_weights": True,
    "qkv_proj_bias": True,
    "mlp_fc1_bias": True,
    "mlp_fc2_bias": True,
}
PLAIN_KEYS = (
    (r"embeddings\.(word|token_type)_embeddings\.weight", r"embeddings.\1_embeddings.weight"),
    (r"emb_ln\.(weight|bias)", r"embeddings.norm.\1"),
    (r"encoder\.layers\.(\d+)\.attn\.out_proj\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
    (r"encoder\.layers\.(\d+)\.norm1\.(weight|bias)", r"layers.\1.attention_norm.\2"),
    (r"encoder\.layers\.(\d+)\.norm2\.(weight|bias)", r"layers.\1.mlp_norm.\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1\.(weight|bias)", r"layers.\1.mlp.up_proj.\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.router\.layer\.weight", r"layers.\1.mlp.router.expert_gate.weight"),
    (r"encoder\.layers\.(\d+)\.mlp\.experts\.bias", r"layers.\1.mlp.output_bias"),
)


def import_nomic_moe(name_or_path: str | os.PathLike, allow_key_mismatch: bool = False) -> HagMoeModel:
    """Load a nomic-embed-text-v2-moe checkpoint as a `HagMoeModel` with the same outputs.

    Args:
        name_or_path: A local folder with `config.json` and `model.safetensors`, or a Hub id.
        allow_key_mismatch: Whether left-over and missing weights are only warned of.

    Returns:
        The encoder, in evaluation mode and float32. It has no pooler, as the original.

    Raises:
        FileNotFoundError: There is no `config.json` or no `model.safetensors`.
        ValueError: A setting that the original's published checkpoints do not have, weights that are missing, left over,
            damaged or not finite; the message names them.

    Source: arXiv 2502.07972.
    """
    folder = nomic_moe_folder(name_or_path)
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        config = _config_of(about)
    except KeyError as error:
        kind = f"a {about.get('model_type')!r}, whose config lacks {error}"
        raise ValueError(f"{folder} is {kind}; allowed: a checkpoint of nomic-embed-text-v2-moe's kind.") from error
    with naming_damaged_weights(str(folder)):
        weights, left_over = _rename(load_file(folder / "model.safetensors"), config)
    model = HagMoeModel(config)
    known = dict(model.named_parameters())  # the balancing biases are buffers, and start at 0
    missing = sorted(known.keys() - weights.keys())
    left_over += sorted(weights.keys() - known.keys())
    if missing or left_over:
        found = f"{folder} lacks the weights {missing} and leaves over {left_over}"
        if not allow_key_mismatch:
            raise ValueError(f"{found}; allowed: those of nomic-embed-text-v2-moe, or allow_key_mismatch=True.")
        warnings.warn(f"{found}: what is missing stays random, the rest is left out.", stacklevel=2)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items() if name in known}, strict=False)
    refuse_non_finite(model, str(folder))
    return model.eval()


def nomic_moe_folder(name_or_path: str | os.PathLike) -> Path:
    """The local folder of a checkpoint; a Hub id is downloaded first (weights and companions, no code, no pickle).

    Raises:
        FileNotFoundError: There is no `config.json` or no `model.safetensors`.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        wanted = ["config.json", "model.safetensors", *COMPANIONS]
        folder = Path(snapshot_download(os.fspath(name_or_path), allow_patterns=wanted))
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} holds no {file}; allowed: a folder with config.json and model.safetensors.")
    return folder


def _config_of(nomic: dict[str, Any]) -> HagMoeConfig:
    for name, value in REQUIRED.items():
        actual = nomic.get(name, value)
        if actual != value and (actual or value):  # null and false say the same
            raise ValueError(f"{name}={actual!r} in the checkpoint's config cannot be imported; allowed: {value!r}.")
    num_layers, every = nomic["n_layer"], nomic["moe_every_n_layers"]
    return HagMoeConfig(
        vocab_size=nomic["vocab_size"],
        hidden_size=nomic["n_embd"],
        num_hidden_layers=num_layers,
        num_attention_heads=nomic["n_head"],
        intermediate_size=nomic["n_inner"],
        hidden_act=nomic["activation_function"],
        hidden_dropout_prob=nomic.get("resid_pdrop", 0.0),
        embedding_dropout=nomic.get("embd_pdrop", 0.0),
        attention_probs_dropout_prob=nomic.get("attn_pdrop", 0.0),
        max_position_embeddings=nomic.get("n_positions", 2048),
        type_vocab_size=nomic["type_vocab_size"],
        initializer_range=nomic.get("initializer_range", 0.02),
        layer_norm_eps=nomic["layer_norm_epsilon"],
        position_embedding_type="rope",
        rope_parameters={"rope_type": "default", "rope_theta": float(nomic["rotary_emb_base"])},
        has_pooler=False,
        pad_token_id=nomic.get("pad_token_id"),
        bos_token_id=nomic.get("bos_token_id"),
        eos_token_id=nomic.get("eos_token_id"),
        mlp_layer_types=["sparse" if layer % every == 1 else "dense" for layer in range(num_layers)],
        num_experts=nomic["num_experts"],
        num_experts_per_tok=nomic["moe_top_k"],
        n_group=1,
        topk_group=1,
        combine_rule="softmax",
        shared_expert_intermediate_size=0,
        moe_intermediate_size=nomic["n_inner"],
    )


def _rename(nomic: dict[str, Tensor], config: HagMoeConfig) -> tuple[dict[str, Tensor], list[str]]:
    """The weights under the model's names, and the checkpoint's names that mean nothing here."""
    experts, width, hidden = config.num_experts, config.moe_intermediate_size or 0, config.hidden_size
    weights: dict[str, Tensor] = {}
    left_over = []
    for key, tensor in nomic.items():
        name = key.removeprefix("bert.")
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.attn\.Wqkv\.(weight|bias)", name):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                weights[f"layers.{match[1]}.attention.{part}_proj.{match[2]}"] = rows
            continue
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.mlp\.experts\.mlp\.(w1|w2)", name):
            block = f"layers.{match[1]}.mlp.experts"
            stack = tensor.view(experts, width, hidden)  # both are (E*F, D); w1 is applied transposed, w2 as it is
            weights[f"{block}.up_proj" if match[2] == "w1" else f"{block}.down_proj"] = (
                stack if match[2] == "w1" else stack.transpose(1, 2).contiguous()
            )
            # Its experts have no biases of their own
            bias, size = ("up_proj_bias", width) if match[2] == "w1" else ("down_proj_bias", hidden)
            weights[f"{block}.{bias}"] = tensor.new_zeros(experts, size)
            continue
        for pattern, replacement in PLAIN_KEYS:
            if match := re.fullmatch(pattern, name):
                weights[match.expand(replacement)] = tensor
                break
        else:
            left_over.append(key)
    return weights, left_over
