"""What training leaves as it was: how far the vectors of held-out texts moved from the parent's, by domain."""

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from ablation.inputs import Pairs, languages_of_columns
from ablation.loop import Contrastive

BATCH_SIZE = 64
ROUNDING = 1e-5  # two implementations of one model differ by less


@torch.no_grad()
def staying(
    model: SentenceTransformer, parent: SentenceTransformer, dev: Pairs, language: str
) -> dict[str, dict[str, float]]:
    """How much of a language stayed where it was.

    Args:
        model: Trained.
        parent: What it was made of.
        dev: Held-out pairs.
        language: Code of the texts to look at.

    Returns:
        Domain -> `unchanged`, the share of texts of which no number of the vector moved by more than `ROUNDING`; `cosine`,
        the mean one between vectors then and now; and `texts`, how many.
    """
    found = {}
    for domain, name in enumerate(dev.domains):
        rows = np.arange(*dev.first_rows[domain : domain + 2])
        moved, cosines = [], []
        for column, languages in enumerate(languages_of_columns(dev)):
            mine = rows[languages[rows] == language]
            for first in range(0, len(mine), BATCH_SIZE):
                features = dev.features(mine[first : first + BATCH_SIZE])[column]
                now, then = (Contrastive.vectors(one.eval(), features) for one in (model, parent))
                moved.append((now - then).abs().amax(-1))
                cosines.append((now * then).sum(-1))
        if moved:
            unchanged = (torch.cat(moved) <= ROUNDING).float()
            found[name] = {
                "unchanged": float(unchanged.mean()),
                "cosine": float(torch.cat(cosines).mean()),
                "texts": len(unchanged),
            }
    return found
