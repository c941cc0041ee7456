"""Losses by name, all of them sentence-transformers' but three: similarities and translations as a teacher sees them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as library
from torch import Tensor, nn
from torch.nn import functional as F

from .data import LABEL


@dataclass(frozen=True)
class LossKind:
    """What a loss is made of and what it wants.

    Attributes:
        make: Called with the model and the user's options.
        columns: Text columns by default.
        needs_label: Whether rows carry a number.
        compares_rows: Whether a row's loss depends on the other rows of its batch.
        needs_teacher: Whether labels are a teacher's vectors.
        first_column_only: Whether those are of the first column alone, of which the second is a translation.
        any_width: Whether the teacher's vectors may have another width than the model's.
        teaches_itself: Whether the model before training is a teacher from which something is learned.
    """

    make: Callable[..., nn.Module]
    columns: tuple[str, ...]
    needs_label: bool = False
    compares_rows: bool = False
    needs_teacher: bool = False
    first_column_only: bool = False
    any_width: bool = False
    teaches_itself: bool = False


class SimilarityDistillationLoss(nn.Module):
    """KL divergence from a teacher's to the student's distribution over the other columns' texts of the batch.

    Each text of the first column is compared with every text of the others; a softmax over these cosines, divided by
    `temperature`, is what the student imitates (arXiv 2010.11386, with in-batch candidates).

    Args:
        model: The student.
        temperature: Divides the cosines; over 0.
    """

    def __init__(self, model: SentenceTransformer, temperature: float = 0.05):
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, sentence_features: Sequence[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            sentence_features: For each of C columns the tokenised texts of B rows.
            labels: (B, C, D of the teacher), the teacher's vectors.
        """
        return self._divergence(*self._of_both(sentence_features, labels))

    @staticmethod
    def _divergence(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        return F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)

    def _of_both(self, sentence_features: Sequence[dict[str, Tensor]], labels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N) log-probabilities of student and teacher; a row's own positive is the candidate of its number."""
        student = [self.model(features)["sentence_embedding"] for features in sentence_features]
        teacher = labels.to(student[0].dtype).unbind(1)
        student_log_probs, teacher_log_probs = (self._log_probs(of[0], torch.cat(of[1:])) for of in (student, teacher))
        return student_log_probs, teacher_log_probs

    def _log_probs(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """(B, D) and (N, D) -> (B, N)."""
        cosines = F.normalize(queries, dim=-1) @ F.normalize(candidates, dim=-1).T
        return (cosines / self.temperature).log_softmax(dim=-1)


class DistilledRankingLoss(SimilarityDistillationLoss):
    """`MultipleNegativesRankingLoss`, and beside it a teacher's similarities: new pairs are learned, and what the teacher
    knows of them is kept.

    Args:
        model: The student.
        temperature: Divides the cosines of both; over 0. `MultipleNegativesRankingLoss` multiplies by its inverse.
        imitation: Weight of the divergence from the teacher's similarities.
    """

    def __init__(self, model: SentenceTransformer, temperature: float = 0.05, imitation: float = 1.0):
        super().__init__(model, temperature)
        self.imitation = imitation

    def forward(self, sentence_features: Sequence[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """As for the similarities alone."""
        student_log_probs, teacher_log_probs = self._of_both(sentence_features, labels)
        own = torch.arange(len(student_log_probs), device=student_log_probs.device)
        return F.nll_loss(student_log_probs, own) + self.imitation * self._divergence(student_log_probs, teacher_log_probs)


class TranslationLoss(nn.Module):
    """Texts and their translations get a teacher's vectors of the texts: how a model learns languages its teacher lacks.

    The translations are drawn to their own target by cosine and told from the batch's other targets by InfoNCE; the texts
    are kept at theirs by cosine.

    Args:
        model: The student.
        scale: Of the cosines in InfoNCE, as in `MultipleNegativesRankingLoss`; over 0.
        imitation: Weight of 1 - cosine to the own target, of texts and translations alike.

    Source: multilingual distillation, arXiv 2004.09813.
    """

    def __init__(self, model: SentenceTransformer, scale: float = 20.0, imitation: float = 5.0):
        super().__init__()
        self.model = model
        self.scale, self.imitation = scale, imitation

    def forward(self, sentence_features: Sequence[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            sentence_features: The tokenised texts of B rows, then those of their translations.
            labels: (B, 1, D), the teacher's vectors of the texts.
        """
        texts, translations = (
            F.normalize(self.model(dict(features))["sentence_embedding"].float(), dim=-1) for features in sentence_features
        )
        target = F.normalize(labels[:, 0].to(texts.dtype), dim=-1)
        logits = self.scale * translations @ target.T
        loss = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
        away = sum(1 - (student * target).sum(-1).mean() for student in (texts, translations))
        return loss + self.imitation * away


class TaughtLoss(nn.Module):
    """A loss whose labels are a teacher's vectors of the batch that the student reads.

    For a teacher that reads what the student's tokenizer makes of a text, such as the model before training: nothing is
    encoded beforehand, which takes hours where training sees a part of the data, and nothing is kept. A step takes about a
    third longer.

    Args:
        loss: Takes a teacher's vectors as labels, and has its student as `model`.
        teacher: On the student's device; it does not learn, and is not saved with the loss.
        first_column_only: Whether those are of the first column alone.
        dtype: Of the teacher's matrix products, under autocast as the student's; None for its own.
    """

    def __init__(
        self,
        loss: nn.Module,
        teacher: SentenceTransformer,
        first_column_only: bool,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.loss = loss
        self.model = loss.model  # the trainer looks here for what it wraps for several processes
        self.first_column_only, self.dtype = first_column_only, dtype
        self._teacher = (teacher.eval(),)  # in a tuple, it is no module of this one

    def forward(self, sentence_features: Sequence[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            sentence_features: The tokenised texts of B rows, column by column.
            labels: Not looked at.
        """
        (teacher,) = self._teacher
        taught = sentence_features[:1] if self.first_column_only else sentence_features
        with torch.no_grad(), torch.autocast(teacher.device.type, self.dtype, enabled=self.dtype is not None):
            vectors = [teacher(dict(features))["sentence_embedding"] for features in taught]
        return self.loss(sentence_features, torch.stack(vectors, dim=1))


PAIR, SCORED_PAIR = ("anchor", "positive"), ("sentence1", "sentence2")
LOSSES: dict[str, LossKind] = {
    "multiple_negatives_ranking": LossKind(library.MultipleNegativesRankingLoss, PAIR, compares_rows=True),
    "cached_multiple_negatives_ranking": LossKind(library.CachedMultipleNegativesRankingLoss, PAIR, compares_rows=True),
    "cosent": LossKind(library.CoSENTLoss, SCORED_PAIR, needs_label=True, compares_rows=True),
    "triplet": LossKind(library.TripletLoss, (*PAIR, "negative")),
    "contrastive": LossKind(library.ContrastiveLoss, SCORED_PAIR, needs_label=True),
    "cosine_similarity": LossKind(library.CosineSimilarityLoss, SCORED_PAIR, needs_label=True),
    "distill_mse": LossKind(library.MSELoss, PAIR, needs_teacher=True),
    "translation": LossKind(
        TranslationLoss, PAIR, compares_rows=True, needs_teacher=True, first_column_only=True, teaches_itself=True
    ),
    "distill_kl": LossKind(SimilarityDistillationLoss, PAIR, compares_rows=True, needs_teacher=True, any_width=True),
    "ranking_distill_kl": LossKind(
        DistilledRankingLoss, PAIR, compares_rows=True, needs_teacher=True, any_width=True, teaches_itself=True
    ),
}


def build_loss(
    name: str,
    model: SentenceTransformer,
    options: Mapping[str, Any] | None = None,
    matryoshka_dims: Sequence[int] | None = None,
) -> nn.Module:
    """Make a loss.

    Args:
        name: A key of `LOSSES`.
        model: The model to train.
        options: Keyword arguments of the loss class.
        matryoshka_dims: Widths at which the loss is taken as well, each in [1, D] (arXiv 2205.13147); None for none.

    Raises:
        ValueError: An option that the loss does not have, or a width that the model does not have.
    """
    options = dict(options or {})
    make = LOSSES[name].make
    allowed = [parameter for parameter in inspect.signature(make).parameters if parameter not in ("self", "model")]
    for option in options:
        if option not in allowed:
            raise ValueError(f"loss_options of {name} has {option!r}; allowed: {allowed}.")
    try:
        loss = make(model, **options)
    except TypeError as error:
        raise ValueError(f"loss_options of {name} are {options} ({error}); allowed: values of its types.") from error
    if not matryoshka_dims:
        return loss
    if LOSSES[name].needs_teacher:
        raise ValueError(f"matryoshka_dims={list(matryoshka_dims)} with loss={name!r}; allowed: losses without a teacher.")
    width = model.get_embedding_dimension() or 0
    if not all(isinstance(dim, int) and 1 <= dim <= width for dim in matryoshka_dims):
        raise ValueError(f"matryoshka_dims={list(matryoshka_dims)} is not possible; allowed: numbers from 1 to {width}.")
    return library.MatryoshkaLoss(model, loss, matryoshka_dims=list(matryoshka_dims))


def with_teacher_vectors(rows: Dataset, teacher: SentenceTransformer, name: str, width: int, batch_size: int) -> Dataset:
    """Add a teacher's vectors of every text, or of the first column's, as `label`, (columns, D of the teacher) per row.

    Args:
        rows: Texts.
        teacher: Encodes them once, before training.
        name: The loss that is going to use them.
        width: D of the student.
        batch_size: Texts at a time.

    Raises:
        ValueError: A loss that compares vectors with a teacher of another width.
    """
    teacher_width = teacher.get_embedding_dimension()
    if not LOSSES[name].any_width and teacher_width != width:
        others = " or ".join(f"loss={other!r}" for other, kind in LOSSES.items() if kind.any_width)
        raise ValueError(
            f"loss={name!r} with a teacher of width {teacher_width} and a student of {width}; allowed: equal widths, or "
            f"{others}."
        )

    def encode(batch: dict[str, list[str]]) -> dict[str, list]:
        columns = list(batch.values())[: 1 if LOSSES[name].first_column_only else None]
        vectors = [teacher.encode(texts, batch_size=batch_size, show_progress_bar=False) for texts in columns]
        return {LABEL: [list(row) for row in zip(*vectors, strict=True)]}

    return rows.map(encode, batched=True, batch_size=8 * batch_size, desc="Teacher")
