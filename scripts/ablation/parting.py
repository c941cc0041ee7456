"""What parted experts do to pairs: a trained mixture against the dense parent trained alike, pair by pair.

A pair's two texts may open different groups, whose experts have parted while training. Does that lose what the experts
gain? Three answers from the same held-out pairs: ranks by how many layers send both texts to the same group; ranks with
one group opened for every text; and ranks with the experts merged into their mean, which leaves a dense model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from ablation.inputs import Pairs
from ablation.scoring import BATCH_SIZE
from hagmoe_hf import HagMoeModel, sentence
from hagmoe_hf.modeling_hagmoe import HagMoeExperts, HagMoeRouter

CERTAIN = 1e4  # nats: a bias that no logit outweighs


@torch.inference_mode()
def parting(mixture: SentenceTransformer, dense: SentenceTransformer, start: HagMoeModel, dev: Pairs) -> dict:
    """Compare on held-out pairs.

    Args:
        mixture: Trained; routed by text, one open group.
        dense: The parent, trained on the same pairs in the same order.
        start: The mixture's encoder before training.
        dev: Held-out pairs.

    Returns:
        `macro_mrr`: for each variant the mean over domains of the mean reciprocal rank, 0 to 100; `difference`: of the
        mixture to the dense parent, with its standard error over pairs; `by_agreement`: the same for the pairs whose texts
        so many sparse layers send to one group, a plain mean over pairs; `expert_distance`: by sparse layer, how far the
        experts parted (root mean square distance of their weights from their mean) over how far they went together (of
        the mean from where all began).
    """
    mixture.eval()
    dense.eval()
    encoder = sentence.encoder_of(mixture)
    ranks, groups = reciprocal_ranks(mixture, dev)
    dense_ranks, _ = reciprocal_ranks(dense, dev)
    variants = {"dense": dense_ranks, "as trained": ranks}
    for group in range(encoder.config.n_group):
        with one_group(encoder, group):
            variants[f"all texts in group {group}"] = reciprocal_ranks(mixture, dev)[0]
    with merged_experts(encoder):
        variants["experts merged"] = reciprocal_ranks(mixture, dev)[0]
    agreeing = (groups[0] == groups[1]).sum(-1)
    gain = 100 * (ranks - dense_ranks)
    by_agreement = {int(count): mean_with_error([gain[agreeing == count]]) for count in np.unique(agreeing)}
    macro = {name: mean_with_error(by_domain(100 * values, dev))["mean"] for name, values in variants.items()}
    distances = [
        expert_distance(*(e.layers[layer].mlp.experts for e in (encoder, start))) for layer in encoder.config.sparse_layers
    ]
    return {
        "macro_mrr": macro,
        "difference": mean_with_error(by_domain(gain, dev)),
        "by_agreement": by_agreement,
        "expert_distance": distances,
    }


def expert_distance(trained: HagMoeExperts, start: HagMoeExperts) -> float:
    """How far the experts parted, over how far they went together."""
    apart = together = 0.0
    for name, stack in trained.named_parameters():
        mean = stack.mean(0)
        apart += float((stack - mean).square().mean(0).sum())
        together += float((mean - start.get_parameter(name)[0]).square().sum())
    return (apart / together) ** 0.5


def reciprocal_ranks(model: SentenceTransformer, dev: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """(pairs,) 1 / rank of every pair's positive in its domain, and (2, pairs, sparse layers) groups of both texts.

    The second has no layers where there are no routers.
    """
    vectors, groups = zip(*(_encode(model, dev, column) for column in range(2)), strict=True)
    ranks = []
    for first, end in zip(dev.first_rows, dev.first_rows[1:], strict=False):
        similarity = vectors[0][first:end] @ vectors[1][first:end].T
        ranks.append(1 / ((similarity > similarity.diagonal()[:, None]).sum(-1) + 1))
    return torch.cat(ranks).double().numpy(), np.stack(groups)


def _encode(model: SentenceTransformer, dev: Pairs, column: int) -> tuple[Tensor, np.ndarray]:
    """Unit vectors (pairs, D) and groups (pairs, sparse layers) of one column."""
    encoder = sentence.encoder_of(model)
    size = getattr(encoder.config, "experts_per_group", 1)
    seen: list[Tensor] = []
    routers = [module for module in encoder.modules() if isinstance(module, HagMoeRouter)]
    vectors, groups = [], []
    with _hooked(routers, lambda router, _, routing: seen.append(routing.expert_index.flatten())):
        rows = np.arange(dev.first_rows[-1])
        for first in range(0, len(rows), BATCH_SIZE):
            seen.clear()
            features = dev.features(rows[first : first + BATCH_SIZE])[column]
            mask = features["attention_mask"].bool()
            vectors.append(torch.nn.functional.normalize(model(features)["sentence_embedding"], dim=-1))
            chosen = [first_choices(index, mask) // size for index in seen]
            groups.append(torch.stack(chosen, dim=-1) if chosen else mask.new_empty(len(mask), 0))
    return torch.cat(vectors), torch.cat(groups).numpy()


def first_choices(index: Tensor, mask: Tensor) -> Tensor:
    """(B,) the expert of every text's first token, from all tokens or from real ones alone, as little padding is routed too.

    Args:
        index: (B * L,) or (real tokens,) experts.
        mask: (B, L) bool, True at real tokens, which come first in every row.
    """
    lengths = mask.sum(1)
    starts = lengths.cumsum(0) - lengths if len(index) == lengths.sum() else torch.arange(len(mask)) * mask.shape[1]
    return index[starts]


@contextmanager
def _hooked(modules: list, hook) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def one_group(encoder: HagMoeModel, group: int) -> Iterator[None]:
    """Every text opens this group, whatever its gate says."""
    biases = [encoder.layers[layer].mlp.router.group_bias for layer in encoder.config.sparse_layers]
    kept = [bias.clone() for bias in biases]
    for bias in biases:
        bias[group] = CERTAIN
    try:
        yield
    finally:
        for bias, values in zip(biases, kept, strict=True):
            bias.copy_(values)


@contextmanager
def merged_experts(encoder: HagMoeModel, part: float = 1.0) -> Iterator[None]:
    """Every routed expert lies so far on the way to the mean of its layer's: 0 as it is, 1 the mean itself."""
    stacks = [stack for layer in encoder.config.sparse_layers for stack in encoder.layers[layer].mlp.experts.parameters()]
    kept = [stack.clone() for stack in stacks]
    for stack in stacks:
        stack.lerp_(stack.mean(0, keepdim=True).expand_as(stack), part)
    try:
        yield
    finally:
        for stack, values in zip(stacks, kept, strict=True):
            stack.copy_(values)


@torch.inference_mode()
def ranks_by_merging(mixture: SentenceTransformer, dev: Pairs, parts: Sequence[float]) -> dict[str, float]:
    """Held-out macro MRR, 0 to 100, with the experts merged in part: part -> score."""
    found = {}
    for part in parts:
        with merged_experts(sentence.encoder_of(mixture.eval()), part):
            ranks = reciprocal_ranks(mixture, dev)[0]
        found[f"{part:g}"] = mean_with_error(by_domain(100 * ranks, dev))["mean"]
    return found


def by_domain(values: np.ndarray, dev: Pairs) -> list[np.ndarray]:
    """(pairs,) cut into domains."""
    return np.split(values, dev.first_rows[1:-1])


def mean_with_error(parts: list[np.ndarray]) -> dict[str, float | int | None]:
    """Mean over parts of their means, with its standard error; None for that where a part has a single value."""
    error = None
    if min(map(len, parts)) > 1:
        error = float(np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / len(parts))
    return {"pairs": sum(map(len, parts)), "mean": float(np.mean([part.mean() for part in parts])), "standard_error": error}
