"""Run texts through a model and record where their tokens went."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class DomainLoad:
    """How many tokens of each domain every expert took.

    Attributes:
        domains: Names, in the order of `counts`' second axis.
        layers: Layer index of each sparse layer, in the order of `counts`' first axis.
        num_groups: Expert groups; experts `g * E / num_groups` and following belong to group `g`.
        counts: (sparse layers, domains, E) int64, choices of real tokens.
    """

    domains: tuple[str, ...]
    layers: tuple[int, ...]
    num_groups: int
    counts: np.ndarray

    @property
    def share(self) -> np.ndarray:
        """(sparse layers, domains, E) float64: each expert's share of a domain's choices; rows sum to 1."""
        return self.counts / self.counts.sum(axis=-1, keepdims=True)


@torch.inference_mode()
def domain_load(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    domains: Sequence[str],
    *,
    batch_size: int = 32,
    show_progress_bar: bool = False,
) -> DomainLoad:
    """Count, per sparse layer and domain, the tokens that went to each expert.

    Args:
        model: A `HagMoeModel`, in eval mode.
        tokenizer: Its tokenizer; texts are truncated to its `model_max_length`.
        texts: The texts.
        domains: The domain of each text.
        batch_size: Texts per forward pass; it changes the speed and nothing else.
        show_progress_bar: Whether to show one.

    Raises:
        ValueError: No texts, a different number of domains, or a model without sparse layers.
    """
    if not texts or len(texts) != len(domains):
        raise ValueError(
            f"{len(texts)} texts and {len(domains)} domains given; allowed: one domain for each of 1 or more texts."
        )
    config = model.config
    if not getattr(config, "sparse_layers", None):
        raise ValueError(
            f"{type(model).__name__} has no sparse layers, so there is no routing to look at; allowed: a HAG-MoE."
        )
    names = tuple(sorted(set(domains)))
    row_of = {name: row for row, name in enumerate(names)}
    counts = np.zeros((len(config.sparse_layers), len(names), config.num_experts), dtype=np.int64)
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of like length share a batch: less padding
    for start in tqdm(range(0, len(texts), batch_size), desc="Routing", disable=not show_progress_bar):
        chosen = by_length[start : start + batch_size]
        batch = tokenizer([texts[i] for i in chosen], padding=True, truncation=True, return_tensors="pt").to(model.device)
        output = model(**batch, output_expert_index=True)
        domain_rows = np.array([row_of[domains[i]] for i in chosen])
        for layer_counts, expert_index in zip(counts, output.expert_index, strict=True):
            index_BX = expert_index.view(len(chosen), -1).cpu().numpy()  # every choice of every token of a text
            rows_BX = np.broadcast_to(domain_rows[:, None], index_BX.shape)
            real = index_BX < config.num_experts
            np.add.at(layer_counts, (rows_BX[real], index_BX[real]), 1)
    return DomainLoad(names, tuple(config.sparse_layers), config.n_group, counts)
