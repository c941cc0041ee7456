"""From the user's texts to a memory of their n-grams in a mixture."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .configuration_hagmoe import HagMoeConfig
from .modeling_hagmoe import HagMoeModel, HagMoeNgramMemory, HagMoePreTrainedModel
from .ngrams_hagmoe import frequent_ngrams

READ_AT_ONCE = 10_000  # texts, so that a bar can move
LEAST_COUNT = 3  # of an n-gram in the user's texts; a row that is met less often learns nothing


def token_ids(tokenizer: Any, longest: int | None, texts: list[str], task: str) -> tuple[Tensor, Tensor]:
    """Texts -> ids (T,) int64, one text after the other, and (texts,) int64 how many each has.

    Args:
        tokenizer: Of the model.
        longest: Tokens of a text that the model reads; None for the tokenizer's own limit.
        texts: To read.
        task: What the progress bar says.
    """
    ids: list[Tensor] = []
    lengths: list[int] = []
    for first in tqdm(range(0, len(texts), READ_AT_ONCE), desc=task, leave=False):
        encoded = tokenizer(texts[first : first + READ_AT_ONCE], truncation=True, max_length=longest)["input_ids"]
        lengths += map(len, encoded)
        ids.append(torch.tensor([token for text in encoded for token in text], dtype=torch.int64))
    return torch.cat([*ids, torch.empty(0, dtype=torch.int64)]), torch.tensor(lengths, dtype=torch.int64)


def count_ngrams(
    tokenizer: Any, longest: int, texts: list[str], preserved: list[str] | None, most: int
) -> tuple[Tensor, Tensor]:
    """Names and counts of the most frequent n-grams of texts, as `give_memory` wants them.

    Args:
        tokenizer: Of the model.
        longest: Tokens of a text that the model reads.
        texts: That the n-grams are taken from.
        preserved: Texts none of whose n-grams are to be among them; None for none.
        most: Most n-grams.

    Raises:
        ValueError: There is no such n-gram.
    """
    others = None if preserved is None else token_ids(tokenizer, longest, preserved, "Counting n-grams")
    own = token_ids(tokenizer, longest, texts, "Counting n-grams")
    order = HagMoeConfig.ngram_memory_order
    names, counts = frequent_ngrams(*own, tokenizer.all_special_ids, most, order, LEAST_COUNT, others)
    if not len(names):
        raise ValueError(
            f"ngram_texts holds {len(texts)} texts, in which no token occurs {LEAST_COUNT} times, and none that is an "
            f"n-gram itself (at most {order} tokens); allowed: the texts that will be trained on, or None for no memory."
            if preserved is None
            else f"ngram_texts holds {len(texts)} texts without an n-gram that occurs {LEAST_COUNT} times, or as a whole "
            f"text, and never in the {len(preserved)} preserved_texts; allowed: other texts, or None for no memory."
        )
    return names, counts


def give_memory(mixture: HagMoePreTrainedModel, names: Tensor, counts: Tensor) -> None:
    """Give a mixture a memory whose rows are 0, so that its outputs stay what they are.

    Args:
        mixture: A HAG-MoE without a memory, or with one that is to begin anew.
        names: (N,) int64, the n-grams that it knows.
        counts: (N,) int64, how often they occurred; `frequent_ngrams` gives both.
    """
    encoder = cast(HagMoeModel, mixture.base_model)
    mixture.config.ngram_memory_size = len(names)
    memory = HagMoeNgramMemory(mixture.config)
    torch.nn.init.zeros_(memory.rows)
    memory.names.copy_(names)
    memory.counts.copy_(counts)
    encoder.ngram_memory = memory.to(device=mixture.device, dtype=mixture.dtype)
    if report := getattr(mixture, "upcycling_report", None):
        rows = ("ngram_memory.rows", memory.rows.numel())
        total = mixture.num_parameters()
        known = int((counts > 0).sum())
        mixture.upcycling_report = replace(report, new=(*report.new, rows), total_parameters=total, ngrams=known)
