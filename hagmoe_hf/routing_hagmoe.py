"""Which experts see a token. Pure tensor arithmetic: no parameters, no config, no I/O.

This file travels to the Hub beside the weights, so it imports nothing but torch.

Axes:  B sequences   L tokens   D hidden_size   G groups   R experts per group   E = G*R experts   K = experts per token
       S sequences of a packed batch, which lie one after the other in the rows of (B, L)
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """The choice made for every token; all that the experts need to know about the router."""

    router_logits: Tensor  # (B*L, E) float32, log-probabilities before top-k: their exp sums to 1 over E
    expert_index: Tensor  # (B*L, K) int64 in [0, E), most probable first; E at padding, meaning "no expert"
    expert_weight: Tensor  # (B*L, K) in the model's dtype; 0 at padding
    log_partition: Tensor | None  # (B*L, gates) float32, logsumexp of each gate's raw logits; None without gradients


class Packing(NamedTuple):
    """Which sequence each token of a packed batch belongs to."""

    sequence_index: Tensor  # (B, L) int64 in [0, size), rising over the rows; no sequence spans two rows
    size: int  # the number of sequences S, or more while tracing, where it must not depend on the data
    is_exact: bool  # whether `size` is S

    @classmethod
    def from_lengths(cls, cu_seq_lens: Tensor, length: int) -> "Packing":
        """From the (S + 1,) boundaries 0, ..., L of the sequences in one row; nothing waits for the GPU."""
        token = torch.arange(length, device=cu_seq_lens.device)
        # `right=True` gives a boundary to the sequence that it opens
        index = torch.bucketize(token, cu_seq_lens[1:-1].to(token.dtype), right=True)
        return cls(index.unsqueeze(0), cu_seq_lens.shape[0] - 1, True)

    @classmethod
    def from_row_index(cls, row_index: Tensor, is_tracing: bool) -> "Packing":
        """From (B, L) integers that change in a row where a sequence begins; outside of tracing this waits for the GPU."""
        # Shifted so that no entry equals the one put before the first column
        changes = (row_index - row_index.amin()).diff(dim=-1, prepend=torch.full_like(row_index[:, :1], -1)) != 0
        index = changes.flatten().cumsum(0) - 1
        size = index.numel() if is_tracing else int(index[-1]) + 1
        return cls(index.view_as(row_index), size, not is_tracing)

    def starts(self) -> Tensor:
        """(size,) int64: where each sequence begins in the flattened batch."""
        token = torch.arange(self.sequence_index.numel(), device=self.sequence_index.device)
        none = torch.full((self.size,), self.sequence_index.numel() - 1, device=token.device)
        return none.scatter_reduce(0, self.sequence_index.flatten(), token, "amin")

    def positions(self) -> Tensor:
        """(B, L) int64: how many tokens of its own sequence precede each token."""
        token = torch.arange(self.sequence_index.numel(), device=self.sequence_index.device)
        return token.view_as(self.sequence_index) - self.starts()[self.sequence_index]


class EqualLengths(NamedTuple):
    """The texts of a packed row in groups of equal length, which need neither padding nor mask in attention."""

    order: Tensor  # (T,) int64: the row's tokens, those of the shortest texts first
    shapes: tuple[tuple[int, int], ...]  # (texts, tokens of each) of every group

    @classmethod
    def from_lengths(cls, lengths: Tensor) -> "EqualLengths":
        """From (B,) int64, how many tokens each text has in the row; on a GPU this waits for it."""
        ordered_B, text_B = lengths.sort(stable=True)
        shift_B = (lengths.cumsum(0) - lengths)[text_B] - (ordered_B.cumsum(0) - ordered_B)
        order = torch.arange(int(lengths.sum()), device=lengths.device) + shift_B.repeat_interleave(ordered_B)
        found = zip(*(tensor.tolist() for tensor in ordered_B.unique_consecutive(return_counts=True)), strict=True)
        return cls(order, tuple((texts, length) for length, texts in found if length))


class RealTokens(NamedTuple):
    """Where the real tokens of a padded batch are: everything runs on them alone, as one packed row."""

    slot: Tensor  # (T,) int64 in [0, B*L), rising
    shape: torch.Size  # (B, L)
    equal: EqualLengths | None  # what attention runs on; on the padded batch where None, as a trace must

    @classmethod
    def from_mask(cls, token_mask: Tensor, is_tracing: bool) -> "RealTokens":
        """From (B, L) bool, True at real tokens; on a GPU this waits for it."""
        slot = token_mask.flatten().nonzero().squeeze(-1)
        return cls(slot, token_mask.shape, None if is_tracing else EqualLengths.from_lengths(token_mask.sum(dim=-1)))

    @property
    def attention_shapes(self) -> tuple[tuple[int, int], ...]:
        """(texts, tokens) of each part that `split` gives."""
        return ((self.shape[0], self.shape[1]),) if self.equal is None else self.equal.shapes

    def unpad(self, padded: Tensor) -> Tensor:
        """(B, L, ...) -> (1, T, ...)."""
        return padded.flatten(0, 1).index_select(0, self.slot).unsqueeze(0)

    def pad(self, packed: Tensor) -> Tensor:
        """(1, T, ...) -> (B, L, ...), zero at padding."""
        rows = self.shape[0] * self.shape[1]  # not `numel`, which a trace would take for a constant
        padded = packed.new_zeros(rows, *packed.shape[2:]).index_copy(0, self.slot, packed[0])
        return padded.unflatten(0, self.shape)

    def split(self, packed: Tensor) -> list[Tensor]:
        """(1, T, ...) -> what attention runs on: (texts, tokens, ...) for each of `attention_shapes`."""
        if self.equal is None:
            return [self.pad(packed)]
        parts = packed[0].index_select(0, self.equal.order).split([texts * length for texts, length in self.equal.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.equal.shapes, strict=True)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """What `split` gave -> (1, T, ...)."""
        if self.equal is None:
            return self.unpad(parts[0])
        ordered = torch.cat([part.flatten(0, 1) for part in parts])
        return torch.empty_like(ordered).index_copy(0, self.equal.order, ordered).unsqueeze(0)

    def packing(self) -> Packing:
        """Each row of the batch as one text of the packed row."""
        return Packing((self.slot // self.shape[1]).unsqueeze(0), self.shape[0], True)


def follows_in_text(
    tokens: Tensor, token_mask: Tensor | None, packing: Packing | None, real_tokens: RealTokens | None
) -> Tensor:
    """(B, L) bool for (B, L) tokens: which of them directly follow another real token of the same text."""
    if real_tokens is not None:  # without padding, what lay apart may lie side by side
        slot, row = real_tokens.slot, real_tokens.slot // real_tokens.shape[1]
        pairs = ((row[1:] == row[:-1]) & (slot[1:] == slot[:-1] + 1)).unsqueeze(0)
    elif packing is not None:
        pairs = packing.sequence_index[:, 1:] == packing.sequence_index[:, :-1]
    elif token_mask is not None:
        pairs = token_mask[:, 1:] & token_mask[:, :-1]
    else:
        pairs = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    return torch.nn.functional.pad(pairs.expand(tokens.shape[0], -1), (1, 0))


def attention_pool(hidden_states: Tensor, query: Tensor, token_mask: Tensor | None) -> Tensor:
    """Summarise each sequence by learned-query attention over its own real tokens.

    `s = sum_t softmax_t(q . x_t / sqrt(D)) x_t`. A sequence without any real token gets the plain mean of its padding:
    finite, and never used, since nothing of that sequence is routed.

    Args:
        hidden_states: (B, L, D) float32.
        query: (D,) float32.
        token_mask: (B, L) bool, True at real tokens; None when all are.

    Returns:
        (B, D) float32.
    """
    scores_BL = hidden_states @ query * hidden_states.shape[-1] ** -0.5
    if token_mask is not None:
        scores_BL = scores_BL.masked_fill(~token_mask, torch.finfo(scores_BL.dtype).min)
    return (scores_BL.softmax(dim=-1).unsqueeze(1) @ hidden_states).squeeze(1)


def attention_pool_packed(hidden_states: Tensor, query: Tensor, packing: Packing) -> Tensor:
    """`attention_pool` for sequences that lie one after the other: each token gets its own sequence's summary.

    Args:
        hidden_states: (B, L, D) float32, all tokens real.
        query: (D,) float32.
        packing: Which sequence each token belongs to.

    Returns:
        (B, L, D) float32.
    """
    states_TD = hidden_states.flatten(0, 1)
    sequence_T = packing.sequence_index.flatten()
    scores_T = states_TD @ query * states_TD.shape[-1] ** -0.5
    highest_S = scores_T.new_full((packing.size,), float("-inf")).scatter_reduce(0, sequence_T, scores_T.detach(), "amax")
    weight_T = (scores_T - highest_S[sequence_T]).exp()
    total_S = weight_T.new_zeros(packing.size).index_add(0, sequence_T, weight_T)
    weight_T = weight_T / total_S[sequence_T]
    summary_SD = states_TD.new_zeros(packing.size, states_TD.shape[-1])
    summary_SD = summary_SD.index_add(0, sequence_T, weight_T.unsqueeze(-1) * states_TD)
    return summary_SD[sequence_T].view_as(hidden_states)


def route(
    group_logits: Tensor | None,
    expert_logits: Tensor | None,
    token_mask: Tensor | None,
    *,
    group_bias: Tensor | None = None,
    expert_bias: Tensor | None = None,
    topk_group: int,
    top_k: int,
    combine_rule: str,
    dtype: torch.dtype,
) -> Routing:
    """Choose and weigh experts for every token from the two gates' logits.

    `log P(expert) = log P(group) + log P(expert | group)`. Only the `topk_group` most probable groups stay open, and each
    token takes the `top_k` most probable experts in them (group-limited routing, arXiv 2405.04434). Equal probabilities
    go to the lowest id. Biases shift these choices, and neither weights nor gradients (arXiv 2408.15664). The choice of one
    sequence never depends on another's.

    Args:
        group_logits: (B, L, G), or (B, 1, G) when a sequence chooses for all its tokens (in packed input each token carries
            its sequence's); None for one group.
        expert_logits: (B, L, E); None when every group holds one expert, and `group_logits` is then (B, L, G).
        token_mask: (B, L) bool, True at real tokens; None when all are.
        group_bias: (G,) float32, added to log P(group) for choosing only; None for none.
        expert_bias: (E,) float32, added to log P(expert) for choosing only; None for none.
        topk_group: Groups that stay open.
        top_k: Experts per token (K).
        combine_rule: "selection", "softmax" or "normalized", see `HagMoeConfig`.
        dtype: The dtype of the weights that are returned.

    Returns:
        The routing, flattened over sequences and tokens. Logits are float32; both logits given must be, too.
    """
    log_probs_BLE, group_log_probs = _joint_log_probs(group_logits, expert_logits)
    scores_BLE = log_probs_BLE if expert_bias is None else log_probs_BLE + expert_bias
    if group_log_probs is not None:
        group_scores = group_log_probs if group_bias is None else group_log_probs + group_bias
        if expert_logits is None:  # a group is an expert, and at least as many stay open as are taken
            scores_BLE = group_scores
        else:
            if group_bias is not None and topk_group > 1:  # inside a single open group it would shift all alike
                scores_BLE = (scores_BLE.unflatten(-1, (group_bias.shape[0], -1)) + group_bias.unsqueeze(-1)).flatten(-2)
            if topk_group < group_log_probs.shape[-1]:
                scores_BLE = _close_groups(scores_BLE, group_scores, topk_group)
    expert_index_BLK = _top_k_lowest_id_first(scores_BLE, top_k)
    weight_BLK = _combine(log_probs_BLE, expert_index_BLK, combine_rule)

    log_partition = None
    if torch.is_grad_enabled():
        log_partition = _log_partition(group_logits, expert_logits).flatten(0, 1)
    if token_mask is not None:
        num_experts = log_probs_BLE.shape[-1]
        expert_index_BLK = expert_index_BLK.masked_fill(~token_mask.unsqueeze(-1), num_experts)
        weight_BLK = weight_BLK.masked_fill(~token_mask.unsqueeze(-1), 0.0)
    return Routing(
        router_logits=log_probs_BLE.flatten(0, 1),
        expert_index=expert_index_BLK.flatten(0, 1),
        expert_weight=weight_BLK.flatten(0, 1).to(dtype),
        log_partition=log_partition,
    )


def _joint_log_probs(group_logits: Tensor | None, expert_logits: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(B, L, E) log P(expert), and (B, 1 or L, G) log P(group) where there are groups."""
    group_log_probs = None if group_logits is None else group_logits.log_softmax(dim=-1)
    if expert_logits is None:  # one expert per group: P(expert | group) is 1
        if group_log_probs is None:
            raise ValueError("group_logits=None and expert_logits=None leave nothing to route by; allowed: one None.")
        return group_log_probs, group_log_probs
    if group_log_probs is None:
        return expert_logits.log_softmax(dim=-1), None
    expert_logits_BLGR = expert_logits.unflatten(-1, (group_log_probs.shape[-1], -1))
    return (group_log_probs.unsqueeze(-1) + expert_logits_BLGR.log_softmax(dim=-1)).flatten(-2), group_log_probs


def _log_partition(group_logits: Tensor | None, expert_logits: Tensor | None) -> Tensor:
    """(B, L, gates): what separates each gate's raw logits from log-probabilities."""
    parts = []
    if group_logits is not None:
        parts.append(group_logits.logsumexp(dim=-1, keepdim=True))
    if expert_logits is not None:
        num_groups = 1 if group_logits is None else group_logits.shape[-1]
        parts.append(expert_logits.unflatten(-1, (num_groups, -1)).logsumexp(dim=-1))
        parts[0] = parts[0].expand(*expert_logits.shape[:2], -1)
    return torch.cat(parts, dim=-1)


def _close_groups(scores_BLE: Tensor, group_scores: Tensor, topk_group: int) -> Tensor:
    """(B, L, E) scores with minus infinity for every expert outside the open groups."""
    open_groups = _top_k_lowest_id_first(group_scores, topk_group)  # (B, 1 or L, topk_group)
    scores_BLGR = scores_BLE.unflatten(-1, (group_scores.shape[-1], -1))
    group = torch.arange(group_scores.shape[-1], device=group_scores.device)
    is_closed = (group.unsqueeze(-1) != open_groups.unsqueeze(-2)).all(-1, keepdim=True)  # (B, 1 or L, G, 1)
    return scores_BLGR.masked_fill(is_closed, float("-inf")).flatten(-2)


def _top_k_lowest_id_first(scores: Tensor, k: int) -> Tensor:
    """Indices (..., k) of the k largest of (..., n); of equal ones the lowest index, which `topk` does not promise."""
    chosen = [scores.argmax(dim=-1, keepdim=True)]
    while len(chosen) < k:
        scores = scores.scatter(-1, chosen[-1], float("-inf"))
        chosen.append(scores.argmax(dim=-1, keepdim=True))
    return chosen[0] if k == 1 else torch.cat(chosen, dim=-1)


def _combine(log_probs_BLE: Tensor, expert_index_BLK: Tensor, combine_rule: str) -> Tensor:
    """Weights (B, L, K) of the chosen experts; every rule keeps the gradient of their probabilities."""
    if combine_rule == "selection" and not torch.is_grad_enabled():
        return log_probs_BLE.new_full(expert_index_BLK.shape, 1.0 / expert_index_BLK.shape[-1])
    log_prob_BLK = log_probs_BLE.gather(-1, expert_index_BLK)
    if combine_rule == "normalized":
        return log_prob_BLK.softmax(dim=-1)
    prob_BLK = log_prob_BLK.exp()
    if combine_rule == "softmax":
        return prob_BLK
    # "selection": p - p is exactly 0, so the forward weight is exactly 1/K; the gradient is that of p
    return (prob_BLK - prob_BLK.detach()) + 1.0 / log_prob_BLK.shape[-1]


def load_balancing_loss(router_logits: Tensor, load: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Load balance term of one sparse layer, E * sum_e load_e * P_e, which is 1 when all is even.

    Linear in the tokens while `load` and `num_tokens` are fixed, so the terms of parts of a batch add up to the whole's.

    Args:
        router_logits: (tokens, E) float32 log-probabilities of real tokens.
        load: (E,) float32 share of the choices that each expert took; carries no gradient.
        num_tokens: Divisor of the probabilities' sum: P_e is their mean where it is the number of tokens.

    Returns:
        A scalar, float32.

    Source: Switch Transformer, arXiv 2101.03961, equation 4; over the global batch: arXiv 2501.11873.
    """
    return load.shape[-1] * (load.detach() * router_logits.exp().sum(dim=0)).sum() / num_tokens


def router_z_loss(log_partition: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Mean squared log-partition of a router's gates, which keeps raw logits small.

    Args:
        log_partition: (tokens, gates) float32, `Routing.log_partition` of real tokens.
        num_tokens: Divisor of the sum.

    Returns:
        A scalar, float32.

    Source: ST-MoE, arXiv 2202.08906, equation 5, over every gate of the router.
    """
    return log_partition.square().sum() / num_tokens


__all__ = [
    "EqualLengths",
    "Packing",
    "RealTokens",
    "Routing",
    "attention_pool",
    "attention_pool_packed",
    "follows_in_text",
    "load_balancing_loss",
    "route",
    "router_z_loss",
]
