"""From a dense text encoder to a HAG-MoE with identical outputs, and a report of what went where.

The feed-forward neurons of each chosen layer are divided into a shared slice, which becomes the shared expert, and a
routed slice, of which every routed expert starts as a copy. Whatever the router chooses, the weights of a token's experts
sum to 1, so the block computes what the parent's did (sparse upcycling, arXiv 2212.05055, made exact). The output bias is
added once.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from . import modeling_hagmoe, sentence
from .calibration import Calibration, Tokenize, calibrate
from .configuration_hagmoe import WIDTH_MULTIPLE, HagMoeConfig, default_mlp_layer_types
from .families import FAMILIES, Family, KeyRules
from .model_card import upcycled_card
from .modeling_hagmoe import HagMoeModel, HagMoePreTrainedModel, naming_damaged_weights, refuse_non_finite
from .ngram_memory import count_ngrams, give_memory
from .texts import single_texts, text_items

StateDict: TypeAlias = dict[str, Tensor]
CALIBRATION_LENGTH = 128  # tokens; what a text is about shows in its beginning


@dataclass(frozen=True)
class UpcyclingReport:
    """What an upcycling did; `print` it, or keep it as JSON through `to_dict`.

    Attributes:
        parent: Name or path of the dense parent.
        family: Its `model_type`.
        sparse_layers: Layers whose feed-forward block became a mixture.
        shared_width: Parent neurons in the shared expert of each such layer.
        routed_width: Parent neurons that every routed expert starts with.
        num_experts: Routed experts per sparse layer.
        copied: Parameters of the parent taken over as they are, as (name in the mixture, numbers).
        split: Feed-forward parameters of the parent that were divided, as (name in the parent's layout, numbers).
        new: Parameters without a counterpart in the parent, as (name, numbers).
        parent_parameters: Numbers in the parent.
        total_parameters: Numbers in the mixture.
        active_parameters: Numbers that one token passes in the mixture.
        calibration: What the gates were started from; None where they are random.
        ngrams: N-grams in the memory.
    """

    parent: str
    family: str
    sparse_layers: tuple[int, ...]
    shared_width: int
    routed_width: int
    num_experts: int
    copied: tuple[tuple[str, int], ...]
    split: tuple[tuple[str, int], ...]
    new: tuple[tuple[str, int], ...]
    parent_parameters: int
    total_parameters: int
    active_parameters: int
    calibration: Calibration | None = None
    ngrams: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        def line(label: str, entries: tuple[tuple[str, int], ...], remark: str) -> str:
            return f"  {label:<7} {len(entries):>4} tensors  {sum(size for _, size in entries):>13,} numbers   {remark}"

        ratio = self.active_parameters / self.parent_parameters
        layers = ", ".join(map(str, self.sparse_layers)) or "none"
        return "\n".join(
            (
                f"Upcycled {self.parent} ({self.family}); sparse layers: {layers}",
                line("copied", self.copied, "as they are"),
                line(
                    "split",
                    self.split,
                    f"{self.shared_width} neurons shared, {self.routed_width} in each of {self.num_experts} experts",
                ),
                line("new", self.new, "routers and expert output biases" + " and n-gram memory" * bool(self.ngrams)),
                f"  parent {self.parent_parameters:,} parameters; mixture {self.total_parameters:,} in total, "
                f"{self.active_parameters:,} active per token ({ratio:.4f}x the parent)",
                *((f"  n-gram memory: {self.ngrams:,} n-grams",) if self.ngrams else ()),
                *(() if self.calibration is None else (f"  {self.calibration}",)),
            )
        )


def upcycle(
    parent: Any,
    *,
    sparse_layers: Iterable[int] | None = None,
    n_group: int | None = None,
    num_experts: int | None = None,
    num_experts_per_tok: int = 1,
    topk_group: int = 1,
    shared_expert_fraction: float | None = None,
    group_routing: str = "sequence",
    group_input: str | None = None,
    combine_rule: str = "selection",
    calibration_texts: Iterable[str | Sequence[str]] | None = None,
    ngram_texts: Iterable[str | Sequence[str]] | None = None,
    ngram_memory_size: int = 65536,
    preserved_texts: Iterable[str | Sequence[str]] | None = None,
    seed: int = 0,
    allow_key_mismatch: bool = False,
) -> Any:
    """Turn a dense text encoder into a HAG-MoE that gives the same outputs.

    With `num_experts_per_tok=1` the mixture has its parent's active FLOPs; each further expert adds one routed slice.
    Its shape, where not given, is four groups of two experts beside a shared one in every second layer but the last; with
    `preserved_texts` two groups of one expert in every layer, each the parent's feed-forward block whole.

    Args:
        parent: A path or Hub id, a transformers model, or a `SentenceTransformer`, `CrossEncoder`, `SparseEncoder` or
            `MultiVectorEncoder`. It is left as it was.
        sparse_layers: Layers whose feed-forward block becomes a mixture, counted from 0, negative ones from the end. An
            empty list makes none: the parent in this package's code, with a memory where `ngram_texts` are given.
        n_group: Expert groups, a divisor of `num_experts`; 1 for a plain token router.
        num_experts: Routed experts per sparse layer, over all groups. Where not given, with `preserved_texts`, as many in
            each as a token passes.
        num_experts_per_tok: Routed experts that each token passes.
        topk_group: Groups that stay open for a sequence (or token).
        shared_expert_fraction: Share of the parent's feed-forward neurons that every token keeps passing, in [0, 1),
            rounded to a multiple of 8 neurons.
        group_routing: "sequence" or "token": who opens groups.
        group_input: What a text's groups are chosen from: "hidden_states", those of the layer, or "word_embeddings", so that
            the choice stays while the layers below learn. Where not given, the latter with `preserved_texts`.
        combine_rule: "selection" or "normalized"; "softmax" weights do not sum to 1 and could not reproduce the parent.
        calibration_texts: Texts like those that the mixture is for, some hundreds from every domain and language: the gates
            start from them, so that groups are evenly loaded from the first step on. Texts that belong together, such as a
            query and its answer, as a tuple (or list): groups are then what they share, domains and languages; groups of
            single texts are as much about their form, short or long. Where None, the gates start at random, and most
            texts open the same group. The outputs are the parent's either way.
        ngram_texts: Texts that the mixture will be trained on, best all of them, single or in tuples. Their most frequent
            n-grams get a memory, a row each, which learns fast: for texts like these, at some cost for others. Up to half
            of it are texts that are one n-gram each, such as a dictionary's words, however rare. Where None, there is no
            memory.
        ngram_memory_size: Most n-grams in that memory; each takes `hidden_size` numbers, and no matrix product. The
            beginnings of some of them may take such a row as well, which stays 0.
        preserved_texts: Texts whose vectors are to stay the parent's while the mixture learns others, such as those in its
            language while it learns more languages; some thousands. The first group becomes theirs: its gate starts from
            them and leaves it what it is unsure of, and no gradient reaches its experts. N-grams that occur in them get no
            row in the memory. Everything else that they pass is frozen (`requires_grad`), which leaves the memory and the
            other groups' experts to learn. Needs `calibration_texts` or `ngram_texts`, those of the others. Where None, all
            may change.
        seed: Seed of the new routers' weights, and of the calibration.
        allow_key_mismatch: Whether a checkpoint may hold weights that its class has no place for, or lack some that then
            stay random. A path or Hub id only.

    Returns:
        The same kind of thing: for a model of sentence-transformers (or a path to one, which has a `modules.json`) one of
        the same class and of stock modules, for a transformers model a `HagMoeModel` or the HAG-MoE class with the parent's
        head. Its `upcycling_report` is an `UpcyclingReport`.

    Raises:
        ValueError: A family, head, layer, width or option that cannot be upcycled, weights that are not finite, calibration
            texts that are none or too few, or such texts for a model that comes without its tokenizer; preserved texts
            without others, or in a mixture that has nothing left to learn.
        TypeError: `parent` is none of the above.
        OSError: `parent` names no model.
        ImportError: `parent` was saved by sentence-transformers, which is missing.

    Source: sparse upcycling, arXiv 2212.05055; shared experts, arXiv 2401.06066.
    """
    preserves = preserved_texts is not None
    if n_group is None:
        n_group = 2 if preserves else 4
    if num_experts is None:
        # What is no number is refused as such below
        is_countable = all(isinstance(number, Integral) and number > 0 for number in (n_group, num_experts_per_tok))
        num_experts = n_group * num_experts_per_tok if preserves and is_countable and n_group > 1 else 8
    if shared_expert_fraction is None:
        shared_expert_fraction = 0.0 if preserves else 0.5
    if group_input is None:
        group_input = "word_embeddings" if preserves else "hidden_states"
    options: dict[str, Any] = {
        "n_group": n_group,
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "topk_group": topk_group,
        "group_routing": group_routing,
        "group_input": group_input,
        "combine_rule": combine_rule,
        "preserve_first_group": preserves,
    }
    for name, value in options.items():  # NumPy's integers are none for the configuration
        options[name] = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value

    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r} is not possible; allowed: an integer from 0 to {2**32 - 1}.")
    seed = int(seed)
    texts: Any = None if calibration_texts is None else text_items("calibration_texts", calibration_texts)
    is_size = isinstance(ngram_memory_size, Integral) and not isinstance(ngram_memory_size, bool) and ngram_memory_size >= 1
    if not is_size:
        raise ValueError(f"ngram_memory_size={ngram_memory_size!r} is not possible; allowed: an integer of at least 1.")

    counted = None if ngram_texts is None else single_texts("ngram_texts", ngram_texts)
    kept, argument = None, "calibration_texts"
    if preserved_texts is not None:
        kept = [text for text in single_texts("preserved_texts", preserved_texts) if text.strip()]
        if not kept:
            raise ValueError("preserved_texts holds no text that is not empty; allowed: texts whose vectors are to stay.")
        argument = "ngram_texts" if texts is None else argument
        texts = counted if texts is None else texts
        if texts is None:
            raise ValueError(
                f"preserved_texts holds {len(kept)} texts, with calibration_texts=None and ngram_texts=None; allowed: the "
                "others' texts in one of these."
            )

    def upcycle_model(dense: PreTrainedModel) -> HagMoePreTrainedModel:
        mixture: Any = _upcycle_model(dense, sparse_layers, shared_expert_fraction, options, seed)
        if kept is not None and counted is None and not mixture.config.sparse_layers:
            raise ValueError("sparse_layers=[] and ngram_texts=None with preserved_texts: nothing learns; allowed: one.")
        if counted is not None:
            longest = getattr(given, "max_seq_length", None) or dense.config.max_position_embeddings
            tokenizer = _tokenizer_of(given, "ngram_texts")
            give_memory(mixture, *count_ngrams(tokenizer, longest, counted, kept, int(ngram_memory_size)))
        if texts is not None and mixture.config.sparse_layers:
            calibration = calibrate(mixture, _tokenize_for(given, mixture), texts, seed, kept or (), argument)
            mixture.upcycling_report = replace(mixture.upcycling_report, calibration=calibration)
        return mixture

    if isinstance(parent, str | os.PathLike):
        parent = os.path.expanduser(os.fspath(parent))
    given = parent
    if isinstance(parent, str):
        parent = load_parent(parent, allow_key_mismatch)
        given = parent if sentence.is_sentence_model(parent) else given
    if isinstance(parent, PreTrainedModel):
        result: Any = upcycle_model(parent)
    elif sentence.is_sentence_model(parent):
        result = _upcycle_sentence_model(parent, upcycle_model)
    else:
        raise TypeError(
            f"parent is a {type(parent).__name__}; allowed: a path or Hub id, a transformers model, a "
            f"{', '.join(sentence.MODEL_TYPES)}."
        )
    if kept is not None:
        freeze_preserved(result)
    return result


def freeze_preserved(mixture: torch.nn.Module, *, experts_only: bool = False) -> None:
    """Let only that learn which preserved texts do not pass: the memory, and the routed experts, of which theirs stay.

    A head is frozen, too. A model that was loaded needs it again before it is trained on.

    Args:
        mixture: An encoder, one with a head, or a `SentenceTransformer` around one, with `preserve_first_group`.
        experts_only: Whether all else learns as well, but for the routers: preserved texts keep their experts and move
            little, others learn more.

    Raises:
        ValueError: It is no mixture, or does not preserve its first group.
    """
    encoder: Any = next((module for module in mixture.modules() if isinstance(module, HagMoeModel)), None)
    if encoder is None:
        raise ValueError(f"This {type(mixture).__name__} holds no HAG-MoE; allowed: {sentence.allowed_mixture(mixture)}.")
    if not encoder.config.preserve_first_group:
        raise ValueError(
            f"preserve_first_group is not set in this {type(mixture).__name__}; allowed: mixtures that were upcycled with "
            "preserved_texts."
        )
    for name, parameter in mixture.named_parameters():
        learns_in_any_case = ".experts." in name or name.endswith("ngram_memory.rows")
        parameter.requires_grad_(learns_in_any_case or (experts_only and ".router." not in name))


def _tokenizer_of(given: Any, argument: str) -> Any:
    """The tokenizer that a parent comes with."""
    if isinstance(given, PreTrainedModel):
        raise ValueError(
            f"{argument} with a {type(given).__name__}, which comes without its tokenizer; allowed: a path or Hub "
            f"id, or a {', '.join(sentence.MODEL_TYPES)}."
        )
    return AutoTokenizer.from_pretrained(given) if isinstance(given, str) else given.tokenizer


def _tokenize_for(given: Any, mixture: HagMoePreTrainedModel) -> Tokenize:
    """How the texts of a parent are tokenized: by its own tokenizer, as far as it reads them."""
    tokenizer = _tokenizer_of(given, "calibration_texts")
    limits = (CALIBRATION_LENGTH, mixture.config.max_text_length, getattr(given, "max_seq_length", None))
    longest = min(limit for limit in limits if limit)
    return lambda texts: tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")


def load_parent(name_or_path: str | os.PathLike, allow_key_mismatch: bool = False) -> Any:
    """Load a dense model as what it was saved as: a model of sentence-transformers, or the transformers class in its config.

    Args:
        name_or_path: A local folder or a Hub id.
        allow_key_mismatch: Whether left-over and missing weights are only warned of.

    Raises:
        FileNotFoundError: `name_or_path` can only be a local folder, and there is none.
        ValueError: The checkpoint is damaged, lacks weights, or has some that would be left out; the message names them.
    """
    name = os.path.expanduser(os.fspath(name_or_path))
    if not os.path.isdir(name) and (os.path.isabs(name) or name.startswith(".") or name.count("/") > 1):
        raise FileNotFoundError(
            f"parent={name!r} is no folder; allowed: a local model folder or a Hub id like 'owner/name'."
        )
    with naming_damaged_weights(name), sentence.naming_the_model(name):
        if not sentence.is_sentence_transformer_path(name):
            architecture = (AutoConfig.from_pretrained(name).architectures or [""])[0]
            loader: Any = next((loader for suffix, loader in LOADERS.items() if architecture.endswith(suffix)), AutoModel)
            model, info = loader.from_pretrained(name, output_loading_info=True)
            _check_loading(model, info, allow_key_mismatch)
            return model
        parent = sentence.load_as_saved(name)
        # sentence-transformers does not say which weights it found, so the encoder is loaded once more
        encoder: Any = sentence.encoder_of(parent)
        subfolder = sentence.encoder_subfolder(name)
        _, info = type(encoder).from_pretrained(encoder.name_or_path, subfolder=subfolder, output_loading_info=True)
        _check_loading(encoder, info, allow_key_mismatch)
        return parent


LOADERS: dict[str, Any] = {
    "ForMaskedLM": AutoModelForMaskedLM,
    "ForPreTraining": AutoModelForMaskedLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
    "ForMultipleChoice": AutoModelForMultipleChoice,
}


def _check_loading(model: PreTrainedModel, info: dict, allow_key_mismatch: bool) -> None:
    """Refuse or tell what a checkpoint lacks or leaves over; an encoder's pooler that it lacks is taken away."""
    missing = set(info["missing_keys"])
    pooler = {key for key in missing if key.startswith("pooler.")}
    if pooler:
        model.pooler = None  # type: ignore[assignment] # it would be random, and look real
    missing -= pooler
    # Older versions of transformers saved this constant
    left_over = {key for key in info["unexpected_keys"] if not key.endswith(".position_ids")}
    if not missing and not left_over:
        return
    found = f"lacks the weights {sorted(missing)} and leaves over {sorted(left_over)}"
    if not allow_key_mismatch:
        raise ValueError(
            f"{model.name_or_path} {found}, read as {type(model).__name__}; allowed: a checkpoint whose weights all have a "
            "place (or without pooler), or allow_key_mismatch=True."
        )
    warnings.warn(f"{model.name_or_path} {found}: what is missing stays random, the rest is left out.", stacklevel=4)


def _upcycle_sentence_model(parent: Any, upcycle_model: Callable) -> Any:
    encoder = upcycle_model(sentence.encoder_of(parent))
    report = encoder.upcycling_report
    # A card is for publishing, so it shows the parent's name, not the folder it was loaded from
    public_report = replace(report, parent=Path(report.parent).name) if Path(report.parent).is_dir() else report
    tag = parent.model_card_data.pipeline_tag
    card = upcycled_card(str(public_report), sentence.card_text(parent), parent.model_type, tag)
    mixture = sentence.with_encoder(parent, encoder, card)
    mixture.upcycling_report = report
    return mixture


def _upcycle_model(
    parent: PreTrainedModel,
    sparse_layers: Iterable[int] | None,
    shared_expert_fraction: float,
    options: dict[str, Any],
    seed: int,
) -> HagMoePreTrainedModel:
    family, mixture_class, head_rules = _family_and_class(parent)
    name = parent.name_or_path or type(parent).__name__
    refuse_non_finite(parent, name)
    config = _mixture_config(parent, family, sparse_layers, shared_expert_fraction, options)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed the GPUs as well, for good
        mixture = mixture_class(config)
    mixture = mixture.to(device=parent.device, dtype=parent.dtype)  # type: ignore[call-arg]

    renamed = _rename(parent, head_rules + family.key_rules, family.aliases)
    weights, copied, split = _split_feed_forward(renamed, config)
    new = _load(mixture, weights)
    counts = config.parameter_counts()
    total = mixture.num_parameters()
    mixture.upcycling_report = UpcyclingReport(
        parent=name,
        family=parent.config.model_type,
        sparse_layers=tuple(config.sparse_layers),
        shared_width=cast(int, config.shared_expert_intermediate_size),
        routed_width=cast(int, config.moe_intermediate_size),
        num_experts=config.num_experts,
        copied=copied,
        split=split,
        new=new,
        parent_parameters=parent.num_parameters(),
        total_parameters=total,
        active_parameters=total - (counts.total - counts.active),
    )
    return mixture.train(parent.training)


def _family_and_class(parent: PreTrainedModel) -> tuple[Family, type[HagMoePreTrainedModel], KeyRules]:
    if isinstance(parent, HagMoePreTrainedModel):
        raise ValueError(f"{type(parent).__name__} is a mixture already; allowed: a dense model.")
    family = FAMILIES.get(parent.config.model_type)
    if family is None:
        raise ValueError(
            f"model_type={parent.config.model_type!r} cannot be upcycled; allowed: {', '.join(sorted(FAMILIES))}."
        )
    head = family.heads.get(type(parent).__name__)
    if head is None:
        raise ValueError(f"{type(parent).__name__} cannot be upcycled; allowed: {', '.join(sorted(family.heads))}.")
    for field, value in family.required.items():
        actual = getattr(parent.config, field, value)
        if actual != value:
            raise ValueError(f"{field}={actual!r} in the parent's config cannot be upcycled; allowed: {value!r}.")
    return family, getattr(modeling_hagmoe, head.mixture_class), head.key_rules


def _mixture_config(
    parent: PreTrainedModel,
    family: Family,
    sparse_layers: Iterable[int] | None,
    shared_expert_fraction: float,
    options: dict[str, Any],
) -> HagMoeConfig:
    if options["combine_rule"] == "softmax":
        raise ValueError(
            "combine_rule='softmax' cannot be upcycled, since its weights do not sum to 1 and the outputs would differ from "
            "the parent's; allowed: 'selection', or 'normalized' with num_experts_per_tok > 1."
        )
    fields = {field: getattr(parent.config, field) for field in family.config_fields if hasattr(parent.config, field)}
    fields |= family.settings(parent.config)
    fields["attn_implementation"] = parent.config._attn_implementation
    shared_width = _shared_width(parent.config.intermediate_size, shared_expert_fraction)
    try:
        return HagMoeConfig(
            **fields,
            **options,
            has_pooler=any("pooler." in key for key in parent.state_dict()),
            mlp_layer_types=_mlp_layer_types(
                parent.config.num_hidden_layers, sparse_layers, every_one=options["preserve_first_group"]
            ),
            shared_expert_intermediate_size=shared_width,
            moe_intermediate_size=parent.config.intermediate_size - shared_width,
        )
    except StrictDataclassError as error:  # which is no ValueError, but around one
        raise ValueError(str(error.__cause__ or error)) from error


def _mlp_layer_types(num_hidden_layers: int, sparse_layers: Iterable[int] | None, every_one: bool) -> list[str]:
    """Layers as given; where they are not, all or those of the default."""
    if sparse_layers is None and every_one:
        return ["sparse"] * num_hidden_layers
    if sparse_layers is None:
        return default_mlp_layer_types(num_hidden_layers)
    is_list = isinstance(sparse_layers, Iterable) and not isinstance(sparse_layers, str)
    layers: list[int] = list(sparse_layers) if is_list else []
    if not is_list or not all(isinstance(layer, Integral) and not isinstance(layer, bool) for layer in layers):
        raise ValueError(f"sparse_layers={sparse_layers!r} is not possible; allowed: a list of layer numbers, or None.")
    out_of_range = [layer for layer in layers if not -num_hidden_layers <= layer < num_hidden_layers]
    if out_of_range:
        raise ValueError(
            f"sparse_layers={layers} names layer {out_of_range[0]}; allowed: 0 to {num_hidden_layers - 1} "
            f"(or -{num_hidden_layers} to -1)."
        )
    sparse = {layer % num_hidden_layers for layer in layers}
    return ["sparse" if layer in sparse else "dense" for layer in range(num_hidden_layers)]


def _shared_width(intermediate_size: int, fraction: float) -> int:
    """Neurons of the shared slice: the fraction rounded to a multiple of 8, so that both slices keep a usable width."""
    is_number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
    if not is_number or not 0 <= fraction < 1:
        raise ValueError(f"shared_expert_fraction={fraction!r} is not possible; allowed: a number from 0 up to, not 1.")
    if intermediate_size % WIDTH_MULTIPLE:
        raise ValueError(
            f"intermediate_size={intermediate_size} in the parent's config cannot be split; allowed: a multiple of "
            f"{WIDTH_MULTIPLE} (grouped matrix products need rows of 16 bytes)."
        )
    width = round(intermediate_size * fraction / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    if width == intermediate_size:
        raise ValueError(
            f"shared_expert_fraction={fraction} leaves no neuron of intermediate_size={intermediate_size} to the routed "
            f"experts; allowed: up to {1 - WIDTH_MULTIPLE / intermediate_size:.4f}."
        )
    return width


def _rename(parent: PreTrainedModel, key_rules: KeyRules, aliases: frozenset[str]) -> StateDict:
    """The parent's weights under the mixture's names, feed-forward blocks still whole."""
    head_prefix = f"{parent.base_model_prefix}."
    own_prefix = f"{HagMoePreTrainedModel.base_model_prefix}."
    renamed: StateDict = {}
    unknown = []
    for key, tensor in parent.state_dict().items():
        if key in aliases:
            continue
        prefix = own_prefix if key.startswith(head_prefix) else ""
        names = mixture_names(key.removeprefix(head_prefix), key_rules)
        if not names:
            unknown.append(key)
        parts = tensor.detach().chunk(max(len(names), 1))
        renamed |= {prefix + name: part for name, part in zip(names, parts, strict=False)}
    if unknown:
        raise ValueError(
            f"{type(parent).__name__} has parameters that a HAG-MoE has no place for: {unknown}; allowed: those of a stock "
            f"{parent.config.model_type} model."
        )
    return _put_together(renamed)


def mixture_names(key: str, key_rules: KeyRules) -> tuple[str, ...]:
    """The names in the mixture of a parent's parameter, in the order of its parts; () where no rule knows it."""
    for pattern, replacement in key_rules:
        if match := re.fullmatch(pattern, key):
            templates = (replacement,) if isinstance(replacement, str) else replacement
            return tuple(match.expand(template) for template in templates)
    return ()


def _put_together(weights: StateDict) -> StateDict:
    """Concatenate NAME@0, NAME@1, ... along the first axis, as NAME."""
    parts: dict[str, dict[int, Tensor]] = {}
    whole: StateDict = {}
    for key, tensor in weights.items():
        name, is_part, place = key.partition("@")
        if is_part:
            parts.setdefault(name, {})[int(place)] = tensor
        else:
            whole[key] = tensor
    return whole | {name: torch.cat([found[place] for place in sorted(found)]) for name, found in parts.items()}


def _split_feed_forward(
    dense: StateDict, config: HagMoeConfig
) -> tuple[StateDict, tuple[tuple[str, int], ...], tuple[tuple[str, int], ...]]:
    """Divide the feed-forward blocks of the sparse layers; also tell what was copied and what was split."""
    shared, sparse = cast(int, config.shared_expert_intermediate_size), set(config.sparse_layers)
    weights: StateDict = {}
    copied, split = [], []
    for key, tensor in dense.items():
        match = re.fullmatch(r"((?:.*\.)?layers\.(\d+)\.mlp)\.(gate_up_proj|up_proj|down_proj)\.(weight|bias)", key)
        if match is None or int(match[2]) not in sparse:
            weights[key] = tensor
            copied.append((key, tensor.numel()))
            continue
        block, projection, kind = match[1], match[3], match[4]
        split.append((key, tensor.numel()))
        if (projection, kind) == ("down_proj", "bias"):  # the output bias: added once, outside the experts
            weights[f"{block}.shared_expert.down_proj.bias" if shared else f"{block}.output_bias"] = tensor
            weights[f"{block}.experts.down_proj_bias"] = tensor.new_zeros(config.num_experts, len(tensor))
            continue
        neuron_axis = 1 if projection == "down_proj" else 0
        halves = tensor.chunk(2) if projection == "gate_up_proj" else (tensor,)  # a neuron has a row in either half
        slices = [half.split([shared, half.shape[neuron_axis] - shared], dim=neuron_axis) for half in halves]
        shared_slice, routed_slice = (torch.cat(parts) for parts in zip(*slices, strict=True))
        if shared:
            weights[f"{block}.shared_expert.{projection}.{kind}"] = shared_slice
        stack = f"{block}.experts.{projection}" + ("_bias" if kind == "bias" else "")
        weights[stack] = routed_slice.expand(config.num_experts, *routed_slice.shape)
    return weights, tuple(copied), tuple(split)


def _load(mixture: HagMoePreTrainedModel, weights: StateDict) -> tuple[tuple[str, int], ...]:
    """Load `weights`; return what remains as initialised: the routers, and the experts' output biases, which start at 0."""
    missing, unexpected = mixture.load_state_dict(weights, strict=False)
    not_routers = [key for key in missing if ".router." not in key]
    if not_routers or unexpected:
        raise ValueError(f"The parent's weights do not fit: without counterpart {unexpected}, not filled {not_routers}.")
    new = {*missing, *(key for key in weights if key.endswith(".experts.down_proj_bias"))}
    return tuple((key, parameter.numel()) for key, parameter in mixture.named_parameters() if key in new)
