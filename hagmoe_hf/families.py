"""The families of dense encoders that can be upcycled: pure tables, from their names to those of a HAG-MoE.

One ordered table of parameter names per family (a parent's parameter takes the first rule that matches it whole), which
fields of its configuration mean the same, and what the others say about the shape.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from transformers import PreTrainedConfig

# A pattern that must match a whole name, and the name in the mixture. A tuple of names divides the parent's parameter
# into equal parts along its first axis; names that end in @0, @1 are such parts, put together in that order.
KeyRules: TypeAlias = tuple[tuple[str, str | tuple[str, ...]], ...]


@dataclass(frozen=True)
class Head:
    """What becomes of one class of a family.

    Attributes:
        mixture_class: Name of the HAG-MoE class that takes its place.
        key_rules: Rules for what lies outside of the encoder.
    """

    mixture_class: str
    key_rules: KeyRules = ()


@dataclass(frozen=True)
class Family:
    """How one family of dense encoders maps onto the HAG-MoE shape.

    Attributes:
        config_fields: Fields that carry the same name and meaning in both configurations.
        settings: From the parent's configuration to the HAG-MoE fields that it says under other names, or by being what it
            is.
        key_rules: Rules for the encoder's parameters.
        heads: The parent's class name -> what becomes of it.
        required: Fields of the parent's configuration that must have this value, where it has them at all.
        aliases: Parent parameters that only repeat another one.
    """

    config_fields: tuple[str, ...]
    settings: Callable[[PreTrainedConfig], dict[str, Any]]
    key_rules: KeyRules
    heads: dict[str, Head]
    required: dict[str, Any] = field(default_factory=dict)
    aliases: frozenset[str] = frozenset()


COMMON_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "initializer_range",
    "classifier_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "output_hidden_states",  # which later modules of a SentenceTransformer may weigh
    "output_attentions",
    "return_dict",
    "problem_type",
    "id2label",
    "label2id",
    "sentence_transformers",  # says what a CrossEncoder does with the logits
    "sbert_ce_default_activation_function",  # said so before
)
BERT_FIELDS = (
    *COMMON_FIELDS,
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "type_vocab_size",
    "layer_norm_eps",
)
CLASSIFIER: KeyRules = ((r"classifier\.(weight|bias)", r"classifier.\1"),)
SPAN_FINDER: KeyRules = ((r"qa_outputs\.(weight|bias)", r"qa_outputs.\1"),)

BERT = Family(
    config_fields=BERT_FIELDS,
    settings=lambda config: {},
    key_rules=(
        (r"embeddings\.(word|position|token_type)_embeddings\.weight", r"embeddings.\1_embeddings.weight"),
        (r"embeddings\.LayerNorm\.(weight|bias)", r"embeddings.norm.\1"),
        (r"encoder\.layer\.(\d+)\.attention\.self\.query\.(weight|bias)", r"layers.\1.attention.q_proj.\2"),
        (r"encoder\.layer\.(\d+)\.attention\.self\.key\.(weight|bias)", r"layers.\1.attention.k_proj.\2"),
        (r"encoder\.layer\.(\d+)\.attention\.self\.value\.(weight|bias)", r"layers.\1.attention.v_proj.\2"),
        (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
        (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.(weight|bias)", r"layers.\1.attention_norm.\2"),
        (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(weight|bias)", r"layers.\1.mlp.up_proj.\2"),
        (r"encoder\.layer\.(\d+)\.output\.dense\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
        (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.(weight|bias)", r"layers.\1.mlp_norm.\2"),
        (r"pooler\.dense\.(weight|bias)", r"pooler.dense.\1"),
    ),
    heads={
        "BertModel": Head("HagMoeModel"),
        "BertForMaskedLM": Head(
            "HagMoeForMaskedLM",
            (
                (r"cls\.predictions\.transform\.dense\.(weight|bias)", r"lm_head.dense.\1"),
                (r"cls\.predictions\.transform\.LayerNorm\.(weight|bias)", r"lm_head.norm.\1"),
                (r"cls\.predictions\.decoder\.(weight|bias)", r"lm_head.decoder.\1"),
            ),
        ),
        "BertForSequenceClassification": Head("HagMoeForSequenceClassification", CLASSIFIER),
        "BertForTokenClassification": Head("HagMoeForTokenClassification", CLASSIFIER),
        "BertForQuestionAnswering": Head("HagMoeForQuestionAnswering", SPAN_FINDER),
        "BertForMultipleChoice": Head("HagMoeForMultipleChoice", CLASSIFIER),
    },
    required={"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"},
    aliases=frozenset({"cls.predictions.bias"}),
)


def _roberta_settings(config: PreTrainedConfig) -> dict[str, Any]:
    if config.pad_token_id is None:
        raise ValueError(
            "pad_token_id=None in the parent's config cannot be upcycled; allowed: an id, positions start by it."
        )
    return {"position_offset": config.pad_token_id + 1, "classifier_activation": "gelu"}


def _roberta_heads(name: str) -> dict[str, Head]:
    return {
        f"{name}Model": Head("HagMoeModel"),
        f"{name}ForMaskedLM": Head(
            "HagMoeForMaskedLM",
            (
                (r"lm_head\.dense\.(weight|bias)", r"lm_head.dense.\1"),
                (r"lm_head\.layer_norm\.(weight|bias)", r"lm_head.norm.\1"),
                (r"lm_head\.decoder\.(weight|bias)", r"lm_head.decoder.\1"),
            ),
        ),
        # Its head begins with what BERT's encoder ends with: a dense layer and tanh on the first token's state
        f"{name}ForSequenceClassification": Head(
            "HagMoeForSequenceClassification",
            (
                (r"classifier\.dense\.(weight|bias)", r"model.pooler.dense.\1"),
                (r"classifier\.out_proj\.(weight|bias)", r"classifier.\1"),
            ),
        ),
        f"{name}ForTokenClassification": Head("HagMoeForTokenClassification", CLASSIFIER),
        f"{name}ForQuestionAnswering": Head("HagMoeForQuestionAnswering", SPAN_FINDER),
        f"{name}ForMultipleChoice": Head("HagMoeForMultipleChoice", CLASSIFIER),
    }


ROBERTA = replace(BERT, settings=_roberta_settings, heads=_roberta_heads("Roberta"), aliases=frozenset({"lm_head.bias"}))
XLM_ROBERTA = replace(ROBERTA, heads=_roberta_heads("XLMRoberta"))


def _modernbert_settings(config: PreTrainedConfig) -> dict[str, Any]:
    if config.local_attention < 2:
        raise ValueError(
            f"local_attention={config.local_attention} in the parent's config cannot be upcycled; allowed: 2 or more."
        )
    return {
        "hidden_act": config.hidden_activation,
        "hidden_dropout_prob": config.attention_dropout,  # after the attention's output projection, too
        "attention_probs_dropout_prob": config.attention_dropout,
        "layer_norm_eps": config.norm_eps,
        "sliding_window": config.local_attention // 2,
        "type_vocab_size": 0,
        "position_embedding_type": "rope",
        "norm_placement": "pre",
        "gated_mlp": True,
        "classifier_head": "transform",
    }


MODERNBERT_TRANSFORM: KeyRules = (
    (r"head\.(dense|norm)\.(weight|bias)", r"head.\1.\2"),
    (r"classifier\.(weight|bias)", r"classifier.\1"),
)
MODERNBERT = Family(
    config_fields=(
        *COMMON_FIELDS,
        "attention_bias",
        "classifier_activation",
        "classifier_bias",
        "classifier_pooling",
        "decoder_bias",
        "embedding_dropout",
        "layer_types",
        "mlp_bias",
        "mlp_dropout",
        "norm_bias",
        "rope_parameters",
    ),
    settings=_modernbert_settings,
    key_rules=(
        (r"embeddings\.tok_embeddings\.weight", r"embeddings.word_embeddings.weight"),
        (r"embeddings\.norm\.(weight|bias)", r"embeddings.norm.\1"),
        (
            r"layers\.(\d+)\.attn\.Wqkv\.(weight|bias)",
            (r"layers.\1.attention.q_proj.\2", r"layers.\1.attention.k_proj.\2", r"layers.\1.attention.v_proj.\2"),
        ),
        (r"layers\.(\d+)\.attn\.Wo\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
        (r"layers\.(\d+)\.attn_norm\.(weight|bias)", r"layers.\1.attention_norm.\2"),
        (r"layers\.(\d+)\.mlp\.Wi\.(weight|bias)", r"layers.\1.mlp.gate_up_proj.\2"),
        (r"layers\.(\d+)\.mlp\.Wo\.(weight|bias)", r"layers.\1.mlp.down_proj.\2"),
        (r"layers\.(\d+)\.mlp_norm\.(weight|bias)", r"layers.\1.mlp_norm.\2"),
        (r"final_norm\.(weight|bias)", r"final_norm.\1"),
    ),
    heads={
        "ModernBertModel": Head("HagMoeModel"),
        "ModernBertForMaskedLM": Head(
            "HagMoeForMaskedLM",
            (
                (r"head\.(dense|norm)\.(weight|bias)", r"lm_head.\1.\2"),
                (r"decoder\.(weight|bias)", r"lm_head.decoder.\1"),
            ),
        ),
        "ModernBertForSequenceClassification": Head("HagMoeForSequenceClassification", MODERNBERT_TRANSFORM),
        "ModernBertForTokenClassification": Head("HagMoeForTokenClassification", MODERNBERT_TRANSFORM),
        "ModernBertForQuestionAnswering": Head(
            "HagMoeForQuestionAnswering",
            (
                (r"head\.(dense|norm)\.(weight|bias)", r"head.\1.\2"),
                (r"classifier\.(weight|bias)", r"qa_outputs.\1"),
            ),
        ),
        "ModernBertForMultipleChoice": Head("HagMoeForMultipleChoice", MODERNBERT_TRANSFORM),
    },
)


def _nomic_bert_settings(config: PreTrainedConfig) -> dict[str, Any]:
    head_width = config.hidden_size // config.num_attention_heads
    if config.head_dim != head_width:
        raise ValueError(f"head_dim={config.head_dim} in the parent's config cannot be upcycled; allowed: {head_width}.")
    return {"position_embedding_type": "rope", "gated_mlp": True, "attention_bias": False, "mlp_bias": False}


NOMIC_BERT = Family(
    config_fields=(*BERT_FIELDS, "rope_parameters"),
    settings=_nomic_bert_settings,
    key_rules=(
        (r"embeddings\.(word|token_type)_embeddings\.weight", r"embeddings.\1_embeddings.weight"),
        (r"embeddings\.LayerNorm\.(weight|bias)", r"embeddings.norm.\1"),
        (r"layers\.(\d+)\.self_attn\.(q|k|v|o)_proj\.weight", r"layers.\1.attention.\2_proj.weight"),
        (r"layers\.(\d+)\.post_attention_layernorm\.(weight|bias)", r"layers.\1.attention_norm.\2"),
        (r"layers\.(\d+)\.mlp\.gate_proj\.weight", r"layers.\1.mlp.gate_up_proj.weight@0"),
        (r"layers\.(\d+)\.mlp\.up_proj\.weight", r"layers.\1.mlp.gate_up_proj.weight@1"),
        (r"layers\.(\d+)\.mlp\.down_proj\.weight", r"layers.\1.mlp.down_proj.weight"),
        (r"layers\.(\d+)\.post_mlp_layernorm\.(weight|bias)", r"layers.\1.mlp_norm.\2"),
        (r"pooler\.dense\.(weight|bias)", r"pooler.dense.\1"),
    ),
    heads={
        "NomicBertModel": Head("HagMoeModel"),
        "NomicBertForMaskedLM": Head(
            "HagMoeForMaskedLM",
            (
                (r"cls\.predictions\.transform\.dense\.(weight|bias)", r"lm_head.dense.\1"),
                (r"cls\.predictions\.transform\.layer_norm\.(weight|bias)", r"lm_head.norm.\1"),
                (r"cls\.predictions\.decoder\.(weight|bias)", r"lm_head.decoder.\1"),
            ),
        ),
        "NomicBertForSequenceClassification": Head("HagMoeForSequenceClassification", CLASSIFIER),
        "NomicBertForTokenClassification": Head("HagMoeForTokenClassification", CLASSIFIER),
    },
    aliases=frozenset({"cls.predictions.bias"}),
)

FAMILIES: dict[str, Family] = {
    "bert": BERT,
    "modernbert": MODERNBERT,
    "nomic_bert": NOMIC_BERT,
    "roberta": ROBERTA,
    "xlm-roberta": XLM_ROBERTA,
}
