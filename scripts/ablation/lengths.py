"""Does what a mixture loses depend on how long texts are? Trained on short ones, scored on a set of the kit cut to lengths.

Also with the experts merged into their mean: what that loses or gains is the experts', what is left is the shared weights'.
"""

import tempfile
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

from ablation.parting import merged_experts
from hagmoe_hf import sentence, upcycle
from hagmoe_hf.evaluation.kit import KitSet

BATCH_SIZE = 64


@torch.no_grad()
def scores_by_length(
    mixture: SentenceTransformer, dense: SentenceTransformer, kit_set: KitSet, lengths: list[int]
) -> dict[str, dict[str, float]]:
    """Main scores of a set, its texts cut.

    Args:
        mixture: Trained.
        dense: The parent, trained on the same pairs in the same order.
        kit_set: The set.
        lengths: Most tokens of a text, each in turn.

    Returns:
        Length -> `as trained`, `experts merged`, `dense`: 0 to 100.
    """
    as_mixture = upcycle(dense)  # the same vectors, and on a CPU much sooner: a mixture computes no padding
    found = {}
    for length in lengths:
        scores = {"as trained": score_cut(mixture, kit_set, length), "dense": score_cut(as_mixture, kit_set, length)}
        with merged_experts(sentence.encoder_of(mixture)):
            scores["experts merged"] = score_cut(mixture, kit_set, length)
        found[str(length)] = scores
    return found


def score_cut(model: SentenceTransformer, kit_set: KitSet, length: int) -> float:
    """The main score of a set whose texts are cut to so many tokens, 0 to 100."""
    from hagmoe_hf.evaluation.models import candidate
    from hagmoe_hf.evaluation.runner import score_models
    from hagmoe_hf.evaluation.tasks import local_task

    task = local_task(kit_set)
    before, model.max_seq_length = model.max_seq_length, length
    try:
        with tempfile.TemporaryDirectory() as folder:
            scores = score_models([candidate(model.eval(), "cut")], [task], Path(folder), batch_size=BATCH_SIZE)
    finally:
        model.max_seq_length = before
    return 100 * scores[0][task.metadata.name].score
