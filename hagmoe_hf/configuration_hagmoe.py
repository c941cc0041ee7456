"""The numbers of a HAG-MoE: its shape, its mixture, their validation, and how many parameters that makes.

This file travels to the Hub beside the weights, so it imports nothing but transformers.
"""

from typing import Literal, NamedTuple

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

WIDTH_MULTIPLE = 8  # grouped matrix products need rows of 16 bytes: 8 numbers of two bytes each


class ParameterCounts(NamedTuple):
    """Parameters of a `HagMoeModel`. "Active" is what one token passes: of the routed experts, only those chosen."""

    total: int
    active: int
    embedding: int  # the lookup tables (words, positions, token types), part of both numbers above

    @property
    def total_non_embedding(self) -> int:
        """Parameters without the lookup tables."""
        return self.total - self.embedding

    @property
    def active_non_embedding(self) -> int:
        """Parameters that take part in a matrix product for one token: what decides its FLOPs."""
        return self.active - self.embedding


def default_mlp_layer_types(num_hidden_layers: int) -> list[str]:
    """Every second layer is sparse, never the first, and never the last unless it is the only candidate.

    The last router of nomic-embed-text-v2-moe ended near uniform, and one sparse block gave most of the gain in a
    BERT study (arXiv 2401.15713): see `docs/decisions/0001-which-layers-are-sparse.md`.
    """
    sparse = set(range(1, num_hidden_layers - 1, 2)) or {0}
    return ["sparse" if layer in sparse else "dense" for layer in range(num_hidden_layers)]


def default_shared_expert_width(intermediate_size: int) -> int:
    """Half of the feed-forward neurons, rounded down to a width that grouped matrix products accept."""
    return intermediate_size // 2 // WIDTH_MULTIPLE * WIDTH_MULTIPLE


@strict
class HagMoeConfig(PreTrainedConfig):
    r"""
    Configuration of a [`HagMoeModel`]. The defaults are the shape of all-MiniLM-L6-v2 with the default mixture.

    Args:
        vocab_size (`int`): Number of word embeddings.
        hidden_size (`int`): Width D of the residual stream; a multiple of `num_attention_heads` and of 8.
        num_hidden_layers (`int`): Number of encoder layers.
        num_attention_heads (`int`): Attention heads per layer.
        intermediate_size (`int`): Width of a dense layer's feed-forward block.
        hidden_act (`str`): Activation of every feed-forward block and expert, a key of `transformers.activations.ACT2FN`.
        hidden_dropout_prob (`float`): Dropout after embeddings, attention and feed-forward blocks, in [0, 1].
        attention_probs_dropout_prob (`float`): Dropout of attention weights, in [0, 1].
        max_position_embeddings (`int`): Longest text in tokens.
        type_vocab_size (`int`): Number of token types.
        initializer_range (`float`): Standard deviation of new weights.
        layer_norm_eps (`float`): Epsilon of the layer norms.
        classifier_dropout (`float`, *optional*): Dropout before a classifier; `hidden_dropout_prob` where None.
        mlp_layer_types (`list[str]`, *optional*): "dense" or "sparse" for each layer; every second layer where None.
        num_experts (`int`): Routed experts E of a sparse layer, over all groups; at least 2.
        num_experts_per_tok (`int`): Routed experts K that each token passes.
        n_group (`int`): Expert groups G, a divisor of `num_experts`; 1 gives a plain token router.
        topk_group (`int`): Groups that stay open for a sequence (or a token).
        group_routing (`str`): Who opens groups: "sequence" (one choice for all tokens of a text) or "token".
        combine_rule (`str`): Weight of a chosen expert whose probability is p. "selection": 1/K in the forward pass, with
            the gradient of p; "softmax": p; "normalized": p over the sum of the chosen ones' (needs
            K > 1, and one group or more than one open group).
        moe_intermediate_size (`int`, *optional*): Width of a routed expert, a multiple of 8; what the shared expert leaves
            of `intermediate_size` where None.
        shared_expert_intermediate_size (`int`, *optional*): Width of the shared expert, a multiple of 8, 0 for none; half
            of `intermediate_size` where None.
        output_router_logits (`bool`): Whether outputs carry `router_logits`; a head's loss then holds the load balance term.
        router_aux_loss_coef (`float`): Weight of that term (for sentence-transformers losses there is `RouterCallback`).

    Raises:
        StrictDataclassFieldValidationError: A field has the wrong type.
        StrictDataclassClassValidationError: Fields that do not fit together; the message names field, value and what is
            allowed.
    """

    model_type = "hagmoe"

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-12
    classifier_dropout: float | int | None = None
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    mlp_layer_types: list[str] | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 1
    n_group: int = 4
    topk_group: int = 1
    group_routing: Literal["sequence", "token"] = "sequence"
    combine_rule: Literal["selection", "softmax", "normalized"] = "selection"
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 0.001

    def __post_init__(self, **kwargs):
        if self.mlp_layer_types is None:
            self.mlp_layer_types = default_mlp_layer_types(self.num_hidden_layers)
        if self.shared_expert_intermediate_size is None:
            self.shared_expert_intermediate_size = default_shared_expert_width(self.intermediate_size)
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size - self.shared_expert_intermediate_size
        super().__post_init__(**kwargs)

    @property
    def sparse_layers(self) -> list[int]:
        """Indices of the layers whose feed-forward block is a mixture."""
        return [layer for layer, kind in enumerate(self.mlp_layer_types or []) if kind == "sparse"]

    @property
    def experts_per_group(self) -> int:
        """Routed experts R in each group."""
        return self.num_experts // self.n_group

    def validate_sizes(self):
        """Widths, counts and probabilities that every encoder needs."""
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of num_attention_heads={self.num_attention_heads}",
        )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= 1, name, value, "a probability between 0 and 1")
        for name in ("initializer_range", "layer_norm_eps", "router_aux_loss_coef"):
            value = getattr(self, name)
            _require(0 <= value < float("inf"), name, value, "a finite number, 0 or more")
        _require(self.hidden_act in ACT2FN, "hidden_act", self.hidden_act, f"one of {sorted(ACT2FN)}")

    def validate_mixture(self):
        """Layers, experts, groups and widths that fit together."""
        layer_types = self.mlp_layer_types or []
        allowed = f"a list of num_hidden_layers={self.num_hidden_layers} entries, each 'dense' or 'sparse'"
        _require(
            len(layer_types) == self.num_hidden_layers and set(layer_types) <= {"dense", "sparse"},
            "mlp_layer_types",
            self.mlp_layer_types,
            allowed,
        )
        _require(self.num_experts >= 2, "num_experts", self.num_experts, "at least 2: one expert leaves nothing to route")
        _require(
            self.n_group >= 1 and self.num_experts % self.n_group == 0,
            "n_group",
            self.n_group,
            f"a divisor of num_experts={self.num_experts}",
        )
        _require(
            1 <= self.topk_group <= self.n_group,
            "topk_group",
            self.topk_group,
            f"between 1 and n_group={self.n_group}",
        )
        open_experts = self.topk_group * self.experts_per_group
        _require(
            1 <= self.num_experts_per_tok <= open_experts,
            "num_experts_per_tok",
            self.num_experts_per_tok,
            f"between 1 and {open_experts}, the experts in topk_group={self.topk_group} open group(s) of "
            f"{self.experts_per_group}",
        )
        if self.combine_rule == "normalized":
            others = "'selection' or 'softmax'"
            _require(
                self.num_experts_per_tok > 1,
                "combine_rule",
                self.combine_rule,
                f"{others} when num_experts_per_tok=1: a single normalized weight is always 1, so the router would get no "
                "gradient",
            )
            _require(
                self.n_group == 1 or self.topk_group > 1,
                "combine_rule",
                self.combine_rule,
                f"{others} when topk_group=1 of n_group={self.n_group}: the group's probability cancels out of the "
                "normalized weights, so the group gate would get no gradient",
            )
        if not self.sparse_layers:
            return
        for name, smallest in (("moe_intermediate_size", WIDTH_MULTIPLE), ("shared_expert_intermediate_size", 0)):
            value = getattr(self, name)
            _require(
                value >= smallest and value % WIDTH_MULTIPLE == 0,
                name,
                value,
                f"a multiple of {WIDTH_MULTIPLE}, at least {smallest} (grouped matrix products need rows of 16 bytes; "
                f"intermediate_size is {self.intermediate_size})",
            )
        _require(
            self.hidden_size % WIDTH_MULTIPLE == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of {WIDTH_MULTIPLE} in a model with sparse layers",
        )

    def parameter_counts(self, add_pooling_layer: bool = True) -> ParameterCounts:
        """Count the parameters of `HagMoeModel(self, add_pooling_layer)` without building it.

        Args:
            add_pooling_layer: Whether the model has a pooler.

        Returns:
            Total, active and embedding parameters; a test asserts them equal to the built model's.
        """
        D, E, G = self.hidden_size, self.num_experts, self.n_group
        embedding = (self.vocab_size + self.max_position_embeddings + self.type_vocab_size) * D

        def mlp(width: int | None) -> int:
            return (2 * D + 1) * (width or 0) + D

        expert = mlp(self.moe_intermediate_size)
        shared = mlp(self.shared_expert_intermediate_size)  # without a shared expert: the block's output bias alone
        groups_by_sequence = G > 1 and self.group_routing == "sequence"
        router = D * groups_by_sequence + D * G * (G > 1) + D * E * (E > G)
        attention_and_norms = 4 * (D * D + D) + 2 * 2 * D

        n_sparse = len(self.sparse_layers)
        n_dense = self.num_hidden_layers - n_sparse
        fixed = embedding + 2 * D + self.num_hidden_layers * attention_and_norms + n_dense * mlp(self.intermediate_size)
        fixed += n_sparse * (shared + router) + add_pooling_layer * (D * D + D)
        return ParameterCounts(
            total=fixed + n_sparse * E * expert,
            active=fixed + n_sparse * self.num_experts_per_tok * expert,
            embedding=embedding,
        )


def _require(holds: bool, field: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{field}={value!r} is not possible; allowed: {allowed}.")


__all__ = ["HagMoeConfig", "ParameterCounts"]
