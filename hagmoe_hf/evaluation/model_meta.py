"""What MTEB's leaderboard asks about a HAG-MoE, filled from the model: a submission needs no counting by hand."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..configuration_hagmoe import HagMoeConfig
from ..sentence import encoder_of

if TYPE_CHECKING:
    from mteb.models import EncoderProtocol
    from mteb.models.model_meta import ModelMeta
    from sentence_transformers import SentenceTransformer


def load_hagmoe(model_name: str, revision: str | None = None, device: str | None = None, **kwargs: Any) -> "EncoderProtocol":
    """Load a HAG-MoE as mteb loads any SentenceTransformer: importing this module has registered the architecture.

    Args:
        model_name: A local folder or a Hub id.
        revision: Of the Hub's repository.
        device: Like "cpu".
        **kwargs: For `SentenceTransformer`.

    Raises:
        ImportError: mteb is missing.
    """
    from .mteb_api import SentenceTransformerEncoderWrapper

    return SentenceTransformerEncoderWrapper(model_name, revision=revision, device=device, **kwargs)


def hagmoe_model_meta(
    model: "SentenceTransformer",
    name: str,
    *,
    revision: str,
    release_date: str,
    license: str,
    languages: Sequence[str],
    training_datasets: Iterable[str],
    adapted_from: str | None = None,
    public_training_code: str | None = None,
    public_training_data: str | None = None,
    citation: str | None = None,
) -> "ModelMeta":
    """Describe a HAG-MoE for MTEB.

    What the model knows is counted: parameters (in all, active for one token, in lookup tables), memory, width, length,
    similarity. What only its makers know is asked for.

    Args:
        model: The HAG-MoE.
        name: Its Hub id, ORGANISATION/NAME.
        revision: Commit of its repository.
        release_date: Like "2026-11-22".
        license: As mteb writes it, like "apache-2.0".
        languages: Codes like "eng-Latn".
        training_datasets: mteb's names of tasks whose data it was trained on; empty where there are none. It decides
            what counts as zero-shot.
        adapted_from: Hub id of the dense parent.
        public_training_code: Where it is, None where it is not public.
        public_training_data: Where they are, None where they are not public.
        citation: BibTeX of its article.

    Returns:
        mteb's `ModelMeta`; `n_active_parameters` are those that take part in a matrix product for one token, as mteb
        counts them for dense models.

    Raises:
        ImportError: mteb is missing.
        ValueError: The model is no HAG-MoE, or mteb does not accept a field.
    """
    from .mteb_api import ModelMeta, ScoringFunction

    config = encoder_of(model).config
    if not isinstance(config, HagMoeConfig):
        raise ValueError(f"model is a {type(config).__name__.removesuffix('Config')}; allowed: a HAG-MoE.")
    has_pooler = getattr(encoder_of(model), "pooler", None) is not None
    counts = config.parameter_counts(add_pooling_layer=has_pooler)
    total = sum(parameter.numel() for parameter in model.parameters())
    heads = total - counts.total  # modules after the encoder: every text passes all of them
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return ModelMeta(
        loader=load_hagmoe,
        name=name,
        revision=revision,
        release_date=release_date,
        languages=list(languages),
        n_parameters=total,
        n_active_parameters_override=counts.active_non_embedding + heads,
        n_embedding_parameters=counts.embedding,
        memory_usage_mb=size / 2**20,
        max_tokens=model.max_seq_length,
        embed_dim=model.get_embedding_dimension(),
        license=license,
        open_weights=True,
        public_training_code=public_training_code,
        public_training_data=public_training_data,
        framework=["Sentence Transformers", "PyTorch", "Transformers", "safetensors"],
        reference=f"https://huggingface.co/{name}",
        similarity_fn_name=ScoringFunction.from_str(model.similarity_fn_name),
        use_instructions=any(model.prompts.values()),
        training_datasets=set(training_datasets),
        adapted_from=adapted_from,
        model_type=["dense"],
        citation=citation,
    )
