import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hagmoe_hf.importing import import_nomic_moe

CONFIG = {
    "model_type": "nomic_bert",
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_inner": 48,
    "n_positions": 64,
    "moe_every_n_layers": 2,
    "num_experts": 4,
    "moe_top_k": 2,
    "moe_normalize_expert_weights": False,
    "num_shared_experts": 0,
    "expert_choice_router": False,
    "rotary_emb_base": 10000,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "layer_norm_epsilon": 1e-5,
    "type_vocab_size": 1,
    "activation_function": "gelu",
    "prenorm": False,
    "use_rms_norm": None,
    "pad_token_id": 1,
}


def checkpoint(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under the names of the published model, spread wide enough that a misplaced one shows."""
    generator = torch.Generator().manual_seed(seed)
    D, F, E = CONFIG["n_embd"], CONFIG["n_inner"], CONFIG["num_experts"]
    shapes = {
        "embeddings.word_embeddings.weight": (CONFIG["vocab_size"], D),
        "embeddings.token_type_embeddings.weight": (1, D),
        "emb_ln.weight": (D,),
        "emb_ln.bias": (D,),
    }
    for layer in range(CONFIG["n_layer"]):
        at = f"encoder.layers.{layer}"
        shapes |= {f"{at}.attn.Wqkv.weight": (3 * D, D), f"{at}.attn.Wqkv.bias": (3 * D,)}
        shapes |= {f"{at}.attn.out_proj.weight": (D, D), f"{at}.attn.out_proj.bias": (D,)}
        shapes |= {f"{at}.norm{n}.{kind}": (D,) for n in (1, 2) for kind in ("weight", "bias")}
        if layer % 2 == 1:
            shapes |= {f"{at}.mlp.router.layer.weight": (E, D), f"{at}.mlp.experts.bias": (D,)}
            shapes |= {f"{at}.mlp.experts.mlp.w1": (E * F, D), f"{at}.mlp.experts.mlp.w2": (E * F, D)}
        else:
            shapes |= {f"{at}.mlp.fc1.weight": (F, D), f"{at}.mlp.fc1.bias": (F,)}
            shapes |= {f"{at}.mlp.fc2.weight": (D, F), f"{at}.mlp.fc2.bias": (D,)}
    weights = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1 + w if "norm" in name and name.endswith("weight") else w for name, w in weights.items()}


def saved(folder, weights=None, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(checkpoint() if weights is None else weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def norm(vector, w, at):
    centred = vector - vector.mean()
    return centred / (centred.square().mean() + CONFIG["layer_norm_epsilon"]).sqrt() * w[f"{at}.weight"] + w[f"{at}.bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def rotated(vector, position):
    """NeoX-style: the first half of a head turns against its second half."""
    half = len(vector) // 2
    out = vector.clone()
    for i in range(half):
        angle = position / CONFIG["rotary_emb_base"] ** (2 * i / len(vector))
        a, b = vector[i], vector[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def plain_nomic(w: dict[str, torch.Tensor], text: list[int]) -> torch.Tensor:
    """nomic-embed-text-v2-moe from its paper and its checkpoint's layout, token by token, in float64: (tokens, D)."""
    w = {name: tensor.double() for name, tensor in w.items()}
    D, F, heads = CONFIG["n_embd"], CONFIG["n_inner"], CONFIG["n_head"]
    width = D // heads
    words, types = w["embeddings.word_embeddings.weight"], w["embeddings.token_type_embeddings.weight"]
    states = [norm(words[token] + types[0], w, "emb_ln") for token in text]
    for layer in range(CONFIG["n_layer"]):
        at = f"encoder.layers.{layer}"
        qkv = [w[f"{at}.attn.Wqkv.weight"] @ x + w[f"{at}.attn.Wqkv.bias"] for x in states]
        attended = []
        for t in range(len(text)):
            mixed = []
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                query = rotated(qkv[t][:D][part], t)
                keys = [rotated(qkv[u][D : 2 * D][part], u) for u in range(len(text))]
                probs = torch.stack([query @ key / math.sqrt(width) for key in keys]).softmax(0)
                mixed.append(sum(p * qkv[u][2 * D :][part] for u, p in enumerate(probs)))
            attended.append(w[f"{at}.attn.out_proj.weight"] @ torch.cat(mixed) + w[f"{at}.attn.out_proj.bias"])
        states = [norm(x + a, w, f"{at}.norm1") for x, a in zip(states, attended, strict=True)]
        outputs = []
        for x in states:
            if layer % 2 == 0:
                inner = gelu(w[f"{at}.mlp.fc1.weight"] @ x + w[f"{at}.mlp.fc1.bias"])
                outputs.append(w[f"{at}.mlp.fc2.weight"] @ inner + w[f"{at}.mlp.fc2.bias"])
                continue
            probs = (w[f"{at}.mlp.router.layer.weight"] @ x).softmax(0)
            total = w[f"{at}.mlp.experts.bias"].clone()
            for expert in probs.topk(CONFIG["moe_top_k"]).indices.tolist():
                rows = slice(expert * F, (expert + 1) * F)
                inner = gelu(w[f"{at}.mlp.experts.mlp.w1"][rows] @ x)
                total += probs[expert] * (inner @ w[f"{at}.mlp.experts.mlp.w2"][rows])
            outputs.append(total)
        states = [norm(x + o, w, f"{at}.norm2") for x, o in zip(states, outputs, strict=True)]
    return torch.stack(states)


TEXTS = [[0, 5, 17, 33, 90, 8, 2], [0, 60, 2], [0, 5, 5, 5, 44, 71, 12, 9, 30, 21, 2]]


def batch():
    width = max(map(len, TEXTS))
    ids = torch.tensor([text + [1] * (width - len(text)) for text in TEXTS])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in TEXTS])
    return ids, mask


def test_an_imported_checkpoint_equals_the_plain_loop(tmp_path):
    """The best-known MoE embedder, without its remote code; one transposed matrix would leave cosine near 1."""
    model = import_nomic_moe(saved(tmp_path / "nomic"))
    ids, mask = batch()
    with torch.inference_mode():
        states = model(ids, attention_mask=mask).last_hidden_state
    for row, text in enumerate(TEXTS):
        assert (states[row, : len(text)] - plain_nomic(checkpoint(), text)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "damage",
    ["router", "expert order", "w2 transposed", "output bias", "renormalised", "rotation"],
)
def test_the_comparison_notices(damage, tmp_path, monkeypatch):
    """A check that cannot fail is none: each mistake here was made by someone."""
    model = import_nomic_moe(saved(tmp_path / "nomic"))
    with torch.no_grad():
        for layer in (1, 3):
            mlp = model.layers[layer].mlp
            if damage == "router":
                mlp.router.expert_gate.weight.copy_(mlp.router.expert_gate.weight.roll(1, 0))
            if damage == "expert order":
                mlp.experts.up_proj.copy_(mlp.experts.up_proj.roll(1, 0))
            if damage == "w2 transposed":
                E, D, F = mlp.experts.down_proj.shape
                mlp.experts.down_proj.copy_(mlp.experts.down_proj.transpose(1, 2).reshape(E, D, F))
            if damage == "output bias":
                mlp.output_bias.mul_(2)
    if damage == "renormalised":
        model.config.combine_rule = "normalized"
    if damage == "rotation":
        monkeypatch.setattr("hagmoe_hf.modeling_hagmoe.rotate", lambda states, rotation: states)
    with torch.inference_mode():
        states = model(torch.tensor([TEXTS[2]])).last_hidden_state[0]
    assert (states - plain_nomic(checkpoint(), TEXTS[2])).abs().max() > 1e-3


def test_an_imported_model_is_an_ordinary_one(tmp_path):
    """It must save, load and train like any other."""
    model = import_nomic_moe(saved(tmp_path / "nomic"))
    model.save_pretrained(tmp_path / "again")
    again, info = AutoModel.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"]
    ids, mask = batch()
    with torch.inference_mode():
        assert torch.equal(again(ids, mask).last_hidden_state, model(ids, mask).last_hidden_state)
    model.train()(ids, mask).last_hidden_state.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_missing_and_left_over_keys_are_named_and_refused_unless_asked_for(tmp_path):
    """Plain AutoModel drops every expert of this checkpoint with a log line; that must not happen twice."""
    weights = checkpoint()
    del weights["encoder.layers.3.mlp.experts.mlp.w2"]
    weights["encoder.layers.3.mlp.experts.mlp.v1"] = torch.ones(3)
    folder = saved(tmp_path / "nomic", weights)
    message = r"lacks the weights \['layers\.3\.mlp\.experts\.down_proj'.* leaves over \['encoder\.layers\.3\..*\.v1'\]"
    with pytest.raises(ValueError, match=message):
        import_nomic_moe(folder)
    with pytest.warns(UserWarning, match=message):
        import_nomic_moe(folder, allow_key_mismatch=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [("prenorm", True), ("moe_normalize_expert_weights", True), ("rotary_emb_fraction", 0.5), ("num_shared_experts", 1)],
)
def test_a_setting_that_would_change_the_outputs_is_refused(field, value, tmp_path):
    with pytest.raises(ValueError, match=f"{field}={value} in the checkpoint's config cannot be imported"):
        import_nomic_moe(saved(tmp_path / "nomic", **{field: value}))


def test_another_kind_of_checkpoint_is_refused(tmp_path):
    folder = saved(tmp_path / "nomic")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="nomic is a 'bert', whose config lacks 'n_layer'; allowed: a checkpoint of nomic-"):
        import_nomic_moe(folder)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    """Only safetensors: a pickle can run anything."""
    folder = saved(tmp_path / "nomic")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        import_nomic_moe(folder)
