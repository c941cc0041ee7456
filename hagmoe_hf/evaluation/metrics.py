"""Scores of vectors and rankings without a task around them; the arithmetic is scikit-learn's, SciPy's and pytrec_eval's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class KnnScores:
    """How well nearest neighbours tell the labels; precision, recall and F1 are means over labels."""

    accuracy: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Correlations:
    """How well two series agree, each in [-1, 1]."""

    pearson: float
    spearman: float


@dataclass(frozen=True)
class EmbeddingStatistics:
    """The shape of a cloud of vectors.

    Attributes:
        count: Vectors, those with NaN included.
        nan_count: Vectors with a NaN or an infinity; all other figures leave them out.
        norm_mean: Mean Euclidean norm.
        norm_std: Standard deviation of the norms.
        cosine_mean: Mean cosine of two different vectors; near 0 when directions are used evenly.
        cosine_percentiles: Percentile (1 to 99) -> cosine of two different vectors.
        uniformity: `log mean exp(-2 |x - y|^2)` over pairs of unit vectors; lower is more even.
        alignment: Mean `|x - y|^2` over pairs of unit vectors that mean the same; lower is closer. None without such pairs.
        effective_rank: exp of the entropy of the centred vectors' normalised singular values.
    """

    count: int
    nan_count: int
    norm_mean: float
    norm_std: float
    cosine_mean: float
    cosine_percentiles: Mapping[str, float]
    uniformity: float
    alignment: float | None
    effective_rank: float


def ranking_scores(
    ranked: Mapping[str, Mapping[str, float]], relevant: Mapping[str, Mapping[str, int]], k: int
) -> dict[str, float]:
    """Precision@k, recall@k, nDCG@k, MRR and MAP, each a mean over queries.

    Args:
        ranked: Query -> document -> score; equal scores are ordered by document id, as trec_eval does.
        relevant: Query -> document -> grade, 0 for not relevant.
        k: Ranks that count for the first three.

    Raises:
        ImportError: pytrec_eval is missing.
        ValueError: `k` is below 1, or no query is in both mappings.
    """
    if k < 1:
        raise ValueError(f"k={k} is not possible; allowed: 1 or more.")
    try:
        import pytrec_eval
    except ImportError as error:
        raise ImportError("Ranking scores need pytrec_eval: pip install hagmoe_hf[eval]") from error
    measures = {f"precision@{k}": f"P_{k}", f"recall@{k}": f"recall_{k}", f"ndcg@{k}": f"ndcg_cut_{k}"}
    measures |= {"mrr": "recip_rank", "map": "map"}
    evaluator = pytrec_eval.RelevanceEvaluator(relevant, {f"P.{k}", f"recall.{k}", f"ndcg_cut.{k}", "recip_rank", "map"})
    per_query = evaluator.evaluate(ranked)
    if not per_query:
        raise ValueError(f"{len(ranked)} queries ranked, none of them judged; allowed: at least one query in both.")
    return {name: float(np.mean([scores[trec] for scores in per_query.values()])) for name, trec in measures.items()}


def knn_classification(
    train_vectors: np.ndarray,
    train_labels: Sequence[str | int],
    test_vectors: np.ndarray,
    test_labels: Sequence[str | int],
    k: int = 5,
) -> KnnScores:
    """Label each test vector as the majority of its `k` nearest training vectors by cosine.

    Args:
        train_vectors: (N, D).
        train_labels: N labels.
        test_vectors: (M, D).
        test_labels: M labels.
        k: Neighbours, 1 to N.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: `k` is out of range.
    """
    if not 1 <= k <= len(train_vectors):
        raise ValueError(f"k={k} is not possible; allowed: 1 to {len(train_vectors)}, the training vectors.")
    try:
        from sklearn.metrics import accuracy_score, precision_recall_fscore_support
        from sklearn.neighbors import KNeighborsClassifier
    except ImportError as error:
        raise ImportError("k-NN classification needs scikit-learn: pip install hagmoe_hf[eval]") from error
    predicted = KNeighborsClassifier(k, metric="cosine").fit(train_vectors, train_labels).predict(test_vectors)
    precision, recall, f1, _ = precision_recall_fscore_support(test_labels, predicted, average="macro", zero_division=0)
    return KnnScores(float(accuracy_score(test_labels, predicted)), float(precision), float(recall), float(f1))


def correlations(gold: Sequence[float], predicted: Sequence[float]) -> Correlations:
    """Pearson's and Spearman's correlation of two series of at least 2 numbers.

    Raises:
        ImportError: SciPy is missing.
        ValueError: The lengths differ.
    """
    try:
        from scipy.stats import pearsonr, spearmanr
    except ImportError as error:
        raise ImportError("Correlations need SciPy: pip install hagmoe_hf[eval]") from error
    return Correlations(float(pearsonr(gold, predicted)[0]), float(spearmanr(gold, predicted)[0]))


def embedding_statistics(vectors: np.ndarray, positives: np.ndarray | None = None) -> EmbeddingStatistics:
    """Describe a cloud of vectors: norms, cosines, uniformity and alignment, effective rank, NaN.

    All pairs are looked at, so memory grows with N^2: give a sample of a few thousand.

    Args:
        vectors: (N, D), N at least 2.
        positives: (N, D), row i a vector that should be near row i of `vectors`; for the alignment.

    Raises:
        ValueError: Fewer than 2 vectors without NaN, or another shape of `positives`.

    Source: uniformity and alignment, Wang and Isola 2020 (arXiv 2005.10242); effective rank, Roy and Vetterli 2007.
    """
    vectors = np.asarray(vectors, dtype=np.float64)
    if positives is not None and np.shape(positives) != vectors.shape:
        raise ValueError(f"positives of shape {np.shape(positives)}; allowed: {vectors.shape}, the shape of vectors.")
    finite = np.isfinite(vectors).all(axis=1)
    nan_count = int((~finite).sum())
    clean = vectors[finite]
    if len(clean) < 2:
        raise ValueError(f"{len(vectors)} vectors, {nan_count} of them with NaN; allowed: at least 2 without.")
    norms = np.linalg.norm(clean, axis=1)
    unit = _unit(clean)
    cosines = (unit @ unit.T)[np.triu_indices(len(unit), k=1)]
    alignment = None
    if positives is not None:
        both = finite & np.isfinite(positives).all(axis=1)
        gaps = _unit(vectors[both]) - _unit(np.asarray(positives, dtype=np.float64)[both])
        alignment = float((gaps**2).sum(axis=1).mean())
    return EmbeddingStatistics(
        count=len(vectors),
        nan_count=nan_count,
        norm_mean=float(norms.mean()),
        norm_std=float(norms.std()),
        cosine_mean=float(cosines.mean()),
        cosine_percentiles={str(p): float(np.percentile(cosines, p)) for p in PERCENTILES},
        uniformity=float(np.log(np.exp(-2 * (2 - 2 * cosines)).mean())),  # |x - y|^2 = 2 - 2 cos on the unit sphere
        alignment=alignment,
        effective_rank=_effective_rank(clean),
    )


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _effective_rank(vectors: np.ndarray) -> float:
    singular = np.linalg.svd(vectors - vectors.mean(axis=0), compute_uv=False)
    total = singular.sum()
    if total == 0:
        return 0.0  # all vectors are the same
    shares = singular[singular > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))
