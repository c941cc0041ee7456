"""What recorded routing says, in numbers. NumPy only: nothing here sees a model.

Information is in bits. A "choice" is one of a token's K experts; a "label" is a domain, a language, a token id or a
position. A number that could be large by chance comes with the same number of shuffled labels (`Information`): whole texts
are shuffled, never single tokens, because the tokens of one text are not independent and a text's group is chosen once.

Axes:  N texts   T tokens   K experts per token   E experts   G groups   C labels   D width of a vector   P pairs
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Information:
    """How much a label says about a choice, and how much of that is chance.

    Attributes:
        bits: Mutual information as counted.
        baseline: Mean of the same with shuffled labels: what finite samples show where there is nothing.
        highest: Largest of the shuffled ones.
        shuffles: How many there were.
        choice_entropy: Bits of the choice alone, which `bits` cannot exceed.
        label_entropy: Bits of the label alone, which `bits` cannot exceed either.
    """

    bits: float
    baseline: float
    highest: float
    shuffles: int
    choice_entropy: float
    label_entropy: float

    @property
    def excess(self) -> float:
        """Bits above the shuffled mean, 0 where there are none."""
        return max(self.bits - self.baseline, 0.0)

    @property
    def is_above_chance(self) -> bool:
        """Whether no shuffle came near: a permutation test at 1 / (shuffles + 1), and more than rounding."""
        return self.shuffles > 0 and self.bits > self.highest + 1e-9

    @property
    def explained(self) -> float:
        """Share of what could be known at best, min(H(choice), H(label)), that is above chance, in [0, 1]."""
        most = min(self.choice_entropy, self.label_entropy)
        return min(self.excess / most, 1.0) if most > 1e-9 else 0.0


@dataclass(frozen=True)
class LabelLoad:
    """How many tokens of each label every expert took.

    Attributes:
        kind: What the labels are, like "domain".
        labels: Names, in the order of `counts`' second axis.
        layers: Layer index of each sparse layer, in the order of `counts`' first axis.
        num_groups: Expert groups; experts `g * E / num_groups` and following belong to group `g`.
        counts: (sparse layers, C, E) int64 choices.
    """

    kind: str
    labels: tuple[str, ...]
    layers: tuple[int, ...]
    num_groups: int
    counts: np.ndarray

    @property
    def share(self) -> np.ndarray:
        """(sparse layers, C, E) float64: each expert's share of a label's choices; rows sum to 1."""
        return share(self.counts)


# Counting


def counts_per_text(expert_index: np.ndarray, text_start: np.ndarray, num_experts: int) -> np.ndarray:
    """How often each text chose each expert.

    Args:
        expert_index: (T, K) integers in [0, E).
        text_start: (N + 1,) where each text's tokens begin, and T.
        num_experts: E.

    Returns:
        (N, E) int64.
    """
    num_texts = len(text_start) - 1
    text_T = np.repeat(np.arange(num_texts), np.diff(text_start))
    flat = text_T[:, None] * num_experts + expert_index
    return np.bincount(flat.ravel(), minlength=num_texts * num_experts).reshape(num_texts, num_experts)


def counts_per_label(counts_NE: np.ndarray, label_N: np.ndarray, num_labels: int) -> np.ndarray:
    """Sum (N, E) counts of texts over equal labels (N,) in [0, C): (C, E)."""
    summed = np.zeros((num_labels, counts_NE.shape[1]), dtype=counts_NE.dtype)
    np.add.at(summed, label_N, counts_NE)
    return summed


def group_counts(counts: np.ndarray, num_groups: int) -> np.ndarray:
    """(..., E) counts of experts -> (..., G) counts of their groups; a group's experts lie side by side."""
    return counts.reshape(*counts.shape[:-1], num_groups, -1).sum(axis=-1)


def share(counts: np.ndarray) -> np.ndarray:
    """(..., E) counts -> float64 shares that sum to 1 over E; uniform where nothing was counted."""
    totals = counts.sum(axis=-1, keepdims=True)
    return np.where(totals > 0, counts / np.maximum(totals, 1e-300), 1 / counts.shape[-1])


# Load


def entropy(shares: np.ndarray) -> np.ndarray:
    """Bits of (..., E) shares.

    Source: Shannon 1948, theorem 2; 0 log 0 = 0.
    """
    logs = np.log2(shares, where=shares > 0, out=np.zeros_like(shares, dtype=np.float64))
    return -(shares * logs).sum(axis=-1) + 0.0  # + 0.0: no negative zero


def load_entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy of (..., E) counts over its largest possible value, log2 E: 1 is even, 0 is one expert for all.

    Source: Pielou's evenness, 1966; `training.monitor` logs the same.
    """
    return entropy(share(counts)) / np.log2(counts.shape[-1])


def effective_experts(counts: np.ndarray) -> np.ndarray:
    """How many equally loaded experts would have the entropy of (..., E) counts, in [1, E].

    Source: Hill's number of order 1, 1973 (the perplexity of the load).
    """
    return 2.0 ** entropy(share(counts))


def coefficient_of_variation(counts: np.ndarray) -> np.ndarray:
    """Standard deviation over mean of (..., E) counts: 0 is even, sqrt(E - 1) is one expert for all.

    Source: arXiv 1701.06538, equation 7 (whose importance loss is its square).
    """
    shares = share(counts)
    return shares.std(axis=-1) * counts.shape[-1]


def max_violation(counts: np.ndarray) -> np.ndarray:
    """How far the busiest expert of (..., E) counts is above the mean: 0 is even, E - 1 is one expert for all.

    Source: MaxVio of arXiv 2408.15664, section 3; `training.monitor` logs the same.
    """
    return share(counts).max(axis=-1) * counts.shape[-1] - 1


def dead_experts(counts: np.ndarray) -> np.ndarray:
    """How many of (..., E) took nothing."""
    return (counts == 0).sum(axis=-1)


# Specialisation


def specialization(counts_CE: np.ndarray) -> np.ndarray:
    """How many times its even share each expert takes of each label's tokens: 1 is the uniform line, E the most.

    Args:
        counts_CE: (C, E) choices by label: domains, languages, or token ids.

    Returns:
        (C, E) float64.

    Source: domain and vocabulary specialization of OLMoE, arXiv 2409.02060, section 5, over their uniform line.
    """
    return share(counts_CE) * counts_CE.shape[-1]


def mutual_information(joint: np.ndarray) -> float:
    """Bits that two variables share, from their (A, B) joint counts; 0 for independent ones.

    Source: Shannon 1948; Cover and Thomas, Elements of Information Theory, equation 2.28.
    """
    total = joint.sum()
    if total == 0:
        return 0.0
    joint = joint / total
    separate = entropy(joint.sum(axis=1)) + entropy(joint.sum(axis=0))
    return max(float(separate - entropy(joint.ravel())), 0.0)


def label_information(counts_NE: np.ndarray, label_N: np.ndarray, *, shuffles: int = 99, seed: int = 0) -> Information:
    """I(choice; label) where each text has one label (its domain, its language).

    Args:
        counts_NE: (N, E) choices of each text, of experts or of groups.
        label_N: (N,) integers in [0, C).
        shuffles: Random reorderings of the texts' labels for the baseline.
        seed: Of these.

    Source: the permutation baseline is Fisher's randomisation test, 1935.
    """
    num_labels = int(label_N.max()) + 1
    joint = counts_per_label(counts_NE, label_N, num_labels)
    random = np.random.default_rng(seed)
    one_hot_CN = np.zeros((num_labels, len(label_N)), dtype=np.float64)
    one_hot_CN[label_N, np.arange(len(label_N))] = 1
    counts = counts_NE.astype(np.float64)
    chance = [mutual_information(one_hot_CN @ counts[random.permutation(len(label_N))]) for _ in range(shuffles)]
    return _information(joint, chance)


def token_information(
    expert_index: np.ndarray,
    label_T: np.ndarray,
    text_start: np.ndarray,
    num_experts: int,
    *,
    shuffles: int = 19,
    seed: int = 0,
) -> Information:
    """I(expert; label) where each token has a label of its own (its id, its position).

    For the baseline the texts' choices are put in another order against unmoved labels: within a text choices stay as alike
    as they are, so a sequence router gets no credit for words that a text repeats.

    Args:
        expert_index: (T, K) integers in [0, E).
        label_T: (T,) integers of at least 0.
        text_start: (N + 1,).
        num_experts: E.
        shuffles: Reorderings of whole texts for the baseline.
        seed: Of these.
    """
    _, label_T = np.unique(label_T, return_inverse=True)
    num_labels = int(label_T.max()) + 1

    def joint(choices: np.ndarray) -> np.ndarray:
        flat = label_T[:, None] * num_experts + choices
        return np.bincount(flat.ravel(), minlength=num_labels * num_experts).reshape(num_labels, num_experts)

    random = np.random.default_rng(seed)
    lengths, chance = np.diff(text_start), []
    for _ in range(shuffles):
        order = random.permutation(len(lengths))
        ends = np.cumsum(lengths[order])
        token = np.arange(len(label_T)) + np.repeat(text_start[:-1][order] - (ends - lengths[order]), lengths[order])
        chance.append(mutual_information(joint(expert_index[token])))
    return _information(joint(expert_index), chance)


def _information(joint: np.ndarray, chance: list[float]) -> Information:
    return Information(
        bits=mutual_information(joint),
        baseline=float(np.mean(chance)) if chance else 0.0,
        highest=max(chance, default=0.0),
        shuffles=len(chance),
        choice_entropy=float(entropy(share(joint.sum(axis=0)))),
        label_entropy=float(entropy(share(joint.sum(axis=1)))),
    )


def jensen_shannon(counts_CE: np.ndarray) -> np.ndarray:
    """How differently each two labels use the experts, in bits: 0 is alike, 1 is disjoint.

    Args:
        counts_CE: (C, E) choices by label.

    Returns:
        (C, C) float64, symmetric, 0 on the diagonal.

    Source: Lin 1991, equation 4.1 with equal weights.
    """
    shares = share(counts_CE)
    middle = (shares[:, None] + shares[None, :]) / 2
    entropies = entropy(shares)
    divergence = entropy(middle) - (entropies[:, None] + entropies[None, :]) / 2
    np.fill_diagonal(divergence, 0.0)
    return np.clip(divergence, 0.0, 1.0)


# Structure


def coactivation(first: np.ndarray, second: np.ndarray, num_experts: int) -> np.ndarray:
    """P(expert j in `second` | expert i in `first`) over tokens; give the same layer twice, or two layers.

    Args:
        first: (T, K) integers in [0, E).
        second: (T, K) integers in [0, E).
        num_experts: E.

    Returns:
        (E, E) float64; row i is 0 where i was never chosen. Of one layer, an expert goes with itself always.

    Source: expert co-activation of OLMoE, arXiv 2409.02060, section 5.
    """
    together = np.zeros((num_experts, num_experts))
    for one in first.T:
        for other in second.T:
            flat = one.astype(np.int64) * num_experts + other
            together += np.bincount(flat, minlength=num_experts**2).reshape(num_experts, num_experts)
    taken = np.bincount(first.ravel(), minlength=num_experts)
    return together / np.maximum(taken, 1)[:, None]


def consistency(counts_NE: np.ndarray) -> tuple[float, float]:
    """Chance that two choices of the same text are the same expert, and that two choices of any texts are.

    Args:
        counts_NE: (N, E) choices of each text.

    Returns:
        Within texts (over texts with two choices or more, weighted by their choices; 0 where there are none), and over all.

    Source: Simpson's index without replacement, 1949.
    """
    totals_N = counts_NE.sum(axis=1)
    same_N = (counts_NE * (counts_NE - 1.0)).sum(axis=1)
    some = totals_N > 1
    within = 0.0
    if some.any():
        within = float(np.average(same_N[some] / (totals_N[some] * (totals_N[some] - 1.0)), weights=totals_N[some]))
    return within, float((share(counts_NE.sum(axis=0)) ** 2).sum())


def saturation(early: np.ndarray, late: np.ndarray) -> float:
    """Share of the choices of a late checkpoint that an early one made already, on the same tokens.

    Args:
        early: (T, K) experts.
        late: (T, K) experts.

    Source: router saturation of OLMoE, arXiv 2409.02060, section 5.
    """
    return float((early[:, :, None] == late[:, None, :]).any(axis=1).mean())


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """How alike two sets of outputs for the same inputs are, up to rotation and scale: 1 is the same.

    Args:
        x: (T, D), one row per input.
        y: (T, D'), its rows in the same order.

    Returns:
        In [0, 1]; 0 where one of them does not vary.

    Source: Kornblith et al. 2019 (arXiv 1905.00414), equations 3 and 4 for a linear kernel.
    """
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    norms = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(x.T @ y) ** 2 / norms) if norms > 0 else 0.0


def drift(vectors: np.ndarray, other_vectors: np.ndarray) -> float:
    """1 - mean cosine between (N, D) vectors of a model and another's of the same texts: 0 is no change of direction."""
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(other_vectors, axis=1)
    return float(1 - ((vectors * other_vectors).sum(axis=1) / np.maximum(norms, 1e-12)).mean())


def pair_agreement(choice_N: np.ndarray, pairs: np.ndarray) -> tuple[float, float]:
    """Share of pairs whose two texts made the same choice, and the share among texts paired at random.

    Args:
        choice_N: (N,) the choice of each text: its most used group.
        pairs: (P, 2) rows of texts, a query and its positive; a query's negatives are the other pairs' positives.

    Returns:
        Agreement with the positive, and with all negatives (0 for one pair).
    """
    first, second = choice_N[pairs[:, 0]], choice_N[pairs[:, 1]]
    agreed = first == second
    if len(pairs) < 2:
        return float(agreed.mean()), 0.0
    size = int(choice_N.max()) + 1
    with_any = float(np.bincount(first, minlength=size) @ np.bincount(second, minlength=size))
    return float(agreed.mean()), (with_any - float(agreed.sum())) / (len(pairs) * (len(pairs) - 1))


def neighbour_purity(features: np.ndarray, label_N: np.ndarray) -> tuple[float, float]:
    """Share of texts whose nearest other text by cosine has their label, and the share expected of a random other text.

    Args:
        features: (N, D) vectors, or routing features: each text's mean P(expert) in all layers, side by side.
        label_N: (N,) integers in [0, C).

    Source: 1-nearest-neighbour accuracy, Cover and Hart 1967, leaving the text itself out.
    """
    centred = features - features.mean(axis=0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    nearest = cosines.argmax(axis=1)
    sizes = np.bincount(label_N)
    chance = float((sizes * (sizes - 1.0)).sum() / (len(label_N) * (len(label_N) - 1.0)))
    return float((label_N[nearest] == label_N).mean()), chance


def label_similarity(vectors: np.ndarray, label_N: np.ndarray) -> np.ndarray:
    """Mean cosine between the (N, D) vectors of each two labels (N,) in [0, C): (C, C); a text with itself is left out.

    On the diagonal 1 stands for a label of one text.
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    sizes = np.bincount(label_N)
    sums = np.zeros((len(sizes), vectors.shape[1]))
    np.add.at(sums, label_N, unit)
    similarity = sums @ sums.T / np.outer(sizes, sizes)
    pairs = sizes * (sizes - 1.0)
    within = (np.einsum("cd,cd->c", sums, sums) - sizes) / np.maximum(pairs, 1)
    np.fill_diagonal(similarity, np.where(pairs > 0, within, 1.0))
    return similarity


def information_bound(label_shares: np.ndarray, num_experts: int) -> float:
    """The most bits that one choice can say about a label: the smaller of H(label) and log2 E.

    An even load does not lower it: log2 E is the entropy of just that load. What forbids specialisation is asking for an
    even load within every batch of one label (arXiv 2501.11873), not over all labels.

    Args:
        label_shares: (C,) shares of the labels.
        num_experts: E, or G for groups.

    Source: Cover and Thomas, theorems 2.6.4 (H <= log2 E) and 2.6.5 (I <= H).
    """
    return float(min(entropy(np.asarray(label_shares, dtype=np.float64)), np.log2(num_experts)))
