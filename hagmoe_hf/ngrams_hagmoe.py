"""Which n-grams a memory knows, and which of them end at a token. Pure tensor arithmetic: no parameters, no config, no I/O.

An n-gram is named by the row of its first n-1 tokens and by its last token: `row * BASE + id`, and a single token by its id
alone. Each n-gram's beginning is known wherever it is known itself, so looking up goes token by token, and nothing collides.
Names rise with n, and a row's number is its name's place among all names, from 1 on; row 0 stands for what is not known.

This file travels to the Hub beside the weights, so it imports nothing but torch.

Axes:  B sequences   L tokens   N n-grams known   T tokens of all texts, one text after the other
"""

import torch
from torch import Tensor

BASE = 2**24  # above every vocabulary, and far from overflow however many rows there are
NEVER = torch.iinfo(torch.int64).max  # the name of no n-gram


def ngram_rows(ids: Tensor, follows: Tensor, names: Tensor, order: int, is_traced: bool = False) -> list[Tensor]:
    """For every token the rows of the n-grams that end there.

    Args:
        ids: (B, L) int64.
        follows: (B, L) bool, whether a token directly follows another one of its own text in its row.
        names: (N,) int64, rising.
        order: Tokens of the longest n-gram.
        is_traced: Whether a graph is being made, which may not know binary search as one operation.

    Returns:
        `order` tensors (B, L) int64 in [0, N], for n = 1, 2, ...; 0 where the n-gram is not known.
    """
    search = _search_step_by_step if is_traced else torch.searchsorted
    rows = [_find(names, ids, search)]
    while len(rows) < order:
        before = torch.nn.functional.pad(rows[-1][:, :-1], (1, 0)) * follows
        # Row 0 would turn the n-gram into its last token's name
        rows.append(_find(names, before * BASE + ids, search) * (before > 0))
    return rows


def _find(names: Tensor, wanted: Tensor, search) -> Tensor:
    """Rows of names, 0 of unknown ones."""
    place = search(names, wanted.contiguous()).clamp(max=names.shape[0] - 1)
    return (place + 1) * (names[place] == wanted)


def _search_step_by_step(names: Tensor, wanted: Tensor) -> Tensor:
    """`torch.searchsorted` in operations that every graph format has."""
    below = torch.zeros_like(wanted)  # how many names are known to be smaller
    step = 1 << (int(names.shape[0]).bit_length() - 1)  # torch.jit.trace has tensors for sizes
    while step:
        candidate = below + step
        is_smaller = (candidate <= names.shape[0]) & (names[(candidate - 1).clamp(max=names.shape[0] - 1)] < wanted)
        below = torch.where(is_smaller, candidate, below)
        step //= 2
    return below


def frequent_ngrams(
    ids: Tensor,
    lengths: Tensor,
    left_out: list[int],
    most: int,
    order: int,
    least_count: int,
    preserved: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Names and counts of the most frequent n-grams of some texts.

    Args:
        ids: (T,) int64.
        lengths: (texts,) int64, their tokens.
        left_out: Ids that are part of no n-gram, such as special tokens'.
        most: Most n-grams that are counted.
        order: Tokens of the longest n-gram.
        least_count: How often an n-gram occurs at least, but for those that are whole texts, as a dictionary's words are.
        preserved: Ids and lengths of other texts; an n-gram that occurs in them is not counted.

    Returns:
        Names (N,) int64, rising, and counts (N,) int64. The most frequent come first, and of equally frequent ones the
        shorter; but rarer whole texts have up to half of the places. A count of 0 marks the beginning of an n-gram that is
        counted, named for its sake alone.
    """
    other_ids, other_lengths = preserved or (ids[:0], lengths[:0])
    is_own_T = torch.arange(len(ids) + len(other_ids)) < len(ids)
    ids, lengths = torch.cat([ids, other_ids]), torch.cat([lengths, other_lengths])
    follows_T = torch.ones_like(ids, dtype=torch.bool)
    follows_T[(lengths.cumsum(0) - lengths)[lengths > 0]] = False
    is_part_T = ~torch.isin(ids, torch.tensor(left_out, dtype=torch.int64))
    number_T, is_last_T = _whole_texts(is_part_T & is_own_T, lengths, order)
    # For each n: its candidates' provisional names (their beginning's place among those of n - 1), and their counts
    candidates, counts, wholes = [], [], []
    place_T = torch.zeros_like(ids)  # of the n-gram that ends at each token, -1 for none
    for n in range(1, order + 1):
        before_T = place_T if n == 1 else torch.where(follows_T, place_T.roll(1), -1)
        name_T = torch.where((before_T >= 0) & is_part_T, before_T * BASE + ids, -1)
        names, inverse_T = name_T.unique(return_inverse=True)
        count = torch.bincount(inverse_T[is_own_T], minlength=len(names))
        is_elsewhere = torch.bincount(inverse_T[~is_own_T], minlength=len(names)) > 0
        begins_whole = torch.bincount(inverse_T[number_T == n], minlength=len(names)) > 0
        is_whole = torch.bincount(inverse_T[(number_T == n) & is_last_T], minlength=len(names)) > 0
        kept = ((count >= least_count) | begins_whole) & (names >= 0)
        place_T = torch.where(kept, kept.cumsum(0) - 1, -1)[inverse_T]
        candidates.append(names[kept])
        counts.append((count * ~is_elsewhere * ((count >= least_count) | is_whole))[kept])
        wholes.append(is_whole[kept])
    sizes = [len(names) for names in candidates]
    all_counts = torch.cat(counts)
    is_counted = _with_a_row(all_counts, torch.cat(wholes), most)
    is_chosen = [mine.clone() for mine in is_counted.split(sizes)]
    for shorter, longer, names in reversed(list(zip(is_chosen, is_chosen[1:], candidates[1:], strict=False))):
        shorter[names[longer] // BASE] = True
    chosen: list[Tensor] = []
    row_before = torch.zeros(1, dtype=torch.int64)  # rows of the candidates of n - 1
    first_row = 1
    for names, is_mine in zip(candidates, is_chosen, strict=True):
        mine = names[is_mine]
        chosen.append(row_before[mine // BASE] * BASE + mine % BASE)
        row_before = torch.where(is_mine, is_mine.cumsum(0) - 1 + first_row, 0)
        first_row += len(mine)
    return torch.cat(chosen), (all_counts * is_counted)[torch.cat(is_chosen)]


def _with_a_row(counts: Tensor, is_whole: Tensor, most: int) -> Tensor:
    """(candidates,) bool: up to half of the places for whole texts, then for what is most frequent."""

    def best(of: Tensor, places: int) -> Tensor:
        found = torch.zeros_like(is_whole)
        found[of.sort(descending=True, stable=True).indices[:places]] = True
        return found & (of > 0)

    chosen = best(counts * is_whole, most // 2)
    return chosen | best(counts * ~chosen, most - int(chosen.sum()))


def _whole_texts(is_part_T: Tensor, lengths: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Of texts that are one n-gram: (T,) which of its tokens each token is, from 1 on, 0 elsewhere; (T,) its last."""
    text_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    parts = torch.bincount(text_T[is_part_T], minlength=len(lengths))
    before = parts.cumsum(0) - parts
    number_T = (is_part_T.cumsum(0) - before[text_T]) * is_part_T * (parts <= order)[text_T]
    return number_T, (number_T > 0) & (number_T == parts[text_T])


def spell_ngrams(names: Tensor) -> list[tuple[int, ...]]:
    """The token ids of each n-gram, in the order of their rows: what a memory holds, to be read.

    Args:
        names: (N,) int64, those that `frequent_ngrams` gives.
    """
    spelled: list[tuple[int, ...]] = []
    for name in names.tolist():
        before, last = divmod(name, BASE)
        spelled.append((*(spelled[before - 1] if before else ()), last))
    return spelled


__all__ = ["BASE", "NEVER", "frequent_ngrams", "ngram_rows", "spell_ngrams"]
