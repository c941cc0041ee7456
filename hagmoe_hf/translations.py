"""From translations to the rows of a memory, by least squares instead of by training.

Axes:  T tokens of all texts of a chunk, one text after the other   P pairs   N rows of the memory   D width
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from . import sentence
from .modeling_hagmoe import HagMoeModel
from .ngram_memory import token_ids
from .texts import text_items

PENALTY = 0.1
STRENGTH = 0.5
CHUNK = 1024  # texts at a time
MOST_ITERATIONS = 50
SMALL_ENOUGH = 1e-3  # norm of the residual against its first one


TokenizedTexts = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TranslationFit:
    """What fitting came to.

    Attributes:
        pairs: Translations that were used: both texts hold words.
        rows: N-grams of the memory that occur in them.
        before: Mean squared distance between the mean embeddings of a text and of its translation, over D.
        after: The same with the memory.
    """

    pairs: int
    rows: int
    before: float
    after: float

    def __str__(self) -> str:
        return (
            f"Fitted {self.rows:,} n-grams to {self.pairs:,} translations: mean embeddings {self.before:.4g} apart, "
            f"squared, before, {self.after:.4g} after"
        )


def fit_translations(
    model: Any,
    pairs: Iterable[Sequence[str]],
    *,
    penalty: float = PENALTY,
    strength: float = STRENGTH,
    tokenizer: Any = None,
) -> TranslationFit:
    """Start a memory where translations start: their mean embedding becomes that of the texts that they translate.

    Ridge regression over all pairs at once, in a minute where training takes hours; training goes on from there. Vectors of
    texts that hold n-grams of the memory change; others do not.

    Args:
        model: A mixture with a memory (`upcycle(..., ngram_texts=...)`): a `SentenceTransformer` or another of its kind, or
            a HAG-MoE. Best with `preserved_texts`: then no n-gram of the texts that stay has a row.
        pairs: Texts that the model understands, each with a translation.
        penalty: What keeps rows of rare n-grams small, over 0: an n-gram that stands once in each of P translations of n
            words gets half of what these pairs alone would give it where P / n^2 is `penalty`.
        strength: How much of the way to the fitted rows, over 0 to 1. Half of it leaves a word of its own meaning where
            the texts to come are not like the pairs. An n-gram that is a whole translation, as a dictionary's words are,
            goes all of it.
        tokenizer: Of a HAG-MoE; other models have their own.

    Returns:
        What came of it. The rows are in the model, in place of those that were there.

    Raises:
        ValueError: A model without a memory, with one that is turned off, or without a tokenizer; no pair with words, what
            is no pair of texts, a penalty or strength out of its range.

    Source: ridge regression; what it is a start for, multilingual distillation, arXiv 2004.09813.
    """
    encoder: Any = (model if isinstance(model, PreTrainedModel) else sentence.encoder_of(model)).base_model
    if not isinstance(encoder, HagMoeModel):
        raise ValueError(f"model holds a {type(encoder).__name__}; allowed: {sentence.allowed_mixture(encoder)}.")
    if encoder.ngram_memory is None:
        raise ValueError(
            "ngram_memory_size=0 leaves no memory to fit; allowed: mixtures that were upcycled with ngram_texts."
        )
    if not encoder.config.ngram_memory_scale:
        raise ValueError("ngram_memory_scale=0 turns the memory off, whatever its rows; allowed: another number.")
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError(f"tokenizer=None with a {type(model).__name__}, which has none; allowed: its tokenizer.")
    if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not 0 < penalty < float("inf"):
        raise ValueError(f"penalty={penalty!r} is not possible; allowed: a number over 0.")
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise ValueError(f"strength={strength!r} is not possible; allowed: a number over 0, at most 1.")
    items = text_items("pairs", pairs)
    if not items:
        raise ValueError("pairs holds nothing; allowed: texts, each with a translation.")
    for place, item in enumerate(items):
        if len(item) != 2:
            raise ValueError(f"pairs[{place}] holds {len(item)} texts; allowed: a text and its translation.")
    texts, translations = ([item[column] for item in items] for column in (0, 1))
    longest = getattr(model, "max_seq_length", None) or encoder.config.max_text_length
    own, others = (token_ids(tokenizer, longest, column, "Reading translations") for column in (texts, translations))
    return fit_rows(encoder, own, others, tokenizer.all_special_ids, penalty, strength)


@torch.no_grad()
def fit_rows(
    encoder: HagMoeModel,
    texts: TokenizedTexts,
    translations: TokenizedTexts,
    special_ids: Sequence[int],
    penalty: float = PENALTY,
    strength: float = STRENGTH,
) -> TranslationFit:
    """`fit_translations` for texts that are token ids already.

    Args:
        encoder: A mixture with a memory.
        texts: Ids (T,) int64 of P texts, one after the other, and their lengths (P,) int64.
        translations: Likewise, in the same order.
        special_ids: Tokens that stand for no word.
        penalty: See there.
        strength: See there.

    Raises:
        ValueError: No pair has words on both sides; the memory is as it was then.
    """
    memory = encoder.ngram_memory
    assert memory is not None
    was_training = encoder.training
    encoder.eval()  # no dropout
    wanted_PD, wanted_words_P, *_ = _read(encoder, *texts, special_ids, "Reading texts")
    found_PD, words_P, pair_M, row_M, size_M = _read(encoder, *translations, special_ids, "Reading translations")
    encoder.train(was_training)
    strength_N1 = torch.full((len(memory.rows), 1), strength)
    strength_N1[row_M[size_M == words_P[pair_M]]] = 1.0
    is_used_P = (wanted_words_P > 0) & (words_P > 0)
    if not is_used_P.any():
        raise ValueError(
            f"pairs holds {len(words_P)} pairs, none with words on both sides; allowed: texts and translations."
        )
    away_PD = (wanted_PD - found_PD) * is_used_P.unsqueeze(-1)
    pair_M, row_M = pair_M[is_used_P[pair_M]], row_M[is_used_P[pair_M]]
    shares_PN = torch.sparse_coo_tensor(
        torch.stack([pair_M, row_M]), 1 / words_P[pair_M], (len(words_P), len(memory.rows)), check_invariants=False
    ).coalesce()
    rows_ND = strength_N1 * _ridge(shares_PN, away_PD, penalty)
    memory.rows.copy_(rows_ND / encoder.config.ngram_memory_scale)
    left_PD = away_PD - torch.sparse.mm(shares_PN, rows_ND)
    used = int(is_used_P.sum())
    before, after = (
        float(distance_PD.square().sum()) / max(1, used * rows_ND.shape[1]) for distance_PD in (away_PD, left_PD)
    )
    return TranslationFit(used, len(row_M.unique()), before, after)


def _read(
    encoder: HagMoeModel, ids_T: Tensor, length_P: Tensor, special_ids: Sequence[int], task: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Texts -> (P, D) means of words' embeddings, (P,) how many words; (M,) each n-gram's text, its row, and its tokens."""
    memory, device = encoder.ngram_memory, encoder.device
    assert memory is not None
    special = torch.tensor(list(special_ids), dtype=torch.int64)

    def embed(ids: Tensor, positions: Tensor) -> Tensor:
        embeddings = encoder.embeddings
        return embeddings(embeddings.word_embeddings(ids), torch.zeros_like(ids), positions)

    first_T = length_P.cumsum(0) - length_P
    parts: list[tuple[Tensor, ...]] = []
    for first in tqdm(range(0, len(length_P), CHUNK), desc=task, leave=False):
        length_C = length_P[first : first + CHUNK]
        ids_C = ids_T[first_T[first] : first_T[first] + length_C.sum()]
        text_C = torch.repeat_interleave(torch.arange(len(length_C)), length_C)
        position_C = torch.arange(len(ids_C)) - (length_C.cumsum(0) - length_C)[text_C]
        is_word_C = ~torch.isin(ids_C, special)
        states_CD = embed(ids_C.to(device)[None], position_C.to(device)[None])[0]
        words = torch.zeros(len(length_C)).index_add_(0, text_C, is_word_C.float())
        total = torch.zeros(len(length_C), states_CD.shape[1])
        total.index_add_(0, text_C, states_CD.float().cpu() * is_word_C.unsqueeze(-1))
        found = memory.rows_at(ids_C.to(device)[None], (position_C > 0).to(device)[None])[:, 0].cpu()
        place, at = found.nonzero(as_tuple=True)
        means = total / words.clamp(min=1).unsqueeze(-1)
        parts.append((means, words, text_C[at] + first, found[place, at], place + 1))
    means_PD, words_P, text_M, row_M, size_M = (torch.cat(part) for part in zip(*parts, strict=True))
    return means_PD, words_P, text_M, row_M, size_M


def _ridge(shares_PN: Tensor, target_PD: Tensor, penalty: float) -> Tensor:
    """(N, D) rows R that make |shares R - target|^2 + penalty |R|^2 least: conjugate gradients, for all of D at once."""
    squares_N = torch.zeros(shares_PN.shape[1]).index_add_(0, shares_PN.indices()[1], shares_PN.values().square())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # compressed rows: products twice as fast
        shares_NP, shares_PN = shares_PN.t().coalesce().to_sparse_csr(), shares_PN.to_sparse_csr()
    scale_N1 = 1 / (squares_N + penalty).unsqueeze(-1)  # Jacobi preconditioning: frequent n-grams beside rare ones
    residual_ND = shares_NP @ target_PD
    rows_ND = torch.zeros_like(residual_ND)
    first = residual_ND.norm()
    scaled_ND = residual_ND * scale_N1
    direction_ND = scaled_ND.clone()
    product_D = (residual_ND * scaled_ND).sum(0)
    tiny = torch.finfo(torch.float32).tiny
    for _ in tqdm(range(MOST_ITERATIONS), desc="Least squares", leave=False):
        if residual_ND.norm() <= SMALL_ENOUGH * first:
            break
        applied_ND = (shares_NP @ (shares_PN @ direction_ND)).add_(direction_ND, alpha=penalty)
        step_D = product_D / (direction_ND * applied_ND).sum(0).clamp(min=tiny)
        rows_ND += step_D * direction_ND
        residual_ND -= step_D * applied_ND
        torch.mul(residual_ND, scale_N1, out=scaled_ND)
        last_D, product_D = product_D, (residual_ND * scaled_ND).sum(0)
        direction_ND.mul_(product_D / last_D.clamp(min=tiny)).add_(scaled_ND)
    return rows_ND
