"""Models of sentence-transformers, of stock modules: recognise one, load one, put another encoder into one.

sentence-transformers is an optional dependency; nothing here imports it before it is needed.
"""

import copy
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base import BaseModel

    Model = TypeVar("Model", bound=BaseModel)

_VOLATILE = ("_name_or_path", "transformers_version")  # config entries that say where a model is, not what it computes
MODEL_TYPES = ("SentenceTransformer", "CrossEncoder", "SparseEncoder", "MultiVectorEncoder")


def is_sentence_model(model: Any) -> bool:
    """Whether `model` is of one of `MODEL_TYPES`; it can only be where the library is imported already."""
    library = sys.modules.get("sentence_transformers")
    return library is not None and isinstance(model, tuple(getattr(library, name) for name in MODEL_TYPES))


def is_sentence_transformer_path(name_or_path: str) -> bool:
    """Whether a local folder or a Hub repository holds a model of sentence-transformers (it has a `modules.json`).

    Args:
        name_or_path: A local folder or a Hub id.
    """
    if Path(name_or_path).is_dir():
        return (Path(name_or_path) / "modules.json").is_file()
    return _library().util.is_sentence_transformer_model(name_or_path)


def load(name_or_path: str, **kwargs: Any) -> "SentenceTransformer":
    """Load a `SentenceTransformer`; the arguments are its own.

    Raises:
        ValueError: It is a `CrossEncoder`, say, of which sentence-transformers would quietly leave the head out.
        OSError: There is no such folder, and the Hub does not give one.
        ImportError: sentence-transformers is missing.
    """
    with naming_the_model(name_or_path):
        return getattr(_library(), _checked_type(name_or_path, MODEL_TYPES[:1]))(name_or_path, **kwargs)


def load_as_saved(name_or_path: str) -> "BaseModel":
    """Load a model of sentence-transformers as the one of `MODEL_TYPES` that it was saved as.

    Args:
        name_or_path: A local folder or a Hub id.

    Raises:
        ValueError: It was saved as something else.
        ImportError: sentence-transformers is missing.
    """
    return getattr(_library(), _checked_type(name_or_path, MODEL_TYPES))(name_or_path)


@contextmanager
def naming_the_model(name_or_path: str) -> Iterator[None]:
    """While a model is loaded: say of which one it is that there is no folder, and that it could not be had from the Hub.

    Raises:
        OSError: As above.
    """
    try:
        yield
    except OSError as error:
        if Path(name_or_path).is_dir():
            raise
        raise OSError(f"{name_or_path!r} is no folder, and could not be loaded from the Hub: {error}") from error


def encoder_subfolder(name_or_path: str) -> str:
    """Where the encoder of a saved model lies in it: "" today, a sub-folder in older ones."""
    return _saved_json(name_or_path, "modules.json")[0]["path"]


def encoder_of(model: "BaseModel") -> PreTrainedModel:
    """The transformers model inside a model of sentence-transformers.

    Raises:
        ValueError: It is no such model, or its first module is not the stock `Transformer`.
    """
    if not isinstance(model, torch.nn.Sequential):
        raise ValueError(
            f"A {type(model).__name__} is no model of sentence-transformers; allowed: {', '.join(MODEL_TYPES)}."
        )
    encoder = getattr(model[0], "model", None)
    if not isinstance(encoder, PreTrainedModel):
        raise ValueError(
            f"The first module of this {type(model).__name__} is a {type(model[0]).__name__}; allowed: the stock "
            "Transformer module with a torch model."
        )
    return encoder


def allowed_mixture(model: torch.nn.Module) -> str:
    """What a message says is allowed, where `model` holds no HAG-MoE as far as this package sees."""
    kinds = {type(module) for module in model.modules()}
    if any(kind.__name__.startswith("HagMoe") and not kind.__module__.startswith(__package__) for kind in kinds):
        return "one that was loaded after `import hagmoe_hf`, without trust_remote_code: this is its own remote code's"
    return "a HAG-MoE, see hagmoe_hf.upcycle"


def with_encoder(parent: "Model", encoder: PreTrainedModel, card_text: str) -> "Model":
    """A copy of `parent` with another encoder; all around it stays: tokenizer, pooling, prompts, lengths, activation.

    Args:
        parent: Left as it was.
        encoder: Takes the place of the parent's; not copied.
        card_text: The model card that is saved with the copy until it is trained.
    """
    dense = encoder_of(parent)
    # Wherever deepcopy meets the parent's encoder it takes `encoder` instead, so the dense weights are never copied
    model = copy.deepcopy(parent, {id(dense): encoder})
    if in_float32 := getattr(model, "keep_in_fp32_modules", None):  # a CrossEncoder's choice of layers, some in the encoder
        cast(Any, model).set_keep_in_fp32_modules(in_float32)
    model._model_card_text = card_text  # type: ignore[assignment]
    return model


def card_text(model: "BaseModel") -> str:
    """The model card that `model` was loaded with, "" where there was none."""
    return model._model_card_text or ""


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


def _checked_type(name_or_path: str, allowed: tuple[str, ...]) -> str:
    config = _saved_json(name_or_path, "config_sentence_transformers.json") or {}
    model_type = config.get("model_type", MODEL_TYPES[0])  # older ones do not say, and there was no other
    if model_type not in allowed:
        raise ValueError(
            f"model_type={model_type!r} in config_sentence_transformers.json of {name_or_path} cannot be loaded here; "
            f"allowed: {', '.join(allowed)}."
        )
    return model_type


def _tokenizer_settings(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    settings = json.loads(backend.to_str())
    return {key: value for key, value in settings.items() if key not in ("truncation", "padding")}  # change with every call


def _saved_json(name_or_path: str, file: str) -> Any:
    """What a file of a saved model says, None where there is no such file."""
    path = _library().util.load_file_path(name_or_path, file)
    try:
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} of {name_or_path} is damaged ({error}); allowed: JSON.") from error


def _library() -> Any:
    try:
        import sentence_transformers
    except ImportError as error:
        raise ImportError("This needs sentence-transformers: pip install hagmoe_hf[sentence]") from error
    return sentence_transformers
