"""From a trace to every number of the report, and to the findings in words. NumPy, and scikit-learn's t-SNE for the maps.

A summary is plain JSON: what a reader sees in the pictures, another program can read.

Axes:  N texts   T tokens   S sparse layers   K experts per token   E experts   G groups   C labels
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from . import stats
from .texts import label_ids
from .trace import Trace, label_load

MAX_MAPPED = 1500  # texts of the map and of the neighbours: both look at all pairs
MIN_MAPPED = 10  # fewer make no map
FREQUENT = 5  # a token id counts for an expert's vocabulary from so many occurrences
KINDS = ("domain", "language")

Summary = dict[str, Any]


def summarize(trace: Trace, tokens: dict[int, str] | None = None, *, seed: int = 0) -> Summary:
    """Every statistic that a trace alone allows.

    Args:
        trace: What was recorded.
        tokens: Token id -> piece, for the vocabularies of experts.
        seed: Of shuffles and samples.

    Returns:
        JSON values: for each of `layers` its `load`, `information`, `consistency`, `pairs` and `vocabulary`; for each kind
        of `labels` counts, specialization, divergence and similarity; `coactivation`, `neighbours`; and `missing`: what
        could not be said, and why.
    """
    labels = {"domain": trace.texts.domains, "language": trace.texts.languages}
    missing = {kind: reason for kind in KINDS if (reason := _why_not(kind, labels[kind], len(trace.texts.texts)))}
    names_ids = {kind: label_ids(values) for kind, values in labels.items() if values is not None and kind not in missing}
    layers = []
    for row, layer in enumerate(trace.layers):
        index_TK = np.ascontiguousarray(trace.expert_index[:, row])
        counts_NE = stats.counts_per_text(index_TK, trace.text_start, trace.num_experts)
        layers.append(
            {
                "layer": layer,
                "load": _load(counts_NE.sum(axis=0), trace.num_groups),
                "confidence": float(trace.expert_probability[:, row].astype(np.float64).mean()),
                "information": _information(trace, index_TK, counts_NE, names_ids, seed),
                "consistency": dict(zip(("within", "over_all"), stats.consistency(counts_NE), strict=True)),
                "pairs": _pairs(trace, counts_NE),
                "vocabulary": _vocabulary(trace, index_TK, tokens) if tokens else [],
            }
        )
    summary: Summary = {
        "texts": len(trace.texts.texts),
        "tokens": len(trace.token_id),
        "skipped": trace.texts.skipped,
        "num_experts": trace.num_experts,
        "num_experts_per_tok": int(trace.expert_index.shape[2]),
        "num_groups": trace.num_groups,
        "group_routing": trace.group_routing,
        "layers": layers,
        "missing": missing,
        "labels": {kind: _label_numbers(trace, kind) for kind in names_ids},
        "coactivation": _coactivation(trace),
        "neighbours": {kind: _neighbours(trace, ids, seed) for kind, (_, ids) in names_ids.items()},
    }
    return summary


def _why_not(kind: str, labels: Sequence[str] | None, count: int) -> str | None:
    """Why nothing can be said about a kind of label, None where something can."""
    if count < 2:
        return f"There is 1 text, so nothing can be compared between {kind}s; give 2 or more."
    if labels is None:
        return f"The texts have no column {kind!r}, so nothing can be said about {kind}s; add one."
    if len(set(labels)) < 2:
        return f"All texts are of one {kind}, {labels[0]!r}, so there is nothing to tell apart; give 2 or more."
    return None


def _load(counts_E: np.ndarray, num_groups: int) -> Summary:
    groups_G = stats.group_counts(counts_E, num_groups)
    numbers = {
        "counts": counts_E.tolist(),
        "effective_experts": float(stats.effective_experts(counts_E)),
        "entropy": float(stats.load_entropy(counts_E)),
        "cv": float(stats.coefficient_of_variation(counts_E)),
        "max_vio": float(stats.max_violation(counts_E)),
        "dead_experts": int(stats.dead_experts(counts_E)),
    }
    if num_groups > 1:
        numbers["effective_groups"] = float(stats.effective_experts(groups_G))
    return numbers


def _information(trace: Trace, index_TK: np.ndarray, counts_NE: np.ndarray, names_ids: dict, seed: int) -> Summary:
    found = {}
    for kind, (_, ids) in names_ids.items():
        found[f"expert;{kind}"] = stats.label_information(counts_NE, ids, seed=seed)
        if trace.num_groups > 1:
            groups_NG = stats.group_counts(counts_NE, trace.num_groups)
            found[f"group;{kind}"] = stats.label_information(groups_NG, ids, seed=seed)
    if len(trace.texts.texts) > 1:
        for kind, label_T in (("token", trace.token_id), ("position", trace.position)):
            found[f"expert;{kind}"] = stats.token_information(
                index_TK, label_T, trace.text_start, trace.num_experts, seed=seed
            )
    return {
        name: {
            **asdict(one),
            "excess": one.excess,
            "is_above_chance": one.is_above_chance,
            "explained": one.explained,
        }
        for name, one in found.items()
    }


def _pairs(trace: Trace, counts_NE: np.ndarray) -> Summary | None:
    """How often a query and its positive use the same group (or expert, where there are no groups) most."""
    if not len(trace.texts.pairs):
        return None
    counts = stats.group_counts(counts_NE, trace.num_groups) if trace.num_groups > 1 else counts_NE
    positive, negative = stats.pair_agreement(counts.argmax(axis=1), trace.texts.pairs)
    return {"pairs": len(trace.texts.pairs), "with_positive": positive, "with_negatives": negative}


def _vocabulary(trace: Trace, index_TK: np.ndarray, tokens: dict[int, str], most: int = 8) -> list[Summary]:
    """For each expert the frequent tokens that go to it the most, and what share of their occurrences."""
    ids, token_T = np.unique(trace.token_id, return_inverse=True)
    flat = token_T[:, None] * trace.num_experts + index_TK
    counts_VE = np.bincount(flat.ravel(), minlength=len(ids) * trace.num_experts).reshape(len(ids), -1)
    often = counts_VE.sum(axis=1) >= FREQUENT * index_TK.shape[1]
    ids, counts_VE = ids[often], counts_VE[often]
    shares = stats.share(counts_VE)
    found = []
    for expert in range(trace.num_experts):
        # Of equal shares the more frequent token: it is the surer one
        best = np.lexsort((-counts_VE[:, expert], -shares[:, expert]))[:most]
        best = best[counts_VE[best, expert] > 0]
        found.append(
            {
                "expert": expert,
                "tokens": [tokens.get(int(ids[row]), f"#{ids[row]}") for row in best],
                "shares": shares[best, expert].tolist(),
            }
        )
    return found


def _label_numbers(trace: Trace, kind: str) -> Summary:
    load = label_load(trace, kind)
    labels = trace.texts.domains if kind == "domain" else trace.texts.languages
    assert labels is not None
    return {
        "names": list(load.labels),
        "counts": load.counts.tolist(),
        "specialization": [stats.specialization(counts_CE).tolist() for counts_CE in load.counts],
        "divergence": [stats.jensen_shannon(counts_CE).tolist() for counts_CE in load.counts],
        "similarity": stats.label_similarity(np.asarray(trace.vector), label_ids(labels)[1]).tolist(),
    }


def _coactivation(trace: Trace) -> list[Summary]:
    """Within each layer where tokens take several experts, and from each sparse layer to the next."""
    found = []
    rows = range(len(trace.layers))
    pairs = [(row, row) for row in rows if trace.expert_index.shape[2] > 1] + [(row, row + 1) for row in rows[:-1]]
    for first, second in pairs:
        share = stats.coactivation(trace.expert_index[:, first], trace.expert_index[:, second], trace.num_experts)
        found.append({"from": trace.layers[first], "to": trace.layers[second], "share": share.tolist()})
    return found


def sample_rows(trace: Trace, seed: int = 0, most: int = MAX_MAPPED) -> np.ndarray:
    """Rows of at most `most` texts, at random: what is compared in pairs, or drawn as dots."""
    return np.sort(np.random.default_rng(seed).permutation(len(trace.texts.texts))[:most])


def routing_features(trace: Trace) -> np.ndarray:
    """(N, S * E) float32: each text's mean P(expert) in all sparse layers, an embedding made of routing alone."""
    return np.asarray(trace.mean_probability).reshape(len(trace.texts.texts), -1)


def _neighbours(trace: Trace, ids: np.ndarray, seed: int) -> Summary:
    rows = sample_rows(trace, seed)
    vectors, chance = stats.neighbour_purity(np.asarray(trace.vector[rows], dtype=np.float64), ids[rows])
    routing, _ = stats.neighbour_purity(routing_features(trace)[rows].astype(np.float64), ids[rows])
    return {"texts": len(rows), "by_vector": vectors, "by_routing": routing, "chance": chance}


def text_map(trace: Trace, rows: np.ndarray, seed: int = 0) -> np.ndarray | None:
    """(len(rows), 2) places of texts by t-SNE of their sentence vectors; None for too few.

    Source: van der Maaten and Hinton, 2008, as scikit-learn has it.
    """
    if len(rows) < MIN_MAPPED:
        return None
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(rows) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", metric="cosine", random_state=seed).fit_transform(trace.vector[rows])


def text_groups(trace: Trace, row: int) -> np.ndarray:
    """(N,) the group that each text uses most in the sparse layer at `row`; its expert where there are no groups."""
    counts = stats.counts_per_text(trace.expert_index[:, row], trace.text_start, trace.num_experts)
    return (stats.group_counts(counts, trace.num_groups) if trace.num_groups > 1 else counts).argmax(axis=1)


# Findings


def findings(summary: Summary) -> list[str]:
    """The five things a person would want to know, each a sentence or two made of the summary's numbers."""
    return [
        _about_load(summary),
        _about_labels(summary, "domain"),
        _about_languages(summary),
        _about_causes(summary),
        _about_likeness(summary),
    ]


def _about_load(summary: Summary) -> str:
    loads = [layer["load"] for layer in summary["layers"]]
    num_experts = summary["num_experts"]
    worst = max(summary["layers"], key=lambda layer: layer["load"]["max_vio"])
    counts = worst["load"]["counts"]
    busiest, dead = int(np.argmax(counts)), sum(load["dead_experts"] for load in loads)
    spread = _range([load["effective_experts"] for load in loads], ".1f")
    used = min(load["effective_experts"] for load in loads) / num_experts
    verdict = "evenly used" if used > 0.9 else "unevenly used" if used > 0.6 else "very unevenly used"
    return (
        f"The experts are {verdict}: by entropy {spread} of {num_experts} per layer are at work"
        + (f", and {dead} took no token at all" if dead else ", and none is idle")
        + f". The busiest is expert {busiest} of layer {worst['layer']} with {counts[busiest] / sum(counts):.0%} of the "
        f"choices (even would be {1 / num_experts:.0%})."
    )


def _about_labels(summary: Summary, kind: str) -> str:
    if kind in summary["missing"]:
        return summary["missing"][kind]
    key = f"expert;{kind}"
    above = [layer for layer in summary["layers"] if layer["information"][key]["is_above_chance"]]
    count = len(summary["labels"][kind]["names"])
    if not above:
        return (
            f"The experts do not tell the {count} {kind}s apart: in no layer does the choice say more about the {kind} than "
            f"with shuffled labels."
        )
    best = max(above, key=lambda layer: layer["information"][key]["excess"])
    row = summary["layers"].index(best)
    special = np.array(summary["labels"][kind]["specialization"][row])
    label, expert = np.unravel_index(special.argmax(), special.shape)
    information = best["information"][key]
    name = summary["labels"][kind]["names"][label]
    possible = min(information["choice_entropy"], information["label_entropy"])
    return (
        f"The experts tell the {count} {kind}s apart in {len(above)} of {len(summary['layers'])} layers. Most in layer "
        f"{best['layer']}, where the choice says {information['bits']:.2f} bits about the {kind} (shuffled labels: "
        f"{information['baseline']:.2f}; at most {possible:.2f} are possible), {information['explained']:.0%} of what could "
        f"be known. Strongest: {name} uses expert {expert} {special[label, expert]:.1f} times its even share."
    )


def _about_languages(summary: Summary) -> str:
    text = _about_labels(summary, "language")
    if "language" in summary["missing"]:
        return text
    names = summary["labels"]["language"]["names"]
    divergence = np.mean(summary["labels"]["language"]["divergence"], axis=0)
    farthest = np.unravel_index(divergence.argmax(), divergence.shape)
    near = divergence + 2 * np.eye(len(names))  # never a language and itself
    nearest = np.unravel_index(near.argmin(), near.shape)
    if divergence[farthest] - near[nearest] < 0.005:
        return f"{text} All are equally far apart (Jensen-Shannon divergence {divergence[farthest]:.2f} bits of 1)."
    return (
        f"{text} Farthest apart are {names[farthest[0]]} and {names[farthest[1]]} (Jensen-Shannon divergence "
        f"{divergence[farthest]:.2f} bits of 1), nearest {names[nearest[0]]} and {names[nearest[1]]} "
        f"({divergence[nearest]:.2f}), meaned over layers."
    )


CAUSES = {
    "expert;domain": "domain",
    "expert;language": "language",
    "expert;token": "word piece",
    "expert;position": "position",
}


def _about_causes(summary: Summary) -> str:
    share: dict[str, list[float]] = {}
    for layer in summary["layers"]:
        for key, name in CAUSES.items():
            if key in layer["information"]:
                one = layer["information"][key]
                known = one["excess"] if one["is_above_chance"] else 0.0
                share.setdefault(name, []).append(known / one["choice_entropy"] if one["choice_entropy"] > 1e-9 else 0.0)
    if not share:
        return "With one text it cannot be said what the choices follow; give 2 or more."
    means = sorted(((float(np.mean(values)), name) for name, values in share.items()), reverse=True)
    within = float(np.mean([layer["consistency"]["within"] for layer in summary["layers"]]))
    over_all = float(np.mean([layer["consistency"]["over_all"] for layer in summary["layers"]]))
    best, name = means[0]
    told = "; ".join(f"{other} {value:.0%}" for value, other in means)
    pairs = [layer["pairs"] for layer in summary["layers"] if layer["pairs"]]
    agreement = ""
    if pairs:
        positive, negative = (float(np.mean([one[key] for one in pairs])) for key in ("with_positive", "with_negatives"))
        what = "a group" if summary["num_groups"] > 1 else "an expert"
        agreement = (
            f" A query and its positive share {what} {positive:.0%} of the time, a query and a negative {negative:.0%}."
        )
    lead = f"A token's expert follows its {name} most" if best > 0 else "A token's expert follows none of what was measured"
    return (
        f"{lead} (share of the choice's entropy that each explains above chance, which may overlap: {told}). Two tokens of "
        f"one text share an expert {within:.0%} of the time, two of any texts {over_all:.0%}.{agreement}"
    )


def _about_likeness(summary: Summary) -> str:
    cka = summary.get("cka")
    if not cka:
        return "How alike the experts' outputs are was not measured."
    means = [_mean_off_diagonal(np.array(matrix)) for matrix in cka]
    low = int(np.argmin(means))
    mean = means[low]
    if mean > 0.999:
        words = "The experts are still copies of each other: given the same tokens they compute the same"
    elif mean > 0.9:
        words = "The experts have begun to differ, but compute nearly the same given the same tokens"
    else:
        words = "The experts have become different from each other"
    text = f"{words} (similarity by CKA {_range(means, '.3f')} between layers; 1 is the same)."
    importance = summary.get("importance")
    if importance:
        lost = np.array(importance["lost"])
        row, expert = np.unravel_index(lost.argmax(), lost.shape)
        text += (
            f" Taking one out costs at most {lost.max():.3f} of {importance['whole']:.3f} on {importance['task']} "
            f"(expert {expert} of layer {summary['layers'][row]['layer']})."
        )
    if "drift" in summary:
        text += f" The vectors have turned away from the parent's by {summary['drift']:.3f} (1 - cosine)."
    return text


def _range(values: Sequence[float], spec: str) -> str:
    low, high = format(min(values), spec), format(max(values), spec)
    return low if low == high else f"{low} to {high}"


def _mean_off_diagonal(matrix: np.ndarray) -> float:
    return float(matrix[~np.eye(len(matrix), dtype=bool)].mean())
