"""What is evaluated: embedding models and BM25, each with the fingerprint that keys its scores.

mteb calls every local model `no_model_name/available`, so its own cache hands one model's scores to the next; here a
model is known by its weights and settings, and by nothing else.
"""

import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import sentence

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BM25 = "bm25"  # in the place of a model's path
_BM25_IN_MTEB = "mteb/baseline-bm25s"
_VOLATILE = ("_name_or_path", "transformers_version")  # config entries that say where a model is, not what it computes


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
        name: A local folder, a Hub id, or "bm25".

    Raises:
        ImportError: An optional package is missing; the message names what to install.
        OSError: There is no such model.
    """
    if name == BM25:
        return _bm25()
    return candidate(sentence.load(name), Path(os.path.abspath(name)).name if os.path.isdir(name) else name)


def candidate(model: "SentenceTransformer", label: str) -> Candidate:
    """Make a loaded model ready for mteb, under a name and revision of its own.

    Args:
        model: Any `SentenceTransformer`, sparse or dense.
        label: What tables call it.

    Raises:
        ImportError: mteb is missing.
    """
    from .mteb_api import SentenceTransformerEncoderWrapper

    key = fingerprint(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # mteb calls methods that sentence-transformers has renamed
        wrapped = SentenceTransformerEncoderWrapper(model)
    name = label if label.count("/") == 1 else f"local/{label.replace('/', '-')}"
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(update={"name": name, "revision": key})
    return Candidate(label, key, wrapped, model)


def fingerprint(model: "SentenceTransformer") -> str:
    """SHA-256 (hex) of all that decides a model's vectors: weights, modules, settings, prompts, tokenizer.

    Two folders with the same model share it; a changed weight, prompt or length changes it.

    Args:
        model: Any `SentenceTransformer`.
    """
    modules: list[Any] = list(model)
    settings: list[Any] = [[type(module).__name__, module.get_config_dict()] for module in modules]
    encoder = getattr(modules[0], "model", None)
    if encoder is not None:
        settings.append({key: value for key, value in encoder.config.to_dict().items() if key not in _VOLATILE})
    settings += [model.max_seq_length, model.truncate_dim, model.similarity_fn_name]
    settings += [model.prompts, model.default_prompt_name, _tokenizer_settings(model.tokenizer)]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _tokenizer_settings(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    settings = json.loads(backend.to_str())
    return {key: value for key, value in settings.items() if key not in ("truncation", "padding")}  # change with every call


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
