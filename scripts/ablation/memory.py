"""What a trained memory is worth: held-out pairs and sets of the kit with the memory turned down, or off."""

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from sentence_transformers import SentenceTransformer

from ablation.inputs import Pairs
from ablation.lengths import score_cut
from ablation.scoring import dev_scores
from hagmoe_hf import sentence
from hagmoe_hf.evaluation.kit import KitSet


@contextmanager
def turned_down(model: SentenceTransformer, part: float):
    """Inside, the memory adds this part of what it adds.

    Raises:
        ValueError: The model has no memory.
    """
    config = sentence.encoder_of(model).config
    if not getattr(config, "ngram_memory_size", 0):
        raise ValueError("The run has no memory; allowed: arms with `memory`.")
    before = config.ngram_memory_scale
    config.ngram_memory_scale = before * part
    try:
        yield
    finally:
        config.ngram_memory_scale = before


@torch.no_grad()
def scores_by_memory(
    model: SentenceTransformer, dev: Pairs, kit_set: KitSet, parts: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Scores with the memory turned down.

    Args:
        model: Trained, with a memory.
        dev: Held-out pairs.
        kit_set: A set of the kit.
        parts: Of the memory, each in turn: 0 is off, 1 is as trained.

    Returns:
        Part -> `held_out_mrr`, `domains` (the same by domain) and `score` (of the set), 0 to 100.
    """
    found = {}
    for part in parts:
        with turned_down(model.eval(), part):
            ranks = {domain: 100 * mrr for domain, mrr in dev_scores(model, dev)[0].items()}
            score = score_cut(model, kit_set, model.max_seq_length)
        found[f"{part:g}"] = {"held_out_mrr": sum(ranks.values()) / len(ranks), "domains": ranks, "score": score}
    return found
