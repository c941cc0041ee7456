"""SentenceTransformers of stock modules: recognise one, load one, put another encoder into one.

sentence-transformers is an optional dependency; nothing here imports it before it is needed.
"""

import copy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def is_sentence_transformer(model: Any) -> bool:
    """Whether `model` is a `SentenceTransformer`; one can only be given where the library is imported already."""
    library = sys.modules.get("sentence_transformers")
    return library is not None and isinstance(model, library.SentenceTransformer)


def is_sentence_transformer_path(name_or_path: str) -> bool:
    """Whether a local folder or a Hub repository holds a `SentenceTransformer` (it has a `modules.json`).

    Args:
        name_or_path: A local folder or a Hub id.
    """
    if Path(name_or_path).is_dir():
        return (Path(name_or_path) / "modules.json").is_file()
    return _library().util.is_sentence_transformer_model(name_or_path)


def load(name_or_path: str, **kwargs: Any) -> "SentenceTransformer":
    """Load a `SentenceTransformer` from a local folder or the Hub."""
    return _library().SentenceTransformer(name_or_path, **kwargs)


def encoder_of(model: "SentenceTransformer") -> PreTrainedModel:
    """The transformers model inside a `SentenceTransformer`.

    Raises:
        ValueError: Its first module is not the stock `Transformer`.
    """
    encoder = getattr(model[0], "model", None)
    if not isinstance(encoder, PreTrainedModel):
        raise ValueError(
            f"The first module of this SentenceTransformer is a {type(model[0]).__name__}; allowed: the stock Transformer "
            "module with a torch model."
        )
    return encoder


def with_encoder(parent: "SentenceTransformer", encoder: PreTrainedModel, card_text: str) -> "SentenceTransformer":
    """A copy of `parent` with another encoder; tokenizer, pooling, prompts, lengths and similarity stay the same.

    Args:
        parent: Left as it was.
        encoder: Takes the place of the parent's; not copied.
        card_text: The model card that is saved with the copy until it is trained.
    """
    dense = encoder_of(parent)
    # Wherever deepcopy meets the parent's encoder it takes `encoder` instead, so the dense weights are never copied
    model = copy.deepcopy(parent, {id(dense): encoder})
    model._model_card_text = card_text  # type: ignore[assignment]
    return model


def card_text(model: "SentenceTransformer") -> str:
    """The model card that `model` was loaded with, "" where there was none."""
    return model._model_card_text or ""


def _library() -> Any:
    try:
        import sentence_transformers
    except ImportError as error:
        raise ImportError("This needs sentence-transformers: pip install hagmoe_hf[sentence]") from error
    return sentence_transformers
