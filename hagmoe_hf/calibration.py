"""Start the gates of a mixture from the user's texts, so that groups are domains or languages from step 0.

Fresh gates are random directions, and the states of all texts share a large common one: most texts would open the same
group. Here the keys of the gates are clusters of what the gates see: pooled texts for groups, tokens for experts of a group.
An upcycled mixture computes the same for every routing, so nothing of its outputs changes.

A gate has no bias, and states are clustered around their mean `m`. The mean is taken off inside the gate's weights: `u` is
the linear functional that is 1 at `m` and varies least over the texts, so `k . (x - m)` is nearly `(k - (k . m) u) . x`.

A query and its answer should open the same group, but what sets pooled states apart most is their form: a name or a
sentence, short or long. Texts that are given with others that belong to them are clustered by what those share.

Axes:  N texts or tokens   P items, of texts that belong together   D hidden_size   G groups   R experts per group
       E = G*R experts   C clusters
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .modeling_hagmoe import HagMoeModel, HagMoePreTrainedModel, HagMoeRouter
from .routing_hagmoe import Packing, attention_pool_packed
from .texts import text_items

MOST_TEXTS = 4096  # more make no better start
MOST_TOKENS = 65536  # of each layer, for the experts
BATCH_SIZE = 32
# Mean probability of the chosen group or expert. At the uniform value all texts would change sides together with the first
# small change; near 1 the gates would get no gradient.
CONFIDENCE = 0.75
# How far a gate's highest logit may lie above their mean, where inputs differ so little that this confidence is out of reach
LARGEST_GAP = 20.0
# States that lie so near each other, against their own size, differ by rounding
LEAST_SPREAD = 1e-4

RIDGE = 1e-3  # part of the inputs' mean variance
# Share of the preserved texts that open the first group, with whatever texts the gates are as unsure of; of the other
# texts that may take so many
KEPT, TAKEN = 0.99, 0.25
PRESERVED = -1  # in place of the number of an item

Tokenize = Callable[[list[str]], dict[str, Tensor]]


@dataclass(frozen=True)
class LayerStart:
    """How even a calibrated layer is on the texts that it was calibrated with, by tokens.

    Attributes:
        layer: The sparse layer.
        largest_group: Load of the most loaded group over the mean group's; 1 is even.
        largest_expert: The same of experts.
    """

    layer: int
    largest_group: float
    largest_expert: float


@dataclass(frozen=True)
class Calibration:
    """What the gates were started from.

    Attributes:
        texts: Texts that were looked at.
        layers: One entry for each sparse layer.
        preserved: Share of the preserved texts that open the first group in every layer, each judged by gates that were
            fitted without it; None where there are none.
        others: Share of the other texts that open another group in every layer, likewise.
    """

    texts: int
    layers: tuple[LayerStart, ...]
    preserved: float | None = None
    others: float | None = None

    def __str__(self) -> str:
        shares = ", ".join(f"{start.largest_group:.2f}x in layer {start.layer}" for start in self.layers)
        found = f"gates started from {self.texts} texts; largest group against the mean one: {shares}"
        if self.preserved is None:
            return found
        stay = f"{self.preserved:.1%} of the preserved texts open the first group in every layer"
        return f"{found}; {stay}, {self.others:.1%} of the others in none"


@torch.no_grad()
def calibrate(
    mixture: HagMoePreTrainedModel,
    tokenize: Tokenize,
    texts: Sequence[str | Sequence[str]],
    seed: int,
    preserved: Sequence[str] = (),
    argument: str = "calibration_texts",
) -> Calibration:
    """Set gates and balancing biases of every router from texts; all other weights stay.

    Args:
        mixture: A mixture whose experts are still equal, so that its states do not depend on its routing.
        tokenize: Texts to `input_ids` and `attention_mask`, truncated.
        texts: Items, each a text or several that belong together; at least `num_experts` different texts that are not
            empty. Of more than `MOST_TEXTS` texts those of randomly drawn items are taken.
        seed: Seed of that sample and of the clustering.
        preserved: Texts for which the first group is, where the mixture preserves it; the other groups part `texts`, but for
            those that are among these.
        argument: What messages call `texts`.

    Raises:
        ValueError: `texts` is a single text, or holds something else than texts, or too few different ones.
    """
    items = _checked_items(argument, texts, mixture.config.num_experts, frozenset(preserved))
    generator = torch.Generator().manual_seed(seed)
    if sum(map(len, items)) > MOST_TEXTS:
        items = [items[place] for place in torch.randperm(len(items), generator=generator).tolist()]
    kept = [(text, place) for place, item in enumerate(items) for text in item][:MOST_TEXTS]
    drawn = torch.randperm(len(preserved), generator=generator)[:MOST_TEXTS].tolist()
    kept += [(preserved[place], PRESERVED) for place in drawn]
    kept.sort(key=lambda text_and_item: len(text_and_item[0]))  # so little of a batch is padding
    item_N = torch.tensor([place for _, place in kept])
    inputs = _router_inputs(mixture, tokenize, [text for text, _ in kept], generator)
    started = [
        _start_router(layer, router, seen, item_N, generator)
        for layer, (router, seen) in zip(mixture.config.sparse_layers, inputs.items(), strict=True)
    ]
    starts = tuple(start for start, _ in started)
    if not preserved:
        return Calibration(len(kept), starts)
    is_preserved_N, opens_first_LN = item_N == PRESERVED, torch.stack([opened_N for _, opened_N in started])
    stay = opens_first_LN.all(0)[is_preserved_N].float().mean()
    leave = 1 - opens_first_LN.any(0)[~is_preserved_N].float().mean()
    return Calibration(len(kept), starts, float(stay), float(leave))


def _checked_items(
    argument: str, texts: Sequence[str | Sequence[str]], num_experts: int, left_out: frozenset[str]
) -> list[list[str]]:
    """The texts of every item that are not empty, of the items that have any."""
    items = text_items(argument, texts)
    kept = [[text for text in item if text.strip() and text not in left_out] for item in items]
    usable = len({text.strip() for item in kept for text in item})
    if usable < num_experts:
        raise ValueError(
            f"{argument} holds {usable} different texts that are not empty{' nor preserved' * bool(left_out)}; allowed: at "
            f"least num_experts={num_experts}, better some hundreds from every domain and language."
        )
    return [item for item in kept if item]


@dataclass(frozen=True)
class _Seen:
    """What one router saw, by batch: pooled texts (n, D), their lengths (n,), sampled tokens (t, D), their texts (t,)."""

    pooled: list[Tensor]
    lengths: list[Tensor]
    tokens: list[Tensor]
    owners: list[Tensor]


def _router_inputs(
    mixture: HagMoePreTrainedModel, tokenize: Tokenize, texts: list[str], generator: torch.Generator
) -> dict[HagMoeRouter, _Seen]:
    batches = [tokenize(texts[first : first + BATCH_SIZE]) for first in range(0, len(texts), BATCH_SIZE)]
    share = MOST_TOKENS / sum(int(batch["attention_mask"].sum()) for batch in batches)
    encoder = cast(HagMoeModel, mixture.base_model)
    words_alone = mixture.config.group_input == "word_embeddings" and mixture.config.experts_per_group == 1
    seen = {
        cast(HagMoeRouter, cast(Any, encoder.layers[layer]).mlp.router): _Seen([], [], [], [])
        for layer in mixture.config.sparse_layers
    }

    def look(router: HagMoeRouter, inputs: tuple) -> None:
        states, mask, packing, mine = inputs[0].float(), inputs[1], inputs[2], seen[router]
        group_states = states if inputs[3] is None else inputs[3].float()
        if packing is None:
            mask = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask.cpu()
            owner_T = torch.nonzero(mask)[:, 0]
        else:  # the encoder has left the padding out already
            mask, owner_T = torch.ones(states.shape[:2], dtype=torch.bool), packing.sequence_index.flatten().cpu()
        states_TD, group_states_TD = states.cpu()[mask], group_states.cpu()[mask]
        query = torch.zeros(states.shape[-1]) if router.attention_query is None else router.attention_query.float().cpu()
        texts_of_batch = Packing(owner_T.unsqueeze(0), int(owner_T[-1]) + 1, True)
        pooled_TD = attention_pool_packed(group_states_TD.unsqueeze(0), query, texts_of_batch)[0]
        is_sampled_T = torch.rand(len(owner_T), generator=generator) < share
        mine.owners.append(owner_T[is_sampled_T] + sum(map(len, mine.pooled)))
        mine.tokens.append(states_TD[is_sampled_T])
        mine.pooled.append(pooled_TD[texts_of_batch.starts()])
        mine.lengths.append(torch.bincount(owner_T).float())

    hooks = [router.register_forward_pre_hook(look) for router in seen]
    was_training = mixture.training
    mixture.eval()
    try:
        for batch in tqdm(batches, desc="Calibrating", leave=False):
            inputs = {name: batch[name].to(mixture.device) for name in ("input_ids", "attention_mask")}
            if words_alone:  # what the layers would make of them is seen by nobody
                words = encoder.embeddings.word_embeddings(inputs["input_ids"])
                for router in seen:
                    look(router, (words, inputs["attention_mask"] != 0, None, words))
            else:
                encoder(**inputs)
    finally:
        mixture.train(was_training)
        for hook in hooks:
            hook.remove()
    return seen


def _start_router(
    layer: int, router: HagMoeRouter, seen: _Seen, item_N: Tensor, generator: torch.Generator
) -> tuple[LayerStart, Tensor]:
    """Set the gates and biases of one layer's router; also (N,) which texts open a first group that is preserved."""
    pooled_ND, lengths_N = torch.cat(seen.pooled), torch.cat(seen.lengths)
    tokens_ND, owners_N = torch.cat(seen.tokens), torch.cat(seen.owners)
    config = router.config
    groups, per_group = config.n_group, config.experts_per_group
    is_preserved_N = item_N == PRESERVED
    opens_first_N = torch.zeros_like(is_preserved_N)
    token_group_N = torch.zeros(len(tokens_ND), dtype=torch.long)
    if router.group_gate is not None:
        by_text = config.group_routing == "sequence"
        inputs_ND, weights_N = (pooled_ND, lengths_N) if by_text else (tokens_ND, torch.ones(len(tokens_ND)))
        if is_preserved_N.any():  # only where groups are opened by text
            others = ~is_preserved_N
            keys_GD, bias_G = _gate(inputs_ND[others], weights_N[others], groups - 1, generator, item_N[others])
            first_D, left_out_N = _parting_key(inputs_ND, is_preserved_N)
            ahead_N = left_out_N - (inputs_ND @ keys_GD.T + bias_G).amax(-1)
            kept, taken = ahead_N[is_preserved_N].quantile(1 - KEPT), ahead_N[~is_preserved_N].quantile(1 - TAKEN)
            first_bias = (-torch.maximum(kept, taken)).clamp(min=0)
            opens_first_N = ahead_N + first_bias >= 0
            keys_GD = torch.cat([first_D.unsqueeze(0), keys_GD])
            bias_G = torch.cat([first_bias.unsqueeze(0), bias_G])
        else:
            keys_GD, bias_G = _gate(inputs_ND, weights_N, groups, generator, item_N if by_text else None)
        router.group_gate.weight.copy_(keys_GD)
        cast(Tensor, router.group_bias).copy_(bias_G)
        chosen_N = _choose(inputs_ND, keys_GD, bias_G)
        token_group_N = chosen_N[owners_N] if by_text else chosen_N
    expert_N = token_group_N
    if router.expert_gate is not None:
        gates = []
        for group in range(groups):
            mine_ND = tokens_ND[token_group_N == group]
            gates.append(_gate(mine_ND, torch.ones(len(mine_ND)), per_group, generator))
        keys_ED, bias_E = (torch.cat(parts) for parts in zip(*gates, strict=True))
        router.expert_gate.weight.copy_(keys_ED)
        cast(Tensor, router.expert_bias).copy_(bias_E)
        expert_N = torch.empty_like(token_group_N)
        for group, (keys_RD, bias_R) in enumerate(gates):
            mine_N = token_group_N == group
            expert_N[mine_N] = group * per_group + _choose(tokens_ND[mine_N], keys_RD, bias_R)
    load_E = torch.bincount(expert_N, minlength=config.num_experts).float()
    if is_preserved_N.any():  # how even the others are
        load_E = load_E[per_group:]
    load_G = load_E.unflatten(0, (-1, per_group)).sum(-1)
    return LayerStart(layer, float(load_G.max() / load_G.mean()), float(load_E.max() / load_E.mean())), opens_first_N


def _parting_key(inputs_ND: Tensor, is_preserved_N: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (D,) of a logit that is far over 0 for preserved texts and far under 0 for others.

    By least squares on +1 and -1, both kinds counting the same. Without an intercept: states have a large common part.

    Returns:
        The weights, and (N,) each text's logit by weights that were fitted without it.
    """
    target_N = is_preserved_N.float() * 2 - 1
    share = is_preserved_N.float().mean()
    weight_N = torch.where(is_preserved_N, 0.5 / share, 0.5 / (1 - share)) / len(inputs_ND)
    weighted_ND = inputs_ND * weight_N.unsqueeze(-1)
    inverse_DD = torch.linalg.inv(_steadied(inputs_ND.T @ weighted_ND, RIDGE))
    key_D = inverse_DD @ (weighted_ND.T @ target_N)
    logit_N = inputs_ND @ key_D
    leverage_N = ((weighted_ND @ inverse_DD) * inputs_ND).sum(-1)
    left_out_N = target_N - (target_N - logit_N) / (1 - leverage_N).clamp(min=1e-6)  # in closed form, as for every ridge
    scale = LARGEST_GAP / logit_N.abs().mean().clamp(min=1e-6)
    return key_D * scale, left_out_N * scale


def _gate(
    inputs_ND: Tensor, weights_N: Tensor, clusters: int, generator: torch.Generator, item_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weights (C, D) of a gate whose choices are even clusters of its inputs, and biases (C,) for what is left uneven.

    Inputs of one item are clustered by what they share.
    """
    mean_D = inputs_ND.mean(0) if len(inputs_ND) else inputs_ND.new_zeros(inputs_ND.shape[-1])
    centred_ND = inputs_ND - mean_D
    shared_DD = None if item_N is None else shared_part(centred_ND, item_N)
    points_ND = centred_ND if shared_DD is None else centred_ND @ shared_DD
    # One length for all, so that neither long nor far-off texts decide; the gate itself compares directions alone
    size = points_ND.norm(dim=-1).mean()
    # A group that no sampled token entered, or only equal ones: any distinct directions will do
    if len(inputs_ND) < clusters or size < LEAST_SPREAD * inputs_ND.norm(dim=-1).mean():
        return torch.randn(clusters, inputs_ND.shape[-1], generator=generator) * 0.02, torch.zeros(clusters)
    keys_CD, offset_C = even_k_means(points_ND / size, weights_N, clusters, generator)
    keys_CD = keys_CD / size if shared_DD is None else keys_CD @ shared_DD.T / size
    keys_CD = keys_CD + (offset_C - keys_CD @ mean_D).unsqueeze(-1) * _constant_functional(centred_ND, mean_D)
    logits_NC = inputs_ND @ keys_CD.T
    scale = _scale_for(logits_NC, CONFIDENCE)
    return keys_CD * scale, balancing_bias((logits_NC * scale).log_softmax(-1), weights_N)


def shared_part(centred_ND: Tensor, item_N: Tensor) -> Tensor | None:
    """The linear map that makes of an input what it is expected to share with the others of its item.

    With x = s + e, where s is the same for all inputs of an item and e is each one's own, E[s | x] = x @ cov(x)^-1 cov(s),
    and cov(s) is the covariance of two inputs of one item. Directions in which an item's inputs tend to be opposites (the
    short text has the long partner) have a negative one, and are nobody's share.

    Args:
        centred_ND: (N, D) inputs, of mean 0.
        item_N: (N,) int64, the item of each.

    Returns:
        (D, D), to multiply inputs with from the right; None where no item has two inputs, or nothing is shared.

    Source: the two-covariance model of probabilistic linear discriminant analysis, Ioffe 2006.
    """
    _, place_N, count_P = item_N.unique(return_inverse=True, return_counts=True)
    couples = int((count_P * (count_P - 1)).sum())
    if not couples:
        return None
    sum_PD = centred_ND.new_zeros(len(count_P), centred_ND.shape[-1]).index_add(0, place_N, centred_ND)
    own_DD = centred_ND.T @ centred_ND
    values_D, vectors_DD = torch.linalg.eigh((sum_PD.T @ sum_PD - own_DD) / couples)
    if values_D[-1] <= 0:
        return None
    return torch.linalg.solve(_steadied(own_DD / len(centred_ND)), vectors_DD * values_D.clamp(min=0) @ vectors_DD.T)


def _choose(inputs_ND: Tensor, keys_CD: Tensor, bias_C: Tensor) -> Tensor:
    """(N,) the cluster that a gate with these weights and biases chooses."""
    return ((inputs_ND @ keys_CD.T).log_softmax(-1) + bias_C).argmax(-1)


def even_k_means(
    points_ND: Tensor, weights_N: Tensor, clusters: int, generator: torch.Generator, steps: int = 30
) -> tuple[Tensor, Tensor]:
    """Spherical k-means with clusters of about the same weight: points go by `key . x + offset`, offsets even the load.

    Args:
        points_ND: (N, D) float32, centred.
        weights_N: (N,) how much each point counts.
        clusters: C, at most N.
        generator: Draws the first centres, apart from each other (k-means++).
        steps: Most steps of Lloyd's algorithm.

    Returns:
        Keys (C, D) of length 1 and offsets (C,).

    Source: spherical k-means, Dhillon and Modha 2001; k-means++, Arthur and Vassilvitskii 2007.
    """
    directions_ND = torch.nn.functional.normalize(points_ND, dim=-1)
    centres = [directions_ND[int(torch.randint(len(directions_ND), (1,), generator=generator))]]
    for _ in range(clusters - 1):
        distance_N = (1 - directions_ND @ torch.stack(centres).T).amin(-1).clamp(min=1e-9)
        centres.append(directions_ND[int(torch.multinomial(distance_N, 1, generator=generator))])
    keys_CD, before_N = torch.stack(centres), None
    offset_C = torch.zeros(clusters)
    for _ in range(steps):
        offset_C = balancing_bias(points_ND @ keys_CD.T, weights_N, steps=40)
        nearest_N = (points_ND @ keys_CD.T + offset_C).argmax(-1)
        if before_N is not None and torch.equal(nearest_N, before_N):
            break
        sums_CD = torch.zeros_like(keys_CD).index_add(0, nearest_N, directions_ND)
        is_empty_C1 = sums_CD.norm(dim=-1, keepdim=True) < 1e-6
        keys_CD = torch.nn.functional.normalize(torch.where(is_empty_C1, keys_CD, sums_CD), dim=-1)
        before_N = nearest_N
    return keys_CD, balancing_bias(points_ND @ keys_CD.T, weights_N)


def _constant_functional(centred_ND: Tensor, mean_D: Tensor) -> Tensor:
    """u (D,) with u . mean = 1 and the least variance over the points, kept steady by a little of the identity."""
    direction_D = torch.linalg.solve(_steadied(centred_ND.T @ centred_ND / len(centred_ND)), mean_D)
    return direction_D / (direction_D @ mean_D).clamp(min=1e-12)


def _steadied(covariance_DD: Tensor, part: float = 1e-2) -> Tensor:
    """A covariance with a little of the identity, so that it can be inverted however few the inputs."""
    return covariance_DD + (part * covariance_DD.diagonal().mean() + 1e-12) * torch.eye(len(covariance_DD))


def _scale_for(logits_NC: Tensor, confidence: float) -> float:
    """The factor on the logits at which the most probable choice has that mean probability, or their gap is the largest."""
    low, high = 0.0, 1.0
    most = LARGEST_GAP / max(float((logits_NC.amax(-1) - logits_NC.mean(-1)).mean()), 1e-6)
    while high < most and (logits_NC * high).softmax(-1).amax(-1).mean() < confidence:
        low, high = high, 2 * high
    for _ in range(20):
        middle = (low + high) / 2
        if (logits_NC * middle).softmax(-1).amax(-1).mean() < confidence:
            low = middle
        else:
            high = middle
    return min(high, most)


def balancing_bias(scores_NC: Tensor, weights_N: Tensor, steps: int = 200) -> Tensor:
    """Biases (C,) with which every column is the highest for about the same weight: price adjustment in shrinking steps.

    Args:
        scores_NC: (N, C) scores.
        weights_N: (N,) how much each row counts.
        steps: Adjustments.

    Source: the direction is that of the balancing biases while training, arXiv 2408.15664.
    """
    best_C, least = scores_NC.new_zeros(scores_NC.shape[-1]), float("inf")
    bias_C, even, unit = best_C, weights_N.sum() / scores_NC.shape[-1], scores_NC.std(dim=0).mean()
    for step in range(steps):
        load_C = torch.zeros_like(bias_C).index_add(0, (scores_NC + bias_C).argmax(-1), weights_N)
        if load_C.max() < least:
            best_C, least = bias_C, float(load_C.max())
        bias_C = bias_C + 0.5 * unit / (1 + step / 5) * (1 - load_C / even).clamp(min=-1)
    return best_C - best_C.mean()
