"""What the room uses of mteb, or an error that says what to install. Everything else imports mteb from here."""

try:
    import mteb
    import pytrec_eval
    from datasets import Dataset, DatasetDict
    from mteb import TaskMetadata
    from mteb.abstasks import (
        AbsTask,
        AbsTaskBitextMining,
        AbsTaskClassification,
        AbsTaskClustering,
        AbsTaskPairClassification,
        AbsTaskRetrieval,
        AbsTaskSTS,
    )
    from mteb.abstasks.aggregated_task import AbsTaskAggregate
    from mteb.abstasks.text.reranking import AbsTaskReranking
    from mteb.models import SentenceTransformerEncoderWrapper
    from mteb.models.model_meta import ModelMeta, ScoringFunction
except ImportError as error:
    raise ImportError("Evaluation needs mteb: pip install hagmoe_hf[eval]") from error

__all__ = [
    "AbsTask",
    "AbsTaskAggregate",
    "AbsTaskBitextMining",
    "AbsTaskClassification",
    "AbsTaskClustering",
    "AbsTaskPairClassification",
    "AbsTaskReranking",
    "AbsTaskRetrieval",
    "AbsTaskSTS",
    "Dataset",
    "DatasetDict",
    "ModelMeta",
    "ScoringFunction",
    "SentenceTransformerEncoderWrapper",
    "TaskMetadata",
    "mteb",
    "pytrec_eval",
]
