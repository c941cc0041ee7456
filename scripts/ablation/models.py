"""An arm becomes a model: a SentenceTransformer of stock modules, at step 0 with its parent's vectors."""

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import BertModel

from ablation.arms import Arm
from ablation.inputs import texts_by_language, training_ngrams, training_translations
from ablation.routers import fix_routing, start_subjects
from hagmoe_hf import sentence, upcycle
from hagmoe_hf.ngram_memory import give_memory
from hagmoe_hf.translations import fit_rows
from hagmoe_hf.upcycling import freeze_preserved

FEW_TEXTS = 64  # start gates that are going to be replaced
NOISE = 0.5  # of a widening neuron, against the spread of the parent's weights


def build(arm: Arm, parent: Path, calibration_pairs: list[tuple[str, str]], seed: int, device: str) -> SentenceTransformer:
    """The model of an arm before its first step; dense where the arm starts dense.

    Args:
        arm: What to build.
        parent: Folder of the dense SentenceTransformer, inside the one that `prepare` made.
        calibration_pairs: For arms whose gates start from texts; none where other weights take their place.
        seed: Of new weights.
        device: Like "cpu" or "cuda".
    """
    dense = sentence.load(str(parent), device=device)
    if arm.kind == "wide":
        return _with_encoder(dense, widened(sentence.encoder_of(dense), default_total(dense), seed))
    if arm.kind == "dense" or arm.dense_share:
        prepared(dense)
        sentence.encoder_of(dense).embeddings.word_embeddings.requires_grad_(arm.embedding_rate > 0)
        return dense
    has_groups = arm.upcycling.get("sparse_layers") != [] and arm.upcycling.get("n_group") != 1
    if arm.preserved and has_groups:
        own, others = texts_by_language(parent.parent, arm.preserved, arm.words, arm.translations_tell)
        kept = slice(None, None, 1 if arm.every_text else 3) if calibration_pairs else slice(FEW_TEXTS)
        own, others = own[kept], others[kept]
        model = upcycle(dense, seed=seed, calibration_texts=others, preserved_texts=own, **arm.upcycling)
    else:
        model = mixture(arm, dense, calibration_pairs, seed)
    if arm.memory:
        encoder = sentence.encoder_of(model)
        encoder.config.ngram_memory_scale = arm.memory_scale
        known = {"words": arm.words, "translated": arm.translations_tell}
        give_memory(encoder, *training_ngrams(parent.parent, arm.memory, arm.memory_order, arm.preserved, **known))
        if arm.fitted and calibration_pairs:
            special_ids = dense.tokenizer.all_special_ids
            print(fit_rows(encoder, *training_translations(parent.parent, arm.words), special_ids), flush=True)
    if arm.preserved and not arm.all_learn:
        sentence.encoder_of(model).config.preserve_first_group = True  # also where no layer has groups
        freeze_preserved(model)
    elif arm.preserved:
        _let_all_learn(model, arm.still_experts)
    return model


def _let_all_learn(model: SentenceTransformer, still_experts: bool) -> None:
    """Undo what preserves texts, but for where the gates and the memory start, and on request for their experts."""
    encoder = sentence.encoder_of(model)
    encoder.config.preserve_first_group = still_experts
    prepared(model.requires_grad_(True))


def mixture(
    arm: Arm, dense: SentenceTransformer, calibration_pairs: list[tuple[str, str]], seed: int
) -> SentenceTransformer:
    """The mixture of an arm, upcycled from a dense model."""
    texts: list | None = None
    if arm.calibrated:
        texts = calibration_pairs if arm.paired else [text for pair in calibration_pairs for text in pair]
    model = upcycle(dense, seed=seed, calibration_texts=texts, **arm.upcycling)
    encoder = sentence.encoder_of(model)
    if arm.routing != "learned":
        fix_routing(encoder, arm.routing)
    if arm.routing == "subject" and arm.paired:
        start_subjects(model, calibration_pairs, seed)
    if arm.mean_pooled:
        for layer in encoder.config.sparse_layers:
            query = encoder.layers[layer].mlp.router.attention_query
            query.data.zero_()
            query.requires_grad_(False)
    return prepared(model)


def prepared(model: SentenceTransformer) -> SentenceTransformer:
    """The embedding tables hold still in every arm: half of the parameters, which few steps would hardly move."""
    for parameter in sentence.encoder_of(model).embeddings.parameters():
        parameter.requires_grad_(False)
    return model


def default_total(dense: SentenceTransformer) -> int:
    """Parameters of the default mixture."""
    return upcycle(dense).upcycling_report.total_parameters


def widened(encoder: BertModel, total: int, seed: int) -> BertModel:
    """A BERT with wider feed-forward blocks, about `total` parameters, and the same outputs.

    New neurons read what a random old one reads, plus noise (so that no two stay twins), and write nothing at first.

    Source: Net2Net, arXiv 1511.05641, with outputs that start at 0 instead of being divided.
    """
    config = encoder.config
    per_neuron = config.num_hidden_layers * (2 * config.hidden_size + 1)
    more = round((total - encoder.num_parameters()) / per_neuron / 8) * 8
    old_width, width = config.intermediate_size, config.intermediate_size + more
    wide = BertModel(
        type(config)(**{**config.to_dict(), "intermediate_size": width}), add_pooling_layer=encoder.pooler is not None
    )
    wide.config._attn_implementation = config._attn_implementation
    generator = torch.Generator().manual_seed(seed)
    weights = dict(encoder.state_dict())
    for layer in range(config.num_hidden_layers):
        block = f"encoder.layer.{layer}"
        reads, bias = weights[f"{block}.intermediate.dense.weight"], weights[f"{block}.intermediate.dense.bias"]
        chosen = torch.randint(old_width, (more,), generator=generator).to(reads.device)
        noise = torch.randn(more, reads.shape[1], generator=generator).to(reads) * NOISE * reads.std()
        weights[f"{block}.intermediate.dense.weight"] = torch.cat([reads, reads[chosen] + noise])
        weights[f"{block}.intermediate.dense.bias"] = torch.cat([bias, bias[chosen]])
        writes = weights[f"{block}.output.dense.weight"]
        weights[f"{block}.output.dense.weight"] = torch.cat([writes, writes.new_zeros(writes.shape[0], more)], dim=1)
    wide.load_state_dict(weights)
    return wide.to(encoder.device, encoder.dtype)


def _with_encoder(dense: SentenceTransformer, encoder: BertModel) -> SentenceTransformer:
    return prepared(sentence.with_encoder(dense, encoder, ""))


def parameter_groups(model: nn.Module, arm: Arm) -> list[dict]:
    """Trained parameters by kind (shared weights, experts, routers, embeddings, memory), with the arm's `factor`.

    What has the factor 0 needs no gradient any more.
    """
    places = {".experts.": "experts", ".router.": "router", ".ngram_memory.": "memory", ".word_embeddings.": "embeddings"}
    groups: dict[str, list[Tensor]] = {"shared": [], **{kind: [] for kind in places.values()}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = next((kind for place, kind in places.items() if place in name), "shared")
            groups[kind].append(parameter)
    factors = {
        "shared": arm.shared_rate,
        "experts": arm.expert_rate,
        "router": arm.router_rate,
        "embeddings": arm.embedding_rate,
        "memory": arm.memory_rate,
    }
    for kind, params in groups.items():
        for parameter in params if not factors[kind] else ():
            parameter.requires_grad_(False)
    return [
        {"params": params, "kind": kind, "factor": factors[kind]}
        for kind, params in groups.items()
        if params and factors[kind]
    ]
