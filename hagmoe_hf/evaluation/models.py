"""What is evaluated: embedding models and BM25, each with the fingerprint that keys its scores.

mteb calls every local model `no_model_name/available`, so its own cache hands one model's scores to the next; here a
model is known by its weights and settings, and by nothing else.
"""

import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import sentence
from ..graphs import load_model_or_graph, split_name

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BM25 = "bm25"  # in the place of a model's path
_BM25_IN_MTEB = "mteb/baseline-bm25s"


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate.

    Attributes:
        label: What tables call it.
        fingerprint: SHA-256 (hex) of what decides its vectors.
        model: What `mteb.evaluate` takes.
        encoder: The `SentenceTransformer` inside; None for BM25, which ranks documents and has no vectors.
    """

    label: str
    fingerprint: str
    model: Any
    encoder: "SentenceTransformer | None"


def load(name: str) -> Candidate:
    """Load a model to evaluate.

    Args:
        name: A local folder, a Hub id, an exported graph ("OUT/onnx/model.onnx"), or "bm25".

    Raises:
        ImportError: An optional package is missing; the message names what to install.
        OSError: There is no such model.
    """
    if name == BM25:
        return _bm25()
    folder, graph = split_name(name)
    label = Path(os.path.abspath(folder)).name if os.path.isdir(folder) else name
    return candidate(load_model_or_graph(name), f"{label}-{graph}" if graph else label)


def candidate(model: "SentenceTransformer", label: str) -> Candidate:
    """Make a loaded model ready for mteb, under a name and revision of its own.

    Args:
        model: Any `SentenceTransformer`, sparse or dense.
        label: What tables call it.

    Raises:
        ImportError: mteb is missing.
    """
    from .mteb_api import SentenceTransformerEncoderWrapper

    key = sentence.fingerprint(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # mteb calls methods that sentence-transformers has renamed
        wrapped = SentenceTransformerEncoderWrapper(model)
    name = label if label.count("/") == 1 else f"local/{label.replace('/', '-')}"
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(update={"name": name, "revision": key})
    return Candidate(label, key, wrapped, model)


def _bm25() -> Candidate:
    from .mteb_api import mteb

    try:
        import bm25s
        import Stemmer  # noqa: F401
    except ImportError as error:
        raise ImportError("BM25 needs bm25s and PyStemmer: pip install hagmoe_hf[eval]") from error
    model = mteb.get_model(_BM25_IN_MTEB)
    identity = f"{_BM25_IN_MTEB} {model.mteb_model_meta.revision} bm25s {bm25s.__version__}"
    return Candidate(BM25, hashlib.sha256(identity.encode()).hexdigest(), model, None)
